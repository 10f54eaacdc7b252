"""
The target of the long runs keeps every rule with the corpus it starts from, and notices who breaks one.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from fuzz import atheris_target, test_wire
from fuzz.atheris_target import TARGETS

from doorpool import _data, _wire

pytestmark = pytest.mark.ids("H01", "H03")

each = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture(scope="module")
def targets():
    return {name: make() for name, make in TARGETS.items()}


@each
def test_the_corpus(targets, name):
    """Each conversation that went well makes sense to whom it is for."""
    target = targets[name]
    sense = [seed for seed in target.seeds if target(seed)]
    readers = {seed[0] for seed in target.seeds}
    assert {seed[0] for seed in sense} >= readers - {_no_sense(name)}
    target.check_descriptors()


def _no_sense(name):
    """A door needs more of its maker than there is here: it is refused in the end."""
    return (
        list(atheris_target.test_data.TABLE).index(atheris_target.test_data.doors) if name == "data" else None
    )


@each
def test_inputs_that_are_too_short(targets, name):
    for reader in range(256):
        targets[name](bytes([reader]))
        targets[name](bytes([reader, 255, 255]))
    assert targets[name](b"") is None


@each
def test_the_corpus_is_written_one_input_a_file(targets, name, tmp_path):
    targets[name].write_seeds(tmp_path / "corpus")
    written = {path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    assert written == set(targets[name].seeds)
    assert len(written) > 20


def test_a_decoder_that_crashes_is_noticed(targets, monkeypatch):
    target = targets["wire"]
    frames = [seed for seed in target.seeds if seed[0] == len(test_wire.LETTERS)]
    monkeypatch.setattr(_wire.Assembly, "feed", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        target(frames[0])


def test_a_codec_that_imports_is_noticed(targets, monkeypatch):
    target = targets["data"]
    monkeypatch.setattr(_data, "unpack_arguments", lambda data: eval("((), {})"))
    with pytest.raises(AssertionError, match="compile"):
        target(target.seeds[0])


def test_a_leak_is_noticed(targets):
    target = targets["data"]
    left = [os.dup(0) for _ in range(20)]
    try:
        with pytest.raises(AssertionError, match="descriptors are open"):
            target.check_descriptors()
    finally:
        for number in left:
            os.close(number)


@each
def test_atheris_runs_it(name, tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed (the extra 'fuzz')")
    words = [sys.executable, atheris_target.__file__, name, tmp_path / "corpus", "-runs=3000"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert "Done 3000" in done.stderr
