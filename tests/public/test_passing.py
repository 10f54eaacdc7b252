"""
Files, sockets and other objects with descriptors, in arguments and results.

The other side is a process of its own, so that what it holds can be counted by itself.
"""

# ruff: noqa: SIM115  # files that are closed elsewhere

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import io
import os
import pickle
import select
import selectors
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import pytest
from support import wait_until
from support.passed import KINDS, Parcel, describe, descriptors, nest, unnest
from support.shortage import only

from doorpool import (
    BusyError,
    CallTimeoutError,
    ClosedError,
    Descriptor,
    LimitError,
    MarshalError,
    Proxy,
    RemoteError,
    _passing,
    take,
)
from doorpool.door import Handle

PROMPTLY = 1.0  # seconds (threats.md 3.1, P3)

SERVER = """
    import contextlib, os, signal
    from doorpool import Descriptor, Server, take
    from support import passed
    from support.shortage import only

    server = Server()
    kept, stack = {}, contextlib.ExitStack()

    def back(value):
        obj = passed.unnest(value)
        return passed.describe(obj), passed.nest(take(obj))

    def method(name, file, *args):
        with file:
            return getattr(file, name)(*args)

    def stand(file):
        with file:
            return file.tell(), os.lseek(file.fileno(), 0, os.SEEK_CUR)

    def mixed(data, value):
        return value["file"].read(3), data, take(value["file"])

    def keep(value):
        kept[id(value)] = value
        return id(value)

    def share(number):
        return kept[number]

    def drop(number):
        value = kept.pop(number)
        for each in value if isinstance(value, list) else [value]:
            each.close()

    def hang_up(end, other):
        with other:
            end.close()
            return other.recv(1) or "nobody has it"

    def give(count):
        return [take(Descriptor(os.memfd_create("given"))) for _ in range(count)]

    def runs():
        return signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

    def limit(free):
        stack.close()
        if free:
            stack.enter_context(only(free))

    procedures = {
        "held": passed.held, "kept": lambda: len(kept), "file": lambda: open(os.devnull),
        "back": back, "call": method, "stand": stand, "mixed": mixed, "keep": keep, "share": share,
        "drop": drop, "give": give, "runs": runs, "hang_up": hang_up, "limit": limit,
    }

    @server.endpoint("a.door")
    def run(name, *args):
        return procedures[name](*args)

    with server:
        ready()
        server.run()
"""


@pytest.fixture
def there(spawn_server, door_dir, connect):
    """A server in a process of its own: a proxy, called with the name of a procedure first."""
    spawn_server(SERVER, cwd=door_dir)
    proxy = connect()
    wait_until(lambda: proxy("runs"))  # ``run`` has made the sockets that signals come in by
    return proxy


@pytest.fixture
def path(door_dir):
    """Where a file may be."""
    return door_dir / "file"


@pytest.fixture
def parcel():
    """Make a descriptor to be passed."""
    with contextlib.closing(Parcel()) as parcel:
        yield parcel


def assert_no_more(there, before):
    """In a while the server holds no more than it did, whatever its channels are by now."""
    try:
        wait_until(lambda: len(there("held")) <= len(before))
    except AssertionError:
        pytest.fail(f"held at the server: {there('held')}; before: {before}")


def hang_up(end, other):
    with other:
        end.close()
        return other.recv(1) or "nobody has it"


def close_all(*values):
    for value in values:
        close_all(*value) if isinstance(value, list) else value.close()


GROUPS = sorted({name.partition(":")[0] for name in KINDS})


@pytest.mark.ids("F2", "F3", "F4")
@pytest.mark.timeout(3600)  # the long form; a call that hangs is given up by itself
@pytest.mark.parametrize("group", GROUPS)
def test_each_kind_there_and_back(there, door_dir, many, group):
    """Nested in containers, both ways, many times; on both sides nothing is left open."""
    there = there.options(timeout=20.0)
    folder = door_dir / "files"
    folder.mkdir()
    names = [name for name in KINDS if name.partition(":")[0] == group]
    for name in names:
        _there_and_back(there, folder, name)
    ours, theirs = descriptors(), there("held")
    for name in names:
        for _ in range(many(10, 10_000)):
            _there_and_back(there, folder, name)
    assert_no_more(there, theirs)
    assert descriptors() <= ours


