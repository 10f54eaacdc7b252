"""
Sockets that carry credentials: how ours are made, and the one way to read them.

Every socket of the library asks for the sender's credentials from birth (a message sent
before ``SO_PASSCRED`` is set arrives from "pid 0, uid 65534").  Door sockets are
``SOCK_SEQPACKET`` and are never waited on inside a send or a receive: their other end is
shared, and a stranger may have cleared ``O_NONBLOCK``, so each call passes
``MSG_DONTWAIT``.  Knocks are answered on ``SOCK_STREAM`` pairs.  An opened channel is a
``SOCK_SEQPACKET`` pair, on which blocking is right, for nobody else ever held an end of it.

``recv_fds`` and ``send_fds`` of the standard library ignore their flags, so descriptors
would arrive inheritable: ``recvmsg`` and ``sendmsg`` are used throughout.

In a forked child every socket made here is closed and never shut down, for the parent
goes on using it: ``generation`` tells objects that they have crossed a fork.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import socket
import struct
import sys
import termios
import weakref
from collections.abc import Callable, Iterable, Sequence

import attrs

from doorpool._credentials import SO_PASSPIDFD, UCRED, Ids, own_ucred, unpack_ids
from doorpool._errors import SHORTAGE

SO_DOMAIN = 39  # asm-generic/socket.h
SO_COOKIE = 57
SO_PASSRIGHTS = 83
SCM_CREDENTIALS = 2  # linux/socket.h
SCM_PIDFD = 4
MADV_WIPEONFORK = 18  # asm-generic/mman-common.h

#: The most descriptors that one message takes (SCM_MAX_FD of the kernel); 254 is EINVAL.
MAX_DESCRIPTORS = 253

#: Room for everything a message may carry.  Always all of it: what finds no room is closed
#: by the kernel inside our ``recvmsg``, and such a close may block for as long as a sender
#: likes (SO_LINGER).
ANCILLARY_ROOM = socket.CMSG_SPACE(UCRED.size) + socket.CMSG_SPACE(4) + socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
#: Room for credentials only, for a look that takes nothing else in hand.
WHO_ROOM = socket.CMSG_SPACE(UCRED.size)

# Plain numbers: the flags of the socket module are enums, and ``a | b`` of two takes 0.6 µs.
MSG_DONTWAIT = int(socket.MSG_DONTWAIT)
MSG_NOSIGNAL = int(socket.MSG_NOSIGNAL)
MSG_PEEK = int(socket.MSG_PEEK)
MSG_CMSG_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
MSG_TRUNCATED = int(socket.MSG_CTRUNC)
MSG_CUT = int(socket.MSG_TRUNC)

DONTWAIT = MSG_DONTWAIT | MSG_NOSIGNAL

Ancillary = list[tuple[int, int, bytes]]

_libc = ctypes.CDLL(None, use_errno=True)

#: Counts the forks between the first process and this one.
generation = 0

#: A page that the kernel wipes in every forked child.  To look at it takes 0.02 µs, to ask for
#: the pid 0.17, and a call does so at both ends.  Precedent: fork_detect.c of BoringSSL.
_mark = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
_mark.madvise(MADV_WIPEONFORK)
_mark[0] = 1

_fork_hooks: list[Callable[[], None]] = []

_owned: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_owned_numbers: set[int] = set()


def own(sock: socket.socket) -> socket.socket:
    """Mark a socket as one that a forked child must not keep; return it."""
    _owned.add(sock)
    return sock


def disown(sock: socket.socket) -> socket.socket:
    """Let a forked child keep a socket after all; return it."""
    _owned.discard(sock)
    return sock


def own_number(descriptor: int) -> int:
    """Mark a bare descriptor as one that a forked child must not keep; return it."""
    _owned_numbers.add(descriptor)
    return descriptor


def close_number(descriptor: int) -> None:
    """Close a bare descriptor that was marked by ``own_number``."""
    _owned_numbers.discard(descriptor)
    os.close(descriptor)


def give_up_number(descriptor: int) -> int:
    """Return a bare descriptor that was marked by ``own_number``, for somebody else to own."""
    _owned_numbers.discard(descriptor)
    return descriptor


def bell_in(epoll: select.epoll, flags: int = 0) -> int:
    """
    Make an eventfd, watched in a set, which is closed if that cannot be had.

    Raises:
        OSError: too many descriptors; no memory.
    """
    bell = -1
    try:
        bell = own_number(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | flags))
        epoll.register(bell, select.EPOLLIN)
    except BaseException:
        epoll.close()
        if bell >= 0:
            close_number(bell)
        raise
    return bell


def ring(bell: int, count: int = 1) -> None:
    """
    Add to an eventfd, that somebody may wake up.

    One that is full has rung.  Whatever else it says the first time, it is asked again, for who is not woken
    may sleep for ever.
    """
    for _ in range(3):
        try:
            os.eventfd_write(bell, count)
        except BlockingIOError:
            return
        except OSError:
            continue
        return


def here() -> int:
    """
    Return the generation of this process, for objects that may have crossed a fork.

    A child of a ``fork`` that was made in C, past Python's hooks, is noticed here.
    """
    if not _mark[0]:
        _forget_parent()
    return generation


def on_fork(hook: Callable[[], None]) -> None:
    """Have a hook run in every forked child, after those that were there before."""
    _fork_hooks.append(hook)


def _forget_parent() -> None:
    """Close, in a forked child, what belongs to the parent (never shutting it down)."""
    global generation
    generation += 1
    _mark[0] = 1
    for sock in list(_owned):
        with contextlib.suppress(OSError):  # somebody has closed its number by hand
            sock.close()
    _owned.clear()
    for descriptor in list(_owned_numbers):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _owned_numbers.clear()
    for hook in _fork_hooks:
        hook()


os.register_at_fork(after_in_child=_forget_parent)


# -- making --------------------------------------------------------------------------


def _ask_for_credentials(sock: socket.socket, *, pidfds: bool) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    if not pidfds:
        return
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # before Linux 6.5 the numbers must do
            raise


def door_socket() -> socket.socket:
    """Make an unbound, non-blocking door socket that asks for credentials."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        _ask_for_credentials(sock, pidfds=True)
    except BaseException:
        sock.close()
        raise
    return own(sock)


