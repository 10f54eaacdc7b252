"""
Objects behind doors: which methods callers may reach, what is told of them, and how they are called.

An *object door* leads to an instance and not to a function.  On the wire nothing is new: the
procedure of such a door is a ``Facade``, which takes the name of a method as its first
positional argument.  Beside the methods it knows three names:

    __call__                the object itself is called; if its class allows that
    __enter__, __exit__     of a context manager: see below
    __methods__             the table of the methods, for whom the greeting had no room for it

What may be reached is decided when the door is made, by looking at the *class*, without
running a property: methods whose names do not begin with an underscore, or exactly those that
``expose`` lists.  A name that is not in the table is an ``AttributeError``, whatever the object
would say to ``getattr``; and a proxy, which has the table, sends nothing for it.

What is told.  The greeting carries the table, as JSON: the signature and the docstring of each
method, as text.  It must fit into a greeting, which lies in the queue of each descriptor; so a
long table goes without the docstrings, or not at all, and is fetched when somebody asks.  At the
caller a signature is *read*, never run: what is no literal stays text.

Context managers.  ``with`` at a caller enters the object here and leaves it here, in whatever
server threads the two calls come to.  What ``__enter__`` returns is the caller's, but the object
itself, which cannot cross, stands for the door.

Each entering gives a *lease*: a descriptor of a door that leads nowhere, which its caller keeps until
he leaves.  When nobody has that any more, because he died or has let go of the door, the object is left
for him, with an exception, so that what was begun is undone and not finished.  The object's own door would
not tell that, for others may hold it, too.  (When that one ends, all who are in it are left for.)
No other user can leave for him: the kernel says who calls, for his number is easily guessed.  A caller who
is not told that he has entered, because what he was to get cannot cross, is left for at once.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from doorpool._descriptor import NOBODY
from doorpool._errors import BrokenDoorError, RemoteError

CALL, ENTER, EXIT, METHODS = "__call__", "__enter__", "__exit__", "__methods__"

#: Bytes that the table may take in a greeting of 64 KiB, of which texts may have 50,176 already.
ROOM = 14_000

#: Of a docstring in the table, characters.
_DOC = 4_096

#: Instances of these are values, and attaching one a slip: ``server.attach("x.door")``.
_VALUES = (str, bytes, bytearray, int, float, complex, bool, types.NoneType, tuple, frozenset, range)

#: A table: the signature and the docstring of each method; None where they were left out.
Table = dict[str, tuple[str, str] | None]

#: What is known of classes: the public methods, and the table of those whose instances show all that
#: they have.  To find it out takes 20 µs a method, and a session may be made for each caller.
_names: weakref.WeakKeyDictionary[type, tuple[str, ...]] = weakref.WeakKeyDictionary()
_tables: weakref.WeakKeyDictionary[type, Table] = weakref.WeakKeyDictionary()

_JSON = json.JSONDecoder()

#: Makes a lease of the door that is being called, given what to do when nobody has it any more, called with
#: the reason; returns it, the descriptor for the caller, and that as it is to be sent.  Outside a call there
#: is none.  It is set by ``_endpoint``, which has doors.
make_lease: Callable[[Callable[[str], None]], tuple[Any, Any, Any]] | None = None

#: Tells the uid of who calls, as the kernel does; likewise.
uid_of_caller: Callable[[], int | None] | None = None

_T = TypeVar("_T")


def is_object(target: Any) -> bool:
    """Tell whether a door to this leads to an object, and not to something that is only called."""
    if isinstance(target, (type, functools.partial, types.ModuleType, *_VALUES)) or inspect.isroutine(target):
        return False
    return bool(_public_methods(type(target))) or _is_context_manager(type(target))


def facade_of(target: Any, expose: Iterable[str] | None) -> Facade | None:
    """
    Return the facade of an object that is to have a door, or None for what is only called.

    Raises:
        TypeError: ``expose`` is no list of methods' names.
        ValueError: it names what the object has not.
    """
    if expose is not None:
        return Facade(target, _checked_names(target, expose))
    if not is_object(target):
        return None
    kind = type(target)
    names = set(_public_methods(kind))
    names |= {CALL} if callable(target) and not _is_async(kind.__call__) else set()
    return Facade(target, frozenset(names | ({ENTER, EXIT} if _is_context_manager(kind) else set())), kind)


def _checked_names(target: Any, expose: Iterable[str]) -> frozenset[str]:
    if isinstance(expose, str | bytes) or not isinstance(expose, Iterable):
        raise TypeError(f"expose is a list of methods' names, not {expose!r}")
    names = frozenset(expose)
    for name in names:
        if type(name) is not str:
            raise TypeError(f"expose lists names, and {name!r} is none")
        if not hasattr(target, name):
            raise ValueError(f"expose lists {name!r}, which {target!r} has not")
        value = getattr(target, name)
        if not callable(value):
            raise TypeError(f"expose lists {name!r}, which is no method: plain attributes do not cross")
        if _is_async(value):
            raise TypeError(f"expose lists {name!r}, an async function, which a door cannot run")
    return names


def _is_context_manager(kind: type) -> bool:
    return hasattr(kind, ENTER) and hasattr(kind, EXIT)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _public_methods(kind: type) -> tuple[str, ...]:
    """Return the names of a class's public methods; no property is run."""

    def look() -> tuple[str, ...]:
        names = [name for name in dir(kind) if not name.startswith("_")]
        return tuple(name for name in names if _is_method(inspect.getattr_static(kind, name, None)))

    return _remembered(_names, kind, look)


