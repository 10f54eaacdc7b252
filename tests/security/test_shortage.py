"""
Shortage: of descriptors, of threads, of patience.  No hang, no spin, no loss, and soon over.

The server is a process of its own whose table of descriptors is filled; it has a caller who was
there before, and goes on being served.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support import byhand, wait_until
from support.actors import Actor, descriptors, here, logged
from support.rawdoor import PATIENCE, Background, Serving
from support.shortage import only
from support.victims import open_client

from doorpool import Proxy, _credentials, _guests, _keeper
from doorpool._errors import BrokenDoorError, CallTimeoutError, DoorError
from doorpool.door import Codec, Handle, Invocation

IN_TIME = 1.0  # seconds, within which all is well again


# -- a server whose table is filled ----------------------------------------------------------------


def serve(path: str, threads: int = 2) -> None:
    """Serve a raw door: b"wait" is answered when ``answer_waiting`` is called, all else at once."""
    here.ran, here.waiting, here.go = [], [], threading.Event()

    def procedure(invocation: Invocation) -> None:
        data = bytes(invocation.data)
        here.ran.append(data)
        if data == b"wait":
            assert here.go.wait(PATIENCE)
        invocation.reply(data)

    here.serving = Serving(procedure, threads=threads, codec=Codec.PICKLE)
    here.serving.door.listen(path)
    here.shortage = contextlib.ExitStack()


def fill(free: int = 0) -> None:
    """Take all descriptors that can be had, but for a few, when nobody is about to give one back."""
    wait_until(lambda: not guests(), timeout=PATIENCE)
    here.shortage.enter_context(only(free))


def empty() -> None:
    """Give them back."""
    here.shortage.close()


def answer_waiting() -> None:
    here.go.set()


def ran() -> list[bytes]:
    return list(here.ran)


def guests() -> int:
    """How many callers have come in whose knocks are not closed yet."""
    return len(_guests.guests()._guests)


def channels() -> int:
    return here.serving.door.channels


def cpu_seconds() -> float:
    return time.process_time()


def idle_share(server: Actor, seconds: float = 1.0) -> float:
    """What part of a CPU a server takes while nobody asks it anything that it can do."""
    before, began = server(cpu_seconds), time.monotonic()
    threading.Event().wait(seconds)
    return (server(cpu_seconds) - before) / (time.monotonic() - began)


@pytest.fixture
def server(actor: Callable[..., Actor], path: str) -> Actor:
    one = actor(os.geteuid())
    one(serve, path)
    return one


@pytest.fixture
def mate(actor: Callable[..., Actor], server: Actor, path: str) -> Actor:
    """A caller who was there before."""
    one = actor(os.geteuid())
    one(open_client, "raw", path)
    one(call_raw, b"hello")
    return one


def call_raw(data: bytes, **options: Any) -> bytes:
    return bytes(here.client.call(data, **options).data)


def lines_about(server: Actor, text: str) -> list[str]:
    return [line for line in server(logged) if text in line]


# -- at accept (F01) -------------------------------------------------------------------------------


def greeted(connections: list[socket.socket]) -> int:
    return sum(byhand.readable(sock, 0) for sock in connections)


@pytest.mark.ids("F01", "F8")
def test_no_descriptor_for_those_who_connect(server, mate, path):
    server(fill)
    waiting = []
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(BlockingIOError):  # a full backlog
            for _ in range(200):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                sock.setblocking(False)
                sock.connect(path)
                waiting.append(sock)
        assert len(waiting) > 100
        wait_until(lambda: lines_about(server, "cannot accept"))
        assert idle_share(server) < 0.05
        assert mate(call_raw, b"still served") == b"still served"
        assert greeted(waiting) == 0
        assert len(lines_about(server, "cannot accept")) == 1
        server(empty)
        wait_until(lambda: greeted(waiting) == len(waiting), timeout=IN_TIME)
    with Handle(path) as handle:
        assert handle.call(b"after it").data == b"after it"


# -- at the port, and at the answer ----------------------------------------------------------------


class Knockers:
    """
    Callers that come during a shortage: connected before, so that only the opening is in question.
    """

    def __init__(self, path: str, count: int, **options: Any) -> None:
        self.handles = [Handle(path, lazy=True, **options) for _ in range(count)]
        self.calls: list[Background] = []

    def __enter__(self) -> Knockers:
        return self

    def knock(self, **options: Any) -> None:
        self.calls = [
            Background(handle.call, b"%d" % number, **options) for number, handle in enumerate(self.handles)
        ]

    def __exit__(self, *_: object) -> None:
        for one in self.calls:
            one.error()
        for handle in self.handles:
            handle.close()


@pytest.mark.ids("F8")
@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_no_knock_is_lost(server, path, free):
    """They wait, and are answered when it is over; none gets an error, none is answered twice."""
    before = server(descriptors)
    with Knockers(path, 30) as knockers:
        wait_until(lambda: server(descriptors) == before + 30)
        server(fill, free)
        knockers.knock(timeout=PATIENCE)
        wait_until(lambda: server(logged))
        share = idle_share(server, 0.3)
        assert all(one.running for one in knockers.calls)
        began = time.monotonic()
        server(empty)
        assert [one.result().data for one in knockers.calls] == [b"%d" % number for number in range(30)]
        assert time.monotonic() - began < IN_TIME
        assert share < 0.2  # thirty ports that are tried again and again
    assert sorted(server(ran)) == sorted(b"%d" % number for number in range(30))
    wait_until(lambda: server(descriptors) == before, timeout=PATIENCE)


@pytest.mark.ids("F8")
def test_a_caller_waits_no_longer_than_he_said(server, path):
    before = server(descriptors)
    with Knockers(path, 1) as knockers:
        wait_until(lambda: server(descriptors) == before + 1)
        server(fill)
        began = time.monotonic()
        knockers.knock(timeout=0.3)
        error = knockers.calls[0].error()
        assert isinstance(error, CallTimeoutError)
        assert not error.may_have_run
        assert 0.3 <= time.monotonic() - began < 5
        with pytest.raises(CallTimeoutError):
            Handle(path, open_timeout=0.3)  # connected, and not greeted
        server(empty)
        assert knockers.handles[0].call(b"again").data == b"again"
    assert server(ran) == [b"again"]


@pytest.mark.ids("F8")
def test_an_idle_channel_makes_room(server, path):
    """Nobody gives a descriptor back, but the server's own idle channels; whose callers notice nothing."""
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(Handle(path)) for _ in range(6)]
        for handle in idle:
            handle.call(b"before")
        busy = stack.enter_context(Handle(path))
        running = Background(busy.call, b"wait", timeout=PATIENCE)
        wait_until(lambda: b"wait" in server(ran) and not server(guests))
        before = server(descriptors)
        late = stack.enter_context(Handle(path, lazy=True))
        wait_until(lambda: server(descriptors) == before + 1)
        server(fill)
        assert late.call(b"late", timeout=PATIENCE).data == b"late"
        assert server(channels) < 8
        for handle in idle:
            assert handle.call(b"after", timeout=PATIENCE).data == b"after"
        server(answer_waiting)
        assert running.result().data == b"wait"  # a channel that is in use is nobody's to close
        server(empty)
    assert sorted(server(ran)) == sorted([b"before"] * 6 + [b"wait", b"late"] + [b"after"] * 6)


