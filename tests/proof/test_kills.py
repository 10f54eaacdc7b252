"""
Kill -9 at every step: what the survivor is told, whether the procedure ran, and what comes back.

``TABLE`` says, for each place at which the client and the server can be (support.steps), what
happens if either of them is killed there.  Each row is played with the server as the victim and
with the client; alone, with a forked child of the victim that goes on holding every descriptor
it had, and with a program that it has started.  The survivor is the same process in all rows,
so what a row leaves behind is found; it is also one end of another call (the canary's), which is
under way meanwhile and must go well.

A hang-up tells of a death at once, and it is compared with what a raw socket sees of the same
one.  Where a forked child hides it, the pidfd tells, twice a second.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import queue
import signal
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
from support import steps
from support.stage import ALONE, FORKED, PROMPTLY, SUBPROCESS, Player, Stage, wait_ended
from support.steps import IN_PROCEDURE

RESULT = "result"  # what a client is told that is told no error
LONG = 3 << 20  # bytes: several sends and receives
OF_A_NAME = 2  # descriptors: of its listener and its directory
SHORTLY = 0.3  # seconds until a client gives up that shall

BROKEN, REVOKED, LATE = "BrokenDoorError", "RevokedError", "CallTimeoutError"


@attrs.frozen
class Row:
    """
    One row of the table.

    Attributes:
        client: the step at which the client is; "": wherever the other's step leads it.
        server: likewise.
        told: if the server dies: ``may_have_run`` of the client's error, or ``RESULT``.
        ran: if the server dies: how often the procedure has run.
        ran_on: if the client dies: how often it will have run.
        errors: the names of the errors that may be.
        request, reply: more bytes.
        timeout: of the call.
        revoke: have the door revoked when the client has reached its step.
        nth: the how-manyeth time the client comes to its step.
    """

    client: str
    server: str
    told: bool | str
    ran: int
    ran_on: int
    errors: tuple[str, ...] = (BROKEN,)
    request: int = 0
    reply: int = 0
    timeout: float | None = None
    revoke: bool = False
    nth: int = 1

    def __str__(self) -> str:
        return f"client {self.client or '...'}, server {self.server or '...'}"


TABLE = [
    # client             server         told   ran  ran_on
    #
    # Nobody has knocked, or nobody was let in.
    Row("", "accepted", False, 0, 0),
    Row("", "greeted", False, 0, 0),
    Row("dialling", "", False, 0, 0),
    Row("", "knock-heard", False, 0, 0),
    Row("", "answering", False, 0, 0),
    Row("knock-sent", "", False, 0, 0),
    # A channel, and no request that was read.
    Row("", "answer-sent", False, 0, 0),
    Row("answer-heard", "", False, 0, 0),
    Row("channel-opened", "", False, 0, 0),
    Row("channel-opened", "joined", False, 0, 0),
    Row("request-begun", "", False, 0, 0),
    Row("part-sent", "", False, 0, 0, request=LONG),
    Row("", "part-read", False, 0, 0, request=LONG),
    Row("request-sent", "answer-sent", False, 0, 0),
    Row("still-waiting", "answer-sent", False, 0, 0),
    # A request that was read: nobody can know any more that it will not run.  A server that
    # finds its client dead when it looks does not run it.
    Row("", "request-read", True, 0, 0),
    Row("", "call-taken", True, 0, 1),
    Row("", "procedure-begins", True, 0, 1),
    Row("", IN_PROCEDURE, True, 1, 1),
    Row("request-sent", IN_PROCEDURE, True, 1, 1),
    Row("still-waiting", IN_PROCEDURE, True, 1, 1),
    Row("", "procedure-ended", True, 1, 1),
    Row("", "replying", True, 1, 1),
    Row("", "part-sent", True, 1, 1, reply=LONG),
    Row("part-read", "", True, 1, 1, reply=LONG),
    # A reply that was sent whole arrives, whatever becomes of its sender.
    Row("request-sent", "reply-sent", RESULT, 1, 1),
    Row("reply-read", "reply-sent", RESULT, 1, 1),
    Row("reply-read", "lingering", RESULT, 1, 1),
    Row("reply-read", "parking", RESULT, 1, 1),
    Row("reply-read", "parked", RESULT, 1, 1),
    Row("given-back", "parked", RESULT, 1, 1, nth=2),
    Row("closing", "parked", RESULT, 1, 1),
    # Giving up.
    Row("given-up", "answer-sent", False, 0, 0, errors=(LATE,), timeout=SHORTLY),
    Row("given-up", "request-read", True, 0, 0, errors=(LATE,), timeout=SHORTLY),
    Row("given-up", IN_PROCEDURE, True, 1, 1, errors=(LATE,), timeout=SHORTLY),
    # The door is taken away.  The client has opened it and calls afterwards.
    Row("request-begun", "revoked", False, 0, 0, revoke=True),
    Row("request-begun", "farewell-said", False, 0, 0, errors=(BROKEN, REVOKED), revoke=True),
    Row("request-begun", "goodbye-said", False, 0, 0, errors=(REVOKED,), revoke=True),
]


class Play:
    """
    The survivors of all rows, and one row after the other.

    Args:
        stage: the parent of all players; may be shared.
        folder: for doors and the journal.
        number: of the first call; the others count on from there.
    """

    def __init__(self, stage: Stage, folder: Path, number: int) -> None:
        self.stage = stage
        self.folder = folder
        self.numbers = itertools.count(number)
        self.journal = folder / f"journal-{number}"
        self.raw: list[float] = []  # seconds in which a raw socket has seen deaths
        self.seen: list[float] = []  # seconds in which survivors have, where nothing hides them
        self.wrong: list[str] = []
        self.hopeless = False
        self.server = self.start("server")
        self.client = self.start("client")
        canary = str(folder / f"canary-{number}")
        self.server.ask("open_canary", canary)
        self.client.ask("open_canary", canary)
        with self.canary_under_way():
            pass
        for survivor in (self.server, self.client):
            survivor.ask("remember", "at first")

    def finish(self) -> None:
        """Look whether the survivors have no more than at first, and close what they have."""
        if self.hopeless:
            return
        for name, survivor in (("client", self.client), ("server", self.server)):
            left, _ = survivor.ask("settle", "at first", 0, 0, PROMPTLY)
            self.wrong += [f"after all rows the {name} has: {what}" for what in left]
        for survivor in (self.client, self.server):
            survivor.ask("finish")

    def end(self) -> None:
        """End the survivors."""
        self.client.close()
        self.server.close()

    def start(self, role: str) -> Player:
        return self.stage.start(role, str(self.journal))

    def canary_under_way(self) -> Canary:
        return Canary(self)

    @property
    def slack(self) -> float:
        """What a busy machine may take beyond the second."""
        return 20 * statistics.median(self.raw) if self.raw else 1.0

    def ran(self, number: int) -> int:
        """How often the procedure has run for a call."""
        return collections.Counter(self.journal.read_text().split())[str(number)]

    # -- one row

    def play(self, row: Row, killed: str, company: str, reaped: bool) -> None:
        """Play a row, and take down what was wrong with it."""
        if self.hopeless:
            return
        number = next(self.numbers)
        scene = Scene(self, row, killed, company, reaped, number)
        try:
            with self.canary_under_way() as canary:
                scene.play()
            scene.wrong += canary.wrong
        except AssertionError as error:
            scene.wrong.append(f"{error}")
            self.hopeless = True  # they are somewhere else than the next row would have them
        finally:
            scene.close()
        self.wrong += [f"{killed} killed {company}; {row}: {what}" for what in scene.wrong]


class Canary:
    """A call of the one survivor that the other answers, under way while somebody else is killed."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.wrong: list[str] = []

    def __enter__(self) -> Canary:
        self.play.client.tell("sing", 7)
        self.play.server.hear("held")
        return self

    def __exit__(self, *_: object) -> None:
        self.play.server.ask("let_go")
        went_well, text = self.play.client.hear("canary")
        if not went_well:
            self.wrong.append(f"the canary: {text}")


