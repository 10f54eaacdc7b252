"""
What code that only reads must not do, and how it is noticed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: Imports, code, files, processes; ``exec`` is also what an unpickler or an import ends in.
FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "open",
    "pickle.",
    "marshal.",
    "os.",
    "subprocess.",
    "ctypes.dlopen",
)

_watching = threading.local()
_hooked = False


def _on_audit(event: str, args: tuple[Any, ...]) -> None:
    seen = getattr(_watching, "seen", None)
    if seen is not None and event.startswith(FORBIDDEN):
        seen.append((event, args))


@contextmanager
def audited() -> Iterator[None]:
    """
    Make sure that a block imports nothing, runs nothing and opens nothing.
    """
    global _hooked
    if not _hooked:
        sys.addaudithook(_on_audit)  # for good: there is no way to take one away
        _hooked = True
    seen = _watching.seen = []
    try:
        yield
    finally:
        del _watching.seen
    assert not seen, seen
