"""
Draw the map from behaviours to the tests that prove them.

    python tests/idmap.py             print the map
    python tests/idmap.py --write     write it into tests/README.md

The tests are read, not imported: what counts is ``@pytest.mark.ids(...)`` on a test function or
class, in ``pytestmark``, and in the ``marks`` of a ``pytest.param``.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
README = TESTS / "README.md"
BEGIN, END = "<!-- map: begin -->", "<!-- map: end -->"


IDS: dict[str, Any] = tomllib.loads((TESTS / "ids.toml").read_text())

#: Every behaviour that has to be proven, in the order of the map, and what it says.
TITLES: dict[str, str] = IDS["doors"] | IDS["threats"]


def is_door(identifier: str) -> bool:
    """Tell the IDs of doors from those of threats: these have two digits, or end with a t."""
    number = identifier[1:]
    limit = IDS["ranges"]["doors"].get(identifier[:1], 0)
    return number.isdecimal() and not number.startswith("0") and int(number) <= limit


def exists(identifier: str) -> bool:
    """
    Tell whether there is such an ID at all, proven or not.
    """
    if is_door(identifier):
        return True
    limit = IDS["ranges"]["threats"].get(identifier[:1], 0)
    found = re.fullmatch(r"[A-Z](\d\d)t?", identifier)
    return (
        found is not None
        and 1 <= int(found[1]) <= limit
        and identifier.endswith("t") == is_door(identifier[:3])
    )


def order(identifier: str) -> tuple[bool, int, int]:
    """Doors before threats; their letters in the order of the lists; then by number."""
    kind = "doors" if is_door(identifier) else "threats"
    number = int(identifier[1:].removesuffix("t"))
    return kind == "threats", list(IDS["ranges"][kind]).index(identifier[0]), number


def ids_in(node: ast.AST) -> Iterator[str]:
    """The IDs of the ``ids`` marks anywhere in an expression."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.ids"):
            for argument in call.args:
                if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                    raise ValueError(f"an ID must be written out: {ast.unparse(call)}")
                yield argument.value


def proofs_in(tree: ast.Module, where: str) -> Iterator[tuple[str, str]]:
    """Pairs of ID and test in one file."""

    def walk(body: list[ast.stmt], inherited: list[str], prefix: str) -> Iterator[tuple[str, str]]:
        for statement in body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "pytestmark":
                inherited = [*inherited, *ids_in(statement.value)]
        for statement in body:
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            mine = inherited + [id_ for decorator in statement.decorator_list for id_ in ids_in(decorator)]
            name = f"{prefix}::{statement.name}"
            if isinstance(statement, ast.ClassDef):
                yield from walk(statement.body, mine, name)
            elif statement.name.startswith("test"):
                yield from ((identifier, name) for identifier in mine)

    yield from walk(tree.body, [], where)


def proofs() -> dict[str, list[str]]:
    """Every ID that a test has, with its tests in the order of files and lines."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        where = path.relative_to(TESTS).as_posix()
        for identifier, test in proofs_in(ast.parse(path.read_text(), str(path)), where):
            tests = found.setdefault(identifier, [])
            if test not in tests:
                tests.append(test)
    return found


def table() -> str:
    """The map, as it stands in the README."""
    found = proofs()
    lines = ["| ID | Behaviour | Tests |", "|---|---|---|"]
    for identifier in sorted(TITLES.keys() | found.keys(), key=order):
        tests = "<br>".join(f"`{test}`" for test in found.get(identifier, ())) or "none yet"
        lines.append(f"| {identifier} | {TITLES.get(identifier, '')} | {tests} |")
    return "\n".join(lines)


def with_map(text: str) -> str:
    """The text of the README with the present map in it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        README.write_text(with_map(README.read_text()))
    else:
        print(table())
