"""
Doors for callers of other users: plain data, rules about who may call, and what strangers are told.
"""

from __future__ import annotations

import dataclasses
import enum
import fcntl
import io
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support import become, byhand, enter_pid_namespace, rawpeer
from support.actors import Fd, counts, here, logged
from support.marker import Marker
from support.strangers import frames_with, overheard, pose_as_door
from support.victims import (
    call,
    give_client_end,
    give_server_end,
    next_number,
    open_client,
    raw_handle,
    seen,
)

from doorpool import Credentials, Descriptor, Group, LimitError, Proxy, Server, anyone, current_call
from doorpool._errors import AccessError, DoorError, MarshalError, ProtocolError

V, M, FRIEND, STAFF = 4201, 6602, 4203, 5150

DATA = 2


# -- a data door, and what it does ---------------------------------------------------------------------


class Told(Exception):
    pass


class TooldToo(Told):
    pass


def echo(value: Any) -> Any:
    caller = current_call().caller
    noted = value if len(repr(value)) < 1000 else len(value)  # what is seen has to fit into a letter
    here.seen.append(((caller.pid, caller.uid, caller.gid, caller.groups), noted))
    return value


def whoever(value: Any) -> Any:
    """Say who is calling, as far as that is known."""
    caller = current_call().caller
    return [caller.pid, caller.uid, caller.gid, value]


def fail(how: str) -> None:
    raise {
        "value": ValueError("the value"),
        "own": Told("the text"),
        "sub": TooldToo("the other text"),
        "system": FileNotFoundError(2, "No such file or directory", "/srv/secret"),
        "mine": PermissionError("you may not"),
        "exit": SystemExit("the reason"),
    }[how]


class Odd(ValueError):
    pass


class Paint(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Wish:
    """Something whose own code fails, while it is read or written."""

    how: str
    paint: Paint = Paint.RED

    def __post_init__(self) -> None:
        if self.how == "odd":
            raise Odd("of hunter2")
        if self.how == "quoted":
            raise ValueError("the value", self)
        if self.how == "enum":
            msgspec.convert("hunter2", Paint)
        if self.how != "fine":
            fail(self.how)


def grant(wish: Wish) -> str:
    return wish.how


def grant_all(wishes: dict[str, Iterable[Wish]]) -> str:
    return "".join(wish.how for each in wishes.values() for wish in each)


def wish_back(how: str) -> Wish:
    wish = Wish("fine")
    wish.how = how
    return wish


class Mailer:
    def __init__(self) -> None:
        self.password = "hunter2"

    def __repr__(self) -> str:
        return f"Mailer(password={self.password!r})"

    def __enter__(self) -> Mailer:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, to: str) -> bool:
        return True


def by_repr(how: str) -> Any:
    return {Mailer(): 1} if how == "key" else Mailer()


def serve_data(path: str | None, target: str = "echo", **options: Any) -> int:
    """Serve by plain data, from a file that is open to everybody."""
    here.seen = []
    here.layer = "objects"
    here.server = Server()
    rules = {"staff": [Group(STAFF)], "friend or staff": [FRIEND, Group(STAFF)], "anyone": anyone, **RULES}
    if isinstance(options.get("callers"), str):
        options["callers"] = rules[options["callers"]]
    if options.get("errors") == "told":
        options["errors"] = [Told]
    options = {"codec": "data", "mode": 0o666, **options}
    here.endpoint = here.server.attach(Mailer() if target == "Mailer" else globals()[target], path, **options)
    here.server.start()
    return os.getpid()


def call_long(size: int) -> bool:
    """Call ``echo`` with so many bytes; return whether they came back."""
    return bool(call("x" * size) == "x" * size)


def _only_friends(caller: Credentials) -> bool:
    here.asked = [*getattr(here, "asked", []), (caller.pid, caller.uid, caller.gid, caller.groups)]
    return caller.uid == FRIEND


def _broken(caller: Credentials) -> bool:
    raise LookupError("secret")


def _unknown(caller: Credentials) -> bool:
    return caller.uid is None


RULES = {
    "function": _only_friends,
    "broken": _broken,
    "unknown": _unknown,
    "not root": lambda it: it.uid != 0,
}


@pytest.mark.ids("N11", "K1", "B13", "B01", "B02")
def test_a_data_door_serves_another_user(actor, come_by, guarded, victim, way, path):
    """Both sides know who the other is, and neither unpickles anything."""
    server = actor(victim)
    server(serve_data, path)
    client, door = come_by(way, M, server, groups=(STAFF,))
    with guarded(server, client):
        rule = {victim} if victim else None  # root is believed, unless something else is said
        assert client(open_client, "objects", door, server=rule)[:2] == (server.pid, victim)
        assert client(call, {"a": [1, b"x", None]}) == {"a": [1, b"x", None]}
    ((pid, uid, gid, groups), value) = server(seen)[-1]
    assert (pid, uid, gid, value) == (client.pid, M, M, {"a": [1, b"x", None]})
    assert STAFF in groups


