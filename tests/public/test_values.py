"""
What crosses a door, both ways, between real processes.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import pathlib
import re
import socket
import sys
import threading
import types
import uuid
from collections.abc import Callable
from typing import Any

import attrs
import cloudpickle
import numpy
import pytest
from support import Child, wait_until

from doorpool import MarshalError, Proxy

#: Says of what type each argument is when it arrives, and gives it back.
ECHO = """
    from doorpool import Server, current_call

    server = Server()
    calls = []

    @server.endpoint("a.door")
    def echo(value):
        calls.append(1)
        return type(value).__module__, type(value).__qualname__, value

    @server.endpoint("apply.door")
    def apply(function, *args):
        return function(*args)

    @server.endpoint("count.door")
    def count():
        return len(calls)

    with server:
        ready()
        server.run()
"""


@pytest.fixture
def echo_server(spawn_server, door_dir) -> Child:
    return spawn_server(ECHO, cwd=door_dir)


@pytest.fixture
def echo(echo_server, connect) -> Proxy:
    return connect()


@pytest.fixture
def apply(echo_server, door_dir, connect) -> Proxy:
    return connect(door_dir / "apply.door")


Pair = collections.namedtuple("Pair", "left right")


BUILTINS: list[Any] = [
    None, True, False, 0, -1, 2**100, 1.5, float("inf"), 1 + 2j, "", "text ä \U0001f6aa \ud800",
    b"", b"bytes", bytearray(b"bytearray"), (), (1,), (1, (2, (3,))), [], [1, [2, [3]]], {},
    {"a": {"b": [1]}, 1: 2}, set(), {1, 2}, frozenset(), frozenset({1, 2}), range(1, 10, 3), slice(1, 2, 3),
    ..., NotImplemented, int,
    type(None), types.SimpleNamespace(a=1), b"x" * 100_000, "y" * 100_000, bytearray(b"z" * 100_000),
    list(range(1000)), {str(n): n for n in range(1000)},
]  # fmt: skip

LIBRARY: list[Any] = [
    decimal.Decimal("1.50"), fractions.Fraction(1, 3), datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    datetime.date(2026, 1, 2), datetime.timedelta(days=1, seconds=2), datetime.UTC,
    uuid.UUID(int=5), pathlib.PurePosixPath("/a/b"), pathlib.Path("/a"), collections.OrderedDict(b=1, a=2),
    collections.Counter("hello"), collections.deque([1, 2], maxlen=5), collections.defaultdict(list, a=[1]),
    re.compile("a+"), enum.Enum, len, str.upper, ValueError("as a value"),
]  # fmt: skip


@pytest.mark.parametrize("kinds", [BUILTINS, LIBRARY], ids=["builtins", "library"])
@pytest.mark.ids("D2", "D6")
def test_a_value_is_of_the_same_type_on_the_other_side_and_back(echo, kinds):
    for value in kinds:
        module, name, back = echo(value)
        assert (module, name) == (type(value).__module__, type(value).__qualname__)
        assert type(back) is type(value)
        assert repr(back) == repr(value)
        if not isinstance(value, BaseException):
            assert back == value


def test_singletons_stay_singletons(echo):
    for value in (None, True, ..., NotImplemented):
        assert echo(value)[2] is value


def test_views_of_memory(echo):
    for value in (memoryview(b"abc"), memoryview(bytearray(10_000)), memoryview(numpy.arange(6.0))):
        module, name, back = echo(value)
        assert (module, name) == ("builtins", "memoryview")
        assert type(back) is memoryview
        assert (back.format, back.shape, back.readonly) == (value.format, value.shape, value.readonly)
        assert back == value


def test_what_is_shared_or_goes_in_circles_within_one_call(echo):
    ring: list[Any] = [1]
    ring.append(ring)
    back = echo(ring)[2]
    assert back[1] is back
    shared = [0]
    first, second = echo((shared, shared))[2]
    assert first is second


@pytest.mark.parametrize(
    "array",
    [
        numpy.arange(10),
        numpy.zeros((0, 3)),
        numpy.float32(1.5),
        numpy.arange(100_000, dtype="f4").reshape(100, 1000),
        numpy.asfortranarray(numpy.arange(20_000).reshape(100, 200)),
        numpy.arange(20_000)[::2],
        numpy.array(["a", "bc"]),
        numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        numpy.array([{"an": "object"}, None], dtype=object),
        numpy.datetime64("2026-01-02"),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_numpy(echo, array):
    module, name, back = echo(array)
    assert (module, name) == (type(array).__module__, type(array).__qualname__)
    assert type(back) is type(array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert numpy.array_equal(back, array)
    if isinstance(back, numpy.ndarray):
        assert back.flags.writeable


@dataclasses.dataclass
class Point:
    x: int
    y: int = 5

    def norm(self) -> int:
        return self.x + self.y


@attrs.frozen
class Config:
    name: str
    more: dict[str, int] = attrs.field(factory=dict)


class Colour(enum.Enum):
    RED = 1
    BLUE = "b"


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Node:
    __slots__ = ("next", "value")

    def __init__(self, value: int, next: Node | None = None) -> None:
        self.value = value
        self.next = next


@pytest.fixture
def by_value():
    """This module's things travel by value."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def test_classes_of_a_module_that_was_registered_travel_by_value(by_value, echo, apply):
    for value in (Point(1), Config("a", {"b": 1}), Colour.RED, Flags.A | Flags.B, Pair(1, 2)):
        _, name, back = echo(value)
        assert name == type(value).__qualname__
        assert type(back) is type(value), "come home, it is the class that it was"
        assert back == value
    node = echo(Node(1, Node(2)))[2]
    assert (node.value, node.next.value) == (1, 2)
    assert isinstance(node, Node)
    assert apply(Point.norm, Point(3, 4)) == 7
    assert apply(lambda point: point.norm() + 1, Point(3, 4)) == 8


