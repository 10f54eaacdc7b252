"""
Plain data is parsed or refused: no crash, no hang, no import, no code, no arguments nobody sent, no leak.

What comes is read for each procedure of a table, whose parameters are of all the kinds that an annotation
can have.  What is made of it is looked at with each parameter's own rule.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import decimal
import enum
import functools
import itertools
import math
import os
import re
import time
import tracemalloc
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import attrs
import msgspec
import pytest
from hypothesis import strategies as st
from support.mutations import spoilt

from doorpool import Descriptor, Proxy, RemoteError, _data
from doorpool._errors import BusyError, DoorError, MarshalError, ProtocolError
from doorpool._keys import Steps

pytestmark = pytest.mark.ids("H01", "H03")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@attrs.define
class Point:
    x: int
    y: float = 0.0


class Circle(msgspec.Struct, tag=True):
    radius: float


class Square(msgspec.Struct, tag=True):
    side: Annotated[int, msgspec.Meta(gt=0)]


class Named(NamedTuple):
    name: str
    count: int = 1


class Options(TypedDict):
    depth: int
    note: NotRequired[str]


def anything(*args: Any, **kwargs: Any) -> None: ...
def simple(number: int, text: str = "", *, flag: bool = False) -> None: ...
def raw(data: bytes, array: bytearray, real: float, nothing: None) -> None: ...
def points(points: list[Point], by_name: dict[str, Point]) -> None: ...
def shapes(*shapes: Circle | Square) -> None: ...
def limited(
    count: Annotated[int, msgspec.Meta(ge=0, lt=10)],
    word: Annotated[str, msgspec.Meta(pattern="^[a-z]+$", max_length=5)],
) -> None: ...
def choices(colour: Colour, level: Level, word: Literal["a", "c", 3]) -> None: ...
def times(at: datetime.datetime, day: datetime.date, span: datetime.timedelta) -> None: ...
def numbers(price: decimal.Decimal, key: uuid.UUID) -> None: ...
def containers(
    some: set[int], few: frozenset[str], pair: tuple[int, str], many: tuple[int, ...], named: Named
) -> None: ...
def typed(options: Options, maybe: int | str | None = None) -> None: ...
def lent(file: Descriptor, others: list[Descriptor] | None = None) -> None: ...
def doors(door: Proxy | None = None) -> None: ...


def is_int(value, low=-(2**63), high=2**64 - 1):
    return type(value) is int and low <= value <= high


def is_point(value):
    return type(value) is Point and is_int(value.x) and type(value.y) is float


def is_shape(value):
    if type(value) is Circle:
        return type(value.radius) is float
    return type(value) is Square and is_int(value.side, 1)


def each(kind, check):
    return lambda value: type(value) is kind and all(map(check, value))


def of(kind):
    return lambda value: type(value) is kind


def given(*args, **kwargs):
    """Write arguments as a caller would."""
    return msgspec.msgpack.encode((args, kwargs))


#: Procedures, valid arguments, and what each argument must be, by name.
TABLE = {
    anything: [given(1, "two", [3.0, None, {"k": b"v"}], x=True), {}],
    simple: [given(7, "seven", flag=True), {"number": is_int, "text": of(str), "flag": of(bool)}],
    raw: [
        given(b"data", b"array", 1.5, None),
        {"data": of(bytes), "array": of(bytearray), "real": of(float), "nothing": of(type(None))},
    ],
    points: [
        given([{"x": 1, "y": 2.0}, {"x": 3}], {"a": {"x": 4}}),
        {
            "points": each(list, is_point),
            "by_name": lambda value: all(type(k) is str and is_point(v) for k, v in value.items()),
        },
    ],
    shapes: [given(Circle(1.0), Square(2)), {"shapes": each(tuple, is_shape)}],
    limited: [
        given(3, "word"),
        {
            "count": lambda value: is_int(value, 0, 9),
            "word": lambda value: type(value) is str and 1 <= len(value) <= 5,
        },
    ],
    choices: [
        given("red", 2, "a"),
        {"colour": of(Colour), "level": of(Level), "word": lambda value: value in ("a", "c", 3)},
    ],
    times: [
        given(datetime.datetime(2001, 2, 3, 4, 5, tzinfo=datetime.UTC), "2001-02-03", "PT1.5S"),
        {"at": of(datetime.datetime), "day": of(datetime.date), "span": of(datetime.timedelta)},
    ],
    numbers: [given("1.50", str(uuid.UUID(int=7))), {"price": of(decimal.Decimal), "key": of(uuid.UUID)}],
    containers: [
        given([1, 2], ["a"], (1, "b"), (1, 2, 3), ("n", 2)),
        {
            "some": each(set, is_int), "few": each(frozenset, of(str)), "many": each(tuple, is_int),
            "pair": lambda value: len(value) == 2 and is_int(value[0]) and type(value[1]) is str,
            "named": lambda value: type(value) is Named and is_int(value.count),
        },
    ],
    typed: [
        given({"depth": 1, "note": "n"}, None),
        {
            "options": lambda value: set(value) <= {"depth", "note"} and is_int(value["depth"]),
            "maybe": lambda value: value is None or is_int(value) or type(value) is str,
        },
    ],
    lent: [
        given(msgspec.msgpack.Ext(1, b"\0\0\0\0"), [msgspec.msgpack.Ext(1, b"\0\1\0\1")]),
        {"file": of(Descriptor), "others": lambda value: value is None or each(list, of(Descriptor))(value)},
    ],
    doors: [
        given(msgspec.msgpack.Ext(2, b"\0\0\0\0")),
        {"door": lambda value: value is None or type(value) is Proxy},
    ],
}  # fmt: skip


MESSAGES = {procedure: message for procedure, (message, _) in TABLE.items()}


def read(procedure, data):
    """Read arguments, with two descriptors that came along; return what was bound, or the refusal."""
    arrivals = _data.Arrivals([os.eventfd(0), os.eventfd(0)], os.geteuid())
    try:
        pieces = _data.unpack_arguments(data)
        args, kwargs = _data.reading(arrivals, functools.partial(_data.convert, procedure, *pieces))
        return _data.plan_of(procedure)._signature.bind(*args, **kwargs).arguments
    except MarshalError as error:
        return error
    finally:
        for number in arrivals.take_back():
            os.close(number)


def check_arguments(procedure, data, audited):
    with audited():
        bound = read(procedure, data)
    if isinstance(bound, MarshalError):
        assert not bound.may_have_run
        assert len(str(bound)) < 5_000
        return False
    for name, value in bound.items():
        rule = TABLE[procedure][1].get(name, lambda _: True)
        assert rule(value), (name, value)
    if procedure is anything:
        args, kwargs = msgspec.msgpack.decode(data, ext_hook=lambda code, body: None)
        said = {name: value for name, value in (("args", tuple(args)), ("kwargs", kwargs)) if value}
        assert re.sub("<(Descriptor|Proxy)[^>]*>", "None", repr(bound)) == repr(said)
    return True


procedures = pytest.mark.parametrize("procedure", TABLE, ids=lambda procedure: procedure.__name__)


def import_what_is_imported_at_first():
    """Read, and refuse, something of each kind: what that imports is there before anybody looks."""
    for procedure, message in MESSAGES.items():
        assert procedure is doors or not isinstance(read(procedure, message), MarshalError), procedure
        read(procedure, message[:-1])
        read(procedure, given(None, 10**10, {"a": -1}, b="x"))
    for whole in OUTCOMES:
        outcome(whole, contextlib.nullcontext)


@pytest.fixture(autouse=True, scope="module")
def imported():
    import_what_is_imported_at_first()


@procedures
def test_arguments_that_were_spoilt(fuzz, audited, procedure):
    def check(data):
        check_arguments(procedure, data, audited)

    fuzz(check, spoilt(MESSAGES[procedure]) | spoilt(*MESSAGES.values()), short=60, long=100_000)


@procedures
def test_every_byte_with_other_values(many, audited, procedure):
    """Each bit of the arguments is flipped, all values in the long form, and they are cut everywhere."""
    message, fits = MESSAGES[procedure], 0
    values = many(8, 256)
    for place in range(len(message)):
        check_arguments(procedure, message[:place], audited)
        for value in range(values):
            byte = message[place] ^ (1 << value) if values == 8 else value
            fits += check_arguments(
                procedure, message[:place] + bytes([byte]) + message[place + 1 :], audited
            )
    assert fits or procedure is doors, "nothing was ever made of it"


FIELDS = ["x", "y", "type", "radius", "side", "depth"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=10)
    | st.binary(max_size=10) | st.sampled_from(["red", "2001-02-03", "PT1S", "1.5", "Circle", "a"])
    | st.builds(msgspec.msgpack.Ext, st.integers(-128, 127), st.binary(max_size=6)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(), inner, max_size=4)
        | st.dictionaries(st.integers(-(2**63), 2**64 - 1), inner, max_size=2)
    ),
    max_leaves=10,
)  # fmt: skip


def test_arguments_that_were_made_up(fuzz, audited):
    """Data of any shape, for procedures of any other."""
    names = st.sampled_from(["number", "text", "door", "file", "options", "self"]) | st.text(max_size=4)

    def check(procedure, args, kwargs):
        check_arguments(procedure, msgspec.msgpack.encode((args, kwargs)), audited)

    fuzz(
        check, st.sampled_from(list(TABLE)), st.lists(VALUES, max_size=5),
        st.dictionaries(names, VALUES, max_size=3), short=300, long=500_000,
    )  # fmt: skip


def test_bytes_that_were_made_up(fuzz, audited):
    def check(procedure, data):
        check_arguments(procedure, data, audited)
        check_arguments(procedure, b"\x92\x93" + data, audited)

    fuzz(check, st.sampled_from(list(TABLE)), st.binary(max_size=60), short=200, long=500_000)


def test_arguments_arrive_as_they_were_sent(fuzz):
    plain = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=10,
    )

    def check(args, kwargs):
        data = _data.pack_arguments(tuple(args), kwargs)[0]
        arrived = _data.convert(anything, *_data.unpack_arguments(data))
        assert repr(arrived) == repr((tuple(args), kwargs))

    fuzz(
        check,
        st.lists(plain, max_size=4),
        st.dictionaries(st.text(), plain, max_size=3),
        short=150,
        long=200_000,
    )


# -- bombs: much in little, or as much as a request may be


def deep(opened, count):
    return b"\x92\x91" + opened * count + b"\xc0\x80"


BOMBS = {
    "deep lists": deep(b"\x91", 100_000),
    "deep dicts": deep(b"\x81\xa1a", 100_000),
    "a list that claims 2**32 - 1 items": b"\x92\xdd\xff\xff\xff\xff\xc0",
    "a list in it that claims them": b"\x92\x91\xdd\xff\xff\xff\xff\xc0",
    "a dict that claims them": b"\x92\x91\xdf\xff\xff\xff\xff\xc0",
    "a text that claims 2**32 - 1 bytes": b"\x92\x91\xdb\xff\xff\xff\xffx",
    "bytes that claim them": b"\x92\x91\xc6\xff\xff\xff\xffx",
    "many empty lists": b"\x92\x91\xdd\x00\x03\xd0\x90" + b"\x90" * 250_000 + b"\x80",
    "many arguments": b"\x92\xdd\x00\x03\xd0\x90" + b"\xc0" * 250_000 + b"\x80",
    "many keywords": given(**{f"{number:04x}": None for number in range(2**16)}),
    "equal keys": b"\x92\x91\xdf\x00\x03\xd0\x90" + b"\xa1a\xc0" * 250_000 + b"\x80",
    "keys that hash alike": msgspec.msgpack.encode(([{n * (2**61 - 1): n for n in range(8)}], {})),
    "digits": msgspec.msgpack.encode((["9" * 1_000_000, "1" * 40], {})),
    "a date of much": msgspec.msgpack.encode((["P" + "9" * 100_000 + "D"] * 3, {})),
    "half a surrogate": b"\x92\x91\xa3\xed\xa0\x80\x80",
    "a float that is no number": msgspec.msgpack.encode(([math.nan, math.inf], {})),
    "a time out of range": b"\x92\x91\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff\x80",
    "extensions": b"\x92\x91\xdd\x00\x00\xff\xff" + b"\xd5\x63\x00\x00" * 65_535 + b"\x80",
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs(audited, bomb):
    """20 ms mostly, seconds with sanitizers, and of memory 160 times the bytes: see docs/security.md."""
    for procedure in TABLE:
        begun = time.thread_time()
        check_arguments(procedure, bomb, audited)
        assert time.thread_time() - begun < 5.0
    tracemalloc.start()
    try:
        check_arguments(anything, bomb, audited)
        assert tracemalloc.get_traced_memory()[1] < 200_000 + 160 * len(bomb)
    finally:
        tracemalloc.stop()


# -- keys that were chosen, so that a dict or a set of them would take time squared


def alike(count):
    """Tuples that have one hash, as -1 and -2 have."""
    return itertools.islice(itertools.product((-1, -2), repeat=count.bit_length()), count)


def in_the_way(count, run=1):
    """
    Numbers, each at a place of its own in the way on which a dict looks for 0; and that, over and over.

    Where 0 belongs, there is another.  A set looks at a run of ten places at each step.
    """
    size = size_of_dict(count) if run == 1 else size_of_set(count)
    starts = itertools.accumulate(itertools.repeat(None), lambda place, _: (5 * place + 1) % size, initial=0)
    places = ((start + more) % size for start in starts for more in range(run))
    taken = dict.fromkeys(itertools.islice(places, count))
    return [size, *list(taken)[1:], *[0] * count]


def size_of_dict(count):
    return 2 * 2 ** (count - 1).bit_length()


def size_of_set(count):
    size = 8
    while 5 * count >= 3 * (size - 1):
        size *= 4
    return size


def far_apart(count):
    """Numbers that have one hash, of any length."""
    return ((number + 1) * (2**61 - 1) for number in range(count))


def uuids(count):
    return (str(uuid.UUID(int=number)) for number in far_apart(count))


def items(write, value):
    """A map of these keys, or a list, which Python itself could not have made before it is written."""

    def packed(count):
        keys = [msgspec.msgpack.encode(key) for key in write(count)]
        head = (b"\xdd" if value is None else b"\xdf") + len(keys).to_bytes(4, "big")
        return head + b"".join(key + (value or b"") for key in keys)

    return packed


class Member(msgspec.Struct, frozen=True, array_like=True):
    pair: tuple[int, ...]


class Group(msgspec.Struct):
    members: set[uuid.UUID] = msgspec.field(default_factory=set)


def bare_set(given: set) -> None: ...
def set_of_tuples(given: set[tuple[int, ...]]) -> None: ...
def set_of_ints(given: set[int]) -> None: ...
def set_of_uuids(given: frozenset[uuid.UUID]) -> None: ...
def set_of_decimals(given: set[decimal.Decimal]) -> None: ...
def set_of_structs(given: set[Member]) -> None: ...
def set_in_a_struct(given: list[Group]) -> None: ...
def sets_gone_through(given: list[Iterable[set[uuid.UUID]]]) -> None: ...
def dict_of_uuids(given: dict[uuid.UUID, int]) -> None: ...
def dict_of_ints(given: dict[int | str, int]) -> None: ...
def dict_of_tuples(given: dict[tuple[int, ...], int]) -> None: ...
def dicts_in_dicts(given: dict[str, dict[str, Point]]) -> None: ...


TUPLES, NUMBERS, UUIDS = items(alike, b"\1"), items(in_the_way, b"\1"), items(uuids, b"\1")


#: Procedures, and bombs of a size.
CROWDS = {
    "dict of tuples": (anything, TUPLES),
    "dict of numbers": (anything, NUMBERS),
    "dict of tuples in dicts": (anything, lambda count: b"\x81\xa1a\x81\xa1b" + TUPLES(count)),
    "dict of tuples behind a text": (
        anything, lambda count: b"\xdf" + (count + 1).to_bytes(4, "big") + b"\xa0\1" + TUPLES(count)[5:]
    ),
    "dict of tuples and no key": (
        anything, lambda count: b"\xdf" + (count + 1).to_bytes(4, "big") + TUPLES(count)[5:] + b"\x80\1"
    ),
    "typed dict of tuples": (dict_of_tuples, TUPLES),
    "typed dict of numbers": (dict_of_ints, NUMBERS),
    "typed dict of UUIDs": (dict_of_uuids, UUIDS),
    "set of anything": (bare_set, items(alike, None)),
    "set of tuples": (set_of_tuples, items(alike, None)),
    "set of numbers": (set_of_ints, items(functools.partial(in_the_way, run=10), None)),
    "set of UUIDs": (set_of_uuids, items(uuids, None)),
    "set of decimals": (set_of_decimals, items(lambda count: map(str, far_apart(count)), None)),
    "set of structs": (set_of_structs, items(lambda count: ([key] for key in alike(count)), None)),
    "set in a struct": (
        set_in_a_struct, lambda count: b"\x91\x81\xa7members" + items(uuids, None)(count)
    ),
    "what is skipped before a misfit": (
        dicts_in_dicts,
        lambda count: b"\x82\xa1a\x81\xa1b\x82\xa1x\1\xa1z" + TUPLES(count) + b"\xa1b\x81\xa1c\1",
    ),
}  # fmt: skip


def seconds(read, times=3):
    """Return what reading takes, of this thread's time, when nobody disturbs it."""
    taken = []
    for _ in range(times):
        begun = time.thread_time()
        read()
        taken.append(time.thread_time() - begun)
    return min(taken)


