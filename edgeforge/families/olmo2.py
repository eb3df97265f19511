"""OLMo 2 (arXiv 2501.00656): norms after attention and feed-forward part, and on all of q and k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.spec import ModelSpec

NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "mlp_output_norm": "post_feedforward_layernorm",
}


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads an OLMo 2 configuration (transformers' ``Olmo2Config`` fields)."""
    biased = read_biases(config, "attention_bias")
    weights = partial(separate_projections, norms=NORMS, qk_norm="whole", biased=biased)
    family = Conventions("olmo2", norm_eps=1e-5, layer_weights=weights)
    return replace(read_llama_like(config, generation, family), block="post")
