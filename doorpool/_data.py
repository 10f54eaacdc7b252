"""
Plain data to bytes, and back: MessagePack, for doors of callers whose pickles must not be loaded.

The job is that of ``_marshal``, for ``codec="data"``: nothing that arrives runs as code.  What a value
becomes is decided by the *receiver*: at the server by the annotations of the procedure, at the client, which
has none, by what MessagePack itself can say.

What is sent.  Arguments are ``[[positional...], {name: keyword...}]``.  An outcome begins with one byte:

    'V'   a result
    'E'   what left the procedure: [name of its type, text or nil, traceback or nil]
    'A'   a refusal, as text: the arguments do not fit, the procedure did not run
    'R'   a refusal, as text: the result does not fit, or cannot be written; it has run
    'B'   a refusal, as text: there was no free descriptor for the result; it has run

Arguments.  The request is taken apart into one piece of MessagePack for each argument, bound to the
parameters, and each piece is decoded by a decoder of the parameter's own type, which says what is wrong, and
where in it.  So what no annotation speaks of stays plain data: None, bool, int of 64 bits, float, str, bytes,
list, dict, aware ``datetime``, and ``Descriptor``.  (A tuple or a set arrives as a list, an object as a
dict, where nothing says that it is to be more.)

Errors.  The caller raises the class of that name in a *fixed table* of built-in classes that take one text;
all else is a ``RemoteError``.  No name is ever looked up anywhere else: ``SystemExit`` would end the
client, ``StopIteration`` end a loop of his, ``exec`` is no class, and one of ours would speak of his call.
Of what the other side says nothing sets ``may_have_run`` but the kind of the outcome.

Descriptors go beside the bytes, and are named inside them by a MessagePack extension that has its place in
their list.  Each may be named once.  Whatever has one crosses (``_passing``), and arrives as a
``Descriptor``: what it is, the other side must not be believed (S8).  An annotation of the receiver's
may have something better made of it (``register_conversion``); ``register`` adds what arrives as more: doors.

Roads not taken: decoding to plain data and ``msgspec.convert`` (it takes text for bytes, by base64); one
decoder for a struct of all parameters (variadic and positional-only ones have no place in it).
"""

from __future__ import annotations

import datetime
import functools
import inspect
import io
import re
import types
import typing
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import attrs
import msgspec
import msgspec.inspect
from msgspec.msgpack import Decoder, Encoder, Ext

from doorpool import _passing
from doorpool._credentials import Credentials, is_strange
from doorpool._descriptor import Descriptor
from doorpool._errors import (
    SHORTAGE,
    BusyError,
    DoorError,
    MarshalError,
    ProtocolError,
    RemoteError,
    RemoteTraceback,
)
from doorpool._exceptions import MAX_TRACEBACK, name_of, text_of, traceback_of
from doorpool._janitor import Open, close_all
from doorpool._keys import Reader, Steps, Unfit
from doorpool._passing import Departure, Taken
from doorpool._shares import ShareError
from doorpool._texts import MAX_SHOWN, clip, printable, printable_lines

Data = bytes | bytearray | memoryview

#: As of ``_marshal``, but with no buffers.
Parcel = tuple[bytes, tuple[()], "Luggage | tuple[()]"]

_RESULT, _EXCEPTION, _MISFIT, _BAD_RESULT, _NO_ROOM = b"V", b"E", b"A", b"R", b"B"

#: Characters of an exception's text, and of a word about a misfit: a stranger chooses the values in them.
_MAX_TEXT = MAX_SHOWN

#: The extension of MessagePack that stands for a descriptor.  Each extension begins with its own number in
#: the message, by which whoever wrote it finds the object again; here the place in the list of
#: descriptors follows.
_DESCRIPTOR = 1

#: Extensions in one message; two bytes count them.
_MOST_EXTENSIONS = 2**16 - 1

#: What a caller raises, by name: classes that take one text.  See "Errors" above.
_RAISED: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        ArithmeticError, AssertionError, AttributeError, BlockingIOError, BrokenPipeError, BufferError,
        ChildProcessError, ConnectionAbortedError, ConnectionError, ConnectionRefusedError,
        ConnectionResetError, EOFError, Exception, FileExistsError, FileNotFoundError, FloatingPointError,
        ImportError, IndexError, InterruptedError, IsADirectoryError, KeyError, LookupError, MemoryError,
        ModuleNotFoundError, NameError, NotADirectoryError, NotImplementedError, OSError, OverflowError,
        PermissionError, ProcessLookupError, RecursionError, ReferenceError, RuntimeError, TimeoutError,
        TypeError, UnboundLocalError, UnicodeError, ValueError, ZeroDivisionError,
    )
}  # fmt: skip


# --- descriptors and what is made of them ---------------------------------------------------------


class Luggage(Departure):
    """
    The descriptors that go along with a message.

    Attributes:
        to: who will have them.
    """

    __slots__ = ("to",)

    def __init__(self, to: Credentials) -> None:
        super().__init__()
        self.to = to


def release(parcel: tuple[Any, Any, Sequence[int]]) -> None:
    """Let go of what was made for a parcel, which has gone."""
    if isinstance(parcel[2], Departure):
        parcel[2].close()


Rebuild = Callable[[Descriptor, int | None, int], Any]

