"""OLMo 3: OLMo 2's maths with windows 3:1; only layers without one stretch their rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.layer_kinds import FULL, SLIDING, read_kinds, with_windows
from edgeforge.families.llama import Conventions, read_head_counts, read_llama_like
from edgeforge.families.olmo2 import NORMS
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.rotary import read_ropes_by_kind
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads an OLMo 3 configuration (transformers' ``Olmo3Config`` fields)."""
    head_dim = read_head_counts(config)[3]
    context = config.integer("max_position_embeddings", 2048)
    theta = config.real("rope_theta", 500000.0)
    biased = read_biases(config, "attention_bias")
    family = Conventions(
        "olmo3",
        norm_eps=1e-5,
        max_context=context,
        ropes=read_ropes_by_kind(config, head_dim, context, theta=theta, sliding_theta=theta),
        layer_weights=partial(separate_projections, norms=NORMS, qk_norm="whole", biased=biased),
    )
    spec = replace(read_llama_like(config, generation, family), block="post")
    kinds = [SLIDING if (index + 1) % 4 else FULL for index in range(len(spec.layers))]
    absent = 0 if "sliding_window" in config.fields() else 4096
    window = config.integer("sliding_window", absent, minimum=0)
    return with_windows(spec, read_kinds(config, kinds), window, sliding_rope=1)
