"""
The processes of a soak: forked children, none of which outlives its parent.

The interpreter, NumPy and the library are there already when a child begins, so that starting one takes a few
milliseconds.  The kernel kills a child whose parent is gone; the parent kills all that it has on its way out.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from support.child import become

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_libc = ctypes.CDLL(None, use_errno=True)

#: Those of this process that have not been waited for.
_running: dict[int, Forked] = {}


class Ended(Exception):
    """A child has ended, or not ended, otherwise than it should; says which and how."""


class Forked:
    """
    A forked child, which runs ``body(ready, orders)`` and ends.

    Args:
        name: what messages call it.
        body: given something to call when it is ready, and a descriptor from which orders come.
        uid: become this user first (root only).

    Attributes:
        pid: its process id; its own until it has been waited for.
        pidfd: readable once it has ended.
    """

    def __init__(
        self, name: str, body: Callable[[Callable[[], object], int], None], *, uid: int | None = None
    ) -> None:
        self.name = name
        self._ready, ready = os.pipe()
        orders, self._orders = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._ready)
            os.close(self._orders)
            _be(parent, body, uid, ready, orders)
        os.close(ready)
        os.close(orders)
        self.pidfd = os.pidfd_open(self.pid)
        _running[self.pid] = self

    @property
    def ended(self) -> bool:
        """Whether it has ended; it may still have to be waited for."""
        return self.pid not in _running or bool(_readable(self.pidfd, 0))

    def wait_ready(self, seconds: float) -> None:
        """Wait until it is ready; idempotent."""
        if self._ready < 0:
            return
        if not _readable(self._ready, seconds) or not os.read(self._ready, 1):
            raise Ended(f"{self.name} is not ready after {seconds} s, or has ended before")
        os.close(self._ready)
        self._ready = -1

    def order(self, what: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # ``wait`` says how it has ended
            os.write(self._orders, what)

    def kill(self) -> None:
        """Kill it, and only it."""
        os.kill(self.pid, signal.SIGKILL)
        self._bury()

    def wait(self, seconds: float) -> None:
        """
        Wait until it has ended by itself.

        Raises:
            Ended: it has failed, or has not ended; then it has shown its stacks, and was killed.
        """
        if not _readable(self.pidfd, seconds):
            os.kill(self.pid, signal.SIGUSR1)
            _readable(self.pidfd, 1.0)
            self.kill()
            raise Ended(f"{self.name} has not ended within {seconds:.0f} s; its stacks are above")
        if code := self._bury():
            raise Ended(f"{self.name} has ended with {code}")

    def _bury(self) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        del _running[self.pid]
        for number in (self._ready, self._orders, self.pidfd):
            if number >= 0:
                os.close(number)
        self._ready = -1
        return code


def kill_all() -> None:
    """Kill all children that this process still has."""
    for child in list(_running.values()):
        child.kill()


def _be(
    parent: int, body: Callable[[Callable[[], object], int], None], uid: int | None, ready: int, orders: int
) -> NoReturn:
    code = 1
    try:
        _running.clear()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who ends us
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        if uid is not None:
            become(uid)
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # cleared by a change of user
        if os.getppid() == parent:
            body(lambda: os.write(ready, b"."), orders)
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        kill_all()
        sys.stderr.flush()
        os._exit(code)


def _readable(number: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(number, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


# -- what must not happen in any of them


class Complaints:
    """What the processes of a soak find wrong, in words; one line each, from any process and thread."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._offset = 0

    def __call__(self, text: str) -> None:
        os.write(self._file, " | ".join(text.split("\n")).encode(errors="replace")[:4000] + b"\n")

    def read(self) -> list[str]:
        """Return what has come since the last time."""
        block = b""
        while more := os.pread(self._file, 1 << 16, self._offset + len(block)):
            block += more
        lines = block[: block.rfind(b"\n") + 1]
        self._offset += len(lines)
        return lines.decode(errors="replace").splitlines()

    def close(self) -> None:
        os.close(self._file)


def complain_of_everything(complain: Callable[[str], None]) -> None:
    """Complain of threads that die, errors in destructors, what is left open, and errors that are logged."""

    def on_thread(args: threading.ExceptHookArgs) -> None:
        complain(f"a thread has died: {_told(args.exc_value)}")

    def on_unraisable(args: Any) -> None:
        complain(f"an error nobody could catch, in {args.object!r}: {_told(args.exc_value)}")

    def on_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
        complain(f"{category.__name__}: {message}")

    class OfErrors(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            complain(f"logged: {self.format(record)}")

    log = logging.getLogger("doorpool")
    log.propagate = False  # callers who are killed are worth a warning, and here there are many
    log.addHandler(OfErrors(logging.ERROR))
    threading.excepthook = on_thread
    sys.unraisablehook = on_unraisable
    warnings.showwarning = on_warning
    warnings.simplefilter("always", ResourceWarning)


def _told(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)).strip() if error is not None else "?"


def told(error: BaseException) -> str:
    """Tell of an error, its traceback and its causes, on a few lines."""
    return _told(error)
