"""
Server threads: they come with the calls, never too many, and an idle server does nothing at all.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import Child, Holdings, rawpeer, wait_until

from doorpool import BrokenDoorError, Endpoint, MarshalError, Proxy, RemoteError, Server
from doorpool._keeper import keeper
from doorpool._threads import Pool

PATIENCE = 30.0  # seconds until what certainly happens is taken for a hang


@pytest.fixture
def go_on() -> Iterator[threading.Event]:
    """
    What procedures of a test wait for; it comes at the end of the test at the latest.
    """
    event = threading.Event()
    yield event
    event.set()


# -- many callers


@pytest.mark.ids("L2", "T1", "T5")
def test_64_threads_of_one_client_take_little_longer_than_one(spawn_server, door_dir, connect, many):
    """
    Under a tenth of the time that their calls would take one after the other.
    """
    spawn_server(
        """
        import time
        from doorpool import Server

        server = Server()
        server.attach(time.sleep, "a.door")
        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    proxy, threads, nap = connect(), 64, 0.2
    sample = many(4, 64)
    began = time.monotonic()
    for _ in range(sample):
        proxy(nap)
    serial = (time.monotonic() - began) / sample * threads
    together = threading.Barrier(threads + 1)

    def call() -> None:
        for _ in range(3):
            together.wait(PATIENCE)
            proxy(nap)
            together.wait(PATIENCE)

    rounds = []
    with ThreadPoolExecutor(threads) as pool:
        calls = [pool.submit(call) for _ in range(threads)]
        for _ in range(3):  # in the first one, 63 channels are opened and as many threads started
            together.wait(PATIENCE)
            began = time.monotonic()
            together.wait(PATIENCE)
            rounds.append(time.monotonic() - began)
        for done in calls:
            done.result()
    assert min(rounds) < serial / 10, f"{rounds} s against {serial:.1f} s one after the other"


_A_THOUSAND = """
    import os
    from doorpool import Server

    server = Server(idle_timeout=0.1)

    @server.endpoint("a.door")
    def answer(number):
        return number, os.getpid(), server.statistics().channels

    with server:
        ready()
        server.run(raise_nofile=True)
"""

_HOLDERS = """
    import os, resource, sys
    from concurrent.futures import ThreadPoolExecutor
    from doorpool import Proxy

    go_on, first, count, threads = map(int, sys.argv[1:])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    proxies = [Proxy("a.door", open_timeout=30) for _ in range(count)]
    ready()
    os.read(go_on, 1)
    with ThreadPoolExecutor(threads) as pool:
        result(list(pool.map(lambda number: proxies[number - first](number), range(first, first + count))))
    for proxy in proxies:
        proxy.close()
"""


def _threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


@pytest.mark.ids("T1", "T2", "F10t")
def test_a_thousand_clients_are_held_by_a_handful_of_threads(spawn_server, spawn_python, door_dir):
    """
    An open channel costs no thread; and each of them still gets its own answer.
    """
    processes, each = 4, 250
    server = spawn_server(_A_THOUSAND, cwd=door_dir)
    wait, go_on = os.pipe()
    with open(go_on, "wb") as starter:
        with open(wait, "rb"):
            holders = [
                spawn_python(_HOLDERS, wait, n * each, each, 4, cwd=door_dir, pass_fds=[wait])
                for n in range(processes)
            ]
        for holder in holders:
            holder.wait_ready(40)
        # Two threads of the pool at most, or one and the main thread; and the keeper.
        wait_until(lambda: _threads_of(server.pid) <= 4, "the threads retire")
        starter.close()
        answers = [answer for holder in holders for answer in holder.finish().value]
    assert [number for number, _, _ in answers] == list(range(processes * each))
    assert {pid for _, pid, _ in answers} == {server.pid}
    assert max(channels for _, _, channels in answers) == processes * each


_IDLE_SERVER = """
    import os
    from doorpool import Server

    server = Server(idle_timeout=0.05)
    server.attach(os.getpid, "a.door")
    server.attach(os.getppid, "b.door")
    with server:
        ready()
        server.run()
"""

