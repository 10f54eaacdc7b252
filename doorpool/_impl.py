"""
Which of the two twins does the shuttle's work in this process, and why.

``_shuttle`` is written in C and optional: where it could not be built, or when
``DOORPOOL_IMPL=py`` is set, ``_shuttle_py`` stands in for it.  ``DOORPOOL_IMPL=c`` has the import
fail where it is missing.  The rest of the library asks here and does not care.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING

from doorpool import _shuttle_py

if TYPE_CHECKING:
    from doorpool import _shuttle as shuttle

__all__ = ["NAME", "VARIABLE", "WHY", "shuttle"]

#: What may be set; "" means: the compiled one if it is there.
VARIABLE = "DOORPOOL_IMPL"
_CHOICES = ("", "c", "py")


def _choose(choice: str) -> tuple[ModuleType, str, str]:
    """Return the module, its short name, and why it is this one."""
    if choice not in _CHOICES:
        raise ImportError(f"{VARIABLE} is 'c' or 'py', or not set; not {choice!r}")
    if choice == "py":
        return _shuttle_py, "py", f"{VARIABLE}=py"
    try:
        from doorpool import _shuttle
    except ImportError as error:
        if choice == "c":
            raise ImportError(f"{VARIABLE}=c, but the compiled shuttle cannot be had: {error}") from error
        return _shuttle_py, "py", f"the compiled shuttle cannot be had: {error}"
    return _shuttle, "c", f"{VARIABLE}=c" if choice else "compiled"


def _quota() -> int | None:
    """Return how many CPUs the control group of this process lets it use, rounded up; None: all."""
    try:
        with open("/proc/self/cgroup") as file:
            groups = [line.rstrip("\n").split(":", 2)[2] for line in file if line.startswith("0::")]
        with open(f"/sys/fs/cgroup{groups[0]}/cpu.max") as file:
            quota, period = file.read().split()
        return None if quota == "max" else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError, IndexError):
        return None  # no control groups, or the old ones


shuttle, NAME, WHY = _choose(os.environ.get(VARIABLE, ""))

if (_count := _quota()) is not None:
    shuttle.limit_cpus(_count)
