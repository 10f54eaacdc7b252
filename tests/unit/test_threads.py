"""
Server threads, without sockets: when a pool looks stuck and is not.
"""

from __future__ import annotations

import threading

import pytest

from doorpool import BusyError, _threads
from doorpool._threads import Pool, waiting_for


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
