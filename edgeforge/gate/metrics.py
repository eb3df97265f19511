"""The figures that a policy may bound, by their dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edgeforge.verification.bounds import ADJUSTABLE, Sense

SIZE, GROWTH, BITS = "size.bytes", "size.growth", "size.bits_per_weight"
DECODE, PREFILL = "decode_ratio", "prefill_ratio"
BENCH, DEVICE = "bench.", "device."
"""How names begin of what `bench` measured, and of what `verify --device` did."""
BENCH_DECODE, BENCH_PREFILL = f"{BENCH}{DECODE}", f"{BENCH}{PREFILL}"
SPREAD, TEXT_AGREEMENT = f"{BENCH}spread", f"{BENCH}text_agreement"

MODULE: Final = "module."
"""How names begin of what `verify` finds of a module; its sizes have the names of all artifacts."""
TOTAL: Final = f"{MODULE}total"

MODULE_FIGURES: Final[Mapping[str, Sense]] = {
    TOTAL: "at most",
    f"{MODULE}quantization": "at most",
    f"{MODULE}lowering": "at most",
    f"{MODULE}cosine": "at least",
}
"""What a policy may bound of modules: each is that of the worst output."""

FIGURES: Final[Mapping[str, Sense]] = {
    **ADJUSTABLE,
    **MODULE_FIGURES,
    SIZE: "at most",
    GROWTH: "at most",
    BITS: "at most",
    SPREAD: "at most",
    TEXT_AGREEMENT: "at least",
    **{
        f"{DEVICE}{name}": sense for name, sense in ADJUSTABLE.items() if name != "float.perplexity"
    },
}
"""What ``bounds`` of a policy may name, and which side of a bound is good."""

SHARES: Final = frozenset(
    {
        SPREAD,
        TEXT_AGREEMENT,
        *(name for name in FIGURES if name.endswith((".top1_agreement", "routing.agreement"))),
    }
)
"""Figures that are shares, of at most 1."""

RATIOS: Final = (DECODE, PREFILL)
"""Speeds, which are bounded only as ratios to a reference that runs in the same job."""

BENCH_RATIOS: Final = (BENCH_DECODE, BENCH_PREFILL)
"""The same as `bench` measured them, on any device."""


@dataclass(frozen=True)
class Paired:
    """A figure that is compared with a baseline's over the same tokens.

    Attributes:
        column: the column of `edgeforge.verification.intervals.BlockSums` it is the mean of.
        worse: the sign of a change for the worse.
        relative: by which share of the baseline's figure it may change before that is called a
            regression, or by how much where ``is_share``. Another processor or another version of
            a runtime rounds the same artifact otherwise at every token, which no interval covers.
        of_total: by which share of the baseline's total divergence it may change, too: what the
            runtime adds matters beside what quantization costs.
        is_share: whether ``relative`` is absolute, as the figure is a share already.
        is_log: whether the column holds negative log likelihoods, whose difference is the logarithm
            of the ratio of two perplexities.
    """

    column: str
    worse: int
    relative: float
    of_total: float = 0.0
    is_share: bool = False
    is_log: bool = False


COMPARED: Final[Mapping[str, Paired]] = {
    "total.kl_mean": Paired("total kl", +1, 0.01),
    "total.top1_agreement": Paired("total top1", -1, 0.001, is_share=True),
    "perplexity_ratio": Paired("artifact", +1, 0.001, is_log=True),
    "lowering.kl_mean": Paired("lowering kl", +1, 0.05, of_total=0.02),
}
"""What is compared with a baseline, by the figure's name."""

MODULE_COMPARED: Final[Mapping[str, float]] = {TOTAL: 0.05}
"""The same of modules, with the share of the baseline's figure that it may get worse by.

The inputs are the same ones, so that there is no noise but the rounding of another processor or
another version of a runtime.
"""


def number_text(name: str, value: float) -> str:
    """A figure in the form that fits its name: three digits, a share in percent, a size.

    >>> number_text("total.kl_mean", 0.03625), number_text("total.top1_agreement", 0.91234)
    ('0.0362', '91.2 %')
    >>> number_text("size.bytes", 3_400_000)
    '3.40 MB'
    """
    if name in SHARES:
        return f"{100 * value:.1f} %"
    if name == SIZE:
        return f"{value / 1e6:.2f} MB"
    return f"{value:.4g}" if "ratio" in name or name == GROWTH else f"{value:.3g}"
