"""
Limits: read before a call, changed at any time, refused from the header alone, in a fixed order.
"""

from __future__ import annotations

import os
import resource
import threading

import pytest
from support import rawpeer
from support.rawdoor import PATIENCE, Background, echo

from doorpool._errors import ClosedError, LimitError, ProtocolError, RevokedError
from doorpool._handle import MAX_REPLY
from doorpool.door import Handle


@pytest.fixture
def null():
    number = os.open(os.devnull, os.O_RDONLY)
    yield number
    os.close(number)


def resident() -> int:
    """
    Bytes of memory that this process has.
    """
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


# -- known before the call


@pytest.mark.ids("L13", "P4")
def test_caller_refuses_what_the_greeting_forbids(serve, null):
    ran = []
    serving = serve(lambda invocation: ran.append(1), max_request=100, max_descriptors=2)
    handle = serving.handle()
    for data, buffers, descriptors, limit, value in [
        (bytes(101), [], [], 100, 101),
        (bytes(60), [memoryview(bytes(41))], [], 100, 101),
        (b"", [memoryview(bytes(51))] * 2, [], 100, 102),
        (b"", [], [null] * 3, 2, 3),
    ]:
        with pytest.raises(LimitError) as caught:
            handle.call(data, buffers, descriptors)
        assert (caught.value.limit, caught.value.value) == (limit, value)
        assert not caught.value.may_have_run
        assert str(limit) in str(caught.value)
        assert str(value) in str(caught.value)
    assert ran == []


@pytest.mark.ids("L13", "P8")
def test_what_is_just_allowed_goes_through(serve, null):
    handle = serve(max_request=100, max_descriptors=2).handle()
    assert len(handle.call(bytes(100)).data) == 100
    assert len(handle.call(bytes(60), [memoryview(bytes(40))]).data) == 60
    handle.call(descriptors=[null] * 2).close()
    signal = serve(max_request=0).handle()  # a door that can only be knocked at
    signal.call()
    with pytest.raises(LimitError):
        signal.call(b"x")


@pytest.mark.ids("F15")
def test_door_that_takes_no_descriptors(serve, null):
    def procedure(invocation):
        invocation.reply(descriptors=[null])  # it may give some

    handle = serve(procedure, refuse_descriptors=True).handle()
    with pytest.raises(LimitError, match="takes no descriptors"):
        handle.call(descriptors=[null])
    with handle.call() as reply:
        assert len(reply.descriptors) == 1


# -- changed while the door is in use


@pytest.mark.ids("P1", "L13")
@pytest.mark.parametrize("size", [101, 20_000, 8 << 20])
def test_server_refuses_by_the_limit_of_now(serve, size):
    """The caller knows an old limit; its channel survives the refusal."""
    serving = serve()
    handle = serving.handle()
    handle.call(bytes(size))
    serving.door.max_request = 100
    for _ in range(2):
        with pytest.raises(LimitError) as caught:
            handle.call(bytes(size))
        assert (caught.value.limit, caught.value.value) == (100, size)
        assert not caught.value.may_have_run
        assert handle.call(b"small").data == b"small"
    assert serving.door.channels == 1
    serving.door.max_request = 2**30
    assert len(handle.call(bytes(size)).data) == size


@pytest.mark.ids("P1", "F15")
def test_server_refuses_descriptors_by_the_limit_of_now(serve, null):
    serving = serve()
    handle = serving.handle()
    serving.door.max_descriptors = 1
    with pytest.raises(LimitError) as caught:
        handle.call(descriptors=[null, null])
    assert (caught.value.limit, caught.value.value, caught.value.may_have_run) == (1, 2, False)
    serving.door.refuse_descriptors = True
    with pytest.raises(LimitError, match="takes no descriptors"):
        handle.call(descriptors=[null])
    assert handle.call(b"small").data == b"small"
    assert serving.door.channels == 1


@pytest.mark.ids("P1", "P7")
def test_limit_of_replies(serve):
    def procedure(invocation):
        with pytest.raises(LimitError, match="max_reply") as caught:
            invocation.reply(bytes(11))
        assert caught.value.may_have_run
        with pytest.raises(LimitError):
            invocation.reply(b"12345", [memoryview(b"123456")])
        invocation.reply(bytes(10))

    serving = serve(procedure, max_reply=10)
    assert serving.handle().call(bytes(1000), timeout=PATIENCE).data == bytes(10)
    assert serving.errors == []


# -- from the header alone


