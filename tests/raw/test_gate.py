"""
Gates: where threads wait, how they are woken and sent away; several doors, several gates; the keeper.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from support import rawpeer, wait_until
from support.rawdoor import PATIENCE, Background, Canary

from doorpool import _gate, _guests, _keeper, _sockets
from doorpool._channel import Channel
from doorpool._errors import AccessError, BrokenDoorError, BusyError, ClosedError, RevokedError
from doorpool._keeper import keeper
from doorpool.door import Door, Gate, Handle


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.close()
    wait_until(lambda: gate.waiting == 0)
    gate.dispose()


# -- waiting


@pytest.mark.parametrize("timeout", [0, 0.05])
def test_wait_ends_with_its_time(gate, timeout):
    began = time.monotonic()
    assert gate.wait(timeout) is None
    assert timeout <= time.monotonic() - began < timeout + 0.5


def test_wait_returns_a_call_that_is_there_already(gate):
    door = Door(gate)
    with Handle(door.open()) as handle:
        # The first call may come before the keeper has put the channel into the set.
        first = Background(handle.call, b"first")
        gate.wait(PATIENCE).reply()
        first.result()
        channel = handle._idle[-1].socket
        call = Background(handle.call, b"early")
        wait_until(lambda: rawpeer.unread_there(channel))
        invocation = gate.wait(0)
        assert invocation.data == b"early"
        assert invocation.door is door
        assert invocation.credentials.pid == os.getpid()
        assert invocation.waited >= 0
        invocation.reply(b"answered")
        assert call.result().data == b"answered"
    door.revoke()


def test_wake_lets_so_many_threads_go(gate):
    threads = [Background(gate.wait) for _ in range(4)]
    wait_until(lambda: gate.waiting == 4)
    gate.wake(3)
    wait_until(lambda: gate.waiting == 1)
    (last,) = [thread for thread in threads if thread.running]
    gate.wake()
    for thread in threads:
        assert thread.result() is None
    assert last.result() is None


def test_wake_is_kept_for_whoever_comes(gate):
    gate.wake(2)
    assert gate.wait() is None
    assert gate.wait() is None
    assert gate.wait(0) is None


def test_close_sends_everybody_away(gate):
    threads = [Background(gate.wait) for _ in range(4)]
    wait_until(lambda: gate.waiting == 4)
    gate.close()
    gate.close()  # again
    for thread in threads:
        assert thread.error() is None or isinstance(thread.error(), ClosedError)
    with pytest.raises(ClosedError):
        gate.wait(0)
    gate.wake()  # says nothing
    assert gate.closed


@pytest.mark.ids("R1")
def test_close_ends_the_channels_too(gate):
    """The doors should have been taken away before; their callers are told all the same."""
    door = Door(gate)
    with Handle(door.open()) as idle, Handle(door.open(), lazy=True) as fresh:
        gate.close()
        for handle in (idle, fresh):
            with pytest.raises(RevokedError, match="closing") as caught:
                handle.call(timeout=PATIENCE)
            assert not caught.value.may_have_run
    door.revoke()


def test_channel_that_opens_while_the_gate_closes_is_ended(gate, monkeypatch):
    """The gate closes between the last look at it and the channel's entry."""
    door = Door(gate)
    add = gate.add

    def close_and_add(served):
        gate.close()
        add(served)

    monkeypatch.setattr(gate, "add", close_and_add)
    with Handle(door.open(), lazy=True) as handle:
        with pytest.raises(RevokedError):
            handle.call(timeout=PATIENCE)
    wait_until(lambda: door.channels == 0)
    door.revoke()


# -- doors and gates


def test_several_doors_lead_to_one_gate(serve):
    serving = serve(lambda invocation: invocation.reply(b"first"), threads=1)
    second = serving.add(lambda invocation: invocation.reply(b"second"))
    one, two = serving.handle(), serving.handle(second)
    for _ in range(3):
        assert (one.call().data, two.call().data) == (b"first", b"second")
    serving.door.revoke()
    with pytest.raises(RevokedError):
        one.call()
    assert two.call().data == b"second"


@pytest.mark.ids("T3")
def test_two_gates_do_not_wait_for_each_other(serve):
    """A procedure of the first gate's only thread calls a door of the second, and so back again."""
    second = serve(lambda invocation: invocation.reply(b"second"), threads=1)
    behind = second.handle()
    first = serve(lambda invocation: invocation.reply(b"first " + bytes(behind.call().data)), threads=1)
    assert first.handle().call().data == b"first second"


def is_in_epoll(thread):
    """Whether the kernel has a thread of ours waiting in a set, and not just on its way there."""
    with open(f"/proc/self/task/{thread}/wchan") as file:
        return "ep" in file.read()


