"""The weights of a layer whose checkpoint has separate tensors for q, k, v, gate and up.

Most families name these tensors as Llama does. They differ in their norms and biases.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.assembly import bias, matrix, norm
from edgeforge.families.spec import LayerSpec, WeightSpec

PRE_NORMS: Final = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
"""The checkpoint's names of a layer's norms by their names in the program."""

_BIASED: Final = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}


def read_biases(config: ConfigReader, *fields: str) -> tuple[str, ...]:
    """Returns the projections that have biases by ``attention_bias`` and ``mlp_bias``."""
    return tuple(name for field in fields if config.flag(field, False) for name in _BIASED[field])


def separate_projections(
    index: int,
    layer: LayerSpec,
    *,
    hidden: int,
    head_dim: int,
    norms: Mapping[str, str] = PRE_NORMS,
    norm_added: float = 0.0,
    norm_bias: bool = False,
    qk_norm: Literal["none", "head", "whole"] = "none",
    biased: Collection[str] = (),
) -> dict[str, WeightSpec]:
    """Returns one layer's weights by their names within the layer.

    A mixture's are those without its feed-forward part (`edgeforge.families.expert_weights`).

    Args:
        index: the layer's number.
        layer: its dimensions.
        hidden: width of the residual stream.
        head_dim: width of a head.
        norms: the checkpoint's names of the layer's norms, by their names in the program.
        norm_added: what norms add to their weight before they multiply by it.
        norm_bias: whether norms have a bias.
        qk_norm: whether queries and keys are normalised, by head or over all heads.
        biased: the projections that have a bias, by their names in the checkpoint.
    """
    at = f"model.layers.{index}."
    q, kv, ffn = layer.num_heads * head_dim, layer.num_kv_heads * head_dim, layer.ffn_width
    attn, mlp = at + "self_attn.", at + "mlp."
    weights = {}
    for ours, theirs in norms.items():
        weights[ours] = norm(f"{at}{theirs}.weight", hidden, added=norm_added)
        if norm_bias:
            weights[f"{ours}.bias"] = bias((f"{at}{theirs}.bias", hidden))
    if qk_norm != "none":
        widths = (head_dim, head_dim) if qk_norm == "head" else (q, kv)
        for part, width in zip("qk", widths, strict=True):
            name = f"{attn}{part}_norm.weight"
            weights[f"self_attn.{part}_norm"] = norm(name, width, added=norm_added)

    def project(ours: str, inputs: int, *parts: tuple[str, int]) -> None:
        weights[ours] = matrix("linear", inputs, *((f"{name}.weight", n) for name, n in parts))
        if parts[0][0].rpartition(".")[2] in biased:
            weights[f"{ours}.bias"] = bias(*((f"{name}.bias", n) for name, n in parts))

    project("self_attn.qk_proj", hidden, (attn + "q_proj", q), (attn + "k_proj", kv))
    project("self_attn.v_proj", hidden, (attn + "v_proj", kv))
    project("self_attn.o_proj", q, (attn + "o_proj", hidden))
    if layer.experts:
        return weights
    project("mlp.gate_up_proj", hidden, (mlp + "gate_proj", ffn), (mlp + "up_proj", ffn))
    project("mlp.down_proj", ffn, (mlp + "down_proj", hidden))
    return weights
