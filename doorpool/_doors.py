"""
Doors as arguments and results: an ``Endpoint`` or a ``Proxy`` that is passed arrives as a ``Proxy``.

What is sent is a descriptor of the door, and no word about it: the greeting, which lies in its
queue, says what it is, and the kernel says the rest.

    who passes        what he passes
    an Endpoint       a fresh descriptor, made when everything else has been marshalled, so
                      that of a call that was never made nothing is handed out
    a Proxy           a copy of its own descriptor to a process of our own user; to another user a
                      fresh one that the door's server makes, for copies share a fate (S13):
                      whoever has one can shut it down for all

A proxy that was opened by path, and whose server has gone, is opened anew before it is passed: a router
that never calls its backend would hand out a dead door for ever.

Arriving opens nothing: the greeting is peeked at, which is there or this is no door, and the first
call opens the first channel (S7).  So a door whose server is dead, or does not answer, costs
nobody anything before he calls it.

Whom to believe.  A door that M has passed is believed only if M's own user serves it: else M
could have us call, as ourselves, what he may not do as himself.  ``Proxy(it, server=...)``
widens that.

Home-coming.  A door is *local* if the kernel says so: its descriptor is one that this process has made,
known by its ``SO_COOKIE``, or its answer to a knock came from this process.  What it claims
to be is never asked (S21).

Deadlines.  A call through a door that arrived is made on behalf of whoever passed it, so within a
procedure it ends when that procedure's caller gives up: the earlier one of its own time and the
caller's.  A proxy that the procedure has opened by itself keeps its own.  When the inherited one is
over, the caller is let give up first: he is to see his own time-out, and not, by a race, the one that
leaves the procedure as its exception.
"""

from __future__ import annotations

import os
import socket
import time
from functools import partial
from typing import Any

from doorpool import _data, _passing, _sockets
from doorpool._call import current
from doorpool._credentials import Credentials, is_strange
from doorpool._descriptor import Descriptor
from doorpool._door import crossing_bar, door_made_with
from doorpool._endpoint import Endpoint, answering
from doorpool._errors import (
    BrokenDoorError,
    BusyError,
    CallTimeoutError,
    ClosedError,
    MarshalError,
    NotADoorError,
)
from doorpool._handle import MAX_REPLY, Handle, deadline_after
from doorpool._info import describe
from doorpool._objects import CALL
from doorpool._passing import Departure, Recipe
from doorpool._proxy import SPOKEN, DataLine, Line, Proxy, proxy_of
from doorpool._shares import ShareError
from doorpool._wire import Attribute, Codec

#: Seconds for the first knock at a door that arrived, as for opening a path.
_OPENING = 5.0

#: Seconds for which a caller whose time is over is let give up before it is said here that it is.
_FIRST = 0.1


class _ArrivedLine(Line):
    """
    What the views share of a door that arrived: nothing is opened before it is called.

    Args:
        descriptor: taken over if this succeeds.
        passer: the uid of who passed it, the only one that is believed; None: nobody is.
        codecs: that the door may speak.
        most: bytes that one answer of it may have, if that is a stranger.
    """

    def __init__(
        self, descriptor: Descriptor, passer: int | None, codecs: tuple[Codec, ...] = SPOKEN,
        most: int = _data.MOST_OF_A_STRANGER,
    ) -> None:  # fmt: skip
        believed = frozenset[int]() if passer is None else frozenset({passer})
        self._proven = False
        super().__init__(
            descriptor, open_timeout=_OPENING, reopens=False, trust="namespace", server=believed, spin=None,
            codecs=codecs, max_reply=min(most, MAX_REPLY) if is_strange(passer) else MAX_REPLY,
        )  # fmt: skip
        self.warns = False  # nobody has opened it by himself
        if is_strange(passer):
            self.handle.stranger = passer
        self._believed = passer, self.handle.greeting.codec
        self.enters = bool(self.handle.greeting.attributes & Attribute.CONTEXT_MANAGER)

    def _become(self, speaks_data: bool) -> None:
        if speaks_data:
            self.__class__ = _ArrivedDataLine

    def _make_handle(self, door: Any, open_timeout: float | None, **options: Any) -> Handle:
        # The time is over at once: a greeting that is not there will never come.
        return super()._make_handle(door, 1e-9, lazy=True, **options)

    def _take(self, handle: Handle) -> None:
        home = door_made_with(handle.fileno())
        super()._take(handle)
        self._settle(home.cookie if home is not None else None)

    def _settle(self, home: Endpoint | None) -> None:
        """Note whether it is a door of this process, and whose threads will answer it then."""
        handle = self.handle
        self.info = describe(handle.greeting, None, handle.server, local=home is not None)
        self._pool = home._pool if home is not None else None

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Any:
        """Call the function, or the object itself."""
        return self.act((CALL, *args) if self.is_object else args, kwargs, deadline)

    def act(self, args: tuple[Any, ...], kwargs: dict[str, Any], deadline: float | None) -> Any:
        """Make one call, having knocked if this is the first; see "Deadlines" above."""
        invocation = current.get(None)
        inherited = None if invocation is None else invocation.deadline
        if inherited is None or (deadline is not None and deadline <= inherited):
            self._prepare(deadline)
            return self.transact(args, kwargs, deadline)
        try:
            self._prepare(inherited)
            return self.transact(args, kwargs, inherited)
        except CallTimeoutError:
            assert invocation is not None
            invocation.wait_cancelled(_FIRST)
            raise

    def ping(self, deadline: float | None) -> None:
        """Have the server answer, having knocked before if nobody has."""
        self._prepare(deadline)
        super().ping(deadline)

    def _prepare(self, deadline: float | None) -> None:
        """Open the first channel, if this is the first call."""
        if self._proven:
            return
        if self.closed:
            raise ClosedError(f"{self.handle.name}: this proxy is closed")
        until = time.monotonic() + _OPENING
        self.handle.open_channel(until if deadline is None else min(deadline, until))
        if self._pool is None and self.handle.is_local:
            # The answer was this process's own, so the greeting is, too.
            self._settle(self._find_home())
        else:
            self.info = describe(
                self.handle.greeting, None, self.handle.server, local="local" in self.info.attributes
            )
        self._proven = True


