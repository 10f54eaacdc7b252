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
import pickle
import socket
import struct

import attrs
import msgspec
import pytest
import support
from support import rawpeer, wait_until
from support.liars import (
    DESCRIPTOR,
    KINDS,
    PROXY,
    SOON,
    STREAM,
    Failed,
    Kind,
    Liar,
    ask_all,
    asking,
    converse,
    data,
    named,
    numbered,
    open_stream,
    pull_all,
)
from support.mutations import flips, with_byte
from support.rawdoor import Background

from doorpool import BrokenDoorError, CallTimeoutError, Descriptor, DoorError, ProtocolError, Proxy
from doorpool._wire import Codec
from doorpool.door import Handle

pytestmark = [pytest.mark.timeout(7200), pytest.mark.ids("H01")]

STRANGER = 6602  # a uid
BRIEF = 0.1  # seconds; for calls that are not answered

GOODBYE = rawpeer.frame(rawpeer.GOODBYE, 0, rawpeer.refusal(rawpeer.IDLE, "idle"))
REPLY = KINDS["raw"].reply
REFUSED = Failed(ProtocolError, True, "")
#: What does not belong behind a reply.
BEHIND = (b"\0", REPLY[:7], b"A", b"F", b"Q" * 50, bytes(5000))

kinds = pytest.mark.parametrize("name", KINDS)
some_kinds = pytest.mark.parametrize(
    "name", ["raw, files", "ping", "another descriptor", "data, a file", "pickle", "a batch"]
)
lasting = pytest.mark.parametrize("name", [name for name in KINDS if name != "a batch"])


