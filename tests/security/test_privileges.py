"""
The same uid is not always the same trust: borrowed ids, privileges from files, other namespaces.

Also what the kernel does not know, or does not say: nobody is taken for somebody then.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
from support import become, byhand, enter_pid_namespace, enter_user_namespace, run_python
from support.actors import Actor, Fd, here, logged
from support.marker import Marker
from support.strangers import false_descriptor, frames_with, knock_and_push, overheard, pose_as_door
from support.victims import (
    call,
    hold_keeper,
    let_keeper_go,
    open_client,
    raw_door,
    seen,
    serve,
)

from doorpool import _credentials, _opening
from doorpool._errors import AccessError, DoorError, ProtocolError
from doorpool._wire import Reason

V, M = 4201, 6602

_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 4, 8
_libc = ctypes.CDLL(None, use_errno=True)


# -- borrowed ids (B21) ----------------------------------------------------------------------------


def be(uids: tuple[int, int, int], gids: tuple[int, int, int], keep_capabilities: bool = False) -> None:
    """
    Take real, effective and saved ids.

    The process stays traceable, so that it is not the rule about namespaces that refuses it.
    """
    if keep_capabilities:
        _libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups(())
    os.setresgid(*gids)
    os.setresuid(*uids)
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


#: What a process is, and the words that name the rule.
BORROWED = {
    "root for whom M is a guise": ((0, M, 0), (0, M, 0), False, "real, effective and saved uid"),
    "root with a group of M's": ((0, M, 0), (M, M, M), False, "real, effective and saved uid"),
    "a set-uid program": ((V, M, M), (M, M, M), False, "real, effective and saved uid"),
    "a way back to root": ((M, M, 0), (M, M, M), False, "real, effective and saved uid"),
    "a set-gid program": ((M, M, M), (M, V, V), False, "real, effective and saved gid"),
    "a way back to a group": ((M, M, M), (M, M, V), False, "real, effective and saved gid"),
    "capabilities kept": ((M, M, M), (M, M, M), True, "holds capabilities"),
}


@pytest.fixture(params=list(BORROWED))
def borrowed(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    """Ids of which the effective uid is M's."""
    return BORROWED[request.param]


@pytest.mark.ids("B21")
@pytest.mark.parametrize(
    ("hostile", "layer"),
    [(True, "raw"), (True, "objects"), (False, "objects")],
    ids=["raw", "objects", "honest server"],
)
def test_a_client_in_borrowed_ids_does_not_unpickle(
    actor, come_by, guarded, layer, way, borrowed, hostile, path, marker: Marker
):
    """The uids agree for the moment; what the server's pickle would do, it would do as root."""
    uids, gids, capabilities, words = borrowed
    server = actor(M)
    if hostile:
        server(pose_as_door, path, byhand.PICKLE, marker.bytes)
        client, door = come_by(way, 0, server, false_descriptor)
    else:
        server(serve, layer, path, trust="uid")
        client, door = come_by(way, 0, server)
    with guarded(client):
        client(be, uids, gids, capabilities)
        with pytest.raises(AccessError, match=words) as caught:
            client(open_client, layer, door)
        assert not caught.value.may_have_run
    assert (server(overheard)[0] == b"") if hostile else (server(seen) == [])


@pytest.mark.ids("B21")
def test_a_server_in_borrowed_ids_does_not_unpickle(
    actor, come_by, guarded, layer, way, borrowed, path, marker: Marker
):
    uids, gids, capabilities, words = borrowed
    server, mate = actor(0), actor(0)
    server(serve, layer, path)
    mate(open_client, layer, path)
    stranger, door = come_by(way, M, server)
    with guarded(server):
        server(be, uids, gids, capabilities)
        reason, text = stranger(knock_and_push, door, frames_with(marker.bytes))
        assert reason == byhand.DENIED
        assert words in text
        with pytest.raises(AccessError):
            stranger(open_client, layer, door)


@pytest.mark.ids("B21")
def test_ids_given_back_open_doors_again(actor, layer, path):
    """The rule is looked at at each opening: a root daemon that is itself again goes on."""
    server, client = actor(0), actor(0)
    server(serve, layer, path)
    client(os.setresuid, 0, M, 0)
    with pytest.raises(DoorError):
        client(open_client, layer, path)
    client(os.setresuid, 0, 0, 0)
    client(open_client, layer, path)
    assert client(call, "itself") == "itself"