def door_pair() -> tuple[socket.socket, socket.socket]:
    """Make a descriptor and its port: two connected, non-blocking door sockets."""
    holder, port = _pair(socket.SOCK_SEQPACKET, blocking=False)
    return holder, own(port)


def signal_pair() -> tuple[socket.socket, socket.socket]:
    """
    Make the pair by which signals come in (``signal.set_wakeup_fd``): where to read, where to write.

    It asks who wrote, for a forked child may.
    """
    return _pair(socket.SOCK_STREAM, pidfds=False, blocking=False)


def knock_pair() -> tuple[socket.socket, socket.socket]:
    """Make the stream pair over which a knock is answered."""
    one, other = _pair(socket.SOCK_STREAM)
    return own(one), own(other)


def private_pair() -> tuple[socket.socket, socket.socket]:
    """
    Make the pair of a channel.

    It asks for no pidfds: one on every message would cost 4 µs and a descriptor to close.
    """
    one, other = _pair(socket.SOCK_SEQPACKET, pidfds=False)
    return own(one), own(other)


def _pair(
    kind: int, *, pidfds: bool = True, blocking: bool = True
) -> tuple[socket.socket, socket.socket]:  # fmt: skip
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    try:
        for end in (one, other):
            if not blocking or end.gettimeout() is not None:  # socket.setdefaulttimeout() says so
                end.setblocking(blocking)
            _ask_for_credentials(end, pidfds=pidfds)
    except BaseException:
        one.close()
        other.close()
        raise
    return one, other


