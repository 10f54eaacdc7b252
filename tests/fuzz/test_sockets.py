"""
The other side parses, refuses, or hangs up; it never crashes, hangs, runs what nobody sent, or leaks.

Conversations of real clients are recorded, and said again to a server in another process: each bit
flipped, cut, split, doubled, out of order, with descriptors too many and too few.  After each, the
server has run what the bytes say, as read here by hand, or nothing; a canary is answered all the while;
at the end the server has as many descriptors open as before.  And the same for what a server says.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import struct
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import strategies as st
from support import rawpeer, start_python
from support.fuzzed import Fuzzed
from support.mutations import flips, spoilt, values, with_byte
from support.rawdoor import Background, Canary

from doorpool import Descriptor, Proxy
from doorpool._errors import DoorError
from doorpool.door import Handle

pytestmark = [pytest.mark.timeout(7200), pytest.mark.ids("H01", "H07")]

SERVER = """
import sys
from support.fuzzed import serve
serve(sys.argv[1], ready)
"""


# -- what is said when all goes well


def recorded(kind, call):
    """Have a client call a door by hand; return its knock, and its request with its number of descriptors."""
    codec = rawpeer.DATA if kind == "data" else rawpeer.RAW
    with rawpeer.RawServer(rawpeer.greeting(codec=codec)) as server:
        client = Background(call, server.descriptor)
        knock = server.hear()
        server.admit(rawpeer.answer(codec=codec))
        request, descriptors = rawpeer.receive(server.channel)
        for number in descriptors:
            os.close(number)
        server.channel.close()
        assert isinstance(client.error(), DoorError)
    return knock, request, len(descriptors)


def _call_raw(door):
    with Handle(door, lazy=True) as handle:
        handle.call(b"data", [memoryview(b"one"), memoryview(b""), memoryview(b"three")])


def _call_raw_with_file(door):
    with open(os.devnull) as file, Handle(door, lazy=True) as handle:
        handle.call(b"file", (), [file.fileno()])


def _call_data(door):
    with Proxy(door, reopen=False) as order:
        order("tea", 2, note="hot")


def _call_data_with_file(door):
    with Descriptor(os.open(os.devnull, os.O_RDONLY)) as file, Proxy(door, reopen=False) as order:
        order("tea", file=file)


CALLS = {
    "raw": ("raw", _call_raw),
    "raw, a file": ("raw", _call_raw_with_file),
    "data": ("data", _call_data),
    "data, a file": ("data", _call_data_with_file),
}


@functools.cache
def conversation(name):
    """Return what a client says: the kind of door, its knock, its request, and its descriptors."""
    kind, call = CALLS[name]
    knock, request, descriptors = recorded(kind, call)
    return kind, knock, numbered(request, 1), descriptors


def numbered(request, number):
    return request[:8] + struct.pack("<Q", number) + request[16:]


# -- what the bytes say, read by hand


def body_of(frame, number, brought, kinds=(rawpeer.REQUEST,)):
    """Return the parts of a frame that is right in all that its header says, else None."""
    if len(frame) < rawpeer.HEAD:
        return None
    kind, version, descriptors, buffers, said, length, _, _ = struct.unpack_from("<BBHIQQQQ", frame)
    right = (1, brought, number, len(frame) - rawpeer.HEAD)
    if kind not in kinds or (version, descriptors, said, length) != right or 8 * buffers > length:
        return None
    lengths = struct.unpack_from(f"<{buffers}Q", frame, rawpeer.HEAD)
    at = rawpeer.HEAD + 8 * buffers
    parts = []
    for size in (length - 8 * buffers - sum(lengths), *lengths):
        if size < 0:
            return None
        parts.append(frame[at : at + size])
        at += size
    return parts


def said_by(kind, parts, brought):
    """Return what the procedure is called with, if at all, by the parts of a request."""
    if kind == "raw":
        return parts, brought
    files = []
    try:
        args, kwargs = msgspec.msgpack.decode(
            parts[0], ext_hook=lambda code, body: files.append(code) or None
        )
        item, count, note = _bind(*args, **kwargs)
    except (msgspec.DecodeError, TypeError, ValueError):
        return None
    return item, count, note, bool(files)


def said_in(kind, pieces, brought, into):
    """
    Read all that was sent: the calls in it, how many frames are whole, and whether one is only begun.

    A frame ends where a piece ends, or a goodbye begins that is glued to it; what is not right is the
    last that is heard.
    """
    said, whole, frame, came = [], 0, b"", 0
    for place, piece in enumerate(pieces):
        if place == into and brought:
            came = brought if not frame else -1
        frame += piece
        if more_is_to_come(frame):
            continue
        end = rawpeer.HEAD + struct.unpack_from("<Q", frame, 16)[0]
        glued = frame[end : end + 1] == b"G"
        words = frame[:end] if glued else frame
        parts = body_of(words, whole + 1, came, (rawpeer.REQUEST, rawpeer.PING))
        if parts is None:
            return said, whole, False
        call = said_by(kind, parts, came) if frame[0] == rawpeer.REQUEST else None
        said += [] if call is None else [call]
        whole, frame, came = whole + 1, b"", 0
        if glued:
            return said, whole, True
    return said, whole, bool(frame)


def _bind(item, count=1, *, note="", file=None):
    return item, count, note


def more_is_to_come(frame):
    """Tell whether the server has to wait for the rest of this."""
    if len(frame) < rawpeer.HEAD:
        return True
    kind, version, _, buffers, _, length, _, _ = struct.unpack_from("<BBHIQQQQ", frame)
    sane = kind in b"QRFPAG" and version == 1 and 8 * (buffers & ~(1 << 31)) <= length
    return sane and length > len(frame) - rawpeer.HEAD


# -- the server that is spoken to


@pytest.fixture(scope="module")
def server():
    """One process for all tests: whatever one of them has broken, the next will notice."""
    with tempfile.TemporaryDirectory(prefix="dp-") as folder, start_python(SERVER, folder) as child:
        child.wait_ready()
        yield Path(folder), child
        assert child.terminate() == 0


@pytest.fixture
def fuzzed(server):
    for name in CALLS:
        conversation(name)
    folder, child = server
    fuzzed = Fuzzed(folder)
    with contextlib.closing(fuzzed), Canary(fuzzed) as bird:
        bird.still_sings()
        fuzzed.base = fuzzed.descriptors()
        yield fuzzed
        bird.still_sings()
        fuzzed.wait_until_clean()
    assert not child.ended


@pytest.fixture
def file():
    number = os.open(os.devnull, os.O_RDONLY)
    yield number
    os.close(number)


def hear(client):
    """Hear what is said to something that was whole; None if it is the end."""
    try:
        return client.receive()
    except EOFError:
        return None


def say(fuzzed, kind, pieces, descriptors=(), *, into=0):
    """
    Say something in pieces, each of which is read before the next; return whether it was run.

    Args:
        descriptors: which go along with one of the pieces, ``into`` says which.
    """
    said, whole, begun = said_in(kind, pieces, len(descriptors), into)
    with fuzzed.client(kind) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for place, piece in enumerate(pieces):
                client.send(piece, descriptors if place == into else ())
                if len(pieces) > 1:
                    client.wait_until_read()
        heard = sum(hear(client) is not None for _ in range(whole))
        if begun:
            with contextlib.suppress(OSError):
                client.channel.shutdown(socket.SHUT_WR)
        if heard == whole and (begun or not whole):
            hear(client)
    return check(fuzzed, said)


def check(fuzzed, said):
    """Make sure that what has run is of what was said, in order and once each; return how much it is."""
    ran, rest = fuzzed.ran(), iter(said)
    assert all(call in rest for call in ran), f"{ran} has run, and this was said: {said}"
    return len(ran)


conversations = pytest.mark.parametrize("name", CALLS)


@conversations
def test_what_was_recorded_is_run(fuzzed, file, name):
    kind, _, request, brought = conversation(name)
    assert say(fuzzed, kind, [request], [file] * brought) == 1


@conversations
def test_each_bit_flipped(many, fuzzed, file, name):
    """In the long form each byte gets each value."""
    kind, _, request, brought = conversation(name)
    runs = 0
    every = many(0, 1) and values(request, range(len(request)))
    for words in every or flips(request):
        runs += say(fuzzed, kind, [words], [file] * brought)
    assert runs > 20, "nearly nothing was run, so nearly nothing compared"


@conversations
def test_spoilt_in_several_places_and_cut_anywhere(fuzz, fuzzed, file, name):
    kind, _, request, brought = conversation(name)

    def check_one(words, cuts, brought, into):
        places = [0, *sorted({cut for cut in cuts if cut < len(words)}), len(words)]
        pieces = [words[a:b] for a, b in itertools.pairwise(places) if a < b] or [words]
        if words:
            say(fuzzed, kind, pieces, [file] * brought, into=min(into, len(pieces) - 1))

    cuts, numbers = st.lists(st.integers(1, 100), max_size=3), st.sampled_from([brought, brought, 0, 2])
    into = st.sampled_from([0, 0, 0, 1])
    fuzz(check_one, spoilt(request) | st.just(request), cuts, numbers, into, short=60, long=50_000)


@pytest.mark.ids("H02")
def test_each_value_of_the_small_fields(many, fuzzed):
    """Kind, version, descriptors, and the lowest bytes of the number of buffers and of the length."""
    kind, _, request, _ = conversation("raw")
    for place in (0, 1, 2, 4, 16):
        for value in range(0, 256, many(3, 1)):
            say(fuzzed, kind, [with_byte(request, place, value)])


@conversations
def test_split_at_each_byte(fuzzed, file, name):
    kind, _, request, brought = conversation(name)
    for cut in range(1, len(request)):
        assert say(fuzzed, kind, [request[:cut], request[cut:]], [file] * brought) == 1
    assert say(fuzzed, kind, [bytes([byte]) for byte in request], [file] * brought) == 1


@conversations
def test_cut_at_each_byte(fuzzed, file, name):
    kind, _, request, brought = conversation(name)
    for cut in range(1, len(request)):
        assert say(fuzzed, kind, [request[:cut]], [file] * brought) == 0


@conversations
def test_something_behind_the_end(fuzzed, file, name):
    """In one packet with it nothing has run; in one of its own nothing but the first."""
    kind, _, request, brought = conversation(name)
    for more in (b"\0", request, numbered(request, 2), request[:7], b"A", b"F"):
        assert say(fuzzed, kind, [request + more], [file] * brought) == 0


@pytest.mark.ids("C01", "C02")
@conversations
def test_descriptors_too_many_too_few_and_elsewhere(many, fuzzed, file, name):
    """Claimed and brought, with the first piece or with the second."""
    kind, _, request, right = conversation(name)
    counts = (0, 1, 2, 16, 253)
    for claimed, brought in itertools.product((*counts, 254, 65_535), counts):
        words = request[:2] + struct.pack("<H", claimed) + request[4:]
        ran = say(fuzzed, kind, [words], [file] * brought)
        assert ran == 0 or claimed == brought
        assert ran == 1 or (claimed, brought) != (right, right)
        if brought:
            cut = many(20, 40)
            assert say(fuzzed, kind, [words[:cut], words[cut:]], [file] * brought, into=1) == 0


@pytest.mark.ids("E07")
@conversations
def test_requests_doubled_and_out_of_order(many, fuzzed, file, name):
    """What runs are those that go on from the last: nothing after the first that does not."""
    kind, _, request, brought = conversation(name)
    call = said_by(kind, body_of(request, 1, brought), brought)
    for numbers in itertools.product((1, 2, 3), repeat=many(3, 5)):
        said = []
        with fuzzed.client(kind) as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for number in numbers:
                if number == len(said) + 1:
                    said.append(call)
                client.send(numbered(request, number), [file] * brought)
                answer = hear(client)
                if answer is None or answer.kind == rawpeer.GOODBYE:
                    break
        assert check(fuzzed, said) == len(said)


def test_requests_that_do_not_wait_for_their_answers(fuzzed, file):
    for name in CALLS:
        kind, _, request, brought = conversation(name)
        with fuzzed.client(kind) as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for number in range(1, 6):
                    client.send(numbered(request, number), [file] * brought)
            for _ in range(5):
                if hear(client) is None:
                    break
        check(fuzzed, [said_by(kind, body_of(request, 1, brought), brought)] * 5)


# -- knocks


def knock_and_hear(fuzzed, kind, words, descriptors):
    """Knock; what is answered is an answer or the end, and the next who comes gets in."""
    with fuzzed.client(kind, opening=False) as client:
        ours, theirs = rawpeer.pair(socket.SOCK_STREAM)
        client.knock_socket = ours
        with theirs:
            numbers = [theirs.fileno() if number is None else number for number in descriptors]
            rawpeer.send(client.door, words, numbers)
        came, got = client.answer()
        for number in got:
            os.close(number)
        assert came[:4] in (b"", b"dpAN")
        assert (len(got) == 1) == (came[:4] == b"dpAN" and came[6] == 0)
        return len(got)


@pytest.mark.parametrize("kind", ["raw", "data"])
def test_knocks_that_were_spoilt(fuzzed, kind):
    knock = conversation(kind)[1]
    assert knock_and_hear(fuzzed, kind, knock, [None]) == 1
    admitted = 0
    for words in flips(knock):
        admitted += knock_and_hear(fuzzed, kind, words, [None])
    assert admitted > 5
    for cut in range(len(knock)):
        assert knock_and_hear(fuzzed, kind, knock[:cut], [None]) == (cut == 24)
    for more in (b"\0", knock, bytes(5000), bytes(60_000)):
        assert knock_and_hear(fuzzed, kind, knock + more, [None]) == 0
    assert fuzzed.ran() == []


def test_knocks_with_other_descriptors(fuzzed, file):
    """None, two, of another kind, of somebody else's making, or the door itself: nobody is let in."""
    _, knock, _, _ = conversation("data")
    reader, writer = os.pipe()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    packets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    network = socket.socket()
    others = [
        file,
        reader,
        writer,
        listener.fileno(),
        datagrams[0].fileno(),
        packets[0].fileno(),
        network.fileno(),
    ]
    try:
        for number in others:
            assert knock_and_hear(fuzzed, "data", knock, [number]) == 0
            assert knock_and_hear(fuzzed, "data", knock, [None, number]) == 0
            assert knock_and_hear(fuzzed, "data", knock, [number, None]) == 0
        for count in (0, 2, 16, 253):
            assert knock_and_hear(fuzzed, "data", knock, [None] * count) == 0
    finally:
        for sock in (listener, *datagrams, *packets, network):
            sock.close()
        os.close(reader)
        os.close(writer)


