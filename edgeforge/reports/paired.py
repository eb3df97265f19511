"""Artifacts held against the first of them, over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

from edgeforge.cards.card import Measure
from edgeforge.cards.figures import number, ratio, share
from edgeforge.errors import UsageError
from edgeforge.gate.metrics import SHARES
from edgeforge.measurements.bench_file import BENCH
from edgeforge.reports.reported import Reported, read_artifacts, require_reports
from edgeforge.reports.speeds import Side, Speeds, compare_speeds, side_of_artifact, sides_of_file
from edgeforge.verification.artifacts import find_artifacts
from edgeforge.verification.intervals import BlockSums, paired_difference
from exporters.modules.manifest import is_module

COMPARE_VERSION: Final = 1
LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Outcome = Literal["better", "worse", "not told apart"]


@dataclass(frozen=True)
class Compared:
    """A figure that artifacts are compared by.

    Attributes:
        name: its dotted name, as policies have it.
        label: its name for people.
        column: of `BlockSums`, whose mean it is; of perplexities the logarithm.
        worse: the sign of a change for the worse.
        is_log: whether a difference of the column is told as a ratio.
    """

    name: str
    label: str
    column: str
    worse: int = +1
    is_log: bool = False

    @property
    def form(self) -> Callable[[float | None], str]:
        """How its value is written."""
        if self.is_log:
            return ratio
        return share if self.name in SHARES else number

    def of(self, artifact: Reported) -> Measure:
        """Its value and interval in an artifact's report."""
        if self.is_log:
            return artifact.perplexity_ratio
        return artifact.measure(*self.name.split("."))


FIGURES: Final = (
    Compared("total.kl_mean", "KL from FLOAT", "total kl"),
    Compared("quantization.kl_mean", "  quantization error", "quantization kl"),
    Compared("lowering.kl_mean", "  lowering error", "lowering kl"),
    Compared("total.top1_agreement", "same top-1 as FLOAT", "total top1", worse=-1),
    Compared("perplexity_ratio", "perplexity / FLOAT's", "artifact", is_log=True),
)


@dataclass(frozen=True)
class Difference:
    """How much an artifact's figure differs from the first artifact's, on the same tokens.

    Attributes:
        artifact: the artifact's place, from 0.
        figure: the figure's dotted name.
        change: the difference; of perplexities the ratio.
        low: the lower end of its interval; None where the text is too short for one.
        high: the upper end.
        outcome: what the interval tells.
    """

    artifact: int
    figure: str
    change: float
    low: float | None
    high: float | None
    outcome: Outcome


@dataclass(frozen=True)
class Comparison:
    """Artifacts side by side.

    Attributes:
        artifacts: all of them; the first is what the others are held against.
        differences: of the others, where they were measured on the same tokens.
        apart: by an artifact's place, why it cannot be held against the first, a phrase.
        speeds: what `bench` measured of them; None where it measured none.
    """

    artifacts: tuple[Reported, ...]
    differences: tuple[Difference, ...]
    apart: Mapping[int, str]
    speeds: Speeds | None = None

    def to_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "schema_version": COMPARE_VERSION,
            "artifacts": [_row(each) for each in self.artifacts],
            "differences": [asdict(each) for each in self.differences],
            "not_compared": {str(place): reason for place, reason in self.apart.items()},
            "speeds": None if self.speeds is None else self.speeds.to_json(),
        }


def compare(places: Sequence[Path]) -> Comparison:
    """Holds artifacts against the first of them; nothing is run.

    Speeds are compared where `bench` measured at least two of them. Where one is a file or an
    artifact of a module, or was measured and has no report, speeds are all that is compared.

    Args:
        places: artifacts that were verified or measured, folders with such in them, or
            ``bench.json`` files.

    Raises:
        UsageError: there are fewer than two, more than 26, or one without a report that holds.
        ExportError: a folder is no artifact.
    """
    modules = any(map(is_module, find_artifacts([p for p in places if p.is_dir()])))
    if modules or any(place.is_file() or place.suffix == ".json" for place in places):
        return Comparison((), (), {}, _speeds(_all_sides(places)))
    artifacts = read_artifacts(places)
    sides = [side_of_artifact(each.folder) for each in artifacts]
    known = [side for side in sides if side is not None]
    if len(known) == len(artifacts) > 1 and any(each.report is None for each in artifacts):
        return Comparison((), (), {}, _speeds(known))
    found = _paired(artifacts)
    # Letters stand for artifacts, so that speeds need them all.
    return replace(found, speeds=_speeds(known)) if len(known) == len(artifacts) else found


