"""
Plain data: what crosses by MessagePack, what annotations make of it, and what is said of a misfit.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import functools
import os
import pickle
import subprocess
import sys
import typing
import uuid
from collections.abc import (
    AsyncIterator,
    Callable,
    Container,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    Reversible,
    Sequence,
)
from typing import Annotated, Any

import attrs
import msgspec
import pytest

from doorpool import Descriptor, MarshalError, ProtocolError, RemoteError, RemoteTraceback
from doorpool import _data as data

UTC = datetime.UTC


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


@attrs.frozen
class Item:
    name: str
    price: float = attrs.field(validator=attrs.validators.ge(0))


class Order(msgspec.Struct):
    items: list[Item]
    at: Point | None = None


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    tricks: list[str]


class Named(typing.NamedTuple):
    name: str
    number: int


class Options(typing.TypedDict, total=False):
    loud: bool


Positive = Annotated[int, msgspec.Meta(gt=0)]


def crossed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function is called with, when it is called with these through a data door."""
    message, buffers, numbers = data.pack_arguments(args, kwargs)
    assert buffers == ()
    arrivals = data.Arrivals([os.dup(number) for number in numbers])
    pieces = data.unpack_arguments(message)
    return data.reading(arrivals, lambda: data.convert(function, *pieces))


