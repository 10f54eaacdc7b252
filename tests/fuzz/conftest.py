"""
What the fuzzers share: how often, and what is noticed meanwhile.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_watching = threading.local()

#: What code that only reads must not do; ``exec`` is also what an unpickler or an import ends in.
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


@pytest.fixture
def fuzz(many: Callable[[int, int], int]) -> Callable[..., None]:
    """
    Run a check with arguments of some strategies: ``fuzz(check, *strategies, short=, long=)``.

    The short form is the same each time; the long one differs from run to run, and prints how to
    repeat what has failed.
    """

    def run(check: Callable[..., None], *strategies: st.SearchStrategy[Any], short: int, long: int) -> None:
        count = many(short, long)
        chosen = settings(
            max_examples=count, derandomize=count == short, print_blob=True,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        chosen(given(*strategies)(check))()

    return run


def _on_audit(event: str, args: tuple[Any, ...]) -> None:
    seen = getattr(_watching, "seen", None)
    if seen is not None and event.startswith(FORBIDDEN):
        seen.append((event, args))


@pytest.fixture(scope="session")
def audited() -> Callable[[], Any]:
    """
    Make sure that a block imports nothing, runs nothing and opens nothing: ``with audited(): ...``.
    """
    sys.addaudithook(_on_audit)  # for good: there is no way to take one away

    @contextmanager
    def watch() -> Iterator[None]:
        seen = _watching.seen = []
        try:
            yield
        finally:
            del _watching.seen
        assert not seen, seen

    return watch
