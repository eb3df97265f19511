"""Emits GroupQueryAttention for an attention node and the views, norms and rotations before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import fx

from exporters.errors import ExportError
from exporters.onnx.caches import ATTRIBUTES, CacheScales, scale_operands
from exporters.onnx.graph import MICROSOFT, GraphBuilder
from exporters.onnx.positions import position_ids
from quant.program import dialect
from quant.program.calls import AttentionCall, NormCall
from quant.program.program import node_argument, shape_of


@dataclass(frozen=True)
class AttentionPattern:
    """An attention node and what feeds it.

    Attributes:
        node: the attention node.
        sources: the nodes that give q, k and v, each ``[1, t, heads * head_dim]``.
        norms: the per-head norms of q and k; None where there is none.
        ropes: the rotations of q and k; None where there is none.
        absorbed: the nodes that this pattern replaces, except the attention itself.
    """

    node: fx.Node
    sources: tuple[fx.Node, fx.Node, fx.Node]
    norms: tuple[fx.Node | None, fx.Node | None]
    ropes: tuple[fx.Node | None, fx.Node | None]
    absorbed: frozenset[fx.Node]

    @property
    def heads(self) -> tuple[int, int, int]:
        """The number of query heads, the number of key/value heads, and the head's width."""
        q, k = shape_of(node_argument(self.node, 0)), shape_of(node_argument(self.node, 1))
        return q[2], k[2], q[3]

    @property
    def is_rotated_inside(self) -> bool:
        """Whether the kernel rotates q and k: by the same tables, and with widths that it takes.

        Both the head's width and the rotary width must be multiples of 16.
        """
        q, k = self.ropes
        if q is None or k is None or q.args[1:3] != k.args[1:3]:
            return False
        return self.heads[2] % 16 == 0 and rotary_width(q) % 16 == 0


def rotary_width(rope: fx.Node) -> int:
    """How many columns of a head are rotated."""
    return 2 * shape_of(node_argument(rope, 1))[1]


def match_attention(node: fx.Node) -> AttentionPattern:
    """Finds the views, norms and rotations around an attention node.

    Given::

        %q, %k = split(%qk)
        %y = attention(rope([rms_norm] view(%q)), rope([rms_norm] view(%k)), view(%v))

    Result: a pattern whose sources are ``%q``, ``%k`` and ``%v``. Rotations may be missing. Norms
    over all heads stand before the views, and are the sources.

    Raises:
        ExportError: other operators make q, k or v.
    """
    absorbed: set[fx.Node] = set()
    sources: list[fx.Node] = []
    norms: list[fx.Node | None] = []
    ropes: list[fx.Node | None] = []
    for index in range(3):
        step = node_argument(node, index)
        if index < 2:
            ropes.append(step if step.target is dialect.ROPE else None)
            if ropes[-1] is not None:
                absorbed.add(step)
                step = node_argument(step, 0)
            norms.append(step if step.target is dialect.RMS_NORM else None)
            if norms[-1] is not None:
                absorbed.add(step)
                step = node_argument(step, 0)
        _expect(step, dialect.VIEW, node)
        absorbed.add(step)
        sources.append(node_argument(step, 0))
    return AttentionPattern(
        node,
        (sources[0], sources[1], sources[2]),
        (norms[0], norms[1]),
        (ropes[0], ropes[1]),
        frozenset(absorbed),
    )


def _expect(node: fx.Node, target: object, attention: fx.Node) -> None:
    if node.target is not target:
        raise ExportError(
            f"the ONNX target cannot lower {attention.name}: its operand {node.name} comes from "
            f"{node.target}"
        )


def check_head_width(head_dim: int) -> None:
    """Refuses head widths that the kernel cannot hold.

    Raises:
        ExportError: the width is not a multiple of 8.
    """
    if head_dim % 8:
        raise ExportError(
            f"ONNX Runtime's GroupQueryAttention needs a head width that is a multiple of 8; this "
            f"model's heads have {head_dim} columns"
        )


