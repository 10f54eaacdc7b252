"""
Files whose close never ends: a stranger passes files of a file system whose daemon is his.

Such a close cannot be interrupted, nor can whoever hangs in it be killed (``support.fuse``).  So a
process that holds one ends only when the daemon does; all the rest goes on as if nothing was.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import attrs
import pytest
from support import byhand, fuse, wait_until
from support.actors import Actor, Fd, descriptors, here, logged
from support.canary import few_descriptors_more, try_door, undisturbed
from support.processes import Child
from support.rawdoor import PATIENCE
from support.victims import open_client, serve

from doorpool import Descriptor, Endpoint, LimitError, Proxy, RevokedError, Server, _janitor, _sockets
from doorpool._janitor import AT_MOST, AT_MOST_HIS, MOST_WAITING
from doorpool.door import Codec, Door, Gate, Handle

V, M = 4201, 6602

SOON = 1.0  # seconds, within which nobody has waited for the daemon


@attrs.frozen
class Cast:
    """Who plays: a stranger that has a file of the daemon's, in ``here.file``; and who else is needed."""

    stranger: Actor
    daemon: Actor
    actor: Callable[..., Actor]

    def free(self) -> None:
        """End the daemon, and with it all waiting."""
        self.daemon.close()


@pytest.fixture
def cast(
    actor: Callable[..., Actor], spawn_server: Callable[..., Child], place: os.PathLike[str], root_only: None
) -> Iterator[Cast]:
    """The stranger and his daemon, which ends before anybody who may hang is to end."""
    folder = os.path.join(place, "mount")
    os.mkdir(folder)
    daemon, stranger = actor(0), actor(M)
    try:
        try:
            daemon(fuse.mount, folder, M)
        except OSError as error:
            pytest.skip(f"no FUSE here: {error}")
        try:
            stranger(fuse.open_file, folder)
        finally:
            daemon(fuse.unmount, folder)
        yield Cast(stranger, daemon, actor)
    finally:
        daemon.close()


@pytest.fixture
def raw_server(cast: Cast, path: str) -> Actor:
    """A raw door of the victim's that everybody may use."""
    server = cast.actor(V)
    server(serve, "raw", path, codec="RAW")
    return server


