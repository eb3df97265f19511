"""Columns of a product whose activations stay float32, where a kernel rounds those of all others.

A few columns of a real model's activations are ten or a hundred times as large as the others. A
kernel that rounds activations to 8 bits takes its step from the largest, so that all others become
coarse. Such a product is computed as two (the decomposition of LLM.int8(), Dettmers et al. 2022)::

    y = (x with the large columns set to 0) @ W.T + x[large columns] @ W[:, large columns].T

The kernel computes the first from the same stored integers, and the second is small and float32.
The sum is the product itself but for rounding, and zeros round to zero exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import torch

    from quant.formats.formats import IntFormat
    from quant.store.store import WeightStore

ALL: Final = "all"
Columns = tuple[int, ...] | Literal["all"]
"""Columns whose activations stay float32, ascending; ``all`` where the product rounds nothing."""
FloatColumns = Mapping[str, Columns]
"""By weight name; a weight that is not there has no such column."""

_SPAN: Final = 8  # the codes of so many columns fill whole bytes, whatever the number of bits


def column_values(
    store: WeightStore, weight: str, format: IntFormat, columns: Sequence[int]
) -> torch.Tensor:
    """Returns what the stored integers of a few columns stand for.

    Args:
        store: the store of the weight.
        weight: the weight's name.
        format: the weight's format.
        columns: the columns to return.

    Returns:
        ``float32[rows, len(columns)]``.
    """
    import torch

    from quant.formats.packing import unpack_bits, unpack_codes

    codes, scale = store.part(weight, "codes"), store.part(weight, "scale")
    zero_point = None
    if not format.symmetric:
        zero_point = unpack_codes(store.part(weight, "zero_point"), format, scale.shape[1])
    values = []
    for column in columns:
        start, place = divmod(column, _SPAN)
        packed = codes[:, start * format.bits : (start + 1) * format.bits]
        code = unpack_bits(packed.contiguous(), format.bits)[:, place].float()
        group = 0 if format.group_size is None else column // format.group_size
        zero = format.implicit_zero_point if zero_point is None else zero_point[:, group].float()
        values.append((code - zero) * scale[:, group].float())
    return torch.stack(values, -1)


def told(kept: FloatColumns) -> str:
    """Returns a clause about the columns of some matrices, for a note; empty where there are none.

    >>> told({"a": (1, 5), "b": (1, 2, 3, 4), "head": "all"})
    'of 2 matrices, 2 to 4 columns with large activations keep them float32'
    >>> told({"a": (1, 5)})
    'of 1 matrix, 2 columns with large activations keep them float32'
    >>> told({})
    ''
    """
    counts = [len(columns) for columns in kept.values() if columns != ALL]
    if not counts:
        return ""
    least, most = min(counts), max(counts)
    several = f"{least}" if least == most else f"{least} to {most}"
    matrices = "1 matrix" if len(counts) == 1 else f"{len(counts)} matrices"
    return f"of {matrices}, {several} columns with large activations keep them float32"
