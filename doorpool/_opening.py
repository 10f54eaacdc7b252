"""
Opening a channel: knock and answer, where each side learns who the other is.

    client                                    server
    makes a pair k0, k1
    knock: sends k1 on the door,    ------->  believes it only if whoever made k1 sent it
    with its credentials                      makes a second pair p0, p1
    believes it only if whoever     <-------  answer: sends p1 on k1,
    made p1 sent it                           with its credentials
    closes k0; p1 is the channel              p0 is the channel; k1 is kept until the answer
                                              was read and k0 closed (``doorpool._guests``)

Where pickle is spoken, and both sides can use one, the answer brings a shared page as well
(``_shuttle.c``): it goes from the server to the client and never the other way, and the client
maps it when it believes the server, not before.

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

*A knock is looked at first, and taken from the port when it has been dealt with.*  A receive for
which the table has no room loses what it was to bring; a peek (``MSG_PEEK``) loses nothing, and
the knock waits in the queue until there is room.  Taking it brings nothing along any more, and
closes nothing for good, for what it brought is held until then.

Nothing here ever waits, nor closes what may make us wait (``doorpool._janitor``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable

import attrs

from doorpool import _sockets, _wire
from doorpool._channel import Channel
from doorpool._credentials import (
    Credentials,
    Ids,
    credentials_of,
    is_strange,
    peer_groups,
    peer_pidfd,
    peer_ucred,
    same_process,
    unpack_ids,
)
from doorpool._errors import SHORTAGE, AccessError, ProtocolError
from doorpool._impl import shuttle
from doorpool._janitor import close_all, close_later, close_socket
from doorpool._sockets import MSG_DONTWAIT, MSG_PEEK, Letter
from doorpool._wire import Answer, Codec, Knock, Refusal

#: Room to look at a knock with: credentials, a pidfd and two descriptors, of which a good one
#: brings one.  (If there is no pidfd, more find room; if there are more, no pidfd does.)
_LOOK = _sockets.WHO_ROOM + socket.CMSG_SPACE(4) + socket.CMSG_SPACE(4)


def _describe(ids: Ids) -> str:
    return f"pid {ids[0]}, uid {ids[1]}, gid {ids[2]}"


def take_socket(letter: Letter, what: str, kind: int, besides: int = 0) -> socket.socket:
    """
    Take the one socket out of a letter, where it is the first, if the letter's sender made it.

    Args:
        besides: how many descriptors come with it, and stay.

    Raises:
        ProtocolError: the letter does not carry just one socket of that kind and credentials.
        AccessError: somebody else made the socket: this was relayed, or forged.
    """
    if letter.truncated or len(letter.descriptors) != 1 + besides:
        raise ProtocolError(f"{what} must bring one socket, not {len(letter.descriptors)} descriptors")
    if letter.ids is None or (letter.ids[0] <= 0 and letter.pidfd < 0):
        raise ProtocolError(f"{what} came without the sender's credentials")
    letter.forged = True  # unless it turns out that it is not
    sock = _adopt(letter, what, kind)
    try:
        _check_maker(sock, letter, what, kind)
    except BaseException:
        letter.descriptors.insert(0, sock.detach())
        raise
    letter.forged = False
    return _sockets.own(sock)


def _adopt(letter: Letter, what: str, kind: int) -> socket.socket:
    assert letter.ids is not None
    number, why = letter.descriptors[0], "local socket"
    if not is_strange(letter.ids[1]) or _sockets.domain_of(number) == socket.AF_UNIX:
        del letter.descriptors[0]  # at no moment two owners: Ctrl-C may come at any
        try:
            return _sockets.adopt(number, kind)
        except OSError as error:
            why = f"socket ({error.strerror})"
        letter.descriptors.insert(0, number)
    raise ProtocolError(f"{what} brought a descriptor that is no {why}")


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
        if error.errno in SHORTAGE:
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
    """
    An opened channel, before anything of it is believed: ``codec`` and ``channel.peer`` decide.

    Attributes:
        letter: it came with; the owner, for whoever has this, of the memory of the shared page.
        page_size: what that is said to have, in bytes; 0: there is none.
        segments: segments may be used.
    """

    channel: Channel
    codec: Codec
    letter: Letter
    page_size: int = 0
    segments: bool = False

    @property
    def page(self) -> int:
        """The descriptor of the memory of the shared page, -1 for none; it stays the letter's."""
        return self.letter.descriptors[0] if self.page_size else -1

    def close_letter(self) -> None:
        """Close what has come along, which is mapped by now or never will be."""
        close_all(self.letter.descriptors, self.channel.peer.uid)
        self.letter.close()


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
        if letter.truncated or letter.short:  # there was room for all that a letter can bring
            raise OSError(errno.EMFILE, "no free descriptor for a channel of the door")
        if not letter.data:
            raise EOFError("the knock was dropped")
        # step: answer-heard
        answer = _wire.decode_answer(letter.data)
        if answer.refusal is None:
            return _opened_by(letter, answer)
    except BaseException:
        discard(letter)
        raise
    discard(letter)
    return answer.refusal


