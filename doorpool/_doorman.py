"""
The doormen: threads that ask a user's function who may come in.

The keeper must not: the function may look somebody up in a directory across the network, or call a door
of this very process, and meanwhile nobody else could come in anywhere.  Nor should the server's
threads, which may all be busy with calls.  So whoever has such a rule to ask leaves it here, and a
few threads that come when there is something ask it.  They end when there is nothing left.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from doorpool import _sockets
from doorpool._log import log

#: So many rules may wait for something at the same time, before those behind them wait for them.
MOST_DOORMEN = 8

Job = Callable[[], None]


class Doormen:
    """The threads of one process."""

    def __init__(self) -> None:
        self.generation = _sockets.generation
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._working = 0

    def take(self, job: Job) -> None:
        """
        Have a thread do something soon; it must raise nothing.

        Raises:
            RuntimeError, MemoryError: there is no thread to be had.
        """
        with self._lock:
            self._jobs.append(job)
            if self._working >= MOST_DOORMEN:
                return
            self._working += 1
        try:
            threading.Thread(target=self._work, name="doorpool-doorman", daemon=True).start()
        except BaseException:
            with self._lock:
                self._working -= 1
                if not self._working and job in self._jobs:  # else one of the others comes to it
                    self._jobs.remove(job)
                    raise

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._working -= 1
                    return
                job = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # or the thread would end, and be counted as working for ever
                log(logging.ERROR, "a doorman failed; please report it", error=error)
            del job  # and what it holds, which may be a door that nobody else does


_doormen: Doormen | None = None


def doormen() -> Doormen:
    """Return the doormen of this process; for the keeper's thread."""
    global _doormen
    if _doormen is None or _doormen.generation != _sockets.here():
        _doormen = Doormen()
    return _doormen
