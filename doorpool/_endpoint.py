"""
An endpoint: a procedure and the door that leads to it, with objects for arguments.

An endpoint belongs to one server, in whose threads its procedure runs.  Made on its own it
belongs to none until it is first attached or handed out; then to the process's default
server, which ``_server`` provides.

Whatever happens in a procedure, or while its arguments or its result are marshalled, the
caller is answered, and the channel goes on:

    arguments cannot be rebuilt here    MarshalError, did not run
    the procedure returns               its result
    it raises                           the exception as itself, or a RemoteError
    the result cannot cross             MarshalError, has run
    the result is over max_reply        LimitError, has run

Unreferenced
    Names, descriptors wherever they are, and open channels are references.  When the last
    one goes, ``on_unref`` runs in a server thread; then an endpoint that does not linger
    closes itself.  Both only if it is still unreferenced when the thread comes to it: who
    hands the door out again meanwhile, ``on_unref`` itself included, keeps it.  A name that
    the server is to make when it starts counts, too, also after a start that has failed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import logging
import os
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from doorpool import _data, _objects, _sockets
from doorpool._call import LISTENER, current
from doorpool._callers import Bar, Judge, Rule, bar_unknown
from doorpool._credentials import Credentials, is_strange
from doorpool._descriptor import NOBODY, Descriptor
from doorpool._errors import ClosedError, DoorError, LimitError, MarshalError
from doorpool._exceptions import text_of
from doorpool._guests import guests
from doorpool._handle import check_limit
from doorpool._impl import shuttle
from doorpool._info import DoorInfo, describe
from doorpool._janitor import close_all
from doorpool._keeper import report
from doorpool._log import log, means_main_thread
from doorpool._marshal import (
    Dialect,
    Parcel,
    own_dialect,
    pack_exception,
    pack_refusal,
    pack_result,
    unpack_arguments,
)
from doorpool._names import absolute_path
from doorpool._objects import Facade, encode_table, facade_of, resolve, signature_text
from doorpool._passing import take
from doorpool._shares import ShareError
from doorpool._threads import Interrupt
from doorpool._wire import NO_MAIN, Attribute, Reason, Refusal
from doorpool.door import Codec, Door, Invocation

if TYPE_CHECKING:
    from doorpool._errors import Path
    from doorpool._server import Server
    from doorpool._threads import Pool

__all__ = ["Endpoint"]

#: What to answer, whether the procedure returned, and what is to leave ``run`` besides.
_Outcome = tuple[Parcel, bool, BaseException | None]

#: The same where data is spoken.
_DataOutcome = tuple[_data.Parcel | None, bool, BaseException | None]

#: Bytes of a request, if nothing is said.  Callers of "data" may be strangers, and a byte of theirs may
#: become an object of 140 bytes when it is read (an empty list, in a list) and hold the interpreter for
#: 75 ns: 16 MiB are 2 GiB and 1 s, and 1 GiB would be the end of most machines.
_MOST_BYTES, _MOST_DATA = 2**30, _data.MOST_OF_A_STRANGER

#: Bytes with which a stranger may answer at doors of his that come with a call: as many as with his requests,
#: but a batch of a stream has always room; and next to none where he is told how far a procedure is.
_LEAST_ANSWERED, _MOST_HEARD = 2**20, 2**12


class _Usual(int):
    """Says that no number was given: unlike None it is of the type that is wanted, and no user's."""

    def __repr__(self) -> str:
        return "2**30 (of data: 2**24)"


_USUAL = _Usual()

_find_default_server: Callable[[], Server] | None = None


class _Answering(threading.local):
    """The endpoint and the call whose result is being marshalled in this thread."""

    endpoint: Endpoint | None = None
    invocation: Invocation | None = None


answering = _Answering()


class Marshalled:
    """
    A result that a procedure has marshalled by itself, to know what becomes of it.

    Attributes:
        parcel: as the codec of the door has made it; what goes along is still to be let go.  None: it
            has been sent already.
        returned: whether it is no error.
        interrupt: what a signal handler has raised meanwhile, which is to leave ``run`` behind the answer.
    """

    __slots__ = ("interrupt", "parcel", "returned")

    def __init__(self, parcel: Any, *, returned: bool = True) -> None:
        self.parcel = parcel
        self.returned = returned
        self.interrupt: BaseException | None = None


def provide_default_server(find: Callable[[], Server]) -> None:
    """Say how to get the server of endpoints that were made without one; for ``_server``."""
    global _find_default_server
    _find_default_server = find


