"""
How an exception that leaves a procedure arrives at the caller: as itself.

The job: class, ``args``, attributes, notes, groups, ``__cause__``, ``__context__`` and
``__suppress_context__`` arrive as the procedure made them; the frames do not, their text
does, as the ``RemoteTraceback`` at the end of the ``__cause__`` chain, where it prints by
default and leaves ``str(error)`` and ``error.__cause__`` alone.

Rebuilding.  Plain pickle calls ``cls(*args)``, which fails for every class whose
``__init__`` takes anything else than what it hands to ``super().__init__``, or doubles its
text.  So a class with a ``__reduce__`` of its own goes by that, and any other is made by
``__new__`` and ``__init__`` of its *built-in base*, which are in C and take the arguments
that their own reduction gives; then its state is set.  A user's ``__init__`` never runs.
(``__new__`` alone is not enough: ``OSError`` fills its fields in ``__init__``.)

The envelope.  An exception drags others with it, and any one of them may be of a class
that cannot be pickled here or imported there: ``LookupError`` from a driver's error is
ordinary, and a caller without the driver still wants its ``LookupError``.  So each
exception of the graph is a *node* with a pickle of its own, and its type and text beside
it.  A node that fails, at either end, becomes a ``RemoteError`` in its place, with a note
that says why, and the others do not suffer:

    (text of the traceback,
     [(type, text, notes, suppress, cause, context, members, reason, pickle), ...])

The first node is the one that was raised; ``cause`` and ``context`` are places in the list
or -1; ``members`` are those of a group, else None.  The envelope itself holds nothing but
``str``, ``int``, ``bool``, ``bytes``, tuples and lists, so it unpickles everywhere.

What must not arrive as itself: a ``DoorError``, which at the caller would speak of the
caller's call and be retried, and what is no ``Exception``, or a server's ``sys.exit()``
would end its clients.  Both are ``RemoteError``s, raised or as members of a group; as the
cause of something else they are only read, and stay what they are.  (A group is often raised
while one of its members is being handled, which is its context too: what is a member anywhere
counts as one.)

Everything is bounded (nodes, text, bytes), since the procedure's author did not choose how
much an error drags along, and nothing here fails, whatever a user's methods do: the caller
is waiting.

Roads not taken: one pickle for the whole graph (one bad link spoils it, and a chain of 300
overruns the stack); ``tblib`` for the frames (objects that are no use in another process).
"""

from __future__ import annotations

import contextlib
import copyreg
import traceback
from collections.abc import Callable, Iterator
from types import MemberDescriptorType
from typing import Any, cast

import attrs

from doorpool._errors import DoorError, ProtocolError, RemoteError, RemoteTraceback
from doorpool._texts import MAX_LINES, clip

Dump = Callable[[object], bytes]
Load = Callable[[bytes], Any]
Envelope = tuple[str, list[tuple[Any, ...]]]

#: Exceptions in one envelope.  A task group of some hundreds that all failed is ordinary.
MAX_NODES = 4096

#: Groups within groups; building them there is recursive.
MAX_NESTING = 32

#: Characters: of a traceback (CPython's own frames of a RecursionError take 3,000), of the text
#: of the raised exception, and of that of the others, which only matters if they cannot be rebuilt.
MAX_TRACEBACK, MAX_TEXT, MAX_OTHER_TEXT = MAX_LINES, 8192, 1024

#: Bytes of the pickles of one envelope together; beyond it the text must do.
MAX_PICKLES = 16 * 2**20

#: Py_TPFLAGS_HEAPTYPE: set for classes made by a ``class`` statement, clear for the built-in.
_HEAP_TYPE = 1 << 9

#: Sets an attribute also of an exception whose class forbids it: a frozen dataclass.
_set = object.__setattr__

#: The field of a group that holds its members.
_MEMBERS = cast("MemberDescriptorType", BaseExceptionGroup.exceptions)

#: Built-in fields that do not travel: ``obj`` is whatever the attribute was missing on, the
#: group's are read-only and given to ``__new__``, and the last is a link, which the node has.
_STAY = cast(
    "frozenset[MemberDescriptorType]",
    frozenset(
        (
            AttributeError.obj,
            BaseExceptionGroup.message,
            BaseExceptionGroup.exceptions,
            BaseException.__suppress_context__,
        )
    ),
)


# --- one exception: what pickle needs to know ---------------------------------------------------


