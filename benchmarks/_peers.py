"""
The ways to call a function of another process.

A *peer* serves one procedure at one address, in a process of its own, and connects to it: that
gives a function, which is called with the arguments and returns the result.  Each is set up as
somebody would who wants it fast on one machine: over Unix sockets where it has them, with the
quickest of its serializers that does the same work, and with nothing switched on that the
others have not.  What was chosen, and why, stands at each.

Nothing of theirs is imported at the head of this file: only who is measured needs to be installed, and
a process has only its own peer in it.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import connection, get_context
from multiprocessing.managers import BaseManager
from threading import Thread
from typing import Any

import attrs

from benchmarks import _iceoryx, _machine
from benchmarks._iceoryx import pack, unpack

Procedure = Callable[..., Any]
Call = Callable[..., Any]
Ready = Callable[[], None]

#: More than any workload has callers or idle clients at once.
MANY = 256


@attrs.frozen
class Turn:
    """
    What a client is asked to do when its turn has come.
    """

    calls: int
    """How many calls to time."""
    seconds: float
    """After which no further one is begun."""
    start: float = 0.0
    """When to begin, by the monotonic clock, for those that share a turn."""


#: Takes a turn and returns its samples: seconds a call, unless the workload says otherwise.
Round = Callable[[Turn], list[float]]


class Unavailable(Exception):
    """
    A peer that cannot be measured here; the text says why.
    """


@attrs.frozen
class Service:
    """
    What is served, and where.
    """

    procedure: Procedure
    folder: str
    """A private directory of this service's own."""
    cpus: frozenset[int]
    """Where whoever answers runs."""
    pid: int = 0
    """Who answers; known to clients only."""

    @property
    def address(self) -> str:
        """A path for a socket."""
        return os.path.join(self.folder, "door")


Serve = Callable[[Service, Ready], None]
Connect = Callable[[Service], AbstractContextManager[Call]]


@attrs.frozen
class Peer:
    """
    One way to call.
    """

    key: str
    """What it is called on the command line."""
    name: str
    connect: Connect
    serve: Serve | None = None
    """Absent where nobody is called, or where connecting starts who answers."""
    needs: str = ""
    """A module that the standard library has not."""
    shared: bool = False
    """Whether one client is for any number of threads; else each has its own."""
    spins: bool = False
    """Whether its server takes a CPU while nobody calls; it is stopped then."""
    takes_turns: Callable[[Service], AbstractContextManager[Round]] | None = None
    """How it takes a turn, where there is no function to call."""
    empty: bool = False
    """Whether arrays are made by ``doorpool.empty``."""
    streams: bool = False
    """Whether many items come as one stream."""
    environment: Mapping[str, str] = attrs.field(factory=dict)
    skips: Mapping[str, str] = attrs.field(factory=dict)
    """Workloads that it has no place in, and why."""

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return not self.needs or find_spec(self.needs) is not None


# -- doorpool: no option at all ---------------------------------------------------------------


def serve_doorpool(service: Service, ready: Ready) -> None:
    from doorpool import Server

    with Server() as server:
        server.attach(service.procedure, service.address)
        ready()
        server.run()


def connect_doorpool(service: Service) -> AbstractContextManager[Call]:
    from doorpool import Proxy

    return Proxy(service.address)


# -- a raw Unix socket with pickle: a length, then the pickle -----------------------------------
#
# A stream, because that is what people take.  A thread for each connection, which blocks in
# `recv`.  Small messages take one system call a side, long ones are received in place.


_LENGTH = struct.Struct("<Q")
_ONE_READ = 65_536


def send(sock: socket.socket, value: object) -> None:
    data = pickle.dumps(value, 5)
    length = _LENGTH.pack(len(data))
    if len(data) < _ONE_READ:
        sock.sendall(length + data)
    else:
        sock.sendall(length)
        sock.sendall(data)


def receive(sock: socket.socket) -> Any:
    data: bytes | bytearray = sock.recv(_ONE_READ)
    if not data:
        raise EOFError
    (length,) = _LENGTH.unpack_from(data)
    if len(data) < _LENGTH.size + length:
        data = _rest(sock, data, _LENGTH.size + length)
    return pickle.loads(memoryview(data)[_LENGTH.size :])


def _rest(sock: socket.socket, begun: bytes | bytearray, length: int) -> bytearray:
    whole = bytearray(length)
    whole[: len(begun)] = begun
    view, have = memoryview(whole), len(begun)
    while have < length:
        have += sock.recv_into(view[have:])
    return whole


def serve_raw(service: Service, ready: Ready) -> None:
    procedure = service.procedure

    def answer(sock: socket.socket) -> None:
        with sock:
            while True:
                send(sock, procedure(*receive(sock)))

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(service.address)
        listener.listen(MANY)
        ready()
        while True:
            _in_thread(answer, listener.accept()[0])


