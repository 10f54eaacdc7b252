"""
Memory returns to its base: two processes, random sizes both ways, some kept for a while at both ends.

docs/performance.md states the margin; ``pytest --long -s`` prints the figures.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

import doorpool
from doorpool import _shelf

pytest.importorskip("numpy")

MIB = 1 << 20
MARGIN = 4 * MIB  # of each side
IDLE = 0.2  # seconds, in place of five
PATIENCE = 30.0  # seconds


def pss() -> int:
    """
    Bytes of this process's heap and segments, of what is shared its part.

    Without the files it has mapped: that is code, and changes with how many others have mapped it, too.
    """
    sizes = dict(re.findall(r"^(\w+): +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M))
    return (int(sizes["Pss_Anon"]) + int(sizes["Pss_Shmem"])) << 10


class Side:
    """What either side does: makes arrays, keeps some of those that come, and says what it has."""

    def __init__(self, seed: int, most: int) -> None:
        import numpy

        _shelf.IDLE = IDLE
        self.random = numpy.random.default_rng(seed)
        self.most = most
        self.data = numpy.arange(most, dtype="u1")
        self.kept: list[Any] = []
        self.peak = 0

    def make(self) -> Any:
        """Return an array of a random size, every third in memory that crosses without a copy."""
        size = int(self.most ** self.random.uniform(0.6, 1.0))
        if self.random.random() < 0.67:
            return self.data[:size]
        array = doorpool.empty(size, "u1")
        array[:] = self.data[:size]
        return array

    def look(self, array: Any) -> None:
        """See that what came is what was sent, and keep it, or something else."""
        for part in (slice(None, 4096), slice(-4096, None)):
            assert (array[part] == self.data[: array.size][part]).all()
        if self.random.random() < 0.5:
            self.kept.append(array)
        if len(self.kept) > 5:
            one = self.kept.pop(int(self.random.integers(0, 6)))
            self.look_again(one)

    def look_again(self, array: Any) -> None:
        """See that what was kept has not changed meanwhile."""
        assert array[0] == 0
        assert array[-1] == self.data[array.size - 1]

    def answer(self, array: Any) -> Any:
        """Be called: take one, return one."""
        self.look(array)
        self.peak = max(self.peak, pss())
        return self.make()

    def drop(self) -> int:
        """Let go of all; return the most that there was."""
        while self.kept:
            self.look_again(self.kept.pop())
        return self.peak

    def memory(self) -> tuple[int, int]:
        """How many segments there are, made and received, and ``pss``."""
        said = _shelf.totals()
        return said.held + said.received, pss()


def settled(mine: Side, theirs: Any, base: list[int], within: int) -> list[int]:
    """Wait until neither side has any segment, and no more memory than that; return what they have."""
    end = time.monotonic() + PATIENCE
    while True:
        states = [mine.memory(), theirs.memory()]
        has = [state[1] for state in states]
        enough = all(now - before <= within for now, before in zip(has, base, strict=True))
        if (enough and not any(state[0] for state in states)) or time.monotonic() > end:
            assert [state[0] for state in states] == [0, 0], "segments"
            return has
        time.sleep(IDLE / 10)


def serve(most: int) -> None:
    from support.child import ready

    with doorpool.Server() as server:
        server.attach(Side(2, most), "a.door")
        ready()
        server.run()


def call_many(path: str, most: int, calls: int) -> dict[str, list[int]]:
    side = Side(1, most)
    with doorpool.Proxy(path) as door:
        for _ in range(3):  # threads, arenas and whatever else is made once
            side.look(door.answer(side.make()))
        side.drop()
        door.drop()
        base = settled(side, door, [0, 0], 1 << 60)
        for _ in range(calls):
            side.answer(door.answer(side.make()))
        peak = [side.drop(), door.drop()]
        return {"base": base, "peak": peak, "after": settled(side, door, base, MARGIN)}


def test_memory_returns_to_its_base_at_both_ends(spawn_server, run_python, door_dir, many):
    calls, most = many(60, 1_000), many(4, 64) * MIB

    spawn_server(serve, most, cwd=door_dir)
    found = run_python(call_many, str(door_dir / "a.door"), most, calls, timeout=many(60, 1_800)).value
    for which, sizes in found.items():
        print(f"{which}:", *(f"{size / MIB:.1f} MiB" for size in sizes))
    for base, peak, after in zip(*found.values(), strict=True):
        assert peak - base > MARGIN  # or there was nothing to return
        assert after - base <= MARGIN
