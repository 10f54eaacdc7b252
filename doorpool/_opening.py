"""
Opening a channel: knock and answer, where each side learns who the other is.

    client                                    server
    makes a pair k0, k1
    knock: sends k1 on the door,    ------->  believes it only if whoever made k1 sent it
    with its credentials                      makes a second pair p0, p1
    believes it only if whoever     <-------  answer: sends p1 on k1,
    made p1 sent it                           with its credentials
    closes k0; p1 is the channel              p0 is the channel; k1 is kept until the first
                                              frame or hang-up, so that a client that left
                                              is seen

*Maker is sender.*  A greeting in plain bytes proves nothing: a squatter can forward it,
and a set-uid program can be made to write it.  So an identity is taken only from a
message that carries a socket, and only if the kernel's word about who *made* that socket
(``SO_PEERCRED``, ``SO_PEERPIDFD``) and its word about who *sent* the message
(``SCM_CREDENTIALS``, ``SCM_PIDFD``) name one process.  A relayer is not the maker; a tricked
writer attaches no socket; a pair that root made and somebody inherited was not made by
whoever sends it.

*A private pair of the server's.*  Whoever relays a knock can keep a copy of k1, and whoever
shares the port can copy it with ``MSG_PEEK``.  Such a copy reads one message, the answer,
and thereby takes it away, no more: calls go over p0-p1, of which nobody else ever held an
end.  It also makes ``SO_PEERCRED`` of p1 name the server; of a pair that the client made it
would name the client.

Nothing here ever waits.
"""

from __future__ import annotations

import errno
import os
import socket

import attrs

from doorpool import _sockets, _wire
from doorpool._channel import Channel
from doorpool._credentials import (
    Credentials,
    Ids,
    credentials_of,
    peer_groups,
    peer_pidfd,
    peer_ucred,
    same_process,
    unpack_ids,
)
from doorpool._errors import AccessError, ProtocolError
from doorpool._sockets import Letter
from doorpool._wire import Answer, Codec, Knock, Refusal

#: What says something about us and nothing about the other side.
_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


_PEEK = int(socket.MSG_PEEK) | _sockets.MSG_DONTWAIT


def _describe(ids: Ids) -> str:
    return f"pid {ids[0]}, uid {ids[1]}, gid {ids[2]}"


def take_socket(letter: Letter, what: str, kind: int) -> socket.socket:
    """
    Take the one socket out of a letter, if the letter's sender made it.

    Raises:
        ProtocolError: the letter does not carry just one socket of that kind and credentials.
        AccessError: somebody else made the socket: this was relayed, or forged.
    """
    if letter.truncated or len(letter.descriptors) != 1:
        raise ProtocolError(f"{what} must bring one socket, not {len(letter.descriptors)} descriptors")
    if letter.ids is None or (letter.ids[0] <= 0 and letter.pidfd < 0):
        raise ProtocolError(f"{what} came without the sender's credentials")
    number = letter.descriptors.pop()  # at no moment two owners: Ctrl-C may come at any
    try:
        sock = _sockets.adopt(number)
    except OSError as error:
        letter.descriptors.append(number)
        raise ProtocolError(f"{what} brought a descriptor that is no socket ({error.strerror})") from None
    try:
        _check_maker(sock, letter, what, kind)
    except BaseException:
        sock.close()
        raise
    return _sockets.own(sock)


def _check_maker(sock: socket.socket, letter: Letter, what: str, kind: int) -> None:
    if not _sockets.is_unix(sock, kind):
        name = socket.SocketKind(kind).name
        raise ProtocolError(f"{what} brought a socket of another kind than AF_UNIX, {name}")
    assert letter.ids is not None
    try:
        maker = peer_ucred(sock)
        if maker == letter.ucred and _made_by_sender(sock, letter.pidfd):
            return
    except OSError as error:
        if error.errno in _SHORTAGE:
            raise
        raise AccessError(
            f"{what} brought a socket of which nobody says who made it: {error.strerror}"
        ) from None
    pid, uid, gid = unpack_ids(maker)
    raise AccessError(
        f"{what} was sent by {_describe(letter.ids)} with a socket made by {_describe((pid, uid, gid))}; "
        "it is believed only from the process that made the socket"
    )


def _made_by_sender(sock: socket.socket, sender: int) -> bool:
    maker = peer_pidfd(sock)
    try:
        return same_process(maker, sender)
    finally:
        if maker >= 0:
            os.close(maker)


# -- the client's side ---------------------------------------------------------------


def knock(door: socket.socket, words: Knock) -> socket.socket:
    """
    Knock at a door; return k0, on which the answer will come.

    Raises:
        BlockingIOError: too many knocks wait there already.
        OSError: nobody serves the door any more, or descriptors have run out.
    """
    # step: dialling
    ours, theirs = _sockets.knock_pair()
    try:
        _sockets.send_letter(door, words.encode(), [theirs.fileno()])
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    # step: knock-sent
    return ours


