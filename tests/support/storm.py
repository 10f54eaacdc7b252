"""
A storm of kills: one side is killed again and again, at random points, while arrays cross.

The *nest* forks the victims: the interpreter, NumPy and the library are there already, and it has
never a server or a proxy of its own.  The *survivor* is one process for the whole storm.

Every array is a piece of one pattern, so that its number and size say what each byte must be.  Some
arrays lie in ``doorpool.empty``; some are kept, by the procedure or by the caller, and compared again
when they are dropped.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy

import doorpool
from doorpool import DoorError, Proxy, Server
from support.journal import DID_NOT_RUN, MAY_HAVE_RUN, RESULT, Board, Journal
from support.leaks import Holdings, at_rest

LARGEST = 3 << 20  # bytes of an array
SIZES = (0, 100, 20_000, 60_000, 70_000, 300_000, 1 << 20, LARGEST)
_WEIGHTS = (8, 8, 4, 2, 4, 4, 2, 1)  # mostly what goes by the page

PATIENCE = 20.0  # seconds; a call that takes longer hangs
THREADS = 3
_OVER = 0  # place on the board
_WARM = 10  # calls until a victim may die: by then its channels have pages
_LIFE = 0.03  # seconds for which it then lives on, at most
_EARLY = 0.1  # how often it dies before it is warm
_BREATH = 0.001  # seconds for which a caller leaves the processor to the server that is to come
_KEPT = 24  # arrays

_pattern = numpy.random.default_rng(4).integers(0, 256, LARGEST + 4096, numpy.uint8)

Array = Any


# -- arrays


def piece(number: int, size: int) -> Array:
    """The array of this number and size; not to be written to."""
    start = number * 2_654_435_761 % 4096
    return _pattern[start : start + size]


def fresh(number: int, size: int) -> Array:
    """The same, in memory of its own: every other time in that of ``doorpool.empty``."""
    if random.random() < 0.5:
        return piece(number, size).copy()
    array = doorpool.empty(size, numpy.uint8)
    array[:] = piece(number, size)
    return array


def check(array: Array, number: int, size: int, what: str) -> None:
    assert array.nbytes == size, f"{what} {number} has {array.nbytes} bytes, not {size}"
    assert numpy.array_equal(array, piece(number, size)), f"{what} {number} of {size} bytes has changed"


class Kept:
    """Arrays that are kept for a while; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: list[tuple[Array, int, int, str]] = []

    def maybe(self, *entry: Any) -> None:
        """Keep an array, as ``check`` takes it, one time in four; then another may be dropped."""
        if random.random() < 0.75:
            return
        with self._lock:
            self._arrays.append(entry)
            if len(self._arrays) <= _KEPT:
                return
            dropped = self._arrays.pop(random.randrange(_KEPT))
        check(*dropped)

    def drop_all(self) -> int:
        """Compare all that is kept and drop it; return how many these were."""
        with self._lock:
            arrays, self._arrays = self._arrays, []
        for entry in arrays:
            check(*entry)
        return len(arrays)


# -- what a survivor has


def mappings() -> int:
    """How many pages and segments are mapped here."""
    with open("/proc/self/maps") as file:
        return sum("/memfd:doorpool" in line for line in file)


def left_since(before: tuple[Holdings, int]) -> list[str]:
    """Wait until no more is held than before, and say what is all the same."""
    holdings, mapped = before
    left = Holdings.left_since(holdings, 5.0)
    deadline = time.monotonic() + 5.0
    while mappings() > mapped and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    if mappings() > mapped:
        left.append(f"{mappings()} mappings, and {mapped} before")
    return left


# -- the server


class Procedure:
    """Compare the argument, an array of so many bytes, and return one of as many as are wanted."""

    def __init__(self, journal: Journal, warm: Callable[[], None] = lambda: None) -> None:
        self.kept = Kept()
        self._journal = journal
        self._warm = warm
        self._calls = itertools.count(1)

    def __call__(self, number: int, size: int, wanted: int, array: Array) -> Array:
        self._journal.write(number)
        check(array, number, size, "argument")
        self.kept.maybe(array, number, size, "kept argument")
        if next(self._calls) == _WARM:
            self._warm()
        if random.random() < 0.2:
            time.sleep(random.uniform(0, 0.003))  # so that more calls are running when it ends
        if wanted == size and number % 2:
            return array if number % 4 == 1 else piece(number, size)
        result = fresh(number, wanted)
        self.kept.maybe(result, number, wanted, "kept result of the procedure")
        return result