class Endpoint:
    """
    Offer a procedure to other processes.

    Args:
        target: what is called: anything callable with the caller's arguments; or an object, whose
            public methods are.  It runs in a server thread, several at once if several call.
        name: what messages call the door; the target's ``__qualname__`` by default.
        mode: of the names it gets, as ``ls -l`` shows it.  Connecting takes *write*
            permission on Linux, so ``0o666`` lets everybody knock.
        codec: how values are written.  "pickle": any object, and only processes of our own user
            are let in.  "data": plain data for callers of all users (MessagePack); arguments
            and results are compared with the annotations of the target, and made what they
            say, by ``msgspec``.  Nothing is unpickled.
        callers: who of those that have come by the door may call: a set of uids and ``Group``
            objects, a ``Group``, ``anyone``, or a function of ``Credentials``.  Asked once for
            each channel, when it opens, a function in a thread of the library's; if it raises,
            nobody may.  By default all that
            the kernel has a name for.  With "pickle" it only narrows: our own user it must be.
        errors: of "data": the exceptions whose text callers of other users are told; of all others
            only the name of the type.  By default the built-in ones that arrive as
            themselves, less the file names of system errors.  Our own user and root are told all.
        tracebacks: of "data": whether callers see the server's traceback, of any exception.
        trust: "namespace": the caller must be in our user namespace too, where the kernel
            can say.  "uid": the same user is enough, a sandboxed one included.
        threads: how many threads of its own it has at most; without it its calls are run by
            the server's, which it shares with the other endpoints.
        expose: the names of the object's methods that callers may reach, "__call__" among them if
            it may be called itself; by default all that do not begin with an underscore.
        refuse_descriptors: refuse every call that brings a descriptor.
        max_request, max_reply: bytes; over it is a ``LimitError`` for the caller.  May be
            set at any time.  By default 1 GiB; a request in "data" 16 MiB, which may take a
            hundred times as much memory when it is read.
        max_descriptors: of a request, at most 253; likewise.
        on_unref: called with no arguments, in a server thread, when nobody can reach the door
            any more: its names, the descriptors that were handed out and all channels
            are gone, and no call of it runs.  Never before it was handed out.
        linger: stay for the next hand-out, and call ``on_unref`` each time.  Without it an
            endpoint that is unreferenced closes itself, so give it the next name before
            you take the last one away.

    Raises:
        TypeError: the target cannot be called, or only from ``async`` code, and has no public
            methods either.  (An annotation that "data" cannot check is a ``TypeError`` when the door
            is made: at the start of the server.)
        ValueError: an option is out of its range.

    Modelled on: door_create(3C), with DOOR_PRIVATE for ``threads``, DOOR_UNREF for
    ``on_unref`` and DOOR_UNREF_MULTI for ``linger``
    """

    def __init__(
        self, target: Any, *, name: str | None = None, mode: int = 0o600,
        codec: str = "pickle", callers: Rule | None = None,
        errors: Collection[type[BaseException]] | None = None, tracebacks: bool = False,
        trust: str = "namespace", threads: int | None = None, expose: Iterable[str] | None = None,
        refuse_descriptors: bool = False, max_request: int = _USUAL, max_reply: int = 2**30,
        max_descriptors: int = 253, on_unref: Callable[[], object] | None = None, linger: bool = False,
    ) -> None:  # fmt: skip
        self._server: Server | None = None
        self._door: Door | None = None
        self._pool: Pool | None = None  # the threads that run its calls, once there is a door
        self._closed = False  # or being closed: it is asked for
        self._done = False
        self._closer: int | None = None  # the thread that closes it just now
        self._expired = False
        self._making = threading.RLock()
        self._generation = _sockets.generation
        self.target = facade_of(target, expose) or _checked_target(target)
        self.name = _checked_name(name, target)
        self.mode = check_mode(mode)
        self._trust = _checked_choice("trust", trust, ("namespace", "uid"))
        self._codec = _checked_choice("codec", codec, ("pickle", "data"))
        self._callers = None if callers is None else Judge(callers, "callers")
        self._errors = _checked_errors(errors, codec)
        self._tracebacks = _checked_tracebacks(tracebacks, codec)
        self._plan: _data.Plan | None = None  # what the target takes, if data is spoken
        self._threads = None if threads is None else checked_threads("threads", threads)
        self._on_unref = _checked_callback("on_unref", on_unref)
        self._holder: int | None = NOBODY  # the stranger who was given it, if one was
        self._linger = bool(linger)
        self._refuse_descriptors = bool(refuse_descriptors)
        if max_request is _USUAL:
            max_request = _MOST_DATA if codec == "data" else _MOST_BYTES
        self._max_request = check_limit("max_request", max_request)
        self._max_reply = check_limit("max_reply", max_reply)
        self._max_descriptors = check_limit("max_descriptors", max_descriptors, 253)

    def __repr__(self) -> str:
        state = "closed" if self._closed else ", ".join(self.paths) or "no name"
        return f"<Endpoint {self.name!r}: {state}>"

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self, _ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if _ending():  # as in Channel
            return
        door = getattr(self, "_door", None)
        if door is not None and not self._done and self._generation == _sockets.here():
            if not self._closed:  # else Ctrl-C has cut that short, or its server has closed it
                warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __reduce__(self) -> Any:
        raise TypeError(
            f"{self!r} is a door of this process and cannot be pickled; give it a name with attach() "
            "and open a Proxy of the path there"
        )

    # -- limits, changeable at any time (P1) -------------------------------------------------

    @property
    def max_request(self) -> int:
        """The most bytes of a request."""
        return self._max_request

    @max_request.setter
    def max_request(self, value: int) -> None:
        self._set_limit("max_request", check_limit("max_request", value))

    @property
    def max_reply(self) -> int:
        """The most bytes of a reply."""
        return self._max_reply

    @max_reply.setter
    def max_reply(self, value: int) -> None:
        self._set_limit("max_reply", check_limit("max_reply", value))

    @property
    def max_descriptors(self) -> int:
        """The most descriptors of a request."""
        return self._max_descriptors

    @max_descriptors.setter
    def max_descriptors(self, value: int) -> None:
        self._set_limit("max_descriptors", check_limit("max_descriptors", value, 253))

    def _set_limit(self, name: str, value: int) -> None:
        setattr(self, f"_{name}", value)
        if self._door is not None:
            setattr(self._door, name, value)

    # -- where it is -------------------------------------------------------------------------

    @property
    def server(self) -> Server | None:
        """The server whose threads run it, None so far for one that was made alone."""
        return self._server

    @property
    def paths(self) -> tuple[str, ...]:
        """Its names, absolute, in the order of attaching."""
        return self._door.paths if self._door is not None else ()

    @property
    def info(self) -> DoorInfo:
        """
        What the door says of itself to whoever opens it.

        Raises:
            ClosedError: it is closed.
        """
        door = self._ready_door()
        groups = tuple(os.getgroups())
        own = Credentials(os.getpid(), os.geteuid(), os.getegid(), groups)
        return describe(door.greeting(), None, own, local=True)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def revoked(self) -> bool:
        """Whether it was revoked, or closed."""
        return self._closed or (self._door is not None and self._door.revoked)

    @property
    def unreferenced(self) -> bool:
        """
        Whether it was handed out, and nobody can reach it any more.

        Modelled on: DOOR_IS_UNREF of door_info(3C)
        """
        return self._door is not None and self._door.unreferenced

    @property
    def _private_pool(self) -> Pool | None:
        """The threads that run its calls, if they are its own; for ``Server``."""
        return None if self._threads is None else self._pool

    def _adopt(self, server: Server) -> bool:
        """
        Let a server's threads run it, and return whether it was of no server; for ``Server``.

        Raises:
            ValueError: it is another server's.
            ClosedError: it is closed.
        """
        self._check_open()
        if self._server is not None and self._server is not server:
            raise ValueError(f"{self!r} is of another server")
        free, self._server = self._server is None, server
        return free

    def _let_go(self) -> None:
        """Be of no server again, nothing having been handed out; for ``Server``."""
        assert self._server is not None
        self._server._release_pool(self)
        self._server = self._door = self._pool = None

    def _check_open(self) -> None:
        if self._closed or self._generation != _sockets.here():
            hint = ": nobody could reach it any more; linger=True would have kept it" if self._expired else ""
            raise ClosedError(f"{self!r} is closed{hint}")

    def _ready_door(self) -> Door:
        """Return the door, made now if this is the first time it is needed."""
        self._check_open()
        if self._server is None:
            assert _find_default_server is not None
            _find_default_server()._adopt(self)
        door = self._door
        if door is None:
            assert self._server is not None
            # May run foreign code: no lock is held.
            words = _describe(self.target)
            if self._codec == "data" and self._plan is None:
                self._plan = self._make_plan()
            with self._making:
                self._check_open()
                if self._door is None:
                    self._make_door(self._server, words)
                door = self._door
        assert door is not None
        if self._threads is not None:
            self._await_set_up(door)
        return door

    def _await_set_up(self, door: Door) -> None:
        """Wait for the threads that it has for itself, if they run; without them there is no door."""
        try:
            assert self._server is not None
            self._server._await_set_up(self)
        except BaseException:
            with self._making:
                if self._pool is not None and self._pool.is_set_up:
                    raise  # a signal handler's: the door is there, and may have been for long
                if self._door is door and self._server is not None:
                    self._server._release_pool(self)
                    self._door = self._pool = None  # the next who needs it tries again
            door.revoke()
            raise

    def _make_door(self, server: Server, words: dict[str, Any]) -> None:
        private = self._threads is not None
        self._pool = (
            server._make_private_pool(self.name, self._threads) if self._threads else server._shared_pool
        )
        self._door = Door(
            self._pool.gate,
            name=self.name,
            cookie=self,
            codec=Codec.PICKLE if self._plan is None else Codec.DATA,
            admit=self._rule(asks=False),
            consult=self._rule(asks=True),
            trust=self._trust,
            refuse_descriptors=self._refuse_descriptors,
            private=private,
            on_unref=self._note_unreferenced,
            max_request=self._max_request,
            max_reply=self._max_reply,
            max_descriptors=self._max_descriptors,
            main=own_dialect().main if self._plan is None else NO_MAIN,
            **words,
        )
        _endpoints[self._door.id] = self

    def _rule(self, *, asks: bool) -> Callable[[Credentials], Bar | None] | None:
        """Return the rule about who may call, besides that of the codec, if it is of such a kind."""
        if self._callers is not None:
            return self._callers.bar if self._callers.asks is asks else None
        return None if asks or self._plan is None else bar_unknown

    # -- handing out and taking away ---------------------------------------------------------

    def attach(
        self, path: Path, *, mode: int | None = None, group: str | int | None = None,
        replace: bool = False,
    ) -> Endpoint:  # fmt: skip
        """
        Give the door a name in the file system, and return the endpoint.

        Before its server has been started the name is only recorded.

        Args:
            path: where; the directory must exist.
            mode: of this name; the endpoint's own by default.
            group: whose the file becomes, by name or number.
            replace: take over the name of a door of ours that still answers.  (That of a
                server that died is taken over in any case.)

        Raises:
            ClosedError: the endpoint or its server is closed, or it was revoked.
            FileExistsError: something else has the name, and is left alone.
            OSError: as the file system says.

        Modelled on: fattach(3C)
        """
        mode = self.mode if mode is None else check_mode(mode)
        where = absolute_path(path)
        self._check_open()
        if self._server is None or not self._server._record(self, where, mode, group, replace):
            self._listen(where, mode, group, replace)
        return self

    def _listen(self, path: str, mode: int, group: str | int | None, replace: bool) -> None:
        """Make a name now; for ``Server``."""
        self._ready_door().listen(path, mode=mode, group=group, replace=replace)

    def detach(self, path: Path | None = None) -> None:
        """
        Take a name away, or all of them; whoever came in by it stays.

        Raises:
            ValueError: it has no such name.

        Modelled on: fdetach(3C)
        """
        where = None if path is None else absolute_path(path)
        if self._generation != _sockets.here():
            return  # the parent's names
        if self._server is not None and self._server._unrecord(self, where) and where is not None:
            return
        for name in self.paths if where is None else [where]:
            self._unlisten(name)

    def _unlisten(self, path: str) -> None:
        """Take away a name that was made; for ``Server``."""
        if self._door is None or path not in self._door.paths:
            raise ValueError(f"{self!r} has no name {path!r}")
        self._door.unlisten(path)

    def open(self) -> Descriptor:
        """
        Return a fresh descriptor of the door, the caller's to close.

        It can be inherited (``pass_fds``), sent through a socket, and opened with
        ``Proxy(number)`` by whoever holds it, with no permission on any path.  Give each
        receiver one of its own: copies of one share a fate.  It counts as yours, whoever gets
        it: to give a stranger a door in a result, return the endpoint, which counts as his.

        Raises:
            ClosedError: the endpoint or its server is closed, or it was revoked.
            OSError: ``EMFILE``.
        """
        return Descriptor(self._ready_door().open())

    def _open_for(self, uid: int | None, giver: Endpoint | None) -> Descriptor:
        """
        Do as ``open``, but count what a stranger gets as his; for whoever marshals it.

        Args:
            uid: whose it will be.
            giver: with whose result it goes; None: with a call of our own, which is our doing and not his.

        Raises:
            ShareError: he has too many.
        """
        if giver is None or not is_strange(uid):
            return self.open()
        self._holder = uid
        return Descriptor(self._ready_door().open_for(uid, giver._door))

    def revoke(self) -> None:
        """
        Refuse new calls of this door.

        Its names go.  Running calls finish and are answered.  Idempotent; any thread;
        waits for no peer.

        Raises:
            PermissionError: this process did not make the door.

        Modelled on: door_revoke(3C)
        """
        if self._generation != _sockets.here():  # before any lock, which a lost thread may hold
            raise PermissionError(errno.EPERM, f"{self!r}: only the process that made it may revoke it")
        if self._server is not None:
            self._server._unrecord(self)
        with self._making:
            door = self._door
            self._closed = self._closed or door is None
        if door is not None:
            door.revoke()

    def close(self) -> None:
        """
        Detach all names, revoke the door, and let the server forget it; idempotent, any thread.

        What an exception has cut short, such as Ctrl-C, the next call completes.
        """
        own = threading.get_ident()
        if self._done or self._closer == own:  # leaving an object, which closes it in turn
            return
        self._closed = True
        if self._generation != _sockets.here():
            return  # the parent's door, and none of ours
        self._closer = own
        try:
            with self._making:
                door = self._door
            if door is not None:
                door.revoke()
            interrupt = self._abandon()
            if self._server is not None:  # last: until then it is closed with its server, at the latest
                self._server._forget(self)
            self._let_target_go()
            if door is not None:  # the pool may be closed, and will not come to it
                door.end_leaving(self)
            self._done = True
        finally:
            self._closer = None
        if interrupt is not None:
            raise interrupt

    def _let_target_go(self) -> None:
        """Let go of the target, if it is for this door alone; that may run the user's code, and take long."""

    def _retire(self, refusal: Refusal) -> Callable[[], None] | None:
        """
        Close because the server closes; callers are told this reason.  Once more does no harm.

        Returns:
            What is left to be done by code of the user's, which nobody knows how long that takes.
        """
        self._closed = True
        with self._making:
            door = self._door
        if door is not None:
            door.revoke(refusal)
        return None

    def _abandon(self) -> BaseException | None:
        """
        Leave a context manager that callers have entered and will never leave; for ``Server`` too.

        Returns:
            What a signal handler has raised in it, which means whoever runs this and not the object.
        """
        if not isinstance(self.target, Facade):
            return None
        interrupt = None
        for error in self.target.abandon(f"{self.name}: whoever had entered it is gone", final=self._closed):
            interrupt = self._have_left(error) or interrupt
        return interrupt

    def _undo(self, invocation: Invocation) -> BaseException | None:
        """Leave, for a caller who is told something else, what his call has entered; as ``_abandon``."""
        undo: Callable[[], None] | None = getattr(invocation, "undo", None)
        if undo is None:
            return None
        failure = None
        try:
            undo()
        except BaseException as error:
            failure = error
        return self._have_left(failure)

    def _have_left(self, failure: BaseException | None) -> BaseException | None:
        """Say what the object has raised when it was left; return what of it means whoever runs this."""
        if self._generation != _sockets.here():
            leave_forked_child(failure)
        if failure is None:
            return None
        text = "%s: leaving it for a caller who is gone has failed"
        log(logging.ERROR, text, self.name, error=failure)
        return interrupt_of(failure)

    # -- unreferenced ------------------------------------------------------------------------

    def _note_unreferenced(self) -> None:
        """Have a server thread deliver the news; in the keeper's thread."""
        assert self._pool is not None
        here = guests()
        here.begin_leaving(self, self._holder)

        def deliver() -> None:
            try:
                self._deliver_unreferenced()
            finally:
                here.end_leaving(self)

        self._pool.run_soon(deliver, self._holder)

    def _deliver_unreferenced(self) -> None:
        """Tell, and close if it does not linger, unless somebody has got hold of it again, or is to."""
        # In this order: a name that is not to be made any more has been made.
        if self._closed or self._is_to_be_named() or not self.unreferenced:
            return
        assert self._pool is not None
        self._pool.see_to_a_waiter()  # what follows is the user's code
        interrupt = self._abandon()
        if self._on_unref is not None:
            try:
                self._on_unref()
            except BaseException as error:
                if self._generation != _sockets.here():
                    leave_forked_child(error)
                log(logging.ERROR, "%s: on_unref failed", self.name, error=error)
                interrupt = interrupt or interrupt_of(error)
            if self._generation != _sockets.here():
                leave_forked_child(None)
        door = None if self._linger or self._is_to_be_named() else self._door
        if door is not None and door.revoke_unreferenced():
            self._expired = True
            self.close()
        if interrupt is not None:
            raise Interrupt(interrupt)

    def _is_to_be_named(self) -> bool:
        """Tell whether the server has a name to make for it yet, having failed to start, perhaps."""
        return self._server is not None and self._server._is_to_name(self)

    # -- answering ---------------------------------------------------------------------------

    def _serve(self, invocation: Invocation) -> bool:
        """
        Answer one invocation, whatever happens; return whether the procedure returned.

        Runs in a server thread.  All of an everyday call is in here, for each function more is a
        fiftieth of it.
        """
        # step: call-taken
        if self._plan is not None:
            return self._serve_data(invocation, self._plan)
        call = shuttle.unpack_call(invocation.data)
        if call is None:
            try:
                call = unpack_arguments(invocation.data, invocation.buffers, invocation.descriptors)
            except BaseException as error:  # an argument's own code may do anything while it is rebuilt
                return self._finish(invocation, self._refusal(invocation, "the arguments", error, False))
            if LISTENER in call[1]:
                invocation.listener = call[1].pop(LISTENER)
        args, kwargs = call
        invocation.data, invocation.buffers = b"", ()
        token = current.set(invocation)
        outcome: _Outcome | None = None
        try:
            # step: procedure-begins
            value = self.target(*args, **kwargs) if kwargs else self.target(*args)
            if self._generation != _sockets.here():
                leave_forked_child(None)
            # step: procedure-ended
            data = shuttle.pack_value(value)
        except BaseException as error:
            if self._generation != _sockets.here():
                leave_forked_child(error)
            outcome = self._failure(invocation, error)
        else:
            del call, args, kwargs  # nothing holds them afterwards
            if data is not None and len(data) <= invocation.door.max_reply:
                invocation.reply(data)
                return True
        finally:
            current.reset(token)
            invocation.call = None  # or the two would hold one another
        if outcome is None:
            if type(value) is Marshalled and value.parcel is None:
                if value.interrupt is not None:
                    raise Interrupt(value.interrupt)
                return True
            outcome = self._result(invocation, value)
            del value
        else:
            del call, args, kwargs
        return self._finish(invocation, outcome)

    def _answer_late(self, invocation: Invocation, procedure: Callable[[], Marshalled]) -> None:
        """Answer an invocation, whose own thread has left it, with what a procedure marshals or raises."""
        token = current.set(invocation)
        interrupt: BaseException | None = None
        try:
            sent = procedure()
            parcel, returned = sent.parcel, sent.returned
            if self._generation != _sockets.here():
                leave_forked_child(None)
        except BaseException as error:
            if self._generation != _sockets.here():
                leave_forked_child(error)
            parcel, returned, interrupt = self._marshal_failure(invocation, error), False, interrupt_of(error)
        finally:
            current.reset(token)
            invocation.call = None
        if parcel is not None:
            finish: Any = self._finish if self._plan is None else self._finish_data
            finish(invocation, (parcel, returned, interrupt))

    def _marshal_failure(self, invocation: Invocation, error: BaseException) -> Any:
        """Return, as the door's codec has it, what has left a procedure; for ``Pump``."""
        if self._plan is None:
            return self._failure(invocation, error)[0]
        self._log(invocation, error)
        return self._pack_error(error, invocation)

    def _finish(self, invocation: Invocation, outcome: _Outcome) -> bool:
        """Answer with what has been marshalled; return whether the procedure returned."""
        (data, buffers, descriptors), returned, interrupt = outcome
        try:
            if not returned:
                interrupt = self._undo(invocation) or interrupt
            if not invocation.answered:  # what was raised behind an answer, by a signal, is for ``run``
                invocation.reply(data, buffers, descriptors)
        except LimitError as error:
            # A frame of the raw layer's, which no limit holds up.
            interrupt = self._undo(invocation) or interrupt
            self._report(invocation, logging.ERROR, error, error)
            invocation.fail(Reason.REPLY_TOO_LARGE, str(error), limit=error.limit, value=error.value)
            returned = False
        finally:
            if descriptors:
                descriptors.close()
        if interrupt is not None:
            raise Interrupt(interrupt)
        return returned

    def _result(self, invocation: Invocation, value: Any) -> _Outcome:
        """Marshal what the procedure has returned."""
        if type(value) is Marshalled:
            return value.parcel, value.returned, value.interrupt
        answering.endpoint, answering.invocation = self, invocation
        try:
            return pack_result(value, peer_of(invocation)), True, None
        except BaseException as error:  # a result's own code may do anything while it is pickled
            return self._refusal(invocation, "the result", error, True)
        finally:
            answering.endpoint = answering.invocation = None

    def _failure(self, invocation: Invocation, error: BaseException) -> _Outcome:
        """Marshal what has left the procedure."""
        # Begin with the procedure's own frame; past a ``__setattr__`` that forbids it.
        if error.__traceback__ is not None:
            trace = error.__traceback__.tb_next
            if trace is not None and type(self.target) is Facade:
                trace = trace.tb_next or trace
            BaseException.with_traceback(error, trace)
        self._log(invocation, error)
        return pack_exception(error, peer_of(invocation)), False, interrupt_of(error)

    def _refusal(
        self, invocation: Invocation, what: str, error: BaseException, may_have_run: bool
    ) -> _Outcome:  # fmt: skip
        """Marshal that the arguments or the result cannot cross."""
        refusal = marshal_error(what, error, may_have_run=may_have_run)
        if may_have_run:
            self._report(invocation, logging.ERROR, refusal, error)
        else:
            self._report(invocation, logging.WARNING, refusal)
        return pack_refusal(refusal, peer_of(invocation)), False, interrupt_of(error)

    # -- answering where data is spoken --------------------------------------------------------

    def _serve_data(self, invocation: Invocation, plan: _data.Plan) -> bool:
        """Answer one invocation of a data door, as ``_serve`` does."""
        return self._finish_data(invocation, self._invoke_data(invocation, plan))

    def _finish_data(self, invocation: Invocation, outcome: _DataOutcome) -> bool:
        parcel, returned, interrupt = outcome
        if parcel is None:  # it has been answered
            if interrupt is not None:
                raise Interrupt(interrupt)
            return returned
        try:
            if not returned:
                interrupt = self._undo(invocation) or interrupt
            if not invocation.answered:
                invocation.reply(*parcel)
        except LimitError as error:
            interrupt = self._undo(invocation) or interrupt
            self._report(invocation, logging.ERROR, error, error)
            invocation.fail(Reason.REPLY_TOO_LARGE, str(error), limit=error.limit, value=error.value)
            returned = False
        finally:
            _data.release(parcel)
        if interrupt is not None:
            raise Interrupt(interrupt)
        return returned

    def _invoke_data(self, invocation: Invocation, plan: _data.Plan) -> _DataOutcome:
        """
        Run the procedure of a data door; nothing holds its arguments afterwards.

        Returns:
            What to answer, whether the procedure has returned, and what is to leave ``run`` besides.
        """
        try:
            procedure, plan, args, kwargs = self._read_data(invocation, plan)
        except BaseException as error:  # a validator of the user's may do anything
            refusal = marshal_error("the arguments", error, may_have_run=False)
            self._report(invocation, logging.WARNING, refusal)
            try:
                parcel = self._pack_refusal("the arguments", error, refusal, invocation)
                return parcel, False, interrupt_of(error)
            finally:
                # It may be the error itself, whose traceback holds this frame: without a collection both
                # would stay, with the whole request, which nobody counts any more.
                del refusal
                invocation.data = b""
        token = current.set(invocation)
        try:
            value = procedure(*args, **kwargs)
            if self._generation != _sockets.here():
                leave_forked_child(None)
        except BaseException as error:
            if self._generation != _sockets.here():
                leave_forked_child(error)
            if isinstance(error, ShareError):  # of a lease, which is had before anything is entered
                invocation.fail(Reason.BUSY, f"it cannot be entered: {error}", may_have_run=False)
                return None, False, None
            if error.__traceback__ is not None:  # as in ``_invoke``
                BaseException.with_traceback(error, error.__traceback__.tb_next)
            self._log(invocation, error)
            return self._pack_error(error, invocation), False, interrupt_of(error)
        finally:
            current.reset(token)
            invocation.call = None
        if type(value) is Marshalled:
            return value.parcel, value.returned, value.interrupt
        answering.endpoint, answering.invocation = self, invocation
        try:
            return plan.pack_result(value, invocation.credentials), True, None
        except ShareError as error:
            interrupt = self._undo(invocation)
            invocation.fail(Reason.BUSY, f"the result cannot be sent: {error}")
            return None, False, interrupt
        except BaseException as error:
            refusal = marshal_error("the result", error, may_have_run=True)
            self._report(invocation, logging.ERROR, refusal, error)
            try:
                parcel = self._pack_refusal("the result", error, refusal, invocation)
                return parcel, False, interrupt_of(error)
            finally:
                del refusal  # as above
        finally:
            answering.endpoint = answering.invocation = None

    def _make_plan(self) -> _data.Plan:
        """Look at the annotations of the target, or, of an object, of all that callers may reach."""
        if isinstance(self.target, Facade):
            for name in self.target.names:
                _data.plan_of(self.target.find(name))
            return _ANY
        return _data.Plan(self.target)

    def _find_procedure(
        self, plan: _data.Plan, args: list[Any]
    ) -> tuple[Callable[..., Any], _data.Plan, list[Any]]:
        """Return what a call of a data door comes to: its plan, and the arguments that are left for it."""
        if not isinstance(self.target, Facade):
            return self.target, plan, args
        name = _data.read_text(args[0]) if args else None
        try:
            method, _ = resolve(self.target, () if name is None else (name,))
        except (AttributeError, TypeError) as error:  # it is to leave a procedure, like any other
            return functools.partial(_raise, error), _ANY, []
        return method, _data.plan_of(method), args[1:]

    def _read_data(
        self, invocation: Invocation, plan: _data.Plan
    ) -> tuple[Callable[..., Any], _data.Plan, tuple[Any, ...], dict[str, Any]]:  # fmt: skip
        """Find out what is called, and make its arguments of what has come, by its annotations."""
        uid = invocation.credentials.uid
        most = max(_LEAST_ANSWERED, invocation.door.max_request)
        arrivals = _data.Arrivals(invocation.descriptors, uid, most)
        invocation.descriptors.clear()
        try:
            if invocation.buffers:
                raise MarshalError("there are no buffers where data is spoken", may_have_run=False)
            pieces, named = _data.unpack_arguments(invocation.data)
            if LISTENER in named:
                read = functools.partial(_data.read_value, named.pop(LISTENER))
                arrivals.most = _MOST_HEARD
                invocation.listener = _data.reading(arrivals, read)
                arrivals.most = most
            procedure, plan, pieces = self._find_procedure(plan, pieces)
            args, kwargs = _data.reading(arrivals, functools.partial(plan.convert, pieces, named))
        except BaseException:
            close_all(arrivals.take_back(), uid)
            raise
        invocation.data = b""
        close_all(arrivals.take_rest(), uid)
        return procedure, plan, args, kwargs

    def _pack_error(self, error: BaseException, invocation: Invocation) -> _data.Parcel:
        """Marshal what left the procedure of a data door: of strangers, not everybody is told everything."""
        friend = not is_strange(invocation.credentials.uid)
        told = friend or self._tracebacks or _data.is_told(error, self._errors)
        paths = friend or self._errors is not None
        return _data.pack_exception(error, text=told, paths=paths, frames=self._tracebacks)

    def _pack_refusal(
        self, what: str, error: BaseException, refusal: DoorError, invocation: Invocation
    ) -> _data.Parcel:
        """Marshal that arguments or a result do not fit; for strangers as ``_pack_error`` does."""
        if self._tracebacks or not is_strange(invocation.credentials.uid):
            return _data.pack_refusal(refusal)
        if isinstance(error, _data.Discreet):
            text = error.for_strangers(self._errors)
        elif refusal is error:
            return _data.pack_refusal(refusal)
        else:
            text = f"{what} cannot cross the door: {_data.outline(error, self._errors)}"
        return _data.pack_refusal(MarshalError(text, may_have_run=refusal.may_have_run))

    def _log(self, invocation: Invocation, error: BaseException) -> None:
        if isinstance(error, Exception):
            log(logging.DEBUG, "%s raised", self.name, error=error)
        else:
            self._report(invocation, logging.ERROR, "raised what is no Exception", error)

    def _report(
        self, invocation: Invocation, level: int, what: object, error: BaseException | None = None
    ) -> None:  # fmt: skip
        """Log what has come of a caller's call."""
        peer, about = invocation.credentials, (self.name, level)
        report(peer, about, level, "%s: %s: %s", self.name, peer, what, error=error)


