"""
Proxies: how a door is opened, called, looked at, passed on and closed.
"""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import math
import multiprocessing
import os
import pickle
import socket
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import attrs
import numpy
import pytest
from support import wait_until
from support.described import described

from doorpool import (
    AccessError,
    BrokenDoorError,
    CallTimeoutError,
    ClosedError,
    Descriptor,
    DoorError,
    DoorInfo,
    Endpoint,
    NotADoorError,
    Proxy,
    Server,
)


def echo(value: Any = None, *rest: Any, **named: Any) -> Any:
    """
    Give it back.
    """
    return (value, rest, named) if rest or named else value


@pytest.fixture
def server(serve) -> Server:
    """A server in this process, with ``echo`` at ``a.door``."""
    return serve(echo)


ECHO_SERVER = """
    import os, sys
    from doorpool import Server

    server = Server()

    @server.endpoint("a.door")
    def answer(value=None):
        return os.getpid() if value == "pid" else value

    with server:
        ready()
        server.run()
"""


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


# -- what a door can be given as


class MyPath:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.mark.parametrize("kind", [str, os.fsencode, Path, MyPath], ids=["str", "bytes", "Path", "PathLike"])
def test_a_path_of_any_kind(server, door_dir, connect, kind):
    proxy = connect(kind(door_dir / "a.door"))
    assert proxy("hello") == "hello"
    assert proxy.info.path == str(door_dir / "a.door")


def test_a_number_is_taken_over(server, connect):
    number = server.endpoints[0].open().take()
    proxy = connect(number)
    assert proxy.fileno() == number
    assert proxy(1) == 1
    proxy.close()
    assert not is_open(number)
    assert proxy.fileno() == -1


CUT = """
    import gc, os, sys
    from support.cuts import each_step
    from doorpool import Descriptor, Proxy

    with Proxy("a.door") as proxy:
        def give():
            return Descriptor(os.dup(proxy.fileno())) if sys.argv[1] == "descriptor" else proxy

        given, steps, lost = give(), 0, 0
        for step in each_step():
            opened = None
            with step:
                opened = Proxy(given)
            ours = [os.open(os.devnull, os.O_RDONLY) for _ in range(12)]
            if opened is not None:
                opened.close()
            step.error = None  # only now is let go of what was being made
            gc.collect(0)
            for number in ours:
                try:
                    lost += os.readlink(f"/proc/self/fd/{number}") != os.devnull
                    os.close(number)
                except OSError:
                    lost += 1
            if given.closed:
                given = give()
            steps += 1
        if given is not proxy:
            given.close()
        result((steps, lost, proxy(1)))
"""


@pytest.mark.ids("X19", "G05")
@pytest.mark.parametrize("given", ["descriptor", "proxy"])
def test_an_opening_that_is_cut_at_any_step_closes_nothing_of_others(server, door_dir, run_python, given):
    """No number has two owners at any moment: the second would close what has got the number since."""
    steps, lost, answer = run_python(CUT, given, cwd=door_dir).value
    assert steps > 100
    assert lost == 0
    assert answer == 1


def test_a_descriptor_is_taken_over(server, connect):
    descriptor = server.endpoints[0].open()
    proxy = connect(descriptor)
    assert descriptor.closed
    assert proxy(1) == 1


def test_an_endpoint_stays_what_it_was(server, connect):
    (endpoint,) = server.endpoints
    proxy = connect(endpoint)
    assert proxy(1) == 1
    assert not endpoint.closed
    assert proxy == connect()


def test_a_proxy_gives_a_second_descriptor(server, connect):
    first = connect()
    second = connect(first)
    assert first == second
    assert first.fileno() != second.fileno()
    assert second.info.path is None
    first.close()
    assert second(1) == 1


