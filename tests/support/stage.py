"""
A stage on which processes die at a step: a client, a server, and what is said between them and the test.

All players are forked from one parent (``breed``) in which the library is imported under its
switch (support.steps) and nothing of it has been made, so a player costs a few milliseconds.
Each has a control socket to the test.  What it is asked, its main thread does and answers; what
happens in its other threads it says of its own accord:

    at          a thread waits at a step, until it is told to ``go``
    dying       the process is about to be killed, with the time and the pid of its company
    outcome     how the call ended, and when
    canary      how the call ended that was under way elsewhere meanwhile
    cancelled   whether the procedure was told that nobody waits for it, and when

Times are those of ``time.monotonic()``, which is one clock for all processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from support import steps
from support.leaks import Holdings, at_rest
from support.measuring import LAST_WORDS, MEASURED
from support.processes import Child, start_python, wait_until

PATIENCE = 20.0  # seconds until something that certainly happens is taken for a hang
PROMPTLY = 1.0  # seconds in which a survivor has noticed, and has given everything back

ALONE, FORKED, SUBPROCESS = "alone", "with a forked child", "with a subprocess"

_COMPANY_LASTS = 60  # seconds; it is killed long before, with the test at the latest


# -- the test's side


class Player:
    """
    A process on the stage, seen from the test.

    Attributes:
        pid: its process id.
        pidfd: readable once it has ended.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._control = control
        patience = struct.pack("@ll", int(PATIENCE), 0)
        control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        self._heard: deque[tuple[Any, ...]] = deque()

    def ask(self, command: str, *args: Any) -> Any:
        """Have it do something, and return what it answers."""
        self._control.send(pickle.dumps((command, args, True)))
        return self.hear("answer")[0]

    def tell(self, command: str, *args: Any) -> None:
        """Have it do something that it does not answer."""
        self._control.send(pickle.dumps((command, args, False)))

    def hear(self, kind: str) -> tuple[Any, ...]:
        """Return the next message of a kind; the others are kept."""
        for message in self._heard:
            if message[0] == kind:
                self._heard.remove(message)
                return message[1:]
        while True:
            try:
                words = self._control.recv(1 << 16)
            except BlockingIOError:
                raise AssertionError(f"not heard of {kind!r}, but of {list(self._heard)}") from None
            if not words:
                raise AssertionError(f"it ended without {kind!r}; heard were {list(self._heard)}")
            message = pickle.loads(words)
            if message[0] == kind:
                return tuple(message[1:])
            assert message[0] != "failed", message[1]
            self._heard.append(message)

    def last_breath(self) -> float:
        """Wait until the control socket hangs up: what a raw socket sees of a death."""
        while words := self._control.recv(1 << 16):
            self._heard.append(pickle.loads(words))
        return time.monotonic()

    def wait_ended(self) -> float:
        wait_ended(self.pidfd)
        return time.monotonic()

    def kill(self) -> None:
        """Kill it, from outside, and wait until it has ended."""
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait_ended()

    def has_ended(self, patience: float) -> bool:
        """Whether it has, or does within so many seconds."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(patience * 1000))

    def close(self) -> None:
        """End it, if it has not ended."""
        if MEASURED:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
            _wait_a_little(self.pidfd)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        os.close(self.pidfd)
        self._control.close()


def _wait_a_little(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(LAST_WORDS * 1000)


def wait_ended(pidfd: int) -> None:
    """Wait for the end of a process that was killed."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(PATIENCE * 1000), "it was killed and lives on"


class Stage:
    """The parent of all players.  Threads may start players at the same time."""

    def __init__(self, *modules: str) -> None:
        """
        Args:
            modules: what the parent imports besides the library; of one of ``support``, each class is a role.
        """
        self._lock = threading.Lock()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._parent = ours
        script = f"from support import stage; stage.breed({theirs.fileno()}, ready, {modules!r})"
        with theirs:
            self.process: Child = start_python(script, pass_fds=[theirs.fileno()])
        self.process.wait_ready()

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parent.close()
        self.process.close()

    def start(self, role: str, *args: Any) -> Player:
        """Fork a player; ``args`` are its role's."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, self._lock:
            socket.send_fds(self._parent, [pickle.dumps((role, args))], [theirs.fileno()])
            pid = int(self._parent.recv(100))
        return Player(pid, ours)

    def reap(self, player: Player) -> None:
        """Let a player that has ended be no zombie any more; the others are reaped by and by."""
        with self._lock:
            self._parent.send(pickle.dumps(("reap", player.pid)))
            self._parent.recv(100)


# -- the parent of the players


def breed(number: int, ready: Callable[[], None], modules: tuple[str, ...] = ()) -> NoReturn:
    """Fork a player for each request that comes; the parent's whole life."""
    steps.install()
    import doorpool
    import doorpool.door  # noqa: F401

    for name in modules:
        module = importlib.import_module(name)
        if name.startswith("support."):
            _ROLES.update({role: kind for role, kind in vars(module).items() if isinstance(kind, type)})
    parent = socket.socket(fileno=number)
    parent.set_inheritable(False)
    gc.collect()
    gc.freeze()  # what all share shall stay shared
    ready()
    while True:
        words, descriptors, _, _ = socket.recv_fds(parent, 1 << 16, 1)
        if not words:
            os._exit(0)
        request, args = pickle.loads(words)
        if request == "reap":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(args, 0)
            parent.send(b"0")
            continue
        _reap_some()
        pid = os.fork()
        if pid == 0:
            parent.close()
            _play(request, args, descriptors[0])
        os.close(descriptors[0])
        parent.send(b"%d" % pid)


