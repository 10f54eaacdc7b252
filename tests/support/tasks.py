"""
What the threads of another process do, as the kernel sees it.
"""

from __future__ import annotations

import contextlib
import os


def _each(pid: int, name: str) -> list[str]:
    """What stands in a file of each thread; one that ends meanwhile has none."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            with open(f"/proc/{pid}/task/{task}/{name}") as file:
                found.append(file.read())
    return found


def is_asleep(pid: int) -> bool:
    """Tell whether no thread of a process runs, or would if there were a CPU."""
    return all(text.rpartition(")")[2].split()[0] == "S" for text in _each(pid, "stat"))


def cpu_time(pid: int) -> float:
    """Seconds that the threads of a process have had, by the scheduler's own account."""
    return sum(int(text.split()[0]) for text in _each(pid, "schedstat")) / 1e9
