"""
Descriptors that hurt: slow to close, never taken, shared and spoilt.

A stranger holds a raw door of the victim's and sends what he likes; a canary calls the same door
throughout, opening it anew again and again, and notices nothing.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import byhand, rawpeer, wait_until
from support.actors import LONE_USER, Actor, Fd, descriptors, here, logged
from support.canary import few_descriptors_more, try_door, undisturbed
from support.rawdoor import PATIENCE, Background
from support.shortage import LINGER, send_all_of, slow_pair
from support.victims import call, open_client, open_descriptor, serve

from doorpool import (
    Descriptor,
    Endpoint,
    Proxy,
    Server,
    Usage,
    _data,
    _guests,
    _janitor,
    _names,
    _opening,
    _sockets,
    _unread,
    take,
)
from doorpool._errors import BusyError, CallTimeoutError, RevokedError
from doorpool._guests import MOST_UNREAD
from doorpool._janitor import AT_MOST, AT_MOST_HIS, MOST_WAITING
from doorpool._wire import encode_hand_out
from doorpool.door import Handle

V, M = LONE_USER, 6602

BUSY = 9  # a reason
FEW = 4  # knocks of one handle may be unanswered


@pytest.fixture
def raw_server(actor: Callable[..., Actor], path: str) -> Actor:
    """A raw door of the victim's that everybody may use."""
    server = actor(V)
    server(serve, "raw", path, codec="RAW")
    return server


# -- what is slow to close (F20) -------------------------------------------------------------------


def knock_slowly(path: str, how: str, count: int) -> None:
    """
    Knock with sockets whose close waits, and keep none of them.

    Args:
        how: in place of the socket; beside it; many of them; or in the queue of a good one.
    """
    here.kept = getattr(here, "kept", [])
    with byhand.reach(path) as door:
        for _ in range(count):
            ours, theirs = byhand.pair()
            slow = [one for one, other in (_slow() for _ in range(10 if how == "many" else 1))]
            with contextlib.suppress(BlockingIOError), theirs:
                _wait_for_room(door)
                if how == "in its place":
                    send_all_of(door, byhand.knock_bytes(), *slow)
                elif how == "queued behind it":
                    send_all_of(ours, b"never read", *slow)
                    byhand.send(door, byhand.knock_bytes(), [theirs.fileno()], byhand.own_ids())
                else:
                    send_all_of(door, byhand.knock_bytes(), theirs.dup(), *slow)
            ours.close()


def let_go() -> None:
    """Close the other sides of the slow sockets, which nobody waits for any more."""
    for other in here.kept:
        other.close()


def _slow() -> tuple[socket.socket, socket.socket]:
    one, other = slow_pair()
    here.kept.append(other)
    return one, other


def _wait_for_room(door: socket.socket) -> None:
    import select

    poll = select.poll()
    poll.register(door, select.POLLOUT)
    assert poll.poll(10_000)


@pytest.mark.ids("F20")
@pytest.mark.parametrize("how", ["in its place", "beside it", "many", "queued behind it"])
def test_knocks_with_slow_sockets_hold_nobody_up(actor, raw_server, path, how, root_only):
    stranger, canary = actor(M), actor(V)
    before = raw_server(descriptors)
    with undisturbed(canary, path) as some_more:
        stranger(knock_slowly, path, how, {"many": 20, "queued behind it": 80}.get(how, 200))
        some_more()
        # Within another's queue lingering cannot be switched off; then most of them are not heard.
        assert raw_server(descriptors) < before + MOST_WAITING + AT_MOST + 30
    stranger(let_go)
    few_descriptors_more(raw_server, before)


def call_slowly(path: str, count: int, *, data: bytes = b"take this") -> None:
    """Make calls that bring slow sockets, each on a channel of its own; hear what is said to them."""
    here.kept = []
    with byhand.reach(path) as door:
        for _ in range(count):
            channel, _ = byhand.dial(door)
            assert channel is not None
            slow = [_slow()[0] for _ in range(2)]
            with channel:
                with contextlib.suppress(PermissionError):  # Linux 6.16+, where the door takes none
                    send_all_of(channel, byhand.frame_bytes("Q", 1, data, descriptors=len(slow)), *slow)
                    byhand.receive(channel).close()


def refuse_descriptors() -> None:
    here.door.refuse_descriptors = True


@pytest.mark.ids("F20")
@pytest.mark.parametrize("answer", ["does not take them", "refuses them", "calls it a wrong frame"])
def test_calls_with_slow_sockets_hold_nobody_up(actor, raw_server, path, answer, many, root_only):
    if answer == "refuses them":
        raw_server(refuse_descriptors)
    stranger, canary = actor(M), actor(V)
    before = raw_server(descriptors)
    with undisturbed(canary, path) as some_more:
        if answer == "calls it a wrong frame":
            stranger(call_wrongly, path, many(30, 60))  # who does so is soon not heard for a while
        else:
            stranger(call_slowly, path, 60)
        some_more()
    stranger(let_go)  # or the last of them would be closed half a minute later
    few_descriptors_more(raw_server, before)


def call_wrongly(path: str, count: int) -> None:
    """Send slow sockets in the middle of a frame, and ones that no header speaks of."""
    here.kept = []
    with byhand.reach(path) as door:
        for number in range(count):
            channel, _ = byhand.dial(door)
            assert channel is not None
            frame = byhand.frame_bytes("Q", 1, b"twelve bytes")
            with channel:
                if number % 2:
                    byhand.send(channel, frame[:-4])
                    send_all_of(channel, frame[-4:], _slow()[0])
                else:
                    send_all_of(channel, frame, _slow()[0], _slow()[0])
                assert byhand.read_all(channel)[:1] in (b"", b"G")


