"""
The call that a procedure answers: who asks, until when; and calls made by procedures.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import run_as_uid, wait_until

from doorpool import (
    Call,
    CallTimeoutError,
    Credentials,
    Proxy,
    RemoteError,
    Server,
    current_call,
)


@pytest.mark.ids("K4")
def test_outside_a_procedure_there_is_no_call():
    with pytest.raises(RuntimeError, match="no call is being answered here"):
        current_call()


@pytest.mark.ids("K4")
def test_each_call_has_its_own_and_none_is_left_behind(serve, connect):
    calls: list[Call] = []
    serve(lambda: calls.append(current_call()))
    proxy = connect()
    proxy()
    proxy()
    assert calls[0] is not calls[1]
    with pytest.raises(RuntimeError):
        current_call()


CALLER = """
    import os, sys
    from doorpool import Proxy
    with Proxy("who.door", trust="uid") as proxy:
        result((proxy(), (os.getpid(), os.geteuid(), os.getegid(), tuple(sorted(os.getgroups())))))
"""

WHO = """
    import os
    from doorpool import Server, current_call

    server = Server()

    @server.endpoint("who.door", trust="uid")  # of other groups, one may not look into /proc
    def who():
        caller = current_call().caller
        return caller.pid, caller.uid, caller.gid, tuple(sorted(caller.groups))

    with server:
        ready()
        server.run()
"""


@pytest.mark.ids("K1", "K2", "B20")
def test_the_caller_is_who_the_kernel_says(spawn_server, run_python, door_dir):
    spawn_server(WHO, cwd=door_dir)
    seen, true = run_python(CALLER, cwd=door_dir).value
    assert seen == true


@pytest.mark.ids("K1", "K2")
def test_groups_of_the_caller(root_only, spawn_server, run_python, door_dir):
    os.chmod(door_dir, 0o1777)
    spawn_server(WHO, uid=1000, cwd=door_dir)
    seen, true = run_python(CALLER, uid=1000, gid=77, groups=(5, 6, 1234), cwd=door_dir).value
    assert seen == true
    assert seen[1:] == (1000, 77, (5, 6, 1234))


@pytest.mark.ids("K2", "B13")
def test_the_caller_is_who_calls_also_through_an_inherited_proxy(serve, connect):
    serve(lambda: current_call().caller.pid)
    proxy = connect()
    assert proxy() == os.getpid()
    child, seen = run_as_uid(None, lambda: (os.getpid(), proxy()))
    assert child == seen
    assert child != os.getpid()


def test_a_caller_is_equal_by_value_and_holds_nothing(serve, connect):
    serve(lambda: current_call().caller)
    proxy = connect()
    first, second = proxy(), proxy()
    assert isinstance(first, Credentials)
    assert first == second
    assert first.pid == os.getpid()
    assert hash(first) == hash(second)


@pytest.mark.ids("K3")
def test_the_caller_is_the_nearest_one(spawn_server, serve, door_dir, connect):
    serve(lambda: current_call().caller.pid)
    relay = spawn_server(
        """
        from doorpool import Proxy, Server

        server = Server()
        behind = Proxy("a.door")

        @server.endpoint("relay.door")
        def relay():
            return behind()

        with behind, server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    assert connect(door_dir / "relay.door")() == relay.pid


@pytest.mark.ids("I4")
def test_a_procedure_knows_which_door_it_serves(door_dir, connect):
    def which() -> str:
        return current_call().endpoint.info.id

    with Server() as server:
        first, second = server.attach(which), server.attach(which)
        assert connect(first)() == first.info.id
        assert connect(second)() == second.info.id
        assert first.info.id != second.info.id


def test_the_deadline_travels(serve, connect):
    serve(lambda: (current_call().deadline, time.monotonic()))
    assert connect()()[0] is None
    proxy = connect(timeout=20)
    deadline, now = proxy()
    assert 15 < deadline - now <= 20
    deadline, now = proxy.options(timeout=7)()
    assert 2 < deadline - now <= 7
    assert proxy.options(timeout=None)()[0] is None
    assert proxy.options(timeout=1e9)()[0] is None


