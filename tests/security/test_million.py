"""
An unprivileged process calls a root server's data door a million times with random and hostile input.

Meanwhile another user's calls go on: none is lost, and they take no more than ten times as long.  The
procedure runs only with what fits its annotations.  By default it is some thousand calls; ``--long`` has the
million, and prints what it found.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from typing import Any

import msgspec
import pytest
from support import byhand, wait_until
from support.actors import descriptors, here, logged

from doorpool import Proxy, Server

PATIENCE = 20.0
STRANGER, OTHER = 54_321, 4201
THREADS = 3  # of the stranger

#: What a busy machine may add to the p99 of a few calls, in the short form: one may wait so long for a CPU.
SLACK = 0.05

pytestmark = pytest.mark.usefixtures("root_only")


def serve(path: str) -> None:
    here.misfits, here.ran = [], 0

    def order(item: str, count: int = 1, *, note: str = "") -> str:
        if not (type(item) is str and type(count) is int and type(note) is str):
            here.misfits.append((item, count, note))
        here.ran += 1
        return f"{count} {item}"

    here.server = Server()
    here.server.attach(order, path, codec="data", mode=0o666)
    here.server.start()


def state() -> tuple[int, list[Any], int]:
    """How many calls ran, which of them should not have, and how many threads there are."""
    return here.ran, here.misfits[:3], here.server.statistics().threads


def channels() -> int:
    return int(here.server.statistics().channels)


# -- the stranger ------------------------------------------------------------------------------------


def plain(dice: random.Random, depth: int = 0) -> Any:
    """Make up plain data of any kind."""
    kinds: list[Any] = [
        None, True, dice.randrange(-(2**63), 2**64), dice.random(), dice.randbytes(dice.randrange(20)),
        "tea" * dice.randrange(9),
    ]  # fmt: skip
    if depth < 3:
        kinds.append([plain(dice, depth + 1) for _ in range(dice.randrange(4))])
        kinds.append({str(number): plain(dice, depth + 1) for number in range(dice.randrange(4))})
    return dice.choice(kinds)


def body(dice: random.Random) -> bytes:
    """Make up arguments: such as fit, such as do not, such as once were some, or no such thing."""
    match dice.randrange(4):
        case 0:
            return msgspec.msgpack.encode([["tea", dice.randrange(9)], {"note": "x"}])
        case 1:
            return msgspec.msgpack.encode([[plain(dice) for _ in range(dice.randrange(4))], {}])
        case 2:
            good = bytearray(msgspec.msgpack.encode([["tea", 2], {"note": "x"}]))
            good[dice.randrange(len(good))] = dice.randrange(256)
            return bytes(good)
        case _:
            return dice.randbytes(dice.randrange(200))


class Attack:
    """One thread's part of it."""

    def __init__(self, path: str, seed: int) -> None:
        self.path = path
        self.dice = random.Random(seed)
        self.tally: Counter[str] = Counter()
        self.line: socket.socket | None = None
        self.number = 0
        self.kept: list[socket.socket] = []

    def run(self, count: int) -> None:
        for _ in range(count):
            self.tally["calls"] += 1
            try:
                self.call()
            except TimeoutError:
                raise AssertionError("the server left a call without an answer") from None
            except OSError:
                self.tally["cut off"] += 1
                self.hang_up()
        self.hang_up()
        while self.kept:
            self.kept.pop().close()

    def hang_up(self) -> None:
        if self.line is not None:
            self.line.close()
        self.line = None

    def open(self) -> socket.socket:
        with byhand.reach(self.path) as door:
            byhand.receive(door).close()
            line, _ = byhand.dial(door)
        if line is None:
            self.tally["refused"] += 1
            raise ConnectionRefusedError
        line.settimeout(PATIENCE)
        self.number = 0
        return line

    def call(self) -> None:
        if self.line is None:
            self.line = self.open()
        self.number += 1
        if self.dice.randrange(200) == 0:
            self.offend(self.line)
            return
        self.line.send(byhand.frame_bytes("Q", self.number, body(self.dice)), socket.MSG_NOSIGNAL)
        answer = self.line.recv(1 << 16)
        self.tally["answered" if answer[:1] == b"R" else "failed" if answer[:1] == b"F" else "ended"] += 1
        if answer[:1] not in (b"R", b"F"):
            self.hang_up()

    def offend(self, line: socket.socket) -> None:
        """Say what nobody may say; then go, or stay and be silent."""
        self.tally["offences"] += 1
        good = byhand.frame_bytes("Q", self.number, body(self.dice))
        spoilt = bytearray(good)
        spoilt[self.dice.randrange(40)] ^= 1 << self.dice.randrange(8)
        match self.dice.randrange(6):
            case 0:
                line.send(bytes(spoilt), socket.MSG_NOSIGNAL)
            case 1:
                line.send(good[: self.dice.randrange(len(good))], socket.MSG_NOSIGNAL)
            case 2:
                line.send(byhand.frame_bytes("Q", self.number + 7, b"x"), socket.MSG_NOSIGNAL)
            case 3:
                byhand.send(line, good, [0] * self.dice.randrange(1, 20))
            case 4:
                line.send(self.dice.randbytes(self.dice.randrange(1, 5000)), socket.MSG_NOSIGNAL)
            case _:
                line.send(good, socket.MSG_NOSIGNAL)  # and the answer is not read
        self.line = None
        self.kept.append(line)
        if len(self.kept) > 20:
            self.kept.pop(self.dice.randrange(len(self.kept))).close()


