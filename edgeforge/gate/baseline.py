"""`Baseline`: earlier figures as sums over blocks of tokens, and what got worse since."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from edgeforge.errors import UsageError
from edgeforge.gate.metrics import COMPARED, Paired, number_text
from edgeforge.gate.module_baseline import ModuleEntry, read_entry
from edgeforge.gate.reports import Report, read_sums
from edgeforge.gate.result import Finding, Outcome
from edgeforge.output_folder.whole_file import whole_file
from edgeforge.verification.intervals import BlockSums, paired_difference
from exporters.manifest_records import integer, mapping, number, text
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json
from quant.json_output import json_text
from quant.quoted import quoted
from quant.sealed_json import seal, unseal

BASELINE = "baseline.json"
BASELINE_VERSION = 1
LARGEST_BASELINE = 1 << 30
_KIND = "edgeforge baseline"
# A divergence of less than that, in nats a token, is what rounding of logits gives.
_NO_DIVERGENCE = 1e-5
_TOTAL = "total.kl_mean"


@dataclass(frozen=True)
class Entry:
    """One artifact's earlier figures.

    Attributes:
        target: the runtime's format.
        recipe: how it was quantized.
        checkpoint: digest of the checkpoint.
        text: digest of the evaluated text; empty for random tokens.
        tokenizer: digest of the tokenizer's file; empty without one.
        tokens: tokens of the text.
        artifact_bytes: size of all files.
        figures: values by dotted name.
        sums: of each figure over the same units of tokens.
    """

    target: str
    recipe: str
    checkpoint: str
    text: str
    tokenizer: str
    tokens: int
    artifact_bytes: int
    figures: Mapping[str, float]
    sums: BlockSums


@dataclass(frozen=True)
class Baseline:
    """Earlier figures by the artifact's path, relative to the policy's folder.

    Attributes:
        entries: of language models.
        modules: of modules.
    """

    entries: Mapping[str, Entry] = field(default_factory=dict)
    modules: Mapping[str, ModuleEntry] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            UsageError: something else lies there that nobody asked to lose.
            OSError: it cannot be written.
        """
        if path.exists():
            _refuse_stranger(path)
        content = {
            "kind": _KIND,
            "schema_version": BASELINE_VERSION,
            "entries": {name: asdict(entry) for name, entry in sorted(self.entries.items())},
            "modules": {name: asdict(entry) for name, entry in sorted(self.modules.items())},
        }
        with whole_file(path) as stream:
            stream.write((seal(json.loads(json_text(content)), indent=1) + "\n").encode())


def read_baseline(path: Path) -> Baseline:
    """Reads a baseline.

    Raises:
        UsageError: there is none, it is damaged, or it has another schema.
    """
    _refuse_stranger(path)
    again = "write it anew with --update-baseline"
    try:
        data = unseal(read_input(path, LARGEST_BASELINE))
    except (OSError, ValueError):
        raise UsageError(f"the baseline {path} was changed by hand or damaged: {again}") from None
    try:
        entries = mapping(data["entries"], "entries")
        modules = mapping(data.get("modules", {}), "modules")  # earlier files have none
        return Baseline(
            {name: _entry(entry) for name, entry in entries.items()},
            {name: read_entry(entry) for name, entry in modules.items()},
        )
    except (KeyError, TypeError) as error:
        raise UsageError(f"the baseline {path} is not complete ({error}): {again}") from None


