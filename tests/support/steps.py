"""
The steps at which a process can be made to stop or to die: a test switch in the source.

A step is a comment in the library that stands alone on its line:

    # step: request-sent

It costs nothing.  In a process of a test that has called ``install()`` before doorpool was
imported, each such line is compiled as ``__step__("request-sent")``, in its place, so that all
line numbers stay what they are.  What happens there is decided by ``at``:

    steps.at("request-sent", die)           # the next thread that comes there
    steps.at("request-sent", pause, nth=2)  # the one after it

``STEPS`` is the table of them all.  A step in the source that is not in it fails
``unit/test_steps.py``, as does one in it that is not in the source.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any, NoReturn

#: Every step: in which module it stands, and how far the process is then.
STEPS = {
    # the caller
    "dialling": ("_opening", "reached the door, has not knocked"),
    "knock-sent": ("_opening", "has knocked"),
    "answer-heard": ("_opening", "has the answer in hand, believes nothing yet"),
    "channel-opened": ("_handle", "believes the answer"),
    "request-begun": ("_handle", "has sent nothing of a request"),
    "request-sent": ("_handle", "has sent a request whole"),
    "still-waiting": ("_handle", "has waited in vain for a while"),
    "reply-read": ("_handle", "has the reply"),
    "given-back": ("_handle", "keeps the channel for the next call"),
    "given-up": ("_handle", "has shut its end down, has not asked what was read"),
    "closing": ("_handle", "has closed the descriptor, and not yet the idle channels"),
    # either side
    "part-sent": ("_channel", "has sent a part of a long frame"),
    "part-read": ("_channel", "has read a part of a long frame"),
    # the server
    "accepted": ("_door", "has accepted a connection, has not greeted"),
    "greeted": ("_door", "has greeted, does not listen for knocks"),
    "knock-heard": ("_door", "has read a knock"),
    "answering": ("_opening", "has made a channel, has not answered"),
    "answer-sent": ("_door", "has answered; nobody reads the channel"),
    "joined": ("_door", "the channel is in the set"),
    "request-read": ("_gate", "has read a request, has not looked for a hang-up"),
    "call-taken": ("_endpoint", "has looked, has not unpickled the arguments"),
    "procedure-begins": ("_endpoint", "has not run any of the procedure"),
    "procedure-ended": ("_endpoint", "has run the procedure, has not marshalled the result"),
    "replying": ("_gate", "has marshalled the result, has sent nothing of it"),
    "reply-sent": ("_gate", "has sent the reply whole"),
    "lingering": ("_gate", "stays for the next request of the same caller"),
    "parking": ("_gate", "lets go of the channel"),
    "parked": ("_gate", "has armed the channel in the set"),
    "revoked": ("_door", "has marked a door as revoked, has told nobody"),
    "farewell-said": ("_door", "has told a descriptor, has not closed its port"),
    "goodbye-said": ("_gate", "has told a channel, has not closed it"),
}

#: The steps of the tests themselves, which are in no source of the library: in a procedure, in a
#: function that is called back, within a block or a session, between two items of a stream that is
#: taken, or given, and with an open file in hand.
IN_PROCEDURE = "in-procedure"
IN_CALLBACK = "in-callback"
HOLDING = "holding"
MID_STREAM = "mid-stream"
GIVING = "giving"
WITH_FILE = "with-file"

OF_TESTS = (IN_PROCEDURE, IN_CALLBACK, HOLDING, MID_STREAM, GIVING, WITH_FILE)

_LINE = re.compile(r"^( *)# step: ([a-z-]+)$", re.MULTILINE)

Action = Callable[[], Any]

_plans: dict[str, tuple[int, Action]] = {}
_lock = threading.Lock()


def steps_in(source: str) -> list[str]:
    """The names of the steps in a source, in their order."""
    return [name for _, name in _LINE.findall(source)]


def stepped(source: str) -> str:
    """The source with a call in place of each step."""
    return _LINE.sub(r'\1__step__("\2")', source)


def at(name: str, action: Action, nth: int = 1) -> None:
    """Have the nth thread that arrives at a step, counted from now on, do something there; once."""
    assert name in STEPS or name in OF_TESTS, name
    with _lock:
        _plans[name] = (nth, action)


def forget() -> None:
    """Let every step be passed again."""
    with _lock:
        _plans.clear()


def arrive(name: str) -> None:
    """Arrive at a step: what ``__step__`` stands for in the source."""
    if name not in _plans or threading.current_thread().name.startswith("canary"):
        return
    with _lock:
        if name not in _plans:
            return
        left, action = _plans.pop(name)
        if left > 1:
            _plans[name] = (left - 1, action)
            return
    action()


def die() -> NoReturn:
    """Be killed, here and now."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody lives on")


# -- the loader


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles a module of the library with its steps; neither reads nor writes a cache of bytecode."""

    def get_code(self, fullname: str) -> CodeType:
        source = stepped(importlib.util.decode_source(self.get_data(self.path)))
        code: CodeType = compile(source, self.path, "exec", dont_inherit=True)
        return code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__step__"] = arrive
        super().exec_module(module)


class _Finder:
    """Finds the modules of the library before anybody else does."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "doorpool":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


def install() -> None:
    """
    Turn the switch on in this process, for good.

    Raises:
        RuntimeError: it is too late.
    """
    if "doorpool" in sys.modules:
        raise RuntimeError("doorpool has been imported already, without its steps")
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
