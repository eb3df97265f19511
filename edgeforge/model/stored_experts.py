"""Finds a mixture's matrices where a checkpoint stacks all experts of a layer in one tensor.

transformers 5 holds ``experts.gate_up_proj`` ``[experts, 2 * width, hidden]`` and
``experts.down_proj`` ``[experts, hidden, width]`` in memory. ``save_pretrained`` writes them under
the names that the hub's files have; what saves a model's ``state_dict`` keeps them as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from edgeforge.families.expert_weights import stacked
from edgeforge.families.spec import ModelSpec, Piece, WeightSpec

_BLOCKS: Final = ("mlp", "block_sparse_moe")
_ROUTERS: Final = ("gate", "router", "router.layer")


def with_stacked_experts(spec: ModelSpec, stored: Collection[str]) -> ModelSpec:
    """Returns the spec with the stacked tensors in place of each expert's own, where they are.

    Args:
        spec: the spec, with the names of its family.
        stored: names of the checkpoint's tensors.
    """
    changed: dict[str, WeightSpec] = {}
    for index, layer in enumerate(spec.layers):
        if not layer.experts:
            continue
        ours = f"model.layers.{index}."
        router = f"{ours}mlp.router.weight"
        (piece,) = spec.weights[router].pieces
        before, part, _ = piece.tensor.partition(f"layers.{index}.")
        at = before + part
        for block in _BLOCKS:
            names = {name: f"{at}{block}.experts.{name}" for name in ("gate_up_proj", "down_proj")}
            if names["gate_up_proj"] in stored:
                changed |= _stacked_layer(spec.weights, f"{ours}mlp.experts.", layer.experts, names)
                changed[router] = _named(spec.weights[router], piece, f"{at}{block}.", stored)
    return replace(spec, weights={**spec.weights, **changed}) if changed else spec


def _stacked_layer(
    weights: Mapping[str, WeightSpec], ours: str, experts: int, names: Mapping[str, str]
) -> dict[str, WeightSpec]:
    made = {}
    for expert in range(experts):
        for part, tensor in names.items():
            name = f"{ours}{expert}.{part}.weight"
            rows, columns = weights[name].shape
            made[name] = stacked(tensor, expert, experts, rows, columns)
    return made


def _named(router: WeightSpec, piece: Piece, block: str, stored: Collection[str]) -> WeightSpec:
    """Returns the router under the name that it has beside the stacked experts."""
    names = [f"{block}{name}.weight" for name in _ROUTERS]
    name = next((name for name in names if name in stored), piece.tensor)
    return replace(router, pieces=(replace(piece, tensor=name),))
