"""
An idle server with idle clients does nothing at all.
"""

from __future__ import annotations

import os
import time

import pytest

from doorpool import Proxy

CLIENTS = 100
SECONDS = 5.0
MOST = 0.010  # seconds of CPU, of which the clock of the kernel counts hundredths


def used(pid: int) -> float:
    """CPU time of all threads of a process, by the scheduler's own account."""
    folder = f"/proc/{pid}/task"
    total = 0
    for task in os.listdir(folder):
        with open(f"{folder}/{task}/schedstat") as file:
            total += int(file.read().split()[0])
    return total / 1e9


@pytest.mark.ids("D08", "F10")
def test_a_hundred_idle_clients_and_their_server_use_no_cpu(spawn_server, door_dir):
    server = spawn_server(
        """
        from doorpool import Server

        with Server() as server:
            server.attach(lambda value: value, "a.door")
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    proxies = [Proxy(door_dir / "a.door") for _ in range(CLIENTS)]
    try:
        for number, proxy in enumerate(proxies):
            assert proxy(number) == number
        time.sleep(0.3)  # threads that linger or retire have done so: this is about time that passes
        before = used(server.pid), used(os.getpid())
        time.sleep(SECONDS)
        after = used(server.pid), used(os.getpid())
    finally:
        for proxy in proxies:
            proxy.close()
    assert after[0] - before[0] < MOST, "the server"
    assert after[1] - before[1] < MOST, "the clients"
