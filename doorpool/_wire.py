"""
The wire format: bytes in, bytes out; no socket, no clock, no thread.

All numbers are little-endian.  Version 1 of everything below.

*Greeting* (server -> every holder of a descriptor, one SEQPACKET message, only ever
peeked at): what the door says of itself.  A claim, good for choosing how to marshal.

     0  4  "dpGR"                             40  8  max_request, bytes
     4  2  version                            48  4  max_descriptors
     6  1  codec                              52  2  attributes, a bit set
     7  1  0                                  54  2  0
     8 16  door id                            56  4+n  name, UTF-8, behind its length
    24  2  Python major, minor                    4+n  doc        (the same)
    26 14  0                                      4+n  signature  (the same)
                                                  4+n  methods    (the same; see ``_objects``)
                                              end 16   identity of __main__ (0: none)

*Knock* (client -> server on a descriptor, one message, with one end of a fresh stream
pair and the client's credentials attached):

     0  4  "dpKN"                              8 16  identity of __main__
     4  2  version                            24  4  size of the page to be shared (0: none)
     6  2  Python major, minor                28  4  1 if segments may be used

The last two are left out where both are 0.

*Answer* (server -> client on that pair, one message, with one end of the private pair, the
shared page if there is one, and the server's credentials attached; a refusal brings neither):

     0  4  "dpAN"                              8  4  size of the shared page: as asked for, or 0: none
     4  2  version                            12  4  1 if segments may be used
     6  1  0 accepted, 1 refused              16  …  refusal, where the answer is one
     7  1  codec

A *ping* may carry the word "open": its answer then brings a fresh descriptor of the door.

*Bell* (both ways, one message of one byte, "B"): there is something in the shared page; no part
of a frame, and behind none that is not whole.

*Frame* (both ways on the private pair, in one SEQPACKET message or several of at most
65,536 bytes; the end of a frame is the end of a message):

     0  1  kind: Q request, R reply, F failure, P ping, A answer to it, G goodbye
     1  1  version
     2  2  descriptors that came with the first message
     4  4  buffers; the highest bit: the first of them is a manifest (``_manifest``)
     8  8  call number: counts up from 1 on each channel; a reply bears its request's
    16  8  length of all that follows
    24  8  request: nanoseconds left for the call, 0 for no deadline; else 0
    32  8  request: when it was sent, nanoseconds on CLOCK_MONOTONIC (a claim); else 0
    40     8 bytes a buffer: its length; then the data, then the buffers

*Refusal* (the body of a failure, a goodbye, a refusing answer; behind "dpBY" and a
version on a descriptor whose door was revoked, where it is only counted, never read):

     0  1  reason
     1  1  1 if the procedure may have run
     2  6  0
     8  8  the limit, where there is one
    16  8  the value that was over it
    24  …  text, UTF-8

What a side does not speak it refuses in words: the first eight bytes of an answer and
the refusal behind them keep their places in every version to come, so an older or newer
client can show them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache

import attrs

from doorpool._errors import ProtocolError

VERSION = 1

GREETING_SIZE = 65_536  #: The most that a greeting takes; names and docs are cut to fit.
LETTER_SIZE = 4_096  #: The most that a knock or an answer takes.
MAX_BUFFERS = 65_536  #: The most buffers in a frame: 512 KiB of table.

#: A frame with a manifest has this bit in its number of buffers; and what a manifest takes does not
#: count toward the limit of a request.
MANIFEST = 1 << 31
MANIFEST_SIZE = 1 << 22

#: How much of a frame is allocated before it comes; a step of ``_channel``.
AHEAD = 1 << 20
_ZEROS = memoryview(bytes(AHEAD))
_MOST_VIEWS = 512  # handed out at a time; as many as one recvmsg is given

ID_SIZE = 16
NO_MAIN = bytes(16)

_GREETING = struct.Struct("<4sHBB16sBB14xQIHH")
_KNOCK = struct.Struct("<4sHBB16s")
_SHARED = struct.Struct("<II")
_ANSWER = struct.Struct("<4sHBBII")
_REFUSAL = struct.Struct("<BB6xQQ")
_FAREWELL = struct.Struct("<4sH")
_LIMITS = struct.Struct("<QII")
HEADER = struct.Struct("<BBHIQQQQ")
_LENGTH = struct.Struct("<I")

GREETING_MAGIC = b"dpGR"
KNOCK_MAGIC = b"dpKN"
ANSWER_MAGIC = b"dpAN"
FAREWELL_MAGIC = b"dpBY"

BELL = b"B"

#: The data of a ping whose answer shall bring a fresh descriptor of the door; behind it may be for whom.
HAND_OUT = b"open"

_UID = struct.Struct("<I")
_NO_UID = 2**32 - 1


class Codec(IntEnum):
    """How values are written on a channel; the server's choice, fixed when it opens."""

    RAW = 0
    PICKLE = 1
    DATA = 2  # MessagePack; see doorpool._data


