"""The algorithms that a plan may name, and what each can do. Their code is in `quant.quantizers`.

A plan is read, checked and written without any quantizer. Only filling a store needs them, and a
contract test holds `quant.quantizers.registry` to this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat, WeightFormat

CAST: Final = "cast"
"""The algorithm of float formats: every weight is rounded to the nearest float."""
IMPORTED: Final = "imported"
"""The algorithm of weights whose integers and scales the checkpoint itself holds."""
SIGNED: Final = "rtn-signed"
"""The data-free algorithm whose scales may be below zero, which not every runtime holds."""


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm can do.

    Attributes:
        integers: whether it fills integer formats.
        palettes: whether it fills palettes.
        calibrated: whether it must know what enters a matrix.
        rescales: whether it multiplies columns first, where their inputs can be divided. Such an
            algorithm looks at the float program alone.
        positive: the algorithm like it whose scales are never below zero, where its own may be.
    """

    integers: bool = False
    palettes: bool = False
    calibrated: bool = False
    rescales: bool = False
    positive: str | None = None


# The first that fills a format is the one that is taken when a recipe names none.
ALGORITHMS: Final = {
    "rtn": Algorithm(integers=True),
    SIGNED: Algorithm(integers=True, positive="rtn"),
    "rtn-minmax": Algorithm(integers=True),
    "kmeans": Algorithm(palettes=True),
    "kmeans-weighted": Algorithm(palettes=True, calibrated=True),
    "gptq": Algorithm(integers=True, palettes=True, calibrated=True),
    "gptq-order": Algorithm(integers=True, palettes=True, calibrated=True),
    "gptq-signed": Algorithm(integers=True, calibrated=True, positive="gptq-order"),
    "awq": Algorithm(integers=True, calibrated=True, rescales=True),
    "smoothquant": Algorithm(integers=True, calibrated=True, rescales=True),
    "smoothquant-search": Algorithm(integers=True, calibrated=True, rescales=True),
}
"""By name, every algorithm that chooses codes."""

POSITIVE: Final = {name: a.positive for name, a in ALGORITHMS.items() if a.positive is not None}
"""Algorithms whose scales may be below zero, each with the one like it whose scales may not."""

SCALES_INPUTS: Final = tuple(
    name for name, a in ALGORITHMS.items() if a.integers and (a.rescales or not a.calibrated)
)
"""Algorithms beside which the scale of a weight's inputs can be found on the float program."""


def is_calibrated(algorithm: str) -> bool:
    """Whether an algorithm must know what enters a matrix."""
    return algorithm in ALGORITHMS and ALGORITHMS[algorithm].calibrated


def algorithms_for(format: WeightFormat) -> tuple[str, ...]:
    """The algorithms that can fill a format, the one to take when none is asked for first."""
    match format:
        case IntFormat():
            return tuple(name for name, given in ALGORITHMS.items() if given.integers)
        case PaletteFormat():
            return tuple(name for name, given in ALGORITHMS.items() if given.palettes)
        case FloatFormat():
            return (CAST,)


def known_algorithms() -> tuple[str, ...]:
    """Every algorithm that a recipe may name."""
    return tuple(ALGORITHMS)
