"""
Too many descriptors of one user in flight: the kernel refuses more, by ``RLIMIT_NOFILE`` of who sends.

One receiver that is stuck does that to all processes of its user.  The call then did not run, says so, and
goes well as soon as the receiver reads again.
"""

from __future__ import annotations

import os
import resource
import socket

import pytest
from support import byhand
from support.actors import LONE_USER, here

from doorpool import BusyError, Descriptor, DoorError, Proxy, Server, take

FEW = 64  # RLIMIT_NOFILE of the caller


def serve_length(path: str) -> None:
    """Serve what counts the descriptors that it is given."""
    here.calls = 0

    def length(*given: Descriptor) -> int:
        here.calls += 1
        return len(given)

    here.server = Server()
    here.server.attach(length, path, codec="data")
    here.server.start()


def calls() -> int:
    return int(here.calls)


def get_stuck(count: int) -> None:
    """Be sent descriptors, and not read them."""
    here.stuck, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sender:
        for _ in range(count):
            byhand.send(sender, b"x", [0] * 8)


def read_on() -> None:
    """Read what was sent."""
    while (message := byhand.receive(here.stuck)).data:
        message.close()


def open_door(path: str) -> None:
    here.proxy = Proxy(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, FEW), hard))


def call_with(count: int) -> int:
    given = [Descriptor(os.open(os.devnull, os.O_RDONLY)) for _ in range(count)]
    try:
        return int(here.proxy.options(timeout=5)(*given))
    finally:
        for one in given:
            one.close()


@pytest.mark.ids("C04")
def test_a_call_that_would_be_one_too_many_in_flight_did_not_run(actor, path, root_only):
    server, stuck, client, canary = (actor(LONE_USER) for _ in range(4))
    server(serve_length, path)
    for one in (client, canary):
        one(open_door, path)
        assert one(call_with, 2) == 2
    stuck(get_stuck, FEW // 8 + 1)
    for _ in range(3):
        with pytest.raises(BusyError, match="too many descriptors in flight") as caught:
            client(call_with, 2)
        assert not caught.value.may_have_run
        assert canary(call_with, 0) == 0, "who passes nothing goes on"
    assert server(calls) == 2 + 3
    stuck(read_on)
    assert client(call_with, 2) == 2
    assert server(calls) == 2 + 3 + 1


def serve_gifts(path: str) -> None:
    """Serve what gives descriptors away, from a process that may have few in flight."""
    here.calls = 0

    def give(count: int) -> list[Descriptor]:
        here.calls += 1
        return [take(Descriptor(os.open(os.devnull, os.O_RDONLY))) for _ in range(count)]

    here.server = Server()
    here.server.attach(give, path, codec="data")
    here.server.start()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, FEW), hard))


def get(count: int) -> int:
    given = here.proxy.options(timeout=5)(count)
    for one in given:
        one.close()
    return len(given)


@pytest.mark.ids("C04")
def test_a_result_that_would_be_one_too_many_in_flight_has_run(actor, path, root_only):
    server, stuck, client = (actor(LONE_USER) for _ in range(3))
    server(serve_gifts, path)
    client(open_door, path)
    assert client(get, 2) == 2
    stuck(get_stuck, FEW // 8 + 1)
    with pytest.raises(DoorError) as caught:
        client(get, 2)
    print(repr(caught.value))
    assert caught.value.may_have_run
    assert server(calls) == 2
    stuck(read_on)
    assert client(get, 2) == 2
    assert server(calls) == 3
