"""Mistral Small 3.1 and Ministral 3 for text and images, of which the text part is exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families import ministral3, mistral
from edgeforge.families.spec import ModelSpec
from edgeforge.families.text_part import read_text_part
from quant.quoted import quoted

_IMAGES: Final = (
    "image_token_id",
    "image_token_index",
    "multimodal_projector_bias",
    "projector_hidden_act",
    "spatial_merge_size",
    "vision_feature_layer",
)
_TEXT: Final = {"mistral": mistral.read_spec, "ministral3": ministral3.read_spec}


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Mistral 3 configuration (transformers' ``Mistral3Config`` fields)."""
    for field in _IMAGES:
        config.get(field)
    return read_text_part(config, generation, "mistral3", _read_text, {})


def _read_text(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    kind = config.raw().get("model_type", "mistral")
    if kind == "mistral3":  # a file without a section of its own for the text part
        kind = "mistral"
    if not isinstance(kind, str) or kind not in _TEXT:
        raise CheckpointError(
            f"{config.where}: model_type {quoted(kind)} is no text part of mistral3; EdgeForge "
            f"reads {' and '.join(_TEXT)}"
        )
    return _TEXT[kind](config, generation)
