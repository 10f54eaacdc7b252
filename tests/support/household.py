"""
Clients, servers, routers and workers that live together, and may be killed: see ``proof/test_many_kills.py``.

    hub         a server with a door for everything that can go through one
    router      opens the hub's door, and hands it to whoever asks
    worker      enlists at the hub with a door of its own; what the hub is asked to have done, the newest does
    caller      uses all this, by ``ACTS``

Each call has a number, which the procedure that runs it writes into the journal (support.journal).
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy

from doorpool import DoorError, Endpoint, Proxy, Server, take
from support import steps
from support.journal import DID_NOT_RUN, MAY_HAVE_RUN, RESULT, Journal
from support.patterns import Counted
from support.stage import PATIENCE
from support.steps import GIVING, HOLDING, IN_CALLBACK, IN_PROCEDURE, MID_STREAM, WITH_FILE

HUB, ROUTER, VICTIM = "hub.door", "router.door", "victim.door"

NUMBERS = 16  # that one act may use, at most

_ARRAY = numpy.arange(16_000.0)  # in a segment
_LONG = bytes(range(256)) * 4096  # in several frames
_ITEMS = 40  # of a stream


# -- who answers


class _Session:
    """What one caller has, and what ends with him."""

    def __init__(self, note: Callable[[int], None]) -> None:
        self._note = note

    def add(self, number: int) -> int:
        self._note(number)
        return number

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Lock:
    """The hub's lock, for one caller."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> _Lock:
        assert self._lock.acquire(timeout=PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def is_held(self) -> bool:
        return self._lock.locked()


class _Doors:
    """What a hub offers."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._workers: dict[int, Proxy] = {}
        self._ids = itertools.count()

    def _note(self, number: int) -> None:
        self._journal.write(number)
        steps.arrive(IN_PROCEDURE)

    def echo(self, number: int, value: Any) -> Any:
        self._note(number)
        return value

    def session(self, number: int) -> Endpoint:
        self._note(number)
        return Endpoint(_Session(self._note))

    def lock(self, number: int) -> Endpoint:
        self._note(number)
        return Endpoint(_Lock(self._lock))

    def stream(self, number: int, count: int) -> Iterator[int]:
        self._note(number)
        yield from range(count)

    def add_up(self, number: int, items: Iterable[int]) -> int:
        self._note(number)
        return sum(items)

    def lend(self, number: int) -> Any:
        self._note(number)
        file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it moves
        file.write("lent")
        file.seek(0)
        return take(file)

    def read(self, number: int, file: Any) -> str:
        self._note(number)
        with file:
            return str(file.read())

    def call_back(self, number: int, door: Proxy) -> Any:
        self._note(number)
        return door(number)

    # -- workers

    def enlist(self, worker: Proxy) -> Endpoint:
        """Take a worker on; who has the result is one."""
        key = next(self._ids)
        self._workers[key] = worker

        def leave() -> None:
            self._workers.pop(key).close()

        return Endpoint(lambda: key, on_unref=leave)

    def workers(self) -> int:
        return len(self._workers)

    def employ(self, number: int, value: Any) -> Any:
        """Have the newest worker do it; if it is certain that he has not, the one before."""
        for key in sorted(self._workers, reverse=True):
            worker = self._workers.get(key)
            if worker is None:
                continue
            try:
                return worker(number, value)
            except DoorError as error:  # he is dead, or we have just let him go
                if error.may_have_run:
                    raise
        raise RuntimeError("there is no worker")


class _Member(Counted):
    """One of the household."""

    def __init__(self, control: Any, folder: str) -> None:
        super().__init__(control, folder)
        self.records = Journal("numbers")


class Hub(_Member):
    """A server."""

    def do_serve(self, path: str, replace: bool = False) -> None:
        self.server = Server(idle_timeout=0.05)
        self.doors = _Doors(self.records)
        self.server.attach(self.doors, path, replace=replace)
        self.server.start()

    def counts(self) -> dict[str, int]:
        counts = super().counts()
        load = self.server.statistics()
        return counts | {"channels": load.channels, "doors": load.doors, "workers": self.doors.workers()}


class Switch(_Member):
    """A router."""

    def do_serve(self, path: str) -> None:
        hub = Proxy(HUB)
        self.server = Server(idle_timeout=0.05)
        self.server.attach(lambda: hub, path)
        self.server.start()


class Worker(_Member):
    """A process that works for the hub."""

    place: Proxy | None = None

    def do_enlist(self) -> None:
        with Proxy(HUB, timeout=PATIENCE) as hub:
            self.place = hub.enlist(Endpoint(self.work))

    def work(self, number: int, value: Any) -> Any:
        self.records.write(number)
        steps.arrive(IN_PROCEDURE)
        return value


# -- who calls


class Act:
    """
    One use of a door: calls with numbers, and how each of them ended.

    Args:
        door: of the hub.
        first: the first number.
    """

    def __init__(self, first: int) -> None:
        self.told: list[tuple[int, str]] = []
        self.ended = ""
        self._numbers = iter(range(first, first + NUMBERS))

    @contextlib.contextmanager
    def numbered(self, *, calls: int = 1) -> Iterator[int]:
        """A number for a call that is made in the block; of several, the error may be the last one's."""
        number = next(self._numbers)
        try:
            yield number
        except DoorError as error:
            self.told.append((number, MAY_HAVE_RUN if error.may_have_run or calls > 1 else DID_NOT_RUN))
            raise
        self.told.append((number, RESULT))

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        with self.numbered() as number:
            return method(number, *args)


def _echo(act: Act, hub: Any) -> None:
    assert act.call(hub.echo, b"four") == b"four"


def _array(act: Act, hub: Any) -> None:
    assert numpy.array_equal(act.call(hub.echo, _ARRAY), _ARRAY)


def _long(act: Act, hub: Any) -> None:
    assert act.call(hub.echo, [bytearray(_LONG)]) == [_LONG]


def _session(act: Act, hub: Any) -> None:
    with act.call(hub.session) as session:
        act.call(session.add)
        steps.arrive(HOLDING)
        act.call(session.add)


def _lock(act: Act, hub: Any) -> None:
    with act.call(hub.lock) as held:
        steps.arrive(HOLDING)
        assert held.is_held()


def _stream(act: Act, hub: Any) -> None:
    with act.numbered(calls=_ITEMS) as number, hub.stream(number, _ITEMS) as items:
        for n, item in enumerate(items):
            assert n == item
            if n == 5:
                steps.arrive(MID_STREAM)
        assert n == _ITEMS - 1


def _generator(act: Act, hub: Any) -> None:
    def items() -> Iterator[int]:
        for n in range(_ITEMS):
            if n == 5:
                steps.arrive(GIVING)
            yield n

    assert act.call(hub.add_up, items()) == sum(range(_ITEMS))


def _borrow(act: Act, hub: Any) -> None:
    with act.call(hub.lend) as file:
        steps.arrive(WITH_FILE)
        assert file.read() == "lent"


def _hand(act: Act, hub: Any) -> None:
    with tempfile.TemporaryFile("w+") as file:
        file.write("mine")
        file.seek(0)
        steps.arrive(WITH_FILE)
        assert act.call(hub.read, file) == "mine"


def _call_back(act: Act, hub: Any) -> None:
    def back(number: int) -> int:
        steps.arrive(IN_CALLBACK)
        return number + 1

    number = act.call(hub.call_back, Endpoint(back))
    assert number == act.told[-1][0] + 1


def _employ(act: Act, hub: Any) -> None:
    # No array: on the channel to a worker that lives on, how many segments there are is nobody's business.
    assert act.call(hub.employ, b"work") == b"work"


ACTS: dict[str, Callable[[Act, Any], None]] = {
    "echo": _echo,
    "array": _array,
    "long": _long,
    "session": _session,
    "lock": _lock,
    "stream": _stream,
    "generator": _generator,
    "borrow": _borrow,
    "hand": _hand,
    "callback": _call_back,
    "employ": _employ,
}


class Caller(_Member):
    """A client."""

    def __init__(self, control: Any, folder: str) -> None:
        super().__init__(control, folder)
        self.kept: dict[str, Proxy] = {}
        self.resting = threading.Event()

    def do_live(self, first: int, acts: tuple[str, ...]) -> None:
        """Do one thing after the other at the hub, in another thread, until told to rest."""
        self.resting.clear()
        threading.Thread(target=self.live, args=(first, acts)).start()

    def live(self, first: int, acts: tuple[str, ...]) -> None:
        told: list[tuple[int, str]] = []
        ended = ""
        while not self.resting.is_set() and not ended:
            name, act = random.choice(acts), Act(first)
            first += NUMBERS
            try:
                # Segments stay with a channel that lives on for a while; how many is nobody's business.
                with self.door(HUB, name not in ("array", "long") and random.random() < 0.5) as hub:
                    ACTS[name](act, hub)
            except BaseException as error:
                ended = f"{name}: {error!r}"
            told += act.told
        self.say("lived", ended, told)

    def do_rest(self) -> None:
        self.resting.set()

    def do_act(self, name: str, first: int, path: str, keep: bool) -> None:
        """Do something in another thread, and say how it ended."""
        threading.Thread(target=self.act, args=(name, first, path, keep)).start()

    def act(self, name: str, first: int, path: str, keep: bool) -> None:
        act, ended = Act(first), RESULT
        try:
            with self.door(path, keep) as hub:
                ACTS[name](act, hub)
        except (DoorError, ConnectionError) as error:
            ended = type(error).__name__
        except BaseException as error:
            ended = f"wrong: {error!r}"
        self.say("outcome", ended, act.told, time.monotonic())

    @contextlib.contextmanager
    def door(self, path: str, keep: bool) -> Iterator[Any]:
        """The door of a hub: by its name, anew or kept, or by way of the router."""
        if path == ROUTER:
            with Proxy(ROUTER, timeout=PATIENCE) as router, router() as hub:
                yield hub
        elif keep:
            if path not in self.kept:
                self.kept[path] = Proxy(path, timeout=PATIENCE)
            yield self.kept[path]
        else:
            with Proxy(path, timeout=PATIENCE) as hub:
                yield hub
