"""
Objects through ``_marshal``: what arrives, by reference or by value, and what is said if not.

Whatever depends on which ``__main__`` the two sides run is shown between real processes; the
parcels travel as files.
"""

from __future__ import annotations

import array
import collections
import contextlib
import copyreg
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import ipaddress
import logging
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import types
import uuid
import zoneinfo
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import attrs
import cloudpickle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bare_environment
from support.described import described

from doorpool import _marshal, _passing
from doorpool._errors import BusyError, MarshalError, ProtocolError

ROOT = Path(__file__).resolve().parents[2]
HERE = _marshal.own_dialect()
ELSEWHERE = attrs.evolve(HERE, main=b"another script !")
OLDER = attrs.evolve(ELSEWHERE, python=(3, 1))


def carried(parcel: _marshal.Parcel) -> tuple[bytes, list[bytearray]]:
    """What a transport hands over: writable copies of the buffers."""
    return parcel[0], [bytearray(buffer) for buffer in parcel[1]]


def across(value: Any, to: _marshal.Dialect = HERE) -> Any:
    """Send it as an argument, and back as a result."""
    (came,), nothing = _marshal.unpack_arguments(*carried(_marshal.pack_arguments((value,), {}, to)))
    assert nothing == {}
    return _marshal.unpack_outcome(*carried(_marshal.pack_result(came, to)))


def refused(value: Any, to: _marshal.Dialect = HERE) -> str:
    """The words with which it is not let through, checked in both directions."""
    with pytest.raises(MarshalError) as arguments:
        _marshal.pack_arguments((value,), {}, to)
    with pytest.raises(MarshalError) as result:
        _marshal.pack_result(value, to)
    assert not arguments.value.may_have_run
    assert result.value.may_have_run
    text = str(arguments.value)
    assert str(result.value) == text.replace("args[0]", "result", 1)
    return text


# -- plain values


class Colour(enum.Enum):
    RED = 1


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Data:
    name: str
    parts: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    name: str
    value: Any


@attrs.define
class Attrs:
    name: str
    value: Any


class OldSlots:
    __slots__ = ("kept", "unset")

    def __init__(self, kept: Any) -> None:
        self.kept = kept

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OldSlots) and other.kept == self.kept

    __hash__ = None  # type: ignore[assignment]


class Text(str):
    pass


def plain_function(x: int) -> int:
    return x + 1


VALUES: list[Any] = [
    None, True, ..., NotImplemented, 0, -1, 2**200, 1.5, float("inf"), 1j, "", "é\udcff", b"", b"\x00\xff",
    bytearray(b"ab"), (), (1,), [1, [2]], {"a": {1: 2}}, {1, 2}, frozenset({1}), range(3), slice(1, 2, 3),
    int, type(None), type(...), len, plain_function, Data, Colour, Colour.RED, Flags.A | Flags.B, Point(1, 2),
    Data("a", [Data("b")]), Slotted("a", 1), Attrs("a", 2), OldSlots(3), Text("text"), str.upper,
    datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC), datetime.date(2020, 1, 2), datetime.timedelta(1),
    datetime.datetime(2020, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")),
    decimal.Decimal("1.10"), fractions.Fraction(1, 3), Path("/a/b"), PurePosixPath("a"), uuid.UUID(int=5),
    ipaddress.ip_address("127.0.0.1"), re.compile("a+"), collections.OrderedDict(a=1),
    dict.fromkeys, collections.Counter("aab"),
    collections.deque([1, 2], 3), collections.ChainMap({1: 2}), types.SimpleNamespace(a=1),
    collections.defaultdict(list, a=[1]), os.stat_result(range(10)), array.array("d", [1.5]),
    list[int], int | None,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{value!r:.20}")
def test_value_arrives_as_the_same_type(value: Any) -> None:
    came = across(value)
    assert type(came) is type(value)
    assert came == value


def test_long_bytes_by_keyword_arrive_beside_the_pickle() -> None:
    data, buffers, _ = _marshal.pack_arguments((), {"a": bytes(1_000_000), "b": 1}, HERE)
    assert len(data) < 1_000
    assert sum(each.nbytes for each in buffers) == 1_000_000
    args, kwargs = _marshal.unpack_arguments(data, [bytearray(each) for each in buffers])
    assert (args, kwargs) == ((), {"a": bytes(1_000_000), "b": 1})


def test_keywords_arrive() -> None:
    parcel = _marshal.pack_arguments((1,), {"x": 2, "y": Data("a")}, HERE)
    assert _marshal.unpack_arguments(*carried(parcel)) == ((1,), {"x": 2, "y": Data("a")})
    assert _marshal.unpack_arguments(_marshal.pack_arguments((), {"x": 2}, HERE)[0]) == ((), {"x": 2})


def test_what_pickle_carries_only_with_cloudpickle_arrives() -> None:
    logger = logging.getLogger("a.b")
    assert across(logger) is logger
    assert across(os) is os
    assert dict(across(types.MappingProxyType({1: 2}))) == {1: 2}
    assert list(across({1: 2}.keys())) == [1]
    assert across(functools.partial(plain_function, 2))() == 3
    assert across(Data("n").__eq__)(Data("n"))


def test_identity_and_rings_within_one_message_are_kept() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    came = across(ring)
    assert came[1] is came
    shared = Data("s")
    first, second = across([shared, shared])
    assert first is second


def test_messages_share_nothing() -> None:
    value = Data("same")
    first = _marshal.pack_result([value], HERE)
    assert _marshal.pack_result([value], HERE)[0] == first[0]
    assert across(value) is not across(value)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text() | st.integers(), inner, max_size=4),
        st.builds(Data, st.text(), st.lists(inner, max_size=3)),
        st.builds(Attrs, st.text(), inner),
        st.decimals(allow_nan=False).map(lambda value: [value]),
        st.datetimes().map(lambda value: {"at": value}),
    ),
    max_leaves=12,
)


