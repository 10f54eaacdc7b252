"""
A shared page in bad hands: a process of our own user that writes whatever it likes into it.

The invariant: the other side answers, refuses or ends the channel; it never crashes, never waits
beyond its time, and never runs a procedure with bytes that were not posted as a request.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import mmap
import os
import pickle
import random
import re
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support.rawdoor import PATIENCE

import doorpool
from doorpool import DoorError, Proxy, Server, _impl
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


@pytest.mark.ids("D05")
def test_a_length_is_read_once(opened, kept):
    """Lengths that jump between what fits and what does not never have anybody read beyond the page."""
    proxy, canary, page = opened
    stop = threading.Event()

    def flip() -> None:
        while not stop.is_set():
            write(page, REPLY, 0xFFFF_FFFF, 4)
            write(page, REPLY, 20, 4)
            write(page, REQUEST, 0xFFFF_FFF0, 4)
            write(page, REQUEST, 20, 4)

    thread = threading.Thread(target=flip, daemon=True)
    thread.start()
    try:
        for number in range(300):
            try:
                proxy(number)
            except DoorError:
                pass  # the channel is another's from here on
            assert canary(number) == str(number)
    finally:
        stop.set()
        thread.join()


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


@pytest.mark.ids("D11", "D01")
def test_a_page_is_sealed_and_small_and_not_to_be_run(kept):
    number = _impl.shuttle.make_page()
    try:
        import fcntl

        seals = fcntl.fcntl(number, fcntl.F_GET_SEALS)
        wanted = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        assert seals & wanted == wanted
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
    # A thread that has asked for the interpreter's lock in vain is not there in a child of a fork in C, which
    # would wait for it to take the lock.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    time.sleep(2 * interval)  # who waits by the old interval has had the lock then, or waits by the new one
    try:
        child = os.fork() if how == "os.fork" else ctypes.PyDLL(None).fork()  # with the lock held
    finally:
        sys.setswitchinterval(interval)
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
