"""
``doorpool._shuttle.Page``, method by method: both ends of one page in this process.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import select
import signal
import socket
import struct
import threading
import time

import pytest
from support import wait_until
from support.rawdoor import PATIENCE, Background
from support.tasks import is_asleep

from doorpool import Proxy, _impl, _shuttle_py

pytestmark = pytest.mark.skipif(_impl.NAME != "c", reason="no compiled shuttle here")

shuttle = _impl.shuttle
SECOND = 1_000_000_000  # nanoseconds
ME = struct.pack("3i", os.getpid(), os.geteuid(), os.getegid())
CLIENT_CPU, SERVER_CPU = 68, 132  # where they stand in a page
SPINS = {"spinning": 5 * SECOND, "parked": 0}


class Ends:
    """A client's and a server's page, on one memory and one pair of sockets."""

    def __init__(self, spin: int) -> None:
        self.sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in self.sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        number = shuttle.make_page()
        self.memory = mmap.mmap(number, shuttle.PAGE_BYTES)
        try:
            self.client, self.server = (
                shuttle.Page(number, each.fileno(), ME, -1, spin) for each in self.sockets
            )
        finally:
            os.close(number)

    def close(self) -> None:
        self.client.close()
        self.server.close()
        self.memory.close()
        for each in self.sockets:
            each.close()


@pytest.fixture
def ends():
    it = Ends(0)
    yield it
    it.close()


@pytest.fixture(params=list(SPINS))
def waiting(request):
    it = Ends(SPINS[request.param])
    yield it
    it.close()


# -- bells


def ring(sock, count):
    """Ring so often, unheard, by a socket that holds more than usual; tell how often it could be."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    for rung in range(count):
        try:
            sock.send(b"B", socket.MSG_DONTWAIT)
        except BlockingIOError:
            return rung
    return count


TOO_OFTEN = 520


@pytest.mark.ids("F05")
def test_a_server_does_not_hear_bells_without_end(ends):
    assert ring(ends.sockets[0], TOO_OFTEN) == TOO_OFTEN
    with pytest.raises(shuttle.PageError, match="bells without end"):
        ends.server.park()


@pytest.mark.ids("F05")
def test_a_client_does_not_hear_bells_without_end(waiting):
    assert waiting.client.post(b"request", 0, 0) is True
    assert ring(waiting.sockets[1], TOO_OFTEN) == TOO_OFTEN
    with pytest.raises(shuttle.PageError, match="bells without end"):
        waiting.client.wait(20 * SECOND)


def test_as_many_bells_as_a_socket_holds_do_no_harm(ends):
    """They may be left from calls that did not need them."""
    with contextlib.suppress(BlockingIOError):
        while True:
            ends.sockets[0].send(b"B", socket.MSG_DONTWAIT)
    ends.server.park()
    assert ends.client.post(b"request", 0, 0) is True
    assert ends.server.take()[0] == b"request"


@pytest.mark.ids("F19")
@pytest.mark.parametrize("data", [b"B", b"more"])
def test_descriptors_in_place_of_credentials_are_closed(ends, data):
    """As they come where somebody else has got hold of our end, and has it ask for no credentials."""
    ends.sockets[1].setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    with open(os.devnull) as file:
        socket.send_fds(ends.sockets[0], [data], [file.fileno()] * 3)
        before = os.listdir("/proc/self/fd")
        for hear in (ends.server.park, ends.server.take):
            with contextlib.suppress(shuttle.PageError):
                hear()
        assert os.listdir("/proc/self/fd") == before


# -- what is no page


def test_what_is_no_page(ends):
    sock = ends.sockets[0].fileno()
    plain = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    try:
        for size in (0, shuttle.PAGE_BYTES):  # of the right size, and not sealed
            os.ftruncate(plain, size)
            with pytest.raises(shuttle.PageError, match="no page"):
                shuttle.Page(plain, sock, ME, -1, 0)
    finally:
        os.close(plain)
    with pytest.raises((shuttle.PageError, OSError)):
        shuttle.Page(-1, sock, ME, -1, 0)


