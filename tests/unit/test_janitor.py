"""
The janitors: what may take long to close is closed by them, and by nobody else.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import run_as_uid, wait_until
from support.rawdoor import PATIENCE, Background
from support.shortage import LINGER, send_all_of, slow_pair

from doorpool import _janitor
from doorpool._descriptor import NOBODY
from doorpool._janitor import (
    AT_MOST,
    AT_MOST_HIS,
    AT_MOST_STRANGE,
    close_all,
    close_later,
    close_socket,
    may_block,
    stuck,
)

STRANGER = 6602  # a uid that is neither ours nor root's


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def seconds_of(function, *args) -> float:
    began = time.monotonic()
    function(*args)
    return time.monotonic() - began


@pytest.fixture(autouse=True)
def at_rest():
    """No janitor is there before a test, nor after it."""
    wait_until(lambda: not _janitor._crew._janitors, timeout=10)
    yield
    wait_until(lambda: not _janitor._crew._janitors, "the janitors retire", timeout=10)
    assert not _janitor._crew.waiting


@pytest.fixture
def slow():
    """Make TCP sockets whose close takes ``LINGER`` seconds; the other sides are closed in the end."""
    others = []

    def make() -> socket.socket:
        one, other = slow_pair()
        others.append(other)
        return one

    yield make
    for other in others:
        other.close()


class Held:
    """Stands in place of closing: holds whoever comes until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered: list[int] = []
        self.let_go = threading.Event()
        self._close = _janitor._close
        monkeypatch.setattr(_janitor, "_close", self)

    def __call__(self, number: int) -> None:
        self.entered.append(number)
        assert self.let_go.wait(20)
        self._close(number)


@pytest.fixture
def held(monkeypatch):
    held = Held(monkeypatch)
    yield held
    held.let_go.set()


def dup_of_null() -> int:
    with open("/dev/null") as file:
        return os.dup(file.fileno())


# -- what is closed where


@pytest.fixture
def harmless():
    """Make what can be closed without waiting; the other ends stay open till the end."""
    kept = []

    def make() -> dict[str, int]:
        one, other = socket.socketpair()
        kept.append(other)
        reader, writer = os.pipe()
        return {
            "eventfd": os.eventfd(0),
            "pidfd": os.pidfd_open(os.getpid()),
            "local socket": one.detach(),
            "reader": reader,
            "writer": writer,
        }

    yield make
    for sock in kept:
        sock.close()


@pytest.mark.ids("F20")
def test_what_cannot_block_is_closed_at_once(held, harmless):
    numbers = harmless()
    assert {what for what, number in numbers.items() if may_block(number, STRANGER)} == set()
    descriptors = list(numbers.values())
    close_all(descriptors, STRANGER)
    assert descriptors == []
    assert not any(map(is_open, numbers.values()))
    assert held.entered == []


def test_files_are_left_to_a_janitor_if_a_stranger_has_sent_them(held):
    with tempfile.TemporaryFile() as file:
        ours, his = os.dup(file.fileno()), os.dup(file.fileno())
    close_all([ours], os.geteuid())
    assert not is_open(ours)
    close_all([his], STRANGER)
    wait_until(lambda: held.entered == [his])
    assert is_open(his)
    held.let_go.set()
    wait_until(lambda: not is_open(his))


@pytest.mark.ids("F20")
def test_a_lingering_socket_holds_nobody_up(slow):
    """Closed as it is it takes its time; a janitor switches that off."""
    as_it_is = slow()
    copy = as_it_is.detach()
    assert seconds_of(os.close, copy) > LINGER / 2  # so the test can fail
    numbers = [slow().detach() for _ in range(20)]
    assert all(may_block(number, os.geteuid()) for number in numbers)
    copies = list(numbers)
    assert seconds_of(close_all, copies, NOBODY) < LINGER / 2
    wait_until(lambda: not any(map(is_open, numbers)), timeout=LINGER / 2)


@pytest.mark.ids("F20")
def test_an_honest_senders_connection_is_not_cut():
    """He lingers, and has gone on; what he sent before arrives all the same."""
    slow, other = slow_pair()
    with other:
        close_all([slow.detach()], STRANGER)
        other.settimeout(10)
        size = 0
        while piece := other.recv(1 << 16):
            size += len(piece)
        assert size > 4096  # to the end of file, which is no reset


