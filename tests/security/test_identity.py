"""
Who calls and who answers: what each side is told is the kernel's word about the nearest process.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from support import become, byhand
from support.actors import Actor, Fd, here, logged
from support.strangers import frames_with, knock_and_push
from support.victims import call, give_server_end, open_client, seen, serve

from doorpool import Endpoint, Proxy, Server, anyone, current_call
from doorpool._credentials import MOST_GROUPS
from doorpool._errors import AccessError, BrokenDoorError

V, M, FRIEND = 4201, 6602, 4203

HIGH = [2**31, 4_000_000_000]


# -- the caller (K1 - K5) --------------------------------------------------------------------------


@pytest.mark.ids("K1")
@pytest.mark.parametrize("groups", [(), (7, 70_000), tuple(range(1000, 1300))], ids=["none", "two", "300"])
def test_a_caller_is_known_by_pid_uid_gid_and_groups(actor, come_by, layer, way, groups, path):
    server = actor(V, gid=5150)
    server(serve, layer, path)
    client, door = come_by(way, V, server, gid=5150, groups=groups)
    client(open_client, layer, door)
    client(call, "it is me")
    ((pid, uid, gid, known), value) = server(seen)[-1]
    assert (pid, uid, gid, value) == (client.pid, V, 5150, "it is me")
    assert sorted(known) == sorted(groups)


@pytest.mark.ids("K1", "B24")
def test_the_same_user_in_another_group_has_to_be_let_in(actor, layer, path):
    """They may not trace each other, so the kernel does not tell where they are: trust="uid" is for them."""
    server, client = actor(V), actor(V, gid=5150)
    server(serve, layer, path)
    with pytest.raises(AccessError, match='trust="uid"'):
        client(open_client, layer, path)
    server(serve, layer, path + ".2", trust="uid")
    client(open_client, layer, path + ".2", trust="uid")
    client(call, "let in")
    assert server(seen)[-1][0][:3] == (client.pid, V, 5150)


@pytest.mark.ids("K2", "N11")
def test_a_forked_child_that_calls_is_itself(actor, layer, way, path):
    """It opens a channel of its own, through the descriptor that it inherited."""
    server = actor(V)
    server(serve, layer, path)
    client = actor(V)
    client(open_client, layer, path if way == "path" else _number(server, client, way))
    client(call, "parent")
    child = client(call_in_child, "child")
    assert [(ids[0], value) for ids, value in server(seen)] == [(client.pid, "parent"), (child, "child")]


def _number(server: Actor, client: Actor, way: str) -> int:
    from support.actors import keep
    from support.victims import open_descriptor

    number = server(open_descriptor)
    try:
        return client(keep, Fd(number))
    finally:
        os.close(number)


def call_in_child(value: Any) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if call(value) == value else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    return pid


@pytest.mark.ids("K2", "B01")
def test_a_forked_child_of_another_user_is_refused(actor, layer, path):
    """A root client forks a worker that gives root up; the parent goes on."""
    server, client = actor(0), actor(0)
    server(serve, layer, path)
    client(open_client, layer, path)
    assert client(call_as_another, "worker") == "AccessError"
    assert client(call, "parent") == "parent"
    assert [value for _, value in server(seen)] == ["parent"]


def call_as_another(value: Any) -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become(M)
            call(value)
        except BaseException as error:
            os.write(writer, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 100).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    return told


@pytest.mark.ids("K3", "B15")
def test_the_nearest_caller_is_the_one_that_is_known(actor, path):
    """A procedure that calls on hides its own caller: it is the one who asks."""
    back, front, client = actor(V), actor(V), actor(V)
    back(serve, "objects", path)
    front(serve_front, path, path + ".front")
    client(open_client, "objects", path + ".front")
    assert client(call, "from afar") == ("front", client.pid, "from afar")
    ((pid, *_), value) = back(seen)[-1]
    assert (pid, value) == (front.pid, "from afar")


def serve_front(back: str, path: str) -> None:
    here.back = Proxy(back)

    def front(value: Any) -> Any:
        before = current_call().caller
        value = here.back(value)
        assert current_call().caller == before  # a nested call changes nothing
        return "front", before.pid, value

    here.server = Server()
    here.server.attach(front, path)
    here.server.start()


@pytest.mark.ids("K4", "B15")
def test_outside_a_call_there_is_no_caller(door_dir):
    """Not before, not after, not in a thread that the procedure starts, and never "oneself"."""
    asked: list[Any] = []

    def ask() -> None:
        try:
            asked.append(current_call())
        except RuntimeError as error:
            asked.append(str(error))

    def procedure() -> int | None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return current_call().caller.pid

    server = Server()
    server.attach(procedure, door_dir / "a.door")
    with server, Proxy(door_dir / "a.door") as proxy:
        ask()
        assert proxy() == os.getpid()
        ask()
    assert len(asked) == 3
    assert all(isinstance(answer, str) and "no call" in answer for answer in asked)


# -- large uids (B04) ------------------------------------------------------------------------------


@pytest.mark.ids("B04", "K1")
@pytest.mark.parametrize("uid", HIGH)
def test_a_large_uid_is_that_number(actor, come_by, layer, way, uid, path):
    server = actor(uid)
    server(serve, layer, path)
    client, door = come_by(way, uid, server)
    assert client(open_client, layer, door)[1:3] == (uid, uid)
    assert client(call, "large") == "large"
    assert server(seen)[-1][0][:3] == (client.pid, uid, uid)


@pytest.mark.ids("B04", "B01")
@pytest.mark.parametrize(
    ("uid", "other"), [(uid, other) for uid in HIGH for other in (*HIGH, 2**32 - 2, 0, V) if other != uid]
)
def test_a_large_uid_is_no_other(actor, guarded, layer, uid, other, path, marker):
    server, stranger = actor(uid), actor(other)
    server(serve, layer, path)
    with guarded(server, stranger):
        with pytest.raises(AccessError) as caught:
            stranger(open_client, layer, path)
        reason, text = stranger(knock_and_push, path, frames_with(marker.bytes))
        assert reason == byhand.DENIED
    for told in (str(caught.value), text):
        assert str(uid) in told
        assert str(other) in told
        assert "-" not in told.replace(path, "")


# -- the server (B20, K8) --------------------------------------------------------------------------


@pytest.mark.ids("B20", "K8", "I1")
@pytest.mark.parametrize("uid", [0, V], ids=["root", "user"])
def test_a_client_knows_its_server(actor, come_by, layer, way, uid, path):
    server = actor(uid, groups=(11, 12)) if uid else actor(0)
    server(serve, layer, path)
    client, door = come_by(way, uid, server)
    pid, found, gid, groups = client(open_client, layer, door)
    assert (pid, found, gid) == (server.pid, uid, uid)
    assert groups is not None
    if uid:
        assert sorted(groups) == [11, 12]


@pytest.mark.ids("B20", "K8")
@pytest.mark.parametrize("count", [256, 257, MOST_GROUPS, MOST_GROUPS + 1])
def test_so_many_groups_are_told_and_no_more(actor, path, count):
    """More than any person has; a user of sub-gids may have 65,536, and each channel would keep them."""
    groups = tuple(range(100_000, 100_000 + count))
    server, client = actor(V, groups=groups), actor(V, groups=groups)
    server(serve, "raw", path)
    told = groups if count <= MOST_GROUPS else None
    assert client(open_client, "raw", path) == (server.pid, V, V, told)
    client(call, b"hello")
    ((caller, _),) = server(seen)
    assert caller == (client.pid, V, V, told)


@pytest.mark.ids("B20", "K8")
def test_a_client_of_another_user_knows_its_server(actor, come_by, way, path):
    """Across uids only bytes are spoken; who speaks them is known all the same, at both ends."""
    server = actor(V)
    server(serve, "raw", path, codec="RAW")
    client, door = come_by(way, FRIEND, server)
    with pytest.raises(AccessError, match=f"believed are the uids .*0, {FRIEND}"):
        client(open_client, "raw", door)
    assert client(open_client, "raw", door, server={V})[:3] == (server.pid, V, V)
    assert client(call, b"bytes") == b"bytes"
    assert server(seen)[-1][0][:3] == (client.pid, FRIEND, FRIEND)


@pytest.mark.ids("B20", "K8")
def test_a_file_of_one_user_at_which_another_answers_is_not_believed(actor, path):
    """Root has given the name away, or has been given one: whose door it is, nobody can say."""
    server, client = actor(V), actor(0)
    server(serve, "raw", path, codec="RAW")
    assert client(open_client, "raw", path, server={V})[:3] == (server.pid, V, V)
    os.chown(path, FRIEND, -1)
    with pytest.raises(AccessError, match=f"its file belongs to uid {FRIEND}, and uid {V} answers"):
        client(open_client, "raw", path, server={V})


@pytest.mark.ids("B20", "K8")
def test_a_listener_of_roots_served_by_a_user_is_the_users(actor, layer, path):
    """Root makes the name and the listener, then gives root up; what counts is who answers."""
    server, client, other = actor(0), actor(V), actor(FRIEND)
    server(serve, layer, path)
    server(become, V)
    assert client(open_client, layer, path)[:3] == (server.pid, V, V)
    assert client(call, "given up") == "given up"
    for one in (other, actor(0)):
        with pytest.raises(AccessError):
            one(open_client, layer, path)
    assert {ids[1] for ids, _ in server(seen)} == {V}


@pytest.mark.ids("B20", "I1", "I7")
@pytest.mark.parametrize("held", [False, True], ids=["alone", "with a copy of its end"])
def test_the_death_of_the_server_is_seen(actor, come_by, way, held, path):
    """
    The client watches the server's process: a copy of its end somewhere hides the hang-up.
    """
    server = actor(V)
    server(serve_forever, path)
    client, door = come_by(way, V, server)
    client(open_client, "objects", door)
    calling = client.begin(call, "wait")
    server(came)
    copy = server(give_server_end) if held else None
    try:
        assert client.acting
        server.kill()
        with pytest.raises(BrokenDoorError) as caught:
            calling(5.0)
        assert caught.value.may_have_run
        assert client(alive) is False
    finally:
        if copy is not None:
            os.close(copy)


def serve_forever(path: str) -> None:
    """Serve a procedure that never comes back."""
    here.came, never = threading.Event(), threading.Event()

    def procedure(value: Any) -> None:
        here.came.set()
        never.wait()

    here.layer = "objects"
    here.server = Server()
    here.endpoint = here.server.attach(Endpoint(procedure), path)
    here.server.start()


def came() -> None:
    assert here.came.wait(byhand.PATIENCE)


def alive() -> bool:
    return bool(here.client.alive)


# -- many users, one thread (B15) ------------------------------------------------------------------


def serve_whoever_by_one_thread(path: str) -> None:
    """Serve everybody from one thread: who has called, what thread of ours it was, and what was sent."""

    def whoever(value: Any) -> Any:
        caller = current_call().caller
        return [caller.pid, caller.uid, caller.gid, threading.get_ident(), value]

    here.server = Server(max_threads=1)
    here.server.attach(whoever, path, codec="data", callers=anyone, mode=0o666)
    here.server.start()


@pytest.mark.ids("B15", "K1")
def test_of_eight_users_who_take_turns_at_one_thread_each_is_himself(actor, path):
    server = actor(V)
    server(serve_whoever_by_one_thread, path)
    clients = {M + number: actor(M + number) for number in range(8)}
    for client in clients.values():
        client(open_client, "objects", path, server={V})
    threads = set()
    for turn in range(3):
        for uid, client in clients.items():
            *ids, thread, said = client(call, turn)
            assert (ids, said) == ([client.pid, uid, uid], turn)
            threads.add(thread)
    assert len(threads) == 1


# -- what a caller says of himself (B14, B08) ------------------------------------------------------


def knock_as(path: str, uid: int) -> bytes:
    """Knock with a socket of one's own and credentials that name another user; return what comes back."""
    with byhand.reach(path) as door:
        ours, theirs = byhand.pair()
        with ours, theirs:
            byhand.send(door, byhand.knock_bytes(), [theirs.fileno()], (os.getpid(), uid, uid))
            theirs.close()
            answer = byhand.receive(ours)
            answer.close()
            return answer.data