class Scene:
    """One row, once."""

    def __init__(
        self, play: Play, row: Row, killed: str, company: str, reaped: bool, number: int
    ) -> None:  # fmt: skip
        self.all = play
        self.row = row
        self.company = company
        self.reaped = reaped  # or a zombie still, while the survivor looks at it
        self.number = number
        self.path = str(play.folder / f"{number}.door")
        self.wrong: list[str] = []
        self.holder = -1  # pidfd of the company
        self.client_dies = killed == "client"
        self.victim = play.start(killed)
        self.survivor = play.server if self.client_dies else play.client
        self.client, self.server = (
            (self.victim, self.survivor) if self.client_dies else (self.survivor, self.victim)
        )

    def play(self) -> None:
        row = self.row
        self.server.ask("open", self.path)
        for player in (self.client, self.server):
            player.ask("remember", "before")
        victims_step = row.client if self.client_dies else row.server
        at_once = self.company == ALONE and victims_step != "" and "" in (row.client, row.server)
        self.prepare(at_once)
        self.client.tell("call", self.path, self.number, row.request, row.reply, row.timeout)
        self.wait_for_steps(at_once)
        died = self.kill(at_once)
        if self.client_dies:
            self.look_at_server(died)
        else:
            self.look_at_client(died)

    def prepare(self, at_once: bool) -> None:
        """Say who stops where."""
        for player, step in ((self.server, self.row.server), (self.client, self.row.client)):
            nth = self.row.nth if player is self.client else 1
            if not step:
                continue
            if player is self.victim and at_once:
                player.ask("at", step, nth, self.company)
            elif step == IN_PROCEDURE and self.client_dies:
                player.ask("watch")
            else:
                player.ask("at", step, nth, None)

    def wait_for_steps(self, at_once: bool) -> None:
        if self.row.client and not at_once:
            self.client.hear("at")
        if self.row.revoke:
            self.server.ask("revoke", self.path)
        if self.row.server and not at_once:
            self.server.hear("at")

    def kill(self, at_once: bool) -> float:
        """Return when the victim was killed, and have a raw socket see it too."""
        if not at_once:
            self.victim.tell("die", self.company)
        died, pid = self.victim.hear("dying")
        if pid:
            self.holder = os.pidfd_open(pid)
        # A forked child holds the control socket too, and hides the hang-up there as well.
        seen = self.victim.wait_ended() if self.company == FORKED else self.victim.last_breath()
        self.all.raw.append(seen - died)
        self.victim.wait_ended()
        if self.reaped:
            self.all.stage.reap(self.victim)
        return died

    def look_at_client(self, died: float) -> None:
        """What the client is told of the death of the server, and what it has afterwards."""
        row = self.row
        if row.client:
            died = self.client.ask("go")
        number, kind, may_have_run, text, heard = self.client.hear("outcome")
        assert number == self.number, "the outcome of another call"
        told = RESULT if kind == RESULT else may_have_run
        if told != row.told:
            self.wrong.append(f"told {told!r} and not {row.told!r} ({kind}: {text})")
        if kind != RESULT and kind not in row.errors:
            self.wrong.append(f"told by {kind}: {text}")
        if kind != RESULT:
            self.measure(heard - died, "until the client was told")
        ran = self.all.ran(self.number)
        if ran != row.ran:
            self.wrong.append(f"ran {ran} times and not {row.ran}")
        self.settle("the client", 0)
        # The name that it has left, if any, is no trap.  (Who holds the listener keeps it up.)
        self.end_company()
        self.all.server.ask("open", self.path)
        self.all.server.ask("shut", self.path)

    def look_at_server(self, died: float) -> None:
        """What the server makes of the death of the client, and what it has afterwards."""
        row = self.row
        if row.server == IN_PROCEDURE:
            cancelled, seen = self.server.hear("cancelled")
            if row.timeout is None:  # else it was told when he gave up
                self.measure(seen - died, "until the procedure could know")
            if not cancelled:
                self.wrong.append("the procedure was never told")
        if row.server:
            died = self.server.ask("go")
        # Whoever holds a descriptor of a door has a right to it, and its port is there for him.
        seen = self.settle("the server", int(self.company == FORKED))
        if row.server != IN_PROCEDURE:  # that has been measured
            self.measure(seen - died, "until the server had all back")
        if self.company == FORKED:
            self.end_company()
            self.settle("the server, nobody being left,", 0)
        ran = self.all.ran(self.number)
        if ran != row.ran_on:
            self.wrong.append(f"ran {ran} times and not {row.ran_on}")

    def settle(self, whose: str, come: int) -> float:
        gone = OF_A_NAME if self.row.revoke and self.client_dies else 0
        left, when = self.survivor.ask("settle", "before", come, gone, PROMPTLY + self.all.slack)
        self.wrong += [f"{whose} has: {what}" for what in left]
        return float(when)

    def measure(self, seconds: float, what: str) -> None:
        stood_still = self.row.server if self.client_dies else self.row.client
        if self.company != FORKED and stood_still in ("", IN_PROCEDURE):
            self.all.seen.append(seconds)
        if seconds > PROMPTLY + self.all.slack:
            self.wrong.append(f"{seconds:.3f} s {what}")

    def end_company(self) -> None:
        if self.holder >= 0:
            signal.pidfd_send_signal(self.holder, signal.SIGKILL)
            wait_ended(self.holder)
            os.close(self.holder)
            self.holder = -1

    def close(self) -> None:
        self.end_company()
        self.victim.close()
        if self.client_dies:
            self.server.ask("shut", self.path)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """The parent of all players, for all tests of this file."""
    with Stage() as stage:
        yield stage
        errors = stage.process.stderr
    assert "Traceback" not in errors, errors