def _there_and_back(there, folder, name):
    with contextlib.ExitStack() as stack:
        obj = KINDS[name](folder, stack)
        seen, value = there("back", nest(obj))
        arrived = unnest(value)
        with contextlib.closing(arrived):
            assert seen == describe(obj) == describe(arrived)
            assert arrived.fileno() != obj.fileno()


# -- what a file keeps of where it stands


def test_a_reader_gives_back_what_it_has_read_ahead(there, path):
    """The other side begins where the sender's object stands, and the sender goes on there, too."""
    path.write_text("".join(f"line {number}\n" for number in range(1000)))
    for mode in ("r", "rb", "r+", "r+b", "a+", "a+b"):
        with open(path, mode) as file:
            file.seek(0)
            read = [file.readline(), file.readline()]
            place = file.tell()
            assert there("stand", file) == (place, place), mode
            read += [file.readline(), file.readline(), there("call", "readline", file)]
        assert [int(line.split()[1]) for line in read] == [0, 1, 2, 3, 4], mode


def test_both_sides_have_one_offset(there, path):
    """What one reads, and what its buffer reads ahead, the other does not read again."""
    path.write_bytes(bytes(range(100)))
    with open(path, "rb", buffering=0) as file:
        assert [file.read(1), there("call", "read", file, 2), file.read(1)] == [b"\0", b"\1\2", b"\3"]
        with open(file.fileno(), "rb", closefd=False) as buffered:
            assert there("call", "read", buffered, 1) == b"\4"
        assert file.read() == b"", "its buffer has read it all"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "shift_jis_2004", "utf-7", "latin-1"])
def test_a_reader_of_any_encoding_goes_on_in_the_middle(there, path, encoding):
    word = "ｱ表" if encoding == "shift_jis_2004" else "äöü"
    text = "".join(f"line {number}: {word}\n" for number in range(500))
    path.write_text(text, encoding=encoding)
    with open(path, encoding=encoding) as file:
        head = file.readline() + file.read(9)
        middle = there("call", "read", file, 0) + file.read(5)
        assert head + middle + there("call", "read", file) == text


def test_what_was_written_is_in_the_file_before_what_the_other_side_writes(there, path):
    for mode in ("w", "wb", "w+", "r+b", "a", "ab"):
        path.write_bytes(b"")
        text = "b" not in mode
        with open(path, mode) as file:
            for number in range(3):
                word = f"<{number}>"
                file.write(word if text else word.encode())
                there("call", "write", file, "there" if text else b"there")
        assert path.read_bytes() == b"<0>there<1>there<2>there", mode


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
def test_newlines_are_translated_as_the_sender_has_them_translated(there, path, newline):
    written, read = [], []
    for passed in (False, True):
        with open(path, "w", newline=newline) as file:
            there("call", "write", file, "a\nb\r\n") if passed else file.write("a\nb\r\n")
        written.append(path.read_bytes())
        path.write_bytes(b"1\n2\r3\r\n4")
        with open(path, newline=newline) as file:
            first = file.readline()
            read.append([first, *(there("call", "readlines", file) if passed else file.readlines())])
    assert written[0] == written[1]
    assert read[0] == read[1]


def test_a_file_that_appends_leaves_the_place_to_read_at(there, path):
    path.write_bytes(b"0123456789")
    with open(path, "a+b", buffering=0) as file:
        file.seek(4)
        assert there("call", "read", file, 3) == b"456"
        there("call", "write", file, b"end")
        file.seek(0)
        assert file.read() == b"0123456789end"


@pytest.mark.parametrize("how", [{"mode": "ab", "buffering": 0}, {"mode": "ab"}, {"mode": "a"}])
def test_a_pipe_that_appends_crosses_though_it_has_no_place(there, how):
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as reader:
        with open(write, **how) as writer:
            there("call", "write", writer, "over there" if how["mode"] == "a" else b"over there")
        assert reader.read(100) == b"over there"
        assert reader.read(100) == b"", "nobody else can write"


def test_what_a_reader_of_a_pipe_has_read_ahead_stays_with_it(there):
    """A pipe takes nothing back."""
    reader, writer = os.pipe()
    with open(reader, "rb") as file, open(writer, "wb", buffering=0) as other:
        other.write(b"one\ntwo\n")
        assert file.readline() == b"one\n"
        other.write(b"three\n")
        assert there("call", "readline", file) == b"three\n"
        assert file.readline() == b"two\n"


