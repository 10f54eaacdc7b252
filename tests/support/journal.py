"""
A journal of the calls that ran, and books that compare it with what the callers were told.

A procedure writes the number of its call into the journal as the first thing that it does, with
one ``write`` to a file that is open for appending: from then on no kill can take it back.  A caller
enters into its books how the call with that number ended.  Then the books must balance:

    told                 the call ran
    a result             once
    it did not run       never, and not later either
    it may have run      once or never
    (interrupted)        once or never
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import random
import select
import struct
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from doorpool import DoorError, Endpoint, Proxy, Server, current_call
from doorpool._channel import NOT, POLL, Channel

RESULT = "a result"
DID_NOT_RUN = "it did not run"
MAY_HAVE_RUN = "it may have run"
INTERRUPTED = "interrupted"

_MOST_RUNS = {RESULT: 1, DID_NOT_RUN: 0, MAY_HAVE_RUN: 1, INTERRUPTED: 1}

_RECORD = struct.Struct("<Q")


class Journal:
    """
    The numbers of the calls that ran, in the order in which they began.

    Any number of processes may write; each reader reads all of it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._offset = 0

    def write(self, number: int) -> None:
        """Say that a call begins to run."""
        os.write(self._file, _RECORD.pack(number))

    def read(self) -> list[int]:
        """Return what has been written since the last time."""
        numbers: list[int] = []
        while data := os.pread(self._file, 1 << 20, self._offset):
            self._offset += len(data)
            numbers += (number for (number,) in _RECORD.iter_unpack(data))
        return numbers

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Books:
    """
    What the callers were told, against the journal; any thread.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._told: dict[int, str] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self._runs: collections.Counter[int] = collections.Counter()
        self._last = 0

    def next_number(self) -> int:
        """Return a number that no call has had."""
        with self._lock:
            self._last += 1
            return self._last

    def enter(self, number: int, told: str) -> None:
        """Note how a call ended, as its caller was told."""
        with self._lock:
            assert number not in self._told
            self._told[number] = told
            self._counts[told] += 1

    def enter_all(self, told: Iterable[tuple[int, str]]) -> None:
        for number, how in told:
            self.enter(number, how)

    def compare(self) -> None:
        """Look at what has run meanwhile: nothing twice, and nothing that was said not to run."""
        with self._lock:
            for number in self._journal.read():
                self._runs[number] += 1
                told = self._told.get(number)
                assert self._runs[number] <= _MOST_RUNS.get(told or MAY_HAVE_RUN, 1), (
                    f"call {number} ran, time {self._runs[number]}, and its caller was told: {told}"
                )

    def count(self, told: str) -> int:
        """Return how many calls ended so."""
        return self._counts[told]

    def ran(self, number: int) -> bool:
        """Tell whether a call has run, as far as ``compare`` has read."""
        with self._lock:
            return self._runs[number] > 0

    def balance(self) -> collections.Counter[tuple[str, int]]:
        """
        Compare all of it, nothing being under way any more.

        Returns:
            How many calls there were of each kind: what was told, and how often it ran.
        """
        self.compare()
        with self._lock:
            wrong = [
                f"call {number} ran {self._runs[number]} times, and its caller was told: {told}"
                for number, told in self._told.items()
                if self._runs[number] > _MOST_RUNS[told] or (told == RESULT and not self._runs[number])
            ]
            assert not wrong, "\n".join(wrong[:20])
            assert self._runs.keys() <= self._told.keys(), "calls ran that nobody has made"
            return collections.Counter((told, self._runs[number]) for number, told in self._told.items())


class Board:
    """
    A few numbers in shared memory, for processes that have the path in common.

    One process writes each of them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "a+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        self._words = memoryview(self._map).cast("Q")

    def __getitem__(self, place: int) -> int:
        return self._words[place]

    def __setitem__(self, place: int, value: int) -> None:
        self._words[place] = value

    def close(self) -> None:
        self._words.release()
        self._map.close()