@pytest.mark.ids("B01", "B03")
def test_a_pickle_in_a_frame_of_data_is_no_data(actor, guarded, victim, path, marker: Marker):
    """From somebody who was let in, in each kind of frame, on channels that are honestly open."""
    server, canary, stranger = actor(victim), actor(victim), actor(M)
    server(serve_data, path)
    canary(open_client, "objects", path)
    with guarded(server):
        answers = stranger(push_into_channels, path, frames_with(marker.bytes))
        assert canary(call, "tweet") == "tweet"
    assert {answer[:1] for answer in answers} <= {b"R", b"A", b"G", b""}  # reply, pong, goodbye, nothing
    replies = [answer[len(byhand.frame_bytes("R", 1)) :] for answer in answers if answer[:1] == b"R"]
    assert {reply[:1] for reply in replies} <= {b"A"}, "something was made of it"
    assert {value for _, value in server(seen)} == {"tweet"}


def push_into_channels(door: str, frames: Sequence[bytes]) -> list[bytes]:
    """Write each frame into a channel of its own; return the first message that is answered."""
    heard = []
    for frame in frames:
        with byhand.reach(door) as sock:
            channel, _ = byhand.dial(sock)
            assert channel is not None
            with channel:
                byhand.send(channel, frame)
                channel.shutdown(socket.SHUT_WR)
                try:
                    heard.append(byhand.receive(channel).data)
                except ConnectionError:
                    heard.append(b"")
    return heard


@pytest.mark.ids("B02")
def test_a_data_door_of_another_user_has_to_be_believed_on_purpose(actor, guarded, victim, path):
    """The default is our own user and root, looked at before a byte of an argument leaves."""
    server, client = actor(M), actor(victim)
    server(serve_data, path)
    with guarded(client):
        with pytest.raises(AccessError, match=f"is not believed: its server is pid {server.pid}, uid {M}"):
            client(open_client, "objects", path)
        for rule in ({FRIEND}, [Group(STAFF)]):
            with pytest.raises(AccessError, match="is not believed"):
                client(open_client, "objects", path, server=rule)
        client(open_client, "objects", path, server={M})
        assert client(call, "to M") == "to M"
    assert [value for _, value in server(seen)] == ["to M"]


@pytest.mark.ids("B02")
@pytest.mark.parametrize("codec", [byhand.PICKLE, DATA], ids=["pickle", "data"])
@pytest.mark.parametrize("way", ["path", "passed"])
def test_whatever_rule_a_client_has_no_stranger_is_unpickled(
    actor, guarded, victim, codec, way, path, marker: Marker
):
    """``server=`` may believe M's data; his pickle is refused all the same, before anything is sent."""
    from support.strangers import false_descriptor

    stranger, client = actor(M), actor(victim)
    stranger(pose_as_door, path, codec, marker.bytes)
    number = stranger(false_descriptor)
    try:
        door = path if way == "path" else Fd(number)
        with guarded(client):
            for rule in ({M}, anyone):
                with pytest.raises(DoorError) as caught:
                    client(open_and_call, door, rule)
                expected = AccessError if codec == byhand.PICKLE else ProtocolError
                assert isinstance(caught.value, expected)
    finally:
        os.close(number)
    said, _ = stranger(overheard)
    assert codec == DATA or said == b""


def open_and_call(door: str | int, rule: Any) -> Any:
    if isinstance(door, int):
        door = os.dup(door)
    open_client("objects", door, server=rule)
    return call("secret")


@pytest.mark.ids("A06")
def test_a_squatted_path_gets_no_data(actor, guarded, victim, path):
    """Also where the client would speak data: what stands there is neither ours nor root's."""
    stranger, client = actor(M), actor(victim)
    stranger(pose_as_door, path, DATA, b"")
    with guarded(client), pytest.raises(AccessError, match=f"uid {M}"):
        client(open_client, "objects", path)
    assert stranger(overheard) == (b"", 0)


@pytest.mark.ids("A08", "A16")
@pytest.mark.parametrize("rule", [None, {V}, "anyone"])
def test_where_anybody_could_have_put_a_door_none_is_believed(actor, place: Path, rule):
    """Whoever is believed: that the name leads to him, others could have seen to."""
    server, client, stranger = actor(V), actor(M), actor(FRIEND)
    options = {} if rule is None else {"server": anyone if rule == "anyone" else rule}
    server(serve_data, str(place / "a.door"), callers="anyone")
    stranger(os.symlink, str(place / "a.door"), str(place / "link.door"))
    stranger(os.symlink, str(place), str(place / "folder"))
    for path in ("link.door", "folder/a.door"):
        with pytest.raises(AccessError, match="symbolic link"):
            client(open_client, "objects", str(place / path), **options)
    place.chmod(0o777)
    with pytest.raises(AccessError, match="may be written by everybody and is not sticky"):
        client(open_client, "objects", str(place / "a.door"), **options)


# -- who may call --------------------------------------------------------------------------------------


ADMITTED = [
    pytest.param("anyone", M, M, (), id="anyone"),
    pytest.param(None, M, M, (), id="no rule"),
    pytest.param({V, M}, M, M, (), id="a set of uids"),
    pytest.param("staff", M, STAFF, (), id="a group, as the primary one"),
    pytest.param("staff", M, M, (7, STAFF), id="a group, as a supplementary one"),
    pytest.param("friend or staff", FRIEND, FRIEND, (), id="a uid among groups"),
    pytest.param("friend or staff", M, M, (STAFF,), id="a group among uids"),
    pytest.param("function", FRIEND, FRIEND, (STAFF,), id="a function"),
]

