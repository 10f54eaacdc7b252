"""
Descriptors with an owner.
"""

from __future__ import annotations

import fcntl
import os

import pytest

from doorpool import Descriptor


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def opened() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def test_it_owns_the_number_and_closes_it_once():
    number = opened()
    descriptor = Descriptor(number)
    assert descriptor.fileno() == number
    assert not descriptor.closed
    assert repr(descriptor) == f"<Descriptor {number}>"
    descriptor.close()
    assert not is_open(number)
    assert (descriptor.fileno(), descriptor.closed) == (-1, True)
    assert repr(descriptor) == "<Descriptor closed>"
    stranger = opened()  # very likely of the same number
    descriptor.close()
    assert is_open(stranger)
    os.close(stranger)


def test_with_closes_it():
    with Descriptor(opened()) as descriptor:
        number = descriptor.fileno()
    assert not is_open(number)


def test_what_was_taken_is_the_takers():
    with Descriptor(opened()) as descriptor:
        number = descriptor.take()
        assert descriptor.closed
    assert is_open(number)
    with pytest.raises(ValueError, match="closed"):
        descriptor.take()
    os.close(number)


@pytest.mark.ids("F2", "F3")
def test_dup_is_a_second_descriptor_of_the_same_file(door_dir):
    with open(door_dir / "file", "w+b") as file:
        with Descriptor(os.dup(file.fileno())) as first, first.dup() as second:
            assert second.fileno() != first.fileno()
            assert fcntl.fcntl(second.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            os.write(first.fileno(), b"shared")
            assert os.lseek(second.fileno(), 0, os.SEEK_CUR) == 6
            first.close()
            assert is_open(second.fileno())
            with pytest.raises(ValueError, match="closed"):
                first.dup()


def test_dropped_open_it_warns_and_closes():
    descriptor = Descriptor(opened())
    number = descriptor.fileno()
    with pytest.warns(ResourceWarning, match=f"unclosed <Descriptor {number}>"):
        del descriptor
    assert not is_open(number)


@pytest.mark.parametrize(
    ("number", "error"), [(-1, ValueError), (True, TypeError), ("3", TypeError), (None, TypeError)]
)
def test_what_is_no_number_of_a_descriptor(number, error):
    with pytest.raises(error, match="descriptor is"):
        Descriptor(number)