def test_a_file_that_is_being_iterated_says_why_it_cannot_cross(there, path):
    path.write_text("1\n2\n")
    with open(path) as file:
        for _ in file:
            with pytest.raises(MarshalError, match=r"args\[2\].*telling position disabled by next") as caught:
                there("call", "read", file)
            break
        assert caught.value.may_have_run is False
        assert file.read() == "2\n"


@pytest.mark.ids("F2")
def test_no_delete_on_close_crosses(there, door_dir):
    for make in (tempfile.NamedTemporaryFile, lambda **options: tempfile.NamedTemporaryFile("w+", **options)):
        with make(dir=door_dir) as file:
            name = Path(file.name)
            with unnest(there("back", nest(file))[1]) as arrived:
                assert (type(arrived), arrived.name, arrived._closer.delete) == (type(file), file.name, False)
            del arrived
            gc.collect()
            assert name.exists(), "closed by both sides of the door, and by the collector"
        assert not name.exists(), "it is the sender's still"


def test_a_temporary_file_that_is_moved_is_deleted_by_the_sender_alone(there, door_dir):
    file = tempfile.NamedTemporaryFile("w+", dir=door_dir)
    file.write("content")
    with unnest(there("back", nest(take(file)))[1]) as arrived:
        assert file.closed
        assert not Path(arrived.name).exists()
        arrived.seek(0)
        assert arrived.read() == "content"


def test_a_socket_has_its_time_out_whatever_is_the_default_there(spawn_server, door_dir, connect):
    spawn_server("import socket; socket.setdefaulttimeout(7)\n" + textwrap.dedent(SERVER), cwd=door_dir)
    there = connect()
    for timeout in (None, 0.0, 1.5):
        with socket.socket() as sock:
            sock.settimeout(timeout)
            seen, value = there("back", nest(sock))
            unnest(value).close()
            assert seen == describe(sock), "the flags of the open file included"


def test_a_connection_and_a_socket_go_on_over_there(there):
    ours, theirs = Pipe()
    with ours:
        assert there("call", "send", take(theirs), {"a": [1]}) is None
        assert ours.recv() == {"a": [1]}
        with pytest.raises(EOFError):
            ours.recv()
    one, other = socket.socketpair()
    with one:
        there("call", "send", take(other), b"bytes")
        assert (one.recv(100), one.recv(100)) == (b"bytes", b"")


def test_an_epoll_set_is_the_same_set(there):
    one, other = socket.socketpair()
    with one, other, select.epoll() as ours:
        ours.register(one, select.EPOLLIN)
        assert there("call", "poll", ours, 0) == []
        other.send(b"1")
        assert there("call", "poll", ours, 0) == [(one.fileno(), select.EPOLLIN)]


# -- what does not cross


class _File(io.FileIO):
    pass


class _Reader(io.BufferedReader):
    pass


class _Text(io.TextIOWrapper):
    pass


class _Socket(socket.socket):
    pass


class _Descriptor(Descriptor):
    pass


class _Connection(Connection):
    pass


def _secure() -> ssl.SSLSocket:
    context = ssl.create_default_context()
    return context.wrap_socket(socket.socket(), server_hostname="a", do_handshake_on_connect=False)


def _half(end):
    for each in Pipe():
        if end:
            each.close()
        end = each
    return end