@pytest.fixture(autouse=True)
def base(request):
    """Around each test: an honest server is understood after it, and nothing is left open."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    callspec = getattr(request.node, "callspec", None)
    kind = KINDS[callspec.params.get("name", "data") if callspec else "data, a file"]
    with Descriptor(os.open(os.devnull, os.O_RDONLY)) as file:
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

    return check(kind, say, file, right, **options)


def check(kind, say, file, right=..., **options):
    """Ask some questions; the first is answered right or not at all, the others right; return the first."""
    unpickled = support.unpickling_counts()["unpickled"]
    first, *rest = converse(kind, say, file, **options)
    if kind.codec != rawpeer.PICKLE:
        assert support.unpickling_counts()["unpickled"] == unpickled
    assert isinstance(first, Failed) or first == (kind.right if right is ... else right)
    assert rest == [after(kind, first)] * len(rest)
    return first


def after(kind, outcome):
    """What comes of a question on a fresh channel, after one of this outcome: streams end with an error."""
    return "the end" if kind is KINDS["a batch"] and isinstance(outcome, Failed) else kind.right


def failed(*args, **options):
    return isinstance(ask(*args, **options), Failed)


# -- replies --------------------------------------------------------------------------------------


@pytest.mark.ids("C07", "H07")
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


@some_kinds
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
    ("begin", "piece"), [(rawpeer.frame(rawpeer.REPLY, 1, length=2**30), b"x"), (b"B", b"B")]
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
    """In one packet with it nothing is believed, but for a goodbye; in one of its own the first is."""
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
@some_kinds
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


@some_kinds
def test_replies_of_each_kind_and_version(many, file, name):
    """What is of another kind or version is no reply."""
    kind = KINDS[name]
    for place, right in ((0, kind.reply[0]), (1, 1)):
        for value in {*range(0, 256, many(32, 1)), *b"QRFPAGB"} - {right}:
            assert failed(kind, [with_byte(kind.reply, place, value)], kind.files, file)


@some_kinds
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
@some_kinds
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
    for words in itertools.islice(flips(kind.reply), 0, None, many(5, 1)):
        ask(kind, [words], kind.files, file, right=by_hand(kind, words[rawpeer.HEAD :]))


def by_hand(kind, body):
    """What the body of a reply says, if it says anything."""
    if kind.codec == rawpeer.RAW:
        return kind.right
    with contextlib.suppress(msgspec.DecodeError, TypeError, ValueError):
        value = msgspec.msgpack.decode(body[1:], ext_hook=lambda code, _: "a Descriptor")
        return value[0] if kind is KINDS["a batch"] else value
    return None


def test_limits_that_are_lies(file):
    """A request over the limit has the limits asked for; whatever they are, it is sent or refused."""
    greeting = [(rawpeer.greeting(max_request=3), 0)]
    kind = attrs.evolve(KINDS["raw"], ask=_call_with_four_bytes)
    pong, huge = rawpeer.PONG, struct.pack("<QII", 2**64 - 1, 2**32 - 1, 2**32 - 1)
    sent = [rawpeer.frame(pong, 1, huge), rawpeer.frame(pong, 1, huge + bytes(70_000))]
    refused = [
        *(rawpeer.frame(pong, 1, huge[:cut]) for cut in range(len(huge))),
        rawpeer.frame(pong, 1, bytes(100)),
        rawpeer.frame(pong, 2, huge),
        rawpeer.frame(rawpeer.REPLY, 1, huge),
        rawpeer.frame(rawpeer.FAILURE, 1, rawpeer.refusal(rawpeer.BUSY)),
        rawpeer.frame(pong, 1, huge, descriptors=2),
    ]
    for answers, brought in itertools.product((sent, refused), (0, 1, 253)):
        for words in answers:
            words = words[:2] + struct.pack("<H", brought) + words[4:] if answers is sent else words
            (came,) = converse(
                kind, functools.partial(say_limits, words, brought), file, (SOON,), words=greeting
            )
            assert came == kind.right if answers is sent else isinstance(came, Failed)


def _call_with_four_bytes(handle, seconds):
    with handle.call(b"four", timeout=seconds) as reply:
        return [bytes(reply.data), *map(bytes, reply.buffers)], len(reply.descriptors)


def say_limits(words, brought, liar, question):
    if liar.asked.kind == rawpeer.PING:
        liar.send(words, [liar.port.fileno()] * brought)
    else:
        liar.answer_right(question)


# -- greetings, and answers to a knock -------------------------------------------------------------

#: A handle that knocks when it is called first.
LAZY = attrs.evolve(KINDS["raw"], open=functools.partial(Handle, lazy=True, open_timeout=SOON))
KNOCKERS = {"raw": LAZY, "data": KINDS["data"], "pickle": KINDS["pickle"], "a batch": KINDS["a batch"]}
knockers = pytest.mark.parametrize("name", KNOCKERS)


def knock(kind, file, **options):
    """Have the first knock, or the greeting, spoilt; return what came of the first question."""
    return check(kind, Liar.answer_right, file, **options)


@knockers
def test_greetings_split_doubled_and_with_descriptors(many, file, name):
    """A greeting is one message; what is behind it, and what is attached to it, is nobody's."""
    kind = KNOCKERS[name]
    greeting = rawpeer.greeting(codec=kind.codec)
    for cut in range(1, len(greeting), many(5, 1)):
        assert isinstance(knock(kind, file, words=[(greeting[:cut], 0), (greeting[cut:], 0)]), Failed)
    for words in (
        [(b"", 0)],
        [(b"", 1)],
        [(b"?", 1), (greeting, 0)],
        [(greeting * 2, 0)],
        [(bytes(65_536), 2)],
    ):
        assert isinstance(knock(kind, file, words=words), Failed)
    for behind in [], [(b"?", 2)], [(greeting, 253)], [(b"dpBY\1\0" + rawpeer.refusal(rawpeer.REVOKED), 0)]:
        for brought in (0, 1, 253):
            assert knock(kind, file, words=[(greeting, brought), *behind]) == kind.right


