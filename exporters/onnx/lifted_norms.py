"""Lifts norms, alone or with the residual addition before them; see `exporters.onnx.norms`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.lifted import (
    Array,
    Constant,
    LayerNorm,
    Norm,
    StoredFormat,
    StoredWeight,
    Sum,
    Unknown,
    Value,
)
from exporters.lifted_recurrent import (
    UnitNorm,
)
from exporters.onnx.lifted_values import Graph, Lifted, Part

if TYPE_CHECKING:
    from onnx import NodeProto


def norm(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts RMSNorm and LayerNorm, and RMSNorm with a constant scale as a norm to the length 1."""
    if node.op_type == "RMSNormalization" and isinstance(given[1], Constant):
        return _unit(node, given[0], given[1].array, attributes)
    made = _normed(graph, node, node.output[0], given[0], given[1:], attributes)
    return None if made is None else (made,)


def _unit(node: NodeProto, source: Value, scale: Array, attributes: Mapping[str, Any]) -> Lifted:
    width = scale.size
    if scale.shape != (width,) or not np.allclose(scale, width**-0.5, rtol=1e-6, atol=0):
        return None
    if attributes.get("axis", -1) != -1:
        return None
    epsilon = float(attributes.get("epsilon", 1e-5)) * width
    return (UnitNorm(node.output[0], source, epsilon),)


def skip_norm(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a norm with the addition of its operands."""
    names = [*node.output, "", "", ""]
    total = Sum(names[3] or f"{names[0]}_sum", (given[0], given[1]))
    normed = _normed(graph, node, names[0], total, given[2:], attributes)
    if normed is None:
        return None
    return (normed, Unknown("", "mean"), Unknown("", "deviation"), total)


def _normed(
    graph: Graph,
    node: NodeProto,
    name: str,
    source: Value,
    weights: tuple[Value, ...],
    attributes: Mapping[str, Any],
) -> Value | None:
    """A norm with these weights; None where they are no weights, or the operator adds a third."""
    if attributes.get("axis", -1) != -1 or len(weights) > 2:
        return None
    epsilon = float(attributes.get("epsilon", 1e-5))
    if node.op_type not in ("LayerNormalization", "SkipLayerNormalization"):
        if len(weights) != 1 or not isinstance(weights[0], Part):
            return None
        return Norm(name, source, *_vector(graph, weights[0]), epsilon)
    found = [_optional(graph, value, plain) for value, plain in zip(weights, (1, 0), strict=False)]
    if None in found:
        return None
    (weight, values), (bias, shift) = [*(each for each in found if each), (None, None)][:2]
    return LayerNorm(name, source, weight, values, bias, shift, epsilon)


def _optional(
    graph: Graph, value: Value, plain: int
) -> tuple[StoredWeight, Array] | tuple[None, None] | None:
    """A weight, or none where only plain ones or zeros stand for it; None where it is neither."""
    if isinstance(value, Part):
        return _vector(graph, value)
    if isinstance(value, Constant) and bool((value.array == plain).all()):
        return None, None
    return None


def _vector(graph: Graph, part: Part) -> tuple[StoredWeight, Array]:
    """A weight that stays float, and its values as ``float32``."""
    values = graph.array(part.tensor).astype(np.float32)
    return StoredWeight(part.weight, StoredFormat(part.dtype)), values
