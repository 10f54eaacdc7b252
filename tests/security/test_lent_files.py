"""
Files that a root process lends to other users: what they could not open, and what the policy gives them.

The processes are those of the lessons, in their own words; who uses them is another user.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support import Child
from support.processes import ROOT

from doorpool import AccessError, Proxy

#: Whom the helper's policy gives the report, and whom it does not know.
NOBODY, M = 65534, 6602

SERVER = 0  # all that is lent is root's

EXAMPLES = ROOT / "examples"

#: How lesson 8 makes its door, which is for its own user; and one that is for all.
FOR_OURSELVES = '@server.endpoint("server.door")'
FOR_ALL = (
    '@server.endpoint("server.door", codec="data", mode=0o666, callers=doorpool.anyone,'
    " errors=[PermissionError])"
)


@pytest.fixture
def lender(root_only: None, spawn_python: Callable[..., Child], place: Path) -> Callable[..., str]:
    """Run a lesson's server as root, in a directory as /tmp; return the path of its door."""

    def start(lesson: str, *replaced: str) -> str:
        script = (EXAMPLES / lesson / "server.py").read_text()
        if replaced:
            assert replaced[0] in script
            script = script.replace(*replaced)
        spawn_python(f"import doorpool, os; os.umask(0o077)\n{script}", cwd=place)
        path = str(place / "server.door")
        Proxy(path, wait=20, server={SERVER}).close()
        return path

    return start


def fail_to_open(path: str) -> int:
    """Try it oneself; return why not."""
    with pytest.raises(OSError, match=r"^\[Errno") as caught, open(path):
        pass
    assert caught.value.errno is not None
    return caught.value.errno


def borrow(door: str, name: str) -> tuple[str, int]:
    """Return what is in a file that was lent, and the error of an attempt to write to it."""
    with Proxy(door, server={SERVER}) as lend, lend(name) as descriptor:
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            os.write(descriptor.fileno(), b"mine")
        with open(descriptor.take()) as file:
            return file.read(), caught.value.errno or 0


def ask(door: str, name: str) -> str:
    """Ask for a file; return "lent", or why not."""
    with Proxy(door, server={SERVER}) as lend:
        try:
            lend(name).close()
        except PermissionError as error:
            return str(error)
        return "lent"


def find_in_proc(door: str) -> list[int]:
    """Look for the lender's open files where the kernel shows a process's own user his."""
    with Proxy(door, server={SERVER}) as lend:
        pid = lend.info.server.pid
    errors = []
    for number in range(3, 64):
        with contextlib.suppress(FileNotFoundError):
            errors.append(fail_to_open(f"/proc/{pid}/fd/{number}"))
    return errors


@pytest.mark.ids("F2", "F16")
def test_whom_the_policy_gives_a_file_gets_what_he_cannot_open(lender, actor, place):
    door = lender("13_privileged_helper")
    nobody, stranger = actor(NOBODY), actor(M)
    for user in nobody, stranger:
        assert user(fail_to_open, str(place / "files" / "report")) == errno.EACCES
    assert nobody(borrow, door, "report") == ("the report of this year\n", errno.EBADF)
    assert stranger(ask, door, "report") == "the policy does not give you report"
    assert nobody(ask, door, "payroll") == "the policy does not give you payroll"
    assert nobody(borrow, door, "report") == ("the report of this year\n", errno.EBADF), "nothing is spoilt"


def test_the_client_of_the_lesson_is_another_user(lender, run_python, place):
    lender("13_privileged_helper")
    client = (EXAMPLES / "13_privileged_helper" / "client.py").read_text()
    finished = run_python(client, cwd=place, uid=NOBODY)
    assert finished.stdout == "the report of this year\nrefused: the policy does not give you payroll\n"
    refused = run_python(client, cwd=place, uid=M, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.endswith("PermissionError: the policy does not give you report\n")


@pytest.mark.ids("F16")
@pytest.mark.parametrize("uid", [NOBODY, M])
def test_a_file_without_a_name_and_one_on_a_shelf_of_roots(lender, actor, place, uid):
    door = lender("08_file_through_a_door", FOR_OURSELVES, FOR_ALL)
    user = actor(uid)
    assert user(fail_to_open, str(place / "secret_data")) == errno.ENOENT
    assert user(fail_to_open, str(place / "shelf" / "menu")) == errno.EACCES
    assert set(user(find_in_proc, door)) == {errno.EACCES}
    assert user(borrow, door, "secret_data") == ("The cake is in the cellar.\n", errno.EBADF)
    assert user(borrow, door, "menu") == ("Cake.\n", errno.EBADF)
    assert user(ask, door, "../etc/passwd") == "../etc/passwd is not on my shelf"


def test_a_lender_that_speaks_pickle_lends_to_its_own_user_only(lender, actor, place):
    door = lender("08_file_through_a_door")
    os.chmod(door, 0o666)
    with pytest.raises(AccessError, match="pickle"):
        actor(M)(ask, door, "menu")
    assert ask(door, "menu") == "lent"
