"""
What strangers have not read yet of the descriptors in their results.

Until it is read a descriptor is *in flight*, and the kernel counts it against the server's user, whom it lets
have no more than ``RLIMIT_NOFILE`` of them (see ``doorpool._guests``): a stranger who asked for files on nine
channels, and read nothing, had 1,086 in flight, and every process of that user got ``ETOOMANYREFS``.  So
strangers may leave few unread, each uid and all of them together.

What is unread
    All descriptors that were sent on a channel since the kernel last said that nothing there is unread
    (``SIOCOUTQ``).  An honest caller has read one result before he asks for the next, so of his there are
    those of one result a channel.  Nobody tells us when he reads: what is counted may have been read since,
    and is looked at when there seems to be no room.

Channels that are closed
    What lies in a caller's queue stays in flight as long as anybody holds his end, whatever becomes of ours.
    With ours closed nobody could see that, so its socket, shut down, is kept until all is read.

Waiting
    Many results may be on their way to somebody who reads them all, and has not come to it.  So who finds no
    room waits, as long as there would be some if what is *fresh* were read: sent within ``PATIENCE``.  Who
    hoards has nothing fresh, and is refused at once: he holds up no thread.  What waits is in this process's
    table of descriptors, and counts there as the receiver's; if it is too much for that, nobody waits.

A count precedes its sending, or two who send at one time would both find room; and what is being sent counts
as unread, whatever the kernel says:

 1. thread A finds room for the 200 of a result;
 2. thread B, for another, looks round: nothing on A's channel is unread, for nothing has been sent;
 3. both send.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs

from doorpool import _sockets
from doorpool._janitor import close_socket
from doorpool._keeper import Keeper
from doorpool._shares import Limits, most_descriptors
from doorpool._wire import Reason, Refusal

if TYPE_CHECKING:
    from doorpool._gate import Served

#: Of all strangers together, where half of ``RLIMIT_NOFILE`` is not less; a uid has half of that.  However
#: many files this process may have, others of its user may mostly have 1,024, and the kernel judges by that.
MOST_OF_ALL = 512

#: Seconds that an honest caller may take to read a result that has come.
PATIENCE = 1.0

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.05

#: Seconds until the socket of a closed channel is looked at again, the first time and at last.
_SECOND_LOOK, _LAST_LOOK = 0.05, 30.0


def most_unread(limits: Limits) -> tuple[int, int]:
    """Return how many a strange uid may leave unread, and all together, by what ``RLIMIT_NOFILE`` is now."""
    most = max(2, min(MOST_OF_ALL, most_descriptors() // 2))
    return min(limits.unread or most // 2, most), most


@attrs.define(eq=False)
class Parcels:
    """
    The descriptors that were sent on a stranger's channel and, so far as we know, not read.

    Attributes:
        count: how many.
        since: when the first of them were sent.
        sending: some are being sent.
        left: their channel is closed, and this is its socket's only owner.
    """

    socket: socket.socket
    uid: int | None
    count: int
    since: float
    sending: bool = True
    left: bool = False
    delay: float = _SECOND_LOOK

    @property
    def are_read(self) -> bool:
        """Whether the kernel says so."""
        if self.sending:
            return False
        try:
            return not _sockets.unsent(self.socket)
        except (OSError, ValueError):  # the channel is being closed this very moment
            return False


class Unread:
    """What strangers have not read of what this process has sent."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._parcels: set[Parcels] = set()
        self._waiting: dict[Served, int] = {}

    def begin(
        self, served: Served, count: int, limits: Limits, may_wait: Callable[[], bool]
    ) -> Refusal | None:  # fmt: skip
        """
        Count in what is about to be sent to a stranger, as soon as there is room; else say why there is none.

        Waits without the lock.  What has begun is to be ended.

        Args:
            may_wait: tells, under the lock, whether so many may stay in our table meanwhile.
        """
        until, pause = time.monotonic() + PATIENCE, _FIRST_PAUSE
        try:
            while True:
                with self._keeper.lock:
                    refusal, in_vain = self._find_room(served.channel.peer.uid, count, limits)
                    if refusal is None:
                        self._add(served, count)
                        return None
                    if in_vain or time.monotonic() >= until or not (served in self._waiting or may_wait()):
                        return refusal
                    self._waiting[served] = count
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._waiting.pop(served, None)

    @staticmethod
    def end(served: Served) -> None:
        """Say that it has been sent, or will not be; takes no lock."""
        if served.unread is not None:
            served.unread.sending = False

    def settle(self, served: Served) -> None:
        """
        Forget what has been read on a channel; takes no lock.

        It is asked before anything else is sent, which would be unread, too.
        """
        parcels = served.unread
        if parcels is not None and parcels.are_read:
            served.unread = None
            self._parcels.discard(parcels)

    def leave(self, served: Served) -> None:
        """Take over the socket of a channel that is to be closed, if something is unread; takes no lock."""
        self.end(served)
        self.settle(served)
        parcels, served.unread = served.unread, None
        if parcels is None or parcels not in self._parcels:
            return
        number = served.channel.socket.detach()
        parcels.socket = _sockets.own(_sockets.adopt(number, socket.SOCK_SEQPACKET))
        parcels.left = True  # who has looked just before leaves it to the next to close it
        self._keeper.soon(lambda: self._look_again(parcels))

    def usage(self) -> Counter[int | None]:
        """How many each stranger leaves unread; for holders of the keeper's lock."""
        self._look()
        counts: Counter[int | None] = Counter()
        for parcels in list(self._parcels):
            counts[parcels.uid] += parcels.count
        return counts

    def held(self) -> Counter[int | None]:
        """How many descriptors of ours there are because of each: sockets that are kept, and what waits."""
        counts = Counter(it.uid for it in list(self._parcels) if it.left)
        for served, count in list(self._waiting.items()):
            counts[served.channel.peer.uid] += count
        return counts

    def _find_room(self, uid: int | None, count: int, limits: Limits) -> tuple[Refusal | None, bool]:
        """Say why so many find no room, and whether it is in vain to wait for some."""
        his_most, most = most_unread(limits)
        if sum(it.count for it in list(self._parcels)) + count <= his_most:
            return None, False  # nearly always
        self._look()
        others = list(self._parcels)
        if not others:
            return None, False  # a result alone is let pass
        his = [it for it in others if it.uid == uid]
        whose = "callers of unknown uid" if uid is None else f"uid {uid}"
        if his:  # one alone is bound by the limit of all
            refusal, in_vain = _compare(his, count, his_most, f"{whose} would leave", "a user's limit")
            if refusal is not None:
                return refusal, in_vain
        return _compare(others, count, most, "callers of other users would leave", "their limit together")

    def _add(self, served: Served, count: int) -> None:
        self.settle(served)
        parcels = served.unread
        if parcels is None or parcels not in self._parcels:
            channel = served.channel
            parcels = served.unread = Parcels(channel.socket, channel.peer.uid, 0, time.monotonic())
            self._parcels.add(parcels)
        parcels.sending = True
        parcels.count += count

    def _look(self) -> None:
        """Forget what has been read."""
        for parcels in list(self._parcels):
            if parcels.are_read:
                self._forget(parcels)

    def _look_again(self, parcels: Parcels) -> None:
        """Let the socket of a closed channel go if all was read; else look again, ever more rarely."""
        if parcels not in self._parcels or parcels.are_read:
            self._forget(parcels)
            return
        self._keeper.after(parcels.delay, lambda: self._look_again(parcels))
        parcels.delay = min(4 * parcels.delay, _LAST_LOOK)

    def _forget(self, parcels: Parcels) -> None:
        """Count them no more, and let go of their socket; idempotent."""
        self._parcels.discard(parcels)
        if parcels.left:
            close_socket(parcels.socket, parcels.uid)


def _compare(
    parcels: list[Parcels], count: int, most: int, who: str, whose: str
) -> tuple[Refusal | None, bool]:  # fmt: skip
    """Say that so many more are too many, and whether they are even when all that is fresh has been read."""
    value = sum(it.count for it in parcels) + count
    if value <= most:
        return None, False
    fresh = time.monotonic() - PATIENCE
    old = sum(it.count for it in parcels if it.since < fresh)
    text = f"{who} {value} descriptors unread with the {count} of this result, and {whose} is {most}"
    return Refusal(Reason.BUSY, text, True, most, value), old + count > most
