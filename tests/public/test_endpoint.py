"""
Endpoints: the doors on the server's side, their names, limits and descriptors.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import grp
import os
import stat
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
from support import wait_until

from doorpool import (
    ClosedError,
    Descriptor,
    Endpoint,
    LimitError,
    Proxy,
    RevokedError,
    Server,
    current_call,
)


def echo(value: Any = None) -> Any:
    """Give it back."""
    return value


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def endpoint(serve) -> Endpoint:
    """An endpoint of a started server, with the name ``a.door``."""
    return serve(echo).endpoints[0]


# -- options


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"name": 5}, TypeError, "name is a string, not 5"),
        ({"mode": "0600"}, TypeError, "mode is a number such as 0o660"),
        ({"mode": True}, TypeError, "mode is a number"),
        ({"mode": 0o1777}, ValueError, "mode is from 0 to 0o777, not 0o1777"),
        ({"mode": -1}, ValueError, "mode is from 0"),
        ({"codec": "json"}, ValueError, "codec is 'pickle' or 'data', not 'json'"),
        ({"callers": "staff"}, TypeError, "callers is a set of uids and Groups.*not 'staff'"),
        ({"callers": 1000}, TypeError, "callers is a set of uids"),
        ({"callers": [True]}, TypeError, "callers holds uids and Groups, not True"),
        ({"callers": ["staff"]}, TypeError, "callers holds uids and Groups, not 'staff'"),
        ({"callers": [2**32]}, ValueError, "a uid is from 0 to"),
        ({"callers": [-1]}, ValueError, "a uid is from 0 to"),
        ({"errors": [ValueError]}, ValueError, 'errors= is for codec="data"'),
        ({"errors": ["ValueError"], "codec": "data"}, TypeError, "errors holds exception classes"),
        ({"tracebacks": True}, ValueError, 'tracebacks= is for codec="data"'),
        ({"trust": "all"}, ValueError, "trust is 'namespace' or 'uid', not 'all'"),
        ({"max_request": -1}, ValueError, "max_request is from 0 to"),
        ({"max_request": 1.5}, TypeError, "max_request is a whole number, not 1.5"),
        ({"max_reply": True}, TypeError, "max_reply is a whole number"),
        ({"max_reply": 2**63}, ValueError, "max_reply is from 0"),
        ({"max_descriptors": 254}, ValueError, "max_descriptors is from 0 to 253, not 254"),
        ({"max_descriptors": "3"}, TypeError, "max_descriptors is a whole number"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
@pytest.mark.ids("C5")
def test_options_are_checked(options, error, text):
    with pytest.raises(error, match=text):
        Endpoint(echo, **options)
    with pytest.raises(error, match=text):
        Server().attach(echo, **options)


def test_defaults():
    endpoint = Endpoint(echo)
    assert (endpoint.name, endpoint.mode) == ("echo", 0o600)
    assert (endpoint.max_request, endpoint.max_reply, endpoint.max_descriptors) == (2**30, 2**30, 253)
    assert (endpoint.paths, endpoint.server, endpoint.closed, endpoint.revoked) == ((), None, False, False)
    assert Endpoint(echo, codec="data").max_request == 2**24


# -- names


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
@pytest.mark.ids("N1", "A03")
def test_the_mode_is_exact_whatever_the_umask(door_dir, umask):
    before = os.umask(umask)
    try:
        server = Server()
        endpoint = server.attach(echo, door_dir / "default.door")
        server.attach(echo, door_dir / "endpoint.door", mode=0o666)
        other = Endpoint(echo, mode=0o640)
        server.attach(other, door_dir / "own.door")
        server.attach(other, door_dir / "name.door", mode=0o604)
        with server:
            endpoint.attach(door_dir / "late.door", mode=0o606)
            found = {path.stem: mode_of(path) for path in door_dir.iterdir()}
    finally:
        os.umask(before)
    assert found == {"default": 0o600, "endpoint": 0o666, "own": 0o640, "name": 0o604, "late": 0o606}


@pytest.mark.ids("N1")
def test_the_group_by_number_and_by_name(serve, door_dir):
    group = os.getgid()
    server = serve(echo, group=group)
    assert (door_dir / "a.door").stat().st_gid == group
    try:
        name = grp.getgrgid(group).gr_name
    except KeyError:
        return  # the number has no name here
    server.attach(echo, door_dir / "b.door", group=name)
    assert (door_dir / "b.door").stat().st_gid == group


@pytest.mark.ids("N1")
def test_another_group(root_only, serve, door_dir):
    serve(echo, group=12345, mode=0o660)
    status = (door_dir / "a.door").stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 0o660)


def test_a_group_that_is_none(serve, door_dir):
    with pytest.raises(LookupError, match="nosuchgroup"):
        serve(echo, group="nosuchgroup")
    assert list(door_dir.iterdir()) == []


@pytest.mark.ids("N5", "N6", "N7")
def test_several_names_come_and_go_and_who_is_inside_stays(endpoint, door_dir, connect):
    assert endpoint.attach(door_dir / "b.door") is endpoint
    endpoint.attach(str(door_dir / "c.door").encode())
    names = tuple(str(door_dir / f"{name}.door") for name in "abc")
    assert endpoint.paths == names
    proxies = [connect(name) for name in names]
    assert len(set(proxies)) == 1, "one door"
    endpoint.detach(door_dir / "b.door")
    assert endpoint.paths == (names[0], names[2])
    assert sorted(path.name for path in door_dir.iterdir()) == ["a.door", "c.door"]
    with pytest.raises(ValueError, match="has no name"):
        endpoint.detach(door_dir / "b.door")
    endpoint.detach()
    assert endpoint.paths == ()
    assert list(door_dir.iterdir()) == []
    assert [proxy(5) for proxy in proxies] == [5, 5, 5]
    endpoint.attach(door_dir / "b.door")
    assert connect(door_dir / "b.door") == proxies[0]


@pytest.mark.ids("N2", "A11", "N12")
def test_only_replace_takes_over_a_living_name(endpoint, door_dir, connect):
    inside = connect(reopen=False)
    with Server() as other:
        with pytest.raises(FileExistsError) as caught:
            other.attach(lambda _: "second", door_dir / "a.door")
        assert str(door_dir / "a.door") in str(caught.value)
        assert connect()(1) == 1
        other.attach(lambda _: "second", door_dir / "a.door", replace=True)
        assert connect()(1) == "second"
        assert inside(1) == 1, "who is inside is not moved"
        # The first server does not take away what is no longer its own.
        endpoint.close()
        assert connect()(1) == "second"


@pytest.mark.ids("N3", "A10")
def test_the_name_of_a_server_that_was_killed(spawn_server, serve, door_dir, connect):
    child = spawn_server(
        """
        from doorpool import Server
        server = Server()
        server.attach(str.upper, "a.door")
        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    child.kill()
    assert (door_dir / "a.door").is_socket()
    with pytest.raises(ConnectionError) as caught:
        Proxy(door_dir / "a.door")
    assert str(door_dir / "a.door") in str(caught.value)
    assert caught.value.may_have_run is False
    serve(echo)
    assert connect()(1) == 1