def survive_as_server(folder: str, ready: Callable[[], None]) -> dict[str, Any]:
    """Serve ``storm.door`` until SIGTERM; say what was left then."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with Journal(f"{folder}/journal") as journal:
        procedure = Procedure(journal)
        with _base() as before, Server(idle_timeout=0.05) as server:
            server.attach(procedure, f"{folder}/storm.door")
            ready()
            signal.sigwait({signal.SIGTERM})
            deadline = time.monotonic() + PATIENCE  # the kernel says when a caller is gone
            while server.statistics().channels and time.monotonic() < deadline:
                time.sleep(0.01)
            channels = server.statistics().channels
            kept = procedure.kept.drop_all()
            gc.collect()
            mapped = mappings()
        return {"left": left_since(before), "kept": kept, "channels": channels, "mapped": mapped}


@contextlib.contextmanager
def _base() -> Iterator[tuple[Holdings, int]]:
    """What is held when the library has been used once, and has its keeper and its caches."""
    with Server() as server, Proxy(server.attach(len).open()) as proxy:
        assert proxy(b"four") == 4
    at_rest(lambda: (Holdings().descriptors, mappings()))
    yield Holdings(), mappings()


# -- the caller


class Caller:
    """Make one call after the other, and compare what comes back."""

    def __init__(self, proxy: Proxy) -> None:
        self.kept = Kept()
        self._proxy = proxy

    def call(self, number: int) -> None:
        size, wanted = random.choices(SIZES, _WEIGHTS, k=2)
        argument = fresh(number, size)
        self.kept.maybe(argument, number, size, "kept argument of the caller")
        result = self._proxy(number, size, wanted, argument)
        check(result, number, wanted, "result")
        self.kept.maybe(result, number, wanted, "kept result")


def survive_as_client(folder: str) -> dict[str, Any]:
    """
    Call servers that are killed, until the storm is over.

    Returns:
        ``told``: how each call ended; ``killed``: the error of each that failed; ``kept``: how many arrays
        were kept to the end; ``left``: what was held then and not before.
    """
    board = Board(f"{folder}/board")
    told: list[tuple[int, str]] = []
    killed: list[str] = []
    with _base() as before:
        kept = _call_until_over(folder, board, told, killed)
        left = left_since(before)
    board.close()
    return {"told": told, "killed": killed, "kept": kept, "left": left}


def _call_until_over(folder: str, board: Board, told: list[tuple[int, str]], killed: list[str]) -> int:
    numbers = itertools.count(1)
    with Proxy(f"{folder}/storm.door", wait=PATIENCE, timeout=PATIENCE) as proxy:
        caller = Caller(proxy)

        def work() -> None:
            while not board[_OVER]:
                number = next(numbers)
                told.append((number, _told(caller, number, killed)))

        with ThreadPoolExecutor(THREADS) as pool:
            for done in [pool.submit(work) for _ in range(THREADS)]:
                done.result()
        return caller.kept.drop_all()


def _told(caller: Caller, number: int, killed: list[str]) -> str:
    try:
        caller.call(number)
        return RESULT
    except DoorError as error:
        killed.append(type(error).__name__)
        time.sleep(_BREATH)
        return MAY_HAVE_RUN if error.may_have_run else DID_NOT_RUN


# -- the nest


class Victim:
    """A forked child that is killed."""

    def __init__(self, role: Callable[..., None], *args: Any) -> None:
        self._warm, warm = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._warm)
            _be(role, warm, *args)
        os.close(warm)

    def wait_warm(self) -> None:
        assert os.read(self._warm, 1), "the victim has ended by itself"

    def kill(self) -> None:
        """Kill it; it must not have ended by itself, as who sees a wrong byte does."""
        os.kill(self._pid, signal.SIGKILL)
        os.close(self._warm)
        ended = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        assert ended == -signal.SIGKILL, f"the victim has ended by itself: {ended}"


def _be(role: Callable[..., None], warm: int, *args: Any) -> NoReturn:
    try:
        role(lambda: os.write(warm, b"."), *args)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def kill_servers(folder: str, kills: int, ready: Callable[[], None]) -> None:
    """Kill as many servers of ``storm.door``; the last one that follows serves until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    board = Board(f"{folder}/board")
    victim = Victim(_serve, folder)
    ready()
    for _ in range(kills):
        _strike(victim)
        victim = Victim(_serve, folder)
    victim.wait_warm()
    board[_OVER] = 1
    signal.sigwait({signal.SIGTERM})
    victim.kill()


def kill_clients(folder: str, kills: int) -> None:
    """Kill as many clients of ``storm.door``."""
    for nth in range(1, kills + 1):
        _strike(Victim(_call, folder, nth << 32))


def _strike(victim: Victim) -> None:
    if random.random() < _EARLY:
        time.sleep(random.uniform(0, 0.01))
    else:
        victim.wait_warm()
        time.sleep(random.uniform(0, _LIFE))
    victim.kill()


def _serve(warm: Callable[[], None], folder: str) -> None:
    server = Server()
    server.attach(Procedure(Journal(f"{folder}/journal"), warm), f"{folder}/storm.door")
    server.start()
    signal.pause()


def _call(warm: Callable[[], None], folder: str, first: int) -> None:
    """Call until killed; two more journals say which calls were begun, and which went well."""
    begun, done = Journal(f"{folder}/begun"), Journal(f"{folder}/done")
    caller = Caller(Proxy(f"{folder}/storm.door", timeout=PATIENCE))
    numbers = itertools.count(first)

    def work() -> None:
        while True:
            number = next(numbers)
            begun.write(number)
            caller.call(number)
            done.write(number)
            if number == first + _WARM:
                warm()

    with ThreadPoolExecutor(THREADS) as pool:
        for ended in [pool.submit(work) for _ in range(THREADS)]:
            ended.add_done_callback(_die_of)


def _die_of(ended: Any) -> None:
    traceback.print_exception(ended.exception())
    os._exit(1)
