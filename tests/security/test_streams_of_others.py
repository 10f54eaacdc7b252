"""
Streams between processes of three users: who pulls, what is told, and how they end.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
from support import wait_until
from support.actors import here

from doorpool import AccessError, Proxy, Server, current_call

#: A service, somebody who uses it, and somebody whom he lets do so.
S, M, C = 4201, 6602, 4203

FAR = 5_000  # items: more than some batches


class OwnError(Exception):
    """One of the service's, whose text is not meant for others."""


# -- the service


def pullers(count: int) -> Iterator[Any]:
    """Say of each item who has pulled it, and note the end."""
    try:
        for n in range(count):
            yield [n, os.geteuid(), current_call().caller.uid]
    finally:
        here.ended.append(count)


def failing(how: str) -> Iterator[Any]:
    yield 1
    if how == "built-in":
        raise ValueError("not that one")
    if how == "own":
        raise OwnError("a secret")
    yield object()


def total(numbers: Any) -> int:
    return sum(numbers)


def keep(numbers: Any) -> Any:
    """Keep what was passed, and take the first of it."""
    here.kept = numbers
    return next(numbers)


def take_kept() -> str:
    """Take the next, if that can be had."""
    try:
        return str(next(here.kept))
    except AccessError as error:
        return str(error)


def serve_streams(place: str) -> None:
    here.ended = []
    here.server = Server()
    for procedure in (pullers, failing, total, keep):
        here.server.attach(procedure, f"{place}/{procedure.__name__}.door", codec="data", mode=0o666)
    here.server.attach(pullers, f"{place}/pickle.door", mode=0o666)
    here.server.start()


def ended() -> list[int]:
    return list(here.ended)


# -- who uses it


def pull(place: str, count: int) -> list[Any]:
    """Go through a stream to its end; return how many came, and who was told of."""
    with Proxy(f"{place}/pullers.door", server={S}) as door:
        items = list(door(count))
    assert [item[0] for item in items] == list(range(count))
    return sorted({(item[1], item[2]) for item in items})


def pull_some(place: str, count: int) -> int:
    """Take a few items, and hold the stream."""
    here.door = Proxy(f"{place}/pullers.door", server={S})
    here.stream = here.door(count)
    return next(here.stream)[0]


def let_go() -> None:
    here.stream = None


def close() -> None:
    here.stream.close()


def pull_failing(place: str, how: str) -> Any:
    with Proxy(f"{place}/failing.door", server={S}) as door:
        stream = door(how)
        assert next(stream) == 1
        with pytest.raises(Exception) as caught:
            next(stream)
        assert list(stream) == []
    return type(caught.value).__name__, str(caught.value)


def send(place: str, count: int) -> int:
    with Proxy(f"{place}/total.door", server={S}) as door:
        return door(n for n in range(count))


def mine() -> Iterator[Any]:
    """Yield numbers, and note the end."""
    here.ended = []
    try:
        yield from itertools.count()
    finally:
        here.ended.append("mine")


def send_for_good(place: str) -> int:
    with Proxy(f"{place}/keep.door", server={S}) as door:
        return door(mine())


def pull_by_pickle(place: str) -> str:
    with Proxy(f"{place}/pickle.door", server={S}) as door:
        return repr(door(3))


def relay(count: int) -> Any:
    return here.door(count)


def serve_relay(place: str) -> None:
    here.door = Proxy(f"{place}/pullers.door", server={S})
    here.server = Server()
    here.server.attach(relay, f"{place}/front.door", codec="data", mode=0o666)
    here.server.start()


def pull_front(place: str, count: int) -> list[Any]:
    with Proxy(f"{place}/front.door", server={M}) as door:
        items = list(door(count))
    assert [item[0] for item in items] == list(range(count))
    return sorted({(item[1], item[2]) for item in items})


@pytest.fixture
def cast(actor, place) -> Any:
    """The service and one of another user."""
    service, user = actor(S), actor(M)
    service(serve_streams, str(place))
    return service, user


@pytest.mark.ids("K3", "F13")
def test_a_stream_is_pulled_by_another_user_who_is_seen(cast, place):
    service, user = cast
    assert user(pull, str(place), FAR) == [(S, M)]
    assert service(ended) == [FAR]


@pytest.mark.ids("F13", "F14", "K3")
def test_a_stream_of_a_stream_goes_through_who_stands_between(cast, actor, place):
    """The one in the middle pulls, as himself; whoever gets it never reaches the service's own door."""
    service, between = cast
    client = actor(C)
    between(serve_relay, str(place))
    assert client(pull_front, str(place), FAR) == [(S, M)]
    assert service(ended) == [FAR]


@pytest.mark.ids("U12", "F18")
@pytest.mark.parametrize("how", [close, let_go, "kill -9"], ids=["close", "let go", "kill -9"])
def test_it_ends_when_the_other_user_lets_go(cast, place, how):
    service, user = cast
    assert user(pull_some, str(place), FAR) == 0
    assert service(ended) == []
    if how == "kill -9":
        os.kill(user.pid, 9)
    else:
        user(how)
    wait_until(lambda: service(ended) == [FAR])


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("built-in", ("ValueError", "not that one")),
        ("own", ("RemoteError", "OwnError")),
        ("no data", ("MarshalError", "an item of the stream cannot cross a data door")),
    ],
)
def test_what_another_user_is_told_of_errors(cast, place, how, told):
    """As of any procedure: the texts of built-in ones, and of others the name."""
    _, user = cast
    kind, text = user(pull_failing, str(place), how)
    assert kind == told[0]
    assert told[1] in text
    assert "secret" not in text


@pytest.mark.ids("K3")
def test_a_generator_of_another_user_is_pulled(cast, place):
    _, user = cast
    assert user(send, str(place), FAR) == sum(range(FAR))


@pytest.mark.ids("U12", "F18")
def test_a_generator_of_another_user_goes_on_after_the_call_and_ends_with_who_holds_it(cast, place):
    service, user = cast
    assert user(send_for_good, str(place)) == 0
    assert service(take_kept) == "1"
    assert user(ended) == []
    os.kill(service.pid, 9)
    wait_until(lambda: user(ended) == ["mine"])


def test_a_stream_by_pickle_is_for_nobody_else(cast, place):
    _, user = cast
    with pytest.raises(AccessError):
        user(pull_by_pickle, str(place))
