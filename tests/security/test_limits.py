"""
What each strange uid may have at one time: one that is at a limit is told so, and another is served.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest
from msgspec import msgpack
from support import byhand, rawpeer, wait_until
from support.actors import here, logged

from doorpool import BusyError, Descriptor, Endpoint, Limits, Proxy, Server, _gate, _guests, _janitor, take
from doorpool._doors import fresh
from doorpool._streams import Stream

PATIENCE = 20.0
A, B, C = 6701, 6702, 6703
DATA = 2
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("root_only")


def stream() -> Iterator[int]:
    """Give out a stream."""
    yield from range(1000)


def lasting() -> Iterator[int]:
    """Give out a stream that is long in ending."""
    try:
        yield from range(1000)
    finally:
        here.endings = endings() + 1
        here.gate.wait(PATIENCE)


def endings() -> int:
    return getattr(here, "endings", 0)


def session() -> Any:
    """Give out a door of its own, which is the default server's."""
    return Endpoint(Session(), name="session", codec="data")


def sessions() -> Iterator[Any]:
    """Give out a stream of doors."""
    while True:
        yield session()


def room() -> Any:
    """Give out a door of its own, which is this server's."""
    return here.server.attach(Session(), name="room", codec="data")


def bare() -> Any:
    """Give out a bare descriptor of the echo."""
    return take(here.echo.open())


def keep_given(*given: Descriptor) -> int:
    """Keep what is passed, beyond the call."""
    here.given = [*getattr(here, "given", []), *given]
    return len(given)


def close_at_once(*given: Descriptor) -> int:
    """Close what is passed; of files a janitor does that."""
    for one in given:
        one.close()
    return len(given)


class Session:
    """It may be entered, and whoever has done so has a lease."""

    def hello(self) -> str:
        return "hello"

    def __enter__(self) -> int:
        here.entered = entered() + 1
        return entered()

    def __exit__(self, *_: object) -> None:
        here.entered -= 1


def serve(path: str, threads: int = 64, **limits: int) -> None:
    """Serve an echo, and what waits until it is told to go on."""
    here.gate = threading.Event()

    def wait(value: int) -> int:
        here.gate.wait(PATIENCE)
        return value

    here.server = Server(max_threads=threads, limits=Limits(**limits))
    options: dict[str, Any] = {"codec": "data", "mode": 0o666}
    here.echo = here.server.attach(lambda value: value, path, name="echo", **options)
    here.server.attach(wait, f"{path}.wait", name="wait", **options)
    here.server.attach(lambda size: b"x" * size, f"{path}.much", name="much", **options)
    here.server.attach(lambda *given: wait(len(given)), f"{path}.hold", name="hold", **options)
    here.server.attach(keep_given, f"{path}.keep", name="keep", **options)
    here.server.attach(close_at_once, f"{path}.close", name="close", **options)
    here.server.attach(lambda given: given, f"{path}.back", name="back", **options)
    for kind in (stream, lasting, session, room, sessions, bare):
        here.server.attach(kind, f"{path}.{kind.__name__}", **options)
    here.server.attach(
        lambda: "hello", f"{path}.asked", name="asked", callers=let_in_when_told, codec="data", mode=0o666
    )
    here.server.start()


def let_in_when_told(who: Any) -> bool:
    """Take long about one of the users."""
    return who.uid != A or here.gate.wait(PATIENCE)


def resident() -> int:
    """How many bytes of memory this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def usage(uid: int) -> dict[str, int]:
    found = here.server.statistics().users.get(uid)
    return {} if found is None else attrs.asdict(found)


def users() -> list[int | None]:
    return list(here.server.statistics().users)


def refused() -> int:
    return int(here.server.statistics().refused)


def let_go() -> None:
    here.gate.set()


def open_some(path: str, count: int) -> tuple[int, list[str]]:
    """Open a door so often; return how often that went well, and what was said otherwise."""
    here.open, refusals = [], []
    for _ in range(count):
        try:
            here.open.append(Proxy(path, server={0}, timeout=PATIENCE))
        except BusyError as error:
            refusals.append(f"{error}, may_have_run={error.may_have_run}")
    return len(here.open), refusals


def close_some(count: int) -> None:
    for _ in range(count):
        here.open.pop().close()


def call_once(path: str, value: Any) -> Any:
    with Proxy(path, server={0}, timeout=PATIENCE) as proxy:
        return proxy(value)


def begin_calls(path: str, count: int) -> None:
    """Begin calls, each in a thread and on a channel of its own."""
    here.proxy, here.results, here.errors = Proxy(path, server={0}, timeout=PATIENCE), [], []

    def work(number: int) -> None:
        try:
            here.results.append(here.proxy(number))
        except Exception as error:
            here.errors.append(error)

    here.threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for thread in here.threads:
        thread.start()


def ended() -> tuple[int, list[str]]:
    """How many of them have a result, and what the others were told."""
    return len(here.results), [f"{type(error).__name__}: {error}" for error in here.errors]


def settle(server: Any, uid: int, **expected: int) -> None:
    """Wait until a user has so much of something."""
    wait_until(lambda: expected.items() <= server(usage, uid).items(), timeout=PATIENCE)


def sole_line(server: Any, text: str) -> str:
    """Return the line of the log that has a text: an offender is named once, not for each event."""

    def found() -> list[str]:
        return [line for line in server(logged) if text in line and "more such" not in line]

    wait_until(found, timeout=PATIENCE)
    (line,) = found()
    return line


@pytest.fixture
def serving(actor, path):
    def start(**limits: int) -> Any:
        server = actor(0)
        server(serve, path, **limits)
        return server

    return start


@pytest.fixture
def set_nofile() -> Iterator[Callable[[int], None]]:
    """Set the soft limit of open files, and raise the hard one if need be; both are put back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda value: resource.setrlimit(resource.RLIMIT_NOFILE, (value, max(value, hard)))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.ids("F07")
def test_one_uid_opens_channels_until_it_is_refused_and_another_is_served(serving, actor, path):
    server, one, other = serving(channels=5), actor(A), actor(B)
    opened, refusals = one(open_some, path, 20)
    assert opened == 5
    assert len(refusals) == 15
    for text in (path, "channels", f"uid {A}", "limit is 5", "may_have_run=False"):
        assert text in refusals[0]
    assert server(usage, A)["channels"] == 5
    assert other(call_once, path, "hello") == "hello"
    mates = actor(A)
    assert mates(open_some, path, 1)[0] == 0, "the limit is the uid's, whichever process it is"
    one(close_some, 2)
    settle(server, A, channels=3)
    assert mates(open_some, path, 5)[0] == 2
    assert server(refused) >= 19
    lines = [line for line in server(logged) if "channels open" in line]
    assert len(lines) == 1, "an offender is named once, not for each event"
    assert f"uid={A}" in lines[0] or f"uid {A}" in lines[0]


