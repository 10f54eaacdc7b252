"""
Pickles are parsed as pickle does, or refused: no crash, no hang, no value that nobody wrote, no leak.

What is meant is the compiled reader of ``_atoms.c``.  The sanitizers look at the rest: see
tests/sanitizers/README.md.
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

atoms = _impl.shuttle

VALUES = [
    None, True, 0, 255, 256, 65535, 65536, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 1.5, "", "text",
    b"bytes", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1, [2, "x"]], {}, {"a": 1, 2: (b"", None)},
    ((((((((1,),),),),),),),), [[], {}, (), "x" * 255, b"y" * 255], list(range(40)),
]  # fmt: skip
CALLS = [((), {}), ((1, "a", [2.5]), {"key": b"v", "other": {"x": (None, True)}}), (tuple(range(20)), {})]

PICKLES = [atoms.pack_value(value) for value in VALUES] if _impl.NAME == "c" else []
PACKED_CALLS = [atoms.pack_call(*call) for call in CALLS] if _impl.NAME == "c" else []

#: What pickle itself writes, with its memo, its frames, and its names.
FOREIGN = [
    pickle.dumps(value, protocol)
    for value in (1, 2**64, "ü", [1, 2], ("a", {"b": 1}), {1, 2}, ValueError("x"), len, bytearray(b"x"))
    for protocol in range(6)
]

#: Each code that is read, and some that are not.
CODES = b"NJKMG(C)t}u]e.\x80\x05\x85\x86\x87\x88\x89\x8a\x8c\x95\x94\x00\x01\x08\xff"


class _NoNames(pickle.Unpickler):
    """Pickle as the reference; one that would look a name up is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def same(one, other):
    return type(one) is type(other) and repr(one) == repr(other)


def check(data):
    """What is understood is what pickle understands, and is a call if, and only if, it looks like one."""
    value = atoms.unpack_value(data)
    call = atoms.unpack_call(data)
    if value is NotImplemented:
        assert call is None
        return False
    assert same(value, _NoNames(io.BytesIO(data)).load())
    is_call = type(value) is tuple and [type(part) for part in value] == [tuple, dict]
    assert call is None or same(call, value)
    assert is_call or call is None
    return True


def test_every_byte_with_every_value(many):
    """Of each pickle every byte gets every value, and it is cut everywhere."""
    read = 0
    for whole in PICKLES + PACKED_CALLS + FOREIGN:
        assert check(whole) or whole in FOREIGN
        for place in range(0, len(whole), many(max(1, len(whole) // 40), 1)):
            check(whole[:place])
            for value in range(256):
                read += check(whole[:place] + bytes([value]) + whole[place + 1 :])
    assert read > 1000, "it was all refused, and nothing compared"


def test_pickles_that_were_spoilt(fuzz):
    def check_one(data):
        check(data)

    fuzz(check_one, spoilt(*PICKLES, *PACKED_CALLS, *FOREIGN), short=500, long=2_000_000)


def test_pickles_that_were_made_up(fuzz):
    def check_all(body):
        for data in (body, b"\x80\x05" + body, b"\x80\x05" + body + b"."):
            check(data)

    codes = st.lists(st.sampled_from(CODES), max_size=60).map(bytes)
    fuzz(check_all, codes | st.binary(max_size=60), short=500, long=2_000_000)


def test_much_of_everything():
    """Deep, wide and long: at, just under and just over what is looked at."""
    for depth in (15, 16, 17, 1000, 4000):
        for opened, closed in ((b"(", b"t"), (b"](", b"e"), (b"}(K\1", b"u"), (b")", b"\x85")):
            check(b"\x80\x05" + opened * depth + closed * depth + b".")
    for count in (510, 511, 512, 513, 4000):
        check(b"\x80\x05(" + b"N" * count + b"t.")
        check(b"\x80\x05](" + b"N" * count + b"e.")
    for length in (4093, 4094, 4095, 4096, 4097):
        check(b"\x80\x05(" + b"N" * (length - 5) + b"t.")


# -- objects


class Text(str):
    pass


class Number(int):
    pass


PLAIN = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.binary(max_size=20)
    | st.text(st.characters(max_codepoint=127), max_size=20)
)  # fmt: skip
LEAVES = (
    PLAIN | st.integers(-(2**70), 2**70) | st.text(max_size=20) | st.complex_numbers()
    | st.text(max_size=5).map(Text) | st.integers().map(Number) | st.binary(max_size=5).map(bytearray)
    | st.integers(250, 260).map(lambda n: "x" * n) | st.integers(250, 260).map(lambda n: b"x" * n)
)  # fmt: skip
KEYS = st.text(max_size=10) | st.integers(-(2**70), 2**70) | st.none() | st.booleans() | st.floats()


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=6)
            | st.lists(inner, max_size=6).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=6)
            | inner.map(lambda value: [value, value])  # one object in two places
        ),
        max_leaves=12,
    )


OBJECTS = nested(PLAIN) | nested(LEAVES)


def test_objects_are_the_same_for_pickle(fuzz):
    """What is written at all is an ordinary pickle, which means the same to both readers."""
    written = []

    def check_value(value):
        data = atoms.pack_value(value)
        if data is not None:
            written.append(1)
            back = pickle.loads(data)
            assert same(back, value)
            assert same(pickle.loads(pickle.dumps(value, 5)), back)
            understood = atoms.unpack_value(data)
            assert understood is NotImplemented or same(understood, value)

    fuzz(check_value, OBJECTS, short=300, long=500_000)
    assert len(written) > 50


def test_arguments_are_the_same_for_pickle(fuzz):
    def check_call(args, kwargs):
        data = atoms.pack_call(args, kwargs)
        if data is not None:
            assert same(pickle.loads(data), (args, kwargs))
            assert atoms.unpack_call(data) is None or same(atoms.unpack_call(data), (args, kwargs))

    args = st.lists(OBJECTS, max_size=4).map(tuple)
    fuzz(check_call, args, st.dictionaries(st.text(max_size=8), OBJECTS, max_size=2), short=150, long=300_000)


def test_no_reference_is_lost_or_kept():
    """Refused in the middle, after much was made: all of it is let go again."""
    marker = 10**15  # no small integer, so it is made anew by each reading
    whole = atoms.pack_value([marker, {"k": (marker, b"bytes")}, "text"])
    bad = [whole[:cut] for cut in range(len(whole))] + [whole[:-1] + b"e.", whole[:-1] + b"u."]
    for data in bad:
        atoms.unpack_value(data)
    before = sys.getallocatedblocks()
    for _ in range(200):
        for data in bad:
            atoms.unpack_value(data)
            atoms.unpack_call(data)
        atoms.unpack_value(whole)
    assert sys.getallocatedblocks() - before < 200
