"""
Closing what others have sent, which may take as long as they like.

A ``close`` can block.  A TCP socket with ``SO_LINGER`` waits in it for its other side; a file of
somebody's own file system (FUSE) waits for a daemon of his; a queue that is closed closes the
descriptors in the messages that nobody has read.  Whoever chooses what we are sent chooses how
long that takes, so it is done neither by the keeper nor by a server's or a user's thread, but by
a few janitors: daemon threads that come when there is something to close and soon go again.

What cannot block is closed where it is, which is cheap: a local socket with nothing to read, and
what has no file system behind it (pipes, eventfds, pidfds).  So are the files that our own user
or root has sent, who could stop us in simpler ways: whoever finds no room for what he was sent
finds it as soon as he is told.  Nothing else is asked of a descriptor before a janitor has it: even
``fstat`` may wait for a daemon, and ``setsockopt`` for whoever holds the socket.

A file whose daemon never answers is the worst: its close cannot be interrupted, so that the process
can neither be reaped while one hangs in it, nor exit with it open.  The kernel has no other way to
get rid of a number, so the rest must go on without its janitor: those of one uid are few, as are
those of all strangers, and the others close what the others have sent.

A janitor switches lingering *off*, so that the kernel delivers the rest behind our back, and the
close returns.  (Lingering for 0 seconds would return as well, but cut the connection, which may be
an honest sender's.)  Files have no such switch, nor has what lies in the queue of a socket.  So a
janitor can be held up for good; whoever holds one up, or lets much pile up before them, is not
heard any more meanwhile (``stuck``): neither his knocks are, nor his channels.  And what waits
for them is in our table of descriptors, so it goes on counting as its sender's (``held``).

Much may pile up for a moment before janitors whom nobody holds up: an honest caller's files, who calls
again at once.  His channel is left alone until they have been closed (``when_closed``).

A finalizer may come here, anywhere, and the keeper with its lock; and other finalizers, which
want that lock, may run in the middle of what is done here.  So there is no lock: what is counted
are the items of a list, which come and go one at a time, and threads are started past
``threading``, which has locks of its own.

After a fork the janitors are the parent's.  What had not been begun yet is closed by both.
"""

from __future__ import annotations

import _thread
import ctypes
import io
import os
import queue
import select
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, MutableSequence
from contextlib import suppress

from doorpool import _sockets
from doorpool._credentials import is_strange
from doorpool._descriptor import NOBODY

AT_MOST = 16  #: Janitors at a time.
AT_MOST_STRANGE = 12  #: Of them, such as close what strangers have sent.
AT_MOST_HIS = 2  #: Of those, what one of them has sent.
MOST_WAITING = 32  #: Descriptors of one uid that wait for them, before it is not heard any more.
IDLE = 0.2  #: Seconds that one waits for more.

PATIENCE = 1.0  #: Seconds that a close may take before its janitor counts as stuck.


_LOOK = _sockets.MSG_PEEK | _sockets.MSG_DONTWAIT

_SO_LINGER_OFF = b"\0" * 8  # struct linger

_libc = ctypes.CDLL(None, use_errno=True)

#: As a number; the property of ``socket.socket`` makes an enum of it, which takes a microsecond.
_type_of = socket.SocketType.type.__get__

#: A descriptor, or a raw file that was made of one already: that gives its number back by closing only.
Open = int | io.FileIO

Told = tuple[int | None, Callable[[], None]]  # whom to call back when nothing of a uid is left

Closed = tuple[Open, int | None]  # that, and the uid that sent it


