"""
Processes of the tests: real ones, each of which certainly ends.

A child says when it is ready, and what its result is, over a pipe; nobody waits by sleeping.
It leads a session of its own and stays a zombie until ``close()``, so the whole
group can be killed without any risk of meeting a stranger's pid.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import attrs

from support import child as _child

ROOT = Path(__file__).resolve().parents[2]

READY_TIMEOUT = 20.0  # seconds; an interpreter with NumPy and cloudpickle on a busy single CPU
RUN_TIMEOUT = 40.0  # seconds; below the 60 that a test may take, so that this one tells what happened

_HEADER = (
    "from support.child import ready, result, become, count_unpickling, unpickling_counts, fork_in_c, "
    "enter_pid_namespace, enter_user_namespace\n"
)

_CALL_FUNCTION = """
import pickle
with open({path!r}, "rb") as file:
    function, args = pickle.load(file)
result(function(*args))
"""


class ChildFailed(Exception):
    """A child ended, or said nothing, when something was expected of it."""


@attrs.frozen
class Finished:
    """
    A child that has ended: its code (negative: the signal), what it printed, its result.
    """

    returncode: int
    stdout: str
    stderr: str
    value: Any = None


class Child:
    """
    A Python process of its own, started by start_python().

    Attributes:
        pid: its process id, which stays taken until close().
        pidfd: readable once it has ended.
        ready: what it gave to ``ready()``.
        folder: where its script is; its standard output and error go there too.
    """

    def __init__(self, popen: subprocess.Popen[bytes], report: int, folder: Path) -> None:
        self.pid = popen.pid
        self.pidfd = os.pidfd_open(popen.pid)
        self.ready: Any = None
        self.folder = folder
        self._popen = popen
        self._report = report
        self._received = b""
        self._results: list[Any] = []
        self.closed = False

    def __repr__(self) -> str:
        return f"<Child {self.pid} {'closed' if self.closed else 'ended' if self.ended else 'running'}>"

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What it has written to standard error so far."""
        return (self.folder / "stderr").read_text(errors="replace")

    @property
    def ended(self) -> bool:
        return bool(_readable([self.pidfd], 0))

    def wait_ready(self, timeout: float = READY_TIMEOUT) -> Any:
        """
        Wait until the child calls ``ready(value)``, and return the value.

        Raises:
            ChildFailed: it ended first, or the time is over.
        """
        deadline = time.monotonic() + timeout
        while (message := self._next_message(deadline)) is not None:
            if message[0] == "ready":
                self.ready = message[1]
                return self.ready
            self._results.append(message[1])
        raise self.failure("ended before it was ready" if self.ended else f"was not ready within {timeout} s")

    def wait(self, timeout: float = RUN_TIMEOUT) -> int:
        """
        Wait until the child has ended, and return its code; negative: the signal.
        """
        deadline = time.monotonic() + timeout
        while (message := self._next_message(deadline)) is not None:
            if message[0] == "result":
                self._results.append(message[1])
        if not self.ended:
            raise self.failure(f"still runs after {timeout} s")
        status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status

    def finish(self, timeout: float = RUN_TIMEOUT) -> Finished:
        """
        Wait until the child has ended, and return all there is to know of it.
        """
        code = self.wait(timeout)
        return Finished(code, self.stdout, self.stderr, self._results[-1] if self._results else None)

    def signal(self, number: int) -> None:
        signal.pidfd_send_signal(self.pidfd, number)

    def signal_until_ended(self, number: int, timeout: float = 10.0) -> None:
        """Tell it again and again: one signal may come just before the last is dealt with."""

        def told() -> bool:
            if not self.ended:
                self.signal(number)
            return self.ended

        wait_until(told, timeout=timeout)

    def stop(self) -> None:
        """Stop it (SIGSTOP), and return when the kernel says that it has stopped."""
        self.signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def cont(self) -> None:
        self.signal(signal.SIGCONT)

    def terminate(self, timeout: float = 10.0) -> int:
        """Ask it to end (SIGTERM), and return its code."""
        if not self.ended:
            self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> int:
        """Kill it, and only it (SIGKILL), and return its code."""
        if not self.ended:
            self.signal(signal.SIGKILL)
        return self.wait()

    def close(self) -> None:
        """
        Kill it with all that it has started, and clean up.  Idempotent.
        """
        if self.closed:
            return
        self.closed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()
        os.close(self.pidfd)
        os.close(self._report)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _next_message(self, deadline: float) -> tuple[str, Any] | None:
        """Return the next report, or None when the child has ended or the time is over."""
        while (message := self._parse()) is None:
            if self._report not in _readable(
                [self._report, self.pidfd], deadline - time.monotonic()
            ):  # ended with nothing left to say, or too late
                return None
            if not (block := os.read(self._report, 1 << 16)):
                # It has closed the pipe: it is about to end, or has ended.
                _readable([self.pidfd], deadline - time.monotonic())
                return None
            self._received += block
        return message

    def _parse(self) -> tuple[str, Any] | None:
        size = int.from_bytes(self._received[:8], "little")
        if len(self._received) < 8 + size or len(self._received) < 8:
            return None
        body, self._received = self._received[8 : 8 + size], self._received[8 + size :]
        message: tuple[str, Any] = pickle.loads(body)
        return message

    def failure(self, what: str) -> ChildFailed:
        """Make an error of what it did, with all that it has printed."""
        return ChildFailed(f"child {self.pid} {what}\n-- stdout\n{self.stdout}\n-- stderr\n{self.stderr}")


