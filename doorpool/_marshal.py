"""
Objects to (bytes, buffers, descriptors), and back.

The job: the arguments, the result or the exception of a call become a ``Parcel`` on one
side and themselves again on the other.  No socket, no thread: whoever moves the parcel has
already decided that these two processes may speak pickle, since unpickling is running the
sender's code.  There is *one* place in the library that unpickles, ``_unpickle``, and it
counts its runs, so that a test can show that a stranger's bytes never got there.

What is sent.  Arguments are the pickle of ``(args, kwargs)``.  An outcome tells by its
first byte what it is:

    0x80   a result; it is the first byte of any pickle, so a result costs no byte and no copy
    'E'    an exception that left the procedure, as an envelope (see ``_exceptions``)
    'R'    a refusal: a ``DoorError`` of the library about this very call

Memory that pickle can lend (NumPy's arrays and the like) goes beside the bytes as buffers,
without a copy, from a page on; smaller it is cheaper inside.  ``bytes`` stay inside always.

By reference or by value.  "Pickle where it can" is wrong: a client's ``__main__.Config``
silently becomes the server script's own ``Config``.  "Always by value" is wrong too: when
one script plays both roles, ``isinstance`` and ``except`` stop working.  So:

    of __main__, both sides run the same file   by reference, looked up in the *receiver's*
                                                __main__, whatever it calls that
    of __main__, otherwise                      by value (cloudpickle)
    of a module that can be imported            by reference
    lambdas, closures, local classes, what
    cloudpickle's registry names                by value

By value means code, and code needs the same minor version of Python on both sides.  Each
side says what it is in a ``Dialect``; a false one harms only its sender's own objects.

A class that went out by value and comes home is the class it was, untouched: cloudpickle
would set its methods anew, to copies that see copies of its module's globals.

Speed.  A call marshals four times, and the rest of it takes a few microseconds.  Numbers, short
strings, small containers of them and the like do not come here at all where there is the
compiled part: ``_atoms.c`` writes and reads their pickles, counting them as well, and whoever
calls asks it first. For the others: atoms go straight through ``pickle.dumps``; all else through a
``Pickler`` that is *reused*, since making one costs more than most arguments (1.2 µs against 0.4 µs
for ``((1, 2), {})``); and there is no ``dispatch_table`` on it, since a look-up there that misses
costs a ``KeyError`` per object (10 % of an object graph, and 145 % through cloudpickle's own, a
``ChainMap``): ``reducer_override``, which is asked anyway, looks into cloudpickle's table by
``dict.get``. ``add(1, 2)`` takes 1.7 µs for all four, 0.75 µs with bare pickle (CPython 3.11, 2-CPU
virtual machine).

When something cannot be pickled, the C pickler does not say where it was.  The value is
then pickled once more, by the pickler that is written in Python, which can be asked what
it stands in; nothing has been sent by then.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import os
import pickle
import stat
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, cast

import attrs
import cloudpickle
from cloudpickle import cloudpickle as _cloudpickle

from doorpool import _exceptions, _kinds, _passing  # noqa: F401  # _kinds registers
from doorpool._descriptor import NOBODY
from doorpool._errors import BusyError, DoorError, MarshalError, ProtocolError
from doorpool._impl import shuttle
from doorpool._janitor import close_all
from doorpool._log import came_by_a_signal

Data = bytes | bytearray | memoryview

#: Protocol 5 has the buffers; a higher one would not be understood by Python 3.11.
_PROTOCOL = 5

_dumps, _loads = pickle.dumps, pickle.loads

_RESULT, _EXCEPTION, _REFUSAL = 0x80, ord("E"), ord("R")

#: Types that pickle handles without ever asking us, and that hold nothing.
_ATOMS = frozenset((int, str, float, bool, bytes, types.NoneType))
_SMALL_ATOMS = _ATOMS - {bytes}

#: Bytes from which a buffer travels beside the pickle and not in it: a page.  Two copies of
#: one take 0.2 µs, less than any bookkeeping for one buffer more.
_BESIDE = 65536

#: Length from which ``bytes`` travel beside the pickle too, if they are an argument or the result
#: themselves: one copy in and one out.  Inside a pickle there are four.  (Not a bytearray, which
#: may be the same object as one further inside.)
_LONG = 1 << 16

#: Bytes of pickle after which a pickler is not kept: its memo keeps the size it has grown to.
_KEEP = 65536

_MAINS = ("__main__", "__mp_main__")

_NO_MAIN = bytes(16)

#: What may leave an object's code while it is rebuilt at the caller's end, and must not end the
#: caller; a Ctrl-C is his own.
_FAILURES = (Exception, SystemExit, GeneratorExit)

#: How often ``_unpickle`` has run in this process.
_runs = 0


def __getattr__(name: str) -> int:
    """Say how often this process has ``unpickled``, in C or not; for tests, which compare two readings."""
    if name == "unpickled":
        return _runs + shuttle.unpacked()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@attrs.frozen
class Dialect:
    """
    What one side says of itself, so that the other can choose how to marshal.

    A claim: it decides how objects travel, and never whom to trust.

    Attributes:
        python: major and minor version.
        main: 16 bytes that are equal where both sides run the same script; zeros for none.
    """

    python: tuple[int, int]
    main: bytes

    def shares_main(self) -> bool:
        """Tell whether that side and this process run the same script."""
        return any(self.main) and self.main == own_dialect().main


#: What is to be sent, a bare tuple because an object would cost 0.1 µs at each end of a call:
#: - the pickle, or an envelope;
#: - memory to be sent beside it, in this order; still the sender's objects' own, so it must be
#:   copied or sent before the call returns.  One may be empty;
#: - what must go along as descriptors: a departure, to be closed when the call is over, or ().
Parcel = tuple[bytes, tuple[memoryview, ...], _passing.Departure | tuple[()]]


# --- who we are ---------------------------------------------------------------------------------

_known: tuple[object, object, Dialect] | None = None


def own_dialect() -> Dialect:
    """
    Say what this process is.

    Any thread; touches the file system only when ``__main__`` is not the one it was, so that
    the answer is of the script as it was when it was read, even if it is edited later.
    """
    global _known
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    known = _known
    if known is None or known[0] is not main or known[1] != file:
        _known = known = main, file, Dialect(sys.version_info[:2], _identify(file))
    return known[2]


def _identify(file: object) -> bytes:
    # None for -c, a prompt, standard input; a pipe (``python <(...)``) is as good as none.
    if not isinstance(file, str):
        return _NO_MAIN
    try:
        path = os.path.realpath(file)
        status = os.stat(path)
    except (OSError, ValueError):
        return _NO_MAIN
    if not stat.S_ISREG(status.st_mode):
        return _NO_MAIN
    words = f"{path}\0{status.st_dev}\0{status.st_ino}\0{status.st_mtime_ns}"
    return hashlib.blake2b(os.fsencode(words), digest_size=16).digest()


own_dialect()  # now: the script may be edited before the first door is opened


# --- the public verbs ---------------------------------------------------------------------------


def pack_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], to: Dialect) -> Parcel:
    """
    Marshal the arguments of a call for the side that ``to`` describes.

    Raises:
        MarshalError: one of them cannot cross; it names the path to it.  Nothing was sent.
        OSError: ``EMFILE``: no free descriptor for a duplicate of one that is to go along.
    """
    call = (args, kwargs)
    for value in args:  # by hand: ``issuperset`` would take 0.15 µs more
        kind = type(value)
        if kind not in _SMALL_ATOMS and (kind is not bytes or len(value) >= _LONG):
            break
    else:
        if not kwargs or _all_atoms(kwargs):
            return _dumps(call, _PROTOCOL), (), ()
    try:
        return _dump(_with_long(args, kwargs) if _has_long(args, kwargs) else call, to)
    except Exception as error:
        parts = (("args", args), ("kwargs", kwargs))
        if came_by_a_signal(error) or isinstance(error, _passing.NoDescriptorError):
            raise
        raise _cannot_cross(error, parts, to, may_have_run=False) from error


def unpack_arguments(
    data: Data, buffers: Iterable[bytearray | memoryview] = (), descriptors: list[int] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """
    Rebuild the arguments of a call; the buffers and descriptors become part of the objects.

    The list of descriptors is emptied; those that are not part of anything are closed.

    Raises:
        MarshalError: they cannot be rebuilt here; it names what is missing and the remedies.
        ProtocolError: these are no arguments.
    """
    try:
        call = _unpickle(data, buffers, descriptors)
    except Exception as error:
        raise _cannot_rebuild("the arguments", data, error, may_have_run=False) from error
    # By hand: ``match`` would take as long as the unpickling.
    if type(call) is tuple and len(call) == 2 and type(call[0]) is tuple and type(call[1]) is dict:
        return call
    raise ProtocolError("what arrived are no arguments", may_have_run=False)


def pack_result(value: Any, to: Dialect) -> Parcel:
    """
    Marshal what a procedure returned.

    Raises:
        MarshalError: it cannot cross; it names the path.  The procedure has run.
        BusyError: no free descriptor for a duplicate of one that is to go along.  Likewise.
    """
    kind = type(value)
    if kind in _SMALL_ATOMS or (kind is bytes and len(value) < _LONG):
        return _dumps(value, _PROTOCOL), (), ()
    try:
        return _dump(_Long(value) if _is_long(value) else value, to)
    except _passing.NoDescriptorError as error:
        raise BusyError(f"the result cannot be sent: {error.strerror}", may_have_run=True) from error
    except Exception as error:
        raise _cannot_cross(error, (("result", value),), to, may_have_run=True) from error


def pack_exception(error: BaseException, to: Dialect) -> Parcel:
    """
    Marshal what left a procedure.

    Never fails, whatever the exception does: the caller is waiting.  What cannot cross as
    itself crosses as its name, text and traceback.
    """
    envelope = _exceptions.envelop(error, functools.partial(_dump_inside, to=to))
    return b"E" + _dumps(envelope, _PROTOCOL), (), ()


def pack_refusal(error: DoorError, to: Dialect) -> Parcel:
    """
    Marshal the library's own word about this call; unlike what left a procedure, a
    ``DoorError`` here arrives as itself.  Never fails.
    """
    dump = functools.partial(_dump_inside, to=to)
    envelope = _exceptions.envelop(error, dump, as_itself=True)
    return b"R" + _dumps(envelope, _PROTOCOL), (), ()


def unpack_outcome(
    data: Data, buffers: Iterable[bytearray | memoryview] = (), descriptors: list[int] | None = None
) -> Any:
    """
    Return what the procedure returned, or raise what it raised.

    The list of descriptors is emptied; those that are not part of the result are closed.

    Raises:
        MarshalError: the result cannot be rebuilt here.
        ProtocolError: this is no outcome.
        Exception: whatever the other side packed; ``RemoteError`` if it could not be rebuilt.
    """
    kind = data[0] if data else -1
    if kind == _RESULT:
        try:
            return _unpickle(data, buffers, descriptors)
        except _FAILURES as error:
            if came_by_a_signal(error):
                raise
            raise _cannot_rebuild("the result", data, error, may_have_run=True) from error
    if descriptors:
        close_all(descriptors, NOBODY)  # nothing but a result brings any
    if kind in (_EXCEPTION, _REFUSAL):
        _raise(_exceptions.open_envelope(_open(data), _unpickle, as_itself=kind == _REFUSAL))
    raise ProtocolError("what arrived is no outcome of a call", may_have_run=True)


def _open(data: Data) -> Any:
    try:
        return _unpickle(memoryview(data)[1:])
    except _FAILURES as error:
        raise ProtocolError("a malformed exception arrived", may_have_run=True) from error


def _raise(error: BaseException) -> NoReturn:
    # Where the caller is handling another exception, ``raise`` overwrites the context that
    # came with this one.  A re-raise does not, and leaving by ``finally`` is one.
    context = error.__context__
    try:
        raise error
    finally:
        if context is not None:
            object.__setattr__(error, "__context__", context)
        del error, context  # or this frame and the exception's traceback hold one another


def _all_atoms(kwargs: dict[str, Any]) -> bool:
    if any(map(_is_long, kwargs.values())):
        return False
    # The keys as well: a call takes keywords of a subclass of str.
    return _ATOMS.issuperset(map(type, kwargs.values())) and _ATOMS.issuperset(map(type, kwargs))


def _unpickle(
    data: Data, buffers: Iterable[bytearray | memoryview] = (), descriptors: list[int] | None = None
) -> Any:
    """
    Unpickle: the one place in the library that does.

    It runs the sender's code.  Bytes get here only from a channel whose other end has been
    proven to be of our own uid.
    """
    global _runs
    _runs += 1
    if descriptors:
        with _passing.Arrival(descriptors):
            return _loads(data, buffers=buffers)
    return _loads(data, buffers=buffers) if buffers else _loads(data)


# --- pickling -----------------------------------------------------------------------------------


class _Rules:
    """What goes by reference, what by value: shared by the two picklers."""

    #: Who will read it.
    to: Dialect

    #: A cloudpickle for what goes by value; it lets functions share their globals, so there
    #: is one for each pickle, made when it is needed.
    cloud: cloudpickle.Pickler | None

    #: What goes along with this pickle, if anything does; and whether anything may.
    departure: _passing.Departure | None = None
    passes = True

    def reducer_override(self, value: Any) -> Any:
        """Reduce what pickle would do otherwise; called for all but plain builtins."""
        kind = type(value)
        reduce = _TABLE.get(kind)
        if reduce is not None:
            return self._pass(value, reduce) if type(reduce) is _passing.Kind else reduce(value)
        if issubclass(kind, type):
            return self._reduce_class(value)
        if kind is types.FunctionType:
            return self._reduce_function(value)
        if kind is types.CodeType:
            self._check_python(value.co_name)
            return _cloudpickle._code_reduce(value)
        if issubclass(kind, _passing.guarded):
            if issubclass(kind, BaseException):
                return _exceptions.reduce_exception(value)
            raise TypeError(f"cannot pickle a {kind.__qualname__}, being of a subclass")
        if hasattr(kind, "__next__") and _passing.iterator is not None and _passing.is_iterator(kind):
            return self._pass(value, _passing.iterator)
        return NotImplemented

    def _pass(self, value: Any, kind: _passing.Kind) -> Any:
        """Reduce what crosses with descriptors."""
        if not self.passes:
            name = type(value).__qualname__
            raise TypeError(f"a {name} crosses in arguments and results, and not in an exception")
        if self.departure is None:
            self.departure = _passing.Departure()
        return self.departure.reduce(value, kind.reduce)

    def _reduce_class(self, kind: type) -> Any:
        if kind.__module__ in _MAINS:
            if self._is_shared(kind):
                return _main_attribute, (kind.__qualname__,)
            reduction = _cloudpickle._dynamic_class_reduce(kind)
        elif _is_plain_reference(kind):
            return NotImplemented
        else:
            reduction = _cloudpickle._class_reduce(kind)
            if reduction is NotImplemented or len(reduction) < 6:  # the latter: NoneType etc.
                return reduction
        self._check_python(kind.__qualname__)
        if kind not in _arrived:
            _departed.add(kind)
        return (reduction[0], _with_slots(kind, reduction), *reduction[2:5], _set_class_state)

    def _reduce_function(self, function: types.FunctionType) -> Any:
        if function.__module__ in _MAINS:
            if self._is_shared(function):
                return _main_attribute, (function.__qualname__,)
        elif _is_plain_reference(function) or _cloudpickle._should_pickle_by_reference(function):
            return NotImplemented
        self._check_python(function.__qualname__)
        if self.cloud is None:
            self.cloud = cloudpickle.Pickler(io.BytesIO())
        return self.cloud._dynamic_function_reduce(function)

    def _is_shared(self, value: Any) -> bool:
        if _is_registered(*_MAINS) or not self.to.shares_main():
            return False
        try:
            return _main_attribute(value.__qualname__) is value
        except ImportError:
            return False

    def _check_python(self, name: str) -> None:
        here, there = sys.version_info[:2], self.to.python
        if here != there:
            raise pickle.PicklingError(
                f"{name!r} would travel by value, as code, for which both sides must run the "
                f"same Python: here it is {here[0]}.{here[1]}, there {there[0]}.{there[1]}; "
                "put it in a module that both can import"
            )


class _Long:
    """Long ``bytes``, to travel beside the pickle; arrives as what it was."""

    __slots__ = ("value",)

    def __init__(self, value: bytes) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return bytes, (pickle.PickleBuffer(self.value),)


def _is_long(value: Any) -> bool:
    return type(value) is bytes and len(value) >= _LONG


def _has_long(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(map(_is_long, args)) or any(map(_is_long, kwargs.values()))


def _with_long(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Have the long ones of the arguments travel beside the pickle; each once, however often it is one."""
    long = {id(value): _Long(value) for value in (*args, *kwargs.values()) if _is_long(value)}
    values = tuple(long.get(id(value), value) for value in args)
    return values, {name: long.get(id(value), value) for name, value in kwargs.items()}


