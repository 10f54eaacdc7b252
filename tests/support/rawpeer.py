"""
Peers that speak the protocol by hand, over real sockets, with no code of the library.

What they say is written out here a second time, from the description of the wire format: a
change of the format that nobody meant fails the tests that use them.  A peer says the right
thing where it is not told otherwise, so a test shows only what it does wrong.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Sequence
from types import TracebackType

SO_PASSPIDFD = 76
SCM_CREDENTIALS = 2

VERSION = 1
HEAD = 40  # bytes before the body of a frame
PACKET = 65_536  # the most bytes of one
RAW, PICKLE, DATA = 0, 1, 2

REQUEST, REPLY, FAILURE, PING, PONG, GOODBYE = b"QRFPAG"

ABORTED, TOO_LARGE, TOO_MANY, REFUSES, LOST, REVOKED, CLOSED, IDLE, BUSY, DENIED = range(1, 11)
UNSPOKEN, PROTOCOL, REPLY_TOO_LARGE = range(11, 14)

PATIENCE = 10.0  # seconds; a peer that waits longer for the library has found a hang


# -- what is said


def frame(
    kind: int,
    number: int,
    data: bytes = b"",
    *,
    buffers: Sequence[bytes] = (),
    version: int = VERSION,
    descriptors: int = 0,
    claimed_buffers: int | None = None,
    length: int | None = None,
    nanoseconds: int = 0,
    sent: int = 0,
) -> bytes:
    """Write a frame; ``length`` and ``claimed_buffers`` are for those that lie."""
    table = struct.pack(f"<{len(buffers)}Q", *map(len, buffers))
    body = table + data + b"".join(buffers)
    return (
        struct.pack(
            "<BBHIQQQQ", kind, version, descriptors,
            len(buffers) if claimed_buffers is None else claimed_buffers,
            number, len(body) if length is None else length, nanoseconds, sent,
        )
        + body
    )  # fmt: skip


def refusal(
    reason: int, text: str = "", *, may_have_run: bool = False, limit: int = 0, value: int = 0
) -> bytes:
    return struct.pack("<BB6xQQ", reason, may_have_run, limit, value) + text.encode()


def greeting(
    *,
    magic: bytes = b"dpGR",
    version: int = VERSION,
    codec: int = RAW,
    id: bytes = b"\x11" * 16,
    python: tuple[int, int] = (3, 11),
    max_request: int = 2**30,
    max_descriptors: int = 253,
    attributes: int = 0,
    name: str = "by hand",
    doc: str = "",
    signature: str = "",
    methods: str = "",
    main: bytes = bytes(16),
) -> bytes:
    head = struct.pack(
        "<4sHBB16sBB14xQIHH", magic, version, codec, 0, id, *python, max_request, max_descriptors,
        attributes, 0,
    )  # fmt: skip
    texts = [text.encode() for text in (name, doc, signature, methods)]
    return head + b"".join(struct.pack("<I", len(text)) + text for text in texts) + main


def knock(*, magic: bytes = b"dpKN", version: int = VERSION) -> bytes:
    return struct.pack("<4sHBB16s", magic, version, 3, 11, bytes(16))


def answer(
    *,
    magic: bytes = b"dpAN",
    version: int = VERSION,
    refused: int = 0,
    codec: int = RAW,
    body: bytes = b"",
) -> bytes:
    return struct.pack("<4sHBBQ", magic, version, refused, codec, 0) + body


# -- how it is sent


def pair(kind: int) -> tuple[socket.socket, socket.socket]:
    """Make a pair of sockets that ask for credentials from birth."""
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    for end in (one, other):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        end.settimeout(PATIENCE)
    return one, other


def send(
    sock: socket.socket, data: bytes, descriptors: Sequence[int] = (), *, credentials: bool = True
) -> None:
    """Send all bytes; the descriptors, and our credentials, go with the first of them."""
    ancillary: list[tuple[int, int, bytes]] = []
    if credentials:
        ucred = struct.pack("=iII", os.getpid(), os.geteuid(), os.getegid())
        ancillary.append((socket.SOL_SOCKET, SCM_CREDENTIALS, ucred))
    if descriptors:
        item = array.array("i", descriptors).tobytes()
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, item))
    sock.sendmsg([data[:PACKET]], ancillary, socket.MSG_NOSIGNAL)
    for start in range(PACKET, len(data), PACKET):
        sock.send(data[start : start + PACKET], socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, size: int = 1 << 16) -> tuple[bytes, list[int]]:
    """Receive what is there, with its descriptors, which are the caller's."""
    data, ancillary, _, _ = sock.recvmsg(size, 4096, socket.MSG_CMSG_CLOEXEC)
    found = array.array("i")
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(value)
        elif (level, kind) == (socket.SOL_SOCKET, 4):  # SCM_PIDFD
            os.close(struct.unpack("=i", value)[0])
    return data, found.tolist()


def receive_packets(sock: socket.socket, size: int, data: bytes = b"") -> bytes:
    """Receive packets until there are so many bytes; a frame ends where a packet ends."""
    while len(data) < size:
        piece, descriptors = receive(sock)
        for descriptor in descriptors:
            os.close(descriptor)
        if not piece:
            raise EOFError(f"{len(data)} bytes of {size}, then the end")
        data += piece
    return data


