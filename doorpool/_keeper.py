"""
The keeper: one thread a process that accepts, answers knocks, times out and closes.

It never runs anything of a user's and never waits on a peer, so a door opens at once
however busy the server's threads are.  (Without it a full pool closes the door for
everybody: opening took 2.95 s behind two procedures of 3 s.)  An opened channel leaves it
and joins the set of its pool; no call passes through here.

One lock guards everything that is watched, and is held while a callback runs.  Callbacks
are ours, short, and never block.  It is re-entrant, because a garbage collection inside
one may close a door that nobody holds any more.  One in any other thread may do so too, so
nobody who has this lock waits for another thread: neither for a lock under which anything is
done in Python, nor for a new thread to begin.  That comes *afterwards*, when it has been let go.

A callback is a hint that its descriptor may be ready, not a promise:

 1. the kernel reports descriptor 7 to the keeper;
 2. before the keeper has the lock, another thread closes 7 and watches a new socket,
    which gets the number 7;
 3. the keeper runs the new socket's callback, for which nothing has come yet.

So each callback reads without waiting, and "nothing there" is an ordinary answer.

What strangers write to is in a set of its own, which is watched as one thing, and of which a few are
looked at in a turn: one uid that held 7,338 connections, and wrote a byte to each in turn, had an opening
by root wait for all of them, 175 ms in place of 1.3.

What is to be logged is written by a thread that comes when there is something, for handlers are
the user's: one may wait for a door of this very process, or for a disk.

When descriptors have run out, whatever needs some is left alone for ``SHORTAGE_PAUSE`` (ready but
unreadable, it would be reported 500,000 times a second), and for as long again after each try.

After a fork the child has no keeper thread: ``keeper()`` makes a new one.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import os
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable

from doorpool import _sockets
from doorpool._credentials import Credentials, is_strange
from doorpool._descriptor import NOBODY
from doorpool._log import log

SHORTAGE_PAUSE = 0.1  #: Seconds until what found no descriptor is tried again.

LOG_INTERVAL = 5.0  #: Seconds for which one line about the same thing is enough.
_MOST_TOPICS = 1_000  # of which the last line is remembered, so that it is not said again
_MOST_OF_ONE = 8  # of them that are one stranger's doing; what else he does is one topic more
_MOST_LINES = 1_000  # that wait to be written

_MOST_STRANGE = 16  # ports of strangers that are looked at in a turn; each takes some 30 µs

Callback = Callable[[], None]

Line = tuple[int, str, tuple[object, ...], BaseException | None]


class Timer:
    """Something to be done later, unless it is cancelled before."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Forget it; idempotent, from any thread."""
        self.callback = None


