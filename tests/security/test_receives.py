"""
Every receive: who speaks on a channel that was opened honestly, and what an empty read means.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import Any

import pytest
from support import become, byhand, wait_until
from support.actors import Fd, descriptors, here, logged
from support.marker import Marker
from support.victims import (
    call,
    give_client_end,
    give_server_end,
    next_number,
    open_client,
    open_descriptor,
    seen,
    serve,
)

from doorpool import _sockets
from doorpool._errors import BrokenDoorError, CallTimeoutError, DoorError, ProtocolError

V, M = 4201, 6602

SO_PASSRIGHTS = 83  # Linux 6.16


# -- somebody else on an opened channel ------------------------------------------------------------


def speak(number: int, data: bytes) -> bytes:
    """Write bytes on a channel's end that somebody else opened, and hear what is said to that."""
    with socket.socket(fileno=number) as channel:
        byhand.send(channel, data)
        return byhand.read_all(channel)


def speak_only(number: int, data: bytes) -> None:
    with socket.socket(fileno=number) as channel:
        byhand.send(channel, data)


@pytest.mark.ids("K2", "B01")
@pytest.mark.parametrize("uid", [M, None], ids=["stranger", "the same user"])
@pytest.mark.parametrize("got", ["inherited", "passed"])
def test_a_client_end_in_other_hands_is_worthless(
    actor, serving, guarded, layer, victim, uid, got, path, marker: Marker
):
    """Inherited by a fork or sent on: the first byte that another process writes ends the channel."""
    server, canary = serving(victim, layer)
    client = actor(victim)
    client(open_client, layer, path)
    assert client(call, "mine") == "mine"
    end = client(give_client_end)
    try:
        if got == "inherited":
            other, number = actor(victim if uid is None else uid), end
        else:
            other = actor(victim if uid is None else uid)
            number = Fd(end)
        with guarded(server, client, canary=canary):
            frame = byhand.frame_bytes("Q", client(next_number), marker.bytes)
            assert other(speak, number, frame)[:1] in (b"G", b"")
    finally:
        os.close(end)
    assert any("somebody else" in line for line in server(logged))
    assert {ids[0] for ids, _ in server(seen)} == {client.pid, canary._actor.pid}
    assert client(call, "again") == "again"


@pytest.mark.ids("K2", "B01")
def test_a_frame_that_another_finishes_is_not_run(actor, serving, guarded, layer, path, marker: Marker):
    """Cut and splice: the first half is of the right client, the second of a stranger with a copy."""
    server, canary = serving(V, layer)
    client, stranger = actor(V), actor(M)
    frame = byhand.frame_bytes("Q", 1, marker.bytes)
    for cut in (1, 39, 40, 41, len(frame) - 1):
        end = client(open_and_begin, path, frame[:cut])
        try:
            with guarded(server, client, canary=canary):
                assert stranger(speak, Fd(end), frame[cut:])[:1] in (b"G", b"")
        finally:
            os.close(end)
    assert {value for _, value in server(seen)} == {"tweet"}


def open_and_begin(path: str, data: bytes) -> Fd:
    with byhand.reach(path) as door:
        here.channel, _ = byhand.dial(door)
        byhand.send(here.channel, data)
        return Fd(os.dup(here.channel.fileno()))


@pytest.mark.ids("K2", "B01", "B11")
def test_a_client_that_becomes_another_ends_its_channels(actor, serving, guarded, layer, path):
    server, canary = serving(0, layer)
    client = actor(0)
    client(open_client, layer, path)
    assert client(call, "as root") == "as root"
    with guarded(server, client, canary=canary):
        client(become, M)
        with pytest.raises(DoorError):
            client(call, "as another")
    assert "as another" not in [value for _, value in server(seen)]


@pytest.mark.ids("B02", "K8")
@pytest.mark.parametrize("got", ["inherited", "passed"])
def test_a_server_end_in_other_hands_is_worthless(actor, guarded, layer, victim, got, path, marker: Marker):
    """A forged reply is in the client's queue before it calls."""
    server, client = actor(victim), actor(victim)
    server(serve, layer, path)
    client(open_client, layer, path)
    end = server(give_server_end)
    try:
        stranger = actor(M)
        number = end if got == "inherited" else Fd(end)
        frame = byhand.frame_bytes("R", client(next_number), marker.bytes)
        stranger(speak_only, number, frame)
    finally:
        os.close(end)
    with guarded(client):
        with pytest.raises(ProtocolError, match="somebody else") as caught:
            client(call, "hello")
        assert caught.value.may_have_run
    assert client(call, "anew") == "anew"


