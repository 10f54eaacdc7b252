"""
Segments: what goes where, who owns it when, what is given back, and what a peer cannot do to us.

Two shelves are joined by hand: the manifest is passed on, and the descriptors, copied as the kernel
would copy them.
"""

import concurrent.futures
import ctypes
import errno
import fcntl
import gc
import itertools
import mmap
import os
import pickle
import resource
import socket
import stat
import sys
import tempfile
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support
from support.processes import run_as_uid
from support.shortage import only

from doorpool import _keeper, _manifest, _memory, _segments, _shelf
from doorpool._channel import Channel
from doorpool._errors import ProtocolError
from doorpool._shelf import Shelf, buffer, empty, totals

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


def is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


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
def nothing_stays(leak_guard, monkeypatch):
    """No segment outlives its test, mapped or open; and buffers go by segment from 64 KiB on."""
    monkeypatch.setattr(_shelf, "THRESHOLD", 64 * KIB)
    yield
    support.wait_until(lambda: gc.collect() >= 0 and not memfd_maps() and not memfd_numbers(), "segments")
    assert totals().held == totals().received == 0
    assert not _segments.exports
    assert not _segments.loans


@pytest.fixture
def slow_sweeper(monkeypatch):
    """Nothing is given back behind the test's back."""
    monkeypatch.setattr(_shelf._sweeper, "arm", lambda: None)


def block(size, seed=1):
    """Bytes that differ from place to place, and by seed."""
    return bytearray(np.random.default_rng(seed).bytes(size))


def in_segment(view):
    address = np.asarray(view).ctypes.data
    for line in memfd_maps():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


# -- what goes where ------------------------------------------------------------------------------


def test_a_small_buffer_stays_inline(pair):
    assert pair.one.load([memoryview(bytes(_shelf.THRESHOLD - 1))]) is None


def test_a_buffer_from_the_threshold_on_goes_by_segment_and_arrives_writable(pair):
    data = block(_shelf.THRESHOLD)
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
    monkeypatch.setattr(_shelf, "MOST_NEW", 4)
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
    manifest = _manifest.Manifest(1, [(0, 1, 0, MIB)]).encode()
    with pytest.raises(ProtocolError):
        pair.other.unload(manifest, [], [])


# -- limits ---------------------------------------------------------------------------------------