def is_asleep(thread):
    with open(f"/proc/self/task/{thread}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


@pytest.mark.ids("T4")
def test_the_thread_that_waited_last_is_woken_first(gate):
    """So that one warm thread does the work that one can do."""
    ran_on, names = [], []

    def serve():
        names.append(threading.get_native_id())
        while True:
            try:
                invocation = gate.wait()
            except ClosedError:
                return
            if invocation is not None:
                ran_on.append(threading.get_ident())
                invocation.reply()
            del invocation

    door = Door(gate)
    threads = [Background(serve) for _ in range(4)]
    wait_until(lambda: gate.waiting == 4)
    wait_until(lambda: all(map(is_asleep, names)))
    if not any(map(is_in_epoll, names)):
        pytest.skip("this kernel does not show where a thread sleeps")
    wait_until(lambda: all(map(is_in_epoll, names)))
    with Handle(door.open()) as handle:
        for _ in range(50):
            handle.call()
            wait_until(lambda: all(map(is_in_epoll, names)))
    assert len(set(ran_on)) == 1
    door.revoke()
    gate.close()
    for thread in threads:
        thread.result()


@pytest.mark.ids("L11", "T6")
def test_callers_beyond_the_threads_wait_their_turn(serve):
    inside, most = 0, 0
    lock = threading.Lock()

    def procedure(invocation):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        invocation.reply(invocation.data)
        with lock:
            inside -= 1

    serving = serve(procedure, threads=3)
    handles = [serving.handle() for _ in range(20)]
    calls = [Background(handle.call, b"%d" % i) for i, handle in enumerate(handles)]
    assert [call.result().data for call in calls] == [b"%d" % i for i in range(20)]
    assert most <= 3


# -- who may come in


def test_pings_without_end_keep_no_other_caller_waiting(gate):
    door = Door(gate)
    numbers = [door.open(), door.open()]
    with rawpeer.RawClient(numbers[0]) as flood, rawpeer.RawClient(numbers[1]) as caller:
        wait_until(lambda: gate.channels == 2)
        for number in range(1, 9):
            flood.send(rawpeer.frame(rawpeer.PING, number))
        whole = rawpeer.unread_there(flood.channel)
        caller.send(rawpeer.frame(rawpeer.REQUEST, 1, b"mine"))
        invocation = gate.wait(PATIENCE)
        assert invocation.data == b"mine"
        assert rawpeer.unread_there(flood.channel) > whole / 2
        invocation.reply()
        assert gate.wait(0.05) is None  # all pings are answered by now
        assert [flood.receive().number for _ in range(8)] == list(range(1, 9))
    door.revoke()
    for number in numbers:
        os.close(number)


def test_rule_about_who_may_come_in(serve):
    asked = []

    def admit(credentials):
        asked.append(credentials)
        return "it is Monday" if len(asked) > 1 else None

    serving = serve(admit=admit)
    handle = serving.handle()
    handle.call()
    with pytest.raises(AccessError, match="it is Monday") as caught:
        serving.handle()
    assert not caught.value.may_have_run
    handle.call()  # asked once, at its opening
    assert [(who.pid, who.uid) for who in asked] == [(os.getpid(), os.geteuid())] * 2


def test_rule_that_fails_refuses(serve):
    def admit(credentials):
        raise ZeroDivisionError

    serving = serve(admit=admit)
    with Canary(serve()) as canary:
        with pytest.raises(AccessError, match="rule"):
            serving.handle()
        canary.still_sings()


# -- the keeper


def test_errors_in_the_keeper_leave_the_other_doors_alone(serve, caplog):

    def fail():
        raise ZeroDivisionError

    with Canary(serve()) as canary:
        keeper().soon(fail)
        wait_until(lambda: "please report it" in caplog.text)
        canary.still_sings()
        with serve().handle() as handle:
            handle.call()


def test_a_bell_that_can_ring_no_more_has_rung():
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    os.eventfd_write(bell, 2**64 - 2)
    _sockets.ring(bell)
    assert os.eventfd_read(bell) == 2**64 - 2
    os.close(bell)


@pytest.mark.ids("F02")
@pytest.mark.parametrize(("failures", "rung"), [(2, 1), (3, 0)])
def test_a_bell_is_rung_again_for_whatever_the_kernel_says(monkeypatch, failures, rung):
    """Three times at most: what goes on failing is not going to end."""
    bell, failed = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), []
    write = os.eventfd_write

    def fail(number, count):
        if number == bell and len(failed) < failures:  # other threads ring theirs meanwhile
            failed.append(number)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        write(number, count)

    monkeypatch.setattr(os, "eventfd_write", fail)
    _sockets.ring(bell)
    monkeypatch.undo()
    assert len(failed) == failures
    write(bell, 1)
    assert os.eventfd_read(bell) == rung + 1
    os.close(bell)


