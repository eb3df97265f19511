"""MiniCPM (arXiv 2404.06395): Llama's maths with factors that follow from depth and width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a MiniCPM configuration; the file must have the three fields of its factors."""
    config.absent("attention_bias", "sparse_config")
    spec = read_llama_like(config, generation, Conventions("minicpm", tied=True))
    return replace(
        spec,
        embedding_multiplier=config.real("scale_emb"),
        residual_multiplier=config.real("scale_depth") / math.sqrt(len(spec.layers)),
        logit_multiplier=config.real("dim_model_base") / spec.hidden_size,
    )
