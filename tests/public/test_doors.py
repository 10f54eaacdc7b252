"""
Doors as arguments and results: what arrives, callbacks, whose they are, and when they end.
"""

from __future__ import annotations

import errno
import gc
import inspect
import os
import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from support import run_as_uid, wait_until

from doorpool import (
    AccessError,
    BrokenDoorError,
    BusyError,
    CallTimeoutError,
    ClosedError,
    Credentials,
    Descriptor,
    DoorError,
    Endpoint,
    LimitError,
    MarshalError,
    NotADoorError,
    Proxy,
    RemoteError,
    RevokedError,
    Server,
    _sockets,
    current_call,
    take,
)
from doorpool import _doors as doors
from doorpool import _handle as handles
from doorpool._keeper import keeper

PATIENCE = 20.0


def echo(value: Any = None) -> Any:
    """Give it back."""
    return value


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def settle(endpoint: Endpoint) -> None:
    """Wait until the keeper, and then a server thread, have come to all that has happened so far."""
    for _ in range(2):
        heard = threading.Event()
        keeper().soon(heard.set)
        assert heard.wait(PATIENCE)
    done = threading.Event()
    endpoint._pool.run_soon(done.set)
    assert done.wait(PATIENCE)


@attrs.define
class Order:
    """Something with a door in it."""

    name: str
    report: Any = None


# A server and a relay in processes of their own; each gives what it is asked for.
SERVER = """
    import os
    from doorpool import Endpoint, Proxy, Server, current_call

    server = Server()

    class Backend:
        def pid(self):
            return os.getpid()

        def echo(self, value=None):
            return value

    @server.endpoint("backend.door")
    def backend():
        return Endpoint(Backend())

    @server.endpoint("name.door")
    def pid():
        return os.getpid()

    @server.endpoint("call.door")
    def call(door, *args, **kwargs):
        return door(*args, **kwargs)

    kept = []

    @server.endpoint("keep.door")
    def keep(door):
        kept.append(door)

    @server.endpoint("drop.door")
    def drop():
        while kept:
            kept.pop().close()

    @server.endpoint("echo.door")
    def echo(value):
        return value

    @server.endpoint("fds.door")
    def fds():
        import gc
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    with server:
        ready()
        server.run()
"""


@pytest.fixture
def far(spawn_server, door_dir, closing) -> Callable[[str], Proxy]:
    """Proxies of the doors of a server that is another process."""
    child = spawn_server(SERVER, cwd=door_dir)

    def reach(name: str) -> Proxy:
        return closing.enter_context(Proxy(door_dir / f"{name}.door", timeout=PATIENCE))

    reach.child = child  # type: ignore[attr-defined]
    return reach


# -- what arrives


@pytest.mark.ids("F12", "F13", "I3", "N11")
def test_an_endpoint_arrives_as_a_proxy(far):
    backend = far("backend")()
    assert isinstance(backend, Proxy)
    assert backend.info.path is None
    assert backend.info.attributes == {"object"}
    assert backend.pid() == far.child.pid
    assert backend.info.server.pid == far.child.pid


@pytest.mark.ids("N11")
def test_a_door_needs_no_permission_on_any_path(far, door_dir):
    door = far("name")
    arrived = far("echo")(door)
    for name in os.listdir(door_dir):
        os.unlink(door_dir / name)
    assert arrived() == far.child.pid


@pytest.mark.ids("F14", "F12", "I3")
def test_a_door_may_be_passed_on_and_is_the_same_door(far, serve, connect):
    serve(echo)
    backend = far("backend")()
    further = connect()(backend)
    again = connect()(further)
    assert further == again == backend
    assert len({backend, further, again}) == 1
    assert again.pid() == far.child.pid
    assert backend != far("backend")()
    for it in (further, again):
        it.close()
    assert backend.pid() == far.child.pid


@pytest.mark.ids("F12")
def test_a_door_that_comes_home_is_local(far):
    with Endpoint(echo, linger=True) as endpoint:
        home = far("echo")(endpoint)
        assert "local" in home.info.attributes
        assert home(5) == 5
        with Proxy(endpoint) as other:
            assert home == other


