"""Mistral 7B and its kin: Llama's maths with a sliding attention window."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Mistral configuration (transformers' ``MistralConfig`` fields)."""
    config.absent("attention_bias", "mlp_bias")
    # An absent window is the first release's; only null says that there is none.
    absent = 0 if "sliding_window" in config.fields() else 4096
    family = Conventions(
        "mistral",
        window=config.integer("sliding_window", absent, minimum=0),
        max_context=131072,
        kv_heads=8,
    )
    return read_llama_like(config, generation, family)
