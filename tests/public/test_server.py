"""
Servers: what they offer, how they start, run and end, and what they say of themselves.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
import re
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import pytest
from support import rawpeer, wait_until
from support.rawdoor import Background

from doorpool import (
    BrokenDoorError,
    ClosedError,
    Endpoint,
    MarshalError,
    Proxy,
    RemoteError,
    RevokedError,
    Server,
    Statistics,
    current_call,
)


def echo(value: Any = None) -> Any:
    return value


# -- starting


def test_before_start_names_are_only_recorded(door_dir, connect):
    server = Server()
    endpoint = server.attach(echo, door_dir / "a.door")
    server.endpoint(door_dir / "b.door")(echo)
    endpoint.attach(door_dir / "c.door")
    assert list(door_dir.iterdir()) == []
    assert endpoint.paths == ()
    with server:
        assert endpoint.paths == (str(door_dir / "a.door"), str(door_dir / "c.door"))
        for name in "abc":
            assert connect(door_dir / f"{name}.door")(1) == 1


def test_start_returns_the_server_when_every_name_answers(door_dir, connect):
    server = Server()
    for number in range(5):
        server.attach(functools.partial(operator.add, number), door_dir / f"{number}.door")
    with server:
        for number in range(5):
            assert connect(door_dir / f"{number}.door")(10) == number + 10


def test_starting_again_changes_nothing(serve, connect):
    server = serve(echo)
    assert server.start() is server
    with server:
        assert connect()(1) == 1
    assert server.closed


def _missing_folder(path: Path) -> None:
    path.parent.rmdir()


def _regular_file(path: Path) -> None:
    path.write_text("mine")


def _folder(path: Path) -> None:
    path.mkdir()


def _fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("obstacle", [_missing_folder, _regular_file, _folder, _fifo])
@pytest.mark.ids("A07")
def test_start_makes_all_names_or_none(door_dir, connect, obstacle):
    (door_dir / "sub").mkdir()
    server = Server()
    server.attach(echo, door_dir / "a.door")
    server.attach(echo, door_dir / "sub" / "b.door")
    server.attach(echo, door_dir / "c.door")
    obstacle(door_dir / "sub" / "b.door")
    with pytest.raises(OSError) as caught:
        server.start()
    assert "b.door" in str(caught.value)
    assert [path for path in door_dir.iterdir() if path.is_socket()] == []
    # Nothing was lost by it: with the obstacle out of the way the server starts.
    (door_dir / "sub").mkdir(exist_ok=True)
    for path in (door_dir / "sub").iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    with server:
        assert connect(door_dir / "sub" / "b.door")(2) == 2
        assert connect(door_dir / "c.door")(3) == 3


@pytest.mark.ids("N2", "A11")
def test_start_takes_no_name_of_a_living_door(serve, door_dir, connect):
    serve(lambda: "first", "b.door")
    second = Server()
    second.attach(echo, door_dir / "a.door")
    second.attach(lambda: "second", door_dir / "b.door")
    with pytest.raises(FileExistsError):
        second.start()
    second.close()
    assert not (door_dir / "a.door").exists()
    assert connect(door_dir / "b.door")() == "first"


def test_one_name_for_two_endpoints_is_refused(door_dir):
    server = Server()
    server.attach(echo, door_dir / "a.door")
    server.attach(echo, door_dir / "a.door")
    with pytest.raises(FileExistsError):
        server.start()
    server.close()
    assert list(door_dir.iterdir()) == []


def test_on_a_started_server_a_name_is_made_at_once(serve, door_dir, connect):
    server = serve(echo)
    endpoint = server.attach(str.upper, door_dir / "b.door")
    assert endpoint.paths == (str(door_dir / "b.door"),)
    assert connect(door_dir / "b.door")("x") == "X"


def test_a_name_that_cannot_be_made_on_a_started_server_leaves_nothing(serve, door_dir):
    server = serve(echo)
    with pytest.raises(FileNotFoundError):
        server.attach(str.upper, door_dir / "none" / "b.door")
    assert len(server.endpoints) == 1


@pytest.mark.parametrize("end", [Endpoint.close, Endpoint.revoke, Endpoint.detach])
def test_what_was_taken_back_before_start_is_not_made(door_dir, connect, end):
    server = Server()
    server.attach(echo, door_dir / "a.door")
    other = server.attach(echo, door_dir / "b.door")
    end(other)
    with server:
        assert [path.name for path in door_dir.iterdir()] == ["a.door"]
        assert connect()(1) == 1


def test_one_of_several_recorded_names_can_be_taken_back(door_dir):
    server = Server()
    endpoint = server.attach(echo, door_dir / "a.door").attach(door_dir / "b.door")
    endpoint.detach(door_dir / "a.door")
    with pytest.raises(ValueError, match="no name"):
        endpoint.detach(door_dir / "a.door")
    with server:
        assert endpoint.paths == (str(door_dir / "b.door"),)


@pytest.mark.parametrize("started", [False, True])
def test_a_closed_server_cannot_be_used_again(door_dir, started):
    server = Server()
    server.attach(echo, door_dir / "a.door")
    if started:
        server.start()
    server.close()
    server.close()
    assert server.closed
    for use in (server.start, server.__enter__, server.run, lambda: server.attach(echo)):
        with pytest.raises(ClosedError, match="cannot be used again"):
            use()
    assert list(door_dir.iterdir()) == []


def test_a_server_that_was_never_started_needs_no_end():
    for _ in range(3):
        Server()


def test_a_started_server_that_is_dropped_warns():
    server = Server(name="dropped").start()
    with pytest.warns(ResourceWarning, match="unclosed <Server 'dropped'"):
        del server


@pytest.mark.ids("T10")
def test_thread_setup_runs_first_in_each_thread(serve, connect, closing):
    local = threading.local()
    together = threading.Barrier(4)

    def setup() -> None:
        local.ready = True

    def is_set_up() -> bool:
        together.wait(10)
        return bool(local.ready)

    serve(is_set_up, server={"thread_setup": setup})
    proxy = connect()
    assert [future.result() for future in [proxy.submit() for _ in range(4)]] == [True] * 4


@pytest.mark.ids("T11")
def test_start_fails_where_thread_setup_does(door_dir, caplog):
    def setup() -> None:
        raise LookupError("no such device")

    server = Server(thread_setup=setup)
    server.attach(echo, door_dir / "a.door")
    with pytest.raises(RuntimeError, match="thread_setup failed") as caught:
        server.start()
    assert isinstance(caught.value.__cause__, LookupError)
    assert server.closed
    assert list(door_dir.iterdir()) == []


def _interrupt(*_: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("where", ["at the threads", "behind the threads", "at the setup"])
@pytest.mark.ids("T11", "G05")
def test_ctrl_c_in_start_leaves_no_name(door_dir, connect, monkeypatch, where):
    """Until there are threads all is taken back; a server that may serve already is closed."""
    server = Server()
    server.attach(echo, door_dir / "a.door")
    start = server._pools.start
    with monkeypatch.context() as patch:
        if where == "at the setup":
            patch.setattr(server._pools, "wait_set_up", _interrupt)
        elif where == "at the threads":
            patch.setattr(server._pools, "start", _interrupt)
        else:
            patch.setattr(server._pools, "start", lambda: _interrupt(start()))
        with pytest.raises(KeyboardInterrupt):
            server.start()
    assert list(door_dir.iterdir()) == []
    assert server.closed is (where != "at the threads")
    if not server.closed:
        with server:
            assert connect()(1) == 1
    wait_until(lambda: server.statistics().threads == 0)


@pytest.mark.ids("G05")
def test_ctrl_c_in_a_second_start_leaves_the_server_alone(serve, connect, monkeypatch):
    server = serve(echo)
    with monkeypatch.context() as patch:
        patch.setattr(server._pools, "wait_set_up", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.start()
    assert not server.closed
    assert connect()(1) == 1


@pytest.mark.ids("T11")
def test_start_fails_where_thread_setup_does_and_the_log_with_it(door_dir, failing_log):
    def setup() -> None:
        raise LookupError("no such device")

    server, errors = Server(thread_setup=setup), []
    server.attach(echo, door_dir / "a.door")

    def start() -> None:
        try:
            server.start()
        except RuntimeError as error:
            errors.append(str(error))

    starting = threading.Thread(target=start, daemon=True)
    starting.start()
    starting.join(10)
    assert errors == ["doorpool: thread_setup failed"]
    assert server.closed
    assert "thread_setup failed" in failing_log.seen[0]


# -- what can be offered


def test_the_decorator_in_its_three_forms_returns_the_function(door_dir, connect):
    server = Server()

    def one() -> int:
        return 1

    def two() -> int:
        return 2

    def three() -> int:
        return 3

    assert server.endpoint(door_dir / "1.door")(one) is one
    assert server.endpoint()(two) is two
    assert server.endpoint(three) is three
    assert [endpoint.target for endpoint in server.endpoints] == [one, two, three]
    with server:
        assert connect(door_dir / "1.door")() == 1
        for endpoint, value in zip(server.endpoints, (1, 2, 3), strict=True):
            assert connect(endpoint)() == value


def test_the_decorator_takes_the_options_of_attach(door_dir):
    server = Server()
    server.endpoint(door_dir / "a.door", mode=0o640, name="the name", max_request=99)(echo)
    server.endpoint(name="bare", max_request=98)(echo)
    server.endpoint(echo, name="direct", max_request=97)
    with server:
        assert stat.S_IMODE((door_dir / "a.door").stat().st_mode) == 0o640
        assert [(it.name, it.max_request) for it in server.endpoints] == [
            ("the name", 99),
            ("bare", 98),
            ("direct", 97),
        ]


class Counter:
    """Counts."""

    def __init__(self, start: int = 5) -> None:
        self.value = start

    def add(self, number: int) -> int:
        return self.value + number

    def __call__(self, number: int) -> int:
        return self.value * number

    @classmethod
    def named(cls, number: int) -> str:
        return f"{cls.__name__} {number}"

    @staticmethod
    def double(number: int) -> int:
        return 2 * number


def wrapped_async(number: int) -> int:
    return number


async def _async(number: int) -> int:
    return number


functools.update_wrapper(wrapped_async, _async)

TARGETS = {
    "function": (echo, 3, 3, "echo"),
    "lambda": (lambda number: -number, 3, -3, "<lambda>"),
    "bound method": (Counter().add, 3, 8, "Counter.add"),
    "class method": (Counter.named, 3, "Counter 3", "Counter.named"),
    "static method": (Counter.double, 3, 6, "Counter.double"),
    "partial": (functools.partial(operator.sub, 10), 3, 7, "partial"),
    "builtin": (abs, -3, 3, "abs"),
    "method of a builtin": ("{} is it".format, 3, "3 is it", "str.format"),
    "class": (Fraction, 3, Fraction(3), "Fraction"),
    "instance with __call__": (Counter(), 3, 15, "Counter"),
    "a plain function around an async one": (wrapped_async, 3, 3, "_async"),
}


@pytest.mark.parametrize(("target", "argument", "result", "name"), TARGETS.values(), ids=TARGETS)
def test_whatever_can_be_called_can_be_offered(serve, connect, target, argument, result, name):
    server = serve(target)
    assert connect()(argument) == result
    assert server.endpoints[0].name == name
    assert connect().info.name == name


class AsyncCall:
    async def __call__(self) -> None: ...


async def async_generator() -> Any:
    yield 1


class Methods:
    async def coroutine(self) -> None: ...


NO_TARGETS = {
    "a number": (42, "can be called"),
    "None": (None, "can be called"),
    "a string": ("function", "can be called"),
    "an instance": (object(), "can be called"),
    "async def": (_async, "async function"),
    "an async method": (Methods().coroutine, "async function"),
    "a partial of an async def": (functools.partial(_async, 1), "async function"),
    "an instance with an async __call__": (AsyncCall(), "async function"),
    "a partial of one": (functools.partial(AsyncCall()), "async function"),
    "an async generator function": (async_generator, "async function"),
}


@pytest.mark.parametrize(("target", "text"), NO_TARGETS.values(), ids=NO_TARGETS)
def test_what_cannot_be_offered_is_a_type_error(target, text):
    with pytest.raises(TypeError, match=text):
        Server().attach(target)
    with pytest.raises(TypeError, match=text):
        Endpoint(target)


def test_an_endpoint_of_no_server_is_adopted(serve, door_dir, connect):
    endpoint = Endpoint(echo)
    assert endpoint.server is None
    server = Server()
    assert server.attach(endpoint, door_dir / "a.door") is endpoint
    assert endpoint.server is server
    assert server.endpoints == (endpoint,)
    with server:
        assert connect()(4) == 4


@pytest.mark.ids("N5")
def test_an_endpoint_of_this_server_gets_another_name(serve, door_dir, connect):
    server = serve(echo)
    (endpoint,) = server.endpoints
    server.attach(endpoint, door_dir / "b.door", mode=0o666)
    assert server.endpoints == (endpoint,)
    assert endpoint.paths == (str(door_dir / "a.door"), str(door_dir / "b.door"))
    assert stat.S_IMODE((door_dir / "b.door").stat().st_mode) == 0o666
    assert connect() == connect(door_dir / "b.door")


def test_an_endpoint_of_another_server_is_refused(serve, door_dir):
    server = serve(echo)
    with Server() as other, pytest.raises(ValueError, match="another server"):
        other.attach(server.endpoints[0], door_dir / "b.door")
    assert not (door_dir / "b.door").exists()


def test_options_together_with_an_endpoint_are_refused(door_dir):
    with pytest.raises(TypeError, match=r"has its options already: max_request, name"):
        Server().attach(Endpoint(echo), door_dir / "a.door", name="other", max_request=1)


def test_a_closed_endpoint_is_refused(door_dir):
    endpoint = Endpoint(echo)
    endpoint.close()
    with pytest.raises(ClosedError):
        Server().attach(endpoint, door_dir / "a.door")


def test_an_endpoint_that_could_not_be_named_is_still_free(serve, door_dir):
    server = serve(echo)
    endpoint = Endpoint(echo)
    with pytest.raises(FileNotFoundError):
        server.attach(endpoint, door_dir / "none" / "b.door")
    assert endpoint.server is None
    with Server() as other:
        other.attach(endpoint, door_dir / "b.door")
        assert endpoint.server is other


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_threads": 0}, ValueError, "max_threads is at least 1, not 0"),
        ({"max_threads": -1}, ValueError, "max_threads is at least 1"),
        ({"max_threads": True}, TypeError, "max_threads is a whole number, not True"),
        ({"max_threads": 2.0}, TypeError, "max_threads is a whole number"),
        ({"max_threads": None}, TypeError, "max_threads is a whole number"),
        ({"idle_timeout": 0}, ValueError, "idle_timeout is a number of seconds above 0"),
        ({"idle_timeout": -1.0}, ValueError, "idle_timeout"),
        ({"idle_timeout": "10"}, TypeError, "idle_timeout"),
        ({"close_timeout": -1}, ValueError, "a time for closing"),
        ({"close_timeout": False}, TypeError, "timeout"),
        ({"close_timeout": float("nan")}, ValueError, "a time for closing"),
        ({"thread_setup": 5}, TypeError, "thread_setup is something to call, not 5"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_options_of_a_server_are_checked(options, error, text):
    with pytest.raises(error, match=text):
        Server(**options)


def test_idle_and_close_timeouts_may_be_none_and_zero():
    Server(idle_timeout=None, close_timeout=None, max_threads=1)
    Server(close_timeout=0)


# -- running, waiting, closing


def _run_in_thread(server: Server, **options: Any) -> threading.Thread:
    thread = threading.Thread(target=lambda: server.run(**options), name="lent")
    thread.start()
    return thread


def test_run_starts_the_server_and_returns_when_it_is_closed(door_dir, connect):
    server = Server()
    server.attach(echo, door_dir / "a.door")
    thread = _run_in_thread(server)
    assert connect(wait=10)(1) == 1
    assert thread.is_alive()
    server.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.ids("T10", "T13")
def test_thread_setup_runs_first_in_the_lent_thread(door_dir, closing, connect):
    local = threading.local()

    def setup() -> None:
        local.name = threading.current_thread().name

    server = Server(max_threads=1, thread_setup=setup)
    server.attach(lambda: local.name, door_dir / "a.door")
    thread = _run_in_thread(server)
    closing.callback(thread.join, 10)
    closing.callback(server.close)
    proxy = connect(wait=10)
    wait_until(lambda: proxy() == "lent")


@pytest.mark.ids("T10", "T11", "T13")
def test_a_thread_whose_setup_fails_is_not_lent(serve, connect):
    """The server goes on without it."""
    failed: list[BaseException | None] = []

    def setup() -> None:
        if threading.current_thread().name == "lent":
            raise LookupError("no such device")

    def run() -> None:
        with pytest.raises(RuntimeError, match="thread_setup failed") as caught:
            server.run()
        failed.append(caught.value.__cause__)

    server = serve(echo, server={"max_threads": 1, "thread_setup": setup})
    thread = threading.Thread(target=run, name="lent")
    thread.start()
    thread.join(10)
    assert [type(error) for error in failed] == [LookupError]
    assert not server.closed
    assert connect(timeout=10)(1) == 1
    assert server.statistics().threads == 1


@pytest.mark.ids("T13")
def test_the_lent_thread_counts_toward_max_threads_and_serves(door_dir, connect):
    server = Server(max_threads=1)
    server.attach(lambda: threading.current_thread().name, door_dir / "a.door")
    server.start()
    thread = _run_in_thread(server)
    proxy = connect()
    wait_until(lambda: proxy() == "lent", "the one thread there may be is the one that was lent")
    assert server.statistics().threads == 1
    server.close()
    thread.join(10)


def test_run_in_a_thread_that_serves_is_refused(serve, connect, door_dir):
    other = Server()
    server = serve(lambda which: (server, other)[which].run())
    proxy = connect()
    for which in (0, 1):
        with pytest.raises(RuntimeError, match="serves 'doorpool' already"):
            proxy(which)
    other.close()


def test_wait_says_whether_the_server_is_closed(serve):
    server = serve(echo)
    assert server.wait(0.01) is False
    closer = threading.Timer(0.02, server.close)
    closer.start()
    assert server.wait(10) is True
    assert server.wait() is True
    closer.join()
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="timeout"):
            server.wait(wrong)


def test_leaving_with_closes_also_by_an_exception(door_dir):
    server = Server()
    server.attach(echo, door_dir / "a.door")
    with pytest.raises(KeyError), server:
        raise KeyError
    assert server.closed
    assert list(door_dir.iterdir()) == []


def test_a_procedure_can_close_its_server(serve, door_dir, connect):
    server = serve(lambda: (server.close(), "closed")[1])
    assert connect()() == "closed"
    assert server.wait(10)
    assert not (door_dir / "a.door").exists()
    with pytest.raises(FileNotFoundError):
        Proxy(door_dir / "a.door")


def test_two_procedures_that_close_their_server_do_not_wait_for_each_other(serve, connect):
    together = threading.Barrier(2)

    def close() -> str:
        together.wait(10)
        server.close(None)
        return "closed"

    server = serve(close)
    futures = [connect().submit(), connect().submit()]
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(server.wait, 10).result()
    # The one that closes waits for the other; the other does not wait for it.
    assert [future.result(10) for future in futures] == ["closed", "closed"]


def test_names_are_gone_before_running_calls_end(serve, door_dir, connect):
    running, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        running.set()
        go_on.wait(10)
        return "done"

    server = serve(slow)
    proxy = connect(reopen=False)
    idle = connect(reopen=False)
    future = proxy.submit()
    running.wait(10)
    closer = threading.Thread(target=server.close)
    closer.start()
    wait_until(lambda: not (door_dir / "a.door").exists(), "the name goes first")
    wait_until(lambda: server.statistics().channels == 1, "idle channels are told and closed")
    with pytest.raises(RevokedError):
        idle()
    with pytest.raises(RevokedError):
        proxy()
    assert not server.wait(0.01)
    go_on.set()
    assert future.result(10) == "done"
    closer.join(10)
    assert server.closed


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_what_is_left_at_the_end_of_the_time_is_cut(serve, connect, caplog, timeout):
    running, go_on = threading.Event(), threading.Event()

    def stubborn() -> None:
        running.set()
        go_on.wait(10)

    server = serve(stubborn)
    future = connect().submit()
    running.wait(10)
    with caplog.at_level(logging.WARNING, "doorpool"):
        server.close(timeout)
        assert server.wait(0.001), "close() has returned"
    with pytest.raises(BrokenDoorError) as caught:
        future.result(10)
    go_on.set()
    assert caught.value.may_have_run is True
    cuts = [record for record in caplog.records if "cut" in record.getMessage()]
    assert len(cuts) == 1
    assert "stubborn" in cuts[0].getMessage()


def test_close_without_a_limit_waits_for_running_calls(serve, connect):
    running, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        running.set()
        go_on.wait(10)
        return "done"

    server = serve(slow)
    future = connect().submit()
    running.wait(10)
    closer = threading.Thread(target=server.close, args=(None,))
    closer.start()
    assert not server.wait(0.05)
    go_on.set()
    assert future.result(10) == "done"
    closer.join(10)
    assert server.wait(10)


def test_calls_after_close_did_not_run(serve, connect):
    calls = []
    server = serve(calls.append)
    proxy = connect(reopen=False)
    proxy(1)
    server.close()
    for _ in range(3):
        with pytest.raises(RevokedError) as caught:
            proxy(2)
        assert caught.value.may_have_run is False
    assert calls == [1]


# -- signals


_RUNNING = """
    import signal
    from doorpool import Server

    server = Server()

    @server.endpoint("a.door")
    def is_prepared():
        return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

    def handlers():
        return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], signal.set_wakeup_fd(-1)

    before = handlers()
    server.start()
    ready()
    server.run()
    result((before == handlers(), server.closed))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_run_and_the_names_and_puts_the_handlers_back(spawn_server, door_dir, connect, number):
    child = spawn_server(_RUNNING, cwd=door_dir)
    proxy = connect(reopen=False)
    wait_until(proxy, "its handlers are in place")
    child.signal(number)
    finished = child.finish()
    assert finished.returncode == 0
    same_handlers, closed = finished.value
    assert same_handlers
    assert closed
    assert not (door_dir / "a.door").exists()
    with pytest.raises(RevokedError):
        proxy()


