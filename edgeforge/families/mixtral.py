"""Mixtral: Mistral with a mixture of experts in place of each feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.expert_weights import ExpertNames, expert_weights, read_counts
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import separate_projections
from edgeforge.families.spec import LayerSpec, ModelSpec, WeightSpec

_NAMES = ExpertNames("block_sparse_moe", "w1", "w3", "w2")


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Mixtral configuration (transformers' ``MixtralConfig`` fields)."""
    experts, chosen = read_counts(config, ("num_local_experts", 8), ("num_experts_per_tok", 2))
    for training in ("router_aux_loss_coef", "output_router_logits", "router_jitter_noise"):
        config.get(training)

    def mixture(index: int, layer: LayerSpec) -> LayerSpec:
        return replace(layer, experts=experts, chosen_experts=chosen)

    def layer_weights(
        index: int, layer: LayerSpec, *, hidden: int, head_dim: int
    ) -> dict[str, WeightSpec]:
        attention = separate_projections(index, layer, hidden=hidden, head_dim=head_dim)
        return attention | expert_weights(index, layer, hidden, _NAMES)

    family = Conventions(
        "mixtral",
        window=config.integer("sliding_window", 0, minimum=0),
        norm_eps=1e-5,
        max_context=131072,
        kv_heads=8,
        theta=1e6,
        feed_forward=mixture,
        layer_weights=layer_weights,
    )
    return replace(read_llama_like(config, generation, family), router="normalized_softmax")
