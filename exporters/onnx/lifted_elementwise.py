"""Lifts activation functions, factors and bounds; see `exporters.onnx.elementwise`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from exporters.lifted import (
    Clamp,
    Constant,
    Gelu,
    Product,
    Scaled,
    Sigmoid,
    Silu,
    Softcap,
    Unknown,
    Value,
)
from exporters.lifted_recurrent import (
    Function,
    FunctionName,
)
from exporters.onnx.lifted_values import Graph, Lifted

if TYPE_CHECKING:
    from onnx import NodeProto

_CLOSE: Final = 1e-6
_FUNCTIONS: Final[Mapping[str, FunctionName]] = {
    "Tanh": "tanh",
    "Relu": "relu",
    "Exp": "exp",
    "Softplus": "softplus",
}


def silu(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts SiLU, which is QuickGelu with an alpha of 1."""
    return (Silu(node.output[0], given[0]),) if attributes.get("alpha") == 1.0 else None


def gelu(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts GELU."""
    form = attributes.get("approximate", b"none")
    if node.domain or form not in (b"none", b"tanh"):
        return None
    return (Gelu(node.output[0], given[0], form == b"tanh"),)


def sigmoid(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a sigmoid."""
    return (Sigmoid(node.output[0], given[0]),)


def function(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts tanh, relu, exp and softplus."""
    return (Function(node.output[0], given[0], _FUNCTIONS[node.op_type]),)


def factor(name: str, source: Value, by: Value) -> Value | None:
    """A value times one number, or a softcap's last step; None where the factor is no number."""
    number = _number(by)
    if number is None:
        return None
    if isinstance(source, Function) and source.function == "tanh":
        inner = source.source
        if isinstance(inner, Scaled) and abs(inner.factor * number - 1) < _CLOSE:
            return Softcap(name, inner.source, number)
    if isinstance(source, Unknown):
        return None
    return Scaled(name, source, number)


def mul(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a product of two values, or of a value and a number."""
    made = factor(node.output[0], given[0], given[1])
    return (made or Product(node.output[0], (given[0], given[1])),)


def div(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a division by a number."""
    number = _number(given[1])
    if not number or isinstance(given[0], Unknown):
        return None
    return (Scaled(node.output[0], given[0], 1 / number),)


def clip(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a bound on magnitudes."""
    bounds = [_number(each) for each in given[1:]]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None or bounds[0] != -bounds[1]:
        return None
    return (Clamp(node.output[0], given[0], bounds[1]),)


def _number(value: Value) -> float | None:
    """The one number of a constant without dimensions."""
    if isinstance(value, Constant) and value.array.shape == () and value.array.dtype.kind == "f":
        return float(value.array)
    return None
