"""Mixtral: Mistral with a mixture of experts in place of each feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.expert_weights import ExpertNames, every_layer, read_counts, with_experts
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import separate_projections
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Mixtral configuration (transformers' ``MixtralConfig`` fields)."""
    counts = {"num_local_experts": 8, "num_experts": 8}
    experts, chosen = read_counts(config, counts, ("num_experts_per_tok", 2))
    config.get("router_jitter_noise")  # in training alone
    family = Conventions(
        "mixtral",
        window=config.integer("sliding_window", 0, minimum=0),
        norm_eps=1e-5,
        max_context=131072,
        kv_heads=8,
        theta=1e6,
        feed_forward=every_layer(experts, chosen),
        layer_weights=with_experts(
            separate_projections, ExpertNames("block_sparse_moe", "w1", "w3", "w2")
        ),
    )
    return replace(read_llama_like(config, generation, family), router="normalized_softmax")