def test_a_failed_opening_takes_nothing(connect):
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right, open(os.devnull) as file:
        for number in (left.fileno(), file.fileno()):
            with pytest.raises(NotADoorError):
                Proxy(number)
            assert is_open(number)
            with Descriptor(os.dup(number)) as descriptor:
                with pytest.raises(NotADoorError):
                    Proxy(descriptor)
                assert not descriptor.closed
                assert is_open(descriptor.fileno())
        left.sendall(b"still works")
        assert right.recv(100) == b"still works"


def test_a_descriptor_of_a_dead_door_is_not_taken(serve):
    server = serve(echo)
    descriptor = server.endpoints[0].open()
    server.close()
    with descriptor:
        for door in (descriptor.fileno(), descriptor):
            with pytest.raises(DoorError):
                Proxy(door)
        assert not descriptor.closed


@pytest.mark.ids("N14", "A07")
def test_what_is_no_door(door_dir):
    (door_dir / "file").write_text("")
    (door_dir / "folder").mkdir()
    os.mkfifo(door_dir / "fifo")
    for name in ("file", "folder", "fifo"):
        with pytest.raises(NotADoorError) as caught:
            Proxy(door_dir / name)
        assert str(door_dir / name) in str(caught.value)
        assert caught.value.filename == str(door_dir / name)
    with pytest.raises(NotADoorError):
        Proxy(10**6)


def test_a_missing_path(door_dir):
    with pytest.raises(FileNotFoundError) as caught:
        Proxy(door_dir / "none.door")
    assert caught.value.filename == str(door_dir / "none.door")


@pytest.mark.parametrize("path", ["", b"", "a\0b", "@abstract", "\0abstract", b"@abstract"], ids=repr)
@pytest.mark.ids("A05")
def test_paths_that_are_none(path):
    with pytest.raises(ValueError):
        Proxy(path)
    with pytest.raises(ValueError):
        Server().attach(echo, path)
    with pytest.raises(ValueError):
        Server().endpoint(path)(echo)
    with pytest.raises(ValueError):
        Endpoint(echo).attach(path)


@pytest.mark.parametrize("door", [True, False, None, 1.5, ["a.door"], object()], ids=described)
def test_no_kind_of_door_at_all(door):
    with pytest.raises(TypeError, match="door is a path or the number"):
        Proxy(door)


def test_a_number_below_zero():
    with pytest.raises((ValueError, NotADoorError)):
        Proxy(-1)


def test_a_relative_path_is_made_absolute_at_once(door_dir, connect, monkeypatch):
    monkeypatch.chdir(door_dir)
    server = Server()
    endpoint = server.attach(echo, "a.door")
    monkeypatch.chdir("/")
    with server:
        assert endpoint.paths == (str(door_dir / "a.door"),)
        monkeypatch.chdir(door_dir)
        proxy = connect("a.door")
        monkeypatch.chdir("/")
        assert proxy.info.path == str(door_dir / "a.door")
    with Server() as again:  # reopened by the same path, wherever we are
        again.attach(str.upper, door_dir / "a.door")
        assert proxy("x") == "X"