REFUSED = [
    pytest.param({V}, M, M, (), "a set of users", id="a set of uids"),
    pytest.param({V}, 0, 0, (), "they are the uids", id="root is not special"),
    pytest.param({M}, V, V, (), "they are the uids", id="nor is one's own user"),
    pytest.param("staff", M, M, (7,), "a set of users and groups", id="a group"),
    pytest.param("friend or staff", M, M, (), "a set of users and groups", id="uids and groups"),
    pytest.param("function", M, M, (), "a function", id="a function"),
    pytest.param("broken", M, M, (), "has failed", id="a function that raises"),
]


@pytest.mark.ids("K1", "K6")
@pytest.mark.parametrize(("rule", "uid", "gid", "groups"), ADMITTED)
def test_whom_the_rule_names_may_call(actor, come_by, way, rule, uid, gid, groups, path):
    server = actor(V)
    server(serve_data, path, callers=rule)
    client, door = come_by(way, uid, server, gid=gid, groups=groups)
    client(open_client, "objects", door, server={V})
    assert client(call, "let in") == "let in"
    assert server(seen)[-1][0][:3] == (client.pid, uid, gid)


@pytest.mark.ids("K6", "B25")
@pytest.mark.parametrize(("rule", "uid", "gid", "groups", "kind"), REFUSED)
def test_whom_it_does_not_name_is_refused(actor, come_by, way, rule, uid, gid, groups, kind, path):
    """He learns who he is and what kind of rule it was; the log has both of them and the rule."""
    server = actor(V)
    server(serve_data, path, callers=rule)
    client, door = come_by(way, uid, server, gid=gid, groups=groups)
    with pytest.raises(AccessError) as caught:
        client(open_client, "objects", door, server={V})
    told = str(caught.value).replace(path, "").replace(str(client.pid), "")
    assert kind in told
    assert caught.value.may_have_run is False
    if uid not in (0, V):
        assert not any(str(number) in told for number in (V, FRIEND, STAFF, server.pid))
        assert "secret" not in told
        assert kind == "has failed" or f"uid {uid}" in told
    (line,) = [line for line in server(logged) if f"pid={client.pid}" in line and "refused" in line]
    assert f"uid={uid}" in line
    if kind != "has failed":
        assert f"this server of uid {V}: they are" in line
    assert server(seen) == []


@pytest.mark.ids("B22", "K6")
def test_a_function_is_asked_once_about_who_opened_the_channel(actor, path):
    server, client = actor(V), actor(FRIEND, groups=(STAFF,))
    server(serve_data, path, callers="function")
    client(open_client, "objects", path, server={V})
    for _ in range(3):
        client(call, "again")
    assert server(asked) == [(client.pid, FRIEND, FRIEND, (STAFF,))]


def asked() -> Any:
    return here.asked


@pytest.mark.ids("K5", "B05", "F23")
@pytest.mark.parametrize("uid", [0, 2000, 65534], ids=["root", "another", "nobody"])
def test_whom_the_kernel_does_not_name_anyone_admits_alone(sandboxed, actor, uid, place: Path):
    """
    In a namespace that maps one uid only, all others are the overflow uid: no uid, in no set and no group.
    """
    server, client = sandboxed(1000, V), actor(uid)
    for name, rule in {
        "none": None, "sets": {0, uid, 65534, 1000}, "groups": [Group(0), Group(1000)],
        "any": "anyone", "unknown": "unknown", "guess": "not root",
    }.items():  # fmt: skip
        server(serve_data, str(place / name), "whoever", callers=rule)
    for name in ("none", "sets", "groups"):
        with pytest.raises(AccessError, match="refused by the server"):
            client(open_client, "objects", str(place / name), server=anyone)
    for name in ("any", "unknown", "guess"):
        client(open_client, "objects", str(place / name), server=anyone)
        pid, seen_uid, gid, value = client(call, "who am I?")
        assert (pid, seen_uid, gid, value) == (client.pid, None, None, "who am I?")


@pytest.mark.ids("K5", "B05", "K8")
@pytest.mark.parametrize("uid", [0, 2000, 65534], ids=["root", "another", "nobody"])
def test_a_server_whom_the_kernel_does_not_name_is_believed_by_anyone_alone(sandboxed, actor, uid, path):
    server, client = actor(uid), sandboxed(1000, V)
    server(serve_data, path, callers="anyone")
    for rule in (None, {0, uid, 65534}, [Group(0), Group(1000)]):
        with pytest.raises(AccessError, match=r"is not believed: its server is pid .*, uid None"):
            client(open_client, "objects", path, server=rule)
    client(open_client, "objects", path, server=anyone)
    assert client(call, "whoever you are") == "whoever you are"


@pytest.mark.ids("K5", "B10")
def test_a_caller_outside_our_pid_namespace_has_his_uid(namespaces, actor, path):
    server, client = actor(0), actor(M)
    server(enter_pid_namespace)
    server(become, V)
    server(serve_data, path, "whoever", callers={M})
    client(open_client, "objects", path, server={V})
    assert client(call, 1) == [None, M, M, 1]


@pytest.mark.ids("B24", "B01")
def test_a_sandboxed_process_of_our_own_user_may_speak_data(sandboxed, actor, guarded, path):
    """It may not look into ours, and pickle would let it out; data lets nothing out and shares no memory."""
    server, inside = actor(V), sandboxed(V, V)
    server(serve_data, path)
    with guarded(server, inside):
        inside(open_client, "objects", path)
        assert inside(call, "from the sandbox") == "from the sandbox"
        assert inside(shared) == (None, None)


