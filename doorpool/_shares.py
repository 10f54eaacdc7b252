"""
What each user may have of a server at one time, and whose turn it is.

Whoever may open a door can hold its channels, fill its memory and keep its threads busy.  So each *stranger*
(a user who is neither our own nor root) has a share of each, by uid; all users whom the kernel does not name
have one together.  Our own user and root have no share: they could stop the server in simpler ways, and a
call of theirs passes none of this.

Who holds a lock here may be held up: a garbage collection in the midst of it may find an endpoint that nobody
closed, and wait for the keeper's lock.  So whoever holds that, the keeper above all, waits for none of these.

Where it is counted
    channels, bytes     for each server (``Crowd``), whose they are; bytes also of all strangers together
    threads             for each pool of threads (``Turns``): a pool is what callers wait for
    descriptors, knocks for the process (``_guests``, ``_unread``), for so the kernel counts them; each server
                        has its own limit for the number

Turns
    A server thread reads the channel of a stranger, runs its call and waits for its next one only while the
    channel has a *turn*, and a uid has no more turns at a time than its share.  A channel that is ready
    when all are taken is *held*: nobody reads it, and it is not armed, so that the kernel reports it no
    more.  Who gives a turn back passes it on to the channel that has been held longest, of the uid whose
    turn it is in the round, and has it armed; the set then reports it to whichever thread waits.  So no
    thread need be told, none waits for a stranger, and nothing is lost when one retires.

     1. thread A finds no turn for a channel, and lets go of it;
     2. thread B gives the last turn of this uid back, and finds nobody held;
     3. A holds the channel: who holds one looks for a turn once more, under the lock that B had.

Two uids that press get turns by turns.  One that has few channels gets a turn at once: the others' are used
up.

Prompt doors
    Threads that run what is done at once stand in each other's way, for there is one interpreter's lock: with
    the 16 turns of one uid taken by calls that did nothing, another uid's call waited for 12 ms in the worst
    of a hundred cases (it takes 0.2 ms when nobody presses), and all together were no more than with one turn
    (6,700 calls a second; with one, 8,200).  So of the calls of a *prompt* door, one that mostly answers
    within ``PROMPT``, one of each uid is *fresh* at a time: it has run for less than ``PROMPT``.  One that
    takes longer than its door's others stands in nobody's way any more, since it waits for something, and the
    next of its uid is let in beside it, as far as there are turns.  Nobody need come by just then, so while a
    channel is held for this reason, the gate has the keeper look (``look``).  How long the calls
    of a door take is learned from those of strangers; a door of which nothing is known is not prompt.
"""

from __future__ import annotations

import math
import operator
import resource
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import attrs

from doorpool._channel import PACKET
from doorpool._errors import BusyError
from doorpool._wire import Reason, Refusal

if TYPE_CHECKING:
    from doorpool._gate import Served


#: How many users may have all their bytes in flight at one time, if nothing else is said.
_USERS = 4

_NO_LIMIT = 1 << 62

#: Nanoseconds within which the calls of a prompt door are answered.  See "Prompt doors" above.
PROMPT = 1_000_000

#: Nanoseconds within which a thread comes to a channel that has got a turn, and is fresh until then.
_COMING = 100_000_000


def _whole(_: object, attribute: attrs.Attribute[Any], value: int | None) -> None:
    if value is None and attribute.default is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{attribute.name} is a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{attribute.name} is at least 1, not {value}")