@pytest.mark.ids("B04")
@pytest.mark.parametrize("uid", [2**31, 3_000_000_000, 2**32 - 3])
def test_a_large_uid_has_a_share_of_its_own(serving, actor, path, uid):
    """By the number that it is: neither by its negative twin, nor with all who are not named."""
    server, one, other = serving(channels=3), actor(uid), actor(uid - 1)
    opened, refusals = one(open_some, path, 5)
    assert (opened, len(refusals)) == (3, 2)
    assert f"uid {uid} has 3 channels" in refusals[0]
    assert server(usage, uid)["channels"] == 3
    assert server(users) == [uid]
    assert other(call_once, path, "hello") == "hello"
    assert f"uid={uid}" in sole_line(server, "channels open")
    one(close_some, 3)
    wait_until(lambda: server(users) == [], timeout=PATIENCE)


@pytest.mark.ids("F07")
def test_one_uid_connects_until_it_has_its_descriptors_and_another_is_served(serving, actor, path):
    server, one, other = serving(descriptors=20), actor(A), actor(B)
    assert one(connect, path, 100) == 20
    assert server(usage, A)["descriptors"] == 20
    refusals = actor(A)(open_some, path, 1)[1]
    for text in (path, "descriptors", f"uid {A}", "20"):
        assert text in refusals[0]
    assert other(call_once, path, "hello") == "hello"
    assert len([line for line in server(logged) if "dropped a connection" in line]) == 1
    one(disconnect)
    wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)
    assert one(call_once, path, "again") == "again"


def connect(path: str, count: int) -> int:
    here.kept = [byhand.reach(path) for _ in range(count)]
    greeting = byhand.greeting_bytes()[:4]
    return sum(byhand.receive(sock).data[:4] == greeting for sock in here.kept)


def disconnect() -> None:
    while here.kept:
        here.kept.pop().close()


def keep_some(path: str, count: int) -> tuple[int, list[str]]:
    """Have a door give out so many others, and keep them; return how many came, and what was said else."""
    here.giver, here.kept = Proxy(path, server={0}, timeout=PATIENCE), []
    return keep_more(count)


def keep_more(count: int) -> tuple[int, list[str]]:
    refusals = []
    for _ in range(count):
        try:
            here.kept.append(here.giver())
        except BusyError as error:
            refusals.append(f"{error}, may_have_run={error.may_have_run}")
    return len(here.kept), refusals


def use_kept() -> list[Any]:
    """Use the first of what was kept, and the last."""
    ends = here.kept[0], here.kept[-1]
    return [next(it) if isinstance(it, Stream) else it.hello() for it in ends]


def serve_front(path: str, inner: str) -> None:
    """Hand out somebody else's door."""
    here.door, here.server = Proxy(inner, server={0}, timeout=PATIENCE), Server()
    here.server.attach(lambda: here.door, path, name="front", codec="data", mode=0o666)
    here.server.start()


@pytest.mark.ids("F07")
def test_a_door_that_a_front_hands_on_counts_as_that_of_who_gets_it(serving, actor, path):
    """The front is of the server's own user, who has no share; the server is told whose it will be."""
    server, front, one, other = serving(descriptors=20), actor(0), actor(A), actor(B)
    outer = f"{path}.front"
    front(serve_front, outer, path)
    kept, refusals = one(keep_some, outer, 30)
    assert kept == 20
    for text in (outer, path, "20 descriptors", f"uid {A}", "limit is 20", "may_have_run=True"):
        assert text in refusals[0]
    assert server(usage, A)["descriptors"] == 20
    assert f"uid {A}" in sole_line(server, "limit is 20")
    assert not [line for line in front(logged) if "Traceback" in line]
    assert other(keep_some, outer, 5) == (5, [])
    one(disconnect)
    wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)
    assert one(keep_more, 5) == (5, [])


def ask_often(path: str, uid: int) -> tuple[int, str]:
    """Ask for descriptors of a door, for somebody; return how many came, and what was said then."""
    here.giver, here.kept = Proxy(path, server={0}, timeout=PATIENCE), []
    try:
        while True:
            here.kept.append(fresh(here.giver, uid))
    except BusyError as error:
        return len(here.kept), str(error)


@pytest.mark.parametrize("claimed", [0, A, B])
def test_a_stranger_asks_for_himself_whoever_he_says_it_is_for(serving, actor, path, claimed):
    server, one = serving(descriptors=20), actor(A)
    kept, refusal = one(ask_often, path, claimed)
    assert kept == 17
    for text in (path, "20 descriptors", f"uid {A}", "limit is 20"):
        assert text in refusal
    assert server(usage, A)["descriptors"] == 20
    assert server(usage, B) == {}
    assert actor(B)(call_once, path, "hello") == "hello"


GIVEN = [("stream", [0, 0]), ("session", ["hello", "hello"])]


@pytest.mark.ids("F07")
@pytest.mark.parametrize(("kind", "said"), GIVEN, ids=["streams", "sessions"])
def test_one_uid_keeps_doors_and_streams_until_it_is_refused_and_another_is_served(
    serving, actor, path, kind, said
):  # fmt: skip
    """What is given out in results is the stranger's who has it, like what he has come by."""
    server, one, other = serving(descriptors=20), actor(A), actor(B)
    kept, refusals = one(keep_some, f"{path}.{kind}", 50)
    assert kept == 17, "one for each, and three for the way to the first door"
    for text in (f"{path}.{kind}", "20 descriptors", f"uid {A}", "limit is 20", "may_have_run=True"):
        assert text in refusals[0]
    assert server(usage, A)["descriptors"] == 20
    assert server(refused) >= 33
    assert f"uid {A}" in sole_line(server, "limit is 20")
    assert not [line for line in server(logged) if "Traceback" in line]
    for served in (other, actor(0)):
        assert served(keep_some, f"{path}.{kind}", 5) == (5, [])
        assert served(use_kept) == said
    assert server(usage, 0) == {}
    one(disconnect)
    settle(server, A, descriptors=3)
    assert one(keep_more, 5) == (5, [])
    assert one(use_kept) == said


