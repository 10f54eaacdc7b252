"""
Users of one data door in any order: they open, call, pass, flood, freeze, die and fork; the server restarts.

Invariants after each step: a call has its own result, or an error that says truly whether it may have run
(N2); none ran twice (N3); each ends (N4); no uid has more than its share (N10); and our own user is always
served.
"""

from __future__ import annotations

import ast
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.actors import Actor, here

from doorpool import Descriptor, DoorError, Limits, Proxy, Server

PATIENCE = 10.0
CHANNELS, MOST_RUNNING = 6, 2
UIDS = (6701, 6702, 0)  # the last is the server's own

pytestmark = pytest.mark.usefixtures("root_only")


def serve(path: str, journal: str) -> None:
    """Serve what writes down which calls it ran, beside itself, so that its death loses none."""
    number = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(call: int, *given: Descriptor) -> list[int]:
        os.write(number, b"%d\n" % call)
        return [call, len(given)]

    def hand_out(_: int) -> Any:
        return here.endpoint

    limits = Limits(channels=CHANNELS, running=MOST_RUNNING)
    here.server = Server(max_threads=8, limits=limits)
    here.endpoint = here.server.attach(note, path, codec="data", mode=0o666)
    here.server.attach(hand_out, f"{path}.other", codec="data", mode=0o666)
    here.server.start()


def usage() -> list[tuple[int | None, int, int]]:
    users = here.server.statistics().users
    return [(uid, it.channels, it.running) for uid, it in users.items()]


def call(path: str, number: int, fds: int = 0, *, passed: bool = False) -> list[int] | str | None:
    """Call, by the door at a path or one that is passed; None: it has not run, "?": it may have."""
    given = [Descriptor(os.open(os.devnull, os.O_RDONLY)) for _ in range(fds)]
    try:
        if getattr(here, "proxy", None) is None:
            here.proxy = Proxy(path, server={0}, timeout=PATIENCE)
        if passed:
            with Proxy(f"{path}.other", server={0}, timeout=PATIENCE) as other, other(0) as proxy:
                return list(proxy.options(timeout=PATIENCE)(number, *given))
        return list(here.proxy(number, *given))
    except DoorError as error:
        return "?" if error.may_have_run else None
    finally:
        for one in given:
            one.close()


def call_in_child(path: str, number: int) -> list[int] | str | None:
    """Call from a forked child, by the proxy of its parent."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, repr(call(path, number)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        said = file.read()
    os.waitpid(pid, 0)
    return ast.literal_eval(said)


def flood(path: str) -> int:
    """Open until somebody says no, and keep it open."""
    here.open = getattr(here, "open", [])
    for _ in range(2 * CHANNELS):
        try:
            here.open.append(Proxy(path, server={0}, timeout=PATIENCE))
        except DoorError:
            break
    return len(here.open)


def close_all() -> None:
    for proxy in [here.proxy] if getattr(here, "proxy", None) else []:
        proxy.close()
    for proxy in getattr(here, "open", []):
        proxy.close()
    here.proxy, here.open = None, []


USER = st.sampled_from(range(len(UIDS)))


class Neighbours(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="dp-")
        os.chmod(self.folder.name, 0o755)
        self.path = f"{self.folder.name}/a.door"
        self.journal = Path(f"{self.folder.name}/journal")
        self.numbers = itertools.count(1)
        self.ran: set[int] = set()
        self.not_run: set[int] = set()
        self.frozen: set[int] = set()
        self.server = self.start()
        self.users = [Actor(uid or None) for uid in UIDS]

    def start(self) -> Actor:
        server = Actor()
        server(serve, self.path, str(self.journal))
        return server

    def keep(self, number: int, outcome: Any, fds: int = 0) -> None:
        if outcome is None:
            self.not_run.add(number)
        elif outcome != "?":
            assert outcome == [number, fds]
            self.ran.add(number)

    @rule(user=USER, fds=st.sampled_from([0, 0, 1, 5]), passed=st.booleans())
    def call(self, user: int, fds: int, passed: bool) -> None:
        if user not in self.frozen:
            number = next(self.numbers)
            self.keep(number, self.users[user](call, self.path, number, fds, passed=passed), fds)

    @rule(user=USER)
    def fork(self, user: int) -> None:
        if user not in self.frozen:
            number = next(self.numbers)
            self.keep(number, self.users[user](call_in_child, self.path, number))

    @rule(user=USER)
    def flood(self, user: int) -> None:
        if user not in self.frozen:
            self.users[user](flood, self.path)

    @rule(user=USER)
    def close(self, user: int) -> None:
        if user not in self.frozen:
            self.users[user](close_all)

    @rule(user=USER)
    def kill(self, user: int) -> None:
        self.users[user].close()
        self.users[user] = Actor(UIDS[user] or None)
        self.frozen.discard(user)

    @rule(user=USER)
    def stop(self, user: int) -> None:
        if user not in self.frozen:
            self.users[user].stop()
            self.frozen.add(user)

    @precondition(lambda self: self.frozen)
    @rule()
    def cont(self) -> None:
        self.users[self.frozen.pop()].cont()

    @rule(gently=st.booleans())
    def restart(self, gently: bool) -> None:
        if gently:
            self.server(close_server)
        self.server.close()
        self.server = self.start()

    @invariant()
    def shares_hold(self) -> None:
        for uid, channels, running in self.server(usage):
            assert uid in UIDS[:2]
            assert channels <= CHANNELS
            assert running <= MOST_RUNNING

    @invariant()
    def the_journal_agrees(self) -> None:
        lines = self.journal.read_text().split() if self.journal.exists() else []
        found = list(map(int, lines))
        assert len(found) == len(set(found)), "a call ran twice"
        assert self.ran <= set(found), "a call has a result and has not run"
        assert not self.not_run & set(found), "a call ran that was said not to have"

    @invariant()
    def our_own_are_served(self) -> None:
        if len(UIDS) - 1 not in self.frozen:
            number = next(self.numbers)
            outcome = self.users[-1](call, self.path, number)
            assert outcome == [number, 0]
            self.ran.add(number)

    def teardown(self) -> None:
        for one in (*self.users, self.server):
            one.close()
        self.folder.cleanup()


def close_server() -> None:
    here.server.close(1)


@pytest.mark.ids("H05")
@pytest.mark.timeout(36_000)
def test_neighbours_in_any_order_keep_to_their_shares_and_lose_no_call(many):
    run_state_machine_as_test(
        Neighbours,
        settings=settings(
            max_examples=many(3, 2_000), stateful_step_count=many(15, 50), deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