def misfit(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(MarshalError) as caught:
        crossed(function, *args, **kwargs)
    assert caught.value.may_have_run is False
    return str(caught.value)


def taking(hint: Any) -> Callable[..., Any]:
    def procedure(value: Any) -> Any:
        raise AssertionError("it must not run")

    procedure.__annotations__ = {"value": hint}
    return procedure


# -- what fits


FITTING = [
    pytest.param(hint, value, value, id=name)
    for name, hint, value in [
        ("int", int, 2**63),
        ("negative", int, -(2**63)),
        ("bool", bool, True),
        ("float", float, 1.5),
        ("str", str, "ä€\N{GRINNING FACE}"),
        ("bytes", bytes, b"\x00\xff"),
        ("bytearray", bytearray, bytearray(b"x")),
        ("none", None, None),
        ("list", list[int], [1, 2]),
        ("tuple", tuple[int, str], (1, "a")),
        ("open tuple", tuple[int, ...], (1, 2, 3)),
        ("set", set[int], {1, 2}),
        ("frozenset", frozenset[str], frozenset({"a"})),
        ("dict", dict[int, list[str]], {1: ["a"]}),
        ("date", datetime.date, datetime.date(2024, 2, 29)),
        ("time", datetime.time, datetime.time(12, 30, 1)),
        ("naive datetime", datetime.datetime, datetime.datetime(2024, 2, 29, 12)),
        ("aware datetime", datetime.datetime, datetime.datetime(2024, 2, 29, 12, tzinfo=UTC)),
        ("timedelta", datetime.timedelta, datetime.timedelta(days=1, microseconds=3)),
        ("uuid", uuid.UUID, uuid.UUID(int=7)),
        ("decimal", decimal.Decimal, decimal.Decimal("1.10")),
        ("enum", Colour, Colour.RED),
        ("int enum", Level, Level.HIGH),
        ("dataclass", Point, Point(1, 2)),
        ("attrs", Item, Item("pen", 1.5)),
        ("struct", Order, Order([Item("pen", 1.5)], Point(1))),
        ("named tuple", Named, Named("a", 1)),
        ("typed dict", Options, {"loud": True}),
        ("union", int | str | None, "text"),
        ("tagged union", Cat | Dog, Dog(["sit"])),
        ("literal", typing.Literal["a", "b"], "b"),
        ("constraint", Positive, 1),
        ("nested", dict[str, list[Point | None]], {"a": [Point(1), None]}),
        ("any", Any, {"a": [1, None, b"x", 1.5]}),
        ("no annotation", object, [1, {"a": b"b"}]),
    ]
]


@pytest.mark.parametrize(("hint", "value", "expected"), FITTING)
def test_an_argument_becomes_what_the_annotation_says(hint, value, expected):
    args, kwargs = crossed(taking(hint), value)
    assert (args, kwargs) == ((expected,), {})
    assert type(args[0]) is type(expected)


@pytest.mark.parametrize(("hint", "value", "expected"), FITTING)
def test_a_result_fits_what_the_annotation_promises(hint, value, expected):
    def procedure():
        pass

    procedure.__annotations__ = {"return": hint}
    parcel, _, _ = data.Plan(procedure).pack_result(value)
    plain = data.unpack_outcome(parcel, data.Arrivals([]))
    again, _ = crossed(taking(hint), plain)  # what the caller has is data, and means the same
    assert again == (expected,)


@pytest.mark.parametrize("value", [(1, [2]), {"a": (1,)}, {3}, Point(1), Item("a", 1), Order([])])
def test_without_annotations_there_is_plain_data(value):
    (plain,), _ = crossed(lambda it: it, value)
    assert type(plain) in (list, dict)


class Text(str):
    def __str__(self) -> str:
        raise AssertionError("not asked")


class Number(int):
    pass


class Amount(float):
    pass


class Bytes(bytes):
    pass


@pytest.mark.parametrize("value", [Text("a"), Number(5), Amount(1.5), Bytes(b"b")])
def test_of_subclasses_of_plain_values_the_value_goes(value):
    (plain,), _ = crossed(lambda it: it, value)
    assert type(plain) is type(value).__mro__[1]
    assert plain == value


# -- parameters of all kinds


def everything(a: int, /, b: Point, c: int = 3, *rest: int, key: str = "k", **more: float) -> None:
    pass


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((1, Point(2)), {}, ((1, Point(2)), {})),
        ((1,), {"b": Point(2)}, ((1, Point(2)), {})),
        ((1, Point(2), 3, 4, 5), {}, ((1, Point(2), 3, 4, 5), {})),
        ((1, Point(2)), {"key": "z", "x": 1}, ((1, Point(2)), {"key": "z", "x": 1.0})),
        ((1, Point(2)), {"a": 2.5}, ((1, Point(2)), {"a": 2.5})),
    ],
    ids=["positional", "by keyword", "variadic", "keywords", "a keyword like a positional-only one"],
)
def test_all_kinds_of_parameters(args, kwargs, expected):
    assert crossed(everything, *args, **kwargs) == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, "everything(): missing a required argument: 'a'"),
        ((1,), {}, "everything(): missing a required argument: 'b'"),
        (("x", Point(2)), {}, "the argument a: Expected `int`, got `str`"),
        ((1, {"x": "q"}), {}, "the argument b.x: Expected `int`, got `str`"),
        ((1, {}), {}, "the argument b: Object missing required field `x`"),
        ((1, Point(1), 3, 4, "x"), {}, "the argument rest[1]: Expected `int`, got `str`"),
        ((1, Point(1)), {"key": 5}, "the argument key: Expected `str`, got `int`"),
        ((1, Point(1)), {"m": "x"}, "the argument more['m']: Expected `float`, got `str`"),
        ((1, Point(1)), {"b": 1}, "everything(): multiple values for argument 'b'"),
    ],
)
def test_a_misfit_names_the_parameter_the_path_and_the_type(args, kwargs, said):
    assert misfit(everything, *args, **kwargs).startswith(said)


def test_a_misfit_names_the_annotation():
    assert misfit(everything, 1, 5).endswith("test_data.Point)")


