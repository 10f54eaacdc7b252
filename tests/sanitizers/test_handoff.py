"""
The hand-off of the shuttle in C without Python, under ThreadSanitizer and AddressSanitizer, briefly.
"""

from __future__ import annotations

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
}


@pytest.mark.ids("D07", "D05")
@pytest.mark.parametrize("sanitizer", FLAGS)
def test_two_threads_hand_calls_to_one_another(sanitizer, tmp_path, many):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    program = tmp_path / "handoff"
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror", "-Wno-unused-function"]
    command = [compiler, "-std=gnu17", "-O1", "-g", *warnings, *FLAGS[sanitizer], "-pthread"]
    built = subprocess.run(
        [*command, HERE / "handoff.c", "-o", program], capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr:
        pytest.skip(f"no {sanitizer} sanitizer here")
    assert (built.returncode, built.stderr) == (0, "")
    calls = many(20_000, 10_000_000 if sanitizer == "none" else 5_000_000)
    # Where addresses are laid out at random, ThreadSanitizer may not find room for its shadow.
    run = ["setarch", platform.machine(), "-R", program, str(calls)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=many(600, 1800), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{(calls // 16 + 1) * 16} calls, and ")