@pytest.mark.parametrize(("procedure", "bomb"), CROWDS.values(), ids=CROWDS)
def test_keys_that_collide(audited, procedure, bomb):
    """They are refused, in time that grows as the bytes do; before, twice as many took four times as long."""
    small, large = (b"\x92\x91" + bomb(count) + b"\x80" for count in (4096, 8192))
    _data.plan_of(procedure)
    with audited():
        refusal = read(procedure, large)
    assert isinstance(refusal, MarshalError)
    assert re.search("collide: that takes more than [0-9]+ steps|, got `int`", str(refusal))
    assert seconds(lambda: read(procedure, large)) < 3 * seconds(lambda: read(procedure, small)) + 0.02


def test_long_keys_that_collide_cost_no_more_than_their_bytes():
    """To compare two that differ in their last items takes as long as they are: 500 kB took a second."""
    bomb = given(dict.fromkeys((-20,) * 990 + key for key in alike(512)))
    honest = given(dict.fromkeys((*range(number, number + 10), *(-20,) * 990) for number in range(-600, -88)))
    assert isinstance(read(anything, bomb), MarshalError)
    assert isinstance(read(anything, honest), dict)
    assert seconds(lambda: read(anything, bomb)) < 10 * seconds(lambda: read(anything, honest))


@pytest.mark.parametrize(
    "bomb", [TUPLES, NUMBERS, lambda count: TUPLES(count)[:-1]], ids=["tuples", "numbers", "a beginning"]
)
def test_keys_that_collide_in_an_outcome(audited, bomb):
    small, large = (b"V\x91" + bomb(count) for count in (4096, 8192))
    refusal = outcome(large, audited)
    assert type(refusal) is ProtocolError
    assert "keys of a dict collide" in str(refusal)
    quick = contextlib.nullcontext
    assert seconds(lambda: outcome(large, quick)) < 3 * seconds(lambda: outcome(small, quick)) + 0.02


