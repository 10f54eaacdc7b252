"""
What is short, and what is slow to let go of: full tables, and descriptors whose close blocks.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import sys
from collections.abc import Iterator

LINGER = 2  # seconds that a slow socket's close takes; a thread that does not close it takes none


@contextlib.contextmanager
def only(free: int) -> Iterator[None]:
    """Leave so many numbers for new descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    highest = used[-1] + 1
    fillers = []
    try:
        # Everything below the limit is taken, but for the last few.
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + free, hard))
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(free):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in fillers:
            os.close(number)


def slow_pair(seconds: int = LINGER) -> tuple[socket.socket, socket.socket]:
    """
    Make a TCP socket whose close waits for its other side, and that other side, which reads nothing.

    The close of the last descriptor of the first ends early when the second is closed.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        slow.connect(listener.getsockname())
        other = listener.accept()[0]
    slow.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            slow.send(bytes(4096))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, seconds))
    return slow, other


def send_all_of(sock: socket.socket, data: bytes, *slow: socket.socket) -> None:
    """Send sockets along with bytes, and keep none of them: whoever drops them last waits."""
    numbers = struct.pack(f"@{len(slow)}i", *(one.fileno() for one in slow))
    try:
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)], socket.MSG_DONTWAIT)
    finally:
        for one in slow:
            # What could not be sent is not to hold its sender up.
            if sys.exc_info()[0] is not None:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes(8))
            one.close()
