"""
Streams: an iterator as an argument or a result arrives as one that pulls its items through a door.

    sender      a ``Pump`` has the iterator, behind an anonymous door of its own.  Each call of it
                takes a batch of items
    receiver    a ``Stream`` gives out the items of the batch it has, and calls when that is empty

What is a stream, decided by the type:

    generators; ``map``, ``filter``, ``zip``, ``enumerate``, ``reversed``,
    ``iter(function, end)``, all of ``itertools``                               streams
    objects of any other class with ``__iter__`` and ``__next__``               streams
    those of a class that says itself how it is pickled, or of an ``io`` class  as that says
    iterators over a list, a dict and the like, which has all the items anyway  values
    files, sockets and what else crosses as itself                              as themselves

Reading ahead.  A batch ends with whatever comes first: as many items again as the stream has sent so far (so
the first is sent alone, and the second with the third), ``_ITEMS`` items, ``_BYTES`` bytes, or ``_TIME``
seconds.  The iterator is at most one batch ahead of the receiver, and nothing runs between two calls.

    But where one full batch of small items comes after the other, the thread that has sent the third makes
    the next one at once, so that with two CPUs both sides work at the same time: the iterator is two batches
    ahead then, and as ever no further than the receiver has come.

    An iterator may block in the middle of a batch, as one does that follows a log.  What there is of the
    batch must not wait for it.  So a thread looks after the batches that are being made:
      1. The server thread is stuck in the iterator; the items so far are in a list that both know.
      2. After ``_TICK`` the watcher takes them out, and answers the call with them.  That sets the
         channel free for the next call.
      3. The next call finds the iterator at work, and for nobody.  It joins: what is made from now on is its
         answer, and its thread goes back to the pool.
      4. The iterator goes on.  The server thread finds its own call answered, and answers the one that has
         joined, or leaves what it has made for the next one.
    A lock decides between 2 and the server thread's own answer.  A batch that is made at once is nobody's
    from its beginning, so that calls join it likewise.

    A file, or what else crosses as itself, ends a batch, for ``with open(...) as file: yield file`` closes
    it when it goes on.

    Bytes are those of the last batch for as many items as this one is to have, and within
    the batch, what ``sys.getsizeof`` says of each: one item that is huge ends it.

Errors come in order: what was made before is sent, and the next call raises.  A batch that cannot
be marshalled is sent item by item, up to the one that cannot cross, whose error ends the stream.

The end.  The pump lets go of the iterator, which is what closes a generator that nobody else has:

    the iterator has come to its end, or has raised     in that call
    ``Stream.close()``                                  in a call of its own: ``close`` of the iterator
    the stream is collected, or its process is gone     when the door is unreferenced
    the door's server closes                            then

An iterator that is passed twice has one pump: each item goes to one of those who pull.  It
must be so for a call that is made once more through a reopened door, too, since that is marshalled twice.
"""

from __future__ import annotations

import io
import itertools
import logging
import operator
import os
import sys
import threading
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache, partial
from typing import Any

import attrs
import msgspec

from doorpool import _data, _passing, _proxy, _sockets
from doorpool._call import current
from doorpool._channel import PACKET
from doorpool._credentials import is_strange
from doorpool._descriptor import Descriptor
from doorpool._doors import arrive
from doorpool._endpoint import (
    Endpoint,
    Marshalled,
    answering,
    interrupt_of,
    leave_forked_child,
    marshal_error,
    peer_of,
)
from doorpool._errors import (
    BrokenDoorError,
    BusyError,
    CallTimeoutError,
    ClosedError,
    LimitError,
    MarshalError,
    ProtocolError,
    RevokedError,
)
from doorpool._handle import check_seconds, deadline_after
from doorpool._impl import shuttle
from doorpool._keys import Steps
from doorpool._log import log
from doorpool._marshal import pack_refusal, pack_result
from doorpool._passing import Departure, Kind, Recipe
from doorpool._proxy import Proxy
from doorpool._shares import ShareError
from doorpool._wire import Codec, Reason
from doorpool.door import Invocation

__all__ = ["Stream"]

#: Of a batch: items, bytes, seconds.  With two CPUs each side sleeps while the other works, and to wake both
#: takes as long as some hundreds of small items: with 1024 in a batch that was a quarter of all the time.
#: And a receiver that stops has wasted no more than this, twice.
_ITEMS = 8192
_BYTES = 256 * 1024
_TIME = 0.002

