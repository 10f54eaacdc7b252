"""
A server that is ended and started again and again, and callers who do not mind.

The supervisor forks its servers: the interpreter and the library are there already, so that a restart
takes a few milliseconds.  It never has a server of its own.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from doorpool import DoorError, Proxy, Server
from support.journal import DID_NOT_RUN, MAY_HAVE_RUN, RESULT, Board, Journal

BALLAST = bytes(400_000)

#: Places on the board: whether it is over; how many orderly closings have begun, and have ended.
_OVER, _BEGUN, _ENDED = 0, 1, 2

_LIFE = 0.03  # seconds for which a server is left alone, at most
_BREATH = 0.001  # seconds for which a caller leaves the processor to the server that is to come

_GRACEFULLY, _AT_ONCE = b"g", b"a"


# -- the supervisor and its servers


def supervise(folder: str, endings: tuple[str, ...], restarts: int, ready: Callable[[], None]) -> None:
    """
    Keep a server at ``note.door``, end it at random moments in one of these ways, and start the next.

    kill        as ``kill -9`` does; now and then before it has begun to serve
    close       in an orderly way; then comes the next one
    cut         likewise, without waiting for running calls
    take over   the next one takes its name first, and then it is closed

    When there have been so many restarts the callers are told, and the last server stays until SIGTERM.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    board = Board(f"{folder}/board")
    server = Forked(folder)
    server.wait_ready()
    ready()
    for _ in range(restarts):
        server = _next(server, random.choice(endings), folder, board)
    server.wait_ready()
    board[_OVER] = 1
    signal.sigwait({signal.SIGTERM})
    server.close(_GRACEFULLY)


def _next(server: Forked, ending: str, folder: str, board: Board) -> Forked:
    """End a server at some moment; return the one that follows."""
    if ending == "kill" and random.random() < 0.1:
        time.sleep(random.uniform(0, 0.005))
        server.kill()
        return Forked(folder)
    server.wait_ready()
    time.sleep(random.uniform(0, _LIFE))
    if ending == "kill":
        server.kill()
        return Forked(folder)
    follower = Forked(folder, replace=True) if ending == "take over" else None
    if follower is not None:
        follower.wait_ready()
    board[_BEGUN] += 1
    server.close(_AT_ONCE if ending == "cut" else _GRACEFULLY)
    board[_ENDED] += 1
    return follower or Forked(folder)


class Forked:
    """A server in a forked child."""

    def __init__(self, folder: str, *, replace: bool = False) -> None:
        self.ended = False
        self._ready, ready = os.pipe()
        orders, self._orders = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            _serve(folder, replace, ready, orders)
        os.close(ready)
        os.close(orders)

    def wait_ready(self) -> None:
        """Wait until it serves; idempotent."""
        if self._ready >= 0:
            assert os.read(self._ready, 1), "the server has not started"
            os.close(self._ready)
            self._ready = -1

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        self._bury()

    def close(self, how: bytes) -> None:
        os.write(self._orders, how)
        assert self._bury() == 0, "the server has failed"

    def _bury(self) -> int:
        if self._ready >= 0:
            os.close(self._ready)
        os.close(self._orders)
        self.ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _serve(folder: str, replace: bool, ready: int, orders: int) -> NoReturn:
    try:
        journal = Journal(f"{folder}/journal")

        def note(number: int, seconds: float, ballast: bytes) -> int:
            journal.write(number)
            time.sleep(seconds)
            return number

        server = Server(max_threads=4)
        server.attach(note, f"{folder}/note.door", replace=replace)
        server.start()
        os.write(ready, b".")
        order = os.read(orders, 1)
        server.close(0 if order == _AT_ONCE else None)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


# -- the callers


def call_on(folder: str, first: int, threads: int, *, afresh: bool = False) -> dict[str, Any]:
    """
    Call in several threads until the restarts are over; a call that did not run is made again.

    Args:
        folder: of the supervisor.
        first: the first of our numbers.
        threads: how many; they share a proxy.
        afresh: have a new one for each call instead.

    Returns:
        ``told``: how each call ended; ``failures``: of each attempt that failed, the error, whether it may
        have run, and how many orderly closings there have been since the last call that went well.
    """
    caller = _Caller(folder, first, afresh)
    with ThreadPoolExecutor(threads) as pool:
        for work in [pool.submit(caller.work) for _ in range(threads)]:
            work.result()
    caller.close()
    return {"told": caller.told, "failures": caller.failures}


class _Caller:
    def __init__(self, folder: str, first: int, afresh: bool) -> None:
        self.told: list[tuple[int, str]] = []
        self.failures: list[tuple[str, bool, int]] = []
        self._path = f"{folder}/note.door"
        self._board = Board(f"{folder}/board")
        self._proxy = None if afresh else Proxy(self._path, wait=10)
        self._numbers = itertools.count(first)

    def close(self) -> None:
        if self._proxy is not None:
            self._proxy.close()
        self._board.close()

    def work(self) -> None:
        ended = self._board[_ENDED]
        while not self._board[_OVER]:
            number = next(self._numbers)
            before = self._board[_ENDED]
            how = self._insist(number, ended)
            self.told.append((number, how))
            ended = before if how == RESULT else ended

    def _insist(self, number: int, ended: int) -> str:
        """Make a call until it has, or may have, run."""
        while True:
            try:
                self._call(number)
                return RESULT
            except DoorError as error:
                text, may_have_run = repr(error), error.may_have_run
            except FileNotFoundError as error:
                text, may_have_run = repr(error), False
            self.failures.append((text, may_have_run, self._board[_BEGUN] - ended))
            if may_have_run:
                return MAY_HAVE_RUN
            if self._board[_OVER]:
                return DID_NOT_RUN
            time.sleep(_BREATH)

    def _call(self, number: int) -> None:
        args = number, random.uniform(0, 0.0005), random.choice((b"", b"", b"", BALLAST))
        if self._proxy is not None:
            assert self._proxy(*args) == number
        else:
            with Proxy(self._path) as proxy:
                assert proxy(*args) == number
