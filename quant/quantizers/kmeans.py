"""Palettes by k-means in one dimension: tables of least squared error, and the codes into them.

For each group of rows the quantizer minimizes ``sum(importance * (w - lut[code]) ** 2)`` over the
float16 tables of ``2 ** bits`` entries. It runs Lloyd's algorithm ("Least squares quantization in
PCM", 1982) on the sorted weights of many groups at once: there a cluster is a range, and its mean
is a difference of prefix sums. It starts from the optimal clusters of bins
(`quant.quantizers.optimal_clusters`), where bins have equal shares of the cube root of the density,
as optimal narrow clusters have (Panter and Dite, "Quantization distortion in pulse-count
modulation", 1951). The tests compare with exact optima by dynamic programming (Wang and Song,
"Ckmeans.1d.dp", 2011; Gronlund et al., "Fast exact k-means, k-medians and Bregman divergence
clustering in 1D", 2017).

One table for a whole matrix takes two passes, one that counts values and one that looks them up, so
that the whole matrix is never in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from quant.errors import FormatRefused, QuantizationError
from quant.formats.formats import PaletteFormat
from quant.formats.packing import pack_bits
from quant.quantizers.optimal_clusters import Doubles, Integers, Singles, bin_ends, optimal_ends
from quant.quantizers.row_checks import damage

LARGEST: Final = 65504.0
_ROUNDS: Final = 200
# The initial clusters consist of whole bins; Lloyd's algorithm then moves their edges value by
# value. A table of 256 entries gets one bin per entry: searching more bins would take most of the
# time.
_GROUP_BINS: Final = 256
_WHOLE_BINS: Final = 1024
# A bin of counts keeps a float32's sign, exponent and 11 bits of its significand: exact for
# bfloat16 and float16 weights.
_DROPPED_BITS: Final = 12
_BINS: Final = 1 << (32 - _DROPPED_BITS)


@dataclass(frozen=True)
class PalettizedRows:
    """The stored parts of some rows, and the error of their stored values.

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

    @classmethod
    def joined(cls, parts: Sequence[PalettizedRows], lut: torch.Tensor) -> PalettizedRows:
        """Joins parts of one matrix, given in the order of its rows, with all of its tables."""
        return cls(
            codes=torch.cat([part.codes for part in parts]),
            lut=lut,
            squared_error=sum(part.squared_error for part in parts),
            squared_norm=sum(part.squared_norm for part in parts),
        )


class KMeans:
    """The quantizer ``kmeans``: no calibration data, deterministic."""

    name: Final = "kmeans"

    def quantize_groups(
        self,
        weight: torch.Tensor,
        fmt: PaletteFormat,
        *,
        importance: torch.Tensor | None = None,
        name: str = "",
        first_row: int = 0,
    ) -> PalettizedRows:
        """Palettizes whole groups of rows.

        Args:
            weight: ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The palette format to store; its groups must divide the rows.
            importance: The factor of each squared error, not negative: float ``[cols]`` by column
                or ``[rows, cols]`` by weight, such as the diagonal of the Fisher information in
                SqueezeLLM (Kim et al. 2023); None for 1 everywhere.
            name: The weight's name, for messages.
            first_row: Index of the first of these rows in the whole weight, for messages.

        Raises:
            QuantizationError: When the shape does not suit the format, a weight is NaN, infinite or
                beyond the range of float16, or the importance is negative or not finite.
        """
        lut = self.tables(weight, fmt, importance=importance, name=name, first_row=first_row)
        return _palettized(_values(weight), fmt, lut)

    def tables(
        self,
        weight: torch.Tensor,
        fmt: PaletteFormat,
        *,
        importance: torch.Tensor | None = None,
        name: str = "",
        first_row: int = 0,
    ) -> torch.Tensor:
        """Returns only the tables of ``quantize_groups``, float16 ``[groups, 2 ** bits]``."""
        label = name or "weight"
        rows, cols = weight.shape
        fmt.check(label, rows, cols)
        values = _checked(weight, label, first_row)
        groups = values.reshape(fmt.groups(rows), -1)
        if importance is not None:
            lut = _weighted_tables(groups, _importance(importance, rows, cols, label), fmt.entries)
        elif fmt.rows_per_group is None:
            lut = _table_of_counts(_counts(values), fmt.entries)
        else:
            ascending = np.sort(groups, axis=1)
            mass = np.broadcast_to(
                np.arange(groups.shape[1] + 1.0), (len(groups), groups.shape[1] + 1)
            )
            lut = _tables(ascending, mass, _prefix_sums(ascending), fmt.entries)
        return torch.from_numpy(lut)

    def count_values(
        self,
        weight: torch.Tensor,
        *,
        importance: torch.Tensor | None = None,
        name: str = "",
        first_row: int = 0,
    ) -> torch.Tensor:
        """Counts values, the first pass of one table for a whole matrix; counts add up over rows.

        Args:
            weight: Some rows, ``[rows, cols]`` in float32, float16 or bfloat16.
            importance: The factor of each column's count, float ``[cols]``; None for 1 everywhere.
            name: The weight's name, for messages.
            first_row: Index of the first of these rows in the whole weight, for messages.

        Returns:
            int64 ``[bins]`` in the order of the values, or float64 with an ``importance``. Float32
            weights of one bin differ by less than 1 in 2048.

        Raises:
            QuantizationError: A weight is NaN, infinite or beyond the range of float16, or the
                importance is negative or not finite.
        """
        label = name or "weight"
        values = _checked(weight, label, first_row)
        if importance is None:
            return torch.from_numpy(_counts(values))
        rows, cols = values.shape
        return torch.from_numpy(_counts(values, _importance(importance, rows, cols, label)))

    def table_of_counts(self, counts: torch.Tensor, fmt: PaletteFormat) -> torch.Tensor:
        """Returns a matrix's one table, float16 ``[1, 2 ** bits]``, from the sum of its counts."""
        return torch.from_numpy(_table_of_counts(counts.numpy(), fmt.entries))

    def look_up_rows(
        self, weight: torch.Tensor, fmt: PaletteFormat, lut: torch.Tensor
    ) -> PalettizedRows:
        """Codes rows by the nearest entries of given tables: the second pass.

        Args:
            weight: Whole groups of rows, ``[rows, cols]`` in float32, float16 or bfloat16.
            fmt: The palette format to store.
            lut: float16 ``[groups, 2 ** bits]``, ascending in each table.
        """
        return _palettized(_values(weight), fmt, lut)


