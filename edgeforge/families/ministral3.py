"""Ministral 3: Mistral's maths with YaRN, and queries that grow with the position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.spec import ModelSpec

_ROPE: Final = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""The rotary embedding of a file that states none."""


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Ministral 3 configuration (transformers' ``Ministral3Config`` fields)."""
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        config = config.with_defaults({"rope_parameters": _ROPE})
    family = Conventions(
        "ministral3",
        window=config.integer("sliding_window", 0, minimum=0),
        norm_eps=1e-5,
        max_context=262144,
        kv_heads=8,
        head_dim=128,
        growing=True,
    )
    spec = read_llama_like(config, generation, family)
    (rope,) = spec.ropes
    if not rope.growth:
        return spec
    keys = replace(rope, growth=0.0)
    layers = tuple(replace(layer, query_rope=1) for layer in spec.layers)
    return replace(spec, ropes=(keys, rope), layers=layers)
