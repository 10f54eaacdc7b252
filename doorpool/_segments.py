"""
Segments: big buffers cross a channel in shared memory, copied once on the way in and never out.

A buffer that pickle lends us (an array's memory) would be copied into the socket and out of it.
Here its sender copies it into a *segment*, a sealed memfd that both sides have mapped, and sends a
line that says where it is.  The receiver's object is built on the segment itself, writable.

What is guaranteed.  A segment has one owner at a time:

    its maker           nobody else has anything built on it; only now is it written
      | a message passes it
    the receiver        objects live on it; the maker keeps its hands off, however long that takes
      | the last object dies; the receiver's next manifest says "released"
    its maker

So an array may be kept for ever and never changes under whoever keeps it: the sender takes another
segment meanwhile.  A segment belongs to one channel as long as it exists; no other peer ever maps it.

Why segments are used again.  100 MB take 6.3 ms into warm memory; into a new memfd 45 ms by
``pwrite`` and 75 to 90 through a mapping, each page being cleared and faulted in (Linux 6.18, 2-CPU
virtual machine, as all numbers here).  So they stay mapped at both ends.  A new one is written by
``pwrite`` and not mapped by its maker at all until it is used again: many never are.

How it is known that the last object has died.  The memory is given out through a ctypes array laid
over it, the *exporter*, on which every view and array built keeps a hand; a ``weakref`` on it tells
(``_Export``).  (``memoryview.release`` succeeds while a slice lives, and ``mmap.close`` as a probe
unmaps.)  That may happen in the garbage collector, in any thread, under any lock.  So a death only
appends to a ``deque``; and nothing here takes a lock that a finalizer could want.

Without locks.  A shelf belongs to one thread at a time, the holder of its channel, but for three
visitors: deaths, the sweeper, and ``empty`` in a thread that used the channel before.  They meet in
collections of which the single operations are atomic: who gets a segment *out* of one, by ``pop``, has
it alone.  Memory is let go by the count of references: as long as anybody holds a ``_Segment`` or a
``_Mapping`` its descriptor is open and its pages are mapped, whatever is closed meanwhile.

A loan (``empty``, ``buffer``) is a segment that its maker's own objects stand on.  When it is passed:

 1. ``mremap(MREMAP_DONTUNMAP)`` moves the warm page tables to a new address, from now on where the
    shelf has the segment mapped; the old range is still the same memory, page tables empty;
 2. ``mmap(MAP_FIXED | MAP_PRIVATE)`` replaces the old range by a private mapping, the *veil*.

At no moment is there a hole.  What the sender's array shows afterwards is what was passed; what is
written to it stays there.  (0.3 ms for 100 MB; 3.2 by mapping anew, as before Linux 5.13.)  Until the
array dies the segment is not used for anything else, or its new content would show through the veil.

Fork.  Mappings are not inherited (MADV_DONTFORK), or a child, or a segment used again, would change
what the other process sees.  What live objects stand on is made private in both, just before
(``_before_fork``), and its other side is told that it is *dropped*: never to be used again.  A thread
that receives meanwhile:

 1. thread A forks: it takes ``_fork_gate``, and goes through all exports;
 2. thread B, in ``unload``, has just made another, which is still shared and not inherited;
 3. B must pass the gate before it gives the objects to anybody, and by then the child is there, where
    nobody knows of them.

After a ``fork`` made in C, past Python's hooks, such objects are not there in the child.

The manifest, all numbers little-endian:

     0  1  version                         16  4  released: the other side's, free for it to use
     1  3  0                               20  4  dropped: the other side's, never to be used again
     4  4  buffers, in and outside         24     a buffer in a segment: 4 its place among all buffers,
     8  4  of them in segments                    4 segment, 8 offset, 8 length; places ascend
    12  2  new segments                           a new segment: 4 number, 8 size; descriptors in order
    14  2  retired: the sender's, gone            a retired, released, dropped one: 4 number

Roads not taken: one big segment with an allocator in it (a kept array keeps all of it, and holes
cannot be given back); names in /dev/shm (they outlive a crash, and anybody can open them); large
pages (off for shared memory by default; 77 ms instead of 89 for the 100 MB where they were asked for).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import math
import mmap
import operator
import os
import resource
import select
import struct
import sys
import threading
import time
import weakref
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import attrs

from doorpool import _janitor, _sockets
from doorpool._errors import ProtocolError
from doorpool._keeper import keeper

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
#: message does not fit into a socket.
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

IDLE = 5.0  #: Seconds after which a segment that nobody uses is given back to the system.

#: How much larger than asked for a free segment may be.
WASTE = 2

#: Bytes copied at a time, without the GIL: between two steps Ctrl-C gets through (30 ms into new
#: memory, 4 into warm).  Smaller ones would have to take the GIL back more often, 5 ms each time if
#: another thread computes.
STEP = 64 * MIB

#: Up to here a copy keeps the GIL: to take it back may cost more than the 12 µs that it takes.
QUICK = 256 << 10

ALIGNMENT = 64  #: Of buffers that share a segment: a cache line, and what NumPy likes best.

_F_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h
_MFD_NOEXEC_SEAL = 8  # linux/memfd.h, since 6.3
_TMPFS_MAGIC = 0x0102_1994  # linux/magic.h
_MAP_FIXED = 0x10  # asm-generic/mman-common.h
_MREMAP_MAYMOVE, _MREMAP_DONTUNMAP = 1, 4  # linux/mman.h
_MADV_POPULATE_READ = 22  # asm-generic/mman-common.h, since 5.14

_PAGE = mmap.PAGESIZE
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MOST_NUMBERS = (1 << 32) - 1

_HEADER = struct.Struct("<B3xIIHHII")
_PLACE = struct.Struct("<IIQQ")
_NEW = struct.Struct("<IQ")
VERSION = 1

#: News for the other side, and the number of the segment they are about.
_KINDS = _RETIRED, _RELEASED, _DROPPED = "retired", "released", "dropped"
News = deque[tuple[str, int]]


# -- what libc does, with errors raised --------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_char_p]

_MAP_FAILED = ctypes.c_void_p(-1).value

#: ``ctypes.memmove`` without the GIL, and one that keeps it.
_copy_slow = ctypes.memmove
_copy_quick = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


class _Buffer(ctypes.Structure):
    """A ``Py_buffer``, whose layout is part of the stable ABI since CPython 3.11."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("object", ctypes.c_void_p),
        ("length", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int]
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_Buffer)]
_release_buffer.restype = None