# -- privileges from files (B21) -------------------------------------------------------------------

PROGRAM = """
import os, sys
sys.path[:0] = sys.argv[3:]
exec(sys.argv[2])
from doorpool.door import Codec, Door, Gate, Handle
try:
    Handle(sys.argv[1])
except PermissionError as error:
    print("client:", error)
gate = Gate()
door = Door(gate, codec=Codec.PICKLE)
door.listen(sys.argv[1] + ".2", mode=0o666)
print("ready", flush=True)
sys.stdin.read()
door.revoke()
"""


@pytest.fixture
def interpreter(root_only, place: Path) -> Callable[..., Path]:
    """Make a copy of a Python interpreter that other users can run, with privileges."""
    found = None
    for candidate in (Path(sys.executable).resolve(), Path("/usr/bin/python3").resolve()):
        copy = place / "python"
        if candidate.is_file():
            shutil.copyfile(candidate, copy)
            copy.chmod(0o755)
            if _runs(copy):
                found = copy
                break
    if found is None:
        pytest.skip("no Python interpreter that other users can run")
    return found


def _runs(program: Path) -> bool:
    # Of the same version, for what is compiled: the program runs with our packages.
    code = f"import sys; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    done = subprocess.run([program, "-c", code], user=M, group=M, extra_groups=(), capture_output=True)
    return done.returncode == 0


def privilege(program: Path, kind: str) -> str:
    """Give a program file privileges; return what it does first to hide them."""
    if kind == "file capabilities":
        setcap = shutil.which("setcap") or "/usr/sbin/setcap"
        if not os.path.exists(setcap):
            pytest.skip("no setcap")
        done = subprocess.run([setcap, "cap_net_bind_service+ep", program], capture_output=True)
        if done.returncode:
            pytest.skip(f"this file system has no capabilities: {done.stderr.decode()}")
        return ""
    if kind == "set-gid":
        os.chown(program, 0, V)
        program.chmod(0o2755)
        return "os.setresgid(os.getegid(), os.getegid(), os.getegid())"
    os.chown(program, V, V)
    program.chmod(0o4755)
    return "os.setresuid(os.geteuid(), os.geteuid(), os.geteuid())"


