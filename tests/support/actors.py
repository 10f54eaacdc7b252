"""
Actors: forked children of several users who do, in turn, what a test tells them.

A play about a victim, a stranger and a relay is one story; it should be read in one place.
So each actor is a process that runs functions on request, and the test is the director:

    server, stranger = actor(4201), actor(6602)
    server(serve, path)
    with pytest.raises(AccessError):
        stranger(open_client, path)

Functions are those of modules that were there before the fork, and go by name.  Descriptors go
along as ``Fd(number)`` and arrive as numbers.  ``begin`` starts something that blocks, so
that others can act meanwhile.

An actor counts what its process unpickles (``counts``); the director's own messages do not
count.  What it keeps between two scenes is in ``here``.
"""

from __future__ import annotations

import array
import importlib
import io
import logging
import os
import pickle
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NoReturn

import attrs

from support import child as _child
from support.measuring import LAST_WORDS, MEASURED
from support.processes import ChildFailed, wait_until

TIMEOUT = 20.0  # seconds for one scene
_SIZE = 100_000
_PR_SET_PDEATHSIG = 1

#: A user that only tests of this process become.  Descriptors in flight the kernel counts for all processes
#: of a user, and who sends is bound by his own ``RLIMIT_NOFILE``: where that is low, nobody else is to count.
LONE_USER = 20_000 + os.getpid() % 20_000

#: What this process, being an actor, keeps from one function to the next.
here = SimpleNamespace()

_stages: set[socket.socket] = set()  # the director's ends, which no actor must keep
_exempt = threading.local()
_found = 0


@attrs.frozen
class Fd:
    """
    A descriptor on its way: as an argument a copy goes; in a result it moves.
    """

    number: int

    def __reduce__(self) -> NoReturn:
        raise TypeError("only actors pass descriptors")


_arriving: list[int] = []


def _arrived(index: int) -> int:
    return _arriving[index]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.descriptors: list[int] = []

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Fd:
            return NotImplemented
        self.descriptors.append(value.number)
        return _arrived, (len(self.descriptors) - 1,)


def _send(sock: socket.socket, value: Any) -> list[int]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    ancillary = []
    if pickler.descriptors:
        numbers = array.array("i", pickler.descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
    sock.sendmsg([file.getvalue()], ancillary)
    return pickler.descriptors


def _receive(sock: socket.socket) -> Any:
    """Return what was sent, or raise EOFError."""
    data, ancillary, flags, _ = sock.recvmsg(_SIZE, socket.CMSG_SPACE(4 * 250), socket.MSG_CMSG_CLOEXEC)
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC), "a message of an actor was cut"
    numbers = array.array("i")
    for _, kind, value in ancillary:
        if kind == socket.SCM_RIGHTS:
            numbers.frombytes(value)
    if not data:
        raise EOFError
    _arriving[:] = numbers
    _exempt.now = True
    try:
        return pickle.loads(data)
    finally:
        _exempt.now = False


class Actor:
    """
    A forked child that runs what it is told, until ``close``.

    Attributes:
        pid: its process id, as seen from the test; taken until ``close``.
        pidfd: readable once it has ended.
    """

    def __init__(self, uid: int | None = None, gid: int | None = None, groups: Sequence[int] = ()) -> None:
        for name in _child._BEFORE_BECOMING:  # once here, and not in each actor
            importlib.import_module(name)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _stages.add(ours)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            for stage in _stages:
                stage.close()
            _act(theirs, uid, gid, tuple(groups))
        theirs.close()
        self.pidfd = os.pidfd_open(self.pid)
        self._stage = ours
        self._waits = False
        self.closed = False
        self._take(time.monotonic() + TIMEOUT)

    def __repr__(self) -> str:
        return f"<Actor {self.pid}>"

    def __call__(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Have it run a function; return, or raise, what comes of it."""
        return self.begin(function, *args, **options)()

    def begin(self, function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
        """Have it begin to run a function; calling what is returned waits for the end."""
        assert not self._waits, f"{self} is still busy"
        _send(self._stage, (function, args, options))
        self._waits = True
        return self._end

    def _end(self, timeout: float = TIMEOUT) -> Any:
        ok, value, told = self._take(time.monotonic() + timeout)
        self._waits = False
        if ok:
            return value
        trace, cause = told
        value.add_note(f"in {self}:\n{trace}")
        raise value from cause

    @property
    def acting(self) -> bool:
        """Whether what was begun has not ended yet."""
        return self._waits and not _readable([self._stage.fileno()], 0)

    def _take(self, deadline: float) -> Any:
        if not _readable([self._stage.fileno()], deadline - time.monotonic()):
            raise ChildFailed(f"{self} did not answer in time")
        try:
            return _receive(self._stage)
        except (EOFError, ConnectionError):
            raise ChildFailed(f"{self} has ended") from None

    def stop(self) -> None:
        """Stop it, and return when it has stopped."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)
        os.waitid(os.P_PIDFD, self.pidfd, os.WSTOPPED | os.WNOWAIT)

    def cont(self) -> None:
        """Let it go on."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it, and return when it is dead; it stays a zombie."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        """Kill it and clean up; idempotent."""
        if self.closed:
            return
        self.closed = True
        _stages.discard(self._stage)
        self._stage.close()
        if MEASURED:
            _readable([self.pidfd], LAST_WORDS)
        self.kill()
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)


def _readable(fds: Sequence[int], patience: float) -> bool:
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, patience) * 1000))


# -- in the actor -----------------------------------------------------------------------------


class _Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        here.log.append(record.getMessage())


def _act(stage: socket.socket, uid: int | None, gid: int | None, groups: tuple[int, ...]) -> NoReturn:
    try:
        here.log = []
        logging.getLogger("doorpool").addHandler(_Log())
        sys.addaudithook(_on_audit)
        if uid is not None:
            _child.become(uid, gid, groups)
        _child._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _send(stage, (True, None, None))
        while True:
            _run(stage, *_receive(stage))
    except BaseException as error:
        if not isinstance(error, EOFError | ConnectionError):
            traceback.print_exc()
    finally:
        os._exit(0)


def _run(stage: socket.socket, function: Callable[..., Any], args: Any, options: Any) -> None:
    try:
        answer = (True, function(*args, **options), None)
    except BaseException as error:
        answer = (False, error, (traceback.format_exc(), error.__cause__))
    try:
        moved = _send(stage, answer)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        what = answer[1] if answer[0] else answer[2]
        moved = _send(stage, (False, ChildFailed(f"cannot tell: {error}: {what!r}"), ("", None)))
    for number in moved:
        os.close(number)


def _on_audit(event: str, _args: Any) -> None:
    global _found
    if event == "pickle.find_class" and not getattr(_exempt, "now", False):
        _found += 1


def counts() -> dict[str, int]:
    """
    What this process has unpickled: classes looked up by any unpickler, runs of the library's one.
    """
    marshal = sys.modules.get("doorpool._marshal")
    return {"find_class": _found, "unpickled": 0 if marshal is None else int(marshal.unpickled)}


def descriptors() -> int:
    """
    How many descriptors this process has open.
    """
    return len(os.listdir("/proc/self/fd"))


def logged() -> list[str]:
    """
    What the library has logged in this process so far.
    """
    keeper = sys.modules["doorpool._keeper"].keeper()
    wait_until(lambda: not keeper._lines, "all lines are written")
    return list(here.log)


def keep(number: int) -> int:
    """
    Take a descriptor that was passed, and tell its number here.
    """
    return number


def give(number: int) -> Fd:
    """
    Hand a copy of a descriptor out.
    """
    return Fd(os.dup(number))
