"""
How files, sockets and other objects of the standard library cross a door: as their own kind.

The other side gets a new object on the same *open file*, as a child gets after a fork: one offset
and one set of flags for both, one state of a connection.  What only the object knew goes
along: mode, name, encoding, errors, newline; family, type, protocol and time-out.

Buffers
    What has been written and waits in a buffer is flushed first.  What has been *read* ahead is
    given back to the file, so that the receiver begins where the sender's object stands, and
    the sender goes on correctly, too.  A pipe, a socket or a terminal takes nothing back: what
    a buffered reader has read ahead there stays with the sender, who alone can read it.

Names
    A file arrives with the name that it was opened by, which is text and leads, perhaps,
    elsewhere over there.  Whatever would be deleted when it is closed (``tempfile``) still is, by
    the sender; in the receiver's hands it is a file that stays.

What is not here (``io.BufferedRWPair``, ``socket.makefile``, a subclass of anything) is refused by
name.  The sizes of buffers are not known to anybody; they are the receiver's defaults.

All of that is of pickles.  Where data is spoken, the other side is not believed: a ``Connection`` would
unpickle what it sends, a name would be its text.  There everything arrives as a ``Descriptor``, or, if the
procedure's annotation asks for one, as a plain socket or a raw file that is made of what the kernel says.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import io
import os
import select
import selectors
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from doorpool import _data, _passing, _sockets
from doorpool._descriptor import Descriptor
from doorpool._janitor import Open
from doorpool._passing import Departure, Kind, Recipe, register

if TYPE_CHECKING:
    import tempfile
    from multiprocessing.connection import Connection

Buffered = io.BufferedReader | io.BufferedWriter | io.BufferedRandom

_BUFFERED = (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)


def _refuse(kind: type, advice: str) -> None:
    """Refuse objects of a type that pickle would carry without what they hold."""

    def reduce(value: object, departure: Departure) -> Recipe:
        raise TypeError(f"cannot pickle a {kind.__qualname__}; {advice}")

    register(kind, reduce)


# --- files --------------------------------------------------------------------------------------


def _reduce_raw(file: io.FileIO, departure: Departure) -> Recipe:
    departure.add(file.fileno())
    return _rebuild_file, (file.mode, _name(file), None, None)


def _reduce_buffered(file: Buffered, departure: Departure) -> Recipe:
    raw = _raw(file, file)
    _settle(file)
    departure.add(raw.fileno())
    return _rebuild_file, (raw.mode, _name(raw), type(file), None)


def _reduce_text(file: io.TextIOWrapper, departure: Departure) -> Recipe:
    buffer = file.buffer
    raw = _raw(file, buffer)
    where = None
    if file.seekable():
        # More than a number of bytes: the state of the decoder is in it.  Before any ``flush``, behind
        # which a file that is being iterated would tell what is not so, and not refuse.
        where = file.tell()
        file.seek(where)
    file.flush()
    _settle(buffer)  # type: ignore[arg-type]
    departure.add(raw.fileno())
    how = file.encoding, file.errors, _newline(file), file.line_buffering, file.write_through
    return _rebuild_file, (raw.mode, _name(raw), type(buffer), (how, vars(file).get("mode"), where))


def _raw(file: object, buffer: object) -> io.FileIO:
    """Return the raw file of a buffer, if those two are just what ``open`` makes."""
    kind: type = type(buffer)
    if kind in _BUFFERED:
        raw = buffer.raw  # type: ignore[attr-defined]
        if type(raw) is io.FileIO:
            return raw
        kind = type(raw)
    raise TypeError(f"cannot pickle a {type(file).__qualname__} of a {kind.__qualname__}")


def _name(raw: io.FileIO) -> str | bytes | None:
    """Return the name that a file was opened by; a number says nothing over there."""
    return raw.name if isinstance(raw.name, str | bytes) else None


def _settle(file: Buffered) -> None:
    """Write what waits to be written, and give back what was read ahead."""
    file.flush()
    if type(file) is not io.BufferedReader or not file.seekable():
        return
    there, here = os.lseek(file.fileno(), 0, os.SEEK_CUR), file.tell()
    if there != here:
        # Within what it has read ahead it only moves in its buffer.
        file.seek(there + 1)
        file.seek(here)


def _newline(file: io.TextIOWrapper) -> str | None:
    """
    Return what a text file was given as ``newline``.

    No attribute says it.  But a text file holds it as a string, as it does ``encoding``,
    ``errors``, and behind it the text that it has decoded and not given away, which after a
    ``seek`` is none.  The decoder of a file with None (or "") is one for newlines.
    """
    held = gc.get_referents(file)
    strings = (it for it in held if type(it) is str and it is not file.encoding and it is not file.errors)
    newline = next(strings, None)
    if newline is None or newline not in ("", "\n", "\r", "\r\n"):
        return None
    translates = any(isinstance(it, io.IncrementalNewlineDecoder) for it in held)
    return None if translates and newline else newline


def _rebuild_file(
    descriptor: Descriptor,
    mode: str,
    name: str | bytes | None,
    buffered: type | None,
    text: tuple[tuple[Any, ...], str | None, int | None] | None,
) -> Any:
    raw = _open_raw(descriptor, mode)
    try:
        if name is not None:
            raw.name = name
        if buffered is None:
            return raw
        buffer = buffered(raw)
        if text is None:
            return buffer
        how, text_mode, where = text
        file = io.TextIOWrapper(buffer, *how)
        if text_mode is not None:
            file.mode = text_mode  # type: ignore[misc]  # as ``open`` does
        if where is not None:
            file.seek(where)
            _settle(buffer)  # its decoder may have had to see a few bytes again
        return file
    except BaseException:
        raw.close()
        raise


def _open_raw(descriptor: Descriptor, mode: str) -> io.FileIO:
    """Make a raw file; one that appends is put at its end by its making, and the sender's with it."""
    where = _offset(descriptor.fileno()) if "a" in mode else None
    raw = io.FileIO(descriptor.fileno(), mode)
    descriptor.take()
    if where is not None:
        os.lseek(raw.fileno(), where, os.SEEK_SET)
    return raw


