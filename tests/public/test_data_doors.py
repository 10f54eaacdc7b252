"""
Doors that speak plain data, and rules about who may call: within one user.

What keeps strangers out, and what strangers are told, is in ``security/test_other_users.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Container, Iterable
from typing import Any

import msgspec
import pytest
from support import wait_until

import doorpool
from doorpool import (
    AccessError,
    CallTimeoutError,
    Descriptor,
    Endpoint,
    Group,
    LimitError,
    MarshalError,
    ProtocolError,
    Proxy,
    RemoteError,
    RemoteTraceback,
    anyone,
    current_call,
)
from doorpool import _data as data
from doorpool import _marshal as marshal
from doorpool.door import Handle


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Order(msgspec.Struct):
    points: list[Point]


def total(order: Order, /, *more: int, scale: int = 1) -> dict[str, int]:
    return {"total": (sum(point.x for point in order.points) + sum(more)) * scale}


def test_arguments_become_what_the_annotations_say(serve, connect):
    serve(total, codec="data")
    assert connect()(Order([Point(1), Point(2)]), 3, scale=2) == {"total": 12}
    assert connect()({"points": [{"x": 5}]}) == {"total": 5}


def test_what_does_not_fit_does_not_run(serve, connect, caplog):
    ran = []

    def procedure(point: Point, how: str = "") -> None:
        ran.append(point)

    serve(procedure, codec="data")
    proxy = connect()
    for args, said in [
        (({"x": "one"},), "the argument point.x: Expected `int`, got `str`"),
        (({"x": 1}, 5), "the argument how: Expected `str`, got `int`"),
        ((), "missing a required argument: 'point'"),
        ((Point(1), "", 3), "too many positional arguments"),
    ]:
        with pytest.raises(MarshalError) as caught:
            proxy(*args)
        assert said in str(caught.value)
        assert caught.value.may_have_run is False
    assert ran == []
    assert proxy(Point(1)) is None
    assert ran == [Point(1)]
    wait_until(lambda: "the argument point.x" in caplog.text, "the server's log says it, too")


def test_a_result_that_was_not_promised_has_run(serve, connect, caplog):
    ran = []

    def procedure(value: Any) -> list[int]:
        ran.append(value)
        return value  # type: ignore[no-any-return]

    serve(procedure, codec="data")
    proxy = connect()
    for value, said in [([1, "x"], "result[1]: Expected `int`, got `str`"), (5, "result: Expected `array`")]:
        with pytest.raises(MarshalError) as caught:
            proxy(value)
        assert said in str(caught.value)
        assert caught.value.may_have_run is True
    assert ran == [[1, "x"], 5]
    assert proxy([1]) == [1]


def test_buffers_are_refused_where_data_is_spoken(serve, door_dir):
    """A client by hand: there is no pickle to which they could belong."""
    ran = []
    serve(ran.append, codec="data")
    with Handle(door_dir / "a.door") as handle:
        outcome = handle.call(b"\x92\x91\x01\x80", buffers=[memoryview(bytes(100))], timeout=20.0)
        with pytest.raises(MarshalError, match="there are no buffers where data is spoken") as caught:
            data.unpack_outcome(outcome.data, data.Arrivals([]))
        assert not caught.value.may_have_run
        handle.call(b"\x92\x91\x01\x80", timeout=20.0)
    assert ran == [1]


def test_a_result_that_is_no_data_is_named(serve, connect):
    serve(lambda: {"a": [1, threading.Lock()]}, codec="data")
    with pytest.raises(MarshalError, match=r"result\['a'\]\[1\] cannot cross a data door.*lock") as caught:
        connect()()
    assert caught.value.may_have_run is True


def test_what_is_no_data_is_not_sent(serve, connect):
    ran = []
    serve(ran.append, codec="data")
    with pytest.raises(MarshalError, match=r"args\[0\]\['f'\] cannot cross a data door") as caught:
        connect()({"f": print})
    assert caught.value.may_have_run is False
    assert ran == []


@pytest.mark.ids("B03")
def test_a_procedure_gets_the_items_that_its_annotation_says(serve, connect):
    """Whatever they come in: a dict of texts went for an ``Iterable`` of dates."""

    def kinds(days: Iterable[datetime.date]) -> list[str]:
        return [type(day).__name__ for day in days]

    serve(kinds, codec="data")
    assert connect()({"2020-01-02": 1}) == ["date"]
    with pytest.raises(MarshalError, match="days"):
        connect()({"yesterday": 1})


@pytest.mark.ids("B03")
def test_what_an_annotation_says_of_parts_is_seen_to_or_makes_no_door(serve, connect):
    """Of a door nothing can be seen to but that it is one: it says what is over there."""

    def has(numbers: Container[int]) -> bool:
        return 5 in numbers

    def ask(listener: Callable[[int], int]) -> int:
        return listener(5)

    with pytest.raises(TypeError, match="cannot be checked"):
        serve(has, codec="data")
    serve(ask, codec="data")
    assert connect()(Endpoint(lambda number: number + 1, codec="data")) == 6
    with pytest.raises(MarshalError, match="Expected `Callable`"):
        connect()([5])


def test_an_annotation_that_says_nothing_makes_no_door(serve):
    def procedure(value: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
        pass

    with pytest.raises(TypeError, match="'Nowhere' is not defined"):
        serve(procedure, codec="data")


# -- errors


class Own(Exception):
    pass


def test_errors_arrive_by_name(serve, connect):
    def procedure(name: str) -> None:
        raise {
            "value": ValueError("too big"),
            "own": Own("why"),
            "exit": SystemExit(3),
            "stop": StopIteration(5),
            "interrupt": KeyboardInterrupt(),
            "door": ProtocolError("inner", may_have_run=False),
        }[name]

    serve(procedure, codec="data")
    proxy = connect()
    with pytest.raises(ValueError, match=r"^too big$") as value:
        proxy("value")
    assert type(value.value) is ValueError
    assert value.value.__cause__ is None
    with pytest.raises(KeyError) as key:
        proxy("nothing")
    assert key.value.args == ("nothing",)
    for name, said in [
        ("own", "Own: why"), ("exit", "SystemExit: 3"), ("stop", "StopIteration: 5"),
        ("interrupt", "KeyboardInterrupt"), ("door", "doorpool._errors.ProtocolError: inner"),
    ]:  # fmt: skip
        with pytest.raises(RemoteError) as caught:
            proxy(name)
        assert str(caught.value).endswith(said)
        assert caught.value.may_have_run is True


def test_tracebacks_cross_where_the_endpoint_says_so(serve, connect):
    def procedure() -> None:
        raise ValueError("deep down")

    serve(procedure, codec="data", tracebacks=True)
    with pytest.raises(ValueError, match="deep down") as caught:
        connect()()
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    text = str(caught.value.__cause__)
    assert 'raise ValueError("deep down")' in text
    assert "_endpoint.py" not in text


# -- as all doors


@pytest.mark.ids("K1")
def test_it_is_called_like_any_other(serve, connect):
    def procedure(value: int) -> list[Any]:
        call = current_call()
        return [call.caller.pid, call.endpoint.name, call.deadline is not None, value]

    serve(procedure, codec="data", threads=2)
    proxy = connect()
    assert proxy.options(timeout=5)(1)[0] == os.getpid()
    assert [result[3] for result in proxy.map(range(20))] == list(range(20))
    assert proxy.submit(7).result()[3] == 7
    proxy.ping()
    assert proxy.info.codec == "data"
    assert proxy.info.signature == "(value: 'int') -> 'list[Any]'"


def test_limits_hold(serve, connect):
    serve(lambda n: b"x" * n, codec="data", max_request=1000, max_reply=1000)
    proxy = connect()
    assert len(proxy(500)) == 500
    with pytest.raises(LimitError) as caught:
        proxy(2000)
    assert caught.value.may_have_run is True
    with pytest.raises(LimitError) as caught:
        proxy("x" * 2000)
    assert caught.value.may_have_run is False


@pytest.mark.ids("F08")
def test_a_request_is_of_16_mib_at_most_unless_more_is_asked_for(serve, connect):
    """Read, it may take a hundred times as much."""
    endpoint = serve(len, codec="data").endpoints[0]
    assert endpoint.max_request == connect().info.max_request == 2**24
    with pytest.raises(LimitError, match="16777216") as caught:
        connect()(bytes(2**24))
    assert caught.value.may_have_run is False
    endpoint.max_request = 2**25
    assert connect()(bytes(2**24)) == 2**24
    assert Endpoint(len).max_request == 2**30
    assert Endpoint(len, codec="data", max_request=7).max_request == 7


def test_large_values_cross(serve, connect):
    serve(lambda data: data, codec="data")
    data = os.urandom(5_000_000)
    assert connect()({"deep": [data]}) == {"deep": [data]}


def test_a_time_out_says_whether_it_may_have_run(serve, connect):
    go = threading.Event()
    serve(go.wait, codec="data")
    with pytest.raises(CallTimeoutError) as caught:
        connect().options(timeout=0.1)()
    assert caught.value.may_have_run is True
    go.set()


def test_a_call_goes_on_at_the_next_server(serve, connect):
    server = serve(lambda: "first", codec="data")
    proxy = connect()
    assert proxy() == "first"
    server.close()
    serve(lambda: "second", codec="data")
    assert proxy() == "second"


@pytest.mark.ids("A21")
@pytest.mark.parametrize(("first", "second"), [("data", "pickle"), ("pickle", "data")])
def test_reopening_leads_to_no_other_codec(serve, connect, first, second):
    server = serve(lambda value: value, codec=first)
    proxy = connect()
    assert proxy(1) == 1
    server.close()
    other = serve(lambda value: value, codec=second)
    before = marshal.unpickled
    for _ in range(2):
        with pytest.raises(doorpool.DoorError) as caught:
            proxy(1)
        assert caught.value.may_have_run is False
        assert f"is a {second} door and not a {first} one" in str(caught.value.__cause__)
    assert marshal.unpickled == before
    other.close()
    serve(lambda value: value, codec=first)
    assert proxy(2) == 2


@pytest.mark.ids("D13t", "B01", "B02")
def test_a_data_door_unpickles_nothing_and_shares_nothing(serve, connect):
    server = serve(total, codec="data")
    proxy = connect()
    before = marshal.unpickled
    with contextlib.suppress(MarshalError):
        proxy(b"\x80\x05]\x94.")
    assert proxy(Order([Point(10**6)] * 100_000)) == {"total": 10**11}
    assert marshal.unpickled == before
    (served,) = server.endpoints[0]._door._channels
    assert served.channel.page is None
    assert served.channel.shelf is None
    assert all(channel.page is None and channel.shelf is None for channel in proxy._line.handle._idle)
    assert server.statistics().segments == 0


@pytest.mark.ids("B03")
@pytest.mark.parametrize(
    "request_", [b"", b"\x80\x05N.", b"\x92\x90", b"\xdd\xff\xff\xff\xff", b"\x92\x91\xd4\x01\x00\x80"]
)
def test_a_request_that_is_none_is_answered_and_the_channel_goes_on(serve, door_dir, request_):
    serve(lambda *args: list(args), codec="data")
    with Handle(door_dir / "a.door") as handle:
        for _ in range(2):
            assert handle.call(request_).data[:1] == b"A"
            assert handle.call(b"\x92\x91\x05\x80").data == b"V\x91\x05"


# -- descriptors


def holdings() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.ids("F2", "F3")
def test_descriptors_pass_both_ways(serve, connect):
    def procedure(ends: dict[str, Descriptor]) -> list[Descriptor]:
        with ends["r"] as reader:
            assert os.read(reader.fileno(), 10) == b"down"
            assert os.get_inheritable(reader.fileno()) is False
        made = Descriptor(os.memfd_create("x"))
        os.write(made.fileno(), b"up")
        current.append(made)
        return [made]

    current: list[Descriptor] = []
    serve(procedure, codec="data")
    reader, writer = os.pipe()
    with Descriptor(reader) as end:
        os.write(writer, b"down")
        os.close(writer)
        (back,) = connect()({"r": end})
        assert not end.closed
    with back, current[0]:
        assert os.get_inheritable(back.fileno()) is False
        assert back.fileno() != current[0].fileno()
        assert os.pread(back.fileno(), 10, 0) == b"up"


@pytest.mark.ids("F11")
def test_descriptors_of_what_does_not_fit_are_closed(serve, connect):
    def procedure(one: Descriptor, other: int) -> int:
        one.close()
        return other

    serve(procedure, codec="data")
    proxy = connect()
    with Descriptor(os.dup(0)) as end:
        assert proxy(end, 1) == 1
        before = holdings()
        for args in [(end, "x"), (5, end), (end, end), (end, 1, end), ([end, end], 5)] * 20:
            with pytest.raises(MarshalError):
                proxy(*args)
        wait_until(lambda: holdings() <= before, "all are closed")  # fewer, if the opening was just over


@pytest.mark.ids("F15")
def test_a_door_that_takes_no_descriptors_says_so(serve, connect):
    serve(lambda it: it, codec="data", refuse_descriptors=True)
    with Descriptor(os.dup(0)) as end, pytest.raises(LimitError):
        connect()(end)


# -- who may call


def test_who_is_on_the_list_may_call(serve, connect):
    group = Group(os.getegid())
    one = lambda caller: caller.pid == os.getpid()  # noqa: E731
    for rule in [{os.geteuid()}, [os.geteuid(), 4201], anyone, group, [4201, group], one]:
        for codec in ("data", "pickle"):
            with serve(str.upper, codec=codec, callers=rule):
                assert connect()("a") == "A"


@pytest.mark.parametrize("codec", ["data", "pickle"])
@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({4201}, "they are the uids [4201]"),
        ((), "they are nobody"),
        ([4201, Group(1)], "they are the uids [4201] and Group(1)"),
        (lambda caller: None, "they are the function <lambda>"),
    ],
    ids=["uid", "nobody", "group", "function"],
)
def test_who_is_not_on_the_list_may_not(serve, connect, caplog, rule, said, codec):
    """Our own user and root are told all of it: both identities and the rule."""
    with serve(str.upper, codec=codec, callers=rule):
        with pytest.raises(AccessError) as caught:
            connect()
        assert f"pid {os.getpid()}, uid {os.geteuid()}, gid {os.getegid()} is not among" in str(caught.value)
        assert f"this server of uid {os.geteuid()}" in str(caught.value)
        assert said in str(caught.value)
        assert caught.value.may_have_run is False
        wait_until(lambda: said in caplog.text, "the server's log says it, too")


@pytest.mark.ids("K6")
def test_a_rule_that_raises_refuses(serve, connect, caplog):
    def rule(caller: Any) -> bool:
        raise SystemExit("no")

    with serve(str.upper, codec="data", callers=rule), pytest.raises(AccessError, match="has failed"):
        connect()
    wait_until(lambda: 'raise SystemExit("no")' in caplog.text, "the server's log has its traceback")


@pytest.mark.ids("K6")
def test_a_rule_is_asked_once_for_each_channel_and_sees_who_it_is(serve, connect):
    asked = []

    def rule(caller: Any) -> bool:
        with caller.pidfd() as pidfd:
            asked.append((caller.pid, caller.uid, pidfd.fileno() >= 0))
        return True

    with serve(str.upper, codec="data", callers=rule):
        proxy = connect()
        for _ in range(3):
            proxy("a")
        assert asked == [(os.getpid(), os.geteuid(), True)]


@pytest.mark.ids("N13", "K6")
def test_a_rule_that_takes_its_time_keeps_nobody_else_waiting(serve, connect, door_dir):
    entered, go = threading.Event(), threading.Event()

    def rule(caller: Any) -> bool:
        entered.set()
        return go.wait(20)

    server = serve(str.upper, codec="data", callers=rule)
    server.attach(str.lower, door_dir / "b.door", codec="data")
    opened: list[Any] = []
    thread = threading.Thread(target=lambda: opened.append(connect(open_timeout=20)))
    thread.start()
    assert entered.wait(20)
    assert connect(door_dir / "b.door")("B") == "b"
    with pytest.raises(CallTimeoutError):
        connect(open_timeout=0.05)
    assert not opened
    go.set()
    thread.join()
    assert opened[0]("a") == "A"


@pytest.mark.ids("N13", "K6")
def test_a_rule_may_call_a_door_of_its_own_process(serve, connect, door_dir):
    def rule(caller: Any) -> bool:
        with Proxy(door_dir / "b.door") as other:
            return bool(other(caller.uid))

    server = serve(str.upper, codec="data", callers=rule)
    server.attach(lambda uid: uid == os.geteuid(), door_dir / "b.door", codec="data", callers=rule_of_one)
    assert connect()("a") == "A"


def rule_of_one(caller: Any) -> bool:
    return caller.pid == os.getpid()


@pytest.mark.ids("K6", "R3")
def test_a_door_that_goes_while_its_rule_is_asked_lets_nobody_in(serve, connect):
    entered, go = threading.Event(), threading.Event()

    def rule(caller: Any) -> bool:
        entered.set()
        return go.wait(20)

    server = serve(str.upper, codec="data", callers=rule)
    told: list[Any] = []

    def opening() -> None:
        with pytest.raises(FileNotFoundError) as caught:  # the path is looked at once more
            connect(open_timeout=20)
        told.append(caught.value)

    thread = threading.Thread(target=opening)
    thread.start()
    assert entered.wait(20)
    server.endpoints[0].revoke()
    go.set()
    thread.join()
    assert told
    assert server.statistics().channels == 0


@pytest.mark.ids("K6")
def test_knocks_that_wait_for_the_rule_are_counted(serve, door_dir, monkeypatch):
    from support import byhand

    from doorpool import _door

    monkeypatch.setattr(_door, "_MOST_PENDING", 4)
    entered, go = threading.Semaphore(0), threading.Event()

    def rule(caller: Any) -> bool:
        entered.release()
        return go.wait(20)

    server = serve(str.upper, codec="data", callers=rule)
    with contextlib.ExitStack() as stack:
        stack.callback(go.set)

        def knock() -> socket.socket:
            sock = stack.enter_context(byhand.reach(str(door_dir / "a.door")))
            return stack.enter_context(byhand.knock(sock))

        knocks = []
        for _ in range(4):
            knocks.append(knock())
            assert entered.acquire(timeout=20), "the rule has not been asked"
        refusal = byhand.refusal_in(byhand.receive(knock()).data)
        assert f"has 4 knocks of uid {os.geteuid()} to decide about, and the limit is 4" in refusal[1]
        assert not any(byhand.readable(waiting, 0) for waiting in knocks)
        go.set()
        for waiting in knocks:
            answer = byhand.receive(waiting)
            assert byhand.refusal_in(answer.data) is None
            os.close(answer.fds.pop())
    assert server.endpoints[0]._door._pending.total() == 0


# -- whom to believe


def test_a_client_believes_whom_it_is_told_to(serve, connect):
    for codec in ("data", "pickle"):
        with serve(str.upper, codec=codec):
            for rule in [
                {os.geteuid()},
                anyone,
                Group(os.getegid()),
                lambda server: server.pid == os.getpid(),
            ]:
                assert connect(server=rule)("a") == "A"
            for rule in [{4201}, [Group(1)], (), lambda server: False]:
                with pytest.raises(AccessError, match="is not believed: its server is pid"):
                    connect(server=rule)


def test_a_rule_of_a_client_that_raises_believes_nobody(serve, connect):
    serve(str.upper, codec="data")
    with pytest.raises(AccessError, match="has failed: ZeroDivisionError") as caught:
        connect(server=lambda server: 1 / 0)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("rule", ["root", 0, [True], ["root"], [-1]])
def test_what_is_no_rule_is_refused_at_once(rule):
    with pytest.raises((TypeError, ValueError), match="server"):
        Proxy("/nowhere", server=rule)


def test_a_group_is_looked_up_when_it_is_named():
    assert Group("root") == Group("root")
    assert Group("root").gid == 0
    assert repr(Group("root")) == "Group('root')"
    with pytest.raises(LookupError):
        Group("no such group")
    for odd in (None, True, 1.5):
        with pytest.raises(TypeError):
            Group(odd)  # type: ignore[arg-type]
    for odd in (-1, 2**32, 65534):
        with pytest.raises(ValueError, match="no group"):
            Group(odd)


# -- the caller's process


@pytest.mark.ids("K1", "K9")
def test_credentials_lead_to_the_process(serve, spawn_python, door_dir):
    held: list[Any] = []

    def procedure() -> None:
        held.append(current_call().caller)

    serve(procedure, codec="data")
    child = spawn_python(
        "from doorpool import Proxy\n"
        f"proxy = Proxy({str(door_dir / 'a.door')!r})\n"
        "proxy()\n"
        "ready(None)\n"
        "import signal; signal.pause()\n"
    )
    child.wait_ready()
    (caller,) = held
    with caller.pidfd() as pidfd:
        assert os.get_inheritable(pidfd.fileno()) is False
        assert not select.select([pidfd.fileno()], [], [], 0)[0]
        signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        assert select.select([pidfd.fileno()], [], [], 10)[0]
    child.wait()
    child.close()
    with pytest.raises(ProcessLookupError):
        caller.pidfd()


@pytest.mark.ids("K9")
def test_a_pid_that_may_be_anothers_by_now_leads_nowhere():
    """What the kernel said of one process, and a number that another has."""
    with Endpoint(str.upper) as endpoint, Proxy(endpoint) as proxy:
        ours = proxy.info.server
    ours.pidfd().close()
    with subprocess.Popen(["sleep", "60"]) as other:
        taken = doorpool._credentials.Credentials(other.pid, 0, 0, (), process=ours._process)
        with pytest.raises(ProcessLookupError, match="has been given to another process since"):
            taken.pidfd()
        untold = doorpool._credentials.Credentials(other.pid, 0, 0, ())
        with pytest.raises(ProcessLookupError, match="may have been given to another"):
            untold.pidfd()
        other.kill()
    with pytest.raises(ProcessLookupError, match="no number in our pid namespace"):
        doorpool._credentials.Credentials(None, 0, 0, ()).pidfd()
    assert taken == untold
    assert "process" not in repr(taken)