class _Pickler(_Rules, pickle.Pickler):
    """The pickler of every call, in C; reused, so it lets go of all that it has seen."""

    def __init__(self, *, beside: bool = True) -> None:
        self.out = io.BytesIO()
        self.buffers: list[memoryview] = []
        self.cloud = None
        # Not a method of ours: it would make a ring that only the collector frees.
        take = functools.partial(_take_buffer, self.buffers) if beside else None
        super().__init__(self.out, _PROTOCOL, buffer_callback=take)

    def forget(self) -> None:
        """Let go of the objects, and go back among the idle ones unless grown too large."""
        self.clear_memo()
        self.buffers.clear()
        self.cloud = None
        if self.departure is not None:  # the pickle has failed
            self.departure.close()
            self.departure = None
        size = self.out.tell()
        self.out.seek(0)
        self.out.truncate()
        if size <= _KEEP:
            _idle.append(self)


#: A thread takes one for a pickle and puts it back; another that a user's ``__reduce__``
#: starts inside that one takes the next.
_idle: deque[_Pickler] = deque(maxlen=16)


def _dump(value: Any, to: Dialect) -> Parcel:
    if _passing.late:
        _passing.look_for_late()
    try:
        pickler = _idle.pop()
    except IndexError:
        pickler = _Pickler()
    pickler.to = to
    try:
        pickler.dump(value)
        if pickler.departure is None:
            return pickler.out.getvalue(), tuple(pickler.buffers), ()
        departure, pickler.departure = pickler.departure.seal(), None
        return pickler.out.getvalue(), tuple(pickler.buffers), departure
    finally:
        pickler.forget()


