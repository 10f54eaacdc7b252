"""
References: what keeps a door reachable, and what happens when nothing does any more.
"""

from __future__ import annotations

import gc
import os
import queue
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from support import wait_until

from doorpool import ClosedError, Endpoint, Proxy, RevokedError, Server
from doorpool._keeper import keeper

PATIENCE = 20.0


def echo(value: Any = None) -> Any:
    """Give it back."""
    return value


class News:
    """An ``on_unref`` that keeps what it was told, and in which thread."""

    def __init__(self) -> None:
        self.threads: list[str] = []
        self._came = queue.SimpleQueue[None]()

    def __call__(self) -> None:
        self.threads.append(threading.current_thread().name)
        self._came.put(None)

    def wait(self) -> None:
        """Wait to be told once more."""
        self._came.get(timeout=PATIENCE)


def settle(endpoint: Endpoint) -> None:
    """Wait until the keeper, and then a server thread, have come to all that has happened so far."""
    for _ in range(2):  # the first may come in the middle of a round
        heard = threading.Event()
        keeper().soon(heard.set)
        assert heard.wait(PATIENCE)
    done = threading.Event()
    endpoint._pool.run_soon(done.set)
    assert done.wait(PATIENCE)


@pytest.fixture
def news() -> News:
    return News()


@pytest.fixture
def endpoint(serve, news) -> Endpoint:
    """An endpoint of a started server, with the name ``a.door``; told what becomes of it."""
    return serve(echo, on_unref=news, linger=True).endpoints[0]


# -- what is a reference


def hold_descriptor(endpoint: Endpoint) -> Callable[[], None]:
    return endpoint.open().close


def hold_duplicate(endpoint: Endpoint) -> Callable[[], None]:
    with endpoint.open() as first:
        return first.dup().close


def hold_copy_in_flight(endpoint: Endpoint) -> Callable[[], None]:
    one, other = socket.socketpair()
    with endpoint.open() as descriptor:
        socket.send_fds(one, [b"x"], [descriptor.fileno()])

    def drop() -> None:
        one.close()
        other.close()

    return drop


def hold_childs_copy(endpoint: Endpoint) -> Callable[[], None]:
    with endpoint.open() as descriptor:
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[descriptor.fileno()]
        )

    def drop() -> None:
        child.communicate(b"\n")

    return drop


def hold_forked_childs_proxy(endpoint: Endpoint) -> Callable[[], None]:
    """A child has all that its parent had open, and keeps it when the parent closes its own."""
    proxy = Proxy(endpoint)
    proxy.ping()
    child = fork_a_child_that_waits()
    proxy.close()
    return child


