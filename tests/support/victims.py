"""
Honest servers and clients for actors to be, on the two layers of the library.

    raw       ``Gate``, ``Door`` and ``Handle`` with the pickle codec, and the least that can stand
              above them: what comes in is unpickled, what goes out is pickled
    objects   ``Server`` and ``Proxy``

Both sides unpickle by ``doorpool._marshal._unpickle``, so the library's counter counts.
"""

from __future__ import annotations

import os
import pickle
import threading
from typing import Any

from doorpool import _marshal
from doorpool._keeper import keeper
from doorpool.door import Codec, Door, Gate, Handle
from support.actors import Fd, here


def _note(credentials: Any, value: Any) -> None:
    ids = credentials.pid, credentials.uid, credentials.gid, credentials.groups
    here.seen.append((ids, value))


def seen() -> list[tuple[tuple[Any, ...], Any]]:
    """Who has called the server of this process, (pid, uid, gid, groups), and with what."""
    return list(here.seen)


# -- a server ---------------------------------------------------------------------------------


def serve(
    layer: str,
    path: str | None = None,
    *,
    mode: int = 0o666,
    trust: str = "namespace",
    codec: str = "PICKLE",
    name: str = "echo",
) -> int:
    """
    Serve an echo; return the pid, as this process sees it.

    The file is open to everybody, so that only the rules about identity are in the way.
    """
    here.seen = []
    here.layer = layer
    if layer == "raw":
        _serve_raw(path, mode, trust, Codec[codec], name)
    else:
        _serve_objects(path, mode, trust, name)
    return os.getpid()


def _serve_raw(path: str | None, mode: int, trust: str, codec: Codec, name: str) -> None:
    here.gate = Gate()
    here.door = Door(here.gate, name=name, codec=codec, trust=trust)
    if path is not None:
        here.door.listen(path, mode=mode)
    threading.Thread(target=_answer, args=(here.gate,), daemon=True).start()


def _answer(gate: Gate) -> None:
    while (invocation := gate.wait()) is not None:
        if invocation.door.codec is Codec.PICKLE:
            value = _marshal._unpickle(invocation.data, ())
        else:
            value = bytes(invocation.data)
        _note(invocation.credentials, value)
        invocation.reply(invocation.data)


def _serve_objects(path: str | None, mode: int, trust: str, name: str) -> None:
    from doorpool import Endpoint, Server

    here.server = Server()
    here.endpoint = Endpoint(_echo, name=name, trust=trust)
    here.server.attach(here.endpoint, path, mode=mode)
    here.server.start()


def _echo(value: Any) -> Any:
    from doorpool import current_call

    _note(current_call().caller, value)
    return value


def raw_door() -> Door:
    """The door of the raw layer, whatever is above it."""
    return here.door if here.layer == "raw" else here.endpoint._door


def open_descriptor() -> Fd:
    """Hand out a fresh descriptor of the door."""
    before = set(raw_door()._ports) if here.layer == "raw" or here.endpoint._door else set()
    number = here.door.open() if here.layer == "raw" else here.endpoint.open().take()
    (here.newest_port,) = raw_door()._ports - before
    return Fd(number)


def give_port() -> Fd:
    """Let somebody share the port of the newest descriptor, which a server never would."""
    return Fd(os.dup(here.newest_port.fileno()))


def give_server_end() -> Fd:
    """Let somebody share the server's end of a channel, which a server never would."""
    with keeper().lock:  # it has entered the channel that it has answered with when it lets go
        pass
    return Fd(os.dup(next(iter(raw_door()._channels)).channel.fileno()))


# -- a client ---------------------------------------------------------------------------------


def open_client(layer: str, door: str | int, **options: Any) -> tuple[Any, ...]:
    """Open a door; return who the server is: (pid, uid, gid, groups)."""
    here.client_layer = layer
    if layer == "raw":
        here.client = Handle(door, **options)
        server = here.client.server
    else:
        from doorpool import Proxy

        here.client = Proxy(door, **options)
        server = here.client.info.server
    return server.pid, server.uid, server.gid, server.groups


def call(value: Any, **options: Any) -> Any:
    """Call the door with a value, and return the result."""
    if here.client_layer == "objects":
        return here.client.options(**options)(value) if options else here.client(value)
    if here.client.greeting.codec is not Codec.PICKLE:
        return bytes(here.client.call(value, **options).data)
    reply = here.client.call(pickle.dumps(value, 5), **options)
    return _marshal._unpickle(reply.data, ())


def raw_handle() -> Handle:
    """The handle of the raw layer, whatever is above it."""
    return here.client if here.client_layer == "raw" else here.client._line.handle


def give_client_end() -> Fd:
    """Let somebody share the client's end of a channel, which a client never would."""
    return Fd(os.dup(raw_handle()._idle[-1].fileno()))


def close_client() -> None:
    here.client.close()


# -- stages of an attack ----------------------------------------------------------------------


def hold_keeper() -> None:
    """Have the keeper of this process hear nothing until ``let_keeper_go``."""
    keeper().lock.acquire()


def let_keeper_go() -> None:
    keeper().lock.release()


def next_number() -> int:
    """The number that the next call on the client's idle channel will have."""
    return raw_handle()._idle[-1].number + 1
