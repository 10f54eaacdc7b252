"""
Root gives up what it is after a channel was opened: nothing that comes then is root's any more.

A worker that is forked and becomes somebody else inherits the parent's sockets; what it writes
there would be unpickled as root.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import pytest
from support import become, byhand, fork_in_c, wait_until
from support.actors import logged
from support.marker import Marker
from support.strangers import frames_with
from support.victims import call, next_number, open_client, raw_handle, seen

from doorpool import _impl
from doorpool._errors import DoorError

M = 6602

FORKS: dict[str, Callable[[], int]] = {"os": os.fork, "C": fork_in_c}


def fork_a_worker_that_writes(how: str, copied: bool, uid: int | None, frames: list[bytes]) -> list[str]:
    """
    Fork a child that becomes a user and writes on the channel of its parent; tell what came of each.

    Args:
        how: the kind of fork.
        copied: the child has a copy, by a number that the library does not know.
        uid: whom it becomes.
        frames: what it writes.
    """
    number = raw_handle()._idle[-1].fileno()
    if copied:
        number = os.dup(number)
    reader, writer = os.pipe()
    child = FORKS[how]()
    if child == 0:
        if uid is not None:
            become(uid)
        told = [write(number, frame) for frame in frames]
        if has_page():
            told.append(write_in_the_page(frames[0]))
        os.write(writer, " ".join(told).encode())
        os._exit(0)
    os.close(writer)
    if copied:
        os.close(number)
    with open(reader) as answer:
        told = answer.read().split()
    assert os.waitpid(child, 0)[1] == 0
    return told


def has_page() -> bool:
    """Whether the channel of this process has a shared page, in which its last call went."""
    return raw_handle()._idle[-1].page is not None


def write_in_the_page(frame: bytes) -> str:
    """Post a request in the page of the channel, by its own means: a child has no mapping of it."""
    with open("/proc/self/maps") as file:
        if "/memfd:doorpool-page" in file.read():
            return "mapped"
    try:
        posted = raw_handle()._idle[-1].page.post(frame, 0, 0)
    except ValueError as error:
        return "no-page" if str(error) == "this page is closed" else "refused"
    return f"post:{posted}"


def write(number: int, frame: bytes) -> str:
    try:
        os.write(number, frame)
    except OSError as error:
        return type(error).__name__
    return "written"


@pytest.mark.parametrize("copied", [False, True], ids=["inherited", "copied"])
@pytest.mark.parametrize("how", list(FORKS))
@pytest.mark.ids("G13", "G01")
def test_a_worker_that_gave_root_up_cannot_speak_for_its_parent(
    actor, guarded, serving, layer, path, how, copied, marker: Marker
):
    """``os.fork`` closes the channel in the child; past it, the kernel says who writes."""
    server, canary = serving(0, layer)
    client = actor(0)
    client(open_client, layer, path)
    client(call, "parent")
    live = client(has_page)
    assert live == (_impl.NAME == "c")
    before = server(seen)
    with guarded(server, canary=canary):
        number = client(next_number)
        frames = [byhand.frame_bytes("Q", number, marker.bytes), *frames_with(marker.bytes)]
        told = client(fork_a_worker_that_writes, how, copied, M, frames)
        if live:
            assert told.pop() == "no-page"
        assert len(told) == len(frames)
        if how == "os" and not copied:
            assert set(told) == {"OSError"}, "the child has the channel no more"
        else:
            assert told[0] == "written"
            wait_until(lambda: any("somebody else" in line for line in server(logged)))
    assert [value for _, value in server(seen) if value != "tweet"] == [v for _, v in before if v != "tweet"]
    # The parent goes on at once: what was written on its channel has ended that channel, no more.
    assert client(call_at_last, "parent again") == "parent again"


def call_at_last(value: object) -> object:
    with contextlib.suppress(DoorError):
        return call(value)
    return call(value)


@pytest.mark.parametrize("how", list(FORKS))
@pytest.mark.ids("G13", "G02")
def test_nor_can_one_that_stayed_root(actor, serving, layer, path, how, marker: Marker):
    """Another process is another sender, though its user be the same: a channel is one process's."""
    server, _ = serving(0, layer)
    client = actor(0)
    client(open_client, layer, path)
    client(call, "parent")
    live = client(has_page)
    assert live == (_impl.NAME == "c")
    frames = [byhand.frame_bytes("Q", client(next_number), marker.bytes)]
    told = client(fork_a_worker_that_writes, how, True, None, frames)
    assert told == (["written", "no-page"] if live else ["written"])
    wait_until(lambda: any("somebody else" in line for line in server(logged)))
    assert not marker.went_off
    assert client(call_at_last, "parent again") == "parent again"


@pytest.mark.ids("G14", "B21", "B11")
def test_who_gives_root_up_in_place_has_to_open_anew(actor, guarded, serving, layer, path, marker: Marker):
    """The same process, the same socket, another uid: the channel ends, and a new one is refused."""
    server, canary = serving(0, layer)
    client = actor(0)
    client(open_client, layer, path)
    assert client(call, "as root") == "as root"
    assert client(has_page) == (_impl.NAME == "c")
    with guarded(server, canary=canary):
        client(become, M)
        for _ in range(3):
            with pytest.raises(DoorError) as caught:
                client(call, "as M")
            assert not caught.value.may_have_run
    assert [value for _, value in server(seen) if value != "tweet"] == ["as root"]


def write_on_the_channel(frames: list[bytes]) -> list[str]:
    number = raw_handle()._idle[-1].fileno()
    return [write(number, frame) for frame in frames]


@pytest.mark.ids("G14", "B21")
def test_nor_can_it_write_there_by_hand(actor, guarded, serving, layer, path, marker: Marker):
    server, canary = serving(0, layer)
    client = actor(0)
    client(open_client, layer, path)
    client(call, "as root")
    assert client(has_page) == (_impl.NAME == "c")
    with guarded(server, canary=canary):
        frames = [byhand.frame_bytes("Q", client(next_number), marker.bytes)]
        client(become, M)
        assert client(write_on_the_channel, frames) == ["written"]
        wait_until(lambda: any("somebody else" in line for line in server(logged)))
