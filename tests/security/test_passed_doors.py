"""
Doors that one user passes to another: who is believed, and what a passer gains (nothing).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
from support.actors import here

from doorpool import (
    AccessError,
    BrokenDoorError,
    Endpoint,
    LimitError,
    MarshalError,
    Proxy,
    RemoteError,
    Server,
    current_call,
    track,
)
from doorpool._call import LISTENER

#: Three users: a service, somebody in the middle, and a client.
S, M, C = 4201, 6602, 4203


def delete(what: str) -> str:
    """What only its own user shall be able to have done."""
    here.deleted.append((what, current_call().caller.uid))
    return what


def serve_deletions(path: str) -> int:
    """A door of ours that decides by who calls: others get a refusal."""
    here.deleted = []
    here.server = Server()
    here.server.attach(delete, path, codec="data", mode=0o666)
    here.server.start()
    return os.getpid()


def deleted() -> list[Any]:
    return here.deleted


def call_back(door: Proxy, *words: Any) -> Any:
    """A service that calls what it was given."""
    here.given = door
    return door(*words)


def try_given() -> str:
    """Say why the door that was given is not believed."""
    with pytest.raises(AccessError) as caught:
        here.given("again")
    text = str(caught.value)
    return text[text.index("believed are") : text.index("]") + 1]


def serve_callbacks(path: str) -> None:
    here.server = Server()
    here.server.attach(call_back, path, codec="data", mode=0o666)
    here.server.start()


def pass_a_door(path: str, other: str, word: str) -> Any:
    """Hand a service a door that is somebody else's, as if it were a callback."""
    with Proxy(path, server={S, 0}) as service, Proxy(other, server={S, 0}) as door:
        return service(door, word)


@pytest.mark.ids("C11")
@pytest.mark.parametrize("victim", [None, S], ids=["root", "user"])
def test_a_passed_door_does_not_have_a_service_act_for_the_passer(actor, place, victim):
    """S7: both services are the victim's own; he believes himself, but not on a stranger's word."""
    deleter, service, stranger = actor(victim), actor(victim), actor(M)
    deleter(serve_deletions, str(place / "delete.door"))
    service(serve_callbacks, str(place / "callbacks.door"))
    with pytest.raises(RemoteError, match="AccessError"):  # more a stranger is not told
        stranger(pass_a_door, str(place / "callbacks.door"), str(place / "delete.door"), "the passer's wish")
    assert service(try_given) == f"believed are the uids [{M}]"
    assert deleter(deleted) == []


def report(word: str) -> list[Any]:
    return [word, os.geteuid(), current_call().caller.uid]


def call_with_callback(path: str, word: str) -> Any:
    with Proxy(path, server={S, 0}) as service, Endpoint(report, codec="data", linger=True) as callback:
        return service(callback, word)


@pytest.mark.parametrize("victim", [None, S], ids=["root", "user"])
def test_a_strangers_own_callback_is_called(actor, place, victim):
    """It runs as the stranger, who learns who calls."""
    service, stranger = actor(victim), actor(M)
    service(serve_callbacks, str(place / "callbacks.door"))
    answer = stranger(call_with_callback, str(place / "callbacks.door"), "hello")
    assert answer == ["hello", M, victim or 0]


def call_with_pickle_callback(path: str, kind: str) -> str:
    with Proxy(path, server={S, 0}) as service, Endpoint(report, name="mine", linger=True) as callback:
        door = callback if kind == "endpoint" else Proxy(callback)
        with pytest.raises(MarshalError) as caught:
            service(door, "hello")
        assert not callback.unreferenced  # it was not handed out, or the proxy has it
        door.close()
        return str(caught.value)


