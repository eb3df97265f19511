"""Lifts lookups and products with weights; see `exporters.onnx.quantized` and `rounded`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.lifted import (
    Bias,
    Constant,
    Embedding,
    Linear,
    Precision,
    Product,
    StoredFormat,
    StoredWeight,
    Sum,
    Tokens,
    Unknown,
    Value,
)
from exporters.onnx import lifted_elementwise
from exporters.onnx.lifted_values import Graph, Lifted, Part

if TYPE_CHECKING:
    from onnx import NodeProto


def _format(codes: Value, scale: Value, zero: Value | None, bits: int) -> StoredFormat | None:
    if not isinstance(codes, Part) or not isinstance(scale, Part):
        return None
    parts = [part for part in (codes, scale, zero) if isinstance(part, Part)]
    if any(part.weight != codes.weight for part in parts):
        return None  # scales or zero points of another weight
    return StoredFormat("int", bits, scale.shape[-1], zero is not None)


def nbits(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts MatMulNBits."""
    zero = given[3] if len(given) > 3 and node.input[3] else None
    format = _format(given[1], given[2], zero, attributes.get("bits", 4))
    if format is None or not isinstance(given[1], Part):
        return None
    level = attributes.get("accuracy_level", 0)
    precision: Precision = "int8" if level == 4 else "float32"
    weight, name = StoredWeight(given[1].weight, format), node.output[0]
    if len(given) > 4 and (node.input[4] or len(given) != 6):
        return None
    if len(given) < 6:
        return (Linear(name, given[0], weight, precision),)
    biased = _biased(graph, name, Linear(f"{name}_unbiased", given[0], weight, precision), given[5])
    return None if biased is None else (biased,)


def _biased(graph: Graph, name: str, product: Value, vector: Value) -> Bias | None:
    """A product and a vector that is added to it; None where that is no weight."""
    if not isinstance(vector, Part) or len(vector.shape) != 1:
        return None
    stored = StoredWeight(vector.weight, StoredFormat(vector.dtype))
    return Bias(name, product, stored, graph.array(vector.tensor).astype(np.float32))


def lookup(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts GatherBlockQuantized."""
    zero = given[3] if len(given) > 3 and node.input[3] else None
    format = _format(given[0], given[2], zero, attributes.get("bits", 4))
    if format is None or not isinstance(given[0], Part) or not isinstance(given[1], Tokens):
        return None
    return (Embedding(node.output[0], StoredWeight(given[0].weight, format)),)


def gather(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the rows of a float table."""
    table = given[0]
    if isinstance(table, Part) and isinstance(given[1], Tokens):
        weight = StoredWeight(table.weight, StoredFormat(table.dtype))
        return (Embedding(node.output[0], weight),)
    return None


def cast(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lets an embedding's rows pass, which only a cast to float32 does not change."""
    return given[:1] if isinstance(given[0], Embedding) and attributes["to"] == 1 else None


def matmul(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a product with a float weight."""
    weight = given[1]
    plain = attributes.get("transB") == 1 and not attributes.get("transA")
    if not isinstance(weight, Part) or not plain or attributes.get("alpha") != 1.0:
        return None
    stored = StoredWeight(weight.weight, StoredFormat(weight.dtype))
    return (Linear(node.output[0], given[0], stored, "float32"),)


def add(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a bias, a product of which some columns are multiplied apart, or a sum."""
    name, first, second = node.output[0], given[0], given[1]
    biased = _biased(graph, name, first, second)
    if biased is not None:
        return (biased,)
    found = _parted(name, first, second) or _adapted(first, second)
    return (found or Sum(name, (first, second)),)


def _adapted(product: Value, change: Value) -> Value | None:
    """A product to which an adapter may be added; see `exporters.onnx.adapters`.

    Its factors are empty by default, so that the product is what the graph computes.
    """
    linear = product.source if isinstance(product, Bias) else product
    if not (isinstance(linear, Linear) and isinstance(change, Unknown) and change.kind == "MatMul"):
        return None
    low, up = change.operands
    if not (isinstance(low, Unknown) and low.kind == "MatMul" and isinstance(up, Constant)):
        return None
    source, down = low.operands
    empty = isinstance(down, Constant) and not down.array.size and not up.array.size
    return product if empty and source is linear.source else None


def _parted(name: str, rounded: Value, exact: Value) -> Value | None:
    """A product of which some columns are multiplied apart; see `exporters.onnx.quantized`."""
    if isinstance(rounded, Bias):
        product = _parted(f"{name}_unbiased", rounded.source, exact)
        return None if product is None else Bias(name, product, rounded.weight, rounded.values)
    if not (isinstance(rounded, Linear) and isinstance(exact, Unknown) and exact.kind == "MatMul"):
        return None
    rest, (large, values) = rounded.source, exact.operands
    if not (isinstance(rest, Product) and isinstance(large, Unknown) and large.kind == "Gather"):
        return None
    source, columns = large.operands
    mask = rest.factors[1]
    if not (isinstance(columns, Constant) and isinstance(mask, Constant)):
        return None
    kept = tuple(map(int, columns.array))
    same = isinstance(values, Part) and values.weight == rounded.weight.name
    whole = tuple(map(int, np.flatnonzero(mask.array == 0))) == kept
    if not (same and whole and source is rest.factors[0] and set(mask.array.tolist()) <= {0, 1}):
        return None
    return Linear(name, source, rounded.weight, rounded.precision, kept)


def mul(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a product; a token's step completes one of rounded activations."""
    first, second = given
    if isinstance(first, Part):
        return None
    if isinstance(first, Unknown) and first.kind == "QGemm per token":
        product = first.operands[0]
        assert isinstance(product, Linear)
        if product.source in _ancestors(second):
            return (product,)
        return None
    return lifted_elementwise.mul(graph, node, given, attributes)


def _ancestors(value: Value) -> list[Value]:
    """An unknown value's operands, theirs, and so on."""
    found, waiting = [], [value]
    while waiting:
        found.append(waiting.pop())
        if isinstance(found[-1], Unknown):
            waiting.extend(found[-1].operands)
    return found


def quantize(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the rounding of activations that the plan asks for."""
    fixed = isinstance(given[1], Part)
    kind = "int8-tensor" if fixed else "int8-token"
    return (Unknown(node.output[0], kind, given),)


def qgemm(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a product of 8-bit activations."""
    codes, rows, scale = given[0], given[3], given[4]
    if not (isinstance(codes, Unknown) and isinstance(rows, Part) and isinstance(scale, Part)):
        return None
    if rows.weight != scale.weight or codes.kind not in ("int8-token", "int8-tensor"):
        return None
    weight = StoredWeight(rows.weight, StoredFormat("int", 8, 1))
    per_token = codes.kind == "int8-token"
    precision: Precision = "int8-token" if per_token else "int8-tensor"
    product = Linear(node.output[0], codes.operands[0], weight, precision)
    if per_token:  # the step of each token follows
        return (Unknown(node.output[0], "QGemm per token", (product,)),)
    return (product,)