@pytest.mark.ids("B01", "K6")
@pytest.mark.parametrize("rule", ["anyone", {M}, {M, V}, "staff", "function"])
@pytest.mark.parametrize("layer_of_stranger", ["proxy", "by hand"])
def test_callers_of_a_pickle_door_can_only_be_fewer(
    actor, guarded, rule, layer_of_stranger, path, marker: Marker
):
    """Whatever the rule says of a stranger: pickle is spoken with our own user."""
    from support.strangers import knock_and_push

    server, stranger = actor(V), actor(M, groups=(STAFF,))
    server(serve_data, path, codec="pickle", callers=rule)
    with guarded(server):
        if layer_of_stranger == "proxy":
            with pytest.raises(AccessError):
                stranger(open_client, "objects", path, server={V})
        else:
            assert stranger(knock_and_push, path, frames_with(marker.bytes))[0] == byhand.DENIED
    own = actor(V, groups=(STAFF,)) if rule == "staff" else actor(V)
    if rule in ("anyone", {M, V}):
        own(open_client, "objects", path)
        assert own(call, "ours") == "ours"
    elif rule != "staff":
        with pytest.raises(AccessError, match="is not among the callers"):
            own(open_client, "objects", path)


# -- an identity never changes (S9) --------------------------------------------------------------------


@pytest.mark.ids("B22", "K2")
@pytest.mark.parametrize("uid", [0, V, FRIEND, M], ids=["root", "the server's", "a friend", "his own"])
@pytest.mark.parametrize("got", ["inherited", "passed"])
def test_what_another_writes_on_a_channel_is_run_for_nobody(actor, uid, got, path):
    """
    A valid call, written by root even, on a channel that a stranger has opened: it ends the channel.
    """
    server, stranger = actor(V), actor(M)
    server(serve_data, path)
    stranger(open_client, "objects", path, server={V})
    assert stranger(call, "mine") == "mine"
    end = stranger(give_client_end)
    frame = byhand.frame_bytes("Q", stranger(next_number), msgspec.msgpack.encode([["forged"], {}]))
    try:
        if got == "inherited":
            deputy, number = actor(uid), end
        else:
            deputy, number = actor(uid), Fd(end)
        assert deputy(speak, number, frame)[:1] in (b"G", b"")
    finally:
        os.close(end)
    assert any("somebody else" in line for line in server(logged))
    assert [value for _, value in server(seen)] == ["mine"]
    assert stranger(call, "mine again") == "mine again"
    assert {ids[:2] for ids, _ in server(seen)} == {(stranger.pid, M)}


def speak(number: int, data: bytes) -> bytes:
    with socket.socket(fileno=number) as channel:
        byhand.send(channel, data)
        return byhand.read_all(channel)


@pytest.mark.ids("B22", "K2")
def test_who_becomes_another_calls_as_another(actor, path):
    """He gives up what he was: the channel of before ends, and on a new one the rule is asked anew."""
    server, client = actor(V), actor(0)
    server(serve_data, path, callers={0, FRIEND})
    client(open_client, "objects", path, server={V})
    assert client(call, "as root") == "as root"
    client(become, FRIEND)
    with pytest.raises(ProtocolError, match="somebody else than the one who opened it"):
        client(call, "as root?")
    assert client(call, "as a friend") == "as a friend"
    client_of_m = actor(0)
    client_of_m(open_client, "objects", path, server={V})
    client_of_m(become, M)
    for _ in range(2):
        with pytest.raises(DoorError):
            client_of_m(call, "as a stranger")
    assert [(ids[1], value) for ids, value in server(seen)] == [(0, "as root"), (FRIEND, "as a friend")]


@pytest.mark.ids("B02", "K8")
def test_a_reply_that_another_writes_is_no_reply(actor, path):
    server, client = actor(V), actor(M)
    server(serve_data, path)
    client(open_client, "objects", path, server={V})
    assert client(call, "hello") == "hello"
    end = server(give_server_end)
    try:
        frame = byhand.frame_bytes("R", client(next_number), b"V" + msgspec.msgpack.encode("forged"))
        actor(0)(speak_only, Fd(end), frame)
    finally:
        os.close(end)
    with pytest.raises(ProtocolError, match="somebody else"):
        client(call, "hello")
    assert client(call, "anew") == "anew"


def speak_only(number: int, data: bytes) -> None:
    with socket.socket(fileno=number) as channel:
        byhand.send(channel, data)


@pytest.mark.ids("B21")
@pytest.mark.parametrize("ids", [(0, M, 0), (V, M, M), (M, M, 0)], ids=["a guise", "set-uid", "a way back"])
@pytest.mark.parametrize("target", ["client", "server"])
def test_who_has_borrowed_ids_may_speak_data(actor, ids, target, path):
    """Pickle is refused to such a process; by data it speaks as who it is in effect, in every message."""
    borrower, other = actor(0), actor(M)
    if target == "client":
        other(serve_data, path, callers={M})
        borrower(os.setresuid, *ids)
        borrower(open_client, "objects", path)
        assert borrower(call, "as M") == "as M"
        assert borrower(call_long, 300_000)
        assert {who[:2] for who, _ in other(seen)} == {(borrower.pid, M)}
    else:
        borrower(os.setresuid, *ids)
        borrower(serve_data, path, callers={M})
        assert other(open_client, "objects", path)[:2] == (borrower.pid, M)
        assert other(call_long, 300_000)


