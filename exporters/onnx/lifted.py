"""Reads what the graphs of an ONNX artifact compute; see `exporters.lifted`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from exporters.lifted import (
    Array,
    Columns,
    Constant,
    EntryPoint,
    Numbers,
    Reading,
    Tokens,
    Unknown,
    Value,
    are_numbers,
    at,
    probes_of,
)
from exporters.onnx import (
    lifted_attention,
    lifted_convolution,
    lifted_elementwise,
    lifted_experts,
    lifted_norms,
    lifted_products,
    lifted_recurrence,
    lifted_routing,
    lifted_shift,
)
from exporters.onnx.genai_file import stated
from exporters.onnx.lifted_values import Graph, Handler, Lifted, Part
from exporters.onnx.numbers import NUMBERS

if TYPE_CHECKING:
    from onnx import NodeProto

_CHUNK: Final = 64
_PASS: Final = ("Identity", "Reshape")
# Everything the lowering emits; any other operator is outside of it.
_EMITTED: Final = frozenset(
    {
        *NUMBERS,
        *_PASS,
        *lifted_routing.EMITTED,
        "Div",
        "Neg",
        "Round",
        "ReduceMax",
        "ReduceMin",
        "QuantizeLinear",
        "QGemm",
        "MatMul",
        "FusedMatMul",
        "MatMulNBits",
        "GatherBlockQuantized",
        "GatherND",
        "BitShift",
        "BitwiseAnd",
        "Expand",
        "Transpose",
        "Split",
        "RMSNormalization",
        "LayerNormalization",
        "SkipSimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "QuickGelu",
        "Gelu",
        "Tanh",
        "Relu",
        "Exp",
        "Softplus",
        "If",
        "Clip",
        "Where",
        "Slice",
        "Sum",
        "RotaryEmbedding",
        "GroupQueryAttention",
    }
)


def read_graphs(folder: Path, graphs: list[Path], context: int) -> Reading:
    """Lifts every graph of an artifact.

    Args:
        folder: the artifact.
        graphs: its ONNX files.
        context: the declared context, tokens.

    Raises:
        ExportError: a file is missing or damaged.
    """
    probes = probes_of(context, (1, _CHUNK))
    tables: dict[tuple[object, ...], Array] = {}
    entry_points = []
    for path in graphs:
        with one_sentence(path, "an ONNX model"):
            entry_points.append(_lift(Graph(path, probes, tables)))
    lengths, ids = stated(folder)
    return Reading(tuple(entry_points), context=lengths, ids=ids)


def _lift(graph: Graph) -> EntryPoint:
    """Goes through the nodes in order; every handler gives the values of a node's outputs."""
    mask = tuple(np.ones((1, p.start + p.count), np.int64) for p in graph.probes)
    values = graph.values
    values["input_ids"] = Tokens("input_ids")
    values["attention_mask"] = Numbers("attention_mask", mask)
    for tensor in graph.graph.initializer:
        values[tensor.name] = graph.initializer(tensor)
    for node in graph.graph.node:
        if node.op_type not in _EMITTED:
            graph.outside.append(f"{node.op_type} at {node.output[0]}")
        given = tuple(values.get(name, Unknown(name, "input")) for name in node.input)
        for name, value in zip(node.output, _lifted(graph, node, given), strict=False):
            if name:
                values[name] = value
    if "logits" not in values:
        raise ExportError(f"{graph.path} has no output logits")
    return EntryPoint(graph.path.name, values["logits"], graph.probes, tuple(graph.outside))


def _lifted(graph: Graph, node: NodeProto, given: tuple[Value, ...]) -> tuple[Value, ...]:
    from onnx import helper

    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    kind, name = node.op_type, node.output[0]
    if kind == "Shape" and isinstance(given[0], Tokens):
        shapes = tuple(np.array([1, p.count], np.int64) for p in graph.probes)
        return (Numbers(name, shapes),)
    if kind in NUMBERS and given and are_numbers(given):
        arrays = tuple(
            NUMBERS[kind]([at(value, i) for value in given], attributes)
            for i in range(len(graph.probes))
        )
        return (Numbers(name, arrays),)
    for handler in _HANDLERS.get(kind, ()):
        lifted = handler(graph, node, given, attributes)
        if lifted is not None:
            return lifted
    first = given[0] if given else None
    if isinstance(first, Part):  # casts, repeats and values of single columns
        return (Part(name, first.weight, first.dtype, first.shape, first.tensor),)
    if kind in _PASS:
        return given[:1]
    return tuple(Unknown(each, kind, given) for each in node.output)


def _split(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    sizes = given[1]
    if not isinstance(sizes, Constant) or attributes.get("axis", 0) != -1:
        return None
    ends = np.cumsum(sizes.array).tolist()
    starts = [0, *ends[:-1]]
    return tuple(
        Columns(name, given[0], start, stop)
        for name, start, stop in zip(node.output, starts, ends, strict=True)
    )


_HANDLERS: Final[Mapping[str, tuple[Handler, ...]]] = {
    "MatMulNBits": (lifted_products.nbits,),
    "GatherBlockQuantized": (lifted_products.lookup,),
    "Gather": (lifted_products.gather, lifted_experts.gather),
    "Cast": (lifted_products.cast, lifted_experts.cast),
    "FusedMatMul": (lifted_products.matmul,),
    "RMSNormalization": (lifted_norms.norm,),
    "LayerNormalization": (lifted_norms.norm,),
    "SkipSimplifiedLayerNormalization": (lifted_norms.skip_norm,),
    "SkipLayerNormalization": (lifted_norms.skip_norm,),
    "Add": (lifted_recurrence.add, lifted_products.add),
    "Mul": (lifted_experts.mul, lifted_recurrence.gain, lifted_products.mul),
    "Div": (lifted_routing.divide, lifted_experts.divide, lifted_elementwise.div),
    "Clip": (lifted_elementwise.clip,),
    "QuickGelu": (lifted_elementwise.silu,),
    "Gelu": (lifted_elementwise.gelu,),
    "Sigmoid": (lifted_elementwise.sigmoid,),
    **dict.fromkeys(("Tanh", "Relu", "Exp", "Softplus"), (lifted_elementwise.function,)),
    "Split": (lifted_experts.split, _split),
    "GatherND": (lifted_routing.last,),
    "QuantizeLinear": (lifted_products.quantize,),
    "QGemm": (lifted_products.qgemm,),
    "RotaryEmbedding": (lifted_attention.rope,),
    "GroupQueryAttention": (lifted_attention.attention,),
    "Where": (lifted_convolution.where,),
    "Transpose": (lifted_convolution.transpose, lifted_experts.transpose),
    "Concat": (
        lifted_convolution.concat,
        lifted_shift.concat,
        lifted_recurrence.concat,
        lifted_routing.sparse_mixer,
        lifted_experts.concat,
    ),
    "Slice": (lifted_shift.slice_of, lifted_recurrence.slice_of),
    "If": (lifted_recurrence.branches,),
    "Sum": (lifted_convolution.convolution,),
    "Softmax": (lifted_routing.softmax,),
    "TopK": (lifted_routing.top_k, lifted_experts.order),
    "Equal": (lifted_routing.equal, lifted_experts.equal),
    "GatherElements": (lifted_routing.gather_share,),
    "ReduceSum": (lifted_routing.total, lifted_experts.reduce_sum),
    "Reshape": (lifted_experts.reshape,),
    "Unsqueeze": (lifted_experts.unsqueeze,),
}
"""By operator: what may lift it, in turn; of operands that are all numbers, none is asked."""