def _opened_by(letter: Letter, answer: Answer) -> Opened:
    """Take what an answer brings: the channel, and the page behind it if there is one."""
    if (answer.page or answer.segments) and answer.codec is not Codec.PICKLE:
        raise ProtocolError("the answer to a knock shares memory where no pickle is spoken")
    if answer.page and len(letter.descriptors) != 2:
        raise ProtocolError("the answer to a knock promised a page, and brought none")
    channel = _channel_of(letter, pages=1 if answer.page else 0)
    return Opened(channel, answer.codec, letter, answer.page, answer.segments)


def _channel_of(letter: Letter, pages: int) -> Channel:
    sock = take_socket(letter, "the answer to a knock", socket.SOCK_SEQPACKET, pages)
    try:
        if _sockets.unread(sock) and sock.recv(4, MSG_PEEK | MSG_DONTWAIT) == _wire.GREETING_MAGIC:
            raise ProtocolError("the answer to a knock brought a door in place of a channel")
        sock.settimeout(None)
        assert letter.ids is not None
        return _make_channel(letter, sock, credentials_of(letter.ids, peer_groups(sock), letter.pidfd))
    except BaseException:
        close_socket(sock, _uid(letter))
        raise


def discard(letter: Letter) -> None:
    """Close all that nobody has taken out of a letter."""
    if letter.descriptors:
        close_later(letter.descriptors, _uid(letter))
    letter.close()


def _uid(letter: Letter) -> int | None:
    return None if letter.ids is None else credentials_of(letter.ids, None).uid


def _make_channel(letter: Letter, sock: socket.socket, peer: Credentials) -> Channel:
    """Make a channel whose peer is the sender of a letter."""
    channel = Channel(sock, peer, letter.ucred)
    channel.pidfd, letter.pidfd = letter.pidfd, -1  # with no call in between, in which Ctrl-C might come
    if channel.pidfd >= 0:
        _sockets.own_number(channel.pidfd)
    return channel


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
        """Let k1 go, and what is left of the letter; idempotent."""
        leave(self.socket, self.credentials.uid)
        discard(self.letter)

    def put_back(self) -> None:
        """Drop what was only a copy: the knock is looked at again later."""
        self.socket.close()
        discard(self.letter)


def leave(k1: socket.socket, uid: int | None) -> None:
    """Close k1, on which the client writes nothing; if he did, what he sent is the janitors'."""
    close_socket(k1, uid)


@attrs.frozen
class Misfit:
    """
    A message on a port that was no good knock; the server refuses it.

    Attributes:
        letter: what came.
        refusal: why it was none.
    """

    letter: Letter
    refusal: Refusal

    @property
    def credentials(self) -> Credentials | None:
        """Who has sent it, as far as the kernel says."""
        return None if self.letter.ids is None else credentials_of(self.letter.ids, None)

    def close(self) -> None:
        """Drop what it brought; idempotent."""
        discard(self.letter)

    put_back = close


def hear_knock(
    port: socket.socket, has_room: Callable[[int | None], bool] = lambda _: True
) -> Visitor | Misfit | None:
    """
    Look at the next knock at a port; it stays there until ``forget_knock``.

    Args:
        has_room: tells whether a user's message may bring as many descriptors as there can be.

    Returns:
        The visitor; or a message that was no good knock; or None at the end: no holder is
        left, or one whose message cannot be taken in.

    Raises:
        BlockingIOError: nobody has knocked.
        OSError: one of ``SHORTAGE``; look again later.
    """
    letter = _look(port, _wire.LETTER_SIZE, _LOOK)
    if not letter.data and not letter.ucred:
        return None
    try:
        if len(letter.descriptors) > 1:
            return _misfit_with_many(port, letter, has_room)
        if letter.truncated or letter.short:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return _visitor(letter)
    except (ProtocolError, AccessError) as error:
        reason = _wire.Reason.DENIED if isinstance(error, AccessError) else _wire.Reason.PROTOCOL
        return Misfit(letter, Refusal(reason, str(error)))
    except BaseException:
        discard(letter)
        raise


def _misfit_with_many(
    port: socket.socket, letter: Letter, has_room: Callable[[int | None], bool]
) -> Misfit | None:  # fmt: skip
    """Take all the descriptors in hand that a message brings, or else have its port closed with it."""
    discard(letter)
    if not has_room(_uid(letter)):
        return None
    letter = _look(port, _wire.LETTER_SIZE)
    if letter.truncated:
        discard(letter)
        return None
    text = f"a knock must bring one socket, not {len(letter.descriptors)} descriptors"
    return Misfit(letter, Refusal(_wire.Reason.PROTOCOL, text))


