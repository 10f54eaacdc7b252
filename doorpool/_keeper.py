"""
The keeper: one thread a process that accepts, answers knocks, times out and closes.

It never runs anything of a user's and never waits on a peer, so a door opens at once
however busy the server's threads are.  (Without it a full pool closes the door for
everybody: opening took 2.95 s behind two procedures of 3 s.)  An opened channel leaves it
and joins the set of its pool; no call passes through here.

One lock guards everything that is watched, and is held while a callback runs.  Callbacks
are ours, short, and never block.  It is re-entrant, because a garbage collection inside
one may close a door that nobody holds any more.

A callback is a hint that its descriptor may be ready, not a promise:

 1. the kernel reports descriptor 7 to the keeper;
 2. before the keeper has the lock, another thread closes 7 and watches a new socket,
    which gets the number 7;
 3. the keeper runs the new socket's callback, for which nothing has come yet.

So each callback reads without waiting, and "nothing there" is an ordinary answer.

After a fork the child has no keeper thread: ``keeper()`` makes a new one.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from doorpool import _sockets

log = logging.getLogger("doorpool")

#: How long a listener or port is left alone when descriptors have run out, seconds.  Ready
#: but unreadable, it would otherwise be reported 500,000 times a second.
SHORTAGE_PAUSE = 0.1

Callback = Callable[[], None]


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
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.generation = _sockets.generation
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        _sockets.own_number(self._bell)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._callbacks: dict[int, Callback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: deque[Callback] = deque()
        self._thread = threading.Thread(target=self._run, name="doorpool-keeper", daemon=True)
        try:
            self._thread.start()
        except BaseException:  # no thread to be had: whoever needs a keeper tries again
            self._epoll.close()
            _sockets.close_number(self._bell)
            raise

    # -- for every thread ----------------------------------------------------------------

    def watch(self, descriptor: int, callback: Callback, events: int = select.EPOLLIN) -> None:
        """Call back in the keeper's thread whenever a descriptor may be readable."""
        with self.lock:
            self._callbacks[descriptor] = callback
            self._epoll.register(descriptor, events)

    def unwatch(self, descriptor: int) -> None:
        """Forget a descriptor, which must still be open; idempotent."""
        with self.lock:
            if self._callbacks.pop(descriptor, None) is not None:
                with contextlib.suppress(OSError):
                    self._epoll.unregister(descriptor)

    def pause(self, descriptor: int, seconds: float = SHORTAGE_PAUSE) -> None:
        """Leave a descriptor alone for a while: it is ready, and we are short of something."""
        with self.lock:
            callback = self._callbacks.get(descriptor)
            if callback is None:
                return
            # Out of the set, not an empty mask: that would go on reporting a hang-up.
            with contextlib.suppress(FileNotFoundError):  # paused already
                self._epoll.unregister(descriptor)
            self.after(seconds, lambda: self._resume(descriptor, callback))

    def _resume(self, descriptor: int, callback: Callback) -> None:
        if self._callbacks.get(descriptor) is callback:
            with contextlib.suppress(FileExistsError):
                self._epoll.register(descriptor, select.EPOLLIN)

    def after(self, seconds: float, callback: Callback) -> Timer:
        """Call back in the keeper's thread after some time, under the lock."""
        timer = Timer(time.monotonic() + seconds, callback)
        with self.lock:
            heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        self._ring()
        return timer

    def soon(self, callback: Callback) -> None:
        """
        Call back in the keeper's thread at once, under the lock.

        Takes no lock itself, so a finalizer may call it, wherever it runs.
        """
        self._soon.append(callback)
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a counter that is full has rung
            os.eventfd_write(self._bell, 1)

    def leave_to_parent(self) -> None:
        """Close, in a forked child, what is not closed yet; the set goes on in the parent."""
        self._epoll.close()

    # -- the thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while self.generation == _sockets.generation:
            for descriptor, _ in self._epoll.poll(self._until_next_timer()):
                with self.lock:
                    self._handle(descriptor)
            with self.lock:
                self._run_soon()
                self._run_timers()

    def _until_next_timer(self) -> float | None:
        with self.lock:
            while self._timers and self._timers[0][2].callback is None:
                heapq.heappop(self._timers)  # cancelled: not worth waking up for
            if not self._timers:
                return None
            return max(0.0, self._timers[0][0] - time.monotonic())

    def _handle(self, descriptor: int) -> None:
        if descriptor == self._bell:
            with contextlib.suppress(BlockingIOError):
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
        except Exception:
            log.exception("doorpool: an error in the keeper; please report it")


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
