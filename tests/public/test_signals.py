"""
Signals during calls: handlers that return, handlers that raise, Ctrl-C, SIGPIPE; and whose they are.

The caller is a process of its own, since handlers, timers and Ctrl-C belong to its main thread.
"""

from __future__ import annotations

import signal
import statistics
from pathlib import Path

import pytest
from support import faults

from doorpool import Proxy

LATE_SOURCE = Path(faults.__file__).with_name("late.c")

SERVER = """
    import os, threading, time
    from doorpool import Server, current_call

    server = Server()
    calls = {}
    lock = threading.Lock()

    @server.endpoint("count.door")
    def count(number):
        "Count how often each number came; return it."
        with lock:
            calls[number] = calls.get(number, 0) + 1
        return number

    @server.endpoint("calls.door")
    def all_calls():
        with lock:
            return dict(calls)

    @server.endpoint("sleep.door")
    def sleep(seconds):
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not current_call().cancelled:
            time.sleep(min(left, 0.02))
        return seconds

    @server.endpoint("data.door")
    def data(value):
        return value

    @server.endpoint("channels.door")
    def channels():
        return server.statistics().channels

    with server:
        ready()
        server.run()
"""


@pytest.fixture
def server(spawn_server, door_dir):
    return spawn_server(SERVER, cwd=door_dir)


# -- handlers that return


STORM = """
    import signal, sys, time
    from doorpool import CallTimeoutError, Proxy

    interrupts, timeout, times = sys.argv[1] == "True", float(sys.argv[2]) or None, int(sys.argv[3])
    hits = 0

    def hit(*_):
        global hits
        hits += 1

    signal.signal(signal.SIGALRM, hit)
    signal.siginterrupt(signal.SIGALRM, interrupts)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    late, slept = [], []
    with Proxy("count.door", timeout=timeout) as count, Proxy("sleep.door") as sleep, \\
            Proxy("data.door", timeout=timeout) as data:
        assert [count(n) for n in range(times)] == list(range(times))
        for size in (50_000, 3_000_000):
            value = bytes(size)
            assert all(data(value) == value for _ in range(10))
        assert sleep(0.2) == 0.2
        for _ in range(5):
            began = time.monotonic()
            try:
                sleep.options(timeout=0.2)(30)
            except CallTimeoutError as error:
                assert error.may_have_run
                late.append(time.monotonic() - began - 0.2)
            began = time.monotonic()
            time.sleep(0.2)
            slept.append(time.monotonic() - began - 0.2)
        for _ in range(times // 100):  # opening, too
            with Proxy("count.door", timeout=timeout) as other:
                other("opened")
    signal.setitimer(signal.ITIMER_REAL, 0)
    result((hits, late, slept))
"""


@pytest.mark.parametrize("timeout", [0, 30], ids=["no timeout", "timeout"])
@pytest.mark.parametrize("interrupts", [True, False], ids=["interrupting", "restarting"])
@pytest.mark.ids("G04", "L8")
def test_a_storm_of_signals(server, run_python, door_dir, many, interrupts, timeout):
    """1,000 signals a second: each call succeeds, runs once, and is late by no more than a handler."""
    times = many(800, 100_000)
    done = run_python(STORM, interrupts, timeout, times, cwd=door_dir, timeout=many(40, 3600))
    hits, late, slept = done.value
    assert hits > 200, "the storm was none"
    assert len(late) == 5
    assert min(late) >= 0
    print(f"late by {min(late):.4f} to {max(late):.4f} s, a sleep by {min(slept):.4f} to {max(slept):.4f}")
    assert min(late) < min(slept) + 0.02
    assert statistics.median(late) < 0.1
    with Proxy(door_dir / "calls.door") as all_calls:
        calls = all_calls()
    assert calls.pop("opened") == times // 100
    assert calls == dict.fromkeys(range(times), 1)


STOPPED = """
    import os, signal, sys, time
    from doorpool import CallTimeoutError, Proxy

    server = int(sys.argv[1])
    with Proxy("data.door") as data:
        data(1)
        os.kill(server, signal.SIGSTOP)
        while open(f"/proc/{server}/stat").read().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.001)
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        took = []
        for value in (1, bytes(10_000_000)):
            # Each on a channel that is open: through the first it learns that the server is silent.
            began = time.monotonic()
            try:
                data.options(timeout=0.3)(value)
            except CallTimeoutError as error:
                took.append((time.monotonic() - began, error.may_have_run))
            os.kill(server, signal.SIGCONT)
            assert data(2) == 2
            os.kill(server, signal.SIGSTOP)
        os.kill(server, signal.SIGCONT)
        signal.setitimer(signal.ITIMER_REAL, 0)
        result((took, data(3)))
"""


