"""
Segments: big buffers cross a channel in shared memory, copied once on the way in and never out.

A buffer that pickle lends us (an array's memory) would be copied into the socket and out of it.
Here its sender copies it into a *segment*, a sealed memfd that both sides have mapped, and sends a
line that says where it is (``_manifest``).  The receiver's object is built on the segment itself, writable.

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
(``Export``).  (``memoryview.release`` succeeds while a slice lives, and ``mmap.close`` as a probe
unmaps.)  That may happen in the garbage collector, in any thread, under any lock.  So a death only
appends to a ``deque``; and nothing here takes a lock that a finalizer could want.

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

 1. thread A forks: it takes ``fork_gate``, and goes through all exports;
 2. thread B, in ``unload``, has just made another, which is still shared and not inherited;
 3. B must pass the gate before it gives the objects to anybody, and by then the child is there, where
    nobody knows of them.

After a ``fork`` made in C, past Python's hooks, such objects are not there in the child.

Roads not taken: one big segment with an allocator in it (a kept array keeps all of it, and holes
cannot be given back); names in /dev/shm (they outlive a crash, and anybody can open them); large
pages (off for shared memory by default; 77 ms instead of 89 for the 100 MB where they were asked for).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import resource
import select
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from doorpool import _memory, _sockets
from doorpool._errors import ProtocolError
from doorpool._manifest import check
from doorpool._memory import SEALS, Mapping

_F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h
_TMPFS_MAGIC = 0x0102_1994  # linux/magic.h
_PAGE = mmap.PAGESIZE

#: News for the other side, and the number of the segment they are about.
KINDS = RETIRED, RELEASED, DROPPED = "retired", "released", "dropped"
News = deque[tuple[str, int]]

serials = itertools.count(1)

#: The size of each segment that was made here and exists, by serial number; and of those of others; and of
#: these, the ones that are mapped.
made: dict[int, int] = {}
met: dict[int, int] = {}
mapped: dict[int, int] = {}

#: All segments whose descriptor may be open: a forked child must not keep it.
_open: weakref.WeakSet[Segment] = weakref.WeakSet()

#: Those of others of which the descriptor is kept.
_kept: dict[int, None] = {}


def rounded(size: int) -> int:
    """
    Round a size up to one of four to the octave, so that a segment fits the next that is much like it.

    What is not used of it has no pages, and costs addresses only.
    """
    step = max(_PAGE, 1 << max(0, (size - 1).bit_length() - 3))
    return -(-size // step) * step


def most_descriptors() -> int:
    """How many descriptors of the process may be those of segments that were made here."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4_096 if limit == resource.RLIM_INFINITY else max(4, min(4_096, limit // 4))


# -- segments ----------------------------------------------------------------------------


class Segment:
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
        self.mapping: Mapping | None = None
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

    def map(self) -> Mapping:
        """
        Map it, unless it is.

        Raises:
            OSError: no memory.
        """
        if self.mapping is None:
            self.mapping = Mapping.of(self.number, self.size)
        return self.mapping


class Own(Segment):
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
        self.ledgers: tuple[dict[int, int], ...] = (made,)
        self.news: News | None = None
        self.announced = self.spoiled = False
        self.veil: weakref.ref[Any] | None = None
        self.since = 0.0
        self.wet = self.warm = 0

    def end(self) -> None:
        # First the news: who makes another in its place tells of this one in the same message, or before.
        announced, self.announced = self.announced, False  # once at the most
        if announced and self.news is not None:
            self.news.append((RETIRED, self.id))
        for ledger in self.ledgers:
            ledger.pop(self.serial, None)
        super().end()

    @property
    def is_veiled(self) -> bool:
        """Whether objects here may still show its content."""
        return self.veil is not None and self.veil() is not None

    def bind(self, id: int, news: News, ledger: dict[int, int]) -> None:
        """Make it the segment of one shelf."""
        self.id, self.news = id, news
        self.ledgers = (made, ledger)

    def put(self, offset: int, view: memoryview) -> None:
        """
        Copy a view into it.

        Raises:
            OSError: no memory.
        """
        end = offset + len(view)
        if end > self.wet:  # pages that are not there yet: writing makes them faster than faulting
            _memory.write(self.number, offset, view)
            self.wet = end
        else:
            _memory.copy_view(self.map().address + offset, view)

    def heat(self, end: int) -> None:
        """
        Have the pages that are there in our page tables, in one go.

        100 MB take 6 ms, and 28 page by page as they are written.
        """
        end = min(end, self.wet)
        if end > self.warm:
            begin = self.warm // _PAGE * _PAGE
            _memory.populate(self.map().address + begin, end - begin)
            self.warm = end

    def punch(self) -> None:
        """Free its pages, in all processes that have it, at once (14 ms for 100 MB)."""
        if self.wet or self.mapping is not None:
            with contextlib.suppress(OSError):  # no room to map it: so its pages go with it
                _memory.remove(self.map().address, self.size)
                self.wet = self.warm = 0