def reduce_exception(error: BaseException) -> Any:
    """
    Reduce an exception so that it can be rebuilt without its own ``__init__``.

    Links to other exceptions are not part of it, as with plain pickle: an exception that is
    only a value among others must not become unsendable by what it once was raised from.

    Returns:
        A reduction as ``Pickler.reducer_override`` gives it, or NotImplemented for a class
        that has a reduction of its own.
    """
    kind = type(error)
    if reduces_itself(kind):
        return NotImplemented
    return revive, (kind, _arguments(error)), _state(error), None, None, set_state


def reduces_itself(kind: type) -> bool:
    """Tell whether the class has a ``__reduce__`` of its own, or one is registered for it."""
    return kind in copyreg.dispatch_table or _is_users(kind, "__reduce__") or _is_users(kind, "__reduce_ex__")


def revive(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    """Make an exception by way of its built-in base, passing its own ``__init__`` by."""
    base: type[BaseException] = _builtin_base(kind)
    error = base.__new__(kind, *args)
    try:
        base.__init__(error, *args)
    except Exception:
        # ``args`` was changed after the exception was made and no longer suits the base:
        # keep it; the base's fields follow with the state.
        BaseException.__init__(error, *args)
    return error


def set_state(error: BaseException, state: tuple[Any, dict[str, Any], dict[str, Any]]) -> None:
    """Set what ``_state`` took, past any ``__setattr__`` that forbids it (frozen classes)."""
    own, attributes, fields = state
    if own is not None:
        _set_own_state(error, own)
    error.__dict__.update(attributes)
    known = _fields(type(error))
    for name, value in fields.items():
        if name in known:
            with contextlib.suppress(AttributeError, TypeError):  # read-only, in C
                known[name].__set__(error, value)
        else:
            error.__dict__[name] = value  # a field of another Python version


def _set_own_state(error: Any, own: Any) -> None:
    if _is_users(type(error), "__setstate__"):
        error.__setstate__(own)
        return
    attributes, slots = own if isinstance(own, tuple) else (own, None)
    error.__dict__.update(attributes or {})
    for name, value in (slots or {}).items():
        _set(error, name, value)


def _arguments(error: BaseException) -> tuple[Any, ...]:
    if isinstance(error, BaseExceptionGroup):
        # Not its ``args``: a group with a ``__new__`` of its own has there what *that* took.
        return error.message, list(error.exceptions)
    return cast("tuple[Any, ...]", type(error).__reduce__(error)[1])


def _state(error: BaseException) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Take the attributes, and the fields that are no attributes: slots and those of C."""
    attributes = dict(error.__dict__)
    if not _is_users(type(error), "__getstate__"):
        return None, attributes, dict(_set_fields(error))
    own = cast(Any, error).__getstate__()
    notes = {name: value for name, value in attributes.items() if name == "__notes__"}
    return own, notes, {}


def _set_fields(error: BaseException) -> Iterator[tuple[str, Any]]:
    for name, field in _fields(type(error)).items():
        with contextlib.suppress(AttributeError):  # a slot that holds nothing
            value = field.__get__(error)
            if value is not None:
                yield name, value


def _fields(kind: type) -> dict[str, MemberDescriptorType]:
    return {
        name: field
        for base in reversed(kind.__mro__)
        for name, field in vars(base).items()
        if isinstance(field, MemberDescriptorType) and field not in _STAY
    }


def _builtin_base(kind: type) -> type:
    # By ``__base__`` and not by the order of ``__mro__``: of ``class E(RuntimeError, OSError)``
    # the base that decides the layout is OSError, and only its ``__new__`` may make one.
    while kind.__flags__ & _HEAP_TYPE and kind.__base__ is not None:
        kind = kind.__base__
    return kind


def _is_users(kind: type, method: str) -> bool:
    for base in kind.__mro__:
        if method in vars(base):
            return bool(base.__flags__ & _HEAP_TYPE)
    return False


# --- the sender ---------------------------------------------------------------------------------


@attrs.frozen
class _Node:
    """One exception of an envelope; the fields, in order, are what is sent."""

    type_name: str
    text: str
    notes: list[str]
    suppress: bool
    cause: int
    context: int
    members: list[int] | None
    reason: str
    pickle: bytes


def envelop(error: BaseException, dump: Dump, *, as_itself: bool = False) -> Envelope:
    """
    Put an exception and all that hangs on it into an envelope.

    Never fails, whatever the exception's own methods raise.

    Args:
        dump: pickles one object, or raises.
        as_itself: for a refusal, the library's own word about this call: a ``DoorError``
            arrives as it is, and only the traceback of its cause is anybody's business.
    """
    shown = error.__cause__ if as_itself else error
    text = "" if shown is None else traceback_of(shown)
    return text, list(_nodes(_Graph(error), dump, as_itself))


class _Graph:
    """
    The exceptions that can be reached from one, numbered; it is number 0.

    Breadth first and without recursion, so that cycles end and chains may be long.
    """

    __slots__ = ("_numbers", "exceptions", "nesting", "raised")

    def __init__(self, error: BaseException) -> None:
        self.exceptions = [error]
        self._numbers = {id(error): 0}
        self.nesting = [0]
        #: Whether it is raised at the caller, itself or as a member of what is.
        self.raised = [True]
        # Members first, all of them: one that is a cause or context as well is raised all the same.
        for place, each in enumerate(self.exceptions):  # it grows while we walk it
            if self.nesting[place] < MAX_NESTING and not reduces_itself(type(each)):
                for member in _grouped(each):
                    self.number(member, self.nesting[place] + 1, raised=True)

    def number(self, error: BaseException | None, nesting: int, raised: bool) -> int:
        # The text of an earlier door's traceback is part of this door's text already.
        if error is None or isinstance(error, RemoteTraceback):
            return -1
        known = self._numbers.get(id(error))
        if known is not None or len(self.exceptions) >= MAX_NODES:
            return -1 if known is None else known
        self._numbers[id(error)] = len(self.exceptions)
        self.exceptions.append(error)
        self.nesting.append(nesting)
        self.raised.append(raised)
        return len(self.exceptions) - 1


def _nodes(graph: _Graph, dump: Dump, as_itself: bool) -> Iterator[tuple[Any, ...]]:
    room = MAX_PICKLES
    for place, error in enumerate(graph.exceptions):  # it grows while we walk it
        try:
            node = _node(graph, place, error, dump, as_itself and place == 0)
        except BaseException as failure:  # a user's __getattribute__ can raise anything
            node = _Node(name_of(error), "", [], False, -1, -1, None, _reason(failure), b"")
        if len(node.pickle) > room:
            reason = f"{len(node.pickle)} bytes of pickle are too much for an error"
            node = attrs.evolve(node, pickle=b"", members=None, reason=reason)
        room -= len(node.pickle)
        yield attrs.astuple(node, recurse=False)


def _node(graph: _Graph, place: int, error: BaseException, dump: Dump, as_itself: bool) -> _Node:
    cause = graph.number(error.__cause__, graph.nesting[place], raised=False)
    context = graph.number(error.__context__, graph.nesting[place], raised=False)
    members: list[int] | None = None
    reason, pickle = "", b""
    if as_itself or not graph.raised[place] or _may_arrive(error):
        try:
            members = _members(graph, place, error)
            pickle = dump(_recipe(error, members))
        except BaseException as failure:
            reason = _reason(failure)
    text = clip(text_of(error), MAX_OTHER_TEXT if place else MAX_TEXT)
    notes, suppress = _notes(error), bool(error.__suppress_context__)
    return _Node(name_of(error), text, notes, suppress, cause, context, members, reason, pickle)


def _may_arrive(error: BaseException) -> bool:
    if not isinstance(error, Exception) or isinstance(error, DoorError):
        return False
    # The members of any other group have nodes of their own.
    return not reduces_itself(type(error)) or all(map(_may_arrive, _grouped(error)))


def _grouped(error: BaseException) -> tuple[BaseException, ...]:
    """Return the members of a group, past any ``exceptions`` of a user's class."""
    if not issubclass(type(error), BaseExceptionGroup):
        return ()
    return cast("tuple[BaseException, ...]", _MEMBERS.__get__(error))


def _members(graph: _Graph, place: int, error: BaseException) -> list[int] | None:
    if not isinstance(error, BaseExceptionGroup) or reduces_itself(type(error)):
        return None
    nesting = graph.nesting[place] + 1
    if nesting > MAX_NESTING:
        raise ValueError(f"groups are nested more than {MAX_NESTING} deep")
    raised = graph.raised[place]
    members = [graph.number(member, nesting, raised) for member in _grouped(error)]
    if -1 in members:
        raise ValueError(f"more than {MAX_NODES} exceptions")
    return members


def _recipe(error: BaseException, members: list[int] | None) -> object:
    if members is None:
        return error
    # The members have nodes of their own, for their own causes.
    return type(error), cast("BaseExceptionGroup[Any]", error).message, _state(error)


# --- the receiver -------------------------------------------------------------------------------


def open_envelope(envelope: Any, load: Load, *, as_itself: bool = False) -> BaseException:
    """
    Rebuild the exception of an envelope, the remote traceback at the end of its causes.

    Args:
        load: unpickles one object, or raises.
        as_itself: the envelope was made so.

    Raises:
        ProtocolError: this is no envelope, or not of the kind that it says.
    """
    try:
        text, nodes = envelope
        builder = _Builder([_Node(*node) for node in nodes], load)
        error = builder.build_all()
        welcome = isinstance(error, DoorError) if as_itself else _may_be_raised(error)
    except Exception as failure:
        message = f"a malformed exception arrived: {_reason(failure)}"
        raise ProtocolError(message, may_have_run=True) from failure
    if not welcome:
        message = f"an exception arrived that must not: {name_of(error)}"
        raise ProtocolError(message, may_have_run=True)
    if text:
        _attach(error, RemoteTraceback(text))
    return error


def _may_be_raised(error: BaseException) -> bool:
    if isinstance(error, DoorError):
        return isinstance(error, RemoteError) and error.may_have_run
    return isinstance(error, Exception) and all(map(_may_be_raised, _grouped(error)))


class _Builder:
    """Make exceptions of nodes, the members of a group before the group."""

    __slots__ = ("_begun", "_built", "_load", "_nodes")

    def __init__(self, nodes: list[_Node], load: Load) -> None:
        self._nodes = nodes
        self._load = load
        self._built: dict[int, BaseException] = {}
        self._begun: set[int] = set()

    def build_all(self) -> BaseException:
        for place, node in enumerate(self._nodes):
            error = self._build(place)
            _set(error, "__cause__", self._linked(node.cause))
            _set(error, "__context__", self._linked(node.context))
            _set(error, "__suppress_context__", node.suppress)  # last: setting a cause sets it
        return self._built[0]

    def _linked(self, place: int) -> BaseException | None:
        return None if place == -1 else self._build(place)

    def _build(self, place: int) -> BaseException:
        if place not in self._built:
            self._built[place] = self._make(place)
        return self._built[place]

    def _make(self, place: int) -> BaseException:
        if place in self._begun:
            raise ValueError("a group contains itself")
        self._begun.add(place)
        node = self._nodes[place]
        members = None if node.members is None else [self._build(each) for each in node.members]
        try:
            error = _rebuild(node, members, self._load)
        except Exception as failure:
            return _stand_in(node, node.reason or _reason(failure))
        if node.notes and not getattr(error, "__notes__", None):
            _set(error, "__notes__", list(node.notes))
        return error


def _rebuild(node: _Node, members: list[BaseException] | None, load: Load) -> BaseException:
    if not node.pickle:
        raise ValueError("it was not sent")
    made = load(node.pickle)
    if members is not None:
        kind, message, state = made
        made = revive(kind, (message, members))
        set_state(made, state)
    if not isinstance(made, BaseException):
        raise TypeError(f"its reduction gives a {type(made).__qualname__}")
    return made


def _stand_in(node: _Node, reason: str) -> RemoteError:
    message = f"{node.type_name}: {node.text}" if node.text else node.type_name
    error = RemoteError(message, type_name=node.type_name)
    for note in node.notes:
        error.add_note(note)
    if node.reason or node.pickle:
        error.add_note(f"It could not cross the door as itself: {reason}")
    return error


def _attach(error: BaseException, remote: RemoteTraceback) -> None:
    """Make the text the cause of the last exception of the ``__cause__`` chain."""
    seen = {id(error)}
    while (cause := error.__cause__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        error = cause
    # In a ring of causes the link that closes it gives way: it says nothing new, and what
    # prints exceptions would stop there anyway.
    suppress = error.__suppress_context__
    _set(error, "__cause__", remote)
    _set(error, "__suppress_context__", suppress)


# --- words, from objects that may not want to give any ------------------------------------------


def traceback_of(error: BaseException) -> str:
    """Write the traceback of an exception, at most ``MAX_TRACEBACK`` characters; never fails."""
    try:
        lines = traceback.format_exception(error)
    except BaseException as failure:
        lines = [f"{name_of(error)}: (no traceback: {name_of(failure)})\n"]
    return clip("".join(lines), MAX_TRACEBACK)


def text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "<exception str() failed>"  # as the traceback module says it


def _notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", None)
    if not isinstance(notes, (list, tuple)):
        return []
    return [clip(note, MAX_OTHER_TEXT) for note in notes[:32] if isinstance(note, str)]


def name_of(error: BaseException) -> str:
    """Return the qualified name of an exception's class, the bare one of a builtin; never fails."""
    try:
        kind = type(error)
        module = f"{kind.__module__}."
        name = ("" if module == "builtins." else module) + kind.__qualname__
        return clip(name, MAX_OTHER_TEXT)
    except BaseException:  # a class may answer for its own name; an error is told all the same
        return "an exception"


def _reason(failure: BaseException) -> str:
    return clip(f"{name_of(failure)}: {text_of(failure)}", MAX_OTHER_TEXT)
