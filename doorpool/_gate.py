"""
The server's side of the raw layer: gates, where server threads wait, and invocations.

A *gate* is where server threads wait.  All of them wait in one epoll set, each in the
system call itself, one event at a time: the thread that the kernel wakes is the thread
that answers, and the one that waited last is woken first.  There is no dispatcher and no
queue; callers who find no thread wait in the kernel.

A channel joins the set when the keeper has opened it (``doorpool._door``); from then on
only server threads touch it.

Who may touch a channel
    A channel is *claimed* (its lock is held) by the one thread that reads it, runs its
    call, or closes it.  Unclaimed it is *parked*: armed in the set with
    ``EPOLLONESHOT``.  An event for a channel that somebody has claimed is dropped, and
    nothing is lost, because whoever holds the claim lets go first and arms afterwards, and
    arming looks again:

     1. A has read half a request and lets go of the channel;
     2. the rest arrives; nothing is armed, so nobody is woken;
     3. A arms the channel: the kernel sees that it is readable and wakes B.

    This also makes a descriptor number that was closed and given out again harmless: the
    event of the old socket at worst makes a thread look at the new one, find nothing, and
    arm it again.

Lingering
    A caller's next request often comes at once.  So a thread that has answered waits up
    to ``LINGER`` for that channel alone, if another thread waits in the set meanwhile: it
    saves arming the channel and the way through the set (20 µs a call against 42-53).

    Where the two ends share a page, it looks at that for some microseconds instead, and at the
    set as well: what is ready there ends the look, so nobody waits for a thread that lingers.
    Then it *parks* the page, which has the caller ring, and arms the channel.  A request that
    came in between, for which nobody will ring, has the set report at once (``EPOLLOUT``).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from doorpool import _sockets, _wire
from doorpool._channel import NOT, RECEIVE, Channel, Hangup, flat, process_is_gone
from doorpool._credentials import Credentials, is_strange
from doorpool._errors import ClosedError, DoorError, LimitError, ProtocolError
from doorpool._impl import shuttle
from doorpool._janitor import PATIENCE, close_all, held, holds_up, is_late, never_mind, when_closed
from doorpool._keeper import keeper, report
from doorpool._log import log
from doorpool._shares import PROMPT, Crowd, Limits, Share, ShareError, Turns, Usage, over
from doorpool._shelf import Totals
from doorpool._sockets import MAX_DESCRIPTORS
from doorpool._wire import Frame, Kind, Knock, Reason, Refusal

if TYPE_CHECKING:
    from doorpool._door import Door
    from doorpool._unread import Parcels

LINGER = 0.002  # seconds; see above
OLD = 1_000_000  # nanoseconds after which a posted request's caller is looked for before it is run
SEND_PATIENCE = 30.0  # seconds a caller may take no byte of its reply before it is given up

_REQUEST = int(Kind.REQUEST)
_REPLY = int(Kind.REPLY)
_FROM_CALLER = frozenset({int(Kind.REQUEST), int(Kind.PING)})

_PARKED = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
_AT_ONCE = _PARKED | select.EPOLLOUT
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


#: Logged, with the door's name and a uid.
SLOW = "%s: uid %s is not heard: closing what it has sent takes too long"

_CLOSING = Refusal(Reason.CLOSED, "the server is closing")
_SLOW = Refusal(
    Reason.BUSY, "closing the descriptors that this user has sent takes too long", may_have_run=False
)
_SPARED = Refusal(Reason.IDLE, "the server was short of descriptors and has closed this channel")


class _PutOff(Exception):
    """A channel is not to be read now."""


class Served:
    """A channel as its gate sees it: see "Who may touch a channel" above."""

    __slots__ = (
        "begun", "brought", "bytes", "channel", "claim", "door", "doomed", "fd", "goes_on", "limit", "memo",
        "poll", "put_off", "share", "turn", "unread", "watched", "words",
    )  # fmt: skip

    def __init__(self, channel: Channel, door: Door, words: Knock) -> None:
        self.channel = channel
        self.door = door
        self.words = words
        self.memo: Any = None
        self.fd = channel.fileno()
        self.limit = lambda: door.max_request
        self.claim = threading.Lock()
        self.doomed: Refusal | None = None
        self.watched = False  # the caller's process, by the keeper
        self.share: Share | None = None  # a stranger's: see ``doorpool._shares``
        self.turn = False
        self.begun = 0  # when the call of a turn began, nanoseconds; 0 between two calls
        self.goes_on = False  # a procedure that has answered goes on with its work
        self.bytes = 0
        self.put_off = 0.0  # until when at most, by ``time.monotonic()``; 0: it is not
        self.brought = False  # his call has descriptors that count
        self.unread: Parcels | None = None  # descriptors in results: see ``doorpool._unread``
        self.poll = select.poll()
        self.poll.register(self.fd, _GONE)
        if channel.pidfd >= 0:  # a hang-up may be hidden by whoever holds a copy of the socket
            self.poll.register(channel.pidfd, select.POLLIN)

    def hung_up(self) -> bool:
        """Tell whether the caller has closed its end, or given up what it asked for."""
        # Any thread may ask, and a poll object takes one at a time; ours is the claimant's.
        poll = select.poll()
        poll.register(self.fd, _GONE)
        return bool(poll.poll(0))


class _Kept(threading.local):
    """Whose channel a thread keeps that has answered; absent in a thread that never waits at the gate."""

    last: Served | None


class Gate:
    """
    Where server threads wait for calls, and callers for server threads.

    Any number of doors may lead to one gate; any thread may wait at it.

    Args:
        lingers: a thread that has answered comes back at once to wait here again, so the
            channel may stay with it meanwhile (see ``LINGER``).
        spin: nanoseconds for which it then looks at the shared page; -1: as long as it is worth it.
        crowd: the strangers of the server, each of whom has a share; without it all are equal here.
        threads: how many may wait here at most, for the strangers' turns.

    Modelled on: door_return(3C), by which a server thread waits for the next call.
    """

    def __init__(
        self, *, lingers: bool = False, spin: int = -1, crowd: Crowd | None = None, threads: int = 1
    ) -> None:  # fmt: skip
        self.spin = spin
        self.crowd = crowd
        self.limits = Limits() if crowd is None else crowd.limits
        self._turns = Turns(self.limits, threads)
        self._is_to_look = False  # for strangers who are held; the keeper's own
        self._epoll = select.epoll()
        self._set = self._epoll.fileno()
        self._bell = _sockets.bell_in(self._epoll, os.EFD_SEMAPHORE)
        self.generation = _sockets.generation
        self._served: dict[int, Served] = {}
        self._lingers = lingers
        self._local = _Kept()
        self._count = threading.Lock()
        self.waiting = 0
        self.waited = 0.0
        self._closed = False
        _gates.add(self)

    @property
    def channels(self) -> int:
        """How many channels are open here."""
        return len(self._served)

    @property
    def segments(self) -> Totals:
        """The segments of the channels that are open here."""
        shelves = [served.channel.shelf for served in list(self._served.values())]
        return sum((shelf.counts for shelf in shelves if shelf is not None), Totals())

    def usage(self) -> dict[int | None, Usage]:
        """What each stranger has here of running and waiting calls."""
        return self._turns.usage()

    @property
    def most_running(self) -> int:
        """How many calls of a stranger may run at a time."""
        return self._turns.most_running

    @property
    def closed(self) -> bool:
        """Whether the gate was closed."""
        return self._closed

    @property
    def closing(self) -> Refusal | None:
        """What a caller is told, if the gate was closed."""
        return _CLOSING if self._closed else None

    def wait(self, timeout: float | None = None) -> Invocation | None:
        """
        Wait for the next call.

        Args:
            timeout: seconds; None waits until there is one or ``wake`` is called.

        Returns:
            The invocation, which this thread must answer; None when the time is over or
            the thread was woken.

        Raises:
            ClosedError: the gate is closed.
        """
        # Whether this is a forked child is asked for each wait in the set, which would be the parent's;
        # a page knows it by itself.
        local = self._local
        try:
            served = local.last
        except AttributeError:
            served = None
        local.last = None
        try:
            if served is not None:
                # step: lingering
                invocation = None
                page = served.channel.page
                if served.doomed is None and (page is not None or self._has_time_for(served)):
                    if page is None:
                        self._check_here()
                    invocation = self._next_call(served, RECEIVE)
                if invocation is not None:
                    return invocation
                if not served.channel.closed:
                    self._park(served)
                served = page = None  # its door may be gone long before the next call comes
            self._check_here()
            return self._wait_for_any(None if timeout is None else time.monotonic() + timeout)
        except (OSError, ValueError):
            self._check_here()  # forked by a signal handler, while it waited
            raise

    def _has_time_for(self, served: Served) -> bool:
        """Tell whether a thread may linger: another waits, and no stranger for the turn that it keeps."""
        return self.waiting > 0 and not (served.turn and self._turns.any_held)

    def _check_here(self) -> None:
        if self.generation != _sockets.here():
            raise ClosedError("this gate belongs to the process that this one was forked from")

    def _wait_for_any(self, deadline: float | None) -> Invocation | None:
        while True:
            ready = self._wait_in_set(deadline)
            if ready is None:
                return None
            invocation = self._look_at(ready)
            if invocation is not None:
                return invocation

    def _wait_in_set(self, deadline: float | None) -> int | None:
        """Wait for one event; return its descriptor, None for a wake-up or the end of the time."""
        with self._count:
            self.waiting += 1
        try:
            while True:
                if self._closed:
                    raise ClosedError("this gate is closed")
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                events = self._poll(left)
                if not events:
                    return None
                ready: int = events[0][0]
                if ready != self._bell:
                    return ready
                with contextlib.suppress(OSError):  # meant for another thread; or it is reported again
                    os.eventfd_read(self._bell)
                    return None
        finally:
            with self._count:
                self.waiting -= 1

    def _poll(self, seconds: float | None) -> list[tuple[int, int]]:
        """Wait for one event in the set; none if the time is over, or it cannot be waited for just now."""
        try:
            return self._epoll.poll(seconds, 1)
        except OSError as error:
            if self.generation != _sockets.here():
                raise
            text = "a server thread cannot wait for calls: %s; trying again"
            log(logging.ERROR, text, error.strerror)
            time.sleep(LINGER)  # what has failed is what there would be to wait with
            return []

    def _look_at(self, ready: int) -> Invocation | None:
        """Claim the channel of an event and read from it; None if there is no call to run."""
        served = self._served.get(ready)
        if served is None or not served.claim.acquire(blocking=False):
            return None
        if served.share is not None and not self._take_turn(served):
            return None
        invocation = self._next_call(served, NOT)
        if invocation is not None:
            self.waited += invocation.waited
        elif not served.channel.closed:
            self._park(served)
        return invocation

    def _take_turn(self, served: Served) -> bool:
        """Take a turn for a stranger's channel, or let go of it until there is one."""
        uid = served.channel.peer.uid
        if self._turns.take(served, uid):
            return True
        if self._turns.is_full(uid):  # to be refused
            self._turns.forget(served, uid)
            return True
        if not self._has_come(served):
            self._turns.forget(served, uid)
            self._park(served)
            return False
        served.claim.release()
        if served.doomed is not None:
            self.end(served, served.doomed)
            return False
        self._arm_next(self._turns.hold(served, uid, lambda: self._served.get(served.fd) is served))
        return False

    @staticmethod
    def _has_come(served: Served) -> bool:
        """
        Tell whether the set would report a claimed channel at once, if it were armed.

        An event may be an older one's, of another thread or of a socket that had this number.  To count
        the bytes would not do: an empty packet has none, and would be reported over and over.
        """
        poll = select.poll()
        poll.register(served.fd, select.POLLIN | _GONE)
        try:
            return bool(poll.poll(0))
        except OSError:  # nobody knows; who reads it will see
            return True

    def _arm_next(self, got: list[Served]) -> None:
        """Arm the channels that have got a turn; others may have one as soon as what runs is not fresh."""
        for one in got:
            self._arm(one, _PARKED)
        if self._turns.any_held and self._turns.is_to_be_looked_at():
            keeper().soon(self._look_later)  # which takes no lock: a finalizer may be here

    def _look_later(self) -> None:
        """In the keeper's thread, as the next."""
        if not self._is_to_look:
            keeper().after(PROMPT / 1e9, self._look_at_turns)
            self._is_to_look = True

    def _look_at_turns(self) -> None:
        """Wait for nobody who holds a lock, and may want the keeper's."""
        self._is_to_look = False
        if self._closed:
            return
        got, again = self._turns.look()
        for one in got:
            self._arm(one, _PARKED)
        if again:
            self._look_later()

    def _count_request(self, served: Served, frame: Frame | None) -> None:
        """Count what has come of a stranger's request; refuse one that is over his share."""
        crowd, uid = self.crowd, served.channel.peer.uid
        assert crowd is not None
        if frame is None:
            crowd.count(served, served.channel.begun)
            return
        if frame.refusal is None:
            crowd.count(served, len(frame.data) + sum(map(len, frame.buffers)))
        elif frame.refusal.reason is Reason.TOO_LARGE and frame.refusal.value <= served.door.max_request:
            frame.refusal = crowd.why_no_request(served, frame.refusal.value)
        if not served.turn and frame.refusal is None:
            frame.refusal = over("calls waiting", uid, self._turns.is_full(uid), self._turns.most_held)
        if frame.refusal is not None:
            crowd.count(served, 0)
        if frame.refusal is not None and frame.refusal.reason is Reason.BUSY:
            self.refuse(served, frame.refusal)

    def refuse(self, served: Served, refusal: Refusal, about: str | None = None) -> None:
        """Take note that a stranger was refused for having too much."""
        if self.crowd is not None:
            self.crowd.refused += 1
        peer, door = served.channel.peer, served.door
        keeper().say(
            logging.WARNING, "%s: refused a call of %s: %s", door.name, peer, refusal.text,
            about=(about or door.name, "share"), offender=peer.uid,
        )  # fmt: skip

    def _make_room(self, served: Served) -> None:
        """
        Count the descriptors of a stranger's packet before they are taken in hand, or end his channel unread.

        If he holds his janitors up, what is in our table stays there, wanted or not.
        """
        # As many as there are and no more: other calls of his come at the same time, and find room beside it.
        refusal = served.door.bring(served, min(MAX_DESCRIPTORS, _sockets.coming(served.channel.socket)))
        if refusal is not None:
            self._put_off(served)  # those of his last call are being closed, perhaps
            self.refuse(served, refusal, "brought")
            self._say_goodbye(served, refusal)
            raise Hangup

    @staticmethod
    def _put_off(served: Served) -> None:
        """
        Leave a stranger's channel alone until what he has sent is closed; but not for ever.

        Raises:
            _PutOff: if that may be soon.
        """
        uid, now = served.channel.peer.uid, time.monotonic()
        if not held()[uid] or is_late(uid) or 0 < served.put_off < now:
            return
        served.put_off = served.put_off or now + PATIENCE
        raise _PutOff

    def _arm_later(self, served: Served) -> None:
        """Arm a channel that is put off: when all is closed that its caller has sent, or time is over."""

        def arm() -> None:
            if self._served.get(served.fd) is served:
                self._arm(served, _PARKED)

        def arm_at_last() -> None:
            never_mind(told)
            arm()

        told = when_closed(served.channel.peer.uid, lambda: keeper().soon(arm))
        keeper().after(PATIENCE, arm_at_last)

    def _say_closed(self, served: Served, error: Exception) -> None:
        """Log that a channel was closed for what its caller has sent; of a stranger not each time."""
        peer, door = served.channel.peer, served.door
        text = "%s: %s: channel closed: %s"
        report(peer, (door.name, "protocol"), logging.WARNING, text, door.name, peer, error)

    def _next_call(self, served: Served, how: int) -> Invocation | None:
        """Read from a claimed channel; close it if it has come to its end."""
        channel, door = served.channel, served.door
        frame: Frame | None = None
        try:
            page, request = channel.page, None
            invocation = Invocation(self, served)  # now, while the caller does something else
            if page is not None:
                request = page.linger(self._set) if how == RECEIVE else page.take()
            if type(request) is tuple:
                data, manifest, invocation._nanoseconds, sent = request
                channel.number += 1
                if manifest:
                    invocation.buffers = channel.unstow(data[:manifest], (), [])
                    data = data[manifest:]
                invocation.data = data
            elif how == RECEIVE and request == shuttle.NOTHING:
                return None
            else:
                frame = self._read_frame(served, NOT if page is not None else how)
                if served.share is not None:
                    self._count_request(served, frame)
                if frame is None:
                    if served.brought:
                        door.give_up_brought(served, channel.brought)  # all but what there is
                    return None
                invocation.take(frame)
                sent = frame.sent
            # step: request-read
            # A caller that gives up shuts its end down and then asks whether we have read all of
            # its request.  Because we look for the shutdown after reading and before running,
            # "not all read" tells it truly that the call never will run.  With a page the state
            # word tells that, and who has just posted is not looked for: that takes 0.4 µs.
            invocation._sent, invocation._taken = sent, (taken := time.monotonic_ns())
            if served.doomed is not None or ((page is None or taken - sent > OLD) and served.poll.poll(0)):
                self._turn_away(served, frame)
            size = len(invocation.data)
            if invocation.buffers:
                size += sum(map(len, invocation.buffers))
            if size > door.max_request:
                frame = frame or Frame(_REQUEST, channel.number)
                self._refuse_size(frame, door.max_request, size)
            everyday = frame is None or (
                frame.kind == _REQUEST and frame.refusal is None and not frame.descriptors
            )
            if everyday or self._is_accepted(served, frame):  # type: ignore[arg-type]
                if served.turn:
                    served.begun = taken
                invocation._open = True
                return invocation
            # One at a time, as with calls: who sends them without end keeps nobody else waiting.
            return None
        except _PutOff:
            return None
        except Hangup:
            self.drop(served)
        except (ProtocolError, shuttle.PageError) as error:
            self._say_closed(served, error)
            self._say_goodbye(served, Refusal(Reason.PROTOCOL, str(error)))
        except OSError:
            self._drop_with(served, frame)  # the caller was gone when it should have been answered
        except MemoryError as error:  # also in the main thread: a long request must not end the server
            self._drop_with(served, frame)
            report(
                channel.peer, (door.name, "memory"), logging.WARNING,
                "%s: %s: channel closed: no memory for a request (%s)", door.name, channel.peer, error,
            )  # fmt: skip
        except Exception as error:
            self._drop_with(served, frame)
            if threading.current_thread() is threading.main_thread():
                raise  # it may be a signal handler's
            text = "%s: %s: channel closed by an error; please report it"
            log(logging.ERROR, text, door.name, channel.peer, error=error)
        except BaseException:
            self._drop_with(served, frame)
            raise
        return None

    def _drop_with(self, served: Served, frame: Frame | None) -> None:
        """Close a channel, and what a request brought that will not be run."""
        if frame is not None:
            close_all(frame.descriptors, served.channel.peer.uid)
        self.drop(served)

    def _read_frame(self, served: Served, how: int) -> Frame | None:
        """Read the next call of a caller from the socket, if it is there whole."""
        channel, door = served.channel, served.door
        if holds_up(channel.peer.uid):
            self._put_off(served)
            self._turn_away_slow(served)
        limit = door.max_request
        frame = channel.read(limit, how, served.limit)
        served.put_off = 0.0
        if frame is None:
            return None
        if frame.number != channel.number + 1 or frame.kind not in _FROM_CALLER:
            self._complain(channel, frame)
        if channel.page is not None and not channel.page.accept():
            close_all(frame.descriptors, channel.peer.uid)
            raise Hangup  # the caller has withdrawn it
        channel.number = frame.number
        return frame

    def _turn_away_slow(self, served: Served) -> NoReturn:
        """
        End, unread, a channel of a stranger who has sent what holds a janitor up.

        He may have many, and each request brings as many descriptors as fit.
        """
        door, uid = served.door, served.channel.peer.uid
        keeper().say(logging.WARNING, SLOW, door.name, uid, about=(door.name, "stuck"), offender=uid)
        self._say_goodbye(served, _SLOW)
        raise Hangup

    @staticmethod
    def _refuse_size(frame: Frame, limit: int, size: int) -> None:
        """Mark a request as too large: the limit was lowered while we waited, or segments count too."""
        if frame.refusal is None:
            frame.refusal = Refusal(Reason.TOO_LARGE, limit=limit, value=size)

    @staticmethod
    def _complain(channel: Channel, frame: Frame) -> NoReturn:
        """Refuse a frame that is not the next call of its caller."""
        close_all(frame.descriptors, channel.peer.uid)
        raise ProtocolError(
            f"frame {chr(frame.kind)!r} with number {frame.number} after call {channel.number}"
        )

    def _turn_away(self, served: Served, frame: Frame | None) -> NoReturn:
        """End a channel whose door was taken away, or whose caller is gone."""
        if frame is not None:
            close_all(frame.descriptors, served.channel.peer.uid)
        if served.doomed is not None:
            self._say_goodbye(served, served.doomed)
        raise Hangup

    def _is_accepted(self, served: Served, frame: Frame) -> bool:
        """Look at a request that is not quite an everyday one; answer pings and refuse misfits."""
        refusal = served.door.objection(frame)
        if refusal is None and frame.kind == _REQUEST:
            if served.brought:
                served.door.give_up_brought(served, len(frame.descriptors))  # likewise
            return True
        close_all(frame.descriptors, served.channel.peer.uid)
        if served.brought:  # before it was whole
            served.door.give_up_brought(served)
        if served.unread is not None:
            served.door.settle(served)
        if served.channel.page is not None:
            served.channel.page.answer_by_socket()
        if refusal is None:
            self._answer_ping(served, frame)
        else:
            served.channel.say(Kind.FAILURE, frame.number, refusal.encode())
        return False

    def _answer_ping(self, served: Served, frame: Frame) -> None:
        """
        Say that we are here, and hand out a descriptor if one was asked for and can be had.

        Our own user and root say truly for whom they ask; of others each asks for himself.
        """
        channel, door = served.channel, served.door
        number, uid = -1, channel.peer.uid
        if _wire.is_hand_out(frame.data):
            try:
                number = door.open_for(uid if is_strange(uid) else _wire.decode_hand_out(frame.data, uid))
            except ShareError as error:
                channel.say(Kind.FAILURE, frame.number, Refusal(Reason.BUSY, str(error)).encode())
                return
            except (OSError, ClosedError):
                number = -1
        if number < 0:
            channel.say(Kind.PONG, frame.number, door.limits().encode())
            return
        passing = is_strange(uid)
        try:
            if passing and (refusal := door.begin_passing(served, 1)) is not None:
                passing = False
                self.refuse(served, refusal, "unread")
                channel.say(Kind.FAILURE, frame.number, refusal.encode())
                return
            channel.post(Kind.PONG, frame.number, door.limits().encode(), descriptors=[number])
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            channel.say(Kind.PONG, frame.number, door.limits().encode())
        finally:
            os.close(number)
            if passing:
                door.end_passing(served)

    # -- parking and closing ---------------------------------------------------------------

    def add(self, served: Served) -> None:
        """Let a freshly opened channel in."""
        served.channel.patience = LINGER
        served.channel.send_patience = SEND_PATIENCE
        if is_strange(served.channel.peer.uid):
            served.channel.make_room = lambda: self._make_room(served)
        self._served[served.fd] = served
        if self.closing is not None:  # after it is in the table: ``close`` ends it, or we do
            self.end(served, self.closing)
            return
        try:
            if self._lingers:
                served.channel.doze(LINGER)
        except OSError as error:
            self.end(served, Refusal(Reason.IDLE, f"the server cannot wait at it ({error.strerror})"))
        else:
            self._arm(served, self._events_for(served), fresh=True)

    def release(self, served: Served) -> None:
        """Let go of a channel whose call has been answered."""
        if served.turn:
            served.door.tempo.note(time.monotonic_ns() - served.begun)
            served.begun = 0  # it may keep its turn for another call
        local = self._local
        if self._lingers and served.doomed is None and getattr(local, "last", self) is None:
            local.last = served
        else:
            self._park(served)

    def part(self) -> None:
        """Let go of the channel that this thread keeps, which does not come back soon."""
        served = getattr(self._local, "last", None)
        if served is not None:
            self._local.last = None
            self._park(served)

    def _park(self, served: Served) -> None:
        # step: parking
        events = self._events_for(served)
        if served.turn:
            self._give_turn_back(served)
        served.claim.release()
        if served.doomed is not None:
            self.end(served, served.doomed)
        elif self._served.get(served.fd) is served:
            if served.put_off and held()[served.channel.peer.uid]:
                self._arm_later(served)
            else:
                self._arm(served, events)
            # step: parked

    def _give_turn_back(self, served: Served) -> None:
        """Let go of a stranger's turn, and arm the channel that gets it."""
        assert self.crowd is not None
        self.crowd.count(served, served.channel.begun)
        self._arm_next(self._turns.give_back(served, served.channel.peer.uid) or [])

    def _count_out(self, served: Served) -> None:
        """Count a stranger's channel out that is closed; wait for nobody, for this may be the keeper."""
        assert self.crowd is not None
        got = self._turns.give_back(served, served.channel.peer.uid, wait=False)
        for one in got or []:
            self._arm(one, _PARKED)
        if self._turns.any_held:
            keeper().soon(self._look_later)
        if not self.crowd.leave(served) or got is None:
            keeper().soon(lambda: self._count_out_later(served))

    def _count_out_later(self, served: Served) -> None:
        keeper().after(PROMPT / 1e9, lambda: self._count_out(served))

    def _events_for(self, served: Served) -> int:
        """Park a page; return what the set shall report: at once, if there is a request already."""
        page = served.channel.page
        try:
            return _PARKED if page is None or page.park() else _AT_ONCE
        except shuttle.PageError as error:
            text = "%s: %s: channel closed: %s"  # perhaps in the keeper's thread
            keeper().say(logging.WARNING, text, served.door.name, served.channel.peer, error)
            served.doomed = Refusal(Reason.PROTOCOL, str(error))
            return _PARKED

    def _arm(self, served: Served, events: int, *, fresh: bool = False) -> None:
        """Have the set report a channel once; one that was closed meanwhile stays out."""
        first, second = self._epoll.modify, self._epoll.register
        if fresh:
            first, second = second, first
        try:
            try:
                first(served.fd, events)
            except (FileNotFoundError, FileExistsError):
                second(served.fd, events)
        except ValueError:
            return  # the gate is closed
        except OSError as error:
            if self._served.get(served.fd) is served:  # or nobody would hear of it ever again
                self.end(served, Refusal(Reason.IDLE, f"the server cannot watch it ({error.strerror})"))

    def end(self, served: Served, refusal: Refusal) -> None:
        """Close a channel with a goodbye: now, or as soon as its call is answered."""
        served.doomed = refusal
        if served.claim.acquire(blocking=False):
            self._say_goodbye(served, refusal)

    def spare(self, count: int) -> None:
        """
        Close so many idle channels, to get their descriptors back.

        Those that were opened first go first.  A caller who has just written to one is told that
        his call was not run, and opens another.
        """
        for served in list(self._served.values()):
            if count <= 0:
                return
            if served.channel.number and not served.goes_on and served.claim.acquire(blocking=False):
                if _sockets.unread(served.channel.socket):
                    self._let_be(served)
                else:
                    self._say_goodbye(served, _SPARED)
                    count -= 1

    def _let_be(self, served: Served) -> None:
        """Let go of a channel that was parked; if it has a turn, it keeps that."""
        served.claim.release()
        if served.doomed is not None:
            self.end(served, served.doomed)
        elif self._served.get(served.fd) is served:
            self._arm(served, _PARKED)

    def _say_goodbye(self, served: Served, refusal: Refusal) -> None:
        if served.unread is not None:
            served.door.settle(served)
        served.channel.say(Kind.GOODBYE, served.channel.number, refusal.encode())
        # step: goodbye-said
        self.drop(served)

    def drop(self, served: Served) -> None:
        """Close a claimed channel, which stays claimed for ever; idempotent."""
        if self.generation != _sockets.here():
            return  # it is the parent's, and closed here already
        if self._served.get(served.fd) is served:
            del self._served[served.fd]
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(served.fd)
        if served.share is not None:
            self._count_out(served)
        served.door.forget(served)
        if served.channel.page is not None:
            served.channel.page.shut()  # behind the goodbye, for whoever looks at the page
        served.channel.shutdown()
        if served.unread is not None:
            served.door.leave_unread(served)
        served.channel.close()
        if served.brought:
            served.door.give_up_brought(served)

    def wake(self, threads: int = 1) -> None:
        """Let so many of the threads that wait, or will wait, return from ``wait`` with None."""
        if not self._closed and self.generation == _sockets.here():
            with contextlib.suppress(ValueError):  # -1: a signal handler has closed it just now
                _sockets.ring(self._bell, threads)

    def close(self) -> None:
        """
        Send all threads away and refuse new ones; idempotent, any thread.

        Doors that lead here should have been revoked before.
        """
        if self._closed or self.generation != _sockets.here():
            return
        self._closed = True
        # Level-triggered and read by nobody who sees the gate closed: it wakes all.
        _sockets.ring(self._bell, 0xFFFFFFF)
        for served in list(self._served.values()):
            self.end(served, _CLOSING)

    def leave_to_parent(self) -> None:
        """Close, in a forked child, what is not closed yet; the set goes on in the parent."""
        self._closed = True
        self._count = threading.Lock()  # a lost thread may hold the old one, and we be waiting here
        self._epoll.close()

    def dispose(self) -> None:
        """Give the gate's own descriptors back, once no thread waits here any more."""
        self._epoll.close()
        bell, self._bell = self._bell, -1
        if bell >= 0 and self.generation == _sockets.here():
            _sockets.close_number(bell)