@pytest.mark.ids("F12")
def test_a_connection_to_a_name_that_comes_home_is_local_once_it_was_called(far, serve, connect):
    serve(os.getpid)
    home = far("echo")(connect())
    assert "local" not in home.info.attributes
    assert home() == os.getpid()
    assert "local" in home.info.attributes


@pytest.mark.ids("B16", "C13")
def test_a_claimed_id_makes_no_door_local(serve, closing):
    """S21: a door that says it is one of ours is none."""
    (endpoint,) = serve(echo).endpoints
    holder, port = _sockets.door_pair()
    with holder, port:
        port.send(endpoint._door.greeting().encode())
        arrived = doors.arrive(Descriptor(os.dup(holder.fileno())), os.geteuid())
        assert arrived.info.id == endpoint.info.id
        assert "local" not in arrived.info.attributes
        assert arrived._line._pool is None
        arrived.close()


CONTAINERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "itself": (lambda door: door, lambda got: got),
    "in a list": (lambda door: [1, [door]], lambda got: got[1][0]),
    "in a dict": (lambda door: {"door": {"in": door}}, lambda got: got["door"]["in"]),
    "in a tuple": (lambda door: (door, 2), lambda got: got[0]),
    "in an attribute": (lambda door: Order("a", door), lambda got: got.report),
    "twice": (lambda door: [door, door], lambda got: got[0] if got[0] is got[1] else None),
}


@pytest.mark.parametrize("kind", ["endpoint", "proxy", "arrived proxy"])
@pytest.mark.parametrize(("put", "find"), CONTAINERS.values(), ids=CONTAINERS)
def test_anywhere_in_arguments_and_results(far, closing, kind, put, find):
    endpoint = closing.enter_context(Endpoint(os.getpid, linger=True))
    door: Any = endpoint
    if kind == "proxy":
        door = closing.enter_context(Proxy(endpoint))
    elif kind == "arrived proxy":
        door = far("echo")(endpoint)
    came = find(far("echo")(put(door)))
    assert isinstance(came, Proxy)
    assert came() == os.getpid()


def test_a_method_crosses_too(far):
    backend = far("backend")()
    assert far("call")(backend.pid) == far.child.pid
    assert far("call")(backend.echo, value=5) == 5


def test_take_moves_a_proxy_and_no_endpoint(far):
    backend = far("backend")()
    moved = far("echo")(take(backend))
    assert backend.closed
    assert moved.pid() == far.child.pid
    with Endpoint(echo) as endpoint, pytest.raises(TypeError, match=r"take\(\) is for"):
        take(endpoint)


def test_what_is_closed_cannot_be_passed(far):
    closed = far("backend")()
    closed.close()
    with pytest.raises(MarshalError, match=r"args\[0\]\[1\].*ClosedError") as caught:
        far("echo")([1, closed])
    assert not caught.value.may_have_run
    endpoint = Endpoint(echo)
    endpoint.close()
    with pytest.raises(MarshalError, match=r"args\[0\].*ClosedError"):
        far("echo")(endpoint)


@pytest.mark.parametrize("called", [False, True])
def test_a_door_that_arrived_and_was_closed_is_not_called(serve, connect, called):
    with Endpoint(echo, linger=True) as endpoint:
        serve(lambda: endpoint)
        door = connect()()
        if called:
            assert door("x") == "x"
        door.close()
        for call in (lambda: door("x"), door.ping):
            with pytest.raises(ClosedError) as caught:
                call()
            assert not caught.value.may_have_run


def test_a_door_does_not_cross_in_an_exception(serve, connect):
    def fail() -> None:
        raise ValueError(Endpoint(echo))

    serve(fail)
    with pytest.raises(RemoteError, match="crosses in arguments and results"):
        try:
            connect()()
        except RemoteError as error:
            raise RemoteError(str(error.__notes__)) from None


