"""
The examples: each runs as two processes or three, and prints what its docstrings say that it prints.
"""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doorpool import Proxy

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LESSONS = sorted(path.name for path in EXAMPLES.iterdir() if (path / "server.py").exists())

#: What a side prints at its end of who it was, by the kernel's word: real, effective, saved, of files.
WHO = """
import json
with open("/proc/self/status") as status:
    ids = dict(line.lower().split(":", 1) for line in status)
names = ("uid", "gid", "groups")
print(json.dumps({name: [int(number) for number in ids[name].split()] for name in names}))
"""

#: Lines an example may have.
FITS_ON_A_PAGE = 40


def shown_output(script: Path) -> list[str]:
    """What the docstring of a script says that it prints: its indented lines."""
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    assert docstring is not None, f"{script} has no docstring"
    return [line.removeprefix("    ") for line in docstring.splitlines() if line.startswith("    ")]


def lines_of(side: str, printed: str) -> list[str]:
    """What one side printed, from what the runner shows."""
    prefix = f"{side} | "
    return [line.removeprefix(prefix) for line in printed.splitlines() if line.startswith(prefix)]


def run(lesson: str | Path) -> str:
    finished = subprocess.run(
        [sys.executable, EXAMPLES / "run.py", lesson],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (finished.returncode, finished.stderr) == (0, ""), finished.stdout
    return finished.stdout


def test_there_are_examples():
    numbers = [int(lesson[:2]) for lesson in LESSONS]
    assert numbers == list(range(1, 18))


@pytest.mark.parametrize("lesson", LESSONS)
def test_all_sides_print_what_their_docstrings_show(lesson):
    printed = run(lesson)
    scripts = sorted((EXAMPLES / lesson).glob("*.py"))
    for script in scripts:
        assert lines_of(script.stem, printed) == shown_output(script)
    assert len(printed.splitlines()) == sum(len(lines_of(script.stem, printed)) for script in scripts)


@pytest.mark.parametrize(
    "script", sorted(EXAMPLES.glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_an_example_fits_on_a_page(script):
    assert len(script.read_text().splitlines()) < FITS_ON_A_PAGE


def test_every_lesson_is_in_the_course():
    course = (EXAMPLES / "README.md").read_text()
    assert [lesson for lesson in LESSONS if f"[`{lesson}`]({lesson})" not in course] == []


def test_three_users_get_a_door_through_a_door(root_only, tmp_path):
    """The lesson as it stands, but that each side says at its end who it was."""
    lesson = tmp_path / "09_door_through_a_door"
    shutil.copytree(EXAMPLES / lesson.name, lesson)
    for script in lesson.glob("*.py"):
        script.write_text(script.read_text() + WHO)
    printed = run(lesson)
    sides = [json.loads(lines_of(script.stem, printed)[-1]) for script in sorted(lesson.glob("*.py"))]
    assert [side["uid"] for side in sides] == [[uid] * 4 for uid in (65534, 4202, 4201)]
    assert [side["gid"] for side in sides] == [[uid] * 4 for uid in (65534, 4202, 4201)]
    assert [side["groups"] for side in sides] == [[], [], []]
    assert "client | Well, hello to you too!" in printed.splitlines()


def test_progress_is_a_bar_on_a_terminal(door_dir, spawn_python):
    pytest.importorskip("rich")
    lesson = EXAMPLES / "15_callbacks_and_progress"
    spawn_python((lesson / "server.py").read_text(), cwd=door_dir)
    Proxy(str(door_dir / "server.door"), wait=10).close()
    shown = on_a_terminal([sys.executable, str(lesson / "client.py")], door_dir)
    for words in ("0%", "too small: b", "resizing", "100%", "['tiny a', 'tiny c', 'tiny d']"):
        assert words in shown


def on_a_terminal(command: list[str], cwd: Path) -> str:
    """Run a program on a terminal of its own, to its end; return what it shows."""
    ours, theirs = os.openpty()
    with open(ours, "rb", buffering=0) as screen:
        environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(EXAMPLES.parent)}
        program = subprocess.Popen(
            command, cwd=cwd, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        shown = bytearray()
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while more := screen.read(4096):
                shown += more
        assert program.wait() == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_cleanly_and_takes_its_name_away(number, door_dir, spawn_python, run_python):
    """As the course says: two terminals, and Ctrl-C."""
    lesson = EXAMPLES / "03_hello_world"
    server = spawn_python((lesson / "server.py").read_text(), cwd=door_dir)
    client = (
        'import doorpool; doorpool.Proxy("server.door", wait=10).close()\n'
        + (lesson / "client.py").read_text()
    )
    assert run_python(client, cwd=door_dir).stdout == "Well, hello to you too!\n"
    server.signal(number)
    assert (server.wait(), server.stderr) == (0, "")
    assert os.listdir(door_dir) == []
