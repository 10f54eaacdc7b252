"""
What crosses a door, ten thousand times: nothing of it stays behind, on either side.

``test_passing`` does so with files and sockets where pickle is spoken; here are plain data, and what
is passed to be used: streams, callbacks, objects, methods and context managers.  Each goes as
an argument and comes as a result, inside of containers.  The other side is a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import offers, wait_until
from support.offers import OFFERS, Till
from support.passed import KINDS, descriptors

from doorpool import Descriptor, Proxy

PATIENCE = 20.0  # seconds for one call, and for what ends behind it

#: What is counted on both sides, and how much more of it than before is no leak: threads that a
#: pool has started meanwhile, and will end.
HELD = ("descriptors", "threads", "tills that somebody is in")
SPARE = (0, 6, 0)

SERVER = """
    import contextlib, os, sys, threading
    from doorpool import Server, take
    from support import offers, passed

    codec = sys.argv[1]
    server = Server(idle_timeout=1.0)
    last = contextlib.ExitStack()

    def back(value):
        first, *others = offers.unnest(value, codec)
        for other in others:
            other.close()
        return offers.nest(take(first), codec)

    def give(offer):
        last.close()
        return offers.nest(offers.OFFERS[offer].make(codec, last), codec)

    def use(offer, value):
        offers.use(offer, value, codec)

    def held():
        return [passed.descriptors(), threading.active_count(), offers.Till.entered]

    procedures = {"back": back, "give": give, "use": use, "held": held}

    @server.endpoint("a.door", codec=codec)
    def run(name, *args):
        return procedures[name](*args)

    with server:
        ready()
        server.run()
"""


@pytest.fixture
def reach(spawn_server, door_dir, connect) -> Callable[[str], Proxy]:
    """Start a server whose door speaks a codec; a proxy, called with the name of a procedure first."""

    def start(codec: str) -> Proxy:
        spawn_server(SERVER, codec, cwd=door_dir)
        return connect().options(timeout=PATIENCE)

    return start


def pass_often(there: Proxy, pass_once: Callable[[], None], often: int, what: str) -> None:
    """Do it again and again; both sides have as much afterwards as they had when it was done at first."""

    def left() -> dict[str, int]:
        now = {"here": held(), "there": there("held")}
        return {
            f"{name} {side}": more
            for side in now
            for name, spare, before, after in zip(HELD, SPARE, first[side], now[side], strict=True)
            if (more := after - before) > spare
        }

    for _ in range(3):
        pass_once()
    first = {"here": held(), "there": there("held")}
    for _ in range(often):
        pass_once()
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not left(), timeout=PATIENCE)
    assert left() == {}, what


def held() -> list[int]:
    """What this process has; as the server's ``held``."""
    return [descriptors(), threading.active_count(), Till.entered]


@pytest.mark.ids("F2", "F19")
@pytest.mark.timeout(1800)  # the long form; a call that hangs is given up by itself
def test_whatever_has_a_descriptor_crosses_a_data_door(reach, door_dir, many):
    there = reach("data")
    folder = door_dir / "files"
    folder.mkdir()

    def pass_once(value: Any) -> None:
        found = offers.unnest(there("back", offers.nest(value, "data")), "data")
        for each in found:
            with each:
                assert type(each) is Descriptor
                assert os.path.sameopenfile(each.fileno(), value.fileno())

    for name, make in KINDS.items():
        with contextlib.ExitStack() as stack:
            value = make(folder, stack)
            pass_often(there, lambda: pass_once(value), many(10, 10_000), name)  # noqa: B023


@pytest.mark.ids("F12", "F13")
@pytest.mark.timeout(1800)  # the long form; a call that hangs is given up by itself
@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_whatever_is_passed_to_be_used(reach, many, codec):
    there = reach(codec)

    def pass_once(offer: str) -> None:
        with contextlib.ExitStack() as stack:
            there("use", offer, offers.nest(OFFERS[offer].make(codec, stack), codec))
            offers.use(offer, there("give", offer), codec)

    for offer in OFFERS:
        if codec in OFFERS[offer].codecs:
            pass_often(there, lambda: pass_once(offer), many(10, 10_000), offer)  # noqa: B023