REFUSED = {
    "SSLSocket": _secure,
    "_Socket": _Socket,
    "_File": lambda: _File(os.devnull),
    "_Reader": lambda: _Reader(io.FileIO(os.devnull)),
    "_Text": lambda: _Text(open(os.devnull, "rb")),
    "_Descriptor": lambda: _Descriptor(os.open(os.devnull, os.O_RDONLY)),
    "_Connection": lambda: _Connection(os.open(os.devnull, os.O_RDONLY)),
    "BufferedRWPair": lambda: io.BufferedRWPair(io.FileIO(os.devnull), io.FileIO(os.devnull, "w")),
    "SocketIO": lambda: socket.socket().makefile("rb", buffering=0),
    "BufferedReader of a SocketIO": lambda: socket.socket().makefile("rb"),
    "TextIOWrapper of a BufferedRWPair": lambda: socket.socket().makefile("rw"),
    "BufferedReader of a _File": lambda: io.BufferedReader(_File(os.devnull)),
    "TextIOWrapper of a BytesIO": lambda: io.TextIOWrapper(io.BytesIO()),
    "EpollSelector": selectors.EpollSelector,
    "_TemporaryFileWrapper of a BytesIO": lambda: tempfile._TemporaryFileWrapper(io.BytesIO(), "x", False),
    "_TemporaryFileCloser": lambda: tempfile.NamedTemporaryFile()._closer,
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_more_than_its_base_is_refused_by_name(serve, connect, name):
    serve(close_all)
    proxy = connect()
    obj = REFUSED[name]()
    before = descriptors()
    with pytest.raises(MarshalError, match=name) as caught:
        proxy({"a": [obj]})
    assert "args[0]['a'][0]" in str(caught.value)
    assert descriptors() <= before
    with pytest.raises(TypeError, match=type(obj).__qualname__):
        proxy(take(obj))
    if hasattr(obj, "close"):
        obj.close()


@pytest.mark.parametrize("name", list(KINDS))
def test_what_is_closed_cannot_cross(serve, connect, closing, door_dir, name):
    folder = door_dir / "files"
    folder.mkdir()
    obj = KINDS[name](folder, closing)
    obj.close()
    serve(close_all)
    with pytest.raises(MarshalError, match=r"args\[0\]\[0\].*closed"):
        connect()([obj])


def test_a_descriptor_is_pickled_for_a_door_alone():
    with Descriptor(os.open(os.devnull, os.O_RDONLY)) as descriptor:
        for copy_it in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="cannot pickle a Descriptor"):
                copy_it(descriptor)


def test_an_exception_does_not_carry_one(serve, connect, closing):
    def fail():
        error = LookupError("no")
        error.file = closing.enter_context(open(os.devnull))
        raise error

    serve(fail)
    with pytest.raises(RemoteError, match="LookupError: no") as caught:
        connect()()
    assert "not in an exception" in "".join(caught.value.__notes__)


# -- taking


@pytest.mark.ids("F4")
@pytest.mark.parametrize("name", list(KINDS))
def test_what_is_taken_is_moved(serve, connect, closing, door_dir, name):
    folder = door_dir / "files"
    folder.mkdir()
    obj = KINDS[name](folder, closing)
    expected = describe(obj)[2][:2]
    serve(lambda value: nest(take(unnest(value))))
    value = connect()(nest(take(obj)))
    assert obj.closed if hasattr(obj, "closed") else obj.fileno() < 0
    with contextlib.closing(unnest(value)) as arrived:
        assert describe(arrived)[2][:2] == expected


@pytest.mark.ids("F4")
def test_nobody_has_a_copy_of_what_was_moved(there, parcel):
    arrived = there("keep", take(parcel.give()))
    assert parcel.somewhere
    there("drop", arrived)
    assert parcel.wait_closed(PROMPTLY)


@pytest.mark.ids("F4")
@pytest.mark.parametrize("where", ["there", "within one process"])
def test_what_was_moved_is_closed_here_while_the_call_still_runs(request, serve, connect, where):
    """A procedure may wait for what becomes of the other end."""
    if where == "there":
        there = request.getfixturevalue("there")
    else:
        serve(lambda _, *args: hang_up(*args))
        there = connect()
    one, other = socket.socketpair()
    reader, writer = socket.socketpair()

    def answer():
        with one, writer:
            one.recv(1)  # until nobody has the other end any more

    thread = threading.Thread(target=answer)
    thread.start()
    assert there("hang_up", take(other), take(reader)) == "nobody has it"
    thread.join()


@pytest.mark.ids("F5")
@pytest.mark.parametrize("case", ["too many", "too large", "too late", "closed"])
def test_taken_is_moved_whatever_becomes_of_the_call(serve, connect, closing, parcel, case):
    release = threading.Event()

    def procedure(value, more):
        release.wait(20)
        value.close()

    serve(procedure, max_descriptors=int(case != "too many"), max_request=100_000)
    closing.callback(release.set)
    proxy = connect(timeout=0.2)
    expected = {"too late": CallTimeoutError, "closed": ClosedError}.get(case, LimitError)
    if case == "closed":
        proxy.close()
    descriptor = parcel.give()
    with pytest.raises(expected):
        proxy(take(descriptor), bytes(200_000 * (case == "too large")))
    assert descriptor.closed
    assert parcel.somewhere == (case == "too late"), "the procedure has it, where it runs"
    release.set()
    assert parcel.wait_closed(5)


