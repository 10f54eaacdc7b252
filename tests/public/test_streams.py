"""
Streams: iterators as results and arguments, what is read ahead, and what ends them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import queue
import signal
import socket
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import pytest
from support import wait_until
from support.rawdoor import Background

from doorpool import (
    BrokenDoorError,
    CallTimeoutError,
    ClosedError,
    DoorError,
    Endpoint,
    MarshalError,
    ProtocolError,
    Proxy,
    RemoteError,
    RevokedError,
    current_call,
)
from doorpool import _streams as streams
from doorpool._data import Plan

PATIENCE = 20.0

SERVER = """
    import os, threading, time
    from doorpool import Server

    server = Server()
    seen = []
    go = threading.Event()

    def endpoint(function, **options):
        server.attach(function, function.__name__ + ".door", **options)
        return function

    @endpoint
    def count(n):
        try:
            for number in range(n):
                seen.append(number)
                yield number
            return "counted"
        finally:
            seen.append("finally")

    @endpoint
    def numbers(n):
        for number in range(n):
            yield number

    @endpoint
    def add(a):
        return a + 1

    @endpoint
    def look():
        return list(seen)

    @endpoint
    def forget():
        seen.clear()

    @endpoint
    def raises_after(n):
        yield from range(n)
        raise KeyError("colour")

    @endpoint
    def slow():
        yield "first"
        go.wait(60)
        yield "second"

    @endpoint
    def bursts():
        for burst in range(3):
            for number in range(100):
                yield burst, number
            go.wait(60)
            go.clear()

    @endpoint
    def release():
        go.set()

    @endpoint
    def stuck(n):
        try:
            yield from range(n)
            threading.Event().wait(60)
        finally:
            seen.append("finally")

    @endpoint
    def blocks(size, n):
        for number in range(n):
            seen.append(number)
            yield bytes([number]) * size

    @endpoint
    def add_up(numbers):
        return sum(numbers)

    @endpoint
    def first(numbers, how_many):
        return [next(numbers) for _ in range(how_many)]

    kept = []

    @endpoint
    def keep(numbers):
        kept.append(numbers)
        return next(numbers)

    @endpoint
    def drop():
        kept.clear()

    @endpoint
    def boxed():
        return {"a": [(n for n in range(5)), map(str, range(3))], "b": (x for x in "xyz")}

    @endpoint
    def files(n):
        for number in range(n):
            read, write = os.pipe()
            os.write(write, b"%d" % number)
            os.close(write)
            with open(read, "rb") as file:
                yield file

    @endpoint
    def wrong_at(n):
        try:
            for number in range(100):
                yield threading.Lock() if number == n else number
        finally:
            seen.append("finally")

    @endpoint
    def thread():
        from doorpool import current_call
        yield current_call().caller.pid
        yield current_call().endpoint.name

    @endpoint
    def fds():
        import gc
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def plain(n):
        yield from ({"n": i, "text": "x" * i} for i in range(n))

    server.attach(plain, "plain.door", codec="data")
    server.attach(lambda it: sum(it), "plain_sum.door", codec="data")

    with server:
        ready()
        server.run()
"""


@pytest.fixture
def far(spawn_server, door_dir, closing) -> Callable[..., Proxy]:
    """Proxies of the doors of a server that is another process."""
    child = spawn_server(SERVER, cwd=door_dir)

    def reach(name: str, **options: Any) -> Proxy:
        return closing.enter_context(Proxy(door_dir / f"{name}.door", **({"timeout": PATIENCE} | options)))

    reach.child = child  # type: ignore[attr-defined]
    return reach


def saw_the_end(far: Callable[..., Proxy]) -> None:
    wait_until(lambda: far("look")()[-1:] == ["finally"], timeout=PATIENCE)


# -- what arrives


def test_items_arrive_in_order(far):
    stream = far("count")(10_000)
    assert iter(stream) is not None
    assert isinstance(stream, Iterator)
    assert list(stream) == list(range(10_000))
    assert list(stream) == []
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize(
    "n", [0, 1, 2, 3, streams._ITEMS - 1, streams._ITEMS, streams._ITEMS + 1, 3 * streams._ITEMS]
)
def test_a_stream_of_any_length(far, n):
    assert list(far("count")(n)) == list(range(n))


def test_what_a_generator_returns_is_the_value_of_yield_from(far):
    def outer() -> Any:
        got.append((yield from far("count")(5)))

    got: list[Any] = []
    assert list(outer()) == [0, 1, 2, 3, 4]
    assert got == ["counted"]


def test_next_tells_what_a_generator_returned_once(far):
    stream = far("count")(1)
    assert next(stream) == 0
    with pytest.raises(StopIteration) as ended:
        next(stream)
    assert ended.value.value == "counted"
    with pytest.raises(StopIteration) as ended:
        next(stream)
    assert ended.value.value is None


def test_loops_and_next_take_from_the_same_items(far):
    stream = far("count")(100)
    got = []
    for item in stream:
        got.append(item)
        if len(got) == 10:
            break
    got.append(next(stream))
    got.extend(itertools.islice(stream, 20))
    assert got == list(range(31))
    assert list(stream) == list(range(31, 100))


def test_streams_inside_of_something(far):
    got = far("boxed")()
    assert list(got["a"][1]) == ["0", "1", "2"]
    assert list(got["a"][0]) == [0, 1, 2, 3, 4]
    assert list(got["b"]) == ["x", "y", "z"]


class Own:
    """An iterator of a user's class."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Own:
        return self

    def __next__(self) -> int:
        if not self.n:
            raise StopIteration
        self.n -= 1
        return self.n


class Says(Own):
    """One that says how it is to be pickled."""

    def __reduce__(self) -> Any:
        return Says, (self.n,)


STREAMS: dict[str, Callable[[], Any]] = {
    "generator": lambda: (x for x in (1, 2)),
    "map": lambda: map(abs, [-1, -2]),
    "filter": lambda: filter(None, [0, 1, 2]),
    "zip": lambda: zip([1], [2], strict=True),
    "enumerate": lambda: enumerate("ab"),
    "callable": lambda: iter(iter([1, 2, 3]).__next__, 3),
    "count": lambda: itertools.islice(itertools.count(), 3),
    "chain": lambda: itertools.chain([1], [2]),
    "tee": lambda: itertools.tee([1, 2])[0],
    "groups": lambda: map(str, itertools.groupby([])),
    "of a class": lambda: Own(3),
    "scandir": lambda: (entry.name for entry in os.scandir("/sys/class")),
}


class Methods:
    """What doors may lead to: a method and a ``__call__`` that are generator functions."""

    def items(self) -> Iterator[int]:
        yield 1

    def __call__(self) -> Iterator[int]:
        yield 2


def test_generator_functions_may_be_offered(serve, connect):
    serve(Methods())
    with connect() as it:
        assert list(it.items()) == [1]
        assert list(it()) == [2]
    serve(Methods().items, "method.door")


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_is_a_stream_both_ways(serve, connect, make):
    arguments = []

    def give(it: Any) -> Any:
        arguments.append(type(it))
        return make(), list(it)

    serve(give)
    got, listed = connect()(make())
    assert arguments == [streams.Stream]
    assert type(got) is streams.Stream
    assert listed == list(got) == list(make())


