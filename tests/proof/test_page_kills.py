"""
Kill -9 at every transition of a page's words, on a channel that has answered before.

A doorbell that nobody read proves nothing: what was posted in a page has not run only if the client
takes it back.  ``test_kills.py`` has each step of a first call; here the page is known to be in use,
and both sides either look for long (spinning) or never (parked).  The twin in Python has no page and
must tell the same truth of its socket.
"""

from __future__ import annotations

import collections
import contextlib

import pytest
from support.stage import ALONE, PROMPTLY, Stage
from support.steps import IN_PROCEDURE

from doorpool import _impl

pytestmark = [pytest.mark.leaves_names, pytest.mark.ids("E13", "E01", "E02")]

RESULT, BROKEN, LATE = "result", "BrokenDoorError", "CallTimeoutError"
FIRST, SECOND = 1, 2  # the numbers of the calls
SPINS = {"spinning": 0.5, "parked": 0.0}

TAKEN = {  # where the server dies: whether the procedure then has run
    "request-read": 0,
    "call-taken": 0,
    "procedure-begins": 0,
    IN_PROCEDURE: 1,
    "procedure-ended": 1,
    "replying": 1,
}


@pytest.fixture(scope="module", params=["c", "py"])
def stage(request):
    if request.param == "c" and _impl.NAME != "c":
        pytest.skip("no compiled shuttle here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOORPOOL_IMPL", request.param)
        it = Stage()
    with it:
        it.has_pages = request.param == "c"
        yield it


class Pair:
    """A server and a client that has called it once, on a channel that stays."""

    def __init__(self, stage, folder, spin, place="", nth=1, company=None):
        self.journal = folder / "journal"
        self.server = stage.start("server", str(self.journal), spin)
        self.client = stage.start("client", str(self.journal))
        self.server.ask("open", str(folder / "a.door"))
        if place:
            self.server.ask("at", place, nth, company)
        assert self.client.ask("warm_up", str(folder / "a.door"), FIRST, spin) == stage.has_pages

    def call(self, timeout=None):
        self.client.tell("call_again", SECOND, timeout)

    def outcome(self):
        number, *told, _, _ = self.client.hear("outcome")
        assert number == SECOND
        return tuple(told)

    def ran(self):
        counts = collections.Counter(map(int, self.journal.read_text().split()))
        assert counts[FIRST] == 1
        return counts[SECOND]

    def kill_server(self):
        with contextlib.suppress(AssertionError):  # it ends without an answer
            self.server.ask("die", ALONE)
        self.server.wait_ended()

    def close(self):
        self.client.close()
        self.server.close()


@pytest.fixture(params=list(SPINS))
def paired(request, stage, door_dir):
    with contextlib.ExitStack() as stack:

        def pair(*plan):
            it = Pair(stage, door_dir, SPINS[request.param], *plan)
            stack.callback(it.close)
            return it

        yield pair


@pytest.mark.parametrize("step", TAKEN)
def test_a_server_that_dies_with_a_request_that_it_has_taken(paired, step):
    pair = paired()
    pair.server.ask("at", step, 1, ALONE)
    pair.call()
    assert pair.outcome() == (BROKEN, True)
    assert pair.ran() == TAKEN[step]


def test_a_reply_that_was_given_whole_arrives(paired):
    pair = paired("reply-sent", 2, ALONE)  # set before the first call, whose reply it may outrun
    pair.call()
    assert pair.outcome() == (RESULT, None)
    assert pair.ran() == 1


@pytest.mark.parametrize("place", ["reply-sent", "lingering"])
def test_a_server_that_dies_before_it_takes_a_request(paired, place):
    """It still stands behind the first call when the second comes: that never ran, whatever was rung."""
    pair = paired(place)
    pair.server.hear("at")
    pair.client.ask("at", "request-sent", 1, None)
    pair.call()
    pair.client.hear("at")
    pair.kill_server()
    pair.client.ask("go")
    assert pair.outcome() == (BROKEN, False)
    assert pair.ran() == 0


@pytest.mark.parametrize("place", ["reply-sent", "lingering"])
def test_a_request_that_is_given_up_before_it_is_taken_never_runs(paired, place):
    pair = paired(place)
    pair.server.hear("at")
    pair.call(timeout=0.1)
    assert pair.outcome() == (LATE, False)
    pair.server.ask("go")
    pair.client.ask("cool_down")
    pair.client.ask("warm_up", str(pair.journal.parent / "a.door"), 3, None)  # the server goes on
    assert pair.ran() == 0


@pytest.mark.parametrize("step", ["request-read", IN_PROCEDURE, "replying"])
def test_a_request_that_is_given_up_when_it_was_taken_may_have_run(paired, step):
    pair = paired()
    pair.server.ask("at", step, 1, None)
    pair.call(timeout=0.1)
    pair.server.hear("at")
    assert pair.outcome() == (LATE, True)
    assert pair.ran() == TAKEN[step]
    pair.server.ask("go")


@pytest.mark.parametrize(
    ("step", "runs"),
    [("request-begun", {0}), ("request-sent", {0, 1}), ("reply-read", {1}), ("given-back", {1})],
)
def test_a_client_that_dies(paired, step, runs):
    """What it had posted runs once at most, and the server keeps nothing of it."""
    pair = paired()
    pair.client.ask("at", step, 1, ALONE)
    pair.call()
    pair.client.wait_ended()
    assert pair.server.ask("wait_no_channels", PROMPTLY) == 0
    assert pair.ran() in runs