# -- reopening (S17) -----------------------------------------------------------------------------------


@pytest.mark.ids("A21")
def test_a_data_door_is_never_reopened_as_a_pickle_door(actor, guarded, path):
    """Root's data door, then pickle of the client's own user, a stranger's data, root's again."""
    root, own, stranger, client = actor(0), actor(V), actor(M), actor(V)
    root(serve_data, path)
    client(open_client, "objects", path)
    assert client(call, 1) == 1
    turns = [
        (own, {"codec": "pickle"}, "is a pickle door and not a data one"),
        (own, {}, f"is served by uid {V} .* was opened with uid 0"),
        (stranger, {}, f"uid {M}"),
        (root, {"codec": "pickle"}, "pickle"),
    ]
    with guarded(client):
        for server, options, said in turns:
            root(stop_serving)
            server(serve_data, path, **options)
            for _ in range(2):
                with pytest.raises(DoorError) as caught:
                    client(call, "secret")
                assert caught.value.may_have_run is False
                assert isinstance(caught.value.__cause__, DoorError)
                assert_matches(said, str(caught.value.__cause__))
            assert server(seen) == []
            server(stop_serving)
        root(serve_data, path)
        assert client(call, 2) == 2


def assert_matches(pattern: str, text: str) -> None:
    import re

    assert re.search(pattern, text), text


def stop_serving() -> None:
    here.server.close()


@pytest.mark.ids("A21")
def test_a_rule_that_believes_several_users_believes_one_at_a_door(actor, path):
    """Reopening leads to the user that was believed at first, whatever else the rule would allow."""
    first, second, client = actor(V), actor(FRIEND), actor(M)
    first(serve_data, path)
    client(open_client, "objects", path, server={V, FRIEND})
    assert client(call, 1) == 1
    first(stop_serving)
    second(serve_data, path)
    with pytest.raises(DoorError) as caught:
        client(call, 2)
    assert f"uid {FRIEND}" in str(caught.value.__cause__)
    assert second(seen) == []


@pytest.mark.ids("A21", "B02")
def test_one_descriptor_is_served_by_one_user(actor, place: Path):
    """Two users who serve one port in turn: the second one gets no call of who believed the first."""
    holder, port = byhand.door_pair(byhand.greeting_bytes(DATA))
    with holder, port:
        first, second, client = actor(V), actor(FRIEND), actor(M)
        number = client(hold, Fd(holder.fileno()))
        opening = client.begin(open_client, "objects", number, server={V, FRIEND})
        first(answer_one, Fd(port.fileno()))
        opening()
        first.kill()
        calling = client.begin(call, "secret", timeout=5)
        second(answer_one, Fd(port.fileno()))
        with pytest.raises(DoorError) as caught:
            calling()
        assert isinstance(caught.value, AccessError)
        assert f"uid {FRIEND} answers now, and uid {V} did before" in str(caught.value)
        assert second(what_came) == b""


def hold(number: int) -> int:
    return number


def answer_one(number: int) -> None:
    with socket.socket(fileno=number) as port:
        theirs, _ = byhand.hear(port)
        with theirs:
            here.channel = byhand.admit(theirs, DATA)


def what_came() -> bytes:
    return byhand.read_all(here.channel)


# -- errors (S20) --------------------------------------------------------------------------------------


def outcome(how: str) -> tuple[str, str, bool]:
    """Call ``fail``; return the type of what arrives, its text, and whether it has a remote traceback."""
    try:
        call(how)
    except Exception as error:
        return type(error).__name__, str(error), error.__cause__ is not None
    return "nothing", "", False


@pytest.mark.ids("B25")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {},
            {
                "value": ("ValueError", "the value"),
                "own": ("RemoteError", "test_other_users.Told"),
                "sub": ("RemoteError", "test_other_users.TooldToo"),
                "system": ("FileNotFoundError", "No such file or directory"),
                "mine": ("PermissionError", "you may not"),
                "exit": ("RemoteError", "SystemExit"),
            },
        ),
        (
            {"errors": "told"},
            {
                "value": ("ValueError", ""),
                "own": ("RemoteError", "test_other_users.Told: the text"),
                "sub": ("RemoteError", "test_other_users.TooldToo: the other text"),
                "system": ("FileNotFoundError", ""),
                "mine": ("PermissionError", ""),
                "exit": ("RemoteError", "SystemExit"),
            },
        ),
        ({"errors": ()}, {"value": ("ValueError", ""), "own": ("RemoteError", "test_other_users.Told")}),
        (
            {"tracebacks": True},
            {
                "value": ("ValueError", "the value"),
                "own": ("RemoteError", "test_other_users.Told: the text"),
                "exit": ("RemoteError", "SystemExit: the reason"),
            },
        ),
    ],
    ids=["by default", "declared", "none", "tracebacks"],
)
def test_what_strangers_are_told_of_errors(actor, path, options, expected):
    server, stranger, friend = actor(V), actor(M), actor(V)
    server(serve_data, path, "fail", **options)
    stranger(open_client, "objects", path, server={V})
    friend(open_client, "objects", path)
    for how, (kind, text) in expected.items():
        name, told, traced = stranger(outcome, how)
        assert (name, traced) == (kind, "tracebacks" in options)
        assert told == text or told.endswith(f".{text}")
    assert friend(outcome, "system")[1].endswith("'/srv/secret'")
    assert friend(outcome, "own")[1].endswith("Told: the text")


