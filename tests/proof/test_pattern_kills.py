"""
Kill -9 of any one of those who take part in a pattern: the others go on, and nothing is left behind.

The patterns are those of the examples (``support.patterns``).  In each row of ``ROWS`` a client, a router
or a server dies at a step.  Then

- whoever was using the pattern just then is told so, or does not notice;
- a bystander, who has had a session, a file or half of a stream all the time, still has it, unless it was the
  victim's;
- the next one, in the victim's place, finds no trap: not its name, and nothing that the dead one held;
- the survivors have no more descriptors, threads, mappings, channels, doors, sessions and generators than
  before, and the directory no more files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from support.patterns import CLIENTS, MADE, ROUTERS
from support.stage import ALONE, PATIENCE, Player, Stage
from support.steps import GIVING, HOLDING, IN_CALLBACK, IN_PROCEDURE, MID_STREAM, WITH_FILE

pytest.importorskip("numpy")

SOON = 10.0  # seconds in which all comes back; mostly it takes some milliseconds

RESULT, BROKEN = "result", "BrokenDoorError"


@attrs.frozen
class Row:
    """
    One row of the table.

    Attributes:
        pattern: which.
        victim: "client", "router" or "server".
        step: at which it dies; ``nth``: the how-manyeth time it comes there.
        told: what whoever is using the pattern is told, unless he is the victim.
        held: what the bystander is told when he uses what he has.
    """

    pattern: str
    victim: str
    step: str
    nth: int = 1
    told: str = BROKEN
    held: str = RESULT

    def __str__(self) -> str:
        return f"{self.pattern}-{self.victim}-{self.step}-{self.nth}"


#: Who holds what, by pattern: a file is the holder's own, a door dies with its server, and a proxy that was
#: opened by path is opened anew when there is a server again.
FILES = ("08_file_through_a_door", "13_privileged_helper")
DOORS = (
    "09_door_through_a_door", "11_session_per_client", "12_singleton_daemon", "14_router", "16_stream_a_log",
)  # fmt: skip

#: The steps of the clients' own.
MIDST = {
    "08_file_through_a_door": (WITH_FILE,),
    "09_door_through_a_door": (HOLDING,),
    "11_session_per_client": (HOLDING,),
    "12_singleton_daemon": (HOLDING,),
    "13_privileged_helper": (WITH_FILE,),
    "14_router": (HOLDING,),
    "15_callbacks_and_progress": (HOLDING, IN_CALLBACK),
    "16_stream_a_log": (MID_STREAM,),
    "17_shared_model": (HOLDING,),
    "arguments": (GIVING, WITH_FILE),
    "lock": (HOLDING,),
}

#: How many calls of its own server a client makes; with the only one, or the last, he has all he wants.
CALLS = {
    "08_file_through_a_door": 1,
    "09_door_through_a_door": 1,
    "11_session_per_client": 3,
    "12_singleton_daemon": 2,
    "13_privileged_helper": 1,
    "14_router": 1,
    "15_callbacks_and_progress": 1,
    "16_stream_a_log": 4,
    "17_shared_model": 1,
    "arguments": 1,
    "lock": 4,
}


def rows() -> Iterator[Row]:
    for pattern, steps in MIDST.items():
        for step in ("channel-opened", "request-sent", "reply-read", "closing", *steps):
            yield Row(pattern, "client", step, told="")
        held = RESULT if pattern in FILES else BROKEN
        for nth in range(1, min(CALLS[pattern], 2) + 1):
            for step in ("request-read", "replying"):
                yield Row(pattern, "server", step, nth, held=held)
            told = RESULT if CALLS[pattern] == nth else BROKEN
            yield Row(pattern, "server", "reply-sent", nth, told, held)
        if pattern not in ROUTERS:  # behind which nobody comes to the server's name
            yield Row(pattern, "server", "accepted", held=held)
        if pattern not in ("11_session_per_client", "12_singleton_daemon"):  # which say nothing there
            yield Row(pattern, "server", IN_PROCEDURE, held=held)
    for pattern in ROUTERS:
        for step in ("accepted", "request-read", IN_PROCEDURE, "replying"):
            yield Row(pattern, "router", step)
        yield Row(pattern, "router", "reply-sent", told=RESULT)


ROWS = list(rows())


class Cast:
    """All who take part in a pattern; whoever dies is followed by another."""

    def __init__(self, stage: Stage, folder: Path, pattern: str) -> None:
        self.stage, self.folder, self.pattern = stage, folder, pattern
        self.players: dict[str, Player] = {}
        self.wrong: list[str] = []
        self.seconds: list[float] = []  # from a death until the client had an end

    def begin(self) -> None:
        """Have everybody come, and use what they have."""
        for name in ("server", *([ROUTERS[self.pattern]] if self.pattern in ROUTERS else [])):
            self.enter(name)
        self.bystander = self.enter("bystander")
        self.bystander.ask("hold")
        self.bystander.ask("work")
        self.bystander.ask("held")
        self.enter("client").ask("work")
        self.files = sorted(os.listdir(self.folder))
        for player in self.players.values():
            player.ask("remember")

    def close(self) -> None:
        for player in self.players.values():
            player.close()

    def enter(self, name: str) -> Player:
        """Have somebody come; with him what the dead one had made in the directory goes."""
        if name in ("bystander", "client"):
            role, args = "Guest", ()
        else:
            if name == "server" and self.pattern in MADE:
                shutil.rmtree(self.folder / MADE[self.pattern], ignore_errors=True)
            role, args = "Script", (name,)
        player = self.players[name] = self.stage.start(role, str(self.folder), self.pattern, *args)
        if role == "Script":
            player.hear("serving")
        return player

    def finish(self) -> None:
        """Have the bystander leave; the daemon is needed by nobody then."""
        self.bystander.ask("let_go")
        if self.pattern == "12_singleton_daemon":
            self.players["server"].hear("over")
            assert os.listdir(self.folder) == []
        slowest = max(self.seconds, default=0.0)
        print(f"{self.pattern}: told within {slowest:.3f} s")
        assert slowest < SOON

    # -- one row

    def play(self, row: Row) -> None:
        """Play a row, and take down what was wrong with it."""
        name = ROUTERS[self.pattern] if row.victim == "router" else row.victim
        victim = self.players.pop(name)
        try:
            told = self.kill(row, victim)
        finally:
            victim.close()
        held = self.bystander.ask("held")
        self.enter(name)
        if name not in ("server", "client") or (held != RESULT and self.pattern in DOORS):
            # He has lost it, or has the last copy of what the router had; the server would keep its port.
            self.bystander.ask("let_go")
            self.bystander.ask("hold")
        self.players["client"].ask("work")
        wrong = [f"the bystander is not served: {it}" for it in [self.bystander.ask("held")] if it != RESULT]
        for who, player in self.players.items():
            if who != name:
                wrong += [f"the {who} has {what}" for what in player.ask("surplus", SOON)[0]]
        self.players[name].ask("remember")
        if sorted(os.listdir(self.folder)) != self.files:
            wrong.append(f"in the directory are {os.listdir(self.folder)}, and {self.files} before")
        if told != row.told:
            wrong.append(f"the client was told {told}, not {row.told}")
        if held != row.held:
            wrong.append(f"the bystander was told {held}, not {row.held}")
        print(f"{row}: {told}, {held}", *wrong)
        self.wrong += [f"{row}: {it}" for it in wrong]

    def kill(self, row: Row, victim: Player) -> str:
        """Have the client work, and the victim die of it; return what the client was told."""
        victim.ask("at", row.step, row.nth, ALONE)
        client = victim if row.victim == "client" else self.players["client"]
        client.tell("begin")
        told, when = ("", 0.0) if client is victim else client.hear("outcome")
        if not victim.has_ended(PATIENCE):
            self.wrong.append(f"{row}: it never came to its step")
        elif client is not victim:
            died, _ = victim.hear("dying")
            self.seconds.append(when - died)
        return str(told)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """The parent of all players, for all tests of this file."""
    with Stage("numpy", "support.patterns") as stage:
        yield stage
        errors = stage.process.stderr
    assert "Traceback" not in errors, errors


@pytest.mark.leaves_names
@pytest.mark.ids("E01", "E03", "E08", "C09", "C10", "F10", "F18", "U12", "N3")
@pytest.mark.parametrize("pattern", CLIENTS)
def test_somebody_is_killed(stage, door_dir, pattern):
    cast = Cast(stage, door_dir, pattern)
    try:
        cast.begin()
        for row in ROWS:
            if row.pattern == pattern:
                cast.play(row)
        cast.finish()
    finally:
        cast.close()
    assert not cast.wrong, "\n".join(cast.wrong)