@contextmanager
def connect_raw(service: Service) -> Iterator[Call]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(service.address)

        def call(*args: object) -> Any:
            send(sock, args)
            return receive(sock)

        yield call


def _in_thread(answer: Callable[[Any], None], client: Any) -> None:
    """Answer a client in a thread of its own, until it hangs up."""

    def run() -> None:
        try:
            answer(client)
        except (EOFError, ConnectionError):
            return

    Thread(target=run, daemon=True).start()


# -- multiprocessing.connection: over a Unix socket, and without the handshake by a secret, ------
# which would take four messages more to open it.


def serve_connection(service: Service, ready: Ready) -> None:
    procedure = service.procedure

    def answer(it: connection.Connection[Any, Any]) -> None:
        with it:
            while True:
                it.send(procedure(*it.recv()))

    with connection.Listener(service.address, "AF_UNIX", backlog=MANY) as listener:
        ready()
        while True:
            _in_thread(answer, listener.accept())


@contextmanager
def connect_connection(service: Service) -> Iterator[Call]:
    with connection.Client(service.address, "AF_UNIX") as it:

        def call(*args: object) -> Any:
            it.send(args)
            return it.recv()

        yield call


# -- BaseManager: its server as it is.  The names of the methods are given, so that a client need
# not ask for them.


def _manager(service: Service) -> BaseManager:
    class Served:
        call = staticmethod(service.procedure)

    class Manager(BaseManager):
        pass

    Manager.register("Served", Served, exposed=("call",))
    return Manager(address=service.address, authkey=b"the benchmarks")


def serve_manager(service: Service, ready: Ready) -> None:
    server = _manager(service).get_server()
    ready()
    server.serve_forever()


@contextmanager
def connect_manager(service: Service) -> Iterator[Call]:
    manager = _manager(service)
    manager.connect()
    yield manager.Served().call  # type: ignore[attr-defined]


# -- ProcessPoolExecutor: one worker, which the client's process starts ------------------------


@contextmanager
def connect_pool(service: Service) -> Iterator[Call]:
    fork = get_context("fork")
    settled = partial(_machine.settle, service.cpus)
    with ProcessPoolExecutor(1, mp_context=fork, initializer=settled) as pool:
        procedure = service.procedure

        def call(*args: object) -> Any:
            return pool.submit(procedure, *args).result()

        yield call


# -- Pyro5: a Unix socket, and `marshal`, the quickest of its serializers (it has no pickle) -----


def _pyro() -> Any:
    import Pyro5.api

    Pyro5.api.config.SERIALIZER = "marshal"
    Pyro5.api.config.THREADPOOL_SIZE = MANY
    return Pyro5.api


def serve_pyro(service: Service, ready: Ready) -> None:
    pyro = _pyro()

    @pyro.expose
    class Served:
        def call(self, *args: object) -> Any:
            return service.procedure(*args)

    with pyro.Daemon(unixsocket=service.address) as daemon:
        daemon.register(Served(), "it")
        ready()
        daemon.requestLoop()


@contextmanager
def connect_pyro(service: Service) -> Iterator[Call]:
    with _pyro().Proxy(f"PYRO:it@./u:{service.address}") as proxy:
        yield proxy.call


# -- RPyC: a Unix socket, a thread for each connection, no compression.  It hands out references
# to what is no constant; for values to cross, as with the others, they travel as pickles.
# The remote method is looked up once, so a call is one message each way.


def _rpyc() -> Any:
    import rpyc
    import rpyc.core.channel
    import rpyc.utils.server

    rpyc.core.channel.Channel.COMPRESSION_THRESHOLD = 1 << 40
    return rpyc


def serve_rpyc(service: Service, ready: Ready) -> None:
    rpyc, procedure = _rpyc(), service.procedure

    class Served(rpyc.Service):  # type: ignore[misc]
        def exposed_call(self, data: bytes) -> bytes:
            return pickle.dumps(procedure(*pickle.loads(data)), 5)

    server = rpyc.utils.server.ThreadedServer(Served, socket_path=service.address, backlog=MANY)
    ready()
    server.start()


@contextmanager
def connect_rpyc(service: Service) -> Iterator[Call]:
    link = _rpyc().utils.factory.unix_connect(service.address)
    try:
        remote = link.root.call
        yield lambda *args: pickle.loads(remote(pickle.dumps(args, 5)))
    finally:
        link.close()


# -- pyzmq: REQ and REP over `ipc://`, with pickle.  Large buffers travel beside the pickle, in
# frames of their own that are not copied into or out of messages; `bytes` as well, which pickle
# would copy.  A REP socket answers one request at a time.


def _send_frames(sock: Any, frames: list[Any]) -> None:
    if len(frames) == 1:
        sock.send(frames[0])
    else:
        sock.send_multipart(frames, copy=False)


def _receive_frames(sock: Any) -> list[Any]:
    import zmq

    frames = [sock.recv()]
    if sock.getsockopt(zmq.RCVMORE):
        frames += [frame.buffer for frame in sock.recv_multipart(copy=False)]
    return frames


