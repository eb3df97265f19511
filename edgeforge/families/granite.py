"""Granite 3 and the dense Granite 4: Llama's maths with four stated factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Granite configuration (transformers' ``GraniteConfig`` fields)."""
    biased = read_biases(config, "attention_bias", "mlp_bias")
    family = Conventions("granite", layer_weights=partial(separate_projections, biased=biased))
    return with_factors(config, read_llama_like(config, generation, family))


def with_factors(config: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """Returns the spec with the four factors that a Granite configuration states."""
    return replace(
        spec,
        embedding_multiplier=config.real("embedding_multiplier", 1.0),
        attention_scale=config.real("attention_multiplier", 1.0),
        residual_multiplier=config.real("residual_multiplier", 1.0),
        logit_multiplier=1 / config.real("logits_scaling", 1.0),
    )
