"""
Reopening: a call that certainly did not run is made again where the door was opened by path.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from doorpool import (
    AccessError,
    BrokenDoorError,
    CallTimeoutError,
    ClosedError,
    DoorError,
    Proxy,
    RevokedError,
    Server,
)
from doorpool.door import Handle

SERVER = """
    import os, sys
    from doorpool import Server

    server = Server()
    calls = []

    @server.endpoint("a.door")
    def answer(value=None):
        calls.append(value)
        if value == "die":
            os._exit(1)
        return os.getpid(), len(calls)

    with server:
        ready()
        server.run()
"""


HELD = """
    import signal
    from doorpool import Server

    server = Server()
    server.attach(lambda value: value, "a.door")
    with server:
        if fork_in_c() == 0:  # it holds the listener open, and every connection
            signal.pause()
        ready()
        server.run()
"""


def echo(value: Any = None) -> Any:
    return value


def seconds_of_failing(call: Callable[[], Any]) -> float:
    """How long a call takes to say that the server is gone."""
    begin = time.monotonic()
    with pytest.raises(BrokenDoorError):
        call()
    return time.monotonic() - begin


@pytest.mark.parametrize("end", ["terminate", "kill"])
@pytest.mark.ids("X11")
def test_calls_go_on_when_the_server_was_restarted(spawn_server, door_dir, connect, end):
    first = spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    assert proxy() == (first.pid, 1)
    old = proxy.info
    getattr(first, end)()
    second = spawn_server(SERVER, cwd=door_dir)
    assert proxy() == (second.pid, 1), "once, and no more"
    assert proxy() == (second.pid, 2)
    assert proxy.info.server.pid == second.pid
    assert proxy.info.id != old.id
    assert proxy.alive
    with Proxy(door_dir / "a.door") as fresh:
        assert fresh.info.id == proxy.info.id
        assert fresh != proxy, "equality is by the id that was learnt first"
        assert hash(proxy) == hash(proxy.options())


def test_ping_too_goes_on(spawn_server, door_dir, connect):
    spawned = spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    spawned.kill()
    with pytest.raises(BrokenDoorError):
        proxy.ping()
    spawn_server(SERVER, cwd=door_dir)
    proxy.ping()


def test_a_door_that_was_revoked_and_offered_anew(door_dir, connect):
    with Server() as server:
        endpoint = server.attach(echo, door_dir / "a.door")
        proxy = connect()
        endpoint.revoke()
        with pytest.raises(RevokedError) as caught:
            proxy("x")
        assert isinstance(caught.value.__cause__, FileNotFoundError)
        server.attach(str.upper, door_dir / "a.door")
        assert proxy("x") == "X"
        endpoint.close()


def test_each_view_goes_on(door_dir, connect):
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        proxy = connect()
        view = proxy.options(timeout=20)
    with Server() as server:
        server.attach(str.upper, door_dir / "a.door")
        assert view("x") == "X"
        assert proxy("x") == "X"
        assert proxy.info == view.info


def test_without_reopen(door_dir, connect):
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        proxy = connect(reopen=False)
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        for _ in range(2):
            with pytest.raises(RevokedError) as caught:
                proxy("x")
            assert caught.value.may_have_run is False
            assert caught.value.__cause__ is None


@pytest.mark.parametrize("how", ["number", "Descriptor", "Endpoint", "Proxy"])
def test_what_was_not_opened_by_path_is_never_reopened(door_dir, connect, how):
    with Server() as server:
        endpoint = server.attach(echo, door_dir / "a.door")
        door: Any = {
            "number": lambda: endpoint.open().take(),
            "Descriptor": endpoint.open,
            "Endpoint": lambda: endpoint,
            "Proxy": lambda: connect(),
        }[how]()
        proxy = connect(door)
        assert proxy(1) == 1
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        with pytest.raises(RevokedError):
            proxy(1)


@pytest.mark.ids("X15")
def test_a_call_that_may_have_run_is_not_made_again(spawn_server, door_dir, connect):
    spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    with pytest.raises(BrokenDoorError) as caught:
        proxy("die")
    assert caught.value.may_have_run is True
    assert caught.value.__cause__ is None
    second = spawn_server(SERVER, cwd=door_dir)
    assert proxy() == (second.pid, 1)


def test_the_first_error_stands_and_the_second_is_its_cause(spawn_server, door_dir, connect):
    child = spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    child.kill()
    for _ in range(2):
        with pytest.raises(BrokenDoorError) as caught:
            proxy()
        assert caught.value.may_have_run is False
        second = caught.value.__cause__
        assert isinstance(second, BrokenDoorError), "a stale name"
    os.unlink(door_dir / "a.door")
    with pytest.raises(BrokenDoorError) as caught:
        proxy()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_call_of_the_second_server_that_may_have_run_says_so(spawn_server, door_dir, connect):
    child = spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    child.kill()
    spawn_server(SERVER, cwd=door_dir)
    with pytest.raises(BrokenDoorError) as caught:
        proxy("die")
    assert caught.value.may_have_run is True


@pytest.mark.ids("A21")
def test_another_users_server_is_not_believed_when_reopening(root_only, spawn_server, door_dir, connect):
    os.chmod(door_dir, 0o1777)
    first = spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    assert proxy() == (first.pid, 1)
    first.kill()
    os.unlink(door_dir / "a.door")
    second = spawn_server(SERVER, uid=1000, cwd=door_dir)
    with pytest.raises(DoorError) as caught:
        proxy()
    assert caught.value.may_have_run is False
    assert isinstance(caught.value.__cause__, AccessError)
    assert "uid 1000" in str(caught.value.__cause__)
    second.kill()
    os.unlink(door_dir / "a.door")
    third = spawn_server(SERVER, cwd=door_dir)
    assert proxy() == (third.pid, 1)


RAW_SERVER = """
    import threading
    from doorpool.door import Codec, Door, Gate

    gate = Gate()
    door = Door(gate, name="answer", codec=Codec.RAW)
    door.listen("a.door", mode=0o666)
    heard = []

    def serve():
        while True:
            invocation = gate.wait()
            heard.append(bytes(invocation.data))
            invocation.reply()

    threading.Thread(target=serve, daemon=True).start()
    ready()
    try:
        threading.Event().wait()
    finally:
        door.revoke()
