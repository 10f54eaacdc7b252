"""
Server threads, without sockets: when a pool looks stuck and is not.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter

import pytest
from support import wait_until

from doorpool import BusyError, ClosedError, _threads
from doorpool._threads import Interrupt, Pool, Pools, waiting_for


@pytest.fixture
def pool():
    pool = Pool("pool", lambda invocation: True, max_threads=2)
    yield pool
    pool.gate.dispose()


def call_from(pool: Pool, awaited: Pool) -> str:
    """What becomes of a call for a pool that a thread of another makes."""
    outcome = []

    def run() -> None:
        pool._threads.add(threading.current_thread())
        _threads._local.pool = pool
        try:
            with waiting_for(awaited, "a door"):
                outcome.append("made")
        except BusyError:
            outcome.append("refused")
        pool._threads.discard(threading.current_thread())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return outcome[0]


def pretend(pool: Pool, awaited: Pool | None) -> threading.Thread:
    """A thread of a pool that waits for another, for good."""
    thread = threading.Thread()
    pool._threads.add(thread)
    if awaited is not None:
        pool._awaited[thread] = awaited
    return thread


@pytest.mark.ids("T8")
def test_a_pool_is_stuck_when_all_its_threads_wait_for_it(pool):
    assert call_from(pool, pool) == "refused"
    pretend(pool, None)
    assert call_from(pool, pool) == "made", "one is free"
    assert not pool._awaited


@pytest.mark.ids("T8")
def test_an_answer_that_its_thread_has_not_come_to_see_yet(pool):
    """The other thread has been answered, and goes on a moment later."""
    other = pretend(pool, pool)

    def go_on() -> None:
        with _threads._waits:
            del pool._awaited[other]
            _threads._waits.notify_all()

    timer = threading.Timer(_threads.STUCK / 5, go_on)
    timer.start()
    assert call_from(pool, pool) == "made"
    timer.join()


@pytest.mark.ids("T8")
def test_pools_that_wait_for_a_pool_that_is_not_stuck_are_not(pool):
    second = Pool("second", lambda invocation: True, max_threads=1)
    try:
        pretend(second, pool)
        pretend(pool, None)
        assert call_from(pool, second) == "made"
        pool._threads.clear()
        assert call_from(pool, second) == "refused"
    finally:
        second.gate.dispose()


@pytest.mark.ids("T8")
def test_a_pool_without_threads_is_not_stuck(pool):
    """It is yet to be started, or closed; no call of its own doors is what it waits for."""
    second = Pool("second", lambda invocation: True, max_threads=1)
    try:
        assert call_from(pool, second) == "made"
    finally:
        second.gate.dispose()


@pytest.mark.ids("T8")
def test_a_call_within_a_call(pool, monkeypatch):
    """A signal handler, or a finalizer, calls while its thread waits for an answer."""
    thread, second = threading.current_thread(), Pool("second", lambda invocation: True, max_threads=1)
    monkeypatch.setattr(_threads._local, "pool", pool, raising=False)
    monkeypatch.setattr(pool, "_threads", {thread, threading.Thread()})
    try:
        with waiting_for(second, "a door"):
            with waiting_for(pool, "another"):
                assert pool._awaited == {thread: pool}
            assert pool._awaited == {thread: second}
        assert not pool._awaited
    finally:
        second.gate.dispose()


def test_a_thread_that_serves_no_pool_waits_for_any(pool):
    pretend(pool, pool)
    with waiting_for(pool, "a door"):
        assert len(pool._awaited) == 1


def test_what_fails_between_calls_costs_no_thread(pool, caplog):
    done = threading.Event()

    def fail() -> None:
        raise LookupError("a fault in the library")

    pool.start()
    pool.run_soon(fail)
    pool.run_soon(done.set)
    assert done.wait(20)
    pool.close(20)
    pool.join(20)
    assert "a server thread failed at something between calls" in caplog.text
    assert "a fault in the library" in caplog.text


@pytest.mark.ids("F11", "F04")
def test_what_strangers_cause_between_calls_takes_few_threads():
    """One of each stranger's and two of all theirs, of eight threads; the rest waits, and all is done."""
    pool = Pool("pool", lambda invocation: True, max_threads=8)
    lock, go, own = threading.Lock(), threading.Event(), threading.Event()
    running, most, done = Counter(), Counter(), []

    def work(uid):
        with lock:
            running[uid] += 1
            most[uid] = max(most[uid], running[uid])
            most[None] = max(most[None], running.total())
        pool.see_to_a_waiter()
        assert go.wait(20)
        with lock:
            running[uid] -= 1
            done.append(uid)

    try:
        pool.start()
        for number in range(30):
            pool.run_soon(functools.partial(work, 4001 + number % 3), 4001 + number % 3)
        wait_until(lambda: running.total() == 2)
        pool.run_soon(own.set)
        assert own.wait(20), "nobody else waits for them"
        wait_until(lambda: not pool._jobs)
        go.set()
        wait_until(lambda: len(done) == 30)
    finally:
        go.set()
        pool.close(10)
        pool.join(10)
    assert most == {4001: 1, 4002: 1, 4003: 1, None: 2}
    assert not pool._at_jobs
    assert not pool._aside