@pytest.mark.ids("F02")
def test_a_descriptor_for_which_the_set_has_no_room_is_watched_as_soon_as_it_has(monkeypatch):
    """Paused for a shortage, and not to be put back into the set at first."""
    bell, heard, refused = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), threading.Event(), []
    it = keeper()
    epoll = it._epoll

    class Full:
        def register(self, number, *events):
            if number == bell and len(refused) < 2:
                refused.append(number)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            epoll.register(number, *events)

        def __getattr__(self, name):
            return getattr(epoll, name)

    def hear():
        os.eventfd_read(bell)
        heard.set()

    try:
        it.watch(bell, hear)
        monkeypatch.setattr(_keeper, "SHORTAGE_PAUSE", 0.01)
        monkeypatch.setattr(it, "_epoll", Full())
        it.pause(bell, 0.01)
        os.eventfd_write(bell, 1)
        assert heard.wait(PATIENCE)
        assert len(refused) == 2
        it.unwatch(bell)
        it.pause(bell, 0.01)  # nobody's any more
        assert bell not in it._callbacks
    finally:
        monkeypatch.undo()
        it.unwatch(bell)
        os.close(bell)


def test_the_keeper_turns_first_to_those_for_whom_somebody_waits():

    bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
    heard = []

    def hear(bell):
        os.eventfd_read(bell)
        heard.append(bell)

    try:
        for bell in bells:
            keeper().watch(bell, lambda bell=bell: hear(bell))
        keeper().prefer(bells[2])
        # In the keeper's own thread, which therefore finds them ready all at one time.
        keeper().soon(lambda: [os.eventfd_write(bell, 1) for bell in bells])
        wait_until(lambda: len(heard) == len(bells))
        assert heard == [bells[2], bells[0], bells[1]]
    finally:
        for bell in bells:
            keeper().unwatch(bell)
            os.close(bell)
    assert bells[2] not in keeper()._first


def test_many_who_wait_at_a_name_are_let_in_by_a_few_turns_of_the_keeper(serve, door_dir):
    """One at a time, they would have to wait for as many times all else that the keeper has to do."""
    door = serve().door
    path = door.listen(door_dir / "a.door")
    with contextlib.ExitStack() as stack:
        with keeper().lock:
            turn = keeper().turn
            for _ in range(100):
                stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).connect(path)
        wait_until(lambda: len(door._ports) == 100, timeout=PATIENCE)
        assert keeper().turn - turn < 50
    wait_until(lambda: not door._ports, timeout=PATIENCE)


def test_channels_come_and_go_and_nothing_is_left(serve):
    serving = serve()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        with Handle(serving.door.open()) as handle:
            handle.call()
    wait_until(lambda: serving.door.channels == 0 and not serving.door._ports)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)
    assert serving.gate.channels == 0


@pytest.fixture
def served(gate, monkeypatch):
    """Open a channel, at which the keeper does not look for an hour; return it as the gate sees it."""
    # A look at guests who have gone may still be to come, and would be at this one too.
    wait_until(lambda: not _guests.guests()._guests and not _guests.guests()._fresh)
    monkeypatch.setattr(_guests, "_FIRST_LOOK", 3_600.0)
    door = Door(gate)
    try:
        with Handle(door.open()) as handle:
            (served,) = wait_until(lambda: set(door._channels))  # noted after the answer has gone
            yield served
            handle.close()
            gate.wait(0.05)
    finally:
        door.revoke()
        look_round()


def look_round():
    with keeper().lock:
        _guests.guests().look_round()


@pytest.mark.ids("E05")
def test_the_process_of_a_caller_is_watched_from_the_first_look_on(served):
    assert served.channel.pidfd not in keeper()._callbacks
    look_round()
    assert served.channel.pidfd in keeper()._callbacks


@pytest.mark.ids("E03")
def test_a_caller_who_has_gone_before_the_first_look_leaves_nothing_behind(served, gate):
    (guest,) = _guests.guests()._guests.values()
    number = served.channel.pidfd
    gate.drop(served)
    assert guest.socket.fileno() >= 0  # whoever closes a channel does not wait for the keeper
    look_round()
    assert guest.socket.fileno() < 0
    assert not _guests.guests()._guests
    assert number not in keeper()._callbacks
    with keeper().lock:  # even if it was about to be looked at just then
        served.door.watch_caller(served)
    assert number not in keeper()._callbacks


