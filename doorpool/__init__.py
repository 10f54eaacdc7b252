"""
Doors for Python on Linux: call a function of another process on the same machine.

    with Server() as server:                          # one process
        server.attach(answer, "server.door")
        server.run()

    with Proxy("server.door") as answer:              # any other
        print(answer("Hello, World!"))

The rooms of the house, from the roof down; each leans only on those below it:

    _server      Server                     _proxy      Proxy
    _streams     iterators as arguments and results
    _doors       doors as arguments and results
    _progress    track
    _endpoint    Endpoint                   _call       Call, current_call
    _info        DoorInfo
    _threads     server threads: how many, when they come and go
    _objects     objects behind doors: their methods
    _marshal     objects <-> bytes and buffers          _exceptions  what leaves a procedure
    _kinds       how files, sockets and the like cross
    _data        plain data <-> bytes, by annotations   _passing     take; what crosses with a descriptor
    _keys        no dict or set of keys that collide
    door         the raw layer, public: bytes, buffers and descriptors
    _handle      the caller's side of it    _door       the server's: names, ports, knocks
    _gate        where server threads wait for calls
    _guests      who has come, and how many of whom there may be
    _unread      descriptors in results that strangers have not read
    _shares      what each stranger may have of a server, and whose turn it is
    _opening     knock and answer: who is at the other end
    _channel     the private pair on which calls go
    _names       the file system: attach, detach, stale names, long paths
    _shelf       big buffers in shared memory: empty, buffer
    _segments    what they lie in, and who owns it      _manifest    where in a message they are
    _memory      memfds and mappings
    _keeper      the one thread that accepts and answers knocks
    _doorman     asking a user's function who may come in
    _janitor     closing what others have sent, which may take as long as they like
    _sockets     sockets that carry credentials
    _wire        every byte that is sent: frames, knocks, answers, greetings
    _shuttle     the page of memory by which two ends call each other, and pickles of what most calls
                 consist of, batches of streams, and keys (in C, the latter in _atoms.c, _batches.c and
                 _keys.c; _impl has the choice of its twin)
    _callers     rules: who may call, whose server is believed
    _credentials, _descriptor, _log, _errors
"""

import logging as _logging
import sys as _sys

if not _sys.platform.startswith("linux"):
    raise ImportError(f"doorpool needs Linux 5.4 or newer, and this is {_sys.platform}")

from doorpool import _doors as _doors
from doorpool import _streams as _streams
from doorpool._call import Call, current_call
from doorpool._callers import Group, anyone
from doorpool._credentials import Credentials
from doorpool._descriptor import Descriptor
from doorpool._endpoint import Endpoint
from doorpool._errors import (
    AccessError,
    BrokenDoorError,
    BusyError,
    CallTimeoutError,
    ClosedError,
    DoorError,
    LimitError,
    MarshalError,
    NotADoorError,
    ProtocolError,
    RemoteError,
    RemoteTraceback,
    RevokedError,
)
from doorpool._info import DoorInfo
from doorpool._passing import take
from doorpool._progress import track
from doorpool._proxy import Proxy
from doorpool._server import Server, Statistics
from doorpool._shares import Limits, Usage
from doorpool._shelf import buffer, empty

# What this logger says is the program's to show, or nobody sees it.
_logging.getLogger("doorpool").addHandler(_logging.NullHandler())

__all__ = [
    "AccessError",
    "BrokenDoorError",
    "BusyError",
    "Call",
    "CallTimeoutError",
    "ClosedError",
    "Credentials",
    "Descriptor",
    "DoorError",
    "DoorInfo",
    "Endpoint",
    "Group",
    "LimitError",
    "Limits",
    "MarshalError",
    "NotADoorError",
    "Proxy",
    "ProtocolError",
    "RemoteError",
    "RemoteTraceback",
    "RevokedError",
    "Server",
    "Statistics",
    "Usage",
    "anyone",
    "buffer",
    "current_call",
    "empty",
    "take",
    "track",
]

__version__ = "0.1.0.dev0"