#: Bytes that may come of a stranger at a time, where nobody says less: with a request of his, or as the
#: answer of a door of his that was passed to us.
MOST_OF_A_STRANGER = 2**24


@attrs.frozen
class _Kind:
    code: int
    reduce: Callable[[Any, Luggage], None]
    rebuild: Rebuild


_kinds: dict[type, _Kind] = {}
_codes: dict[int, _Kind] = {}


def register(kind: type, code: int, reduce: Callable[[Any, Luggage], None], rebuild: Rebuild) -> None:
    """
    Let a kind of object cross data doors, which is made of one descriptor, as more than that.

    Args:
        kind: its class, subclasses excluded.
        code: of the extension, from 0 to 127.
        reduce: given the object and the ``Luggage``, adds the descriptor to that.
        rebuild: given the ``Descriptor``, the uid of who has sent it, and how many bytes he may answer
            with if it is a door and he a stranger, returns an object with a ``close()`` that has taken
            it over.  It believes nothing of it, and raises ``ValueError``.
    """
    if code in _codes or not 0 <= code <= 127:
        raise ValueError(f"extension {code} is taken, or none")
    _kinds[kind] = _codes[code] = _Kind(code, reduce, rebuild)


@attrs.frozen
class _Conversion:
    make: Callable[[Descriptor], Any]
    undo: Callable[[Any], list[Open]]


_conversions: dict[type, _Conversion] = {}


def register_conversion(
    kind: type, make: Callable[[Descriptor], Any], undo: Callable[[Any], list[Open]]
) -> None:  # fmt: skip
    """
    Say how to make an object of a type, where a procedure is annotated so, of a ``Descriptor``.

    Args:
        make: takes it over if it succeeds; believes nothing of it, and raises ``ValueError`` or ``OSError``.
        undo: takes the numbers out of such an object again; or returns itself, to be closed by who has time.
    """
    _conversions[kind] = _Conversion(make, undo)


#: What tells of a type that objects of it are sent as others are: iterators.
_similar: Callable[[type], bool] = bool
_like: type | None = None
_promise: Callable[[Any, Any], None]


def register_iterators(
    like: type, kinds: Iterable[type], similar: Callable[[type], bool], promise: Callable[[Any, Any], None]
) -> None:
    """
    Let iterators cross data doors as objects of a class that is registered.

    Args:
        like: that class.
        kinds: types of iterators.
        similar: tells of any other type with a ``__next__`` whether it is one, too.
        promise: is given an iterator, or an object of that class, and the annotation of its items.
    """
    global _similar, _like, _promise
    _similar, _like, _promise = similar, like, promise
    _kinds.update(dict.fromkeys(kinds, _kinds[like]))


class Arrivals:
    """
    The descriptors that came with a message, each of which may be taken once.

    Attributes:
        left: the numbers that nobody has taken, for their owner to close; -1 for one that was.
        passer: the uid of who has sent them.
        most: bytes that may come at most of a door among them with one answer, if he is a stranger.
        steps: what the keys of the message may take.
    """

    __slots__ = ("_made", "left", "most", "passer", "steps")

    def __init__(
        self, numbers: Sequence[int], passer: int | None = None, most: int = MOST_OF_A_STRANGER
    ) -> None:  # fmt: skip
        self.left = list(numbers)
        self.passer = passer
        self.most = most
        self.steps = Steps()
        self._made: list[tuple[Any, Callable[[Any], list[Open]]]] = []

    def rebuild(self, kind: _Kind, place: int) -> Any:
        """
        Make an object of the descriptor at a place.

        Raises:
            Unfit: there is none at this place any more.
            DoorError: nothing can be made of it.
        """
        if not 0 <= place < len(self.left) or self.left[place] < 0:
            raise Unfit(f"there is no descriptor {place}, or it is named twice")
        descriptor, self.left[place] = Descriptor(self.left[place]), -1
        if is_strange(self.passer):
            # Whoever drops it, or closes it, is a server thread, mostly, and may be the main one.
            descriptor._passed_by(self.passer, _close_for)
        try:
            made = kind.rebuild(descriptor, self.passer, self.most)
        except BaseException:
            if not descriptor.closed:
                self.left[place] = descriptor.take()
            raise
        self._made.append((made, _take_apart))
        return made

    def convert(self, descriptor: Descriptor, conversion: _Conversion) -> Any:
        """
        Make of a descriptor that was rebuilt what an annotation wants in its place.

        Raises:
            Unfit: that cannot be made of it.
            OSError: nor could it be found out, or there is no room.
        """
        try:
            made = conversion.make(descriptor)
        except ValueError as error:
            raise Unfit(text_of(error)) from error
        self._made.append((made, conversion.undo))
        return made

    def take_rest(self) -> list[int]:
        """Return the numbers that nobody has taken, for the caller to close."""
        rest = [number for number in self.left if number >= 0]
        self.left = []
        return rest

    def take_back(self) -> list[Open]:
        """Return all numbers, also those of objects that were made of them, for the caller to close."""
        made, self._made = self._made, []
        owned = [number for each, undo in made for number in undo(each)]
        return owned + self.take_rest()


def _close_for(number: int, passer: int | None) -> None:
    """Close a descriptor that a stranger has passed, waiting for nobody."""
    close_all([number], passer)


def _take_apart(made: Any) -> list[Open]:
    """Take the descriptor out of what was made of it, if that is a ``Descriptor``; else close it."""
    if isinstance(made, Descriptor):
        return [] if made.closed else [made.take()]
    made.close()
    return []


