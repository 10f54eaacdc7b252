"""
Kill -9 of clients, servers, routers and workers, ten thousand times: at steps that have names, and at random.

The household (``support.household``) lives on in all its other members.  ``TABLE`` names, for each kind of
victim, what is being done and at which step the victim dies of it; each row is hit on purpose, as often as
every other.  Beside them are kills at random moments, while others call.  After each kill

- every survivor answers within a second: whoever was in the middle of a call is told how it ended, and a
  fresh call goes well;
- no survivor has more descriptors, threads, mappings, channels, doors and workers than at first.

And at the end: no process and no file is left, and the journal of what ran agrees with what everybody was
told, at most one run a call.

The short form is in the suite.  All of it:

    python -m pytest --long -s tests/proof/test_many_kills.py
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import queue
import random
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest

pytest.importorskip("numpy")

from support.household import ACTS, HUB, NUMBERS, ROUTER, VICTIM
from support.journal import INTERRUPTED, RESULT, Books, Journal
from support.stage import ALONE, PATIENCE, PROMPTLY, Player, Stage
from support.steps import GIVING, HOLDING, IN_CALLBACK, IN_PROCEDURE, MID_STREAM, WITH_FILE

_SLACK = 20  # times what the machine itself stood still: as often is somebody woken in between

AT_RANDOM = ""
AT_A_TIME = 2  # households
SLOW = 0.01  # seconds within which a random kill comes, mostly in the middle
SOON = 10.0  # seconds until what a survivor still has is a leak

#: How an act may end for whoever calls the victim; by way of the hub that of a worker is a ``RemoteError``.
ENDS = (RESULT, "BrokenDoorError", "RemoteError")

#: What each kind of victim is, in ``support.household``.
ROLES = {"client": "Caller", "server": "Hub", "router": "Switch", "worker": "Worker"}

#: The name that it serves.
PATHS = {"server": VICTIM, "router": ROUTER}


@attrs.frozen
class Kill:
    """
    A row of the table.

    Attributes:
        victim: which kind.
        act: what is done meanwhile, by the victim if it is a client, and by the caller with it if not.
        step: where it dies; "": at some moment.
        nth: the how-manyeth time it comes there.
        relieved: another one has its name already, so that a proxy that is kept opens that one.
    """

    victim: str
    act: str
    step: str
    nth: int = 1
    relieved: bool = False

    def __str__(self) -> str:
        relieved = " and relieved" if self.relieved else ""
        return f"{self.victim}{relieved}, {self.act}, {self.step or 'at random'} {self.nth}"


OPENING = ("dialling", "knock-sent", "answer-heard", "channel-opened")
CALLING = ("request-begun", "request-sent", "reply-read", "given-back", "closing")
LETTING_IN = ("knock-heard", "answering", "answer-sent", "joined")
COMING_IN = ("accepted", "greeted", *LETTING_IN)
ANSWERING = ("request-read", "call-taken", "procedure-begins", IN_PROCEDURE, "procedure-ended", "replying")
MIDST = {
    "session": HOLDING, "lock": HOLDING, "stream": MID_STREAM, "generator": GIVING, "borrow": WITH_FILE,
    "hand": WITH_FILE, "callback": IN_CALLBACK,
}  # fmt: skip


def rows() -> Iterator[Kill]:
    for act in ("echo", "array"):
        yield from (Kill("client", act, step) for step in (*OPENING, *CALLING))
        yield from (Kill("server", act, step) for step in (*COMING_IN, *ANSWERING, "reply-sent"))
        yield from (Kill("server", act, step, 1, True) for step in (*ANSWERING, "reply-sent"))
    for victim in ("client", "server"):
        yield from (Kill(victim, "long", step) for step in ("part-sent", "part-read"))
    for act, step in MIDST.items():
        yield from (Kill("client", act, it) for it in (step, "request-sent", "reply-read"))
        yield from (Kill("server", act, it) for it in (IN_PROCEDURE, "replying", "reply-sent"))
    for act in ("session", "lock", "stream"):  # which go on behind the first call
        yield from (Kill("client", act, step, 2) for step in ("request-sent", "reply-read"))
        yield from (Kill("server", act, step, 2) for step in ("request-read", "replying", "reply-sent"))
    yield from (Kill("router", "echo", step) for step in (*COMING_IN, "request-read", "call-taken"))
    yield from (Kill("router", "array", step) for step in ("procedure-begins", "procedure-ended", "replying"))
    yield from (Kill("worker", "enlist", step) for step in (*OPENING, *CALLING))
    yield from (Kill("worker", "employ", step) for step in (*LETTING_IN, *ANSWERING, "reply-sent"))


TABLE = list(rows())


class Metronome:
    """
    How long the machine itself stands still: a thread that wants to be woken every few milliseconds.

    Answers are not late if nobody was given a processor.
    """

    def __init__(self) -> None:
        self._gaps: collections.deque[tuple[float, float]] = collections.deque(maxlen=4000)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat)
        self._thread.start()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.005):
            now = time.monotonic()
            self._gaps.append((now, now - last))
            last = now

    def worst_since(self, when: float) -> float:
        """The longest that it has not been woken for since then, in seconds."""
        return max((gap for at, gap in list(self._gaps) if at >= when), default=0.0)

    def close(self) -> None:
        self._over.set()
        self._thread.join()


class Household:
    """The survivors, and one kill after the other."""

    def __init__(self, stage: Stage, folder: Path, first: int, metronome: Metronome, bound: float) -> None:
        folder.mkdir()
        self.bound = bound  # seconds in which a survivor answers
        self.stage, self.folder, self.metronome = stage, folder, metronome
        self.journal = Journal(folder / "numbers")
        self.books = Books(self.journal)
        self.numbers = itertools.count(first, NUMBERS)
        self.lives = itertools.count(
            first + (1 << 39), 1 << 20
        )  # the first numbers of what goes on meanwhile
        self.wrong: list[str] = []
        self.missed: collections.Counter[str] = collections.Counter()
        self.lived = 0  # calls that went on while somebody was killed
        self.ends: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, list[float]] = {"told": [], "answered": [], "given back": []}
        self.members: list[Player] = []
        self.hub, self.caller, self.worker = (self.enter(role) for role in ("Hub", "Caller", "Worker"))
        self.hub.ask("serve", HUB)
        self.worker.ask("enlist")
        self.warm_up()
        self.files = sorted(os.listdir(folder))
        self.survivors = {"hub": self.hub, "caller": self.caller, "worker": self.worker}
        for survivor in self.survivors.values():
            survivor.ask("remember")

    def enter(self, role: str) -> Player:
        player = self.stage.start(role, str(self.folder))
        self.members.append(player)
        return player

    def warm_up(self) -> None:
        """Do all that will be done, so that what lasts is there, and so are names and a proxy of the dead."""
        victim, router = self.enter("Hub"), self.enter("Switch")
        victim.ask("serve", VICTIM)
        router.ask("serve", ROUTER)
        for path in (HUB, VICTIM, ROUTER):
            for act in ACTS:
                if path == HUB or act != "employ":
                    keep = path == VICTIM or (path == HUB and act not in ("array", "long"))
                    assert self.act(act, path, keep=keep) == RESULT
        for player in (victim, router):
            self.end(player)

    def end(self, player: Player) -> None:
        player.close()
        self.stage.reap(player)
        self.members.remove(player)

    def close(self) -> None:
        for player in list(self.members):
            player.close()
        self.journal.close()

    # -- acts

    def act(self, act: str, path: str, *, keep: bool = False) -> str:
        """Have the caller do something; return how that ended."""
        self.caller.tell("act", act, next(self.numbers), path, keep)
        return self.outcome()[0]

    def outcome(self) -> tuple[str, float]:
        """Hear how an act of the caller has ended, and when; enter its calls into the books."""
        ended, told, when = self.caller.hear("outcome")
        self.books.enter_all(told)
        return str(ended), float(when)

    # -- one kill

    def play(self, kill: Kill) -> None:
        """Kill somebody, and take down what was wrong with it."""
        self.found: list[str] = []
        players = [self.enter(ROLES[kill.victim])]
        try:
            if kill.relieved:
                players.append(self.relieve(*players))
            died = self.kill(kill, players[0])
        finally:
            for player in players:
                self.end(player)
        self.look_at_survivors(died)
        self.wrong += [f"{kill}: {what}" for what in self.found]

    def relieve(self, victim: Player) -> Player:
        """Have the caller open the victim's door, and keep it, and then another one take its name over."""
        victim.ask("serve", VICTIM)
        assert self.act("echo", VICTIM, keep=True) == RESULT
        follower = self.enter(ROLES["server"])
        follower.ask("serve", VICTIM, True)
        return follower

    def kill(self, kill: Kill, victim: Player) -> float:
        """Have the victim take part in the act, and die; return when it did."""
        if kill.victim in PATHS and kill.act != "start" and not kill.relieved:
            victim.ask("serve", PATHS[kill.victim])
        elif kill.act == "employ" and kill.victim == "worker":
            victim.ask("enlist")
        if kill.step:
            victim.ask("at", kill.step, kill.nth, ALONE)
        called = self.begin(kill, victim)
        if not kill.step:
            died = self.kill_at_random(kill, victim)
        ended, when = self.outcome() if called else ("", 0.0)
        if kill.step:
            if not victim.has_ended(PATIENCE):
                self.missed[str(kill)] += 1
                return time.monotonic()
            died = victim.hear("dying")[0]
        if called:
            self.measure("told", died, when)
            self.ends[ended] += 1
            if ended not in ENDS:
                self.found.append(ended)
        return float(died)

    def kill_at_random(self, kill: Kill, victim: Player) -> float:
        """Kill it at some moment, while the caller goes on with other things at the hub."""
        acts = tuple(act for act in ACTS if act != "employ" or kill.victim != "worker")
        self.caller.tell("live", next(self.lives), acts)
        time.sleep(random.uniform(0, SLOW))
        victim.kill()
        died = time.monotonic()
        self.caller.tell("rest")
        trouble, told = self.caller.hear("lived")
        self.books.enter_all(told)
        self.lived += len(told)
        if trouble:
            self.found.append(f"meanwhile, {trouble}")
        return died

    def begin(self, kill: Kill, victim: Player) -> bool:
        """Begin the act; return whether it is the caller's, who will say how it ended."""
        if kill.act == "enlist":
            victim.tell("enlist")
            return False
        if kill.act == "start":  # over the name of the dead one before
            victim.tell("serve", PATHS[kill.victim])
            return False
        if kill.victim == "client":
            first = next(self.numbers)
            self.books.enter_all((number, INTERRUPTED) for number in range(first, first + NUMBERS))
            victim.tell("act", kill.act, first, HUB, False)
            return False
        path = PATHS.get(kill.victim, HUB)
        keep = path == VICTIM and (kill.relieved or not kill.step)
        self.caller.tell("act", kill.act, next(self.numbers), path, keep)
        return True

    def look_at_survivors(self, died: float) -> None:
        """Each has to answer, and to have no more than at first."""
        began = time.monotonic()
        for act in ("echo", "employ"):  # of the hub, and by way of it of the worker
            self.caller.tell("act", act, next(self.numbers), HUB, False)
            ended, when = self.outcome()
            if ended != RESULT:
                self.found.append(f"{act}: {ended}")
            self.measure("answered", began, when)
            began = when
        for name, survivor in self.survivors.items():
            left, when = survivor.ask("surplus", SOON)
            self.found += [f"the {name} has {what}" for what in left]
            self.seconds["given back"].append(when - died)

    def measure(self, what: str, since: float, until: float) -> None:
        seconds = max(0.0, until - since)
        self.seconds[what].append(seconds)
        if seconds > self.bound and seconds > self.bound + _SLACK * self.metronome.worst_since(since):
            self.found.append(f"{what} after {seconds:.3f} s")

    def finish(self) -> collections.Counter[tuple[str, int]]:
        """Look at the whole, when each name was taken over once more; return what the books say."""
        for victim, path in PATHS.items():
            last = self.enter(ROLES[victim])
            last.ask("serve", path)
            self.end(last)
        if sorted(os.listdir(self.folder)) != self.files:
            self.wrong.append(f"in the directory are {os.listdir(self.folder)}, and {self.files} before")
        return self.books.balance()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """The parent of all members."""
    with Stage("numpy", "support.household") as stage:
        yield stage
        errors = stage.process.stderr
    assert "Traceback" not in errors, errors