# -- a server that is spoilt


def replied(reply, brought=0, *, kind="raw", greeting=None, answer=None, pieces=1, hang_up=True):
    """Have a client call a server that says this; return what it made of it, a reply, a value or an error."""
    codec = rawpeer.DATA if kind == "data" else rawpeer.RAW
    words = rawpeer.greeting(codec=codec) if greeting is None else greeting
    server = rawpeer.RawServer(words)
    if kind == "data":
        client = Background(_ask_data, server.descriptor)
    else:
        client = Background(_ask_raw, server.descriptor)
    with server:
        with contextlib.suppress(OSError, EOFError):
            _serve_badly(
                server, rawpeer.answer(codec=codec) if answer is None else answer, reply, brought, pieces
            )
        server.close()
        error = client.error()
        return error if error is not None else client._value


def _serve_badly(server, answer, reply, brought, pieces):
    words, descriptors = rawpeer.receive(server.port)
    if not words:
        raise EOFError
    server.knock_socket = socket.socket(fileno=descriptors[0])
    server.admit(answer)
    server.receive()
    step = -(-len(reply) // pieces)
    for at in range(0, len(reply), step or 1):
        server.send(reply[at : at + step], [server.port.fileno()] * brought if at == 0 else ())


def _ask_raw(door):
    try:
        handle = Handle(door, lazy=True, open_timeout=rawpeer.PATIENCE / 2)
    except BaseException:
        os.close(door)
        raise
    with handle:
        reply = handle.call(b"?", timeout=rawpeer.PATIENCE / 2)
        for number in reply.descriptors:
            os.close(number)
        return [bytes(reply.data), *map(bytes, reply.buffers)]


def _ask_data(door):
    try:
        proxy = Proxy(door, reopen=False, open_timeout=rawpeer.PATIENCE / 2, timeout=rawpeer.PATIENCE / 2)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(door)
        raise
    with proxy:
        return proxy("?")


REPLY = rawpeer.frame(rawpeer.REPLY, 1, b"data", buffers=[b"one", b"", b"three"])
VALUE = rawpeer.frame(rawpeer.REPLY, 1, b"V" + msgspec.msgpack.encode([1, "two", {"three": None}]))
RAISED = rawpeer.frame(rawpeer.REPLY, 1, b"E" + msgspec.msgpack.encode(["KeyError", "text", None]))
FAILURE = rawpeer.frame(rawpeer.FAILURE, 1, rawpeer.refusal(rawpeer.BUSY, "busy", limit=1, value=2))


def reply_by_hand(frame):
    """What a reply says: its parts, or None."""
    return body_of(with_byte(frame, 0, rawpeer.REQUEST), 1, 0) if frame[:1] == b"R" else None


@pytest.mark.ids("E07")
def test_replies_that_were_spoilt():
    """The caller has what the bytes say, or an error, and in time."""
    assert replied(REPLY) == [b"data", b"one", b"", b"three"]
    for frame in (REPLY, FAILURE):
        for words in flips(frame):
            came = replied(words)
            assert isinstance(came, DoorError) or came == reply_by_hand(words), (came, words)
        for cut in range(len(frame)):
            assert isinstance(replied(frame[:cut]), DoorError)
    for pieces in (2, 3, len(REPLY)):
        assert replied(REPLY, pieces=pieces) == reply_by_hand(REPLY)
    for brought in (1, 2, 253):
        assert isinstance(replied(REPLY, brought), DoorError)
        words = REPLY[:2] + struct.pack("<H", brought) + REPLY[4:]
        assert isinstance(replied(words), DoorError)
        assert replied(words, brought) == reply_by_hand(REPLY)


@pytest.mark.ids("E07", "B25")
def test_outcomes_that_were_spoilt():
    assert replied(VALUE, kind="data") == [1, "two", {"three": None}]
    assert type(replied(RAISED, kind="data")) is KeyError
    for frame in (VALUE, RAISED):
        for words in flips(frame):
            came = replied(words, kind="data")
            if isinstance(came, Exception) and not isinstance(came, DoorError):
                assert words[rawpeer.HEAD :][:1] == b"E"
                assert type(came).__module__ == "builtins"
            elif not isinstance(came, Exception):
                assert came == msgspec.msgpack.decode(words[rawpeer.HEAD + 1 :])


@pytest.mark.parametrize("kind", ["raw", "data"])
def test_greetings_and_answers_that_were_spoilt(many, kind):
    """A door that is none, or a call as ever: what a greeting claims is not believed."""
    codec = rawpeer.DATA if kind == "data" else rawpeer.RAW
    reply, right = (VALUE, [1, "two", {"three": None}]) if kind == "data" else (REPLY, reply_by_hand(REPLY))
    greeting = rawpeer.greeting(codec=codec, name="n", doc="d", signature="()", methods="{}")
    answer = rawpeer.answer(codec=codec)
    served = 0
    for words in itertools.islice(flips(greeting), 0, None, many(3, 1)):
        came = replied(reply, kind=kind, greeting=words)
        served += came == right
        assert came == right or isinstance(came, DoorError), came
    for words in flips(answer):
        came = replied(reply, kind=kind, answer=words)
        served += came == right
        assert came == right or isinstance(came, DoorError), came
    for message, name in ((greeting, "greeting"), (answer, "answer")):
        for cut in range(1, len(message), many(3, 1)):
            assert isinstance(replied(reply, kind=kind, **{name: message[:cut]}), DoorError)
    assert served > 10