def _raise(error: Exception, *_: Any, **__: Any) -> NoReturn:
    raise error


#: The plan of what takes anything.
_ANY = _data.Plan(lambda *_, **__: None)


def _make_lease(end: Callable[[str], None]) -> tuple[Endpoint | None, Descriptor | None, Any]:
    """Make a lease of the door that is being called; see ``_objects``."""
    invocation = current.get(None)
    if invocation is None:
        return None, None, None
    entered: Endpoint = invocation.door.cookie
    lease = Endpoint(
        _is_no_procedure,
        name=f"{entered.name}, entered",
        on_unref=functools.partial(end, "whoever had entered it is gone"),
        refuse_descriptors=True,
    )
    if entered.server is not None:
        entered.server._adopt(lease)
    try:
        descriptor = lease._open_for(invocation.credentials.uid, entered)
    except BaseException:
        lease.close()
        raise

    def undo() -> None:
        with descriptor:
            end("who entered it could not be told so")

    invocation.undo = undo
    return lease, descriptor, take(descriptor)


def _is_no_procedure() -> None:
    """Do nothing: a lease is not there to be called."""


def _uid_of_caller() -> int | None:
    invocation = current.get(None)
    return None if invocation is None else invocation.credentials.uid


_objects.make_lease = _make_lease
_objects.uid_of_caller = _uid_of_caller