def _reap_some() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG) is not None:
            continue


def _play(role: str, args: tuple[Any, ...], number: int) -> NoReturn:
    os.set_inheritable(number, False)
    try:
        _ROLES[role](socket.socket(fileno=number), *args).run()
    except ConnectionError:
        os._exit(0)  # the test is over
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


# -- the players' side


class _Part:
    """What the roles have in common."""

    def __init__(self, control: socket.socket, journal: str) -> None:
        self.control = control
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.going = threading.Event()
        self.before: dict[str, tuple[set[tuple[int, str]], int, int]] = {}

    def run(self) -> None:
        """Do what the test asks, until it hangs up."""
        while words := self.control.recv(1 << 16):
            command, args, to_be_answered = pickle.loads(words)
            try:
                value = getattr(self, f"do_{command}")(*args)
            except Exception as error:
                self.say("failed", f"{command}{args}: {error!r}")
            else:
                if to_be_answered:
                    self.say("answer", value)

    def say(self, kind: str, *values: Any) -> None:
        self.control.send(pickle.dumps((kind, *values)))

    # -- steps and death

    def do_at(self, name: str, nth: int, company: str | None) -> None:
        """Wait at a step; or, if a company is named, die there at once."""
        self.going.clear()
        if company is None:
            steps.at(name, lambda: self.pause(name), nth)
        else:
            steps.at(name, lambda: self.do_die(company), nth)

    def pause(self, name: str) -> None:
        self.say("at", name, time.monotonic())
        self.going.wait(PATIENCE)

    def do_go(self) -> float:
        """Let what waits at a step go on."""
        now = time.monotonic()
        self.going.set()
        return now

    def do_die(self, company: str) -> NoReturn:
        """Be killed, leaving somebody who holds all our descriptors, or who was only started by us."""
        pid = 0
        if company == FORKED:
            pid = self.fork_in_c()
        elif company == SUBPROCESS:
            self.program = subprocess.Popen(["sleep", str(_COMPANY_LASTS)], close_fds=False)
            pid = self.program.pid
        self.say("dying", time.monotonic(), pid)
        steps.die()

    def fork_in_c(self) -> int:
        """
        Fork past Python's hooks; the child just sleeps.

        It may do so at once, before its alarm is set: it has the GIL, which somebody who is not
        there may have asked for.
        """
        libc = ctypes.PyDLL(None)
        pid: int = libc.fork()
        if pid == 0:
            libc.alarm(_COMPANY_LASTS)
            while True:
                libc.pause()
        return pid

    # -- what is held

    def holdings(self) -> tuple[set[tuple[int, str]], int, int]:
        """Descriptors, threads and channels."""
        return Holdings().descriptors, threading.active_count(), self.channels()

    def channels(self) -> int:
        return 0

    def do_remember(self, when: str) -> None:
        """Take down what is held, once that is at rest; let every step be passed again."""
        from doorpool import _guests

        wait_until(lambda: not _guests.guests()._guests, "all knocks are closed")
        steps.forget()
        self.before[when] = at_rest(self.holdings)

    def do_settle(self, when: str, come: int, gone: int, patience: float) -> tuple[list[str], float]:
        """
        Wait until as much is held as then; say what differs all the same, and when this was.

        Args:
            when: as remembered.
            come, gone: so many descriptors may be new, or be there no more.
            patience: seconds.
        """
        deadline = time.monotonic() + patience
        while left := self.differences(self.before[when], come, gone):
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
            gc.collect(0)
        return left, time.monotonic()

    def differences(
        self, before: tuple[set[tuple[int, str]], int, int], come: int, gone: int
    ) -> list[str]:  # fmt: skip
        descriptors, threads, channels = self.holdings()
        new, lost = sorted(descriptors - before[0]), sorted(before[0] - descriptors)
        found = []
        if len(new) > come:
            found += [f"descriptor {number} -> {target}" for number, target in new]
        if len(lost) > gone:
            found += [f"descriptor of somebody else closed: {number} -> {target}" for number, target in lost]
        if threads > before[1]:
            found.append(f"{threads} threads, and {before[1]} before: {threading.enumerate()}")
        if channels != before[2]:
            found.append(f"{channels} channels, and {before[2]} before")
        return found


