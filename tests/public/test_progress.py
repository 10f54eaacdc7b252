"""
Progress: what ``track`` reports, to whom, how often, and what it costs nobody.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from doorpool import CallTimeoutError, Proxy, track
from doorpool._progress import _length_of

PATIENCE = 20.0

Reports = list[tuple[int, int | None, str]]


def work(n: int, pause: float = 0.0) -> int:
    total = 0
    for number in track(range(n), "working"):
        time.sleep(pause)
        total += number
    return total


@pytest.fixture
def reports() -> Reports:
    return []


def tell(reports: Reports) -> Any:
    return lambda *report: reports.append(report)


@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_the_first_and_the_last_report_are_made(serve, connect, reports, codec):
    serve(work, codec=codec)
    assert connect().options(progress=tell(reports))(1000) == sum(range(1000))
    assert reports[0] == (0, 1000, "working")
    assert reports[-1] == (1000, 1000, "working")
    done = [report[0] for report in reports]
    assert done == sorted(set(done))


def test_a_proxy_that_listens_shows_itself_as_the_same(serve, connect, reports):
    serve(work)
    assert repr(connect().options(progress=tell(reports))) == repr(connect())


def test_no_more_than_twenty_a_second(serve, connect, reports):
    serve(work)
    begun = time.monotonic()
    connect().options(progress=tell(reports))(300, 0.002)
    took = time.monotonic() - begun
    assert len(reports) <= took / 0.05 + 2
    assert len(reports) >= 3


def test_it_runs_in_the_callers_process(spawn_server, door_dir, closing, reports):
    spawn_server(
        """
        from doorpool import Server, track
        server = Server()
        @server.endpoint("work.door")
        def work(n):
            return [x for x in track(range(n), "over there")]
        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    door = closing.enter_context(Proxy(door_dir / "work.door", timeout=PATIENCE))
    assert door.options(progress=tell(reports))(10) == list(range(10))
    assert reports[-1] == (10, 10, "over there")


def test_who_has_not_asked_costs_nothing(serve, connect, reports):
    kinds = []

    def tracked() -> None:
        kinds.append(type(track([1, 2])))

    serve(tracked)
    connect()()
    assert type(track([1, 2])) is type(iter([]))
    assert kinds == [type(iter([]))]
    listening = connect().options(progress=tell(reports))
    listening.options(progress=None)()
    assert kinds[-1] is type(iter([]))
    listening()
    assert kinds[-1] is not type(iter([]))


def test_views_and_methods_keep_it(serve, connect, reports):
    class Worker:
        def work(self, n: int) -> int:
            return work(n)

    serve(Worker())
    door = connect()
    door.options(progress=tell(reports)).options(timeout=PATIENCE).work(3)
    assert [reports[0], reports[-1]] == [(0, 3, "working"), (3, 3, "working")]
    reports.clear()
    door.work.options(progress=tell(reports))(4)
    assert reports[-1] == (4, 4, "working")
    reports.clear()
    door.work(4)
    assert reports == []


def test_a_total_is_told_if_it_is_known(serve, connect, reports):
    def totals() -> None:
        for it in (track([1]), track(x for x in "ab"), track((x for x in "ab"), "letters", 2)):
            list(it)

    serve(totals)
    connect().options(progress=tell(reports))()
    assert [report[1:] for report in reports] == [(1, "")] * 2 + [(None, "")] * 2 + [(2, "letters")] * 2


class Sized:
    """Three items that cannot say so."""

    def __init__(self, kind: type[BaseException]) -> None:
        self._kind = kind

    def __iter__(self) -> Iterator[int]:
        return iter([1, 2, 3])

    def __len__(self) -> int:
        raise self._kind("how many rows?")


@pytest.mark.parametrize("kind", [TypeError, RuntimeError, SystemExit])
def test_a_length_that_is_not_known_is_not_the_procedures_problem(serve, connect, reports, kind):
    serve(lambda: sum(track(Sized(kind))))
    assert connect()() == 6
    assert connect().options(progress=tell(reports))() == 6
    assert (reports[0], reports[-1]) == ((0, None, ""), (3, None, ""))


def test_a_length_that_is_too_large_for_len_is_not_known(serve, connect, reports):
    serve(lambda: next(track(range(10**20))))
    assert connect().options(progress=tell(reports))() == 0
    assert reports[0] == (0, None, "")


def test_ctrl_c_while_a_length_is_asked_for_is_no_answer():
    with pytest.raises(KeyboardInterrupt):
        _length_of(Sized(KeyboardInterrupt))


def test_a_loop_that_is_left_reports_how_far_it_came(serve, connect, reports):
    def some() -> None:
        for number in track(range(100)):
            if number == 7:
                break

    serve(some)
    connect().options(progress=tell(reports))()
    assert reports[-1] == (7, 100, "")


def test_an_exception_passes(serve, connect, reports):
    def fails() -> None:
        for number in track(range(100)):
            if number == 3:
                raise KeyError(number)

    serve(fails)
    with pytest.raises(KeyError):
        connect().options(progress=tell(reports))()
    assert reports[0] == (0, 100, "")


def test_a_listener_that_raises_is_told_no_more(serve, connect):
    told = []

    def listener(*report: Any) -> None:
        told.append(report)
        raise RuntimeError("no")

    serve(work)
    assert connect().options(progress=listener)(50, 0.005) == sum(range(50))
    assert len(told) == 1


def test_a_listener_that_hangs_does_not_hold_the_procedure_up(serve, connect):
    let_go = threading.Event()

    def listener(*_: Any) -> None:
        let_go.wait(PATIENCE)

    serve(work)
    begun = time.monotonic()
    try:
        assert connect().options(progress=listener)(100) == sum(range(100))
        assert time.monotonic() - begun < 5.0
    finally:
        let_go.set()


def test_a_caller_who_gives_up_is_told_no_more(serve, connect, reports):
    ended = threading.Event()

    def long() -> None:
        try:
            work(100, 0.01)
        finally:
            ended.set()

    serve(long)
    with pytest.raises(CallTimeoutError):
        connect().options(progress=tell(reports), timeout=0.2)()
    assert ended.wait(PATIENCE)


def test_a_generator_reports_while_it_is_pulled(serve, connect, reports):
    def numbers() -> Iterator[int]:
        yield from track(range(500), "streaming")

    serve(numbers)
    assert list(connect().options(progress=tell(reports))()) == list(range(500))
    assert reports[-1] == (500, 500, "streaming")


def test_progress_is_something_to_call(serve, connect):
    serve(work)
    with pytest.raises(TypeError, match="progress"):
        connect().options(progress=5)


def test_a_generator_of_plain_calls_reports_nothing(serve, connect):
    serve(work)
    assert connect()(10) == 45