@pytest.mark.ids("B02", "K8", "B11")
def test_a_server_that_becomes_another_is_not_believed(actor, guarded, layer, path):
    """A root's channel to a server that has given root up: its reply is a stranger's."""
    server, client = actor(0), actor(0)
    server(serve, layer, path)
    client(open_client, layer, path)
    assert client(call, "to root") == "to root"
    server(become, M)
    with guarded(client), pytest.raises(ProtocolError):
        client(call, "to another")
    with guarded(client), pytest.raises(DoorError):
        client(open_client, layer, path)


@pytest.mark.ids("K2")
def test_an_end_that_says_no_more_who_speaks_is_closed(actor, serving, guarded, layer, path, marker: Marker):
    """Whoever shares an end can switch credentials off for it; none is as bad as others."""
    server, canary = serving(V, layer)
    client, stranger = actor(V), actor(M)
    client(open_client, layer, path)
    end = client(give_client_end)
    try:
        stranger(switch_credentials_off, Fd(end))
    finally:
        os.close(end)
    with guarded(client, canary=canary), pytest.raises(ProtocolError, match="somebody else"):
        client(call, "hello")
    end = newest_server_end = server(give_server_end)
    try:
        assert newest_server_end >= 0
        stranger(switch_credentials_off, Fd(end))
    finally:
        os.close(end)
    with contextlib.suppress(DoorError):  # one of the channels is closed: whose is not said
        canary._actor(call, "tweet")
    assert client(call, "on a new channel") == "on a new channel"


def switch_credentials_off(number: int) -> None:
    with socket.socket(fileno=number) as end:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)


# -- empty reads (B23), at a server ----------------------------------------------------------------


def send_nothing(number: int) -> None:
    """Send empty messages on a door's descriptor: bare, naming ourselves, with descriptors."""
    with socket.socket(fileno=number) as door:
        byhand.send(door, b"")
        byhand.send(door, b"", (), byhand.own_ids())
        reader, writer = os.pipe()
        byhand.send(door, b"", [reader, writer])
        ours, theirs = byhand.pair()
        byhand.send(door, b"", [theirs.fileno()], byhand.own_ids())
        for number in (reader, writer):
            os.close(number)
        ours.close()
        theirs.close()


@pytest.mark.ids("B23")
@pytest.mark.parametrize("way", ["inherited", "passed"])
def test_an_empty_message_is_no_end_of_a_door(serving, actor, guarded, layer, victim, way):
    """Two hold copies of one descriptor; the stranger's empty messages do not close it for the other."""
    server, canary = serving(victim, layer)
    early = actor(M)
    number = server(open_descriptor)
    try:
        client = actor(victim)
        with guarded(server, canary=canary):
            if way == "inherited":
                actor(M)(send_nothing, number)
            else:
                early(send_nothing, Fd(number))
        client(open_passed, layer, Fd(number))
        assert client(call, "still open") == "still open"
    finally:
        os.close(number)
    assert {ids[1] for ids, _ in server(seen)} == {victim}


def open_passed(layer: str, number: int) -> Any:
    return open_client(layer, number)


def knock_and(door: str | int, deed: str) -> bytes:
    """Knock, and then do with k0 what would read as root: end it, half or whole, or speak out of band."""
    with byhand.reach(door) as sock, byhand.knock(sock) as ours:
        if deed == "shut writing":
            ours.shutdown(socket.SHUT_WR)
        elif deed == "shut":
            ours.shutdown(socket.SHUT_RDWR)
        elif deed == "close":
            ours.close()
        elif deed == "out of band":
            with contextlib.suppress(OSError):
                ours.send(b"!", socket.MSG_OOB)
        elif deed == "out of band on the door":
            with pytest.raises(OSError):
                sock.send(b"!", socket.MSG_OOB)
        elif deed == "refuse descriptors":
            with contextlib.suppress(OSError):  # an older kernel has no such option
                ours.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        answer = b"" if deed == "close" else byhand.receive(ours).data
        with byhand.knock(sock) as again:  # the port is still heard
            byhand.receive(again).close()
        return answer


