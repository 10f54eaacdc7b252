"""
Ways to spoil a message: all of them in order, for what is sent over sockets, or any number at random.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from hypothesis import strategies as st

#: Numbers at which programs go wrong.
EDGES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def flips(message: bytes) -> Iterator[bytes]:
    """Flip each bit in turn."""
    for place in range(len(message)):
        for bit in range(8):
            yield with_byte(message, place, message[place] ^ (1 << bit))


def values(message: bytes, places: range) -> Iterator[bytes]:
    """Give each of some bytes every value but its own."""
    for place in places:
        for value in range(256):
            if value != message[place]:
                yield with_byte(message, place, value)


def with_byte(message: bytes, place: int, value: int) -> bytes:
    return message[:place] + bytes([value]) + message[place + 1 :]


def _number(value: int, size: int) -> bytes:
    return struct.pack("<Q", value)[:size]


@st.composite
def spoilt(draw: st.DrawFn, *messages: bytes) -> bytes:
    """Spoil one of some messages in up to six ways, one after the other."""
    message = draw(st.sampled_from(messages))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(message)))
        end = draw(st.integers(start, min(len(message), start + 16)))
        part = draw(
            st.binary(max_size=8)
            | st.builds(_number, st.sampled_from(EDGES), st.sampled_from((1, 2, 4, 8)))
            | st.just(message[start:end] * 2)
        )
        behind = draw(st.sampled_from((end, start, start + len(part))))
        message = message[:start] + part + message[behind:]
    return message
