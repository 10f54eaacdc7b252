"""
Doormen: who asks a rule about a caller is called without the keeper's lock, or refused.
"""

from __future__ import annotations

import errno
import os
import threading
from types import SimpleNamespace

import pytest
from support import wait_until
from support.rawdoor import Background

from doorpool import BusyError, Proxy, Server, _doorman, anyone
from doorpool._door import _MOST_PENDING, _MOST_STRANGE_PENDING, Door
from doorpool._doorman import MOST_DOORMEN, MOST_HIS, MOST_STRANGE, Doormen
from doorpool._keeper import keeper

PATIENCE = 20.0
A, B, C, D, E = range(6701, 6706)


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
        door._pending[os.geteuid()] = _MOST_PENDING
    with pytest.raises(BusyError, match=rf"{_MOST_PENDING} knocks of uid {os.geteuid()} to decide") as caught:
        call(tmp_path / "a.door")
    assert not caught.value.may_have_run
    with keeper().lock:
        del door._pending[os.geteuid()]
    assert call(tmp_path / "a.door") == "hello"


def test_strangers_who_are_asked_about_leave_our_own_user_room(server, tmp_path):
    (door,) = [each._door for each in server._endpoints if each.paths == (str(tmp_path / "a.door"),)]
    with keeper().lock:
        door._pending[A] = _MOST_STRANGE_PENDING - 1
        assert door._why_not_ask(B) is None
        door._pending[A] = 2 * _MOST_PENDING  # more than they can be
        assert "knocks of strangers" in door._why_not_ask(B).text
        assert door._why_not_ask(0) is None
    assert call(tmp_path / "a.door") == "hello"
    with keeper().lock:
        del door._pending[A]


def test_jobs_beyond_the_doormen_wait_for_one_and_a_failing_one_ends_nobody(caplog):
    doormen, go, done = Doormen(), threading.Event(), threading.Semaphore(0)

    def work() -> None:
        assert go.wait(PATIENCE)
        done.release()

    def fail() -> None:
        raise LookupError("a fault in the library")

    for _ in range(MOST_DOORMEN - 1):
        doormen.take(work, 0)
    doormen.take(fail, 0)
    for _ in range(MOST_DOORMEN):
        doormen.take(work, 0)
    assert doormen._working <= MOST_DOORMEN
    go.set()
    for _ in range(2 * MOST_DOORMEN - 1):
        assert done.acquire(timeout=PATIENCE)
    wait_until(lambda: not doormen._working)
    assert "a doorman failed; please report it" in caplog.text
    assert "a fault in the library" in caplog.text


def test_without_a_further_doorman_a_job_waits_for_those_there_are(monkeypatch):
    doormen, go, done = Doormen(), threading.Event(), threading.Event()
    doormen.take(lambda: go.wait(PATIENCE), 0)

    def never(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", never)
        doormen.take(done.set, 0)
    assert not done.is_set()
    go.set()
    assert done.wait(PATIENCE)
    wait_until(lambda: not doormen._working)


class Stage:
    """Doormen, and jobs that are held until they are let go; ``begun`` says which were, in turn."""

    def __init__(self) -> None:
        self.doormen = Doormen()
        self.begun: list[str] = []
        self._gates: dict[str, threading.Event] = {}

    def hold(self, uid: int | None, *names: str) -> None:
        for name in names:
            gate = self._gates[name] = threading.Event()
            self.doormen.take(lambda name=name, gate=gate: self._do(name, gate), uid)

    def _do(self, name: str, gate: threading.Event) -> None:
        self.begun.append(name)
        assert gate.wait(3 * PATIENCE)

    def let_go(self, *names: str) -> None:
        for name in names:
            self._gates[name].set()

    def wait_begun(self, *names: str) -> None:
        """Wait until these have been begun, and no doorman will begin another."""
        wait_until(lambda: len(self.begun) >= len(names) and self._is_quiet(), timeout=PATIENCE)
        assert sorted(self.begun) == sorted(names)

    def _is_quiet(self) -> bool:
        with self.doormen._lock:
            return self.doormen._working == self.doormen._busy.total()


@pytest.fixture
def stage():
    stage = Stage()
    yield stage
    stage.let_go(*stage._gates)
    wait_until(lambda: not stage.doormen._working, timeout=PATIENCE)
    assert not stage.doormen._busy
    assert not stage.doormen._jobs


@pytest.mark.ids("F07")
@pytest.mark.parametrize("stranger", [A, None])
def test_a_stranger_has_two_of_the_doormen(stage, stranger):
    stage.hold(stranger, "a1", "a2", "a3", "a4")
    stage.wait_begun("a1", "a2")
    stage.hold(B, "b1")
    stage.wait_begun("a1", "a2", "b1")
    stage.let_go("a2")
    stage.wait_begun("a1", "a2", "b1", "a3")


@pytest.mark.ids("F07")
@pytest.mark.parametrize("own", sorted({0, os.geteuid()}))
def test_all_strangers_leave_doormen_to_our_own_user_and_root(stage, own):
    for uid, name in ((A, "a"), (B, "b"), (C, "c"), (D, "d")):
        stage.hold(uid, f"{name}1", f"{name}2")
    strange = ["a1", "a2", "b1", "b2", "c1", "c2"]
    stage.wait_begun(*strange)
    stage.hold(own, "own1", "own2")
    stage.wait_begun(*strange, "own1", "own2")
    assert (MOST_DOORMEN, MOST_STRANGE, MOST_HIS) == (8, 6, 2)
    stage.let_go("own1", "own2")
    wait_until(lambda: stage.doormen._working == MOST_STRANGE, timeout=PATIENCE)
    assert stage.begun[8:] == []
    stage.let_go("b1")
    stage.wait_begun(*strange, "own1", "own2", "d1")


@pytest.mark.ids("F07")
def test_turns_go_round_between_strangers_after_our_own_user(stage):
    strange = ["a1", "a2", "b1", "b2", "c1", "c2"]
    for uid, name in ((A, "a"), (B, "b"), (C, "c")):
        stage.hold(uid, f"{name}1", f"{name}2")
    stage.hold(D, "d1", "d2", "d3")
    stage.hold(E, "e1", "e2")
    stage.wait_begun(*strange)
    stage.hold(0, "own1", "own2", "own3")
    stage.wait_begun(*strange, "own1", "own2")
    stage.let_go("own3", "d1", "d2", "d3", "e1", "e2", "a1")  # one doorman does them all
    stage.wait_begun(*strange, "own1", "own2", "own3", "d1", "d2", "d3", "e1", "e2")
    assert stage.begun[8:] == ["own3", "d1", "e1", "d2", "e2", "d3"]