#: After this many items in one batch it is looked at the time and the bytes at every eighth only: that
#: takes as long as the making of two.
_MANY = 256
_FEW = 8

#: Batches that a thread makes ahead before it goes back to its pool, which may want it for something else.
_ROUNDS = 16

#: Seconds after which what there is of a batch is sent, and between two looks; how many looks at nothing
#: the thread that looks stays for.
_TICK = 0.02
_IDLE = 10

#: Seconds for which a caller whose time is over is let give up before he is told why it was too short.
_FIRST = 0.1

#: Descriptors in a batch, of the 253 that a message may have.
_DESCRIPTORS = 64

#: Bytes that a pull may have, which says next to nothing.
_REQUEST = 4096

#: Seconds that ``Stream.close`` waits for the other side's ``finally``.
_CLOSING = 5.0

#: Types whose objects ``take_items`` has weighed.
_WEIGHED = frozenset((str, bytes, int, float, bool, types.NoneType))

#: What a pump says when its iterator has come to its end, in a dict, since a batch is a list.
_LAST, _VALUE = "items", "returned"


# -- the side that has the iterator ---------------------------------------------------------------


class _StreamEndpoint(Endpoint):
    """The door of a pump, which ends with it."""

    target: Any

    def _retire(self, refusal: Any) -> Callable[[], None]:
        super()._retire(refusal)
        pump: Pump = self.target.__self__
        pump._gone = pump._closing = True  # one that is at work comes to its end
        return self._let_target_go

    def _let_target_go(self) -> None:
        pump: Pump = self.target.__self__
        pump._gone = True
        pump.end()
        pump.endpoint = None  # or the two hold one another


@attrs.define(eq=False)
class _Making:
    """
    A batch that is being made.

    Attributes:
        items: it, up to now.
        maker: the call whose thread makes it.
        asker: the call that it is to answer; None: nobody has asked yet.
        unfit: its first item could not be marshalled.
    """

    items: list[Any]
    maker: Invocation
    asker: Invocation | None = None
    unfit: bool = False


