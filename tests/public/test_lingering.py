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


def have_it_linger(server: Child, proxy: Proxy) -> None:
    """
    Call until the server, having answered, goes on using the CPU.

    Whatever else comes at the server ends a look, such as what is left of an opening: then it sleeps.
    """
    for number in range(100):
        assert proxy(number) == number
        before = cpu_time(server.pid)
        wait_until(lambda: cpu_time(server.pid) - before > 0.03 or is_asleep(server.pid), timeout=SOON)  # noqa: B023
        if not is_asleep(server.pid):
            return
    pytest.fail("it never lingers")


@pytest.mark.ids("D08")
def test_a_thread_that_lingers_answers_whoever_else_calls(server, door_dir):
    """In turns, so that it lingers on the channel of each, and neither of them goes."""
    with Proxy(door_dir / "a.door", timeout=SOON) as one, Proxy(door_dir / "a.door", timeout=SOON) as other:
        for _ in range(3):
            for proxy in (one, other):
                have_it_linger(server, proxy)


@pytest.mark.ids("D08", "N13")
def test_a_thread_that_lingers_answers_whoever_comes(server, door_dir):
    proxies = []
    try:
        for _ in range(3):
            proxies.append(Proxy(door_dir / "a.door", open_timeout=SOON, timeout=SOON))
            have_it_linger(server, proxies[-1])
    finally:
        for proxy in proxies:
            proxy.close()


@pytest.mark.ids("D08")
def test_a_thread_lingers_on_no_channel_whose_client_has_gone(server, door_dir):
    with Proxy(door_dir / "a.door", timeout=SOON) as other:
        assert other(1) == 1
        with Proxy(door_dir / "a.door", timeout=SOON) as proxy:
            have_it_linger(server, proxy)
        wait_until(lambda: is_asleep(server.pid), "it lingers no more", SOON)
