"""
A pickle that leaves a trace: a directory appears if anybody unpickles it.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

__all__ = ["Bomb", "Marker", "bomb_bytes"]


class Bomb:
    """
    Pickles as "make this directory", which needs nothing but ``os`` where it is unpickled.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def bomb_bytes(path: str | os.PathLike[str], protocol: int = pickle.HIGHEST_PROTOCOL) -> bytes:
    return pickle.dumps(Bomb(path), protocol)


class Marker:
    """
    One place to look at, and bombs that would make it appear.

    The folder may be written by every user: whoever is made to unpickle can leave the trace.
    """

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o777)
        self.path = folder / "unpickled"

    @property
    def bomb(self) -> Bomb:
        """An object that pickles into the bomb."""
        return Bomb(self.path)

    @property
    def bytes(self) -> bytes:
        """The pickled bomb, for those who write frames by hand."""
        return bomb_bytes(self.path)

    @property
    def went_off(self) -> bool:
        return self.path.exists()

    def __repr__(self) -> str:
        return f"<Marker {self.path} {'went off' if self.went_off else 'untouched'}>"
