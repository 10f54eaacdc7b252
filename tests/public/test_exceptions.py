"""
What leaves a procedure: exceptions as themselves over a real door, and what cannot be.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import threading
import traceback
from typing import Any

import attrs
import pytest
from support import wait_until

from doorpool import (
    BrokenDoorError,
    ClosedError,
    DoorError,
    MarshalError,
    RemoteError,
    RemoteTraceback,
    Server,
    current_call,
)


class QuotaError(Exception):
    """Its ``__init__`` takes other things than its ``args``: this breaks ProcessPoolExecutor."""

    def __init__(self, user: str, limit: int) -> None:
        super().__init__(f"{user} is over {limit}")
        self.user = user
        self.limit = limit


class KeywordError(ValueError):
    def __init__(self, *, code: int) -> None:
        super().__init__(code)
        self.code = code


class DoublingError(RuntimeError):
    """Would double its text, were ``cls(*args)`` called."""

    def __init__(self, text: str) -> None:
        super().__init__(f"<{text}>")


@attrs.define(auto_exc=True)
class AttrsError(Exception):
    code: int
    why: str


class SlotsError(Exception):
    __slots__ = ("extra",)

    def __init__(self, extra: int) -> None:
        super().__init__("slots")
        self.extra = extra


def _with_notes() -> Exception:
    error = LookupError("noted")
    error.add_note("a note")
    error.add_note("another")
    return error


def _unicode_error() -> Exception:
    try:
        "ä".encode("ascii")
    except UnicodeEncodeError as error:
        return error
    raise AssertionError


def _json_error() -> Exception:
    try:
        json.loads("{]")
    except json.JSONDecodeError as error:
        return error
    raise AssertionError


KINDS = {
    "ValueError": (ValueError("no", 5), {}),
    "KeyError": (KeyError("key"), {}),
    "OSError": (
        FileNotFoundError(2, "No such file", "/none"),
        {"errno": 2, "filename": "/none", "strerror": "No such file"},
    ),
    "QuotaError": (QuotaError("ann", 3), {"user": "ann", "limit": 3}),
    "KeywordError": (KeywordError(code=7), {"code": 7}),
    "DoublingError": (DoublingError("once"), {}),
    "attrs": (AttrsError(4, "because"), {"code": 4, "why": "because"}),
    "slots": (SlotsError(9), {"extra": 9}),
    "notes": (_with_notes(), {"__notes__": ["a note", "another"]}),
    "unicode": (_unicode_error(), {"start": 0, "end": 1, "object": "ä", "encoding": "ascii"}),
    "json": (_json_error(), {"pos": 1, "lineno": 1, "doc": "{]"}),
    "subprocess": (subprocess.CalledProcessError(3, ["ls"], b"out"), {"returncode": 3, "cmd": ["ls"]}),
    "stop": (StopIteration(5), {"value": 5}),
    "import": (ImportError("no", name="nomodule"), {"name": "nomodule"}),
    "timeout": (TimeoutError("late"), {}),
}


@pytest.mark.parametrize(("error", "fields"), KINDS.values(), ids=KINDS)
def test_an_exception_arrives_as_itself(serve, connect, error, fields):
    def fail() -> None:
        raise error

    serve(fail)
    with pytest.raises(type(error)) as caught:
        connect()()
    arrived = caught.value
    assert type(arrived) is type(error)
    assert arrived is not error
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert {name: getattr(arrived, name) for name in fields} == fields
    remote = arrived.__cause__
    assert isinstance(remote, RemoteTraceback)
    assert "in fail" in remote.text
    assert "raise error" in remote.text


def test_groups_arrive_with_what_is_in_them(serve, connect):
    def fail() -> None:
        raise ExceptionGroup("both", [QuotaError("ann", 1), ExceptionGroup("inner", [KeyError("k")])])

    serve(fail)
    with pytest.raises(ExceptionGroup) as caught:
        connect()()
    first, inner = caught.value.exceptions
    assert (type(first), first.limit) == (QuotaError, 1)
    assert inner.exceptions[0].args == ("k",)


def test_causes_and_contexts_stay_what_they_were(serve, connect):
    def fail() -> None:
        try:
            raise QuotaError("ann", 1)
        except QuotaError as error:
            raise ValueError("outer") from error

    serve(fail)
    with pytest.raises(ValueError, match=r"^outer$") as caught:
        connect()()
    cause = caught.value.__cause__
    assert isinstance(cause, QuotaError)
    assert isinstance(cause.__cause__, RemoteTraceback)


def test_the_remote_traceback_is_printed(spawn_server, run_python, door_dir):
    spawn_server(
        """
        from doorpool import Server

        server = Server()

        def inner_of_the_server(value):
            return 1 / value

        @server.endpoint("a.door")
        def divide(value):
            return inner_of_the_server(value)

        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    done = run_python(
        """
        from doorpool import Proxy
        with Proxy("a.door") as divide:
            divide(0)
        """,
        cwd=door_dir,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stderr
    assert "return 1 / value" in lines
    assert "inner_of_the_server" in lines
    assert lines.index("inner_of_the_server") < lines.index("divide(0)")
    assert lines.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "direct cause" in lines


def test_the_remote_traceback_begins_with_the_procedure(serve, connect):
    def fail() -> None:
        raise LookupError("x")

    serve(fail)
    with pytest.raises(LookupError) as caught:
        connect()()
    text = "".join(traceback.format_exception(caught.value))
    remote = caught.value.__cause__
    assert isinstance(remote, RemoteTraceback)
    assert "_endpoint.py" not in remote.text
    assert remote.text in text


SERVER = """
    import asyncio, signal, sys
    from doorpool import Server

    server = Server()

    @server.endpoint("a.door")
    def leave(how):
        if how == "exit":
            sys.exit(3)
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "generator":
            raise GeneratorExit
        if how == "cancelled":
            raise asyncio.CancelledError("gone")
        if how == "group":
            raise BaseExceptionGroup("all", [SystemExit(1), ValueError(2)])
        return how

    @server.endpoint("prepared.door")
    def is_prepared():
        return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

    with server:
        ready()
        server.run()
    result("ended well")
"""


@pytest.mark.ids("E10", "X12")
def test_what_is_no_exception_ends_neither_client_nor_server(spawn_server, door_dir, connect):
    child = spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    kinds = {
        "exit": "SystemExit",
        "interrupt": "KeyboardInterrupt",
        "generator": "GeneratorExit",
        "cancelled": "CancelledError",
        "group": "BaseExceptionGroup",
    }
    for how, kind in kinds.items():
        for _ in range(3):  # more often than there are threads at first
            with pytest.raises(RemoteError) as caught:
                proxy(how)
            assert caught.value.may_have_run is True
            assert caught.value.type_name.endswith(kind)
            assert kind in str(caught.value)
        assert proxy("still here") == "still here"
    wait_until(connect(door_dir / "prepared.door"), "run() has set its handlers")
    child.terminate()
    assert child.finish().value == "ended well"


@pytest.mark.parametrize(
    "error",
    [BrokenDoorError("theirs", may_have_run=False), ClosedError("theirs"), MarshalError("theirs")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.ids("L14")
def test_a_door_error_that_leaves_a_procedure_is_a_remote_error(serve, connect, error):
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error

    serve(fail)
    with pytest.raises(RemoteError) as caught:
        connect()()
    assert caught.value.may_have_run is True
    assert type(error).__name__ in caught.value.type_name
    assert "theirs" in str(caught.value)
    assert "in fail" in "".join(traceback.format_exception(caught.value))
    assert calls == [1], "it is not run again by reopening"


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class ReduceFailsError(Exception):
    def __reduce__(self) -> Any:
        raise SystemExit("in __reduce__")


class StrFailsError(Exception):
    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.file = open("/dev/null")  # noqa: SIM115
        self.file.close()

    def __str__(self) -> str:
        raise KeyboardInterrupt("in __str__")


@pytest.mark.parametrize("kind", [UnpicklableError, ReduceFailsError, StrFailsError])
@pytest.mark.ids("E10", "X14")
def test_an_exception_that_cannot_cross_is_a_remote_error(serve, connect, kind):
    def fail(how: str) -> str:
        if how == "fail":
            raise kind
        return how

    server = serve(fail, server={"max_threads": 2})
    proxy = connect()
    for _ in range(3):
        with pytest.raises((RemoteError, kind)) as caught:
            proxy("fail")
        assert kind.__name__ in (getattr(caught.value, "type_name", "") or kind.__name__)
        assert proxy("fine") == "fine"
    assert server.statistics().channels == 1
    wait_until(lambda: server.statistics().errors == 3)


def test_wrong_arguments_are_a_type_error_of_the_procedure(serve, connect):
    def add(a: int, b: int) -> int:
        return a + b

    serve(add)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'b'") as caught:
        connect()(1)
    assert not isinstance(caught.value, DoorError)


def test_one_error_decides_by_may_have_run():
    kinds = DoorError.__subclasses__()
    assert {kind.__name__ for kind in kinds} == {
        "ClosedError", "RevokedError", "BrokenDoorError", "CallTimeoutError", "BusyError", "LimitError",
        "MarshalError", "AccessError", "NotADoorError", "ProtocolError", "RemoteError",
    }  # fmt: skip
    for kind in kinds:
        assert isinstance(kind("x").may_have_run, bool)
        if issubclass(kind, OSError):
            error = kind("no such door", filename="/a.door")
            assert error.errno
            assert error.filename == "/a.door"
            assert str(error) == "no such door"


@pytest.mark.ids("X14")
def test_the_caller_is_answered_when_the_procedure_ends_its_own_server(door_dir, connect):
    server = Server()

    def fail() -> None:
        current_call().endpoint.server.close()
        raise QuotaError("ann", 1)

    server.attach(fail, door_dir / "a.door")
    with server, pytest.raises(QuotaError):
        connect()()
    assert server.closed


def test_an_exception_class_of_the_servers_script(spawn_server, door_dir, connect):
    spawn_server(
        """
        from doorpool import Server

        server = Server()

        class OfTheScript(Exception):
            def __init__(self, user, limit):
                super().__init__(f"{user}: {limit}")
                self.limit = limit

        @server.endpoint("a.door")
        def fail():
            raise OfTheScript("bob", 6)

        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    with pytest.raises(Exception, match="bob: 6") as caught:
        connect()()
    assert type(caught.value).__name__ == "OfTheScript"
    assert caught.value.limit == 6


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


@pytest.mark.ids("X14", "E10")
def test_an_exception_that_lets_nothing_be_set_arrives_and_the_server_goes_on(serve, connect):
    def fail() -> None:
        raise Frozen(3)

    serve(fail, server={"max_threads": 1})
    proxy = connect(timeout=10)
    for _ in range(3):
        with pytest.raises(Frozen) as caught:
            proxy()
        assert caught.value.code == 3
