"""
Relays, twins and tricked writers: honest credentials of the victim, on messages that are not his.

Everybody here who is believed anything by the victim is of the victim's uid.  What gives the
stranger away is that he is not the process that made the socket.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import byhand, enter_pid_namespace
from support.actors import Actor, Fd, counts, give, here, logged
from support.marker import Marker
from support.processes import wait_until
from support.victims import (
    call,
    give_client_end,
    give_port,
    hold_keeper,
    let_keeper_go,
    next_number,
    open_client,
    seen,
    serve,
)

from doorpool import Server, _opening, current_call
from doorpool._errors import AccessError, BusyError, DoorError, ProtocolError

V, M = 4201, 6602


# -- a door whose port the stranger holds ----------------------------------------------------------


@pytest.fixture(params=["root-made listener", "inherited", "passed"])
def trap(request: pytest.FixtureRequest, actor, victim, place: Path):
    """
    A victim's client and a stranger: the stranger serves the door that the client opens.

    By path the victim looks at the listener first, so this one was made by root, who is let pass.
    """
    holder, port = byhand.door_pair()
    with holder, port, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        stranger = actor(M)
        if request.param == "root-made listener":
            path = str(place / "trap.door")
            listener.bind(path)
            os.chmod(path, 0o666)
            listener.listen()
            client = actor(victim)
            yield client, path, stranger, (Fd(listener.fileno()), True)
        elif request.param == "inherited":
            client = actor(victim)
            yield client, holder.fileno(), stranger, (Fd(port.fileno()), False)
        else:
            client = actor(victim)
            yield client, client(_keep, Fd(holder.fileno())), stranger, (Fd(port.fileno()), False)


def _keep(number: int) -> int:
    return number


def set_trap(number: int, is_listener: bool) -> None:
    """Take the port of the trap, or the listener through which it will come."""
    here.trap = socket.socket(fileno=number)
    here.trap.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    here.trap_listens = is_listener


def hear_victim() -> tuple[int, int, int]:
    """Hear the victim's knock; keep its k1."""
    if here.trap_listens:
        here.trap_listens = False
        assert byhand.readable(here.trap, byhand.PATIENCE)
        here.trap, _ = here.trap.accept()
        here.trap.send(byhand.greeting_bytes())
    here.k1, message = byhand.hear(here.trap)
    here.words = message.data
    assert message.ids is not None
    return message.ids


# -- relays (B17) ----------------------------------------------------------------------------------


def relay_each(door: str, how: str, bomb: bytes) -> None:
    """Relay each knock that the victim makes, from now on; who knocked goes to ``here.knockers``."""
    here.knockers, here.forged, here.overheard = [], [], b""

    def work() -> None:
        with contextlib.suppress(TimeoutError, OSError, AssertionError):
            while True:
                here.knockers.append(hear_victim())
                _relay(door, how, bomb)

    threading.Thread(target=work, daemon=True).start()


def _relay(door: str, how: str, bomb: bytes) -> None:
    """Forward the victim's knock on the true door, with or without touching a copy of it."""
    ours, theirs = byhand.channel_pair()
    with byhand.reach(door) as true, here.k1 as k1, ours, theirs:
        if how == "answering first":
            byhand.send(k1, byhand.answer_bytes(), [theirs.fileno()], byhand.own_ids())
        if how == "answering first without a socket":
            byhand.send(k1, byhand.answer_bytes(), (), byhand.own_ids())
        if how == "bombing first":
            byhand.send(k1, byhand.frame_bytes("R", 1, bomb))
        try:
            byhand.send(true, here.words, [k1.fileno()], here.knockers[-1])
        except PermissionError:  # nobody but root names others
            here.forged.append(False)
        byhand.send(true, here.words, [k1.fileno()], byhand.own_ids())
        if how == "without a copy":
            return
        for frame in (bomb, byhand.frame_bytes("R", 1, bomb), byhand.frame_bytes("R", 2, b"E" + bomb)):
            with contextlib.suppress(OSError):
                byhand.send(k1, frame)
                byhand.send(ours, frame)
        for end in (k1, ours):
            with contextlib.suppress(TimeoutError, OSError):
                here.overheard += byhand.receive(end, patience=0.05).data