_SLOW = """
    from doorpool import Server

    server = Server({options})

    @server.endpoint("a.door")
    def slow():
        open("begun", "w").close()
        open("go on", "r").close()
        return "done"

    ready()
    server.run()
"""


def _rendezvous(folder: Path, name: str, mode: str) -> None:
    (folder / name).open(mode).close()


@pytest.fixture
def fifos(door_dir: Path) -> Path:
    for name in ("begun", "go on"):
        os.mkfifo(door_dir / name)
    return door_dir


def test_a_signal_lets_running_calls_finish(spawn_server, fifos, connect):
    child = spawn_server(_SLOW.format(options="close_timeout=None"), cwd=fifos)
    future = connect(wait=10).submit()
    _rendezvous(fifos, "begun", "r")
    child.signal(signal.SIGTERM)
    wait_until(lambda: not (fifos / "a.door").exists(), "names go first")
    child.signal(signal.SIGTERM)  # the second one is for a server that does not end in time
    assert not future.done()
    _rendezvous(fifos, "go on", "w")
    assert future.result(10) == "done"
    assert child.wait() == 0


def test_a_signal_does_not_wait_longer_than_close_timeout(spawn_server, fifos, connect):
    child = spawn_server(_SLOW.format(options="close_timeout=0.05"), cwd=fifos)
    future = connect(wait=10).submit()
    _rendezvous(fifos, "begun", "r")
    child.signal(signal.SIGTERM)
    with pytest.raises(BrokenDoorError) as caught:
        future.result(10)
    assert caught.value.may_have_run
    wait_until(lambda: "1 calls cut" in child.stderr)
    child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_server_whose_main_thread_is_held(spawn_server, door_dir, connect, number):
    """
    The time for closing is over, and a procedure never gives the main thread back.
    """
    child = spawn_server(
        """
        import threading
        from doorpool import Server

        server = Server(max_threads=1, close_timeout=0.05)

        @server.endpoint("a.door")
        def hold():
            if threading.current_thread() is threading.main_thread():
                open("begun", "w").close()
                threading.Event().wait()

        ready()
        server.run()
        """,
        cwd=door_dir,
    )
    os.mkfifo(door_dir / "begun")

    def call_until_held() -> None:
        while True:
            proxy()

    proxy = connect(wait=10, reopen=False)
    caller = Background(call_until_held)
    _rendezvous(door_dir, "begun", "r")
    child.signal(number)
    error = caller.error()
    assert isinstance(error, BrokenDoorError)
    assert error.may_have_run
    assert not (door_dir / "a.door").exists()
    wait_until(lambda: "1 calls cut" in child.stderr)
    assert not child.ended, "whoever holds the main thread is not broken into"

    child.signal_until_ended(number)
    assert child.wait() == 128 + number