def _fail(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def _map(number: int, size: int, kind: int, at: int | None = None) -> int:
    """Map a descriptor (-1: no file), readable and writable, not to be inherited; return the address."""
    address = _libc.mmap(at, size, _READ_WRITE, kind, number, 0)
    if address == _MAP_FAILED:
        raise _fail("mmap")
    _libc.madvise(address, size, mmap.MADV_DONTFORK)
    return int(address)


def _move(address: int, size: int) -> int | None:
    """Move page tables to a new address, leaving the old one mapped; None where the kernel cannot."""
    # glibc looks at the fifth argument although no flag asks for it.
    moved = _libc.mremap(address, size, size, _MREMAP_MAYMOVE | _MREMAP_DONTUNMAP, None)
    return None if moved == _MAP_FAILED else int(moved)


def _address(view: memoryview) -> int:
    held = _Buffer()
    _get_buffer(view, held, 0)
    address = held.address
    _release_buffer(held)
    return int(address)


def _copy(target: int, view: memoryview) -> None:
    """Copy a view, which may be read-only, to an address."""
    held = _Buffer()
    _get_buffer(view, held, 0)  # or another thread might release it while we copy
    try:
        _copy_bytes(target, held.address, held.length)
    finally:
        _release_buffer(held)


def _copy_bytes(target: int, source: int, size: int) -> None:
    if size <= QUICK:
        _copy_quick(target, source, size)
        return
    for begin in range(0, size, STEP):
        _copy_slow(target + begin, source + begin, min(STEP, size - begin))


def _write(number: int, offset: int, view: memoryview) -> None:
    """
    Write a view into a file, all of it.

    Raises:
        OSError: there is no memory for it.
    """
    while view:
        done = os.pwrite(number, view[:STEP], offset)
        offset += done
        view = view[done:]


def _read(number: int, offset: int, size: int) -> bytearray:
    """Read from a file, of which so much is there."""
    found = bytearray(size)
    with memoryview(found) as view:
        done = 0
        while done < size:
            done += os.preadv(number, [view[done : done + STEP]], offset + done)
    return found


# -- memory ------------------------------------------------------------------------------


class _Mapping:
    """
    A range of addresses, unmapped when nobody refers to it any more.

    Attributes:
        inherited: the children of this process have it too.
    """

    __slots__ = ("address", "generation", "inherited", "size")

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self.generation = _sockets.here()
        self.inherited = False

    def __del__(
        self,
        _ending: Callable[[], bool] = sys.is_finalizing,
        _here: Callable[[], int] = _sockets.here,
        _munmap: Callable[[int, int], int] = _libc.munmap,
    ) -> None:
        # In a child the range is somebody else's by now, unless the child inherited it.
        if not _ending() and (self.inherited or self.generation == _here()):
            _munmap(self.address, self.size)

    def part(self, number: int) -> None:
        """
        Make it private to this process and to its children to come, with the content that it has.

        Args:
            number: the memfd, or -1 if it was closed: then all is copied.

        Raises:
            OSError: no memory; it is as it was.
        """
        if number >= 0:
            _map(number, self.size, mmap.MAP_PRIVATE | _MAP_FIXED, self.address)
        else:
            self._replace_by_copy()
        self.let_inherit()

    def _replace_by_copy(self) -> None:
        copy = _map(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _copy_bytes(copy, self.address, self.size)
        flags = _MREMAP_MAYMOVE | 2  # MREMAP_FIXED: over the old one, in one step
        if _libc.mremap(copy, self.size, self.size, flags, self.address) == _MAP_FAILED:
            error = _fail("mremap")
            _libc.munmap(copy, self.size)
            raise error

    def let_inherit(self) -> None:
        """Let children have it; it must be private."""
        _libc.madvise(self.address, self.size, mmap.MADV_DOFORK)
        self.inherited = True


class _Segment:
    """
    A memfd with its mapping; closed when nobody refers to it any more.

    The descriptor is an epoll object's, which takes any: that closes what it has when it goes, in C,
    where no Ctrl-C can come between.  A finalizer of ours may be broken off at any line.

    Attributes:
        number: the descriptor; -1 if it is not kept.
        size: of the memfd.
        id: its number on the channel, given by its maker; 0 before it has a channel.
        mapping: where it is mapped, shared; None as long as it is not.
    """

    __slots__ = ("__weakref__", "_holder", "id", "mapping", "number", "size")

    def __init__(self, holder: select.epoll, size: int, id: int) -> None:
        self._holder = holder
        self.number = holder.fileno()
        self.size = size
        self.id = id
        self.mapping: _Mapping | None = None
        _open.add(self)

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if _ending():
            return
        with contextlib.suppress(AttributeError):  # Ctrl-C has come before it was whole
            try:
                self.end()
            except KeyboardInterrupt:  # all of it may be done twice
                self.end()
                raise

    def end(self) -> None:
        """Let go of all; what must be told is told."""
        self.shut()

    def shut(self) -> None:
        """Close the descriptor; idempotent."""
        self.number = -1
        with contextlib.suppress(OSError):  # somebody has closed it by hand
            self._holder.close()

    def map(self) -> _Mapping:
        """
        Map it, unless it is.

        Raises:
            OSError: no memory.
        """
        if self.mapping is None:
            self.mapping = _Mapping(_map(self.number, self.size, mmap.MAP_SHARED), self.size)
        return self.mapping


class _Own(_Segment):
    """
    A segment that was made here.

    Attributes:
        news: of the shelf that it belongs to, for ever; None as long as it belongs to none.
        announced: the other side has it, and must be told when it goes.
        spoiled: a child may stand on it: it is never written again.
        veil: on the array of the loan that it was, whose objects may still show its content.
        since: when it became free.
        wet, warm: up to where it has pages, and up to where our page tables show them.
    """

    __slots__ = (
        "announced",
        "ledgers",
        "news",
        "serial",
        "since",
        "spoiled",
        "veil",
        "warm",
        "wet",
    )

    def __init__(self, holder: select.epoll, size: int, serial: int) -> None:
        super().__init__(holder, size, 0)
        self.serial = serial
        self.ledgers: tuple[dict[int, int], ...] = (_made,)
        self.news: News | None = None
        self.announced = self.spoiled = False
        self.veil: weakref.ref[Any] | None = None
        self.since = 0.0
        self.wet = self.warm = 0

    def end(self) -> None:
        for ledger in self.ledgers:
            ledger.pop(self.serial, None)
        super().end()
        announced, self.announced = self.announced, False  # once at the most
        if announced and self.news is not None:
            self.news.append((_RETIRED, self.id))

    @property
    def is_veiled(self) -> bool:
        """Whether objects here may still show its content."""
        return self.veil is not None and self.veil() is not None

    def bind(self, id: int, news: News, ledger: dict[int, int]) -> None:
        """Make it the segment of one shelf."""
        self.id, self.news = id, news
        self.ledgers = (_made, ledger)

    def put(self, offset: int, view: memoryview) -> None:
        """
        Copy a view into it.

        Raises:
            OSError: no memory.
        """
        end = offset + len(view)
        if end > self.wet:  # pages that are not there yet: writing makes them faster than faulting
            _write(self.number, offset, view)
            self.wet = end
        else:
            _copy(self.map().address + offset, view)

    def heat(self, end: int) -> None:
        """
        Have the pages that are there in our page tables, in one go.

        100 MB take 6 ms, and 28 page by page as they are written.
        """
        end = min(end, self.wet)
        if end > self.warm:
            begin = self.warm // _PAGE * _PAGE
            _libc.madvise(self.map().address + begin, end - begin, _MADV_POPULATE_READ)  # else by faults
            self.warm = end

    def punch(self) -> None:
        """Free its pages, in all processes that have it, at once (14 ms for 100 MB)."""
        if self.wet or self.mapping is not None:
            with contextlib.suppress(OSError):  # no room to map it: so its pages go with it
                _libc.madvise(self.map().address, self.size, mmap.MADV_REMOVE)
                self.wet = self.warm = 0


class _Foreign(_Segment):
    """
    A segment that the other side has made.

    Attributes:
        ours: objects stand on it, or did and the other side has not been told of their end.
        kind: the array to be laid over it, a class, which takes 20 µs to make.
    """

    __slots__ = ("kind", "ours", "serial")

    def __init__(self, holder: select.epoll, size: int, id: int) -> None:
        super().__init__(holder, size, id)
        self.ours = False
        self.kind = ctypes.c_ubyte * size
        self.serial = next(_serials)
        _met[self.serial] = size
        _kept[self.serial] = None

    def end(self) -> None:
        _met.pop(self.serial, None)
        super().end()

    def shut(self) -> None:
        _kept.pop(self.serial, None)
        super().shut()

    def map(self) -> _Mapping:
        mapping = super().map()
        if len(_kept) > _descriptors_for_segments():
            self.shut()  # it is of use before a fork only, and without it there is a copy
        return mapping


# -- what objects stand on ---------------------------------------------------------------

#: All that objects may stand on in this process, by identity.
_exports: dict[int, _Export] = {}

#: Those of them that were lent by ``empty`` and ``buffer`` and have not been passed.
_loans: dict[int, _Loan] = {}

#: Held from before a fork until after it, and while what a fork must find whole is not.  It is
#: re-entrant, since a finalizer may run meanwhile, and fork.
_fork_gate = threading.RLock()


class _Export(weakref.ref[Any]):
    """
    Memory on which objects stand: a weak reference to the ctypes array laid over it.

    Attributes:
        mapping: the memory, which stays as long as this reference is in ``_exports``.
    """

    # No ``__new__`` and no ``__init__``: together they would take as long as all else in ``unload``.
    __slots__ = ("mapping",)

    mapping: _Mapping

    def ended(self) -> None:
        """Do what is to be done when nothing stands on it any more; wherever that may be."""
        raise NotImplementedError

    def part(self) -> None:
        """
        Make it private, for a child is about to come; it has not died.

        Raises:
            OSError: no memory.
        """
        raise NotImplementedError


def _has_died(
    export: _Export, _all: dict[int, _Export] = _exports, _ending: Callable[[], bool] = sys.is_finalizing
) -> None:
    if not _ending() and _all.pop(id(export), None) is not None:
        export.ended()


class _Arrival(_Export):
    """
    What has come from the other side.

    Attributes:
        segment: in which it has; None once it is parted from it.
        home: where its shelf has that.
        news: where to tell of its end.
    """

    __slots__ = ("home", "news", "segment")

    segment: _Foreign | None
    home: dict[int, _Foreign]
    news: News

    def ended(self) -> None:
        if self.segment is not None:
            self.news.append((_RELEASED, self.segment.id))

    def part(self) -> None:
        segment = self.segment
        if segment is not None:
            self.mapping.part(segment.number)
            self.segment = None
            self.home.pop(segment.id, None)
            self.news.append((_DROPPED, segment.id))


class _Loan(_Export):
    """
    What was lent here, before and after it is passed.

    Attributes:
        lent: the segment, as long as it is not passed, or parted from it.
        passed: the same, as long as there is a need for it.
    """

    __slots__ = ("lent", "passed")

    lent: _Own | None
    passed: weakref.ref[_Own] | None

    def ended(self) -> None:
        segment = self.lent
        if _loans.pop(id(self), None) is not None and segment is not None and segment.announced:
            segment.punch()  # the other side has it mapped, and may not hear of this for long

    def part(self) -> None:
        passed = self.passed() if self.passed is not None else None
        if passed is not None:
            passed.spoiled = True
        if self.lent is not None:
            self.mapping.part(self.lent.number)
            self.lent.mapping = None
            self.lent = None
            _loans.pop(id(self), None)
        elif not self.mapping.inherited:
            self.mapping.let_inherit()

    def covers(self, begin: int, end: int) -> bool:
        """Tell whether a range of addresses lies in it."""
        return self.mapping.address <= begin and end <= self.mapping.address + self.mapping.size

    def draw_veil(self, segment: _Own) -> bool:
        """
        Keep a private view of the segment, and leave it to the shelf; under ``_fork_gate``.

        Returns:
            False if there is no room for it; all is as it was.
        """
        old = self.mapping
        try:
            moved = _move(old.address, old.size)
            shared = _Mapping(moved or _map(segment.number, old.size, mmap.MAP_SHARED), old.size)
            _map(segment.number, old.size, mmap.MAP_PRIVATE | _MAP_FIXED, old.address)
        except OSError:
            return False
        if not moved:
            segment.warm = 0
        segment.mapping, segment.veil = shared, weakref.ref(self())
        self.lent, self.passed = None, weakref.ref(segment)
        return True


def _lent() -> list[_Own]:
    return [loan.lent for loan in list(_loans.values()) if loan.lent is not None]


def _before_fork() -> None:
    _fork_gate.acquire()
    for export in list(_exports.values()):
        exporter = export()  # which cannot die now
        if exporter is not None:
            with contextlib.suppress(OSError):  # no memory: the child goes without
                export.part()


def _after_fork() -> None:
    _fork_gate.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)


# -- making ------------------------------------------------------------------------------

_serials = itertools.count(1)

#: The size of each segment that was made here and exists, by serial number; and of those of others.
_made: dict[int, int] = {}
_met: dict[int, int] = {}

#: All segments whose descriptor may be open: a forked child must not keep it.
_open: weakref.WeakSet[_Segment] = weakref.WeakSet()

#: Those of others of which the descriptor is kept.
_kept: dict[int, None] = {}

_memfd_flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL


def _rounded(size: int) -> int:
    """
    Round a size up to one of four to the octave, so that a segment fits the next that is much like it.

    What is not used of it has no pages, and costs addresses only.
    """
    step = max(_PAGE, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step


def _descriptors_for_segments() -> int:
    """How many descriptors of the process may be those of segments that were made here."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4_096 if limit == resource.RLIM_INFINITY else max(4, min(4_096, limit // 4))


def _fits(ledger: dict[int, int], most: int, most_bytes: int) -> bool:
    return len(ledger) <= most and sum(list(ledger.values())) <= most_bytes


def _make(size: int) -> _Own | None:
    """Make a segment, unless the process has enough, or the system has none."""
    if size > BYTES_OF_PROCESS:
        return None
    serial = next(_serials)
    _made[serial] = size  # and then look: of two who do so at once, neither may be over the limit
    try:
        while not _fits(_made, _descriptors_for_segments(), BYTES_OF_PROCESS):
            if not _give_back_any():
                raise OSError(errno.ENOMEM, "enough segments")
        return _Own(_memfd(size), size, serial)
    except BaseException as error:
        _made.pop(serial, None)
        if isinstance(error, OSError):
            return None
        raise


def _memfd(size: int) -> select.epoll:
    holder = _new_memfd()
    os.ftruncate(holder.fileno(), size)
    fcntl.fcntl(holder.fileno(), fcntl.F_ADD_SEALS, _F_SEALS)
    return holder


def _new_memfd() -> select.epoll:
    global _memfd_flags
    try:  # in one go, between whose parts no signal handler can run, or the number might be lost
        return next(map(select.epoll.fromfd, map(os.memfd_create, ("doorpool",), (_memfd_flags,))))
    except OSError as error:
        if error.errno != errno.EINVAL or not _memfd_flags & _MFD_NOEXEC_SEAL:
            raise
    _memfd_flags &= ~_MFD_NOEXEC_SEAL
    return _new_memfd()


# -- the manifest ------------------------------------------------------------------------

Place = tuple[int, int, int, int]  # the buffer's place, segment, offset, length


class _Manifest(NamedTuple):  # which takes 0.4 µs to make, and an attrs class 1.6
    """What a manifest says; not checked against anything but its own length."""

    buffers: int = 0
    places: Sequence[Place] = ()
    new: Sequence[tuple[int, int]] = ()
    retired: Sequence[int] = ()
    released: Sequence[int] = ()
    dropped: Sequence[int] = ()

    def encode(self) -> bytes:
        buffers, places, new, retired, released, dropped = self
        counts = len(places), len(new), len(retired), len(released), len(dropped)
        parts = [_HEADER.pack(VERSION, buffers, *counts)]
        parts += [_PLACE.pack(*place) for place in places]
        parts += [_NEW.pack(*each) for each in new]
        numbers = [*retired, *released, *dropped]
        if numbers:
            parts.append(struct.pack(f"<{len(numbers)}I", *numbers))
        return b"".join(parts)


def _decode(data: bytes | bytearray | memoryview) -> _Manifest:
    """
    Read a manifest.

    Raises:
        ProtocolError: it is none.
    """
    if len(data) < _HEADER.size:
        raise ProtocolError(f"a manifest of {len(data)} bytes")
    version, buffers, places, new, retired, released, dropped = _HEADER.unpack_from(data)
    if version != VERSION or any(data[1:4]):
        raise ProtocolError(f"a manifest begins with {bytes(data[:4])!r}")
    at_new = _HEADER.size + places * _PLACE.size
    at_numbers = at_new + new * _NEW.size
    count = retired + released + dropped
    if len(data) != at_numbers + 4 * count:
        raise ProtocolError(f"a manifest of {len(data)} bytes, not {at_numbers + 4 * count}")
    numbers = struct.unpack_from(f"<{count}I", data, at_numbers) if count else ()
    return _Manifest(
        buffers,
        list(_PLACE.iter_unpack(data[_HEADER.size : at_new])),
        list(_NEW.iter_unpack(data[at_new:at_numbers])) if new else (),
        numbers[:retired],
        numbers[retired : retired + released],
        numbers[retired + released :],
    )


def _check(condition: bool, what: str, *args: object) -> None:
    if not condition:
        raise ProtocolError("the other side's manifest: " + what % args)


def _taken_off(descriptors: list[int], count: int) -> list[int]:
    """Take the last ones off a list."""
    at = len(descriptors) - count
    _check(at >= 0, "%d segments without a descriptor", -at)
    taken = descriptors[at:]
    del descriptors[at:]
    return taken


def _check_each_once(numbers: Sequence[int]) -> None:
    if numbers:
        _check(len(set(numbers)) == len(numbers), "a segment is named twice")


def _check_memfd(number: int, size: int) -> None:
    """
    See that a descriptor from the other side is a memfd that can be mapped for good.

    Raises:
        ProtocolError: it is not.
    """
    try:  # the seals first: nothing but a memfd has any, and a file system of somebody's is not asked
        seals = fcntl.fcntl(number, fcntl.F_GET_SEALS)
    except OSError:
        raise ProtocolError("a segment of the other side is no memfd") from None
    unwanted = fcntl.F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE
    _check(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR, "a segment cannot be written")
    _check(seals & _F_SEALS == _F_SEALS and not seals & unwanted, "a segment has the seals %#x", seals)
    _check(_file_system(number) == _TMPFS_MAGIC, "a segment does not lie in tmpfs")
    found = os.fstat(number).st_size
    _check(found == size, "a segment has %d bytes, not %d", found, size)


def _file_system(number: int) -> int:
    found = ctypes.create_string_buffer(256)  # struct statfs begins with the type, a long
    return ctypes.c_ulong.from_buffer(found).value if not _libc.fstatfs(number, found) else 0


# -- the shelf ---------------------------------------------------------------------------


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
        self.segments: list[tuple[_Own, bool]] = []  # and whether it is new
        self.news: list[tuple[str, int]] = []


@attrs.frozen
class Totals:
    """
    Segments of a channel or of the process: how many, and how many bytes.

    Attributes:
        held, held_bytes: made here; they exist, whoever has them.
        retained, retained_bytes: of those, the ones that the other side has and has not let go.
        loaned, loaned_bytes: of those, the ones lent by ``empty`` and ``buffer`` and not passed yet.
        received, received_bytes: made by other sides and mapped here.
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
    reused: int = 0


def _count(segments: Iterable[_Segment]) -> tuple[int, int]:
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
        self._free: dict[int, _Own] = {}
        self._out: dict[int, _Own] = {}
        self._veiled: dict[int, _Own] = {}  # released, but the loan that it was is still alive
        self._foreign: dict[int, _Foreign] = {}
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
    def passed(self) -> list[_Own]:
        """The segments that the other side has."""
        return list(self._out.values())

    @property
    def counts(self) -> Totals:
        """The segments of this channel."""
        news = self.news
        loaned = [segment for segment in _lent() if segment.news is news]
        sizes = list(self._ledger.values())
        return Totals(
            len(sizes), sum(sizes), *_count(self.passed), *_count(loaned),
            *_count(list(self._foreign.values())), self.reused,
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
            if kind == _RELEASED and number in self._foreign:
                self._foreign[number].ours = True
            self.news.appendleft((kind, number))

    def take(self, size: int) -> _Own | None:
        """Take the free segment that fits best out of them; for any thread."""
        global _reused
        if self._veiled:
            self._unveil()
        most = WASTE * _rounded(size)
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

    def make(self, size: int) -> _Own | None:
        """Make a segment for this channel, in place of free ones if there are too many."""
        size = _rounded(size)
        while not self.has_room(size):
            if size > BYTES_OF_CHANNEL or not self.give_back():
                return None
        segment = _make(size)
        if segment is not None:
            self.bind(segment)
        return segment

    def owns(self, segment: _Own) -> bool:
        """Tell whether a segment belongs to this channel."""
        return segment.news is self.news

    def has_room(self, size: int) -> bool:
        """Tell whether one more segment may be made on this channel."""
        sizes = list(self._ledger.values())
        return len(sizes) < MOST_SEGMENTS and sum(sizes) + size <= BYTES_OF_CHANNEL

    def bind(self, segment: _Own) -> None:
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

    def take_home(self, segment: _Own) -> None:
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
        said = _decode(manifest)
        taken = _taken_off(descriptors, len(said.new)) if said.new else []
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
                _janitor.close_all(taken)
        if said.released or said.dropped:
            self._hear(said)
        return self._build(said.places, segments, inline) if said.places else list(inline)

    def _check_numbers(self, said: _Manifest) -> None:
        foreign, out = self._foreign, self._out
        for number in said.retired:
            known = foreign.get(number)
            _check(known is not None and not known.ours, "segment %d cannot be retired", number)
        for number in (*said.released, *said.dropped):
            _check(number in out, "segment %d was not passed", number)
        _check_each_once((*said.released, *said.dropped))
        _check_each_once(said.retired)
        if said.new:
            self._check_new(said.new, set(said.retired))

    def _check_new(self, new: Sequence[tuple[int, int]], gone: set[int]) -> None:
        foreign = {number: segment.size for number, segment in list(self._foreign.items())}
        for number in gone:
            foreign.pop(number, None)
        for number, size in new:
            _check(number not in foreign, "segment %d is not new", number)
            _check(size > 0, "a segment of no bytes")
            foreign[number] = size
        total = sum(foreign.values())
        _check(len(foreign) <= MOST_FROM_PEER, "%d segments, more than %d", len(foreign), MOST_FROM_PEER)
        _check(total <= BYTES_FROM_PEER, "%d bytes, more than %d", total, BYTES_FROM_PEER)

    def _check_places(self, said: _Manifest, inline: int) -> dict[int, _Foreign]:
        """Return the segments that are used and not new."""
        if said.buffers != len(said.places) + inline:
            raise ProtocolError(f"a manifest of {said.buffers} buffers came with {inline} beside segments")
        sizes = dict(said.new)
        found: dict[int, _Foreign] = {}
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

    def _accept(self, said: _Manifest, taken: list[int], segments: dict[int, _Foreign]) -> None:
        """Take the new segments, all or none; each descriptor that is a segment's is off the list."""
        for (_, size), descriptor in zip(said.new, taken, strict=True):
            _check_memfd(descriptor, size)
        taken.reverse()
        for number in said.retired:
            self._foreign.pop(number, None)
        for number, size in said.new:
            holder = next(map(select.epoll.fromfd, iter(taken.pop, None)))  # in one go, as in _new_memfd
            segments[number] = self._foreign[number] = _Foreign(holder, size, number)

    def _hear(self, said: _Manifest) -> None:
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
        segments: dict[int, _Foreign],
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
                found.append(_read(segments[number].number, offset, length))
        found += outside
        with _fork_gate:
            return found

    def _export(self, segment: _Foreign) -> memoryview | None:
        """Have objects stand on a segment; None if there is no memory to map it, and it must be read."""
        segment.ours = True
        try:
            mapping = segment.map()
        except OSError:
            self.news.append((_RELEASED, segment.id))
            return None
        exporter = segment.kind.from_address(mapping.address)
        arrival = _Arrival(exporter, _has_died)
        arrival.mapping, arrival.segment = mapping, segment
        arrival.home, arrival.news = self._foreign, self.news
        _exports[id(arrival)] = arrival
        return memoryview(exporter).cast("B")


def _since_of(segment: _Own) -> float:
    return segment.since


@attrs.frozen
class _Lot:
    """A loan that a message passes, and the parts of it that objects are to stand on."""

    loan: _Loan
    segment: _Own
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
        self.new: list[_Own] = []

    def pack(self, big: list[int]) -> None:
        """Find a place for each of the big buffers, as far as there are any."""
        if _loans:
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

    def finish(self, news: News, out: dict[int, _Own]) -> Cargo | None:
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
        told = {kind: [number for about, number in cargo.news if about == kind] for kind in _KINDS}
        cargo.manifest = _Manifest(
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
            if kind == _RELEASED:
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

    def _segment(self, size: int) -> _Own | None:
        segment = self.shelf.take(size)
        if segment is None and len(self.new) < self.room:
            segment = self.shelf.make(size)
        if segment is not None:
            self._send(segment)
        return segment

    def _send(self, segment: _Own) -> None:
        """Have a segment in the message; whatever happens now, it is not lost."""
        new = not segment.announced
        self.cargo.segments.append((segment, new))
        if new:
            self.new.append(segment)

    def _send_not(self, segment: _Own) -> None:
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
        begin = _address(self.buffers[index])
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
        for loan in list(_loans.values()):
            if loan.covers(begin, end):
                segment = loan.lent
                return _Lot(loan, segment) if segment and self._pass_loan(loan, segment) else None
        return None

    def _pass_loan(self, loan: _Loan, segment: _Own) -> bool:
        shelf = self.shelf
        if not segment.announced and len(self.new) >= self.room:
            return False
        with _fork_gate:
            if _loans.pop(id(loan), None) is None:
                return False  # another thread has passed it, or a child has it
            if segment.news is None and shelf.has_room(segment.size):
                shelf.bind(segment)
            if shelf.owns(segment) and loan.draw_veil(segment):
                self._send(segment)
                return True
            _loans[id(loan)] = loan
            return False


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
        except RuntimeError:  # no thread to be had
            self._sweep()

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
    """Have nothing of the parent's, in a forked child, but what objects stand on."""
    global _fork_gate, _sweeper
    _fork_gate = threading.RLock()
    _sweeper = _Sweeper()
    for segment in list(_open):
        segment.shut()
    for registry in (_made, _met, _kept, _shelves, _loans):
        registry.clear()
    _used.shelf = None


_sockets.on_fork(_forget_parent)


# -- for everybody -----------------------------------------------------------------------


def totals() -> Totals:
    """Count the segments of this process."""
    held, received = list(_made.values()), list(_met.values())
    passed = [segment for shelf in _all_shelves() for segment in shelf.passed]
    return Totals(
        len(held), sum(held), *_count(passed), *_count(_lent()), len(received), sum(received), _reused
    )


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
        segment = _make(_rounded(size))
    if segment is None:
        return None
    try:
        with _fork_gate:  # so that a fork finds it among the loans, or not at all
            segment.heat(size)
            mapping = segment.map()
            exporter = (ctypes.c_ubyte * segment.size).from_address(mapping.address)
            loan = _Loan(exporter, _has_died)
            loan.mapping, loan.lent, loan.passed = mapping, segment, None
            _loans[id(loan)] = _exports[id(loan)] = loan
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