@pytest.mark.ids("G04", "L9")
def test_time_runs_under_a_storm_while_the_server_is_stopped(server, run_python, door_dir):
    """Waiting for a reply, and for room to send a request that the server does not read."""
    took, last = run_python(STOPPED, server.pid, cwd=door_dir).value
    assert last == 3
    assert [may_have_run for _, may_have_run in took] == [False, False]
    assert all(0.3 <= seconds < 2 for seconds, _ in took), took


# -- handlers that raise


RAISES = """
    import random, signal, sys, time
    from doorpool import Proxy

    class Enough(Exception):
        pass

    def enough(*_):
        raise Enough

    signal.signal(signal.SIGALRM, enough)
    dice = random.Random(int(sys.argv[1]))
    raised, late = 0, []
    with Proxy("count.door", timeout=30) as count, Proxy("sleep.door", timeout=30) as sleep:

        def call_on():  # apart: the jumps of a loop are not in its try statement (CPython 3.13)
            for _ in range(1000):
                assert count("same") == "same"
            sleep(0.05)

        for number in range(int(sys.argv[2])):
            after = dice.uniform(0.00001, 0.001)
            try:
                signal.setitimer(signal.ITIMER_REAL, after)
                began = time.monotonic()
                call_on()
            except Enough:
                raised += 1
                late.append(time.monotonic() - began - after)
            assert count(number) == number, "the next call is right"
            assert count(-number) == -number
        signal.setitimer(signal.ITIMER_REAL, 0)
    result((raised, max(late)))
"""


@pytest.mark.ids("G04", "X19")
def test_an_exception_of_a_handler_comes_out_of_the_call(server, run_python, door_dir, many):
    times = many(100, 5000)
    raised, latest = run_python(RAISES, 1, times, cwd=door_dir, timeout=many(40, 600)).value
    assert raised == times
    assert latest < 5
    with Proxy(door_dir / "calls.door") as all_calls:
        calls = all_calls()
    calls.pop("same")
    assert set(calls.values()) <= {1, 2}  # 2: zero is its own negative
    assert len(calls) == 2 * times - 1


# -- Ctrl-C


INTERRUPTED = """
    import gc, os, random, signal, sys, threading, time
    from doorpool import Proxy

    dice = random.Random(int(sys.argv[1]))
    main = threading.get_ident()

    def held():
        count("same"), sleep(0), data(bytes(300_000))  # each has a channel, and what it needs for that
        gc.collect()
        found = {}
        for name in os.listdir("/proc/self/fd"):
            try:
                found[name] = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                pass
        return found

    def begin(after):
        # Ctrl-C comes from outside, at any moment of the main thread's.
        def press():
            time.sleep(after)
            pressed.append(time.monotonic())
            signal.pthread_kill(main, signal.SIGINT)
        threading.Thread(target=press).start()

    late, at_rest, wrong = [], None, []
    with Proxy("count.door", timeout=30) as count, Proxy("sleep.door", timeout=30) as sleep, \
            Proxy("data.door", timeout=30) as data, Proxy("channels.door", timeout=30) as channels:
        kinds = [
            lambda: count("same"),
            lambda: sleep(0.05),
            lambda: data(bytes(300_000)),
        ]
        def call_on(kind):  # apart: the jumps of a loop are not in its try statement (CPython 3.13)
            while True:
                kind()

        for number in range(int(sys.argv[2])):
            kind, pressed = kinds[number % len(kinds)], []
            try:
                begin(dice.uniform(0.0005, 0.004))
                call_on(kind)
            except KeyboardInterrupt:
                late.append(time.monotonic() - pressed[0])
            if (count(number), data(b"x")) != (number, b"x"):
                wrong.append(number)
            for thread in threading.enumerate():
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            if number == 20:
                at_rest, open_there = held(), channels()
        # What was left alone in the midst of its call ends when the server has run it.
        deadline = time.monotonic() + 10
        while (left_there := channels()) > open_there + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        left = held()
    result((late, wrong, at_rest, left, open_there, left_there))
"""


