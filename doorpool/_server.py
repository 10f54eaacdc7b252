"""
A server: a pool of threads, and the endpoints whose procedures run in them.

    new --start()--> started --close()--> closing --> closed

Before ``start`` endpoints and names are only recorded; it makes all of them or none.
Closing goes in the order in which callers notice least: names first, so that nobody new
comes; then every idle channel is told; running calls finish; at the end of the time what
is left is cut.

Signals, in ``run()`` of the main thread
    Python runs a handler in the main thread between two byte codes, so a handler could
    surface inside somebody's procedure, and would have to wait for a long C call of his
    to end (1.22 s against 0.20 s).  Instead, where Python's own handlers are in place,
    ``run`` sets ones that do nothing, and a wake-up descriptor that the keeper reads.  The
    first signal closes the server; a second one, when the time for closing is over and a
    procedure still holds the main thread, ends the process with ``128 + n``; its names are
    gone by then.

    A forked child inherits both, and they are not for it: what ends the child (a
    ``Process.terminate()``, say) would do nothing there, and be read by the parent's keeper.
    So the child puts Python's own handlers back before any signal can reach it, and the
    parent acts on bytes that it wrote itself: the kernel says who wrote them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar, overload

import attrs

from doorpool import _endpoint, _shelf, _sockets
from doorpool._endpoint import Endpoint, check_mode, checked_threads, leave_forked_child
from doorpool._errors import ClosedError, Path
from doorpool._guests import descriptors_of_a_user, guests
from doorpool._handle import check_seconds, check_spin
from doorpool._keeper import keeper
from doorpool._log import log
from doorpool._names import absolute_path
from doorpool._shares import Limits, Usage, sum_up
from doorpool._threads import Pool, Pools
from doorpool._unread import most_unread
from doorpool._wire import Reason, Refusal
from doorpool.door import Invocation

__all__ = ["Server", "Statistics"]

Procedure = TypeVar("Procedure", bound=Callable[..., Any])
Member = TypeVar("Member")

_RETRY = 0.2  # seconds until a thread is asked for again that could not be had
_ROUSE = 0.05  # seconds until the main thread is woken again, if another has taken what should wake it
_AT_EXIT = 5.0  # seconds that the end of the process waits for another thread to take names away
_JOIN = 1.0  # seconds for threads that have nothing left to do to be gone
_QUICK = 0.25  # seconds that clean-up of the user's has, however little time there is for closing
_STALL = 0.05  # seconds after which the rest of it does not wait for that which is being done

#: What ``run`` answers, if nobody else has said what is to happen.
_SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@attrs.frozen
class Statistics:
    """
    How a server is doing.

    Attributes:
        threads: server threads there are.
        waiting: of these, how many wait for a call.
        running: procedures that run now.
        served: calls answered so far.
        errors: of these, those in which the procedure returned nothing.
        channels: open channels.
        doors: endpoints that are not closed.
        waited: seconds that callers waited for a thread, over all calls, by their account.
        segments: pieces of shared memory that were made for big results and exist.
        segment_bytes: their size together.
        segments_retained: of these, how many callers hold, who have something built on them.
        segments_lent: of these, how many ``doorpool.empty`` and ``doorpool.buffer`` have lent and are not
            returned yet.  One that was made for that counts among them all from when it is returned.
        segments_reused: how often one was used again, on the channels that are open.
        segments_received: pieces of shared memory that callers have made for big arguments, and not
            taken back.
        segment_bytes_received: their size together.
        segment_bytes_mapped: of these, what is mapped here: procedures hold it, or it will be used again.
        segment_bytes_limit: how many ``segment_bytes`` a process may have, all its servers and proxies
            together, and twice what one channel may; beyond it results go over the socket.
        segment_bytes_mapped_limit: likewise, how many it may have mapped; beyond it arguments are copied.
        refused: calls and openings of other users that were refused because they had too much.
        limits: what each user other than our own and root may have: all numbers that are in force, those that
            were not given as well.  ``running`` is of the threads that the server's endpoints share, and
            ``descriptors`` goes by what ``RLIMIT_NOFILE`` is now.
        users: what each of those who are here has now, by uid; None: those whom the kernel does not name.
    """

    threads: int
    waiting: int
    running: int
    served: int
    errors: int
    channels: int
    doors: int
    waited: float
    segments: int
    segment_bytes: int
    segments_retained: int
    segments_lent: int
    segments_reused: int
    segments_received: int
    segment_bytes_received: int
    segment_bytes_mapped: int
    segment_bytes_limit: int
    segment_bytes_mapped_limit: int
    refused: int
    limits: Limits
    users: Mapping[int | None, Usage]


@attrs.define
class _Name:
    """A name that is to be made when the server starts."""

    endpoint: Endpoint
    path: str
    mode: int
    group: str | int | None
    replace: bool


class Server:
    """
    Run procedures for other processes.

    Args:
        max_threads: how many server threads at most; beyond it callers wait.
        idle_timeout: seconds after which a thread that nobody needs goes; None: never.
        close_timeout: seconds that running calls have when a ``with`` block is left.
        thread_setup: called first in each server thread, and in one that ``run`` lends, the first
            time.  If it fails in the first threads, so does ``start``; in a lent one, ``run``; in a
            later one, that thread serves nobody.
        name: begins the names of its threads.
        spin: seconds for which a thread that has answered looks whether the next call is there,
            before it sleeps; by default up to 0.0002, as long as that is worth it; 0: never.
        limits: what each user other than our own and root may have of it at one time.

    Raises:
        TypeError, ValueError: an option is out of its range.

    Modelled on: door_server_create(3C), door_create(3C)
    """

    def __init__(
        self, *, max_threads: int = 64, idle_timeout: float | None = 10.0,
        close_timeout: float | None = 5.0, thread_setup: Callable[[], object] | None = None,
        name: str | None = None, spin: float | None = None, limits: Limits | None = None,
    ) -> None:  # fmt: skip
        self._started = False
        self._generation = _sockets.generation
        checked_threads("max_threads", max_threads)
        if thread_setup is not None and not callable(thread_setup):
            raise TypeError(f"thread_setup is something to call, not {thread_setup!r}")
        self.name = "doorpool" if name is None else str(name)
        self._close_timeout = _checked_close_timeout(close_timeout)
        self._pools = Pools(
            self.name, _endpoint.serve, max_threads=max_threads,
            idle_timeout=check_seconds(idle_timeout, "idle_timeout"), thread_setup=thread_setup,
            spin=check_spin(spin), limits=_checked_limits(limits),
        )  # fmt: skip
        self._lock = threading.RLock()
        self._endpoints: dict[Endpoint, None] = {}
        self._adopted: _Loose[Endpoint] = _Loose()
        self._to_make: list[_Name] = []
        self._closing = False
        self._overdue = False
        self._closer: int | None = None  # the thread that closes it
        self._cleaners: set[int] = set()  # those that do what is the user's meanwhile
        self._nameless = _Latch()  # and all doors refuse
        self._closed = _Latch()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "started" if self._started else "not started"
        return f"<Server {self.name!r}: {state}, {len(self._endpoints)} endpoints>"

    @property
    def _shared_pool(self) -> Pool:
        """The threads that its endpoints share; for ``Endpoint``."""
        return self._pools.shared

    @property
    def closed(self) -> bool:
        """Whether it was closed, or is being closed."""
        return self._closing

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints, in the order of attaching."""
        return tuple(self._endpoints)

    def statistics(self) -> Statistics:
        """Return how the server is doing."""
        doors = sum(not it.closed for it in self._present())
        users = self._pools.usage()
        with keeper().lock:
            users = sum_up([users, guests().usage()])
        crowd = self._pools.crowd
        return Statistics(
            doors=doors,
            **attrs.asdict(self._pools.load),
            segment_bytes_limit=_shelf.BYTES_OF_PROCESS,
            segment_bytes_mapped_limit=_shelf.BYTES_MAPPED,
            refused=crowd.refused,
            limits=attrs.evolve(
                crowd.limits,
                total_bytes=crowd.most_bytes,
                running=self._shared_pool.gate.most_running,
                descriptors=descriptors_of_a_user(crowd.limits),
                unread=most_unread(crowd.limits)[0],
            ),
            users=users,
        )

    # -- endpoints ---------------------------------------------------------------------------

    @overload
    def endpoint(self, path: Procedure, /) -> Procedure: ...
    @overload
    def endpoint(
        self, path: Path | None = None, /, *, mode: int | None = None,
        group: str | int | None = None, replace: bool = False, **options: Any,
    ) -> Callable[[Procedure], Procedure]: ...  # fmt: skip
    def endpoint(
        self, path: Any = None, /, *, mode: int | None = None, group: str | int | None = None,
        replace: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """
        Offer the decorated function, at a path if one is given; return it unchanged.

        ``@server.endpoint("x.door")``, ``@server.endpoint()`` and ``@server.endpoint`` are all
        right.  Arguments and errors as of ``attach``.
        """
        if callable(path):
            self.attach(path, mode=mode, group=group, replace=replace, **options)
            return path

        def offer(target: Procedure) -> Procedure:
            self.attach(target, path, mode=mode, group=group, replace=replace, **options)
            return target

        return offer

    def attach(
        self, target: Any, path: Path | None = None, *,
        mode: int | None = None, group: str | int | None = None, replace: bool = False,
        **options: Any,
    ) -> Endpoint:  # fmt: skip
        """
        Offer something callable, or an object, under a name in the file system if a path is given.

        Before ``start`` the name is only recorded; on a started server it is made at once.

        Args:
            target: what is called; an object, whose public methods are; or an ``Endpoint``: one of
                no server becomes this one's, one of this server gets another name.
            path: where; the directory must exist.
            mode: of the name; by default that of the endpoint, ``0o600``.
            group: whose the file becomes, by name or number.
            replace: take over the name of a door of ours that still answers.
            options: of ``Endpoint``.

        Raises:
            ClosedError: the server is closed.
            TypeError: the target cannot be offered; options together with an ``Endpoint``.
            ValueError: the endpoint is another server's; an option is out of its range.
            FileExistsError: something else has the name, and is left alone.
            OSError: as the file system says.

        Modelled on: door_create(3C), fattach(3C)
        """
        self._check_open()
        if isinstance(target, Endpoint) and options:
            raise TypeError(f"an Endpoint has its options already: {', '.join(sorted(options))}")
        where = None if path is None else absolute_path(path)
        mode = None if mode is None else check_mode(mode)
        endpoint = target if isinstance(target, Endpoint) else Endpoint(target, **options)
        with self._lock:
            self._check_open()  # now that ``close`` cannot begin
            was_free = endpoint._adopt(self)
            try:
                if where is not None:
                    endpoint.attach(where, mode=mode, group=group, replace=replace)
            except BaseException:
                if was_free:
                    endpoint._let_go()
                raise
            self._endpoints[endpoint] = None
        return endpoint

    def _record(
        self, endpoint: Endpoint, path: str, mode: int, group: str | int | None, replace: bool
    ) -> bool:  # fmt: skip
        """Take note of a name that ``start`` shall make; False if it has made them; for ``Endpoint``."""
        with self._lock:
            if not self._started:
                self._to_make.append(_Name(endpoint, path, mode, group, replace))
            return not self._started

    def _unrecord(self, endpoint: Endpoint, path: str | None = None) -> bool:
        """Drop a name that is yet to be made, or all; return whether there was one; for ``Endpoint``."""

        def is_meant(name: _Name) -> bool:
            return name.endpoint is endpoint and path in (None, name.path)

        # The lock is not for the collector, which comes here, and for no endpoint with a name.
        if not any(map(is_meant, list(self._to_make))):
            return False
        with self._lock:
            self._to_make = [name for name in self._to_make if not is_meant(name)]
        return True

    def _is_to_name(self, endpoint: Endpoint) -> bool:
        """Tell whether there is a name for it yet to be made; for ``Endpoint``."""
        return any(name.endpoint is endpoint for name in list(self._to_make))

    def _forget(self, endpoint: Endpoint) -> None:
        """Let go of a closed endpoint; for ``Endpoint``."""
        self._unrecord(endpoint)
        self._endpoints.pop(endpoint, None)
        self._adopted.discard(endpoint)
        self._release_pool(endpoint)

    def _make_private_pool(self, name: str, threads: int) -> Pool:
        """Make threads for one endpoint alone; for ``Endpoint``."""
        return self._pools.private(name, threads)

    def _release_pool(self, endpoint: Endpoint) -> None:
        """Let the threads go that an endpoint has for itself, if it has; for ``Endpoint``."""
        pool = endpoint._private_pool
        if pool is not None and not pool.gate.closed:
            self._pools.release(pool)

    def _await_set_up(self, endpoint: Endpoint) -> None:
        """
        Wait for the setup of the threads that an endpoint has for itself, if they run; for ``Endpoint``.

        Raises:
            RuntimeError: it failed.
        """
        if self._started and endpoint._private_pool is not None:
            endpoint._private_pool.wait_set_up()

    def _adopt(self, endpoint: Endpoint) -> None:
        """Run an endpoint that was made without a server, without keeping it alive."""
        endpoint._adopt(self)
        self._adopted.add(endpoint)

    def _present(self) -> list[Endpoint]:
        """Return all endpoints that there are now, kept alive or not."""
        return [*self._endpoints, *self._adopted.members()]  # others come and go meanwhile

    # -- starting ----------------------------------------------------------------------------

    def _check_here(self) -> None:
        if self._generation != _sockets.here():
            raise ClosedError(f"{self!r} belongs to the process that this one was forked from")

    def _check_open(self) -> None:
        self._check_here()
        if self._closing:
            raise ClosedError(f"{self!r} cannot be used again")

    def start(self) -> Server:
        """
        Start the threads and make all names, or none; return the server.

        When this returns every name answers.  Starting a started server does nothing.

        Raises:
            ClosedError: it was closed.
            RuntimeError: no thread can be had, or ``thread_setup`` failed, by which the server
                is closed.
            OSError: a name cannot be made; those made before are gone again.
            BaseException: what a signal handler has raised; if that was while it waited for
                ``thread_setup``, the server is closed, too.
        """
        self._check_here()  # before the lock, which in a child a lost thread may hold
        first = False
        try:
            with self._lock:
                self._check_open()
                first = not self._started
                if first:
                    self._make_names()
                    self._started = True
                    _started.add(self)
            self._pools.wait_set_up()
        except BaseException as error:
            # Before there are threads all has been taken back, and it can be started again.  Afterwards there
            # is no way back, for callers may be served; but Ctrl-C in a second start means that one alone.
            if self._pools.started and (first or isinstance(error, RuntimeError)):
                self.close(0)
            raise
        return self

    def _make_names(self) -> None:
        try:
            for name in self._to_make:
                name.endpoint._listen(name.path, name.mode, name.group, name.replace)
            self._pools.start()
        except BaseException:
            for name in self._to_make:
                if name.path in name.endpoint.paths:  # which Ctrl-C may have cut short
                    name.endpoint._unlisten(name.path)
            raise
        self._to_make.clear()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close(self._close_timeout)

    # -- running -----------------------------------------------------------------------------

    def run(self, *, signals: bool = True, raise_nofile: bool = False) -> None:
        """
        Serve calls with this thread too, until the server is closed.

        Starts the server if it was not.  Runs ``thread_setup`` in this thread, unless it did so before.  The
        thread counts toward ``max_threads``.

        Args:
            signals: in the main thread, let SIGINT and SIGTERM close the server, unless
                the program has handlers of its own.  A second one, when ``close_timeout`` is
                over, ends the process: a procedure that the main thread runs may hold it.
                What a handler of the program raises, and Ctrl-C with ``signals=False``, leaves
                ``run``; if it surfaced in a procedure, its caller gets a ``RemoteError``.
                In the main thread a ``signal.set_wakeup_fd`` of the program's goes on being told.
            raise_nofile: first raise the soft limit of open files to the hard one.

        Raises:
            RuntimeError: this thread runs a server already; ``thread_setup`` failed in it, with what left
                that as the cause: the server goes on without it; or as ``start`` says.
            ClosedError: the server was closed before.
            OSError: a name cannot be made.

        Modelled on: door_return(3C)
        """
        self._shared_pool.check_lendable()
        if raise_nofile:
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        main = threading.current_thread() is threading.main_thread()
        with self._hearing_signals(_SIGNALS if signals else {}) if main else contextlib.nullcontext():
            self.start()
            self._shared_pool.lend()
            self.wait()

    @contextlib.contextmanager
    def _hearing_signals(self, closing: Mapping[signal.Signals, Any]) -> Iterator[None]:
        """
        Have the keeper hear all signals that Python handles.

        Args:
            closing: those that shall close the server, where these handlers are in place.
        """
        ours = {n: old for n, old in closing.items() if signal.getsignal(n) is old}
        watcher = keeper()  # which may not be had: before anything is changed
        reader, writer = _sockets.signal_pair()
        with reader, writer:
            heard = _Heard(ours, reader, writer)
            # Whatever cuts this short, what was changed is put back: else Python would go on writing signals
            # to the number of a closed socket, which the next file of the program gets.
            try:
                _heard.append(heard)
                watcher.watch(reader.fileno(), functools.partial(self._hear_signals, heard))
                heard.begin()
                yield
            finally:
                if heard in _heard:  # not in a child
                    try:
                        heard.put_back()
                    finally:
                        _heard.remove(heard)
                        watcher.unwatch(reader.fileno())

    def _hear_signals(self, heard: _Heard) -> None:
        """Close the server, in a thread of its own, or have its main thread look; in the keeper's thread."""
        try:
            letter = _sockets.receive_letter(heard.reader, 64)
        except BlockingIOError:
            return
        letter.close()
        if letter.ids is None or letter.ids[0] != os.getpid():
            return  # a child's signals, from before it put its handlers back
        heard.pass_on(letter.data)
        for number in letter.data:
            if number not in heard.handlers:
                self._rouse()
            elif self._overdue:
                os._exit(128 + number)
            elif not self._closing:
                keeper().afterwards(self._close_by_signal)

    def _rouse(self, *, again: bool = False) -> None:
        """
        Have the main thread come to where Python calls handlers; in the keeper's thread.

        A signal that reaches it in the last moment before it sleeps in the kernel would wait there
        for the next call.
        """
        if self._shared_pool.rouse(threading.main_thread(), again=again):
            keeper().after(_ROUSE, functools.partial(self._rouse, again=True))

    def _close_by_signal(self) -> None:
        """Close the server in a thread of its own, as soon as one is to be had; in the keeper's thread."""
        name = f"{self.name}-closing"
        try:
            threading.Thread(target=self.close, args=[self._close_timeout], name=name).start()
        except (RuntimeError, MemoryError) as error:
            keeper().say(logging.WARNING, "%s: no thread to close it: %s; trying again", self.name, error)
            keeper().after(_RETRY, lambda: keeper().afterwards(self._close_by_signal))

    def wait(self, timeout: float | None = None) -> bool:
        """
        Wait until the server has been closed; return whether it has.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            ClosedError: it is of the process that this one was forked from.
        """
        seconds = check_seconds(timeout, "timeout")
        self._check_here()
        return self._closed.wait(seconds)

    # -- closing -----------------------------------------------------------------------------

    def close(self, timeout: float | None = 5.0) -> None:
        """
        Close the server; idempotent, any thread, also from a procedure of its own.

        Names go first, then every idle channel is told.  Running calls finish; those that
        do not in time are cut, and their callers get ``BrokenDoorError(may_have_run=True)``.
        A call that closes its own server is not waited for.

        Generators whose items are pulled through a door are let go of, in threads of their own: their
        ``finally`` is waited for as long as running calls are.

        Args:
            timeout: seconds for running calls; 0: none; None: for ever.

        Modelled on: door_revoke(3C) of every door of the process
        """
        timeout = _checked_close_timeout(timeout)
        if self._generation != _sockets.here():
            return  # the parent's
        own = threading.get_ident()
        with self._lock:  # and in one go, for a signal handler passes the lock
            first, self._closer, self._closing = self._closer is None, self._closer or own, True
        if not first:  # a handler would wait for its own thread, and who is waited for, for himself
            if not self._pools.are_ours() and own not in (self._closer, *self._cleaners):
                self._closed.wait(timeout)
            return
        try:
            self._close(timeout)
        finally:
            _started.discard(self)
            self._closed.set()

    def _close_at_exit(self) -> None:
        """Close it as the process ends, or let another thread that is closing it take the names away."""
        self.close(0)
        if self._generation == _sockets.here() and self._closer != threading.get_ident():
            self._nameless.wait(_AT_EXIT)

    def _close(self, timeout: float | None) -> None:
        refusal = Refusal(Reason.CLOSED, "the server is closing")
        until = None if timeout is None else time.monotonic() + max(timeout, _QUICK)
        try:
            endpoints = self._present()
            cleaned_up = self._retire(endpoints, refusal)
            self._cut(self._pools.close(timeout), f"after {timeout} s")
            cleaned_up.wait(None if until is None else max(0.0, until - time.monotonic()))
            self._clear_up(endpoints, _JOIN)
        except BaseException:  # Ctrl-C: whoever closes has no patience any more
            endpoints = self._present()
            self._retire(endpoints, refusal)
            self._cut(self._pools.close(0), "by an exception")
            self._clear_up(endpoints, 0)
            raise

    def _retire(self, endpoints: list[Endpoint], refusal: Refusal) -> _Latch:
        """Have all doors refuse; only then the code of the user's begins that one may have to wait for."""
        left = [endpoint._retire(refusal) for endpoint in endpoints]
        if not self._nameless.wait(0):
            self._nameless.set()
        clean_up = _CleanUp(self.name, self._cleaners, [it for it in left if it is not None])
        clean_up.begin()
        return clean_up.done

    def _clear_up(self, endpoints: list[Endpoint], timeout: float) -> None:
        """Leave what callers have entered, and have the last threads give back what the pools have."""
        overdue, self._overdue = self._overdue, True  # an ``__exit__`` may take for ever, its time is over
        interrupts = [endpoint._abandon() for endpoint in endpoints]
        self._overdue = overdue
        self._pools.join(timeout)
        for interrupt in filter(None, interrupts):
            raise interrupt

    def _cut(self, late: list[Invocation], when: str) -> None:
        # A procedure may hold the main thread, and what is done between two calls may be the user's, too.
        self._overdue = bool(late) or self._shared_pool.holds(threading.main_thread())
        for invocation in late:
            invocation.cut()
        if late:
            names = ", ".join(sorted({invocation.door.name for invocation in late}))
            log(logging.WARNING, "%s: %d calls cut %s: %s", self.name, len(late), when, names)

    def __reduce__(self) -> Any:
        raise TypeError(f"{self!r} stays in its process; open a Proxy of one of its doors elsewhere")

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if _ending():  # as in Channel; what was started has been closed at exit
            return
        if not getattr(self, "_started", False):
            if hasattr(self, "_pools"):
                self._pools.dispose()
        elif not self._closing and self._generation == _sockets.here():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close(0)


class _Loose(Generic[Member]):
    """
    Members that it does not keep alive.

    Unlike ``weakref.WeakSet`` it can be listed while other threads add and discard.  No method takes a lock,
    for finalizers come here, too.
    """

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Member]] = {}

    def add(self, member: Member) -> None:
        """Take one in."""
        key, references = id(member), self._references
        references[key] = weakref.ref(member, lambda _: references.pop(key, None))

    def discard(self, member: Member) -> None:
        """Let go of one, if it is there; also in its finalizer, when weak references are gone already."""
        self._references.pop(id(member), None)

    def members(self) -> list[Member]:
        """Return those that are there now."""
        references = list(self._references.values())  # in one step of the interpreter
        return [it for it in (reference() for reference in references) if it is not None]