def _chmod_script(first: int, then: int) -> str:
    return f"""
        import os
        from doorpool import Proxy, Server

        server = Server()
        server.attach(str.upper, "a.door", mode={first:#o})
        endpoint = server.attach(server.endpoints[0], "b.door")
        with server:
            with Proxy("a.door") as inside:
                os.chmod("a.door", {then:#o})
                try:
                    Proxy("a.door").close()
                except PermissionError as error:
                    refusal = error.errno, error.filename
                with Proxy("b.door") as other:
                    result((refusal, inside("x"), inside.submit("y").result(), other("z")))
    """


@pytest.mark.ids("N8", "N9", "A04")
def test_a_chmod_acts_at_once_on_that_name_only_and_on_nobody_inside(run_python, door_dir):
    uid = None
    if os.geteuid() == 0:  # root is refused nothing
        uid = 1000
        os.chown(door_dir, uid, uid)
    done = run_python(_chmod_script(0o600, 0o400), uid=uid, cwd=door_dir)
    assert done.value == ((errno.EACCES, str(door_dir / "a.door")), "X", "Y", "Z")


# -- handing out


@pytest.mark.ids("C1", "C2", "N11")
def test_open_gives_a_fresh_descriptor_each_time(endpoint, connect):
    with endpoint.open() as first, endpoint.open() as second:
        assert isinstance(first, Descriptor)
        assert first.fileno() != second.fileno()
        for descriptor in (first, second):
            assert fcntl.fcntl(descriptor.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            assert stat.S_ISSOCK(os.fstat(descriptor.fileno()).st_mode)
        assert os.fstat(first.fileno()).st_ino != os.fstat(second.fileno()).st_ino
        proxy = connect(first.take())
        assert proxy(3) == 3
        assert proxy == connect()
        assert proxy.info.path is None


@pytest.mark.ids("C1")
def test_a_descriptor_works_in_a_program_that_inherits_it(endpoint, run_python):
    with endpoint.open() as descriptor:
        done = run_python(
            """
            import sys
            from doorpool import Proxy
            with Proxy(int(sys.argv[1])) as echo:
                result(echo("hello"))
            """,
            descriptor.fileno(),
            pass_fds=[descriptor.fileno()],
        )
    assert done.value == "hello"


@pytest.mark.ids("C1")
def test_a_door_needs_no_name(connect, closing):
    with Server() as server:
        proxy = connect(server.attach(echo))
        assert proxy("x") == "x"
        assert proxy.info.path is None


@pytest.mark.ids("C3")
def test_a_procedure_may_be_called_before_attach_has_returned(serve, door_dir, closing):
    server = serve(echo)
    called = threading.Event()
    client = threading.Thread(target=lambda: _call(door_dir / "b.door"))
    client.start()
    server.attach(called.set, door_dir / "b.door")
    assert called.wait(10)
    client.join(10)


def _call(path: Path) -> None:
    with Proxy(path, wait=10) as proxy:
        proxy()


@pytest.mark.ids("C6")
def test_attributes_are_fixed(endpoint):
    for name in ("closed", "revoked", "paths", "server", "info"):
        with pytest.raises(AttributeError):
            setattr(endpoint, name, None)


def test_an_endpoint_is_no_value_of_its_own(endpoint):
    import copy
    import pickle

    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"attach\(\)"):
            attempt(endpoint)