_gates: weakref.WeakSet[Gate] = weakref.WeakSet()


def _forget_parent() -> None:
    for gate in list(_gates):
        gate.leave_to_parent()
    _gates.clear()


_sockets.on_fork(_forget_parent)


class Invocation:
    """
    One call of a door, to be answered exactly once by the thread that has it.

    One that is dropped unanswered tells the caller so.

    Attributes:
        door: the door that was called.
        data: the request's bytes.
        buffers: its buffers, writable.
        descriptors: the numbers that came along; the invocation owns those that are not
            taken out of the list.
        line: the channel it came by; in its ``memo`` the layer above may keep something.
        goes_on: set, and true, if its procedure goes on with its work after the answer.
        credentials: who is calling, as of the opening of its channel.
        words: what the caller says of itself (a claim).
        call, listener, undo: the layer above may keep something here, too.

    Modelled on: the arguments of a server procedure, door_create(3C)
    """

    _nanoseconds: int
    _sent: int
    _taken: int
    listener: Any  # not set for an everyday call
    goes_on: bool  # likewise
    undo: Callable[[], None]  # likewise

    __slots__ = (
        "_gate", "_nanoseconds", "_open", "_sent", "_taken", "buffers", "call", "data", "descriptors",
        "door", "goes_on", "line", "listener", "undo",
    )  # fmt: skip

    def __init__(self, gate: Gate, served: Served) -> None:
        self._open = False  # until there is something to answer
        self.call: Any = None
        self._gate = gate
        self.line = served
        self.door = served.door
        self.data: bytes | bytearray = b""
        self.buffers: Sequence[bytearray | memoryview] = ()
        self.descriptors: list[int] = []

    def take(self, frame: Frame) -> None:
        """Be the call that a frame has brought; for the gate."""
        self.data, self.buffers, self.descriptors = frame.data, frame.buffers, frame.descriptors
        self._nanoseconds = frame.nanoseconds

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if self._open and not _ending():  # as in Channel
            self.fail(Reason.ABORTED, "the server dropped the call without an answer", may_have_run=True)

    @property
    def credentials(self) -> Credentials:
        """Who is calling, as the kernel said when the channel was opened."""
        return self.line.channel.peer

    @property
    def words(self) -> Knock:
        """What the caller said of itself when it knocked."""
        return self.line.words

    @property
    def waited(self) -> float:
        """Seconds from the sending of the call to its being taken, by the caller's account."""
        sent = self._sent
        return (self._taken - sent) / 1e9 if 0 < sent < self._taken else 0.0

    @property
    def deadline(self) -> float | None:
        """When the caller gives up, by ``time.monotonic()`` here; None for never."""
        left = self._nanoseconds
        return self._taken / 1e9 - self.waited + left / 1e9 if left else None

    @property
    def answered(self) -> bool:
        """Whether it has been answered."""
        return not self._open

    @property
    def cancelled(self) -> bool:
        """
        Whether nobody waits for the answer any more: the caller has given up, or is dead.

        Looks at the channel and at the caller's process each time it is asked.
        """
        channel = self.line.channel
        return channel.closed or self.line.hung_up() or process_is_gone(channel.pidfd)

    def wait_cancelled(self, seconds: float) -> bool:
        """Wait until the caller has given up, or is dead, or the time is over; return whether he has."""
        poll = select.poll()
        channel = self.line.channel
        if not channel.closed:
            poll.register(self.line.fd, _GONE)
            poll.poll(seconds * 1000)
        return self.cancelled

    def reply(
        self,
        data: bytes | bytearray | memoryview = b"",
        buffers: Sequence[memoryview] = (),
        descriptors: Sequence[int] = (),
    ) -> None:
        """
        Answer the call.  A caller that is gone misses it; that is no error.

        Blocks until the caller has taken all of it, or taken nothing for 30 s.

        Args:
            data, buffers: the bytes.
            descriptors: go along; they stay the caller's of this method.

        Raises:
            LimitError: over the door's ``max_reply``, more than 65,536 buffers or 253
                descriptors.  The invocation is still to be answered.
            OSError: ``EBADF`` for a bad descriptor; likewise.
            ValueError: memory that is not in one piece; likewise.

        Modelled on: door_return(3C)
        """
        if not self._open:
            raise ClosedError("this invocation has been answered")
        if buffers or descriptors or type(data) is not bytes or len(data) > self.door.max_reply:
            try:
                data, buffers = flatten(self.door.name, data, buffers)
                self._check_reply(len(data) + sum(map(len, buffers)), descriptors)
            except DoorError as error:
                error.may_have_run = True
                raise
        self._answer(_REPLY, data, buffers, descriptors)

    def _check_reply(self, size: int, descriptors: Sequence[int]) -> None:
        limit = self.door.max_reply
        if size > limit:
            raise LimitError(
                f"{self.door.name}: a reply of {size} bytes is over max_reply, {limit}",
                limit=limit, value=size,
            )  # fmt: skip
        check_descriptors(self.door.name, descriptors, MAX_DESCRIPTORS)

    def fail(
        self, reason: Reason = Reason.ABORTED, text: str = "", *, may_have_run: bool = True,
        limit: int = 0, value: int = 0,
    ) -> None:  # fmt: skip
        """Answer with an error of the door's, not of the procedure's."""
        if self._open:
            refusal = Refusal(reason, text, may_have_run, limit, value)
            self._answer(Kind.FAILURE, refusal.encode())

    @property
    def may_part(self) -> bool:
        """Whether another thread waits, who could take the channel's next call."""
        return self._gate.waiting > 0

    def part(self) -> None:
        """Having answered, go on for a while: the channel's next call is another thread's."""
        self.goes_on = self.line.goes_on = True
        self._gate.part()

    def cut(self) -> None:
        """
        Let the caller go without an answer; from any thread.

        He is told that the call may have run.  Whoever has the invocation may go on, and
        answer it: nobody hears.
        """
        self.line.channel.shutdown()

    def _answer(
        self,
        kind: int,
        data: bytes | bytearray | memoryview,
        buffers: Sequence[memoryview] = (),
        descriptors: Sequence[int] = (),
    ) -> None:
        self._open = False
        served = self.line
        try:
            # step: replying
            channel = served.channel
            page = channel.page
            everyday = page is not None and kind == _REPLY and not channel.news
            if not everyday or buffers or descriptors or not page.answer(data, 0):  # type: ignore[union-attr]
                if self._gate.generation != _sockets.here():
                    return  # a forked child that comes this way answers nothing: the parent will
                if served.share is not None:
                    kind, data, buffers, descriptors = self._within_share(kind, data, buffers, descriptors)
                if served.brought:
                    self._give_up_brought(descriptors)
                if served.unread is not None:
                    served.door.settle(served)
                if descriptors and is_strange(channel.peer.uid):
                    self._pass_to_stranger(channel, kind, data, buffers, descriptors)
                else:
                    self._answer_at_length(channel, kind, data, buffers, descriptors)
        except OSError as error:
            if isinstance(error, TimeoutError):
                self._say_unread(served)
            self._gate.drop(served)  # nobody is there, or nobody reads
        except BaseException as error:
            if isinstance(error, ValueError) and self._gate.generation != _sockets.here():
                return  # likewise; a page is closed in a forked child, and says so
            self._gate.drop(served)  # a part of a reply is none
            raise
        else:
            # step: reply-sent
            self._gate.release(served)
        finally:
            if self.descriptors:
                close_all(self.descriptors, served.channel.peer.uid)

    @staticmethod
    def _say_unread(served: Served) -> None:
        door, peer = served.door, served.channel.peer
        text = "%s: %s: channel closed: nothing of a reply was read for %g s"
        report(peer, (door.name, "unread"), logging.WARNING, text, door.name, peer, SEND_PATIENCE)

    def _within_share(
        self, kind: int, data: bytes | bytearray | memoryview, buffers: Sequence[memoryview],
        descriptors: Sequence[int],
    ) -> tuple[int, bytes | bytearray | memoryview, Sequence[memoryview], Sequence[int]]:  # fmt: skip
        """Count a stranger's result in, or put a refusal in its place."""
        crowd = self._gate.crowd
        assert crowd is not None
        refusal = crowd.begin_reply(self.line, len(data) + sum(map(len, buffers)))
        if refusal is None:
            return kind, data, buffers, descriptors
        self._gate.refuse(self.line, refusal)
        return Kind.FAILURE, refusal.encode(), (), ()

    def _give_up_brought(self, passed: Sequence[int] = ()) -> None:
        """
        Close the descriptors of a stranger's call that are left, and count all of them out.

        Those that are passed back with the answer are closed behind it, and count until it is sent.
        """
        left = [number for number in self.descriptors if number not in passed]
        for number in left:
            self.descriptors.remove(number)
        close_all(left, self.line.channel.peer.uid)
        self.door.give_up_brought(self.line, len(passed))

    def _pass_to_stranger(
        self, channel: Channel, kind: int, data: bytes | bytearray | memoryview,
        buffers: Sequence[memoryview], descriptors: Sequence[int],
    ) -> None:  # fmt: skip
        """Send an answer with descriptors, of which a stranger may leave few unread."""
        try:
            refusal = self.door.begin_passing(self.line, len(descriptors))
            if refusal is not None:
                self._gate.refuse(self.line, refusal, "unread")
                return self._answer_at_length(channel, Kind.FAILURE, refusal.encode(), (), ())
            try:
                self._answer_at_length(channel, kind, data, buffers, descriptors)
            finally:
                self.door.end_passing(self.line)
        finally:
            if self.line.brought:
                self._give_up_brought()

    @staticmethod
    def _answer_at_length(
        channel: Channel,
        kind: int,
        data: bytes | bytearray | memoryview,
        buffers: Sequence[memoryview],
        descriptors: Sequence[int],
    ) -> None:
        """Send an answer that is not quite an everyday one: by the page where it fits, or by the socket."""
        page, manifest = channel.page, b""
        if kind == _REPLY and (buffers or channel.news):
            manifest, buffers, descriptors = channel.stow(buffers, descriptors)
        if page is not None:
            whole = b"".join((manifest, data)) if manifest else data
            if kind == _REPLY and not buffers and not descriptors and page.answer(whole, len(manifest)):
                return
            page.answer_by_socket()
        channel.post(kind, channel.number, data, buffers, descriptors, manifest=manifest)