@pytest.mark.parametrize("kind", ["endpoint", "proxy"])
def test_a_pickle_callback_is_refused_where_it_is_made_to_cross(actor, place, kind):
    service, stranger = actor(S), actor(M)
    service(serve_callbacks, str(place / "callbacks.door"))
    text = stranger(call_with_pickle_callback, str(place / "callbacks.door"), kind)
    assert text.startswith("args[0] cannot cross a data door: the door 'mine' speaks pickle")
    assert f"ours is {M}, and it would go to uid {S}" in text
    assert 'make it with codec="data"' in text


# -- what a stranger's door may answer

MOST = 2**20 + 2**18


def count_items(items: Iterator[str]) -> int:
    return sum(1 for _ in items)


def say_why(door: Any) -> list[Any]:
    """Call a door that was given, and say what has come of it."""
    try:
        return ["answered", len(door())]
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "limit", None)]


def say_why_of_items(door: Proxy) -> list[Any]:
    """Likewise, of the items that it answers with."""
    return say_why(lambda: list(door()))


def go_through(count: int) -> int:
    return sum(1 for _ in track(range(count)))


def serve_those_who_pass_doors(place: str) -> None:
    here.server = Server()
    for procedure in (count_items, say_why, say_why_of_items, go_through):
        path = f"{place}/{procedure.__name__}.door"
        here.server.attach(procedure, path, codec="data", mode=0o666, max_request=MOST, errors=(LimitError,))
    here.server.start()


def answer_with(place: str, size: int) -> Any:
    with Proxy(f"{place}/say_why.door", server={0}) as service:
        return service(Endpoint(lambda: "x" * size, codec="data"))


def send_items_of(place: str, size: int) -> Any:
    with Proxy(f"{place}/count_items.door", server={0}) as service:
        try:
            return service("x" * size for _ in range(3))
        except Exception as error:
            return str(error)


def say_that_it_goes_on(place: str, size: int) -> Any:
    """Give a door for reports of progress that answers at length; return how often it was called."""
    reports = []

    def hear(*report: Any) -> str:
        reports.append(report)
        return "x" * size

    with Proxy(f"{place}/go_through.door", server={0}) as service:
        return service(3, **{LISTENER: Endpoint(hear, codec="data")}), len(reports)


@pytest.mark.ids("H03", "C11")
def test_a_strangers_door_answers_no_more_than_he_may_ask(actor, place):
    service, stranger = actor(None), actor(M)
    service(serve_those_who_pass_doors, str(place))
    assert stranger(answer_with, str(place), MOST - 100) == ["answered", MOST - 100]
    kind, text, limit = stranger(answer_with, str(place), MOST)
    assert (kind, limit) == ("LimitError", MOST)
    assert f"of a stranger's door that was passed to us {MOST} are taken" in text
    assert stranger(send_items_of, str(place), 1000) == 3
    assert f"{MOST} are taken" in stranger(send_items_of, str(place), MOST)


def answer_with_a_stream(place: str, size: int) -> Any:
    """Pass a door that answers with a stream, whose items are another door's answers."""
    with Proxy(f"{place}/say_why_of_items.door", server={0}) as service:
        return service(Endpoint(lambda: ("x" * size for _ in range(3)), codec="data"))


def answer_a_client(path: str, size: int) -> None:
    here.server = Server()
    for what, procedure in (("plain", lambda: "x" * size), ("items", lambda: ("x" * size for _ in range(3)))):
        here.server.attach(procedure, f"{path}.{what}", codec="data", mode=0o666)
    here.server.start()


@pytest.mark.ids("H03", "C11")
def test_what_a_strangers_door_answers_with_answers_no_more_either(actor, place):
    service, stranger = actor(None), actor(M)
    service(serve_those_who_pass_doors, str(place))
    assert stranger(answer_with_a_stream, str(place), 1000) == ["answered", 3]
    kind, _, limit = stranger(answer_with_a_stream, str(place), MOST)
    assert (kind, limit) == ("LimitError", MOST)


def test_a_server_that_one_has_opened_and_believes_answers_as_much_as_it_may(actor, place):
    size = 2**24 + 2**20
    actor(M)(answer_a_client, str(place / "a.door"), size)
    with Proxy(place / "a.door.plain", server={M}) as proxy:
        assert len(proxy()) == size
    with Proxy(place / "a.door.items", server={M}) as proxy:
        assert [len(item) for item in proxy()] == [size] * 3