def relayed() -> tuple[list[tuple[int, int, int]], list[bool], bytes]:
    return here.knockers, here.forged, here.overheard


RELAYS = [
    "without a copy", "with a copy", "answering first", "answering first without a socket", "bombing first",
]  # fmt: skip


@pytest.mark.ids("B17")
@pytest.mark.parametrize("how", RELAYS)
def test_a_relayed_knock_is_refused_and_names_maker_and_sender(
    serving, trap, guarded, layer, victim, path, how, marker: Marker
):
    client, door, stranger, (number, listens) = trap
    server, canary = serving(victim, layer)
    stranger(set_trap, number, listens)
    stranger(relay_each, path, how, marker.bytes)
    with guarded(client, server, canary=canary):
        with pytest.raises(DoorError) as caught:
            client(open_client, layer, door)
        assert isinstance(caught.value, AccessError | ProtocolError | BusyError)
        assert not caught.value.may_have_run
    knockers, forged, overheard = stranger(relayed)
    assert set(knockers) == {(client.pid, victim, victim)}
    assert not any(forged)
    assert overheard == b""
    # The stranger may have answered the client before the server has looked at what was relayed to it.
    line = wait_until(lambda: next((line for line in server(logged) if "socket made by" in line), None))
    assert f"sent by pid {stranger.pid}, uid {M}" in line
    assert f"made by pid {client.pid}, uid {victim}" in line


@pytest.mark.ids("B17")
def test_a_relayed_answer_is_refused(actor, trap, guarded, layer, victim, path, marker: Marker):
    """
    The stranger comes by an honest channel of a victim's server, one of raw bytes, and passes its end on.
    """
    client, door, stranger, (number, listens) = trap
    server = actor(victim)
    server(serve, "raw", path, codec="RAW")
    stranger(set_trap, number, listens)
    with guarded(client, server):
        opening = client.begin(open_client, layer, door)
        stranger(hear_victim)
        stranger(pass_channel_on, path)
        with pytest.raises(AccessError, match=f"made by pid {server.pid}, uid {victim}") as caught:
            opening()
        assert f"sent by pid {stranger.pid}, uid {M}" in str(caught.value)
    assert server(seen) == []


def pass_channel_on(path: str) -> None:
    with byhand.reach(path) as true, here.k1 as k1:
        channel, _ = byhand.dial(true)
        assert channel is not None
        with channel:
            byhand.send(k1, byhand.answer_bytes(), [channel.fileno()], byhand.own_ids())


# -- a refusal that somebody else would hear -------------------------------------------------------


def knock_for_another(door: str, service: str) -> tuple[int, str] | None:
    """Say no knock, with a connection to a service beside it; then knock, and return the refusal of that."""
    with byhand.reach(door) as sock, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(service)
        byhand.send(sock, b"no knock", [connection.fileno()], byhand.own_ids())
        with byhand.knock(sock) as ours:
            return byhand.refusal_in(byhand.receive(ours).data)


@pytest.mark.ids("B17")
def test_a_refusal_is_sent_over_nobodys_socket_but_the_senders(actor, serving, layer, victim, path, place):
    """A service that goes by who has sent a message would hear the victim speak."""
    serving(victim, layer)
    service = str(place / "service")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(service)
        os.chmod(service, 0o666)
        listener.listen()
        refusal = actor(M)(knock_for_another, path, service)
        assert refusal is not None
        assert refusal[0] == byhand.DENIED, "what came first on that port was dealt with"
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(4096) == b""


# -- a twin of the port (B18) ----------------------------------------------------------------------


def copy_knock(number: int) -> None:
    """Copy the next knock off a shared port, and leave it there."""
    here.twin = socket.socket(fileno=number)
    here.k1, _ = byhand.hear(here.twin, socket.MSG_PEEK)


def twin_reads() -> bytes:
    """Read what the copy of the knock's socket allows, without waiting."""
    with contextlib.suppress(OSError):
        return here.k1.recv(1 << 16, socket.MSG_DONTWAIT)
    return b""