def _dump_inside(value: Any, to: Dialect) -> bytes:
    """Pickle with all buffers inside, for what is not worth being kept waiting for."""
    pickler = _Pickler(beside=False)
    pickler.to = to
    pickler.passes = False
    pickler.dump(value)
    return pickler.out.getvalue()


def _take_buffer(buffers: list[memoryview], buffer: pickle.PickleBuffer) -> bool:
    view = buffer.raw()
    if view.nbytes < _BESIDE:
        return True  # stays in the pickle
    buffers.append(view)
    return False


# --- functions that pickles name, and what decides between name and value ------------------------

#: Classes that went out from here by value, and those that came in.
_departed: weakref.WeakSet[type] = weakref.WeakSet()
_arrived: weakref.WeakSet[type] = weakref.WeakSet()


def _with_slots(kind: type, reduction: Any) -> tuple[Any, ...]:
    """
    Return the arguments of a class's reduction, with its slots among them.

    cloudpickle makes the class without: its objects would have a dict over there, and could not
    come home, where they have none.
    """
    slots = vars(kind).get("__slots__")
    args: tuple[Any, ...] = reduction[1]
    if reduction[0] is not _cloudpickle._make_skeleton_class:
        return args  # an enumeration
    if not isinstance(slots, str | tuple | list | dict):
        return args  # none, or an iterator at its end
    return (*args[:3], {**args[3], "__slots__": slots}, *args[4:])


