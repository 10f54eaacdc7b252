"""
What the tests of the raw layer share.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.rawdoor import Canary, Serving

from doorpool._keeper import keeper


@pytest.fixture(scope="session", autouse=True)
def the_keeper() -> None:
    """Start the keeper, which lasts as long as the process, before any baseline is taken."""
    keeper()


@pytest.fixture
def serve(door_dir: Path) -> Iterator[Callable[..., Serving]]:
    """
    Serve a door from threads of this process (see support.rawdoor.Serving) until the end of the test.
    """
    servings: list[Serving] = []

    def start(*args: Any, **options: Any) -> Serving:
        servings.append(Serving(*args, **options))
        return servings[-1]

    yield start
    for serving in servings:
        serving.close()
    gc.collect()


@pytest.fixture
def canary(serve: Callable[..., Serving]) -> Iterator[tuple[Serving, Canary]]:
    """
    A serving, and a client of it that calls all the time and must lose no call.
    """
    serving = serve(threads=3)
    with Canary(serving) as bird:
        yield serving, bird
        bird.still_sings()