class _ServerPart(_Part):
    """A server; each row of the table has a door of its own there."""

    def __init__(self, control: socket.socket, journal: str, spin: float | None = None) -> None:
        super().__init__(control, journal)
        from doorpool import Server

        # Threads that a row has needed are gone well within the second in which all comes back.
        self.server = Server(idle_timeout=0.05, spin=spin).start()
        self.endpoints: dict[str, Any] = {}
        self.letting_go = threading.Event()

    def channels(self) -> int:
        return self.server.statistics().channels

    def do_wait_no_channels(self, patience: float) -> int:
        """Wait until no channel is left; return how many there are all the same."""
        deadline = time.monotonic() + patience
        while (left := self.channels()) and time.monotonic() < deadline:
            time.sleep(0.001)
        return left

    def do_open(self, path: str) -> None:
        self.endpoints[path] = self.server.attach(self.procedure, path)

    def do_open_canary(self, path: str) -> None:
        self.server.attach(self.hold, path)

    def do_finish(self) -> None:
        self.server.close()

    def do_revoke(self, path: str) -> None:
        threading.Thread(target=self.endpoints[path].revoke).start()

    def do_shut(self, path: str) -> None:
        self.endpoints.pop(path).close()

    def procedure(self, number: int, size: int, _data: bytes) -> tuple[int, bytes]:
        """Take down that it ran, and return what can be known again."""
        os.write(self.journal, b"%d\n" % number)
        steps.arrive(steps.IN_PROCEDURE)
        return number, bytearray(size)

    def do_watch(self) -> None:
        """Wait in the procedure, and say when it is told that its caller is gone."""
        self.going.clear()
        steps.at(steps.IN_PROCEDURE, self.watch)

    def watch(self) -> None:
        from doorpool import current_call

        call = current_call()
        self.say("at", steps.IN_PROCEDURE, time.monotonic())
        while not call.cancelled and not self.going.wait(0.001):
            continue
        self.say("cancelled", call.cancelled, time.monotonic())
        self.going.wait(PATIENCE)

    def hold(self, number: int) -> int:
        """Keep the canary's call until it is let go."""
        self.say("held", number)
        assert self.letting_go.wait(PATIENCE)
        self.letting_go.clear()
        return number

    def do_let_go(self) -> None:
        self.letting_go.set()


class _ClientPart(_Part):
    """A client: one call of the row's door, and one of the canary's that is under way meanwhile."""

    canary: Any = None
    warm: Any = None

    def do_warm_up(self, path: str, number: int, spin: float | None) -> bool:
        """Open a proxy that ``call_again`` uses, and call; return whether its channel has a page."""
        from doorpool import Proxy

        self.warm = Proxy(path, reopen=False, spin=spin)
        self.warm(number, 0, b"")
        return self.warm._line.handle._idle[0].page is not None

    def do_call_again(self, number: int, timeout: float | None) -> None:
        threading.Thread(target=self.call_again, args=(number, timeout)).start()

    def call_again(self, number: int, timeout: float | None) -> None:
        call = self.warm if timeout is None else self.warm.options(timeout=timeout)
        try:
            right = call(number, 3, b"") == (number, bytearray(3))
            outcome = ("result" if right else "another's result", None, "")
        except Exception as error:
            outcome = (type(error).__name__, getattr(error, "may_have_run", None), str(error))
        self.say("outcome", number, *outcome, time.monotonic())

    def do_cool_down(self) -> None:
        self.warm.close()

    def do_open_canary(self, path: str) -> None:
        from doorpool import Proxy

        self.canary = Proxy(path)

    def do_finish(self) -> None:
        self.canary.close()

    def do_sing(self, number: int) -> None:
        threading.Thread(target=self.sing, args=(number,), name="canary").start()

    def sing(self, number: int) -> None:
        try:
            self.say("canary", self.canary(number) == number, "")
        except Exception as error:
            self.say("canary", False, repr(error))

    def do_call(self, path: str, number: int, request: int, reply: int, timeout: float | None) -> None:
        thread = threading.Thread(target=self.call, args=(path, number, request, reply, timeout))
        thread.start()

    def call(self, path: str, number: int, request: int, reply: int, timeout: float | None) -> None:
        from doorpool import Proxy

        try:
            with Proxy(path, reopen=False, timeout=timeout) as proxy:
                right = proxy(number, reply, bytearray(request)) == (number, bytearray(reply))
            outcome = ("result" if right else "another's result", None, "")
        except Exception as error:
            outcome = (type(error).__name__, getattr(error, "may_have_run", None), str(error))
        self.say("outcome", number, *outcome, time.monotonic())


_ROLES: dict[str, Any] = {"server": _ServerPart, "client": _ClientPart}