@attrs.frozen
class Opened:
    """An opened channel, before anything of it is believed: ``codec`` and ``channel.peer`` decide."""

    channel: Channel
    codec: Codec


def hear_answer(ours: socket.socket) -> Opened | Refusal:
    """
    Hear the answer to a knock, if it has come.

    Raises:
        BlockingIOError: not yet.
        EOFError: the knock was dropped: the door is gone, or somebody else took the answer.
        OSError: ``EMFILE``: it has come, and there was no free descriptor to take it with.
        ProtocolError, AccessError: it is none, or not by whoever made its socket.
    """
    try:
        letter = _sockets.receive_letter(ours, _wire.LETTER_SIZE)
    except ConnectionError:
        raise EOFError("the knock was dropped") from None
    try:
        if not letter.data:
            raise EOFError("the knock was dropped")
        # step: answer-heard
        answer = _wire.decode_answer(letter.data)
        if answer.refusal is not None:
            return answer.refusal
        return Opened(_channel_of(letter), answer.codec)
    finally:
        letter.close()


def _channel_of(letter: Letter) -> Channel:
    if letter.truncated and not letter.descriptors:
        raise OSError(24, "no free descriptor for a channel of the door")
    sock = take_socket(letter, "the answer to a knock", socket.SOCK_SEQPACKET)
    if _sockets.unread(sock) and sock.recv(4, _PEEK) == _wire.GREETING_MAGIC:
        sock.close()
        raise ProtocolError("the answer to a knock brought a door in place of a channel")
    sock.settimeout(None)
    return _make_channel(letter, sock, sock)


def _make_channel(letter: Letter, sock: socket.socket, witness: socket.socket) -> Channel:
    """Make a channel whose peer is the sender of a letter and the maker of a witness."""
    assert letter.ids is not None
    peer = credentials_of(letter.ids, peer_groups(witness))
    pidfd, letter.pidfd = letter.pidfd, -1
    return Channel(sock, peer, letter.ucred, pidfd)


# -- the server's side ---------------------------------------------------------------


@attrs.define
class Visitor:
    """
    Somebody who has knocked: who it is, by the rule above, and what he says of himself.

    The server owns it and closes it, or lets ``admit`` turn it into a channel.
    """

    words: Knock
    letter: Letter
    socket: socket.socket  # k1
    credentials: Credentials

    def close(self) -> None:
        """Turn away without a word; idempotent."""
        self.socket.close()
        self.letter.close()


def hear_knock(port: socket.socket) -> Visitor | Refusal | None:
    """
    Take the next knock from a port.

    Returns:
        The visitor; or, for a message that was no good one, the refusal that has been sent
        back if there was somewhere to send it; or None at the end: no holder is left.

    Raises:
        BlockingIOError: nobody has knocked.
        ConnectionResetError: the other end went with something unread; not yet the end.
    """
    letter = _sockets.receive_letter(port, _wire.LETTER_SIZE)
    if not letter.data and not letter.ucred:
        letter.close()
        return None
    try:
        return _visitor(letter)
    except (ProtocolError, AccessError) as error:
        reason = _wire.Reason.DENIED if isinstance(error, AccessError) else _wire.Reason.PROTOCOL
        refusal = Refusal(reason, str(error))
        _refuse_letter(letter, refusal)
        return refusal
    except BaseException:
        letter.close()
        raise


def _visitor(letter: Letter) -> Visitor:
    words = _wire.decode_knock(letter.data)
    sock = take_socket(letter, "a knock", socket.SOCK_STREAM)
    try:
        assert letter.ids is not None
        return Visitor(words, letter, sock, credentials_of(letter.ids, peer_groups(sock)))
    except BaseException:
        sock.close()
        raise


def _refuse_letter(letter: Letter, refusal: Refusal) -> None:
    """Send a refusal back over the socket of a letter that was not believed, if it brought one."""
    try:
        for descriptor in letter.descriptors[:1]:
            sock = _sockets.adopt(descriptor)  # or it is no socket, and stays the letter's
            del letter.descriptors[0]
            with sock:
                if _sockets.is_unix(sock, socket.SOCK_STREAM):
                    _sockets.send_letter(sock, Answer(refusal=refusal).encode())
    except OSError:
        return  # whoever it was does not listen
    finally:
        letter.close()


def admit(visitor: Visitor, codec: Codec) -> Channel:
    """
    Answer a visitor: make the private pair and send its end; return ours as a channel.

    The visitor's k1 stays open, and the caller's to close.

    Raises:
        OSError: he is gone, does not listen, or takes no descriptors.
    """
    ours, theirs = _sockets.private_pair()
    try:
        # step: answering
        _sockets.send_letter(visitor.socket, Answer(codec).encode(), [theirs.fileno()])
        return _make_channel(visitor.letter, ours, visitor.socket)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()


def refuse(visitor: Visitor, refusal: Refusal) -> None:
    """Tell a visitor why he may not come in, if he listens, and close his socket."""
    try:
        _sockets.send_letter(visitor.socket, Answer(refusal=refusal).encode())
    except OSError:
        return
    finally:
        visitor.close()