def test_keys_that_collide_in_items_of_a_stream():
    """What is a list, and goes over as one, is to be a set here."""
    crowd = list(uuids(4096))
    with pytest.raises(ValueError, match="4096 items of a set collide"):
        _data.convert_items([[], crowd], set[uuid.UUID])
    with pytest.raises(MarshalError, match=r"the third.*items of a set collide"):
        _data.convert_item("the third", crowd, set[uuid.UUID], Steps())
    few = crowd[:100]
    assert _data.convert_items([few], set[uuid.UUID]) == [{uuid.UUID(each) for each in few}]


def test_many_crowds_have_steps_in_common(audited):
    """A message of many dicts of a few hundred keys each, any of which would do alone."""
    one = TUPLES(512)[:1] + TUPLES(256)[1:]
    assert not isinstance(read(anything, b"\x92\x91" + one + b"\x80"), MarshalError)
    for many in (b"\x92\xdc\1\0" + one * 256 + b"\x80", b"\x92\x91\xdc\1\0" + one * 256 + b"\x80"):
        with audited():
            assert "collide" in str(read(anything, many))
        assert seconds(lambda many=many: read(anything, many)) < 1.0  # 0.1; 0.8 if they were made


def test_crowds_in_what_is_gone_through_have_steps_in_common():
    """Each list that is to be an iterable is made of plain data by itself."""
    crowd = [list(uuids(128))]
    assert not isinstance(read(sets_gone_through, given([crowd])), MarshalError)
    assert "128 items of a set collide" in str(read(sets_gone_through, given([crowd] * 64)))


