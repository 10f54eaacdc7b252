"""
What the fuzzers share: how often, and what is noticed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import support.audit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


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


@pytest.fixture(scope="session")
def audited() -> Callable[[], Any]:
    """
    Make sure that a block imports nothing, runs nothing and opens nothing: ``with audited(): ...``.
    """
    return support.audit.audited
