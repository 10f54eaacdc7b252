"""
What was measured, for people and for programs: a table with the bars, JSON, a plot.

A value is the median, over the rounds, of what a row reads off a round's samples.  A bar is judged on the
unrounded number.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

from benchmarks import _machine
from benchmarks._machine import Placement
from benchmarks._run import Result
from benchmarks._workloads import Bar, Row, Workload

_TITLE, _CELL, _COUNT = 50, 16, 9

LEGEND = """\
Each column is a placement: both sides pinned, each to a CPU of its own or both to one, or left to the
scheduler.  Numbers are medians over rounds in which all took turns; n: samples in the first column.  A bar is
judged in one placement, as the median of the ratios of the rounds; numbers in brackets are printed only.
benchmarks/README.md says what is counted."""


@attrs.frozen
class Verdict:
    """
    A bar in a placement.
    """

    bar: Bar
    placement: Placement
    measured: float | None
    """None: somebody whom it takes was not measured."""

    @property
    def judged(self) -> bool:
        """Whether the bar stands in this placement; elsewhere its number is of interest only."""
        return self.placement.key == self.bar.placement

    @property
    def word(self) -> str:
        """Say how it stands."""
        if self.measured is None:
            return "not measured"
        return "met" if self.bar.met(self.measured) else "MISSED"


@attrs.frozen
class Section:
    """
    A row of a workload, with all that was measured for it.
    """

    workload: Workload
    row: Row
    results: tuple[Result, ...]
    placements: tuple[Placement, ...]

    def rounds(self, placement: Placement) -> dict[str, list[float]]:
        """Return the values of the rounds, by the peers' keys."""
        here = (result for result in self.results if result.placement == placement)
        return {it.peer.key: [self.row.read(samples) for samples in it.rounds] for it in here}

    def values(self, placement: Placement) -> dict[str, float]:
        """Return the values, by the peers' keys."""
        rounds = self.rounds(placement)
        return {key: statistics.median(values) for key, values in rounds.items() if values}

    def verdicts(self) -> Iterator[Verdict]:
        """Return every bar in every placement."""
        for bar in self.row.bars:
            for placement in self.placements:
                yield Verdict(bar, placement, bar.measured(self.rounds(placement)))

    def peers(self) -> dict[str, dict[str, Result]]:
        """Return the results of each peer, by placement."""
        found: dict[str, dict[str, Result]] = {}
        for result in self.results:
            found.setdefault(result.peer.key, {})[result.placement.key] = result
        return found


def sections(results: Sequence[Result], placements: Sequence[Placement]) -> list[Section]:
    """Return the rows of all workloads, in their order."""
    workloads = list({it.workload.key: it.workload for it in results}.values())
    return [
        Section(workload, row, tuple(_of(results, workload, row)), tuple(placements))
        for workload in workloads
        for row in workload.rows
    ]


def _of(results: Iterable[Result], workload: Workload, row: Row) -> Iterator[Result]:
    """Return the results that a row is about."""
    return (it for it in results if it.workload is workload and (not row.only or it.peer.key in row.only))


def head(about: Mapping[str, Any]) -> str:
    """Return where, and with what, the numbers were taken."""
    machine = about["machine"]
    cpus = ", ".join(map(str, machine["cpus"]))
    where = f"{machine['processor']}, CPUs {cpus}, {machine['system']}, {machine['python']}"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join(filter(None, (where, versions, about["doorpool"])))


# -- the table --------------------------------------------------------------------------------------


def table(found: Sequence[Section], array: str) -> str:
    """Return the table, and what is to be said beneath it."""
    lines = [line for section in found for line in (*_section(section, array), "")]
    return "\n".join([*lines, *_failures(found), LEGEND, "", _summary(found)])


def _section(section: Section, array: str) -> Iterator[str]:
    title = f"{section.row.title.format(array=array)} [{section.row.unit}]"
    yield _line(title, [it.title for it in section.placements], "n")
    values = {it.key: section.values(it) for it in section.placements}
    for key, results in section.peers().items():
        first = next(iter(results.values()))
        cells = [_cell(results.get(it.key), values[it.key].get(key)) for it in section.placements]
        yield _line(f"  {first.peer.name}", cells, str(_samples(first) or ""))
    for bar in section.row.bars:
        here = any(it.key == bar.placement for it in section.placements)
        cells = [_verdict(section, bar, it) for it in section.placements]
        yield _line(f"  bar: {bar.text}", cells, "" if here else "unjudged")


def _line(title: str, cells: Iterable[str], count: str = "") -> str:
    """Return a line of cells; long ones say why there is no number, the same everywhere, and once."""
    cells = list(cells)
    long = next((cell for cell in cells if len(cell) >= _CELL), None)
    if long is not None:
        return f"{title:{_TITLE}}  {long}"
    return f"{title:{_TITLE}}{''.join(cell.rjust(_CELL) for cell in cells)}{count:>{_COUNT}}".rstrip()


def _cell(result: Result | None, value: float | None) -> str:
    if value is not None:
        return number(value)
    if result is None:
        return "-"
    return "failed" if result.failed else result.note


def _samples(result: Result) -> int:
    """Return how many there are; a turn of one call gives one, whatever it tells of it."""
    return len(result.rounds) if result.workload.calls == 1 else sum(map(len, result.rounds))