def twin_reads_and_writes(bomb: bytes) -> bytes:
    """Read and write what the copy allows, without waiting; return what was read."""
    ours, theirs = byhand.channel_pair()
    with ours, theirs:
        with contextlib.suppress(OSError):
            byhand.send(here.k1, byhand.answer_bytes(), [theirs.fileno()], byhand.own_ids())
        for frame in (bomb, byhand.frame_bytes("R", 1, bomb), byhand.frame_bytes("Q", 1, bomb)):
            for sock in (here.k1, ours, here.twin):
                with contextlib.suppress(OSError):
                    byhand.send(sock, frame, flags=socket.MSG_DONTWAIT)
        heard = b""
        for sock in (here.k1, ours):
            with contextlib.suppress(OSError):
                heard += sock.recv(1 << 16, socket.MSG_DONTWAIT)
        return heard


@pytest.mark.ids("B18")
@pytest.mark.parametrize("way", ["inherited", "passed"])
@pytest.mark.parametrize("answers", [False, True], ids=["listens", "answers first"])
def test_a_twin_of_the_port_reads_no_byte_of_a_call(
    actor, serving, come_by, guarded, layer, victim, way, answers, marker: Marker
):
    server, canary = serving(victim, layer)
    stranger = actor(M)
    client, door = come_by(way, victim, server)
    twin = server(give_port)
    try:
        server(hold_keeper)
        opening = client.begin(open_client, layer, door)
        stranger(copy_knock, Fd(twin))
        stranger(clear_nonblock)
        if answers:
            heard = stranger(twin_reads_and_writes, marker.bytes)
        else:
            heard = stranger(twin_reads)
    finally:
        os.close(twin)
        server(let_keeper_go)
    if answers:
        # Its own bytes come first, and are what they are: a denial, which sharing the port gives.
        with pytest.raises((AccessError, ProtocolError)):
            opening()
        assert not marker.went_off
    else:
        opening()
        heard += stranger(twin_reads)
        secret = "for the server only"
        before = client(counts), server(counts)
        assert client(call, secret) == secret
        heard += stranger(twin_reads)
        heard += stranger(twin_reads_and_writes, marker.bytes)
        assert client(call, secret) == secret
        after = client(counts), server(counts)
        assert [b["unpickled"] - a["unpickled"] for a, b in zip(before, after, strict=True)] == [2, 2]
        assert [b["find_class"] - a["find_class"] for a, b in zip(before, after, strict=True)] == [0, 0]
    assert heard == b""
    with guarded(server, client, canary=canary):
        stranger(close_twin)
    assert {ids[1] for ids, _ in server(seen)} == {victim}


def clear_nonblock() -> None:
    """Have the shared port block, for whoever does not say otherwise."""
    here.twin.setblocking(True)


def close_twin() -> None:
    with contextlib.suppress(OSError):
        here.twin.shutdown(socket.SHUT_RDWR)
    here.twin.close()
    here.k1.close()


@pytest.mark.ids("B18")
def test_whoever_takes_the_knock_away_opens_nothing(serving, come_by, actor, guarded, layer, marker: Marker):
    """The stranger takes the knock off the shared port before the server can, and answers it himself."""
    server, canary = serving(V, layer)
    stranger = actor(M)
    client, door = come_by("passed", V, server)
    port = server(give_port)
    try:
        with guarded(client, server, canary=canary):
            server(hold_keeper)
            try:
                opening = client.begin(open_client, layer, door)
                stranger(take_knock, Fd(port), marker.bytes)
            finally:
                server(let_keeper_go)
            with pytest.raises(AccessError, match=str(M)):
                opening()
    finally:
        os.close(port)


def take_knock(number: int, bomb: bytes) -> None:
    with socket.socket(fileno=number) as port:
        theirs, _ = byhand.hear(port)
        with theirs, byhand.admit(theirs) as channel, contextlib.suppress(BrokenPipeError):
            byhand.send(channel, byhand.frame_bytes("R", 1, bomb))  # if he has not gone already


# -- tricked writers (B19) -------------------------------------------------------------------------


def write(number: int, data: bytes) -> None:
    """Write bytes to a descriptor that somebody handed us, as passwd and mount do with their output."""
    try:
        with contextlib.suppress(BrokenPipeError):
            os.write(number, data)
    finally:
        os.close(number)