@pytest.mark.ids("F5", "F6")
def test_nothing_is_moved_if_anything_cannot_cross(serve, connect, path):
    serve(close_all)
    proxy = connect()
    closed = Descriptor(os.open(os.devnull, os.O_RDONLY))
    closed.close()
    path.write_bytes(b"")
    with open(path, "rb") as file, socket.socket() as sock:
        before = descriptors()
        for bad in (threading.Lock(), closed, take(closed)):
            with pytest.raises(MarshalError, match=r"args\[3\]\['bad'\]") as caught:
                proxy(take(file), [take(sock)], file, {"bad": bad})
            assert not caught.value.may_have_run
            assert not file.closed
            assert sock.fileno() >= 0
            assert descriptors() <= before
        taken = take(file)
        with pytest.raises(MarshalError):
            proxy(taken, threading.Lock())
        proxy(taken)  # it was not sent before
        assert file.closed


def test_what_has_been_moved_cannot_be_moved_again(serve, connect, parcel):
    serve(close_all)
    proxy = connect()
    taken = take(parcel.give())
    proxy(taken)
    with pytest.raises(MarshalError, match="has crossed a door already"):
        proxy(taken)


@pytest.mark.parametrize("value", [1, "text", None, object(), [], io.BytesIO(), print])
def test_take_is_for_what_has_a_descriptor(value):
    with pytest.raises(TypeError, match=r"take\(\) is for files, sockets and the like, not for"):
        take(value)


def test_what_is_marked_goes_nowhere_but_through_a_door(parcel):
    taken = take(parcel.give())
    with pytest.raises(TypeError, match="can only cross a door"):
        pickle.dumps(taken)
    with pytest.raises(TypeError, match="not for Taken"):
        take(taken)
    taken.obj.close()


@pytest.mark.ids("F4", "F5")
def test_what_was_taken_goes_along_when_the_call_is_made_again(spawn_server, door_dir, connect, parcel):
    """The server has been restarted: the call goes through the door that was opened anew."""
    first = spawn_server(SERVER, cwd=door_dir)
    there = connect()
    there("held")
    first.terminate()
    spawn_server(SERVER, cwd=door_dir)
    with tempfile.TemporaryFile() as file:
        copied = os.fdopen(os.dup(file.fileno()), "rb")
        descriptor = parcel.give()
        arrived = there("keep", [take(descriptor), take(copied)])
        assert descriptor.closed
        assert copied.closed
        assert parcel.somewhere
        there("drop", arrived)
        assert parcel.wait_closed(PROMPTLY)


# -- what is sent is what was marshalled


def test_another_open_file_of_the_same_number_is_not_sent(serve, connect, door_dir):
    """The original is closed, and its number given out again, before anything is sent."""
    (door_dir / "right").write_bytes(b"right")
    (door_dir / "wrong").write_bytes(b"wrong")
    descriptor = Descriptor(os.open(door_dir / "right", os.O_RDONLY))
    number = descriptor.fileno()

    class Swap:
        def __reduce__(self):
            if not descriptor.closed:
                descriptor.close()
                opened.append(Descriptor(os.open(door_dir / "wrong", os.O_RDONLY)))
            return str, ()

    def read(value, _):
        with value:
            return os.read(value.fileno(), 100)

    opened: list[Descriptor] = []
    serve(read)
    assert connect()(descriptor, Swap()) == b"right"
    assert opened[0].fileno() == number
    opened[0].close()


def test_long_bytes_and_descriptors_in_one_call(there, path):
    path.write_bytes(b"content")
    for size in (10, 70_000, 3_000_000):
        with open(path, "rb") as file:
            value = {"before": bytes(size), "file": file, "after": bytearray(size)}
            seen, data, back = there("mixed", bytes(size), value)
            with back:
                assert (seen, data, back.read()) == (b"con", bytes(size), b"tent")


