"""Traces a decoder into a `Program`, on the meta device."""

from __future__ import annotations

import torch

from edgeforge.families.spec import ModelSpec
from edgeforge.model.decoder import Decoder, is_stacked, table_names
from edgeforge.model.rope import tables
from quant.program.expert_branches import expand
from quant.program.program import Input, InputKind, Program


def trace(spec: ModelSpec, context: int) -> Program:
    """Traces the decoder with a dynamic number of tokens; no weight is allocated.

    Args:
        spec: the model's dimensions.
        context: length of the caches and of the rotary tables, tokens.
    """
    example = min(4, context)
    tokens = torch.zeros(1, example, dtype=torch.int64, device="meta")
    position = torch.zeros(1, dtype=torch.int64, device="meta")
    length = torch.export.Dim("t", min=1, max=context) if context > 1 else None
    with torch.no_grad():
        exported = torch.export.export(
            Decoder(spec, context),
            (tokens, position),
            dynamic_shapes={"tokens": {1: length}, "position": None},
            strict=False,
        )
    signature = exported.graph_signature
    # Each reading of these two makes the mapping anew.
    parameters, buffers = signature.inputs_to_parameters, signature.inputs_to_buffers
    stacked = {name: target for name, target in parameters.items() if is_stacked(target)}
    matrices = expand(exported.graph, stacked)
    inputs = {name: Input("weight", weight) for name, weight in matrices.items()}
    user = iter(("tokens", "position"))
    for item in signature.input_specs:
        name = item.arg.name
        if name in stacked:
            continue
        if name in parameters:
            inputs[name] = Input("weight", parameters[name])
        elif name in buffers:
            target = buffers[name]
            inputs[name] = Input(_kind(target), target)
        else:
            kind = next(user)
            inputs[name] = Input("tokens" if kind == "tokens" else "position", kind)
    made = {
        name: table
        for index, rope in enumerate(spec.ropes)
        for name, table in zip(table_names(index), tables(rope, context), strict=True)
    }
    return Program(
        graph=exported.graph,
        inputs={n.name: inputs[n.name] for n in exported.graph.find_nodes(op="placeholder")},
        tables=made,
        context=context,
        vocab_size=spec.vocab_size,
    )


def _kind(buffer: str) -> InputKind:
    """Returns what a buffer of the decoder is, by its name."""
    if buffer.startswith("rope_"):
        return "table"
    if buffer.endswith(".memory"):
        return "memory"
    return "recent" if buffer.endswith(".recent") else "cache"