def _checked_limits(limits: Limits | None) -> Limits | None:
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits is a doorpool.Limits, not {limits!r}")
    return limits


def _checked_close_timeout(timeout: float | None) -> float | None:
    if timeout == 0 and not isinstance(timeout, bool):
        return 0.0
    try:
        return check_seconds(timeout, "timeout")
    except ValueError:
        text = f"a time for closing is a number of seconds from 0 on, or None for ever; not {timeout!r}"
        raise ValueError(text) from None


class _Latch:
    """
    An event that comes once.

    Unlike ``threading.Event``, it may be set by a signal handler that interrupts a ``wait``,
    wherever that is: there is no moment in which the waiting thread holds what ``set`` needs.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Let all go who wait, and who will; once."""
        self._is_set = True
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, at most so many seconds; return whether it is."""
        if not self._is_set and self._lock.acquire(timeout=-1 if timeout is None else timeout):
            self._lock.release()
        return self._is_set


class _CleanUp:
    """
    What code of the user's has to do as a server closes, in daemon threads, for it may take for ever.

    One thread does one thing after the other.  Where one stalls, another thread goes on with the rest.

    Args:
        name: begins the names of the threads.
        cleaners: they are in it while they are at work, for that code may close the server, too.
        jobs: what is to be done, in any order; raises nothing.

    Attributes:
        done: set when all is.
    """

    def __init__(self, name: str, cleaners: set[int], jobs: list[Callable[[], None]]) -> None:
        self.done = _Latch()
        self._name = name
        self._cleaners = cleaners
        self._jobs = deque(jobs)
        self._count = len(jobs)
        self._ends: queue.SimpleQueue[None] = queue.SimpleQueue()

    def begin(self) -> None:
        """Begin, and wait for nothing, unless there are no threads to be had."""
        if not self._jobs:
            self.done.set()
        elif not self._start(self._oversee):
            self._oversee()

    def _start(self, function: Callable[[], None]) -> bool:
        try:
            threading.Thread(target=function, name=f"{self._name}-clean-up", daemon=True).start()
        except (RuntimeError, MemoryError):  # as when the interpreter ends, from 3.12 on
            return False
        return True

    def _oversee(self) -> None:
        ended, stalls = 0, True
        while ended < self._count:
            if stalls and self._jobs and not self._start(self._work):
                self._work()
            try:
                self._ends.get(timeout=_STALL if self._jobs else None)
                ended, stalls = ended + 1, False
            except queue.Empty:
                stalls = True
        self.done.set()

    def _work(self) -> None:
        own, generation = threading.get_ident(), _sockets.here()
        self._cleaners.add(own)
        try:
            while True:
                try:
                    job = self._jobs.popleft()
                except IndexError:
                    return
                job()
                del job
                if generation != _sockets.here():
                    leave_forked_child(None)
                self._ends.put(None)
        finally:
            self._cleaners.discard(own)


def _do_nothing(*_: object) -> None:
    """Handle a signal that the keeper reads."""


@attrs.define(eq=False)
class _Heard:
    """
    The signals that a ``run`` hears, and where they come in.

    Attributes:
        handlers: of those that close the server, what was there before.
        reader, writer: the pair of sockets.
        before: the wake-up descriptor that was there, once ours is in its place.
    """

    handlers: dict[signal.Signals, Any]
    reader: socket.socket
    writer: socket.socket
    before: list[int] = attrs.field(factory=list)

    def begin(self) -> None:
        """Have the signals come in here."""
        put = functools.partial(signal.set_wakeup_fd, warn_on_full_buffer=False)
        # In one step of the interpreter: before an assignment a handler could raise, and the number be lost.
        self.before.extend(map(put, [self.writer.fileno()]))
        for number in self.handlers:
            signal.signal(number, _do_nothing)

    def pass_on(self, numbers: bytes | bytearray | memoryview) -> None:
        """Tell whoever heard the signals before, too."""
        for descriptor in self.before:
            if descriptor >= 0:
                with contextlib.suppress(OSError):  # it is full, or closed: what Python does not mind either
                    os.write(descriptor, numbers)

    def put_back(self) -> None:
        """Have the signals go where they went before."""
        try:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
        finally:  # the first signal that is Python's again may raise
            for descriptor in self.before:
                try:
                    signal.set_wakeup_fd(descriptor)
                except (OSError, ValueError):  # the program has closed it meanwhile
                    signal.set_wakeup_fd(-1)

    def leave_to_parent(self) -> None:
        """Let go of the signals in a forked child."""
        try:
            self.put_back()
        except (ValueError, OSError):
            # A fork in C by another than the main thread, whose handlers it must not touch.
            # The number stays taken: signals would be written to whatever had it next.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.writer.fileno(), inheritable=False)
            self.writer.detach()
        self.writer.close()
        self.reader.close()


_heard: list[_Heard] = []  # of the present run() in the main thread
_held = threading.local()  # .mask: that of a thread which is just forking


def _hold_signals() -> None:
    """Keep signals from a child until its handlers are its own."""
    if _heard:
        _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _let_signals_go() -> None:
    mask, _held.mask = getattr(_held, "mask", None), None
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# The child's hook comes after that of ``_sockets``, which runs ``_forget_parent`` below.
os.register_at_fork(
    before=_hold_signals, after_in_parent=_let_signals_go, after_in_child=_let_signals_go
)  # fmt: skip


_started: _Loose[Server] = _Loose()


@atexit.register
def _close_all() -> None:
    """Take the names of servers away that are still there at exit."""
    for server in _started.members():
        server._close_at_exit()


# -- the default server ----------------------------------------------------------------------

_default: Server | None = None
_making_default = threading.Lock()


def _default_server() -> Server:
    """Return the server of endpoints that were made without one, starting it the first time."""
    global _default
    with _making_default:
        if _default is None or _default.closed or _default._generation != _sockets.here():
            _default = Server(name="doorpool-default").start()
        return _default


def _forget_parent() -> None:
    global _default, _making_default
    _default = None
    _making_default = threading.Lock()
    while _heard:
        _heard.pop().leave_to_parent()


_sockets.on_fork(_forget_parent)
_endpoint.provide_default_server(_default_server)
