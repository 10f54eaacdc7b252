"""
What the library logs: nothing that nobody asked for, and never more than so many lines at a time.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support import wait_until

from doorpool import _keeper
from doorpool._credentials import Credentials
from doorpool._keeper import keeper, report
from doorpool._log import log

PATIENCE = 20.0
STRANGER = 6602  # a uid that is neither ours nor root's

PROGRAM = """
import contextlib, logging, sys
from doorpool import DoorError, Proxy, Server

class Odd(BaseException):
    pass

def work():
    raise Odd

if sys.argv[2] == "sets it up":
    logging.basicConfig(format="%(message)s")
with Server() as server:
    server.attach(work, sys.argv[1], name="work")
    with Proxy(sys.argv[1]) as proxy, contextlib.suppress(DoorError, RuntimeError):
        proxy()
"""


@pytest.mark.parametrize("how", ["sets it up", "does not"])
def test_a_program_that_does_not_set_logging_up_prints_nothing(door_dir, how):
    """A logger without any handler would print its warnings on stderr."""
    command = [sys.executable, "-c", PROGRAM, str(door_dir / "a.door"), how]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ran.stdout == ""
    assert ("no Exception" in ran.stderr) == (how == "sets it up")
    assert ran.stderr == "" or how == "sets it up"


@pytest.mark.ids("F12t")
def test_more_offenders_than_are_remembered_have_one_line_together(monkeypatch, caplog, many):
    """What is remembered of them is bounded, and is forgotten in the end."""
    monkeypatch.setattr(_keeper, "LOG_INTERVAL", 0.3)
    monkeypatch.setattr(_keeper, "_MOST_LINES", 3_000)  # for here none is to be lost
    offenders, most = many(3_000, 300_000), _keeper._MOST_TOPICS
    it = keeper()
    wait_until(lambda: not it._topics and not it._lines, "what others did is forgotten", PATIENCE)
    caplog.clear()
    with it.lock:  # it writes nothing meanwhile, and no time is over for it
        timers = len(it._timers)
        for number in [*range(offenders), *range(offenders)]:
            it.say(logging.WARNING, "offender %d", number, about=("offence", number))
        assert len(it._topics) == most + 1
        assert len(it._timers) <= timers + most + 1
        assert len(it._lines) == most + 1
    wait_until(lambda: not it._topics and not it._lines, "it is silent, and remembers nothing", PATIENCE)
    assert caplog.messages[: most + 1] == [f"offender {number}" for number in range(most + 1)]
    more = [f"offender {number} (and 1 more such in 0.3 s)" for number in range(most)]
    others = 2 * (offenders - most) - 1
    more.append(f"offender {most} (and {others} more such in 0.3 s)")
    assert sorted(caplog.messages[most + 1 :]) == sorted(more)
    it.say(logging.WARNING, "offender %d", offenders, about=("offence", offenders))
    wait_until(lambda: f"offender {offenders}" in caplog.messages, timeout=PATIENCE)


@pytest.mark.ids("F12t")
def test_a_stranger_who_does_many_things_has_few_lines_and_leaves_room_for_others(monkeypatch, caplog):
    """What is not told apart any more is one thing more; what others do is news all the while."""
    monkeypatch.setattr(_keeper, "LOG_INTERVAL", 0.3)
    most, many = _keeper._MOST_OF_ONE, 2 * _keeper._MOST_TOPICS
    it = keeper()
    wait_until(lambda: not it._topics, "what others did is forgotten", PATIENCE)
    with it.lock:
        for number in range(many):
            for uid in (STRANGER, None):
                it.say(logging.WARNING, "uid %s: offence %d", uid, number, about=number, offender=uid)
        for uid in (STRANGER + 1, os.geteuid()):  # our own may do as many things as are remembered
            for number in range(most):
                it.say(logging.WARNING, "uid %s: offence %d", uid, number, about=number, offender=uid)
        assert len(it._lines) == 2 * (most + 1) + 2 * most
    wait_until(lambda: not it._topics and not it._lines and not it._offences, timeout=PATIENCE)
    for uid in (STRANGER, None):
        his = [line for line in caplog.messages if line.startswith(f"uid {uid}: ")]
        assert his[:-1] == [f"uid {uid}: offence {number}" for number in range(most + 1)]
        assert his[-1] == f"uid {uid}: offence {most} (and {many - most - 1} more such in 0.3 s)"


@pytest.mark.ids("F12t")
def test_no_more_lines_wait_than_may(caplog):
    it, most = keeper(), _keeper._MOST_LINES
    wait_until(lambda: not it._topics and not it._lines, "what others did is forgotten", PATIENCE)
    caplog.clear()
    with it.lock, it._scribe:  # a turn of the keeper's that is just ending may start who writes
        for number in range(3 * most):
            it.say(logging.WARNING, "line %d", number)
        assert len(it._lines) == most
    wait_until(lambda: not it._lines, timeout=PATIENCE)
    assert caplog.messages == [f"line {number}" for number in range(most)]


@pytest.mark.ids("F03")
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=repr)
def test_what_no_thread_can_be_had_to_write_is_written_at_the_next_occasion(monkeypatch, caplog, error):
    it, failed = keeper(), threading.Event()
    start = threading.Thread.start

    def start_if_there_is_one(thread: threading.Thread) -> None:
        if thread.name == "doorpool-keeper-log":
            failed.set()
            raise error
        start(thread)

    def written() -> list[str]:
        return [line for line in caplog.messages if line in both]  # and not what is late of other tests

    both = ["the first line", "the second line"]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_if_there_is_one)
        wait_until(lambda: not it._writing, timeout=PATIENCE)
        failed.clear()
        it.say(logging.WARNING, both[0])
        assert failed.wait(PATIENCE)
        wait_until(lambda: not it._writing)
        assert written() == []  # here: without the patch any timer of the keeper's is an occasion
    it.say(logging.WARNING, both[1])
    wait_until(lambda: len(written()) == 2, timeout=PATIENCE)
    assert written() == both


# -- what handlers raise


def in_a_thread(work: Callable[[], Any]) -> BaseException | None:
    """Do something in another thread; return what came out of it."""
    out: list[BaseException] = []

    def catch() -> None:
        try:
            work()
        except BaseException as error:
            out.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join(PATIENCE)
    return out[0] if out else None


class Handler(logging.Handler):
    """Does what it is told to, with each record."""

    def __init__(self, emit: Callable[[Any], Any]) -> None:
        super().__init__()
        self.emit = emit  # type: ignore[method-assign]


@contextlib.contextmanager
def handled(emit: Callable[[Any], Any]) -> Any:
    logger, handler = logging.getLogger("doorpool"), Handler(emit)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def test_a_failing_log_is_told_as_logging_does_it(failing_log, monkeypatch, capsys):
    def write() -> None:
        log(logging.WARNING, "line %d", 7, error=LookupError("this is no failure of the log"))

    assert in_a_thread(write) is None
    write()
    told = capsys.readouterr().err
    assert told.count("--- Logging error ---\nTraceback") == 2
    assert told.count(f"{type(failing_log.failure).__name__}: {failing_log.failure}\nMessage: 'line %d'") == 2
    monkeypatch.setattr(logging, "raiseExceptions", False)
    write()
    assert capsys.readouterr().err == ""
    assert failing_log.seen == ["line 7"] * 3


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_where_it_cannot_be_told_nothing_is(failing_log, monkeypatch, stderr):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None if stderr is None else closed)
    log(logging.WARNING, "a line")
    assert failing_log.seen == ["a line"]


def test_a_filter_may_fail_too(capsys):
    def fail(record: Any) -> bool:
        raise LookupError("no such tenant")

    logger = logging.getLogger("doorpool")
    logger.addFilter(fail)
    try:
        log(logging.WARNING, "a line")
    finally:
        logger.removeFilter(fail)
    assert "LookupError: no such tenant" in capsys.readouterr().err


class Alarm(Exception):
    pass


@pytest.mark.parametrize("own", [True, False], ids=["a handler of the program's", "Ctrl-C"])
def test_what_a_signal_handler_raises_in_it_means_the_main_thread(own):
    def alarm(*_: Any) -> None:
        raise Alarm

    before = signal.signal(signal.SIGINT, alarm if own else signal.default_int_handler)
    try:
        with (
            handled(lambda record: signal.raise_signal(signal.SIGINT)),
            pytest.raises(Alarm if own else KeyboardInterrupt),
        ):
            log(logging.WARNING, "a line")
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", [Alarm, KeyboardInterrupt])
def test_in_another_thread_no_signal_was_meant(error, capsys):
    def fail(record: Any) -> None:
        raise error

    with handled(fail):
        assert in_a_thread(lambda: log(logging.WARNING, "a line")) is None
    assert error.__name__ in capsys.readouterr().err


def test_a_record_names_who_logs(caplog):
    own = Credentials(os.getpid(), os.getuid(), os.getgid(), ())
    log(logging.WARNING, "a line")
    report(own, "a topic", logging.WARNING, "another line")
    assert [record.funcName for record in caplog.records] == ["test_a_record_names_who_logs"] * 2


def test_the_keeper_goes_on_writing_after_a_line_that_failed(failing_log):
    it = keeper()
    wait_until(lambda: not it._topics and not it._lines and not it._writing, timeout=PATIENCE)
    failing_log.seen.clear()
    for number in range(3):
        it.say(logging.WARNING, "line %d", number)
        wait_until(lambda: not it._lines and not it._writing, timeout=PATIENCE)
    assert failing_log.seen == ["line 0", "line 1", "line 2"]