def _offset(number: int) -> int | None:
    try:
        return os.lseek(number, 0, os.SEEK_CUR)
    except OSError:  # a pipe has none
        return None


register(io.FileIO, _reduce_raw)
for _kind in _BUFFERED:
    register(_kind, _reduce_buffered)
register(io.TextIOWrapper, _reduce_text)


# --- sockets and the like -----------------------------------------------------------------------


def _reduce_socket(sock: socket.socket, departure: Departure) -> Recipe:
    if sock.fileno() < 0:
        raise ValueError("this socket is closed")
    departure.add(sock.fileno())
    return _rebuild_socket, (int(sock.family), int(sock.type), sock.proto, sock.gettimeout())


def _rebuild_socket(
    descriptor: Descriptor, family: int, kind: int, proto: int, timeout: float | None
) -> socket.socket:
    # With all three given, CPython asks the kernel nothing.
    sock = socket.socket(family, kind, proto, fileno=descriptor.fileno())
    descriptor.take()
    sock.settimeout(timeout)  # past ``socket.setdefaulttimeout()`` of this process
    return sock


def _reduce_epoll(epoll: select.epoll, departure: Departure) -> Recipe:
    departure.add(epoll.fileno())
    return _rebuild_epoll, ()


def _rebuild_epoll(descriptor: Descriptor) -> select.epoll:
    epoll = select.epoll.fromfd(descriptor.fileno())
    descriptor.take()
    return epoll


register(socket.socket, _reduce_socket)
register(select.epoll, _reduce_epoll)
_refuse(socket.SocketIO, "pass the socket, and call makefile() there")
_refuse(selectors.EpollSelector, "its files have other numbers over there")


# --- what is made in Python, and not imported for this alone ------------------------------------


def _reduce_connection(connection: Connection, departure: Departure) -> Recipe:
    departure.add(connection.fileno())
    return _rebuild_connection, (connection.readable, connection.writable)


def _rebuild_connection(descriptor: Descriptor, readable: bool, writable: bool) -> Connection:
    from multiprocessing.connection import Connection

    connection = Connection(descriptor.fileno(), readable, writable)
    descriptor.take()
    return connection


def _reduce_named(file: tempfile._TemporaryFileWrapper[Any], departure: Departure) -> Recipe:
    rebuild, args = _reduce_inner(file, file.file, departure)
    return _rebuild_named, (file.name, rebuild, args)


