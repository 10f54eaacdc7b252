"""
Objects behind doors, without doors: what may be reached, what is told of it, and how that is read.
"""

from __future__ import annotations

import functools
import inspect
import json
import operator
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.described import described

from doorpool import BrokenDoorError, RemoteError
from doorpool import _objects as objects
from doorpool._objects import (
    ROOM,
    Facade,
    Text,
    checked_table,
    decode_table,
    encode_table,
    facade_of,
    is_object,
    read_signature,
    resolve,
    signature_text,
)


class Bank:
    """A bank."""

    rate = 3

    class Account:
        """No method."""

    def __init__(self) -> None:
        self.total = 0
        self.callback = len

    def deposit(self, amount: int, *, note: str = "none") -> int:
        """Put money in."""
        self.total += amount
        return self.total

    def _audit(self) -> str:
        return "secret"

    def __len__(self) -> int:
        return self.total

    @property
    def balance(self) -> int:
        raise AssertionError("a property was run")

    @functools.cached_property
    def history(self) -> list[int]:
        raise AssertionError("a property was run")

    @staticmethod
    def greet(name: str) -> str:
        return f"hello {name}"

    @classmethod
    def kind(cls) -> str:
        return cls.__name__

    @functools.lru_cache  # noqa: B019  # that it is seen is the point
    def cached(self) -> int:
        return 1

    twice = functools.partialmethod(deposit, 2)

    @functools.singledispatchmethod
    def show(self, value: object) -> str:
        return "object"

    async def later(self) -> None: ...


PUBLIC = {"deposit", "greet", "kind", "cached", "twice", "show"}


def facade(target: Any, expose: Any = None) -> Facade:
    it = facade_of(target, expose)
    assert it is not None
    return it


def test_public_methods_are_reached_and_no_property_is_run():
    assert facade(Bank()).names == PUBLIC
    assert set(facade(Bank()).table()) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_kind_of_method_can_be_called(name):
    args = {"deposit": (1,), "greet": ("you",), "show": (1,)}.get(name, ())
    assert facade(Bank())(name, *args) == getattr(Bank(), name)(*args)


@pytest.mark.parametrize(
    "name",
    [
        "rate",
        "Account",
        "total",
        "callback",
        "_audit",
        "__len__",
        "__init__",
        "__class__",
        "__dict__",
        "balance",
        "history",
        "later",
        "nothing",
        "",
        "deposit.__globals__",
        "__reduce_ex__",
        5,
        None,
        b"deposit",
    ],
)
def test_all_else_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match="'Bank' object has no method"):
        facade(Bank())(name)


def test_expose_is_all_that_may_be_reached():
    it = facade(Bank(), ["_audit", "callback"])
    assert it("_audit") == "secret"
    assert it("callback", [1, 2]) == 2
    with pytest.raises(AttributeError):
        it("deposit", 1)


class Adder:
    """Adds."""

    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, value: int) -> int:
        """Add to the base."""
        return self.base + value

    def reset(self) -> None:
        self.base = 0


def test_an_object_that_can_be_called_is_called():
    it = facade(Adder(1))
    assert it("__call__", 2) == 3
    assert it.signature() == "(value: 'int') -> 'int'"
    with pytest.raises(TypeError, match="'Adder' object is not callable through this door"):
        facade(Adder(1), ["reset"])("__call__", 2)
    assert facade(Adder(1), ["__call__"])("__call__", 2) == 3
    with pytest.raises(TypeError, match="'Bank' object is not callable"):
        facade(Bank())("__call__")


def just_a_function() -> None: ...


@pytest.mark.parametrize(
    "target",
    [
        just_a_function,
        lambda: 1,
        Bank,
        Bank().deposit,
        [].append,
        len,
        functools.partial(len, []),
        functools.lru_cache(just_a_function),
        operator.itemgetter(1),
        json,
        5,
        "text",
        b"",
        None,
        (),
        True,
        object(),
    ],
    ids=described,
)
def test_functions_and_values_are_no_objects(target):
    assert not is_object(target)
    assert facade_of(target, None) is None


@pytest.mark.parametrize(
    "target", [Bank(), {}, [], threading.Lock(), Adder(1)], ids=lambda it: type(it).__name__
)
def test_instances_with_methods_are_objects(target):
    assert is_object(target)


def test_a_module_is_one_if_it_is_said_what_to_expose():
    assert facade(json, ["dumps"])("dumps", [1]) == "[1]"


@pytest.mark.parametrize(
    ("expose", "error", "text"),
    [
        ("deposit", TypeError, "expose is a list"),
        (5, TypeError, "expose is a list"),
        ([5], TypeError, "5 is none"),
        (["nothing"], ValueError, "'nothing', which"),
        (["rate"], TypeError, "plain attributes do not cross"),
        (["later"], TypeError, "async"),
    ],
)
def test_expose_is_checked(expose, error, text):
    with pytest.raises(error, match=text):
        facade_of(Bank(), expose)