@pytest.mark.parametrize("codec", [rawpeer.RAW, rawpeer.DATA, rawpeer.PICKLE])
def test_no_greeting_and_no_answer(codec):
    """Who says nothing at all is waited for as long as one was told to, and no longer."""
    for words in (b"", rawpeer.greeting(codec=codec)):
        with rawpeer.RawServer(words) as server, pytest.raises(CallTimeoutError):
            open_soon = Handle if codec == rawpeer.RAW else Proxy
            try:
                open_soon(server.descriptor, open_timeout=BRIEF)
            finally:
                os.close(server.descriptor)


@knockers
def test_answers_cut_split_and_followed(many, file, name):
    kind = KNOCKERS[name]
    answer = rawpeer.answer(codec=kind.codec)
    for cut in range(len(answer)):
        for pieces in [answer[:cut]], [answer[:cut], answer[cut:]]:
            knock(kind, file, admit=functools.partial(answer_in, pieces))
    for more in (b"\0", answer, bytes(4096 - len(answer)), bytes(60_000)):
        assert isinstance(knock(kind, file, admit=functools.partial(answer_in, [answer + more])), Failed)


def answer_in(pieces, liar):
    """Answer in pieces, of which the first brings the channel."""
    liar.admit_with(pieces[0], [None])
    for piece in pieces[1:]:
        rawpeer.send(liar.knock_socket, piece)


@pytest.mark.ids("C02", "C08")
@knockers
def test_answers_with_other_descriptors(file, things, name):
    """None, too many, of another kind, or the door itself: only the right one is a channel."""
    kind = KNOCKERS[name]
    answer, refusal = rawpeer.answer(codec=kind.codec), rawpeer.refusal(rawpeer.DENIED, "no")
    gifts = [[], [None, None], [None] * 253, [file] * 253, [None, *[file] * 252]]
    gifts += [row for thing in things for row in ([thing], [None, thing], [thing, None])]
    for row in gifts:
        assert isinstance(knock(kind, file, admit=giving(answer, row)), Failed)
    pages = [
        answer[:8] + struct.pack("<II", page, segments) for page in (1, 2**32 - 1) for segments in (0, 1)
    ]
    refusing = [rawpeer.answer(refused=1, body=body) for body in (refusal, refusal[:20], b"")]
    for words, row in itertools.product([*pages, *refusing], ([], [None], [None, file], [file] * 3)):
        assert isinstance(knock(kind, file, admit=giving(words, row)), Failed)


def giving(words, gifts):
    return lambda liar: liar.admit_with(words, gifts)


@pytest.fixture
def things():
    """Descriptors of all kinds that are no channels, nor data doors."""
    with contextlib.ExitStack() as stack:
        families = (socket.AF_UNIX, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_STREAM)
        sockets = [socket.socket(*family) for family in families]
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            sockets += socket.socketpair(socket.AF_UNIX, kind)
        for sock in sockets:
            stack.callback(sock.close)
        numbers = [*os.pipe(), os.open(os.devnull, os.O_RDONLY), os.memfd_create("dp-test")]
        for codec in (rawpeer.RAW, rawpeer.PICKLE):
            server = stack.enter_context(rawpeer.RawServer(rawpeer.greeting(codec=codec)))
            numbers.append(server.descriptor)
        for number in numbers:
            stack.callback(os.close, number)
        yield [*numbers, *(sock.fileno() for sock in sockets)]


# -- streams, and doors that arrive ----------------------------------------------------------------


