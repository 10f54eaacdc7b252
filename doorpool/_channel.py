"""
A channel: one end of the private pair, on which calls go one at a time.

Nobody but the two ends ever held an end of the pair, so waiting on it is right.  Who is
at the other end was settled when it was opened; each receive compares the credentials
that came with the bytes to those of the opening, and anything else ends the channel: it
never changes who it is.  (An end that was inherited through a fork, passed on, or kept by
a process that changed its ids speaks with other credentials.)

The two ends use the same code.  A server reads with ``MSG_DONTWAIT`` and comes back
later for the rest of a frame; a client waits, and looks up each time its patience ends.

Waiting is done in ``poll``, and not inside a send or a receive.  Python begins those again
when a signal interrupts them, and the kernel then begins their time limits (``SO_RCVTIMEO``,
``SO_SNDTIMEO``) again too: under a timer signal of 1 kHz a call given 0.3 s waited until the
signals ended.  The time of a ``poll`` goes on.  But it takes 1 µs more, so the first moments
(``DOZE``, and a server thread's ``LINGER``) are waited for in the receive itself, where
nobody has set a time: only signals that go on for ever, each sooner than that, would prolong
them.

A frame is one packet or several, each of which goes and comes as a whole.  Descriptors come
with the first one or not at all, as many as the header says.  Packets it is, and no stream,
because on a stream whoever waits for a reply is woken for nothing when the other side takes
the request (the kernel wakes all that wait on a socket that may be written to again): 2 µs
of a null call on one CPU.  One thing is different with them: that something of ours was never
read is said once, and before what the other side had sent.
"""

from __future__ import annotations

import errno
import math
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence, Sized

from doorpool import _sockets
from doorpool._credentials import Credentials, own_ucred, sends_effective_ids_by_itself
from doorpool._errors import ProtocolError
from doorpool._impl import shuttle
from doorpool._janitor import close_all, close_socket
from doorpool._shelf import Shelf
from doorpool._sockets import (
    ANCILLARY_ROOM,
    MAX_DESCRIPTORS,
    MSG_PEEK,
    SCM_CREDENTIALS,
    WHO_ROOM,
    Ancillary,
    descriptors_in,
    rights,
)
from doorpool._wire import BELL, HEADER, KINDS, VERSION, Assembly, Frame, Reason, Refusal, frame_head

#: The most bytes of a packet, and what each look has room for: a longer one would be cut.  Of
#: twice as many the kernel would want 64 KiB in one piece, which it may not have.
PACKET = 65_536

#: A packet of which any socket takes one: the least that a send buffer can be is 4,608.
_LEAST = 4096

_MAX_VECTOR = 512  # views in one sendmsg or recvmsg; IOV_MAX of Linux is 1,024

_HEAD = HEADER.size

#: A frame whose data is shorter is one packet; joined to the header, for a copy is cheaper than
#: a vector.
JOIN = PACKET - _HEAD + 1

_pack, _unpack = HEADER.pack, HEADER.unpack_from

#: How long a first wait in the receive itself takes, seconds; see above.
DOZE = 0.01

#: Bells in a row, over which a peer rings without end; a full socket holds some 280.
MOST_BELLS = 512

#: How a ``read`` waits: not at all, in ``poll``, or in the receive itself (see above).
NOT, POLL, RECEIVE = range(3)

_RECEIVE = _sockets.MSG_CMSG_CLOEXEC | _sockets.MSG_DONTWAIT
_RECEIVE_WAITING = _sockets.MSG_CMSG_CLOEXEC
_SEND = _sockets.DONTWAIT
_NOT_AT_ONCE = frozenset({errno.EAGAIN, errno.EMSGSIZE})
_TRUNCATED = _sockets.MSG_TRUNCATED | _sockets.MSG_CUT


class Hangup(Exception):
    """
    The other end is closed.

    Attributes:
        unread: the kernel says that something of ours was never read there (ECONNRESET).
    """

    def __init__(self, unread: bool = False) -> None:
        super().__init__(unread)
        self.unread = unread


