"""What a door says of itself, for people and programs."""

from __future__ import annotations

import attrs

from doorpool._credentials import Credentials
from doorpool._wire import Attribute, Greeting

__all__ = ["DoorInfo"]

_ATTRIBUTES = {
    Attribute.PRIVATE: "private",
    Attribute.REFUSE_DESCRIPTORS: "refuse_descriptors",
    Attribute.OBJECT: "object",
    Attribute.CONTEXT_MANAGER: "context_manager",
}


@attrs.frozen
class DoorInfo:
    """
    What a door said of itself when it was opened.

    Attributes:
        id: 32 hex digits, the same for every descriptor of one door.  The server's claim.
        name: what the server calls it.
        path: by which it was opened, absolute; None if by descriptor.
        server: who answers, as the kernel says.
        attributes: of "private", "refuse_descriptors", "local" (it is a door of this process),
            "object" (it leads to an object, whose methods are called) and "context_manager".
        codec: how values are written.
        max_request: the most bytes of a request.
        max_descriptors: the most descriptors of a request.
        python: the server's, major and minor version.
        doc: the procedure's docstring.
        signature: of the procedure, as text.

    Modelled on: door_info(3C)
    """

    id: str
    name: str
    path: str | None
    server: Credentials
    attributes: frozenset[str]
    codec: str
    max_request: int
    max_descriptors: int
    python: tuple[int, int]
    doc: str
    signature: str


def describe(greeting: Greeting, path: str | None, server: Credentials, *, local: bool) -> DoorInfo:
    """Put together what the door and the kernel said."""
    attributes = {text for bit, text in _ATTRIBUTES.items() if greeting.attributes & bit}
    if local:
        attributes.add("local")
    return DoorInfo(
        id=greeting.id.hex(), name=greeting.name, path=path, server=server,
        attributes=frozenset(attributes), codec=greeting.codec.name.lower(),
        max_request=greeting.max_request, max_descriptors=greeting.max_descriptors,
        python=greeting.python, doc=greeting.doc, signature=greeting.signature,
    )  # fmt: skip
