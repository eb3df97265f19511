"""Reads integers and scales of a module's weights back from its .onnx."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from exporters.damaged_files import one_sentence
from exporters.onnx.model_file import load_graph
from exporters.onnx.reader import Parts, stored_part
from exporters.stored_digests import digests_of

_PARTS: Final = {
    "blocks": "codes",
    "rows": "codes",
    "codes": "codes",
    "scale_bf16": "scale",
}


def stored_digests(graph: Path, names: Iterable[str]) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of weights from the written files alone.

    Args:
        graph: the ONNX file.
        names: the weights to look for.

    Raises:
        ExportError: a file is missing, too short, or no ONNX model.
    """
    model, wanted = load_graph(graph), set(names)
    weights: dict[str, Parts] = {}
    with one_sentence(graph, "an ONNX model"):
        for tensor in model.graph.initializer:
            name, _, suffix = tensor.name.rpartition(".")
            if name in wanted and suffix in _PARTS:
                parts = weights.setdefault(name, {})
                stored = stored_part(tensor, graph)
                known = parts.setdefault(_PARTS[suffix], [])
                if stored not in known:
                    known.append(stored)
    whole = {name: parts for name, parts in weights.items() if {"codes", "scale"} <= parts.keys()}
    files = {each.file for p in whole.values() for places in p.values() for each in places}
    size = sum(file.stat().st_size for file in {graph, *files} if file is not None)
    return digests_of(whole, graph.parent, size)
