"""
A peer that closes one direction of a channel: that direction is dead, and nobody spins on it.
"""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from support import rawpeer, wait_until
from support.rawdoor import PATIENCE, Background

from doorpool._errors import BrokenDoorError
from doorpool.door import Handle

PROMPTLY = 1.0  # seconds (threats.md 3.1, P3)


@pytest.fixture
def peer():
    """A server by hand, and a (lazy) handle of its door."""
    server = rawpeer.RawServer()
    with server, Handle(server.descriptor, lazy=True) as handle:
        yield server, handle


@pytest.mark.ids("E12")
@pytest.mark.parametrize("reads", [True, False], ids=["read", "unread"])
def test_a_server_that_will_say_no_more(peer, reads):
    """It may read on, and run what it reads, so nobody can know."""
    server, handle = peer
    call = Background(handle.call, b"data")
    server.accept()
    if reads:
        server.receive()
    else:
        server.channel.recv(1, socket.MSG_PEEK)
    began = time.monotonic()
    server.channel.shutdown(socket.SHUT_WR)
    error = call.error()
    assert isinstance(error, BrokenDoorError)
    assert error.may_have_run
    assert time.monotonic() - began < PROMPTLY


@pytest.mark.ids("E12")
def test_a_server_that_says_no_more_after_its_reply(peer):
    server, handle = peer
    call = Background(handle.call, b"first")
    server.accept()
    server.receive()
    server.send(rawpeer.frame(rawpeer.REPLY, 1, b"last"))
    server.channel.shutdown(socket.SHUT_WR)
    assert call.result().data == b"last"
    # The next call goes on the same channel, and who knows whether it is read.
    error = Background(handle.call, b"second").error()
    assert isinstance(error, BrokenDoorError)
    assert error.may_have_run


@pytest.mark.ids("E12")
@pytest.mark.parametrize("size", [10, 64 << 20], ids=["short", "long"])
def test_a_server_that_will_read_no_more(peer, size):
    """What could not be sent whole is not run: it is sent again on another channel, or an error says so."""
    server, handle = peer
    call = Background(handle.call, b"first")
    server.accept()
    server.receive()
    server.send(rawpeer.frame(rawpeer.REPLY, 1))
    call.result()
    server.channel.shutdown(socket.SHUT_RD)
    call = Background(handle.call, bytes(size))
    server.accept()
    again = server.receive() if size < 100 else None
    if again is not None:
        assert (again.number, again.body) == (1, bytes(size))
        server.send(rawpeer.frame(rawpeer.REPLY, 1, b"fresh"))
        assert call.result().data == b"fresh"
        return
    rawpeer.receive_packets(server.channel, 1 << 20)
    began = time.monotonic()
    server.channel.shutdown(socket.SHUT_RD)  # in the middle of it
    error = call.error()
    assert isinstance(error, BrokenDoorError)
    assert not error.may_have_run
    assert time.monotonic() - began < PROMPTLY


@pytest.mark.ids("E12", "E04")
@pytest.mark.parametrize("how", ["SHUT_WR", "SHUT_RD"])
def test_a_client_that_half_closes_during_its_call(serve, how):
    go, running, told = threading.Event(), threading.Event(), []

    def procedure(invocation):
        running.set()
        assert go.wait(PATIENCE)
        told.append(invocation.cancelled)
        invocation.reply(b"reply")

    serving = serve(procedure)
    number = serving.door.open()
    with rawpeer.RawClient(number) as client:
        os.close(number)
        client.send(rawpeer.frame(rawpeer.REQUEST, 1))
        assert running.wait(PATIENCE)
        client.channel.shutdown(getattr(socket, how))
        busy, wall = time.process_time(), time.monotonic()
        assert not go.wait(0.3)  # long enough for a spin to show; nothing is waited for
        assert time.process_time() - busy < (time.monotonic() - wall) / 3
        go.set()
        if how == "SHUT_WR":  # he listens still, though he has given up
            assert client.receive().body == b"reply"
            client.expect_end()
        wait_until(lambda: serving.door.channels == 0)
        assert told == [how == "SHUT_WR"], "that somebody reads no more shows when he is written to"


@pytest.mark.ids("E12")
@pytest.mark.parametrize("how", ["SHUT_WR", "SHUT_RD"])
def test_an_idle_channel_that_is_half_closed_costs_nothing(serve, how):
    serving = serve()
    number = serving.door.open()
    with rawpeer.RawClient(number) as client:
        os.close(number)
        client.call(b"data")
        client.channel.shutdown(getattr(socket, how))
        if how == "SHUT_WR":
            wait_until(lambda: serving.door.channels == 0)
        busy, wall = time.process_time(), time.monotonic()
        assert not threading.Event().wait(0.3)  # as above
        assert time.process_time() - busy < (time.monotonic() - wall) / 3
