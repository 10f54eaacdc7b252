"""
A proxy: somebody else's procedure, to be called like one's own.

All views of one open door (``options``) share a ``_Line``: the handle, who was believed
when it was opened, and how to open the path anew when the server has been restarted.

Opening
    While a path is being opened, its server may close because another one has taken the name
    over.  So when the door goes away meanwhile, the path is looked at once more.

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
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import reduction
from typing import Any, TypeVar

from doorpool import _sockets
from doorpool._descriptor import Descriptor
from doorpool._endpoint import Endpoint, endpoint_with_id
from doorpool._errors import (
    AccessError,
    BrokenDoorError,
    CallTimeoutError,
    ClosedError,
    DoorError,
    Path,
    RevokedError,
)
from doorpool._handle import FOREVER, Came, check_seconds, check_spin, deadline_after
from doorpool._impl import shuttle
from doorpool._info import DoorInfo, describe
from doorpool._marshal import Dialect, own_dialect, pack_arguments, unpack_outcome
from doorpool._threads import waiting_for
from doorpool._wire import Knock
from doorpool.door import Codec, Handle

__all__ = ["Proxy"]

#: How often a path is tried again while ``wait=`` lasts, seconds.  Neither a directory that is
#: not there yet nor a server that is still to listen can be waited for by an event.
_RETRY = 0.02

_SUBMITTERS = 64  #: Threads at most that ``submit`` and ``map`` start.


_T = TypeVar("_T")


class _Unchanged:
    """The absence of an option, where None means something."""

    def __repr__(self) -> str:
        return "..."


_UNCHANGED = _Unchanged()


class _Line:
    """What the views of one open door share."""

    def __init__(
        self, door: Path | int, *, open_timeout: float | None, reopens: bool, trust: str,
        spin: float | None,
    ) -> None:  # fmt: skip
        self.spin = spin
        self.open_timeout = open_timeout
        self.trust = trust
        self.closed = False
        self.warns = True  # when it is collected open
        self.handle = self._open(door, open_timeout)
        self.reopens = reopens and self.handle.path is not None
        self.id = self.handle.greeting.id
        self._believed = self.handle.server.uid, self.handle.greeting.codec
        self._take(self.handle)
        self._reset()

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
        if not _ending() and not self.closed and hasattr(self, "info"):
            if self.warns:
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        return f"<Proxy of {self.info.name!r} at {self.handle.name}{' closed' if self.closed else ''}>"

    def _open(self, door: Path | int, open_timeout: float | None) -> Handle:
        """Open the door; see "Opening" above."""
        own = own_dialect()
        words = Knock(own.python, own.main)
        deadline = deadline_after(check_seconds(open_timeout, "open_timeout"))
        last = isinstance(door, int)
        while True:
            try:
                return Handle(
                    door,
                    open_timeout=_left(deadline),
                    trust=self.trust,
                    codec=Codec.PICKLE,
                    words=words,
                    spin=self.spin,
                )
            except (RevokedError, BrokenDoorError):
                if last:
                    raise
            last = True

    def _take(self, handle: Handle) -> None:
        self.info = describe(handle.greeting, handle.path, handle.server, local=handle.is_local)
        self.dialect = Dialect(handle.greeting.python, handle.greeting.main)
        home = endpoint_with_id(handle.greeting.id) if handle.is_local else None
        self._pool = home._pool if home is not None else None  # of this very process, if the door is
        self.handle = handle  # last: who calls by it marshals for it

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Any:
        """Make one call; see "Reopening" above."""
        handle = self.handle
        try:
            data = shuttle.pack_call(args, kwargs) if self._pool is None else None
            if data is not None:  # an everyday call, in as few functions as can be
                reply = handle.call_until(deadline, data)
            else:
                reply = self._exchange(handle, args, kwargs, deadline)
        except (RevokedError, BrokenDoorError, ClosedError) as first:
            again = functools.partial(self._exchange, args=args, kwargs=kwargs, deadline=deadline)
            reply = self._try_anew(handle, first, deadline, again)
        if isinstance(reply, bytes):
            value = shuttle.unpack_value(reply)
            return unpack_outcome(reply) if value is NotImplemented else value
        return unpack_outcome(reply[0], reply[1])

    def ping(self, deadline: float | None) -> None:
        """Have the server answer; reopened like a call."""
        handle = self.handle
        try:
            handle.ping(timeout=_left(deadline))
        except (RevokedError, BrokenDoorError, ClosedError) as first:
            self._try_anew(handle, first, deadline, lambda it: it.ping(timeout=_left(deadline)))

    def _exchange(
        self, handle: Handle, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None
    ) -> Came:
        parcel = pack_arguments(args, kwargs, self.dialect)
        if self._pool is None:
            return handle.call_until(deadline, *parcel)
        with waiting_for(self._pool, handle.name):
            return handle.call_until(deadline, *parcel)

    def _try_anew(
        self, gone: Handle, first: DoorError, deadline: float | None, attempt: Callable[[Handle], _T]
    ) -> _T:
        """Try once more through the reopened door, if that may be; the first error stands if it fails."""
        if first.may_have_run or self.closed or not self.reopens:
            raise first
        if isinstance(first, ClosedError):
            if self.handle is gone:
                raise first
            return attempt(self.handle)  # another thread has reopened it, and closed that one in our hands
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
        handle = self._open(gone.path, min(timeouts, default=None))
        believed = handle.server.uid, handle.greeting.codec
        if believed == self._believed:
            return handle
        handle.close()
        raise AccessError(
            f"{gone.name} is served by uid {believed[0]} with codec {believed[1].name} now, and "
            f"was opened with uid {self._believed[0]} and codec {self._believed[1].name}"
        )

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
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)


_crossing = threading.Lock()


def _forget_parent() -> None:
    global _crossing
    _crossing = threading.Lock()


_sockets.on_fork(_forget_parent)


class Proxy:
    """
    Call a procedure of another process like a function of one's own.

    Opening happens here and fails here.  Any number of threads may call at once; each call
    has a channel of its own.  In a forked child the proxy goes on with channels of its own.

    Args:
        door: a path; or the number or ``Descriptor`` of an open door, taken over if this
            succeeds; or an ``Endpoint`` or another ``Proxy``, for a second descriptor of it.
        timeout: seconds for each call, from entering it to the unmarshalled result, the
            opening of a channel included; None for none.
        open_timeout: seconds for opening the door.
        wait: seconds for which to wait for a door to be there.
        reopen: open a path anew, and call again, when the server has gone and the call
            certainly did not run.
        spin: seconds for which a call looks whether the answer is there, before it sleeps; by
            default up to 0.0002, as long as that is worth it; 0: never.
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

    __slots__ = ("__weakref__", "_line", "_timeout")

    _line: _Line

    def __init__(
        self, door: Path | int | Descriptor | Endpoint | Proxy, *, timeout: float | None = None,
        open_timeout: float | None = 5.0, wait: float = 0.0, reopen: bool = True,
        trust: str = "namespace", spin: float | None = None,
    ) -> None:  # fmt: skip
        check_spin(spin)
        self._timeout = check_seconds(timeout, "timeout")
        wait = _checked_wait(wait)
        if trust not in ("namespace", "uid"):
            raise ValueError(f"trust is 'namespace' or 'uid', not {trust!r}")

        def connect(opened: Path | int) -> _Line:
            return _Line(opened, open_timeout=open_timeout, reopens=reopen, trust=trust, spin=spin)

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
        return self._line.call(args, kwargs, None if timeout is None else deadline_after(timeout))

    def options(self, *, timeout: float | _Unchanged | None = _UNCHANGED) -> Proxy:
        """
        Return a view of this open door with other options; what is left out stays as it is.

        Closing any view closes the door for all of them.
        """
        view = object.__new__(Proxy)
        view._line = self._line
        absent = isinstance(timeout, _Unchanged)
        view._timeout = self._timeout if absent else check_seconds(timeout, "timeout")  # type: ignore[arg-type]
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

    # -- the door ------------------------------------------------------------------------------

    @property
    def info(self) -> DoorInfo:
        """What the door said of itself when opened; never a round trip."""
        return self._line.info

    @property
    def alive(self) -> bool:
        """Whether the server is there, as far as the kernel tells; no round trip."""
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

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._line)

    def __eq__(self, other: object) -> bool:
        return self._line.id == other._line.id if isinstance(other, Proxy) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._line.id)

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} is an open door and cannot be pickled: open a Proxy of the path where it is "
            "needed, or pass it as an argument of multiprocessing.Process"
        )