@pytest.mark.parametrize(
    "value",
    [iter([1, 2]), iter((1, 2)), iter({1: 2}), iter(range(2)), Says(2)],
    ids=lambda it: type(it).__name__,
)
def test_is_a_value(serve, connect, value):
    serve(lambda it: it)
    got = connect()(value)
    assert type(got) is not streams.Stream
    assert len(list(got)) == len(list(value))


def test_a_stream_may_be_passed_on(serve, connect, far):
    serve(lambda it: it)
    stream = far("count")(1000)
    assert [next(stream), next(stream)] == [0, 1]
    assert list(connect()(stream)) == list(range(2, 1000))


def test_files_as_items_leave_no_descriptors(far):
    fds, files = far("fds"), far("files")

    def read_all(n: int) -> None:
        for number, file in enumerate(files(n)):
            with file:
                assert file.read() == b"%d" % number

    read_all(5)
    here, there, slack = len(os.listdir("/proc/self/fd")), fds(), 5
    read_all(600)
    wait_until(lambda: fds() <= there + slack, timeout=PATIENCE)
    assert len(os.listdir("/proc/self/fd")) <= here + slack


# -- reading ahead


def test_nothing_runs_before_the_first_item_is_wanted(far):
    stream = far("count")(10)
    assert far("look")() == []
    assert next(stream) == 0
    assert far("look")() == [0]


def test_never_more_is_read_ahead_than_was_taken(far):
    look = far("look")
    stream = far("count")(10**9)
    for taken in range(1, 4 * streams._ITEMS):
        next(stream)
        if taken & (taken - 1) == 0 or taken % 1000 == 0:
            made = len(look())
            assert made <= 2 * taken
            assert made <= taken + 2 * streams._ITEMS
    stream.close()


@pytest.fixture
def ahead(monkeypatch) -> list[int]:
    """Have full batches be small ones; return how many items were sent before each that was made ahead."""
    after: list[int] = []
    go_on = streams.Pump._go_on

    def count(pump: streams.Pump, *args: Any) -> Any:
        after.append(pump._sent)
        return go_on(pump, *args)

    monkeypatch.setattr(streams, "_ITEMS", FULL)
    monkeypatch.setattr(streams.Pump, "_go_on", count)
    return after


FULL = 512
FIRST = 4 * FULL - 1  #: Items that are sent until one is made ahead: 1, 2, 4 ... and three full batches.


def take(stream: Iterator[Any], count: int) -> list[Any]:
    return list(itertools.islice(stream, count))


def take_until_ahead(stream: Iterator[Any], ahead: list[int]) -> int:
    """Take batches until one is made ahead, for which another thread must wait; return how many items."""
    taken = len(take(stream, FIRST))
    while not ahead:
        taken += len(take(stream, FULL))
        assert taken < 1000 * FULL, "another thread was waiting not once"
    return taken


@pytest.mark.parametrize("codec", ["pickle", "data"])
@pytest.mark.parametrize("more", [0, 1, 100, FULL - 1, FULL, FULL + 1, 3 * FULL])
def test_what_was_made_ahead_does_not_wait_for_what_comes_next(serve, connect, ahead, codec, more):
    """The iterator blocks in a batch that nobody has asked for, and what it has made by then is asked for."""
    go = threading.Event()

    def numbers() -> Iterator[int]:
        yield from range(FIRST + more)
        assert go.wait(PATIENCE)
        yield from range(FIRST + more, 10 * FULL)
        raise KeyError("end")

    serve(numbers, codec=codec)
    stream = connect()()
    assert take(stream, FIRST + more) == list(range(FIRST + more))
    assert not go.is_set()
    go.set()
    got = []
    with pytest.raises(KeyError, match="end"):
        for number in stream:
            got.append(number)
    assert got == list(range(FIRST + more, 10 * FULL))
    assert not ahead or min(ahead) >= FIRST


def test_a_fast_iterator_is_two_batches_ahead(serve, connect, ahead):
    made = 0

    def numbers() -> Iterator[int]:
        nonlocal made
        for number in itertools.count():
            made = number + 1
            yield number

    serve(numbers)
    stream = connect()()
    taken = take_until_ahead(stream, ahead)
    wait_until(lambda: made == taken + FULL, timeout=PATIENCE)
    assert take(stream, 3 * FULL) == list(range(taken, taken + 3 * FULL)), "and it is what comes next"
    stream.close()


@pytest.mark.parametrize("end", ["StopIteration", "KeyError", "MarshalError"])
@pytest.mark.parametrize("more", [0, 1, FULL - 1, FULL])
def test_an_end_that_was_made_ahead_comes_in_its_place(serve, connect, ahead, end, more):
    def numbers() -> Any:
        yield from range(FIRST + more)
        if end == "KeyError":
            raise KeyError("end")
        if end == "MarshalError":
            yield threading.Lock()
        return "the end"

    serve(numbers)
    ends: list[Any] = []

    def go_through() -> Any:
        try:
            ends.append((yield from connect()()))
        except (KeyError, MarshalError) as error:
            ends.append(type(error).__name__)

    assert list(go_through()) == list(range(FIRST + more))
    assert ends == ["the end" if end == "StopIteration" else end]


def test_a_generator_that_hangs_ahead_hears_that_nobody_pulls_any_more(serve, connect, ahead):
    heard = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            if ahead:
                call, until = current_call(), time.monotonic() + PATIENCE
                heard.append(call.cancelled)
                while not call.cancelled and time.monotonic() < until:
                    time.sleep(0.001)
                heard.append(call.cancelled)
                return
            yield number

    serve(numbers)
    stream = connect()()
    take_until_ahead(stream, ahead)
    wait_until(lambda: heard == [False], timeout=PATIENCE)
    del stream
    wait_until(lambda: heard == [False, True], timeout=PATIENCE)


def test_an_iterator_that_calls_a_door_of_its_own_server_needs_one_thread_more(
    serve, connect, ahead, door_dir
):
    """Pulls that come while it is at work hold no thread, so the second is free for what it calls."""
    server = serve(lambda start: list(range(start, start + 700)), "chunk.door", server={"max_threads": 2})

    def numbers() -> Iterator[int]:
        with Proxy(door_dir / "chunk.door", timeout=PATIENCE) as chunk:
            for start in range(0, 70_000, 700):
                yield from chunk(start)

    server.attach(numbers, door_dir / "a.door")
    assert list(connect(timeout=PATIENCE)()) == list(range(70_000))
    assert ahead


