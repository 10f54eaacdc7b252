"""
What strangers do at doors, by hand: knock and push bombs, and pose as a door that hands bombs out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from typing import Any

from support import byhand
from support.actors import Fd, here

_PR_SET_DUMPABLE = 4
_libc = ctypes.CDLL(None, use_errno=True)

# -- as callers -------------------------------------------------------------------------------


def knock_and_push(door: str | int, frames: list[bytes]) -> tuple[int, str] | None:
    """Knock; whatever the answer, write frames where they could be read."""
    with byhand.reach(door) as sock, byhand.knock(sock) as ours:
        for frame in frames:
            with contextlib.suppress(OSError):
                byhand.send(ours, frame)
        answer = byhand.receive(ours)
        assert not answer.fds, "a stranger got a channel"
        for frame in frames:
            with contextlib.suppress(OSError):
                byhand.send(ours, frame)
        return byhand.refusal_in(answer.data)


def speak_at_the_door(door: str | int, messages: list[bytes]) -> tuple[int, str] | None:
    """Send what is no knock on the door itself, then knock and hear what is said to that."""
    with byhand.reach(door) as sock:
        for message in messages:
            byhand.send(sock, message)
    return knock_and_push(door, [])


def knock_with(door: str | int, words: bytes) -> Any:
    """Knock with other words than one should; return what is answered."""
    with byhand.reach(door) as sock, byhand.knock(sock, words) as ours:
        return byhand.refusal_in(byhand.receive(ours).data)


def frames_with(bomb: bytes) -> list[bytes]:
    """The bomb in each kind of frame, and bare."""
    kinds = [byhand.frame_bytes(kind, 1, bomb) for kind in "QRFPAG"]
    return [*kinds, bomb, byhand.frame_bytes("R", 1, b"E" + bomb)]


# -- as servers -------------------------------------------------------------------------------


def pose_as_door(path: str | None, codec: int, bomb: bytes, *, forward: bytes | None = None) -> None:
    """
    Pose as a door: greet, answer every knock as one should, and push bombs into every channel.

    What callers write into these channels goes to ``here.overheard``, who came to
    ``here.callers``.
    """
    here.overheard, here.callers, here.knocks = b"", [], 0
    here.listener = None
    here.greeting = byhand.greeting_bytes(codec)
    if path is not None:
        here.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here.listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        here.listener.bind(path)
        os.chmod(path, 0o666)
        here.listener.listen()
        threading.Thread(target=accept_callers, args=(codec, bomb), daemon=True).start()
    here.codec, here.bomb = codec, bomb


def accept_callers(codec: int, bomb: bytes) -> None:
    while True:
        port, _ = here.listener.accept()
        here.callers.append(port)
        with contextlib.suppress(OSError):
            port.send(here.greeting)
        threading.Thread(target=_answer_knocks, args=(port, codec, bomb), daemon=True).start()


def false_descriptor() -> Fd:
    """Hand out a descriptor of the false door."""
    holder, port = byhand.door_pair(here.greeting)
    threading.Thread(target=_answer_knocks, args=(port, here.codec, here.bomb), daemon=True).start()
    return Fd(holder.detach())


def _answer_knocks(port: socket.socket, codec: int, bomb: bytes) -> None:
    while True:
        try:
            message = byhand.receive(port, patience=60)
        except OSError:
            return
        if not message.fds:
            here.overheard += message.data
            return
        here.knocks += 1
        with socket.socket(fileno=message.fds.pop()) as theirs:
            try:
                channel = byhand.admit(theirs, codec)
            except OSError:
                continue
            for frame in (byhand.frame_bytes("R", 1, bomb), byhand.frame_bytes("R", 2, b"E" + bomb)):
                with contextlib.suppress(OSError):
                    byhand.send(channel, frame)
            threading.Thread(target=_overhear, args=(channel,), daemon=True).start()


def _overhear(channel: socket.socket) -> None:
    with channel:
        here.overheard += byhand.read_all(channel, patience=60)
        here.ends = getattr(here, "ends", 0) + 1


def overheard() -> tuple[bytes, int]:
    return here.overheard, here.knocks


# -- in a sandbox -----------------------------------------------------------------------------


def drop_capabilities() -> None:
    """Give up what a process has over the namespace that it made."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert _libc.capset(header, data) == 0
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)