class Channel:
    """
    One end of the private pair of an opened channel.

    One thread at a time; who may be that one is the holder's affair.

    Attributes:
        peer: who is at the other end, fixed at opening.
        number: of the last call that was begun here.
        patience: seconds that one ``read`` waits at most; None: for ever.
        send_patience: seconds that one ``post`` waits for room at most; likewise.
        pidfd: of the process at the other end, -1 if there is none; the channel owns it.
        page: the memory that it shares with the other end (``_shuttle.c``), or None; the channel
            owns it.
        shelf: the segments that big buffers cross in, or None; likewise.
        news: true if the next message should say something about those.
        stowed: the last message that was sent had a manifest, which must be read at the other end.
        lent: lets go of the descriptors of the last message that had some; once the other end has it.
        make_room: asked before descriptors that a packet brings are taken in hand, if it is set, and raises
            what a ``read`` is to raise instead.  Each receive is preceded by a look then, which takes 1 µs.
    """

    __slots__ = (
        "_assembly",
        "_begun",
        "_ended",
        "_expected",
        "_explicit",
        "_fds",
        "_generation",
        "_lost",
        "_poll",
        "_reset",
        "_rest",
        "_surplus",
        "lent",
        "make_room",
        "news",
        "number",
        "page",
        "patience",
        "peer",
        "pidfd",
        "send_patience",
        "shelf",
        "socket",
        "stowed",
    )

    def __init__(self, sock: socket.socket, peer: Credentials, ucred: bytes, pidfd: int = -1) -> None:
        self.socket = sock
        self.peer = peer
        self.page: shuttle.Page | None = None
        self.shelf: Shelf | None = None
        self._fds: list[int] = []
        self._generation = _sockets.generation
        self.pidfd = pidfd if pidfd < 0 else _sockets.own_number(pidfd)
        self._ended = False  # from here on there is what ``close`` looks at
        self.number = 0
        self._expected: Ancillary = [(socket.SOL_SOCKET, SCM_CREDENTIALS, ucred)]
        self._explicit = not sends_effective_ids_by_itself()
        self._assembly: Assembly | None = None
        self._surplus = 0
        self._rest = b""
        self._begun = False  # something of these three is left to go on with
        self._lost = False
        self._reset = False  # the kernel has said that something of ours was never read
        self.patience: float | None = None
        self.send_patience: float | None = None
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.news: Sized = ()
        self.stowed = False
        self.lent: Callable[[], None] | None = None
        self.make_room: Callable[[], None] | None = None

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # A channel lost between two byte codes (Ctrl-C), or half made, closes without a warning.  When
        # the interpreter ends, the modules it needs may be gone, and the kernel closes all.
        if not _ending() and not getattr(self, "_ended", True):
            self.close()

    def fileno(self) -> int:
        """Return the descriptor, -1 once closed."""
        return self.socket.fileno()

    @property
    def closed(self) -> bool:
        """Whether this end was closed."""
        return self.socket.fileno() < 0

    def share(self, memory: int, spin: int) -> None:
        """
        Share a page with the other end from now on.

        Args:
            memory: the descriptor of it; it stays the caller's.
            spin: nanoseconds that a wait looks before it parks; -1: as long as it is worth it.

        Raises:
            ProtocolError: it is no page.
            OSError: it cannot be mapped.
        """
        try:
            self.page = shuttle.Page(memory, self.socket.fileno(), self._expected[0][2], self.pidfd, spin)
        except shuttle.PageError as error:
            raise ProtocolError(str(error)) from None

    def use_segments(self) -> None:
        """Have big buffers cross in segments from now on; the other end must know."""
        self.shelf = Shelf()
        self.news = self.shelf.news

    def stow(
        self, buffers: Sequence[memoryview], descriptors: Sequence[int]
    ) -> tuple[bytes, Sequence[memoryview], Sequence[int]]:
        """
        Put big buffers into segments.

        What was stowed must be sent, or the channel closed.

        Returns:
            The manifest, b"" for none, and what goes beside it: buffers, descriptors.
        """
        self.stowed = False
        if self.shelf is None or not (buffers or self.news):
            return b"", buffers, descriptors
        cargo = self.shelf.load(buffers, MAX_DESCRIPTORS - len(descriptors))
        if cargo is None:
            return b"", buffers, descriptors
        self.stowed = True
        return cargo.manifest, cargo.inline, [*descriptors, *cargo.descriptors]

    def unstow(
        self, manifest: bytes | bytearray, buffers: Sequence[bytearray | memoryview], descriptors: list[int]
    ) -> Sequence[bytearray | memoryview]:  # fmt: skip
        """
        Find the buffers of a message again; the descriptors of new segments are taken off their list.

        Raises:
            ProtocolError: the manifest is untrue, or there may be none.
            OSError: a segment cannot be had; never BlockingIOError.
        """
        if self.shelf is None:
            close_all(descriptors, self.peer.uid)
            raise ProtocolError("a manifest on a channel without segments")
        try:
            return self.shelf.unload(manifest, buffers, descriptors)
        except BaseException as error:
            close_all(descriptors, self.peer.uid)
            if isinstance(error, BlockingIOError):  # whoever reads would take it for "nothing has come yet"
                raise OSError(f"a segment cannot be had: {error}") from error
            raise

    def doze(self, seconds: float) -> None:
        """Bound how long a ``read`` waits in the receive itself."""
        _sockets.set_patience(self.socket, socket.SO_RCVTIMEO, seconds)

    @property
    def begun(self) -> int:
        """How many bytes the frame has, by its own account, of which a part has come; 0 if none has."""
        assembly = self._assembly
        if assembly is None or assembly.fields is None or assembly.refusal is not None:
            return 0
        return assembly.fields[5]

    @property
    def brought(self) -> int:
        """How many descriptors have come with such a part."""
        return len(self._fds)

    def shutdown(self) -> None:
        """Wake whoever blocks on either end; idempotent."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the other end is gone, or ours is closed

    def close(self) -> None:
        """Close this end, and what had arrived of an unfinished frame; idempotent."""
        if self.page is not None:
            self.page.close()  # while the number that it rings at is still ours
        if self.shelf is not None:
            self.shelf.close()
        close_socket(self.socket, self.peer.uid)
        pidfd, self.pidfd = self.pidfd, -1
        # In a forked child it is closed already, and the number may be somebody else's.
        if pidfd >= 0 and self._generation == _sockets.generation:
            _sockets.close_number(pidfd)
        close_all(self._fds, self.peer.uid)
        self.make_room = None  # which leads back here
        self._ended = True

    # -- sending -----------------------------------------------------------------------

    def post(
        self,
        kind: int,
        number: int,
        data: bytes | bytearray | memoryview = b"",
        buffers: Sequence[memoryview] = (),
        descriptors: Sequence[int] = (),
        nanoseconds: int = 0,
        sent: int = 0,
        patience: Callable[[Channel, float | None], None] | None = None,
        deadline: float | None = None,
        manifest: bytes = b"",
    ) -> None:
        """
        Send one frame, waiting for the other side to take it.

        Args:
            kind, number, data, buffers, nanoseconds, sent: of the frame; memory as ``flat``
                makes it.
            descriptors: go with its first byte; they stay the caller's.
            patience: called with the channel and the deadline when a send has made no
                progress for the send patience, and between the steps of a long one; it
                raises to give up.  Without it the first time without progress raises.

        Raises:
            OSError: the other side is gone (nobody acts on a part of a frame).
            TimeoutError: no progress, and no ``patience``.
        """
        if not buffers and not descriptors and not manifest and len(data) < JOIN and not self._explicit:
            whole = _pack(kind, VERSION, 0, 0, number, len(data), nanoseconds, sent) + data
            try:
                self.socket.send(whole, _SEND)
                return
            except OSError as error:
                if error.errno not in _NOT_AT_ONCE:
                    raise
            self._send_views([memoryview(whole)], (), patience, deadline)
            return
        if manifest:
            buffers = [memoryview(manifest), *buffers]
        count = len(descriptors)
        head = frame_head(kind, number, data, buffers, count, nanoseconds, sent, manifest=bool(manifest))
        views = [memoryview(head), memoryview(data), *buffers]
        self._send_views([view for view in views if view.nbytes], descriptors, patience, deadline)

    def _send_views(
        self,
        views: list[memoryview],
        descriptors: Sequence[int],
        patience: Callable[[Channel, float | None], None] | None,
        deadline: float | None,
    ) -> None:
        ancillary: Ancillary = []
        if self._explicit:
            ancillary.append((socket.SOL_SOCKET, SCM_CREDENTIALS, own_ucred()))
        first = [*ancillary, rights(descriptors)] if descriptors else ancillary
        most = PACKET
        while views:
            try:
                sent = self.socket.sendmsg(_step(views, most), first, _SEND)
            except BlockingIOError:
                if self._has_room():
                    continue
                if patience is None:
                    raise TimeoutError("the other side reads nothing") from None
                patience(self, deadline)
                continue
            except OSError as error:
                if error.errno != errno.EMSGSIZE or most <= _LEAST:
                    raise
                most //= 2  # the socket's buffer (SO_SNDBUF, net.core.wmem_default) is smaller than a packet
                continue
            first = ancillary
            _advance(views, sent)
            # step: part-sent
            if views and patience is not None:
                patience(self, deadline)  # who reads a byte now and then would keep us here for ever

    def _has_room(self) -> bool:
        """Wait for room to send, for at most the send patience; tell whether there is some."""
        poll = select.poll()
        poll.register(self.socket, select.POLLOUT)
        return bool(poll.poll(None if self.send_patience is None else self.send_patience * 1000))

    def say(self, kind: int, number: int, data: bytes = b"") -> None:
        """
        Send a small frame at once or not at all, such as last words.

        A peer that is gone misses it; so does one that has not read what it asked for
        before, and no thread waits for him.
        """
        whole = frame_head(kind, number, data) + data
        ancillary = [(socket.SOL_SOCKET, SCM_CREDENTIALS, own_ucred())] if self._explicit else []
        try:
            self.socket.sendmsg([whole], ancillary, _SEND)
        except OSError:
            return

    # -- receiving ---------------------------------------------------------------------

    def read(
        self,
        limit: int,
        how: int = POLL,
        now: Callable[[], int] | None = None,
        deadline: float | None = None,
    ) -> Frame | None:
        """
        Return the next frame once it is whole; None if there is nothing (more) to read now.

        A frame that comes in pieces does not hold a thread for longer than the patience
        either, however fast or slowly it comes.  What has come of it is kept for the next time.

        Args:
            limit: how many bytes of data and buffers are allowed.  A frame over it is
                returned as soon as its header is here, with ``refusal`` set, and its
                body is thrown away as it comes.
            how: ``NOT``: "now" is at once.  ``POLL``: when the patience ends.  ``RECEIVE``:
                when that of ``doze`` ends, or a part of a frame is here.
            now: says what the limit is by the time that something has come.
            deadline: by ``time.monotonic()``; an unfinished frame is left then.

        Raises:
            Hangup: the other end is closed.
            ProtocolError: what came is no frame, or not from whom it must be.
        """
        if how == POLL and not self._rest and not self._poll.poll(self.patience and self.patience * 1000):
            return None
        try:
            if self._begun:
                return self._read_on(limit, now, self._until(deadline))
            flags = _RECEIVE_WAITING if how == RECEIVE else _RECEIVE
            if self.make_room is not None:
                self._look_first(self.make_room, flags)
            chunk, ancillary, came, _ = self.socket.recvmsg(PACKET, ANCILLARY_ROOM, flags)
            if chunk == BELL and ancillary == self._expected:  # for somebody who does not wait any more
                chunk, ancillary, came = self._skip_bells()
            if ancillary == self._expected and not came & _TRUNCATED and len(chunk) >= _HEAD:
                # Nearly every call goes this way: a small frame, whole, from whom it must be.
                kind, version, fds, buffers, number, body, nanoseconds, sent = _unpack(chunk)
                plain = version == VERSION and kind in KINDS and not fds and not buffers
                if plain and body == len(chunk) - _HEAD <= limit:
                    return Frame(kind, number, nanoseconds, sent, chunk[_HEAD:])
            self._begun = True
            self._check(chunk, ancillary, came, first=True)
            limit = limit if now is None else now()
            self._assembly = Assembly()
            self._assembly.feed(chunk, limit)
            return self._assemble(self._assembly, limit, self._until(deadline))
        except BlockingIOError:
            if how != POLL:
                return None
            go_on = self._wait_for_more
        except ProtocolError:
            raise
        except ConnectionResetError:
            self._reset = True
            go_on = self._look_again  # what the other side had sent is still there
        except ConnectionError:
            raise Hangup(unread=self._reset) from None
        # Here and not above, where the error's traceback holds what is being filled.
        return go_on(limit, now, deadline)

    def _skip_bells(self) -> tuple[bytes, Ancillary, int]:
        """
        Receive what is behind a bell, without waiting for it.

        A peer can ring as fast as we hear, and we would have time for nothing else.
        """
        for _ in range(MOST_BELLS):
            if self.make_room is not None:
                self._look_first(self.make_room)
            chunk, ancillary, came, _ = self.socket.recvmsg(PACKET, ANCILLARY_ROOM, _RECEIVE)
            if chunk != BELL or ancillary != self._expected:
                return chunk, ancillary, came
        raise ProtocolError(f"{MOST_BELLS} bells in a row")

    def _look_again(
        self, limit: int, now: Callable[[], int] | None, deadline: float | None
    ) -> Frame | None:  # fmt: skip
        return self.read(limit, NOT, now, deadline)

    def _wait_for_more(
        self, limit: int, now: Callable[[], int] | None, deadline: float | None
    ) -> Frame | None:  # fmt: skip
        """Wait for the rest of a frame of which something is here, or that was not there after all."""
        until = self._until(deadline)
        while (left := until - time.monotonic()) > 0:
            self._poll.poll(None if left == math.inf else left * 1000)
            frame = self.read(limit, NOT, now, deadline)
            if frame is not None:
                return frame
        return None

    def _until(self, deadline: float | None) -> float:
        """Return when this look must end, be the frame whole or not."""
        until = math.inf if self.patience is None else time.monotonic() + self.patience
        return until if deadline is None else min(until, deadline)

    def _read_on(self, limit: int, now: Callable[[], int] | None, until: float) -> Frame:
        """Go on where the last look ended: in a refused body, in a frame, or behind one."""
        if self._surplus:
            self._skip(until)
        if self._assembly is None:
            chunk, self._rest = self._rest or self._receive(first=True), b""
            if chunk == BELL:
                chunk, ancillary, came = self._skip_bells()
                self._check(chunk, ancillary, came, first=True)
            limit = limit if now is None else now()
            self._assembly = Assembly()
            self._assembly.feed(chunk, limit)
        return self._assemble(self._assembly, limit, until)

    def _assemble(self, assembly: Assembly, limit: int, until: float) -> Frame:
        while not assembly.complete:
            if time.monotonic() >= until:
                raise BlockingIOError
            views = _step(assembly.views() or [])
            if sum(map(len, views)) == PACKET:
                size = self._receive_into(views)
                views.clear()  # full, they may be followed by more of what they are views of
                assembly.filled(size)
            else:  # the next packet may not end where they end
                views.clear()
                assembly.feed(memoryview(self._receive()), limit)
            # step: part-read
        self._assembly = None
        self._surplus, self._rest = assembly.surplus, assembly.rest
        self._begun = bool(self._surplus or self._rest)
        frame = self._with_descriptors(assembly.frame(), assembly)
        manifest = assembly.manifest
        if manifest is not None and frame.refusal is None:
            frame.buffers = self.unstow(manifest, frame.buffers, frame.descriptors)
        return frame

    def _with_descriptors(self, frame: Frame, assembly: Assembly) -> Frame:
        """Give the frame the descriptors that came with it: all that it names, or none."""
        assert assembly.fields is not None
        claimed = assembly.fields[2]
        came, self._fds = self._fds, []
        lost, self._lost = self._lost, False
        if not lost and len(came) != claimed:
            error = ProtocolError(f"a frame claims {claimed} descriptors and brought {len(came)}")
            close_all(came, self.peer.uid)
            raise error
        if lost or frame.refusal is not None:
            close_all(came, self.peer.uid)
        if lost and frame.refusal is None:
            frame.refusal = Refusal(Reason.DESCRIPTORS_LOST, value=claimed)
        frame.descriptors = came
        return frame

    def _skip(self, until: float) -> None:
        """Throw away what is left of a body that was refused."""
        while self._surplus:
            if time.monotonic() >= until:
                raise BlockingIOError
            self._surplus -= len(self._receive())
            if self._surplus < 0:
                raise ProtocolError("bytes behind the end of a frame")

    def _look_first(self, make_room: Callable[[], None], flags: int = _RECEIVE) -> None:
        """Have room made for the descriptors of the next packet, which is looked at without taking them."""
        came = self.socket.recvmsg(1, WHO_ROOM, flags | MSG_PEEK)[2]
        if came & _sockets.MSG_TRUNCATED:  # there is more than credentials
            if self._fds or self._assembly is not None or self._surplus:
                raise ProtocolError("descriptors in the middle of a frame")
            make_room()

    def _receive(self, *, first: bool = False) -> bytes:
        if self.make_room is not None:
            self._look_first(self.make_room)
        data, ancillary, came, _ = self.socket.recvmsg(PACKET, ANCILLARY_ROOM, _RECEIVE)
        self._check(data, ancillary, came, first)
        return data

    def _receive_into(self, views: list[memoryview]) -> int:
        if self.make_room is not None:
            self._look_first(self.make_room)
        size, ancillary, came, _ = self.socket.recvmsg_into(views, ANCILLARY_ROOM, _RECEIVE)
        self._check(size, ancillary, came, first=False)
        return size

    def _check(self, received: bytes | int, ancillary: Ancillary, came: int, first: bool) -> None:
        """Check whom some bytes are from, and what came with them; each receive ends up here."""
        if not received:
            for item in ancillary:  # an empty packet may bring descriptors
                if item[1] == socket.SCM_RIGHTS:
                    self._fds += descriptors_in(item[2])
                    self._ended = False
            raise ConnectionAbortedError  # end of file, whose "credentials" nobody sent
        if ancillary != self._expected or came & _TRUNCATED:
            self._examine(ancillary, came, first)

    def _examine(self, ancillary: Ancillary, came: int, first: bool) -> None:
        """Take the descriptors that came along; refuse any other sender."""
        others: Ancillary = []
        for item in ancillary:
            if item[:2] == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds += descriptors_in(item[2])
                self._ended = False  # even if it was closed meanwhile
            else:
                others.append(item)
        if came & _sockets.MSG_CUT:
            close_all(self._fds, self.peer.uid)
            raise ProtocolError("a packet that is longer than any may be")
        self._lost = self._lost or bool(came & _TRUNCATED)
        if others != self._expected:
            close_all(self._fds, self.peer.uid)
            raise ProtocolError("bytes on a channel from somebody else than the one who opened it")
        if not first and (self._fds_came(ancillary) or came & _TRUNCATED):
            close_all(self._fds, self.peer.uid)
            raise ProtocolError("descriptors in the middle of a frame")

    @staticmethod
    def _fds_came(ancillary: Ancillary) -> bool:
        return any(item[1] == socket.SCM_RIGHTS for item in ancillary)


def flat(memory: memoryview) -> memoryview:
    """
    Return memory as a row of bytes, so that its ``len`` is its size.

    Raises:
        ValueError: it is not in one piece.
    """
    if not memory.c_contiguous:
        raise ValueError("memory that is not in one piece (C-contiguous) cannot be sent; copy it first")
    # What is empty in several dimensions cannot be cast.
    return memory.cast("B") if memory.nbytes else memoryview(b"")


def _step(views: list[memoryview], most: int = PACKET) -> list[memoryview]:
    """Return the next few views, no more bytes than go into one packet."""
    step, size = [], 0
    for view in views[:_MAX_VECTOR]:
        step.append(view[: most - size])
        size += step[-1].nbytes
        if size >= most:
            break
    return step


def _advance(views: list[memoryview], size: int) -> None:
    """Drop so many bytes from the front."""
    gone = 0
    while gone < len(views) and size >= views[gone].nbytes:
        size -= views[gone].nbytes
        gone += 1
    del views[:gone]
    if size:
        views[0] = views[0][size:]


def process_is_gone(pidfd: int) -> bool:
    """Tell whether the process of a pidfd has ended; False where there is none to ask."""
    if pidfd < 0:
        return False
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