_IDLE_CLIENT = """
    import os
    from doorpool import Proxy

    with Proxy("a.door") as first, Proxy("b.door") as second:
        first(), second(), first.submit().result()
        reader, writer = os.pipe()
        ready()
        os.read(reader, 1)
"""


def _activity(children: list[Child]) -> dict[str, tuple[str, ...]]:
    """Read how often each thread has been switched to another, and how long it ran (nanoseconds)."""
    seen = {}
    for child in children:
        for task in Path(f"/proc/{child.pid}/task").iterdir():
            lines = (task / "status").read_text().splitlines()
            switches = [line for line in lines if "ctxt_switches" in line]
            assert len(switches) == 2
            seen[str(task)] = (*switches, (task / "schedstat").read_text().split()[0])
    return seen


@pytest.mark.ids("T2")
def test_an_idle_server_with_idle_clients_does_nothing_at_all(spawn_server, spawn_python, door_dir):
    server = spawn_server(_IDLE_SERVER, cwd=door_dir)
    clients = [spawn_python(_IDLE_CLIENT, cwd=door_dir) for _ in range(3)]
    for client in clients:
        client.wait_ready()
    children = [server, *clients]

    def settled() -> bool:
        """Tell whether surplus threads have retired, and all have gone to sleep."""
        before = _activity(children)
        time.sleep(0.3)  # six times the idle timeout
        return _activity(children) == before

    wait_until(settled, "the server goes to sleep", timeout=PATIENCE)
    before = _activity(children)
    time.sleep(5)  # what is measured
    assert _activity(children) == before
    assert len([task for task in before if f"/{server.pid}/" in task]) >= 3


# -- a full pool


@pytest.mark.ids("T6", "L11", "F04")
def test_callers_of_a_full_pool_wait_in_the_kernel(serve, connect, go_on):
    """
    With no error and no limit, until a thread is free; the server knows nothing of them before.
    """
    ran: list[int] = []
    running = threading.Semaphore(0)

    def work(number: int) -> int:
        ran.append(number)
        running.release()
        assert go_on.wait(PATIENCE)
        return number

    server = serve(work, server={"max_threads": 2})
    holders = [connect().submit(number) for number in (100, 101)]
    for _ in holders:
        assert running.acquire(timeout=PATIENCE)
    proxies = [connect() for _ in range(20)]
    channels = [proxy._line.handle._idle[-1].socket for proxy in proxies]
    waiting = [proxy.submit(number) for number, proxy in enumerate(proxies)]
    wait_until(lambda: all(map(rawpeer.unread_there, channels)), "their requests lie in their channels")
    statistics = server.statistics()
    assert (statistics.threads, statistics.running, statistics.served) == (2, 2, 0)
    assert sorted(ran) == [100, 101]
    before = statistics.waited
    time.sleep(0.05)  # what is measured
    go_on.set()
    assert [future.result(PATIENCE) for future in waiting] == list(range(20))
    assert [future.result(PATIENCE) for future in holders] == [100, 101]
    assert sorted(ran) == [*range(20), 100, 101]
    assert server.statistics().waited - before >= 20 * 0.05
    assert server.statistics().threads == 2


@pytest.mark.ids("N13")
def test_64_knocks_at_once_are_answered_while_all_threads_are_busy(serve, door_dir, connect, go_on):
    running = threading.Event()

    def work() -> None:
        running.set()
        assert go_on.wait(PATIENCE)

    serve(work, server={"max_threads": 1})
    held = connect().submit()
    assert running.wait(PATIENCE)
    together = threading.Barrier(64)

    def knock() -> Proxy:
        together.wait(PATIENCE)
        return Proxy(door_dir / "a.door", open_timeout=PATIENCE / 2)

    with ThreadPoolExecutor(64) as pool:
        knocks = [pool.submit(knock) for _ in range(64)]
        opened = [knocking.result() for knocking in knocks]
    assert not held.done()
    assert all(proxy.alive for proxy in opened)
    for proxy in opened:
        proxy.close()
    go_on.set()
    held.result(PATIENCE)


# -- no thread to be had