@pytest.mark.ids("F07")
def test_streams_that_were_dropped_count_until_they_have_ended(serving, actor, path):
    """Who drops them faster than they end would have them in no count at all."""
    server, one, other = serving(descriptors=20), actor(A), actor(B)
    assert one(begin_streams, f"{path}.lasting", 5) == 5
    assert server(usage, A)["descriptors"] == 3 + 5 * 3  # the way to the door; of each its own, and a channel
    one(drop)
    wait_until(lambda: server(endings) > 0, timeout=PATIENCE)
    settle(server, A, descriptors=3 + 5)
    kept, refusals = one(keep_more, 13)
    assert kept == 12
    for text in (f"{path}.lasting", "20 descriptors", f"uid {A}", "limit is 20", "may_have_run=True"):
        assert text in refusals[0]
    assert other(begin_streams, f"{path}.lasting", 5) == 5
    server(let_go)
    settle(server, A, descriptors=3 + 12)
    assert server(endings) == 5


def drop() -> None:
    """Have no more of what was kept, and wait for nothing."""
    here.kept.clear()


def begin_streams(path: str, count: int) -> int:
    """Have so many streams, and the first item of each."""
    kept, _ = keep_some(path, count)
    assert [next(it) for it in here.kept] == kept * [0]
    return kept


def test_our_own_user_keeps_as_many_doors_and_streams_as_there_is_room_for(serving, actor, path):
    server, own = serving(descriptors=5), actor(0)
    for kind, said in GIVEN:
        assert own(keep_some, f"{path}.{kind}", 20) == (20, [])
        assert own(use_kept) == said
    assert server(usage, 0) == {}


@pytest.mark.ids("F07")
def test_a_bare_descriptor_of_a_door_counts_as_its_makers(serving, actor, path):
    """Not as that of who gets it, for whose it would be was not known when it was made: docs/security.md."""
    server, one = serving(descriptors=10), actor(A)
    assert one(keep_some, f"{path}.bare", 20) == (20, [])
    settle(server, A, descriptors=3)  # for the way to the door that gives them out
    one(disconnect)


def keep_from_stream(path: str) -> tuple[int, str]:
    """Keep the doors that a stream brings; return how many, and what was said then."""
    here.giver, here.kept = Proxy(path, server={0}, timeout=PATIENCE), []
    here.stream = here.giver()
    try:
        for one in here.stream:
            here.kept.append(one)
    except BusyError as error:
        return len(here.kept), f"{error}, may_have_run={error.may_have_run}"
    raise AssertionError("the stream has an end")


@pytest.mark.ids("F07")
def test_one_uid_pulls_doors_out_of_a_stream_until_it_is_refused(serving, actor, path):
    """Of ten, three are for the way to the door and three for the stream; a batch may be too many."""
    server, one, other = serving(descriptors=10), actor(A), actor(B)
    kept, refusal = one(keep_from_stream, f"{path}.sessions")
    assert 3 <= kept <= 4
    for text in ("sessions", "descriptors", f"uid {A}", "limit is 10", "may_have_run=True"):
        assert text in refusal
    assert other(call_once, path, "hello") == "hello"
    one(disconnect)
    assert server(refused) >= 1


def enter_all() -> list[str]:
    """Enter all sessions that were kept; return what was said where that failed."""
    here.inside, refusals = [], []
    for one in here.kept:
        try:
            one.__enter__()
        except BusyError as error:
            refusals.append(f"{error}, may_have_run={error.may_have_run}")
        else:
            here.inside.append(one)
    return refusals


def leave_all() -> None:
    while here.inside:
        here.inside.pop().__exit__(None, None, None)


def entered() -> int:
    return int(getattr(here, "entered", 0))


@pytest.mark.ids("F07")
def test_one_uid_enters_until_it_is_refused_and_has_not_entered_then(serving, actor, path):
    """A session is one descriptor, its channel two, and the lease of who has entered it one."""
    server, one, other = serving(descriptors=18), actor(A), actor(B)
    for stranger in (one, other):
        assert stranger(keep_some, f"{path}.room", 4) == (4, [])
    refusals = one(enter_all)
    assert len(refusals) == 1
    for text in ("room", "18 descriptors", f"uid {A}", "limit is 18", "may_have_run=False"):
        assert text in refusals[0]
    assert server(entered) == 3
    assert len(other(enter_all)) == 1
    assert server(entered) == 6
    for stranger in (one, other):
        stranger(leave_all)
    assert server(entered) == 0
    for uid in (A, B):
        settle(server, uid, descriptors=3)


