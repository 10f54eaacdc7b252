"""
Doormen: who asks a rule about a caller is called without the keeper's lock, or refused.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from support.rawdoor import Background

from doorpool import BusyError, Proxy, Server, _doorman, anyone
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


class Late(threading.Thread):
    """A thread that begins late: a collection, its first work, waits for the keeper's lock there."""

    starting, free = threading.Event(), threading.Event()

    def start(self) -> None:
        Late.starting.set()
        assert Late.free.wait(PATIENCE)
        super().start()


def test_a_doorman_is_waited_for_without_the_keepers_lock(server, tmp_path, monkeypatch):
    monkeypatch.setattr(_doorman, "threading", SimpleNamespace(Lock=threading.Lock, Thread=Late))
    calling = Background(call, tmp_path / "a.door")
    assert Late.starting.wait(PATIENCE)
    monkeypatch.undo()
    assert keeper().lock.acquire(timeout=PATIENCE)
    keeper().lock.release()
    Late.free.set()
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
