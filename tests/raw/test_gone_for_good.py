"""
A server that is dead and reaped, on a kernel (before 6.16) that gives no pidfd of such a process.

It is simulated: the look-up of the peer's pidfd finds nothing.
"""

from __future__ import annotations

import socket
import time

import pytest
from support import rawpeer
from support.rawdoor import Background

from doorpool import _handle, _opening
from doorpool._credentials import tells_processes
from doorpool._errors import AccessError, BrokenDoorError
from doorpool.door import Handle

pytestmark = pytest.mark.skipif(not tells_processes(), reason="this kernel gives no pidfds of peers at all")


@pytest.fixture
def peer():
    """A server by hand, and a (lazy) handle of its door."""
    server = rawpeer.RawServer()
    with server, Handle(server.descriptor, lazy=True) as handle:
        yield server, handle


def find_nobody(sock: socket.socket) -> int:
    return -1


@pytest.mark.ids("E01", "E05")
@pytest.mark.parametrize("answers", [True, False], ids=["answered", "silent"])
def test_a_server_gone_for_good_is_dead_and_no_impostor(peer, monkeypatch, answers):
    """Its sockets are still there, as a child of it may hold them."""
    server, handle = peer
    monkeypatch.setattr(_handle, "peer_pidfd", find_nobody)
    monkeypatch.setattr(_opening, "peer_pidfd", find_nobody)
    began = time.monotonic()
    call = Background(handle.call)
    server.hear()
    if answers:
        server.admit()
    error = call.error()
    assert isinstance(error, BrokenDoorError)
    assert not error.may_have_run
    assert time.monotonic() - began < 1.0
    assert not handle.alive


def test_an_answer_from_nobody_known_is_not_believed_while_the_server_lives(peer, monkeypatch):
    server, handle = peer
    monkeypatch.setattr(_opening, "peer_pidfd", find_nobody)
    call = Background(handle.call)
    server.accept()
    assert isinstance(call.error(), AccessError)
