"""
A page that is none, in the answer to a knock: memory that could shrink or grow under us, of another
size, or that is not ours to write to.

Each is wrong in one thing only, so that each thing that is looked at is known to be looked at.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from support import byhand, wait_until
from support.rawdoor import PATIENCE, Background

from doorpool import ProtocolError, _channel, _impl, _sockets
from doorpool.door import Handle

pytestmark = [
    pytest.mark.skipif(_impl.NAME != "c", reason="no compiled shuttle here"),
    pytest.mark.ids("D01", "D02"),
]

PAGE = _impl.shuttle.PAGE_BYTES
SHRINK, GROW, SEAL = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL
SEALS = SHRINK | GROW | SEAL
_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE
_NAME = "doorpool-page"
_SHARED = struct.Struct("<II")  # of a knock, behind the rest: bytes of a page, segments


def memfd(size: int = PAGE, seals: int = SEALS, flags: int = 0) -> int:
    number = os.memfd_create(_NAME, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC | flags)
    os.ftruncate(number, size)
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
    return number


def reopened(flags: int) -> int:
    number = memfd()
    try:
        return os.open(f"/proc/self/fd/{number}", flags | os.O_CLOEXEC)
    finally:
        os.close(number)


def of_huge_pages() -> int:
    try:
        number = os.memfd_create(_NAME, os.MFD_ALLOW_SEALING | os.MFD_HUGETLB | os.MFD_CLOEXEC)
    except OSError as error:
        pytest.skip(f"no huge pages here: {error.strerror}")
    with open("/proc/meminfo") as file:
        (kib,) = re.findall(r"^Hugepagesize: *(\d+) kB$", file.read(), re.MULTILINE)
    os.ftruncate(number, 1024 * int(kib))
    fcntl.fcntl(number, fcntl.F_ADD_SEALS, SEALS)
    return number


def a_file(folder: str | None = None) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(PAGE)
        return fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 0)


def a_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


UNSEALED, UNSIZED, NO_MEMFD = "it is not sealed", "it has another size", "it is no memfd"
UNWRITABLE = "it cannot be written"

REFUSED: dict[str, tuple[Callable[[], int], str]] = {
    "no seals": (lambda: memfd(seals=0), UNSEALED),
    "may shrink": (lambda: memfd(seals=GROW | SEAL), UNSEALED),
    "may grow": (lambda: memfd(seals=SHRINK | SEAL), UNSEALED),
    "may be sealed": (lambda: memfd(seals=SHRINK | GROW), UNSEALED),
    "can have no seals": (lambda: memfd_for_good(), UNSEALED),
    "empty": (lambda: memfd(0), UNSIZED),
    "a byte too small": (lambda: memfd(PAGE - 1), UNSIZED),
    "half of it": (lambda: memfd(PAGE // 2), UNSIZED),
    "a byte too large": (lambda: memfd(PAGE + 1), UNSIZED),
    "huge": (lambda: memfd(1 << 40), UNSIZED),
    "of huge pages": (of_huge_pages, NO_MEMFD),
    "a file in tmpfs": (lambda: a_file("/dev/shm"), "sealed"),
    "a file": (a_file, "no page: it "),  # a folder for such files may be a tmpfs, too
    "a device": (lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC), NO_MEMFD),
    "a pipe": (a_pipe, NO_MEMFD),
    "a folder": (lambda: os.open("/", os.O_RDONLY | os.O_CLOEXEC), NO_MEMFD),
    "a socket": (lambda: socket.socket(socket.AF_UNIX).detach(), NO_MEMFD),
    "for reading": (lambda: reopened(os.O_RDONLY), UNWRITABLE),
    "for writing": (lambda: reopened(os.O_WRONLY), UNWRITABLE),
    "may not be written": (lambda: memfd(seals=SEALS | fcntl.F_SEAL_WRITE), UNWRITABLE),
    "may not be written later": (lambda: memfd(seals=SEALS | _FUTURE_WRITE), UNWRITABLE),
}


def memfd_for_good() -> int:
    """Memory that was made without leave to seal it: it has F_SEAL_SEAL, and no other."""
    number = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    os.ftruncate(number, PAGE)
    return number


def is_mapped(number: int) -> bool:
    with open("/proc/self/maps") as file:
        return re.search(rf" {os.fstat(number).st_ino} +/memfd:{_NAME}", file.read()) is not None


def copies_of(number: int) -> int:
    """How many descriptors of this process are of one file."""
    wanted, count = os.fstat(number), 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.path.samestat(os.fstat(int(name)), wanted)
        except OSError:
            continue  # of the folder that was listed, or another thread's
    return count


@pytest.fixture
def bad(request: pytest.FixtureRequest) -> Iterator[int]:
    number = REFUSED[request.param][0]()
    yield number
    os.close(number)


# -- in the hands of the compiled part -------------------------------------------------------------


@contextlib.contextmanager
def page_on(memory: int) -> Iterator[None]:
    """Make a page of it, and close it in the end."""
    ours, theirs = byhand.channel_pair()
    with ours, theirs:
        page = _impl.shuttle.Page(memory, ours.fileno(), _sockets.own_ucred(), -1, -1)
        yield
        page.close()


def test_what_is_as_it_should_be_is_a_page() -> None:
    """The same memory that is refused below, with nothing wrong."""
    for make in (memfd, lambda: reopened(os.O_RDWR)):
        number = make()
        try:
            with page_on(number):
                assert is_mapped(number)
            assert not is_mapped(number)
        finally:
            os.close(number)


@pytest.mark.parametrize(
    ("bad", "text"), [(what, text) for what, (_, text) in REFUSED.items()], ids=REFUSED, indirect=["bad"]
)
def test_what_is_wrong_in_one_thing_is_no_page(bad: int, text: str) -> None:
    with pytest.raises(_impl.shuttle.PageError, match=text), page_on(bad):
        pytest.fail("it was mapped")
    assert not is_mapped(bad)


def test_what_is_no_descriptor_is_no_page() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"), page_on(-1):
        pytest.fail("it was mapped")


# -- in the answer to a knock ----------------------------------------------------------------------


class Answering:
    """A server by hand that has heard the knock of a handle, which waits for the answer."""

    def __init__(self) -> None:
        holder, self.port = byhand.door_pair()
        self.door = holder.detach()  # the handle's, once it is open
        self.opening = Background(Handle, self.door, open_timeout=PATIENCE)
        self.failed = False
        self.knocking, knock = byhand.hear(self.port)
        self.asked = _SHARED.unpack(knock.data[-_SHARED.size :])[0]

    def answer(self, *memory: int, codec: int = byhand.PICKLE, size: int = PAGE) -> socket.socket:
        """Bring a channel and what is said to be its page; return our end of the channel."""
        ours, theirs = byhand.channel_pair()
        words = byhand.answer_bytes(codec)[: -_SHARED.size] + _SHARED.pack(size, 0)
        with theirs:
            byhand.send(self.knocking, words, [theirs.fileno(), *memory], byhand.own_ids())
        return ours

    def hear_again(self) -> int:
        """Hear the next knock; return how large a page it asks for."""
        self.knocking.close()
        self.knocking, knock = byhand.hear(self.port)
        bare = len(byhand.knock_bytes())
        return _SHARED.unpack(knock.data[bare:])[0] if len(knock.data) > bare else 0

    def close(self) -> None:
        self.knocking.close()
        self.port.close()
        if self.opening.error() is not None or self.failed:
            os.close(self.door)


@pytest.fixture
def answering() -> Iterator[Answering]:
    it = Answering()
    yield it
    it.close()


def assert_refused(
    answering: Answering, channel: socket.socket, bad: int, text: str, *, named: bool = False
) -> None:
    """The opening has failed for good, with these words, and nothing of the answer is left."""
    error = answering.opening.error()
    answering.failed = True
    assert isinstance(error, ProtocolError)
    assert re.search(text, str(error))
    assert not named or str(error).startswith("door '"), "it says which door"
    assert not error.may_have_run
    assert byhand.read_all(channel) == b"", "the other end of the channel is open"
    channel.close()
    wait_until(lambda: copies_of(bad) == 1, "there is none but ours")  # a janitor may have to close it
    assert not is_mapped(bad)


@pytest.mark.parametrize(
    ("bad", "text"), [(what, text) for what, (_, text) in REFUSED.items()], ids=REFUSED, indirect=["bad"]
)
def test_a_client_refuses_a_page_that_is_none(answering: Answering, bad: int, text: str) -> None:
    assert answering.asked == PAGE
    assert_refused(answering, answering.answer(bad), bad, text, named=True)


@pytest.fixture
def good() -> Iterator[int]:
    number = memfd()
    yield number
    os.close(number)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no memory to map a page into."""

    def page(*_arguments: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(_channel, "shuttle", SimpleNamespace(Page=page, PageError=_impl.shuttle.PageError))


@pytest.mark.usefixtures("no_memory")
def test_a_client_that_cannot_map_a_page_asks_for_none(answering: Answering, good: int) -> None:
    with answering.answer(good) as channel:
        assert answering.hear_again() == 0
        assert byhand.read_all(channel) == b"", "the other end of the channel is open"
    wait_until(lambda: copies_of(good) == 1, "there is none but ours")
    with byhand.admit(answering.knocking) as channel, answering.opening.result() as handle:
        call = Background(handle.call, b"by the socket")
        request = byhand.receive(channel).data
        assert request.endswith(b"by the socket")
        byhand.send(channel, byhand.frame_bytes("R", 1, b"answered"))
        assert call.result().data == b"answered"
    assert not is_mapped(good)


@pytest.mark.usefixtures("no_memory")
def test_a_page_that_was_not_asked_for_is_refused(answering: Answering, good: int) -> None:
    """Or a server could have a client that has no memory knock for ever."""
    with answering.answer(good):
        assert answering.hear_again() == 0
    text = f"promised a shared page of {PAGE} bytes, and was asked for one of 0"
    assert_refused(answering, answering.answer(good), good, text, named=True)


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE + 1, 2 * PAGE, 2**32 - 1])
def test_a_page_of_another_size_than_was_promised_is_refused(
    answering: Answering, good: int, size: int
) -> None:
    text = f"promised a shared page of {size} bytes, and was asked for one of {PAGE}"
    assert_refused(answering, answering.answer(good, size=size), good, text, named=True)