@attrs.frozen(kw_only=True)
class Limits:
    """
    What each user other than our own and root may have of a server at one time.

    Whoever would go over one is refused with a ``BusyError`` that names the door, the limit, how much there
    is and the uid; but for ``running``, over which calls wait for their turn.

    Args:
        channels: open channels.  A ``Proxy`` has one for each call that it makes at a time.
        running: calls in the threads of a pool; by default a quarter of its ``max_threads``.  (All strangers
            together: three quarters.)  Between users who wait, turns go round.  Of calls that are done
            within a millisecond one of each user runs at a time; see "Prompt doors".
        queued: calls that have come and wait for a turn.
        bytes: of requests of more than a packet, from their first byte until they are answered, and of
            results until the caller has read them, but for what the kernel buffers (some 200 KiB a
            channel).  A single one is let pass if there is nothing else: ``max_request`` and
            ``max_reply`` are for that.  Requests that begin at the same moment may go over it together.
        total_bytes: the same of all these users together, who may be one person with many uids; by default
            four times ``bytes``.  Nobody counts for more than ``bytes`` in it, and what is no more than a
            packet (64 KiB) is let pass.
        descriptors: of the server's process, for connections and channels, for what his calls bring,
            until they are answered and it is closed, and for doors, streams and leases that were given to
            him in results, as long as he keeps them; by default half of what strangers may have together,
            which is three quarters of ``RLIMIT_NOFILE``.
        greetings: knocks that are being answered: those that ``callers`` is asked about, and likewise answers
            that have not been read.  (A ``callers`` function is asked about two of them at a time, and about
            six of all strangers' together, of whom 384 may wait for it at each door.)
        unread: descriptors in results that he has not read, in the process; by default 256, or a quarter of
            ``RLIMIT_NOFILE`` if that is less.  (All strangers together: twice that.)  A result alone is let
            pass.

    Raises:
        TypeError, ValueError: a limit is no whole number, or below 1.
    """

    channels: int = attrs.field(default=256, validator=_whole)
    running: int | None = attrs.field(default=None, validator=_whole)
    queued: int = attrs.field(default=256, validator=_whole)
    bytes: int = attrs.field(default=2**28, validator=_whole)
    total_bytes: int | None = attrs.field(default=None, validator=_whole)
    descriptors: int | None = attrs.field(default=None, validator=_whole)
    greetings: int = attrs.field(default=16, validator=_whole)
    unread: int | None = attrs.field(default=None, validator=_whole)


@attrs.frozen
class Usage:
    """
    What a stranger has of a server now; the fields are those of ``Limits``, but for the total.

    ``descriptors``, ``greetings`` and ``unread`` are of the whole process; ``greetings`` of both kinds
    together.
    """

    channels: int = 0
    running: int = 0
    queued: int = 0
    bytes: int = 0
    descriptors: int = 0
    greetings: int = 0
    unread: int = 0


