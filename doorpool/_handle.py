"""
The caller's side of the raw layer: a handle is an open descriptor of a door.

A call takes an idle channel from the handle's stack, or opens one, sends the request and
waits until the reply is there.  Ten threads that call at once use ten
channels; there is no reader thread and nothing is shared between two calls.

How a call ends, and what is known then
    Nothing is repeated unless it is certain that the procedure did not and will not run.
    The kernel tells, and the order of things makes it exact:

    - The request was not sent whole: the server acts on whole requests only.  Not run.
    - ``ECONNRESET`` instead of a reply: the server's end was closed with something of ours
      unread.  Not run.
    - End of file instead of a reply: the server had read it all.  It may have run.
    - We give up: shut our end down, then ask how much the server has not read
      (``SIOCOUTQ``).  Something: it will see the shutdown when it has read the rest, and
      it looks before it runs anything.  Not run.  Nothing: whatever it says on the channel
      from now on decides, and silence means that it may have run.
    - A goodbye frame says so itself.

    Where the two ends share a page (``_shuttle.c``), its state word decides instead, and the socket
    is never asked: a doorbell that nobody took would say ``ECONNRESET`` for a call that ran.  We
    withdraw the call by a compare-and-swap that fails if the server has taken it.  Not withdrawn:
    it may have run.

    Who waits looks up twice a second.  Only then is the server's pidfd looked at: a forked
    child of a dead server may hold its sockets open, so that no hang-up ever comes.

A channel that was idle may have been closed by the server meanwhile.  If the call on it
certainly did not run, it is made again on a fresh one.

Whom to believe: the answer to the knock decides, by ``doorpool._credentials``; what the
greeting says is a claim.
"""

from __future__ import annotations

import contextlib
import errno
import numbers
import os
import queue
import select
import socket
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

import attrs

from doorpool import _names, _opening, _sockets, _wire
from doorpool._callers import Judge, Rule
from doorpool._channel import DOZE, NOT, POLL, RECEIVE, Channel, Hangup, process_is_gone
from doorpool._credentials import (
    ENDING,
    Credentials,
    credentials_of,
    is_strange,
    known_uid,
    peer_groups,
    peer_pidfd,
    peer_ucred,
    pickle_bar,
    tells_processes,
    unpack_ids,
)
from doorpool._descriptor import NOBODY, Descriptor
from doorpool._errors import (
    SHORTAGE,
    AccessError,
    BrokenDoorError,
    BusyError,
    CallTimeoutError,
    ClosedError,
    DoorError,
    LimitError,
    NotADoorError,
    ProtocolError,
    RevokedError,
)
from doorpool._gate import check_descriptors, flatten
from doorpool._impl import shuttle
from doorpool._janitor import close_all, close_later, close_socket
from doorpool._sockets import MAX_DESCRIPTORS
from doorpool._texts import printable
from doorpool._wire import Attribute, Codec, Frame, Greeting, Kind, Knock, Reason, Refusal

MAX_IDLE = 8  #: Idle channels that a handle keeps, the last used first.
MAX_KNOCKS = 4  #: Of a handle that are unanswered: their sockets count against our user till then.
LOOK_UP = 0.5  #: Seconds after which a waiting caller looks whether the server is alive.
MAX_REPLY = 2**40  #: A reply that claims to be longer is a broken server's.
_REQUEST, _REPLY = int(Kind.REQUEST), int(Kind.REPLY)
_PING, _PONG = int(Kind.PING), int(Kind.PONG)

_LOOK_UP = int(LOOK_UP * 1e9)

#: Reasons for which a request was refused before all of it was read, perhaps.
_UNREAD = frozenset({Reason.TOO_LARGE, Reason.DESCRIPTORS_LOST})

#: What comes back from a call: the bytes, the buffers, the descriptors; or the bytes, where there is no more.
Whole = tuple[bytes | bytearray, Sequence[bytearray | memoryview], list[int]]
Came = bytes | Whole

#: A frame, or what came by the shared page: bytes; or bytes of which so many are a manifest.
_Answer = Frame | bytes | tuple[bytes, int]

_DROPPED_KNOCKS = 3  #: How often a knock is made that vanishes at a door that is there.

#: Seconds for which an answer is waited for before the greeting is looked for: what is no door
#: at all is found out so much later, and a door wakes us once instead of twice.
_MOMENT = 0.005

#: Nanoseconds for which the answer to a knock is looked for at most before we sleep.  It takes some
#: 150 µs; to be woken where each side has a CPU of its own takes both of them 25 µs and more.
_ANSWER_SPIN = 300_000

FOREVER = 1e8  # seconds; three years


def check_seconds(value: float | None, name: str) -> float | None:
    """
    Return a timeout as a float, or None for none.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not above 0.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a number of seconds or None, not {value!r}")
    if value != value or value <= 0:  # NaN, of whatever size and type
        raise ValueError(f"{name} is a number of seconds above 0, or None for none; not {value!r}")
    return float(value) if value <= FOREVER else None


def check_spin(value: float | None) -> int:
    """
    Return how long a wait looks before it parks, nanoseconds; -1 for as long as it is worth it.

    For ever is three years.

    Raises:
        TypeError: it is no real number.
        ValueError: it is below 0.
    """
    if value is None:
        return -1
    if value == 0 and not isinstance(value, bool):
        return 0
    seconds = check_seconds(value, "spin")
    return int((FOREVER if seconds is None else seconds) * 1e9)


def check_limit(what: str, value: int, most: int = 2**62, least: int = 0) -> int:
    """
    Return a number of bytes or descriptors if it is one.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is out of its range, which is named.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} is a whole number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{what} is from {least} to {most}, not {value}")
    return value


def deadline_after(seconds: float | None) -> float | None:
    """Return when so many seconds are over, by ``time.monotonic()``; None for never."""
    return None if seconds is None else time.monotonic() + seconds


def _nanoseconds_left(deadline: float | None) -> int:
    """Return how long to wait before looking up."""
    if deadline is None:
        return _LOOK_UP
    return int(max(0.0, min(LOOK_UP, deadline - time.monotonic())) * 1e9)


