"""
Keys of messages: they are found, as msgspec reads them, and their steps are counted; by both twins alike.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorpool import _impl, _shuttle_py
from doorpool._keys import Reader, Steps, Unfit

pytestmark = pytest.mark.ids("H03")

TWINS = [_shuttle_py, _impl.shuttle] if _impl.NAME == "c" else [_shuttle_py]

NO_LIMIT = 2**40


@pytest.fixture(params=TWINS, ids=lambda twin: twin.__name__.rpartition("_shuttle")[2] or "c")
def twin(request):
    return request.param


def found(twin, data, arrays=False, texts=False):
    """Return what is found, as lists of keys."""
    decode = msgspec.msgpack.Decoder(list[dict], ext_hook=lambda code, body: (code, bytes(body))).decode
    return [
        (is_map, [key for chunk in chunks for (key,) in decode(chunk)])
        for is_map, chunks in twin.keys_of(data, arrays, texts)
    ]


KEYS = [
    0, 127, 128, 2**8, 2**16, 2**32, -1, -33, -129, -(2**15) - 1, -(2**31) - 1, 1.5, None, True, "", "a" * 40,
    "a" * 300, "a" * 70_000, b"b", b"b" * 300, b"b" * 70_000, (), (1, (2, "c")), (0,) * 20, (0,) * 70_000,
    *(msgspec.msgpack.Ext(5, b"e" * size) for size in (1, 2, 3, 4, 8, 16, 300, 70_000)),
]  # fmt: skip


def test_keys_of_each_kind_are_found(twin):
    encode = msgspec.msgpack.encode
    data = (
        b"\xde" + len(KEYS).to_bytes(2, "big") + b"".join(encode(key) + b"\x93\xc0\x80\xc0" for key in KEYS)
    )
    right = [key if type(key) is not msgspec.msgpack.Ext else (5, key.data) for key in KEYS]
    assert found(twin, data) == [(True, right)]
    assert found(twin, b"\x91" + data + b"\0") == [(True, right)]
    for key in KEYS:
        if isinstance(key, str | bytes | bool | None):
            continue
        others = {f"{number}": number for number in range(15)}
        data = b"\xde\0\x10" + encode(others)[1:] + encode(key) + b"\xc0"
        assert [len(keys) for _, keys in found(twin, data)] == [16], "that key is reason enough"


def test_what_needs_no_looking_at_is_not_found(twin):
    texts = msgspec.msgpack.encode([{f"{number}": b"" for number in range(100)}, list(range(100))])
    assert found(twin, texts) == []
    assert found(twin, msgspec.msgpack.encode(dict.fromkeys(range(15), 1))) == []
    assert [(is_map, len(keys)) for is_map, keys in found(twin, texts, texts=True)] == [(True, 100)]
    assert [(is_map, len(keys)) for is_map, keys in found(twin, texts, arrays=True)] == [
        (True, 100), (False, 100)
    ]  # fmt: skip
    assert found(twin, b"", True, True) == []


def test_what_ends_too_soon_is_found_as_far_as_it_goes(twin):
    data = msgspec.msgpack.encode({number: number for number in range(100)})
    for end in range(3, len(data)):
        ((_, keys),) = found(twin, data[:end]) or [(True, [])]
        assert keys == list(range(len(keys)))
        assert abs(len(keys) - (end - 3) // 2) <= 1
    ((_, keys),) = found(twin, data[:43] + b"\xc1" + data[44:])
    assert keys == list(range(20))


def test_what_is_nested_too_deeply_is_refused(twin):
    with pytest.raises(RecursionError):
        twin.keys_of(b"\xdc\0\1" * 20_000, True, True)
    row = b"\xdc\0\x10" + b"\0" * 15
    assert len(twin.keys_of(row * 5 + b"\0", True, True)) == 5
    with pytest.raises(ValueError, match="nested too deeply"):
        twin.keys_of(row * 500 + b"\0", True, True)


def steps(twin, keys, is_map, most=NO_LIMIT, size=9):
    """Count those of keys of one size."""
    return twin.steps_of(tuple(keys), (size,) * len(keys), is_map, most)


HASHES = st.integers(-(2**63), 2**63) | st.integers(-3, 3) | st.integers(0, 63).map(lambda shift: 1 << shift)
LISTS = st.lists(HASHES | st.tuples(HASHES, HASHES) | st.just([]), max_size=300)


@pytest.mark.skipif(_impl.NAME != "c", reason="there is one twin here")
@given(LISTS, st.booleans(), st.integers(0, 2000) | st.just(NO_LIMIT), st.integers(1, 100))
def test_twins_count_alike(keys, is_map, most, seed):
    sizes = tuple((seed * 7919 * place) % 2**32 % 300 for place in range(len(keys)))
    counts = [twin.steps_of(tuple(keys), sizes, is_map, most) for twin in TWINS]
    assert min(counts) > most or counts[0] == counts[1]


@pytest.mark.skipif(_impl.NAME != "c", reason="there is one twin here")
@given(st.binary(max_size=200) | st.lists(st.sampled_from(range(256)), max_size=200).map(bytes),
       st.booleans(), st.booleans())  # fmt: skip
def test_twins_find_alike(data, arrays, texts):
    for prefix in (b"", b"\xde\0\x10", b"\xdc\0\x20"):
        one, other = (twin.keys_of(prefix + data, arrays, texts) for twin in TWINS)
        assert one == other


def test_steps_are_few_for_honest_keys_and_many_for_others(twin):
    for is_map in (True, False):
        assert steps(twin, range(10_000), is_map) < 30_000
        assert steps(twin, (1,) * 10_000, is_map) < 10_000 * (10 + 9)
        alike = tuple(itertools.product((-1, -2), repeat=8))
        assert steps(twin, alike, is_map) > (8 + 9) * 256 * 255 / 2
        assert steps(twin, alike, is_map, size=1000) > (8 + 1000) * 256 * 255 / 2, (
            "long ones cost more to compare"
        )
        assert 1000 < steps(twin, alike, is_map, 1000) < 1100


@pytest.mark.skipif(_impl.NAME != "c", reason="that takes a minute")
@pytest.mark.parametrize("is_map", [True, False], ids=["dict", "set"])
def test_so_many_multiples_of_a_power_of_two_have_steps_enough_and_no_more(is_map):
    """Their low bits, at which is looked first, are all the same; what `Steps` says of that is so."""

    def take(count, shift):
        Steps().take(tuple(number << shift for number in range(count)), (9,) * count, is_map)

    for shift in range(48):
        take(50_000, shift)
    if is_map:
        for shift in (24, 32):
            with pytest.raises(Unfit, match="200000 keys of a dict collide"):
                take(200_000, shift)


def test_what_cannot_be_hashed_or_compared_ends_the_counting(twin):
    class Odd:
        def __hash__(self):
            return 1

        def __eq__(self, other):
            raise ZeroDivisionError

    assert steps(twin, (1, [], *[2] * 1000), True) == 1
    assert steps(twin, (Odd(), Odd(), *[2] * 1000), True) < 30

    class Stop(Odd):
        __hash__ = Odd.__hash__

        def __eq__(self, other):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steps(twin, (Stop(), Stop()), True)


def test_each_key_has_its_size(twin):
    message = msgspec.msgpack.encode(dict.fromkeys(range(200, 300), 0))
    ((_, chunks),) = twin.keys_of(message, False, False)
    written = [item for chunk in chunks for each in msgspec.msgpack.decode(chunk) for item in each.items()]
    assert written == [(number, 2 if number < 256 else 3) for number in range(200, 300)]
    with pytest.raises(ValueError, match="1 keys, and 2 sizes"):
        twin.steps_of((1,), (1, 2), True, 10)


def test_no_memory_for_a_comparison_is_no_end_of_the_counting(twin):
    class Short:
        def __hash__(self):
            return 1

        def __eq__(self, other):
            raise MemoryError

    with pytest.raises(MemoryError):
        steps(twin, (Short(), Short()), True)


#: Keys that collide, each 14 numbers that may be -1 or -2, whose hashes are one.
ALIKE = [list(key) for key in itertools.islice(itertools.product((-1, -2), repeat=14), 2000)]
UNLIKE = [[place, *key[1:]] for place, key in enumerate(ALIKE)]


@pytest.mark.parametrize(
    "hint",
    [
        dict[tuple[int, ...], int],
        dict[tuple[(int,) * 14], int],
        dict[tuple[int | Literal["a", "b"], ...], int],
        dict[tuple[Any, ...], int],
        set[tuple[int, ...]],
        list[set[tuple[(Literal[-1, -2] | None,) * 14]]],
    ],
    ids=str,
)
def test_whatever_kind_of_tuples_keys_are_made_of_those_that_collide_are_refused(hint):
    def message(keys):
        if hint.__origin__ is dict:
            return b"\xde" + len(keys).to_bytes(2, "big") + b"".join(map(encode, keys))
        return msgspec.msgpack.encode([keys] if hint.__origin__ is list else keys)

    def encode(key):
        return msgspec.msgpack.encode(key) + b"\x01"

    reader = Reader(hint)
    with pytest.raises(ValueError, match=r"2000 .* collide"):
        reader.decode(message(ALIKE))
    if hint.__origin__ is not list:
        made = reader.decode(message(UNLIKE))
        assert len(made) == 2000


def test_sets_that_are_keys_are_read_as_such():
    reader = Reader(dict[frozenset[int], int])
    keys = [[place, place + 1] for place in range(1000)]
    data = b"\xde\x03\xe8" + b"".join(msgspec.msgpack.encode(key) + b"\x01" for key in keys)
    assert set(reader.decode(data)) == {frozenset(key) for key in keys}


def test_no_memory_for_keys_is_told():
    """It is no key that is none, at which the looking would end as if all were well."""

    class Short:
        def decode(self, chunk):
            raise MemoryError

    reader = Reader(dict[int, int])
    reader._maps[:] = [Short()]
    with pytest.raises(MemoryError):
        reader.check(msgspec.msgpack.encode(dict.fromkeys(range(1000), 1)))
