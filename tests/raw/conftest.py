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

from doorpool import _handle, _impl, _opening, _shuttle_py
from doorpool._keeper import keeper
from doorpool.door import Codec, Door


@pytest.fixture(scope="session", autouse=True)
def the_keeper() -> None:
    """Start the keeper, which lasts as long as the process, before any baseline is taken."""
    keeper()


#: Who has the compiled shuttle: "client-server".  In "no page" the door speaks no pickle, so that there
#: is none whoever could have one; in the others it does, for only there is there one.
TWINS = ["no page", "c-c", "c-py", "py-c"]


#: Tests that look at the codec itself, or call as another user, whom no pickle door lets in.
ABOUT_THE_CODEC = {
    "test_no_room_for_a_channel_at_the_server",
    "test_everything_is_said",
    "test_passed_descriptor_is_a_door",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "twins" in metafunc.fixturenames:
        alone = metafunc.function.__name__ in ABOUT_THE_CODEC
        metafunc.parametrize("twins", TWINS[:1] if alone else TWINS, indirect=True)


@pytest.fixture
def twins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """
    Run a test with the shuttle in C, with its twin in Python, and with one at each end.
    """
    client, _, server = request.param.partition("-")
    if request.param == "no page":
        return str(request.param)
    if "c" in (client, server) and _impl.NAME != "c":
        pytest.skip("no compiled shuttle here")
    monkeypatch.setitem(Door.__init__.__kwdefaults__, "codec", Codec.PICKLE)
    if client == "py":
        monkeypatch.setattr(_handle, "shuttle", _shuttle_py)
    if server == "py":
        monkeypatch.setattr(_opening, "shuttle", _shuttle_py)
    return str(request.param)


@pytest.fixture
def serve(door_dir: Path, twins: str) -> Iterator[Callable[..., Serving]]:
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
