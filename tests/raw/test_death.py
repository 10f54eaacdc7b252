"""
A server that dies: the caller hears of it at once, and whether its call may have run.

The servers are processes that speak by hand (support.rawpeer), so each dies at just the step that is
under test; what they say before is right.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import statistics
import textwrap
import threading
import time

import pytest
from support import rawpeer, wait_until
from support.rawdoor import PATIENCE, Background

from doorpool._errors import BrokenDoorError, CallTimeoutError, RevokedError
from doorpool.door import Handle

STAGE = """
    import os, signal, sys
    from support import rawpeer

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    server = rawpeer.RawServer(port={port})
    ready()
"""

PROMPTLY = 1.0  # seconds (threats.md 3.1, P3)


@pytest.fixture
def staged(spawn_server):
    """Start a server that does what a script says; return it and a (lazy) handle of its door."""
    handles = []

    def start(script):
        holder, port = rawpeer.pair(socket.SOCK_SEQPACKET)
        with port:
            port.send(rawpeer.greeting())
            code = textwrap.dedent(STAGE).format(port=port.fileno()) + textwrap.dedent(script)
            server = spawn_server(code, pass_fds=[port.fileno()])
        handles.append(Handle(holder.detach(), lazy=True))
        return server, handles[-1]

    yield start
    for handle in handles:
        handle.close()


def failing(function, *args, **options):
    """Return the error of a call and how long it took."""
    began = time.monotonic()
    error = Background(function, *args, **options).error()
    return error, time.monotonic() - began


STEPS = {
    # what the server does before it dies: whether the call may have run
    "before it hears the knock": ("die()", False),
    "before it answers the knock": ("server.hear(); die()", False),
    "before it reads the call": (
        "server.accept(); server.channel.recv(1, __import__('socket').MSG_PEEK); die()", False
    ),
    "having read a part of the call": (
        "server.accept(); rawpeer.receive(server.channel); die()", False
    ),
    "having read the call": ("server.accept(); server.receive(); die()", True),
    "having answered a part of the header": (
        "server.accept(); server.receive(); server.send(rawpeer.frame(rawpeer.REPLY, 1)[:39]); die()", True
    ),
    "having answered all but a byte": (
        "server.accept(); server.receive(); server.send(rawpeer.frame(82, 1, b'data')[:-1]); die()",
        True,
    ),
    "in the middle of a long answer": (
        ("server.accept(); server.receive(); "
         "server.send(rawpeer.frame(rawpeer.REPLY, 1, length=64 << 20) + bytes(8 << 20)); die()"),
        True,
    ),
}  # fmt: skip


@pytest.mark.ids("D13", "L14", "X9", "X10", "E01")
@pytest.mark.parametrize("step", STEPS)
def test_server_killed_at_each_step(staged, step):
    script, may_have_run = STEPS[step]
    _, handle = staged(script)
    error, seconds = failing(handle.call, bytes(100_000))  # two packets
    assert isinstance(error, BrokenDoorError), error
    assert error.may_have_run == may_have_run
    assert seconds < PROMPTLY + 1.0  # the process has to start its last step as well


@pytest.mark.ids("E08")
def test_last_words_of_a_dying_server_arrive(staged):
    _, handle = staged("server.accept(); server.receive(); server.send(rawpeer.frame(82, 1, b'last')); die()")
    assert handle.call().data == b"last"
    error, _ = failing(handle.call)  # on the idle channel, which is dead by now
    assert isinstance(error, BrokenDoorError)
    assert not error.may_have_run


@pytest.mark.ids("E01")
def test_server_killed_during_a_long_request(staged):
    _, handle = staged("server.accept(); rawpeer.receive_packets(server.channel, 1 << 20); die()")
    error, _ = failing(handle.call, bytes(32 << 20))
    assert isinstance(error, BrokenDoorError)
    assert not error.may_have_run


@pytest.mark.ids("E05")
@pytest.mark.parametrize("read", [True, False])
def test_death_is_seen_though_a_child_holds_the_sockets(staged, read):
    """The end of the channel lives on in a child, so that no hang-up comes."""
    server, handle = staged(f"""
        server.accept()
        if {read}:
            server.receive()
        else:
            import socket
            server.channel.recv(1, socket.MSG_PEEK)
        if os.fork() == 0:
            signal.pause()
        die()
    """)
    call = Background(handle.call)
    server.wait()
    began = time.monotonic()
    error = call.error()
    assert isinstance(error, BrokenDoorError)
    assert error.may_have_run == read
    assert time.monotonic() - began < PROMPTLY + 0.5


@pytest.mark.ids("L14", "E06", "X6")
def test_time_over_while_the_server_is_stopped(staged):
    """It has not read the call: it never will run, and the server gone on tells the same."""
    server, handle = staged("""
        server.accept()
        first = server.receive()
        server.send(rawpeer.frame(rawpeer.REPLY, first.number))
        result(server.channel.recv(1 << 16))
        server.channel.close()
        server.accept()
        while True:
            call = server.receive()
            server.send(rawpeer.frame(rawpeer.REPLY, call.number, b"fresh"))
    """)
    handle.call(timeout=PATIENCE)
    server.stop()
    error, seconds = failing(handle.call, b"lost", timeout=0.2)
    assert isinstance(error, CallTimeoutError)
    assert not error.may_have_run
    assert 0.2 <= seconds < 0.2 + PROMPTLY
    server.cont()
    assert handle.call(timeout=PATIENCE).data == b"fresh"


@pytest.mark.ids("L14", "X7", "X18")
def test_time_over_while_the_call_runs(staged):
    _, handle = staged("server.accept(); server.receive(); ready(); signal.pause()")
    error, seconds = failing(handle.call, timeout=0.2)
    assert isinstance(error, CallTimeoutError)
    assert error.may_have_run
    assert 0.2 <= seconds < 0.2 + PROMPTLY


def test_time_over_before_the_knock_is_heard(staged):
    _, handle = staged("signal.pause()")
    error, seconds = failing(handle.call, timeout=0.2)
    assert isinstance(error, CallTimeoutError)
    assert not error.may_have_run
    assert 0.2 <= seconds < 0.2 + PROMPTLY


@pytest.mark.ids("E06")
def test_time_over_while_the_answer_drips(staged):
    """Who makes a little progress now and then does not keep a caller beyond its time."""
    _, handle = staged("""
        import select
        server.accept()
        server.receive()
        for byte in rawpeer.frame(rawpeer.REPLY, 1, bytes(1000)):
            server.channel.send(bytes([byte]))
            select.select([], [], [], 0.03)
    """)
    error, seconds = failing(handle.call, timeout=0.3)
    assert isinstance(error, CallTimeoutError)
    assert error.may_have_run
    assert 0.3 <= seconds < 0.3 + PROMPTLY


@pytest.mark.ids("E06")
def test_time_over_while_the_request_is_sipped(staged):
    _, handle = staged("""
        import select
        server.accept()
        while True:
            rawpeer.receive_packets(server.channel, 4096)
            select.select([], [], [], 0.03)
    """)
    error, seconds = failing(handle.call, bytes(64 << 20), timeout=0.3)
    assert isinstance(error, CallTimeoutError)
    assert not error.may_have_run
    assert 0.3 <= seconds < 0.3 + 2 * PROMPTLY


@pytest.mark.ids("I1", "I7")
def test_alive_is_the_truth_about_the_server(staged):
    server, handle = staged("server.accept(); server.receive(); signal.pause()")
    assert handle.alive
    server.stop()
    assert handle.alive  # it is, though it does not answer
    server.kill()
    wait_until(lambda: not handle.alive)
    assert handle.server.pid == os.getpid()  # whoever made the descriptor, as nobody was called


@pytest.mark.ids("L14", "X9", "E13")
def test_real_server_killed_while_it_runs_a_call(spawn_server, door_dir):
    server = spawn_server(
        """
        import signal
        from support.rawdoor import Serving

        def procedure(invocation):
            ready("running")
            signal.pause()

        serving = Serving(procedure)
        serving.door.listen("a.door")
        ready()
        serving.threads[0].join()
        """,
        cwd=door_dir,
    )
    with Handle(door_dir / "a.door") as handle:
        call = Background(handle.call)
        server.wait_ready()
        server.signal(signal.SIGKILL)
        began = time.monotonic()
        error = call.error()
        assert isinstance(error, BrokenDoorError)
        assert error.may_have_run
        assert time.monotonic() - began < PROMPTLY
        for _ in range(2):
            with pytest.raises(BrokenDoorError) as caught:
                handle.call()
            assert not caught.value.may_have_run
        assert not handle.alive
    with pytest.raises(BrokenDoorError):
        Handle(door_dir / "a.door")


@pytest.mark.ids("X10")
def test_real_server_killed_while_calls_wait_for_a_thread(spawn_server, door_dir):
    server = spawn_server(
        """
        import signal
        from support.rawdoor import Serving

        def procedure(invocation):
            ready("running")
            signal.pause()

        serving = Serving(procedure, threads=1)
        serving.door.listen("a.door")
        ready()
        serving.threads[0].join()
        """,
        cwd=door_dir,
    )
    with Handle(door_dir / "a.door") as handle:
        running = Background(handle.call)
        server.wait_ready()
        others = [Handle(door_dir / "a.door") for _ in range(3)]
        channels = [other._idle[-1].socket for other in others]
        waiting = [Background(other.call) for other in others]
        wait_until(lambda: all(map(rawpeer.unread_there, channels)))
        server.signal(signal.SIGKILL)
        assert running.error().may_have_run
        errors = [call.error() for call in waiting]
        for other in others:
            other.close()
    assert {type(error) for error in errors} == {BrokenDoorError}
    assert not any(error.may_have_run for error in errors)


@pytest.mark.ids("R1", "X11")
def test_goodbye_then_death_is_a_revocation(staged):
    _server, handle = staged("""
        server.accept()
        call = server.receive()
        server.send(rawpeer.frame(rawpeer.GOODBYE, call.number, rawpeer.refusal(rawpeer.REVOKED, "gone")))
        die()
    """)
    error, _ = failing(handle.call)
    assert isinstance(error, RevokedError)
    assert not error.may_have_run


AT_ONCE = 0.1  # seconds (E04)

CALLER = """
    import threading
    from doorpool.door import Handle

    handle = Handle("a.door")
    threading.Thread(target=handle.call, daemon=True).start()
    ready()
    threading.Event().wait()
"""


@pytest.mark.ids("E04")
@pytest.mark.parametrize("how", ["is waited for", "is asked for"])
def test_the_death_of_a_client_is_seen_at_once_while_its_call_runs(serve, spawn_python, door_dir, many, how):
    """Whether the procedure waits for it or asks, not when it has done its work; by the median of a few."""
    running, seen = threading.Semaphore(0), queue.SimpleQueue()

    def procedure(invocation):
        running.release()
        if how == "is waited for":
            assert invocation.wait_cancelled(PATIENCE)
        else:
            wait_until(lambda: invocation.cancelled, timeout=PATIENCE)
        seen.put(time.monotonic())

    times = many(3, 50)
    serving = serve(procedure, threads=times)
    serving.door.listen(door_dir / "a.door")
    clients = [spawn_python(CALLER, cwd=door_dir) for _ in range(times)]
    for client in clients:
        client.wait_ready()
        assert running.acquire(timeout=PATIENCE)
    took = []
    for client in clients:
        began = time.monotonic()
        client.kill()
        took.append(seen.get(timeout=PATIENCE) - began)
    assert statistics.median(took) < AT_ONCE
    assert serving.errors == []