def test_a_handler_of_the_program_is_left_alone(spawn_server, door_dir, connect):
    child = spawn_server(
        """
        import signal
        from doorpool import Server

        server = Server()
        heard = []

        @server.endpoint("a.door")
        def seen():
            return heard

        def mine(number, frame):
            heard.append(number)
            if len(heard) == 2:
                server.close()

        signal.signal(signal.SIGTERM, mine)
        ready()
        server.run()
        result((heard, signal.getsignal(signal.SIGTERM) is mine))
        """,
        cwd=door_dir,
    )
    proxy = connect(wait=10)
    child.signal(signal.SIGTERM)
    wait_until(lambda: proxy() == [signal.SIGTERM], "the program's own handler, and the server goes on")
    child.signal(signal.SIGTERM)
    assert child.finish().value == ([signal.SIGTERM, signal.SIGTERM], True)


@pytest.mark.ids("T13", "X12")
@pytest.mark.parametrize("codec", ["pickle", "data"])
@pytest.mark.parametrize(
    ("handler", "signals", "name"),
    [
        ("lambda *_: sys.exit(3)", True, "SystemExit"),
        ("stop", True, "Stop"),
        ("signal.default_int_handler", False, "KeyboardInterrupt"),
    ],
)
def test_what_a_handler_raises_in_a_procedure_leaves_run(
    spawn_server, door_dir, connect, handler, signals, name, codec
):
    """As it does between two calls.  The caller, whose call has ended by it, hears so."""
    child = spawn_server(
        f"""
        import signal, sys, threading, time
        from doorpool import Server

        class Stop(Exception):
            pass

        def stop(*_):
            raise Stop("on purpose")

        server = Server(max_threads=1)

        @server.endpoint("a.door", codec={codec!r})
        def in_main_thread(stay):
            if stay:
                open("staying", "w").close()
                while True:  # a signal just before a long sleep would wait for its end
                    time.sleep(0.01)
            return threading.current_thread() is threading.main_thread()

        signal.signal(signal.SIGINT, {handler})
        ready()
        try:
            with server:
                server.run(signals={signals})
        except BaseException as error:
            result((type(error).__name__, server.closed))
        """,
        cwd=door_dir,
    )
    proxy = connect(wait=10, reopen=False)
    wait_until(lambda: proxy(False), timeout=20)
    call = proxy.submit(True)
    wait_until(lambda: (door_dir / "staying").exists(), timeout=20)
    child.signal(signal.SIGINT)
    error = call.exception(20)
    assert isinstance(error, RemoteError) is (name != "Stop" or codec == "data"), "an Exception is pickled"
    assert name in f"{type(error).__name__}: {error}"
    assert child.finish().value == (name, True)


