"""Emits norms, each with the residual addition before it where one kernel does both."""

from __future__ import annotations

from typing import Final

import numpy as np
from torch import fx

from exporters.onnx import quantized
from exporters.onnx.graph import MICROSOFT
from exporters.onnx.state import Lowering
from quant.program import dialect
from quant.program.calls import LayerNormCall, NormCall
from quant.program.program import node_argument, shape_of

_NORMS: Final = (dialect.RMS_NORM, dialect.LAYER_NORM)


def emit_rms_norm(state: Lowering, node: fx.Node) -> None:
    """Emits RMSNorm, unless `emit_add` emits it with the addition before it."""
    source = node_argument(node, 0)
    if following_norm(source) is node:
        return
    state.builder.node(
        "RMSNormalization",
        [state.name(source), *_weights(state, node)],
        state.name(node),
        axis=-1,
        epsilon=NormCall.of(node).epsilon,
        stash_type=1,
    )


def emit_layer_norm(state: Lowering, node: fx.Node) -> None:
    """Emits LayerNorm, unless `emit_add` emits it with the addition before it."""
    source = node_argument(node, 0)
    if following_norm(source) is node:
        return
    state.builder.node(
        "LayerNormalization",
        [state.name(source), *_weights(state, node)],
        state.name(node),
        axis=-1,
        epsilon=LayerNormCall.of(node).epsilon,
        stash_type=1,
    )


def emit_l2_norm(state: Lowering, node: fx.Node) -> None:
    """Emits a norm to the length 1 as an RMSNorm with a constant scale.

    ``x / sqrt(sum(x**2) + eps)`` is ``x / sqrt(mean(x**2) + eps / n)``, divided by ``sqrt(n)``.
    """
    width, epsilon = shape_of(node)[-1], node.args[1]
    assert isinstance(epsilon, float)
    scale = state.builder.table(f"unit_{width}", np.full(width, width**-0.5, np.float32))
    state.builder.node(
        "RMSNormalization",
        [state.operand(node, 0), scale],
        state.name(node),
        axis=-1,
        epsilon=epsilon / width,
        stash_type=1,
    )


def emit_add(state: Lowering, node: fx.Node) -> None:
    """Fuses a residual addition with the norm that follows.

    Given::

        %s = aten::add(%x, %skip)
        %n = edgeforge::rms_norm(%s, %w, eps)

    Result::

        %n, _, _, %s = SkipSimplifiedLayerNormalization(%x, %skip, %w)

    and likewise SkipLayerNormalization for ``edgeforge::layer_norm``. An addition that no norm
    follows, as after a branch that ends in a norm of its own, stays an addition.
    """
    norm = following_norm(node)
    operands = [state.operand(node, 0), state.operand(node, 1)]
    if norm is None:
        state.builder.node("Add", operands, state.name(node))
        return
    is_rms = norm.target is dialect.RMS_NORM
    others = [user for user in node.users if user is not norm]
    state.builder.node(
        "SkipSimplifiedLayerNormalization" if is_rms else "SkipLayerNormalization",
        [*operands, *_weights(state, norm)],
        [state.name(norm), "", "", state.name(node)] if others else [state.name(norm)],
        domain=MICROSOFT,
        epsilon=NormCall.of(norm).epsilon if is_rms else LayerNormCall.of(norm).epsilon,
    )


def following_norm(add: fx.Node) -> fx.Node | None:
    """The norm that one kernel computes with an addition; None where there is none, or several."""
    if add.target is not dialect.ADD:
        return None
    norms = [user for user in add.users if user.target in _NORMS]
    return norms[0] if len(norms) == 1 else None


def _weights(state: Lowering, norm: fx.Node) -> list[str]:
    """The names of a norm's scale and, where it has one, its shift.

    The kernels of LayerNorm cannot do without a scale: a norm that has none gets ones.
    """
    if norm.target is dialect.RMS_NORM:
        return [quantized.float_weight(state, NormCall.of(norm).weight)]
    call = LayerNormCall.of(norm)
    if call.weight is None:
        width = shape_of(norm)[-1]
        scale = state.builder.table(f"ones_{width}", np.ones(width, np.float32))
    else:
        scale = quantized.float_weight(state, call.weight)
    return [scale, *([] if call.bias is None else [quantized.float_weight(state, call.bias)])]