def _limits_in(greeting: Greeting) -> _wire.Limits:
    return _wire.Limits(greeting.max_request, greeting.max_descriptors, greeting.attributes)


def _wait_a_moment(ours: socket.socket, deadline: float | None, spin: int) -> None:
    """
    Wait for the answer to a knock, for no longer than it takes somebody who is there.

    Args:
        spin: nanoseconds for which to look before sleeping, each look followed by a yield.
    """
    poll = select.poll()
    poll.register(ours, select.POLLIN)
    until = time.monotonic_ns() + spin
    while time.monotonic_ns() < until:
        if poll.poll(0):
            return
        os.sched_yield()
    left = _MOMENT if deadline is None else min(_MOMENT, deadline - time.monotonic())
    if left > 0:
        poll.poll(left * 1000)


def _is_untaken(channel: Channel) -> bool:
    """Tell whether the server has not taken a request that we have given up, and never will."""
    page = channel.page
    return page.withdraw() if page is not None else _sockets.unsent(channel.socket) > 0


def _leave(door: object, number: int) -> None:
    """Leave a number with whom it came from."""
    if isinstance(door, Descriptor):
        door._put_back(number)


class _Turn(weakref.ref["queue.SimpleQueue[_Turn]"]):
    """
    The right to knock, which knows where the turns lie that nobody has.

    One that is lost between two byte codes (Ctrl-C) is replaced.
    """

    __slots__ = ()

    def __del__(self) -> None:
        knocks = self()
        if knocks is not None:
            knocks.put(_Turn(knocks))


