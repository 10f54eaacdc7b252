"""
Objects through doors: methods, sessions, and ``with``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import gc
import inspect
import os
import pickle
import pydoc
import queue
import sys
import threading
from multiprocessing import reduction
from typing import Any

import pytest
from support import wait_until

from doorpool import (
    BrokenDoorError,
    CallTimeoutError,
    DoorError,
    Endpoint,
    LimitError,
    MarshalError,
    NotADoorError,
    ProtocolError,
    Proxy,
    RemoteError,
    RevokedError,
    current_call,
)
from doorpool import _proxy as proxies

PATIENCE = 20.0


class Bank:
    """Keeps money."""

    rate = 3

    def __init__(self) -> None:
        self.total = 0

    def deposit(self, amount: int, *, note: str = "none") -> int:
        """Put money in."""
        self.total += amount
        return self.total

    def close(self) -> str:
        """Close the account, not the door."""
        return "account closed"

    def fail(self) -> None:
        """Raise."""
        raise LookupError("no such account")

    def block(self, seconds: float) -> None:
        """Take a while."""
        threading.Event().wait(seconds)

    def caller(self) -> int | None:
        """Say who asks."""
        return current_call().caller.pid

    @property
    def balance(self) -> int:
        """A plain attribute."""
        return self.total

    def _audit(self) -> None: ...


@pytest.fixture
def bank(serve, connect) -> Proxy:
    """A proxy of the door of a bank."""
    serve(Bank())
    return connect()


# -- methods


def test_methods_are_called(bank):
    assert bank.deposit(10) == 10
    assert bank.deposit(5, note="cash") == 15
    assert bank.deposit(amount=1) == 16
    assert bank.caller() == os.getpid()


def test_a_method_whose_name_the_proxy_has_for_itself(bank):
    assert bank.method("close")() == "account closed"
    assert not bank.closed
    assert bank.method("deposit")(1) == 1
    bank.close()
    assert bank.closed


@pytest.mark.parametrize(
    "name", ["balance", "total", "rate", "_audit", "nothing", "__len__", "__enter_", "__array__"]
)
def test_all_else_is_an_attribute_error_without_a_call(bank, serve, monkeypatch, name):
    monkeypatch.setattr(proxies.Line, "call", lambda *_: pytest.fail("a call was made"))
    with pytest.raises(AttributeError, match=name) as caught:
        getattr(bank, name)
    assert caught.value.name == name
    assert not hasattr(bank, name)


@pytest.mark.parametrize("name", ["_audit", "__class__", "__init__", "balance"])
def test_a_caller_that_asks_all_the_same_is_refused_by_the_server(bank, name):
    with pytest.raises(AttributeError, match="'Bank' object has no method"):
        bank._line.call_method(name, (), {}, None)
    assert bank.deposit(1) == 1


def test_nothing_can_be_set(bank):
    with pytest.raises(AttributeError):
        bank.total = 5
    with pytest.raises(AttributeError):
        del bank.deposit


def test_the_door_of_a_function_has_no_methods(serve, connect):
    serve(len)
    with pytest.raises(AttributeError, match="has no method 'deposit'"):
        connect().deposit  # noqa: B018
    assert "object" not in connect().info.attributes


def test_an_object_that_cannot_be_called(bank):
    with pytest.raises(TypeError, match="'Bank' object is not callable"):
        bank()


class Adder:
    """Adds."""

    def __init__(self, base: int) -> None:
        self.base = base

    def __call__(self, value: int) -> int:
        return self.base + value

    def rebase(self, base: int) -> None:
        self.base = base


def test_an_object_that_can_be_called(serve, connect):
    serve(Adder(10))
    adder = connect()
    assert adder(1) == 11
    adder.rebase(20)
    assert adder(1) == 21
    assert adder.submit(2).result(PATIENCE) == 22
    assert list(adder.map([1, 2, 3])) == [21, 22, 23]
    assert str(inspect.signature(adder)) == "(value: 'int') -> 'int'"


def test_expose_says_what_may_be_reached(serve, connect):
    serve(Bank(), expose=["deposit", "_audit"])
    bank = connect()
    assert bank.deposit(1) == 1
    assert bank.method("_audit")() is None
    with pytest.raises(AttributeError):
        bank.fail  # noqa: B018
    with pytest.raises(AttributeError):
        bank._audit  # noqa: B018


def test_what_a_method_raises_is_raised(bank):
    with pytest.raises(LookupError, match="no such account") as caught:
        bank.fail()
    assert "in fail" in str(caught.value.__cause__)
    assert "doorpool/_objects.py" not in str(caught.value.__cause__)


def test_methods_have_the_options_of_a_proxy(bank):
    with pytest.raises(CallTimeoutError):
        bank.options(timeout=0.05).block(2)
    with pytest.raises(CallTimeoutError):
        bank.block.options(timeout=0.05)(2)
    assert bank.deposit.options(timeout=5)(1) == 1


def test_methods_are_submitted_and_mapped(bank):
    assert bank.deposit.submit(1, note="x").result(PATIENCE) == 1
    assert sorted(bank.deposit.map([1, 1, 1])) == [2, 3, 4]


def test_methods_can_be_handed_around(bank):
    deposit = bank.deposit
    assert deposit == bank.deposit
    assert hash(deposit) == hash(bank.deposit)
    assert deposit != bank.fail
    assert deposit.__self__ == bank
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(deposit, [1, 1])) == [1, 2]
    assert "method 'deposit' of <Proxy of 'Bank'" in repr(deposit)


def test_a_method_is_bound_already_and_equal_to_no_other_thing(bank):
    class Holder:
        deposit = bank.deposit

    assert Holder().deposit(1) == 1
    assert bank.method("deposit") is bank.method("deposit")
    assert Holder().deposit == bank.deposit
    assert bank.deposit != "deposit"
    assert bank.deposit != Bank().deposit


def test_the_door_of_a_function_lists_no_methods(serve, connect):
    serve(len)
    assert set(dir(connect())) == set(object.__dir__(connect()))


def test_a_method_holds_the_door_open_and_makes_no_ring(serve):
    (endpoint,) = serve(Bank()).endpoints
    proxy = Proxy(endpoint)
    proxy._line.warns = False
    deposit = proxy.deposit
    del proxy
    assert deposit(1) == 1
    line = deposit._proxy._line
    del deposit
    # Or only the collector would close it.
    assert sys.getrefcount(line) == 2


def test_what_is_no_object_and_no_function_is_refused():
    with pytest.raises(TypeError, match="can be called"):
        Endpoint(object())
    with pytest.raises(ValueError, match="expose lists 'nothing'"):
        Endpoint(Bank(), expose=["nothing"])


# -- what is told


def test_dir_lists_the_methods(bank, serve, connect):
    names = dir(bank)
    assert {"deposit", "close", "fail", "block", "caller", "options", "method"} <= set(names)
    assert not {"balance", "_audit", "rate"} & set(names)


def test_the_signature_and_the_docstring_are_those_of_the_method(bank):
    assert str(inspect.signature(bank.deposit)) == str(inspect.signature(Bank().deposit))
    assert list(inspect.signature(bank.fail).parameters) == []
    assert inspect.getdoc(bank.deposit) == "Put money in."
    assert bank.deposit.__name__ == "deposit"
    with pytest.raises(TypeError):
        inspect.signature(bank.deposit).bind(1, 2)


def test_help_tells_of_the_methods(bank):
    text = pydoc.render_doc(bank.deposit, renderer=pydoc.plaintext)
    assert "deposit(amount: 'int', *, note: 'str' = 'none') -> 'int'" in text
    assert "Put money in." in text
    text = pydoc.render_doc(bank, renderer=pydoc.plaintext)
    assert "Keeps money." in text
    assert "deposit(amount: 'int', *, note: 'str' = 'none') -> 'int'" in text
    assert "Call a procedure of another process" in pydoc.render_doc(Proxy, renderer=pydoc.plaintext)


def test_a_function_is_told_of_as_well(serve, connect):
    def answer(greeting: str, loud: bool = False) -> str:
        """Answer a greeting."""
        return greeting

    serve(answer)
    assert str(inspect.signature(connect())) == "(greeting: 'str', loud: 'bool' = False) -> 'str'"
    assert "Answer a greeting." in pydoc.render_doc(connect(), renderer=pydoc.plaintext)


def test_a_door_of_which_nothing_is_known_takes_anything(serve, connect):
    serve(dict.fromkeys)
    parameters = inspect.signature(connect()).parameters.values()
    assert [it.kind for it in parameters] in (
        [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD],
        [inspect.Parameter.POSITIONAL_ONLY] * 2,  # as of CPython 3.13
    )


def large(count: int, doc: str = "") -> Any:
    """An object with so many methods."""

    def method(self: Any, number: int = 0) -> int:
        return number

    method.__doc__ = doc
    return type("Large", (), {f"method_number_{n}": method for n in range(count)})()


@pytest.mark.parametrize(("count", "doc"), [(300, "d" * 500), (1500, "")], ids=["docstrings", "names"])
def test_what_does_not_fit_into_a_greeting_is_fetched(serve, connect, count, doc):
    serve(large(count, doc))
    proxy = connect()
    assert proxy.method_number_7(7) == 7
    assert {f"method_number_{n}" for n in range(count)} <= set(dir(proxy))
    assert str(inspect.signature(proxy.method_number_8)) == "(number: 'int' = 0) -> 'int'"
    assert proxy.method_number_9.__doc__ == doc
    with pytest.raises(AttributeError):
        proxy.method_number_x  # noqa: B018


@pytest.mark.parametrize("table", [None, 5, {"close": "()"}, {1: ("()", "")}])
def test_a_table_that_is_none_is_a_protocol_error(serve, connect, monkeypatch, table):
    serve(large(1500))
    proxy = connect()
    monkeypatch.setattr(proxies.Line, "call_method", lambda *_: table)
    with pytest.raises(ProtocolError, match="says that it is an object, and not what its methods are"):
        proxy.method_number_7  # noqa: B018


def test_of_a_door_that_is_gone_what_is_known_must_do(serve, connect):
    server = serve(large(300, "d" * 500))
    proxy = connect()
    server.close()
    assert "method_number_7" in dir(proxy)
    assert "method_number_7(...)" in pydoc.render_doc(proxy, renderer=pydoc.plaintext)


def test_what_cannot_be_asked_for_is_not_listed(serve, connect):
    """Completion in a shell asks for names, and wants no error."""
    server = serve(large(1500))
    small, gone = connect(max_reply=5000), connect()
    with pytest.raises(LimitError, match="max_reply"):
        small.method_number_7  # noqa: B018
    server.close()
    for proxy in (small, gone):
        assert set(dir(proxy)) == set(object.__dir__(proxy))


def test_a_path_that_leads_to_something_else_when_it_is_opened_anew(serve, connect, door_dir):
    server = serve(Bank())
    bank = connect()
    assert bank.deposit(1) == 1
    server.close()
    serve(len)
    with pytest.raises(RevokedError) as caught:
        bank.deposit(1)
    assert isinstance(caught.value.__cause__, NotADoorError)
    assert "of a function now" in str(caught.value.__cause__)


def test_a_path_is_opened_anew_for_a_method_too(serve, connect):
    serve(Bank()).close()
    server = serve(Bank())
    bank = connect()
    deposit = bank.deposit
    server.close()
    serve(Bank())
    assert deposit(2) == 2


def test_a_method_is_an_argument_of_a_process(bank):
    deposit = pickle.loads(reduction.ForkingPickler.dumps(bank.deposit))
    assert deposit == bank.deposit
    assert deposit(5) == 5
    deposit.__self__.close()


def test_a_proxy_of_an_object_is_not_copied(bank):
    with pytest.raises(TypeError, match="open door"):
        copy.copy(bank)


# -- sessions


class Session:
    """What one caller has."""

    def __init__(self, ends: queue.SimpleQueue[str], name: str) -> None:
        self.ends = ends
        self.name = name
        self.count = 0

    def step(self) -> int:
        """Count."""
        self.count += 1
        return self.count

    def end(self) -> None:
        self.ends.put(self.name)


def test_a_session_for_each_caller_gone_when_he_is(serve, connect):
    ends: queue.SimpleQueue[str] = queue.SimpleQueue()

    def open_session(name: str) -> Endpoint:
        session = Session(ends, name)
        return Endpoint(session, on_unref=session.end)

    serve(open_session)
    one, other = connect()("one"), connect()("other")
    assert [one.step(), one.step(), other.step()] == [1, 2, 1]
    assert one != other
    del one
    assert ends.get(timeout=PATIENCE) == "one"
    assert other.step() == 2
    other.close()
    assert ends.get(timeout=PATIENCE) == "other"


SESSIONS = """
    import os, sys
    from doorpool import Endpoint, Server

    class Session:
        def step(self):
            return os.getpid()

    server = Server()

    @server.endpoint("sessions.door")
    def open_session(name):
        return Endpoint(Session(), on_unref=lambda: print("gone", name, flush=True))

    with server:
        ready()
        server.run()
