"""
A server and proxies for tests of the public face.

Most of them hold both sides of a door in one process: the door, its channels and its threads
are the same as between two.  What depends on there being two processes starts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doorpool import Endpoint, Proxy, Server


@pytest.fixture(scope="session", autouse=True)
def default_server() -> None:
    """
    Start the server of endpoints that are made without one: it lasts as long as the process.
    """
    with Endpoint(str.upper) as endpoint:
        endpoint.open().close()


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    """
    What a test has opened, closed at its end, the last first.
    """
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(door_dir: Path, closing: contextlib.ExitStack) -> Callable[..., Server]:
    """
    Start a server in this process, with one endpoint at ``a.door`` (or ``name``) in ``door_dir``.
    """

    def start(
        target: Any, name: str = "a.door", *, server: dict[str, Any] | None = None, **options: Any
    ) -> Server:
        it = Server(**(server or {}))
        closing.callback(it.close)
        it.attach(target, door_dir / name, **options)
        return it.start()

    return start


@pytest.fixture
def connect(door_dir: Path, closing: contextlib.ExitStack) -> Callable[..., Proxy]:
    """
    Open a proxy, of ``a.door`` in ``door_dir`` if nothing else is said.
    """

    def opened(door: Any = None, **options: Any) -> Proxy:
        return closing.enter_context(Proxy(door_dir / "a.door" if door is None else door, **options))

    return opened