def _reduce_plainly(value: Any, luggage: Luggage) -> None:
    _passing.table[type(value)].reduce(value, luggage)


#: What anything else that crosses with a descriptor becomes here: see S8 above.
_PLAIN = _codes[_DESCRIPTOR] = _Kind(
    _DESCRIPTOR,
    _reduce_plainly,
    lambda descriptor, *_: descriptor,
)


def _reduce_again(value: Any, luggage: Any, *, kind: _Kind) -> _passing.Recipe:
    """Reduce an object that is to move; how it is made again over there, the extension says."""
    kind.reduce(value, luggage)
    return kind.rebuild, ()


def _add(value: Any, kind: _Kind, luggage: Luggage) -> int:
    """Add the descriptor of an object to the luggage; return its place there."""
    place = len(luggage)
    if type(value) is Taken:
        luggage.reduce_taken(value, functools.partial(_reduce_again, kind=kind))
    else:
        kind.reduce(value, luggage)
    if len(luggage) != place + 1:
        raise TypeError(f"objects of type {type(value).__qualname__} are not made of one descriptor")
    return place


def _kind_of(kind: type) -> _Kind | None:
    """Return how objects of a type cross that are made of a descriptor, or None."""
    known = _kinds.get(kind)
    if known is None and type(_passing.table.get(kind)) is _passing.Kind:
        return _PLAIN
    if known is None and _like is not None and hasattr(kind, "__next__") and _similar(kind):
        return _kinds[_like]
    return known


#: What the message that is being read has brought, or what it refers to while it is only looked at.
_arrivals: ContextVar[Arrivals | list[Any]] = ContextVar("doorpool.arrivals")

#: What the message that is being written takes along: the numbers, and the objects that they are of.
_departing: ContextVar[tuple[Luggage, list[Any]]] = ContextVar("doorpool.departing")
_NOBODY = Credentials(None, None, None, None)


# --- hooks ----------------------------------------------------------------------------------------


#: How to get the plain value out of one of a subclass, whose own methods are not asked.
_BARE: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    str: str.__str__,
    float: float.__float__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
}


def _write(value: Any) -> Any:
    """Reduce what msgspec does not know by itself; see ``msgspec.msgpack.Encoder``."""
    bare_value = value.obj if type(value) is Taken else value
    known = _kind_of(type(bare_value))
    if known is not None:
        luggage, objects = _departing.get()
        if len(objects) > _MOST_EXTENSIONS:
            raise ValueError(f"more than {_MOST_EXTENSIONS} objects of descriptors")
        body = len(objects).to_bytes(2, "big") + _add(value, known, luggage).to_bytes(2, "big")
        objects.append(bare_value)
        return Ext(known.code, body)
    for plain, bare in _BARE.items():
        if isinstance(value, plain):  # of a class that is one and more; what is more stays here
            return bare(value)
    raise TypeError(f"objects of type {type(value).__module__}.{type(value).__qualname__} are not plain data")


def _read_extension(code: int, body: memoryview) -> Any:
    """Make what an extension stands for."""
    kind = _codes.get(code)
    if kind is None:
        raise Unfit(f"there is no extension {code}")
    if len(body) != 4:
        raise Unfit(f"an object and its descriptor are named by four bytes, not by {len(body)}")
    arrivals = _arrivals.get()
    if isinstance(arrivals, list):  # only looked at, by whoever wrote it
        return arrivals[int.from_bytes(body[:2], "big")]
    return arrivals.rebuild(kind, int.from_bytes(body[2:], "big"))


def _check_custom(kind: Any, value: Any) -> Any:
    """Accept an object where an annotation wants one of a class that MessagePack does not know."""
    wanted = typing.get_origin(kind) or kind
    if isinstance(wanted, type) and isinstance(value, wanted):
        return _check_items(kind, value) if wanted in _ITERATED else value
    arrivals, conversion = _arrivals.get(None), _conversions.get(kind)
    if isinstance(value, Descriptor) and conversion is not None and isinstance(arrivals, Arrivals):
        return arrivals.convert(value, conversion)
    name = getattr(kind, "__qualname__", kind)
    raise Unfit(f"Expected `{name}`, got `{type(value).__qualname__}`")


def _check_items(kind: Any, value: Any) -> Any:
    """
    See to it that what is iterated over is of the type that the annotation says.

    Of what is no iterator, a list of its items is made; those of a dict, its keys, are not yet of that type.
    """
    item = _item_of(kind)
    if item is Any:
        return value
    if hasattr(value, "__next__"):
        _promise(value, item)
        return value
    return convert_items(list(value), item)


def convert_items(items: list[Any], item: Any) -> list[Any]:
    """
    Make of plain data what an annotation says of each.

    Raises:
        Exception: one does not fit.
    """
    _check_keys(items, list[item], _steps_of_message())
    return msgspec.convert(items, list[item], dec_hook=_check_custom)


def convert_item(name: str, value: Any, item: Any, steps: Steps) -> Any:
    """Do so with one; a ``MarshalError`` says the name, and what is wrong in it and where."""
    try:
        _check_keys(value, item, steps)
        return msgspec.convert(value, item, dec_hook=_check_custom)
    except Exception as error:
        raise MarshalError(printable("".join(_where(name, error))), may_have_run=True) from error