@settings(max_examples=150)
@given(st.lists(json_like, max_size=3), st.dictionaries(st.text(), json_like, max_size=3))
def test_any_call_arrives_as_it_was(args: list[Any], kwargs: dict[str, Any]) -> None:
    parcel = _marshal.pack_arguments(tuple(args), kwargs, ELSEWHERE)
    assert repr(_marshal.unpack_arguments(*carried(parcel))) == repr((tuple(args), kwargs))
    result = _marshal.pack_result([args, kwargs], HERE)
    assert _marshal.unpack_outcome(*carried(result)) == [args, kwargs]


# -- buffers


def test_arrays_travel_beside_the_pickle_and_are_writable() -> None:
    numpy = pytest.importorskip("numpy")
    sent = numpy.arange(10_000.0).reshape(100, 100)
    parcel = _marshal.pack_arguments(([{"a": sent}, sent.T],), {}, HERE)
    assert len(parcel[0]) < 1000
    assert [buffer.nbytes for buffer in parcel[1]] == [80_000, 80_000]
    assert numpy.shares_memory(numpy.frombuffer(parcel[1][0]), sent), "no copy was made"
    ((came, turned),), _ = _marshal.unpack_arguments(*carried(parcel))
    assert (came["a"] == sent).all()
    assert (turned == sent.T).all()
    came["a"][0, 0] = 7
    assert sent[0, 0] == 0


@pytest.mark.parametrize(
    "shape", ["empty", "small", "sliced", "reversed", "column", "object", "records", "scalar"]
)
def test_arrays_of_any_layout_arrive(shape: str) -> None:
    numpy = pytest.importorskip("numpy")
    base = numpy.arange(20_000).reshape(100, 200)
    sent = {
        "empty": numpy.zeros((0, 3)),
        "small": numpy.arange(3),
        "sliced": base[::2, ::3],
        "reversed": base[::-1],
        "column": numpy.asfortranarray(base),
        "object": numpy.array([1, "a", None], dtype=object),
        "records": numpy.zeros(2000, dtype=[("a", "i4"), ("b", "f8")]),
        "scalar": numpy.float64(1.5),
    }[shape]
    came = across(sent)
    assert type(came) is type(sent)
    assert came.dtype == sent.dtype
    assert numpy.array_equal(came, sent)
    if shape != "scalar":
        assert came.flags.writeable


def test_read_only_array_stays_so() -> None:
    numpy = pytest.importorskip("numpy")
    sent = numpy.zeros(10_000)
    sent.flags.writeable = False
    assert not across(sent).flags.writeable


def test_bytes_further_inside_stay_inside() -> None:
    parcel = _marshal.pack_arguments(([b"x" * 100_000, bytearray(100_000)], b"x" * 60_000), {}, HERE)
    assert parcel[1] == ()


def test_long_bytes_that_are_an_argument_or_a_result_go_beside() -> None:
    long = bytes(range(256)) * 400
    data, buffers, _ = _marshal.pack_arguments((1, long, long), {"more": long}, HERE)
    assert len(data) < 1_000
    assert [view.nbytes for view in buffers] == [len(long)], "once, however often it is one"
    args, kwargs = _marshal.unpack_arguments(data, [bytearray(view) for view in buffers])
    assert (args, kwargs) == ((1, long, long), {"more": long})
    assert {type(value) for value in (*args[1:], kwargs["more"])} == {bytes}
    data, buffers, _ = _marshal.pack_result(long, HERE)
    assert len(data) < 1_000
    came = _marshal.unpack_outcome(data, [bytearray(view) for view in buffers])
    assert (came, type(came)) == (long, bytes)


