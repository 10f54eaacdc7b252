"""
A canary: an actor that opens a door and calls it, over and over, and keeps time.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator

from doorpool.door import Handle
from support.actors import Actor, descriptors, here
from support.processes import wait_until
from support.rawdoor import PATIENCE, Background
from support.shortage import LINGER


def sing(path: str) -> None:
    """Open the door and call it, over and over, until ``hush``; every song is timed."""
    here.songs, here.quiet = [], threading.Event()

    def work() -> None:
        while not here.quiet.is_set():
            began = time.monotonic()
            with Handle(path) as handle:
                assert handle.call(b"tweet").data == b"tweet"
                assert handle.call(b"tweet").data == b"tweet"
            here.songs.append(time.monotonic() - began)
            here.quiet.wait(0.002)

    here.singer = Background(work)


def songs() -> int:
    """How many songs have ended."""
    return len(here.songs)


def sings() -> bool:
    return here.singer.running


def hush() -> list[float]:
    """Stop, and tell how long each song took."""
    here.quiet.set()
    here.singer.result()
    return here.songs


@contextlib.contextmanager
def undisturbed(canary: Actor, path: str) -> Iterator[Callable[[], None]]:
    """
    Within it, a canary calls; what it is given waits until it has called some more.

    No call takes half as long as closing one slow socket, and at the median it is as quick as ever.
    """

    def some_more(count: int = 10) -> None:
        heard = canary(songs)
        wait_until(lambda: canary(songs) >= heard + count or not canary(sings), timeout=PATIENCE)

    canary(sing, path)
    some_more(30)
    before = canary(songs)
    try:
        yield some_more
        some_more()
    finally:
        times = canary(hush)
    assert max(times) < LINGER / 2, "somebody was held up"
    during = statistics.median(times[before:])
    assert during < 20 * statistics.median(times[:before]) + 0.01


def try_door(path: str, server: int) -> str:
    """Open a door of a uid's and call it; return what came, or the error's name."""
    try:
        with Handle(path, server=[server], open_timeout=0.3) as handle:
            return bytes(handle.call(b"hello", timeout=5).data).decode()
    except Exception as error:
        return type(error).__name__


def few_descriptors_more(server: Actor, before: int) -> None:
    """Wait until a process has no more descriptors than it had, but for a canary's or two."""
    wait_until(lambda: server(descriptors) <= before + 6, "all are closed", timeout=PATIENCE)