def test_resolve_finds_the_function_before_anything_is_converted():
    bank = Bank()
    method, rest = resolve(facade(bank), ("deposit", 1, 2))
    assert method == bank.deposit
    assert rest == (1, 2)
    assert resolve(len, ("deposit", 1)) == (len, ("deposit", 1))
    with pytest.raises(TypeError, match="the name of a method first"):
        resolve(facade(bank), ())


def test_a_class_without_a_hash_or_a_weak_reference():
    class Meta(type):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(cls, other: object) -> bool:
            return cls is other

    class Odd(metaclass=Meta):
        def hello(self) -> int:
            return 1

    assert facade(Odd())("hello") == 1
    assert set(facade(Odd()).table()) == {"hello"}


# -- context managers


class Manager:
    def __init__(self, *, itself: bool = True, swallow: type[BaseException] | None = None) -> None:
        self.log: list[Any] = []
        self.itself = itself
        self.swallow = swallow

    def __enter__(self) -> Any:
        self.log.append("enter")
        return self if self.itself else "value"

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.log.append(error)
        return self.swallow is not None and isinstance(error, self.swallow)


def test_a_context_manager_gives_itself_or_something_else():
    itself, value, number, lease = facade(Manager())("__enter__")
    assert (itself, value, lease) == (True, None, None)
    assert number == 1
    itself, value, _, lease = facade(Manager(itself=False))("__enter__")
    assert (itself, value, lease) == (False, "value", None)


def test_a_context_manager_is_told_what_ended_the_block():
    manager = Manager(swallow=KeyError)
    it = facade(manager)
    for args, swallowed in (((), False), ((KeyError("k"),), True), (("Odd: text",), False)):
        number = it("__enter__")[2]
        assert it("__exit__", *(args or (None,)), number) is swallowed
    _, nothing, _, error, _, text = manager.log
    assert nothing is None
    assert repr(error) == "KeyError('k')"
    assert isinstance(text, RemoteError)
    assert str(text) == "Odd: text"


def test_who_was_not_entered_cannot_be_left():
    it = facade(Manager())
    with pytest.raises(RuntimeError, match="had not been entered"):
        it("__exit__")
    number = it("__enter__")[2]
    it("__exit__", None, number)
    with pytest.raises(RuntimeError, match="had not been entered"):
        it("__exit__", None, number)


def test_who_has_entered_leaves_and_nobody_else(monkeypatch):
    callers = [4001]
    monkeypatch.setattr(objects, "uid_of_caller", lambda: callers[-1])
    manager = Manager()
    it = facade(manager)
    number = it("__enter__")[2]
    for uid in (4002, 0, None):
        callers.append(uid)
        for guess in (number, 0, -1, None, "last"):
            with pytest.raises(RuntimeError, match="had not been entered"):
                it("__exit__", None, guess)
    assert manager.log == ["enter"]
    callers.append(4001)
    it("__exit__", None, number)
    assert len(manager.log) == 2


def test_whoever_is_gone_is_left_for_as_often_as_he_had_entered():
    manager = Manager()
    it = facade(manager)
    for _ in range(3):
        number = it("__enter__")[2]
    it("__exit__", None, number)
    assert list(it.abandon("he is gone")) == [None, None]
    assert list(it.abandon("he is gone")) == []
    assert len(manager.log) == 6
    assert all(isinstance(error, BrokenDoorError) for error in manager.log[-2:])


def test_who_enters_when_it_is_over_is_left_for_at_once():
    manager = Manager()
    it = facade(manager)
    assert list(it.abandon("closed", final=True)) == []
    assert manager.log == []
    it("__enter__")
    assert [type(each) for each in manager.log] == [str, BrokenDoorError]
    assert list(it.abandon("again")) == []
    assert len(manager.log) == 2


def test_what_leaves_it_otherwise_is_told():
    class Failing(Manager):
        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            raise OSError("cannot")

    class Passing(Manager):
        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            raise error

    failing, passing = facade(Failing()), facade(Passing())
    failing("__enter__")
    assert [repr(error) for error in failing.abandon("he is gone")] == ["OSError('cannot')"]
    passing("__enter__")
    assert list(passing.abandon("he is gone")) == [None]


def test_a_broken_door_of_its_own_is_told_like_any_other_error():
    class Calling(Manager):
        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            raise BrokenDoorError("the backend is gone")

    calling = facade(Calling())
    calling("__enter__")
    (error,) = calling.abandon("he is gone")
    assert isinstance(error, BrokenDoorError)
    assert "the backend is gone" in str(error)


