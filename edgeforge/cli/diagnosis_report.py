"""What `diagnose` prints: layer by layer, weight by weight, and what to do. 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final

from edgeforge.cli.exits import one_line
from edgeforge.diagnosis.diagnose import Diagnosis, advice
from edgeforge.diagnosis.noise import PointNoise, decibels
from edgeforge.diagnosis.weights import by_kind
from edgeforge.sizes import size_text

WIDTH: Final = 80
MOST_WEIGHTS: Final = 10
_BAR: Final = 20
_FULL_BAR: Final = 60.0  # dB: a bar of full length


def diagnosis_lines(diagnosis: Diagnosis, *, full: bool = False) -> Iterator[str]:
    """Yields the lines of a report.

    Args:
        diagnosis: what was found.
        full: every matrix instead of the dearest.
    """
    yield one_line(f"{diagnosis.target}, {diagnosis.recipe}, ran in {diagnosis.runtime}")[:WIDTH]
    yield f"{diagnosis.tokens:,} tokens of {one_line(diagnosis.text)}"[:WIDTH]
    yield ""
    yield "Signal to noise in dB: of QUANTIZED against FLOAT, of ARTIFACT against QUANTIZED"
    for each in diagnosis.noise:
        yield _noise_line(each, is_break=each.point == diagnosis.leaves)
    if diagnosis.weights:
        yield ""
        yield "KL from FLOAT with one matrix alone as stored, nats a token"
        shown = diagnosis.weights if full else diagnosis.weights[:MOST_WEIGHTS]
        for cost in shown:
            share = f"{100 * cost.share:5.1f} %"
            yield f"{cost.kl:9.2e} {share}  {cost.format:<12} {cost.name}"
        rest = len(diagnosis.weights) - len(shown)
        if rest:
            left = sum(cost.share for cost in diagnosis.weights[len(shown) :])
            yield f"          {100 * left:5.1f} %  {rest} other matrices (--full lists them)"
        kinds = [
            f"{kind} {100 * share:.0f} %" for kind, share in by_kind(diagnosis.weights).items()
        ]
        yield from _wrapped(f"By kind: {', '.join(kinds)}")
    if diagnosis.outliers:
        yield ""
        yield "Channels far beyond the median channel, in what enters a matrix"
        for outlier in diagnosis.outliers:
            yield (
                f"{outlier.times:8.0f} x  channel {outlier.channel:<5} token {outlier.token:<4} "
                f"{outlier.weight}"
            )[:WIDTH]
    for sentence in diagnosis.unshown:
        yield ""
        yield from _wrapped(f"Not measured: {one_line(sentence)}")
    yield ""
    found = advice(diagnosis)
    for sentence in found:
        yield from _wrapped(f"- {sentence}")
    if not found:
        yield "Nothing stands out: no single matrix is worth more bits, and no layer breaks."
    if diagnosis.upgrades:
        costs = sum(each.costs for each in diagnosis.upgrades)
        yield from _wrapped(
            f"All {len(diagnosis.upgrades)} together cost {size_text(costs)}. `export --recipe "
            f"mixed --bits-per-weight N` chooses such formats for a budget."
        )


def _noise_line(each: PointNoise, *, is_break: bool) -> str:
    quantization, lowering = decibels(each.quantization), decibels(each.lowering)
    mark = "  <- leaves QUANTIZED" if is_break else ""
    return (
        f"{each.point!s:<22} {_number(quantization)} {_bar(quantization)}"
        f"  {_number(lowering)} {_bar(lowering) if not mark else ''}{mark}"
    ).rstrip()


def _number(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.1f}"


def _bar(value: float | None) -> str:
    if value is None:
        return " " * _BAR
    filled = round(_BAR * min(max(value, 0.0), _FULL_BAR) / _FULL_BAR)
    return ("#" * filled).ljust(_BAR)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