def ends(process: Actor | Child) -> bool:
    """Kill a process; tell whether it is dead soon."""
    signal.pidfd_send_signal(process.pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(process.pidfd, select.POLLIN)
    return bool(poll.poll(PATIENCE * 1000))


def stuck() -> set[int | None]:
    return _janitor.stuck()


# -- knocks ----------------------------------------------------------------------------------------


def knock(path: str, how: str, count: int) -> None:
    """
    Knock with files that cannot be closed, anew at each tenth time.

    Args:
        how: in place of the socket; beside it; many of them; or in the queue of a good one.
    """
    for number in range(count):
        if number % 10 == 0:
            door = byhand.reach(path)
        ours, theirs = byhand.pair()
        with ours, theirs, contextlib.suppress(BlockingIOError, ConnectionError):
            files = [here.file] * (10 if how == "many" else 1)
            if how == "queued behind it":
                byhand.send(ours, b"never read", files)
                files = []
            sockets = [] if how == "in its place" else [theirs.fileno()]
            ids, flags = byhand.own_ids(), socket.MSG_DONTWAIT
            byhand.send(door, byhand.knock_bytes(), [*sockets, *files], ids, flags)
        if number % 10 == 9:
            door.close()


@pytest.mark.ids("F21")
@pytest.mark.parametrize("how", ["in its place", "beside it", "many"])
def test_knocks_with_files_that_never_close_hold_nobody_up(cast, raw_server, path, how):
    canary, mate, other = cast.actor(V), cast.actor(M), cast.actor(M + 1)
    before = raw_server(descriptors)
    with undisturbed(canary, path) as some_more:
        cast.stranger(knock, path, how, 200)
        wait_until(lambda: cast.daemon(fuse.withheld) == AT_MOST_HIS)
        wait_until(lambda: raw_server(stuck) == {M}, timeout=PATIENCE)
        some_more()
        assert mate(try_door, path, V) == "CallTimeoutError"
        assert other(try_door, path, V) == "hello"
        assert raw_server(descriptors) < before + 10 * (MOST_WAITING + AT_MOST) + 30
    assert any("not heard" in line for line in raw_server(logged))
    assert cast.daemon(fuse.withheld) == AT_MOST_HIS
    cast.free()
    few_descriptors_more(raw_server, before)
    wait_until(lambda: mate(try_door, path, V) == "hello", timeout=PATIENCE)


@pytest.mark.ids("F21")
def test_files_that_nobody_has_read_are_given_up_without_being_closed(cast, raw_server, path):
    """They came behind a knock, in the queue of the socket that it brought."""
    canary = cast.actor(V)
    before = raw_server(descriptors)
    with undisturbed(canary, path) as some_more:
        cast.stranger(knock, path, "queued behind it", 200)
        some_more()
    few_descriptors_more(raw_server, before)
    assert cast.daemon(fuse.withheld) == 0
    assert ends(raw_server)


# -- calls -----------------------------------------------------------------------------------------


def dial_often(path: str, count: int) -> None:
    """Have so many channels."""
    door = byhand.reach(path)
    here.channels = [byhand.dial(door)[0] for _ in range(count)]


def call_on_each(number: int, how: str, files: int) -> list[str]:
    """Call with files on all channels; return what came of it: the kind of the answer, or an error's name."""
    came = []
    for channel in here.channels:
        frame = byhand.frame_bytes("Q", number, b"take this", descriptors=files if how != "wrong" else 0)
        try:
            byhand.send(channel, frame, [here.file] * files, flags=socket.MSG_DONTWAIT)
            came.append(byhand.receive(channel).data[:1].decode())
        except OSError as error:
            came.append(type(error).__name__)
    return came


def refuse_descriptors() -> None:
    here.door.refuse_descriptors = True


def kernel_refuses() -> bool:
    """Whether this kernel can refuse descriptors on behalf of who receives (Linux 6.16)."""
    one, other = socket.socketpair()
    with one, other:
        try:
            one.getsockopt(socket.SOL_SOCKET, _sockets.SO_PASSRIGHTS)
        except OSError:
            return False
    return True


@pytest.mark.ids("F21")
@pytest.mark.parametrize("how", ["does not take them", "wrong"])
def test_calls_with_files_that_never_close_hold_nobody_up(cast, raw_server, path, how):
    canary = cast.actor(V)
    before = raw_server(descriptors)
    cast.stranger(dial_often, path, 60)
    with undisturbed(canary, path) as some_more:
        came = cast.stranger(call_on_each, 1, how, 2)
        assert set(came) <= {"R", "G"}
        wait_until(lambda: cast.daemon(fuse.withheld) == AT_MOST_HIS)
        some_more()
    cast.free()
    few_descriptors_more(raw_server, before + 3 * 60)


@pytest.mark.ids("F21")
def test_channels_of_who_holds_a_janitor_up_are_read_no_more(cast, raw_server, path):
    """Or each call would bring as many files as fit, and none of them could be closed."""
    canary, other = cast.actor(V), cast.actor(M + 1)
    cast.stranger(dial_often, path, 40)
    other(open_client, "raw", path, server=[V])
    cast.stranger(call_on_each, 1, "does not take them", 1)
    wait_until(lambda: raw_server(stuck) == {M}, timeout=PATIENCE)
    before = raw_server(descriptors)
    with undisturbed(canary, path):
        came = cast.stranger(call_on_each, 2, "does not take them", 200)
    assert "R" not in came
    assert raw_server(descriptors) <= before + 6
    assert other(try_door, path, V) == "hello"
    cast.free()


@pytest.mark.ids("F21")
@pytest.mark.skipif(not kernel_refuses(), reason="before Linux 6.16 descriptors come to who takes none")
def test_a_door_that_refuses_descriptors_never_gets_them(cast, raw_server, path):
    raw_server(refuse_descriptors)
    canary = cast.actor(V)
    cast.stranger(dial_often, path, 60)
    with undisturbed(canary, path):
        assert set(cast.stranger(call_on_each, 1, "does not take them", 2)) == {"PermissionError"}
        assert set(cast.stranger(call_on_each, 1, "wrong", 1)) == {"PermissionError"}
        assert set(cast.stranger(call_on_each, 1, "", 0)) == {"R"}
    assert cast.daemon(fuse.withheld) == 0
    assert ends(raw_server)


def call_with_null(number: int) -> str:
    """Call an open door with a descriptor; tell what was said."""
    with open(os.devnull) as file:
        try:
            return bytes(here.client.call(b"x", descriptors=[file.fileno()]).data).decode()
        except LimitError as error:
            return f"{error.value} over {error.limit}, {error.may_have_run}"


@pytest.mark.ids("F21")
def test_an_honest_client_is_told_that_a_door_takes_no_descriptors_any_more(actor, path, root_only):
    """Though it knows nothing of that, for it was told otherwise."""
    server, client = actor(V), actor(M)
    server(serve, "raw", path, codec="RAW")
    client(open_client, "raw", path, server=[V], lazy=True)
    server(refuse_descriptors)
    assert client(call_with_null, 1) == "1 over 0, False"
    assert client(call_with_null, 1) == "1 over 0, False"


# -- what is queued when a door is revoked ---------------------------------------------------------


def serve_waiting(path: str) -> None:
    """Serve a door whose procedure waits until it is revoked, and one beside it that echoes."""
    serve("raw", path, codec="RAW")
    here.busy_gate = Gate()
    here.busy = Door(here.busy_gate, name="busy", codec=Codec.RAW)
    here.busy.listen(path + ".busy", mode=0o666)
    here.running = []

    def work() -> None:
        while True:
            here.running.append(here.busy_gate.wait())

    threading.Thread(target=work, daemon=True).start()


def running() -> int:
    return len(here.running)


def leave_unread(count: int) -> None:
    for channel in here.channels:
        byhand.send(channel, byhand.frame_bytes("Q", 2, b"", descriptors=1), [here.file])
    for _ in range(count):
        byhand.send(here.reached, byhand.knock_bytes(), [here.file, here.file], byhand.own_ids())


def begin_calls(path: str, count: int) -> None:
    here.reached = byhand.reach(path)
    dial_often(path, count)
    for channel in here.channels:
        byhand.send(channel, byhand.frame_bytes("Q", 1, b"wait"))


def hold_keeper() -> None:
    from doorpool._keeper import keeper

    keeper().lock.acquire()


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


@pytest.mark.ids("F21")
def test_a_revoke_with_files_that_never_close_in_its_queues(cast, path):
    """They were never in the server's table, so they leave no trace in it."""
    server, canary = cast.actor(V), cast.actor(V)
    server(serve_waiting, path)
    before = server(descriptors)
    cast.stranger(begin_calls, path + ".busy", 10)
    wait_until(lambda: server(running) == 10, timeout=PATIENCE)
    server(hold_keeper)
    cast.stranger(leave_unread, 10)
    assert server(revoke_busy) < SOON
    with undisturbed(canary, path) as some_more:
        some_more()
    few_descriptors_more(server, before)
    assert cast.daemon(fuse.withheld) == 0
    assert ends(server)


# -- at a client -----------------------------------------------------------------------------------


def pose(number: int, how: str) -> None:
    """Answer one knock at a port with files: in place of the channel, or beside it."""
    port = socket.socket(fileno=number)

    def work() -> None:
        theirs, _ = byhand.hear(port)
        one, other = byhand.pair(socket.SOCK_SEQPACKET)
        with theirs, one, other:
            sockets = [] if how == "in its place" else [other.fileno()]
            files = [here.file] * 3
            byhand.send(theirs, byhand.answer_bytes(byhand.RAW), [*sockets, *files], byhand.own_ids())

    threading.Thread(target=work, daemon=True).start()


def open_and_fail(number: int) -> tuple[str, float]:
    """Open a door that answers so; tell how it went, and how long it took."""
    began = time.monotonic()
    try:
        Handle(number, server=[M], open_timeout=PATIENCE)
    except Exception as error:
        return type(error).__name__, time.monotonic() - began
    raise AssertionError("it was believed")


@pytest.mark.ids("F21")
@pytest.mark.parametrize("how", ["in its place", "beside it"])
def test_answers_with_files_that_never_close_hold_no_caller_up(cast, raw_server, path, how):
    client = cast.actor(V)
    holder, port = byhand.door_pair(byhand.greeting_bytes(byhand.RAW))
    with holder, port:
        cast.stranger(pose, Fd(port.fileno()), how)
        name, taken = client(open_and_fail, Fd(holder.fileno()))
    assert name == "ProtocolError"
    assert taken < SOON
    wait_until(lambda: cast.daemon(fuse.withheld) == AT_MOST_HIS)
    assert client(try_door, path, V) == "hello"


def give_files(path: str) -> None:
    """Serve a door whose results are such files."""

    def give(count: int) -> list[Descriptor]:
        return [Descriptor(os.dup(here.file)) for _ in range(count)]

    here.server = Server()
    here.server.attach(Endpoint(give, name="give", codec="data"), path, mode=0o666)
    here.server.start()


def fetch_files(path: str, how: str) -> float:
    """Call it, and close, drop or leave what comes; tell how long that took."""
    began = time.monotonic()
    with Proxy(path, server=[M]) as proxy:
        for _ in range(5):
            for one in proxy(3):
                if how == "closed":
                    one.close()
                elif how == "a copy closed":
                    one.dup().close()
                    one.close()
    return time.monotonic() - began


@pytest.mark.ids("F21")
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("how", ["closed", "a copy closed", "dropped"])
def test_results_that_never_close_hold_no_caller_up(cast, raw_server, path, how):
    client = cast.actor(V)
    cast.stranger(give_files, path + ".files")
    assert client(fetch_files, path + ".files", how) < SOON
    assert client(try_door, path, V) == "hello"
    wait_until(lambda: cast.daemon(fuse.withheld) == AT_MOST_HIS)


# -- the end of a server ---------------------------------------------------------------------------

_SERVER = """
    import sys, warnings
    from doorpool import Descriptor, Server

    warnings.simplefilter("ignore", ResourceWarning)
    server = Server(max_threads=4, close_timeout=2)

    @server.endpoint(sys.argv[1], codec="data", mode=0o666)
    def sing(words: str):
        return words

    @server.endpoint(sys.argv[1] + ".dropped", codec="data", mode=0o666)
    def drop(given: Descriptor):
        return "done"

    @server.endpoint(sys.argv[1] + ".closed", codec="data", mode=0o666)
    def close(given: Descriptor):
        given.close()
        return "done"

    @server.endpoint(sys.argv[1] + ".refused", codec="data", mode=0o666)
    def want_number(given: int):
        return "done"

    @server.endpoint(sys.argv[1] + ".returned", codec="data", mode=0o666)
    def give_back(given: Descriptor):
        return given

    server.start()
    ready()
    server.run()
    ready("run has returned")
"""


def pass_files(path: str, count: int) -> set[str]:
    """Call with a file so many times; tell what came of it."""
    came = set()
    for _ in range(count):
        try:
            with Proxy(path, server=[V], open_timeout=1) as proxy:
                result = proxy.options(timeout=1)(Descriptor(os.dup(here.file)))
                came.add("done" if isinstance(result, Descriptor) else result)
        except Exception as error:
            came.add(type(error).__name__)
    return came


@pytest.mark.ids("F21")
@pytest.mark.parametrize("how", ["dropped", "closed", "refused", "returned"])
def test_a_server_closes_on_sigterm_though_files_of_a_stranger_never_close(cast, spawn_server, path, how):
    """
    Whatever it did with them: its names are gone, callers are told, ``run`` returns, another may take over.

    The kernel keeps the process itself until the daemon ends, and no longer.
    """
    server = spawn_server(_SERVER, path, uid=V)
    came = cast.stranger(pass_files, f"{path}.{how}", 6)
    assert came & {"done", "MarshalError"}, came
    assert came <= {"done", "MarshalError", "BusyError", "CallTimeoutError"}
    wait_until(lambda: cast.daemon(fuse.withheld) == AT_MOST_HIS)
    with Proxy(path, server=[V], reopen=False) as proxy:
        assert proxy("tweet") == "tweet"
        server.signal(signal.SIGTERM)
        assert server.wait_ready(timeout=2 + PATIENCE) == "run has returned"
        with pytest.raises(RevokedError):
            proxy("tweet")
    assert not os.path.lexists(path)
    successor = spawn_server(_SERVER, path, uid=V)
    with Proxy(path, server=[V]) as proxy:
        assert proxy("tweet") == "tweet"
    successor.terminate()
    cast.free()
    assert server.wait(PATIENCE) == 0
