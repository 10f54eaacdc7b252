"""
The books of a soak: each call has a number, and what its caller was told is held against what ran.

A number is made of who called, what he did, and which of his calls it was, so that any failure can name all
three.  Two kinds of record are written, each with one ``write`` to a file that is open for appending, which
no kill takes back:

    a procedure     the number, as the first thing that it does (``support.journal.Journal``)
    a caller        the number, how the call ended, with which error, after which time (``Notes``)

The ledger reads both while the soak goes on and forgets what is settled, so that an hour takes no more memory
than a minute.  What is settled must not be heard of again:

    told                 runs       settled
    a result             once       when both have been read; a call that was answered and did not run is lost
    it did not run       never      at once
    it may have run      0 or 1     when it has run
    nothing (killed)     0 or 1     never; these are few
"""

from __future__ import annotations

import collections
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import attrs
from support.journal import DID_NOT_RUN, MAY_HAVE_RUN, RESULT

#: What is timed at the steady server, and what it is called there: a call of a small text by a proxy that is
#: open, and opening, calling and closing one.
TIMED = {"call": "steady call", "open, call, close": "steady open, call, close"}

#: What a client does; the place in this tuple is part of the numbers.
OPERATIONS = (
    *TIMED.values(),
    "call",
    "open, call, close",
    "several at once",
    "array",
    "long bytes",
    "error",
    "session",
    "session in a with block",
    "callback",
    "stream",
    "stream left early",
    "stream passed",
    "progress",
    "file passed",
    "file lent",
    "door passed on",
    "time-out",
    "cancellation",
    "all closed",
)
_PLACES = {name: place for place, name in enumerate(OPERATIONS)}

_HOW = (RESULT, DID_NOT_RUN, MAY_HAVE_RUN)

#: What is called so: a door that did not open within five seconds; nothing ran.
LATE = "late opening"

#: Errors that are counted by name.
_ERRORS = (
    "",
    "another",
    LATE,
    "BrokenDoorError",
    "RevokedError",
    "CallTimeoutError",
    "BusyError",
    "ClosedError",
    "LimitError",
    "MarshalError",
    "AccessError",
    "NotADoorError",
    "ProtocolError",
    "RemoteError",
    "FileNotFoundError",
    "OSError",
    "CancelledError",
    "AssertionError",
)

_NOTE = struct.Struct("<QBB?xf")
_RUN = 8  # bytes of a record of the journal

_MOST_SHOWN = 50  # failures that are kept in words; all are counted


# -- numbers


def number_of(client: int, operation: str, nth: int) -> int:
    """Make the number of a call: 63 bits, as plain data has them."""
    return client << 40 | _PLACES[operation] << 32 | nth


def client_of(number: int) -> int:
    return number >> 40


def operation_of(number: int) -> str:
    return OPERATIONS[number >> 32 & 0xFF]


def nth_of(number: int) -> int:
    return number & 0xFFFF_FFFF


# -- what callers are told


@attrs.frozen
class Note:
    """
    How a call ended.

    Attributes:
        how: what its caller was told.
        error: the name of its class, if it was one; ``expected``: one that may happen there.
        seconds: how long it took.
    """

    number: int
    how: str
    error: str
    expected: bool
    seconds: float