def _steps_of_message() -> Steps:
    arrivals = _arrivals.get(None)
    return arrivals.steps if isinstance(arrivals, Arrivals) else Steps()


def _check_keys(value: Any, kind: Any, steps: Steps) -> None:
    """Refuse to make of plain data what has keys that collide; those that it has were looked at."""
    reader = _reader_of(kind)
    if reader.makes_keys:
        reader.check(_shape_encoder.encode(value), steps)


_reader_of = functools.lru_cache(256)(Reader)
_shape_encoder = Encoder(enc_hook=lambda value: None)

#: Annotations of what is iterated over, which msgspec does not look into.
_ITERATED = (Iterator, Iterable, Generator)


def _item_of(kind: Any) -> Any:
    item = next(iter(typing.get_args(kind)), Any)
    return Any if item is object else item


_encoder = Encoder(enc_hook=_write)
_decoder_of = functools.partial(Reader, ext_hook=_read_extension, dec_hook=_check_custom)
_read_plain = _decoder_of(Any)
_read_call = Decoder(tuple[list[msgspec.Raw], dict[str, msgspec.Raw]])


def _encode(value: Any, to: Credentials | None = None) -> tuple[bytes, Luggage, list[Any]]:
    """Write a value; return the bytes, the descriptors, and the objects that these are of."""
    if _passing.late:
        _passing.look_for_late()
    luggage = Luggage(to or _NOBODY)
    objects: list[Any] = []
    token = _departing.set((luggage, objects))
    try:
        return _encoder.encode(value), luggage, objects
    except BaseException:
        luggage.close()
        raise
    finally:
        _departing.reset(token)


# --- what a procedure takes -----------------------------------------------------------------------


def _check_parts(hint: Any, seen: set[Any]) -> None:
    """
    Look at what an annotation says of the parts of classes that msgspec does not know, wherever in it.

    Of such a class it asks us for no more than whether something is one, and a list is a ``Container[int]``
    whatever is in it.  So what is iterated over we look into ourselves; what else can be no more than a door
    (a ``Callable[[int], int]``) stands for what is over there; and the rest says what nobody would see to.

    Raises:
        TypeError: it says something that cannot be checked.
    """
    try:
        if hint in seen:
            return
        seen.add(hint)
    except TypeError:  # what a ``Callable`` takes
        return
    origin: Any = typing.get_origin(hint)
    if origin in _ITERATED:
        _decoder_of(_item_of(hint))
    elif (
        isinstance(origin, type)
        and origin is not typing.Annotated
        and _says_of_parts(hint)
        and _is_custom(hint)
        and not _is_a_door(origin)
    ):
        raise TypeError(f"what it says of the parts of {inspect.formatannotation(hint)} cannot be checked")
    for part in _parts_of(hint, origin or hint):
        _check_parts(part, seen)


def _says_of_parts(hint: Any) -> bool:
    anything = Any, object
    return any(
        part not in anything and type(part) is not typing.TypeVar for part in typing.get_args(hint)
    )  # fmt: skip


def _is_custom(hint: Any) -> bool:
    return isinstance(msgspec.inspect.type_info(hint), msgspec.inspect.CustomType)


def _is_a_door(origin: Any) -> bool:
    """Tell whether doors and the like are of a class, and nothing is that is data."""
    return any(issubclass(kind, origin) for kind in _kinds) and not any(
        issubclass(kind, origin) for kind in _DATA
    )


_DATA = type(None), bool, int, float, str, bytes, list, dict, datetime.datetime


def _parts_of(hint: Any, origin: Any) -> Iterator[Any]:
    """Find the annotations in an annotation, those of the fields of a class included."""
    if origin not in (typing.Literal, typing.ClassVar):
        yield from typing.get_args(hint)[: 1 if origin is typing.Annotated else None]
    for name in ("__supertype__", "__value__", "__bound__"):  # ``NewType``, ``type X = ...``, ``TypeVar``
        if not isinstance(hint, type) and (part := getattr(hint, name, None)) is not None:
            yield part
    if isinstance(origin, type) and _has_fields(origin):
        yield from typing.get_type_hints(origin, include_extras=True).values()


def _has_fields(kind: type) -> bool:
    """Tell whether msgspec makes objects of a class of what is said of its fields."""
    known = "__struct_fields__", "__dataclass_fields__", "__attrs_attrs__", "__total__", "_field_defaults"
    return any(hasattr(kind, name) for name in known)


#: What a procedure may say that it returns and no object is an instance of, and what it means.
_STAND_FOR: dict[Any, type] = {typing.IO: io.IOBase, typing.BinaryIO: io.IOBase, typing.TextIO: io.TextIOBase}


