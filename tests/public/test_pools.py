"""
Private pools, and calls that would wait for themselves.
"""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import Holdings, wait_until

from doorpool import BrokenDoorError, BusyError, ClosedError, Endpoint, Proxy, Server

PATIENCE = 20.0


def thread_name() -> str:
    return threading.current_thread().name


def threads_called(prefix: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(prefix)]


class Block:
    """A procedure that says that it runs and waits until it may go on."""

    def __init__(self) -> None:
        self._go_on = threading.Event()
        self._lock = threading.Lock()
        self.running = 0
        self.most = 0

    def __call__(self) -> str:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        assert self._go_on.wait(PATIENCE)
        with self._lock:
            self.running -= 1
        return thread_name()

    def wait(self, running: int = 1) -> None:
        wait_until(lambda: self.running == running)

    def release(self) -> None:
        self._go_on.set()


# -- private pools


@pytest.mark.ids("T3", "I2")
@pytest.mark.parametrize("started", [False, True])
def test_a_private_endpoint_has_threads_of_its_own(door_dir, closing, connect, started):
    server = Server(name="house")
    closing.callback(server.close)
    if started:
        server.start()
    server.attach(thread_name, door_dir / "shared.door")
    server.attach(thread_name, door_dir / "own.door", name="own", threads=2)
    server.start()
    own, shared = connect(door_dir / "own.door"), connect(door_dir / "shared.door")
    assert own().startswith("house-own-")
    assert shared().startswith("house-")
    assert not shared().startswith("house-own-")
    assert "private" in own.info.attributes
    assert "private" not in shared.info.attributes


@pytest.mark.ids("T3", "T7")
def test_no_more_calls_at_once_than_its_threads(door_dir, serve, connect):
    block = Block()
    server = serve(block, threads=3)
    proxy = connect()
    futures = [proxy.submit() for _ in range(8)]
    block.wait(3)
    wait_until(lambda: server.statistics().channels == 8)
    assert server.statistics().running == 3
    block.release()
    assert len({future.result(PATIENCE) for future in futures}) <= 3
    assert block.most == 3


@pytest.mark.ids("T3", "L3")
@pytest.mark.parametrize("full", ["the shared pool", "the private pool"])
def test_a_full_pool_does_not_hold_up_the_other(door_dir, closing, connect, full):
    block = Block()
    with Server(max_threads=1) as server:
        own_is_full = full == "the private pool"
        server.attach(block, door_dir / "full.door", threads=1 if own_is_full else None)
        server.attach(thread_name, door_dir / "free.door", threads=None if own_is_full else 1)
        future = connect(door_dir / "full.door").submit()
        block.wait()
        assert connect(door_dir / "free.door", timeout=PATIENCE)()
        block.release()
        future.result(PATIENCE)


def test_statistics_count_all_pools(door_dir, connect):
    with Server() as server:
        server.attach(thread_name, door_dir / "shared.door")
        own = server.attach(thread_name, door_dir / "own.door", threads=3)
        before = server.statistics()
        assert before.threads == 4
        for name in ("shared.door", "own.door", "own.door"):
            connect(door_dir / name)()
        wait_until(lambda: server.statistics().served == 3)
        assert server.statistics().channels == 3
        own.close()
        wait_until(lambda: server.statistics().threads == 2)
        server.attach(thread_name, door_dir / "another.door", threads=1)
        assert server.statistics().served == 3, "what a pool that is gone has done counts still"


@pytest.mark.ids("T15", "R10")
@pytest.mark.parametrize("how", ["close", "unreferenced"])
def test_the_threads_go_with_the_endpoint(serve, how):
    server = serve(thread_name)
    endpoint = server.attach(thread_name, name="own", threads=2)
    descriptor = endpoint.open()
    assert threads_called("doorpool-own")
    if how == "close":
        endpoint.close()
    descriptor.close()
    wait_until(lambda: not threads_called("doorpool-own"))
    assert endpoint.closed


@pytest.mark.ids("R10")
def test_the_threads_go_with_an_endpoint_that_is_dropped():
    held = [Endpoint(thread_name, name="alone", threads=2, linger=True)]
    held[0].open().close()
    assert threads_called("doorpool-default-alone")
    wait_until(lambda: held[0].unreferenced)

    def drop() -> None:
        held.clear()
        wait_until(lambda: gc.collect() >= 0 and not threads_called("doorpool-default-alone"))

    with pytest.warns(ResourceWarning, match="unclosed <Endpoint 'alone'"):
        drop()


def test_a_running_call_of_a_closed_endpoint_is_answered(serve, connect):
    block = Block()
    server = serve(block, threads=1)
    future = connect().submit()
    block.wait()
    server.endpoints[0].close()
    block.release()
    assert future.result(PATIENCE)