def flatten(
    name: str, data: bytes | bytearray | memoryview, buffers: Sequence[memoryview]
) -> tuple[bytes | bytearray | memoryview, Sequence[memoryview]]:
    """
    Return data and buffers as rows of bytes, before anything is sent.

    Raises:
        LimitError: more buffers than a frame takes.
        ValueError: memory that is not in one piece.
    """
    if isinstance(data, memoryview):
        data = flat(data)
    if len(buffers) > _wire.MAX_BUFFERS:
        raise LimitError(
            f"{name}: {len(buffers)} buffers are over the limit of {_wire.MAX_BUFFERS}",
            limit=_wire.MAX_BUFFERS, value=len(buffers),
        )  # fmt: skip
    return data, [flat(buffer) for buffer in buffers] if buffers else ()


def check_descriptors(name: str, descriptors: Sequence[int], limit: int) -> None:
    """
    Refuse too many descriptors, and ones that are not open, before anything is sent.

    Raises:
        LimitError: more than the limit.
        OSError: ``EBADF``, naming the number.
    """
    if len(descriptors) > limit:
        raise LimitError(
            f"{name}: {len(descriptors)} descriptors are over its limit of {limit}",
            limit=limit,
            value=len(descriptors),
        )
    for descriptor in descriptors:
        try:
            os.get_inheritable(descriptor)  # unlike fstat, asks no file system: it may be a stranger's
        except OSError as error:
            if error.errno == errno.EBADF:
                raise OSError(errno.EBADF, f"descriptor {descriptor} is not open") from None