STAYS = """
    import signal, sys, threading, time
    from doorpool import Endpoint, Proxy, Server

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop("on purpose")

    def stay():
        open("staying", "w").close()
        while True:
            time.sleep(0.01)

    class Staying:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            stay()

    server = Server(max_threads=1)
    signal.signal(signal.SIGINT, eval(sys.argv[1]))
"""


@pytest.mark.ids("T13", "U11", "U12")
@pytest.mark.parametrize(
    ("handler", "name"), [("stop", "Stop"), ("signal.default_int_handler", "KeyboardInterrupt")]
)
@pytest.mark.parametrize("what", ["len, on_unref=stay", "Staying()", "Staying(), linger=True"])
def test_what_a_handler_raises_as_something_is_let_go_of_leaves_run(
    spawn_server, door_dir, connect, handler, name, what
):
    child = spawn_server(
        STAYS
        + f"""
    @server.endpoint("a.door")
    def hand_out():
        return server.attach({what}) if threading.current_thread() is threading.main_thread() else None

    ready()
    try:
        with server:
            server.run(signals=False)
    except BaseException as error:
        result((type(error).__name__, server.closed))
    """,
        handler,
        cwd=door_dir,
    )
    hand_out, given = connect(wait=10, reopen=False), []
    wait_until(lambda: given.append(hand_out()) or given[-1] is not None, timeout=20)
    held = given[-1]
    if "Staying" in what:
        held._line.enter(None)
    held.close()
    wait_until(lambda: (door_dir / "staying").exists(), timeout=20)
    child.signal(signal.SIGINT)
    assert child.finish().value == (name, True)


