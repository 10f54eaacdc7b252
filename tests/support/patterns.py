"""
The patterns of the examples, with players that may be killed: see ``proof/test_pattern_kills.py``.

A server or a router is the very script of the example, run in a player (support.stage).  What it prints,
it prints in its procedures: so ``print`` is the step ``in-procedure``.  Two patterns that no example has
are written here.  Clients are written here, too, and have steps of their own.

A client has two ways of using its pattern.  ``work`` is all of it, from opening to closing, with something
compared; in ``hold`` and ``held`` it has something for long (a session, a file, half of a stream), and
uses it now and then.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import os
import re
import tempfile
import threading
import time
from typing import Any

import doorpool
from doorpool import Endpoint, Proxy
from support.leaks import Holdings
from support.processes import ROOT
from support.stage import PATIENCE, _Part
from support.steps import GIVING, HOLDING, IN_CALLBACK, IN_PROCEDURE, MID_STREAM, WITH_FILE, arrive

EXAMPLES = ROOT / "examples"

BATCH = 1024  #: Items of a stream that are read ahead.

#: In the scripts: what makes a player slow, or a test long, and a pattern no other.
_SMALLER = {
    "16_stream_a_log": {
        "range(1_000_000)": "range(60_000)",
        "server = Server()": f"doorpool._streams._ITEMS = {BATCH}\nserver = Server()",
        "from doorpool": "import doorpool\nfrom doorpool",
    },
    "17_shared_model": {"(2000, 2000)": "(200, 200)"},
}

_OWN = {
    # A generator, and an open file, in the arguments.
    "arguments": """
from doorpool import Server

server = Server()


@server.endpoint("server.door")
def add_up(numbers, file):
    print("adding")
    with file:
        return sum(numbers) + len(file.read())


server.run()
""",
    # Something that only one can have at a time, and that its holder's death sets free.
    "lock": """
import threading

from doorpool import Endpoint, Server

server = Server()
mutex = threading.Lock()


class Held:
    def __enter__(self):
        mutex.acquire()
        print("entered")
        return self

    def __exit__(self, *error):
        mutex.release()

    def is_held(self):
        return mutex.locked()


@server.endpoint("server.door")
def lock():
    return Endpoint(Held())


server.run()
""",
}


def script(pattern: str, name: str) -> str:
    """The source of a player of a pattern."""
    if pattern in _OWN:
        return _OWN[pattern]
    source = (EXAMPLES / pattern / f"{name}.py").read_text()
    for was, becomes in _SMALLER.get(pattern, {}).items():
        assert was in source or name != "server"
        source = source.replace(was, becomes)
    return source


# -- what is held

#: What two descriptors of one kind have not in common.
_NO_KIND = re.compile(r"\[\d+]|/proc/.*| \(deleted\)")


class Counted(_Part):
    """A part that counts what it has."""

    counted: dict[str, int] | None = None

    def __init__(self, control: Any, folder: str) -> None:
        super().__init__(control, os.devnull)
        os.chdir(folder)

    def counts(self) -> dict[str, int]:
        """How many there are of each kind of descriptor; threads; mappings of ours."""
        held = Holdings()
        counts = collections.Counter(
            re.sub(r"\[\d+]|/proc/.*| \(deleted\)", "", target) for _, target in held.descriptors
        )
        counts["threads"] = len(held.threads)
        with open("/proc/self/maps") as maps:
            counts["mappings"] = sum("/memfd:doorpool" in line for line in maps)
        return dict(counts)

    def do_remember(self, when: str = "") -> None:
        """Take the counts when they have come to rest; let every step be passed again."""
        super().do_remember(when)
        gc.collect()
        deadline = time.monotonic() + PATIENCE
        counts = self.counts()
        resting = 0
        while resting < 3 and time.monotonic() < deadline:
            time.sleep(0.004)
            last, counts = counts, self.counts()
            resting = resting + 1 if counts == last else 0
        self.counted = counts

    def do_surplus(self, patience: float = PATIENCE) -> tuple[list[str], float]:
        """Wait until there is no more than was remembered; return what there is, and when that was."""
        deadline = time.monotonic() + patience
        while left := self.surplus():
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
            gc.collect()
        return left, time.monotonic()

    def surplus(self) -> list[str]:
        before = self.counted
        assert before is not None, "nothing was remembered"
        return [
            f"{many} {kind}, and {before.get(kind, 0)} before"
            for kind, many in self.counts().items()
            if many > before.get(kind, 0)
        ]


# -- servers and routers


class Script(Counted):
    """A player whose main thread runs a script; what the test asks is done in another."""

    def __init__(self, control: Any, folder: str, pattern: str, name: str) -> None:
        super().__init__(control, folder)
        self.pattern, self.name = pattern, name
        self.names: dict[str, Any] = {"__name__": "__main__", "print": self.print}

    def run(self) -> None:
        threading.Thread(target=self._obey, name="control", daemon=True).start()
        say = self.say

        class Server(doorpool.Server):
            def __init__(self, **options: Any) -> None:
                # Threads that a row has needed are gone well within the second in which all comes back.
                super().__init__(idle_timeout=0.05, **options)

            def run(self, **options: Any) -> None:
                self.start()
                say("serving")
                super().run(**options)

        doorpool.Server = Server  # type: ignore[misc]
        exec(compile(script(self.pattern, self.name), self.name, "exec"), self.names)
        self.say("over")
        os._exit(0)

    def _obey(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().run()
        os._exit(0)  # the test is over

    def print(self, *words: object, **how: object) -> None:
        arrive(IN_PROCEDURE)

    def counts(self) -> dict[str, int]:
        counts = super().counts()
        counts["channels"] = self.names["server"].statistics().channels
        counts["doors"] = self.names["server"].statistics().doors
        if self.name == "server":
            counts |= _OBJECTS.get(self.pattern, lambda names: {})(self.names)
        return counts


def _instances(kind: type) -> int:
    return sum(type(it) is kind for it in gc.get_objects())


def _generators(name: str) -> int:
    return sum(getattr(getattr(it, "gi_code", None), "co_name", "") == name for it in gc.get_objects())


#: What a pattern has in its server for those who are there.
_OBJECTS: dict[str, Any] = {
    "11_session_per_client": lambda names: {"baskets": _instances(names["Basket"])},
    "12_singleton_daemon": lambda names: {
        "users": sum(it._users for it in gc.get_objects() if type(it) is names["Daemon"])
    },
    "16_stream_a_log": lambda names: {"generators": _generators("lines")},
    "lock": lambda names: {"locked": int(names["mutex"].locked()), "locks": _instances(names["Held"])},
}


# -- clients


class Client:
    """A client of one pattern; the subclasses are the patterns."""

    patience = PATIENCE

    def open(self, path: str = "server.door") -> Proxy:
        return Proxy(path, timeout=PATIENCE)

    def work(self) -> None:
        """Use the pattern from beginning to end."""
        raise NotImplementedError

    def hold(self) -> None:
        """Have something of the pattern for long."""
        raise NotImplementedError

    def held(self) -> None:
        """Use what is held once more."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Close it."""
        raise NotImplementedError