"""


@pytest.mark.ids("A21")
def test_another_codec_is_not_spoken_when_reopening(spawn_server, door_dir, connect):
    """The same user, the same path; the door that was opened spoke pickle, and that is what is said."""
    first = spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    assert proxy() == (first.pid, 1)
    first.kill()
    second = spawn_server(RAW_SERVER, cwd=door_dir)
    for _ in range(2):
        with pytest.raises(DoorError) as caught:
            proxy()
        assert caught.value.may_have_run is False
        assert "is a raw door and not a pickle one" in str(caught.value.__cause__)
    second.kill()
    third = spawn_server(SERVER, cwd=door_dir)
    assert proxy() == (third.pid, 1)


@pytest.mark.ids("A21")
def test_a_path_that_is_served_by_one_after_the_other(root_only, spawn_server, door_dir, connect):
    """Root's raw door, a user's pickle door, a stranger's, root's pickle door: only the last is the first."""
    os.chmod(door_dir, 0o1777)
    first = spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    assert proxy() == (first.pid, 1)
    first.kill()
    turns = [
        ({"code": RAW_SERVER}, "raw door"),
        ({"code": SERVER, "uid": 4201}, "uid 4201"),
        ({"code": RAW_SERVER, "uid": 6602}, "6602"),
    ]
    for options, word in turns:
        os.unlink(door_dir / "a.door")
        other = spawn_server(options.pop("code"), cwd=door_dir, **options)
        with pytest.raises(DoorError) as caught:
            proxy()
        assert caught.value.may_have_run is False
        assert word in str(caught.value.__cause__)
        other.kill()
    os.unlink(door_dir / "a.door")
    last = spawn_server(SERVER, cwd=door_dir)
    assert proxy() == (last.pid, 1)


def test_one_thread_reopens_for_all(door_dir, connect):
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        proxy = connect()
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        opened = []
        original = type(proxy._line)._open

        def count(self: Any, *args: Any, **options: Any) -> Any:
            opened.append(threading.get_ident())
            return original(self, *args, **options)

        together = threading.Barrier(8)

        def call(value: int) -> Any:
            together.wait(10)
            return proxy(value)

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as threads:
            patch.setattr(type(proxy._line), "_open", count)
            assert list(threads.map(call, range(8))) == list(range(8))
        assert len(opened) == 1


class CallsFirst:
    """An argument that makes a call itself while it is being marshalled."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return str, (f"after {self.call('x')}",)


def test_a_door_that_another_thread_reopens_under_a_calls_hands(door_dir, connect):
    # 1. the outer call takes the old handle and begins to marshal;
    # 2. the inner one, as another thread might, finds the server gone, reopens, closes that handle;
    # 3. the outer one meets a closed handle.
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        proxy = connect()
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        assert proxy(CallsFirst(proxy)) == "after x"
        proxy.close()
        with pytest.raises(ClosedError):
            proxy("x")