@pytest.mark.parametrize(
    "view",
    [
        memoryview(b"abc"),
        memoryview(bytearray(10_000)),
        memoryview(b""),
        memoryview(array.array("d", range(1000))),
        memoryview(bytearray(range(12))).cast("B", (3, 4)),
        memoryview(bytearray(b"abcdef"))[::2],
        memoryview(array.array("i", range(6)))[::-1],
    ],
    ids=["readonly", "large", "empty", "double", "two dimensions", "strided", "reversed"],
)
def test_memoryview_arrives_as_one(view: memoryview) -> None:
    came = across(view)
    assert type(came) is memoryview
    assert came.tolist() == view.tolist()
    assert (came.format, came.shape, came.readonly) == (view.format, view.shape, view.readonly)


def test_data_may_be_any_bytes() -> None:
    data = _marshal.pack_result([1, Data("a")], HERE)[0]
    for kind in (bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))):
        assert _marshal.unpack_outcome(kind(data)) == [1, Data("a")]
    failure = _marshal.pack_exception(KeyError("k"), HERE)[0]
    for kind in (bytes, bytearray, memoryview, lambda data: memoryview(bytearray(data))):
        with pytest.raises(KeyError):
            _marshal.unpack_outcome(kind(failure))


# -- by value


def test_lambda_and_closure_come_by_value() -> None:
    factor = 3
    assert across(lambda x: x * factor)(2) == 6

    def fib(n: int) -> int:
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    assert across(fib)(10) == 55


def test_two_functions_of_one_message_share_their_globals() -> None:
    space: dict[str, Any] = {"__name__": "nowhere"}
    exec("n = 0\ndef up():\n    global n\n    n += 1\ndef get():\n    return n", space)
    up, get = across((space["up"], space["get"]))
    up()
    assert get() == 1
    assert space["get"]() == 0


def test_local_class_that_comes_home_is_the_class_it_was() -> None:
    class Local:
        count = 0

        def method(self) -> str:
            return "m"

    method = Local.method
    came = across([Local(), Local])
    assert type(came[0]) is Local
    assert came[1] is Local
    assert Local.method is method, "its methods are not replaced by copies"


def test_registered_module_goes_by_value() -> None:
    module = types.ModuleType("registered_for_test")
    exec("class Thing:\n    pass\ndef function():\n    return Thing", module.__dict__)
    sys.modules[module.__name__] = module
    cloudpickle.register_pickle_by_value(module)
    try:
        parcel = _marshal.pack_result([module.Thing(), module.function], HERE)  # type: ignore[attr-defined]
    finally:
        cloudpickle.unregister_pickle_by_value(module)
        del sys.modules[module.__name__]
    thing, function = _marshal.unpack_outcome(*carried(parcel))
    assert type(thing).__name__ == "Thing"
    assert callable(function)


class Registered:
    def __init__(self, value: int) -> None:
        self.value = value


def test_copyreg_is_heeded_also_later() -> None:
    copyreg.pickle(Registered, lambda value: (Registered, (value.value + 1,)))  # type: ignore[arg-type]
    try:
        assert across(Registered(1)).value == 3
    finally:
        del copyreg.dispatch_table[Registered]


@pytest.mark.parametrize("value", [lambda: 1, (lambda: 1).__code__, type("Dynamic", (), {})], ids=described)
def test_by_value_needs_the_same_python(value: Any) -> None:
    text = refused([value], OLDER)
    assert text.startswith("args[0][0]")
    assert "3.1" in text
    assert "{}.{}".format(*sys.version_info) in text
    assert "module that both can import" in text


def test_by_reference_does_not_need_the_same_python() -> None:
    parcel = _marshal.pack_arguments((Data("a"), plain_function), {}, OLDER)
    assert _marshal.unpack_arguments(*carried(parcel))[0] == (Data("a"), plain_function)


# -- what cannot cross


class Holder:
    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


class Hidden:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        if name == "__dict__":
            raise ZeroDivisionError
        return super().__getattribute__(name)


