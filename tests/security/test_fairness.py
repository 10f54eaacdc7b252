"""
Fair between uids: how many channels one of them has, and how hard it presses, is its own affair.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from support import byhand, wait_until
from support.actors import here

from doorpool import Limits, Proxy, Server, _sockets, current_call
from doorpool._wire import Kind

PATIENCE = 20.0
A, B = 6701, 6702
WAIT = 0.004  #: Seconds that a call of what does not compute takes.

pytestmark = pytest.mark.usefixtures("root_only")


def serve(path: str, seconds: float, **options: Any) -> None:
    """Serve what does not compute, but takes its time; count whose calls it was that were answered."""
    here.calls = dict.fromkeys((A, B), 0)
    here.counting = threading.Lock()

    def pause() -> None:
        time.sleep(seconds)
        with here.counting:
            here.calls[current_call().caller.uid] += 1

    here.server = Server(**options)
    here.server.attach(pause, path, codec="data", mode=0o666)
    here.server.attach(lambda: None, f"{path}.null", codec="data", mode=0o666)
    here.server.start()


def counts() -> dict[int, int]:
    with here.counting:
        return dict(here.calls)


def press(path: str, channels: int) -> None:
    """Call without a pause on so many channels, until ``stop``."""
    here.stopping, here.proxy, here.errors = False, Proxy(path, server={0}), []

    def work() -> None:
        try:
            while not here.stopping:
                here.proxy()
        except Exception as error:
            here.errors.append(error)

    here.threads = [threading.Thread(target=work, daemon=True) for _ in range(channels)]
    for thread in here.threads:
        thread.start()


def stop() -> list[str]:
    here.stopping = True
    for thread in here.threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in here.threads)
    return [repr(error) for error in here.errors]


def queued(uid: int) -> int:
    found = here.server.statistics().users.get(uid)
    return 0 if found is None else found.queued


@pytest.mark.ids("F11t")
def test_two_uids_that_press_get_the_same_number_of_calls(actor, path, many):
    """Though one of them has eight times as many channels."""
    server, one, other = actor(0), actor(A), actor(B)
    server(serve, path, WAIT, max_threads=4)
    one(press, path, 48)
    other(press, path, 6)
    wait_until(lambda: server(queued, A) > 30 and server(queued, B) > 0, timeout=PATIENCE)
    wanted = many(150, 3000)
    first = server(counts)
    wait_until(lambda: server(counts)[A] >= first[A] + wanted, timeout=wanted * 0.2)
    last = server(counts)
    assert not one(stop)
    assert not other(stop)
    his, hers = (last[uid] - first[uid] for uid in (A, B))
    assert 1 / 1.2 < his / hers < 1.2, (his, hers)


def time_calls(path: str, count: int, pause: float = 0.0) -> list[float]:
    """Make calls one after the other; return how long each took, in order of length."""
    times = []
    with Proxy(path, server={0}, timeout=PATIENCE) as proxy:
        for _ in range(count):
            begun = time.perf_counter()
            proxy()
            times.append(time.perf_counter() - begun)
            time.sleep(pause)
    return sorted(times)


def compare(actor: Any, path: str, door: str, callers: int, count: int, **options: Any) -> tuple[str, float]:
    """Have one uid call, alone and while another presses; return words, and the ratio of the two p99."""
    server, one, other = actor(0), actor(A), actor(B)
    server(serve, path, WAIT, **options)
    other(time_calls, door, 20, 0.002)
    quiet = other.begin(time_calls, door, count, 0.002)(PATIENCE + count * WAIT * 10)
    one(press, door, callers)
    busy = other.begin(time_calls, door, count, 0.002)(PATIENCE + count * WAIT * 10)
    assert not one(stop)
    (median, busy_median), (p99, busy_p99) = (
        [times[int(len(times) * part)] * 1e3 for times in (quiet, busy)] for part in (0.5, 0.99)
    )
    words = f"p50 {median:.2f} and {busy_median:.2f} ms, p99 {p99:.2f} and {busy_p99:.2f} ms"
    return f"{callers} callers, {options}: {words}", busy_p99 / p99


@pytest.mark.ids("F11t")
@pytest.mark.parametrize("callers", [1, 64])
def test_the_p99_of_a_uid_stays_within_10x_while_another_presses(actor, path, many, callers):
    """Measured up to three times: what other programs do to it passes, and unfairness does not."""
    for attempt in range(3):
        door = f"{path}{attempt}"
        words, times = compare(actor, door, door, callers, many(300, 3000))
        print(words)
        if times <= 10:
            return
    pytest.fail(words)


@pytest.mark.ids("F11t")
def test_the_p99_of_calls_that_do_nothing_beside_64_that_press(actor, path, many):
    """
    Within 10x of what it is at a server that nobody presses, on the same CPUs at the same time.

    That takes out what the callers' own process does to them; measured up to three times, as above.
    """
    server, idle, one, other = actor(0), actor(0), actor(A), actor(B)
    server(serve, path, WAIT)
    idle(serve, f"{path}.idle", WAIT)
    one(press, f"{path}.null", 64)
    for _ in range(3):
        pressed, unpressed = (
            other.begin(time_calls, f"{door}.null", many(300, 3000), 0.002)(PATIENCE * 3)
            for door in (path, f"{path}.idle")
        )
        p99, least = (times[int(len(times) * 0.99)] * 1e3 for times in (pressed, unpressed))
        if p99 <= 10 * least:
            assert not one(stop)
            return
    pytest.fail(f"p99 {p99:.2f} ms where 64 press, {least:.2f} ms beside")


@pytest.mark.ids("F11t")
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("callers", "limits"), [(1, {}), (64, {"running": 2}), (64, {})], ids=["one", "many", "many by default"]
)
def test_the_p99_of_calls_that_do_nothing(actor, path, many, capsys, callers, limits):
    """So that all of it presses on the server's own threads, and on the CPUs."""
    if not many(0, 1):
        pytest.skip("it says nothing where other programs run: --long, on a machine of its own")
    words, times = compare(actor, path, f"{path}.null", callers, 3000, limits=Limits(**limits))
    with capsys.disabled():
        print(f"\n{words}")
    assert times <= 10, words


