"""
A proxy: somebody else's procedure, to be called like one's own.

All views of one open door (``options``) share a ``Line``: the handle, who was believed
when it was opened, and how to open the path anew when the server has been restarted.

Opening
    While a path is being opened, its server may close because another one has taken the name
    over.  So when the door goes away meanwhile, the path is looked at once more.  A forked child
    of a dead server may hold its listener open: half a second is given to whoever might greet there
    in its place, once, and not again with each look.

Reopening
    A call that certainly did not run, because the server has gone, closed or revoked the
    door, is made once more if the door was opened by path: the path is opened anew, by
    the same rule of whom to believe, and must lead to the same user and codec as at
    first.  One thread reopens and the others wait for it.  If the second try did not run
    either, the first error is raised, with the second as its cause.  If it may have run,
    the second is raised: an error must never promise what is not so.  All of it has to fit
    into the time of the call.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import reduction
from typing import Any, TypeVar, cast

from doorpool import _data, _sockets
from doorpool._callers import Judge, Rule
from doorpool._credentials import is_strange
from doorpool._descriptor import Descriptor
from doorpool._endpoint import Endpoint, endpoint_with_id
from doorpool._errors import (
    AccessError,
    BrokenDoorError,
    CallTimeoutError,
    ClosedError,
    DoorError,
    MarshalError,
    NotADoorError,
    Path,
    ProtocolError,
    RevokedError,
)
from doorpool._exceptions import text_of
from doorpool._handle import FOREVER, MAX_REPLY, Came, check_limit, check_seconds, check_spin, deadline_after
from doorpool._impl import shuttle
from doorpool._info import DoorInfo, describe
from doorpool._janitor import close_all
from doorpool._marshal import Dialect, own_dialect, pack_arguments, unpack_outcome
from doorpool._objects import CALL, ENTER, EXIT, METHODS, Table, checked_table, decode_table, read_signature
from doorpool._passing import Departure
from doorpool._progress import Listener, ReportingLine
from doorpool._texts import printable_lines
from doorpool._threads import waiting_for
from doorpool._wire import LETTER_SIZE, Attribute, Knock
from doorpool.door import Codec, Handle

__all__ = ["Proxy"]

#: How often a path is tried again while ``wait=`` lasts, seconds.  Neither a directory that is
#: not there yet nor a server that is still to listen can be waited for by an event.
_RETRY = 0.02

#: What a proxy can speak; which of them, its door says.
SPOKEN: tuple[Codec, ...] = (Codec.PICKLE, Codec.DATA)

#: Bytes of a result of another user's server, where nobody says how many.
MOST_OF_ANOTHER = 2**30

#: The least that ``max_reply`` may be: what a server says besides answers is no longer.
_LEAST_REPLY = LETTER_SIZE

_SUBMITTERS = 64  #: Threads at most that ``submit`` and ``map`` start.


_T = TypeVar("_T")

#: What is to be sent, however it was written: bytes, memory and descriptors.
_AnyParcel = tuple[bytes, Sequence[memoryview], Sequence[int]]


#: Types of results that get the proxy's ``timeout``, for what they will call themselves.
timed: set[type] = set()


class _Unchanged:
    """The absence of an option, where None means something."""

    def __repr__(self) -> str:
        return "..."


_UNCHANGED = _Unchanged()


class Line:
    """What the views of one open door share."""

    def __init__(
        self, door: Path | int | Descriptor, *, open_timeout: float | None, reopens: bool, trust: str,
        server: Rule | None, spin: float | None, codecs: tuple[Codec, ...] = SPOKEN,
        max_reply: int | None = None,
    ) -> None:  # fmt: skip
        self.spin = spin
        self.max_reply = max_reply
        self.open_timeout = open_timeout
        self.trust = trust
        self.server = server
        self.closed = False
        self.warns = True  # when it is collected open
        self.enters = False  # ``with`` enters the object, and does not only close the door
        self.leases: list[tuple[int, Any]] = []  # of those who have: the numbers, and what is kept meanwhile
        self._codecs = codecs
        self.handle = self._open(door, open_timeout)
        self._codecs = (self.handle.greeting.codec,)  # reopened, it speaks what it spoke at first
        self.reopens = reopens and self.handle.path is not None
        self.id = self.handle.greeting.id
        self._take(self.handle)
        self._believed = self.handle.server.uid, self.handle.greeting.codec
        self._reset()
        self._become(self._codecs == (Codec.DATA,))

    def _become(self, speaks_data: bool) -> None:
        """Be such a line as the door has said that it needs, now that it has been opened."""
        self.__class__ = _LINES[speaks_data, self.is_object]

    @property
    def identity(self) -> tuple[bytes, int | None]:
        """The door's id, and the user whose word it is."""
        return self.id, self._believed[0]

    def _reset(self) -> None:
        """Begin anew: at first, and in a forked child, where the parent's threads are not."""
        self._lock = threading.RLock()  # a signal handler may close what its thread is using
        self._opening = threading.RLock()  # likewise; held by the one thread that opens the path anew
        self._executor: ThreadPoolExecutor | None = None
        self._generation = _sockets.generation  # last: who sees this sees the rest

    def _lock_here(self) -> threading.RLock:
        if self._generation != _sockets.here():
            with _crossing:  # once, whichever thread comes first
                if self._generation != _sockets.generation:
                    self._reset()
        return self._lock

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # Not before the last view is gone; not when the interpreter ends (as in Channel).
        if not _ending() and hasattr(self, "_generation") and not self.closed:  # it is whole
            if self.warns:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Proxy of {self.info.name!r} at {self.handle.name}{' closed' if self.closed else ''}>"

    def _open(
        self, door: Path | int | Descriptor, open_timeout: float | None, *, again: bool = False
    ) -> Handle:
        """Open the door, which may just have gone away; see "Opening" above."""
        deadline = deadline_after(check_seconds(open_timeout, "open_timeout"))
        last = isinstance(door, int | Descriptor)
        while True:
            try:
                return self._make_handle(door, _left(deadline), again=again)
            except (RevokedError, BrokenDoorError):
                if last:
                    raise
            last = again = True

    def _make_handle(
        self, door: Path | int | Descriptor, open_timeout: float | None, **options: Any
    ) -> Handle:  # fmt: skip
        own = own_dialect()
        return Handle(
            door, open_timeout=open_timeout, trust=self.trust, server=self.server, codec=self._codecs,
            words=Knock(own.python, own.main), spin=self.spin, **options,
        )  # fmt: skip

    def _find_home(self) -> Endpoint | None:
        """Return the endpoint that the door leads to, if it is known to be of this very process."""
        return endpoint_with_id(self.handle.greeting.id) if self.handle.is_local else None

    def _take(self, handle: Handle) -> None:
        self.info = describe(handle.greeting, handle.path, handle.server, local=handle.is_local)
        self.dialect = Dialect(handle.greeting.python, handle.greeting.main)
        home = endpoint_with_id(handle.greeting.id) if handle.is_local else None
        self._pool = home._pool if home is not None else None  # of this very process, if the door is
        self._table: Table | None = None
        self.is_object = bool(handle.greeting.attributes & Attribute.OBJECT)
        if self.max_reply is not None:
            handle.max_reply = self.max_reply
        elif is_strange(handle.server.uid):
            handle.max_reply = MOST_OF_ANOTHER
        self.handle = handle  # last: who calls by it marshals for it

    def transact(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Any:
        """Make one call; see "Reopening" above."""
        handle = self.handle
        descriptors: Departure | tuple[()] = ()
        try:
            data = shuttle.pack_call(args, kwargs) if self._pool is None else None
            if data is not None:  # an everyday call, in as few functions as can be
                reply = handle.call_until(deadline, data)
            else:
                data, buffers, descriptors = pack_arguments(args, kwargs, self.dialect)
                reply = self._exchange(handle, (data, buffers, descriptors), deadline)
        except (RevokedError, BrokenDoorError, ClosedError) as first:
            again = functools.partial(self._pack_again, args=args, kwargs=kwargs, deadline=deadline)
            reply = self._try_anew(handle, first, deadline, again)
        finally:
            if descriptors:
                descriptors.close()
        if isinstance(reply, bytes):
            value = shuttle.unpack_value(reply)
            return unpack_outcome(reply) if value is NotImplemented else value
        return unpack_outcome(*reply)

    #: What calling a proxy does: the same, where nothing has to be done before it.
    call = transact

    #: What calling a method does, whose name comes first in the arguments.
    act = transact

    def call_method(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> Any:
        """Call a method of the object that the door leads to."""
        return self.act((name, *args), kwargs, deadline)

    def methods(self) -> Table:
        """Return what may be called, as far as the door has said when it was opened."""
        if self._table is None:
            self._table = decode_table(self.handle.greeting.methods)
        return self._table if self._table is not None else self._ask_methods()

    def all_methods(self) -> Table:
        """Return what may be called, with signatures and docstrings, asking for what was left out."""
        table = self.methods()
        if None in table.values():
            with contextlib.suppress(DoorError):  # of a door that is gone, what is known must do
                return self._ask_methods()
        return table

    def _ask_methods(self) -> Table:
        deadline = deadline_after(check_seconds(self.open_timeout, "open_timeout"))
        table = checked_table(self.call_method(METHODS, (), {}, deadline))
        if table is None:
            raise ProtocolError(f"{self.handle.name} says that it is an object, and not what its methods are")
        self._table = table
        return table

    def ping(self, deadline: float | None) -> None:
        """Have the server answer; reopened like a call."""
        handle = self.handle
        try:
            handle.ping(timeout=_left(deadline))
        except (RevokedError, BrokenDoorError, ClosedError) as first:
            self._try_anew(handle, first, deadline, lambda it: it.ping(timeout=_left(deadline)))

    def renew(self, deadline: float | None) -> None:
        """
        Open the path anew if the server has gone, for somebody who is to have the door; if it can be.

        Who gets a door by way of us has no path to open anew, and would be given a dead one for ever.
        """
        handle = self.handle
        if self.reopens and not handle.alive and not self.closed:
            with contextlib.suppress(DoorError, OSError):  # then it is handed out as it is
                self._reopen(handle, deadline)

    def _exchange(self, handle: Handle, parcel: _AnyParcel, deadline: float | None) -> Came:
        if self._pool is None:
            return handle.call_until(deadline, *parcel)
        with waiting_for(self._pool, handle.name):
            return handle.call_until(deadline, *parcel)

    def _pack_again(
        self, handle: Handle, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> Came:
        """Marshal for whom the door leads to now, and call."""
        data, buffers, descriptors = pack_arguments(args, kwargs, self.dialect)
        try:
            return self._exchange(handle, (data, buffers, descriptors), deadline)
        finally:
            if descriptors:
                descriptors.close()

    def _try_anew(
        self, gone: Handle, first: DoorError, deadline: float | None, attempt: Callable[[Handle], _T]
    ) -> _T:
        """Try once more through the reopened door, if that may be; the first error stands if it fails."""
        try:
            if first.may_have_run or self.closed or not self.reopens:
                raise first
            if isinstance(first, ClosedError):
                if self.handle is gone:
                    raise first
                return attempt(
                    self.handle
                )  # another thread has reopened it, and closed that one in our hands
            try:
                handle = self._reopen(gone, deadline)
            except (DoorError, OSError) as second:
                raise first from second
            try:
                return attempt(handle)
            except DoorError as second:  # what is none says nothing about the call; the first error would
                if second.may_have_run:
                    raise
                raise first from second
        finally:
            del first  # or this frame and the error's traceback hold one another, and the door with them

    def _reopen(self, gone: Handle, deadline: float | None) -> Handle:
        """Open the path anew, unless another thread has done so meanwhile."""
        left = _left(deadline)
        self._lock_here()
        lock = self._opening
        try:
            if not lock.acquire(timeout=-1 if left is None else left):
                raise CallTimeoutError(f"{gone.name}: another thread is still opening it anew")
            if self.closed:
                raise ClosedError(f"{gone.name}: this proxy is closed")
            if self.handle is gone:
                self._replace(gone, self._open_again(gone, deadline))
            return self.handle
        finally:
            # Ctrl-C may surface right behind ``acquire``: whether we have the lock, it knows alone.
            with contextlib.suppress(RuntimeError):
                lock.release()

    def _replace(self, gone: Handle, handle: Handle) -> None:
        """Go on with a handle that was opened anew, unless the proxy was closed meanwhile."""
        with self._lock:
            if not self.closed and self.handle is gone:
                self._take(handle)
        if self.handle is not handle:  # closed, or a signal handler has called, and opened one before us
            handle.close()
        if self.closed:
            raise ClosedError(f"{gone.name}: this proxy is closed")
        gone.close()

    def _open_again(self, gone: Handle, deadline: float | None) -> Handle:
        """Open the path; it must lead to whom we believed at first."""
        assert gone.path is not None
        timeouts = [seconds for seconds in (self.open_timeout, _left(deadline)) if seconds is not None]
        handle = self._open(gone.path, min(timeouts, default=None), again=True)
        believed = handle.server.uid, handle.greeting.codec
        if believed != self._believed:
            handle.close()
            raise AccessError(
                f"{gone.name} is served by uid {believed[0]} with codec {believed[1].name} now, and "
                f"was opened with uid {self._believed[0]} and codec {self._believed[1].name}"
            )
        if bool(handle.greeting.attributes & Attribute.OBJECT) != self.is_object:
            handle.close()
            raise NotADoorError(
                f"{gone.name} was opened as the door of {_kind(self.is_object)}, and is one of "
                f"{_kind(not self.is_object)} now", filename=gone.path,
            )  # fmt: skip
        return handle

    def executor(self) -> ThreadPoolExecutor:
        """Return the threads in which ``submit`` calls."""
        with self._lock_here():
            if self.closed:
                raise ClosedError(f"{self.handle.name}: this proxy is closed")
            if self._executor is None:
                self._executor = ThreadPoolExecutor(_SUBMITTERS, "doorpool-submit")
            return self._executor

    def close(self) -> None:
        """Close the door for all views; idempotent."""
        with self._lock_here():
            self.closed = True
            executor, self._executor = self._executor, None
        self.handle.close()
        while self.leases:
            self._end_lease()
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)

    def _end_lease(self) -> int:
        """Let go of the last lease, which says that who has entered is still there; return its number."""
        try:
            number, lease = self.leases.pop()
        except IndexError:  # another view has closed the door
            return 0
        if isinstance(lease, Descriptor):
            lease.close()
        return number

    def enter(self, deadline: float | None) -> tuple[bool, Any]:
        """Enter the object that the door leads to; return whether that gave itself, and else what it gave."""
        itself, value, number, lease = self.call_method(ENTER, (), {}, deadline)
        self.leases.append((number, lease))
        return itself, value

    def leave(self, error: BaseException | str | None, deadline: float | None) -> bool:
        """Leave it; return whether it has dealt with the error."""
        number = self.leases[-1][0] if self.leases else 0
        return bool(self.call_method(EXIT, (error, number), {}, deadline))


class DataLine(Line):
    """A line on which data is spoken, and never a pickle."""

    def transact(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Any:
        """Make one call; as ``Line.transact``."""
        handle = self.handle
        parcel = _data.pack_arguments(args, kwargs, to=handle.server)
        try:
            try:
                reply = self._exchange(handle, parcel, deadline)
            except (RevokedError, BrokenDoorError, ClosedError) as first:
                again = functools.partial(self._pack_again, args=args, kwargs=kwargs, deadline=deadline)
                reply = self._try_anew(handle, first, deadline, again)
        finally:
            _data.release(parcel)
        data, _, descriptors = reply if isinstance(reply, tuple) else (reply, (), [])
        # What it hands out may answer as much as it may itself.
        arrivals = _data.Arrivals(descriptors, handle.server.uid, handle.max_reply)
        try:
            result = _data.unpack_outcome(data, arrivals)
        except BaseException:
            close_all(arrivals.take_back(), handle.server.uid)
            raise
        close_all(arrivals.take_rest(), handle.server.uid)
        return result

    call = act = transact

    def _pack_again(
        self, handle: Handle, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> Came:
        parcel = _data.pack_arguments(args, kwargs, to=handle.server)
        try:
            return self._exchange(handle, parcel, deadline)
        finally:
            _data.release(parcel)


class _ObjectLine(Line):
    """What the views of an object's door share: a call names the method first."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Any:
        """Call the object itself."""
        return self.transact((CALL, *args), kwargs, deadline)


class _ObjectDataLine(_ObjectLine, DataLine):
    """Likewise, where data is spoken."""


#: What a line is, by what the door says of itself when it is opened: whether it speaks data, and
#: whether it leads to an object.  (A bound method in place of a class would make a ring.)
_LINES: dict[tuple[bool, bool], type[Line]] = {
    (False, False): Line,
    (True, False): DataLine,
    (False, True): _ObjectLine,
    (True, True): _ObjectDataLine,
}


def _kind(is_object: bool) -> str:
    return "an object" if is_object else "a function"


_crossing = threading.RLock()  # what is collected meanwhile may cross as well


def _forget_parent() -> None:
    global _crossing
    _crossing = threading.RLock()


_sockets.on_fork(_forget_parent)


class Proxy:
    """
    Call a procedure of another process like a function of one's own.

    Opening happens here and fails here.  Any number of threads may call at once; each call
    has a channel of its own.  In a forked child the proxy goes on with channels of its own.

    The door of an object has the object's public methods besides: ``bank.deposit(10)``.  What
    a proxy has itself (``close``, ``options``, ...) comes first; ``method`` reaches the rest.

    Args:
        door: a path; or the number or ``Descriptor`` of an open door, taken over if this
            succeeds; or an ``Endpoint`` or another ``Proxy``, for a second descriptor of it.
        timeout: seconds for each call, from entering it to the unmarshalled result, the
            opening of a channel included; None for none.
        open_timeout: seconds for opening the door.
        wait: seconds for which to wait for a door to be there.
        reopen: open a path anew, and call again, when the server has gone and the call
            certainly did not run.
        max_reply: bytes of a result, or of what is raised, at most; from 4,096 on.  What is over it is a
            ``LimitError`` and has run.  By default 1 GiB of a server of another user (that is not
            root), as ``Endpoint`` has it too; of others whatever comes.  Doors and streams that
            another user's server returns are bounded by it as well.
        spin: seconds for which a call looks whether the answer is there, before it sleeps; by
            default up to 0.0002, as long as that is worth it; 0: never.
        server: whose server to believe, before anything of a call is sent: a set of uids and
            ``Group`` objects, a ``Group``, ``anyone``, or a function of ``Credentials``.  By default
            our own user's, and root's for a door that speaks data.  It is asked about whoever
            listens at a path (unless that is root), and about whoever answers; and whom it
            has believed first, stays who is meant, however often the path is opened anew.  A
            door that speaks pickle must be our own user's in any case.
        trust: "namespace": believe a server only in our own user namespace, where the kernel
            can say.  "uid": the same user is enough.

    Raises:
        FileNotFoundError: nothing is at the path.
        PermissionError: we may not connect to it (that takes write permission).
        AccessError: the server is not ours, or refuses us.
        NotADoorError: what is there is no door.
        BrokenDoorError: the server is gone.
        CallTimeoutError: the server does not answer.
        TypeError, ValueError: an argument is out of its range.

    Modelled on: door_call(3C)
    """

    __slots__ = ("__weakref__", "_line", "_methods", "_timeout")

    _line: Line
    _methods: dict[str, RemoteMethod] | None

    def __init__(
        self, door: Path | int | Descriptor | Endpoint | Proxy, *, timeout: float | None = None,
        open_timeout: float | None = 5.0, wait: float = 0.0, reopen: bool = True,
        server: Rule | None = None, trust: str = "namespace", spin: float | None = None,
        max_reply: int | None = None,
    ) -> None:  # fmt: skip
        check_spin(spin)
        if max_reply is not None:
            check_limit("max_reply", max_reply, MAX_REPLY, _LEAST_REPLY)
        self._methods = None
        if server is not None:
            Judge(server, "server")  # that it is a rule
        self._timeout = check_seconds(timeout, "timeout")
        wait = _checked_wait(wait)
        if trust not in ("namespace", "uid"):
            raise ValueError(f"trust is 'namespace' or 'uid', not {trust!r}")

        def connect(opened: Path | int | Descriptor) -> Line:
            return Line(
                opened, open_timeout=open_timeout, reopens=reopen, trust=trust, server=server, spin=spin,
                max_reply=max_reply,
            )  # fmt: skip

        if isinstance(door, int | Descriptor | Endpoint | Proxy):
            self._line = _connect_descriptor(door, connect)
        else:
            self._line = _connect_path(door, connect, wait)

    # -- calling -------------------------------------------------------------------------------

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """
        Call the procedure; return what it returns, or raise what it raises.

        Blocks until the reply is here.

        Raises:
            DoorError: the call could not be made or its end is not known; ``may_have_run``.
            Exception: whatever left the procedure; a ``RemoteError`` if that cannot cross.
        """
        timeout = self._timeout
        if timeout is None:
            return self._line.call(args, kwargs, None)
        value = self._line.call(args, kwargs, deadline_after(timeout))
        if type(value) in timed:
            value.timeout = timeout
        return value

    def options(
        self, *, timeout: float | _Unchanged | None = _UNCHANGED,
        progress: Listener | _Unchanged | None = _UNCHANGED,
    ) -> Proxy:  # fmt: skip
        """
        Return a view of this open door with other options; what is left out stays as it is.

        Closing any view closes the door for all of them.

        Args:
            timeout: as of ``Proxy``.
            progress: is called, in a thread of this process's default server, with what is done, the
                total (or None) and a text, whenever the procedure reports by ``track``; None
                for nothing.  The server has a door to it meanwhile.
        """
        view = object.__new__(Proxy)
        view._line, view._methods = self._line, None
        absent = isinstance(timeout, _Unchanged)
        view._timeout = self._timeout if absent else check_seconds(timeout, "timeout")  # type: ignore[arg-type]
        if not isinstance(progress, _Unchanged):
            line = getattr(self._line, "line", self._line)  # the real one
            view._line = line if progress is None else _reporting(line, progress)
        return view

    def submit(self, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """
        Call in a thread of this process; return a future of the result.

        As with ``concurrent.futures``, the end of the program waits for calls that run: one that may
        never be answered should be given a time (``options(timeout=...)``).
        """
        return self._line.executor().submit(self, *args, **kwargs)

    def map(self, *iterables: Iterable[Any], timeout: float | None = None) -> Iterator[Any]:
        """
        Call once for each set of arguments, many at once; yield the results in order.

        Args:
            iterables: as of the built-in ``map``; they are read at once.
            timeout: seconds from now until the last result must be there.
        """
        return self._line.executor().map(self, *iterables, timeout=timeout)

    def ping(self, timeout: float | None = None) -> None:
        """
        Have the server answer, without running the procedure.

        Opens a path anew, like a call, when the server has been restarted.

        Args:
            timeout: seconds; the proxy's own by default.

        Raises:
            DoorError: it did not.
        """
        seconds = self._timeout if timeout is None else check_seconds(timeout, "timeout")
        self._line.ping(deadline_after(seconds))

    # -- the methods of an object --------------------------------------------------------------

    def method(self, name: str) -> RemoteMethod:
        """
        Return a method of the object that the door leads to, to be called like one's own.

        ``bank.method("close")`` reaches one whose name the proxy has for itself; any other is
        ``bank.deposit`` as well.

        Raises:
            AttributeError: the object has no such method, or none for callers.
        """
        known = self._methods
        if known is None:
            known = self._methods = {}
        found = known.get(name)
        if found is None:
            if not self._line.is_object or name not in self._line.methods():
                raise AttributeError(f"{self!r} has no method {name!r}", name=name, obj=self)
            found = known[name] = RemoteMethod(self.options(), name)  # of a view: itself would make a ring
        return found

    def __getattr__(self, name: str) -> RemoteMethod:
        if name.startswith("_"):  # no look-up of Python's own ever leaves the process
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
            )
        known = self._methods
        return known[name] if known is not None and name in known else self.method(name)

    def _signature_text(self) -> str:
        return self._line.info.signature

    def __dir__(self) -> Iterable[str]:
        names = set(object.__dir__(self))
        if self._line.is_object:
            with contextlib.suppress(DoorError):  # of an object that cannot be asked, these must do
                names.update(name for name in self._line.methods() if not name.startswith("_"))
        return names

    # -- the door ------------------------------------------------------------------------------

    @property
    def info(self) -> DoorInfo:
        """What the door said of itself when opened; never a round trip."""
        return self._line.info

    @property
    def alive(self) -> bool:
        """
        Whether the server is there, as far as the kernel tells; no round trip.

        Raises:
            OSError: there is no descriptor to spare for looking (``EMFILE``).
        """
        return self._line.handle.alive

    @property
    def closed(self) -> bool:
        """Whether it was closed, by any view."""
        return self._line.closed

    def fileno(self) -> int:
        """
        Return the door's descriptor, for passing on; -1 once closed.

        It stays the proxy's.  Reading or writing it is undefined.
        """
        return self._line.handle.fileno()

    def close(self) -> None:
        """
        Close the door, for all views; idempotent, any thread.

        Calls that are running are not disturbed.
        """
        self._line.close()

    def __enter__(self) -> Any:
        line = self._line
        if not line.enters:
            return self
        timeout = self._timeout
        try:
            itself, value = line.enter(deadline_after(timeout))
        except BaseException:
            self.close()  # it may have been entered all the same, and the server is to undo that
            raise
        return self if itself else value

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> Any:
        with contextlib.closing(self):
            return self._leave(error) if self._line.enters else None

    def _leave(self, error: BaseException | None) -> bool:
        """Leave the object that was entered; return whether it has dealt with the error."""
        line, deadline = self._line, deadline_after(self._timeout)
        try:
            return line.leave(error, deadline)
        except MarshalError as failed:
            if error is None or failed.may_have_run:
                raise
        text = f"{type(error).__qualname__}: {text_of(error)}"
        return line.leave(text, deadline)

    def __repr__(self) -> str:
        return repr(self._line)

    def __eq__(self, other: object) -> bool:
        return self._line.identity == other._line.identity if isinstance(other, Proxy) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._line.id)

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} is an open door and cannot be pickled: open a Proxy of the path where it is "
            "needed, or pass it as an argument of multiprocessing.Process"
        )


def _shown(text: str, line: Line) -> str:
    """Return a text of the other side's, as a stranger's word is shown if it is one's."""
    return printable_lines(text) if line.handle.speaks_for_stranger else text


class _Doc:
    """The docstring of a class, and of its instances what their doors say."""

    def __init__(self, text: str | None) -> None:
        self._text = text

    def __get__(self, proxy: Proxy | None, _: type | None = None) -> str | None:
        if proxy is None:
            return self._text
        line = proxy._line
        doc = f"{line.info.name}{line.info.signature}\n\n{line.info.doc}".rstrip()
        if line.is_object:
            doc += "\n\nMethods:\n"
            for name, (signature, text) in sorted(_told(line.all_methods())):
                doc += f"\n    {name}{signature}\n" + textwrap.indent(text, " " * 8) + "\n"
        return _shown(doc, line)


class _Signature:
    """The signature of what a proxy leads to; of its class, none that ``inspect`` would not find itself."""

    def __get__(self, it: Any, _: type | None = None) -> inspect.Signature:
        text = "" if it is None else it._signature_text()
        signature = read_signature(text) if text else None
        if signature is None:
            raise AttributeError("nothing is said of its signature", name="__signature__", obj=it)
        return signature


def _told(table: Table) -> Iterator[tuple[str, tuple[str, str]]]:
    for name, entry in table.items():
        yield name, entry or ("(...)", "")


Proxy.__doc__ = _Doc(Proxy.__doc__)  # type: ignore[assignment]
Proxy.__signature__ = _Signature()  # type: ignore[attr-defined]


class RemoteMethod:
    """
    A method of an object behind a door; made by ``Proxy``, which see.

    It may be called, handed around like any function, and passed through a door.
    """

    __slots__ = ("__weakref__", "_name", "_proxy")

    def __init__(self, proxy: Proxy, name: str) -> None:
        self._proxy = proxy
        self._name = name

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the method; as ``Proxy.__call__``."""
        proxy = self._proxy
        timeout = proxy._timeout
        if timeout is None:
            return proxy._line.act((self._name, *args), kwargs, None)
        value = proxy._line.act((self._name, *args), kwargs, deadline_after(timeout))
        if type(value) in timed:
            value.timeout = timeout
        return value

    def options(self, **options: Any) -> RemoteMethod:
        """Return the method with other options; as ``Proxy.options``."""
        return RemoteMethod(self._proxy.options(**options), self._name)

    def submit(self, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call in a thread of this process; as ``Proxy.submit``."""
        return self._proxy._line.executor().submit(self, *args, **kwargs)

    def map(self, *iterables: Iterable[Any], timeout: float | None = None) -> Iterator[Any]:
        """Call once for each set of arguments, many at once; as ``Proxy.map``."""
        return self._proxy._line.executor().map(self, *iterables, timeout=timeout)

    @property
    def __self__(self) -> Proxy:
        return self._proxy

    @property
    def __name__(self) -> str:
        return self._name

    def _signature_text(self) -> str:
        return self._entry()[0]

    def _entry(self) -> tuple[str, str]:
        return self._proxy._line.all_methods().get(self._name) or ("", "")

    def __get__(self, instance: object, owner: type | None = None) -> RemoteMethod:
        return self  # bound already; that there is this tells ``help`` that it is a routine

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RemoteMethod):
            return NotImplemented
        return (self._proxy, self._name) == (other._proxy, other._name)

    def __hash__(self) -> int:
        return hash((self._proxy, self._name))

    def __reduce__(self) -> Any:
        return Proxy.method, (self._proxy, self._name)

    def __repr__(self) -> str:
        return f"<method {self._name!r} of {self._proxy!r}>"


class _MethodDoc(_Doc):
    """The docstring of ``RemoteMethod``, and of each the method's own."""

    def __get__(self, method: Any, _: type | None = None) -> str | None:
        return self._text if method is None else _shown(method._entry()[1], method._proxy._line)


RemoteMethod.__doc__ = _MethodDoc(RemoteMethod.__doc__)  # type: ignore[assignment]
RemoteMethod.__signature__ = _Signature()  # type: ignore[attr-defined]


def proxy_of(line: Line) -> Proxy:
    """Make the first view of a door that was opened otherwise."""
    proxy = object.__new__(Proxy)
    proxy._line, proxy._methods, proxy._timeout = line, None, None
    return proxy


def _reporting(line: Line, progress: Any) -> Line:
    if not callable(progress):
        raise TypeError(f"progress is something to call with (done, total, text), or None; not {progress!r}")
    return cast("Line", ReportingLine(line, progress))


def _left(deadline: float | None) -> float | None:
    """Return the seconds until then; at least a moment, which suffices for finding it over."""
    return None if deadline is None else max(1e-9, deadline - time.monotonic())


def _checked_wait(wait: float) -> float:
    if wait == 0 and not isinstance(wait, bool):
        return 0.0
    return check_seconds(wait, "wait") or FOREVER


def _connect_path(path: Path, connect: Callable[[Path], Line], wait: float) -> Line:
    """Open a path, trying again for a while if no door is there yet."""
    until = time.monotonic() + wait
    while True:
        try:
            return connect(path)
        except (FileNotFoundError, BrokenDoorError, RevokedError):
            if time.monotonic() + _RETRY > until:
                raise
        except CallTimeoutError:
            if time.monotonic() > until:
                raise
        time.sleep(_RETRY)


def _connect_descriptor(
    door: int | Descriptor | Endpoint | Proxy, connect: Callable[[int | Descriptor], Line]
) -> Line:
    """Open a descriptor; one that was given is taken over only if this succeeds."""
    if isinstance(door, int):
        return connect(door)
    if isinstance(door, Descriptor):
        with door.dup() as copy:
            line = connect(copy)
        door.close()
        return line
    with door.open() if isinstance(door, Endpoint) else Descriptor(os.dup(_checked_number(door))) as copy:
        return connect(copy)


# -- multiprocessing: as an argument of a process or a pool's task -------------------------------


def _reduce_for_multiprocessing(proxy: Proxy) -> Any:
    """Pass a proxy to a child: by path if it has one, else its descriptor."""
    line = proxy._line
    number = _checked_number(proxy)
    options = {
        "timeout": proxy._timeout,
        "open_timeout": line.open_timeout,
        "trust": line.trust,
        "server": line.server,
        "spin": line.spin,
        "max_reply": line.max_reply,
    }
    if line.handle.path is not None:
        return _from_path, (line.handle.path, {**options, "reopen": line.reopens})
    return _from_duplicate, (reduction.DupFd(number), options)


def _checked_number(proxy: Proxy) -> int:
    number = proxy.fileno()
    if number < 0:
        raise ClosedError(f"{proxy!r} is closed")
    return number


def _from_path(path: str, options: dict[str, Any]) -> Proxy:
    return _without_warning(Proxy(path, **options))


def _without_warning(proxy: Proxy) -> Proxy:
    """Let a proxy be dropped that nobody has opened by himself: it came as an argument."""
    proxy._line.warns = False
    return proxy


def _from_duplicate(duplicate: Any, options: dict[str, Any]) -> Proxy:
    with Descriptor(duplicate.detach()) as descriptor:
        return _without_warning(Proxy(descriptor, **options))


reduction.ForkingPickler.register(Proxy, _reduce_for_multiprocessing)