@pytest.mark.ids("E03")
def test_a_caller_who_goes_after_the_first_look_is_not_watched_any_more(served, gate, monkeypatch):
    monkeypatch.setattr(_guests._sockets, "unsent", lambda _: 1)  # so that he is kept
    look_round()
    (guest,) = _guests.guests()._guests.values()
    number = served.channel.pidfd
    gate.drop(served)
    assert guest.socket.fileno() < 0
    assert number not in keeper()._callbacks


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
@pytest.mark.ids("F02")
def test_a_channel_that_the_set_has_no_room_for_is_ended(gate, monkeypatch, number):
    """Or nobody would ever hear of its calls."""
    door = Door(gate)
    epoll = gate._epoll

    class Full:
        def modify(self, *_):
            raise OSError(number, os.strerror(number))

        register = modify

        def __getattr__(self, name):
            return getattr(epoll, name)

    with Handle(door.open(), lazy=True) as handle:
        monkeypatch.setattr(gate, "_epoll", Full())
        # Which of them depends on whether the goodbye or the request is first.
        with pytest.raises((BusyError, BrokenDoorError)) as caught:
            handle.call(b"", timeout=10)
        assert not caught.value.may_have_run
        monkeypatch.undo()
        call = Background(handle.call, b"again")
        gate.wait(PATIENCE).reply(b"served")
        assert call.result().data == b"served"
    door.revoke()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LookupError("a fault in the library"), ["please report it", "a fault in the library"]),
        (MemoryError("no room"), ["channel closed: no memory for a request (no room)"]),
    ],
    ids=["of ours", "no memory"],
)
def test_an_error_while_a_request_is_read_costs_one_channel_and_no_thread(
    serve, monkeypatch, caplog, error, said
):
    serving = serve(threads=1)
    handle = serving.handle()
    handle.call(b"")

    def fail(*_):
        raise error

    (served,) = serving.gate._served.values()
    monkeypatch.setattr(type(served.channel), "read", fail, raising=True)
    handle._idle[-1].socket.send(b"anything")
    wait_until(lambda: serving.door.channels == 0)
    monkeypatch.undo()
    assert handle.call(b"next").data == b"next"
    assert [text for text in said if text not in caplog.text] == []
    assert ("please report it" in caplog.text) == isinstance(error, LookupError)


def test_a_channel_that_cannot_be_waited_at_is_ended(serve, monkeypatch):
    serving = serve(threads=2, lingers=True)
    doze = Channel.doze

    def fail(channel, seconds):
        if seconds == _gate.LINGER:
            raise OSError(errno.ENOMEM, "no memory")
        doze(channel, seconds)

    monkeypatch.setattr(Channel, "doze", fail)
    handle = serving.handle(lazy=True)
    with pytest.raises((BusyError, BrokenDoorError)) as caught:
        handle.call(b"", timeout=PATIENCE)
    assert not caught.value.may_have_run
    wait_until(lambda: serving.door.channels == 0)
    monkeypatch.undo()
    assert handle.call(b"again").data == b"again"


def test_a_channel_with_a_call_in_it_is_not_spared(gate):
    door = Door(gate)
    with Handle(door.open()) as handle, Handle(door.open()) as other:
        for each in (handle, other):
            call = Background(each.call, b"first")
            gate.wait(PATIENCE).reply()
            call.result()
        channel = handle._idle[-1].socket
        call = Background(handle.call, b"waits")
        wait_until(lambda: rawpeer.unread_there(channel))
        gate.spare(2)
        assert door.channels == 1, "that of the other is idle"
        invocation = gate.wait(PATIENCE)
        assert invocation.data == b"waits"
        invocation.reply(b"answered")
        assert call.result().data == b"answered"
    door.revoke()


def test_a_door_shows_how_it_is(serve):
    serving = serve(name="a door")
    serving.handle().call(b"")
    assert repr(serving.door).startswith("<Door 'a door' ")
    assert repr(serving.door).endswith(" 1 channels>")
    serving.door.revoke()
    assert repr(serving.door).endswith(" revoked>")


def test_something_has_come_if_the_set_would_report_it():
    """Or who holds a stranger's channel would let go of it, and be woken for it, without end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        served = SimpleNamespace(fd=ours.fileno())
        assert not Gate._has_come(served)
        theirs.send(b"")
        assert Gate._has_come(served), "an empty packet"
        ours.recv(1)
        theirs.send(b"x")
        assert Gate._has_come(served)
        ours.recv(1)
        assert not Gate._has_come(served)
        theirs.shutdown(socket.SHUT_WR)
        assert Gate._has_come(served)