def limit_descriptors(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def bring(path: str, channels: int, count: int, *, half: bool = False) -> None:
    """
    Make calls that bring so many descriptors each, and read no answer.

    Args:
        half: send only their beginnings.
    """
    here.kept = [*getattr(here, "kept", [])]
    pipe, _ = fds = os.pipe()  # closing the end of one needs no janitor
    body = msgpack.encode(([msgpack.Ext(1, place.to_bytes(4, "big")) for place in range(count)], {}))
    whole = byhand.frame_bytes("Q", 1, body, descriptors=count)
    with byhand.reach(path) as door:
        byhand.receive(door).close()
        for _ in range(channels):
            channel, answer = byhand.dial(door)
            assert channel is not None, answer
            byhand.send(channel, whole[:-1] if half else whole, [pipe] * count)
            here.kept.append(channel)
    for fd in fds:
        os.close(fd)


def first_bytes() -> list[bytes]:
    """With which frame each channel was answered that was; they stay unread."""
    return [_peek(it)[:1] for it in here.kept if byhand.readable(it, 0)]


def _peek(channel: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionResetError):  # told once, before: our call was not even read
        return byhand.receive(channel, flags=socket.MSG_PEEK).data
    return byhand.receive(channel, flags=socket.MSG_PEEK).data


def pass_some(path: str, count: int) -> int:
    """Open a door and pass it descriptors; return how many have come."""
    ends = [Descriptor(number) for _ in range((count + 1) // 2) for number in os.pipe()]
    with contextlib.ExitStack() as stack:
        for end in ends:
            stack.enter_context(end)
        return int(stack.enter_context(Proxy(path, server={0}, timeout=PATIENCE))(*ends[:count]))


def table() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.ids("F07")
@pytest.mark.parametrize("half", [False, True], ids=["whole", "begun"])
def test_one_uid_brings_descriptors_until_it_is_refused_and_others_are_served(serving, actor, path, half):
    """What a call has brought counts until it is answered, and from its first packet on."""
    server, one, mate, other, own = serving(), actor(A), actor(A), actor(B), actor(0)
    server(limit_descriptors, 1024)
    before = server(table)
    one(bring, f"{path}.hold", 6, 200, half=half)
    wait_until(lambda: server(refused) == 5, timeout=PATIENCE)
    wait_until(lambda: len(one(first_bytes)) >= 5, timeout=PATIENCE)
    assert 200 < server(usage, A)["descriptors"] <= 200 + 2 * 6
    wait_until(lambda: server(table) < before + 250, "what was refused is closed", timeout=PATIENCE)
    with pytest.raises(BusyError) as caught:
        mate(pass_some, f"{path}.keep", 200)
    assert not caught.value.may_have_run
    for text in (f"{path}.keep", f"uid {A} has 4", "descriptors with the 200 of this call", "limit is 384"):
        assert text in str(caught.value)
    for served in (other, own):
        assert served(pass_some, f"{path}.keep", 100) == 100
        assert served(call_once, path, "hello") == "hello"
    assert f"uid {A} has" in sole_line(server, "limit is 384")
    server(let_go)
    one(disconnect)
    wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)
    assert one(pass_some, f"{path}.keep", 200) == 200


def begin_ping(path: str, count: int) -> None:
    """Send a ping that brings descriptors, all but its last byte."""
    pipe, _ = fds = os.pipe()
    whole = byhand.frame_bytes("P", 1, b"what no ping has", descriptors=count)
    with byhand.reach(path) as door:
        byhand.receive(door).close()
        channel, answer = byhand.dial(door)
        assert channel is not None, answer
        byhand.send(channel, whole[:-1], [pipe] * count)
    here.kept, here.rest = [channel], whole[-1:]
    for fd in fds:
        os.close(fd)


def end_ping() -> bytes:
    """Send the rest; return the kind of what is answered."""
    byhand.send(here.kept[0], here.rest)
    return byhand.receive(here.kept[0]).data[:1]


@pytest.mark.ids("F07")
def test_what_was_brought_and_is_not_run_counts_no_longer_than_it_is_here(serving, actor, path):
    """It was counted from its first packet on, and was closed when the whole of it was looked at."""
    server, one = serving(), actor(A)
    before = server(table)
    one(begin_ping, path, 100)
    wait_until(lambda: server(usage, A).get("descriptors", 0) >= 100, timeout=PATIENCE)
    assert one(end_ping) == b"A"
    wait_until(lambda: server(usage, A)["descriptors"] <= 2, "only those of his channel", timeout=PATIENCE)
    wait_until(lambda: server(table) < before + 50, timeout=PATIENCE)
    one(disconnect)
    wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)


@pytest.mark.ids("F07")
def test_many_uids_bring_no_more_descriptors_than_all_strangers_may_and_our_own_passes(serving, actor, path):
    server, strangers, own = serving(), [actor(A + number) for number in range(4)], actor(0)
    server(limit_descriptors, 1024)
    for stranger in strangers:
        stranger(bring, f"{path}.hold", 1, 230)
    wait_until(lambda: server(refused) == 1, timeout=PATIENCE)
    text = sole_line(server, "their limit together is 768")
    assert "callers of other users hold 9" in text, "920 and what there is of channels"
    assert own(pass_some, f"{path}.keep", 100) == 100
    for stranger in strangers:
        stranger(disconnect)
    wait_until(lambda: own(pass_some, f"{path}.keep", 100) == 100, timeout=PATIENCE)


def pass_much(path: str, count: int, size: int) -> int:
    """Pass descriptors, and more beside them than goes into a packet."""
    ends = [Descriptor(number) for _ in range((count + 1) // 2) for number in os.pipe()]
    with contextlib.ExitStack() as stack:
        for end in ends:
            stack.enter_context(end)
        proxy = stack.enter_context(Proxy(path, server={0}, timeout=PATIENCE))
        return len(proxy([b"x" * size, *ends[:count]])[0])


@pytest.mark.ids("F07")
def test_a_long_call_that_brings_too_many_did_not_run(serving, actor, path):
    """Its descriptors come before the rest; whoever is still sending it is told."""
    server, one = serving(descriptors=30), actor(A)
    for size in (10, 4 * MIB):
        for _ in range(3):
            with pytest.raises(
                BusyError, match="with the 28 of this call, and a user's limit is 30"
            ) as caught:
                one(pass_much, path, 28, size)
            assert not caught.value.may_have_run
        assert one(pass_much, path, 20, size) == size
        wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)


@pytest.mark.ids("F07")
def test_what_a_procedure_keeps_of_a_call_is_the_servers_own(serving, actor, path):
    server, one = serving(descriptors=30), actor(A)
    for _ in range(3):
        assert one(pass_some, f"{path}.keep", 20) == 20
    wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)
    with pytest.raises(BusyError, match="33 descriptors with the 30 of this call, and a user's limit is 30"):
        one(pass_some, f"{path}.keep", 30)
    server(close_given, 60)


def close_given(count: int) -> None:
    assert len(here.given) == count
    while here.given:
        here.given.pop().close()


# -- what waits for janitors


def hold_closes() -> None:
    """Be as if whatever janitors have in hand were never closed, until they are let go."""
    here.closes, closing = threading.Event(), _janitor._close

    def close(number: Any) -> None:
        here.closes.wait(PATIENCE)
        closing(number)

    _janitor._close = close


def let_closes_go() -> None:
    here.closes.set()


def be_patient(seconds: float) -> None:
    """Let a close take so long."""
    _janitor.PATIENCE = _gate.PATIENCE = seconds


def pass_null(count: int) -> int:
    """Pass files, whose close might block, to a door that is open."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.devnull)) for _ in range(count)]
        return int(here.open[0](*files))


def be_at(path: str, count: int, how: str) -> None:
    """Have so many connections, if it is for knocks, or else so many channels."""
    with byhand.reach(path) as door:
        here.kept = [byhand.reach(path) if how == "knocks" else byhand.dial(door)[0] for _ in range(count)]


def send_files(count: int, how: str) -> None:
    """
    Send files everywhere, at one moment, and hear nothing of what is said to it.

    Args:
        how: as a call that is whole; as one that is not; in an empty packet; in the middle of a frame; where
            knocks are heard.
    """
    body = msgpack.encode(([msgpack.Ext(1, place.to_bytes(4, "big")) for place in range(count)], {}))
    whole = byhand.frame_bytes("Q", 1, body, descriptors=count)
    others = {"half": whole[:-1], "empty": b"", "middle": whole[-1:], "knocks": b"no knock"}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.devnull)).fileno() for _ in range(count)]
        for channel in here.kept:
            if how == "middle":
                byhand.send(channel, whole[:-1])
            byhand.send(channel, others.get(how, whole), files)


def connect_often(path: str, count: int) -> int:
    """Connect and stay; return how many connections were greeted."""
    here.kept = [byhand.reach(path) for _ in range(count)]
    return sum(byhand.receive(one).data[:4] == byhand.greeting_bytes()[:4] for one in here.kept)


def held_by_all() -> int:
    return sum(one.descriptors for one in here.server.statistics().users.values())


def put_off() -> int:
    """How many channels are not read now, until something is closed."""
    return sum(served.put_off > 0 for served in here.server._shared_pool.gate._served.values())


def are_held_up() -> bool:
    """Whether both janitors of a user are at work, and no thread lingers that has looked before."""
    channels = here.server._shared_pool.gate._served.values()
    return len(_janitor._crew._busy) == _janitor.AT_MOST_HIS and not any(it.claim.locked() for it in channels)


@pytest.mark.ids("F07", "F20")
def test_what_a_call_has_brought_counts_until_it_is_closed(serving, actor, path):
    """And not until the call is answered: it is in our table as long as janitors are held up."""
    server, one, mate, other = serving(descriptors=120), actor(A), actor(A), actor(B)
    assert one(open_some, f"{path}.close", 1) == (1, [])
    server(hold_closes)
    assert one(pass_null, 100) == 100
    settle(server, A, descriptors=100 + 3)  # and his connection, and his channel
    assert mate(connect_often, path, 30) == 120 - 103
    assert "120 descriptors, and a user's limit is 120" in sole_line(server, "dropped a connection")
    assert other(call_once, path, "hello") == "hello"
    mate(disconnect)
    server(let_closes_go)
    settle(server, A, descriptors=3)
    assert one(pass_null, 100) == 100


@pytest.mark.ids("F07", "F20", "F23")
@pytest.mark.parametrize("how", ["whole", "half", "empty", "middle", "knocks"])
def test_files_that_are_not_closed_leave_room_for_our_own(serving, actor, path, how):
    """Nobody's are taken in hand for which there is no room among what all strangers may have."""
    server, own = serving(), actor(0)
    strangers = [actor(A + number) for number in range(5)]
    server(limit_descriptors, 1024)
    before = server(table)
    server(hold_closes)
    server(let_go)  # procedures
    for stranger in strangers:
        stranger(be_at, f"{path}.close", 4, how)
    for stranger in strangers:
        stranger(send_files, 240, how)
    for _ in range(5):
        assert own(pass_some, f"{path}.keep", 100) == 100
        server(close_given, 100)
    assert server(table) - before < 768 + 70  # of all strangers, and few besides
    looked_at = 3 * 4 * 5 if how == "knocks" else 0  # a look takes so many, if no janitor is at work yet
    wait_until(lambda: server(held_by_all) <= 768 + looked_at, "what is closed counts once", timeout=PATIENCE)
    server(let_closes_go)
    for stranger in strangers:
        stranger(disconnect)
    wait_until(lambda: not server(users), timeout=PATIENCE)
    wait_until(lambda: server(table) < before + 20, timeout=PATIENCE)


@pytest.mark.ids("F07", "F20")
@pytest.mark.parametrize(("limit", "count"), [(150, 40), (40, 25)], ids=["much waits", "no room"])
def test_who_calls_again_before_his_files_are_closed_is_not_refused(serving, actor, path, limit, count):
    """His call waits for that, and holds no thread."""
    server, one = serving(descriptors=limit, threads=4), actor(A)
    server(hold_closes)
    server(be_patient, PATIENCE)
    assert one(open_some, f"{path}.close", 1) == (1, [])
    assert one(pass_null, count) == count
    wait_until(lambda: server(are_held_up), timeout=PATIENCE)
    result = one.begin(pass_null, count)
    wait_until(lambda: server(put_off) == 1, timeout=PATIENCE)
    assert actor(B)(call_once, path, "hello") == "hello"
    assert one.acting
    server(let_closes_go)
    assert result() == count
    assert server(refused) == 0
    settle(server, A, descriptors=3)  # his connection, and his channel


@pytest.mark.ids("F07", "F20")
def test_nobody_waits_for_ever_for_what_is_not_closed(serving, actor, path):
    server, one = serving(), actor(A)
    assert one(open_some, f"{path}.close", 1) == (1, [])
    server(hold_closes)
    server(be_patient, 0.5)
    assert one(pass_null, 40) == 40
    wait_until(lambda: server(are_held_up), timeout=PATIENCE)
    with pytest.raises(BusyError, match="takes too long"):
        one(pass_null, 0)
    server(let_closes_go)
    wait_until(lambda: server(usage, A)["descriptors"] <= 1, timeout=PATIENCE)
    assert one(pass_null, 40) == 40


def note_passing() -> None:
    """Take note of how many descriptors a user has while a result with some is being sent."""
    from doorpool._door import Door

    begin, here.noted = Door.begin_passing, []

    def noted(door: Any, served: Any, count: int) -> Any:
        here.noted.append(usage(A)["descriptors"])
        return begin(door, served, count)

    Door.begin_passing = noted


def noted() -> list[int]:
    return list(here.noted)


def be_given_back(path: str, count: int) -> int:
    """Pass descriptors to who gives them back."""
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(Descriptor(number)) for number in os.pipe()]
        back = stack.enter_context(Proxy(path, server={0}, timeout=PATIENCE))(ends * (count // 2))
        for one in back:
            one.close()
        return len(back)


@pytest.mark.ids("F07")
def test_what_is_passed_back_counts_until_it_is_sent(serving, actor, path):
    """Whoever does not read it holds its sending up, and it is in our table."""
    server, one = serving(), actor(A)
    server(note_passing)
    assert one(be_given_back, f"{path}.back", 20) == 20
    assert server(noted) == [20 + 3]  # its channel has two, and the connection is one
    wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)


def knock_often(path: str, count: int) -> None:
    """Knock, and leave the answers unread."""
    here.kept = []
    for _ in range(count):
        door = byhand.reach(path)
        here.kept += [door, byhand.knock(door)]


@pytest.mark.ids("F05", "F07")
def test_one_uid_leaves_answers_unread_up_to_its_limit_and_another_is_served(serving, actor, path):
    server, one, other = serving(greetings=4), actor(A), actor(B)
    one(knock_often, path, 10)
    settle(server, A, greetings=4)
    opened, refusals = actor(A)(open_some, path, 1)
    assert opened == 0
    for text in (path, f"4 answers to uid {A}", "the limit is 4"):
        assert text in refusals[0]
    assert f"uid={A}" in sole_line(server, "4 answers")
    assert other(call_once, path, "hello") == "hello"
    one(disconnect)
    wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)
    assert one(call_once, path, "again") == "again"


