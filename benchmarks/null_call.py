"""
The null call: ``add(1, 2)`` in another process, by doorpool and by its nearest peers.

    python -m benchmarks.null_call [--rounds 30] [--calls 1000]

The peers are a ``multiprocessing`` manager's proxy, a bare ``multiprocessing.Pipe``, and a Unix
socket with pickle and a length in front of it.  All are measured in one run, in short rounds
that take turns, so that a change of the machine's speed meets them all alike.  Each placement
is measured by itself: both sides pinned to one CPU, each to its own, and left to the scheduler.

Printed are the median and the 99th percentile of a call in microseconds, and the median of the
ratios to the manager, round by round.  The bar stands on one CPU: doorpool <= 1.0.  Why the
other numbers are what they are is printed beneath them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.managers import BaseManager

from doorpool import Proxy, Server

Call = Callable[[int, int], int]

_fork = get_context("fork")


def add(a: int, b: int) -> int:
    """Return the sum: as little work as a call can do."""
    return a + b


class Adder:
    """What the manager serves."""

    def add(self, a: int, b: int) -> int:
        """Return the sum."""
        return a + b


class Manager(BaseManager):
    """A manager of one class."""


Manager.register("Adder", Adder)


# -- the ways to call: each yields a function and the pid that answers it ---------------------


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[int]:
    """Run a server process."""
    it = _fork.Process(target=target, args=args)
    it.start()
    try:
        yield it.pid or 0
    finally:
        it.terminate()
        it.join()


def serve_door(path: str) -> None:
    server = Server()
    server.attach(add, path)
    server.run()


@contextmanager
def doorpool() -> Iterator[tuple[Call, int]]:
    with tempfile.TemporaryDirectory(prefix="dp-") as folder:
        path = os.path.join(folder, "add.door")
        with process(serve_door, path) as pid, Proxy(path, wait=10) as proxy:
            yield proxy, pid


@contextmanager
def manager() -> Iterator[tuple[Call, int]]:
    with Manager(ctx=_fork) as it:
        yield it.Adder().add, it._process.pid


def serve_pipe(end: Connection) -> None:
    while True:
        end.send(add(*end.recv()))


@contextmanager
def pipe() -> Iterator[tuple[Call, int]]:
    ours, theirs = _fork.Pipe()

    def call(a: int, b: int) -> int:
        ours.send((a, b))
        return ours.recv()

    with process(serve_pipe, theirs) as pid:
        yield call, pid
    ours.close()
    theirs.close()


_LENGTH = struct.Struct("<I")


def send(sock: socket.socket, value: object) -> None:
    data = pickle.dumps(value, 5)
    sock.sendall(_LENGTH.pack(len(data)) + data)


def receive(sock: socket.socket) -> object:
    data = sock.recv(65_536)
    (length,) = _LENGTH.unpack_from(data)
    while len(data) < 4 + length:
        data += sock.recv(65_536)
    return pickle.loads(data[4:])


def serve_socket(sock: socket.socket) -> None:
    while True:
        send(sock, add(*receive(sock)))


@contextmanager
def raw_socket() -> Iterator[tuple[Call, int]]:
    ours, theirs = socket.socketpair()

    def call(a: int, b: int) -> int:
        send(ours, (a, b))
        return receive(ours)

    with ours, theirs, process(serve_socket, theirs) as pid:
        yield call, pid


WAYS = {"doorpool": doorpool, "manager": manager, "Pipe": pipe, "raw socket": raw_socket}


#: Printed under the tables.  Measured on a virtual machine with two CPUs, Linux 6.18, otherwise idle.
EXPLANATION = """
How to read them.  Every way costs one switch of each side a call, with one CPU as with two.

One CPU for both: the kernel hands the CPU from the caller to the server and back, so what is compared is
the work of the two.  This is the bar.

A CPU for each: a call waits for the other CPU to come out of its sleep, twice.  The peers' sockets are
streams, on which the kernel also wakes the waiting side when its message is *taken*; that is a switch for
nothing, but it has the CPU awake when the answer comes.  A channel's packets do without: 2 us less on one
CPU, some 15 us more on two (9 and 44 us a bare round trip, a stream's 12 and 27).  The shared page that
is to come takes the sleep away, and with it the difference.

Free: the scheduler puts the two on one CPU or on two, as it likes, and each row is one or the other; the
same way was seen at its time of either, a minute apart.
"""


# -- measuring ---------------------------------------------------------------------------------


def pin(pid: int, cpus: set[int]) -> None:
    """Pin every thread of a process."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(thread), cpus)


def measure(call: Call, calls: int) -> list[float]:
    """Return how long each of some calls took, in microseconds."""
    clock, times = time.perf_counter_ns, []
    for _ in range(calls):
        start = clock()
        call(1, 2)
        times.append((clock() - start) / 1000)
    return times


def compare(ways: dict[str, tuple[Call, int]], rounds: int, calls: int) -> dict[str, list[list[float]]]:
    """Measure all ways in turns; return for each the times of each round."""
    results: dict[str, list[list[float]]] = {name: [] for name in ways}
    for call, _ in ways.values():
        measure(call, calls)
    for _ in range(rounds):
        for name, (call, _) in ways.items():
            results[name].append(measure(call, calls))
    return results


def show(placement: str, results: dict[str, list[list[float]]]) -> None:
    """Print one placement's table."""
    medians = {name: [statistics.median(times) for times in rounds] for name, rounds in results.items()}
    print(f"\n{placement}\n{'':12}{'median µs':>10}{'p99 µs':>10}{'of manager':>12}")
    for name, rounds in results.items():
        times = sorted(itertools.chain.from_iterable(rounds))
        ratio = statistics.median(a / b for a, b in zip(medians[name], medians["manager"], strict=True))
        print(f"{name:12}{statistics.median(times):10.1f}{times[len(times) * 99 // 100]:10.1f}{ratio:12.2f}")


def placements(cpus: list[int]) -> dict[str, tuple[set[int], set[int]]]:
    """Return where the caller and the servers go."""
    everywhere = set(cpus)
    ways = {"one CPU for both": ({cpus[0]}, {cpus[0]}), "free": (everywhere, everywhere)}
    if len(cpus) > 1:
        ways["a CPU for each"] = ({cpus[0]}, {cpus[1]})
    return ways


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="the null call, beside its nearest peers")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        ways = {name: stack.enter_context(way()) for name, way in WAYS.items()}
        for placement, (ours, theirs) in placements(cpus).items():
            os.sched_setaffinity(0, ours)
            for _, pid in ways.values():
                pin(pid, theirs)
            show(placement, compare(ways, options.rounds, options.calls))
        os.sched_setaffinity(0, set(cpus))
    print(EXPLANATION)


if __name__ == "__main__":
    main()
