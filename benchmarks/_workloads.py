"""
What is called, how it is timed, and what doorpool has to reach.

A *workload* is a procedure, and a way to take turns at calling it.  Its *rows* are what is read off the
samples; a row has *bars*.  A bar is judged in one placement, on the median of what it says of each
round, so a change of the machine's speed meets both sides of a ratio.
"""

from __future__ import annotations

import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, lru_cache
from itertools import count, islice
from threading import Barrier, Thread
from typing import Any

import attrs

from benchmarks import _floors, _machine, _peers
from benchmarks._peers import Call, Peer, Procedure, Round, Service, Turn, Unavailable

# -- bars ------------------------------------------------------------------------------------------


@attrs.frozen
class Bar:
    """
    What has to be reached: a value, or the ratio of two measured in the same round.
    """

    text: str
    placement: str
    over: str
    """The key of the peer whose value is judged, or stands above the fraction bar."""
    under: str = ""
    """The one whose value stands below it; empty: no ratio."""
    at_least: float = float("-inf")
    at_most: float = float("inf")

    def measured(self, rounds: Mapping[str, Sequence[float]]) -> float | None:
        """Return the median over the rounds; None if somebody is missing."""
        if not rounds.get(self.over) or (self.under and not rounds.get(self.under)):
            return None
        if not self.under:
            return statistics.median(rounds[self.over])
        pairs = zip(rounds[self.over], rounds[self.under], strict=True)
        return statistics.median(over / under for over, under in pairs)

    def met(self, measured: float) -> bool:
        """Say whether it is reached."""
        return self.at_least <= measured <= self.at_most


# -- rows ------------------------------------------------------------------------------------------


Statistic = Callable[[Sequence[float]], float]


