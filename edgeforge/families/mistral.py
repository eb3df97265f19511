"""Mistral 7B and models like it: Llama's maths with a sliding attention window."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Mistral configuration (transformers' ``MistralConfig`` fields)."""
    config.absent("attention_bias", "mlp_bias")
    # A file without the field has the window of the first release, 4096; null means no window.
    absent = 0 if "sliding_window" in config.fields() else 4096
    family = Conventions(
        "mistral",
        window=config.integer("sliding_window", absent, minimum=0),
        max_context=131072,
        kv_heads=8,
    )
    return read_llama_like(config, generation, family)
