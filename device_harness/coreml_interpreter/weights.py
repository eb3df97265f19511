"""Weights that are dequantized on use; a package's constants stay packed in its mapped file.

Dequantized weights are kept in memory until a budget is spent, and none of them is dropped later.
Every token uses all weights in the same order, so dropping the oldest would drop each weight just
before its next use. Beyond the budget, a tile of rows is dequantized, used and discarded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from device_harness.coreml_interpreter.values import held, round_to_half
from exporters.coreml.constants import Constant, unpack_bits
from quant.kernels import blocks
from quant.kernels.blocks import Blocks

TILE: Final = 1 << 22  # elements dequantized at once: 16 MiB of float32
# The compiled kernels multiply by packed integers for up to so many rows of activations, and for
# weights of at least so many elements.
_FEW_ROWS: Final = 8
_LARGE: Final = 1 << 20


class Budget:
    """How many bytes of dequantized weights may be kept."""

    def __init__(self, size: int) -> None:
        self.left = size

    def take(self, size: int) -> bool:
        """Takes ``size`` bytes of the budget; returns False and takes none if too few are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Weight(ABC):
    """A float tensor that is made on use, by rows of its first dimension.

    Args:
        shape: ``[rows, ...]``.
        budget: the budget that all weights of a package share.

    Attributes:
        blocks: the packed integers as the compiled kernels take them; None where they do not.
    """

    def __init__(self, shape: tuple[int, ...], budget: Budget) -> None:
        self.shape = shape
        self._budget = budget
        self._kept: Tensor | None = None
        self._refused = False
        self.blocks: Blocks | None = None

    @abstractmethod
    def make(self, start: int, stop: int) -> Tensor:
        """Makes the rows from ``start`` to ``stop``: float32 ``[stop - start, ...]``."""

    def tensor(self) -> Tensor:
        """The whole tensor: float32 ``shape``."""
        if self._kept is not None:
            return self._kept
        whole = self._make_whole()
        if not self._refused and self._budget.take(4 * whole.numel()):
            self._kept = whole
        self._refused = self._kept is None
        return whole

    def rows(self, index: Tensor) -> Tensor:
        """The rows that ``index`` names: float32 ``[*index.shape, ...]``."""
        if self._kept is not None:
            return F.embedding(index, self._kept) if self._kept.dim() == 2 else self._kept[index]
        if 4 * math.prod(self.shape) <= min(self._budget.left, TILE):
            whole = self.tensor()
            return whole[index]
        wanted, place = torch.unique(index.reshape(-1), return_inverse=True)
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < self.shape[0]:
            raise IndexError(f"index out of range: there are {self.shape[0]} rows")
        made = [self.make(row, row + 1) for row in wanted.tolist()]
        empty = torch.empty(0, *self.shape[1:])
        return (torch.cat(made) if made else empty)[place].reshape(*index.shape, *self.shape[1:])

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ self.T + bias`` for ``x [..., columns]``: float32 ``[..., rows]``."""
        rows, columns = self.shape
        flat = x.reshape(-1, columns)
        if self._kept is None and self.blocks and len(flat) <= _FEW_ROWS and self._large:
            product = self.blocks.product(flat).reshape(*x.shape[:-1], rows)
            return product if bias is None else product + bias
        if self._kept is None and 4 * rows * columns <= self._budget.left:
            self.tensor()
        if self._kept is not None:
            return F.linear(x, self._kept, bias)
        out = torch.empty(flat.shape[0], rows)
        step = max(1, TILE // max(1, columns))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            torch.mm(flat, self.make(start, stop).t(), out=out[:, start:stop])
        if bias is not None:
            out += bias
        return out.reshape(*x.shape[:-1], rows)

    @property
    def _large(self) -> bool:
        return math.prod(self.shape) >= _LARGE

    def _make_whole(self) -> Tensor:
        rows = self.shape[0]
        step = max(1, TILE // max(1, math.prod(self.shape[1:])))
        if step >= rows:
            return self.make(0, rows)
        whole = torch.empty(self.shape)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            whole[start:stop] = self.make(start, stop)
        return whole


class StoredWeight(Weight):
    """A weight that the weight file holds as floats."""

    def __init__(self, constant: Constant, budget: Budget) -> None:
        super().__init__(constant.shape, budget)
        self._constant = constant

    def make(self, start: int, stop: int) -> Tensor:
        """Converts the rows from ``start`` to ``stop`` to float32."""
        return held(self._constant.data[start:stop], self._constant.dtype)


class MadeTensor(Weight):
    """A tensor that exists already, for operations that take a weight."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tuple(tensor.shape), Budget(0))
        self._kept = tensor

    def make(self, start: int, stop: int) -> Tensor:
        """The rows from ``start`` to ``stop``."""
        return self.tensor()[start:stop]


