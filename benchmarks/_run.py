"""
Processes and turns.

Each peer has a server process and one client process, or several, pinned from their first moment on; they
are forked from here, where nothing was imported that has threads.  Everybody of a workload is there at
the same time, and they take turns: a round is one short turn of each.  Between its turns a client waits for
the next, and a server for its client; one that would poll meanwhile is stopped.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import attrs

from benchmarks import _iceoryx, _machine
from benchmarks._machine import Placement
from benchmarks._peers import Peer, Service, Turn, Unavailable
from benchmarks._workloads import Side, Workload

_fork = get_context("fork")

PATIENCE = 60.0  # seconds; imports and all on a busy machine, or a turn
_LEAVE = 2.0  # seconds a child has to end by itself
_TOGETHER = 0.02  # seconds until those that share a turn have all heard of it

_READY, _UNAVAILABLE, _FAILED = "ready", "unavailable", "failed"


@attrs.frozen
class Effort:
    """
    How much is measured.
    """

    array_length: int
    rounds: int | None = None
    """For every workload; None: as the workload has it."""
    share: float = 1.0
    """Of a workload's calls and seconds."""

    def rounds_of(self, workload: Workload) -> int:
        """Return how many rounds a workload gets."""
        return self.rounds or workload.rounds

    def turn(self, workload: Workload) -> Turn:
        """Return what is asked of each in a round."""
        calls = max(1, round(workload.calls * self.share))
        start = time.monotonic() + _TOGETHER if workload.clients > 1 else 0.0
        return Turn(calls, workload.seconds * self.share, start)


@attrs.define
class Result:
    """
    What a peer was measured with, at one workload in one placement.
    """

    workload: Workload
    placement: Placement
    peer: Peer
    rounds: list[list[float]] = attrs.field(factory=list)
    note: str = ""
    """Why there are no samples."""
    failed: bool = False


# -- children ----------------------------------------------------------------------------------------


class _Child:
    """
    A process that is told what to do over a pipe.
    """

    def __init__(self, body: Callable[..., None], *args: object) -> None:
        self._pipe, theirs = _fork.Pipe()
        self._process = _fork.Process(target=_run_child, args=(theirs, body, *args))
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid or 0

    def tell(self, what: object) -> None:
        """Send it something."""
        self._pipe.send(what)

    def hear(self) -> Any:
        """Wait for what it has to say; what went wrong there is raised here."""
        if not self._pipe.poll(PATIENCE):
            raise TimeoutError(f"said nothing for {PATIENCE:.0f} s")
        kind, what = self._pipe.recv()
        if kind == _UNAVAILABLE:
            raise Unavailable(what)
        if kind == _FAILED:
            raise RuntimeError(what)
        return what

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        if self._process.is_alive():
            os.kill(self.pid, number)

    def close(self) -> None:
        """End it; what it has started itself ends with it."""
        self._pipe.close()
        self.send_signal(signal.SIGCONT)
        self.send_signal(signal.SIGTERM)
        self._process.join(_LEAVE)
        self.send_signal(signal.SIGKILL)
        self._process.join()
        self._process.close()


def _run_child(pipe: Connection, body: Callable[..., None], *args: object) -> None:
    os.setsid()  # Ctrl-C is for whoever measures
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        body(pipe, *args)
    except Unavailable as error:
        pipe.send((_UNAVAILABLE, str(error)))
    except (EOFError, BrokenPipeError):
        return  # nobody asks any more
    except Exception:
        pipe.send((_FAILED, traceback.format_exc()))


def _serve(pipe: Connection, peer: Peer, service: Service) -> None:
    _machine.settle(service.cpus, peer.environment)
    assert peer.serve is not None
    peer.serve(service, lambda: pipe.send((_READY, None)))


def _call(pipe: Connection, side: Side, workload: Workload, cpus: Iterable[int]) -> None:
    _machine.settle(cpus, side.peer.environment)
    takes_turns = side.peer.takes_turns
    with takes_turns(side.service) if takes_turns else workload.drive(side) as take:
        pipe.send((_READY, None))
        while True:
            pipe.send((_READY, take(pipe.recv())))


