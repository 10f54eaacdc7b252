"""
A soak: so many clients of two users against two servers, for as long as one likes.

This process has neither server nor proxy.  It starts the others, kills some of the clients, keeps the books,
and measures.  Each process that it starts ends with it, however it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from soak import clients, service
from soak.books import LATE, TIMED, Ledger, Note, Notes, operation_of
from soak.processes import Complaints, Ended, Forked, kill_all
from soak.service import ENDINGS, OBJECTS, OVER, PATIENCE
from soak.watch import Times, Watch, resident
from support.journal import Board

STRANGER = 54321  # a user that no machine has

_TURN = 0.05  # seconds
_LIFE = 20.0  # seconds until a client that may be killed is, on average
_ALONE = 20  # one client in so many has a process for itself
_TOGETHER = 10  # clients of another process

_MOST_CROWDED = 0.005  # of all calls; it is none where the machine has little else to do

_TIMES = {TIMED["call"]: "call", TIMED["open, call, close"]: "opening"}

PLANTS = ("lost", "doubled", "descriptors", "memory", "objects", "threads")


@attrs.frozen
class Options:
    """
    How to soak.

    Attributes:
        minutes: how long, without the beginning and the end.
        calls: after how many it ends before that; 0: never.
        clients: how many.
        seed: of all that is done at random.
        pause: seconds between two things that a client does, on average.
        plants: faults for the steady server, to see that they are found.
    """

    minutes: float
    calls: int
    clients: int
    seed: int
    pause: float
    plants: tuple[str, ...]


@attrs.define
class _Process:
    """A process of clients: its place among them, whether it may be killed, and the present one."""

    place: int
    size: int
    mortal: bool
    forked: Forked
    name: str = ""


class Soak:
    """One run; ``run`` once."""

    def __init__(self, options: Options, folder: Path, ledger: Ledger) -> None:
        self._options = options
        self._folder = folder
        self._ledger = ledger
        self._random = random.Random(options.seed)
        self._complaints = Complaints(folder / "complaints")
        self._board = Board(folder / "board")
        self._last_client = 0
        self._killed = 0
        self._minute = Times()
        self._processes: list[_Process] = []
        self._stopped = False

    # -- from the beginning to the end

    def run(self) -> dict[str, Any]:
        """Run it, and return what there is to say about it."""
        with _stopping(self._stop):
            steady, restless = self._start_servers()
            for place, size in enumerate(_sizes(self._options.clients)):
                self._processes.append(self._start_clients(place, size, mortal=place % 2 == 1))
            for process in self._processes:
                process.forked.wait_ready(PATIENCE)
            begin = time.monotonic()
            watch = Watch(begin, begin + self._options.minutes * 60, self._options.clients)
            with _Reference() as reference:
                self._watch_over(watch, reference, steady, begin + self._options.minutes * 60)
            seconds = time.monotonic() - begin
            self._end(steady, restless)
        watch.judge(self._ledger.fail)
        crowded = sum(self._ledger.errors[name, True] for name in (LATE, "BusyError"))
        if crowded > (calls := self._ledger.calls.total()) * _MOST_CROWDED:
            self._ledger.fail(f"{crowded} doors did not open in five seconds or were busy, of {calls} calls")
        return self._summary(watch, seconds)

    def _stop(self) -> None:
        self._stopped = True

    def _start_servers(self) -> tuple[Forked, Forked]:
        (self._folder / "lent").write_bytes(b"what is in the file\n" * 50)
        steady = Forked(
            "the steady server",
            partial(_serve, self._folder, self._complaints, self._options.plants),
        )
        rng = random.Random(self._random.getrandbits(32))
        restless = Forked(
            "the restless server", partial(service.restart, self._folder, self._complaints, rng)
        )
        for server in steady, restless:
            server.wait_ready(PATIENCE)
        return steady, restless

    def _start_clients(self, place: int, size: int, *, mortal: bool) -> _Process:
        """Start a process with so many clients; every other one is of another user."""
        codec, uid = ("pickle", None) if place % 4 < 2 else ("data", STRANGER if os.geteuid() == 0 else None)
        seats = []
        for _ in range(size):
            self._last_client += 1
            number = self._last_client
            kind = f"process {place} of uid {os.geteuid() if uid is None else uid}"
            name = f"{kind}, client {number} ({codec})"
            seats.append(clients.Seat(number, name, codec, f"{self._options.seed} {number}"))
        process = f"{place}-{seats[0].number}"
        path = self._ledger.open_notes(process, {seat.number: seat.name for seat in seats})
        notes = Notes(path)
        forked = Forked(
            f"process {place} of clients, uid {uid}",
            lambda ready, orders: clients.call(
                seats, self._folder, self._board, notes, self._complaints, self._options.pause, ready
            ),
            uid=uid,
        )
        notes.close()
        return _Process(place, size, mortal, forked, process)

    def _watch_over(self, watch: Watch, reference: _Reference, steady: Forked, end: float) -> None:
        minute = min(60.0, self._options.minutes * 60 / 4)
        next_look, next_line = 0.0, time.monotonic() + minute
        kill_at = self._next_kill()
        while (now := time.monotonic()) < end and not (self._stopped or self._has_enough()):
            self._read(watch)
            quarter = watch.quarter(now)
            seconds = reference.measure()
            if quarter is not None:
                watch.times["reference"][quarter].add(seconds)
            if now >= next_look:
                self._look(watch, steady)
                next_look = now + min(2.0, minute / 10)
            if now >= kill_at:
                self._kill_one()
                kill_at = self._next_kill()
            if now >= next_line:
                self._print_line(steady)
                next_line += minute
            time.sleep(_TURN)

    def _has_enough(self) -> bool:
        return 0 < self._options.calls <= self._ledger.calls.total()

    # -- what it does meanwhile

    def _read(self, watch: Watch) -> None:
        self._take(self._ledger.read(), watch)
        for text in self._complaints.read():
            self._ledger.fail(text)

    def _take(self, notes: list[Note], watch: Watch) -> None:
        quarter = watch.quarter(time.monotonic())
        for note in notes:
            what = _TIMES.get(operation_of(note.number))
            if what is None or note.error:
                continue
            if what == "call":
                self._minute.add(note.seconds)
            if quarter is not None:
                watch.times[what][quarter].add(note.seconds)

    def _look(self, watch: Watch, steady: Forked) -> None:
        self._server = watch.sample("server", [steady.pid], self._board[OBJECTS])
        lasting = [it.forked.pid for it in self._processes if not it.mortal]
        self._clients = watch.sample("clients", lasting)
        for process in self._processes:
            if process.forked.ended:
                self._ledger.fail(f"{process.forked.name} has ended by itself")
                process.forked.kill()
                self._replace(process)
        if steady.ended:
            raise Ended("the steady server has ended by itself")

    def _next_kill(self) -> float:
        mortal = sum(it.mortal for it in self._processes)
        if not mortal:
            return float("inf")
        return time.monotonic() + self._random.expovariate(mortal / _LIFE)

    def _kill_one(self) -> None:
        process = self._random.choice([it for it in self._processes if it.mortal])
        process.forked.kill()
        self._killed += process.size
        self._replace(process)

    def _replace(self, process: _Process) -> None:
        self._ledger.close_notes(process.name)
        follower = self._start_clients(process.place, process.size, mortal=process.mortal)
        process.forked, process.name = follower.forked, follower.name

    def _print_line(self, steady: Forked) -> None:
        ledger, times = self._ledger, self._minute
        expected = sum(count for (_, it), count in ledger.errors.items() if it)
        say(
            f"{sum(ledger.calls.values())} calls, {expected} errors as expected, "
            f"{ledger.failures} failures | server: {resident(steady.pid) // 1024} MB resident, "
            f"{self._server.memory // 1024} MB its own, {self._server.segments // 1024} MB of segments, "
            f"{self._server.objects} objects, {self._server.descriptors} descriptors, "
            f"{self._server.threads} threads | lasting clients: "
            f"{self._clients.memory // 1024} MB, {self._clients.descriptors} descriptors, "
            f"{self._clients.threads} threads | {self._killed} clients killed, {self._restarts()} restarts | "
            f"p50 {times.percentile(50) * 1e3:.2f} ms, p99 {times.percentile(99) * 1e3:.2f} ms"
        )
        self._minute = Times()

    def _restarts(self) -> int:
        return sum(self._board[place] for place in ENDINGS.values())

    # -- the end

    def _end(self, steady: Forked, restless: Forked) -> None:
        """End all in the order in which they need each other, and read the books to their end."""
        self._board[OVER] = 1
        for process in self._processes:
            self._wait(process.forked, 2 * PATIENCE)
        for server in restless, steady:
            server.order(b"g")
            self._wait(server, 3 * PATIENCE)
        for process in self._processes:
            self._ledger.close_notes(process.name)
        self._ledger.read()
        for text in self._complaints.read():
            self._ledger.fail(text)
        if self._stopped:
            self._ledger.fail("interrupted")
        if left := sorted(self._folder.glob("*.call.*")) + sorted(self._folder.glob("*.all.*")):
            self._ledger.fail(f"names left behind: {[path.name for path in left]}")

    def _wait(self, forked: Forked, seconds: float) -> None:
        try:
            forked.wait(seconds)
        except Ended as error:
            self._ledger.fail(str(error))

    def _summary(self, watch: Watch, seconds: float) -> dict[str, Any]:
        ledger = self._ledger
        return {
            "held": not ledger.failures,
            "seed": self._options.seed,
            "clients": self._options.clients,
            "seconds": round(seconds, 1),
            "calls": sum(ledger.calls.values()),
            "calls by operation": dict(ledger.calls.most_common()),
            "told": dict(ledger.told),
            "runs": ledger.runs,
            "unsettled": ledger.unsettled(),
            "errors as expected": {name: count for (name, it), count in ledger.errors.items() if it},
            "errors not expected": {name: count for (name, it), count in ledger.errors.items() if not it},
            "clients killed": self._killed,
            "restarts": {name: self._board[place] for name, place in ENDINGS.items()},
            "by quarter": watch.figures(),
            "failures": ledger.failures,
            "wrong": ledger.wrong,
        }


def _serve(
    folder: Path,
    complain: Callable[[str], None],
    plants: tuple[str, ...],
    ready: Callable[[], object],
    orders: int,
) -> None:
    service.serve(folder, service.STEADY, complain, plants, False, ready, orders)


def _sizes(clients: int) -> Iterator[int]:
    """How many clients the processes have: some one, the others ten; at least four, for both users."""
    alone = clients // _ALONE
    together = clients - alone
    processes = max(4, round(together / _TOGETHER))
    for place in range(processes):
        size = together * (place + 1) // processes - together * place // processes
        if size:
            yield size
    yield from [1] * alone


class _Reference:
    """A process that sends back each byte: what the machine itself takes."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._forked = Forked("the reference", lambda ready, orders: _echo(self._theirs))

    def __enter__(self) -> _Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        self._theirs.close()
        self._forked.kill()

    def measure(self) -> float:
        began = time.monotonic()
        self._ours.send(b".")
        self._ours.recv(1)
        return time.monotonic() - began