_CODECS = {int(codec): codec for codec in Codec}


class Attribute(IntEnum):
    """A bit of a door's attributes, as the greeting carries them."""

    PRIVATE = 1
    REFUSE_DESCRIPTORS = 2
    OBJECT = 4
    CONTEXT_MANAGER = 8


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = ord("Q")
    REPLY = ord("R")
    FAILURE = ord("F")
    PING = ord("P")
    PONG = ord("A")
    GOODBYE = ord("G")


KINDS = frozenset(int(kind) for kind in Kind)


class Reason(IntEnum):
    """Why a call, a channel or an opening was refused."""

    ABORTED = 1  # the invocation was dropped without an answer
    TOO_LARGE = 2  # more bytes than the door's max_request
    TOO_MANY_DESCRIPTORS = 3
    REFUSES_DESCRIPTORS = 4
    DESCRIPTORS_LOST = 5  # the server's table was full
    REVOKED = 6
    CLOSED = 7  # the server is closing
    IDLE = 8  # the server has closed an idle channel; open another
    BUSY = 9
    DENIED = 10  # these two may not talk
    UNSPOKEN = 11  # another version of this protocol
    PROTOCOL = 12
    REPLY_TOO_LARGE = 13


def _stretch(text: bytes, size: int) -> bytes:
    """Cut UTF-8 to a size, between characters."""
    return text if len(text) <= size else text[:size].decode("utf-8", "ignore").encode()


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "replace")


# -- greeting ------------------------------------------------------------------------


@attrs.frozen
class Greeting:
    """What a door says of itself."""

    id: bytes
    codec: Codec
    name: str
    python: tuple[int, int]
    main: bytes = NO_MAIN
    max_request: int = 2**30
    max_descriptors: int = 253
    attributes: int = 0
    doc: str = ""
    signature: str = ""
    methods: str = ""

    def encode(self) -> bytes:
        """Write the greeting as one message of at most ``GREETING_SIZE`` bytes."""
        head = _GREETING.pack(
            GREETING_MAGIC, VERSION, self.codec, 0, self.id, *self.python,
            self.max_request, self.max_descriptors, self.attributes, 0,
        )  # fmt: skip
        texts = [
            (self.name, 1_024), (self.doc, 32_768), (self.signature, 16_384), (self.methods, 14_000),
        ]  # fmt: skip
        fields = [_stretch(text.encode("utf-8", "replace"), size) for text, size in texts]
        return head + b"".join(_LENGTH.pack(len(f)) + f for f in fields) + self.main


@attrs.frozen
class Limits:
    """What a door takes; said in its greeting, and again in each answer to a ping."""

    max_request: int
    max_descriptors: int
    attributes: int

    def encode(self) -> bytes:
        """Write them as the data of an answer to a ping."""
        return _LIMITS.pack(self.max_request, self.max_descriptors, self.attributes)


