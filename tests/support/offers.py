"""
One of each thing that is passed to be *used* at the other side: streams, objects, methods, callbacks.

Client and server import this: each makes them for the other, and uses what the other has made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from doorpool import Endpoint, Proxy
from support import passed

ITEMS = 5


@dataclass(frozen=True)
class Offer:
    """
    A thing to be passed.

    Attributes:
        make: makes it, for a codec; what must be closed by whoever made it is put onto the stack.
        use: does with it what it is for.
        codecs: the doors that it can cross.
    """

    make: Callable[[str, contextlib.ExitStack], Any]
    use: Callable[[Any], None]
    codecs: tuple[str, ...] = ("pickle", "data")


class Till:
    """
    Has methods, and can be entered.

    Attributes:
        entered: how many times those of this process have been, less the times they were left.
    """

    entered: ClassVar[int] = 0

    def __init__(self) -> None:
        self._inside = 0

    def add(self, price: int) -> int:
        return price + 1

    def inside(self) -> int:
        return self._inside

    def __enter__(self) -> Till:
        self._inside += 1
        Till.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._inside -= 1
        Till.entered -= 1


def add(price: int) -> int:
    """Add one."""
    return price + 1


def numbers() -> Iterator[int]:
    """Some."""
    yield from range(ITEMS)


def _method(codec: str, stack: contextlib.ExitStack) -> Any:
    return stack.enter_context(Proxy(Endpoint(Till(), codec=codec))).add


def _use_all(stream: Any) -> None:
    assert list(stream) == list(range(ITEMS))


def _use_some(stream: Any) -> None:
    assert next(stream) == 0


def _use_object(till: Any) -> None:
    assert till.add(1) == 2


def _use_function(function: Any) -> None:
    assert function(1) == 2


def _enter(till: Any) -> None:
    with till as entered:  # which closes the proxy, too
        assert entered.inside() == 1


OFFERS: dict[str, Offer] = {
    "stream": Offer(lambda codec, stack: numbers(), _use_all),
    "stream, closed early": Offer(lambda codec, stack: numbers(), _use_some),
    "callback": Offer(lambda codec, stack: Endpoint(add, codec=codec), _use_function),
    "object": Offer(lambda codec, stack: Endpoint(Till(), codec=codec), _use_object),
    "method": Offer(_method, _use_function, ("pickle",)),
    "context manager": Offer(lambda codec, stack: Endpoint(Till(), codec=codec), _enter),
}


def nest(obj: Any, codec: str) -> Any:
    """Put one object into containers of every sort that the codec has."""
    return passed.nest(obj) if codec == "pickle" else {"list": [1, [obj]], "dict": {"in": {"it": obj}}}


def unnest(value: Any, codec: str) -> tuple[Any, ...]:
    """Take it out again: one object for pickle, and for data one for each place where it stood."""
    if codec == "pickle":
        return (passed.unnest(value),)
    return value["list"][1][0], value["dict"]["in"]["it"]


def use(offer: str, value: Any, codec: str) -> None:
    """Use what has arrived, and close it wherever it stands."""
    found = unnest(value, codec)
    OFFERS[offer].use(found[0])
    for each in found:
        getattr(each, "__self__", each).close()
