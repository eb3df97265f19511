"""Qwen1.5 and Qwen2 mixtures: Qwen2's attention, many experts, and one that every token has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import matrix
from edgeforge.families.expert_weights import ExpertNames, expert_weights, read_counts
from edgeforge.families.layer_kinds import FULL, SLIDING, read_kinds, with_windows
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import separate_projections
from edgeforge.families.spec import LayerSpec, ModelSpec, Router, WeightSpec
from quant.quoted import quoted


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Qwen2-MoE configuration (transformers' ``Qwen2MoeConfig`` fields)."""
    shared = config.integer("shared_expert_intermediate_size", 5632)
    biased = ("q_proj", "k_proj", "v_proj") if config.flag("qkv_bias", True) else ()
    family = Conventions(
        "qwen2_moe",
        max_context=32768,
        kv_heads=16,
        feed_forward=read_sparse_layers(config, 60, 4, 1408, shared),
        layer_weights=partial(_layer_weights, biased=biased),
    )
    spec = replace(read_llama_like(config, generation, family), router=read_router(config))
    return _with_windows(config, spec)


def read_sparse_layers(
    config: ConfigReader, experts: int, chosen: int, width: int, shared: int = 0
) -> Callable[[int, LayerSpec], LayerSpec]:
    """Returns what gives a layer its experts, or leaves it dense, as Qwen's files say.

    Layers of ``mlp_only_layers`` stay dense, and so does each whose number, counted from 1, is no
    multiple of ``decoder_sparse_step``.

    Args:
        config: the reader of ``config.json``.
        experts: the experts' number where the file has none.
        chosen: how many of them a token has where the file does not say.
        width: an expert's width where the file has none.
        shared: width of the expert that every token has, 0 for none.

    Raises:
        CheckpointError: the counts are impossible, or ``mlp_only_layers`` is no list of layers.
    """
    counts = {"num_experts": experts, "num_local_experts": experts}
    experts, chosen = read_counts(config, counts, ("num_experts_per_tok", chosen))
    width = config.integer("moe_intermediate_size", width)
    step = config.integer("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        raise CheckpointError(
            f"{config.where}: mlp_only_layers is {quoted(dense)}, not a list of layers"
        )

    def feed_forward(index: int, layer: LayerSpec) -> LayerSpec:
        if index in dense or (index + 1) % step:
            return layer
        return replace(
            layer, ffn_width=width, experts=experts, chosen_experts=chosen, shared_width=shared
        )

    return feed_forward


def read_router(config: ConfigReader) -> Router:
    """Returns whether the shares of the chosen experts are divided by their sum."""
    return "normalized_softmax" if config.flag("norm_topk_prob", False) else "softmax"


def _layer_weights(
    index: int, layer: LayerSpec, *, hidden: int, head_dim: int, biased: tuple[str, ...]
) -> dict[str, WeightSpec]:
    weights = separate_projections(index, layer, hidden=hidden, head_dim=head_dim, biased=biased)
    if not layer.experts:
        return weights
    at, ffn = f"model.layers.{index}.mlp.shared_expert", layer.shared_width
    gate, up, down = (f"{at}.{part}_proj.weight" for part in ("gate", "up", "down"))
    return {
        **weights,
        **expert_weights(index, layer, hidden, ExpertNames()),
        "mlp.shared_expert.gate_up_proj": matrix("linear", hidden, (gate, ffn), (up, ffn)),
        "mlp.shared_expert.down_proj": matrix("linear", ffn, (down, hidden)),
        "mlp.shared_expert_gate": matrix("router", hidden, (f"{at}_gate.weight", 1)),
    }


def _with_windows(config: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """Returns the spec with windows in every other of the first ``max_window_layers`` layers."""
    window = config.integer("sliding_window", 0 if "sliding_window" in config.fields() else 4096, 0)
    first = config.integer("max_window_layers", 28, 0)
    if not config.flag("use_sliding_window", False):
        window = 0
    alternate = [
        SLIDING if window and n < first and not n % 2 else FULL for n in range(len(spec.layers))
    ]
    kinds = read_kinds(config, alternate, (FULL, SLIDING) if window else (FULL,))
    return with_windows(spec, kinds, window)