def serve_zmq(service: Service, ready: Ready) -> None:
    import zmq

    procedure = service.procedure
    with zmq.Context() as context, context.socket(zmq.REP) as sock:
        sock.bind(f"ipc://{service.address}")
        ready()
        while True:
            _send_frames(sock, pack(procedure(*unpack(_receive_frames(sock)))))


@contextmanager
def connect_zmq(service: Service) -> Iterator[Call]:
    import zmq

    with zmq.Context.instance().socket(zmq.REQ) as sock:
        sock.connect(f"ipc://{service.address}")

        def call(*args: object) -> Any:
            _send_frames(sock, pack(args))
            result = unpack(_receive_frames(sock))
            return bytes(result) if type(result) is memoryview else result

        yield call


# -- gRPC: over a Unix socket, with pickle in place of protobuf, and no limit to a message.  It takes
# None for a failure to unpickle, so a result travels in a tuple.


_GRPC_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a new client is a new connection
)


def _dumps(value: object) -> bytes:
    return pickle.dumps(value, 5)


def serve_grpc(service: Service, ready: Ready) -> None:
    import grpc

    procedure = service.procedure
    method = grpc.unary_unary_rpc_method_handler(
        lambda args, _: (procedure(*args),), request_deserializer=pickle.loads, response_serializer=_dumps
    )
    server = grpc.server(ThreadPoolExecutor(MANY), options=_GRPC_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("it", {"call": method}),))
    server.add_insecure_port(f"unix:{service.address}")
    server.start()
    ready()
    server.wait_for_termination()


@contextmanager
def connect_grpc(service: Service) -> Iterator[Call]:
    import grpc

    with grpc.insecure_channel(f"unix:{service.address}", options=_GRPC_OPTIONS) as channel:
        remote = channel.unary_unary("/it/call", _dumps, pickle.loads)
        yield lambda *args: remote(args)[0]


# -- who they are -----------------------------------------------------------------------------


_ONE_AT_A_TIME = "one thread answers"
_OWN_WORKER = "its workers are its own process's"
_NO_ARRAYS = "no serializer for arrays"
_QUADRATIC = "copies all that is left after each 64 KB, for minutes"

DOORPOOL = Peer("doorpool", "doorpool", connect_doorpool, serve_doorpool, shared=True)
DOORPOOL_EMPTY = attrs.evolve(DOORPOOL, key="doorpool-empty", name="doorpool.empty", empty=True)
DOORPOOL_STREAM = attrs.evolve(DOORPOOL, key="doorpool-stream", name="doorpool, as a stream", streams=True)
DOORPOOL_PY = attrs.evolve(
    DOORPOOL, key="doorpool-py", name="doorpool, Python twin", environment={"DOORPOOL_IMPL": "py"}
)
RAW = Peer("raw", "raw Unix socket", connect_raw, serve_raw)
CONNECTION = Peer("connection", "multiprocessing.connection", connect_connection, serve_connection)
MANAGER = Peer("manager", "BaseManager", connect_manager, serve_manager, shared=True)
POOL = Peer(
    "pool",
    "ProcessPoolExecutor",
    connect_pool,
    shared=True,
    skips={
        "clients": _OWN_WORKER,
        "open": _OWN_WORKER,
        "threads": "a process for each call",
        "memory": _OWN_WORKER,
    },
)
PYRO = Peer(
    "pyro5",
    "Pyro5",
    connect_pyro,
    serve_pyro,
    needs="Pyro5",
    skips={"argument": _NO_ARRAYS, "returned": _NO_ARRAYS},
)
RPYC = Peer(
    "rpyc",
    "RPyC",
    connect_rpyc,
    serve_rpyc,
    needs="rpyc",
    skips={"argument": _QUADRATIC, "returned": _QUADRATIC},
)
ZMQ = Peer("zmq", "pyzmq", connect_zmq, serve_zmq, needs="zmq", skips={"threads": _ONE_AT_A_TIME})
GRPC = Peer("grpc", "gRPC", connect_grpc, serve_grpc, needs="grpc", shared=True)
ICEORYX = Peer(
    "iceoryx2",
    "iceoryx2, events",
    _iceoryx.connect,
    _iceoryx.serve,
    needs="iceoryx2",
    skips={"threads": _ONE_AT_A_TIME},
)
ICEORYX_BUSY = Peer(
    "iceoryx2-busy",
    "iceoryx2, busy-polling",
    _iceoryx.connect_busy,
    _iceoryx.serve_busy,
    needs="iceoryx2",
    spins=True,
    skips={"threads": _ONE_AT_A_TIME},
)

PEERS = (
    DOORPOOL,
    RAW,
    CONNECTION,
    MANAGER,
    POOL,
    PYRO,
    RPYC,
    ZMQ,
    GRPC,
    ICEORYX,
    ICEORYX_BUSY,
)