"""


@pytest.mark.ids("U12", "U13", "F13")
def test_a_session_ends_when_its_caller_is_killed(spawn_server, spawn_python, door_dir):
    server = spawn_server(SESSIONS, cwd=door_dir)
    client = spawn_python(
        """
        from doorpool import Proxy
        session = Proxy("sessions.door")("his")
        ready(session.step())
        import time; time.sleep(60)
        """,
        cwd=door_dir,
    )
    assert client.wait_ready() == server.pid
    with Proxy(door_dir / "sessions.door") as sessions:
        mine = sessions("mine")
        client.kill()
        wait_until(lambda: server.stdout == "gone his\n")
        assert mine.step() == server.pid
        mine.close()
    wait_until(lambda: server.stdout == "gone his\ngone mine\n")
    assert server.terminate() == 0
    assert server.stderr == ""


# -- with


class Manager:
    """Enters and leaves."""

    def __init__(self, *, itself: bool = True, swallow: type[BaseException] = GeneratorExit) -> None:
        self.log: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.itself = itself
        self.swallow = swallow

    def __enter__(self) -> Any:
        return self if self.itself else ["a", "value"]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self.log.put((kind, str(error)))
        return isinstance(error, self.swallow)

    def hello(self) -> str:
        return "hello"


@pytest.fixture
def lend(serve, connect):
    """Serve managers: each call gives a door to the one that is given."""

    def start(manager: Any) -> Proxy:
        serve(lambda: Endpoint(manager))
        return connect()

    return start


def test_a_returned_context_manager_is_entered_and_left(lend):
    manager = Manager()
    with lend(manager)() as held:
        assert held.hello() == "hello"
        assert manager.log.empty()
    assert manager.log.get(timeout=PATIENCE) == (None, "None")
    assert held.closed


def test_what_enter_gives_is_what_the_caller_gets(lend):
    with lend(Manager(itself=False))() as held:
        assert held == ["a", "value"]


def test_an_error_in_the_block_is_shown_to_it(lend):
    manager = Manager()
    with pytest.raises(KeyError, match="k"), lend(manager)():
        raise KeyError("k")
    assert manager.log.get(timeout=PATIENCE) == (KeyError, "'k'")


def test_it_may_deal_with_the_error(lend):
    manager = Manager(swallow=KeyError)
    with lend(manager)():
        raise KeyError("k")
    assert manager.log.get(timeout=PATIENCE) == (KeyError, "'k'")


def test_an_error_that_cannot_cross_is_shown_as_text(lend):
    manager = Manager()
    with pytest.raises(ValueError, match="odd"), lend(manager)():
        error = ValueError("odd")
        error.lock = threading.Lock()
        raise error
    assert manager.log.get(timeout=PATIENCE) == (RemoteError, "ValueError: odd")


def test_what_leaving_raises_is_raised(lend):
    class Failing(Manager):
        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            raise OSError("cannot commit")

    with pytest.raises(OSError, match="cannot commit"), lend(Failing())():
        pass


def test_a_generator_based_one(serve, connect):
    log = []

    @contextlib.contextmanager
    def transaction():
        log.append("begin")
        try:
            yield 5
        except LookupError:
            log.append("roll back")
            raise
        log.append("commit")

    serve(lambda: Endpoint(transaction()))
    with connect()() as value:
        assert value == 5
    assert log == ["begin", "commit"]
    log.clear()
    with pytest.raises(LookupError), connect()():
        raise LookupError
    assert log == ["begin", "roll back"]


def test_a_lock_that_is_held_by_a_caller(serve, connect):
    lock = threading.Lock()
    serve(lambda: Endpoint(lock))
    with connect()() as held:
        assert held is True
        assert lock.locked()
    assert not lock.locked()


def test_who_has_waited_too_long_to_enter_does_not_keep_it(serve, connect):
    lock = threading.Lock()
    serve(lambda: Endpoint(lock))
    with connect()():
        late = connect()().options(timeout=0.1)
        with pytest.raises(CallTimeoutError), late:
            pytest.fail("entered")
        assert late.closed
    wait_until(lambda: lock.acquire(blocking=False))  # he got it meanwhile, and it was taken from him
    lock.release()


def test_it_is_left_when_the_caller_lets_go_of_the_door(lend):
    manager = Manager()
    held = lend(manager)()
    held.__enter__()
    held.close()
    assert manager.log.get(timeout=PATIENCE)[0] is BrokenDoorError


def test_it_is_left_when_the_server_closes(serve, connect):
    manager = Manager()
    server = serve(len)
    with Proxy(server.attach(Endpoint(manager))) as proxy:
        proxy._line.enter(None)
        server.close()
    assert manager.log.get(timeout=PATIENCE)[0] is BrokenDoorError


@pytest.mark.parametrize("how", ["the server closes", "the caller lets go"])
def test_what_leaving_for_somebody_who_is_gone_raises_is_logged(serve, connect, caplog, how):
    left = threading.Event()

    class Failing(Manager):
        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            left.set()
            raise OSError("cannot be left")

    server = serve(len)
    with Proxy(server.attach(Endpoint(Failing(), name="failing"))) as held:
        held._line.enter(None)
        if how == "the server closes":
            server.close()
        else:
            held.close()
        assert left.wait(PATIENCE)
        wait_until(lambda: "cannot be left" in caplog.text, timeout=PATIENCE)
    told = "failing: leaving it for a caller who is gone has failed"
    # Who lets go has held the door, and a lease: either may be noticed first.
    assert told in caplog.text or (
        how == "the caller lets go" and "failing, entered: on_unref" in caplog.text
    )


@pytest.mark.parametrize("how", ["the server closes", "the endpoint closes"])
@pytest.mark.ids("U12")
def test_it_is_left_for_all_who_are_gone_whatever_leaving_raises(serve, connect, caplog, how):
    left = []

    class Failing(Manager):
        def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
            left.append(kind)
            raise OSError(f"cannot be left, {len(left)}")

    server = serve(len)
    endpoint = server.attach(Endpoint(Failing()))
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Proxy(endpoint))._line.enter(None)
        (server if how == "the server closes" else endpoint).close()
    assert left == [BrokenDoorError] * 3
    for number in (1, 2, 3):
        assert f"cannot be left, {number}" in caplog.text


def test_a_door_that_one_has_opened_oneself_is_only_closed(serve, connect):
    manager = Manager()
    serve(manager)
    with connect() as proxy:
        assert isinstance(proxy, Proxy)
        assert "context_manager" in proxy.info.attributes
    assert proxy.closed
    assert manager.log.empty()


LOCKS = """
    import threading
    from doorpool import Endpoint, Server

    server = Server()
    lock = threading.Lock()

    @server.endpoint("lock.door")
    def hold():
        return Endpoint(lock)

    with server:
        ready()
        server.run()
