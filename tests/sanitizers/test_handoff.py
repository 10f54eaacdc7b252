"""
The shuttle in C without Python: the hand-off, under ThreadSanitizer and AddressSanitizer, briefly; and by
which rules it waits, by a clock of the test's own.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent

FLAGS = {
    "thread": ["-fsanitize=thread", "-Wno-tsan"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "none": ["-O2"],
    "dawdling": ["-O2", "-DDAWDLE"],
}


def built(name: str, sanitizer: str, folder: Path) -> Path:
    """Compile a program of this folder; skip where there is no compiler, or not the sanitizer."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = folder / name
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unused-function"]
    command = [compiler, "-std=gnu17", "-O1", "-g", *warnings, *FLAGS[sanitizer], "-pthread"]
    done = subprocess.run(
        [*command, HERE / f"{name}.c", "-o", program], capture_output=True, text=True, check=False
    )
    if "cannot find" in done.stderr:
        pytest.skip(f"no {sanitizer} sanitizer here")
    assert (done.returncode, done.stderr) == (0, "")
    return program


@pytest.mark.ids("D07", "D05")
@pytest.mark.parametrize("sanitizer", ["thread", "address", "none"])
def test_two_threads_hand_calls_to_one_another(sanitizer, tmp_path, many):
    program = built("handoff", sanitizer, tmp_path)
    calls = many(20_000, 10_000_000 if sanitizer == "none" else 5_000_000)
    # Where addresses are laid out at random, ThreadSanitizer may not find room for its shadow.
    run = ["setarch", platform.machine(), "-R", program, str(calls)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=many(600, 1800), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{(calls // 16 + 1) * 16} calls, and ")


@pytest.mark.ids("D07")
@pytest.mark.parametrize("cpus", ["one CPU", "all CPUs"])
def test_nobody_sleeps_on_whoever_dawdles_at_whatever_step(cpus, tmp_path, many):
    """What is lost is lost for good here: nobody looks up for twenty seconds, and then the program fails."""
    program = built("handoff", "dawdling", tmp_path)
    calls = many(10_000, 2_000_000)
    allowed = sorted(os.sched_getaffinity(0))
    where = ",".join(map(str, allowed[:1] if cpus == "one CPU" else allowed))
    run = ["taskset", "-c", where, program, str(calls)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=many(50, 7000), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{(calls // 16 + 1) * 16} calls, and ")


@pytest.mark.ids("D08")
def test_it_looks_yields_and_gives_up_by_the_rules(tmp_path):
    """Each look and each yield is counted: see waiting.c."""
    program = built("waiting", "none", tmp_path)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "it waits by the rules\n", "")
