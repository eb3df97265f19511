"""Granite 3's mixtures: Granite's factors, and a layer's experts in two tensors of three axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.assembly import matrix
from edgeforge.families.expert_weights import every_layer, read_counts, stacked
from edgeforge.families.granite import with_factors
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.spec import LayerSpec, ModelSpec, WeightSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a GraniteMoe configuration (transformers' ``GraniteMoeConfig`` fields)."""
    counts = {"num_local_experts": 8, "num_experts": 8}
    experts, chosen = read_counts(config, counts, ("num_experts_per_tok", 2))
    biased = read_biases(config, "attention_bias")
    family = Conventions(
        "granitemoe",
        feed_forward=every_layer(experts, chosen),
        layer_weights=partial(_layer_weights, biased=biased),
    )
    spec = with_factors(config, read_llama_like(config, generation, family))
    # A softmax over the chosen experts alone is one over all, divided by the sum of what is kept.
    return replace(spec, router="normalized_softmax")


def _layer_weights(
    index: int, layer: LayerSpec, *, hidden: int, head_dim: int, biased: tuple[str, ...]
) -> dict[str, WeightSpec]:
    weights = separate_projections(index, layer, hidden=hidden, head_dim=head_dim, biased=biased)
    return weights | expert_weights(index, layer, hidden)


def expert_weights(index: int, layer: LayerSpec, hidden: int) -> dict[str, WeightSpec]:
    """Returns the weights of one layer's mixture by their names within the layer.

    Args:
        index: the layer's number.
        layer: its dimensions.
        hidden: width of the residual stream.
    """
    at, ffn = f"model.layers.{index}.block_sparse_moe.", layer.ffn_width
    router = (f"{at}router.layer.weight", layer.experts)
    weights = {"mlp.router": matrix("router", hidden, router)}
    for expert in range(layer.experts):
        for ours, theirs, rows, columns in (
            ("gate_up_proj", "input_linear.weight", 2 * ffn, hidden),
            ("down_proj", "output_linear.weight", hidden, ffn),
        ):
            weight = stacked(at + theirs, expert, layer.experts, rows, columns)
            weights[f"mlp.experts.{expert}.{ours}"] = weight
    return weights