@pytest.mark.parametrize("codec", ["pickle", "data"])
@pytest.mark.parametrize("errno_", [errno.EMFILE, errno.ENFILE])
def test_no_descriptor_for_a_door_that_is_to_go_along(serve, connect, monkeypatch, codec, errno_):
    def fail(self: Endpoint) -> Descriptor:
        raise OSError(errno_, os.strerror(errno_))

    with Endpoint(echo, codec=codec, linger=True) as endpoint:
        serve(lambda value=None: endpoint, codec=codec)
        monkeypatch.setattr(Endpoint, "open", fail)
        with pytest.raises(OSError, match=r"descriptor|open files") as caught:
            connect()(endpoint)
        assert not isinstance(caught.value, DoorError)
        assert caught.value.errno == errno_
        with pytest.raises(BusyError, match="the result cannot be sent") as caught:
            connect()()
        assert caught.value.may_have_run
        monkeypatch.undo()
        assert connect()()(5) == 5


# -- nothing is opened


@pytest.mark.ids("C12")
@pytest.mark.parametrize("state", ["dead", "silent", "revoked"])
def test_a_door_that_nobody_answers_delays_nobody(far, serve, connect, closing, state):
    serve(lambda door: door.info.name)
    if state == "silent":
        backend = far("backend")()
        far.child.stop()
    elif state == "dead":
        backend = far("backend")()
        far.child.kill()
    else:
        endpoint = closing.enter_context(Endpoint(echo, name="revoked", linger=True))
        backend = closing.enter_context(Proxy(endpoint))
        endpoint.revoke()
    before = time.monotonic()
    name = connect()(backend)
    assert time.monotonic() - before < 1.0
    assert name in ("Backend", "revoked")
    if state == "silent":
        far.child.cont()


@pytest.mark.ids("C12", "C10")
def test_a_dead_door_says_so_when_it_is_called(far, serve, connect):
    serve(echo)
    came = connect()(far("backend")())
    far.child.kill()
    with pytest.raises(BrokenDoorError) as caught:
        came.pid()
    assert not caught.value.may_have_run
    assert not came.alive
    came.close()  # ``caught`` has this frame


def test_a_silent_door_is_waited_for_until_the_calls_time_is_over(far, serve, connect):
    serve(echo)
    came = connect()(far("backend")())
    far.child.stop()
    before = time.monotonic()
    with pytest.raises(CallTimeoutError) as caught:
        came.pid.options(timeout=0.2)()
    assert 0.15 < time.monotonic() - before < 3
    assert not caught.value.may_have_run
    far.child.cont()
    assert came.pid() == far.child.pid
    came.close()  # ``caught`` has this frame


@pytest.mark.parametrize("what", ["pipe", "inet", "stream", "silent", "closed"])
def test_what_is_no_door_is_refused_where_it_arrives(what):
    one, other = socket.socketpair(
        socket.AF_UNIX, socket.SOCK_STREAM if what == "stream" else socket.SOCK_SEQPACKET
    )
    with one, other:
        if what == "closed":
            other.close()
        if what == "inet":
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as inet:
                number = os.dup(inet.fileno())
        else:
            number = os.open(os.devnull, os.O_RDONLY) if what == "pipe" else os.dup(one.fileno())
        with Descriptor(number) as descriptor:
            before = time.monotonic()
            with pytest.raises(NotADoorError):
                doors.arrive(descriptor, os.geteuid())
            assert time.monotonic() - before < 1.0
            assert not descriptor.closed


def test_a_strangers_door_is_closed_by_those_who_have_time(far, monkeypatch):
    """S10: what lies in its queue may hold whoever closes it up."""
    left: list[tuple[list[int], int | None]] = []

    def note(numbers: list[int], uid: int | None) -> None:
        if numbers:
            left.append((list(numbers), uid))

    monkeypatch.setattr(handles, "close_later", note)
    with far("backend")() as backend:
        stranger = doors.arrive(Descriptor(os.dup(backend.fileno())), 12345)
        number = stranger.fileno()
        stranger.close()
        assert left == [([number], 12345)]
        os.close(number)
    assert len(left) == 1