class Plan:
    """
    What a procedure takes and returns, ready to be compared with what comes.

    Args:
        function: anything that is called: its signature and its annotations count.  Of one that
            has no signature (some builtins), nothing is known and nothing is checked.

    Raises:
        TypeError: an annotation cannot be resolved, or is none that can be checked.
    """

    __slots__ = ("_decoders", "_hints", "_joined", "_returns", "_signature", "name")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = str(getattr(function, "__qualname__", None) or type(function).__qualname__)
        self._signature = _signature_of(function)
        hints = _hints_of(function)
        self._decoders: dict[str, Reader] = {}
        self._hints: dict[str, str] = {}  # what messages say of each parameter
        self._joined: set[str] = set()  # variadic parameters of which one type says what all get together
        for parameter in self._signature.parameters.values() if self._signature else ():
            hint = hints.get(parameter.name, Any)
            if typing.get_origin(hint) is typing.Unpack:
                hint = typing.get_args(hint)[0]
                self._joined.add(parameter.name)
            if hint is not Any:
                self._hints[parameter.name] = f" ({parameter.name} is: {inspect.formatannotation(hint)})"
            self._decoders[parameter.name] = self._decoder(f"the parameter {parameter.name!r}", hint)
        # What a class returns is itself; what ``__init__`` returns says nothing.
        hint = Any if isinstance(function, type) else hints.get("return", Any)
        hint = _STAND_FOR.get(typing.get_origin(hint) or hint, hint)
        self._returns = None if hint in (Any, object) else self._decoder("the result", hint)

    def _decoder(self, what: str, hint: Any) -> Reader:
        try:
            decoder = _decoder_of(hint)
            _check_parts(hint, set())
            return decoder
        except Exception as error:
            raise TypeError(f"{self.name}: {what} cannot be checked as data: {error}") from error

    # -- arguments ---------------------------------------------------------------------------

    def convert(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
        """
        Make of the pieces that came what the procedure is to be called with.

        Raises:
            MarshalError: they do not fit; it names the parameter, the path in it and what it expects.
        """
        steps = _steps_of_message()
        if self._signature is None:
            fit = functools.partial(_fit, decoder=_read_plain, steps=steps)
            positional = [fit(f"args[{n}]", piece=piece) for n, piece in enumerate(args)]
            named = {
                name: fit(f"kwargs[{clip(repr(name), 64)}]", piece=piece) for name, piece in kwargs.items()
            }
            return tuple(positional), named
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise _misfit(f"{self.name}(): {error}") from None
        given = bound.arguments
        for parameter in self._signature.parameters.values():
            if parameter.name in given:
                given[parameter.name] = self._fit_parameter(parameter, given[parameter.name], steps)
        return bound.args, bound.kwargs

    def _fit_parameter(self, parameter: inspect.Parameter, given: Any, steps: Steps) -> Any:
        name, decoder = parameter.name, self._decoders[parameter.name]
        fit = functools.partial(_fit, decoder=decoder, steps=steps, hint=self._hints.get(name, ""))
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return fit(name, piece=given)
        if name in self._joined:
            return fit(name, piece=_encoder.encode(given))
        if parameter.kind is parameter.VAR_POSITIONAL:
            return tuple(fit(f"{name}[{n}]", piece=piece) for n, piece in enumerate(given))
        return {key: fit(f"{name}[{clip(repr(key), 64)}]", piece=piece) for key, piece in given.items()}

    # -- the result --------------------------------------------------------------------------

    def pack_result(self, value: Any, to: Credentials | None = None) -> Parcel:
        """
        Marshal what the procedure returned.

        Args:
            to: who will have it.

        Raises:
            MarshalError: it is not what the annotation promises, or no data; it names the path.
            BusyError: no free descriptor for one that is to go along.
            ShareError: whoever is to have it has too many.
        """
        try:
            data, luggage, objects = _encode(value, to)
        except Exception as error:
            raise _result_error(value, error, to) from error
        try:
            if self._returns is not None:
                _check_written(self._returns, data, objects, to)
            return _RESULT + data, (), _seal_result(luggage, value)
        except BaseException:
            luggage.close()
            raise


def _result_error(value: Any, error: Exception, to: Credentials | None) -> DoorError:
    if isinstance(error, OSError) and error.errno in SHORTAGE:
        return BusyError(f"the result cannot be sent: {error.strerror}", may_have_run=True)
    return _cannot_write((("result", value),), error, to, may_have_run=True)


def _seal_result(luggage: Luggage, value: Any) -> Luggage:
    try:
        luggage.seal()
    except ShareError:
        raise
    except Exception as error:
        raise _result_error(value, error, luggage.to) from error
    return luggage


def _signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


_FUNCTIONS = types.FunctionType, types.MethodType, types.BuiltinFunctionType


def _hints_of(function: Any) -> dict[str, Any]:
    """
    Return the annotations of what is called, as types.

    Raises:
        TypeError: one of them says nothing here.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        begin = inspect.getattr_static(function, "__init__")
        function = begin if isinstance(begin, types.FunctionType) else function
    elif not isinstance(function, _FUNCTIONS) and not hasattr(function, "__wrapped__"):
        function = type(function).__call__
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        name = getattr(function, "__qualname__", function)
        raise TypeError(
            f"an annotation of {name} says nothing here ({error}), so what comes cannot be compared with it"
        ) from error


_plans: dict[Any, Plan] = {}
_MOST_PLANS = 1_000


def plan_of(function: Callable[..., Any]) -> Plan:
    """Return the plan of a function or method, made when it is first asked for.  Raises as ``Plan``."""
    # A method is made anew at each look at it; its function and whether it is bound are what counts.
    key = getattr(function, "__func__", function), getattr(function, "__self__", None) is not None
    try:
        plan = _plans.get(key)
    except TypeError:  # it cannot be hashed
        return Plan(function)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = Plan(function)
    return plan


def convert(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Make of what ``unpack_arguments`` gave what a function is to be called with.  Raises as ``Plan``."""
    return plan_of(function).convert(args, kwargs)


# --- misfits --------------------------------------------------------------------------------------


_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]|\[\.\.\.\]")
_SOMEWHERE = "[...]"  # how msgspec writes the way to a value of a dict

