"""
Server threads: how many there are, and when they come and go.

The rule, from doors: before a thread runs a procedure it sees to it that another one is
waiting, and starts one if none is and the limit allows.  So there is always somebody to
take the next call, until the limit is reached; then callers wait in the kernel.  Threads
that have waited ``idle_timeout`` in vain retire, down to two: one that answers, and one
that waits meanwhile.

    started --> waiting <--> running --> (waiting)
                   |
                   +--> retired, or sent away when the pool closes

Calls that wait for themselves
    A procedure may call the door that it serves, or one of another pool of its process
    that calls back.  When every thread of a full pool waits for such a call, no thread is
    left that could answer any of them, and all would wait for ever.  So each thread that
    calls a door of this process says which pool it waits for (``waiting_for``), and the
    one whose call would close the ring is refused.  A pool is *stuck* if each of its
    threads waits for a stuck pool:

        one thread     a ----> b, served by the same pool            stuck: {pool}
        two pools      P: a ----> Q: b ----> P                       stuck: {P, Q}
        two threads    a ----> b, and the other thread is free       nobody is stuck

    A thread whose answer is there, and which has not come to see it yet, seems to wait
    still; so somebody who finds himself stuck looks for a while before he believes it.
    Rings through other processes are not seen: there a timeout helps.

This module knows neither sockets nor objects: it waits at a gate, and hands each
invocation to ``serve``.

Modelled on: door_server_create(3C)
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import attrs

from doorpool import _sockets
from doorpool._credentials import is_strange
from doorpool._descriptor import NOBODY
from doorpool._errors import BusyError, ClosedError
from doorpool._keeper import keeper, report
from doorpool._log import log
from doorpool._shares import Crowd, Limits, Usage, sum_up
from doorpool.door import Gate, Invocation

#: What a pool keeps: one to answer, one to wait.
KEPT = 2

_LONGEST = 2e6  # seconds; epoll counts milliseconds in an int

#: How long a pool must look stuck before a call is refused for it, seconds.
STUCK = 0.25


@attrs.frozen
class Load:
    """What a pool does now, and has done: as of ``Statistics``."""

    threads: int = 0
    waiting: int = 0
    running: int = 0
    served: int = 0
    errors: int = 0
    channels: int = 0
    waited: float = 0.0
    segments: int = 0
    segment_bytes: int = 0
    segments_retained: int = 0
    segments_lent: int = 0
    segments_reused: int = 0
    segments_received: int = 0
    segment_bytes_received: int = 0
    segment_bytes_mapped: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(*map(operator.add, attrs.astuple(self), attrs.astuple(other)))


#: What is to be done between two calls, and whose doing that is.
_Job = tuple[int | None, Callable[[], None]]

_numbers = itertools.count(1)
_local = threading.local()  # .pool: the pool that the thread serves


class Interrupt(BaseException):
    """
    What a signal handler raised in a procedure that a lent thread ran, on its way out of ``lend``.

    Attributes:
        error: that.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


