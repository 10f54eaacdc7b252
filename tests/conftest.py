"""
Fixtures for all tests, and what holds around each of them.

Around every test, ``leak_guard``: no descriptor, thread or child stays behind, and none of a
stranger's is closed.  A hang is a failure with the stacks of all threads (pytest-timeout, set
in ``pyproject.toml``).  A test that can only run as root skips with a reason that begins
"root only:"; the reasons are counted at the end, and the run fails if one of them was given to root.
"""

from __future__ import annotations

import collections
import gc
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A shell starts what it runs in the background with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# NumPy's own threads would be there from its first import on, in the middle of a test.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import support
from support.leaks import sockets_bound_under

ROOT_ONLY = "root only:"

_failed = pytest.StashKey[bool]()
_a_child_was_killed = pytest.StashKey[bool]()

hypothesis.settings.register_profile("doorpool", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile("doorpool")


# -- what holds around every test


@pytest.fixture(scope="session", autouse=True)
def lasting_parts() -> None:
    """
    Call the library once, so that what lasts as long as the process is there before any baseline.

    That is its keeper, and the modules that a first call imports.
    """
    try:
        from doorpool._keeper import keeper
    except ImportError:  # its lowest layers can be tested without it
        return
    keeper()
    try:
        from doorpool import Proxy, Server
    except ImportError:
        return
    folder = tempfile.mkdtemp(prefix="dp-")
    try:
        server = Server()
        server.attach(str.upper, os.path.join(folder, "a.door"))
        with server, Proxy(os.path.join(folder, "a.door")) as proxy:
            assert proxy("hello") == "HELLO"
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def leak_guard(request: pytest.FixtureRequest, lasting_parts: None) -> Iterator[None]:
    """
    Fail a test that leaves descriptors, threads or children behind.

    Being the first fixture of each test it is the last to look.
    """
    _forget_last_failure()
    before = support.Holdings()
    yield
    if request.node.stash.get(_failed, False):
        return  # its traceback holds on to what it had
    left = support.Holdings.left_since(before)
    if left:
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def no_late_lines(leak_guard: None) -> None:
    """
    Have no test hear what there still is to be said of those before it.

    The keeper counts what it does not say each time, and says some seconds later how often it was.
    """
    module = sys.modules.get("doorpool._keeper")
    if module is None or module._keeper is None:
        return
    keeper = module._keeper
    with keeper.lock:
        for topic in keeper._topics:
            keeper._topics[topic] = 0
    support.wait_until(lambda: not keeper._lines and not keeper._writing, "all lines are written")


def _forget_last_failure() -> None:
    """Let go of the frames of a failed test, with what they hold, before the next baseline."""
    if hasattr(sys, "last_value"):
        for name in ("last_type", "last_value", "last_traceback", "last_exc"):
            if hasattr(sys, name):
                delattr(sys, name)
        gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except KeyboardInterrupt:  # or what a test leaves behind would be all that is said of the run
        item.stash[_failed] = True
        raise


def pytest_collection_finish() -> None:
    """
    Have the collector pass over what is there for good: the tests, and all that they import.

    Many tests have it run, and would wait 50 ms each time; forked children copy less.
    """
    gc.collect()
    gc.freeze()


# -- a log that fails


class FailingLog(logging.Handler):
    """
    A handler that raises; ``seen`` has what it was to write.
    """

    def __init__(self, failure: BaseException) -> None:
        super().__init__()
        self.failure = failure
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())
        raise self.failure


@pytest.fixture(params=[OSError("the log disk is full"), SystemExit("the log ends the program")], ids=repr)
def failing_log(request: pytest.FixtureRequest) -> Iterator[FailingLog]:
    """
    Have all that the library logs fail, by an error or by what is none.
    """
    logger, handler = logging.getLogger("doorpool"), FailingLog(request.param)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    handler.failure.__traceback__ = None  # with all that the frames hold


# -- short and long runs


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="repeat things as often as a release deserves")