class Foreign(Segment):
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
        self.serial = next(serials)
        met[self.serial] = size
        _kept[self.serial] = None

    def end(self) -> None:
        for registry in (met, mapped):
            registry.pop(self.serial, None)
        super().end()

    def shut(self) -> None:
        _kept.pop(self.serial, None)
        super().shut()

    @property
    def is_idle(self) -> bool:
        """Whether it is mapped, need not be, and could be again; true for long only under ``fork_gate``."""
        return self.mapping is not None and not self.ours and self.number >= 0

    def unmap(self) -> None:
        """Give up the mapping, on which nothing stands; under ``fork_gate``."""
        self.mapping = None
        mapped.pop(self.serial, None)

    def map(self) -> Mapping:
        mapping = super().map()
        mapped[self.serial] = self.size
        if len(_kept) > most_descriptors():
            self.shut()  # it is of use before a fork only, and without it there is a copy
        return mapping


def check_memfd(number: int, size: int) -> None:
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
    check(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR, "a segment cannot be written")
    check(seals & SEALS == SEALS and not seals & unwanted, "a segment has the seals %#x", seals)
    check(_memory.file_system(number) == _TMPFS_MAGIC, "a segment does not lie in tmpfs")
    found = os.fstat(number).st_size
    check(found == size, "a segment has %d bytes, not %d", found, size)


# -- what objects stand on ---------------------------------------------------------------

#: All that objects may stand on in this process, by identity.
exports: dict[int, Export] = {}

#: Those of them that were lent by ``empty`` and ``buffer`` and have not been passed.
loans: dict[int, Loan] = {}

#: Held from before a fork until after it, and while what a fork must find whole is not.  It is
#: re-entrant, since a finalizer may run meanwhile, and fork.
fork_gate = threading.RLock()


class Export(weakref.ref[Any]):
    """
    Memory on which objects stand: a weak reference to the ctypes array laid over it.

    Attributes:
        mapping: the memory, which stays as long as this reference is in ``exports``.
    """

    # No ``__new__`` and no ``__init__``: together they would take as long as all else in ``unload``.
    __slots__ = ("mapping",)

    mapping: Mapping

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


def has_died(
    export: Export, _all: dict[int, Export] = exports, _ending: Callable[[], bool] = sys.is_finalizing
) -> None:
    if not _ending() and _all.pop(id(export), None) is not None:
        export.ended()


class Arrival(Export):
    """
    What has come from the other side.

    Attributes:
        segment: in which it has; None once it is parted from it.
        home: where its shelf has that.
        news: where to tell of its end.
    """

    __slots__ = ("home", "news", "segment")

    segment: Foreign | None
    home: dict[int, Foreign]
    news: News

    def ended(self) -> None:
        if self.segment is not None:
            self.news.append((RELEASED, self.segment.id))

    def part(self) -> None:
        segment = self.segment
        if segment is not None:
            self.mapping.part(segment.number)
            self.segment = None
            self.home.pop(segment.id, None)
            self.news.append((DROPPED, segment.id))


class Loan(Export):
    """
    What was lent here, before and after it is passed.

    Attributes:
        lent: the segment, as long as it is not passed, or parted from it.
        passed: the same, as long as there is a need for it.
    """

    __slots__ = ("lent", "passed")

    lent: Own | None
    passed: weakref.ref[Own] | None

    def ended(self) -> None:
        segment = self.lent
        if loans.pop(id(self), None) is not None and segment is not None and segment.announced:
            segment.punch()  # the other side has it mapped, and may not hear of this for long

    def part(self) -> None:
        passed = self.passed() if self.passed is not None else None
        if passed is not None:
            passed.spoiled = True
        if self.lent is not None:
            self.mapping.part(self.lent.number)
            self.lent.mapping = None
            self.lent = None
            loans.pop(id(self), None)
        elif not self.mapping.inherited:
            self.mapping.let_inherit()

    def covers(self, begin: int, end: int) -> bool:
        """Tell whether a range of addresses lies in it."""
        return self.mapping.address <= begin and end <= self.mapping.address + self.mapping.size

    def draw_veil(self, segment: Own) -> bool:
        """
        Keep a private view of the segment, and leave it to the shelf; under ``fork_gate``.

        Returns:
            False if there is no room for it; all is as it was.
        """
        old = self.mapping
        try:
            moved = Mapping.moved(old)
            shared = moved or Mapping.of(segment.number, old.size)
            _memory.map_over(segment.number, old)
        except OSError:
            return False
        if not moved:
            segment.warm = 0
        segment.mapping, segment.veil = shared, weakref.ref(self())
        self.lent, self.passed = None, weakref.ref(segment)
        return True


def lent() -> list[Own]:
    return [loan.lent for loan in list(loans.values()) if loan.lent is not None]


def _before_fork() -> None:
    fork_gate.acquire()
    for export in list(exports.values()):
        exporter = export()  # which cannot die now
        if exporter is not None:
            with contextlib.suppress(OSError):  # no memory: the child goes without
                export.part()


def _after_fork() -> None:
    fork_gate.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)


def _forget_parent() -> None:
    """Have nothing of the parent's, in a forked child, but what objects stand on."""
    global fork_gate
    fork_gate = threading.RLock()
    for segment in list(_open):
        segment.shut()
    for registry in (made, met, mapped, _kept, loans):
        registry.clear()


_sockets.on_fork(_forget_parent)