def test_reopening_has_no_more_time_than_the_call(spawn_server, door_dir, connect):
    first = spawn_server(SERVER, cwd=door_dir)
    proxy = connect(timeout=0.2, open_timeout=30)
    first.kill()
    second = spawn_server(SERVER, cwd=door_dir)
    second.stop()
    with pytest.raises(BrokenDoorError) as caught:
        proxy()
    assert caught.value.may_have_run is False
    assert isinstance(caught.value.__cause__, CallTimeoutError)
    second.cont()
    assert proxy.options(timeout=20)()[0] == second.pid


def test_an_idle_channel_that_the_server_closed_is_replaced(spawn_server, door_dir, connect):
    # The server process ends and another takes its place while the caller is idle: a channel
    # that has died in the stack is no failed call.
    first = spawn_server(SERVER, cwd=door_dir)
    proxy = connect(reopen=False)
    proxy()
    first.kill()
    with pytest.raises(BrokenDoorError) as caught:
        proxy()
    assert caught.value.may_have_run is False


def test_who_waits_for_another_thread_to_reopen_waits_no_longer_than_the_call(door_dir, connect):
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        proxy = connect(timeout=20)
    go, held = threading.Event(), threading.Event()

    def hold() -> None:
        with proxy._line._opening:
            held.set()
            assert go.wait(20)

    with Server() as server, ThreadPoolExecutor(1) as threads:
        server.attach(echo, door_dir / "a.door")
        holding = threads.submit(hold)
        assert held.wait(20)
        with pytest.raises(RevokedError) as caught:
            proxy.options(timeout=1.0)("x")
        assert not caught.value.may_have_run
        assert isinstance(caught.value.__cause__, CallTimeoutError)
        assert "another thread is still opening it anew" in str(caught.value.__cause__)
        go.set()
        holding.result(20)
        assert proxy("x") == "x"


@pytest.mark.parametrize("when", ["before it opens", "while it opens"])
def test_a_proxy_that_is_closed_while_a_call_reopens_it_stays_closed(door_dir, connect, when):
    """What was opened is closed again, and the call fails as it would have."""
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        proxy = connect()
    kind = type(proxy._line)
    reopen, opened = kind._reopen, []

    def close_before(line: Any, *args: Any) -> Any:
        line.close()
        return reopen(line, *args)

    def close_behind(line: Any, *args: Any, **options: Any) -> Any:
        opened.append(open_(line, *args, **options))
        line.close()
        return opened[0]

    open_ = kind._open
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        with pytest.MonkeyPatch.context() as patch:
            if when == "before it opens":
                patch.setattr(kind, "_reopen", close_before)
            else:
                patch.setattr(kind, "_open", close_behind)
            with pytest.raises(RevokedError) as caught:
                proxy("x")
        assert isinstance(caught.value.__cause__, ClosedError)
        assert "this proxy is closed" in str(caught.value.__cause__)
        assert all(handle.closed for handle in opened)
        with pytest.raises(ClosedError):
            proxy("x")


def test_of_two_who_reopen_one_within_the_other_the_first_counts(door_dir, connect):
    """A signal handler that calls while its thread opens the door: what that has opened is let go."""
    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        proxy = connect()
    kind = type(proxy._line)
    open_, opened = kind._open, []

    def call_within(line: Any, *args: Any, **options: Any) -> Any:
        handle = open_(line, *args, **options)
        opened.append(handle)
        if len(opened) == 1:
            assert proxy("inner") == "inner"
        return handle

    with Server() as server:
        server.attach(echo, door_dir / "a.door")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "_open", call_within)
            assert proxy("outer") == "outer"
        outer, inner = opened
        assert outer.closed
        assert proxy._line.handle is inner


@pytest.mark.ids("E05")
def test_a_path_that_only_a_fork_holds_open_is_waited_for_once(spawn_server, door_dir, connect):
    server = spawn_server(HELD, cwd=door_dir)
    connected = [connect() for _ in range(3)]
    assert [proxy(n) for n, proxy in enumerate(connected)] == [0, 1, 2]
    server.kill()
    path = door_dir / "a.door"
    once = min(seconds_of_failing(lambda: Handle(path)) for _ in range(3))
    assert min(seconds_of_failing(lambda: Proxy(path)) for _ in range(3)) < 1.5 * once
    # Here the waiting is for the answer; the door that is then opened anew is dead at the first look.
    assert min(seconds_of_failing(lambda proxy=proxy: proxy(5)) for proxy in connected) < 1.5 * once