@pytest.mark.ids("U12", "G05")
@pytest.mark.parametrize("closes", ["endpoint", "server"])
def test_what_a_handler_raises_as_something_is_left_leaves_close(spawn_server, door_dir, closes):
    child = spawn_server(
        STAYS
        + f"""
    endpoint = server.attach(Staying(), "a.door")
    server.start()
    with Proxy("a.door") as proxy:
        proxy._line.enter(None)
        ready()
        try:
            {closes}.close()
        except BaseException as error:
            result((type(error).__name__, server.closed, endpoint.closed))
    server.close()
    """,
        "signal.default_int_handler",
        cwd=door_dir,
    )
    wait_until(lambda: (door_dir / "staying").exists(), timeout=20)
    child.signal(signal.SIGINT)
    assert child.finish().value == ("KeyboardInterrupt", closes == "server", True)


def test_without_signals_ctrl_c_is_an_exception(spawn_server, door_dir, connect):
    child = spawn_server(
        """
        from doorpool import Server

        server = Server()
        server.attach(str.upper, "a.door")
        with server:
            try:
                ready()
                server.run(signals=False)
            except KeyboardInterrupt:
                result("Ctrl-C")
        """,
        cwd=door_dir,
    )
    child.signal(signal.SIGINT)
    finished = child.finish()
    assert (finished.returncode, finished.value) == (0, "Ctrl-C")
    assert not (door_dir / "a.door").exists()


