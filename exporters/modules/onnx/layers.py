"""Handlers of products, convolutions, norms, pooling, attention and reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx

from exporters.errors import ExportError
from exporters.modules.onnx.dtypes import element_of
from exporters.modules.onnx.state import State, arguments, dtype_of, shape_of
from exporters.modules.traced import user_line

Handler = Callable[[State, fx.Node], str]
aten = torch.ops.aten


def _given(node: fx.Node, *defaults: Any, at: int) -> list[Any]:
    """The arguments from a place on, with defaults for those that are left out."""
    found = list(arguments(node)[at:])
    return [*found, *defaults[len(found) :]]


def _matmul(state: State, node: fx.Node) -> str:
    return state.emit("MatMul", [state.value(each) for each in arguments(node)[:2]], node.name)


def _addmm(state: State, node: fx.Node) -> str:
    added, left, right = (state.value(each) for each in arguments(node)[:3])
    asked: Mapping[str, Any] = node.kwargs
    factors = {name: float(asked.get(name, 1)) for name in ("alpha", "beta")}
    return state.emit("Gemm", [left, right, added], node.name, **factors)


def _convolution(state: State, node: fx.Node) -> str:
    source, weight, bias, stride, padding, dilation, transposed, out, groups = arguments(node)
    operands = [state.value(each) for each in (source, weight, bias) if each is not None]
    sides = list(padding)
    attributes = {
        "strides": list(stride),
        "pads": sides * 2,
        "dilations": list(dilation),
        "group": groups,
    }
    if transposed:
        return state.emit(
            "ConvTranspose",
            operands,
            node.name,
            output_padding=list(out),
            **attributes,
        )
    return state.emit("Conv", operands, node.name, **attributes)


def _batch_norm(state: State, node: fx.Node) -> str:
    source, weight, bias, mean, variance, _, epsilon = arguments(node)
    width = shape_of(mean)
    ones, zeros = (
        state.emit("Expand", [state.number(each, torch.float32), state.integers(list(width))])
        for each in (1.0, 0.0)
    )
    operands = [
        state.value(source),
        ones if weight is None else state.value(weight),
        zeros if bias is None else state.value(bias),
        state.value(mean),
        state.value(variance),
    ]
    return state.emit("BatchNormalization", operands, node.name, epsilon=epsilon)


def _layer_norm(state: State, node: fx.Node) -> str:
    shape, weight, bias, epsilon = _given(node, (), None, None, 1e-5, at=1)[:4]
    if not all(isinstance(dim, int) for dim in shape):
        raise ExportError(f"a norm over a dynamic dimension is not lowered{user_line(node)}")
    if weight is None:
        one = state.number(1.0, dtype_of(node))
        scale = state.emit("Expand", [one, state.integers(list(shape))])
    else:
        scale = state.value(weight)
    operands = [
        state.value(arguments(node)[0]),
        scale,
        *([] if bias is None else [state.value(bias)]),
    ]
    return state.emit("LayerNormalization", operands, node.name, axis=-len(shape), epsilon=epsilon)


def _rms_norm(state: State, node: fx.Node) -> str:
    shape, weight, epsilon = _given(node, (), None, None, at=1)
    epsilon = torch.finfo(dtype_of(node)).eps if epsilon is None else epsilon
    if weight is None:
        one = state.number(1.0, dtype_of(node))
        scale = state.emit("Expand", [one, state.integers(list(shape))])
    else:
        scale = state.value(weight)
    operands = [state.value(arguments(node)[0]), scale]
    return state.emit("RMSNormalization", operands, node.name, axis=-len(shape), epsilon=epsilon)


def _group_norm(state: State, node: fx.Node) -> str:
    groups, weight, bias, epsilon = _given(node, 1, None, None, 1e-5, at=1)[:4]
    channels = shape_of(node)[1]
    scale, shift = (
        state.emit("Expand", [state.number(number, dtype_of(node)), state.integers([channels])])
        if given is None
        else state.value(given)
        for given, number in ((weight, 1.0), (bias, 0.0))
    )
    return state.emit(
        "GroupNormalization",
        [state.value(arguments(node)[0]), scale, shift],
        node.name,
        num_groups=groups,
        epsilon=epsilon,
    )


def _softmax(op: str) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        given = state.value(arguments(node)[0], dtype_of(node))
        return state.emit(op, [given], node.name, axis=arguments(node)[1])

    return handle


def _attention(state: State, node: fx.Node) -> str:
    """Softmax of scaled products of queries and keys, plus a mask, times values.

    Given::

        %y = aten::scaled_dot_product_attention(%q, %k, %v, %mask, 0.0, causal, scale=s)

    Result::

        %y = MatMul(Softmax(Mul(MatMul(%q, Transpose(%k)), s) + mask), %v)
    """
    query, key, value = (state.value(each) for each in arguments(node)[:3])
    mask, _, causal = _given(node, None, 0.0, False, at=3)[:3]
    if node.kwargs.get("enable_gqa"):
        raise ExportError(f"attention of grouped queries is not lowered{user_line(node)}")
    width = shape_of(arguments(node)[0])[-1]
    scale = node.kwargs.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else scale
    kind = dtype_of(node)
    order = list(range(len(shape_of(node))))
    order[-1], order[-2] = order[-2], order[-1]
    turned = state.emit("Transpose", [key], perm=order)
    scores = state.emit("Mul", [state.emit("MatMul", [query, turned]), state.number(scale, kind)])
    hidden = state.number(torch.finfo(kind).min, kind)
    if isinstance(mask, fx.Node):
        if dtype_of(mask) == torch.bool:
            scores = state.emit("Where", [state.value(mask), scores, hidden])
        else:
            scores = state.emit("Add", [scores, state.value(mask, kind)])
    elif causal:
        shape = state.emit("Shape", [scores])
        ones = state.emit("Expand", [state.number(1, torch.int64), shape])
        below = state.emit("Trilu", [ones], upper=0)
        seen = state.emit("Equal", [below, state.number(1, torch.int64)])
        scores = state.emit("Where", [seen, scores, hidden])
    shares = state.emit("Softmax", [scores], axis=-1)
    return state.emit("MatMul", [shares, value], node.name)


def _reduced(op: str) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        dims, keep = _given(node, None, False, at=1)[:2]
        axes = [dims] if isinstance(dims, int) else list(dims or [])
        operands = [state.value(arguments(node)[0], dtype_of(node))]
        if axes:
            operands.append(state.integers(axes))
        return state.emit(op, operands, node.name, keepdims=int(keep))

    return handle


def _any(state: State, node: fx.Node) -> str:
    dims, keep = _given(node, None, False, at=1)[:2]
    axes = [dims] if isinstance(dims, int) else list(dims or [])
    held = state.emit(
        "Cast", [state.value(arguments(node)[0], torch.bool)], to=element_of(torch.int32)
    )
    operands = [held, *([state.integers(axes)] if axes else [])]
    most = state.emit("ReduceMax", operands, keepdims=int(keep))
    return state.emit("Greater", [most, state.number(0, torch.int32)], node.name)


def _argument(op: str) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        axis, keep = _given(node, None, False, at=1)[:2]
        source = state.value(arguments(node)[0])
        if axis is None:
            source = state.emit("Reshape", [source, state.integers([-1])])
        return state.emit(op, [source], node.name, axis=axis or 0, keepdims=int(keep))

    return handle


def _vector_norm(state: State, node: fx.Node) -> str:
    order, dims, keep = _given(node, 2, None, False, at=1)[:3]
    if order not in (1, 2):
        raise ExportError(f"a norm of order {order} is not lowered{user_line(node)}")
    axes = [dims] if isinstance(dims, int) else list(dims or [])
    operands = [state.value(arguments(node)[0], dtype_of(node))]
    if axes:
        operands.append(state.integers(axes))
    return state.emit(f"ReduceL{order:g}", operands, node.name, keepdims=int(keep))


def _cumsum(state: State, node: fx.Node) -> str:
    axis = state.number(arguments(node)[1], torch.int64)
    return state.emit("CumSum", [state.value(arguments(node)[0], dtype_of(node)), axis], node.name)


def _pads(padding: Sequence[int], rank: int) -> list[int]:
    sides = list(padding) * (rank if len(padding) == 1 else 1)
    return sides * 2


def _max_pool(state: State, node: fx.Node) -> str:
    kernel, stride, padding, dilation, ceil = _given(node, (), (), (0,), (1,), False, at=1)
    rank = len(kernel)
    return state.emit(
        "MaxPool",
        [state.value(arguments(node)[0])],
        node.name,
        kernel_shape=list(kernel),
        strides=list(stride or kernel),
        pads=_pads(padding, rank),
        dilations=list(dilation) * (rank if len(dilation) == 1 else 1),
        ceil_mode=int(ceil),
    )


def _average_pool(state: State, node: fx.Node) -> str:
    kernel, stride, padding, ceil, included, divisor = _given(
        node, (), (), (0,), False, True, None, at=1
    )
    if divisor is not None:
        raise ExportError(f"an average with a divisor of its own is not lowered{user_line(node)}")
    return state.emit(
        "AveragePool",
        [state.value(arguments(node)[0])],
        node.name,
        kernel_shape=list(kernel),
        strides=list(stride or kernel),
        pads=_pads(padding, len(kernel)),
        ceil_mode=int(ceil),
        count_include_pad=int(included),
    )


def _adaptive_average(state: State, node: fx.Node) -> str:
    asked, before = list(arguments(node)[1]), shape_of(arguments(node)[0])
    source = state.value(arguments(node)[0])
    if all(size == 1 for size in asked):
        return state.emit("GlobalAveragePool", [source], node.name)
    inner = before[-len(asked) :]
    if not all(isinstance(a, int) and a % b == 0 for a, b in zip(inner, asked, strict=True)):
        raise ExportError(
            f"an adaptive average of {inner} to {asked} has windows of different sizes, which ONNX "
            f"has no operator for{user_line(node)}"
        )
    kernel = [a // b for a, b in zip(inner, asked, strict=True)]
    return state.emit("AveragePool", [source], node.name, kernel_shape=kernel, strides=kernel)


def _upsample(mode: str) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        sizes = shape_of(node)
        aligned = bool(arguments(node)[2]) if mode == "linear" else False
        kind = "align_corners" if aligned else "half_pixel" if mode == "linear" else "asymmetric"
        shape = state.emit("Shape", [state.value(arguments(node)[0])], start=0, end=2)
        whole = state.emit("Concat", [shape, state.integers(list(sizes[2:]))], axis=0)
        operands = [state.value(arguments(node)[0]), "", "", whole]
        return state.emit(
            "Resize",
            operands,
            node.name,
            mode=mode,
            coordinate_transformation_mode=kind,
            nearest_mode="floor",
        )

    return handle


HANDLERS: Final[Mapping[object, Handler]] = {
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.addmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten._softmax.default: _softmax("Softmax"),
    aten.softmax.int: _softmax("Softmax"),
    aten._log_softmax.default: _softmax("LogSoftmax"),
    aten.log_softmax.int: _softmax("LogSoftmax"),
    aten.scaled_dot_product_attention.default: _attention,
    aten.mean.dim: _reduced("ReduceMean"),
    aten.mean.default: _reduced("ReduceMean"),
    aten.sum.dim_IntList: _reduced("ReduceSum"),
    aten.sum.default: _reduced("ReduceSum"),
    aten.amax.default: _reduced("ReduceMax"),
    aten.amin.default: _reduced("ReduceMin"),
    aten.any.default: _any,
    aten.any.dim: _any,
    aten.any.dims: _any,
    aten.argmax.default: _argument("ArgMax"),
    aten.argmin.default: _argument("ArgMin"),
    aten.linalg_vector_norm.default: _vector_norm,
    aten.cumsum.default: _cumsum,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _average_pool,
    aten.avg_pool1d.default: _average_pool,
    aten._adaptive_avg_pool2d.default: _adaptive_average,
    aten.adaptive_avg_pool2d.default: _adaptive_average,
    aten.adaptive_avg_pool1d.default: _adaptive_average,
    aten.upsample_nearest2d.vec: _upsample("nearest"),
    aten.upsample_bilinear2d.vec: _upsample("linear"),
}