def test_a_slow_iterator_keeps_one_thread_however_often_it_is_asked(serve, connect):
    """Its items go out one by one, to calls whose threads have left them to the one that it has."""
    go: queue.SimpleQueue[None] = queue.SimpleQueue()
    running = []

    def numbers() -> Iterator[int]:
        yield from range(2 * streams._MANY)  # after which the time is looked at now and then
        for number in range(2 * streams._MANY, 3 * streams._MANY):
            running.append(server.statistics().running)
            go.get(timeout=PATIENCE)
            yield number

    server = serve(numbers)
    stream = connect()()
    assert take(stream, 2 * streams._MANY) == list(range(2 * streams._MANY))
    for number in range(2 * streams._MANY, 2 * streams._MANY + 6):
        go.put(None)
        assert next(stream) == number
    for _ in range(streams._MANY):
        go.put(None)
    assert len(list(stream)) == streams._MANY - 6
    assert max(running) <= 2, "that of the iterator, and one that has just been asked"


def test_two_receivers_of_one_fast_iterator_both_get_on(serve, connect, ahead):
    """The thread that has it does not answer the one of them for ever."""
    endless = itertools.count()
    serve(lambda: endless)
    ones, others = connect()(), connect()()
    over, seen = threading.Event(), []

    def go_through() -> None:
        for number in ones:
            seen.append(number)
            if over.is_set():
                break

    thread = Background(go_through)
    wait_until(lambda: ahead, timeout=PATIENCE)
    got = take(others, 20 * FULL)
    over.set()
    thread.result()
    assert got == sorted(set(got))
    assert not {*got} & {*seen}


def test_a_shortage_of_descriptors_does_not_cancel_who_pulls(serve, connect, ahead):
    """It closes idle channels; that of a generator that is at work ahead is none."""
    heard, gates = [], []
    go = threading.Event()

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            if ahead and not heard:
                gates.append(current_call()._invocation._gate)
                assert go.wait(PATIENCE)
                heard.append(current_call().cancelled)
            yield number

    serve(numbers)
    stream = connect()()
    taken = take_until_ahead(stream, ahead)
    wait_until(lambda: gates, timeout=PATIENCE)
    gates.pop().spare(1000)
    go.set()
    assert take(stream, FULL) == list(range(taken, taken + FULL))
    assert heard == [False]
    stream.close()


def test_a_server_that_closes_in_the_middle_is_no_end(serve, connect):
    """Nobody is told that there were no more items."""
    go = threading.Event()

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            if number == 3:
                closing.start()
                assert go.wait(PATIENCE)
            yield number

    server = serve(numbers)
    closing = threading.Thread(target=server.close)
    got = []
    pump_end = streams.Pump.end

    def end(pump: streams.Pump) -> None:
        pump_end(pump)
        go.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.Pump, "end", end)
        with pytest.raises(DoorError):
            for number in connect()():
                got.append(number)
    closing.join(PATIENCE)
    assert got == list(range(len(got)))
    assert len(got) >= 3


@pytest.mark.parametrize("why", ["one thread", "a stranger"])
def test_nothing_is_made_ahead(serve, connect, ahead, monkeypatch, why):
    """Where nobody else could take the next call, and for whoever is only counted while his call runs."""
    if why == "a stranger":
        monkeypatch.setattr(streams, "is_strange", lambda uid: True)
    serve(lambda: map(int, range(20 * FULL)), server={"max_threads": 1} if why == "one thread" else {})
    assert list(connect()()) == list(range(20 * FULL))
    assert ahead == []


def test_what_is_read_ahead_is_bounded_in_bytes(far):
    look = far("look")
    stream = far("blocks")(100_000, 200)
    for taken in range(1, 201):
        assert next(stream) == bytes([taken - 1]) * 100_000
        assert len(look()) <= taken + 1 + streams._BYTES // 100_000


def test_the_first_item_of_a_slow_iterator_does_not_wait_for_the_second(far):
    stream = far("slow")()
    assert next(stream) == "first"
    far("release")()
    assert next(stream) == "second"


def test_the_last_items_of_a_burst_do_not_wait_for_the_next_one(far):
    """As of a log that is still being written: the iterator sleeps in the middle of a batch."""
    stream, release = far("bursts")(), far("release")
    for burst in range(3):
        for number in range(100):
            assert next(stream) == (burst, number)
        release()
    assert list(stream) == []


@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_what_was_made_behind_an_early_answer_comes_next(serve, connect, codec):
    go = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(20):
            if number in (5, 6, 14):
                assert go.wait(PATIENCE)
                go.clear()
            yield number
        raise KeyError("end")

    serve(numbers, codec=codec)
    stream, got = connect()(), []
    with pytest.raises(KeyError, match="end"):
        for number in stream:
            got.append(number)
            if number in (4, 5, 13):
                go.set()
    assert got == list(range(20))


@pytest.fixture
def stuck(monkeypatch) -> threading.Event:
    """
    Have batches be of 1, 2 and 4 items, however slow the machine is.

    None takes too long to be followed by one twice as large, and none is sent early before an iterator that
    is about to wait has set this.
    """
    it, send_early = threading.Event(), streams.Pump.send_early

    def send(pump: streams.Pump) -> None:
        if it.is_set():
            send_early(pump)

    monkeypatch.setattr(streams, "_TIME", 60.0)
    monkeypatch.setattr(streams.Pump, "send_early", send)
    return it


def pump_of(iterator: Iterator[Any], codec: str = "pickle") -> streams.Pump:
    """Return the pump of an iterator that has been passed."""
    return streams._pumps[id(iterator), codec]


def joined(pump: streams.Pump) -> bool:
    """Tell whether a pull has been left to the thread that has the iterator."""
    making = pump._making_batch
    return making is not None and making.asker not in (None, making.maker)


@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_an_error_behind_an_early_answer_is_that_of_the_next_pull(serve, connect, stuck, codec):
    """Which has joined meanwhile, and whose thread is another than that which the iterator raises in."""
    go = threading.Event()

    def numbers() -> Iterator[int]:
        yield from range(4)  # 0; 1 and 2; 3 of a batch of four
        stuck.set()
        assert go.wait(PATIENCE)
        raise KeyError("colour")

    iterator = numbers()
    serve(lambda: iterator, codec=codec)
    stream, got = connect()(), []
    pump = pump_of(iterator, codec)
    assert take(stream, 4) == [0, 1, 2, 3]
    pull = Background(lambda: got.append(next(stream)))
    wait_until(lambda: joined(pump), timeout=PATIENCE)
    go.set()
    error = pull.error()
    assert (type(error), error.args) == (KeyError, ("colour",))
    assert got == []
    if codec == "pickle":
        assert "in numbers" in str(error.__cause__)


def test_a_pull_that_joined_and_was_given_up_is_not_answered(serve, connect, stuck):
    """What is made for it is for who asks next."""
    go = threading.Event()

    def numbers() -> Iterator[int]:
        yield from range(4)
        stuck.set()
        assert go.wait(PATIENCE)
        yield from range(4, 7)

    iterator = numbers()
    serve(lambda: iterator)
    stream, other = connect()(), connect()()
    pump = pump_of(iterator)
    assert take(stream, 4) == [0, 1, 2, 3]
    stream.timeout = 2.0
    pull = Background(lambda: next(stream))
    wait_until(lambda: joined(pump), timeout=PATIENCE)
    assert isinstance(pull.error(), CallTimeoutError)
    assert joined(pump)
    pull = Background(lambda: list(other))
    wait_until(lambda: pump._waiting == 1, timeout=PATIENCE)
    go.set()
    assert pull.result() == [4, 5, 6]


