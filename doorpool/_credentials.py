"""
Who is at the other end, as the kernel tells it, and who may unpickle for whom.

Unpickling runs the sender's code, and a call unpickles at both ends: so pickle is
spoken only between processes of one and the same, proven user.  This module holds the
facts and the rule; it moves no message and keeps no state of a conversation.

What counts as "the same user", and why each word is there:

- *Equal uids, both known.*  The kernel shows one overflow uid for everybody whom a
  user namespace does not map, real root included, and pid 0 for whoever is outside our
  pid namespace.  An overflow uid is therefore *unknown*, and equal to nobody, unless we
  are in the initial user namespace, where it is an ordinary person.
- *Real, effective and saved ids are one, at each side.*  A root daemon that has done
  ``seteuid(M)`` for a moment would otherwise unpickle M's bytes and M would regain root.
  A process knows this of itself, so each end looks at itself, at every opening.
- *No privileges from the file* (``AT_SECURE``) *and no capabilities in an ordinary user*:
  the same, for set-uid programs and file capabilities.
- *One user namespace*, where the kernel can say (Linux 6.11): a sandboxed process with
  our uid mapped cannot trace us, so unpickling its bytes would let it out.

A pid is a hint for people and logs, for which ``Credentials.pidfd`` gives the process itself, or says that
the number may have been given to another.  Whether two messages come from one process is
asked of pidfds, whose inode numbers are never reused (Linux 6.9; before that they are
all alike, and the comparison of pid, uid and gid stands alone, which is enough because
only a message that carries the socket is ever believed).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from functools import lru_cache

import attrs

from doorpool._descriptor import Descriptor
from doorpool._errors import SHORTAGE

__all__ = ["Credentials"]

# asm-generic/socket.h; not in the socket module of CPython 3.11.
SO_PEERGROUPS = 59
SO_PASSPIDFD = 76
SO_PEERPIDFD = 77

#: ``struct ucred``: the pid is signed, the ids are not.  Read as signed, uid 4,000,000,000
#: would be a negative number, which other programs have taken for "nobody" or for root.
UCRED = struct.Struct("=iII")

_PIDFD_GET_USER_NAMESPACE = 0xFF09  # linux/pidfd.h: _IO(0xFF, 9)
_AT_SECURE = 23  # linux/auxvec.h
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.getauxval.restype = ctypes.c_ulong
_libc.getauxval.argtypes = [ctypes.c_ulong]


#: Device and inode of a pidfd: no two processes ever have the same.
ProcessId = tuple[int, int]

#: Groups of a peer that are kept.  A user of many sub-gids may have 65,536, and each channel would.
MOST_GROUPS = 1024

_SHOWN_GROUPS = 32  #: Of them in a text, and so in a line of a log.


def _shown_groups(groups: tuple[int, ...] | None) -> str:
    if groups is None or len(groups) <= _SHOWN_GROUPS:
        return repr(groups)
    return f"({', '.join(map(str, groups[:_SHOWN_GROUPS]))}, ... {len(groups)} in all)"


@attrs.frozen
class Credentials:
    """
    Who is calling, or who answers: effective ids, as the kernel gave them at opening.

    Attributes:
        pid: the process, or None if it is outside our pid namespace.  A hint: the number
            may have been given to another process since.
        uid: the user, or None if the kernel could not say.
        gid: the group, or None if the kernel could not say.
        groups: the supplementary groups, or None if the kernel could not say, or they are more than 1,024.

    Modelled on: door_ucred(3C)
    """

    pid: int | None
    uid: int | None
    gid: int | None
    groups: tuple[int, ...] | None = attrs.field(repr=_shown_groups)
    _process: ProcessId | None = attrs.field(default=None, eq=False, repr=False)

    def pidfd(self) -> Descriptor:
        """
        Return a descriptor of the very process: readable once it has ended, to be signalled by.

        Close-on-exec, and the caller's to close.  Waits for nothing.

        Raises:
            ProcessLookupError: there is no such process any more; or its number may be another's by
                now: it is, or this kernel (before Linux 6.9) cannot tell; or it is outside our pid
                namespace, where no number says which it is.
            OSError: ``EMFILE``.

        Modelled on: pidfd_open(2)
        """
        if self.pid is None:
            raise ProcessLookupError(errno.ESRCH, "the process has no number in our pid namespace")
        descriptor = Descriptor(os.pidfd_open(self.pid))
        try:
            bar = self._pid_bar(descriptor.fileno())
            if bar is not None:
                raise ProcessLookupError(errno.ESRCH, bar)
        except BaseException:
            descriptor.close()
            raise
        return descriptor

    def _pid_bar(self, pidfd: int) -> str | None:
        """Say why a pidfd of our number may be of another process; None if it is of ours."""
        found = process_id(pidfd)
        if self._process is not None and found is not None:
            same = found == self._process
            return None if same else f"pid {self.pid} has been given to another process since"
        if self.pid == os.getpid():
            return None
        return f"pid {self.pid} may have been given to another process since: the kernel does not say"


Ids = tuple[int, int, int]  # pid, uid, gid, just as they stand in a struct ucred


def unpack_ids(ucred: bytes) -> Ids:
    """Read a ``struct ucred``; raise ``ValueError`` if it is none."""
    if len(ucred) != UCRED.size:
        raise ValueError(f"credentials of {len(ucred)} bytes, not {UCRED.size}")
    pid, uid, gid = UCRED.unpack(ucred)
    return pid, uid, gid


def own_ucred() -> bytes:
    """Pack our pid and effective ids, to be sent as explicit ``SCM_CREDENTIALS``."""
    return UCRED.pack(os.getpid(), os.geteuid(), os.getegid())


def sends_effective_ids_by_itself() -> bool:
    """
    Tell whether the kernel's own credentials on a message are our effective ids.

    They are our *real* ids; where the two differ each message must carry them explicitly.
    """
    return os.getuid() == os.geteuid() and os.getgid() == os.getegid()


# -- what the kernel says of a socket's other end ------------------------------------


def peer_ucred(sock: socket.socket) -> bytes:
    """Return the ``struct ucred`` of whoever made (or listened at) the other end."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)


