"""
What strangers leave unread of the descriptors in their results: who finds room, who waits, who is refused.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from support import byhand

from doorpool import Limits, _unread
from doorpool._keeper import keeper
from doorpool._unread import PATIENCE, Unread

A, B = 6701, 6702


class Line:
    """A channel of a stranger, as far as it matters here, and the caller's end of it."""

    def __init__(self, uid: int = A) -> None:
        ours, self.caller = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = SimpleNamespace(socket=ours, peer=SimpleNamespace(uid=uid))
        self.unread: Any = None

    def send(self, count: int) -> None:
        byhand.send(self.channel.socket, b"result", [0] * count)

    def read(self) -> None:
        byhand.receive(self.caller).close()

    def close(self) -> None:
        self.channel.socket.close()
        self.caller.close()


@pytest.fixture
def line() -> Iterator[Callable[..., Any]]:
    lines: list[Line] = []

    def make(uid: int = A) -> Any:
        lines.append(Line(uid))
        return lines[-1]

    yield make
    for one in lines:
        one.close()


class Clock:
    """Time that goes on when somebody sleeps, and what happens meanwhile."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.meanwhile: Callable[[], object] = lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_unread, "time", clock)
    return clock


@pytest.fixture
def unread(clock: Clock) -> Unread:
    return Unread(keeper())


def pass_on(unread: Unread, line: Any, count: int, *, limit: int = 10, may_wait: bool = True) -> str | None:
    """Send so many descriptors, if there is room; return why there is none."""
    refusal = unread.begin(line, count, Limits(unread=limit), lambda: may_wait)
    if refusal is not None:
        return refusal.text
    line.send(count)
    unread.end(line)
    return None


def counted(unread: Unread) -> dict[int | None, int]:
    with keeper().lock:
        return dict(unread.usage())


def test_what_is_read_does_not_count(unread, line):
    one = line()
    for _ in range(5):
        assert pass_on(unread, one, 6) is None
        assert counted(unread) == {A: 6}
        one.read()
    assert counted(unread) == {}


def test_who_does_not_read_is_told_how_many_there_would_be(unread, line, clock):
    one, mate, other = line(), line(), line(B)
    assert pass_on(unread, one, 4) is None
    assert pass_on(unread, one, 4) is None
    assert pass_on(unread, mate, 3) == (
        f"uid {A} would leave 11 descriptors unread with the 3 of this result, and a user's limit is 10"
    )
    assert pass_on(unread, mate, 2) is None
    assert pass_on(unread, other, 10) is None
    assert counted(unread) == {A: 10, B: 10}


def test_a_result_alone_is_let_pass(unread, line):
    one, mate = line(), line()
    assert pass_on(unread, one, 50) is None
    assert pass_on(unread, mate, 1) is not None
    one.read()
    assert pass_on(unread, mate, 50) is None


def test_all_together_have_a_limit(unread, line):
    most = _unread.most_unread(Limits())[1]
    lines = [line(uid) for uid in range(A, A + 4)]
    for one in lines[:3]:
        assert pass_on(unread, one, most // 4, limit=most) is None
    last = most - 3 * (most // 4)
    text = pass_on(unread, lines[3], last + 1, limit=most)
    assert text is not None
    assert f"callers of other users would leave {most + 1} descriptors unread" in text
    assert f"their limit together is {most}" in text
    assert pass_on(unread, lines[3], last, limit=most) is None


def test_who_finds_no_room_waits_while_others_may_be_reading(unread, line, clock):
    one, mate = line(), line()
    assert pass_on(unread, one, 8) is None
    began = clock.now

    def read_late() -> None:
        with keeper().lock:
            assert unread.held() == {A: 5}, "what waits is in our table"
        if clock.now > began + PATIENCE / 2 and unread.usage():
            one.read()

    clock.meanwhile = read_late
    assert pass_on(unread, mate, 5) is None
    assert PATIENCE / 2 < clock.now - began < PATIENCE
    assert unread.held() == {}


def test_nobody_waits_for_longer_than_one_may_take_to_read(unread, line, clock):
    one, mate = line(), line()
    assert pass_on(unread, one, 8) is None
    began = clock.now
    assert pass_on(unread, mate, 5) is not None
    assert PATIENCE <= clock.now - began < PATIENCE + 0.1
    assert unread.held() == {}


def test_nobody_waits_for_who_hoards(unread, line, clock):
    one, mate = line(), line()
    assert pass_on(unread, one, 8) is None
    clock.now += PATIENCE + 0.1
    began = clock.now
    assert pass_on(unread, mate, 5) is not None
    assert clock.now == began
    assert pass_on(unread, mate, 2) is None, "there is room for these"
    assert pass_on(unread, mate, 3) is not None
    assert clock.now == began, "what is fresh would not be enough"


def test_nobody_waits_with_more_than_fit_into_our_table(unread, line, clock):
    one, mate = line(), line()
    assert pass_on(unread, one, 8) is None
    began = clock.now
    assert pass_on(unread, mate, 5, may_wait=False) is not None
    assert clock.now == began


def test_what_is_being_sent_counts(unread, line):
    """The kernel does not know of it yet."""
    one, mate = line(), line()
    assert unread.begin(one, 8, Limits(unread=10), lambda: True) is None
    assert counted(unread) == {A: 8}
    assert pass_on(unread, mate, 5) is not None
    unread.end(one)
    assert pass_on(unread, mate, 5) is None, "it was not sent after all"


def leave(unread: Unread, one: Any) -> int:
    """Close a channel as the gate does; return the number that its socket had."""
    number = one.channel.socket.fileno()
    one.channel.socket.shutdown(socket.SHUT_RDWR)
    unread.leave(one)
    one.channel.socket.close()
    return int(number)


@pytest.mark.parametrize("then", ["read", "closed"])
def test_a_channel_that_is_closed_counts_until_it_is_read(unread, line, then):
    one = line()
    assert pass_on(unread, one, 8) is None
    number = leave(unread, one)
    os.get_inheritable(number)
    assert counted(unread) == {A: 8}
    assert unread.held() == {A: 1}
    one.read() if then == "read" else one.caller.close()
    assert counted(unread) == {}
    assert unread.held() == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.get_inheritable(number)


def test_a_channel_that_is_closed_when_all_is_read_leaves_nothing(unread, line):
    one = line()
    assert pass_on(unread, one, 8) is None
    one.read()
    number = leave(unread, one)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.get_inheritable(number)
    assert counted(unread) == {}


def test_what_is_sent_when_all_was_read_does_not_count(unread, line):
    """A goodbye lies in a caller's queue until he looks."""
    one = line()
    assert pass_on(unread, one, 8) is None
    one.read()
    unread.settle(one)
    one.channel.socket.send(b"goodbye")
    assert counted(unread) == {}
    leave(unread, one)
    assert unread.held() == {}


def test_the_limits_follow_that_of_open_files(monkeypatch):
    for soft, expected in ((1 << 20, (256, 512)), (1024, (256, 512)), (256, (64, 128)), (2, (1, 2))):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert _unread.most_unread(Limits()) == expected
        assert _unread.most_unread(Limits(unread=1000)) == (expected[1], expected[1])
        assert _unread.most_unread(Limits(unread=1)) == (1, expected[1])


def test_of_a_channel_that_is_closed_nobody_says_that_it_was_read(line):
    one = line()
    parcels = _unread.Parcels(one.channel.socket, A, 1, 0.0, sending=False)
    assert parcels.are_read
    one.send(1)
    assert not parcels.are_read
    one.read()
    assert parcels.are_read
    one.channel.socket.close()
    assert not parcels.are_read