def test_a_proxy_that_arrived_goes_on_in_a_forked_child(far):
    backend = far("backend")()
    assert run_as_uid(None, backend.pid) == far.child.pid
    assert backend.pid() == far.child.pid
    assert run_as_uid(None, backend.pid) == far.child.pid


def test_a_call_through_a_door_that_has_come_home_and_would_wait_for_itself_is_refused(serve, connect):
    server = serve(lambda door: door(), server={"max_threads": 1})
    with (
        server.attach(Endpoint(echo, linger=True)) as endpoint,
        pytest.raises(RemoteError, match="BusyError"),
    ):
        connect()(endpoint)


# -- whom to believe


@pytest.mark.ids("C11")
def test_a_door_is_believed_only_of_the_user_who_passed_it():
    """S7: what M has passed is not called as ours, if another than M serves it."""
    ran = []
    with Endpoint(ran.append, linger=True) as endpoint:
        came = doors.arrive(endpoint.open(), 12345)
        with pytest.raises(AccessError, match=r"believed are the uids \[12345\]"):
            came("delete")
        with pytest.raises(AccessError):
            came.ping()
        assert ran == []
        with Proxy(came) as widened:  # as for any door that one opens oneself
            widened("by our own will")
        came.close()
    assert ran == ["by our own will"]


def test_a_pickle_door_is_not_passed_where_data_is_spoken():
    mine = Credentials(os.getpid(), os.geteuid(), os.getegid(), ())
    with Endpoint(echo, name="progress", linger=True) as endpoint, Proxy(endpoint) as proxy:
        for door in (endpoint, proxy):
            for to in (mine, attrs.evolve(mine, uid=12345), attrs.evolve(mine, uid=None)):
                with pytest.raises(
                    MarshalError, match=r"'progress' speaks pickle.* make it with codec=\"data\""
                ):
                    doors.check_crossing(door, to)
    with Endpoint(echo, codec="data", linger=True) as endpoint:
        doors.check_crossing(endpoint, mine)


@pytest.mark.ids("U17")
def test_a_fresh_descriptor_shares_its_fate_with_no_other(far):
    """S13: who holds one may shut it down, and the others notice nothing."""
    backend = far("backend")()
    assert backend.pid() == far.child.pid
    with doors.fresh(backend, os.geteuid()) as descriptor:
        other = socket.socket(fileno=os.dup(descriptor.fileno()))
        with other, Proxy(descriptor) as second:
            assert second == backend
            assert second.pid() == far.child.pid
            other.shutdown(socket.SHUT_RDWR)
        doors.fresh(backend, os.geteuid()).close()
    assert backend.pid() == far.child.pid


def test_a_server_without_descriptors_hands_none_out(far, serve, connect, monkeypatch):
    serve(echo)
    proxy = connect()
    endpoint_door = proxy._line._find_home()._door
    monkeypatch.setattr(endpoint_door, "open_for", lambda uid: (_ for _ in ()).throw(OSError(24, "none")))
    with pytest.raises(BusyError, match="has made no descriptor"):
        doors.fresh(proxy, os.geteuid())
    assert proxy(1) == 1


# -- callbacks


def test_the_server_calls_back_while_the_client_waits(far):
    said: list[Any] = []
    assert far("call")(Endpoint(lambda *words: said.append(words) or len(words)), 1, 2) == 2
    assert said == [(1, 2)]


def test_a_callback_runs_in_the_process_that_made_it_with_its_caller(far):
    assert far("call")(Endpoint(lambda: (os.getpid(), current_call().caller.pid))) == (
        os.getpid(),
        far.child.pid,
    )


def test_a_plain_function_is_a_value(far):
    assert far("call")(os.getpid) == far.child.pid
    assert far("call")(Endpoint(os.getpid)) == os.getpid()


@pytest.mark.parametrize("depth", [1, 2, 20])
def test_callbacks_nest(far, depth):
    call = far("call")

    def down(left: int) -> list[int]:
        return [left] if left == 0 else [left, *call(Endpoint(down), left - 1)]

    assert call(Endpoint(down), depth) == list(range(depth, -1, -1))


