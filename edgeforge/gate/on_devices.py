"""Holds what was found on devices against a policy: by `verify --device`, and by `bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from device_harness.measuring.bench import ArmRatio, Bench
from device_harness.measuring.record import Cell, Figure
from edgeforge.gate.judge import DEFAULT, held
from edgeforge.gate.metrics import BENCH, BENCH_DECODE, BENCH_RATIOS, DEVICE, SPREAD, number_text
from edgeforge.gate.policy import Range, Ratio, Terms
from edgeforge.gate.reports import Figure as Value
from edgeforge.gate.reports import Report
from edgeforge.gate.result import Finding
from edgeforge.measurements.bench_file import BENCH as BENCH_FILE
from edgeforge.measurements.bench_file import of_artifact, read_bench_file
from edgeforge.verification.bounds import Bound, decide
from edgeforge.verification.freshness import sha256_of
from exporters.manifest import MANIFEST

_SPEEDS: Final[tuple[Figure, ...]] = ("prefill", "decode")


def needs_bench(terms: Terms) -> bool:
    """Whether a policy asks for what `bench` measures."""
    return any(name.startswith(BENCH) for name in (*terms.bounds, *terms.ratios))


def held_on_devices(report: Report, terms: Terms) -> Iterator[Finding]:
    """Holds the runs of `verify --device` against a policy, device by device.

    What the policy does not name keeps the verdict of the verification.

    Args:
        report: of the artifact.
        terms: of the policy, for this artifact.
    """
    for each in report.elsewhere:
        for check in each.named_checks:
            if check.name not in terms.bounds:
                yield Finding.of(check, "bound", DEFAULT)
    for name, given in terms.bounds.items():
        if not name.startswith(DEVICE):
            continue
        for each in report.elsewhere:
            value = each.figures.get(name.removeprefix(DEVICE))
            for finding in held(name, given, value, each.tokens, (f"on {each.device}",)):
                yield replace(finding, message=f"on {each.device}: {finding.message}")
        if not report.elsewhere:
            cure = "no device ran it: run `edgeforge verify --device NAME` on it"
            yield from _missing(name, given, cure)


def read_own_bench(folder: Path) -> Bench | None:
    """What `bench` measured of an artifact as it is now; None where nothing was.

    Raises:
        UsageError: its ``bench.json`` cannot be read.
    """
    try:
        found = read_bench_file(folder / BENCH_FILE)
    except FileNotFoundError:
        return None
    own = of_artifact(found, sha256_of(folder / MANIFEST))
    return own if own.cells else None


def held_bench(folder: Path, bench: Bench | None, terms: Terms) -> Iterator[Finding]:
    """Holds what `bench` measured against a policy, cell by cell.

    Args:
        folder: the artifact.
        bench: what was measured of it; None for nothing.
        terms: of the policy, for this artifact.
    """
    for name, given in terms.bounds.items():
        if name.startswith(BENCH):
            yield from _held_figure(folder, bench, name, given)
    for name, ratio in terms.ratios.items():
        if name in BENCH_RATIOS:
            yield from _held_ratio(folder, bench, name, ratio)


def _held_figure(folder: Path, bench: Bench | None, name: str, given: Range) -> Iterator[Finding]:
    if bench is None:
        yield from _missing(name, given, f"nothing was measured: run `edgeforge bench {folder}`")
        return
    for cell in bench.cells:
        where = (_place(cell),)
        value = _spread(cell) if name == SPREAD else _agreement(cell)
        figure = None if value is None else Value(value)
        for finding in held(name, given, figure, None, where):
            yield finding if value is not None else replace(finding, message=_no_figure(name, cell))


def _held_ratio(folder: Path, bench: Bench | None, name: str, ratio: Ratio) -> Iterator[Finding]:
    figure = "decode" if name == BENCH_DECODE else "prefill"
    try:
        against = sha256_of(ratio.against / MANIFEST)
    except OSError:
        yield _failed(name, ratio, f"{ratio.against} is no artifact to hold it against")
        return
    again = f"run `edgeforge bench {ratio.against} {folder}`, so that the two take turns"
    found = [] if bench is None else _ratios(bench, figure, against)
    chosen = [each for each in found if fnmatchcase(each.device, ratio.device)]
    if not chosen:
        on = "" if ratio.device == "*" else f" on {ratio.device}"
        yield _failed(name, ratio, f"there is no such measurement{on} of both as they are: {again}")
        return
    assert bench is not None
    real = [each for each in chosen if not bench.device(each.device).is_emulated]
    if not real:
        named = ", ".join(dict.fromkeys(each.device for each in chosen))
        yield _failed(name, ratio, f"{named} is emulated, and its times are no speed: {again}")
    for each in real:
        ends = None if each.low is None or each.high is None else (each.low, each.high)
        where = (
            f"on {each.device}, {each.prompt} + {each.output} tokens",
            f"against {ratio.against}",
            f"{each.pairs} pairs by turns",
        )
        bound = Bound(name, ratio.at_least, "at least")
        yield Finding.of(decide(bound, each.value, ends, where=where), "reference", ratio.source)


def _ratios(bench: Bench, figure: str, against: str) -> list[ArmRatio]:
    """The ratios to a reference, whichever of the two stood first when they were measured."""
    found = []
    for each in bench.ratios:
        if each.figure == figure and each.against == against and each.of != against:
            found.append(each)
        elif each.figure == figure and each.of == against:
            low, high = (None if end is None else 1 / end for end in (each.high, each.low))
            found.append(replace(each, value=1 / each.value, low=low, high=high))
    return found


def _missing(name: str, given: Range, why: str) -> Iterator[Finding]:
    for finding in held(name, given, None, None, ()):
        limit = "" if finding.limit is None else number_text(name, finding.limit)
        words = f"{name} must be {finding.sense} {limit}, and {why}"
        yield replace(finding, message=words)


def _failed(name: str, ratio: Ratio, why: str) -> Finding:
    return Finding(
        metric=name,
        outcome="failed",
        kind="reference",
        sense="at least",
        limit=ratio.at_least,
        source=ratio.source,
        message=f"{name} must be at least {number_text(name, ratio.at_least)}, and {why}",
    )


def _place(cell: Cell) -> str:
    return f"on {cell.device}, {cell.prompt} + {cell.output} tokens"


def _no_figure(name: str, cell: Cell) -> str:
    why = cell.failed or cell.text.reason or "too few runs count"
    return f"{name}, {_place(cell)}: there is no figure, as {why}"


def _spread(cell: Cell) -> float | None:
    """The larger spread of a cell's two speeds."""
    spreads: Sequence[float | None] = [
        None if summary is None else summary.spread
        for summary in (cell.summary(figure) for figure in _SPEEDS)
    ]
    known = [each for each in spreads if each is not None]
    return max(known, default=None)


def _agreement(cell: Cell) -> float | None:
    return cell.text.agreed / cell.text.of if cell.text.of else None