def _palettized(values: Singles, fmt: PaletteFormat, lut: torch.Tensor) -> PalettizedRows:
    """Codes ``values [rows, cols]`` by the nearest entries of their tables."""
    rows, cols = values.shape
    tables: Singles = lut.numpy().astype(np.float32)
    codes = np.empty((len(tables), rows * cols // len(tables)), np.uint8)
    error = norm = 0.0
    for group, table, out in zip(values.reshape(codes.shape), tables, codes, strict=True):
        _nearest(group, table, out)
        missed = group - table[out]
        error += float(np.square(missed, dtype=np.float64).sum())
        norm += float(np.square(group, dtype=np.float64).sum())
    packed = pack_bits(torch.from_numpy(codes).reshape(rows, cols), fmt.bits)
    return PalettizedRows(packed.contiguous(), lut, error, norm)


def _nearest(values: Singles, table: Singles, out: npt.NDArray[np.uint8]) -> None:
    """Writes the index of the nearest entry of an ascending table; of two as near, the lower."""
    # A binary search by bits: tables have 2 ** bits entries, and each step decides one bit.
    edges = (table[1:] + table[:-1]) / 2
    step = len(table) // 2
    np.greater(values, edges[step - 1], out=out.view(np.bool_))
    out *= np.uint8(step)
    while step > 1:
        step //= 2
        above = values > edges[step - 1 :].take(out)
        out += above.view(np.uint8) * np.uint8(step)


def _tables(
    ascending: Singles, mass: Doubles, sums: Doubles, entries: int, *, whole: bool = False
) -> npt.NDArray[np.float16]:
    """Runs Lloyd's algorithm on the sorted values of each group and returns the tables.

    Args:
        ascending: float32 ``[groups, n]``.
        mass: float64 ``[groups, n + 1]``, prefix sums of the values' masses (their importance, or
            their counts).
        sums: float64 ``[groups, n + 1]``, prefix sums of the values times their masses.
        entries: number of entries of a table.
        whole: whether the only group is a whole matrix, which justifies more bins.

    Returns:
        float16 ``[groups, entries]``, ascending.
    """
    groups, count = ascending.shape
    table = _start(ascending, mass, sums, entries, whole)
    _keep_few(ascending, table)
    # One search finds the edges of every group: keys ascend by group, then by value.
    keys = (_ordered(ascending) + (np.arange(groups, dtype=np.int64) << 32)[:, None]).reshape(-1)
    cuts = np.full((groups, entries - 1), -1)
    active = np.arange(groups)
    for _ in range(_ROUNDS):
        edges = (table[active, 1:] + table[active, :-1]) / 2
        wanted = _ordered(edges.astype(np.float32)) + (active << 32)[:, None]
        found = np.searchsorted(keys, wanted) - (active * count)[:, None]
        moved = (found != cuts[active]).any(1)
        cuts[active] = found
        active = active[moved]
        if not len(active):
            break
        ends = np.zeros((len(active), entries + 1), np.int64)
        ends[:, 1:-1], ends[:, -1] = cuts[active], count
        within = np.diff(mass[active[:, None], ends])
        total = np.diff(sums[active[:, None], ends])
        means = np.divide(total, within, out=table[active], where=within > 0)
        # Keeps tables ascending: rounding could swap neighbours, and an empty cluster keeps its
        # old mean, which may lie out of order.
        table[active] = np.maximum.accumulate(means, axis=1)
    return table.astype(np.float16)


def _keep_few(ascending: Singles, table: Doubles) -> None:
    """Writes a group's distinct values as its table where they are no more than the entries."""
    rises = ascending[:, 1:] > ascending[:, :-1]
    for group in np.flatnonzero(rises.sum(1) < table.shape[1]):
        distinct = ascending[group][np.concatenate(([True], rises[group]))]
        table[group, : len(distinct)], table[group, len(distinct) :] = distinct, distinct[-1]


def _start(ascending: Singles, mass: Doubles, sums: Doubles, entries: int, whole: bool) -> Doubles:
    """Returns the initial tables of Lloyd's algorithm: means of the optimal clusters of bins."""
    bins = _WHOLE_BINS if whole else _GROUP_BINS
    ends = bin_ends(ascending, mass, bins, sampled=not whole)
    rows = np.arange(len(ascending))[:, None]
    mass, sums = mass[rows, ends], sums[rows, ends]
    cuts = optimal_ends(mass, sums, entries) if bins > entries else np.arange(entries + 1)
    within, total = np.diff(mass[rows, cuts]), np.diff(sums[rows, cuts])
    lowest = np.broadcast_to(ascending[:, :1].astype(np.float64), within.shape).copy()
    means = np.divide(total, within, out=lowest, where=within > 0)
    table: Doubles = np.maximum.accumulate(means, axis=1)
    return table


def _weighted_tables(groups: Singles, importance: Singles, entries: int) -> npt.NDArray[np.float16]:
    order = np.argsort(groups, axis=1, kind="stable")
    ascending = np.take_along_axis(groups, order, 1)
    counted = np.take_along_axis(importance.reshape(groups.shape), order, 1).astype(np.float64)
    return _tables(ascending, _prefix_sums(counted), _prefix_sums(counted * ascending), entries)


def _prefix_sums(values: Singles | Doubles) -> Doubles:
    sums = np.zeros((values.shape[0], values.shape[1] + 1))
    np.cumsum(values, axis=1, dtype=np.float64, out=sums[:, 1:])
    return sums


def _ordered(values: Singles) -> Integers:
    """Maps float32 values to integers of 32 bits in the same order."""
    bits = (values + np.float32(0)).view(np.int32)  # adding 0 turns -0 into 0
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).astype(np.int64)


def _counts(values: Singles, importance: Singles | None = None) -> Integers | Doubles:
    bins = (_ordered(values.reshape(-1)) >> _DROPPED_BITS) + _BINS // 2
    weights = None if importance is None else importance.reshape(-1)
    return np.bincount(bins, weights, minlength=_BINS)


def _table_of_counts(counts: Integers | Doubles, entries: int) -> npt.NDArray[np.float16]:
    bins = np.flatnonzero(counts)
    keys = (bins - _BINS // 2) << _DROPPED_BITS
    # A bin stands for its value nearest to zero: a negative one's has ones in the dropped bits,
    # which the xor below turns into zeros.
    keys[keys < 0] += (1 << _DROPPED_BITS) - 1
    ordered = keys.astype(np.int32)
    values = (ordered ^ (ordered >> 31 & 0x7FFFFFFF)).view(np.float32)[None]
    mass = counts[bins].astype(np.float64)[None]
    return _tables(values, _prefix_sums(mass), _prefix_sums(mass * values), entries, whole=True)


def _checked(weight: torch.Tensor, label: str, first_row: int) -> Singles:
    _check_values(weight.detach().float(), label, first_row)
    return _values(weight)


def _values(weight: torch.Tensor) -> Singles:
    values: Singles = weight.detach().float().contiguous().numpy()
    return values


def _importance(importance: torch.Tensor, rows: int, cols: int, label: str) -> Singles:
    if tuple(importance.shape) not in ((cols,), (rows, cols)):
        raise QuantizationError(
            f"{label}: importance is {list(importance.shape)}; it must be [{cols}] by column or "
            f"[{rows}, {cols}] by weight"
        )
    wide = importance.detach().float()
    if not bool((wide.isfinite() & (wide >= 0)).all()):
        raise QuantizationError(f"{label}: importance must be finite and not negative")
    values: Singles = np.ascontiguousarray(wide.expand(rows, cols).numpy())
    return values


def _check_values(wide: torch.Tensor, label: str, first_row: int) -> None:
    bad = (~(wide.abs() <= LARGEST)).any(1).nonzero()
    if not len(bad):
        return
    row = int(bad[0])
    values, number = wide[row], first_row + row
    raise damage(values, label, number, "stored") or FormatRefused(
        f"{label} has values up to {float(values.abs().max()):g} in row {number}, beyond the "
        f"range of a palette's float16 entries",
        "keep it fp32",
    )