def test_what_tells_of_progress_has_its_steps_from_its_message():
    one, arrivals = TUPLES(256), _data.Arrivals([])
    with pytest.raises(MarshalError, match="keys of a dict collide"):
        for _ in range(256):
            _data.reading(arrivals, lambda: _data.read_value(one))
    assert len(_data.reading(_data.Arrivals([]), lambda: _data.read_value(one))) == 256


def grid(low, high, dimensions):
    return {point: len(point) for point in itertools.product(range(low, high), repeat=dimensions)}


HONEST = {
    "a plane": grid(-200, 200, 2),
    "a space": grid(-20, 20, 3),
    "a cube of six dimensions": grid(-2, 1, 6),
    "numbers in order": dict.fromkeys(range(200_000), 1),
    "negative ones": dict.fromkeys(range(-100_000, 0), 1),
    "addresses": {number << 12: number for number in range(100_000)},
    "bits far up": {number << 40: number for number in range(100_000)},
    "times": {1_700_000_000.0 + number / 1000: number for number in range(50_000)},
    "powers of two": {2.0**number: number for number in range(-1000, 1000)},
    "of all kinds": {1: 1, None: 2, "a": 3, b"b": 4, (1, 2): 5, -2.5: 6, **grid(-2, 3, 3)},
}


