"""Gemma 3 for text and images, of which the text part is exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families import gemma3_text
from edgeforge.families.spec import ModelSpec
from edgeforge.families.text_part import read_text_part

_DEFAULTS: Final = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Gemma 3 configuration (transformers' ``Gemma3Config`` fields)."""
    config.get("mm_tokens_per_image")
    return read_text_part(config, generation, "gemma3", gemma3_text.read_spec, _DEFAULTS)
