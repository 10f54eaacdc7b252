"""
A client has what its server truly says, or an error, in time: it never crashes, hangs, leaks, or unpickles.

Clients of each kind ask servers that are played by hand, whose answers are cut, split, doubled, out of
order, with descriptors too many and too few.  What comes of it is the right value or an error of the
library; the next question, on a fresh channel, is answered right; at the end as many descriptors are open
as before, and nothing has been unpickled where no pickle is spoken.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import struct

import msgspec
import pytest
import support
from support import rawpeer, wait_until
from support.liars import KINDS, SOON, Failed, Liar, asking, converse
from support.mutations import flips, with_byte

from doorpool import BrokenDoorError, CallTimeoutError, Descriptor, ProtocolError

pytestmark = [pytest.mark.timeout(7200), pytest.mark.ids("H01")]

BRIEF = 0.1  # seconds; for calls that are not answered

GOODBYE = rawpeer.frame(rawpeer.GOODBYE, 0, rawpeer.refusal(rawpeer.IDLE, "idle"))
REPLY = KINDS["raw"].reply
REFUSED = Failed(ProtocolError, True, "")
#: What does not belong behind a reply.
BEHIND = (b"\0", REPLY[:7], b"A", b"F", b"Q" * 50, bytes(5000))

kinds = pytest.mark.parametrize("name", KINDS)
lasting = pytest.mark.parametrize("name", [name for name in KINDS if name != "a batch"])


@pytest.fixture(autouse=True)
def base():
    """Around each test: right answers are understood after it, and nothing is left open."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    with Descriptor(os.open(os.devnull, os.O_RDONLY)) as file:
        for kind in KINDS.values():
            assert converse(kind, Liar.answer_right, file.fileno()) == [kind.right] * 2
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, "all descriptors are closed")


@pytest.fixture
def file():
    number = os.open(os.devnull, os.O_RDONLY)
    yield number
    os.close(number)


def ask(kind, pieces, brought, file, *, into=0, hang_up=True, right=..., **options):
    """Ask, be told something in pieces, and ask again; return what came of the first."""

    def say(liar, _):
        for place, piece in enumerate(pieces):
            liar.send(piece, [file] * brought if place == into else ())
        if hang_up:
            liar.channel.close()

    unpickled = support.unpickling_counts()["unpickled"]
    first, *rest = converse(kind, say, file, **options)
    if kind.codec != rawpeer.PICKLE:
        assert support.unpickling_counts()["unpickled"] == unpickled
    assert isinstance(first, Failed) or first == (kind.right if right is ... else right), pieces
    assert rest == [after(kind, first)] * len(rest)
    return first


def after(kind, outcome):
    """What comes of a question on a fresh channel, after one of this outcome: streams end with an error."""
    return "the end" if kind is KINDS["a batch"] and isinstance(outcome, Failed) else kind.right


def failed(*args, **options):
    return isinstance(ask(*args, **options), Failed)


# -- replies --------------------------------------------------------------------------------------


@pytest.mark.ids("H07")
@kinds
def test_split_at_each_byte(file, name):
    kind = KINDS[name]
    for cut in range(1, len(kind.reply)):
        assert not failed(kind, [kind.reply[:cut], kind.reply[cut:]], kind.files, file)
    assert not failed(kind, [bytes([byte]) for byte in kind.reply], kind.files, file)


@kinds
def test_cut_at_each_byte_and_then_a_hang_up(file, name):
    kind = KINDS[name]
    for cut in range(len(kind.reply)):
        came = ask(kind, [kind.reply[:cut]] if cut else [], kind.files, file)
        assert came == Failed(BrokenDoorError, True, "")


@kinds
def test_cut_at_each_byte_and_then_silence(file, name):
    """All clients wait at the same time, each for as long as it was told to."""
    kind = KINDS[name]
    with contextlib.ExitStack() as stack:
        clients = [_told_so_much(stack, kind, kind.reply[:cut], file) for cut in range(len(kind.reply))]
        for client in clients:
            (came,) = client.result()
            assert isinstance(came, Failed)
            assert came.kind is CallTimeoutError


def _told_so_much(stack, kind, piece, file):
    liar, client = stack.enter_context(asking(kind, file, BRIEF))
    if piece:
        with contextlib.suppress(ConnectionError):  # its time may be over
            liar.send(piece, [file] * kind.files)
    return client


@lasting
def test_silence_in_the_middle_spoils_nothing_but_its_call(file, name):
    kind = KINDS[name]
    for cut in (1, rawpeer.HEAD, len(kind.reply) - 1):
        came = ask(kind, [kind.reply[:cut]], kind.files, file, hang_up=False, times=(BRIEF / 4, SOON))
        assert isinstance(came, Failed)
        assert came.kind is CallTimeoutError


@pytest.mark.parametrize(
    ("begin", "piece"), [(b"R" + rawpeer.frame(rawpeer.REPLY, 1, length=2**30)[1:], b"x"), (b"B", b"B")]
)
def test_a_server_that_never_comes_to_an_end(file, begin, piece):
    """A reply that grows byte by byte, or bells without one, hold nobody for longer than his time."""
    with asking(KINDS["raw"], file, BRIEF) as (liar, client), contextlib.suppress(ConnectionError):
        liar.send(begin)
        while True:
            liar.send(piece)
    assert isinstance(client.result()[0], Failed)


