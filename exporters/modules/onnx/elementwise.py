"""Handlers of operators that compute element by element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import fx

from exporters.modules.onnx.dtypes import element_of
from exporters.modules.onnx.state import State, arguments, dtype_of

Handler = Callable[[State, fx.Node], str]
aten = torch.ops.aten


def _unary(op: str, **attributes: object) -> Handler:
    """One operator of ONNX on the operand in the result's dtype."""

    def handle(state: State, node: fx.Node) -> str:
        return state.emit(
            op, [state.value(arguments(node)[0], dtype_of(node))], node.name, **attributes
        )

    return handle


def _binary(op: str) -> Handler:
    """One operator of ONNX on both operands in the result's dtype."""

    def handle(state: State, node: fx.Node) -> str:
        kind = dtype_of(node)
        left, right = (state.value(each, kind) for each in arguments(node)[:2])
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = state.emit("Mul", [right, state.value(alpha, kind)])
        return state.emit(op, [left, right], node.name)

    return handle


def _comparison(op: str) -> Handler:
    """One operator of ONNX on both operands in the dtype that torch would compare them in."""

    def handle(state: State, node: fx.Node) -> str:
        kind = _common(*arguments(node)[:2])
        return state.emit(op, [state.value(each, kind) for each in arguments(node)[:2]], node.name)

    return handle


def _logical(op: str) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        operands = [state.value(each, torch.bool) for each in arguments(node)[:2]]
        return state.emit(op, operands, node.name)

    return handle


def _bitwise(logical: str, bitwise: str) -> Handler:
    def handle(state: State, node: fx.Node) -> str:
        kind = dtype_of(node)
        operands = [state.value(each, kind) for each in arguments(node)[:2]]
        return state.emit(logical if kind == torch.bool else bitwise, operands, node.name)

    return handle


def _common(*operands: Any) -> torch.dtype:
    """The dtype to which torch promotes operands, some of which are numbers."""
    held = [each.meta["val"] if isinstance(each, fx.Node) else each for each in operands]
    return torch.result_type(*held)


def _div(state: State, node: fx.Node) -> str:
    kind, rounding = dtype_of(node), node.kwargs.get("rounding_mode")
    wide = kind if kind.is_floating_point else torch.float64
    whole = state.emit("Div", [state.value(each, wide) for each in arguments(node)[:2]], node.name)
    if rounding == "floor":
        whole = state.emit("Floor", [whole])
    elif rounding == "trunc":
        whole = state.emit("Mul", [state.emit("Sign", [whole]), _floored(state, whole)])
    return whole if wide == kind else state.emit("Cast", [whole], to=element_of(kind))


def _floored(state: State, name: str) -> str:
    return state.emit("Floor", [state.emit("Abs", [name])])


def _rsqrt(state: State, node: fx.Node) -> str:
    root = state.emit("Sqrt", [state.value(arguments(node)[0], dtype_of(node))])
    return state.emit("Reciprocal", [root], node.name)


def _gelu(state: State, node: fx.Node) -> str:
    kind = node.kwargs.get("approximate", "none")
    return state.emit("Gelu", [state.value(arguments(node)[0])], node.name, approximate=kind)


def _clamp(state: State, node: fx.Node) -> str:
    given = [*arguments(node)[1:], None, None]
    low, high = given[0], given[1]
    low = node.kwargs.get("min", low)
    high = node.kwargs.get("max", high)
    kind = dtype_of(node)
    limits = ["" if each is None else state.value(each, kind) for each in (low, high)]
    return state.emit("Clip", [state.value(arguments(node)[0], kind), *limits], node.name)


def _hardtanh(state: State, node: fx.Node) -> str:
    given = list(arguments(node)[1:])
    low, high = (*given, *(-1.0, 1.0)[len(given) :])[:2]
    kind = dtype_of(node)
    limits = [state.value(each, kind) for each in (low, high)]
    return state.emit("Clip", [state.value(arguments(node)[0], kind), *limits], node.name)


def _silu(state: State, node: fx.Node) -> str:
    given = state.value(arguments(node)[0])
    return state.emit("Mul", [given, state.emit("Sigmoid", [given])], node.name)


def _leaky(state: State, node: fx.Node) -> str:
    slope = arguments(node)[1] if len(arguments(node)) > 1 else 0.01
    return state.emit("LeakyRelu", [state.value(arguments(node)[0])], node.name, alpha=slope)


def _elu(state: State, node: fx.Node) -> str:
    alpha = arguments(node)[1] if len(arguments(node)) > 1 else 1.0
    return state.emit("Elu", [state.value(arguments(node)[0])], node.name, alpha=alpha)