def unread_there(sock: socket.socket) -> int:
    """How much of what we sent the other side has not read yet."""
    size: int = struct.unpack("@i", fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    return size


class Received:
    """A frame as it came."""

    def __init__(self, head: bytes, body: bytes) -> None:
        (
            self.kind, self.version, self.descriptors, self.buffers, self.number, _,
            self.nanoseconds, self.sent,
        ) = struct.unpack("<BBHIQQQQ", head)  # fmt: skip
        self.body = body

    @property
    def reason(self) -> int:
        return self.body[0]

    @property
    def may_have_run(self) -> bool:
        return self.body[1] != 0

    @property
    def limits(self) -> tuple[int, int]:
        limit, value = struct.unpack_from("<QQ", self.body, 8)
        return limit, value

    @property
    def text(self) -> str:
        return self.body[24:].decode()

    def __repr__(self) -> str:
        return f"<{chr(self.kind)} {self.number} {self.body!r}>"


class _Peer:
    """What both kinds of peer do on their end of the private pair."""

    channel: socket.socket

    def send(self, data: bytes, descriptors: Sequence[int] = (), *, credentials: bool = True) -> None:
        send(self.channel, data, descriptors, credentials=credentials)

    def receive(self) -> Received:
        """
        Receive one frame, whole.

        Raises:
            EOFError: the other side has closed the channel.
        """
        try:
            data = receive_packets(self.channel, HEAD)
            data = receive_packets(self.channel, HEAD + struct.unpack_from("<Q", data, 16)[0], data)
            return Received(data[:HEAD], data[HEAD:])
        except ConnectionResetError:
            raise EOFError("reset") from None

    def expect_end(self) -> None:
        """Read the end of the channel, and nothing before it."""
        with contextlib.suppress(ConnectionResetError):
            data = receive(self.channel)[0]
            assert data == b"", f"{data!r} in place of the end"

    def wait_until_read(self) -> None:
        """Wait until the other side has taken all that was sent."""
        from support import wait_until

        wait_until(lambda: unread_there(self.channel) == 0, "the other side reads")


class RawClient(_Peer):
    """
    A client: knocks at a door descriptor, and speaks frames on the channel it gets.

    Args:
        door: the number of a descriptor of the door, which stays the caller's.
        opening: open a channel at once.
    """

    def __init__(self, door: int, *, opening: bool = True) -> None:
        self.door = socket.socket(fileno=os.dup(door))
        self.door.settimeout(PATIENCE)
        self.number = 0
        self.channel = self.knock_socket = self.door
        if opening:
            try:
                self.open()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> RawClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def greeting(self) -> bytes:
        """Look at what the door says of itself, byte by byte."""
        return self.door.recv(1 << 16, socket.MSG_PEEK)

    def knock(self, words: bytes | None = None, descriptors: Sequence[int] | None = None) -> None:
        """Knock; the answer comes on ``knock_socket``."""
        ours, theirs = pair(socket.SOCK_STREAM)
        self.knock_socket = ours
        with theirs:
            mine = [theirs.fileno()]
            send(self.door, knock() if words is None else words, mine if descriptors is None else descriptors)

    def answer(self) -> tuple[bytes, list[int]]:
        """Hear the answer: its bytes and descriptors; ``(b"", [])`` if the knock was dropped."""
        try:
            return receive(self.knock_socket)
        except ConnectionResetError:
            return b"", []

    def open(self) -> None:
        """Knock and take the channel that comes with the answer."""
        self.knock()
        words, descriptors = self.answer()
        assert words in (answer(), answer(codec=PICKLE), answer(codec=DATA)), words
        assert len(descriptors) == 1
        self.channel = socket.socket(fileno=descriptors[0])
        self.channel.settimeout(PATIENCE)
        self.knock_socket.close()

    def call(self, data: bytes = b"", **words: int) -> Received:
        """Call as one should, and return what came back."""
        self.number += 1
        self.send(frame(REQUEST, self.number, data, **words))  # type: ignore[arg-type]
        return self.receive()

    def close(self) -> None:
        for sock in (self.channel, self.knock_socket, self.door):
            sock.close()


class RawServer(_Peer):
    """
    A server of one client: hands out a descriptor, hears knocks, and speaks frames.

    Args:
        words: the greeting; b"" for none.
        port: the number of a port that another process has made, and greeted from.

    Attributes:
        descriptor: of the door, to be given to somebody (who owns it from then on).
    """

    def __init__(self, words: bytes | None = None, *, port: int | None = None) -> None:
        if port is None:
            holder, self.port = pair(socket.SOCK_SEQPACKET)
            self.descriptor = holder.detach()
        else:
            self.port = socket.socket(fileno=port)
            self.port.settimeout(PATIENCE)
            words = b""
        self.knock_socket = self.channel = self.port
        if words is None:
            words = greeting()
        if words:
            self.port.send(words)

    def __enter__(self) -> RawServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hear(self) -> bytes:
        """Hear a knock and return its words."""
        self.knock_socket.close() if self.knock_socket is not self.port else None
        words, descriptors = receive(self.port)
        assert len(descriptors) == 1, (words, descriptors)
        self.knock_socket = socket.socket(fileno=descriptors[0])
        return words

    def make_channel(self) -> socket.socket:
        """Make a channel, in place of the last; return the client's end."""
        ours, theirs = pair(socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 0)
        theirs.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 0)
        if self.channel is not self.port:
            self.channel.close()
        self.channel = ours
        return theirs

    def admit(self, words: bytes | None = None, extra: Sequence[int] = ()) -> None:
        """Answer a knock that was heard."""
        with self.make_channel() as theirs:
            send(self.knock_socket, answer() if words is None else words, [theirs.fileno(), *extra])

    def accept(self) -> None:
        """Hear a knock and answer it, as one should."""
        self.hear()
        self.admit()

    def close(self) -> None:
        for sock in (self.channel, self.knock_socket, self.port):
            sock.close()
