"""SmolLM3: Llama's maths, with no rotation in every fourth layer (NoPE, arXiv 2501.18795)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.layer_kinds import FULL, SLIDING, read_kinds, with_windows
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a SmolLM3 configuration (transformers' ``SmolLM3Config`` fields)."""
    biased = read_biases(config, "attention_bias", "mlp_bias")
    family = Conventions(
        "smollm3",
        max_context=32768,
        kv_heads=4,
        tied=True,
        theta=2e6,
        layer_weights=partial(separate_projections, biased=biased),
    )
    spec = read_llama_like(config, generation, family)
    rotated = _read_rotated(config, len(spec.layers))
    window = config.integer("sliding_window", 0, 0)
    if not config.flag("use_sliding_window", False):
        window = 0
    kinds = [SLIDING if window and not turned else FULL for turned in rotated]
    kinds = list(read_kinds(config, kinds, (FULL, SLIDING) if window else (FULL,)))
    spec = with_windows(spec, kinds, window)
    layers = zip(spec.layers, rotated, strict=True)
    return replace(
        spec, layers=tuple(replace(each, rope=0 if turned else None) for each, turned in layers)
    )


def _read_rotated(config: ConfigReader, count: int) -> list[bool]:
    """Returns for each layer whether it rotates: ``no_rope_layers`` has a 1 for those that do."""
    interval = config.integer("no_rope_layer_interval", 4)
    listed = config.get("no_rope_layers")
    if listed is None:
        return [(index + 1) % interval != 0 for index in range(count)]
    if not isinstance(listed, list) or len(listed) != count or set(listed) - {0, 1}:
        raise CheckpointError(
            f"{config.where}: no_rope_layers must list {count} numbers, one per layer: 1 for a "
            f"layer that rotates, 0 for one that does not"
        )
    return [bool(each) for each in listed]