def test_a_call_within_the_rebuilding_of_another(serve, connect, path):
    """Each has descriptors of its own."""
    path.write_bytes(b"0123456789")
    server = serve(lambda values: [take(value) for value in values])
    proxy = connect()

    class Calls:
        def __reduce__(self):
            return call_inside, (str(path.with_name("a.door")),)

    with open(path, "wb", buffering=0) as file, socket.socket() as sock:
        value = proxy([file, Calls(), sock])
        assert [type(each) for each in value] == [io.FileIO, Descriptor, socket.socket]
        close_all(value)
    wait_until(lambda: server.statistics().served == 2)


def call_inside(path: str) -> Descriptor:
    with Proxy(path) as proxy:
        return proxy([take(Descriptor(os.open(os.devnull, os.O_RDONLY)))])[0]


# -- as many as there may be


@pytest.mark.ids("F1")
def test_253_cross_in_order_and_one_more_is_refused(serve, connect):
    def give(count):
        return [take(each) for each in opened(count)]

    def opened(count):
        return [Descriptor(os.memfd_create(f"{number}")) for number in range(count)]

    def names(values):
        return [os.readlink(f"/proc/self/fd/{each.fileno()}").split(":")[1].split()[0] for each in values]

    def count_them(values):
        seen = names(values)
        close_all(values)
        return seen

    server = serve(count_them)
    server.attach(give, connect().info.path + ".give")
    take_them, have = connect(), connect(connect().info.path + ".give")
    before = descriptors()
    expected = [str(number) for number in range(253)]
    assert take_them(give(253)) == expected
    arrived = have(253)
    assert names(arrived) == expected
    close_all(arrived)
    with pytest.raises(LimitError) as caught:
        take_them(give(254))
    assert (caught.value.limit, caught.value.value, caught.value.may_have_run) == (253, 254, False)
    with pytest.raises(LimitError) as caught:
        have(254)
    assert (caught.value.limit, caught.value.value, caught.value.may_have_run) == (253, 254, True)
    assert take_them([]) == []
    wait_until(lambda: descriptors() <= before)


@pytest.mark.ids("F15", "P1")
def test_the_limit_of_a_door_and_a_door_that_takes_none(serve, connect, path):
    path.write_bytes(b"")
    ran = []

    def procedure(value):
        ran.append(value)
        return take(open(path, "rb"))

    server = serve(procedure, max_descriptors=2)
    server.attach(procedure, path.with_name("none.door"), refuse_descriptors=True)
    some, none = connect(), connect(path.with_name("none.door"))
    with open(path, "rb") as file, open(path, "rb") as second, open(path, "rb") as third:
        before = descriptors()
        some([file, second]).close()
        close_all(ran.pop())
        with pytest.raises(LimitError, match="3 descriptors are over its limit of 2") as caught:
            some([file, second, third])
        assert (caught.value.limit, caught.value.value, caught.value.may_have_run) == (2, 3, False)
        with pytest.raises(LimitError, match="takes no descriptors") as caught:
            none({"deep": [file]})
        assert caught.value.may_have_run is False
        assert ran == []
        none("no file").close()
        assert ran == ["no file"], "it may give some"
        server.endpoints[0].max_descriptors = 1
        with pytest.raises(LimitError):
            some([file, second])
        wait_until(lambda: descriptors() <= before)


# -- numbers that nobody claims, and what fails half-way


def test_what_nothing_claims_is_closed(serve, connect, parcel):
    """A caller by the raw layer sends more than his pickle says."""
    serve(lambda value: type(value).__name__)
    path = connect().info.path
    with parcel.give() as descriptor, Handle(path) as handle:
        pickled = pickle.dumps((("text",), {}), 5)
        with handle.call(pickled, descriptors=[descriptor.fileno()] * 3) as reply:
            assert pickle.loads(reply.data) == "str"
        with handle.call(b"no pickle", descriptors=[descriptor.fileno()] * 3) as reply:
            assert reply.data[:1] == b"R"
    assert parcel.wait_closed(PROMPTLY)