class Guarded:
    """What can be pickled up to its lock, and not be looked at by who writes the path to that."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        if sys._getframe(1).f_code is _marshal._item.__code__:
            raise ZeroDivisionError
        return Guarded


class StateOfItsOwn:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __getstate__(self) -> Any:
        return {"inner": {"deep": [self.lock]}}


class ReduceOfItsOwn:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return ReduceOfItsOwn, ([self.lock],)


class Key:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        raise ZeroDivisionError


def lock() -> Any:
    return threading.Lock()


LOST: dict[str, tuple[Callable[[], Any], str]] = {
    "itself": (lock, "args[0]"),
    "dict": (lambda: {"lock": lock()}, "args[0]['lock']"),
    "list": (lambda: [1, [2, lock()]], "args[0][1][1]"),
    "attribute": (lambda: Holder(config=Holder(lock=lock())), "args[0].config.lock"),
    "mixed": (lambda: {"a": [Holder(x={1: lock()})]}, "args[0]['a'][0].x[1]"),
    "slots": (lambda: OldSlots([lock()]), "args[0].kept[0]"),
    "dataclass": (lambda: Data("a", [lock()]), "args[0].parts[0]"),
    "frozen slots": (lambda: Slotted("a", lock()), "args[0].value"),
    "attrs": (lambda: Attrs("a", (lock(),)), "args[0].value[0]"),
    "namedtuple": (lambda: Point(1, lock()), "args[0][1]"),
    "ordered dict": (lambda: collections.OrderedDict(a=lock()), "args[0]['a']"),
    "deque": (lambda: collections.deque([1, lock()]), "args[0][1]"),
    "set": (lambda: {Key()}, "args[0]{<Key>}.lock"),
    "key": (lambda: {Key(): 1}, "args[0][key <Key>].lock"),
    "odd key": (lambda: {(1, Colour.RED): lock()}, "args[0][<tuple>]"),
    "long key": (lambda: {"x" * 100: lock()}, "args[0]['" + "x" * 56 + "...]"),
    "partial": (lambda: functools.partial(print, lock()), "args[0].args[0]"),
    "bound method": (lambda: Holder(lock=lock()).__eq__, "args[0]"),
    "closure": (lambda: (lambda held: lambda: held)(lock()), "args[0].__closure__[0]"),
    "getstate": (lambda: StateOfItsOwn(), "args[0].inner['deep'][0]"),
    "reduce": (lambda: ReduceOfItsOwn(), "args[0]"),
    "no dict": (lambda: Hidden(), "args[0]"),
    "exception": (lambda: ValueError(lock()), "args[0]"),
    "mappingproxy": (lambda: types.MappingProxyType({"a": lock()}), "args[0]"),
}


@pytest.mark.parametrize("kind", LOST)
def test_what_cannot_cross_is_named_with_its_path(kind: str) -> None:
    make, path = LOST[kind]
    text = refused(make())
    if kind in ("bound method", "reduce", "no dict", "exception", "mappingproxy"):
        assert text.startswith(path)
    else:
        assert text == f"{path} cannot cross the door: cannot pickle '_thread.lock' object"


def test_what_does_not_let_itself_be_looked_at_is_told_without_a_path() -> None:
    with pytest.raises(
        MarshalError, match=r"^args cannot cross the door: cannot pickle '_thread.lock' object"
    ):
        _marshal.pack_arguments((Guarded(),), {}, HERE)
    with pytest.raises(
        MarshalError, match=r"^result cannot cross the door: cannot pickle '_thread.lock' obj"
    ):
        _marshal.pack_result(Guarded(), HERE)


def test_paths_of_positions_and_keywords() -> None:
    with pytest.raises(
        MarshalError, match=r"^args\[1\]\['lock'\] cannot cross the door: cannot pickle '_thread.lock'"
    ):
        _marshal.pack_arguments((1, {"lock": lock()}), {}, HERE)
    with pytest.raises(MarshalError, match=r"^kwargs\['x'\]\.attr cannot cross"):
        _marshal.pack_arguments((1,), {"x": Holder(attr=lock())}, HERE)
    with pytest.raises(MarshalError, match=r"^result\[3\] cannot cross"):
        _marshal.pack_result([0, 1, 2, lock()], HERE)


def test_cause_of_a_refusal_is_the_original_error() -> None:
    class StateRaises:
        def __getstate__(self) -> Any:
            raise LookupError("no state today")

    with pytest.raises(MarshalError) as info:
        _marshal.pack_arguments((1, [StateRaises()]), {}, HERE)
    assert type(info.value.__cause__) is LookupError
    text = str(info.value)
    assert text.startswith("args[1][0] (of type ")
    assert text.endswith("StateRaises) cannot cross the door: LookupError: no state today")


def test_files_in_memory_are_refused_by_path_and_type() -> None:
    """A file that is more than its descriptor; those that are not cross (``public/test_passing.py``)."""
    text = io.TextIOWrapper(io.BytesIO())
    assert "args[0]['f']" in refused({"f": text})
    assert "TextIOWrapper" in refused(text)
    assert "BufferedReader" in refused(io.BufferedReader(io.BytesIO()))  # type: ignore[type-var]
    assert "args[0][0]" in refused([sys.stdout])  # pytest's own


def test_memoryview_that_cannot_be_made_again_is_refused() -> None:
    numpy = pytest.importorskip("numpy")
    assert "format" in refused([memoryview(numpy.zeros(3, dtype=[("a", "i4"), ("b", "f8")]))])


def test_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(MarshalError, match=r"^args\[1\] cannot cross the door: it is nested too deeply"):
        _marshal.pack_arguments((1, deep), {}, HERE)
    with pytest.raises(MarshalError, match=r"^result\[0\] cannot cross the door: it is nested too deeply"):
        _marshal.pack_result(deep, HERE)
    while deep:  # not left to the deallocator of lists in lists
        deep = deep[0]


class Endless:
    def __reduce__(self) -> Any:
        return Endless, (Endless(),)


def test_endless_reduction_is_refused() -> None:
    with pytest.raises(MarshalError, match="nested too deeply"):
        _marshal.pack_arguments((Endless(),), {}, HERE)


def test_out_of_memory_is_refused() -> None:
    class Huge:
        def __reduce__(self) -> Any:
            raise MemoryError

    with pytest.raises(MarshalError, match="there is not enough memory"):
        _marshal.pack_arguments((Huge(),), {}, HERE)


def test_lock_deeper_than_the_search_gets_is_told_without_a_path() -> None:
    deep: list[Any] = [lock()]
    for _ in range(400):
        deep = [deep]
    with pytest.raises(MarshalError, match=r"cannot pickle '_thread.lock'|nested too deeply"):
        _marshal.pack_arguments((deep,), {}, HERE)


def test_interrupt_is_not_swallowed() -> None:
    class Interrupted:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    for pack in (lambda: _marshal.pack_arguments((Interrupted(),), {}, HERE),
                 lambda: _marshal.pack_result(Interrupted(), HERE)):  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            pack()
    assert across(Data("still works")) == Data("still works")


class FailsOnce:
    failed = False

    def __reduce__(self) -> Any:
        if not FailsOnce.failed:
            FailsOnce.failed = True
            raise ValueError("the first time")
        return FailsOnce, ()


def test_failure_that_does_not_come_again_is_told_without_a_path() -> None:
    with pytest.raises(MarshalError, match="an argument cannot cross the door: ValueError: the first time"):
        _marshal.pack_arguments((FailsOnce(),), {}, HERE)


def test_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_marshal, "_SEARCH", 50)
    with pytest.raises(
        MarshalError, match=r"^an argument cannot cross the door: cannot pickle '_thread.lock'"
    ):
        _marshal.pack_arguments(([[n] for n in range(100)], lock()), {}, HERE)


def test_failed_pickle_leaves_nothing_behind() -> None:
    _marshal._idle.clear()
    with pytest.raises(MarshalError):
        _marshal.pack_result([bytearray(10_000), Data("x"), lock()], HERE)
    assert across([1, Data("y")]) == [1, Data("y")]
    (pickler,) = _marshal._idle
    assert pickler.buffers == []
    assert pickler.out.getvalue() == b""


def test_pickler_keeps_no_object_alive() -> None:
    import weakref

    value = Data("watched")
    watch = weakref.ref(value)
    _marshal.pack_result([value], HERE)
    with pytest.raises(MarshalError):
        _marshal.pack_result([value, lock()], HERE)
    del value
    assert watch() is None


class Nests:
    """Marshals something else while it is marshalled itself, as a user's class may."""

    def __reduce__(self) -> Any:
        return bytes, (_marshal.pack_result([Data("inner")], HERE)[0],)