def _remembered(cache: weakref.WeakKeyDictionary[type, _T], kind: type, make: Callable[[], _T]) -> _T:
    """Return what is known of a class, finding it out the first time."""
    try:
        return cache[kind]
    except KeyError:
        cache[kind] = found = make()
        return found
    except TypeError:  # of a metaclass whose classes have no hash
        return make()


def _is_method(value: Any) -> bool:
    if isinstance(value, staticmethod | classmethod):
        return not _is_async(value.__func__)
    if isinstance(value, functools.partialmethod):
        return not _is_async(value.func)
    if isinstance(value, functools.singledispatchmethod):
        return True
    # A ``cached_property`` has a ``__get__``, as routines have; but it is not called.
    return callable(value) and inspect.isroutine(value) and not _is_async(value)


class Facade:
    """
    The procedure of an object door: ``facade("deposit", 10)`` calls ``object.deposit(10)``.

    Args:
        target: the object.
        names: what may be reached.
        kind: its class, if the names are all that the class has to offer: the table is the
            same for each instance then.
    """

    __slots__ = ("_entered", "_kind", "_last", "_lock", "_over", "_plain", "names", "object")

    def __init__(self, target: Any, names: frozenset[str], kind: type | None = None) -> None:
        self.object = target
        self.names = names
        self._plain = names - {ENTER, EXIT}  # which are called and no more
        self._kind = kind
        self._entered: dict[int, tuple[Any, int | None]] = {}  # who is in it: by numbers, leases and uids
        self._over = False
        self._last = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<object door to {self.object!r}>"

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        if args and type(args[0]) is str and args[0] in self._plain:  # nearly always
            return getattr(self.object, args[0])(*args[1:], **kwargs)
        method, rest = resolve(self, args)
        return method(*rest, **kwargs)

    @property
    def _named(self) -> str:
        """What callers are told of the object: its ``repr`` may show what is none of their business."""
        return f"{type(self.object).__qualname__!r} object"

    @property
    def is_context_manager(self) -> bool:
        """Whether it may be used with ``with``."""
        return ENTER in self.names and EXIT in self.names

    def find(self, name: Any) -> Callable[..., Any]:
        """
        Return what a name means to a caller.

        Raises:
            AttributeError: nothing.
            TypeError: it is the object that was called, and it cannot be.
        """
        if name in (ENTER, EXIT) and self.is_context_manager:
            return self._enter if name == ENTER else self._exit
        if name == METHODS:
            return self.table
        if not isinstance(name, str) or name not in self.names:
            if name == CALL:
                raise TypeError(f"{self._named} is not callable through this door")
            shown = name[:64] if isinstance(name, str) else name  # a stranger may have chosen it
            raise AttributeError(f"{self._named} has no method {shown!r} for callers", name=str(shown))
        return getattr(self.object, name)  # type: ignore[no-any-return]

    # -- context managers --------------------------------------------------------------------

    def _enter(self) -> tuple[bool, Any, int, Any]:
        """
        Enter the object; return whether it gave itself, otherwise what it gave, and a number and a lease.
        """
        with self._lock:
            self._last += 1
            number = self._last
        uid = None if uid_of_caller is None else uid_of_caller()
        lease: Any = None
        theirs: Any = None
        parcel: Any = None
        if make_lease is not None:  # before anything is entered: there may be no descriptor to be had
            lease, theirs, parcel = make_lease(functools.partial(self._abandon_one, number))
        try:
            value = self.object.__enter__()
        except BaseException:
            if lease is not None:
                lease.close()
                theirs.close()
            raise
        with self._lock:
            self._entered[number] = lease, uid
            over = self._over
        if over:  # the door was closed meanwhile, and nobody will come to leave it
            for failure in list(self.abandon("the door was closed while it was entered")):
                if failure is not None:
                    raise failure
        return (True, None, number, parcel) if value is self.object else (False, value, number, parcel)

    def _exit(self, error: Any = None, number: int = 0) -> bool:
        """
        Leave the object, with what ended the caller's block: an exception, or its text.

        Who has entered leaves, and nobody else: numbers are easily guessed, and the kernel says who calls.
        """
        uid = None if uid_of_caller is None else uid_of_caller()
        with self._lock:
            if self._entered.get(number, (None, NOBODY))[1] != uid:
                raise RuntimeError(f"{self._named} was left and had not been entered")
            lease, _ = self._entered.pop(number)
        if error is not None and not isinstance(error, BaseException):
            error = RemoteError(str(error))
        return self._leave(error, lease)

    def _leave(self, error: BaseException | None, lease: Any) -> bool:
        try:
            if lease is not None:
                lease.close()
        finally:  # also if Ctrl-C comes out of that: nobody comes again to leave it
            if error is None:
                swallowed = self.object.__exit__(None, None, None)
            else:
                swallowed = self.object.__exit__(type(error), error, error.__traceback__)
        return bool(swallowed)

    def abandon(self, why: str, *, final: bool = False) -> Iterator[BaseException | None]:
        """
        Leave the object for callers who are gone, as often as they had entered it.

        Args:
            why: said by the exception that is shown to it.
            final: nobody can come any more; who still enters it is left for at once.

        Yields:
            What its ``__exit__`` has raised, or None, for each; the next are left all the same.
        """
        with self._lock:
            numbers = list(self._entered)
            self._over = self._over or final
        for number in numbers:
            failure = None
            try:
                self._abandon_one(number, why)
            except BaseException as error:
                failure = error
            yield failure

    def _abandon_one(self, number: int, why: str) -> None:
        """Leave the object for one who had entered it, if he has not done so."""
        with self._lock:
            if number not in self._entered:
                return
            lease, _ = self._entered.pop(number)
        error = BrokenDoorError(why, may_have_run=True)
        try:
            self._leave(error, lease)
        except BrokenDoorError as raised:
            if raised is not error:  # it only lets it pass
                raise

    # -- what is told --------------------------------------------------------------------------

    def table(self) -> Table:
        """Return the signature and the docstring of each method that may be reached."""
        if self._kind is None:
            return self._make_table()
        return _remembered(_tables, self._kind, self._make_table)

    def _make_table(self) -> Table:
        table: Table = {}
        for name in sorted(self.names - {CALL, ENTER, EXIT}):
            method = getattr(self.object, name)
            table[name] = signature_text(method), (inspect.getdoc(method) or "")[:_DOC]
        return table

    def doc(self) -> str:
        """Return the docstring of the object's class."""
        return inspect.getdoc(self.object) or ""

    def signature(self) -> str:
        """Return the signature of calling the object itself, if that is possible."""
        return signature_text(self.object) if CALL in self.names else ""


