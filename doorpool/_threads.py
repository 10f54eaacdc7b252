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

This module knows neither sockets nor objects: it waits at a gate, and hands each
invocation to ``serve``.

Modelled on: door_server_create(3C)
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from doorpool import _sockets
from doorpool._errors import ClosedError
from doorpool.door import Gate, Invocation

log = logging.getLogger("doorpool")

#: What a pool keeps: one to answer, one to wait.
KEPT = 2

_LONGEST = 2e6  # seconds; epoll counts milliseconds in an int

_numbers = itertools.count(1)
_local = threading.local()  # .pool: the pool that the thread serves


class Pool:
    """
    Server threads that wait at one gate.

    Args:
        name: begins the names of its threads.
        serve: answers an invocation; raises nothing.
        max_threads: how many threads at most, lent ones included.
        idle_timeout: seconds after which a thread that nobody needs retires; None: never.
        thread_setup: runs first in each thread; one in which it fails serves nobody.
    """

    def __init__(
        self, name: str, serve: Callable[[Invocation], bool], *, max_threads: int = 64,
        idle_timeout: float | None = 10.0, thread_setup: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.gate = Gate(lingers=True)
        self.max_threads = max_threads
        self.served = 0
        self.errors = 0
        self._serve = serve
        self._idle_timeout = None if idle_timeout is None else min(idle_timeout, _LONGEST)
        self._thread_setup = thread_setup
        self._generation = _sockets.generation
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._threads: set[threading.Thread] = set()
        self._running: dict[threading.Thread, Invocation] = {}
        self._set_up = 0  # threads whose setup is over, one way or the other
        self._setup_error: BaseException | None = None
        self._closed = False
        self._disposable = False  # the last thread to leave gives the gate's descriptors back
        self._short = False
        self._lent: set[threading.Thread] = set()
        self._unwanted = 0  # threads that shall make room for a lent one

    @property
    def threads(self) -> int:
        """How many threads there are now, lent ones included."""
        return len(self._threads)

    @property
    def running(self) -> int:
        """How many procedures run now."""
        return len(self._running)

    # -- starting ----------------------------------------------------------------------------

    def start(self) -> None:
        """
        Start the first threads, or none.

        Raises:
            RuntimeError: no thread can be had.
        """
        try:
            for _ in range(min(KEPT, self.max_threads)):
                self._start_one()
        except BaseException:
            with self._lock:
                self._unwanted = len(self._threads)
            self.gate.wake(self._unwanted)
            raise

    def wait_set_up(self) -> None:
        """
        Wait until the first threads have run their setup.

        Raises:
            RuntimeError: it failed; what left it is the cause.
        """
        if self._thread_setup is None:
            return
        first = min(KEPT, self.max_threads)
        with self._lock:
            self._changed.wait_for(lambda: self._setup_error is not None or self._set_up >= first)
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
        if done:
            self.gate.dispose()

    def _see_to_a_waiter(self) -> None:
        """Have somebody wait for the next call while this thread is busy, if that is possible."""
        if len(self._threads) >= self.max_threads:
            return
        try:
            self._start_one()
            self._short = False
        except RuntimeError as error:
            # Callers wait until a thread is free; nobody is lost.  Said once per shortage.
            if not self._short:
                log.warning("%s: no further thread: %s", self.name, error)
            self._short = True

    # -- the threads -------------------------------------------------------------------------

    def _work(self) -> None:
        thread = threading.current_thread()
        _local.pool = self
        try:
            if self._thread_setup is None or self._run_setup(self._thread_setup):
                self._serve_calls(thread, self._idle_timeout)
        except Exception:
            log.exception("%s: a server thread failed", self.name)
        finally:
            self._leave(thread)

    def _run_setup(self, setup: Callable[[], object]) -> bool:
        failed: BaseException | None = None
        try:
            setup()
        except BaseException as error:
            failed = error
            log.error("%s: thread_setup failed", self.name, exc_info=error)
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
                if invocation is not None:
                    self._run(thread, invocation)
                elif self._retire(thread, idle_timeout):
                    return

    def _run(self, thread: threading.Thread, invocation: Invocation) -> None:
        self._running[thread] = invocation
        try:
            if not self.gate.waiting:
                self._see_to_a_waiter()
            if not self._answer(invocation):
                self.errors += 1
            self.served += 1
        finally:
            del self._running[thread]
            if self._closed:
                with self._lock:
                    self._changed.notify_all()

    def _answer(self, invocation: Invocation) -> bool:
        """Have an invocation answered, even if answering it fails."""
        try:
            return self._serve(invocation)
        except Exception:
            log.exception("%s: a call of %s could not be answered", self.name, invocation.door.name)
            invocation.fail(text="the server failed to answer", may_have_run=True)
            return False

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
            RuntimeError: the thread serves a pool already.
        """
        self.check_lendable()
        thread = threading.current_thread()
        while not self._join_in(thread, lent=True):
            if self._closed:
                return
            self._make_room()
        _local.pool = self
        try:
            self._serve_calls(thread, None)
        finally:
            _local.pool = None
            self._leave(thread)

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
            self._unwanted = 1
            self.gate.wake()
            self._changed.wait_for(lambda: self._closed or len(self._threads) < self.max_threads, 1.0)

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
        self.gate.close()  # each thread leaves as soon as it has answered
        with self._lock:
            self._changed.wait_for(lambda: not self._threads - {own}, timeout)
            return self._others(own)

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