def _verdict(section: Section, bar: Bar, placement: Placement) -> str:
    verdict = Verdict(bar, placement, bar.measured(section.rounds(placement)))
    if verdict.measured is None:
        return verdict.word if verdict.judged else ""
    value = number(verdict.measured) + ("x" if bar.under else "")
    return f"{value} {verdict.word}" if verdict.judged else f"({value})"


def number(value: float) -> str:
    """Return three digits, or all there are before the point."""
    if value >= 1000:
        return f"{value:,.0f}"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


def _failures(found: Sequence[Section]) -> Iterator[str]:
    told = set()
    for result in (it for section in found for it in section.results if it.failed):
        where = f"{result.peer.name} failed at {result.workload.key}, {result.placement.title}:"
        if where not in told:
            told.add(where)
            yield f"{where}\n{result.note}\n"


def _summary(found: Sequence[Section]) -> str:
    words = [it.word for section in found for it in section.verdicts() if it.judged]
    bars = sum(len(section.row.bars) for section in found)
    unjudged = bars - words.count("met") - words.count("MISSED")
    return f"{words.count('met')} bars met, {words.count('MISSED')} missed, {unjudged} not measured"


# -- JSON -------------------------------------------------------------------------------------------


_DISTRIBUTIONS = {"zmq": "pyzmq", "grpc": "grpcio"}


def facts(needs: Iterable[str]) -> dict[str, Any]:
    """Return where, and with what, the numbers were taken."""
    names = ["doorpool", *(_DISTRIBUTIONS.get(name, name) for name in needs)]
    versions = {name: version for name in dict.fromkeys(names) if (version := _version(name))}
    return {"machine": _machine.description(), "versions": versions, "doorpool": _doorpool()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _doorpool() -> str:
    """Return what doorpool says of itself, if it has a command line."""
    command = [sys.executable, "-m", "doorpool", "--version"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    return finished.stdout.strip() if finished.returncode == 0 else ""


def as_json(found: Sequence[Section], about: Mapping[str, object], array: str) -> str:
    """Return all numbers: the values of the rounds, and the bars."""
    rows = [_row_as_dict(section, array) for section in found]
    return json.dumps({**about, "array": array, "rows": rows}, indent=1)


def _row_as_dict(section: Section, array: str) -> dict[str, Any]:
    return {
        "workload": section.workload.key,
        "title": section.row.title.format(array=array),
        "unit": section.row.unit,
        "peers": [_result_as_dict(section, result) for result in section.results],
        "bars": [_verdict_as_dict(it) for it in section.verdicts() if it.judged],
    }


def _result_as_dict(section: Section, result: Result) -> dict[str, Any]:
    rounds = [section.row.read(samples) for samples in result.rounds]
    return {
        "peer": result.peer.key,
        "placement": result.placement.key,
        "value": statistics.median(rounds) if rounds else None,
        "rounds": rounds,
        "samples": _samples(result),
        "note": result.note,
    }


def _verdict_as_dict(verdict: Verdict) -> dict[str, Any]:
    return {
        "bar": verdict.bar.text,
        "placement": verdict.placement.key,
        "measured": verdict.measured,
        "verdict": verdict.word,
    }


# -- the plot ---------------------------------------------------------------------------------------


_COLUMNS = 2
_LOGARITHMIC = 8  # times the smallest value; below, lengths say more on a scale from 0
_INK = {"doorpool": "#c0392b", "floor": "#7f8c8d", "peer": "#2c3e50"}


def plot(found: Sequence[Section], path: Path, array: str) -> None:
    """
    Draw every row in the placement of its first bar; a dotted line is where a bar has doorpool.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = -(-len(found) // _COLUMNS)
    figure, grid = pyplot.subplots(lines, _COLUMNS, figsize=(15, 4 * lines), squeeze=False)
    for axes in grid.flat[len(found) :]:
        axes.remove()
    for axes, section in zip(grid.flat, found, strict=False):
        _draw(axes, section, array)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(axes: Any, section: Section, array: str) -> None:
    placement = _placement(section)
    values = {key: value for key, value in section.values(placement).items() if value > 0}
    names = {it.peer.key: it.peer.name for it in section.results}
    inks = [_ink(key) for key in values]
    bars = axes.barh([names[key] for key in values], list(values.values()), color=inks)
    axes.bar_label(bars, [number(value) for value in values.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    if max(values.values(), default=1) > _LOGARITHMIC * min(values.values(), default=1):
        axes.set_xscale("log")
    axes.margins(x=0.15)
    title = section.row.title.format(array=array)
    axes.set_title(f"{title} [{section.row.unit}], {placement.title}", fontsize=10)
    for bar in section.row.bars:
        if bar.placement == placement.key and (needed := _needed(bar, values)):
            axes.axvline(needed, linestyle=":", color=_INK["doorpool"])


def _placement(section: Section) -> Placement:
    """Return the placement of a row's first bar, if it was measured."""
    wanted = section.row.bars[0].placement
    return next((it for it in section.placements if it.key == wanted), section.placements[0])


def _ink(key: str) -> str:
    return _INK[next((kind for kind in ("doorpool", "floor") if key.startswith(kind)), "peer")]


def _needed(bar: Bar, values: Mapping[str, float]) -> float | None:
    """Return the value with which doorpool would just meet a bar."""
    limit = bar.at_most if bar.at_most < float("inf") else bar.at_least
    if not bar.under:
        return limit
    other = bar.over if bar.under.startswith("doorpool") else bar.under
    if other not in values:
        return None
    return values[other] / limit if other == bar.over else values[other] * limit