class Shortage:
    """
    Lets threads of doorpool be had, or not; all others are.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: float = float("inf")
        self.refused = 0
        start = threading.Thread.start

        def start_if_there_is_one(thread: threading.Thread) -> None:
            if thread.name.startswith("short"):
                if self.left <= 0:
                    self.refused += 1
                    raise RuntimeError("can't start new thread")
                self.left -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_if_there_is_one)


@pytest.fixture
def shortage(monkeypatch: pytest.MonkeyPatch) -> Shortage:
    return Shortage(monkeypatch)


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.ids("T11")
def test_all_first_threads_or_none(door_dir, connect, shortage, left):
    server = Server(name="short")
    server.attach(os.getpid, door_dir / "a.door")
    shortage.left = left
    with pytest.raises(RuntimeError, match="can't start new thread"):
        server.start()
    assert not (door_dir / "a.door").exists()
    wait_until(lambda: server.statistics().threads == 0, "the one that was had is sent away")
    wait_until(lambda: not any(it.name.startswith("short") for it in threading.enumerate()))
    # Nothing was lost by it: when there are threads again, the server starts.
    shortage.left = float("inf")
    with server:
        assert connect()() == os.getpid()
        assert server.statistics().threads == 2


@pytest.mark.ids("T11")
def test_names_that_a_failed_start_takes_back_close_no_endpoint(door_dir, connect, shortage, monkeypatch):
    """The one thread that was had hears that the door has no name any more, before it is sent away."""
    told = []
    server = Server(name="short")
    server.attach(os.getpid, door_dir / "a.door", on_unref=lambda: told.append("unreferenced"))
    pool = server._shared_pool
    shortage.left = 1
    with monkeypatch.context() as patch:
        patch.setattr(Pool, "send_away", lambda pool: None)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            server.start()
    wait_until(lambda: not pool._jobs and pool.gate.waiting == 1)
    pool.send_away()
    wait_until(lambda: server.statistics().threads == 0)
    shortage.left = float("inf")
    with server:
        assert connect()() == os.getpid()
    assert told == []


@pytest.mark.parametrize("left", [2, 3])
@pytest.mark.ids("T11")
def test_the_first_threads_of_all_pools_or_none(door_dir, connect, shortage, left):
    """Those of the shared pool are had, and one or none of the two of an endpoint's own."""
    server = Server(name="short")
    server.attach(os.getpid, door_dir / "a.door")
    server.attach(os.getpid, door_dir / "b.door", name="own", threads=2)
    shortage.left = left
    with pytest.raises(RuntimeError, match="can't start new thread"):
        server.start()
    wait_until(lambda: server.statistics().threads == 0, "those that were had are sent away")
    shortage.left = float("inf")
    with server:
        assert connect()() == os.getpid()
        assert connect(door_dir / "b.door")() == os.getpid()
        assert server.statistics().threads == 4


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.ids("T11")
def test_an_endpoint_that_found_no_threads_of_its_own(door_dir, serve, connect, shortage, left):
    server = serve(os.getpid, server={"name": "short"})
    before = server.statistics().threads
    shortage.left = left
    with pytest.raises(RuntimeError, match="can't start new thread"):
        server.attach(os.getpid, door_dir / "b.door", name="own", threads=2)
    assert not (door_dir / "b.door").exists()
    wait_until(lambda: not any(it.name.startswith("short-own") for it in threading.enumerate()))
    assert server.statistics().threads == before
    shortage.left = float("inf")
    server.attach(os.getpid, door_dir / "b.door", name="own", threads=2)
    assert connect(door_dir / "b.door")() == connect()() == os.getpid()


def test_a_call_that_cannot_be_answered_costs_no_thread(serve, connect, monkeypatch, caplog):
    server, proxy = serve(os.getpid), connect(timeout=PATIENCE)

    def fail(*_: Any) -> Any:
        raise LookupError("a fault in the library")

    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "_serve", fail)
        with pytest.raises(BrokenDoorError, match="the server failed to answer") as caught:
            proxy()
    assert caught.value.may_have_run
    wait_until(lambda: "could not be answered" in caplog.text)
    assert "a fault in the library" in caplog.text
    assert proxy() == os.getpid()
    wait_until(lambda: (server.statistics().served, server.statistics().errors) == (2, 1))