def test_an_error_travels_through_both(far):
    def fail() -> None:
        raise LookupError("in the client")

    with pytest.raises(LookupError, match="in the client") as caught:
        far("call")(Endpoint(fail))
    text = str(caught.value.__cause__)
    assert "in fail" in text
    assert "in call" in text


def test_the_deadline_is_carried_along(far):
    left: queue.SimpleQueue[float | None] = queue.SimpleQueue()

    def note() -> None:
        deadline = current_call().deadline
        left.put(None if deadline is None else deadline - time.monotonic())

    far("call").options(timeout=None)(Endpoint(note))
    assert left.get() is None
    far("call").options(timeout=15)(Endpoint(note))
    assert 10 < left.get() <= 15


def test_the_deadline_ends_a_callback(far):
    go_on = threading.Event()
    with pytest.raises(CallTimeoutError):
        far("call").options(timeout=0.3)(Endpoint(go_on.wait), 60)
    before = time.monotonic()
    assert far("call")(Endpoint(echo), 5) == 5
    assert time.monotonic() - before < 5
    go_on.set()


def test_the_shorter_of_two_deadlines_counts(far, serve, connect):
    left: queue.SimpleQueue[float] = queue.SimpleQueue()

    def note() -> None:
        left.put(current_call().deadline - time.monotonic())

    serve(lambda door, seconds: door.options(timeout=seconds)())
    connect().options(timeout=10)(Endpoint(note), 2)
    assert left.get() <= 2
    connect().options(timeout=3)(Endpoint(note), 60)
    assert left.get() <= 3


def test_a_client_that_is_killed_in_its_callback_is_an_error_in_the_procedure(
    serve, connect, spawn_python, door_dir
):
    ends: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work(callback: Proxy) -> None:
        try:
            callback()
        except BrokenDoorError as error:
            ends.put(error.may_have_run)

    serve(work)
    client = spawn_python(
        """
        import time
        from doorpool import Endpoint, Proxy

        def stay():
            ready()
            time.sleep(60)

        Proxy("a.door")(Endpoint(stay))
        """,
        cwd=door_dir,
    )
    client.wait_ready()
    client.kill()
    assert ends.get(timeout=PATIENCE) is True
    with Endpoint(echo) as endpoint:
        connect()(endpoint)


def test_a_server_that_is_killed_in_a_callback_is_an_error_for_its_caller(far):
    ended = threading.Event()

    def kill() -> None:
        far.child.kill()
        ended.set()

    endpoint = Endpoint(kill)
    with pytest.raises(BrokenDoorError) as caught:
        far("call")(endpoint)
    assert caught.value.may_have_run
    assert ended.wait(PATIENCE)
    wait_until(lambda: endpoint.closed)


def test_a_proxy_that_a_procedure_has_opened_itself_keeps_its_own_time(serve, connect, door_dir):
    def inner() -> float | None:
        return current_call().deadline

    def outer() -> float | None:
        with Proxy(door_dir / "inner.door") as proxy:
            return proxy()

    serve(inner, "inner.door")
    serve(outer)
    assert connect().options(timeout=10)() is None


def test_a_door_that_takes_no_descriptors_takes_no_callback(serve, connect):
    serve(echo, refuse_descriptors=True)
    with Endpoint(echo, linger=True) as endpoint, pytest.raises(LimitError, match="takes no descriptors"):
        connect()(endpoint)


# -- whose they are, and when they end


@pytest.mark.parametrize("end", ["dead", "revoked", "raises"])
def test_after_an_error_a_door_is_let_go_with_the_last_look_at_it(far, end):
    """Not when the collector comes: nothing of the error makes a ring with it."""
    endpoint = Endpoint(echo, linger=True)
    came = far("backend")() if end != "revoked" else far("echo")(endpoint)
    line = weakref.ref(came._line)
    came.ping()
    gc.disable()
    try:
        if end == "dead":
            far.child.kill()
            with pytest.raises(BrokenDoorError):
                came.pid()
        elif end == "revoked":
            endpoint.revoke()
            with pytest.raises(RevokedError):
                came(1)
        else:
            with pytest.raises(AttributeError):
                came._line.call_method("nothing", (), {}, None)
        del came
        assert line() is None
    finally:
        gc.enable()
        endpoint.close()