def most_descriptors() -> int:
    """Return how many descriptors a process of ours may have."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def sum_up(usages: Iterable[dict[int | None, Usage]]) -> dict[int | None, Usage]:
    """Add up, for each uid, what it has in several places."""
    total: dict[int | None, Usage] = {}
    for usage in usages:
        for uid, one in usage.items():
            before = attrs.astuple(total.get(uid, Usage()))
            total[uid] = Usage(*map(operator.add, before, attrs.astuple(one)))
    return total


def over(what: str, uid: int | None, value: int, limit: int, *, may_have_run: bool = False) -> Refusal:
    """Say to a user that he has too much of something."""
    whose = "callers of unknown uid have" if uid is None else f"uid {uid} has"
    text = f"{whose} {value} {what}, and a user's limit is {limit}"
    return Refusal(Reason.BUSY, text, may_have_run, limit, value)


def _enter_without_waiting(lock: Any) -> bool:
    """Acquire a lock if nobody has it: no other thread, nor this one, in whose midst a finalizer may come."""
    return not lock._is_owned() and lock.acquire(blocking=False)


class ShareError(BusyError):
    """What a stranger is to have is over his share.  It has been logged; he is told a ``BusyError``."""


@attrs.define(eq=False)
class Share:
    """What one uid has of a server."""

    uid: int | None
    channels: set[Served] = attrs.field(factory=set)
    bytes: int = 0


class Crowd:
    """The strangers of one server."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.most_bytes = limits.total_bytes or _USERS * limits.bytes  # of all of them
        self.refused = 0
        self._lock = threading.RLock()  # a finalizer may answer a call in the midst of it
        self._shares: dict[int | None, Share] = {}
        self._bytes = 0  # of all of them, of nobody more than his limit

    def objection(self, uid: int | None) -> Refusal | None:
        """Say why a stranger may open no further channel; None if he may."""
        share = self._shares.get(uid)
        if share is None or len(share.channels) < self.limits.channels:
            return None
        return over("channels open", uid, len(share.channels), self.limits.channels)

    def enter(self, served: Served, uid: int | None) -> None:
        """Count a channel in; for holders of the keeper's lock, who wait for no other."""
        for left in [it for it in self._shares.values() if not (it.channels or it.bytes)]:
            del self._shares[left.uid]
        served.share = self._shares.setdefault(uid, Share(uid))
        served.share.channels.add(served)

    def leave(self, served: Served) -> bool:
        """Count a channel out, waiting for nobody; idempotent.  Return False if it is to be tried again."""
        share = served.share
        if share is None:
            return True
        share.channels.discard(served)
        if not _enter_without_waiting(self._lock):
            return False
        try:
            served.share = None
            self._set(share, served, 0)
            return True
        finally:
            self._lock.release()

    def room(self, served: Served, limit: int) -> int:
        """Say how large a request may be that begins, if ``limit`` is the door's."""
        share = served.share
        if share is None:
            return limit
        others = share.bytes - served.bytes
        if others:
            limit = min(limit, max(0, self.limits.bytes - others))
        return min(limit, max(PACKET, self._room_of_all(share, others)))

    def _room_of_all(self, share: Share, others: int) -> int:
        """Say how much more there may be of somebody who has so much besides, because of what all have."""
        most = self.limits.bytes
        before = min(others, most)
        all_others = self._bytes - min(share.bytes, most) + before
        left = self.most_bytes - all_others
        return max(0, left) if all_others and left < most - before else _NO_LIMIT

    def _set(self, share: Share, served: Served, size: int) -> None:
        """Let a channel have so many bytes in flight; for holders of the lock."""
        # Nothing is called here, so no finalizer comes in between that does the same.
        most = self.limits.bytes
        before, now = share.bytes, share.bytes + size - served.bytes
        self._bytes += (now if now < most else most) - (before if before < most else most)
        share.bytes = now
        served.bytes = size

    def count(self, served: Served, size: int) -> None:
        """Say how many bytes of a channel are in flight now."""
        if size == served.bytes or (share := served.share) is None:
            return
        with self._lock:
            self._set(share, served, size)

    def why_no_request(self, served: Served, size: int) -> Refusal:
        """Say why a request had no room that the door would have taken."""
        assert served.share is not None
        return self._too_much(served.share, "a request", size, served.share.bytes - served.bytes)

    def begin_reply(self, served: Served, size: int) -> Refusal | None:
        """Count a result in place of its request, or say why it is not sent."""
        share = served.share
        if share is None or not (size or served.bytes):
            return None
        with self._lock:
            others = share.bytes - served.bytes
            over_own = others and others + size > self.limits.bytes
            if over_own or size > max(PACKET, self._room_of_all(share, others)):
                return self._too_much(share, "a result", size, others, may_have_run=True)
            self._set(share, served, size)
        return None

    def _too_much(
        self, share: Share, what: str, size: int, others: int, *, may_have_run: bool = False
    ) -> Refusal:  # fmt: skip
        what = f"bytes in flight with {what} of {size}"
        if not others or others + size <= self.limits.bytes:
            most, value = self.most_bytes, self._bytes - min(share.bytes, self.limits.bytes) + others + size
            whose = "unknown uid" if share.uid is None else f"uid {share.uid}"
            text = f"other users have {value} {what} of {whose}, and their limit together is {most}"
            return Refusal(Reason.BUSY, text, may_have_run, most, value)
        return over(what, share.uid, others + size, self.limits.bytes, may_have_run=may_have_run)

    def usage(self) -> dict[int | None, Usage]:
        """What each stranger has of channels and bytes."""
        shares = [it for it in list(self._shares.values()) if it.channels or it.bytes]
        return {it.uid: Usage(channels=len(it.channels), bytes=it.bytes) for it in shares}


class Tempo:
    """
    How long the calls of a door take: the least of late, for who must wait for others takes longer.

    Attributes:
        least: nanoseconds; infinite if nothing is known.
    """

    __slots__ = ("least",)

    def __init__(self) -> None:
        self.least = math.inf

    def note(self, took: float) -> None:
        """Learn of a call; after thirty that take longer nothing is left of one that took 30 µs."""
        self.least = min(took, self.least * 1.125 + 1)

    @property
    def is_prompt(self) -> bool:
        """Whether they are answered at once, but for some."""
        return self.least < PROMPT