def _refuse_stranger(path: Path) -> None:
    """Refuses what is no baseline, or has another schema; both before its digest is looked at."""
    try:
        data = parse_json(read_input(path, LARGEST_BASELINE), strict=False)
    except FileNotFoundError:
        raise UsageError(
            f"there is no baseline {path}: write one with --update-baseline, on artifacts that "
            f"you trust"
        ) from None
    except OSError as error:
        raise UsageError(f"the baseline {path} cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise UsageError(f"{path} is no baseline of EdgeForge: it {error}") from None
    if not isinstance(data, dict) or data.get("kind") != _KIND:
        raise UsageError(f"{path} is no baseline of EdgeForge: choose another place for it")
    version = data.get("schema_version")
    if version != BASELINE_VERSION or isinstance(version, bool):
        raise UsageError(
            f"the baseline {path} has schema version {quoted(version)}; this EdgeForge reads "
            f"{BASELINE_VERSION}: move it away and write it anew with --update-baseline"
        )


def entry_of(report: Report, target: str, recipe: str, tokenizer: str) -> Entry | None:
    """What a baseline holds of an artifact; None where its text is too short to compare."""
    if report.sums is None:
        return None
    return Entry(
        target=target,
        recipe=recipe,
        checkpoint=report.freshness.checkpoint,
        text=report.freshness.text,
        tokenizer=tokenizer,
        tokens=report.tokens,
        artifact_bytes=report.artifact_bytes,
        figures={
            name: figure.value
            for name, figure in report.figures.items()
            if name in COMPARED and figure.value is not None
        },
        sums=report.sums,
    )


def require_comparable(path: Path, name: str, before: Entry, now: Entry | None) -> None:
    """Refuses a baseline whose entry is of another model, target or text.

    Args:
        path: the baseline's file.
        name: the artifact's, as the baseline has it.
        before: the baseline's entry.
        now: what the entry would be now; None where the text is too short.

    Raises:
        UsageError: says what differs.
    """
    again = "; if that is what you want, write it anew with --update-baseline"
    if now is None:
        raise UsageError(
            f"{name} was measured on too few tokens to compare with the baseline {path}: raise "
            f"tokens until there are at least four blocks of 512"
        )
    for key, what in (
        ("target", "another target"),
        ("checkpoint", "another checkpoint"),
        ("text", "another text"),
        ("tokenizer", "another tokenizer"),
        ("tokens", "another number of tokens"),
    ):
        if getattr(before, key) != getattr(now, key):
            was, found = getattr(before, key), getattr(now, key)
            found, was = ((str(each) or "none")[:16] for each in (found, was))
            raise UsageError(
                f"the baseline {path} has {name} of {what} ({was}; it is {found} now), which "
                f"cannot be compared{again}"
            )
    alike = before.sums.unit_blocks == now.sums.unit_blocks
    if not alike or before.sums.counts != now.sums.counts:
        raise UsageError(
            f"the baseline {path} has {name} in other blocks of tokens, which cannot be "
            f"compared{again}"
        )


def compare(before: Entry, now: Entry, worse_by: Mapping[str, float]) -> list[Finding]:
    """Holds figures against a baseline's over the same tokens.

    A figure got worse only where the interval of its change, over the same units of tokens, lies
    beyond what may change.

    Args:
        before: the baseline's entry.
        now: what it would be now.
        worse_by: how much a figure may change, by its name, as `Paired.relative`.
    """
    return [
        _compared(name, paired, before, now, worse_by.get(name, paired.relative))
        for name, paired in COMPARED.items()
        if name in before.figures and name in now.figures and _TOTAL in before.figures
    ]


def _compared(name: str, paired: Paired, before: Entry, now: Entry, relative: float) -> Finding:
    change = _mean(now.sums, paired.column) - _mean(before.sums, paired.column)
    interval = paired_difference(now.sums, before.sums, paired.column, len(COMPARED))
    low, high = interval.low, interval.high
    if paired.is_log:
        change, low, high = (_factor(each) for each in (change, low, high))
    allowed = relative
    if not paired.is_share and not paired.is_log:
        shares = (relative * before.figures[name], paired.of_total * before.figures[_TOTAL])
        allowed = max(*shares, _NO_DIVERGENCE)
    least = min(paired.worse * low, paired.worse * high)
    outcome: Outcome = "passed"
    if not math.isfinite(change) or least > allowed:
        outcome = "failed"
    elif paired.worse * change > allowed:
        outcome = "doubtful"
    return Finding(
        metric=name,
        outcome=outcome,
        kind="baseline",
        value=now.figures[name],
        baseline=before.figures[name],
        change=change,
        change_low=low,
        change_high=high,
        limit=paired.worse * allowed,
        sense="at most" if paired.worse > 0 else "at least",
        source="the baseline",
        message=_sentence(name, paired, before, now, (change, low, high), allowed, outcome),
    )


def _sentence(
    name: str,
    paired: Paired,
    before: Entry,
    now: Entry,
    change: tuple[float, float, float],
    allowed: float,
    outcome: Outcome,
) -> str:
    value, was = (number_text(name, each.figures[name]) for each in (now, before))
    middle, low, high = (change_text(name, each) for each in change)
    words = f"{name} is {value} and was {was} in the baseline, a change of {middle} "
    words += f"[{low}, {high}] on the same tokens"
    if outcome == "failed":
        words += f", which is worse by more than {change_text(name, allowed).lstrip('+')}"
        if before.recipe != now.recipe:
            words += f" (the recipe was {before.recipe} and is {now.recipe})"
    elif outcome == "doubtful":
        words += ", which may be worse, or the noise of this text"
    return words


def change_text(name: str, change: float) -> str:
    """A change in the form that fits the figure.

    >>> change_text("total.kl_mean", 0.00123), change_text("total.top1_agreement", -0.0123)
    ('+0.00123', '-1.23 points')
    >>> change_text("perplexity_ratio", 0.0123)
    '+1.23 %'
    """
    paired = COMPARED.get(name)
    if paired is None:  # of a module
        return f"{change:+.3g}"
    if paired.is_share:
        return f"{100 * change:+.2f} points"
    return f"{100 * change:+.2f} %" if paired.is_log else f"{change:+.3g}"


def _mean(sums: BlockSums, column: str) -> float:
    return math.fsum(sums.sums[column]) / math.fsum(sums.counts[column])


def _factor(log: float) -> float:
    return math.expm1(log) if log < 700 else math.inf


def _entry(data: object) -> Entry:
    row = mapping(data, "an entry")
    figures = mapping(row["figures"], "figures")
    sums = read_sums(mapping(row["sums"], "sums"))
    for paired in COMPARED.values():
        if paired.column not in sums.sums:
            raise KeyError(paired.column)
    return Entry(
        **{name: text(row, name) for name in ("target", "recipe", "checkpoint", "text")},
        tokenizer=text(row, "tokenizer"),
        tokens=integer(row, "tokens"),
        artifact_bytes=integer(row, "artifact_bytes"),
        figures={name: number(figures, name) for name in figures},
        sums=sums,
    )