def _set_class_state(kind: type, state: Any) -> None:
    """Fill a class that has arrived by value, unless it has only come home."""
    if kind not in _departed:
        _arrived.add(kind)
        _cloudpickle._class_setstate(kind, state)


def _main_attribute(name: str) -> Any:
    """Find a class or function of this process's ``__main__``, whatever that is called."""
    try:
        return functools.reduce(getattr, name.split("."), sys.modules["__main__"])
    except AttributeError as error:
        raise ImportError(f"cannot import {name!r} from '__main__'", name="__main__") from error


def _rebuild_view(buffer: Any, form: str, shape: tuple[int, ...] | None, readonly: bool) -> memoryview:
    view = memoryview(buffer)
    if shape is not None:
        view = view.cast("B").cast(cast("Any", form), shape)
    return view.toreadonly() if readonly else view


def _reduce_view(view: memoryview) -> Any:
    # cloudpickle would make bytes of it.  What ``cast`` does not know cannot be made again.
    form = view.format.removeprefix("@")
    if len(form) != 1 or form not in "?bBhHiIlLqQnNfdcP":
        raise TypeError(f"cannot pickle a memoryview of format {view.format!r}")
    shape = view.shape if view.nbytes and (form != "B" or view.ndim != 1) else None
    plain = bytearray(view) if not view.contiguous or not view.c_contiguous else view
    return _rebuild_view, (pickle.PickleBuffer(plain), form, shape, view.readonly)