def test_pulls_that_wait_for_one_that_runs_end_by_their_time(serve, connect):
    """One is at work for a caller, so nobody joins; the next one waits for the iterator."""
    go = threading.Event()

    def numbers() -> Iterator[int]:
        assert go.wait(PATIENCE)
        yield from range(3)

    iterator = numbers()
    serve(lambda: iterator)
    first, second = connect()(), connect()()
    pump = pump_of(iterator)
    pull = Background(lambda: next(first))
    wait_until(lambda: pump._making_batch is not None, timeout=PATIENCE)
    second.timeout = 1.0
    late = Background(lambda: next(second))
    wait_until(lambda: pump._waiting == 1, timeout=PATIENCE)
    assert isinstance(late.error(), CallTimeoutError)
    wait_until(lambda: pump._waiting == 0, "the server has its time, too")
    go.set()
    assert pull.result() == 0
    first.close()


@pytest.mark.parametrize("last", ["an end", "an error"])
def test_a_stream_whose_server_closes_while_nothing_comes_is_no_end(serve, connect, last):
    """The iterator ends because of it, having made nothing: the caller is not told that it has ended."""
    begun, go = threading.Event(), threading.Event()

    def numbers() -> Iterator[int]:
        yield 0
        begun.set()
        assert go.wait(PATIENCE)
        if last == "an error":
            raise KeyError("colour")

    iterator = numbers()
    server = serve(lambda: iterator)
    stream = connect()()
    pump = pump_of(iterator)
    assert next(stream) == 0
    pull = Background(lambda: next(stream))
    assert begun.wait(PATIENCE)
    closing = threading.Thread(target=server.close)
    closing.start()
    wait_until(lambda: pump._gone, timeout=PATIENCE)
    go.set()
    error = pull.error()
    closing.join(PATIENCE)
    assert isinstance(error, DoorError)
    assert error.may_have_run


@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_an_item_larger_than_may_cross_is_an_error_in_its_place(serve, connect, codec, monkeypatch):
    small = functools.partial(streams._StreamEndpoint, max_reply=10_000)
    monkeypatch.setattr(streams, "_StreamEndpoint", small)

    def blocks() -> Iterator[bytes]:
        yield b"small"
        yield bytes(20_000)
        yield b"never"

    serve(blocks, codec=codec)
    stream = connect()()
    assert next(stream) == b"small"
    with pytest.raises(DoorError, match="and 10000 bytes and 253 descriptors may cross at a time") as caught:
        next(stream)
    assert caught.value.may_have_run
    assert list(stream) == []


def test_huge_items(far):
    sizes = [len(block) for block in far("blocks")(30_000_000, 4)]
    assert sizes == [30_000_000] * 4


def test_small_items_and_then_huge_ones(serve, connect):
    made = []

    def mixed() -> Iterator[Any]:
        yield from range(5000)
        for number in range(40):
            made.append(number)
            yield bytes(1_000_000)

    serve(mixed)
    stream = connect()()
    for _ in range(5000):
        next(stream)
    assert len(made) <= 8
    assert sum(map(len, stream)) == 40_000_000


# -- errors


@pytest.mark.parametrize("n", [0, 1, 5, 1000, 3000])
def test_an_exception_comes_behind_the_items_before_it(far, n):
    stream, got = far("raises_after")(n), []
    with pytest.raises(KeyError, match="colour") as caught:
        for item in stream:
            got.append(item)
    assert got == list(range(n))
    assert "in raises_after" in str(caught.value.__cause__)
    assert list(stream) == []


@pytest.mark.parametrize("n", [0, 1, 2, 50, 99])
def test_an_item_that_cannot_cross_is_an_error_in_its_place(far, n):
    stream, got = far("wrong_at")(n), []
    with pytest.raises(MarshalError, match=r"an item of the stream cannot cross.*lock"):
        for item in stream:
            got.append(item)
    assert got == list(range(n))
    assert far("look")()[-1:] == ["finally"]
    assert list(stream) == []


@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_items_before_one_that_cannot_cross_do_not_wait_for_what_comes_behind_it(
    serve, connect, stuck, codec
):
    """In a batch whose next item is long in coming: nothing is sent twice, or in another order."""
    go = threading.Event()

    def numbers() -> Iterator[Any]:
        yield from range(10)  # 0; 1 and 2; 3 to 6; 7 to 9 of a batch of eight
        yield threading.Lock()
        yield 11
        stuck.set()
        assert go.wait(PATIENCE)
        yield 12

    iterator = numbers()
    serve(lambda: iterator, codec=codec)
    stream, got = connect()(), []
    pump = pump_of(iterator, codec)

    def go_through() -> None:
        for item in stream:
            got.append(item)

    pull = Background(go_through)
    wait_until(lambda: getattr(pump._making_batch, "unfit", False), timeout=PATIENCE)
    wait_until(lambda: got == list(range(10)), timeout=PATIENCE / 2)
    go.set()
    error = pull.error()
    assert isinstance(error, MarshalError)
    assert "lock" in str(error)
    assert got == list(range(10))


class Leaves:
    """What cannot be pickled, by no ``Exception``."""

    def __reduce__(self) -> Any:
        raise SystemExit("not here")


@pytest.mark.parametrize("early", [True, False])
def test_an_item_whose_own_code_raises_anything_is_an_error_in_its_place(serve, connect, stuck, early):
    """And what there is of other streams is sent early as ever."""
    go = threading.Event()

    def numbers(bad: bool) -> Iterator[Any]:
        yield from range(4)  # 0; 1 and 2; 3 of a batch of four
        if bad:
            yield Leaves()
        if early or not bad:
            stuck.set()
            assert go.wait(PATIENCE)

    serve(numbers)
    stream, other, got = connect()(True), connect()(False), []

    def go_through() -> None:
        for item in stream:
            got.append(item)

    pull = Background(go_through)
    if early:
        wait_until(lambda: got == [0, 1, 2, 3], timeout=PATIENCE)
    assert take(other, 4) == [0, 1, 2, 3]
    go.set()
    error = pull.error()
    assert isinstance(error, MarshalError)
    assert str(error) == "an item of the stream cannot cross the door: SystemExit: not here"
    assert got == [0, 1, 2, 3]
    assert list(other) == []


