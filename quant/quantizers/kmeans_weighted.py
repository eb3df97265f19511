"""Palettes by k-means weighted by sensitivity (SqueezeLLM, Kim et al. 2023, arXiv 2306.07629).

SqueezeLLM weighs the squared error of every weight by the diagonal of the Fisher information, the
mean of the loss's squared gradient, which takes a backward pass over the whole model. Here the
weight is the mean of the squared input of its column: the diagonal of the second moment that the
calibrated quantizers share. By layer it is what the Fisher diagonal becomes when the gradients of
the outputs are independent of the inputs and as large for every row, so it knows which columns
matter, and neither that some rows matter more than others nor what layers after it make of an
error. In return nothing is differentiated, and memory stays bounded by a layer.
"""

from __future__ import annotations

from typing import Final

import torch

from quant.formats.formats import PaletteFormat
from quant.kernels.threads import run_all
from quant.quantizers.input_statistics import check_moment
from quant.quantizers.kmeans import KMeans, PalettizedRows

_KMEANS: Final = KMeans()
CHUNK_WEIGHTS: Final = 1 << 20


class WeightedKMeans:
    """The quantizer ``kmeans-weighted``."""

    name: Final = "kmeans-weighted"

    def palettize_matrix(
        self,
        weight: torch.Tensor,
        moment: torch.Tensor,
        fmt: PaletteFormat,
        *,
        name: str = "",
        threads: int | None = None,
    ) -> PalettizedRows:
        """Palettize a whole matrix.

        Args:
            weight: float32 ``[rows, cols]``.
            moment: float64 ``[cols, cols]``, the mean of ``x x^T`` over the inputs.
            fmt: The palette format to store.
            name: The weight's name, for messages.
            threads: How many to use; by default one per processor, four at most.

        Raises:
            QuantizationError: A weight that is NaN, infinite or beyond the range of float16, a
                shape that does not suit the format, or a moment of another width.
        """
        cols = weight.shape[1]
        label = name or "weight"
        check_moment(moment, cols, label)
        lut = weighted_tables(weight, fmt, moment.diagonal().float(), name=label, threads=threads)
        step, group = _step(weight, fmt), fmt.rows_per_group

        def look_up(at: int) -> PalettizedRows:
            tables = lut if group is None else lut[at // group : (at + step) // group]
            return _KMEANS.look_up_rows(weight[at : at + step], fmt, tables)

        parts = run_all(look_up, range(0, len(weight), step), threads)
        return PalettizedRows.joined(parts, lut)


def weighted_tables(
    weight: torch.Tensor,
    fmt: PaletteFormat,
    importance: torch.Tensor,
    *,
    name: str = "",
    threads: int | None = None,
) -> torch.Tensor:
    """The tables of a matrix that lose least where a column's errors count as much as it says.

    Args:
        weight: float32 ``[rows, cols]``.
        fmt: The palette format to store.
        importance: float32 ``[cols]``, not negative; a matrix of nothing but zeros, which inputs
            that are always zero give, counts every column as one.
        name: The weight's name, for messages.
        threads: How many to use; by default one per processor, four at most.

    Returns:
        float16 ``[groups, 2 ** bits]``, ascending.

    Raises:
        QuantizationError: As `quant.quantizers.kmeans.KMeans.quantize_groups`.
    """
    rows, cols = weight.shape
    fmt.check(name or "weight", rows, cols)
    largest = float(importance.max())
    # A column that never sees an input may still be looked up, or see one on another text.
    weighed = importance / largest + 1e-6 if largest > 0 else torch.ones(cols)
    step = _step(weight, fmt)
    if fmt.rows_per_group is None:
        counts = run_all(
            lambda at: _KMEANS.count_values(
                weight[at : at + step], importance=weighed, name=name, first_row=at
            ),
            range(0, rows, step),
            threads,
        )
        return _KMEANS.table_of_counts(torch.stack(counts).sum(0), fmt)
    found = run_all(
        lambda at: _KMEANS.tables(
            weight[at : at + step], fmt, importance=weighed, name=name, first_row=at
        ),
        range(0, rows, step),
        threads,
    )
    return torch.cat(found)


def _step(weight: torch.Tensor, fmt: PaletteFormat) -> int:
    """Rows that are palettized together."""
    group = fmt.rows_per_group or 1
    return group * max(1, CHUNK_WEIGHTS // (weight.shape[1] * group))
