"""
The shared page and the segments, seen from above: what a caller cannot tell, and what it can.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import pytest
from support import wait_until

import doorpool
from doorpool import Proxy, Server, _impl, _segments, _shelf
from doorpool._handle import FOREVER, check_spin

numpy = pytest.importorskip("numpy")

LARGE = 300_000  # elements: some 2 MiB


def identity(value):
    return value


# -- which twin, and how to tell


def run(*arguments, **variables):
    without = {name: value for name, value in os.environ.items() if name != "DOORPOOL_IMPL"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=without | variables, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_version_says_which_twin_is_in_use_and_why():
    said = run("-m", "doorpool", "--version", DOORPOOL_IMPL=_impl.NAME).stdout
    assert f"doorpool {doorpool.__version__}" in said
    assert f"shuttle: {_impl.NAME} (DOORPOOL_IMPL={_impl.NAME})" in said
    forced = run("-m", "doorpool", "--version", DOORPOOL_IMPL="py").stdout
    assert "shuttle: py (DOORPOOL_IMPL=py)" in forced


def test_a_twin_that_there_is_not_is_refused_loudly():
    wrong = run("-c", "import doorpool", DOORPOOL_IMPL="rust")
    assert wrong.returncode == 1
    assert "ImportError: DOORPOOL_IMPL is 'c' or 'py', or not set; not 'rust'" in wrong.stderr
    hidden = "import sys; sys.modules['doorpool._shuttle'] = None; import doorpool"
    missing = run("-c", hidden, DOORPOOL_IMPL="c")
    assert "ImportError: DOORPOOL_IMPL=c, but the compiled shuttle cannot be had" in missing.stderr
    fallen_back = run("-c", f"{hidden}; print(doorpool._impl.NAME, doorpool._impl.WHY)")
    assert fallen_back.stdout.startswith("py the compiled shuttle cannot be had")


# -- spin


@pytest.mark.parametrize("value", [True, -1, float("nan"), "soon"])
def test_spin_is_a_number_of_seconds(value, door_dir):
    with pytest.raises((TypeError, ValueError), match="spin"):
        Server(spin=value)
    with pytest.raises((TypeError, ValueError), match="spin"):
        Proxy(door_dir / "a.door", spin=value)


def test_who_looks_for_ever_does_not_park_at_once():
    assert check_spin(float("inf")) == check_spin(1e300) == check_spin(FOREVER) == FOREVER * 1e9
    assert (check_spin(0), check_spin(None)) == (0, -1)


@pytest.mark.parametrize("spin", [None, 0, 0.01, float("inf")])
def test_calls_are_right_however_long_one_looks(serve, connect, spin):
    serve(identity, server={"spin": spin})
    proxy = connect(spin=spin)
    for value in [*range(200), "x" * 100_000, {"a": [1, 2]}]:
        assert proxy(value) == value


@pytest.mark.skipif(_impl.NAME != "c", reason="no compiled shuttle here")
def test_a_server_thread_that_looks_for_long_sees_its_caller_go(serve, connect):
    server = serve(identity, server={"spin": 60.0})
    proxy = connect()
    assert proxy(1) == 1
    proxy.close()
    wait_until(lambda: server.statistics().channels == 0)


@pytest.mark.skipif(_impl.NAME != "c", reason="no compiled shuttle here")
@pytest.mark.parametrize("spin", [0, 3.0])
def test_a_time_out_holds_however_long_one_looks(serve, connect, closing, spin):
    go_on = threading.Event()
    serve(go_on.wait)
    closing.callback(go_on.set)
    proxy = connect(spin=spin)
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        proxy.options(timeout=0.1)(20)
    assert 0.1 <= time.monotonic() - started < 1.5, "it looked to the end"


# -- what does not fit in the page


@pytest.mark.parametrize("size", [0, 1, 65_000, 65_300, 65_536, 70_000, 1 << 20, 3 << 20])
def test_requests_and_replies_of_any_size(serve, connect, size):
    serve(identity)
    proxy = connect()
    for value in (b"b" * size, "s" * size, [b"l" * size], bytearray(size)):
        came = proxy(value)
        assert (came, type(came)) == (value, type(value))
        assert proxy(7) == 7


def test_a_request_over_the_limit_is_refused_also_when_it_is_in_a_segment(serve, connect):
    server = serve(identity, max_request=1 << 20)
    proxy = connect()
    array = numpy.ones(LARGE)
    assert proxy(array[:1000]).sum() == 1000
    with pytest.raises(doorpool.LimitError):
        proxy(array)
    server.endpoints[0].max_request = 1 << 30
    assert proxy(array).sum() == LARGE
    server.endpoints[0].max_request = 1 << 20  # of which the proxy does not know
    with pytest.raises(doorpool.LimitError) as caught:
        proxy(array)
    assert not caught.value.may_have_run
    assert proxy(1) == 1


# -- segments


@pytest.mark.ids("H04")
def test_an_array_that_is_kept_never_changes_at_either_end(serve, connect):
    kept = []

    def keep(array):
        kept.append(array)
        return array * 2

    serve(keep)
    proxy = connect()
    results = []
    for number in range(8):
        results.append(proxy(numpy.full(LARGE, number)))
    for number in range(8):
        assert (kept[number] == number).all()
        assert (results[number] == 2 * number).all()
    kept[3][:] = -1
    assert proxy(numpy.full(LARGE, 9))[0] == 18
    assert (kept[3] == -1).all()
    assert kept[0].flags.writeable
    assert results[0].flags.writeable


def test_memory_is_used_again_and_given_back(serve, connect):
    server = serve(identity)
    proxy = connect()
    before = _shelf.totals()
    for _ in range(20):
        assert proxy(numpy.ones(LARGE)).sum() == LARGE
    said = server.statistics()
    assert said.segments_reused >= 15
    assert said.segments <= 2
    assert said.segment_bytes >= 8 * LARGE
    proxy.close()
    wait_until(lambda: server.statistics().segments == 0)
    gc.collect()
    wait_until(lambda: _shelf.totals().held_bytes <= before.held_bytes)


def test_statistics_show_what_the_caller_retains(serve, connect):
    server = serve(numpy.zeros)
    proxy = connect()
    kept = [proxy(LARGE) for _ in range(3)]
    wait_until(lambda: server.statistics().segments_retained == 3)
    kept.clear()
    gc.collect()
    proxy(1)  # the next call says so
    assert server.statistics().segments_retained == 0


def test_statistics_show_what_callers_have_made_and_procedures_keep(serve, connect):
    kept = []
    server = serve(kept.append)
    proxy = connect()
    for _ in range(3):
        proxy(numpy.ones(LARGE))
    said = server.statistics()
    assert said.segments_received == 3
    assert said.segment_bytes_received == said.segment_bytes_mapped >= 3 * 8 * LARGE
    assert (said.segments, said.segments_lent) == (0, 0)
    kept.clear()
    proxy.close()
    wait_until(lambda: server.statistics().segments_received == 0)
    said = server.statistics()
    assert said.segment_bytes_received == said.segment_bytes_mapped == 0


def test_statistics_show_what_is_lent(serve, connect, monkeypatch):
    monkeypatch.setattr(_shelf._sweeper, "arm", lambda: None)
    lent = []

    def lend(again):
        lent[:] = [doorpool.empty(LARGE)] if again else []
        return numpy.ones(LARGE)

    server = serve(lend)
    proxy = connect()
    proxy(False)
    proxy(True)  # the call says that the segment is free
    assert server.statistics().segments_lent == 1
    proxy(False)
    assert server.statistics().segments_lent == 0


def test_statistics_show_the_limits_of_bytes_and_calls_go_on_beyond_them(serve, connect, monkeypatch):
    server = serve(identity)
    proxy = connect()
    with monkeypatch.context() as patch:
        patch.setattr(_shelf, "BYTES_OF_PROCESS", 0)
        patch.setattr(_shelf, "BYTES_MAPPED", 0)
        assert proxy(numpy.ones(LARGE)).sum() == LARGE
        said = server.statistics()
    assert (said.segment_bytes_limit, said.segment_bytes_mapped_limit) == (0, 0)
    assert (said.segments, said.segments_received) == (0, 0)
    said = server.statistics()
    assert said.segment_bytes_limit == said.segment_bytes_mapped_limit > LARGE
    monkeypatch.setattr(_shelf, "BYTES_MAPPED", 12 * LARGE)  # for one array, not for two
    kept = [proxy(numpy.full(LARGE, number)) for number in range(3)]
    assert [array[-1] for array in kept] == [0, 1, 2]
    assert all(array.flags.writeable for array in kept)
    assert 0 < _shelf.totals().mapped_bytes <= 12 * LARGE


def test_memory_of_doorpool_crosses_without_a_copy(serve, connect, monkeypatch):
    copied = []
    copy_in = _segments.Own.put

    def put(self, offset, view):
        copied.append(view.nbytes)
        copy_in(self, offset, view)

    monkeypatch.setattr(_segments.Own, "put", put)

    def doubled(array):
        result = doorpool.empty(array.shape)
        numpy.multiply(array, 2, out=result)
        return result

    serve(doubled)
    proxy = connect()
    for number in range(4):
        array = doorpool.empty(LARGE)
        array[:] = number
        came = proxy(array)
        assert (came == 2 * number).all()
        array[:] = -1  # harmless, and our own
        assert (came == 2 * number).all()
    assert copied == []
    proxy(numpy.ones(LARGE))
    assert copied == [8 * LARGE]


def test_passing_the_same_memory_twice_copies_it(serve, connect):
    kept = []
    serve(kept.append)
    proxy = connect()
    array = doorpool.empty(LARGE)
    array[:] = 1
    proxy(array)
    array[:] = 2
    proxy(array)
    assert [(it == value).all() for it, value in zip(kept, (1, 2), strict=True)] == [True, True]


def test_a_buffer_arrives_as_a_view_of_the_same_bytes(serve, connect):
    serve(identity)
    memory = doorpool.buffer(100_000)
    memory[:] = bytes(range(250)) * 400
    came = connect()(memory)
    assert (type(came), bytes(came)) == (memoryview, bytes(range(250)) * 400)
