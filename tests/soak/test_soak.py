"""
The soak for a few seconds with a few clients; and faults that it has to find.

The real ones take two minutes, or an hour: ``python -m tests.soak``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support import wait_until
from support.processes import ROOT

pytest.importorskip("numpy")

from soak.watch import Sample, Watch

SEED = 11


@pytest.fixture
def soak():
    """Start soaks: in a session of their own each, and with folders that are gone at the end."""
    folder = tempfile.mkdtemp(prefix="dp-")
    os.chmod(folder, 0o1777)  # for the other user's files, too
    started = []

    def start(*arguments):
        command = [sys.executable, "-m", "tests.soak", "--seed", SEED, "--pause", 0.02, *arguments]
        process = subprocess.Popen(
            [str(it) for it in command], cwd=ROOT, env=os.environ | {"TMPDIR": folder}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
        wait_until(lambda process=process: not session_of(process.pid), timeout=10.0)
    shutil.rmtree(folder)


def session_of(leader: int) -> list[int]:
    """The processes of a session that run, by pid."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(session) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def end(process: subprocess.Popen[str]) -> tuple[str, dict[str, Any]]:
    """Return what it printed, and the summary at the end of that; nothing of it may be left."""
    printed = process.communicate(timeout=50)[0]
    assert session_of(process.pid) == [], printed
    return printed, json.loads(printed[printed.index("\n{") :])


def test_a_few_hundred_calls_of_it_hold(soak):
    process = soak("--minutes", 0.5, "--calls", 300, "--clients", 10)
    printed, summary = end(process)
    assert process.returncode == 0, printed
    assert summary["held"] is True
    assert summary["seed"] == SEED
    assert summary["told"]["a result"] > 100
    assert len(summary["calls by operation"]) > 10


def test_faults_that_were_planted_are_found(soak):
    plants = "lost", "doubled", "descriptors", "threads"
    process = soak("--minutes", 0.5, "--calls", 200, "--clients", 10, "--plant", *plants)
    printed, summary = end(process)
    wrong = "\n".join(summary["wrong"])
    assert (process.returncode, summary["held"]) == (1, False), printed
    assert re.search(r"client \d+ \(\w+\): '[^']+', call \d+ .* ran(, time 2| once more)", wrong), printed
    assert re.search(r"client \d+ .* was answered, and did not run: it is lost", wrong), printed
    assert "the server has left behind: descriptor left open" in wrong, printed
    assert "the server has left behind: thread left running" in wrong, printed


@pytest.fixture
def watch():
    """What was watched of a soak of 400 seconds, from 0, with ten clients: nothing has changed."""
    watch = Watch(-400.0, 400.0, 10)
    for quarter in range(4):
        watch._samples["server"][quarter] = [Sample(30_000, 1_000, 100, 20, 100_000)] * 5
        watch._sizes["server"] = 1
        for name, seconds in (("call", 0.001), ("opening", 0.01), ("reference", 0.0001)):
            watch.times[name][quarter].add(seconds, 1000)
    return watch


def judged(watch):
    wrong = []
    watch.judge(wrong.append)
    return wrong


def test_what_stays_as_it_was_is_flat(watch):
    assert judged(watch) == []


@pytest.mark.parametrize(
    ("grown", "what"),
    [
        (Sample(60_000, 1_000, 100, 20), "memory"),
        (Sample(30_000, 30_000, 100, 20), "segments"),
        (Sample(30_000, 1_000, 300, 20), "descriptors"),
        (Sample(30_000, 1_000, 100, 50), "threads"),
        (Sample(30_000, 1_000, 100, 20, 150_000), "objects"),
    ],
)
def test_what_has_grown_is_found(watch, grown, what):
    watch._samples["server"][3] = [grown] * 5
    (wrong,) = judged(watch)
    assert wrong.startswith(f"{what} of the server: ")


UNCOUNTED = Sample(30_000, 1_000, 100, 20)


@pytest.mark.parametrize("quarter", [0, 3])
def test_objects_that_were_not_counted_all_the_time_are_those_that_were(watch, quarter):
    watch._samples["server"][quarter][:0] = [UNCOUNTED] * 20
    assert judged(watch) == []
    assert watch.figures()["server"]["objects"] == [100_000] * 4
    watch._samples["server"][3][-5:] = [Sample(30_000, 1_000, 100, 20, 150_000)] * 5
    (wrong,) = judged(watch)
    assert wrong == "objects of the server: 100000 in the first quarter, 150000 in the last"


@pytest.mark.parametrize("quarter", [0, 3])
@pytest.mark.parametrize("counted", [0, 1])
def test_objects_that_were_hardly_counted_are_not_judged(watch, quarter, counted):
    watch._samples["server"][quarter] = [
        Sample(30_000, 1_000, 100, 20, 1 if quarter == 0 else 10**9)
    ] * counted
    watch._samples["server"][quarter] += [UNCOUNTED] * 10
    assert judged(watch) == []
    assert math.isnan(watch.figures()["server"]["objects"][quarter]) == (not counted)
    watch._samples["server"][3] = [Sample(60_000, 1_000, 100, 20)] * 10
    (wrong,) = judged(watch)
    assert wrong.startswith("memory of the server: "), "and all else is judged as ever"


def test_of_whom_no_objects_are_counted_none_are_told(watch):
    watch._samples["clients"] = [[UNCOUNTED] * 5 for _ in range(4)]
    watch._sizes["clients"] = 1
    assert judged(watch) == []
    assert watch.figures()["clients"] == {
        "memory": [30_000] * 4, "segments": [1_000] * 4, "descriptors": [100] * 4, "threads": [20] * 4,
    }  # fmt: skip


@pytest.mark.parametrize(("what", "seconds"), [("call", 0.2), ("opening", 2.0)])
def test_what_has_become_slower_is_found(watch, what, seconds):
    watch.times[what][3].add(seconds, 50)
    (wrong,) = judged(watch)
    assert wrong.startswith(f"{what}, 99th percentile: ")


def test_a_machine_that_has_become_slower_is_excused(watch):
    for name in ("call", "reference"):
        watch.times[name][3].add(0.05, 2000)
    assert judged(watch) == []


def test_no_process_of_it_outlives_it(soak):
    process = soak("--minutes", 1, "--clients", 10)
    assert "--seed" in process.stdout.readline()
    wait_until(lambda: len(session_of(process.pid)) > 6, timeout=20.0)
    process.kill()
    wait_until(lambda: not session_of(process.pid), timeout=10.0)


def test_one_that_is_interrupted_says_so_and_ends_in_order(soak):
    process = soak("--minutes", 1, "--clients", 4)
    assert "--seed" in process.stdout.readline()
    wait_until(lambda: len(session_of(process.pid)) > 6, timeout=20.0)
    process.send_signal(signal.SIGTERM)
    printed, summary = end(process)
    assert summary["wrong"] == ["interrupted"], printed
    assert process.returncode == 1
