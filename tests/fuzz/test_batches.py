"""
Batches of streams are parsed as pickle does, or left to it: no crash or hang, no value nobody wrote, no leak.

What is meant is the compiled reader of ``_batches.c``.
"""

from __future__ import annotations

import io
import pickle
import sys

import pytest
from hypothesis import strategies as st
from support.mutations import spoilt

from doorpool import _impl

pytestmark = [
    pytest.mark.skipif(_impl.NAME != "c", reason="there is no compiled part here"),
    pytest.mark.ids("H01", "H04"),
]

shuttle = _impl.shuttle

#: Behind each: a pickle that is too short is not looked at as a batch.
FILLING = ["x" * 250] * 3
BATCHES = [
    [None, True, 1.5, "text", "ü", b"bytes", "long" * 100, b"long" * 100, -1, 300, 70_000, 2**40],
    [(), (1,), (1, "2"), (1, 2, b"3"), (1, 2, 3, 4), tuple(range(20))],
]
PICKLES = [shuttle.pack_items(batch + FILLING) for batch in BATCHES] if _impl.NAME == "c" else []
CODES = b"NJKMG(C)BXt}u]e.\x80\x05\x85\x86\x87\x88\x89\x8a\x8c\x95\x94\x00\x01\x08\xff"
END = PICKLES[0][-3 * 252 - 2 :] if PICKLES else b""


class _NoNames(pickle.Unpickler):
    """Pickle as the reference; one that would look a name up is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check(data):
    """What is understood is what pickle understands."""
    value = shuttle.unpack_value(data)
    if value is NotImplemented:
        return False
    expected = _NoNames(io.BytesIO(data)).load()
    assert (type(value), repr(value)) == (type(expected), repr(expected))
    return True


def test_every_byte_with_other_values(many):
    """Of each pickle every byte gets every value, and it is cut everywhere."""
    read = 0
    for whole in PICKLES:
        assert check(whole)
        for place in range(0, len(whole) - len(END), many(7, 1)):
            check(whole[:place] + END)
            for value in range(0, 256, many(5, 1)):
                read += check(whole[:place] + bytes([value]) + whole[place + 1 :])
    assert read > 1000, "it was all refused, and nothing compared"


def test_batches_that_were_spoilt(fuzz):
    def check_one(data):
        check(data)

    fuzz(check_one, spoilt(*PICKLES), short=300, long=2_000_000)


def test_batches_that_were_made_up(fuzz):
    def check_one(body):
        check(b"\x80\x05](" + body + END)

    codes = st.lists(st.sampled_from(CODES), max_size=60).map(bytes)
    fuzz(check_one, codes | st.binary(max_size=60), short=300, long=2_000_000)


def test_no_reference_is_lost_or_kept():
    """Refused in the middle, after much was made: all of it is let go again."""
    whole = PICKLES[1]
    bad = [whole[:cut] + END for cut in range(len(whole) - len(END))] + [whole[:-2] + b"t."]
    for data in bad:
        shuttle.unpack_value(data)
    before = sys.getallocatedblocks()
    for _ in range(100):
        for data in bad:
            shuttle.unpack_value(data)
        shuttle.unpack_value(whole)
        shuttle.pack_items([*BATCHES[1], 2**40, object()])
    # One that is lost each time would make 8,000; CPython keeps up to 2,000 tuples of a length for later.
    assert sys.getallocatedblocks() - before < 4000
