"""
Exceptions through ``_marshal``: as themselves where that can be, as a ``RemoteError`` where not.

A round trip in one process shows what is rebuilt; what depends on which classes the two
sides know is shown between two processes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import traceback
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from support import bare_environment

from doorpool import _errors, _exceptions, _marshal
from doorpool._errors import (
    BusyError,
    LimitError,
    MarshalError,
    ProtocolError,
    RemoteError,
    RemoteTraceback,
    RevokedError,
)

ROOT = Path(__file__).resolve().parents[2]
HERE = _marshal.own_dialect()
ELSEWHERE = attrs.evolve(HERE, main=b"another script !")


def arrive(error: BaseException, to: _marshal.Dialect = HERE) -> Any:
    """Raise it, pack it, unpack it, catch what comes."""
    try:
        raise error
    except BaseException as caught:
        parcel = _marshal.pack_exception(caught, to)
    assert parcel[0][0] != 0x80
    return opened(parcel)


def opened(parcel: _marshal.Parcel) -> Any:
    try:
        _marshal.unpack_outcome(parcel[0], parcel[1])
    except BaseException as error:
        return error
    pytest.fail("nothing was raised")


def last_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


# -- a table of kinds


class QuotaError(Exception):
    def __init__(self, user: str, limit: int) -> None:
        super().__init__(f"{user} is over {limit}")
        self.user, self.limit = user, limit


class KeywordError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class SlotError(ValueError):
    __slots__ = ("__private", "place", "unset")

    def __init__(self, place: int) -> None:
        super().__init__("no such place")
        self.place = place
        self.__private = place + 1

    def private(self) -> int:
        return self.__private


class BareError(Exception):
    def __init__(self, a: int, b: int) -> None:  # no super().__init__()
        self.sum = a + b


class InitRaises(Exception):
    ready = False

    def __init__(self) -> None:
        if self.ready:
            raise RuntimeError("not twice")
        super().__init__("once")


class PathError(FileNotFoundError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "no such thing", path)
        self.path = path


class MixedError(OSError, RuntimeError):
    pass


class OwnReduce(Exception):
    def __init__(self, left: int, right: int) -> None:
        super().__init__(f"{left}/{right}")
        self.left, self.right = left, right

    def __reduce__(self) -> Any:
        return OwnReduce, (self.left, self.right)


class StateError(Exception):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path, self.lock = path, threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, lock=threading.Lock())


class SlotStateError(Exception):
    """A state of its own without a way to set it, as plain classes may have: pickle knows both shapes."""

    __slots__ = ("place",)

    def __init__(self, place: int, *, pair: bool) -> None:
        super().__init__(place)
        self.place, self.pair = place, pair

    def __getstate__(self) -> Any:
        attributes = {"pair": self.pair}
        return (attributes, {"place": self.place}) if self.pair else attributes


class NewGroup(ExceptionGroup[Exception]):
    def __new__(cls, errors: list[Exception], code: int) -> NewGroup:
        made = super().__new__(cls, "made", errors)
        made.code = code
        return made

    code: int


class PropertyError(OSError):
    @property
    def filename(self) -> str:  # type: ignore[override]
        return "always"


@dataclasses.dataclass
class DataError(Exception):
    what: str
    how: int = 3


@dataclasses.dataclass(frozen=True)
class FrozenDataError(Exception):
    what: str


@attrs.define(auto_exc=True)
class AttrsError(Exception):
    what: str
    how: int = 3


@attrs.frozen
class FrozenAttrsError(Exception):
    what: str


Pair = namedtuple("Pair", "left right")


def _caught(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError


def _mutated() -> SyntaxError:
    error = _caught(lambda: compile("a b", "x.py", "exec"))
    assert isinstance(error, SyntaxError)
    error.lineno = 77
    return error


def _noted() -> ValueError:
    error = ValueError("noted")
    error.add_note("first")
    error.add_note("second")
    return error


def _attributed() -> ValueError:
    error = ValueError("v")
    error.extra = {"deep": [1, 2]}  # type: ignore[attr-defined]
    return error


def _with_other_arguments() -> UnicodeDecodeError:
    error = _caught(lambda: b"\xff".decode())
    assert isinstance(error, UnicodeDecodeError)
    error.args = ("not what it takes",)
    return error


def _renamed() -> OSError:
    error = OSError(5, "I/O")
    error.filename = "later"
    return error


KINDS: dict[str, tuple[Callable[[], BaseException], tuple[str, ...]]] = {
    "ValueError": (lambda: ValueError("bad", 3), ()),
    "no arguments": (lambda: ValueError(), ()),
    "KeyError": (lambda: KeyError("k"), ()),
    "OSError": (lambda: OSError(2, "no", "a"), ("errno", "strerror", "filename", "filename2")),
    "OSError two": (lambda: OSError(18, "x", "a", None, "b"), ("errno", "filename", "filename2")),
    "OSError later": (_renamed, ("filename",)),
    "FileNotFoundError": (lambda: _caught(lambda: os.stat("/no/such")), ("filename", "errno")),
    "PathError": (lambda: PathError("p"), ("filename", "errno", "path")),
    "MixedError": (lambda: MixedError(3, "mixed"), ("errno", "strerror")),
    "PropertyError": (lambda: PropertyError(3, "x", "file"), ("filename", "errno")),
    "BlockingIOError": (lambda: BlockingIOError(11, "again", 7), ("characters_written",)),
    "TimeoutError": (lambda: TimeoutError("late"), ()),
    "UnicodeDecodeError": (
        lambda: _caught(lambda: b"\xff".decode()),
        ("encoding", "object", "start", "end", "reason"),
    ),
    "SyntaxError": (_mutated, ("msg", "filename", "lineno", "offset", "text", "end_lineno")),
    "ImportError": (lambda: ImportError("no", name="n", path="p"), ("name", "path", "msg")),
    "ModuleNotFoundError": (lambda: _caught(lambda: __import__("no_such_module")), ("name",)),
    "AttributeError": (lambda: _caught(lambda: object().nothing), ("name",)),  # type: ignore[attr-defined]
    "NameError": (lambda: _caught(lambda: nothing_such), ("name",)),  # type: ignore[name-defined]  # noqa: F821
    "StopIteration": (lambda: StopIteration(5), ("value",)),
    "RecursionError": (lambda: RecursionError("deep"), ()),
    "notes": (_noted, ("__notes__",)),
    "attributes": (_attributed, ("extra",)),
    "slots": (lambda: SlotError(4), ("place", "_SlotError__private")),
    "QuotaError": (lambda: QuotaError("ann", 3), ("user", "limit")),
    "keyword only": (lambda: KeywordError(code=4), ("code",)),
    "no super": (lambda: BareError(1, 2), ("sum",)),
    "init raises": (lambda: InitRaises(), ()),
    "dataclass": (lambda: DataError("w", 4), ("what", "how")),
    "frozen dataclass": (lambda: FrozenDataError("w"), ("what",)),
    "attrs": (lambda: AttrsError("w", 4), ("what", "how")),
    "frozen attrs": (lambda: FrozenAttrsError("w"), ("what",)),
    "namedtuple": (lambda: ValueError(Pair(1, 2)), ()),
    "own reduce": (lambda: OwnReduce(1, 2), ("left", "right")),
    "own state": (lambda: StateError("p"), ("path",)),
    "own state of slots": (lambda: SlotStateError(4, pair=True), ("place", "pair")),
    "own state of attributes": (lambda: SlotStateError(4, pair=False), ("pair",)),
    "other arguments": (_with_other_arguments, ("encoding", "object", "start", "end", "reason")),
    "CalledProcessError": (
        lambda: subprocess.CalledProcessError(3, ["x"], b"out", b"err"),
        ("returncode", "cmd", "stdout", "stderr"),
    ),
    "JSONDecodeError": (lambda: _caught(lambda: json.loads("{")), ("doc", "pos", "lineno", "msg")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_exception_arrives_as_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, names = KINDS[kind]
    sent = make()
    monkeypatch.setattr(InitRaises, "ready", True)
    came = arrive(sent)
    assert type(came) is type(sent)
    assert came is not sent
    assert came.args == sent.args
    assert str(came) == str(sent)
    for name in names:
        assert getattr(came, name) == getattr(sent, name), name
    assert set(vars(came)) == set(vars(sent))
    assert isinstance(came.__cause__, RemoteTraceback)
    assert "test_marshal_exceptions.py" in str(came.__cause__)
    assert type(sent).__name__ in str(came.__cause__)


def test_exception_whose_first_base_is_not_the_one_of_its_layout_arrives() -> None:
    class LayoutError(RuntimeError, OSError):
        pass

    came = arrive(LayoutError(3, "mixed"))
    assert type(came) is LayoutError
    assert came.args == (3, "mixed")


def test_attribute_error_leaves_its_object_at_home() -> None:
    holder = threading.Lock()
    came = arrive(_caught(lambda: holder.nothing))  # type: ignore[attr-defined]
    assert type(came) is AttributeError
    assert came.name == "nothing"
    assert came.obj is None


def test_exception_of_a_local_class_comes_by_value() -> None:
    class LocalError(QuotaError):
        pass

    came = arrive(LocalError("bob", 1))
    assert type(came) is LocalError  # it has come home
    assert came.user == "bob"


# -- groups


def test_group_arrives_with_its_members_and_their_causes() -> None:
    inner = ExceptionGroup("inner", [QuotaError("ann", 1), KeyError("k")])
    member = ValueError("v")
    member.__cause__ = OSError(2, "gone")
    member.add_note("look")
    came = arrive(ExceptionGroup("outer", [member, inner]))
    assert type(came) is ExceptionGroup
    assert came.message == "outer"
    assert came.args == ("outer", list(came.exceptions))
    first, second = came.exceptions
    assert type(first) is ValueError
    assert first.__notes__ == ["look"]
    assert first.__cause__.errno == 2
    assert [type(each) for each in second.exceptions] == [QuotaError, KeyError]
    assert second.exceptions[0].user == "ann"


def test_group_with_a_constructor_of_its_own_arrives() -> None:
    came = arrive(NewGroup([ValueError("a")], 7))
    assert type(came) is NewGroup
    assert (came.message, came.code, came.exceptions[0].args) == ("made", 7, ("a",))


def test_group_as_a_value_arrives_with_its_members() -> None:
    """Not as what is raised: a group whose ``__new__`` takes something else is made of its members."""
    (came,) = _marshal.unpack_outcome(_marshal.pack_result([NewGroup([ValueError("v")], 7)], HERE)[0])
    assert type(came) is NewGroup
    assert (came.message, came.code) == ("made", 7)
    assert [(type(each), each.args) for each in came.exceptions] == [(ValueError, ("v",))]


def test_group_of_too_many_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_exceptions, "MAX_NODES", 4)
    assert len(arrive(ExceptionGroup("g", [ValueError(n) for n in range(3)])).exceptions) == 3
    came = arrive(ExceptionGroup("g", [ValueError(n) for n in range(4)]))
    assert type(came) is RemoteError
    assert came.type_name == "ExceptionGroup"
    assert "more than 4 exceptions" in came.__notes__[-1]


def test_one_exception_twice_in_a_group_is_one() -> None:
    error = ValueError("twice")
    came = arrive(ExceptionGroup("g", [error, error]))
    assert came.exceptions[0] is came.exceptions[1]


def test_member_that_cannot_cross_does_not_spoil_the_group() -> None:
    bad = ValueError(threading.Lock())
    came = arrive(ExceptionGroup("g", [bad, KeyError("k"), BusyError("later")]))
    first, second, third = came.exceptions
    assert type(first) is RemoteError
    assert first.type_name == "ValueError"
    assert type(second) is KeyError
    assert type(third) is RemoteError, "a retrying caller would take it for its own"
    assert third.may_have_run


def test_group_of_five_hundred_arrives_whole() -> None:
    came = arrive(ExceptionGroup("g", [ValueError(n) for n in range(500)]))
    assert [error.args[0] for error in came.exceptions] == list(range(500))


def test_group_nested_too_deeply_is_told() -> None:
    error: Exception = ValueError("core")
    for depth in range(100):
        error = ExceptionGroup(f"{depth}", [error])
    came = arrive(error)
    assert type(came) is ExceptionGroup
    while isinstance(came, ExceptionGroup):
        (came,) = came.exceptions
    assert type(came) is RemoteError
    assert "nested" in came.__notes__[0]


# -- causes and contexts


def test_cause_and_context_arrive_and_the_traceback_is_last() -> None:
    def procedure() -> None:
        try:
            try:
                raise KeyError("inner")
            except KeyError:
                raise QuotaError("ann", 2)  # noqa: B904  the context is what is tested
        except QuotaError as error:
            raise ValueError("outer") from error

    came = arrive(_caught(procedure))
    cause = came.__cause__
    assert type(came) is ValueError
    assert type(cause) is QuotaError
    assert cause is came.__context__
    assert came.__suppress_context__
    assert type(cause.__context__) is KeyError
    assert not cause.__suppress_context__
    assert isinstance(cause.__cause__, RemoteTraceback)
    assert "inner" in str(cause.__cause__)
    text = "".join(traceback.format_exception(came))
    assert "The above exception was the direct cause" in text
    assert 'raise KeyError("inner")' in text


def test_raise_from_none_stays_so() -> None:
    def procedure() -> None:
        try:
            raise KeyError("hidden")
        except KeyError:
            raise ValueError("shown") from None

    came = arrive(_caught(procedure))
    assert came.__suppress_context__
    assert type(came.__context__) is KeyError
    assert isinstance(came.__cause__, RemoteTraceback)
    assert "hidden" not in str(came.__cause__)


def test_remote_context_is_kept_where_the_caller_handles_another_exception() -> None:
    error = ValueError("v")
    error.__context__ = KeyError("remote")
    parcel = _marshal.pack_exception(error, HERE)
    try:
        raise OSError("local")
    except OSError:
        came = opened(parcel)
    assert type(came.__context__) is KeyError


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_rings_of_causes_end(link: str) -> None:
    first, second, third = ValueError("1"), KeyError("2"), OSError("3")
    for left, right in ((first, second), (second, third), (third, first)):
        setattr(left, link, right)
    came = opened(_marshal.pack_exception(first, HERE))
    assert type(came) is ValueError
    assert type(getattr(came, link)) is KeyError
    assert isinstance(last_cause(came), RemoteTraceback)
    traceback.format_exception(came)


def test_exception_that_causes_itself_ends() -> None:
    error = ValueError("self")
    error.__cause__ = error
    came = opened(_marshal.pack_exception(error, HERE))
    assert isinstance(came.__cause__, RemoteTraceback)


def test_chain_of_thousands_arrives() -> None:
    error: Exception = ValueError("0")
    for number in range(1, 3000):
        following = ValueError(str(number))
        following.__context__ = error
        error = following
    came = opened(_marshal.pack_exception(error, HERE))
    length = 0
    while came is not None:
        came, length = came.__context__, length + 1
    assert length == 3000


def test_cause_that_cannot_cross_does_not_spoil_the_exception() -> None:
    error = LookupError("no such user")
    error.__cause__ = cause = ValueError("driver")
    cause.connection = threading.Lock()  # type: ignore[attr-defined]
    came = arrive(error)
    assert type(came) is LookupError
    assert type(came.__cause__) is RemoteError
    assert came.__cause__.type_name == "ValueError"
    assert "lock" in came.__cause__.__notes__[0]


def test_traceback_of_an_earlier_door_is_not_told_twice() -> None:
    came = arrive(arrive(ValueError("two doors away")))
    assert isinstance(came.__cause__, RemoteTraceback)
    assert came.__cause__.__cause__ is None
    assert came.__cause__.text.count("RemoteTraceback") == 1


def test_exception_in_a_cause_is_not_turned() -> None:
    error = ValueError("v")
    error.__cause__ = BusyError("busy")
    error.__context__ = SystemExit(3)
    came = arrive(error)
    assert type(came.__cause__) is BusyError
    assert came.__context__.code == 3


# -- what must not arrive as itself


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        asyncio.CancelledError("stop"),
        BaseExceptionGroup("g", [KeyboardInterrupt(), ValueError("v")]),
        MarshalError("args[0]", may_have_run=False),
        BusyError("busy"),
        RemoteError("further", type_name="x.Y"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_must_not_arrive_is_a_remote_error(error: BaseException) -> None:
    came = arrive(error)
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    assert type(came) is RemoteError
    assert came.type_name == name
    assert str(came).startswith(name)
    assert str(error) in str(came)
    assert came.may_have_run
    assert isinstance(came.__cause__, RemoteTraceback)
    assert kind.__name__ in came.__cause__.text
    assert not hasattr(came, "__notes__")


# -- exceptions that resist


class Resists(Exception):
    pass


class ReduceRaises(Resists):
    def __reduce__(self) -> Any:
        raise ZeroDivisionError("no reduce")


class ReduceExits(Resists):
    def __reduce__(self) -> Any:
        raise SystemExit("no reduce")


class ReduceLies(Resists):
    def __reduce__(self) -> Any:
        return str, ("not an exception",)


class StateRaises(Resists):
    def __getstate__(self) -> Any:
        raise ZeroDivisionError("no state")


class SetStateRaises(Resists):
    def __getstate__(self) -> Any:
        return {"a": 1}

    def __setstate__(self, state: Any) -> None:
        raise ZeroDivisionError("no set")


class EverythingRaises(Resists):
    def __getattribute__(self, name: str) -> Any:
        raise KeyboardInterrupt(name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise KeyboardInterrupt

    __str__ = __repr__ = __reduce_ex__  # type: ignore[assignment]


class Unpicklable(Resists):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class NotText(str):
    def __reduce__(self) -> Any:
        raise ZeroDivisionError("no text")


class OddText(Resists):
    def __str__(self) -> str:
        return NotText("odd")


RESISTING = [
    ReduceRaises,
    ReduceExits,
    ReduceLies,
    StateRaises,
    SetStateRaises,
    EverythingRaises,
    Unpicklable,
]


@pytest.mark.ids("X14", "E10")
@pytest.mark.parametrize("kind", RESISTING)
def test_exception_that_resists_is_a_remote_error(kind: type[Resists]) -> None:
    came = arrive(kind("the text"))
    assert type(came) is RemoteError
    assert came.type_name.endswith(f".{kind.__name__}")
    assert isinstance(came.__cause__, RemoteTraceback)
    assert kind.__name__ in came.__cause__.text
    assert "could not cross the door as itself" in came.__notes__[-1]
    if kind is not EverythingRaises:
        assert str(came) == f"{came.type_name}: the text"


class OddMeta(type):
    @property
    def __module__(cls) -> str:  # type: ignore[override]
        raise ZeroDivisionError("no module")


@pytest.mark.ids("E10")
def test_exception_whose_class_does_not_tell_its_name_is_told_all_the_same() -> None:
    came = arrive(OddMeta("Nameless", (Exception,), {})("the text"))
    assert type(came) is RemoteError
    assert str(came) == "an exception: the text"


@pytest.mark.parametrize("kind", [OwnReduce, lambda left, right: Unpicklable(f"{left}/{right}")])
def test_notes_arrive_also_where_the_exception_does_not_carry_them(kind: Callable[..., Exception]) -> None:
    error = kind(1, 2)
    error.add_note("first")
    error.add_note("second")
    came = arrive(error)
    assert came.__notes__[:2] == ["first", "second"]
    assert "1/2" in str(came)


@pytest.mark.ids("E10")
def test_text_that_cannot_be_had_is_replaced() -> None:
    class StrRaises(Unpicklable):
        def __str__(self) -> str:
            raise ZeroDivisionError

    came = arrive(StrRaises("x"))
    assert type(came) is RemoteError
    assert "<exception str() failed>" in str(came)


@pytest.mark.ids("E10")
def test_exception_whose_str_raises_still_arrives_as_itself() -> None:
    class StrRaises(QuotaError):
        def __str__(self) -> str:
            raise ZeroDivisionError

    assert arrive(StrRaises("ann", 1)).limit == 1


def test_text_of_a_subclass_of_str_is_text() -> None:
    assert type(arrive(OddText("x"))) is OddText


@pytest.mark.ids("E10")
def test_huge_exception_is_bounded() -> None:
    big = ValueError("x" * 50_000_000)
    parcel = _marshal.pack_exception(big, HERE)
    assert len(parcel[0]) < 300_000
    came = opened(parcel)
    assert type(came) is RemoteError
    assert came.type_name == "ValueError"
    assert len(str(came)) < 10_000
    assert "characters left out" in str(came)
    assert "too much" in came.__notes__[0]


def test_large_exception_still_arrives_as_itself() -> None:
    assert len(arrive(ValueError("x" * 1_000_000)).args[0]) == 1_000_000


@pytest.mark.ids("E10")
def test_many_huge_exceptions_are_bounded_together() -> None:
    parts = [ValueError("x" * 3_000_000) for _ in range(20)]
    parcel = _marshal.pack_exception(ExceptionGroup("g", parts), HERE)
    assert len(parcel[0]) < 20_000_000
    kinds = [type(each) for each in opened(parcel).exceptions]
    assert kinds[0] is ValueError
    assert kinds[-1] is RemoteError


def test_deep_recursion_is_told_briefly() -> None:
    def dive(depth: int) -> int:
        return dive(depth + 1) + 1

    came = arrive(_caught(lambda: dive(0)))
    assert type(came) is RecursionError
    assert len(came.__cause__.text) < 10_000


def test_arrays_in_an_exception_travel_inside() -> None:
    numpy = pytest.importorskip("numpy")
    parcel = _marshal.pack_exception(ValueError(numpy.zeros(100_000)), HERE)
    assert parcel[1] == ()
    came = opened(parcel)
    came.args[0][0] = 1  # writable
    assert came.args[0].shape == (100_000,)


def test_field_that_this_python_does_not_know_becomes_an_attribute() -> None:
    error = _exceptions.revive(ValueError, ("v",))
    _exceptions.set_state(error, (None, {}, {"of_python_4": 5}))
    assert error.of_python_4 == 5  # type: ignore[attr-defined]


def test_surrogates_in_a_text_survive() -> None:
    came = arrive(RevokedError("file \udcff"))
    assert "\udcff" in str(came)


# -- refusals


@pytest.mark.parametrize("may_have_run", [False, True])
def test_refusal_arrives_as_itself(may_have_run: bool) -> None:
    error = MarshalError("args[0] cannot cross", may_have_run=may_have_run)
    came = opened(_marshal.pack_refusal(error, HERE))
    assert type(came) is MarshalError
    assert str(came) == "args[0] cannot cross"
    assert came.may_have_run is may_have_run
    assert came.__cause__ is None


def test_refusal_keeps_what_it_says() -> None:
    came = opened(_marshal.pack_refusal(LimitError("too much", limit=3, value=4), ELSEWHERE))
    assert (came.limit, came.value, came.may_have_run) == (3, 4, False)
    came = opened(_marshal.pack_refusal(RevokedError("gone", filename="/x.door"), ELSEWHERE))
    assert (came.filename, str(came)) == ("/x.door", "gone")


def test_refusal_shows_the_traceback_of_its_cause() -> None:
    error = MarshalError("cannot", may_have_run=False)
    error.__cause__ = _caught(lambda: 1 / 0)
    came = opened(_marshal.pack_refusal(error, HERE))
    assert type(came.__cause__) is ZeroDivisionError
    assert "1 / 0" in str(came.__cause__.__cause__)


def test_refusal_that_is_none_is_a_protocol_error() -> None:
    data = bytearray(_marshal.pack_exception(ValueError("x"), HERE)[0])
    data[0] = ord("R")
    with pytest.raises(ProtocolError):
        _marshal.unpack_outcome(data)


def test_exception_that_must_not_come_is_a_protocol_error() -> None:
    data = bytearray(_marshal.pack_refusal(BusyError("x"), HERE)[0])
    data[0] = ord("E")
    with pytest.raises(ProtocolError) as info:
        _marshal.unpack_outcome(data)
    assert info.value.may_have_run


@pytest.mark.parametrize(
    "envelope",
    [
        None,
        ("text",),
        ("text", []),
        ("text", [(1, 2)]),
        ("", [("T", "x", [], False, 9, -1, None, "", b"")]),
        ("", [("T", "x", [], False, -1, -1, [0], "", b"")]),
        ("", [("T", "x", None, False, "a", -1, None, "", 3)]),
    ],
)
def test_malformed_envelope_is_a_protocol_error(envelope: object) -> None:
    data = b"E" + _marshal._dump(envelope, HERE)[0]
    with pytest.raises(ProtocolError):
        _marshal.unpack_outcome(data)


def test_every_cut_of_an_exception_is_a_library_error() -> None:
    data = _marshal.pack_exception(QuotaError("ann", 3), HERE)[0]
    for length in range(len(data)):
        with pytest.raises((ProtocolError, MarshalError, RemoteError)):
            _marshal.unpack_outcome(data[:length])


def test_exception_that_was_dealt_with_is_gone_without_the_collector() -> None:
    error = QuotaError("ann", 1)
    error.__cause__, error.__context__ = ValueError("cause"), KeyError("context")
    parcel = _marshal.pack_exception(error, HERE)
    gc.disable()
    try:
        watch = weakref.ref(opened(parcel))
        assert watch() is None
    finally:
        gc.enable()


# -- exceptions as values


def test_exception_as_a_value_is_rebuilt_without_its_init() -> None:
    error = KeywordError(code=9)
    error.__cause__ = ValueError(threading.Lock())  # must not make it unsendable
    parcel = _marshal.pack_result([error, error], HERE)
    first, second = _marshal.unpack_outcome(parcel[0], parcel[1])
    assert type(first) is KeywordError
    assert first.code == 9
    assert first is second
    assert first.__cause__ is None


def test_exception_that_holds_itself_arrives() -> None:
    error = ValueError("ring")
    error.me = error  # type: ignore[attr-defined]
    came = _marshal.unpack_outcome(_marshal.pack_result(error, HERE)[0])
    assert came.me is came
    assert arrive(error).me.me.args == ("ring",)


# -- between processes

SENDER = """
import sys
from doorpool import _marshal
{definitions}
to = _marshal.Dialect(eval(sys.argv[2]), bytes.fromhex(sys.argv[3]))
try:
    procedure()
