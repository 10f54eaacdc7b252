"""
What crosses a door as itself and not as a copy: objects that hold descriptors.

The job: a pickle cannot carry an open file.  It carries how to make the object again, and the
descriptors go beside it (``SCM_RIGHTS``), in the order in which the pickler came by them.

    sender      ``reduce(obj, departure)`` adds descriptors to the ``Departure`` of this one
                pickle and returns how to rebuild the object there: a function of a module
                that is there too, and its arguments
    receiver    that function is called with the ``Descriptor``s that were added, then
                with the arguments

Who owns what
    A departure holds duplicates, so what was marshalled is what is sent, even if another
    thread closes the original meanwhile and its number is given out again.  It closes them when
    the call is over, whatever became of it; while a long one still runs, within half a second after the
    server has read it.

    ``take(obj)`` closes the sender's own as well: when everything has been marshalled, and not
    before, so that of a call that was never made nothing is lost.  (A call that is made once
    more through a reopened door is marshalled once more, too.  What had been taken is then sent
    from the duplicates of the first time.)

    What arrives belongs to an ``Arrival`` until it is rebuilt.  Numbers that nothing has claimed
    are closed with it; and if anything goes wrong, so is all that was rebuilt already, for nobody
    will ever see it.

What knows how an object crosses is its exact type.  An object of a subclass may be more than its
base, as an ``ssl.SSLSocket`` is, and is refused as pickle refuses it, by name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, overload

import attrs

from doorpool import _sockets
from doorpool._descriptor import NOBODY, Descriptor
from doorpool._errors import SHORTAGE
from doorpool._janitor import close_all

#: How to make an object again: the function, and what follows the descriptors in its arguments.
Recipe = tuple[Callable[..., Any], tuple[Any, ...]]

Reduce = Callable[[Any, "Departure"], Recipe]

_T = TypeVar("_T")


@attrs.frozen
class Kind:
    """How objects of one type cross; in a table of reducers, told from others by its type."""

    reduce: Reduce
    movable: bool = True


#: What a pickler looks an object's type up in.  ``_marshal`` puts its own reducers into it, so
#: that one look is enough.
table: dict[type, Any] = {}

#: Types that have to be looked at even where a subclass is concerned.  Exceptions are among them,
#: so that the pickler asks once for all.
guarded: tuple[type, ...] = (BaseException,)

#: Modules whose types are registered when somebody has imported them: the name, what each has when
#: its import has come to its end, and what to do then.  Replaced and not changed, for threads read it.
late: tuple[tuple[str, str, Callable[[Any], None]], ...] = ()


def register(kind: type, reduce: Reduce, *, movable: bool = True) -> None:
    """
    Have objects of exactly this type cross together with their descriptors.

    Args:
        kind: the type; it has a ``close()``.
        reduce: called with an object and the ``Departure``; adds descriptors to that, and returns a
            function that can be imported on the other side, and a tuple of arguments.  The
            function is called there with the ``Descriptor``s, then the arguments; it takes over
            (``take``) those that it keeps, and the rest is closed.  It may be called more than
            once for one object, and must not change it in a way that matters.
        movable: ``take`` may move it, by closing the sender's own.
    """
    table[kind] = Kind(reduce, movable)


def register_late(module: str, last: str, register_its_own: Callable[[Any], None]) -> None:
    """
    Have the types of a module registered when it has been imported, and not import it for this alone.

    Args:
        module: its name.
        last: something that it has at the end of its import.
        register_its_own: called with the module.
    """
    global late
    late = (*late, (module, last, register_its_own))


def look_for_late() -> None:
    """Register what has been imported since the last look; 0.1 µs as long as that is nothing."""
    for each in late:
        if each[0] in sys.modules:
            _register_late(*each)


def _register_late(name: str, last: str, register_its_own: Callable[[Any], None]) -> None:
    global late
    module = sys.modules.get(name)
    if hasattr(module, last):
        register_its_own(module)
        late = tuple(each for each in late if each[0] != name)


#: How an iterator crosses that is not registered itself, and which types' are meant; for ``_streams``.
iterator: Kind | None = None
is_iterator: Callable[[type], bool] = bool


def guard(kind: type) -> None:
    """Refuse objects of this type, subclasses included, that are not registered themselves."""
    global guarded
    guarded = (*guarded, kind)


class NoDescriptorError(OSError):
    """This process has no free descriptor for a duplicate of one that is to cross."""


@contextlib.contextmanager
def _short() -> Iterator[None]:
    """Say, of a shortage, what it is that there is no descriptor for."""
    try:
        yield
    except OSError as error:
        if error.errno not in SHORTAGE:
            raise
        text = "no free descriptor for a duplicate of one that is to cross the door"
        raise NoDescriptorError(error.errno, text) from None


# --- going out ----------------------------------------------------------------------------------


class Departure(Sequence[int]):
    """
    The descriptors of one pickle, in order, as numbers of duplicates that it owns.

    One thread at a time.
    """

    __slots__ = ("_foreign", "_generation", "_let_go", "_numbers", "_promised", "_taken")

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._taken: list[Taken] = []
        self._promised: list[tuple[int, Callable[[], Descriptor], int | None]] = []
        self._foreign: dict[int, int | None] = {}  # numbers of what others have made: whose it is
        self._let_go = False
        self._generation = _sockets.generation

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not _ending():  # as in Channel
            self.close()

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self._numbers[index]

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, maker: int | None = NOBODY) -> None:
        """
        Add a duplicate of a descriptor; the original stays its owner's.

        Args:
            maker: as of ``give_later``.

        Raises:
            NoDescriptorError: there is no free number for it.
            OSError: ``EBADF``: it is not open.
        """
        with _short():
            copy = os.dup(number)
        self._numbers.append(_sockets.own_number(copy))
        if maker != NOBODY:
            self._foreign[copy] = maker

    def give_later(self, make: Callable[[], Descriptor], maker: int | None = NOBODY) -> None:
        """
        Add a descriptor that is made, by this function, when all has been marshalled.

        Args:
            maker: the uid of whoever else has made it, and can have its close take as long as he likes.
        """
        self._promised.append((len(self._numbers), make, maker))
        self._numbers.append(-1)

    def reduce(self, value: Any, reduce: Reduce) -> Any:
        """Reduce one object; return what ``Pickler.reducer_override`` should."""
        first = len(self._numbers)
        rebuild, args = reduce(value, self)
        return _rebuild, (rebuild, first, len(self._numbers) - first, args)

    def reduce_taken(self, taken: Taken, reduce: Reduce | None = None) -> Recipe:
        """
        Reduce an object that is to be moved: as itself, or, once it was moved, as it was then.

        Args:
            reduce: how; as objects of its type cross in a pickle, if nothing is said.
        """
        kept = taken.kept
        if kept is None:
            first = len(self._numbers)
            rebuild, args = (reduce or table[type(taken.obj)].reduce)(taken.obj, self)
            taken.kept = _Kept(self, first, len(self._numbers) - first, rebuild, args)
            self._taken.append(taken)
            return rebuild, args
        if kept.departure.closed:
            raise TypeError(f"{taken!r} has crossed a door already")
        for number in kept.departure[kept.first : kept.first + kept.count]:
            self.add(number, kept.departure._foreign.get(number, NOBODY))
        return kept.rebuild, kept.args

    @property
    def closed(self) -> bool:
        """Whether it holds nothing any more."""
        return not self._numbers

    def seal(self) -> Departure:
        """
        Make what was promised and move what is to be moved, all having been marshalled; return itself.

        Raises:
            Exception: what was promised cannot be made; nothing has moved.
        """
        for place, make, maker in self._promised:
            with _short():
                descriptor = make()
            number = self._numbers[place] = _sockets.own_number(descriptor.take())
            if maker != NOBODY:
                self._foreign[number] = maker
        self._promised.clear()
        for taken in self._taken:
            # The kernel gives the number back whatever ``close`` says, and what it might say (that
            # the disk is full) is for who has the file now.
            with contextlib.suppress(OSError):
                taken.obj.close()
        self._taken.clear()
        return self

    @property
    def gone(self) -> bool:
        """Whether it was let go."""
        return self._let_go

    def let_go(self) -> None:
        """Close the duplicates before the call is over: the other side has its own."""
        self._let_go = True
        self.close()

    def close(self) -> None:
        """Close the duplicates; what was not sealed has not moved.  Idempotent."""
        for taken in self._taken:
            taken.kept = None
        self._taken.clear()
        self._promised.clear()
        while self._numbers:
            number = self._numbers.pop()
            maker = self._foreign.pop(number, NOBODY)
            if number < 0 or self._generation != _sockets.here():  # in a forked child they are closed
                continue
            if maker == NOBODY:
                _sockets.close_number(number)
            else:
                close_all([_sockets.give_up_number(number)], maker)


@attrs.frozen
class _Kept:
    """How a moved object was marshalled, for as long as the call lasts that it was moved by."""

    departure: Departure
    first: int
    count: int
    rebuild: Callable[..., Any]
    args: tuple[Any, ...]


class Taken:
    """An object that is to move: see ``take``."""

    __slots__ = ("kept", "obj")

    def __init__(self, obj: Any) -> None:
        self.obj = obj
        self.kept: _Kept | None = None

    def __repr__(self) -> str:
        return f"take({self.obj!r})"

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} can only cross a door, as an argument or a result")


register(Taken, lambda taken, departure: departure.reduce_taken(taken))


def take(obj: _T) -> _T:
    """
    Mark a file, a socket or the like, anywhere in arguments or a result, to be moved and not shared.

    The other side gets the object itself, unmarked; the sender's own is closed as soon as all
    the arguments, or the result, have been marshalled: whatever becomes of the call then.
    When something in them cannot cross (``MarshalError``), nothing has moved.

        door(take(open("data")))

    Returns:
        What to pass, once, in place of the object, and nothing else; for type checkers, the
        object.

    Raises:
        TypeError: the object is of no type that crosses with a descriptor.

    Modelled on: DOOR_RELEASE of door_call(3C) and door_return(3C)
    """
    look_for_late()
    kind = table.get(type(obj))
    if type(kind) is not Kind or not kind.movable or type(obj) is Taken:
        raise TypeError(f"take() is for files, sockets and the like, not for {type(obj).__qualname__}")
    return Taken(obj)  # type: ignore[return-value]


# --- coming in ----------------------------------------------------------------------------------


class _Here(threading.local):
    """What is being unpickled in this thread; within it something else may be, from another door."""

    arrival: Arrival | None = None


_here = _Here()


class Arrival:
    """
    What came along with one pickle, while that is unpickled in a ``with`` block.

    Args:
        numbers: the descriptors; they belong to the arrival from now on, and the list is emptied.
    """

    def __init__(self, numbers: list[int]) -> None:
        self._descriptors: list[int] = numbers[:]
        numbers.clear()
        self._rebuilt: list[Any] = []
        self._outer: Arrival | None = None

    def __enter__(self) -> Arrival:
        self._outer, _here.arrival = _here.arrival, self
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _here.arrival, self._outer = self._outer, None
        if kind is not None:
            for value in self._rebuilt:
                with contextlib.suppress(OSError):  # whatever it says, its number is free
                    value.close()
        close_all([number for number in self._descriptors if number >= 0], NOBODY)
        self._descriptors.clear()

    @contextlib.contextmanager
    def _lend(self, first: int, count: int) -> Iterator[list[Descriptor]]:
        """Lend descriptors to who rebuilds; what he does not take is closed."""
        numbers = self._descriptors[first : first + count]
        if len(numbers) != count or -1 in numbers:
            raise OSError(errno.EBADF, "descriptors that did not arrive, or were claimed twice")
        self._descriptors[first : first + count] = [-1] * count
        lent = [Descriptor(number) for number in numbers]
        try:
            yield lent
        finally:
            for descriptor in lent:
                descriptor.close()

    def rebuild(self, function: Callable[..., Any], first: int, count: int, args: tuple[Any, ...]) -> Any:
        """Make one object again."""
        with self._lend(first, count) as descriptors:
            value = function(*descriptors, *args)
        self._rebuilt.append(value)
        return value


def _rebuild(function: Callable[..., Any], first: int, count: int, args: tuple[Any, ...]) -> Any:
    """Make an object again, with its descriptors; this is what pickles name."""
    arrival = _here.arrival
    if arrival is None:
        raise OSError(errno.EBADF, "an object whose descriptors did not arrive")
    return arrival.rebuild(function, first, count, args)


# --- descriptors themselves ---------------------------------------------------------------------


def _reduce_descriptor(descriptor: Descriptor, departure: Departure) -> Recipe:
    if descriptor.closed:
        raise ValueError("this descriptor is closed")
    departure.add(descriptor.fileno(), descriptor._passer)
    return _rebuild_descriptor, ()


def _rebuild_descriptor(descriptor: Descriptor) -> Descriptor:
    return Descriptor(descriptor.take())


register(Descriptor, _reduce_descriptor)
