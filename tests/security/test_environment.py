"""
Nothing of the environment leads anywhere: where a door is, only the program says.

So a stranger who has made the directory of somebody's "default", or who has chosen the environment of a
process with privileges, has gained nothing.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

import doorpool
from doorpool import Proxy, Server, _impl

NAMES = [
    "XDG_RUNTIME_DIR",
    "TMPDIR",
    "TMP",
    "TEMP",
    "HOME",
    "DOORPOOL_DIR",
    "DOORPOOL_PATH",
    "DOORPOOL_TRUST",
]

#: A server and a client by a relative name and one without a name, in the ids of two users if we can.
WORK = """
    import os
    from doorpool import Proxy, Server

    if os.geteuid() == 0:
        os.setegid({uid})
        os.seteuid({uid})
    with Server() as server:
        server.attach(abs, "a.door", codec="data")
        unnamed = server.attach(abs, codec="data")
        with Proxy("a.door") as named, Proxy(unnamed.open().take()) as other:
            result((named(-1), other(-2), sorted(os.listdir("."))))
"""


@pytest.mark.ids("A09", "A15")
def test_no_variable_says_where_a_door_is(run_python, door_dir, tmp_path):
    """Each names a directory of another user with a door's name in it, which stays as it is."""
    lure = tmp_path / "lure"
    lure.mkdir()
    (lure / "doorpool").mkdir(0o777)
    (lure / "a.door").write_text("a stranger's")
    lure.chmod(0o777)
    if os.geteuid() == 0:
        os.chown(lure, 6602, 6602)
        os.chown(door_dir, 4201, 4201)
    before = _everything(lure)
    done = run_python(
        WORK.format(uid=4201), cwd=door_dir, env={**os.environ, **dict.fromkeys(NAMES, str(lure))}
    )
    first, second, names = done.value
    assert (first, second) == (1, 2)
    assert [name for name in names if name.endswith(".door")] == ["a.door"]
    assert _everything(lure) == before


def _everything(folder: Path) -> list[tuple[str, int, int, int]]:
    facts = [(str(path), path.lstat()) for path in [folder, *sorted(folder.rglob("*"))]]
    return [(path, fact.st_ino, fact.st_mode, fact.st_mtime_ns) for path, fact in facts]


@pytest.mark.ids("A15")
def test_of_the_environment_one_choice_of_two_is_read():
    """It chooses which of two of our own modules runs, never a path; nothing else is looked at."""
    package = Path(doorpool.__file__).parent
    readers = [path.name for path in package.glob("*.py") if _reads_the_environment(path)]
    assert readers == ["_impl.py"]
    assert not any(b"getenv" in path.read_bytes() for path in package.glob("*.c"))
    with pytest.raises(ImportError, match="is 'c' or 'py', or not set"):
        _impl._choose("/tmp/evil.so")


@pytest.mark.ids("B16")
def test_there_is_no_secret_to_be_leaked():
    """
    The kernel says who is who.  Drawn at random are ids, which all may see, and names of directories.
    """
    package = Path(doorpool.__file__).parent
    drawers = {(path.name, name) for path in package.glob("*.py") for name in _names_in(path) & RANDOM}
    assert drawers == {("_door.py", "urandom"), ("_names.py", "token_hex"), ("_names.py", "secrets")}
    assert not any(b"getrandom" in path.read_bytes() for path in package.glob("*.c"))


@pytest.mark.ids("B16")
def test_the_only_random_word_of_a_door_is_shown_to_who_opens_it(door_dir):
    with Server() as server:
        endpoint = server.attach(abs, door_dir / "a.door")
        with Proxy(door_dir / "a.door") as proxy:
            assert proxy.info.id == endpoint.info.id


RANDOM = {"urandom", "getrandom", "random", "secrets", "hmac", "uuid4", "authkey"} | {
    f"token_{kind}" for kind in ("bytes", "hex", "urlsafe")
}


def _reads_the_environment(path: Path) -> bool:
    wanted = {"environ", "environb", "getenv", "getenvb", "gettempdir", "expanduser", "expandvars"}
    return bool(_names_in(path) & wanted)


def _names_in(path: Path) -> set[str]:
    """All names that a module mentions, imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        found |= {getattr(node, "attr", ""), getattr(node, "id", ""), getattr(node, "module", None) or ""}
        found |= {alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)}
    return found