@pytest.mark.ids("F07")
def test_one_uid_knocks_while_it_is_being_asked_about_and_another_is_let_in(serving, actor, path):
    server, one, mates, other = serving(greetings=4), actor(A), actor(A), actor(B)
    door = f"{path}.asked"
    one(knock_often, door, 4)
    settle(server, A, greetings=4, channels=0)
    assert server(refused) == 0
    opened, refusals = mates(open_some, door, 1)
    assert opened == 0
    for text in (door, f"4 knocks of uid {A}", "the limit is 4", "may_have_run=False"):
        assert text in refusals[0]
    assert server(refused) == 1
    assert mates(open_some, door, 1)[0] == 0
    assert server(refused) == 2
    assert f"uid={A}" in sole_line(server, "4 knocks")
    assert server(usage, A)["greetings"] == 4
    assert other(call, door) == "hello"
    server(let_go)
    settle(server, A, greetings=4, channels=4)  # they are answered, and have not read it
    one(disconnect)
    wait_until(lambda: server(usage, A) == server(usage, B) == {}, timeout=PATIENCE)
    assert mates(call, door) == "hello"


@pytest.mark.ids("F07")
def test_a_knock_that_is_asked_about_has_its_descriptors(serving, actor, path):
    """Its socket, and the process that it names; the connection that it came by is another."""
    server, one, mates, other = serving(descriptors=8), actor(A), actor(A), actor(B)
    door = f"{path}.asked"
    one(knock_often, door, 2)
    settle(server, A, greetings=2, descriptors=6)
    opened, (refusal,) = mates(open_some, door, 1)
    assert opened == 0
    for text in (door, "7 descriptors", f"uid {A}", "limit is 8", "may_have_run=False"):
        assert text in refusal
    assert other(call, door) == "hello"
    server(let_go)
    one(disconnect)
    wait_until(lambda: server(usage, A) == server(usage, B) == {}, timeout=PATIENCE)
    assert mates(call, door) == "hello"


