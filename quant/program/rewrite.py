"""Rewrites a float program so that it reads its weights in the formats of a plan."""

from __future__ import annotations

import torch
from torch import fx

from quant.formats.activations import INPUT_SCALE, INPUT_SCALE_LAYOUT, NONE, TENSOR
from quant.formats.formats import FloatFormat, QuantizedFormat, TensorLayout
from quant.plans.plan import QuantPlan
from quant.program.dialect import (
    LINEAR,
    QUANT_EMBEDDING,
    QUANT_LINEAR,
    ROUND_PER_TENSOR,
    ROUND_PER_TOKEN,
)
from quant.program.program import Input, Program

_TORCH = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantize_program(program: Program, plan: QuantPlan) -> Program:
    """Replaces every use of a weight that the plan stores in integers or palettes.

    Given::

        %w = placeholder[weight]                      # float[o, i]
        %y = edgeforge::linear(%x, %w)

    Result::

        %codes, %scale, %zero = placeholder[weight]   # as the format lays them out
        %y = edgeforge::quant_linear(%x, %codes, %scale, %zero, "int4-g32")

    and ``embedding`` likewise. For a palette format the tables replace the scales::

        %y = edgeforge::quant_linear(%x, %codes, %lut, None, "lut4-gc16")

    Where the plan rounds activations, a rounding precedes the product: one for all products that
    read the same activation per token, or one with the static scale of each weight::

        %r = edgeforge::round_per_token(%x)           # or round_per_tensor(%x, %input_scale)
        %y = edgeforge::quant_linear(%r, %codes, %scale, %zero, "int8-pc")

    A weight used twice (a tied head) keeps one set of placeholders; an embedding rounds nothing.
    The given program stays unchanged.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.graph, copies)
    graph.output(result)
    inputs = {copies[n].name: program.inputs[n.name] for n in copies if n.op == "placeholder"}
    for node in list(graph.nodes):
        if node.op == "placeholder" and inputs[node.name].kind == "weight":
            weight = inputs[node.name].name
            assignment = plan.weights[weight]
            if isinstance(assignment.format, FloatFormat):
                continue
            scale = None
            if assignment.activation == TENSOR:
                scale = _placeholder(graph, node, weight, INPUT_SCALE, INPUT_SCALE_LAYOUT, inputs)
            for user in list(node.users):
                if user.target is LINEAR and assignment.activation != NONE:
                    _round_input(graph, user, scale)
            _replace(graph, node, weight, assignment.format, inputs)
    graph.lint()
    return Program(graph, inputs, program.tables, program.context, program.vocab_size)


def _replace(
    graph: fx.Graph, node: fx.Node, weight: str, format: QuantizedFormat, inputs: dict[str, Input]
) -> None:
    value = node.meta["val"]
    parts: dict[str, fx.Node] = {}
    for part, layout in format.layout(*value.shape).items():
        parts[part] = _placeholder(graph, node, weight, part, layout, inputs)
    codes, values, *rest = parts.values()
    stored = (codes, values, rest[0] if rest else None, format.name)
    for user in list(node.users):
        target = QUANT_LINEAR if user.target is LINEAR else QUANT_EMBEDDING
        with graph.inserting_before(user):
            new = graph.call_function(target, (user.args[0], *stored))
        new.meta = dict(user.meta)
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)
    del inputs[node.name]


def _placeholder(
    graph: fx.Graph,
    node: fx.Node,
    weight: str,
    part: str,
    layout: TensorLayout,
    inputs: dict[str, Input],
) -> fx.Node:
    """Inserts an input for a stored part of a weight before ``node``, the input of its values."""
    with graph.inserting_before(node):
        made = graph.placeholder(f"{node.name}_{part}")
    made.meta["val"] = torch.empty(layout.shape, dtype=_TORCH[layout.dtype], device="meta")
    inputs[made.name] = Input("weight", weight, part)
    return made


def _round_input(graph: fx.Graph, product: fx.Node, scale: fx.Node | None) -> None:
    """Inserts a rounding before a product, or reuses an equal one that another product reads.

    Args:
        graph: the graph to change.
        product: the product whose activations are rounded.
        scale: the input that holds their static scale; None to round per token.
    """
    source = product.args[0]
    assert isinstance(source, fx.Node)
    target, arguments = (
        (ROUND_PER_TOKEN, (source,)) if scale is None else (ROUND_PER_TENSOR, (source, scale))
    )
    rounded = next(
        (user for user in source.users if user.target is target and user.args == arguments), None
    )
    if rounded is None:
        with graph.inserting_after(source):
            rounded = graph.call_function(target, arguments)
        rounded.meta["val"] = source.meta["val"]
    product.replace_input_with(source, rounded)