@pytest.mark.ids("B21")
@pytest.mark.parametrize("kind", ["file capabilities", "set-gid", "set-uid"])
def test_a_program_with_privileges_from_its_file_speaks_no_pickle(
    actor, interpreter: Path, kind, path, marker: Marker
):
    """
    Also one that has made its ids one: whoever started it had a hand in its environment.
    """
    uid = V if kind == "set-uid" else M
    server, mate = actor(uid), actor(uid)
    server(serve, "raw", path, trust="uid")
    hiding = privilege(interpreter, kind)
    roots = [str(Path(attrs.__file__).parents[1]), str(Path(_opening.__file__).parents[1])]
    roots.append(str(Path(sys.modules["cloudpickle"].__file__).parents[1]))
    with subprocess.Popen(
        [interpreter, "-c", PROGRAM, path, hiding, *roots],
        user=M, group=M, extra_groups=(), text=True, cwd="/",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            said = []
            for line in process.stdout:
                if line == "ready\n":
                    break
                said.append(line)
            else:
                pytest.fail(process.stderr.read())
            assert "from its program file" in "".join(said)
            reason, text = mate(knock_and_push, path + ".2", frames_with(marker.bytes))
            assert reason == byhand.DENIED
            assert "from its program file" in text
        finally:
            process.kill()
    assert server(seen) == []
    assert not marker.went_off


# -- user namespaces (B24, B05) --------------------------------------------------------------------


def namespaces_seen_by_a_thread() -> list[bool]:
    """
    Say whether the user namespace of this process has changed, for a thread that has looked before.

    First when the thread has tried to leave it, then in a child that it has forked, then in that
    child when it has left.
    """
    seen = []

    def look() -> None:
        before = _credentials._own_user_namespace()
        with pytest.raises(OSError, match="unshare"):  # not with other threads
            enter_user_namespace((0, 0, 1))
        seen.append(_credentials._own_user_namespace() != before)
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                changes = [_credentials._own_user_namespace() != before]
                enter_user_namespace((0, 0, 1))
                changes.append(_credentials._own_user_namespace() != before)
                os.write(writing, bytes(changes))
            finally:
                os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        seen.extend(bool(byte) for byte in os.read(reading, 2))
        os.close(reading)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return seen


def test_what_a_thread_remembers_of_its_user_namespace_does_not_outlive_a_fork(namespaces):
    finished = run_python(namespaces_seen_by_a_thread)
    assert finished.value == [False, False, True]


@pytest.mark.ids("B24")
@pytest.mark.parametrize("which", ["server", "client"])
def test_a_peer_in_another_user_namespace_is_not_believed(
    actor, sandboxed, guarded, layer, which, path, marker: Marker
):
    """Each side refuses by itself; with trust="uid" at both, they talk."""
    server = sandboxed(V, V) if which == "server" else actor(V)
    client = sandboxed(V, V) if which == "client" else actor(V)
    server(serve, layer, path)
    with guarded(server, client):
        with pytest.raises(AccessError, match="user namespace"):
            client(open_client, layer, path)
        with pytest.raises(AccessError, match=r"refused by the server, which says: .* user namespace"):
            client(open_client, layer, path, trust="uid")
        reason, text = client(knock_and_push, path, frames_with(marker.bytes))
        assert reason == byhand.DENIED
        assert 'trust="uid"' in text
    server(serve, layer, path + ".2", trust="uid")
    with guarded(server, client), pytest.raises(AccessError, match=r"is not believed: .* user namespace"):
        client(open_client, layer, path + ".2")
    client(open_client, layer, path + ".2", trust="uid")
    assert client(call, "across") == "across"


@pytest.mark.ids("B24")
@pytest.mark.parametrize("way", ["inherited", "passed"])
def test_a_sandbox_gets_nothing_by_a_descriptor(
    actor, serving, sandboxed, guarded, layer, way, marker: Marker
):
    """Both directions: the sandbox calls, and the sandbox serves."""
    server, canary = serving(V, layer)
    number = server(_open)
    try:
        inside = sandboxed(V, V)
        door = number if way == "inherited" else inside(_keep, Fd(number))
    finally:
        os.close(number)
    with guarded(server, canary=canary):
        with pytest.raises(AccessError, match="user namespace"):
            inside(open_client, layer, door)
        assert inside(knock_and_push, door, frames_with(marker.bytes))[0] == byhand.DENIED
    inside(pose_as_door, None, byhand.PICKLE, marker.bytes)
    number = inside(false_descriptor)
    try:
        client = actor(V)
        with guarded(client), pytest.raises(AccessError, match="user namespace"):
            client(open_client, layer, number if way == "inherited" else client(_keep, Fd(number)))
    finally:
        os.close(number)
    assert inside(overheard)[0] == b""


def _open() -> Fd:
    return Fd(raw_door().open())


def _keep(number: int) -> int:
    return number


@pytest.mark.ids("B05", "K5")
@pytest.mark.parametrize("uid", [0, 2000, 65534, V], ids=["root", "another", "nobody", "the same outside"])
def test_the_overflow_uid_is_nobodys(sandboxed, actor, guarded, layer, uid, path, marker: Marker):
    """
    Within a namespace that maps one uid only, to 65534, everybody else is 65534 too: unknown.
    """
    server = sandboxed(65534, V)
    server(serve, layer, path)
    client = actor(uid)
    with guarded(server):
        reason, text = client(knock_and_push, path, frames_with(marker.bytes))
        assert reason == byhand.DENIED
        assert "does not say whose" in text
    server(serve, "raw", path + ".raw", codec="RAW")
    assert client(call_raw, path + ".raw", b"who am I?") == b"who am I?"
    ((_, seen_uid, _, _), _) = server(seen)[-1]
    assert seen_uid is None


def call_raw(path: str, data: bytes) -> bytes:
    with byhand.reach(path) as door:
        channel, _ = byhand.dial(door)
        with channel:
            return byhand.call(channel, 1, data)


@pytest.mark.ids("B05", "K8")
@pytest.mark.parametrize("uid", [0, 2000, 65534], ids=["root", "another", "nobody"])
@pytest.mark.parametrize("way", ["path", "inherited", "passed"])
def test_a_server_with_the_overflow_uid_is_not_ones_own(
    sandboxed, actor, guarded, layer, uid, way, path, marker: Marker
):
    stranger = actor(uid)
    stranger(pose_as_door, path, byhand.PICKLE, marker.bytes)
    number = stranger(false_descriptor)
    try:
        client = sandboxed(65534, V)
        door = {"path": path, "inherited": number}.get(way) or client(_keep, Fd(number))
        with guarded(client), pytest.raises(DoorError) as caught:
            client(open_client, layer, door)
        assert isinstance(caught.value, AccessError)
    finally:
        os.close(number)
    assert stranger(overheard)[0] == b""


@pytest.mark.ids("K5", "B10")
def test_a_caller_outside_our_pid_namespace_has_no_pid_but_his_uid(namespaces, actor, layer, path):
    server, client = actor(0), actor(V)
    server(enter_pid_namespace)
    server(become, V)
    server(serve, layer, path)
    client(open_client, layer, path)
    assert client(call, "from outside") == "from outside"
    ((pid, uid, gid, _), _) = server(seen)[-1]
    assert (pid, uid, gid) == (None, V, V)


@pytest.mark.ids("K5", "K8", "B10")
def test_a_server_outside_our_pid_namespace_has_no_pid_but_his_uid(namespaces, actor, layer, path):
    server, client = actor(V), actor(0)
    client(enter_pid_namespace)
    client(become, V)
    server(serve, layer, path)
    assert client(open_client, layer, path)[:3] == (None, V, V)
    assert client(call, "from inside") == "from inside"


# -- what the kernel did not attest (B06) ----------------------------------------------------------


@pytest.mark.ids("B06")
def test_who_knocks_before_he_is_accepted_is_himself(actor, serving, guarded, layer, path, marker: Marker):
    """Greeting, knock and death, all before the server has looked at the connection."""
    server, canary = serving(V, layer)
    stranger = actor(M)
    with guarded(server, canary=canary):
        server(hold_keeper)
        try:
            stranger(knock_early, path, frames_with(marker.bytes))
            stranger.kill()
        finally:
            server(let_keeper_go)
        mate = actor(V)
        mate(open_client, layer, path)  # connections are accepted in their order
    (line,) = [line for line in server(logged) if f"uid={M}" in line]
    assert f"pid={stranger.pid}" in line or "pid=None" in line


def knock_early(path: str, frames: list[bytes]) -> None:
    door = byhand.reach(path)
    ours = byhand.knock(door)
    for frame in frames:
        byhand.send(ours, frame)
    here.kept = door, ours


@pytest.mark.ids("B06")
@pytest.mark.parametrize("explicit", [False, True])
def test_a_knock_without_attested_ids_is_nobodys(explicit):
    """A port that did not ask for credentials from birth would read (0, 65534, 65534)."""
    holder, port = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = byhand.pair()
    with holder, port, ours, theirs:
        byhand.send(holder, byhand.knock_bytes(), [theirs.fileno()], byhand.own_ids() if explicit else None)
        heard = _opening.hear_knock(port)
        assert isinstance(heard, _opening.Misfit)
        assert heard.refusal.reason in (Reason.PROTOCOL, Reason.DENIED)
        _opening.forget_knock(port)
        heard.close()
        byhand.send(holder, byhand.knock_bytes(), [theirs.fileno()], byhand.own_ids() if explicit else None)
        port.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        heard = _opening.hear_knock(port)
        assert heard is not None
        heard.close()
        if isinstance(heard, _opening.Visitor):
            assert explicit
            assert heard.credentials.uid == os.geteuid()
        else:
            assert isinstance(heard, _opening.Misfit)
            assert heard.refusal.reason in (Reason.PROTOCOL, Reason.DENIED)


@pytest.mark.ids("B06")
def test_an_answer_without_attested_ids_is_nobodys():
    ours, theirs = socket.socketpair()
    p0, p1 = byhand.channel_pair()
    with ours, theirs, p0, p1:
        byhand.send(theirs, byhand.answer_bytes(), [p1.fileno()])
        with pytest.raises((ProtocolError, AccessError)):
            _opening.hear_answer(ours)


# -- look-ups that fail (B07) ----------------------------------------------------------------------

LOOKUPS = ["peer_ucred", "peer_pidfd", "SCM_PIDFD", "getsockopt"]


def break_lookup(what: str, number: int) -> None:
    """Have one look-up of this process fail from now on."""
    here.mended = {name: getattr(_opening, name) for name in ("peer_ucred", "peer_pidfd", "take_socket")}

    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    def without_pidfd(letter: Any, *rest: Any) -> Any:
        if letter.pidfd >= 0:
            os.close(letter.pidfd)
        letter.pidfd = -number  # as the kernel puts an error there
        return here.mended["take_socket"](letter, *rest)

    if what == "SCM_PIDFD":
        _opening.take_socket = without_pidfd
    elif what == "peer_pidfd":
        _opening.peer_pidfd = lambda _: -1
    else:
        _opening.peer_ucred = fail


def mend_lookup() -> None:
    for name, function in here.mended.items():
        setattr(_opening, name, function)


ERRORS = [errno.ENOTCONN, errno.EINVAL, errno.ENODATA, errno.ESRCH]


@pytest.mark.ids("B07")
@pytest.mark.parametrize("number", ERRORS, ids=[errno.errorcode[number] for number in ERRORS])
@pytest.mark.parametrize("what", ["peer_ucred", "peer_pidfd", "SCM_PIDFD"])
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_failed_lookup_is_no_identity(actor, guarded, side, what, number, path, marker: Marker):
    """Not even the right user is let in then, least of all another; and it passes."""
    if what != "peer_ucred" and not _credentials.tells_processes():
        pytest.skip("this kernel has no pidfds of peers")
    server, client, stranger = actor(V), actor(V), actor(M)
    server(serve, "objects", path)
    victim = server if side == "server" else client
    victim(break_lookup, what, number)
    with guarded(server, client):
        with pytest.raises(DoorError) as caught:
            client(open_client, "objects", path)
        assert not caught.value.may_have_run
        if side == "server":
            (line,) = server(logged)
            assert f"refused Credentials(pid={client.pid}, uid={V}" in line
            stranger(knock_and_end, path, frames_with(marker.bytes))
    assert server(seen) == []
    victim(mend_lookup)
    client(open_client, "objects", path)
    assert client(call, "told again") == "told again"


@pytest.mark.ids("B07", "B24")
def test_a_peer_whose_process_is_not_told_is_in_no_namespace_of_ours():
    if not _credentials.tells_processes():
        pytest.skip("this kernel has no pidfds of peers")
    peer = _credentials.Credentials(os.getpid(), os.geteuid(), os.getegid(), ())
    assert "namespace" in (_credentials.pickle_bar(peer, -1, trust="namespace") or "")
    assert _credentials.pickle_bar(peer, -1, trust="uid") is None


# -- what this kernel does not say, or no process of the tests can be


@pytest.fixture
def ourselves() -> Iterator[tuple[_credentials.Credentials, int]]:
    """Who we are, and a pidfd of us."""
    pidfd = os.pidfd_open(os.getpid())
    yield _credentials.Credentials(os.getpid(), os.geteuid(), os.getegid(), ()), pidfd
    os.close(pidfd)


@pytest.mark.ids("B24")
@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_kernel_that_cannot_tell_namespaces_bars_nobody(ourselves, monkeypatch, number):
    """Before Linux 6.11."""
    monkeypatch.setattr(_credentials.fcntl, "ioctl", failing(number))
    assert _credentials.pickle_bar(*ourselves, trust="namespace") is None


@pytest.mark.ids("B07", "B24")
@pytest.mark.parametrize("call", ["ioctl", "fstat"])
def test_a_namespace_that_cannot_be_looked_at_is_not_ours(ourselves, monkeypatch, call):
    if _credentials.pickle_bar(*ourselves, trust="namespace") is not None or not namespaces_are_told():
        pytest.skip("this kernel does not tell user namespaces")
    before = len(os.listdir("/proc/self/fd"))
    for number, bar in ((errno.EACCES, "does not tell us"), (errno.EMFILE, None), (errno.ENOMEM, None)):
        with monkeypatch.context() as patch:
            patch.setattr(_credentials.fcntl if call == "ioctl" else os, call, failing(number))
            if bar is None:  # a shortage says nothing about a peer
                with pytest.raises(OSError) as caught:
                    _credentials._namespace_bar(ourselves[1])
                assert caught.value.errno == number
            else:
                assert bar in (_credentials._namespace_bar(ourselves[1]) or "")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.ids("B24")
def test_a_peer_of_another_namespace_is_told_so(ourselves, monkeypatch):
    if not namespaces_are_told():
        pytest.skip("this kernel does not tell user namespaces")
    monkeypatch.setattr(_credentials, "_own_user_namespace", lambda: (0, 0))
    bar = _credentials.pickle_bar(*ourselves, trust="namespace")
    assert "the other side is in another (a sandbox or a container)" in (bar or "")
    assert _credentials.pickle_bar(*ourselves, trust="uid") is None


@pytest.mark.ids("B21")
def test_a_program_whose_file_gives_privileges_is_told_so(monkeypatch):
    monkeypatch.setattr(_credentials, "_got_privileges", lambda: True)
    assert "privileges from its program file" in (_credentials.pickle_bar_here() or "")


@pytest.mark.ids("B21")
@pytest.mark.parametrize(("number", "barred"), [(errno.EPERM, True), (errno.ESRCH, False)])
def test_capabilities_that_cannot_be_looked_at_are_held(monkeypatch, number, barred):
    """But of a thread that has ended meanwhile: that has none."""

    def capget(*_: Any) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(_credentials, "_libc", SimpleNamespace(capget=capget))
    monkeypatch.setattr(os, "getresuid", lambda: (M, M, M))
    monkeypatch.setattr(os, "getresgid", lambda: (M, M, M))
    bar = _credentials.pickle_bar_here()
    assert bar == (f"this process of uid {M} holds capabilities" if barred else None)


def test_ids_that_stand_for_nobody(monkeypatch):
    with pytest.raises(ValueError, match="credentials of 11 bytes, not 12"):
        _credentials.unpack_ids(bytes(11))
    nobody = _credentials.credentials_of((os.getpid(), 2**32 - 1, 2**32 - 1), (), -1)
    assert (nobody.uid, nobody.gid) == (None, None)
    assert _credentials.is_strange(nobody.uid)


@pytest.mark.ids("B07")
def test_where_the_kernel_does_not_tell_its_overflow_ids_they_are_those_of_all_others(monkeypatch):
    def fail(path: str) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(_credentials, "open", fail, raising=False)
    monkeypatch.setattr(_credentials, "_own_user_namespace", failing(errno.ENOENT))
    _credentials.overflow_ids.cache_clear()
    try:
        assert _credentials.overflow_ids("uid") == {65_534}
        peer = _credentials.credentials_of((os.getpid(), 65_534, 65_534), (), -1)
        assert (peer.uid, peer.gid) == (None, None), "nor is it known in which namespace we are"
    finally:
        _credentials.overflow_ids.cache_clear()


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def namespaces_are_told() -> bool:
    pidfd = os.pidfd_open(os.getpid())
    try:
        os.close(_credentials.fcntl.ioctl(pidfd, _credentials._PIDFD_GET_USER_NAMESPACE))
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return True


def knock_and_end(path: str, frames: list[bytes]) -> bytes:
    """Knock and push; return what is said to that, until the end."""
    with byhand.reach(path) as door, byhand.knock(door) as ours:
        for frame in frames:
            try:
                byhand.send(ours, frame)
            except OSError:
                break
        return byhand.read_all(ours)


@pytest.fixture
def inject(root_only) -> Iterator[Callable[[Actor, str], subprocess.Popen[str]]]:
    """Have system calls of an actor fail, by strace, until the process returned is terminated."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace to make system calls fail with")
    running: list[subprocess.Popen[str]] = []

    def start(one: Actor, fault: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [strace, "-f", "-o", "/dev/null", "-e", f"inject={fault}", "-p", str(one.pid)],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        assert process.stderr is not None
        first = process.stderr.readline()
        if "attached" not in first:
            pytest.skip(f"strace may not attach here: {first}")
        return process

    yield start
    for process in running:
        _detach(process)
        assert process.stderr is not None
        process.stderr.close()


def _detach(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.wait(10)


@pytest.mark.ids("B07")
@pytest.mark.parametrize("name", [errno.errorcode[number] for number in ERRORS])
def test_a_kernel_that_says_no_lets_nobody_in(actor, guarded, inject, name, path, marker: Marker):
    """The same with real system calls: every getsockopt of the server fails, in all its threads."""
    server, client, stranger = actor(V), actor(V), actor(M)
    server(serve, "objects", path)
    with guarded(server):
        tracer = inject(server, f"getsockopt:error={name}")
        with pytest.raises(DoorError):
            client(open_client, "objects", path)
        stranger(knock_and_end, path, frames_with(marker.bytes))
        _detach(tracer)
        for line, one in zip(server(logged), (client, stranger), strict=True):
            assert f"refused Credentials(pid={one.pid}," in line
    client(open_client, "objects", path)
    assert client(call, "told again") == "told again"
    assert {ids[1] for ids, _ in server(seen)} == {V}
