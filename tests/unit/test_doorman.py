"""
Doormen: who asks a rule about a caller is called without the keeper's lock, or refused.
"""

from __future__ import annotations

import errno
import threading
from types import SimpleNamespace

import pytest
from support import wait_until
from support.rawdoor import Background

from doorpool import BusyError, Proxy, Server, _doorman, anyone
from doorpool._door import _MOST_PENDING, Door
from doorpool._doorman import MOST_DOORMEN, Doormen
from doorpool._keeper import keeper

PATIENCE = 20.0


def greet() -> str:
    return "hello"


@pytest.fixture
def server(tmp_path):
    """A server with a door that has a rule, and one that has none."""
    with Server() as server:
        server.attach(greet, tmp_path / "a.door", codec="data", callers=lambda credentials: True)
        server.attach(greet, tmp_path / "b.door", codec="data", callers=anyone)
        yield server.start()


def call(path) -> str:
    with Proxy(path, open_timeout=PATIENCE) as proxy:
        return str(proxy())


def test_a_doorman_is_waited_for_without_the_keepers_lock(server, tmp_path, monkeypatch):
    starting, free = threading.Event(), threading.Event()

    class Late(threading.Thread):
        """A thread that begins late: a collection, its first work, waits for the keeper's lock there."""

        def start(self) -> None:
            starting.set()
            assert free.wait(PATIENCE)
            super().start()

    monkeypatch.setattr(_doorman, "threading", SimpleNamespace(Lock=threading.Lock, Thread=Late))
    calling = Background(call, tmp_path / "a.door")
    try:
        assert starting.wait(PATIENCE)
        assert not free.is_set()
        assert keeper().lock.acquire(timeout=PATIENCE / 2)  # before the thread begins of itself
        keeper().lock.release()
    finally:  # or the keeper would stand still in the tests after this one
        monkeypatch.undo()
        free.set()
    assert calling.result() == "hello"


@pytest.mark.ids("F03")
def test_without_a_doorman_nobody_comes_in_by_a_rule(server, tmp_path, monkeypatch):
    class Never(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    before = keeper(), call(tmp_path / "b.door")
    monkeypatch.setattr(_doorman, "threading", SimpleNamespace(Lock=threading.Lock, Thread=Never))
    with pytest.raises(BusyError, match=r"a\.door.*no thread to ask its rule") as caught:
        call(tmp_path / "a.door")
    monkeypatch.undo()
    assert not caught.value.may_have_run
    assert before == (keeper(), call(tmp_path / "a.door"))


@pytest.mark.ids("F03")
def test_an_answer_that_cannot_be_given_after_a_rule_is_told(server, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EMFILE, "no descriptor")

    monkeypatch.setattr(Door, "_answer", fail)
    with pytest.raises(BusyError, match=r"a\.door.*the server cannot answer \(no descriptor\)") as caught:
        call(tmp_path / "a.door")
    assert not caught.value.may_have_run
    monkeypatch.undo()
    assert call(tmp_path / "a.door") == "hello"


def test_a_rule_has_only_so_many_to_decide_about_at_a_time(server, tmp_path):
    (door,) = [each._door for each in server._endpoints if each.paths == (str(tmp_path / "a.door"),)]
    with keeper().lock:
        door._pending[4201] = 2 * _MOST_PENDING
    with pytest.raises(BusyError, match=rf"{2 * _MOST_PENDING} knocks to decide about") as caught:
        call(tmp_path / "a.door")
    assert not caught.value.may_have_run
    with keeper().lock:
        del door._pending[4201]
    assert call(tmp_path / "a.door") == "hello"


def test_jobs_beyond_the_doormen_wait_for_one_and_a_failing_one_ends_nobody(caplog):
    doormen, go, done = Doormen(), threading.Event(), threading.Semaphore(0)

    def work() -> None:
        assert go.wait(PATIENCE)
        done.release()

    def fail() -> None:
        raise LookupError("a fault in the library")

    for _ in range(MOST_DOORMEN - 1):
        doormen.take(work)
    doormen.take(fail)
    for _ in range(MOST_DOORMEN):
        doormen.take(work)
    assert doormen._working <= MOST_DOORMEN
    go.set()
    for _ in range(2 * MOST_DOORMEN - 1):
        assert done.acquire(timeout=PATIENCE)
    wait_until(lambda: not doormen._working)
    assert "a doorman failed; please report it" in caplog.text
    assert "a fault in the library" in caplog.text


def test_without_a_further_doorman_a_job_waits_for_those_there_are(monkeypatch):
    doormen, go, done = Doormen(), threading.Event(), threading.Event()
    doormen.take(lambda: go.wait(PATIENCE))

    def never(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", never)
        doormen.take(done.set)
    assert not done.is_set()
    go.set()
    assert done.wait(PATIENCE)
    wait_until(lambda: not doormen._working)