def test_beyond_the_limit_of_the_channel_buffers_go_inline(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_OF_CHANNEL", 5 * MIB)
    kept = [pair.send(block(2 * MIB, seed))[0] for seed in range(4)]
    assert [in_segment(view) for view in kept] == [True, True, False, False]
    assert kept == [block(2 * MIB, seed) for seed in range(4)]


def test_a_free_segment_makes_room_for_one_of_another_size(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_OF_CHANNEL", 5 * MIB)
    pair.send(bytes(MIB))
    pair.tell()
    (kept,) = pair.send(block(5 * MIB))
    assert in_segment(kept)
    assert pair.one.counts.held == 1
    pair.tell(back=False)
    assert pair.other.counts.received == 1


def test_a_buffer_over_the_limit_alone_costs_no_free_segment(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_OF_CHANNEL", 2 * MIB)
    pair.send(bytes(MIB))
    pair.tell()
    assert not in_segment(pair.send(bytes(3 * MIB))[0])
    assert pair.one.counts.held == 1


def test_there_are_at_most_so_many_segments_on_a_channel(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "MOST_SEGMENTS", 3)
    kept = [pair.send(bytes(MIB))[0] for _ in range(5)]
    assert [in_segment(view) for view in kept] == [True] * 3 + [False] * 2
    del kept
    pair.tell()
    assert in_segment(pair.send(bytes(MIB))[0])


def test_beyond_the_limit_of_the_process_the_free_ones_of_other_channels_go(monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_OF_PROCESS", 5 * MIB)
    first, second = Pair(), Pair()
    first.send(bytes(3 * MIB))
    first.tell()
    (kept,) = second.send(bytes(3 * MIB))
    assert in_segment(kept)
    assert first.one.counts.held == 0
    assert first.one.has_news
    (inline,) = first.send(bytes(3 * MIB))
    assert not in_segment(inline)
    first.close()
    second.close()


def test_the_descriptors_of_the_process_bound_its_segments(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_segments, "most_descriptors", lambda: 2)
    kept = [pair.send(block(MIB, seed))[0] for seed in range(3)]
    assert [in_segment(view) for view in kept] == [True, True, False]
    assert len(kept[0]) == MIB


def test_a_receiver_with_many_segments_keeps_no_descriptors_of_more(pair, monkeypatch, slow_sweeper):
    cargo = pair.one.load([memoryview(block(MIB, seed)) for seed in range(4)])
    monkeypatch.setattr(_segments, "most_descriptors", lambda: 2)
    before = len(memfd_numbers())
    kept = pair.send(*[bytes(MIB)] * 4, cargo=cargo)
    assert len(memfd_numbers()) == before + 2
    assert kept == [block(MIB, seed) for seed in range(4)]


def test_a_peer_may_not_map_more_into_us_than_the_limit(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_FROM_PEER", 3 * MIB)
    pair.send(bytes(2 * MIB))
    with pytest.raises(ProtocolError, match=f"{4 * MIB} bytes"):
        pair.send(bytes(2 * MIB))
    assert pair.other.counts.received == 1


def test_a_peer_may_not_map_more_segments_into_us_than_the_limit(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "MOST_FROM_PEER", 2)
    with pytest.raises(ProtocolError, match="3 segments"):
        pair.send(*[bytes(MIB)] * 3)
    assert pair.other.counts.received == 0


@pytest.mark.ids("D09")
def test_beyond_what_all_peers_may_map_into_us_bytes_are_copied_out(monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_MAPPED", 5 * MIB)
    pairs = [Pair(), Pair(), Pair()]
    kept = [each.send(block(2 * MIB, seed))[0] for seed, each in enumerate(pairs)]
    assert [in_segment(view) for view in kept] == [True, True, False]
    assert kept == [block(2 * MIB, seed) for seed in range(3)]
    assert (totals().received, totals().mapped, totals().mapped_bytes) == (3, 2, 4 * MIB)
    pairs[2].tell()
    assert pairs[2].one.counts.retained == 0  # its maker has it back, though what it held is kept
    assert kept[2] == block(2 * MIB, 2)
    kept.clear()
    assert in_segment(pairs[2].send(block(2 * MIB, 3))[0]) is False  # nobody was told of what is free
    for each in pairs:
        each.tell()
        each.close()


def test_what_nothing_stands_on_is_unmapped_for_other_channels(monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_MAPPED", 5 * MIB)
    first, second = Pair(), Pair()
    first.send(block(3 * MIB, 1))
    first.tell()
    (kept,) = second.send(block(3 * MIB, 2))
    assert in_segment(kept)
    assert first.other.counts.received == 1
    assert first.other.counts.mapped == 0
    (copied,) = first.send(block(3 * MIB, 3))
    assert not in_segment(copied)
    del kept
    second.tell()
    first.tell()
    (again,) = first.send(block(3 * MIB, 4))
    assert in_segment(again)
    assert (copied, again) == (block(3 * MIB, 3), block(3 * MIB, 4))
    assert first.one.counts.held == 1
    assert totals().mapped_bytes == 3 * MIB
    first.close()
    second.close()


def test_a_segment_over_what_all_may_map_unmaps_no_other(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_MAPPED", 2 * MIB)
    pair.send(bytes(MIB))
    pair.tell()
    (copied,) = pair.send(block(3 * MIB))
    assert not in_segment(copied)
    assert copied == block(3 * MIB)
    assert pair.other.counts.mapped_bytes == MIB


def test_what_could_not_be_mapped_again_stays_mapped(monkeypatch, slow_sweeper):
    monkeypatch.setattr(_segments, "most_descriptors", lambda: 4)
    monkeypatch.setattr(_shelf, "BYTES_MAPPED", 5 * MIB)
    first, second = Pair(), Pair()
    cargo = first.one.load([memoryview(block(3 * MIB, 1))])
    monkeypatch.setattr(_segments, "most_descriptors", lambda: 0)
    first.send(bytes(3 * MIB), cargo=cargo)  # whose descriptor is closed
    first.tell()
    monkeypatch.setattr(_segments, "most_descriptors", lambda: 4)
    (copied,) = second.send(block(3 * MIB, 2))
    assert not in_segment(copied)
    (again,) = first.send(block(3 * MIB, 3))
    assert in_segment(again)
    assert (copied, again) == (block(3 * MIB, 2), block(3 * MIB, 3))
    first.close()
    second.close()


def test_channels_that_unmap_each_others_segments_never_lose_what_is_kept(monkeypatch, many):
    """Each of three threads has room for little more than its own, and keeps what came for a while."""
    monkeypatch.setattr(_shelf, "BYTES_MAPPED", 700 * KIB)
    mapped = []

    def send(seed):
        pair, kept = Pair(), []
        for number in range(many(100, 3_000)):
            data = block(100 * KIB, 3 * number + seed)
            kept.append((pair.send(data)[0], data))
            mapped.append(in_segment(kept[-1][0]))
            pair.tell()
            if len(kept) > 2:
                view, data = kept.pop(0)
                assert view == data
                del view
        pair.close()
        return True

    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        assert list(threads.map(send, range(3))) == [True] * 3
    assert any(mapped)


# -- shortages ------------------------------------------------------------------------------------


def fail_with(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def map_nothing(patch):
    """Have no memory for a mapping."""
    patch.setattr(_memory.Mapping, "of", fail_with(errno.ENOMEM))
    patch.setattr(_memory, "map_over", fail_with(errno.ENOMEM))


@pytest.mark.ids("D09")
@pytest.mark.parametrize("name", ["memfd_create", "fchmod", "ftruncate", "pwrite"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.EFBIG])
def test_short_of_something_a_buffer_goes_inline_and_nothing_leaks(pair, monkeypatch, name, number):
    with monkeypatch.context() as patch:
        patch.setattr(_memory.os, name, fail_with(number))
        sent = [block(MIB, 1), block(70 * KIB, 2)]
        assert pair.one.load([memoryview(each) for each in sent]) is None
        assert totals().held == 0
        assert not memfd_numbers()
    assert in_segment(pair.send(bytes(MIB))[0])


@pytest.mark.ids("D09")
def test_a_process_that_may_write_no_large_file_sends_inline(run_python):
    assert run_python(send_with_small_files).value == [True, False, True]


def send_with_small_files():
    pair = Pair()
    found = []
    for limit in (resource.RLIM_INFINITY, 512 * KIB, resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        (arrived,) = pair.send(bytes(3 * MIB))
        assert len(arrived) == 3 * MIB
        found.append(isinstance(arrived, memoryview))
        pair.close()
        pair = Pair()
    return found


@pytest.mark.ids("D11")
def test_a_segment_is_sealed_and_not_for_heirs(pair, slow_sweeper):
    (number,) = pair.one.load([memoryview(bytes(MIB))]).descriptors
    seals = fcntl.fcntl(number, fcntl.F_GET_SEALS)
    knows_exec_seal = _memory._memfd_flags & _memory._MFD_NOEXEC_SEAL
    assert seals == _memory.SEALS | (0x20 if knows_exec_seal else 0)  # F_SEAL_EXEC
    assert stat.S_IMODE(os.fstat(number).st_mode) == 0o600
    assert not os.get_inheritable(number)


def test_a_kernel_that_knows_no_seal_against_execution_is_asked_once(pair, monkeypatch, slow_sweeper):
    asked = []
    create = os.memfd_create

    def old(name, flags):
        asked.append(flags)
        if flags & _memory._MFD_NOEXEC_SEAL:
            raise OSError(errno.EINVAL, "before Linux 6.3")
        return create(name, flags)

    monkeypatch.setattr(_memory, "_memfd_flags", _memory._memfd_flags | _memory._MFD_NOEXEC_SEAL)
    monkeypatch.setattr(_memory.os, "memfd_create", old)
    pair.send(bytes(MIB))
    (number,) = pair.one.load([memoryview(bytes(MIB))]).descriptors
    assert stat.S_IMODE(os.fstat(number).st_mode) == 0o600
    assert pair.one.counts.held == 2
    assert len(asked) == 3


@pytest.mark.ids("D09")
def test_out_of_descriptors_a_buffer_goes_inline(pair):
    pair.send(bytes(100 * KIB))  # the keeper is there
    with only(0):
        assert pair.one.load([memoryview(bytes(MIB))]) is None


def test_a_segment_that_can_be_no_more_filled_stays_free(pair, monkeypatch, slow_sweeper):
    pair.send(bytes(MIB))
    pair.tell()
    with monkeypatch.context() as patch:
        map_nothing(patch)
        (arrived,) = pair.send(block(MIB))
        assert arrived == block(MIB)
        assert not in_segment(arrived)
    assert in_segment(pair.send(block(MIB))[0])
    assert pair.one.counts.held == 1


def test_a_receiver_that_cannot_map_a_segment_reads_it(pair, monkeypatch, slow_sweeper):
    with monkeypatch.context() as patch:
        map_nothing(patch)
        arrived = pair.send(block(2 * MIB, 1), block(70 * KIB, 2), block(80 * KIB, 3))
        assert arrived == [block(2 * MIB, 1), block(70 * KIB, 2), block(80 * KIB, 3)]
        assert not any(in_segment(view) for view in arrived)
    pair.tell()
    assert pair.one.counts.retained == 0
    assert in_segment(pair.send(block(2 * MIB))[0])
    assert pair.one.counts.held == 2


def test_a_segment_that_cannot_be_had_just_now_is_not_taken_for_one_that_has_not_come():
    """``EAGAIN`` is also what the kernel says of memory over RLIMIT_MEMLOCK; whoever reads would read on."""
    read, write = os.pipe()

    class Locked:
        def unload(self, *_: Any) -> Any:
            raise BlockingIOError(errno.EAGAIN, "locked")

    channel: Any = SimpleNamespace(shelf=Locked(), peer=SimpleNamespace(uid=os.geteuid()))
    came = [write]
    with pytest.raises(OSError, match=r"a segment cannot be had: \[Errno \d+\] locked") as caught:
        Channel.unstow(channel, b"", (), came)
    assert not isinstance(caught.value, BlockingIOError)
    assert came == []
    assert os.read(read, 1) == b"", "what it brought is closed"
    os.close(read)


def test_an_error_while_loading_loses_no_segment(pair, monkeypatch, slow_sweeper):
    pair.send(bytes(MIB), bytes(2 * MIB))
    pair.tell()
    real = _memory.copy_view

    def interrupted(target, view):
        if len(view) == 2 * MIB:
            raise KeyboardInterrupt
        real(target, view)

    with monkeypatch.context() as patch:
        patch.setattr(_memory, "copy_view", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.one.load([memoryview(bytes(MIB)), memoryview(bytes(2 * MIB))])
    assert pair.one.counts.retained == 0
    sent = [block(MIB, 5), block(2 * MIB, 6)]
    assert pair.send(*sent) == sent
    assert pair.one.counts.held == 2


# -- giving back ----------------------------------------------------------------------------------


@pytest.fixture
def quick_sweeper(monkeypatch):
    monkeypatch.setattr(_shelf, "IDLE", 0.05)
    monkeypatch.setattr(_shelf, "_sweeper", _shelf._Sweeper())


def test_a_free_segment_is_given_back_at_both_ends_when_it_is_idle(pair, quick_sweeper):
    pair.send(bytes(4 * MIB))
    (theirs,) = pair.other._foreign.values()
    number = os.dup(theirs.number)
    assert pages(number) >= 4 * MIB
    assert not pair.one.has_news
    pair.tell()
    support.wait_until(lambda: pair.one.counts.held == 0)
    assert pages(number) == 0  # though the other side has not been told
    os.close(number)
    assert pair.other.counts.received == 1
    assert pair.one.has_news
    del theirs
    pair.tell(back=False)
    assert pair.other.counts.received == 0
    support.wait_until(lambda: not memfd_numbers())  # the thread that gives it back may be at its last step


def test_what_is_kept_is_not_given_back(pair, quick_sweeper):
    (kept,) = pair.send(block(MIB))
    pair.send(bytes(MIB))
    pair.tell()
    support.wait_until(lambda: pair.one.counts.held == 1)
    assert kept == block(MIB)


def test_the_timer_rests_when_nothing_is_left_to_give_back(pair, quick_sweeper):
    looks = []
    look = _shelf._sweeper._look
    _shelf._sweeper._look = lambda: (looks.append(1), look())
    pair.send(bytes(MIB))
    pair.tell()
    assert _shelf._sweeper._armed
    support.wait_until(lambda: not _shelf._sweeper._armed)
    assert pair.one.counts.held == 0
    assert len(looks) <= 2
    (said,) = pair.send(bytes(MIB))
    pair.send(bytes(100), back=True)
    assert not _shelf._sweeper._armed
    del said


def test_the_timer_comes_again_while_there_is_something(pair, quick_sweeper):
    for _ in range(3):
        pair.send(bytes(MIB))
        pair.tell()
        support.wait_until(lambda: pair.one.counts.held == 0)
        pair.tell(back=False)


def test_a_segment_in_use_again_and_again_is_not_given_back(pair, monkeypatch):
    monkeypatch.setattr(_shelf, "IDLE", 0.3)
    monkeypatch.setattr(_shelf, "_sweeper", _shelf._Sweeper())
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        pair.send(bytes(MIB))
        pair.tell()
    assert pair.one.counts.held == 1
    assert next(pair.one._ids) == 2
    support.wait_until(lambda: pair.one.counts.held == 0)


def test_without_a_thread_to_be_had_the_keeper_gives_back(pair, monkeypatch, quick_sweeper):
    def none_left(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_shelf, "start_new_thread", none_left)
    pair.send(bytes(MIB))
    pair.tell()
    support.wait_until(lambda: pair.one.counts.held == 0)


def test_without_a_keeper_to_be_had_messages_go_on(pair, monkeypatch, quick_sweeper):
    def none_left():
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(_shelf, "keeper", none_left)
        pair.send(bytes(MIB))
        pair.tell()
        pair.send(bytes(MIB))
        assert pair.one.counts.held == 1
    pair.tell()
    support.wait_until(lambda: pair.one.counts.held == 0)


def test_giving_back_while_sending_never_touches_what_was_sent(pair, monkeypatch):
    monkeypatch.setattr(_shelf, "IDLE", 0.0)
    stop = threading.Event()

    def sweep():
        while not stop.is_set():
            pair.one.sweep(float("inf"))

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        end = time.monotonic() + 1.0
        seed = 0
        while time.monotonic() < end:
            seed += 1
            sent = [block(MIB, seed), block(70 * KIB, seed)]
            assert pair.send(*sent) == sent
            pair.tell()
    finally:
        stop.set()
        sweeper.join()
    assert next(pair.one._ids) > 3


def test_close_lets_go_of_all_that_nothing_stands_on(pair):
    (kept,) = pair.send(block(MIB))
    pair.send(bytes(2 * MIB), bytes(3 * MIB))
    pair.tell()
    pair.close()
    pair.close()
    assert totals().held == 0
    assert totals().received == 1
    assert kept == block(MIB)
    assert len(memfd_maps()) == 1
    del kept
    assert not memfd_maps()
    assert not memfd_numbers()


def test_a_shelf_that_nobody_holds_is_closed(slow_sweeper):
    pair = Pair()
    pair.send(bytes(MIB))
    pair.tell()
    del pair
    assert not memfd_maps()
    assert not memfd_numbers()


def test_after_close_buffers_go_inline_and_segments_are_refused(pair):
    cargo = pair.one.load([memoryview(bytes(MIB))])
    pair.close()
    assert pair.one.load([memoryview(bytes(MIB))]) is None
    with pytest.raises(ProtocolError):
        pair.send(bytes(MIB), cargo=cargo)


def test_what_is_in_a_message_stays_open_though_the_shelf_is_closed(pair):
    cargo = pair.one.load([memoryview(bytes(MIB))])
    pair.one.close()
    assert pages(cargo.descriptors[0]) >= MIB


def test_memory_returns_to_its_base(pair, quick_sweeper, many):
    """Random sizes up to 64 MiB, some kept for a while; afterwards nothing is left at either end."""
    random = np.random.default_rng(7)
    kept = []
    data = np.frombuffer(block(64 * MIB), "u1")
    for _ in range(many(60, 1_000)):
        size = int(2 ** random.uniform(12, 26))
        begin = int(random.integers(0, 64 * MIB - size + 1))
        (arrived,) = pair.send(data[begin : begin + size])
        if random.random() < 0.3:
            kept.append((arrived, begin))
        if len(kept) > 5:
            kept.pop(int(random.integers(0, len(kept))))
        del arrived
        pair.tell()
    for view, begin in kept:
        assert (np.frombuffer(view, "u1") == data[begin : begin + len(view)]).all()
    assert totals().held_bytes <= _shelf.BYTES_OF_CHANNEL
    del view
    kept.clear()
    pair.tell()
    support.wait_until(lambda: pair.one.counts.held == 0)
    pair.tell(back=False)
    assert totals() == _shelf.Totals(reused=totals().reused)
    # Counted as gone before it is unmapped; the thread that gives it back may be at its last step.
    support.wait_until(lambda: not memfd_maps() and not memfd_numbers())


# -- loans ----------------------------------------------------------------------------------------


def test_a_loan_crosses_without_a_copy(pair, monkeypatch, slow_sweeper):
    def no_copy(*args):
        raise AssertionError("copied")

    monkeypatch.setattr(_memory, "copy_bytes", no_copy)
    monkeypatch.setattr(_memory, "write", no_copy)
    array = empty((100, 1_000), "f8")
    array[:] = 3.0
    (arrived,) = pair.send(array)
    assert (np.frombuffer(arrived) == 3.0).all()
    assert in_segment(arrived)


@pytest.mark.parametrize("dontunmap", [True, False])
def test_after_passing_each_side_has_its_own(pair, monkeypatch, slow_sweeper, dontunmap):
    if not dontunmap:
        monkeypatch.setattr(_memory.Mapping, "moved", lambda old: None)
    mine = buffer(4 * MIB)
    data = block(4 * MIB)
    mine[:] = data
    (theirs,) = pair.send(mine)
    assert theirs == data
    assert mine == data
    mine[: 2 * MIB] = bytes(2 * MIB)
    assert theirs == data
    theirs[:] = b"\xff" * (4 * MIB)
    assert mine[: 2 * MIB] == bytes(2 * MIB)
    assert mine[2 * MIB :] == theirs[2 * MIB :]  # changed in place, and not written here since


def test_passed_again_a_loan_is_copied(pair, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB, 1)
    (first,) = pair.send(mine)
    mine[:] = block(MIB, 2)
    (second,) = pair.send(mine)
    assert first == block(MIB, 1)
    assert second == block(MIB, 2)
    assert pair.one.counts.held == 2


def test_the_segment_of_a_passed_loan_is_not_used_while_the_array_lives(pair, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB, 1)
    pair.send(mine)
    pair.tell()
    assert pair.one.counts.retained == 0
    (other,) = pair.send(block(MIB, 2))
    assert mine == block(MIB, 1)
    assert pair.one.counts.held == 2
    del mine
    (third,) = pair.send(block(MIB, 3))
    assert pair.one.counts.held == 2
    assert (other, third) == (block(MIB, 2), block(MIB, 3))


def test_the_segment_is_not_used_before_the_receiver_releases_it(pair, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB, 1)
    (theirs,) = pair.send(mine)
    del mine
    pair.tell()
    pair.send(block(MIB, 2))
    assert theirs == block(MIB, 1)


def test_what_was_a_loan_is_lent_again_by_the_shelf_used_last(pair, slow_sweeper):
    mine = buffer(MIB)
    pair.send(mine)
    del mine
    pair.tell()
    pair.one.load([])
    again = buffer(MIB)
    assert pair.one.counts.loaned == 1
    again[:] = block(MIB)
    cargo = pair.one.load([again])
    assert cargo.descriptors == []
    assert pair.send(again, cargo=cargo) == [block(MIB)]


def test_the_finder_says_which_shelf_lends(pair, slow_sweeper, monkeypatch):
    pair.send(bytes(MIB))
    pair.tell()
    pair.other.load([])  # the last that this thread used
    monkeypatch.setattr(_shelf, "_find", None)
    _shelf.set_finder(lambda: pair.one)
    lent = buffer(MIB)
    assert pair.one.counts.loaned == 1
    assert len(lent) == MIB


def test_parts_of_one_loan_are_one_segment(pair, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB)
    first, second = pair.send(mine[: 300 * KIB], mine[500 * KIB :])
    assert first == mine[: 300 * KIB]
    assert second == mine[500 * KIB :]
    assert pair.one.counts.held == 1


def test_parts_that_overlap_do_not_overlap_over_there(pair, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB)
    first, second = pair.send(mine[: 600 * KIB], mine[400 * KIB :])
    first[:] = bytes(len(first))
    assert second == block(MIB)[400 * KIB :]


def test_a_loan_of_another_channel_is_copied(pair, slow_sweeper):
    pair.send(bytes(MIB))
    pair.tell()
    pair.one.load([])
    mine = buffer(MIB)
    assert pair.one.counts.loaned == 1
    mine[:] = block(MIB)
    other = Pair()
    (theirs,) = other.send(mine)
    mine[:] = bytes(MIB)
    assert theirs == block(MIB)
    assert other.one.counts.held == 1
    assert pair.one.counts.loaned == 1
    other.close()


def test_memory_that_touches_a_loan_from_outside_is_copied(pair, slow_sweeper):
    mine = buffer(64 * KIB)
    address = np.frombuffer(mine, "u1").ctypes.data
    (loan,) = _segments.loans.values()
    assert loan.covers(address, address + 64 * KIB)
    assert not loan.covers(address - 1, address + 1)
    assert not loan.covers(address, address + loan.mapping.size + 1)


def test_a_loan_that_dies_unpassed_is_gone(pair, slow_sweeper):
    mine = empty(MIB, "u1")
    assert totals().loaned == 1
    del mine
    assert totals().held == 0
    assert not memfd_maps()


def test_a_loan_that_dies_unpassed_frees_its_pages_at_the_other_side(pair, slow_sweeper):
    pair.send(bytes(MIB))
    (theirs,) = pair.other._foreign.values()
    pair.tell()
    pair.one.load([])
    mine = buffer(MIB)
    mine[:] = block(MIB)
    assert pages(theirs.number) >= MIB
    del mine
    assert pages(theirs.number) == 0
    del theirs
    pair.tell(back=False)
    assert pair.other.counts.received == 0


def test_a_passed_loan_outlives_its_channel(pair, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB)
    (theirs,) = pair.send(mine)
    pair.close()
    assert mine == theirs == block(MIB)
    del theirs
    assert mine == block(MIB)
    mine[:] = bytes(MIB)


def test_an_old_array_is_not_touched_when_its_segment_is_given_back(pair, quick_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB)
    pair.send(mine)
    pair.tell()
    support.wait_until(lambda: pair.one.counts.held == 0)
    assert mine == block(MIB)
    pair.tell(back=False)
    assert pair.other.counts.received == 0
    assert mine == block(MIB)


def test_a_recalled_loan_can_be_sent_all_the_same(pair, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB)
    pair.one.recall(pair.one.load([mine]))
    assert mine == block(MIB)
    assert pair.send(mine) == [block(MIB)]


def test_a_loan_that_can_get_no_veil_is_copied(pair, monkeypatch, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB)
    with monkeypatch.context() as patch:
        map_nothing(patch)
        cargo = pair.one.load([mine])
    (theirs,) = pair.send(mine, cargo=cargo)
    mine[:] = bytes(MIB)
    assert theirs == block(MIB)
    assert totals().loaned == 1


def interrupted_before(step, work):
    """Have Ctrl-C come before so many steps of the interpreter in the library's memory; tell if there are."""
    left = step

    def trace(frame, event, arg):
        nonlocal left
        if not frame.f_code.co_filename.endswith("_memory.py"):
            return None
        frame.f_trace_opcodes = True
        left -= event == "opcode"
        if left == 0:
            raise KeyboardInterrupt  # and so no step of a finalizer's is one of these
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        kept = work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert kept.address
    return False


@pytest.mark.ids("G05")
@pytest.mark.parametrize("what", ["mapped", "moved"])
def test_ctrl_c_while_memory_is_mapped_leaves_none_mapped(what):
    """At each step: a range whose address got lost would stay for good."""
    for step in itertools.chain([sys.maxsize], itertools.count(1)):  # the first time CPython 3.12 has none
        holder = _memory.memfd(64 * KIB)
        make = partial(_memory.Mapping.of, holder.fileno(), 64 * KIB)
        if what == "moved":
            make = partial(_memory.Mapping.moved, make())
        came = interrupted_before(step, make)
        del make
        holder.close()
        assert not memfd_maps(), step
        if not came and step != sys.maxsize:
            break
    assert step > 20


def test_two_threads_that_pass_one_loan_both_pass_what_it_was(slow_sweeper):
    for seed in range(20):
        pairs = [Pair() for _ in range(2)]
        mine = buffer(MIB)
        mine[:] = block(MIB, seed)
        start = threading.Barrier(2)
        arrived = [None, None]

        def send(which, pairs=pairs, mine=mine, start=start, arrived=arrived):
            start.wait()
            (arrived[which],) = pairs[which].send(mine)

        threads = [threading.Thread(target=send, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mine == block(MIB, seed)
        mine[:] = bytes(MIB)
        assert arrived == [block(MIB, seed)] * 2
        arrived[0][:] = bytes(MIB)
        assert arrived[1] == block(MIB, seed)
        for pair in pairs:
            pair.close()
        del arrived, mine


def test_over_the_limit_a_loan_is_ordinary_memory(monkeypatch):
    monkeypatch.setattr(_shelf, "BYTES_OF_PROCESS", 3 * MIB)
    first, second, third = buffer(2 * MIB), buffer(2 * MIB), empty(MIB)
    assert [in_segment(each) for each in (first, second, third)] == [True, False, False]
    assert [len(first), len(second), len(third)] == [2 * MIB, 2 * MIB, MIB]


def test_a_loan_over_the_limit_alone_costs_no_free_segment(pair, monkeypatch, slow_sweeper):
    monkeypatch.setattr(_shelf, "BYTES_OF_PROCESS", 3 * MIB)
    pair.send(bytes(MIB))
    pair.tell()
    assert not in_segment(buffer(4 * MIB))
    assert pair.one.counts.held == 1


def test_small_memory_is_ordinary_memory():
    assert not in_segment(buffer(_shelf.THRESHOLD - 1))
    assert not in_segment(empty(100))
    assert totals().held == 0
    assert len(buffer(0)) == 0
    assert buffer(3).format == "B"
    assert not buffer(3).readonly


@pytest.mark.parametrize(
    ("shape", "dtype", "order"),
    [
        (100_000, float, "C"),
        ((100, 1_000), "i4", "F"),
        ([3, 50_000], np.dtype("u2"), "C"),
        ((10_000,), [("a", "f8"), ("b", "S10")], "C"),
        ((10_000,), (float, 3), "C"),
        ((), float, "C"),
        ((0, 5), float, "C"),
        (np.int64(70_000), "u1", "C"),
    ],
)
def test_empty_is_like_that_of_numpy(shape, dtype, order):
    ours, theirs = empty(shape, dtype, order), np.empty(shape, dtype, order)
    assert (ours.shape, ours.dtype, ours.strides) == (theirs.shape, theirs.dtype, theirs.strides)
    assert ours.flags.writeable
    assert ours.flags.aligned
    assert in_segment(ours) if ours.nbytes >= _shelf.THRESHOLD else not memfd_maps()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: buffer(True), TypeError),
        (lambda: buffer(1.5), TypeError),
        (lambda: buffer("5"), TypeError),
        (lambda: buffer(-1), ValueError),
        (lambda: empty(True), TypeError),
        (lambda: empty((3, False)), TypeError),
        (lambda: empty(2.0), TypeError),
        (lambda: empty("33"), TypeError),
        (lambda: empty((3, -1)), ValueError),
        (lambda: empty(3, object), TypeError),
        (lambda: empty(3, [("a", object)]), TypeError),
        (lambda: empty(3, "nonsense"), TypeError),
        (lambda: empty(3, float, "A"), ValueError),
        (lambda: empty(1 << 50), MemoryError),
        (lambda: buffer(1 << 60), MemoryError),
    ],
)
def test_wrong_arguments_are_refused(call, error):
    with pytest.raises(error):
        call()


def test_nothing_is_said_at_the_end_of_a_process_that_holds_everything(run_python):
    finished = run_python(hold_everything, options=["-X", "dev", "-W", "error"])
    assert finished.stderr == ""
    assert finished.value == (3, 2)


def hold_everything():
    pair = Pair()
    mine, lent = buffer(MIB), buffer(MIB)
    kept = np.frombuffer(pair.send(mine)[0])
    pair.send(bytes(2 * MIB))
    knot = [lent, kept, pair, mine]
    knot.append(knot)
    _segments.everything = knot  # there until the very end
    return totals().held, totals().received


# -- forks ----------------------------------------------------------------------------------------


def in_child(function):
    """Run something in a forked child that shares all objects; return what it returns."""
    return run_as_uid(None, function)


class Forked:
    """A forked child that waits for orders, and answers."""

    def __init__(self, *functions):
        self._ours, theirs = socket.socketpair()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._ours.close()  # so that the end of the parent is the end
                for function in functions:
                    if theirs.recv(1):
                        theirs.sendall(pickle.dumps(function()))
            finally:
                os._exit(0)
        theirs.close()

    def go(self):
        self._ours.sendall(b"!")
        return pickle.loads(self._ours.recv(1 << 20))

    def end(self):
        self._ours.close()
        assert os.waitpid(self._pid, 0)[1] == 0


@pytest.mark.parametrize("kept_descriptor", [True, False])
def test_what_a_child_has_does_not_change_whatever_the_parent_does(
    pair, slow_sweeper, monkeypatch, kept_descriptor
):
    if not kept_descriptor:
        monkeypatch.setattr(_segments.Foreign, "map", map_and_shut)
    arrived = pair.send(block(MIB, 1))
    child = Forked(lambda: bytes(arrived[0]) == block(MIB, 1), lambda: bytes(arrived[0]) == block(MIB, 1))
    assert child.go()
    arrived[0][:] = bytes(MIB)
    del arrived[0]
    pair.tell()
    for seed in range(3):
        pair.send(block(MIB, 10 + seed))
        pair.tell()
    pair.close()
    arrived.append(None)
    assert child.go()
    child.end()


def map_and_shut(segment):
    mapping = _segments.Segment.map(segment)
    segment.shut()
    return mapping


def test_what_a_child_writes_does_not_reach_the_parent(pair, slow_sweeper):
    arrived = pair.send(block(MIB, 1))
    mine = buffer(MIB)
    mine[:] = block(MIB, 2)
    passed = buffer(MIB)
    passed[:] = block(MIB, 3)
    (theirs,) = pair.send(passed)

    def overwrite():
        seen = [bytes(each) for each in (arrived[0], mine, passed)]
        for each in (arrived[0], mine, passed):
            each[:] = bytes(MIB)
        return seen == [bytes(block(MIB, seed)) for seed in (1, 2, 3)]

    assert in_child(overwrite)
    assert [bytes(each) for each in (arrived[0], mine, passed, theirs)] == [
        bytes(block(MIB, seed)) for seed in (1, 2, 3, 3)
    ]


def test_what_a_child_may_have_is_never_used_again(pair, slow_sweeper):
    arrived = pair.send(block(MIB))
    in_child(lambda: None)
    assert pair.other.counts.received == 0
    pair.tell()
    assert pair.one.counts.held == 0
    del arrived
    assert not pair.other.has_news
    pair.send(block(MIB))
    assert pair.one.counts.held == 1


def test_what_nothing_stands_on_is_used_again_after_a_fork(pair, slow_sweeper):
    pair.send(block(MIB))
    pair.tell()
    in_child(lambda: None)
    pair.send(block(MIB))
    assert pair.one.counts.reused == 1


def test_a_loan_is_ordinary_memory_after_a_fork(pair, slow_sweeper):
    mine = buffer(MIB)
    mine[:] = block(MIB, 1)
    child = Forked(lambda: bytes(mine) == block(MIB, 1))
    mine[:] = block(MIB, 2)
    (theirs,) = pair.send(mine)
    assert theirs == block(MIB, 2)
    mine[:] = bytes(MIB)
    assert theirs == block(MIB, 2)
    assert child.go()
    child.end()


def test_the_segment_of_a_passed_loan_is_never_used_after_a_fork(pair, slow_sweeper):
    mine = [buffer(MIB)]
    mine[0][:] = block(MIB, 1)
    pair.send(mine[0])
    child = Forked(lambda: bytes(mine[0]) == block(MIB, 1))
    del mine[0]
    pair.tell()
    assert pair.one.counts.held == 0
    pair.send(block(MIB, 2))
    mine.append(None)
    assert child.go()
    child.end()


def test_children_of_children_and_second_forks(pair, slow_sweeper):
    (arrived,) = pair.send(block(MIB))
    assert in_child(lambda: in_child(lambda: bytes(arrived) == block(MIB)))
    arrived[:4] = b"mine"
    assert in_child(lambda: bytes(arrived[:4])) == b"mine"


def test_a_shelf_is_of_no_use_in_a_child(pair, slow_sweeper):
    kept = pair.send(block(MIB))
    pair.send(bytes(2 * MIB))
    pair.tell()

    def use():
        assert pair.one.load([memoryview(bytes(MIB))]) is None
        with pytest.raises(ProtocolError):
            pair.other.unload(_manifest.Manifest().encode(), [], [])
        assert totals().held == totals().received == 0
        assert not memfd_numbers()
        lent = buffer(MIB)
        assert in_segment(lent)
        pair.close()
        own = Pair()
        assert own.send(bytes(MIB)) == [bytes(MIB)]
        own.close()
        return len(kept[0])

    assert in_child(use) == MIB
    assert pair.send(block(2 * MIB)) == [block(2 * MIB)]
    assert pair.one.counts.reused == 1


def test_a_child_unmaps_nothing_but_its_own(pair, slow_sweeper):
    """A range that was not inherited belongs to somebody else there."""
    pair.send(block(MIB))
    pair.tell()
    pair.send(block(MIB))
    pair.tell()
    (address,) = [segment.mapping.address for segment in pair.one._free.values()]

    def drop():
        mapped = _memory._libc.mmap(
            address,
            MIB,
            mmap.PROT_READ | mmap.PROT_WRITE,
            mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10,
            -1,
            0,
        )
        assert mapped == address
        pair.one._free.clear()
        pair.close()
        gc.collect()
        ctypes.memset(address, 7, MIB)
        return ctypes.string_at(address + 5, 1)

    assert in_child(drop) == b"\7"


def test_a_child_lets_go_of_what_it_inherited(pair, slow_sweeper):
    arrived = pair.send(block(MIB))

    def drop():
        before = len(memfd_maps())
        arrived.clear()
        return before, len(memfd_maps())

    assert in_child(drop) == (1, 0)


def test_mappings_are_not_inherited_by_default(pair, slow_sweeper):
    (kept,) = pair.send(block(MIB))
    mine, passed = buffer(MIB), buffer(2 * MIB)
    pair.send(passed)
    with open("/proc/self/smaps") as file:
        entries = file.read().split("VmFlags:")
    flags = {}
    for entry, following in itertools.pairwise(entries):
        if "memfd:doorpool" in entry:
            flags[entry.strip().splitlines()[1].split()[0]] = following.split("\n")[0].split()
    assert len(flags) >= 4
    assert all("dc" in each for each in flags.values())
    assert len(kept) + len(mine) == 2 * MIB


@pytest.mark.parametrize("what", ["receive", "lend", "pass"])
def test_nothing_is_given_to_anybody_while_a_fork_is_on_its_way(pair, slow_sweeper, what):
    """Between the last look at what objects stand on and the fork itself nothing may come to stand."""
    cargo = pair.one.load([memoryview(block(MIB))])
    mine = buffer(MIB) if what == "pass" else b""
    actions = {
        "receive": lambda: pair.send(bytes(MIB), cargo=cargo),
        "lend": lambda: [buffer(MIB)],
        "pass": lambda: pair.one.load([mine]),
    }
    done = []
    thread = threading.Thread(target=lambda: done.append(actions[what]()))
    with _segments.fork_gate:
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        assert not done
    thread.join()
    assert done
    if what == "receive":
        assert done == [[block(MIB)]]


def test_forks_while_others_receive_and_pass(slow_sweeper, many):
    """Whatever moment a fork comes at, no child finds a hole and no parent a change."""
    stop = threading.Event()
    failures = []
    shown = {}

    def work(which):
        pair = Pair()
        seed = 0
        while not stop.is_set():
            seed += 1
            mine = buffer(256 * KIB)
            mine[:] = bytes([seed % 251]) * (256 * KIB)
            (theirs,) = pair.send(mine)
            shown[which] = mine, theirs, seed % 251
            if theirs != mine:
                failures.append(seed)
            pair.tell()
        shown.pop(which, None)
        pair.close()

    def look():
        for mine, theirs, value in list(shown.values()):
            assert bytes(mine) == bytes(theirs) == bytes([value]) * (256 * KIB)
        return True

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(many(20, 500)):
            assert in_child(look)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


# -- what a peer may not do -----------------------------------------------------------------------


def memfd(size=MIB, seals=_memory.SEALS, flags=os.MFD_ALLOW_SEALING):
    number = os.memfd_create("doorpool", flags | os.MFD_CLOEXEC)
    os.ftruncate(number, size)
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    return number


def of_huge_pages():
    number = os.memfd_create("doorpool", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_CLOEXEC)
    os.ftruncate(number, 2 * MIB)
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, _memory.SEALS)
    return number


def reopened_for_reading():
    number = memfd()
    try:
        return os.open(f"/proc/self/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(number)


def a_file_in_tmpfs():
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(MIB)
        return os.dup(file.fileno())


def a_pipe():
    reader, writer = os.pipe()
    os.close(writer)
    return reader


BAD_DESCRIPTORS = {
    "no seals": lambda: memfd(seals=0),
    "may shrink": lambda: memfd(seals=fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL),
    "may grow": lambda: memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL),
    "may be sealed": lambda: memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW),
    "may not be written": lambda: memfd(seals=_memory.SEALS | fcntl.F_SEAL_WRITE),
    "may not be written later": lambda: memfd(seals=_memory.SEALS | 0x10),
    "too small": lambda: memfd(MIB - 1),
    "too large": lambda: memfd(MIB + 1),
    "for reading": reopened_for_reading,
    "of huge pages": of_huge_pages,
    "a file in tmpfs": a_file_in_tmpfs,
    "a device": lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
    "a pipe": a_pipe,
    "a file": lambda: os.open(__file__, os.O_RDONLY | os.O_CLOEXEC),
    "a folder": lambda: os.open("/", os.O_RDONLY | os.O_CLOEXEC),
    "a socket": lambda: socket.socket(socket.AF_UNIX).detach(),
}


@pytest.mark.ids("D02")
@pytest.mark.parametrize("what", BAD_DESCRIPTORS)
def test_what_is_no_proper_memfd_is_refused_and_closed(pair, what):
    good, bad = memfd(), BAD_DESCRIPTORS[what]()
    manifest = _manifest.Manifest(1, [(0, 2, 0, MIB)], [(1, MIB), (2, MIB)]).encode()
    with pytest.raises(ProtocolError):
        pair.other.unload(manifest, [], numbers := [good, bad])
    assert numbers == []
    support.wait_until(lambda: not is_open(good) and not is_open(bad))  # by a janitor
    assert pair.other.counts.received == 0


def good_manifest(pair):
    """A manifest with something of everything, with the message that it belongs to, and its buffers."""
    unit = 64 * KIB
    pair.send(bytes(3 * unit), bytes(9 * unit))
    pair.tell()  # the first is to be used again
    kept = pair.send(bytes(2 * unit), back=True)
    _segments._before_fork()  # to be dropped
    _segments._after_fork()
    pair.send(bytes(unit), back=True)  # to be released
    sent = [block(3 * unit, 1), bytearray(b"abc"), block(2 * unit, 2), block(unit, 3)]
    kept.clear()
    pair.one.give_back()  # the second, whose views died first, is to be retired
    return pair.one.load([memoryview(each) for each in sent]), sent


@pytest.fixture
def small_segments(monkeypatch):
    """Each buffer has a segment of its own."""
    monkeypatch.setattr(_shelf, "LARGE", _shelf.THRESHOLD)


def try_manifest(pair, manifest, cargo):
    """Unload something that is not quite right; return what came, or None if it was refused."""
    numbers = [os.dup(0), *map(os.dup, cargo.descriptors)]
    inline = [bytearray(view) for view in cargo.inline]
    try:
        return pair.other.unload(manifest, inline, numbers)
    except ProtocolError:
        return None
    finally:
        for number in numbers:
            os.close(number)


def test_a_good_manifest_has_something_of_everything(pair, slow_sweeper, small_segments):
    cargo, sent = good_manifest(pair)
    said = _manifest.decode(cargo.manifest)
    assert (len(said.places), len(said.new)) == (3, 2)
    assert (len(said.retired), len(said.released), len(said.dropped)) == (1, 1, 1)
    assert pair.send(*sent, cargo=cargo) == sent


def test_every_prefix_of_a_manifest_is_refused(pair, slow_sweeper, small_segments):
    cargo, sent = good_manifest(pair)
    before = len(memfd_numbers()), len(memfd_maps())
    for size in range(len(cargo.manifest)):
        assert try_manifest(pair, cargo.manifest[:size], cargo) is None
    assert try_manifest(pair, cargo.manifest + b"\0", cargo) is None
    assert (len(memfd_numbers()), len(memfd_maps())) == before
    assert try_manifest(pair, cargo.manifest, cargo) == sent


def test_no_flipped_bit_of_a_manifest_leads_out_of_the_segments(slow_sweeper, small_segments, many):
    """
    Where a buffer lies, and which segment a list names, may be changed into something that is true as well.

    The peer might have said so.  The counts may not; and whatever is accepted can be read and written.
    """
    pair = Pair()
    bits = 8 * len(good_manifest(pair)[0].manifest)
    pair.close()
    accepted = []
    for bit in range(0, bits, many(3, 1)):
        pair = Pair()
        cargo, _ = good_manifest(pair)
        manifest = bytearray(cargo.manifest)
        manifest[bit // 8] ^= 1 << bit % 8
        arrived = try_manifest(pair, manifest, cargo)
        if arrived is not None:
            accepted.append(bit)
            assert len(arrived) == 4
            for view in arrived:
                view[:] = bytes(memoryview(view))
        pair.close()
        arrived = view = cargo = None
        assert not memfd_maps()
    support.wait_until(lambda: not memfd_numbers())  # closed by a janitor
    assert min(accepted) >= 8 * _manifest._HEADER.size
    assert len(accepted) < bits / many(12, 4)


MANIFESTS = {
    "nothing": b"",
    "zeros": bytes(_manifest._HEADER.size),
    "another version": _manifest._HEADER.pack(2, 0, 0, 0, 0, 0, 0),
    "padding": b"\1\0\1\0" + bytes(20),
    "counts without end": _manifest._HEADER.pack(1, 2**32 - 1, 2**32 - 1, 65535, 65535, 2**32 - 1, 2**32 - 1),
    "more buffers than there are": _manifest.Manifest(3).encode(),
    "fewer buffers": _manifest.Manifest(0).encode(),
    "an unknown segment": _manifest.Manifest(2, [(0, 9, 0, 10)]).encode(),
    "one that is ours": _manifest.Manifest(2, [(0, 2, 0, 10)]).encode(),
    "behind its end": _manifest.Manifest(2, [(0, 1, 2 * MIB - 5, 6)]).encode(),
    "wrapping around": _manifest.Manifest(2, [(0, 1, 2**64 - 5, 10)]).encode(),
    "longer than it": _manifest.Manifest(2, [(0, 1, 0, 2**64 - 1)]).encode(),
    "no bytes": _manifest.Manifest(2, [(0, 1, 0, 0)]).encode(),
    "places out of order": _manifest.Manifest(3, [(1, 1, 0, 9), (0, 1, 0, 9)]).encode(),
    "one place twice": _manifest.Manifest(3, [(1, 1, 0, 9), (1, 1, 0, 9)]).encode(),
    "a place behind the last": _manifest.Manifest(2, [(2, 1, 0, 9)]).encode(),
    "a new one without a descriptor": _manifest.Manifest(1, [], [(7, MIB)]).encode(),
    "retired and unknown": _manifest.Manifest(1, retired=[9]).encode(),
    "retired and ours": _manifest.Manifest(1, retired=[2]).encode(),
    "retired twice": _manifest.Manifest(1, retired=[1, 1]).encode(),
    "retired and used": _manifest.Manifest(2, [(0, 1, 0, 9)], retired=[1]).encode(),
    "released and unknown": _manifest.Manifest(1, released=[9]).encode(),
    "released and not passed": _manifest.Manifest(1, released=[2]).encode(),
    "released twice": _manifest.Manifest(1, released=[1, 1]).encode(),
    "released and dropped": _manifest.Manifest(1, released=[1], dropped=[1]).encode(),
    "dropped and unknown": _manifest.Manifest(1, dropped=[9]).encode(),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_an_untrue_manifest_is_refused_and_changes_nothing(pair, slow_sweeper, what):
    pair.send(bytes(2 * MIB))
    pair.tell()
    (kept,) = pair.send(bytes(4 * MIB))
    passed = pair.send(bytes(MIB), back=True)
    pair.send(bytes(4 * MIB), back=True)
    pair.tell(back=False)
    before = pair.other.counts, list(pair.other._foreign), list(pair.other._out), list(pair.other._free)
    with pytest.raises(ProtocolError):
        pair.other.unload(MANIFESTS[what], [bytearray(3)], [])
    assert before == (
        pair.other.counts,
        list(pair.other._foreign),
        list(pair.other._out),
        list(pair.other._free),
    )
    assert len(kept) + len(passed[0]) == 5 * MIB


NEW = {
    "no bytes": [(7, 0)],
    "far too many bytes": [(7, 2**63)],
    "a number that is taken": [(1, MIB)],
    "one number twice": [(7, MIB), (7, MIB)],
}


@pytest.mark.parametrize("what", NEW)
def test_an_untrue_new_segment_is_refused_and_closed(pair, slow_sweeper, what):
    pair.send(bytes(MIB))
    pair.tell()
    numbers = [memfd() for _ in NEW[what]]
    before = len(memfd_numbers())
    with pytest.raises(ProtocolError):
        pair.other.unload(_manifest.Manifest(0, [], NEW[what]).encode(), [], numbers)
    support.wait_until(lambda: len(memfd_numbers()) == before - len(NEW[what]))


def test_only_the_last_descriptors_are_taken(pair):
    users = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    numbers = [users, memfd()]
    pair.other.unload(_manifest.Manifest(0, [], [(1, MIB)]).encode(), [], numbers)
    assert numbers == [users]
    os.close(users)


def test_what_the_other_side_writes_later_is_only_read_by_who_reads_it(pair, slow_sweeper):
    """Bytes in a segment decide nothing: a peer that scribbles spoils its own message."""
    (arrived,) = pair.send(block(MIB))
    (segment,) = pair.one._out.values()
    os.pwrite(segment.number, bytes(MIB), 0)
    assert arrived == bytes(MIB)
    with pytest.raises(OSError):
        os.ftruncate(segment.number, 0)
    assert arrived == bytes(MIB)


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_refused(pair, slow_sweeper, seed, many):
    random = np.random.default_rng(seed)
    pair.send(bytes(MIB))
    for _ in range(many(300, 20_000)):
        counts = [int(each) for each in random.integers(0, 3, 6)]
        body = random.bytes(counts[1] * 24 + counts[2] * 12 + 4 * sum(counts[3:]))
        manifest = _manifest._HEADER.pack(1, *counts) + body
        try:
            pair.other.unload(manifest, [bytearray(1)] * counts[0], [])
        except ProtocolError:
            continue
        assert not any(counts[1:])


# -- other threads --------------------------------------------------------------------------------


class Ticker(threading.Thread):
    """Another Python thread, and the longest time that it was not allowed to run."""

    def __init__(self):
        super().__init__()
        self.longest = 0.0
        self._stop_it = threading.Event()

    def run(self):
        last = time.perf_counter()
        while not self._stop_it.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            self.longest = max(self.longest, now - last)
            last = now

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._stop_it.set()
        self.join()


def shortest_pause(action, attempts=5):
    """The longest pause of another thread during an action; of some attempts, for others use the machine."""
    pauses = []
    for _ in range(attempts):
        with Ticker() as ticker:
            action()
        pauses.append(ticker.longest)
        if pauses[-1] < 0.02:
            break
    return min(pauses)


@pytest.mark.ids("G11")
@pytest.mark.parametrize("how", ["fresh", "warm", "loan", "given back", "closed"])
def test_other_threads_run_while_much_is_copied(pair, slow_sweeper, how):
    data = memoryview(bytearray(64 * MIB))

    def fresh():
        pair.close()
        pair.__init__()
        pair.send(data)

    def warm():
        pair.send(data)
        pair.tell()

    def loan():
        mine = buffer(64 * MIB)
        with Ticker():
            np.frombuffer(mine)[:] = 0
        pair.send(mine)

    def given_back():
        warm()
        pair.one.give_back()
        pair.tell(back=False)

    def closed():
        fresh()
        pair.close()

    action = {"fresh": fresh, "warm": warm, "loan": loan, "given back": given_back, "closed": closed}[how]
    assert shortest_pause(action) < 0.02


def test_deaths_in_any_thread_are_told(pair, slow_sweeper):
    sent = [block(MIB, seed) for seed in range(8)]
    arrived = pair.send(*sent)
    threads = [threading.Thread(target=arrived.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pair.tell()
    assert pair.one.counts.retained == 0
    assert len(pair.one._free) == 8


def test_a_death_in_a_garbage_collection_under_any_lock_is_told(pair, slow_sweeper):
    class Knot:
        pass

    knot = Knot()
    knot.itself, (knot.view,) = knot, pair.send(bytes(MIB))
    del knot
    assert not pair.other.has_news
    with _segments.fork_gate, _keeper.keeper().lock:
        gc.collect()
    assert pair.other.has_news


# -- between processes ----------------------------------------------------------------------------


def test_between_processes(run_python, many):
    """A server in another process keeps some arrays, changes others, and sends all back."""
    assert run_python(serve_and_ask, many(60, 2_000)).value == "ok"


def serve_and_ask(rounds):
    import random
    import socket

    _shelf.THRESHOLD = 1 << 16
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send(sock, shelf, *buffers):
        cargo = shelf.load([memoryview(each).cast("B") for each in buffers])
        assert cargo is None or not cargo.inline
        sock.send(bytes([cargo is not None]) + bytes(1))
        if cargo is not None:
            socket.send_fds(sock, [cargo.manifest], cargo.descriptors)

    def receive(sock, shelf):
        if not sock.recv(2)[0]:
            return []
        manifest, numbers, _, _ = socket.recv_fds(sock, 1 << 16, 253)
        return shelf.unload(manifest, [], numbers)

    pid = os.fork()
    if pid == 0:
        ours.close()
        shelf, kept = Shelf(), []
        for _ in range(rounds):
            arrived = receive(theirs, shelf)
            first = np.frombuffer(arrived[0], "u1")
            if random.random() < 0.3:
                kept.append((first, int(first[0])))
            back = empty(len(first), "u1")
            back[:] = first
            back += 1
            if len(kept) > 4:
                kept.pop(random.randrange(len(kept)))
            assert all((array == value).all() for array, value in kept)
            send(theirs, shelf, back)
            if random.random() < 0.5:
                back[:] = 0
        os._exit(0)
    theirs.close()
    shelf = Shelf()
    for turn in range(rounds):
        size = random.randrange(1 << 16, 1 << 22)
        value = turn % 250
        sent = empty(size, "u1")
        sent[:] = value
        send(ours, shelf, sent)
        sent[:] = 255
        (arrived,) = receive(ours, shelf)
        assert len(arrived) == size
        assert (np.frombuffer(arrived, "u1") == value + 1).all()
    shelf.close()
    assert os.waitpid(pid, 0)[1] == 0
    assert totals().reused > rounds / 3, totals()
    return "ok"
