"""Mistral 7B and its kin: Llama's maths with a sliding attention window."""

from __future__ import annotations

from collections.abc import Mapping

from edgeforge.families.config import ConfigReader
from edgeforge.families.llama import read_llama_like
from edgeforge.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Mistral configuration (transformers' ``MistralConfig`` fields)."""
    config.absent("attention_bias", "mlp_bias")
    window = config.integer("sliding_window", 0, minimum=0)
    return read_llama_like(config, generation, "mistral", window=window, norm_eps=1e-6)