def make_pair(make: Callable[[], tuple[socket.socket, socket.socket]] = byhand.pair) -> tuple[Fd, Fd]:
    """Make a pair for somebody to inherit, as an event loop's self-pipe is."""
    one, other = make()
    return Fd(one.detach()), Fd(other.detach())


def knock_with_pair(door: str | int, k0: int, k1: int, bomb: bytes) -> bytes:
    """Knock with a pair that somebody else made; return what was answered to that."""
    with socket.socket(fileno=k0) as ours, byhand.reach(door) as sock:
        byhand.send(sock, byhand.knock_bytes(), [k1], byhand.own_ids())
        os.close(k1)
        with contextlib.suppress(OSError):
            byhand.send(ours, byhand.frame_bytes("Q", 1, bomb))
        channel, _ = byhand.dial(sock)  # once that is answered, the first knock has been heard
        if channel is not None:
            channel.close()
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            return ours.recv(1 << 16, socket.MSG_DONTWAIT)
        return b""


@pytest.fixture(params=["living", "dead"])
def maker(request: pytest.FixtureRequest, actor, victim) -> Iterator[Actor]:
    """A process of the victim's uid that has made pairs, which the stranger holds."""
    one = actor(victim)
    one.pair, one.channel_pair = one(make_pair), one(make_pair, byhand.channel_pair)
    if request.param == "dead":
        one.kill()
    yield one
    for number in (*one.pair, *one.channel_pair):
        with contextlib.suppress(OSError):
            os.close(number)


@pytest.mark.ids("B19")
def test_a_pair_made_by_the_victim_lets_nobody_in(
    serving, come_by, guarded, maker, way, victim, marker: Marker
):
    """The stranger inherited both ends; SO_PEERCRED of the one names the victim, truly."""
    server, canary = serving(victim, "objects")
    stranger, door = come_by(way, M, server)
    k0, k1 = maker.pair
    with guarded(server, canary=canary):
        answered = stranger.begin(knock_with_pair, door, Fd(k0), Fd(k1), marker.bytes)
        os.close(k0)
        os.close(k1)
        assert answered() == b""
    (line,) = [line for line in server(logged) if "socket made by" in line]
    assert f"sent by pid {stranger.pid}, uid {M}" in line
    assert f"made by pid {maker.pid}, uid {victim}" in line


@pytest.mark.ids("B19")
def test_a_tricked_writer_knocks_in_vain(
    actor, serving, come_by, guarded, layer, way, victim, marker: Marker
):
    """Whatever it is made to write, no descriptor is attached to it."""
    server, canary = serving(victim, layer)
    stranger, door = come_by(way, M, server)
    deputy = actor(victim)
    with guarded(server, deputy, canary=canary):
        for words in (byhand.knock_bytes(), byhand.frame_bytes("Q", 1, marker.bytes), marker.bytes, b""):
            copy = stranger(give_door, door)
            deputy(write, Fd(copy), words)
            os.close(copy)
        reason, _ = stranger(knock_at_kept_door)
        assert reason == byhand.DENIED


def give_door(door: str | int) -> Fd:
    if not hasattr(here, "kept_door"):
        here.kept_door = byhand.reach(door)
    return give(here.kept_door.fileno())


def knock_at_kept_door() -> Any:
    with byhand.knock(here.kept_door) as ours:
        return byhand.refusal_in(byhand.receive(ours).data)


def start_answer(data: bytes, *, socket_too: bool) -> Fd:
    """Send the victim some bytes, with a socket of ours or without; lend its k1 to the next writer."""
    ours, theirs = byhand.channel_pair()
    if data or socket_too:
        byhand.send(here.k1, data, [theirs.fileno()] if socket_too else (), byhand.own_ids())
    here.pair = ours, theirs
    return give(here.k1.fileno())