def send_empty(path: str, count: int) -> None:
    """Send packets without a byte that bring slow sockets: one is read, those behind it never are."""
    here.kept = []
    with byhand.reach(path) as door:
        for _ in range(count):
            channel, _ = byhand.dial(door)
            assert channel is not None
            with channel:
                for _ in range(3):
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        send_all_of(channel, b"", _slow()[0])
                assert byhand.read_all(channel)[:1] in (b"", b"G")


@pytest.mark.ids("F20", "C02")
def test_empty_packets_with_slow_sockets_hold_nobody_up(actor, raw_server, path, root_only):
    """They count as the end of a channel, and leave nothing behind."""
    stranger, canary = actor(M), actor(V)
    before = raw_server(descriptors)
    with undisturbed(canary, path) as some_more:
        stranger(send_empty, path, 10)
        some_more()
    stranger(let_go)
    few_descriptors_more(raw_server, before)


def leave_unread(path: str, count: int) -> None:
    """Have calls with slow sockets in the queues of channels, and knocks in that of a port."""
    here.kept, here.channels = [], []
    here.reached = byhand.reach(path)
    for _ in range(count):
        channel, _ = byhand.dial(here.reached)
        byhand.send(channel, byhand.frame_bytes("Q", 1, b"wait"))
        here.channels.append(channel)


def add_unread(count: int) -> None:
    for channel in here.channels:
        send_all_of(channel, byhand.frame_bytes("Q", 2, b"", descriptors=1), _slow()[0])
    for _ in range(count):
        send_all_of(here.reached, byhand.knock_bytes(), _slow()[0], _slow()[0])


def serve_waiting(path: str) -> None:
    """Serve a door whose procedure waits until it is revoked, and one beside it that echoes."""
    from support.victims import _answer

    from doorpool.door import Codec, Door, Gate

    serve("raw", path, codec="RAW")
    here.busy_gate = Gate()
    here.busy = Door(here.busy_gate, name="busy", codec=Codec.RAW)
    here.busy.listen(path + ".busy", mode=0o666)
    here.running = []

    def work() -> None:
        while True:
            here.running.append(here.busy_gate.wait())

    for _ in range(2):
        threading.Thread(target=work, daemon=True).start()
    assert _answer


def running() -> int:
    return len(here.running)


def revoke_busy() -> float:
    """Revoke the door whose queues are full, while the keeper hears nothing; tell how long it took."""
    from doorpool._keeper import keeper

    began = time.monotonic()
    here.busy.revoke()
    keeper().lock.release()
    taken = time.monotonic() - began
    for invocation in here.running:
        invocation.reply(b"done")
    here.running.clear()
    return taken


def hold_keeper() -> None:
    from doorpool._keeper import keeper

    keeper().lock.acquire()


@pytest.mark.ids("F20")
def test_a_revoke_with_slow_sockets_in_its_queues(actor, path, root_only):
    """What nobody has read goes with the queues: of the port, and of channels whose calls run."""
    server, stranger, canary = actor(V), actor(M), actor(V)
    server(serve_waiting, path)
    before = server(descriptors)
    stranger(leave_unread, path + ".busy", 10)
    wait_until(lambda: server(running) == 10, timeout=PATIENCE)
    server(hold_keeper)
    stranger(add_unread, 40)
    assert server(revoke_busy) < LINGER / 2
    with undisturbed(canary, path) as some_more:
        some_more(50)
    few_descriptors_more(server, before)


# -- the same at a client --------------------------------------------------------------------------


def open_and_fail(number: int) -> tuple[str, float]:
    """Open a door that answers with slow sockets; tell how it went, and how long it took."""
    began = time.monotonic()
    try:
        Handle(number, server=[M], open_timeout=LINGER * 2)
    except Exception as error:
        return type(error).__name__, time.monotonic() - began
    raise AssertionError("it was believed")


def pose_slowly(number: int, how: str) -> None:
    """Answer one knock at a port with slow sockets: in place of the channel, or beside it."""
    here.kept = []
    port = socket.socket(fileno=number)

    def work() -> None:
        theirs, _ = byhand.hear(port)
        one, other = byhand.pair()
        here.kept += [one, other]
        first = [] if how == "in its place" else [other.dup()]
        send_all_of(theirs, byhand.answer_bytes(byhand.RAW), *first, *(_slow()[0] for _ in range(3)))
        theirs.close()

    threading.Thread(target=work, daemon=True).start()


@pytest.mark.ids("F20")
@pytest.mark.parametrize("how", ["in its place", "beside it"])
def test_answers_with_slow_sockets_hold_no_caller_up(actor, how, root_only):
    holder, port = byhand.door_pair(byhand.greeting_bytes(byhand.RAW))
    with holder, port:
        stranger, client = actor(M), actor(V)
        stranger(pose_slowly, Fd(port.fileno()), how)
        name, taken = client(open_and_fail, Fd(holder.fileno()))
        assert name == "ProtocolError"
        assert taken < LINGER / 2
        client(descriptors)


def listen_slowly(path: str) -> None:
    """Have whoever opens a path greeted, with slow sockets behind that, and hear nothing more."""
    here.kept, here.sent = [], []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    os.chmod(path, 0o666)
    listener.listen(5)

    def work() -> None:
        port, _ = listener.accept()
        here.kept += [listener, port]
        port.send(byhand.greeting_bytes(byhand.RAW))
        for _ in range(3):
            slow = _slow()[0]
            try:
                send_all_of(port, b"behind it", slow)
                here.sent.append(True)
            except OSError:
                here.sent.append(False)

    threading.Thread(target=work, daemon=True).start()


def sent() -> list[bool]:
    return here.sent


