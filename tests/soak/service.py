"""
What the servers of a soak offer, and the processes that they are.

There are two: ``steady``, which stays, so that whatever it leaks adds up; and ``restless``, which is killed,
closed, cut and replaced again and again.  Each offers one object for our own user (pickle) and one for others
(plain data), and a bare function of each kind, the way most calls go.

Every procedure is called with the number of the call first, and writes it into the journal before all else.
"""

from __future__ import annotations

import gc
import io
import itertools
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy
from soak.processes import Forked, complain_of_everything
from support import wait_until
from support.journal import Board, Journal
from support.leaks import Holdings
from support.storm import fresh, left_since, mappings, piece

from doorpool import Endpoint, Limits, Proxy, Server, current_call, take, track

STEADY, RESTLESS = "steady", "restless"

#: Places on the board: whether it is over, how often the restless server was ended in which way, and how many
#: pieces of memory the objects of the steady one take.
OVER = 0
ENDINGS = {"kill": 1, "close": 2, "cut": 3, "take over": 4}
OBJECTS = 5

_COUNTED = 256  # calls, after which these are counted again

PATIENCE = 30.0  # seconds; a call that takes longer hangs
CLOSING = 20.0  # seconds until the last caller is gone, and until nothing is held any more

_GRACEFULLY, _AT_ONCE = b"g", b"a"
_LIFE = 1.5  # seconds for which a server lives, on average
_LENT = b"what is in the file\n" * 50

_LEAK = 100_000  # bytes a call, if that is asked for

Complain = Callable[[str], None]