def resolve(target: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """
    Find the function that a call of a door comes to, and the positional arguments that are left for it.

    Of what is no object door it is the target, with all of them.

    Raises:
        AttributeError: the object has no such method for callers.
        TypeError: it cannot be called; no method is named.
    """
    if type(target) is not Facade:
        return target, args
    if not args:
        raise TypeError(f"{target._named} is called with the name of a method first")
    return target.find(args[0]), args[1:]


# -- texts ---------------------------------------------------------------------------------------


def encode_table(table: Table) -> str:
    """Write a table so that it fits into a greeting: without docstrings, or empty, if it must be."""
    bare = {name: (entry[0], "") if entry else None for name, entry in table.items()}
    names = dict.fromkeys(table)
    for form in (table, bare, names):
        text = json.dumps(form, separators=(",", ":"))
        if len(text) <= ROOM:  # ASCII, all of it
            return text
    return ""


def decode_table(text: str) -> Table | None:
    """Read a table that a door tells; None if it had no room for it, or tells nonsense."""
    try:
        return checked_table(_JSON.decode(text))
    except (ValueError, RecursionError):
        return None


def checked_table(table: Any) -> Table | None:
    """Return a table that came from the other side, if it is one."""
    if not isinstance(table, dict):
        return None
    checked: Table = {}
    for name, entry in table.items():
        if not isinstance(name, str) or not name.isidentifier():
            return None
        if isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(it, str) for it in entry):
            checked[name] = entry[0], entry[1]
        elif entry is None:
            checked[name] = None
        else:
            return None
    return checked


