"""
The machine: its CPUs, who is pinned to which, and what a process holds of its memory.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence

import attrs

_PR_SET_PDEATHSIG = 1


@attrs.frozen
class Placement:
    """
    Where the two sides of a call run.
    """

    key: str
    title: str
    client: frozenset[int]
    server: frozenset[int]


def placements(cpus: Sequence[int]) -> list[Placement]:
    """
    Return the placements these CPUs allow; with a single one there is no "two".

    The first CPU is the client's, or both sides'; the second the server's.
    """
    first, *others = cpus
    every = frozenset({first, *others})
    found = [
        Placement("one", "1 CPU", frozenset({first}), frozenset({first})),
        Placement("free", "free", every, every),
    ]
    if others:
        found.insert(0, Placement("two", "2 CPUs", frozenset({first}), frozenset({others[0]})))
    return found


def settle(cpus: Iterable[int], environment: Mapping[str, str] = {}) -> None:
    """
    Begin a measured process: pin it, and have it end with the process that has started it.

    Threads inherit what they are pinned to, so this comes before the first of them.
    """
    os.sched_setaffinity(0, cpus)
    os.environ.update(environment)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def held_by(pid: int) -> tuple[int, int]:
    """Return the memory of a process in bytes: its share of all its pages, and those it has alone."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        sizes = dict(line.split(":", 1) for line in file if ":" in line and line.rstrip().endswith("kB"))
    kilobytes = {name: int(size.split()[0]) for name, size in sizes.items()}
    alone = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return kilobytes["Pss"] * 1024, alone * 1024


def description() -> dict[str, object]:
    """Return what a reader of the numbers has to know of where they were taken."""
    return {
        "processor": _processor(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "compiler": platform.python_compiler(),
        "load": os.getloadavg()[0],
        "free_threading": not getattr(sys, "_is_gil_enabled", lambda: True)(),
    }


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.machine()
