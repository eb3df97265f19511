"""Qwen2, Qwen2.5 and models made of them: Llama's maths with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.layer_kinds import FULL, SLIDING, read_kinds, with_windows
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import separate_projections
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Qwen2 configuration (transformers' ``Qwen2Config`` fields)."""
    family = Conventions(
        "qwen2",
        max_context=32768,
        kv_heads=32,
        layer_weights=partial(separate_projections, biased=("q_proj", "k_proj", "v_proj")),
    )
    return read_late_windows(config, read_llama_like(config, generation, family))


def read_late_windows(config: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """Returns the spec with the windows of Qwen's files, which begin at one of the last layers.

    Files without ``use_sliding_window`` have the other two fields all the same.
    """
    window = config.integer("sliding_window", 0 if "sliding_window" in config.fields() else 4096, 0)
    first = config.integer("max_window_layers", 28, 0)
    if not config.flag("use_sliding_window", False):
        window = 0
    late = [SLIDING if window and n >= first else FULL for n in range(len(spec.layers))]
    kinds = read_kinds(config, late, (FULL, SLIDING) if window else (FULL,))
    return with_windows(spec, kinds, window)
