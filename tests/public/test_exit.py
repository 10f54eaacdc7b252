"""
The end of the interpreter, whatever doors are open and whoever is using them.

Each program ends with the code that it was told, soon, and says nothing that it was not told.
"""

from __future__ import annotations

import os
import textwrap
import time

import pytest
from support import run_python as run_alone
from support.rawdoor import Background

from doorpool import BrokenDoorError, RevokedError

#: What the programs below have in common: their code is 7, and whoever is still running must end.
_HEADER = """
    import os, sys, threading, time
    from doorpool import Descriptor, DoorError, Endpoint, Proxy, Server

    begun = threading.Semaphore(0)
    forever = threading.Event()
    server = Server()

    @server.endpoint("a.door")
    def echo(value=None):
        return value

    @server.endpoint("slow.door")
    def slow():
        begun.release()
        forever.wait()

    def in_daemon(function, *args):
        # As programs do it, whose threads expect to be told of the end.
        def run():
            try:
                function(*args)
            except DoorError:
                pass
        threading.Thread(target=run, daemon=True).start()

    def call_all_the_time(proxy):
        while True:
            proxy(1)
            begun.release()
"""

PROGRAMS = {
    "idle server threads": """
        server.start()
        Proxy("a.door")()
        sys.exit(7)
    """,
    "busy server threads and callers that are blocked": """
        server.start()
        for _ in range(3):
            in_daemon(Proxy("slow.door"))
        for _ in range(3):
            begun.acquire()
        sys.exit(7)
    """,
    "procedures in a loop of Python": """
        @server.endpoint("loop.door")
        def loop():
            begun.release()
            while True:
                pass
        server.start()
        in_daemon(Proxy("loop.door"))
        begun.acquire()
        sys.exit(7)
    """,
    "threads that call all the time": """
        server.start()
        for _ in range(4):
            in_daemon(call_all_the_time, Proxy("a.door"))
        for _ in range(20):
            begun.acquire()
        sys.exit(7)
    """,
    "in with": """
        with server:
            proxy = Proxy("a.door")
            proxy()
            sys.exit(7)
    """,
    "after run": """
        def end():
            with Proxy("a.door", wait=10) as proxy:
                proxy()
            server.close()
        ending = threading.Thread(target=end)
        ending.start()
        server.run()
        sys.exit(7)
    """,
    "in run, by a handler of the program": """
        import signal
        def leave(*_):
            sys.exit(7)
        signal.signal(signal.SIGTERM, leave)
        def end():
            with Proxy("a.door", wait=10) as proxy:
                proxy()
            os.kill(os.getpid(), signal.SIGTERM)
        threading.Thread(target=end).start()
        with server:
            server.run()
    """,
    "while a procedure has the main thread": """
        server = Server(max_threads=1)
        @server.endpoint("main.door")
        def main():
            if threading.current_thread() is threading.main_thread():
                begun.release()
                forever.wait()
        def end():
            begun.acquire()
            server.close(0.1)
            os._exit(7)
        def call():
            proxy = Proxy("main.door", wait=10)
            while True:
                proxy()
        in_daemon(end)
        in_daemon(call)
        server.run()
    """,
    "the default server": """
        endpoint = Endpoint(echo).attach("b.door")
        loose = Endpoint(echo).open()
        proxies = Proxy("b.door"), Proxy(loose)
        proxies[0](), proxies[1]()
        in_daemon(Proxy(Endpoint(slow)))
        begun.acquire()
        sys.exit(7)
    """,
    "objects in cycles and in modules": """
        server.start()
        class Node: pass
        node = Node()
        node.node, node.proxy, node.server = node, Proxy("a.door"), server
        node.descriptor = Descriptor(os.open("/", os.O_RDONLY))
        sys.node = node
        node.proxy()
        del node
        sys.exit(7)
    """,
    "submitted calls": """
        server.start()
        proxy = Proxy("a.door")
        futures = [proxy.submit(n) for n in range(20)]
        sys.exit(7)
    """,
    "submitted calls that are never answered, and whose time ends": """
        server.start()
        proxy = Proxy("slow.door", timeout=0.5)
        futures = [proxy.submit() for _ in range(3)]
        for _ in range(3):
            begun.acquire()
        sys.exit(7)
    """,
    "calls at exit and while modules are taken down": """
        import atexit
        server.start()
        proxy = Proxy("a.door", timeout=10)
        atexit.register(lambda: proxy("at exit") == "at exit" or os._exit(8))
        class Late:
            def __del__(self, proxy=proxy, DoorError=DoorError):
                try:
                    proxy("late")
                except DoorError:
                    pass
        sys.late = Late()
        sys.exit(7)
    """,
    "new doors and proxies at exit": """
        import atexit
        def late():
            try:
                with Server() as other, other.attach(echo, "late.door"), Proxy("late.door") as proxy:
                    proxy(1) == 1 or os._exit(8)
            except RuntimeError:  # no thread to be had any more, from 3.12 on
                pass
            os.path.exists("late.door") and os._exit(9)
        atexit.register(late)
        sys.exit(7)
    """,
    "a thread goes on opening and calling": """
        server.start()
        def work():
            while True:
                with Proxy("a.door") as proxy:
                    proxy()
                begun.release()
        def run():
            try:
                work()
            except (DoorError, OSError, RuntimeError):
                pass
        for _ in range(4):
            threading.Thread(target=run, daemon=True).start()
        for _ in range(8):
            begun.acquire()
        sys.exit(7)
    """,
    "by an exception in a daemon thread at the same time": """
        server.start()
        def work():
            proxy = Proxy("a.door")
            begun.release()
            while True:
                proxy()
                del proxy
                proxy = Proxy("a.door")
        import warnings
        warnings.simplefilter("ignore")
        in_daemon(work)
        begun.acquire()
        threading.excepthook = lambda *_: None
        sys.exit(7)
    """,
}

