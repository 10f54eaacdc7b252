"""
Descriptors on their way to a process that dies, or that nobody takes: closed, and never leaked.

What is on its way is the writing end of a pipe, of which nobody has another copy: the reading end
tells when the kernel has closed the last one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket

import pytest
from support import wait_until
from support.rawdoor import PATIENCE, Background

from doorpool import _sockets
from doorpool._channel import Channel
from doorpool._errors import BrokenDoorError, BusyError, RevokedError
from doorpool._wire import Kind
from doorpool.door import Door, Handle

PROMPTLY = 1.0  # seconds (threats.md 3.1, P3)


class Parcel:
    """A descriptor to be passed, and the way to know whether anybody has a copy of it."""

    def __init__(self):
        self._reader, self.descriptor = os.pipe()

    def let_go(self):
        """Close our own copy."""
        os.close(self.descriptor)
        self.descriptor = -1

    @property
    def somewhere(self):
        """Whether somebody has it, or it is on its way."""
        return not self.wait_closed(0)

    def wait_closed(self, seconds):
        poll = select.poll()
        poll.register(self._reader, 0)
        return bool(poll.poll(seconds * 1000))

    def close(self):
        os.close(self._reader)
        if self.descriptor >= 0:
            os.close(self.descriptor)


@pytest.fixture
def parcel():
    """Make a descriptor to be passed."""
    with contextlib.closing(Parcel()) as parcel:
        yield parcel


CALLER = """
    import sys
    from doorpool.door import Handle

    handle = Handle({door})
    ready()
    handle.call(b"data", descriptors=[{passed}])
"""


@pytest.fixture
def caller(serve, parcel, spawn_server):
    """Have a process call with the parcel a server that nobody serves yet; return both."""
    serving = serve(threads=0)
    number = serving.door.open()
    code = CALLER.format(door=number, passed=parcel.descriptor)
    child = spawn_server(code, pass_fds=[number, parcel.descriptor])
    os.close(number)
    parcel.let_go()
    wait_until(lambda: serving.gate._served)  # who has the answer may be before the keeper
    (served,) = serving.gate._served.values()
    wait_until(lambda: _sockets.unread(served.channel.socket))
    return serving, child


@pytest.mark.ids("X16", "F10", "E03")
def test_of_a_caller_that_is_killed_before_its_request_is_read(caller, parcel):
    serving, child = caller
    child.kill()
    wait_until(lambda: serving.door.channels == 0 or serving.gate.wait(0.01) is not None)
    assert serving.door.channels == 0, "it has not run"
    assert parcel.wait_closed(PROMPTLY)


@pytest.mark.ids("F10", "C09")
def test_of_a_caller_that_is_killed_while_its_call_runs(caller, parcel):
    serving, child = caller
    invocation = serving.gate.wait(PATIENCE)
    child.kill()
    assert invocation.cancelled
    assert parcel.somewhere, "the procedure has them for as long as it runs"
    invocation.reply()
    assert parcel.wait_closed(PROMPTLY)


@pytest.mark.ids("F10", "C09")
def test_of_a_request_that_is_never_read_as_the_door_is_revoked(caller, parcel):
    serving, _child = caller
    assert parcel.somewhere
    serving.door.revoke()
    assert parcel.wait_closed(PROMPTLY), "by the kernel, with our end of the channel"


@pytest.mark.ids("F11", "E03")
def test_of_a_reply_that_the_caller_did_not_live_to_read(serve, parcel, spawn_server):
    serving = serve(threads=0)
    number = serving.door.open()
    script = f"""
        from doorpool.door import Handle

        handle = Handle({number})
        ready()
        handle.call(b"data")
    """
    child = spawn_server(script, pass_fds=[number])
    os.close(number)
    invocation = serving.gate.wait(PATIENCE)
    child.stop()
    invocation.reply(b"data", descriptors=[parcel.descriptor])
    parcel.let_go()
    assert parcel.somewhere, "on its way"
    child.kill()
    assert parcel.wait_closed(PROMPTLY)


SERVER = """
    from doorpool.door import Door, Gate

    gate = Gate()
    door = Door(gate)
    door.listen("a.door")
    ready()
    invocation = gate.wait() if {reads} else None
    ready()
    import signal
    signal.pause()