def refuse_rights(sock: socket.socket) -> None:
    """Have the kernel refuse, at its sender, whatever would bring a descriptor here (Linux 6.16+)."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # before that they come, and are closed
            raise


#: What a socket is: its family, type and protocol; for ``number_of``.
WHAT_IT_IS = SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL


def number_of(number: int, option: int) -> int:
    """
    Return what a socket is, one of ``WHAT_IT_IS``.  Waits for nobody who uses it.

    Raises:
        OSError: it is no socket.
    """
    value, size = ctypes.c_int(), ctypes.c_uint(4)
    if _libc.getsockopt(number, socket.SOL_SOCKET, option, ctypes.byref(value), ctypes.byref(size)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return value.value


def domain_of(number: int) -> int | None:
    """Return the address family of a socket; None of what is none.  Waits for nobody who uses it."""
    try:
        return number_of(number, SO_DOMAIN)
    except OSError:
        return None


def cookie_of(number: int) -> int:
    """
    Return the number that the kernel gives a socket, and no other ever again, whoever holds it.

    Raises:
        OSError: it is no socket.
    """
    cookie, size = ctypes.c_uint64(), ctypes.c_uint(8)
    where = ctypes.byref(cookie), ctypes.byref(size)
    if _libc.getsockopt(number, socket.SOL_SOCKET, SO_COOKIE, *where):
        failed = ctypes.get_errno()
        raise OSError(failed, os.strerror(failed))
    return cookie.value


def adopt(number: int, kind: int = -1) -> socket.socket:
    """
    Make a socket of a descriptor that has arrived, whatever ``socket.setdefaulttimeout()`` says.

    With a time-out CPython waits, and tries again, in spite of ``MSG_DONTWAIT``.

    CPython asks it for its name, which waits for whoever holds a socket that is not local; with
    a stranger's, look at ``domain_of`` before.

    Args:
        kind: what it is to be, if it is to be a local socket of that kind; ask ``is_unix`` if it is.

    Raises:
        OSError: it is no socket.
    """
    sock = socket.socket(-1 if kind < 0 else socket.AF_UNIX, kind, -1 if kind < 0 else 0, fileno=number)
    if sock.gettimeout():
        sock.settimeout(None)
    return sock


def is_unix(sock: socket.socket, kind: int) -> bool:
    """Tell whether this is a local socket of a kind, by asking the kernel."""
    try:
        return (
            sock.getsockopt(socket.SOL_SOCKET, SO_DOMAIN) == socket.AF_UNIX
            and sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == kind
        )
    except OSError:
        return False


def set_patience(sock: socket.socket, option: int, seconds: float) -> None:
    """Bound how long a blocking send or receive may make no progress (SO_SNDTIMEO, SO_RCVTIMEO)."""
    microseconds = max(1, int(seconds * 1_000_000))
    packed = struct.pack("@ll", microseconds // 1_000_000, microseconds % 1_000_000)
    sock.setsockopt(socket.SOL_SOCKET, option, packed)


def unsent(sock: socket.socket) -> int:
    """Return how many bytes of ours the other side has not read yet (SIOCOUTQ)."""
    return _ask_number(sock, termios.TIOCOUTQ)


def unread(sock: socket.socket) -> int:
    """Return how many bytes wait to be read, over all messages (SIOCINQ)."""
    return _ask_number(sock, termios.FIONREAD)


def coming(sock: socket.socket) -> int:
    """Return how many descriptors wait to be read, over all messages; the most of one if nobody can tell."""
    try:
        with open(f"/proc/self/fdinfo/{sock.fileno()}", "rb") as file:
            _, _, count = file.read(4096).partition(b"scm_fds:")  # Linux 5.6+
    except OSError:
        count = b""
    return int(count) if count.strip() else MAX_DESCRIPTORS


def _ask_number(sock: socket.socket, request: int) -> int:
    return int.from_bytes(fcntl.ioctl(sock.fileno(), request, b"\0\0\0\0"), sys.byteorder)


# -- messages with credentials and descriptors ---------------------------------------


def rights(descriptors: Iterable[int]) -> tuple[int, int, bytes]:
    """Return the ancillary item that passes descriptors on."""
    return socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors).tobytes()


def own_credentials() -> tuple[int, int, bytes]:
    """Return the ancillary item that names us, by our effective ids."""
    return socket.SOL_SOCKET, SCM_CREDENTIALS, own_ucred()


def send_letter(sock: socket.socket, data: bytes, descriptors: Sequence[int] = ()) -> None:
    """
    Send one message with our credentials, at once or not at all.

    Raises:
        BlockingIOError: the queue of the other side is full; nothing was sent.
        OSError: the other side is gone.
    """
    ancillary = [own_credentials()]
    if descriptors:
        ancillary.append(rights(descriptors))
    if sock.sendmsg([data], ancillary, DONTWAIT) != len(data):
        raise BlockingIOError(errno.EAGAIN, "the message did not go as a whole")


@attrs.define
class Letter:
    """
    A message as it came: its bytes, who sent it, and the descriptors it brought.

    The letter owns its descriptors until they are taken out of ``descriptors``.

    Attributes:
        data: the bytes.
        ids: pid, uid and gid of the sender; None if the kernel gave none with the bytes.
        ucred: the same, as it came.
        pidfd: of the sender, or -1.
        descriptors: those that came, in order, close-on-exec.
        truncated: some descriptors did not fit, into our table or into the room given.
        short: our table had no room for its pidfd.
        forged: the socket that it brought is not its sender's, who is not answered over it.
    """

    data: bytes
    ids: Ids | None = None
    ucred: bytes = b""
    pidfd: int = -1
    descriptors: list[int] = attrs.field(factory=list)
    truncated: bool = False
    short: bool = False
    forged: bool = False

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not _ending() and hasattr(self, "forged"):  # as in Channel; it is whole
            self.close()

    def close(self) -> None:
        """Close what nobody has taken, here and now; what others have sent ``_opening`` discards."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)
        while self.descriptors:
            os.close(self.descriptors.pop())