def test_run_can_raise_the_limit_of_open_files(run_python, door_dir):
    def run() -> tuple[int, int]:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
        server = Server()
        server.start()

        def close_when_lent() -> None:
            wait_until(lambda: server.statistics().threads == 3)  # two, and the one that runs it
            server.close()

        threading.Thread(target=close_when_lent).start()
        server.run(raise_nofile=True)
        return resource.getrlimit(resource.RLIMIT_NOFILE)

    assert run_python(run).value == (512, 512)


def test_a_program_that_ends_without_closing_leaves_no_name(run_python, door_dir):
    run_python(
        """
        from doorpool import Endpoint, Server

        server = Server()
        server.attach(str.upper, "a.door")
        server.start()
        endpoint = Endpoint(str.upper).attach("b.door")
        """,
        cwd=door_dir,
    )
    assert list(door_dir.iterdir()) == []


# -- what a server says of itself


def test_endpoints_are_in_the_order_of_attaching(serve, door_dir):
    server = serve(echo)
    later = [server.attach(echo, name=str(number)) for number in range(5)]
    assert isinstance(server.endpoints, tuple)
    assert server.endpoints[1:] == tuple(later)
    later[2].close()
    assert [endpoint.name for endpoint in server.endpoints] == ["echo", "0", "1", "3", "4"]