def emit_attention(
    builder: GraphBuilder,
    pattern: AttentionPattern,
    *,
    layer: int,
    table: Callable[[fx.Node], str],
    scales: CacheScales | None,
    weight: Callable[[fx.Node], str],
    value: Callable[[fx.Node], str],
) -> list[tuple[str, str, tuple[int, int]]]:
    """Emits one attention.

    Args:
        builder: the graph to add to.
        pattern: the attention and the nodes around it.
        layer: the number of the layer, which the names of the caches contain.
        table: returns the initializer's name for a table of cosines or sines,
            ``float32[context, width // 2]``.
        scales: the scales of int8 caches; None for float32 caches.
        weight: returns the initializer's name for a float weight's placeholder.
        value: returns the name of the ONNX value for a node.

    Returns:
        For the key cache and for the value cache: the input's name, the output's name, and
        ``(heads, head_dim)``.
    """
    heads, kv_heads, head_dim = pattern.heads
    at = f"layers.{layer}"
    operands = _normed(builder, pattern, at, weight, value)
    rotary: list[str] = []
    if pattern.is_rotated_inside:
        rotary = _tables(pattern.ropes[0], table)
    else:
        for index, rope in enumerate(pattern.ropes):
            if rope is None:
                continue
            width = rotary_width(rope)
            operands[index] = builder.node(
                "RotaryEmbedding",
                [operands[index], *_tables(rope, table), position_ids(builder)],
                f"{at}.rotated_{'qk'[index]}",
                num_heads=(heads, kv_heads)[index],
                rotary_embedding_dim=0 if width == head_dim else width,
                interleaved=0,
            )
    caches = [
        (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}", (kv_heads, head_dim))
        for kind in ("key", "value")
    ]
    call = AttentionCall.of(pattern.node)
    attributes: dict[str, object] = {"local_window_size": call.window} if call.window else {}
    if call.softcap:
        attributes["softcap"] = call.softcap
    if scales is not None:
        rotary = [*(rotary or ["", ""]), *scale_operands(builder, at, scales)]
        attributes |= ATTRIBUTES
    builder.node(
        "GroupQueryAttention",
        [
            *operands,
            *(past for past, _, _ in caches),
            "seqlens_k",
            "total_length",
            *rotary,
        ],
        [value(pattern.node), *(present for _, present, _ in caches)],
        domain=MICROSOFT,
        num_heads=heads,
        kv_num_heads=kv_heads,
        do_rotary=int(pattern.is_rotated_inside),
        scale=call.scale,
        **attributes,
    )
    return caches


def _tables(rope: fx.Node | None, table: Callable[[fx.Node], str]) -> list[str]:
    assert rope is not None
    return [table(node_argument(rope, index)) for index in (1, 2)]


def _normed(
    builder: GraphBuilder,
    pattern: AttentionPattern,
    at: str,
    weight: Callable[[fx.Node], str],
    value: Callable[[fx.Node], str],
) -> list[str]:
    """Returns q, k and v, each ``[1, t, heads * head_dim]``; emits the norms of q and k."""
    operands = [value(source) for source in pattern.sources]
    for index, norm in enumerate(pattern.norms):
        if norm is None:
            continue
        count, width = shape_of(norm)[2:]
        apart = builder.constant(f"heads_{count}_{width}", np.array([0, 0, count, width], np.int64))
        together = builder.constant(f"flat_{count * width}", np.array([0, 0, -1], np.int64))
        label = f"{at}.{'qk'[index]}"
        split = builder.node("Reshape", [operands[index], apart], f"{label}_heads")
        normed = builder.node(
            "RMSNormalization",
            [split, weight(node_argument(norm, 1))],
            f"{label}_normed",
            axis=-1,
            epsilon=NormCall.of(norm).epsilon,
            stash_type=1,
        )
        operands[index] = builder.node("Reshape", [normed, together], f"{label}_flat")
    return operands
