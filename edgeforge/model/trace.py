"""Traces a decoder into a `Program`, on the meta device."""

from __future__ import annotations

import torch

from edgeforge.families.spec import ModelSpec
from edgeforge.model.decoder import Decoder, table_names
from edgeforge.model.rope import tables
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
    inputs: dict[str, Input] = {}
    user = iter(("tokens", "position"))
    for item in exported.graph_signature.input_specs:
        name = item.arg.name
        if name in signature.inputs_to_parameters:
            inputs[name] = Input("weight", signature.inputs_to_parameters[name])
        elif name in signature.inputs_to_buffers:
            target = signature.inputs_to_buffers[name]
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
        inputs=inputs,
        tables={name: made[name] for name in _tables_used(inputs)},
        context=context,
        vocab_size=spec.vocab_size,
    )


def _kind(buffer: str) -> InputKind:
    """Returns what a buffer of the decoder is, by its name."""
    if buffer.startswith("rope_"):
        return "table"
    return "recent" if buffer.endswith(".recent") else "cache"


def _tables_used(inputs: dict[str, Input]) -> list[str]:
    return [given.name for given in inputs.values() if given.kind == "table"]
