"""
Doors and ``multiprocessing``: with spawn, forkserver and fork, as arguments and in pools.

Each play is a program of its own, which the children import, or have been forked from.
"""

from __future__ import annotations

import gc
import os
import pickle
import warnings
from multiprocessing import reduction, resource_sharer

import pytest

METHODS = ["spawn", "forkserver", "fork"]

PROGRAM = """
    import concurrent.futures, multiprocessing, os, sys, threading, time
    from doorpool import Descriptor, Endpoint, Proxy, Server

    def open_proxy(how, endpoint, **options):
        door = {
            "path": lambda: "a.door",
            "descriptor": endpoint.open,
            "endpoint": lambda: endpoint,
            "number": lambda: endpoint.open().take(),
        }[how]()
        return Proxy(door, timeout=30, **options)

    def echo(value=None):
        return os.getpid(), value

    def set_up(proxy):
        global kept
        kept = proxy

    def work(number):
        return kept(number), os.getpid()
"""


def play(run_python, door_dir, text: str, *args: object):
    return run_python(PROGRAM + text, *args, cwd=door_dir)


# -- as arguments of a process


CALLS = """
    def child(proxy, queue, go):
        with proxy:
            queue.put(("child", proxy("first"), proxy.options()._timeout, proxy.info.path))
            go.wait(30)
            queue.put(("child", proxy("second")))

    if __name__ == "__main__":
        method, how = sys.argv[1:]
        context = multiprocessing.get_context(method)
        queue, go = context.SimpleQueue(), context.Event()
        with Server() as server:
            endpoint = server.attach(echo, "a.door")
            with open_proxy(how, endpoint) as proxy:
                proxy("before")
                process = context.Process(target=child, args=(proxy, queue, go))
                process.start()
                said = [queue.get()]
                said.append(proxy("while the child has it"))
                go.set()
                said.append(queue.get())
                process.join(30)
                said.append(proxy("after the child's end"))
                with open_proxy(how, endpoint) as fresh:
                    said.append(fresh("fresh"))
                assert proxy == fresh
                result((os.getpid(), process.exitcode, said, server.statistics().errors))
"""


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("spawn", "path"),
        ("spawn", "number"),
        ("forkserver", "path"),
        ("forkserver", "endpoint"),
        ("fork", "path"),
        ("fork", "descriptor"),
    ],
)
@pytest.mark.ids("Y1", "Y2", "G02")
def test_parent_and_child_call_by_one_proxy(run_python, door_dir, method, how):
    """The server is in the parent; the child's end leaves all as it was."""
    done = play(run_python, door_dir, CALLS, method, how)
    server, code, (first, here, second, after, fresh), errors = done.value
    assert code == 0
    assert first == ("child", (server, "first"), 30, f"{door_dir}/a.door" if how == "path" else None)
    assert second == ("child", (server, "second"))
    assert here == (server, "while the child has it")
    assert after == (server, "after the child's end")
    assert fresh == (server, "fresh")
    assert errors == 0
    assert "ResourceWarning" not in done.stderr


# -- pools


POOLS = """
    if __name__ == "__main__":
        method, how, kind = sys.argv[1:]
        context = multiprocessing.get_context(method)
        with Server() as server:
            endpoint = server.attach(echo, "a.door")
            with open_proxy(how, endpoint) as proxy:
                if kind == "Pool":
                    with context.Pool(2, set_up, (proxy,)) as pool:
                        answers = pool.map(work, range(20), chunksize=1)
                        here = proxy("during")
                        pool.close()
                        pool.join()
                else:
                    with concurrent.futures.ProcessPoolExecutor(2, context, set_up, (proxy,)) as pool:
                        answers = list(pool.map(work, range(20)))
                        here = proxy("during")
                result((os.getpid(), answers, here, proxy("after")))
"""


@pytest.mark.parametrize("kind", ["Pool", "ProcessPoolExecutor"])
@pytest.mark.parametrize(
    ("method", "how"), [("spawn", "path"), ("forkserver", "descriptor"), ("fork", "endpoint")]
)
@pytest.mark.ids("Y1", "Y2")
def test_a_proxy_for_the_workers_of_a_pool(run_python, door_dir, method, how, kind):
    server, answers, here, after = play(run_python, door_dir, POOLS, method, how, kind).value
    assert [answer for answer, _ in answers] == [(server, number) for number in range(20)]
    workers = {pid for _, pid in answers}
    assert server not in workers
    assert len(workers) <= 2
    assert (here, after) == ((server, "during"), (server, "after"))


# -- a server in the child