@pytest.mark.ids("B19")
@pytest.mark.parametrize(
    "plan", ["the deputy says it all", "a socket, then the deputy", "a byte with a socket, then the deputy",
             "the deputy, then a socket"],
)  # fmt: skip
def test_a_tricked_writer_answers_in_vain(actor, trap, guarded, victim, plan, marker: Marker):
    """One receive never mixes two writers; a message is believed whole or not."""
    client, door, stranger, (number, listens) = trap
    deputy = actor(victim)
    answer = byhand.answer_bytes()
    cut = {"a byte with a socket, then the deputy": 1, "the deputy, then a socket": 0}.get(plan, 0)
    stranger(set_trap, number, listens)
    with guarded(client, deputy):
        opening = client.begin(open_client, "objects", door)
        stranger(hear_victim)
        if plan == "a socket, then the deputy":
            k1 = stranger(start_answer, answer[:1], socket_too=True)
            cut = 1
        else:
            k1 = stranger(start_answer, answer[:cut], socket_too=cut > 0)
        end = -1 if plan == "the deputy, then a socket" else len(answer)
        deputy(write, Fd(k1), answer[cut:end] + (marker.bytes if cut == 0 and end > 0 else b""))
        os.close(k1)
        if end < 0:
            with contextlib.suppress(BrokenPipeError):
                os.close(stranger(start_answer, answer[-1:], socket_too=True))
        with pytest.raises((AccessError, ProtocolError)):
            opening()


@pytest.mark.ids("B19")
def test_an_answer_with_a_pair_made_by_the_victim_opens_nothing(trap, guarded, maker, victim, marker: Marker):
    client, door, stranger, (number, listens) = trap
    stranger(set_trap, number, listens)
    with guarded(client):
        opening = client.begin(open_client, "objects", door)
        stranger(hear_victim)
        stranger(answer_with_pair, *map(Fd, maker.channel_pair), marker.bytes)
        with pytest.raises(AccessError, match=f"made by pid {maker.pid}, uid {victim}"):
            opening()


def answer_with_pair(p0: int, p1: int, bomb: bytes) -> None:
    os.write(p0, byhand.frame_bytes("R", 1, bomb))
    byhand.send(here.k1, byhand.answer_bytes(), [p1], byhand.own_ids())
    os.close(p1)


def have_no_pidfds() -> None:
    """Be as on a kernel before 6.5, where the numbers must do."""
    _opening.same_process = lambda *_: True


@pytest.mark.ids("B17", "B19")
def test_the_numbers_alone_tell_a_relayer(serving, trap, actor, guarded, victim, path, marker: Marker):
    """Only a message that carries the socket is believed, so pid, uid and gid are enough for that."""
    client, door, stranger, (number, listens) = trap
    server, canary = serving(victim, "objects")
    maker = actor(victim)
    k0, k1 = maker(make_pair)
    for one in (server, client):
        one(have_no_pidfds)
    with guarded(client, server, canary=canary):
        answered = stranger.begin(knock_with_pair, path, Fd(k0), Fd(k1), marker.bytes)
        os.close(k0)
        os.close(k1)
        assert answered() == b""
        stranger(set_trap, number, listens)
        opening = client.begin(open_client, "objects", door)
        stranger(hear_victim)
        p0, p1 = maker(make_pair, byhand.channel_pair)
        stranger(answer_with_pair, Fd(p0), Fd(p1), marker.bytes)
        os.close(p0)
        os.close(p1)
        with pytest.raises(AccessError, match=f"made by pid {maker.pid}, uid {victim}"):
            opening()


# -- a real set-uid program ------------------------------------------------------------------------

WRITER = r"""
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Writes the second argument, in hex, to the descriptor that is the first; with a third
   one it raises its real uid before, as programs with setuid(0) do. */
int main(int argc, char **argv)
{
    unsigned char data[65536];
    size_t size = strlen(argv[2]) / 2, i;
    char byte[3] = {0};
    if (argc > 3 && setreuid(geteuid(), geteuid()) != 0)
        return 3;
    for (i = 0; i < size; i++) {
        memcpy(byte, argv[2] + 2 * i, 2);
        data[i] = strtoul(byte, NULL, 16);
    }
    return write(atoi(argv[1]), data, size) == (ssize_t)size ? 0 : 4;
}
"""


