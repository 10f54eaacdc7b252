"""
The limits of a door: what they may be, what they do while calls run, and when they are changed.
"""

from __future__ import annotations

import os
import pickle
import select
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction

import pytest
from support import wait_until

from doorpool import CallTimeoutError, Descriptor, Endpoint, LimitError, Proxy, RevokedError
from doorpool._channel import Channel
from doorpool._handle import Handle

LIMITS = {"max_request": 2**62, "max_reply": 2**62, "max_descriptors": 253}


def echo(value: object = None) -> object:
    return value


# -- what they may be


@pytest.mark.parametrize("name", list(LIMITS))
@pytest.mark.ids("P3")
def test_a_limit_out_of_its_range_names_itself_and_the_value(name):
    with Endpoint(echo) as endpoint:
        for value in (-1, -(2**70), LIMITS[name] + 1, 2**70):
            for attempt in (
                lambda value=value: Endpoint(echo, **{name: value}),
                lambda value=value: setattr(endpoint, name, value),
            ):
                with pytest.raises(ValueError, match=rf"{name}.*{value}") as caught:
                    attempt()
                assert str(LIMITS[name]) in str(caught.value), "what would be allowed"
        before = getattr(endpoint, name)
        for value in (1.0, "1", None, True, b"1", 1j):
            with pytest.raises(TypeError, match=name) as caught:
                Endpoint(echo, **{name: value})
            assert repr(value) in str(caught.value)
            with pytest.raises(TypeError, match=name):
                setattr(endpoint, name, value)
        assert getattr(endpoint, name) == before, "a refused one changes nothing"


@pytest.mark.parametrize("name", list(LIMITS))
@pytest.mark.ids("P3", "P1")
def test_the_ends_of_the_range_are_allowed(name):
    for value in (0, LIMITS[name]):
        with Endpoint(echo, **{name: value}) as endpoint:
            assert getattr(endpoint, name) == value
            for other in (LIMITS[name], 0):
                setattr(endpoint, name, other)
                assert getattr(endpoint, name) == other


# -- replies


@pytest.mark.ids("P7")
def test_a_reply_over_its_limit_ran_and_leaves_the_channel(serve, connect):
    """The limit stands at the server: nothing of the reply is sent, and the request was within its own."""
    sizes = []

    def produce(size: int) -> bytes:
        sizes.append(size)
        return bytes(size)

    server = serve(produce, max_reply=10_000, max_request=200)
    proxy = connect()
    assert proxy(9_000) == bytes(9_000)
    channels = server.statistics().channels
    for _ in range(3):
        with pytest.raises(LimitError, match="over max_reply, 10000") as caught:
            proxy(50_000)
        error = caught.value
        assert error.may_have_run is True
        assert error.limit == 10_000
        assert error.value > 50_000
        assert str(error.value) in str(error)
        assert proxy(1) == b"\0"
    assert sizes == [9_000, *[50_000, 1] * 3], "no call was made twice"
    assert server.statistics().channels == channels


@pytest.mark.ids("P7", "P3")
def test_what_a_proxy_takes_is_a_number_in_its_range(door_dir):
    for value in (-1, 0, 4095, 2**40 + 1, 2**70):
        with pytest.raises(ValueError, match=rf"max_reply is from 4096 to {2**40}, not {value}"):
            Proxy(door_dir / "a.door", max_reply=value)
    for wrong in (4096.0, "4096", True, b"1"):
        with pytest.raises(TypeError, match="max_reply is a whole number"):
            Proxy(door_dir / "a.door", max_reply=wrong)


def produce(size: int) -> str:
    return "x" * size


