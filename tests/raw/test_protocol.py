"""
Frames by hand: in pieces, glued, wrong, and by somebody else; what is wrong ends the channel.

Around each hostile client another one calls all the time, and loses no call (``canary``).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import rawpeer, run_as_uid, wait_until
from support.rawdoor import PATIENCE, Background

from doorpool._errors import BusyError, CallTimeoutError, ProtocolError
from doorpool.door import Handle

CALL = rawpeer.frame(rawpeer.REQUEST, 1, b"data", buffers=[b"one", b"", b"three"])
ECHO = CALL[:0] + rawpeer.frame(rawpeer.REPLY, 1, b"data", buffers=[b"one", b"", b"three"])


@pytest.fixture
def client(canary):
    serving, _ = canary
    number = serving.door.open()
    with rawpeer.RawClient(number) as client:
        os.close(number)
        yield client


@pytest.fixture
def file():
    number = os.open(os.devnull, os.O_RDONLY)
    yield number
    os.close(number)


def ends_with_words(client, *words):
    """Read the goodbye that says what was wrong, and the end of the channel."""
    goodbye = client.receive()
    assert (goodbye.kind, goodbye.reason) == (rawpeer.GOODBYE, rawpeer.PROTOCOL), goodbye
    assert not goodbye.may_have_run
    for word in words:
        assert word in goodbye.text
    client.expect_end()


# -- in pieces


@pytest.mark.ids("H07", "C07")
def test_request_cut_at_every_byte(client):
    """The server reads the first part before it gets the second: it never waits for it."""
    for cut in range(1, len(CALL)):
        client.number += 1
        words = CALL[:8] + struct.pack("<Q", client.number) + CALL[16:]
        client.send(words[:cut])
        client.wait_until_read()
        client.send(words[cut:])
        reply = client.receive()
        assert (reply.kind, reply.number, reply.body) == (rawpeer.REPLY, client.number, ECHO[rawpeer.HEAD :])


@pytest.mark.ids("H07", "C07")
def test_request_byte_by_byte(client):
    for byte in CALL:
        client.send(bytes([byte]))
        client.wait_until_read()
    assert client.receive().body == ECHO[rawpeer.HEAD :]


@pytest.mark.ids("H07")
@pytest.mark.parametrize("piece", [1, 7, rawpeer.HEAD, 1000])
def test_reply_in_pieces(piece):
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        call = Background(handle.call)
        server.accept()
        server.receive()
        words = rawpeer.frame(rawpeer.REPLY, 1, b"data", buffers=[b"b" * 50, b"", b"c" * 50])
        for at in range(0, len(words), piece):
            server.send(words[at : at + piece])
            server.wait_until_read()
        reply = call.result()
        assert (reply.data, [bytes(b) for b in reply.buffers]) == (b"data", [b"b" * 50, b"", b"c" * 50])


@pytest.mark.ids("F05")
def test_half_a_request_holds_no_thread(canary):
    """More clients than threads, each with a request that never is whole."""
    serving, bird = canary
    number = serving.door.open()
    clients = [rawpeer.RawClient(number) for _ in range(10)]
    for size, client in enumerate(clients, 1):
        client.send(CALL[: size * len(CALL) // 11])
        client.wait_until_read()
    wait_until(lambda: serving.gate.waiting >= 2)
    bird.still_sings()
    for client in clients:
        client.close()
    os.close(number)


@pytest.mark.ids("F05")
@pytest.mark.parametrize("what", ["a request", "a body that was refused"])
def test_endless_drops_hold_no_thread(serve, what):
    """One thread that lingers, one that waits; three who feed it a byte at a time, without end."""
    serving = serve(threads=2, lingers=True)
    serving.door.max_request = 1000 if what != "a request" else 2**30
    stop = threading.Event()
    number = serving.door.open()

    def drip():
        with rawpeer.RawClient(number) as client:
            client.call(b"first")  # so that a thread lingers on this channel
            client.send(rawpeer.frame(rawpeer.REQUEST, 2, length=2**29))
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    client.channel.send(b"x")

    drips = [Background(drip) for _ in range(3)]
    handle = serving.handle()
    for i in range(20):
        assert handle.call(b"%d" % i, timeout=PATIENCE / 2).data == b"%d" % i
    stop.set()
    for each in drips:
        each.result()
    os.close(number)


@pytest.mark.ids("F05")
@pytest.mark.parametrize("bells", [250, 520])
def test_bells_in_a_row(serve, bells, caplog):
    """Some may be left over, and are thrown away; whoever rings faster than we hear is sent away."""
    entered, go = threading.Event(), threading.Event()

    def work(invocation):
        entered.set()
        assert go.wait(PATIENCE)
        invocation.reply(invocation.data)

    number = serve(work).door.open()
    with rawpeer.RawClient(number) as client:
        client.channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        client.send(rawpeer.frame(rawpeer.REQUEST, 1, b"one"))
        assert entered.wait(PATIENCE)
        for _ in range(bells):
            client.channel.sendmsg([b"B"], [], socket.MSG_DONTWAIT)
        client.send(rawpeer.frame(rawpeer.REQUEST, 2, b"two"))
        go.set()
        if bells < 512:
            assert [client.receive().body for _ in range(2)] == [b"one", b"two"]
        else:
            wait_until(lambda: "512 bells in a row" in caplog.text)
            poll = select.poll()  # that is said just before
            poll.register(client.channel, select.POLLHUP)
            assert poll.poll(PATIENCE * 1000)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                client.send(rawpeer.frame(rawpeer.REQUEST, 3))
    os.close(number)


@pytest.mark.ids("F05")
def test_a_server_that_rings_all_the_time_does_not_stop_the_clock():
    stop = threading.Event()
    with rawpeer.RawServer() as server:

        def ring():
            server.accept()
            with contextlib.suppress(OSError):
                while not stop.is_set():
                    server.channel.send(b"B")

        ringing = Background(ring)
        with Handle(server.descriptor) as handle, pytest.raises((CallTimeoutError, ProtocolError)):
            handle.call(timeout=0.3)
        stop.set()
        ringing.result()


# -- wrong


@pytest.mark.ids("E07", "H02")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(rawpeer.frame(rawpeer.REQUEST, 1) * 2, "behind the end", id="two at once"),
        pytest.param(rawpeer.frame(rawpeer.REQUEST, 1, b"x") + b"\0", "behind the end", id="a byte behind"),
        pytest.param(CALL + CALL, "behind the end", id="two at once, with buffers"),
        pytest.param(rawpeer.frame(rawpeer.REQUEST, 0), "number 0", id="call 0"),
        pytest.param(rawpeer.frame(rawpeer.REQUEST, 2), "number 2", id="a later call"),
        pytest.param(rawpeer.frame(rawpeer.REQUEST, 2**64 - 1), "number 184", id="the last call"),
        pytest.param(rawpeer.frame(rawpeer.PING, 3), "number 3", id="a ping too late"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 1), "'R'", id="a reply to nothing"),
        pytest.param(rawpeer.frame(rawpeer.PONG, 1), "'A'", id="an answer to no ping"),
        pytest.param(rawpeer.frame(rawpeer.FAILURE, 1), "'F'", id="a failure of the caller's"),
        pytest.param(rawpeer.frame(rawpeer.GOODBYE, 1), "'G'", id="a goodbye of the caller's"),
        pytest.param(rawpeer.frame(0, 1), "no frame", id="kind 0"),
        pytest.param(rawpeer.frame(rawpeer.REQUEST, 1, version=0), "no frame", id="version 0"),
        pytest.param(rawpeer.frame(rawpeer.REQUEST, 1, version=2), "no frame", id="version 2"),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"Host: localhost\r\n" * 3, "no frame", id="another protocol"),
        pytest.param(bytes(100), "no frame", id="zeros"),
        pytest.param(
            rawpeer.frame(rawpeer.REQUEST, 1, claimed_buffers=1, length=8) + struct.pack("<Q", 1),
            "longer than the frame", id="a buffer longer than the frame",
        ),
        pytest.param(
            rawpeer.frame(rawpeer.REQUEST, 1, claimed_buffers=2, length=7), "buffers",
            id="more buffers than bytes",
        ),
        pytest.param(
            rawpeer.frame(rawpeer.REQUEST, 1, claimed_buffers=65_537, length=2**20), "buffers",
            id="too many buffers",
        ),
    ],
)  # fmt: skip
def test_what_is_no_request_ends_the_channel(canary, client, words, said):
    _serving, bird = canary
    client.send(words)
    ends_with_words(client, said)
    bird.still_sings()


@pytest.mark.ids("E07")
def test_call_number_that_does_not_go_on(canary, client):
    client.call(b"first")
    client.send(rawpeer.frame(rawpeer.REQUEST, 1, b"again"))
    ends_with_words(client, "number 1", "after call 1")
    canary[1].still_sings()


@pytest.mark.ids("E07")
def test_next_request_before_the_reply_ends_the_channel(serve):
    """While the procedure runs nobody reads; the second request is seen behind its reply."""
    ran, running, go = [], threading.Event(), threading.Event()

    def procedure(invocation):
        ran.append(bytes(invocation.data))
        running.set()
        assert go.wait(PATIENCE)
        invocation.reply(b"answer to " + bytes(invocation.data))

    serving = serve(procedure, threads=2)
    number = serving.door.open()
    with rawpeer.RawClient(number) as client:
        os.close(number)
        client.send(rawpeer.frame(rawpeer.REQUEST, 1, b"first"))
        assert running.wait(PATIENCE)
        client.send(rawpeer.frame(rawpeer.REQUEST, 2, b"second") + rawpeer.frame(rawpeer.REQUEST, 3))
        go.set()
        assert client.receive().body == b"answer to first"
        ends_with_words(client, "behind the end")
    assert ran == [b"first"]


@pytest.mark.ids("C02", "C07")
def test_descriptors_in_the_middle_of_a_frame(canary, client, file):
    _, bird = canary
    words = rawpeer.frame(rawpeer.REQUEST, 1, b"data", descriptors=1)
    client.send(words[:1])
    client.wait_until_read()  # else the kernel joins the two, and they came with the first byte
    client.send(words[1:], [file])
    ends_with_words(client, "in the middle of a frame")
    bird.still_sings()


@pytest.mark.ids("C02", "C07")
def test_descriptors_in_the_middle_of_a_body(canary, client, file):
    _, bird = canary
    words = rawpeer.frame(rawpeer.REQUEST, 1, bytes(40_000), descriptors=1)
    client.send(words[:20_000], [file])
    client.wait_until_read()
    client.send(words[20_000:], [file])
    ends_with_words(client, "in the middle of a frame")
    bird.still_sings()


@pytest.mark.ids("C02")
def test_descriptors_in_the_body_of_a_refused_frame(canary, client, file):
    _serving, bird = canary
    client.send(rawpeer.frame(rawpeer.REQUEST, 1, length=2**40))
    assert client.receive().reason == rawpeer.TOO_LARGE
    client.send(bytes(1000), [file] * 10)
    ends_with_words(client, "in the middle of a frame")
    bird.still_sings()


@pytest.mark.ids("E07")
def test_bytes_behind_the_body_of_a_refused_frame_end_the_channel(canary, client):
    serving, bird = canary
    serving.door.max_request = 1000
    client.send(rawpeer.frame(rawpeer.REQUEST, 1, length=2000))
    assert client.receive().reason == rawpeer.TOO_LARGE
    client.send(bytes(2001))
    ends_with_words(client, "behind the end")
    bird.still_sings()


@pytest.mark.ids("F05")
def test_bells_behind_the_body_of_a_refused_frame_are_no_frame(canary, client):
    """Of a client that gave a call up whose answer it would have been rung for."""
    serving, bird = canary
    serving.door.max_request = 1000
    client.send(rawpeer.frame(rawpeer.REQUEST, 1, length=2000))
    assert client.receive().reason == rawpeer.TOO_LARGE
    client.send(bytes(2000))
    client.wait_until_read()
    client.send(b"B")
    client.send(rawpeer.frame(rawpeer.REQUEST, 2, b"next"))
    reply = client.receive()
    assert (reply.kind, reply.number, reply.body) == (rawpeer.REPLY, 2, b"next")
    bird.still_sings()


@pytest.mark.ids("C01")
@pytest.mark.parametrize(("claimed", "brought"), [(0, 1), (1, 0), (1, 2), (2, 1), (65_535, 0), (0, 253)])
@pytest.mark.parametrize("kind", [rawpeer.REQUEST, rawpeer.PING])
def test_descriptors_claimed_and_brought_differ(canary, client, file, claimed, brought, kind):
    client.send(rawpeer.frame(kind, 1, descriptors=claimed), [file] * brought)
    ends_with_words(client, f"claims {claimed} descriptors and brought {brought}")
    canary[1].still_sings()


@pytest.mark.ids("C02")
def test_descriptors_of_a_ping_are_closed(canary, client, file):
    client.send(rawpeer.frame(rawpeer.PING, 1, descriptors=2), [file] * 2)
    assert client.receive().kind == rawpeer.PONG


@pytest.mark.ids("E12")
@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR])
def test_half_a_hang_up_is_a_hang_up(canary, client, how):
    serving, bird = canary
    client.call(b"x")
    before = serving.door.channels
    client.channel.shutdown(how)
    if how == socket.SHUT_RD:  # is not seen before somebody writes
        with contextlib.suppress(OSError):
            client.send(rawpeer.frame(rawpeer.REQUEST, 2))
    wait_until(lambda: serving.door.channels == before - 1)
    bird.still_sings()


@pytest.mark.ids("X16", "E03", "C06")
def test_client_that_goes_before_its_call_is_read(canary, client, file):
    """Descriptors in its last words are closed."""
    serving, bird = canary
    client.call(b"x")
    before = serving.door.channels
    client.send(rawpeer.frame(rawpeer.REQUEST, 2, b"data", descriptors=100)[:-1], [file] * 100)
    client.wait_until_read()
    client.channel.close()
    wait_until(lambda: serving.door.channels == before - 1)
    bird.still_sings()


def _speaks_for_another(client):
    """In a forked child: the pid of the credentials differs."""
    client.send(rawpeer.frame(rawpeer.REQUEST, 2, b"by the child"))
    try:
        return client.receive().text
    except EOFError:
        return "the end"


@pytest.mark.ids("B12", "K2")
def test_somebody_else_on_the_channel_ends_it(canary, client):
    client.call(b"by its owner")
    assert "somebody else" in run_as_uid(None, _speaks_for_another, client)
    client.expect_end()
    canary[1].still_sings()


def test_bytes_without_credentials_of_their_own_carry_the_kernels(client):
    client.send(rawpeer.frame(rawpeer.REQUEST, 1, b"plain"), credentials=False)
    assert client.receive().body == b"plain"


# -- a server that answers wrongly


@pytest.fixture
def called():
    """A server by hand, and a call of its door that it has read."""
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        call = Background(handle.call)
        server.accept()
        server.receive()
        yield server, handle, call


@pytest.mark.ids("E07")
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(rawpeer.frame(rawpeer.REPLY, 0), id="to call 0"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 2), id="to the next call"),
        pytest.param(rawpeer.frame(rawpeer.FAILURE, 2, rawpeer.refusal(1)), id="failure of another"),
        pytest.param(rawpeer.frame(rawpeer.PONG, 1), id="an answer to no ping"),
        pytest.param(rawpeer.frame(rawpeer.REQUEST, 1), id="a request"),
        pytest.param(rawpeer.frame(rawpeer.PING, 1), id="a ping"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 1, version=2), id="of another version"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 1) * 2, id="doubled"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 1) + b"\0", id="a byte behind"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 1, descriptors=1), id="descriptors that did not come"),
        pytest.param(rawpeer.frame(rawpeer.FAILURE, 1), id="failure without a reason"),
        pytest.param(rawpeer.frame(rawpeer.FAILURE, 1, rawpeer.refusal(99)), id="failure of a new kind"),
        pytest.param(rawpeer.frame(rawpeer.GOODBYE, 1), id="goodbye without a reason"),
        pytest.param(
            rawpeer.frame(rawpeer.REPLY, 1, claimed_buffers=9, length=8), id="more buffers than bytes"
        ),
        pytest.param(bytes(100), id="zeros"),
    ],
)
def test_what_is_no_reply_ends_the_channel(called, words):
    server, handle, call = called
    server.send(words)
    error = call.error()
    assert isinstance(error, ProtocolError)
    assert error.may_have_run
    server.expect_end()
    assert not handle._idle


@pytest.mark.ids("E07")
def test_doubled_reply_is_not_taken_for_the_next(called):
    """The second copy comes when the channel is idle."""
    server, handle, call = called
    server.send(rawpeer.frame(rawpeer.REPLY, 1, b"first"))
    assert call.result().data == b"first"
    server.send(rawpeer.frame(rawpeer.REPLY, 1, b"first"))
    error = Background(handle.call).error()
    assert isinstance(error, ProtocolError)


def test_a_channel_closed_as_idle_by_a_server_that_may_have_run_the_call_is_not_replaced(called):
    """No honest server says both; a call is made again only if it certainly did not run."""
    server, handle, call = called
    server.send(rawpeer.frame(rawpeer.REPLY, 1))
    call.result()
    second = Background(handle.call)
    server.receive()
    server.send(rawpeer.frame(rawpeer.GOODBYE, 0, rawpeer.refusal(rawpeer.IDLE, may_have_run=True)))
    error = second.error()
    assert isinstance(error, BusyError)
    assert error.may_have_run
    server.port.setblocking(False)
    with pytest.raises(BlockingIOError):  # nobody has knocked
        server.port.recv(1)


@pytest.mark.ids("E06", "E07")
def test_late_reply_is_not_taken_for_the_next(called):
    server, handle, call = called
    second = Background(handle.call, b"second")  # on another channel, for the first is in use
    late = server.channel
    server.channel = server.port  # keep the first channel
    server.accept()
    request = server.receive()
    assert request.body == b"second"
    server.send(rawpeer.frame(rawpeer.REPLY, request.number, b"second"))
    assert second.result().data == b"second"
    rawpeer.send(late, rawpeer.frame(rawpeer.REPLY, 1, b"late"))
    assert call.result().data == b"late"
    late.close()


@pytest.mark.ids("L14")
def test_failure_keeps_the_channel_and_goodbye_ends_it(called):
    server, handle, call = called
    server.send(rawpeer.frame(rawpeer.FAILURE, 1, rawpeer.refusal(rawpeer.BUSY, "one", may_have_run=True)))
    error = call.error()
    assert isinstance(error, BusyError)
    assert error.may_have_run
    call = Background(handle.call)
    request = server.receive()
    assert request.number == 2
    server.send(rawpeer.frame(rawpeer.GOODBYE, 2, rawpeer.refusal(rawpeer.BUSY, "two")))
    assert isinstance(call.error(), BusyError)
    server.expect_end()


@pytest.mark.ids("R2")
def test_goodbye_that_is_glued_to_the_reply(called):
    server, handle, call = called
    goodbye = rawpeer.frame(rawpeer.GOODBYE, 1, rawpeer.refusal(rawpeer.REVOKED, "gone now"))
    server.send(rawpeer.frame(rawpeer.REPLY, 1, b"reply") + goodbye)
    server.channel.close()
    assert call.result().data == b"reply"
    error = Background(handle.call, timeout=PATIENCE).error()
    assert "gone now" in str(error)
    assert not error.may_have_run


# -- garbage on a real channel


@pytest.mark.ids("H01")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=4), st.booleans())
def test_garbage_never_hurts_anybody_else(canary, pieces, headed):
    serving, bird = canary
    number = serving.door.open()
    with rawpeer.RawClient(number) as client:
        os.close(number)
        if headed:
            client.send(rawpeer.frame(rawpeer.REQUEST, 1, length=50))
        with contextlib.suppress(OSError):
            for piece in pieces:
                client.send(piece)
    bird.still_sings()
