"""
A file system whose daemon never answers when somebody closes a file of it, nor asks what it is.

Such a close cannot be interrupted, and who hangs in it cannot be killed: the kernel waits for the
answer, or for the end of the daemon.  So the daemon is an actor, which whoever uses it kills
first, before anybody who might hang, and which does not live for longer than ``LIFE``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import threading
from pathlib import Path

from support.actors import here

LIFE = 120  # seconds

_MS_NOSUID, _MS_NODEV, _MNT_DETACH = 2, 4, 2  # linux/mount.h
_ROOT, _FILE = 1, 2  # node numbers

# linux/fuse.h
_LOOKUP, _GETATTR, _OPEN, _RELEASE, _FLUSH, _INIT, _OPENDIR, _RELEASEDIR = 1, 3, 14, 18, 25, 26, 27, 29
_UNANSWERED = {2, 36, 42}  # FORGET, INTERRUPT, BATCH_FORGET
_ENOSYS = 38

_REQUEST = struct.Struct("=IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, ...
_ANSWER = struct.Struct("=IiQ")  # length, error, unique
_VERSION = struct.Struct("=II")
_INITIAL = struct.Struct("=IIIIHHIIHH32x")
_ATTRIBUTES = struct.Struct("=6Q10I")
_OPENED = struct.Struct("=QII")

_libc = ctypes.CDLL(None, use_errno=True)


def mount(folder: str, friend: int) -> None:
    """
    Be the daemon of a file system with one file, ``file``, of 4,096 bytes that nobody gets to see.

    Args:
        folder: where it is mounted.
        friend: the uid that is answered; all others wait, whatever they ask about the file.

    Raises:
        OSError: there is no /dev/fuse, or nothing may be mounted.
    """
    number = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={number},rootmode=40000,user_id={friend},group_id=0,allow_other"
    flags = _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"doorpool-test", folder.encode(), b"fuse", flags, options.encode()):
        code = ctypes.get_errno()
        os.close(number)
        raise OSError(code, os.strerror(code))
    signal.alarm(LIFE)
    here.withheld = []
    threading.Thread(target=_serve, args=(number, friend), daemon=True).start()


def unmount(folder: str) -> None:
    """Take it out of the tree; files that are open stay so."""
    if _libc.umount2(folder.encode(), _MNT_DETACH):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def withheld() -> int:
    """How many wait for the daemon in a close."""
    return len(here.withheld)


def _serve(number: int, friend: int) -> None:
    while True:
        request = os.read(number, 1 << 18)
        _, opcode, unique, node, uid, _, _, _, _ = _REQUEST.unpack_from(request)
        if opcode in _UNANSWERED:
            continue
        if uid != friend and (opcode == _FLUSH or (opcode == _GETATTR and node == _FILE)):
            if opcode == _FLUSH:
                here.withheld.append(unique)
            continue
        body = _answer_to(opcode, node, request[_REQUEST.size :])
        error = -_ENOSYS if body is None else 0
        answer = body or b""
        os.write(number, _ANSWER.pack(_ANSWER.size + len(answer), error, unique) + answer)


def _answer_to(opcode: int, node: int, body: bytes) -> bytes | None:
    if opcode == _INIT:
        major, minor = _VERSION.unpack_from(body)
        return _INITIAL.pack(major, min(minor, 31), 0, 0, 8, 8, 4096, 1, 0, 0)
    if opcode == _LOOKUP:
        return struct.pack("=4Q2I", _FILE, 1, 0, 0, 0, 0) + _attributes(_FILE)
    if opcode == _GETATTR:
        return struct.pack("=QII", 0, 0, 0) + _attributes(node)
    if opcode in (_OPEN, _OPENDIR):
        return _OPENED.pack(1, 0, 0)
    if opcode in (_RELEASE, _RELEASEDIR, _FLUSH):
        return b""
    return None


def _attributes(node: int) -> bytes:
    mode = 0o40755 if node == _ROOT else 0o100666
    return _ATTRIBUTES.pack(node, 4096, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


# -- for whoever has a file of it ------------------------------------------------------------------


def open_file(folder: str) -> None:
    """Keep a file of it open, in ``here.file``."""
    here.file = os.open(Path(folder) / "file", os.O_RDWR | os.O_CLOEXEC)


def state_of(pid: int) -> set[str]:
    """The states of a process's threads (proc(5)): "D" hangs for good."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return {(one / "stat").read_text().rpartition(")")[2].split()[0] for one in threads}
