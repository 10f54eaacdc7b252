"""
Forks of clients and servers, by Python's ``os.fork`` and in C, past Python's hooks.

A child is a stranger to its parent's channels and a client of its parent's doors.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest
from support import run_as_uid

from doorpool import ClosedError, Proxy

SERVER = """
    import os, sys
    from doorpool import Server

    server = Server()

    @server.endpoint("pid.door")
    def pid(*args):
        return os.getpid(), args

    @server.endpoint("forking.door")
    def forking(how):
        if os.fork() == 0:
            if how == "raises":
                raise ValueError("the child's")
            if how == "exits":
                sys.exit(7)
            return "the child's answer"
        return os.waitstatus_to_exitcode(os.wait()[1])

    @server.endpoint("closing.door")
    def closing():
        child = os.fork()
        if child == 0:
            server.close()
            for endpoint in server.endpoints:
                endpoint.close()
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    with server:
        ready()
        server.run()
"""


def in_child(work: Callable[[], object]) -> None:
    """Run some work in a forked child; it must go well there."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.fixture
def server(spawn_server, door_dir):
    return spawn_server(SERVER, cwd=door_dir)


@pytest.mark.ids("Y1", "Y2", "G01")
def test_parent_and_child_both_go_on(server, door_dir):
    with Proxy(door_dir / "pid.door") as proxy:
        proxy(1)

        def work() -> None:
            for number in range(20):
                assert proxy(number) == (server.pid, (number,))

        in_child(work)
        assert proxy(2) == (server.pid, (2,))


@pytest.mark.ids("Y2", "G01")
def test_forks_while_other_threads_call(server, door_dir):
    with Proxy(door_dir / "pid.door") as proxy:
        wrong: list[object] = []
        over = threading.Event()

        def call(thread: int) -> None:
            number = 0
            while not over.is_set():
                number += 1
                if proxy(thread, number) != (server.pid, (thread, number)):
                    wrong.append((thread, number))

        threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        try:
            for number in range(30):
                in_child(lambda number=number: proxy("child", number))
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert wrong == []


FORKS_IN_C = """
    import ctypes, os
    from doorpool import Proxy

    with Proxy("pid.door") as proxy:
        before = proxy("before")
        child = ctypes.PyDLL(None).fork()
        if child == 0:
            os._exit(0 if proxy("child") == (before[0], ("child",)) else 1)
        code = os.waitpid(child, 0)[1]
        result((code, proxy("after")))
"""


@pytest.mark.ids("Y2", "G01")
def test_a_fork_that_python_does_not_see(server, run_python, door_dir):
    """
    Of a process with one thread: with more, Python itself does not survive such a fork.
    """
    code, after = run_python(FORKS_IN_C, cwd=door_dir).value
    assert code == 0
    assert after == (server.pid, ("after",))


@pytest.mark.ids("Y2")
def test_a_closed_proxy_of_the_child_leaves_the_parents_open(server, door_dir):
    with Proxy(door_dir / "pid.door") as proxy:
        proxy()
        in_child(proxy.close)
        assert proxy() == (server.pid, ())


@pytest.mark.ids("Y1", "R4", "G02")
def test_a_servers_child_does_not_touch_its_doors(server, door_dir):
    with Proxy(door_dir / "closing.door") as closing, Proxy(door_dir / "pid.door") as pid:
        assert closing() == 0
        assert (door_dir / "pid.door").exists()
        assert pid() == (server.pid, ())


@pytest.mark.ids("Y1")
def test_the_child_of_a_process_with_a_server_is_no_server(serve, connect):
    server = serve(os.getpid)

    def work() -> None:
        with pytest.raises(ClosedError):
            server.start()
        for endpoint in server.endpoints:
            with pytest.raises(ClosedError):
                endpoint.open()
        server.close()

    in_child(work)
    assert connect()() == os.getpid()


@pytest.mark.ids("Y4")
def test_a_child_may_have_a_server_of_its_own(serve, connect, door_dir):
    serve(os.getpid)

    def work() -> bool:
        from doorpool import Server

        with Server() as own:
            own.attach(os.getpid, door_dir / "child.door")
            with Proxy(door_dir / "child.door") as proxy:
                return proxy() == os.getpid()

    assert run_as_uid(None, work)
    assert connect()() == os.getpid()


@pytest.mark.parametrize(("how", "code"), [("returns", 0), ("exits", 7), ("raises", 1)])
@pytest.mark.ids("Y1", "G02")
def test_a_child_that_comes_out_of_a_procedure_answers_nothing(server, door_dir, how, code):
    with Proxy(door_dir / "forking.door") as forking, Proxy(door_dir / "pid.door") as pid:
        assert forking(how) == code
        assert pid() == (server.pid, ())
    server.terminate()
    assert ("the child's" in server.stderr) == (how == "raises")