class DerivedWeight(Weight):
    """A weight that an operation computes from constants, always as a whole.

    Args:
        shape: the result's shape.
        budget: the budget that all weights of a package share.
        compute: computes the whole weight.
    """

    def __init__(
        self, shape: tuple[int, ...], budget: Budget, compute: Callable[[], Tensor]
    ) -> None:
        super().__init__(shape, budget)
        self._compute = compute

    def make(self, start: int, stop: int) -> Tensor:
        """Computes the whole weight and returns the rows from ``start`` to ``stop``."""
        return self._make_whole()[start:stop]

    def _make_whole(self) -> Tensor:
        return self._compute()

    def rows(self, index: Tensor) -> Tensor:
        """The rows that ``index`` names."""
        return self.tensor()[index]

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ self.T + bias``."""
        return F.linear(x, self.tensor(), bias)


class BlockWeight(Weight):
    """``scale * (data - offset)``, with one scale and one offset for each block of ``data``.

    Args:
        data: integers ``[d0, d1, ...]``.
        scale: float32; each dimension divides that of ``data``.
        offset: float32 of ``scale``'s shape, or None for zero.
        half: whether results are rounded to float16.
        budget: the budget that all weights of a package share.
    """

    def __init__(
        self,
        data: Constant,
        scale: Tensor,
        offset: Tensor | None,
        half: bool,
        budget: Budget,
    ) -> None:
        super().__init__(data.shape, budget)
        self._data, self._half = data, half
        self._block = data.shape[0] // scale.shape[0]
        self.blocks = _blocks_of(data, scale, offset, half)
        # Scales take an eighth of the codes' bytes or more: the kernels' own are all that is kept.
        self._parts = None if self.blocks else (scale, offset)

    def make(self, start: int, stop: int) -> Tensor:
        """Rows from ``start`` to ``stop``."""
        if self._parts is None:
            assert self.blocks is not None
            return self.blocks.dequantize(start, stop).reshape(stop - start, *self.shape[1:])
        values = code_rows(self._data, start, stop).to(torch.float32)
        scale = self._of_rows(self._parts[0], start, stop)
        offset = None if self._parts[1] is None else self._of_rows(self._parts[1], start, stop)
        made = shift_scale(values, scale, offset)
        return round_to_half(made) if self._half else made

    def _of_rows(self, parts: Tensor, start: int, stop: int) -> Tensor:
        if self._block == 1:
            return parts[start:stop]
        first = start // self._block
        spread = parts[first : (stop - 1) // self._block + 1].repeat_interleave(self._block, 0)
        return spread[start - first * self._block : stop - first * self._block]


class LookupWeight(Weight):
    """Entries of tables, with one table for each block of ``indices`` and one element an entry.

    Args:
        indices: unsigned integers ``[d0, d1, ...]``.
        tables: float32 ``[g0, g1, ..., entries, 1]``; each ``g`` divides that dimension of
            ``indices``.
        half: whether results are rounded to float16.
        budget: the budget that all weights of a package share.
    """

    def __init__(self, indices: Constant, tables: Tensor, half: bool, budget: Budget) -> None:
        super().__init__(indices.shape, budget)
        self._indices = indices
        self._tables = round_to_half(tables) if half else tables
        self._block = indices.shape[0] // tables.shape[0]
        self.blocks = _tables_of(indices, self._tables)

    def make(self, start: int, stop: int) -> Tensor:
        """Rows from ``start`` to ``stop``."""
        if self.blocks:
            return self.blocks.dequantize(start, stop).reshape(stop - start, *self.shape[1:])
        codes = code_rows(self._indices, start, stop)
        first = start // self._block
        tables = self._tables[first : (stop - 1) // self._block + 1]
        if len(tables) > 1 and self._block > 1:
            tables = tables.repeat_interleave(self._block, 0)
            tables = tables[start - first * self._block : stop - first * self._block]
        return look_up(codes, tables, 0)


def _blocks_of(data: Constant, scale: Tensor, offset: Tensor | None, half: bool) -> Blocks | None:
    """The weight in the compiled kernels' form; None where there are no kernels for it.

    The kernels take blocks that are ranges of columns.
    """
    inner = math.prod(data.shape[1:])
    groups = math.prod(scale.shape[1:])
    in_order = groups == 1 or len(data.shape) == 2
    if not (blocks.available() and _packs(data) and in_order and inner):
        return None
    repeat = data.shape[0] // scale.shape[0]

    def of_rows(parts: Tensor) -> Tensor:
        rows = parts.reshape(-1, groups)
        rows = rows if repeat == 1 else rows.repeat_interleave(repeat, 0)
        return rows.float().contiguous()

    return Blocks(
        packed=data.data.reshape(-1).view(np.uint8),
        bits=data.bits,
        signed=data.dtype.startswith("int"),
        rows=data.shape[0],
        cols=inner,
        scale=of_rows(scale),
        offset=None if offset is None else of_rows(offset),
        half=half and not _exact_in_half(data, scale, offset),
    )


def _tables_of(indices: Constant, tables: Tensor) -> Blocks | None:
    entries = tables.shape[-2]
    in_order = math.prod(tables.shape[1:]) == entries and entries == 1 << indices.bits
    inner = math.prod(indices.shape[1:])
    if not (blocks.available() and _packs(indices) and in_order and inner):
        return None
    flat = tables.reshape(-1, entries).float().contiguous()
    rows = indices.shape[0]
    packed = indices.data.reshape(-1).view(np.uint8)
    return Blocks(
        packed, indices.bits, False, rows, inner, flat, table_rows=rows // tables.shape[0]
    )


def _packs(constant: Constant) -> bool:
    integers = constant.dtype.startswith(("int", "uint")) and constant.bits <= 8
    return integers and constant.data.flags.c_contiguous


def _exact_in_half(data: Constant, scale: Tensor, offset: Tensor | None) -> bool:
    """Whether rounding to float16 changes no product of an integer and its scale.

    A signed integer of up to 4 bits has at most 3 significant bits and a bfloat16 scale has 8, so
    that their product fits into float16's 11.
    """
    if data.bits > 4 or not data.dtype.startswith("int") or offset is not None:
        return False
    sizes = scale.abs()
    lean = bool((scale.bfloat16().float() == scale).all())
    return lean and bool((sizes >= 2**-17).all()) and float(sizes.max()) * 8 <= 65504


def code_rows(constant: Constant, start: int, stop: int) -> Tensor:
    """Unpacks rows of integers of any number of bits."""
    inner = math.prod(constant.shape[1:])
    shape = (stop - start, *constant.shape[1:])
    if constant.bits >= 8:
        return held(constant.data[start:stop], constant.dtype)
    first, last = start * inner, stop * inner
    aligned = first - first % 8  # eight elements fill whole bytes, whatever their width
    packed = constant.data[aligned * constant.bits // 8 : -(-last * constant.bits // 8)]
    codes = unpack_bits(packed, constant.bits, last - aligned)[first - aligned :]
    tensor = torch.from_numpy(codes).reshape(shape)
    if constant.dtype == "int4":
        return (tensor ^ 8).to(torch.int8) - 8
    return tensor


def shift_scale(values: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """``scale * (values - offset)`` by blocks, as constexpr_blockwise_shift_scale defines it.

    Args:
        values: float32 ``[d0, d1, ...]``.
        scale: float32 of the same rank; each dimension divides that of ``values``.
        offset: float32 of ``scale``'s shape, or None for zero.
    """
    split: list[int] = []
    spread: list[int] = []
    for dim, count in zip(values.shape, scale.shape, strict=True):
        if count in (1, dim):
            split.append(dim)
            spread.append(count)
        else:
            split += [count, dim // count]
            spread += [count, 1]
    blocked = values.reshape(split)
    if offset is not None:
        blocked = blocked - offset.reshape(spread)
    return (blocked * scale.reshape(spread)).reshape(values.shape)


def look_up(indices: Tensor, tables: Tensor, axis: int) -> Tensor:
    """Entries of tables by blocks, as iOS 18's constexpr_lut_to_dense defines it.

    Args:
        indices: integers ``[d0, d1, ...]``.
        tables: ``[g0, g1, ..., entries, width]``; each ``g`` divides that dimension of
            ``indices``.
        axis: the dimension of the result along which the ``width`` elements of an entry are.
    """
    groups, (entries, width) = tables.shape[:-2], tables.shape[-2:]
    flat = tables.reshape(-1, width)
    codes = indices.to(torch.int64)
    if math.prod(groups) > 1:
        number = torch.zeros((), dtype=torch.int64)
        for dim, (size, count) in enumerate(zip(indices.shape, groups, strict=True)):
            which = torch.arange(size) // (size // count)
            number = (number.unsqueeze(-1) * count + which) if dim else which
        codes = codes + number * entries
    found = flat[codes]
    if width == 1:
        return found.squeeze(-1)
    moved = found.movedim(-1, axis + 1 if axis >= 0 else axis + indices.dim() + 1)
    shape = list(indices.shape)
    shape[axis] *= width
    return moved.reshape(shape)