def test_every_step_is_in_the_table():
    in_table = {step for row in TABLE for step in (row.client, row.server)} - {""}
    assert in_table == {*steps.STEPS, IN_PROCEDURE}


def perform(
    stage: Stage, folder: Path, killed: str, company: str, rounds: int, at_a_time: int
) -> tuple[list[str], float, float]:
    """
    Play the table several times, some rows at once with survivors of their own.

    Returns:
        What was wrong, and the medians of the seconds in which a raw socket has seen deaths, and
        survivors have where nothing hides them.
    """
    free: queue.SimpleQueue[Play] = queue.SimpleQueue()

    def one(row: Row, reaped: bool) -> None:
        play = free.get()
        try:
            play.play(row, killed, company, reaped)
        finally:
            free.put(play)

    rows = TABLE * rounds
    with contextlib.ExitStack() as stack:
        every = [Play(stage, folder, (n + 1) * 1_000_000) for n in range(at_a_time)]
        for play in every:
            stack.callback(play.end)
            free.put(play)
        threads = stack.enter_context(ThreadPoolExecutor(at_a_time))
        for done in [threads.submit(one, row, bool((n + n // len(TABLE)) % 2)) for n, row in enumerate(rows)]:
            done.result()
        for play in every:
            play.finish()
    raw = statistics.median(seconds for play in every for seconds in play.raw)
    seen = statistics.median([seconds for play in every for seconds in play.seen] or [0.0])
    return [what for play in every for what in play.wrong], raw, seen


@pytest.mark.parametrize(
    "company",
    [ALONE, pytest.param(FORKED, marks=pytest.mark.ids("E05")), SUBPROCESS],
)
@pytest.mark.parametrize(
    "killed",
    [
        pytest.param("server", marks=pytest.mark.ids("E01", "E08", "X9", "X10", "X11", "D13", "L14")),
        pytest.param("client", marks=pytest.mark.ids("E03", "E04", "U12")),
    ],
)
def test_the_table(stage, door_dir, many, killed, company):
    at_a_time = 4 if company == FORKED else 1  # most of those just wait, half a second each
    rounds = many(1, 45)
    wrong, raw, seen = perform(stage, door_dir, killed, company, rounds, at_a_time)
    print(f"{killed} killed {company}: a raw socket {raw * 1e3:.3f} ms, the survivor {seen * 1e3:.3f} ms")
    assert not wrong, "\n".join(wrong)
    assert seen < 20 * raw
