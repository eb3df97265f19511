"""Phi-3.5-MoE (arXiv 2404.14219): LayerNorm, biases, and experts chosen by SparseMixer's rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import bias, norm
from edgeforge.families.expert_weights import ExpertNames, every_layer, read_counts, with_experts
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.spec import ModelSpec

_CHOSEN = 2  # SparseMixer's rule knows no other number


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Phi-3.5-MoE configuration (transformers' ``PhimoeConfig`` fields)."""
    counts = {"num_local_experts": 16, "num_experts": 16}
    experts, chosen = read_counts(config, counts, ("num_experts_per_tok", _CHOSEN))
    if chosen != _CHOSEN:
        raise CheckpointError(
            f"{config.where}: num_experts_per_tok is {chosen}; this family's router gives each "
            f"token {_CHOSEN} experts"
        )
    hidden = config.integer("hidden_size")
    attention = partial(
        separate_projections, norm_bias=True, biased=read_biases(config, "attention_bias")
    )
    family = Conventions(
        "phimoe",
        window=config.integer("sliding_window", 0, minimum=0),
        norm_eps=1e-5,
        max_context=131072,
        kv_heads=8,
        theta=1e6,
        magnitudes=True,
        feed_forward=every_layer(experts, chosen),
        layer_weights=with_experts(attention, ExpertNames("block_sparse_moe", "w1", "w3", "w2")),
        final_norm={
            "weight": norm("model.norm.weight", hidden),
            "bias": bias(("model.norm.bias", hidden)),
        },
        head_bias="lm_head.bias" if config.flag("lm_head_bias", False) else None,
    )
    return replace(
        read_llama_like(config, generation, family),
        norm="layer",
        router="sparse_mixer",
        router_jitter=config.real("router_jitter_noise", 0.01),
    )
