"""Granite 4: Mamba 2 layers and attention layers, dense or with experts beside a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import matrix
from edgeforge.families.expert_weights import TRAINING, read_counts
from edgeforge.families.granite import with_factors
from edgeforge.families.granitemoe import expert_weights
from edgeforge.families.layer_kinds import FULL, LINEAR, read_kinds
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.mamba_weights import MambaFields, pass_over, read_mamba
from edgeforge.families.projections import PRE_NORMS, read_biases, separate_projections
from edgeforge.families.spec import LayerSpec, ModelSpec, WeightSpec

_OTHER_KINDS: Final = "layers_block_type"


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a GraniteMoeHybrid configuration (transformers' ``GraniteMoeHybridConfig`` fields)."""
    config.choice("normalization_function", ("rmsnorm",), "rmsnorm")
    config.get("init_method")  # how training began
    experts, chosen = _read_experts(config)
    shared = config.integer("shared_intermediate_size", 1024)
    kinds = _read_kinds(config)
    mamba = None
    if LINEAR in kinds:
        mamba = read_mamba(config, config.integer("hidden_size"), MambaFields())
    else:
        pass_over(config, MambaFields())
    rotated = config.choice("position_embedding_type", ("nope", "rope"), "nope") == "rope"
    biased = read_biases(config, "attention_bias")

    def dimensions(index: int, layer: LayerSpec) -> LayerSpec:
        width = layer.ffn_width if experts else shared
        if mamba is not None and kinds[index] == LINEAR:
            layer = mamba.layer(width)
        else:
            layer = replace(layer, ffn_width=width, rope=0 if rotated else None)
        if not experts:
            return layer
        return replace(layer, experts=experts, chosen_experts=chosen, shared_width=shared)

    def layer_weights(
        index: int, layer: LayerSpec, *, hidden: int, head_dim: int
    ) -> dict[str, WeightSpec]:
        weights = separate_projections(
            index, layer, hidden=hidden, head_dim=head_dim, biased=biased
        )
        kept = ("self_attn.", *PRE_NORMS) if layer.recurrence is None else tuple(PRE_NORMS)
        weights = {name: weight for name, weight in weights.items() if name.startswith(kept)}
        if layer.recurrence is not None:
            assert mamba is not None
            weights |= mamba.weights(f"model.layers.{index}.mamba.", hidden)
        return weights | _feed_forward(index, layer, hidden)

    family = Conventions("granitemoehybrid", feed_forward=dimensions, layer_weights=layer_weights)
    spec = with_factors(config, read_llama_like(config, generation, family))
    return replace(
        spec,
        ropes=spec.ropes if rotated else (),
        conv_width=0 if mamba is None else mamba.conv_width,
        # A softmax over the chosen experts alone is one over all, divided by the sum of what is
        # kept.
        router="normalized_softmax" if experts else spec.router,
    )


def _read_experts(config: ConfigReader) -> tuple[int, int]:
    """Returns how many experts a layer has and a token chooses; 0 and 0 in a dense model."""
    if config.get("num_local_experts") == 0:
        config.get("num_experts_per_tok")
        for field in TRAINING:
            config.get(field)
        return 0, 0
    return read_counts(config, {"num_local_experts": 8}, ("num_experts_per_tok", 2))


def _read_kinds(config: ConfigReader) -> tuple[str, ...]:
    """Returns the kind of each layer, which files list under either of two names.

    Raises:
        CheckpointError: the lists contradict each other.
    """
    default = [LINEAR] * config.layer_count("num_hidden_layers")
    kinds = read_kinds(config, default, (LINEAR, FULL))
    other = read_kinds(config, default, (LINEAR, FULL), field=_OTHER_KINDS)
    if config.get(_OTHER_KINDS) is None:
        return kinds
    if config.get("layer_types") is not None and kinds != other:
        raise CheckpointError(
            f"{config.where}: layer_types and {_OTHER_KINDS} contradict each other; keep one"
        )
    return other


def _feed_forward(index: int, layer: LayerSpec, hidden: int) -> dict[str, WeightSpec]:
    """Returns a layer's experts and the part that every token has, which is all of a dense one."""
    at = f"model.layers.{index}.shared_mlp."
    width, ours = layer.ffn_width, "mlp."
    if layer.experts:
        width, ours = layer.shared_width, "mlp.shared_expert."
    shared = {
        f"{ours}gate_up_proj": matrix("linear", hidden, (f"{at}input_linear.weight", 2 * width)),
        f"{ours}down_proj": matrix("linear", width, (f"{at}output_linear.weight", hidden)),
    }
    return expert_weights(index, layer, hidden) | shared if layer.experts else shared