@pytest.mark.parametrize(
    ("hint", "value", "said"),
    [
        (int, 1.0, "got `float`"),
        (int, True, "got `bool`"),
        (int, "1", "got `str`"),
        (bytes, "aGVsbG8=", "Expected `bytes`, got `str`"),
        (str, b"x", "got `bytes`"),
        (Positive, 0, "Expected `int` >= 1"),
        (Colour, "blue", "Invalid enum value 'blue'"),
        (typing.Literal["a"], "b", "Invalid enum value 'b'"),
        (Item, {"name": "a", "price": -1}, "value: 'price' must be >= 0"),
        (Cat | Dog, {"type": "Cow"}, "value.type: Invalid value 'Cow'"),
        (datetime.datetime, "yesterday", "Invalid RFC3339"),
        (tuple[int, int], [1], "length 2, got 1"),
        (dict[str, int], {"a": 1, "b": "x"}, "value['b']: Expected `int`, got `str`"),
        (dict[str, list[Point]], {"a": [{"x": 1}, {"x": None}]}, "value['a'][1].x: Expected `int`"),
        (dict[str, dict[int, bool]], {"a": {}, "b": {5: 1}}, "value['b'][5]: Expected `bool`"),
        (dict[str, int], {"a": "x", "b": 1}, "value['a']: Expected `int`, got `str`"),
        (dict[str, int], dict.fromkeys("abcdefg", 1) | {"c": "x"}, "value['c']: Expected `int`, got `str`"),
        (dict[str, int], {5: 1}, "value, a key: Expected `str`, got `int`"),
        (dict[str, dict[Colour, int]], {"a": {"x": 1}}, "value['a'], a key: Invalid enum value 'x'"),
        (dict[tuple[int, Colour], int], {(1, "x"): 1}, "value, a key[1]: Invalid enum value 'x'"),
        (Colour, "x - at `$.y`", "value: Invalid enum value 'x - at `$.y`' (value"),
        (dict[str, Colour], {"a": "x - at `$.y`"}, "value['a']: Invalid enum value 'x - at `$.y`' (value"),
        (Colour, "x - at `key` in `$.y`", "value: Invalid enum value 'x - at `key` in `$.y`' (value"),
        (list[set[int]], [[1], ["x"]], "value[1][0]: Expected `int`"),
        (Order, {"items": [{"name": "a", "price": "b"}]}, "value.items[0].price: Expected `float`"),
    ],
)
def test_what_does_not_fit_is_no_argument(hint, value, said):
    assert said in misfit(taking(hint), value)


@pytest.mark.ids("H03")
@pytest.mark.parametrize(
    ("said", "parts"),
    [
        ("Wrong", ("Wrong", "", "")),
        ("Wrong - at `$`", ("Wrong", "", "")),
        ("Wrong - at `$.a[0][...]`", ("Wrong", ".a[0][...]", "")),
        ("Wrong - at `key` in `$.a`", ("Wrong", ".a", "key")),
        ("Wrong - at `key[1].b` in `$`", ("Wrong", "", "key[1].b")),
        ("Wrong 'x - at `$.b`' - at `$.a`", ("Wrong 'x - at `$.b`'", ".a", "")),
        ("Wrong 'x - at `$.b`'", ("Wrong 'x - at `$.b`'", "", "")),
        ("Wrong - at `here`", ("Wrong - at `here`", "", "")),
        ("Wrong - at `a` in `$`", ("Wrong - at `a` in `$`", "", "")),
        ("Wrong - at `key` in `key` in `$`", ("Wrong - at `key` in `key` in `$`", "", "")),
        (" - at `", (" - at `", "", "")),
        ("", ("", "", "")),
    ],
)
def test_the_word_about_a_misfit_is_taken_apart(said, parts):
    assert data._split(said) == parts


@pytest.mark.ids("H03")
def test_of_a_long_word_about_a_misfit_the_ends_are_looked_at():
    """A path that is longer than what is looked at is left where it stands."""
    head, path, key = data._split(f"Wrong {'x' * 10**6} - at `$.a`")
    assert (path, key) == (".a", "")
    assert head.startswith("Wrong xxx")
    assert head.endswith("xxx")
    assert len(head) < 2_100
    text, *rest = data._split(f"Wrong - at `${'.a' * 1000}`")
    assert rest == ["", ""]
    assert len(text) < 2_100


def test_a_typed_dict_says_what_keywords_there_are():
    def procedure(**options: typing.Unpack[Options]) -> None:
        pass

    assert crossed(procedure, loud=True) == ((), {"loud": True})
    assert "the argument options.loud: Expected `bool`" in misfit(procedure, loud=1)


