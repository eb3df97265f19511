"""What the manifest says of a graph: how it rounds, and what stands outside fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from exporters.checks import activation_notes
from exporters.float_columns import FloatColumns, told
from exporters.onnx.attention import match_attention
from exporters.onnx.norms import following_norm
from exporters.onnx.quantized import bias_within
from exporters.onnx.routing import choice_of
from quant.plans.plan import QuantPlan
from quant.program import dialect
from quant.program.expert_branches import Mixture, mixtures
from quant.program.program import Program, node_argument

if TYPE_CHECKING:
    from onnx import GraphProto


def rounding_notes(graph: GraphProto, plan: QuantPlan, kept: FloatColumns) -> tuple[str, ...]:
    """Notes on how the kernels round activations, from the plan and the written graph."""
    promised = activation_notes(plan)
    levels = [
        attribute.i
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    ]
    if 4 not in levels:
        exact = "no matrix product rounds its activations (accuracy_level 1)"
        return (*promised, exact) if levels else promised
    words = "matrix products round activations to 8 bits inside the kernel (accuracy_level 4)"
    if promised:
        words = f"other {words}"
    return (
        *promised,
        words + ("; the head, a small one, does not" if 1 in levels else ""),
        *([told(kept)] if told(kept) else []),
    )


def outside_notes(program: Program) -> tuple[str, ...]:
    """A note on what stands outside of the fused kernels; none where nothing does.

    The kernels are the products with their biases, attention with its rotations, and norms with the
    additions before them. What stands outside gives the same numbers and takes a node of its own.
    """
    nodes = list(program.graph.nodes)
    attention = [match_attention(node) for node in nodes if node.target is dialect.ATTENTION]
    rotated = sum(any(each.ropes) and not each.is_rotated_inside for each in attention)
    normed = sum(
        any(each.norms) or any(source.target is dialect.RMS_NORM for source in each.sources)
        for each in attention
    )
    within = {bias for node in nodes for bias in bias_within(node)}
    convolutions, factors = (_count(nodes, it) for it in (dialect.SHORT_CONV, dialect.SCALE))
    shifts = _count(nodes, dialect.TOKEN_SHIFT)
    biases = sum(node.target is dialect.BIAS and node not in within for node in nodes)
    added = [n for n in nodes if n.target is dialect.ADD and following_norm(n) is None]
    shared = sum(node_argument(node, 0).target is dialect.COMBINE for node in added)
    sums = len(added) - shared
    clamps, softcaps = (_count(nodes, it) for it in (dialect.CLAMP, dialect.SOFTCAP))
    found = [
        *([f"rotations of queries and keys in {_layers(rotated)}"] if rotated else []),
        *([f"norms of queries and keys in {_layers(normed)}"] if normed else []),
        *([f"short convolutions in {_layers(convolutions)}"] if convolutions else []),
        *([f"shifts of tokens ({shifts})"] if shifts else []),
        *([f"biases ({biases})"] if biases else []),
        *([f"residual additions that no norm follows ({sums})"] if sums else []),
        *([f"additions of a shared expert ({shared})"] if shared else []),
        *([f"factors ({factors})"] if factors else []),
        *([f"bounds of queries, keys and values ({clamps})"] if clamps else []),
        *(["the softcap of the logits"] if softcaps else []),
    ]
    return (f"outside of the fused kernels: {', '.join(found)}",) if found else ()


def mixture_notes(program: Program) -> tuple[str, ...]:
    """A note on each kind of mixture that the program has, of experts and of attention heads."""
    found = list(mixtures(program).values())
    of_experts = [each for each in found if not each.fills_slots and not each.reads_slots]
    of_heads = [each for each in found if each.fills_slots]
    notes = []
    for groups, computed in (
        (of_experts, "a call computes only the experts"),
        (
            of_heads,
            "the query heads and the outputs of attention are experts', and a call computes only "
            "those",
        ),
    ):
        if groups:
            notes.append(
                f"in {_layers(len(groups))} {computed} that its tokens chose, each for its own "
                f"tokens; a token has {_chosen(groups)}"
            )
    return tuple(notes)


def _chosen(found: list[Mixture]) -> str:
    """How many experts a token has in these mixtures, in words."""
    counts = {(choice_of(each.weights).chosen, len(each.branches)) for each in found}
    return " or ".join(f"{chosen} of {experts}" for chosen, experts in sorted(counts))


def recurrence_notes(program: Program) -> tuple[str, ...]:
    """A note on the program's recurrences; none where there are none."""
    count = _count(list(program.graph.nodes), dialect.RECURRENCE)
    if not count:
        return ()
    return (
        f"in {_layers(count)} a memory is kept in float32, which LinearAttention reads and "
        f"changes: ONNX Runtime has it since 1.25.1",
    )


def _layers(count: int) -> str:
    return f"{count} layer{'s' * (count > 1)}"


def _count(nodes: list[fx.Node], target: object) -> int:
    return sum(node.target is target for node in nodes)
