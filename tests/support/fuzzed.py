"""
A process to be fuzzed: a raw door and a data door, which record what they are called with.

``serve`` runs in a process of its own; ``Fuzzed`` is how a test speaks of it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from doorpool import Descriptor, Proxy, Server
from doorpool.door import Handle, Invocation
from support import rawpeer
from support.processes import wait_until
from support.rawdoor import Serving, echo

TWEET = b"tweet"  #: How the songs of a ``Canary`` begin.
MAX_REQUEST = 1 << 20


def serve(folder: str, ready: Callable[[], None]) -> None:
    """Serve until the end of the process."""
    ran: list[Any] = []

    def record(invocation: Invocation) -> None:
        words = [bytes(invocation.data), *map(bytes, invocation.buffers)]
        if not words[0].startswith(TWEET):
            ran.append((words, len(invocation.descriptors)))
        echo(invocation)

    def order(item: str, count: int = 1, *, note: str = "", file: Descriptor | None = None) -> str:
        ran.append((item, count, note, file is not None))
        if file is not None:
            file.close()
        return f"{count} {item}"

    def look() -> tuple[list[Any], int]:
        now = list(ran)
        ran.clear()
        return now, len(os.listdir("/proc/self/fd"))

    server = Server(max_threads=4)
    server.attach(order, f"{folder}/data.door", codec="data", max_request=MAX_REQUEST)
    server.attach(look, f"{folder}/look.door")
    with Serving(record, threads=3, max_request=MAX_REQUEST) as serving, server:
        serving.door.listen(f"{folder}/raw.door")
        ready()
        server.run()


class Fuzzed:
    """
    The process, as a test sees it; also a "serving" for a ``Canary``.

    Args:
        folder: where its doors are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._look = Proxy(folder / "look.door", timeout=rawpeer.PATIENCE)
        self.base = self.descriptors()

    def ran(self) -> list[Any]:
        """What procedures were called with since the last look."""
        calls: list[Any] = self._look()[0]
        return calls

    def descriptors(self) -> int:
        """How many descriptors the process has open."""
        count: int = self._look()[1]
        return count

    def wait_until_clean(self) -> None:
        """Wait until no descriptor is left of what was sent, nor of any channel that has ended."""
        wait_until(lambda: self.descriptors() <= self.base, "descriptors go back to base")

    def handle(self, _door: object = None) -> Handle:
        return Handle(self.folder / "raw.door")

    @contextmanager
    def client(self, kind: str, *, opening: bool = True) -> Iterator[rawpeer.RawClient]:
        """Speak to a door, "raw" or "data", by hand."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.connect(str(self.folder / f"{kind}.door"))
            with rawpeer.RawClient(door.fileno(), opening=opening) as client:
                yield client

    def close(self) -> None:
        self._look.close()