def test_the_deadline_is_that_of_another_process(spawn_server, door_dir, connect):
    spawn_server(
        """
        import time
        from doorpool import Server, current_call

        server = Server()

        @server.endpoint("a.door")
        def left():
            return current_call().deadline - time.monotonic(), current_call().waited

        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    left, waited = connect(timeout=30)()
    assert 20 < left <= 30
    assert 0 <= waited < 10


def test_waited_is_the_time_in_the_queue(serve, connect):
    running, go_on = threading.Event(), threading.Event()

    def work(first: bool) -> tuple[float, float | None]:
        if first:
            running.set()
            go_on.wait(10)
        call = current_call()
        return call.waited, call.deadline and call.deadline - time.monotonic()

    serve(work, server={"max_threads": 1})
    proxy = connect(timeout=30)
    first = proxy.submit(True)
    running.wait(10)
    second = proxy.submit(False)
    time.sleep(0.1)  # what is measured
    go_on.set()
    assert first.result(10)[0] < 0.1
    waited, left = second.result(10)
    assert 0.05 < waited < 10
    assert left is not None
    assert left < 30 - 0.05, "the time in the queue counts"


def test_what_follows_the_context_and_what_does_not(serve, connect):
    found: dict[str, Any] = {}

    def look(name: str) -> None:
        try:
            found[name] = current_call().caller.pid
        except RuntimeError:
            found[name] = None

    def procedure() -> None:
        look("itself")
        thread = threading.Thread(target=look, args=("a thread",))
        thread.start()
        thread.join()
        context = contextvars.copy_context()
        thread = threading.Thread(target=lambda: context.run(look, "a copied context"))
        thread.start()
        thread.join()

        async def main() -> None:
            look("a coroutine")
            await asyncio.to_thread(look, "to_thread")

        asyncio.run(main())

    serve(procedure)
    connect()()
    here = os.getpid()
    if sys.version_info < (3, 14):  # later ones may hand the context on
        assert found.pop("a thread") is None
    assert found == dict.fromkeys(["itself", "a copied context", "a coroutine", "to_thread"], here)


def test_a_call_is_readable_afterwards(serve, connect):
    kept: list[Call] = []
    server = serve(lambda: kept.append(current_call()))
    connect(timeout=20)()
    (call,) = kept
    server.close()
    assert call.caller.pid == os.getpid()
    assert call.endpoint is server.endpoints[0]
    assert call.deadline is not None
    assert call.waited >= 0
    assert call.cancelled is False
    assert "<lambda>" in repr(call)


@pytest.mark.ids("X1")
def test_a_caller_who_gives_up_is_seen_at_once(serve, connect):
    running, go_on, seen = threading.Event(), threading.Event(), []

    def procedure() -> None:
        call = current_call()
        seen.append(call.cancelled)
        running.set()
        go_on.wait(10)
        seen.append(call.cancelled)

    server = serve(procedure)
    with pytest.raises(CallTimeoutError) as caught:
        connect(timeout=0.1)()
    assert caught.value.may_have_run
    assert running.is_set()
    go_on.set()
    wait_until(lambda: len(seen) == 2)
    assert seen == [False, True]
    wait_until(lambda: server.statistics().served == 1)


@pytest.mark.ids("X1", "U12")
def test_a_caller_who_dies_is_seen_at_once(serve, spawn_python, door_dir):
    running, go_on, seen = threading.Event(), threading.Event(), []

    def procedure() -> None:
        running.set()
        go_on.wait(20)
        seen.append(current_call().cancelled)

    serve(procedure)
    child = spawn_python(
        """
        from doorpool import Proxy
        Proxy("a.door")()
        """,
        cwd=door_dir,
    )
    running.wait(20)
    child.kill()
    go_on.set()
    wait_until(lambda: seen)
    assert seen == [True]


# -- procedures that call


@pytest.mark.ids("L7")
def test_a_procedure_calls_another_door(serve, door_dir, connect):
    serve(lambda value: value + 1, "b.door")

    def outer(value: int) -> tuple[int, int, int]:
        before = id(current_call())
        with Proxy(door_dir / "b.door") as inner:
            return inner(value), inner(value + 10), id(current_call()) == before

    serve(outer)
    assert connect()(1) == (2, 12, True)


@pytest.mark.ids("L6", "L7")
def test_a_procedure_calls_its_own_door(serve, door_dir, connect):
    threads = set()

    def factorial(number: int) -> int:
        threads.add(threading.get_ident())
        return 1 if number < 2 else number * proxy(number - 1)

    server = serve(factorial)
    proxy = connect()
    assert proxy(12) == 479001600
    assert len(threads) == 12, "each is a real call, on a thread of its own"
    wait_until(lambda: server.statistics().served == 12)


@pytest.mark.ids("L6")
def test_a_process_calls_its_own_door(serve, connect):
    serve(lambda: threading.get_ident())
    assert connect()() != threading.get_ident()


def test_an_error_of_an_inner_call_is_remote_for_the_outer_caller(serve, door_dir, connect):
    def outer() -> None:
        Proxy(door_dir / "none.door", timeout=0.001, wait=0)

    serve(outer)
    with pytest.raises(FileNotFoundError):
        connect()()

    running = threading.Event()
    serve(lambda: running.wait(10), "slow.door")

    def impatient() -> None:
        with Proxy(door_dir / "slow.door", timeout=0.05) as inner:
            inner()

    serve(impatient, "impatient.door")
    with pytest.raises(RemoteError) as caught:
        connect(door_dir / "impatient.door")()
    running.set()
    assert caught.value.may_have_run is True
    assert caught.value.type_name.endswith("CallTimeoutError")


def test_threads_of_a_procedure_may_ask_at_once_whether_it_was_cancelled(serve, connect):
    def ask() -> list[bool]:
        call = current_call()
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(lambda: any(call.cancelled for _ in range(500))) for _ in range(4)]
            return [answer.result() for answer in asked]

    serve(ask)
    assert connect()() == [False] * 4


@pytest.mark.ids("X17")
def test_a_stopped_caller_waits_on(serve, spawn_python, door_dir):
    """By a debugger, say; nobody takes him for dead, and the answer waits for him."""
    calls, go_on = [], threading.Event()

    def procedure() -> str:
        calls.append(current_call())
        assert go_on.wait(20)
        return "here"

    server = serve(procedure)

    def call(path: str) -> str:
        from doorpool import Proxy

        with Proxy(path) as proxy:
            return proxy()

    child = spawn_python(call, str(door_dir / "a.door"))
    wait_until(lambda: calls, timeout=20)
    child.stop()
    assert not calls[0].cancelled
    go_on.set()
    wait_until(lambda: server.statistics().served == 1)
    assert server.statistics().channels == 1
    child.cont()
    assert child.finish().value == "here"