def produce_memory(size: int) -> list[bytearray]:
    return [bytearray(size // 4) for _ in range(4)]


@pytest.mark.ids("P7")
@pytest.mark.parametrize("codec", ["pickle", "data"])
@pytest.mark.parametrize("most", [5000, 40_000, 1_000_000])
@pytest.mark.parametrize("procedure", [produce, produce_memory])
def test_a_proxy_takes_no_more_than_it_says(serve, connect, codec, procedure, most):
    """Whether it comes in the page, in segments or by the socket; and goes on with the next call."""
    server = serve(procedure, codec=codec)
    unbound, bound = connect(), connect(max_reply=most)

    for proxy in (bound, bound.options(timeout=20.0)):
        for _ in range(3):
            assert proxy(most // 2) == unbound(most // 2)
            with pytest.raises(LimitError, match=f"over this proxy's max_reply, {most}") as caught:
                proxy(most + 4)
            assert caught.value.may_have_run is True
            assert caught.value.limit == most < caught.value.value < 2 * most
    wait_until(lambda: server.statistics().running == 0)


@pytest.mark.ids("P7")
def test_descriptors_of_a_result_that_is_not_taken_are_closed(serve, connect):
    """Whichever way its bytes come."""
    with Descriptor(os.open(os.devnull, os.O_RDONLY)) as source:
        serve(lambda size: [source, bytearray(size)])
        proxy = connect(max_reply=5000)
        for size in (6000, 100_000, 10_000_000):
            for _ in range(3):
                with pytest.raises(LimitError, match="over this proxy's max_reply, 5000"):
                    proxy(size)
                copy, memory = proxy(1000)
                copy.close()
                assert memory == bytes(1000)


@pytest.mark.ids("P7")
def test_a_result_that_is_too_large_may_be_there_before_it_is_waited_for(serve, connect, monkeypatch):
    """A caller who has lost the CPU is told the same; such a one read it as a want of descriptors."""
    serve(lambda value: [value, value])
    proxy, wait = connect(max_reply=100_000), Handle._await_either

    def wait_late(handle: Handle, channel: Channel, deadline: float | None) -> object:
        assert select.select([channel.socket], [], [], 20)[0]
        return wait(handle, channel, deadline)

    monkeypatch.setattr(Handle, "_await_either", wait_late)
    value = list(range(70_000))  # does not fit the page, and is no memory that could be lent
    with pytest.raises(LimitError, match="over this proxy's max_reply, 100000") as caught:
        proxy(value)
    assert caught.value.may_have_run is True


@pytest.mark.ids("P7")
def test_a_proxy_takes_no_more_after_a_restart_nor_as_an_argument_of_a_process(serve, connect):
    first = serve(produce)
    proxy = connect(max_reply=5000)
    first.close()
    serve(produce)
    with pickle.loads(reduction.ForkingPickler.dumps(proxy)) as elsewhere:
        for each in (proxy, elsewhere):
            assert each(4000) == produce(4000)
            with pytest.raises(LimitError, match="over this proxy's max_reply, 5000"):
                each(6000)


# -- a door that takes nothing


@pytest.mark.ids("P8", "P4")
def test_a_door_that_takes_nothing_answers_a_ping(serve, connect):
    """A door that only tells that its server is there: no call gets in, not even one of no arguments."""
    calls = []
    server = serve(lambda *args: calls.append(args), max_request=0)
    proxy = connect()
    for _ in range(3):
        proxy.ping()
        for args in ((), (1,), (bytes(100_000),)):
            with pytest.raises(LimitError, match="over max_request, 0") as caught:
                proxy(*args)
            assert caught.value.may_have_run is False
            assert caught.value.limit == 0
    assert proxy.alive
    assert proxy.info.max_request == 0
    assert calls == []
    server.endpoints[0].max_request = 1000
    proxy(1)
    assert calls == [(1,)]


# -- changed while the door is in use


@pytest.fixture(params=["path", "descriptor"])
def proxies(request, connect):
    """How a proxy comes to its door."""

    def opened(endpoint: Endpoint, **options: object) -> Proxy:
        return connect(None if request.param == "path" else endpoint, **options)

    return opened


@pytest.mark.ids("P1", "L13")
def test_a_raised_limit_is_there_for_proxies_that_were_open_before(serve, proxies):
    """Who was told a lower limit asks again before he refuses, on the channel that he has."""
    server = serve(echo, max_request=1000)
    (endpoint,) = server.endpoints
    proxy = proxies(endpoint)
    value = bytes(5000)
    with pytest.raises(LimitError) as caught:
        proxy(value)
    assert caught.value.limit == 1000
    endpoint.max_request = 10_000
    assert proxy(value) == value
    endpoint.max_request = 100
    with pytest.raises(LimitError) as caught:
        proxy(value)
    assert (caught.value.limit, caught.value.may_have_run) == (100, False)
    endpoint.max_request = 4000
    with pytest.raises(LimitError) as caught:
        proxy(value)
    assert caught.value.limit == 4000, "the limit of now, not that of the opening"
    with pytest.raises(LimitError) as caught:
        proxy(bytes(20_000))
    assert caught.value.limit == 4000
    endpoint.max_request = 10_000
    assert proxy(value) == value
    assert proxy.info.max_request == 1000, "what was said when it was opened"
    assert server.statistics().channels == 1


@pytest.mark.ids("P1", "L12")
def test_a_door_that_was_taken_away_comes_before_its_limits(serve, connect):
    server = serve(echo, max_request=1000)
    proxy = connect(reopen=False)
    server.endpoints[0].revoke()
    with pytest.raises(RevokedError) as caught:
        proxy(bytes(5000))
    assert caught.value.may_have_run is False


@pytest.mark.ids("P1")
def test_asking_for_the_limits_takes_no_longer_than_the_call(spawn_server, door_dir, connect):
    """A server that does not answer is not waited for: what is known of its limits stands."""
    server = spawn_server(
        """
        from doorpool import Server
        server = Server()
        server.attach(abs, "a.door", max_request=1000)
        with server:
            ready()
            server.run()
        """,
        cwd=door_dir,
    )
    proxy = connect(timeout=0.2)
    server.stop()
    with pytest.raises(LimitError) as caught:
        proxy(bytes(5000))
    assert (caught.value.limit, caught.value.may_have_run) == (1000, False)
    with pytest.raises(CallTimeoutError):
        proxy(-1)
    server.cont()
    assert proxy.options(timeout=20)(-1) == 1


@pytest.mark.ids("P1")
def test_running_calls_go_by_the_limits_of_their_time(serve, connect):
    """A request that was let in runs on; its reply is held to the limit of when it is sent."""
    go, running = threading.Event(), threading.Semaphore(0)

    def procedure(value: bytes, size: int) -> bytes:
        running.release()
        assert go.wait(20)
        return bytes(size)

    (endpoint,) = serve(procedure).endpoints
    proxy = connect(timeout=30)
    with ThreadPoolExecutor(2) as threads:
        small, large = (threads.submit(proxy, bytes(5000), size) for size in (10, 5000))
        for _ in range(2):
            assert running.acquire(timeout=20)
        endpoint.max_request = 1000
        endpoint.max_reply = 1000
        go.set()
        assert small.result(20) == bytes(10)
        with pytest.raises(LimitError, match="max_reply") as caught:
            large.result(20)
        assert caught.value.may_have_run is True
        with pytest.raises(LimitError, match="max_request") as caught:
            proxy(bytes(5000), 1)
        assert caught.value.may_have_run is False
    assert proxy(b"", 1) == b"\0"


@pytest.mark.ids("P1", "P7")
def test_limits_that_change_all_the_time(serve, connect, many):
    """Each call is answered or refused by a limit that there was; no channel is lost by it."""
    server = serve(echo)
    (endpoint,) = server.endpoints
    endpoint.max_request = endpoint.max_reply = 100_000
    over = threading.Event()
    outcomes = {"through": 0, "request": 0, "reply": 0}
    together, limits = threading.Lock(), set()

    def call(_: int) -> None:
        proxy = connect(timeout=30)
        value = bytes(50_000)
        made, until = 0, time.monotonic() + 30
        # More of them where whoever changes the limits has not had a CPU yet.
        while made < many(150, 3000) or not (all(outcomes.values()) or time.monotonic() > until):
            made += 1
            try:
                assert proxy(value) == value
                outcome = "through"
            except LimitError as error:
                outcome = "reply" if error.may_have_run else "request"
                limits.add(error.limit)
            with together:
                outcomes[outcome] += 1
        assert proxy(1) == 1

    def change() -> None:
        while not over.is_set():
            for request, reply in ((1000, 100_000), (100_000, 100_000), (100_000, 1000)):
                endpoint.max_request, endpoint.max_reply = request, reply
                over.wait(0.002)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(call, range(4)))
    finally:
        over.set()
        changing.join()
    assert all(outcomes.values()), outcomes
    assert limits == {1000}
    assert sum(outcomes.values()) == 4 * many(150, 3000)
    wait_until(lambda: server.statistics().running == 0)
    assert server.statistics().channels == 4
