"""
What the library logs, which stops none of its work.

Handlers and filters are the program's: a disk may be full, a connection gone, and one may end the
program (``sys.exit``).  Who logs here is in the middle of something: a caller waits for his answer, a name
is being taken away, a thread would end and be missed.  So nothing comes out of them but, in the
main thread, what a signal handler has raised, which means that thread and not the log.  What they raise is
told as ``logging.Handler.handleError`` does it.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import traceback

_logger = logging.getLogger("doorpool")


def log(
    level: int, text: str, *args: object, error: BaseException | None = None, stacklevel: int = 1
) -> None:  # fmt: skip
    """
    Log a line, whatever becomes of it.

    Args:
        level, text, args, stacklevel: as for ``Logger.log``.
        error: whose traceback to show.

    Raises:
        BaseException: what a signal handler has raised meanwhile.
    """
    if not _logger.isEnabledFor(level):
        return
    try:
        try:
            _logger.log(level, text, *args, exc_info=error, stacklevel=stacklevel + 1)
        except BaseException as failure:
            if means_main_thread(failure):
                raise
            _tell(failure, text, args)
    except BaseException as failure:  # of ``sys.stderr``, which is the program's, too
        if means_main_thread(failure):
            raise


def _tell(failure: BaseException, text: str, args: tuple[object, ...]) -> None:
    if not logging.raiseExceptions or sys.stderr is None:
        return
    trace = "".join(traceback.format_exception(failure))
    sys.stderr.write(f"--- Logging error ---\n{trace}Message: {text!r}\nArguments: {args!r}\n")


def means_main_thread(error: BaseException) -> bool:
    """Tell whether a signal handler of the program has raised this, here in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return False
    ctrl_c = isinstance(error, KeyboardInterrupt) and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    return ctrl_c or came_by_a_signal(error)


def came_by_a_signal(error: BaseException) -> bool:
    """Tell whether a signal handler raised this, which then says nothing about the values."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(handler, "__func__", handler), "__code__", None) for handler in handlers}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))