class _ArrivedDataLine(_ArrivedLine, DataLine):
    """Likewise, of a door on which data is spoken."""


# -- out ------------------------------------------------------------------------------------------


def check_crossing(door: Endpoint | Proxy, to: Credentials) -> None:
    """
    Raise unless a door may go over a channel on which data is spoken.

    Raises:
        MarshalError: it speaks pickle, and whoever has it could not, or should not, call it.
    """
    codec = Codec[door.info.codec.upper()]
    if (bar := crossing_bar(door.info.name, codec, to)) is not None:
        raise MarshalError(bar)


def depart(door: Endpoint | Proxy, uid: int | None, departure: Departure) -> None:
    """
    Have the descriptor of a door that is to be passed go along with a message.

    Args:
        uid: whose process will have it; None: nobody knows.
        departure: of the message.

    Raises:
        ClosedError: the door, or the proxy, is closed.
    """
    if isinstance(door, Endpoint):
        door._ready_door()  # an error shall come now, where it is known which argument it is about
        departure.give_later(partial(door._open_for, uid, answering.endpoint))
    elif door.fileno() < 0:
        raise ClosedError(f"{door!r} is closed")
    elif uid == os.geteuid():
        departure.give_later(partial(_copy, door))
    else:
        departure.give_later(partial(_relay, door, uid, answering.endpoint), door._line.handle.server.uid)


def _copy(proxy: Proxy) -> Descriptor:
    proxy._line.renew(deadline_after(_OPENING))
    number = proxy.fileno()
    if number < 0:
        raise ClosedError(f"{proxy!r} is closed")
    return Descriptor(os.dup(number))


def _relay(proxy: Proxy, uid: int | None, giver: Endpoint | None) -> Descriptor:
    """Get a descriptor for somebody: in a result (of ``giver``) as his, otherwise as our own."""
    if giver is None or not is_strange(uid):
        return fresh(proxy, os.geteuid())
    try:
        return fresh(proxy, uid)
    except BusyError as error:  # whose server has logged it, and said why
        raise ShareError(str(error)) from None


def fresh(proxy: Proxy, uid: int | None) -> Descriptor:
    """
    Have the server of a door make a descriptor of it that shares its fate with no other.

    Args:
        uid: whose it will be; None: nobody knows.

    Raises:
        DoorError: it did not.
    """
    line = proxy._line
    deadline = deadline_after(_OPENING if proxy._timeout is None else proxy._timeout)
    line.renew(deadline)
    return Descriptor(line.handle.ask_descriptor(deadline, uid))


def _reduce(door: Any, departure: Departure) -> Recipe:
    depart(door, os.geteuid(), departure)  # nobody else's process speaks pickle with us
    return _rebuild, ()


# -- in -------------------------------------------------------------------------------------------


def arrive(
    descriptor: Descriptor, passer: int | None, *, codecs: tuple[Codec, ...] = SPOKEN,
    most: int = _data.MOST_OF_A_STRANGER,
) -> Proxy:  # fmt: skip
    """
    Make a proxy of a door that has arrived, opening nothing; the descriptor is taken over.

    Args:
        passer: the uid of who passed it, the only one that is believed.
        codecs: that it may speak.
        most: bytes that one answer of it may have, if that is a stranger.

    Raises:
        NotADoorError: it is none, or of another codec.
    """
    if _sockets.domain_of(descriptor.fileno()) != socket.AF_UNIX:  # more is not asked of a stranger's
        raise NotADoorError("what was passed as a door is no local socket")
    try:
        line = _ArrivedLine(descriptor, passer, codecs, most)
    except (CallTimeoutError, BrokenDoorError) as error:
        raise NotADoorError(f"what was passed as a door is none: {error}") from None
    return proxy_of(line)


def _rebuild(descriptor: Descriptor) -> Proxy:
    return arrive(descriptor, os.geteuid())


_passing.register(Endpoint, _reduce, movable=False)
_passing.register(Proxy, _reduce)


# -- where data is spoken -------------------------------------------------------------------------


def _reduce_data(door: Any, luggage: _data.Luggage) -> None:
    check_crossing(door, luggage.to)
    depart(door, luggage.to.uid, luggage)


def _rebuild_data(descriptor: Descriptor, passer: int | None, most: int) -> Proxy:
    return arrive(
        descriptor, passer, codecs=(Codec.DATA,), most=most
    )  # whatever its sender should have refused (S17)


_data.register(Endpoint, 2, _reduce_data, _rebuild_data)
_data.register(Proxy, 3, _reduce_data, _rebuild_data)