class Turns:
    """
    The turns of strangers at one pool of threads.

    Args:
        limits: of each uid.
        threads: how many the pool may have.

    Attributes:
        any_held: whether anybody is.
    """

    def __init__(self, limits: Limits, threads: int) -> None:
        self._most_of_all = max(1, threads * 3 // 4)
        usual = max(min(2, self._most_of_all), threads // 4)
        self._most = min(limits.running or usual, self._most_of_all)
        self._most_held = limits.queued
        self._lock = threading.RLock()  # a finalizer may answer a call in the midst of it
        self._running: dict[int | None, set[Served]] = {}
        self._taken = 0
        self._held: dict[int | None, dict[Served, None]] = {}  # in the order of the round
        self._to_be_looked_at = False
        self.any_held = False

    def take(self, served: Served, uid: int | None) -> bool:
        """Take a turn for a channel that is claimed, unless it has one; tell whether there was one."""
        with self._lock:
            if served.turn:
                return True
            mine = self._held.get(uid)
            if (mine is not None and served not in mine) or not self._has_one(uid, served):
                return False
            self._forget(served, uid)
            self._give(served, uid)
            return True

    def is_full(self, uid: int | None) -> int:
        """Tell how many channels of a uid are held, if no more may be besides its turns; else 0."""
        held = len(self._held.get(uid, ()))
        left = 0 if self._taken >= self._most_of_all else self._most - len(self._running.get(uid, ()))
        return held if held >= self._most_held + left else 0

    @property
    def most_running(self) -> int:
        """How many turns a uid may have at a time."""
        return self._most

    @property
    def most_held(self) -> int:
        """How many may be."""
        return self._most_held

    def hold(self, served: Served, uid: int | None, is_open: Callable[[], bool]) -> list[Served]:
        """Hold a channel that nobody claims; return those that have got a turn and are to be armed."""
        with self._lock:
            if is_open() and not served.turn:
                self._held.setdefault(uid, {})[served] = None
                self.any_held = True
            return self._pass_on()

    def give_back(self, served: Served, uid: int | None, *, wait: bool = True) -> list[Served] | None:
        """
        Give a turn back, if the channel has one or is held.

        Returns:
            Those to be armed that got it; None if that was not to be had without waiting.
        """
        if not (self._lock.acquire() if wait else _enter_without_waiting(self._lock)):
            return None
        try:
            self._forget(served, uid)
            if served.turn:
                served.turn = False
                self._taken -= 1
                mine = self._running[uid]
                mine.discard(served)
                if not mine:
                    del self._running[uid]
            return self._pass_on() if self.any_held else []
        finally:
            self._lock.release()

    def look(self) -> tuple[list[Served], bool]:
        """
        Pass on the turns that there are now, since some calls are not fresh any more; wait for nobody.

        Returns:
            Those to be armed, as of ``give_back``, and whether to look again.
        """
        if not self._lock.acquire(blocking=False):
            return [], True
        try:
            got = self._pass_on()
            self._to_be_looked_at = self._wait_for_fresh_ones()
            return got, self._to_be_looked_at
        finally:
            self._lock.release()

    def is_to_be_looked_at(self) -> bool:
        """Tell, once until ``look`` says otherwise, whether somebody is held only while others are fresh."""
        with self._lock:
            if self._to_be_looked_at:
                return False
            self._to_be_looked_at = self._wait_for_fresh_ones()
            return self._to_be_looked_at

    def _wait_for_fresh_ones(self) -> bool:
        return self._taken < self._most_of_all and any(
            len(self._running.get(uid, ())) < self._most for uid in list(self._held)
        )

    def _has_one(self, uid: int | None, served: Served) -> bool:
        mine = self._running.get(uid, ())
        if self._taken >= self._most_of_all or len(mine) >= self._most:
            return False
        if not mine or not served.door.tempo.is_prompt:
            return True
        late = time.monotonic_ns() - PROMPT
        return not any(one.begun > late and one.door.tempo.is_prompt for one in list(mine))

    def _give(self, served: Served, uid: int | None) -> None:
        served.turn = True
        served.begun = time.monotonic_ns() + _COMING  # or until a thread has come to it
        self._taken += 1
        self._running.setdefault(uid, set()).add(served)

    def forget(self, served: Served, uid: int | None) -> None:
        """Hold a channel no longer, which is read without a turn."""
        with self._lock:
            self._forget(served, uid)

    def _forget(self, served: Served, uid: int | None) -> None:
        mine = self._held.get(uid)
        if mine is not None:
            mine.pop(served, None)
            if not mine:
                del self._held[uid]
                self.any_held = bool(self._held)

    def _pass_on(self) -> list[Served]:
        """Give the free turns to who is held, one for each uid in the round."""
        got: list[Served] = []
        while self._taken < self._most_of_all:
            for uid in list(self._held):
                served = next(iter(self._held.get(uid, ())), None)
                if served is not None and self._has_one(uid, served):
                    break
            else:
                break
            mine = self._held.pop(uid, {})
            if mine:
                self._held[uid] = mine  # at the end of the round
            if served not in mine:  # a finalizer has just closed it
                continue
            self._give(served, uid)
            self._forget(served, uid)
            got.append(served)
        self.any_held = bool(self._held)
        return got

    def usage(self) -> dict[int | None, Usage]:
        """What each stranger has of turns."""
        with self._lock:
            held = {uid: len(mine) for uid, mine in list(self._held.items())}
            return {
                uid: Usage(running=len(self._running.get(uid, ())), queued=held.get(uid, 0))
                for uid in {*self._running, *held}
            }  # fmt: skip
