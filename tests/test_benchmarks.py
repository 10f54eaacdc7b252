"""
The benchmarks: that they run, in their shortest form.  What they show is for people to read.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from benchmarks import __main__, _peers
from benchmarks._machine import Placement
from benchmarks._run import Effort, measure
from benchmarks._workloads import WORKLOADS, Bar, p99

ROOT = Path(__file__).resolve().parents[1]

WAYS = (
    "doorpool",
    "raw Unix socket",
    "multiprocessing.connection",
    "BaseManager",
    "ProcessPoolExecutor",
)

ROWS = (
    "null call add(1, 2), p50",
    "null call add(1, 2), p99",
    "the Python twin, null call, p50",
    "sparse null call (one each 2 ms), p50",
    "1 KiB dict argument, p50",
    "echo of 1 MiB bytes, payload both ways",
    "1 MB float64 argument, returns its sum",
    "1 MB array returned",
    "4 client processes at once",
    "new client: open, first call, close",
    "64 threads, procedure sleeps 0.1 s",
    "server memory per 100 idle clients, PSS",
    "server memory per 100 idle clients, USS",
    "an item of a million numbers",
    "an item of a million lines",
)

BARS = (
    "manager >= 12x",
    "iceoryx2 busy-poll >= 3x",
    "manager >= 2.2x",
    "<= 0.8x raw",
    "<= 0.35x the manager's",
    "<= 1.15x raw",
    "<= 0.4x raw",
    ">= 5 GB/s",
    ">= 2.5x zmq",
    "<= 1.15x the floor",
    "from doorpool.empty <= 1.15x the sum alone",
    "<= 1.2x the floor",
    "from doorpool.empty <= 1 ms",
    ">= 3x the manager",
    "<= 0.8x multiprocessing.connection",
    "<= 0.13 s",
    "<= 3 MB",
    "no slower than sockets: <= 0.95x manager",
    "as a stream >= 15x a call each",
)


def benchmarks(*words, folder):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *words, "--out", folder / "out"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )


def values(report, title):
    row = next(row for row in report["rows"] if row["title"] == title)
    return {(it["peer"], it["placement"]): it["value"] for it in row["peers"]}


def is_a_value(value, row):
    """Times and rates are above zero; memory that was measured may have shrunk."""
    return value > 0 or row["workload"] == "memory"


def placements():
    return ["two", "one", "free"] if len(os.sched_getaffinity(0)) > 1 else ["one", "free"]


def test_a_quick_run_has_every_row_and_bar_and_leaves_only_its_report(door_dir):
    finished = benchmarks("--quick", folder=Path(door_dir))
    assert (finished.returncode, finished.stderr) == (0, "")
    report = json.loads((Path(door_dir) / "out" / "results.json").read_text())
    assert tuple(row["title"] for row in report["rows"]) == ROWS
    for words in (*ROWS, *WAYS, *(f"bar: {bar}" for bar in BARS)):
        assert f"{words} " in finished.stdout
    for row in report["rows"]:
        numbers = [it for it in row["peers"] if not it["note"]]
        assert numbers
        assert all(it["samples"] > 0 and is_a_value(it["value"], row) for it in numbers)
    assert not [name for name in os.listdir(door_dir) if name != "out"]


def test_the_null_call_is_measured_in_every_placement(door_dir):
    words = ("null", "--quick", "--peers", "raw,manager", "--placements", ",".join(placements()))
    finished = benchmarks(*words, folder=Path(door_dir))
    assert (finished.returncode, finished.stderr) == (0, "")
    report = json.loads((Path(door_dir) / "out" / "results.json").read_text())
    found = values(report, "null call add(1, 2), p50")
    for peer in ("doorpool", "doorpool-py", "raw", "manager", "floor-pickle"):
        assert all(found[peer, placement] > 0 for placement in placements())


def test_a_peer_that_is_not_installed_is_said_to_be_so():
    absent = attrs.evolve(_peers.RAW, key="absent", needs="no_such_module")
    (result,) = measured(absent)
    assert (result.note, result.failed, result.rounds) == ("not installed", False, [])


def test_a_peer_left_out_of_a_workload_is_given_the_reason():
    idle = attrs.evolve(_peers.RAW, skips={"null": "it has no numbers"})
    (result,) = measured(idle)
    assert (result.note, result.failed) == ("left out: it has no numbers", False)


def test_a_peer_that_fails_takes_no_other_with_it():
    broken, sound = measured(attrs.evolve(_peers.RAW, key="broken", connect=refuse), _peers.RAW)
    assert broken.failed
    assert "ZeroDivisionError: on purpose" in broken.note
    assert not sound.note
    assert [len(samples) for samples in sound.rounds] == [20, 20]


def test_a_bar_is_the_median_of_the_ratios_of_the_rounds():
    bar = Bar("", "two", "ours", "theirs", at_most=0.8)
    rounds = {"ours": [1.0, 2.0, 90.0], "theirs": [2.0, 2.0, 100.0]}
    assert bar.measured(rounds) == 0.9
    assert bar.measured({"ours": [1.0]}) is None


def test_a_bar_is_judged_unrounded():
    assert Bar("", "two", "ours", "theirs", at_most=0.8).met(0.8)
    assert not Bar("", "two", "ours", "theirs", at_most=0.8).met(0.8004)
    assert not Bar("", "two", "theirs", "ours", at_least=12).met(11.9999)


def test_a_99th_percentile_has_one_in_a_hundred_above_it():
    assert p99(range(1000)) == 990
    assert p99([5.0]) == 5.0


def test_unknown_names_are_refused_with_those_there_are():
    with pytest.raises(SystemExit, match="unknown: carrier-pigeon; there are doorpool,raw,"):
        __main__.main(["--quick", "--peers", "carrier-pigeon"])


def refuse(service):
    raise ZeroDivisionError("on purpose")


def measured(*peers):
    """Return the results of peers at a short null call, in the process of the test."""
    everywhere = frozenset(os.sched_getaffinity(0))
    placement = Placement("free", "free", everywhere, everywhere)
    effort = Effort(array_length=1, rounds=2, share=0.04)
    return measure(WORKLOADS[0], placement, peers, effort)