def decode_limits(data: bytes | bytearray) -> Limits | None:
    """Read the limits in an answer to a ping; None if it says nothing of them."""
    return Limits(*_LIMITS.unpack_from(data)) if len(data) >= _LIMITS.size else None


def decode_greeting(data: bytes) -> Greeting | None:
    """
    Read a greeting; None if this is none at all.

    Raises:
        ProtocolError: it is one, of a version not spoken here or malformed.
    """
    if data[:4] != GREETING_MAGIC:
        return None
    check_version(data, "the door")
    try:
        return _decode_greeting(data)
    except (struct.error, ValueError, IndexError) as error:
        raise ProtocolError(f"the door's greeting is malformed: {error}") from None


@lru_cache(maxsize=8)  # who opens a door again gets the same bytes; 64 KiB at most, each
def _decode_greeting(data: bytes) -> Greeting:
    fields = _GREETING.unpack_from(data)
    _, _, codec, _, door_id, major, minor, max_request, max_descriptors, attributes, _ = fields
    texts, at = [], _GREETING.size
    for _ in range(4):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if at + length > len(data):
            raise ValueError("a text ends behind its end")
        texts.append(_decode(data[at : at + length]))
        at += length
    if len(data) != at + 16:
        raise ValueError(f"{len(data)} bytes, not {at + 16}")
    name, doc, signature, methods = texts
    return Greeting(
        door_id, Codec(codec), name, (major, minor), data[at:], max_request, max_descriptors,
        attributes, doc, signature, methods,
    )  # fmt: skip


def check_version(data: bytes, who: str) -> None:
    """Refuse, in words, a message of another version of the protocol."""
    if len(data) < 6:
        raise ProtocolError(f"{who} sent {len(data)} bytes, which say no version")
    version = int.from_bytes(data[4:6], "little")
    if version != VERSION:
        raise ProtocolError(
            f"{who} speaks version {version} of the door protocol, this doorpool version {VERSION}; "
            "install the same doorpool at both ends"
        )


# -- knock and answer ----------------------------------------------------------------


@attrs.frozen
class Knock:
    """What a client says of itself when it opens a channel; a claim."""

    python: tuple[int, int]
    main: bytes = NO_MAIN
    page: int = 0
    segments: bool = False

    def encode(self) -> bytes:
        """Write the knock."""
        head = _KNOCK.pack(KNOCK_MAGIC, VERSION, *self.python, self.main)
        return head + _SHARED.pack(self.page, self.segments) if self.page or self.segments else head


def decode_knock(data: bytes) -> Knock:
    """
    Read a knock.

    Raises:
        ProtocolError: it is none, of a version not spoken here, or malformed.
    """
    if data[:4] != KNOCK_MAGIC:
        raise ProtocolError("a message on a door descriptor was no knock")
    check_version(data, "the client")
    if len(data) not in (_KNOCK.size, _KNOCK.size + _SHARED.size):
        raise ProtocolError(f"a knock of {len(data)} bytes, not {_KNOCK.size}")
    _, _, major, minor, main = _KNOCK.unpack_from(data)
    page, segments = _SHARED.unpack_from(data, _KNOCK.size) if len(data) > _KNOCK.size else (0, 0)
    return Knock((major, minor), main, page, segments == 1)


@attrs.frozen
class Refusal:
    """
    Why something was refused, and whether the procedure may have run all the same.

    Attributes:
        logged: what our own log says in place of the text; never sent.
    """

    reason: Reason
    text: str = ""
    may_have_run: bool = False
    limit: int = 0
    value: int = 0
    logged: str = ""

    def encode(self) -> bytes:
        """Write the refusal; its text is cut to what a letter takes."""
        head = _REFUSAL.pack(self.reason, self.may_have_run, self.limit, self.value)
        return head + _stretch(self.text.encode("utf-8", "replace"), LETTER_SIZE - 64)