@pytest.mark.ids("B14")
def test_a_user_cannot_name_himself_another(actor, serving, guarded, layer, victim, path):
    """The kernel lets nobody but root do it."""
    server, canary = serving(victim, layer)
    stranger = actor(M)
    with guarded(server, canary=canary):
        for uid in (victim, 0, FRIEND):
            with pytest.raises(PermissionError):
                stranger(knock_as, path, uid)


@pytest.mark.ids("B14")
def test_root_may_name_himself_another_and_is_refused(actor, serving, guarded, layer, path):
    """The maker of a knock's socket, whom nobody can choose, is not whom the knock names."""
    server, canary = serving(V, layer)
    with guarded(server, canary=canary):
        liar = actor(0)
        assert liar(knock_as, path, V) == b"", "nobody is told anything that way"
    (line,) = [line for line in server(logged) if f"pid {liar.pid}" in line]
    assert f"sent by pid {liar.pid}, uid {V}, gid {V} with a socket made by pid {liar.pid}, uid 0" in line


LURID = ";uid=0;\n\x1b[31mroot"


def knock_by_name(path: str, name: str) -> tuple[int, str] | None:
    """Knock by a socket that bears a name; return the refusal."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(name)
        door.connect(path)
        with byhand.knock(door) as ours:
            return byhand.refusal_in(byhand.receive(ours).data)


@pytest.mark.ids("B08")
@pytest.mark.parametrize("abstract", [False, True])
def test_the_name_of_a_callers_socket_says_nothing(
    actor, serving, guarded, layer, victim, abstract, place: Path
):
    """It says that he is root, in red, on a line of its own; he is refused by his uid, on one line."""
    path = str(place / "a.door")
    server, canary = serving(victim, layer)
    stranger = actor(M)
    with guarded(server, canary=canary):
        refusal = stranger(knock_by_name, path, "\0" + LURID if abstract else f"{place}/{LURID}")
    assert refusal is not None
    assert refusal[0] == byhand.DENIED
    assert f"the other side's {M}" in refusal[1]
    lines = [line for line in server(logged) if str(M) in line]
    assert lines
    for line in [*lines, refusal[1]]:
        assert line.isprintable()
        assert "uid=0;" not in line


def knock_oddly(path: str) -> None:
    """Knock with words that no knock has, and that would look odd in a log."""
    with byhand.reach(path) as door, byhand.knock(door, LURID.encode()) as ours:
        with contextlib.suppress(OSError):
            byhand.receive(ours)


@pytest.mark.ids("B08")
def test_what_a_caller_says_reaches_no_log_as_it_is(actor, serving, guarded, layer, victim, path):
    server, canary = serving(victim, layer)
    with guarded(server, canary=canary):
        actor(M)(knock_oddly, path)
    lines = server(logged)
    assert any(f"uid={M}" in line for line in lines)
    assert all(line.isprintable() for line in lines)