@pytest.mark.ids("L2")
def test_statistics(serve, connect):
    running, go_on = threading.Barrier(3), threading.Event()

    def work(how: str) -> None:
        if how == "wait":
            running.wait(10)
            go_on.wait(10)
        if how == "fail":
            raise LookupError

    server = serve(work)
    server.attach(echo)
    before = server.statistics()
    assert (before.served, before.errors, before.running, before.channels, before.doors) == (0, 0, 0, 0, 2)
    proxy = connect()
    proxy("")
    with pytest.raises(LookupError):
        proxy("fail")
    futures = [proxy.submit("wait") for _ in range(2)]
    running.wait(10)
    during = server.statistics()
    assert (during.served, during.errors, during.running, during.channels) == (2, 1, 2, 2)
    assert during.threads >= 3, "one waits for the next call"
    go_on.set()
    for future in futures:
        future.result(10)
    wait_until(lambda: server.statistics().served == 4)
    after = server.statistics()
    assert after.running == 0
    assert after.waited > 0
    assert isinstance(after, Statistics)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        after.served = 7
    server.close()
    assert (server.statistics().doors, server.statistics().channels) == (0, 0)


def test_time_that_callers_wait_for_a_thread_is_counted(serve, connect):
    running, go_on = threading.Event(), threading.Event()

    def slow(first: bool) -> float:
        if first:
            running.set()
            go_on.wait(10)
        return current_call().waited

    server = serve(slow, server={"max_threads": 1})
    first = connect().submit(True)
    running.wait(10)
    proxy = connect()
    channel = proxy._line.handle._idle[-1].socket
    second = proxy.submit(False)
    wait_until(lambda: rawpeer.unread_there(channel), "its request lies in its channel")
    time.sleep(0.05)  # what is measured
    go_on.set()
    first.result(10)
    waited = second.result(10)
    assert waited >= 0.05
    wait_until(lambda: server.statistics().waited >= waited)