class Callable_:
    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, x: int) -> None:
        pass

    def method(self, x: int) -> None:
        pass

    @classmethod
    def of_class(cls, x: int) -> None:
        pass

    @staticmethod
    def static(x: int) -> None:
        pass


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    "function",
    [
        Callable_(1), Callable_(1).method, Callable_.of_class, Callable_.static, Callable_, Item, Point,
        functools.partial(everything, 1, Point(1)), functools.lru_cache(taking(int)), wrapped(taking(int)),
    ],
    ids=lambda it: getattr(it, "__qualname__", type(it).__qualname__),
)  # fmt: skip
def test_whatever_is_called_its_annotations_count(function):
    said = misfit(function, b"bytes", *[1] * (function is Item))
    assert "Expected `" in said


def test_a_method_is_looked_at_once_and_others_of_its_name_are_others():
    class Other:
        def method(self, x: str) -> None:
            pass

    assert data.plan_of(Callable_(1).method) is data.plan_of(Callable_(2).method)
    assert crossed(Other().method, "x") == (("x",), {})
    assert data.plan_of(Callable_.method) is not data.plan_of(Callable_(1).method)


@dataclasses.dataclass
class Unhashable:
    log: list[int]

    def __call__(self, x: int) -> None:
        self.log.append(x)


def test_an_object_without_a_hash_may_be_called():
    assert crossed(Unhashable([]), 1) == ((1,), {})
    assert misfit(Unhashable([]), "1").startswith("the argument x: Expected `int`, got `str`")


def test_plans_are_kept_and_not_too_many(monkeypatch):
    monkeypatch.setattr(data, "_plans", {})
    monkeypatch.setattr(data, "_MOST_PLANS", 3)
    for function in map(taking, [int, str, float, bytes, bool]):
        assert data.plan_of(function) is data.plan_of(function)
        assert len(data._plans) <= 3


@pytest.mark.parametrize("function", [print, dict.update, max], ids=lambda it: it.__qualname__)
def test_of_what_has_no_annotations_nothing_is_known(function):
    assert crossed(function, 1, "b") == ((1, "b"), {})


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        ("Nowhere", "'Nowhere' is not defined"),
        ("list[Nowhere]", "'Nowhere' is not defined"),
        (Point | Item, "the parameter 'value' cannot be checked as data: Type unions"),
        (Point | Callable_ | int, "cannot be checked"),
    ],
)
def test_an_annotation_that_cannot_be_checked_makes_no_door(hint, said):
    with pytest.raises(TypeError, match=said):
        data.Plan(taking(hint))


T = typing.TypeVar("T")


class Box(typing.Generic[T]):
    pass


@dataclasses.dataclass
class Holder(typing.Generic[T]):
    inside: T
    others: list["Holder[int]"] = dataclasses.field(default_factory=list)  # noqa: UP037
    kind: typing.ClassVar[Container[int]] = ()


@dataclasses.dataclass
class Dates:
    days: dict[str, Container[datetime.date]]


class DatesToo(msgspec.Struct):
    days: Reversible[datetime.date]


class NamedDates(typing.NamedTuple):
    days: Reversible[datetime.date]


class MaybeDates(typing.TypedDict):
    days: typing.NotRequired[Container[datetime.date]]


@attrs.define
class SomeDates:
    days: Container[datetime.date] | None


@typing.runtime_checkable
class Long(typing.Protocol[T]):
    def __len__(self) -> int: ...
    def __getitem__(self, place: int) -> T: ...


Renamed = typing.NewType("Renamed", Container[int])


@pytest.mark.ids("B03")
@pytest.mark.parametrize(
    "hint",
    [
        Container[int], Reversible[int], Box[int], Long[int], collections.deque[int], ItemsView[str, int],
        collections.OrderedDict[str, int], AsyncIterator[int], list[Container[int]], Container[int] | None,
        Annotated[Container[int], 1], Iterable[Container[int]], Holder[Container[int]], Renamed,
        Dates, DatesToo, NamedDates, MaybeDates, SomeDates, dict[str, Dates], Iterable[Point | Item],
    ],
    ids=str,
)  # fmt: skip
def test_an_annotation_of_whose_parts_nobody_would_see_to_makes_no_door(hint):
    with pytest.raises(TypeError, match="cannot be checked"):
        data.Plan(taking(hint))
    with pytest.raises(TypeError, match="cannot be checked"):
        data.Plan(giving(hint))