def test_pickling_may_nest() -> None:
    came = across([Nests(), Data("outer")])
    assert _marshal.unpack_outcome(came[0]) == [Data("inner")]
    assert came[1] == Data("outer")


def test_threads_do_not_meet() -> None:
    wrong: list[Any] = []

    def work(number: int) -> None:
        for turn in range(200):
            value = [Data(f"{number}.{turn}"), {number: turn}]
            if across(value) != value:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(_marshal._idle) <= 16


# -- what cannot be rebuilt


class SetStateRaises:
    def __init__(self, kind: type[Exception]) -> None:
        self.kind = kind

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise state["kind"]("from the setter")


@pytest.mark.parametrize(
    "kind",
    [ValueError, AttributeError, ImportError, EOFError, pickle.UnpicklingError, RecursionError, BusyError],
)
def test_error_of_a_setstate_is_a_marshal_error(kind: type[Exception]) -> None:
    value = SetStateRaises(kind)
    with pytest.raises(MarshalError, match=f"{kind.__name__}: from the setter") as info:
        _marshal.unpack_arguments(_marshal.pack_arguments((value,), {}, HERE)[0])
    assert not info.value.may_have_run
    assert type(info.value.__cause__) is kind
    with pytest.raises(MarshalError, match=f"{kind.__name__}: from the setter") as info:
        _marshal.unpack_outcome(_marshal.pack_result(value, HERE)[0])
    assert info.value.may_have_run


def test_what_cannot_be_imported_by_another_dialect_of_pickle_is_told_in_its_words() -> None:
    """One whose memo is written to by number, as ours never is: which name it was, pickle alone can say."""
    data = b"\x80\x02X\x01\x00\x00\x00aq\x00h\x00cno_such_module\nthing\n\x86."
    with pytest.raises(
        MarshalError, match=r"ModuleNotFoundError: No module named 'no_such_module'; "
    ) as info:
        _marshal.unpack_outcome(data)
    assert _marshal._REMEDIES in str(info.value)
    assert "cannot import" not in str(info.value).replace(_marshal._REMEDIES, "")


