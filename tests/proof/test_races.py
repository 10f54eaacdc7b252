"""
At most once, proved by races: callers give up at every moment of a call.

The server is a process of its own and keeps a journal of what it runs; see ``support.journal``.  Each
round is one call whose caller gives up at a moment near one of two edges, that between "not taken
yet" and "taken", and that between "still running" and "answered", and then one more call on the same
door, which must be right.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import select
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import wait_until
from support.journal import (
    DID_NOT_RUN,
    INTERRUPTED,
    MAY_HAVE_RUN,
    RESULT,
    Books,
    Edge,
    Journal,
    read_by_a_fine_clock,
)
from support.rawdoor import PATIENCE, Background

from doorpool import (
    CallTimeoutError,
    DoorError,
    Proxy,
    RevokedError,
    _handle,
)
from doorpool._channel import Channel
from doorpool._marshal import own_dialect, pack_arguments, unpack_outcome
from doorpool._wire import Codec, Knock
from doorpool.door import Handle

BALLAST = bytes(400_000)  # more than a socket takes at once, so that a request can be cut in two

SERVER = """
    import sys
    from support.journal import serve
    serve(sys.argv[1], threads=int(sys.argv[2]), busy=sys.argv[3] == "busy", ready=ready)
"""

# Takes the CPU from a server for a moment, again and again, or one that waits for calls would have
# taken each of them before its caller can think better of it.
SCHEDULER = """
    import os, random, signal, sys, time

    def end(*_):
        os.kill(server, signal.SIGCONT)
        os._exit(0)

    server = int(sys.argv[1])
    signal.signal(signal.SIGTERM, end)
    ready()
    while True:
        os.kill(server, signal.SIGSTOP)
        time.sleep(random.uniform(0, 0.0003))
        os.kill(server, signal.SIGCONT)
        time.sleep(random.uniform(0, 0.001))