def fork_a_child_that_waits() -> Callable[[], None]:
    """Fork; return what ends the child, and waits for its end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)

    def end() -> None:
        os.close(writer)
        assert os.waitpid(child, 0)[1] == 0

    return end


def hold_proxy(endpoint: Endpoint) -> Callable[[], None]:
    return Proxy(endpoint).close


def hold_channel(endpoint: Endpoint) -> Callable[[], None]:
    proxy = Proxy(endpoint)
    channel = proxy._line.handle._idle.pop()
    proxy.close()
    return channel.close


def hold_path_proxy(endpoint: Endpoint) -> Callable[[], None]:
    (path,) = endpoint.paths
    return Proxy(path).close


def hold_unaccepted_connection(endpoint: Endpoint) -> Callable[[], None]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with keeper().lock:  # so nobody accepts
        sock.connect(endpoint.paths[0])
        endpoint.detach()
    return sock.close


def hold_name(endpoint: Endpoint) -> Callable[[], None]:
    return endpoint.detach


@pytest.mark.ids("U1", "U4", "U5", "U6", "U15")
@pytest.mark.parametrize(
    "hold",
    [
        hold_descriptor, hold_duplicate, hold_copy_in_flight, hold_childs_copy,
        hold_forked_childs_proxy, hold_proxy, hold_channel,
        hold_path_proxy, hold_unaccepted_connection, hold_name,
    ],
    ids=lambda hold: hold.__name__.removeprefix("hold_"),
)  # fmt: skip
def test_each_reference_alone_keeps_a_door_referenced(endpoint, news, hold):
    drop = hold(endpoint)
    if hold is not hold_name:
        endpoint.detach()
    settle(endpoint)
    assert news.threads == []
    assert not endpoint.unreferenced
    drop()
    news.wait()
    settle(endpoint)
    assert len(news.threads) == 1, "once"
    assert endpoint.unreferenced


@pytest.mark.ids("U5")
def test_a_door_that_was_never_handed_out_is_never_unreferenced(news, closing):
    with Server() as server:
        endpoint = server.attach(echo, on_unref=news)
        _ = endpoint.info  # makes the door
        settle(endpoint)
        assert not endpoint.unreferenced
        assert news.threads == []
        assert not endpoint.closed


@pytest.mark.ids("U12")
def test_a_client_that_dies_lets_go(endpoint, news, spawn_python, door_dir):
    def hold(path: str) -> None:
        import time

        from support.child import ready

        from doorpool import Proxy

        with Proxy(path) as proxy:
            proxy()
            ready()
            time.sleep(60)

    child = spawn_python(hold, str(door_dir / "a.door"))
    child.wait_ready()
    endpoint.detach()
    settle(endpoint)
    assert news.threads == []
    child.kill()
    news.wait()


@pytest.mark.ids("P5")
def test_limits_do_not_matter_to_being_let_go(serve, news):
    endpoint = serve(
        echo, on_unref=news, max_request=0, max_reply=0, max_descriptors=0, refuse_descriptors=True
    ).endpoints[0]
    with Proxy(endpoint) as proxy:
        proxy.ping()
    endpoint.detach()
    news.wait()


@pytest.mark.ids("U10")
@pytest.mark.parametrize(
    "message", [b"", b"gone", b"dpKN" + bytes(40)], ids=["empty", "text", "half a knock"]
)
def test_no_message_makes_a_door_unreferenced(endpoint, news, closing, message):
    """It is the end of the last descriptor that does, which is no message at all."""
    endpoint.detach()
    news.wait()
    with endpoint.open() as descriptor, socket.socket(fileno=os.dup(descriptor.fileno())) as forger:
        forger.send(message)
        settle(endpoint)
        assert not endpoint.unreferenced
        assert len(news.threads) == 1
        with Proxy(descriptor.dup()) as proxy:
            assert proxy("still here") == "still here"
    news.wait()


@pytest.mark.ids("U10")
def test_one_holder_ends_his_own_descriptor_and_no_others(endpoint, news, closing):
    endpoint.detach()
    news.wait()
    with endpoint.open() as mine:
        with endpoint.open() as his, socket.socket(fileno=his.dup().take()) as end:
            end.shutdown(socket.SHUT_RDWR)
        settle(endpoint)
        assert not endpoint.unreferenced
        with Proxy(mine.dup()) as proxy:
            assert proxy(1) == 1
    news.wait()
    assert len(news.threads) == 2


_EXEC = """
import os, sys
os.set_inheritable(int(sys.argv[1]), sys.argv[2] == "True")
os.execv(sys.executable, [sys.executable, "-c", "print('here', flush=True); input()"])
"""


@pytest.mark.ids("U16")
@pytest.mark.parametrize("inherited", [False, True])
def test_a_holder_that_execs(endpoint, news, inherited):
    """Its descriptor is closed, or it is what the next program has."""
    endpoint.detach()
    news.wait()

    descriptor = endpoint.open()
    os.set_inheritable(descriptor.fileno(), True)
    child = subprocess.Popen(
        [sys.executable, "-c", _EXEC, str(descriptor.fileno()), str(inherited)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[descriptor.fileno()],
    )
    descriptor.close()
    assert child.stdout.readline() == b"here\n"
    if inherited:
        settle(endpoint)
        assert not endpoint.unreferenced
    else:
        news.wait()
    child.communicate(b"\n")
    if inherited:
        news.wait()
    assert len(news.threads) == 2


# -- when it is told, and where


@pytest.mark.ids("U7")
def test_a_server_thread_is_told_and_not_who_let_go(endpoint, news):
    endpoint.detach()
    news.wait()
    (thread,) = news.threads
    assert thread.startswith("doorpool-")
    assert thread not in ("doorpool-keeper", threading.current_thread().name)


@pytest.mark.ids("U7")
def test_who_is_told_may_use_the_library_as_it_likes(serve, connect, door_dir, closing):
    answers = queue.SimpleQueue[str]()

    def use_it() -> None:
        with Proxy(door_dir / "other.door") as proxy, Endpoint(echo).open() as descriptor:
            answers.put(proxy(f"{descriptor.fileno() >= 0}"))

    server = serve(echo, "other.door")
    endpoint = server.attach(echo, on_unref=use_it)
    endpoint.open().close()
    assert answers.get(timeout=PATIENCE) == "True"


@pytest.mark.ids("U8", "L10")
def test_a_running_call_is_waited_for(serve, news, connect):
    going, go_on = threading.Event(), threading.Event()

    def procedure() -> str:
        going.set()
        assert go_on.wait(PATIENCE)
        return "done"

    server = serve(procedure, on_unref=news, linger=True)
    (endpoint,) = server.endpoints
    proxy = connect()
    future = proxy.submit()
    assert going.wait(PATIENCE)
    endpoint.detach()
    proxy.close()  # the call goes on, on its channel
    settle(endpoint)
    assert news.threads == []
    go_on.set()
    assert future.result(PATIENCE) == "done"
    news.wait()


@pytest.mark.ids("U9", "U12")
@pytest.mark.parametrize("how", ["killed", "gave up"])
def test_an_abandoned_call_is_waited_for_too(serve, news, spawn_python, door_dir, how):
    going, go_on = threading.Event(), threading.Event()
    ended = []

    def procedure() -> None:
        going.set()
        assert go_on.wait(PATIENCE)
        ended.append(len(news.threads))

    server = serve(procedure, on_unref=news)
    (endpoint,) = server.endpoints

    def call(path: str, timeout: float | None) -> str:
        from doorpool import CallTimeoutError, Proxy

        with Proxy(path) as proxy:
            try:
                proxy.options(timeout=timeout)()
            except CallTimeoutError:
                return "gave up"
        return "was answered"

    child = spawn_python(call, str(door_dir / "a.door"), None if how == "killed" else 0.2)
    assert going.wait(PATIENCE)
    if how == "killed":
        child.kill()
    else:
        assert child.finish().value == "gave up"
    endpoint.detach()
    settle(endpoint)
    assert news.threads == []
    go_on.set()
    news.wait()
    assert ended == [0]


@pytest.mark.ids("U7", "T6")
def test_where_all_threads_are_busy_it_is_told_when_one_is_free(serve, news, connect, door_dir):
    going, go_on = threading.Event(), threading.Event()

    def procedure() -> str:
        going.set()
        assert go_on.wait(PATIENCE)
        return "done"

    server = serve(procedure, server={"max_threads": 1})
    other = server.attach(echo, on_unref=news)
    future = connect().submit()
    assert going.wait(PATIENCE)
    other.open().close()
    wait_until(lambda: other.unreferenced)
    assert news.threads == []
    go_on.set()
    assert future.result(PATIENCE) == "done"
    news.wait()


@pytest.mark.ids("U3")
def test_two_that_let_go_at_once_are_one_piece_of_news(endpoint, news):
    endpoint.detach()
    news.wait()
    for _ in range(
        2
    ):  # as of two server threads, each of which has closed what it thinks was the last channel
        keeper().soon(endpoint._door._lose_reference)
    settle(endpoint)
    assert len(news.threads) == 1


# -- what becomes of it


@pytest.mark.ids("U2", "U6")
def test_an_endpoint_that_does_not_linger_closes_itself(serve, news):
    server = serve(echo)
    endpoint = server.attach(echo, on_unref=news)
    endpoint.open().close()
    news.wait()
    wait_until(lambda: endpoint.closed)
    assert endpoint not in server.endpoints
    with pytest.raises(ClosedError):
        endpoint.open()
    assert len(news.threads) == 1


@pytest.mark.ids("U3")
def test_one_that_lingers_is_told_each_time(endpoint, news, door_dir, connect):
    endpoint.detach()
    news.wait()
    for _ in range(3):
        with Proxy(endpoint) as proxy:
            assert proxy("again") == "again"
        news.wait()
    endpoint.attach(door_dir / "b.door")
    assert not endpoint.unreferenced
    endpoint.detach()
    news.wait()
    settle(endpoint)
    assert len(news.threads) == 5
    assert not endpoint.closed


@pytest.mark.ids("U11")
def test_who_hands_it_out_when_told_keeps_it(serve, closing):
    server = serve(echo)
    handed = queue.SimpleQueue[Any]()

    def hand_out_once() -> None:
        if handed.empty():
            handed.put(endpoint.open())

    endpoint = server.attach(echo, on_unref=hand_out_once)
    endpoint.open().close()
    wait_until(lambda: not handed.empty())
    settle(endpoint)
    assert not endpoint.unreferenced
    assert not endpoint.closed
    with handed.get() as descriptor, Proxy(descriptor.dup()) as proxy:
        assert proxy(1) == 1
        handed.put(None)  # not again


@pytest.mark.ids("U11")
def test_one_that_was_handed_out_before_anybody_was_told_stays(serve, news, closing, connect, door_dir):
    going, go_on = threading.Event(), threading.Event()

    def block() -> None:
        going.set()
        assert go_on.wait(PATIENCE)

    server = serve(block, server={"max_threads": 1})
    endpoint = server.attach(echo, on_unref=news)
    future = connect().submit()
    assert going.wait(PATIENCE)
    endpoint.open().close()
    wait_until(lambda: endpoint.unreferenced)
    again = closing.enter_context(endpoint.open())
    go_on.set()
    future.result(PATIENCE)
    settle(endpoint)
    assert news.threads == []
    assert not endpoint.closed
    again.close()
    news.wait()


def test_an_on_unref_that_fails_and_the_log_with_it(serve, failing_log):
    def fail() -> None:
        raise ValueError("on purpose")

    server = serve(echo)
    for _ in range(3):
        endpoint = server.attach(echo, name="failing", on_unref=fail)
        endpoint.open().close()
        wait_until(lambda it=endpoint: it.closed)
    assert server.statistics().threads == 2
    assert failing_log.seen == ["failing: on_unref failed"] * 3


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_an_on_unref_that_fails_is_logged_and_hurts_nobody(serve, connect, caplog, error):
    def fail() -> None:
        raise error("on purpose")

    server = serve(echo)
    endpoint = server.attach(echo, name="failing", on_unref=fail)
    endpoint.open().close()
    wait_until(lambda: endpoint.closed)
    (record,) = [record for record in caplog.records if "on_unref failed" in record.getMessage()]
    assert record.levelname == "ERROR"
    assert "failing" in record.getMessage()
    assert record.exc_info[0] is error
    assert connect()(1) == 1


@pytest.mark.ids("R1")
@pytest.mark.parametrize("end", ["revoke", "close", "server.close"])
def test_what_was_taken_away_is_not_unreferenced(serve, news, closing, end):
    server = serve(echo)
    endpoint = server.attach(echo, on_unref=news, linger=True)
    proxy = closing.enter_context(Proxy(endpoint))
    {"revoke": endpoint.revoke, "close": endpoint.close, "server.close": server.close}[end]()
    with pytest.raises(RevokedError):
        proxy()
    proxy.close()
    if end == "revoke":
        settle(endpoint)
    assert news.threads == []


@pytest.mark.ids("U13", "U14")
def test_as_the_lock_of_an_exit(spawn_server, door_dir):
    """Names are taken away, those inside finish, and the server ends by itself."""

    def serve(path: str) -> bool:
        from support.child import ready

        from doorpool import Server

        server = Server()

        def leave(word: str) -> str:
            server.endpoints[0].detach()
            return word

        server.attach(leave, path, on_unref=server.close)
        server.start()
        ready()
        server.run()
        return server.closed

    child = spawn_server(serve, str(door_dir / "a.door"))
    with Proxy(door_dir / "a.door") as first, Proxy(door_dir / "a.door") as second:
        assert first("bye") == "bye"
        assert not os.path.exists(door_dir / "a.door")
        assert second.info.name  # it is still there for those who are inside
        assert second.alive
    finished = child.finish()
    assert (finished.returncode, finished.value, finished.stderr) == (0, True, "")


@pytest.mark.ids("U12")
def test_an_idle_channel_goes_with_its_process_though_a_child_holds_its_socket(
    serve, news, spawn_python, door_dir
):
    """A child that was forked in C keeps the dead client's sockets open; nobody hangs up."""
    server = serve(echo, on_unref=news)
    (endpoint,) = server.endpoints

    def hold(path: str) -> None:
        import ctypes
        import os
        import time

        from support.child import ready

        from doorpool import Proxy

        proxy = Proxy(path)
        proxy()
        os.close(proxy.fileno())  # the channel alone
        child = ctypes.CDLL(None).fork()
        if not child:
            ctypes.CDLL(None).pause()
        ready(child)
        time.sleep(60)

    child = spawn_python(hold, str(door_dir / "a.door"))
    grandchild = child.wait_ready()
    try:
        endpoint.detach()
        settle(endpoint)
        assert endpoint._pool.gate.channels == 1
        child.kill()
        news.wait()
        wait_until(lambda: endpoint._pool.gate.channels == 0)
    finally:
        os.kill(grandchild, 9)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"on_unref": 5}, "on_unref is something to call"), ({"on_unref": "close"}, "on_unref is")],
)
def test_options_are_checked(options, text):
    with pytest.raises(TypeError, match=text):
        Endpoint(echo, **options)


@pytest.mark.ids("U12")
def test_a_thread_that_waits_holds_nothing_of_the_call_before(door_dir):
    """A session that has ended, and all it leads to, would stay until the next call comes."""

    class Session:
        def greet(self):
            return "hello"

    sessions = []

    def connect():
        session = Session()
        sessions.append(weakref.ref(session))
        return Endpoint(session)

    with Server() as server:
        server.attach(connect, door_dir / "a.door")
        with Proxy(door_dir / "a.door") as door:
            with door() as session:
                assert session.greet() == "hello"  # the last call that there is
            wait_until(lambda: gc.collect() is None or sessions[0]() is None, "the session is let go")
