"""
An idle server with idle clients does nothing at all.
"""

from __future__ import annotations

import os
import resource
import select
import statistics
import time

import pytest
from support import wait_until

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


@pytest.mark.ids("D08", "F10t")
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


MOST_BYTES = 32 << 10  # of memory for each idle channel, pages that both sides have included
LATENCY = 0.050  # seconds for a call among them

HOLD = """
    import os, resource, sys
    from doorpool import Proxy

    stay, first, count = map(int, sys.argv[1:])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    proxies = [Proxy("a.door", open_timeout=30) for _ in range(count)]
    ready()
    os.read(stay, 1)
    result([proxy(number) for number, proxy in enumerate(proxies, first)])
    for proxy in proxies:
        proxy.close()
"""


def resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def time_calls(proxy: Proxy) -> float:
    """How long a call takes."""
    took = []
    for number in range(21):
        began = time.perf_counter()
        assert proxy(number) == number
        took.append(time.perf_counter() - began)
    return statistics.median(took)


@pytest.mark.ids("F10t")
@pytest.mark.timeout(600)  # the long form
def test_thousands_of_idle_channels_cost_little_and_each_is_answered(
    spawn_server, spawn_python, door_dir, many
):  # fmt: skip
    holders, each = many(2, 10), many(200, 500)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 3 * holders * each + 100:
        pytest.skip("no server may have so many descriptors here")
    server = spawn_server(
        """
        from doorpool import Server

        with Server(idle_timeout=0.1) as server:
            server.attach(lambda value: value, "a.door")
            ready()
            server.run(raise_nofile=True)
        """,
        cwd=door_dir,
    )
    stay, go_on = os.pipe()
    with Proxy(door_dir / "a.door") as proxy, open(go_on, "wb") as starter:
        alone, memory = time_calls(proxy), resident(server.pid)
        with open(stay, "rb"):
            children = [
                spawn_python(HOLD, stay, n * each, each, cwd=door_dir, pass_fds=[stay])
                for n in range(holders)
            ]
        for child in children:
            child.wait_ready(120)
        wait_until(lambda: len(os.listdir(f"/proc/{server.pid}/task")) <= 4, "the threads retire", 20.0)
        time.sleep(0.3)  # as above
        before = used(server.pid)
        assert not ended(server.pidfd, many(1.0, 5.0))  # for so long nothing happens
        busy, taken = used(server.pid) - before, (resident(server.pid) - memory) / (holders * each)
        among = time_calls(proxy)
        print(f"{busy * 1e3:.1f} ms of CPU, {taken:.0f} bytes a channel, {among * 1e6:.0f} us a call")
        assert busy < MOST
        assert taken < MOST_BYTES
        assert among < max(LATENCY, 20 * alone)
        starter.close()
        answers = [answer for child in children for answer in child.finish(120).value]
    assert answers == list(range(holders * each))


def ended(pidfd: int, seconds: float) -> bool:
    """Wait for so long whether a process ends."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
