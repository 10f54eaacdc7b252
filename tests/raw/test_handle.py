"""
Handles: many callers, closing in the middle, ping, taking the door away, and fork.
"""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import select
import socket
import sys
import threading
import warnings
import weakref

import pytest
from support import rawpeer, run_as_uid, wait_until
from support.rawdoor import PATIENCE, Background, Canary

from doorpool import _handle
from doorpool._channel import Channel
from doorpool._errors import (
    BrokenDoorError,
    BusyError,
    CallTimeoutError,
    ClosedError,
    ProtocolError,
    RevokedError,
)
from doorpool._keeper import keeper
from doorpool.door import Handle, Reason


class Held:
    """A procedure that is running until it is let go."""

    def __init__(self):
        self.running, self.go = threading.Semaphore(0), threading.Event()
        self.invocations = []

    def __call__(self, invocation):
        self.invocations.append(invocation)
        self.running.release()
        assert self.go.wait(PATIENCE)
        invocation.reply(b"finished")
        self.invocations.clear()

    def wait(self):
        assert self.running.acquire(timeout=PATIENCE)


@pytest.fixture
def held():
    held = Held()
    yield held
    held.go.set()


# -- closing


@pytest.mark.ids("L10")
def test_close_does_not_disturb_running_calls(serve, held):
    handle = serve(held).handle()
    calls = [Background(handle.call) for _ in range(2)]
    for _ in calls:
        held.wait()
    handle.close()
    assert handle.closed
    assert handle.fileno() == -1
    for what in (handle.call, handle.ping):
        with pytest.raises(ClosedError, match="closed"):
            what()
    held.go.set()
    assert [call.result().data for call in calls] == [b"finished"] * 2
    assert not handle._idle


@pytest.mark.ids("L10", "G09")
def test_close_while_many_threads_call(serve):
    for _ in range(20):
        serving = serve(threads=4)
        handle = serving.handle()
        under_way = threading.Semaphore(0)

        def caller(handle=handle, under_way=under_way):
            calls = 0
            with contextlib.suppress(ClosedError):
                while True:
                    assert handle.call(b"%d" % calls).data == b"%d" % calls
                    calls += 1
                    under_way.release()

        callers = [Background(caller) for _ in range(8)]
        for _ in range(16):
            assert under_way.acquire(timeout=PATIENCE)
        handle.close()
        for call in callers:
            call.result()
        wait_until(lambda serving=serving: serving.door.channels == 0)
        serving.close()


def test_close_can_be_repeated_and_comes_with_with(serve):
    with serve().handle() as handle:
        handle.close()
    handle.close()
    assert not handle.alive
    assert "closed" in repr(handle)
    assert handle.info().name == "door"


def test_close_while_the_door_is_being_opened():
    """The knock waits for its answer; the call ends with it, and the descriptor is given back."""
    with rawpeer.RawServer() as server:
        handle = Handle(server.descriptor, lazy=True)
        call = Background(handle.call)
        server.hear()
        handle.close()
        server.admit()
        server.receive()
        server.send(rawpeer.frame(rawpeer.REPLY, 1, b"all the same"))
        assert call.result().data == b"all the same"
        server.expect_end()


# -- ping and alive


@pytest.mark.ids("I7", "L4")
def test_ping(serve, held):
    serving = serve(held, threads=1)
    handle = serving.handle()
    handle.ping()
    running = Background(handle.call)
    held.wait()
    with pytest.raises(CallTimeoutError) as caught:  # nobody is there to answer
        handle.ping(timeout=0.05)
    assert not caught.value.may_have_run
    assert handle.alive
    held.go.set()
    running.result()
    handle.ping()
    serving.door.revoke()
    with pytest.raises(RevokedError):
        handle.ping()
    assert not handle.alive


