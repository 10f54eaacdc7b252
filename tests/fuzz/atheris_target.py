"""
The other side parses or refuses: no crash, no hang, nothing run, nothing that nobody sent; for runs of hours.

    pip install -e '.[test,fuzz]'
    python tests/fuzz/atheris_target.py wire CORPUS -max_total_time=3600
    python tests/fuzz/atheris_target.py data CORPUS -max_total_time=3600
    python tests/fuzz/atheris_target.py pickles CORPUS -max_total_time=3600

CORPUS is a folder: conversations that went well are written into it first, one a file, and what atheris (a
libFuzzer for Python) finds to lead anywhere new goes there too, for the next run.  The rest of the words are
libFuzzer's.  An input that breaks a rule is kept as ``crash-*``, one that takes over ten seconds as
``timeout-*``; either alone, in place of CORPUS, repeats it.

An input begins with a byte that chooses who reads the rest.  The rules are those of ``test_wire.py``,
``test_data.py``, ``test_atoms.py`` and ``test_batches.py``; ``test_atheris.py`` runs the corpus through them.

What strangers send is read by ``wire`` and ``data``, the latter with the help of ``_keys.c``.  No pickle of
theirs is read, so ``_atoms.c`` and ``_batches.c`` see but those of our own user, who could do worse with one:
what ``pickles`` looks for is a value that pickle itself would not have made.  What these write and take
(``pack_call``, ``pack_value``, ``pack_items``, ``take_items``) are objects of this process, and no bytes.
atheris sees no branches of C; it spoils what it has.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

if __name__ == "__main__":
    import atheris

    sys.path[:1] = map(str, Path(__file__).resolve().parents[1:3])
    instrumented = atheris.instrument_imports(include=["doorpool"])
else:
    instrumented = contextlib.nullcontext()

with instrumented:
    from fuzz import test_atoms, test_batches, test_data, test_sockets, test_wire
    from support import rawpeer, start_python
    from support.audit import audited

    from doorpool import _impl

#: For libFuzzer, where it is not told otherwise; no message of the corpus is as long.
DEFAULTS = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048"]

_LOOK_EVERY = 1000  # inputs; to count our descriptors costs as much as to read one

_SMALL = 4096  # bytes; a larger bomb is for test_bombs


class Target:
    """
    Somebody who reads: called with an input, it raises if a rule is broken.

    Args:
        readers: of whom the first byte of an input chooses one; each tells whether it could make sense of it.
        seeds: inputs to start from, by reader.
    """

    def __init__(self, readers: list[Callable[[bytes], object]], seeds: list[tuple[int, bytes]]) -> None:
        self._readers = readers
        self.seeds = [bytes([reader]) + message for reader, message in seeds]
        self._count = 0
        self._base = len(os.listdir("/proc/self/fd"))

    def __call__(self, data: bytes) -> object:
        if not data:
            return None
        self._count += 1
        sense = self._readers[data[0] % len(self._readers)](data[1:])
        if self._count % _LOOK_EVERY == 0:
            self.check_descriptors()
        return sense

    def check_descriptors(self) -> None:
        """Make sure that nothing has stayed open of all that was read."""
        count = len(os.listdir("/proc/self/fd"))
        assert count <= self._base, f"{count} descriptors are open, {self._base} were"

    def write_seeds(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for seed in self.seeds:
            (folder / hashlib.sha1(seed).hexdigest()).write_bytes(seed)


# -- conversations that go well


@attrs.frozen
class Conversation:
    """
    What is said when a client opens a channel and calls once.
    """

    kind: str  # of door
    greeting: bytes
    knock: bytes
    answer: bytes
    request: bytes
    reply: bytes


def conversations() -> Iterator[Conversation]:
    """
    Have real clients call a server by hand, and say what they said to a real server in another process.
    """
    with tempfile.TemporaryDirectory(prefix="dp-") as folder:
        with start_python(test_sockets.SERVER, folder) as child:
            child.wait_ready()
            for call in test_sockets.CALLS:
                yield _conversation(folder, *test_sockets.conversation(call))
            child.terminate()


def _conversation(folder: str, kind: str, knock: bytes, request: bytes, brought: int) -> Conversation:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door, open(os.devnull) as file:
        door.connect(f"{folder}/{kind}.door")
        with rawpeer.RawClient(door.fileno(), opening=False) as client:
            greeting = client.greeting()
            client.knock(knock)
            answer, (channel,) = client.answer()
            client.channel = socket.socket(fileno=channel)
            client.channel.settimeout(rawpeer.PATIENCE)
            client.send(request, [file.fileno()] * brought)
            reply, came = rawpeer.receive(client.channel)
            for number in came:
                os.close(number)
            return Conversation(kind, greeting, knock, answer, request, reply)


def body(frame: bytes) -> bytes:
    """What a frame without buffers carries."""
    return frame[rawpeer.HEAD :]


# -- the targets


def wire() -> Target:
    """Whatever comes over a socket: greetings, knocks, answers, refusals, limits, and frames."""
    names = list(test_wire.LETTERS)
    readers: list[Callable[[bytes], object]] = [
        functools.partial(test_wire.check_letter, decode) for decode, _, _ in test_wire.LETTERS.values()
    ]
    readers.append(_check_frame)
    frames = len(names)
    seeds = [
        (number, message)
        for number, (_, _, messages) in enumerate(test_wire.LETTERS.values())
        for message in messages
    ]
    seeds += [(frames, _cut(7) + frame) for frame in test_wire.FRAMES]
    for said in conversations():
        for name in ("greeting", "knock", "answer"):
            seeds.append((names.index(name), getattr(said, name)))
        seeds += [(frames, _cut(40, 1) + said.request), (frames, _cut(64) + said.reply)]
    return Target(readers, seeds)


def _cut(*sizes: int) -> bytes:
    """How the frame behind it is to be cut: how many sizes, and each, over and over."""
    return bytes([len(sizes), *sizes])


def _check_frame(data: bytes) -> object:
    count = 1 + (data[0] - 1) % 4 if data else 1
    sizes = [size or 1 for size in data[1 : 1 + count]] or [1]
    return test_wire.check_frame(data[1 + count :], sizes)


def plain() -> Target:
    """Plain data: arguments, for each procedure of a table, and outcomes of calls, at the caller."""
    procedures = list(test_data.TABLE)
    readers: list[Callable[[bytes], object]] = [
        functools.partial(_check_arguments, procedure) for procedure in procedures
    ]
    readers.append(_check_outcome)
    anything, outcomes = procedures.index(test_data.anything), len(procedures)
    seeds = [(number, test_data.MESSAGES[procedure]) for number, procedure in enumerate(procedures)]
    seeds += [(anything, bomb) for bomb in test_data.BOMBS.values() if len(bomb) < _SMALL]
    seeds += [(outcomes, outcome) for outcome in test_data.OUTCOMES]
    for said in conversations():
        if said.kind == "data":
            seeds += [(anything, body(said.request)), (outcomes, body(said.reply))]
    test_data.import_what_is_imported_at_first()
    return Target(readers, seeds)


def _check_arguments(procedure: Callable[..., None], data: bytes) -> object:
    return test_data.check_arguments(procedure, data, audited)


def _check_outcome(data: bytes) -> object:
    return test_data.check_outcome(data, audited)


def pickles() -> Target:
    """Pickles that the compiled part reads, of arguments, results and batches; or leaves to pickle."""
    readers: list[Callable[[bytes], object]] = [test_atoms.check, test_batches.check]
    atoms = [*test_atoms.PICKLES, *test_atoms.PACKED_CALLS, *test_atoms.FOREIGN]
    return Target(readers, [(0, data) for data in atoms] + [(1, data) for data in test_batches.PICKLES])


TARGETS = {"wire": wire, "data": plain} | ({"pickles": pickles} if _impl.NAME == "c" else {})


def main(words: list[str]) -> None:
    target = TARGETS[words[1]]()
    if not words[2].startswith("-") and not Path(words[2]).is_file():
        target.write_seeds(Path(words[2]))
    atheris.Setup([words[0], *DEFAULTS, *words[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    main(sys.argv)
