"""Gemma 2 (arXiv 2408.00118): four norms a layer, bounded scores and logits, windows 1:1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.gemma import embedding_factor
from edgeforge.families.layer_kinds import FULL, SLIDING, read_kinds, with_windows
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.spec import ModelSpec

NORMS: Final = {
    "input_layernorm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Gemma 2 configuration (transformers' ``Gemma2Config`` fields)."""
    biased = read_biases(config, "attention_bias")
    weights = partial(separate_projections, norms=NORMS, norm_added=1.0, biased=biased)
    family = Conventions(
        "gemma2",
        norm_added=1.0,
        max_context=8192,
        kv_heads=4,
        head_dim=256,
        tied=True,
        activation_field="hidden_activation",
        activation="gelu_pytorch_tanh",
        layer_weights=weights,
    )
    spec = read_llama_like(config, generation, family)
    alternating = [FULL if index % 2 else SLIDING for index in range(len(spec.layers))]
    window = read_window(config)
    config.require("sliding_window_size", window)  # the first files repeat it under this name
    spec = with_windows(spec, read_kinds(config, alternating), window)
    spec = replace(spec, attention_softcap=read_cap(config, "attn_logit_softcapping", 50.0))
    return finish(config, spec, logit_cap=30.0)


def read_window(config: ConfigReader) -> int:
    """Returns the window of Gemma's sliding layers in tokens, 0 for none."""
    return config.integer("sliding_window", 0 if "sliding_window" in config.fields() else 4096, 0)


def read_cap(config: ConfigReader, field: str, default: float) -> float:
    """Returns a softcap, 0 for none: ``default`` where the file lacks the field, 0 for null."""
    if field not in config.fields():
        return default
    return 0.0 if config.get(field) is None else config.real(field)


def finish(config: ConfigReader, spec: ModelSpec, *, logit_cap: float) -> ModelSpec:
    """Returns the spec with what Gemma 2 and 3 have in common.

    Args:
        config: the reader of ``config.json``.
        spec: what they share with Llama.
        logit_cap: the softcap on logits where the file has none; null in it is none.
    """
    config.get("hidden_act")  # these families are told by hidden_activation
    config.absent("use_bidirectional_attention")
    return replace(
        spec,
        block="sandwich",
        attention_scale=config.real("query_pre_attn_scalar", 256.0) ** -0.5,
        logit_softcap=read_cap(config, "final_logit_softcapping", logit_cap),
        embedding_multiplier=embedding_factor(config, spec.hidden_size),
    )
