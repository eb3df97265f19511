"""The text part of a model that also reads images: a section of its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.neutral_fields import check_neutral_fields
from edgeforge.families.spec import ModelSpec

_SECTION: Final = "text_config"
# What the whole model's fields say of the text part where its own section does not.
_SHARED: Final = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
)


def read_text_part(
    config: ConfigReader,
    generation: Mapping[str, object],
    model_type: str,
    read: Callable[[ConfigReader, Mapping[str, object]], ModelSpec],
    defaults: Mapping[str, object],
) -> ModelSpec:
    """Returns the spec of the text part; its tensors have the prefix ``language_model.``.

    A file without the section is read as that of a text model.

    Args:
        config: the reader of the whole ``config.json``.
        generation: ``generation_config.json``, or an empty mapping.
        model_type: the whole model's type.
        read: the reader of the text part's family.
        defaults: what the text part's fields are where its section lacks them.
    """
    whole = config.raw()
    section = config.section(_SECTION)
    if section is None:
        return replace(read(config, generation), model_type=model_type)
    config.get("vision_config")
    shared = {name: whole[name] for name in _SHARED if name in whole}
    for name in shared:
        config.get(name)
    inner = section.with_defaults({**defaults, **shared})
    spec = read(inner, generation)
    check_neutral_fields(inner, spec)
    inner.finish()
    weights = {
        name: replace(
            weight,
            pieces=tuple(replace(p, tensor=f"language_model.{p.tensor}") for p in weight.pieces),
        )
        for name, weight in spec.weights.items()
    }
    ignored = (*(f"language_model.{name}" for name in spec.ignored), *spec.ignored)
    images = ("vision_tower.*", "vision_model.*", "multi_modal_projector.*")
    return replace(
        spec,
        model_type=model_type,
        weights=weights,
        ignored=(*ignored, *images, *(f"model.{name}" for name in images)),
    )
