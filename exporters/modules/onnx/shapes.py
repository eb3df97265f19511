"""Handlers of operators that move, cut and make values without computing with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx

from exporters.errors import ExportError
from exporters.modules.onnx.dtypes import element_of
from exporters.modules.onnx.state import State, arguments, bound, dtype_of, shape_of
from exporters.modules.traced import user_line

Handler = Callable[[State, fx.Node], str]
aten = torch.ops.aten


def _rank(node: Any) -> int:
    return len(shape_of(node))


def _optional(node: fx.Node, index: int, default: Any) -> Any:
    return arguments(node)[index] if len(arguments(node)) > index else default


def _view(state: State, node: fx.Node) -> str:
    shape = state.shape(node, arguments(node)[1])
    return state.emit("Reshape", [state.value(arguments(node)[0]), shape], node.name)


def _permute(state: State, node: fx.Node) -> str:
    order = [dim % _rank(node) for dim in arguments(node)[1]]
    return state.emit("Transpose", [state.value(arguments(node)[0])], node.name, perm=order)


def _transpose(state: State, node: fx.Node) -> str:
    order = list(range(_rank(node)))
    if order:
        first, second = (dim % len(order) for dim in arguments(node)[1:3])
        order[first], order[second] = order[second], order[first]
    return state.emit("Transpose", [state.value(arguments(node)[0])], node.name, perm=order)


def _t(state: State, node: fx.Node) -> str:
    order = list(range(_rank(node)))[::-1]
    return state.emit("Transpose", [state.value(arguments(node)[0])], node.name, perm=order)


def _unsqueeze(state: State, node: fx.Node) -> str:
    axis = arguments(node)[1] % _rank(node)
    return state.emit(
        "Unsqueeze", [state.value(arguments(node)[0]), state.integers([axis])], node.name
    )


def _squeeze(state: State, node: fx.Node) -> str:
    before = shape_of(arguments(node)[0])
    asked = _optional(node, 1, list(range(len(before))))
    dims = [asked] if isinstance(asked, int) else list(asked)
    axes = sorted({d % len(before) for d in dims if before[d] == 1})
    source = state.value(arguments(node)[0])
    return state.emit("Squeeze", [source, state.integers(axes)], node.name) if axes else source


def _expand(state: State, node: fx.Node) -> str:
    # In ONNX's Expand 1 leaves a dimension as it is, as -1 does in torch's.
    sizes = [1 if size == -1 else size for size in arguments(node)[1]]
    return state.emit("Expand", [state.value(arguments(node)[0]), state.vector(sizes)], node.name)


def _repeat(state: State, node: fx.Node) -> str:
    source, times = arguments(node)[0], arguments(node)[1]
    added = len(times) - _rank(source)
    name = state.value(source)
    if added:
        name = state.emit("Unsqueeze", [name, state.integers(list(range(added)))])
    return state.emit("Tile", [name, state.vector(list(times))], node.name)


def _cat(state: State, node: fx.Node) -> str:
    parts = [
        state.value(part, dtype_of(node)) for part in arguments(node)[0] if shape_of(part) != (0,)
    ]
    axis = _optional(node, 1, 0) % _rank(node)
    return state.emit("Concat", parts, node.name, axis=axis)


def _slice(state: State, node: fx.Node) -> str:
    axis = _optional(node, 1, 0) % _rank(node)
    start, end = _optional(node, 2, None) or 0, _optional(node, 3, None)
    end = bound(2**63 - 1 if end is None else end)
    places = [state.vector([each]) for each in (start, end, axis, _optional(node, 4, 1))]
    return state.emit("Slice", [state.value(arguments(node)[0]), *places], node.name)


def _select(state: State, node: fx.Node) -> str:
    axis = arguments(node)[1] % _rank(arguments(node)[0])
    index = state.value(arguments(node)[2], torch.int64)
    return state.emit("Gather", [state.value(arguments(node)[0]), index], node.name, axis=axis)


def _index_select(state: State, node: fx.Node) -> str:
    axis = arguments(node)[1] % max(_rank(arguments(node)[0]), 1)
    operands = [state.value(arguments(node)[0]), state.value(arguments(node)[2])]
    return state.emit("Gather", operands, node.name, axis=axis)


def _gather(state: State, node: fx.Node) -> str:
    axis = arguments(node)[1] % _rank(arguments(node)[0])
    operands = [state.value(arguments(node)[0]), state.value(arguments(node)[2])]
    return state.emit("GatherElements", operands, node.name, axis=axis)


def _index(state: State, node: fx.Node) -> str:
    """Picks elements by tensors of places: one tensor for one axis, or tensors for leading axes."""
    source, given = arguments(node)[0], list(arguments(node)[1])
    used = [axis for axis, each in enumerate(given) if each is not None]
    if any(dtype_of(given[axis]) == torch.bool for axis in used):
        raise ExportError(
            f"the module picks elements by a mask, so that their number depends on data, which the "
            f"ONNX target does not lower{user_line(node)}: multiply by the mask, or use torch.where"
        )
    if len(used) == 1:
        operands = [state.value(source), state.value(given[used[0]])]
        return state.emit("Gather", operands, node.name, axis=used[0])
    first, last = used[0], used[-1]
    if used != list(range(first, last + 1)):
        raise ExportError(
            f"the module indexes axes {used} at once, which the ONNX target does not lower"
            f"{user_line(node)}: index neighbouring axes, or one after the other"
        )
    rank = max(_rank(given[axis]) for axis in used)
    count = len(shape_of(source))
    name = state.value(source)
    if first:
        # The picked axes come first, and their result goes back to where they were.
        order = [*used, *range(first), *range(last + 1, count)]
        name = state.emit("Transpose", [name], perm=order)
    shape = _broadcast(state, [given[axis] for axis in used])
    one = state.integers([-1])
    parts = [
        state.emit("Unsqueeze", [state.emit("Expand", [state.value(given[a]), shape]), one])
        for a in used
    ]
    places = state.emit("Concat", parts, axis=rank)
    found = state.emit("GatherND", [name, places], node.name)
    if first:
        back = [*range(rank, rank + first), *range(rank), *range(rank + first, _rank(node))]
        found = state.emit("Transpose", [found], perm=back)
    return found


def _broadcast(state: State, tensors: list[fx.Node]) -> str:
    """The shape that tensors have together."""
    total = state.value(tensors[0], torch.int64)
    for other in tensors[1:]:
        total = state.emit("Add", [total, state.value(other, torch.int64)])
    return state.emit("Shape", [total])


def _get(state: State, node: fx.Node) -> str:
    """A part of a split, or the values of an operator that also gives their places."""
    source, index = arguments(node)
    assert isinstance(source, fx.Node) and isinstance(index, int)
    if source in state.parts:
        return state.parts[source][index]
    if index:
        raise ExportError(
            f"the module reads the places that {source.target} gives beside its values, which the "
            f"ONNX target does not lower{user_line(node)}"
        )
    return state.names[source]


def _split(state: State, node: fx.Node) -> str:
    sizes, axis = arguments(node)[1], _optional(node, 2, 0)
    count = len(node.meta["val"])
    rank = len(node.meta["val"][0].shape)
    if isinstance(sizes, int):
        sizes = [part.shape[axis] for part in node.meta["val"]]
    outputs = [state.fresh(node.name) for _ in range(count)]
    operands = [state.value(arguments(node)[0]), state.vector(list(sizes))]
    state.builder.node("Split", operands, outputs, axis=axis % rank)
    state.parts[node] = outputs
    return outputs[0]


def _size(state: State, node: fx.Node) -> str:
    source, axis = arguments(node)
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    axis %= _rank(source)
    dims = state.emit("Shape", [state.value(source)], start=axis, end=axis + 1)
    return state.emit("Squeeze", [dims, state.integers([0])], node.name)


def _full(state: State, node: fx.Node) -> str:
    value = state.value(arguments(node)[1], dtype_of(node))
    return state.emit("Expand", [value, state.vector(list(arguments(node)[0]))], node.name)


def _full_like(number: float | None) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        value = arguments(node)[1] if number is None else number
        shape = state.emit("Shape", [state.value(arguments(node)[0])])
        return state.emit("Expand", [state.value(value, dtype_of(node)), shape], node.name)

    return handle


def _filled(number: float, at: int = 0) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        value = state.value(number, dtype_of(node))
        shape = state.vector(list(arguments(node)[at]))
        return state.emit("Expand", [value, shape], node.name)

    return handle


def _scalar(state: State, node: fx.Node) -> str:
    return state.value(arguments(node)[0], dtype_of(node))


def _arange(state: State, node: fx.Node) -> str:
    kind = dtype_of(node)
    given = list(arguments(node))
    start, end, step = (0, given[0], 1) if len(given) == 1 else [*given, 1][:3]
    return state.emit("Range", [state.value(each, kind) for each in (start, end, step)], node.name)


def _pad(state: State, node: fx.Node) -> str:
    pads, rank = list(arguments(node)[1]), _rank(node)
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]  # the last axis comes first
    pairs = [(0, 0)] * (rank - len(pairs)) + pairs[::-1]
    places = state.vector([*(low for low, _ in pairs), *(high for _, high in pairs)])
    value = state.value(_optional(node, 2, 0.0), dtype_of(node))
    return state.emit("Pad", [state.value(arguments(node)[0]), places, value], node.name)


def _flip(state: State, node: fx.Node) -> str:
    axes = [axis % _rank(node) for axis in arguments(node)[1]]
    count = len(axes)
    places = [state.integers(each) for each in ([-1] * count, [-(2**63) + 1] * count, axes)]
    steps = state.integers([-1] * count)
    return state.emit("Slice", [state.value(arguments(node)[0]), *places, steps], node.name)


def _triangle(upper: int) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        diagonal = state.value(_optional(node, 1, 0), torch.int64)
        return state.emit(
            "Trilu", [state.value(arguments(node)[0]), diagonal], node.name, upper=upper
        )

    return handle


def _cast(state: State, node: fx.Node) -> str:
    return state.emit(
        "Cast", [state.value(arguments(node)[0])], node.name, to=element_of(dtype_of(node))
    )


HANDLERS: Final[Mapping[object, Handler]] = {
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _t,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.index.Tensor: _index,
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split,
    aten.full.default: _full,
    aten.full_like.default: _full_like(None),
    aten.zeros_like.default: _full_like(0),
    aten.ones_like.default: _full_like(1),
    aten.zeros.default: _filled(0),
    aten.ones.default: _filled(1),
    aten.new_ones.default: _filled(1, at=1),
    aten.new_zeros.default: _filled(0, at=1),
    aten.scalar_tensor.default: _scalar,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.constant_pad_nd.default: _pad,
    aten.flip.default: _flip,
    aten.tril.default: _triangle(0),
    aten.triu.default: _triangle(1),
    aten.sym_size.int: _size,
    aten.to.dtype: _cast,
}
GET: Final = _get