def _where(state: State, node: fx.Node) -> str:
    kind = dtype_of(node)
    chosen = [state.value(each, kind) for each in arguments(node)[1:3]]
    return state.emit("Where", [state.value(arguments(node)[0], torch.bool), *chosen], node.name)


def _masked_fill(state: State, node: fx.Node) -> str:
    kind = dtype_of(node)
    chosen = [state.value(arguments(node)[2], kind), state.value(arguments(node)[0], kind)]
    return state.emit("Where", [state.value(arguments(node)[1], torch.bool), *chosen], node.name)


def _not(state: State, node: fx.Node) -> str:
    return state.emit("Not", [state.value(arguments(node)[0], torch.bool)], node.name)


def _same(state: State, node: fx.Node) -> str:
    """The operand in the result's dtype: copies, casts, and dropout outside training."""
    return state.value(arguments(node)[0], dtype_of(node))


def _mod(state: State, node: fx.Node) -> str:
    kind = dtype_of(node)
    left, right = (state.value(each, kind) for each in arguments(node)[:2])
    if not kind.is_floating_point:
        return state.emit("Mod", [left, right], node.name)
    floor = state.emit("Floor", [state.emit("Div", [left, right])])
    return state.emit("Sub", [left, state.emit("Mul", [floor, right])], node.name)


HANDLERS: Final[Mapping[object, Handler]] = {
    aten.relu.default: _unary("Relu"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.tanh.default: _unary("Tanh"),
    aten.exp.default: _unary("Exp"),
    aten.log.default: _unary("Log"),
    aten.sqrt.default: _unary("Sqrt"),
    aten.neg.default: _unary("Neg"),
    aten.abs.default: _unary("Abs"),
    aten.erf.default: _unary("Erf"),
    aten.sin.default: _unary("Sin"),
    aten.cos.default: _unary("Cos"),
    aten.floor.default: _unary("Floor"),
    aten.ceil.default: _unary("Ceil"),
    aten.round.default: _unary("Round"),
    aten.sign.default: _unary("Sign"),
    aten.reciprocal.default: _unary("Reciprocal"),
    aten.softplus.default: _unary("Softplus"),
    aten.hardswish.default: _unary("HardSwish"),
    aten.hardsigmoid.default: _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    aten.mish.default: _unary("Mish"),
    aten.rsqrt.default: _rsqrt,
    aten.gelu.default: _gelu,
    aten.silu.default: _silu,
    aten.leaky_relu.default: _leaky,
    aten.elu.default: _elu,
    aten.relu6.default: lambda state, node: state.emit(
        "Clip",
        [state.value(arguments(node)[0]), *(state.number(each, dtype_of(node)) for each in (0, 6))],
        node.name,
    ),
    aten.clamp.default: _clamp,
    aten.hardtanh.default: _hardtanh,
    aten.logical_not.default: _not,
    aten.bitwise_not.default: _not,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.add.Tensor: _binary("Add"),
    aten.add.Scalar: _binary("Add"),
    aten.sub.Tensor: _binary("Sub"),
    aten.sub.Scalar: _binary("Sub"),
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.div.Tensor_mode: _div,
    aten.pow.Tensor_Scalar: _binary("Pow"),
    aten.pow.Tensor_Tensor: _binary("Pow"),
    aten.pow.Scalar: _binary("Pow"),
    aten.maximum.default: _binary("Max"),
    aten.minimum.default: _binary("Min"),
    aten.remainder.Scalar: _mod,
    aten.remainder.Tensor: _mod,
    **{
        getattr(getattr(aten, name), kind): _comparison(op)
        for name, op in (
            ("eq", "Equal"),
            ("lt", "Less"),
            ("le", "LessOrEqual"),
            ("gt", "Greater"),
            ("ge", "GreaterOrEqual"),
        )
        for kind in ("Scalar", "Tensor")
    },
    aten.ne.Scalar: lambda state, node: state.emit("Not", [_comparison("Equal")(state, node)]),
    aten.ne.Tensor: lambda state, node: state.emit("Not", [_comparison("Equal")(state, node)]),
    aten.logical_and.default: _logical("And"),
    aten.logical_or.default: _logical("Or"),
    aten.logical_xor.default: _logical("Xor"),
    aten.bitwise_and.Tensor: _bitwise("And", "BitwiseAnd"),
    aten.bitwise_or.Tensor: _bitwise("Or", "BitwiseOr"),
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.dropout.default: _same,
    aten.contiguous.default: _same,
    aten._to_copy.default: _same,
    aten.lift_fresh_copy.default: _same,
}
