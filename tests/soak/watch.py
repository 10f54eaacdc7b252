"""
What is measured during a soak, and whether it stayed flat.

Memory, descriptors and threads are read from /proc, of the processes that stay: the steady server, and the
clients that are not killed.  That server says, too, how many pieces of memory its objects take, which tells a
leak from the allocator's arenas, that stay as large as they were once.  Times are those of a small call, and
of opening, calling and closing; beside them runs a reference, a byte there and back through a pair of sockets
between two processes that know nothing of the library, because a machine may become slower by what others do.

The first eighth of the time is for warming up.  Of the rest the last quarter is compared with the first.
"""

from __future__ import annotations

import collections
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import attrs

WARM_UP = 1 / 8

_STEP = math.log(1.05)  # of the buckets in which times are counted
_LEAST = 1e-6  # seconds

_MEGABYTE = 1024  # in kB, as /proc counts

#: How much more the last quarter may show than the first: a factor, and an amount for each process, or for
#: each client.  The allocator's arenas grow for a while, with the most that 64 threads have needed at once,
#: and how many proxies are open at a moment is chance.
BOUNDS = {
    "memory": (1.20, 16 * _MEGABYTE, 0),
    "segments": (1.50, 16 * _MEGABYTE, 0),
    "descriptors": (1.25, 20, 8),
    "threads": (1.25, 10, 1),
    "objects": (1.10, 20_000, 0),
}

#: Of times: a factor, and seconds for the percentiles; and how many it takes for these to mean something.
_SLOWER, _SLACK = 3.0, {"call": {50: 0.005, 99: 0.1}, "opening": {50: 0.1, 99: 1.0}}
_ENOUGH = {"call": 1000, "opening": 200}
_SAMPLES = 3


class Times:
    """How long something took, counted in buckets that are 5 % wide."""

    def __init__(self) -> None:
        self._buckets: collections.Counter[int] = collections.Counter()

    def add(self, seconds: float, count: int = 1) -> None:
        self._buckets[int(math.log(max(seconds, _LEAST) / _LEAST) / _STEP)] += count

    def __len__(self) -> int:
        return self._buckets.total()

    def percentile(self, percent: float) -> float:
        """Return the seconds within which so many of them lie; NaN if there are none."""
        left = len(self) * percent / 100
        for bucket in sorted(self._buckets):
            left -= self._buckets[bucket]
            if left <= 0:
                return _LEAST * math.exp((bucket + 1) * _STEP)
        return math.nan


@attrs.frozen
class Sample:
    """
    What a group of processes had at some moment.

    Attributes:
        memory: kB that are theirs alone, without segments.
        segments: kB in shared memory; what several share is divided among them.
        descriptors, threads: how many.
        objects: how many pieces of memory they take, as ``sys.getallocatedblocks`` counts; 0: not known.
    """

    memory: int
    segments: int
    descriptors: int
    threads: int
    objects: int = 0

    @classmethod
    def of(cls, pids: Iterable[int], objects: int = 0) -> Sample:
        found = [_look_at(pid) for pid in pids] or [(0, 0, 0, 0)]
        return cls(*(sum(column) for column in zip(*found, strict=True)), objects)


def _look_at(pid: int) -> tuple[int, int, int, int]:
    """Return the memory, segments, descriptors and threads of a process; nothing if it has just ended."""
    try:
        sizes = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        threads = len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0, 0, 0, 0
    return int(sizes["Pss_Anon"]), int(sizes["Pss_Shmem"]), descriptors, threads


def resident(pid: int) -> int:
    """Return what a process has in memory, in kB, with all that it shares."""
    found = re.search(r"^VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) if found else 0


class Watch:
    """
    What was measured, by quarters.

    Args:
        begin, end: when the soak begins and ends, as ``time.monotonic`` says.
        clients: how many there are.

    Attributes:
        times: of "call", "opening" and "reference", for each quarter.
    """

    def __init__(self, begin: float, end: float, clients: int) -> None:
        self._clients = clients
        self._begin = begin + (end - begin) * WARM_UP
        self._length = max(end - self._begin, 1e-3) / 4
        self._samples: dict[str, list[list[Sample]]] = collections.defaultdict(lambda: [[], [], [], []])
        self._sizes: dict[str, int] = {}
        self.times = {name: [Times() for _ in range(4)] for name in ("call", "opening", "reference")}

    def quarter(self, now: float) -> int | None:
        """Which quarter this is, from 0; None while it is warming up."""
        if now < self._begin:
            return None
        return min(3, int((now - self._begin) / self._length))

    def sample(self, group: str, pids: list[int], objects: int = 0) -> Sample:
        sample = Sample.of(pids, objects)
        quarter = self.quarter(time.monotonic())
        if quarter is not None:
            self._samples[group][quarter].append(sample)
            self._sizes[group] = len(pids)
        return sample

    def figures(self) -> dict[str, Any]:
        """Return what was measured in each quarter: NaN where nothing is known."""
        found: dict[str, Any] = {
            group: {
                name: [_median(_known(quarter, name)) for quarter in quarters]
                for name in BOUNDS
                if any(_known(quarter, name) for quarter in quarters)
            }
            for group, quarters in self._samples.items()
        }
        for name, quarters in self.times.items():
            found[f"{name}, ms"] = {
                f"p{percent}": [_milliseconds(times.percentile(percent)) for times in quarters]
                for percent in (50, 99)
            }
        return found

    def judge(self, complain: Callable[[str], None]) -> None:
        """Say what has grown, of all that is known of both quarters."""
        for group, quarters in self._samples.items():
            for name, (factor, a_process, a_client) in BOUNDS.items():
                was, now = _known(quarters[0], name), _known(quarters[3], name)
                if min(len(was), len(now)) < _SAMPLES:
                    continue
                first, last = _median(was), _median(now)
                most = first * factor + a_process * self._sizes[group] + a_client * self._clients
                if not last <= most:
                    complain(f"{name} of the {group}: {first} in the first quarter, {last} in the last")
        for what, slacks in _SLACK.items():
            for percent, slack in slacks.items():
                self._judge_times(what, percent, slack, complain)

    def _judge_times(self, what: str, percent: int, slack: float, complain: Callable[[str], None]) -> None:
        first, *_, last = self.times[what]
        if min(len(first), len(last)) < _ENOUGH[what]:
            return
        before, *_, after = (times.percentile(percent) for times in self.times["reference"])
        was, now = first.percentile(percent), last.percentile(percent)
        if not now <= was * _SLOWER * max(1.0, after / before) + slack:
            complain(
                f"{what}, {percent}th percentile: {was * 1e3:.2f} ms in the first quarter, {now * 1e3:.2f} "
                f"in the last; of the reference, {before * 1e3:.2f} and {after * 1e3:.2f}"
            )


def _known(samples: list[Sample], name: str) -> list[int]:
    """Return what samples say of something, without those that do not know it."""
    found = [getattr(it, name) for it in samples]
    return [count for count in found if count] if name == "objects" else found


def _median(counts: list[int]) -> float:
    return statistics.median(counts) if counts else math.nan


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
