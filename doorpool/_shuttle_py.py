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


def make_page() -> int:
    """
    Make no page.

    Raises:
        OSError: always.
    """
    raise OSError("this doorpool runs without the compiled shuttle")


def limit_cpus(_count: int) -> None:
    """Say how many CPUs this process may use: nobody here looks at a word on one."""
