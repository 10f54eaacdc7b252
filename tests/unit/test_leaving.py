"""
What callers have left behind: it counts as theirs until it is closed, or is not kept at all.
"""

from __future__ import annotations

import gc
import logging

import pytest

from doorpool import Credentials, MarshalError, Proxy, Server
from doorpool._guests import ASKED_ABOUT, guests
from doorpool._keeper import keeper
from doorpool._shares import Limits
from doorpool.door import Invocation

STRANGER = 54321


def held() -> int:
    usage = guests().usage().get(STRANGER)
    return 0 if usage is None else usage.descriptors


def test_what_is_let_go_of_counts_until_it_is_closed():
    one, other = object(), object()
    with keeper().lock:
        before = held()
        for each in (one, other, one):
            guests().begin_leaving(each, STRANGER)
        assert held() == before + 2
        full = guests().why_full(STRANGER, Limits(descriptors=before + 2))
        assert full is not None
        assert f"uid {STRANGER} has {before + 2} descriptors" in full
        for each in (one, other, one):
            guests().end_leaving(each)
        assert held() == before
        assert guests().why_full(STRANGER, Limits(descriptors=before + 2)) is None


def test_a_knock_that_is_asked_about_counts_with_its_descriptors():
    with keeper().lock:
        before = held()
        for _ in range(3):
            guests().begin_asking(STRANGER)
        assert held() == before + 3 * ASKED_ABOUT
        for _ in range(3):
            guests().end_asking(STRANGER)
        assert held() == before


def test_many_groups_are_shown_in_short():
    shown = repr(Credentials(1, 2, 3, tuple(range(1000))))
    assert "30, 31, ... 1000 in all)" in shown
    assert len(shown) < 300
    assert "groups=(4, 5)" in repr(Credentials(1, 2, 3, (4, 5)))


@pytest.mark.parametrize("wrong", ["an argument", "a result", "what is raised"])
def test_a_refused_request_needs_no_collection_to_be_let_go_of(door_dir, monkeypatch, wrong):
    """Nobody counts it any more, and a collection may be long in coming."""

    def length(words: list[str]) -> int:
        if wrong == "what is raised":
            raise KeyError(words)
        return "many"  # type: ignore[return-value]

    monkeypatch.setattr(logging.getLogger("doorpool"), "disabled", True)  # pytest keeps what is logged
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        with Server() as server:
            server.attach(length, door_dir / "a.door", codec="data")
            server.start()
            with (
                Proxy(door_dir / "a.door") as proxy,
                pytest.raises(KeyError if wrong == "what is raised" else MarshalError),
            ):
                proxy([1] if wrong == "an argument" else ["one"])
        gc.collect()  # the server's threads are over now, and hold nothing that would be garbage later
        kept = [it for it in gc.garbage if isinstance(it, Invocation | BaseException)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert kept == []