@pytest.mark.parametrize("gone", ["module", "attribute"])
def test_what_cannot_be_imported_is_named_with_the_remedies(gone: str) -> None:
    module = types.ModuleType("goes_away")
    exec("class Outer:\n    class Thing: pass", module.__dict__)
    sys.modules["goes_away"] = module
    try:
        thing = [Data("x"), module.Outer.Thing()]  # type: ignore[attr-defined]
        arguments, result = _marshal.pack_arguments((thing,), {}, HERE), _marshal.pack_result(thing, HERE)
        if gone == "attribute":
            del module.Outer  # type: ignore[attr-defined]
        else:
            del sys.modules["goes_away"]
        with pytest.raises(MarshalError) as first:
            _marshal.unpack_arguments(arguments[0])
        with pytest.raises(MarshalError) as second:
            _marshal.unpack_outcome(memoryview(result[0]))
    finally:
        sys.modules.pop("goes_away", None)
    assert not first.value.may_have_run
    assert second.value.may_have_run
    for error in (first, second):
        assert "cannot import 'Outer.Thing' from 'goes_away'" in str(error.value)
        assert "module that both sides can import" in str(error.value)
        assert "cloudpickle.register_pickle_by_value" in str(error.value)


MALFORMED = [
    b"",
    b"\x80",
    b"\x80\x05",
    b"\x80\x05.",
    b"garbage",
    b"\x80\xff.",
    b"\x80\x05h\x07.",
    b"\x80\x05\x97.",
    b"X",
]


@pytest.mark.parametrize("data", MALFORMED)
def test_malformed_bytes_are_an_error_of_the_library(data: bytes) -> None:
    with pytest.raises((ProtocolError, MarshalError)) as info:
        _marshal.unpack_arguments(data)
    assert not info.value.may_have_run
    with pytest.raises((ProtocolError, MarshalError)) as info:
        _marshal.unpack_outcome(data)
    assert info.value.may_have_run


@pytest.mark.parametrize("value", [None, (), ((),), ([], {}), ((), []), ((), {}, 1)])
def test_what_are_no_arguments_is_a_protocol_error(value: object) -> None:
    with pytest.raises(ProtocolError):
        _marshal.unpack_arguments(pickle.dumps(value))


def test_missing_buffers_are_a_protocol_error() -> None:
    numpy = pytest.importorskip("numpy")
    parcel = _marshal.pack_result([numpy.zeros(10_000)], HERE)
    with pytest.raises(ProtocolError):
        _marshal.unpack_outcome(parcel[0], [])


@pytest.mark.parametrize("data", [b"E\x80\x05N.", b"R\x80\x05N.", b"", b"Z"])
def test_descriptors_beside_what_is_no_result_are_closed(data: bytes) -> None:
    read, write = os.pipe()
    came = [read]
    try:
        with pytest.raises(ProtocolError) as info:
            _marshal.unpack_outcome(data, (), came)
        assert info.value.may_have_run
        assert came == []
        with pytest.raises(BrokenPipeError):
            os.write(write, b"nobody reads")
    finally:
        os.close(write)


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_garbage_never_raises_anything_else(data: bytes) -> None:
    for unpack in (_marshal.unpack_arguments, _marshal.unpack_outcome):
        for start in (b"", b"\x80\x05", b"E\x80\x05", b"R\x80\x05"):
            # A pickle may name what runs; this test sends only what cannot.
            if not set(data) & set(b"cRibo\x81\x92\x93\x82\x83\x84PQ"):
                with contextlib.suppress(ProtocolError, MarshalError):
                    unpack(start + data)


def test_every_run_of_the_unpickler_is_counted() -> None:
    before = _marshal.unpickled
    _marshal.unpack_outcome(_marshal.pack_result(1, HERE)[0])
    _marshal.unpack_arguments(_marshal.pack_arguments((1,), {}, HERE)[0])
    assert _marshal.unpickled == before + 2
    with pytest.raises(MarshalError):
        _marshal.unpack_outcome(b"\x80\xff")
    assert _marshal.unpickled == before + 3
    _marshal.pack_exception(ValueError(lock()), HERE)
    with pytest.raises(MarshalError):
        _marshal.pack_result(lock(), HERE)
    assert _marshal.unpickled == before + 3, "packing never unpickles"


# -- dialects


def test_dialect_without_a_main_shares_it_with_nobody() -> None:
    none = _marshal.Dialect(HERE.python, bytes(16))
    assert not none.shares_main()
    assert not _marshal.Dialect(HERE.python, b"").shares_main()


