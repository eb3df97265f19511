"""Holds the figures of a comparison against their bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from edgeforge.verification.bounds import Bound, Checked, decide
from edgeforge.verification.comparison import Comparison
from edgeforge.verification.intervals import Interval

# What other integers may cost, as a share of the quantization error: they are as good as those of
# the store, and as far from FLOAT in directions of their own.
_OTHER_INTEGERS = 2.0


def judged(
    figures: Comparison, bounds: Mapping[str, Bound], *, other_integers: bool = False
) -> list[Checked]:
    """Holds each figure of a comparison that has a bound against it.

    Args:
        figures: of one artifact.
        bounds: by the figure's name.
        other_integers: whether the artifact has a few other integers than QUANTIZED for a reason
            that is no fault: the lowering error then includes what they cost.
    """
    known = figures.intervals
    found: dict[str, tuple[float, Interval | None]] = {}
    for name in ("lowering", "total"):
        divergence = getattr(figures, name)
        intervals = None if known is None else getattr(known, name)
        for figure in ("kl_mean", "top1_agreement"):
            interval = None if intervals is None else getattr(intervals, figure)
            found[f"{name}.{figure}"] = getattr(divergence, figure), interval
        found[f"{name}.kl_p99"] = divergence.kl_p99, None
    perplexity = {name: each.value for name, each in figures.perplexity.items()}
    ratio = perplexity["artifact"] / perplexity["float"]
    found["perplexity_ratio"] = ratio, None if known is None else known.perplexity_ratio
    found["lowering.perplexity_ratio"] = perplexity["artifact"] / perplexity["quantized"], None
    checks = []
    for name, bound in bounds.items():
        if name not in found:
            continue
        value, interval = found[name]
        beside = getattr(figures.quantization, name.partition(".")[2], math.nan)
        if other_integers:
            bound = replace(bound, share=max(bound.share, _OTHER_INTEGERS))
        ends = None if interval is None else (interval.low, interval.high)
        tokens = figures.lowering.tokens
        checks.append(decide(bound.beside(beside), value, ends, tokens=tokens))
    return checks
