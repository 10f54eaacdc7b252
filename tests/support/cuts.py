"""
Cutting something short at each of its steps in turn, as a signal handler that raises would.

A step is a call of a function written in Python, or the return of one written in C: there the interpreter
looks whether a signal has come.  Finalizers are left out, out of which nothing comes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

_STEPS = ("call", "c_return")
_FINALIZERS = ("__del__", "_remove")  # the second is weakref.WeakSet's


class Cut(BaseException):
    """What the handler raises."""


def each_step() -> Iterator[Cutting]:
    """
    Give a block for the first step, one for the second, and so on; the last is not cut.

    Each is to do the same, and nothing that Cut is raised in may catch it.
    """
    for number in itertools.count(1):
        steps: list[str] = []
        yield Cutting(number, steps)
        if len(steps) < number:
            return


class Cutting:
    """
    A block that is cut at one of its steps.

    Attributes:
        error: what cut it, with all that its traceback keeps alive; None if nothing did.
    """

    def __init__(self, number: int, steps: list[str]) -> None:
        self._number, self._steps = number, steps
        self.error: BaseException | None = None

    def __enter__(self) -> None:
        sys.setprofile(self._look)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        sys.setprofile(None)
        self.error = error
        return isinstance(error, Cut)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in _STEPS or frame.f_globals is globals() or _is_finalizer(frame):
            return
        self._steps.append(frame.f_code.co_name)
        if len(self._steps) == self._number:
            sys.setprofile(None)
            raise Cut(f"at step {self._number}, in {frame.f_code.co_name}, line {frame.f_lineno}")


def _is_finalizer(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name not in _FINALIZERS:
        frame = frame.f_back
    return frame is not None