def test_dialect_follows_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dialect(file: object) -> bytes:
        main = types.ModuleType("__main__")
        if file is not None:
            main.__file__ = file  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, "__main__", main)
        return _marshal.own_dialect().main

    script = tmp_path / "a.py"
    script.write_text("")
    copy = tmp_path / "b.py"
    copy.write_text("")
    link = tmp_path / "c.py"
    link.symlink_to(script)
    fifo = tmp_path / "d.py"
    os.mkfifo(fifo)
    first = dialect(str(script))
    assert len(first) == 16
    assert any(first)
    assert dialect(str(link)) == first
    assert dialect(str(copy)) != first
    os.utime(script, ns=(1, 1))
    assert dialect(str(script)) != first
    for nothing in (None, str(tmp_path / "no"), str(fifo), str(tmp_path), 5, "a\0b"):
        assert dialect(nothing) == bytes(16)


def test_dialect_is_of_the_script_as_it_was_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text("")
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    first = _marshal.own_dialect()
    os.utime(script, ns=(1, 1))
    assert _marshal.own_dialect() is first


# -- between processes

PRELUDE = """
import os, pickle, sys
from doorpool import _marshal, _passing
from doorpool._errors import *

def give(path, value):
    with open(path, "wb") as file:
        pickle.dump(value, file)

def take(path):
    with open(path, "rb") as file:
        return pickle.load(file)

def say(*words):
    print(*words, flush=True)
"""