@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_a_log_that_fails_costs_no_call_and_no_thread(serve, connect, failing_log, codec):
    def work(how: str) -> Any:
        if how == "ends":
            raise SystemExit
        return threading.Lock() if how == "returns" else os.getpid()

    server, proxy = serve(work, codec=codec, server={"max_threads": 2}), connect(timeout=PATIENCE)
    for _ in range(3):
        with pytest.raises(RemoteError):
            proxy("ends")
        with pytest.raises(MarshalError):
            proxy("returns")
    assert len(failing_log.seen) == 6
    assert proxy("is well") == os.getpid()
    assert server.statistics().threads == 2


def test_a_call_that_cannot_be_answered_costs_no_thread_though_the_log_fails(
    serve, connect, monkeypatch, failing_log
):
    server, proxy = serve(os.getpid, server={"max_threads": 2}), connect(timeout=PATIENCE)

    def fail(*_: Any) -> Any:
        raise LookupError("a fault in the library")

    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "_serve", fail)
        for _ in range(3):
            with pytest.raises(BrokenDoorError, match="the server failed to answer"):
                proxy()
    assert proxy() == os.getpid()
    assert len(failing_log.seen) == 3
    assert server.statistics().threads == 2


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("left", [0, 1])
def test_a_server_that_found_no_threads_can_be_dropped(door_dir, shortage, left, caplog):
    server = Server(name="short")
    server.attach(os.getpid, door_dir / "a.door")
    shortage.left = left
    with pytest.raises(RuntimeError, match="can't start"):
        server.start()
    del server
    wait_until(lambda: not any(it.name.startswith("short") for it in threading.enumerate()))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_the_keeper_leaves_it_to_another_to_say_that_it_found_no_thread(shortage, caplog):
    """A handler of the program's may wait for somebody who waits for the keeper."""
    with Server(name="short") as server:
        shortage.left = 0
        keeper().soon(server._close_by_signal)
        wait_until(lambda: [it for it in caplog.records if "no thread to close it" in it.getMessage()])
        shortage.left = float("inf")
        assert server.wait(PATIENCE)
    assert {it.threadName for it in caplog.records} == {"doorpool-keeper-log"}


def _start_without_threads() -> list[str]:
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1024))
    said = []
    server = Server()
    server.attach(os.getpid, "a.door")
    before = Holdings()
    for _ in range(3):
        try:
            server.start()
        except RuntimeError as error:
            said.append(str(error))
    left = Holdings() - before
    names = [name for name in os.listdir() if name.endswith("door")]
    resource.setrlimit(resource.RLIMIT_NPROC, (1024, 1024))
    with server, Proxy("a.door") as proxy:
        served = proxy() == os.getpid()
    return [*said, *left, *names, f"served: {served}"]


@pytest.mark.ids("T11", "F03")
def test_a_user_who_may_have_no_threads_can_start_no_server(root_only, run_python, door_dir):
    """
    The kernel refuses the first thread, that of the keeper; no descriptor is lost by it.
    """
    door_dir.chmod(0o1777)
    finished = run_python(_start_without_threads, uid=54321, cwd=door_dir)
    assert finished.value == ["can't start new thread"] * 3 + ["served: True"]