class _Doors(Client):
    """One that holds proxies."""

    def __init__(self) -> None:
        self.doors: list[Any] = []

    def keep(self, door: Any) -> Any:
        self.doors.append(door)
        return door

    def let_go(self) -> None:
        while self.doors:
            self.doors.pop().close()


class FileThroughADoor(_Doors):
    def work(self) -> None:
        with self.open() as lend, lend("menu") as file:
            arrive(WITH_FILE)
            assert file.read() == "Cake.\n"

    def hold(self) -> None:
        lend = self.keep(self.open())
        self.file = self.keep(lend("secret_data"))

    def held(self) -> None:
        self.file.seek(0)
        assert self.file.read() == "The cake is in the cellar.\n"


class DoorThroughADoor(_Doors):
    def work(self) -> None:
        with self.open("proxy.door") as give, give() as door:
            arrive(HOLDING)
            assert door("Hello") == "Well, hello to you too!"

    def hold(self) -> None:
        with self.open("proxy.door") as give:
            self.door = self.keep(give())
        self.held()

    def held(self) -> None:
        assert self.door("Hello") == "Well, hello to you too!"


class SessionPerClient(_Doors):
    def work(self) -> None:
        with self.open() as connect, connect("Alice", "her") as basket:
            assert basket.add("apples") == ["apples"]
            arrive(HOLDING)
            assert basket.add("pears") == ["apples", "pears"]

    def hold(self) -> None:
        with self.open() as connect:
            self.basket = self.keep(connect("Bob", "his"))
        self.things = 0
        self.held()

    def held(self) -> None:
        things = self.basket.add("books")
        self.things += 1
        assert things == ["books"] * self.things


class SingletonDaemon(_Doors):
    def work(self) -> None:
        with self.open() as daemon, daemon.join() as users:
            arrive(HOLDING)
            assert users() >= 1

    def hold(self) -> None:
        with self.open() as daemon:
            self.users = self.keep(daemon.join())
        self.held()

    def held(self) -> None:
        assert self.users() >= 1


class PrivilegedHelper(_Doors):
    def work(self) -> None:
        with self.open() as lend, lend("report") as descriptor:
            arrive(WITH_FILE)
            with open(descriptor.take()) as file:
                assert file.read() == "the report of this year\n"

    def hold(self) -> None:
        with self.open() as lend:
            self.file = self.keep(os.fdopen(lend("report").take()))

    def held(self) -> None:
        self.file.seek(0)
        assert self.file.read() == "the report of this year\n"