def test_the_watcher_goes_on_whatever_a_pump_raises(monkeypatch, caplog):
    class Raising:
        def send_early(self) -> None:
            raise SystemExit

    class Other:
        looked_after = threading.Event()

        def send_early(self) -> None:
            self.looked_after.set()

    monkeypatch.setattr(streams, "_IDLE", 1)
    watcher, other = streams._Watcher(), Other()
    watcher.watch(Raising())
    wait_until(lambda: not watcher._since, timeout=PATIENCE)
    watcher.watch(other)
    assert other.looked_after.wait(PATIENCE)
    watcher.forget(other)
    wait_until(lambda: not watcher._runs, timeout=PATIENCE)
    assert "could not be sent early" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_another_watcher_comes_for_one_that_has_died(monkeypatch):
    def fail(watcher: streams._Watcher) -> None:
        died.set()
        raise MemoryError

    class Pump:
        looked_after = threading.Event()

        def send_early(self) -> None:
            self.looked_after.set()

    died = threading.Event()
    monkeypatch.setattr(streams, "_IDLE", 1)
    watcher, pump = streams._Watcher(), Pump()
    with monkeypatch.context() as patch:
        patch.setattr(streams._Watcher, "_look_after", fail)
        watcher.watch(pump)
        assert died.wait(PATIENCE)
        wait_until(lambda: not watcher._runs, timeout=PATIENCE)
    watcher.watch(pump)
    assert pump.looked_after.wait(PATIENCE)
    watcher.forget(pump)
    wait_until(lambda: not watcher._runs, timeout=PATIENCE)


@pytest.mark.parametrize("n", [3, 4])
def test_a_value_returned_that_cannot_cross_is_an_error_at_the_end(serve, connect, n):
    """Alone, or in one batch with the last items."""

    def numbers() -> Any:
        yield from range(n)
        return threading.Lock()

    serve(numbers)
    stream = connect()()
    got = []
    with pytest.raises(MarshalError, match="lock"):
        for item in stream:
            got.append(item)
    assert got == [*range(n)]
    assert list(stream) == []


def test_a_pull_takes_no_longer_than_the_time_of_the_proxy(far):
    stream = far("stuck", timeout=0.3)(3)
    assert [next(stream)] == [0]
    with pytest.raises(CallTimeoutError):
        list(stream)
    assert list(stream) == []


def test_a_pull_behind_one_that_is_stuck_ends_by_its_time(far):
    """The items before it were sent early, so the iterator is still busy with the pull before."""
    stream, got = far("stuck", timeout=0.5)(30), []
    with pytest.raises(CallTimeoutError):
        for number in stream:
            got.append(number)
    assert got == list(range(30))


def test_the_time_of_a_stream_can_be_set(far):
    stream = far("stuck")(1)
    assert stream.timeout == PATIENCE
    assert next(stream) == 0
    stream.timeout = 0.1
    with pytest.raises(CallTimeoutError):
        next(stream)


@pytest.mark.parametrize("value", [float("nan"), "abc", 0, -1, True])
def test_a_time_that_is_none_is_refused_when_it_is_set(far, value):
    """As by ``Proxy.options(timeout=)``."""
    numbers = far("numbers")
    stream = numbers(3)
    with pytest.raises((TypeError, ValueError)) as by_options:
        numbers.options(timeout=value)
    with pytest.raises(type(by_options.value)) as caught:
        stream.timeout = value
    assert str(caught.value) == str(by_options.value)
    assert stream.timeout == PATIENCE
    assert list(stream) == [0, 1, 2]


@pytest.mark.parametrize("value", [float("inf"), 1e10, pytest.param(10**400, id="10**400")])
def test_a_time_without_an_end_is_none(far, value):
    stream, closed = far("numbers")(3), far("numbers")(3)
    stream.timeout = closed.timeout = value
    assert stream.timeout is None
    assert list(stream) == [0, 1, 2]
    assert next(closed) == 0
    closed.close()


# -- the end


def test_close_returns_when_the_finally_has_run(far):
    stream = far("count")(10**9)
    assert next(stream) == 0
    stream.close()
    stream.close()
    assert far("look")()[-1] == "finally"
    assert list(stream) == []


def test_leaving_a_with_block_closes(far):
    with far("count")(10**9) as stream:
        assert [*itertools.islice(stream, 5)] == [0, 1, 2, 3, 4]
    assert far("look")()[-1] == "finally"
    assert "ended" in repr(stream)


def test_an_iterator_that_cannot_be_closed_is_let_go(serve, connect):
    ended = threading.Event()

    class Numbers:
        def __iter__(self) -> Iterator[int]:
            return self

        def __next__(self) -> int:
            return 1

        def __del__(self) -> None:
            ended.set()

    serve(lambda: map(int, Numbers()))
    stream = connect()()
    assert next(stream) == 1
    assert not ended.is_set()
    stream.close()
    assert ended.wait(PATIENCE)


def test_close_raises_what_the_finally_raises(serve, connect):
    def numbers() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            raise OSError("cannot clean up")

    serve(numbers)
    stream = connect()()
    assert next(stream) == 1
    with pytest.raises(OSError, match="cannot clean up"):
        stream.close()


@pytest.mark.parametrize("codec", ["pickle", "data"])
@pytest.mark.parametrize("kind", [SystemExit, BrokenDoorError, Exception])
def test_close_says_that_the_finally_has_failed_though_not_how(serve, connect, codec, kind):
    """A ``DoorError`` of its own, and what cannot cross, arrive as a ``RemoteError``."""

    class Odd(Exception):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            self.lock = threading.Lock()

    def numbers() -> Iterator[int]:
        try:
            yield 1
            yield 2
        finally:
            raise Odd("cannot clean up") if kind is Exception else kind("cannot clean up")

    serve(numbers, codec=codec)
    stream = connect()()
    assert next(stream) == 1
    with pytest.raises(RemoteError, match="cannot clean up"):
        stream.close()
    stream.close()


def test_close_of_a_stream_whose_server_is_gone_is_no_error(far, serve, connect):
    server = serve(lambda: itertools.count())
    closed, killed = connect()(), far("count")(10**9)
    assert [next(closed), next(killed)] == [0, 0]
    server.close()
    closed.close()
    os.kill(far.child.pid, signal.SIGKILL)
    far.child.wait()
    killed.close()


def test_close_waits_no_longer_than_it_may(serve, connect):
    """And that is no error either."""
    go, ended = threading.Event(), threading.Event()

    def numbers() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            go.wait(PATIENCE)
            ended.set()

    serve(numbers)
    stream = connect()()
    assert next(stream) == 0
    stream.timeout = 0.05
    stream.close()
    assert not ended.is_set()
    go.set()
    assert ended.wait(PATIENCE)


def test_after_close_nothing_is_given_out_that_was_read_ahead(far):
    stream = far("count")(10**9)
    loop, other = iter(stream), iter(stream)
    got = [next(it) for it in (loop, loop, other, stream) * 50]
    assert got == list(range(200))
    for number in loop:
        got.append(number)
        if number == 300:
            assert next(stream) == 301, "there was more of this batch"
            stream.close()
    assert got[-1] == 300
    assert [next(it, "end") for it in (loop, other, stream)] == ["end", "end", "end"]


def test_after_close_the_error_of_an_item_is_not_given_out_either(serve, connect):
    def take(numbers: Iterator[int]) -> list[int]:
        taken = [next(numbers), next(numbers)]
        numbers.close()
        return taken + list(numbers)

    serve(take, codec="data")
    assert connect()(item for item in [1, 2, "three", 4]) == [1, 2]


def test_a_dropped_stream_is_closed_over_there(far):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = far("count")(10**9)
        assert next(stream) == 0
        del stream
        gc.collect()
    saw_the_end(far)