@pytest.mark.ids("L14", "X6", "X7")
def test_time_over_while_all_threads_are_busy(serve, held):
    """The waiting call never runs; the running one may have."""
    handle = serve(held, threads=1).handle()
    running = Background(handle.call, b"running", timeout=0.15)
    held.wait()
    with pytest.raises(CallTimeoutError) as caught:
        handle.call(b"waiting", timeout=0.05)
    assert not caught.value.may_have_run
    assert running.error().may_have_run
    (invocation,) = held.invocations
    assert invocation.cancelled
    held.go.set()
    assert handle.call(b"next", timeout=PATIENCE).data == b"finished"
    assert held.running.acquire(timeout=PATIENCE)
    assert not held.running.acquire(blocking=False)  # two have run, and not three


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_timeouts_that_are_none(serve, timeout):
    with pytest.raises(ValueError, match="above 0"):
        serve().handle().call(timeout=timeout)


def test_endless_timeouts(serve):
    handle = serve().handle()
    assert handle.call(b"x", timeout=float("inf")).data == b"x"
    assert handle.call(b"x", timeout=1e300).data == b"x"


def test_deadline_reaches_the_procedure(serve):
    seen = []

    def procedure(invocation):
        import time

        seen.append(invocation.deadline and invocation.deadline - time.monotonic())
        invocation.reply()

    handle = serve(procedure).handle()
    handle.call(timeout=50)
    handle.call()
    assert 40 < seen[0] <= 50
    assert seen[1] is None


# -- taken away


@pytest.mark.ids("R1", "R2", "R3")
def test_revoke_lets_the_running_call_finish_and_ends_all_others(serve, held):
    serving = serve(held, threads=1)
    running_at, idle, fresh = serving.handle(), serving.handle(), serving.handle(lazy=True)
    running = Background(running_at.call)
    held.wait()
    waiting_at = serving.handle()
    channel = waiting_at._idle[-1].socket
    wait_until(lambda: serving.gate.channels == 3)
    with keeper().lock:  # under which they are parked: from now on a call rings
        waiting = Background(waiting_at.call)
    wait_until(lambda: rawpeer.unread_there(channel))
    serving.door.revoke()
    serving.door.revoke()  # again
    assert serving.door.revoked
    for call in (waiting.result, idle.call, fresh.call):
        with pytest.raises(RevokedError) as caught:
            call()
        assert not caught.value.may_have_run
    assert running.running
    held.go.set()
    assert running.result().data == b"finished"
    with pytest.raises(RevokedError):
        running_at.call()
    with pytest.raises(ClosedError):
        serving.door.open()
    wait_until(lambda: serving.door.channels == 0)


@pytest.mark.ids("R1", "R8")
def test_revoke_takes_the_names_and_the_descriptors(serve, door_dir):
    serving = serve()
    path = serving.door.listen(door_dir / "a.door")
    by_path, number = Handle(path), serving.door.open()
    serving.door.revoke()
    assert os.listdir(door_dir) == []
    with by_path, pytest.raises(RevokedError):
        by_path.call()
    with pytest.raises(FileNotFoundError):
        Handle(path)
    with pytest.raises(RevokedError):
        Handle(number)
    os.close(number)  # it was not taken over
    with pytest.raises(ClosedError):
        serving.door.listen(path)


def test_idle_channel_that_the_server_closed_is_replaced(serve):
    """The server says that it was idle: the call goes on another, and nobody notices."""
    from doorpool._wire import Refusal

    serving = serve()
    handle = serving.handle()
    handle.call()
    for served in list(serving.door._channels):
        serving.gate.end(served, Refusal(Reason.IDLE, "idle"))
    assert handle.call(b"again").data == b"again"


@pytest.mark.ids("X15", "L14")
def test_nothing_is_repeated_that_may_have_run():
    """The channel ends without a word behind a request that was read."""
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        first = Background(handle.call)
        server.accept()
        server.send(rawpeer.frame(rawpeer.REPLY, server.receive().number))
        first.result()
        second = Background(handle.call, b"once")  # on an idle channel: the case of a repetition
        assert server.receive().body == b"once"
        server.channel.close()
        error = second.error()
        assert isinstance(error, BrokenDoorError)
        assert error.may_have_run
        server.port.setblocking(False)
        with pytest.raises(BlockingIOError):  # no other knock
            server.port.recv(1)