@kinds
def test_something_behind_the_end(file, name):
    """In one packet with it nothing is believed, but for a goodbye; in one of its own it does not harm the next."""
    kind = KINDS[name]
    for more in (*BEHIND, kind.reply):
        assert failed(kind, [kind.reply + more], kind.files, file)
        first, second, third = converse(kind, saying_behind(more), file, (SOON,) * 3)
        assert first == kind.right
        assert isinstance(second, Failed)
        assert third == after(kind, second)
    for more in (b"G", GOODBYE):
        assert not failed(kind, [kind.reply + more], kind.files, file)
    for more in (GOODBYE, b"B"):
        assert converse(kind, saying_behind(more), file, (SOON,) * 3) == [kind.right] * 3


def saying_behind(more):
    def say(liar, question):
        liar.answer_right(question)
        if question == 1:
            liar.send(more)

    return say


@pytest.mark.ids("E07")
@kinds
def test_replies_doubled_out_of_order_and_too_early(many, file, name):
    """Each question believes the next reply if it has its number; none comes later, and to another."""
    kind = KINDS[name]
    for numbers in itertools.product((0, 1, 2, 3, 2**64 - 1), repeat=many(2, 4)):
        expected = []
        for question, number in enumerate(numbers, 1):
            expected.append(kind.right if number == question else REFUSED)
            if number != question:
                break
        expected += [after(kind, expected[-1])] * (len(numbers) + 1 - len(expected))
        for at_once in (False, True):
            say = functools.partial(say_numbers, numbers, at_once)
            assert converse(kind, say, file, (SOON,) * (len(numbers) + 1)) == expected


def say_numbers(numbers, at_once, liar, question):
    """Bear these numbers in the first replies: in one each, or all together in the first."""
    if question > len(numbers):
        liar.answer_right(question)
    elif not at_once:
        liar.answer_right(numbers[question - 1])
    elif question == 1:
        for number in numbers:
            liar.answer_right(number)


@kinds
def test_replies_of_each_kind_and_version(many, file, name):
    """What is of another kind or version is no reply."""
    kind = KINDS[name]
    for place, right in ((0, kind.reply[0]), (1, 1)):
        for value in {*range(0, 256, many(32, 1)), *b"QRFPAGB"} - {right}:
            assert failed(kind, [with_byte(kind.reply, place, value)], kind.files, file)


@kinds
def test_refusals_that_are_none(many, file, name):
    """Each ends in an error, whatever it says and of whatever call."""
    kind = KINDS[name]
    for reason in (*range(15), *range(15, 256, many(240, 1))):
        body = rawpeer.refusal(reason, "no", may_have_run=True, limit=2**63, value=2**64 - 1)
        for words in (body, body[:23], b"\xff" * 30) if reason in (4, 14) else (body,):
            assert failed(kind, [rawpeer.frame(rawpeer.GOODBYE, 0, words)], 0, file)
            for number in (0, 1, 2) if reason == 4 else (1,):
                assert failed(kind, [rawpeer.frame(rawpeer.FAILURE, number, words)], 0, file)


@pytest.mark.ids("C01", "C02")
@kinds
def test_descriptors_too_many_too_few_and_elsewhere(many, file, name):
    """Claimed and brought, with the first piece or with the second, on a reply, a refusal and a goodbye."""
    kind = KINDS[name]
    counts = many((0, 1, 2, 253), (0, 1, 2, 3, 16, 252, 253))
    for claimed, brought in itertools.product((*counts, 65_535), counts):
        words = kind.reply[:2] + struct.pack("<H", claimed) + kind.reply[4:]
        right = (kind.right[0], brought) if name.startswith("raw") else kind.right
        fits = claimed == brought and brought in kind.takes
        assert failed(kind, [words], brought, file, right=right) != fits, (claimed, brought)
        if brought:
            assert failed(kind, [words[:20], words[20:]], brought, file, into=1)
        for frame in (rawpeer.FAILURE, rawpeer.GOODBYE):
            words = rawpeer.frame(frame, 1, rawpeer.refusal(rawpeer.BUSY), descriptors=claimed)
            assert failed(kind, [words], brought, file)


@pytest.mark.parametrize("name", ["ping", "another descriptor", "data, a file", "a batch"])
def test_each_bit_flipped(many, file, name):
    """What is made of it is what the bytes say, as read here by hand."""
    kind = KINDS[name]
    for words in itertools.islice(flips(kind.reply), 0, None, many(3, 1)):
        ask(kind, [words], kind.files, file, right=by_hand(kind, words[rawpeer.HEAD :]))


def by_hand(kind, body):
    """What the body of a reply says, if it says anything."""
    if kind.codec == rawpeer.RAW:
        return kind.right
    with contextlib.suppress(msgspec.DecodeError, TypeError, ValueError):
        value = msgspec.msgpack.decode(body[1:], ext_hook=lambda code, _: "a Descriptor")
        return value[0] if kind is KINDS["a batch"] else value
    return None