class Pump:
    """
    An iterator whose items are fetched through a door; any thread, one at a time.

    Args:
        iterator: the iterator.
        codec: of the door.
    """

    __slots__ = (
        "__weakref__", "_closing", "_codec", "_error", "_full", "_gone", "_held", "_interrupt", "_iterator",
        "_joined", "_left", "_limit", "_lock", "_making", "_making_batch", "_returned", "_rounds", "_sent",
        "_settling", "_slow", "_spent", "_waiting", "endpoint", "item", "listener",
    )  # fmt: skip

    def __init__(self, iterator: Iterator[Any], codec: str) -> None:
        self._iterator: Iterator[Any] | None = iterator
        self._codec = codec
        self._lock = threading.Lock()  # held while the iterator runs
        self._making = threading.RLock()  # held while the door is made
        self._limit = 1  # items of the next batch
        self._sent = 0  # items, up to now
        self._making_batch: _Making | None = None
        self._settling = threading.Lock()  # held by who decides what becomes of that
        self._left: list[Any] = []  # items that were made behind an answer
        self._slow = False  # they took all the time there is
        self._full = False  # the last batch was as large as can be, and many small items
        self._joined: Invocation | None = None  # whose answer what is left is to be
        self._gone = False  # the door is closed
        self._waiting = 0  # calls, for their turn with the iterator
        self._rounds = 0  # batches that this turn has made ahead
        self._held: deque[Any] = deque()  # items that could not be sent together
        self._spent = False  # the iterator has come to its end, by itself or not
        self._error: BaseException | None = None  # by this, which is still to be told
        self._interrupt: BaseException | None = None  # of which this call's thread is to hear, too
        self._returned: Any = None
        self._closing = False
        self.endpoint: Endpoint | None = None
        self.item: Any = Any  # what has been promised of each, where data is spoken
        self.listener: Any = None

    def has(self, iterator: Iterator[Any]) -> bool:
        """Whether it is this one's."""
        return self._iterator is iterator

    def hand_out(self, origin: Endpoint | None, uid: int | None) -> Descriptor:
        """
        Return a fresh descriptor of the door.

        Args:
            origin: the endpoint with whose result it goes, whose server is to run it; None: the
                process's default server.
            uid: who gets that result.

        Raises:
            ClosedError: the door, or that server, has been closed.
            ShareError: he has too many.
        """
        with self._making:
            endpoint = self.endpoint
            if endpoint is None:
                return self._make_door(origin, uid)
            return endpoint._open_for(uid, origin)

    def _make_door(self, origin: Endpoint | None, uid: int | None) -> Descriptor:
        name = getattr(self._iterator, "__qualname__", None) or type(self._iterator).__qualname__
        self.listener = getattr(answering.invocation, "listener", None)
        endpoint = _StreamEndpoint(
            self.pull, name=str(name), codec=self._codec, max_request=_REQUEST, refuse_descriptors=True
        )
        if origin is not None and origin.server is not None:
            origin.server._adopt(endpoint)
        self.endpoint = endpoint
        try:
            return endpoint._open_for(uid, origin)
        except BaseException:
            endpoint.close()
            raise

    def pull(self, close: bool = False) -> Marshalled | None:
        """Answer a call of the door: with a batch; or close the iterator."""
        invocation = current.get()
        if self.listener is not None:
            invocation.listener = self.listener
        if close:
            self._closing = True
        if not self._lock.acquire(blocking=False):
            if not close and self._join(invocation):
                return Marshalled(None)
            if not self._wait_for_turn(invocation):
                invocation.wait_cancelled(_FIRST)
                busy = BusyError("another pull of this stream is still running", may_have_run=False)
                return self._refusal(busy, invocation)
        try:
            if close:
                self._close()
                return None
            sent = self._answer_all(invocation)
            sent.interrupt = self._interrupt
            return sent
        finally:
            self._interrupt = None
            joined, self._joined = self._joined, None
            self._lock.release()
            if joined is not None:  # a signal's exception came in between
                joined.fail(text="the pull before has failed", may_have_run=True)

    def _wait_for_turn(self, invocation: Invocation) -> bool:
        left = -1.0 if invocation.deadline is None else max(0.0, invocation.deadline - time.monotonic())
        with self._settling:
            self._waiting += 1
        try:
            return self._lock.acquire(timeout=left)
        finally:
            with self._settling:
                self._waiting -= 1

    def _join(self, invocation: Invocation) -> bool:
        """Leave a call to the thread that has the iterator, if it is at work for nobody."""
        with self._settling:
            if self._making_batch is None or self._making_batch.asker is not None:
                return False
            self._making_batch.asker = invocation
            return True

    def end(self) -> None:
        """Let go of the iterator."""
        self._closing = self._spent = True
        self._iterator = self._returned = self._error = self.listener = None
        self._held.clear()
        self._left = []

    def _close(self) -> None:
        iterator = self._iterator
        self.end()
        close = getattr(iterator, "close", None)
        if callable(close):
            close()

    def _answer_all(self, invocation: Invocation) -> Marshalled:
        """Answer a call, and those that join while the iterator is at work for nobody."""
        self._rounds = 0
        sent = self._answer_and_go_on(invocation)
        while self._joined is not None:
            joined, self._joined = self._joined, None
            endpoint = self.endpoint
            if endpoint is None:
                self._say_gone(joined)
            elif joined.cancelled:
                joined.fail(text="nobody waits for it")  # and the items are for who asks next
            else:
                endpoint._answer_late(joined, partial(self._answer_and_go_on, joined))
        return sent

    def _answer_and_go_on(self, invocation: Invocation) -> Marshalled:
        """Answer a call; make the next batch, too, if that pays."""
        try:
            sent = self._answer(invocation)
            if sent.parcel is not None and self._pays(sent, invocation):
                self._go_on(sent, invocation)
            return sent
        finally:
            invocation.line.goes_on = False

    def _answer(self, invocation: Invocation) -> Marshalled:
        if self._gone:
            return self._say_gone(invocation)
        if not self._held and (self._left or not self._spent):
            items, late = (self._left, self._slow) if self._left else self._take(invocation)
            self._left = []
            if invocation.answered:  # by the watcher; what was made since then is for the next call
                self._left, self._slow = items, True
                return Marshalled(None)
            if not items and self._gone:
                return self._say_gone(invocation)
            if items or self._error is None:
                try:
                    return self._send(items, invocation, late=late)
                except BaseException as error:  # an item's own code may do anything while it is pickled
                    self._interrupt = self._interrupt or interrupt_of(error)
                    if not items or (len(items) == 1 and not self._spent):
                        self.end()
                        return self._refusal(error, invocation)
            self._held.extend(items)
        if self._held:
            self._limit = 1
            return self._send_one(invocation)
        raised = self._error
        if raised is not None:
            self.end()
            endpoint: Endpoint = invocation.door.cookie
            return Marshalled(endpoint._marshal_failure(invocation, raised), returned=False)
        try:
            return self._send([], invocation)
        except BaseException as unfit:  # what the generator has returned
            self._interrupt = self._interrupt or interrupt_of(unfit)
            self.end()
            return self._refusal(unfit, invocation)

    def _refusal(self, error: BaseException, invocation: Invocation) -> Marshalled:
        """Marshal that something cannot be sent, or say so at once."""
        if isinstance(error, ShareError):
            invocation.fail(Reason.BUSY, f"an item of the stream cannot be sent: {error}")
            return Marshalled(None)
        refusal = marshal_error("an item of the stream", error, may_have_run=True)
        if isinstance(error, MarshalError):
            text = str(error).removeprefix("result").removeprefix("[0]")
            refusal = MarshalError(f"an item of the stream{text}", may_have_run=True)
        if self._codec == "data":
            return Marshalled(_data.pack_refusal(refusal))
        return Marshalled(pack_refusal(refusal, peer_of(invocation)))

    @staticmethod
    def _say_gone(invocation: Invocation) -> Marshalled:
        invocation.fail(Reason.REVOKED, "the stream was let go of over there", may_have_run=True)
        return Marshalled(None)

    def _pays(self, sent: Marshalled, invocation: Invocation) -> bool:
        """Tell whether to make the next batch while the receiver goes through this one."""
        return (
            self._full
            and self._rounds < _ROUNDS
            and not self._waiting
            and not (self._spent or self._closing or sent.parcel[2])
            and invocation.may_part
            and not is_strange(invocation.credentials.uid)  # whose threads are counted by their calls
        )

    def _go_on(self, sent: Marshalled, invocation: Invocation) -> None:
        """Send a batch, and make the next one."""
        self._rounds += 1
        parcel, sent.parcel = sent.parcel, None
        items: list[Any] = []
        self._left, self._slow = items, False
        self._making_batch = _Making(items, invocation)  # whoever is answered may ask again at once
        try:
            try:
                invocation.reply(*parcel)
            finally:
                _data.release(parcel)
                del parcel
            invocation.part()
            self._slow = self._make(items)
        finally:
            self._end_batch(None)

    def _take(self, invocation: Invocation) -> tuple[list[Any], bool]:
        """Take a batch from the iterator; return it, and whether that has taken all the time there is."""
        items: list[Any] = []
        self._making_batch = _Making(items, invocation, invocation)
        try:
            return items, self._make(items)
        finally:
            self._end_batch(invocation)

    def _end_batch(self, asker: Invocation | None) -> None:
        """Let nobody join any more; who has joined, and did not ask for this batch, is answered next."""
        with self._settling:
            making, self._making_batch = self._making_batch, None
        if making is not None and making.asker is not asker:
            self._joined = making.asker

    def _make(self, items: list[Any]) -> bool:
        iterator = self._iterator
        if iterator is None:  # let go of this very moment
            return False
        generation = _sockets.here()
        _watcher.watch(self)
        try:
            return self._fill(items, iterator)
        except StopIteration as stop:
            self._spent, self._returned, self._iterator = True, stop.value, None
        except BaseException as error:
            self._spent, self._iterator, self._error = True, None, error
            self._interrupt = interrupt_of(error)  # here and now; the error is told by whoever answers then
        finally:
            if generation != _sockets.here():  # before a lock is wanted that the watcher may have had
                leave_forked_child(self._error)
            _watcher.forget(self)
        return False

    def send_early(self) -> None:
        """Answer with what there is of a batch whose next item is long in coming; for the watcher."""
        with self._settling:
            making = self._making_batch
            if making is None or making.unfit or making.asker is None or not making.items:
                return
            invocation = making.asker
            count, parcel = self._pack_first(making.items[:], invocation)
            if not count:
                making.unfit = True
                return  # whoever makes the batch will come to the same, and tell
            if not _goes_at_once(parcel, invocation):
                making.unfit = True
                _data.release(parcel)
                return  # whoever makes the batch waits for him
            making.asker = None
            del making.items[:count]
            self._limit = 1
            try:
                invocation.reply(*parcel)
                if invocation is making.maker:
                    invocation.part()
            except Exception as error:
                log(logging.ERROR, "a batch of a stream could not be sent", error=error)
                invocation.fail(text=f"the server failed to answer: {error}", may_have_run=True)
            finally:
                _data.release(parcel)

    def _pack_first(self, items: list[Any], invocation: Invocation) -> tuple[int, Any]:
        """Marshal as many of the first items as can cross; return how many these are, and what they make."""
        good, unfit, count = 0, len(items) + 1, len(items)
        parcel: Any = None
        while good < count:
            try:
                packed = self._pack(items[:count], invocation)
            except BaseException:  # an item's own code may do anything
                unfit = count
            else:
                if parcel is not None:
                    _data.release(parcel)
                good, parcel = count, packed
            count = (good + unfit) // 2
        return good, parcel

    def _fill(self, items: list[Any], iterator: Iterator[Any]) -> bool:
        until, left, count = time.monotonic() + _TIME, _BYTES, self._limit
        stride = _FEW if count >= _MANY else 1
        while count > 0:
            taken, left = shuttle.take_items(items, iterator, count, stride, left, until)
            count -= taken
            item = items[-1] if items else None  # what the watcher has sent was light enough
            if type(item) in _passing.table:
                return False
            if type(item) not in _WEIGHED:
                left -= sys.getsizeof(item, 0) * stride
            if time.monotonic() > until:
                return True
            if left < 0 or self._closing:
                return False
        return False

    def _send_one(self, invocation: Invocation) -> Marshalled:
        """Send the first of the items that could not be sent together."""
        item = self._held.popleft()
        try:
            return Marshalled(self._pack([item], invocation))
        except BaseException as error:
            self._interrupt = self._interrupt or interrupt_of(error)
            self.end()
            return self._refusal(error, invocation)

    def _send(self, items: list[Any], invocation: Invocation, *, late: bool = False) -> Marshalled:
        """
        Marshal a batch, with the end behind it if that is so, and set the size of the next one.

        Raises:
            Exception: it cannot cross; nothing is changed.
        """
        ended = self._spent and self._error is None and not self._gone
        self._full = False
        parcel = self._pack({_LAST: items, _VALUE: self._returned} if ended else items, invocation)
        if ended:
            self.end()
        elif items:
            size, count = _bytes_of(parcel), len(items)
            self._sent += count
            limit = min(_ITEMS, count if late else 2 * self._limit, _BYTES * count // size)
            if parcel[2]:
                limit = min(limit, _DESCRIPTORS * count // len(parcel[2]))
            self._limit = max(1, limit)
            self._full = not late and self._limit <= count <= self._sent // 3 and count >= _MANY
        return Marshalled(parcel)

    def _pack(self, value: Any, invocation: Invocation) -> Any:
        answering.endpoint = self.endpoint
        try:
            if self._codec == "data":
                plan = _plan(self.item, type(value) is dict)
                parcel: Any = plan.pack_result(value, invocation.credentials)
            else:
                data = shuttle.pack_items(value) if type(value) is list else None
                parcel = pack_result(value, peer_of(invocation)) if data is None else (data, (), ())
        finally:
            answering.endpoint = None
        size, most = _bytes_of(parcel), invocation.door.max_reply
        if size > most or len(parcel[2]) > 253:
            _data.release(parcel)
            raise LimitError(
                f"a batch of the stream is {size} bytes and {len(parcel[2])} descriptors, and {most} bytes "
                "and 253 descriptors may cross at a time", limit=most, value=size, may_have_run=True,
            )  # fmt: skip
        return parcel


def _goes_at_once(parcel: Any, invocation: Invocation) -> bool:
    """
    Tell whether the watcher, who sends for all, need not wait for somebody who may never read.

    Our own user and root are trusted to; a stranger who has read all gets what his socket certainly takes.
    """
    if not is_strange(invocation.credentials.uid):
        return True
    unread = _sockets.unsent(invocation.line.channel.socket)
    return not unread and not parcel[2] and _bytes_of(parcel) <= PACKET // 2


class _Watcher:
    """
    A thread that looks after the batches that are being made, as long as there are any.

    It sends what there is of one whose next item is long in coming: in place of the server thread that is
    stuck in the iterator, and which finds its call answered then.
    """

    def __init__(self) -> None:
        self._since: dict[Pump, float] = {}
        self._lock = threading.Lock()
        self._runs = False

    def watch(self, pump: Pump) -> None:
        """Look after a pump from now on."""
        self._since[pump] = time.monotonic()
        if self._runs:
            return
        try:
            with self._lock:
                if not self._runs:
                    threading.Thread(target=self._run, name="doorpool-streams", daemon=True).start()
                    self._runs = True
        except BaseException:
            self.forget(pump)
            raise

    def forget(self, pump: Pump) -> None:
        """Look after it no longer."""
        self._since.pop(pump, None)

    def _run(self) -> None:
        gone = False
        try:
            while not gone:
                for _ in range(_IDLE):
                    time.sleep(_TICK)
                    if self._since:
                        self._look_after()
                        break
                else:
                    gone = self._may_go()
        finally:
            if not gone:  # for want of memory, say: the next to be looked after has another thread come
                self._runs = False

    def _look_after(self) -> None:
        for pump, since in list(self._since.items()):
            if time.monotonic() - since > _TICK:
                try:
                    pump.send_early()
                except BaseException as error:
                    self.forget(pump)
                    text = "what there is of a batch of a stream could not be sent early"
                    log(logging.ERROR, text, error=error)

    def _may_go(self) -> bool:
        """Say that it is gone, unless somebody has come meanwhile, who took it to be there."""
        with self._lock:
            self._runs = False
            self._runs = bool(self._since)
            return not self._runs


_watcher = _Watcher()


#: How batches are written where data is spoken: as they are.
@lru_cache(256)
def _plan(item: Any, ended: bool) -> _data.Plan:
    """Return how a batch is marshalled as data, whose items have been promised to be something."""

    def batch() -> Any: ...

    if item is not Any:
        items: Any = list[item]
        last = msgspec.defstruct("Last", [(_LAST, items), (_VALUE, Any)])
        batch.__annotations__["return"] = last if ended else items
    return _data.Plan(batch)


def _bytes_of(parcel: Any) -> int:
    beside: int = sum(buffer.nbytes for buffer in parcel[1])
    return len(parcel[0]) + beside


#: The pumps of this process, by the ids of their iterators, which they keep alive; and the codec.
_pumps: weakref.WeakValueDictionary[tuple[int, str], Pump] = weakref.WeakValueDictionary()
_pumps_lock = threading.RLock()  # a signal handler may marshal


def _hand_out(
    known: Pump, iterator: Iterator[Any], codec: str, origin: Endpoint | None, uid: int | None
) -> Descriptor:  # fmt: skip
    try:
        return known.hand_out(origin, uid)
    except ClosedError:  # nobody had it any more, a moment ago
        another = _pump_of(iterator, codec, instead_of=known)
        another.item = known.item
        return another.hand_out(origin, uid)


def _pump_of(iterator: Iterator[Any], codec: str, *, instead_of: Pump | None = None) -> Pump:
    key = id(iterator), codec
    with _pumps_lock:
        pump = _pumps.get(key)
        if pump is None or pump is instead_of or not pump.has(iterator):
            pump = _pumps[key] = Pump(iterator, codec)
        return pump


def _forget_parent() -> None:
    global _pumps_lock, _crossing, _watcher
    _watcher = _Watcher()
    _pumps_lock, _crossing = threading.RLock(), threading.RLock()
    _pumps.clear()


_sockets.on_fork(_forget_parent)


# -- the side that pulls --------------------------------------------------------------------------


class Stream:
    """
    Iterate over what another process makes; arrives where a generator or an iterator was passed.

    Each item is pulled when it is wanted, with a batch of those behind it: never more than have
    been taken so far, 8192 items, 256 KiB or 2 ms, and where the iterator is fast, another such batch is
    made meanwhile.  Any number of threads may take items; each gets other ones.  A forked child sees what
    was read ahead once more, and pulls from the same iterator.

    What ``return`` gives in a generator is the value of ``yield from``.  What is raised over there
    is raised here, behind all items before it.  Either ends the stream, and so does an error of a
    pull: ``BrokenDoorError`` when the other process is gone, ``CallTimeoutError``.

    Its end reaches the iterator: ``close`` waits for it (and for the ``finally`` of a generator);
    a stream that is collected or whose process dies lets go of it, soon.

    Raises:
        DoorError: of ``next``: the other side could not be asked.
    """

    __slots__ = ("__weakref__", "_batch", "_closed", "_count", "_ended", "_generation", "_item", "_lock",
                 "_proxy", "_pulled", "_timeout", "_value", "_wrong")  # fmt: skip

    def __init__(self, proxy: Proxy) -> None:
        self._timeout: float | None = None
        self._proxy = proxy
        self._batch: Iterator[Any] = iter([])  # what was read ahead; of a list, which knows its length
        self._ended = False  # nothing more will come
        self._closed = False  # nor is anything given out of what has
        self._pulled = False
        self._item: Any = Any  # what each must be; for who is given the stream to say
        self._count = 0  # of those that were
        self._wrong: MarshalError | None = None  # that the next one is not, still to be raised
        self._value: Any = None  # what the generator has returned
        self._lock = threading.RLock()  # a signal handler may take an item, or close
        self._generation = _sockets.generation

    @property
    def timeout(self) -> float | None:
        """
        Seconds for each pull; None for none.

        At first that of the proxy that returned the stream, if the stream was the result itself, and not
        inside it.

        Raises:
            TypeError, ValueError: what is set is no number of seconds above 0, and not None.
        """
        return self._timeout

    @timeout.setter
    def timeout(self, value: float | None) -> None:
        self._timeout = check_seconds(value, "timeout")

    def __iter__(self) -> Generator[Any, None, Any]:
        """
        Return what goes through the items; itself would do, and take three times as long for each.

        It has nothing of its own: to drop it leaves the stream as it is.
        """
        while True:
            yield from self._batch
            try:
                item = self._pull()
            except StopIteration as stop:
                return stop.value
            yield item

    def __next__(self) -> Any:
        for item in self._batch:
            return item
        return self._pull()

    def _pull(self) -> Any:
        with self._lock_here():
            while True:
                for item in self._batch:  # another thread may have pulled meanwhile
                    return item
                if self._wrong is not None and not self._closed:
                    wrong, self._wrong = self._wrong, None
                    raise wrong
                if self._ended:
                    value, self._value = self._value, None
                    raise StopIteration(value)
                self._fetch()

    def _fetch(self) -> None:
        """Have the next batch sent."""
        try:
            self._pulled = True
            came = self._call()
            if self._closed:  # by another thread, meanwhile
                return
            if type(came) is dict and came.keys() == {_LAST, _VALUE}:
                self._value, came = came[_VALUE], came[_LAST]
                self._end()
            if type(came) is not list:
                raise ProtocolError(f"{self!r}: what arrived is no batch of items", may_have_run=True)
            if not came and not self._ended:  # or who sends nothing for ever would keep us asking for ever
                raise ProtocolError(f"{self!r}: a batch of nothing arrived", may_have_run=True)
            self._put(came if self._item is Any else self._convert(came))
        except BaseException as error:
            if self._ended and isinstance(error, ClosedError):
                return  # a signal handler's pull has come to the end, and this one has asked for nothing
            self._value = None
            self._end()  # whatever was on its way is lost
            raise

    def _put(self, came: list[Any]) -> None:
        """
        Have a batch given out, and then what a signal handler has left of one that it has pulled meanwhile.

        A handler, or another thread, comes in where something is called only, and so not between the last
        look at what there is and the new one's taking its place.
        """
        while True:
            rest = self._batch
            batch = itertools.chain(came, rest) if operator.length_hint(rest, 1) else iter(came)
            if self._closed:
                return
            if self._batch is rest:
                self._batch = batch
                return

    def _convert(self, items: list[Any]) -> list[Any]:
        """Make of items what they must be; up to the first that is something else, with which all ends."""
        try:
            good = _data.convert_items(items, self._item)
        except Exception:
            good = self._convert_singly(items)
        self._count += len(good)
        return good

    def _convert_singly(self, items: list[Any]) -> list[Any]:
        good: list[Any] = []
        steps = Steps()
        try:
            for item in items:
                name = f"item {self._count + len(good)} of {self!r}"
                good.append(_data.convert_item(name, item, self._item, steps))
        except MarshalError as error:
            self._wrong, self._value = error, None
            self._end()
        return good

    def _call(self, *args: Any) -> Any:
        return self._proxy._line.call(args, {}, deadline_after(self._timeout))

    def _end(self) -> None:
        self._ended = True
        self._proxy.close()

    def _lock_here(self) -> threading.RLock:
        if self._generation != _sockets.here():
            with _crossing:
                if self._generation != _sockets.generation:
                    self._lock = threading.RLock()  # the parent's threads are not here
                    self._generation = _sockets.generation
        return self._lock

    def close(self) -> None:
        """
        End it, on the other side too; idempotent.

        Waits until the iterator is closed there, but no more than 5 s (or ``timeout``, if that is less), and
        not while another thread is pulling.  What was read ahead is dropped.

        Raises:
            Exception: what the generator's ``finally`` raises; a ``RemoteError`` if that cannot cross as
                itself.  (That the other side is gone is no error, nor that it takes longer or answers
                nonsense.)
        """
        lock = self._lock_here()
        idle = lock.acquire(blocking=False)
        try:
            ended, self._ended, self._closed = self._ended, True, True
            deque(self._batch, maxlen=0)  # a loop may have it, too
            self._wrong = self._value = None
            if idle and self._pulled and not ended:
                self._close_there()
        finally:
            self._proxy.close()
            if idle:
                lock.release()

    def _close_there(self) -> None:
        seconds = _CLOSING if self._timeout is None else min(self._timeout, _CLOSING)
        try:
            self._proxy._line.call((True,), {}, deadline_after(seconds))
        except (ClosedError, RevokedError, BrokenDoorError, CallTimeoutError, BusyError, ProtocolError):
            pass  # it is gone, is no door's, or takes longer: that nobody has it any more will be seen there

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Stream of {self._proxy.info.name!r}{', ended' if self._ended else ''}>"


_crossing = threading.RLock()  # what is collected meanwhile may cross as well


# -- which iterators, and how they cross ----------------------------------------------------------

#: Iterators of the interpreter that are more than a container's.
_LAZY: tuple[type, ...] = (
    types.GeneratorType, map, filter, zip, enumerate, reversed, type(iter(int, 1)),
    *(kind for kind in vars(itertools).values() if isinstance(kind, type)),
    next(itertools.groupby([0]))[1].__class__, itertools.tee(())[0].__class__,
)  # fmt: skip

_SAYS_HOW = ("__reduce__", "__reduce_ex__", "__getstate__")


def is_iterator(kind: type) -> bool:
    """Tell whether objects of a type are sent as streams, if they are not registered otherwise."""
    if not hasattr(kind, "__iter__") or issubclass(kind, io.IOBase):
        return False
    return not any(
        name in vars(base) for base in kind.__mro__ if base is not object for name in _SAYS_HOW
    )  # fmt: skip


def _reduce(iterator: Iterator[Any], departure: Departure) -> Recipe:
    pump = _pump_of(iterator, "pickle")
    departure.give_later(partial(_hand_out, pump, iterator, "pickle", answering.endpoint, os.geteuid()))
    return _rebuild, ()


def _rebuild(descriptor: Descriptor) -> Stream:
    return Stream(arrive(descriptor, os.geteuid()))


for _kind in _LAZY:
    _passing.register(_kind, _reduce, movable=False)
_passing.iterator = Kind(_reduce, movable=False)
_passing.is_iterator = is_iterator
_proxy.timed.add(Stream)


# -- where data is spoken -------------------------------------------------------------------------


def _reduce_data(iterator: Iterator[Any], luggage: _data.Luggage) -> None:
    pump = _pump_of(iterator, "data")
    luggage.give_later(partial(_hand_out, pump, iterator, "data", answering.endpoint, luggage.to.uid))


def _rebuild_data(descriptor: Descriptor, passer: int | None, most: int) -> Stream:
    return Stream(arrive(descriptor, passer, codecs=(Codec.DATA,), most=most))


_data.register(Stream, 4, _reduce_data, _rebuild_data)


def _promise(iterator: Any, item: Any) -> None:
    """Check what comes of a stream, or what is sent of an iterator that is marshalled just now."""
    if isinstance(iterator, Stream):
        iterator._item = item
    else:
        _pump_of(iterator, "data").item = item


_data.register_iterators(Stream, _LAZY, is_iterator, _promise)