@pytest.mark.ids("T17", "F03")
def test_threads_that_cannot_be_had_later_are_done_without(serve, connect, shortage, go_on, caplog):
    """
    Those that there are serve all callers, it is said once, and it is over when there are threads again.
    """
    running = threading.Semaphore(0)

    def work(number: int) -> int:
        running.release()
        assert go_on.wait(PATIENCE)
        return number

    server = serve(work, server={"name": "short"})
    shortage.left = 0
    with caplog.at_level(logging.WARNING, "doorpool"):
        calls = [connect().submit(number) for number in range(6)]
        for _ in range(2):
            assert running.acquire(timeout=PATIENCE)
        assert server.statistics().threads == 2
        assert not running.acquire(timeout=0.1), "nobody is there for the third"
        go_on.set()
        assert [call.result(PATIENCE) for call in calls] == list(range(6))
        assert [connect()(number) for number in range(3)] == [0, 1, 2]
    assert shortage.refused >= 1
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == ["short: no further thread: can't start new thread"]

    go_on.clear()
    proxies = [connect() for _ in range(6)]
    shortage.left = float("inf")
    began = time.monotonic()
    calls = [proxy.submit(number) for number, proxy in enumerate(proxies)]
    for _ in range(2 + 4 + 3 + 6 - 2):  # those before, and six at once
        assert running.acquire(timeout=PATIENCE)
    assert time.monotonic() - began < 1.0
    assert server.statistics().threads >= 6
    go_on.set()
    assert [call.result(PATIENCE) for call in calls] == list(range(6))


@pytest.mark.ids("T17", "F03")
def test_a_signal_ends_the_server_when_there_are_threads_again(run_python, door_dir):
    """
    The thread that closes it could not be had at first.
    """
    finished = run_python(
        """
        import os, signal, threading
        from doorpool import Proxy, RemoteError, Server

        server = Server(name="short")
        tries = []
        start = threading.Thread.start

        def refuse_twice(thread):
            if thread.name == "short-closing" and len(tries) < 2:
                tries.append(thread.name)
                raise RuntimeError("can't start new thread")
            start(thread)

        threading.Thread.start = refuse_twice

        @server.endpoint("a.door")
        def end():
            os.kill(os.getpid(), signal.SIGTERM)

        def call():
            with Proxy("a.door", wait=10) as proxy:
                proxy()

        client = threading.Thread(target=call)
        client.start()
        server.run()
        client.join()
        result((len(tries), server.closed))
        """,
        cwd=door_dir,
    )
    assert finished.value == (2, True)
    assert "please report" not in finished.stderr


# -- the main thread


def _who_serves(max_threads: int, callers: int) -> tuple[list[list[str]], int]:
    """Run a server; return in which threads ``callers`` calls at once ran, and how many there are."""
    server = Server(max_threads=max_threads)
    together = threading.Barrier(callers)
    rounds: list[list[str]] = []
    threads = 0

    @server.endpoint("a.door")
    def where() -> str:
        together.wait(PATIENCE)
        name = threading.current_thread().name
        return "main" if threading.current_thread() is threading.main_thread() else name

    def call() -> None:
        nonlocal threads
        with Proxy("a.door", wait=10) as proxy, ThreadPoolExecutor(callers) as pool:
            for _ in range(1000):
                rounds.append([it.result() for it in [pool.submit(proxy) for _ in range(callers)]])
                if "main" in rounds[-1]:
                    break
        threads = server.statistics().threads
        server.close()

    client = threading.Thread(target=call)
    client.start()
    server.run()
    client.join()
    return rounds, threads


@pytest.mark.parametrize(("max_threads", "callers"), [(1, 1), (3, 3), (64, 8)])
@pytest.mark.ids("T13")
def test_run_lends_the_main_thread(run_python, door_dir, max_threads, callers):
    """
    It counts: with one thread at most, it is the only one.
    """
    rounds, threads = run_python(_who_serves, max_threads, callers, cwd=door_dir).value
    assert "main" in rounds[-1]
    assert threads <= max_threads
    assert all(len(set(names)) == callers for names in rounds), "each call had a thread of its own"


@pytest.mark.ids("T13")
def test_a_loan_that_an_exception_ends_leaves_somebody_to_serve(run_python, door_dir):
    """
    The only thread had made room for the main thread, which then goes.
    """
    finished = run_python(
        """
        import os, signal, threading
        from doorpool import Proxy, RemoteError, Server

        server = Server(max_threads=1)

        @server.endpoint("a.door")
        def where():
            return threading.current_thread() is threading.main_thread()

        def interrupt():
            with Proxy("a.door", wait=10) as proxy:
                while not proxy():
                    pass
            os.kill(os.getpid(), signal.SIGINT)

        client = threading.Thread(target=interrupt)
        client.start()
        with server:
            try:
                server.run(signals=False)
            except KeyboardInterrupt:
                with Proxy("a.door", timeout=10) as proxy:
                    result((proxy(), server.statistics().threads))
        client.join()
        """,
        cwd=door_dir,
    )
    assert finished.value == (False, 1)


