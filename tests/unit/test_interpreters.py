"""
The compiled part in several interpreters of one process, at the same time.

From CPython 3.12 on each has a lock of its own, so they do run at the same time; before, they share one.
"""

from __future__ import annotations

import sys

import pytest

from doorpool import _impl

pytestmark = [
    pytest.mark.skipif(_impl.NAME != "c", reason="no compiled shuttle here"),
    pytest.mark.skipif(sys.implementation.name != "cpython", reason="these are CPython's"),
]

# Loaded alone: what the rest of the package imports need not be ready for other interpreters.
LOAD = """
import importlib.machinery, importlib.util, os, socket, struct
loader = importlib.machinery.ExtensionFileLoader("doorpool._shuttle", {path!r})
shuttle = importlib.util.module_from_spec(importlib.util.spec_from_loader("doorpool._shuttle", loader))
loader.exec_module(shuttle)
ME = struct.pack("3i", os.getpid(), os.geteuid(), os.getegid())
SECOND = 1_000_000_000
"""

#: Both ends of a page in one interpreter.
CONVERSE = """
sockets = socket.socketpair()
for each in sockets:
    each.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
memory = shuttle.make_page()
client, server = (shuttle.Page(memory, each.fileno(), ME, -1, 0) for each in sockets)
os.close(memory)
for number in range({calls}):
    assert client.post(b"%d" % number, 0, 0) is True
    assert server.take()[0] == b"%d" % number
    assert server.answer(b"answer %d" % number, 0) is True
    assert client.wait(20 * SECOND) == b"answer %d" % number
try:
    client.wait("soon")
except TypeError:
    pass
client.close(), server.close(), sockets[0].close(), sockets[1].close()
assert client.closed and server.closed
os.write({report}, b"1")
"""

#: One end in each; the client parks, so that it is rung for.
CALL = """
page = shuttle.Page({memory}, {sock}, ME, -1, 0)
for number in range({calls}):
    assert page.post(b"%d" % number, 0, 0) is True
    assert page.wait(20 * SECOND) == b"answer %d" % number
page.close()
os.write({report}, b"1")
"""

SERVE = """
page = shuttle.Page({memory}, {sock}, ME, -1, 20 * SECOND)
for number in range({calls}):
    data = page.linger(-1)[0]
    assert data == b"%d" % number
    assert page.answer(b"answer " + data, 0) is True
page.close()
os.write({report}, b"1")
"""


class Interpreters:
    """Several of them; for a process that ends with them."""

    def __init__(self, count: int) -> None:
        import os

        try:
            import _interpreters as made_by  # type: ignore[import-not-found,unused-ignore]
        except ImportError:  # before 3.13
            import _xxsubinterpreters as made_by  # type: ignore[import-not-found,unused-ignore]
        self._made_by = made_by
        self._all = [made_by.create() for _ in range(count)]
        self._heard, self._report = os.pipe()

    def run(self, *scripts: str, **values: object) -> None:
        """Run a script in each, all at once, to their ends; what failed is raised."""
        import os
        from concurrent.futures import ThreadPoolExecutor
        from threading import Barrier

        start = Barrier(len(scripts))

        def run_in(interpreter: object, script: str) -> object:
            start.wait()
            return self._made_by.run_string(interpreter, script.format(report=self._report, **values))

        with ThreadPoolExecutor(len(scripts)) as threads:
            errors = list(threads.map(run_in, self._all, scripts))
        assert errors == [None] * len(scripts), errors
        ended = sum("{report}" in script for script in scripts)
        assert ended == 0 or os.read(self._heard, 99) == b"1" * ended

    def destroy_first(self) -> None:
        self._made_by.destroy(self._all.pop(0))


def use_pages_in_two(path: str, calls: int) -> None:
    two = Interpreters(2)
    two.run(LOAD, LOAD, path=path)
    two.run(CONVERSE, CONVERSE, calls=calls)
    two.destroy_first()
    two.run(CONVERSE, calls=calls)
    two.destroy_first()


def call_from_one_to_the_other(path: str, calls: int) -> None:
    import importlib
    import os
    import socket

    two = Interpreters(2)
    two.run(LOAD, LOAD, path=path)
    memory = importlib.import_module("doorpool._shuttle").make_page()  # and a third one has it, too
    ends = socket.socketpair()
    for each in ends:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    one, other = (each.fileno() for each in ends)
    two.run(CALL.replace("{sock}", str(one)), SERVE.replace("{sock}", str(other)), memory=memory, calls=calls)
    os.close(memory)
    for each in ends:
        each.close()
    two.destroy_first()
    two.destroy_first()


def test_two_interpreters_have_pages_of_their_own(run_python, many):
    run_python(use_pages_in_two, _impl.shuttle.__file__, many(200, 20_000))


@pytest.mark.ids("D07")
def test_one_interpreter_calls_another(run_python, many):
    run_python(call_from_one_to_the_other, _impl.shuttle.__file__, many(500, 50_000), timeout=many(60, 300))