def whose_knock(port: socket.socket) -> int | None:
    """Tell who has sent the next message at a port, without taking any descriptor in hand."""
    return _uid(_look(port, 1, _sockets.WHO_ROOM))


def _look(port: socket.socket, size: int, room: int = _sockets.ANCILLARY_ROOM) -> Letter:
    try:
        return _sockets.receive_letter(port, size, MSG_PEEK, room)
    except ConnectionResetError:  # told once, instead: the other end went with something unread
        return _sockets.receive_letter(port, size, MSG_PEEK, room)


def forget_knock(port: socket.socket) -> None:
    """Take the knock that was looked at from its port; what it brought is in our hands already."""
    try:
        port.recv(1, MSG_DONTWAIT)
    except ConnectionResetError:  # told once, instead of the message
        port.recv(1, MSG_DONTWAIT)


def _visitor(letter: Letter) -> Visitor:
    words = _wire.decode_knock(letter.data)
    sock = take_socket(letter, "a knock", socket.SOCK_STREAM)
    try:
        assert letter.ids is not None
        who = credentials_of(letter.ids, peer_groups(sock), letter.pidfd)
        return Visitor(words, letter, sock, who)
    except BaseException:
        sock.close()
        raise


def close_port(port: socket.socket, uid: int | None) -> None:
    """
    Close a port, and what waits there unheard; idempotent, waits for nobody.

    Args:
        uid: of the stranger whose it is.  None of one of our own: who has its descriptor by now, and what
            he has sent, nobody knows.
    """
    with contextlib.suppress(OSError):
        port.shutdown(socket.SHUT_RDWR)  # so that nothing comes between the look and the close
    close_socket(port, uid)


def admit(visitor: Visitor, codec: Codec, *, spin: int = -1, rights: bool = True) -> Channel:
    """
    Answer a visitor: make the private pair and send its end; return ours as a channel.

    The visitor's k1 stays open, and the caller's to close.

    Args:
        spin: of the shared page, which there is if pickle is spoken and the visitor can use one.
        rights: he may send descriptors; else the kernel is asked to refuse them.

    Raises:
        OSError: he is gone, does not listen, or takes no descriptors.
    """
    ours, theirs = _sockets.private_pair()
    shared, memory = None, -1
    try:
        if not rights:
            _sockets.refuse_rights(ours)
        if codec is Codec.PICKLE and visitor.words.page:
            shared, memory = _make_page(visitor, ours, spin)
        # step: answering
        segments = codec is Codec.PICKLE and visitor.words.segments
        answer = Answer(codec, page=shuttle.PAGE_BYTES if shared else 0, segments=segments)
        gifts = [theirs.fileno(), memory] if shared else [theirs.fileno()]
        _sockets.send_letter(visitor.socket, answer.encode(), gifts)
        channel = _make_channel(visitor.letter, ours, visitor.credentials)
        channel.page = shared
        if segments:
            channel.use_segments()
        return channel
    except BaseException:
        if shared is not None:
            shared.close()
        ours.close()
        raise
    finally:
        theirs.close()
        if memory >= 0:
            os.close(memory)


def _make_page(visitor: Visitor, ours: socket.socket, spin: int) -> tuple[shuttle.Page | None, int]:
    """Make a page to share with a visitor; return it and its memory, or none: he can go without."""
    if visitor.words.page != shuttle.PAGE_BYTES:
        return None, -1
    letter, memory = visitor.letter, -1
    try:
        memory = shuttle.make_page()
        return shuttle.Page(memory, ours.fileno(), letter.ucred, letter.pidfd, spin), memory
    except (OSError, shuttle.PageError):  # no memory, no descriptor, no seals to be seen
        if memory >= 0:
            os.close(memory)
        return None, -1


def refuse(knock: Visitor | Misfit, refusal: Refusal) -> None:
    """Tell somebody why he may not come in, if he listens, and let him go."""
    try:
        if isinstance(knock, Visitor):
            _sockets.send_letter(knock.socket, Answer(refusal=refusal).encode())
        elif knock.letter.descriptors and not knock.letter.forged:
            _refuse_letter(knock.letter, refusal)
    except OSError:
        return
    finally:
        knock.close()


def _refuse_letter(letter: Letter, refusal: Refusal) -> None:
    """
    Send a refusal over a letter's descriptor, if it is such a socket as one knocks with, of the sender's own.

    To whomever else it leads, he would take what we say for our own user's word.
    """
    number = letter.descriptors[0]
    if _sockets.domain_of(number) != socket.AF_UNIX:
        return
    sock = _sockets.adopt(number)
    try:
        if _sockets.is_unix(sock, socket.SOCK_STREAM) and peer_ucred(sock) == letter.ucred:
            _sockets.send_letter(sock, Answer(refusal=refusal).encode())
    finally:
        sock.detach()