@attrs.define
class Reply:
    """
    What came back from a call.

    Attributes:
        data: the bytes.
        buffers: the buffers, writable; yours to keep.
        descriptors: the numbers that came along.  Yours to close, or take them out of the
            list and let ``close`` do the rest.
    """

    data: bytes | bytearray
    buffers: Sequence[bytearray | memoryview] = ()
    descriptors: list[int] = attrs.field(factory=list)

    def close(self) -> None:
        """Close the descriptors that are still in the list."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Handle:
    """
    An open descriptor of a door, to call it by.

    Any number of threads may use it at once.  In a forked child it goes on with channels
    of its own, through the inherited descriptor.

    Args:
        door: a path; or the number of a descriptor, or a ``Descriptor``, which is taken over if this
            succeeds.
        open_timeout: seconds for opening.
        server: whose server is believed, as a rule of ``doorpool._callers``; by default our own
            user's, and root's for a door that does not speak pickle.  On a path it is asked
            about the listener first, unless that is root's, and then about whoever answers.
        trust: "namespace" or "uid": see ``doorpool._credentials``.
        words: what to say of ourselves when knocking.
        codec: what the door must speak, one or several; any by default.
        lazy: look at the greeting only; the first call opens the first channel.
        spin: seconds that a wait looks at the shared page before it parks; by default as long as
            that is worth it; 0: never.
        again: the door has just gone away: where the process that listens is dead, do not wait
            until somebody else might greet in its place.

    Raises:
        FileNotFoundError, PermissionError, NotADoorError: of the path.
        BrokenDoorError: the server is gone.
        CallTimeoutError: the server does not answer.
        AccessError: the server may not be believed, or refuses us.

    Modelled on: open(2) of a door, door_call(3C), door_info(3C)
    """

    def __init__(
        self, door: _names.Path | int | Descriptor, *, open_timeout: float | None = 5.0,
        server: Rule | None = None, trust: str = "namespace",
        codec: Codec | Collection[Codec] | None = None, words: Knock | None = None, lazy: bool = False,
        spin: float | None = None, again: bool = False,
    ) -> None:  # fmt: skip
        deadline = deadline_after(check_seconds(open_timeout, "open_timeout"))
        self._patient = not again
        self._server = None if server is None else Judge(server, "server")
        self._trust = trust
        words = words or Knock(sys.version_info[:2])
        self._words = attrs.evolve(words, page=shuttle.PAGE_BYTES, segments=True)
        self._spin = check_spin(spin)
        #: Who has passed us the descriptor, if a stranger has: to close it may take what he likes.
        self.stranger: int | None = NOBODY
        #: Bytes of an answer at most; what is no answer of a procedure's always fits.
        self.max_reply = MAX_REPLY
        self._owner: int | None = None
        self.path: str | None = None
        self._closed = False
        self._reset()
        self._socket = self._reach(door, deadline)
        self.server: Credentials
        self._codecs = (codec,) if isinstance(codec, Codec) else codec
        self._believed: tuple[int | None] | None = None  # the uid that has answered first
        self._met = False
        try:
            # On a connection of our own we knock at once, so that the server wakes up once for both.
            # A descriptor may be anybody's of whatever kind: that it is a door, it says first.
            if self.path is None or lazy:
                self._meet(deadline)
            if lazy:
                self.server = credentials_of(unpack_ids(peer_ucred(self._socket)), None)
            else:
                self._give_back(self._dial(deadline))
        except BaseException:
            if self.path is None:
                _leave(door, self._socket.detach())
            self._let_go(self._socket)
            raise

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._idle)} idle channels"
        return f"<Handle of {self.name} {state}>"

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """What messages call the door: its path, or its own name and the descriptor."""
        if self.path is not None:
            return self.path
        greeting: Greeting | None = getattr(self, "greeting", None)
        return f"door {greeting.name!r}" if greeting else "the descriptor"

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def fileno(self) -> int:
        """
        Return the door descriptor, for passing on; -1 once closed.

        Reading or writing it is undefined.
        """
        return -1 if self._closed else self._socket.fileno()

    @property
    def is_local(self) -> bool:
        """Whether the door is of this very process."""
        return self.server.pid == os.getpid()

    def info(self) -> Greeting:
        """Return what the door said of itself when it was opened; never a round trip."""
        return self.greeting

    # -- reaching -----------------------------------------------------------------------------

    def _reset(self) -> None:
        """Begin anew: at first, and in a forked child, where the parent's locks mean nothing."""
        self._lock = threading.RLock()  # a signal handler may close what its thread is using
        self._users = 0
        self._idle: deque[Channel] = deque()
        # One item for each knock that may be made.  No semaphore: that holds a lock of its own for
        # some lines of Python, in which a signal handler that knocks too would wait for its thread.
        self._knocks: queue.SimpleQueue[_Turn] = queue.SimpleQueue()
        for _ in range(MAX_KNOCKS):
            self._knocks.put(_Turn(self._knocks))
        self._generation = _sockets.generation  # last: who sees this sees the rest

    def _cross_fork(self) -> None:
        """Begin anew in a forked child, once, whichever thread comes first."""
        with _crossing:
            if self._generation != _sockets.generation:
                self._reset()

    def _reach(self, door: _names.Path | int | Descriptor, deadline: float | None) -> socket.socket:
        if isinstance(door, Descriptor):
            number = door.take()  # at no moment two owners: Ctrl-C may come at any
            try:
                return self._take_number(number)
            except NotADoorError:
                _leave(door, number)
                raise
        if isinstance(door, bool) or not isinstance(door, str | bytes | os.PathLike | int):
            raise TypeError(f"a door is a path or the number of a descriptor, not {door!r}")
        if isinstance(door, int):
            return self._take_number(door)
        reached = _names.reach(door, deadline=deadline)
        self.path, self._owner = reached.path, reached.owner
        sock = _sockets.disown(reached.socket)  # a forked child dials through it
        try:
            self._check_listener(sock)
        except BaseException:
            self._let_go(sock)
            raise
        return sock

    @staticmethod
    def _take_number(number: int) -> socket.socket:
        text = f"descriptor {number} is no door"
        try:
            sock = socket.socket(fileno=number)
        except (OSError, ValueError, OverflowError) as error:
            raise NotADoorError(f"{text}: {error}") from None
        if not _sockets.is_unix(sock, socket.SOCK_SEQPACKET):
            sock.detach()
            raise NotADoorError(text)
        # Left as it is, being shared with others: MSG_DONTWAIT does it.  But where there is a
        # ``socket.setdefaulttimeout()``, CPython waits in spite of that (and has changed it already).
        if sock.gettimeout():
            sock.setblocking(False)
        return sock

    def _check_listener(self, sock: socket.socket) -> None:
        """Look, before knocking, whose door this is; root may listen for others to serve."""
        groups = None if self._server is None else peer_groups(sock)
        listener = credentials_of(unpack_ids(peer_ucred(sock)), groups)
        if listener.uid != 0:
            self._believe(Codec.RAW if self._server is not None else None, listener, -1)

    def _meet(self, deadline: float | None) -> None:
        """Look, once, whether this is a door, and such as it should be."""
        if self._met:
            return
        self.greeting = self._peek(deadline)
        self._limits = _limits_in(self.greeting)
        self._check_codec()
        self._met = True

    def _peek(self, deadline: float | None) -> Greeting:
        """Look at the greeting, which stays in the queue for every other holder."""
        data = b""
        with self._translated("the server hung up before it said anything"):
            data = self._peek_message(deadline)
        if not data:
            raise BrokenDoorError(f"{self.name}: the server is gone", filename=self.path)
        refusal = _wire.decode_farewell(data)
        if refusal is not None:
            raise BusyError(f"{self.name}: {self._shown(refusal.text)}")
        try:
            greeting = _wire.decode_greeting(data)
        except ProtocolError as error:
            raise self._named(error) from None
        if greeting is None:
            raise NotADoorError(f"{self.name} is a socket, but no door", filename=self.path)
        return greeting

    def _peek_message(self, deadline: float | None) -> bytes:
        flags = socket.MSG_PEEK | _sockets.MSG_DONTWAIT
        waited = not self._patient
        for attempt in (1, 2):
            while True:
                try:
                    return self._socket.recv(_wire.GREETING_SIZE, flags)
                except BlockingIOError:
                    if waited:  # a fork of a dead server may hold its listener open
                        self._check_alive(self._socket)
                    self._await(self._socket, select.POLLIN, deadline, "does not answer")
                    waited = True
                except ConnectionResetError:
                    # Told once, of a knock that was never read; the queue is still there.
                    if attempt == 2:
                        raise
                    break
        return b""

    def _check_codec(self) -> None:
        """Refuse a door that speaks something else; that it answers so too is seen at each opening."""
        spoken = self.greeting.codec
        if self._codecs is not None and spoken not in self._codecs:
            wanted = " or a ".join(codec.name.lower() for codec in self._codecs)
            raise NotADoorError(
                f"{self.name} is a {spoken.name.lower()} door and not a {wanted} one",
                filename=self.path,
            )

    @contextlib.contextmanager
    def _translated(self, text: str) -> Iterator[None]:
        try:
            yield
        except ConnectionError as error:
            if isinstance(error, DoorError):
                raise
            raise BrokenDoorError(f"{self.name}: {text}", filename=self.path) from None
        except OSError as error:
            if isinstance(error, DoorError):
                raise
            raise NotADoorError(f"{self.name} is no door: {error.strerror}", filename=self.path) from None

    def _await(self, sock: socket.socket, events: int, deadline: float | None, text: str) -> None:
        """Wait for a socket of an opening, for at most ``LOOK_UP``; raise when time is over."""
        left = self._look_up_time(deadline, text)
        poll = select.poll()
        poll.register(sock, events)
        poll.poll(left * 1000)

    def _look_up_time(self, deadline: float | None, text: str) -> float:
        """Return how long to wait before looking up; raise when time is over."""
        left = LOOK_UP if deadline is None else min(LOOK_UP, deadline - time.monotonic())
        if left <= 0:
            raise CallTimeoutError(f"{self.name} {text}; nothing was called", filename=self.path)
        return left

    # -- opening channels -----------------------------------------------------------------------

    @contextlib.contextmanager
    def _descriptor(self) -> Iterator[socket.socket]:
        """Lend the door descriptor: while somebody uses it, ``close`` leaves it open."""
        if self._generation != _sockets.here():
            self._cross_fork()
        counted = False
        try:
            with self._lock:
                self._users += 1  # before the look: a signal handler may close it in between
                counted = True  # with no call in between, in which Ctrl-C might come
            if self._closed:
                raise ClosedError(f"{self.name}: this handle is closed")
            yield self._socket
        finally:
            with self._lock:
                self._users -= counted
                if self._closed and not self._users:
                    self._close_descriptor()

    def _dial(self, deadline: float | None) -> Channel:
        """Open a channel: knock, hear the answer, and decide whether to believe it."""
        with self._descriptor() as door:
            for _ in range(_DROPPED_KNOCKS):
                try:
                    return self._settle(self._knock_and_hear(door, deadline))
                except EOFError:
                    self._check_there(door)
                except AccessError:
                    self._check_there(door)  # about a server that died the kernel tells nothing more
                    raise
        raise BusyError(f"{self.name} dropped the knock; its server may be short of descriptors")

    def _knock_and_hear(self, door: socket.socket, deadline: float | None) -> _opening.Opened | Refusal:
        """Knock and hear the answer, as soon as fewer than ``MAX_KNOCKS`` of ours are unanswered."""
        knocks, turn = self._knocks, None
        try:
            turn = self._await_turn(knocks, door, deadline)
            ours = self._knock(door, deadline)
            try:
                if not self._met:
                    # The greeting comes before: one wake-up for both.
                    spin = _ANSWER_SPIN if self._spin < 0 else min(_ANSWER_SPIN, self._spin)
                    _wait_a_moment(ours, deadline, spin)
                    self._meet(deadline)  # before anything of the answer is looked at
                return self._hear(door, ours, deadline)
            finally:
                close_socket(ours, None)  # there may be an answer in it that we could not take: of whom?
        finally:
            if turn is not None:
                knocks.put(turn)

    def _await_turn(
        self, knocks: queue.SimpleQueue[_Turn], door: socket.socket, deadline: float | None
    ) -> _Turn:
        while True:
            try:
                return knocks.get(timeout=self._look_up_time(deadline, "does not answer"))
            except queue.Empty:
                self._check_there(door)

    def _knock(self, door: socket.socket, deadline: float | None) -> socket.socket:
        while True:
            try:
                return _opening.knock(door, self._words)
            except BlockingIOError:
                self._check_alive(door)
                self._await(door, select.POLLOUT, deadline, "has too many knocks to hear yet")
            except ConnectionError:
                self._meet(deadline)  # it was none, perhaps
                raise self._gone(door) from None
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise
                raise BusyError(f"{self.name}: too many descriptors in flight for this user") from None

    def _hear(
        self, door: socket.socket, ours: socket.socket, deadline: float | None
    ) -> _opening.Opened | Refusal:
        waited = False
        while True:
            try:
                return _opening.hear_answer(ours)
            except BlockingIOError:
                if waited:
                    self._check_there(door)
                self._await(ours, select.POLLIN, deadline, "does not answer")
                waited = True
            except ProtocolError as error:
                raise self._named(error) from None
            except AccessError as error:
                # Of a server that has answered and died since, nobody can say who it was.
                self._check_there(door)
                raise self._named(error) from None

    def _named(self, error: DoorError) -> DoorError:
        """Say at which door something was wrong, if that is not said yet."""
        text = str(error) if str(error).startswith(self.name) else f"{self.name}: {error}"
        return type(error)(text, may_have_run=error.may_have_run, filename=self.path)

    def _check_there(self, door: socket.socket) -> None:
        """Raise if the server is gone, or has taken the door away."""
        poll = select.poll()
        poll.register(door, 0)
        if poll.poll(0):
            raise self._gone(door)
        self._check_alive(door)

    def _check_alive(self, door: socket.socket) -> None:
        """Raise if the server is dead, and no hang-up says so as somebody else holds its sockets."""
        pidfd = peer_pidfd(door)
        try:
            # Where there are pidfds, one is missing only of a process that is gone for good.
            if process_is_gone(pidfd) if pidfd >= 0 else tells_processes():
                raise BrokenDoorError(f"{self.name}: the server is dead", filename=self.path)
        finally:
            if pidfd >= 0:
                os.close(pidfd)

    def _gone(self, door: socket.socket) -> DoorError:
        """Say whether a door that hung up was taken away or has lost its server."""
        if _sockets.unread(door) > len(self._greeting_bytes(door)):
            return RevokedError(f"{self.name}: the server has taken this door away", filename=self.path)
        return BrokenDoorError(f"{self.name}: the server is gone", filename=self.path)

    @staticmethod
    def _greeting_bytes(door: socket.socket) -> bytes:
        for _ in range(2):
            with contextlib.suppress(OSError):
                return door.recv(_wire.GREETING_SIZE, socket.MSG_PEEK | _sockets.MSG_DONTWAIT)
        return b""

    def _settle(self, opened: _opening.Opened | Refusal) -> Channel:
        """Decide about an answer; the channel is believed from here on."""
        if isinstance(opened, Refusal):
            raise self._error(opened)
        channel = opened.channel
        try:
            if opened.codec is not self.greeting.codec:
                raise ProtocolError(
                    f"{self.name} greeted with codec {self.greeting.codec.name} and answered "
                    f"with {opened.codec.name}"
                )
            self._believe(opened.codec, channel.peer, channel.pidfd)
            self._check_same(channel.peer)
            self._share(opened)
        except BaseException:
            channel.close()
            raise
        finally:
            opened.close_letter()
        # step: channel-opened
        self.server = channel.peer
        channel.doze(DOZE)
        return channel

    def _check_same(self, server: Credentials) -> None:
        """Refuse another user than answered first: a rule may believe several, but a door is one's."""
        if self._believed is None:
            self._believed = (server.uid,)
        if self._believed != (server.uid,):
            self._refuse(f"uid {server.uid} answers now, and uid {self._believed[0]} did before")

    def _share(self, opened: _opening.Opened) -> None:
        """
        Map the page that came with an answer; if there is no memory for it, ask again, for none.

        Raises:
            ProtocolError: it is not the page that was asked for, or promised, or none.
            EOFError: there is no memory for it.
        """
        if opened.segments:
            opened.channel.use_segments()
        if opened.page < 0:
            return
        if opened.page_size != self._words.page:  # that its memory has this size is looked at as it is mapped
            raise ProtocolError(
                f"{self.name} promised a shared page of {opened.page_size} bytes, and was asked for one "
                f"of {self._words.page}"
            )
        try:
            opened.channel.share(opened.page, self._spin)
        except ProtocolError as error:
            raise ProtocolError(f"{self.name}: {error}") from None
        except OSError as error:
            self._words = attrs.evolve(self._words, page=0)
            raise EOFError(f"no memory for the shared page: {error.strerror}") from None

    def _believe(self, codec: Codec | None, server: Credentials, pidfd: int) -> None:
        """
        Raise unless a server may be believed.

        Args:
            codec: what it wants to speak; None: the listener, whose codec nobody knows yet.
            server: who it is.
            pidfd: of its process.
        """
        own = os.geteuid()
        allowed = {own} if codec is Codec.PICKLE else {own, 0}
        judge = self._server
        if not (server.uid in allowed if judge is None else self._asked(judge, server)):
            self._refuse(
                f"its server is pid {server.pid}, uid {server.uid}; "
                f"believed are {judge or Judge(allowed, 'server')}, ours is {own}"
            )
        if self._owner not in (None, 0) and known_uid(self._owner) != server.uid:
            self._refuse(f"its file belongs to uid {self._owner}, and uid {server.uid} answers")
        bar = pickle_bar(server, pidfd, trust=self._trust) if codec is Codec.PICKLE else None
        if bar is ENDING:
            raise BrokenDoorError(f"{self.name}: the server is ending", filename=self.path)
        if bar is not None:
            self._refuse(f"its server is pid {server.pid}: {bar}")

    def _asked(self, judge: Judge, server: Credentials) -> bool:
        """Ask the rule; one that fails believes nobody."""
        try:
            return judge.admits(server)
        except Exception as error:
            text = f"{judge}, the rule about whom to believe, has failed: {type(error).__qualname__}: {error}"
            raise AccessError(f"{self.name} is not believed: {text}", filename=self.path) from error

    def _refuse(self, text: str) -> NoReturn:
        raise AccessError(f"{self.name} is not believed: {text}", filename=self.path)

    # -- calling --------------------------------------------------------------------------------

    def call(
        self,
        data: bytes | bytearray | memoryview = b"",
        buffers: Sequence[memoryview] = (),
        descriptors: Sequence[int] = (),
        *,
        timeout: float | None = None,
    ) -> Reply:
        """
        Call the door and wait for the reply.

        Args:
            data, buffers: the request's bytes.
            descriptors: go along; they stay the caller's.
            timeout: seconds, for everything from here to the reply; None for none.

        Raises:
            ClosedError, RevokedError, BusyError, LimitError, AccessError: it did not run.
            BrokenDoorError, CallTimeoutError, ProtocolError: ``may_have_run`` says.
            OSError: ``EBADF`` for a descriptor that is not open; ``EMFILE`` where there is
                no free one for a channel, or for what the reply brings.

        Modelled on: door_call(3C)
        """
        deadline = deadline_after(check_seconds(timeout, "timeout"))
        came = self.call_until(deadline, data, buffers, descriptors)
        return Reply(*came) if isinstance(came, tuple) else Reply(came)

    def open_channel(self, deadline: float | None) -> None:
        """Open a channel and keep it for the next call: it is known then who the server is."""
        self._give_back(self._dial(deadline))

    def ask_descriptor(self, deadline: float | None, uid: int | None) -> int:
        """
        Have the server make a descriptor of the door that shares its fate with no other.

        Args:
            uid: whose it will be, of whom a server of our own user counts it; None: nobody knows.

        Raises:
            DoorError: it did not.
        """
        came = self.call_until(deadline, _wire.encode_hand_out(uid), kind=_PING)
        descriptors = came[2] if isinstance(came, tuple) else []
        if len(descriptors) != 1:
            close_all(descriptors, self.server.uid)
            raise BusyError(f"{self.name}: the server has made no descriptor of its door")
        return descriptors.pop()

    def call_until(
        self,
        deadline: float | None,
        data: bytes | bytearray | memoryview = b"",
        buffers: Sequence[memoryview] = (),
        descriptors: Sequence[int] = (),
        kind: int = _REQUEST,
    ) -> Came:
        """
        Call with a deadline by ``time.monotonic()``; otherwise as ``call``.

        The exchange is made on a second channel if the first was dead before it began.  What has the
        descriptors may have a method ``let_go``, which is called if the answer takes long, when the
        server has them; then ``gone`` must be true of it.
        """
        if self._closed:
            raise ClosedError(f"{self.name}: this handle is closed")
        if buffers or descriptors or type(data) is not bytes or len(data) > self._limits.max_request:
            data, buffers = self._prepared(deadline, data, buffers, descriptors)
        if self._generation != _sockets.here():
            self._cross_fork()
        try:
            channel = self._idle.pop()  # the one that was used last
        except IndexError:
            channel = None
        if channel is not None:
            try:
                return self._exchange(channel, kind, deadline, data, buffers, descriptors)
            except _StaleChannel:
                # It certainly did not run: once more, on a fresh one, if we still have what was to go along.
                if getattr(descriptors, "gone", False):
                    raise BrokenDoorError(
                        f"{self.name}: the server closed the channel", filename=self.path
                    ) from None
        return self._exchange(self._dial(deadline), kind, deadline, data, buffers, descriptors, fresh=True)

    def _prepared(
        self, deadline: float | None, data: bytes | bytearray | memoryview,
        buffers: Sequence[memoryview], descriptors: Sequence[int],
    ) -> tuple[bytes | bytearray | memoryview, Sequence[memoryview]]:  # fmt: skip
        """Return data and buffers as rows of bytes, when they have been found to be within the limits."""
        try:
            data, buffers = flatten(self.name, data, buffers)
        except LimitError:
            with self._descriptor() as door:
                self._check_there(door)  # that there is no door any more comes first (L12)
            raise
        size = len(data) + sum(map(len, buffers))
        try:
            self._check_request(size, descriptors)
        except LimitError:
            # By what we know.  The limits may have been raised since then (P1); or there is
            # no door any more, which comes first (L12).
            self._learn_limits(deadline)
            self._check_request(size, descriptors)
        return data, buffers

    def _check_request(self, size: int, descriptors: Sequence[int]) -> None:
        limit = self._limits.max_request
        if size > limit:
            raise LimitError(
                f"{self.name}: a request of {size} bytes is over max_request, {limit}",
                limit=limit, value=size,
            )  # fmt: skip
        if descriptors:
            if self._limits.attributes & Attribute.REFUSE_DESCRIPTORS:
                raise self._takes_none(descriptors)
            check_descriptors(self.name, descriptors, min(self._limits.max_descriptors, MAX_DESCRIPTORS))

    def _takes_none(self, descriptors: Sequence[int]) -> LimitError:
        return LimitError(f"{self.name} takes no descriptors", limit=0, value=len(descriptors))

    def _learn_limits(self, deadline: float | None) -> None:
        """Ask the server for its limits of now; if it takes long to answer, those that we know stand."""
        soon = time.monotonic() + LOOK_UP  # all its threads may be busy, waiting for us even
        try:
            data, _, descriptors = self._ping(soon if deadline is None else min(soon, deadline))
        except CallTimeoutError:
            return
        except DoorError as error:
            error.may_have_run = False  # of the call itself nothing was sent
            raise
        close_all(descriptors, self.server.uid)
        self._limits = _wire.decode_limits(data) or self._limits

    def ping(self, *, timeout: float | None = None) -> None:
        """
        Have the server answer without running the procedure.

        Raises: as ``call``.
        """
        if self._closed:
            raise ClosedError(f"{self.name}: this handle is closed")
        close_all(self._ping(deadline_after(check_seconds(timeout, "timeout")))[2], self.server.uid)

    def _ping(self, deadline: float | None) -> Whole:
        came = self.call_until(deadline, kind=_PING)
        return came if isinstance(came, tuple) else (came, (), [])

    @property
    def alive(self) -> bool:
        """Whether the server is there, as far as the kernel tells; no round trip."""
        if self._closed:
            return False
        try:
            with self._descriptor() as door:
                self._check_there(door)
        except DoorError:
            return False
        return True

    def _give_back(self, channel: Channel) -> None:
        idle = self._idle
        idle.append(channel)
        # step: given-back
        if self._closed or len(idle) > MAX_IDLE:
            with contextlib.suppress(IndexError):
                idle.popleft().close()

    def _exchange(
        self,
        channel: Channel,
        kind: int,
        deadline: float | None,
        data: bytes | bytearray | memoryview,
        buffers: Sequence[memoryview],
        descriptors: Sequence[int],
        *,
        fresh: bool = False,
    ) -> Came:
        """Send a request and wait for its answer; the channel goes back only if both went well."""
        channel.number += 1
        page = channel.page
        sent = False
        frame: _Answer | None
        try:
            # step: request-begun
            everyday = page is not None and deadline is None and kind == _REQUEST and not channel.news
            if everyday and not buffers and not descriptors and page.post(data, 0, 0) is True:  # type: ignore[union-attr]
                posted = True
            else:
                posted = self._send(channel, kind, deadline, data, buffers, descriptors)
            # step: request-sent
            sent = True
            if posted:
                left = _LOOK_UP if deadline is None else _nanoseconds_left(deadline)
                answer = page.wait(left)  # type: ignore[union-attr]
                frame = answer if type(answer) is bytes else self._await_shared(channel, answer, deadline)
            elif page is None:
                frame = channel.read(self.max_reply, RECEIVE if deadline is None else POLL, None, deadline)
                if frame is None or frame.refusal is not None:
                    frame = self._await_reply(channel, frame, deadline)
            else:
                frame = self._await_either(channel, deadline)
        except Hangup as hangup:
            unread = page.withdraw() if page is not None and sent else hangup.unread
            channel.close()
            raise self._broken(unread, fresh) from None
        except shuttle.PageError as error:
            may_have_run = self._drop(channel) and sent
            raise ProtocolError(f"{self.name}: {error}", may_have_run=may_have_run) from None
        except BaseException as error:
            may_have_run = self._drop(channel) and sent
            if isinstance(error, ProtocolError):
                error.may_have_run = sent or error.may_have_run
                raise self._named(error) from None
            if may_have_run and type(error) is OSError and error.errno in SHORTAGE:
                text = f"{self.name}: the reply cannot be waited for: {error.strerror}"
                raise BrokenDoorError(text, may_have_run=True, filename=self.path) from error
            raise
        # step: reply-read
        if type(frame) is bytes:
            self._give_back(channel)
            if len(frame) > self.max_reply:
                self._refuse_reply(len(frame))
            return frame
        if isinstance(frame, tuple):
            return self._unpacked(channel, *frame)
        assert isinstance(frame, Frame)
        if frame.number == channel.number and frame.kind == (_REPLY if kind == _REQUEST else _PONG):
            if frame.refusal is not None:
                if channel.shelf is None:
                    self._give_back(channel)
                else:
                    channel.close()  # there may have been a manifest, and some of them segments
                if frame.refusal.reason is Reason.TOO_LARGE:
                    self._refuse_reply(frame.refusal.value)
                raise OSError(errno.EMFILE, "no free descriptors for those that the reply brought")
            self._give_back(channel)
            return self._within_limit(frame.data, frame.buffers, frame.descriptors)
        close_all(frame.descriptors, channel.peer.uid)
        self._take_failure(channel, frame, fresh)

    def _unpacked(self, channel: Channel, whole: bytes, manifest: int) -> Whole:
        """Find the buffers of a reply that came by the shared page with a manifest."""
        try:
            buffers = channel.unstow(whole[:manifest], (), [])
        except ProtocolError as error:
            channel.close()
            error.may_have_run = True
            raise self._named(error) from None
        self._give_back(channel)
        return self._within_limit(whole[manifest:], buffers, [])

    def _within_limit(
        self, data: bytes | bytearray, buffers: Sequence[bytearray | memoryview], descriptors: list[int]
    ) -> Whole:  # fmt: skip
        """Return a reply if it may be as large; what it has in segments is only known now."""
        size = len(data) + sum(map(len, buffers))
        if size > self.max_reply:
            close_all(descriptors, self.server.uid)
            self._refuse_reply(size)
        return data, buffers, descriptors

    @staticmethod
    def _drop(channel: Channel) -> bool:
        """Drop a channel, so that what was asked for is not run if it was not yet; return whether it was."""
        run = not channel.page.withdraw() if channel.page is not None else True
        channel.shutdown()  # a plain close would leave a whole request to be run
        channel.close()
        return run

    def _broken(self, unread: bool, fresh: bool) -> Exception:
        if unread and not fresh:
            return _StaleChannel()
        text = "was gone before it read the call" if unread else "went away during the call"
        return BrokenDoorError(f"{self.name}: the server {text}", may_have_run=not unread, filename=self.path)

    def _take_failure(self, channel: Channel, frame: Frame, fresh: bool) -> NoReturn:
        """Raise what a frame that is no reply means."""
        refusal = None
        if frame.kind == Kind.GOODBYE:
            channel.close()
            refusal = self._refusal_in(frame)
            if refusal.reason is Reason.IDLE and not fresh and not refusal.may_have_run:
                raise _StaleChannel
        elif frame.kind == Kind.FAILURE and frame.number == channel.number:
            try:
                refusal = self._refusal_in(frame)
            except ProtocolError:
                channel.close()
                raise
            if channel.stowed and refusal.reason in _UNREAD:
                channel.close()  # the server has not read which segments are whose
            else:
                self._give_back(channel)
        if refusal is None:
            channel.shutdown()
            channel.close()
            raise ProtocolError(
                f"{self.name}: frame {chr(frame.kind)!r} with number {frame.number} "
                f"in answer to call {channel.number}",
                may_have_run=True,
            )
        raise self._error(refusal)

    def _refusal_in(self, frame: Frame) -> Refusal:
        try:
            return _wire.decode_refusal(frame.data)
        except ProtocolError as error:
            raise self._named(error) from None

    def _send(
        self,
        channel: Channel,
        kind: int,
        deadline: float | None,
        data: bytes | bytearray | memoryview,
        buffers: Sequence[memoryview],
        descriptors: Sequence[int],
    ) -> bool:
        """Send a request; return whether it was posted in the shared page, and not by the socket."""
        now = time.monotonic_ns()
        nanoseconds, patience = 0, LOOK_UP
        if deadline is not None:
            left = deadline - now / 1e9
            if left <= 0:
                raise self._late(False)
            nanoseconds = int(left * 1e9) or 1
            patience = min(LOOK_UP, left)
        channel.patience = channel.send_patience = patience
        page, manifest = channel.page, b""
        if descriptors:
            channel.lent = getattr(descriptors, "let_go", None)
        if kind == _REQUEST:
            manifest, buffers, descriptors = channel.stow(buffers, descriptors)
        if page is not None and kind == _REQUEST and not buffers and not descriptors:
            whole = b"".join((manifest, data)) if manifest else data
            if page.post(whole, len(manifest), nanoseconds) is True:
                return True
        # Nearly all goes at once; but a body that was refused may still lie there, half thrown away.
        look_up = self._look_up_sending
        try:
            if page is not None and not page.announce():
                self._hear_last_words(channel)
            channel.post(
                kind, channel.number, data, buffers, descriptors, nanoseconds, now, look_up, deadline,
                manifest,
            )  # fmt: skip
        except ConnectionError as error:
            if isinstance(error, DoorError):
                raise
            self._hear_last_words(channel)
        except OSError as error:
            if error.errno == errno.EPERM and descriptors:  # see ``refuse_rights``
                raise self._takes_none(descriptors) from None
            if error.errno != errno.ETOOMANYREFS:
                raise
            raise BusyError(f"{self.name}: too many descriptors in flight for this user") from None
        return False

    def _hear_last_words(self, channel: Channel) -> NoReturn:
        """The request could not be sent whole, so it does not run; find out why."""
        frame = None
        with contextlib.suppress(Hangup):  # there are none
            frame = channel.read(self.max_reply, NOT)
        if frame is not None:
            close_all(frame.descriptors, channel.peer.uid)
        if frame is not None and frame.kind == Kind.GOODBYE:
            refusal = self._refusal_in(frame)
            if refusal.reason is not Reason.IDLE:
                raise self._error(refusal)
        raise Hangup(unread=True)

    def _await_either(self, channel: Channel, deadline: float | None) -> _Answer:
        """
        Wait for the answer to what was sent by the socket, where something may have waited before.

        The server may have answered in the page, and then said goodbye.
        """
        page, frame = channel.page, None
        assert page is not None
        with contextlib.suppress(Hangup):  # it is heard again below, after the answer
            frame = channel.read(self.max_reply, NOT)
        if frame is None:
            return self._await_shared(channel, page.wait(_nanoseconds_left(deadline)), deadline)
        answer = page.wait(0) if frame.kind == Kind.GOODBYE else 0
        return frame if isinstance(answer, int) else answer

    def _await_shared(self, channel: Channel, answer: Any, deadline: float | None) -> _Answer:
        """Wait on, the shared page having said something else than an everyday reply."""
        page = channel.page
        assert page is not None
        while answer == shuttle.NOTHING:
            self._look_up(channel, deadline)
            answer = page.wait(_nanoseconds_left(deadline))
        if not isinstance(answer, int):
            return answer  # type: ignore[no-any-return]
        channel.patience = _nanoseconds_left(deadline) / 1e9
        if answer == shuttle.BY_SOCKET:
            frame = channel.read(self.max_reply, POLL, None, deadline)
            # Or it could not be read just then what is there, and was a bell.
            while frame is None:
                self._look_up(channel, deadline)
                if not isinstance(answer := page.wait(0), int):
                    return answer
                frame = channel.read(self.max_reply, POLL, None, deadline)
            return self._await_reply(channel, frame, deadline)
        frame = channel.read(self.max_reply, NOT)  # the server has shut the channel, having said why
        if frame is None:
            raise Hangup
        return frame

    def _await_reply(self, channel: Channel, frame: Frame | None, deadline: float | None) -> Frame:
        """Wait on, a first look having brought nothing yet, or what is not quite an everyday reply."""
        while frame is None:
            self._look_up(channel, deadline)
            frame = channel.read(self.max_reply, POLL, None, deadline)
        if frame.refusal is not None and frame.refusal.reason is Reason.TOO_LARGE:
            self._refuse_reply(frame.refusal.value)
        return frame

    def _refuse_reply(self, size: int) -> NoReturn:
        """Raise that a reply is too large, of which nothing but that has been kept."""
        if self.max_reply == MAX_REPLY:
            raise ProtocolError(f"{self.name}: a reply that claims {size} bytes")
        if self.stranger == NOBODY:
            text = f"{self.name}: a reply of {size} bytes is over this proxy's max_reply, {self.max_reply}"
        else:
            text = (
                f"{self.name}: a reply of {size} bytes, and of a stranger's door that was passed to us "
                f"{self.max_reply} are taken: as many as `max_request` of the door it came by, or 1 MiB, "
                "or `max_reply` of the proxy whose result it was"
            )
        raise LimitError(text, limit=self.max_reply, value=size, may_have_run=True)

    def _look_up(self, channel: Channel, deadline: float | None) -> None:
        """Having waited in vain for a reply: raise if the time is over or the server dead."""
        # step: still-waiting
        left = LOOK_UP if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise self._late(self._give_up(channel))
        if process_is_gone(channel.pidfd):
            raise BrokenDoorError(
                f"{self.name}: the server died during the call",
                may_have_run=self._give_up(channel),
                filename=self.path,
            )
        channel.patience = min(LOOK_UP, left)
        if channel.lent is not None and not _sockets.unsent(channel.socket):
            channel.lent()  # the server has read them; who waits for our end to be closed shall not wait long
            channel.lent = None

    def _look_up_sending(self, channel: Channel, deadline: float | None) -> None:
        """Having sent nothing for a while: raise if the time is over or the server dead."""
        left = LOOK_UP if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise self._late(False)
        if process_is_gone(channel.pidfd):
            raise BrokenDoorError(f"{self.name}: the server died", filename=self.path)
        channel.send_patience = min(LOOK_UP, left)

    def _late(self, may_have_run: bool) -> CallTimeoutError:
        became = "may have run" if may_have_run else "did not run"
        return CallTimeoutError(
            f"{self.name}: no reply in the time given; the call {became}",
            may_have_run=may_have_run,
            filename=self.path,
        )

    def _give_up(self, channel: Channel) -> bool:
        """End a call that was sent whole; return whether it may have run (see above)."""
        channel.shutdown()
        # step: given-up
        if _is_untaken(channel):
            return False
        try:
            frame = channel.read(self.max_reply, NOT)
            if frame is not None:
                close_all(frame.descriptors, channel.peer.uid)
            if frame is None or frame.kind not in (Kind.GOODBYE, Kind.FAILURE):
                return True
            page = channel.page
            if page is not None and frame.kind == Kind.GOODBYE and not isinstance(page.wait(0), int):
                return True  # it had answered in the page before it said goodbye
            return _wire.decode_refusal(frame.data).may_have_run
        except Hangup as hangup:
            return channel.page is not None or not hangup.unread
        except (ProtocolError, shuttle.PageError):
            # Who waited is told that his time is over, whatever came at the end of it.
            return True

    def _shown(self, text: str) -> str:
        return printable(text) if self.speaks_for_stranger else text

    @property
    def speaks_for_stranger(self) -> bool:
        """Whether what the other side says is another user's word, whom we may have chosen to believe."""
        return self._stranger_at(self._socket) != NOBODY

    def _error(self, refusal: Refusal) -> DoorError:
        """Return the error that a refusal means."""
        text = f"{self.name}: {self._shown(refusal.text)}"
        may = refusal.may_have_run
        match refusal.reason:
            case Reason.REVOKED | Reason.CLOSED:
                return RevokedError(text, may_have_run=may, filename=self.path)
            case Reason.TOO_LARGE | Reason.TOO_MANY_DESCRIPTORS | Reason.REFUSES_DESCRIPTORS:
                return LimitError(text, limit=refusal.limit, value=refusal.value, may_have_run=may)
            case Reason.REPLY_TOO_LARGE:
                return LimitError(text, limit=refusal.limit, value=refusal.value, may_have_run=True)
            case Reason.BUSY | Reason.DESCRIPTORS_LOST | Reason.IDLE:
                return BusyError(text, may_have_run=may)
            case Reason.DENIED:
                return AccessError(text, may_have_run=may, filename=self.path)
            case Reason.ABORTED:
                return BrokenDoorError(text, may_have_run=may, filename=self.path)
            case _:
                return ProtocolError(text, may_have_run=may, filename=self.path)

    # -- closing --------------------------------------------------------------------------------

    def close(self) -> None:
        """
        Close the descriptor and the idle channels; idempotent, any thread.

        Calls that are running are not disturbed; their channels close when they end.
        """
        if self._generation != _sockets.here():
            self._cross_fork()
        with self._lock:
            self._closed = True
            if not self._users:
                self._close_descriptor()
        # step: closing
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def _close_descriptor(self) -> None:
        self._let_go(self._socket)

    def _let_go(self, sock: socket.socket) -> None:
        """
        Close the door descriptor.

        Nobody reads its queue, and what a stranger has put there may take as long to close as he likes.  He
        may do so at any moment, and others may have copies, so that it cannot be shut down before a look.
        """
        stranger = self._stranger_at(sock)
        if stranger == NOBODY:
            sock.close()
        elif (number := sock.detach()) >= 0:
            close_later([number], stranger)

    def _stranger_at(self, sock: socket.socket) -> int | None:
        """Return the uid, None if unknown, of the stranger who may have sent what is in it; or ``NOBODY``."""
        if self.stranger != NOBODY:
            return self.stranger
        server = getattr(self, "server", None)
        try:
            uids = [known_uid(unpack_ids(peer_ucred(sock))[1])]
        except OSError:  # it is closed
            uids = []
        if server is not None:
            uids.append(server.uid)
        return next(filter(is_strange, uids), NOBODY)


_crossing = threading.RLock()  # what is collected meanwhile may cross as well


def _forget_parent() -> None:
    global _crossing
    _crossing = threading.RLock()


_sockets.on_fork(_forget_parent)


class _StaleChannel(Exception):
    """An idle channel was dead before the call on it could run."""
