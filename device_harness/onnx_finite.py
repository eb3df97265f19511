"""Finds the node of an ONNX graph that gives the first NaN or infinite value.

The graph runs again with the results of a few nodes as further outputs, then of the next few, until
one is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from device_harness.finite import described

if TYPE_CHECKING:
    import onnxruntime
    from onnx import ModelProto, NodeProto

# Nodes whose results are looked at in one run: it bounds the memory that they take.
NODES_A_RUN = 16


def first_not_finite(
    graph: Path,
    feeds: Mapping[str, Any],
    open_session: Callable[[bytes], onnxruntime.InferenceSession],
) -> str | None:
    """Returns a phrase for the first node whose result is not finite, None for none.

    Args:
        graph: the .onnx, beside its weight file.
        feeds: the graph's inputs.
        open_session: opens a graph that is given as bytes, with weights from the same folder.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type != "Identity"]
    for start in range(0, len(nodes), NODES_A_RUN):
        part = nodes[start : start + NODES_A_RUN]
        shown = _with_outputs(model, [node.output[0] for node in part if node.output[0]])
        session = open_session(shown.SerializeToString())
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(names, dict(feeds)), strict=True))
        for node, values in _results(part, found):
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                return _described(model, node)
    return None


def _with_outputs(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """Returns a copy of a model with these values as its only outputs."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return copy


def _results(
    nodes: Sequence[NodeProto], found: Mapping[str, Any]
) -> Iterator[tuple[NodeProto, Any]]:
    for node in nodes:
        if node.output[0] in found:
            yield node, found[node.output[0]]


def _described(model: ModelProto, node: NodeProto) -> str:
    initializers = {tensor.name for tensor in model.graph.initializer}
    weights = []
    for each in model.graph.node:
        for name in each.input:
            head, point, _ = name.rpartition(".weight")
            if point and name in initializers:
                weights.append(f"{head}.weight")
        if each.name == node.name:
            break
    return described(f"{node.op_type} {node.output[0]!r}", weights)
