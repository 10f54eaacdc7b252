"""
Taking items from an iterator and pickling them: what is taken, what is left, and that it is a pickle.
"""

from __future__ import annotations

import collections
import itertools
import math
import pickle
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorpool import _impl, _shuttle_py

TWINS = [_shuttle_py, _impl.shuttle] if _impl.NAME == "c" else [_shuttle_py]

ROOM = 1 << 18


@pytest.fixture(params=TWINS, ids=lambda twin: twin.__name__.rpartition("_shuttle")[2] or "c")
def twin(request):
    return request.param


def take(twin, iterator, count=100, stride=1, room=ROOM, seconds=60.0):
    """Take items; return them, and what is told, be it raised."""
    items: list[Any] = []
    try:
        told = twin.take_items(items, iterator, count, stride, room, time.monotonic() + seconds)
    except BaseException as error:
        told = error
    return items, told


# -- taking


def test_no_more_are_taken_than_are_wanted(twin):
    numbers = iter(range(10))
    assert take(twin, numbers, 4) == ([0, 1, 2, 3], (4, ROOM))
    assert take(twin, numbers, 4, stride=8) == ([4, 5, 6, 7], (4, ROOM))
    assert next(numbers) == 8
    assert take(twin, numbers, 0) == ([], (0, ROOM))


@pytest.mark.parametrize("value", [None, 7, (1, 2)], ids=repr)
@pytest.mark.parametrize("n", [0, 3])
def test_the_end_tells_what_a_generator_returns(twin, n, value):
    def some():
        yield from range(n)
        return value

    items, end = take(twin, some())
    assert items == list(range(n))
    assert (type(end), end.value) == (StopIteration, value)


@pytest.mark.parametrize("make", [lambda: iter([1, 2]), lambda: map(int, "12"), lambda: iter({1: 0, 2: 0})])
def test_the_end_of_an_iterator_in_c_is_one_too(twin, make):
    items, end = take(twin, make())
    assert (items, type(end), end.value) == ([1, 2], StopIteration, None)


def test_what_is_raised_comes_behind_the_items_before_it(twin):
    def some():
        yield 1
        yield 2
        raise ZeroDivisionError("on purpose")

    items, error = take(twin, some(), stride=8)
    assert (items, repr(error)) == ([1, 2], "ZeroDivisionError('on purpose')")


def test_an_object_of_a_class_is_an_iterator_too(twin):
    class Count:
        n = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.n += 1
            return self.n

    assert take(twin, Count(), 3)[0] == [1, 2, 3]


@pytest.mark.parametrize(("stride", "taken"), [(1, 6), (2, 6), (4, 8), (8, 8)])
@pytest.mark.parametrize("string", ["x" * 10, b"x" * 10])
def test_strings_use_the_room_up(twin, string, stride, taken):
    """With a stride each that is looked at counts for those that are not."""
    items, told = take(twin, itertools.repeat(string), stride=stride, room=50)
    assert (len(items), told[0]) == (taken, taken)
    assert told[1] < 0


def test_numbers_use_none_of_it(twin):
    mixed = itertools.cycle([1, 2.5, None, True, 10**30])
    assert take(twin, mixed, 50, room=0)[1] == (50, 0)


@pytest.mark.parametrize(
    "item", [[], (), {}, object(), type("Text", (str,), {})("x")], ids=lambda it: type(it).__name__
)
def test_it_stops_at_what_it_cannot_weigh(twin, item):
    assert take(twin, iter([1, item, 2]))[1] == (2, ROOM)
    assert take(twin, itertools.repeat(item), stride=4)[1] == (4, ROOM)


def test_it_stops_when_the_time_is_over(twin):
    assert take(twin, itertools.count(), seconds=-1.0)[1] == (1, ROOM)
    assert take(twin, itertools.count(), stride=8, seconds=-1.0)[1] == (8, ROOM)


def test_what_another_thread_takes_out_meanwhile_is_not_missed(twin):
    """As the watcher of the streams does; here it is the iterator itself."""
    items: list[int] = []
    taken: list[int] = []

    def some():
        for n in range(5):
            taken.extend(items)
            items.clear()
            yield n

    twin.take_items(items, some(), 5, 1, ROOM, time.monotonic() + 60)
    assert taken + items == list(range(5))


def test_only_iterators_have_items():
    if _impl.NAME == "c":
        with pytest.raises(TypeError, match="takes an iterator"):
            _impl.shuttle.take_items([], [1, 2], 1, 1, 1, 0.0)
        with pytest.raises(TypeError, match="stride"):
            _impl.shuttle.take_items([], iter([1, 2]), 1, 0, 1, 0.0)


# -- pickling

compiled = pytest.mark.skipif(_impl.NAME != "c", reason="there is no compiled part here")

VALUES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary()
ITEMS = st.lists(VALUES | st.lists(VALUES, max_size=5).map(tuple), max_size=8)

#: Enough behind it for a pickle to be looked at as a batch.
FILLING = list(range(2**20, 2**20 + 200))


def same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other) and type(one) is type(other)


@compiled
@given(ITEMS)
def test_it_is_a_pickle_and_comes_back_the_same(items):
    for batch in (items, items + FILLING):
        data = _impl.shuttle.pack_items(batch)
        assert same(pickle.loads(data), batch)
        back = _impl.shuttle.unpack_value(data)
        assert same(back, batch) or (back is NotImplemented and batch is items)


@compiled
@pytest.mark.parametrize(
    "item",
    [
        0, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), -0.0, math.inf,
        5e-324, "", "x" * 255, "x" * 256, "ü" * 127, "ü" * 128, "\0", "日本", b"", b"\xff" * 255,
        b"\xff" * 256, "x" * 70_000,
        (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), tuple(range(100)),
    ],
    ids=lambda item: repr(item)[:20],
)  # fmt: skip
def test_the_edges(item):
    data = _impl.shuttle.pack_items([item, item, *FILLING])
    assert same(pickle.loads(data), [item, item, *FILLING])
    assert same(_impl.shuttle.unpack_value(data), [item, item, *FILLING])


@compiled
@pytest.mark.parametrize(
    "item",
    [
        2**63, -(2**63) - 1, "\ud800", [], {}, set(), ((1,),), (1, [2]), 1j, ..., bytearray(b"x"), object(),
        "x" * 2**21, b"x" * 2**21, type("Int", (int,), {})(1), type("Str", (str,), {})("x"),
        type("Tuple", (tuple,), {})(), collections.namedtuple("Pair", "a b")(1, 2),
    ],
    ids=lambda item: repr(item)[:20],
)  # fmt: skip
def test_of_anything_else_the_whole_batch_is_for_pickle(item):
    assert _impl.shuttle.pack_items([1, item]) is None


def test_the_twin_leaves_it_all_to_pickle():
    assert _shuttle_py.pack_items([1, 2]) is None