def signature_text(target: Callable[..., Any]) -> str:
    """
    Write a signature as ``inspect`` does, so that it can be read again; "" if there is none.

    What ``repr`` writes of some defaults (``<object object at 0x7f...>``) nobody can read, and need
    not know: it is written as ``...``.
    """
    try:
        signature = inspect.signature(target)
        text = str(signature)
        if read_signature(text) is not None:
            return text
        legible = [_legible(parameter) for parameter in signature.parameters.values()]
        returns = signature.return_annotation
        if returns is not inspect.Signature.empty and not _is_legible(f"() -> {_note(returns)}"):
            returns = inspect.Signature.empty
        return str(signature.replace(parameters=legible, return_annotation=returns))
    except Exception:  # a ``repr`` of somebody's may raise anything
        return ""


def _legible(parameter: inspect.Parameter) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    if parameter.default is not empty and not _is_legible(f"(x={parameter.default!r})"):
        parameter = parameter.replace(default=Text("..."))
    if parameter.annotation is not empty and not _is_legible(f"(x: {_note(parameter.annotation)})"):
        parameter = parameter.replace(annotation=empty)
    return parameter


def _note(annotation: Any) -> str:
    return inspect.formatannotation(annotation)


def _is_legible(text: str) -> bool:
    return read_signature(text) is not None


class Text:
    """A piece of a signature that is not a value here: it shows itself as it was written there."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Text) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)


_TYPES = {
    kind.__name__: kind
    for kind in (int, str, bytes, bytearray, float, complex, bool, list, tuple, dict, set, frozenset, object)
}


def read_signature(text: str) -> inspect.Signature | None:
    """Read a signature from its text, running none of it; None if it is none."""
    try:
        (function,) = ast.parse(f"def f{text}: ...").body
        assert isinstance(function, ast.FunctionDef)
        returns = inspect.Signature.empty if function.returns is None else _annotation(function.returns)
        return inspect.Signature(_parameters(function.args), return_annotation=returns)
    except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError):
        return None


def _parameters(args: ast.arguments) -> list[inspect.Parameter]:
    kinds = inspect.Parameter
    plain: list[tuple[ast.arg, Any]] = [(it, kinds.POSITIONAL_ONLY) for it in args.posonlyargs]
    plain += [(it, kinds.POSITIONAL_OR_KEYWORD) for it in args.args]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults))
    defaults = [*missing, *args.defaults]
    found = [_parameter(it, kind, default) for (it, kind), default in zip(plain, defaults, strict=True)]
    if args.vararg is not None:
        found.append(_parameter(args.vararg, kinds.VAR_POSITIONAL, None))
    for it, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(_parameter(it, kinds.KEYWORD_ONLY, default))
    if args.kwarg is not None:
        found.append(_parameter(args.kwarg, kinds.VAR_KEYWORD, None))
    return found


def _parameter(arg: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        arg.arg, kind, default=empty if default is None else _value(default),
        annotation=empty if arg.annotation is None else _annotation(arg.annotation),
    )  # fmt: skip


def _value(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return Text(ast.unparse(node))
    return Text("...") if value is ... else value


def _annotation(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _TYPES:
        return _TYPES[node.id]
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str)):
        return node.value
    return Text(ast.unparse(node))
