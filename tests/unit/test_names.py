"""
Names of doors in the file system: how they appear, whom they yield to, and who gets in.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import support

from doorpool import _names
from doorpool._errors import AccessError, BrokenDoorError, CallTimeoutError, DoorError, NotADoorError
from doorpool._names import Name, publish, reach

STRANGER = 4711
OTHER = 4712
NOBODY = 65534


# -- what the tests are made of


@pytest.fixture
def make_dir() -> Iterator[Callable[..., Path]]:
    """
    Make directories that other users can reach, of a mode and an owner.
    """
    with contextlib.ExitStack() as stack:

        def make(mode: int, uid: int = -1, gid: int = -1) -> Path:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dp-")))
            folder.chmod(0o755)
            inner = folder / "in"
            inner.mkdir()
            os.chown(inner, uid, gid)
            inner.chmod(mode)
            return inner

        yield make


@pytest.fixture
def sticky(make_dir: Callable[..., Path]) -> Path:
    """A directory such as /tmp."""
    return make_dir(0o1777)


@pytest.fixture
def published() -> Iterator[Callable[..., Name]]:
    """
    Publish names that are removed and closed at the end.
    """
    with contextlib.ExitStack() as stack:

        def make(*args: Any, **options: Any) -> Name:
            name = stack.enter_context(publish(*args, **options))
            stack.callback(name.remove)
            return name

        yield make


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Put the working directory back."""
    home = os.open(".", os.O_RDONLY)
    yield
    os.fchdir(home)
    os.close(home)


def leave_stale(path: Path | str, *, kind: int = socket.SOCK_SEQPACKET, mode: int = 0o600) -> tuple[int, int]:
    """Leave behind what a killed server leaves behind; return device and inode."""
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))
    os.chmod(path, mode)
    return identity(path)


def identity(path: Path | str) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino


def knocks(path: Path | str) -> bool:
    """Open a door by path; say that it worked."""
    reach(path, deadline=time.monotonic() + 5).socket.close()
    return True


def reaches(path: Path | str, name: Name) -> bool:
    """Tell whether a path leads to this listener and no other."""
    with reach(path).socket as client:
        try:
            connection, _ = name.listener.accept()
        except BlockingIOError:
            return False
        with connection:
            connection.send(b"it is me")
            return client.recv(100) == b"it is me"


def mode_of(path: Path | str) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def refusal(path: Any, **options: Any) -> OSError:
    """Publish where that must fail; return the error."""
    with pytest.raises(OSError) as caught:
        publish(path, **options).close()
    assert not isinstance(caught.value, DoorError)
    return caught.value


# -- a name appears


@pytest.mark.ids("N1", "A03")
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o622, 0o777, 0o200, 0o000])
def test_the_mode_is_exact_whatever_the_umask(door_dir, mode, umask):
    def in_a_child() -> tuple[int, int, int]:
        os.umask(umask)
        with publish(door_dir / "a.door", mode=mode) as name:
            seen = mode_of(name.path)
            assert os.listdir(door_dir) == ["a.door"]
            assert name.remove()
            return seen, name.mode, os.umask(umask)

    assert support.run_as_uid(None, in_a_child) == (mode, mode, umask)


@pytest.mark.ids("N1")
def test_a_name_is_0600_by_default_and_leads_to_its_listener(door_dir, published):
    name = published(door_dir / "a.door")
    assert mode_of(name.path) == name.mode == 0o600
    assert name.path == str(door_dir / "a.door")
    assert not name.listener.getblocking()
    assert not name.listener.get_inheritable()
    assert name.listener.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
    assert reaches(name.path, name)
    assert name.is_ours()


@pytest.mark.ids("N1")
def test_the_group_is_set_before_the_mode(make_dir, as_uid, published):
    folder = make_dir(0o755)
    name = published(folder / "a.door", mode=0o660, group=OTHER)
    assert os.lstat(name.path).st_gid == OTHER
    assert mode_of(name.path) == 0o660
    assert as_uid(STRANGER, knocks, name.path, groups=[OTHER])
    with pytest.raises(PermissionError):
        as_uid(STRANGER, knocks, name.path)


def test_a_group_by_name(door_dir, published):
    import grp

    gid = os.getegid()
    try:
        group = grp.getgrgid(gid).gr_name
    except KeyError:
        pytest.skip("our group has no name here")
    assert os.lstat(published(door_dir / "a.door", group=group).path).st_gid == gid


def test_a_group_that_is_none(door_dir):
    with pytest.raises(LookupError, match="no group 'no-such-group'"):
        publish(door_dir / "a.door", group="no-such-group")
    with pytest.raises(ValueError, match="-1"):
        publish(door_dir / "a.door", group=-1)
    for group in (True, 1.0, b"root"):
        with pytest.raises(TypeError, match="group must be"):
            publish(door_dir / "a.door", group=group)  # type: ignore[arg-type]
    assert os.listdir(door_dir) == []


def test_a_group_that_one_is_not_in_leaves_nothing_behind(make_dir, as_uid):
    folder = make_dir(0o755, STRANGER)
    with pytest.raises(PermissionError, match=f"group {OTHER}") as caught:
        as_uid(STRANGER, lambda: publish(folder / "a.door", group=OTHER).close())
    assert caught.value.filename == str(folder / "a.door")
    assert os.listdir(folder) == []


@pytest.mark.parametrize(("mode", "error"), [(0o1000, ValueError), (-1, ValueError), (0o4755, ValueError)])
def test_modes_out_of_range(door_dir, mode, error):
    with pytest.raises(error, match="mode must be within"):
        publish(door_dir / "a.door", mode=mode)
    assert os.listdir(door_dir) == []


@pytest.mark.parametrize("mode", [True, "600", 6.0, None])
def test_modes_that_are_none(door_dir, mode):
    with pytest.raises(TypeError, match="mode must be an int"):
        publish(door_dir / "a.door", mode=mode)


@pytest.mark.ids("N5")
def test_several_names_live_side_by_side(door_dir, published):
    names = [published(door_dir / part) for part in ("a.door", "b.door")]
    assert names[0].remove()
    assert not os.path.exists(names[0].path)
    assert reaches(names[1].path, names[1])


@pytest.mark.ids("N5")
def test_a_hard_link_made_by_hand_is_a_name_too(door_dir, published):
    name = published(door_dir / "a.door")
    os.link(name.path, door_dir / "b.door")
    assert reaches(door_dir / "b.door", name)
    os.unlink(door_dir / "b.door")


# -- who has the name already


@pytest.mark.ids("N3", "A10")
@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_stale_name_is_taken_over(door_dir, published, kind):
    old = leave_stale(door_dir / "a.door", kind=kind)
    witness = os.open(door_dir / "a.door", os.O_PATH | os.O_NOFOLLOW)
    try:
        name = published(door_dir / "a.door", mode=0o640)
        assert identity(name.path) != old
        assert os.fstat(witness).st_nlink == 0, "the stale socket was kept somewhere"
    finally:
        os.close(witness)
    assert mode_of(name.path) == 0o640
    assert reaches(name.path, name)
    assert os.listdir(door_dir) == ["a.door"]