"""


@pytest.mark.ids("F10", "E01")
@pytest.mark.parametrize("reads", [False, True], ids=["unread", "running"])
def test_of_a_request_whose_server_is_killed(spawn_server, door_dir, parcel, reads):
    server = spawn_server(SERVER.format(reads=reads), cwd=door_dir)
    with Handle(door_dir / "a.door") as handle:
        channel = handle._idle[-1].socket
        call = Background(handle.call, b"data", descriptors=[parcel.descriptor])
        wait_until(lambda: bool(_sockets.unsent(channel)) or reads)
        server.wait_ready()
        parcel.let_go()
        assert parcel.somewhere
        server.kill()
        error = call.error()
        assert isinstance(error, BrokenDoorError)
        assert error.may_have_run == reads
        assert parcel.wait_closed(PROMPTLY)


@pytest.mark.ids("F11")
def test_of_a_reply_whose_server_is_killed_when_it_has_sent_it(spawn_server, door_dir):
    """They arrive: a reply that was sent whole does."""
    script = """
        import os, signal
        from doorpool.door import Door, Gate

        gate = Gate()
        door = Door(gate)
        door.listen("a.door")
        ready()
        reader, writer = os.pipe()
        os.write(writer, b"alive")
        gate.wait().reply(descriptors=[reader])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    spawn_server(script, cwd=door_dir)
    with Handle(door_dir / "a.door") as handle:
        with handle.call() as reply:
            (reader,) = reply.descriptors
            assert os.read(reader, 100) == b"alive"
            poll = select.poll()
            poll.register(reader, 0)
            assert poll.poll(PATIENCE * 1000), "the writing end has died with its process"
        with pytest.raises((BrokenDoorError, RevokedError)):
            handle.call()


# -- in rings and on dead letters


@pytest.mark.ids("C09")
def test_descriptors_sent_over_themselves_leave_nothing(serve, many):
    """A door is knocked at with a copy of its own descriptor, and that is dropped, unread or refused."""
    serving = serve()
    handle = serving.handle()
    handle.call(b"x")
    sent = set()

    def ring() -> None:
        number = serving.door.open()
        sent.add(os.fstat(number).st_ino)
        with socket.socket(fileno=number) as door:
            socket.send_fds(door, [b"over itself"], [number, number])
            socket.send_fds(door, [b"and again"], [number])

    ring()
    wait_until(lambda: len(serving.door._ports) <= 1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(many(300, 10_000)):
        ring()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before, timeout=PATIENCE)
    wait_until(lambda: not sent & unix_sockets(), timeout=PATIENCE)
    assert handle.call(b"x").data == b"x"


def unix_sockets() -> set[int]:
    """Return the inodes of those that there are on this machine; one that is in flight is among them."""
    with open("/proc/net/unix") as file:
        next(file)  # the names of the columns
        return {int(line.split()[6]) for line in file}


@pytest.mark.parametrize("what", ["too many in flight", "no number for it"])
def test_a_descriptor_of_a_door_that_cannot_be_sent_is_told_and_costs_no_channel(serve, monkeypatch, what):
    serving = serve()
    handle = serving.handle()

    post = Channel.post

    def post_but(channel, kind, *args, **options):
        if kind == Kind.PONG:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        post(channel, kind, *args, **options)

    def fail(*_):
        raise OSError(errno.EMFILE, "no descriptor")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        if what == "too many in flight":
            patch.setattr(Channel, "post", post_but)
        else:
            patch.setattr(Door, "open_for", fail)
        with pytest.raises(BusyError, match="the server has made no descriptor of its door"):
            handle.ask_descriptor(None, None)
    assert len(os.listdir("/proc/self/fd")) <= before + 2, "a channel, opened for it"
    channel = handle._idle[-1]
    with Handle(handle.ask_descriptor(None, None)) as other:
        assert other.call(b"by the other").data == b"by the other"
    assert handle._idle[-1] is channel
