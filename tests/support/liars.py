"""
Servers that say the wrong thing on their first channel, and the right thing on all others.

``converse`` has a client of some kind call such a server, and returns what came of each call.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import msgspec

from doorpool import Descriptor, DoorError, Proxy
from doorpool._doors import arrive
from doorpool._handle import deadline_after
from doorpool._streams import Stream
from doorpool._wire import Codec
from doorpool.door import Handle
from support import rawpeer
from support.rawdoor import Background

SOON = rawpeer.PATIENCE / 2  # seconds; a call that takes longer has missed what was said to it

DESCRIPTOR, PROXY, STREAM = 1, 3, 4  # extensions of MessagePack


# -- the clients ----------------------------------------------------------------------------------


@attrs.frozen
class Failed:
    """That a call has ended with an error of the library; no frame is kept, with what it holds."""

    kind: type[DoorError]
    may_have_run: bool
    text: str = attrs.field(eq=False)


@attrs.frozen
class Kind:
    """
    What a client asks, and what it has of the right answer.

    Attributes:
        codec: of the door.
        open: makes a client of the number of a descriptor, which is taken over if that succeeds.
        ask: asks once; given the client, and seconds.
        reply: the right answer to the first question.
        files: how many descriptors it brings.
        right: what the client makes of it.
        takes: how many descriptors it may bring if it announces them.
    """

    codec: int
    open: Callable[[int], Any]
    ask: Callable[[Any, float], Any]
    reply: bytes
    right: Any
    files: int = 0
    takes: range = range(254)


def _open_handle(number: int) -> Handle:
    handle = Handle(number, lazy=True, open_timeout=SOON)
    try:
        handle.open_channel(deadline_after(SOON))
    except BaseException:
        handle.close()
        raise
    return handle


def _call(handle: Handle, seconds: float) -> Any:
    with handle.call(b"?", timeout=seconds) as reply:
        return [bytes(reply.data), *map(bytes, reply.buffers)], len(reply.descriptors)


def _ask_descriptor(handle: Handle, seconds: float) -> str:
    os.close(handle.ask_descriptor(deadline_after(seconds), None))
    return "a descriptor"


def _open_proxy(number: int) -> Proxy:
    return Proxy(number, reopen=False, open_timeout=SOON)


def _call_function(proxy: Proxy, seconds: float) -> Any:
    try:
        came = proxy.options(timeout=seconds)("?")
    except KeyError as error:  # what the server says that the procedure has raised
        return "raised", *error.args
    return without_files(came)


def without_files(value: Any) -> Any:
    """Close what came with descriptors, and say where it was."""
    if isinstance(value, list):
        return [without_files(item) for item in value]
    if isinstance(value, Descriptor | Proxy | Stream):
        value.close()
        return f"a {type(value).__name__}"
    return value


def open_stream(number: int, codec: Codec = Codec.DATA) -> Stream:
    descriptor = Descriptor(number)
    try:
        return Stream(arrive(descriptor, os.geteuid(), codecs=(codec,)))
    except BaseException:
        descriptor.take()
        raise


def _pull(stream: Stream, seconds: float) -> Any:
    stream.timeout = seconds
    return next(stream)


def pull_all(stream: Stream, seconds: float) -> list[Any]:
    """Pull till the end; return the items, and behind them what the stream has returned, or its error."""
    stream.timeout = seconds
    came: list[Any] = []
    try:
        while True:
            came.append(without_files(next(stream)))
    except StopIteration as end:
        came.append(("returned", end.value))
    except DoorError as error:
        came.append(_failed(error))
    assert list(stream) == []
    return came


def data(value: Any) -> bytes:
    """Write what a procedure of a data door has returned."""
    return b"V" + msgspec.msgpack.encode(value)


def named(code: int, place: int = 0, number: int = 0) -> msgspec.msgpack.Ext:
    """Name a descriptor of a message of data."""
    return msgspec.msgpack.Ext(code, struct.pack(">HH", number, place))


def _reply(body: bytes, *buffers: bytes, kind: int = rawpeer.REPLY, files: int = 0) -> bytes:
    return rawpeer.frame(kind, 1, body, buffers=buffers, descriptors=files)


_VALUE = [1, "two", {"three": None}]
_LIMITS = struct.pack("<QII", 2**30, 253, 0)
_PARTS = [b"data", b"one", b"", b"three"]

KINDS = {
    "raw": Kind(
        rawpeer.RAW, _open_handle, _call, _reply(*_PARTS), (_PARTS, 0)
    ),
    "raw, files": Kind(
        rawpeer.RAW, _open_handle, _call, _reply(*_PARTS, files=2), (_PARTS, 2), files=2
    ),
    "ping": Kind(
        rawpeer.RAW, _open_handle, lambda handle, seconds: handle.ping(timeout=seconds),
        _reply(_LIMITS, kind=rawpeer.PONG), None,
    ),
    "another descriptor": Kind(
        rawpeer.RAW, _open_handle, _ask_descriptor, _reply(_LIMITS, kind=rawpeer.PONG, files=1),
        "a descriptor", files=1, takes=range(1, 2),
    ),
    "data": Kind(rawpeer.DATA, _open_proxy, _call_function, _reply(data(_VALUE)), _VALUE),
    "data, a file": Kind(
        rawpeer.DATA, _open_proxy, _call_function, _reply(data(["it", named(DESCRIPTOR)]), files=1),
        ["it", "a Descriptor"], files=1, takes=range(1, 254),
    ),
    "data, an error": Kind(
        rawpeer.DATA, _open_proxy, _call_function,
        _reply(b"E" + msgspec.msgpack.encode(["KeyError", "text", None])), ("raised", "text"),
    ),
    "pickle": Kind(
        rawpeer.PICKLE, _open_proxy, _call_function, _reply(pickle.dumps(_VALUE, 5)), _VALUE
    ),
    "a batch": Kind(
        rawpeer.DATA, open_stream, _pull, _reply(data(["an item"])), "an item"
    ),
}  # fmt: skip


def numbered(reply: bytes, number: int) -> bytes:
    return reply[:8] + struct.pack("<Q", number) + reply[16:]


def ask_all(kind: Kind, number: int, times: Sequence[float]) -> list[Any]:
    """Ask once for each of some times, in seconds; return what came of each, or that there is no door."""
    try:
        client = kind.open(number)
    except DoorError as error:
        with contextlib.suppress(OSError):
            os.close(number)  # unless it has been taken over
        return [_failed(error)]
    with contextlib.closing(client):
        return [_outcome(kind, client, seconds) for seconds in times]


def _outcome(kind: Kind, client: Any, seconds: float) -> Any:
    try:
        return kind.ask(client, seconds)
    except StopIteration:  # of a stream that has failed before
        return "the end"
    except DoorError as error:
        return _failed(error)


def _failed(error: DoorError) -> Failed:
    return Failed(type(error), error.may_have_run, str(error))


# -- the servers ----------------------------------------------------------------------------------


class Liar(rawpeer.RawServer):
    """
    A server of one client that answers as it is told on its first channel, and right on all others.

    Args:
        kind: what it is asked, and what is right.
        say: says something to each question on the first channel; is given the server and the
            number of the question.  It may close the channel.
        words: the greeting: messages, each with its number of descriptors.
        admit: answers the first knock; is given the server.
        files: descriptors to go along with right answers.
    """

    def __init__(
        self, kind: Kind, say: Callable[[Liar, int], None], file: int, *,
        words: Sequence[tuple[bytes, int]] | None = None, admit: Callable[[Liar], None] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(b"")
        for message, files in [(rawpeer.greeting(codec=kind.codec), 0)] if words is None else words:
            rawpeer.send(self.port, message, [file] * files)
        self.asked: rawpeer.Received
        self.kind = kind
        self._say = say
        self._admit = admit
        self._file = file
        self._channels = 0

    def serve(self) -> None:
        """Serve until the client has let go of the door."""
        while True:
            poll = select.poll()
            poll.register(self.port, select.POLLIN)
            if self.channel is not self.port and self.channel.fileno() >= 0:
                poll.register(self.channel, select.POLLIN)
            ready = [number for number, _ in poll.poll(2 * rawpeer.PATIENCE * 1000)]
            assert ready, "the client hangs"
            if self.port.fileno() not in ready:
                self.answer_question()
            elif not self.answer_knock():
                return

    def answer_knock(self) -> bool:
        """Hear a knock and answer it; False at the end."""
        try:
            _, numbers = rawpeer.receive(self.port)
        except ConnectionResetError:  # told once, of a greeting that was only peeked at
            return True
        if not numbers:
            return False
        with socket.socket(fileno=numbers[0]) as self.knock_socket:
            self._channels += 1
            with contextlib.suppress(ConnectionError):
                if self._admit is not None and self._channels == 1:
                    self._admit(self)
                else:
                    self.admit(rawpeer.answer(codec=self.kind.codec))
        return True

    def answer_question(self) -> None:
        """Hear a question and answer it, or close the channel if that has ended."""
        try:
            self.asked = self.receive()
        except (EOFError, ConnectionError):
            self.channel.close()
            return
        with contextlib.suppress(ConnectionError):
            if self._channels == 1:
                self._say(self, self.asked.number)
            else:
                self.answer_right(self.asked.number)

    def admit_with(self, words: bytes, gifts: Sequence[int | None]) -> None:
        """Answer a knock with these descriptors, None being the channel."""
        with self.make_channel() as theirs:
            numbers = [theirs.fileno() if gift is None else gift for gift in gifts]
            rawpeer.send(self.knock_socket, words, numbers)

    def answer_right(self, question: int) -> None:
        self.send(numbered(self.kind.reply, question), [self._file] * self.kind.files)


def converse(
    kind: Kind, say: Callable[[Liar, int], None], file: int, times: Sequence[float] = (SOON, SOON),
    **options: Any,
) -> list[Any]:  # fmt: skip
    """
    Have a client ask some questions; return what came of each: a value, or ``Failed``.

    Args:
        kind: of the client.
        say: what the server says on its first channel.
        file: a descriptor for right answers that bring some.
        times: seconds for each question.
        options: of the ``Liar``.
    """
    with Liar(kind, say, file, **options) as liar:
        client = Background(ask_all, kind, liar.descriptor, times)
        liar.serve()
        outcomes: list[Any] = client.result()
    return outcomes


@contextlib.contextmanager
def asking(kind: Kind, file: int, seconds: float) -> Iterator[tuple[Liar, Background]]:
    """Have a client ask one question, and leave it to the test to answer it."""
    with Liar(kind, Liar.answer_right, file) as liar:
        client = Background(ask_all, kind, liar.descriptor, (seconds,))
        liar.answer_knock()
        with contextlib.suppress(EOFError):  # its time may be over already
            liar.receive()
        yield liar, client
        client.result()
