"""
Doors without objects: bytes, buffers and descriptors in; the same out.

This is the layer under ``Server`` and ``Proxy``, usable on its own.  No pickle is spoken
here and nothing is unpickled; what the bytes mean is yours to say.

    # the server                                    # the caller
    gate = Gate()                                   with Handle("echo.door") as door:
    door = Door(gate, name="echo")                      print(door.call(b"hello").data)
    door.listen("echo.door")
    while invocation := gate.wait():
        invocation.reply(invocation.data)

A *gate* is where server threads wait, a *door* what callers come in by, an *invocation*
one call, to be answered exactly once.  A *handle* is an open descriptor of a door; so is
the number that ``Door.open`` returns, which can be duplicated, inherited, sent through a
socket, and opened with ``Handle(number)`` by whoever holds it.

It is also the seam for other kernels: nothing above it knows a socket.
"""

from doorpool._door import Door
from doorpool._gate import Gate, Invocation
from doorpool._handle import Handle, Reply
from doorpool._wire import Codec, Reason

__all__ = ["Codec", "Door", "Gate", "Handle", "Invocation", "Reason", "Reply"]
