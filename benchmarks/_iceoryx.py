"""
iceoryx2: request and response in shared memory, either side polling without end or waiting for events.

A message is one slice of bytes: a pickle, or, where pickle has left large buffers out, how many parts
there are, their lengths, and the parts.  Each side copies once, into memory that the other reads in
place: a procedure while it runs, a client until its next call (`bytes` it copies out, for bytes are
asked for).  Who polls yields between looks: that costs half a microsecond where each side has a
CPU, and is the only way on with one.
"""

from __future__ import annotations

import ctypes
import glob
import itertools
import os
import pickle
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks._peers import Call, Ready, Service

#: From here on pickle's copy of `bytes` costs more than what it takes to go around it.
_LARGE = 65_536

#: Clients that a service is prepared for.
_CLIENTS = 128

#: What `pickle.dumps` begins with; a message of parts begins with their number.
_PICKLE = 0x80

#: How often who waits for an event looks whether it is to end.
_LISTEN_MS = 200


# -- values <-> parts, for all who can send a buffer without copying it into a pickle ------------


def pack(value: Any) -> list[Any]:
    """Return a pickle, and the large buffers that belong to it."""
    if type(value) is tuple and len(value) == 1 and _is_large(value[0]):
        value = (pickle.PickleBuffer(value[0]),)
    elif _is_large(value):
        value = pickle.PickleBuffer(value)
    buffers: list[pickle.PickleBuffer] = []
    return [pickle.dumps(value, 5, buffer_callback=buffers.append), *(it.raw() for it in buffers)]


def unpack(parts: list[Any]) -> Any:
    """Return the value; it lies on the large buffers."""
    return pickle.loads(parts[0], buffers=parts[1:])


def _is_large(value: Any) -> bool:
    return type(value) in (bytes, memoryview) and len(value) >= _LARGE


# -- parts <-> one slice of bytes --------------------------------------------------------------


def _write(loan: Callable[[int], Any], parts: list[Any]) -> Any:
    """Copy a message into shared memory, and send it."""
    if len(parts) > 1:
        parts = [struct.pack(f"<{1 + len(parts)}Q", len(parts), *map(len, parts)), *parts]
    slot = loan(sum(map(len, parts)))
    view, at = slot.payload().as_memory_view().cast("B"), 0
    for part in parts:
        view[at : at + len(part)] = part
        at += len(part)
    return slot.assume_init().send()


def _read(message: Any) -> list[memoryview]:
    """Return the parts of a message, in place."""
    view = message.payload().as_memory_view().cast("B")
    if view[0] == _PICKLE:
        return [view]
    (count,) = struct.unpack_from("<Q", view)
    lengths = struct.unpack_from(f"<{count}Q", view, 8)
    ends = itertools.accumulate(lengths, initial=8 * (1 + count))
    return [view[start:end] for start, end in itertools.pairwise(ends)]


# -- the service, and who waits how ---------------------------------------------------------------


class _Ports:
    """
    What a process opens once, and has its ports on: the requests and answers, and events.
    """

    def __init__(self, service: Service) -> None:
        import iceoryx2 as iox

        iox.set_log_level(iox.LogLevel.Error)
        config = iox.config.default()
        config.global_cfg.root_path = iox.Path.new(service.folder)
        config.global_cfg.prefix = iox.FileName.new(_prefix(service))
        builder = iox.NodeBuilder.new().config(config)
        self.node = builder.signal_handling_mode(iox.SignalHandlingMode.Disabled).create(iox.ServiceType.Ipc)
        kind = iox.Slice[ctypes.c_uint8]
        calls = self._service("call").request_response(kind, kind)
        calls = calls.max_servers(1).max_clients(_CLIENTS).max_nodes(_CLIENTS)
        calls = calls.max_active_requests_per_client(1).max_loaned_requests(1)
        self.calls = calls.max_response_buffer_size(1).open_or_create()
        self.strategy = iox.AllocationStrategy.PowerOfTwo
        self.patience = iox.Duration.from_millis(_LISTEN_MS)

    def _service(self, name: str) -> Any:
        import iceoryx2 as iox

        return self.node.service_builder(iox.ServiceName.new(name))

    def event(self, name: str) -> Any:
        """Return the event of one direction."""
        builder = self._service(name).event()
        return builder.max_listeners(_CLIENTS).max_notifiers(_CLIENTS).max_nodes(_CLIENTS).open_or_create()


#: A node is a process's; a client is a port of it.
_ports = lru_cache(1)(_Ports)


def _prefix(service: Service) -> str:
    """Return what the names of a service's shared memory begin with."""
    return "bench_" + os.path.basename(service.folder) + "_"


def remove_leftovers(folder: str) -> None:
    """Remove the shared memory of a killed server, whose folder this was."""
    for path in glob.glob(f"/dev/shm/bench_{os.path.basename(folder)}_*"):
        os.unlink(path)


def _leave(number: int, frame: object) -> None:
    raise SystemExit


def _serve(service: Service, ready: Ready, ports: _Ports, wait: Call, rang: Call) -> None:
    """Answer for ever; `wait` between looks, and `rang` after each answer."""
    signal.signal(signal.SIGTERM, _leave)  # it ends in an orderly way, and with it what it shares
    builder = ports.calls.server_builder().initial_max_slice_len(_LARGE)
    server, procedure = builder.allocation_strategy(ports.strategy).create(), service.procedure
    ready()
    while True:
        request = server.receive()
        if request is None:
            wait()
            continue
        _write(request.loan_slice_uninit, pack(procedure(*unpack(_read(request)))))
        rang()
        request.delete()


@contextmanager
def _connect(ports: _Ports, wait: Call, rang: Call) -> Iterator[Call]:
    builder = ports.calls.client_builder().initial_max_slice_len(_LARGE)
    client = builder.allocation_strategy(ports.strategy).create()
    held: list[Any] = []

    def call(*args: object) -> Any:
        while held:
            held.pop().delete()
        pending = _write(client.loan_slice_uninit, pack(args))
        rang()
        while (response := pending.receive()) is None:
            wait()
        held.extend((pending, response))
        result = unpack(_read(response))
        return bytes(result) if type(result) is memoryview else result

    yield call
    while held:
        held.pop().delete()
    client.delete()


def _nothing() -> None:
    """Tell nobody: the other side looks."""


def serve_busy(service: Service, ready: Ready) -> None:
    _serve(service, ready, _ports(service), os.sched_yield, _nothing)


def connect_busy(service: Service) -> Any:
    return _connect(_ports(service), os.sched_yield, _nothing)


def serve(service: Service, ready: Ready) -> None:
    ports = _ports(service)
    requests = ports.event("request").listener_builder().create()
    answers = ports.event("answer").notifier_builder().create()
    _serve(service, ready, ports, lambda: requests.timed_wait(ports.patience), answers.notify)


@contextmanager
def connect(service: Service) -> Iterator[Call]:
    ports = _ports(service)
    requests = ports.event("request").notifier_builder().create()
    answers = ports.event("answer").listener_builder().create()
    with _connect(ports, lambda: answers.timed_wait(ports.patience), requests.notify) as call:
        yield call
    answers.delete()
    requests.delete()