def receive_letter(sock: socket.socket, size: int, flags: int = 0, room: int = ANCILLARY_ROOM) -> Letter:
    """
    Receive one message, with whatever came along, never waiting.

    Args:
        flags: ``MSG_PEEK`` leaves it in the queue, with descriptors of its own: what came are
            duplicates then.
        room: for what comes along; less only together with ``MSG_PEEK``.

    Raises:
        BlockingIOError: there is none.
        OSError: the other side is gone.
    """
    came: list[tuple[bytes, list[tuple[int, int, bytes]], int, object]] = []
    letter = None
    try:
        # The call itself puts it into the list: what Ctrl-C, right behind it, would lose is bare numbers.
        came.extend(map(sock.recvmsg, (size,), (room,), (flags | MSG_DONTWAIT | MSG_CMSG_CLOEXEC,)))
        data, ancillary, flags, _ = came[0]
        letter = Letter(data, truncated=bool(flags & MSG_TRUNCATED))
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET:
                _put_into(letter, kind, value)
        if not data:
            letter.ids = None  # an end of file on a stream says "pid 0, uid 0": nobody said that
        return letter
    except BaseException:
        if came:
            _drop(letter, came[0][1])
        raise


def _drop(letter: Letter | None, ancillary: list[tuple[int, int, bytes]]) -> None:
    """Close all that came, of which a letter may own something already."""
    whole = Letter(b"")
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET:
            _put_into(whole, kind, value)
    if letter is not None:
        letter.descriptors, letter.pidfd = [], -1
    whole.close()


def _put_into(letter: Letter, kind: int, value: bytes) -> None:
    if kind == SCM_CREDENTIALS:
        letter.ids, letter.ucred = unpack_ids(value), value
    elif kind == SCM_PIDFD:
        letter.pidfd = struct.unpack("=i", value)[0]
        letter.short = -letter.pidfd in SHORTAGE  # the kernel puts its errors there
    elif kind == socket.SCM_RIGHTS:
        letter.descriptors += descriptors_in(value)


def descriptors_in(value: bytes) -> list[int]:
    """Return the numbers in an ``SCM_RIGHTS`` item; a cut last one counts for nothing."""
    numbers = array.array("i")
    numbers.frombytes(value[: len(value) - len(value) % numbers.itemsize])
    return numbers.tolist()
