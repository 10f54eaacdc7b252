"""
The clients of a soak: what they do, and what they make of how it ends.

A client is a thread, alone in its process or one of ten.  It does one thing after the other, chosen at random
by its seed, with a pause between them.  It speaks pickle as our own user, or data as another one.

Some clients have proxies for themselves, some share those of their process; all go to the steady server three
times in four, and else to the restless one, where a call may fail in the ways of doors whose server is gone.
Anything else that is raised, or comes back changed, is complained of.
"""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import attrs
from soak.books import LATE, TIMED, Notes, number_of
from soak.processes import complain_of_everything, told
from soak.service import OVER, PATIENCE, RESTLESS, STEADY, use_once
from support.journal import DID_NOT_RUN, MAY_HAVE_RUN, RESULT, Board
from support.storm import fresh, left_since, piece

from doorpool import (
    BrokenDoorError,
    BusyError,
    CallTimeoutError,
    Descriptor,
    Endpoint,
    Proxy,
    RevokedError,
)

#: What a call may fail with whose server is killed, closed or replaced.
GONE: tuple[type[BaseException], ...] = (BrokenDoorError, RevokedError, FileNotFoundError)

_SHARING = 3  # every third client uses the proxies of its process
_RESTLESSNESS = 0.25  # how much goes to the restless server
_KEPT = 4  # arrays
_BACK_OFF = 5.0  # seconds at most
_SIZES = (0, 100, 20_000, 70_000, 300_000, 1 << 20)
_ARRAYS = (8, 8, 4, 4, 2, 1)  # weights of the sizes


class Over(Exception):
    """An operation cannot go on, as may happen there; it is noted already."""


@attrs.frozen
class Seat:
    """A client: its number, its name in messages, what it speaks, and the seed of what it does."""

    number: int
    name: str
    codec: str
    seed: str