def decode_refusal(data: bytes | bytearray) -> Refusal:
    """
    Read a refusal.

    Raises:
        ProtocolError: it is none.
    """
    if len(data) < _REFUSAL.size:
        raise ProtocolError(f"a refusal of {len(data)} bytes", may_have_run=True)
    reason, may_have_run, limit, value = _REFUSAL.unpack_from(data)
    text = _decode(bytes(data[_REFUSAL.size :]))
    try:
        known = Reason(reason)
    except ValueError:
        raise ProtocolError(f"a refusal for the unknown reason {reason}: {text}", may_have_run=True) from None
    return Refusal(known, text, may_have_run != 0, limit, value)


def encode_hand_out(uid: int | None) -> bytes:
    """Write a wish for a descriptor that somebody else will have; None: nobody knows who."""
    return HAND_OUT + _UID.pack(_NO_UID if uid is None else uid)


def is_hand_out(data: bytes | bytearray) -> bool:
    """Tell whether a ping has such a wish."""
    return data[: len(HAND_OUT)] == HAND_OUT


def decode_hand_out(data: bytes | bytearray, asker: int | None) -> int | None:
    """Read whose the descriptor will be: the asker's own, if he says nothing."""
    said = bytes(data[len(HAND_OUT) :])
    if len(said) != _UID.size:
        return asker
    uid: int = _UID.unpack(said)[0]
    return None if uid == _NO_UID else uid


@attrs.frozen
class Answer:
    """How a server answers a knock."""

    codec: Codec = Codec.RAW
    refusal: Refusal | None = None
    page: int = 0
    segments: bool = False

    def encode(self) -> bytes:
        """Write the answer."""
        refused = self.refusal is not None
        head = _ANSWER.pack(ANSWER_MAGIC, VERSION, refused, self.codec, self.page, self.segments)
        return head + self.refusal.encode() if self.refusal else head


def decode_answer(data: bytes) -> Answer:
    """
    Read an answer.

    Raises:
        ProtocolError: it is none, of a version not spoken here, or malformed.
    """
    if data[:4] != ANSWER_MAGIC or len(data) < _ANSWER.size:
        raise ProtocolError("the answer to a knock was none")
    _, _, refused, codec, page, segments = _ANSWER.unpack_from(data)
    if refused == 1:  # before the version: a refusal may be about just that
        return Answer(refusal=_decode_refusing(data[_ANSWER.size :]))
    check_version(data, "the server")
    if refused or len(data) != _ANSWER.size or codec not in _CODECS:
        raise ProtocolError("the answer to a knock is malformed")
    return Answer(_CODECS[codec], page=page, segments=segments == 1)


def _decode_refusing(data: bytes) -> Refusal:
    """Read why a knock was refused; whatever is claimed, nothing has run before an opening."""
    try:
        return attrs.evolve(decode_refusal(data), may_have_run=False)
    except ProtocolError as error:
        error.may_have_run = False
        raise


def farewell(refusal: Refusal) -> bytes:
    """
    Write the goodbye that is left on a descriptor behind its greeting.

    Descriptors are only peeked at, so nobody reads it: that the queue holds more than the
    greeting is what tells a door that was taken away from a server that died.
    """
    return _FAREWELL.pack(FAREWELL_MAGIC, VERSION) + refusal.encode()


def decode_farewell(data: bytes) -> Refusal | None:
    """
    Read a goodbye that stands in place of a greeting: there was no room for a connection.

    None if it is anything else.

    Raises:
        ProtocolError: it is a goodbye, and spoilt.
    """
    if data[: _FAREWELL.size] != _FAREWELL.pack(FAREWELL_MAGIC, VERSION):
        return None
    return _decode_refusing(data[_FAREWELL.size :])


# -- frames --------------------------------------------------------------------------