class SlowFile(io.FileIO):
    """A raw file whose close takes as long as somebody likes, as one of his own file system's does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.may_close = threading.Event()

    def close(self) -> None:
        assert self.may_close.wait(PATIENCE)
        super().close()


def test_a_file_that_was_made_of_a_strangers_descriptor_is_closed_by_a_janitor(tmp_path):
    (tmp_path / "file").touch()
    file = SlowFile(tmp_path / "file")
    files = [file]
    close_all(files, STRANGER)
    assert files == []
    assert not file.closed
    file.may_close.set()
    wait_until(lambda: file.closed)


def test_a_file_of_our_own_is_closed_at_once(tmp_path):
    (tmp_path / "file").touch()
    file = io.FileIO(tmp_path / "file")
    close_all([file], os.geteuid())
    assert file.closed


@pytest.mark.ids("F20")
def test_a_socket_of_ours_with_slow_ones_unread_in_it(slow):
    """The kernel closes what was never read together with the socket: here a janitor waits."""
    ours, his = socket.socketpair()
    send_all_of(his, b"unread", slow())
    number = ours.fileno()
    assert seconds_of(close_socket, ours, STRANGER) < LINGER / 2
    assert ours.fileno() == -1
    wait_until(lambda: not is_open(number))  # it is out of the table before anything is waited for
    wait_until(lambda: stuck() == {STRANGER}, timeout=LINGER)
    his.close()
    wait_until(lambda: stuck() == set(), timeout=10)


def test_a_socket_of_ours_with_nothing_in_it_is_closed_at_once(held):
    one, other = socket.socketpair()
    with other:
        for _ in range(2):
            close_socket(one, NOBODY)
            assert one.fileno() == -1
        assert other.recv(1) == b""
    assert held.entered == []


# -- how many there are


@pytest.mark.ids("F20")
def test_there_are_only_a_few_janitors(held, harmless, monkeypatch):
    monkeypatch.setattr(_janitor, "PATIENCE", 0.05)
    numbers = [dup_of_null() for _ in range(50)]
    for number in numbers:
        close_later([number], STRANGER if number % 2 else None)
    wait_until(lambda: len(held.entered) == 2 * AT_MOST_HIS)
    wait_until(lambda: stuck() == {STRANGER, None})
    ours = [dup_of_null() for _ in range(AT_MOST)]
    close_later(list(ours), NOBODY)
    numbers += ours
    wait_until(lambda: len(held.entered) == AT_MOST)
    assert _janitor._crew._janitors == AT_MOST
    assert all(map(is_open, numbers))
    others = harmless()
    close_all(list(others.values()), STRANGER)  # who is not held up is not held up
    assert not any(map(is_open, others.values()))
    held.let_go.set()
    wait_until(lambda: not any(map(is_open, numbers)))
    assert sorted(held.entered) == sorted(numbers)
    assert stuck() == set()


@pytest.mark.ids("F21")
def test_a_stranger_has_two_janitors_and_the_others_go_on(monkeypatch, held):
    """What holds him up may do so for ever; another's descriptors, and ours, are closed all the same."""
    his = [dup_of_null() for _ in range(20)]

    def close(number: int) -> None:
        if number in his:
            held(number)
        else:
            held._close(number)

    monkeypatch.setattr(_janitor, "_close", close)
    close_later(list(his), STRANGER)
    wait_until(lambda: len(held.entered) == AT_MOST_HIS)
    for uid in (STRANGER + 1, None, NOBODY, os.geteuid()):
        numbers = [dup_of_null() for _ in range(50)]
        close_later(list(numbers), uid)
        wait_until(lambda numbers=numbers: not any(map(is_open, numbers)))
    assert len(held.entered) == AT_MOST_HIS
    assert all(map(is_open, his))
    held.let_go.set()
    wait_until(lambda: not any(map(is_open, his)))


@pytest.mark.ids("F21")
def test_all_strangers_together_leave_some_janitors_to_us(monkeypatch, held):
    """However many uids somebody has: what we close ourselves is closed."""
    theirs = [dup_of_null() for _ in range(2 * AT_MOST)]

    def close(number: int) -> None:
        if number in theirs:
            held(number)
        else:
            held._close(number)

    monkeypatch.setattr(_janitor, "_close", close)
    for uid, number in enumerate(theirs, STRANGER):
        close_later([number], uid)
    wait_until(lambda: len(held.entered) == AT_MOST_STRANGE)
    ours = [dup_of_null() for _ in range(50)]
    close_later(list(ours), NOBODY)
    wait_until(lambda: not any(map(is_open, ours)))
    assert len(held.entered) == AT_MOST_STRANGE
    held.let_go.set()
    wait_until(lambda: not any(map(is_open, theirs)))


@pytest.mark.ids("F07", "F20")
def test_what_is_not_closed_yet_is_counted_by_whose_it_was(held):
    numbers = [dup_of_null() for _ in range(AT_MOST_HIS + 3)]
    close_later(list(numbers), STRANGER)
    for uid in (NOBODY, os.geteuid()):  # nobody is held to account
        close_later([dup_of_null()], uid)
    wait_until(lambda: len(held.entered) == AT_MOST_HIS + 2)
    assert _janitor.held() == {STRANGER: AT_MOST_HIS + 3}
    held.let_go.set()
    wait_until(lambda: not _janitor.held())
    assert not any(map(is_open, numbers))