@pytest.mark.filterwarnings("default::ResourceWarning")
@pytest.mark.ids("G05", "X19")
def test_ctrl_c_at_any_moment(server, run_python, door_dir, many):
    """KeyboardInterrupt at once, the next call is right, and nothing is left at either side."""
    times = many(150, 2000)
    done = run_python(INTERRUPTED, 1, times, cwd=door_dir, timeout=many(50, 900))
    late, wrong, before, after, channels_before, channels_after = done.value
    assert len(late) == times
    assert wrong == []
    assert statistics.median(late) < 0.1
    assert max(late) < 2
    assert len(after) <= len(before) + 2, "descriptors of the client"
    assert channels_after <= channels_before + 2, "channels of the server"
    server.terminate()
    assert "Traceback" not in server.stderr


OPENING = """
    import os, random, signal, sys, threading, time
    from doorpool import Proxy

    dice = random.Random(1)
    main = threading.get_ident()
    ours = [os.open(os.devnull, os.O_RDONLY) for _ in range(30)]
    for number in ours[::2]:
        os.close(number)  # so that the library's numbers lie among ours

    def press(after):
        time.sleep(after)
        signal.pthread_kill(main, signal.SIGINT)

    def open_on():
        while True:
            Proxy("count.door", timeout=30).close()

    opened = 0
    for number in range(int(sys.argv[1])):
        try:
            threading.Thread(target=press, args=(dice.uniform(0.0005, 0.004),)).start()
            open_on()
        except KeyboardInterrupt:
            pass
        for number in ours[1::2]:
            os.fstat(number)
        with Proxy("count.door", timeout=30) as count:
            opened += count(1)
    result(opened)
"""


@pytest.mark.ids("G05")
def test_ctrl_c_while_a_door_is_opened(server, run_python, door_dir, many):
    """Nothing of a stranger's is closed, KeyboardInterrupt comes out, and the next opening is right."""
    times = many(100, 2000)
    options = ["-W", "ignore::ResourceWarning"]  # for the door that was just open, and is dropped
    assert run_python(OPENING, times, cwd=door_dir, options=options, timeout=many(40, 600)).value == times


# -- SIGPIPE


@pytest.mark.leaves_names
@pytest.mark.ids("G06")
def test_a_peer_that_closes_kills_nobody_where_sigpipe_would(spawn_server, door_dir, run_python):
    """With SIGPIPE at its default, which ends a process that writes to nobody."""
    code = """
        import os, signal, threading
        from doorpool import Server, current_call

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        server = Server()
        left = []

        @server.endpoint("gone.door")
        def gone():
            "Answer a caller that has gone meanwhile."
            while not current_call().cancelled:
                threading.Event().wait(0.001)
            left.append(1)
            return bytes(1_000_000)

        @server.endpoint("left.door")
        def count():
            return len(left)

        @server.endpoint("die.door")
        def die():
            os._exit(0)

        with server:
            ready()
            server.run()
    """
    spawned = spawn_server(code, cwd=door_dir)
    done = run_python(
        """
        import signal
        from doorpool import BrokenDoorError, CallTimeoutError, Proxy

        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with Proxy("gone.door") as gone, Proxy("left.door", reopen=False) as left, Proxy("die.door") as die:
            for number in range(3):
                try:
                    gone.options(timeout=0.05)()
                except CallTimeoutError:
                    pass
                while left() <= number:
                    pass
            try:
                die()
            except BrokenDoorError:
                pass
            for size in (1, 1_000_000):
                try:
                    left(bytes(size))
                except BrokenDoorError as error:
                    result(str(error))
        """,
        cwd=door_dir,
        check=False,
    )
    assert done.returncode == 0
    assert "gone" in done.value
    assert spawned.wait(20) == 0, "it has ended by itself"


# -- the signals that close a server, and its children


