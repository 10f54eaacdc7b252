"""
What crosses data doors with a descriptor: as a ``Descriptor``, or as the annotation says.

What crosses pickle doors, as its own kind, is in ``test_passing.py``; doors are in ``test_doors.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import io
import os
import socket
import tempfile
import types
import typing
from multiprocessing.connection import Connection, Pipe
from typing import Any

import pytest
from support import wait_until
from support.passed import KINDS, descriptors

from doorpool import (
    BusyError,
    Descriptor,
    DoorError,
    Endpoint,
    LimitError,
    MarshalError,
    ProtocolError,
    Proxy,
    take,
)
from doorpool import _doors as doors


def taking(hint: Any, body: Any) -> Any:
    """A procedure of one parameter, annotated so."""

    def procedure(value):
        return body(value)

    procedure.__annotations__ = {"value": hint}
    return procedure


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors are of one file; what is shared besides is ``test_passing``'s to prove."""
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def flags(number: int) -> int:
    return fcntl.fcntl(number, fcntl.F_GETFL)


# -- of every kind


@pytest.mark.ids("F19")
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_has_a_descriptor_arrives_as_one_both_ways(kind, serve, connect, tmp_path):
    came: list[tuple[str, bool, bool]] = []

    def procedure(values):
        value = values["here"][0]
        came.append((type(value).__name__, value.closed, os.get_inheritable(value.fileno())))
        return [value]

    serve(procedure, codec="data")
    with contextlib.ExitStack() as stack:
        value = KINDS[kind](tmp_path, stack)
        if hasattr(value, "rollover"):
            value.rollover()
        before = flags(value.fileno())
        with pytest.warns(ResourceWarning):  # the procedure leaves its own open
            (back,) = connect()({"here": [value]})
        with back:
            assert type(back) is Descriptor
            assert not os.get_inheritable(back.fileno())
            assert same_file(back.fileno(), value.fileno())
            assert flags(value.fileno()) == before
        assert value.fileno() >= 0
    assert came == [("Descriptor", False, False)]


@pytest.mark.parametrize(
    "hint",
    [Connection, io.TextIOWrapper, io.BufferedReader, tempfile.SpooledTemporaryFile],
    ids=lambda it: it.__name__,
)
def test_no_annotation_makes_more_of_it(serve, connect, tmp_path, hint):
    """S8: these would unpickle, decode, or delete what the other side says."""
    serve(taking(hint, repr), codec="data")
    ours, theirs = Pipe()
    with ours, theirs, open(tmp_path / "a", "w+") as text, open(tmp_path / "a", "rb") as binary:
        for value in (ours, text, binary):
            with pytest.raises(MarshalError, match=f"Expected `{hint.__name__}`, got `Descriptor`") as caught:
                connect()(value)
            assert caught.value.may_have_run is False


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda one: one.makefile("rb"), "BufferedReader"),
        (lambda one: type("Sub", (socket.socket,), {})(fileno=os.dup(one.fileno())), "Sub"),
    ],
    ids=["makefile", "subclass"],
)
def test_what_is_more_than_its_descriptor_is_refused_by_path_and_type(serve, connect, make, said):
    serve(repr, codec="data")
    one, other = socket.socketpair()
    with one, other, make(one) as value:
        with pytest.raises(MarshalError, match=rf"args\[0\]\[1\] cannot cross a data door.*{said}") as caught:
            connect()([1, value])
        assert caught.value.may_have_run is False


def test_a_closed_one_is_refused(serve, connect):
    serve(repr, codec="data")
    sock = socket.socket()
    sock.close()
    with pytest.raises(MarshalError, match=r"args\[0\] cannot cross a data door.*closed"):
        connect()(sock)


# -- what an annotation asks for