@pytest.fixture
def many(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """How often to repeat something: ``many(short, long)``, of which ``--long`` chooses the second."""
    return lambda short, long: long if request.config.getoption("--long") else short


# -- fixtures to ask for


@pytest.fixture
def door_dir(request: pytest.FixtureRequest) -> Iterator[Path]:
    """
    A short private directory for doors.

    At the end no name, no half-made name and no bound socket may be left in it, unless a process of the
    test was killed, or the test has the mark ``leaves_names``.
    """
    folder = Path(tempfile.mkdtemp(prefix="dp-"))
    yield folder
    try:
        excused = (
            request.node.stash.get(_failed, False)
            or request.node.stash.get(_a_child_was_killed, False)
            or request.node.get_closest_marker("leaves_names") is not None
        )
        if not excused:
            _assert_nothing_left_in(folder)
    finally:
        shutil.rmtree(folder)


def _assert_nothing_left_in(folder: Path) -> None:
    def left() -> list[str]:
        names = [
            str(path.relative_to(folder))
            for path in folder.rglob("*")
            if path.name.startswith(".") or stat.S_ISSOCK(path.lstat().st_mode)
        ]
        return names + sockets_bound_under(folder)

    try:
        support.wait_until(lambda: not left(), timeout=1.0)
    except AssertionError:
        pytest.fail(f"left in {folder}:\n  " + "\n  ".join(left()), pytrace=False)


@pytest.fixture
def spawn_python(request: pytest.FixtureRequest, door_dir: Path) -> Iterator[Callable[..., support.Child]]:
    """
    Start Python processes (see support.start_python) that end with the test at the latest.

    They are asked to end (SIGTERM), then killed.  What they have printed is shown if the test fails.
    """
    children: list[support.Child] = []

    def spawn(code: str | Callable[..., Any], *args: Any, **options: Any) -> support.Child:
        child = support.start_python(code, *args, **options)
        children.append(child)
        return child

    yield spawn
    for child in reversed(children):
        if _end(child) < 0:
            request.node.stash[_a_child_was_killed] = True


def _end(child: support.Child) -> int:
    if child.closed:
        return 0
    try:
        child.cont()
        try:
            return child.terminate(timeout=2.0)
        except support.ChildFailed:
            return child.kill()
    finally:
        print(f"-- {child}: stdout\n{child.stdout}\n-- stderr\n{child.stderr}")
        child.close()


@pytest.fixture
def spawn_server(spawn_python: Callable[..., support.Child]) -> Callable[..., support.Child]:
    """
    Start a process as spawn_python does, and wait until it has called ``ready()``.

        server = spawn_server('''
            from doorpool import Server
            server = Server()

            @server.endpoint("a.door")
            def answer(greeting):
                return greeting

            with server:
                ready()
                server.run()
        ''', cwd=door_dir)
    """

    def spawn(code: str | Callable[..., Any], *args: Any, **options: Any) -> support.Child:
        child = spawn_python(code, *args, **options)
        child.wait_ready()
        return child

    return spawn


@pytest.fixture
def run_python() -> Callable[..., support.Finished]:
    """
    Run a script or a function in a process of its own, to its end: see support.run_python.
    """
    return support.run_python


@pytest.fixture
def as_uid() -> Callable[..., Any]:
    """
    Run a function in a forked child under another user: see support.run_as_uid.
    """
    if os.geteuid() != 0:
        pytest.skip(f"{ROOT_ONLY} becomes other users")
    return support.run_as_uid


@pytest.fixture
def root_only() -> None:
    """
    Skip, counted, where we are not root.
    """
    if os.geteuid() != 0:
        pytest.skip(f"{ROOT_ONLY} becomes other users")


@pytest.fixture
def namespaces(root_only: None) -> None:
    """
    Skip, counted, where root may not make user and pid namespaces, as in many containers.

    The functions to do it with are support.enter_user_namespace and enter_pid_namespace.
    """

    def attempt() -> None:
        support.enter_user_namespace((0, 0, 1))
        support.enter_pid_namespace()

    try:
        support.run_as_uid(None, attempt)
    except OSError as error:
        pytest.skip(f"no namespaces here: {error}")


@pytest.fixture
def marker() -> Iterator[support.Marker]:
    """
    A place that shows whether anybody has unpickled a bomb made for it.
    """
    folder = Path(tempfile.mkdtemp(prefix="dp-marker-"))
    yield support.Marker(folder)
    shutil.rmtree(folder)


# -- at the end: which tests did not run, and whether that was right


def _skip_reasons(reporter: Any) -> collections.Counter[str]:
    return collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in reporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    )


def _wrongly_skipped(reasons: collections.Counter[str]) -> int:
    if os.geteuid() != 0:
        return 0
    return sum(count for reason, count in reasons.items() if reason.startswith(ROOT_ONLY))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reasons = _skip_reasons(terminalreporter)
    if reasons:
        terminalreporter.section("skipped, by reason")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5} {reason}")
    if wrong := _wrongly_skipped(reasons):
        terminalreporter.line(f"FAILED: {wrong} test(s) for root were skipped by root", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _wrongly_skipped(_skip_reasons(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
