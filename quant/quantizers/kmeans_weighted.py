"""Palettes by k-means weighted by sensitivity (SqueezeLLM, Kim et al. 2023, arXiv 2306.07629).

SqueezeLLM weighs the squared error of every weight by the diagonal of the Fisher information, the
mean of the loss's squared gradient, which takes a backward pass over the whole model. This
quantizer uses the mean of the squared inputs of the weight's column instead: the diagonal of the
second moment that the calibrated quantizers share. Within a layer both are equal, up to a factor,
if the gradients of the outputs are independent of the inputs and equally large for every row. So
this importance captures which columns matter, but not which rows matter more than others, nor how
later layers change an error. In return it needs no gradients, and memory stays bounded by a layer.
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
        """Palettizes a whole matrix.

        Args:
            weight: float32 ``[rows, cols]``.
            moment: float64 ``[cols, cols]``, the mean of ``x x^T`` over the inputs.
            fmt: The palette format to store.
            name: The weight's name, for messages.
            threads: Number of threads; by default one per processor, four at most.

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
    """Returns the tables of least squared error, weighted by each column's importance.

    Args:
        weight: float32 ``[rows, cols]``.
        fmt: The palette format to store.
        importance: float32 ``[cols]``, not negative. If all are zero, as for inputs that are
            always zero, every column counts as 1.
        name: The weight's name, for messages.
        threads: Number of threads; by default one per processor, four at most.

    Returns:
        float16 ``[groups, 2 ** bits]``, ascending.

    Raises:
        QuantizationError: As `quant.quantizers.kmeans.KMeans.quantize_groups`.
    """
    rows, cols = weight.shape
    fmt.check(name or "weight", rows, cols)
    largest = float(importance.max())
    # Not 0: the column may also be looked up as an embedding's, or see inputs on another text.
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
    """Returns the number of rows that are palettized together, a multiple of a table's rows."""
    group = fmt.rows_per_group or 1
    return group * max(1, CHUNK_WEIGHTS // (weight.shape[1] * group))