def test_a_thread_that_fails_is_counted_out(pool, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise LookupError("a fault in the library")

    monkeypatch.setattr(pool, "_serve_calls", fail)
    pool.start()
    wait_until(lambda: not pool.threads)
    assert "a server thread failed" in caplog.text
    assert "a fault in the library" in caplog.text
    monkeypatch.undo()
    done = threading.Event()
    pool.start()
    pool.run_soon(done.set)
    assert done.wait(20), "and the next ones serve"
    pool.close(20)
    pool.join(20)


@pytest.fixture
def hold(pool):
    """Keep the thread of a pool that has only one busy until it is told to go on."""
    busy, go_on = threading.Event(), threading.Event()

    def job() -> None:
        busy.set()
        go_on.wait(20)

    pool.see_to_a_waiter()
    assert pool.threads == 1
    pool.run_soon(job)
    assert busy.wait(20)
    yield go_on
    go_on.set()
    pool.close(20)
    pool.join(20)


@pytest.mark.ids("T13", "G05")
def test_ctrl_c_while_a_loan_waits_for_room_sends_nobody_away(pool, hold, monkeypatch):
    """The only thread would have retired as soon as it was free, for one that did not come."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    pool.max_threads = 1
    with monkeypatch.context() as patch:
        patch.setattr(pool._changed, "wait_for", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.lend()
    hold.set()
    for _ in range(3):
        done = threading.Event()
        pool.run_soon(done.set)
        assert done.wait(20)
    assert pool.threads == 1


@pytest.mark.ids("T13", "G05")
def test_ctrl_c_when_room_was_made_for_a_loan_leaves_somebody_to_serve(pool, hold, monkeypatch):
    """The only thread has gone already, and the lent one does not take its place."""
    make_room = pool._make_room

    def interrupt() -> None:
        while pool.threads:
            make_room()
        raise KeyboardInterrupt

    pool.max_threads = 1
    hold.set()
    monkeypatch.setattr(pool, "_make_room", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.lend()
    done = threading.Event()
    pool.run_soon(done.set)
    assert done.wait(20)


@pytest.mark.ids("T13", "T5")
def test_a_loan_that_an_exception_ends_leaves_somebody_who_waits(pool, hold):
    """All other threads are busy just then, and there may be more."""

    def interrupt() -> None:
        raise Interrupt(KeyboardInterrupt())

    pool.run_soon(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.lend()
    done = threading.Event()
    pool.run_soon(done.set)
    assert done.wait(20)
    assert pool.threads == 2


@pytest.mark.ids("T10", "T13")
def test_a_thread_that_is_lent_again_is_not_set_up_again(monkeypatch):
    ran, failing = [], True

    def setup() -> None:
        ran.append(threading.current_thread())
        if failing:
            raise LookupError("on purpose")

    def interrupt() -> None:
        raise Interrupt(TimeoutError("on purpose"))

    pool = Pool("pool", lambda invocation: True, max_threads=1, thread_setup=setup)
    monkeypatch.setattr(pool, "see_to_a_waiter", lambda: None)  # or another would take the job
    pool.run_soon(interrupt)
    with pytest.raises(RuntimeError, match="pool: thread_setup failed") as caught:
        pool.lend()
    assert isinstance(caught.value.__cause__, LookupError)
    failing = False
    for number in range(3):
        if number:
            pool.run_soon(interrupt)
        with pytest.raises(TimeoutError):
            pool.lend()
    assert ran == [threading.current_thread()] * 2, "when it failed, and when it did not"
    pool.close(20)
    pool.join(20)


def test_pools_that_are_closed_make_no_further_one():
    pools = Pools("pools", lambda invocation: True, max_threads=1, idle_timeout=None, thread_setup=None)
    pools.close(0)
    with pytest.raises(ClosedError, match="pools is closed"):
        pools.private("own", 1)
    pools.dispose()
