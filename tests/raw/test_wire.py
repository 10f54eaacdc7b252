"""
The wire format: what is written, what is read, and what garbage becomes.

The golden messages are written by hand (support.rawpeer).  Every prefix of each and every flip
of a single bit is read: what comes out is a value or a ProtocolError, never anything else.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import rawpeer

from doorpool import _wire
from doorpool._errors import ProtocolError
from doorpool._wire import Answer, Assembly, Codec, Greeting, Knock, Reason, Refusal

LIMIT = 4096

GREETING = rawpeer.greeting(name="näme", doc="What it does.", signature="(x)", attributes=3, methods="{}")
KNOCK = rawpeer.knock()
ANSWER = rawpeer.answer()
REFUSAL = rawpeer.refusal(rawpeer.TOO_LARGE, "too much", limit=10, value=11)
REFUSING = rawpeer.answer(refused=1, body=REFUSAL)
FRAME = rawpeer.frame(rawpeer.REQUEST, 1, b"data", buffers=[b"one", b"", b"three"], nanoseconds=7, sent=9)
PLAIN = rawpeer.frame(rawpeer.REPLY, 2, b"data")


def read_frame(data):
    """Feed an assembly with all that there is; None while the frame is incomplete."""
    assembly = Assembly()
    assembly.feed(data, LIMIT)
    return assembly.frame() if assembly.complete else None


DECODERS = {
    "greeting": (GREETING, _wire.decode_greeting),
    "knock": (KNOCK, _wire.decode_knock),
    "answer": (ANSWER, _wire.decode_answer),
    "refusing answer": (REFUSING, _wire.decode_answer),
    "refusal": (REFUSAL, _wire.decode_refusal),
    "frame with buffers": (FRAME, read_frame),
    "plain frame": (PLAIN, read_frame),
}

golden = pytest.mark.parametrize(("message", "decode"), DECODERS.values(), ids=DECODERS)


def allowed(decode, data):
    """Decode; let nothing but a ProtocolError be raised, and return it."""
    try:
        return decode(data)
    except ProtocolError as error:
        return error


# -- both sides write what is agreed


def test_greeting_is_written_as_agreed():
    said = Greeting(
        id=b"\x11" * 16, codec=Codec.RAW, name="näme", python=(3, 11), attributes=3,
        doc="What it does.", signature="(x)", methods="{}",
    )  # fmt: skip
    assert said.encode() == GREETING
    assert _wire.decode_greeting(GREETING) == said


def test_knock_is_written_as_agreed():
    assert Knock((3, 11)).encode() == KNOCK
    assert _wire.decode_knock(KNOCK) == Knock((3, 11))


def test_a_wish_for_a_descriptor_says_whose_it_will_be():
    for uid in (0, 4201, None):
        assert _wire.is_hand_out(_wire.encode_hand_out(uid))
        assert _wire.decode_hand_out(_wire.encode_hand_out(uid), 6602) == uid
    for odd in (b"", b"\0", bytes(3), bytes(5)):
        assert _wire.decode_hand_out(_wire.HAND_OUT + odd, 6602) == 6602, "the asker's own"
    assert not _wire.is_hand_out(b"")


def test_answers_are_written_as_agreed():
    said = Answer(refusal=Refusal(Reason.TOO_LARGE, "too much", limit=10, value=11))
    assert Answer().encode() == ANSWER
    assert said.encode() == REFUSING
    assert _wire.decode_answer(ANSWER) == Answer()
    assert _wire.decode_answer(REFUSING) == said


def test_frames_are_written_as_agreed():
    buffers = [memoryview(b) for b in (b"one", b"", b"three")]
    head = _wire.frame_head(ord("Q"), 1, b"data", buffers, nanoseconds=7, sent=9)
    assert head + b"data" + b"onethree" == FRAME
    assert _wire.frame_head(ord("R"), 2, b"data") + b"data" == PLAIN


def test_frame_is_read_as_it_was_written():
    frame = read_frame(FRAME)
    assert (frame.kind, frame.number, frame.refusal) == (ord("Q"), 1, None)
    assert (frame.nanoseconds, frame.sent) == (7, 9)
    assert frame.data == b"data"
    assert [bytes(buffer) for buffer in frame.buffers] == [b"one", b"", b"three"]


@pytest.mark.parametrize("step", range(1, len(FRAME) + 1))
def test_frame_in_pieces_of_any_size(step):
    assembly = Assembly()
    for at in range(0, len(FRAME), step):
        assert not assembly.complete
        assembly.feed(FRAME[at : at + step], LIMIT)
    assert assembly.complete
    assert bytes(assembly.frame().buffers[2]) == b"three"


def test_texts_of_a_greeting_are_cut_between_characters():
    said = Greeting(
        id=bytes(16), codec=Codec.RAW, name="ä" * 40_000, python=(3, 11), doc="€" * 40_000,
        signature="x" * 99_999,
        methods="m" * 99_999,
    )  # fmt: skip
    written = said.encode()
    read = _wire.decode_greeting(written)
    assert len(written) <= _wire.GREETING_SIZE
    assert set(read.name) == {"ä"}
    assert set(read.doc) == {"€"}
    assert (read.id, read.main) == (said.id, said.main)


@pytest.mark.parametrize("name", ["", "\ud800", "a\0b", "\x1b[31m", "ä" * 600])
def test_odd_names_are_carried_or_replaced(name):
    written = Greeting(id=bytes(16), codec=Codec.RAW, name=name, python=(3, 11)).encode()
    assert isinstance(_wire.decode_greeting(written).name, str)


# -- garbage


@pytest.mark.ids("H01")
@golden
def test_no_prefix_is_more_than_refused(message, decode):
    for size in range(len(message)):
        outcome = allowed(decode, message[:size])
        if decode is read_frame:
            assert outcome is None
    assert not isinstance(allowed(decode, message), ProtocolError)


@pytest.mark.ids("H01")
@golden
def test_no_flipped_bit_is_more_than_refused(message, decode):
    for bit in range(8 * len(message)):
        damaged = bytearray(message)
        damaged[bit // 8] ^= 1 << bit % 8
        allowed(decode, bytes(damaged))


@pytest.mark.ids("H01")
@golden
def test_bytes_behind_the_end(message, decode):
    outcome = allowed(decode, message + b"\0")
    if decode not in (_wire.decode_refusal,) and message != REFUSING:  # those end with a text
        assert isinstance(outcome, ProtocolError)


def _at(message, index, value):
    return message[:index] + bytes([value]) + message[index + 1 :]


@pytest.mark.ids("H02")
@pytest.mark.parametrize(
    ("decode", "message", "index", "good"),
    [
        pytest.param(read_frame, PLAIN, 0, set(b"QRFPAG"), id="kind of a frame"),
        pytest.param(read_frame, PLAIN, 1, {1}, id="version of a frame"),
        pytest.param(_wire.decode_greeting, GREETING, 6, {0, 1, 2}, id="codec of a greeting"),
        pytest.param(_wire.decode_answer, ANSWER, 6, {0}, id="whether an answer is a refusal"),
        pytest.param(_wire.decode_answer, ANSWER, 7, {0, 1, 2}, id="codec of an answer"),
        pytest.param(_wire.decode_refusal, REFUSAL, 0, set(range(1, 14)), id="reason of a refusal"),
    ],
)
def test_every_value_of_a_small_field(decode, message, index, good):
    for value in range(256):
        outcome = allowed(decode, _at(message, index, value))
        assert isinstance(outcome, ProtocolError) == (value not in good), value


@pytest.mark.ids("H02")
@pytest.mark.parametrize("version", [0, 2, 255, 256, 65_535])
def test_other_versions_are_refused_in_words(version):
    for message, decode in [
        (rawpeer.greeting(version=version), _wire.decode_greeting),
        (rawpeer.knock(version=version), _wire.decode_knock),
        (rawpeer.answer(version=version), _wire.decode_answer),
    ]:
        with pytest.raises(ProtocolError, match=f"version {version} .*version 1") as caught:
            decode(message)
        assert not caught.value.may_have_run


def test_refusal_of_a_server_of_another_version_can_be_read():
    body = rawpeer.refusal(rawpeer.UNSPOKEN, "we speak version 9 here")
    read = _wire.decode_answer(rawpeer.answer(version=9, refused=1, body=body))
    assert read.refusal.text == "we speak version 9 here"


def test_refusal_for_a_reason_of_later_times_is_shown():
    with pytest.raises(ProtocolError, match="the moon is full"):
        _wire.decode_refusal(rawpeer.refusal(77, "the moon is full"))


def test_what_is_no_greeting_is_told_from_a_bad_one():
    assert _wire.decode_greeting(b"") is None
    assert _wire.decode_greeting(b"HTTP/1.1 200 OK") is None


LENGTHS = [2**63, 2**64 - 1, 2**63 - 1, 2**32, 2**31, 2**31 - 1, LIMIT + 1]


@pytest.mark.ids("P6", "F08")
@pytest.mark.parametrize("length", LENGTHS)
def test_length_over_the_limit_is_refused_from_the_header_alone(length):
    assembly = Assembly()
    assembly.feed(rawpeer.frame(rawpeer.REQUEST, 1, length=length), LIMIT)
    assert assembly.complete
    assert assembly.surplus == length
    refusal = assembly.frame().refusal
    assert (refusal.reason, refusal.limit, refusal.value) == (Reason.TOO_LARGE, LIMIT, length)
    assert assembly.views() is None  # nothing was allocated


@pytest.mark.ids("F08")
def test_lengths_of_buffers_that_do_not_add_up():
    for lengths in [(2**64 - 1, 1), (2**63, 2**63), (5, 0), (0, 2**32)]:
        head = rawpeer.frame(rawpeer.REQUEST, 1, claimed_buffers=2, length=16 + 4)
        with pytest.raises(ProtocolError, match="longer than the frame"):
            read_frame(head + struct.pack("<QQ", *lengths))


@pytest.mark.parametrize(("buffers", "length"), [(1, 0), (1, 7), (65_537, 8 * 65_537), (2**32 - 1, 2**40)])
def test_more_buffers_than_fit_are_refused_from_the_header_alone(buffers, length):
    with pytest.raises(ProtocolError, match="buffers"):
        read_frame(rawpeer.frame(rawpeer.REQUEST, 1, claimed_buffers=buffers, length=length))


@pytest.mark.ids("F08")
def test_memory_is_taken_as_the_bytes_come_and_not_as_they_are_claimed():
    assembly = Assembly()
    assembly.feed(rawpeer.frame(rawpeer.REQUEST, 1, length=2**30), 2**30)
    assert sum(len(part) for part in assembly.parts) <= 2**21


# -- random bytes, and whatever can be written can be read

ANYTHING = st.binary(max_size=200)


@pytest.mark.ids("H01")
@given(ANYTHING, st.sampled_from(sorted(DECODERS)))
def test_random_bytes_are_no_more_than_refused(data, name):
    message, decode = DECODERS[name]
    allowed(decode, data)
    allowed(decode, message[:4] + data)  # behind a good magic
    allowed(decode, message[: rawpeer.HEAD] + data)


@given(
    data=st.binary(max_size=100),
    buffers=st.lists(st.binary(max_size=50), max_size=10),
    cuts=st.lists(st.integers(1, 40), max_size=30),
    number=st.integers(0, 2**64 - 1),
)
def test_whatever_is_written_is_read_in_any_pieces(data, buffers, cuts, number):
    stream = rawpeer.frame(rawpeer.REQUEST, number, data, buffers=buffers)
    assembly = Assembly()
    for size in [*cuts, len(stream)]:
        assembly.feed(stream[:size], LIMIT)
        stream = stream[size:]
    frame = assembly.frame()
    assert assembly.complete
    assert (frame.number, bytes(frame.data)) == (number, data)
    assert [bytes(buffer) for buffer in frame.buffers] == buffers


@given(
    name=st.text(max_size=300), doc=st.text(max_size=300), signature=st.text(max_size=300),
    limit=st.integers(0, 2**64 - 1), descriptors=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_whatever_greeting_is_written_is_read(name, doc, signature, limit, descriptors):
    said = Greeting(
        id=bytes(range(16)), codec=Codec.PICKLE, name=name, python=(3, 13), max_request=limit,
        max_descriptors=descriptors, doc=doc, signature=signature,
    )  # fmt: skip
    assert _wire.decode_greeting(said.encode()) == said


@given(
    reason=st.sampled_from(list(Reason)), text=st.text(max_size=6000), ran=st.booleans(),
    limit=st.integers(0, 2**64 - 1), value=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_whatever_refusal_is_written_is_read(reason, text, ran, limit, value):
    said = Refusal(reason, text, ran, limit, value)
    written = said.encode()
    read = _wire.decode_refusal(written)
    assert len(written) <= _wire.LETTER_SIZE
    assert text.startswith(read.text)
    assert (read.reason, read.may_have_run, read.limit, read.value) == (reason, ran, limit, value)
