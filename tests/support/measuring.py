"""
What the tests do differently while coverage.py counts (tests/README.md has the command).

It follows threads of ``threading``, but none that ``_thread`` starts; and a process writes down what it ran
when it ends, which one that is killed never does.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

MEASURED = bool(os.environ.get("COVERAGE_PROCESS_CONFIG"))

LAST_WORDS = 5.0  #: Seconds that a process has, while we measure, to end by itself before it is killed.

_start = _thread.start_new_thread


def _start_followed(function: Callable[..., object], args: tuple[Any, ...], *kwargs: dict[str, Any]) -> int:
    return _start(_run, (function, args, *kwargs))


def _run(function: Callable[..., object], args: tuple[Any, ...], *kwargs: dict[str, Any]) -> None:
    sys.settrace(threading.gettrace())
    function(*args, **dict(*kwargs))


def follow_bare_threads() -> None:
    """
    Have coverage.py follow the threads that are started by ``_thread``, too, from now on.
    """
    if MEASURED:
        _thread.start_new_thread = _start_followed  # type: ignore[assignment]