def peer_pidfd(sock: socket.socket) -> int:
    """
    Return a pidfd of whoever made the other end; the caller owns it.

    Returns -1 if this kernel (before 6.5) cannot say, or the process is gone for good.
    """
    try:
        number = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.ESRCH, errno.ENODATA, errno.EINVAL):
            return -1
        raise
    try:
        os.set_inheritable(number, False)
    except BaseException:
        os.close(number)
        raise
    return number


def peer_groups(sock: socket.socket) -> tuple[int, ...] | None:
    """Return the supplementary groups of whoever made the other end, None if unknown or too many."""
    size = 1024  # the most that socket.getsockopt takes: 256 groups
    try:
        packed = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, size)
    except OSError as error:
        if error.errno != errno.ERANGE:
            return None
        many = _many_groups(sock.fileno())
        if many is None:
            return None
        packed = many
    return struct.unpack(f"={len(packed) // 4}I", packed)


def _many_groups(descriptor: int) -> bytes | None:
    """Ask for the groups of somebody who has more than 256 of them; None if they are over ``MOST_GROUPS``."""
    buffer = ctypes.create_string_buffer(4 * MOST_GROUPS)
    size = ctypes.c_uint(len(buffer))
    if _libc.getsockopt(descriptor, socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(size)):
        number = ctypes.get_errno()
        if number == errno.ERANGE:
            return None
        raise OSError(number, os.strerror(number))
    return buffer.raw[: size.value]


@lru_cache(maxsize=1)
def tells_processes() -> bool:
    """Tell whether this kernel gives pidfds of senders and peers; a missing one means something then."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.getsockopt(socket.SOL_SOCKET, SO_PASSPIDFD)
        except OSError:
            return False
    return True


def same_process(one: int, other: int) -> bool:
    """
    Tell whether two pidfds name one process.

    With those of a kernel before 6.9, or from one that has none (-1) to give, this is True,
    and the numbers that the caller has compared already must do.
    """
    if one < 0 or other < 0:
        return not tells_processes()
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


@lru_cache(maxsize=1)
def _anonymous_device() -> int:
    """Return the device on which all inodes are alike, and pidfds were before Linux 6.9."""
    number = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        return os.fstat(number).st_dev
    finally:
        os.close(number)


def process_id(pidfd: int) -> ProcessId | None:
    """Return what tells a process from all others, of which the kernel must be 6.9 or later; else None."""
    if pidfd < 0:
        return None
    status = os.fstat(pidfd)
    return None if status.st_dev == _anonymous_device() else (status.st_dev, status.st_ino)


# -- known and unknown ---------------------------------------------------------------


@lru_cache(maxsize=2)
def overflow_ids(kind: str) -> frozenset[int]:
    """Return the ids, "uid" or "gid", that may mean "somebody who is not mapped here"."""
    try:
        with open(f"/proc/sys/kernel/overflow{kind}") as file:
            return frozenset({65_534, int(file.read())})
    except (OSError, ValueError):
        return frozenset({65_534})


_INITIAL_USER_NAMESPACE = 0xEFFFFFFD  # linux/proc_ns.h: PROC_USER_INIT_INO


class _Seen(threading.local):
    namespace: tuple[int, int] | None = None


_seen = _Seen()


def _own_user_namespace() -> tuple[int, int]:
    """
    Return which user namespace this process is in.

    A process of several threads cannot change it (``unshare`` and ``setns`` refuse).  So what a
    thread has seen that is not the process's first one (which it becomes in a forked child) holds
    as long as it lives.  The first may be the only one, and looks each time: 8 µs.
    """
    several = threading.get_native_id() != os.getpid()
    if several and _seen.namespace is not None:
        return _seen.namespace
    status = os.stat("/proc/self/ns/user")
    found = status.st_dev, status.st_ino
    if several:
        _seen.namespace = found
    return found


def _in_initial_user_namespace() -> bool:
    try:
        return _own_user_namespace()[1] == _INITIAL_USER_NAMESPACE
    except OSError:
        return False  # cannot tell, so an overflow uid stays unknown


def _known_id(number: int, pid: int, kind: str) -> int | None:
    """Return an id of a ucred, or None if it stands for nobody in particular."""
    if number == 0xFFFFFFFF:
        return None
    if number in overflow_ids(kind) and (pid <= 0 or not _in_initial_user_namespace()):
        return None
    return number


def known_uid(uid: int) -> int | None:
    """Return the owner of a file, or None if the number stands for nobody in particular here."""
    return _known_id(uid, os.getpid(), "uid")


def credentials_of(ids: Ids, groups: tuple[int, ...] | None, pidfd: int = -1) -> Credentials:
    """Turn what the kernel gave, perhaps with a pidfd that stays the caller's, into what may be believed."""
    pid, uid, gid = ids
    return Credentials(
        pid=pid if pid > 0 else None,
        uid=_known_id(uid, pid, "uid"),
        gid=_known_id(gid, pid, "gid"),
        groups=groups,
        process=process_id(pidfd),
    )