@pytest.mark.parametrize("credentials", [b"", ME[:-1], ME + b"\0"], ids=len)
def test_what_is_no_ucred(ends, credentials):
    number = shuttle.make_page()
    try:
        with pytest.raises(ValueError, match="no credentials"):
            shuttle.Page(number, ends.sockets[0].fileno(), credentials, -1, 0)
    finally:
        os.close(number)


# -- arguments


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), TypeError),
        ((b"", 0), TypeError),
        ((b"", 0, 0, 0), TypeError),
        (("text", 0, 0), TypeError),
        ((b"", -1, 0), OverflowError),
        ((b"", 1 << 32, 0), OverflowError),
        ((b"", 0, 1 << 63), OverflowError),
        ((b"", None, 0), TypeError),
    ],
)
def test_bad_arguments_post_nothing(ends, arguments, error):
    with pytest.raises(error):
        ends.client.post(*arguments)
    assert ends.server.take() == shuttle.BY_SOCKET
    assert ends.client.post(b"after it", 0, 0) is True
    assert ends.server.take()[0] == b"after it"


@pytest.mark.parametrize("method", ["wait", "linger"])
@pytest.mark.parametrize(("value", "error"), [("soon", TypeError), (1 << 63, OverflowError)])
def test_bad_times_and_sets(ends, method, value, error):
    with pytest.raises(error):
        getattr(ends.client, method)(value)


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("1000 100000", 1),
        ("400000 100000", 4), ("nonsense", None), ("a b", None), (None, None),
    ],
)  # fmt: skip
def test_as_many_cpus_as_the_control_group_lets_it_use(monkeypatch, said, count):
    """Rounded up: who may use one and a half has two threads run at one time."""

    def read(path):
        if path == "/proc/self/cgroup":
            return io.StringIO("12:cpu:/old\n0::/user.slice/its:own\n")
        assert path == "/sys/fs/cgroup/user.slice/its:own/cpu.max"
        if said is None:
            raise FileNotFoundError
        return io.StringIO(f"{said}\n")

    monkeypatch.setattr(_impl, "open", read, raising=False)
    assert _impl._quota() == count


@pytest.mark.parametrize("groups", ["", "12:cpu:/old\n"])
def test_without_control_groups_of_today_all_cpus_may_be_used(monkeypatch, groups):
    monkeypatch.setattr(_impl, "open", lambda path: io.StringIO(groups), raising=False)
    assert _impl._quota() is None


def test_limit_cpus_takes_a_number():
    with pytest.raises(TypeError):
        shuttle.limit_cpus("all")
    with pytest.raises(OverflowError):
        shuttle.limit_cpus(1 << 64)


# -- calls


def test_a_call_there_and_back(ends):
    for number in range(1, 4):
        before = time.monotonic_ns()
        assert ends.client.post(memoryview(b"request"), 3, 77) is True
        data, manifest, left, sent = ends.server.take()
        assert (data, manifest, left) == (b"request", 3, 77)
        assert before <= sent <= time.monotonic_ns()
        assert ends.server.answer(bytearray(b"reply"), 0) is True
        assert ends.client.wait(SECOND) == b"reply"
        assert ends.client.number == ends.server.number == number
    assert ends.client.post(b"", 0, 0) is True
    assert ends.server.take()[0] == b""
    assert ends.server.answer(b"manifest", 8) is True
    assert ends.client.wait(SECOND) == (b"manifest", 8)


def test_the_largest_request_and_reply_that_fit(ends):
    for size in (shuttle.ROOM - 1, shuttle.ROOM):
        assert ends.client.post(bytes(size), 0, 0) is True
        assert len(ends.server.take()[0]) == size
        assert ends.server.answer(b"", 0) is True
        assert ends.client.wait(SECOND) == b""
    assert ends.client.post(bytes(1 << 20), 0, 0) == shuttle.TOO_LARGE
    assert ends.client.post(b"fits", 0, 0) is True
    assert ends.server.take()[0] == b"fits"
    assert ends.server.answer(bytes(1 << 20), 0) is False
    assert ends.server.answer(b"fits too", 0) is True
    assert ends.client.wait(SECOND) == b"fits too"