@pytest.mark.ids("E10")
def test_what_the_receiver_cannot_import_is_said_in_words(echo, monkeypatch):
    module = types.ModuleType("only_here")
    exec("class Point: pass", vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    with pytest.raises(MarshalError) as caught:
        echo(module.Point())
    text = str(caught.value)
    assert caught.value.may_have_run is False
    assert "cannot import 'Point' from 'only_here'" in text
    assert "register_pickle_by_value" in text
    assert echo(1)[2] == 1


def test_functions_that_have_no_name_to_be_found_by(apply):
    factor = 7

    def closure(number: int) -> int:
        return number * factor

    def recursive(number: int) -> int:
        return 1 if number < 2 else number * recursive(number - 1)

    def uses_a_module(text: str) -> Any:
        return re.findall("a+", text)

    assert apply(lambda a, b: a - b, 5, 3) == 2
    assert apply(closure, 6) == 42
    assert apply(recursive, 5) == 120
    assert apply(uses_a_module, "aabaa") == ["aa", "aa"]
    assert apply(functools.partial(closure), 2) == 14
    made: Callable[[int], int] = apply(lambda step: lambda value: value + step, 10)
    assert made(5) == 15


def test_a_local_class_comes_home_as_itself(echo):
    class Local:
        def __init__(self) -> None:
            self.value = 4

        def double(self) -> int:
            return 2 * self.value

    back = echo(Local())[2]
    assert isinstance(back, Local)
    assert back.double() == 8


CLIENT_OF_ITS_OWN = """
    from doorpool import Proxy

    class Config:
        def __init__(self, value):
            self.value = value
        def who(self):
            return "the client's", self.value

    class Mine(Exception):
        pass

    def function(value):
        return "the client's function", value

    with Proxy("a.door") as look:
        back, same = look(Config(5), function)
        answers = [back.who(), type(back) is Config, same]
    with Proxy("fail.door") as fail:
        try:
            fail(Mine)
        except Mine as error:
            answers.append(("caught", error.args))
    with Proxy("theirs.door") as theirs:
        other = theirs()
        answers += [other.who(), type(other) is Config, isinstance(other, Config)]
    result(answers)
"""


def test_classes_of_two_scripts_are_two_classes_of_one_name(spawn_server, run_python, door_dir):
    spawn_server(
        """
        from doorpool import Server

        server = Server()

        class Config:
            def who(self):
                return "the server's",

        @server.endpoint("a.door")
        def look(config, function):
            assert type(config) is not Config
            assert config.who() == ("the client's", 5)
            return config, function(3)

        @server.endpoint("fail.door")
        def fail(kind):
            raise kind("theirs")

        @server.endpoint("theirs.door")
        def theirs():
            return Config()

        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    answers = run_python(CLIENT_OF_ITS_OWN, cwd=door_dir).value
    assert answers == [
        ("the client's", 5),
        True,
        ("the client's function", 3),
        ("caught", ("theirs",)),
        ("the server's",),
        False,
        False,
    ]


def test_one_script_in_both_roles_has_one_class(run_python, door_dir):
    script = door_dir / "both.py"
    script.write_text(
        """
import os, subprocess, sys, threading, time
from doorpool import Proxy, Server

class Config:
    pass

class Failure(Exception):
    def __init__(self, why, code):
        super().__init__(why)
        self.code = code

def function():
    return Config

if len(sys.argv) > 1:
    server = Server()

    @server.endpoint("a.door")
    def look(config, kind):
        assert type(config) is Config and kind is Config and function() is Config
        if config.fail:
            raise Failure("as asked", 8)
        return config, function

    def announce():
        while server.statistics().threads < 3:  # two, and the one that runs it, which hears signals
            time.sleep(0.001)
        print("ready", flush=True)

    threading.Thread(target=announce).start()
    server.run()
else:
    with subprocess.Popen([sys.executable, __file__, "server"], stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\\n"
        with Proxy("a.door") as look:
            config = Config()
            config.fail = False
            back, same = look(config, Config)
            assert type(back) is Config and same is function
            config.fail = True
            try:
                look(config, Config)
            except Failure as error:
                print("failed", error.code, error)
        child.terminate()
"""
    )
    done = run_python(
        """
        import subprocess, sys
        result(subprocess.run([sys.executable, "both.py"], capture_output=True, text=True))
        """,
        cwd=door_dir,
    )
    assert done.value.stderr == ""
    assert done.value.stdout == "failed 8 as asked\n"


def _lock() -> Any:
    return threading.Lock()


@pytest.mark.parametrize(
    ("args", "kwargs", "path"),
    [
        ((1, {"lock": _lock()}), {}, "args[1]['lock']"),
        (([[_lock()]],), {}, "args[0][0][0]"),
        ((), {"config": Point(_lock())}, "kwargs['config'].x"),
        ((types.SimpleNamespace(inner=types.SimpleNamespace(lock=_lock())),), {}, "args[0].inner.lock"),
    ],
    ids=["dict", "lists", "dataclass", "attributes"],
)
@pytest.mark.ids("E10", "X14")
def test_an_argument_that_cannot_cross_names_its_path_and_nothing_is_sent(serve, connect, args, kwargs, path):
    calls = []
    server = serve(lambda *args, **kwargs: calls.append(1))
    proxy = connect()
    with pytest.raises(MarshalError) as caught:
        proxy(*args, **kwargs)
    assert path in str(caught.value)
    assert caught.value.may_have_run is False
    assert isinstance(caught.value, TypeError)
    proxy()
    assert calls == [1]
    wait_until(lambda: server.statistics().served == 1)
    assert server.statistics().errors == 0
    assert server.statistics().channels == 1


@pytest.mark.ids("E10", "X14")
def test_a_result_that_cannot_cross_says_that_the_procedure_ran_and_all_goes_on(serve, connect):
    calls = []

    def procedure(how: str) -> Any:
        calls.append(how)
        return {"x": [_lock()]} if how == "lock" else how

    server = serve(procedure, server={"max_threads": 1})
    proxy = connect()
    for _ in range(5):
        with pytest.raises(MarshalError) as caught:
            proxy("lock")
        assert caught.value.may_have_run is True
        assert "result['x'][0]" in str(caught.value)
        assert proxy("fine") == "fine"
    assert calls == ["lock", "fine"] * 5
    assert server.statistics().channels == 1
    assert server.statistics().threads == 1


class Exits:
    """Ends its process when it is rebuilt, or pickled."""

    def __init__(self, when: str) -> None:
        self.when = when

    def __reduce__(self) -> Any:
        if self.when == "pickled":
            raise SystemExit(7)
        return _exit, ()


def _exit() -> None:
    raise SystemExit(8)


@pytest.mark.ids("E10", "X14", "X12")
def test_arguments_and_results_that_exit_end_no_server(serve, connect):
    calls = []

    def procedure(value: Any) -> Any:
        calls.append(value)
        return Exits("pickled") if value == "exit" else value

    server = serve(procedure, server={"max_threads": 1})
    proxy = connect()
    for _ in range(3):
        with pytest.raises(MarshalError, match="arguments cannot cross the door: SystemExit: 8") as caught:
            proxy(Exits("rebuilt"))
        assert caught.value.may_have_run is False
        with pytest.raises(MarshalError, match="the result cannot cross the door: SystemExit: 7") as caught:
            proxy("exit")
        assert caught.value.may_have_run is True
    assert calls == ["exit"] * 3
    assert proxy("fine") == "fine"
    assert server.statistics().threads == 1


@pytest.mark.ids("E10")
@pytest.mark.parametrize("how", ["fails", "exits"])
def test_a_result_that_cannot_be_rebuilt_by_the_caller(serve, connect, how):
    """Nor does it end the caller."""

    class Fails:
        def __reduce__(self) -> Any:
            return (int, ("no number",)) if how == "fails" else (sys.exit, (7,))

    serve(lambda how: Fails() if how else how)
    proxy = connect()
    with pytest.raises(MarshalError, match="the result cannot be rebuilt") as caught:
        proxy(True)
    assert caught.value.may_have_run is True
    assert proxy(False) is False


@pytest.mark.ids("D2", "D6", "D13")
def test_large_values_both_ways(echo):
    for size in (2**16 - 1, 2**20, 5 * 2**20 + 1):
        blob = bytes(range(256)) * (size // 256 + 1)
        assert echo(blob)[2] == blob
    array = numpy.random.default_rng(1).random(1_000_000)
    assert numpy.array_equal(echo(array)[2], array)


@pytest.mark.ids("H07", "D2", "D6")
@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_values_cross_whole_by_sockets_with_the_smallest_buffers(serve, connect, codec):
    """Such a socket takes no packet that is larger, and the default of the system may be small."""
    server = serve(lambda value: value, codec=codec)
    proxy = connect(timeout=10)
    assert proxy(b"first") == b"first"
    ends = [proxy._line.handle._idle[-1], *(it.channel for it in server.endpoints[0]._door._channels)]
    assert len(ends) == 2
    for end in ends:
        end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        assert end.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 5_000
    for size in (4_000, 5_000, 2**16 - 200, 2**16, 2**20, 5 * 2**20 + 1):
        blob = bytes(range(256)) * (size // 256 + 1)
        assert proxy(blob) == blob
    assert server.statistics().channels == 1
    assert proxy._line.handle._idle[-1] is ends[0], "on the channel that there was"


@pytest.mark.ids("D1")
def test_what_arrives_is_the_receivers_own(serve, connect):
    serve(lambda array: (array.__setitem__(0, 99), array)[1])
    mine = numpy.zeros(10_000)
    back = connect()(mine)
    assert (mine[0], back[0]) == (0, 99)
    back[1] = 5
    assert mine[1] == 0


def test_classes_of_an_interpreter_that_runs_no_script(run_python, door_dir):
    """An interpreter started with ``-c`` has no script: what it defines goes by value."""
    done = run_python(
        """
        import subprocess, sys
        from doorpool import Server

        server = Server()
        server.attach(lambda value: (type(value).__name__, value), "a.door")
        client = "\\n".join([
            "from doorpool import Proxy",
            "class Thing:",
            "    value = 3",
            "with Proxy('a.door') as proxy:",
            "    name, back = proxy(Thing())",
            "    print(name, back.value, type(back) is Thing)",
        ])
        with server:
            done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True)
            result((done.stdout, done.stderr))
        """,
        cwd=door_dir,
    )
    assert done.value == ("Thing 3 True\n", "")