@pytest.mark.ids("R2", "E11")
def test_closing_the_server_waits_for_private_calls_and_cuts_what_is_left(serve, connect, door_dir):
    in_time, late = Block(), Block()
    server = serve(in_time, threads=1)
    server.attach(late, door_dir / "late.door", threads=1)
    answered, cut = connect().submit(), connect(door_dir / "late.door").submit()
    in_time.wait()
    late.wait()
    closing = threading.Thread(target=server.close, args=(0.5,))
    closing.start()
    in_time.release()
    assert answered.result(PATIENCE)
    with pytest.raises(BrokenDoorError) as caught:
        cut.result(PATIENCE)
    assert caught.value.may_have_run
    late.release()
    closing.join(PATIENCE)
    wait_until(lambda: not threads_called("doorpool-Block"))


@pytest.mark.ids("T13")
def test_a_lent_thread_serves_the_shared_pool_only(door_dir, connect):
    server = Server(max_threads=1)
    server.attach(thread_name, door_dir / "own.door", threads=2)
    server.attach(thread_name, door_dir / "shared.door")
    runner = threading.Thread(target=server.run, name="lent")
    runner.start()
    try:
        wait_until(lambda: connect(door_dir / "shared.door", wait=PATIENCE)() == "lent")
        block = Block()
        server.attach(block, door_dir / "block.door", threads=2)
        proxy = connect(door_dir / "block.door")
        futures = [proxy.submit() for _ in range(3)]
        block.wait(2)
        block.release()
        assert "lent" not in {future.result(PATIENCE) for future in futures}
    finally:
        server.close()
        runner.join(PATIENCE)


@pytest.mark.ids("T9", "T10", "T11")
@pytest.mark.parametrize("started", [False, True])
def test_thread_setup_runs_in_private_threads_too(door_dir, closing, started, caplog):
    names = []

    def setup() -> None:
        names.append(thread_name())
        if thread_name().startswith("doorpool-own"):
            raise ValueError("on purpose")

    server = Server(thread_setup=setup)
    closing.callback(server.close)
    if started:
        server.start()
    with pytest.raises(RuntimeError, match="thread_setup failed") as caught:
        server.attach(thread_name, door_dir / "own.door", name="own", threads=1)
        server.start()
    assert isinstance(caught.value.__cause__, ValueError)
    assert not (door_dir / "own.door").exists()
    assert any(name.startswith("doorpool-own") for name in names)


@pytest.mark.ids("T10")
def test_thread_setup_may_use_the_endpoint_whose_threads_these_are(door_dir, closing, connect):
    started, begun, opened = threading.Event(), threading.Event(), []

    def setup() -> None:
        if thread_name().startswith("doorpool-own"):
            begun.set()
            assert started.wait(PATIENCE)  # else nobody waits for the setup yet
            endpoint.open().close()
            opened.append(endpoint.info.name)

    server = Server(thread_setup=setup)
    closing.callback(server.close)
    endpoint = server.attach(thread_name, door_dir / "own.door", name="own", threads=2)
    starting = threading.Thread(target=server.start, daemon=True)
    starting.start()
    assert begun.wait(PATIENCE)
    wait_until(lambda: server._started)
    started.set()
    starting.join(PATIENCE)
    assert not starting.is_alive()
    assert opened == ["own"] * 2
    assert connect(door_dir / "own.door")().startswith("doorpool-own")


@pytest.mark.ids("R10", "T11")
@pytest.mark.parametrize("how", ["attach", "open"])
@pytest.mark.parametrize("last", [False, True], ids=["", "and one thread goes last"])
def test_threads_whose_setup_fails_leave_nothing(door_dir, closing, connect, caplog, how, last):
    """Of an endpoint that has them for itself: none is there any more who could give back what they had."""
    fails, go_on, going = [False], threading.Event(), []

    def setup() -> None:
        if fails[0]:
            going.append(thread_name())
            if last and len(going) == 2:
                assert go_on.wait(PATIENCE)
            raise ValueError("on purpose")

    server = Server(thread_setup=setup).start()
    closing.callback(server.close)
    endpoint = server.attach(thread_name, name="own", threads=2)
    before = Holdings()
    fails[0] = True
    with pytest.raises(RuntimeError, match="thread_setup failed"):
        if how == "open":
            endpoint.open()
        else:
            server.attach(thread_name, door_dir / "own.door", name="own", threads=2)
    go_on.set()
    wait_until(lambda: not threads_called("doorpool-own"))
    wait_until(lambda: not Holdings() - before)
    assert server.statistics().threads == 2
    fails[0] = False
    endpoint.attach(door_dir / "own.door")
    assert connect(door_dir / "own.door", timeout=PATIENCE)().startswith("doorpool-own-")