SOCKETS = [
    (socket.AF_UNIX, socket.SOCK_STREAM),
    (socket.AF_UNIX, socket.SOCK_DGRAM),
    (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    (socket.AF_INET, socket.SOCK_STREAM),
    (socket.AF_INET, socket.SOCK_DGRAM),
    (socket.AF_NETLINK, socket.SOCK_RAW),
]


@pytest.mark.ids("F19")
@pytest.mark.parametrize("default", [None, 0.0, 5.0])
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize(("family", "kind"), SOCKETS)
def test_a_socket_is_what_the_kernel_says_and_keeps_its_flags(serve, connect, family, kind, blocks, default):
    seen: list[Any] = []

    def look(sock: socket.socket) -> None:
        with sock:
            it = type(sock), sock.family, sock.type, sock.proto, flags(sock.fileno()), sock.gettimeout()
            seen.append((*it, os.get_inheritable(sock.fileno())))

    serve(taking(socket.socket, look), codec="data")
    proxy = connect()
    with socket.socket(family, kind) as sock:
        sock.setblocking(blocks)
        proto = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
        before = flags(sock.fileno())
        socket.setdefaulttimeout(default)
        try:
            proxy(sock)
        finally:
            socket.setdefaulttimeout(None)
        assert flags(sock.fileno()) == before
        assert sock.gettimeout() == (None if blocks else 0)
    timeout = None if blocks and default is None else 0
    assert seen == [(socket.socket, family, kind, proto, before, timeout, False)]


def test_a_socket_is_made_without_asking_it_anything_that_might_wait(serve, connect, monkeypatch):
    """What CPython asks a socket when it makes one, its address, it asks one of our own."""
    made: list[int] = []

    def make(*args: Any, fileno: int | None = None) -> socket.socket:
        if fileno is not None:
            made.append(os.fstat(fileno).st_ino)
        return socket.socket(*args, fileno=fileno)

    one, other = socket.socketpair()
    serve(taking(socket.socket, lambda sock: sock.close()), codec="data")
    proxy = connect()
    monkeypatch.setattr("doorpool._kinds.socket", types.SimpleNamespace(**{**vars(socket), "socket": make}))
    with one, other:
        proxy(one)
        assert len(made) == 1
        assert made != [os.fstat(one.fileno()).st_ino]


def test_a_socket_for_which_there_is_no_room_is_refused_and_nothing_is_left(serve, connect, monkeypatch):
    ran: list[Any] = []
    serve(taking(socket.socket, ran.append), codec="data")
    proxy = connect()
    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EBUSY, "not now")

    one, other = socket.socketpair()
    with one, other:
        monkeypatch.setattr(os, "dup2", fail)
        with pytest.raises(MarshalError, match="not now") as caught:
            proxy(one)
        assert not caught.value.may_have_run
        monkeypatch.undo()
    assert ran == []
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.ids("F19")
@pytest.mark.parametrize(
    ("how", "mode"),
    [
        (os.O_RDONLY, "rb"),
        (os.O_WRONLY, "wb"),
        (os.O_RDWR, "rb+"),
        (os.O_WRONLY | os.O_APPEND, "wb"),
        (os.O_RDWR | os.O_NONBLOCK, "rb+"),
    ],
)
def test_a_file_is_raw_binary_and_named_by_its_number(serve, connect, tmp_path, how, mode):
    seen: list[Any] = []

    def look(file: io.FileIO) -> None:
        with file:
            seen.append(
                (type(file), file.mode, file.name == file.fileno(), file.tell(), flags(file.fileno()))
            )

    serve(taking(io.FileIO, look), codec="data")
    (tmp_path / "a").write_bytes(b"contents")
    with Descriptor(os.open(tmp_path / "a", how)) as descriptor:
        os.lseek(descriptor.fileno(), 3, os.SEEK_SET)
        before = flags(descriptor.fileno())
        connect()(descriptor)
        assert os.lseek(descriptor.fileno(), 0, os.SEEK_CUR) == 3
        assert flags(descriptor.fileno()) == before
    assert seen == [(io.FileIO, mode, True, 3, before)]
    assert (tmp_path / "a").read_bytes() == b"contents"


