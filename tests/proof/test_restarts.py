"""
At most once across restarts: servers that are killed, closed and replaced under load.

See ``support.restarts``.  A call that is said not to have run is made again, under the same number, so
that a number may be refused many times and still must not run twice.
"""

from __future__ import annotations

import collections
import errno

import pytest
from support.journal import DID_NOT_RUN, MAY_HAVE_RUN, RESULT, Books, Journal
from support.rawdoor import PATIENCE, Background

from doorpool import DoorError, Proxy, Server, _handle
from doorpool.door import Handle

SUPERVISOR = """
    import sys
    from support.restarts import supervise
    supervise(sys.argv[1], tuple(sys.argv[3:]), int(sys.argv[2]), ready)
"""

CALLER = """
    import sys
    from support.restarts import call_on
    ready()
    result(call_on(sys.argv[1], int(sys.argv[2]), 3, afresh=sys.argv[3] == "True"))
"""


@pytest.fixture
def restarted(spawn_server, door_dir, many):
    """
    Have a server restarted under load; return the failures of the callers and the balance of the books.
    """

    def run(restarts, *endings, afresh=(False, False)):
        supervisor = spawn_server(SUPERVISOR, door_dir, restarts, *endings)
        callers = [
            spawn_server(CALLER, door_dir, place << 40, fresh) for place, fresh in enumerate(afresh, start=1)
        ]
        with Journal(door_dir / "journal") as journal:
            books, failures = Books(journal), []
            for caller in callers:
                finished = caller.finish(timeout=many(50, 600))
                assert finished.returncode == 0, finished.stderr
                books.enter_all(finished.value["told"])
                failures += finished.value["failures"]
            assert supervisor.terminate(timeout=PATIENCE) == 0, supervisor.stderr
            kinds = books.balance()
        print(kinds, collections.Counter((error.split("(")[0], *rest) for error, *rest in failures))
        return failures, kinds

    return run


def may_have_run(failures):
    return [failure for failure in failures if failure[1]]


def classes(failures):
    return {error.partition("(")[0] for error, *_ in failures}


@pytest.mark.leaves_names
@pytest.mark.ids("E02", "X9", "X10", "X11", "X15")
def test_killed_at_any_moment(restarted, many):
    restarts = many(80, 1_000)
    failures, kinds = restarted(restarts, "kill")
    assert kinds[RESULT, 1] > restarts
    assert kinds[MAY_HAVE_RUN, 1] > restarts // 10
    assert len(failures) - len(may_have_run(failures)) > restarts // 10
    assert classes(failures) == {"BrokenDoorError"}, failures


@pytest.mark.ids("E02", "X11")
def test_closed_and_started_again(restarted, many):
    """Whoever is let go by a server that closes in an orderly way, has not run."""
    failures, kinds = restarted(many(40, 1_000), "close", afresh=(False, True))
    assert failures
    assert may_have_run(failures) == []
    assert kinds.keys() <= {(RESULT, 1), (DID_NOT_RUN, 0)}


@pytest.mark.ids("E02", "X15")
def test_taken_over(restarted, many):
    """
    Nobody notices: the next server has the name before the last one closes.

    A call is made anew once; so it may fail if two servers have closed since the last call.
    """
    restarts = many(40, 1_000)
    failures, kinds = restarted(restarts, "take over", afresh=(False, True))
    assert kinds[RESULT, 1] > restarts
    assert [failure for failure in failures if failure[2] < 2] == []
    assert may_have_run(failures) == []


@pytest.mark.leaves_names
@pytest.mark.ids("E02", "X9", "X10", "X11", "X15")
def test_ended_in_every_way(restarted, many):
    restarts = many(40, 1_000)
    failures, kinds = restarted(restarts, "kill", "close", "cut", "take over", afresh=(False, True))
    assert kinds[RESULT, 1] > restarts
    assert classes(failures) <= {"BrokenDoorError", "RevokedError", "FileNotFoundError"}, failures


# -- moments that are too short to be met by chance


@pytest.mark.leaves_names
@pytest.mark.ids("X11")
@pytest.mark.parametrize("step", ["_opening.hear_answer", "pickle_bar"])
def test_a_server_that_dies_before_its_answer_is_believed(run_python, door_dir, step):
    """The kernel tells nothing more about it; that is no reason to call it a stranger."""
    finished = run_python(
        """
        import sys
        from doorpool import Proxy, DoorError, _handle
        from support.restarts import Forked

        folder, step = sys.argv[1:]
        server = Forked(folder)
        server.wait_ready()
        module, _, name = step.rpartition(".")
        module = getattr(_handle, module) if module else _handle
        plain = getattr(module, name)

        def late(*args, **options):
            if not server.ended:
                server.kill()
            return plain(*args, **options)

        setattr(module, name, late)
        try:
            Proxy(f"{folder}/note.door")
        except DoorError as error:
            result((type(error).__name__, error.may_have_run))
        """,
        door_dir,
        step,
    )
    assert finished.value == ("BrokenDoorError", False)


@pytest.mark.leaves_names
@pytest.mark.parametrize("step", ["_names.reach", "_opening.knock", "_opening.hear_answer"])
def test_a_door_that_is_taken_over_while_it_is_opened(door_dir, monkeypatch, step):
    path = door_dir / "a.door"
    module, name = step.split(".")
    module = getattr(_handle, module)
    plain = getattr(module, name)
    with Server() as first, Server() as second:
        first.attach(str.lower, path)

        def take_over():
            monkeypatch.setattr(module, name, plain)
            second.attach(str.upper, path, replace=True)
            first.close()

        def late(*args, **options):
            if name != "reach":
                take_over()
            answer = plain(*args, **options)
            if name == "reach":
                take_over()
            return answer

        monkeypatch.setattr(module, name, late)
        with Proxy(path) as proxy:
            assert proxy("Hello") == "HELLO"


@pytest.mark.ids("X19")
def test_ctrl_c_between_having_the_lock_and_opening_anew(door_dir):
    """A lock that stayed locked would hold up all calls from then on."""

    class Interrupting:
        def __init__(self, lock):
            self.release = lock.release
            self._lock = lock

        def acquire(self, **options):
            self._lock.acquire(**options)
            raise KeyboardInterrupt

    path = door_dir / "a.door"
    with Server() as server:
        server.attach(str.lower, path)
        proxy = Proxy(path, timeout=PATIENCE)
    with Server() as server, proxy:
        server.attach(str.upper, path)
        line = proxy._line
        lock, line._opening = line._opening, Interrupting(line._opening)
        with pytest.raises(KeyboardInterrupt):
            proxy("Hello")
        line._opening = lock
        assert Background(proxy, "Hello").result() == "HELLO"


@pytest.mark.ids("X15")
def test_an_error_that_tells_nothing_is_not_replaced_by_one_that_promises(door_dir, monkeypatch):
    """The second call has run, and then there was no room for what its reply brought."""
    path = door_dir / "a.door"
    ran = []
    with Server() as server:
        server.attach(str.lower, path)
        proxy = Proxy(path)
    with Server() as server, proxy:
        server.attach(ran.append, path)
        call_until = Handle.call_until

        def starved(self, *args):
            call_until(self, *args)
            raise OSError(errno.EMFILE, "no free descriptors for those that the reply brought")

        monkeypatch.setattr(Handle, "call_until", starved)
        with pytest.raises(OSError) as caught:
            proxy("Hello")
    assert ran == ["Hello"]
    assert not isinstance(caught.value, DoorError)