# -- options


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"timeout": 0}, ValueError, "timeout is a number of seconds above 0"),
        ({"open_timeout": 0}, ValueError, "open_timeout is a number of seconds above 0"),
        ({"open_timeout": "5"}, TypeError, "open_timeout is a number of seconds"),
        ({"wait": -1}, ValueError, "wait is a number of seconds"),
        ({"wait": math.nan}, ValueError, "wait"),
        ({"wait": False}, TypeError, "wait"),
        ({"wait": "1"}, TypeError, "wait"),
        ({"trust": "nobody"}, ValueError, "trust is 'namespace' or 'uid'"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_options_are_checked(server, door_dir, options, error, text):
    for door in (door_dir / "a.door", server.endpoints[0]):
        with pytest.raises(error, match=text):
            Proxy(door, **options)


@pytest.mark.parametrize(
    "timeout",
    [None, 1, 0.5, math.inf, 1e9, 10**400, Fraction(1, 2), numpy.float64(2.5), numpy.int32(3)],
    ids=lambda value: repr(value)[:20],
)
def test_timeouts_that_are_allowed(server, connect, timeout):
    proxy = connect(timeout=timeout, open_timeout=timeout)
    assert proxy(1) == 1
    assert proxy.options(timeout=timeout)(1) == 1
    proxy.ping(timeout)


@pytest.mark.parametrize(
    ("timeout", "error"),
    [
        (0, ValueError),
        (0.0, ValueError),
        (-1, ValueError),
        (-math.inf, ValueError),
        (math.nan, ValueError),
        (Fraction(-1, 2), ValueError),
        (True, TypeError),
        (False, TypeError),
        ("1", TypeError),
        (1j, TypeError),
        (Decimal(1), TypeError),  # no numbers.Real, by its own account
        ([1], TypeError),
    ],
    ids=repr,
)
def test_timeouts_that_are_not(server, connect, timeout, error):
    proxy = connect()
    for attempt in (
        lambda: connect(timeout=timeout),
        lambda: connect(open_timeout=timeout),
        lambda: proxy.options(timeout=timeout),
        lambda: proxy.ping(timeout),
    ):
        with pytest.raises(error, match="timeout is a number of seconds"):
            attempt()


def test_options_makes_a_view_of_the_same_open_door(server, connect):
    proxy = connect(timeout=3.0)
    view = proxy.options(timeout=0.5)
    assert view == proxy
    assert hash(view) == hash(proxy)
    assert view.fileno() == proxy.fileno()
    same = view.options()
    assert (proxy._timeout, view._timeout, same._timeout) == (3.0, 0.5, 0.5)
    assert proxy.options(timeout=None)._timeout is None
    view.close()
    for each in (proxy, view, same):
        assert each.closed
        with pytest.raises(ClosedError) as caught:
            each(1)
        assert caught.value.may_have_run is False


def test_a_view_keeps_the_door_open(server, door_dir):
    view = Proxy(door_dir / "a.door").options(timeout=5)
    gc.collect()
    with view:
        assert view(1) == 1
    assert view.closed


def test_a_proxy_that_is_dropped_open_warns(server, door_dir):
    proxy = Proxy(door_dir / "a.door")
    number = proxy.fileno()
    with pytest.warns(ResourceWarning, match="unclosed <Proxy of 'echo'"):
        del proxy
    assert not is_open(number)


# -- opening


def test_wait_is_for_the_door_to_be_there(door_dir, connect):
    server = Server()
    server.attach(echo, door_dir / "a.door")
    begun = threading.Event()

    def opening() -> Any:
        begun.set()
        return connect(wait=20)(7)

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        future = threads.submit(opening)
        begun.wait(10)
        assert not future.done()
        with server:
            assert future.result(20) == 7


@pytest.mark.ids("N3")
def test_wait_is_also_for_a_server_to_take_the_place_of_a_dead_one(spawn_server, serve, door_dir, connect):
    spawn_server(ECHO_SERVER, cwd=door_dir).kill()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        future = threads.submit(lambda: connect(wait=20)(7))
        serve(echo)
        assert future.result(20) == 7


def test_wait_ends(door_dir):
    begun = time.monotonic()
    with pytest.raises(FileNotFoundError):
        Proxy(door_dir / "a.door", wait=0.1)
    assert 0.05 < time.monotonic() - begun < 5


def test_open_timeout_with_a_server_that_is_stopped(spawn_server, door_dir, connect):
    child = spawn_server(ECHO_SERVER, cwd=door_dir)
    inside = connect(timeout=0.1)
    child.stop()
    for options in ({"open_timeout": 0.1}, {"open_timeout": 0.1, "wait": 0.15}):
        with pytest.raises(CallTimeoutError) as caught:
            Proxy(door_dir / "a.door", **options)
        assert caught.value.may_have_run is False
        assert str(door_dir / "a.door") in str(caught.value)
    with pytest.raises(CallTimeoutError):
        inside(1)
    with pytest.raises(CallTimeoutError):
        inside.ping()
    assert inside.alive, "it is there, if only stopped"
    child.cont()
    assert connect()(1) == 1
    assert inside.options(timeout=None)(1) == 1


@pytest.mark.ids("L9")
def test_a_timeout_covers_the_call(serve, connect):
    go_on = threading.Event()
    serve(go_on.wait)
    proxy = connect(timeout=0.05)
    with pytest.raises(CallTimeoutError) as caught:
        proxy(10)
    assert caught.value.may_have_run is True
    assert isinstance(caught.value, TimeoutError)
    go_on.set()
    assert proxy.options(timeout=None)(10) is True


# -- calling


@pytest.mark.ids("L1", "L4", "X13")
def test_arguments_and_results(server, connect):
    proxy = connect()
    assert proxy() is None
    assert proxy(1, 2, three=3) == (1, (2,), {"three": 3})
    named = {"self": 1, "args": 2, "kwargs": 3, "timeout": 4}
    assert proxy(**named) == (None, (), named)


@pytest.mark.ids("D1")
def test_arguments_are_copied_even_within_one_process(serve, connect):
    kept = []
    serve(lambda value: (kept.append(value), value)[1])
    mine = [1]
    back = connect()(mine)
    mine.append(2)
    back.append(3)
    assert (mine, kept, back) == ([1, 2], [[1]], [1, 3])


@pytest.mark.ids("L2")
def test_submit_returns_a_future(server, connect):
    proxy = connect()
    future = proxy.submit(1, fn=2, self=3)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(10) == (1, (), {"fn": 2, "self": 3})
    failing = proxy.submit(threading.Lock())
    with pytest.raises(TypeError):
        failing.result(10)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(proxy, range(100))) == list(range(100))


