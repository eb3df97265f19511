"""Reductions, sorting and running sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.ops.kinds import Ints, Operation
from device_harness.coreml_interpreter.values import STORAGE
from device_harness.errors import DeviceError

_INDICES: Final = ("int32", "uint16")


def _reduction(function: Callable[[Tensor, Ints, bool], Tensor]) -> Operation:
    def reduce(x: Tensor, axes: Ints | None = None, keep_dims: bool = False) -> Tensor:
        dims = tuple(range(x.dim())) if axes is None else axes
        return function(x, dims, keep_dims)

    return reduce


def _mean(x: Tensor, axes: Ints, keep: bool) -> Tensor:
    return x.mean(axes, keep) if x.is_floating_point() else x.double().mean(axes, keep)


def _product(x: Tensor, axes: Ints, keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keep, dtype=x.dtype)
    return x


def _sum(x: Tensor, axes: Ints, keep: bool) -> Tensor:
    return x.sum(axes, keep, dtype=x.dtype)


def reduce_argmax(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    """The index of the first largest element along ``axis``, as int32 or uint16."""
    return _indices(x.argmax(axis, keep_dims), output_dtype)


def reduce_argmin(
    x: Tensor, axis: int = -1, keep_dims: bool = False, output_dtype: str = "int32"
) -> Tensor:
    """The index of the first smallest element along ``axis``, as int32 or uint16."""
    return _indices(x.argmin(axis, keep_dims), output_dtype)


def _indices(found: Tensor, dtype: str) -> Tensor:
    if dtype not in _INDICES:
        raise DeviceError(f"indices cannot be {dtype}; they can be {' or '.join(_INDICES)}")
    if dtype == "uint16" and found.numel() and int(found.max()) > 0xFFFF:
        raise DeviceError(f"an index is {int(found.max())}, which uint16 does not hold")
    return found.to(STORAGE[dtype])


def cumsum(x: Tensor, axis: int = 0, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """The running sum along ``axis``, without the element itself when ``exclusive``."""
    along = x.flip(axis) if reverse else x
    total = torch.cumsum(along, axis, dtype=x.dtype)
    if exclusive:
        total = total - along
    return total.flip(axis) if reverse else total


def argsort(x: Tensor, axis: int = -1, ascending: bool = False) -> Tensor:
    """The indices that sort ``x`` along ``axis``; equal elements keep their order."""
    return torch.argsort(x, dim=axis, descending=not ascending, stable=True)


def topk(
    x: Tensor,
    k: int = 1,
    axis: int = -1,
    ascending: bool = False,
    sort: bool = True,
    return_indices: bool = True,
    output_indices_dtype: str = "int32",
) -> tuple[Tensor, ...]:
    """The ``k`` largest elements (smallest, when ``ascending``) along ``axis``, and their indices.

    The elements are sorted whatever ``sort`` says.
    """
    values, order = torch.sort(x, dim=axis, descending=not ascending, stable=True)
    if k == -1:
        k = x.shape[axis]
    values, order = values.narrow(axis, 0, k), order.narrow(axis, 0, k)
    return (values, _indices(order, output_indices_dtype)) if return_indices else (values,)


OPS: Final[dict[str, Operation]] = {
    "reduce_sum": _reduction(_sum),
    "reduce_mean": _reduction(_mean),
    "reduce_max": _reduction(lambda x, axes, keep: x.amax(axes, keep)),
    "reduce_min": _reduction(lambda x, axes, keep: x.amin(axes, keep)),
    "reduce_prod": _reduction(_product),
    "reduce_l1_norm": _reduction(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "reduce_l2_norm": _reduction(lambda x, axes, keep: _sum(x * x, axes, keep).sqrt()),
    "reduce_sum_square": _reduction(lambda x, axes, keep: _sum(x * x, axes, keep)),
    "reduce_log_sum": _reduction(lambda x, axes, keep: _sum(x, axes, keep).log()),
    "reduce_log_sum_exp": _reduction(lambda x, axes, keep: torch.logsumexp(x.float(), axes, keep)),
    "reduce_argmax": reduce_argmax,
    "reduce_argmin": reduce_argmin,
    "cumsum": cumsum,
    "argsort": argsort,
    "topk": topk,
}