def look_at(path: str, refusing: bool) -> None:
    """Look at what a path leads to, on a system whose kernel can refuse descriptors, or cannot."""
    if not refusing:
        _names.refuse_rights = lambda sock: None
    here.handle = Handle(path, server=[M], lazy=True)


def dial() -> str:
    try:
        here.handle.call(timeout=0.2)
    except Exception as error:
        return type(error).__name__
    return "answered"


def close_handle() -> float:
    began = time.monotonic()
    here.handle.close()
    return time.monotonic() - began


@pytest.mark.ids("F20")
@pytest.mark.parametrize("refusing", [True, False])
def test_slow_sockets_in_the_queue_of_an_opened_door_hold_nobody_up(actor, path, refusing, root_only):
    stranger, client = actor(M), actor(V)
    place = f"{path}.slow"
    stranger(listen_slowly, place)
    client(look_at, place, refusing)
    assert client(dial) == "CallTimeoutError"
    wait_until(lambda: len(stranger(sent)) == 3, timeout=PATIENCE)
    assert any(stranger(sent)) is not (refusing and has_passrights())
    assert client(close_handle) < LINGER / 2


def has_passrights() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, _sockets.SO_PASSRIGHTS, 0)
        except OSError:
            return False
    return True


@pytest.mark.ids("F20")
@pytest.mark.parametrize(("uid", "comes"), [(M, False), (None, False), (0, True), (_janitor.NOBODY, True)])
def test_nothing_comes_between_a_look_at_a_socket_of_a_strangers_and_its_close(monkeypatch, uid, comes):
    ours, theirs = byhand.pair()
    holds_something, came = _janitor._holds_something, []

    def look(sock: socket.socket) -> bool:
        held = holds_something(sock)
        with contextlib.suppress(BrokenPipeError):
            theirs.send(b"just now")
            came.append(held)
        return held

    monkeypatch.setattr(_janitor, "_holds_something", look)
    with theirs:
        _janitor.close_socket(ours, uid)
        assert came == [False] * comes


# -- what holds a janitor up -----------------------------------------------------------------------


@contextlib.contextmanager
def standing_still(server: Actor) -> Iterator[None]:
    """
    Have a server read nothing of what is sent meanwhile.

    A sender who is still to close what he has sent when the server's janitor closes it waits in its place.
    """
    server.stop()
    try:
        yield
    finally:
        server.cont()


@pytest.mark.ids("F20")
def test_who_holds_a_janitor_up_is_not_heard_meanwhile(actor, raw_server, path, root_only):
    stranger, mate, canary = actor(M), actor(M), actor(V)
    assert mate(try_door, path, V) == "hello"
    before = raw_server(descriptors)
    with undisturbed(canary, path) as some_more:
        stranger(reach_often, path, 4)
        with standing_still(raw_server):
            stranger(leave_at_doors, 4)
        wait_until(lambda: mate(try_door, path, V) == "CallTimeoutError", timeout=LINGER)
        some_more()
        wait_until(lambda: mate(try_door, path, V) == "hello", timeout=3 * LINGER)
    assert any("not heard" in line for line in raw_server(logged))
    few_descriptors_more(raw_server, before)


def hold_janitor(uid: int) -> None:
    """Be as if a janitor had been closing something of a uid's for ever."""
    _janitor._crew._busy[0] = uid, float("-inf")


def let_janitor_go() -> None:
    del _janitor._crew._busy[0]


@pytest.mark.ids("F20")
def test_open_channels_of_who_holds_a_janitor_up_end(actor, raw_server, path, root_only):
    """Each call could bring more of what cannot be closed; his procedure has not run, and he is told why."""
    stranger, mate, other = actor(M), actor(M), actor(M + 1)
    for client in (stranger, mate, other):
        client(open_client, "raw", path, server=[V])
        assert client(call, b"before") == b"before"
    raw_server(hold_janitor, M)
    for client in (stranger, mate):
        with pytest.raises(BusyError, match="takes too long") as caught:
            client(call, b"meanwhile")
        assert caught.value.may_have_run is False
        with pytest.raises(CallTimeoutError):
            client(call, b"on a channel of its own", timeout=0.3)
    assert other(call, b"meanwhile") == b"meanwhile"
    raw_server(let_janitor_go)
    wait_until(lambda: stranger(try_door, path, V) == "hello", timeout=PATIENCE)
    assert mate(call, b"after") == b"after"


def _nested() -> socket.socket:
    """Make a socket in whose queue a slow one lies: lingering cannot be switched off from outside."""
    ours, theirs = byhand.pair()
    send_all_of(ours, b"within", _slow()[0])
    ours.close()
    return theirs


def dial_often(path: str, count: int) -> None:
    """Have so many channels."""
    here.kept, here.channels = [], []
    with byhand.reach(path) as door:
        for _ in range(count):
            channel, answer = byhand.dial(door)
            assert channel is not None, answer
            here.channels.append(channel)


def send_too_long() -> None:
    """Send packets that are longer than any may be, each on a channel of its own."""
    for channel in here.channels:
        send_all_of(channel, bytes((1 << 16) + 1), _nested())


def reach_often(path: str, count: int) -> None:
    """Be at a door so many times."""
    here.kept, here.doors = [], []
    for _ in range(count):
        here.doors.append(byhand.reach(path))


def hold(number: int) -> None:
    """Be at a door by a descriptor of it."""
    here.kept, here.doors = [], [socket.socket(fileno=number)]


def leave_at_doors(count: int) -> None:
    """Leave a message with what is slow to close at each of the last so many doors."""
    for door in here.doors[-count:]:
        send_all_of(door, b"no knock", _nested())