def call(path: str) -> Any:
    with Proxy(path, server={0}, timeout=PATIENCE) as proxy:
        return proxy()


def flood(path: str, count: int) -> tuple[int, set[str], int]:
    """Open a door so often; return how often that went well, what was said otherwise, and how often."""
    opened, refusals = open_some(path, count)
    return opened, set(refusals), len(refusals)


@pytest.mark.ids("F07")
def test_one_uid_opens_as_many_channels_as_it_may_by_default_and_another_is_served(
    serving, actor, path, set_nofile, many
):  # fmt: skip
    set_nofile(8_192)  # or its descriptors would be the uid's limit
    server, one, other = serving(), actor(A), actor(B)
    count = many(300, 5_000)
    opened, refusals, times = one.begin(flood, path, count)(timeout=60 * PATIENCE)
    assert (opened, times) == (256, count - 256)
    assert server(usage, A)["channels"] == opened
    (refusal,) = refusals
    for text in (path, f"uid {A} has 256 channels", "limit is 256", "may_have_run=False"):
        assert text in refusal
    assert server(refused) == count - 256
    assert other(call_once, path, "hello") == "hello"
    assert f"uid={A}" in sole_line(server, "channels open")


@pytest.mark.ids("F04")
def test_hundreds_of_clients_call_at_once_and_each_is_answered_or_told(serving, actor, path, many):
    """No more of each uid run and wait than may, and our own user is served meanwhile."""
    users, clients = many(4, 8), many(75, 250)
    most_threads, running, queued = 4 * users, 3, 16  # strangers have three quarters of them together
    server = serving(threads=most_threads, running=running, queued=queued)
    before = server(threads)
    strangers = {A + number: actor(A + number) for number in range(users)}
    for stranger in strangers.values():
        stranger(begin_calls, f"{path}.wait", clients)
    taken = running + queued
    for uid, stranger in strangers.items():
        settle(server, uid, running=running, queued=queued)
        wait_until(lambda each=stranger: len(each(ended)[1]) == clients - taken, timeout=PATIENCE)
    assert server(threads) <= before + most_threads
    assert server(refused) == users * (clients - taken)
    assert actor(0)(call_once, path, "hello") == "hello"
    for uid in strangers:
        assert f"uid={uid}" in sole_line(server, f"uid {uid} has {queued} calls waiting")
    server(let_go)
    for uid, stranger in strangers.items():
        wait_until(lambda each=stranger: each(ended)[0] == taken, timeout=PATIENCE)
        (said,) = set(stranger(ended)[1])
        for text in ("BusyError", f"{path}.wait", f"uid {uid} has {queued} calls", f"limit is {queued}"):
            assert text in said


def claim_much(path: str, count: int, size: int) -> None:
    """Begin requests that are to be so long, each on a channel of its own, and send no more than a packet."""
    here.door = byhand.reach(path)
    byhand.receive(here.door).close()
    here.kept = [here.door]
    for _ in range(count):
        channel, answer = byhand.dial(here.door)
        assert channel is not None, answer
        here.kept.append(channel)
        byhand.send(channel, rawpeer.frame(rawpeer.REQUEST, 1, bytes(1000), length=size))


def told() -> tuple[int, set[tuple[int, str, tuple[int, int]]]]:
    """On how many of those channels something came, and what; it is left there."""
    came = [byhand.receive(it, flags=socket.MSG_PEEK).data for it in here.kept[1:] if byhand.readable(it, 0)]
    frames = [rawpeer.Received(data[: rawpeer.HEAD], data[rawpeer.HEAD :]) for data in came]
    return len(frames), {(frame.reason, frame.text, frame.limits) for frame in frames}