#: Characters that are looked at of msgspec's word about a misfit.  It quotes whole what it was sent: 16 MiB
#: of a stranger's text, and whatever he has written into that, such as what ends a word of msgspec's.
_MAX_WORD = 2048


def _misfit(text: str) -> MarshalError:
    return MarshalError(printable(text), may_have_run=False)


class Discreet(MarshalError):
    """
    A value does not fit, or cannot be written, perhaps because of what the code of its own type has raised.

    The text of that is for the log and for our own user and root: files and secrets may be named in it.
    Strangers are told of it what they are told of an exception that leaves a procedure.

    Args:
        where: says in what.
        what: is wrong.
        after: is said after it.
        foreign: what that code has raised, if that is why.
        to: who will have the text, if it is known; else it is in full.
    """

    def __init__(
        self,
        where: str,
        what: str,
        after: str,
        foreign: BaseException | None,
        *,
        may_have_run: bool,
        to: Credentials | None = None,
    ) -> None:
        self._parts = where, what, after
        self._foreign = foreign
        spares = to is not None and is_strange(to.uid)
        super().__init__(
            self.for_strangers(()) if spares else printable(where + what + after), may_have_run=may_have_run
        )

    def for_strangers(self, errors: tuple[type[BaseException], ...] | None) -> str:
        """Return the text for strangers; ``errors`` as of ``is_told``."""
        where, what, after = self._parts
        if self._foreign is not None:
            what = outline(self._foreign, errors)
        return printable(where + what + after)


def _foreign_in(error: BaseException) -> BaseException | None:
    """Find in what reading has raised the exception of a type's own code that it was raised because of."""
    if _is_foreign(error):
        return error
    if isinstance(error, msgspec.ValidationError):
        # msgspec puts the ``ValueError`` or ``TypeError`` of a hook into one of its own.
        return None if isinstance(error.__cause__, Unfit) else error.__cause__
    return None if isinstance(error, msgspec.MsgspecError | Unfit | DoorError | RecursionError) else error


def _is_foreign(error: BaseException) -> bool:
    """Tell whether an exception has come through code that is not the library's (nor msgspec's, in C)."""
    trace = error.__traceback__
    while trace is not None:
        if not str(trace.tb_frame.f_globals.get("__name__")).startswith("doorpool."):
            return True
        trace = trace.tb_next
    return False


def outline(error: BaseException, errors: tuple[type[BaseException], ...] | None) -> str:
    """Say of an exception what strangers are told: its name, and its text if that is told."""
    name = name_of(error)
    if not is_told(error, errors):
        return name
    args = error.args
    if type(error) in (ValueError, TypeError) and len(args) > 1 and isinstance(args[0], str):
        said = args[0]  # of ``attrs``, whose validators add what the class looks like
    else:
        said = _said(error, paths=errors is not None)
    return f"{name}: {clip(said, _MAX_WORD)}" if said else name