class _Crew:
    """The janitors of one process, and what waits for them."""

    def __init__(self, waiting: deque[Closed]) -> None:
        self.waiting = waiting
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._absent = [None] * AT_MOST  # an item for each janitor that may still come
        self._busy: dict[int, tuple[int | None, float]] = {}
        self.told: list[Told] = []

    @property
    def _janitors(self) -> int:
        return AT_MOST - len(self._absent)

    def wake(self) -> None:
        """See to it that somebody takes what waits, unless all janitors are at work that may."""
        self._bell.put(None)
        if self._janitors > len(self._busy) or self._next() is None:
            return
        try:
            self._absent.pop()
        except IndexError:
            return
        try:
            _thread.start_new_thread(self._work, ())
        except RuntimeError:  # no thread to be had: what waits is closed when there is one
            self._absent.append(None)

    def stuck(self) -> set[int | None]:
        """Return the uids that have held a janitor up for too long, or let too much pile up."""
        if not self._busy:
            return set()
        since = time.monotonic() - PATIENCE
        uids = {uid for uid, begun in list(self._busy.values()) if begun < since}
        if len(self.waiting) >= MOST_WAITING:
            counts = Counter(uid for _, uid in list(self.waiting))
            uids |= {uid for uid, count in counts.items() if count >= MOST_WAITING}
        return uids

    def held(self) -> Counter[int | None]:
        """Return how many descriptors wait or are being closed, by the uid that sent them."""
        held = Counter(uid for _, uid in list(self.waiting))
        held.update(uid for uid, _ in list(self._busy.values()))
        return held

    def is_late(self, uid: int | None) -> bool:
        """Tell whether a janitor has been closing something of a uid's for too long."""
        since = time.monotonic() - PATIENCE
        return any(whose == uid and begun < since for whose, begun in list(self._busy.values()))

    def when_closed(self, told: Told) -> None:
        self.told.append(told)
        self._tell()  # it may have been closed just now

    def _tell(self) -> None:
        """Call back those who wait for a uid of which nothing is left."""
        held = self.held()
        for told in [told for told in list(self.told) if not held[told[0]]]:
            with suppress(ValueError):  # another was quicker
                self.told.remove(told)
                told[1]()

    def _next(self) -> Closed | None:
        """Return what is to be closed next; None if it is the turn of nothing that waits."""
        busy = Counter(uid for uid, _ in list(self._busy.values()) if _is_bounded(uid))
        if not busy:
            with suppress(IndexError):
                return self.waiting[0]
            return None
        full = busy.total() >= AT_MOST_STRANGE
        for it in list(self.waiting):
            if not _is_bounded(it[1]) or not (full or busy[it[1]] >= AT_MOST_HIS):
                return it
        return None

    def _work(self) -> None:
        # A signal that came to a thread which hangs in the kernel would not be heard.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self._close_next() or self._more():
            continue
        self._absent.append(None)
        if self._next() is not None:  # it came between the last look and now
            self.wake()

    def _more(self) -> bool:
        with suppress(queue.Empty):
            self._bell.get(timeout=IDLE)
            return True
        return False

    def _close_next(self) -> bool:
        me = _thread.get_ident()
        if (it := self._next()) is None:
            return False
        try:
            self.waiting.remove(it)
        except (ValueError, IndexError):  # another was quicker
            return True
        number, uid = it
        self._busy[me] = uid, time.monotonic()
        if self.waiting:
            self.wake()  # this close may be one that does not end
        try:
            _close(number)
        finally:
            del self._busy[me]
            if self.told:
                self._tell()
        return True


def _is_bounded(uid: int | None) -> bool:
    return uid != NOBODY and is_strange(uid)


def _close(it: Open) -> None:
    with suppress(OSError):  # what a file system says to it helps nobody; the number is free
        if not isinstance(it, int):
            return it.close()
        _libc.setsockopt(it, socket.SOL_SOCKET, socket.SO_LINGER, _SO_LINGER_OFF, len(_SO_LINGER_OFF))
        os.close(it)


_crew = _Crew(deque())


def _forget_parent() -> None:
    global _crew
    _crew = _Crew(_crew.waiting)


_sockets.on_fork(_forget_parent)


# -- for all others ----------------------------------------------------------------------