CHILDREN = """
    import ctypes, multiprocessing, os, signal, sys, time
    from doorpool import Server

    server = Server()
    context = multiprocessing.get_context("fork")
    fork_in_c = ctypes.PyDLL(None).fork

    def sleep(tell):
        os.write(tell, b".")
        while True:
            time.sleep(0.01)  # a signal just before a long sleep is heard at its end

    @server.endpoint("child.door")
    def child(how, number):
        "Start a child, send it a signal, and return what ended it."
        hear, tell = os.pipe()
        if how == "multiprocessing":
            process = context.Process(target=sleep, args=(tell,))
            process.start()
            pid = process.pid
        else:
            pid = os.fork() if how == "os" else fork_in_c()
            if pid == 0:
                sleep(tell)
        if number != signal.SIGTERM:  # which comes at once; Ctrl-C is lost in the midst of a fork
            os.read(hear, 1)
        os.close(hear)
        os.close(tell)
        os.kill(pid, number)
        sent = time.monotonic()
        deadline = sent + (10 if how != "C" else 0.2)
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            elif time.monotonic() > sent + 0.1:  # in a thread's child 3.13.0 hears it only asleep
                os.kill(pid, number)
                sent = time.monotonic()
            time.sleep(0.001)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    ready()
    server.run()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    result("closed by its own signal")
"""


@pytest.mark.parametrize("how", ["os", "multiprocessing", "C"])
@pytest.mark.ids("G02", "Y1")
def test_what_ends_a_child_does_not_close_the_server(spawn_python, door_dir, how, many):
    """
    The child has Python's own handlers, and the server hears its own signals only.

    (A fork in C cannot be prepared: its child may miss the signal, but the server does too.)
    """
    server = spawn_python(CHILDREN, cwd=door_dir)
    server.wait_ready()
    with Proxy(door_dir / "child.door", wait=20, timeout=30) as child:
        for _ in range(many(10, 300)):
            code = child(how, 15)
            assert code in ((-15,) if how != "C" else (-15, -9))
        assert server.ended is False
        code = child(how, 2)
        assert code in ((1, -2) if how != "C" else (1, -2, -9))
        child(how, 9)
    server.signal(15)
    assert server.finish().value == "closed by its own signal"


@pytest.mark.ids("G02", "Y1")
def test_a_child_leaves_by_itself_from_a_run_that_it_was_forked_in(run_python, door_dir, many):
    """A handler that forks while the main thread is lent: the child finds the server closed to it."""
    times = many(40, 1000)
    done = run_python(
        """
        import os, signal, sys, threading, time
        from doorpool import ClosedError, Proxy, Server

        server = Server()
        parent = os.getpid()
        children = []

        def fork(*_):
            if (child := os.fork()) != 0:
                children.append(child)

        signal.signal(signal.SIGUSR1, fork)
        signal.signal(signal.SIGUSR2, lambda *_: None)
        server.attach(os.getpid, "a.door")

        def play():
            with Proxy("a.door", wait=20, timeout=20) as proxy:
                while server.statistics().threads < 3:  # two, and the main one, when it is lent
                    time.sleep(0.001)
                codes = []
                for number in range(int(sys.argv[1])):
                    os.kill(parent, signal.SIGUSR1)
                    while len(children) <= number:
                        proxy()
                        os.kill(parent, signal.SIGUSR2)  # the first may come just before the wait
                    codes.append(os.waitstatus_to_exitcode(os.waitpid(children[number], 0)[1]))
                result((codes, proxy() == parent))
            server.close()

        threading.Thread(target=play).start()
        try:
            server.run()
        except ClosedError:
            os._exit(7 if os.getpid() != parent else 8)
        """,
        times,
        cwd=door_dir,
    )
    assert done.value == ([7] * times, True)


def test_the_handlers_are_put_back_in_a_child(run_python, door_dir):
    done = run_python(
        """
        import os, signal, threading
        from doorpool import Proxy, Server

        server = Server()

        def state():
            # Only the main thread may look, and in the child the forking one is.
            reader, writer = os.pipe()
            if (child := os.fork()) == 0:
                default = (
                    signal.getsignal(signal.SIGINT) is signal.default_int_handler,
                    signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
                    signal.set_wakeup_fd(-1) == -1,
                    not signal.pthread_sigmask(signal.SIG_BLOCK, []),
                )
                os.write(writer, repr(default).encode())
                os._exit(0)
            os.waitpid(child, 0)
            os.close(writer)
            with open(reader) as answer:
                return answer.read(), not signal.pthread_sigmask(signal.SIG_BLOCK, [])

        server.attach(state, "a.door")

        def play():
            with Proxy("a.door", wait=20) as proxy:
                result(proxy())
            server.close()

        threading.Thread(target=play).start()
        server.run()
        """,
        cwd=door_dir,
    )
    assert done.value == ("(True, True, True, True)", True)