def refused(*args: Any) -> str:
    """Return what is said of a call that is refused."""
    try:
        return f"it was not: {call(*args)!r}"
    except MarshalError as error:
        return str(error)


#: What a type's own code raises, what our own user is told of it, and what strangers are: by default, and
#: with ``errors=[Told]``.
OF_TYPES = {
    "value": ("the value", "ValueError: the value", "ValueError"),
    "quoted": ("('the value', Wish(", "ValueError: the value", "ValueError"),
    "odd": ("of hunter2", "test_other_users.Odd", "test_other_users.Odd"),
    "own": (".Told: the text", "test_other_users.Told", "test_other_users.Told: the text"),
    "system": ("'/srv/secret'", "FileNotFoundError: No such file or directory", "FileNotFoundError"),
    "enum": ("'hunter2'", "msgspec.ValidationError", "msgspec.ValidationError"),
    "exit": ("SystemExit: the reason", "SystemExit", "SystemExit"),
}


@pytest.mark.ids("B25")
@pytest.mark.parametrize(
    "options", [{}, {"errors": "told"}, {"tracebacks": True}], ids=lambda it: "".join(it)
)
def test_what_strangers_are_told_of_errors_in_types(actor, path, options):
    """What reads arguments runs code of the types: ``__post_init__`` and the like, which may open files."""
    server, stranger, friend = actor(V), actor(M), actor(V)
    server(serve_data, path, "grant", **options)
    stranger(open_client, "objects", path, server={V})
    friend(open_client, "objects", path)
    for how, (full, *told) in OF_TYPES.items():
        said = stranger(refused, {"how": how})
        if options == {"tracebacks": True}:
            assert full in said
        else:
            expected = told["errors" in options]
            assert said.partition(" (wish is: ")[0].replace("'wish'", "").endswith(expected), how
            assert "hunter2" not in said
            assert "secret" not in said
        assert full in friend(refused, {"how": how})
    assert stranger(refused, {"how": "fine", "paint": "blue"}).startswith(
        "the argument wish.paint: Invalid enum value 'blue'"
    )


@pytest.mark.ids("B25")
def test_the_log_has_in_full_what_strangers_are_told_the_name_of(actor, path):
    server, stranger = actor(V), actor(M)
    server(serve_data, path, "grant")
    stranger(open_client, "objects", path, server={V})
    assert "hunter2" not in stranger(refused, {"how": "odd"})
    assert any("the argument wish: of hunter2" in line for line in server(logged))


@pytest.mark.ids("B25")
def test_what_strangers_are_told_of_errors_in_types_of_items_and_of_results(actor, path):
    stranger, friend = actor(M), actor(V)
    for number, target in enumerate(("grant_all", "wish_back", "by_repr")):
        actor(V)(serve_data, f"{path}{number}", target)
    for client, server_rule in ((stranger, {"server": {V}}), (friend, {})):
        strange = client is stranger
        client(open_client, "objects", f"{path}0", **server_rule)
        said = client(refused, {"a": [{"how": "odd"}]})
        assert ("Odd" if strange else "of hunter2") in said
        assert strange != ("hunter2" in said)
        client(open_client, "objects", f"{path}1", **server_rule)
        said = client(refused, "system")
        assert said.startswith("result: FileNotFoundError")
        assert said.endswith("which is not what the procedure promises")
        assert strange != ("secret" in said)
        client(open_client, "objects", f"{path}2", **server_rule)
        assert client(refused, "key").startswith("result[key <Mailer>] cannot cross")
        assert "hunter2" not in client(refused, "value")


@pytest.mark.ids("B25")
def test_strangers_are_not_told_what_the_object_of_a_door_looks_like(actor, path):
    server, stranger = actor(V), actor(M)
    server(serve_data, path, "Mailer")
    answers = stranger(
        call_by_hand, path, [[], [1], ["nosuch"], ["x" * 10_000], ["__call__"], ["__exit__", None, 5]]
    )
    assert not [each for each in answers if b"hunter2" in each]
    assert [each for each in answers if b"'Mailer' object" in each]
    assert max(map(len, answers)) < 300


def call_by_hand(path: str, calls: list[list[Any]]) -> list[bytes]:
    """Send these arguments; return what is answered, as it is."""
    open_client("objects", path, server={V})
    return [bytes(raw_handle().call(msgspec.msgpack.encode([args, {}])).data) for args in calls]


def hostile_server(number: int, outcomes: Sequence[bytes]) -> None:
    """Answer a knock, and then each call with the next of these outcomes."""
    with socket.socket(fileno=number) as port:
        theirs, _ = byhand.hear(port)
        with theirs:
            channel = byhand.admit(theirs, DATA)
    with channel:
        for count, data in enumerate(outcomes, 1):
            byhand.receive(channel)
            byhand.send(channel, byhand.frame_bytes("R", count, data))


