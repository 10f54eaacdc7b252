"""
A server thread lingers on the channel that it has just answered, and keeps nobody else waiting for it.

The server has one thread, which would look at the page of that channel for a minute.
"""

from __future__ import annotations

import pytest
from support import Child, wait_until
from support.tasks import cpu_time, is_asleep

from doorpool import Proxy, _impl

pytestmark = pytest.mark.skipif(_impl.NAME != "c", reason="no compiled shuttle here")

SPIN = 60.0  # seconds
SOON = SPIN / 10  # and who would wait for the end of it waits ten times as long

SERVER = """
    import sys
    from doorpool import Server

    with Server(max_threads=1, spin=float(sys.argv[1])) as server:
        server.attach(lambda value: value, "a.door")
        ready()
        server.run()
"""


@pytest.fixture
def server(spawn_server, door_dir) -> Child:
    return spawn_server(SERVER, SPIN, cwd=door_dir)


def wait_until_it_lingers(server: Child) -> None:
    """Nobody calls it, and it goes on using the CPU."""
    before = cpu_time(server.pid)
    wait_until(lambda: cpu_time(server.pid) - before > 0.03, "the server lingers", SOON)


@pytest.mark.ids("D08")
def test_a_thread_that_lingers_answers_whoever_else_calls(server, door_dir):
    """In turns, so that it lingers on the channel of each, and neither of them goes."""
    with Proxy(door_dir / "a.door", timeout=SOON) as one, Proxy(door_dir / "a.door", timeout=SOON) as other:
        for number in range(3):
            for proxy in (one, other):
                assert proxy(number) == number
                wait_until_it_lingers(server)


@pytest.mark.ids("D08", "N13")
def test_a_thread_that_lingers_answers_whoever_comes(server, door_dir):
    proxies = []
    try:
        for number in range(3):
            proxies.append(Proxy(door_dir / "a.door", open_timeout=SOON, timeout=SOON))
            assert proxies[-1](number) == number
            wait_until_it_lingers(server)
    finally:
        for proxy in proxies:
            proxy.close()


@pytest.mark.ids("D08")
def test_a_thread_lingers_on_no_channel_whose_client_has_gone(server, door_dir):
    with Proxy(door_dir / "a.door", timeout=SOON) as other:
        assert other(1) == 1
        with Proxy(door_dir / "a.door", timeout=SOON) as proxy:
            assert proxy(2) == 2
            wait_until_it_lingers(server)
        wait_until(lambda: is_asleep(server.pid), "it lingers no more", SOON)
