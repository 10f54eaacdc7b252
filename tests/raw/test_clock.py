"""
A clock that is set while somebody waits: times to wait are those of a clock that nobody can set.
"""

import itertools
import pathlib
import re
import time

import pytest
from support import wait_until
from support.rawdoor import Background

import doorpool
from doorpool._errors import CallTimeoutError

DAY = 86_400
PACKAGE = pathlib.Path(doorpool.__file__).parent
SOURCES = sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*.c")])


@pytest.fixture
def leaping(monkeypatch):
    """Let the clock of the day leap a day, forward or back, each time it is looked at."""
    at = time.time()
    leaps = itertools.cycle([DAY, -DAY])
    monkeypatch.setattr(time, "time", lambda: at + next(leaps))
    monkeypatch.setattr(time, "time_ns", lambda: int(at + next(leaps)) * 1_000_000_000)


@pytest.mark.ids("G12")
def test_a_time_out_takes_no_notice_of_the_clock_of_the_day(serve, leaping):
    serving = serve(threads=0)  # nobody answers
    handle = serving.handle()
    for timeout in (0.05, 0.2):
        began = time.monotonic()
        with pytest.raises(CallTimeoutError):
            handle.call(b"x", timeout=timeout)
        assert timeout <= time.monotonic() - began < timeout + 5


@pytest.mark.ids("G12")
def test_a_call_that_has_time_is_answered_whatever_the_clock_does(serve, leaping):
    serving = serve(threads=0)
    call = Background(serving.handle().call, b"x", timeout=20)
    invocation = serving.gate.wait(10)
    assert 0 < invocation.deadline - time.monotonic() <= 20
    assert serving.gate.wait(0.05) is None
    assert call.running
    invocation.reply(b"y")
    assert call.result().data == b"y"
    wait_until(lambda: not call.running)


@pytest.mark.ids("G12")
@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*.c")]), ids=lambda it: it.name
)
def test_no_clock_that_can_be_set_is_looked_at(path):
    settable = r"\btime\.time(_ns)?\(|\bCLOCK_REALTIME\b|\bgettimeofday\b|\btime\(NULL\)|\bdatetime\.now\("
    assert re.findall(settable, path.read_text()) == []
