"""
No wake-up is lost, whoever stops and whenever: calls through the page, all on one CPU.

A client and a server share a CPU, so that each of them is taken off it wherever it stands, and a third stops
(``SIGSTOP``) and continues them, one or both, at random moments for random times.  Both look up now and then
in everyday life, which would hide that nobody has rung; here they do not, so that whoever misses a bell
sleeps on until the test's patience ends.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.processes import Child

from doorpool import _impl

pytestmark = pytest.mark.skipif(_impl.NAME != "c", reason="without pages nobody parks")

SERVER = """
    import os, sys
    from doorpool import Server

    os.sched_setaffinity(0, {int(sys.argv[1])})
    with Server(max_threads=2, idle_timeout=None, spin=eval(sys.argv[2])) as server:
        server.attach(lambda number: number, "a.door")
        ready()
        server.run()
"""

CALLER = """
    import os, sys, time
    from doorpool import Proxy, _handle

    os.sched_setaffinity(0, {int(sys.argv[1])})
    _handle._LOOK_UP = 10**15  # nanoseconds
    with Proxy("a.door", spin=eval(sys.argv[2])) as door:
        door(0)
        (channel,) = door._line.handle._idle
        assert channel.page is not None
        ready()
        slow, number, last = [], 0, time.monotonic()
        until = last + float(sys.argv[3])
        while last < until:
            number += 1
            assert door(number) == number
            before, last = last, time.monotonic()
            if last - before > 0.05:
                slow.append((before, last))
        assert list(door._line.handle._idle) == [channel]
    result((number, slow))
"""

Times = list[tuple[float, float]]


@pytest.mark.ids("D07")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("spin", [None, 0.0], ids=["looks first", "parks at once"])
def test_no_call_outlasts_the_stops_that_hit_it(
    spawn_server: Callable[..., Child], door_dir: Path, many: Callable[..., Any], spin: float | None
) -> None:
    """Nor does one hang: the rest of each is well below a second, of which others on this CPU have most."""
    cpu, seconds = min(os.sched_getaffinity(0)), many(4.0, 3600.0)
    server = spawn_server(SERVER, cpu, spin, cwd=door_dir)
    caller = spawn_server(CALLER, cpu, spin, seconds, cwd=door_dir)
    stops = _stop_at_random([server, caller], seconds, seed=random.randrange(10**9))
    finished = caller.finish(30.0)
    assert finished.returncode == 0, finished.stderr
    calls, slow = finished.value
    rests = [ended - began - _within(stops, began, ended) for began, ended in slow]
    print(f"{calls} calls, {len(stops)} stops; the longest took {max(rests, default=0.0):.3f} s without them")
    assert calls > len(stops) > 50
    assert max(rests, default=0.0) < 1.0


def _stop_at_random(processes: list[Child], seconds: float, seed: int) -> Times:
    """Stop and continue them for so long, unless one ends; return from when to when any was stopped."""
    dice, stops = random.Random(seed), []
    print(f"seed {seed}")
    until = time.monotonic() + seconds
    while time.monotonic() < until and not any(process.ended for process in processes):
        time.sleep(dice.expovariate(1 / 0.002))
        chosen = dice.sample(processes, dice.choice((1, 1, 2)))
        began = time.monotonic()
        for process in chosen:
            process.signal(signal.SIGSTOP)
        time.sleep(dice.expovariate(1 / 0.001))
        for process in dice.sample(chosen, len(chosen)):
            process.cont()
        stops.append((began, time.monotonic()))
    return stops


def _within(stops: Times, began: float, ended: float) -> float:
    return sum(max(0.0, min(end, ended) - max(begin, began)) for begin, end in stops)
