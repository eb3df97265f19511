"""Slices, gathers and scatters."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

from device_harness.coreml_interpreter.limits import check_shape
from device_harness.coreml_interpreter.ops.kinds import Ints, Operation
from device_harness.coreml_interpreter.weights import Weight
from device_harness.errors import DeviceError

_SCATTER: Final = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
_MODES: Final = ("add", "div", "max", "min", "mul", "sub", "update")


def slice_by_index(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Ints | None = None,
    end_mask: Ints | None = None,
    squeeze_mask: Ints | None = None,
) -> Tensor:
    """``x[begin:end:stride, ...]``.

    Where ``begin_mask`` or ``end_mask`` is set, the slice is open at that end. Where
    ``squeeze_mask`` is set, the slice takes one element and drops the dimension.
    """
    for axis, which in reversed(
        list(enumerate(_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)))
    ):
        if isinstance(which, int):
            x = x.select(axis, which)
        elif which.step > 0:
            x = x[(slice(None),) * axis + (which,)]
        else:
            places = range(*which.indices(x.shape[axis]))
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x


def slice_by_size(x: Tensor, begin: Ints, size: Ints) -> Tensor:
    """``size`` elements from ``begin`` on in each dimension; a size of -1 takes all the rest."""
    for axis, (first, count) in enumerate(zip(begin, size, strict=True)):
        start = first % x.shape[axis] if first < 0 else first
        x = x.narrow(axis, start, x.shape[axis] - start if count == -1 else count)
    return x


def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Ints | None = None,
    end_mask: Ints | None = None,
    squeeze_mask: Ints | None = None,
) -> Tensor:
    """A copy of ``x`` whose slice, given as for slice_by_index, is replaced by ``update``."""
    return slice_update_in_place(
        x.clone(), update, begin, end, stride, begin_mask, end_mask, squeeze_mask
    )


def slice_update_in_place(
    x: Tensor,
    update: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Ints | None = None,
    end_mask: Ints | None = None,
    squeeze_mask: Ints | None = None,
) -> Tensor:
    """As slice_update, but writes into ``x``; for states whose old value is not read again."""
    target = x
    turned: list[int] = []
    for axis, which in reversed(
        list(enumerate(_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)))
    ):
        if isinstance(which, int):
            target = target.select(axis, which)
            turned = [back - 1 for back in turned]
        elif which.step > 0:
            target = target[(slice(None),) * axis + (which,)]
        else:
            places = range(*which.indices(target.shape[axis]))
            forward = places[::-1]
            target = target[(slice(None),) * axis + (_forward(forward),)]
            turned.append(axis)
    if update.numel() != target.numel():
        raise DeviceError(
            f"a slice of shape {list(target.shape)} cannot take an update of shape "
            f"{list(update.shape)}"
        )
    values = update.reshape(target.shape)
    target.copy_(values.flip(turned) if turned else values)
    return x


def _forward(places: range) -> slice:
    return slice(places[0], places[-1] + 1, places.step) if len(places) else slice(0, 0)


def _slices(
    x: Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Ints | None,
    end_mask: Ints | None,
    squeeze_mask: Ints | None,
) -> list[slice | int]:
    none = (False,) * x.dim()
    rows = zip(
        begin,
        end,
        stride or (1,) * x.dim(),
        begin_mask or none,
        end_mask or none,
        squeeze_mask or none,
        strict=True,
    )
    if len(begin) != x.dim():
        raise DeviceError(
            f"the slice has {len(begin)} dimensions, but the tensor has {x.dim()} dimensions"
        )
    found: list[slice | int] = []
    for first, last, step, no_begin, no_end, single in rows:
        if single:
            found.append(0 if no_begin else first)
        else:
            found.append(slice(None if no_begin else first, None if no_end else last, step))
    return found


def gather(
    x: Weight,
    indices: Tensor,
    axis: int = 0,
    batch_dims: int = 0,
    validate_indices: bool = False,
) -> Tensor:
    """Slices of ``x`` along ``axis``, one for each index.

    The shape of ``indices``, without its batch dimensions, replaces ``axis`` in the result.
    Negative indices count from the end. Indices outside are refused whatever ``validate_indices``
    says.
    """
    del validate_indices
    at = axis % len(x.shape)
    check_shape((*x.shape[:at], *indices.shape[batch_dims:], *x.shape[at + 1 :]))
    places = _positive(indices, x.shape[at])
    if batch_dims == 0:
        if at == 0:
            return x.rows(places)
        taken = x.tensor().index_select(at, places.reshape(-1))
        return taken.reshape(*x.shape[:at], *places.shape, *x.shape[at + 1 :])
    batch = x.shape[:batch_dims]
    flat = x.tensor().reshape(-1, *x.shape[batch_dims:])
    names = places.reshape(flat.shape[0], *places.shape[batch_dims:])
    found = [
        row.index_select(at - batch_dims, index.reshape(-1)).reshape(
            *row.shape[: at - batch_dims], *index.shape, *row.shape[at - batch_dims + 1 :]
        )
        for row, index in zip(flat, names, strict=True)
    ]
    return torch.stack(found).reshape(*batch, *found[0].shape)


def gather_along_axis(
    x: Tensor, indices: Tensor, axis: int = 0, validate_indices: bool = False
) -> Tensor:
    """The element along ``axis`` that each index names; other dimensions broadcast."""
    del validate_indices
    at = axis % x.dim()
    places = _positive(indices, x.shape[at])
    shape = [max(a, b) for a, b in zip(x.shape, places.shape, strict=True)]
    check_shape((*shape[:at], places.shape[at], *shape[at + 1 :]))
    return torch.gather(
        x.expand([*shape[:at], x.shape[at], *shape[at + 1 :]]),
        at,
        places.expand([*shape[:at], places.shape[at], *shape[at + 1 :]]),
    )


def gather_nd(
    x: Tensor, indices: Tensor, batch_dims: int = 0, validate_indices: bool = False
) -> Tensor:
    """The slices of ``x`` at the coordinates in the last dimension of ``indices``."""
    del validate_indices
    if batch_dims:
        batch = x.shape[:batch_dims]
        flat = x.reshape(-1, *x.shape[batch_dims:])
        names = indices.reshape(flat.shape[0], *indices.shape[batch_dims:])
        found = [gather_nd(row, index) for row, index in zip(flat, names, strict=True)]
        return torch.stack(found).reshape(*batch, *found[0].shape)
    return x[tuple(_coordinates(x, indices))]


def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """A copy of ``data`` in which ``updates`` change the slices that indices name on ``axis``."""
    del validate_indices
    at = axis % data.dim()
    places = _positive(indices, data.shape[at])
    spread = places.reshape(*[1] * at, -1, *[1] * (data.dim() - at - 1)).expand_as(updates)
    return _scattered(data, at, spread, updates, mode)


def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: int = 0,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """A copy of ``data`` in which ``updates`` change the elements that indices name on ``axis``."""
    del validate_indices
    at = axis % data.dim()
    places = _positive(indices, data.shape[at])
    shape = [max(a, b) for a, b in zip(data.shape, places.shape, strict=True)]
    shape[at] = places.shape[at]
    return _scattered(data, at, places.expand(shape), updates.expand(shape), mode)


def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: bool = False,
) -> Tensor:
    """A copy of ``data`` in which ``updates`` change the slices at the coordinates ``indices``."""
    del validate_indices
    depth = indices.shape[-1]
    inner = data.shape[depth:]
    number = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for size, places in zip(data.shape[:depth], _coordinates(data, indices), strict=True):
        number = number * size + places
    rows = data.reshape(math.prod(data.shape[:depth]), -1)
    changes = updates.reshape(number.numel(), -1)
    spread = number.reshape(-1, 1).expand_as(changes)
    return _scattered(rows, 0, spread, changes, mode).reshape(*data.shape[:depth], *inner)


def _coordinates(x: Tensor, indices: Tensor) -> list[Tensor]:
    return [_positive(indices[..., dim], x.shape[dim]) for dim in range(indices.shape[-1])]


def _positive(indices: Tensor, size: int) -> Tensor:
    """Converts indices to int64 from 0 on; negative indices count from the end.

    Raises:
        IndexError: an index is outside the dimension.
    """
    places = indices.to(torch.int64)
    if places.numel():
        low, high = (int(end) for end in torch.aminmax(places))
        if low < -size or high >= size:
            outside = high if high >= size else low
            raise IndexError(f"index {outside} is outside a dimension of {size}")
        if low < 0:
            places = torch.where(places < 0, places + size, places)
    return places


def _scattered(data: Tensor, axis: int, places: Tensor, updates: Tensor, mode: str) -> Tensor:
    if mode not in _MODES:
        raise DeviceError(f"scatter has no mode {mode}; it has {', '.join(_MODES)}")
    if mode == "update":
        return data.scatter(axis, places, updates)
    if mode in ("sub", "div"):  # as add and mul, so that indices may name an element several times
        mode, updates = ("add", -updates) if mode == "sub" else ("mul", 1 / updates)
    return data.scatter_reduce(axis, places, updates.to(data.dtype), _SCATTER[mode])


OPS: Final[dict[str, Operation]] = {
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
}