class Proxies:
    """Proxies that are kept open, by path; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path, Proxy] = {}

    def get(self, path: Path) -> Proxy:
        with self._lock:
            if path not in self._open:
                self._open[path] = Proxy(path, timeout=PATIENCE, open_timeout=PATIENCE)
            return self._open[path]

    def close(self) -> None:
        """Close them all; whoever is using one has closed it himself, and ``get`` opens another."""
        with self._lock:
            proxies, self._open = list(self._open.values()), {}
        for proxy in proxies:
            proxy.close()


# -- one client


class Client:
    """
    A client; one thread.

    Args:
        seat: who it is.
        folder: where the doors are.
        notes: where it says how its calls have ended.
        complain: where it says what is wrong.
        proxies: of its process, or None to have some for itself.
    """

    def __init__(
        self, seat: Seat, folder: Path, notes: Notes, complain: Callable[[str], None], proxies: Proxies | None
    ) -> None:
        self._seat = seat
        self._folder = folder
        self._notes = notes
        self._complain = complain
        self._own = proxies is None
        self._proxies = Proxies() if proxies is None else proxies
        self._random = random.Random(seat.seed)
        self._nth = 0
        self._target = STEADY
        self._operation = ""
        self._allowed: tuple[type[BaseException], ...] = ()  # errors that the operation asks for
        self._kept: list[tuple[Any, int, int]] = []
        self._operations = {name: work for name, (work, _, codecs) in _WORK.items() if seat.codec in codecs}
        self._weights = [_WORK[name][1] for name in self._operations]

    def work(self, board: Board, pause: float) -> None:
        """Do one thing after the other until the board says that it is over."""
        while not board[OVER]:
            self._choose()
            began = time.monotonic()
            with contextlib.suppress(Over), self._stage():
                self._operations[self._operation](self)
            # Who was kept waiting waits too: otherwise a machine with other work has ever more to do.
            took = time.monotonic() - began
            time.sleep(max(min(self._random.expovariate(1 / pause), 5 * pause), min(2 * took, _BACK_OFF)))
        self._drop(0)
        if self._own:
            self._proxies.close()

    def _choose(self) -> None:
        self._operation = self._random.choices(list(self._operations), self._weights)[0]
        self._target = STEADY
        if self._random.random() < _RESTLESSNESS:
            self._target = RESTLESS
        elif self._operation in TIMED:
            self._operation = TIMED[self._operation]
        self._allowed = ()

    # -- calls, and how they end

    def _number(self) -> int:
        self._nth += 1
        return number_of(self._seat.number, self._operation, self._nth)

    def _path(self, which: str) -> Path:
        return self._folder / f"{self._target}.{which}.{self._seat.codec}"

    def _get(self, which: str) -> Proxy:
        return self._proxies.get(self._path(which))

    def _call(
        self, function: Any, *args: Any, answer: type[Exception] | None = None, began: float | None = None
    ) -> Any:
        """
        Call with a number in front, and note how it ends.

        Args:
            function: what to call.
            args: what comes after the number.
            answer: an error that the procedure is to raise; it is returned.
            began: since when it counts, by ``time.monotonic``; now by default.

        Raises:
            Over: it failed.
        """
        number, began = self._number(), time.monotonic() if began is None else began
        try:
            result = function(number, *args)
        except Exception as error:
            result = error
            if answer is None or type(error) is not answer:
                self._failed(number, error, time.monotonic() - began)
        self._notes.enter(number, RESULT, "", True, time.monotonic() - began)
        return result

    def _failed(self, number: int, error: BaseException, seconds: float) -> None:
        expected = self._expected(error)
        how = MAY_HAVE_RUN if getattr(error, "may_have_run", not expected) else DID_NOT_RUN
        name = self._crowding(error) or type(error).__name__
        self._notes.enter(number, how, name, expected, seconds)
        if not expected:
            self._wrong(f"number {number:#x}, which took {seconds:.3f} s: {told(error)}")
        raise Over from error

    def _expected(self, error: BaseException) -> bool:
        """Whether an error may happen there: at the restless server, those of one that is gone."""
        if self._crowding(error):
            return True  # these are counted, and there must be few
        return isinstance(error, self._allowed) or (self._target == RESTLESS and isinstance(error, GONE))

    def _crowding(self, error: BaseException) -> str:
        """Return as what a door is counted that did not open in time, or was busy: too many have come."""
        if isinstance(error, BusyError) and not error.may_have_run and self._seat.codec == "data":
            return "BusyError"  # of a user who has no more than a share
        if isinstance(error, self._allowed) or not isinstance(error, CallTimeoutError):
            return ""
        return LATE if "does not answer; nothing was called" in str(error) else ""

    @contextlib.contextmanager
    def _stage(self) -> Iterator[None]:
        """Complain of what is raised outside of numbered calls: while doors are opened, items pulled."""
        try:
            yield
        except Over:
            raise
        except Exception as error:
            if not self._expected(error):
                self._wrong(told(error))
            elif name := self._crowding(error):
                self._notes.enter(self._number(), DID_NOT_RUN, name, True, 0.0)
            raise Over from error

    def _wrong(self, text: str) -> None:
        self._complain(
            f"{self._seat.name}: {self._operation!r} at the {self._target} server, "
            f"call {self._nth} (client {self._seat.number}): {text}"
        )

    def _check(self, right: bool, what: str) -> None:
        if not right:
            self._wrong(what)

    # -- what it does

    def _plain(self) -> None:
        text = f"{self._nth}"
        self._check(self._call(self._get("call"), text) == text, "another answer")

    def _open_and_close(self) -> None:
        began = time.monotonic()
        with Proxy(self._path("call"), timeout=PATIENCE, open_timeout=PATIENCE) as proxy:
            self._check(self._call(proxy, "new", began=began) == "new", "another answer")

    def _close_all(self) -> None:
        """Close what is held, unless others use it too, and drop what is kept."""
        self._drop(0)
        if self._own:
            self._proxies.close()

    def _several(self) -> None:
        """Call in several threads at once, and take one of the calls back if it has not begun."""
        proxy = self._get("call")
        count = self._random.randint(2, 4)
        began = time.monotonic()
        futures = [(number := self._number(), proxy.submit(number, str(number))) for _ in range(count)]
        if self._random.random() < 0.3:
            futures[-1][1].cancel()
        failed = None
        for number, future in futures:
            try:
                self._check(future.result(2 * PATIENCE) == str(number), "an answer to somebody else")
                self._notes.enter(number, RESULT, "", True, time.monotonic() - began)
            except CancelledError:
                self._notes.enter(number, DID_NOT_RUN, "CancelledError", True, time.monotonic() - began)
            except Exception as error:
                with contextlib.suppress(Over):
                    self._failed(number, error, time.monotonic() - began)
                failed = error
        if failed is not None:
            raise Over

    def _array(self) -> None:
        size, wanted = self._random.choices(_SIZES, _ARRAYS, k=2)
        number = self._nth + 1
        argument = fresh(number, size)
        self._keep(argument, number, size)
        result = self._call(self._get("all").array, size, wanted, argument)
        self._keep(result, number + 1, wanted)

    def _keep(self, array: Any, number: int, size: int) -> None:
        """Compare an array, and keep some; what is kept never changes."""
        self._compare(array, number, size)
        if self._random.random() < 0.25:
            self._kept.append((array, number, size))
            self._drop(_KEPT)

    def _drop(self, most: int) -> None:
        while len(self._kept) > most:
            self._compare(*self._kept.pop(self._random.randrange(len(self._kept))))

    def _compare(self, array: Any, number: int, size: int) -> None:
        self._check(array.nbytes == size and (array == piece(number, size)).all(), "an array has changed")

    def _long(self) -> None:
        data = piece(self._nth, self._random.choice((10_000, 100_000, 600_000))).tobytes()
        self._check(self._call(self._get("all").turn, data) == data[::-1], "other bytes")

    def _error(self) -> None:
        text = f"no {self._nth}"
        error = self._call(self._get("all").fail, text, answer=ValueError)
        self._check(isinstance(error, ValueError) and str(error) == text, f"another error: {error!r}")

    def _session(self) -> None:
        with contextlib.closing(self._call(self._get("all").connect)) as session:
            self._use(session)

    def _session_in_a_block(self) -> None:
        with self._call(self._get("all").connect) as session:
            self._use(session)

    def _use(self, session: Proxy) -> None:
        added = [self._call(session.add, value) for value in (1, 2, 3)]
        self._check(added == [1, 3, 6], f"a session that is not ours: {added}")

    def _callback(self) -> None:
        shown: list[int] = []

        def show(nth: int) -> int:
            shown.append(nth)
            return nth

        with Endpoint(show, codec=self._seat.codec) as endpoint:
            total = self._call(self._get("all").call_back, endpoint, 5)
        self._check((shown, total) == ([0, 1, 2, 3, 4], 10), f"shown was {shown}, of {total}")

    def _stream(self) -> None:
        count = self._random.choice((0, 1, 10, 1500))
        items = list(self._call(self._get("all").count, count))
        self._check(items == list(range(0, 3 * count, 3)), f"{len(items)} items, or others, for {count}")

    def _stream_left(self) -> None:
        with self._call(self._get("all").count, 100_000) as stream:
            items = [next(stream) for _ in range(5)]
        self._check(items == [0, 3, 6, 9, 12], f"other items: {items}")

    def _stream_passed(self) -> None:
        count = self._random.choice((1, 10, 1500))
        total = self._call(self._get("all").add_up, (nth for nth in range(count)))
        self._check(total == count * (count - 1) // 2, f"another sum: {total}")

    def _progress(self) -> None:
        shown: list[int] = []
        proxy = self._get("all").options(progress=lambda done, total, text: shown.append(done))
        self._check(self._call(proxy.work, 50) == 50, "another count")
        self._check(shown == sorted(shown), f"progress out of order: {shown}")

    def _file(self) -> None:
        with tempfile.TemporaryFile(buffering=0) as file:
            file.write(b"%d" % self._nth)
            expected = b"%d" % self._nth
            self._check(self._call(self._get("all").read, file) == expected, "another file")

    def _file_lent(self) -> None:
        lent = self._call(self._get("all").lend)
        file = io.FileIO(lent.take(), "rb") if isinstance(lent, Descriptor) else lent
        with file:
            self._check(file.read(4) == b"what", "another file")

    def _door(self) -> None:
        with self._call(self._get("all").pass_on) as proxy:
            self._check(self._call(proxy, "passed") == "passed", "another answer")

    def _time_out(self) -> None:
        """Give up about when the answer comes; then anything is right that is true."""
        seconds = self._random.uniform(0.002, 0.02)
        proxy = self._get("all").options(timeout=seconds * self._random.uniform(0.5, 2.0))
        self._allowed = (CallTimeoutError,)
        self._call(proxy.nap, seconds)

    def _cancel(self) -> None:
        """Leave a procedure alone that waits for just that."""
        proxy = self._get("all").options(timeout=self._random.uniform(0.002, 0.05))
        self._allowed = (CallTimeoutError,)
        self._call(proxy.hold)


_ALL, _OURS = ("pickle", "data"), ("pickle",)

#: What a client does: how, how often, and with which codec.
_WORK: dict[str, tuple[Callable[[Client], None], float, tuple[str, ...]]] = {
    "call": (Client._plain, 40, _ALL),
    TIMED["call"]: (Client._plain, 0, _ALL),
    "open, call, close": (Client._open_and_close, 4, _ALL),
    TIMED["open, call, close"]: (Client._open_and_close, 0, _ALL),
    "several at once": (Client._several, 3, _ALL),
    "array": (Client._array, 12, _OURS),
    "long bytes": (Client._long, 3, _ALL),
    "error": (Client._error, 4, _ALL),
    "session": (Client._session, 3, _ALL),
    "session in a with block": (Client._session_in_a_block, 2, _ALL),
    "callback": (Client._callback, 3, _ALL),
    "stream": (Client._stream, 3, _ALL),
    "stream left early": (Client._stream_left, 2, _ALL),
    "stream passed": (Client._stream_passed, 2, _ALL),
    "progress": (Client._progress, 1, _ALL),
    "file passed": (Client._file, 3, _ALL),
    "file lent": (Client._file_lent, 3, _ALL),
    "door passed on": (Client._door, 2, _ALL),
    "time-out": (Client._time_out, 5, _ALL),
    "cancellation": (Client._cancel, 2, _ALL),
    "all closed": (Client._close_all, 2, _ALL),
}


# -- a process of clients


def call(
    seats: list[Seat],
    folder: Path,
    board: Board,
    notes: Notes,
    complain: Callable[[str], None],
    pause: float,
    ready: Callable[[], object],
) -> None:
    """
    Be so many clients until it is over, and look at what is left then.

    What is to be read or written besides is open already: we may be another user, who may not.
    """
    process = seats[0].name.partition(",")[0]
    complain_of_everything(lambda text: complain(f"{process}: {text}"))
    before = use_once()
    shared = Proxies()
    clients = [
        Client(seat, folder, notes, complain, shared if place % _SHARING == 1 else None)
        for place, seat in enumerate(seats)
    ]
    threads = [
        threading.Thread(target=client.work, args=(board, pause), name=seat.name, daemon=True)
        for client, seat in zip(clients, seats, strict=True)
    ]
    ready()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shared.close()
    del clients, threads, shared
    for text in left_since(before):
        complain(f"{process} has left behind: {text}")