class Frame:
    """
    One message on a channel, whole.

    Attributes:
        kind: what it is.
        number: the call it belongs to.
        nanoseconds: what is left for the call, 0 for no deadline.
        sent: when it was sent, by the sender's clock; 0 if it did not say.
        data, buffers: the bytes; buffers are writable and aligned as ``malloc`` aligns.
        descriptors: those that came with it; owned by whoever takes the frame.
        refusal: why it must be refused; then its body was not kept, or not even read.
    """

    __slots__ = ("buffers", "data", "descriptors", "kind", "nanoseconds", "number", "refusal", "sent")

    def __init__(
        self,
        kind: int,
        number: int,
        nanoseconds: int = 0,
        sent: int = 0,
        data: bytes | bytearray = b"",
        buffers: Sequence[bytearray | memoryview] = (),
        descriptors: list[int] | None = None,
        refusal: Refusal | None = None,
    ) -> None:
        self.kind = kind
        self.number = number
        self.nanoseconds = nanoseconds
        self.sent = sent
        self.data = data
        self.buffers = buffers
        self.descriptors = descriptors if descriptors is not None else []
        self.refusal = refusal


def frame_head(
    kind: int,
    number: int,
    data: bytes | bytearray | memoryview,
    buffers: Sequence[memoryview] = (),
    descriptors: int = 0,
    nanoseconds: int = 0,
    sent: int = 0,
    *,
    manifest: bool = False,
) -> bytes:
    """Write the header of a frame and the table of its buffers, the first of which may be a manifest."""
    if not buffers:
        return HEADER.pack(kind, VERSION, descriptors, 0, number, len(data), nanoseconds, sent)
    lengths = [buffer.nbytes for buffer in buffers]
    body = 8 * len(lengths) + len(data) + sum(lengths)
    count = len(lengths) | (MANIFEST if manifest else 0)
    head = HEADER.pack(kind, VERSION, descriptors, count, number, body, nanoseconds, sent)
    return head + struct.pack(f"<{len(lengths)}Q", *lengths)