def start_python(
    code: str | Callable[..., Any],
    *args: Any,
    uid: int | None = None,
    gid: int | None = None,
    groups: Sequence[int] = (),
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    options: Sequence[str] = (),
) -> Child:
    """
    Start a Python process that runs a script, or a function with arguments.

    A script finds ``ready``, ``result``, ``become``, ``count_unpickling`` and ``unpickling_counts``
    (``support.child``) among its names, and ``args``, as strings, in ``sys.argv[1:]``; it
    is a file of its own and runs as ``__main__``.  A function travels by value; what it
    returns is the result.

    Args:
        code: the script, indented as you like, or the function.
        args: what it is given.
        uid: become this user first (root only), with ``gid`` (by default the same
            number) and ``groups``.
        cwd: the working directory.
        env: variables to add.
        pass_fds: descriptors that it inherits, under the same numbers.
        options: for the interpreter.
    """
    folder = Path(tempfile.mkdtemp(prefix="dp-child-"))
    folder.chmod(0o755)
    header = _HEADER
    if uid is not None:
        header += f"become({uid}, {gid if gid is None else int(gid)}, {tuple(groups)!r})\n"
    if callable(code):
        (folder / "call").write_bytes(_by_value((code, args)))
        code, args = _CALL_FUNCTION.format(path=str(folder / "call")), ()
    script = folder / "script.py"
    script.write_text(header + textwrap.dedent(code))
    report, report_child = os.pipe()
    try:
        with open(folder / "stdout", "wb") as stdout, open(folder / "stderr", "wb") as stderr:
            popen = subprocess.Popen(
                [sys.executable, "-W", "default::ResourceWarning", *options, script, *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=cwd,
                env=_environment(report_child) | dict(env or {}),
                pass_fds=[report_child, *pass_fds],
                start_new_session=True,
            )
    except BaseException:
        os.close(report)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(report_child)
    return Child(popen, report, folder)


def run_python(
    code: str | Callable[..., Any],
    *args: Any,
    check: bool = True,
    timeout: float = RUN_TIMEOUT,
    **options: Any,
) -> Finished:
    """
    Run a script or a function in a Python process of its own, to its end.

    Takes what start_python() takes.

    Raises:
        ChildFailed: it did not end in time or, with ``check``, its code was not 0.
    """
    with start_python(code, *args, **options) as child:
        finished = child.finish(timeout)
        if check and finished.returncode != 0:
            raise child.failure(f"ended with {finished.returncode}")
        return finished


def _environment(report: int) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {
        _child.REPORT_FD: str(report),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }


def bare_environment() -> dict[str, str]:
    """
    What a process needs that starts with nothing of our environment: the sanitizers, if we run under them.
    """
    names = ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")
    return {name: os.environ[name] for name in names if name in os.environ}


def _by_value(call: tuple[Callable[..., Any], tuple[Any, ...]]) -> bytes:
    """Pickle a call with all that its module defines: the child cannot import test modules."""
    import cloudpickle

    module = sys.modules.get(getattr(call[0], "__module__", None) or "")
    mine = module is not None and Path(getattr(module, "__file__", None) or "/").is_relative_to(
        ROOT / "tests"
    )
    if not mine or (module is not None and module.__name__.startswith("support")):
        return bytes(cloudpickle.dumps(call))
    cloudpickle.register_pickle_by_value(module)
    try:
        return bytes(cloudpickle.dumps(call))
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def run_as_uid(
    uid: int | None,
    function: Callable[..., Any],
    *args: Any,
    gid: int | None = None,
    groups: Sequence[int] = (),
    timeout: float = RUN_TIMEOUT,
) -> Any:
    """
    Run a function in a forked child under another user, and return what it returns.

    The child inherits all: objects, descriptors, and what the library must make of them.
    An exception is raised here, with the child's traceback as a note.

    Args:
        uid: the user; None for the present one.
        function: what to run, with ``args``.
        gid: the group; by default the number of the user.
        groups: supplementary groups.
        timeout: the child is killed after so many seconds.

    Raises:
        ChildFailed: it ended without an answer, or the time is over.
    """
    deadline = time.monotonic() + timeout
    report, report_child = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        os.close(report)
        _forked_child(report_child, uid, gid, tuple(groups), function, args)
    os.close(report_child)
    pidfd = os.pidfd_open(pid)
    try:
        answer = _read_answer(report, pidfd, deadline)
        # An answer, or the end of the pipe, is the last thing before its os._exit.
        late = not _readable([pidfd], 0 if answer is None and time.monotonic() > deadline else 1.0)
    finally:
        os.close(report)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.close(pidfd)
        status = os.waitpid(pid, 0)[1]
    if answer is None:
        why = "the time was over" if late else f"it ended with {os.waitstatus_to_exitcode(status)}"
        raise ChildFailed(f"no answer from the child {pid} as uid {uid}: {why}")
    value, error, trace = pickle.loads(answer)
    if error is not None:
        error.add_note(f"in the child, as uid {uid}:\n{trace}")
        raise error
    return value


def _forked_child(
    report: int,
    uid: int | None,
    gid: int | None,
    groups: tuple[int, ...],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> NoReturn:
    answer: tuple[Any, BaseException | None, str] = (None, ChildFailed("could not answer"), "")
    try:
        if uid is not None:
            _child.become(uid, gid, groups)
        answer = (function(*args), None, "")
    except BaseException as error:
        answer = (None, error, traceback.format_exc())
    try:
        try:
            body = _child.dumps(answer)
        except Exception as error:
            body = _child.dumps((None, ChildFailed(f"{answer[:2]!r} cannot be pickled: {error}"), answer[2]))
        body = len(body).to_bytes(8, "little") + body
        while body:
            body = body[os.write(report, body) :]
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _read_answer(report: int, pidfd: int, deadline: float) -> bytes | None:
    received = b""
    while len(received) < 8 or len(received) < 8 + int.from_bytes(received[:8], "little"):
        if report not in _readable([report, pidfd], deadline - time.monotonic()):
            return None
        if not (block := os.read(report, 1 << 16)):
            return None
        received += block
    return received[8:]


def _readable(fds: Sequence[int], patience: float) -> set[int]:
    """Wait for descriptors of any number (``select`` ends at 1023) to have something to say."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(max(0.0, patience) * 1000)}


def wait_until(condition: Callable[[], Any], what: str = "", timeout: float = 5.0) -> Any:
    """
    Wait for what gives no event of its own: ask until the answer is true, and return it.

    Raises:
        AssertionError: it was not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or condition}"
        time.sleep(0.002)
    return answer