def _is_registered(*modules: str) -> bool:
    return not cloudpickle.list_registry_pickle_by_value().isdisjoint(modules)


def _is_plain_reference(value: Any) -> bool:
    """Tell quickly whether pickle's own reference will do; False means: ask cloudpickle."""
    if cloudpickle.list_registry_pickle_by_value():
        return False
    return getattr(sys.modules.get(value.__module__), value.__qualname__, None) is value


def _reducers() -> dict[type, Any]:
    """What cloudpickle adds to pickle, but for text files, of which it sends a copy; and what passes."""
    table = dict(cloudpickle.Pickler.dispatch_table.maps[0])
    for kind in (io.TextIOWrapper, types.CodeType):
        table.pop(kind, None)
    table[memoryview] = _reduce_view
    for kind, reduce in table.items():
        _passing.table.setdefault(kind, reduce)
    return _passing.table


_TABLE = _reducers()


# --- what went wrong, in words ------------------------------------------------------------------

#: Bounds of a search: objects looked at (about 0.3 s), and steps of a path.
_SEARCH, _STEPS = 100_000, 200

_REMEDIES = (
    "put it in a module that both sides can import, "
    "or have the sender call cloudpickle.register_pickle_by_value() with its module"
)


class _EnoughError(Exception):
    """The search has taken long enough."""


