"""
Whose turn it is at a pool of threads: ``doorpool._shares.Turns``, without sockets.
"""

from __future__ import annotations

import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from support.rawdoor import Background

from doorpool._shares import PROMPT, Crowd, Limits, Tempo, Turns

A, B = 6701, 6702


class Channel:
    """What turns know of a channel; ``least`` is of its door's tempo."""

    def __init__(self, least: float = math.inf) -> None:
        self.turn = False
        self.begun: float = 0
        self.door = SimpleNamespace(tempo=Tempo())
        self.door.tempo.least = least


def channel(least: float = math.inf) -> Any:
    return Channel(least)


def is_open() -> bool:
    return True


def test_the_tempo_of_a_door_is_the_least_of_late():
    tempo = Tempo()
    assert not tempo.is_prompt
    tempo.note(PROMPT * 4)
    assert not tempo.is_prompt
    tempo.note(30_000)
    assert tempo.is_prompt
    for _ in range(20):
        tempo.note(PROMPT * 4)
    assert tempo.is_prompt, "some that wait for others do not make it a door that waits"
    for _ in range(20):
        tempo.note(PROMPT * 4)
    assert not tempo.is_prompt


@pytest.mark.ids("F11t")
def test_of_a_prompt_door_one_call_of_each_uid_is_fresh():
    turns = Turns(Limits(), 64)
    first, second, third, other = (channel(30_000) for _ in range(4))
    assert turns.take(first, A)
    assert not turns.take(second, A)
    assert turns.take(other, B)
    assert turns.hold(second, A, is_open) == []
    assert turns.is_to_be_looked_at()
    assert not turns.is_to_be_looked_at(), "once is enough"
    assert turns.look() == ([], True)
    first.begun = time.monotonic_ns() - PROMPT  # it waits for something, as it seems
    assert turns.look() == ([second], False)
    assert not turns.take(third, A), "the second one is fresh, though no thread has come to it yet"
    assert not turns.is_to_be_looked_at(), "nobody is held"
    assert turns.usage()[A].running == 2


def test_a_turn_that_is_kept_between_two_calls_keeps_nobody_waiting():
    turns = Turns(Limits(), 64)
    first, second = channel(30_000), channel(30_000)
    assert turns.take(first, A)
    first.begun = 0
    assert turns.take(second, A)


def test_a_turn_that_is_given_back_goes_to_who_is_held():
    turns = Turns(Limits(), 64)
    first, second = channel(30_000), channel(30_000)
    assert turns.take(first, A)
    assert turns.hold(second, A, is_open) == []
    assert turns.give_back(first, A) == [second]
    assert not turns.any_held


def test_all_turns_are_for_doors_that_take_their_time():
    turns = Turns(Limits(running=4), 64)
    channels = [channel(PROMPT) for _ in range(5)]
    assert [turns.take(one, A) for one in channels] == [True] * 4 + [False]
    assert turns.hold(channels[4], A, is_open) == []
    assert not turns.is_to_be_looked_at(), "to be held for lack of turns ends only when one is given back"


def test_who_is_held_for_others_being_fresh_counts_for_the_turns_that_are_left():
    turns = Turns(Limits(running=3, queued=2), 64)
    assert turns.take(channel(30_000), A)
    for count in range(4):
        assert not turns.is_full(A), count
        one = channel(30_000)
        assert not turns.take(one, A)
        turns.hold(one, A, is_open)
    assert turns.is_full(A) == 4


def test_who_looks_waits_for_nobody():
    """It is the keeper, which whoever holds the lock may be waiting for."""
    turns = Turns(Limits(), 64)
    first, second = channel(30_000), channel(30_000)
    assert turns.take(first, A)
    assert turns.hold(second, A, is_open) == []
    first.begun = time.monotonic_ns() - PROMPT
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with turns._lock:
            held.set()
            assert go.wait(20)

    holding = Background(hold)
    assert held.wait(20)
    assert turns.look() == ([], True)
    assert turns.give_back(first, A, wait=False) is None
    go.set()
    holding.result()
    assert turns.look() == ([second], False)
    assert turns.give_back(second, A, wait=False) == []


def test_a_channel_that_was_closed_while_it_was_to_be_held_is_not_held():
    turns = Turns(Limits(), 64)
    first, second = channel(30_000), channel(30_000)
    assert turns.take(first, A)
    assert turns.hold(second, A, lambda: False) == []
    assert not turns.any_held
    assert turns.give_back(first, A) == []


def test_of_a_channel_without_a_share_nothing_is_counted():
    """One that was counted out, of which a call still runs."""
    crowd = Crowd(Limits(bytes=1000))
    served: Any = SimpleNamespace(share=None, bytes=0)
    assert crowd.room(served, 5000) == 5000
    crowd.count(served, 4000)
    assert crowd.begin_reply(served, 4000) is None
    assert served.bytes == 0
    assert crowd.usage() == {}


def test_a_finalizer_in_the_midst_of_it_passes_for_somebody_who_does_not_wait():
    turns, crowd = Turns(Limits(), 64), Crowd(Limits())
    first: Any = channel(30_000)
    first.bytes = 0
    crowd.enter(first, A)
    assert turns.take(first, A)
    with turns._lock, crowd._lock:
        assert turns.give_back(first, A, wait=False) is None
        assert not crowd.leave(first)
    assert turns.give_back(first, A, wait=False) == []
    assert crowd.leave(first)
    assert crowd.leave(first), "once more does no harm"
    assert crowd.usage() == {}


def test_a_finalizer_may_close_channels_while_turns_are_passed_on():
    """It comes where the first of those who are held is looked at, and lets go of all but the last."""
    first, *held = (channel() for _ in range(4))

    class Interrupted(Turns):
        def _has_one(self, uid: int | None, served: Any) -> bool:
            if served is held[0]:
                for nth, one in enumerate(held[:-1]):
                    self.forget(one, B + nth)
            return super()._has_one(uid, served)

    turns = Interrupted(Limits(), threads=1)
    assert turns.take(first, A)
    for nth, one in enumerate(held):
        assert turns.hold(one, B + nth, is_open) == []
    assert turns.give_back(first, A) == [held[-1]]
    assert not turns.any_held
