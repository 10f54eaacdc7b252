"""
Who has come to the doors of this process, and how many of whom there may be.

A server answers a knock with a descriptor.  Until the client reads the answer it is *in flight*,
and the kernel counts it against the server's user, whom it lets have no more than
``RLIMIT_NOFILE`` of them: with 514 knocks whose answers were never read, a stranger stopped every
process of that user from passing a descriptor (``ETOOMANYREFS``).  No timeout helps, for the
answers lie in the stranger's queue.  So a *guest*, the socket k1 on which an answer went, is kept
until the kernel says that the answer has been read (``SIOCOUTQ``) and the client has closed his
end.  A hang-up alone proves nothing: whoever shuts his end down can keep it, answer and all.

Our own user and root are trusted, and bounded only all together.  Strangers, that is all others
and those of whom the kernel does not say who they are, get a few answers each, and all together
three quarters of what there is: of the answers in flight, and of this process's descriptors, of
which no uid gets more than half of that (``doorpool._shares`` has the limits).  Of descriptors there count
connections and channels, those that calls have brought, from before they are taken in hand until these are
answered, what a janitor has not closed yet, and what is kept for ``doorpool._unread``, which bounds the
descriptors in results.  All this is counted for the process and not for a server, because the kernel counts
so; each server has its own limits for it.

All methods are for holders of the keeper's lock, but those that say otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from doorpool import _janitor, _opening, _sockets
from doorpool._credentials import is_strange
from doorpool._descriptor import NOBODY
from doorpool._keeper import Keeper, Timer, keeper
from doorpool._opening import Visitor
from doorpool._shares import Limits, Usage, most_descriptors
from doorpool._unread import Unread
from doorpool._wire import Reason, Refusal

if TYPE_CHECKING:
    from doorpool._door import Door
    from doorpool._gate import Served

#: How long a client may keep its end of a knock once it has the answer, seconds.
GREETING_PATIENCE = 30.0

#: Seconds until an unread answer of somebody who has hung up is looked at again, the first time.
#: A client that dies closes its end before it gives up what is in its queue.
_SECOND_LOOK = 0.05

#: How long a trusted guest is left alone, seconds.  By then he has nearly always read his answer, and goes
#: unwatched: a watch, a timer and a wake-up for each took 60 µs of an opening.  Nor is his process watched
#: before: many a client is gone by then.
_FIRST_LOOK = 0.002

#: Descriptors of a knock that a rule is being asked about: its socket, and one of who sent it.
ASKED_ABOUT = 2

MOST_UNREAD = Limits().greetings  #: Answers that a strange uid may leave unread, if nothing else is said.
MOST_UNREAD_OF_ALL = 4_096  #: All together, where not a quarter of ``RLIMIT_NOFILE`` is less.


def descriptors_of_a_user(limits: Limits) -> int:
    """Return how many descriptors a strange uid may have, by what ``RLIMIT_NOFILE`` is now."""
    most = most_descriptors() * 3 // 4
    return max(1, min(limits.descriptors or most // 2, most))


@attrs.define(eq=False)
class _Guest:
    socket: socket.socket  # k1
    uid: int | None
    served: Served
    timer: Timer | None = None
    delay: float = _SECOND_LOOK
    fresh: bool = False  # trusted, and to be looked at soon
    over: bool = False  # his channel is closed


class Guests:
    """The guests of one process."""

    def __init__(self, keeper: Keeper) -> None:
        self.generation = _sockets.generation
        self._keeper = keeper
        self._guests: dict[Served, _Guest] = {}
        self._strange_ports: dict[socket.socket, int | None] = {}
        self._strange_channels: set[Served] = set()
        self._fresh: list[_Guest] = []  # trusted, and not watched yet
        #: What strangers have let go of and is not closed yet, and whose it was.
        self._leaving: dict[object, int | None] = {}
        self._asked_about: Counter[int | None] = Counter()  # knocks of strangers that wait for a rule, by uid
        self._brought: dict[Served, int] = {}  # descriptors of strangers' calls
        self.unread = Unread(keeper)

    def objection(self, uid: int | None, limits: Limits) -> str | None:
        """Say why a user may not come in just now; None if he may."""
        few = min(MOST_UNREAD, limits.greetings)
        if not self._strange_ports and not self._strange_channels and len(self._guests) < few:
            return None  # nearly always: nobody is here who would have to be counted
        limit = min(most_descriptors() // 4, MOST_UNREAD_OF_ALL)
        if not is_strange(uid):
            if len(self._guests) < limit:
                return None
            return self._too_many(list(self._guests.values()), limit, "all callers")
        his = [guest for guest in self._guests.values() if guest.uid == uid]
        strange = [guest for guest in self._guests.values() if is_strange(guest.uid)]
        return (
            self._too_many(his, limits.greetings, f"uid {uid}")
            or self._too_many(strange, limit * 3 // 4, "callers of other users")
            or self.why_full(uid, limits)
        )

    def _too_many(self, guests: list[_Guest], limit: int, whose: str) -> str | None:
        if len(guests) < limit or (left := self._see_off(guests)) < limit:
            return None
        return f"{left} answers to {whose} have not been read yet, and the limit is {limit}"

    def _see_off(self, guests: Iterable[_Guest]) -> int:
        """Let those go that have read their answers; return how many stay."""
        return sum(not self._has_left(guest) for guest in guests)

    def why_full(self, uid: int | None, limits: Limits, more: int = 1) -> str | None:
        """Say why no further port or channel of this user fits in, or so many; None if one does."""
        lack = self._lack(uid, more, limits) if is_strange(uid) else None
        return None if lack is None else "{} {} descriptors, and {} is {}".format(*lack)

    def bring(self, served: Served, count: int, limits: Limits) -> Refusal | None:
        """Count the descriptors that a stranger's call has brought, or say why they are too many."""
        self._brought.pop(served, None)
        lack = self._lack(served.channel.peer.uid, count, limits)
        if lack is None:
            self._brought[served] = count
            return None
        who, has, whose, most = lack
        text = f"{who} {has + count} descriptors with the {count} of this call, and {whose} is {most}"
        return Refusal(Reason.BUSY, text, limit=most, value=has + count)

    def give_up_brought(self, served: Served, left: int = 0) -> None:
        """Count them out, but for some: they are closed, or the procedure's own affair; idempotent."""
        if left and served in self._brought:
            self._brought[served] = left
        else:
            self._brought.pop(served, None)

    def begin_passing(self, served: Served, count: int, limits: Limits) -> Refusal | None:
        """Count descriptors that are about to be sent to a stranger; waits, without the lock."""
        uid = served.channel.peer.uid
        return self.unread.begin(served, count, limits, lambda: self._lack(uid, count, limits) is None)

    def _lack(self, uid: int | None, more: int, limits: Limits) -> tuple[str, int, str, int] | None:
        """Say who has how many descriptors, and over which limit of whose so many more would be."""
        most = most_descriptors() * 3 // 4
        others = sum(list(self._brought.values())) + self.unread.held().total() + _janitor.held().total()
        others += len(self._leaving) + ASKED_ABOUT * sum(list(self._asked_about.values()))
        held = len(self._strange_ports) + 2 * len(self._strange_channels) + others
        if held + len(self._guests) + more > most:
            self.look_round()
            if (total := held + len(self._guests)) + more > most:
                return "callers of other users hold", total, "their limit together", most
        his_most = descriptors_of_a_user(limits)
        if held + more <= his_most:
            return None
        his = self._held()[uid]
        return (f"uid {uid} has", his, "a user's limit", his_most) if his + more > his_most else None

    def _held(self) -> Counter[int | None]:
        """How many descriptors each stranger has."""
        held = Counter(self._strange_ports.values())
        for served in list(self._strange_channels):
            held[served.channel.peer.uid] += 2
        for served, count in list(self._brought.items()):
            held[served.channel.peer.uid] += count
        for uid, count in list(self._asked_about.items()):
            held[uid] += ASKED_ABOUT * count
        held.update(list(self._leaving.values()))
        return held + self.unread.held() + _janitor.held()

    def usage(self) -> dict[int | None, Usage]:
        """
        What each stranger has of descriptors and of greetings.

        Those are knocks about which a rule is being asked, and answers that are not seen to be read.
        """
        unread, held = self.unread.usage(), self._held()
        greeted = Counter(guest.uid for guest in self._guests.values() if is_strange(guest.uid))
        greeted += self._asked_about
        return {
            uid: Usage(descriptors=held[uid], greetings=greeted[uid], unread=unread[uid])
            for uid in {*held, *greeted, *unread}
        }  # fmt: skip

    def begin_leaving(self, what: object, uid: int | None) -> None:
        """
        Count what a stranger was given, and nobody has any more, as his until it has been closed.

        That may take its time, and he asks for more meanwhile.  Without the lock, as ``end_leaving``.
        """
        if uid != NOBODY and is_strange(uid):
            self._leaving[what] = uid

    def end_leaving(self, what: object) -> None:
        """Count it out; idempotent."""
        self._leaving.pop(what, None)

    def begin_asking(self, uid: int | None) -> None:
        """Count in a knock about which a rule is asked."""
        if is_strange(uid):
            self._asked_about[uid] += 1

    def end_asking(self, uid: int | None) -> None:
        """Count it out."""
        self._asked_about[uid] -= 1
        self._asked_about += Counter()  # drops those of whom there are none, or were never any

    # -- ports and channels ----------------------------------------------------------------

    def add_port(self, port: socket.socket, uid: int | None) -> None:
        """Count a connection in."""
        if is_strange(uid):
            self._strange_ports[port] = uid

    def add_channel(self, served: Served) -> None:
        """Count a channel in."""
        if is_strange(served.channel.peer.uid):
            self._strange_channels.add(served)

    def forget_port(self, port: socket.socket) -> int | None:
        """Count a connection out; return the stranger whose it was, None of one of our own; idempotent."""
        return self._strange_ports.pop(port, None)

    def forget_channel(self, served: Served) -> None:
        """
        Count a channel out, and let the guest go that has it; idempotent, from any thread.

        A fresh one goes when he is looked at: the thread that closes his channel would wait here for
        the keeper, who is opening the next, mostly.
        """
        self._strange_channels.discard(served)
        guest = self._guests.get(served)
        if guest is None:
            return
        guest.over = True  # before the look: see ``look_round``
        if not guest.fresh:
            with self._keeper.lock:
                self._end_channel(served)

    def _end_channel(self, served: Served) -> None:
        """
        Having closed a channel, close k1, which a child of a dead client may hold for ever.

        But a stranger's unread answer is in flight as long as anybody holds it.
        """
        guest = self._guests.get(served)
        if guest is not None and is_strange(guest.uid):
            self._hear_hangup(guest)
        elif guest is not None:
            self._dismiss(guest)

    # -- answers ---------------------------------------------------------------------------

    def keep(self, visitor: Visitor, served: Served) -> None:
        """Keep a visitor's k1 until he has read the answer and closed the other end."""
        guest = _Guest(visitor.socket, visitor.credentials.uid, served)
        self._guests[served] = guest
        if is_strange(guest.uid):
            served.door.watch_caller(served)
            self._watch(guest)
            return
        if not self._fresh:
            self._keeper.after(_FIRST_LOOK, self.look_round)
        guest.fresh = True
        self._fresh.append(guest)

    def look_round(self) -> None:
        """Let those trusted guests go that have read their answers; watch the others from now on."""
        guests, self._fresh = self._fresh, []
        for guest in guests:
            guest.fresh = False  # from here on whoever closes the channel ends the visit as well
            if guest.over:
                self._dismiss(guest)
                continue
            guest.served.door.watch_caller(guest.served)
            if guest.socket.fileno() >= 0 and not self._has_left(guest):
                self._watch(guest)

    def _watch(self, guest: _Guest) -> None:
        guest.timer = self._keeper.after(GREETING_PATIENCE, lambda: self._end_visit(guest))
        with contextlib.suppress(OSError):  # no memory for it; there is the timer
            self._keeper.watch(guest.socket.fileno(), lambda: self._hear_hangup(guest))

    def _end_visit(self, guest: _Guest) -> None:
        """When time is over: let a guest go, unless he has not read his answer."""
        if self._has_left(guest):
            return
        guest.timer = self._keeper.after(GREETING_PATIENCE, lambda: self._end_visit(guest))
        door = guest.served.door
        self._keeper.say(
            logging.WARNING, "%s: uid %s has not read the answer to a knock for %g s", door.name, guest.uid,
            GREETING_PATIENCE, about=(door.name, "unread answer"), offender=guest.uid,
        )  # fmt: skip

    def _hear_hangup(self, guest: _Guest) -> None:
        """Let a guest go who seems to leave; look again, ever more rarely, if his answer stays unread."""
        if guest.socket.fileno() < 0 or self._has_left(guest):
            return
        if guest.timer is not None:
            guest.timer.cancel()
        self._keeper.unwatch(guest.socket.fileno())  # it would be reported for ever
        guest.timer = self._keeper.after(guest.delay, lambda: self._hear_hangup(guest))
        guest.delay = min(4 * guest.delay, GREETING_PATIENCE)

    def _has_left(self, guest: _Guest) -> bool:
        """Let a guest go if he has read the answer."""
        try:
            if _sockets.unsent(guest.socket):
                return False
        except OSError:  # the others are to be looked at all the same; and he is, again
            return False
        self._dismiss(guest)
        return True

    def _dismiss(self, guest: _Guest) -> None:
        if self._guests.pop(guest.served, None) is not None:
            if guest.timer is not None:
                guest.timer.cancel()
            self._keeper.unwatch(guest.socket.fileno())
            _opening.leave(guest.socket, guest.uid)

    def dismiss_all(self, door: Door) -> None:
        """Let the guests of a door go that is taken away."""
        for guest in [guest for guest in self._guests.values() if guest.served.door is door]:
            self._dismiss(guest)


_guests: Guests | None = None


def guests() -> Guests:
    """Return the guests of this process; for a holder of the keeper's lock."""
    global _guests
    if _guests is None or _guests.generation != _sockets.here():
        _guests = Guests(keeper())
    return _guests