@pytest.mark.ids("L2")
def test_submitted_calls_run_at_the_same_time(serve, connect):
    together = threading.Barrier(10)
    serve(lambda: together.wait(10) is not None)
    proxy = connect()
    futures = [proxy.submit() for _ in range(10)]
    assert [future.result(10) for future in futures] == [True] * 10


def test_map_yields_in_order(serve, connect):
    serve(pow)
    proxy = connect()
    assert list(proxy.map([2, 3, 4], [5, 6, 7, 8])) == [2**5, 3**6, 4**7]
    results = proxy.map([1, "x", 3], [1, 1, 1])
    assert next(results) == 1
    with pytest.raises(TypeError):
        next(results)


def test_map_has_a_timeout_for_all(serve, connect):
    go_on = threading.Event()
    serve(lambda _: go_on.wait(10))
    results = connect().map([1, 2], timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)
    go_on.set()


def test_submit_and_map_after_close(server, connect):
    proxy = connect()
    proxy.close()
    for attempt in (lambda: proxy.submit(1), lambda: proxy.map([1])):
        with pytest.raises(ClosedError):
            attempt()


@pytest.mark.ids("I7")
def test_ping_does_not_run_the_procedure(serve, connect):
    calls = []
    server = serve(lambda: calls.append(1))
    proxy = connect()
    for _ in range(3):
        assert proxy.ping() is None
    assert proxy.ping(timeout=5) is None
    assert calls == []
    assert server.statistics().served == 0
    server.close()
    with pytest.raises(DoorError) as caught:
        proxy.ping()
    assert caught.value.may_have_run is False


@pytest.mark.ids("I7", "I1")
def test_alive_needs_no_round_trip(spawn_server, door_dir, connect):
    child = spawn_server(ECHO_SERVER, cwd=door_dir)
    proxy = connect(reopen=False)
    child.stop()
    assert proxy.alive
    child.kill()
    assert not proxy.alive
    with pytest.raises(BrokenDoorError):
        proxy(1)


@pytest.mark.ids("I7")
def test_alive_after_revoke_and_close(serve, connect):
    server = serve(echo)
    proxy, other = connect(), connect()
    assert proxy.alive
    other.close()
    assert not other.alive
    server.close()
    assert not proxy.alive