def run(script: Path | str, *args: object, path: tuple[Path, ...] = ()) -> list[str]:
    """Run a script, or the text of one by ``-c``; return what it printed."""
    start = ["-c", script] if isinstance(script, str) else [str(script)]
    search = ":".join(map(str, (ROOT, *path)))
    done = subprocess.run(
        [sys.executable, *start, *map(str, args)],
        env=bare_environment() | {"PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    script = folder / name
    script.write_text(PRELUDE + textwrap.dedent(text))
    return script


CLIENT = """
class Config:
    side = "client"
    def __init__(self, value): self.value = value
    def twice(self): return 2 * self.value
def function(config):
    return Config(config.value + 1)
if __name__ == "__main__":
    role, folder = sys.argv[1:]
    at = lambda name: os.path.join(folder, name)
    if role == "hello":
        give(at("client"), (_marshal.own_dialect().python, _marshal.own_dialect().main))
    elif role == "call":
        # One process that calls: it writes the request, runs the server, reads the reply.
        import subprocess
        to = _marshal.Dialect(*take(at("server")))
        give(at("me"), (_marshal.own_dialect().python, _marshal.own_dialect().main))
        request = _marshal.pack_arguments((Config(4), function), {}, to)
        give(at("request"), request[0])
        subprocess.run([sys.executable, take(at("server.path")), "serve", folder], check=True)
        result = _marshal.unpack_outcome(take(at("reply")))
        say(type(result) is Config, result.value, Config.twice.__globals__ is globals())
"""

SERVER = """
class Config:
    side = "server"
if __name__ == "__main__":
    role, folder = sys.argv[1:]
    at = lambda name: os.path.join(folder, name)
    if role == "hello":
        give(at("server"), (_marshal.own_dialect().python, _marshal.own_dialect().main))
    else:
        to = _marshal.Dialect(*take(at("me")))
        (config, function), _ = _marshal.unpack_arguments(take(at("request")))
        (again, _), _ = _marshal.unpack_arguments(take(at("request")))
        assert type(config) is type(again), "a class sent twice is one class"
        give(at("seen"), (config.side, isinstance(config, Config), config.twice()))
        give(at("reply"), _marshal.pack_result(function(config), to)[0])
"""


def test_two_scripts_each_with_its_own_config(tmp_path: Path) -> None:
    client, server = write(tmp_path, "client.py", CLIENT), write(tmp_path, "server.py", SERVER)
    (tmp_path / "server.path").write_bytes(pickle.dumps(str(server)))
    run(server, "hello", tmp_path)
    assert run(client, "call", tmp_path) == ["True 5 True"]
    assert pickle.loads((tmp_path / "seen").read_bytes()) == ("client", False, 8)


BOTH = """
import enum
class Config:
    class Part: pass
    def method(self): return "method"
class Colour(enum.Enum):
    RED = 1
class Failure(Exception):
    def __init__(self, *, code): self.code = code
def function(): return Config
if __name__ == "__main__":
    role, out = sys.argv[1:]
    if role == "send":
        to = _marshal.own_dialect()
        values = [Config(), Config.Part(), Colour.RED, function, Config.method, Config().method]
        parcel = _marshal.pack_arguments((values,), {}, to)
        assert b"_main_attribute" in parcel[0] and b"_make_skeleton" not in parcel[0]
        give(out, (to.main, parcel[0], _marshal.pack_exception(Failure(code=4), to)[0]))
    else:
        main, arguments, failure = take(out)
        assert main == _marshal.own_dialect().main and any(main)
        ([config, part, colour, f, method, bound],), _ = _marshal.unpack_arguments(arguments)
        assert isinstance(config, Config) and isinstance(part, Config.Part) and colour is Colour.RED
        assert f is function and method is Config.method and bound() == "method"
        try:
            _marshal.unpack_outcome(failure)
        except Failure as error:
            say("caught", error.code)
"""


def test_one_script_in_both_roles(tmp_path: Path) -> None:
    script = write(tmp_path, "both.py", BOTH)
    run(script, "send", tmp_path / "out")
    assert run(script, "take", tmp_path / "out") == ["caught 4"]


SPAWN = """
import multiprocessing
class Config:
    def __init__(self, value): self.value = value
def child(main, request, out):
    mine = _marshal.own_dialect()
    assert Config.__module__ == "__mp_main__"
    (config,), _ = _marshal.unpack_arguments(request)
    assert type(config) is Config
    far = _marshal.Dialect(mine.python, b"another script !")
    give(out, (mine.main == main, _marshal.pack_result(Config(config.value + 1), mine)[0],
               _marshal.pack_result(Config(7), far)[0]))
if __name__ == "__main__":
    out = sys.argv[1]
    me = _marshal.own_dialect()
    request = _marshal.pack_arguments((Config(1),), {}, me)[0]
    process = multiprocessing.get_context("spawn").Process(target=child, args=(me.main, request, out))
    process.start()
    process.join()
    same, near, far = take(out)
    result = _marshal.unpack_outcome(near)
    say(same, type(result) is Config, result.value, b"_make_skeleton_class" in far)
"""


def test_spawned_child_and_parent_share_their_main(tmp_path: Path) -> None:
    script = write(tmp_path, "spawn.py", SPAWN)
    assert run(script, tmp_path / "out") == ["True True 2 True"]


def test_prompt_and_dash_c_have_no_main(tmp_path: Path) -> None:
    text = PRELUDE + textwrap.dedent(
        """
        class Config:
            value = 3
        me = _marshal.own_dialect()
        give(sys.argv[1], _marshal.pack_result(Config(), me)[0])
        say(any(me.main), me.shares_main())
        """
    )
    out = tmp_path / "out"
    assert run(text, out) == ["False False"]
    came = _marshal.unpack_outcome(pickle.loads(out.read_bytes()))
    assert type(came).__name__ == "Config"
    assert came.value == 3


def test_name_defined_only_in_the_senders_run_of_the_script(tmp_path: Path) -> None:
    script = write(
        tmp_path,
        "late.py",
        """
        role, out = sys.argv[1:]
        if role == "send":
            class Late: pass
            give(out, _marshal.pack_arguments((Late(),), {}, _marshal.own_dialect())[0])
        else:
            try:
                _marshal.unpack_arguments(take(out))
            except MarshalError as error:
                say(error, error.may_have_run)
        """,
    )
    run(script, "send", tmp_path / "out")
    (line,) = run(script, "take", tmp_path / "out")
    assert "cannot import 'Late' from '__main__'" in line
    assert "register_pickle_by_value" in line
    assert line.endswith("False")


def test_module_that_only_the_sender_has_and_its_remedy(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    lib.mkdir()
    (lib / "helpers.py").write_text("class Thing:\n    size = 4\n")
    script = write(
        tmp_path,
        "send.py",
        """
        import cloudpickle, helpers
        if sys.argv[2] == "value":
            cloudpickle.register_pickle_by_value(helpers)
        to = _marshal.Dialect(sys.version_info[:2], b"another script !")
        give(sys.argv[1], _marshal.pack_arguments((helpers.Thing(),), {}, to)[0])
        """,
    )
    run(script, tmp_path / "out", "reference", path=(lib,))
    with pytest.raises(
        MarshalError, match=r"cannot import 'Thing' from 'helpers'.*No module named 'helpers'"
    ):
        _marshal.unpack_arguments(pickle.loads((tmp_path / "out").read_bytes()))
    run(script, tmp_path / "out", "value", path=(lib,))
    (thing,), _ = _marshal.unpack_arguments(pickle.loads((tmp_path / "out").read_bytes()))
    assert thing.size == 4


def test_what_is_used_of_cloudpickle_is_there() -> None:
    from cloudpickle import cloudpickle as private

    for name in ("_class_reduce", "_class_setstate", "_code_reduce", "_dynamic_class_reduce",
                 "_should_pickle_by_reference"):  # fmt: skip
        assert callable(getattr(private, name))
    assert callable(cloudpickle.Pickler(io.BytesIO())._dynamic_function_reduce)
    assert io.TextIOWrapper in cloudpickle.Pickler.dispatch_table
    assert type(_marshal._TABLE[io.TextIOWrapper]) is _passing.Kind, (
        "the file crosses, and no copy of its text"
    )