@pytest.mark.parametrize("place", [(0, 1), (0, 2), (-1, 1), (1, 5)])
def test_a_pickle_that_claims_what_did_not_arrive(serve, connect, parcel, place):
    serve(lambda *values: None)

    class Forged:
        def __reduce__(self):
            return _passing._rebuild, (_passing._rebuild_descriptor, *place, ())

    with parcel.give() as descriptor, Handle(connect().info.path) as handle:
        for numbers in ([], [descriptor.fileno()]):
            twice = pickle.dumps(((Forged(), Forged()), {}), 5)
            with handle.call(twice, descriptors=numbers) as reply:
                assert reply.data[:1] == b"R"
                assert b"MarshalError" in reply.data
    assert parcel.wait_closed(PROMPTLY)


class FailsThere:
    """Cannot be rebuilt."""

    def __reduce__(self):
        return fail, ()


def fail():
    raise RuntimeError("while it is rebuilt")


def test_what_was_rebuilt_already_is_closed_when_the_rest_fails(serve, connect, closing):
    results: list[object] = []
    serve(lambda *values: results.pop())
    proxy = connect()
    results.append(None)
    proxy()
    for kinds in (["open: r+"], list(KINDS)):
        before = descriptors()
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            objects = [KINDS[name](Path(folder), stack) for name in kinds]
            with pytest.raises(MarshalError, match="while it is rebuilt") as caught:
                proxy(objects, FailsThere())
            assert not caught.value.may_have_run
            results.append([objects, FailsThere()])
            with pytest.raises(MarshalError, match="while it is rebuilt") as caught:
                proxy()
            assert caught.value.may_have_run
        wait_until(lambda before=before: descriptors() <= before)


def test_a_result_that_cannot_cross_leaves_nothing(serve, connect, closing):
    def procedure():
        return [take(each) for each in opened] + [threading.Lock()]

    opened = [closing.enter_context(Descriptor(os.memfd_create("kept"))) for _ in range(5)]
    serve(procedure)
    proxy = connect()
    for _ in range(3):
        before = descriptors()
        with pytest.raises(MarshalError, match=r"result\[5\]") as caught:
            proxy()
        assert caught.value.may_have_run
        assert not any(each.closed for each in opened)
        assert descriptors() <= before


# -- full tables


@pytest.mark.ids("F7", "F8")
def test_no_room_at_the_server(there, path):
    """All or nothing, the procedure does not run, and the caller is told who is short."""
    path.write_bytes(b"")
    there("limit", 4)
    with open(path, "rb") as file:
        ours, theirs = descriptors(), there("held")
        for _ in range(5):
            with pytest.raises(BusyError, match="descriptors") as caught:
                there("keep", [take(Descriptor(os.dup(file.fileno()))) for _ in range(20)])
            assert caught.value.may_have_run is False
        assert there("kept") == 0
        assert descriptors() <= ours
        assert_no_more(there, theirs)
        there("limit", 0)
        there("keep", [file] * 2)
        assert there("kept") == 1


@pytest.mark.ids("F8")
def test_no_room_at_the_server_for_what_a_result_takes_along(there):
    ours = there("give", 20)
    kept = there("keep", ours)
    close_all(ours)
    there("limit", 2)
    theirs = there("held")
    for _ in range(3):
        with pytest.raises(BusyError, match="the result cannot be sent: no free descriptor") as caught:
            there("share", kept)
        assert caught.value.may_have_run is True
        assert_no_more(there, theirs)
    there("limit", 0)
    close_all(there("share", kept))


@pytest.mark.ids("F7", "F9")
def test_no_room_at_the_client(there):
    close_all(there("give", 3))
    theirs = there("held")
    for _ in range(3):
        ours = descriptors()
        with only(2):
            with pytest.raises(OSError, match="for those that the reply brought") as caught:
                there("give", 3)
            assert caught.value.errno == errno.EMFILE
        assert descriptors() <= ours
        close_all(there("give", 2))
    assert_no_more(there, theirs)


@pytest.mark.ids("F9", "F5")
def test_no_room_at_the_client_for_what_a_call_takes_along(there, closing):
    files = [closing.enter_context(open(os.devnull, "rb")) for _ in range(3)]
    theirs = there("held")
    with only(2):
        for _ in range(3):
            with pytest.raises(OSError, match="no free descriptor for a duplicate") as caught:
                there("keep", [take(file) for file in files])
            assert caught.value.errno == errno.EMFILE
            assert not any(file.closed for file in files)
        there("drop", there("keep", files[:2]))
    assert_no_more(there, theirs)


# -- interrupted, given up, thrown away