def call_all(number: int, times: int) -> list[tuple[str, str, Any]]:
    """Call so many times; return what comes of each: the type, its module, and ``may_have_run``."""
    open_client("objects", number, server={M})
    results = []
    for _ in range(times):
        try:
            call("x")
        except BaseException as error:
            kind = type(error)
            results.append((kind.__name__, kind.__module__, getattr(error, "may_have_run", None)))
        else:
            results.append(("nothing", "", None))
    return results


@pytest.mark.ids("B25")
def test_no_name_of_a_hostile_server_is_looked_up(actor):
    """Every name there is in ``builtins`` and in ``doorpool``, as the type of an error."""
    import builtins

    import doorpool
    from doorpool._data import _RAISED

    names = [*dir(builtins), *dir(doorpool), *(f"doorpool._errors.{name}" for name in dir(doorpool._errors))]
    outcomes = [b"E" + msgspec.msgpack.encode([name, "text", None]) for name in names]
    holder, port = byhand.door_pair(byhand.greeting_bytes(DATA))
    with holder, port:
        server, client = actor(M), actor(V)
        before = client(counts)
        calling = client.begin(call_all, Fd(holder.fileno()), len(names))
        serving = server.begin(hostile_server, Fd(port.fileno()), outcomes)
        results = calling()
        serving()
        assert client(counts) == before
    for name, (kind, module, may_have_run) in zip(names, results, strict=True):
        if name in _RAISED:
            assert (kind, module, may_have_run) == (name, "builtins", None)
        else:
            assert (kind, may_have_run) == ("RemoteError", True), name


def server_of_long_answers(number: int, lengths: Sequence[int]) -> None:
    """Answer one call on each channel, by a head alone that says that so many bytes follow."""
    with socket.socket(fileno=number) as port:
        for length in lengths:
            theirs, _ = byhand.hear(port)
            with theirs, byhand.admit(theirs, DATA) as channel:
                byhand.receive(channel)
                byhand.send(channel, rawpeer.frame(rawpeer.REPLY, 1, b"V", length=length))
                assert byhand.read_all(channel) == b""


def limits_met(number: int, times: int, options: dict[str, int]) -> list[tuple[int, int, bool, str]]:
    with Proxy(number, server={M}, **options) as proxy:
        met = []
        for _ in range(times):
            with pytest.raises(LimitError) as caught:
                proxy()
            error = caught.value
            met.append((error.limit, error.value, error.may_have_run, str(error)))
        return met


@pytest.mark.ids("P7", "H03")
@pytest.mark.parametrize("options", [{}, {"max_reply": 5000}], ids=["by default", "as asked for"])
def test_a_server_of_another_user_answers_no_more_than_is_taken(actor, options):
    """Before any of it is read."""
    most = options.get("max_reply", 2**30)
    lengths = [most + 1, 2**40, 2**62]
    holder, port = byhand.door_pair(byhand.greeting_bytes(DATA))
    with holder, port:
        server, client = actor(M), actor(V)
        before = client(counts)
        calling = client.begin(limits_met, Fd(holder.fileno()), len(lengths), options)
        serving = server.begin(server_of_long_answers, Fd(port.fileno()), lengths)
        met = calling()
        serving()
        assert client(counts) == before
    assert [each[:3] for each in met] == [(most, length, True) for length in lengths]
    assert all(f"a reply of {length} bytes is over this proxy's max_reply, {most}" in text
               for length, (*_, text) in zip(lengths, met, strict=True))  # fmt: skip


@pytest.mark.ids("B25")
def test_a_misfit_that_a_stranger_sends_is_logged_in_moderation(actor, path):
    """And on one line: what he sends to be quoted there cannot look like another."""
    server, stranger = actor(V), actor(M)
    server(serve_data, path, "fail")
    stranger(open_client, "objects", path, server={V})
    for _ in range(50):
        with pytest.raises(MarshalError):
            stranger(call, ["\x1b[31m\nroot logged in"])
    lines = [line for line in server(logged) if "Expected" in line]
    assert len(lines) == 1
    assert lines[0].isprintable()


# -- descriptors (S8) ----------------------------------------------------------------------------------