"""


@pytest.mark.ids("U12")
def test_it_is_left_when_the_caller_is_killed(spawn_server, spawn_python, door_dir):
    spawn_server(LOCKS, cwd=door_dir)
    client = spawn_python(
        """
        from doorpool import Proxy
        with Proxy("lock.door")() as held:
            ready(held)
            import time; time.sleep(60)
        """,
        cwd=door_dir,
    )
    assert client.wait_ready() is True
    with Proxy(door_dir / "lock.door") as hold:
        waiting = hold.submit()
        entered = threading.Event()

        def enter() -> None:
            with waiting.result(PATIENCE):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
        client.kill()
        assert entered.wait(PATIENCE)
        thread.join(PATIENCE)


def test_a_dead_server_is_a_door_error_at_the_end_of_the_block(spawn_server, door_dir):
    server = spawn_server(LOCKS, cwd=door_dir)
    with Proxy(door_dir / "lock.door") as hold:
        held = hold()
        with pytest.raises(DoorError), held:
            server.kill()
        assert held.closed


# -- one object that many may enter


SHARED = """
    import threading
    from doorpool import Endpoint, Server

    server = Server()
    lock = threading.Lock()
    shared = server.attach(lock, linger=True, codec=CODEC)
    server.attach(lambda: shared, "lock.door", codec=CODEC)
    server.attach(lock.locked, "locked.door")

    with server:
        ready()
        server.run()
