"""
Calls: synchronous, many at a time, of one's own door too, and within other calls.
"""

from __future__ import annotations

import threading

import pytest
from support.rawdoor import PATIENCE, Background, Canary

from doorpool import _door
from doorpool._errors import BrokenDoorError, BusyError
from doorpool._handle import MAX_IDLE
from doorpool.door import Handle, Reason

# -- one call


@pytest.mark.ids("C1", "L1")
def test_caller_sleeps_until_the_procedure_has_answered(serve):
    running, go = threading.Event(), threading.Event()

    def procedure(invocation):
        running.set()
        assert go.wait(PATIENCE)
        invocation.reply(b"done")

    handle = serve(procedure).handle()
    call = Background(handle.call, b"do it")
    assert running.wait(PATIENCE)
    assert call.running
    go.set()
    assert call.result().data == b"done"


@pytest.mark.ids("L6")
def test_call_of_ones_own_door_runs_on_a_server_thread(serve):
    ran_on = []

    def procedure(invocation):
        ran_on.append(threading.get_ident())
        invocation.reply()

    serving = serve(procedure, threads=1)
    serving.handle().call()
    assert ran_on == [serving.threads[0].ident]


@pytest.mark.ids("L4", "D9")
def test_call_without_anything(serve):
    seen = []

    def procedure(invocation):
        seen.append((bytes(invocation.data), list(invocation.buffers), invocation.descriptors))
        invocation.reply()

    reply = serve(procedure).handle().call()
    assert (bytes(reply.data), list(reply.buffers), reply.descriptors) == (b"", [], [])
    assert seen == [(b"", [], [])]


def test_ping_does_not_run_the_procedure(serve):
    ran = []
    serving = serve(lambda invocation: ran.append(1))
    handle = serving.handle()
    for _ in range(3):
        handle.ping(timeout=PATIENCE)
    assert ran == []
    assert serving.door.channels == 1


def test_answers_that_are_errors_of_the_door(serve):
    serving = serve(lambda invocation: invocation.fail(Reason.BUSY, "come back later", may_have_run=False))
    handle = serving.handle()
    for _ in range(2):
        with pytest.raises(BusyError, match="come back later") as caught:
            handle.call()
        assert not caught.value.may_have_run
    assert serving.door.channels == 1  # it went on with its channel


@pytest.mark.ids("X12", "X14", "L14")
def test_dropped_invocation_releases_the_caller(serve):
    serving = serve(lambda invocation: None)
    handle = serving.handle()
    with pytest.raises(BrokenDoorError, match="dropped the call") as caught:
        handle.call(timeout=PATIENCE)
    assert caught.value.may_have_run
    with Canary(serve()) as canary:
        canary.still_sings()


def test_procedure_that_raises_releases_the_caller(serve):
    def procedure(invocation):
        invocation.reply(1 / 0)

    serving = serve(procedure)
    with pytest.raises(BrokenDoorError):
        serving.handle().call(timeout=PATIENCE)
    assert serving.errors == ["ZeroDivisionError: division by zero"]


def test_invocation_is_answered_once(serve):
    def procedure(invocation):
        invocation.reply(b"first")
        assert invocation.answered
        invocation.fail(Reason.ABORTED, "too late")  # says nothing any more
        invocation.reply(b"second")

    serving = serve(procedure)
    handle = serving.handle()
    assert handle.call().data == b"first"
    assert handle.call().data == b"first"
    serving.close()
    assert serving.errors == ["ClosedError: this invocation has been answered"] * 2


# -- many


@pytest.mark.ids("L2")
def test_many_threads_call_one_door_at_the_same_time(serve):
    everybody = threading.Barrier(8)  # nobody passes before all are inside

    def procedure(invocation):
        everybody.wait(PATIENCE)
        invocation.reply(invocation.data)

    handle = serve(procedure, threads=8).handle()
    calls = [Background(handle.call, b"%d" % i) for i in range(8)]
    assert [call.result().data for call in calls] == [b"%d" % i for i in range(8)]


@pytest.mark.ids("L3")
def test_calls_of_different_doors_run_at_the_same_time(serve):
    both = threading.Barrier(3)

    def procedure(invocation):
        both.wait(PATIENCE)
        invocation.reply()

    serving = serve(procedure, threads=3)
    doors = [serving.door, serving.add(procedure), serving.add(procedure)]
    calls = [Background(serving.handle(door).call) for door in doors]
    for call in calls:
        call.result()


@pytest.mark.ids("L2", "G10")
@pytest.mark.timeout(1800)  # the long form; a call that hangs is given up by itself
@pytest.mark.parametrize("lingers", [False, True])
def test_no_reply_goes_to_another_thread(serve, lingers, many):
    serving = serve(threads=4, lingers=lingers)
    handle = serving.handle()

    def caller(name):
        for i in range(many(200, 10_000)):
            words = b"%d of %d" % (i, name)
            assert handle.call(words, timeout=PATIENCE).data == words

    for call in [Background(caller, name) for name in range(16)]:
        call.result(many(PATIENCE, 600.0))
    assert len(handle._idle) <= MAX_IDLE


@pytest.mark.ids("L2")
def test_idle_channels_beyond_a_few_are_closed(serve):
    everybody = threading.Barrier(12)

    def procedure(invocation):
        everybody.wait(PATIENCE)
        invocation.reply()

    serving = serve(procedure, threads=12)
    handle = serving.handle()
    for call in [Background(handle.call) for _ in range(12)]:
        call.result()
    assert len(handle._idle) == MAX_IDLE


# -- nested


@pytest.mark.ids("L7")
def test_procedure_calls_the_door_that_it_serves(serve):
    def procedure(invocation):
        depth = int(invocation.data)
        inner = handle.call(b"%d" % (depth - 1)).data if depth else b""
        invocation.reply(b"(" + inner + b")")

    handle = serve(procedure, threads=6).handle()
    assert handle.call(b"5").data == b"((((((" + b"))))))"


@pytest.mark.ids("L7")
def test_procedure_calls_another_door(serve):
    inner = serve(lambda invocation: invocation.reply(bytes(invocation.data).upper()), threads=1)
    behind = inner.handle()
    outer = serve(lambda invocation: invocation.reply(behind.call(invocation.data).data), threads=1)
    assert outer.handle().call(b"hello").data == b"HELLO"


@pytest.mark.ids("C3")
def test_call_that_comes_before_listen_has_returned_is_served(serve, door_dir, monkeypatch):
    serving = serve()
    path = str(door_dir / "a.door")
    calls = []
    publish = _door._names.publish

    def publish_and_be_called(*args, **options):
        name = publish(*args, **options)
        handles = Background(Handle, path, lazy=True)
        calls.append(Background(lambda: handles.result()))
        return name

    monkeypatch.setattr(_door._names, "publish", publish_and_be_called)
    serving.door.listen(path)
    with calls[0].result() as handle:
        assert handle.call(b"early").data == b"early"