def p50(samples: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(samples)


def p99(samples: Sequence[float]) -> float:
    """Return the 99th percentile, the greater neighbour where it falls between two."""
    return sorted(samples)[min(len(samples) - 1, len(samples) * 99 // 100)]


@attrs.frozen
class Row:
    """
    One line of numbers: what is read off the samples of a round.
    """

    title: str
    unit: str
    read: Statistic
    bars: tuple[Bar, ...] = ()
    only: tuple[str, ...] = ()
    """The peers that it is about; empty: all."""


def _scaled(statistic: Statistic, factor: float) -> Statistic:
    return lambda samples: statistic(samples) * factor


def _us(title: str, *bars: Bar, statistic: Statistic = p50, only: tuple[str, ...] = ()) -> Row:
    return Row(title, "µs", _scaled(statistic, 1e6), bars, only)


def _ms(title: str, *bars: Bar) -> Row:
    return Row(title, "ms", _scaled(p50, 1e3), bars)


# -- procedures ------------------------------------------------------------------------------------


def add(a: int, b: int) -> int:
    """Return the sum: as little work as a call can do."""
    return a + b


def length(record: dict[str, object]) -> int:
    """Return how many fields a record has."""
    return len(record)


def echo(data: bytes) -> bytes:
    """Return what came."""
    return data


def total(array: Any) -> float:
    """Return the sum of an array."""
    return float(array.sum())


_filled: list[Any] = []


def give(what: str, length: int) -> Any:
    """
    Return an array: one that is there for good, or the one that was filled in a call before.
    """
    if what == "array":
        return _array(length)
    if what == "fill":
        _filled.append(_fresh(length))
        return None
    return _filled.pop()


def nap(seconds: float) -> None:
    """Do nothing, for a while."""
    time.sleep(seconds)


LINES = 100_000


def _count_up() -> Iterator[int]:
    yield from count()


@cache
def _log() -> Any:
    log = tempfile.TemporaryFile("w")  # noqa: SIM115 - there for as long as the process
    log.writelines(f"{n:07} a line of the log, say\n" for n in range(LINES))
    log.flush()
    return log


def _read_log() -> Iterator[str]:
    """Return the lines of a log, which begins anew at its end."""
    with open(f"/proc/self/fd/{_log().fileno()}") as log:
        while log.seek(0) == 0:
            yield from log


@cache
def _endless(make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    return make()


def numbers(many: int = 0) -> Any:
    """Return so many numbers, as an iterator, or one."""
    return islice(_count_up(), many) if many else next(_endless(_count_up))


def lines(many: int = 0) -> Any:
    """Return so many lines of a file, as an iterator, or one."""
    return islice(_read_log(), many) if many else next(_endless(_read_log))


@lru_cache(1)
def _array(length: int) -> Any:
    import numpy

    return numpy.arange(length, dtype=numpy.float64)


def _fresh(length: int) -> Any:
    """Return a filled array in memory that crosses as it is."""
    import doorpool

    if not hasattr(doorpool, "empty"):
        raise Unavailable("there is no doorpool.empty")
    array = doorpool.empty((length,), "float64")
    array[:] = _array(length)
    return array


# -- taking turns ------------------------------------------------------------------------------------


@attrs.frozen
class Side:
    """
    The calling side, in a process of its own.
    """

    peer: Peer
    service: Service
    array_length: int

    def connect(self) -> AbstractContextManager[Call]:
        """Open a client."""
        return self.peer.connect(self.service)


Drive = Callable[[Side], AbstractContextManager[Round]]
Step = Callable[[], Any]


def _time(call: Step, turn: Turn, prepare: Step | None = None) -> list[float]:
    """Time calls until there are enough, or no time is left; each after a preparation that is not timed."""
    clock, times = time.perf_counter, []
    end = clock() + turn.seconds
    for _ in range(turn.calls):
        if prepare is not None:
            prepare()
        start = clock()
        result = call()
        stop = clock()
        del result  # what it holds is let go before the next call, as a user would
        times.append(stop - start)
        if stop >= end:
            break
    return times


def _warm_and_time(call: Step, turn: Turn, prepare: Step | None = None) -> list[float]:
    """Time calls after some that do not count: at the end of others' turns nothing is in a cache."""
    few = attrs.evolve(turn, calls=1 + turn.calls // 10, seconds=turn.seconds / 10)
    _time(call, few, prepare)
    return _time(call, turn, prepare)


def _expect(result: object, expected: object) -> None:
    if result != expected:
        raise AssertionError(f"wrong result: {result!r:.100}, expected {expected!r:.100}")


def _calls(args: Callable[[], tuple[Any, ...]], expected: Callable[..., Any], pause: float = 0.0) -> Drive:
    """Call with the same arguments again and again, at once or after a pause each time."""

    @contextmanager
    def drive(side: Side) -> Iterator[Round]:
        with side.connect() as call:
            given = args()
            _expect(call(*given), expected(*given))
            prepare = (lambda: time.sleep(pause)) if pause else None
            yield lambda turn: _warm_and_time(_bound(call, given), turn, prepare)

    return drive


def _bound(call: Call, args: tuple[Any, ...]) -> Step:
    """Return a function that calls with these arguments; a lambda costs less than `partial` of a `*`."""
    if len(args) == 2:
        first, second = args
        return lambda: call(first, second)
    (only,) = args
    return lambda: call(only)


@contextmanager
def _pass_array(side: Side) -> Iterator[Round]:
    """Pass an array; one from `doorpool.empty` is made and filled anew each time, which is not timed."""
    length, empty = side.array_length, side.peer.empty
    with side.connect() as call:
        arrays = [_fresh(length) if empty else _array(length)]

        def renew() -> None:
            arrays[0] = None
            arrays[0] = _fresh(length)

        _expect(call(arrays[0]), length * (length - 1) / 2)
        yield lambda turn: _warm_and_time(lambda: call(arrays[0]), turn, renew if empty else None)


@contextmanager
def _get_array(side: Side) -> Iterator[Round]:
    """Get an array that is there; one from `doorpool.empty` is filled in a call before, not timed."""
    length = side.array_length
    with side.connect() as call:

        def fill() -> None:
            call("fill", length)

        what, prepare = ("filled", fill) if side.peer.empty else ("array", None)
        if prepare is not None:
            prepare()
        _expect(call(what, length).sum(), length * (length - 1) / 2)
        yield lambda turn: _warm_and_time(lambda: call(what, length), turn, prepare)


@contextmanager
def _count(side: Side) -> Iterator[Round]:
    """Call as often as a time allows, along with others; a sample is calls per second."""
    with side.connect() as call:
        _expect(call(1, 2), 3)

        def take(turn: Turn) -> list[float]:
            clock, count = time.monotonic, 0
            time.sleep(max(0.0, turn.start - clock()))
            end = turn.start + turn.seconds
            while (now := clock()) < end:
                call(1, 2)
                count += 1
            return [count / (now - turn.start)]

        yield take


@contextmanager
def _open_call_close(side: Side) -> Iterator[Round]:
    def once() -> None:
        with side.connect() as call:
            call(1, 2)

    once()
    yield lambda turn: _warm_and_time(once, turn)


THREADS = 64
NAP = 0.1  # seconds


@contextmanager
def _call_in_threads(side: Side) -> Iterator[Round]:
    """Call in many threads at once; a sample is the time from the first call to the last return."""
    with ExitStack() as stack:
        shared = stack.enter_context(side.connect()) if side.peer.shared else None
        yield lambda turn: [_one_crowd(side, shared)]


def _one_crowd(side: Side, shared: Call | None) -> float:
    ready, spans = Barrier(THREADS), []

    def run() -> None:
        with nullcontext(shared) if shared else side.connect() as call:
            call(0)
            ready.wait(30)
            start = time.perf_counter()
            call(NAP)
            spans.append((start, time.perf_counter()))

    threads = [Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _expect(len(spans), THREADS)
    return max(stop for _, stop in spans) - min(start for start, _ in spans)


_ITEMS_A_CALL = 100  # so many items are taken from a stream for each that is called for


@contextmanager
def _take_items(side: Side) -> Iterator[Round]:
    """Go through many items, as one stream or by a call each; a sample is the time of one item."""
    with side.connect() as call:
        call()

        def by_stream(turn: Turn) -> list[float]:
            begun, items = time.perf_counter(), 0
            for _ in call(turn.calls):
                items += 1
            spent = time.perf_counter() - begun
            _expect(items, turn.calls)
            return [spent / items]

        def by_calls(turn: Turn) -> list[float]:
            several = turn.calls // _ITEMS_A_CALL
            begun = time.perf_counter()
            for _ in range(several):
                call()
            return [(time.perf_counter() - begun) / several]

        yield by_stream if side.peer.streams else by_calls


IDLE = 100


@contextmanager
def _grow(side: Side) -> Iterator[Round]:
    """
    Open idle clients, each of which has called once; the samples are by how much the server has grown.

    It is compared with what it was when it had one client, before the first turn: what it does not give
    back between turns counts as well.
    """
    with side.connect() as call:
        call(1, 2)
        before = _machine.held_by(side.service.pid)

        def take(turn: Turn) -> list[float]:
            with ExitStack() as stack:
                for _ in range(IDLE):
                    stack.enter_context(side.connect())(1, 2)
                now = _machine.held_by(side.service.pid)
            return [float(new - old) for new, old in zip(now, before, strict=True)]

        yield take


# -- the workloads -----------------------------------------------------------------------------------


@attrs.frozen
class Workload:
    """
    A procedure, how it is called, and what is read off the samples.
    """

    key: str
    procedure: Procedure
    drive: Drive
    rows: tuple[Row, ...]
    calls: int
    """Timed calls of a turn, at most; 1 where a turn gives one sample."""
    seconds: float
    """What a turn may take."""
    rounds: int
    clients: int = 1
    """Client processes; their samples of a turn are added up."""
    extra: tuple[Peer, ...] = ()
    """Floors, and variants of doorpool, that only this workload has."""
    alone: bool = False
    """Whether nobody else is measured at it."""


def _record() -> dict[str, object]:
    """Return a dict whose pickle has 1 KiB, give or take a field."""
    record: dict[str, object] = {"name": "a record", "tags": ["one", "two"], "valid": True}
    while len(pickle.dumps(record, 5)) < 1024:
        record[f"field {len(record):02}"] = len(record) * 1.5
    return record


MEBIBYTE = 1 << 20


def _payload() -> tuple[bytes]:
    return (bytes(range(256)) * (MEBIBYTE // 256),)


def _gigabytes_per_second(samples: Sequence[float]) -> float:
    """Return the payload that crosses in a round trip, there and back, by the time of one."""
    return 2 * MEBIBYTE / p50(samples) / 1e9


_NULL = Workload(
    "null",
    add,
    _calls(lambda: (1, 2), add),
    (
        _us(
            "null call add(1, 2), p50",
            Bar("manager >= 12x", "two", "manager", "doorpool", at_least=12),
            Bar("iceoryx2 busy-poll >= 3x", "two", "iceoryx2-busy", "doorpool", at_least=3),
            Bar("manager >= 2.2x", "one", "manager", "doorpool", at_least=2.2),
            Bar("<= 0.8x raw", "one", "doorpool", "raw", at_most=0.8),
        ),
        _us(
            "null call add(1, 2), p99",
            Bar("<= 0.35x the manager's", "two", "doorpool", "manager", at_most=0.35),
            statistic=p99,
        ),
        # The path of calls before there was shared memory is not there to be measured any more.  On one
        # CPU it took 0.95 of what a manager took in the same run: to that ratio the twin is held.
        _us(
            "the Python twin, null call, p50",
            Bar("no slower than sockets: <= 0.95x manager", "one", "doorpool-py", "manager", at_most=0.95),
            only=("doorpool-py", "manager"),
        ),
    ),
    calls=500,
    seconds=0.3,
    rounds=20,
    extra=(_peers.DOORPOOL_PY, _floors.SOCKET, _floors.SPIN, _floors.PICKLE),
)

_SPARSE = Workload(
    "sparse",
    add,
    _calls(lambda: (1, 2), add, pause=0.002),
    (
        _us(
            "sparse null call (one each 2 ms), p50",
            Bar("<= 1.15x raw", "two", "doorpool", "raw", at_most=1.15),
            Bar("<= 1.15x raw", "one", "doorpool", "raw", at_most=1.15),
        ),
    ),
    calls=50,
    seconds=0.3,
    rounds=10,
)

_DICT = Workload(
    "dict",
    length,
    _calls(lambda: (_record(),), length),
    (_us("1 KiB dict argument, p50", Bar("<= 0.4x raw", "two", "doorpool", "raw", at_most=0.4)),),
    calls=300,
    seconds=0.3,
    rounds=10,
    extra=(_floors.PICKLE,),
)

_ECHO = Workload(
    "echo",
    echo,
    _calls(_payload, echo),
    (
        Row(
            "echo of 1 MiB bytes, payload both ways",
            "GB/s",
            _gigabytes_per_second,
            (
                Bar(">= 5 GB/s", "two", "doorpool", at_least=5),
                Bar(">= 5 GB/s if counted one way: 10", "two", "doorpool", at_least=10),
                Bar(">= 2.5x zmq", "two", "doorpool", "zmq", at_least=2.5),
            ),
        ),
    ),
    calls=30,
    seconds=0.3,
    rounds=10,
)

_ARGUMENT = Workload(
    "argument",
    total,
    _pass_array,
    (
        _ms(
            "{array} float64 argument, returns its sum",
            Bar("<= 1.15x the floor", "two", "doorpool", "floor-copy-sum", at_most=1.15),
            Bar(
                "from doorpool.empty <= 1.15x the sum alone",
                "two",
                "doorpool-empty",
                "floor-sum",
                at_most=1.15,
            ),
        ),
    ),
    calls=5,
    seconds=0.4,
    rounds=7,
    extra=(_peers.DOORPOOL_EMPTY, _floors.COPY_AND_SUM, _floors.SUM),
)

_RETURNED = Workload(
    "returned",
    give,
    _get_array,
    (
        _ms(
            "{array} array returned",
            Bar("<= 1.2x the floor", "two", "doorpool", "floor-copy", at_most=1.2),
            Bar("from doorpool.empty <= 1 ms", "two", "doorpool-empty", at_most=1),
        ),
    ),
    calls=5,
    seconds=0.4,
    rounds=7,
    extra=(_peers.DOORPOOL_EMPTY, _floors.COPY),
)

_CLIENTS = Workload(
    "clients",
    add,
    _count,
    (
        Row(
            "4 client processes at once",
            "calls/s",
            p50,
            (Bar(">= 3x the manager", "two", "doorpool", "manager", at_least=3),),
        ),
    ),
    calls=1,
    seconds=0.3,
    rounds=7,
    clients=4,
)

_OPEN = Workload(
    "open",
    add,
    _open_call_close,
    (
        _ms(
            "new client: open, first call, close",
            Bar("<= 0.8x multiprocessing.connection", "two", "doorpool", "connection", at_most=0.8),
        ),
    ),
    calls=50,
    seconds=0.3,
    rounds=10,
)

_THREADED = Workload(
    "threads",
    nap,
    _call_in_threads,
    (
        Row(
            f"{THREADS} threads, procedure sleeps {NAP} s",
            "s",
            p50,
            (Bar("<= 0.13 s", "two", "doorpool", at_most=0.13),),
        ),
    ),
    calls=1,
    seconds=1.0,
    rounds=5,
)

_MEMORY = Workload(
    "memory",
    add,
    _grow,
    (
        Row(
            f"server memory per {IDLE} idle clients, PSS",
            "MB",
            lambda samples: samples[0] / 1e6,
            (Bar("<= 3 MB", "two", "doorpool", at_most=3),),
        ),
        Row(
            f"server memory per {IDLE} idle clients, USS",
            "MB",
            lambda samples: samples[1] / 1e6,
            (Bar("<= 3 MB", "two", "doorpool", at_most=3),),
        ),
    ),
    calls=1,
    seconds=1.0,
    rounds=3,
)


def _items(key: str, procedure: Procedure) -> Workload:
    return Workload(
        key,
        procedure,
        _take_items,
        (
            _us(
                f"an item of a million {key}",
                Bar("as a stream >= 15x a call each", "two", "doorpool", "doorpool-stream", at_least=15),
            ),
        ),
        calls=1_000_000,
        seconds=0.5,
        rounds=7,
        extra=(_peers.DOORPOOL_STREAM,),
        alone=True,
    )


WORKLOADS = (
    _NULL,
    _SPARSE,
    _DICT,
    _ECHO,
    _ARGUMENT,
    _RETURNED,
    _CLIENTS,
    _OPEN,
    _THREADED,
    _MEMORY,
    _items("numbers", numbers),
    _items("lines", lines),
)