DEEDS = ["shut writing", "shut", "close", "out of band", "out of band on the door", "refuse descriptors"]


@pytest.mark.ids("B23", "N13")
@pytest.mark.parametrize("uid", [M, 0], ids=["stranger", "the same user"])
@pytest.mark.parametrize("deed", DEEDS)
def test_the_end_of_a_knock_is_nobody(serving, come_by, guarded, way, uid, deed):
    """The kernel gives "pid 0, uid 0" with the end of a stream; at a root server that is not root."""
    server, canary = serving(0, "objects")
    other, door = come_by(way, uid, server)
    with guarded(server, canary=canary):
        answer = other(knock_and, door, deed)
    if uid == M and answer:
        assert byhand.refusal_in(answer)[0] == byhand.DENIED
    assert {ids[0] for ids, _ in server(seen)} == {canary._actor.pid}


def open_and(path: str, deed: str) -> bytes:
    """Open a channel by hand, and end it, or speak out of band on it; return what is said to that."""
    with byhand.reach(path) as door:
        channel, _ = byhand.dial(door)
        assert channel is not None
        with channel:
            if deed == "end":
                channel.shutdown(socket.SHUT_WR)
            elif deed == "half a frame, then the end":
                byhand.send(channel, byhand.frame_bytes("Q", 1, b"half")[:-1])
                channel.shutdown(socket.SHUT_WR)
            else:
                with pytest.raises(OSError):
                    channel.send(b"Q", socket.MSG_OOB)
                byhand.send(channel, b"?" * 40)
            return byhand.read_all(channel)


@pytest.mark.ids("B23")
@pytest.mark.parametrize("deed", ["end", "half a frame, then the end", "out of band"])
def test_the_end_of_a_channel_is_no_message_of_roots(serving, actor, layer, path, deed, guarded):
    """Nothing runs, and the server's threads are free for others."""
    server, canary = serving(0, layer)
    mate = actor(0)
    with guarded(server, canary=canary):
        assert mate(open_and, path, deed)[:1] in (b"", b"G")
    assert {ids[0] for ids, _ in server(seen)} == {canary._actor.pid}


@pytest.mark.ids("B23")
@pytest.mark.parametrize("way", ["inherited", "passed"])
@pytest.mark.parametrize("uid", [M, 0], ids=["stranger", "the same user"])
def test_a_descriptor_that_a_holder_shuts_ends_that_descriptor_only(
    serving, come_by, guarded, layer, way, uid
):
    server, canary = serving(0, layer)
    other, door = come_by(way, uid, server)
    with guarded(server, canary=canary):
        other(shut, door)


def shut(number: int) -> None:
    with byhand.reach(number) as door:
        door.shutdown(socket.SHUT_RDWR)


@pytest.mark.ids("B23", "B06")
@pytest.mark.parametrize("end", [socket.SHUT_WR, socket.SHUT_RDWR, None], ids=["half", "both", "close"])
def test_an_end_of_file_names_nobody(end):
    """The kernel says "pid 0, uid 0, gid 0" with it."""
    ours, theirs = byhand.pair()
    with ours, theirs:
        if end is None:
            theirs.close()
        else:
            theirs.shutdown(end)
        letter = _sockets.receive_letter(ours, 100)
        assert (letter.data, letter.ids, letter.pidfd, letter.descriptors) == (b"", None, -1, [])


def test_what_nobody_has_taken_out_of_a_message_is_closed_with_it():
    read, write = os.pipe()
    ours, theirs = byhand.pair()
    with ours, theirs:
        byhand.send(theirs, b"message", [write])
        os.close(write)
        letter = _sockets.receive_letter(ours, 100)
        assert len(letter.descriptors) == 1
        os.write(letter.descriptors[0], b"open")
        assert os.read(read, 100) == b"open"
        del letter
        assert os.read(read, 100) == b"", "nobody can write any more"
    os.close(read)