@dataclasses.dataclass
class Job:
    source: io.FileIO
    sinks: list[socket.socket | None]


def copy(job: Job, *more: io.FileIO, log: Descriptor) -> list[str]:
    with job.source, log, contextlib.ExitStack() as stack:
        for file in more:
            stack.enter_context(file)
        for sink in job.sinks:
            if sink is not None:
                with sink:
                    sink.sendall(job.source.read())
        return [type(each).__name__ for each in (job.source, *job.sinks, *more, log)]


def test_annotations_are_followed_wherever_they_stand(serve, connect, tmp_path):
    serve(copy, codec="data")
    (tmp_path / "a").write_bytes(b"contents")
    one, other = socket.socketpair()
    with one, other, open(tmp_path / "a", "rb") as source, open(tmp_path / "b", "w") as log:
        names = connect()({"source": source, "sinks": [None, one]}, log, log=log)
        assert names == ["FileIO", "NoneType", "socket", "FileIO", "Descriptor"]
        assert other.recv(100) == b"contents"


def test_what_is_none_does_not_fit(serve, connect, tmp_path):
    serve(copy, codec="data")
    before = descriptors()
    proxy = connect()
    one, other = socket.socketpair()
    with one, other, Descriptor(os.open(tmp_path, os.O_RDONLY)) as folder:
        for job, said in [
            ({"source": one, "sinks": [folder]}, r"\.sinks\[0\]: Expected `socket`.*none"),
            ({"source": folder, "sinks": []}, "directory"),
            ({"source": one, "sinks": [one, 5]}, r"\.sinks\[1\]: Expected"),
        ]:
            with pytest.raises(MarshalError, match=f"the argument job.*?{said}") as caught:
                proxy(job, log=one)
            assert caught.value.may_have_run is False
        with pytest.raises(MarshalError, match="the argument log: Expected `Descriptor`, got `int`"):
            proxy({"source": one, "sinks": [one]}, one, log=5)  # when all others are made already
    proxy.close()
    wait_until(lambda: descriptors() <= before + 2)


def test_a_result_is_what_the_annotation_promises_and_arrives_as_a_descriptor(
    serve, connect, tmp_path, door_dir
):
    (tmp_path / "a").write_bytes(b"contents")
    for number, hint in enumerate([io.BufferedReader, typing.BinaryIO, typing.IO[bytes], Any]):

        def lend() -> Any:
            return take(open(tmp_path / "a", "rb"))

        lend.__annotations__ = {"return": hint}
        serve(lend, f"{number}.door", codec="data")
        with connect(door_dir / f"{number}.door")() as file:
            assert type(file) is Descriptor
            assert os.read(file.fileno(), 100) == b"contents"


# -- moved


@pytest.mark.ids("F2")
def test_what_is_taken_is_moved_both_ways(serve, connect, tmp_path):
    returned: list[Any] = []

    def procedure(value: io.FileIO) -> Any:
        with value:
            value.write(b"contents")
        returned.append(open(tmp_path / "a", "rb"))  # noqa: SIM115
        return {"file": take(returned[0])}

    serve(procedure, codec="data")
    file = open(tmp_path / "a", "wb")  # noqa: SIM115
    with connect()(take(file))["file"] as back:
        assert file.closed
        assert os.read(back.fileno(), 100) == b"contents"
    wait_until(lambda: returned[0].closed)


def test_nothing_has_moved_when_something_cannot_cross(serve, connect, tmp_path):
    files: list[Any] = []

    def procedure(value: Any = None) -> Any:
        files.append(open(tmp_path / "a", "wb"))  # noqa: SIM115
        return [take(files[0]), object()]

    serve(procedure, codec="data")
    with open(tmp_path / "a", "wb") as file:
        with pytest.raises(MarshalError, match=r"args\[0\]\[1\] cannot cross"):
            connect()([take(file), object()])
        assert not file.closed
    with pytest.raises(MarshalError, match=r"result\[1\] cannot cross"):
        connect()()
    assert not files[0].closed
    files[0].close()


