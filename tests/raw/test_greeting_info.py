"""
What a door says of itself: to everybody, at no cost, and nothing that is not for everybody.
"""

from __future__ import annotations

import os
import socket
import threading

import attrs
import pytest
from support import rawpeer, wait_until
from support.rawdoor import PATIENCE, Background

from doorpool._wire import Attribute
from doorpool.door import Codec, Door, Gate, Handle

SECRET = "the cookie that no client sees"


def secret_procedure_of_the_server(invocation):
    invocation.reply(b"public")


@pytest.mark.ids("I2", "P4", "L13")
def test_everything_is_said(serve):
    serving = serve(
        name="näme", doc="What it does.", signature="(x: int)", private=True, refuse_descriptors=True,
        max_request=1234, max_descriptors=7, main=bytes(range(16)),
    )  # fmt: skip
    info = serving.handle().info()
    assert info.id == serving.door.id
    assert (info.name, info.doc, info.signature) == ("näme", "What it does.", "(x: int)")
    assert info.attributes == Attribute.PRIVATE | Attribute.REFUSE_DESCRIPTORS
    assert (info.max_request, info.max_descriptors) == (1234, 7)
    assert (info.codec, info.main) == (Codec.RAW, bytes(range(16)))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        info.name = "another"


@pytest.mark.ids("C6")
def test_attributes_are_those_of_its_making(serve):
    serving = serve(private=True)
    before = serving.handle().info()
    serving.door.max_request = 5  # the limits are another matter
    after = serving.handle().info()
    assert after.max_request == 5
    assert attrs.evolve(after, max_request=before.max_request) == before


@pytest.mark.ids("C8", "I3")
def test_every_door_has_an_id_of_its_own(serve):
    serving = serve()
    doors = [serving.door, *(serving.add(lambda invocation: None) for _ in range(20))]
    assert len({door.id for door in doors}) == 21
    assert len(serving.door.id) == 16
    one, other, stranger = serving.handle(), serving.handle(), serving.handle(doors[1])
    assert one.info().id == other.info().id == serving.door.id
    assert stranger.info().id == doors[1].id


@pytest.mark.ids("C2")
@pytest.mark.parametrize("how", ["open", "listen"])
def test_descriptor_is_close_on_exec(serve, door_dir, how):
    serving = serve()
    if how == "open":
        with serving.handle() as handle:
            assert not os.get_inheritable(handle.fileno())
    else:
        with Handle(serving.door.listen(door_dir / "a.door")) as handle:
            assert not os.get_inheritable(handle.fileno())
            assert not any(os.get_inheritable(port.fileno()) for port in serving.door._ports)


@pytest.mark.ids("C4")
def test_nothing_of_the_servers_own_is_sent(serve):
    """Every byte that a client can get: greeting, answer, replies, failures, goodbye."""
    serving = serve(secret_procedure_of_the_server, cookie=SECRET)
    seen = []
    number = serving.door.open()
    with rawpeer.RawClient(number, opening=False) as client:
        seen.append(client.greeting())
        client.knock()
        words, descriptors = client.answer()
        seen.append(words)
        client.channel = socket.socket(fileno=descriptors[0])
        client.channel.settimeout(PATIENCE)
        for data in (rawpeer.frame(rawpeer.REQUEST, 1), rawpeer.frame(rawpeer.PING, 2)):
            client.send(data)
            seen.append(client.receive().body)
        client.send(rawpeer.frame(rawpeer.REQUEST, 3, length=2**40))
        seen.append(client.receive().body)
        serving.door.revoke()
        seen.append(client.receive().body)
        client.door.recv(1 << 16)  # the greeting; behind it is the farewell
        seen.append(client.door.recv(1 << 16))
        client.knock_socket.close()
    os.close(number)
    everything = b"".join(seen)
    assert b"public" in everything
    for secret in (SECRET, "cookie", "secret_procedure", __file__, hex(id(serving.door)), "test_greeting"):
        assert secret.encode() not in everything
    address = id(secret_procedure_of_the_server)
    assert address.to_bytes(8, "little") not in everything


# -- what it costs


@pytest.fixture
def stuck(serve):
    """A door whose only thread is busy, until the event is set."""
    running, go = threading.Event(), threading.Event()

    def procedure(invocation):
        running.set()
        assert go.wait(PATIENCE)
        invocation.reply()

    serving = serve(procedure, threads=1)
    call = Background(serving.handle().call)
    assert running.wait(PATIENCE)
    yield serving
    go.set()
    call.result()


@pytest.mark.ids("N13", "I6", "I7")
def test_door_of_a_busy_server_opens_and_tells_about_itself(stuck, door_dir):
    assert stuck.gate.waiting == 0
    path = stuck.door.listen(door_dir / "a.door")
    with stuck.handle(open_timeout=PATIENCE) as handle, Handle(path, open_timeout=PATIENCE) as by_path:
        for door in (handle, by_path):
            assert door.info().id == stuck.door.id
            assert door.alive
            assert door.server.pid == os.getpid()


@pytest.mark.ids("I6")
def test_it_is_read_without_a_word_to_the_server():
    with rawpeer.RawServer(rawpeer.greeting(name="silent")) as server:
        with Handle(server.descriptor, lazy=True) as handle:
            assert handle.info().name == "silent"
            assert handle.alive
            server.port.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody has knocked
                server.port.recv(1)


@pytest.mark.ids("I1", "I5")
def test_it_can_be_read_after_the_servers_death(spawn_server, door_dir):
    server = spawn_server(
        """
        from support.rawdoor import Serving
        serving = Serving(name="mortal")
        serving.door.listen("a.door")
        ready(serving.door.id)
        serving.threads[0].join()
        """,
        cwd=door_dir,
    )
    with Handle(door_dir / "a.door") as handle:
        copy = os.dup(handle.fileno())
        assert (handle.server.pid, handle.server.uid) == (server.pid, os.geteuid())
        assert handle.alive
        server.kill()
        wait_until(lambda: not handle.alive)
        assert handle.info().name == "mortal"
        with Handle(copy, lazy=True) as holder:
            assert holder.info().id == server.ready
            assert not holder.alive


@pytest.mark.ids("I2", "I5", "R9")
def test_it_can_be_read_after_the_door_was_taken_away(serve):
    serving = serve(name="taken")
    with serving.handle() as handle:
        copy = os.dup(handle.fileno())
        serving.door.revoke()
        assert handle.info().name == "taken"
        assert not handle.alive
        with Handle(copy, lazy=True) as holder:
            assert holder.info().name == "taken"
            assert not holder.alive


@pytest.mark.ids("I6")
def test_every_copy_can_read_it_again_and_again(serve):
    with serve(name="copied").handle() as handle:
        for _ in range(3):
            with Handle(os.dup(handle.fileno())) as copy:
                assert copy.info() == handle.info()
                assert copy.call(b"x").data == b"x"


def test_the_longest_texts_still_make_a_greeting():
    gate = Gate()
    door = Door(gate, name="n" * 5_000, doc="d" * 100_000, signature="s" * 100_000)
    with Handle(door.open()) as handle:
        assert handle.info().name == "n" * 1_024
        assert len(handle.info().doc) == 32_768
    door.revoke()
    gate.close()
    gate.dispose()