def giving(hint: Any) -> Callable[..., Any]:
    def procedure() -> None:
        pass

    procedure.__annotations__["return"] = hint
    return procedure


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Container, [1]),
        (Container[Any], [1]),
        (Container[object], {"a": 1}),
        (Container[T], [1]),
        (Sequence[int], [1]),
        (Mapping[str, int], {"a": 1}),
        (Annotated[list[int], 1], [1]),
        (Holder[int], Holder(1, [Holder(2)])),
        (Iterable[Any], {"a": 1}),
        (Iterable, "text"),
    ],
    ids=str,
)
def test_an_annotation_that_says_nothing_of_parts_or_that_is_seen_to_makes_one(hint, value):
    assert crossed(taking(hint), value) == ((value,), {})


@pytest.mark.ids("B03")
@pytest.mark.parametrize("of", [lambda it: it, lambda it: Annotated[it, 1], lambda it: it | None])
def test_of_what_is_gone_through_and_is_no_iterator_a_list_is_made(of):
    """A dict of texts went for an ``Iterable`` of dates, for dates could be made of them; and none were."""
    day = datetime.date(2020, 1, 2)
    procedure = taking(of(Iterable[datetime.date]))
    for value in (["2020-01-02"], {"2020-01-02": 1}, (day,)):
        assert crossed(procedure, value) == (([day],), {})
    assert crossed(taking(of(Iterable[int])), b"ab") == (([97, 98],), {})
    for value in ({"x": 1}, ["x"], "x", [5]):
        assert "the argument value[0]: " in misfit(procedure, value)
    assert "Expected `Iterable`, got `int`" in misfit(procedure, 5)


# -- what is no data


@attrs.define
class Half:
    missing: int = attrs.field(init=False)
    there: Any


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "args[0] cannot cross a data door: objects of type builtins.object are not plain data"),
        ([1, {"a": (2, lambda: 0)}], "args[0][1]['a'][1] cannot cross"),
        ({Point: 1}, "args[0][key <type>] cannot cross"),
        (Order([Item("a", 1)], at=object()), "args[0].at cannot cross"),
        (Item(object(), 1.5), "args[0].name cannot cross"),
        (Half(object()), "args[0].there cannot cross"),
        (Point({1: [2**64]}), "args[0].x[1][0] cannot cross a data door: an int of data has at most 64 bits"),
        ("\ud800", "surrogates not allowed"),
        (1 + 2j, "complex"),
    ],
)
def test_what_is_no_data_is_named_and_not_sent(value, said):
    with pytest.raises(MarshalError) as caught:
        data.pack_arguments((value,), {})
    assert said in str(caught.value)
    assert caught.value.may_have_run is False


def test_a_ring_is_no_data():
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(MarshalError, match="nested too deeply"):
        data.pack_arguments((), {"ring": ring})


@pytest.mark.parametrize(
    ("hint", "value", "said"),
    [
        (int, "x", "result: Expected `int`, got `str`"),
        (None, 5, "result: Expected `null`, got `int`"),
        (dict[str, list[int]], {"a": [1, "x"]}, "result['a'][1]: Expected `int`"),
        (list[Point], [Point("x")], "result[0].x: Expected `int`"),
        (Any, {"a": [object()]}, "result['a'][0] cannot cross"),
        (Descriptor, 3, "Expected `Descriptor`, got `int`"),
    ],
)
def test_a_result_that_is_not_what_was_promised_is_refused(hint, value, said):
    def procedure():
        pass

    procedure.__annotations__ = {"return": hint}
    with pytest.raises(MarshalError) as caught:
        data.Plan(procedure).pack_result(value)
    assert said in str(caught.value)
    assert caught.value.may_have_run is True


# -- what strangers write


HOSTILE = {
    "nothing": b"",
    "no pair": b"\x91\x90",
    "three": b"\x93\x90\x80\xc0",
    "a number": b"\x05",
    "trailing": b"\x92\x90\x80\x05",
    "a huge array": b"\x92\xdd\xff\xff\xff\xff",
    "a huge map": b"\x92\x90\xdf\xff\xff\xff\xff",
    "a huge text": b"\x92\x91\xdb\xff\xff\xff\xff\x80",
    "keys that are no text": b"\x92\x90\x81\x01\x01",
    "no such byte": b"\x92\x91\xc1\x80",
    "deep": b"\x92" + b"\x91" * 100_000 + b"\xc0\x80",
    "a pickle": pickle.dumps(([], {})),
}


