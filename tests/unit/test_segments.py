"""
Segments: what goes where, who owns it when, what is given back, and what a peer cannot do to us.

Two shelves are joined by hand: the manifest is passed on, and the descriptors, copied as the kernel
would copy them.
"""

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import pickle
import socket
import struct
import sys
import threading
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import support
from support.processes import run_as_uid
from support.shortage import only

import doorpool._keeper as _keeper
import doorpool._segments as _segments
from doorpool._errors import ProtocolError
from doorpool._segments import Shelf, buffer, empty, totals

KIB, MIB = 1 << 10, 1 << 20


def memfd_maps():
    """The lines of /proc/self/maps that are segments."""
    with open("/proc/self/maps") as file:
        return [line for line in file if "memfd:doorpool" in line]


def memfd_numbers():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if "memfd:" in os.readlink(f"/proc/self/fd/{name}"):
                found.append(int(name))
        except FileNotFoundError:  # the one by which the folder is read
            continue
    return found


def pages(number):
    """The bytes that the kernel has given a memfd."""
    return os.fstat(number).st_blocks * 512


class Pair:
    """Two ends of one channel."""

    def __init__(self):
        self.one, self.other = Shelf(), Shelf()

    def close(self):
        self.one.close()
        self.other.close()

    def send(self, *buffers, back=False, cargo=None):
        """Send buffers from one end to the other, as a channel would; return what has arrived."""
        source, target = (self.other, self.one) if back else (self.one, self.other)
        views = [memoryview(each).cast("B") for each in buffers]
        cargo = cargo or source.load(views)
        if cargo is None:
            return [bytearray(view) for view in views]
        numbers = [os.dup(number) for number in cargo.descriptors]
        inline = [bytearray(view) for view in cargo.inline]
        arrived = target.unload(cargo.manifest, inline, numbers)
        assert numbers == []
        return arrived

    def tell(self, *, back=True):
        """Pass news on, if there are any."""
        if (self.other if back else self.one).has_news:
            self.send(back=back)


@pytest.fixture
def pair():
    pair = Pair()
    yield pair
    pair.close()


@pytest.fixture(autouse=True)
def nothing_stays(leak_guard):
    """No segment outlives its test, mapped or open."""
    yield
    support.wait_until(lambda: gc.collect() >= 0 and not memfd_maps() and not memfd_numbers(), "segments")
    assert totals().held == totals().received == 0
    assert not _segments._exports
    assert not _segments._loans


@pytest.fixture
def slow_sweeper(monkeypatch):
    """Nothing is given back behind the test's back."""
    monkeypatch.setattr(_segments, "IDLE", 3_600.0)
    monkeypatch.setattr(_segments, "_sweeper", _segments._Sweeper())


def block(size, seed=1):
    """Bytes that differ from place to place, and by seed."""
    return bytearray(np.random.default_rng(seed).bytes(size))


def in_segment(view):
    address = np.frombuffer(view, "u1").ctypes.data
    for line in memfd_maps():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


# -- what goes where ------------------------------------------------------------------------------


def test_a_small_buffer_stays_inline(pair):
    assert pair.one.load([memoryview(bytes(_segments.THRESHOLD - 1))]) is None


def test_a_buffer_from_the_threshold_on_goes_by_segment_and_arrives_writable(pair):
    data = block(_segments.THRESHOLD)
    (arrived,) = pair.send(data)
    assert in_segment(arrived)
    assert arrived == data
    arrived[0] ^= 0xFF
    assert arrived[0] == data[0] ^ 0xFF


def test_buffers_keep_their_order(pair):
    sizes = [10, 70 * KIB, 0, MIB, 100, 2 * MIB, 64 * KIB, 1]
    sent = [block(size, size) for size in sizes]
    arrived = pair.send(*sent)
    assert arrived == sent
    assert [in_segment(view) if len(view) else False for view in arrived] == [
        size >= 64 * KIB for size in sizes
    ]


def test_read_only_memory_can_be_sent(pair):
    data = bytes(block(3 * MIB))
    (arrived,) = pair.send(data)
    assert arrived == data


def test_large_buffers_have_a_segment_each_and_smaller_ones_share_one(pair):
    pair.send(*[bytes(MIB)] * 3, *[bytes(100 * KIB)] * 4)
    assert pair.one.counts.held == 4


def test_buffers_that_share_a_segment_are_aligned_and_apart(pair):
    sent = [block(64 * KIB + extra, extra) for extra in (1, 63, 64, 65)]
    arrived = pair.send(*sent)
    assert [np.frombuffer(view, "u1").ctypes.data % 64 for view in arrived] == [0] * 4
    for view in arrived:
        view[:] = bytes(len(view))
        sent[arrived.index(view)][:] = bytes(len(view))
        assert arrived == sent


def test_arrays_arrive_on_the_segment_and_can_be_written(pair):
    array = np.arange(300_000).reshape(300, 1000)
    buffers = []
    data = pickle.dumps(array, 5, buffer_callback=lambda each: buffers.append(each.raw()))
    arrived = pickle.loads(data, buffers=pair.send(*buffers))
    assert in_segment(arrived)
    assert arrived.flags.writeable
    assert (arrived == array).all()