@pytest.mark.ids("T13", "X12")
def test_a_loan_that_an_exception_ends_lets_go_of_its_last_channel(run_python, door_dir):
    """
    The main thread keeps the channel that it has answered, for the caller's next call, and then goes.
    """
    finished = run_python(
        """
        import signal, threading
        from doorpool import Proxy, RemoteError, Server

        server = Server(max_threads=1)
        outcome = []

        @server.endpoint("a.door")
        def interrupt():
            if threading.current_thread() is threading.main_thread():
                signal.raise_signal(signal.SIGINT)
            return threading.current_thread().name

        def call_twice():
            with Proxy("a.door", wait=10, timeout=10, reopen=False) as proxy:
                try:
                    while True:
                        proxy()
                except RemoteError as error:
                    outcome.append("KeyboardInterrupt" in str(error))
                left.wait(10)
                outcome.append(proxy().startswith("doorpool-"))

        left = threading.Event()
        client = threading.Thread(target=call_twice)
        with server:
            client.start()
            try:
                server.run(signals=False)
            except KeyboardInterrupt:
                left.set()
                client.join()
            result(outcome)
        """,
        cwd=door_dir,
    )
    assert finished.value == [True, True]


def test_a_thread_that_fails_lets_go_of_its_last_channel(serve, connect, monkeypatch, caplog):
    """
    It has answered, and would have taken the caller's next call; another thread does.
    """
    serve(os.getpid)
    proxy = connect(timeout=PATIENCE, reopen=False)
    run, gone = Pool._run, threading.Event()

    def run_and_fail(pool: Pool, thread: threading.Thread, invocation: Any) -> None:
        run(pool, thread, invocation)
        if not gone.is_set():
            gone.set()
            raise LookupError("a fault in the library")

    monkeypatch.setattr(Pool, "_run", run_and_fail)
    assert proxy() == os.getpid()
    assert gone.wait(PATIENCE)
    assert proxy() == os.getpid()
    assert "a server thread failed" in caplog.text


@pytest.mark.ids("T14")
def test_a_thread_that_a_signal_has_woken_waits_on(spawn_server, door_dir, connect, many):
    """
    A handler of the program runs in the lent main thread, which then takes the next call.
    """
    server = spawn_server(
        """
        import signal, threading
        from doorpool import Server

        server = Server(max_threads=1)
        heard = []

        @server.endpoint("a.door")
        def count():
            return threading.current_thread() is threading.main_thread(), len(heard)

        signal.signal(signal.SIGUSR1, lambda *_: heard.append(threading.current_thread().name))
        with server:
            ready()
            server.run()
            result(set(heard))
        """,
        cwd=door_dir,
    )
    proxy = connect(timeout=PATIENCE)
    wait_until(lambda: proxy()[0], "the main thread serves")
    for number in range(1, many(50, 1000) + 1):
        server.signal(signal.SIGUSR1)
        wait_until(lambda number=number: proxy() == (True, number))
    server.signal(signal.SIGTERM)
    finished = server.finish()
    assert (finished.returncode, finished.value) == (0, {"MainThread"})


# -- and none is left


@pytest.mark.parametrize("end", ["close", "procedure", "revoke"])
@pytest.mark.ids("T15", "R10")
def test_no_thread_lingers(serve, connect, end):
    """
    Of a server that is closed none is there any more; of a door that was revoked, the server's two.
    """

    def threads() -> int:
        return _threads_of(os.getpid())

    together = threading.Barrier(12)
    server: Server

    def work(last: bool) -> None:
        if last:
            server.close()
        else:
            together.wait(PATIENCE)

    at_first = threads()
    server = serve(work, server={"idle_timeout": 0.05})
    proxies = [connect(reopen=False) for _ in range(12)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda proxy: proxy(False), proxies))
    assert server.statistics().threads >= 12
    if end == "close":
        server.close()
        assert server.statistics().threads == 0
    elif end == "procedure":
        proxies[0](True)
        wait_until(lambda: server.statistics().threads == 0)
    else:
        server.endpoints[0].revoke()
        wait_until(lambda: server.statistics().threads == 2)
        wait_until(lambda: threads() <= at_first + 2)
        server.close()
    wait_until(lambda: threads() <= at_first, "the kernel has none of them")