def _left(deadline: float | None) -> float | None:
    """Return the seconds until then; at least a moment, which suffices for finding it over."""
    return None if deadline is None else max(1e-9, deadline - time.monotonic())


def _checked_wait(wait: float) -> float:
    if wait == 0 and not isinstance(wait, bool):
        return 0.0
    return check_seconds(wait, "wait") or FOREVER


def _connect_path(path: Path, connect: Callable[[Path], _Line], wait: float) -> _Line:
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


def _connect_descriptor(door: int | Descriptor | Endpoint | Proxy, connect: Callable[[int], _Line]) -> _Line:
    """Open a descriptor; one that was given is taken over only if this succeeds."""
    if isinstance(door, int):
        return connect(door)
    if isinstance(door, Descriptor):
        with door.dup() as copy:
            line = connect(copy.fileno())
            copy.take()
        door.close()
        return line
    with door.open() if isinstance(door, Endpoint) else Descriptor(os.dup(_checked_number(door))) as copy:
        line = connect(copy.fileno())
        copy.take()
        return line


# -- multiprocessing: as an argument of a process or a pool's task -------------------------------


def _reduce_for_multiprocessing(proxy: Proxy) -> Any:
    """Pass a proxy to a child: by path if it has one, else its descriptor."""
    line = proxy._line
    number = _checked_number(proxy)
    options = {
        "timeout": proxy._timeout,
        "open_timeout": line.open_timeout,
        "trust": line.trust,
        "spin": line.spin,
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