@pytest.mark.ids("N3", "A10", "N10")
@pytest.mark.parametrize("mode", [0o444, 0o000, 0o066])
def test_a_stale_name_that_its_own_server_could_not_open_is_no_trap(make_dir, as_uid, mode):
    folder = make_dir(0o755, STRANGER)

    def twice() -> None:
        publish(folder / "a.door", mode=mode).close()
        with publish(folder / "a.door", mode=mode) as name:
            assert refusal(folder / "a.door").errno == errno.EEXIST
            assert mode_of(name.path) == mode
            assert name.remove()

    as_uid(STRANGER, twice)


@pytest.mark.ids("N2", "A11")
def test_a_live_door_keeps_its_name(door_dir, published):
    name = published(door_dir / "a.door")
    error = refusal(name.path)
    assert isinstance(error, FileExistsError)
    assert "live door" in str(error)
    assert "replace=True" in str(error)
    assert error.filename == name.path
    assert name.is_ours()
    name.listener.accept()[0].close()  # that of the asking
    assert reaches(name.path, name)
    assert os.listdir(door_dir) == ["a.door"]


@pytest.mark.ids("N2", "N6", "N12")
def test_replace_takes_the_name_of_a_live_door_and_leaves_it_its_clients(door_dir, published):
    old = published(door_dir / "a.door")
    with reach(old.path).socket as client:
        new = published(old.path, replace=True)
        assert not old.is_ours()
        assert new.is_ours()
        assert reaches(new.path, new)
        with old.listener.accept()[0] as connection:
            connection.send(b"still here")
        assert client.recv(100) == b"still here"
    assert not old.remove()
    assert new.is_ours()


@pytest.mark.ids("N2")
def test_replace_needs_nothing_to_replace(door_dir, published):
    name = published(door_dir / "a.door", replace=True)
    assert reaches(name.path, name)


@pytest.mark.ids("A20", "N13")
def test_a_door_with_a_full_queue_is_alive(door_dir, published):
    name = published(door_dir / "a.door", backlog=0)
    with reach(name.path).socket:
        started = time.monotonic()
        error = refusal(name.path)
        assert time.monotonic() - started < 1.0
        assert isinstance(error, FileExistsError)
        assert "full" in str(error)
        assert name.is_ours()
        published(name.path, replace=True)
        assert not name.is_ours()


@pytest.mark.ids("A07")
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("file", "regular file"),
        ("directory", "directory"),
        ("full directory", "directory"),
        ("fifo", "FIFO"),
        ("dangling link", "symbolic link"),
        ("link to a stale socket", "symbolic link"),
        ("link to /etc/passwd", "symbolic link"),
        ("stream socket", "another kind"),
        ("datagram socket", "another kind"),
    ],
)
def test_what_is_no_door_is_left_alone(door_dir, kind, words, replace):
    path = door_dir / "a.door"
    with contextlib.ExitStack() as stack:
        _put_there(kind, path, stack)
        before = os.lstat(path)
        error = refusal(path, replace=replace)
        assert isinstance(error, FileExistsError)
        assert words in str(error)
        assert error.filename == str(path)
        after = os.lstat(path)
        assert (after.st_ino, after.st_mode, after.st_ctime_ns) == (
            before.st_ino,
            before.st_mode,
            before.st_ctime_ns,
        )
        if kind == "link to a stale socket":
            assert stat.S_ISSOCK(os.stat(path).st_mode)
            os.unlink(door_dir / "stale")
    if "socket" in kind and path.is_socket():
        path.unlink()


def _put_there(kind: str, path: Path, stack: contextlib.ExitStack) -> None:
    match kind:
        case "file":
            path.write_text("precious")
        case "directory":
            path.mkdir()
        case "full directory":
            (path / "inner").mkdir(parents=True)
        case "fifo":
            os.mkfifo(path)
        case "dangling link":
            path.symlink_to("nowhere")
        case "link to a stale socket":
            leave_stale(path.parent / "stale")
            path.symlink_to("stale")
        case "link to /etc/passwd":
            path.symlink_to("/etc/passwd")
        case _:
            stream = kind == "stream socket"
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if stream else socket.SOCK_DGRAM)
            stack.enter_context(sock).bind(str(path))
            if stream:
                sock.listen()


@pytest.mark.ids("A18")
@pytest.mark.parametrize("replace", [False, True])
def test_root_leaves_the_socket_of_another_user_alone(sticky, as_uid, replace):
    path = sticky / "a.door"
    before = as_uid(STRANGER, leave_stale, path)
    error = refusal(path, replace=replace)
    assert isinstance(error, FileExistsError)
    assert f"uid {STRANGER}" in str(error)
    assert identity(path) == before
    assert os.listdir(sticky) == ["a.door"]


@pytest.mark.ids("A18")
def test_what_came_to_the_name_after_the_look_is_put_back(door_dir, published, monkeypatch):
    """
    Between our look and our step the stale socket is replaced: what came out is not what we saw.
    """
    path = door_dir / "a.door"
    leave_stale(path)
    exchange = _names._rename_exchange

    def somebody_is_quicker(*args: Any) -> int:
        monkeypatch.setattr(_names, "_rename_exchange", exchange)
        path.unlink()
        path.write_text("precious")
        return exchange(*args)

    monkeypatch.setattr(_names, "_rename_exchange", somebody_is_quicker)
    assert "regular file" in str(refusal(path))
    assert path.read_text() == "precious"
    assert os.listdir(door_dir) == ["a.door"]


def fails(monkeypatch: pytest.MonkeyPatch, method: str, times: int, what: Any = False) -> list[int]:
    """Have a method of rooms fail so many times, raising or returning this; return how often it did."""
    works, failed = getattr(_names._Room, method), []

    def call(room: Any, *args: Any) -> Any:
        if len(failed) == times:
            return works(room, *args)
        failed.append(len(failed))
        if isinstance(what, Exception):
            raise what
        return what

    monkeypatch.setattr(_names._Room, method, call)
    return failed


@pytest.mark.ids("A18")
@pytest.mark.parametrize("times", [1, 2, 3])
def test_who_was_at_the_name_and_is_gone_is_no_obstacle(door_dir, published, monkeypatch, times):
    """Found when linking, and gone at the look that follows: before the lock is had, or with it."""
    failed = fails(monkeypatch, "link_out", times)
    name = published(door_dir / "a.door")
    assert len(failed) == times
    assert reaches(name.path, name)
    assert os.listdir(door_dir) == ["a.door"]


@pytest.mark.ids("A18")
def test_who_goes_between_the_look_and_the_swap_is_no_obstacle(door_dir, published, monkeypatch):
    path = door_dir / "a.door"
    leave_stale(path)
    exchange = _names._rename_exchange

    def gone(*args: Any) -> int:
        monkeypatch.setattr(_names, "_rename_exchange", exchange)
        path.unlink()
        return exchange(*args)

    monkeypatch.setattr(_names, "_rename_exchange", gone)
    name = published(path)
    assert reaches(name.path, name)
    assert os.listdir(door_dir) == ["a.door"]


