"""
Whatever a stranger can have the server log, however often: one line names him, and then there is silence.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator
from typing import Any

import pytest
from support import byhand
from support.actors import here, logged

from doorpool import DoorError, Endpoint, Limits, Proxy, Server, _gate

PATIENCE = 20.0
A = 6701
TIMES = 30

pytestmark = pytest.mark.usefixtures("root_only")


class Odd(BaseException):
    """What no procedure should raise."""


def work(how: str) -> Any:
    if how == "raises what is no Exception":
        raise Odd
    return {"no data": object(), "too much": bytes(20_000)}.get(how)


def stream() -> Iterator[int]:
    yield from range(9)


def serve(path: str) -> None:
    _gate.SEND_PATIENCE = 0.05
    here.server = Server(limits=Limits(bytes=10_000_000))
    options: dict[str, Any] = {"codec": "data", "mode": 0o666}
    here.server.attach(Endpoint(work, max_reply=10_000, codec="data"), path, mode=0o666)
    here.server.attach(lambda: bytes(9_000_000), f"{path}.unread", **options)
    here.server.attach(stream, f"{path}.stream", **options)
    here.server.attach(work, f"{path}.closed", callers=lambda who: who.uid == 0, **options)
    here.server.start()


def call_badly(path: str, how: str) -> None:
    with Proxy(path, server={0}, timeout=PATIENCE) as proxy:
        for _ in range(TIMES):
            with pytest.raises((DoorError, RuntimeError)):
                proxy(*(["a", "b"] if how == "arguments" else [how]))


def knock_in_vain(path: str, how: str) -> None:
    for _ in range(TIMES):
        with pytest.raises(DoorError):
            Proxy(f"{path}.closed", server={0}, timeout=PATIENCE)


def send_rubbish(path: str, how: str) -> None:
    door = byhand.reach(path)
    for _ in range(TIMES):
        channel, _ = byhand.dial(door)
        with channel:
            byhand.send(channel, b"no frame at all, but long enough to be one")
            with contextlib.suppress(ConnectionError):
                while byhand.receive(channel).data:
                    continue


def spoil_streams(path: str, how: str) -> None:
    """Ask for streams, each of which is a door of its own, and do each time what is wrong at one."""
    with Proxy(f"{path}.stream", server={0}, timeout=PATIENCE) as proxy:
        for _ in range(TIMES):
            stream = proxy()
            with Proxy(os.dup(stream._proxy.fileno()), server={0}, timeout=PATIENCE) as pump:
                with pytest.raises((DoorError, TypeError)):
                    pump(1, 2, 3)
            stream.close()


def leave_unread(path: str, how: str) -> None:
    """Call for much, and wait until the server has hung up, without having read a byte."""
    door = byhand.reach(f"{path}.unread")
    for _ in range(3):
        channel, _ = byhand.dial(door)
        with channel:
            byhand.send(channel, byhand.frame_bytes("Q", 1, b"\x92\x90\x80"))
            poll = select.poll()
            poll.register(channel, select.POLLRDHUP)
            assert poll.poll(PATIENCE * 1000), "the server waits for ever"


@pytest.mark.ids("F12t")
@pytest.mark.parametrize(
    ("offend", "how", "said"),
    [
        (call_badly, "arguments", "too many positional"),
        (call_badly, "no data", "plain data"),
        (call_badly, "too much", "over max_reply"),
        (call_badly, "raises what is no Exception", "no Exception"),
        (knock_in_vain, "", "refused"),
        (send_rubbish, "", "channel closed"),
        (spoil_streams, "", "stream"),
        (leave_unread, "", "nothing of a reply was read"),
    ],
    ids=lambda value: getattr(value, "__name__", value) or "",
)
def test_a_stranger_is_named_once(actor, path, offend, how, said):
    server, stranger = actor(0), actor(A)
    server(serve, path)
    stranger(offend, path, how)
    lines = [line for line in server(logged) if said in line]
    assert f"uid={A}" in lines[0]
    assert all("more such" in line for line in lines[1:])  # those come in seconds, if at all
