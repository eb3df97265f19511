"""Lifts attention, rotations and the last tokens' rows; see `exporters.onnx.attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.lifted import (
    Array,
    Attention,
    Cache,
    Constant,
    Last,
    Numbers,
    Probe,
    Rope,
    Unknown,
    Value,
    row_numbers,
)
from exporters.onnx.lifted_convolution import last_tokens
from exporters.onnx.lifted_values import Graph, Lifted

if TYPE_CHECKING:
    from onnx import NodeProto


def last(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts the selection of each row's last token, or of its last few."""
    recent = last_tokens(graph, node.output[0], given[0], given[1])
    if recent is not None and attributes.get("batch_dims") == 1:
        return (recent,)
    if not isinstance(given[1], Numbers) or attributes.get("batch_dims") != 1:
        return None
    rows = row_numbers(given[1], len(graph.probes))
    positions = max(map(len, rows))
    wanted = tuple(
        tuple(range(max(0, probe.count - positions), probe.count)) for probe in graph.probes
    )
    return (Last(node.output[0], given[0], positions),) if rows == wanted else None


def rope(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts a rotation outside of the attention."""
    source, cos, sin, rows = given[:4]
    if not (isinstance(cos, Constant) and isinstance(sin, Constant) and isinstance(rows, Numbers)):
        return None
    if attributes.get("interleaved", 0):
        return None
    return (
        Rope(node.output[0], source, cos.array, sin.array, row_numbers(rows, len(graph.probes))),
    )


def attention(
    graph: Graph, node: NodeProto, given: tuple[Value, ...], attributes: Mapping[str, Any]
) -> Lifted:
    """Lifts GroupQueryAttention, with the rotation inside of it."""
    q, k, v, _, _, lengths, total, *more = given
    if not (isinstance(lengths, Numbers) and isinstance(total, Numbers)):
        return None
    tokens = [int(array.ravel()[0]) for array in total.arrays]
    if tokens != [probe.start + probe.count for probe in graph.probes]:
        return None
    name, window = node.output[0], attributes.get("local_window_size", -1)
    # The kernel takes a row's length less one, and puts the new tokens at its end.
    ends = [int(lengths.arrays[i].ravel()[0]) + 1 for i in range(len(graph.probes))]
    rows = tuple(
        tuple(range(end - probe.count, end)) for end, probe in zip(ends, graph.probes, strict=True)
    )
    if attributes.get("do_rotary"):
        if not (len(more) > 1 and isinstance(more[0], Constant) and isinstance(more[1], Constant)):
            return None
        cos, sin = more[0].array, more[1].array
        q, k = (
            Rope(f"{name} of {part}", source, cos, sin, rows)
            for part, source in (("q", q), ("k", k))
        )
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    width = graph.input_width(node.input[3])
    written = [name if name in graph.outputs else f"{name}, no output" for name in node.output[1:]]
    keys, values = (
        Cache(_cache(read), _cache(to), None, rows)
        for read, to in zip(node.input[3:5], written, strict=True)
    )
    visible = tuple(
        _seen(probe, own, window) for probe, own in zip(graph.probes, rows, strict=True)
    )
    scale = float(attributes.get("scale", 0.0)) or width**-0.5
    softcap = float(attributes.get("softcap", 0.0))
    of = (heads, kv_heads, width)
    made = Attention(name, q, k, v, of, scale, keys, values, visible, softcap)
    return (made, Unknown(node.output[1], "cache"), Unknown(node.output[2], "cache"))


def _cache(name: str) -> str:
    """A cache's name without the side on which it enters or leaves: ``3.key``."""
    return name.removeprefix("past_key_values.").removeprefix("present.")


def _seen(probe: Probe, rows: tuple[int, ...], window: int) -> Array:
    own, keys = np.array(rows)[:, None], np.arange(probe.start + probe.count)[None]
    seen = keys <= own
    return seen & (keys > own - window) if window > 0 else seen
