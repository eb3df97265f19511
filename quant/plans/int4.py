"""The recipe ``int4``: 4 bits, and 8 bits where a model's own shapes say that they pay.

Rounding costs most in the values' projection, which is small where queries share keys and values.
Next come the down projections of the outer layers, then the first and the last layer as a whole. It
costs least in the gate and up projections. The recipe spends as many bits as llama.cpp's Q4_0,
which keeps the head in 6 bits: the matrices named above are taken in that order, each that fits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from quant.formats.formats import parse_format
from quant.plans.algorithms import POSITIVE, SIGNED_BY_POSITIVE
from quant.plans.plan import matrix_shape
from quant.plans.rules import Recipe, Rule, stays_float32

_LARGE: Final = 1_000_000_000
_BITS: Final = 4.5
"""Bits a weight of 4-bit integers in groups of 32."""
_BITS_FOR_POINTS: Final = 0.1
"""Further bits where groups have zero points, which take 0.06 to 0.125 themselves."""
_BITS_FOR_HEAD: Final = 2.0
"""Further bits a weight of the head; Q4_0 spends 2.06 there."""
_MOST_BITS_OF_LARGE: Final = 4.75
"""Models from `_LARGE` parameters on spend no more: their speed is their size."""
_EIGHT: Final = "int8-pc"


@dataclass(frozen=True)
class Int4Recipe(Recipe):
    """``int4`` and its calibrated variants.

    Attributes:
        algorithm: what fills the formats; None for each format's default.
        zero_points: whether 4-bit groups have zero points.
        eight_bit_vocabulary: whether embedding and head have 8 bits, beyond the bits that the
            recipe spends.
    """

    algorithm: str | None = None
    zero_points: bool = False
    eight_bit_vocabulary: bool = False

    def by(self, name: str, algorithm: str, about: str) -> Int4Recipe:
        """Returns the recipe of the same formats, filled by another algorithm."""
        return replace(self, name=name, about=about, algorithm=algorithm)

    def variants(self) -> tuple[Recipe, ...]:
        """Returns it with scales of either sign, which cost no byte, and with zero points."""
        signed = SIGNED_BY_POSITIVE.get(self.algorithm or "rtn")
        either_sign = () if signed is None else (replace(self, algorithm=signed),)
        return (*either_sign, replace(self, zero_points=True))

    def rules_for(
        self, shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str]
    ) -> tuple[Rule, ...]:
        """Returns one rule for each matrix, and one for any other."""
        matrices = {
            name: shape
            for name, shape in shapes.items()
            if not stays_float32(shape, roles[name]) and roles[name] != "norm"
        }
        formats = {name: self._least(name, shape) for name, shape in matrices.items()}
        stored = sum(_bits(formats[name], shape) for name, shape in matrices.items())
        most = _most_bits(matrices, roles, _BITS + _BITS_FOR_POINTS * self.zero_points)
        for given, wanted in self._upgrades(matrices):
            names = [name for name in given if formats[name] != _EIGHT]
            more = sum(_bits(wanted, matrices[n]) - _bits(formats[n], matrices[n]) for n in names)
            if stored + more <= most:
                formats.update(dict.fromkeys(names, wanted))
                stored += more
        if self.eight_bit_vocabulary:
            formats |= {n: _EIGHT for n in matrices if roles[n] in ("embedding", "head")}
        named = tuple(Rule(n, given, self._filled_by(given)) for n, given in formats.items())
        return (*named, Rule("*", self._narrow, self._filled_by(self._narrow)))

    @property
    def _narrow(self) -> str:
        return "int4-g32-asym" if self.zero_points else "int4-g32"

    def _least(self, name: str, shape: tuple[int, ...]) -> str:
        """Returns the format that a matrix has before any upgrade."""
        columns = matrix_shape(shape)[1]
        if columns % 32:
            return _EIGHT  # no group fits
        wide = "int4-g64-asym" if self.zero_points else "int4-g64"
        return wide if ".gate_up_proj." in name and columns % 64 == 0 else self._narrow

    def _filled_by(self, format: str) -> str | None:
        """Returns the algorithm; the sign of a scale makes no difference at 8 bits."""
        if format == _EIGHT and self.algorithm in POSITIVE:
            return POSITIVE[self.algorithm]
        return self.algorithm

    def _upgrades(self, matrices: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[list[str], str]]:
        """Yields matrices that get a finer format together, the most rewarding first."""
        yield [name for name in matrices if ".v_proj." in name], _EIGHT
        of = {name: _layer(name) for name in matrices}
        layers = sorted({layer for layer in of.values() if layer is not None})
        if not layers:
            return
        share = max(1, len(layers) // 8)
        for last, first in zip(layers[::-1][:share], layers[:share], strict=True):
            for layer in dict.fromkeys((last, first)):
                yield [n for n in matrices if of[n] == layer and ".down_proj." in n], _EIGHT
        ends = (layers[0], layers[-1])
        for layer in dict.fromkeys(ends):
            yield [name for name in matrices if of[name] == layer], _EIGHT
        yield [name for name in matrices if ".gate_up_proj." in name], self._narrow


INT4: Final = Int4Recipe(
    "int4", "4 bits in groups of 32 or 64, and 8 bits for the matrices where they pay most", ()
)


INT4_VOCAB8: Final = replace(
    INT4,
    name="int4-vocab8",
    about="the formats of int4, and 8 bits for embedding and head",
    eight_bit_vocabulary=True,
)


def _most_bits(
    matrices: Mapping[str, tuple[int, ...]], roles: Mapping[str, str], bits: float
) -> float:
    """Returns the most bits of all matrices: ``bits`` a weight, and more for the head."""
    sizes = {name: rows * columns for name, (rows, columns) in matrices.items()}
    whole = sum(sizes.values())
    head = "head" if "head" in roles.values() else "embedding"  # tied
    most = bits * whole + _BITS_FOR_HEAD * sum(sizes[n] for n in sizes if roles[n] == head)
    return most if whole < _LARGE else min(most, _MOST_BITS_OF_LARGE * whole)


def _layer(name: str) -> int | None:
    """Returns the number of a weight's layer.

    >>> _layer("model.layers.12.mlp.down_proj.weight"), _layer("lm_head.weight")
    (12, None)
    """
    found = re.search(r"\blayers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def _bits(format: str, shape: tuple[int, ...]) -> int:
    """Returns the stored bits of a matrix."""
    return 8 * parse_format(format).nbytes(*matrix_shape(shape))
