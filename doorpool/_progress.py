"""
Progress: a procedure says how far it is, and whoever has asked for it is told.

    caller      ``proxy.options(progress=show)`` sends a door to ``show`` along with each call, as a
                keyword that no parameter can have; a call without one is as it was
    server      takes that out before the procedure sees its arguments, and keeps it with the call
    procedure   ``track(items)`` finds it there, or nothing: then it is ``iter(items)``

A report is a call of that door, made in the procedure's own thread, so they come in order.  They are bounded
instead of queued: none is made sooner than ``_PAUSE`` after the last, nor sooner than nine times
what the last one has taken, and each has ``_PATIENCE``.  So a listener who dawdles costs
the procedure a tenth of its time at most, and sees fewer.  One who is dead, or raises,
is told nothing more; the procedure never hears of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from doorpool._call import LISTENER, current
from doorpool._endpoint import Endpoint
from doorpool._errors import CallTimeoutError
from doorpool._log import came_by_a_signal

__all__ = ["Listener", "track"]

#: What is told: how many are done, of how many (None: nobody knows), and the text.
Listener = Callable[[int, int | None, str], object]

_T = TypeVar("_T")

#: Seconds: between two reports; for which one may take; for which the last one may.
_PAUSE = 0.05
_PATIENCE = 0.25
_PATIENCE_AT_LAST = 1.0

#: How many times as long as a report has taken nothing is reported afterwards.
_REST = 9


def track(items: Iterable[_T], text: str = "", total: int | None = None) -> Iterator[_T]:
    """
    Go through items, and report how many are done to whoever calls with ``options(progress=...)``.

        for picture in doorpool.track(pictures, "resizing"):
            resize(picture)

    The first report (0 done) is made before the first item, the last one when the loop ends or is left
    (by an exception: if anybody still listens then); in between there are some 20 a second at most.
    Outside a procedure, and for a caller who has not asked, it is ``iter(items)``.

    Args:
        items: what to go through.
        text: what the caller is told that this is.
        total: how many there are; by default ``len(items)``, if it has one.
    """
    invocation = current.get(None)
    listener = getattr(invocation, "listener", None)
    if listener is None:
        return iter(items)
    if total is None:
        total = _length_of(items)
    return _tracked(items, _Reporter(listener, text, total))


def _length_of(items: Any) -> int | None:
    """Return how many items there are, if they say so; what else they do is not the procedure's problem."""
    try:
        return len(items)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or came_by_a_signal(error):
            raise
        return None  # there is no length, or it is not known yet, or too large for ``len``


def _tracked(items: Iterable[_T], reporter: _Reporter) -> Iterator[_T]:
    done = 0
    reporter.report(done)
    try:
        for item in items:
            yield item
            done += 1
            if time.monotonic() >= reporter.due:
                reporter.report(done)
    finally:
        if reporter.said != done:
            reporter.report(done, _PATIENCE_AT_LAST)


class _Reporter:
    """Who is told, and when he may be told next."""

    def __init__(self, listener: Any, text: str, total: int | None) -> None:
        self._listener = listener
        self._text = text
        self._total = total
        self.said = -1
        self.due = 0.0

    def report(self, done: int, patience: float = _PATIENCE) -> None:
        """Make a report, whatever becomes of it."""
        begun = time.monotonic()
        try:
            if self._listener is not None:
                self._listener.options(timeout=patience)(done, self._total, self._text)
        except CallTimeoutError:  # he may be quicker the next time
            pass
        except Exception:  # dead, or it is his callback's
            self._listener = None
        self.said = done
        now = time.monotonic()
        self.due = float("inf") if self._listener is None else now + max(_PAUSE, _REST * (now - begun))


class ReportingLine:
    """
    A ``Line`` of a proxy whose calls take a door for reports along; all else is the line's own.

    Args:
        line: the line.
        progress: is called with what is done, the total or None, and the text; in a thread
            of the default server.
    """

    def __init__(self, line: Any, progress: Listener) -> None:
        self.line = line
        self.progress = progress

    def __getattr__(self, name: str) -> Any:
        return getattr(self.line, name)

    def __repr__(self) -> str:
        return repr(self.line)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Any:
        """Make one call."""
        return self._listening(lambda more: self.line.call(args, more, deadline), kwargs)

    def act(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Any:
        """Make one call whose arguments are whole, as those of a method."""
        return self._listening(lambda more: self.line.act(args, more, deadline), kwargs)

    def _listening(self, call: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]) -> Any:
        endpoint = Endpoint(self._told, name="progress", codec=self.line.info.codec)
        try:
            return call({**kwargs, LISTENER: endpoint})
        except BaseException:
            endpoint.close()  # it may never have been handed out
            raise
        # Otherwise it ends when nobody over there has it any more: a stream may, for its items.

    def _told(self, done: int, total: int | None, text: str) -> None:
        self.progress(done, total, text)