@pytest.mark.parametrize("sent", HONEST.values(), ids=HONEST)
def test_honest_keys_arrive(sent):
    assert read(anything, given(sent))["args"] == (sent,)
    assert outcome(b"V" + msgspec.msgpack.encode(sent), contextlib.nullcontext) == sent


def test_honest_items_of_sets_arrive():
    members = [str(uuid.UUID(int=number << 96)) for number in range(20_000)]
    assert len(read(set_of_uuids, given(members))["given"]) == 20_000
    assert read(set_of_ints, given([7] * 100_000))["given"] == {7}
    assert read(set_of_ints, given(list(range(0, 2**50, 2**34))))["given"] == set(range(0, 2**50, 2**34))
    assert len(read(bare_set, given(list(grid(-50, 50, 2))))["given"]) == 10_000


# -- outcomes, at a caller

OUTCOMES = [
    b"V" + msgspec.msgpack.encode([1, "a", {"b": None}]),
    b"V" + msgspec.msgpack.encode(msgspec.msgpack.Ext(1, b"\0\0\0\0")),
    b"E" + msgspec.msgpack.encode(["ValueError", "text", None]),
    b"E" + msgspec.msgpack.encode(["SystemExit", None, "trace"]),
    b"A" + msgspec.msgpack.encode("does not fit"),
    b"R" + msgspec.msgpack.encode("no data"),
    b"B" + msgspec.msgpack.encode("no descriptor left"),
]