@pytest.mark.ids("P6", "F08")
@pytest.mark.parametrize("size", [101, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_refused_while_only_the_header_was_sent(canary, size):
    serving, bird = canary
    door = serving.add(echo, max_request=100)
    number = door.open()
    before = resident()
    with rawpeer.RawClient(number) as client:
        client.send(rawpeer.frame(rawpeer.REQUEST, 1, length=size))
        answer = client.receive()
        assert (answer.kind, answer.number, answer.reason) == (rawpeer.FAILURE, 1, rawpeer.TOO_LARGE)
        assert answer.limits == (100, size)
        assert not answer.may_have_run
        client.send(bytes(1000 if size > 1000 else size))  # its body is thrown away as it comes
        client.wait_until_read()
    os.close(number)
    bird.still_sings()
    assert resident() - before < 16 << 20


@pytest.mark.ids("F08")
def test_claims_within_the_limit_take_no_memory(canary):
    serving, bird = canary
    number = serving.door.open()
    before = resident()
    clients = [rawpeer.RawClient(number) for _ in range(10)]
    for client in clients:
        client.send(rawpeer.frame(rawpeer.REQUEST, 1, length=2**30))
        client.wait_until_read()
    bird.still_sings()
    assert resident() - before < 32 << 20
    for client in clients:
        client.close()
    os.close(number)


@pytest.mark.ids("F08")
def test_reply_that_claims_too_much_is_the_end_of_the_channel():
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        call = Background(handle.call)
        server.accept()
        server.receive()
        server.send(rawpeer.frame(rawpeer.REPLY, 1, length=MAX_REPLY + 1))
        error = call.error()
        assert isinstance(error, ProtocolError)
        assert error.may_have_run
        server.expect_end()


# -- the order of refusals


@pytest.mark.ids("L12")
def test_order_of_refusals_at_the_caller(serve, null):
    """A bad door, a door taken away, sizes, descriptors refused, too many, a bad one."""
    serving = serve(max_request=10, max_descriptors=1, refuse_descriptors=True)
    counted = serve(max_request=10, max_descriptors=1)
    handle, other = serving.handle(), counted.handle()
    everything = {"data": bytes(11), "descriptors": [null, 2**31 - 1]}
    with pytest.raises(LimitError, match="max_request"):
        handle.call(**everything)
    with pytest.raises(LimitError, match="takes no descriptors"):
        handle.call(descriptors=everything["descriptors"])
    with pytest.raises(LimitError, match="over its limit of 1"):
        other.call(descriptors=everything["descriptors"])
    with pytest.raises(OSError, match="not open"):
        other.call(descriptors=everything["descriptors"][1:])
    serving.door.revoke()
    with pytest.raises(RevokedError):
        handle.call(**everything)
    handle.close()
    with pytest.raises(ClosedError):
        handle.call(**everything)


@pytest.mark.ids("L12")
def test_order_of_refusals_at_the_server(serve, null):
    serving = serve()
    number = serving.door.open()
    door = serving.door
    with rawpeer.RawClient(number) as client:

        def refused(calls, descriptors):
            client.number += 1
            words = rawpeer.frame(rawpeer.REQUEST, client.number, bytes(calls), descriptors=len(descriptors))
            client.send(words, descriptors)
            return client.receive().reason

        door.max_request, door.max_descriptors, door.refuse_descriptors = 10, 1, True
        assert refused(11, [null] * 2) == rawpeer.TOO_LARGE
        assert refused(10, [null] * 2) == rawpeer.REFUSES
        door.refuse_descriptors = False
        assert refused(10, [null] * 2) == rawpeer.TOO_MANY
        door.revoke()
        goodbye = client.receive()
        assert (goodbye.kind, goodbye.reason) == (rawpeer.GOODBYE, rawpeer.REVOKED)
    os.close(number)


@pytest.mark.ids("P6")
def test_refusal_costs_no_running_procedure(serve):
    """All procedures run; the next call is refused as soon as a thread looks, without running."""
    ran, go = [], threading.Event()

    def procedure(invocation):
        ran.append(bytes(invocation.data))
        assert go.wait(PATIENCE)
        invocation.reply()

    serving = serve(procedure, threads=2)
    first, second = serving.handle(), serving.handle()
    running = Background(first.call, b"first")
    serving.door.max_request = 10
    with pytest.raises(LimitError):
        second.call(bytes(11), timeout=PATIENCE)
    go.set()
    running.result()
    assert ran == [b"first"]