@pytest.mark.ids("L10")
def test_close_does_not_disturb_running_calls(serve, connect):
    running, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        running.set()
        go_on.wait(10)
        return "done"

    serve(slow)
    proxy = connect()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        future = threads.submit(proxy)
        running.wait(10)
        proxy.close()
        proxy.close()
        assert proxy.closed
        assert proxy.fileno() == -1
        go_on.set()
        assert future.result(10) == "done"
    for attempt in (proxy, proxy.ping):
        with pytest.raises(ClosedError, match="closed"):
            attempt()
    with pytest.raises(ClosedError):
        Proxy(proxy)
    assert repr(proxy).endswith("closed>")


def test_at_most_eight_idle_channels_are_kept(serve, connect):
    together = threading.Barrier(12)
    server = serve(lambda: together.wait(10) and None)
    proxy = connect()
    for future in [proxy.submit() for _ in range(12)]:
        future.result(10)
    wait_until(lambda: server.statistics().channels == 8)
    proxy.ping()
    assert server.statistics().channels == 8
    proxy.close()
    wait_until(lambda: server.statistics().channels == 0)


# -- what is known of the door


@pytest.mark.ids("I1", "I2", "I5", "I6", "K8", "P4")
def test_info_of_a_door_of_another_process(spawn_server, door_dir, connect):
    child = spawn_server(
        '''
        from doorpool import Server
        server = Server()

        @server.endpoint("a.door", name="adder", max_request=12345, max_descriptors=7,
                         refuse_descriptors=True)
        def add(a: int, b: int = 2) -> int:
            """
            Add two numbers.

            And no more.
            """
            return a + b

        with server:
            ready()
            server.run()
        ''',
        cwd=door_dir,
    )
    child.stop()  # so that nothing asks it
    child.cont()
    proxy = connect()
    child.stop()
    info = proxy.info
    assert isinstance(info, DoorInfo)
    assert len(info.id) == 32
    assert int(info.id, 16) > 0
    assert info.name == "adder"
    assert info.path == str(door_dir / "a.door")
    assert (info.server.pid, info.server.uid, info.server.gid) == (child.pid, os.geteuid(), os.getegid())
    assert info.attributes == frozenset({"refuse_descriptors"})
    assert info.codec == "pickle"
    assert (info.max_request, info.max_descriptors) == (12345, 7)
    assert info.python == sys.version_info[:2]
    assert info.doc == "Add two numbers.\n\nAnd no more."
    assert info.signature == "(a: int, b: int = 2) -> int"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        info.name = "other"
    child.kill()
    assert proxy.info == info, "readable when the door is dead"
    proxy.close()
    assert proxy.info == info, "and when the proxy is closed"


@pytest.mark.ids("I2")
def test_a_door_of_this_process_is_local(server, connect):
    assert connect().info.attributes == frozenset({"local"})
    assert connect().info.server.pid == os.getpid()


@pytest.mark.ids("I3", "C8")
def test_equality_and_hash_go_by_the_door(serve, server, door_dir, connect):
    other = serve(echo, "b.door")
    first, second = connect(), connect(server.endpoints[0])
    assert first == second
    assert hash(first) == hash(second)
    assert first.info.id == second.info.id
    third = connect(door_dir / "b.door")
    assert first != third
    assert len({first, second, third}) == 2
    assert first != str(door_dir / "a.door")
    server.close()
    other.close()
    first.close()
    assert first == second
    serve(echo)
    assert connect() != first, "another door at the same name"


def test_repr(server, door_dir, connect):
    assert repr(connect()) == f"<Proxy of 'echo' at {door_dir / 'a.door'}>"
    assert "echo" in repr(connect(server.endpoints[0]))


# -- passing on


def test_a_plain_pickle_is_refused_in_words(server, connect):
    proxy = connect()
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy, lambda it: pickle.dumps([it])):
        with pytest.raises(TypeError, match=r"cannot be pickled.*path.*multiprocessing\.Process"):
            attempt(proxy)