@pytest.mark.ids("X15")
def test_what_certainly_did_not_run_is_repeated_once():
    """The channel ends with the request unread."""
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        first = Background(handle.call)
        server.accept()
        server.send(rawpeer.frame(rawpeer.REPLY, server.receive().number))
        first.result()
        second = Background(handle.call, b"once")
        server.channel.recv(1, socket.MSG_PEEK)
        server.channel.close()
        server.accept()
        assert server.receive().body == b"once"
        server.send(rawpeer.frame(rawpeer.REPLY, 1, b"at last"))
        assert second.result().data == b"at last"


def test_knocks_that_are_dropped_are_made_again():
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        call = Background(handle.call)
        server.hear()
        server.hear()  # which drops the first
        server.admit()
        server.send(rawpeer.frame(rawpeer.REPLY, server.receive().number, b"third time"))
        assert call.result().data == b"third time"
        copy = os.dup(handle.fileno())
        call = Background(Handle, copy)
        for _ in range(3):
            server.hear()
        server.knock_socket.close()
        assert isinstance(call.error(), BusyError)
        os.close(copy)


@pytest.mark.ids("L14")
@pytest.mark.parametrize(
    ("words", "may_have_run"),
    [
        pytest.param(rawpeer.frame(rawpeer.REPLY, 1, b"late"), True, id="a reply"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 1, b"late", descriptors=1), True, id="a reply with a file"),
        pytest.param(rawpeer.frame(rawpeer.FAILURE, 1, rawpeer.refusal(rawpeer.BUSY)), False, id="a refusal"),
        pytest.param(
            rawpeer.frame(rawpeer.FAILURE, 1, rawpeer.refusal(rawpeer.BUSY, may_have_run=True)), True,
            id="a failure",
        ),
        pytest.param(
            rawpeer.frame(rawpeer.GOODBYE, 1, rawpeer.refusal(rawpeer.CLOSED)), False, id="a goodbye"
        ),
        pytest.param(rawpeer.frame(rawpeer.FAILURE, 1, b"?"), True, id="a refusal that is none"),
        pytest.param(b"what is no frame at all" * 5, True, id="nonsense"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 1, b"late")[:20], True, id="half a reply"),
        pytest.param(b"", True, id="nothing"),
    ],
)  # fmt: skip
def test_what_comes_just_as_a_call_is_given_up_says_whether_it_ran(monkeypatch, words, may_have_run):
    shutdown, received = Channel.shutdown, threading.Event()
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        opening = Background(handle.open_channel, None)  # of which the call's time is not to be
        server.accept()
        opening.result()
        (channel,), given_up = handle._idle, []

        def give_up(it):
            if it is channel:
                assert received.wait(PATIENCE)  # however long the server takes for it
                if words and not given_up:
                    with open(os.devnull) as file:
                        server.send(words, [file.fileno()] * (words[2:4] == b"\x01\x00"))
                given_up.append(it)
            shutdown(it)

        monkeypatch.setattr(Channel, "shutdown", give_up)
        call = Background(handle.call, timeout=1.0)
        server.receive()
        received.set()
        error = call.error()
        monkeypatch.undo()
        assert isinstance(error, CallTimeoutError)
        assert error.may_have_run is may_have_run
        assert given_up
        assert not handle._idle


ANSWERS = """
    from doorpool.door import Door, Gate

    gate = Gate()
    door = Door(gate)
    door.listen("a.door")
    ready()
    while True:
        gate.wait().reply(b"x")
"""


CUT = """
    import gc, os
    from support.cuts import each_step
    from doorpool.door import Handle

    def held():
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    with Handle("a.door") as handle:
        handle._dial(None).close()
        before, steps, states = held(), 0, set()
        for step in each_step():
            with step:
                handle._dial(None).close()
            step.error = None
            states.add((handle._users, handle._knocks.qsize()))
            steps += 1
        left = held() - before
        handle._idle.clear()
        result((steps, states, left, handle.call().data))
"""


@pytest.mark.ids("X19", "G05")
def test_an_opening_that_is_cut_at_any_step_leaves_the_handle_as_it_was(spawn_server, run_python, door_dir):
    """
    No turn to knock is lost, no user of the descriptor is counted for good, and next to nothing stays open.

    (What is a bare number for one step is lost by a cut at that step, as in ``socket.socketpair``.)
    """
    spawn_server(ANSWERS, cwd=door_dir)
    steps, states, left, answer = run_python(CUT, cwd=door_dir).value
    assert steps > 50
    assert states == {(0, _handle.MAX_KNOCKS)}
    assert left < 20
    assert answer == b"x"