SERVES = """
    def child(queue, go, inherited):
        # A fork has the parent's server too, which is none here.
        with Server() as server:
            server.attach(echo, "child.door")
            if inherited is not None:
                with inherited:
                    queue.put(inherited("of the parent"))
            queue.put(os.getpid())
            go.wait(30)

    if __name__ == "__main__":
        (method,) = sys.argv[1:]
        context = multiprocessing.get_context(method)
        queue, go = context.SimpleQueue(), context.Event()
        with Server() as server:
            endpoint = server.attach(echo, "a.door")
            with open_proxy("endpoint", endpoint) as proxy:
                process = context.Process(target=child, args=(queue, go, proxy))
                process.start()
                of_parent, pid = queue.get(), queue.get()
                with Proxy("child.door", timeout=30) as of_child, Proxy("a.door", timeout=30) as own:
                    said = of_parent, of_child("child"), own("parent"), proxy("parent")
                    go.set()
                    process.join(30)
                    left = sorted(os.listdir("."))
                    result((os.getpid(), pid, process.exitcode, said, left, own("after")))
"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.ids("Y4", "Y1", "G02")
def test_a_server_in_the_child(run_python, door_dir, method):
    """Of its own, with threads of its own; its end takes away its name and not the parent's."""
    parent, child, code, said, left, after = play(run_python, door_dir, SERVES, method).value
    assert code == 0
    assert said == ((parent, "of the parent"), (child, "child"), (parent, "parent"), (parent, "parent"))
    assert left == ["a.door"]
    assert after == (parent, "after")


# -- children that come and go while the server works


COME_AND_GO = """
    def child(proxy, number, how):
        answer = proxy(("child", number))
        if how == "raises":
            raise SystemExit(3)
        if how == "dies":
            os._exit(4)
        if how == "killed":
            os.kill(os.getpid(), 9)
        proxy.close()
        os._exit(0 if answer[1] == ("child", number) else 1)

    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        over, wrong, calls = threading.Event(), [], 0

        def call():
            global calls
            while not over.is_set():
                calls += 1
                if proxy(calls) != (os.getpid(), calls):
                    wrong.append(calls)

        with Server() as server:
            server.attach(echo, "a.door")
            with Proxy("a.door", timeout=30) as proxy:
                codes, ways = [], ["returns", "raises", "dies", "killed"]

                def children():
                    started = [context.Process(target=child, args=(proxy, n, ways[n % 4])) for n in range(8)]
                    for process in started:
                        process.start()
                    for process in started:
                        process.join(30)
                        codes.append(process.exitcode)

                children()  # before any call of the parent
                thread = threading.Thread(target=call)
                thread.start()
                children()  # during
                over.set()
                thread.join()
                children()  # after
                assert proxy("last") == (os.getpid(), "last")
                deadline = time.monotonic() + 10
                while server.statistics().channels > 2 and time.monotonic() < deadline:
                    time.sleep(0.01)
                result((codes, wrong, calls, server.statistics().channels, os.path.exists("a.door")))
"""


@pytest.mark.ids("Y1", "Y3", "G01", "G02")
def test_children_before_during_and_after_calls(run_python, door_dir):
    """However they end, the parent's server loses no call and keeps no channel of theirs."""
    codes, wrong, calls, channels, there = play(run_python, door_dir, COME_AND_GO).value
    assert codes == [0, 3, 4, -9] * 6
    assert wrong == []
    assert calls > 0
    assert channels <= 2
    assert there


# -- a task that is given a proxy, in a process that has never seen the library


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.ids("Y2")
def test_a_proxy_through_a_queue(run_python, door_dir, method):
    done = play(
        run_python,
        door_dir,
        """
    def child(queue, answers):
        while (proxy := queue.get()) is not None:
            with proxy:
                answers.put(proxy(os.getpid()))

    if __name__ == "__main__":
        context = multiprocessing.get_context(sys.argv[1])
        queue, answers = context.Queue(), context.SimpleQueue()
        process = context.Process(target=child, args=(queue, answers))
        process.start()
        with Server() as server:
            endpoint = server.attach(echo, "a.door")
            got = []
            for how in ("path", "descriptor"):
                with open_proxy(how, endpoint) as proxy:
                    queue.put(proxy)
                    got.append(answers.get())
                    proxy("still open")
            queue.put(None)
            process.join(30)
            result((os.getpid(), process.pid, process.exitcode, got))
        """,
        method,
    )
    server, child, code, got = done.value
    assert code == 0
    assert got == [(server, child)] * 2
    assert child != server != os.getpid()


@pytest.mark.parametrize("how", ["path", "descriptor"])
def test_a_proxy_that_came_as_an_argument_may_be_dropped(serve, connect, how):
    """Nobody has opened it by himself, so nobody is told that he has forgotten to close it."""
    (endpoint,) = serve(str.upper).endpoints
    proxy = connect() if how == "path" else connect(endpoint)
    # The thread that shares descriptors with children stays until it is told to go.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = pickle.loads(reduction.ForkingPickler.dumps(proxy))
        assert other("x") == "X"
        del other
        gc.collect()
    resource_sharer.stop(timeout=10)