_PROCESSES = """
    import multiprocessing, os, sys
    from doorpool import Proxy, Server

    def child(proxy, queue):
        with proxy:
            queue.put((proxy("hello"), proxy.info.path, proxy.options()._timeout, os.getpid()))

    def answer(value):
        return value

    if __name__ == "__main__":
        method, how = sys.argv[1:]
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        with Server() as server:
            endpoint = server.attach(answer, "a.door")
            with Proxy("a.door" if how == "path" else endpoint.open(), timeout=30) as proxy:
                process = context.Process(target=child, args=(proxy, queue))
                process.start()
                got = queue.get()
                process.join()
                result((got, proxy("still open"), process.exitcode, process.pid))
"""


@pytest.mark.parametrize("how", ["path", "descriptor"])
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_proxy_as_an_argument_of_a_process(run_python, door_dir, method, how):
    done = run_python(_PROCESSES, method, how, cwd=door_dir)
    (answer, path, timeout, pid), here, exitcode, process = done.value
    assert answer == "hello"
    assert here == "still open"
    assert exitcode == 0
    assert timeout == 30
    assert path == (str(door_dir / "a.door") if how == "path" else None)
    assert pid == process
    assert "Warning" not in done.stderr.replace("multi-threaded, use of fork", "").replace(
        "DeprecationWarning", ""
    )


@pytest.mark.parametrize("how", ["path", "descriptor"])
def test_a_proxy_as_a_task_of_a_process_pool(run_python, door_dir, how):
    done = run_python(
        """
        import concurrent.futures, multiprocessing, sys
        from doorpool import Proxy, Server

        def work(proxy, value):
            with proxy:
                return proxy(value)

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            with Server() as server:
                endpoint = server.attach(str.upper, "a.door")
                with Proxy("a.door" if sys.argv[1] == "path" else endpoint.open()) as proxy:
                    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
                        result(list(pool.map(work, [proxy, proxy], ["a", "b"])))
        """,
        how,
        cwd=door_dir,
    )
    assert done.value == ["A", "B"]


def test_a_closed_proxy_is_not_passed_on(server, connect):
    proxy = connect()
    proxy.close()
    with pytest.raises(ClosedError):
        multiprocessing.reduction.ForkingPickler.dumps(proxy)


@pytest.mark.ids("N11", "B20")
def test_fileno_is_for_passing_on(server, connect, run_python):
    proxy = connect()
    done = run_python(
        """
        import os, sys
        from doorpool import Proxy
        with Proxy(int(sys.argv[1])) as other:
            result((other("passed"), other.info.id, other.info.path))
        """,
        proxy.fileno(),
        pass_fds=[proxy.fileno()],
    )
    assert done.value == ("passed", proxy.info.id, None)
    assert proxy("still open") == "still open"


@pytest.mark.ids("A06", "B02", "K8")
def test_a_server_of_another_user_is_not_believed(root_only, spawn_server, door_dir):
    os.chmod(door_dir, 0o777 | 0o1000)
    spawn_server(ECHO_SERVER, uid=1000, cwd=door_dir)
    with pytest.raises(AccessError) as caught:
        Proxy(door_dir / "a.door")
    assert "1000" in str(caught.value)
    assert "0" in str(caught.value)
    assert caught.value.may_have_run is False
    assert isinstance(caught.value, PermissionError)


LEFT_OPEN = """
    import multiprocessing
    from doorpool import Endpoint, Proxy

    endpoint = Endpoint(str.upper)
    proxy = Proxy(endpoint)
    assert proxy("a") == "A"
    kept = (proxy, multiprocessing.Queue())  # which clears modules away early, when it ends
"""


def test_what_is_open_when_the_interpreter_ends_makes_no_noise(run_python):
    assert "Traceback" not in run_python(LEFT_OPEN).stderr