def _split(text: str) -> tuple[str, str, str]:
    """
    Take apart what msgspec says of a misfit, which ends with "- at `$.a[0]`" or "- at `key[1]` in `$.a`".

    Returns:
        What is wrong, cut; the path, without the ``$``, if one is said; and of a key ``key`` and the path
        in that, else nothing.
    """
    text = clip(text, _MAX_WORD)  # before anything looks at it: what is sought is at the end
    _, found, tail = text[-_MAX_WORD // 2 :].rpartition(" - at `")
    key, inside, path = tail.rpartition("` in `")
    if not (found and path.startswith("$") and path.endswith("`")):
        return text, "", ""
    if inside and (not key.startswith("key") or "`" in key):
        return text, "", ""
    return text[: -len(found + tail)], path[1:-1], key


def _where(
    name: str, error: Exception, decoder: Reader | None = None, piece: Any = b""
) -> tuple[str, str]:  # fmt: skip
    """Say where in something of a name, which msgspec calls ``$``, something is wrong, and what."""
    if isinstance(error, msgspec.ValidationError):
        said, path, key = _split(text_of(error))
        if _SOMEWHERE in path and decoder is not None:
            path = _with_keys(path, decoder, piece)
        return f"{name}{path}{key and f', a {key}'}: ", said
    text = clip(text_of(error), _MAX_WORD)
    if isinstance(error, ValueError):
        return f"{name}: ", text
    if isinstance(error, RecursionError):
        return f"{name}: ", "it is nested too deeply"
    return f"{name}: ", f"{name_of(error)}: {text}"


def _with_keys(path: str, decoder: Reader, piece: Any) -> str:
    """
    Say in a path which keys lead to the misfit, as far as that can be found out.

    Half of a dict is taken away, again and again, as long as the rest does not fit either; then the same is
    done with the next dict in it.  Where all that is sent is in these dicts, all readings together are of
    little more than there is.  But what stands beside them is read each time, and a stranger may send much
    of that; so there is an end to it, and keys that were not found by then are left as they are.
    """
    again = _Again(decoder, 2 * len(piece) + _MORE_READ)
    told = ""
    try:
        place = whole = _read_bare.decode(piece)
        for step in _STEP.finditer(path):
            key: Any
            if step[0] == _SOMEWHERE:
                if not again.leave_misfit(place, whole):
                    return told + path[step.start() :]
                key = next(iter(place))
                told += f"[{clip(repr(key), 64)}]"
            else:
                key, told = step[1] if step[1] is not None else int(step[2]), told + step[0]
            place = place[key]
    except Exception:  # it cannot: a key that is no key in Python, an extension, keys that collide
        return path
    return told


#: Bytes that are read of any message, besides twice as many as it has, to find keys that do not fit: some
#: tens of readings where it is small.
_MORE_READ = 2**16


class _Again:
    """
    Parts of a message that are read again, no more than so many bytes of them; keys as of one message.
    """

    __slots__ = ("_decoder", "_left", "_steps")

    def __init__(self, decoder: Reader, most: int) -> None:
        self._decoder = decoder
        self._left = most
        self._steps = Steps()

    def leave_misfit(self, place: dict[Any, Any], whole: Any) -> bool:
        """Leave in a dict, a part of a whole, the item for which that does not fit; false at the end."""
        while len(place) > 1:
            items = list(place.items())
            place.clear()
            place.update(items[: len(items) // 2])
            piece = _bare_encoder.encode(whole)
            self._left -= len(piece)
            if self._left < 0:
                return False
            if self._fits(piece):
                place.clear()
                place.update(items[len(items) // 2 :])
        return True

    def _fits(self, piece: bytes) -> bool:
        try:
            self._decoder.decode(piece, self._steps)
        except msgspec.ValidationError:
            return False
        return True


_read_bare, _bare_encoder = Reader(Any), Encoder()


def _fit(name: str, decoder: Reader, piece: Any, steps: Steps | None = None, hint: str = "") -> Any:
    """Read one argument; what its type's own code does meanwhile is its own affair, but for errors."""
    try:
        return decoder.decode(piece, steps)
    except Exception as error:
        where, what = _where(f"the argument {name}", error, decoder, piece)
        raise Discreet(where, what, hint, _foreign_in(error), may_have_run=False) from error


def _check_written(decoder: Reader, data: bytes, objects: list[Any], to: Credentials | None) -> None:
    token = _arrivals.set(list(objects))
    try:
        decoder.decode(data)
    except Exception as error:
        where, what = _where("result", error, decoder, data)
        after = ", which is not what the procedure promises"
        raise Discreet(where, what, after, _foreign_in(error), may_have_run=True, to=to) from error
    finally:
        _arrivals.reset(token)


def _cannot_write(
    parts: tuple[tuple[str, Any], ...], error: Exception, to: Credentials | None, *, may_have_run: bool
) -> MarshalError:  # fmt: skip
    path = next((path for label, value in parts if (path := _find(label, value, to)) is not None), "it")
    if isinstance(error, RecursionError):
        why = "it is nested too deeply, or contains itself"
    elif isinstance(error, OverflowError):
        why = "an int of data has at most 64 bits"
    else:
        why = clip(text_of(error), _MAX_TEXT)
    where = f"{path} cannot cross a data door: "
    if not may_have_run:
        return MarshalError(f"{where}{why}", may_have_run=False)
    foreign = error if _is_foreign(error) else None
    return Discreet(where, why, "", foreign, may_have_run=True, to=to)


_STEPS = 64  # of a path


def _find(path: str, value: Any, to: Credentials | None) -> str | None:
    """Find what cannot be written, and the path to it; None if nothing stands in the way."""
    if _fails(value, to):
        for _ in range(_STEPS):
            step = next(((name, part) for name, part in _parts(value) if _fails(part, to)), None)
            if step is None:
                break
            path, value = path + step[0], step[1]
        return path
    return None


def _fails(value: Any, to: Credentials | None) -> bool:
    try:
        _, luggage, _ = _encode(value, to)
    except Exception:  # whatever it is; which of the parts raises is all that is asked here
        return True
    luggage.close()
    return False


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value, and how one gets to them."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"[key {_shown(key)}]", key
            yield f"[{_shown(key)}]", part
    elif isinstance(value, list | tuple | set | frozenset):
        for place, part in enumerate(value):
            yield f"[{place}]", part
    else:
        for name in _fields_of(value):
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)


def _shown(key: Any) -> str:
    """Write a key in a path; of an object the type alone, whose ``repr`` may show more than is sent."""
    return clip(repr(key), 64) if type(key) in _PLAIN_KEYS else f"<{type(key).__qualname__}>"


_PLAIN_KEYS = frozenset((str, int, float, bytes, bool, type(None)))


def _fields_of(value: Any) -> Sequence[str]:
    kind = type(value)
    if isinstance(value, msgspec.Struct):
        return kind.__struct_fields__  # type: ignore[no-any-return]
    fields = getattr(kind, "__dataclass_fields__", None)
    if fields is None and attrs.has(kind):
        return [each.name for each in attrs.fields(kind)]
    return tuple(fields or ())


# --- the public verbs -----------------------------------------------------------------------------


def pack_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], to: Credentials | None = None
) -> Parcel:  # fmt: skip
    """
    Marshal the arguments of a call; the parcel is to be released when the call is over.

    Args:
        to: who will have them.

    Raises:
        MarshalError: one of them is no data; it names the path to it.  Nothing was sent.
        OSError: ``EMFILE``: no free descriptor for a door that is to go along.
    """
    try:
        data, luggage, _ = _encode((args, kwargs), to)
        try:
            luggage.seal()
        except BaseException:
            luggage.close()
            raise
        return data, (), luggage
    except Exception as error:
        if isinstance(error, OSError) and error.errno in SHORTAGE:
            raise
        parts = (("args", args), ("kwargs", kwargs))
        raise _cannot_write(parts, error, to, may_have_run=False) from error


def unpack_arguments(data: Data) -> tuple[list[msgspec.Raw], dict[str, msgspec.Raw]]:
    """
    Take the arguments of a call apart, for ``convert``, nothing of them having been read.

    Raises:
        MarshalError: these are no arguments.
    """
    try:
        return _read_call.decode(data)
    except Exception as error:
        raise _misfit(f"what arrived are no arguments: {text_of(error)}") from error


def reading(arrivals: Arrivals, read: Callable[[], Any]) -> Any:
    """Read something that may name descriptors, of these; whoever called owns what is left of them."""
    token = _arrivals.set(arrivals)
    try:
        return read()
    finally:
        _arrivals.reset(token)


def pack_exception(error: BaseException, *, text: bool, paths: bool, frames: bool) -> Parcel:
    """
    Marshal what left a procedure.  Never fails.

    Args:
        text: say what its text is, and not only its type.
        paths: also the file names that an ``OSError`` of the system has.
        frames: send the traceback along.
    """
    said = clip(_said(error, paths), _MAX_TEXT) if text else None
    trace = clip(traceback_of(error), MAX_TRACEBACK) if frames else None
    return _EXCEPTION + _encode([name_of(error), _whole(said), _whole(trace)])[0], (), ()


def _whole(text: str | None) -> str | None:
    """Replace what cannot be written as UTF-8: lone surrogates, of a file's name perhaps."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def _said(error: BaseException, paths: bool) -> str:
    try:
        if isinstance(error, OSError) and error.errno is not None and not paths:
            return error.strerror or ""
        if type(error) is KeyError and len(error.args) == 1 and isinstance(error.args[0], str):
            return error.args[0]  # the ``str`` of it has quotes around, and would get more
    except Exception:  # ``args`` may be anybody's property
        return ""
    return text_of(error)


def is_told(error: BaseException, errors: tuple[type[BaseException], ...] | None) -> bool:
    """Tell whether strangers are told the text of an exception: by the endpoint's word, or the table's."""
    return type(error) in _TOLD if errors is None else isinstance(error, errors)


_TOLD = frozenset(_RAISED.values())


def pack_refusal(error: DoorError) -> Parcel:
    """Marshal the library's own word about this call.  Never fails."""
    kind = _BAD_RESULT if error.may_have_run else _MISFIT
    if error.may_have_run and isinstance(error, BusyError):
        kind = _NO_ROOM
    return kind + _encode(_whole(clip(text_of(error), _MAX_TEXT)))[0], (), ()


def unpack_outcome(data: Data, arrivals: Arrivals) -> Any:
    """
    Return what the procedure returned, or raise what it raised.

    Raises:
        ProtocolError: this is no outcome.
        MarshalError: the arguments did not fit, or the result.
        BusyError: the server had no descriptor left for the result.
        Exception: of the fixed table; a ``RemoteError`` for all else.
    """
    kind, body = bytes(data[:1]), memoryview(data)[1:]
    shown = printable_lines if is_strange(arrivals.passer) else _as_it_is
    try:
        if kind == _RESULT:
            return reading(arrivals, functools.partial(_read_plain.decode, body))
        if kind == _EXCEPTION:
            name, said, trace = _read_error.decode(body)
            error: Exception = _rebuild(shown(name), said and shown(said), trace and shown(trace))
        elif kind in (_MISFIT, _BAD_RESULT):
            error = MarshalError(shown(_read_text.decode(body)), may_have_run=kind == _BAD_RESULT)
        elif kind == _NO_ROOM:
            error = BusyError(shown(_read_text.decode(body)), may_have_run=True)
        else:
            raise ValueError("it is none of the five kinds")
    except Exception as failure:
        text = printable(f"what arrived is no outcome of a call: {text_of(failure)}")
        raise ProtocolError(text, may_have_run=True) from failure
    try:
        raise error
    finally:
        del error  # or this frame and the exception's traceback hold one another, and the call's arguments


def _as_it_is(text: str) -> str:
    return text


def read_text(piece: Any) -> str:
    """Read a piece of the arguments that is a text.  Raises ``MarshalError`` if it is none."""
    return _fit("args[0]", _read_text, piece)  # type: ignore[no-any-return]


def read_value(piece: Any) -> Any:
    """Read a piece of the arguments that may be anything, within ``reading``.  Raises ``MarshalError``."""
    return _fit("a value", _read_plain, piece, _steps_of_message())


_read_error = Decoder(tuple[str, str | None, str | None])
_read_text = Reader(str)


def _rebuild(name: str, text: str | None, trace: str | None) -> Exception:
    kind = _RAISED.get(name)
    error: Exception
    if kind is not None:
        error = kind() if text is None else kind(text)
    else:
        name = clip(name, _MAX_TEXT)
        error = RemoteError(f"{name}: {text}" if text else name, type_name=name)
    if trace is not None:
        error.__cause__ = RemoteTraceback(trace)
    return error
