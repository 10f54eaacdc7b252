"""
The public face: what ``doorpool`` and ``doorpool.door`` export, and that all of it is documented.
"""

import inspect
import pickle
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if not (Path(__file__).resolve().parents[2] / "doorpool" / "__init__.py").exists():
    pytest.skip("the package is not whole yet", allow_module_level=True)

import doorpool
import doorpool.__main__
from doorpool import door

ERRORS = {
    "AccessError",
    "BrokenDoorError",
    "BusyError",
    "CallTimeoutError",
    "ClosedError",
    "DoorError",
    "LimitError",
    "MarshalError",
    "NotADoorError",
    "ProtocolError",
    "RemoteError",
    "RemoteTraceback",
    "RevokedError",
}

#: What the package exports, all of it: a new name is a decision.
PUBLIC = ERRORS | {
    "Call",
    "Credentials",
    "Descriptor",
    "DoorInfo",
    "Endpoint",
    "Group",
    "Limits",
    "Proxy",
    "Server",
    "Statistics",
    "Usage",
    "anyone",
    "buffer",
    "current_call",
    "empty",
    "take",
    "track",
}

#: Of ``doorpool.door``.
RAW_LAYER = {"Door", "Gate", "Handle", "Invocation", "Reply"}

#: The verbs of the public classes that ``examples/`` and the docs rely on.
VERBS = {
    "Server": {"endpoint", "attach", "start", "run", "wait", "close", "closed", "endpoints", "statistics"},
    "Endpoint": {"attach", "detach", "open", "revoke", "close", "closed", "info", "paths"},
    "Proxy": {
        "options",
        "submit",
        "map",
        "ping",
        "alive",
        "info",
        "fileno",
        "close",
        "closed",
        "__call__",
        "__enter__",
        "__exit__",
    },
    "Descriptor": {"close", "closed", "fileno"},
    "Call": {"caller", "endpoint", "deadline", "waited", "cancelled"},
}


def test_all_is_the_public_face():
    assert set(doorpool.__all__) == PUBLIC
    assert len(doorpool.__all__) == len(set(doorpool.__all__))


def test_nothing_public_is_left_out_of_all():
    loose = {
        name
        for name, value in vars(doorpool).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    } - set(doorpool.__all__)
    assert loose - {"annotations"} == set()


def test_the_raw_layer_exports_its_names():
    assert set(door.__all__) >= RAW_LAYER
    assert all(hasattr(door, name) for name in door.__all__)


def test_public_classes_say_where_they_are_to_be_found():
    wrong = {
        name: value.__module__
        for name in doorpool.__all__
        if isinstance(value := getattr(doorpool, name), type) and not value.__module__.startswith("doorpool")
    }
    assert wrong == {}


@pytest.mark.parametrize("name", sorted(VERBS))
def test_public_classes_have_their_verbs(name):
    # Some are slots or instance attributes of facts; annotations name these.
    kind = getattr(doorpool, name)
    known = set(dir(kind)) | set(getattr(kind, "__annotations__", {}))
    assert VERBS[name] - known == set()


@pytest.mark.parametrize("name", sorted(ERRORS - {"DoorError", "RemoteTraceback"}))
def test_every_error_is_a_door_error_that_says_whether_it_may_have_run(name):
    kind = getattr(doorpool, name)
    assert issubclass(kind, doorpool.DoorError)
    assert isinstance(kind("text").may_have_run, bool)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("ClosedError", ValueError),
        ("RevokedError", ConnectionError),
        ("BrokenDoorError", ConnectionError),
        ("CallTimeoutError", TimeoutError),
        ("LimitError", ValueError),
        ("MarshalError", TypeError),
        ("AccessError", PermissionError),
        ("NotADoorError", OSError),
        ("ProtocolError", ConnectionError),
    ],
)
def test_errors_are_what_they_are_by_nature_too(name, base):
    assert issubclass(getattr(doorpool, name), base)


def documented() -> Iterator[Any]:
    """Every public name, and every public method and property of every public class."""
    for module in (doorpool, door):
        yield pytest.param(module, id=module.__name__)
        for name in module.__all__:
            value = getattr(module, name)
            if not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            yield pytest.param(value, id=f"{module.__name__}.{name}")
            if inspect.isclass(value):
                for member_name, member in vars(value).items():
                    if not member_name.startswith("_") and (
                        inspect.isroutine(member) or isinstance(member, property | classmethod | staticmethod)
                    ):
                        yield pytest.param(member, id=f"{module.__name__}.{name}.{member_name}")


@pytest.mark.parametrize("value", list(documented()))
def test_is_documented(value):
    # Not inspect.getdoc(), which would take a base class's docstring for one.
    text = value.__doc__
    assert text
    assert len(text.split()) >= 3


REFUSING = """
    import logging, sys, threading

    log = logging.getLogger("doorpool")
    log.handlers.clear()  # the tests have theirs
    from doorpool import AccessError, Proxy, Server

    if sys.argv[1] == "heard":
        logging.basicConfig()
    told = threading.Event()
    log.addFilter(lambda record: told.set() or True)
    with Server() as server:
        server.attach(print, "a.door", callers=lambda who: False)
        try:
            Proxy("a.door")
        except AccessError:
            assert told.wait(20)
"""


def test_the_library_says_nothing_unless_the_program_listens(run_python, door_dir):
    assert run_python(REFUSING, "unheard", cwd=door_dir).stderr == ""
    assert "WARNING:doorpool:print: refused" in run_python(REFUSING, "heard", cwd=door_dir).stderr


def test_a_machine_that_is_no_linux_is_told_at_once(run_python):
    code = """
        import sys
        sys.platform = "darwin"
        try:
            import doorpool
        except ImportError as error:
            result(str(error))
    """
    assert run_python(code).value == "doorpool needs Linux 5.4 or newer, and this is darwin"


def test_asked_for_nothing_the_command_says_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["doorpool"])
    doorpool.__main__.main()
    said = capsys.readouterr().out
    assert "usage: doorpool" in said
    assert "--version" in said


def test_defaults_show_themselves_as_they_are_written():
    signature = str(inspect.signature(doorpool.Endpoint))
    assert "max_request: 'int' = 2**30 (of data: 2**24)" in signature
    assert repr(doorpool.anyone) == "anyone"


def test_what_is_of_a_process_does_not_cross_to_another(door_dir):
    def look() -> None:
        for mine, text in (
            (doorpool.current_call(), "stays in the process"),
            (server, "stays in its process"),
        ):
            with pytest.raises(TypeError, match=text):
                pickle.dumps(mine)

    with doorpool.Server() as server:
        server.attach(look, door_dir / "a.door")
        server.start()
        with doorpool.Proxy(door_dir / "a.door", timeout=20.0) as proxy:
            proxy()