"""

HOLDER = """
    from doorpool import Proxy
    with Proxy("lock.door")() as held:
        ready(held)
        import time; time.sleep(60)
"""


@pytest.mark.ids("U12")
@pytest.mark.parametrize("codec", ["pickle", "data"])
def test_who_is_killed_is_left_for_though_others_hold_the_door(spawn_server, spawn_python, door_dir, codec):
    """One door that all are given: it is not unreferenced when he dies, but what he had entered is left."""
    spawn_server(SHARED.replace("CODEC", repr(codec)), cwd=door_dir)
    with Proxy(door_dir / "lock.door") as hold, Proxy(door_dir / "locked.door") as locked:
        door = hold()
        assert not locked()
        client = spawn_python(HOLDER, cwd=door_dir)
        assert client.wait_ready() is True
        assert locked()
        client.kill()
        with door as held:  # would wait for ever
            assert held is True
            assert locked()
        assert not locked()


def test_who_lets_go_of_a_shared_one_is_left_for(serve, connect):
    manager = Manager()
    server = serve(len)
    shared = server.attach(manager, linger=True)
    with Proxy(shared) as other:
        held = Proxy(shared)
        held._line.enters = True
        with contextlib.closing(held):
            assert held.__enter__() is held
            assert manager.log.empty()
        assert manager.log.get(timeout=PATIENCE)[0] is BrokenDoorError
        assert other.hello() == "hello"


@pytest.mark.ids("U12")
@pytest.mark.parametrize("codec", ["pickle", "data"])
@pytest.mark.parametrize("what", ["no value", "too much"])
def test_who_cannot_be_told_that_he_has_entered_is_left_for_at_once(
    serve, connect, caplog, recwarn, codec, what
):
    """Though he holds the door, and the log the traceback with all that was to be sent."""

    class Giving(Manager):
        def __enter__(self) -> Any:
            return threading.Lock() if what == "no value" else bytes(100_000)

    manager = Giving()
    server = serve(lambda: shared, codec=codec)
    shared = server.attach(manager, linger=True, codec=codec, max_reply=50_000)
    with contextlib.closing(connect()()) as other:
        late = connect()()
        with pytest.raises(MarshalError if what == "no value" else LimitError), late:
            pytest.fail("entered")
        assert manager.log.get_nowait()[0] is BrokenDoorError
        assert manager.log.empty()
        assert other.hello() == "hello"
    assert caplog.records
    del late
    gc.collect()
    assert [str(each.message) for each in recwarn] == []


def test_of_two_who_are_in_it_each_is_left_for_alone(serve, connect):
    manager = Manager()
    server = serve(lambda: shared)
    shared = server.attach(manager, linger=True)
    one, other = connect()(), connect()()
    with other as held:
        one.__enter__()
        one.close()
        assert manager.log.get(timeout=PATIENCE)[0] is BrokenDoorError
        assert held.hello() == "hello"
        assert manager.log.empty()
    assert manager.log.get(timeout=PATIENCE) == (None, "None")


def test_who_fails_to_enter_has_no_lease(serve, connect):
    class Refusing(Manager):
        def __enter__(self) -> Any:
            raise LookupError("not now")

    manager = Refusing()
    serve(lambda: Endpoint(manager))
    with pytest.raises(LookupError, match="not now"), connect()():
        pass
    assert manager.log.empty()