@pytest.mark.ids("F10", "F18")
@pytest.mark.parametrize("how", ["Ctrl-C", "time-out"])
def test_a_caller_who_gives_up_with_descriptors_in_flight(serve, connect, closing, parcel, how):
    """All threads are busy: what lies in the queue is closed, and never run."""
    release, running = threading.Event(), threading.Event()
    ran = []

    def procedure(value=None):
        ran.append(value)
        running.set()
        release.wait(20)

    serve(procedure, server={"max_threads": 1})
    closing.callback(release.set)
    proxy = connect()
    busy = proxy.submit()
    assert running.wait(10)
    if how == "Ctrl-C":
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            proxy({"file": take(parcel.give())})
        timer.join()
    else:
        with pytest.raises(CallTimeoutError) as caught:
            proxy.options(timeout=0.2)({"file": take(parcel.give())})
        assert caught.value.may_have_run is False
    release.set()
    busy.result()
    assert parcel.wait_closed(PROMPTLY)
    proxy()
    assert ran == [None, None]


@pytest.mark.ids("F11", "F18")
def test_a_result_that_nobody_waits_for_is_closed(serve, connect, closing, parcel):
    release, given_up = threading.Event(), threading.Event()

    def procedure():
        given_up.wait(20)
        release.set()
        return {"deep": [take(parcel.give())]}

    serve(procedure)
    closing.callback(given_up.set)
    with pytest.raises(CallTimeoutError) as caught:
        connect(timeout=0.2)()
    assert caught.value.may_have_run is True
    given_up.set()
    assert release.wait(10)
    assert parcel.wait_closed(5)


@pytest.mark.ids("F11")
def test_a_caller_that_is_killed_leaves_nothing_of_his_result(
    serve, connect, closing, parcel, spawn_python, door_dir
):
    arrived, killed = threading.Event(), threading.Event()

    def procedure():
        arrived.set()
        killed.wait(20)
        return take(parcel.give())

    serve(procedure)
    closing.callback(killed.set)
    caller = spawn_python("from doorpool import Proxy; Proxy('a.door')()", cwd=door_dir)
    assert arrived.wait(10)
    caller.kill()
    killed.set()
    assert parcel.wait_closed(5)


@pytest.mark.ids("F16")
def test_a_file_that_the_caller_could_not_open(as_uid, serve, connect, path):
    """What passes is the open file, and with it the right to read it: permission is not looked at again."""
    path.write_text("secret data")
    path.chmod(0)

    def read(number):
        with pytest.raises(PermissionError):
            path.open()
        with open(number, closefd=False) as file:
            return file.read()

    serve(lambda: take(open(path)))
    with connect()() as file:
        assert as_uid(65534, read, file.fileno()) == "secret data"


@pytest.mark.ids("F17")
def test_a_file_that_a_procedure_returns_is_closed_behind_the_reply(there):
    """Taken, or, as nobody has it any more, by the collector."""
    there("file").close()
    theirs = there("held")
    for _ in range(10):
        close_all(there("give", 3))
        there("file").close()
    assert_no_more(there, theirs)


def test_a_child_that_is_forked_during_a_call_keeps_no_duplicate(serve, connect, closing, parcel):
    """Its parent's call is on its way; the child has nothing of it."""
    running, forked = threading.Event(), threading.Event()

    def procedure(value):
        value.close()
        running.set()
        forked.wait(20)

    serve(procedure)
    closing.callback(forked.set)
    proxy = connect()
    thread = threading.Thread(target=proxy, args=(take(parcel.give()),))
    thread.start()
    assert running.wait(10)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    forked.set()
    thread.join()
    assert parcel.wait_closed(PROMPTLY)
    os.close(writer)
    os.close(reader)
    os.waitpid(child, 0)


def test_kinds_whose_module_is_imported_later(door_dir, there):
    code = """if True:
        import sys
        from doorpool import Proxy, take
        there = Proxy("a.door")
        there("keep", [[]])
        assert not {"tempfile", "multiprocessing.connection"} & set(sys.modules)
        import multiprocessing.connection
        there("keep", list(multiprocessing.connection.Pipe()))
        import tempfile
        there("call", "close", take(tempfile.NamedTemporaryFile()))
        there.close()
    """
    subprocess.run([sys.executable, "-c", code], cwd=door_dir, check=True)
