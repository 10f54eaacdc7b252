"""
Callers that make a call again whenever they are told that it did not run: nothing runs twice.

They must not be misled by an error that is about another call than theirs: one that the procedure, or
the code of an object on its way, has made itself.
"""

from __future__ import annotations

import pytest
from support.journal import DID_NOT_RUN, MAY_HAVE_RUN, Books, Journal
from support.rawdoor import PATIENCE

from doorpool import DoorError, MarshalError, ProtocolError, Proxy, RemoteError

SERVER = """
    import sys, threading
    from doorpool import BrokenDoorError, DoorError, Proxy, Server
    from support.journal import Journal
    from support import wait_until
    from support.rawdoor import Background

    journal = Journal("journal")
    end = threading.Event()

    class Own(BrokenDoorError):
        pass

    class Disguised(Exception):
        def __reduce__(self):
            return BrokenDoorError, ("in disguise",)

    class OwnGroup(ExceptionGroup):
        def __reduce__(self):
            return OwnGroup, (self.message, self.exceptions)

    class Fails:
        def __init__(self, how):
            self.how = how

        def __reduce__(self):
            fail(self.how)

    def fail(how):
        WAYS[how]()

    def raising(error):
        def throw():
            raise error
        return throw

    def in_a_group():
        try:
            fail("stale")
        except DoorError as error:
            raise ExceptionGroup("several", [error, ExceptionGroup("inner", [error])])

    def outer(number, how):
        journal.write(number)
        if how.startswith("result: "):
            return Fails(how.removeprefix("result: "))
        fail(how)

    one = Server(max_threads=1, close_timeout=0)
    one.attach(end.wait, "one.door")
    one.start()
    holding, busy, closed = Proxy("one.door"), Proxy("one.door", timeout=0.02), Proxy("one.door")
    held = Background(holding)
    wait_until(lambda: one.statistics().running)
    closed.close()
    endpoint = one.attach(len, "short.door")
    revoked = Proxy("short.door", reopen=False)
    endpoint.close()
    one.attach(len, "small.door", max_request=100)
    small = Proxy("small.door")

    WAYS = {
        "stale": lambda: Proxy("stale.door"),
        "revoked": lambda: revoked(),
        "closed": lambda: closed(),
        "late": lambda: busy(),
        "too large": lambda: small(bytes(101)),
        "no pickle": lambda: small(threading.Lock()),
        "own": raising(Own("mine", may_have_run=False)),
        "disguised": raising(Disguised()),
        "group": in_a_group,
        "own group": raising(OwnGroup("several", [BrokenDoorError("gone")])),
        "disguised group": raising(ExceptionGroup("several", [Disguised()])),
    }

    server = Server()
    server.attach(outer, "outer.door")
    with server:
        ready(sorted(WAYS))
        server.run()
    end.set()
    held.result()
    for proxy in holding, busy, revoked, small:
        proxy.close()
    one.close()
"""

WAYS = (
    "closed", "disguised", "disguised group", "group", "late", "no pickle", "own", "own group", "revoked",
    "stale", "too large",
)  # fmt: skip


@pytest.fixture
def outer(spawn_server, spawn_python, door_dir):
    """Start a server whose procedure makes calls that fail without running; return it and the books."""
    gone = spawn_server(
        """
        from doorpool import Server
        server = Server()
        server.attach(len, "stale.door")
        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    gone.kill()
    server = spawn_server(SERVER, cwd=door_dir)
    assert tuple(server.ready) == WAYS
    with Journal(door_dir / "journal") as journal:
        yield server, Books(journal)


def retried(call, books, *args):
    """Make a call until it may have run, at most five times; return the error."""
    number = books.next_number()
    for _ in range(5):
        try:
            call(number, *args)
        except Exception as error:
            if not isinstance(error, DoorError) or error.may_have_run:
                books.enter(number, MAY_HAVE_RUN)
                return error
    pytest.fail(f"{args} is said not to have run, again and again")


@pytest.mark.ids("E02", "X15")
def test_errors_of_inner_calls_cause_no_second_run(outer, door_dir):
    server, books = outer
    with Proxy(door_dir / "outer.door", timeout=PATIENCE) as call:
        for how in WAYS:
            error = retried(call, books, how)
            if how == "group":
                inner = error.exceptions[0], error.exceptions[1].exceptions[0]
                assert all(isinstance(it, RemoteError) and it.may_have_run for it in inner), error
            else:
                kind = ProtocolError if how.startswith("disguised") else RemoteError
                assert isinstance(error, kind), (how, error)
            assert isinstance(retried(call, books, f"result: {how}"), MarshalError), how
    server.terminate(timeout=PATIENCE)
    assert books.balance() == {(MAY_HAVE_RUN, 1): 2 * len(WAYS)}


class Fragile:
    """An argument whose rebuilding calls a door that is not there."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Proxy, (self.path,)


@pytest.mark.ids("E02", "X15")
def test_an_error_while_arguments_are_rebuilt_is_about_this_call(outer, door_dir):
    server, books = outer
    with Proxy(door_dir / "outer.door", timeout=PATIENCE) as call:
        number = books.next_number()
        for _ in range(3):
            with pytest.raises(MarshalError) as caught:
                call(number, Fragile(str(door_dir / "stale.door")))
            assert not caught.value.may_have_run
        books.enter(number, DID_NOT_RUN)
    server.terminate(timeout=PATIENCE)
    assert books.balance() == {(DID_NOT_RUN, 0): 1}