@pytest.mark.ids("H03")
def test_who_is_told_how_far_it_is_answers_next_to_nothing(actor, place):
    service, stranger = actor(None), actor(M)
    service(serve_those_who_pass_doors, str(place))
    assert stranger(say_that_it_goes_on, str(place), 1000) == (3, 2), "at the beginning and at the end"
    assert stranger(say_that_it_goes_on, str(place), 5000) == (3, 1), "he is not told any more"


def fail_with(place: str, text: str) -> Any:
    def fail() -> None:
        raise ValueError(text + "." * 100_000)

    with Proxy(f"{place}/say_why.door", server={0}) as service:
        return service(Endpoint(fail, codec="data"))


def fail_oddly(place: str) -> Any:
    """By an exception whose name is no better."""

    def fail() -> None:
        raise type("E\x1b[2J", (Exception,), {})

    with Proxy(f"{place}/say_why.door", server={0}) as service:
        return service(Endpoint(fail, codec="data"))


def test_what_a_strangers_door_says_is_cut_and_made_printable(actor, place):
    service, stranger = actor(None), actor(M)
    service(serve_those_who_pass_doors, str(place))
    kind, text, _ = stranger(fail_oddly, str(place))
    assert kind == "RemoteError"
    assert "E\\x1b[2J" in text
    kind, text, _ = stranger(fail_with, str(place), "two\nlines, \x1b[2J and so on")
    assert kind == "ValueError"
    assert text.startswith("two\nlines, \\x1b[2J and so on...")
    assert len(text) < 10_000


EVIL = "It clears\n\x1b[2Jyour screen"


class Clears:
    def wipe(self) -> None:
        pass

    wipe.__doc__ = EVIL


def clear() -> None:
    pass


clear.__doc__ = EVIL


def serve_with_docstrings(path: str) -> None:
    here.server = Server()
    here.server.attach(clear, path, codec="data", mode=0o666)
    here.server.attach(Clears(), f"{path}.object", codec="data", mode=0o666)
    here.server.start()


@pytest.mark.parametrize("server", [None, M], ids=["root's", "a stranger's"])
def test_help_of_a_strangers_door_prints(actor, place, server):
    actor(server)(serve_with_docstrings, str(place / "a.door"))
    said = EVIL if server is None else EVIL.replace("\x1b", "\\x1b")
    with Proxy(place / "a.door", server={M, 0}) as proxy, Proxy(place / "a.door.object", server={M, 0}) as it:
        assert said in proxy.__doc__
        assert said.splitlines()[1] in it.__doc__
        assert it.wipe.__doc__ == said


# -- an object that several have entered


class Ledger:
    """What is begun is finished, or undone."""

    def __enter__(self) -> Ledger:
        here.ledger.append("begun")
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        here.ledger.append("undone" if kind else "finished")


def serve_a_ledger(path: str) -> None:
    here.ledger, here.server = [], Server()
    shared = here.server.attach(Ledger(), codec="data", linger=True)
    here.server.attach(lambda: shared, path, codec="data", mode=0o666)
    here.server.start()


def ledger() -> list[str]:
    return here.ledger


def enter(path: str) -> None:
    here.proxy = Proxy(path, server={0})
    here.entered = here.proxy()
    here.entered._line.enter(None)


def leave() -> None:
    here.entered._line.leave(None, None)


def leave_for_others(path: str) -> None:
    with Proxy(path, server={0}) as proxy, contextlib.closing(proxy()) as shared:
        for number in range(-1, 10):
            with pytest.raises(RuntimeError, match="had not been entered"):
                shared._line.call_method("__exit__", (None, number), {}, None)