class Keeper:
    """
    The thread and its set.

    Attributes:
        lock: guards what is watched, and the doors' own tables of it.
        turn: how often the thread has gone round to all that was ready.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.generation = _sockets.generation
        self.turn = 0
        self._epoll = select.epoll()
        self._strange = select.epoll()  # a set in the set: see above
        self._epoll.register(self._strange)
        self._sets: dict[int, select.epoll] = {}  # where a descriptor is, if in that
        self._bell = _sockets.bell_in(self._epoll)
        self._callbacks: dict[int, Callback] = {}
        self._first: set[int] = set()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: deque[Callback] = deque()
        self._afterwards: deque[Callback] = deque()
        self._short_since = self._short_at = -math.inf
        self._topics: dict[tuple[int | None, Hashable], int] = {}
        self._offences: Counter[int | None] = Counter()  # topics of strangers, by uid
        self._lines: deque[Line] = deque()
        self._scribe = threading.Lock()  # guards the next
        self._writing = False
        self._thread = threading.Thread(target=self._run, name="doorpool-keeper", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # no thread to be had: whoever needs a keeper tries again
            self.leave_to_parent()
            _sockets.close_number(self._bell)
            raise

    # -- for every thread ----------------------------------------------------------------

    def watch(
        self, descriptor: int, callback: Callback, events: int = select.EPOLLIN, *, strange: bool = False
    ) -> None:  # fmt: skip
        """
        Call back in the keeper's thread whenever a descriptor may be readable.

        Args:
            strange: a stranger can make it so, and others come before.
        """
        with self.lock:
            (self._strange if strange else self._epoll).register(descriptor, events)
            self._callbacks[descriptor] = callback
            if strange:
                self._sets[descriptor] = self._strange

    def prefer(self, descriptor: int) -> None:
        """Let a watched descriptor, for which somebody waits, come first of those ready at one time."""
        with self.lock:
            self._first.add(descriptor)

    def unwatch(self, descriptor: int) -> None:
        """Forget a descriptor, which must still be open; idempotent."""
        with self.lock:
            self._first.discard(descriptor)
            if self._callbacks.pop(descriptor, None) is not None:
                with contextlib.suppress(OSError):
                    self._sets.pop(descriptor, self._epoll).unregister(descriptor)

    def pause(self, descriptor: int, seconds: float = SHORTAGE_PAUSE) -> None:
        """Leave a descriptor alone for a while: it is ready, and we are short of something."""
        with self.lock:
            callback = self._callbacks.get(descriptor)
            if callback is None:
                return
            # Out of the set, not an empty mask: that would go on reporting a hang-up.
            with contextlib.suppress(FileNotFoundError):  # paused already
                self._sets.get(descriptor, self._epoll).unregister(descriptor)
            self.after(seconds, lambda: self._resume(descriptor, callback))

    def _resume(self, descriptor: int, callback: Callback) -> None:
        if self._callbacks.get(descriptor) is callback:
            try:
                self._sets.get(descriptor, self._epoll).register(descriptor, select.EPOLLIN)
            except FileExistsError:
                return
            except OSError:  # no memory, no watch to be had (ENOSPC)
                self.after(SHORTAGE_PAUSE, lambda: self._resume(descriptor, callback))

    @property
    def short(self) -> bool:
        """Whether something has run out so lately that a try would be in vain."""
        return time.monotonic() - self._short_at < SHORTAGE_PAUSE / 2

    def starve(self, descriptor: int) -> bool:
        """
        Leave a descriptor alone because something has run out.

        Returns:
            True if that has been so since an earlier try, and is more than a moment's.
        """
        now = time.monotonic()
        with self.lock:
            if now - self._short_at > 3 * SHORTAGE_PAUSE:
                self._short_since = now
            self._short_at = now
            self.pause(descriptor)
            return now - self._short_since > SHORTAGE_PAUSE / 2

    def say(
        self, level: int, text: str, *args: object, about: Hashable = None, offender: int | None = NOBODY,
        error: BaseException | None = None,
    ) -> None:  # fmt: skip
        """
        Have a line logged, soon, by a thread that holds no lock of ours.

        Args:
            level, text, args: as for ``Logger.log``.
            about: of lines about the same thing one is written, and later how many there were.
            offender: the uid whose doing it is, if it is somebody's.  A stranger may do as many things as he
                likes, so few of them are told apart.
            error: whose traceback to show.
        """
        if about is not None and not self._is_news((offender, about), (level, text, args)):
            return
        if len(self._lines) < _MOST_LINES:
            self._lines.append((level, text, args, error))
            self._ring()

    def _is_news(
        self, topic: tuple[int | None, Hashable], line: tuple[int, str, tuple[object, ...]]
    ) -> bool:  # fmt: skip
        offender = topic[0]
        is_his = offender != NOBODY and is_strange(offender)
        with self.lock:
            if topic not in self._topics and is_his and self._offences[offender] >= _MOST_OF_ONE:
                topic = offender, None
            if topic not in self._topics and len(self._topics) >= _MOST_TOPICS:
                topic, is_his = (NOBODY, None), False
            count = self._topics.get(topic)
            self._topics[topic] = 0 if count is None else count + 1
            if count is None:
                self._offences[offender] += is_his
                self.after(LOG_INTERVAL, lambda: self._say_how_many(topic, line))
            return count is None

    def _say_how_many(
        self, topic: tuple[int | None, Hashable], line: tuple[int, str, tuple[object, ...]]
    ) -> None:  # fmt: skip
        """Say how many lines were not written, and go on being silent; or forget about it."""
        count = self._topics.pop(topic)
        if not count:
            self._offences[topic[0]] -= 1
            self._offences += Counter()  # drops those of whom there are none
            return
        level, text, args = line
        self.say(level, f"{text} (and %d more such in %g s)", *args, count, LOG_INTERVAL)
        self._topics[topic] = 0
        self.after(LOG_INTERVAL, lambda: self._say_how_many(topic, line))

    def after(self, seconds: float, callback: Callback) -> Timer:
        """Call back in the keeper's thread after some time, under the lock."""
        timer = Timer(time.monotonic() + seconds, callback)
        with self.lock:
            heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        if threading.get_ident() != self._thread.ident:  # itself it looks before it waits
            self._ring()
        return timer

    def soon(self, callback: Callback) -> None:
        """
        Call back in the keeper's thread at once, under the lock.

        Takes no lock itself, so a finalizer may call it, wherever it runs.
        """
        self._soon.append(callback)
        self._ring()

    def afterwards(self, callback: Callback) -> None:
        """Call back in the keeper's thread without the lock; takes none."""
        self._afterwards.append(callback)
        if threading.get_ident() != self._thread.ident:  # itself it comes to that before it waits
            self._ring()

    def _ring(self) -> None:
        _sockets.ring(self._bell)

    def leave_to_parent(self) -> None:
        """Close, in a forked child, what is not closed yet; the set goes on in the parent."""
        self._epoll.close()
        self._strange.close()

    # -- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while self.generation == _sockets.generation:
            try:
                self._go_round()
            except Exception as error:  # whatever the kernel says, all doors depend on this thread
                self._complain(error)
                time.sleep(SHORTAGE_PAUSE)  # what has failed is what there would be to wait with

    def _go_round(self) -> None:
        events = self._epoll.poll(self._until_next_timer())
        self.turn += 1
        if len(events) > 1:
            events.sort(key=lambda event: event[0] not in self._first)
        strange = self._strange.fileno()
        if any(descriptor == strange for descriptor, _ in events):
            events = [event for event in events if event[0] != strange]
            events += self._strange.poll(0, _MOST_STRANGE)
        for descriptor, _ in events:
            with self.lock:
                self._handle(descriptor)
        with self.lock:
            self._run_soon()
            self._run_timers()
        while self._afterwards:
            self._call(self._afterwards.popleft())
        if self._lines:
            self._have_written()

    def _until_next_timer(self) -> float | None:
        with self.lock:
            while self._timers and self._timers[0][2].callback is None:
                heapq.heappop(self._timers)  # cancelled: not worth waking up for
            if not self._timers:
                return None
            return max(0.0, self._timers[0][0] - time.monotonic())

    def _handle(self, descriptor: int) -> None:
        if descriptor == self._bell:
            with contextlib.suppress(OSError):  # unread, it is reported again
                os.eventfd_read(self._bell)
            return
        callback = self._callbacks.get(descriptor)
        if callback is not None:
            self._call(callback)

    def _run_soon(self) -> None:
        for _ in range(len(self._soon)):
            self._call(self._soon.popleft())

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                self._call(timer.callback)

    def _call(self, callback: Callback) -> None:
        """Run a callback; whatever it raises, all other doors of the process go on."""
        try:
            callback()
        except Exception as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        text = "doorpool: an error in the keeper; please report it"
        self.say(logging.ERROR, text, about=("error", type(error)), error=error)

    def _have_written(self) -> None:
        """Start a thread that writes what is to be logged, unless there is one."""
        with self._scribe:
            if self._writing:
                return
            self._writing = True
        try:
            threading.Thread(target=self._write, name="doorpool-keeper-log", daemon=True).start()
        except (RuntimeError, MemoryError):  # no thread to be had: at the next occasion
            self._writing = False

    def _write(self) -> None:
        while True:
            with self._scribe:
                if not self._lines:
                    self._writing = False
                    return
            level, text, args, error = self._lines[0]
            log(level, text, *args, error=error)
            self._lines.popleft()


_keeper: Keeper | None = None
_making = threading.Lock()


def keeper() -> Keeper:
    """Return the keeper of this process, starting it the first time and after a fork."""
    global _keeper
    if _keeper is None or _keeper.generation != _sockets.here():
        with _making:
            if _keeper is None or _keeper.generation != _sockets.generation:
                _keeper = Keeper()
    return _keeper


def _forget_parent() -> None:
    global _keeper, _making
    if _keeper is not None:
        _keeper.leave_to_parent()
    _keeper = None
    _making = threading.Lock()


_sockets.on_fork(_forget_parent)


def report(
    peer: Credentials, about: Hashable, level: int, text: str, *args: object,
    error: BaseException | None = None,
) -> None:  # fmt: skip
    """
    Log what a caller has brought about; of a stranger, who may do so without end, not each time.

    Args:
        about, level, text, args, error: as of ``Keeper.say``.
    """
    if is_strange(peer.uid):
        keeper().say(level, text, *args, about=about, offender=peer.uid, error=error)
    else:
        log(level, text, *args, error=error, stacklevel=2)