def test_no_more_descriptors_than_there_is_room_for(pair, slow_sweeper):
    sent = [block(MIB, seed) for seed in range(5)]
    views = [memoryview(each) for each in sent]
    cargo = pair.one.load(views, room=3)
    assert len(cargo.descriptors) == 3
    assert len(cargo.inline) == 2
    assert pair.send(*sent, cargo=cargo) == sent


def test_a_message_brings_at_most_so_many_new_segments(pair, monkeypatch):
    monkeypatch.setattr(_segments, "MOST_NEW", 4)
    arrived = pair.send(*[bytes(MIB)] * 6)
    assert [in_segment(view) for view in arrived] == [True] * 4 + [False] * 2


def test_nothing_to_say_is_nothing_to_send(pair):
    assert pair.one.load([]) is None
    assert pair.one.load([memoryview(b"abc")]) is None
    assert not pair.one.has_news


# -- who owns it, and when ------------------------------------------------------------------------


def test_a_segment_is_used_again_once_nothing_stands_on_it_and_the_sender_was_told(pair, slow_sweeper):
    arrived = pair.send(block(MIB, 1))
    del arrived
    assert pair.other.has_news
    pair.tell()
    assert not pair.other.has_news
    kept = pair.send(block(MIB, 2))
    assert pair.one.counts.held == 1
    assert pair.one.counts.reused == 1
    assert kept == [block(MIB, 2)]


def test_a_segment_is_not_used_again_before_the_sender_was_told(pair, slow_sweeper):
    pair.send(block(MIB, 1))
    assert pair.other.has_news
    pair.send(block(MIB, 2))
    assert pair.one.counts.held == 2
    assert pair.one.counts.reused == 0


def test_what_is_kept_never_changes(pair, slow_sweeper):
    kept = [(pair.send(block(MIB, seed))[0], block(MIB, seed)) for seed in range(10)]
    pair.tell()
    for seed in range(100, 120):
        pair.send(block(MIB, seed))
        pair.tell()
    assert all(view == data for view, data in kept)
    assert pair.one.counts.retained == 10
    assert pair.one.counts.reused == 19


def test_a_slice_of_what_came_keeps_all_of_it(pair, slow_sweeper):
    arrived = pair.send(block(MIB, 1))
    part = np.frombuffer(arrived[0], "u1")[10:20]
    del arrived
    gc.collect()
    pair.tell()
    pair.send(block(MIB, 2))
    assert bytes(part) == block(MIB, 1)[10:20]


def test_one_of_several_that_share_a_segment_keeps_it(pair, slow_sweeper):
    first, second = pair.send(block(64 * KIB, 1), block(64 * KIB, 2))
    del first
    assert not pair.other.has_news
    del second
    assert pair.other.has_news


def test_what_the_receiver_writes_stays_as_the_sender_writes_its_own(pair):
    data = block(MIB)
    (arrived,) = pair.send(data)
    arrived[:4] = b"mine"
    data[:4] = b"hers"
    assert arrived[:4] == b"mine"
    assert data[:4] == b"hers"


def test_what_came_can_be_sent_back(pair, slow_sweeper):
    data = block(2 * MIB)
    (arrived,) = pair.send(data)
    (home,) = pair.send(arrived, back=True)
    home[0] ^= 1
    assert arrived == data


def test_the_best_fit_is_taken_and_never_a_much_too_large_one(pair, slow_sweeper):
    pair.send(bytes(8 * MIB), bytes(MIB), bytes(2 * MIB))
    pair.tell()
    pair.send(bytes(MIB + 1))
    assert pair.one.counts.held == 3
    pair.send(bytes(MIB))
    pair.send(bytes(MIB))
    assert pair.one.counts.held == 4


def test_two_channels_never_share_a_segment(slow_sweeper):
    first, second = Pair(), Pair()
    first.send(bytes(MIB))
    first.tell()
    second.send(bytes(MIB))
    assert first.one.counts.held == second.one.counts.held == 1
    first.close()
    second.close()


def test_a_message_that_is_not_sent_can_be_recalled(pair, slow_sweeper):
    sent = [memoryview(block(MIB, 1)), memoryview(block(70 * KIB, 2))]
    cargo = pair.one.load(sent)
    pair.one.recall(cargo)
    pair.one.recall(cargo)
    assert pair.one.counts.retained == 0
    assert pair.send(*sent) == sent
    assert pair.one.counts.held == 2
    assert pair.one.counts.reused == 2


def test_news_of_a_message_that_is_not_sent_are_told_by_the_next(pair, slow_sweeper):
    pair.send(bytes(MIB))
    cargo = pair.other.load([])
    assert not pair.other.has_news
    pair.other.recall(cargo)
    assert pair.other.has_news
    pair.tell()
    assert pair.one.counts.retained == 0


def test_what_is_recalled_is_still_the_receivers(pair, slow_sweeper):
    pair.send(bytes(MIB))
    pair.other.recall(pair.other.load([]))
    manifest = _segments._Manifest(1, [(0, 1, 0, MIB)]).encode()
    with pytest.raises(ProtocolError):
        pair.other.unload(manifest, [], [])