#: The endpoints of this process, by the ids of their doors.
_endpoints: weakref.WeakValueDictionary[bytes, Endpoint] = weakref.WeakValueDictionary()

_sockets.on_fork(_endpoints.clear)


def endpoint_with_id(door_id: bytes) -> Endpoint | None:
    """Return the endpoint of this process whose door has an id, or None; for ``Proxy``."""
    return _endpoints.get(door_id)


def interrupt_of(error: BaseException) -> BaseException | None:
    """
    Return an error that a signal handler of the program has raised in a procedure, else None.

    The handler means the main thread, which has been lent, and not this call; its caller is told
    nevertheless.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    if isinstance(error, Interrupt):  # of a call that was answered behind this one
        return error.error
    return error if means_main_thread(error) else None


def leave_forked_child(error: BaseException | None) -> NoReturn:
    """
    End a child that was forked in a procedure and has come out of it.

    It answers nothing, for the parent will: it is gone with the code of a ``SystemExit``, or
    with 1 after printing what else it came out with.
    """
    status = 0
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status & 0xFF)


def peer_of(invocation: Invocation) -> Dialect:
    """Return how the caller wants to be spoken to."""
    line = invocation.line
    if line.memo is None:
        line.memo = Dialect(invocation.words.python, invocation.words.main)
    peer: Dialect = line.memo
    return peer


def serve(invocation: Invocation) -> bool:
    """Have the endpoint of an invocation answer it."""
    endpoint: Endpoint = invocation.door.cookie
    return endpoint._serve(invocation)


def marshal_error(what: str, error: BaseException, *, may_have_run: bool) -> DoorError:
    """Return what to tell the caller: the error itself, or that something odd left an object's code."""
    if isinstance(error, DoorError):
        return error
    text = f"{what} cannot cross the door: {type(error).__qualname__}: {text_of(error)}"
    return MarshalError(text, may_have_run=may_have_run)