@pytest.mark.ids("B03")
@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_what_are_no_arguments_is_refused(message):
    with pytest.raises(MarshalError) as caught:
        data.convert(everything, *data.unpack_arguments(message))
    assert caught.value.may_have_run is False


@pytest.mark.parametrize(
    "piece", [b"\xa2\xff\xff", b"\x91" * 100_000 + b"\xc0", b"\xd4\x07\x00", b"\xd6\x01\x00\x00\x00\x00",
              b"\xd4\xff\x00", b"\x81\x80\x80", b"\xc7\x00\x01"],
    ids=["no UTF-8", "deep", "unknown extension", "no descriptor", "no time", "odd key", "empty extension"],
)  # fmt: skip
@pytest.mark.parametrize("hint", [Any, object, list[str], Descriptor])
def test_an_argument_that_is_no_message_is_refused(hint, piece):
    with pytest.raises(MarshalError, match="the argument value"):
        data.reading(data.Arrivals([]), lambda: data.convert(taking(hint), [msgspec.Raw(piece)], {}))


def test_what_a_stranger_chooses_to_be_said_of_him_prints_on_one_line():
    said = misfit(taking(Colour), "\x1b[31m\nred" * 10_000)
    assert said.isprintable()
    assert len(said) < 40_000


def test_nothing_of_it_can_unpickle():
    """In an interpreter of its own, that imports the module and nothing above it."""
    code = (
        "import sys, types\n"
        "package = types.ModuleType('doorpool'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['doorpool'] = package\n"
        "import doorpool._data as data\n"
        "names = {name for module in list(sys.modules.values()) if getattr(module, '__name__', '').startswith"
        "('doorpool') for name in vars(module)}\n"
        "assert not names & {'pickle', 'cloudpickle', 'marshal', 'shelve'}, names\n"
    )
    folder = os.path.dirname(data.__file__)
    subprocess.run([sys.executable, "-I", "-c", code, folder], check=True, timeout=30)


# -- errors


def arrived(error: BaseException, *, text: bool = True, paths: bool = True, frames: bool = False) -> Any:
    message, _, _ = data.pack_exception(error, text=text, paths=paths, frames=frames)
    with pytest.raises(Exception) as caught:
        data.unpack_outcome(message, data.Arrivals([]))
    return caught.value


def test_an_exception_arrives_by_name_and_text():
    error = arrived(ValueError("too old"))
    assert type(error) is ValueError
    assert error.args == ("too old",)
    assert error.__cause__ is None


def test_its_text_is_told_only_if_that_is_wanted():
    assert arrived(ValueError("secret"), text=False).args == ()
    assert str(arrived(MemoryError("x"), text=False)) == ""
    error = arrived(uuid_error(), text=False)
    assert (type(error), str(error), error.type_name) == (RemoteError, f"{__name__}.Own", f"{__name__}.Own")


class Own(ValueError):
    pass


def uuid_error() -> Exception:
    return Own("secret")


def test_a_class_that_is_not_built_in_is_a_remote_error():
    error = arrived(Own("why"))
    assert (type(error), str(error)) == (RemoteError, f"{__name__}.Own: why")
    assert error.may_have_run is True


def test_the_file_names_of_system_errors_are_told_only_if_that_is_wanted():
    error = arrived(FileNotFoundError(2, "No such file", "/srv/secret"), paths=False)
    assert (type(error), str(error)) == (FileNotFoundError, "No such file")
    assert "/srv/secret" in str(arrived(FileNotFoundError(2, "No such file", "/srv/secret")))
    assert str(arrived(PermissionError("you may not"), paths=False)) == "you may not"


def test_the_traceback_goes_along_only_if_that_is_wanted():
    with pytest.raises(KeyError) as raised:
        raise KeyError("lost")
    error = arrived(raised.value, frames=True)
    assert arrived(raised.value).__cause__ is None
    assert error.args == ("lost",)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert 'raise KeyError("lost")' in str(error.__cause__)