def test_info_of_an_endpoint_is_what_a_proxy_is_told(endpoint, connect):
    ours, theirs = endpoint.info, connect().info
    assert ours.id == theirs.id
    assert (ours.name, ours.doc, ours.signature) == (theirs.name, theirs.doc, theirs.signature)
    assert (ours.attributes, ours.max_request) == (theirs.attributes, theirs.max_request)
    assert (ours.server.pid, ours.server.uid) == (os.getpid(), os.geteuid())
    assert ours.path is None
    endpoint.close()
    with pytest.raises(ClosedError):
        _ = endpoint.info


# -- the default server


def test_an_endpoint_alone_is_run_by_the_default_server(door_dir, connect):
    def where() -> tuple[str, bool]:
        thread = threading.current_thread()
        return thread.name, thread.daemon

    with Endpoint(where) as endpoint:
        assert endpoint.server is None
        endpoint.attach(door_dir / "a.door")
        name, daemon = connect()()
        assert name.startswith("doorpool-default")
        assert daemon
        assert endpoint.server is not None
        with Endpoint(echo) as other, other.open() as descriptor:
            assert other.server is endpoint.server
            assert connect(descriptor)(1) == 1
            with Server() as server, pytest.raises(ValueError, match="another server"):
                server.attach(endpoint, door_dir / "b.door")


def test_a_dropped_endpoint_is_collected_with_a_warning():
    held = [Endpoint(echo, linger=True)]
    there = weakref.ref(held[0])
    held[0].open().close()  # handed out, and its holder is gone
    wait_until(lambda: held[0].unreferenced, "the keeper has heard so")

    def drop() -> None:
        held.clear()
        # Endpoint and door know one another, and the keeper may be about to forget the door.
        wait_until(lambda: gc.collect() >= 0 and there() is None)

    with pytest.warns(ResourceWarning, match="unclosed <Endpoint 'echo'"):
        drop()


