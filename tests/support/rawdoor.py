"""
Servers and callers of the raw layer, which certainly end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from doorpool._errors import ClosedError
from doorpool._wire import Reason, Refusal
from doorpool.door import Door, Gate, Handle, Invocation
from support.processes import wait_until

PATIENCE = 20.0  # seconds until something that certainly happens is taken for a hang


def echo(invocation: Invocation) -> None:
    """Answer with what came."""
    invocation.reply(
        invocation.data, [memoryview(buffer) for buffer in invocation.buffers], invocation.descriptors
    )


class Background:
    """
    A function that runs in a thread of its own; ``result`` waits for what it returns or raises.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, args, options), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: Any, options: Any) -> None:
        try:
            self._value = function(*args, **options)
        except BaseException as error:
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout: float = PATIENCE) -> Any:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the thread hangs"
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it would hold on to itself by its traceback
        return self._value

    def error(self, timeout: float = PATIENCE) -> BaseException | None:
        """Return what it raised, or None."""
        try:
            self.result(timeout)
        except BaseException as error:
            return error.with_traceback(None)
        return None


class Serving:
    """
    A door with threads that answer its calls.

    Args:
        procedure: is given each invocation; one that it does not answer is dropped.
        threads: how many wait at the gate.
        gate: somebody else's, with threads of its own.
        options: of the door.
    """

    def __init__(
        self,
        procedure: Callable[[Invocation], None] = echo,
        *,
        threads: int = 2,
        lingers: bool = False,
        gate: Gate | None = None,
        **options: Any,
    ) -> None:
        self._procedures: dict[Door, Callable[[Invocation], None]] = {}
        self._own_gate = gate is None
        self.gate = Gate(lingers=lingers) if gate is None else gate
        self.door = self.add(procedure, **options)
        self.errors: list[str] = []
        self._handles: list[Handle] = []
        self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def add(self, procedure: Callable[[Invocation], None], **options: Any) -> Door:
        """Let one more door lead to the gate."""
        door = Door(self.gate, **options)
        self._procedures[door] = procedure
        return door

    def _serve(self) -> None:
        while True:
            try:
                invocation = self.gate.wait()
            except ClosedError:
                return
            if invocation is not None:
                self._run(invocation)
            invocation = None  # dropped, if it has not been answered

    def _run(self, invocation: Invocation) -> None:
        try:
            self._procedures[invocation.door](invocation)
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")  # itself, it might hold the invocation

    def handle(self, door: Door | None = None, **options: Any) -> Handle:
        """Open the door, by a descriptor of its own."""
        number = (door or self.door).open()
        try:
            handle = Handle(number, **options)
        except BaseException:
            os.close(number)  # it was not taken over
            raise
        self._handles.append(handle)
        return handle

    def __enter__(self) -> Serving:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the doors away, and wait for the threads."""
        for handle in self._handles:
            handle.close()
        for door in self._procedures:
            door.revoke(Refusal(Reason.CLOSED, "the test is over"))
        if self._own_gate:
            self.gate.close()
        for thread in self.threads:
            thread.join(PATIENCE)
        hanging = [thread for thread in self.threads if thread.is_alive()]
        if self._own_gate and not hanging:
            self.gate.dispose()
        assert not hanging, f"server threads hang: {hanging}"


class Canary:
    """
    A client that calls all the time, whom nothing that happens meanwhile may disturb.
    """

    def __init__(self, serving: Serving, door: Door | None = None) -> None:
        self._handle = serving.handle(door)
        self._stop = threading.Event()
        self.calls = 0

    def __enter__(self) -> Canary:
        self._sings = Background(self._sing)
        return self

    def _sing(self) -> None:
        while not self._stop.is_set():
            song = b"tweet %d" % self.calls
            assert self._handle.call(song, timeout=PATIENCE / 2).data == song
            self.calls += 1
            self._stop.wait(0.001)

    def still_sings(self) -> None:
        """Wait until one more call, begun from now on, has gone well."""
        heard = self.calls
        wait_until(lambda: self.calls >= heard + 2 or not self._sings.running, timeout=PATIENCE)
        assert self._sings.running, self._sings.error()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._sings.result()
        self._handle.close()