@pytest.mark.ids("T2")
def test_idle_threads_retire_to_two(serve, connect):
    together = threading.Barrier(6)
    server = serve(lambda: together.wait(10) and None, server={"idle_timeout": 0.02})
    proxy = connect()
    for future in [proxy.submit() for _ in range(6)]:
        future.result(10)
    wait_until(lambda: server.statistics().threads == 2)
    proxy.ping()
    assert server.statistics().threads == 2


@pytest.mark.ids("T2", "T6", "F04")
def test_no_more_than_max_threads(serve, connect):
    lock, most = threading.Lock(), []
    busy = 0

    def work() -> None:
        nonlocal busy
        with lock:
            busy += 1
            most.append(busy)
        time.sleep(0.002)
        with lock:
            busy -= 1

    server = serve(work, server={"max_threads": 3})
    proxy = connect()
    for future in [proxy.submit() for _ in range(30)]:
        future.result(10)
    assert max(most) <= 3
    assert server.statistics().threads <= 3


@pytest.mark.ids("N13")
def test_a_busy_server_is_opened_at_once(serve, connect):
    running, go_on = threading.Event(), threading.Event()

    def slow() -> None:
        running.set()
        go_on.wait(30)

    serve(slow, server={"max_threads": 1})
    future = connect().submit()
    running.wait(10)
    try:
        late = connect(open_timeout=5)
        assert late.info.name.endswith("slow")
        assert late.alive
    finally:
        go_on.set()
    future.result(10)


def test_threads_carry_the_name_of_the_server(serve, connect):
    serve(lambda: threading.current_thread().name, server={"name": "weather"})
    assert connect()().startswith("weather-")


def test_repr_tells_the_state():
    server = Server(name="weather")
    server.attach(echo)
    assert repr(server) == "<Server 'weather': not started, 1 endpoints>"
    with server:
        assert repr(server) == "<Server 'weather': started, 1 endpoints>"
    assert repr(server) == "<Server 'weather': closed, 1 endpoints>"


# -- what it logs


class Unspeakable:
    def __reduce__(self) -> Any:
        raise TypeError("no words")


def _ordinary() -> None:
    raise LookupError("ordinary")


def _exit() -> None:
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("target", "level", "text", "traceback"),
    [
        (_ordinary, logging.DEBUG, "_ordinary raised", True),
        (_exit, logging.ERROR, "_exit: .*uid=.*: raised what is no Exception", True),
        (Unspeakable, logging.ERROR, "Unspeakable: .*uid=.*: result.* cannot cross", True),
        (lambda: b"0" * 100, logging.ERROR, "uid=.*over max_reply", True),
    ],
    ids=["exception", "exit", "result", "too large"],
)
def test_what_goes_wrong_in_a_procedure_is_logged(serve, connect, caplog, target, level, text, traceback):
    serve(target, max_reply=50 if "over max_reply" in text else 2**20)
    with caplog.at_level(logging.DEBUG, "doorpool"):
        with pytest.raises(Exception):  # noqa: B017 - which one is other tests' matter
            connect()()
        records = wait_until(lambda: [r for r in caplog.records if r.name == "doorpool"])
    (record,) = records
    assert record.levelno == level
    assert re.search(text, record.getMessage())
    assert bool(record.exc_info) is traceback


def test_a_refused_call_is_logged_as_a_warning(serve, connect, caplog):
    class Bad:
        def __reduce__(self) -> Any:
            return (int, ("not a number",))

    serve(echo)
    with caplog.at_level(logging.DEBUG, "doorpool"):
        with pytest.raises(MarshalError):
            connect()(Bad())
        (record,) = wait_until(lambda: [r for r in caplog.records if r.name == "doorpool"])
    assert record.levelno == logging.WARNING


@pytest.mark.ids("T5")
def test_somebody_always_waits_however_short_the_idle_timeout(serve, connect):
    """
    The thread that waits while others run must not retire, or the next caller waits for them.
    """
    held, release = threading.Semaphore(0), threading.Event()

    def hold(long: bool) -> None:
        if long:
            held.release()
            release.wait(20)

    server = serve(hold, server={"idle_timeout": 0.02})
    proxy = connect()
    try:
        calls = [proxy.submit(True) for _ in range(2)]
        for _ in calls:
            assert held.acquire(timeout=10)
        threading.Event().wait(0.2)  # ten times the idle timeout
        assert server.statistics().waiting >= 1
        proxy.options(timeout=10)(False)
    finally:
        release.set()
    for call in calls:
        call.result(10)