def close_later(descriptors: MutableSequence[int] | list[Open], uid: int | None) -> None:
    """
    Have a janitor close these descriptors, and forget them; never waits.

    Args:
        descriptors: emptied.
        uid: who has sent them, None if nobody knows; ``NOBODY`` if nobody is held to account, whom no bound
            holds: what a stranger can have sent is never nobody's.
    """
    if descriptors:
        _sockets.here()
        while descriptors:  # at no moment two owners: Ctrl-C may come at any
            _crew.waiting.append((descriptors.pop(), uid))
        _crew.wake()


def close_all(descriptors: MutableSequence[int] | list[Open], uid: int | None) -> None:
    """Close and forget descriptors that somebody has sent: here if that is sure not to block."""
    later: list[Open] = []
    while descriptors:  # each is theirs until it is known what to do with it: Ctrl-C may come at any moment
        it = descriptors[-1]
        if may_block(it if isinstance(it, int) else it.fileno(), uid):
            later.append(descriptors.pop())
        elif isinstance(it, int):
            os.close(descriptors.pop())  # type: ignore[arg-type]
        else:
            _close(descriptors.pop())
    close_later(later, uid)


def close_socket(sock: socket.socket, uid: int | None) -> None:
    """
    Close a connected socket of ours; idempotent.

    If its other end may still be written to, and is a stranger's, nothing comes between look and close.
    """
    if uid != NOBODY and is_strange(uid):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RD)
    try:
        if _holds_something(sock):
            number = sock.detach()
            if number >= 0:
                close_later([number], uid)
    except (OSError, ValueError):
        pass  # it is closed already
    sock.close()


def _holds_something(sock: socket.socket) -> bool:
    """Tell whether messages are in a socket's queue, be it such as have no bytes."""
    if _type_of(sock) == socket.SOCK_STREAM:  # where each message has bytes
        return _sockets.unread(sock) > 0
    for _ in range(2):  # ECONNRESET is told once, before what is there
        try:
            data, ancillary, _, _ = sock.recvmsg(1, _sockets.WHO_ROOM, _LOOK)
            return bool(data or ancillary)  # an empty message has credentials, unlike the end of file
        except BlockingIOError:
            return False
        except ConnectionResetError:
            continue
    return False


def at_work() -> bool:
    """Tell whether a janitor is closing something now."""
    return bool(_crew._busy)


def stuck() -> set[int | None]:
    """Return the uids that hold a janitor up now."""
    return _crew.stuck()


def holds_up(uid: int | None) -> bool:
    """Tell whether a stranger holds a janitor up now."""
    return at_work() and is_strange(uid) and uid in _crew.stuck()


def held() -> Counter[int | None]:
    """
    Return how many descriptors of each stranger are in our table until a janitor has closed them.

    Takes no lock.  What a janitor takes in hand this very moment may be missing, one of each.
    """
    if not _crew.waiting and not _crew._busy:
        return Counter()
    held = _crew.held()
    return Counter({uid: count for uid, count in held.items() if _is_bounded(uid)})


def is_late(uid: int | None) -> bool:
    """Tell whether something that a stranger has sent takes longer to close than it may."""
    return _crew.is_late(uid)


def when_closed(uid: int | None, callback: Callable[[], None]) -> Told:
    """
    Call back once, as soon as all that a stranger has sent is closed: in a janitor's thread, or at once.

    Args:
        callback: waits for nobody, and raises nothing.

    Returns:
        What ``never_mind`` takes.
    """
    told = uid, callback
    _crew.when_closed(told)
    return told


def never_mind(told: Told) -> None:
    """Do not call back any more; idempotent."""
    with suppress(ValueError):
        _crew.told.remove(told)


def may_block(number: int, uid: int | None) -> bool:
    """Tell whether closing a descriptor that a user sent might block; asks nothing that might."""
    domain = _sockets.domain_of(number)
    if domain != socket.AF_UNIX:
        return domain is not None or (is_strange(uid) and _has_a_file_system(number))
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(0))


def _has_a_file_system(number: int) -> bool:
    """Tell whether this may be more than a pipe or the like; those have names like ``pipe:[7]``."""
    try:
        return os.readlink(f"/proc/self/fd/{number}").startswith("/")
    except OSError:
        return True
