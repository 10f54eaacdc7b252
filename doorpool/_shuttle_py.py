"""
The twin of ``_shuttle`` in Python, for where that could not be built: it makes no page.

Python has no compare-and-swap on shared memory, so there is nothing here that could look at a
word together with another process.  All calls go over the socket, and all else is the same.  A
side that runs this twin asks for no page and offers none, so it talks with one that runs the
other as with its like.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NoReturn

NOTHING, GOT, BY_SOCKET, SHUT = range(4)
TOO_LARGE = -1
ROOM = 0

#: How long a page is: there is none.
PAGE_BYTES = 0


class PageError(Exception):
    """What stands in a shared page cannot be."""


class Page:
    """One end of the page of a channel: not here."""

    def __new__(cls, *_: Any) -> NoReturn:
        """
        Refuse to be made.

        Raises:
            PageError: always.
        """
        raise PageError("the shared page is no page: this doorpool runs without the compiled shuttle")


def pack_call(_args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    """Leave the arguments of a call to pickle: what is quicker in C is not here."""


def unpack_call(_data: bytes | bytearray | memoryview) -> None:
    """Leave them to pickle, which reads what ``_atoms.c`` writes."""


def pack_value(_value: Any) -> None:
    """Leave a result to pickle."""


def unpack_value(_data: bytes | bytearray | memoryview) -> Any:
    """Leave it to pickle; that is what this answer means."""
    return NotImplemented


def unpacked() -> int:
    """Return how many pickles have been read here: none."""
    return 0


def take_items(
    items: list[Any], iterator: Iterator[Any], count: int, stride: int, room: int, until: float
) -> tuple[int, int]:
    """
    Append up to ``count`` items of an iterator to a list; return how many, and what is left of the room.

    After every ``stride`` items it looks whether to go on: not when ``until`` is over, by the monotonic
    clock, when their bytes have used up the room, or at an item of which only the caller can say how
    long it is.

    Raises:
        StopIteration: with what a generator returns; the items before it are in the list.
        Exception: what the iterator raises; likewise.
    """
    append, step, taken = items.append, iterator.__next__, 0
    while taken < count:
        item = step()
        append(item)
        taken += 1
        if taken % stride:
            continue
        kind = type(item)
        if kind in _STRINGS:
            room -= len(item) * stride
        elif kind not in _LIGHT:
            break
        if room < 0 or time.monotonic() > until:
            break
    return taken, room


_STRINGS = str, bytes
_LIGHT = int, float, bool, type(None)


def pack_items(_items: list[Any]) -> None:
    """Leave a batch of items to pickle."""


#: As in ``_keys.c``, where all of this is told.
_LARGE, _CHUNK, _MOST_DEPTH, _MOST_COPIES = 16, 64, 2**14, 8
_STEPS_COMPARED = 8


class _Frame:
    """A container that is being read."""

    __slots__ = ("chunks", "key", "keys", "left", "map")

    def __init__(self, parts: int, is_map: bool, write: bool) -> None:
        self.left = parts
        self.map = is_map
        self.key: int | None = None  # where the part began that is being read, if it is a key
        self.keys: list[bytes] = []
        self.chunks: list[bytes] | None = [] if write else None

    def flush(self) -> None:
        if self.keys and self.chunks is not None:
            self.chunks.append(b"\xdc\0" + bytes([len(self.keys)]) + b"".join(self.keys))
            self.keys = []


#: From 0xc0 on: is its hash one that nobody can choose, the bytes, and how many of these count more.
_HEADS = (
    (True, 1, 0), (True, 0, 0), (True, 1, 0), (True, 1, 0), (True, 2, 1), (True, 3, 2), (True, 5, 4),
    (False, 3, 1), (False, 4, 2), (False, 6, 4), (False, 5, 0), (False, 9, 0),
    *[(False, 1 + 2**n, 0) for n in (0, 1, 2, 3)] * 2, *[(False, 2 + 2**n, 0) for n in (0, 1, 2, 3, 4)],
    (True, 2, 1), (True, 3, 2), (True, 5, 4), (False, 3, 2), (False, 5, 4), (False, 3, 2), (False, 5, 4),
)  # fmt: skip


def _head_of(data: bytes, at: int) -> tuple[bool, int, int, bool]:
    """
    Return whether a hash is safe, where the head of a value ends, its parts (-1: it has none), and whether
    they are those of a map.  If there is no value, it ends behind the data.
    """
    first = data[at] if at < len(data) else 0xC1
    if 0x80 <= first < 0xA0:
        return False, at + 1, (first & 15) * (1 + (first < 0x90)), first < 0x90
    if 0xA0 <= first < 0xC0:
        return True, at + 1 + (first & 31), -1, False
    if not 0xC0 <= first < 0xE0:
        return False, at + 1, -1, False
    safe, size, counting = _HEADS[first - 0xC0]
    count = int.from_bytes(data[at + 1 : at + 1 + counting], "big")
    if first >= 0xDC:
        return safe, at + size, count * (1 + (first >= 0xDE)), first >= 0xDE
    return safe, at + size + count if size else len(data) + 1, -1, False


class _Finder:
    """What goes through a message, of which only the beginning may be one."""

    def __init__(self, data: bytes, arrays: bool, texts: bool, write: bool) -> None:
        self._data, self._arrays, self._texts, self._write = data, arrays, texts, write
        self._at = 0
        self._copies = _MOST_COPIES * len(data)
        self._frames: list[_Frame] = []
        self.found = False
        self.list: list[tuple[bool, list[bytes]]] = []

    def go_through(self) -> None:
        while self._read_one() and (self._write or not self.found):
            pass
        while self._frames:
            self._pop()

    def _read_one(self) -> bool:
        frame = self._frames[-1] if self._frames else None
        if frame is not None and frame.left == 0:
            self._pop()
            self._end_part(True)
            return bool(self._frames)
        safe, end, parts, is_map = _head_of(self._data, self._at)
        if end > len(self._data):
            return False
        if frame is not None:
            looked_at = frame.chunks is not None and (not frame.map or frame.left % 2 == 0)
            frame.key = self._at if looked_at else None
            frame.left -= 1
            self.found = self.found or (looked_at and frame.map and not safe)
        self._at = end
        if parts >= 0:
            self._push(parts, is_map)
            return True
        self._end_part(False)
        return frame is not None

    def _push(self, parts: int, is_map: bool) -> None:
        if len(self._frames) >= _MOST_DEPTH:
            raise RecursionError("it is nested too deeply")
        large = parts >= 2 * _LARGE if is_map else self._arrays and parts >= _LARGE
        self.found = self.found or (large and (self._texts or not is_map))
        self._frames.append(_Frame(parts, is_map, large))

    def _pop(self) -> None:
        frame = self._frames.pop()
        frame.flush()
        if frame.chunks is not None and self._write:
            self.list.append((frame.map, frame.chunks))

    def _end_part(self, container: bool) -> None:
        frame = self._frames[-1] if self._frames else None
        if frame is None or frame.key is None or not self._write:
            return
        key = self._data[frame.key : self._at]
        self._copies -= len(key) if container else 0
        if self._copies < 0:
            raise ValueError("long lists are nested too deeply in it")
        frame.keys.append(b"\x81" + key + b"\xce" + len(key).to_bytes(4, "big"))
        if len(frame.keys) == _CHUNK:
            frame.flush()


def keys_of(
    data: bytes | bytearray | memoryview, arrays: bool, texts: bool
) -> list[tuple[bool, list[bytes]]]:  # fmt: skip
    """
    Find the large containers in a message: a list of ``(is_map, chunks)``; see ``_keys.c``.

    Raises:
        ValueError: long lists are nested too deeply in it.
        RecursionError: it is nested too deeply.
    """
    data = bytes(data)
    if not any(head in data for head in (b"\xde", b"\xdf", *((b"\xdc", b"\xdd") if arrays else ()))):
        return []
    for write in (False, True):
        finder = _Finder(data, arrays, texts, write)
        finder.go_through()
        if not finder.found:
            break
    return finder.list


class _Table:
    """A dict or a set, of which only the places count."""

    def __init__(self, is_map: bool, steps: int) -> None:
        self._is_map = is_map
        self._entries: list[tuple[int, Any, int]] = []
        self.steps = steps  # that are left
        self._resize(0)

    def _resize(self, wanted: int) -> None:
        size = 8
        while size < wanted + (not self._is_map):
            size *= 2
        self._places = [-1] * size
        for place, (number, *_) in enumerate(self._entries):
            self._places[self._seek(number, None)] = place

    def _seek(self, number: int, key: Any) -> int:
        """Return the place for a key, or the next free one if there is none; -1 if it is there, or no
        steps are left."""
        mask = len(self._places) - 1
        rest, i = number % 2**64, number & mask
        while self.steps > 0:
            self.steps -= 1
            for place in range(i, i + (10 if not self._is_map and i + 9 <= mask else 1)):
                if self._places[place] < 0:
                    return place
                if key is not None and self._is_equal(self._entries[self._places[place]], number, key):
                    return -1
            rest >>= 5
            i = (i * 5 + rest + 1) & mask
        return -1

    def _is_equal(self, entry: tuple[int, Any, int], number: int, key: tuple[Any, int]) -> bool:
        if entry[0] != number:
            return False
        self.steps -= _STEPS_COMPARED + min(entry[2], key[1])
        return bool(entry[1] is key[0] or entry[1] == key[0])

    def add(self, key: Any, size: int) -> None:
        number, count = hash(key), len(self._entries)
        place = self._seek(number, (key, size))
        if place < 0:
            return
        if self._is_map and count >= len(self._places) * 2 // 3:
            self._resize(3 * count)
            place = self._seek(number, None)
        self._entries.append((number, key, size))
        self._places[place] = count
        if not self._is_map and (count + 1) * 5 >= (len(self._places) - 1) * 3:
            self._resize((count + 1) * (2 if count + 1 > 50_000 else 4))


def steps_of(keys: tuple[Any, ...], sizes: tuple[int, ...], is_map: bool, most: int) -> int:
    """
    Count the steps that a dict (else a set) of keys would take; more than ``most`` if these do not do.

    ``sizes`` has the bytes of each.

    It looks no further than to one that cannot be hashed or compared: no container is made of that.
    """
    if len(sizes) != len(keys):
        raise ValueError(f"{len(keys)} keys, and {len(sizes)} sizes")
    table = _Table(is_map, most + 1)
    try:
        for key, size in zip(keys, sizes, strict=True):
            table.add(key, size)
            if table.steps <= 0:
                break
    except MemoryError:
        raise
    except Exception:
        pass
    return most + 1 - table.steps


def make_page() -> int:
    """
    Make no page.

    Raises:
        OSError: always.
    """
    raise OSError("this doorpool runs without the compiled shuttle")


def limit_cpus(_count: int) -> None:
    """Say how many CPUs this process may use: nobody here looks at a word on one."""