def test_who_asks_is_told_once_when_nothing_of_a_uid_is_left(held):
    numbers, told = [dup_of_null() for _ in range(5)], []
    close_later(list(numbers), STRANGER)
    _janitor.when_closed(STRANGER, lambda: told.append("his"))
    left = _janitor.when_closed(STRANGER, lambda: told.append("never mind"))
    _janitor.when_closed(STRANGER + 1, lambda: told.append("another's, at once"))
    assert told == ["another's, at once"]
    for _ in range(2):
        _janitor.never_mind(left)
    held.let_go.set()
    wait_until(lambda: len(told) == 2)
    assert told[1] == "his"
    assert not any(map(is_open, numbers))
    assert not _janitor._crew.told


def test_a_close_is_late_when_it_has_taken_too_long(held, monkeypatch):
    close_later([dup_of_null()], STRANGER)
    wait_until(lambda: held.entered)
    assert not _janitor.is_late(STRANGER)
    monkeypatch.setattr(_janitor, "PATIENCE", 0.01)
    wait_until(lambda: _janitor.is_late(STRANGER))
    assert not _janitor.is_late(STRANGER + 1)
    held.let_go.set()
    wait_until(lambda: not _janitor.is_late(STRANGER))


@pytest.mark.ids("F21")
def test_a_janitor_hears_no_signals(monkeypatch):
    """One that came to a thread which hangs in the kernel would be handled by nobody."""
    masks: list[set[Any]] = []

    def close(number: int) -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        os.close(number)

    monkeypatch.setattr(_janitor, "_close", close)
    number = dup_of_null()
    close_later([number], NOBODY)
    wait_until(lambda: not is_open(number))
    assert masks[0] >= {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


def test_one_that_is_held_up_is_not_waited_for(held):
    """What comes in one batch with it is closed by the next."""
    first = dup_of_null()
    second, release = dup_of_null(), held.let_go
    closing = _janitor._close

    def close_second(number: int) -> None:
        if number == first:
            closing(number)
        else:
            held._close(number)

    _janitor._close = close_second  # the fixture's monkeypatch puts the right one back
    close_later([first, second], NOBODY)
    wait_until(lambda: not is_open(second))
    assert is_open(first)
    release.set()
    wait_until(lambda: not is_open(first))


@pytest.mark.ids("F03")
def test_without_a_thread_it_waits_for_one(monkeypatch):
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    number = dup_of_null()
    with monkeypatch.context() as patch:
        patch.setattr(_janitor._thread, "start_new_thread", refuse)
        close_later([number], NOBODY)
        assert is_open(number)
    another = dup_of_null()
    close_later([another], NOBODY)
    wait_until(lambda: not is_open(number) and not is_open(another))


def test_a_finalizer_may_want_a_lock_that_another_caller_holds(monkeypatch):
    """One thread closes while it holds the keeper's lock; in another, that closes too, it is wanted."""
    lock, wanted = threading.Lock(), threading.Event()
    start = _janitor._thread.start_new_thread

    def run_finalizer(*args: Any) -> int:
        monkeypatch.setattr(_janitor._thread, "start_new_thread", start)
        wanted.set()
        assert lock.acquire(timeout=PATIENCE / 2), "the two wait for each other"
        lock.release()
        return start(*args)

    numbers = [dup_of_null(), dup_of_null()]
    monkeypatch.setattr(_janitor._thread, "start_new_thread", run_finalizer)
    with lock:
        other = Background(close_later, [numbers[0]], NOBODY)
        assert wanted.wait(PATIENCE)
        close_later([numbers[1]], NOBODY)
    other.result()
    wait_until(lambda: not any(map(is_open, numbers)))


def test_nothing_to_close_starts_nobody():
    close_later([], NOBODY)
    close_all([], NOBODY)
    assert _janitor._crew._janitors == 0


# -- in a forked child


def test_a_child_has_janitors_of_its_own(held):
    """What had not been begun when it was forked is closed by both."""
    numbers = [dup_of_null() for _ in range(AT_MOST + 3)]
    close_later(list(numbers), NOBODY)
    wait_until(lambda: len(held.entered) == AT_MOST)
    waiting = [number for number, _ in _janitor._crew.waiting]
    assert len(waiting) == 3

    def close_in_child() -> tuple[list[bool], int]:
        signal.alarm(20)
        _janitor._close = held._close
        mine = dup_of_null()
        close_later([mine], NOBODY)
        wait_until(lambda: not is_open(mine) and not any(map(is_open, waiting)))
        return [is_open(number) for number in held.entered], _janitor._crew._janitors

    left, janitors = run_as_uid(None, close_in_child)
    assert left == [True] * AT_MOST  # being closed by the parent: they may be anything by now
    assert 0 <= janitors <= AT_MOST
    assert all(map(is_open, numbers))
    held.let_go.set()
    wait_until(lambda: not any(map(is_open, numbers)))


def test_many_threads_at_once():
    numbers = [[dup_of_null() for _ in range(25)] for _ in range(8)]
    closers = [Background(close_later, list(some), NOBODY) for some in numbers]
    for closer in closers:
        closer.result()
    wait_until(lambda: not any(is_open(number) for some in numbers for number in some))
