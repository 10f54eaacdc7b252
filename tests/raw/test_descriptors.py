"""
Descriptors through a door: all of them or none, close-on-exec, and none ever leaked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
import subprocess
import sys
import tempfile

import pytest
from support import rawpeer, wait_until
from support.rawdoor import PATIENCE, Background

from doorpool import _sockets
from doorpool._errors import BusyError, CallTimeoutError, DoorError, LimitError, ProtocolError
from doorpool._keeper import keeper
from doorpool._sockets import MAX_DESCRIPTORS
from doorpool.door import Door, Gate, Handle

COUNTS = [0, 1, 2, 16, 252, 253]


@pytest.fixture
def files():
    """Make temporary files, which are closed in the end."""
    with contextlib.ExitStack() as stack:

        def make(count=1):
            return [stack.enter_context(tempfile.TemporaryFile()).fileno() for _ in range(count)]

        yield make


def numbers(descriptors):
    """What the files behind descriptors are, whatever their numbers."""
    return [(status.st_dev, status.st_ino) for status in map(os.fstat, descriptors)]


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.ids("F1", "F2", "C01")
@pytest.mark.parametrize("count", COUNTS)
def test_any_number_both_ways_in_order(serve, files, count):
    ours = files(count)
    handle = serve().handle()
    with handle.call(b"data", [memoryview(b"buffer")], ours) as reply:
        assert numbers(reply.descriptors) == numbers(ours)
        assert not set(reply.descriptors) & set(ours)
        assert (reply.data, bytes(reply.buffers[0])) == (b"data", b"buffer")
    assert handle.call().descriptors == []


def test_how_many_wait_in_a_queue_is_told_without_taking_them():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        assert _sockets.coming(other) == 0
        for count in (10, 3):
            socket.send_fds(one, [b"x"], [0] * count)
        before = open_descriptors()
        assert _sockets.coming(other) == 13
        assert open_descriptors() == before
    assert _sockets.coming(other) == MAX_DESCRIPTORS  # nobody can tell: it is closed


@pytest.mark.ids("F1", "C01")
def test_one_too_many_is_refused_and_nothing_is_sent(serve, files):
    (ours,) = files()
    failed = []

    def procedure(invocation):
        with pytest.raises(LimitError) as caught:
            invocation.reply(descriptors=[ours] * 254)
        failed.append(caught.value)
        invocation.reply(b"none", descriptors=[])

    handle = serve(procedure).handle()
    with pytest.raises(LimitError) as caught:
        handle.call(descriptors=[ours] * 254)
    assert (caught.value.limit, caught.value.value, caught.value.may_have_run) == (253, 254, False)
    assert handle.call().data == b"none"
    assert (failed[0].limit, failed[0].value, failed[0].may_have_run) == (253, 254, True)


@pytest.mark.ids("F2")
def test_a_new_descriptor_of_the_same_open_file(serve, files):
    (ours,) = files()
    os.write(ours, b"0123456789")
    os.lseek(ours, 3, os.SEEK_SET)

    def procedure(invocation):
        invocation.reply(os.read(invocation.descriptors[0], 4))

    assert serve(procedure).handle().call(descriptors=[ours]).data == b"3456"
    assert os.lseek(ours, 0, os.SEEK_CUR) == 7  # one offset for both


@pytest.mark.ids("F3", "C05")
def test_received_descriptors_are_close_on_exec(serve, files):
    (ours,) = files()
    os.set_inheritable(ours, True)
    seen = []

    def procedure(invocation):
        seen.extend(map(os.get_inheritable, invocation.descriptors))
        invocation.reply(descriptors=invocation.descriptors)

    with serve(procedure).handle().call(descriptors=[ours, ours]) as reply:
        assert seen == [False, False]
        assert [os.get_inheritable(number) for number in reply.descriptors] == [False, False]


@pytest.mark.ids("C2", "C05")
def test_no_descriptor_of_the_library_survives_an_exec(serve):
    """What the program beside us inherits when nobody closes anything for it."""
    handle = serve().handle()
    handle.call()
    number = serve().door.open()
    code = "import os; print(*sorted(map(int, os.listdir('/proc/self/fd'))))"
    listing = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], close_fds=False, capture_output=True, check=True
    )
    inherited = set(map(int, listing.stdout.split()))
    assert not inherited & {number, handle.fileno(), *(channel.fileno() for channel in handle._idle)}
    sockets = [fd for fd in inherited - {0, 1, 2} if fd_is_socket(fd)]
    assert sockets == []
    os.close(number)


def fd_is_socket(number):
    try:
        return os.readlink(f"/proc/self/fd/{number}").startswith(("socket:", "anon_inode:"))
    except OSError:
        return False


#: Starts programs in four ways while descriptors cross in both directions; each lists what it has inherited.
RACE = """
    import multiprocessing, os, re, shutil, subprocess, sys, threading
    from concurrent.futures import ThreadPoolExecutor

    LISTING = [shutil.which("ls"), "-l", "/proc/self/fd"]
    OUTPUT = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

    def by_subprocess():
        return subprocess.run(LISTING, close_fds=False, stdout=subprocess.PIPE, check=True, text=True).stdout

    def by_posix_spawn():
        actions = [(os.POSIX_SPAWN_OPEN, 1, "spawned", OUTPUT, 0o600)]
        return said(os.posix_spawn(LISTING[0], LISTING, os.environ, file_actions=actions), "spawned")

    def by_fork():
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open("forked", OUTPUT, 0o600), 1)
                os.execv(LISTING[0], LISTING)
            finally:
                os._exit(127)
        return said(pid, "forked")

    def said(pid, name):
        assert os.waitpid(pid, 0)[1] == 0
        with open(name) as output:
            return output.read()

    def by_multiprocessing():
        context = multiprocessing.get_context("spawn")
        reader, writer = context.Pipe(duplex=False)
        with reader, writer:
            process = context.Process(target=tell, args=(writer,))
            process.start()
            text = reader.recv()
            process.join()
            process.close()
        return text

    def tell(writer):
        assert "doorpool" not in sys.modules
        lines = []
        for number in os.listdir("/proc/self/fd"):
            try:
                lines.append(f"{number} -> {os.readlink('/proc/self/fd/' + number)}")
            except FileNotFoundError:  # of the listing itself
                continue
        writer.send("\\n".join(lines))

    def kinds(text):
        found = [line.partition(" -> ")[2] for line in text.splitlines() if " -> " in line]
        return sorted(re.sub(r"(?<=[/[])\\d+", "N", target) for target in found)

    def swap(file, more):
        with file:
            assert file.read() == "there"
        return take(open("carried-back")), more

    def call():
        calls = 0
        more = bytes(100_000)  # which has a segment
        while calls < 10 or not over.is_set():
            with Proxy("a.door", timeout=30) as door:
                for _ in range(5):
                    with open("carried-there") as file:
                        back, again = door(file, more)
                    with back:
                        assert (back.read(), again) == ("back", more)
                    calls += 1
        return calls

    def begin_and_look(way, quiet, times):
        return [odd for _ in range(times) if (odd := kinds(way())) != quiet]

    if __name__ == "__main__":
        WAYS = {by_subprocess: 32, by_posix_spawn: 32, by_fork: 32, by_multiprocessing: 4}
        for word in ("there", "back"):
            with open(f"carried-{word}", "w") as file:
                file.write(word)
        quiet = {way: kinds(way()) for way in WAYS}
        with open("carried-there") as file:
            os.set_inheritable(file.fileno(), True)
            seen = kinds(by_subprocess())
        from doorpool import Proxy, Server, take
        over = threading.Event()
        with Server(max_threads=3) as server, ThreadPoolExecutor(7) as threads:
            server.attach(swap, "a.door")
            callers = [threads.submit(call) for _ in range(3)]
            try:
                looks = [
                    threads.submit(begin_and_look, way, quiet[way], count * int(sys.argv[1]))
                    for way, count in WAYS.items()
                ]
                odd = {way.__name__: look.result() for way, look in zip(WAYS, looks)}
            finally:
                over.set()
            result((quiet[by_subprocess], seen, odd, [caller.result() for caller in callers]))