def attack(path: str, count: int, seed: int) -> dict[str, int]:
    """Call so often, with several threads; return what came of it."""
    attacks = [Attack(path, seed + number) for number in range(THREADS)]
    failures: list[BaseException] = []

    def work(one: Attack) -> None:
        try:
            one.run(count // THREADS + 1)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in attacks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return dict(sum((one.tally for one in attacks), Counter()))


# -- the other user ----------------------------------------------------------------------------------


def begin_calling(path: str) -> None:
    here.proxy, here.times, here.errors = Proxy(path, server={0}, timeout=PATIENCE), [], []
    here.stopping = False

    def work() -> None:
        while not here.stopping:
            begun = time.perf_counter()
            try:
                assert here.proxy("tea", 2) == "2 tea"
            except Exception as error:
                here.errors.append(repr(error))
            here.times.append(time.perf_counter() - begun)
            time.sleep(0.001)

    here.caller = threading.Thread(target=work, daemon=True)
    here.caller.start()


def calls_made() -> int:
    return len(here.times)


def take_times() -> tuple[int, float, float, list[str]]:
    """How many calls there were since the last look; the median and the p99 of their times; errors."""
    times, here.times = sorted(here.times), []
    return len(times), times[len(times) // 2], times[int(len(times) * 0.99)], here.errors[:3]


def stop_calling() -> None:
    here.stopping = True
    here.caller.join(PATIENCE)
    here.proxy.close()


@pytest.mark.timeout(3600)
def test_a_stranger_calls_a_million_times_and_nobody_else_notices(actor, path, many, capsys):
    count = many(12_000, 1_000_000)
    server, stranger, other = actor(0), actor(STRANGER), actor(OTHER)
    server(serve, path)
    other(begin_calling, path)
    wait_until(lambda: other(calls_made) >= many(500, 5000), timeout=60)
    _, _, quiet, errors = other(take_times)
    assert not errors
    before, lines = server(descriptors), len(server(logged))
    begun = time.monotonic()
    end = stranger.begin(attack, path, count, seed=many(1, 54_321))
    tally = end(timeout=many(120, 3000))
    took = time.monotonic() - begun
    made, _, busy, errors = other(take_times)
    assert not errors, "another user's call was lost"
    assert made > many(20, 1000)
    slack = many(SLACK, 0.0)
    assert busy <= max(10 * quiet, slack), f"p99 {busy * 1000:.1f} ms, and {quiet * 1000:.1f} ms unloaded"
    assert tally["calls"] >= count
    assert tally["answered"] > count / 2
    ran, misfits, threads = server(state)
    assert not misfits
    assert ran > count / 10
    assert threads <= 64
    wait_until(lambda: server(channels) <= 1, timeout=PATIENCE)
    wait_until(lambda: server(descriptors) <= before + 4, timeout=PATIENCE)
    assert len(server(logged)) - lines <= 10 + 10 * took / 5, "one line for each event, not for each offender"
    other(stop_calling)
    if count >= 1_000_000:
        words = f"p99 of {made} calls {busy * 1e3:.2f} ms, unloaded {quiet * 1e3:.2f} ms"
        with capsys.disabled():
            print(f"\n{tally} in {took:.0f} s; {words}")