class Assembly:
    """
    Puts one frame together from the pieces in which it comes.

    Feed it bytes while ``views()`` is None (the header and the table of buffers), then
    fill the views it hands out.  A body over the limit is never allocated: ``refusal`` is
    set and ``surplus`` says how many bytes to come belong to it still.  Any other is
    allocated as it comes, never more than ``AHEAD`` before it: who only claims a gibibyte,
    in forty bytes, has not made us take one from the system.

    A frame begins with a packet, so nothing comes behind one.  (A goodbye in the same packet is
    let pass; ``rest`` has it.)
    """

    __slots__ = (
        "_head", "_lengths", "_views", "fields", "has_manifest", "parts", "refusal", "rest", "surplus",
    )  # fmt: skip

    def __init__(self) -> None:
        self._head = bytearray()
        self._views: list[memoryview] | None = None
        self._lengths: tuple[int, ...] = ()
        self.fields: tuple[int, ...] | None = None
        self.has_manifest = False
        self.parts: list[bytearray] = []
        self.refusal: Refusal | None = None
        self.surplus = 0
        self.rest = b""

    @property
    def wanted(self) -> int:
        """How many bytes are missing before the lengths of all parts are known."""
        whole = HEADER.size if self.fields is None else HEADER.size + 8 * self.fields[3]
        return whole - len(self._head)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing any more."""
        return self.refusal is not None or (self._views is not None and not self._views)

    def views(self) -> list[memoryview] | None:
        """Return what is to be filled next, in order; None while the head is incomplete."""
        return self._views

    def feed(self, piece: bytes | memoryview, limit: int) -> None:
        """
        Take bytes in the order in which they come.

        Args:
            piece: the bytes.
            limit: how many bytes of data and buffers together are allowed.

        Raises:
            ProtocolError: they are no frame, or more than one.
        """
        while piece and self._views is None and self.refusal is None:
            take = self.wanted
            self._head += piece[:take]
            piece = piece[take:]
            if not self.wanted:
                self._measure(limit)
        if self.refusal is not None:
            size = min(len(piece), self.surplus)
            self.surplus -= size
            self._keep(piece[size:])
        elif piece:
            self._fill(piece)

    def _measure(self, limit: int) -> None:
        """Read the header, or the table behind it, and allocate once both are accepted."""
        if self.fields is None:
            self._read_header()
            self._accept(limit)
        if self.refusal is None and not self.wanted:
            self._allocate()

    def _read_header(self) -> None:
        fields = read_header(self._head)
        if fields[3] & MANIFEST:
            self.has_manifest = True
            fields = (*fields[:3], fields[3] & ~MANIFEST, *fields[4:])
            if not fields[3]:
                raise ProtocolError("a frame with a manifest has no buffers, and the first would be it")
        self.fields = fields

    def _accept(self, limit: int) -> None:
        assert self.fields is not None
        _, _, _, buffers, _, body, _, _ = self.fields
        size = body - 8 * buffers
        if self.has_manifest:
            limit += MANIFEST_SIZE
        if size < 0 or buffers > MAX_BUFFERS:
            raise ProtocolError(f"a frame of {body} bytes claims {buffers} buffers")
        if size > limit:
            self.refusal = Refusal(Reason.TOO_LARGE, limit=limit, value=size)
            self.surplus = body

    def _allocate(self) -> None:
        assert self.fields is not None
        buffers, body = self.fields[3], self.fields[5]
        lengths = struct.unpack_from(f"<{buffers}Q", self._head, HEADER.size)
        data = body - 8 * buffers - sum(lengths)
        if data < 0:
            raise ProtocolError("the buffers of a frame are longer than the frame")
        self._lengths = (data, *lengths)
        self._views = []
        self._extend()

    def _extend(self) -> None:
        """Make room for what comes next, there being none left; none, if nothing comes."""
        views, parts = self._views, self.parts
        assert views is not None
        assert not views
        room = AHEAD
        while room and len(views) < _MOST_VIEWS:
            if not parts or len(parts[-1]) == self._lengths[len(parts) - 1]:
                if len(parts) == len(self._lengths):
                    return
                parts.append(bytearray())
            begun = len(parts[-1])
            step = min(room, self._lengths[len(parts) - 1] - begun)
            parts[-1] += _ZEROS[:step]  # no view of it is left: they have all been filled
            if step:
                views.append(memoryview(parts[-1])[begun:])
            room -= step

    def _keep(self, rest: bytes | memoryview) -> None:
        if rest and rest[0] != Kind.GOODBYE:
            raise ProtocolError("bytes behind the end of a frame")
        self.rest = bytes(rest)

    def _fill(self, piece: bytes | memoryview) -> None:
        views = self._views
        assert views is not None
        while piece:
            if not views:
                self._keep(piece)
                return
            size = min(len(piece), len(views[0]))
            views[0][:size] = piece[:size]
            piece = piece[size:]
            self.filled(size)

    def filled(self, size: int) -> None:
        """Say that so many bytes were written into the views."""
        views = self._views
        assert views is not None
        while size:
            step = min(size, len(views[0]))
            views[0] = views[0][step:]
            if not views[0]:
                del views[0]
            size -= step
        if not views:
            self._extend()

    @property
    def manifest(self) -> bytearray | None:
        """Its manifest, if it has one and was not refused."""
        return self.parts[1] if self.has_manifest and self.refusal is None else None

    def frame(self) -> Frame:
        """Return the frame, which must be complete (descriptors are the reader's to add)."""
        assert self.fields is not None
        kind, _, _, _, number, _, nanoseconds, sent = self.fields
        if self.refusal is not None:
            return Frame(kind, number, nanoseconds, sent, refusal=self.refusal)
        first = 2 if self.has_manifest else 1
        return Frame(kind, number, nanoseconds, sent, self.parts[0], self.parts[first:])


def read_header(head: bytes | bytearray) -> tuple[int, ...]:
    """
    Read the 40 bytes of a frame's header.

    Raises:
        ProtocolError: they are none.
    """
    fields = HEADER.unpack_from(head)
    if fields[1] != VERSION or fields[0] not in KINDS:
        raise ProtocolError(f"no frame begins with {bytes(head[:2])!r}")
    return fields
