"""
The door protocol spoken by hand, with no code of the library, for those who lie about who they are.

``rawpeer`` is for peers that send wrong frames; here it is about sockets, credentials and who made
what.  Whoever wants to lie changes one field.  ``test_the_hand_written_peer_is_understood`` shows that
what is said here is the protocol.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence

import attrs

_GREETING = struct.Struct("<4sHBB16sBB14xQIHH")
_KNOCK = struct.Struct("<4sHBB16s")
_ANSWER = struct.Struct("<4sHBBQ")
_REFUSAL = struct.Struct("<BB6xQQ")
_HEADER = struct.Struct("<BBHIQQQQ")
_UCRED = struct.Struct("=iII")

VERSION = 1
RAW, PICKLE = 0, 1
DENIED, PROTOCOL = 10, 12  # reasons
SO_PASSPIDFD, SO_PEERPIDFD = 76, 77
SCM_CREDENTIALS, SCM_PIDFD = 2, 4

PATIENCE = 5.0  # seconds


# -- bytes ------------------------------------------------------------------------------------


def greeting_bytes(codec: int = PICKLE, name: bytes = b"door", version: int = VERSION) -> bytes:
    head = _GREETING.pack(
        b"dpGR", version, codec, 0, os.urandom(16), *sys.version_info[:2], 1 << 30, 253, 0, 0
    )
    texts = b"".join(struct.pack("<I", len(text)) + text for text in (name, b"", b"", b""))
    return head + texts + bytes(16)


def knock_bytes(version: int = VERSION) -> bytes:
    return _KNOCK.pack(b"dpKN", version, *sys.version_info[:2], bytes(16))


def answer_bytes(codec: int = PICKLE, version: int = VERSION, refused: int = 0) -> bytes:
    return _ANSWER.pack(b"dpAN", version, refused, codec, 0)


def frame_bytes(
    kind: str, number: int, data: bytes = b"", *, version: int = VERSION, descriptors: int = 0
) -> bytes:
    return _HEADER.pack(ord(kind), version, descriptors, 0, number, len(data), 0, 0) + data


def refusal_in(answer: bytes) -> tuple[int, str] | None:
    """Read the reason and the text of a refusing answer; None if it does not refuse."""
    magic, _, refused, _, _ = _ANSWER.unpack_from(answer)
    assert magic == b"dpAN"
    if not refused:
        return None
    reason = _REFUSAL.unpack_from(answer, _ANSWER.size)[0]
    return reason, answer[_ANSWER.size + _REFUSAL.size :].decode()


# -- messages ---------------------------------------------------------------------------------


@attrs.define
class Message:
    """
    What came: bytes, who sent them (pid, uid, gid), descriptors (plain numbers).
    """

    data: bytes
    ids: tuple[int, int, int] | None = None
    fds: list[int] = attrs.field(factory=list)

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def pair(kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    """Make two connected sockets that ask for credentials."""
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    for end in (one, other):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return one, other


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Make what an answer brings: the two ends of a channel."""
    return pair(socket.SOCK_SEQPACKET)


def own_ids() -> tuple[int, int, int]:
    return os.getpid(), os.geteuid(), os.getegid()


def send(
    sock: socket.socket,
    data: bytes,
    fds: Sequence[int] = (),
    ids: tuple[int, int, int] | None = None,
    flags: int = 0,
) -> int:
    """Send one message; with ``ids``, naming oneself so."""
    ancillary: list[tuple[int, int, bytes]] = []
    if ids is not None:
        ancillary.append((socket.SOL_SOCKET, SCM_CREDENTIALS, _UCRED.pack(*ids)))
    if fds:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes()))
    return sock.sendmsg([data], ancillary, flags | socket.MSG_NOSIGNAL)


def receive(
    sock: socket.socket, size: int = 1 << 16, *, flags: int = 0, patience: float = PATIENCE
) -> Message:
    """Receive one message; raise TimeoutError if none comes."""
    if not readable(sock, patience):
        raise TimeoutError("nothing came")
    room = socket.CMSG_SPACE(12) + socket.CMSG_SPACE(4) + socket.CMSG_SPACE(4 * 253)
    data, ancillary, _, _ = sock.recvmsg(size, room, flags | socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    message = Message(data)
    for _, kind, value in ancillary:
        if kind == SCM_CREDENTIALS:
            message.ids = _UCRED.unpack(value)
        elif kind == SCM_PIDFD:
            os.close(struct.unpack("=i", value)[0])
        elif kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(value)
            message.fds += numbers
    return message


def readable(sock: socket.socket, patience: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0.0, patience) * 1000))


def read_all(sock: socket.socket, patience: float = PATIENCE) -> bytes:
    """Read until the other end is closed."""
    deadline = time.monotonic() + patience
    whole = b""
    while True:
        try:
            piece = receive(sock, patience=deadline - time.monotonic())
        except ConnectionError:
            return whole
        piece.close()
        if not piece.data:
            return whole
        whole += piece.data


# -- the client's part ------------------------------------------------------------------------


def reach(door: str | int) -> socket.socket:
    """Connect to a path, or take a copy of a number: a door socket."""
    if isinstance(door, int):
        return socket.socket(fileno=os.dup(door))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(door)
    return sock


def knock(door: socket.socket, words: bytes | None = None) -> socket.socket:
    """Knock as one should; return k0."""
    ours, theirs = pair()
    with theirs:
        send(door, knock_bytes() if words is None else words, [theirs.fileno()], own_ids())
    return ours


def dial(door: socket.socket) -> tuple[socket.socket | None, Message]:
    """Knock and hear the answer; return p1, or None with a refusal or the end."""
    with knock(door) as ours:
        answer = receive(ours)
    if not answer.fds:
        return None, answer
    return socket.socket(fileno=answer.fds.pop()), answer


def call(channel: socket.socket, number: int, data: bytes) -> bytes:
    """Send a request, and return the body of the reply."""
    send(channel, frame_bytes("Q", number, data))
    reply = receive(channel).data
    assert reply[:1] == b"R", reply[:100]
    return reply[_HEADER.size :]


# -- the server's part ------------------------------------------------------------------------


def door_pair(greeting: bytes | None = None) -> tuple[socket.socket, socket.socket]:
    """Make a descriptor with a greeting in its queue, and its port."""
    holder, port = pair(socket.SOCK_SEQPACKET)
    port.send(greeting_bytes() if greeting is None else greeting)
    return holder, port


def hear(port: socket.socket, flags: int = 0) -> tuple[socket.socket, Message]:
    """Take a knock (or a copy of it: ``MSG_PEEK``); return its k1 and the message."""
    message = receive(port, flags=flags)
    assert message.data[:4] == b"dpKN", message
    return socket.socket(fileno=message.fds.pop()), message


def admit(theirs: socket.socket, codec: int = PICKLE) -> socket.socket:
    """Answer a knock as one should; return p0."""
    ours, other = channel_pair()
    with other:
        send(theirs, answer_bytes(codec), [other.fileno()], own_ids())
    return ours