def _checked_target(target: Any) -> Callable[..., Any]:
    if not callable(target):
        raise TypeError(f"a door leads to something that can be called, not to {target!r}")
    # Not what it wraps: a plain function around an async one is a plain function.
    inner = target
    while isinstance(inner, functools.partial):
        inner = inner.func
    for function in (inner, type(inner).__call__):
        if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{target!r} is an async function, which a door cannot run")
    return target  # type: ignore[no-any-return]


def _checked_name(name: str | None, target: Any) -> str:
    if name is None:
        return str(getattr(target, "__qualname__", None) or type(target).__qualname__)
    if not isinstance(name, str):
        raise TypeError(f"a door's name is a string, not {name!r}")
    return name


def _checked_choice(what: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{what} is {' or '.join(map(repr, choices))}, not {value!r}")
    return value


def _checked_errors(errors: Collection[Any] | None, codec: str) -> tuple[type[BaseException], ...] | None:
    if errors is None:
        return None
    if codec != "data":
        raise ValueError('errors= is for codec="data": by pickle an exception arrives as itself')
    for kind in errors:
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            raise TypeError(f"errors holds exception classes, not {kind!r}")
    return tuple(errors)


def _checked_tracebacks(tracebacks: bool, codec: str) -> bool:
    if tracebacks and codec != "data":
        raise ValueError('tracebacks= is for codec="data": by pickle the traceback comes along always')
    return bool(tracebacks)


def checked_threads(what: str, value: int) -> int:
    """
    Return a number of threads if it is one.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} is a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{what} is at least 1, not {value}")
    return value


def _checked_callback(what: str, value: Callable[[], object] | None) -> Callable[[], object] | None:
    if value is not None and not callable(value):
        raise TypeError(f"{what} is something to call, or None; not {value!r}")
    return value


def check_mode(mode: int) -> int:
    """Return the mode of a name if it is one."""
    if isinstance(mode, bool) or not isinstance(mode, int):
        raise TypeError(f"a mode is a number such as 0o660, not {mode!r}")
    if not 0 <= mode <= 0o777:
        raise ValueError(f"a mode is from 0 to 0o777, not {mode:#o}")
    return mode


def _describe(target: Callable[..., Any]) -> dict[str, Any]:
    """Return what a door's greeting says of what it leads to."""
    if not isinstance(target, Facade):
        return {"doc": inspect.getdoc(target) or "", "signature": signature_text(target)}
    attributes = Attribute.OBJECT | Attribute.CONTEXT_MANAGER * target.is_context_manager
    return {
        "doc": target.doc(), "signature": target.signature(), "methods": encode_table(target.table()),
        "attributes": attributes,
    }  # fmt: skip