class _Tracer(_Rules, pickle._Pickler):
    """The pickler in Python, which shows what it stands in when something fails."""

    def __init__(self, to: Dialect) -> None:
        super().__init__(_Nowhere(), _PROTOCOL, buffer_callback=functools.partial(_take_buffer, []))
        self.to = to
        self.cloud = None
        self.trail: list[Any] = []
        self._saved = 0

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        self._saved += 1
        if self._saved > _SEARCH:
            raise _EnoughError
        self.trail.append(value)
        super().save(value, save_persistent_id)  # type: ignore[misc]  # not in typeshed
        self.trail.pop()


class _Nowhere:
    def write(self, data: object) -> None:
        pass


def _cannot_cross(
    error: Exception, parts: tuple[tuple[str, Any], ...], to: Dialect, *, may_have_run: bool
) -> MarshalError:
    reason = _pickling_reason(error)
    path, culprit = parts[0][0] if len(parts) == 1 else "an argument", None
    if not isinstance(error, MemoryError):
        path, culprit = _find(parts, to, error) or (path, None)
    name = "" if culprit is None else type(culprit).__qualname__
    mention = "" if name in reason else f" (of type {type(culprit).__module__}.{name})"
    text = f"{path}{mention} cannot cross the door: {reason}"
    return MarshalError(text, may_have_run=may_have_run)


def _pickling_reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply to be pickled"
    if isinstance(error, MemoryError):
        return "there is not enough memory to pickle it"
    text = _exceptions.text_of(error)
    if text and isinstance(error, TypeError | AttributeError | pickle.PicklingError):
        return text  # pickle's own words, or as good
    return f"{type(error).__qualname__}: {text}"


def _find(parts: tuple[tuple[str, Any], ...], to: Dialect, error: Exception) -> tuple[str, Any] | None:
    """
    Find what cannot be pickled, and the path to it.

    Bounded; never raises; None if it finds nothing, since the second time all went well or
    took too long.
    """
    for label, value in parts:
        tracer = _Tracer(to)
        try:
            tracer.dump(value)
        except _EnoughError:
            return None
        except RecursionError:
            # Python's pickler does not get as deep as the one in C; then this is not it.
            deep = isinstance(error, RecursionError)
            return (_safe_path(label, tracer.trail[:2]), None) if deep else None
        except Exception:  # whatever the code of an object raises: it is the one that was looked for
            return _safe_path(label, tracer.trail[:_STEPS]), tracer.trail[-1]
        finally:
            if tracer.departure is not None:
                tracer.departure.close()
    return None


def _safe_path(label: str, trail: list[Any]) -> str:
    try:
        return _path(label, trail)
    except Exception:  # somebody's __getattribute__ or __eq__
        return label


