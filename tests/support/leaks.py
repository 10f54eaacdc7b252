"""
What this process holds, so that a test can be shown to leave nothing behind.

Compared are descriptors (number and target: a number that now leads elsewhere means that a
stranger's descriptor was closed), threads, and child processes.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

#: Threads that may stay.  The keeper is one a process, for ever; the threads of the default
#: server are daemons and retire when they have been idle.
#: That of the streams is one a process, too, and goes when no batch is being made anywhere.
LASTING_THREADS = ("doorpool-keeper", "doorpool-default", "doorpool-streams", "pytest_timeout")

SETTLING_TIME = 1.0  # seconds; keeper and kernel need a moment after the last close()
BETWEEN_LOOKS = 0.02  # seconds: what is the same after so long is at rest

T = TypeVar("T")


class Holdings:
    """
    A snapshot of what the process holds.
    """

    def __init__(self) -> None:
        self.descriptors = _descriptors()
        self.threads = {thread for thread in threading.enumerate() if not _may_last(thread)}
        self.children = _children()

    def __sub__(self, before: Holdings) -> list[str]:
        """
        Say in words what is here and was not before, and what is no longer here and was.
        """
        gone = before.descriptors - self.descriptors
        come = self.descriptors - before.descriptors
        return [
            *(f"descriptor left open: {fd} -> {target}" for fd, target in sorted(come)),
            *(f"descriptor of somebody else closed: {fd} -> {target}" for fd, target in sorted(gone)),
            *(f"thread left running: {thread!r}" for thread in self.threads - before.threads),
            *(f"child left behind: {_describe(pid)}" for pid in sorted(self.children - before.children)),
        ]

    @classmethod
    def left_since(cls, before: Holdings, settling_time: float = SETTLING_TIME) -> list[str]:
        """
        Wait until all is back to what it was before, and say what is not.

        Garbage is collected only when something is left: a collection at each of a
        thousand tests would take longer than the tests.
        """
        deadline = time.monotonic() + settling_time
        left = cls() - before
        while left and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
            left = cls() - before
        return left


def at_rest(look: Callable[[], T], patience: float = 20.0) -> T:
    """
    Wait until two looks at something see the same, and return it.

    For what later looks are compared with: a descriptor that somebody is just closing is no base.
    """
    deadline = time.monotonic() + patience
    seen = None
    while (now := look()) != seen:
        assert time.monotonic() < deadline, ("this is never at rest", seen, now)
        seen = now
        gc.collect(0)
        time.sleep(BETWEEN_LOOKS)
    return now


def _descriptors() -> set[tuple[int, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((int(name), os.readlink(f"/proc/self/fd/{name}")))
        except OSError:  # the descriptor of the listing itself, or one closed meanwhile
            continue
    return found


def _may_last(thread: threading.Thread) -> bool:
    return thread.name.startswith(LASTING_THREADS)


def _children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update(map(int, (task / "children").read_text().split()))
        except OSError:  # the thread has ended, or the kernel keeps no such list
            continue
    return found


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return str(pid)
    return f"{pid} (state {state}) {command[:200]}"


def sockets_bound_under(folder: Path) -> list[str]:
    """
    Lines of /proc/net/unix whose address lies in a folder.
    """
    lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()
    return [line for line in lines if f"{folder}/" in line]