LATE = """
    import os, signal, sys
    from doorpool import Server

    number, signals, wakeup = int(sys.argv[1]), sys.argv[2] == "True", sys.argv[3] == "True"
    heard, told = os.pipe()
    os.set_blocking(told, False)

    class Left(Exception):
        pass

    def leave(*_):
        raise Left

    if number == signal.SIGUSR1:
        signal.signal(number, leave)
    if wakeup:
        signal.set_wakeup_fd(told)
    os.environ["LATE_SIGNAL"] = str(number)
    try:
        with Server() as server:
            server.attach(print, "a.door")
            server.run(signals=signals)
            how = "closed"
    except (Left, KeyboardInterrupt) as error:
        how = type(error).__name__
    result((how, signal.set_wakeup_fd(-1) == told, wakeup and [*os.read(heard, 99)] == [number]))
"""


@pytest.fixture(scope="module")
def signals_come_late(tmp_path_factory):
    """The environment of a process in which a signal comes when the main thread is about to sleep."""
    made = faults.build(tmp_path_factory.mktemp("late"), LATE_SOURCE)
    if not isinstance(made, Path):
        pytest.skip(made)
    return faults.preloading(made)


@pytest.mark.parametrize("wakeup", [False, True], ids=["", "and one to be told"])
@pytest.mark.parametrize(
    ("number", "signals", "how"),
    [
        (signal.SIGUSR1, True, "Left"),
        (signal.SIGUSR1, False, "Left"),
        (signal.SIGINT, False, "KeyboardInterrupt"),
        (signal.SIGINT, True, "closed"),
        (signal.SIGTERM, True, "closed"),
    ],
)
@pytest.mark.ids("G02", "G04")
def test_a_signal_just_before_the_main_thread_sleeps_is_heard(
    run_python, door_dir, signals_come_late, number, signals, how, wakeup
):
    """
    Such a one interrupts no system call, so without help it would be looked at after the next call.
    """
    done = run_python(LATE, int(number), signals, wakeup, cwd=door_dir, env=signals_come_late)
    assert done.value == (how, wakeup, wakeup)


# -- a run that cannot begin


WHOSE = """
    import os, signal, sys, threading
    from doorpool import Server
    from doorpool._keeper import Keeper

    how, wakeup = sys.argv[1], sys.argv[2] == "True"
    heard, told = os.pipe()
    os.set_blocking(told, False)
    if wakeup:
        signal.set_wakeup_fd(told)

    def refuse(*_):
        raise RuntimeError("can't start new thread")

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    server = Server()
    server.attach(print, "a.door")
    if how == "no keeper":
        Keeper._run = threading.Thread.start = refuse
    elif how == "no watch":
        Keeper.watch = refuse
    elif how == "Ctrl-C":
        Keeper.watch = interrupt
    elif how == "no start":
        server.start = refuse
    try:
        server.run()
    except (RuntimeError, KeyboardInterrupt) as error:
        said = type(error).__name__
    back = (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler,
        signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
        signal.set_wakeup_fd(-1) == (told if wakeup else -1),
    )
    result((said, back))
"""


@pytest.mark.parametrize("wakeup", [False, True], ids=["", "and one to be told"])
@pytest.mark.parametrize("how", ["no keeper", "no watch", "Ctrl-C", "no start"])
@pytest.mark.ids("G05")
def test_a_run_that_fails_leaves_signals_where_they_went(run_python, door_dir, how, wakeup):
    """Python wrote them to the number of a closed socket, by then that of another file of the program."""
    done = run_python(WHOSE, how, wakeup, cwd=door_dir)
    assert done.value == ("KeyboardInterrupt" if how == "Ctrl-C" else "RuntimeError", (True, True, True))


def test_a_run_whose_program_has_closed_its_wakeup_leaves_none(run_python, door_dir):
    done = run_python(
        """
        import os, signal, threading, time
        from doorpool import Server

        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told)
        server = Server()

        def stop():
            while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL or not server.statistics().threads:
                time.sleep(0.001)
            os.close(told)
            server.close()

        stopper = threading.Thread(target=stop)
        stopper.start()
        server.run()
        stopper.join()
        result(signal.set_wakeup_fd(-1))
        """,
        cwd=door_dir,
    )
    assert done.value == -1