#: What a program may say: calls that were cut when its server was closed, and callers who came too late.
_MAY_SAY = ("calls cut after 0.", "refused Credentials", "the server is closing")

#: As without any option: a program that does not close what it has opened is told only if it asks.
QUIET = ("-W", "ignore::ResourceWarning")

SOON = 2.0  # seconds, and on a busy machine ten times an empty program's


@pytest.fixture(scope="module")
def empty_program() -> float:
    """
    Seconds that a program takes to import the library and to end.
    """
    began = time.monotonic()
    run_alone("import doorpool")
    return time.monotonic() - began


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.ids("G07", "T16")
def test_the_interpreter_ends(run_python, door_dir, many, program, empty_program):
    code = textwrap.dedent(_HEADER) + textwrap.dedent(program)
    for _ in range(many(1, 200)):
        began = time.monotonic()
        finished = run_python(code, cwd=door_dir, check=False, options=QUIET)
        took = time.monotonic() - began
        said = [line for line in finished.stderr.splitlines() if not any(text in line for text in _MAY_SAY)]
        assert (finished.returncode, said, finished.stdout) == (7, [], "")
        assert took < SOON + 10 * empty_program
        for path in door_dir.iterdir():
            path.unlink() if "os._exit" in program else pytest.fail(f"{path} is left")


CLOSED_MEANWHILE = """
    import atexit, threading, time
    from doorpool import Endpoint, Server

    begun, ending, retire = threading.Event(), threading.Event(), Endpoint._retire
    atexit.register(ending.set)  # runs before what was registered earlier

    def retire_late(endpoint, refusal):
        begun.set()
        ending.wait(20)
        time.sleep(0.2)  # it has lost the CPU, whoever else wants to go on
        return retire(endpoint, refusal)

    Endpoint._retire = retire_late
    server = Server()
    for name in ("a.door", "b.door"):
        server.attach(str.upper, name)
    server.start()
    threading.Thread(target=server.close, daemon=True).start()
    assert begun.wait(20)
"""


@pytest.mark.ids("R4")
def test_a_server_that_another_thread_is_closing_leaves_no_name(run_python, door_dir):
    """As one that is closed by a call, whose main thread has nothing more to do."""
    run_python(CLOSED_MEANWHILE, cwd=door_dir)
    assert os.listdir(door_dir) == []


@pytest.mark.ids("T16", "R7", "X9")
def test_the_end_of_the_server_is_told_to_those_who_wait_for_it(spawn_server, door_dir, connect):
    """
    A running call may have run; one that comes afterwards did not.
    """
    server = spawn_server(
        """
        import sys, threading
        from doorpool import Server

        begun, forever = threading.Semaphore(0), threading.Event()
        server = Server()

        @server.endpoint("a.door")
        def slow():
            begun.release()
            forever.wait()

        server.start()
        ready()
        for _ in range(4):
            begun.acquire()
        sys.exit(7)
        """,
        cwd=door_dir,
    )
    idle = connect(reopen=False)
    calls = [Background(connect(reopen=False)) for _ in range(4)]
    for call in calls:
        error = call.error()
        assert isinstance(error, BrokenDoorError)
        assert error.may_have_run
    with pytest.raises(RevokedError):
        idle()
    assert server.wait() == 7
    assert "4 calls cut" in server.stderr