@pytest.mark.ids("A18")
def test_others_who_keep_changing_what_is_there_are_left_alone_in_the_end(door_dir, monkeypatch):
    before = leave_stale(door_dir / "a.door")
    fails(monkeypatch, "swap_out", 1_000)
    error = refusal(door_dir / "a.door")
    assert error.errno == errno.EEXIST
    assert "others keep changing what is here; it was left alone, try again" in str(error)
    assert error.filename == str(door_dir / "a.door")
    assert os.listdir(door_dir) == ["a.door"]
    assert identity(door_dir / "a.door") == before
    os.unlink(door_dir / "a.door")


@pytest.mark.ids("A18")
@pytest.mark.parametrize("replace", [False, True])
def test_a_socket_that_cannot_be_asked_whether_it_lives_is_left_alone(
    door_dir, published, monkeypatch, replace
):
    name = published(door_dir / "a.door")
    monkeypatch.setattr(_names, "_probe", lambda *_: errno.EACCES)
    error = refusal(name.path, replace=replace)
    assert error.errno == errno.EEXIST
    assert "cannot be asked whether it lives (Permission denied); it was left alone" in str(error)
    monkeypatch.undo()
    assert reaches(name.path, name)


@pytest.mark.ids("A18")
def test_what_cannot_be_put_back_is_kept(door_dir, monkeypatch):
    path = door_dir / "a.door"
    leave_stale(path)
    exchange = _names._rename_exchange

    def twice_quicker(*args: Any) -> int:
        if path.is_socket():
            path.unlink()
            path.write_text("precious")
            number = exchange(*args)
            path.unlink()
            return number
        return exchange(*args)

    monkeypatch.setattr(_names, "_rename_exchange", twice_quicker)
    error = refusal(path)
    (room,) = door_dir.iterdir()
    assert repr(str(room)) in str(error)
    assert (room / "a.door").read_text() == "precious"
    _names.publish(door_dir / "b.door").close()
    assert (room / "a.door").read_text() == "precious", "swept away"
    (door_dir / "b.door").unlink()
    (room / "a.door").unlink()
    room.rmdir()


@pytest.mark.ids("H06", "A18")
def test_what_cannot_be_looked_at_is_put_back(door_dir, published, monkeypatch):
    """A living door keeps its name when, having swapped, we cannot tell whose came out."""
    name = published(door_dir / "a.door")
    _look_in_vain_from(2, monkeypatch)
    assert refusal(name.path, replace=True).errno == errno.ENOMEM
    assert name.is_ours()
    assert os.listdir(door_dir) == ["a.door"]


@pytest.mark.ids("H06")
def test_a_room_is_cleared_though_it_cannot_be_looked_at(door_dir, monkeypatch):
    _look_in_vain_from(1, monkeypatch)
    assert refusal(door_dir / "a.door").errno == errno.ENOMEM
    assert os.listdir(door_dir) == []