# -- when to give up


class Edge:
    """
    A moment in a call, found by trial: whoever gives up there finds it early as often as late.

    Moments are drawn from both sides of it, so that the race goes either way however fast the
    machine is, and whatever else it does.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def draw(self) -> float:
        """Choose a moment, in seconds from the beginning of the call."""
        return self._seconds * random.uniform(0.6, 1.5)

    def learn(self, early: bool) -> None:
        """Move a little later, or earlier."""
        self._seconds = min(0.05, max(5e-6, self._seconds * (1.07 if early else 1 / 1.07)))


def read_by_a_fine_clock() -> Any:
    """
    Return a ``Channel.read`` that ends a wait when the time is over, to some microseconds.

    ``poll`` counts whole milliseconds, so that few timeouts would fall into the moment at which a
    server takes a call.
    """
    plain_read = Channel.read

    def read(
        self: Channel, limit: int, how: int = POLL, now: Any = None, deadline: float | None = None
    ) -> Any:
        if deadline is not None and how == POLL:
            left = min(0.5, max(0.0, deadline - time.monotonic()))
            select.select([self.socket], [], [], left)
            how = NOT
        return plain_read(self, limit, how, now, deadline)

    return read


# -- servers


def serve(folder: str, *, threads: int = 8, busy: bool = False, ready: Any) -> None:
    """
    Serve ``note.door`` in a folder, which writes into its ``journal``, until SIGTERM.

    Args:
        folder: where.
        threads: how many threads at most.
        busy: have a caller of our own keep a thread busy most of the time.
        ready: called when it answers.
    """
    journal = Journal(f"{folder}/journal")

    def note(number: int, seconds: float = 0.0, ballast: bytes = b"") -> int:
        journal.write(number)
        if seconds:
            time.sleep(seconds)
        return number

    server = Server(max_threads=threads)
    server.attach(note, f"{folder}/note.door")
    server.attach(_Short(server, journal, folder), f"{folder}/offer.door")
    server.attach(time.sleep, f"{folder}/hold.door")
    watcher = _Watcher(journal)
    server.attach(watcher.watch, f"{folder}/watch.door")
    server.attach(watcher.seen, f"{folder}/seen.door")
    with server:
        if busy:
            threading.Thread(target=_keep_busy, args=(f"{folder}/hold.door",), daemon=True).start()
        ready()
        server.run()


def _keep_busy(path: str) -> None:
    with Proxy(path) as hold, contextlib.suppress(DoorError):  # until the server closes
        while True:
            hold(random.uniform(0, 0.0004))
            time.sleep(random.uniform(0, 0.0002))


class _Short:
    """
    A door that is offered, and taken away again while it is called: ``short.door``.

    Called with nothing it offers the door; with seconds it revokes it after these.
    """

    def __init__(self, server: Server, journal: Journal, folder: str) -> None:
        self._server = server
        self._journal = journal
        self._path = f"{folder}/short.door"
        self._endpoint: Endpoint | None = None

    def __call__(self, life: float | None = None) -> None:
        if life is None:
            self._endpoint = self._server.attach(self._note, self._path)
        else:
            assert self._endpoint is not None
            time.sleep(life)
            self._endpoint.close()

    def _note(self, number: int, ballast: bytes = b"") -> int:
        self._journal.write(number)
        return number


class _Watcher:
    """Wait in a procedure until its caller gives up, and remember when that was seen."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._watching: set[int] = set()
        self._sights: dict[int, tuple[float, float | None, float, int | None]] = {}

    def watch(self, number: int) -> None:
        self._watching.add(number)
        call, began = current_call(), time.monotonic()
        self._journal.write(number)
        while not call.cancelled:
            time.sleep(0.0002)
        saw = time.monotonic()
        self._sights[number] = began, call.deadline, saw, call.caller.uid
        self._watching.discard(number)

    def seen(self, what: str) -> Any:
        return len(self._watching) if what == "watching" else self._sights
