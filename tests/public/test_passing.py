"""
Files, sockets and other objects with descriptors, in arguments and results.

The other side is a process of its own, so that what it holds can be counted by itself.
"""

from __future__ import annotations

import contextlib

import pytest
from support import wait_until
from support.passed import KINDS, describe, descriptors, nest, unnest

from doorpool import Proxy

SERVER = """
    import os, sys, threading
    from doorpool import Descriptor, Server, current_call, take
    from support.passed import *

    server = Server()
    kept = []

    @server.endpoint("back.door")
    def back(value):
        obj = unnest(value)
        return describe(obj), nest(take(obj))

    @server.endpoint("count.door")
    def count():
        return descriptors()

    with server:
        ready()
        server.run()
"""


@pytest.fixture
def there(spawn_server, door_dir, closing):
    """A server in a process of its own; opens its doors."""
    spawn_server(SERVER, cwd=door_dir)
    doors: dict[str, Proxy] = {}

    def call(name, *args, **kwargs):
        if name not in doors:
            doors[name] = closing.enter_context(Proxy(door_dir / f"{name}.door"))
        return doors[name](*args, **kwargs)

    return call


@pytest.mark.ids("F2", "F3", "F4")
@pytest.mark.parametrize("name", list(KINDS))
def test_each_kind_there_and_back(there, door_dir, many, name):
    """Nested in containers, both ways, many times; on both sides nothing is left open."""
    folder = door_dir / "files"
    folder.mkdir()
    there("count")
    for _ in range(2):
        _there_and_back(there, folder, name)
    ours, theirs = descriptors(), there("count")
    for _ in range(many(20, 10_000)):
        _there_and_back(there, folder, name)
    wait_until(lambda: there("count") <= theirs)
    assert descriptors() <= ours


def _there_and_back(there, folder, name):
    with contextlib.ExitStack() as stack:
        obj = KINDS[name](folder, stack)
        seen, value = there("back", nest(obj))
        arrived = unnest(value)
        with contextlib.closing(arrived):
            assert seen == describe(obj) == describe(arrived)
            assert arrived.fileno() != obj.fileno()
