"""
The manifest: the line in a message that says which of its buffers lie in segments, and where.

It also says what has become of segments of earlier messages.  All numbers are little-endian:

     0  1  version                         16  4  released: the other side's, free for it to use
     1  3  0                               20  4  dropped: the other side's, never to be used again
     4  4  buffers, in and outside         24     a buffer in a segment: 4 its place among all buffers,
     8  4  of them in segments                    4 segment, 8 offset, 8 length; places ascend
    12  2  new segments                           a new segment: 4 number, 8 size; descriptors in order
    14  2  retired: the sender's, gone            a retired, released, dropped one: 4 number
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from doorpool._errors import ProtocolError

_HEADER = struct.Struct("<B3xIIHHII")
_PLACE = struct.Struct("<IIQQ")
_NEW = struct.Struct("<IQ")
VERSION = 1

Place = tuple[int, int, int, int]  # the buffer's place, segment, offset, length


class Manifest(NamedTuple):  # which takes 0.4 µs to make, and an attrs class 1.6
    """What a manifest says; not checked against anything but its own length."""

    buffers: int = 0
    places: Sequence[Place] = ()
    new: Sequence[tuple[int, int]] = ()
    retired: Sequence[int] = ()
    released: Sequence[int] = ()
    dropped: Sequence[int] = ()

    def encode(self) -> bytes:
        buffers, places, new, retired, released, dropped = self
        counts = len(places), len(new), len(retired), len(released), len(dropped)
        parts = [_HEADER.pack(VERSION, buffers, *counts)]
        parts += [_PLACE.pack(*place) for place in places]
        parts += [_NEW.pack(*each) for each in new]
        numbers = [*retired, *released, *dropped]
        if numbers:
            parts.append(struct.pack(f"<{len(numbers)}I", *numbers))
        return b"".join(parts)


def decode(data: bytes | bytearray | memoryview) -> Manifest:
    """
    Read a manifest.

    Raises:
        ProtocolError: it is none.
    """
    if len(data) < _HEADER.size:
        raise ProtocolError(f"a manifest of {len(data)} bytes")
    version, buffers, places, new, retired, released, dropped = _HEADER.unpack_from(data)
    if version != VERSION or any(data[1:4]):
        raise ProtocolError(f"a manifest begins with {bytes(data[:4])!r}")
    at_new = _HEADER.size + places * _PLACE.size
    at_numbers = at_new + new * _NEW.size
    count = retired + released + dropped
    if len(data) != at_numbers + 4 * count:
        raise ProtocolError(f"a manifest of {len(data)} bytes, not {at_numbers + 4 * count}")
    numbers = struct.unpack_from(f"<{count}I", data, at_numbers) if count else ()
    return Manifest(
        buffers,
        list(_PLACE.iter_unpack(data[_HEADER.size : at_new])),
        list(_NEW.iter_unpack(data[at_new:at_numbers])) if new else (),
        numbers[:retired],
        numbers[retired : retired + released],
        numbers[retired + released :],
    )


def check(condition: bool, what: str, *args: object) -> None:
    if not condition:
        raise ProtocolError("the other side's manifest: " + what % args)


def taken_off(descriptors: list[int], count: int) -> list[int]:
    """Take the last ones off a list."""
    at = len(descriptors) - count
    check(at >= 0, "%d segments without a descriptor", -at)
    taken = descriptors[at:]
    del descriptors[at:]
    return taken


def check_each_once(numbers: Sequence[int]) -> None:
    if numbers:
        check(len(set(numbers)) == len(numbers), "a segment is named twice")
