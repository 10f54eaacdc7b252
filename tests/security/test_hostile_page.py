"""
Whatever is written into a shared page: no crash, no wait without end, no run with bytes that nobody posted.

It is in bad hands: a process of our own user writes what it likes into it, at any moment.  The other side
answers, refuses or ends the channel.
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import functools
import mmap
import os
import pickle
import random
import re
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import byhand, fork_in_c
from support.rawdoor import PATIENCE

import doorpool
from doorpool import DoorError, Proxy, Server, _impl, _memory, _sockets
from doorpool._wire import Codec
from doorpool.door import Door, Gate, Handle

pytestmark = pytest.mark.skipif(_impl.NAME != "c", reason="no compiled shuttle here")

PAGE = _impl.shuttle.PAGE_BYTES
STATE, CLIENT_PARKED, SERVER_PARKED, REQUEST, REPLY = 0, 64, 128, 192, 65_536
WORDS = [STATE, CLIENT_PARKED, CLIENT_PARKED + 4, SERVER_PARKED, SERVER_PARKED + 4]
WORDS += [REQUEST, REQUEST + 4, REQUEST + 8, REQUEST + 16, REPLY, REPLY + 4]
_PUNCH = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_libc = ctypes.CDLL(None, use_errno=True)


class Kept:
    """The memory of each page that this process makes from now on: both ends' hands can get at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pages: list[mmap.mmap] = []
        self.numbers: list[int] = []
        make = _impl.shuttle.make_page

        def make_page() -> int:
            number = make()
            self.numbers.append(os.dup(number))
            self.pages.append(mmap.mmap(number, PAGE))
            return number

        monkeypatch.setattr(_impl.shuttle, "make_page", make_page)

    def close(self) -> None:
        for page in self.pages:
            page.close()
        for number in self.numbers:
            os.close(number)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    it = Kept(monkeypatch)
    yield it
    it.close()


@pytest.fixture
def opened(door_dir, kept):
    """A server, a proxy whose page is in bad hands, and one whose page is not."""
    with Server(spin=0.001) as server:
        server.attach(str, door_dir / "a.door")
        with Proxy(door_dir / "a.door", timeout=2.0) as proxy:
            assert proxy(1) == "1"
            (page,) = kept.pages
            with Proxy(door_dir / "a.door", timeout=PATIENCE) as canary:
                yield proxy, canary, page