def outcome(data, audited):
    """Return the value, or what was raised."""
    arrivals = _data.Arrivals([os.eventfd(0)], os.geteuid())
    try:
        with audited():
            return _data.unpack_outcome(data, arrivals)
    except Exception as error:
        return error.with_traceback(None)
    finally:
        for number in arrivals.take_back():
            os.close(number)


def check_outcome(data, audited):
    """
    A value, or one of the classes of the table; what it says of itself decides nothing else.

    Tells whether the procedure itself had that outcome.
    """
    came = outcome(data, audited)
    if isinstance(came, DoorError):
        assert type(came) in (MarshalError, ProtocolError, RemoteError, BusyError)
        assert data[:1] == b"B" or type(came) is not BusyError
        assert came.may_have_run == (type(came) is not MarshalError or data[:1] != b"A")
    elif isinstance(came, Exception):
        assert data[:1] == b"E"
        assert type(came) in _data._TOLD, type(came)
    else:
        assert data[:1] == b"V"
    return not isinstance(came, DoorError)


def test_outcomes(fuzz, audited):
    def check(data):
        check_outcome(data, audited)

    made_up = st.tuples(st.sampled_from([b"V", b"E", b"A", b"R", b"B"]), st.binary(max_size=40)).map(b"".join)
    fuzz(check, spoilt(*OUTCOMES) | made_up | st.binary(max_size=40), short=300, long=500_000)