except BaseException as error:
    parcel = _marshal.pack_exception(error, to)
assert not parcel[1]
open(sys.argv[1], "wb").write(parcel[0])
"""


def from_another_process(
    tmp_path: Path, definitions: str, to: _marshal.Dialect = HERE, path: Path | None = None
) -> Any:
    script, out = tmp_path / "sender.py", tmp_path / "parcel"
    script.write_text(SENDER.format(definitions=textwrap.dedent(definitions)))
    search = [str(ROOT), *([str(path)] if path else [])]
    command = [sys.executable, str(script), str(out), repr(to.python), to.main.hex()]
    subprocess.run(command, check=True, env=bare_environment() | {"PYTHONPATH": ":".join(search)}, timeout=30)
    return opened((out.read_bytes(), (), ()))


def test_class_of_the_senders_main_comes_by_value(tmp_path: Path) -> None:
    came = from_another_process(
        tmp_path,
        """
        class MainError(ValueError):
            def __init__(self, *, code):
                super().__init__(f"code {code}")
                self.code = code
            def double(self):
                return 2 * self.code
        def procedure():
            raise MainError(code=4)
        """,
    )
    assert isinstance(came, ValueError)
    assert type(came).__name__ == "MainError"
    assert came.double() == 8


def test_class_of_the_senders_main_cannot_cross_to_another_python(tmp_path: Path) -> None:
    came = from_another_process(
        tmp_path,
        """
        class MainError(ValueError): pass
        def procedure():
            raise MainError("text")
        """,
        to=attrs.evolve(HERE, python=(3, 99)),
    )
    assert type(came) is RemoteError
    assert came.type_name == "__main__.MainError"
    assert str(came) == "__main__.MainError: text"
    assert "3.99" in came.__notes__[0]
    assert 'raise MainError("text")' in came.__cause__.text


def test_class_that_the_receiver_lacks_is_a_remote_error(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "only_there.py").write_text("class DriverError(Exception): pass\n")
    definitions = """
        import only_there
        def procedure():
            raise only_there.DriverError("down")
        """
    came = from_another_process(tmp_path, definitions, path=tmp_path / "lib")
    assert type(came) is RemoteError
    assert came.type_name == "only_there.DriverError"
    assert str(came) == "only_there.DriverError: down"
    assert "only_there" in came.__notes__[0]
    assert 'raise only_there.DriverError("down")' in came.__cause__.text


def test_cause_that_the_receiver_lacks_does_not_spoil_the_exception(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "only_there.py").write_text("class DriverError(Exception): pass\n")
    definitions = """
        import only_there
        def procedure():
            try:
                raise only_there.DriverError("down")
            except Exception as error:
                raise LookupError("no such user") from error
        """
    came = from_another_process(tmp_path, definitions, path=tmp_path / "lib")
    assert type(came) is LookupError
    assert type(came.__cause__) is RemoteError
    assert came.__cause__.type_name == "only_there.DriverError"
    assert isinstance(came.__cause__.__cause__, RemoteTraceback)


def test_uncaught_it_prints_the_remote_traceback(tmp_path: Path) -> None:
    out = tmp_path / "parcel"
    out.write_bytes(_marshal.pack_exception(_caught(lambda: 1 / 0), HERE)[0])
    script = (
        "import sys; from doorpool import _marshal; _marshal.unpack_outcome(open(sys.argv[1], 'rb').read())"
    )
    command = [sys.executable, "-c", script, str(out)]
    env = bare_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "RemoteTraceback" in done.stderr
    assert "1 / 0" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_every_error_of_the_library_can_be_refused_with() -> None:
    for name in _errors.__all__:
        kind = getattr(_errors, name)
        if issubclass(kind, _errors.DoorError):
            came = opened(_marshal.pack_refusal(kind("m"), HERE))
            assert type(came) is kind
            assert str(came) == "m"
    assert _exceptions.MAX_NODES > 1000
