"""
The shelf: one end of a channel's segments, from which messages are loaded and on which they arrive.

What a segment is, who owns it when, and what becomes of it in a fork, is told in ``_segments``.  Here is
which buffers go by one, which one is taken for them, how many there may be, and when they are given
back to the system.

Without locks.  A shelf belongs to one thread at a time, the holder of its channel, but for four
visitors: deaths, the sweeper, ``empty`` in a thread that used the channel before, and whoever wants room
for another channel's segments, and unmaps what nothing stands on.  They meet in collections of which the
single operations are atomic: who gets a segment *out* of one, by ``pop``, has it alone; only the last of
the four needs a lock, ``fork_gate``.  Memory is let go by the count of references: as long as anybody holds
a ``Segment`` or a ``Mapping`` its descriptor is open and its pages are mapped, whatever is closed meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import math
import mmap
import operator
import os
import select
import threading
import time
import weakref
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs

from doorpool import _janitor, _memory, _segments, _sockets
from doorpool._descriptor import NOBODY
from doorpool._errors import ProtocolError
from doorpool._keeper import keeper
from doorpool._manifest import Manifest, Place, check, check_each_once, decode, taken_off
from doorpool._segments import KINDS, RELEASED, Arrival, Foreign, Loan, News, Own

if TYPE_CHECKING:
    import numpy
    import numpy.typing

__all__ = ["Cargo", "Shelf", "Totals", "buffer", "empty", "set_finder", "totals"]

MIB = 1 << 20

#: Bytes from which a buffer goes by segment.  Measured: a call with an array and a small answer, between
#: two processes over sockets, on one CPU, in µs (on two, the same with more noise):
#:
#:     KiB           64   128   192   256   384   512  1024   (4096 in one process)
#:     beside        79    96   113   145   176   217   361   4,500
#:     by segment   121   124   129   131   146   143   158     225
#:
#: The manifest costs 25 µs at both ends, there and back, and its frames some 20 more; from 208 KiB on a
#: message does not fit into a socket.  Since there are pages the manifest goes by the page, and it pays from
#: some 80 KiB on (two CPUs; 64 KiB: 105 beside, 122 by segment; 96: 150, 128; 384: 265, 138; 1024: 663, 277).
THRESHOLD = 64 << 10

#: From here on a buffer has a segment of its own, so that who keeps it keeps no others.
LARGE = MIB

MOST_NEW = 60  #: New segments in one message, each of which takes a descriptor.
MOST_SEGMENTS = 64  #: Made on one channel; each takes a descriptor at both ends.

#: In all segments made by a process, free ones, passed ones and loans together; and on one channel.
BYTES_OF_PROCESS = min(4 << 30, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 4)
BYTES_OF_CHANNEL = BYTES_OF_PROCESS // 2

#: What the other side may have mapped into us, on one channel.  More than its own limits let it make,
#: which may be larger in a version to come.
MOST_FROM_PEER = 4 * MOST_SEGMENTS
BYTES_FROM_PEER = 4 << 30

#: What all other sides together may have mapped into us: as much as we may make for them.  Many of them
#: come to more though each keeps to its limits, so none of them is to blame: beyond it bytes are copied out.
BYTES_MAPPED = BYTES_OF_PROCESS

IDLE = 5.0  #: Seconds after which a segment that nobody uses is given back to the system.

#: How much larger than asked for a free segment may be.
WASTE = 2

ALIGNMENT = 64  #: Of buffers that share a segment: a cache line, and what NumPy likes best.

_MOST_NUMBERS = (1 << 32) - 1


class Cargo:
    """
    What a message takes along in place of its big buffers.

    Attributes:
        manifest: to be sent.
        inline: the buffers that go as they did, in order.
        descriptors: of new segments, to be sent behind all others of the message; they stay the shelf's.
    """

    __slots__ = ("descriptors", "inline", "manifest", "news", "segments")

    def __init__(self) -> None:
        self.manifest = b""
        self.inline: list[memoryview] = []
        self.descriptors: list[int] = []
        self.segments: list[tuple[Own, bool]] = []  # and whether it is new
        self.news: list[tuple[str, int]] = []


@attrs.frozen
class Totals:
    """
    Segments of a channel or of the process: how many, and how many bytes.

    Attributes:
        held, held_bytes: made here; they exist, whoever has them.
        retained, retained_bytes: of those, the ones that the other side has and has not let go.
        loaned, loaned_bytes: of those, the ones lent by ``empty`` and ``buffer`` and not passed yet.
        received, received_bytes: made by other sides; we have them.
        mapped, mapped_bytes: of those, the ones that are mapped here.
        reused: how often one was used again.
    """

    held: int = 0
    held_bytes: int = 0
    retained: int = 0
    retained_bytes: int = 0
    loaned: int = 0
    loaned_bytes: int = 0
    received: int = 0
    received_bytes: int = 0
    mapped: int = 0
    mapped_bytes: int = 0
    reused: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*map(operator.add, attrs.astuple(self), attrs.astuple(other)))


def _count(segments: Iterable[_segments.Segment]) -> tuple[int, int]:
    sizes = [segment.size for segment in segments]
    return len(sizes), sum(sizes)


#: The shelves of the process, by identity.
_shelves: dict[int, weakref.ref[Shelf]] = {}

#: How often a segment was used again.  Without the GIL it might be one less; it is for people to read.
_reused = 0


def _all_shelves() -> Iterator[Shelf]:
    for reference in list(_shelves.values()):
        shelf = reference()
        if shelf is not None:
            yield shelf


class _Used(threading.local):
    """The shelf that this thread used last."""

    shelf: weakref.ref[Shelf] | None = None


_used = _Used()


class Shelf:
    """
    One end of a channel's segments: those made here, and those of the other side.

    For one thread at a time, the holder of the channel; ``close`` for any.  In a forked child it is
    of no use, and harmless.
    """

    __slots__ = (
        "_closed", "_foreign", "_free", "_generation", "_ids", "_ledger", "_me", "_out", "_veiled",
        "news", "reused", "__weakref__",
    )  # fmt: skip

    def __init__(self) -> None:
        self._generation = _sockets.here()
        self._closed = False
        self._ids = itertools.count(1)
        self.news: News = deque()
        self._ledger: dict[int, int] = {}  # serial numbers and sizes of all made on this channel
        self._free: dict[int, Own] = {}
        self._out: dict[int, Own] = {}
        self._veiled: dict[int, Own] = {}  # released, but the loan that it was is still alive
        self._foreign: dict[int, Foreign] = {}
        self.reused = 0
        self._me = weakref.ref(self)
        _shelves[id(self)] = self._me

    def __repr__(self) -> str:
        return f"<Shelf {'closed' if self._closed else self.counts}>"

    @property
    def has_news(self) -> bool:
        """Whether the next message should carry a manifest even if it has no buffers."""
        return bool(self.news)

    @property
    def usable(self) -> bool:
        """Whether it is open, and of this process."""
        return not self._closed and self._generation == _sockets.here()

    @property
    def passed(self) -> list[Own]:
        """The segments that the other side has."""
        return list(self._out.values())

    @property
    def counts(self) -> Totals:
        """The segments of this channel."""
        news = self.news
        loaned = [segment for segment in _segments.lent() if segment.news is news]
        sizes = list(self._ledger.values())
        foreign = list(self._foreign.values())
        return Totals(
            len(sizes), sum(sizes), *_count(self.passed), *_count(loaned),
            *_count(foreign), *_count([it for it in foreign if it.mapping is not None]), self.reused,
        )  # fmt: skip

    def __del__(self, _all: dict[int, weakref.ref[Shelf]] = _shelves) -> None:
        _all.pop(id(self), None)

    def close(self) -> None:
        """Let go of all but what objects stand on; idempotent, any thread, never blocks."""
        self._closed = True
        _shelves.pop(id(self), None)
        for kept in (self._free, self._out, self._veiled, self._foreign):
            kept.clear()

    # -- sending ---------------------------------------------------------------------------

    def load(self, buffers: Sequence[memoryview], room: int = MOST_NEW) -> Cargo | None:
        """
        Put the big buffers of a message into segments.

        What is not sent after all must be given to ``recall``, or the shelf closed.

        Args:
            buffers: flat and contiguous, of format "B".
            room: how many descriptors the message has room for.

        Returns:
            What to send in place of the buffers; None if that is just the buffers.
        """
        if not self.usable:
            return None
        _used.shelf = self._me
        big = [index for index, view in enumerate(buffers) if view.nbytes >= THRESHOLD]
        if not big and not self.news:
            return None
        packing = _Packing(self, buffers, min(room, MOST_NEW))
        try:
            packing.pack(big)
            return packing.finish(self.news, self._out)
        except BaseException:
            self.recall(packing.cargo)
            raise
        finally:
            if self._closed:  # meanwhile, by another thread
                self.close()

    def recall(self, cargo: Cargo) -> None:
        """Undo a ``load`` of which nothing was sent; idempotent."""
        while cargo.segments:
            segment, new = cargo.segments.pop()
            self._out.pop(segment.id, None)
            if new:
                segment.announced = False
            self.take_home(segment)
        while cargo.news:
            kind, number = cargo.news.pop()
            if kind == RELEASED and number in self._foreign:
                self._foreign[number].ours = True
            self.news.appendleft((kind, number))

    def take(self, size: int) -> Own | None:
        """Take the free segment that fits best out of them; for any thread."""
        global _reused
        if self._veiled:
            self._unveil()
        most = WASTE * _segments.rounded(size)
        while True:
            best = None
            for free in list(self._free.values()):
                if size <= free.size <= most and (best is None or free.size < best.size):
                    best = free
            if best is None or self._free.pop(best.id, None) is best:
                break
        if best is not None:
            self.reused += 1
            _reused += 1
        return best

    def make(self, size: int) -> Own | None:
        """Make a segment for this channel, in place of free ones if there are too many."""
        size = _segments.rounded(size)
        while not self.has_room(size):
            if size > BYTES_OF_CHANNEL or not self.give_back():
                return None
        segment = _make(size)
        if segment is not None:
            self.bind(segment)
        return segment

    def owns(self, segment: Own) -> bool:
        """Tell whether a segment belongs to this channel."""
        return segment.news is self.news

    def has_room(self, size: int) -> bool:
        """Tell whether one more segment may be made on this channel."""
        sizes = list(self._ledger.values())
        return len(sizes) < MOST_SEGMENTS and sum(sizes) + size <= BYTES_OF_CHANNEL

    def bind(self, segment: Own) -> None:
        """Make a segment this channel's, for good."""
        number = next(self._ids)
        if number > _MOST_NUMBERS:
            raise OverflowError("a channel has made 2**32 segments")
        self._ledger[segment.serial] = segment.size
        segment.bind(number, self.news, self._ledger)

    def give_back(self, before: float = math.inf) -> bool:
        """Give one free segment back to the system, the one unused for longest; for any thread."""
        for segment in sorted(self._free.values(), key=_since_of):
            if segment.since > before:
                return False
            if self._free.pop(segment.id, None) is segment:
                segment.punch()
                return True
        return False

    def let_go(self, number: int) -> None:
        """Have a segment of the other side's be its own again; it is about to be told."""
        segment = self._foreign.get(number)
        if segment is not None:
            segment.ours = False

    @property
    def oldest(self) -> float:
        """When the segment that is free for longest became so; infinite if none is."""
        free = [*self._free.values(), *self._veiled.values()]
        return min(map(_since_of, free), default=math.inf)

    def sweep(self, before: float) -> None:
        """Give back all that is free since before a time; for any thread."""
        self._unveil()
        while self.give_back(before):
            continue
        for segment in list(self._veiled.values()):  # an old array shows its pages: they go with that
            if segment.since <= before:
                self._veiled.pop(segment.id, None)

    def _unveil(self) -> None:
        """Find out which loans are dead, so that their segments are free; for any thread."""
        for segment in list(self._veiled.values()):
            if not segment.is_veiled and self._veiled.pop(segment.id, None) is segment:
                self.take_home(segment)

    def take_home(self, segment: Own) -> None:
        """Have a segment that the other side has let go."""
        if segment.spoiled or self._closed:
            return  # it goes with the last reference
        segment.since = time.monotonic()
        if segment.is_veiled:
            self._veiled[segment.id] = segment
        else:
            segment.veil = None
            self._free[segment.id] = segment
        _sweeper.arm()

    # -- receiving -------------------------------------------------------------------------

    def unload(
        self,
        manifest: bytes | bytearray | memoryview,
        inline: Sequence[bytearray | memoryview],
        descriptors: list[int],
    ) -> list[memoryview | bytearray]:
        """
        Take the buffers of a message, in segments and outside, in the order in which they were sent.

        Must be done with each message that has a manifest, even if it is refused.

        Args:
            manifest: as it came.
            inline: the buffers that came as they are.
            descriptors: of the message; those of new segments are taken off its end.

        Raises:
            ProtocolError: the manifest is none, or untrue; the channel must be closed.
        """
        said = decode(manifest)
        taken = taken_off(descriptors, len(said.new)) if said.new else []
        try:
            if not self.usable:
                raise ProtocolError("segments came on a channel that is closed")
            _used.shelf = self._me
            if said.retired or said.released or said.dropped or said.new:
                self._check_numbers(said)
            segments = self._check_places(said, len(inline))
            if said.retired or said.new:
                self._accept(said, taken, segments)
        finally:
            if taken:
                _janitor.close_all(taken, NOBODY)
        if said.released or said.dropped:
            self._hear(said)
        return self._build(said.places, segments, inline) if said.places else list(inline)

    def _check_numbers(self, said: Manifest) -> None:
        foreign, out = self._foreign, self._out
        for number in said.retired:
            known = foreign.get(number)
            check(known is not None and not known.ours, "segment %d cannot be retired", number)
        for number in (*said.released, *said.dropped):
            check(number in out, "segment %d was not passed", number)
        check_each_once((*said.released, *said.dropped))
        check_each_once(said.retired)
        if said.new:
            self._check_new(said.new, set(said.retired))

    def _check_new(self, new: Sequence[tuple[int, int]], gone: set[int]) -> None:
        foreign = {number: segment.size for number, segment in list(self._foreign.items())}
        for number in gone:
            foreign.pop(number, None)
        for number, size in new:
            check(number not in foreign, "segment %d is not new", number)
            check(size > 0, "a segment of no bytes")
            foreign[number] = size
        total = sum(foreign.values())
        check(len(foreign) <= MOST_FROM_PEER, "%d segments, more than %d", len(foreign), MOST_FROM_PEER)
        check(total <= BYTES_FROM_PEER, "%d bytes, more than %d", total, BYTES_FROM_PEER)

    def _check_places(self, said: Manifest, inline: int) -> dict[int, Foreign]:
        """Return the segments that are used and not new."""
        if said.buffers != len(said.places) + inline:
            raise ProtocolError(f"a manifest of {said.buffers} buffers came with {inline} beside segments")
        sizes = dict(said.new)
        found: dict[int, Foreign] = {}
        before = -1
        for index, number, offset, length in said.places:
            if number not in sizes:
                known = self._foreign.get(number)
                if known is None or known.ours or number in said.retired:
                    raise ProtocolError(f"a buffer came in segment {number}, which was not to be used")
                found[number], sizes[number] = known, known.size
            if not (before < index < said.buffers and 0 < length <= sizes[number] - offset):
                raise ProtocolError(f"buffer {index} of {said.buffers}: {length} bytes at {offset}")
            before = index
        return found

    def _accept(self, said: Manifest, taken: list[int], segments: dict[int, Foreign]) -> None:
        """Take the new segments, all or none; each descriptor that is a segment's is off the list."""
        for (_, size), descriptor in zip(said.new, taken, strict=True):
            _segments.check_memfd(descriptor, size)
        taken.reverse()
        for number in said.retired:
            self._foreign.pop(number, None)
        for number, size in said.new:
            holder = next(map(select.epoll.fromfd, iter(taken.pop, None)))  # in one go, as in _new_memfd
            segments[number] = self._foreign[number] = Foreign(holder, size, number)

    def _hear(self, said: Manifest) -> None:
        for number in said.dropped:
            segment = self._out.pop(number, None)  # None: closed, meanwhile
            if segment is not None:
                segment.announced = False
        for number in said.released:
            segment = self._out.pop(number, None)
            if segment is not None:
                self.take_home(segment)

    def _build(
        self,
        places: Sequence[Place],
        segments: dict[int, Foreign],
        inline: Sequence[bytearray | memoryview],
    ) -> list[memoryview | bytearray]:
        """Lay views over the segments, and put all buffers in their order."""
        outside = iter(inline)
        found: list[memoryview | bytearray] = []
        views: dict[int, memoryview | None] = {}
        for index, number, offset, length in places:
            found += itertools.islice(outside, index - len(found))
            if number not in views:
                views[number] = self._export(segments[number])
            whole = views[number]
            if whole is not None:
                found.append(whole[offset : offset + length])
            else:
                found.append(_memory.read(segments[number].number, offset, length))
        found += outside
        with _segments.fork_gate:
            return found

    def unmap_idle(self) -> bool:
        """Unmap one segment of the other side's on which nothing stands; under ``fork_gate``, any thread."""
        idle = next((it for it in list(self._foreign.values()) if it.is_idle), None)
        if idle is not None:
            idle.unmap()
        return idle is not None

    def _export(self, segment: Foreign) -> memoryview | None:
        """Have objects stand on a segment; None if there is no room to map it, and it must be read."""
        try:
            with _segments.fork_gate:  # so that it is not unmapped for another channel's sake
                segment.ours = True
                if segment.mapping is None:
                    _make_room(segment.size)
                mapping = segment.map()
        except OSError:
            self.news.append((RELEASED, segment.id))
            return None
        exporter = segment.kind.from_address(mapping.address)
        arrival = Arrival(exporter, _segments.has_died)
        arrival.mapping, arrival.segment = mapping, segment
        arrival.home, arrival.news = self._foreign, self.news
        _segments.exports[id(arrival)] = arrival
        return memoryview(exporter).cast("B")


