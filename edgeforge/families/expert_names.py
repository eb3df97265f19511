"""Which weights belong to an expert of a mixture, by their names in the program."""

from __future__ import annotations

import re
from typing import Final

from edgeforge.families.spec import ModelSpec

_EXPERT: Final = re.compile(r"model\.layers\.(\d+)\.(mlp|self_attn)\.experts\.(\d+)\.")


def expert_of(name: str) -> tuple[int, int] | None:
    """Returns the layer and the expert that a weight belongs to; None for a weight of no expert.

    >>> expert_of("model.layers.3.mlp.experts.12.down_proj.weight")
    (3, 12)
    >>> expert_of("model.layers.3.mlp.shared_expert.down_proj.weight")
    >>> expert_of("model.layers.3.self_attn.experts.2.q_proj.weight")
    (3, 2)
    """
    found = _EXPERT.match(name)
    return None if found is None else (int(found[1]), int(found[3]))


def token_share(spec: ModelSpec, name: str) -> float:
    """Returns by which share of all tokens a weight is read, if experts are chosen alike often."""
    found = _EXPERT.match(name)
    if found is None:
        return 1.0
    layer = spec.layers[int(found[1])]
    if found[2] == "self_attn":
        return layer.chosen_attention_experts / layer.attention_experts
    return layer.chosen_experts / layer.experts
