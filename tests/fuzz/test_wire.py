"""
Bytes on the wire are parsed or refused: no crash, no hang, no frame that nobody sent, no memory for nothing.

Each decoder of ``_wire`` is given anything, and what it should be given, spoilt.
"""

from __future__ import annotations

import struct

import attrs
import pytest
from hypothesis import strategies as st
from support import rawpeer
from support.mutations import spoilt

from doorpool import _wire
from doorpool._errors import ProtocolError
from doorpool._wire import AHEAD, MANIFEST, MANIFEST_SIZE, Assembly

LIMIT = 4096

REFUSAL = rawpeer.refusal(rawpeer.TOO_LARGE, "too much: ä", limit=10, value=11)

#: What is read, and the magic in front, so that what is made up also gets behind it.
LETTERS = {
    "greeting": (_wire.decode_greeting, b"dpGR\1\0", [
        rawpeer.greeting(), rawpeer.greeting(name="ä", doc="What?", signature="(x)", methods='{"a": 1}'),
    ]),
    "knock": (_wire.decode_knock, b"dpKN\1\0", [
        rawpeer.knock(), rawpeer.knock() + struct.pack("<II", 4096, 1),
    ]),
    "answer": (_wire.decode_answer, b"dpAN\1\0", [rawpeer.answer(), rawpeer.answer(refused=1, body=REFUSAL)]),
    "refusal": (_wire.decode_refusal, b"\2\0", [REFUSAL]),
    "limits": (_wire.decode_limits, b"", [struct.pack("<QII", 2**30, 253, 0)]),
}  # fmt: skip

FRAMES = [
    rawpeer.frame(rawpeer.REQUEST, 1),
    rawpeer.frame(rawpeer.REPLY, 2, b"data"),
    rawpeer.frame(rawpeer.REQUEST, 1, b"data", buffers=[b"one", b"", b"three"], nanoseconds=7, sent=9),
    rawpeer.frame(rawpeer.REQUEST, 1, b"d", buffers=[b"manifest", b"x"], claimed_buffers=2 | MANIFEST),
    rawpeer.frame(rawpeer.REQUEST, 1, bytes(LIMIT)),
    rawpeer.frame(rawpeer.REQUEST, 1, length=2**40),
    rawpeer.frame(rawpeer.REQUEST, 1, b"x") + rawpeer.frame(rawpeer.GOODBYE, 1, REFUSAL),
]


def check_letter(decode, data):
    """
    What was read and has a writer is, written and read again, the same; tell whether it was read.

    But for the end of a long text, which its writer cuts: what was no UTF-8 has become three bytes for each.
    """
    try:
        read = decode(data)
    except ProtocolError:
        return False
    if read is not None:
        again = decode(written := read.encode())
        if isinstance(read, _wire.Refusal) and len(written) > _wire.LETTER_SIZE - 64:
            assert read.text.startswith(again.text)
            read = attrs.evolve(read, text=again.text)
        assert again == read
    return True


@pytest.mark.ids("H01", "H02")
@pytest.mark.parametrize(("decode", "magic", "messages"), LETTERS.values(), ids=LETTERS)
def test_letters(fuzz, decode, magic, messages):
    def check(data):
        check_letter(decode, data)

    anything = st.binary(max_size=80)
    fuzz(check, spoilt(*messages) | anything | anything.map(lambda b: magic + b), short=150, long=200_000)


def test_a_refusal_whose_text_was_no_utf_8_and_is_too_long_to_be_written_again():
    head = rawpeer.refusal(rawpeer.TOO_LARGE, "", limit=10, value=11)
    assert check_letter(_wire.decode_refusal, head + b"\xff" * 1500)
    assert len(_wire.decode_refusal(head + b"\xff" * 1500).encode()) <= _wire.LETTER_SIZE


# -- frames


def pieces_of(data, sizes):
    """Cut bytes into pieces of these sizes, over and over."""
    at = 0
    while data[at:]:
        for size in sizes:
            if data[at:]:
                yield data[at : at + size]
            at += size


def assemble(pieces):
    """Put a frame together as a channel does; return the assembly, and what came."""
    assembly, fed, room = Assembly(), 0, 0
    for piece in pieces:
        if assembly.complete and not assembly.surplus:
            break  # what comes now is for the next frame
        assembly.feed(piece, LIMIT)
        fed += len(piece)
        room = max(room, sum(map(len, assembly.parts)))
        assert room <= min(fed + AHEAD, LIMIT + MANIFEST_SIZE), "more memory than came, and a step"
    return assembly


def read_by_hand(data):
    """What the bytes say: (kind, number, [data, *buffers]); None if they are no whole frame."""
    if len(data) < rawpeer.HEAD:
        return None
    kind, version, _, buffers, number, body, _, _ = struct.unpack_from("<BBHIQQQQ", data)
    buffers &= ~MANIFEST
    if kind not in b"QRFPAG" or version != 1 or 8 * buffers > body or len(data) < rawpeer.HEAD + body:
        return None
    lengths = struct.unpack_from(f"<{buffers}Q", data, rawpeer.HEAD)
    at = rawpeer.HEAD + 8 * buffers
    lengths = (body - 8 * buffers - sum(lengths), *lengths)
    parts = []
    for length in lengths:
        parts.append(data[at : at + length])
        at += length
    return kind, number, parts


def check_frame(data, sizes):
    """The frame that the bytes say, or none, however they are cut; return what they say, or None."""
    outcomes = []
    for cut in ([len(data) or 1], sizes):
        try:
            assembly = assemble(pieces_of(data, cut))
            whole = assembly.complete and assembly.refusal is None
            frame = assembly.frame() if assembly.complete else None
            outcomes.append((frame.kind, frame.number, list(map(bytes, assembly.parts))) if whole else None)
        except ProtocolError:
            outcomes.append(ProtocolError)
    said = read_by_hand(data)
    for outcome in outcomes:
        assert outcome in (None, ProtocolError) or outcome == said
    # Glued to the end of a frame, more bytes are wrong; in a packet of their own they are another.
    assert outcomes[0] == outcomes[1] or (outcomes[0] is ProtocolError and outcomes[1] == said)
    return said if said in outcomes else None


@pytest.mark.ids("H01", "F08")
def test_frames(fuzz):
    def check(data, sizes):
        check_frame(data, sizes)

    headed = st.binary(max_size=90).map(lambda body: b"Q\1\0\0" + body)
    sizes = st.lists(st.integers(1, 50), min_size=1, max_size=4)
    fuzz(check, spoilt(*FRAMES) | headed | st.binary(max_size=90), sizes, short=300, long=300_000)
