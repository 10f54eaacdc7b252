"""
A door: a procedure's way in, with its names, its ports and its channels.

A *port* is the far end of a descriptor that was handed out, or of a connection to one of
the door's names.  The keeper hears the knocks there; an opened channel joins the set of
the door's gate, and from then on only server threads touch it (``doorpool._gate``).

Taking a door away
    ``revoke`` marks each channel as *doomed*, and then claims those it can.  A thread that
    lets go of a channel looks at the mark afterwards.  Whichever of the two comes second
    sees what the first has done, so one of them says the goodbye and closes.

References
    A name that we listen at, a port and a channel each are one; so is a connection that is
    not accepted yet, which its name stands for: when a name goes, whoever waits at it is
    let in first.  The kernel counts the copies of a descriptor, those in flight included,
    and tells us of the last one by the end of file at its port.  A channel stays in the
    table until its call has been answered, so a door whose procedure runs has a reference,
    also when the caller has long gone.  The channel of a caller that has died goes at once
    if it is idle, whoever holds a copy of its socket: the keeper watches his pidfd, from the moment
    on in which it first looks round for him (``doorpool._guests``).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs

from doorpool import _janitor, _names, _opening, _sockets, _wire
from doorpool._callers import Bar
from doorpool._channel import Channel, process_is_gone
from doorpool._credentials import Credentials, credentials_of, is_strange, peer_ucred, pickle_bar, unpack_ids
from doorpool._doorman import doormen
from doorpool._errors import SHORTAGE, ClosedError
from doorpool._gate import SLOW, Gate, Served
from doorpool._guests import ASKED_ABOUT, guests
from doorpool._keeper import keeper
from doorpool._log import log
from doorpool._names import Name
from doorpool._shares import ShareError, Tempo
from doorpool._sockets import MAX_DESCRIPTORS
from doorpool._wire import Attribute, Codec, Frame, Reason, Refusal

#: Connections that are accepted at one time, if so many have been waiting for a while.
_AT_ONCE = 16

#: Idle channels that make room for one opening: it takes four descriptors, each gives two back.
_ROOM = 2

#: Descriptors that a look at a knock has room for: a socket, and two in place of the sender's process.
_LOOKED_AT = 3

_REVOKED = Refusal(Reason.REVOKED, "the server has revoked this door")
_DEAD = Refusal(Reason.CLOSED, "the caller has died")


#: Knocks of one user of whom nobody knows yet whether he may come in; of strangers fewer.
_MOST_PENDING = 256

#: The same of all strangers together, who leave our own user and root their room.
_MOST_STRANGE_PENDING = 384

_Rule = Callable[[Credentials], Bar | str | None]


def _denial(bar: Bar | str | None) -> Refusal | None:
    """Make a refusal of what a rule has against somebody."""
    if bar is None:
        return None
    told, logged = (bar, bar) if isinstance(bar, str) else (bar.told, bar.logged)
    return Refusal(Reason.DENIED, f"refused by the server, which says: {told}", logged=logged)


def _too_much_asked(whose: str, value: int, limit: int) -> Refusal:
    text = f"its rule about who may call has {value} knocks{whose} to decide about, and the limit is {limit}"
    return Refusal(Reason.BUSY, text, limit=limit, value=value)


def crossing_bar(name: str, codec: Codec, to: Credentials) -> str | None:
    """
    Say why a door of one codec must not be handed to somebody where data is spoken; None if it may.

    A pickle door would be of no use to another user, who is refused when he knocks; and whoever
    speaks data so as to unpickle nothing should not be handed what he would have to.

    Args:
        name: of the door, for the message.
        codec: that the door speaks.
        to: who is to have it.
    """
    if codec is not Codec.PICKLE:
        return None
    if to.uid == os.geteuid():
        return f'the door {name!r} speaks pickle, and this one speaks data: make it with codec="data", too'
    return (
        f"the door {name!r} speaks pickle, which is spoken only within one uid; ours is {os.geteuid()}, "
        f'and it would go to uid {to.uid}: make it with codec="data"'
    )


class _Pace:
    """
    How many connections to accept at one time: one, and ever more while there are more.

    The keeper comes round to each listener once, with everything else that is ready.  On a busy machine that
    took it 30 ms, so that with one connection each time 200 clients waited for two seconds, in a queue that
    never ended.
    """

    __slots__ = ("_last", "_size")

    def __init__(self) -> None:
        self._last = -1
        self._size = 1

    def at(self, turn: int) -> int:
        """Return how many to accept in this turn of the keeper, which finds somebody waiting."""
        self._size = min(2 * self._size, _AT_ONCE) if turn == self._last + 1 else 1
        self._last = turn
        return self._size


class Door:
    """
    A door: a way to a procedure, for whoever holds a descriptor of it or may open its name.

    Args:
        gate: where the threads wait that will run its calls.
        name: what messages call it.
        cookie: anything of the server's; never shown to a client.
        codec: how values are written.  With ``Codec.PICKLE`` only processes of our own
            user may come in (``doorpool._credentials``).
        admit: who else may not: given credentials, returns why not, or None.  In the keeper's
            thread: it decides by what it has, and waits for nothing.  If it raises, nobody may.
        consult: likewise, but a user's function, which may take its time: see ``doorpool._doorman``.
        trust: "namespace" or "uid": see ``doorpool._credentials``.
        refuse_descriptors: refuse every call that brings one.
        private: the gate is this door's alone (an attribute to be shown).
        on_unref: called when the last reference goes, there having been one; again after
            each time that the door has been handed out anew.  In the keeper's thread: it
            takes note, and neither waits nor works.
        max_request, max_reply: bytes of data and buffers; may be changed at any time.
        max_descriptors: of a request; likewise.
        attributes: further bits to be shown.
        main, doc, signature, methods: go into the greeting.

    Modelled on: door_create(3C)
    """

    def __init__(
        self,
        gate: Gate,
        *,
        name: str = "door",
        cookie: Any = None,
        codec: Codec = Codec.RAW,
        admit: _Rule | None = None,
        consult: _Rule | None = None,
        trust: str = "namespace",
        refuse_descriptors: bool = False,
        private: bool = False,
        on_unref: Callable[[], object] | None = None,
        max_request: int = 2**30,
        max_reply: int = 2**30,
        max_descriptors: int = MAX_DESCRIPTORS,
        attributes: int = 0,
        main: bytes = _wire.NO_MAIN,
        doc: str = "",
        signature: str = "",
        methods: str = "",
    ) -> None:
        self.id = os.urandom(_wire.ID_SIZE)
        self.gate = gate
        self.name = name
        self.cookie = cookie
        self.codec = codec
        self.refuse_descriptors = refuse_descriptors
        self.private = private
        self.max_request = max_request
        self.max_reply = max_reply
        self.max_descriptors = max_descriptors
        self.tempo = Tempo()
        self._admit = admit
        self._consult = consult
        self._pending: Counter[int | None] = Counter()  # knocks about which the rule is being asked, by uid
        self._trust = trust
        self._on_unref = on_unref
        self._main = main
        self._doc = doc
        self._signature = signature
        self._methods = methods
        self._attributes = attributes
        self._generation = _sockets.generation
        self._keeper = keeper()
        self._names: dict[str, Name] = {}
        self._ports: set[socket.socket] = set()
        self._cookies: dict[socket.socket, int] = {}  # of the descriptors whose ports these are
        with self._keeper.lock:
            self._guests = guests()
        self._channels: set[Served] = set()
        self._revoked: Refusal | None = None
        self._taking = threading.RLock()  # a name's place is closed by the first who has taken it away
        self._gone = False
        self._greeted: tuple[_wire.Limits, bytes] | None = None
        self._handed_out = False
        self._told = False  # that there is no reference any more, since it was last handed out

    def __repr__(self) -> str:
        state = "revoked" if self.revoked else f"{len(self._channels)} channels"
        return f"<Door {self.name!r} {self.id.hex()[:8]} {state}>"

    @property
    def revoked(self) -> bool:
        """Whether the door was taken away."""
        return self._revoked is not None

    @property
    def paths(self) -> tuple[str, ...]:
        """The names it has now, in the order of listening."""
        return tuple(self._names)

    @property
    def channels(self) -> int:
        """How many channels are open."""
        return len(self._channels)

    @property
    def unreferenced(self) -> bool:
        """
        Whether it was handed out, and nobody can reach it any more.

        Modelled on: DOOR_IS_UNREF of door_info(3C)
        """
        return self._handed_out and not (self._names or self._ports or self._channels)

    def greeting(self) -> _wire.Greeting:
        """Return what the door says of itself now."""
        return _wire.Greeting(
            id=self.id, codec=self.codec, name=self.name, python=sys.version_info[:2],
            main=self._main, doc=self._doc, signature=self._signature, methods=self._methods,
            **attrs.asdict(self.limits()),
        )  # fmt: skip

    def limits(self) -> _wire.Limits:
        """Return what the door takes now."""
        attributes = self._attributes | Attribute.PRIVATE * self.private
        attributes |= Attribute.REFUSE_DESCRIPTORS * self.refuse_descriptors
        return _wire.Limits(self.max_request, self.max_descriptors, attributes)

    # -- handing out -------------------------------------------------------------------------

    def open(self) -> int:
        """
        Make a fresh descriptor of this door and return it; it is the caller's to close.

        Hand each receiver one of its own: copies of one descriptor share a fate, and any
        holder can fill it, or shut it down for all the others.

        Raises:
            ClosedError: the door was revoked.
        """
        self._check_open()
        return self._open(None, None)

    def open_for(self, uid: int | None, giver: Door | None = None) -> int:
        """
        Do as ``open`` for somebody who is to have it, unless he is strange and has too many.

        It is counted as one of his for as long as anybody holds it.

        Args:
            uid: whose; None: nobody knows.
            giver: with whose result it goes, whose server's limits hold; by default this one.

        Raises:
            ClosedError: the door was revoked.
            ShareError: he has too many.
        """
        return self._open(uid, giver or self)

    def _open(self, uid: int | None, giver: Door | None) -> int:
        holder, port = _sockets.door_pair()
        before = self._handed_out
        try:
            with self._keeper.lock:
                self._check_open()
                if giver is not None:
                    giver._check_room(uid)
                cookie = _sockets.cookie_of(holder.fileno())
                self._add_port(port, strange=giver is not None and is_strange(uid))
                self._cookies[port], _made[cookie] = cookie, self
                if giver is not None:
                    self._guests.add_port(port, uid)
        except BaseException:
            holder.close()
            with self._keeper.lock:  # a signal handler's exception may come when it is watched already
                self._close_port(port)
                if before:
                    self._lose_reference()
                else:
                    self._handed_out = False
            raise
        return holder.detach()

    def _check_room(self, uid: int | None) -> None:
        full = self._guests.why_full(uid, self.gate.limits)
        if full is None:
            return
        self._keeper.say(
            logging.WARNING, "%s: made no descriptor for uid %s: %s", self.name, uid, full,
            about="descriptors", offender=uid,  # of any door: each stream that he asks for has one of its own
        )  # fmt: skip
        self._count_refused()
        raise ShareError(full)

    def listen(
        self, path: _names.Path, *, mode: int = 0o600, group: str | int | None = None,
        replace: bool = False,
    ) -> str:  # fmt: skip
        """
        Give the door a name in the file system; return it as an absolute path.

        At no moment does the name exist with another mode, or without a door behind it.

        Args:
            path: where.
            mode: of the socket file.  Connecting takes *write* permission on Linux.
            group: whose the file becomes.
            replace: take over the name of a door of ours that still answers.

        Raises:
            ClosedError: the door was revoked.
            FileExistsError: something else has the name, and is left alone.
            OSError: as the file system says.

        Modelled on: fattach(3C)
        """
        self._check_open()
        known: list[Name] = []
        name = _names.publish(
            path, mode=mode, group=group, replace=replace, watch=lambda name: self._watch_name(name, known)
        )
        try:
            with self._keeper.lock:
                self._check_open()
                if name.path in self._names:  # replaced by ourselves
                    self._stop_listening(self._names.pop(name.path))
                self._names[name.path] = name
                known.append(name)
                self._gain_reference()
                return name.path
        except BaseException:  # revoked meanwhile, or interrupted
            with self._keeper.lock:
                if self._names.get(name.path) is name:
                    del self._names[name.path]
            self._remove(name)
            self._keeper.unwatch(name.listener.fileno())
            name.close()
            raise

    def _watch_name(self, name: Name, known: list[Name]) -> Callable[[], None]:
        """
        Be told who connects to a name, before anybody can; return how to undo that.

        Who is so quick that the name is not known to be ours yet waits for that moment.
        """
        number, pace = name.listener.fileno(), _Pace()
        with self._keeper.lock:
            try:
                self._keeper.watch(number, lambda: self._accept_some(name, pace) if known else None)
            except OSError as error:  # it is not the file system that has no room
                raise OSError(error.errno, error.strerror, name.path) from error
            self._keeper.prefer(number)
        return lambda: self._keeper.unwatch(number)

    def unlisten(self, path: str) -> bool:
        """
        Take a name away; descriptors and channels that came by it stay.

        Returns:
            True if the file was still ours and was removed.

        Raises:
            KeyError: the door has no such name.
            OSError: the directory does not let go of it; the door keeps it.

        Modelled on: fdetach(3C)
        """
        if self._generation != _sockets.here():
            return False  # it is the parent's
        with self._keeper.lock:
            name = self._names[path]
        removed = name.remove()
        with self._keeper.lock:
            if self._names.get(path) is name:  # and not one that was made as soon as it was gone
                del self._names[path]
                self._stop_listening(name)
                self._lose_reference()
        return removed

    def _stop_listening(self, name: Name) -> None:
        """Accept whoever waits at a name, then close it."""
        with contextlib.suppress(OSError):
            name.listener.shutdown(socket.SHUT_RD)  # whoever comes now is refused
        while self._accept(name) is not None:
            continue
        self._keeper.unwatch(name.listener.fileno())
        # Empty, unless descriptors have run out; then the knocks in the queue are the janitors'.
        if self._keeper.short:
            _janitor.close_later([name.listener.detach()], None)
        name.close()

    def _check_open(self) -> None:
        if self._generation != _sockets.here():
            raise ClosedError(f"{self.name} belongs to the process that this one was forked from")
        if self._revoked is not None:
            raise ClosedError(f"{self.name} was revoked")

    # -- the keeper's callbacks, under its lock ----------------------------------------------

    def _accept_some(self, name: Name, pace: _Pace) -> None:
        for _ in range(pace.at(self._keeper.turn)):
            if self._keeper.short:
                self._keeper.pause(name.listener.fileno())
                return
            port = self._accept(name)
            if port is None:
                return
            if port in self._ports:
                self._hear(port)  # who comes by a name knocks at once: one wake-up does for both

    def _accept(self, name: Name) -> socket.socket | None:
        """Accept one connection and return its port, taken in or not; None if there is none."""
        try:
            port, _ = name.listener.accept()
        except OSError as error:
            if error.errno == errno.ECONNABORTED:
                return self._accept(name)
            if error.errno != errno.EAGAIN:
                self._starve(name.listener, "accept", error)
            return None
        # step: accepted
        try:
            port.setblocking(False)
        except OSError:  # a security policy: nobody can be served, but the server can be closed
            port.close()
            return None
        self._take_in(_sockets.own(port))
        return port

    def _take_in(self, port: socket.socket) -> None:
        """Take a connection in, unless strangers have too many already."""
        try:
            uid = credentials_of(unpack_ids(peer_ucred(port)), None).uid
        except OSError:
            uid = None  # one of whom nothing is known
        full = self._guests.why_full(uid, self.gate.limits)
        if full is not None:
            self._keeper.say(
                logging.WARNING, "%s: dropped a connection of uid %s: %s", self.name, uid, full,
                about=(self.name, "room"), offender=uid,
            )  # fmt: skip
            self._count_refused()
            with contextlib.suppress(OSError):  # who has gone already
                port.send(_wire.farewell(Refusal(Reason.BUSY, full)), _sockets.DONTWAIT)
            _opening.close_port(port, uid)
            return
        self._guests.add_port(port, uid)
        try:
            self._add_port(port, strange=is_strange(uid))
        except OSError as error:
            self._keeper.say(
                logging.WARNING, "%s: dropped a connection of uid %s: %s", self.name, uid, error.strerror,
                about=(self.name, "take in"), offender=uid,
            )  # fmt: skip
            self._close_port(port)

    def _starve(self, sock: socket.socket, what: str, error: OSError) -> None:
        """Leave a listener or port alone for a while, since we are short of something."""
        self._keeper.say(
            logging.WARNING, "%s: cannot %s: %s; trying again", self.name, what, error.strerror,
            about=(self.id, what),
        )  # fmt: skip
        self._guests.look_round()  # some may have left
        if not self._keeper.starve(sock.fileno()) or error.errno not in (errno.EMFILE, errno.ENFILE):
            return
        with contextlib.suppress(OSError):  # a listener's: whoever connects is not a caller yet
            if not is_strange(_opening.whose_knock(sock)):
                self.gate.spare(_ROOM)

    def _add_port(self, port: socket.socket, *, strange: bool) -> None:
        """Take a port in: leave the greeting in its descriptor's queue and watch for knocks."""
        with self._keeper.lock:
            self._greet(port)
            # step: greeted
            self._keeper.watch(port.fileno(), lambda: self._hear(port), strange=strange)
            self._ports.add(port)
            self._gain_reference()

    def _greet(self, port: socket.socket) -> None:
        try:
            port.send(self._encoded_greeting(), _sockets.DONTWAIT)
        except ConnectionError:  # a holder that is gone already; from now on the port says so in any case
            with contextlib.suppress(OSError):
                port.shutdown(socket.SHUT_RDWR)

    def _encoded_greeting(self) -> bytes:
        """Return what ``greeting`` does, encoded; anew only when the limits have been changed."""
        limits = self.limits()
        if self._greeted is None or self._greeted[0] != limits:
            self._greeted = limits, self.greeting().encode()
        return self._greeted[1]

    def _hear(self, port: socket.socket) -> None:
        """Hear one knock, if there is one."""
        if self._keeper.short:
            self._keeper.pause(port.fileno())
            return
        try:
            if self._is_held_up(port):
                return
            knock = _opening.hear_knock(port, self._has_room)
        except BlockingIOError:
            return
        except OSError as error:
            self._starve(port, "hear a knock", error)
            return
        if knock is None:
            self._close_port(port)
            self._lose_reference()
            return
        # step: knock-heard
        try:
            decision = self._decide(knock)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in SHORTAGE:
                knock.put_back()
                self._starve(port, "open a channel", error)
                return
            self._forget_knock(port)
            knock.close()
            raise
        self._forget_knock(port)  # while we hold what it brought: see _opening
        self._carry_out(decision, knock)

    def _carry_out(
        self, decision: Channel | Refusal | None, knock: _opening.Visitor | _opening.Misfit
    ) -> None:  # fmt: skip
        """Let somebody in, or refuse him; None if that is still being decided."""
        if isinstance(decision, Refusal):
            self._say_refused(knock, decision)
            _opening.refuse(knock, decision)
        elif decision is not None and isinstance(knock, _opening.Visitor):
            self._let_in(knock, decision)

    def _forget_knock(self, port: socket.socket) -> None:
        try:
            _opening.forget_knock(port)
        except OSError:  # it would be answered again and again
            self._close_port(port)
            self._lose_reference()

    def _is_held_up(self, port: socket.socket) -> bool:
        """
        Leave the knocks of strangers alone who have sent what holds a janitor up.

        And of those who have so much open that what is only looked at has no room; while no janitor is at
        work it is closed as soon as it was looked at.
        """
        if not _janitor.at_work():
            return False
        uid = _opening.whose_knock(port)
        if not is_strange(uid):
            return False
        if uid in _janitor.stuck():
            self._keeper.say(
                logging.WARNING, SLOW, self.name, uid, about=(self.name, "stuck"), offender=uid,
            )  # fmt: skip
        elif self._guests.why_full(uid, self.gate.limits, _LOOKED_AT) is None:
            return False
        self._keeper.pause(port.fileno())
        return True

    def _has_room(self, uid: int | None) -> bool:
        """Tell whether a message that somebody has sent may bring as many descriptors as there can be."""
        return self._guests.why_full(uid, self.gate.limits, _sockets.MAX_DESCRIPTORS) is None

    def _close_port(self, port: socket.socket) -> None:
        self._ports.discard(port)
        _made.pop(self._cookies.pop(port, 0), None)
        uid = self._guests.forget_port(port)
        self._keeper.unwatch(port.fileno())
        _opening.close_port(port, uid)

    def _decide(self, knock: _opening.Visitor | _opening.Misfit) -> Channel | Refusal | None:
        """
        Answer a knock with a channel, or say why not; None if somebody is asked first.

        Raises:
            OSError: one of ``SHORTAGE``; nothing was sent.
        """
        if isinstance(knock, _opening.Misfit):
            return knock.refusal
        refusal = self._revoked or self.gate.closing or self._why_not(knock)
        if refusal is not None:
            return refusal
        return self._answer(knock) if self._consult is None else self._begin_to_ask(knock, self._consult)

    def _answer(self, knock: _opening.Visitor) -> Channel | Refusal:
        try:
            rights = not (self.refuse_descriptors and is_strange(knock.credentials.uid))
            return _opening.admit(knock, self.codec, spin=self.gate.spin, rights=rights)
        except OSError as error:
            if error.errno in SHORTAGE:
                raise
            return Refusal(Reason.BUSY, f"the server cannot answer ({error.strerror})")

    def _let_in(self, visitor: _opening.Visitor, channel: Channel) -> None:
        # step: answer-sent
        served = Served(channel, self, visitor.words)
        self._channels.add(served)
        crowd, uid = self.gate.crowd, channel.peer.uid
        if crowd is not None and is_strange(uid):
            crowd.enter(served, uid)
            served.limit = lambda: crowd.room(served, self.max_request)
        self._guests.add_channel(served)
        self._guests.keep(visitor, served)
        self.gate.add(served)
        # step: joined

    def _say_refused(self, knock: _opening.Visitor | _opening.Misfit, refusal: Refusal) -> None:
        # A stranger may have doors without end that are called the same; of our own each has its line.
        uid = None if knock.credentials is None else knock.credentials.uid
        self._keeper.say(
            logging.WARNING, "%s: refused %s: %s", self.name, knock.credentials,
            refusal.logged or refusal.text,
            about=(self.name if is_strange(uid) else self.id, refusal.reason), offender=uid,
        )  # fmt: skip

    def _why_not(self, visitor: _opening.Visitor) -> Refusal | None:
        bar: Bar | str | None = None
        if self.codec is Codec.PICKLE:
            bar = pickle_bar(visitor.credentials, visitor.letter.pidfd, trust=self._trust)
        if bar is None and self._admit is not None:
            bar = self._ask_rule(self._admit, visitor.credentials)
        return _denial(bar) or self._crowd(visitor.credentials.uid)

    def _crowd(self, uid: int | None) -> Refusal | None:
        """Say why there is no room for one more just now."""
        crowd = self.gate.crowd
        if crowd is not None and is_strange(uid) and (refusal := crowd.objection(uid)) is not None:
            self._count_refused()
            return refusal
        busy = self._guests.objection(uid, self.gate.limits)
        if busy is None:
            return None
        self._count_refused()
        return Refusal(Reason.BUSY, f"the server has no channel to spare: {busy}")

    def _count_refused(self) -> None:
        if self.gate.crowd is not None:
            self.gate.crowd.refused += 1

    def _begin_to_ask(self, visitor: _opening.Visitor, rule: _Rule) -> Refusal | None:
        """Have a doorman ask about a visitor; what comes of it is carried out by ``_end_asking``."""
        uid = visitor.credentials.uid
        if (refusal := self._why_not_ask(uid)) is not None:
            if is_strange(uid):
                self._count_refused()
            return refusal

        def ask() -> None:
            bar = self._ask_rule(rule, visitor.credentials)
            with self._keeper.lock:
                self._end_asking(visitor, _denial(bar))

        def call_doorman() -> None:
            try:
                doormen().take(ask, uid)
            except (RuntimeError, MemoryError):
                text = "the server has no thread to ask its rule about who may call"
                with self._keeper.lock:
                    self._end_asking(visitor, Refusal(Reason.BUSY, text))

        self._keeper.afterwards(call_doorman)
        self._pending[uid] += 1
        self._guests.begin_asking(uid)
        return None

    def _why_not_ask(self, uid: int | None) -> Refusal | None:
        """Say why there is no room for one more knock to be asked about."""
        most = self.gate.limits.greetings if is_strange(uid) else _MOST_PENDING
        if (his := self._pending[uid]) >= most:
            return _too_much_asked(f" of uid {uid}", his, most)
        if not is_strange(uid):
            return None
        strange = sum(count for whose, count in self._pending.items() if is_strange(whose))
        if strange >= _MOST_STRANGE_PENDING:
            return _too_much_asked(" of strangers", strange, _MOST_STRANGE_PENDING)
        full = self._guests.why_full(uid, self.gate.limits, ASKED_ABOUT)
        return None if full is None else Refusal(Reason.BUSY, full)

    def _end_asking(self, visitor: _opening.Visitor, denial: Refusal | None) -> None:
        """Carry out what the rule has said, unless the door was taken away, or this process forked."""
        if self._generation != _sockets.here():
            return
        uid = visitor.credentials.uid
        self._pending[uid] -= 1
        self._pending += Counter()  # drops those of whom there are none
        self._guests.end_asking(uid)
        decision: Channel | Refusal
        try:
            refusal = self._revoked or self.gate.closing or denial or self._crowd(uid)
            decision = refusal or self._answer(visitor)
        except OSError as error:  # the knock is not in its queue any more, to be looked at again
            decision = Refusal(Reason.BUSY, f"the server cannot answer ({error.strerror})")
        self._carry_out(decision, visitor)
        if isinstance(decision, Channel):
            self._gain_reference()

    def _ask_rule(self, rule: _Rule, who: Credentials) -> Bar | str | None:
        try:
            return rule(who)
        except BaseException as error:  # whatever it is, it lets nobody in, and ends no thread of ours
            text = "%s: the rule about who may call has failed for %s"
            self._keeper.say(logging.ERROR, text, self.name, who, about=(self.id, "rule"), error=error)
            return "its rule about who may call has failed"

    def watch_caller(self, served: Served) -> None:
        """Have the channel of a caller end when his process does, if it is open still."""
        served.watched = True  # before the look: see ``forget``
        if served in self._channels and served.channel.pidfd >= 0:
            with contextlib.suppress(OSError):  # no memory for it: a hang-up tells as well, nearly always
                self._keeper.watch(served.channel.pidfd, lambda: self._bury(served))

    def _bury(self, served: Served) -> None:
        """End the channel of a caller that has died: now, or when its call has been answered."""
        if not process_is_gone(served.channel.pidfd):
            return  # the hint was for somebody else, who had this number before
        self._keeper.unwatch(served.channel.pidfd)
        self._guests.forget_channel(served)
        # Whoever holds a copy of the socket now reads nothing, and a thread that is sending the
        # reply would wait for him.
        served.channel.shutdown()
        self.gate.end(served, _DEAD)

    # -- references, under the keeper's lock --------------------------------------------------

    def _gain_reference(self) -> None:
        self._handed_out = True
        self._told = False

    def _lose_reference(self) -> None:
        """Having lost one, tell if it was the last."""
        if self._told or self._revoked is not None or not self.unreferenced:
            return
        self._told = True
        if self._on_unref is not None:
            self._on_unref()

    def revoke_unreferenced(self) -> bool:
        """Revoke the door if it is unreferenced, at one blow; return whether it was."""
        with self._keeper.lock:
            if self._generation == _sockets.here() and self._revoked is None and self.unreferenced:
                self._revoked, self._gone = _REVOKED, True  # there is nothing left
                return True
            return False

    # -- for the gate ------------------------------------------------------------------------

    def objection(self, frame: Frame) -> Refusal | None:
        """Say why a request may not be run, in the order in which door_call(3C) looks (L12)."""
        if frame.refusal is not None and frame.refusal.reason is Reason.TOO_LARGE:
            limit, value = frame.refusal.limit, frame.refusal.value
            text = f"a request of {value} bytes is over max_request, {limit}"
            return Refusal(Reason.TOO_LARGE, text, limit=limit, value=value)
        came = len(frame.descriptors)
        if came and self.refuse_descriptors:
            text = f"the door takes no descriptors, and {came} came"
            return Refusal(Reason.REFUSES_DESCRIPTORS, text, limit=0, value=came)
        if came > self.max_descriptors:
            limit = self.max_descriptors
            text = f"{came} descriptors are over max_descriptors, {limit}"
            return Refusal(Reason.TOO_MANY_DESCRIPTORS, text, limit=limit, value=came)
        if frame.refusal is not None and frame.refusal.reason is Reason.BUSY:
            return frame.refusal
        if frame.refusal is not None:
            text = "the server had no room for the descriptors; try again later"
            return Refusal(Reason.DESCRIPTORS_LOST, text)
        return None

    def end_leaving(self, what: object) -> None:
        """Count out what a stranger has let go of, and is closed now; any thread, without a lock."""
        self._guests.end_leaving(what)

    def bring(self, served: Served, count: int) -> Refusal | None:
        """Count the descriptors that a stranger's call has brought, or say why they are too many."""
        with self._keeper.lock:
            refusal = self._guests.bring(served, count, self.gate.limits)
        served.brought = refusal is None
        return refusal

    def give_up_brought(self, served: Served, left: int = 0) -> None:
        """Count them out, but for some that are left."""
        served.brought = bool(left)
        self._guests.give_up_brought(served, left)

    def begin_passing(self, served: Served, count: int) -> Refusal | None:
        """Count descriptors that are about to be sent to a stranger, or say why they are too many."""
        return self._guests.begin_passing(served, count, self.gate.limits)

    def end_passing(self, served: Served) -> None:
        """Say that they have been sent, or will not be."""
        self._guests.unread.end(served)

    def settle(self, served: Served) -> None:
        """See what a stranger has read, who is about to be sent something else."""
        self._guests.unread.settle(served)

    def leave_unread(self, served: Served) -> None:
        """Keep what must be kept of a stranger's channel that is about to be closed."""
        self._guests.unread.leave(served)

    def forget(self, served: Served) -> None:
        """Drop a channel that is about to be closed from the door's table."""
        self._guests.forget_channel(served)
        self._channels.discard(served)
        if served.watched and served.channel.pidfd >= 0:  # in this order: nobody watches it from now on
            self._keeper.unwatch(served.channel.pidfd)
        if not (self._channels or self._ports or self._names):  # told in the keeper's own time
            self._keeper.soon(self._lose_reference)

    # -- taking away -------------------------------------------------------------------------

    def revoke(self, refusal: Refusal | None = None) -> None:
        """
        Take the door away: names, descriptors and channels.

        Running calls finish and are answered; whoever calls or opens afterwards is told
        that the door was revoked.  Idempotent; any thread; waits for no peer.  What an
        exception has cut short, such as Ctrl-C, the next call completes.

        Raises:
            PermissionError: this process did not create the door.

        Modelled on: door_revoke(3C)
        """
        if self._generation != _sockets.here():
            raise PermissionError(errno.EPERM, f"{self.name}: only the process that made it may revoke it")
        self._revoked = self._revoked or refusal or _REVOKED
        # step: revoked
        if not self._gone:
            with self._taking:
                self._take_away(self._revoked)

    def _take_away(self, refusal: Refusal) -> None:
        """Take away what leads to the door; bears to be cut short at any step, and done again."""
        with self._keeper.lock:  # whoever was making one has made it, or sees that it is revoked
            names = list(self._names.items())  # which stay there until all is done
        for _, name in names:
            self._remove(name)
        with self._keeper.lock:
            for path, name in names:
                if self._names.get(path) is name:  # ``unlisten`` was not quicker
                    self._stop_listening(name)
                    del self._names[path]
            for port in list(self._ports):
                self._say_farewell(port)
            self._guests.dismiss_all(self)
        for served in list(self._channels):
            self.gate.end(served, refusal)
        self._gone = True

    def _remove(self, name: Name) -> None:
        """Take a name away if that is possible; whoever holds its directory up does not hold us up."""
        try:
            name.remove()
        except OSError as error:
            text = "%s: the name %s stays behind, leading nowhere: %s"
            log(logging.WARNING, text, self.name, name.path, error)

    def _say_farewell(self, port: socket.socket) -> None:
        assert self._revoked is not None
        with contextlib.suppress(OSError):  # no holder is left
            port.send(_wire.farewell(self._revoked), _sockets.DONTWAIT)
        # step: farewell-said
        self._close_port(port)

    close = revoke


#: The doors of this process, by the cookies of the descriptors of them that it has made.
_made: weakref.WeakValueDictionary[int, Door] = weakref.WeakValueDictionary()

_sockets.on_fork(_made.clear)


def door_made_with(number: int) -> Door | None:
    """
    Return the door of this process of which it has made a descriptor that is open by this number.

    By the kernel's word, not the descriptor's: None of one that another process has made, or
    somebody else's connection to a name.
    """
    try:
        return _made.get(_sockets.cookie_of(number))
    except OSError:
        return None
