"""
The names of a door while others give it names, or the kernel has no room for one.
"""

from __future__ import annotations

import errno
import os

import pytest

from doorpool._errors import ClosedError
from doorpool.door import Handle


@pytest.fixture
def door(serve):
    return serve().door


@pytest.mark.ids("N7")
def test_a_name_that_is_given_again_while_it_is_taken_away(door, door_dir, monkeypatch):
    """
    1. A takes the name away, and its file is gone;
    2. B gives the same name anew;
    3. A lets go of its own, and of no other.
    """
    path = door.listen(door_dir / "x.door")
    first = door._names[path]
    remove = type(first).remove

    def remove_and_give_again(name):
        monkeypatch.undo()
        removed = remove(name)
        door.listen(path)
        return removed

    monkeypatch.setattr(type(first), "remove", remove_and_give_again)
    assert door.unlisten(path)
    assert door.paths == (path,)
    assert first.closed
    with Handle(path) as handle:
        assert handle.call(b"still").data == b"still"
    door.revoke()
    assert not os.path.exists(path)


@pytest.mark.ids("F03")
def test_a_name_that_nobody_could_watch_is_not_made(door, door_dir, monkeypatch):
    before = door.listen(door_dir / "before.door")

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(door._keeper, "watch", refuse)
        with pytest.raises(OSError, match="No space left"):
            door.listen(door_dir / "x.door")
        with pytest.raises(OSError, match="No space left"):
            door.listen(before, replace=True)
    assert door.paths == (before,)
    assert os.listdir(door_dir) == ["before.door"]
    Handle(before).close()  # still there


def test_a_name_that_was_made_when_the_door_was_taken_away(door, door_dir, monkeypatch):
    def revoke_and_check():
        monkeypatch.undo()
        check()  # the first look; the name is made after it
        door.revoke()

    check = door._check_open
    monkeypatch.setattr(door, "_check_open", revoke_and_check)
    with pytest.raises(ClosedError, match="revoked"):
        door.listen(door_dir / "x.door")
    assert os.listdir(door_dir) == []
