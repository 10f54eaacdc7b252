"""
``python -m benchmarks``: measure doorpool beside the others, and say which bars it meets.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _machine, _peers, _report, _run, _workloads
from benchmarks._machine import Placement
from benchmarks._peers import Peer
from benchmarks._run import Effort, Result
from benchmarks._workloads import Workload

_NUMBERS_OF_A_MEGABYTE = 1_000_000 // 8  # float64

#: What a quick run has beside doorpool: nothing that needs to be installed.
_QUICK_PEERS = "raw,connection,manager,pool"

_PLACEMENTS = "two,one,free"


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure doorpool beside the other ways to call a function of another process.",
    )
    add, peers, every = parser.add_argument, _keys(_peers.PEERS), _keys(_workloads.WORKLOADS)
    add("workloads", nargs="*", metavar="WORKLOAD", help=f"of {every}; all if none is given")
    add("--peers", metavar="LIST", help=f"with commas, of {peers}; doorpool is always among them")
    add("--placements", metavar="LIST", help=f"with commas, of {_PLACEMENTS}")
    add("--cpus", metavar="LIST", help="the CPUs to use, with commas: the client's, then the server's")
    add("--rounds", type=int, metavar="N", help="rounds of every workload")
    add("--megabytes", type=int, default=100, metavar="N", help="the length of the arrays (default: 100)")
    add(
        "--quick",
        action="store_true",
        help="to see that it runs: some seconds, no extra needed",
    )
    add("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="for JSON and plot")
    options = parser.parse_args(words)
    if options.quick:
        options.peers, options.megabytes = options.peers or _QUICK_PEERS, 1
    return options


def _keys(items: Sequence[Any]) -> str:
    return ",".join(it.key for it in items)


def _chosen(items: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Return the items of these names, in their own order."""
    unknown = set(names) - {it.key for it in items}
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {_keys(items)}")
    return [it for it in items if it.key in names]


def _workloads_of(options: argparse.Namespace) -> list[Workload]:
    return _chosen(_workloads.WORKLOADS, options.workloads or [it.key for it in _workloads.WORKLOADS])


def _peers_of(options: argparse.Namespace) -> list[Peer]:
    if options.peers is None:
        return list(_peers.PEERS)
    return _chosen(_peers.PEERS, ["doorpool", *filter(None, options.peers.split(","))])


def _placements_of(options: argparse.Namespace) -> list[Placement]:
    cpus = [int(cpu) for cpu in options.cpus.split(",")] if options.cpus else sorted(os.sched_getaffinity(0))
    possible = _machine.placements(cpus)
    return _chosen(possible, options.placements.split(",")) if options.placements else possible


def _effort_of(options: argparse.Namespace) -> Effort:
    length = options.megabytes * _NUMBERS_OF_A_MEGABYTE
    if options.quick:
        return Effort(length, rounds=options.rounds or 2, share=0.04)
    return Effort(length, rounds=options.rounds)


def _measure(options: argparse.Namespace, placements: Sequence[Placement]) -> list[Result]:
    """Measure everything that was asked for."""
    peers, effort, results = _peers_of(options), _effort_of(options), []
    for workload in _workloads_of(options):
        few = options.quick and options.placements is None
        for placement in _few(workload, placements) if few else placements:
            _tell(f"{workload.key}, {placement.title}")
            others = [_peers.DOORPOOL] if workload.alone else peers
            results += _run.measure(workload, placement, [*others, *workload.extra], effort)
    _tell("")
    return results


def _few(workload: Workload, placements: Sequence[Placement]) -> Sequence[Placement]:
    """Return the placements in which a workload has bars, if this machine allows any of them."""
    wanted = {bar.placement for row in workload.rows for bar in row.bars}
    return [it for it in placements if it.key in wanted] or placements[:1]


def _tell(what: str) -> None:
    """Say what is being measured, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write; return 1 if a peer failed."""
    options = _arguments(words)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # with nothing left behind
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = "1"  # NumPy's threads would be in the way of a fork, and are not needed
    placements = _placements_of(options)
    about = _report.facts(it.needs for it in _peers.PEERS if it.needs)
    results = _measure(options, placements)
    found, array = _report.sections(results, placements), f"{options.megabytes} MB"
    print(_report.head(about), _report.table(found, array), sep="\n\n")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(_report.as_json(found, about, array))
    try:
        _report.plot(found, options.out / "results.png", array)
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed")
    print(f"written to {options.out}/")
    return int(any(it.failed for it in results))


if __name__ == "__main__":
    sys.exit(main())