def is_strange(uid: int | None) -> bool:
    """Tell whether a uid is neither ours nor root's; None is one of whom nothing is known."""
    return uid is None or uid not in (os.geteuid(), 0)


# -- who may speak pickle ------------------------------------------------------------


def pickle_bar_here() -> str | None:
    """Say why this process must not unpickle for a peer; None if nothing speaks against it."""
    uids, gids = os.getresuid(), os.getresgid()
    if not uids[0] == uids[1] == uids[2]:
        return f"real, effective and saved uid of this process are {uids}, not one"
    if not gids[0] == gids[1] == gids[2]:
        return f"real, effective and saved gid of this process are {gids}, not one"
    if _got_privileges():
        return "this process got privileges from its program file (set-uid, set-gid or capabilities)"
    if uids[1] != 0 and _permitted_capabilities():
        return f"this process of uid {uids[1]} holds capabilities"
    return None


@lru_cache(maxsize=1)  # a fact of the program that runs, from its first moment
def _got_privileges() -> bool:
    return bool(_libc.getauxval(_AT_SECURE))


def _permitted_capabilities() -> int:
    """
    Return the permitted capabilities of all threads as a bit set (capget(2)).

    Linux keeps them for each thread, and what is unpickled in one can use those of all, for
    it can write to all of the memory.
    """
    # The main thread's number may be that from before a fork; it is the process's.
    main = threading.main_thread()
    others = {thread.native_id or 0 for thread in threading.enumerate() if thread is not main}
    held = 0
    for thread in others | {os.getpid(), 0}:  # 0: this one
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, thread)
        data = (ctypes.c_uint32 * 6)()
        if _libc.capget(header, data) == 0:
            held |= int(data[1]) | int(data[4]) << 32
        elif ctypes.get_errno() != errno.ESRCH:
            return -1  # cannot tell: as if it held them
    return held


def pickle_bar(peer: Credentials, pidfd: int, *, trust: str) -> str | None:
    """
    Say why pickle may not be spoken between this process and a peer; None if it may.

    Args:
        peer: the peer, as believed.
        pidfd: a pidfd of it, or -1.
        trust: "namespace", the rule; "uid" leaves out the comparison of user namespaces.

    Raises:
        OSError: one of ``SHORTAGE``: nothing could be found out just now.
    """
    own = os.geteuid()
    if peer.uid is None:
        return (
            f"pickle is spoken only within one uid; ours is {own}, the kernel does not say whose the other is"
        )
    if peer.uid != own:
        return f"pickle is spoken only within one uid; ours is {own}, the other side's {peer.uid}"
    return pickle_bar_here() or (None if trust == "uid" else _namespace_bar(pidfd))


#: The bar of a peer that is about to be gone, of which the kernel tells nothing more.
ENDING = "its process is ending"

_NOT_TOLD = (
    "pickle is spoken only within one user namespace, and the kernel does not tell us "
    'the other side\'s ({}); trust="uid" leaves this rule out'
)


def _namespace_bar(pidfd: int) -> str | None:
    """Say why a peer does not count as being in our user namespace; None if it does."""
    if pidfd < 0:
        return _NOT_TOLD.format("no such process") if tells_processes() else None
    try:
        descriptor = fcntl.ioctl(pidfd, _PIDFD_GET_USER_NAMESPACE)
    except OSError as error:
        if error.errno in (errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            return None  # a kernel before 6.11 cannot say
        if error.errno in SHORTAGE:
            raise
        # A process that ends has left its namespaces before its sockets are closed.
        return ENDING if error.errno == errno.ESRCH else _NOT_TOLD.format(error.strerror)
    try:
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) == _own_user_namespace():
            return None
    except OSError as error:
        if error.errno in SHORTAGE:
            raise
        return _NOT_TOLD.format(error.strerror)
    finally:
        os.close(descriptor)
    return (
        "pickle is spoken only within one user namespace, and the other side is in another "
        '(a sandbox or a container); trust="uid" leaves this rule out'
    )
