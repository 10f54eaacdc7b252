"""
Names of doors under fire: contenders, strangers at work in the same directory, and sudden death.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import support

from doorpool._names import publish, reach

STRANGER = 4711

#: coverage.py would make, and rename, files of its own among the calls that are looked at.
_UNMEASURED = {"COVERAGE_PROCESS_CONFIG": ""}

PATIENCE = 30.0  # seconds for a partner in a race, before it counts as hung

forking = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def memory_of_barriers() -> object:
    """
    Keep one block of multiprocessing's shared memory: else it comes and goes with the tests,
    and its descriptors look like a leak.
    """
    return forking.RawValue("i")


@pytest.fixture
def sticky() -> Iterator[Path]:
    """A directory such as /tmp."""
    with tempfile.TemporaryDirectory(prefix="dp-") as folder:
        os.chmod(folder, 0o755)
        inner = Path(folder, "in")
        inner.mkdir()
        inner.chmod(0o1777)
        yield inner


@contextlib.contextmanager
def at_work(function: Callable[..., Any], *args: Any, uid: int | None = None) -> Iterator[int]:
    """
    Run a function again and again in a forked child, as another user; kill it at the end.

    Gives a pipe with one byte for each time that it returned something true.  The child has
    done a first round when the body begins.
    """
    begun, begun_child = os.pipe()
    score, score_child = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if uid is not None:
                support.become(uid)
            for turn in range(sys.maxsize):
                if function(*args):
                    os.write(score_child, b".")
                if turn == 0:
                    os.write(begun_child, b".")
        finally:
            os._exit(1)
    os.close(begun_child)
    os.close(score_child)
    try:
        assert os.read(begun, 1), "the child has failed"
        os.set_blocking(score, False)
        yield score
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child has failed"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(begun)
        os.close(score)


def scored(score: int) -> bool:
    """Tell whether a child that has been killed, or works on, ever succeeded."""
    try:
        return os.read(score, 1) != b""
    except BlockingIOError:
        return False


def leave_stale(path: Path | str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(path))


# -- one winner


class Contest:
    """
    Rounds of a race for one name: contenders that live on, and a referee.

    Three meetings a round: the referee has set the scene; all have tried; the referee has
    looked, and the winner lets go.
    """

    def __init__(self, path: Path, rounds: int, contenders: int, *, remove: bool = False) -> None:
        self.path = path
        self.rounds = rounds
        self.remove = remove
        self.barrier: Barrier = forking.Barrier(contenders + 1)
        self.results = forking.Array("i", [0] * contenders, lock=False)

    def meet(self) -> None:
        self.barrier.wait(PATIENCE)

    def contend(self, index: int) -> None:
        for _ in range(self.rounds):
            self.meet()
            name = None
            try:
                name = publish(self.path)
                self.results[index] = 1
            except FileExistsError:
                self.results[index] = 2
            except BaseException:
                self.results[index] = 3
                self.barrier.abort()
                raise
            self.meet()
            self.meet()
            if name is not None:
                if self.remove:
                    name.remove()
                name.close()

    def run(self, processes: list[list[int]], prepare: Callable[[int], None]) -> list[list[int]]:
        """
        Hold all rounds; each process is given the contenders that are threads in it.
        """
        children = [forking.Process(target=self._threads, args=(indices,)) for indices in processes]
        for child in children:
            child.start()
        try:
            outcomes = [self._referee(turn, prepare) for turn in range(self.rounds)]
        except threading.BrokenBarrierError:
            pytest.fail(f"a contender has failed: {list(self.results)}")
        finally:
            self.barrier.abort()
            for child in children:
                child.join(PATIENCE)
                child.kill()
                child.join()
                child.close()
        return outcomes

    def _referee(self, turn: int, prepare: Callable[[int], None]) -> list[int]:
        prepare(turn)
        self.meet()
        self.meet()
        outcome = sorted(self.results)
        reach(self.path).socket.close()
        assert [path.name for path in self.path.parent.iterdir()] == [self.path.name]
        self.meet()
        return outcome

    def _threads(self, indices: list[int]) -> None:
        threads = [threading.Thread(target=self.contend, args=(index,)) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.ids("A11", "N3", "N4")
@pytest.mark.parametrize("where", ["private", "sticky"])
def test_of_four_contenders_one_has_the_name(door_dir, sticky, where):
    """
    200 races in each kind of directory, half of them over a stale name; two of four in one process.
    """
    path = (door_dir if where == "private" else sticky) / "a.door"
    contest = Contest(path, rounds=200, contenders=4)

    def prepare(turn: int) -> None:
        path.unlink(missing_ok=True)
        if turn % 2:
            leave_stale(path)

    outcomes = contest.run([[0, 1], [2], [3]], prepare)
    path.unlink()
    assert outcomes == [[1, 2, 2, 2]] * 200


@pytest.mark.ids("A11", "A12")
def test_removing_and_racing(door_dir):
    """
    The winner of each round removes its name while the next race is on: no successor's is lost.
    """
    path = door_dir / "a.door"
    contest = Contest(path, rounds=100, contenders=3, remove=True)
    outcomes = contest.run([[0], [1], [2]], lambda turn: None)
    path.unlink(missing_ok=True)
    for outcome in outcomes:
        # The one before may still be there when the others ask: then it has no winner.
        assert outcome.count(1) <= 1
        assert 3 not in outcome
    assert outcomes.count([1, 2, 2]) > 0


@pytest.mark.ids("A11")
def test_fifty_processes_at_once(door_dir):
    path = door_dir / "a.door"
    leave_stale(path)
    contest = Contest(path, rounds=1, contenders=50)
    outcomes = contest.run([[index] for index in range(50)], lambda turn: None)
    assert outcomes == [[1] + [2] * 49]
    path.unlink()


@pytest.mark.ids("A11")
def test_clients_of_a_living_door_notice_nothing_of_contenders(door_dir):
    with publish(door_dir / "a.door", backlog=128) as name:

        def contend() -> bool:
            with contextlib.suppress(FileExistsError):
                publish(name.path).close()
                return True
            return False

        with at_work(contend) as stolen:
            for _ in range(200):
                with reach(name.path, deadline=time.monotonic() + 5).socket as client:
                    assert _answer(name.listener, client)
            assert not scored(stolen)
        with publish(door_dir / "b.door") as sweeper:  # the contender was killed at work
            assert sweeper.remove()
        assert name.remove()


def _answer(listener: socket.socket, client: socket.socket) -> bool:
    """Accept until it is this client: contenders knock as well."""
    for _ in range(1000):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.send(b"it is me")
        with contextlib.suppress(BlockingIOError):
            return client.recv(100) == b"it is me"
    return False


# -- no moment with the wrong mode


@pytest.mark.ids("A01")
def test_a_stranger_never_gets_in_while_a_name_is_made(sticky, root_only):
    """
    With a umask of 0, 1,000 starts, and somebody who tries to connect all the while.
    """
    path = sticky / "a.door"

    def connect() -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as sock:
            if sock.connect_ex(str(path)) == 0:
                return True
            return any(
                sock.connect_ex(f"{sticky}/{entry}{inner}") == 0
                for entry in os.listdir(sticky)
                for inner in ("", "/a.door", "/door")
            )

    def start() -> list[int]:
        os.umask(0)
        return [_mode_while_published(path) for _ in range(1000)]

    with at_work(connect, uid=STRANGER) as let_in:
        assert support.run_as_uid(None, start) == [0o600] * 1000
        assert not scored(let_in)
    assert os.listdir(sticky) == []


def _mode_while_published(path: Path) -> int:
    with publish(path) as name:
        mode = stat.S_IMODE(os.lstat(path).st_mode)
        assert name.remove()
        return mode


@pytest.mark.ids("A01")
def test_that_stranger_would_have_got_in(sticky, root_only):
    """
    The proof that the test above can fail: a name made the naive way.
    """

    def connect() -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as sock:
            return sock.connect_ex(str(sticky / "a.door")) == 0

    with publish(sticky / "a.door", mode=0o666, backlog=10_000) as name:
        with at_work(connect, uid=STRANGER) as let_in:
            support.wait_until(lambda: scored(let_in))
        assert name.remove()


@pytest.mark.ids("A02", "A01", "A03")
@pytest.mark.parametrize("state", ["new", "stale"])
def test_the_order_of_system_calls(door_dir, state):
    """
    The mode first, then the name: nothing about it changes once somebody can find it.
    """
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace")
    path = door_dir / "a.door"
    if state == "stale":
        leave_stale(path)
    log = door_dir / "log"
    script = (
        f"from doorpool._names import publish; n = publish({str(path)!r}, mode=0o660); n.remove(); n.close()"
    )
    calls = "fchmod,chmod,fchmodat,?fchmodat2,bind,listen,link,linkat,rename,renameat,renameat2,umask"
    traced = subprocess.run(
        [strace, "-f", "-o", str(log), "-e", f"trace={calls}", sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | _UNMEASURED,
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in traced.stderr.lower():
        pytest.skip("no process may be traced here")
    assert traced.returncode == 0, traced.stderr
    names = re.findall(r"^\d+ +(\w+)\((?!.*= -1 E(?:EXIST|NOENT))", log.read_text(), re.MULTILINE)
    last = "linkat" if state == "new" else "renameat2"
    seen = [{"fchmodat": "chmod", "fchmodat2": "chmod"}.get(name, name) for name in names]
    assert seen[seen.index("fchmod") :] == ["fchmod", "bind", "chmod", "listen", last]
    assert "umask" not in seen
    assert re.search(r"fchmod\(\d+, 0600\)", log.read_text()), "wider at first than it need be"


# -- strangers in the same directory


@pytest.mark.ids("A17")
def test_a_stranger_who_swaps_names_changes_no_mode(sticky, root_only):
    """
    He puts links to a victim's file wherever something half-made of ours turns up.
    """
    victim = sticky.parent / "victim"
    victim.write_text("precious")
    victim.chmod(0o600)

    def swap() -> None:
        for room in [entry for entry in os.listdir(sticky) if entry.startswith(".doorpool-")]:
            for place in (f"{sticky}/{room}/a.door", f"{sticky}/{room}"):
                with contextlib.suppress(OSError):
                    os.rename(place, f"{sticky}/stolen")
                with contextlib.suppress(OSError):
                    os.unlink(place)
                with contextlib.suppress(OSError):
                    os.symlink(victim, place)

    with at_work(swap, uid=STRANGER):
        for turn in range(300):
            if turn % 2:
                leave_stale(sticky / "a.door")
            assert _published_whole(sticky / "a.door")
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert victim.read_text() == "precious"
    assert not [entry for entry in os.listdir(sticky) if not (sticky / entry).is_symlink()]


def _published_whole(path: Path) -> bool:
    with publish(path, mode=0o666) as name:
        return stat.S_IMODE(os.lstat(path).st_mode) == 0o666 and name.is_ours() and name.remove()


@pytest.mark.ids("A08")
def test_a_part_of_the_path_that_is_swapped_all_the_time(door_dir):
    """
    The name appears in the directory that was opened, whole, and is removed there.
    """
    for part in ("one", "two"):
        (door_dir / part).mkdir()
    (door_dir / "way").symlink_to("one")

    def swap() -> None:
        for part in ("two", "one"):
            os.symlink(part, door_dir / "next")
            os.rename(door_dir / "next", door_dir / "way")

    def found() -> list[str]:
        return [part for part in ("one", "two") if os.path.lexists(door_dir / part / "a.door")]

    seen = set()
    with at_work(swap):
        deadline = time.monotonic() + 10
        while len(seen) < 2 and time.monotonic() < deadline:
            for _ in range(50):
                with publish(door_dir / "way/a.door") as name:
                    assert len(found()) == 1
                    seen.update(found())
                    assert name.remove()
                assert found() == []
    assert seen == {"one", "two"}
    assert os.listdir(door_dir / "one") == os.listdir(door_dir / "two") == []


# -- sudden death


# These fork hundreds of times, so they do it in a process that is small.


@pytest.mark.ids("A10", "N3")
def test_a_server_that_is_killed_and_started_500_times(run_python, door_dir):
    path = door_dir / "a.door"
    run_python(_kill_and_start, path, 500)
    assert os.listdir(door_dir) == ["a.door"]
    path.unlink()


def _kill_and_start(path: Path, times: int) -> None:
    for _ in range(times):
        pid, ready = _forked_server(path)
        try:
            assert os.read(ready, 1) == b"."
            reach(path, deadline=time.monotonic() + 5).socket.close()
        finally:
            os.close(ready)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _forked_server(path: Path) -> tuple[int, int]:
    ready, ready_child = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with publish(path):
                os.write(ready_child, b".")
                signal.pause()
        finally:
            os._exit(1)
    os.close(ready_child)
    return pid, ready


@pytest.mark.ids("A10")
@pytest.mark.parametrize("state", ["new", "stale"])
def test_a_server_killed_at_any_step_leaves_no_trap(run_python, door_dir, state):
    """
    Killed before each call of a C function in turn; the next server starts, and tidies up.
    """
    path = door_dir / "a.door"
    assert run_python(_kill_at_each_step, path, state).value > 50
    path.unlink()


def _kill_at_each_step(path: Path, state: str) -> int:
    steps = 0
    while not _finishes_before(steps, path, state):
        with publish(path) as name:
            reach(path).socket.close()
            assert os.listdir(path.parent) == ["a.door"], f"left behind at step {steps}"
            assert name.remove()
        steps += 1
    return steps


def _finishes_before(step: int, path: Path, state: str) -> bool:
    """Publish in a child that is killed before its n-th call of a C function; tell whether it was not."""
    if state == "stale":
        leave_stale(path)
    pid = os.fork()
    if pid == 0:
        try:
            _die_at(step)
            publish(path)
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def _die_at(step: int) -> None:
    left = step

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        if event == "c_call":
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.setprofile(count)