@pytest.mark.parametrize(
    ("threads", "error", "text"),
    [
        (0, ValueError, "threads is at least 1, not 0"),
        (-1, ValueError, "at least 1"),
        (True, TypeError, "threads is a whole number, not True"),
        ("2", TypeError, "not '2'"),
        (1.0, TypeError, "not 1.0"),
    ],
)
def test_the_number_of_threads_is_checked(threads, error, text):
    with pytest.raises(error, match=text):
        Endpoint(thread_name, threads=threads)


def test_a_name_that_cannot_be_made_leaves_no_threads(serve, door_dir):
    server = serve(thread_name)
    (door_dir / "taken").write_text("")
    with pytest.raises(FileExistsError):
        server.attach(thread_name, door_dir / "taken", name="own", threads=1)
    wait_until(lambda: not threads_called("doorpool-own"))


def test_on_a_closed_server_there_are_no_threads_to_be_had(serve):
    server = serve(thread_name)
    endpoint = server.attach(thread_name, threads=1)
    server.close()
    with pytest.raises(ClosedError):
        endpoint.open()


# -- calls that would wait for themselves


class Depth:
    """A procedure that calls its own door so many times."""

    def __init__(self) -> None:
        self.proxy: Any = None

    def __call__(self, levels: int) -> Any:
        if levels == 0:
            return []
        try:
            return [thread_name(), *self.proxy(levels - 1)]
        except BusyError as error:
            return [error]


@pytest.mark.ids("T8", "G08", "L7")
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_call_that_would_wait_for_itself_is_refused(serve, connect, threads, private):
    depth = Depth()
    options = {"threads": threads} if private else {"server": {"max_threads": threads}}
    server = serve(depth, **options)
    depth.proxy = proxy = connect(timeout=PATIENCE)
    assert len(proxy(threads - 1)) == threads - 1, "as deep as there are threads"
    *names, error = proxy(threads)
    assert len(names) == threads - 1
    assert isinstance(error, BusyError)
    assert not error.may_have_run
    assert f"all {threads} threads of" in str(error)
    assert "would wait for itself" in str(error)
    assert len(proxy(threads - 1)) == threads - 1, "and all goes on"
    wait_until(lambda: server.statistics().running == 0)


@pytest.mark.ids("T8", "G08")
@pytest.mark.parametrize("links", [2, 3])
def test_a_ring_of_pools_is_seen(serve, connect, door_dir, links):
    proxies: list[Proxy] = []

    def link(number: int) -> Any:
        def procedure(hops: int) -> Any:
            if hops == 0:
                return [number]
            try:
                return [number, *proxies[(number + 1) % links](hops - 1)]
            except BusyError as error:
                return [number, error]

        return procedure

    server = serve(link(0), "0.door", threads=1)
    for number in range(1, links):
        server.attach(link(number), door_dir / f"{number}.door", threads=1)
    proxies += [connect(door_dir / f"{number}.door", timeout=PATIENCE) for number in range(links)]
    assert proxies[0](links - 1) == list(range(links))
    *numbers, error = proxies[0](links)
    assert numbers == list(range(links))
    assert isinstance(error, BusyError)


@pytest.mark.ids("T8")
def test_two_callers_that_would_block_each_other(serve, connect):
    """Both procedures run and call; when one is refused, the other one has its thread."""
    meet = threading.Barrier(2)
    proxies = []

    def procedure(outer: bool) -> str:
        if not outer:
            return "inner"
        meet.wait(PATIENCE)
        try:
            return proxies[0](False)
        except BusyError:
            return "refused"

    serve(procedure, server={"max_threads": 2})
    proxies.append(connect(timeout=PATIENCE))
    with ThreadPoolExecutor(2) as pool:
        results = sorted(pool.map(proxies[0], [True, True]))
    assert "refused" in results
    assert set(results) <= {"inner", "refused"}


@pytest.mark.ids("T8")
def test_no_call_is_refused_while_a_thread_is_free(serve, connect, many):
    depth = Depth()
    serve(depth, server={"max_threads": 5})
    depth.proxy = proxy = connect(timeout=PATIENCE)
    with ThreadPoolExecutor(4) as pool:  # so never five that wait
        for answer in pool.map(proxy, [1] * many(400, 20_000)):
            (name,) = answer
            assert isinstance(name, str), name


@pytest.mark.ids("T8", "T6")
def test_a_full_pool_whose_threads_work_is_waited_for(serve, connect):
    block, proxies = Block(), []

    def procedure(word: str) -> str:
        return block() if word == "block" else proxies[0]("block") if word == "call" else word

    serve(procedure, server={"max_threads": 2})
    proxies.append(connect(timeout=PATIENCE))
    working = proxies[0].submit("block")
    block.wait()
    waiting = proxies[0].submit("call")
    time.sleep(0.5)  # twice as long as a stuck pool is looked at
    assert not waiting.done()
    block.release()
    assert working.result(PATIENCE)
    assert waiting.result(PATIENCE)
