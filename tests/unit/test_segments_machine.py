"""
Segments under everything at once: kept, dropped, changed and sent again in random order at both ends.

Two shelves are joined by hand.  Whatever happens, each array holds, byte for byte, what its holder has
put there: the machine keeps a copy of all of them and compares after every step.
"""

from __future__ import annotations

import gc
import os

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from doorpool import _segments, _shelf

ENDS = st.sampled_from([0, 1])

#: Around the thresholds, which the machine has made small; and an odd one.
SIZES = st.sampled_from([100, 4_096, 5_000, 8_192, 16_384, 20_001, 40_000, 100_000])


class Held:
    """
    An array that somebody at one end holds, and what must be in it.

    Attributes:
        loose: where something else may be: it was a loan, was passed, and its receiver has written there.
        veil: the loan that this came from, if it was passed as such, and where in it this lies.
    """

    def __init__(self, end, view, expected):
        self.end = end
        self.view = view
        self.expected = np.array(expected, "u1")
        self.loose = np.zeros(len(self.expected), bool)
        self.veil = None

    def check(self):
        found = np.frombuffer(self.view, "u1")
        assert ((found == self.expected) | self.loose).all()

    def write(self, value, begin, size):
        end = min(begin + size, len(self.expected))
        memoryview(self.view)[begin:end] = bytes([value]) * (end - begin)
        self.expected[begin:end] = value
        self.loose[begin:end] = False
        if self.veil is not None:
            lender, offset = self.veil
            if lender.view is not None:
                lender.loose[offset + begin : offset + end] = True

    def let_go(self):
        self.view = None