@pytest.mark.ids("F08")
def test_a_uid_claims_on_each_channel_as_much_as_a_request_may_have(serving, actor, path, set_nofile, many):
    """What goes over its share is refused from the header alone; the others take a MiB each, and no more."""
    set_nofile(8_192)
    count, size, limit = many(Limits().channels, 1_000), 16 * MIB, Limits().bytes
    server, one, other = serving(threads=1, channels=count), actor(A), actor(B)
    assert other(call_once, path, "hello") == "hello"
    memory = server(resident)
    one(claim_much, path, count, size)
    wait_until(lambda: one(told)[0] == count - limit // size, timeout=PATIENCE)
    ((reason, said, numbers),) = one(told)[1]
    assert (reason, numbers) == (rawpeer.BUSY, (limit, limit + size))
    for text in ("bytes in flight", f"uid {A}", f"limit is {limit}"):
        assert text in said
    assert server(usage, A)["bytes"] == limit
    assert other(call_once, path, "hello") == "hello"
    assert server(resident) - memory < limit // size * MIB + 16 * MIB
    assert f"uid={A}" in sole_line(server, "bytes in flight")
    one(disconnect)
    settle_gone(server, A)


def begin_and_stop(path: str, count: int) -> None:
    """Begin a request on each of so many channels, and cut each at another byte."""
    from doorpool import _data

    here.door, here.begun = byhand.reach(path), []
    byhand.receive(here.door).close()
    for cut in range(count):
        value = (b"%d" % cut).ljust(count)
        whole = byhand.frame_bytes("Q", 1, _data.pack_arguments((value,), {})[0])
        channel, answer = byhand.dial(here.door)
        assert channel is not None, answer
        if cut:
            byhand.send(channel, whole[:cut])
        here.begun.append((channel, whole[cut:], value))
    wait_until(lambda: not any(rawpeer.unread_there(channel) for channel, _, _ in here.begun))
    here.kept = [here.door, *(channel for channel, _, _ in here.begun)]


def fall_silent(path: str, count: int) -> None:
    """Knock so often and read no answer; and connect so often, and say nothing."""
    for _ in range(count):
        here.kept += [byhand.knock(here.door), byhand.reach(path)]


def go_on() -> int:
    """Send what was left of each request; return to how many the right answer came."""
    right = 0
    for channel, rest, value in here.begun:
        byhand.send(channel, rest)
        right += value in byhand.receive(channel).data
    return right


def time_openings(path: str, count: int) -> list[float]:
    """Return how long it takes to open a door and call it."""
    took = []
    for number in range(count):
        began = time.monotonic()
        assert call_once(path, number) == number
        took.append(time.monotonic() - began)
    return took


def be_impatient() -> None:
    _guests.GREETING_PATIENCE = 0.3


@pytest.mark.ids("F05", "F07")
def test_half_requests_on_all_channels_of_a_uid_hold_nobody_up(serving, actor, path, set_nofile, many):
    """Each is cut at another byte; there are knocks besides whose answers stay unread, and connections."""
    set_nofile(8_192)  # or its descriptors would be the uid's limit
    count, silent = many(Limits().channels, 1_000), Limits().greetings
    server, one, other = serving(channels=count), actor(A), actor(B)
    server(be_impatient)
    alone = statistics.median(other(time_openings, path, 20))
    memory, among = server(resident), []
    beginning = one.begin(begin_and_stop, path, count - silent)
    while one.acting:
        among += other(time_openings, path, 5)
    beginning()
    one(fall_silent, path, silent)
    settle(server, A, channels=count, greetings=silent, running=0, queued=0)
    among += other(time_openings, path, 20)
    assert statistics.median(among) < 20 * alone
    opened, refusals = actor(A)(open_some, path, 5)
    assert (opened, len(refusals)) == (0, 5)
    for text in (path, "channels", f"uid {A}", f"limit is {count}", "may_have_run=False"):
        assert text in refusals[0]
    assert server(resident) - memory < count * MIB // 32
    assert f"uid={A}" in sole_line(server, "channels open")
    assert f"uid {A}" in sole_line(server, "has not read the answer")
    assert one(go_on) == count - silent, "whoever was only slow is served"
    one(disconnect)
    wait_until(lambda: server(usage, A) == {}, timeout=PATIENCE)
    assert one(call_once, path, "again") == "again"


@pytest.mark.ids("F04")
def test_calls_over_the_share_of_running_ones_wait_and_another_uid_is_served(serving, actor, path):
    server, one, other = serving(threads=8, running=2), actor(A), actor(B)
    one(begin_calls, f"{path}.wait", 7)
    settle(server, A, running=2, queued=5)
    assert other(call_once, path, "hello") == "hello"
    assert actor(0)(call_once, path, "hello") == "hello"
    assert server(usage, B) == {} or server(usage, B)["running"] <= 1
    server(let_go)
    wait_until(lambda: one(ended) == (7, []), timeout=PATIENCE)
    wait_until(lambda: server(usage, A).get("running", 0) == 0, timeout=PATIENCE)


@pytest.mark.ids("F04")
def test_strangers_together_leave_threads_to_our_own(serving, actor, path):
    server = serving(threads=4)
    strangers = [actor(A + number) for number in range(3)]
    for stranger in strangers:
        stranger(begin_calls, f"{path}.wait", 4)
    wait_until(lambda: server(running_and_queued) == (3, 9), timeout=PATIENCE)
    assert actor(0)(call_once, path, "hello") == "hello"
    server(let_go)
    for stranger in strangers:
        wait_until(lambda stranger=stranger: stranger(ended) == (4, []), timeout=PATIENCE)


def running_and_queued() -> tuple[int, int]:
    users = here.server.statistics().users.values()
    return sum(it.running for it in users), sum(it.queued for it in users)


@pytest.mark.ids("F04")
def test_calls_over_the_queue_are_refused_and_did_not_run(serving, actor, path):
    server, one, other = serving(threads=8, running=2, queued=3), actor(A), actor(B)
    one(begin_calls, f"{path}.wait", 5)
    settle(server, A, running=2, queued=3)
    mate = actor(A)
    for _ in range(3):
        with pytest.raises(BusyError) as caught:
            mate(call_once, f"{path}.wait", 9)
    assert not caught.value.may_have_run
    assert f"uid={A}" in sole_line(server, "3 calls waiting")
    for text in (f"{path}.wait", "3 calls waiting", f"uid {A}", "limit is 3"):
        assert text in str(caught.value)
    assert other(call_once, path, "hello") == "hello"
    server(let_go)
    wait_until(lambda: one(ended) == (5, []), timeout=PATIENCE)
    assert mate(call_once, path, "again") == "again"


@pytest.mark.ids("F04")
def test_callers_who_die_while_they_wait_leave_nothing_and_stop_nobody(serving, actor, path):
    server, dying, heirs = serving(threads=8, running=2), actor(A), actor(A)
    dying(begin_calls, f"{path}.wait", 6)
    settle(server, A, running=2, queued=4)
    heirs(begin_calls, f"{path}.wait", 3)
    settle(server, A, queued=7)
    dying.kill()
    settle(server, A, running=2, queued=3)
    server(let_go)
    wait_until(lambda: heirs(ended) == (3, []), timeout=PATIENCE)
    settle(server, A, running=0, queued=0)


def send_half(path: str, size: int) -> None:
    """Send the head of a request of some size, and a little of its body."""
    door = byhand.reach(path)
    byhand.receive(door).close()
    channel, answer = byhand.dial(door)
    assert channel is not None, answer
    whole = byhand.frame_bytes("Q", 1, b"x" * size)
    byhand.send(channel, whole[:4000])
    here.kept = [*getattr(here, "kept", []), door, channel]


def test_requests_in_flight_over_the_share_are_refused_and_another_uid_sends(serving, actor, path):
    server, one, other = serving(bytes=3 * MIB), actor(A), actor(B)
    one(send_half, path, 2 * MIB)
    settle(server, A, bytes=2 * MIB)
    mate = actor(A)
    for _ in range(3):
        with pytest.raises(BusyError) as caught:
            mate(call_with, path, 2 * MIB)
    assert not caught.value.may_have_run
    for text in (path, "bytes in flight", f"uid {A}", str(3 * MIB)):
        assert text in str(caught.value)
    assert mate(call_with, path, 1000) == 1000
    assert other(call_with, path, 2 * MIB) == 2 * MIB
    assert f"uid={A}" in sole_line(server, "bytes in flight")
    one(disconnect)
    wait_until(lambda: server(usage, A).get("bytes", 0) == 0, timeout=PATIENCE)
    assert mate(call_with, path, 2 * MIB) == 2 * MIB


def call_with(path: str, size: int) -> int:
    """Call with something long; return how long it is that comes back."""
    return len(call_once(path, b"y" * size))


def ask_and_not_read(path: str, size: int) -> None:
    """Ask for a long result, and read none of it."""
    door = byhand.reach(path)
    byhand.receive(door).close()
    channel, answer = byhand.dial(door)
    assert channel is not None, answer
    byhand.send(channel, byhand.frame_bytes("Q", 1, here.request(size)))
    here.kept = [*getattr(here, "kept", []), door, channel]


def learn_request() -> None:
    from doorpool import _data

    here.request = lambda size: _data.pack_arguments((size,), {})[0]


def test_results_that_are_not_read_count_and_another_uid_gets_his(serving, actor, path):
    server, one, other = serving(bytes=3 * MIB), actor(A), actor(B)
    one(learn_request)
    one(ask_and_not_read, f"{path}.much", 2 * MIB)
    wait_until(lambda: server(usage, A)["bytes"] >= 2 * MIB, timeout=PATIENCE)
    mate = actor(A)
    with pytest.raises(BusyError) as caught:
        mate(call_once, f"{path}.much", 2 * MIB)
    assert caught.value.may_have_run
    for text in (f"{path}.much", "bytes in flight", f"uid {A}", str(3 * MIB)):
        assert text in str(caught.value)
    assert other(call_for, f"{path}.much", 2 * MIB) == 2 * MIB
    one(disconnect)
    wait_until(lambda: server(usage, A).get("bytes", 0) == 0, timeout=PATIENCE)
    assert mate(call_for, f"{path}.much", 2 * MIB) == 2 * MIB


def call_for(path: str, size: int) -> int:
    return len(call_once(path, size))


@pytest.mark.ids("F23")
def test_many_uids_send_no_more_than_all_strangers_may_and_our_own_sends(serving, actor, path):
    """One of them begins a request that would be too large beside another of his, and counts for no more."""
    server, one, two, three = serving(bytes=3 * MIB, total_bytes=5 * MIB), actor(A), actor(B), actor(C)
    one(send_half, path, 4 * MIB)
    settle(server, A, bytes=4 * MIB)
    two(send_half, path, 2 * MIB)
    settle(server, B, bytes=2 * MIB)
    with pytest.raises(BusyError) as caught:
        three(call_with, path, 2 * MIB)
    assert not caught.value.may_have_run
    for text in (path, "bytes in flight", f"uid {C}", f"limit together is {5 * MIB}", "other users have"):
        assert text in str(caught.value)
    assert "limit together" in sole_line(server, "bytes in flight")
    assert three(call_with, path, 1000) == 1000
    with pytest.raises(BusyError, match="limit together"):
        three(call_for, f"{path}.much", 2 * MIB)
    assert three(call_for, f"{path}.much", 1000) == 1000
    assert actor(0)(call_with, path, 2 * MIB) == 2 * MIB
    one(disconnect)
    settle_gone(server, A)
    assert three(call_with, path, 2 * MIB) == 2 * MIB
    settle_gone(server, C)  # the caller may have it all before the server knows
    assert three(call_for, f"{path}.much", 2 * MIB) == 2 * MIB


def settle_gone(server: Any, uid: int) -> None:
    wait_until(lambda: server(usage, uid).get("bytes", 0) == 0, timeout=PATIENCE)


@pytest.mark.ids("F23")
def test_many_uids_read_no_results_up_to_what_all_strangers_may_have(serving, actor, path):
    server, one, two, three = serving(bytes=3 * MIB, total_bytes=5 * MIB), actor(A), actor(B), actor(C)
    for stranger, uid in ((one, A), (two, B)):
        stranger(learn_request)
        stranger(ask_and_not_read, f"{path}.much", 2 * MIB)
        wait_until(lambda uid=uid: server(usage, uid).get("bytes", 0) >= 2 * MIB, timeout=PATIENCE)
    with pytest.raises(BusyError, match=f"uid {C}, and their limit together is {5 * MIB}") as caught:
        three(call_for, f"{path}.much", 2 * MIB)
    assert caught.value.may_have_run
    two(disconnect)
    settle_gone(server, B)
    assert three(call_for, f"{path}.much", 2 * MIB) == 2 * MIB


def test_our_own_user_and_root_have_no_share(actor, place):
    """They are trusted, and pass none of what counts the others."""
    path = str(place / "own.door")
    server, own, root = actor(B), actor(B), actor(0)
    server(serve, path, channels=1, running=1, descriptors=1, greetings=1, queued=1)
    for one in (own, root):
        assert one(open_as, path, B, 8) == 8
    assert server(usage, B) == {}
    assert server(usage, 0) == {}


def open_as(path: str, uid: int, count: int) -> int:
    here.open = [Proxy(path, server={uid}, timeout=PATIENCE) for _ in range(count)]
    return len([proxy(1) for proxy in here.open])


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(Limits)])
@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (1.5, TypeError)]
)
def test_a_limit_is_a_whole_number(name, value, error):
    with pytest.raises(error, match=name):
        Limits(**{name: value})