"""


@pytest.fixture
def journaled(spawn_server, door_dir):
    """Start a server with a journal; return it and the books."""
    with contextlib.ExitStack() as stack:

        def start(threads=8, busy=False):
            server = spawn_server(SERVER, door_dir, threads, "busy" if busy else "idle")
            return server, Books(stack.enter_context(Journal(door_dir / "journal")))

        yield start


class ByProxy:
    """Call like a function."""

    def __init__(self, path):
        self._proxy = Proxy(path)

    def __call__(self, *args, timeout=PATIENCE):
        return self._proxy.options(timeout=timeout)(*args)

    def close(self):
        self._proxy.close()


class ByHandle:
    """Make the same calls with the raw layer alone."""

    def __init__(self, path):
        own = own_dialect()
        self._handle = Handle(path, codec=Codec.PICKLE, words=Knock(own.python, own.main))

    def __call__(self, *args, timeout=PATIENCE):
        data, buffers, _ = pack_arguments(args, {}, own_dialect())
        with self._handle.call(data, buffers, timeout=timeout) as reply:
            return unpack_outcome(reply.data, reply.buffers)

    def close(self):
        self._handle.close()


def by_timeout(call, number, seconds, work, ballast):
    """Give up by a timeout; return what the caller is told."""
    try:
        assert call(number, work, ballast, timeout=seconds) == number
    except CallTimeoutError as error:
        return MAY_HAVE_RUN if error.may_have_run else DID_NOT_RUN
    return RESULT


class AlarmClock:
    """Sends one Ctrl-C, a while after it was set."""

    def __init__(self):
        self._rang = True

    def set(self, seconds):
        self._rang = False
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def ring(self, *_):
        """Be the handler of the signal."""
        self._rang = True
        raise KeyboardInterrupt

    def wait(self):
        """
        Let it ring, here at the latest.

        Stopping it would not do: the interpreter may run a handler long after the signal came, which
        would then interrupt a call that nobody gives up.
        """
        wait_until(lambda: self._rang, "the alarm clock rings")


def by_interrupt(clock):
    """Return how to give up by Ctrl-C, which the clock sends at that moment."""

    def give_up(call, number, seconds, work, ballast):
        told = INTERRUPTED
        with contextlib.suppress(KeyboardInterrupt):
            clock.set(seconds)
            assert call(number, work, ballast) == number
            told = RESULT
            clock.wait()
        return told

    return give_up


@pytest.fixture
def ctrl_c(monkeypatch):
    """Have an alarm clock do what Ctrl-C does, and return it."""

    def unraisable(lost):
        # One that comes up in a finalizer has no effect; it is not what is under test.
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            default(lost)

    default = sys.unraisablehook
    monkeypatch.setattr(sys, "unraisablehook", unraisable)
    clock = AlarmClock()
    before = signal.signal(signal.SIGALRM, clock.ring)
    yield clock
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


class Racer:
    """
    Rounds of one caller.

    Args:
        call: makes a call.
        give_up: makes one and gives up at some moment.
        books: what happens goes in there.
    """

    def __init__(self, call, give_up, books):
        self._call = call
        self._give_up = give_up
        self._books = books
        # Small and large requests have edges of their own: when they are taken, when answered.
        self._edges = {ballast: (Edge(0.0001), Edge(0.0005)) for ballast in (b"", BALLAST)}

    def round(self):
        books, ballast = self._books, random.choice((b"", b"", BALLAST))
        taken, answered = self._edges[ballast]
        edge = random.choice((taken, answered))
        number = books.next_number()
        told = self._give_up(self._call, number, edge.draw(), random.uniform(0, 0.0003), ballast)
        books.enter(number, told)
        self.call_on()
        edge.learn(told != RESULT and (edge is answered or not books.ran(number)))

    def call_on(self):
        """Make the next call, which must be right, and compare."""
        number = self._books.next_number()
        assert self._call(number) == number
        self._books.enter(number, RESULT)
        self._books.compare()


def race(rounds, one_round, books, *outcomes, enough=lambda: True):
    """
    Make so many rounds, and up to twice as many more while an outcome is too rare to mean something.
    """
    least = rounds // 25
    for done in range(3 * rounds):
        if done >= rounds and all(books.count(outcome) >= least for outcome in outcomes) and enough():
            return
        one_round()


def finish(server, books, least, *outcomes):
    """End the server, when it has run all that it ever will; balance the books; see that it was a race."""
    assert server.terminate(timeout=PATIENCE) == 0, server.stderr
    kinds = books.balance()
    print(kinds)
    assert all(books.count(outcome) >= least for outcome in outcomes), kinds
    return kinds


@pytest.fixture
def asked(monkeypatch):
    """Count how often a caller who gave up a call had to ask, kernel or page, and what it was told."""
    answers = collections.Counter()
    is_untaken = _handle._is_untaken

    def ask(channel):
        answer = is_untaken(channel)
        answers[answer] += 1
        return answer

    monkeypatch.setattr(_handle, "_is_untaken", ask)
    return answers


KINDS = {
    "a proxy's": (ByProxy, {}),
    "a proxy's, one busy thread": (ByProxy, {"threads": 1, "busy": True}),
    "a handle's": (ByHandle, {}),
    "a handle's, one busy thread": (ByHandle, {"threads": 1, "busy": True}),
}


@pytest.mark.ids("E02", "X4", "X6", "X7", "X8", "L9")
@pytest.mark.parametrize("kind", KINDS)
def test_giving_up_by_timeout(journaled, spawn_server, door_dir, many, monkeypatch, asked, kind):
    face, options = KINDS[kind]
    server, books = journaled(**options)
    monkeypatch.setattr(Channel, "read", read_by_a_fine_clock())
    rounds = many(1_600, 20_000)
    outcomes = RESULT, DID_NOT_RUN, MAY_HAVE_RUN

    def often_asked():
        return min(asked[True], asked[False]) >= rounds // 50

    scheduler = spawn_server(SCHEDULER, server.pid)
    with contextlib.closing(face(door_dir / "note.door")) as call:
        race(rounds, Racer(call, by_timeout, books).round, books, *outcomes, enough=often_asked)
    assert scheduler.terminate(timeout=PATIENCE) == 0, scheduler.stderr
    finish(server, books, rounds // 25, *outcomes)
    assert often_asked(), asked


@pytest.mark.ids("E02", "X4", "X6", "X7", "X8", "X19")
@pytest.mark.parametrize("kind", KINDS)
def test_giving_up_by_interrupt(journaled, door_dir, many, ctrl_c, kind):
    """Nobody is told anything, but nothing runs twice, and the next call is right."""
    face, options = KINDS[kind]
    server, books = journaled(**options)
    rounds = many(600, 20_000)
    with contextlib.closing(face(door_dir / "note.door")) as call:
        race(rounds, Racer(call, by_interrupt(ctrl_c), books).round, books, RESULT, INTERRUPTED)
    kinds = finish(server, books, rounds // 25, RESULT, INTERRUPTED)
    assert min(kinds[INTERRUPTED, 0], kinds[INTERRUPTED, 1]) >= rounds // 50, kinds


@pytest.mark.ids("E02", "X6", "X7", "X8", "L9")
def test_giving_up_by_many_threads(journaled, door_dir, many):
    """By the milliseconds of ``poll``, at which several of them give up at once."""
    server, books = journaled(threads=3)
    rounds, callers = many(1_300, 20_000), 8
    outcomes = RESULT, DID_NOT_RUN, MAY_HAVE_RUN

    def one_round():
        number, ballast = books.next_number(), random.choice((b"", BALLAST))
        work = random.uniform(0, 0.008)
        books.enter(number, by_timeout(call, number, random.uniform(0.0005, 0.012), work, ballast))
        racer.call_on()

    with contextlib.closing(ByProxy(door_dir / "note.door")) as call, ThreadPoolExecutor(callers) as threads:
        racer = Racer(call, by_timeout, books)
        share = [rounds // callers] * callers
        list(threads.map(lambda part: race(part, one_round, books, *outcomes), share))
    finish(server, books, rounds // 25, *outcomes)


# -- servers that stand still, and late replies


def seconds_of_a_tick(seconds):
    """Measure how long the kernel takes for a wait that is to end after so many seconds."""
    began = time.monotonic()
    assert not select.poll().poll(seconds * 1000)
    return time.monotonic() - began


@pytest.mark.ids("E06", "E07", "X8", "X18", "L9")
def test_a_server_that_stands_still(journaled, door_dir, many):
    """It is stopped at any moment of a call, and whatever it says later is no answer to the next one."""
    server, books = journaled(threads=2)
    rounds, allowed = many(30, 1_000), 0.02
    plain, late = [], []

    def stop_after(seconds):
        # Awake all the while: who sleeps is woken at a tick, and too late for this.
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            continue
        server.signal(signal.SIGSTOP)

    def one_round():
        number = books.next_number()
        stopper = Background(stop_after, edge.draw())
        began = time.monotonic()
        told = by_timeout(call, number, allowed, random.uniform(0, 0.0003), b"")
        seconds = time.monotonic() - began
        stopper.result()
        books.enter(number, told)
        if told != RESULT:
            late.append(seconds)
            plain.append(seconds_of_a_tick(allowed))
        server.cont()
        racer.call_on()
        edge.learn(told == DID_NOT_RUN or (told == MAY_HAVE_RUN and random.random() < 0.5))

    edge = Edge(0.0005)
    with contextlib.closing(ByProxy(door_dir / "note.door")) as call:
        racer = Racer(call, by_timeout, books)
        race(rounds, one_round, books, DID_NOT_RUN, MAY_HAVE_RUN)
    finish(server, books, rounds // 25, DID_NOT_RUN, MAY_HAVE_RUN)
    assert min(late) >= allowed
    assert statistics.median(late) < 3 * statistics.median(plain)
    assert max(late) < 20 * max(plain)


# -- doors that are taken away


@pytest.mark.ids("E02", "X10")
def test_a_door_that_is_revoked_at_any_moment(journaled, door_dir, many):
    """Who calls it has a result, or is told that the call did not run; nothing is left in doubt."""
    server, books = journaled()
    callers, errors = 3, collections.Counter()

    def call_until_the_end(proxy):
        while True:
            number = books.next_number()
            try:
                assert proxy(number, random.choice((b"", b"", BALLAST))) == number
            except DoorError as error:
                books.enter(number, MAY_HAVE_RUN if error.may_have_run else DID_NOT_RUN)
                errors[type(error)] += 1
                return
            books.enter(number, RESULT)

    with Proxy(door_dir / "offer.door", timeout=PATIENCE) as offer, ThreadPoolExecutor(callers) as threads:
        for _ in range(many(300, 10_000)):
            offer()
            with Proxy(door_dir / "short.door", reopen=False, timeout=PATIENCE) as proxy:
                calls = [threads.submit(call_until_the_end, proxy) for _ in range(callers)]
                offer(random.uniform(0, 0.001))
                for call in calls:
                    call.result(PATIENCE)
            books.compare()
    kinds = finish(server, books, 300, RESULT, DID_NOT_RUN)
    assert kinds.keys() == {(RESULT, 1), (DID_NOT_RUN, 0)}, kinds
    assert errors.keys() == {RevokedError}, errors


# -- what the procedure sees


@pytest.mark.ids("E02", "X1", "X5")
def test_a_procedure_sees_at_once_that_its_caller_has_given_up(journaled, door_dir, many):
    server, books = journaled(threads=16)
    gave_up, trips = {}, []

    def one_round(_):
        number, seconds = books.next_number(), random.uniform(0.005, 0.02)
        began = time.monotonic()
        with pytest.raises(CallTimeoutError) as caught:
            watch.options(timeout=seconds)(number)
        gave_up[number] = began + seconds, time.monotonic(), seconds
        books.enter(number, MAY_HAVE_RUN if caught.value.may_have_run else DID_NOT_RUN)
        began, number = time.monotonic(), books.next_number()
        assert note(number) == number
        books.enter(number, RESULT)
        trips.append(time.monotonic() - began)

    with (
        Proxy(door_dir / "watch.door") as watch, Proxy(door_dir / "seen.door") as seen,
        Proxy(door_dir / "note.door", timeout=PATIENCE) as note, ThreadPoolExecutor(8) as threads,
    ):  # fmt: skip
        list(threads.map(one_round, range(many(300, 10_000))))
        wait_until(lambda: seen("watching") == 0, timeout=PATIENCE)
        sights = seen("sights")
    kinds = finish(server, books, 100, RESULT, MAY_HAVE_RUN)
    assert len(sights) == kinds[MAY_HAVE_RUN, 1]
    lags = []
    for number, (began, deadline, saw, uid) in sights.items():
        due, told, seconds = gave_up[number]
        assert due - 1e-6 <= deadline <= began + seconds + 1e-6
        assert saw >= due, "cancelled while the caller waited"
        assert uid == os.getuid(), "whose call it was can be read afterwards too"
        lags.append(saw - told)
    assert statistics.median(lags) < 20 * statistics.median(trips)
    assert max(lags) < 1.0
