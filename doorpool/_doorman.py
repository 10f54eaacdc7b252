"""
The doormen: threads that ask a user's function who may come in.

The keeper must not: the function may look somebody up in a directory across the network, or call a door
of this very process, and meanwhile nobody else could come in anywhere.  Nor should the server's
threads, which may all be busy with calls.  So whoever has such a rule to ask leaves it here, and a
few threads that come when there is something ask it.  They end when there is nothing left.

How long a rule takes may depend on whom it is asked about, and a stranger may knock again and again.
So some doormen are left to our own user and root, whose turn is always first; strangers take turns
by uid, and none of them has more than a few doormen.  Hence a job may wait while a doorman could be
had: whoever ends a job of that uid, or of another stranger, looks for the next and finds it.

A collection may run in the midst of what the lock is held for, and a finalizer in it wait for the
keeper's lock: so nobody takes this one with that.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable

from doorpool import _sockets
from doorpool._credentials import is_strange
from doorpool._log import log

#: So many rules may wait for something at the same time, before those behind them wait for them.
MOST_DOORMEN = 8
MOST_STRANGE = 6  #: Of them, such as ask about strangers.
MOST_HIS = 2  #: Of those, about one of them.

Job = Callable[[], None]


class Doormen:
    """The threads of one process."""

    def __init__(self) -> None:
        self.generation = _sockets.generation
        self._lock = threading.Lock()
        self._jobs: dict[int | None, deque[Job]] = {}  # by uid, whose turn is next first; none is empty
        self._busy: Counter[int | None] = Counter()  # jobs that are being done, by uid
        self._working = 0  # threads, or such as have not begun

    def take(self, job: Job, uid: int | None) -> None:
        """
        Have a thread do something soon; it must raise nothing.

        Not with the keeper's lock.

        Args:
            job: what to do.
            uid: about whom it is, whose turn it takes.

        Raises:
            RuntimeError, MemoryError: there is no thread to be had.
        """
        with self._lock:
            self._jobs.setdefault(uid, deque()).append(job)
            if self._working >= MOST_DOORMEN or uid not in self._ready():
                return
            self._working += 1
        try:
            threading.Thread(target=self._work, name="doorpool-doorman", daemon=True).start()
        except BaseException:
            with self._lock:
                self._working -= 1
                # Else one of the others comes to it.  With none at work nothing was waiting but this.
                if not self._working and self._jobs.pop(uid, None) is not None:
                    raise

    def _work(self) -> None:
        while (turn := self._begin_next()) is not None:
            uid, job = turn
            del turn
            try:
                job()
            except BaseException as error:  # or the thread would end, and be counted as working for ever
                log(logging.ERROR, "a doorman failed; please report it", error=error)
            del job  # and what it holds, which may be a door that nobody else does
            with self._lock:
                self._busy[uid] -= 1
                self._busy += Counter()  # drops those of whom there are none

    def _ready(self) -> list[int | None]:
        """Return of whom a job may be begun, in turn; under the lock."""
        full = sum(map(is_strange, self._busy.elements())) >= MOST_STRANGE
        return [uid for uid in self._jobs if not is_strange(uid) or not (full or self._busy[uid] >= MOST_HIS)]

    def _begin_next(self) -> tuple[int | None, Job] | None:
        """Take what is to be done next; None if it is the turn of nothing, and the thread ends."""
        with self._lock:
            if not (ready := self._ready()):
                self._working -= 1
                return None
            uid = min(ready, key=is_strange)  # our own first, and of equals who has waited longest
            jobs = self._jobs.pop(uid)
            job = jobs.popleft()
            if jobs:
                self._jobs[uid] = jobs  # behind all others
            self._busy[uid] += 1
            return uid, job


_doormen: Doormen | None = None


def doormen() -> Doormen:
    """Return the doormen of this process; for the keeper's thread."""
    global _doormen
    if _doormen is None or _doormen.generation != _sockets.here():
        _doormen = Doormen()
    return _doormen
