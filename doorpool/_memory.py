"""
Memory that processes share, below Python: memfds, mappings of them, and copying into both.

Errors of the kernel are raised.  libc is called through ``ctypes``, for what Python's ``mmap`` cannot do:
move page tables, map over what is mapped, and copy with or without the GIL.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import select
import sys
from collections.abc import Callable

from doorpool import _sockets

#: Bytes copied at a time, without the GIL: between two steps Ctrl-C gets through (30 ms into new
#: memory, 4 into warm).  Smaller ones would have to take the GIL back more often, 5 ms each time if
#: another thread computes.
STEP = 64 << 20

#: Up to here a copy keeps the GIL: to take it back may cost more than the 12 µs that it takes.
QUICK = 256 << 10

#: That a memfd may neither shrink nor grow, nor be given other seals.
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MFD_NOEXEC_SEAL = 8  # linux/memfd.h, since 6.3
MAP_FIXED = 0x10  # asm-generic/mman-common.h
_MREMAP_MAYMOVE, _MREMAP_DONTUNMAP = 1, 4  # linux/mman.h
_MADV_POPULATE_READ = 22  # asm-generic/mman-common.h, since 5.14

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


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


def map_over(number: int, mapping: Mapping) -> None:
    """
    Map a memfd, privately, in place of what is mapped.

    Raises:
        OSError: no memory; it is as it was.
    """
    flags = mmap.MAP_PRIVATE | MAP_FIXED
    if _libc.mmap(mapping.address, mapping.size, _READ_WRITE, flags, number, 0) == _MAP_FAILED:
        raise _fail("mmap")
    _libc.madvise(mapping.address, mapping.size, mmap.MADV_DONTFORK)


def address_of(view: memoryview) -> int:
    held = _Buffer()
    _get_buffer(view, held, 0)
    address = held.address
    _release_buffer(held)
    return int(address)


def copy_view(target: int, view: memoryview) -> None:
    """Copy a view, which may be read-only, to an address."""
    held = _Buffer()
    _get_buffer(view, held, 0)  # or another thread might release it while we copy
    try:
        copy_bytes(target, held.address, held.length)
    finally:
        _release_buffer(held)


def copy_bytes(target: int, source: int, size: int) -> None:
    if size <= QUICK:
        _copy_quick(target, source, size)
        return
    for begin in range(0, size, STEP):
        _copy_slow(target + begin, source + begin, min(STEP, size - begin))


def write(number: int, offset: int, view: memoryview) -> None:
    """
    Write a view into a file, all of it.

    Raises:
        OSError: there is no memory for it.
    """
    while view:
        done = os.pwrite(number, view[:STEP], offset)
        offset += done
        view = view[done:]


def read(number: int, offset: int, size: int) -> bytearray:
    """Read from a file, of which so much is there."""
    found = bytearray(size)
    with memoryview(found) as view:
        done = 0
        while done < size:
            done += os.preadv(number, [view[done : done + STEP]], offset + done)
    return found


def populate(address: int, size: int) -> None:
    """Have the pages that a mapping's file has in our page tables, in one go; else by faults."""
    _libc.madvise(address, size, _MADV_POPULATE_READ)


def remove(address: int, size: int) -> None:
    """Free the pages of a mapping's file, in all processes that have it."""
    _libc.madvise(address, size, mmap.MADV_REMOVE)


def file_system(number: int) -> int:
    found = ctypes.create_string_buffer(256)  # struct statfs begins with the type, a long
    return ctypes.c_ulong.from_buffer(found).value if not _libc.fstatfs(number, found) else 0


# -- mappings ----------------------------------------------------------------------------


class Mapping:
    """
    A range of addresses, unmapped when nobody refers to it any more.

    Attributes:
        address: 0: none yet.
        inherited: the children of this process have it too.
    """

    __slots__ = ("address", "generation", "inherited", "size")

    def __init__(self, size: int) -> None:
        self.address = 0
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
        if getattr(self, "address", 0) and not _ending() and (self.inherited or self.generation == _here()):
            _munmap(self.address, self.size)

    @classmethod
    def of(cls, number: int, size: int, kind: int = mmap.MAP_SHARED) -> Mapping:
        """
        Map a descriptor (-1: no file), readable and writable, not to be inherited.

        Raises:
            OSError: no memory.
        """
        mapping = cls(size)
        if not mapping._take(_libc.mmap, None, size, _READ_WRITE, kind, number, 0):
            raise _fail("mmap")
        _libc.madvise(mapping.address, size, mmap.MADV_DONTFORK)
        return mapping

    @classmethod
    def moved(cls, old: Mapping) -> Mapping | None:
        """Move page tables to a new address, leaving the old one mapped; None where the kernel cannot."""
        mapping = cls(old.size)
        flags = _MREMAP_MAYMOVE | _MREMAP_DONTUNMAP
        # glibc looks at the fifth argument although no flag asks for it.
        return mapping if mapping._take(_libc.mremap, old.address, old.size, old.size, flags, None) else None

    def _take(self, call: Callable[..., int], *arguments: int | None) -> bool:
        """Have the range that a call returns, if it does."""
        # In one go, between whose parts no signal handler can run, or the range might be lost.
        next(map(setattr, (self,), ("address",), map(call, *zip(arguments, strict=True))))
        if self.address == _MAP_FAILED:
            self.address = 0
        return self.address != 0

    def part(self, number: int) -> None:
        """
        Make it private to this process and to its children to come, with the content that it has.

        Args:
            number: the memfd, or -1 if it was closed: then all is copied.

        Raises:
            OSError: no memory; it is as it was.
        """
        if number >= 0:
            map_over(number, self)
        else:
            self._replace_by_copy()
        self.let_inherit()

    def _replace_by_copy(self) -> None:
        copy = Mapping.of(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        copy_bytes(copy.address, self.address, self.size)
        flags = _MREMAP_MAYMOVE | 2  # MREMAP_FIXED: over the old one, in one step
        if _libc.mremap(copy.address, self.size, self.size, flags, self.address) == _MAP_FAILED:
            raise _fail("mremap")
        copy.address = 0

    def let_inherit(self) -> None:
        """Let children have it; it must be private."""
        _libc.madvise(self.address, self.size, mmap.MADV_DOFORK)
        self.inherited = True


# -- memfds ------------------------------------------------------------------------------

_memfd_flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_NOEXEC_SEAL


def memfd(size: int) -> select.epoll:
    holder = _new_memfd()
    os.fchmod(holder.fileno(), 0o600)  # a new one anybody may open by /proc/PID/fd who may look there
    os.ftruncate(holder.fileno(), size)
    fcntl.fcntl(holder.fileno(), fcntl.F_ADD_SEALS, SEALS)
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