class Router(_Doors):
    def work(self) -> None:
        with self.open("router.door") as router, router.find("add") as add:
            arrive(HOLDING)
            assert add(2, 3) == 5

    def hold(self) -> None:
        with self.open("router.door") as router:
            self.add = self.keep(router.find("add"))
        self.held()

    def held(self) -> None:
        assert self.add(20, 30) == 50


class Callbacks(_Doors):
    def work(self) -> None:
        with self.open() as resize:
            self.resize(resize)

    def resize(self, resize: Any) -> None:
        """Be called back, and told how far it is."""
        warned: list[str] = []

        def warn(picture: str) -> None:
            arrive(IN_CALLBACK)
            warned.append(picture)

        call = resize.options(progress=lambda done, total, text: arrive(HOLDING))
        assert call("abc", Endpoint(warn)) == ["tiny a", "tiny c"]
        assert warned == ["b"]

    def hold(self) -> None:
        self.door = self.keep(self.open())
        self.held()

    def held(self) -> None:
        self.resize(self.door)


class StreamALog(_Doors):
    def work(self) -> None:
        with self.open() as lines, lines("ERROR") as errors:
            for n, line in enumerate(errors):
                assert line == f"{n * 1000 + 7} ERROR"
                if n == 5:  # the second batch has come
                    arrive(MID_STREAM)
                if n == 15:
                    break

    def hold(self) -> None:
        with self.open() as lines:
            self.errors = self.keep(lines("fine"))
        self.read = 0
        self.held()

    def held(self) -> None:
        """Read more than may have been read ahead."""
        for _ in range(BATCH + 76):
            number, word = next(self.errors).split()
            assert (int(number), word) == (self.read + (self.read + 992) // 999, "fine")
            self.read += 1


class SharedModel(_Doors):
    def work(self) -> None:
        with self.open() as model:
            self.predict(model)

    def predict(self, model: Any) -> None:
        import numpy

        batch = numpy.full((500, 200), 0.01)
        means = model.predict(batch)
        arrive(HOLDING)
        assert means.shape == (500,)
        assert numpy.allclose(means, 200.0)

    def hold(self) -> None:
        self.model = self.keep(self.open())
        self.held()

    def held(self) -> None:
        self.predict(self.model)


class Arguments(_Doors):
    def work(self) -> None:
        with self.open() as add_up:
            self.add(add_up)

    def add(self, add_up: Any) -> None:
        def numbers() -> Any:
            for n in range(20):
                if n == 7:
                    arrive(GIVING)
                yield n

        with tempfile.TemporaryFile("w+") as file:
            file.write("four")
            file.seek(0)
            arrive(WITH_FILE)
            assert add_up(numbers(), file) == 190 + 4

    def hold(self) -> None:
        self.door = self.keep(self.open())
        self.held()

    def held(self) -> None:
        self.add(self.door)


class Lock(_Doors):
    def work(self) -> None:
        with self.open() as lock, lock() as held:
            arrive(HOLDING)
            assert held.is_held()

    def hold(self) -> None:
        self.door = self.keep(self.open())
        self.held()

    def held(self) -> None:
        with self.door() as held:
            assert held.is_held()


CLIENTS: dict[str, type[Client]] = {
    "08_file_through_a_door": FileThroughADoor,
    "09_door_through_a_door": DoorThroughADoor,
    "11_session_per_client": SessionPerClient,
    "12_singleton_daemon": SingletonDaemon,
    "13_privileged_helper": PrivilegedHelper,
    "14_router": Router,
    "15_callbacks_and_progress": Callbacks,
    "16_stream_a_log": StreamALog,
    "17_shared_model": SharedModel,
    "arguments": Arguments,
    "lock": Lock,
}

#: Who stands between, by pattern: what the script is called, and what it leads to.
ROUTERS = {"09_door_through_a_door": "proxy", "14_router": "router"}

#: What a script makes in its directory, and would fail to make again.
MADE = {"08_file_through_a_door": "shelf", "13_privileged_helper": "files"}


class Guest(Counted):
    """A client, with the test's orders."""

    def __init__(self, control: Any, folder: str, pattern: str) -> None:
        super().__init__(control, folder)
        self.client = CLIENTS[pattern]()

    def do_work(self) -> None:
        self.client.work()

    def do_hold(self) -> None:
        self.client.hold()

    def do_let_go(self) -> None:
        self.client.let_go()

    def do_held(self) -> str:
        return self.told(self.client.held)

    def do_begin(self) -> None:
        """Work in another thread, and say how that ended."""
        threading.Thread(
            target=lambda: self.say("outcome", self.told(self.client.work), time.monotonic())
        ).start()

    def told(self, what: Any) -> str:
        """Do something; return how it ended."""
        try:
            what()
        except (doorpool.DoorError, OSError) as error:
            self.error = repr(error)
            return type(error).__name__
        return "result"

    def do_error(self) -> str:
        return self.error