@pytest.fixture
def setuid_writer(root_only, victim, place: Path, actor) -> str:
    """The program, owned by the victim, with the set-uid bit."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a set-uid program with")
    source, program = place / "writer.c", place / "writer"
    source.write_text(WRITER)
    subprocess.run([compiler, "-o", program, source], check=True, capture_output=True)
    os.chown(program, victim, victim)
    program.chmod(0o4755)
    one, other = byhand.pair()
    with one, other:
        actor(M)(run_writer, str(program), Fd(one.fileno()), b"who am I?", True)
        if byhand.receive(other).ids[1] != victim:
            pytest.skip("the file system of the temporary directory ignores the set-uid bit")
    return str(program)


def run_writer(program: str, number: int, data: bytes, raising: bool) -> int:
    arguments = [program, str(number), data.hex(), *(["raise"] if raising else [])]
    try:
        return subprocess.run(arguments, pass_fds=[number], check=True).returncode
    finally:
        os.close(number)


@pytest.mark.ids("B19")
@pytest.mark.parametrize("raising", [False, True], ids=["as its caller", "with its real uid raised"])
def test_a_set_uid_program_is_not_believed(
    actor, serving, guarded, setuid_writer, victim, raising, path, marker: Marker
):
    """At a server's door, in answer to a client's knock, and on the stranger's own copy of it."""
    server, canary = serving(victim, "objects")
    stranger, client = actor(M), actor(victim)
    holder, port = byhand.door_pair()
    with holder, port:
        with guarded(server, client, canary=canary):
            for words in (byhand.knock_bytes(), byhand.frame_bytes("Q", 1, marker.bytes), marker.bytes):
                door = stranger(give_door, path)
                stranger(run_writer, setuid_writer, Fd(door), words, raising)
                os.close(door)
            assert stranger(knock_at_kept_door)[0] == byhand.DENIED
            stranger(set_trap, Fd(port.fileno()), False)
            opening = client.begin(open_passed, Fd(holder.fileno()))
            stranger(hear_victim)
            k1 = stranger(start_answer, b"", socket_too=False)
            answer = byhand.answer_bytes() + byhand.frame_bytes("R", 1, marker.bytes)
            stranger(run_writer, setuid_writer, Fd(k1), answer, raising)
            os.close(k1)
            with pytest.raises((AccessError, ProtocolError)):
                opening()


@pytest.mark.ids("B22", "K2")
@pytest.mark.parametrize("raising", [False, True], ids=["as its caller", "with its real uid raised"])
def test_a_set_uid_program_calls_for_nobody(actor, setuid_writer, victim, raising, path):
    """A valid call of plain data, which it writes on a channel that a stranger has opened honestly."""
    server, stranger, canary = actor(victim), actor(M), actor(victim)
    server(serve_data, path)
    canary(open_client, "objects", path)
    stranger(open_client, "objects", path, server={victim})
    assert stranger(call, "mine") == "mine"
    number = stranger(next_number)
    end = stranger(give_client_end)
    frame = byhand.frame_bytes("Q", number, msgspec.msgpack.encode([["forged"], {}]))
    try:
        stranger(run_writer, setuid_writer, Fd(end), frame, raising)
    finally:
        os.close(end)
    assert canary(call, "tweet") == "tweet"
    with pytest.raises(DoorError):
        stranger(call, "on the same channel")
    assert stranger(call, "on a new one") == "on a new one"
    heard = [(ids[1], value) for ids, value in server(seen)]
    assert heard == [(M, "mine"), (victim, "tweet"), (M, "on a new one")]


def serve_data(path: str) -> None:
    here.seen = []
    here.layer = "objects"
    here.server = Server()
    here.endpoint = here.server.attach(note, path, mode=0o666, codec="data")
    here.server.start()


def note(value: Any) -> Any:
    caller = current_call().caller
    here.seen.append(((caller.pid, caller.uid, caller.gid, caller.groups), value))
    here.callers = [*getattr(here, "callers", []), caller]
    return value


def open_passed(number: int) -> Any:
    return open_client("objects", number)


# -- reused pids -----------------------------------------------------------------------------------


@pytest.fixture
def own_pids(namespaces, actor) -> Actor:
    """An actor, root, in a pid namespace where it can say which pid comes next."""
    one = actor(0)
    one(enter_pid_namespace)
    try:
        one(choose_next_pid, 100)
    except OSError as error:
        pytest.skip(f"the next pid cannot be chosen here: {error}")
    return one