def hold(path: str, **options: Any) -> None:
    """Serve what does not end before ``let_go``, and what ends at once."""
    here.gate, here.calls = threading.Event(), 0

    def wait() -> None:
        here.gate.wait(3 * PATIENCE)
        here.calls += 1

    here.server = Server(**options)
    here.server.attach(wait, path, codec="data", mode=0o666)
    here.server.attach(lambda: None, f"{path}.null", codec="data", mode=0o666)
    here.server.start()


def let_go() -> None:
    here.gate.set()


def answered() -> int:
    return int(here.calls)


def serve_what_may_wait(path: str) -> None:
    """Serve what is done at once, or waits for ``let_go``."""
    here.gate, here.calls = threading.Event(), 0

    def do(waits: bool) -> None:
        if waits:
            here.gate.wait(3 * PATIENCE)
            here.calls += 1

    here.server = Server()
    here.server.attach(do, path, codec="data", mode=0o666)
    here.server.start()


def call_it(path: str, times: int) -> None:
    with Proxy(path, server={0}, timeout=PATIENCE) as proxy:
        for _ in range(times):
            proxy(False)


def have_some_wait(path: str, count: int) -> None:
    here.proxy = Proxy(path, server={0})
    here.waiting = [here.proxy.submit(True) for _ in range(count)]


def wait_for_them() -> None:
    for future in here.waiting:
        future.result(PATIENCE)
    here.proxy.close()


@pytest.mark.ids("F11t")
def test_a_call_that_waits_keeps_no_other_of_its_uid_from_a_prompt_door(actor, path):
    """Calls of a prompt door run one at a time, unless one takes its time."""
    server, one = actor(0), actor(A)
    server(serve_what_may_wait, path)
    one(call_it, path, 50)  # by which the door is known to be prompt
    one(have_some_wait, path, 8)
    one(call_it, path, 50)
    wait_until(lambda: server(running, A) == 8, timeout=PATIENCE)
    assert server(answered) == 0
    server(let_go)
    one(wait_for_them)


