"""
What the tests of whom to believe share: a cast of users, a stage, and three counters.

Victims are run both as root and as an ordinary user; strangers are of other uids.  A door is
reached in each of the three ways in which one can be had: by path, inherited, passed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import become, enter_user_namespace
from support.actors import Actor, Fd, counts, keep
from support.marker import Marker
from support.strangers import drop_capabilities
from support.victims import call, open_client, open_descriptor, serve

V, M = 4201, 6602  # the victim's uid, and the stranger's


@pytest.fixture
def actor() -> Iterator[Callable[..., Actor]]:
    """Start actors (see support.actors), as root or as another user, that end with the test."""
    actors: list[Actor] = []

    def start(uid: int | None = None, **options: Any) -> Actor:
        if os.geteuid() != 0 and uid != os.geteuid():
            pytest.skip("root only: becomes other users")
        actors.append(Actor(None if uid == os.geteuid() else uid, **options))
        return actors[-1]

    yield start
    for one in reversed(actors):
        one.close()


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory as /tmp: everybody may make names in it."""
    folder = Path(tempfile.mkdtemp(prefix="dp-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def path(place: Path) -> str:
    return str(place / "a.door")


@pytest.fixture(params=["raw", "objects"])
def layer(request: pytest.FixtureRequest) -> str:
    """The two layers of the library at which a victim may stand."""
    return str(request.param)


@pytest.fixture(params=["path", "inherited", "passed"])
def way(request: pytest.FixtureRequest) -> str:
    """The three ways to come by a door."""
    return str(request.param)


@pytest.fixture(params=[0, V], ids=["root", "user"])
def victim(request: pytest.FixtureRequest) -> int:
    """The uid of the victim."""
    return int(request.param)


@pytest.fixture
def come_by(actor: Callable[..., Actor], path: str) -> Callable[..., Any]:
    """
    Let a new actor of a uid come by a door: by path, inherited or passed.

    Returns the actor and the door, as a path or as a number that is valid there.
    """

    def come(
        way: str, uid: int, server: Actor, obtain: Callable[[], Fd] = open_descriptor, **options: Any
    ) -> tuple[Actor, str | int]:
        if way == "path":
            return actor(uid, **options), path
        number = server(obtain)
        try:
            if way == "inherited":
                return actor(uid, **options), number
            one = actor(uid, **options)
        finally:
            os.close(number)
        number = server(obtain)
        try:
            return one, one(keep, Fd(number))
        finally:
            os.close(number)

    return come


@pytest.fixture
def sandboxed(namespaces, actor) -> Callable[[int, int], Actor]:
    """Start an actor in a user namespace of its own, where a uid outside is one inside."""

    def start(inside: int, outside: int) -> Actor:
        one = actor(0)
        one(enter_user_namespace, (inside, outside, 1))
        one(become, inside)
        one(drop_capabilities)
        return one

    return start


class Canary:
    """A healthy client of the right user, which must not notice anything."""

    def __init__(self, one: Actor, layer: str, door: str, **options: Any) -> None:
        self._actor = one
        self._open = layer, door, options
        one(open_client, layer, door, **options)
        self.sings()

    def sings(self) -> None:
        """Call through the channel that was there before."""
        assert self._actor(call, "tweet") == "tweet"

    def opens_and_sings(self) -> None:
        """Call through the channel that was there before, and through a fresh door."""
        self.sings()
        layer, door, options = self._open
        self._actor(open_client, layer, door, **options)
        self.sings()


@pytest.fixture
def guarded(
    actor: Callable[..., Actor], path: str, marker: Marker
) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """
    Within it, the victims given must unpickle nothing, by each of the three counters.

    For a server, a canary calls before and after; it must lose no call.
    """

    @contextlib.contextmanager
    def guard(*victims: Actor, canary: Canary | None = None) -> Iterator[None]:
        before = [one(counts) for one in victims]
        yield
        assert [one(counts) for one in victims] == before, "somebody has unpickled a stranger's bytes"
        assert not marker.went_off
        if canary is not None:
            canary.opens_and_sings()
            assert not marker.went_off

    return guard


@pytest.fixture
def serving(actor: Callable[..., Actor], path: str) -> Callable[..., tuple[Actor, Canary]]:
    """Start a server at ``path``, and a canary that calls it."""

    def start(uid: int, layer: str, **options: Any) -> tuple[Actor, Canary]:
        server = actor(uid)
        server(serve, layer, path, **options)
        return server, Canary(actor(uid), layer, path)

    return start
