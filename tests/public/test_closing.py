"""
Closing: servers, endpoints and proxies, at any moment, from any thread, in the middle of anything.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import linecache
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support import byhand, rawpeer, run_as_uid, wait_until
from support.rawdoor import Background

from doorpool import BrokenDoorError, CallTimeoutError, ClosedError, Endpoint, Proxy, RevokedError, Server
from doorpool._keeper import keeper
from doorpool._names import Name
from doorpool._objects import Facade
from doorpool._threads import Pool, Pools
from doorpool.door import Door, Gate, Handle

PATIENCE = 30.0  # seconds until what certainly happens is taken for a hang
PROMPTLY = 1.0  # seconds (threats.md, G09)
CLOSED = 7  # the reason of a goodbye


class Work:
    """
    A procedure whose calls end when they are told to, and a journal of those that began.
    """

    def __init__(self) -> None:
        self.journal: list[str] = []
        self.begun = threading.Semaphore(0)
        self.ends: dict[str, threading.Event] = {
            "in time": threading.Event(),
            "too late": threading.Event(),
            "at once": threading.Event(),
        }
        self.ends["at once"].set()

    def __call__(self, call: str) -> str:
        self.journal.append(call)
        self.begun.release()
        assert self.ends[call.split(":")[0]].wait(PATIENCE)
        return f"did {call}"

    def wait_begun(self, calls: int) -> None:
        for _ in range(calls):
            assert self.begun.acquire(timeout=PATIENCE)


class Manager:
    """An object to enter, and how it was left."""

    def __init__(self, then: Callable[[], object] = bool) -> None:
        self.left: list[type[BaseException] | None] = []
        self._then = then

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.left.append(kind)
        self._then()


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    for event in work.ends.values():
        event.set()


def _only_channel(proxy: Proxy) -> Any:
    """The socket of a proxy's idle channel."""
    (channel,) = proxy._line.handle._idle
    return channel.socket