def test_a_loop_that_is_left_lets_the_stream_go(far):
    for item in far("count")(10**9):
        if item == 100:
            break
    saw_the_end(far)


CLIENT = """
    import signal
    from doorpool import Proxy
    stream = Proxy("count.door")(10**9)
    next(stream)
    ready()
    signal.pause()
"""


def test_a_caller_that_is_killed_lets_the_stream_go(far, spawn_python, door_dir):
    client = spawn_python(CLIENT, cwd=door_dir)
    client.wait_ready()
    assert far("look")() == [0]
    client.kill()
    saw_the_end(far)


def test_a_server_that_is_killed_breaks_the_stream(far):
    stream = far("count")(10**9)
    ahead = [next(stream) for _ in range(3)]
    os.kill(far.child.pid, signal.SIGKILL)
    far.child.wait()
    with pytest.raises(BrokenDoorError):
        for item in stream:
            ahead.append(item)
    assert ahead == list(range(len(ahead)))
    assert list(stream) == []
    stream.close()


def counting(ended: threading.Event) -> Iterator[int]:
    """Count for ever; the event is set when that comes to its end."""
    try:
        yield from itertools.count()
    finally:
        ended.set()


def test_a_server_that_closes_ends_the_stream_and_runs_the_finally(serve, connect):
    ended = threading.Event()

    server = serve(lambda: counting(ended))
    stream = connect()()
    assert next(stream) == 0
    server.close()
    assert ended.wait(PATIENCE)
    with pytest.raises(RevokedError):
        list(stream)


def test_abandoned_streams_leave_no_descriptors(far):
    count, fds = far("count"), far("fds")

    def abandon(times: int) -> None:
        for number in range(times):
            stream = count(10**6)
            for _ in range(number % 7):
                next(stream)
            if number % 3 == 0:
                stream.close()

    abandon(20)
    far("forget")()
    here, there, slack = len(os.listdir("/proc/self/fd")), fds(), 5
    abandon(1000)
    gc.collect()
    wait_until(lambda: fds() <= there + slack, timeout=PATIENCE)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= here + slack, timeout=PATIENCE)


# -- arguments


def test_a_generator_argument_is_pulled_from_the_caller(far):
    assert far("add_up")(n for n in range(10_000)) == sum(range(10_000))


def test_a_generator_argument_runs_no_further_than_wanted(far):
    made = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            yield number

    assert far("first")(numbers(), 10) == list(range(10))
    assert len(made) <= 20


def test_an_error_of_a_generator_argument_is_raised_in_the_procedure(far):
    def numbers() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        far("add_up")(numbers())


def test_a_generator_argument_stays_the_callers_if_he_keeps_it(far):
    numbers = iter(n for n in range(100))
    assert far("first")(numbers, 1) == [0]
    assert next(numbers) == 1


def test_a_generator_argument_that_was_kept_ends_when_it_is_dropped(far):
    ended = threading.Event()

    assert far("keep")(counting(ended)) == 0
    assert not ended.is_set()
    far("drop")()
    assert ended.wait(PATIENCE)


def test_a_server_that_is_killed_lets_a_generator_argument_go(far):
    ended = threading.Event()

    assert far("keep")(counting(ended)) == 0
    os.kill(far.child.pid, signal.SIGKILL)
    far.child.wait()
    assert ended.wait(PATIENCE)


def test_an_iterator_that_is_passed_twice_gives_each_item_once(serve, connect):
    serve(lambda: shared)
    shared = (n for n in range(10_000))
    one, two = connect()(), connect()()
    got = [next(one), next(two), next(one)]
    one.timeout = two.timeout = PATIENCE
    got += list(one) + list(two)
    assert sorted(got) == list(range(10_000))


# -- threads, processes, codecs


def test_an_iterator_whose_door_is_closing_gets_another(serve, connect, monkeypatch):
    """Nobody had it any more, a moment before it is passed again; what it has made is not lost."""
    endless = itertools.count()
    serve(lambda: endless)
    stream = connect()()
    assert take(stream, 3) == [0, 1, 2]
    hand_out, closed = streams.Pump.hand_out, []

    def late(pump: streams.Pump, *args: Any) -> Any:
        if not closed:
            closed.append(pump)
            raise ClosedError("closing")
        return hand_out(pump, *args)

    monkeypatch.setattr(streams.Pump, "hand_out", late)
    other = connect()()
    assert len(closed) == 1
    assert take(other, 3) == [3, 4, 5]
    assert streams._pumps[id(endless), "pickle"] is not closed.pop()


def test_threads_that_share_a_stream_get_each_item_once(far):
    stream = far("count")(50_000)
    got: list[list[int]] = [[] for _ in range(4)]

    def take(into: list[int]) -> None:
        into.extend(stream)

    threads = [threading.Thread(target=take, args=(into,)) for into in got]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(part == sorted(part) for part in got)
    assert sorted(itertools.chain(*got)) == list(range(50_000))


@pytest.mark.parametrize("when", ["before it is sent", "when its answer is there"])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 20, 1000])
def test_items_that_a_signal_handler_takes_in_the_middle_of_a_pull(serve, connect, monkeypatch, when, n):
    """Each goes to one of the two, and so does the end."""
    call, by_handler, inside = streams.Stream._call, [], []

    def handle(stream: streams.Stream) -> None:
        if not inside:
            inside.append(stream)
            by_handler.extend(item for item in [next(stream, None)] if item is not None)
            inside.clear()

    def interrupted(stream: streams.Stream, *args: Any) -> Any:
        if when == "before it is sent":
            handle(stream)
        came = call(stream, *args)
        if when == "when its answer is there":
            handle(stream)
        return came

    monkeypatch.setattr(streams.Stream, "_call", interrupted)
    serve(lambda: map(int, range(n)))
    stream = connect()()
    got = list(stream)
    assert sorted(got + by_handler) == list(range(n))
    assert got == sorted(got) or when == "before it is sent", "what was asked for later comes later"
    assert n < 3 or by_handler
    assert list(stream) == []


@pytest.mark.ids("L8")
def test_a_signal_handler_takes_an_item_of_the_stream_that_its_thread_waits_for(serve, connect, stuck):
    main, by_handler = threading.get_ident(), []

    def numbers() -> Iterator[int]:
        for number in range(20):
            if number == 4:  # after 0, 1 and 2, and one of four
                signal.pthread_kill(main, signal.SIGUSR1)
                wait_until(lambda: pump._waiting == 1, "the pull of the handler", timeout=PATIENCE)
            yield number

    iterator = numbers()
    serve(lambda: iterator)
    stream = connect(timeout=PATIENCE)()
    pump = pump_of(iterator)
    before = signal.signal(signal.SIGUSR1, lambda *_: by_handler.append(next(stream)))
    try:
        got = list(stream)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert by_handler == [7], "those before it were pulled for who waits"
    assert got == [number for number in range(20) if number != 7]


