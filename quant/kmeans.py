"""Palettes by k-means in one dimension: the table that loses least, and the codes into it.

For each group of rows the quantizer minimizes ``sum(importance * (w - lut[code]) ** 2)`` over the
float16 tables of ``2 ** bits`` entries. It is Lloyd's algorithm ("Least squares quantization in
PCM", 1982) on the sorted weights, where a cluster is a range and its mean a difference of prefix
sums, started from the quantiles of the density's cube root, which are optimal where clusters are
narrow (Panter and Dite 1951).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from quant.errors import QuantizationError
from quant.formats import PaletteFormat
from quant.packing import pack_bits

Values = npt.NDArray[np.float32]
Table = npt.NDArray[np.float64]

LARGEST: Final = 65504.0
_ROUNDS: Final = 100


@dataclass(frozen=True)
class PalettizedRows:
    """The stored parts of some rows, and what quantizing them cost.

    Attributes:
        codes: uint8 ``[rows, cols * bits / 8]``.
        lut: float16 ``[groups, 2 ** bits]``, ascending in each table.
        squared_error: Sum of ``(weight - stored value) ** 2``.
        squared_norm: Sum of ``weight ** 2``.
    """

    codes: torch.Tensor
    lut: torch.Tensor
    squared_error: float
    squared_norm: float


class KMeans:
    """The quantizer ``kmeans``: no calibration data, deterministic."""

    name: Final = "kmeans"

    def quantize_groups(
        self,
        weight: torch.Tensor,
        fmt: PaletteFormat,
        *,
        name: str = "",
        first_row: int = 0,
    ) -> PalettizedRows:
        """Palettize whole groups of rows.

        Args:
            weight: ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The palette format to store; its groups must divide the rows.
            name: The weight's name, for messages.
            first_row: Number of the first of these rows in the whole weight, for messages.

        Raises:
            QuantizationError: When the shape does not suit the format, or a weight is NaN,
                infinite, or beyond the range of float16.
        """
        label = name or "weight"
        rows, cols = weight.shape
        fmt.check(label, rows, cols)
        wide = weight.detach().float()
        _check_values(wide, label, first_row)
        groups = fmt.groups(rows)
        values: Values = wide.reshape(groups, -1).numpy()
        tables = np.stack([_table(np.sort(group), fmt.entries) for group in values])
        lut = tables.astype(np.float16)
        codes = np.empty(values.shape, np.uint8)
        error = 0.0
        for group, table, out in zip(values, lut.astype(np.float32), codes, strict=True):
            edges = (table[1:] + table[:-1]) / 2
            out[:] = np.searchsorted(edges, group, side="left")
            error += float(np.square(group - table[out], dtype=np.float64).sum())
        packed = pack_bits(torch.from_numpy(codes).reshape(rows, cols), fmt.bits)
        norm = float(np.square(values, dtype=np.float64).sum())
        return PalettizedRows(packed.contiguous(), torch.from_numpy(lut), error, norm)


def _table(ascending: Values, entries: int) -> Table:
    """The table of one group, ascending float64."""
    sums = np.concatenate(([0.0], np.cumsum(ascending, dtype=np.float64)))
    table = _start(ascending, entries)
    edges = None
    for _ in range(_ROUNDS):
        cut = np.searchsorted(ascending, (table[1:] + table[:-1]) / 2)
        if edges is not None and np.array_equal(cut, edges):
            break
        edges = cut
        ends = np.concatenate(([0], cut, [len(ascending)]))
        count = np.diff(ends)
        table = np.where(count > 0, np.diff(sums[ends]) / np.maximum(count, 1), table)
        table = np.maximum.accumulate(table)
    return table


def _start(ascending: Values, entries: int) -> Table:
    bins = 8 * entries
    ends = np.linspace(0, len(ascending) - 1, bins + 1).astype(np.int64)
    knots = ascending[ends].astype(np.float64)
    reach = np.diff(knots)
    # Each bin holds the same mass, so that its density is 1 / width.
    share = np.concatenate(([0.0], np.cumsum(np.maximum(reach, 0) ** (2 / 3))))
    if share[-1] == 0:
        return np.full(entries, knots[0])
    at = (np.arange(entries) + 0.5) / entries * share[-1]
    start: Table = np.interp(at, share, knots)
    return start


def _check_values(wide: torch.Tensor, label: str, first_row: int) -> None:
    bad = (~(wide.abs() <= LARGEST)).any(1).nonzero()
    if not len(bad):
        return
    row = int(bad[0])
    values, number = wide[row], first_row + row
    if bool(values.isnan().any()):
        problem = "NaN"
    elif bool(values.isinf().any()):
        problem = "an infinite value"
    else:
        raise QuantizationError(
            f"{label} has values up to {float(values.abs().max()):g} in row {number}, beyond the "
            f"range of a palette's float16 entries: keep it fp32"
        )
    raise QuantizationError(
        f"{label} has {problem} in row {number}; only finite weights can be stored: the "
        f"checkpoint is damaged or overflowed when it was saved"
    )