@pytest.mark.ids("X19", "G05")
def test_a_turn_to_knock_that_is_lost_comes_back(serve):
    handle = serve().handle()
    for _ in range(2 * _handle.MAX_KNOCKS):
        handle._knocks.get(timeout=PATIENCE)
    assert handle._knocks.qsize() == _handle.MAX_KNOCKS


@pytest.mark.parametrize("taken", [0, 1])
def test_turns_to_knock_keep_nothing_alive(taken):
    knocks = queue.SimpleQueue()
    for _ in range(3):
        knocks.put(_handle._Turn(knocks))
    turns = [knocks.get() for _ in range(taken)]
    there = weakref.ref(knocks)
    del knocks
    assert there() is None
    turns.clear()
    assert there() is None


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(b"x" * 60, id="no frame"),
        pytest.param(rawpeer.frame(rawpeer.FAILURE, 1, b"??"), id="no refusal"),
        pytest.param(rawpeer.frame(rawpeer.GOODBYE, 0, b"??"), id="no farewell"),
        pytest.param(rawpeer.frame(rawpeer.FAILURE, 1, rawpeer.refusal(99)), id="no reason"),
        pytest.param(rawpeer.frame(rawpeer.REPLY, 7, b"late"), id="the answer to another call"),
    ],
)
def test_what_is_wrong_with_an_answer_is_told_with_the_doors_name(words):
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        call = Background(handle.call, timeout=PATIENCE)
        server.accept()
        server.receive()
        server.send(words)
        error = call.error()
        assert isinstance(error, ProtocolError)
        assert str(error).startswith(handle.name)
        assert str(error).count(handle.name) == 1


@pytest.mark.parametrize("stranger", [None, 4242])
def test_what_a_stranger_says_of_a_refusal_is_made_printable(stranger):
    said = "why\n\x1b[2J" + "x" * 10_000
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        if stranger is not None:
            handle.stranger = stranger
        call = Background(handle.call, timeout=PATIENCE)
        server.accept()
        request = server.receive()
        server.send(rawpeer.frame(rawpeer.FAILURE, request.number, rawpeer.refusal(rawpeer.BUSY, said)))
        error = call.error()
    assert isinstance(error, BusyError)
    assert ("why\\n\\x1b[2Jx" if stranger else said) in str(error)
    assert (len(str(error)) < 5000) == (stranger is not None)


def test_a_request_that_nobody_reads_for_a_while_goes_whole(monkeypatch):
    looked = threading.Event()
    look_up = Handle._look_up_sending

    def look(handle, channel, deadline):
        look_up(handle, channel, deadline)
        if not select.select([], [channel.socket], [], 0)[1]:
            looked.set()

    monkeypatch.setattr(Handle, "_look_up_sending", look)
    monkeypatch.setattr(_handle, "LOOK_UP", 0.02)
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        call = Background(handle.call, bytes(range(256)) * 40_000, timeout=PATIENCE)
        server.accept()
        for _ in range(3):
            assert looked.wait(PATIENCE)
            looked.clear()
        request = server.receive()
        assert request.body == bytes(range(256)) * 40_000
        server.send(rawpeer.frame(rawpeer.REPLY, request.number, b"read"))
        assert call.result().data == b"read"


def test_who_waits_to_knock_hears_that_the_server_has_gone(monkeypatch):
    """As many of this process have knocked already as may at a time, and none is answered."""
    monkeypatch.setattr(_handle, "LOOK_UP", 0.02)
    knock, knocked = Handle._knock, set()

    def note(it, *args):
        knocked.add(threading.get_ident())
        return knock(it, *args)

    monkeypatch.setattr(Handle, "_knock", note)
    with rawpeer.RawServer() as server, Handle(server.descriptor, lazy=True) as handle:
        knocking = [Background(handle.call) for _ in range(_handle.MAX_KNOCKS)]
        wait_until(handle._knocks.empty)
        checked = threading.Event()
        check_there = Handle._check_there

        def check(it, door):
            check_there(it, door)
            if threading.get_ident() not in knocked:
                checked.set()

        monkeypatch.setattr(Handle, "_check_there", check)
        waiting = Background(handle.call)
        assert checked.wait(PATIENCE)
        server.close()
        for each in (waiting, *knocking):
            error = each.error()
            assert isinstance(error, BrokenDoorError)
            assert not error.may_have_run


