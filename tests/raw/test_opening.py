"""
Ways to a door: inherited, passed on, under a name; and what is no door at all.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import tempfile

import pytest
from support import rawpeer, wait_until
from support.rawdoor import PATIENCE, Background, Canary

from doorpool._errors import BrokenDoorError, CallTimeoutError, NotADoorError, ProtocolError
from doorpool.door import Handle

# -- by descriptor

CALL_INHERITED = """
    import sys
    from doorpool.door import Handle
    with Handle(int(sys.argv[1])) as handle:
        result([bytes(handle.call(b"%d" % i).data) for i in range(3)])
"""


@pytest.mark.ids("Y5", "N11", "C1")
def test_inherited_descriptor_is_a_door(serve, spawn_python):
    """Three programs inherit one descriptor and call at the same time."""
    serving = serve(threads=3)
    number = serving.door.open()
    children = [spawn_python(CALL_INHERITED, number, pass_fds=[number]) for _ in range(3)]
    for child in children:
        finished = child.finish()
        assert finished.value == [b"0", b"1", b"2"], finished
    with Handle(number) as handle:
        assert handle.call(b"mine").data == b"mine"


CALL_RECEIVED = """
    import array, socket, sys
    from doorpool.door import Handle
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        _, ancillary, _, _ = sock.recvmsg(1, 100)
    (number,) = array.array("i", ancillary[0][2])
    with Handle(number) as handle:
        result((bytes(handle.call(b"from afar").data), handle.server.pid))