@pytest.mark.ids("C08", "C10")
@pytest.mark.parametrize("code", [PROXY, STREAM])
def test_doors_and_streams_that_are_none(things, code):
    """Of what is no door, or one where pickle is spoken, nothing is made; nor of one that is named twice."""
    kind = attrs.evolve(KINDS["data"], reply=rawpeer.frame(rawpeer.REPLY, 1, data("right")), right="right")
    one, two = ([named(code, place) for place in range(count)] for count in (1, 2))
    for thing in things:
        assert arrives(kind, one, [thing], thing).kind is ProtocolError
    with rawpeer.RawServer(rawpeer.greeting(codec=rawpeer.DATA)) as server:
        door = server.descriptor
        try:
            name = "a Proxy" if code == PROXY else "a Stream"
            assert arrives(kind, one, [door, *things], door) == [name]
            assert arrives(kind, two, [door, door], door) == [name, name]
            for thing in things:
                assert isinstance(arrives(kind, two, [door, thing], door), Failed)
            for value in one * 2, two, [named(code, 2**16 - 1)], [named(code), named(99)]:
                assert isinstance(arrives(kind, value, [door], door), Failed)
        finally:
            os.close(door)


def arrives(kind, value, gifts, file):
    """Have this value be the result of a call, with these descriptors."""

    def say(liar, question):
        words = rawpeer.frame(rawpeer.REPLY, question, data(value), descriptors=len(gifts))
        liar.send(words, gifts)
        liar.channel.close()

    first, second = converse(kind, say, file)
    assert second == kind.right
    return first


#: What is no batch, whatever is behind it.
NO_BATCHES = [
    None, True, 1, 1.5, "items", b"items", [], {}, {"items": [1]}, {"returned": 1},
    {"returned": None, "item": [1]}, {"items": [1], "returned": 2, "more": 3}, {1: [1], 2: 3},
    {"items": None, "returned": None}, {"items": 5, "returned": 1}, {"items": "one", "returned": 1},
    {"items": {"0": 1}, "returned": 1}, {"items": {}, "returned": []},
]  # fmt: skip
NO_DATA = [
    b"", b"V", b"V\xc1", b"X" + data([1])[1:], data([1])[1:], data([1]) + b"\0", data([1, 2])[:-1],
    data([named(DESCRIPTOR)]), data([named(STREAM)]), data([named(99)]), b"V" + b"\x91" * 100_000,
    pickle.dumps([1], 5), b"V" + pickle.dumps([1], 5), b"E", b"E\x90", b"A\xa2no", b"B\xa2no",
]  # fmt: skip


@pytest.mark.parametrize("codec", [rawpeer.DATA, rawpeer.PICKLE], ids=["data", "pickle"])
def test_batches_that_are_none(codec):
    """They end the stream, with an error behind the items that came before; nothing is asked again."""
    write = data if codec == rawpeer.DATA else functools.partial(pickle.dumps, protocol=5)
    last = write({"items": [3], "returned": 4})
    assert pulled(codec, [write([1, 2]), last]) == ([1, 2, 3, ("returned", 4)], 2)
    assert pulled(codec, [write({"items": [], "returned": None})]) == ([("returned", None)], 1)
    for body in [*map(write, NO_BATCHES), *(NO_DATA if codec == rawpeer.DATA else [])]:
        came, asked = pulled(codec, [write([1, 2]), body, last])
        assert came[:2] == [1, 2]
        assert isinstance(came[2], Failed), came
        assert asked == 2


def pulled(codec, batches):
    """Pull what a server sends in these batches; return what came, and how often it was asked."""
    asked = 0

    def say(liar, question):
        nonlocal asked
        asked += 1
        liar.send(rawpeer.frame(rawpeer.REPLY, question, batches[question - 1]))

    opens = functools.partial(open_stream, codec=Codec(codec))
    kind = Kind(codec, opens, pull_all, reply=b"", right=None)
    (came,) = converse(kind, say, -1, (SOON,))
    return came, asked


def test_batches_of_nothing_for_ever():
    """Each would be answered in time, and no item would ever come."""
    batches = [data(["an item"]), *[data([])] * 100]
    assert pulled(rawpeer.DATA, batches) == (["an item", REFUSED], 2)


