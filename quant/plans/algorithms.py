"""The algorithms that a plan may name, and what each can do. Their code is in `quant.quantizers`.

Reading, checking and writing a plan imports no quantizer; only filling a store does. A contract
test checks that `quant.quantizers.registry` agrees with this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat, WeightFormat

CAST: Final = "cast"
"""The algorithm of float formats: it rounds every weight to the nearest float."""
IMPORTED: Final = "imported"
"""The algorithm of weights that the checkpoint already holds as integers with scales."""
SIGNED: Final = "rtn-signed"
"""The data-free algorithm that may choose negative scales; not every runtime accepts them."""


ROUNDING_VERSION: Final = 3
"""Raised when an algorithm gives other codes or scales than before: stores are made again then."""


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm can do.

    Attributes:
        integers: whether it fills integer formats.
        palettes: whether it fills palette formats.
        calibrated: whether it needs statistics of a matrix's inputs from a calibration text.
        rescales: whether it multiplies a weight's columns before rounding, where the inputs can be
            divided by the same factors. Such an algorithm calibrates on the float program only.
        positive: the counterpart whose scales are never negative, for an algorithm whose own
            scales may be; None otherwise.
    """

    integers: bool = False
    palettes: bool = False
    calibrated: bool = False
    rescales: bool = False
    positive: str | None = None


# The order matters: the first row that fills a format is its default algorithm.
ALGORITHMS: Final = {
    "rtn": Algorithm(integers=True),
    SIGNED: Algorithm(integers=True, positive="rtn"),
    "rtn-minmax": Algorithm(integers=True),
    "kmeans": Algorithm(palettes=True),
    "kmeans-weighted": Algorithm(palettes=True, calibrated=True),
    "gptq": Algorithm(integers=True, palettes=True, calibrated=True),
    "gptq-order": Algorithm(integers=True, palettes=True, calibrated=True),
    "gptq-descent": Algorithm(integers=True, palettes=True, calibrated=True),
    "gptq-signed": Algorithm(integers=True, calibrated=True, positive="gptq-order"),
    "gptq-descent-signed": Algorithm(integers=True, calibrated=True, positive="gptq-descent"),
    "awq": Algorithm(integers=True, calibrated=True, rescales=True),
    "smoothquant": Algorithm(integers=True, calibrated=True, rescales=True),
    "smoothquant-search": Algorithm(integers=True, calibrated=True, rescales=True),
}
"""Every algorithm that chooses codes, by name."""

POSITIVE: Final = {name: a.positive for name, a in ALGORITHMS.items() if a.positive is not None}
"""Each algorithm that may choose negative scales, with its counterpart that never does."""

SIGNED_BY_POSITIVE: Final = {positive: name for name, positive in POSITIVE.items()}
"""The algorithm that also tries negative scales, by its counterpart that never does."""

SCALES_INPUTS: Final = tuple(
    name for name, a in ALGORITHMS.items() if a.integers and (a.rescales or not a.calibrated)
)
"""Algorithms that allow a static input scale: calibration finds it on the float program."""


def is_calibrated(algorithm: str) -> bool:
    """Whether an algorithm needs statistics of a matrix's inputs."""
    return algorithm in ALGORITHMS and ALGORITHMS[algorithm].calibrated


def algorithms_for(format: WeightFormat) -> tuple[str, ...]:
    """The algorithms that can fill a format; the first is the default."""
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
