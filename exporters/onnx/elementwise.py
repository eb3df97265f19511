"""Emits what works element by element: biases, activation functions, factors and bounds."""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import fx

from exporters.onnx import quantized
from exporters.onnx.graph import MICROSOFT
from exporters.onnx.state import Lowering
from quant.program import dialect
from quant.program.calls import FactorCall, GainCall
from quant.program.program import node_argument

_FUNCTIONS: Final[dict[object, str]] = {
    dialect.TANH: "Tanh",
    dialect.RELU: "Relu",
    dialect.EXP: "Exp",
    dialect.SOFTPLUS: "Softplus",
}


def emit_bias(state: Lowering, node: fx.Node) -> None:
    """Emits a bias that no kernel adds within its product (`quantized.emit_linear`)."""
    vector = quantized.float_weight(state, node_argument(node, 1))
    state.builder.node("Add", [state.operand(node, 0), vector], state.name(node))


def emit_mul(state: Lowering, node: fx.Node) -> None:
    """Emits a product of two values."""
    state.builder.node("Mul", [state.operand(node, 0), state.operand(node, 1)], state.name(node))


def emit_silu(state: Lowering, node: fx.Node) -> None:
    """Emits SiLU: QuickGelu is ``x * sigmoid(alpha * x)``, which is SiLU when alpha is 1."""
    state.builder.node(
        "QuickGelu", [state.operand(node, 0)], state.name(node), domain=MICROSOFT, alpha=1.0
    )


def emit_sigmoid(state: Lowering, node: fx.Node) -> None:
    """Emits a sigmoid."""
    state.builder.node("Sigmoid", [state.operand(node, 0)], state.name(node))


def emit_gain(state: Lowering, node: fx.Node) -> None:
    """Emits a product with a weight's factor of each column, or of each head."""
    factors = quantized.float_weight(state, GainCall.of(node).weight)
    state.builder.node("Mul", [state.operand(node, 0), factors], state.name(node))


def emit_function(state: Lowering, node: fx.Node) -> None:
    """Emits tanh, relu, exp or softplus."""
    state.builder.node(_FUNCTIONS[node.target], [state.operand(node, 0)], state.name(node))


def emit_gelu(state: Lowering, node: fx.Node) -> None:
    """Emits GELU, exact or in the form with a tanh."""
    form = str(node.args[1])
    state.builder.node("Gelu", [state.operand(node, 0)], state.name(node), approximate=form)


def emit_scale(state: Lowering, node: fx.Node) -> None:
    """Emits a product with one factor."""
    factor = _number(state, FactorCall.of(node).number)
    state.builder.node("Mul", [state.operand(node, 0), factor], state.name(node))


def emit_softcap(state: Lowering, node: fx.Node) -> None:
    """Emits ``cap * tanh(x / cap)``."""
    name, cap = state.name(node), _number(state, FactorCall.of(node).number)
    state.builder.node("Div", [state.operand(node, 0), cap], f"{name}_of_cap")
    state.builder.node("Tanh", [f"{name}_of_cap"], f"{name}_tanh")
    state.builder.node("Mul", [f"{name}_tanh", cap], name)


def emit_clamp(state: Lowering, node: fx.Node) -> None:
    """Emits a bound on magnitudes."""
    limit = FactorCall.of(node).number
    bounds = [_number(state, -limit), _number(state, limit)]
    state.builder.node("Clip", [state.operand(node, 0), *bounds], state.name(node))


def _number(state: Lowering, value: float) -> str:
    """A constant ``float32[]``, named by its value."""
    return state.builder.constant(f"number_{value!r}", np.array(value, np.float32))
