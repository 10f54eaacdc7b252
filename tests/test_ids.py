"""
The map in ``tests/README.md``: that it is drawn from the tests as they are, and has no white spots.
"""

import ast

import idmap
import pytest


def test_the_map_is_up_to_date():
    text = idmap.README.read_text()
    assert text == idmap.with_map(text), "run: python tests/idmap.py --write"


def test_every_behaviour_of_the_list_is_proven_by_a_test():
    proofs = idmap.proofs()
    assert [identifier for identifier in idmap.TITLES if identifier not in proofs] == []


def test_tests_refer_to_behaviours_that_exist():
    unknown = {
        identifier: tests for identifier, tests in idmap.proofs().items() if not idmap.exists(identifier)
    }
    assert unknown == {}


@pytest.mark.parametrize("identifier", ["C1", "N16", "D13", "F10", "F10t", "A01", "B25", "C01", "E10"])
def test_known_ids(identifier):
    assert idmap.exists(identifier)


@pytest.mark.parametrize(
    "identifier", ["C0", "C10x", "N17", "A1", "A22", "Z01", "A00", "A01t", "C1t", "c1", ""]
)
def test_unknown_ids(identifier):
    assert not idmap.exists(identifier)


def test_marks_are_found_wherever_they_can_stand():
    source = """
pytestmark = pytest.mark.ids("C1")

@pytest.mark.ids("C2", "C3")
def test_a(): ...

@pytest.mark.parametrize("x", [pytest.param(1, marks=pytest.mark.ids("N1"))])
def test_b(x): ...

class TestC:
    pytestmark = [pytest.mark.slow, mark.ids("N2")]

    @pytest.mark.ids("N3")
    async def test_d(self): ...

@pytest.mark.ids("N5")
def helper(): ...
"""
    assert list(idmap.proofs_in(ast.parse(source), "f.py")) == [
        ("C1", "f.py::test_a"),
        ("C2", "f.py::test_a"),
        ("C3", "f.py::test_a"),
        ("C1", "f.py::test_b"),
        ("N1", "f.py::test_b"),
        ("C1", "f.py::TestC::test_d"),
        ("N2", "f.py::TestC::test_d"),
        ("N3", "f.py::TestC::test_d"),
    ]


def test_an_id_has_to_be_written_out():
    with pytest.raises(ValueError, match="written out"):
        list(idmap.proofs_in(ast.parse("@pytest.mark.ids(*ALL)\ndef test_a(): ..."), "f.py"))
