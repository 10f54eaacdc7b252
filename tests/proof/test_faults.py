"""
Each system call that the library makes fails in turn, with each errno that its manual page knows (H06).

What must hold is in ``support/faults.py``, with the table.  Here each scenario is played with each of its
calls failing once, at either side; with ``--long`` with all errnos, at each occurrence.  One scenario alone,
or some of its cases:

    LD_PRELOAD=faults.so PYTHONPATH=tests python -m support.faults small server long "sendmsg #1"

where ``faults.so`` is made by ``cc -shared -fPIC -fno-builtin -o faults.so tests/support/faults.c -ldl``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import faults

from doorpool import _impl

PARTS = [(scenario, side) for scenario in faults.SCENARIOS for side in ("client", "server")]
PARTS += [(life, "server") for life in faults.LIVES]
if _impl.NAME != "c":  # without pages the scenarios differ in nothing that matters here
    PARTS = [part for part in PARTS if part[0] in ("socket", "file", *faults.LIVES)]

SWEEP = """
    import sys
    from support import faults
    result(faults.sweep(sys.argv[1], sys.argv[2], short=sys.argv[3] == "short"))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes system calls fail, where it can be had."""
    made = faults.build(tmp_path_factory.mktemp("faults"))
    if not isinstance(made, Path):
        pytest.skip(made)
    return made


@pytest.mark.ids("H06", "F02", "D09")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("scenario", "side"), PARTS)
def test_whatever_fails_is_an_error_or_a_success_and_nothing_else(
    run_python: Callable[..., Any], library: Path, many: Callable[..., Any], scenario: str, side: str
) -> None:
    length = many("short", "long")
    report = run_python(
        SWEEP, scenario, side, length, env=faults.preloading(library), timeout=many(50.0, 7000.0)
    ).value
    print(f"{scenario}, {side}: {report['cases']} cases, {report['outcomes']}, of {report['calls']}")
    print(*report["wrong"], sep="\n")
    assert report["wrong"] == []
    assert report["cases"] - report["outcomes"].get("not reached", 0) > 0, "something failed"


@pytest.mark.ids("H07")
@pytest.mark.skipif(_impl.NAME != "c", reason="without pages there is nobody who looks before he waits")
def test_slow_calls_and_short_reads_and_writes_change_no_result(
    run_python: Callable[..., Any], library: Path, many: Callable[..., Any]
) -> None:
    """Each call waits before it is made, or takes longer, up to 2 ms: other things come first then."""
    code = """
        import sys
        from support import faults
        result(faults.slowly(int(sys.argv[1])))
    """
    seeds = many(1, 200)
    report = run_python(code, seeds, env=faults.preloading(library), timeout=many(50.0, 3000.0)).value
    assert report == {"plays": 33 * seeds, "wrong": []}


def test_the_table_has_all_that_the_library_can_fail(run_python: Callable[..., Any], library: Path) -> None:
    """What is made to fail is in the table, and what is in the table can be made to fail."""
    code = """
        from support import faults
        library = faults._Library()
        result([name for name in faults.ERRORS if not library.knows(name)])
    """
    assert run_python(code, env=faults.preloading(library)).value == []


@pytest.mark.ids("H06")
@pytest.mark.skipif(_impl.NAME != "c", reason="without pages there are calls that nobody makes")
def test_each_call_of_the_table_is_made_by_some_scenario(
    run_python: Callable[..., Any], library: Path
) -> None:
    """What no scenario does is never seen to fail, whatever the table says of it."""
    code = """
        from support import faults
        result(faults.never_made())
    """
    assert run_python(code, env=faults.preloading(library)).value == []


def test_a_call_that_is_made_to_fail_fails_and_no_other(
    run_python: Callable[..., Any], library: Path
) -> None:
    code = """
        import errno, socket
        from support import faults
        library = faults._Library()
        library.arm("socketpair", errno.ENFILE, 2, 2)
        failed = []
        for attempt in range(3):
            try:
                for end in socket.socketpair():
                    end.close()
            except OSError as error:
                failed.append((attempt, error.errno == errno.ENFILE))
        times, where = library.disarm()
        result((failed, times, "script.py" in where, library.counts()["socketpair"]))
    """
    assert run_python(code, env=faults.preloading(library)).value == ([(1, True)], 1, True, 3)