def test_a_request_by_socket_is_accepted_once_it_was_announced(ends):
    assert ends.server.accept() is False
    assert ends.client.announce() is True
    assert ends.server.accept() is True
    assert ends.server.accept() is False
    ends.server.answer_by_socket()
    assert ends.client.wait(SECOND) == shuttle.BY_SOCKET


def test_only_what_was_not_taken_is_withdrawn(ends):
    assert ends.client.post(b"taken", 0, 0) is True
    assert ends.server.take()[0] == b"taken"
    assert ends.client.withdraw() is False


def test_what_was_withdrawn_is_never_taken(ends):
    assert ends.client.post(b"withdrawn", 0, 0) is True
    assert ends.client.withdraw() is True
    assert type(ends.server.take()) is int
    assert ends.server.accept() is False


def test_a_page_that_was_shut_takes_no_call(ends):
    ends.server.shut()
    assert ends.client.post(b"late", 0, 0) is False
    assert ends.client.announce() is False


def test_a_closed_page(ends):
    for page in (ends.client, ends.server):
        page.close()
        page.close()
        assert page.closed
        page.shut()
        for method, *arguments in (
            ("post", b"", 0, 0), ("wait", 0), ("announce",), ("withdraw",), ("linger", -1),
            ("take",), ("park",), ("accept",), ("answer", b"", 0), ("answer_by_socket",),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="closed"):
                getattr(page, method)(*arguments)


# -- bells


def fill(sock: socket.socket) -> int:
    """Ring until no further bell would go; return how many there are."""
    rung = 0
    try:
        while True:
            rung += sock.send(b"B", socket.MSG_DONTWAIT)
    except BlockingIOError:
        return rung


def drain(sock: socket.socket) -> int:
    """Hear all bells; return how many there were."""
    heard = 0
    try:
        while True:
            assert sock.recv(2, socket.MSG_DONTWAIT) == b"B"
            heard += 1
    except BlockingIOError:
        return heard


def is_readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def is_open(sock: socket.socket) -> bool:
    """Tell whether neither end of a channel was closed or shut down."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return not poll.poll(0)


def call_each_other(ends: Ends, number: int) -> None:
    """Make a call for which the server, having parked, is rung for."""
    assert ends.server.park() is True
    assert ends.client.post(b"request %d" % number, 0, 0) is True
    assert is_readable(ends.sockets[1])
    assert ends.server.take()[0] == b"request %d" % number
    assert ends.server.answer(b"reply %d" % number, 0) is True
    assert ends.client.wait(SECOND) == b"reply %d" % number


@pytest.mark.ids("D07")
def test_a_bell_for_a_request_that_would_block_has_rung(ends):
    """The server is parked, and the socket full: the call goes through, and the channel lives."""
    assert ends.server.park() is True
    assert fill(ends.sockets[0]) > 0
    assert ends.client.post(b"request", 0, 0) is True
    assert all(map(is_open, ends.sockets))
    assert ends.server.take()[0] == b"request"
    assert ends.server.answer(b"reply", 0) is True
    assert ends.client.wait(SECOND) == b"reply"
    for number in range(3):
        call_each_other(ends, number)
    assert all(map(is_open, ends.sockets))


@pytest.mark.ids("D07")
def test_a_bell_for_a_reply_that_would_block_has_rung(ends):
    """The same in the other direction."""
    assert ends.client.post(b"request", 0, 0) is True
    assert ends.server.take()[0] == b"request"
    assert ends.client.wait(0) == shuttle.NOTHING  # its time is over, and its mark is there
    rung = fill(ends.sockets[1])
    assert rung > 0
    assert ends.server.answer(b"reply", 0) is True
    assert all(map(is_open, ends.sockets))
    assert ends.client.wait(SECOND) == b"reply"
    assert drain(ends.sockets[0]) == rung
    for number in range(3):
        call_each_other(ends, number)
    assert all(map(is_open, ends.sockets))


class Told:
    """A page that says when it has posted a request, or failed to."""

    def __init__(self, page) -> None:
        self.page = page
        self.posted = threading.Event()

    def __getattr__(self, name):
        return getattr(self.page, name)

    def post(self, *arguments):
        try:
            return self.page.post(*arguments)
        finally:
            self.posted.set()


SERVER = """
    from doorpool import Server

    with Server(max_threads=1, spin=0) as server:
        server.attach(lambda value: value, "a.door")
        ready()
        server.run()
