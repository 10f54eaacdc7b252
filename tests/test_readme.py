"""
The README: its commands are the ones that are run, and its example is the one that is tested.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def without_docstring(script: Path) -> str:
    """A script from its first line after the docstring on."""
    text = script.read_text()
    docstring = ast.parse(text).body[0]
    assert docstring.end_lineno is not None
    return "\n".join(text.splitlines()[docstring.end_lineno :]).strip()


def test_there_are_two_commands_of_one_line_each():
    first, second = blocks("sh")
    assert first.count("\n") == second.count("\n") == 1
    assert "examples/run.py 03_hello_world" in first
    assert second.endswith("-m pytest -n 3\n")


@pytest.mark.parametrize("which", [0, 1], ids=["example", "tests"])
def test_ci_runs_the_commands_of_the_readme_to_the_letter(which):
    assert blocks("sh")[which].strip() in CI.splitlines()


def test_the_readme_of_the_tests_has_the_same_command():
    assert blocks("sh")[1].strip() in (ROOT / "tests" / "README.md").read_text()


@pytest.mark.parametrize("name", ["server.py", "client.py"])
def test_the_example_is_the_third_lesson(name):
    shown = [block for block in blocks("python") if block.startswith(f"# {name}\n")]
    assert [block.partition("\n")[2].strip() for block in shown] == [
        without_docstring(ROOT / "examples" / "03_hello_world" / name)
    ]


def test_the_output_shown_is_that_of_the_example():
    (shown,) = blocks("text")
    lesson = ROOT / "examples" / "03_hello_world"
    expected = [
        f"{side} | {line.strip()}"
        for side in ("server", "client")
        for line in (ast.get_docstring(ast.parse((lesson / f"{side}.py").read_text())) or "").splitlines()
        if line.startswith("    ")
    ]
    assert shown.splitlines() == expected


@pytest.mark.parametrize("block", blocks("python"))
def test_python_in_the_readme_is_python(block):
    ast.parse(block)


@pytest.mark.parametrize(
    "document", [README, (ROOT / "examples" / "README.md").read_text()], ids=["README", "course"]
)
def test_links_lead_somewhere(document):
    folder = ROOT if document is README else ROOT / "examples"
    targets = re.findall(r"\]\(([^)#]+)\)", document)
    missing = [target for target in targets if "://" not in target and not (folder / target).exists()]
    assert missing == []