def test_limits_are_limits():
    with pytest.raises(TypeError, match="limits"):
        Server(limits={"channels": 1})  # type: ignore[arg-type]


def test_statistics_show_the_limits_that_are_in_force(set_nofile):
    """Those that were given, and in place of the others what comes of the threads and of the soft limit."""
    set_nofile(1000)
    with Server(max_threads=32) as server:
        limits = server.statistics().limits
        assert limits == Limits(running=8, descriptors=375, total_bytes=2**30, unread=250)
        set_nofile(800)
        assert server.statistics().limits == attrs.evolve(limits, descriptors=300, unread=200)
        set_nofile(2000)
        assert server.statistics().limits == attrs.evolve(limits, descriptors=750, unread=256)
    with Server(max_threads=2) as small:
        assert small.statistics().limits.running == 1
    given = Limits(
        channels=5, running=6, queued=7, bytes=8, total_bytes=9, descriptors=10, greetings=11, unread=12
    )  # fmt: skip
    with Server(limits=given) as server:
        assert server.statistics().limits == given
    set_nofile(800)
    with Server(max_threads=4, limits=Limits(running=6, descriptors=601, unread=401)) as server:
        limits = server.statistics().limits
        assert (limits.running, limits.descriptors, limits.unread) == (3, 600, 400), (
            "all strangers together may have no more"
        )