def test_a_pull_that_is_cut_while_items_are_converted_ends_the_stream(serve, connect):
    """There is no gap, behind which it goes on."""
    cut = []

    @attrs.define
    class Order:
        number: int

        def __attrs_post_init__(self) -> None:
            if self.number == 5 and not cut:
                cut.append(self.number)
                raise KeyboardInterrupt

    def take_all(orders: Iterator[Order]) -> list[Any]:
        taken: list[Any] = []
        while True:
            try:
                taken.append(next(orders).number)
            except StopIteration:
                return taken
            except KeyboardInterrupt:
                taken.append("cut")

    take_all.__annotations__ = {"orders": Iterator[Order], "return": list}
    serve(take_all, codec="data")
    *taken, last = connect()({"number": number} for number in range(100))
    assert last == "cut"
    assert taken == list(range(len(taken)))


def test_a_forked_child_pulls_from_the_same_stream(far):
    stream = far("count")(10**9)
    taken = [next(stream) for _ in range(4)]
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            items = list(itertools.islice(stream, 50))
            os.write(write, repr(items).encode())
        finally:
            os._exit(0)
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0
    with open(read) as file:
        childs = eval(file.read())
    assert len(childs) == 50
    rest = list(itertools.islice(stream, 50))
    ahead = set(childs) & set(rest)  # what had been read ahead is seen by both
    assert len(ahead) <= len(taken)
    assert taken + rest == sorted(set(taken + rest))


def test_current_call_is_that_of_the_pull(far):
    assert list(far("thread")()) == [os.getpid(), "thread"]


def test_a_stream_where_data_is_spoken(far):
    plain = far("plain")
    assert plain.info.codec == "data"
    assert list(plain(2000)) == [{"n": i, "text": "x" * i} for i in range(2000)]
    assert far("plain_sum")(n for n in range(3000)) == sum(range(3000))
    assert far("plain_sum")(Own(5)) == 10


def test_an_item_that_is_no_data_is_an_error_in_its_place(serve, connect):
    def mixed() -> Iterator[Any]:
        yield 1
        yield 2
        yield object()

    serve(mixed, codec="data")
    got = []
    with pytest.raises(MarshalError, match="plain data"):
        for item in connect()():
            got.append(item)
    assert got == [1, 2]


def test_annotations_of_a_data_door_may_say_iterator(serve, connect):
    def doubled(numbers: Iterator[int]) -> Iterator[int]:
        return (2 * number for number in numbers)

    serve(doubled, codec="data")
    assert list(connect()(n for n in range(5))) == [0, 2, 4, 6, 8]


@attrs.frozen
class Place:
    x: int
    y: int = 0


def test_items_of_a_data_door_are_made_what_annotations_say(serve, connect):
    def places(given: Iterator[Place], more: Iterable[Place], deep: dict[str, Iterator[Place]]) -> Any:
        return [*given, *more, *deep["here"]] == [Place(n) for n in range(9)]

    serve(places, codec="data")
    nine = [{"x": n} for n in range(9)]
    assert connect()((it for it in nine[:3]), nine[3:6], {"here": map(dict, nine[6:])})


@pytest.mark.parametrize("bad", [0, 1, 5, 40])
def test_items_that_are_not_what_a_data_door_says_are_errors_in_their_places(serve, connect, bad):
    taken = []

    def add(numbers: Iterator[int]) -> None:
        for number in numbers:
            taken.append(number)

    serve(add, codec="data")
    with pytest.raises(RemoteError, match=rf"item {bad} of .*: Expected `int`, got `str`"):
        connect()(n if n != bad else "no number" for n in range(50))
    assert taken == list(range(bad))


@pytest.mark.parametrize("bad", [0, 1, 5, 49])
def test_items_that_are_not_what_a_data_door_promises_do_not_leave_it(serve, connect, bad):
    def numbers() -> Iterator[int]:
        yield from (n if n != bad else "no number" for n in range(50))

    serve(numbers, codec="data")
    got = []
    with pytest.raises(MarshalError, match="Expected `int`, got `str`, which is not what the procedure"):
        for number in connect()():
            got.append(number)
    assert got == list(range(bad))


def test_a_sequence_in_place_of_an_iterable_is_checked_too(serve, connect):
    def add(numbers: Iterable[int]) -> int:
        return sum(numbers)

    serve(add, codec="data")
    assert connect()([1, 2]) == 3
    for wrong in ([1, "2"], "12", {"a": 1}):
        with pytest.raises(MarshalError, match="Expected `int`, got `str`"):
            connect()(wrong)


def test_items_that_cannot_be_checked_are_refused_at_the_start():
    def mixed(items: Iterator[int | Place | dict[str, int]]) -> None: ...

    def inside() -> dict[str, list[Iterator[Place | dict[str, int]]]]: ...

    for function, what in ((mixed, "the parameter 'items'"), (inside, "the result")):
        with pytest.raises(TypeError, match=f"{what} cannot be checked as data"):
            Plan(function)


@pytest.mark.parametrize("answer", ["text", None, {"items": [1]}, {"items": 5, "returned": None}, (1, 2)])
def test_what_is_no_batch_is_a_protocol_error(answer, closing):
    endpoint = closing.enter_context(Endpoint(lambda: answer))
    stream = streams.Stream(Proxy(endpoint))
    with pytest.raises(ProtocolError, match="no batch"):
        next(stream)
    assert list(stream) == []


def test_a_generator_runs_in_the_threads_of_its_server(serve, connect):
    def names() -> Iterator[str]:
        for _ in range(3):
            yield threading.current_thread().name

    procedure = []

    def both() -> Iterator[str]:
        procedure.append(threading.current_thread().name)
        return names()

    serve(both, server={"name": "shop"})
    (prefix,) = {name.rpartition("-")[0] for name in [*connect()(), *procedure]}
    assert "shop" in prefix


def test_a_stream_that_is_closed_while_a_thread_pulls_gives_that_nothing(serve, connect):
    going, go = threading.Event(), threading.Event()

    def numbers() -> Iterator[int]:
        going.set()
        go.wait(PATIENCE)
        yield 1

    serve(numbers)
    stream, got = connect()(), []
    thread = threading.Thread(target=lambda: got.extend(stream))
    thread.start()
    assert going.wait(PATIENCE)
    stream.close()
    go.set()
    thread.join()
    assert got == []


def test_a_generator_in_an_exception_is_refused(serve, connect, monkeypatch):
    """And no door is made for it, of which nobody would ever let go."""
    handed_out: list[streams.Pump] = []
    hand_out = streams.Pump.hand_out

    def note(pump: streams.Pump, *args: Any) -> Any:
        handed_out.append(pump)
        return hand_out(pump, *args)

    def answer(fails: bool) -> Any:
        if fails:
            raise ValueError(x for x in "abc")
        return (x for x in "abc")

    serve(answer)
    monkeypatch.setattr(streams.Pump, "hand_out", note)
    with pytest.raises(RemoteError, match=r"^ValueError: <generator object .*answer") as caught:
        connect()(True)
    assert type(caught.value) is RemoteError
    assert caught.value.may_have_run is True
    (note_,) = caught.value.__notes__
    assert "a generator crosses in arguments and results, and not in an exception" in note_
    assert handed_out == []
    assert list(connect()(False)) == ["a", "b", "c"]
    assert len(handed_out) == 1, "what is handed out is noted"


