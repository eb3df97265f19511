"""OLMoE (arXiv 2409.02060): many small experts, and an RMSNorm over all queries and all keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.expert_weights import ExpertNames, every_layer, read_counts, with_experts
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.olmo import read_bound
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.qwen2_moe import read_router
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads an OLMoE configuration (transformers' ``OlmoeConfig`` fields)."""
    counts = {"num_experts": 64, "num_local_experts": 64}
    experts, chosen = read_counts(config, counts, ("num_experts_per_tok", 8))
    biased = read_biases(config, "attention_bias")
    attention = partial(separate_projections, qk_norm="whole", biased=biased)
    family = Conventions(
        "olmoe",
        norm_eps=1e-5,
        max_context=4096,
        feed_forward=every_layer(experts, chosen),
        layer_weights=with_experts(attention, ExpertNames()),
    )
    return replace(
        read_llama_like(config, generation, family),
        clip_qkv=read_bound(config),
        router=read_router(config),
    )