def _error_of(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


# -- a server, with calls in every state


class HalfOpen:
    """
    Clients by hand that have come so far and no further, and how the server ends each of them.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path, self._stack = str(path), stack
        self.doors = [self._reach() for _ in range(10)]
        self.requested = [self._dial(door) for door in self.doors[:2]]
        for channel in self.requested:  # the half of a request
            channel.sendall(byhand.frame_bytes("Q", 1, bytes(1000))[:500])
        self.silent = [self._dial(door) for door in self.doors[2:4]]
        self.answered = [self._keep(byhand.knock(door)) for door in self.doors[4:6]]
        for sock in self.answered:  # the answer is there, and nobody reads it
            assert byhand.readable(sock, PATIENCE)
        self.knocked: list[Any] = []

    def knock(self) -> None:
        """Knock, while the keeper hears nothing."""
        self.knocked = [self._keep(byhand.knock(door)) for door in self.doors[6:8]]

    def _keep(self, sock: Any) -> Any:
        return self._stack.enter_context(sock)

    def _reach(self) -> Any:
        return self._keep(byhand.reach(self._path))

    def _dial(self, door: Any) -> Any:
        channel, _ = byhand.dial(door)
        return self._keep(channel)

    def ends(self) -> None:
        """Look at what each of them is told."""
        for sock in [*self.answered, *self.knocked]:
            message = byhand.receive(sock)
            if message.fds:
                self.silent.append(self._keep(socket.socket(fileno=message.fds.pop())))
            elif message.data:
                reason, _ = byhand.refusal_in(message.data) or (None, "")
                assert reason == CLOSED
        for channel in [*self.requested, *self.silent]:
            said = byhand.read_all(channel)
            assert said[:1] == b"G"  # goodbye
            assert said[rawpeer.HEAD : rawpeer.HEAD + 2] == bytes([CLOSED, False])
        for door in self.doors:  # greeting and farewell; first of all, once, that a knock was not heard
            assert byhand.read_all(door) or byhand.read_all(door)


@pytest.mark.ids("X7", "G09")
@pytest.mark.parametrize("size", [1, 1_000_000])
def test_a_goodbye_behind_an_answer_does_not_say_that_the_call_did_not_run(serve, connect, monkeypatch, size):
    """The time is over just when the answer comes, and the server, which has nothing to do, closes."""
    go_on, ran = threading.Event(), []

    def procedure() -> bytes:
        ran.append(go_on.wait(PATIENCE))
        return bytes(size)

    def answered_closed_and_given_up(handle: Handle, channel: Any) -> bool:
        go_on.set()
        wait_until(lambda: server.statistics().served == 1)
        server.close()
        return give_up(handle, channel)

    server = serve(procedure)
    proxy = connect(timeout=0.2, reopen=False)
    give_up = Handle._give_up
    monkeypatch.setattr(Handle, "_give_up", answered_closed_and_given_up)
    with pytest.raises(CallTimeoutError) as caught:
        proxy()
    assert ran == [True]
    assert caught.value.may_have_run


@pytest.mark.ids("E11", "R1", "R2", "R3", "L14")
def test_close_with_calls_in_every_state(door_dir, many):
    """
    Fifty of them: in time, too late, queued, idle, half-open; and those who come when it has begun.
    """
    for round in range(many(2, 20)):
        with contextlib.ExitStack() as stack:
            _close_in_every_state(door_dir, stack, Work(), grace=0.5 + 0.1 * round)


def _close_in_every_state(door_dir: Path, stack: contextlib.ExitStack, work: Work, grace: float) -> None:
    path = door_dir / "a.door"
    server = Server(max_threads=20)
    stack.callback(server.close, 0)
    stack.callback(lambda: [event.set() for event in work.ends.values()])
    endpoint = server.attach(work, path)
    server.start()

    def opened() -> Proxy:
        return stack.enter_context(Proxy(path, reopen=False))

    def calling(what: str) -> list[Background]:
        return [Background(opened(), f"{what}:{number}") for number in range(10)]

    late, idle, newcomer = opened(), [opened() for _ in range(10)], opened()
    half_open = HalfOpen(path, stack)
    in_time, too_late = calling("in time"), calling("too late")
    work.wait_begun(20)
    proxies = [opened() for _ in range(10)]
    channels = [_only_channel(proxy) for proxy in proxies]
    queued = [Background(proxy, f"at once:{number}") for number, proxy in enumerate(proxies)]
    wait_until(lambda: all(map(rawpeer.unread_there, channels)), "they wait for a thread")
    with keeper().lock:
        half_open.knock()
        began = time.monotonic()
        closer = Background(server.close, grace)
        wait_until(lambda: server.closed)

    for call in queued:  # at once, not at the end of the grace
        error = call.error()
        assert isinstance(error, RevokedError)
        assert not error.may_have_run
    for proxy in [late, *idle]:
        error = _error_of(lambda proxy=proxy: proxy("at once:idle"))
        assert isinstance(error, RevokedError)
        assert not error.may_have_run
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        Proxy(path)
    with pytest.raises(ClosedError):
        endpoint.open()
    with pytest.raises(ClosedError):
        server.attach(work, door_dir / "b.door")
    with pytest.raises(RevokedError):  # a second descriptor, and a channel
        Proxy(newcomer)
    half_open.ends()
    assert closer.running, "the others still have time"
    assert all(call.running for call in in_time + too_late)
    work.ends["in time"].set()
    assert [call.result() for call in in_time] == [f"did in time:{number}" for number in range(10)]
    closer.result()
    took = time.monotonic() - began
    print(f"it took {took - grace:.3f} s more")
    assert grace <= took < grace + 1
    for call in too_late:
        error = call.error()
        assert isinstance(error, BrokenDoorError)
        assert error.may_have_run
    assert sorted(work.journal) == sorted(
        f"{what}:{number}" for what in ("in time", "too late") for number in range(10)
    )
    assert server.statistics().channels == 10, "those that were cut, whose threads still work"
    work.ends["too late"].set()
    wait_until(lambda: server.statistics().threads == 0)
    assert server.statistics().channels == 0


def test_ctrl_c_while_closing_cuts_what_is_left(spawn_server, door_dir, connect):
    """
    Whoever presses it does not want to wait any longer; the callers are told at once.
    """
    child = spawn_server(
        """
        import os, threading
        from doorpool import Server

        server = Server()
        forever = threading.Event()

        @server.endpoint("a.door")
        def stubborn():
            if threading.current_thread() is threading.main_thread():
                return
            begun.set()
            forever.wait()

        begun = threading.Event()
        server.start()
        ready()
        begun.wait()
        try:
            server.close(None)
        except KeyboardInterrupt:
            forever.wait()  # the process goes on
        """,
        cwd=door_dir,
    )
    call = Background(connect())
    wait_until(lambda: not (door_dir / "a.door").exists(), "it is being closed", timeout=PATIENCE)
    child.signal(signal.SIGINT)
    error = call.error()
    assert isinstance(error, BrokenDoorError)
    assert error.may_have_run
    wait_until(lambda: "1 calls cut by an exception: stubborn" in child.stderr, timeout=PATIENCE)
    child.kill()


def test_an_exception_while_closing_cuts_what_is_left_and_keeps_nothing(serve, connect, caplog):
    """What callers have entered is left for them, and the last thread gives the descriptors back."""
    manager = Manager()
    work = Work()
    server = serve(work)
    held = connect(server.attach(Endpoint(manager)))
    held._line.enter(None)
    call = Background(connect(), "too late:1")
    work.wait_begun(1)
    close = server._pools.close
    patience: list[float | None] = []

    def interrupted(timeout: float | None) -> Any:
        patience.append(timeout)
        if len(patience) == 1:
            raise KeyboardInterrupt
        return close(timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server._pools, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            server.close(None)
    assert patience == [None, 0]
    assert manager.left == [BrokenDoorError]
    error = call.error()
    assert isinstance(error, BrokenDoorError)
    assert error.may_have_run
    assert "1 calls cut by an exception: Work" in caplog.text
    assert server.closed
    work.ends["too late"].set()
    wait_until(lambda: server.statistics().threads == 0)


@pytest.mark.parametrize(
    "where",
    [(Server, "_present"), (Name, "remove"), (Pool, "join")],
    ids=["at first", "at a name", "at the threads"],
)
def test_ctrl_c_at_any_step_of_closing_keeps_nothing(door_dir, where):
    path, interrupted = door_dir / "a.door", []
    keeper()
    before = len(os.listdir("/proc/self/fd"))
    server = Server()
    server.attach(len, path)
    server.start()
    step = getattr(*where)

    def interrupt(self: Any, *args: Any) -> Any:
        if not interrupted:
            interrupted.append(where)
            raise KeyboardInterrupt
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.close()
    assert server.closed
    assert not path.exists()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)


@pytest.mark.parametrize("what", ["close", "statistics"])
@pytest.mark.ids("G09")
def test_endpoints_come_and_go_meanwhile(what):
    """
    At each line that the server runs, which other threads may do as well: it looks at them at once.
    """
    server = Server().start()
    there, steps = [Endpoint(len) for _ in range(3)], []
    for endpoint in there:
        server._adopt(endpoint)

    def come_and_go(frame: Any, *_: Any) -> Any:
        if not any(name in frame.f_code.co_filename for name in ("_server", "_weakrefset")):
            return None
        steps.append(frame.f_lineno)
        there.append(Endpoint(len))
        server._adopt(there[-1])
        if len(steps) % 2:
            there.pop(0).close()
        return come_and_go

    before = sys.gettrace()
    sys.settrace(come_and_go)
    try:
        getattr(server, what)()
    finally:
        sys.settrace(before)
    assert len(steps) > 5
    assert server.statistics().doors == sum(not it.closed for it in there)
    server.close()
    assert server.statistics().threads == 0


def test_an_endpoint_that_is_dropped_is_forgotten():
    with Server() as server:
        held = [Endpoint(len), Endpoint(len)]
        for endpoint in held:
            server._adopt(endpoint)
        held.append(held)  # a cycle, which the collector finds
        del held, endpoint
        wait_until(lambda: gc.collect() >= 0 and not server._adopted.members())
        assert not server._adopted._references


@pytest.mark.ids("R1", "R6")
@pytest.mark.parametrize(
    "where",
    [(Name, "remove"), (Gate, "end"), (Facade, "abandon"), (Server, "_forget"), (Pools, "release")],
    ids=["at a name", "at a channel", "at the object", "at the server", "at the threads"],
)
def test_ctrl_c_at_any_step_of_closing_an_endpoint_leaves_the_rest_for_the_next_time(
    serve, connect, door_dir, where
):
    manager = Manager()
    path, interrupted = door_dir / "a.door", []
    server = serve(manager, threads=1)
    (endpoint,) = server.endpoints
    held = connect(reopen=False)
    held._line.enter(None)
    step = getattr(*where)

    def interrupt(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not interrupted:
            interrupted.append(where)
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            endpoint.close()
        assert endpoint.closed
        for _ in range(2):
            endpoint.close()
    assert not path.exists()
    assert manager.left == [BrokenDoorError]
    assert server.endpoints == ()
    with pytest.raises(RevokedError):
        held.ping()
    wait_until(lambda: server.statistics().threads == 2, "its own thread has gone", timeout=PATIENCE)


def test_an_endpoint_that_ctrl_c_left_half_closed_is_closed_when_it_is_dropped(serve, recwarn):
    server = serve(len)
    endpoint = Endpoint(len, threads=1)
    server._adopt(endpoint)
    with endpoint.open():
        assert server.statistics().threads == 3
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Door, "revoke", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                endpoint.close()
        del endpoint

    def threads() -> int:
        gc.collect()
        return server.statistics().threads

    wait_until(lambda: threads() == 2, "its own thread has gone", timeout=PATIENCE)
    assert not recwarn.list  # nobody has forgotten to close it


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.ids("R6")
def test_two_threads_take_a_name_away_one_after_the_other(serve, caplog, monkeypatch):
    """The first closes the directory of the name, whose number may be another file's then."""
    (endpoint,) = serve(len).endpoints
    remove, lock, inside, together = Name.remove, threading.Lock(), threading.Event(), threading.Event()

    def slowly(self: Name) -> bool:
        if not lock.acquire(blocking=False):
            together.set()
            return False
        try:
            inside.set()
            together.wait(0.2)  # as long as it takes if nobody comes
            return remove(self)
        finally:
            lock.release()

    monkeypatch.setattr(Name, "remove", slowly)
    revoking = threading.Thread(target=endpoint.revoke)
    revoking.start()
    assert inside.wait(PATIENCE)
    endpoint.close()
    revoking.join(PATIENCE)
    assert not together.is_set()
    assert caplog.messages == []


def test_an_endpoint_that_closes_itself_for_each_who_is_left_for(serve, connect):
    """However many there are: more than there may be calls within one another."""
    manager = Manager(lambda: endpoint.close())
    (endpoint,) = serve(manager).endpoints
    line = connect()._line
    for _ in range(sys.getrecursionlimit() // 2):
        line.enter(None)
    endpoint.close()
    assert manager.left == [BrokenDoorError] * (sys.getrecursionlimit() // 2)


# -- generators that clean up as their server closes


class CleanUp:
    """Generators whose ``finally`` is done as it is told to, and a journal of those that are."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()
        self.also: Callable[[], Any] = bool

    def __call__(self, how: str) -> Iterator[str]:
        try:
            while True:
                yield how
        finally:
            self.begun.release()
            if how == "hangs":
                self.go.wait(10)
            self.also()
            self.ended.append(how)


@pytest.fixture
def clean_up() -> Iterator[CleanUp]:
    it = CleanUp()
    yield it
    it.go.set()


def test_clean_up_that_hangs_holds_up_neither_the_closing_nor_other_clean_up(
    serve, connect, clean_up, work, door_dir
):
    server = serve(clean_up)
    server.attach(work, door_dir / "b.door")
    streams = [connect()(how) for how in ("hangs", "quick", "hangs", "quick", "hangs")]
    for stream in streams:
        next(stream)
    call = Background(connect(door_dir / "b.door"), "too late:1")
    work.wait_begun(1)
    server.close(1)
    assert clean_up.ended == ["quick", "quick"]
    assert isinstance(call.error(), BrokenDoorError)
    for stream in streams:
        with pytest.raises(RevokedError):
            next(stream)
    clean_up.go.set()
    wait_until(lambda: clean_up.ended == ["quick", "quick", "hangs", "hangs", "hangs"])


def test_clean_up_is_waited_for_as_long_as_calls_are(serve, connect, clean_up):
    server = serve(clean_up)
    stream = connect()("hangs")
    next(stream)
    close = Background(server.close, None)
    assert clean_up.begun.acquire(timeout=PATIENCE)
    with pytest.raises(RevokedError):
        next(stream)
    assert close.running
    clean_up.go.set()
    close.result()
    assert clean_up.ended == ["hangs"]


def test_clean_up_that_is_quick_is_done_however_little_time_there_is(serve, connect, clean_up):
    server = serve(clean_up)
    streams = [connect()("quick") for _ in range(20)]
    for stream in streams:
        next(stream)
    server.close(0)
    assert clean_up.ended == ["quick"] * 20


def test_clean_up_may_close_the_server_that_waits_for_it(serve, connect, clean_up):
    server = serve(clean_up)
    clean_up.also = lambda: server.close(None)
    stream = connect()("quick")
    next(stream)
    Background(server.close, None).result()
    assert clean_up.ended == ["quick"]


def test_a_generator_may_close_the_server_that_it_is_pulled_from(serve, connect, clean_up):
    """It is not waited for, and cleans up when it has done so."""

    def closes() -> Iterator[int]:
        with contextlib.closing(clean_up("quick")) as inner:
            next(inner)
            server.close(None)
            yield 1

    server = serve(closes)
    stream = connect(timeout=PATIENCE)()
    assert next(stream) == 1
    wait_until(lambda: clean_up.ended == ["quick"])


def test_clean_up_where_there_are_no_threads_is_done_by_who_closes(serve, connect, clean_up, monkeypatch):
    server = serve(clean_up)
    streams = [connect()("quick") for _ in range(3)]
    for stream in streams:
        next(stream)

    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        server.close()
    assert clean_up.ended == ["quick"] * 3


def test_ctrl_c_while_clean_up_is_waited_for_ends_the_closing(spawn_server, door_dir, connect):
    child = spawn_server(
        """
        import threading
        from doorpool import Server

        server = Server()
        pulled = threading.Event()

        @server.endpoint("a.door")
        def numbers():
            try:
                yield 1
                yield 2
            finally:
                open("begun", "w").close()
                threading.Event().wait()

        server.attach(pulled.set, "pulled.door")
        server.start()
        ready()
        pulled.wait()
        try:
            server.close(None)
        except KeyboardInterrupt:
            result("Ctrl-C")
        """,
        cwd=door_dir,
    )
    stream = connect()()
    assert next(stream) == 1
    connect(door_dir / "pulled.door")()
    wait_until(lambda: (door_dir / "begun").exists(), timeout=PATIENCE)
    child.signal(signal.SIGINT)
    assert child.finish().value == "Ctrl-C"


def test_a_child_that_is_forked_in_clean_up_does_nothing_else(spawn_server, door_dir, connect):
    child = spawn_server(
        """
        import os
        from doorpool import Server

        server = Server()
        forked = []

        @server.endpoint("a.door")
        def numbers():
            try:
                yield 1
                yield 2
            finally:
                if not forked:
                    forked.append(os.fork())
                    if forked[0]:
                        forked.append(os.waitpid(forked[0], 0)[1])
                with open("journal", "a") as journal:
                    print("child" if forked[0] == 0 else "parent", file=journal)

        ready()
        server.run()
        result(forked[1])
        """,
        cwd=door_dir,
    )
    streams = [connect(wait=10)() for _ in range(2)]
    assert [next(stream) for stream in streams] == [1, 1]
    child.signal(signal.SIGTERM)
    assert child.finish().value == 0
    assert (door_dir / "journal").read_text().split() == ["child", "parent", "parent"]


HELD_UP = """
    import threading
    from doorpool import Server

    # One thread, which makes room for the main thread.
    server = Server(max_threads=1, close_timeout=0.05)

    @server.endpoint("a.door")
    def numbers():
        main = threading.current_thread() is threading.main_thread()
        try:
            yield main
            yield main
        finally:
            if main:
                open("cleaning-up", "w").close()
                threading.Event().wait()

    @server.endpoint("b.door")
    def hold():
        open("holding", "w").close()
        threading.Event().wait()

    class Entered:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            open("leaving", "w").close()
            threading.Event().wait()

    server.attach(Entered(), "c.door")
    ready()
    server.run()
"""


@pytest.mark.ids("U12", "T13")
def test_a_second_signal_ends_a_server_that_leaves_something(spawn_server, door_dir, connect):
    """For who has entered it and has not left; nobody knows how long that takes."""
    child = spawn_server(HELD_UP, cwd=door_dir)
    connect(door_dir / "c.door", wait=10, reopen=False)._line.enter(None)
    child.signal(signal.SIGTERM)
    wait_until(lambda: (door_dir / "leaving").exists(), timeout=PATIENCE)
    child.signal(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize("by", ["a procedure, and a clean-up waits", "the clean-up of what was dropped"])
def test_a_second_signal_ends_a_server_whose_main_thread_is_held(spawn_server, door_dir, connect, by):
    """Whoever has it, and whatever clean-up there is."""
    child = spawn_server(HELD_UP, cwd=door_dir)
    path, streams = door_dir / "a.door", []

    def pulled_from_main_thread() -> bool:
        streams.append(connect(wait=10, reopen=False)())
        return next(streams[-1])

    wait_until(pulled_from_main_thread, timeout=PATIENCE)
    if "procedure" in by:
        call = connect(door_dir / "b.door").submit()
        wait_until(lambda: (door_dir / "holding").exists(), timeout=PATIENCE)
    else:
        streams.clear()
        wait_until(lambda: (door_dir / "cleaning-up").exists(), timeout=PATIENCE)
    child.signal(signal.SIGTERM)
    wait_until(lambda: not path.exists(), "names go first")
    if "procedure" in by:
        assert isinstance(call.exception(PATIENCE), BrokenDoorError)

    child.signal_until_ended(signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM


# -- signals


@pytest.mark.parametrize("what", [Server.close, Endpoint.close])
def test_all_is_left_though_that_fails_and_the_log_with_it(serve, connect, failing_log, what):
    def fail() -> None:
        raise OSError("cannot be left")

    manager = Manager(fail)
    server = serve(manager)
    (endpoint,) = server.endpoints
    line = connect()._line
    for _ in range(3):
        line.enter(None)
    what(server if what is Server.close else endpoint)
    assert manager.left == [BrokenDoorError] * 3
    assert len(failing_log.seen) == 3


def test_calls_are_cut_though_the_log_fails(serve, connect, failing_log):
    work = Work()
    server = serve(work)
    calls = [Background(connect(), "too late:1") for _ in range(2)]
    work.wait_begun(2)
    server.close(0)
    for call in calls:
        error = call.error()
        assert isinstance(error, BrokenDoorError)
        assert error.may_have_run
    assert failing_log.seen == ["doorpool: 2 calls cut after 0.0 s: Work"]
    work.ends["too late"].set()
    wait_until(lambda: server.statistics().threads == 0, timeout=PATIENCE)


@pytest.mark.leaves_names
def test_a_door_is_taken_away_though_its_name_stays_and_the_log_fails(serve, connect, failing_log):
    def fail(self: Name) -> bool:
        raise OSError("a directory that may not be written")

    (endpoint,) = serve(len).endpoints
    proxy = connect(reopen=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Name, "remove", fail)
        endpoint.close()
    assert endpoint.paths == ()
    with pytest.raises(RevokedError):
        proxy("x")
    assert any("stays behind" in line for line in failing_log.seen)


def test_a_signal_for_which_there_is_no_memory_is_not_lost(door_dir, monkeypatch, caplog):
    """The thread that closes the server is started as soon as there is."""
    starts, start = [], threading.Thread.start

    def start_at_last(thread: threading.Thread) -> None:
        if thread.name.endswith("-closing"):
            starts.append(thread)
            if len(starts) < 3:
                raise MemoryError
        start(thread)

    with Server() as server:
        server.attach(len, door_dir / "a.door")
        server.start()
        monkeypatch.setattr(threading.Thread, "start", start_at_last)
        keeper().afterwards(server._close_by_signal)
        assert server.wait(PATIENCE)
    starts[-1].join(PATIENCE)
    assert len(starts) == 3
    wait_until(lambda: "no thread to close it" in caplog.text)


# -- an endpoint


@pytest.mark.parametrize("end", [Endpoint.revoke, Endpoint.close])
@pytest.mark.ids("R1", "R2", "R3", "R5", "R9")
def test_revoke_with_calls_in_every_state(serve, connect, door_dir, work, end):
    """
    Running calls finish; those that wait for a thread did not run; the other doors know nothing of it.
    """
    server = serve(work, server={"max_threads": 3})
    (endpoint,) = server.endpoints
    other = server.attach(str.upper, door_dir / "b.door")
    descriptor = endpoint.open()
    running = [Background(connect(reopen=False), f"in time:{number}") for number in range(3)]
    work.wait_begun(3)
    idle, away = connect(reopen=False), connect(other)
    proxies = [connect(reopen=False) for _ in range(5)]
    channels = [_only_channel(proxy) for proxy in proxies]
    queued = [Background(proxy, f"at once:{number}") for number, proxy in enumerate(proxies)]
    wait_until(lambda: all(map(rawpeer.unread_there, channels)))
    assert not endpoint.revoked
    assert idle.alive
    with contextlib.ExitStack() as closers:
        for _ in range(4):
            closers.callback(Background(end, endpoint).result)
        end(endpoint)
    end(endpoint)
    assert endpoint.revoked
    assert not (door_dir / "a.door").exists()
    assert endpoint.paths == ()
    for call in queued:
        error = call.error()
        assert isinstance(error, RevokedError)
        assert not error.may_have_run
        assert "a.door" in str(error)
    for _ in range(2):
        with pytest.raises(RevokedError):
            idle("at once:idle")
    assert not idle.alive
    assert idle.info.name == endpoint.name, "what it said of itself stays readable"
    with pytest.raises(ClosedError):
        endpoint.open()
    with pytest.raises(RevokedError), descriptor:
        Proxy(descriptor)
    assert all(call.running for call in running)
    waits = Background(away, "still there")  # behind the running ones, in the same pool
    work.ends["in time"].set()
    assert [call.result() for call in running] == [f"did in time:{number}" for number in range(3)]
    assert waits.result() == "STILL THERE"
    assert sorted(work.journal) == [f"in time:{number}" for number in range(3)]
    assert not server.closed


@pytest.mark.ids("R4", "Y1")
def test_revoke_in_a_child_is_refused_whatever_the_parents_threads_were_doing(serve, connect):
    """
    Another thread was handing the door out when the process forked; its lock is held for ever in the child.
    """
    (endpoint,) = serve(os.getpid).endpoints
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with endpoint._making:
            held.set()
            assert go_on.wait(PATIENCE)

    holder = Background(hold)
    assert held.wait(PATIENCE)
    try:
        with pytest.raises(PermissionError, match="only the process that made it"):
            run_as_uid(None, endpoint.revoke, timeout=PATIENCE / 3)
    finally:
        go_on.set()
    holder.result()
    assert connect()() == os.getpid()


@pytest.mark.ids("R8", "A12")
def test_only_a_name_that_is_still_ours_goes(serve, connect, door_dir):
    server = serve(lambda: "first", server={})
    path = door_dir / "a.door"
    with Server() as successor:
        successor.attach(lambda: "second", path, replace=True)
        server.endpoints[0].revoke()
        assert path.is_socket()
        assert connect()() == "second"
        server.close()
        assert path.is_socket()
        assert connect()() == "second"
    assert not path.exists()


@pytest.mark.parametrize("ending", ["at its end", "os._exit"])
@pytest.mark.ids("R7")
def test_the_end_of_the_process_takes_its_doors_away(spawn_server, door_dir, connect, ending):
    """
    One that ends takes its names along and says goodbye; of one that does not, the kernel closes the sockets.
    """
    child = spawn_server(
        """
        import os, sys
        from doorpool import Endpoint, Server

        def end():
            go_on.set()

        import threading
        go_on = threading.Event()
        server = Server()
        server.attach(str.upper, "a.door")
        server.attach(end, "end.door")
        server.start()
        endpoint = Endpoint(str.lower).attach("b.door")
        ready()
        go_on.wait()
        if sys.argv[1] == "os._exit":
            os._exit(0)
        """,
        ending,
        cwd=door_dir,
    )
    proxies = [connect(door_dir / name, reopen=False) for name in ("a.door", "b.door")]
    assert [proxy("Ab") for proxy in proxies] == ["AB", "ab"]
    with contextlib.suppress(BrokenDoorError):
        connect(door_dir / "end.door")()
    assert child.wait() == 0
    names = ["a.door", "b.door", "end.door"] if ending == "os._exit" else []
    assert sorted(os.listdir(door_dir)) == names
    for proxy in proxies:
        with pytest.raises(BrokenDoorError if names else RevokedError) as caught:
            proxy("Cd")
        assert not caught.value.may_have_run
        assert not proxy.alive
    for name in names:
        (door_dir / name).unlink()


# -- during use


class Sentinel:
    """
    Files opened as soon as descriptors become free, by which somebody who uses a number too long is found.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[tuple[int, Path]] = []

    def take_numbers(self, count: int = 12) -> None:
        for _ in range(count):
            path = self._folder / f"sentinel {len(self._files)}"
            path.write_text(path.name)
            self._files.append((os.open(path, os.O_RDWR), path))

    def check(self) -> None:
        """Find the files as they were made: at their numbers, at their beginning, with their content."""
        for number, path in self._files:
            assert os.readlink(f"/proc/self/fd/{number}") == str(path)
            assert os.lseek(number, 0, os.SEEK_CUR) == 0
            assert path.read_text() == path.name
            os.close(number)


class InUse:
    """
    A server, an endpoint, a proxy, a view and a handle, which 16 threads use.
    """

    def __init__(self, folder: Path) -> None:
        self.server = Server(max_threads=8)
        self.endpoint = self.server.attach(lambda number: number, folder / "a.door")
        self.server.start()
        self.proxy = Proxy(folder / "a.door", reopen=False)
        self.view = self.proxy.options(timeout=PATIENCE)
        self.handle = self.view._line.handle
        self.calls = 0
        self._under_way = threading.Semaphore(0)
        self._threads = [Background(self._use, number) for number in range(16)]

    def _use(self, number: int) -> None:
        rng = random.Random(number)
        while True:
            value = rng.random()
            assert self.view(value) == value
            self._under_way.release()

    def wait_in_use(self) -> None:
        for _ in range(20):
            assert self._under_way.acquire(timeout=PATIENCE)

    def errors(self) -> set[type[BaseException] | None]:
        return {type(thread.error()) for thread in self._threads}

    def close(self) -> None:
        self.proxy.close()
        self.server.close(PATIENCE)


WHAT = {
    "proxy": (lambda it: it.proxy.close, {ClosedError}),
    "view": (lambda it: it.view.close, {ClosedError}),
    "handle": (lambda it: it.handle.close, {ClosedError}),
    "revoke": (lambda it: it.endpoint.revoke, {RevokedError}),
    "endpoint": (lambda it: it.endpoint.close, {RevokedError}),
    "server": (lambda it: lambda: it.server.close(PATIENCE), {RevokedError}),
    "server, at once": (lambda it: lambda: it.server.close(0), {RevokedError, BrokenDoorError}),
}


@pytest.mark.parametrize(("what", "errors"), WHAT.values(), ids=WHAT)
@pytest.mark.ids("G09", "R5")
def test_close_during_use(door_dir, tmp_path, many, what, errors):
    """
    Each of 16 threads gets its result or the right error, and nobody touches a number that is not his.
    """
    for round in range(many(8, 750)):
        use, sentinel = InUse(door_dir), Sentinel(tmp_path)
        try:
            began = time.monotonic()
            use.wait_in_use()
            usual = time.monotonic() - began
            close = what(use)
            began = time.monotonic()
            closers = [Background(close) for _ in range(round % 3)]  # several at once, too
            close()
            sentinel.take_numbers()
            for closer in closers:
                closer.result()
            seen = use.errors()
            assert time.monotonic() - began < PROMPTLY + 20 * usual
            assert seen
            assert seen <= errors
            close()
        finally:
            use.close()
        sentinel.check()


# -- by a signal handler, in the middle of what its thread is doing


#: Lines at which Python looks for no signals, there being no call that returns and no jump; and a
#: handler that waits for other threads could not be called there, for they need the lock.
_NO_PLACE_FOR_SIGNALS = ("with self._count:", "self.waiting += 1", "self.waiting -= 1")


class Interrupted:
    """
    Calls a handler at the n-th line that a function runs in the library, or in what it waits with.

    As Python calls a signal handler: in the same thread, between two of its instructions.
    """

    def __init__(self, function: Callable[[], Any], handler: Callable[[], Any], line: int) -> None:
        self._function, self._handler, self._line = function, handler, line
        self.lines = 0
        self.happened = False
        self.thread = Background(self._run)

    def _run(self) -> Any:
        sys.settrace(self._trace)
        try:
            return self._function()
        finally:
            sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        code = frame.f_code
        here = linecache.getline(code.co_filename, frame.f_lineno).strip()
        if event == "line" and here not in _NO_PLACE_FOR_SIGNALS:
            self.lines += 1
            if self.lines == self._line:
                self.happened = True
                self._handler()
        return self._trace if "/doorpool/" in code.co_filename else None


def _at_every_line(run: Callable[[int], Interrupted], step: int) -> int:
    line = 1
    while run(line).happened:
        line += step
    return line


@pytest.mark.parametrize("function", ["close", "call", "ping"])
@pytest.mark.ids("G09")
def test_a_handler_closes_the_proxy_that_its_thread_is_using(serve, connect, many, function):
    serve(lambda: "result")

    def run(line: int) -> Interrupted:
        with connect(timeout=PATIENCE) as proxy:
            use = {"close": proxy.close, "call": proxy, "ping": proxy.ping}[function]
            if function != "close":
                # So that the call opens a channel.  Not in the thread that is interrupted: a
                # finalizer that happens to run there has lines of the library, too.
                proxy._line.handle._idle.pop().close()
            interrupted = Interrupted(use, proxy.close, line)
            error = interrupted.thread.error()
            assert error is None or isinstance(error, ClosedError), (line, error)
            assert proxy.closed is (interrupted.happened or function == "close")
            assert proxy.fileno() == -1 or not proxy.closed
            return interrupted

    assert _at_every_line(run, many(2, 1)) > 20


@pytest.mark.parametrize("function", ["close", "wait", "run"])
@pytest.mark.ids("G09")
def test_a_handler_closes_the_server_that_its_thread_closes_waits_for_or_runs(door_dir, many, function):
    """
    A handler of the program's own, as for SIGTERM.
    """

    def run(line: int) -> Interrupted:
        server = Server(max_threads=2)
        server.attach(os.getpid, door_dir / "a.door")
        server.start()
        close = functools.partial(server.close, None)  # whoever waits for himself hangs
        uses = {"close": close, "wait": server.wait, "run": server.run}
        interrupted = Interrupted(uses[function], close, line)
        if function == "close":
            interrupted.thread.result()
        else:
            end = Background(_close_when_it_rests, interrupted, server)
            error = interrupted.thread.error()
            assert error is None or (function == "run" and isinstance(error, ClosedError)), error
            end.result()
        assert server.closed
        assert not (door_dir / "a.door").exists()
        wait_until(lambda: server.statistics().threads == 0)
        return interrupted

    assert _at_every_line(run, many(3, 1)) > 5


def _close_when_it_rests(interrupted: Interrupted, server: Server) -> None:
    """Close the server from another thread if the handler's line lies behind the wait."""
    lines = -1
    while lines < interrupted.lines and not interrupted.happened:
        lines = interrupted.lines
        time.sleep(0.03)  # too short is harmless: the handler comes a little later
    if not interrupted.happened:
        server.close(None)