def test_a_dropped_endpoint_lives_while_it_has_a_name_or_a_holder(door_dir, connect):
    def close(whether: bool) -> bool:
        if whether:
            current_call().endpoint.close()
        return whether

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = Endpoint(close).attach(door_dir / "a.door").paths[0]
        descriptor = Endpoint(close).open()
        gc.collect()
        for proxy in (connect(path), connect(descriptor)):
            gc.collect()
            assert proxy(False) is False
            assert proxy(True) is True


# -- taking away


@pytest.mark.ids("R6")
@pytest.mark.parametrize("take", [Endpoint.revoke, Endpoint.close])
def test_revoke_and_close_refuse_new_calls_and_let_running_ones_finish(serve, connect, door_dir, take):
    running, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        running.set()
        go_on.wait(10)
        return "done"

    server = serve(slow)
    other = server.attach(echo, door_dir / "b.door")
    (endpoint, _) = server.endpoints
    proxy, opened_before = connect(reopen=False), connect(reopen=False)
    with endpoint.open() as descriptor:
        future = proxy.submit()
        running.wait(10)
        take(endpoint)
        take(endpoint)
        assert endpoint.revoked
        assert not (door_dir / "a.door").exists()
        for each in (proxy, opened_before):
            with pytest.raises(RevokedError) as caught:
                each()
            assert caught.value.may_have_run is False
            with pytest.raises(RevokedError):
                each.ping()
        with pytest.raises(RevokedError):
            Proxy(descriptor)
        with pytest.raises(FileNotFoundError):
            Proxy(door_dir / "a.door")
        go_on.set()
        assert future.result(10) == "done"
    for use in (endpoint.open, lambda: endpoint.attach(door_dir / "c.door")):
        with pytest.raises(ClosedError):
            use()
    assert connect(door_dir / "b.door")(1) == 1, "the server's other doors go on"
    assert other in server.endpoints
    assert (endpoint in server.endpoints) is (take is Endpoint.revoke)


def test_a_procedure_can_revoke_its_own_door(serve, connect):
    server = serve(lambda: (current_call().endpoint.revoke(), "last words")[1])
    proxy = connect(reopen=False)
    assert proxy() == "last words"
    with pytest.raises(RevokedError):
        proxy()
    assert server.endpoints[0].revoked


def test_revoked_before_it_was_ever_a_door():
    endpoint = Endpoint(echo)
    endpoint.revoke()
    assert endpoint.revoked
    with pytest.raises(ClosedError):
        endpoint.open()


def test_what_was_revoked_before_it_was_ever_a_door_is_forgotten_when_it_is_closed(serve):
    server = serve(echo)
    (first,) = server.endpoints
    endpoint = server.attach(echo)
    endpoint.revoke()
    assert server.endpoints == (first, endpoint)
    endpoint.close()
    assert server.endpoints == (first,)


def test_an_endpoint_closes_at_the_end_of_with(door_dir):
    with Endpoint(echo) as endpoint:
        endpoint.attach(door_dir / "a.door")
        assert repr(endpoint) == f"<Endpoint 'echo': {door_dir / 'a.door'}>"
    assert endpoint.closed
    assert repr(endpoint) == "<Endpoint 'echo': closed>"
    assert list(door_dir.iterdir()) == []


# -- limits


@pytest.mark.ids("P1", "P4", "L13")
def test_max_request_is_lowered_while_the_door_is_in_use(endpoint, connect):
    proxy = connect()
    assert proxy(b"x" * 5000) == b"x" * 5000
    endpoint.max_request = 1000
    with pytest.raises(LimitError) as caught:
        proxy(b"x" * 5000)
    assert caught.value.may_have_run is False
    assert caught.value.limit == 1000
    assert 5000 < caught.value.value < 5100
    assert proxy(b"x" * 500) == b"x" * 500, "the channel goes on"
    late = connect()
    assert late.info.max_request == 1000
    with pytest.raises(LimitError, match="over max_request, 1000"):
        late(b"x" * 5000)
    endpoint.max_request = 2**20
    assert proxy(b"x" * 5000) == b"x" * 5000
    assert connect()(b"x" * 5000) == b"x" * 5000


