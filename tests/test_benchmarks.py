"""
The benchmarks: that they run, in their shortest form.  What they show is for people to read.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_null_call():
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.null_call", "--rounds", "2", "--calls", "20"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    for way in ("doorpool", "manager", "Pipe", "raw socket"):
        assert f"\n{way} " in finished.stdout
    for placement in ("one CPU for both", "free"):
        assert f"\n{placement}\n" in finished.stdout
    assert "\nHow to read them." in finished.stdout
