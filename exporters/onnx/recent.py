"""Emits the row of the tokens before a call and its own, and the state that keeps the last."""

from __future__ import annotations

import numpy as np

from exporters.onnx.graph import GraphBuilder
from exporters.onnx.positions import begins, recent_tokens


def emit_row(
    builder: GraphBuilder, name: str, source: str, past: str, present: str, count: int
) -> str:
    """Emits a row of some tokens from before the call and the new ones, and the new state.

    Result, for 2 tokens from before the call::

        %name_before = Transpose(Where(begins, 0, %past))           # [batch, 2, n]
        %name_row = Concat(%name_before, %source)                   # [batch, 2 + t, n]
        %present = Transpose(GatherND(%name_row, last_2_tokens))    # [batch, n, 2]

    A row whose text begins takes zeros in place of what the state holds, whatever that is.

    Args:
        builder: the graph.
        name: what the values' names begin with.
        source: the new tokens, ``float32[batch, t, n]``.
        past: the graph's input of the state, ``float32[batch, n, count]``.
        present: its output, in the same shape.
        count: how many tokens the state holds.

    Returns:
        The name of the row, ``float32[batch, count + t, n]``.
    """
    zero = builder.constant("float_zero", np.array(0, np.float32))
    builder.node("Where", [begins(builder), zero, past], f"{name}_state")
    builder.node("Transpose", [f"{name}_state"], f"{name}_before", perm=[0, 2, 1])
    row = builder.node("Concat", [f"{name}_before", source], f"{name}_row", axis=1)
    kept = recent_tokens(builder, count)
    builder.node("GatherND", [row, kept], f"{name}_recent", batch_dims=1)
    builder.node("Transpose", [f"{name}_recent"], present, perm=[0, 2, 1])
    return row