def _rebuild_named(
    descriptor: Descriptor, name: str, rebuild: Callable[..., Any], args: tuple[Any, ...]
) -> tempfile._TemporaryFileWrapper[Any]:
    import tempfile

    return tempfile._TemporaryFileWrapper(rebuild(descriptor, *args), name, delete=False)


def _reduce_spooled(file: tempfile.SpooledTemporaryFile[Any], departure: Departure) -> Recipe:
    file.rollover()  # now, for memory cannot be shared
    rebuild, args = _reduce_inner(file, file._file, departure)
    return _rebuild_spooled, (rebuild, args)


def _rebuild_spooled(
    descriptor: Descriptor, rebuild: Callable[..., Any], args: tuple[Any, ...]
) -> tempfile.SpooledTemporaryFile[Any]:
    import tempfile

    kind: Any = tempfile.SpooledTemporaryFile
    spooled = kind.__new__(kind)  # as it is behind its ``rollover``
    spooled._file, spooled._rolled, spooled._max_size = rebuild(descriptor, *args), True, 0
    return spooled  # type: ignore[no-any-return]


def _reduce_inner(file: object, inner: Any, departure: Departure) -> Recipe:
    kind = _passing.table.get(type(inner))
    if type(kind) is not Kind:
        raise TypeError(f"cannot pickle a {type(file).__qualname__} of a {type(inner).__qualname__}")
    return kind.reduce(inner, departure)


def _register_connections(module: Any) -> None:
    register(module.Connection, _reduce_connection)
    _passing.guard(module._ConnectionBase)  # pickle would carry the bare number


def _register_temporary(module: Any) -> None:
    register(module._TemporaryFileWrapper, _reduce_named)
    register(module.SpooledTemporaryFile, _reduce_spooled)
    _refuse(module._TemporaryFileCloser, "it deletes a file")


_passing.register_late("multiprocessing.connection", "rebuild_connection", _register_connections)
_passing.register_late("tempfile", "TemporaryDirectory", _register_temporary)


# --- where data is spoken: what an annotation may have made of a stranger's descriptor -----------


def _socket_of(descriptor: Descriptor) -> socket.socket:
    """
    Make a socket of what the kernel says of a descriptor, changing no flag of it.

    Whether it blocks is a flag of the open file, which both sides share.  With a default time-out in force
    CPython would change it, unless it believes that the socket does not block: then
    ``gettimeout()`` is 0 whatever the flag.

    CPython asks what it makes a socket of for its address, and holds the interpreter's lock meanwhile;
    in the kernel that waits for whoever holds the socket, which a stranger can do for good.  So
    it is made of a socket of our own, in whose place the other is put then.
    """
    number = descriptor.fileno()
    try:
        family, kind, proto = map(functools.partial(_sockets.number_of, number), _sockets.WHAT_IT_IS)
    except OSError:
        raise ValueError("Expected `socket`, got a descriptor that is none") from None
    if socket.getdefaulttimeout() is not None or not os.get_blocking(number):
        kind |= socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as own:
        sock = socket.socket(family, kind, proto, fileno=own.fileno())
        own.detach()
    try:
        os.dup2(number, sock.fileno(), inheritable=False)
    except BaseException:
        sock.close()
        raise
    os.close(descriptor.take())
    return sock


def _file_of(descriptor: Descriptor) -> io.FileIO:
    """Make a raw binary file of a descriptor, as it is open; its name is its number."""
    access = fcntl.fcntl(descriptor.fileno(), fcntl.F_GETFL) & os.O_ACCMODE
    file = io.FileIO(descriptor.fileno(), {os.O_RDONLY: "rb", os.O_WRONLY: "wb"}.get(access, "r+b"))
    descriptor.take()
    return file


def _number_of_socket(sock: socket.socket) -> list[Open]:
    number = sock.detach()
    return [number] if number >= 0 else []


def _file_itself(file: io.FileIO) -> list[Open]:
    return [] if file.closed else [file]  # it does not give its number back, and its close may take long


_data.register_conversion(socket.socket, _socket_of, _number_of_socket)
_data.register_conversion(io.FileIO, _file_of, _file_itself)
