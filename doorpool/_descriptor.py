"""A descriptor with an owner."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["Descriptor"]

NOBODY = -1  #: In place of the uid of who has passed a descriptor: it is nobody else's.


def _close(number: int, _: int | None) -> None:
    os.close(number)


class Descriptor:
    """
    Own the number of an open file, and close it once.

    After ``close`` or ``take`` the number is -1.  Collected open, it closes itself with a
    ``ResourceWarning``.  Closing is idempotent; one thread at a time.

    Args:
        number: the descriptor; owned by this object from now on.

    Raises:
        TypeError, ValueError: the number is no descriptor's.
    """

    __slots__ = ("_closing", "_number", "_passer")

    def __init__(self, number: int) -> None:
        self._number = -1
        self._closing: Callable[[int, int | None], None] = _close
        self._passer: int | None = NOBODY
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"a descriptor is a number, not {number!r}")
        if number < 0:
            raise ValueError(f"a descriptor is not below 0: {number}")
        self._number = number

    def __repr__(self) -> str:
        return f"<Descriptor {self._number}>" if self._number >= 0 else "<Descriptor closed>"

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if getattr(self, "_number", -1) >= 0 and not _ending():  # as in Channel
            try:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            finally:  # the warning may be an error
                self.close()

    def __enter__(self) -> Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        # Or a pickle would carry the bare number, which is somebody else's over there.
        raise TypeError(f"cannot pickle a {type(self).__qualname__}: it can only cross a door")

    @property
    def closed(self) -> bool:
        """Whether it was closed or taken."""
        return self._number < 0

    def fileno(self) -> int:
        """Return the number, -1 once closed; it stays this object's."""
        return self._number

    def take(self) -> int:
        """
        Return the number and give up owning it: it is the caller's to close.

        Raises:
            ValueError: it was closed or taken before.
        """
        number, self._number = self._number, -1
        if number < 0:
            raise ValueError("this descriptor is closed")
        return number

    def _put_back(self, number: int) -> None:
        """Own the number again that ``take`` has returned."""
        self._number = number

    def dup(self) -> Descriptor:
        """
        Return a second descriptor of the same open file, close-on-exec.

        Raises:
            ValueError: it was closed or taken before.
            OSError: ``EMFILE``.
        """
        if self._number < 0:
            raise ValueError("this descriptor is closed")
        return Descriptor(os.dup(self._number))._passed_by(self._passer, self._closing)

    def _passed_by(self, uid: int | None, closing: Callable[[int, int | None], None]) -> Descriptor:
        """Have it closed by this function, with the number and the uid of who has passed it; return it."""
        self._passer, self._closing = uid, closing
        return self

    def close(self) -> None:
        """
        Close it; idempotent.

        Of one that another user has passed a thread of the library's does it, soon, if it might block.
        """
        number, self._number = self._number, -1
        if number >= 0:
            self._closing(number, self._passer)