def test_a_callback_ends_when_the_server_lets_go_of_it(far):
    gone = threading.Event()
    endpoint = Endpoint(echo, on_unref=gone.set)
    far("keep")(endpoint)
    settle(endpoint)
    assert not gone.is_set()
    assert not endpoint.closed
    far("drop")()
    assert gone.wait(PATIENCE)
    wait_until(lambda: endpoint.closed)


def test_a_callback_ends_with_the_call_if_it_is_not_kept(far):
    gone = threading.Event()
    assert far("call")(Endpoint(echo, on_unref=gone.set), 1) == 1
    assert gone.wait(PATIENCE)


def test_a_server_holds_what_it_has_handed_out(far, serve, connect):
    """Nobody else refers to the endpoint."""
    serve(lambda: Endpoint(echo))
    door = connect()()
    gc.collect()
    assert door(5) == 5


def test_an_endpoint_that_has_expired_says_how_to_keep_it(far):
    endpoint = Endpoint(echo)
    assert far("call")(endpoint, 1) == 1
    wait_until(lambda: endpoint.closed)
    with pytest.raises(ClosedError, match="linger=True would have kept it"):
        endpoint.open()
    with Endpoint(echo, linger=True) as lingering:
        for n in range(3):
            assert far("call")(lingering, n) == n
            settle(lingering)


@pytest.mark.ids("F18")
def test_a_result_that_is_never_received_is_unreferenced(serve, connect):
    gone, going, go_on = threading.Event(), threading.Event(), threading.Event()
    made: list[Endpoint] = []

    def late() -> Endpoint:
        going.set()
        assert go_on.wait(PATIENCE)
        made.append(Endpoint(echo, on_unref=gone.set))
        return made[-1]

    serve(late)
    with pytest.raises(CallTimeoutError):
        connect().options(timeout=0.1)()
    assert going.is_set()
    go_on.set()
    assert gone.wait(PATIENCE)
    wait_until(lambda: made[0].closed)


@pytest.mark.ids("F18")
def test_a_result_whose_caller_is_killed_is_unreferenced(serve, spawn_python, door_dir):
    gone, going, go_on = threading.Event(), threading.Event(), threading.Event()

    def late() -> Endpoint:
        going.set()
        assert go_on.wait(PATIENCE)
        return Endpoint(echo, on_unref=gone.set)

    serve(late)
    child = spawn_python("from doorpool import Proxy; Proxy('a.door')()", cwd=door_dir)
    assert going.wait(PATIENCE)
    child.kill()
    go_on.set()
    assert gone.wait(PATIENCE)


def test_of_a_call_that_cannot_be_marshalled_nothing_is_handed_out(far):
    gone = threading.Event()
    with Endpoint(echo, on_unref=gone.set, linger=True) as endpoint:
        with pytest.raises(MarshalError, match=r"args\[1\]"):
            far("echo")(endpoint, threading.Lock())
        assert not endpoint.unreferenced
        settle(endpoint)
        assert not gone.is_set()


def test_a_result_of_which_the_rest_cannot_cross_hands_nothing_out(serve, connect):
    gone = threading.Event()
    endpoint = Endpoint(echo, on_unref=gone.set)
    serve(lambda: [endpoint, threading.Lock()])
    with pytest.raises(MarshalError, match=r"result\[1\]"):
        connect()()
    settle(endpoint)
    assert not endpoint.closed
    assert not gone.is_set()
    endpoint.close()


@pytest.mark.ids("R1")
def test_a_door_that_was_revoked_is_refused_wherever_it_is(far):
    endpoint = Endpoint(echo, linger=True)
    home = far("echo")(endpoint)
    assert home(1) == 1
    endpoint.revoke()
    with pytest.raises(RevokedError):
        home(1)
    endpoint.close()


