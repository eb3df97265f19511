"""OLMo 1 (arXiv 2402.00838): LayerNorm without weights, bounded queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads an OLMo configuration (transformers' ``OlmoConfig`` fields)."""
    biased = read_biases(config, "attention_bias")
    family = Conventions(
        "olmo",
        norm_eps=1e-5,
        eps_field="",
        layer_weights=partial(separate_projections, norms={}, biased=biased),
        final_norm={},
    )
    spec = read_llama_like(config, generation, family)
    return replace(spec, norm="layer", clip_qkv=read_bound(config))


def read_bound(config: ConfigReader) -> float:
    """Returns ``clip_qkv``, the largest magnitude of queries, keys and values; 0 for no bound."""
    return 0.0 if config.get("clip_qkv") is None else config.real("clip_qkv")
