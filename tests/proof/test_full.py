"""
What is full, read-only or small: the disk of a name, /dev/shm, the address space.

The error is the system's, nothing is left, and as soon as there is room all goes on.  Disks are file systems
of a mount namespace of the process that fills them, so that nobody else sees them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MOUNTS = """
    import array, ctypes, errno, os, resource, sys, threading
    from doorpool import DoorError, Proxy, Server

    libc = ctypes.CDLL(None, use_errno=True)
    CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 0x4000, 1 << 18

    MS_BIND = 4096

    def mount(what, where, flags=0, options=""):
        kind = b"tmpfs" if what == b"tmpfs" else None
        if libc.mount(what, str(where).encode(), kind, flags, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "mount")

    def own_mounts():
        if libc.unshare(CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        mount(None, "/", MS_REC | MS_PRIVATE)

    def double(value):
        return value * 2

    def failure(action):
        try:
            action()
        except OSError as error:
            return error.errno
"""


@pytest.fixture
def mounts(root_only: None, run_python: Callable[..., Any]) -> Callable[..., Any]:
    """Run a script that may mount what it likes; skip where not even root may."""
    probe = run_python(MOUNTS + "    own_mounts()\n", check=False)
    if probe.returncode != 0:
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip().splitlines()[-1]}")
    return lambda script, *args: run_python(MOUNTS + script, *args).value


@pytest.mark.ids("H06")
def test_a_full_disk_for_the_name(mounts: Callable[..., Any], door_dir: Path) -> None:
    """ENOSPC, whatever there is no room for; the server starts when there is some, and leaves nothing."""
    script = """
    own_mounts()
    place = sys.argv[1]
    errors, left = [], []
    for inodes in range(1, 12):  # the directory itself takes one
        mount(b"tmpfs", place, 0, f"nr_inodes={inodes}")
        server = Server(max_threads=2)
        server.attach(double, f"{place}/a.door")
        errors.append(failure(server.start))
        if errors[-1] is None:
            with Proxy(f"{place}/a.door") as door:
                assert door(21) == 42
        else:
            left.append(os.listdir(place))
            mount(b"tmpfs", place, MS_REMOUNT, "nr_inodes=100")
            server.start()  # the same
            with Proxy(f"{place}/a.door") as door:
                assert door(21) == 42
        server.close()
        left.append(os.listdir(place))
        if libc.umount2(place.encode(), 0) != 0:
            raise OSError(ctypes.get_errno(), "something is left open in there")
    result((errors, left))
    """
    errors, left = mounts(script, door_dir)
    assert errors[0] == errno.ENOSPC
    assert errors[-1] is None
    assert set(errors) == {errno.ENOSPC, None}
    assert [names for names in left if names] == []


@pytest.mark.ids("H06")
@pytest.mark.leaves_names
def test_a_disk_that_becomes_read_only(mounts: Callable[..., Any], door_dir: Path) -> None:
    """No name can be made, nor taken away; whoever has one is called all the same, until he closes."""
    script = """
    own_mounts()
    place = sys.argv[1]
    mount(place.encode(), place, MS_BIND)
    os.chdir("/")
    server = Server(max_threads=2)
    server.attach(double, f"{place}/a.door")
    server.start()
    mount(None, place, MS_REMOUNT | MS_BIND | MS_RDONLY)
    other = failure(lambda: server.attach(double, f"{place}/b.door"))
    with Proxy(f"{place}/a.door") as door:  # a new one
        answer = door(21)
    before = os.listdir(place)
    server.close()
    after = failure(lambda: Proxy(f"{place}/a.door"))
    mount(None, place, MS_REMOUNT | MS_BIND)
    with Server(max_threads=2) as again:
        again.attach(double, f"{place}/a.door")
        with Proxy(f"{place}/a.door") as door:
            replaced = door(4)
    result((other, answer, before, after, replaced, os.listdir(place)))
    """
    other, answer, before, after, replaced, left = mounts(script, door_dir)
    assert other == errno.EROFS
    assert answer == 42
    assert before == ["a.door"]
    assert after in (errno.ECONNREFUSED, errno.ECONNRESET)  # a name of nobody's
    assert replaced == 8
    assert left == []


@pytest.mark.ids("D09")
def test_a_full_dev_shm_is_nothing_to_us(mounts: Callable[..., Any], door_dir: Path) -> None:
    """Segments have no name and take no room on that file system."""
    script = """
    own_mounts()
    mount(b"tmpfs", "/dev/shm", 0, "size=4k")
    with open("/dev/shm/all", "wb", buffering=0) as file:
        file.write(bytes(4096))
        assert failure(lambda: file.write(bytes(1))) == errno.ENOSPC
    with Server(max_threads=2) as server:
        server.attach(double, f"{sys.argv[1]}/a.door")
        with Proxy(f"{sys.argv[1]}/a.door") as door:
            sent = array.array("q", range(100_000))
            result((door(sent) == sent * 2, server.statistics().segments > 0))
    """
    assert mounts(script, door_dir)[0] is True


LITTLE_ROOM = """
    import array, os, resource, sys
    from doorpool import DoorError, Proxy, Server

    def room():  # how much of the address space is taken
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()

    def limit_room(more):
        resource.setrlimit(resource.RLIMIT_AS, (room() + more, resource.RLIM_INFINITY))

    def lift():
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


@pytest.mark.ids("D09", "H06")
def test_a_server_without_room_for_an_argument(
    spawn_server: Callable[..., Any], run_python: Callable[..., Any], door_dir: Path
) -> None:
    """An error for him who sent it, and no more: others are served, and he is when there is room."""
    server = """
    server = Server(max_threads=2)

    def take(what):
        if what == "little":
            limit_room(12 << 20)
        elif what == "enough":
            lift()
        return len(what)

    server.attach(take, "a.door")
    server.start()
    ready()
    server.run()
    """
    client = """
    outcomes = []
    with Proxy(sys.argv[1], timeout=20) as door, Proxy(sys.argv[1], timeout=20) as other:
        large = array.array("q", bytes(16 << 20))
        door(large), other(b"")
        door("little")
        for _ in range(3):
            try:
                outcomes.append(door(array.array("q", bytes(32 << 20))))
            except (DoorError, OSError, MemoryError) as error:
                outcomes.append(type(error).__name__)
            assert other(b"small") == 5
        other("enough")
        outcomes.append(door(large))
    result(outcomes)
    """
    process = spawn_server(LITTLE_ROOM + server, cwd=door_dir)
    outcomes = run_python(LITTLE_ROOM + client, door_dir / "a.door").value
    assert outcomes[-1] == 2 << 20
    assert all(isinstance(outcome, str) for outcome in outcomes[:3]), outcomes
    assert not process.ended
    assert "please report it" not in process.stderr


@pytest.mark.ids("D09", "H06")
def test_a_client_without_room_for_a_result(
    spawn_server: Callable[..., Any], run_python: Callable[..., Any], door_dir: Path
) -> None:
    server = """
    server = Server(max_threads=2)

    def give(count):
        return array.array("q", bytes(count))

    server.attach(give, "a.door")
    server.start()
    ready()
    server.run()
    """
    client = """
    outcomes = []
    with Proxy(sys.argv[1], timeout=20) as door:
        assert len(door(8)) == 1
        limit_room(12 << 20)
        for _ in range(3):
            try:
                outcomes.append(len(door(32 << 20)))
            except (DoorError, OSError, MemoryError) as error:
                outcomes.append(type(error).__name__)
            assert len(door(80)) == 10
        lift()
        outcomes.append(len(door(32 << 20)))
    result(outcomes)
    """
    spawn_server(LITTLE_ROOM + server, cwd=door_dir)
    outcomes = run_python(LITTLE_ROOM + client, door_dir / "a.door").value
    assert outcomes[-1] == 4 << 20
    assert all(isinstance(outcome, str) for outcome in outcomes[:3]), outcomes