def _echo(sock: socket.socket) -> None:
    while byte := sock.recv(1):
        sock.send(byte)


@contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[None]:
    """Have the first Ctrl-C or SIGTERM stop the soak in an orderly way; a second one ends it at once."""

    def handle(number: int, _: Any) -> None:
        signal.signal(number, signal.default_int_handler)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Soak as the command line says; return 0 if all held."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long")
    parser.add_argument("--calls", type=int, default=0, help="end after so many, for a test of the soak")
    parser.add_argument("--clients", type=int, default=200, help="how many clients")
    parser.add_argument("--seed", type=int, default=None, help="what is done at random; printed")
    parser.add_argument("--pause", type=float, default=0.05, help="of a client, in seconds, on average")
    parser.add_argument("--plant", choices=PLANTS, nargs="*", default=(), help="faults to be found")
    given = parser.parse_args(arguments)
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    options = Options(given.minutes, given.calls, given.clients, seed, given.pause, tuple(given.plant))
    say(f"{options.clients} clients for {options.minutes:g} minutes, --seed {seed}")
    folder = Path(tempfile.mkdtemp(prefix="dp-soak-"))
    try:
        folder.chmod(0o711)  # the other user has to reach the doors
        with Ledger(folder) as ledger:
            summary = Soak(options, folder, ledger).run()
    finally:
        kill_all()
        shutil.rmtree(folder)
    for text in summary["wrong"]:
        say(f"WRONG: {text}")
    print(json.dumps(summary, indent=1), flush=True)
    return 0 if summary["held"] else 1