def test_a_call_that_is_made_again_through_a_reopened_door_takes_its_doors_along(spawn_server, door_dir):
    first = spawn_server(SERVER, cwd=door_dir)
    said: list[int] = []
    with Proxy(door_dir / "call.door") as call:
        call(Endpoint(said.append), 1)
        first.kill()
        spawn_server(SERVER, cwd=door_dir)
        call(Endpoint(said.append), 2)
    assert said == [1, 2]


OTHER = """
    import os
    from doorpool import Server
    server = Server()
    server.attach(os.getpid, "other.door")
    with server:
        ready()
        server.run()
"""


@pytest.mark.ids("C10")
@pytest.mark.parametrize("followed", [True, False])
def test_a_door_that_is_passed_is_opened_anew_if_its_server_has_gone(far, spawn_server, door_dir, followed):
    """Nobody else could: who gets it has no path.  And a router may never call what it hands out."""
    first = spawn_server(OTHER, cwd=door_dir)
    with Proxy(door_dir / "other.door") as door:
        first.kill()
        if followed:
            second = spawn_server(OTHER, cwd=door_dir)
            assert far("call")(door) == second.pid
        else:
            with pytest.raises(RemoteError, match="BrokenDoorError"):
                far("call")(door)


@pytest.mark.timeout(600)  # the long form takes some minutes
def test_descriptors_stay_flat_over_many_passings(far, many):
    echo_, call, fds = far("echo"), far("call"), far("fds")
    backend = far("backend")()

    def pass_once() -> None:
        with Endpoint(echo, linger=True) as endpoint:
            assert call(endpoint, 1) == 1
            with echo_([endpoint, {"b": backend}])[1]["b"] as came:
                assert came.pid() == far.child.pid

    for _ in range(3):
        pass_once()
    here, there = descriptors(), fds()
    for _ in range(many(100, 10_000)):
        pass_once()
    wait_until(lambda: descriptors() <= here)
    wait_until(lambda: fds() <= there)


# -- where data is spoken


class Shelf:
    """A thing of the server's."""

    def __init__(self) -> None:
        self.books: list[str] = []

    def put(self, title: str, year: int = 0) -> int:
        """Put a book there."""
        self.books.append(title)
        return len(self.books)

    def fail(self) -> None:
        raise LookupError("no such book")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.books.append(f"left: {error}")
        return False


@pytest.fixture
def shelf(serve, connect) -> Proxy:
    serve(Shelf(), codec="data")
    return connect()


def test_an_object_behind_a_data_door(shelf):
    assert shelf.info.codec == "data"
    assert shelf.put("Emma", 1815) == 1
    assert shelf.put(year=1, title="Ulysses") == 2
    assert str(inspect.signature(shelf.put)) == "(title: 'str', year: 'int' = 0) -> 'int'"
    with pytest.raises(LookupError, match="no such book"):
        shelf.fail()
    with pytest.raises(AttributeError):
        shelf.burn  # noqa: B018


@pytest.mark.parametrize("name", ["__class__", "books", "burn", "__dict__"])
def test_a_data_caller_that_asks_all_the_same_is_refused(shelf, name):
    with pytest.raises(AttributeError, match="has no method"):
        shelf._line.call_method(name, (), {}, None)
    with pytest.raises(TypeError, match="not callable"):
        shelf()


def test_its_arguments_are_compared_with_the_annotations_of_the_method(shelf):
    with pytest.raises(MarshalError, match=r"title.*Expected `str`, got `int`"):
        shelf.put(5)
    with pytest.raises(MarshalError, match="Expected `str`"):
        shelf._line.transact((5,), {}, None)
    with pytest.raises(TypeError, match="the name of a method first"):
        shelf._line.transact((), {}, None)


def test_a_method_that_data_cannot_check_is_refused_at_the_start(serve):
    class Odd:
        def take(self, it: "nowhere.Thing") -> None: ...  # noqa: F821, UP037

    with pytest.raises(TypeError, match="says nothing here"):
        serve(Odd(), codec="data")