"""


@pytest.mark.ids("N11", "F14")
@pytest.mark.parametrize("uid", [None, pytest.param(54_321, id="another user")])
def test_passed_descriptor_is_a_door(serve, spawn_python, request, uid):
    """Whoever gets it needs no permission on any path, and no consent of the server."""
    if uid is not None:
        request.getfixturevalue("root_only")
    callers = []

    def procedure(invocation):
        callers.append((invocation.credentials.pid, invocation.credentials.uid))
        invocation.reply(invocation.data)

    serving = serve(procedure)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = spawn_python(CALL_RECEIVED, theirs.fileno(), pass_fds=[theirs.fileno()], uid=uid)
        number = serving.door.open()
        rights = array.array("i", [number]).tobytes()
        ours.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        os.close(number)
        finished = child.finish()
    assert finished.value == (b"from afar", os.getpid()), finished
    assert callers == [(child.pid, os.geteuid() if uid is None else uid)]


@pytest.mark.ids("C1", "I3")
def test_duplicates_are_the_same_door(serve):
    serving = serve()
    number = serving.door.open()
    copies = [os.dup(number) for _ in range(5)]
    os.close(number)
    handles = [Handle(copy) for copy in copies]
    assert {handle.info().id for handle in handles} == {serving.door.id}
    calls = [Background(handle.call, b"%d" % i) for i, handle in enumerate(handles)]
    assert [call.result().data for call in calls] == [b"%d" % i for i in range(5)]
    for handle in handles:
        handle.close()


def test_descriptor_is_taken_over(serve):
    number = serve().door.open()
    with Handle(number) as handle:
        assert handle.fileno() == number
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


# -- what is no door


def _file():
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno()), lambda: None


def _pipe():
    read, write = os.pipe()
    return read, lambda: os.close(write)


def _tcp():
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    return os.dup(sock.fileno()), sock.close


def _sockets(kind):
    def make():
        one, other = socket.socketpair(socket.AF_UNIX, kind)
        return one.detach(), other.close

    return make


def _listener():
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = tempfile.mkdtemp(prefix="dp-")
    sock.bind(f"{folder}/s")
    sock.listen()
    os.unlink(f"{folder}/s")
    os.rmdir(folder)
    return sock.detach(), lambda: None


def _unconnected():
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).detach(), lambda: None


def _greeting_of_others():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    other.send(b"220 mail.example ESMTP")
    return one.detach(), other.close


NO_DOORS = {
    "a file": _file,
    "a pipe": _pipe,
    "a TCP socket": _tcp,
    "a stream": _sockets(socket.SOCK_STREAM),
    "a datagram socket": _sockets(socket.SOCK_DGRAM),
    "a listener": _listener,
    "a socket without a peer": _unconnected,
    "something that greets otherwise": _greeting_of_others,
}


@pytest.mark.ids("N14")
@pytest.mark.parametrize("make", NO_DOORS.values(), ids=NO_DOORS)
def test_descriptor_that_is_no_door(make):
    number, clean_up = make()
    flags = fcntl.fcntl(number, fcntl.F_GETFL)
    with pytest.raises(NotADoorError) as caught:
        Handle(number)
    assert not caught.value.may_have_run
    assert fcntl.fcntl(number, fcntl.F_GETFL) == flags  # neither taken over nor changed
    os.close(number)
    clean_up()


@pytest.mark.ids("N14")
@pytest.mark.parametrize("number", [-1, 2**31 - 1, 2**31, 2**64, 1_000_000])
def test_number_that_is_no_descriptor(number):
    with pytest.raises(NotADoorError, match="is no door"):
        Handle(number)


@pytest.mark.parametrize("what", [None, 1.5, True, ["a.door"]])
def test_what_is_neither_path_nor_number(what):
    with pytest.raises(TypeError):
        Handle(what)


@pytest.mark.ids("N14")
def test_silent_socket_is_waited_for_and_no_longer():
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        with pytest.raises(CallTimeoutError) as caught:
            Handle(one.fileno(), open_timeout=0.1)
        assert not caught.value.may_have_run
        flags = fcntl.fcntl(one.fileno(), fcntl.F_GETFL)
        assert not flags & os.O_NONBLOCK
        other.close()
        with pytest.raises(BrokenDoorError):
            Handle(one.fileno())
        os.fstat(one.fileno())


@pytest.mark.ids("N14")
def test_path_that_is_no_door(door_dir):
    (door_dir / "file").write_text("")
    (door_dir / "directory").mkdir()
    for name in ("file", "directory"):
        with pytest.raises(NotADoorError, match=name):
            Handle(door_dir / name)
    with pytest.raises(FileNotFoundError):
        Handle(door_dir / "nothing")


@pytest.mark.ids("H02")
@pytest.mark.parametrize("version", [0, 2, 65_535])
def test_greeting_of_another_version_is_refused_in_words(version):
    with rawpeer.RawServer(rawpeer.greeting(version=version)) as server:
        with pytest.raises(ProtocolError, match=f"version {version} "):
            Handle(server.descriptor)
        os.close(server.descriptor)


@pytest.mark.ids("H01")
@pytest.mark.parametrize("cut", [1, 4, 6, 7, 8, 55, 56, 59, 60, -17, -1])
def test_cut_greeting_is_refused(cut):
    with rawpeer.RawServer(rawpeer.greeting()[:cut]) as server:
        with pytest.raises((ProtocolError, NotADoorError), match=r"^the descriptor"):
            Handle(server.descriptor, open_timeout=PATIENCE)
        os.close(server.descriptor)


# -- answers that are none


@pytest.fixture
def answering():
    """A server by hand that has heard the knock of a handle, and the opening of the channel."""
    with rawpeer.RawServer() as server:
        opening = Background(Handle, server.descriptor, open_timeout=PATIENCE)
        server.hear()
        yield server, opening
        os.close(server.descriptor)


ANSWERS = {
    "no answer": b"HTTP/1.1 200 OK",
    "cut": rawpeer.answer()[:-1],
    "longer": rawpeer.answer() + b"\0",
    "of another version": rawpeer.answer(version=2),
    "of an unknown codec": rawpeer.answer(codec=9),
    "of another codec than greeted": rawpeer.answer(codec=1),
    "neither yes nor no": rawpeer.answer(refused=2),
    "refused for an unknown reason": rawpeer.answer(refused=1, body=rawpeer.refusal(200, "moon")),
    "refused without a reason": rawpeer.answer(refused=1),
}


@pytest.mark.ids("H01", "H02")
@pytest.mark.parametrize("words", ANSWERS.values(), ids=ANSWERS)
def test_answer_that_is_none_is_refused(answering, words):
    server, opening = answering
    server.admit(words)
    error = opening.error()
    assert isinstance(error, ProtocolError)
    assert str(error).startswith("door 'by hand'")
    assert not error.may_have_run


@pytest.mark.ids("H02")
def test_refusal_by_a_later_version_is_shown(answering):
    server, opening = answering
    body = rawpeer.refusal(rawpeer.UNSPOKEN, "please speak version 9")
    rawpeer.send(server.knock_socket, rawpeer.answer(version=9, refused=1, body=body))
    error = opening.error()
    assert isinstance(error, ProtocolError)
    assert "please speak version 9" in str(error)


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_answer_with_a_socket_of_another_kind(answering, kind):
    server, opening = answering
    one, other = rawpeer.pair(kind)
    with one, other:
        rawpeer.send(server.knock_socket, rawpeer.answer(), [one.fileno()])
        assert isinstance(opening.error(), ProtocolError)


def test_answer_without_a_socket(answering):
    server, opening = answering
    rawpeer.send(server.knock_socket, rawpeer.answer())
    assert isinstance(opening.error(), ProtocolError)


def test_answer_with_what_is_no_socket(answering):
    server, opening = answering
    with tempfile.TemporaryFile() as file:
        rawpeer.send(server.knock_socket, rawpeer.answer(), [file.fileno()])
        assert isinstance(opening.error(), ProtocolError)


# -- knocks that are none


KNOCKS = {
    "nothing": b"",
    "no knock": b"HTTP/1.1 200 OK",
    "cut": rawpeer.knock()[:-1],
    "longer": rawpeer.knock() + b"\0",
    "of version 0": rawpeer.knock(version=0),
    "of version 2": rawpeer.knock(version=2),
}


@pytest.mark.ids("H01", "H02", "B23")
@pytest.mark.parametrize("words", KNOCKS.values(), ids=KNOCKS)
def test_knock_that_is_none_is_refused_in_words(canary, words):
    serving, bird = canary
    number = serving.door.open()
    with rawpeer.RawClient(number, opening=False) as client:
        client.knock(words)
        said, descriptors = client.answer()
        assert (said[:4], said[6], descriptors) == (b"dpAN", 1, [])
        assert said[16] == rawpeer.PROTOCOL or said[16] == rawpeer.UNSPOKEN
        if "version" in str(said[40:]):
            assert b"install the same doorpool" in said
        client.knock_socket.close()
        client.open()  # the descriptor goes on
        assert client.call(b"x").body == b"x"
    os.close(number)
    bird.still_sings()


@pytest.mark.ids("C02", "F05")
@pytest.mark.parametrize("count", [0, 2, 253])
def test_knock_without_just_one_socket(canary, count):
    serving, bird = canary
    number = serving.door.open()
    ours, theirs = rawpeer.pair(socket.SOCK_STREAM)
    with ours, theirs, rawpeer.RawClient(number, opening=False) as client:
        client.knock(descriptors=[theirs.fileno()] * count)
        client.knock_socket.close()
        client.open()  # in the order of the knocks: the first was heard before
    os.close(number)
    bird.still_sings()


@pytest.mark.parametrize("kind", ["file", "datagram", "seqpacket", "directory"])
def test_knock_with_what_is_no_stream(canary, kind):
    serving, bird = canary
    number = serving.door.open()
    with Canary(serving), rawpeer.RawClient(number, opening=False) as client:
        if kind in ("datagram", "seqpacket"):
            kinds = {"datagram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}
            one, other = rawpeer.pair(kinds[kind])
            with one, other:
                client.knock(descriptors=[one.fileno()])
        else:
            strange = os.open("/" if kind == "directory" else "/dev/null", os.O_RDONLY)
            client.knock(descriptors=[strange])
            os.close(strange)
        client.knock_socket.close()
        client.open()
    os.close(number)
    bird.still_sings()


def test_knock_by_somebody_who_leaves_at_once(canary):
    serving, bird = canary
    number = serving.door.open()
    with rawpeer.RawClient(number, opening=False) as client:
        for _ in range(50):
            client.knock()
            client.knock_socket.close()
        client.open()
        assert client.call(b"x").body == b"x"
    os.close(number)
    bird.still_sings()


@pytest.mark.ids("E03")
def test_what_was_kept_of_an_opening_goes_with_the_channel(serve):
    """Somebody may hold the other end, such as a child of a caller that has died in between."""
    serving = serve()
    number = serving.door.open()
    with rawpeer.RawClient(number, opening=False) as client:
        os.close(number)
        client.knock()
        _, descriptors = client.answer()
        with socket.socket(fileno=descriptors[0]) as channel:
            client.channel = channel
            assert client.call(b"data").body == b"data"
        poll = select.poll()
        poll.register(client.knock_socket, 0)
        assert poll.poll(PATIENCE * 1000)
        wait_until(lambda: serving.door.channels == 0)