@pytest.mark.ids("H06")
def test_a_lock_that_cannot_be_given_back_undoes_nothing(door_dir, published, monkeypatch):
    flock = fcntl.flock

    def keep(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", keep)
    leave_stale(door_dir / "a.door")
    name = published(door_dir / "a.door")
    assert reaches(name.path, name)
    assert name.remove()
    assert os.listdir(door_dir) == []


def _look_in_vain_from(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the first look into a room fail, or a later one, and all that come then."""
    look, numbers = _names._Room._look, itertools.count(1)

    def vain(room: Any) -> os.stat_result:
        if next(numbers) >= first:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return look(room)

    monkeypatch.setattr(_names._Room, "_look", vain)


@pytest.mark.ids("N3")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_exchange(door_dir, make_dir, published, monkeypatch, number):
    monkeypatch.setattr(_names, "_rename_exchange", lambda *args: number)
    leave_stale(door_dir / "a.door")
    name = published(door_dir / "a.door")
    assert reaches(name.path, name)
    shared = make_dir(0o1777) / "a.door"
    before = leave_stale(shared)
    assert refusal(shared).errno == number
    assert identity(shared) == before
    assert os.listdir(shared.parent) == ["a.door"]


def test_renameat2_without_a_wrapper_of_the_c_library(door_dir, published, monkeypatch):
    if os.uname().machine not in _names._RENAMEAT2_NUMBERS:
        pytest.skip("the number of the system call is not known for this machine")

    class OldLibrary:
        syscall = _names._libc.syscall

    monkeypatch.setattr(_names, "_libc", OldLibrary())
    leave_stale(door_dir / "a.door")
    name = published(door_dir / "a.door")
    assert reaches(name.path, name)


# -- the lock


@contextlib.contextmanager
def lock_held(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.ids("A19")
def test_a_lock_held_for_ever_is_an_error_in_bounded_time(sticky, published):
    path = sticky / "a.door"
    before = leave_stale(path)
    with lock_held(sticky):
        published(sticky / "new.door")  # needs no lock
        assert "live door" in str(refusal(sticky / "new.door"))  # nor does this
        started, worked = time.monotonic(), time.process_time()
        error = refusal(path)
        assert 1.9 <= time.monotonic() - started < 4.0
        assert time.process_time() - worked < 0.5, "busy waiting"
    assert isinstance(error, TimeoutError)
    assert "lock" in str(error)
    assert str(sticky) in str(error)
    assert error.filename == str(path)
    assert identity(path) == before
    assert sorted(os.listdir(sticky)) == ["a.door", "new.door"]


@pytest.mark.ids("A19")
def test_removing_waits_for_the_lock_too(door_dir, published, monkeypatch):
    monkeypatch.setattr(_names, "LOCK_TIMEOUT", 0.05)
    name = published(door_dir / "a.door")
    with lock_held(door_dir):
        with pytest.raises(TimeoutError, match="lock"):
            name.remove()
        assert name.is_ours()
    assert name.remove()


@pytest.mark.ids("A19")
def test_many_names_wait_once_for_a_lock_that_is_never_given_up(door_dir, published):
    names = [published(door_dir / f"{number}.door") for number in range(4)]
    with lock_held(door_dir):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="lock"):
            names[0].remove()
        waited = time.monotonic() - began
        for name in names:
            with pytest.raises(TimeoutError, match="lock"):
                name.remove()
        assert time.monotonic() - began < 1.5 * waited
    assert all(name.remove() for name in names)
    assert not holds_grudge(door_dir), "the lock was had since"


@pytest.mark.ids("A19")
def test_a_grudge_is_against_one_directory_and_soon_forgotten(tmp_path, published, monkeypatch):
    monkeypatch.setattr(_names, "LOCK_TIMEOUT", 0.05)
    first, second = (tmp_path / which for which in ("first", "second"))
    first.mkdir(mode=0o700)
    leave_stale(first / "a.door")
    with lock_held(first):
        assert isinstance(refusal(first / "a.door"), TimeoutError)
    assert holds_grudge(first)
    first.rename(second)  # as if it were removed, and its number given to another
    with lock_held(second) as lock, monkeypatch.context() as patch:
        patch.setattr(_names, "LOCK_TIMEOUT", 30.0)
        patch.setattr(time, "sleep", lambda _: fcntl.flock(lock, fcntl.LOCK_UN))
        published(second / "a.door")

    monkeypatch.setattr(_names, "_GRUDGE", 0.0)
    leave_stale(second / "b.door")
    with lock_held(second):
        assert isinstance(refusal(second / "b.door"), TimeoutError)
    assert not holds_grudge(first)
    assert holds_grudge(second)


def holds_grudge(directory: Path) -> bool:
    return any(path == str(directory) for path, _ in _names._in_vain)


@pytest.mark.ids("A19")
def test_a_lock_that_is_given_up_is_had(door_dir, published, monkeypatch):
    leave_stale(door_dir / "a.door")
    monkeypatch.setattr(_names, "LOCK_TIMEOUT", 30.0)
    with lock_held(door_dir) as lock:
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(lock, fcntl.LOCK_UN))
        name = published(door_dir / "a.door")
    assert name.is_ours()


@pytest.mark.ids("N4", "A13")
def test_a_child_that_outlives_its_server_keeps_no_lock_and_no_name(door_dir, published):
    def server_with_a_sleeper() -> int:
        server.append(publish(door_dir / "a.door"))
        out, out_child = os.pipe()
        sleeper = os.fork()
        if sleeper == 0:
            os.write(out_child, b".")  # out of the fork, with all that is done there
            signal.pause()
        os.read(out, 1)
        return sleeper

    server: list[Name] = []
    sleeper = support.run_as_uid(None, server_with_a_sleeper)
    try:
        name = published(door_dir / "a.door")
        assert reaches(name.path, name)
    finally:
        os.kill(sleeper, signal.SIGKILL)


# -- a name goes away


@pytest.mark.ids("N6", "N7")
def test_removing_leaves_connections_alone(door_dir):
    with publish(door_dir / "a.door") as name:
        with reach(name.path).socket as client:
            assert name.remove()
            assert not os.path.lexists(name.path)
            with name.listener.accept()[0] as connection:
                connection.send(b"still here")
            assert client.recv(100) == b"still here"
        assert not name.remove()
        assert not name.is_ours()


@pytest.mark.ids("A12")
def test_closing_removes_nothing(door_dir, published):
    name = published(door_dir / "a.door")
    name.close()
    name.close()
    assert name.closed
    assert "closed" in repr(name)
    assert os.listdir(door_dir) == ["a.door"]
    with pytest.raises(BrokenDoorError):
        reach(name.path)
    os.unlink(name.path)


@pytest.mark.ids("A12")
@pytest.mark.parametrize("where", ["here", "/dev/shm"])
def test_a_successor_keeps_its_name(door_dir, published, where):
    if where != "here" and not os.access(where, os.W_OK):
        pytest.skip(f"no {where}")
    with tempfile.TemporaryDirectory(prefix="dp-", dir=door_dir if where == "here" else where) as folder:
        path = os.path.join(folder, "a.door")
        first = published(path)
        os.rename(published(os.path.join(folder, "b.door")).path, path)
        assert not first.is_ours()
        assert not first.remove()
        first.close()
        assert not first.remove()
        assert knocks(path)
        os.unlink(path)


@pytest.mark.ids("A12")
def test_the_number_of_a_removed_socket_proves_nothing(door_dir, published):
    """
    ext4 gives an inode number out again at once, so nothing is ours once we have closed.
    """
    first = publish(door_dir / "a.door")
    os.unlink(first.path)
    first.close()
    second = published(first.path)
    first._identity = second._identity  # what the file system may do, done by hand
    assert not first.is_ours()
    assert not first.remove()
    assert second.is_ours()


@pytest.mark.ids("A12", "A07")
def test_another_thing_at_the_name_is_not_removed(door_dir, published):
    name = published(door_dir / "a.door")
    os.unlink(name.path)
    Path(name.path).write_text("precious")
    assert not name.is_ours()
    assert not name.remove()
    assert Path(name.path).read_text() == "precious"


def test_removing_when_the_directory_is_gone(published):
    with tempfile.TemporaryDirectory(prefix="dp-") as folder:
        name = published(os.path.join(folder, "a.door"))
        os.unlink(name.path)
    assert not name.remove()


@pytest.mark.ids("N7")
def test_a_name_that_somebody_else_removes_meanwhile_was_not_removed_by_us(door_dir, monkeypatch):
    unlink = os.unlink

    def second(path: Any, **options: Any) -> None:
        unlink(path, **options)
        unlink(path, **options)

    with publish(door_dir / "a.door") as name:
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", second)
            assert name.remove() is False
        assert os.listdir(door_dir) == []


def test_a_name_that_cannot_be_looked_at_is_not_taken_for_ours(door_dir, published, monkeypatch):
    name = published(door_dir / "a.door")

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(_names._Place, "look", fail)
        assert not name.is_ours()
    assert name.is_ours()


def test_removing_follows_the_directory_that_was_opened(door_dir, published):
    (door_dir / "one").mkdir()
    name = published(door_dir / "one/a.door")
    (door_dir / "one").rename(door_dir / "two")
    (door_dir / "one").mkdir()
    (door_dir / "one/a.door").write_text("precious")
    assert name.remove()
    assert os.listdir(door_dir / "two") == []
    assert (door_dir / "one/a.door").exists()


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_removing_without_permission_says_so(make_dir, root_only, mode):
    with publish(make_dir(mode) / "a.door") as name:
        os.seteuid(STRANGER)
        try:
            with pytest.raises(PermissionError, match="permission") as caught:
                name.remove()
        finally:
            os.seteuid(0)
        assert caught.value.filename == name.path
        assert name.remove()


@pytest.mark.ids("Y1")
def test_a_forked_child_takes_nothing_along(door_dir, published):
    name = published(door_dir / "a.door")

    def in_a_child() -> tuple[bool, bool, bool]:
        stranger = os.open("/dev/null", os.O_RDONLY)
        answer = name.closed, name.is_ours(), name.remove()
        name.close()
        os.fstat(stranger)
        os.close(stranger)
        return answer

    assert support.run_as_uid(None, in_a_child) == (True, False, False)
    assert name.is_ours()
    assert reaches(name.path, name)


def test_a_name_dropped_open_warns_and_closes(door_dir):
    name = publish(door_dir / "a.door")
    name.remove()
    kept = [name]
    del name
    with pytest.warns(ResourceWarning, match=r"a\.door"):
        kept.clear()


# -- paths


@pytest.mark.ids("A05")
@pytest.mark.parametrize("path", ["", b"", "@x", b"@x", "\0x", b"\0x", "a\0b", b"/tmp/a\0b", Path("@x")])
@pytest.mark.parametrize("function", [publish, reach])
def test_paths_that_are_no_paths(function, path):
    with pytest.raises(ValueError, match=r"abstract name|NUL|empty"):
        function(path)


@pytest.mark.ids("A05")
@pytest.mark.parametrize("function", [publish, reach])
def test_an_abstract_name_is_refused_by_that_word(function):
    for path in ("@x", "\0x"):
        with pytest.raises(ValueError, match="abstract name, and those are not used"):
            function(path)


@pytest.mark.parametrize("path", [3, None, True, ["a"]])
@pytest.mark.parametrize("function", [publish, reach])
def test_things_that_are_no_paths(function, path):
    with pytest.raises(TypeError):
        function(path)


@pytest.mark.ids("A05", "A14")
@pytest.mark.parametrize("spell", [str, os.fsencode, Path])
@pytest.mark.parametrize("part", ["a.door", "./@x", "b c\n", os.fsdecode(b"\xff\xfe.door"), "…", "-"])
def test_odd_names(door_dir, published, part, spell):
    path = spell(os.path.join(door_dir, part))
    name = published(path)
    assert name.path == os.fsdecode(path)
    assert reaches(path, name)
    assert os.fsencode(os.path.basename(part)) in os.listdir(os.fsencode(door_dir))
    refusal(path).__str__().encode("ascii", "backslashreplace")
    name.listener.accept()[0].close()
    assert name.remove()


@pytest.mark.ids("A14")
@pytest.mark.parametrize("length", [1, 80, 81, 107, 108, 200, 254, 255])
def test_names_of_any_length(door_dir, published, length):
    leave = door_dir / ("n" * length)
    leave.touch()
    leave.unlink()
    name = published(leave)
    assert reaches(name.path, name)
    name.close()
    again = published(leave)
    assert reaches(again.path, again)
    assert os.listdir(door_dir) == ["n" * length]


@pytest.mark.ids("A14")
@pytest.mark.parametrize("length", [106, 107, 108, 109, 200, 4_096])
def test_paths_of_any_length(door_dir, elsewhere, published, length):
    depth, rest = divmod(length - len(os.fsencode(door_dir)) - 1, 101)
    path = os.path.join(door_dir, *["d" * 100] * depth, "x" * max(rest, 1))
    os.chdir(door_dir)
    for _ in range(depth):  # longer paths than the kernel takes are made step by step
        os.mkdir("d" * 100)
        os.chdir("d" * 100)
    name = published(path)
    assert abs(len(name.path) - length) <= 1
    assert os.listdir(".") == ["x" * max(rest, 1)]
    assert reaches(path, name)
    assert "live door" in str(refusal(path))
    assert name.remove()


@pytest.mark.ids("A14")
@pytest.mark.parametrize("function", [publish, reach])
def test_a_part_of_256_bytes_is_refused(door_dir, function):
    for part in ("n" * 256, "…" * 86, "n" * 256 + "/a.door"):
        with pytest.raises(OSError, match="255") as caught:
            function(door_dir / part)
        assert caught.value.errno == errno.ENAMETOOLONG
        assert caught.value.filename == str(door_dir / part)


@pytest.mark.ids("A14")
def test_a_relative_path_is_made_absolute_at_once(door_dir, elsewhere, published):
    os.chdir(door_dir)
    name = published("a.door")
    assert name.path == os.path.join(os.getcwd(), "a.door")
    reached = reach(b"a.door")
    reached.socket.close()
    assert reached.path == name.path
    os.chdir("/")
    assert name.is_ours()
    assert name.remove()


@pytest.mark.ids("A14")
@pytest.mark.parametrize("function", [publish, reach])
def test_a_relative_path_without_a_working_directory(door_dir, elsewhere, function):
    gone = door_dir / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError, match="working directory") as caught:
        function("a.door")
    assert caught.value.filename == "a.door"


@pytest.mark.ids("A14")
def test_an_absolute_path_needs_no_working_directory(door_dir, elsewhere, published):
    gone = door_dir / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    name = published(door_dir / "a.door")
    assert reaches(name.path, name)


@pytest.mark.parametrize("tail", ["", ".", "..", "sub/", "sub/."])
def test_a_path_that_names_a_directory(door_dir, tail):
    (door_dir / "sub").mkdir()
    path = f"{door_dir}/{tail}"
    assert "a directory is here" in str(refusal(path))
    with pytest.raises(NotADoorError, match="a directory is at"):
        reach(path)
    assert os.listdir(door_dir) == ["sub"]


@pytest.mark.parametrize("function", [publish, reach])
def test_a_directory_that_is_missing_or_none(door_dir, function):
    with pytest.raises(FileNotFoundError) as missing:
        function(door_dir / "none/a.door")
    assert repr(str(door_dir / "none")) in str(missing.value)
    assert "make it first" in str(missing.value)
    (door_dir / "file").touch()
    with pytest.raises(NotADirectoryError) as file:
        function(door_dir / "file/a.door")
    assert repr(str(door_dir / "file")) in str(file.value)


@pytest.mark.parametrize("function", [publish, reach])
def test_links_that_lead_nowhere_end(door_dir, function):
    (door_dir / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="too many symbolic links") as caught:
        function(door_dir / "loop/a.door")
    assert caught.value.errno == errno.ELOOP


def test_links_on_the_way(door_dir, published):
    """
    Absolute, relative, through dots and through /proc: followed where nobody else can write.
    """
    (door_dir / "one/two").mkdir(parents=True)
    (door_dir / "absolute").symlink_to(door_dir / "one")
    (door_dir / "one/relative").symlink_to("../one/./two/")
    (door_dir / "one/two/up").symlink_to("..")
    name = published(door_dir / "absolute/relative/up/../one//relative/a.door")
    assert identity(name.path) == identity(door_dir / "one/two/a.door")
    descriptor = os.open(door_dir / "one/two", os.O_PATH)
    try:
        assert reaches(f"/proc/self/fd/{descriptor}/a.door", name)
    finally:
        os.close(descriptor)


# -- directories


@pytest.mark.ids("A08")
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o770, 0o707, 0o2775])
def test_a_directory_that_others_can_write_is_refused(make_dir, monkeypatch, mode):
    monkeypatch.setattr(_names, "_is_group_of_one", lambda *_: False)
    folder = make_dir(mode)
    error = refusal(folder / "a.door")
    assert isinstance(error, PermissionError)
    assert error.filename == str(folder)
    assert "not sticky" in str(error)
    assert "use a directory of your own" in str(error)
    assert os.listdir(folder) == []


@pytest.mark.ids("A08")
@pytest.mark.parametrize("mode", [0o755, 0o1777, 0o777])
@pytest.mark.parametrize("owner", [STRANGER, NOBODY])
def test_a_directory_of_another_user_is_refused(make_dir, root_only, owner, mode):
    folder = make_dir(mode, owner)
    error = refusal(folder / "a.door")
    assert isinstance(error, PermissionError)
    assert error.filename == str(folder)
    assert f"uid {owner}" in str(error)
    assert os.listdir(folder) == []


@pytest.mark.ids("A08")
def test_a_directory_that_we_may_not_write(make_dir, as_uid):
    folder = make_dir(0o755)
    with pytest.raises(PermissionError, match="write") as caught:
        as_uid(STRANGER, publish, folder / "a.door")
    assert caught.value.filename == str(folder / "a.door")
    hidden = make_dir(0o700)
    for function in (publish, reach):
        with pytest.raises(PermissionError, match=r"search permission \(x\)") as caught:
            as_uid(STRANGER, function, hidden / "sub/a.door")
        assert repr(str(hidden / "sub")) in str(caught.value)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777])
def test_directories_that_will_do(make_dir, as_uid, mode):
    folder = make_dir(mode) if mode & stat.S_ISVTX else make_dir(mode, STRANGER)

    def twice() -> None:
        for _ in range(2):
            with publish(folder / "a.door") as name:
                assert reaches(name.path, name)
                assert name.remove()

    as_uid(STRANGER, twice)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("mode", [0o1733, 0o300])
def test_a_directory_that_cannot_be_locked_is_refused_at_once(make_dir, as_uid, mode):
    """
    And not when the name is to be removed, or taken over after a crash.
    """
    folder = make_dir(mode) if mode & stat.S_ISVTX else make_dir(mode, STRANGER)
    with pytest.raises(PermissionError, match="read"):
        as_uid(STRANGER, publish, folder / "a.door")
    assert os.listdir(folder) == []


@pytest.mark.ids("A08")
@pytest.mark.parametrize("unknown", ["getpwuid", "getgrgid"])
def test_a_group_of_a_user_who_has_no_name_may_be_anybodys(make_dir, monkeypatch, unknown):
    import grp
    import pwd

    def nobody(_: int) -> Any:
        raise KeyError("not found")

    folder = make_dir(0o775)
    monkeypatch.setattr(pwd if unknown == "getpwuid" else grp, unknown, nobody)
    error = refusal(folder / "a.door")
    assert isinstance(error, PermissionError)
    assert "not sticky" in str(error)
    assert os.listdir(folder) == []


@pytest.mark.ids("A08")
def test_a_group_of_one_user_is_that_user(make_dir, as_uid, monkeypatch):
    """
    The umask of 002 that goes with such groups must not make every directory unsafe.
    """
    import grp
    import pwd

    folder = make_dir(0o775, STRANGER, STRANGER)
    group = {"name": "mallory", "members": []}
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(("user", "x", uid, uid, "", "/", "/")))
    monkeypatch.setattr(
        grp, "getgrgid", lambda gid: grp.struct_group((group["name"], "x", gid, group["members"]))
    )

    def attempt() -> bool:
        with publish(folder / "a.door") as name:
            return name.remove()

    with pytest.raises(PermissionError):
        as_uid(STRANGER, attempt)
    group["name"] = "user"
    assert as_uid(STRANGER, attempt)
    group["members"] = ["user"]
    assert as_uid(STRANGER, attempt)
    group["members"] = ["user", "mallory"]
    with pytest.raises(PermissionError):
        as_uid(STRANGER, attempt)


def test_an_access_list_speaks_through_the_group_bits(door_dir, published):
    user_obj, user, group_obj, mask, other, nobody = 1, 2, 4, 16, 32, 0xFFFFFFFF
    entries = [
        (user_obj, 7, nobody),
        (user, 7, STRANGER),
        (group_obj, 0, nobody),
        (mask, 7, nobody),
        (other, 0, nobody),
    ]
    packed = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, bits, who in entries
    )
    descriptor = os.open(door_dir, os.O_PATH)
    try:
        assert not _names._has_access_list(descriptor)
        try:
            os.setxattr(door_dir, "system.posix_acl_access", packed)
        except OSError as error:
            pytest.skip(f"no access lists here: {error.strerror}")
        assert _names._has_access_list(descriptor)
    finally:
        os.close(descriptor)
    assert isinstance(refusal(door_dir / "a.door"), PermissionError)


@pytest.mark.ids("A16", "A08")
@pytest.mark.parametrize("function", [publish, reach])
def test_a_strangers_link_on_the_way_is_not_followed(sticky, door_dir, as_uid, function):
    as_uid(STRANGER, os.symlink, door_dir, sticky / "app")
    with publish(door_dir / "a.door") as name:
        with pytest.raises(AccessError, match=f"symbolic link of uid {STRANGER}"):
            function(sticky / "app/a.door")
        with pytest.raises(AccessError, match=f"symbolic link of uid {STRANGER}"):
            function(sticky / "app/other.door")
        os.unlink(sticky / "app")
        os.symlink(door_dir, sticky / "app")
        assert reaches(sticky / "app/a.door", name), "our own link in a sticky directory is safe"
        assert name.remove()


@pytest.mark.ids("A10")
def test_rooms_of_the_dead_are_swept_and_others_are_not(sticky, published):
    def half_made(part: str, mode: int = 0o700) -> Path:
        room = sticky / f".doorpool-{part}"
        room.mkdir()
        room.chmod(mode)
        return room

    empty, dead, wide, full, living = (
        half_made("empty"),
        half_made("dead"),
        half_made("wide", 0o755),
        half_made("full"),
        half_made("living"),
    )
    leave_stale(dead / "a.door")
    (full / "file").write_text("precious")
    (sticky / ".doorpool-file").touch()
    with lock_held(living):
        published(sticky / "a.door")
    left = sorted(path.name for path in sticky.iterdir())
    assert left == [".doorpool-file", ".doorpool-full", ".doorpool-living", ".doorpool-wide", "a.door"]
    assert not empty.exists()
    assert wide.exists()


@pytest.mark.ids("A10")
@pytest.mark.parametrize("when", ["before it is opened", "before it is locked", "while it is locked"])
def test_a_room_lost_to_a_sweeper_is_made_again(door_dir, published, monkeypatch, when):
    made: list[str] = []
    held, opened = _names._is_held, os.open

    def sweep_before_open(path: Any, *args: Any, **options: Any) -> int:
        if str(path).startswith(".doorpool-") and not made:
            made.append(str(path))
            os.rmdir(door_dir / path)
        return opened(path, *args, **options)

    def sweep_before_lock(descriptor: int) -> bool:
        if made:
            return held(descriptor)
        (room,) = door_dir.glob(".doorpool-*")
        made.append(room.name)
        if when == "before it is locked":
            room.rmdir()
            return held(descriptor)
        with lock_held(room):
            return held(descriptor)

    if when == "before it is opened":
        monkeypatch.setattr(os, "open", sweep_before_open)
        monkeypatch.setattr(_names, "_sweep", lambda place: None)
    else:
        monkeypatch.setattr(_names, "_is_held", sweep_before_lock)
    name = published(door_dir / "a.door")
    assert made
    assert reaches(name.path, name)
    assert os.listdir(door_dir) == ["a.door"]


@pytest.mark.ids("A10")
def test_rooms_that_are_lost_again_and_again_are_told(door_dir, monkeypatch):
    fails(monkeypatch, "enter", 1_000)
    error = refusal(door_dir / "a.door")
    assert error.errno == errno.EBUSY
    assert f"others keep removing directories in {str(door_dir)!r}" in str(error)
    assert os.listdir(door_dir) == []


@pytest.mark.ids("A08")
def test_a_room_that_the_file_system_gives_to_somebody_else_is_none(door_dir, root_only, monkeypatch):
    """As one does that squashes root (NFS)."""
    mkdir = os.mkdir

    def squash(path: str, mode: int, *, dir_fd: int) -> None:
        mkdir(path, mode, dir_fd=dir_fd)
        os.chown(path, NOBODY, NOBODY, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", squash)
    error = refusal(door_dir / "a.door")
    assert error.errno == errno.EPERM
    assert f"a directory made in {str(door_dir)!r} belongs to uid {NOBODY}, not to us" in str(error)
    assert os.listdir(door_dir) == []


# -- nothing is left behind


_STEPS = ["mkdir", "open", "chmod", "link", "fchmod"]


@pytest.mark.parametrize("step", [*_STEPS, "listen", "bind", "door_socket"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPERM, errno.EMFILE])
def test_a_step_that_fails_leaves_nothing(door_dir, monkeypatch, step, number):
    """
    Each error names the path and says what to do; directory and descriptors are as before.
    """
    leave_stale(door_dir / "a.door")
    before = identity(door_dir / "a.door")
    descriptors = sorted(os.listdir("/proc/self/fd"))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    class Socket(socket.socket):
        listen = fail if step == "listen" else socket.socket.listen
        bind = fail if step == "bind" else socket.socket.bind

    with monkeypatch.context() as patch:
        if step in _STEPS:
            patch.setattr(os, step, fail)
        else:
            patch.setattr(
                _names,
                "door_socket",
                fail if step == "door_socket" else lambda: Socket(socket.AF_UNIX, socket.SOCK_SEQPACKET),
            )
        error = refusal(door_dir / "a.door")
    assert error.errno == number
    assert error.filename == str(door_dir / "a.door")
    assert "\n" not in str(error)
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert os.listdir(door_dir) == ["a.door"]
    assert identity(door_dir / "a.door") == before
    os.unlink(door_dir / "a.door")


def test_a_file_system_that_keeps_no_modes(door_dir, monkeypatch):
    monkeypatch.setattr(os, "chmod", lambda *args, **options: None)
    error = refusal(door_dir / "a.door", mode=0o777)
    assert "does not keep the mode 0777" in str(error)
    assert os.listdir(door_dir) == []


def test_without_free_descriptors_the_error_says_so(door_dir):
    import resource

    def starved() -> list[str]:
        said = []
        publish(door_dir / "a.door")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        for spare in range(1, 6):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
            for function, part in ((publish, "b.door"), (reach, "a.door")):
                try:
                    made = function(door_dir / part)  # type: ignore[operator]
                except OSError as error:
                    said.append(str(error))
                else:
                    (made.socket if function is reach else made).close()  # type: ignore[attr-defined]
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(door_dir / "b.door")
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.unlink(door_dir / "a.door")
        return said

    said = support.run_as_uid(None, starved)
    assert len(said) >= 2
    assert all("[Errno 24]" in text and "RLIMIT_NOFILE" in text for text in said)
    assert all(str(door_dir) in text for text in said)
    assert os.listdir(door_dir) == []


# -- the client's side


@pytest.mark.ids("A04", "N8", "N10")
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o622, 0o660, 0o666, 0o444, 0o602, 0o777])
def test_who_may_open_is_whoever_may_write(make_dir, published, as_uid, mode):
    """
    Linux looks at the *write* bit; illumos would have looked at the read bit.
    """
    name = published(make_dir(0o755) / "a.door", mode=mode, group=OTHER)
    for gid, bit in ((OTHER, stat.S_IWGRP), (STRANGER, stat.S_IWOTH)):
        if mode & bit:
            assert as_uid(STRANGER, knocks, name.path, gid=gid)
            continue
        with pytest.raises(AccessError, match="write permission") as caught:
            as_uid(STRANGER, knocks, name.path, gid=gid)
        assert f"mode {mode:04o}" in str(caught.value)
        assert f"uid {STRANGER}" in str(caught.value)
        assert "uid 0" in str(caught.value)
        assert caught.value.filename == name.path
        assert not caught.value.may_have_run


@pytest.mark.ids("N8", "N9")
def test_permission_is_looked_at_when_opening_and_at_once(make_dir, published, as_uid):
    name = published(make_dir(0o755) / "a.door", mode=0o666)
    assert as_uid(STRANGER, knocks, name.path)
    name.listener.accept()[0].close()
    with reach(name.path).socket as client:
        os.chmod(name.path, 0o600)
        with pytest.raises(AccessError):
            as_uid(STRANGER, knocks, name.path)
        assert reaches_through(client, name)


def reaches_through(client: socket.socket, name: Name) -> bool:
    with name.listener.accept()[0] as connection:
        connection.send(b"it is me")
        return client.recv(100) == b"it is me"


@pytest.mark.ids("N12")
def test_moving_the_name_moves_no_client(door_dir, published):
    name = published(door_dir / "a.door")
    with reach(name.path).socket as client:
        os.rename(name.path, door_dir / "b.door")
        assert reaches_through(client, name)
    assert reaches(door_dir / "b.door", name)
    os.rename(door_dir / "b.door", name.path)


def test_what_is_reached(door_dir, published):
    name = published(door_dir / "a.door")
    reached = reach(name.path)
    with reached.socket:
        assert reached.path == name.path
        assert reached.owner == os.geteuid()
        assert not reached.socket.getblocking()
        assert not reached.socket.get_inheritable()
        assert reached.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)


def test_the_owner_is_that_of_the_file(make_dir, as_uid, root_only):
    folder = make_dir(0o755, STRANGER)
    assert as_uid(STRANGER, lambda: publish(folder / "a.door").close()) is None
    with pytest.raises(BrokenDoorError):
        reach(folder / "a.door")
    os.chown(folder / "a.door", OTHER, -1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        os.unlink(folder / "a.door")
        listener.bind(str(folder / "a.door"))
        listener.listen()
        os.chown(folder / "a.door", OTHER, -1)
        reached = reach(folder / "a.door")
        reached.socket.close()
        assert reached.owner == OTHER


def test_nothing_there(door_dir):
    with pytest.raises(FileNotFoundError, match="start its server") as caught:
        reach(door_dir / "a.door")
    assert caught.value.filename == str(door_dir / "a.door")


@pytest.mark.ids("N3")
def test_a_stale_door(door_dir):
    path = door_dir / "a.door"
    leave_stale(path)
    with pytest.raises(BrokenDoorError, match="start it again") as caught:
        reach(path)
    assert caught.value.may_have_run is False
    assert caught.value.filename == str(path)
    path.unlink()


@pytest.mark.ids("N14", "A07")
@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "stream socket", "datagram socket"])
def test_opening_what_is_no_door(door_dir, kind):
    path = door_dir / "a.door"
    with contextlib.ExitStack() as stack:
        _put_there(kind, path, stack)
        with pytest.raises(NotADoorError, match="not a door") as caught:
            reach(path)
        assert repr(str(path)) in str(caught.value)
        assert caught.value.filename == str(path)
        assert not caught.value.may_have_run
    if path.is_socket():
        path.unlink()


@pytest.mark.ids("A16")
def test_a_link_at_the_path_is_followed_where_nobody_else_can_write(door_dir, published):
    (door_dir / "sub").mkdir()
    name = published(door_dir / "sub/a.door")
    (door_dir / "first").symlink_to("second")
    (door_dir / "second").symlink_to("sub/../sub/a.door")
    reached = reach(door_dir / "first")
    reached.socket.close()
    assert reached.path == str(door_dir / "first")
    name.listener.accept()[0].close()
    assert reaches(door_dir / "first", name)
    (door_dir / "second").unlink()
    (door_dir / "second").symlink_to("first")
    with pytest.raises(OSError, match="too many symbolic links") as caught:
        reach(door_dir / "first")
    assert caught.value.errno == errno.ELOOP


@pytest.mark.ids("A16")
def test_a_link_in_a_shared_directory_is_not_followed(sticky, door_dir, published, as_uid):
    """
    It would lead the client to another door of its own user, which passes every check of uids.
    """
    name = published(door_dir / "other.door")
    as_uid(STRANGER, os.symlink, name.path, sticky / "a.door")
    with pytest.raises(AccessError, match="symbolic link") as caught:
        reach(sticky / "a.door")
    assert caught.value.filename == str(sticky / "a.door")
    assert not caught.value.may_have_run
    with pytest.raises(BlockingIOError):
        name.listener.accept()
    (door_dir / "trusted").symlink_to(sticky / "a.door")
    with pytest.raises(AccessError, match="symbolic link"):
        reach(door_dir / "trusted")


@pytest.mark.ids("A08")
def test_a_directory_where_anybody_can_put_a_socket_is_not_believed(make_dir):
    folder = make_dir(0o777)
    leave_stale(folder / "a.door")
    with pytest.raises(AccessError, match="anybody could have put a socket") as caught:
        reach(folder / "a.door")
    assert repr(str(folder)) in str(caught.value)
    assert caught.value.filename == str(folder / "a.door")


@pytest.mark.ids("A08")
def test_a_name_swapped_between_looking_and_connecting_is_not_reached(door_dir, published, monkeypatch):
    honest, squatter = published(door_dir / "a.door"), published(door_dir / "b.door")
    make = _names.door_socket

    def swap() -> socket.socket:
        os.rename(squatter.path, honest.path)
        return make()

    monkeypatch.setattr(_names, "door_socket", swap)
    with pytest.raises(BlockingIOError):
        with reach(honest.path).socket:
            squatter.listener.accept()
    os.unlink(honest.path)


# -- waiting in line


@pytest.mark.ids("A20", "N13")
def test_a_full_queue_is_waited_for_until_the_deadline(door_dir, published):
    name = published(door_dir / "a.door", backlog=0)
    with reach(name.path).socket:
        started, worked = time.monotonic(), time.process_time()
        with pytest.raises(CallTimeoutError, match="full") as caught:
            reach(name.path, deadline=started + 0.3)
        assert 0.29 <= time.monotonic() - started < 2.0
        assert time.process_time() - worked < 0.1, "busy waiting"
        assert caught.value.may_have_run is False
        assert caught.value.filename == name.path
        with pytest.raises(CallTimeoutError):
            reach(name.path, deadline=started)


@pytest.mark.ids("A20", "N13")
@pytest.mark.parametrize("patience", [None, 20.0])
def test_room_in_the_queue_is_taken_at_once(door_dir, published, patience):
    name = published(door_dir / "a.door", backlog=0)
    got: list[socket.socket] = []
    with reach(name.path).socket:
        deadline = None if patience is None else time.monotonic() + patience
        waiter = threading.Thread(target=lambda: got.append(reach(name.path, deadline=deadline).socket))
        waiter.start()
        wait_until_connecting(waiter)
        name.listener.accept()[0].close()
        waiter.join(10)
    (client,) = got
    with client:
        assert not client.getblocking()
        timeout = client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
        assert not any(timeout)
        assert reaches_through(client, name)


def wait_until_connecting(thread: threading.Thread) -> None:
    """Wait until a thread sleeps in connect(2), as the kernel tells it."""
    call = Path(f"/proc/self/task/{thread.native_id}/syscall")
    number = {"x86_64": "42", "aarch64": "203"}.get(os.uname().machine)

    def waiting() -> bool:
        try:
            return number is None or call.read_text().split()[0] == number
        except OSError:
            return True  # not ours to read: then the test is only less strict

    support.wait_until(waiting)


@pytest.mark.ids("A20")
def test_a_server_that_dies_while_callers_wait_in_line(door_dir):
    name = publish(door_dir / "a.door", backlog=0)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            reach(name.path, deadline=time.monotonic() + 20)
        except BaseException as error:
            errors.append(error)

    with reach(name.path).socket:
        waiter = threading.Thread(target=wait)
        waiter.start()
        wait_until_connecting(waiter)
        name.remove()
        name.close()
        waiter.join(10)
    assert [type(error) for error in errors] == [BrokenDoorError]


def test_a_signal_does_not_end_the_waiting(door_dir, published):
    """
    CPython takes an interrupted local connect for a success; here it is tried again.
    """
    name = published(door_dir / "a.door", backlog=0)
    main = threading.main_thread()
    rang: list[int] = []

    def ring_then_make_room() -> None:
        for _ in range(3):
            wait_until_connecting(main)
            before = len(rang)
            signal.pthread_kill(main.ident, signal.SIGUSR1)
            support.wait_until(lambda before=before: len(rang) > before)
        wait_until_connecting(main)
        name.listener.accept()[0].close()

    old = signal.signal(signal.SIGUSR1, lambda number, frame: rang.append(number))
    try:
        with reach(name.path).socket:
            helper = threading.Thread(target=ring_then_make_room)
            helper.start()
            reached = reach(name.path, deadline=time.monotonic() + 20)
            helper.join(10)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert len(rang) == 3
    with reached.socket as client:
        client.getpeername()
        assert reaches_through(client, name)


def test_a_signal_handler_that_raises_ends_the_waiting(door_dir, published):
    name = published(door_dir / "a.door", backlog=0)
    main = threading.main_thread()

    def interrupt() -> None:
        wait_until_connecting(main)
        signal.pthread_kill(main.ident, signal.SIGUSR1)

    def raise_interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGUSR1, raise_interrupt)
    try:
        with reach(name.path).socket:
            helper = threading.Thread(target=interrupt)
            helper.start()
            with pytest.raises(KeyboardInterrupt):
                reach(name.path)
            helper.join(10)
    finally:
        signal.signal(signal.SIGUSR1, old)
