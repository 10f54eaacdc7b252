"""
What may happen in a procedure: the process ends, or something is raised that is hardly an error.

The end of the process is a death like any other.  Whatever is raised, the caller hears of it, and the
server goes on with the threads that it had.
"""

from __future__ import annotations

import signal
import threading
import time

import pytest
from support import wait_until

from doorpool import BrokenDoorError, Proxy, RemoteError

PROMPTLY = 1.0  # seconds (threats.md 3.1, P3)

SERVER = """
    import ctypes, os, resource
    from doorpool import Server

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    server = Server()

    @server.endpoint("a.door")
    def end(how):
        os.write(journal, how.encode() + b" ")
        match how:
            case "_exit":
                os._exit(3)
            case "abort":
                os.abort()
            case "execv":
                os.execv("/bin/sleep", ["sleep", "60"])
            case "segfault":
                ctypes.string_at(0)
        return how

    journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with server:
        ready()
        server.run(signals=False)
"""

#: How a procedure ends its process, and with what.
ENDS = {
    "_exit": 3,
    "abort": -signal.SIGABRT,
    "segfault": -signal.SIGSEGV,
    "execv": None,  # it lives on, as another program
}


@pytest.mark.ids("E09", "E01", "X9")
@pytest.mark.leaves_names
@pytest.mark.parametrize("how", ENDS)
def test_a_procedure_that_ends_its_process(spawn_server, door_dir, how):
    server = spawn_server(SERVER, cwd=door_dir)
    with Proxy(door_dir / "a.door") as proxy:
        began = time.monotonic()
        assert proxy("nothing") == "nothing"
        trip = time.monotonic() - began
        began = time.monotonic()
        with pytest.raises(BrokenDoorError) as caught:
            proxy(how)  # which ends the process at once
        heard = time.monotonic()
        assert heard - began < PROMPTLY + 20 * trip
        assert caught.value.may_have_run
        if ENDS[how] is None:
            assert not server.ended
        else:
            assert server.wait() == ENDS[how]
        assert time.monotonic() - heard < PROMPTLY, "it was still there"
        with pytest.raises(BrokenDoorError) as caught:
            proxy("nothing")
        assert not caught.value.may_have_run
    assert (door_dir / "journal").read_text().split() == ["nothing", how], "nothing is run twice"


def _recurse(depth: int = 0) -> int:
    return _recurse(depth + 1) + 1


def _exhaust() -> bytearray:
    return bytearray(1 << 62)


def _leave(kind: type[BaseException]) -> None:
    raise kind("left")


def server_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("ends")}


RAISED = {
    # what is raised: what the caller gets
    SystemExit: RemoteError,
    KeyboardInterrupt: RemoteError,
    GeneratorExit: RemoteError,
    MemoryError: MemoryError,
    RecursionError: RecursionError,
}


@pytest.mark.ids("E09", "X12")
@pytest.mark.parametrize("kind", RAISED, ids=lambda kind: kind.__name__)
def test_what_is_raised_reaches_the_caller_and_costs_no_thread(serve, connect, many, kind):
    ran = []

    def leave(how: str) -> str:
        ran.append(how)
        if how == "leave":
            _leave(kind)
        return how

    server = serve(leave, server={"name": "ends", "max_threads": 3})
    proxy = connect()
    proxy("first")
    before = server_threads()
    rounds = many(20, 2000)  # far more often than there are threads
    for _ in range(rounds):
        with pytest.raises(RAISED[kind]) as caught:
            proxy("leave")
        if RAISED[kind] is RemoteError:
            assert caught.value.type_name == kind.__name__
            assert caught.value.may_have_run is True
    assert proxy("last") == "last"
    assert ran == ["first"] + ["leave"] * rounds + ["last"], "each once"
    assert before <= server_threads(), "a thread was lost"
    assert server.statistics().channels == 1
    wait_until(lambda: server.statistics().errors == rounds)


@pytest.mark.ids("E09", "X12")
@pytest.mark.parametrize(
    ("fail", "kind"), [(_recurse, RecursionError), (_exhaust, MemoryError)], ids=["depth", "memory"]
)
def test_exhaustion_in_a_procedure_is_its_own_error(serve, connect, fail, kind):
    server = serve(fail, server={"name": "ends"})
    proxy = connect()
    for _ in range(3):
        with pytest.raises(kind):
            proxy()
    wait_until(lambda: server.statistics().running == 0)
    assert server.statistics().channels == 1