# -- empty reads (B23), at a client ----------------------------------------------------------------


def answer_with_nothing(number: int, how: str) -> None:
    """Answer every knock at a port with an end, or with a byte out of band."""
    port = socket.socket(fileno=number)
    here.kept = []

    def work() -> None:
        with contextlib.suppress(OSError):
            while True:
                theirs, _ = byhand.hear(port)
                here.kept.append(theirs)
                if how == "shut writing":
                    theirs.shutdown(socket.SHUT_WR)
                elif how == "close":
                    theirs.close()
                elif how == "out of band":
                    theirs.send(b"!", socket.MSG_OOB)

    threading.Thread(target=work, daemon=True).start()


@pytest.mark.ids("B23", "K8")
@pytest.mark.parametrize("how", ["shut writing", "close", "out of band"])
def test_the_end_of_an_answer_is_not_roots_word(actor, guarded, layer, how):
    """A root client takes an end of file, which bears root's ids, for what it is."""
    holder, port = byhand.door_pair()
    with holder, port:
        stranger, client = actor(M), actor(0)
        stranger(answer_with_nothing, Fd(port.fileno()), how)
        with guarded(client), pytest.raises(DoorError) as caught:
            client(open_in_time, layer, Fd(holder.fileno()), 0.3)
        assert not caught.value.may_have_run


def open_in_time(layer: str, number: int, seconds: float) -> Any:
    """Open, and return the CPU time that the waiting took; a spin would take as much as there is."""
    began = time.process_time()
    try:
        return open_client(layer, number, open_timeout=seconds)
    finally:
        assert time.process_time() - began < seconds * 0.7, "it spins"


def serve_one_with_nothing(number: int, how: str) -> None:
    """Be a proper server, up to the reply."""
    port = socket.socket(fileno=number)

    def work() -> None:
        theirs, _ = byhand.hear(port)
        here.channel = byhand.admit(theirs)
        theirs.close()
        byhand.receive(here.channel, patience=60)
        if how == "shut writing":
            here.channel.shutdown(socket.SHUT_WR)
        elif how == "close":
            here.channel.close()
        else:
            here.channel.send(b"R", socket.MSG_OOB)

    threading.Thread(target=work, daemon=True).start()


@pytest.mark.ids("B23")
@pytest.mark.parametrize("how", ["shut writing", "close", "out of band"])
def test_the_end_of_a_channel_is_no_reply(actor, guarded, layer, how):
    holder, port = byhand.door_pair()
    with holder, port:
        server, client = actor(0), actor(0)
        server(serve_one_with_nothing, Fd(port.fileno()), how)
        client(open_passed, layer, Fd(holder.fileno()))
        with guarded(client), pytest.raises((BrokenDoorError, CallTimeoutError)) as caught:
            client(call, "hello", timeout=0.3 if how == "out of band" else 5.0)
        assert caught.value.may_have_run


# -- traps (S22) -----------------------------------------------------------------------------------


def flood_and_unset_nonblock(number: int) -> int:
    """Fill a door's queue with knocks, and have the shared description block."""
    with socket.socket(fileno=number) as door:
        kept = []
        door.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                kept.append(byhand.knock(door))
        door.setblocking(True)
        for knock in kept:
            knock.close()
        return len(kept)


@pytest.mark.ids("N13")
def test_a_door_filled_by_another_holder_blocks_nobody_beyond_his_time(serving, actor, layer):
    """Another holder cleared O_NONBLOCK and filled the queue of a stopped server."""
    server, canary = serving(V, layer)
    client, stranger = actor(V), actor(M)
    number = server(open_descriptor)
    try:
        server.stop()
        assert stranger(flood_and_unset_nonblock, Fd(number)) > 10
        with pytest.raises(CallTimeoutError) as caught:
            client(open_with_own_copy, layer, Fd(number), 0.3)
        assert not caught.value.may_have_run
        server.cont()
        client(open_passed, layer, Fd(number))
        assert client(call, "after all") == "after all"
    finally:
        server.cont()
        os.close(number)
    canary.opens_and_sings()


def open_with_own_copy(layer: str, number: int, seconds: float) -> Any:
    return open_client(layer, number, open_timeout=seconds)