# -- speed


def test_a_million_small_items_run_much_faster_than_calls(far):
    """15 times at least is what is promised; half of it here, since other work may come between."""
    add, numbers = far("add", timeout=None), far("numbers", timeout=None)
    best = 0.0
    for _ in range(3):
        begun = time.perf_counter()
        for number in range(10_000):
            add(number)
        call = (time.perf_counter() - begun) / 10_000
        begun = time.perf_counter()
        count = 0
        for _number in numbers(1_000_000):
            count += 1
        item = (time.perf_counter() - begun) / 1_000_000
        assert count == 1_000_000
        best = max(best, call / item)
        if best >= 7.5:
            break
    assert best >= 7.5


HELD = """
    import threading
    from doorpool import Server

    # One thread, which makes room for the main thread.
    server = Server(max_threads=1, close_timeout=0.05)

    @server.endpoint("a.door")
    def items():
        where = threading.current_thread() is threading.main_thread()
        yield where
        if where:
            {then}
        while not where:
            yield where

    ready()
    server.run()
"""


@pytest.mark.parametrize(
    ("then", "code"), [("yield from iter(int, 1)", 0), ("threading.Event().wait()", 128 + signal.SIGTERM)]
)
def test_a_signal_while_the_main_thread_is_in_a_generator(spawn_server, door_dir, then, code):
    """
    One that goes on yielding ends with the first signal; one that does not come back, as any procedure.

    That one holds the main thread, in which nobody but itself can end it: its caller is told when the time
    for closing is over, the name is gone, and the second signal ends the process.
    """
    child = spawn_server(HELD.format(then=then), cwd=door_dir)
    path, pulled, errors = door_dir / "a.door", threading.Event(), []

    def pull():
        try:
            while True:
                with Proxy(path, wait=10, reopen=False) as door, door() as stream:
                    if next(stream):
                        pulled.set()
                        for _ in stream:
                            continue
        except DoorError as error:
            errors.append(type(error))

    caller = Background(pull)
    assert pulled.wait(20)
    child.signal(signal.SIGTERM)
    caller.result()
    assert errors
    assert set(errors) <= {RevokedError, BrokenDoorError}
    wait_until(lambda: not path.exists(), "names go first")
    if code:
        wait_until(lambda: "calls cut" in child.stderr)
        assert not child.ended, "whoever holds the main thread is not broken into"
        child.signal_until_ended(signal.SIGTERM)
    assert child.wait() == code


INTERRUPTED = """
    import itertools, signal, sys, threading, time
    from doorpool import ClosedError, Server, current_call
    from doorpool import _streams as streams

    handler, signals, codec, when = sys.argv[1:]
    stuck, send_early = threading.Event(), streams.Pump.send_early
    streams.Pump.send_early = lambda pump: stuck.is_set() and send_early(pump)
    if when == "ahead":
        streams._ITEMS = 512
    else:
        streams._TIME = 60.0  # batches of 1, 2, and 4 items, however slow the machine is

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop("on purpose")

    server = Server(max_threads=2 if when == "ahead" else 1)
    left = threading.Condition()
    heard = []

    def is_time(number):
        if threading.current_thread() is not threading.main_thread():
            return False
        return current_call()._invocation.answered if when == "ahead" else number == 4

    @server.endpoint("a.door", codec=codec)
    def numbers():
        yield threading.current_thread() is threading.main_thread()
        for number in itertools.count():
            if is_time(number):
                if when == "behind an early answer":
                    stuck.set()
                    while not current_call()._invocation.answered:
                        time.sleep(0.001)
                signal.raise_signal(signal.SIGINT)
            yield number

    @server.endpoint("heard.door")
    def wait_heard():
        with left:
            return left.wait_for(lambda: heard, 20) and heard

    server.attach(server.close, "close.door")
    signal.signal(signal.SIGINT, eval(handler))
    ready()
    while not server.closed:
        try:
            server.run(signals=signals == "True")
        except ClosedError:  # it is being closed, by the call of the last door
            break
        except BaseException as error:
            with left:
                heard.append(type(error).__name__)
                left.notify_all()
    result(heard)
"""


@pytest.mark.ids("T13", "X12")
@pytest.mark.parametrize("when", ["in a batch", "behind an early answer", "ahead"])
@pytest.mark.parametrize("codec", ["pickle", "data"])
@pytest.mark.parametrize(
    ("handler", "signals", "name"),
    [("stop", True, "Stop"), ("signal.default_int_handler", False, "KeyboardInterrupt")],
)
def test_what_a_handler_raises_in_a_generator_leaves_run(
    spawn_server, door_dir, closing, handler, signals, name, codec, when
):
    """With the answer that was being made, and once; whoever pulls next hears of it in its place."""
    child = spawn_server(INTERRUPTED, handler, signals, codec, when, cwd=door_dir)
    numbers = closing.enter_context(Proxy(door_dir / "a.door", wait=10, timeout=PATIENCE))

    def pull_from_main_thread() -> Any:
        stream = numbers()
        return stream if next(stream) else stream.close()

    stream, got = wait_until(pull_from_main_thread, timeout=PATIENCE), []
    heard = closing.enter_context(Proxy(door_dir / "heard.door", timeout=PATIENCE))
    if when != "ahead":
        got = take(stream, 4)
        assert heard() == [name], "without another pull"
    with pytest.raises(Exception, match=f"{name}|on purpose") as caught:
        for number in stream:
            got.append(number)
    assert heard() == [name]
    assert got == list(range(len(got)))
    if name == "Stop" and codec == "pickle":
        assert "in numbers" in str(caught.value.__cause__)
    with Proxy(door_dir / "close.door", timeout=PATIENCE) as close, contextlib.suppress(BrokenDoorError):
        close()  # and its main thread, which ends the process, does not wait for the answer
    assert child.finish().value == [name]


@pytest.mark.ids("F11", "F05")
def test_the_watcher_sends_nothing_that_it_might_have_to_wait_for(monkeypatch):
    """To a stranger, who may never read it, and for whom all other streams would wait."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        line = types.SimpleNamespace(channel=types.SimpleNamespace(socket=ours))

        def goes(size: int, descriptors: tuple[int, ...] = (), uid: int | None = 4242) -> bool:
            invocation: Any = types.SimpleNamespace(credentials=types.SimpleNamespace(uid=uid), line=line)
            return streams._goes_at_once((bytes(size), (), descriptors), invocation)

        assert goes(1000)
        assert not goes(100_000)
        assert not goes(1000, (0,)), "of which he may leave few unread"
        assert goes(100_000, (0,), uid=os.geteuid())
        ours.send(b"an answer that he has not read")
        assert not goes(1000)
        assert not goes(1000, uid=None)
        assert goes(1000, uid=0)
        theirs.recv(100)
        assert goes(1000)


def test_a_watcher_for_which_there_is_no_thread_keeps_nothing(monkeypatch):
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    watcher, pump = streams._Watcher(), object()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        with pytest.raises(RuntimeError):
            watcher.watch(pump)
    assert watcher._since == {}
