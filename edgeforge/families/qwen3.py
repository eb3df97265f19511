"""Qwen3: Qwen2's maths with an RMSNorm on every query and key head in place of biases."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.qwen2 import read_late_windows
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Qwen3 configuration (transformers' ``Qwen3Config`` fields)."""
    biased = read_biases(config, "attention_bias")
    family = Conventions(
        "qwen3",
        max_context=32768,
        kv_heads=32,
        head_dim=128,
        layer_weights=partial(separate_projections, qk_norm="head", biased=biased),
    )
    return read_late_windows(config, read_llama_like(config, generation, family))
