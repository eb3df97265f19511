"""StableLM: Llama's projections with LayerNorm, and a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.assembly import bias, norm
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import PRE_NORMS, separate_projections
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a StableLM configuration (transformers' ``StableLmConfig`` fields)."""
    config.absent("qk_layernorm")
    parallel = config.flag("use_parallel_residual", False)
    hidden = config.integer("hidden_size")
    weights = partial(
        separate_projections,
        norms={"input_layernorm": "input_layernorm"} if parallel else PRE_NORMS,
        norm_bias=True,
        biased=("q_proj", "k_proj", "v_proj") if config.flag("use_qkv_bias", False) else (),
    )
    family = Conventions(
        "stablelm",
        norm_eps=1e-5,
        eps_field="layer_norm_eps",
        max_context=4096,
        kv_heads=32,
        partial_rotary=True,
        rotary_share=0.25,
        layer_weights=weights,
        final_norm={
            "weight": norm("model.norm.weight", hidden),
            "bias": bias(("model.norm.bias", hidden)),
        },
    )
    spec = read_llama_like(config, generation, family)
    return replace(spec, norm="layer", block="parallel" if parallel else "pre")