@pytest.mark.ids("P1", "E10")
def test_max_reply(serve, connect):
    server = serve(lambda size: b"x" * size, max_reply=10_000)
    (endpoint,) = server.endpoints
    proxy = connect()
    for limit in (10_000, 20, 0):
        endpoint.max_reply = limit
        with pytest.raises(LimitError, match=f"over max_reply, {limit}") as caught:
            proxy(20_000)
        assert caught.value.may_have_run is True
        assert caught.value.limit == limit
        assert 20_000 < caught.value.value < 20_100
    endpoint.max_reply = 2**20
    assert proxy(20_000) == b"x" * 20_000
    wait_until(lambda: server.statistics().errors == 3)


@pytest.mark.ids("P1")
def test_limits_are_checked_when_they_are_set(endpoint, connect):
    for name in ("max_request", "max_reply", "max_descriptors"):
        with pytest.raises(ValueError, match=name):
            setattr(endpoint, name, -1)
        with pytest.raises(TypeError, match=name):
            setattr(endpoint, name, 1.0)
    endpoint.max_descriptors = 3
    assert endpoint.max_descriptors == 3
    assert connect().info.max_descriptors == 3


@pytest.mark.ids("P6")
def test_a_request_that_is_too_large_runs_nothing(serve, connect):
    calls = []
    server = serve(calls.append, max_request=1000)
    proxy = connect()
    for size in (2000, 2_000_000):
        with pytest.raises(LimitError):
            proxy(b"x" * size)
    proxy(b"y")
    assert calls == [b"y"]
    wait_until(lambda: server.statistics().served == 1)


@pytest.mark.ids("L3")
def test_calls_of_different_doors_run_in_parallel(serve, door_dir, connect):
    together = threading.Barrier(3)
    server = serve(lambda: together.wait(10) is not None)
    for name in "bc":
        server.attach(lambda: together.wait(10) is not None, door_dir / f"{name}.door")
    futures = [connect(door_dir / f"{name}.door").submit() for name in "abc"]
    assert [future.result(10) for future in futures] == [True] * 3


@pytest.mark.leaves_names
@pytest.mark.ids("R1", "R8", "A19")
def test_a_directory_that_somebody_holds_up_does_not_hold_a_close_up(serve, connect, door_dir, caplog):
    """
    In /tmp anybody can hold the lock under which names are removed.
    """
    server, proxy = serve(str.upper), connect(reopen=False)
    assert proxy("a") == "A"
    held = os.open(door_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(TimeoutError):
            server.endpoints[0].detach(door_dir / "a.door")
        assert proxy("still there") == "STILL THERE"
        assert server.endpoints[0].paths == (str(door_dir / "a.door"),)
        server.close()
    finally:
        os.close(held)
    with pytest.raises(RevokedError):
        proxy("b")
    assert "stays behind" in caplog.text


CUT = """
    import gc, os, sys
    from support.cuts import each_step
    from doorpool import Proxy, Server
    from doorpool._keeper import keeper

    options = {"threads": 2} if sys.argv[1] == "threads of its own" else {}
    with Server() as server:
        given = server.attach(lambda: "here", "a.door", **options)
        server.start()
        with Proxy("a.door") as proxy:
            proxy()
            before, steps = None, 0
            for step in each_step():
                opened = None
                with step:
                    opened = given.open()
                if opened is not None:
                    opened.close()
                step.error = None  # only now is let go of what was being made
                gc.collect(0)
                assert proxy() == "here"
                with Proxy("a.door") as another:
                    assert another() == "here"
                steps += 1
        with keeper().lock:
            closed = [port for port in given._door._ports if port.fileno() < 0]
            closed += [it for it in keeper()._callbacks if not os.path.exists(f"/proc/self/fd/{it}")]
        result((steps, len(closed)))
"""


@pytest.mark.ids("X19", "G05")
@pytest.mark.parametrize("threads", ["threads of its own", "the server's"])
def test_a_descriptor_that_is_cut_short_takes_nothing_of_the_door_away(door_dir, run_python, threads):
    """Neither the door, which others use, nor the port of what was being made stays with the keeper."""
    steps, closed = run_python(CUT, threads, cwd=door_dir).value
    assert steps > 30
    assert closed == 0
