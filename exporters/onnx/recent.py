"""Emits the row of the tokens before a call and its own, and the state that keeps the last."""

from __future__ import annotations

import numpy as np

from exporters.onnx.graph import GraphBuilder
from exporters.onnx.positions import begins, recent_tokens


def emit_before(builder: GraphBuilder, name: str, past: str) -> str:
    """Emits the tokens before a call: ``[batch, n, count] -> [batch, count, n]``.

    A row whose text begins takes zeros in place of what the state holds, whatever that is::

        %name_before = Transpose(Where(begins, 0, %past))
    """
    zero = builder.constant("float_zero", np.array(0, np.float32))
    builder.node("Where", [begins(builder), zero, past], f"{name}_state")
    return builder.node("Transpose", [f"{name}_state"], f"{name}_before", perm=[0, 2, 1])


def emit_row(
    builder: GraphBuilder, name: str, before: str, source: str, count: int
) -> tuple[str, str]:
    """Emits the row of the tokens before a call and the new ones, and its last tokens.

    Result, for 2 tokens from before the call::

        %name_row = Concat(%before, %source)                    # [batch, 2 + t, n]
        %name_recent = GatherND(%name_row, last_2_tokens)       # [batch, 2, n]

    Args:
        builder: the graph.
        name: what the values' names begin with.
        before: the tokens before the call, ``float32[batch, count, n]``.
        source: the new tokens, ``float32[batch, t, n]``.
        count: how many tokens are kept.

    Returns:
        The names of the row and of its last tokens.
    """
    row = builder.node("Concat", [before, source], f"{name}_row", axis=1)
    kept = recent_tokens(builder, count)
    return row, builder.node("GatherND", [row, kept], f"{name}_recent", batch_dims=1)