@pytest.mark.ids("F8")
def test_channels_closed_under_the_hands_of_callers_lose_no_call(server, path):
    """More callers than channels: each call runs once, whoever's channel is closed for another's."""
    wanted = 25

    def work(number: int) -> int:
        with Handle(path, open_timeout=PATIENCE) as handle:
            for turn in range(wanted):
                song = b"%d-%d" % (number, turn)
                assert handle.call(song, timeout=PATIENCE).data == song
                if turn % 5 == 0:
                    threading.Event().wait(0.02)
        return wanted

    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(Handle(path)) for _ in range(3)]
        for handle in handles:
            handle.call(b"settled")
        server(fill, 9)  # two or three more at a time
        workers = [Background(work, number) for number in range(5)]
        assert [worker.result(2 * PATIENCE) for worker in workers] == [wanted] * 5
        server(empty)
    songs = [song for song in server(ran) if song != b"settled"]
    assert sorted(songs) == sorted(b"%d-%d" % (n, turn) for n in range(5) for turn in range(wanted))


# -- at the client ---------------------------------------------------------------------------------


@pytest.mark.ids("F7", "F9")
@pytest.mark.parametrize("free", range(8))
def test_a_client_that_is_short_is_told_and_keeps_nothing(server, path, free):
    """Opening by path and dialling: with or without room for each thing that is needed on the way."""
    with Handle(path, lazy=True) as lazy:
        before = descriptors()
        for attempt in (lambda: Handle(path).close(), lambda: Proxy_close(path), lambda: lazy.call(b"x")):
            with only(free):
                error = Background(attempt).error()
            if error is not None:
                assert isinstance(error, OSError)
                assert error.errno == errno.EMFILE, error
                assert free < 7
            while lazy._idle:
                lazy._idle.pop().close()
            wait_until(lambda: descriptors() == before, timeout=PATIENCE)  # an answer unread takes a moment
        assert lazy.call(b"next").data == b"next"
    assert server(ran)[-1:] == [b"next"]
    wait_until(lambda: server(channels) == 0, timeout=PATIENCE)


