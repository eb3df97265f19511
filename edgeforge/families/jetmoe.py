"""JetMoE: both attention and the feed-forward part of every layer are mixtures of experts.

Its query heads and outputs are experts' (`edgeforge.model.attention_mixture`); keys and values
are one for all. Each mixture adds a bias to the sum of its experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import bias, matrix, norm
from edgeforge.families.expert_weights import read_counts, stacked
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import PRE_NORMS
from edgeforge.families.spec import LayerSpec, ModelSpec, Piece, WeightSpec
from quant.quoted import quoted

# What the authors' own files call fields of transformers' class.
_AUTHORS: Final = {
    "num_local_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "intermediate_size": "ffn_hidden_size",
    "head_dim": "kv_channels",
}


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a JetMoe configuration (fields of transformers' ``JetMoeConfig``, or the authors')."""
    config = _renamed(config)
    experts, chosen = read_counts(config, {"num_local_experts": 8}, ("num_experts_per_tok", 2))
    config.get("aux_loss_coef")
    for field in ("bias", "glu"):  # the authors' files may leave either out of the experts
        config.require(field, True)
    kv_heads, width = config.integer("num_key_value_heads"), config.integer("head_dim", 128)
    heads = config.integer("num_attention_heads", kv_heads * chosen)
    if heads != kv_heads * chosen:
        raise CheckpointError(
            f"{config.where}: num_attention_heads is {heads}, but a token of this family has "
            f"{chosen} experts of {kv_heads} heads: {kv_heads * chosen}"
        )

    def mixtures(index: int, layer: LayerSpec) -> LayerSpec:
        return replace(
            layer,
            experts=experts,
            chosen_experts=chosen,
            attention_experts=experts,
            chosen_attention_experts=chosen,
        )

    family = Conventions(
        "jetmoe",
        max_context=4096,
        kv_heads=kv_heads,
        head_dim=width,
        heads=heads,
        tied=True,
        activation_field="activation_function",
        feed_forward=mixtures,
        layer_weights=_layer_weights,
    )
    # A softmax over the chosen experts alone is one over all, divided by the sum of what is kept.
    return replace(read_llama_like(config, generation, family), router="normalized_softmax")


def _renamed(config: ConfigReader) -> ConfigReader:
    """Returns a reader that also knows the fields that the authors' files name otherwise.

    Raises:
        CheckpointError: the file has a field under both names, with two values.
    """
    given = {ours: config.get(theirs) for ours, theirs in _AUTHORS.items()}
    for ours, theirs in _AUTHORS.items():
        if None not in (given[ours], config.get(ours)) and given[ours] != config.get(ours):
            raise CheckpointError(
                f"{config.where}: {theirs} is {quoted(given[ours])} and {ours} is "
                f"{quoted(config.get(ours))}; keep one"
            )
    named = {ours: value for ours, value in given.items() if value is not None}
    return config.with_defaults({"num_key_value_heads": 16, **named})


def _layer_weights(
    index: int, layer: LayerSpec, *, hidden: int, head_dim: int
) -> dict[str, WeightSpec]:
    at, kv = f"model.layers.{index}.", layer.num_kv_heads * head_dim
    weights = {ours: norm(f"{at}{name}.weight", hidden) for ours, name in PRE_NORMS.items()}
    attention = at + "self_attention."
    weights["self_attn.router"] = _router(f"{attention}experts.", hidden, layer.attention_experts)
    for part, first in (("k_proj", 0), ("v_proj", kv)):
        piece = Piece(f"{attention}kv_proj.weight", (kv, hidden), first, 2 * kv)
        weights[f"self_attn.{part}"] = WeightSpec(piece.shape, (piece,), "linear")
    both = (("q_proj", "input_linear", kv, hidden), ("o_proj", "output_linear", hidden, kv))
    for expert in range(layer.attention_experts):
        for ours, theirs, rows, columns in both:
            tensor = f"{attention}experts.{theirs}.weight"
            weight = stacked(tensor, expert, layer.attention_experts, rows, columns)
            weights[f"self_attn.experts.{expert}.{ours}"] = weight
    weights["self_attn.output.bias"] = bias((f"{attention}experts.bias", hidden))
    mlp, ffn = at + "mlp.", layer.ffn_width
    weights["mlp.router"] = _router(mlp, hidden, layer.experts)
    for expert in range(layer.experts):
        for ours, theirs, rows, columns in (
            ("gate_up_proj", "input_linear", 2 * ffn, hidden),
            ("down_proj", "output_linear", hidden, ffn),
        ):
            weight = stacked(f"{mlp}{theirs}.weight", expert, layer.experts, rows, columns)
            weights[f"mlp.experts.{expert}.{ours}"] = weight
    weights["mlp.output.bias"] = bias((f"{mlp}bias", hidden))
    return weights


def _router(at: str, hidden: int, experts: int) -> WeightSpec:
    return matrix("router", hidden, (f"{at}router.layer.weight", experts))