def test_errors_of_any_name(fuzz, audited):
    import builtins

    import doorpool

    names = st.sampled_from([*dir(builtins), *dir(doorpool), "os.system", "__import__", ""]) | st.text()
    texts = st.none() | st.text()

    def check(name, text, trace):
        try:
            data = b"E" + msgspec.msgpack.encode([name, text, trace])
        except UnicodeEncodeError:
            return
        check_outcome(data, audited)

    fuzz(check, names, texts, texts, short=300, long=200_000)


# -- misfits: the keys that lead to one are found by reading again, which a stranger could make take long


class Node(msgspec.Struct):
    children: dict[str, Node] = {}
    beside: list[int] = []


def tree(node: Node) -> None: ...


def chain(depth, beside):
    """A node that does not fit, so many dicts deep, in each of which is another; and a list at the top."""
    node = {"beside": "no list"}
    for _ in range(depth):
        node = {"children": {"a": node, "b": {}}}
    return {"beside": beside, **node}


class Counting:
    """A reader of which the bytes count."""

    def __init__(self, hint):
        self.reader = _data._decoder_of(hint)
        self.bytes = 0
        self.steps = None

    def decode(self, piece, steps=None):
        assert self.steps in (None, steps), "each reading may take as many steps as the message"
        self.steps = steps
        self.bytes += len(piece)
        return self.reader.decode(piece, steps)