# -- a peer at a workload ------------------------------------------------------------------------------


class _Pair:
    """
    A server and its clients, in their places.
    """

    def __init__(self, peer: Peer, workload: Workload, placement: Placement, folder: str) -> None:
        self.result = Result(workload, placement, peer)
        self._service = Service(workload.procedure, folder, placement.server)
        self._server: _Child | None = None
        self._clients: list[_Child] = []

    def start_server(self) -> None:
        """Start who answers, if anybody does."""
        if self.result.peer.serve is not None:
            self._server = _Child(_serve, self.result.peer, self._service)
            self._service = attrs.evolve(self._service, pid=self._server.pid)

    def start_clients(self, array_length: int) -> None:
        """Start who call, once the server is ready."""
        if self._server is not None:
            self._server.hear()
        it = self.result
        side = Side(it.peer, self._service, array_length)
        for _ in range(it.workload.clients):
            self._clients.append(_Child(_call, side, it.workload, it.placement.client))

    def wait_ready(self) -> None:
        """Wait until every client has called once."""
        for client in self._clients:
            client.hear()
        self._stop_polling()

    def take_turn(self, turn: Turn) -> None:
        """Have the clients take a turn, and keep the samples."""
        if self.result.peer.spins and self._server is not None:
            self._server.send_signal(signal.SIGCONT)
        for client in self._clients:
            client.tell(turn)
        heard = [client.hear() for client in self._clients]
        self.result.rounds.append([sum(samples) for samples in zip(*heard, strict=True)])
        self._stop_polling()

    def _stop_polling(self) -> None:
        if self.result.peer.spins and self._server is not None:
            self._server.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End all of its processes."""
        for child in (*self._clients, *([self._server] if self._server else [])):
            child.close()
        _iceoryx.remove_leftovers(self._service.folder)


def _give_up(pair: _Pair, error: Exception) -> None:
    """Say why a peer has no numbers; those it had are not whole."""
    it = pair.result
    it.rounds.clear()
    it.note = str(error).strip() or type(error).__name__
    it.failed = not isinstance(error, Unavailable)


@contextmanager
def _giving_up(pair: _Pair) -> Iterator[None]:
    try:
        yield
    except (Unavailable, RuntimeError, TimeoutError, EOFError, OSError) as error:
        _give_up(pair, error)


def _in_step(pairs: Sequence[_Pair], step: Callable[[_Pair], None]) -> None:
    """Have each that is still there do something."""
    for pair in pairs:
        if not pair.result.note:
            with _giving_up(pair):
                step(pair)


# -- the whole of it --------------------------------------------------------------------------------------


def _why_not(peer: Peer, workload: Workload) -> str:
    """Return why a peer is not measured at a workload, if it is not."""
    if workload.key in peer.skips:
        return f"left out: {peer.skips[workload.key]}"
    return "" if peer.installed else "not installed"


def measure(workload: Workload, placement: Placement, peers: Sequence[Peer], effort: Effort) -> list[Result]:
    """Measure the peers at a workload, in turns."""
    with tempfile.TemporaryDirectory(prefix="dp-") as folder, ExitStack() as stack:
        pairs = []
        for peer in peers:
            private = os.path.join(folder, f"{peer.key}-{placement.key}-{os.getpid()}")
            os.mkdir(private, 0o700)
            pair = _Pair(peer, workload, placement, private)
            pair.result.note = _why_not(peer, workload)
            stack.callback(pair.close)
            pairs.append(pair)
        _in_step(pairs, _Pair.start_server)
        _in_step(pairs, lambda pair: pair.start_clients(effort.array_length))
        _in_step(pairs, _Pair.wait_ready)
        for _ in range(effort.rounds_of(workload)):
            _in_step(pairs, lambda pair: pair.take_turn(effort.turn(workload)))
            pairs.append(pairs.pop(0))  # nobody comes after the same one each time
        return sorted((pair.result for pair in pairs), key=lambda it: peers.index(it.peer))