@pytest.mark.ids("U12")
def test_nobody_leaves_an_object_for_another_user(actor, place):
    service, one, other = actor(None), actor(M), actor(C)
    service(serve_a_ledger, str(place / "ledger.door"))
    one(enter, str(place / "ledger.door"))
    other(leave_for_others, str(place / "ledger.door"))
    leave_for_others(str(place / "ledger.door"))  # nor does root
    assert service(ledger) == ["begun"]
    one(leave)
    assert service(ledger) == ["begun", "finished"]


# -- a door through a door, and three users


def give() -> Proxy:
    return here.door


def stand_between(inner: str, outer: str) -> int:
    """Open somebody's door, and hand it out."""
    here.door = Proxy(inner, server={S})
    here.server = Server()
    here.server.attach(give, outer, codec="data", mode=0o666)
    here.server.start()
    return here.door.fileno()


def get_and_call(outer: str, server: set[int] | None) -> Any:
    with Proxy(outer, server={M}) as front, front() as door:
        if server is None:
            return door("directly")
        with Proxy(door, server=server) as widened:
            return widened("directly")


@pytest.fixture
def relay(actor, place) -> Any:
    """A service of one user, and somebody of another in front of it."""
    service, between, client = actor(S), actor(M), actor(C)
    service(serve_deletions, str(place / "delete.door"))
    between(stand_between, str(place / "delete.door"), str(place / "front.door"))
    return service, between, client


@pytest.mark.ids("F13", "F14", "K3", "N11")
def test_three_users_and_the_service_sees_the_client(relay, place):
    service, _, client = relay
    assert client(get_and_call, str(place / "front.door"), {S}) == "directly"
    assert service(deleted) == [("directly", C)]


@pytest.mark.ids("C11")
def test_three_users_and_the_client_believes_whom_he_asked_only(relay, place):
    service, _, client = relay
    with pytest.raises(AccessError, match=rf"is not believed.*{S}"):
        client(get_and_call, str(place / "front.door"), None)
    assert service(deleted) == []


def spoil(outer: str) -> int:
    """Shut down the descriptor that we were given."""
    import socket

    with Proxy(outer, server={M}) as front, front() as door:
        with socket.socket(fileno=os.dup(door.fileno())) as sock:
            sock.shutdown(socket.SHUT_RDWR)
        return door.fileno()


def call_here(word: str) -> Any:
    """Call, on a fresh channel, by the descriptor that we have."""
    with Proxy(here.door, server={S}) as again:
        return again(word)


@pytest.mark.ids("U17")
def test_what_is_passed_on_to_another_user_shares_no_fate(relay, place):
    """S13: whoever got the door can spoil his own descriptor, and no other."""
    _, between, client = relay
    client(spoil, str(place / "front.door"))
    assert between(call_here, "still there") == "still there"
    assert client(get_and_call, str(place / "front.door"), {S}) == "directly"


def hold(outer: str) -> None:
    here.front = Proxy(outer, server={M})
    here.held = Proxy(here.front(), server={S})


def call_held(word: str) -> Any:
    return here.held(word)


def reopen_held(word: str) -> Any:
    """Call on a channel that is made now."""
    with Proxy(here.held, server={S}) as again:
        return again(word)


def test_of_three_users_the_one_in_the_middle_may_go(relay, place):
    """What the client was given is his, and so is a door that he opens from it afterwards."""
    service, between, client = relay
    client(hold, str(place / "front.door"))
    assert client(call_held, "before") == "before"
    between.kill()
    assert client(call_held, "on") == "on"
    assert client(reopen_held, "and on") == "and on"
    assert service(deleted) == [("before", C), ("on", C), ("and on", C)]


@pytest.mark.ids("C10")
def test_of_three_users_the_service_may_go(relay, place):
    service, between, client = relay
    client(hold, str(place / "front.door"))
    os.kill(service.pid, 9)
    with pytest.raises(BrokenDoorError):
        client(call_held, "anybody there?")
    with pytest.raises(BrokenDoorError):
        between(call_here, "anybody there?")