class Odd(Exception):
    def __str__(self) -> str:
        raise SystemExit


class OddNumber(OSError):
    @property
    def errno(self) -> int:  # type: ignore[override]
        raise SystemError("no number")


def test_of_an_error_that_does_not_tell_its_text_the_name_arrives():
    error = arrived(OddNumber(2, "No such file", "/srv/secret"), paths=False)
    assert (type(error), str(error)) == (RemoteError, f"{__name__}.OddNumber")


@pytest.mark.parametrize("error", [Odd(), OSError(5, None), KeyError(5), ValueError("\ud800"), Own()])
def test_packing_an_error_never_fails(error):
    assert isinstance(arrived(error, frames=True), Exception)
    assert isinstance(arrived(error, paths=False), Exception)


def names_of_all() -> Iterator[str]:
    import builtins

    import doorpool

    yield from dir(builtins)
    yield from dir(doorpool)
    yield from (f"doorpool.{name}" for name in dir(doorpool))
    yield from (f"doorpool._errors.{name}" for name in dir(doorpool._errors))
    yield from ("", "a.b", "os.system", "\ud800".encode("utf-8", "replace").decode(), "x" * 100_000)


RAISED_AS_THEMSELVES = set(data._RAISED)


@pytest.mark.ids("B25")
@pytest.mark.parametrize("text", ["text", None, ""])
def test_only_a_fixed_table_of_classes_is_raised_by_name(text):
    """Every name there is in ``builtins`` and ``doorpool``."""
    for name in names_of_all():
        message = b"E" + msgspec.msgpack.encode([name, text, None])
        with pytest.raises(Exception) as caught:
            data.unpack_outcome(message, data.Arrivals([]))
        error = caught.value
        if name in RAISED_AS_THEMSELVES:
            assert type(error).__name__ == name
            assert type(error).__module__ == "builtins"
        else:
            assert type(error) is RemoteError
            assert error.may_have_run is True
        assert not isinstance(error, StopIteration | StopAsyncIteration | UnicodeDecodeError | Warning)


@pytest.mark.ids("B25")
def test_what_is_no_outcome_is_a_protocol_error_and_may_have_run():
    odd = [
        b"", b"\x80", b"Z", b"V", b"V\xc1", b"E\xc0", b"E\x92\xa1a\xc0", b"E\x93\x01\xc0\xc0", b"A\x05",
        b"R\xc0", b"V\x01\x01", b"V\xd4\x07\x00", pickle.dumps(5),
        b"E" + msgspec.msgpack.encode(["ValueError", "x", None, False]),
    ]  # fmt: skip
    for message in odd:
        with pytest.raises(ProtocolError) as caught:
            data.unpack_outcome(message, data.Arrivals([]))
        assert caught.value.may_have_run is True


# -- descriptors


def test_a_descriptor_arrives_where_it_was_in_the_arguments():
    reader, writer = os.pipe()
    with Descriptor(reader) as one, Descriptor(writer) as other:
        (got,), _ = crossed(taking(list[dict[str, Descriptor]]), [{"r": one, "w": other}])
        with got[0]["r"] as r, got[0]["w"] as w:
            assert r.fileno() not in (reader, writer)
            os.write(w.fileno(), b"through")
            assert os.read(r.fileno(), 10) == b"through"
        assert not one.closed


def test_a_closed_descriptor_is_not_sent():
    descriptor = Descriptor(os.dup(0))
    descriptor.close()
    with pytest.raises(MarshalError, match=r"args\[0\]\[0\] cannot cross.*closed"):
        data.pack_arguments(([descriptor],), {})


def test_so_many_objects_of_descriptors_and_no_more(monkeypatch):
    monkeypatch.setattr(data, "_MOST_EXTENSIONS", 2)
    with Descriptor(os.dup(0)) as one:
        (got,), _ = crossed(taking(list[Descriptor]), [one] * 3)
        for each in got:
            each.close()
        with pytest.raises(MarshalError, match="more than 2 objects of descriptors"):
            data.pack_arguments(([one] * 4,), {})