def serve_old_events(path: str) -> None:
    """Serve what has the gate look at a channel on which nothing has come, as an older event may have it."""

    def look(at_idle: bool) -> None:
        gate = here.server._shared_pool.gate
        if at_idle:
            gate._look_at(min(gate._served.values(), key=lambda served: served.channel.number).fd)

    here.server = Server()
    here.server.attach(look, path, codec="data", mode=0o666)
    here.server.start()


def call_beside_an_idle_one(path: str) -> float:
    """Return how long a hundred calls take; an old event comes for another channel at the first."""
    with (
        Proxy(path, server={0}, timeout=PATIENCE) as idle,
        Proxy(path, server={0}, timeout=PATIENCE) as proxy,
    ):
        idle(False)
        for _ in range(50):
            proxy(False)
        begun = time.monotonic()
        for number in range(100):
            proxy(number == 0)
        return time.monotonic() - begun


@pytest.mark.ids("F11t")
def test_an_old_event_gives_no_turn_to_a_channel_on_which_nothing_has_come(actor, path):
    """Which would keep it for as long as its caller likes."""
    server, one = actor(0), actor(A)
    server(serve_old_events, path)
    assert one(call_beside_an_idle_one, path) < PATIENCE / 4
    wait_until(lambda: server(queued, A) == server(running, A) == 0, timeout=PATIENCE)


def running(uid: int) -> int:
    found = here.server.statistics().users.get(uid)
    return 0 if found is None else found.running