def test_keys_that_lead_to_a_misfit_are_looked_for_in_little_more_than_the_message():
    """Each level of dicts took a reading of all that stands beside it: 8 MB and 40 levels, 5 s."""
    path = ".children[...]" * 40 + ".beside"
    small, large = (msgspec.msgpack.encode(chain(40, [0] * size)) for size in (10, 200_000))
    counting = Counting(Node)
    assert _data._with_keys(path, counting, small) == ".children['a']" * 40 + ".beside"
    counting = Counting(Node)
    found = _data._with_keys(path, counting, large)
    assert counting.bytes < 2 * len(large) + 2**16
    assert found.startswith(".children['a'].children")
    assert found.endswith(".children[...].beside")
    assert found.replace("'a'", "...") == path


def test_a_misfit_in_many_dicts_takes_no_longer_than_in_one():
    deep, flat = (given(chain(depth, [0] * 500_000)) for depth in (60, 1))
    for message, path in ((flat, r"children\['a'\]\.beside"), (deep, r"children\['a'\].*\[\.\.\.\]\.beside")):
        assert re.search(f"the argument node.{path}: Expected `array`, got `str`", str(read(tree, message)))
    assert seconds(lambda: read(tree, deep)) < 4 * seconds(lambda: read(tree, flat))


def test_of_a_long_dict_the_key_of_a_misfit_is_found():
    """Half of it is read, then a quarter: all in all, no more than there is."""
    table = {f"{number:06}": [number] for number in range(100_000)}
    for key in ("000000", "050000", "099999"):
        assert f"the argument table['{key}'][0]: Expected" in str(read(wide, given(table | {key: ["x"]})))


def wide(table: dict[str, list[int]]) -> None: ...


# -- misfits: what does not fit is quoted, and a stranger has written it


class Closed(msgspec.Struct, forbid_unknown_fields=True):
    number: int = 0


@dataclasses.dataclass
class Picky:
    name: str

    def __post_init__(self) -> None:
        raise ValueError(f"no such name: {self.name}")


def coloured(given: Colour) -> None: ...
def literal(given: Literal["red"]) -> None: ...
def tagged(given: Circle | Square) -> None: ...
def closed(given: dict[str, Closed]) -> None: ...
def picky(given: list[Picky]) -> None: ...
def keyed(given: dict[str, dict[Colour, int]]) -> None: ...
def exact(*, number: int = 0) -> None: ...


#: Procedures, and arguments of theirs that do not fit because of a text.
QUOTED = {
    "enum": (coloured, lambda text: given(text)),
    "literal": (literal, lambda text: given(text)),
    "tag": (tagged, lambda text: given({"type": text})),
    "unknown field": (closed, lambda text: given({"a": {text: 1}})),
    "an error of the type's own": (picky, lambda text: given([{"name": text}])),
    "key": (keyed, lambda text: given({"a": {text: 1}})),
    "keyword": (exact, lambda text: given(**{text: 1})),
    "keyword of what has no signature": (
        dict.update, lambda text: b"\x92\x90\x81" + msgspec.msgpack.encode(text) + b"\xd4\x63\0"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("procedure", "arguments"), QUOTED.values(), ids=QUOTED)
@pytest.mark.parametrize("unit", [" - at `$", " - at `key` in `", "` in `", "[...]", ".", "\0", "\U0001f6aa"])
def test_a_misfit_that_quotes_much_is_told_in_little_time(audited, procedure, arguments, unit):
    """
    No more than to read the text and to write it out takes, some times over.

    Without that it took time squared: 128 KB of what looks like a path, 9 s with the interpreter's lock held.
    """
    text = " - at `$" + unit * (2**16 // len(unit)) + "`"
    message = arguments(text)
    _data.plan_of(procedure)
    with audited():
        refusal = read(procedure, message)
    assert isinstance(refusal, MarshalError)
    assert len(str(refusal)) < 20_000
    once = seconds(lambda: repr(msgspec.msgpack.decode(msgspec.msgpack.encode(text))))
    assert seconds(lambda: read(procedure, message)) < 50 * once + 0.005