# -- calls in calls


def _ping_pong(depth: int, other: Callable[[], Proxy]) -> Callable[[int], list[int]]:
    def play(ball: int) -> list[int]:
        mine = [os.getpid()]
        return mine if ball == depth else mine + other()(ball + 1)

    return play


@pytest.mark.ids("G08", "L7")
def test_two_doors_of_a_process_call_each_other(door_dir, connect):
    depth = 50
    with Server() as server:
        server.attach(_ping_pong(depth, lambda: b), door_dir / "a.door")
        server.attach(_ping_pong(depth, lambda: a), door_dir / "b.door")
        a, b = connect(), connect(door_dir / "b.door")
        for _ in range(3):
            assert a.options(timeout=PATIENCE)(0) == [os.getpid()] * (depth + 1)


_PLAYER = """
    import os, sys
    from doorpool import Proxy, RemoteError, Server

    mine, other, depth = sys.argv[1:]
    server = Server()
    partner = None

    @server.endpoint(mine)
    def play(ball):
        return [os.getpid()] + (partner(ball + 1) if ball < int(depth) else [])

    with server:
        ready()
        with Proxy(other, wait=20) as partner:
            server.run()
"""


@pytest.mark.ids("G08", "L7")
def test_two_processes_call_each_other(spawn_python, door_dir, connect):
    depth = 50
    players = [
        spawn_python(_PLAYER, *names, depth, cwd=door_dir)
        for names in (("a.door", "b.door"), ("b.door", "a.door"))
    ]
    for player in players:
        player.wait_ready()
    a, b = connect(), connect(door_dir / "b.door")
    wait_until(lambda: all(_has_partner(door, depth) for door in (a, b)), "both have found the other")
    expected = [players[ball % 2].pid for ball in range(depth + 1)]
    for _ in range(3):
        assert a.options(timeout=PATIENCE)(0) == expected
    with ThreadPoolExecutor(4) as pool:
        at_once = [pool.submit(door.options(timeout=PATIENCE), depth - 10) for door in (a, b, a, b)]
        assert [len(call.result()) for call in at_once] == [11] * 4


@pytest.mark.ids("G08", "T8")
def test_two_processes_of_one_thread_each_wait_no_longer_than_they_said(spawn_python, door_dir, connect):
    """
    No process can see that a call comes round through another one; the time of a call ends it.
    """
    depth = 20
    one_thread = _PLAYER.replace("Server()", "Server(max_threads=1)")
    assert one_thread != _PLAYER
    one_thread = one_thread.replace("wait=20)", "wait=20, timeout=0.5)")
    players = [
        spawn_python(one_thread, *names, depth, cwd=door_dir)
        for names in (("a.door", "b.door"), ("b.door", "a.door"))
    ]
    for player in players:
        player.wait_ready()
    a, b = connect(timeout=PATIENCE), connect(door_dir / "b.door", timeout=PATIENCE)
    wait_until(lambda: all(_has_partner(door, depth) for door in (a, b)), "both have found the other")
    for door in (a, b, a):
        began = time.monotonic()
        with pytest.raises(RemoteError, match="CallTimeoutError") as caught:
            door(0)
        assert caught.value.may_have_run
        assert 0.5 <= time.monotonic() - began < PATIENCE / 2
        wait_until(lambda: all(_has_partner(door, depth) for door in (a, b)), "and all goes on")


def _has_partner(door: Any, depth: int) -> bool:
    try:
        return len(door(depth - 1)) == 2
    except (TypeError, RemoteError):  # None is not callable; a call that was given up has the thread still
        return False