def _since_of(segment: Own) -> float:
    return segment.since


@attrs.frozen
class _Lot:
    """A loan that a message passes, and the parts of it that objects are to stand on."""

    loan: Loan
    segment: Own
    parts: list[tuple[int, int]] = attrs.field(factory=list)


class _Packing:
    """The making of one ``Cargo``."""

    __slots__ = ("buffers", "cargo", "new", "places", "room", "shelf")

    def __init__(self, shelf: Shelf, buffers: Sequence[memoryview], room: int) -> None:
        self.shelf = shelf
        self.buffers = buffers
        self.room = room
        self.cargo = Cargo()
        self.places: dict[int, tuple[int, int, int]] = {}  # segment, offset, length
        self.new: list[Own] = []

    def pack(self, big: list[int]) -> None:
        """Find a place for each of the big buffers, as far as there are any."""
        if _segments.loans:
            passed: list[_Lot] = []
            big = [index for index in big if not self._pass(index, passed)]
        small = []
        for index in big:
            if self.buffers[index].nbytes >= LARGE:
                self._copy_in([index])
            else:
                small.append(index)
        if small:
            self._copy_in(small)

    def finish(self, news: News, out: dict[int, Own]) -> Cargo | None:
        """Write the manifest."""
        cargo, places = self.cargo, self.places
        self._collect(news)
        if not places and not cargo.news:
            return None
        for segment, _ in cargo.segments:
            segment.announced = True
            out[segment.id] = segment
        if len(places) < len(self.buffers):
            cargo.inline = [view for index, view in enumerate(self.buffers) if index not in places]
        cargo.descriptors = [segment.number for segment in self.new]
        told = {kind: [number for about, number in cargo.news if about == kind] for kind in KINDS}
        cargo.manifest = Manifest(
            len(self.buffers),
            [(index, *places[index]) for index in sorted(places)],
            [(segment.id, segment.size) for segment in self.new],
            *told.values(),
        ).encode()
        return cargo

    def _collect(self, news: News) -> None:
        while news:
            kind, number = news.popleft()
            self.cargo.news.append((kind, number))
            if kind == RELEASED:
                self.shelf.let_go(number)

    def _copy_in(self, indexes: list[int]) -> None:
        """Copy buffers into one segment, if there is one to be had."""
        offsets, size = [], 0
        for index in indexes:
            offsets.append(size)
            size += -(-self.buffers[index].nbytes // ALIGNMENT) * ALIGNMENT
        segment = self._segment(size)
        if segment is None:
            return
        try:
            segment.heat(size)
            for index, offset in zip(indexes, offsets, strict=True):
                segment.put(offset, self.buffers[index])
        except OSError:  # no memory: they go as they are
            self._send_not(segment)
            return
        for index, offset in zip(indexes, offsets, strict=True):
            self.places[index] = segment.id, offset, self.buffers[index].nbytes

    def _segment(self, size: int) -> Own | None:
        segment = self.shelf.take(size)
        if segment is None and len(self.new) < self.room:
            segment = self.shelf.make(size)
        if segment is not None:
            self._send(segment)
        return segment

    def _send(self, segment: Own) -> None:
        """Have a segment in the message; whatever happens now, it is not lost."""
        new = not segment.announced
        self.cargo.segments.append((segment, new))
        if new:
            self.new.append(segment)

    def _send_not(self, segment: Own) -> None:
        """Have the segment that was the last to come not in the message after all."""
        _, new = self.cargo.segments.pop()
        if new:
            self.new.pop()  # and it is gone
        else:
            self.shelf.take_home(segment)

    def _pass(self, index: int, passed: list[_Lot]) -> bool:
        """
        Pass a buffer as the loan that it lies in.

        Args:
            passed: what this message has passed already.

        Returns:
            False if it must be copied.
        """
        begin = _memory.address_of(self.buffers[index])
        end = begin + self.buffers[index].nbytes
        lot = next((each for each in passed if each.loan.covers(begin, end)), None)
        if lot is None:
            lot = self._pass_loan_at(begin, end)
            if lot is None:
                return False
            passed.append(lot)
        return self._pass_part(lot, index, begin, end)

    def _pass_part(self, lot: _Lot, index: int, begin: int, end: int) -> bool:
        if any(begin < other_end and other < end for other, other_end in lot.parts):
            return False  # two objects that overlap here must not do so there, as with any copy
        lot.parts.append((begin, end))
        offset, size = begin - lot.loan.mapping.address, end - begin
        self.places[index] = lot.segment.id, offset, size
        lot.segment.wet = max(lot.segment.wet, offset + size)
        return True

    def _pass_loan_at(self, begin: int, end: int) -> _Lot | None:
        for loan in list(_segments.loans.values()):
            if loan.covers(begin, end):
                segment = loan.lent
                return _Lot(loan, segment) if segment and self._pass_loan(loan, segment) else None
        return None

    def _pass_loan(self, loan: Loan, segment: Own) -> bool:
        shelf = self.shelf
        if not segment.announced and len(self.new) >= self.room:
            return False
        with _segments.fork_gate:
            if _segments.loans.pop(id(loan), None) is None:
                return False  # another thread has passed it, or a child has it
            if segment.news is None and shelf.has_room(segment.size):
                shelf.bind(segment)
            if shelf.owns(segment) and loan.draw_veil(segment):
                self._send(segment)
                return True
            _segments.loans[id(loan)] = loan
            return False


# -- making ------------------------------------------------------------------------------


def _fits(ledger: dict[int, int], most: int, most_bytes: int) -> bool:
    return len(ledger) <= most and sum(list(ledger.values())) <= most_bytes


def _make(size: int) -> Own | None:
    """Make a segment, unless the process has enough, or the system has none."""
    if size > BYTES_OF_PROCESS:
        return None
    serial = next(_segments.serials)
    _segments.made[serial] = size  # and then look: of two who do so at once, neither may be over the limit
    try:
        while not _fits(_segments.made, _segments.most_descriptors(), BYTES_OF_PROCESS):
            if not _give_back_any():
                raise OSError(errno.ENOMEM, "enough segments")
        return Own(_memory.memfd(size), size, serial)
    except BaseException as error:
        _segments.made.pop(serial, None)
        if isinstance(error, OSError):
            return None
        raise


def _make_room(size: int) -> None:
    """
    Have room for one more mapping of what others have made; under ``fork_gate``.

    Raises:
        OSError: objects stand on all that is mapped, and with it that would be too much.
    """
    while (total := sum(list(_segments.mapped.values())) + size) > BYTES_MAPPED:
        if size > BYTES_MAPPED or not any(shelf.unmap_idle() for shelf in _all_shelves()):
            text = f"{total} bytes mapped that others have made, more than {BYTES_MAPPED}"
            raise OSError(errno.ENOMEM, text)


# -- giving back -------------------------------------------------------------------------


def _give_back_any() -> bool:
    """Give one free segment of any shelf back to the system."""
    return any(shelf.give_back() for shelf in _all_shelves())


class _Sweeper:
    """
    Gives back what nobody has used for ``IDLE`` seconds.

    The keeper calls, as long as there is something to give back; a thread that comes for it does it,
    since it takes 14 ms for 100 MB, and the keeper has all doors to watch.
    """

    def __init__(self) -> None:
        self._armed = False

    def arm(self, seconds: float | None = None) -> None:
        """Look in a while, unless that is going to be done anyway; not from a finalizer."""
        if self._armed:
            return
        self._armed = True
        try:
            keeper().after(IDLE if seconds is None else seconds, self._look)
        except BaseException as error:
            self._armed = False
            if not isinstance(error, OSError | RuntimeError):
                raise  # and those: no keeper to be had; when the next segment is free there may be one

    def _look(self) -> None:
        oldest = min((shelf.oldest for shelf in _all_shelves()), default=math.inf)
        if oldest > time.monotonic() - IDLE:
            self._armed = False
            self._arm_again()
            return
        try:
            start_new_thread(self._sweep, ())
        except (RuntimeError, MemoryError):  # no thread to be had
            keeper().afterwards(self._sweep)

    def _sweep(self) -> None:
        before = time.monotonic() - IDLE
        for shelf in _all_shelves():
            shelf.sweep(before)
        self._armed = False  # and then look: what is free since was not armed for
        self._arm_again()

    def _arm_again(self) -> None:
        oldest = min((shelf.oldest for shelf in _all_shelves()), default=math.inf)
        if oldest < math.inf:
            self.arm(max(IDLE / 10, oldest + IDLE - time.monotonic()))


_sweeper = _Sweeper()


def _forget_parent() -> None:
    """Have nothing of the parent's in a forked child."""
    global _sweeper
    _sweeper = _Sweeper()
    _shelves.clear()
    _used.shelf = None


_sockets.on_fork(_forget_parent)


# -- for everybody -----------------------------------------------------------------------


def totals() -> Totals:
    """Count the segments of this process."""
    held, received, mapped = (
        list(registry.values()) for registry in (_segments.made, _segments.met, _segments.mapped)
    )
    passed = [segment for shelf in _all_shelves() for segment in shelf.passed]
    return Totals(
        len(held), sum(held), *_count(passed), *_count(_segments.lent()),
        len(received), sum(received), len(mapped), sum(mapped), _reused,
    )  # fmt: skip


_find: Callable[[], Shelf | None] | None = None


def set_finder(find: Callable[[], Shelf | None] | None) -> None:
    """
    Say how to find the shelf from which ``empty`` and ``buffer`` should take.

    Args:
        find: returns it, or None for the one that the thread has used last; takes no lock.
    """
    global _find
    _find = find


def _nearest_shelf() -> Shelf | None:
    shelf = _find() if _find is not None else None
    if shelf is None and _used.shelf is not None:
        shelf = _used.shelf()
    return shelf if shelf is not None and shelf.usable else None


def _lend(size: int) -> memoryview | None:
    """Lend memory in a segment; None if it is too small for that, or there is none."""
    _sockets.here()
    if size < THRESHOLD:
        return None
    shelf = _nearest_shelf()
    segment = shelf.take(size) if shelf is not None else None
    if segment is None:
        segment = _make(_segments.rounded(size))
    if segment is None:
        return None
    try:
        with _segments.fork_gate:  # so that a fork finds it among the loans, or not at all
            segment.heat(size)
            mapping = segment.map()
            exporter = (ctypes.c_ubyte * segment.size).from_address(mapping.address)
            loan = Loan(exporter, _segments.has_died)
            loan.mapping, loan.lent, loan.passed = mapping, segment, None
            _segments.loans[id(loan)] = _segments.exports[id(loan)] = loan
            return memoryview(exporter).cast("B")[:size]
    except OSError:  # no room to map it
        return None


def buffer(nbytes: int) -> memoryview:
    """
    Return writable memory that can cross a door without being copied.

    Its content is arbitrary.  Passed as an argument, or returned, it arrives as a ``memoryview``, as it
    would anyway; only that nothing is copied if

    - it has at least 64 KiB (less is ordinary memory, as is everything once the process has
      4 GiB of such memory, or a quarter of the machine's),
    - it was not passed before (from then on it is ordinary memory),
    - it goes to another process that speaks pickle, and was taken while serving a call of that process,
      or after calling it, or before there was any other.

    A part of it counts like the whole.  After it was passed you may still read and write it.  What you
    write stays with you and is never seen by the receiver.  What you read is what you passed or have
    written since, unless the receiver changes it in place: that may show wherever you have not written
    since.  The receiver may keep it as long as it likes; nothing that you do changes it there.

    Args:
        nbytes: how many bytes.

    Raises:
        TypeError: that is no number.
        ValueError: it is negative.
    """
    size = _checked(nbytes, "nbytes")
    return _lend(size) or memoryview(bytearray(size))


def empty(
    shape: int | Sequence[int], dtype: numpy.typing.DTypeLike = float, order: Literal["C", "F"] = "C"
) -> numpy.typing.NDArray[Any]:
    """
    Return a new NumPy array, like ``numpy.empty``, that can cross a door without being copied.

    When it is copied all the same, and what may be done with it after it was passed, is
    said at ``buffer``.  A view of it counts like the whole.

    Args:
        shape, dtype, order: as for ``numpy.empty``.

    Raises:
        ImportError: there is no NumPy.
        TypeError: the shape is none, or the elements are Python objects, which have no
            place in memory that another process sees.
        ValueError: a dimension is negative, or the order is neither "C" nor "F".
    """
    import numpy

    kind = numpy.dtype(dtype)
    if kind.hasobject:
        raise TypeError(f"doorpool.empty cannot hold Python objects, which {kind} has")
    if order not in ("C", "F"):
        raise ValueError(f'order is "C" or "F", not {order!r}')
    lengths = shape if isinstance(shape, Sequence) else (shape,)
    form = tuple(_checked(length, "a dimension") for length in lengths)
    memory = _lend(math.prod(form) * kind.itemsize)
    if memory is None:
        return numpy.empty(form, kind, order)
    return numpy.ndarray(form, kind, memory, order=order)


def _checked(number: int, what: str) -> int:
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise TypeError(f"{what} is a number, not {number!r}")
    number = operator.index(number)
    if number < 0:
        raise ValueError(f"{what} is not below 0: {number}")
    return number