def test_doors_cross_data_doors(serve, connect):
    made: list[Any] = []

    def lend(report: Proxy) -> Endpoint:
        report(len(made))
        made.append(Endpoint(Shelf(), codec="data"))
        return made[-1]

    said: list[int] = []
    serve(lend, codec="data")
    with Endpoint(said.append, codec="data", linger=True) as report:
        one, other = connect()(report), connect()([report][0])
    assert said == [0, 1]
    assert one != other
    assert "local" in one.info.attributes
    with one as entered:
        assert entered.put("Emma") == 1
    wait_until(lambda: made[0].closed)
    assert made[0].target.object.books == ["Emma", "left: None"]
    with pytest.raises(ValueError, match="torn"), other:
        raise ValueError("torn")
    assert made[1].target.object.books == ["left: ValueError: torn"]


def test_a_door_inside_of_data_is_passed_on(serve, connect):
    serve(echo, codec="data")
    with Endpoint(echo, codec="data", linger=True) as endpoint:
        with Proxy(endpoint) as proxy:
            came = connect()({"doors": [endpoint, {"it": proxy}]})
        first, second = came["doors"][0], came["doors"][1]["it"]
        assert first == second
        assert connect()(first)(5) == 5
        assert second(6) == 6


def test_a_misfit_among_data_hands_nothing_out(serve, connect):
    serve(echo, codec="data")
    gone = threading.Event()
    with Endpoint(echo, codec="data", on_unref=gone.set, linger=True) as endpoint:
        with pytest.raises(MarshalError, match=r"args\[1\] cannot cross a data door"):
            connect()(endpoint, object())
        settle(endpoint)
        assert not endpoint.unreferenced
        assert not gone.is_set()
    with (
        Endpoint(echo, linger=True) as pickled,
        pytest.raises(MarshalError, match=r"args\[1\].*speaks pickle"),
    ):
        connect()(5, pickled)


# -- three processes


ROUTER = """
    import os
    from doorpool import Proxy, Server

    server = Server()
    backend = Proxy("backend.door")

    @server.endpoint("front.door")
    def front(name):
        if name != "backend":
            raise LookupError(name)
        return backend()

    with server:
        ready()
        server.run()
"""

CLIENT = """
    import time
    from doorpool import Proxy
    with Proxy("front.door") as front:
        backend = front("backend")
        ready(backend.pid())
        time.sleep(60)
"""


@pytest.fixture
def three(far, spawn_server, spawn_python, door_dir):
    """A backend, a router in front of it, and a client of both."""
    router = spawn_server(ROUTER, cwd=door_dir)
    client = spawn_python(CLIENT, cwd=door_dir)
    assert client.wait_ready() == far.child.pid
    return far.child, router, client


def test_a_router_is_out_of_the_way(three, far, door_dir):
    backend, router, _ = three
    with Proxy(door_dir / "front.door") as front:
        door = front("backend")
        router.kill()
        assert door.pid() == backend.pid
        with pytest.raises(BrokenDoorError):
            front("backend")
    os.unlink(door_dir / "front.door")


def test_a_client_that_is_killed_leaves_nothing_behind(three, far, door_dir):
    backend, _, client = three
    with Proxy(door_dir / "front.door") as front:
        fds = far("fds")
        before = fds()
        client.kill()
        wait_until(lambda: fds() < before)
        assert front("backend").pid() == backend.pid


def test_a_backend_that_is_killed_leaves_the_router_serving(three, far, door_dir, spawn_server):
    backend, router, client = three
    with Proxy(door_dir / "front.door") as front:
        door = front("backend")
        backend.kill()
        with pytest.raises(BrokenDoorError):
            door.pid()
        with pytest.raises(RemoteError, match="BrokenDoorError"):
            front("backend")
        with pytest.raises(LookupError):
            front("another")
        again = spawn_server(SERVER, cwd=door_dir)
        assert front("backend").pid() == again.pid
    assert not router.ended
    assert not client.ended


def test_a_server_of_this_process_is_not_needed_for_an_endpoint(far):
    with Server():
        assert far("call")(Endpoint(lambda: threading.current_thread().name)).startswith("doorpool-default")