@pytest.mark.parametrize(
    "words",
    [b"", bytes(50), numbered(KINDS["a batch"].reply, 2), numbered(KINDS["a batch"].reply, 3), GOODBYE],
    ids=["silence", "zeros", "a batch", "of another number", "goodbye"],
)
@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_stream_is_closed_whatever_the_server_says_to_it(file, words, hangs_up):
    def say(liar, question):
        if question == 1:
            liar.answer_right(question)
            return
        if words:
            liar.send(words)
        if hangs_up:
            liar.channel.close()

    kind = attrs.evolve(KINDS["a batch"], ask=_pull_and_close)
    assert converse(kind, say, file, (SOON,)) == ["an item"]


def _pull_and_close(stream, seconds):
    stream.timeout = seconds
    item = next(stream)
    stream.timeout = BRIEF
    stream.close()
    assert list(stream) == []
    return item


# -- strangers -------------------------------------------------------------------------------------


#: Who is told them: clients that believe root.
HEARERS = {
    "raw": LAZY,
    "data": KINDS["data"],
    "by a rule": attrs.evolve(
        KINDS["data"], open=functools.partial(Proxy, reopen=False, open_timeout=SOON, server={0})
    ),
}


@pytest.mark.ids("B02", "B03")
def test_no_pickle_of_a_stranger_is_loaded(as_uid, file, marker):
    """Whatever codec he greets and answers with, though he is believed: by default, as root, or by a rule."""
    bomb = marker.bytes
    bodies = [bomb, b"V" + bomb, b"E" + bomb, b"R" + bomb]

    def say(liar, question):
        body = bodies[question % len(bodies)]
        liar.send(rawpeer.frame(rawpeer.REPLY, question, body, buffers=[bomb] if question > 4 else []))

    codecs = (rawpeer.RAW, rawpeer.PICKLE, rawpeer.DATA, 3, 255)
    talks, serving = {}, []
    with contextlib.ExitStack() as stack:
        for name, greets, answers in itertools.product(HEARERS, codecs, codecs):
            admit = giving(rawpeer.answer(codec=answers), [None])
            greeting = [(rawpeer.greeting(codec=greets), 0)]
            liar = stack.enter_context(Liar(HEARERS[name], say, file, words=greeting, admit=admit))
            talks[name, greets, answers] = liar.descriptor
            serving.append(Background(liar.serve))
        outcomes, unpickled = as_uid(STRANGER, ask_each_in_child, talks)
        for number in talks.values():
            os.close(number)
        for server in serving:
            server.result()
    assert not marker.went_off
    assert unpickled == 0
    for codec in (rawpeer.RAW, rawpeer.DATA):  # bytes, which nobody reads
        assert set(outcomes.pop(("raw", codec, codec))) == {"tuple"}
    assert set(outcomes.pop(("data", rawpeer.DATA, rawpeer.DATA))) == {"ProtocolError"}
    assert set(outcomes.pop(("by a rule", rawpeer.DATA, rawpeer.DATA))) == {"ProtocolError"}
    for name in ("data", "by a rule"):
        assert outcomes[name, rawpeer.PICKLE, rawpeer.PICKLE] == ["AccessError"]
    assert outcomes["raw", rawpeer.PICKLE, rawpeer.PICKLE][0] == "AccessError"
    assert {came[0] for came in outcomes.values()} == {"AccessError", "NotADoorError", "ProtocolError"}
    with contextlib.suppress(DoorError):
        converse(KINDS["pickle"], say, file)
    assert marker.went_off, "it was no bomb, and nothing is proven"


def ask_each_in_child(talks):
    """Ask eight times each; return the types of what came, and how much has been unpickled."""
    before = support.unpickling_counts()["unpickled"]
    outcomes = {
        (name, *codecs): [
            outcome.kind.__name__ if isinstance(outcome, Failed) else type(outcome).__name__
            for outcome in ask_all(HEARERS[name], number, (SOON,) * 8)
        ]
        for (name, *codecs), number in talks.items()
    }
    return outcomes, support.unpickling_counts()["unpickled"] - before