def write(page: mmap.mmap, at: int, value: int, size: int) -> None:
    page[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")


def values(size: int) -> list[int]:
    bits = [1 << bit for bit in range(8 * size)]
    return [0, 1, 2, 0x7F, 0xFF, 1 << 16, (1 << 16) - 1, (1 << 8 * size) - 1, 1 << 8 * size - 1, *bits]


@pytest.mark.ids("D04")
@pytest.mark.parametrize("at", [STATE, REQUEST, REQUEST + 4, REPLY, REPLY + 4])
def test_every_value_of_a_word_between_two_calls(opened, kept, at):
    """Each ends the channel, or changes nothing; the proxy opens another, and the call is made there."""
    proxy, canary, _ = opened
    size = 8 if at == STATE else 4
    for value in values(size):
        write(kept.pages[-1] if len(kept.pages) > 2 else kept.pages[0], at, value, size)
        told = []
        for _ in range(3):  # what ends the channel may be seen by its other end first
            try:
                assert proxy(value) == str(value)
                break
            except DoorError as error:
                told.append(type(error))
        assert len(told) < 3, told
        assert set(told) <= {doorpool.ProtocolError, doorpool.BrokenDoorError}
        assert canary("a") == "a"


def hammer(page: mmap.mmap, number: int, stop: threading.Event, seed: int) -> None:
    """Write random values into random words, and holes, as fast as Python can."""
    chance = random.Random(seed)
    while not stop.is_set():
        for _ in range(200):
            at = chance.choice(WORDS)
            write(page, at, chance.choice(values(8)), 8 if at == STATE else 4)
        if chance.random() < 0.2:
            _libc.fallocate(number, _PUNCH, ctypes.c_long(0), ctypes.c_long(PAGE))


@pytest.mark.ids("D03", "D04", "D05", "D08")
@pytest.mark.timeout(120)
def test_random_words_at_random_moments(opened, kept, many):
    proxy, canary, page = opened
    stop, outcomes = threading.Event(), []
    threads = [
        threading.Thread(target=hammer, args=(page, kept.numbers[0], stop, seed), daemon=True)
        for seed in range(2)
    ]
    for thread in threads:
        thread.start()
    try:
        until = time.monotonic() + many(2, 60)
        while time.monotonic() < until:
            value = os.urandom(4).hex()
            started = time.monotonic()
            try:
                assert proxy(value) == value
                outcomes.append("right")
            except DoorError as error:
                outcomes.append(type(error).__name__)
            except (pickle.UnpicklingError, EOFError) as error:  # of a reply that was punched away
                outcomes.append(type(error).__name__)
            assert time.monotonic() - started < 4.0
            assert canary(value) == value
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert outcomes.count("right") > 0, outcomes
    assert proxy("at last") == "at last"


def hammer_newest(wire: int, seed: int) -> int:
    """
    Write bursts of random values, at random moments, into the newest page that comes on ``wire``.

    Returns how many bursts.  It runs in a process of its own, which no lock of ours holds up.
    """
    chance, libc = random.Random(seed), ctypes.CDLL(None)
    bursts, page, memory = 0, None, -1
    with socket.socket(fileno=wire) as pages:
        while True:
            if select.select([pages], [], [], chance.random() * 0.004)[0]:
                words, numbers, _, _ = socket.recv_fds(pages, 1, 1)
                if not words:
                    return bursts
                if page is not None:
                    page.close()
                    os.close(memory)
                memory, page = numbers[0], mmap.mmap(numbers[0], PAGE)
                continue
            if page is None:
                continue
            bursts += 1
            for _ in range(chance.randrange(1, 100)):
                at = chance.choice([*WORDS, chance.randrange(REQUEST)])
                size = 8 if at == STATE else 4
                page[at : at + size] = (chance.choice(values(8)) % (1 << 8 * size)).to_bytes(size, "little")
            if chance.random() < 0.2:
                libc.fallocate(memory, _PUNCH, ctypes.c_long(0), ctypes.c_long(PAGE))


@pytest.mark.ids("D03", "D04", "D05", "D08")
@pytest.mark.timeout(7200)
def test_another_process_writes_random_values_into_each_page(door_dir, monkeypatch, spawn_python, many):
    """Server and caller read the same words, so both are lied to: each call is answered, or fails in time."""
    ours, theirs = socket.socketpair()
    with ours, Server(spin=0.001) as server:
        server.attach(str, door_dir / "a.door")
        with theirs:
            hammering = spawn_python(hammer_newest, theirs.fileno(), 7, pass_fds=[theirs.fileno()])
        with Proxy(door_dir / "a.door", timeout=PATIENCE) as canary:
            assert canary("before") == "before"  # on a page that nobody else has
            outcomes: collections.Counter[str] = collections.Counter()
            enough = many(6, 5_000)
            with monkeypatch.context() as patched:
                make = functools.partial(make_and_hand_over, _impl.shuttle.make_page, ours)
                patched.setattr(_impl.shuttle, "make_page", make)
                with Proxy(door_dir / "a.door", timeout=0.5) as proxy:
                    while outcomes["right"] < enough or outcomes.total() - outcomes["right"] < enough:
                        outcomes[lie_to(proxy, canary)] += 1
            ours.shutdown(socket.SHUT_RDWR)
            assert hammering.finish().value > 0
            with Proxy(door_dir / "a.door", timeout=PATIENCE) as another:
                assert another("at last") == canary("at last") == "at last"


def make_and_hand_over(make: Callable[[], int], to: socket.socket) -> int:
    """Make a page that another process has its hands on, too."""
    number = make()
    socket.send_fds(to, [b"p"], [number])
    return number


def lie_to(proxy: Proxy, canary: Proxy) -> str:
    """Make a call through a page in bad hands; return what became of it."""
    value, started = os.urandom(4).hex(), time.monotonic()
    try:
        assert proxy(value) == value
        outcome = "right"
    except DoorError as error:
        outcome = type(error).__name__
    except (pickle.UnpicklingError, EOFError) as error:  # of a reply that was punched away
        outcome = type(error).__name__
    assert time.monotonic() - started < PATIENCE
    assert canary(value) == value
    return outcome


LONG, SHORT = 20, 8  # bytes of a message
FEW, SOME, ALL_AND_MORE = 4, 12, 24  # of these a manifest: always, only of a long one, never
FITTING = {(LONG, FEW), (LONG, SOME), (SHORT, FEW)}


def flip_lengths(memory: int, at: int) -> None:
    """Have a length and that of its manifest jump, for ever; no lock of ours holds this up."""
    words = memoryview(mmap.mmap(memory, PAGE)).cast("I")
    size, manifest = at // 4, at // 4 + 1
    while True:
        words[size] = SHORT
        words[manifest] = SOME
        words[size] = LONG
        words[size] = SHORT
        words[size] = LONG
        words[manifest] = ALL_AND_MORE
        words[manifest] = FEW
        words[size] = SHORT
        words[size] = LONG


class Flipped:
    """Both ends of a page whose lengths of requests, or of replies, another process flips."""

    def __init__(self, memory: int) -> None:
        self.sockets = byhand.channel_pair()
        self.message = os.urandom(LONG)
        self.client, self.server = (
            _impl.shuttle.Page(memory, each.fileno(), _sockets.own_ucred(), -1, 0) for each in self.sockets
        )

    def close(self) -> None:
        for each in (self.client, self.server, *self.sockets):
            each.close()

    def call(self, at: int, *, pause: bool) -> tuple[int, int] | None:
        """Make a call; return of what lengths its request or reply was taken, None if it was refused."""
        assert self.client.post(self.message, FEW, 0) is True
        if pause and at == REQUEST:
            os.sched_yield()
        request = self.taken(self.server.take)
        assert self.server.answer(self.message, FEW) is True
        if pause and at == REPLY:
            os.sched_yield()
        reply = self.taken(self.client.wait, 1_000_000_000)
        return request if at == REQUEST else reply

    def taken(self, take: Callable[..., object], *arguments: int) -> tuple[int, int] | None:
        try:
            came = take(*arguments)
        except _impl.shuttle.PageError as error:
            assert "more bytes than there can be" in str(error)  # noqa: PT017
            return None
        assert isinstance(came, tuple)
        data, manifest = came[:2]
        assert data == self.message[: len(data)]
        return len(data), manifest


@pytest.mark.ids("D05")
@pytest.mark.parametrize("at", [REQUEST, REPLY], ids=["request", "reply"])
def test_a_length_is_read_once(spawn_python, many, at):
    """Of lengths that jump while they are read, two that fit together are taken, or none."""
    memory = _impl.shuttle.make_page()
    ends = Flipped(memory)
    try:
        flipping = spawn_python(flip_lengths, memory, at, pass_fds=[memory])
        seen: collections.Counter[tuple[int, int] | None] = collections.Counter()
        enough, until = many(150_000, 15_000_000), time.monotonic() + PATIENCE
        while seen.total() < enough or (seen.keys() != {*FITTING, None} and time.monotonic() < until):
            # Now and then the other process is given time, should it have no CPU of its own.
            seen[ends.call(at, pause=seen.total() % 64 == 0)] += 1
            assert seen.keys() <= {*FITTING, None}
        assert seen.keys() == {*FITTING, None}
        flipping.kill()
    finally:
        ends.close()
        os.close(memory)


@pytest.mark.parametrize("word", ["request_bytes", "request_manifest", "reply_bytes", "reply_manifest"])
@pytest.mark.ids("D05")
def test_the_source_loads_each_length_at_one_place(word):
    """Two loads next to each other differ too rarely for the test above to be sure of it."""
    source = (Path(doorpool.__file__).parent / "_shuttle.c").read_text()
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    uses = [line.strip() for line in source.splitlines() if re.search(rf"\b{word}\b", line)]
    assert len([use for use in uses if f"atomic_load_explicit(&w->{word}, memory_order_relaxed)" in use]) == 1
    other = [
        use for use in uses if not re.search(r"_Static_assert|^_Atomic uint32_t|atomic_store_explicit", use)
    ]
    assert len(other) == 1, other


def mappings(kind: str) -> int:
    with open("/proc/self/maps") as file:
        return len(re.findall(rf"/memfd:doorpool-{kind}", file.read()))


@pytest.mark.ids("D06")
def test_no_page_and_no_segment_where_no_pickle_is_spoken(door_dir, kept):
    gate = Gate()
    door = Door(gate, codec=Codec.RAW)
    door.listen(door_dir / "raw.door")

    def answer() -> None:
        invocation = gate.wait()
        assert invocation is not None
        invocation.reply(b"", [memoryview(buffer) for buffer in invocation.buffers])

    thread = threading.Thread(target=answer)
    thread.start()
    before = mappings("")
    with Handle(door_dir / "raw.door") as handle:
        came = handle.call(b"", [memoryview(bytes(1 << 20))])
        assert [type(buffer) for buffer in came.buffers] == [bytearray]
        assert mappings("") == before
    thread.join()
    door.revoke()
    gate.close()
    gate.dispose()
    assert kept.pages == []


TWO_PEERS = """
    import numpy
    from doorpool import Server

    kept = {}

    def swap(who, value):
        # Keep an array, and give one like the last out.
        kept[who], last = value, kept.get(who, value)
        return last.copy()

    def intact(who, byte):
        return bool((kept[who] == byte).all())

    with Server() as server:
        server.attach(swap, "swap.door")
        server.attach(intact, "intact.door")
        ready()
        server.run()
"""

SCRIBBLER = """
    import mmap, os, select, sys
    import numpy
    from doorpool import Proxy, _memory, _segments

    stop, secret = int(sys.argv[1]), int(sys.argv[2]).to_bytes(1) * 64
    size, mine, maps = 1 << 20, 0xEE, []
    check, make = _segments.check_memfd, _memory.memfd

    def check_and_keep(number, size):
        check(number, size)
        maps.append(mmap.mmap(number, size))

    def make_and_keep(size):
        holder = make(size)
        maps.append(mmap.mmap(holder.fileno(), size))
        return holder

    _segments.check_memfd, _memory.memfd = check_and_keep, make_and_keep
    for _ in range(3):  # what is kept of the first two is of channels that are closed
        with Proxy("swap.door") as proxy:
            for _ in range(4):
                assert (proxy("the scribbler", numpy.full(size, mine, "B")) == mine).all()
    proxy = Proxy("swap.door")
    for _ in range(4):
        proxy("the scribbler", numpy.full(size, mine, "B"))
    ready()
    seen = rounds = 0
    while not select.select([stop], [], [], 0)[0]:
        for it in maps:
            seen += it.find(secret) >= 0
            it[:] = bytes([mine]) * len(it)
        rounds += 1
    proxy.close()
    result((len(maps), rounds, seen))
"""


@pytest.mark.ids("D13t")
def test_a_peer_that_keeps_its_mappings_sees_and_spoils_nothing_of_another(
    spawn_server, spawn_python, door_dir, many
):  # fmt: skip
    """Both are of one uid, whose values cross in segments; those of a channel never become another's."""
    numpy = pytest.importorskip("numpy")
    spawn_server(TWO_PEERS, cwd=door_dir)
    secret = 0x5C
    wait, stop = os.pipe()
    with open(stop, "wb") as stopper:
        with open(wait, "rb"):
            scribbler = spawn_python(SCRIBBLER, wait, secret, cwd=door_dir, pass_fds=[wait])
        scribbler.wait_ready()
        with Proxy(door_dir / "swap.door", timeout=PATIENCE) as swap:
            with Proxy(door_dir / "intact.door", timeout=PATIENCE) as intact:
                for _ in range(many(50, 5_000)):
                    came = swap("the other", numpy.full(1 << 20, secret, "B"))
                    assert (came == secret).all()
                    assert intact("the other", secret)
            stopper.close()
            kept, rounds, seen = scribbler.finish().value
            assert kept >= 8, "values crossed in segments, both ways"
            assert rounds > 0
            assert seen == 0
            assert (came == secret).all()


def exec_seal() -> int:
    """Return the seal against execution; 0 where the kernel knows none (before 6.3)."""
    try:
        number = os.memfd_create("x", _memory._MFD_NOEXEC_SEAL)
    except OSError:
        return 0
    os.close(number)
    return 0x20  # F_SEAL_EXEC


@pytest.mark.ids("D11", "D01")
def test_a_page_is_sealed_and_small_and_not_to_be_run(kept):
    number = _impl.shuttle.make_page()
    try:
        assert fcntl.fcntl(number, fcntl.F_GET_SEALS) == _memory.SEALS | exec_seal()
        assert stat.S_IMODE(os.fstat(number).st_mode) == 0o600
        if exec_seal():
            with pytest.raises(PermissionError):
                os.fchmod(number, 0o700)
        for size in (0, 1, PAGE + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(number, size)
        assert not os.get_inheritable(number)
    finally:
        os.close(number)


@pytest.mark.ids("G13")
@pytest.mark.parametrize("how", ["os.fork", "fork in C"])
def test_a_page_is_not_there_in_a_forked_child(opened, kept, how):
    proxy, _, _ = opened
    page = proxy._line.handle._idle[0].page
    reader, writer = os.pipe()
    child = os.fork() if how == "os.fork" else fork_in_c()
    if child == 0:
        try:
            page.post(b"from the child", 0, 0)
            os.write(writer, b"posted")
        except ValueError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader) as file:
        assert file.read() == "this page is closed"
    assert proxy("after it") == "after it"