def test_without_exposure_nobody_enters():
    it = facade_of(Manager(), ["__enter__"])
    assert not it.is_context_manager
    with pytest.raises(AttributeError):
        it("__exit__")


# -- what is told


def test_a_table_that_fits_is_told_whole():
    table = facade(Bank()).table()
    assert table["deposit"] == ("(amount: 'int', *, note: 'str' = 'none') -> 'int'", "Put money in.")
    assert decode_table(encode_table(table)) == table


def test_a_table_is_made_once_for_a_class():
    assert facade(Bank()).table() is facade(Bank()).table()
    assert facade(Bank(), ["deposit"]).table() is not facade(Bank()).table()


def test_a_long_table_goes_without_docstrings_then_without_signatures_then_not_at_all():
    long_docs = {f"m{n}": ("()", "d" * 1000) for n in range(20)}
    assert decode_table(encode_table(long_docs)) == dict.fromkeys(long_docs, ("()", ""))
    long_signatures = {f"m{n}": (f"({'a' * 500})", "") for n in range(50)}
    assert decode_table(encode_table(long_signatures)) == dict.fromkeys(long_signatures)
    many = {f"m{n}" * 10: ("()", "") for n in range(1000)}
    assert encode_table(many) == ""
    assert decode_table("") is None
    for table in (long_docs, long_signatures, {"é" * 3000: ("(é='\U0001f600')", "é")}):
        assert len(encode_table(table).encode()) <= ROOM


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "[]",
        '{"a b": null}',
        '{"a": 5}',
        '{"a": ["()"]}',
        '{"a": ["()", 5]}',
        "[" * 100_000,
        '{"a": [',
        "\0",
    ],
    ids=lambda text: text[:12],
)
def test_a_table_that_is_nonsense_is_none(text):
    assert decode_table(text) is None


def test_a_table_that_was_fetched_is_checked_too():
    assert checked_table({"a": ("()", "")}) == {"a": ("()", "")}
    assert checked_table({5: ("()", "")}) is None
    assert checked_table(None) is None


# -- signatures


def plain(a, b=2, *rest, c, d="x", **more): ...
def typed(a: int, /, b: str | None = None, *, c: list[int] = ()) -> dict[str, Any]: ...  # type: ignore[assignment]
def empty(): ...


@pytest.mark.parametrize("function", [plain, typed, empty, Bank().deposit, just_a_function])
def test_a_signature_is_read_as_it_was_written(function):
    read = read_signature(signature_text(function))
    assert str(read) == str(inspect.signature(function))
    assert list(read.parameters) == list(inspect.signature(function).parameters)
    for name, parameter in inspect.signature(function).parameters.items():
        assert read.parameters[name].kind is parameter.kind
        assert read.parameters[name].default == parameter.default


def test_types_and_values_are_what_they_are_and_all_else_is_text():
    read = read_signature("(a: int, b: np.ndarray = os.sep, c=(1, {2: [3]}), *, d: 'str' = ...) -> None")
    parameters = read.parameters
    assert parameters["a"].annotation is int
    assert parameters["b"].annotation == Text("np.ndarray")
    assert parameters["b"].default == Text("os.sep")
    assert parameters["c"].default == (1, {2: [3]})
    assert parameters["d"].annotation == "str"
    assert read.return_annotation is None
    assert hash(parameters["a"]) == hash(read_signature("(a: int)").parameters["a"])
    assert len({parameters["b"], read_signature("(b: np.ndarray = os.sep)").parameters["b"]}) == 1


_ODD = object()


def test_what_cannot_be_read_is_not_written():
    class Local: ...

    def odd(a: Local, b: Any = _ODD, c: int = 3) -> Local: ...

    odd.__annotations__.update(a=Local, b=Any, c=int)
    odd.__annotations__["return"] = Local
    assert signature_text(odd) == "(a, b: Any = ..., c: int = 3)"
    odd.__annotations__["return"] = int
    assert signature_text(odd) == "(a, b: Any = ..., c: int = 3) -> int"


def test_a_repr_that_raises_leaves_no_signature():
    class Rude:
        def __repr__(self) -> str:
            raise SystemError

    def odd(a=Rude()): ...  # noqa: B008

    assert signature_text(odd) == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "(",
        "(a, a)",
        "(a=1, b)",
        "(): pass\nimport os\ndef g()",
        "(" * 10_000,
        "(a=" + "[" * 5000 + ")",
        "\0",
        "()()",
    ],
    ids=lambda text: text[:12],
)
def test_a_text_that_is_no_signature(text):
    assert read_signature(text) is None


@given(st.text(max_size=40))
def test_no_text_is_run_or_fails(text):
    assert read_signature(f"(a={text})") is None or isinstance(
        read_signature(f"(a={text})"), inspect.Signature
    )