def reach_and_leave(path: str, count: int) -> None:
    for _ in range(count):
        here.doors.append(byhand.reach(path))
        leave_at_doors(1)


def let_keeper_go() -> None:
    from doorpool._keeper import keeper

    keeper().lock.release()


def revoke_and_let_keeper_go() -> None:
    here.door.revoke()
    let_keeper_go()


def held_up() -> set[int | None]:
    """Who has sent what is being closed, and what waits for that."""
    crew = _janitor._crew
    return {uid for uid, _ in crew._busy.values()} | {uid for _, uid in crew.waiting}


@pytest.mark.ids("F20")
def test_a_packet_that_is_too_long_is_charged_to_its_sender(actor, raw_server, path, root_only):
    """What it brings is closed by his janitors, who are few, and by nobody else's."""
    stranger, mate, other = actor(M), actor(M), actor(M + 1)
    stranger(dial_often, path, 2 * AT_MOST_HIS)
    with standing_still(raw_server):
        stranger(send_too_long)
    wait_until(lambda: raw_server(_janitor.stuck) == {M}, timeout=LINGER)
    assert raw_server(held_up) == {M}
    assert mate(try_door, path, V) == "CallTimeoutError"
    assert other(try_door, path, V) == "hello"
    stranger(let_go)


@pytest.mark.ids("F20")
def test_a_connection_too_many_is_charged_to_who_made_it(actor, raw_server, path, root_only):
    """With what he had sent before it was dropped."""
    raw_server(limit_descriptors, 64)
    stranger, other = actor(M), actor(M + 1)
    stranger(reach_often, path, 24)
    wait_until(lambda: raw_server(ports) == 24, timeout=PATIENCE)
    raw_server(hold_keeper)
    stranger(reach_and_leave, path, 2 * AT_MOST_HIS)
    raw_server(let_keeper_go)
    wait_until(lambda: raw_server(_janitor.stuck) == {M}, timeout=LINGER)
    assert raw_server(held_up) == {M}
    assert other(try_door, path, V) == "hello"
    stranger(let_go)


def ports() -> int:
    return len(here.door._ports)


@pytest.mark.ids("F20")
@pytest.mark.parametrize("whose", [M, None], ids=["his", "ours"])
def test_what_is_left_at_a_port_is_charged_to_whose_it_is(actor, raw_server, path, whose, root_only):
    """Who holds the other end of one of ours by now, nobody knows; he is not let off for that."""
    stranger = actor(M)
    if whose is None:
        number = raw_server(open_descriptor)
        stranger(hold, Fd(number))
        os.close(number)
    else:
        stranger(reach_often, path, 2)
    wait_until(lambda: raw_server(ports) == (1 if whose is None else 2), timeout=PATIENCE)
    raw_server(hold_keeper)
    stranger(leave_at_doors, 2)
    raw_server(revoke_and_let_keeper_go)
    wait_until(lambda: raw_server(_janitor.stuck) == {whose}, timeout=LINGER)
    assert raw_server(held_up) == {whose}
    stranger(let_go)


def note_knocks() -> None:
    """Take note of whose messages are heard at the ports, one after the other."""
    here.heard, hear = [], _opening.hear_knock

    def noted(*args: Any) -> Any:
        knock = hear(*args)
        here.heard.append(knock.credentials.uid)
        return knock

    _opening.hear_knock = noted


def heard() -> list[int]:
    return list(here.heard)


def write_to_each() -> None:
    for door in here.doors:
        byhand.send(door, b"x")


@pytest.mark.ids("F23")
def test_who_writes_to_many_connections_keeps_our_own_waiting_for_few(actor, raw_server, path, root_only):
    """They are heard when ours is: of a stranger's some at a time."""
    stranger, own = actor(M), actor(V)
    stranger(reach_often, path, 200)
    own(reach_often, path, 1)
    wait_until(lambda: raw_server(ports) == 201, timeout=PATIENCE)
    raw_server(note_knocks)
    raw_server(hold_keeper)
    stranger(write_to_each)
    own(write_to_each)
    raw_server(let_keeper_go)
    wait_until(lambda: len(raw_server(heard)) == 201, timeout=PATIENCE)
    assert raw_server(heard).index(V) <= 2 * 16


def serve_closers(path: str) -> None:
    """Serve doors that close, and that drop, the descriptors that they are given."""

    def close(given: Descriptor) -> None:
        with given, given.dup():
            pass

    def drop(given: Descriptor) -> None:
        given.dup()

    here.server = Server()
    here.server.attach(Endpoint(close, name="close", codec="data"), path + ".closed", mode=0o666)
    here.server.attach(Endpoint(drop, name="drop", codec="data"), path + ".dropped", mode=0o666)
    here.server.start()


def pass_slowly(path: str, count: int) -> list[float]:
    """Pass slow sockets, and keep none; tell how long each call took."""
    here.kept = []
    times = []
    with Proxy(path, server=[V]) as proxy:
        for _ in range(count):
            slow = take(_slow()[0])
            began = time.monotonic()
            proxy(slow)
            times.append(time.monotonic() - began)
    return times


@pytest.mark.ids("F20")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_procedures_do_not_wait_for_the_slow_sockets_that_they_close(actor, path, how, root_only):
    server, stranger = actor(V), actor(M)
    server(serve_closers, path)
    before = server(descriptors)
    assert max(stranger(pass_slowly, f"{path}.{how}", 5)) < LINGER / 2
    few_descriptors_more(server, before)


# -- answers that nobody reads (F22) ---------------------------------------------------------------