def Proxy_close(path: str) -> None:
    """Open a door that speaks pickle, as the layer above does, without calling it."""
    Proxy(path).close()


@pytest.mark.ids("F8")
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_says_nothing_about_a_peer(monkeypatch, number):
    """In what namespace he is cannot be asked without a descriptor; he is not refused because of that."""

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    me = _credentials.Credentials(os.getpid(), os.geteuid(), os.getegid(), ())
    pidfd = os.pidfd_open(os.getpid())
    try:
        assert _credentials.pickle_bar(me, pidfd, trust="namespace") is None
        monkeypatch.setattr(_credentials.fcntl, "ioctl", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            _credentials.pickle_bar(me, pidfd, trust="namespace")
    finally:
        os.close(pidfd)


# -- errors of the kernel (F02) --------------------------------------------------------------------


@pytest.fixture
def inject(root_only: None) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Have system calls of an actor's keeper, or of another thread of it, fail, by strace."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace to make system calls fail with")
    running: list[subprocess.Popen[str]] = []

    def start(one: Actor, fault: str, thread: Callable[[], int] = keeper_thread) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [strace, "-o", "/dev/null", "-e", f"inject={fault}", "-p", str(one(thread))],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        assert process.stderr is not None
        first = process.stderr.readline()
        if "attached" not in first:
            pytest.skip(f"strace may not attach here: {first}")
        return process

    yield start
    for process in running:
        process.send_signal(signal.SIGINT)
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()


def keeper_thread() -> int:
    thread = _keeper.keeper()._thread.native_id
    assert thread is not None
    return thread


TROUBLES = ["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS", "ECONNABORTED", "EPERM", "EINTR"]


@pytest.mark.ids("F02")
@pytest.mark.parametrize("name", TROUBLES)
@pytest.mark.parametrize("system_call", ["accept4", "recvmsg"])
def test_the_keeper_survives_what_the_kernel_says(server, path, inject, system_call, name):
    """Five times in a row, and then no more: who came meanwhile is served as soon as that."""
    inject(server, f"{system_call}:error={name}:when=1..5")
    began = time.monotonic()
    with Handle(path, open_timeout=PATIENCE) as handle:
        assert time.monotonic() - began < 5 + IN_TIME
        assert handle.call(b"x", timeout=PATIENCE).data == b"x"
    if name not in ("ECONNABORTED", "EINTR"):
        what = "accept" if system_call == "accept4" else "hear a knock"
        assert len(lines_about(server, f"cannot {what}: {os.strerror(getattr(errno, name))}")) == 1
    assert not lines_about(server, "please report it")


@pytest.mark.ids("F02", "F8")
@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"])
def test_a_channel_that_cannot_be_made_at_first(server, path, inject, name):
    """There are descriptors when the knock is heard, and none for the answer to it."""
    with Knockers(path, 8) as knockers:
        wait_until(lambda: server(open_ports) == 8)
        inject(server, f"socketpair:error={name}:when=1..5")
        began = time.monotonic()
        knockers.knock(timeout=PATIENCE)
        assert [one.result().data for one in knockers.calls] == [b"%d" % number for number in range(8)]
        assert time.monotonic() - began < 5 + IN_TIME
    assert sorted(server(ran)) == [b"%d" % number for number in range(8)]
    trouble = os.strerror(getattr(errno, name))
    assert len(lines_about(server, f"cannot open a channel: {trouble}")) == 1
    assert not lines_about(server, "please report it")


def open_ports() -> int:
    return len(here.serving.door._ports)


#: What a caller does on his way to an answer, and what may be missing for it.
WAY_OF_A_CALLER = {
    "socket": ["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"],
    "connect": ["ENOMEM", "ENOBUFS"],
    "socketpair": ["EMFILE", "ENFILE", "ENOMEM", "ENOBUFS"],
    "sendmsg": ["ENOMEM", "ENOBUFS"],
    "recvmsg": ["ENOMEM", "ENOBUFS"],
}


@pytest.mark.ids("F02", "F9")
@pytest.mark.parametrize(
    ("system_call", "name"),
    [(system_call, name) for system_call, names in WAY_OF_A_CALLER.items() for name in names],
)
def test_a_caller_to_whom_the_kernel_says_no(server, actor, path, inject, system_call, name):
    """He is told in words of the system, keeps nothing, and the next attempt goes well."""
    client = actor(os.geteuid())
    client(open_and_call, path)
    before = client(descriptors)
    inject(client, f"{system_call}:error={name}:when=1..2", thread_of_a_caller)
    failures = client(attempts, path)
    assert failures
    for number, may_have_run in failures:
        assert number == getattr(errno, name)
        assert may_have_run in (None, False)
    # The thread that made the attempts may not have let go of the last error yet, and of what that holds.
    wait_until(lambda: client(descriptors) == before, timeout=PATIENCE)
    wait_until(lambda: server(channels) == 0, timeout=PATIENCE)


def open_and_call(path: str, data: bytes = b"hello") -> bytes:
    with Handle(path) as handle:
        return bytes(handle.call(data).data)


def thread_of_a_caller() -> int:
    """Start a thread that waits to be told what to do; its system calls are those of the calls alone."""
    here.caller = ThreadPoolExecutor(1)
    return here.caller.submit(threading.get_native_id).result(PATIENCE)


def attempts(path: str) -> list[tuple[int | None, bool | None]]:
    """Open the door and call, until it goes well; tell what went wrong before."""
    failures = []
    for _ in range(5):
        try:
            assert here.caller.submit(open_and_call, path).result(PATIENCE) == b"hello"
        except OSError as error:
            failures.append((error.errno, getattr(error, "may_have_run", None)))
        else:
            return failures
    raise AssertionError(f"it never went well: {failures}")


#: What a caller asks of the kernel from the opening of a door to its end, and what it may say.
WHATEVER_FAILS = {
    "socket": "EMFILE",
    "connect": "ENOMEM",
    "socketpair": "ENFILE",
    "setsockopt": "ENOBUFS",
    "getsockopt": "ENOBUFS",
    "sendmsg": "ENOBUFS",
    "poll": "ENOMEM",
}


@pytest.mark.ids("H06")
@pytest.mark.parametrize("system_call", WHATEVER_FAILS)
def test_whichever_of_a_callers_system_calls_fails(server, actor, path, inject, system_call):
    """One in a prime number: from attempt to attempt it is another step of the way that fails."""
    step = 23 if system_call == "setsockopt" else 11  # an attempt has many of those
    client = actor(os.geteuid())
    client(open_and_call, path)
    before, log = client(descriptors), len(server(ran))
    inject(client, f"{system_call}:error={WHATEVER_FAILS[system_call]}:when=2+{step}", thread_of_a_caller)
    outcomes = client(outcomes_of, path, 80)
    assert "went well" in outcomes.values()
    assert set(outcomes.values()) - {"went well"}, "nothing failed"
    counts = collections.Counter(server(ran)[log:])
    assert not [data for data in counts if counts[data] > 1], "none ran twice"
    for data, outcome in outcomes.items():
        assert outcome in ("went well", "no", "perhaps")
        assert outcome == "perhaps" or counts[data] == (outcome == "went well")
    # The thread that made the attempts may not have let go of the last error yet, and of what that holds.
    wait_until(lambda: client(descriptors) == before, timeout=PATIENCE)
    wait_until(lambda: server(channels) == 0, timeout=PATIENCE)
    assert not lines_about(server, "please report it")


def outcomes_of(path: str, count: int) -> dict[bytes, str]:
    """Open and call so often; tell of each what it was, and of failures whether the call may have run."""
    outcomes = {}
    for number in range(count):
        data = b"attempt %d" % number
        began = time.monotonic()
        try:
            here.caller.submit(open_and_call, path, data).result(PATIENCE)
        except OSError as error:
            outcomes[data] = "perhaps" if getattr(error, "may_have_run", False) else "no"
        except DoorError as error:
            outcomes[data] = "perhaps" if error.may_have_run else "no"
        else:
            outcomes[data] = "went well"
        assert time.monotonic() - began < PATIENCE
    return outcomes


# -- threads (F03) ---------------------------------------------------------------------------------

WITHOUT_THREADS = """
    import resource, threading, time
    from doorpool import Server

    entered, go = [], threading.Event()

    def answer(what):
        entered.append(what)
        if what == "wait":
            go.wait(20)
        elif what == "go":
            go.set()
        elif what == "more":
            resource.setrlimit(resource.RLIMIT_NPROC, before)
        elif what == "threads":
            return server.statistics().threads
        return what

    server = Server(max_threads=8)
    server.attach(answer, "a.door")
    server.start()
    before = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, before[1]))  # those that are there stay
    ready()
    server.wait()
"""


@pytest.mark.ids("F03", "T17")
def test_without_threads_callers_wait_their_turn(spawn_server, door_dir, root_only):
    """The first two threads are all there are, and answer for those that cannot be had."""
    os.chown(door_dir, 54_321, 54_321)
    server = spawn_server(WITHOUT_THREADS, cwd=door_dir, uid=54_321)
    path = str(door_dir / "a.door")
    child = """
        from doorpool import Proxy
        import sys, threading
        proxy = Proxy(sys.argv[1])
        answers = []
        def call(what):
            answers.append(proxy.options(timeout=20)(what))
        waiting = threading.Thread(target=call, args=("wait",))
        waiting.start()
        many = [threading.Thread(target=call, args=(number,)) for number in range(10)]
        for thread in many: thread.start()
        for thread in many: thread.join()
        threads = proxy("threads")
        proxy("go")
        waiting.join()
        proxy("more")
        again = [threading.Thread(target=call, args=("last",)) for _ in range(5)]
        for thread in again: thread.start()
        for thread in again: thread.join()
        result((sorted(map(str, answers)), threads))
    """
    from support import run_python

    answers, threads = run_python(child, path, uid=54_321).value
    assert answers == sorted([*map(str, range(10)), "wait", *["last"] * 5])
    assert threads == 2
    assert not server.ended
    assert len(re.findall("no further thread", server.stderr)) == 1


@pytest.mark.ids("F03")
def test_a_keeper_that_gets_no_thread_leaves_nothing(monkeypatch):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            _keeper.Keeper()
    assert descriptors() == before


# -- a server that does nothing (F09) --------------------------------------------------------------


@pytest.mark.ids("F09")
def test_a_frozen_server_with_a_full_backlog(server, path):
    """Opening takes as long as it was given, and works as soon as the server does."""
    server.stop()
    try:
        with contextlib.ExitStack() as stack:
            with pytest.raises(BlockingIOError):
                for _ in range(10_000):
                    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                    sock.setblocking(False)
                    sock.connect(path)
            for opener in (Handle, Proxy):
                began = time.monotonic()
                with pytest.raises(CallTimeoutError) as caught:
                    opener(path, open_timeout=0.3)
                assert not caught.value.may_have_run
                assert 0.3 <= time.monotonic() - began < 3
            waiting = Background(Handle, path, open_timeout=PATIENCE)
            server.cont()
            with waiting.result() as handle:
                assert handle.call(b"thawed").data == b"thawed"
    finally:
        server.cont()


# -- what is logged --------------------------------------------------------------------------------


class _Calling(logging.Handler):
    """A handler that reports each line through a door of the same process, as a user's may."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.reports: list[bytes] = []

    def emit(self, record: logging.LogRecord) -> None:
        with Handle(self.path) as handle:
            self.reports.append(bytes(handle.call(record.getMessage().encode(), timeout=PATIENCE).data))


def log_through_the_door(path: str) -> None:
    here.handler = _Calling(path)
    logging.getLogger("doorpool").addHandler(here.handler)


def reports() -> list[bytes]:
    return here.handler.reports


def knock_badly(path: str, count: int) -> None:
    with byhand.reach(path) as door:
        for _ in range(count):
            with byhand.knock(door, b"no knock at all") as ours:
                assert byhand.refusal_in(byhand.receive(ours).data)


def test_a_log_handler_may_wait_for_the_keeper(server, mate, path):
    """Lines are written by a thread that holds nothing; the keeper goes on accepting meanwhile."""
    server(log_through_the_door, path)
    mate(knock_badly, path, 3)
    (report,) = wait_until(lambda: server(reports), timeout=PATIENCE)
    assert b"refused" in report


def block_the_log() -> None:
    here.blocked, here.unblock = threading.Event(), threading.Event()

    class Blocking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            here.blocked.set()
            here.unblock.wait(PATIENCE)

    logging.getLogger("doorpool").addHandler(Blocking())


def log_is_blocked() -> bool:
    return here.blocked.is_set()


def unblock_the_log() -> None:
    here.unblock.set()


def test_a_log_handler_that_hangs_holds_no_door_up(server, mate, path):
    server(block_the_log)
    mate(knock_badly, path, 1)
    wait_until(lambda: server(log_is_blocked))
    for _ in range(3):
        with Handle(path) as handle:
            assert handle.call(b"x", timeout=PATIENCE).data == b"x"
    server(unblock_the_log)


def shorten_log_interval() -> None:
    _keeper.LOG_INTERVAL = 0.3


@pytest.mark.ids("F12t")
def test_an_offender_is_named_once_in_a_while(server, mate, path):
    """The first time at once, then how often it was."""
    server(shorten_log_interval)
    mate(knock_badly, path, 50)
    lines = wait_until(lambda: (found := lines_about(server, "refused")) and len(found) > 1 and found)
    assert "more such" not in lines[0]
    assert f"pid={mate.pid}" in lines[0]
    counts = [int(re.search(r"and (\d+) more such", line).group(1)) for line in lines[1:]]
    wait_until(
        lambda: (
            sum(
                int(re.search(r"and (\d+) more such", line).group(1))
                for line in lines_about(server, "more such")
            )
            == 49
        )
    )
    assert all(counts)
    assert len(lines_about(server, "refused")) < 10


@pytest.mark.ids("F8")
def test_a_server_dies_with_knocks_unheard(server, path):
    """Callers that waited for descriptors hear of it within a second."""
    with Knockers(path, 5) as knockers:
        server(fill)
        knockers.knock(timeout=PATIENCE)
        wait_until(lambda: server(logged))
        began = time.monotonic()
        server.kill()
        errors = [one.error() for one in knockers.calls]
        assert time.monotonic() - began < IN_TIME
    assert [type(error) for error in errors] == [BrokenDoorError] * 5
    assert not any(error.may_have_run for error in errors)