def knock_with_full_queue(door: str | int, refusing: bool) -> bytes:
    """Knock so that the answer cannot be delivered: no room, or no descriptors taken."""
    ours, theirs = byhand.pair()
    with byhand.reach(door) as sock, ours:
        with theirs:
            if refusing:
                with contextlib.suppress(OSError):
                    ours.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
            else:
                theirs.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        theirs.send(b"x" * 4096)
            byhand.send(sock, byhand.knock_bytes(), [theirs.fileno()], byhand.own_ids())
        channel, _ = byhand.dial(sock)  # once that is answered, the first knock has been heard
        if channel is not None:
            channel.close()
        return byhand.read_all(ours).lstrip(b"x")


@pytest.mark.ids("N13")
@pytest.mark.parametrize("uid", [M, V], ids=["stranger", "the same user"])
@pytest.mark.parametrize("refusing", [False, True], ids=["no room", "no descriptors"])
def test_an_answer_that_cannot_be_delivered_is_dropped(serving, come_by, guarded, way, uid, refusing, layer):
    """The knock is dropped, the server waits for nobody, and the channel that was to be is gone."""
    server, canary = serving(V, layer)
    other, door = come_by(way, uid, server)
    with guarded(server, canary=canary):
        heard = other(knock_with_full_queue, door, refusing)
        assert heard == b"" or byhand.refusal_in(heard) is not None


def knock_oddly(door: str | int, times: int) -> None:
    """Knock with what is refused, and with descriptors that nobody asked for."""
    reader, writer = os.pipe()
    ours, theirs = byhand.pair()
    holder, port = byhand.door_pair()
    internet = socket.socket()
    with ours, theirs, holder, port, internet, byhand.reach(door) as sock:
        odd = [reader], [reader, writer], [theirs.fileno(), reader], [holder.fileno()], [internet.fileno()]
        for _ in range(times):
            for words in (byhand.knock_bytes(), byhand.knock_bytes(version=9), b"", b"?"):
                for fds in (*odd, [theirs.fileno()]):
                    byhand.send(sock, words, fds, byhand.own_ids())
                channel, _ = byhand.dial(sock)  # which waits until all that was heard
                if channel is not None:
                    channel.close()
    os.close(reader)
    os.close(writer)


@pytest.mark.ids("B03")
def test_knocks_that_are_refused_leave_no_descriptor(serving, come_by, guarded, layer, way):
    """Or a stranger could use up the server's table with a few hundred of them."""
    server, canary = serving(V, layer)
    stranger, door = come_by(way, M, server)
    stranger(knock_oddly, door, 1)
    before = server(descriptors)
    with guarded(server, canary=canary):
        stranger(knock_oddly, door, 5)
    # The canary has opened the door anew meanwhile.
    wait_until(lambda: server(descriptors) <= before + 3, "the server has closed what came")


def flood_with_answers(number: int, times: int) -> None:
    """Answer each of so many knocks with descriptors that nobody asked for."""
    with socket.socket(fileno=number) as port:
        for turn in range(times):
            theirs, _ = byhand.hear(port)
            reader, writer = os.pipe()
            ours, other = byhand.channel_pair()
            with theirs, ours, other:
                fds = [[reader], [reader, writer], [other.fileno(), reader], [other.fileno()]][turn % 4]
                byhand.send(theirs, byhand.answer_bytes(), fds, byhand.own_ids())
            os.close(reader)
            os.close(writer)


@pytest.mark.ids("B03")
def test_answers_that_are_refused_leave_no_descriptor(actor, layer):
    holder, port = byhand.door_pair()
    with holder, port:
        client, stranger = actor(V), actor(M)
        before = client(descriptors)
        answering = stranger.begin(flood_with_answers, Fd(port.fileno()), 12)
        for _ in range(12):
            with pytest.raises(DoorError):
                client(open_and_forget, layer, Fd(holder.fileno()))
        answering()
        wait_until(lambda: client(descriptors) == before, "the janitors have closed what came")


def open_and_forget(layer: str, number: int) -> None:
    try:
        open_client(layer, number)
    finally:
        os.close(number)  # it was not taken over
