"""
What a stranger lets go of counts as his until it is closed, and knocks that a rule is asked about do, too.
"""

from __future__ import annotations

from doorpool import Credentials
from doorpool._guests import ASKED_ABOUT, guests
from doorpool._keeper import keeper
from doorpool._shares import Limits

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