@pytest.mark.parametrize("threads", [4, 64])
def test_no_call_of_a_uid_waits_for_the_threads_that_another_holds(actor, path, many, threads):
    server, one, other = actor(0), actor(A), actor(B)
    server(hold, path, max_threads=threads)
    one(press, path, 40)
    wait_until(lambda: server(queued, A) >= 40 - threads // 2, timeout=PATIENCE)
    for _ in range(many(1, 67)):
        assert len(other(time_calls, f"{path}.null", 300)) == 300
    assert server(answered) == 0, "none of the other's has ended meanwhile"
    server(let_go)
    assert not one(stop)


def hold_what_counts() -> None:
    """Hold the locks under which strangers are counted, as a thread does that a finalizer holds up."""
    held, here.stopping = threading.Event(), threading.Event()

    def hold_both() -> None:
        with here.server._shared_pool.gate._turns._lock, here.server._pools.crowd._lock:
            held.set()
            here.stopping.wait(3 * PATIENCE)

    here.holder = threading.Thread(target=hold_both)
    here.holder.start()
    held.wait()


def revoke_the_second() -> None:
    here.server.endpoints[1].revoke()


def stop_holding() -> None:
    here.stopping.set()
    here.holder.join(PATIENCE)


def open_it(path: str) -> None:
    here.proxy = Proxy(path, server={0}, open_timeout=PATIENCE / 2)


def call_here(waits: bool) -> None:
    here.proxy(waits)


def close_it() -> None:
    here.proxy.close()


def claim_one() -> None:
    """Keep the only channel from the threads, as one does that reads it."""
    here.gate = here.server._shared_pool.gate
    (here.served,) = here.gate._served.values()
    assert here.served.claim.acquire(timeout=PATIENCE)


def call_without_waiting() -> None:
    here.future = here.proxy.submit(False)


def give_it_a_turn() -> None:
    """Let it be as a channel is that has got a turn, and of which no thread has heard yet."""
    wait_until(lambda: _sockets.unread(here.served.channel.socket), timeout=PATIENCE)
    assert here.gate._turns.take(here.served, A)
    here.served.claim.release()


def look_for_some_to_spare() -> None:
    here.gate.spare(1)


def is_answered() -> bool:
    return here.future.result(PATIENCE) is None


@pytest.mark.ids("F11t", "F01")
def test_who_looks_for_channels_to_spare_waits_for_nobody_who_is_held_up(actor, path):
    """The keeper does, with its lock held, when descriptors have run out."""
    server, one = actor(0), actor(A)
    server(serve_what_may_wait, path)
    one(open_it, path)
    one(call_here, False)
    server(claim_one)
    one(call_without_waiting)
    server(give_it_a_turn)
    server(hold_what_counts)
    server(look_for_some_to_spare)
    server(stop_holding)
    assert one(is_answered)
    one(close_it)


def channels(uid: int) -> int:
    found = here.server.statistics().users.get(uid)
    return 0 if found is None else found.channels


@pytest.mark.ids("F11t")
def test_doors_open_and_close_while_a_thread_is_held_up_where_strangers_are_counted(actor, path):
    """
    A finalizer there may want the keeper's lock, so nobody who has that waits for those of the counting.
    """
    server, one, other = actor(0), actor(A), actor(B)
    server(hold, path)
    one(open_it, f"{path}.null")
    server(hold_what_counts)
    server(revoke_the_second)
    other(open_it, path)
    with Proxy(path, open_timeout=PATIENCE / 2):
        pass
    server(stop_holding)
    wait_until(lambda: server(channels, A) == 0, timeout=PATIENCE)
    assert server(channels, B) == 1
    other(close_it)
    one(close_it)
    wait_until(lambda: server(channels, B) == 0, timeout=PATIENCE)
    server(let_go)


# -- streams that are slow in the making


def serve_slow_streams(place: str) -> None:
    """Serve a few items at once, and the next when they may go on."""
    here.go_on = threading.Event()

    def items() -> Iterator[int]:
        yield from range(6)
        assert here.go_on.wait(PATIENCE)

    here.server = Server()
    here.server.attach(items, f"{place}/items.door", codec="data", mode=0o666)
    here.server.start()


def pull_and_read_nothing(place: str) -> None:
    """Ask whether the server is there, leave its answer unread, and pull."""
    here.proxy = Proxy(f"{place}/items.door", server={0})
    here.stream = here.proxy()
    assert [next(here.stream) for _ in range(3)] == [0, 1, 2], (
        "batches of one and two; in the next would be four"
    )
    handle = here.stream._proxy._line.handle
    handle.open_channel(None)
    here.channel = handle._idle.pop()
    here.channel.post(Kind.PING, 1)
    wait_until(lambda: _sockets.unread(here.channel.socket))
    here.channel.post(Kind.REQUEST, 2, msgspec.msgpack.encode([[], {}]))


def answers() -> int:
    """Read the answers that have come, and count them."""
    count = 0
    while True:
        try:
            here.channel.socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return count
        count += 1


def let_makers_go_on() -> None:
    here.go_on.set()


@pytest.mark.ids("F11", "F05")
def test_who_reads_nothing_has_nothing_sent_early_and_others_have(actor, place):
    """What there is of a batch is sent by one thread for all, which waits for nobody who may never read."""
    service, stranger = actor(None), actor(A)
    service(serve_slow_streams, str(place))
    stranger(pull_and_read_nothing, str(place))
    with Proxy(place / "items.door", timeout=PATIENCE) as proxy, proxy() as stream:
        assert [next(stream) for _ in range(6)] == list(range(6))
        assert stranger(answers) == 1, "and no batch"
        service(let_makers_go_on)
        wait_until(lambda: stranger(answers) == 1, "whoever makes it sends it", PATIENCE)


# -- what is left to be done when strangers let go of something


def serve_what_is_cleaned_up(place: str) -> None:
    """Serve streams, and objects to enter, whose ends wait until they may go on."""
    here.go_on, here.ends = threading.Event(), []

    def end() -> None:
        here.ends.append(1)
        assert here.go_on.wait(PATIENCE)

    def rows() -> Iterator[int]:
        try:
            yield from range(100_000)
        finally:
            end()

    class Entered:
        def __enter__(self) -> Entered:
            return self

        def __exit__(self, *_: object) -> None:
            end()

    here.server = Server(max_threads=8)
    here.server.attach(rows, f"{place}/rows.door", codec="data", mode=0o666)
    here.server.attach(Entered(), f"{place}/enter.door", codec="data", mode=0o666)
    here.server.attach(lambda: None, f"{place}/null.door", codec="data", mode=0o666)
    here.server.start()


def begin_and_drop(place: str, what: str, many: int) -> None:
    with Proxy(f"{place}/{what}.door", server={0}) as proxy:
        if what == "rows":
            streams = [proxy() for _ in range(many)]
            for stream in streams:
                next(stream)
            for stream in streams:
                stream._proxy.close()  # and no word that it is over
        else:
            for _ in range(many):
                proxy._line.enter(None)
            for _, lease in proxy._line.leases:
                lease.close()
            proxy._line.leases.clear()


def how_many_end() -> int:
    return len(here.ends)


def let_go_on() -> int:
    """Let them all end; return how many had begun to."""
    begun = len(here.ends)
    here.go_on.set()
    return begun


@pytest.mark.ids("F11", "F04")
@pytest.mark.parametrize("what", ["rows", "enter"])
def test_clean_up_for_a_stranger_leaves_threads_to_the_others(actor, place, what):
    service, stranger = actor(None), actor(A)
    service(serve_what_is_cleaned_up, str(place))
    stranger(begin_and_drop, str(place), what, 12)
    wait_until(lambda: service(how_many_end) >= 1, timeout=PATIENCE)
    with Proxy(place / "null.door", timeout=PATIENCE) as proxy:
        for _ in range(20):
            proxy()
    assert service(let_go_on) == 1
    wait_until(lambda: service(how_many_end) == 12, timeout=PATIENCE)


OWN, C, D = 4201, 6703, 6704


def serve_with_rules(path: str) -> None:
    """Serve a door whose rule takes long about strangers, and another whose rule says yes at once."""
    here.gate, here.asked = threading.Event(), []

    def take_long(who: Any) -> bool:
        if who.uid not in (0, OWN):
            here.asked.append(who.uid)
            here.gate.wait(3 * PATIENCE)
        return True

    here.server = Server()
    options: dict[str, Any] = {"codec": "data", "mode": 0o666}
    here.server.attach(lambda: "slow", path, callers=take_long, **options)
    here.server.attach(lambda: "prompt", f"{path}.prompt", callers=lambda who: True, **options)
    here.server.start()


def asked() -> list[int]:
    return sorted(here.asked)


def knock_often(path: str, count: int) -> None:
    """Knock, and leave the answers unread."""
    here.kept = []
    for _ in range(count):
        door = byhand.reach(path)
        here.kept += [door, byhand.knock(door)]


def open_and_call(path: str) -> Any:
    with Proxy(path, server={OWN}) as proxy:
        return proxy()


@pytest.mark.ids("F11t")
def test_strangers_about_whom_a_rule_takes_long_keep_nobody_out_of_another_door(actor, path):
    """Each has two of the threads that ask, and all strangers together six of eight."""
    server, own, root = actor(OWN), actor(OWN), actor(0)
    server(serve_with_rules, path)
    actor(A)(knock_often, path, 12)
    wait_until(lambda: len(server(asked)) >= 2, timeout=PATIENCE)
    other = actor(B)
    for one in (own, root, other):
        assert one(open_and_call, f"{path}.prompt") == "prompt"
    assert server(asked) == [A, A]
    for uid in (C, D):
        actor(uid)(knock_often, path, 12)
    wait_until(lambda: len(server(asked)) >= 6, timeout=PATIENCE)
    for one in (own, root):
        assert one(open_and_call, f"{path}.prompt") == "prompt"
        assert one(open_and_call, path) == "slow"
    assert server(asked) == [A, A, C, C, D, D]
    server(let_go)
    wait_until(lambda: server(asked) == 12 * [A] + 12 * [C] + 12 * [D], timeout=PATIENCE)
    assert other(open_and_call, f"{path}.prompt") == "prompt"