class Segments(RuleBasedStateMachine):
    """The machine."""

    arrays = Bundle("arrays")

    def __init__(self):
        super().__init__()
        self.real = {
            name: getattr(_shelf, name)
            for name in ("THRESHOLD", "LARGE", "BYTES_OF_CHANNEL", "MOST_SEGMENTS", "MOST_NEW")
        }
        _shelf.THRESHOLD, _shelf.LARGE = 4_096, 16_384
        _shelf.BYTES_OF_CHANNEL, _shelf.MOST_SEGMENTS, _shelf.MOST_NEW = 1 << 20, 8, 5
        self.arm, _shelf._sweeper.arm = _shelf._sweeper.arm, lambda *_: None
        self.held = []
        self.counter = 0
        self.open()

    def open(self):
        self.shelves = [_shelf.Shelf(), _shelf.Shelf()]

    # -- what the two ends do

    def fresh(self, size):
        self.counter += 1
        return np.random.default_rng(self.counter).integers(0, 256, size, "u1")

    def hold(self, end, view, expected):
        held = Held(end, view, expected)
        self.held.append(held)
        return held

    @rule(target=arrays, end=ENDS, size=SIZES)
    def make(self, end, size):
        content = self.fresh(size)
        return self.hold(end, bytearray(content), content)

    @rule(target=arrays, end=ENDS, size=SIZES)
    def borrow(self, end, size):
        """Memory of doorpool.buffer, from the end's own shelf."""
        _shelf.set_finder(lambda: self.shelves[end])
        view = _shelf.buffer(size)
        content = self.fresh(size)
        view[:] = content.tobytes()
        return self.hold(end, view, content)

    @rule(target=arrays, sent=st.lists(arrays, min_size=1, max_size=4))
    def send(self, sent):
        """One message, from where the first array is; the same one may be in it twice."""
        end = sent[0].end
        sent = [each for each in sent if each.end == end and each in self.held]
        return self.transfer(end, sent, lambda cargo: cargo)

    @rule(target=arrays, sent=st.lists(arrays, min_size=1, max_size=3))
    def send_after_a_recall(self, sent):
        end = sent[0].end
        sent = [each for each in sent if each.end == end and each in self.held]

        def again(cargo):
            if cargo is not None:
                self.shelves[end].recall(cargo)
            return self.shelves[end].load([memoryview(each.view) for each in sent])

        return self.transfer(end, sent, again)

    @rule(target=arrays, one=arrays, begin=st.integers(0, 50_000), size=st.integers(1, 100_000))
    def send_a_part(self, one, begin, size):
        if one not in self.held:
            return multiple()
        begin %= len(one.expected)
        part = Held(one.end, memoryview(one.view)[begin : begin + size], one.expected[begin : begin + size])
        part.loose = one.loose[begin : begin + size]
        return self.transfer(one.end, [part], lambda cargo: cargo, [(one, begin)])

    def transfer(self, end, sent, change, origins=None):
        source, target = self.shelves[end], self.shelves[1 - end]
        before = [self.loan_under(each.view) for each in sent]
        cargo = change(source.load([memoryview(each.view) for each in sent]))
        if cargo is None:
            arrived = [bytearray(each.view) for each in sent]
        else:
            numbers = [os.dup(number) for number in cargo.descriptors]
            inline = [bytearray(view) for view in cargo.inline]
            arrived = target.unload(cargo.manifest, inline, numbers)
            assert numbers == []
        assert len(arrived) == len(sent)
        results = []
        origins = origins or [(each, 0) for each in sent]
        for each, view, loan, origin in zip(sent, arrived, before, origins, strict=True):
            found = np.frombuffer(view, "u1")
            assert ((found == each.expected) | each.loose).all()
            results.append(self.hold(1 - end, view, found))
            if loan is not None and loan.lent is None:
                results[-1].veil = origin
        return multiple(*results)

    def loan_under(self, view):
        begin = np.frombuffer(view, "u1").ctypes.data
        for loan in list(_segments.loans.values()):
            if loan.covers(begin, begin + 1):
                return loan
        return None

    @rule(one=arrays, value=st.integers(0, 255), begin=st.integers(0, 99_999), size=st.integers(1, 99_999))
    def change_in_place(self, one, value, begin, size):
        if one in self.held:
            one.write(value, begin % len(one.expected), size)

    @rule(one=arrays)
    def drop(self, one):
        if one in self.held:
            self.held.remove(one)
            one.let_go()

    @rule(end=ENDS)
    def tell(self, end):
        """A message without buffers."""
        if self.shelves[end].has_news:
            self.transfer(end, [], lambda cargo: cargo)

    @rule(end=ENDS)
    def idle(self, end):
        self.shelves[end].sweep(float("inf"))

    @rule()
    def fork(self):
        """All that a fork does to this process."""
        _segments._before_fork()
        _segments._after_fork()

    @rule()
    def close(self):
        for shelf in self.shelves:
            shelf.close()
        self.open()

    # -- what must hold

    @invariant()
    def nobody_sees_a_change_that_is_not_his(self):
        for each in self.held:
            each.check()

    @invariant()
    def both_ends_agree_on_what_there_is(self):
        for one, other in (self.shelves, self.shelves[::-1]):
            counts = one.counts
            assert counts.held_bytes <= _shelf.BYTES_OF_CHANNEL
            assert counts.held <= _shelf.MOST_SEGMENTS
            for number, segment in one._out.items():
                theirs = other._foreign.get(number)
                if theirs is None:  # a child has it
                    assert ("dropped", number) in other.news
                else:
                    assert theirs.ours or ("released", number) in other.news
                    assert theirs.size == segment.size
            for number in (*one._free, *one._veiled):
                theirs = other._foreign.get(number)
                assert theirs is None or not theirs.ours

    def teardown(self):
        for held in self.held:  # the machine's bundle goes on holding them
            held.let_go()
        for shelf in self.shelves:
            shelf.close()
        for name, value in self.real.items():
            setattr(_shelf, name, value)
        _shelf._sweeper.arm = self.arm
        _shelf.set_finder(None)
        gc.collect()
        assert not _segments.exports
        assert not _segments.loans
        assert _shelf.totals().held == _shelf.totals().received == 0


@pytest.mark.timeout(600)  # in the long form
def test_whatever_happens_nobody_sees_a_change_that_is_not_his(many):
    machine = settings(
        max_examples=many(40, 1_000),
        stateful_step_count=many(40, 100),
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    run_state_machine_as_test(Segments, settings=machine)