class Pool:
    """
    Server threads that wait at one gate.

    Args:
        name: begins the names of its threads.
        serve: answers an invocation; raises nothing but ``Interrupt``, in the main thread.
        max_threads: how many threads at most, lent ones included.
        idle_timeout: seconds after which a thread that nobody needs retires; None: never.
        thread_setup: runs first in each thread, lent ones included; one in which it fails serves nobody.
        spin: of its gate.
        crowd: likewise.
    """

    def __init__(
        self, name: str, serve: Callable[[Invocation], bool], *, max_threads: int = 64,
        idle_timeout: float | None = 10.0, thread_setup: Callable[[], object] | None = None,
        spin: int = -1, crowd: Crowd | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.gate = Gate(lingers=True, spin=spin, crowd=crowd, threads=max_threads)
        self.max_threads = max_threads
        self.served = 0
        self.errors = 0
        self._serve = serve
        self._idle_timeout = None if idle_timeout is None else min(idle_timeout, _LONGEST)
        self._thread_setup = thread_setup
        self._generation = _sockets.generation
        self._lock = threading.RLock()  # a signal handler may close the pool that its thread serves
        self._changed = threading.Condition(self._lock)
        self._threads: set[threading.Thread] = set()
        self._running: dict[threading.Thread, Invocation] = {}
        self._jobs: deque[_Job] = deque()
        self._aside: dict[int | None, deque[_Job]] = {}  # those of strangers that wait for others of theirs
        self._awaited: dict[threading.Thread, Pool] = {}  # guarded by ``_waits``
        self._set_up = 0  # threads whose setup is over, one way or the other
        self._setup_error: BaseException | None = None
        self._visit = threading.local()  # .set_up: in a lent thread that has run the setup
        self._closed = False
        self._disposable = False  # the last thread to leave gives the gate's descriptors back
        self._begun = False  # there were threads, or are
        self._end: Callable[[], None] | None = None  # for the last thread to leave, if nobody has done it
        self._short = False
        self._lent: set[threading.Thread] = set()
        self._roused: set[threading.Thread] = set()  # lent ones that shall come back from the kernel
        self._at_jobs: dict[threading.Thread, int | None] = {}
        self._unwanted = 0  # threads that shall make room for a lent one

    @property
    def threads(self) -> int:
        """How many threads there are now, lent ones included."""
        return len(self._threads)

    @property
    def load(self) -> Load:
        """What it does now, and has done."""
        gate, segments = self.gate, self.gate.segments
        return Load(
            threads=self.threads,
            waiting=gate.waiting,
            running=len(self._running),
            served=self.served,
            errors=self.errors,
            channels=gate.channels,
            waited=gate.waited,
            segments=segments.held,
            segment_bytes=segments.held_bytes,
            segments_retained=segments.retained,
            segments_lent=segments.loaned,
            segments_reused=segments.reused,
            segments_received=segments.received,
            segment_bytes_received=segments.received_bytes,
            segment_bytes_mapped=segments.mapped_bytes,
        )

    # -- starting ----------------------------------------------------------------------------

    def start(self) -> None:
        """
        Start the first threads, or none.

        Raises:
            RuntimeError: no thread can be had.
        """
        try:
            self._begun = True
            for _ in range(min(KEPT, self.max_threads)):
                self._start_one()
        except BaseException:
            self.send_away()
            raise

    def send_away(self) -> None:
        """Have all threads leave that there are; the pool can be started again."""
        with self._lock:
            self._begun = False
            self._unwanted = len(self._threads)
        self.gate.wake(self._unwanted)

    @property
    def is_set_up(self) -> bool:
        """Whether the setup of the first threads has gone well, if there is any."""
        if self._thread_setup is None:
            return True
        return self._setup_error is None and self._set_up >= min(KEPT, self.max_threads)

    def wait_set_up(self) -> None:
        """
        Wait until the first threads have run their setup; in one of them, which may be at it, return at once.

        Raises:
            RuntimeError: it failed; what left it is the cause.
        """
        if self._thread_setup is None or self.is_ours():
            return
        with self._lock:
            self._changed.wait_for(lambda: self._setup_error is not None or self.is_set_up or self._closed)
        if self._setup_error is not None:
            raise RuntimeError(f"{self.name}: thread_setup failed") from self._setup_error

    def _start_one(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self.name}-{next(_numbers)}", daemon=True)
        if not self._join_in(thread):
            return
        try:
            thread.start()
        except BaseException:
            self._leave(thread)
            raise

    def _join_in(self, thread: threading.Thread, *, lent: bool = False) -> bool:
        """Count a thread in, unless the pool is full or closed."""
        with self._lock:
            if self._closed or len(self._threads) >= self.max_threads:
                return False
            self._threads.add(thread)
            if lent:
                self._lent.add(thread)
            return True

    def _leave(self, thread: threading.Thread) -> None:
        if self._generation != _sockets.here():
            return  # in a child whose parent's thread this was, and which may have lost the lock's holder
        with self._lock:
            self._threads.discard(thread)
            self._lent.discard(thread)
            self._changed.notify_all()
            done = self._disposable and not self._threads
            end = None if self._closed or self._threads else self._end
        if done:
            self.gate.dispose()
        if end is not None:
            end()

    def _go(self, thread: threading.Thread) -> None:
        """Leave for good, as that thread, whatever has ended its serving."""
        try:
            if self._generation == _sockets.here():  # a child has none of its parent's channels
                # It may keep the channel that it answered last, and would not come back for its next call.
                self.gate.part()
        finally:
            self._leave(thread)

    def see_to_a_waiter(self) -> None:
        """Have somebody wait for the next call while this thread is busy, if that is possible."""
        if self.gate.waiting or len(self._threads) >= self.max_threads:
            return
        try:
            self._start_one()
            self._short = False
        except RuntimeError as error:
            # Callers wait until a thread is free; nobody is lost.  Said once per shortage, in one
            # step, and quietly when the interpreter ends, which starts no threads any more.
            known, self._short = self._short, True
            if not known:
                level = logging.INFO if "interpreter shutdown" in str(error) else logging.WARNING
                log(level, "%s: no further thread: %s", self.name, error)

    # -- the threads -------------------------------------------------------------------------

    def _work(self) -> None:
        thread = threading.current_thread()
        _local.pool = self
        try:
            if self._thread_setup is None or self._run_setup(self._thread_setup):
                self._serve_calls(thread, self._idle_timeout)
        except Exception as error:
            log(logging.ERROR, "%s: a server thread failed", self.name, error=error)
        finally:
            self._go(thread)

    def _run_setup(self, setup: Callable[[], object]) -> bool:
        failed: BaseException | None = None
        try:
            setup()
        except BaseException as error:
            failed = error
            log(logging.ERROR, "%s: thread_setup failed", self.name, error=error)
        with self._lock:
            self._set_up += 1
            if self._set_up <= min(KEPT, self.max_threads):  # a later one serves nobody, no more
                self._setup_error = failed or self._setup_error
            self._changed.notify_all()
        return failed is None

    def _serve_calls(self, thread: threading.Thread, idle_timeout: float | None) -> None:
        with suppress(ClosedError):
            while True:
                # Those that stay wait without a clock: an idle server does nothing at all.
                stays = thread in self._lent or len(self._threads) <= KEPT
                invocation = self.gate.wait(None if stays else idle_timeout)
                if self._roused:
                    self._roused.discard(thread)
                if invocation is not None:
                    self._run(thread, invocation)
                    # Its door, and what that leads to, may be gone long before the next one comes.
                    invocation = None
                elif self._jobs:
                    self._run_job()
                elif self._retire(thread, idle_timeout):
                    return

    def _run(self, thread: threading.Thread, invocation: Invocation) -> None:
        self._running[thread] = invocation
        try:
            if not self.gate.waiting:
                self.see_to_a_waiter()
            if not self._serve(invocation):
                self.errors += 1
            self.served += 1
        except Exception as error:
            self.errors += 1
            self.served += 1
            door, peer = invocation.door, invocation.credentials
            text = "%s: a call of %s by %s could not be answered"
            invocation.fail(text="the server failed to answer", may_have_run=True)
            report(peer, (door.name, "answer"), logging.ERROR, text, self.name, door.name, peer, error=error)
        finally:
            del self._running[thread]
            if self._closed:
                with self._lock:
                    self._changed.notify_all()

    def run_soon(self, job: Callable[[], None], uid: int | None = NOBODY) -> None:
        """
        Have a thread of the pool do something between two calls.

        It must be short, or call ``see_to_a_waiter`` first.  Takes no lock, so it may be
        called wherever one is held; what a closed pool had not come to is not done.

        Args:
            uid: who has caused it; of a stranger's one is done at a time, and of all strangers' as many as
                a quarter of the threads can do.
        """
        self._jobs.append((uid, job))
        self.gate.wake()

    def end_soon(self, end: Callable[[], None]) -> None:
        """
        Have something done that closes the pool, as by ``run_soon``, also if no thread is left.

        Takes no lock either.  It may be done more than once.
        """
        self._end = end  # first: a thread that leaves from now on sees to it
        self.run_soon(end)
        if self._begun and not self._threads:  # their setup has failed
            keeper().afterwards(end)

    def rouse(self, thread: threading.Thread, *, again: bool = False) -> bool:
        """
        Have a lent thread that waits for a call come back from the kernel once.

        Args:
            again: only if it has not come since it was last to be roused.

        Returns:
            Whether it still has to come: others may have been woken in its place.
        """
        if again and thread not in self._roused:
            return False
        if thread not in self._lent or thread in self._running:
            self._roused.discard(thread)
            return False
        self._roused.add(thread)
        self.gate.wake(max(1, self.gate.waiting))
        return True

    def _run_job(self) -> None:
        thread = threading.current_thread()
        with self._lock:
            if not self._jobs:  # another thread was quicker
                return
            uid, job = self._jobs.popleft()
            if not self._may_begin(uid):
                self._aside.setdefault(uid, deque()).append((uid, job))
                return
            self._at_jobs[thread] = uid
        try:
            job()
        except Exception as error:
            text = "%s: a server thread failed at something between calls"
            log(logging.ERROR, text, self.name, error=error)
        finally:
            with self._lock:
                del self._at_jobs[thread]
                self._take_up_again()

    def _may_begin(self, uid: int | None) -> bool:
        """Tell whether a job may be begun, of which so many are done already because of strangers."""
        if uid == NOBODY or not is_strange(uid):
            return True
        theirs = [it for it in self._at_jobs.values() if it != NOBODY and is_strange(it)]
        return uid not in theirs and len(theirs) < max(1, self.max_threads // 4)

    def _take_up_again(self) -> None:
        """Have the first job be done that has waited for one that is over."""
        for uid, waiting in self._aside.items():
            if self._may_begin(uid):
                self._jobs.append(waiting.popleft())
                del self._aside[uid]
                if waiting:
                    self._aside[uid] = waiting  # behind the others
                self.gate.wake()
                return

    def holds(self, thread: threading.Thread) -> bool:
        """Tell whether a thread, another than this one, does something between two calls."""
        return thread in self._at_jobs and thread is not threading.current_thread()

    def _retire(self, thread: threading.Thread, idle_timeout: float | None) -> bool:
        """Count a thread that nobody needs out; the last two stay, and so does a lent one."""
        with self._lock:
            if thread in self._lent:
                return False
            if self._unwanted:
                self._unwanted -= 1
            elif idle_timeout is None or len(self._threads) <= KEPT or not self.gate.waiting:
                return False  # nobody else would be there for the next call
            self._threads.discard(thread)
            self._changed.notify_all()
            return True

    def lend(self) -> None:
        """
        Serve calls with the calling thread until the pool is closed.

        Raises:
            RuntimeError: the thread serves a pool already; its setup failed, what left that is the cause.
            BaseException: what a signal handler has raised meanwhile.
        """
        self.check_lendable()
        thread = threading.current_thread()
        _local.pool = self
        try:
            self._set_up_lent()  # while the others serve still: nobody has made room yet
            while not self._join_in(thread, lent=True):
                if self._closed:
                    return
                self._make_room()
            self._serve_calls(thread, None)
        except Interrupt as interrupt:
            raise interrupt.error from None
        finally:
            self._go(thread)
            _local.pool = None  # until now nobody who closes waits for this thread
            if not self._closed and self._generation == _sockets.here():
                # An exception has ended the loan, perhaps before it began, and the server goes on: a thread
                # may have made room, and the others may all be busy.
                self.see_to_a_waiter()

    def _set_up_lent(self) -> None:
        """Run the setup in a thread that is lent for the first time."""
        if self._thread_setup is None or self._closed or getattr(self._visit, "set_up", False):
            return
        try:
            self._thread_setup()
        except Exception as error:  # Ctrl-C is the main thread's, and no failure
            raise RuntimeError(f"{self.name}: thread_setup failed") from error
        self._visit.set_up = True

    def check_lendable(self) -> None:
        """Raise ``RuntimeError`` if the calling thread serves a pool already."""
        serving: Pool | None = getattr(_local, "pool", None)
        # A child that was forked in a procedure serves nobody, whatever its thread did before.
        if serving is not None and serving._generation == _sockets.here():
            raise RuntimeError(f"{self.name}: this thread serves {serving.name!r} already")

    def is_ours(self) -> bool:
        """Tell whether the calling thread serves this pool."""
        return getattr(_local, "pool", None) is self

    def _make_room(self) -> None:
        """Have one thread of our own retire in favour of a lent one, when it is free."""
        with self._lock:
            if self._closed:
                return  # and the gate may be gone
            self._unwanted = 1
            try:
                self.gate.wake()
                self._changed.wait_for(lambda: self._closed or len(self._threads) < self.max_threads, 1.0)
            finally:  # by Ctrl-C nobody comes for whom one would go; without room it is asked again
                self._unwanted = 0

    # -- closing -----------------------------------------------------------------------------

    def close(self, timeout: float | None) -> list[Invocation]:
        """
        Refuse new calls, let running ones finish, and send the threads away.

        Called from a procedure of this pool, it does not wait for that one.

        Args:
            timeout: seconds for the running ones; None waits for ever.

        Returns:
            The invocations that ran on beyond the time; they were not cut yet.
        """
        own = threading.current_thread()
        with self._lock:
            self._closed = True
            self._changed.notify_all()  # who waits for the setup of the first threads does so no longer
        self.gate.close()  # each thread leaves as soon as it has answered
        with self._lock:
            self._changed.wait_for(lambda: not self._threads - {own}, timeout)
            return self._others(own)

    def close_from_inside(self) -> None:
        """Refuse new calls, and leave with the last call that runs; waits for nobody."""
        self.close(0)
        self.join(0)

    def _others(self, own: threading.Thread) -> list[Invocation]:
        return [invocation for thread, invocation in list(self._running.items()) if thread is not own]

    def join(self, timeout: float) -> None:
        """
        Wait for the threads to go, and give the gate's descriptors back if all have gone.

        Not for lent ones, which have other things to do, or those whose calls were cut.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            leaving = self._threads - self._lent - set(self._running) - {threading.current_thread()}
        for thread in leaving:
            with suppress(RuntimeError):  # it is being started just now, and finds the gate closed
                thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._disposable = True
            done = not self._threads
        if done:
            self.gate.dispose()

    @property
    def finished(self) -> bool:
        """Whether it is closed and the last thread has gone."""
        return self._disposable and not self._threads

    # -- calls that wait for themselves --------------------------------------------------------

    def _waits_for(self, pools: set[Pool]) -> bool:
        """
        Tell whether all its threads wait for some pools; while it can grow one is always free.

        One that has none waits for nobody: it is yet to be started, or closed, and says so itself.
        """
        with self._lock:
            waits = [self._awaited.get(thread) in pools for thread in self._threads]
        return bool(waits) and all(waits)

    def _is_stuck(self) -> bool:
        """Tell whether none of its threads can ever answer; see the module's head."""
        stuck, found = set(), {self}
        while found:
            pool = found.pop()
            stuck.add(pool)
            found |= set(pool._awaited.values()) - stuck
        while True:
            free = {pool for pool in stuck if not pool._waits_for(stuck)}
            if not free:
                return self in stuck
            stuck -= free


class Pools:
    """
    The pools of one server: the one that its endpoints share, and the private ones.

    Args: as of ``Pool``; all pools have the same settings but for ``max_threads``.
    """

    def __init__(
        self, name: str, serve: Callable[[Invocation], bool], *, max_threads: int,
        idle_timeout: float | None, thread_setup: Callable[[], object] | None, spin: int = -1,
        limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self.crowd = Crowd(limits or Limits())
        self._make = functools.partial(
            Pool, serve=serve, idle_timeout=idle_timeout, thread_setup=thread_setup, spin=spin,
            crowd=self.crowd,
        )  # fmt: skip
        self.name = name
        self.shared = self._make(name, max_threads=max_threads)
        self._all = [self.shared]
        self._lock = threading.RLock()  # guards the list and the state; pools are started under it
        self._started = False
        self._closed = False
        self._past = Load()  # of the pools that are gone

    @property
    def started(self) -> bool:
        """Whether the first threads were started."""
        return self._started

    @property
    def load(self) -> Load:
        """What all of them do now, and have done."""
        with self._lock:
            return sum((pool.load for pool in self._all), self._past)

    def usage(self) -> dict[int | None, Usage]:
        """What each stranger has of them now."""
        with self._lock:
            turns = [pool.gate.usage() for pool in self._all]
        return sum_up([self.crowd.usage(), *turns])

    def private(self, name: str, threads: int) -> Pool:
        """
        Make a pool for one endpoint, started if the others are.

        Raises:
            ClosedError: they are closed.
            RuntimeError: no thread can be had.
        """
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self.name} is closed")
            pool = self._make(f"{self.name}-{name}", max_threads=threads)
            if self._started:
                try:
                    pool.start()
                except BaseException:
                    pool.close_from_inside()
                    raise
            self._forget_finished()
            self._all.append(pool)
            return pool

    def release(self, pool: Pool) -> None:
        """
        Let a private pool go when its running calls have been answered.

        Takes no lock, for a finalizer may call it: the pool sees to it itself.
        """
        pool.end_soon(functools.partial(self._end, pool))

    def _end(self, pool: Pool) -> None:
        pool.close_from_inside()
        with self._lock:
            self._forget_finished()

    def _forget_finished(self) -> None:
        for gone in [pool for pool in self._all if pool.finished]:
            self._past += attrs.evolve(
                gone.load, threads=0, waiting=0, running=0, channels=0, segments=0, segment_bytes=0,
                segments_retained=0, segments_lent=0, segments_received=0, segment_bytes_received=0,
                segment_bytes_mapped=0,
            )  # fmt: skip
            self._all.remove(gone)

    def start(self) -> None:
        """
        Start the first threads of each pool, or none.

        Raises:
            RuntimeError: no thread can be had.
        """
        started: list[Pool] = []
        with self._lock:
            try:
                for pool in self._all:
                    started.append(pool)  # first, for Ctrl-C may come when it has been started
                    pool.start()
                self._started = True
            except BaseException:
                self._started = False
                for pool in started:
                    pool.send_away()
                raise

    def wait_set_up(self) -> None:
        """
        Wait until the first threads of all have run their setup.

        Raises:
            RuntimeError: it failed; what left it is the cause.
        """
        with self._lock:
            pools = self._all[:]
        for pool in pools:
            pool.wait_set_up()

    def close(self, timeout: float | None) -> list[Invocation]:
        """Close all, with one time for them together; otherwise as ``Pool.close``."""
        with self._lock:
            self._closed = True
            pools = self._all[:]
        deadline = None if timeout is None else time.monotonic() + timeout
        late = []
        for pool in pools:
            late += pool.close(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return late

    def join(self, timeout: float) -> None:
        """Wait for the threads of all to go; as ``Pool.join``."""
        deadline = time.monotonic() + timeout
        for pool in self._all[:]:
            pool.join(max(0.0, deadline - time.monotonic()))

    def are_ours(self) -> bool:
        """Tell whether the calling thread serves one of them."""
        return any(pool.is_ours() for pool in self._all)

    def dispose(self) -> None:
        """Give back what pools have that never were started."""
        for pool in self._all:
            pool.gate.dispose()


@contextmanager
def waiting_for(awaited: Pool, name: str) -> Iterator[None]:
    """
    Say, around a call of a door of this process, that this thread waits for its pool.

    Args:
        awaited: the pool.
        name: of the door, for the error.

    Raises:
        BusyError: then all threads of the caller's own pool would wait for ever.
    """
    own: Pool | None = getattr(_local, "pool", None)
    if own is None:
        yield
        return
    thread = threading.current_thread()
    with _waits:
        before = own._awaited.get(thread)  # a signal handler or finalizer may call within a call
        own._awaited[thread] = awaited
    try:
        with _waits:
            if not _waits.wait_for(lambda: not own._is_stuck(), STUCK):
                raise BusyError(
                    f"{name}: this call would wait for itself: all {own.threads} threads of {own.name!r} "
                    "wait for calls that they would have to answer; allow more (max_threads=, threads=)"
                )
        yield
    finally:
        with _waits:
            if before is None:
                del own._awaited[thread]
            else:
                own._awaited[thread] = before
            _waits.notify_all()


_waits = threading.Condition()


def _forget_parent() -> None:
    global _waits
    _waits = threading.Condition()
    _local.pool = None


_sockets.on_fork(_forget_parent)