# -- fork


@pytest.mark.parametrize(("spin", "looks"), [(0, False), (2_000_000, True)])
def test_an_answer_is_looked_for_only_as_long_as_one_may(monkeypatch, spin, looks):
    yields = []
    monkeypatch.setattr(os, "sched_yield", lambda: yields.append(1))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _handle._wait_a_moment(ours, None, spin)
        assert bool(yields) == looks
        theirs.send(b"an answer")
        yields.clear()
        _handle._wait_a_moment(ours, None, spin)
        assert not yields


def _child_calls(handle, words):
    with handle:
        return bytes(handle.call(words, timeout=PATIENCE).data), handle.fileno() >= 0


@pytest.mark.ids("Y1", "Y2", "G01")
def test_forked_child_goes_on_with_channels_of_its_own(serve, door_dir):
    serving = serve()
    path = serving.door.listen(door_dir / "a.door")
    for handle in (serving.handle(), Handle(path)):
        with handle, Canary(serving) as canary:
            handle.call(b"before")
            assert run_as_uid(None, _child_calls, handle, b"child") == (b"child", True)
            assert handle.call(b"parent").data == b"parent"
            canary.still_sings()


def _child_opens_many(handle):
    """Fill the numbers that were the parent's, then let the library forget its channels."""
    mine = [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]
    handle.close()
    del handle
    gc.collect()
    return [number for number in mine if not _is_open(number)]


def _is_open(number):
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


@pytest.mark.ids("G01")
def test_forked_child_closes_nothing_twice(serve):
    handle = serve().handle()
    handle.call()
    assert run_as_uid(None, _child_opens_many, handle) == []


def _child_is_no_server(serving):
    errors = []
    for what in (serving.door.open, serving.gate.wait, serving.door.revoke):
        try:
            what()
        except Exception as error:
            errors.append(type(error).__name__)
        else:
            errors.append("nothing")
    serving.gate.wake(1)
    serving.gate.close()
    return errors


@pytest.mark.ids("Y1", "R4", "G02")
def test_forked_child_is_no_server(serve):
    serving = serve(threads=2)
    with Canary(serving) as canary:
        assert run_as_uid(None, _child_is_no_server, serving) == [
            "ClosedError",
            "ClosedError",
            "PermissionError",
        ]
        canary.still_sings()


# -- left lying about


def test_handle_that_is_forgotten_gives_everything_back(serve):
    serving = serve()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        handle = Handle(serving.door.open())
        handle.call()
        del handle
        gc.collect()
    wait_until(lambda: serving.door.channels == 0)


def test_a_default_timeout_of_the_program_is_not_ours(serve):
    number = serve().door.open()
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.05)
    try:
        with Handle(number) as handle:
            assert handle.call(b"as ever").data == b"as ever"
        with rawpeer.RawServer(b"") as silent, pytest.raises(CallTimeoutError):
            Handle(silent.descriptor, open_timeout=0.3)
        os.close(silent.descriptor)
    finally:
        socket.setdefaulttimeout(before)


# -- signal handlers


def call_within(handle, line):
    """
    Call, and call once more from within, where a signal handler would, at such a line of the first.

    Returns whether there were so many lines.
    """
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line"
        if lines == line:
            sys.settrace(None)
            assert handle.call(b"within").data == b"within"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        assert handle.call(b"around").data == b"around"
    finally:
        sys.settrace(before)
    return lines >= line


def test_a_signal_handler_calls_at_any_line_of_an_opening(serve):
    serving = serve(threads=3)
    number = serving.door.open()

    def sweep():
        line = 1
        while True:
            with Handle(os.dup(number), lazy=True) as handle:
                if not call_within(handle, line):
                    return line
            line += 1

    try:
        assert run_as_uid(None, sweep, timeout=20) > 50, "the trace has seen nothing"
    finally:
        os.close(number)
