"""Qwen3's mixtures: Qwen3's attention, and many small experts in all layers or in some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.expert_weights import ExpertNames, with_experts
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.qwen2_moe import read_router, read_sparse_layers
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Qwen3-MoE configuration (transformers' ``Qwen3MoeConfig`` fields)."""
    biased = read_biases(config, "attention_bias")
    family = Conventions(
        "qwen3_moe",
        window=_read_window(config),
        max_context=32768,
        kv_heads=4,
        feed_forward=read_sparse_layers(config, 128, 8, 768),
        layer_weights=with_experts(
            partial(separate_projections, qk_norm="head", biased=biased), ExpertNames()
        ),
    )
    return replace(read_llama_like(config, generation, family), router=read_router(config))


def _read_window(config: ConfigReader) -> int:
    """Returns the window of every layer, in tokens; 0 where ``use_sliding_window`` is off."""
    window = config.integer("sliding_window", 0 if "sliding_window" in config.fields() else 4096, 0)
    if not config.flag("use_sliding_window", False):
        config.get("max_window_layers")
        return 0
    config.require("max_window_layers", 0)  # some code leaves this many layers without a window
    return window