def knock_and_wait(path: str, count: int, how: str) -> tuple[int, set[str]]:
    """
    Knock often and read no answer, but look at each; return how many brought a channel, and the refusals.

    Args:
        how: what is done with k0 then: kept, or shut down and kept all the same.
    """
    here.kept = []
    opened, refusals = 0, set()
    with byhand.reach(path) as door:
        for _ in range(count):
            ours = byhand.knock(door)
            here.kept.append(ours)
            assert byhand.readable(ours, 10)
            words = ours.recv(4096, socket.MSG_PEEK)
            refusal = byhand.refusal_in(words)
            if refusal is None:
                opened += 1
                if how != "kept":
                    ours.shutdown(getattr(socket, how))
            else:
                assert refusal[0] == BUSY
                refusals.add(refusal[1])
    return opened, refusals


def read_answers() -> None:
    for ours in here.kept:
        with contextlib.suppress(OSError):
            byhand.receive(ours).close()


def close_answers() -> None:
    for ours in here.kept:
        ours.close()


def limit_descriptors(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def pass_one() -> None:
    """Pass a descriptor to oneself: the kernel says no if too many of this user are in flight."""
    one, other = socket.socketpair()
    with one, other:
        byhand.send(one, b"x", [0])
        byhand.receive(other).close()


@pytest.mark.ids("F22")
@pytest.mark.parametrize("how", ["kept", "SHUT_WR", "SHUT_RD", "SHUT_RDWR"])
@pytest.mark.parametrize("then", ["read", "closed"])
def test_a_stranger_leaves_only_a_few_answers_unread(actor, raw_server, path, how, then, root_only):
    """No shutdown makes an unread answer a read one."""
    raw_server(limit_descriptors, 256)
    stranger, mate, other = actor(M), actor(M), actor(V)
    before = raw_server(descriptors)
    opened, refusals = stranger(knock_and_wait, path, 60, how)
    assert opened == MOST_UNREAD
    assert all(f"{MOST_UNREAD} answers to uid {M}" in text for text in refusals)
    assert mate(try_door, path, V) == "BusyError"
    assert actor(M + 1)(try_door, path, V) == "hello"
    other(pass_one)
    canary = actor(V)
    canary(open_client, "raw", path)
    assert canary(call, b"tweet") == b"tweet"
    stranger(read_answers if then == "read" else close_answers)
    wait_until(lambda: mate(try_door, path, V) == "hello", timeout=PATIENCE)
    stranger(close_answers)
    few_descriptors_more(raw_server, before)


def leave_heir() -> int:
    """Leave all that this process holds to a forked child, which lives for a while; return its pid."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(int(PATIENCE))
        while True:
            signal.pause()
    return pid


@pytest.mark.ids("F22")
def test_answers_that_were_left_to_a_child_count_on(actor, raw_server, path, root_only):
    """Who dies with unread answers and leaves them to a child begins with no new share."""
    stranger, mate = actor(M), actor(M)
    assert stranger(knock_and_wait, path, MOST_UNREAD, "kept")[0] == MOST_UNREAD
    heir = stranger(leave_heir)
    stranger.kill()
    wait_until(lambda: raw_server(channels) == 0, timeout=PATIENCE)  # those go with their caller
    assert mate(try_door, path, V) == "BusyError"
    os.kill(heir, signal.SIGKILL)
    wait_until(lambda: mate(try_door, path, V) == "hello", timeout=PATIENCE)


def channels() -> int:
    return here.door.channels


@pytest.mark.ids("F22", "F23")
def test_many_strangers_leave_room_for_our_own(actor, raw_server, path, root_only):
    """All together they get three quarters of what may be in flight; an own process passes what it likes."""
    raw_server(limit_descriptors, 256)
    total = 256 // 4 * 3 // 4
    strangers = [actor(M + number) for number in range(5)]
    opened = [stranger(knock_and_wait, path, MOST_UNREAD, "kept")[0] for stranger in strangers]
    assert sum(opened) == total
    canary, other = actor(V), actor(V)
    with undisturbed(canary, path):
        other(pass_one)
    assert strangers[-1](try_door, path, V) == "BusyError"
    strangers[0](close_answers)
    wait_until(lambda: strangers[-1](try_door, path, V) == "hello", timeout=PATIENCE)


@pytest.mark.ids("F22", "F23")
def test_strangers_do_not_take_all_descriptors(actor, raw_server, path, root_only):
    """Of connections and channels too three quarters are theirs at most."""
    raw_server(limit_descriptors, 128)
    stranger, canary = actor(M), actor(V)
    assert stranger(connect_often, path, 200) <= 128 * 3 // 4
    with undisturbed(canary, path):
        pass
    assert any("dropped a connection" in line for line in raw_server(logged))


def connect_often(path: str, count: int) -> int:
    """Connect and stay; return how many connections were greeted."""
    here.kept = [byhand.reach(path) for _ in range(count)]
    return sum(bool(_greeting_on(sock)) for sock in here.kept)


def _greeting_on(sock: socket.socket) -> bytes:
    try:
        data = byhand.receive(sock).data  # or a goodbye, which says why not
        return data if data[:4] == byhand.greeting_bytes()[:4] else b""
    except ConnectionError:
        return b""


# -- results with descriptors that nobody reads (F22) ----------------------------------------------


def serve_gifts(path: str) -> None:
    """Give descriptors away to everybody, from a process that may have the usual number in flight."""
    limit_descriptors(1024)

    def give(count: int) -> list[Descriptor]:
        return [take(Descriptor(os.open(os.devnull, os.O_RDONLY))) for _ in range(count)]

    here.server = Server(max_threads=16)
    here.door = here.server.attach(give, path, codec="data", mode=0o666, name="gifts")
    here.server.start()


def hoard(path: str, channels: int, calls: int, count: int, *, wrongly: bool = False) -> None:
    """
    Ask for descriptors again and again, on some channels, and read none.

    Args:
        wrongly: send at last, on each, something for which the server closes it.
    """
    here.kept = getattr(here, "kept", [])
    with byhand.reach(path) as door:
        byhand.receive(door).close()
        for _ in range(channels):
            channel, answer = byhand.dial(door)
            assert channel is not None, answer
            for number in range(1, calls + 1):
                _wait_for_room(channel)
                byhand.send(channel, byhand.frame_bytes("Q", number, _data.pack_arguments((count,), {})[0]))
            if wrongly:
                byhand.send(channel, byhand.frame_bytes("R", 1, b""))
            here.kept.append(channel)


def hoard_wrongly(path: str, channels: int, calls: int, count: int) -> None:
    hoard(path, channels, calls, count, wrongly=True)


def ask_for_doors(path: str, count: int) -> None:
    """Ask for descriptors of the door itself, on as few channels as will do, and read none."""
    here.kept = []
    with byhand.reach(path) as door:
        byhand.receive(door).close()
        for _ in range(4):
            channel, answer = byhand.dial(door)
            assert channel is not None, answer
            for number in range(1, count // 4 + 1):
                _wait_for_room(channel)
                byhand.send(channel, byhand.frame_bytes("P", number, encode_hand_out(None)))
            here.kept.append(channel)


def get_some(path: str, count: int, **options: float) -> int:
    """Be given descriptors, as one should; return how many."""
    with Proxy(path, server={V}, timeout=PATIENCE, **options) as proxy:
        given = proxy(count)
    for one in given:
        one.close()
    return len(given)


def pass_throughout() -> None:
    """Pass descriptors to oneself until told to stop."""
    limit_descriptors(1024)
    here.passed, here.quiet = 0, threading.Event()

    def work() -> None:
        while not here.quiet.is_set():
            pass_one()
            here.passed += 1
            here.quiet.wait(0.001)

    here.passer = Background(work)


def passed() -> int:
    assert here.passer.running, "the kernel has refused one"
    return here.passed


def stop_passing() -> None:
    here.quiet.set()
    here.passer.result()


def refused() -> int:
    return here.server.statistics().refused


def usage_of(uid: int) -> Any:
    return here.server.statistics().users.get(uid, Usage())


def read_kept() -> None:
    """Read all that has come."""
    for channel in here.kept:
        with contextlib.suppress(ConnectionError):
            while byhand.readable(channel, 0) and (message := byhand.receive(channel)).data:
                message.close()


def read_first() -> None:
    """Read the first thing on each channel, which may be still to come: it counts before it is sent."""
    for channel in here.kept:
        byhand.receive(channel).close()


def all_is_read(server: Actor, *readers: Actor) -> bool:
    """Have strangers read on; tell whether there is nothing more to come."""
    for reader in readers:
        reader(read_kept)
    users = server(usage_of_all)
    return not any(user.unread or user.running or user.queued or user.descriptors > 100 for user in users)


def usage_of_all() -> list[Usage]:
    return list(here.server.statistics().users.values())


HOARDS = {
    "one channel": (hoard, 1, 180, 8),
    "many channels": (hoard, 30, 40, 1),
    "one result a channel": (hoard, 25, 1, 50),
    "channels that were closed": (hoard_wrongly, 30, 40, 1),
    "doors": (ask_for_doors, 600),
}


@pytest.mark.ids("F22")
@pytest.mark.parametrize("how", HOARDS)
def test_a_stranger_leaves_only_a_few_descriptors_of_results_unread(actor, path, how, root_only):
    """Of 1,024 that may be in flight he has 256, and every process of the server's user goes on."""
    server, stranger, mate, honest, own, other = (actor(uid) for uid in (V, M, M, M + 1, V, V))
    server(serve_gifts, path)
    before = server(descriptors)
    other(pass_throughout)
    what, *args = HOARDS[how]
    stranger(what, path, *args)
    wait_until(lambda: server(refused) > 0, timeout=PATIENCE)
    if what is hoard_wrongly:
        wait_until(lambda: server(usage_of, M).channels == 0, timeout=PATIENCE)
    with pytest.raises(BusyError) as caught:
        mate(get_some, path, 60)
    assert caught.value.may_have_run
    for text in (path, f"uid {M} would leave", "descriptors unread with the 60", "a user's limit is 256"):
        assert text in str(caught.value)
    assert 200 < server(usage_of, M).unread <= 256
    for one in (honest, own):
        assert one(get_some, path, 100) == 100
    some = other(passed)
    wait_until(lambda: other(passed) > some + 10, timeout=PATIENCE)
    lines = [line for line in server(logged) if "would leave" in line and "more such" not in line]
    assert len(lines) == 1, "an offender is named once"
    assert f"uid {M}" in lines[0]
    wait_until(lambda: all_is_read(server, stranger), timeout=PATIENCE)
    assert mate(get_some, path, 100) == 100
    other(stop_passing)
    stranger(close_answers)
    few_descriptors_more(server, before)
    wait_until(lambda: server(usage_of, M) == Usage(), timeout=PATIENCE)


@pytest.mark.ids("F22")
def test_who_dies_with_descriptors_unread_leaves_none(actor, path, root_only):
    server, stranger, mate = actor(V), actor(M), actor(M)
    server(serve_gifts, path)
    before = server(descriptors)
    stranger(hoard, path, 1, 1, 60)
    wait_until(lambda: server(usage_of, M).unread == 60, timeout=PATIENCE)
    stranger.kill()
    assert mate(get_some, path, 60) == 60
    few_descriptors_more(server, before)


def revoke() -> None:
    here.door.revoke()


@pytest.mark.ids("F22")
def test_a_goodbye_that_is_not_read_keeps_no_channel(actor, path, root_only):
    """Nor is what was read before it taken for unread."""
    server, stranger = actor(V), actor(M)
    server(serve_gifts, path)
    before = server(descriptors)
    stranger(hoard, path, 1, 1, 60)
    wait_until(lambda: server(usage_of, M).unread == 60, timeout=PATIENCE)
    stranger(read_first)
    server(revoke)
    wait_until(lambda: server(usage_of, M) == Usage(), timeout=PATIENCE)
    few_descriptors_more(server, before)
    assert stranger(first_byte) == b"G"
    stranger(close_answers)


def first_byte() -> bytes:
    return byhand.receive(here.kept[0]).data[:1]


@pytest.mark.ids("F22", "F23")
def test_many_strangers_leave_half_of_the_descriptors_unread_at_most(actor, path, root_only):
    server, other = actor(V), actor(V)
    strangers = [actor(M + number) for number in range(4)]
    server(serve_gifts, path)
    other(pass_throughout)
    for stranger in strangers[:3]:
        stranger(hoard, path, 2, 1, 100)
    wait_until(lambda: server(refused) == 1, timeout=PATIENCE)
    with pytest.raises(BusyError, match=r"callers of other users would leave 550 .* together is 512"):
        strangers[3](get_some, path, 50)
    some = other(passed)
    wait_until(lambda: other(passed) > some + 10, timeout=PATIENCE)
    strangers[0](read_kept)
    assert strangers[3](get_some, path, 50) == 50
    other(stop_passing)


def be_patient(seconds: float) -> None:
    _unread.PATIENCE = seconds


@pytest.mark.ids("F22")
def test_who_finds_no_room_waits_for_those_who_are_just_reading(actor, path, root_only):
    """So an honest stranger is not refused, however many files he gets at one time."""
    server, slow, mate = actor(V), actor(M), actor(M)
    server(serve_gifts, path)
    server(be_patient, 2 * PATIENCE)
    slow(hoard, path, 1, 1, 200)
    wait_until(lambda: server(usage_of, M).unread == 200, timeout=PATIENCE)
    result = mate.begin(get_some, path, 60)
    wait_until(lambda: server(usage_of, M).descriptors > 60, "it waits, and is counted", timeout=PATIENCE)
    assert mate.acting
    slow(read_kept)
    assert result() == 60
    assert server(refused) == 0
    slow(close_answers)


def get_often(path: str, threads: int, rounds: int, count: int) -> list[str]:
    """Be given descriptors by many threads at one time; return the errors."""
    errors = []

    def work() -> None:
        try:
            for _ in range(rounds):
                get_some(path, count)
        except Exception as error:
            errors.append(repr(error))

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    return errors


@pytest.mark.ids("F22")
def test_a_stranger_who_reads_is_never_refused(actor, path, root_only):
    server, honest = actor(V), [actor(M), actor(M), actor(M + 1)]
    server(serve_gifts, path)
    results = [one.begin(get_often, path, 4, 10, 40) for one in honest]
    for result in results:
        assert result(timeout=3 * PATIENCE) == []
    assert server(refused) == 0


@pytest.mark.ids("F22")
def test_our_own_are_bounded_all_together(actor, path):
    """They are trusted, and get an error in words that says what to do about it."""
    server, client = actor(os.geteuid()), actor(os.geteuid())
    server(serve, "raw", path, codec="RAW")
    server(limit_descriptors, 240)
    opened, refusals = client(knock_and_wait, path, 80, "kept")
    assert opened == 60
    (text,) = refusals
    assert "60 answers to all callers have not been read yet, and the limit is 60" in text
    with pytest.raises(BusyError, match="have not been read"):
        Handle(path)
    client(read_answers)
    with Handle(path) as handle:
        assert handle.call(b"x").data == b"x"


@pytest.mark.ids("F22")
def test_a_guest_that_dies_is_soon_forgotten(actor, path):
    """A client killed between knock and answer: nothing of it stays at the server."""
    server, client = actor(os.geteuid()), actor(os.geteuid())
    server(serve, "raw", path, codec="RAW")
    before = server(descriptors)
    client(knock_and_wait, path, 30, "kept")
    wait_until(lambda: server(guests) == 30, timeout=PATIENCE)
    client.kill()
    wait_until(lambda: server(descriptors) == before and server(guests) == 0, timeout=PATIENCE)


@pytest.mark.ids("F22")
def test_a_guest_that_hung_up_first_is_forgotten_when_he_reads(actor, path):
    """After the hang-up there is no event any more: the server looks again by itself."""
    server, client = actor(os.geteuid()), actor(os.geteuid())
    server(serve, "raw", path, codec="RAW")
    before = server(descriptors)
    client(knock_and_wait, path, 5, "SHUT_RDWR")
    wait_until(lambda: server(guests_looked_after) == 5, timeout=PATIENCE)
    client(close_answers)
    wait_until(lambda: server(guests) == 0 and server(descriptors) == before, timeout=PATIENCE)


def guests_looked_after() -> int:
    """How many have hung up and not read their answers."""
    return sum(guest.delay > _guests._SECOND_LOOK for guest in _guests.guests()._guests.values())


def guests() -> int:
    return len(_guests.guests()._guests)


# -- a client's own knocks -------------------------------------------------------------------------


@pytest.mark.ids("F22")
def test_a_client_leaves_few_knocks_unanswered():
    """A holder of a port who answers nothing cannot fill the client's share of what is in flight."""
    with rawpeer.RawServer() as server:
        handle = Handle(server.descriptor, lazy=True)
        calls = [Background(handle.call, b"x", timeout=PATIENCE) for _ in range(3 * FEW)]
        heard = []
        for _ in range(FEW):
            words, numbers = rawpeer.receive(server.port)
            assert words == rawpeer.knock()[:6] + words[6:]
            heard += numbers
        quiet = Background(rawpeer.receive, server.port)
        assert quiet._thread.join(0.2) is None
        assert quiet.running, "a knock too many"
        os.close(heard.pop())  # dropped: its thread knocks again, or another has its turn
        heard += quiet.result()[1]
        server.port.shutdown(socket.SHUT_RDWR)
        server.close()
        for number in heard:
            os.close(number)
        for one in calls:
            assert one.error() is not None
        handle.close()


# -- holders of one descriptor (U17) ---------------------------------------------------------------


def spoil(number: int, how: str) -> None:
    """Do to a door's descriptor what any holder can."""
    door = socket.socket(fileno=number)
    if how == "shut":
        door.shutdown(socket.SHUT_RDWR)
    elif how == "shut writing":
        door.shutdown(socket.SHUT_WR)
    elif how == "flip":
        door.setblocking(True)
    elif how == "empty":
        for _ in range(50):
            byhand.send(door, b"")
    elif how == "flood":
        ours, theirs = byhand.pair()
        with ours, theirs, contextlib.suppress(BlockingIOError):
            for _ in range(2000):
                byhand.send(
                    door, byhand.knock_bytes(), [theirs.fileno()], byhand.own_ids(), socket.MSG_DONTWAIT
                )
    here.spoilt = door


def holder_state() -> tuple[bool, int]:
    """Whether the door is there, and how many ports it has."""
    return here.door.revoked, len(here.door._ports)


@pytest.mark.ids("U17")
@pytest.mark.parametrize("how", ["shut", "shut writing", "flip", "empty", "flood"])
def test_holders_with_descriptors_of_their_own_share_no_fate(actor, path, how):
    """Three hold the door; what one does to his descriptor the others do not notice, nor is the door gone."""
    me = os.geteuid()
    server = actor(me)
    server(serve, "raw", path, codec="RAW")
    holders = [actor(me) for _ in range(3)]
    numbers = [server(open_descriptor) for _ in holders]
    for holder, number in zip(holders[1:], numbers[1:], strict=True):
        holder(open_client, "raw", Fd(number))
    ports = server(holder_state)[1]
    with undisturbed(actor(me), path):
        holders[0](spoil, Fd(numbers[0]), how)
        for holder in holders[1:]:
            assert holder(call, b"before and after") == b"before and after"
            holder(reopen)
            assert holder(call, b"anew") == b"anew"
    assert not server(holder_state)[0]
    # The port of the undisturbed one goes by and by.
    left = ports - 1 if how in ("shut", "shut writing") else ports
    wait_until(lambda: server(holder_state)[1] == left, timeout=PATIENCE)
    for number in numbers:
        os.close(number)


def reopen() -> None:
    """Have the next call knock again."""
    while here.client._idle:
        here.client._idle.pop().close()


@pytest.mark.ids("U17")
def test_who_shares_a_descriptor_shares_its_fate_and_is_told(actor, path):
    """Copies of one descriptor: shut for one, shut for all; calls in hand go on, later ones are told."""
    me = os.geteuid()
    server, holder, mate = actor(me), actor(me), actor(me)
    server(serve, "raw", path, codec="RAW")
    number = server(open_descriptor)
    mate(open_client, "raw", Fd(number))
    holder(spoil, Fd(number), "shut")
    assert mate(call, b"on a channel that was open") == b"on a channel that was open"
    mate(reopen)
    with pytest.raises(Exception, match="gone") as caught:
        mate(call, b"with a new one")
    assert not isinstance(caught.value, RevokedError)
    assert caught.value.may_have_run is False
    with Handle(path) as handle:
        assert handle.call(b"by the name").data == b"by the name"
    os.close(number)


# -- what comes back -------------------------------------------------------------------------------


def serve_back(path: str) -> None:
    """Answer with the descriptors of the call: its own list of them, or another one."""
    from doorpool.door import Door, Gate

    here.gate = Gate()
    here.door = Door(here.gate)
    here.door.listen(path, mode=0o666)

    def work() -> None:
        with contextlib.suppress(RevokedError, OSError):
            while (invocation := here.gate.wait()) is not None:
                own = invocation.descriptors
                invocation.reply(b"back", descriptors=own if invocation.data == b"same" else own[1:])

    here.thread = threading.Thread(target=work, daemon=True)
    here.thread.start()


def end_serving_back() -> None:
    here.door.revoke()
    here.gate.wake()
    here.thread.join(PATIENCE)
    assert not here.thread.is_alive()
    here.gate.close()
    here.gate.dispose()


def ask_back(path: str) -> list[list[bool]]:
    """Send three descriptors in each way; tell of those that came back whether they are the last ones."""
    found = []
    with Handle(path, server={V}) as handle:
        for way in (b"same", b"other"):
            ends = [*os.pipe(), os.open(os.devnull, os.O_RDONLY)]
            reply = handle.call(way, descriptors=ends, timeout=PATIENCE)
            last = ends[-len(reply.descriptors) :]
            found.append([os.path.sameopenfile(*pair) for pair in zip(reply.descriptors, last, strict=True)])
            for number in (*ends, *reply.descriptors):
                os.close(number)
    return found


@pytest.mark.ids("F22")
def test_what_a_stranger_has_sent_can_be_passed_back_to_him(actor, path, root_only):
    server, other = actor(V), actor(M)
    server(serve_back, path)
    before = server(descriptors)
    for _ in range(3):
        assert other(ask_back, path) == [[True] * 3, [True] * 2]
    wait_until(lambda: server(descriptors) == before, timeout=PATIENCE)
    server(end_serving_back)