def take_apart(things: list[Descriptor]) -> list[str]:
    """Say of what arrived what it is, and look whether anything else has happened meanwhile."""
    kinds = [type(each).__name__ for each in things]
    here.flags = [fcntl.fcntl(each.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK for each in things]
    here.inheritable = [os.get_inheritable(each.fileno()) for each in things]
    for each in things:
        each.close()
    return kinds


def audited() -> list[str]:
    return list(here.audited)


def begin_audit() -> None:
    here.audited = []
    watched = ("import", "os.remove", "pickle.find_class", "exec", "compile", "socket.connect")

    def hook(event: str, args: Any) -> None:
        on_server_thread = threading.current_thread() is not threading.main_thread()
        if event in watched and on_server_thread:
            here.audited.append(f"{event} {args!r:.60}")

    sys.addaudithook(hook)


def send_every_kind(themselves: bool) -> tuple[list[str], list[int]]:
    """
    Send a descriptor of every kind there is here; return what they were there, and our flags after.

    Args:
        themselves: send the objects, as far as there are any, and not ``Descriptor`` objects.
    """
    import multiprocessing
    import tempfile

    kept: list[Any] = []
    numbers: list[int] = []

    def add(thing: Any) -> None:
        kept.append(thing)
        numbers.append(thing if isinstance(thing, int) else thing.fileno())

    one, other = multiprocessing.Pipe()
    add(one)
    add(other)
    add(tempfile.NamedTemporaryFile())  # noqa: SIM115
    add(open(__file__))  # noqa: SIM115
    add(open(__file__, "rb"))  # noqa: SIM115
    add(open(__file__, "rb", buffering=0))  # noqa: SIM115
    add(socket.socket(socket.AF_INET))
    timed = socket.socket(socket.AF_UNIX)
    timed.settimeout(5)
    add(timed)
    add(os.memfd_create("x"))
    add(os.pidfd_open(os.getpid()))
    add(os.open("/", os.O_PATH))
    add(os.eventfd(0))
    import select

    add(select.epoll())
    before = [fcntl.fcntl(number, fcntl.F_GETFL) for number in numbers]
    copies = [Descriptor(os.dup(number)) for number in numbers]
    sent = [
        thing if themselves and not isinstance(thing, int) else copy
        for thing, copy in zip(kept, copies, strict=True)
    ]
    kinds = call(sent)
    for copy in copies:
        assert not copy.closed
        copy.close()
    after = [fcntl.fcntl(number, fcntl.F_GETFL) for number in numbers]
    name = kept[2].name
    alive = os.path.exists(name)
    for thing in kept:
        os.close(thing) if isinstance(thing, int) else thing.close()
    assert alive
    return kinds, [a ^ b for a, b in zip(before, after, strict=True)]


@pytest.mark.ids("F19", "C08", "F2", "F3")
@pytest.mark.parametrize("themselves", [False, True])
def test_descriptors_of_strangers_are_no_more_than_descriptors(actor, path, themselves):
    """Of whatever kind they are: nothing is imported, unlinked or unpickled, and no flag is changed."""
    server, stranger = actor(V), actor(M)
    server(serve_data, path, "take_apart")
    stranger(open_client, "objects", path, server={V})
    stranger(call, [])
    server(begin_audit)
    kinds, changed = stranger(send_every_kind, themselves)
    assert set(kinds) == {"Descriptor"}
    assert len(kinds) == 13
    assert not any(changed)
    assert server(audited) == []
    assert not any(server(inheritable))


def use_as_asked(sock: socket.socket, file: io.FileIO) -> list[Any]:
    """Say what two descriptors have been made."""
    with sock, file:
        told = [type(sock).__name__, type(file).__name__, file.name == file.fileno(), file.mode]
        sock.sendall(file.read(5))
        return told


def send_as_asked(blocks: bool) -> tuple[list[Any], bytes, bool]:
    """Send a socket and a text file where those are asked for; return whether our flags are the same."""
    ours, theirs = socket.socketpair()
    with ours, theirs, open(__file__, encoding="utf-8", newline="\r") as file:
        theirs.setblocking(blocks)
        before = fcntl.fcntl(theirs.fileno(), fcntl.F_GETFL)
        told = here.client(theirs, file)
        return told, ours.recv(5), before == fcntl.fcntl(theirs.fileno(), fcntl.F_GETFL)


@pytest.mark.ids("F19")
@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("server_uid", [V, None], ids=["user", "root"])
def test_where_it_is_asked_for_a_socket_and_a_raw_file_are_made_of_them(actor, path, blocks, server_uid):
    """Of what the kernel says: no codec of the stranger's choice, no name, and his flags stay as they are."""
    server, stranger = actor(server_uid), actor(M)
    server(serve_data, path, "use_as_asked")
    stranger(open_client, "objects", path, server={V, 0})
    stranger(send_as_asked, blocks)
    server(begin_audit)
    assert stranger(send_as_asked, blocks) == (["socket", "FileIO", True, "rb"], b'"""\nD', True)
    assert server(audited) == []


def inheritable() -> list[bool]:
    return list(here.inheritable)


def send_lingering(count: int) -> None:
    """Send sockets whose close waits, where no descriptor is expected."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(count):
            with socket.create_connection(listener.getsockname()) as sock:
                theirs, _ = listener.accept()
                with theirs:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, byhand.struct.pack("ii", 1, 3))
                    sock.setblocking(False)
                    try:
                        while True:
                            sock.send(b"x" * 65536)
                    except BlockingIOError:
                        pass
                    with pytest.raises(MarshalError):
                        call({"how": Descriptor(os.dup(sock.fileno()))})


@pytest.mark.ids("F20", "F15")
def test_descriptors_that_do_not_fit_hold_nobody_up(actor, path):
    """Sockets that linger, in arguments that are refused: closed by a janitor, and no thread waits."""
    server, stranger, canary = actor(V), actor(M), actor(V)
    server(serve_data, path, "fail", threads=1)
    stranger(open_client, "objects", path, server={V})
    canary(open_client, "objects", path)
    sending = stranger.begin(send_lingering, 3)
    begun = time.monotonic()
    while stranger.acting:
        assert canary(outcome, "value")[0] == "ValueError"
    sending()
    assert time.monotonic() - begun < 3


@pytest.mark.ids("D13t", "D10")
def test_with_other_users_no_memory_is_shared(actor, path):
    server, client = actor(V), actor(M)
    server(serve_data, path)
    client(open_client, "objects", path, server={V})
    assert client(call_long, 1_000_000)
    assert client(shared) == (None, None)


def shared() -> tuple[Any, Any]:
    channel = raw_handle()._idle[-1]
    return channel.page, channel.shelf