def _all_sides(places: Sequence[Path]) -> list[Side]:
    found: list[Side] = []
    for place in places:
        if place.is_file() or place.suffix == ".json":
            found += sides_of_file(place)
            continue
        for folder in find_artifacts([place]):
            side = side_of_artifact(folder)
            if side is None:
                raise UsageError(
                    f"{folder} has no {BENCH} of this export: run `edgeforge bench {folder}` first"
                )
            found.append(side)
    return found


def _speeds(sides: Sequence[Side]) -> Speeds:
    _require_some(len(sides))
    return compare_speeds(sides)


def _require_some(count: int) -> None:
    """Refuses what is too few to compare, or more than there are letters."""
    if not 2 <= count <= len(LETTERS):
        raise UsageError(
            f"{count} artifact{'s were' if count != 1 else ' was'} named; 2 to {len(LETTERS)} can "
            f"be compared"
        )


def _paired(artifacts: Sequence[Reported]) -> Comparison:
    """Holds artifacts with reports against the first of them."""
    _require_some(len(artifacts))
    require_reports(artifacts)
    first, *others = artifacts
    apart = {
        place: reason
        for place, other in enumerate(others, 1)
        if (reason := why_apart(first, other)) is not None
    }
    pairs = [place for place in range(1, len(artifacts)) if place not in apart]
    looked_at = max(1, len(pairs) * len(FIGURES))
    differences = [
        _difference(place, figure, artifacts[place], first, looked_at)
        for place in pairs
        for figure in FIGURES
    ]
    return Comparison(tuple(artifacts), tuple(differences), apart)


def why_apart(one: Reported, other: Reported) -> str | None:
    """Why two reports are not of the same tokens, a phrase; None where they are."""
    assert one.report is not None and other.report is not None
    before, now = one.report, other.report
    if one.tokenizer != other.tokenizer:
        return "it has another tokenizer, so its tokens are others"
    if before.freshness.text != now.freshness.text:
        return f"it was measured on another text: {now.text}, not {before.text}"
    if before.tokens != now.tokens:
        return f"it was measured on {now.tokens:,} tokens, not {before.tokens:,}"
    if before.sums is None or now.sums is None:
        return "it was measured on too little text for paired differences"
    if _shape(before.sums) != _shape(now.sums):
        return "it was measured on other blocks of the text, as one of another context is"
    if before.freshness.checkpoint != now.freshness.checkpoint:
        return "it is of another checkpoint, and each is held against its own"
    return None


def _shape(sums: BlockSums) -> object:
    return sums.unit_blocks, sums.counts


def _difference(
    place: int, figure: Compared, artifact: Reported, first: Reported, looked_at: int
) -> Difference:
    assert artifact.report is not None and first.report is not None
    now, before = artifact.report.sums, first.report.sums
    assert now is not None and before is not None
    found = paired_difference(now, before, figure.column, looked_at)
    change = _mean(now, figure.column) - _mean(before, figure.column)
    low, high = found.low, found.high
    outcome: Outcome = "not told apart"
    if figure.worse * low > 0 and figure.worse * high > 0:
        outcome = "worse"
    elif figure.worse * low < 0 and figure.worse * high < 0:
        outcome = "better"
    if figure.is_log:
        change, low, high = (_exp(each) for each in (change, low, high))
    if not (math.isfinite(low) and math.isfinite(high)):
        return Difference(place, figure.name, change, None, None, "not told apart")
    return Difference(place, figure.name, change, low, high, outcome)


def _mean(sums: BlockSums, column: str) -> float:
    return math.fsum(sums.sums[column]) / math.fsum(sums.counts[column])


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _row(artifact: Reported) -> dict[str, object]:
    report = artifact.report
    assert report is not None
    return {
        "folder": str(artifact.folder),
        "target": artifact.manifest.target,
        "recipe": artifact.manifest.recipe,
        "runtime": report.runtime,
        "text": report.text,
        "tokens": report.tokens,
        "bytes": artifact.bytes,
        "bits_per_weight": artifact.manifest.bits_per_weight,
        "figures": {figure.name: asdict(figure.of(artifact)) for figure in FIGURES},
    }