def choose_next_pid(pid: int) -> None:
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))


def in_child(function: Any, *args: Any) -> tuple[int, int]:
    """Run a function in a forked child; return its pid and its code."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = function(*args)
        finally:
            os._exit(code)
    return pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.ids("B09", "K9")
def test_a_reused_pid_is_not_the_callers_process(own_pids, path):
    """A caller has gone, and another process has its number: the credentials do not lead to that one."""
    own_pids(serve_data, path)
    assert own_pids(look_for_callers, path) == [
        "nobody has it",
        "it has been given to another process since",
    ]


def look_for_callers(path: str) -> list[str]:
    """Have a child call and end; look for it when its pid is free, and when another has it."""
    pid, code = in_child(call_and_end, path)
    assert code == 0
    (caller,) = here.callers
    assert caller.pid == pid
    said = []
    with pytest.raises(ProcessLookupError) as caught:
        caller.pidfd()
    said.append("nobody has it" if "given" not in str(caught.value) else str(caught.value))
    choose_next_pid(pid)
    reading, writing = os.pipe()
    other = os.fork()
    if other == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        assert other == pid
        with pytest.raises(ProcessLookupError) as caught:
            caller.pidfd()
        said.append(str(caught.value).partition(f"pid {pid} ")[2].replace("has been", "it has been"))
    finally:
        os.close(reading)
        os.close(writing)
        os.waitpid(other, 0)
    return said


def call_and_end(path: str) -> int:
    open_client("objects", path)
    call("from a child")
    return 0


@pytest.mark.ids("B19", "K9")
def test_a_reused_pid_does_not_make_a_dead_makers_pair_good(own_pids, layer, path, marker: Marker):
    """
    The sender of the knock has the pid, uid and gid of the process that made the socket, and is another.
    """
    own_pids(serve, layer, path)
    before = own_pids(counts)
    assert own_pids(reuse_pid, path) == 0, "it was answered"
    assert own_pids(counts) == before
    assert any("made the socket" in line for line in own_pids(logged))


def reuse_pid(path: str) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        maker, code = in_child(send_pair, theirs)
        assert code == 0
        message = byhand.receive(ours)
        assert os.getpid() == 1
        choose_next_pid(maker)
        imposter, code = in_child(knock_as, path, maker, *message.fds)
        message.close()
        assert imposter == maker
        return code


def send_pair(out: socket.socket) -> int:
    one, other = byhand.pair()
    byhand.send(out, b"pair", [one.fileno(), other.fileno()])
    return 0


def knock_as(path: str, pid: int, k0: int, k1: int) -> int:
    assert os.getpid() == pid
    return 0 if knock_with_pair(path, k0, k1, b"") == b"" else 1


@pytest.mark.ids("K9")
def test_a_caller_whose_pid_is_used_again_is_gone(own_pids, path):
    """The server watches the process and not the number, though a copy of the channel lives on."""
    own_pids(serve_stubborn, path)
    assert own_pids(die_in_a_call, path) == (True, True)


def serve_stubborn(path: str) -> None:
    from doorpool.door import Door, Gate

    here.gate = Gate()
    here.door = Door(here.gate)
    here.door.listen(path)
    here.invocation = None
    here.came = threading.Event()

    def work() -> None:
        here.invocation = here.gate.wait()
        here.came.set()

    threading.Thread(target=work, daemon=True).start()


def die_in_a_call(path: str) -> tuple[bool, bool]:
    """Have a child call and die, and another get its pid; was it gone, before and after that?"""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            with byhand.reach(path) as door:
                channel, _ = byhand.dial(door)
                byhand.send(channel, byhand.frame_bytes("Q", 1, b"wait"))
                byhand.send(theirs, b"copy", [channel.fileno()])
                signal.pause()
        copy = byhand.receive(ours)
        assert here.came.wait(byhand.PATIENCE)
        assert not here.invocation.cancelled
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        before = here.invocation.cancelled
        choose_next_pid(pid)
        child = os.fork()
        if child == 0:
            signal.pause()
        assert child == pid
        after = here.invocation.cancelled
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        copy.close()
        here.invocation.reply(b"")
        return before, after
