"""
What the compiled part pickles by itself: it is a pickle, it comes back the same, all else is left alone.
"""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from doorpool import _impl, _shuttle_py

pytestmark = pytest.mark.skipif(_impl.NAME != "c", reason="there is no compiled part here")

atoms = _impl.shuttle

TEXT = st.text(st.characters(max_codepoint=127), max_size=30)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
ATOMS = st.none() | st.booleans() | INTEGERS | st.floats() | TEXT | st.binary(max_size=30)
ITEMS = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(TEXT | INTEGERS, inner, max_size=4)
    ),
    max_leaves=8,
)
ARGS = st.lists(ITEMS, max_size=5).map(tuple)
KWARGS = st.dictionaries(TEXT, ITEMS, max_size=3)

EDGES = [
    0, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**63 - 1, -(2**63),
    0.0, -0.0, math.inf, -math.inf, 5e-324, "", "x" * 255, b"", b"\xff" * 255, None, True, False,
]  # fmt: skip

#: What is no business of these functions, though it looks like it.
OTHERS = [
    2**63, -(2**63) - 1, "x" * 256, b"x" * 256, "ü", "\ud800", bytearray(b"x"), 1j, set(), ...,
    NotImplemented, type("Int", (int,), {})(1), type("Str", (str,), {})("x"),
    type("Float", (float,), {})(1.0), type("List", (list,), {})(),
    type("Dict", (dict,), {})(), type("Tuple", (tuple,), {})(),
]  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Tell whether values are equal, of the same types, and floats bit by bit."""
    return repr(one) == repr(other) and type(one) is type(other)


def is_much(value: Any) -> bool:
    """Tell whether a value is more than is looked at: bytes, or containers."""
    return (
        len(pickle.dumps(value, 5)) > 3000
        or repr(value).count("(") + len(re.findall(r"[\[{]", repr(value))) > 16
    )


@settings(max_examples=300)
@given(ITEMS)
def test_a_value_is_the_same_afterwards_and_for_pickle(value: Any) -> None:
    data = atoms.pack_value(value)
    if data is None:
        assert is_much(value)
        return
    assert same(atoms.unpack_value(data), value)
    assert same(pickle.loads(data), value)


@pytest.mark.parametrize("value", EDGES, ids=lambda value: repr(value)[:20])
def test_edges(value: Any) -> None:
    test_a_value_is_the_same_afterwards_and_for_pickle.hypothesis.inner_test(value)


@settings(max_examples=300)
@given(ARGS, KWARGS)
@example((), {})
@example((1, 2, 3), {})
@example((1, 2, 3, 4), {"a": 1})
def test_arguments_are_the_same_afterwards_and_for_pickle(args: Any, kwargs: Any) -> None:
    data = atoms.pack_call(args, kwargs)
    if data is None:
        assert is_much((args, kwargs))
        return
    assert same(atoms.unpack_call(data), (args, kwargs))
    assert same(pickle.loads(data), (args, kwargs))


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: repr(value)[:20])
def test_all_else_is_left_to_pickle(value: Any) -> None:
    assert atoms.pack_value(value) is None
    assert atoms.pack_value([1, {"a": (value,)}]) is None
    assert atoms.pack_call((1, value), {}) is None
    assert atoms.pack_call((), {"a": value}) is None


def test_what_is_long_or_many_is_left_to_pickle() -> None:
    assert atoms.pack_call(("x" * 255,) * 16, {}) is None
    assert atoms.pack_call((), {type("Name", (str,), {})("a"): 1}) is None
    assert atoms.pack_value([[] for _ in range(15)]) is not None
    assert atoms.pack_value([[] for _ in range(16)]) is None
    many = atoms.pack_call(tuple(range(513)), {})
    assert atoms.unpack_call(many) is None
    assert pickle.loads(many) == (tuple(range(513)), {})


def test_an_object_that_is_there_twice_is_left_to_pickle() -> None:
    """It has to be one object over there; and one that holds itself would never end."""
    for inner in ([1], {"a": 1}, (1, 2)):
        assert atoms.pack_value([inner, inner]) is None
        assert atoms.pack_call((inner,), {"a": inner}) is None
        assert atoms.pack_call((inner, type(inner)(inner)) if type(inner) is not tuple else (inner,), {})
    own: list[Any] = []
    own.append(own)
    assert atoms.pack_value(own) is None
    assert atoms.unpack_value(atoms.pack_value(((), (), [()]))) == ((), (), [()])


def test_what_pickle_writes_is_left_to_pickle() -> None:
    for value in ([1], ("a", "b"), {"a": 1}, int):
        assert atoms.unpack_value(pickle.dumps(value, 5)) is NotImplemented
    assert atoms.unpack_value(bytearray(atoms.pack_value(1))) is NotImplemented
    assert atoms.unpack_call(bytearray(atoms.pack_call((), {}))) is None


@pytest.mark.parametrize("value", [None, (), ((),), ((), ()), ((), {}, 1), ({}, ())])
def test_what_are_no_arguments_is_left_to_pickle(value: Any) -> None:
    assert atoms.unpack_call(pickle.dumps(value, 5)) is None


def test_what_is_called_with_something_else_says_so() -> None:
    for args in ((), (1, {}), ((), 1), ([], {})):
        with pytest.raises(TypeError, match="a tuple and a dict"):
            atoms.pack_call(*args)


#: Every code that is read, and some that are not.
CODES = b"NJKMG(C)t}u]e.\x80\x05\x85\x86\x87\x88\x89\x8a\x8c\x95\x94\x00\x01\x08\xff"


@settings(max_examples=1500)
@given(st.lists(st.sampled_from(CODES), max_size=30).map(bytes) | st.binary(max_size=30))
def test_bytes_of_any_kind_do_no_harm(body: bytes) -> None:
    """Anything that is understood, pickle understands alike; the sanitizers look at the rest."""
    for data in (body, b"\x80\x05" + body, b"\x80\x05" + body + b"."):
        value = atoms.unpack_value(data)
        if value is not NotImplemented:
            assert same(value, pickle.loads(data))
        call = atoms.unpack_call(data)
        assert call is None or same(call, value)


@settings(max_examples=300)
@given(ARGS, KWARGS, st.data())
def test_a_pickle_that_was_cut_or_changed_does_no_harm(args: Any, kwargs: Any, data: st.DataObject) -> None:
    whole = bytearray(atoms.pack_call(args, kwargs) or atoms.pack_call((1, [2]), {"a": (3,)}))
    place = data.draw(st.integers(0, len(whole) - 1))
    atoms.unpack_call(bytes(whole[:place]))
    whole[place] = data.draw(st.integers(0, 255))
    call = atoms.unpack_call(bytes(whole))
    assert call is None or (type(call[0]), type(call[1])) == (tuple, dict)


def test_the_twin_leaves_all_to_pickle() -> None:
    data = atoms.pack_call((1,), {})
    assert _shuttle_py.pack_call((1,), {}) is None
    assert _shuttle_py.unpack_call(data) is None
    assert _shuttle_py.pack_value(1) is None
    assert _shuttle_py.unpack_value(data) is NotImplemented


def test_what_is_read_is_counted_and_what_is_left_is_not() -> None:
    before = atoms.unpacked()
    atoms.unpack_value(atoms.pack_value(1))
    atoms.unpack_call(atoms.pack_call((1,), {}))
    assert atoms.unpacked() == before + 2
    assert atoms.unpack_value(pickle.dumps([1], 5)) is NotImplemented
    assert atoms.unpacked() == before + 2
    assert _shuttle_py.unpacked() == 0