"""


@pytest.mark.ids("D07")
def test_a_call_through_a_full_channel_is_answered(spawn_server, door_dir):
    """The server stands still, parked; when it goes on, it answers, and the channel is the same."""
    server = spawn_server(SERVER, cwd=door_dir)
    with Proxy(door_dir / "a.door") as proxy:
        assert proxy("before") == "before"
        (channel,) = proxy._line.handle._idle
        wait_until(lambda: is_asleep(server.pid), "the server is parked")
        server.stop()
        rung = fill(channel.socket)
        channel.page = told = Told(channel.page)
        call = Background(proxy, "through")
        assert told.posted.wait(PATIENCE)
        assert call.running
        server.cont()
        assert call.result() == "through"
        assert rung > 0
        for number in range(3):
            assert proxy(number) == number
        assert list(proxy._line.handle._idle) == [channel]


# -- time, signals, races


@pytest.mark.ids("D08")
@pytest.mark.parametrize("spin", [0, 1])
def test_who_is_not_to_spin_never_looks(spin):
    """A look writes down on which CPU it is made."""
    ends = Ends(spin)
    try:
        for _ in range(100):
            assert ends.server.linger(-1) == shuttle.NOTHING
        assert ends.client.post(b"", 0, 0) is True
        for _ in range(100):
            assert ends.client.wait(0) == shuttle.NOTHING
        for at in (CLIENT_CPU, SERVER_CPU):
            assert any(ends.memory[at : at + 4]) == (spin > 0)
    finally:
        ends.close()


def test_a_wait_ends_when_its_time_is_over(waiting):
    assert waiting.client.post(b"", 0, 0) is True
    started = time.monotonic()
    assert waiting.client.wait(SECOND // 20) == shuttle.NOTHING
    assert 0.05 <= time.monotonic() - started < 2


@pytest.mark.ids("X19")
def test_ctrl_c_takes_effect_while_one_waits(waiting):
    assert waiting.client.post(b"", 0, 0) is True
    struck = []

    def strike() -> None:
        time.sleep(0.05)
        struck.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=strike)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        waiting.client.wait(10 * SECOND)
    assert time.monotonic() - struck[0] < 2, "it waited to the end"
    thread.join()
    assert waiting.server.take()[0] == b""
    assert waiting.server.answer(b"still on", 0) is True
    assert waiting.client.wait(SECOND) == b"still on"


def test_another_thread_that_uses_a_page_in_use_is_refused(waiting):
    assert waiting.client.post(b"", 0, 0) is True
    told = []
    thread = threading.Thread(target=lambda: told.append(waiting.client.wait(10 * SECOND)))
    thread.start()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            waiting.client.wait(0)
        except RuntimeError as error:
            assert "one thread at a time" in str(error)  # noqa: PT017
            break
    else:
        pytest.fail("it was never refused")
    waiting.server.take()
    waiting.server.answer(b"for the first", 0)
    thread.join()
    assert told == [b"for the first"]


@pytest.mark.ids("E13")
def test_of_a_taker_and_a_withdrawer_one_wins(many):
    for _ in range(many(200, 5_000)):
        ends = Ends(0)
        start, taken = threading.Barrier(2), []

        def take(ends=ends, start=start, taken=taken) -> None:
            start.wait()
            taken.append(type(ends.server.take()) is tuple)

        thread = threading.Thread(target=take)
        assert ends.client.post(b"", 0, 0) is True
        thread.start()
        start.wait()
        withdrawn = ends.client.withdraw()
        thread.join()
        ends.close()
        assert taken == [not withdrawn]


def test_the_twin_in_python_makes_no_page():
    with pytest.raises(OSError, match="runs without the compiled shuttle"):
        _shuttle_py.make_page()
    with pytest.raises(_shuttle_py.PageError, match="runs without the compiled shuttle"):
        _shuttle_py.Page(-1, 4096, 0)
