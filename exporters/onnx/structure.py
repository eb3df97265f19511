"""What an ONNX artifact's graphs consist of: operators, products, states and initializers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporters.damaged_files import one_sentence
from exporters.onnx.model_file import external_place, load_graph
from exporters.structure import Section, count_elements

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto


def structure_of(graphs: Iterable[Path]) -> tuple[Section, ...]:
    """Tables of each graph's operators, quantized products, states and initializers.

    Raises:
        ExportError: a file is no ONNX model.
    """
    import onnx

    operators: Counter[tuple[str, str]] = Counter()
    products: Counter[tuple[str, str]] = Counter()
    tensors: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    caches: Counter[tuple[str, str, str]] = Counter()
    recent: Counter[tuple[str, str, int]] = Counter()
    memories: Counter[tuple[str, str, int, int, int]] = Counter()
    for path in graphs:
        graph = load_graph(path).graph
        with one_sentence(path, "an ONNX model"):
            types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
            for node in _nodes(graph):
                operators[path.name, f"{node.domain or 'ai.onnx'}::{node.op_type}"] += 1
                if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
                    given = {attribute.name: attribute.i for attribute in node.attribute}
                    # Where the graph has no attribute, the operator's default values apply.
                    bits, block = given.get("bits", 4), given.get("block_size", 128)
                    products[path.name, f"{node.op_type}, {bits} bits, blocks of {block}"] += 1
                if node.op_type == "QGemm":
                    products[path.name, "QGemm, 8 bits, activations too"] += 1
                if node.op_type == "GroupQueryAttention":
                    for kind, past in zip("kv", node.input[3:5], strict=True):
                        dtype = onnx.TensorProto.DataType.Name(types[past]).lower()
                        caches[path.name, dtype, _cache_scales(node, kind)] += 1
            for value in graph.input:
                kind = value.type.tensor_type
                dtype = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
                sizes_of = [each.dim_value for each in kind.shape.dim]
                if value.name.endswith((".conv", ".conv_state")):
                    recent[path.name, dtype, sizes_of[2]] += 1
                elif value.name.endswith(".recurrent_state"):
                    memories[path.name, dtype, sizes_of[1], sizes_of[2], sizes_of[3]] += 1
            for tensor in graph.initializer:
                key = path.name, onnx.TensorProto.DataType.Name(tensor.data_type).lower()
                tensors[key] += 1
                elements[key] += count_elements(tensor.dims)
                apart = bool(tensor.external_data)
                sizes[key] += external_place(tensor, path)[2] if apart else tensor.ByteSize()
    return (
        Section(
            "Operators",
            ("graph", "operator", "nodes"),
            tuple((*key, count) for key, count in sorted(operators.items())),
        ),
        Section(
            "Quantized products and lookups",
            ("graph", "format", "nodes"),
            tuple((*key, count) for key, count in sorted(products.items())),
        ),
        Section(
            "Caches",
            ("graph", "type", "scales", "caches"),
            tuple((*key, count) for key, count in sorted(caches.items())),
        ),
        *_section("Recent tokens", ("graph", "type", "tokens", "states"), recent),
        *_section("Memories", ("graph", "type", "heads", "rows", "columns", "states"), memories),
        Section(
            "Initializers",
            ("graph", "type", "tensors", "elements", "bytes"),
            tuple((*key, tensors[key], elements[key], sizes[key]) for key in sorted(tensors)),
        ),
    )


def _section(title: str, columns: tuple[str, ...], counted: Mapping[Any, int]) -> list[Section]:
    """A table of states of one kind; none where there are none."""
    rows = tuple((*key, count) for key, count in sorted(counted.items()))
    return [Section(title, columns, rows)] if rows else []


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph, and those of its branches after the node that has them."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _cache_scales(attention: NodeProto, kind: str) -> str:
    """The kind of scales that an attention's key or value cache has, in words."""
    given = {attribute.name: attribute.s for attribute in attention.attribute}
    granularity = bytes(given.get(f"{kind}_quant_type", b"NONE")).decode()
    known = {"NONE": "none", "PER_CHANNEL": "static, one for each head and column"}
    return known.get(granularity, granularity)
