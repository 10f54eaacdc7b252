"""
Forks in C, past Python's hooks, under the raw layer: the child is no server, whatever it is led to do.

The servers and clients are processes of their own with nothing else in them that wants to run.
"""

from __future__ import annotations

import pytest
from support.rawdoor import PATIENCE

from doorpool.door import Handle

SERVER = """
    import os, select, signal, sys, threading
    from doorpool._errors import ClosedError
    from doorpool.door import Door, Gate

    fork = {"os": os.fork, "C": fork_in_c}[sys.argv[1]]
    gate = Gate(lingers=True)
    door = Door(gate)
    door.listen("a.door")
    said, tell = os.pipe()

    def child_of(invocation):
        "What a forked child tells of its tries to be a server, one word each."
        told = []

        def attempt(what, *args):
            try:
                what(*args)
                told.append("nothing")
            except Exception as error:
                told.append(type(error).__name__)

        attempt(gate.wait, 0)  # first: nothing else of the library has noticed the fork yet
        attempt(invocation.reply, b"the child's")
        attempt(gate.wake, 5)
        attempt(gate.close)
        attempt(door.open)
        attempt(door.revoke)
        attempt(gate.dispose)
        os.write(tell, " ".join(told).encode())

    def serve():
        while True:
            invocation = gate.wait()
            if invocation is None:
                woken.append(1)
            elif invocation.data == b"fork":
                child = fork()
                if child == 0:
                    child_of(invocation)
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
                invocation.reply(os.read(said, 1000))
            elif invocation.data == b"drop":
                child = fork()
                if child == 0:
                    del invocation
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
                invocation.reply(b"the parent's")
            else:
                invocation.reply(b"%d" % len(woken))

    woken = []
    for _ in range(2):
        threading.Thread(target=serve, daemon=True).start()
    ready()
    try:
        signal.sigwait([signal.SIGTERM])
    finally:
        door.revoke()
"""


@pytest.fixture(params=["os", "C"])
def handle(request, spawn_python, door_dir):
    code = "import signal\n    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n" + SERVER
    server = spawn_python("\n    " + code, request.param, cwd=door_dir)
    server.wait_ready()
    with Handle(door_dir / "a.door") as handle:
        yield handle


@pytest.mark.ids("G02", "Y1", "R4")
def test_a_child_of_a_server_thread_is_no_server(handle):
    """It answers nothing, waits for nothing, wakes nobody and takes nothing away."""
    told = handle.call(b"fork", timeout=PATIENCE).data.decode().split()
    assert told == [
        "ClosedError",
        "nothing",
        "nothing",
        "nothing",
        "ClosedError",
        "PermissionError",
        "nothing",
    ]
    with Handle(handle.path) as fresh:
        for one in (handle, fresh, handle):
            assert one.call(timeout=PATIENCE).data == b"0", "no thread of the parent was woken"


@pytest.mark.ids("G02", "Y1")
def test_an_invocation_that_a_child_drops_is_the_parents(handle):
    assert handle.call(b"drop", timeout=PATIENCE).data == b"the parent's"
    assert handle.call(timeout=PATIENCE).data == b"0"
