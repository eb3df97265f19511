"""Qwen3.5 for text and images, of which the text part is exported: gated delta nets, attention.

Three of four layers are gated delta nets (arXiv 2412.06464). The others are attention whose result
is multiplied by a gate of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.assembly import bias, convolution, matrix, norm
from edgeforge.families.layer_kinds import FULL, LINEAR, read_kinds
from edgeforge.families.llama import Conventions, read_head_counts, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.rotary import read_rope
from edgeforge.families.spec import LayerSpec, ModelSpec, Piece, RecurrenceSpec, WeightSpec
from edgeforge.families.text_part import read_text_part

_IMAGES: Final = (
    "image_token_id",
    "language_model_only",
    "video_token_id",
    "vision_end_token_id",
    "vision_start_token_id",
)
# How many columns the rotation of an image's height and width has. A text has one position for all.
_AXES: Final = ("mrope_interleaved", "mrope_section")
_KINDS: Final = (FULL, LINEAR)


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Qwen3.5 configuration (transformers' ``Qwen3_5Config`` fields)."""
    for field in _IMAGES:
        config.get(field)
    return read_text_part(config, generation, "qwen3_5", read_text_spec, {})


def read_text_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads the text part's configuration (transformers' ``Qwen3_5TextConfig`` fields)."""
    head_dim = read_head_counts(config, 4, 256)[3]
    context = config.integer("max_position_embeddings", 32768)
    linear = LayerSpec(
        0,
        0,
        config.integer("intermediate_size"),
        rope=None,
        mixer="delta_net",
        recurrence=_read_recurrence(config),
    )
    kinds = _read_kinds(config, config.layer_count("num_hidden_layers"))
    width = config.integer("linear_conv_kernel_dim", 4, minimum=2)
    biased = read_biases(config, "attention_bias")
    config.require("attn_output_gate", True)
    config.require("output_gate_type", "swish")
    for field in ("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
        config.get(field)  # the dtype of another runtime, and heads that guess further tokens
    config.require("mlp_only_layers", [])
    rope = read_rope(config, head_dim, context, share=0.25, partial=True, harmless=_AXES)
    family = Conventions(
        "qwen3_5_text",
        norm_added=1.0,
        max_context=context,
        kv_heads=4,
        head_dim=256,
        ropes=(rope,),
        feed_forward=lambda index, layer: layer if kinds[index] == FULL else linear,
        layer_weights=partial(_layer_weights, width=width, biased=biased),
    )
    spec = replace(read_llama_like(config, generation, family), conv_width=width)
    return replace(spec, ignored=(*spec.ignored, "mtp.*", "visual.*", "model.visual.*"))


def _read_kinds(config: ConfigReader, count: int) -> tuple[str, ...]:
    every = config.integer("full_attention_interval", 4)
    kinds = [LINEAR if (index + 1) % every else FULL for index in range(count)]
    return read_kinds(config, kinds, _KINDS)


def _read_recurrence(config: ConfigReader) -> RecurrenceSpec:
    keys = config.integer("linear_num_key_heads", 16)
    values = config.integer("linear_num_value_heads", 32)
    if values % keys:
        raise CheckpointError(
            f"{config.where}: linear_num_value_heads {values} is not a multiple of "
            f"linear_num_key_heads {keys}"
        )
    return RecurrenceSpec(
        values,
        keys,
        config.integer("linear_key_head_dim", 128),
        config.integer("linear_value_head_dim", 128),
    )


def _layer_weights(
    index: int,
    layer: LayerSpec,
    *,
    hidden: int,
    head_dim: int,
    width: int,
    biased: tuple[str, ...],
) -> dict[str, WeightSpec]:
    weights = separate_projections(
        index, layer, hidden=hidden, head_dim=head_dim, norm_added=1.0, qk_norm="head",
        biased=biased,
    )  # fmt: skip
    if layer.mixer == "attention":
        return _with_gate(index, layer, weights, hidden, head_dim)
    kept = {name: weight for name, weight in weights.items() if "self_attn" not in name}
    return kept | _delta_net(f"model.layers.{index}.linear_attn.", layer, hidden, width)


def _delta_net(at: str, layer: LayerSpec, hidden: int, width: int) -> dict[str, WeightSpec]:
    made = layer.recurrence
    assert made is not None
    heads, inner = made.heads, made.heads * made.value_width
    columns = 2 * made.key_heads * made.key_width + inner
    decay = WeightSpec(
        (heads,), (Piece(at + "A_log", (heads,)),), "gain", form="negative_exponential"
    )
    weights = {
        "in_proj": matrix(
            "linear", hidden, (at + "in_proj_qkv.weight", columns), (at + "in_proj_z.weight", inner)
        ),
        "beta_proj": matrix("gate", hidden, (at + "in_proj_b.weight", heads)),
        "dt_proj": matrix("gate", hidden, (at + "in_proj_a.weight", heads)),
        "dt_proj.bias": bias((at + "dt_bias", heads)),
        "conv": convolution(at + "conv1d.weight", columns, width),
        "decay": decay,
        "norm": norm(at + "norm.weight", made.value_width),
        "out_proj": matrix("linear", inner, (at + "out_proj.weight", hidden)),
    }
    return {f"linear_attn.{name}": weight for name, weight in weights.items()}


def _with_gate(
    index: int, layer: LayerSpec, weights: dict[str, WeightSpec], hidden: int, head_dim: int
) -> dict[str, WeightSpec]:
    """Parts the queries' tensor, which has each head's query rows and then its gate's rows."""
    heads, at = layer.num_heads, f"model.layers.{index}.self_attn.q_proj"
    rows = 2 * heads * head_dim

    def every_second(tensor: str, tail: tuple[int, ...], first: int) -> tuple[Piece, ...]:
        return tuple(
            Piece(tensor, (head_dim, *tail), (2 * head + first) * head_dim, rows)
            for head in range(heads)
        )

    found = dict(weights)
    for part, tail in (("", (hidden,)), (".bias", ())):
        name, tensor = f"self_attn.qk_proj{part}", f"{at}{part or '.weight'}"
        if name not in weights:
            continue
        joined = weights[name]
        queries = every_second(tensor, tail, 0)
        found[name] = replace(joined, pieces=(*queries, *joined.pieces[1:]))
        gate = every_second(tensor, tail, 1)
        shape = (heads * head_dim, *tail)
        found[f"self_attn.gate_proj{part}"] = WeightSpec(shape, gate, joined.role)
    return found
