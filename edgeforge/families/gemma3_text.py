"""Gemma 3's text models (arXiv 2503.19786): norms on q and k, windows 5:1, two rotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.gemma2 import NORMS, finish, read_window
from edgeforge.families.layer_kinds import FULL, SLIDING, read_kinds, with_windows
from edgeforge.families.llama import Conventions, read_head_counts, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.rotary import read_ropes_by_kind
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Gemma 3 text configuration (transformers' ``Gemma3TextConfig`` fields)."""
    head_dim = read_head_counts(config, 4, 256)[3]
    context = config.integer("max_position_embeddings", 131072)
    family = Conventions(
        "gemma3_text",
        norm_added=1.0,
        max_context=context,
        kv_heads=4,
        head_dim=256,
        tied=True,
        activation_field="hidden_activation",
        activation="gelu_pytorch_tanh",
        ropes=read_ropes_by_kind(config, head_dim, context, theta=1e6, sliding_theta=1e4),
        layer_weights=partial(
            separate_projections,
            norms=NORMS,
            norm_added=1.0,
            qk_norm="head",
            biased=read_biases(config, "attention_bias"),
        ),
    )
    # The context that files state is the stretched one, also with linear scaling.
    spec = replace(read_llama_like(config, generation, family), max_context=context)
    every = config.integer("_sliding_window_pattern", 6)
    every = config.integer("sliding_window_pattern", every)
    kinds = [SLIDING if (index + 1) % every else FULL for index in range(len(spec.layers))]
    window = read_window(config)
    spec = with_windows(spec, read_kinds(config, kinds), window, sliding_rope=1)
    # No release has it, and transformers reads it without computing it.
    config.absent("attn_logit_softcapping")
    return finish(config, spec, logit_cap=0.0)
