"""
The twin of ``_shuttle`` in Python, for where that could not be built: it makes no page.

Python has no compare-and-swap on shared memory, so there is nothing here that could look at a
word together with another process.  All calls go over the socket, and all else is the same.  A
side that runs this twin asks for no page and offers none, so it talks with one that runs the
other as with its like.
"""

from __future__ import annotations

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


def make_page() -> int:
    """
    Make no page.

    Raises:
        OSError: always.
    """
    raise OSError("this doorpool runs without the compiled shuttle")


def limit_cpus(_count: int) -> None:
    """Say how many CPUs this process may use: nobody here looks at a word on one."""