def _path(label: str, trail: list[Any]) -> str:
    """
    Write the way from the first object of a trail to the last as Python would.

    Between an object and one of its attributes stand the pieces of its reduction (a tuple of
    arguments, a dict of state), which are nobody's: ``owner`` is the object they are from.
    """
    path = label
    owner: Any = None
    for parent, child in itertools.pairwise(trail):
        if owner is None:
            step = _item(parent, child) or _attribute(parent, child)
            owner = parent if step is None else None
        else:
            step = _attribute(owner, child) or _item(owner, child) or _state_name(parent, child)
            owner = owner if step is None else None
        path += step or ""
    return path


def _item(parent: Any, child: Any) -> str | None:
    if isinstance(parent, dict):
        for key, value in parent.items():
            if value is child:
                return f"[{_key(key)}]"
            if key is child:
                return f"[key {_key(key)}]"
    elif isinstance(parent, list | tuple | deque):
        for place, value in enumerate(parent):
            if value is child:
                return f"[{place}]"
    elif isinstance(parent, set | frozenset) and any(value is child for value in parent):
        return f"{{{_key(child)}}}"
    return None


def _key(key: Any) -> str:
    """Write a key, if writing it cannot fail or take long."""
    if type(key) in _ATOMS:
        text = repr(key)
        return text if len(text) <= 60 else f"{text[:57]}..."
    return f"<{type(key).__qualname__}>"


def _attribute(owner: Any, child: Any) -> str | None:
    for name, value in _attributes(owner):
        if value is child:
            return f".{name}"
    return None


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """Look at what an object holds in its dict and its slots, without running its code."""
    with contextlib.suppress(AttributeError):
        yield from object.__getattribute__(owner, "__dict__").items()
    for kind in type(owner).__mro__:
        for name, field in vars(kind).items():
            if isinstance(field, types.MemberDescriptorType) and name != "__dict__":
                with contextlib.suppress(AttributeError):  # a slot that holds nothing
                    yield name, field.__get__(owner)


def _state_name(piece: Any, child: Any) -> str | None:
    if type(piece) is dict:
        for name, value in piece.items():
            if value is child and type(name) is str:
                return f".{name}"
    return None


def _cannot_rebuild(what: str, data: Data, error: BaseException, *, may_have_run: bool) -> DoorError:
    """Say why something that arrived could not be unpickled."""
    reason = f"{type(error).__qualname__}: {_exceptions.text_of(error)}"
    broken = isinstance(error, pickle.UnpicklingError | EOFError)
    if broken and _is_pickles_own(error):
        return ProtocolError(f"{what} arrived malformed: {reason}", may_have_run=may_have_run)
    missing = _missing_global(data) if isinstance(error, ImportError | AttributeError) else None
    if missing is not None:
        reason = f"cannot import {missing[1]!r} from {missing[0]!r} ({reason})"
    if missing is not None or isinstance(error, ImportError):
        reason = f"{reason}; {_REMEDIES}"
    text = f"{what} cannot be rebuilt by the receiver: {reason}"
    return MarshalError(text, may_have_run=may_have_run)


def _is_pickles_own(error: BaseException) -> bool:
    # Raised by a ``__setstate__``, it would have come through a frame below ``_unpickle``.
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_code is _unpickle.__code__


def _missing_global(data: Data) -> tuple[str, str] | None:
    """
    Find the first name in a pickle that cannot be found here.

    Reads the pickle without running it: pickle's own errors do not say in a field what they
    looked for, and their words differ between Python versions.
    """
    import pickletools  # 3 ms, for an error alone

    operations = itertools.islice(pickletools.genops(bytes(data)), _SEARCH)
    try:
        for module, name in _globals((code.name, arg) for code, arg, _ in operations):
            if not _is_here(module, name):
                return module, name
    except Exception:  # not a pickle of ours, after all
        pass
    return None


def _globals(operations: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Follow the strings on the stack and in the memo, as far as names are made of them."""
    memo: list[Any] = []
    top: Any = None
    recent = deque(["", ""], maxlen=2)
    for code, arg in operations:
        if code == "MEMOIZE":
            memo.append(top)
        elif code == "STACK_GLOBAL":
            yield recent[0], recent[1]
            top = None
        elif "UNICODE" in code or code in ("BINGET", "LONG_BINGET"):
            top = arg if "UNICODE" in code else memo[arg]
            if isinstance(top, str):
                recent.append(top)
        else:
            top = None


def _is_here(module: str, name: str) -> bool:
    try:
        functools.reduce(getattr, name.split("."), sys.modules[module])
    except (KeyError, AttributeError):
        return False
    return True
