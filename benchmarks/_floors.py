"""
What the machine itself takes: below this nobody comes, whatever the library.

Floors are measured as the peers are, in turns with them and pinned as they are.  Two hand eight bytes to and
fro in C (`floors.c`, compiled when it is needed); the others do in one process what a call cannot do without:
pickle and unpickle arguments and result, or copy an array once into memory that is warm.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from benchmarks._peers import Call, Peer, Round, Service, Turn, Unavailable

_SOURCE = Path(__file__).with_name("floors.c")

_NO_CALL = "nothing to call"


def _compiled(folder: str) -> str:
    """Compile the C part, and return its path."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unavailable("no C compiler")
    program = os.path.join(folder, "floors")
    subprocess.run([compiler, "-O2", "-std=c11", "-o", program, str(_SOURCE)], check=True)
    return program


@contextmanager
def _in_c(way: str, service: Service) -> Iterator[Round]:
    command = [_compiled(service.folder), way, ",".join(map(str, sorted(service.cpus)))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        asked, told = program.stdin, program.stdout
        assert asked is not None
        assert told is not None

        def take(turn: Turn) -> list[float]:
            print(turn.calls, file=asked, flush=True)
            return [int(word) / 1e9 for word in told.readline().split()]

        yield take


@contextmanager
def _pickled(service: Service) -> Iterator[Call]:
    dumps, loads, procedure = pickle.dumps, pickle.loads, service.procedure
    yield lambda *args: loads(dumps(procedure(*loads(dumps(args, 5))), 5))


@contextmanager
def _in_place(service: Service) -> Iterator[Call]:
    yield service.procedure


@contextmanager
def _copied_in(service: Service) -> Iterator[Call]:
    def call(array: Any) -> Any:
        warm = _warm(len(array))
        warm[:] = array
        return service.procedure(warm)

    yield call


@contextmanager
def _copied_out(service: Service) -> Iterator[Call]:
    def call(what: str, length: int) -> Any:
        warm = _warm(length)
        warm[:] = service.procedure(what, length)
        return warm

    yield call


@lru_cache(1)
def _warm(length: int) -> Any:
    """Return memory that has been written to."""
    import numpy

    return numpy.ones(length)


def _floor(key: str, name: str, connect: Any, needs: str = "") -> Peer:
    return Peer(f"floor-{key}", f"floor: {name}", connect, needs=needs)


def _c_floor(way: str) -> Peer:
    takes_turns: Any = partial(_in_c, way)
    return Peer(f"floor-{way}", f"floor: {way} round trip in C", _no_connection, takes_turns=takes_turns)


def _no_connection(service: Service) -> AbstractContextManager[Call]:
    raise Unavailable(_NO_CALL)


SOCKET = _c_floor("socket")
SPIN = _c_floor("spin")
PICKLE = _floor("pickle", "pickle and unpickle in one process", _pickled)
SUM = _floor("sum", "the sum alone", _in_place, "numpy")
COPY_AND_SUM = _floor("copy-sum", "copy into warm memory + sum", _copied_in, "numpy")
COPY = _floor("copy", "copy into warm memory", _copied_out, "numpy")