def children_of(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def perform(stage: Stage, folder: Path, kills: list[Kill], bound: float) -> list[Household]:
    """Kill all of them, in a few households at once."""
    free: queue.SimpleQueue[Household] = queue.SimpleQueue()

    def one(kill: Kill) -> None:
        household = free.get()
        try:
            household.play(kill)
        finally:
            free.put(household)

    with contextlib.ExitStack() as stack:
        metronome = Metronome()
        stack.callback(metronome.close)
        households = []
        for n in range(AT_A_TIME):
            household = Household(stage, folder / f"{n}", (n + 1) << 40, metronome, bound)
            households.append(household)
            stack.callback(household.close)
            free.put(household)
        threads = stack.enter_context(ThreadPoolExecutor(AT_A_TIME))
        for done in [threads.submit(one, kill) for kill in kills]:
            done.result()
        survivors = sum(len(household.members) for household in households)
        assert children_of(stage.process.pid) == survivors, "processes are left"
        for household in households:
            print(household.finish())
    return households


@pytest.mark.leaves_names
@pytest.mark.timeout(1800)  # in the long form, on a busy machine
@pytest.mark.parametrize(
    "victim",
    [
        pytest.param("client", marks=pytest.mark.ids("E02", "E03", "C09", "D12", "U12", "F10", "F18")),
        pytest.param("server", marks=pytest.mark.ids("E01", "E02", "E08", "C06", "D12")),
        pytest.param("router", marks=pytest.mark.ids("E01", "C10")),
        pytest.param("worker", marks=pytest.mark.ids("E01", "E02", "C10", "U12")),
    ],
)
def test_ten_thousand_kills(stage, door_dir, many, victim):
    """Ten thousand of all four kinds together."""
    kills = TABLE * many(1, 58)
    kills += [Kill(it, act, AT_RANDOM) for it, act in AT_SOME_MOMENT * many(1, 40)]
    kills += [Kill("server", act, AT_RANDOM, 1, True) for act in RELIEVED * many(1, 40)]
    kills = [kill for kill in kills if kill.victim == victim]
    random.shuffle(kills)
    began = time.monotonic()
    # In the suite, where the machine may have anything else to do, only a hang is too late.
    households = perform(stage, door_dir, kills, many(5, 1) * PROMPTLY)
    took = time.monotonic() - began
    report(kills, households, took)
    wrong = [what for household in households for what in household.wrong]
    assert not wrong, "\n".join(wrong[:50])
    missed = sum((household.missed for household in households), collections.Counter())
    assert not missed, f"not hit: {missed}"


#: What is done while a victim of each kind dies at random.
AT_SOME_MOMENT = [
    *(("client", act) for act in ACTS),
    *(("server", act) for act in ("start", *ACTS) if act != "employ"),
    *(("router", act) for act in ("start", "echo", "session", "stream")),
    *(("worker", act) for act in ("enlist", "employ", "employ")),
]


#: And while one dies whose name another has.
RELIEVED = [act for act in ACTS if act != "employ"]


def report(kills: list[Kill], households: list[Household], took: float) -> None:
    """Print the figures."""
    named = len({str(kill) for kill in kills if kill.step})
    print(
        f"{len(kills)} kills in {took:.0f} s, {len(kills) / took:.1f} a second; {named} rows of named steps"
    )
    for what in ("told", "answered", "given back"):
        seconds = sorted(s for household in households for s in household.seconds[what])
        if not seconds:  # nobody calls a client
            continue
        print(
            f"{what}: median {statistics.median(seconds) * 1e3:.1f} ms, "
            f"99 % {seconds[len(seconds) * 99 // 100] * 1e3:.0f} ms, longest {seconds[-1] * 1e3:.0f} ms"
        )
    print("calls that went on meanwhile:", sum(household.lived for household in households))
    for what in ("ends", "missed"):
        print(what, dict(sum((getattr(household, what) for household in households), collections.Counter())))