class Session:
    """What a caller gets for himself: a sum."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._entered = False
        self._sum = 0

    def add(self, number: int, value: int) -> int:
        self._journal.write(number)
        self._sum += value
        return self._sum

    def __enter__(self) -> Session:
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        assert self._entered


class Service:
    """
    The procedures, for callers of either kind.

    Attributes:
        sessions: how many have begun, and not ended.
    """

    codec = "data"

    def __init__(self, journal: Journal, folder: Path, complain: Complain) -> None:
        self._journal = journal
        self._folder = folder
        self._complain = complain
        self._lock = threading.Lock()
        self.sessions = 0

    def echo(self, number: int, text: str) -> str:
        self._journal.write(number)
        return text

    def nap(self, number: int, seconds: float) -> str:
        self._journal.write(number)
        time.sleep(seconds)
        return "slept"

    def hold(self, number: int) -> None:
        """Wait until the caller has given up; there is no event for that, it has to be asked for."""
        self._journal.write(number)
        call, deadline = current_call(), time.monotonic() + PATIENCE
        while not call.cancelled:
            if time.monotonic() > deadline:
                self._complain(f"call {number:#x} was given up by its caller, and that is not seen")
                return
            time.sleep(0.003)

    def fail(self, number: int, text: str) -> None:
        self._journal.write(number)
        raise ValueError(text)

    def turn(self, number: int, data: bytes) -> bytes:
        self._journal.write(number)
        return data[::-1]

    def connect(self, number: int) -> Endpoint:
        """Begin a session, which ends when its caller lets go of it, or is gone."""
        self._journal.write(number)
        return Endpoint(self._begin(), codec=self.codec, on_unref=self._count_down)

    def _begin(self) -> Session:
        with self._lock:
            self.sessions += 1
        return Session(self._journal)

    def _count_down(self) -> None:
        with self._lock:
            self.sessions -= 1

    def call_back(self, number: int, show: Proxy, times: int) -> int:
        self._journal.write(number)
        with show:
            return sum(show(nth) for nth in range(times))

    def count(self, number: int, items: int) -> Any:
        """Return a generator; the call is this one, not the pulls."""
        self._journal.write(number)
        return (nth * 3 for nth in range(items))

    def add_up(self, number: int, items: Any) -> int:
        self._journal.write(number)
        return sum(items)

    def work(self, number: int, steps: int) -> int:
        self._journal.write(number)
        return sum(1 for _ in track(range(steps), "working"))

    def read(self, number: int, file: io.FileIO) -> bytes:
        self._journal.write(number)
        with file:
            file.seek(0)
            return file.read()

    def lend(self, number: int) -> Any:
        self._journal.write(number)
        return take(open(self._folder / "lent", "rb", buffering=0))

    def pass_on(self, number: int) -> Proxy:
        """Return the door of the function beside us, opened here."""
        self._journal.write(number)
        return take(Proxy(self._folder / f"{STEADY}.call.{self.codec}", open_timeout=PATIENCE))


class Ours(Service):
    """What only our own user may call besides: arrays."""

    codec = "pickle"

    def array(self, number: int, size: int, wanted: int, array: Any) -> Any:
        self._journal.write(number)
        nth = number & 0xFFFF_FFFF
        if array.nbytes != size or not numpy.array_equal(array, piece(nth, size)):
            raise AssertionError(f"the array of call {number:#x} has changed on its way")
        return fresh(nth + 1, wanted)


# -- a process of a server


def use_once() -> tuple[Holdings, int]:
    """Use the library, so that it has what it keeps for good, and return what is held then."""
    before = Holdings()
    with Server() as server, Proxy(server.attach(len).open()) as proxy:
        assert proxy(b"four") == 4
    with Endpoint(len) as endpoint, Proxy(endpoint) as proxy:  # of the process's default server
        assert proxy(b"four") == 4
    # What goes a moment later must not count as there: only keepers and gates have these for good.
    wait_until(
        lambda: all("anon_inode:[event" in line for line in Holdings() - before if "thread" not in line)
    )
    gc.collect()
    return Holdings(), mappings()


def serve(
    folder: Path,
    which: str,
    complain: Complain,
    plants: Collection[str],
    replace: bool,
    ready: Callable[[], None],
    orders: int,
) -> None:
    """Serve until there is an order to close, and look at what is left then."""
    complain_of_everything(complain)
    journal = Journal(folder / "journal")
    planted = _Planted(plants, journal, Board(folder / "board") if which == STEADY else None)
    before = use_once()
    services = [Ours(planted, folder, complain), Service(planted, folder, complain)]  # type: ignore[arg-type]
    # A hundred of its clients are of one uid, which would be at the limits for strangers now and then.
    limits = Limits(channels=2_000, descriptors=8_000, greetings=128)
    server = Server(name=which, idle_timeout=2.0, limits=limits)
    for service, mode in zip(services, (0o600, 0o666), strict=True):
        for name, target in (("call", service.echo), ("all", service)):
            path = folder / f"{which}.{name}.{service.codec}"
            server.attach(target, path, mode=mode, codec=service.codec, replace=replace)
    server.start()
    ready()
    order = os.read(orders, 1)
    if order == _GRACEFULLY and which == STEADY:
        _wait_for_the_last(server, services, complain)
    server.close(0 if order == _AT_ONCE else PATIENCE)
    if which == STEADY:
        del services
        for text in left_since(before):
            complain(f"the server has left behind: {text}")


def _wait_for_the_last(server: Server, services: list[Service], complain: Complain) -> None:
    """Wait until all callers are gone, of whom nothing may stay."""

    def left() -> tuple[int, int, int]:
        statistics = server.statistics()
        return statistics.channels, statistics.running, sum(it.sessions for it in services)

    deadline = time.monotonic() + CLOSING
    while any(left()) and time.monotonic() < deadline:
        time.sleep(0.02)
    if any(left()):
        complain("of callers who are gone there are: {} channels, {} calls, {} sessions".format(*left()))


def _passing(held: list[str]) -> list[str]:
    return [line for line in held if "descriptor" in line and "anon_inode:[event" not in line]


class _Planted:
    """A journal that has the faults that were asked for, to show that they are found; and counts objects."""

    def __init__(self, plants: Collection[str], journal: Journal, board: Board | None) -> None:
        self._plants = plants
        self._journal = journal
        self._board = board
        self._calls = itertools.count(1)
        self._kept: list[Any] = []

    def write(self, number: int) -> None:
        call = next(self._calls)
        if self._board is not None and call % _COUNTED == 0:
            self._board[OBJECTS] = sys.getallocatedblocks()
        if "lost" in self._plants and call % 50 == 0:
            return
        self._journal.write(number)
        if "doubled" in self._plants and call % 50 == 1:
            self._journal.write(number)
        if "descriptors" in self._plants and call % 50 == 2:
            self._kept.append(os.dup(0))
        if "threads" in self._plants and call % 50 == 3:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        if "memory" in self._plants:
            self._kept.append(bytearray(b"x" * _LEAK))
        if "objects" in self._plants:
            self._kept += [(call, each) for each in range(20)]


# -- the restless one


def restart(
    folder: Path, complain: Complain, rng: random.Random, ready: Callable[[], None], orders: int
) -> None:
    """
    Keep a restless server, end it at random moments, and start the next, until it is over.

    kill        as ``kill -9`` does; now and then before it has begun to serve
    close       in an orderly way; then comes the next one
    cut         likewise, without waiting for running calls
    take over   the next one takes its name first, and then it is closed
    """
    board = Board(folder / "board")

    def start(replace: bool = False) -> Forked:
        return Forked(
            "a restless server",
            lambda ready, orders: serve(folder, RESTLESS, complain, (), replace, ready, orders),
        )

    server = start()
    server.wait_ready(PATIENCE)
    ready()
    while not board[OVER]:
        ending = rng.choice(list(ENDINGS))
        server = _next(server, ending, start, rng)
        board[ENDINGS[ending]] += 1
    server.wait_ready(PATIENCE)
    os.read(orders, 1)
    server.order(_GRACEFULLY)
    server.wait(PATIENCE)


def _next(server: Forked, ending: str, start: Callable[..., Forked], rng: random.Random) -> Forked:
    if ending == "kill" and rng.random() < 0.1:
        time.sleep(rng.uniform(0, 0.01))
        server.kill()
        return start()
    server.wait_ready(PATIENCE)
    time.sleep(min(3 * _LIFE, rng.expovariate(1 / _LIFE)))
    if ending == "kill":
        server.kill()
        return start()
    follower = start(replace=True) if ending == "take over" else None
    if follower is not None:
        follower.wait_ready(PATIENCE)
    server.order(_AT_ONCE if ending == "cut" else _GRACEFULLY)
    server.wait(2 * PATIENCE)
    return follower or start()
