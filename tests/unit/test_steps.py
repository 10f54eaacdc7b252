"""
The steps of the source (support.steps): the table names them all, and the switch changes nothing else.
"""

import ast
import re
from pathlib import Path

import pytest
from support import steps

PACKAGE = Path(__file__).resolve().parents[2] / "doorpool"
SOURCES = {path.stem: path.read_text() for path in sorted(PACKAGE.glob("*.py"))}


def test_every_step_of_the_table_stands_in_the_source_once_and_no_other():
    found = [(name, module) for module, source in SOURCES.items() for name in steps.steps_in(source)]
    assert sorted(found) == sorted((name, module) for name, (module, _) in steps.STEPS.items())


def test_no_step_is_misspelt():
    """A line that looks like a step and is none would be passed for ever."""
    lines = [
        line for source in SOURCES.values() for line in source.split("\n") if re.search(r"#.*step\s*:", line)
    ]
    assert [line for line in lines if not steps.steps_in(line)] == []


@pytest.mark.parametrize("module", sorted({module for module, _ in steps.STEPS.values()}))
def test_under_the_switch_nothing_but_the_steps_is_new(module):
    source = SOURCES[module]
    stepped = steps.stepped(source)
    assert len(stepped.split("\n")) == len(source.split("\n"))
    tree = ast.parse(stepped)
    called = [node for node in ast.walk(tree) if _is_step(node)]
    assert len(called) == len(steps.steps_in(source))
    for node in ast.walk(tree):
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, block, None), list):
                statements[:] = [statement for statement in statements if not _is_step(statement)]
    assert _where_all_begins(tree) == _where_all_begins(ast.parse(source))


def _where_all_begins(tree):
    """The nodes and where they begin.  (A block that a step closes ends a line later.)"""
    for node in ast.walk(tree):
        for name in ("end_lineno", "end_col_offset"):
            if hasattr(node, name):
                delattr(node, name)
    return ast.dump(tree, include_attributes=True)


def _is_step(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "__step__"
    )


def test_the_library_itself_knows_no_switch():
    assert not any("__step__" in source for source in SOURCES.values())


def test_a_process_under_the_switch_arrives_at_the_steps(run_python, door_dir):
    script = """
        from support import steps
        steps.install()
        from doorpool import Proxy, Server

        arrived = []
        for name in steps.STEPS:
            steps.at(name, lambda name=name: arrived.append(name))
        steps.at("request-sent", lambda: arrived.append("the second request"), nth=2)
        with Server() as server:
            server.attach(abs, "a.door")
            with Proxy("a.door") as proxy:
                assert (proxy(-1), proxy(-2), proxy(-3)) == (1, 2, 3)
        result(arrived)
    """
    arrived = run_python(script, cwd=door_dir).value
    assert "request-sent" not in arrived
    assert arrived.index("replying") < arrived.index("the second request")
    assert len(set(arrived)) == len(arrived), "each only once"
    modules = {steps.STEPS[name][0] for name in arrived if name in steps.STEPS}
    assert modules == {module for module, _ in steps.STEPS.values()} - {"_channel"}


def test_the_switch_comes_first(run_python):
    script = """
        import doorpool
        from support import steps
        try:
            steps.install()
        except RuntimeError as error:
            result(str(error))
    """
    assert "already" in run_python(script).value