def test_what_was_moved_does_not_cross_again(serve, connect, tmp_path):
    serve(taking(io.FileIO, lambda file: file.close()), codec="data")
    taken = take(open(tmp_path / "a", "wb"))  # noqa: SIM115
    connect()(taken)
    with pytest.raises(MarshalError, match="has crossed a door already"):
        connect()(taken)


def test_a_proxy_that_is_taken_arrives_as_a_proxy(serve, connect):
    serve(taking(Proxy, lambda door: (door(5), door.close())[0]), codec="data")
    with Endpoint(abs, codec="data") as endpoint:
        proxy = Proxy(endpoint)
        assert connect()(take(proxy)) == 5
        assert proxy.closed
    with Endpoint(abs) as endpoint, Proxy(endpoint) as proxy:
        with pytest.raises(MarshalError, match="speaks pickle"):
            connect()(take(proxy))
        assert not proxy.closed


# -- limits, and who has what


def test_what_was_marshalled_is_what_is_sent(serve, connect):
    """The number may be another file's by then: the caller holds a duplicate while the call lasts."""

    def procedure(value: Descriptor) -> str:
        with value:
            return os.readlink(f"/proc/self/fd/{value.fileno()}")

    serve(procedure, codec="data")
    proxy = connect()
    line = proxy._line
    exchange = line._exchange
    with Descriptor(os.memfd_create("meant")) as descriptor:

        def swap(*args: Any) -> Any:
            with Descriptor(os.memfd_create("other")) as other:
                os.dup2(other.fileno(), descriptor.fileno(), inheritable=False)
            return exchange(*args)

        line._exchange = swap  # type: ignore[method-assign]
        assert "meant" in proxy(descriptor)
        del line._exchange


def test_limits_and_refusals_are_those_of_descriptors(serve, connect, door_dir):
    serve(repr, codec="data", max_descriptors=1)
    serve(repr, "b.door", codec="data", refuse_descriptors=True)
    one, other = socket.socketpair()
    with one, other:
        with pytest.raises(LimitError, match="descriptors"):
            connect()([one, other])
        with pytest.raises(DoorError, match="descriptor") as caught:
            connect(door_dir / "b.door")(one)
        assert caught.value.may_have_run is False


def test_no_descriptor_for_a_duplicate(serve, connect, monkeypatch):
    with Descriptor(os.memfd_create("x")) as held:
        serve(lambda value=None: held, codec="data")
        proxy = connect()
        proxy.ping()
        real = os.dup

        def fail(number: int) -> int:
            if number == held.fileno():
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return real(number)

        monkeypatch.setattr(os, "dup", fail)
        with pytest.raises(BusyError, match="the result cannot be sent: no free descriptor") as busy:
            proxy()
        assert busy.value.may_have_run is True
        with pytest.raises(OSError, match="no free descriptor") as caught:
            proxy(held)
        assert caught.value.errno == errno.EMFILE
        monkeypatch.undo()
        proxy().close()


# -- doors that speak pickle


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whoever sends a door not look at what it speaks."""
    monkeypatch.setattr(doors, "check_crossing", lambda door, to: None)


@pytest.mark.ids("F14")
@pytest.mark.parametrize("kind", [Endpoint, Proxy])
def test_a_pickle_door_is_refused_by_its_receiver_too(serve, connect, careless, kind):
    """S17: pickle is never reached from data, whoever was careless; not even within one user."""
    ran: list[Any] = []
    with Endpoint(ran.append, linger=True) as endpoint, Proxy(endpoint) as proxy:
        door: Any = endpoint if kind is Endpoint else proxy
        serve(lambda value=None: ran.append(value) if value is not None else door, codec="data")
        with pytest.raises(MarshalError, match=r"the argument value: .*pickle") as caught:
            connect()(door)
        assert caught.value.may_have_run is False
        with pytest.raises(ProtocolError, match=r"no outcome of a call: .*pickle"):
            connect()()
    assert ran == []
