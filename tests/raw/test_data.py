"""
Bytes and buffers of any size, both ways, copied, whole or not at all.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import socket
import time

import pytest
from support import rawpeer, wait_until
from support.rawdoor import PATIENCE

from doorpool import _gate
from doorpool._channel import JOIN, PACKET
from doorpool._errors import LimitError
from doorpool._wire import AHEAD, HEADER, MAX_BUFFERS

PATTERN = bytes(range(251)) * 4_300  # a prime period, so that nothing shifted looks right; > 1 MiB

SIZES = [
    *(0, 1, 2, 16_000),
    *range(JOIN - 2, JOIN + 3),  # what goes in one packet
    *range(PACKET - 2, PACKET + 3),
    *range(2 * PACKET - HEADER.size - 2, 2 * PACKET - HEADER.size + 3),
    200_000, 2**20 - 1, 2**20, 2**20 + 1,
]  # fmt: skip


def pattern(size):
    return PATTERN[:size]


@pytest.mark.ids("D2", "D6")
@pytest.mark.parametrize("lingers", [False, True])
def test_data_of_any_size_in_both_directions(serve, lingers):
    handle = serve(lingers=lingers).handle()
    for size in SIZES:
        assert handle.call(pattern(size)).data == pattern(size), size


@pytest.mark.ids("D2", "D6")
def test_buffers_of_any_size_in_both_directions(serve):
    handle = serve().handle()
    for size in SIZES:
        reply = handle.call(b"data", [memoryview(pattern(size)), memoryview(b"x")])
        assert reply.data == b"data"
        assert [bytes(buffer) for buffer in reply.buffers] == [pattern(size), b"x"], size


@pytest.mark.ids("D2", "D6")
def test_a_hundred_mebibytes(serve):
    handle = serve(lambda invocation: invocation.reply(b"", [memoryview(invocation.data)])).handle()
    data = memoryview(bytearray(100 << 20))
    for at in range(0, len(data), 4096):
        data[at : at + 8] = at.to_bytes(8, "little")
    reply = handle.call(data)
    assert reply.buffers[0] == data


@pytest.mark.parametrize("count", [*range(10), 255, 256, 511, 512, 513, 600, MAX_BUFFERS])
def test_any_number_of_buffers(serve, count):
    handle = serve().handle()
    buffers = [memoryview(pattern(i % 5)) for i in range(count)]
    reply = handle.call(b"data", buffers)
    assert reply.data == b"data"
    assert len(reply.buffers) == count
    assert all(ours == theirs for ours, theirs in zip(buffers, reply.buffers, strict=True))


@pytest.mark.ids("D2", "D6")
def test_packets_that_end_where_the_room_ends(serve):
    """A head that fills its packets leaves the body to begin, and its room to end, with one too."""
    handle = serve().handle()
    empty = [memoryview(b"")] * ((PACKET - HEADER.size) // 8)
    data = bytes(3 * AHEAD)
    for _ in range(4):  # a serving that has lost a thread by each has none left
        reply = handle.call(data, empty, timeout=PATIENCE)
        assert reply.data == data
        assert len(reply.buffers) == len(empty)


def test_one_buffer_too_many_in_a_request(serve):
    serving = serve()
    handle = serving.handle()
    with pytest.raises(LimitError, match="65537 buffers") as caught:
        handle.call(b"", [memoryview(b"")] * (MAX_BUFFERS + 1))
    assert (caught.value.limit, caught.value.value) == (MAX_BUFFERS, MAX_BUFFERS + 1)
    assert not caught.value.may_have_run
    assert handle.call(b"still").data == b"still"


def test_one_buffer_too_many_in_a_reply(serve):
    def procedure(invocation):
        with pytest.raises(LimitError, match="65537 buffers") as caught:
            invocation.reply(b"", [memoryview(b"")] * (MAX_BUFFERS + 1))
        assert caught.value.may_have_run
        assert not invocation.answered
        invocation.reply(b"answered all the same")

    assert serve(procedure).handle().call(timeout=PATIENCE).data == b"answered all the same"


def test_buffers_that_are_all_empty(serve):
    reply = serve().handle().call(b"", [memoryview(b"")] * 3)
    assert list(reply.buffers) == [b"", b"", b""]


@pytest.mark.parametrize(
    "data", [b"\1\0\0\0\2\0\0\0", bytearray(b"\1\0\0\0\2\0\0\0"), memoryview(array.array("i", [1, 2]))],
    ids=["bytes", "bytearray", "memoryview of ints"],
)  # fmt: skip
def test_data_of_every_kind_both_ways(serve, data):
    handle = serve(lambda invocation: invocation.reply(data)).handle()
    assert bytes(handle.call(data).data) == bytes(data)
    big = data if not isinstance(data, memoryview) else memoryview(array.array("i", range(50_000)))
    handle = serve().handle()
    assert bytes(handle.call(big, [memoryview(big)]).data) == bytes(big)


def test_buffers_of_items_and_of_several_dimensions(serve):
    table = memoryview(array.array("d", range(12))).cast("B").cast("d", shape=[3, 4])
    empty = memoryview(b"").cast("B")
    reply = serve().handle().call(b"", [table, empty, memoryview(array.array("i", range(3)))])
    assert [len(buffer) for buffer in reply.buffers] == [96, 0, 12]
    assert bytes(reply.buffers[0]) == bytes(table)


def test_empty_table_as_a_buffer(serve):
    numpy = pytest.importorskip("numpy")
    reply = serve().handle().call(b"", [memoryview(numpy.empty((0, 3))), memoryview(b"x")])
    assert [bytes(buffer) for buffer in reply.buffers] == [b"", b"x"]


def test_scattered_memory_is_refused_and_nothing_is_sent(serve):
    scattered = memoryview(b"abcdef")[::2]
    problems = []

    def procedure(invocation):
        for arguments in [(scattered,), (b"", [scattered])]:
            with pytest.raises((TypeError, ValueError)) as caught:
                invocation.reply(*arguments)
            problems.append(caught.value)
        invocation.reply(b"answered all the same")

    serving = serve(procedure)
    handle = serving.handle()
    for arguments in [(scattered,), (b"", [scattered])]:
        with pytest.raises((TypeError, ValueError)):
            handle.call(*arguments)
    assert handle.call(timeout=PATIENCE).data == b"answered all the same"
    assert len(problems) == 2
    assert serving.door.channels == 1


def test_buffers_can_be_written_and_are_aligned(serve):
    seen = []

    def procedure(invocation):
        for buffer in invocation.buffers:
            seen.append(ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer)) % 16)
            buffer[:] = bytes(len(buffer))
        invocation.reply(b"", [memoryview(buffer) for buffer in invocation.buffers])

    reply = serve(procedure).handle().call(b"abc", [memoryview(b"x" * size) for size in (1, 7, 4096, 99_999)])
    assert seen == [0, 0, 0, 0]
    for buffer in reply.buffers:
        assert not any(buffer)
        buffer[0] = 1


@pytest.mark.ids("D1")
def test_neither_side_sees_the_others_later_changes(serve):
    kept = []

    def procedure(invocation):
        kept.append(invocation.buffers[0])
        invocation.reply(b"", [memoryview(kept[0])])
        kept[0][:] = b"server"

    ours = bytearray(b"client")
    serving = serve(procedure)
    reply = serving.handle().call(b"", [memoryview(ours)])
    ours[:] = b"second"
    serving.close()
    assert reply.buffers[0] == b"client"
    assert kept[0] == b"server"


@pytest.mark.ids("D13")
def test_part_of_a_request_is_never_run(serve):
    """The caller gives up in the middle of a big request."""
    ran = []
    serving = serve(lambda invocation: ran.append(invocation) or invocation.reply(), threads=1)
    handle = serving.handle()
    channel = handle._idle[-1]
    head = HEADER.pack(ord("Q"), 1, 0, 0, 1, 1 << 20, 0, 0)
    channel.socket.sendall(head + bytes(100_000))
    channel.close()
    handle._idle.clear()
    assert handle.call(b"whole").data == b""
    assert len(ran) == 1
    ran.clear()


def test_own_pipe_of_the_test_is_untouched(serve):
    """A canary for descriptors: a number of ours is the same file after a thousand calls."""
    read, write = os.pipe()
    handle = serve().handle()
    for _ in range(300):
        handle.call(b"x", [memoryview(b"y")])
    os.write(write, b"mine")
    assert os.read(read, 10) == b"mine"
    os.close(read)
    os.close(write)


# -- a reply that nobody reads


@pytest.mark.ids("F06")
def test_a_caller_who_reads_nothing_of_a_long_reply_gives_its_thread_back(serve, monkeypatch):
    """The one server thread is freed when its patience ends, and what was parked is gone with the channel."""
    monkeypatch.setattr(_gate, "SEND_PATIENCE", 0.2)
    long = bytes(64 << 20)

    def answer(invocation):
        invocation.reply(long if invocation.data == b"long" else b"short")

    serving = serve(answer, threads=1)
    number = serving.door.open()
    with rawpeer.RawClient(number) as client:
        os.close(number)
        client.send(rawpeer.frame(rawpeer.REQUEST, 1, b"long"))
        wait_until(lambda: rawpeer.unread_there(client.channel) == 0)
        began = time.monotonic()
        assert serving.handle().call(b"x", timeout=PATIENCE).data == b"short"
        assert time.monotonic() - began < PATIENCE / 2
        wait_until(lambda: serving.door.channels == 1, "the channel of who does not read is closed")
        read = 0
        with contextlib.suppress(ConnectionError):
            while piece := client.channel.recv(1 << 20):
                read += len(piece)
        assert read < 1 << 20, "no more than the kernel keeps"
    assert serving.door.channels == 1


@pytest.mark.ids("H07", "D2", "D6", "F1")
@pytest.mark.parametrize("size", [4_000, 5_000, PACKET, 1 << 20])
def test_a_frame_goes_whole_by_sockets_with_the_smallest_buffers(serve, size):
    """With its descriptors, which go along with the first of its packets that is sent, and no other."""
    serving = serve()
    handle = serving.handle()
    handle.call(b"first")
    (served,) = serving.door._channels
    for end in (handle._idle[-1], served.channel):
        end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    data, buffer = os.urandom(size), bytes(range(256)) * (size // 256)
    number = os.open(os.devnull, os.O_RDONLY)
    try:
        with handle.call(data, [memoryview(buffer)], [number] * 3) as reply:
            assert reply.data == data
            assert [bytes(it) for it in reply.buffers] == [buffer]
            assert [os.fstat(it).st_rdev for it in reply.descriptors] == [os.fstat(number).st_rdev] * 3
        assert handle.call(data).data == data
    finally:
        os.close(number)
    assert list(serving.door._channels) == [served]
