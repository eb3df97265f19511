"""Rewrites a float program to read its weights as a plan stores them."""

from __future__ import annotations

import torch
from torch import fx

from quant.dialect import LINEAR, QUANT_EMBEDDING, QUANT_LINEAR
from quant.formats import FloatFormat, QuantizedFormat
from quant.plan import QuantPlan
from quant.program import Input, Program

_TORCH = {"uint8": torch.uint8, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quantize_program(program: Program, plan: QuantPlan) -> Program:
    """Replaces every use of a weight in integers or palettes.

    Given::

        %w = placeholder[weight]                      # float[o, i]
        %y = edgeforge::linear(%x, %w)

    Result::

        %codes, %scale, %zero = placeholder[weight]   # as the format lays them out
        %y = edgeforge::quant_linear(%x, %codes, %scale, %zero, "int4-g32")

    and ``embedding`` likewise. A palette's tables stand in the place of the scales::

        %y = edgeforge::quant_linear(%x, %codes, %lut, None, "lut4-gc16")

    A weight used twice (a tied head) keeps one set of placeholders.
    The given program is left as it was.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.graph, copies)
    graph.output(result)
    inputs = {copies[n].name: program.inputs[n.name] for n in copies if n.op == "placeholder"}
    for node in list(graph.nodes):
        if node.op == "placeholder" and inputs[node.name].kind == "weight":
            weight = inputs[node.name].name
            format = plan.weights[weight].format
            if not isinstance(format, FloatFormat):
                _replace(graph, node, weight, format, inputs)
    graph.lint()
    return Program(graph, inputs, program.tables, program.context, program.vocab_size)


def _replace(
    graph: fx.Graph, node: fx.Node, weight: str, format: QuantizedFormat, inputs: dict[str, Input]
) -> None:
    value = node.meta["val"]
    parts: dict[str, fx.Node] = {}
    with graph.inserting_before(node):
        for part, layout in format.layout(*value.shape).items():
            parts[part] = graph.placeholder(f"{node.name}_{part}")
            parts[part].meta["val"] = torch.empty(
                layout.shape, dtype=_TORCH[layout.dtype], device="meta"
            )
            inputs[parts[part].name] = Input("weight", weight, part)
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