"""


@pytest.mark.ids("C05")
def test_no_program_inherits_what_crosses_while_it_is_started(run_python, door_dir, many):
    """Neither what was sent, nor what arrived, nor what the library has for a call."""
    quiet, seen, odd, calls = run_python(RACE, many(1, 20), cwd=door_dir, timeout=many(60, 600)).value
    assert seen == sorted([*quiet, f"{door_dir}/carried-there"]), "what is inherited is listed"
    assert odd == {f"by_{way}": [] for way in ("subprocess", "posix_spawn", "fork", "multiprocessing")}
    assert min(calls) >= 10


def test_those_that_the_procedure_does_not_take_are_closed(serve, files):
    (ours,) = files()
    handle = serve(lambda invocation: invocation.reply()).handle()
    before = open_descriptors()
    for _ in range(20):
        handle.call(descriptors=[ours] * 20)
    wait_until(lambda: open_descriptors() <= before)  # they are closed behind the reply


def test_those_that_the_procedure_takes_are_its_own(serve, files):
    (ours,) = files()
    taken = []

    def procedure(invocation):
        taken.append(invocation.descriptors.pop(0))
        invocation.reply()

    serve(procedure).handle().call(descriptors=[ours, ours])
    assert numbers(taken) == numbers([ours])
    os.close(taken[0])


# -- bad ones


@pytest.mark.ids("F6", "C06")
def test_with_a_bad_one_in_a_request_none_is_sent(serve, files):
    came = []
    serving = serve(lambda invocation: (came.append(len(invocation.descriptors)), invocation.reply()))
    handle = serving.handle()
    (good,) = files()
    bad = os.dup(good)
    os.close(bad)
    before = open_descriptors()
    for wrong in (bad, -1, 2**31 - 1):
        with pytest.raises(OSError) as caught:
            handle.call(descriptors=[good, wrong, good])
        assert caught.value.errno == errno.EBADF
        assert str(wrong) in str(caught.value)
    wait_until(lambda: open_descriptors() <= before)
    os.fstat(good)
    handle.call(descriptors=[good])
    assert came == [1]
    assert serving.door.channels == 1  # nothing was even begun


@pytest.mark.ids("F6", "X14")
def test_with_a_bad_one_in_a_reply_none_is_sent(serve, files):
    (good,) = files()

    def procedure(invocation):
        with pytest.raises(OSError) as caught:
            invocation.reply(descriptors=[good, 2**31 - 1])
        assert caught.value.errno == errno.EBADF
        invocation.reply(b"without")

    serving = serve(procedure)
    with serving.handle().call(timeout=PATIENCE) as reply:
        assert (bytes(reply.data), reply.descriptors) == (b"without", [])
    assert serving.errors == []


# -- the receiver's table is full


@contextlib.contextmanager
def only(free):
    """Leave so many numbers for new descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    highest = used[-1] + 1
    fillers = []
    try:
        # Everything below the limit is taken, but for the last few.
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + free, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                fillers.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(free):
            os.close(fillers.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in fillers:
            os.close(number)


FULL_SERVER = """
    import sys
    sys.path.insert(0, {here!r})
    from test_descriptors import only, open_descriptors
    from support.rawdoor import Serving
    from doorpool import door
    from doorpool._guests import guests
    from doorpool._keeper import keeper

    ran = []
    def procedure(invocation):
        if invocation.data.startswith(b"fill"):
            free = only(int(invocation.data[4:]))
            free.__enter__()
            keep.append(free)
        elif invocation.data == b"empty":
            keep.pop().__exit__(None, None, None)
        elif invocation.data == b"ran":
            invocation.reply(b"%d" % len(ran))
            return
        elif invocation.data == b"open":
            with keeper().lock:
                guests().look_round()  # or the socket on which the caller has knocked goes a moment later
            invocation.reply(b"%d" % open_descriptors())
            return
        else:
            ran.append(invocation.data)
        invocation.reply()

    keep = []
    serving = Serving(procedure)
    serving.door.listen("a.door")
    ready()
    serving.threads[0].join()
"""


@pytest.mark.ids("F7", "F8", "C03")
@pytest.mark.parametrize("free", [0, 1, 3, 9])
def test_no_room_at_the_server(spawn_server, door_dir, files, free):
    """All or nothing: the procedure does not run, the caller hears of it, the channel goes on."""
    here = os.path.dirname(__file__)
    spawn_server(FULL_SERVER.format(here=here), cwd=door_dir)
    (ours,) = files()
    with Handle(door_dir / "a.door") as handle:
        before = handle.call(b"open").data
        handle.call(descriptors=[ours] * 10)
        # Another thread may answer while that of the first call still closes what came with it.
        wait_until(lambda: int(handle.call(b"open").data) <= int(before))
        handle.call(b"fill %d" % free)
        for _ in range(5):
            with pytest.raises(BusyError, match="room") as caught:
                handle.call(b"lost", descriptors=[ours] * 10, timeout=PATIENCE)
            assert not caught.value.may_have_run
        handle.call(b"fits", descriptors=[ours] * free)
        handle.call(b"empty")
        assert handle.call(b"ran").data == b"2"
        wait_until(lambda: int(handle.call(b"open").data) <= int(before))  # of the lost ones none was kept


@pytest.mark.ids("F7", "F9", "C03")
@pytest.mark.parametrize("free", [0, 1, 9])
def test_no_room_at_the_client(serve, files, free, spawn_server, door_dir):
    spawn_server(
        """
        from support.rawdoor import Serving
        serving = Serving()
        serving.door.listen("a.door")
        ready()
        serving.threads[0].join()
        """,
        cwd=door_dir,
    )
    ours = files(10)
    with Handle(door_dir / "a.door") as handle:
        before = open_descriptors()
        with only(free):
            for _ in range(3):
                with pytest.raises(OSError) as caught:
                    handle.call(descriptors=ours)
                assert caught.value.errno == errno.EMFILE
            assert handle.call(b"without").data == b"without"
        assert open_descriptors() == before
        with handle.call(descriptors=ours) as reply:
            assert numbers(reply.descriptors) == numbers(ours)


def test_no_room_for_a_channel_at_the_client(serve):
    handle = serve().handle(lazy=True)
    with only(0):
        with pytest.raises(OSError) as caught:
            handle.call()
        assert caught.value.errno == errno.EMFILE
    assert handle.call(b"now").data == b"now"


#: What an opening takes at the server for a moment: the knock's socket, two pidfds of the
#: client one after the other, a pair.
NEEDED = 4


@pytest.mark.ids("F8")
@pytest.mark.parametrize("free", range(7))
def test_no_room_for_a_channel_at_the_server(serve, free):
    """The knock waits at the port, nothing is kept of it meanwhile, and it is answered in the end."""
    gate = Gate()
    door = Door(gate)
    with contextlib.closing(rawpeer.RawClient(number := door.open(), opening=False)) as client:
        os.close(number)
        before = open_descriptors()
        with contextlib.ExitStack() as shortage:
            with keeper().lock:  # it hears the knock when all is full
                client.knock()
                tried = keeper()._short_at
                shortage.enter_context(only(free))
            wait_until(lambda: door.channels == 1 or keeper()._short_at > tried, timeout=PATIENCE)
            assert door.channels == (free >= NEEDED)
        words, (end,) = client.answer()
        assert words == rawpeer.answer()
        os.close(end)
        client.knock_socket.close()
        wait_until(lambda: door.channels == 1 and open_descriptors() == before + 2)  # it, and a pidfd
    door.revoke()
    gate.close()
    gate.dispose()


# -- descriptors where none belong


class Lying:
    """A server by hand, and a handle that calls it in the background."""

    def __init__(self, files):
        self.server = rawpeer.RawServer()
        self.handle = Handle(self.server.descriptor, lazy=True)
        self.file = files()[0]


@pytest.fixture
def lying(files):
    lying = Lying(files)
    with lying.server, lying.handle:
        yield lying


def call_of(lying, what="call", **options):
    call = Background(getattr(lying.handle, what), **options)
    lying.server.accept()
    return call, lying.server.receive()


@pytest.mark.ids("C02")
@pytest.mark.parametrize(
    ("kind", "number", "body", "error"),
    [
        (rawpeer.FAILURE, 1, rawpeer.refusal(rawpeer.BUSY), BusyError),
        (rawpeer.GOODBYE, 1, rawpeer.refusal(rawpeer.REVOKED), DoorError),
        (rawpeer.REPLY, 7, b"of another call", ProtocolError),
        (rawpeer.REQUEST, 1, b"", ProtocolError),
        (rawpeer.FAILURE, 1, b"no refusal", ProtocolError),
        (rawpeer.GOODBYE, 1, b"no refusal", ProtocolError),
    ],
)
def test_descriptors_of_frames_that_are_no_reply_are_closed(lying, kind, number, body, error):
    call, _ = call_of(lying)
    lying.server.send(rawpeer.frame(kind, number, body, descriptors=3), [lying.file] * 3)
    assert isinstance(call.error(), error)  # and leak_guard counts


@pytest.mark.ids("C02")
def test_descriptors_of_an_answer_to_a_ping_are_closed(lying):
    ping, request = call_of(lying, "ping")
    lying.server.send(rawpeer.frame(rawpeer.PONG, request.number, descriptors=3), [lying.file] * 3)
    ping.result()


@pytest.mark.ids("C06", "X8")
def test_descriptors_of_a_reply_that_comes_too_late_are_closed(lying, monkeypatch):
    """The reply comes when the time is over, just before the channel is shut."""
    give_up = Handle._give_up

    def answered_and_given_up(handle, channel):
        lying.server.send(rawpeer.frame(rawpeer.REPLY, 1, descriptors=3), [lying.file] * 3)
        return give_up(handle, channel)

    monkeypatch.setattr(Handle, "_give_up", answered_and_given_up)
    call, _ = call_of(lying, timeout=0.05)
    error = call.error()
    assert isinstance(error, CallTimeoutError)
    assert error.may_have_run


@pytest.mark.ids("C02")
@pytest.mark.parametrize("extra", [1, 5])
def test_more_than_a_socket_in_an_answer(lying, extra):
    call = Background(lying.handle.call)
    lying.server.hear()
    lying.server.admit(extra=[lying.file] * extra)
    assert isinstance(call.error(), ProtocolError)


def test_flags_of_passed_descriptors_are_left_alone(serve, files):
    (ours,) = files()
    before = fcntl.fcntl(ours, fcntl.F_GETFL)
    serve().handle().call(descriptors=[ours]).close()
    assert fcntl.fcntl(ours, fcntl.F_GETFL) == before
