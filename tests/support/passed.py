"""
One object of each kind that crosses a door with its descriptor, and how to tell that it is the same.

Client and server import this, so that the containers are of the same classes on both sides.
"""

# ruff: noqa: SIM115  # files that live as long as a stack that is handed around

from __future__ import annotations

import contextlib
import io
import os
import select
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from doorpool import Descriptor

Make = Callable[[Path, contextlib.ExitStack], Any]

LINES = "first line\nsecond: \u00e4\u00f6\u00fc\nthird\n"


class Parcel:
    """The writing end of a pipe, to be passed, and the way to know whether anybody has a copy of it."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()

    def give(self) -> Descriptor:
        """Give it away; once."""
        number, self._writer = self._writer, -1
        return Descriptor(number)

    @property
    def somewhere(self) -> bool:
        """Whether somebody has it, or it is on its way."""
        return not self.wait_closed(0)

    def wait_closed(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._reader, 0)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        os.close(self._reader)
        if self._writer >= 0:
            os.close(self._writer)


class Holder:
    """Has an attribute."""

    def __init__(self, held: Any) -> None:
        self.held = held


@dataclass
class Box:
    """Has a field."""

    content: Any


def nest(obj: Any) -> dict[str, Any]:
    """Put one object into containers of every sort."""
    return {"list": [1, obj], "tuple": (obj, ("deeper", obj)), "attribute": Holder(obj), "field": Box([obj])}


def unnest(value: dict[str, Any]) -> Any:
    """Take it out again; it is one object wherever it stands."""
    found = [
        value["list"][1], value["tuple"][0], value["tuple"][1][1], value["attribute"].held,
        value["field"].content[0],
    ]  # fmt: skip
    assert all(obj is found[0] for obj in found), found
    return found[0]


def descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd")) - 1  # the listing's own


def held() -> list[tuple[str, str]]:
    """All of them: the number, and what it leads to."""
    listing = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            listing.append((number, os.readlink(f"/proc/self/fd/{number}")))
    return listing


def describe(obj: Any) -> tuple[Any, ...]:
    """All that must be the same of an object on both sides of a door."""
    number = obj.fileno()
    status = os.fstat(number)
    kernel = status.st_dev, status.st_ino, Path(f"/proc/self/fdinfo/{number}").read_text()
    return type(obj).__qualname__, os.get_inheritable(number), kernel, _attributes(obj)


def _attributes(obj: Any) -> tuple[Any, ...]:
    if isinstance(obj, socket.socket):
        return obj.family, obj.type, obj.proto, obj.gettimeout()
    if isinstance(obj, Connection):
        return obj.readable, obj.writable
    if isinstance(obj, Descriptor | select.epoll):
        return ()
    file = getattr(obj, "_file", getattr(obj, "file", obj))  # what tempfile has wrapped
    names = ["mode", "encoding", "errors", "line_buffering", "write_through"]
    known = [getattr(file, name, None) for name in names]
    name = obj.name if isinstance(obj.name, str) else None
    return type(file).__qualname__, name, file.seekable() and file.tell(), *known


# --- one of each --------------------------------------------------------------------------------

KINDS: dict[str, Make] = {}


def kind(name: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        KINDS[name] = make
        return make

    return add


def _descriptor(name: str, make: Callable[[Path, contextlib.ExitStack], int]) -> None:
    KINDS[f"Descriptor: {name}"] = lambda folder, stack: stack.enter_context(Descriptor(make(folder, stack)))


def _pipe_end(end: int) -> Callable[[Path, contextlib.ExitStack], int]:
    def make(folder: Path, stack: contextlib.ExitStack) -> int:
        ends = os.pipe()
        stack.callback(os.close, ends[1 - end])
        return ends[end]

    return make


_descriptor("reading end of a pipe", _pipe_end(0))
_descriptor("writing end of a pipe", _pipe_end(1))
_descriptor("memfd", lambda folder, stack: os.memfd_create("passed"))
_descriptor("pidfd", lambda folder, stack: os.pidfd_open(os.getpid()))
_descriptor("eventfd", lambda folder, stack: os.eventfd(3, os.EFD_CLOEXEC))
_descriptor("directory", lambda folder, stack: os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
_descriptor("path only", lambda folder, stack: os.open(folder, os.O_PATH))


def _file(mode: str, **options: Any) -> None:
    name = ", ".join([mode, *(f"{key}={value!r}" for key, value in options.items())])

    def make(folder: Path, stack: contextlib.ExitStack) -> Any:
        path = folder / "file"
        path.unlink(missing_ok=True)
        if "x" not in mode:
            path.write_text(LINES, encoding=options.get("encoding") or "utf-8")
        file: Any = stack.enter_context(open(path, mode, **options))
        if file.readable() and file.seekable():
            file.seek(0)
            file.readline()
        if file.writable():
            file.write("text" if "b" not in mode else b"bytes")
        return file

    KINDS[f"open: {name}"] = make


for _mode in ("r", "w", "x", "a", "r+", "w+", "a+", "x+"):
    _file(_mode)
    _file(f"{_mode}b")
    _file(f"{_mode}b", buffering=0)
for _encoding in ("latin-1", "utf-16", "utf-8-sig", "shift_jis_2004"):
    _file("r", encoding=_encoding, errors="replace")
    _file("w+", encoding=_encoding, errors="replace")
for _newline in ("", "\n", "\r", "\r\n"):
    _file("r+", newline=_newline)
_file("w", buffering=1)
_file("w", errors="surrogateescape")


@kind("open: of a descriptor")
def _of_a_descriptor(folder: Path, stack: contextlib.ExitStack) -> Any:
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    return stack.enter_context(open(writer, "w"))


@kind("open: a file that does not close its descriptor")
def _borrowed(folder: Path, stack: contextlib.ExitStack) -> Any:
    file = stack.enter_context(open(folder / "borrowed", "w+b"))
    return stack.enter_context(open(file.fileno(), "rb", closefd=False))


@kind("open: a text file with write_through")
def _through(folder: Path, stack: contextlib.ExitStack) -> Any:
    buffer = stack.enter_context(open(folder / "through", "w+b"))
    return stack.enter_context(io.TextIOWrapper(buffer, "utf-8", write_through=True))


for _mode in ("w+b", "w+"):
    KINDS[f"TemporaryFile: {_mode}"] = lambda folder, stack, mode=_mode: stack.enter_context(
        tempfile.TemporaryFile(mode, dir=folder)
    )
    KINDS[f"NamedTemporaryFile: {_mode}"] = lambda folder, stack, mode=_mode: stack.enter_context(
        tempfile.NamedTemporaryFile(mode, dir=folder)
    )
    KINDS[f"SpooledTemporaryFile: {_mode}"] = lambda folder, stack, mode=_mode: stack.enter_context(
        tempfile.SpooledTemporaryFile(100, mode, dir=folder)
    )


def _socket(family: int, type_: int, proto: int = 0, timeout: float | None = None) -> None:
    name = f"socket: {family!s}, {type_!s}, {proto}, {timeout}"

    def make(folder: Path, stack: contextlib.ExitStack) -> socket.socket:
        sock = stack.enter_context(socket.socket(family, type_, proto))
        sock.settimeout(timeout)
        return sock

    with contextlib.suppress(OSError), contextlib.ExitStack() as trial:  # no IPv6 here, perhaps
        make(Path(), trial)
        KINDS[name] = make


for _timeout in (None, 0.0, 2.5):
    _socket(socket.AF_UNIX, socket.SOCK_STREAM, timeout=_timeout)
    _socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, timeout=_timeout)
for _type in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
    _socket(socket.AF_UNIX, _type)
_socket(socket.AF_INET, socket.SOCK_DGRAM)
_socket(socket.AF_INET6, socket.SOCK_STREAM)
_socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)


@kind("socket: connected")
def _connected(folder: Path, stack: contextlib.ExitStack) -> socket.socket:
    ours, theirs = socket.socketpair()
    stack.enter_context(theirs)
    return stack.enter_context(ours)


def _connection(duplex: bool, end: int) -> None:
    def make(folder: Path, stack: contextlib.ExitStack) -> Any:
        ends = Pipe(duplex)
        for connection in ends:
            stack.enter_context(connection)
        return ends[end]

    KINDS[f"Connection: duplex={duplex}, {'ab'[end]}"] = make


for _duplex in (True, False):
    for _end in (0, 1):
        _connection(_duplex, _end)


@kind("epoll")
def _epoll(folder: Path, stack: contextlib.ExitStack) -> select.epoll:
    ours, theirs = socket.socketpair()
    stack.enter_context(ours)
    stack.enter_context(theirs)
    epoll = stack.enter_context(select.epoll())
    epoll.register(ours, select.EPOLLIN)
    return epoll