def test_what_is_not_made_of_one_descriptor_is_not_sent(monkeypatch):
    class Twin:
        pass

    def reduce(value: Any, luggage: data.Luggage) -> None:
        luggage.add(0)
        luggage.add(0)

    monkeypatch.setitem(data._kinds, Twin, data._Kind(100, reduce, lambda descriptor, passer: None))
    with pytest.raises(MarshalError, match=r"args\[0\] cannot.*Twin are not made of one descriptor"):
        data.pack_arguments((Twin(),), {})


@pytest.mark.parametrize("code", [-1, 1, 128])
def test_an_extension_is_registered_once_and_fits_into_seven_bits(code):
    class Late:
        pass

    with pytest.raises(ValueError, match=f"extension {code} is taken, or none"):
        data.register(Late, code, lambda value, luggage: None, lambda descriptor, passer: None)
    with pytest.raises(MarshalError, match="not plain data"):
        data.pack_arguments((Late(),), {})


def test_a_descriptor_that_its_extension_has_closed_is_not_given_back(monkeypatch):
    def rebuild(descriptor: Descriptor, passer: int | None, most: int) -> Any:
        descriptor.close()
        raise ValueError("of no use")

    monkeypatch.setitem(data._codes, 100, data._Kind(100, lambda value, luggage: None, rebuild))
    message = msgspec.msgpack.encode([[msgspec.msgpack.Ext(100, bytes(4))], {}])
    arrivals = data.Arrivals([os.dup(0)])
    with pytest.raises(MarshalError, match="of no use"):
        data.reading(arrivals, lambda: data.convert(taking(Any), *data.unpack_arguments(message)))
    assert arrivals.take_back() == []


def test_a_descriptor_that_is_named_twice_is_refused_and_given_back():
    extension = msgspec.msgpack.Ext(1, b"\x00\x00\x00\x00")
    message = msgspec.msgpack.encode([[[extension, extension]], {}])
    number = os.dup(0)
    arrivals = data.Arrivals([number])
    with pytest.raises(MarshalError, match="named twice"):
        data.reading(arrivals, lambda: data.convert(taking(Any), *data.unpack_arguments(message)))
    assert arrivals.take_back() == [number]
    os.close(number)


def test_what_the_message_does_not_name_is_left():
    number = os.dup(0)
    arrivals = data.Arrivals([number])
    data.reading(arrivals, lambda: data.convert(taking(Any), *data.unpack_arguments(b"\x92\x91\x01\x80")))
    assert arrivals.take_rest() == [number]
    os.close(number)


@pytest.mark.ids("H02")
@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("body", [b"", b"\0", b"\0\0", b"\0\0\0", b"\0\0\0\0\0", bytes(200)])
def test_a_descriptor_is_named_by_four_bytes_and_no_others(kind, body):
    """Fewer meant the first one, which nobody had named."""
    message = msgspec.msgpack.encode([[msgspec.msgpack.Ext(kind, body)], {}])
    number = os.dup(0)
    arrivals = data.Arrivals([number])
    with pytest.raises(MarshalError, match="four bytes"):
        data.reading(arrivals, lambda: data.convert(taking(Any), *data.unpack_arguments(message)))
    assert arrivals.take_back() == [number]
    os.close(number)


class Nested:
    """What an argument's own code makes of a message while the argument is read."""

    @staticmethod
    def read_another(_instance: Any, _field: Any, _value: Any) -> None:
        extension = msgspec.msgpack.Ext(1, b"\x00\x00\x00\x00")
        message = msgspec.msgpack.encode([[extension], {}])
        data.reading(data.Arrivals([]), lambda: data.convert(taking(Any), *data.unpack_arguments(message)))


@attrs.define
class Curious:
    x: int = attrs.field(validator=Nested.read_another)


def test_a_message_that_is_read_inside_another_has_none_of_its_descriptors():
    message = msgspec.msgpack.encode([[{"x": 1}], {}])
    number = os.dup(0)
    arrivals = data.Arrivals([number])
    with pytest.raises(MarshalError, match="no descriptor 0"):
        data.reading(arrivals, lambda: data.convert(taking(Curious), *data.unpack_arguments(message)))
    assert arrivals.take_back() == [number]
    os.close(number)
