"""
Strangers: processes of other uids, as callers and as servers, by path, inherited and passed.

The socket files are open to everybody here, so what keeps the strangers out is the rule about
identity alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from support import byhand, wait_until
from support.actors import Fd, here, logged
from support.marker import Marker
from support.strangers import (
    accept_callers,
    false_descriptor,
    frames_with,
    knock_and_push,
    knock_with,
    overheard,
    pose_as_door,
    speak_at_the_door,
)
from support.victims import call, open_client, seen, serve

from doorpool._errors import AccessError, DoorError, NotADoorError, ProtocolError

V, M = 4201, 6602

# -- callers ---------------------------------------------------------------------------------------


def test_the_hand_written_peer_is_understood(actor, serving, layer, path):
    """Without this, every refusal below might be for a wrong byte."""
    _server, canary = serving(os.geteuid(), layer)
    value = "by hand"
    arguments = value if layer == "raw" else ((value,), {})
    outcome = actor(os.geteuid())(call_by_hand, path, pickle.dumps(arguments, 5))
    assert pickle.loads(outcome) == value
    canary.opens_and_sings()


def call_by_hand(path: str, data: bytes) -> bytes:
    with byhand.reach(path) as door:
        channel, _ = byhand.dial(door)
        assert channel is not None
        with channel:
            return byhand.call(channel, 1, data)


@pytest.mark.ids("B01", "B13", "K1", "N9")
def test_a_strangers_call_is_refused_and_names_both_uids(
    serving, come_by, guarded, layer, way, victim, marker: Marker
):
    server, canary = serving(victim, layer)
    stranger, door = come_by(way, M, server)
    with guarded(server, canary=canary):
        with pytest.raises(AccessError, match=f"{M}") as caught:
            stranger(open_client, layer, door)
        assert str(victim) in str(caught.value)
        assert not caught.value.may_have_run
        frames = frames_with(marker.bytes)
        reason, text = stranger(knock_and_push, door, frames)
        assert reason == byhand.DENIED
        assert str(M) in text
        assert str(victim) in text
        assert stranger(speak_at_the_door, door, frames)[0] == byhand.DENIED
    assert {ids[1] for ids, _ in server(seen)} == {victim}


@pytest.mark.ids("B13")
@pytest.mark.parametrize("who", ["root", "user"])
def test_a_door_that_root_or_a_user_passes_on_lets_the_receiver_in_as_himself(
    actor, serving, guarded, layer, who, marker: Marker
):
    """The socketpair was made by the server: its SO_PEERCRED would name the server, and does not count."""
    uid = {"root": 0, "user": V}[who]
    server, canary = serving(uid, layer)
    friend, stranger = actor(uid), actor(M)
    copy = friend(open_and_give, layer, canary._open[1])
    try:
        with guarded(server, friend, canary=canary):
            with pytest.raises(AccessError, match=str(M)):
                stranger(open_given, layer, Fd(copy))
            assert stranger(knock_and_push, Fd(copy), [marker.bytes])[0] == byhand.DENIED
        assert friend(call, "still mine") == "still mine"
    finally:
        os.close(copy)


def open_and_give(layer: str, door: str) -> Fd:
    open_client(layer, door)
    return Fd(os.dup(here.client.fileno()))


def open_given(layer: str, number: int) -> Any:
    return open_client(layer, number)


@pytest.mark.ids("B03")
def test_words_of_a_knock_decide_nothing(serving, come_by, guarded, layer, way, marker: Marker):
    """Another version, cut, stretched, or no knock at all: refused, and never believed."""
    server, canary = serving(V, layer)
    stranger, door = come_by(way, M, server)
    good = byhand.knock_bytes()
    with guarded(server, canary=canary):
        for words in (
            byhand.knock_bytes(version=2),
            good[:-1],
            good + b"\0",
            good[:6],
            good[:4],
            good[:4] + marker.bytes,
            good + marker.bytes,
            byhand.answer_bytes(),
            byhand.greeting_bytes(),
            marker.bytes,
            b"\0",
        ):
            reason, text = stranger(knock_with, door, words)
            assert reason == byhand.PROTOCOL
            assert text
        assert stranger(knock_with, door, good)[0] == byhand.DENIED


@pytest.mark.ids("B03")
def test_frames_of_the_right_user_cannot_switch_the_codec(actor, serving, layer, path, marker: Marker):
    """
    An opened channel has one codec; a frame of another kind or version ends that channel only.
    """
    server, canary = serving(V, layer)
    mate = actor(V)
    for frame in (
        byhand.frame_bytes("Q", 1, b"", version=2),
        byhand.frame_bytes("K", 1, b""),
        byhand.frame_bytes("R", 1, marker.bytes),
        byhand.frame_bytes("Q", 7, marker.bytes),
        byhand.knock_bytes(),
        byhand.answer_bytes(byhand.RAW) + bytes(40),
    ):
        assert mate(push_and_read, path, frame)[:1] in (b"", b"G")
    assert not marker.went_off
    assert {value for _, value in server(seen)} == {"tweet"}
    canary.opens_and_sings()


def push_and_read(path: str, frame: bytes) -> bytes:
    with byhand.reach(path) as door:
        channel, _ = byhand.dial(door)
        assert channel is not None
        with channel:
            byhand.send(channel, frame)
            channel.shutdown(socket.SHUT_WR)
            return byhand.read_all(channel)


# -- servers ---------------------------------------------------------------------------------------


@pytest.mark.ids("B02", "K8")
@pytest.mark.parametrize("greets", [byhand.PICKLE, byhand.RAW])
def test_a_strangers_server_is_not_believed(
    actor, come_by, guarded, layer, way, victim, greets, path, marker: Marker
):
    """Neither its greeting, nor the results that it has ready, nor the exceptions: no byte is told to it."""
    stranger = actor(M)
    stranger(pose_as_door, path, greets, marker.bytes)
    client, door = come_by(way, victim, stranger, false_descriptor)
    speaks_otherwise = layer == "objects" and way != "path" and greets == byhand.RAW
    with guarded(client):
        with pytest.raises(NotADoorError if speaks_otherwise else AccessError) as caught:
            client(open_client, layer, door)
        assert not caught.value.may_have_run
    if not speaks_otherwise:
        assert str(victim) in str(caught.value)
        assert str(M) in str(caught.value)
    heard, knocks = stranger(overheard)
    assert heard == b""
    assert knocks == (0 if way == "path" or speaks_otherwise else 1)


@pytest.mark.ids("A06", "B02")
def test_a_squatted_path_in_a_sticky_directory_gets_no_byte(actor, guarded, layer, victim, path, marker):
    """Before and after the true server was there."""
    stranger, client, server = actor(M), actor(victim), actor(victim)
    stranger(pose_as_door, path, byhand.PICKLE, marker.bytes)
    with pytest.raises(FileExistsError):
        server(serve, layer, path)
    with guarded(client), pytest.raises(AccessError, match=str(M)):
        client(open_client, layer, path)
    assert stranger(what_callers_said) == [b""]
    os.unlink(path)
    server(serve, layer, path, name="the true one")
    client(open_client, layer, path)
    assert client(call, "now") == "now"


def what_callers_said() -> list[bytes]:
    wait_until(lambda: here.callers)  # who has connected is accepted by and by
    return [byhand.read_all(port) for port in here.callers]


@pytest.mark.ids("A06")
def test_a_path_squatted_after_its_server_died_is_not_reopened(actor, guarded, victim, path, marker):
    server, client, stranger = actor(victim), actor(victim), actor(M)
    server(serve, "objects", path)
    client(open_client, "objects", path)
    assert client(call, "hello") == "hello"
    server.kill()
    os.unlink(path)
    stranger(pose_as_door, path, byhand.PICKLE, marker.bytes)
    with guarded(client):
        with pytest.raises(DoorError) as caught:
            client(call, "secret")
        assert not caught.value.may_have_run
        assert isinstance(caught.value.__cause__, AccessError)
    assert stranger(overheard) == (b"", 0)


@pytest.mark.ids("B02")
def test_a_listener_that_root_made_and_a_stranger_serves_is_not_believed(
    actor, guarded, layer, victim, place: Path, path, marker: Marker
):
    """A root-made listener is let pass on a path (socket activation); what is believed is the answer."""
    stranger = actor(M)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        os.chmod(path, 0o666)
        listener.listen()
        stranger(serve_inherited, Fd(listener.fileno()), marker.bytes)
    client = actor(victim)
    with guarded(client), pytest.raises(AccessError, match=str(M)):
        client(open_client, layer, path)
    assert stranger(overheard) == (b"", 1)


def serve_inherited(number: int, bomb: bytes) -> None:
    pose_as_door(None, byhand.PICKLE, bomb)
    here.listener = socket.socket(fileno=number)
    here.listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    threading.Thread(target=accept_callers, args=(byhand.PICKLE, bomb), daemon=True).start()


def odd_answer(number: int, how: str, bomb: bytes) -> str:
    """Hear one knock at a port, and answer it oddly; return the pid and uid that the knock said."""
    with socket.socket(fileno=number) as port:
        theirs, knock = byhand.hear(port)
        ours, other = byhand.channel_pair()
        reader, writer = os.pipe()
        fds = {
            "no socket": [],
            "two sockets": [other.fileno(), ours.fileno()],
            "a pipe": [reader],
            "a door": [byhand.door_pair()[0].detach()],
            "an internet socket": [socket.socket().detach()],
            "its own knock": [theirs.fileno()],
        }.get(how, [other.fileno()])
        data = {
            "a bomb": bomb,
            "a long answer": byhand.answer_bytes() + bomb,
            "a short answer": byhand.answer_bytes()[:-1],
            "nothing": b"",
            "another codec": byhand.answer_bytes(byhand.RAW),
            "an unknown codec": byhand.answer_bytes(77),
            "another version": byhand.answer_bytes(version=2),
            "half a refusal": byhand.answer_bytes(refused=2),
            "a refusal without words": byhand.answer_bytes(refused=1),
            "a frame": byhand.frame_bytes("R", 1, bomb),
        }.get(how, byhand.answer_bytes())
        byhand.send(theirs, data, fds, byhand.own_ids())
        if how == "nothing":
            theirs.close()
        for frame in frames_with(bomb):
            with contextlib.suppress(OSError):
                byhand.send(ours, frame, flags=socket.MSG_DONTWAIT)
        os.close(reader)
        os.close(writer)
        return f"{knock.ids}"


ODD = [
    "no socket", "two sockets", "a pipe", "a door", "an internet socket", "its own knock", "a bomb",
    "a long answer", "a short answer", "another codec", "an unknown codec", "another version",
    "half a refusal", "a refusal without words", "a frame",
]  # fmt: skip


@pytest.mark.ids("B02", "B03")
@pytest.mark.parametrize("uid", [V, M], ids=["of the same uid", "of a stranger"])
@pytest.mark.parametrize("how", ODD)
def test_an_answer_that_is_none_opens_no_channel(actor, guarded, uid, how, marker: Marker):
    """Even of the right user an answer must be just what it should be; of a stranger, all the more."""
    holder, port = byhand.door_pair()
    with holder, port:
        server, client = actor(uid), actor(V)
        with guarded(client), pytest.raises(DoorError) as caught:
            opening = client.begin(open_given, "objects", Fd(holder.fileno()))
            server(odd_answer, Fd(port.fileno()), how, marker.bytes)
            opening()
        assert isinstance(caught.value, ProtocolError | AccessError)
        assert not caught.value.may_have_run


@pytest.mark.ids("B02", "N14")
@pytest.mark.parametrize(
    "greeting", ["bomb", "none of ours", "cut", "lying lengths", "other version", "unknown codec"]
)
def test_a_greeting_is_never_more_than_text(actor, guarded, layer, greeting, marker: Marker):
    good = byhand.greeting_bytes()
    data = {
        "bomb": marker.bytes,
        "none of ours": b"dpXX" + good[4:],
        "cut": good[:-1],
        "lying lengths": good[:56] + b"\xff" * (len(good) - 56),
        "other version": byhand.greeting_bytes(version=2),
        "unknown codec": byhand.greeting_bytes(codec=9),
    }[greeting]
    holder, port = byhand.door_pair(data)
    with holder, port:
        client = actor(V)
        with guarded(client), pytest.raises((NotADoorError, ProtocolError)):
            client(open_given, layer, Fd(holder.fileno()))
        assert not byhand.readable(port, 0), "it knocked"


@pytest.mark.ids("B03")
def test_a_proxy_speaks_with_no_door_of_another_codec(actor, guarded, path, marker: Marker):
    """
    The rules for pickle are looked at where a channel says pickle; so objects need one that does.

    Otherwise a door that greets with another codec, which root's servers may offer to everybody
    and a sandboxed one to its user, would be a way around them.
    """
    for uid in (0, V):
        server, client = actor(uid), actor(V)
        server(serve, "raw", f"{path}.{uid}", codec="RAW")
        with guarded(client), pytest.raises(DoorError, match="raw door"):
            client(open_client, "objects", f"{path}.{uid}")
        assert server(seen) == []


@pytest.mark.ids("B01")
def test_refusals_are_logged_with_who_it_was(actor, serving, come_by, layer):
    server, _ = serving(V, layer)
    stranger, door = come_by("path", M, server)
    assert stranger(knock_and_push, door, [])[0] == byhand.DENIED
    (line,) = [line for line in server(logged) if str(M) in line]
    assert "refused" in line
    assert f"pid={stranger.pid}" in line