class Notes:
    """
    What the clients of one process were told; any thread.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def enter(self, number: int, how: str, error: str, expected: bool, seconds: float) -> None:
        kind = _ERRORS.index(error if error in _ERRORS else "another")
        os.write(self._file, _NOTE.pack(number, _HOW.index(how), kind, expected, seconds))

    def close(self) -> None:
        os.close(self._file)


class _Pages:
    """A file that others append to, read once; what has been read takes no room on the disk any more."""

    def __init__(self, path: Path, record: int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._record = record
        self._offset = 0

    def read(self) -> Iterator[bytes]:
        """Yield what has been written since, in blocks of whole records."""
        while block := os.pread(self._file, self._record << 16, self._offset):
            whole = len(block) - len(block) % self._record
            if not whole:
                return
            yield block[:whole]
            self._offset += whole
        _drop(self._file, self._offset)

    def close(self) -> None:
        os.close(self._file)


_libc = ctypes.CDLL(None, use_errno=True)
_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # linux/falloc.h


def _drop(file: int, size: int) -> None:
    """Give the beginning of a file back to the disk; where the file system cannot, it just grows."""
    whole = size // 4096 * 4096
    if whole:
        _libc.fallocate(file, _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(whole))


# -- the ledger


@attrs.define
class _Account:
    """The calls of one client that are not settled: of each, what he was told and how often it ran."""

    name: str
    highest: int = 0
    open: dict[int, tuple[str, int]] = attrs.Factory(dict)


class Ledger:
    """
    Compare what the callers were told with what ran; one thread.

    Attributes:
        wrong: what does not fit, in words that name the client, the operation and the number.
        calls: how many calls have ended, by operation.
        errors: how many ended with an error, by name and whether that was expected.
    """

    def __init__(self, folder: Path) -> None:
        self.wrong: list[str] = []
        self.calls: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[tuple[str, bool]] = collections.Counter()
        self.told: collections.Counter[str] = collections.Counter()
        self.runs = 0
        self._more = 0
        self._folder = folder
        self._journal = _Pages(folder / "journal", _RUN)
        self._notes: dict[str, _Pages] = {}
        self._accounts: dict[int, _Account] = {}
        self._unseen: list[int] = []

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        for pages in self._notes.values():
            pages.close()

    def open_notes(self, process: str, clients: dict[int, str]) -> Path:
        """Return where a process with these clients is to write its notes."""
        path = self._folder / f"notes {process}"
        self._notes[process] = _Pages(path, _NOTE.size)
        self._accounts.update((client, _Account(name)) for client, name in clients.items())
        return path

    def close_notes(self, process: str) -> list[Note]:
        """Read the last notes of a process that has ended, and forget it."""
        notes = self._read_notes(process)
        self._notes.pop(process).close()
        return notes

    def fail(self, text: str) -> None:
        """Note anything else that is wrong."""
        if len(self.wrong) < _MOST_SHOWN:
            self.wrong.append(text)
        else:
            self._more += 1

    @property
    def failures(self) -> int:
        return len(self.wrong) + self._more

    def read(self) -> list[Note]:
        """
        Read what has been written since, and compare it; return the notes.

        The notes come first: whatever ran before an answer was noted is in the journal by then.
        """
        notes = [note for process in list(self._notes) for note in self._read_notes(process)]
        for block in self._journal.read():
            for (number,) in struct.iter_unpack("<Q", block):
                self._ran(number)
        unseen, self._unseen = self._unseen, []
        for number in unseen:
            if self._accounts[client_of(number)].open.pop(nth_of(number), None) is not None:
                self.fail(f"{self.describe(number)} was answered, and did not run: it is lost")
        return notes

    def describe(self, number: int) -> str:
        """Say in words which call that is."""
        account = self._accounts.get(client_of(number))
        who = "a client that there is not" if account is None else account.name
        return f"{who}: {operation_of(number)!r}, call {nth_of(number)} (number {number:#x})"

    def _read_notes(self, process: str) -> list[Note]:
        notes = []
        for block in self._notes[process].read():
            for number, how, error, expected, seconds in _NOTE.iter_unpack(block):
                note = Note(number, _HOW[how], _ERRORS[error], expected, seconds)
                self._told(note)
                notes.append(note)
        return notes

    def _told(self, note: Note) -> None:
        self.calls[operation_of(note.number)] += 1
        self.told[note.how] += 1
        if note.error:
            self.errors[note.error, note.expected] += 1
        entry = self._entry(note.number)
        if entry is None or entry[0]:
            self.fail(f"{self.describe(note.number)} has ended twice")
            return
        self._settle(note.number, note.how, entry[1])

    def _ran(self, number: int) -> None:
        self.runs += 1
        entry = self._entry(number)
        if entry is None:
            self.fail(f"{self.describe(number)} ran once more, or though it was said not to have run")
            return
        self._settle(number, entry[0], entry[1] + 1)

    def _entry(self, number: int) -> tuple[str, int] | None:
        """Return what is known of a call; None if that was settled."""
        account = self._accounts.get(client_of(number))
        if account is None:
            return None
        nth = nth_of(number)
        for skipped in range(account.highest + 1, nth + 1):
            account.open[skipped] = "", 0
        account.highest = max(account.highest, nth)
        return account.open.get(nth)

    def _settle(self, number: int, told: str, runs: int) -> None:
        unsettled = self._accounts[client_of(number)].open
        if runs > 1 or (runs and told == DID_NOT_RUN):
            self.fail(
                f"{self.describe(number)} ran, time {runs}, and its caller was told: {told or 'nothing yet'}"
            )
        if told == DID_NOT_RUN or (told and runs):
            unsettled.pop(nth_of(number), None)
            return
        unsettled[nth_of(number)] = told, runs
        if told == RESULT:
            self._unseen.append(number)

    def unsettled(self) -> int:
        """How many calls are not settled: their callers were killed, or they may have run and did not."""
        return sum(len(account.open) for account in self._accounts.values())