@pytest.mark.parametrize("size", [1, PAGE // 2, 2 * PAGE])
def test_a_page_of_a_size_that_nobody_asked_for_is_refused(answering: Answering, size: int) -> None:
    """It has what was promised."""
    memory = memfd(size)
    try:
        channel = answering.answer(memory, size=size)
        assert_refused(answering, channel, memory, f"promised a shared page of {size} bytes", named=True)
    finally:
        os.close(memory)


@pytest.mark.parametrize("many", [0, 2])
def test_a_page_that_was_promised_comes_alone(answering: Answering, many: int) -> None:
    memory = memfd()
    try:
        channel = answering.answer(*[memory] * many)
        assert_refused(answering, channel, memory, "promised a page, and brought none")
    finally:
        os.close(memory)


def test_a_page_comes_only_where_pickle_is_spoken(answering: Answering) -> None:
    memory = memfd()
    try:
        channel = answering.answer(memory, codec=byhand.RAW)
        assert_refused(answering, channel, memory, "shares memory where no pickle is spoken")
    finally:
        os.close(memory)


def test_a_page_that_was_not_announced_is_too_much(answering: Answering) -> None:
    memory = memfd()
    try:
        assert_refused(answering, answering.answer(memory, size=0), memory, "must bring one socket")
    finally:
        os.close(memory)
