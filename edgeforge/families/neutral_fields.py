"""Fields of a ``config.json`` that change nothing if they have one certain value, and only then.

Descendants of a family add factors, switches and lists that its checkpoints leave at the value that
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.errors import CheckpointError
from edgeforge.families.layer_kinds import kind_of, newer_name
from edgeforge.families.spec import ModelSpec

# A model of images and text generates text too; its family reads the part that does.
_CAUSAL_HEADS: Final = (
    *("forcausallm", "lmheadmodel"),
    *("gemma3forconditionalgeneration", "mistral3forconditionalgeneration"),
    "qwen3_5forconditionalgeneration",
)

# What every family here does: false would be another model, and no field at all means true.
_CAUSAL: Final = (
    "causal",
    "causal_attention",
    "is_causal",
    "use_causal_attention",
    "use_causal_mask",
)
_ALWAYS_ON: Final = (
    "scale_attn_weights",
    "use_rope",
    "use_rotary",
    "use_rotary_embedding",
    "use_rotary_embeddings",
)


def _rotated(spec: ModelSpec) -> float:
    return 0.0 if spec.rope is None else spec.rope.width / spec.head_dim


_NEUTRAL: Final[dict[str, Callable[[ModelSpec], float]]] = {
    **dict.fromkeys(
        ("embedding_multiplier", "embedding_scale", "scale_emb"),
        lambda spec: spec.embedding_multiplier,
    ),
    **dict.fromkeys(
        ("residual_multiplier", "residual_scale"), lambda spec: spec.residual_multiplier
    ),
    **dict.fromkeys(("rope_percent", "rope_pct", "rotary_pct"), _rotated),
    "logit_scale": lambda spec: spec.logit_multiplier,
    "logits_scaling": lambda spec: 1 / spec.logit_multiplier,
    "attention_multiplier": lambda spec: spec.scale,
    "query_pre_attn_scalar": lambda spec: spec.scale**-2,
    "dim_model_base": lambda spec: spec.hidden_size * spec.logit_multiplier,
    "scale_depth": lambda spec: spec.residual_multiplier * math.sqrt(len(spec.layers)),
}
"""What the spec computes already, by the field that would say it: no other value is neutral."""


def check_causal(config: ConfigReader) -> None:
    """Refuses a configuration that names other models than causal language models.

    A file without ``architectures`` is taken as its family's causal model, as transformers'
    ``AutoModelForCausalLM`` does.

    Raises:
        CheckpointError: no architecture has the head of a causal language model, or a field says
            that attention looks ahead.
    """
    for field in _CAUSAL:
        if config.get(field) is False and not config.is_ignored(field):
            raise CheckpointError(
                f"{config.where} sets {field} to false: each token attends to later ones too, as "
                f"in an encoder, and EdgeForge exports only causal language models; if this is "
                f"one, pass --ignore-config {field}"
            )
        config.require(field, True)
    for field in _ALWAYS_ON:
        config.require(field, True)
    # An encoder's states would enter the layers.
    config.absent("add_cross_attention", "is_encoder_decoder")
    given = config.get("architectures")
    named = [given] if isinstance(given, str) else given
    if not named or config.is_ignored("architectures"):
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(f"{config.where}: architectures is not a list of names")
    if not any(_is_causal(name) for name in named):
        raise CheckpointError(
            f"{config.where} names the architecture {', '.join(named)[:200]}, which has no head of "
            f"a causal language model (...ForCausalLM): EdgeForge exports only models that "
            f"generate text, not encoders, classifiers or reward models; if this is one, pass "
            f"--ignore-config architectures"
        )


def _is_causal(architecture: str) -> bool:
    name = architecture.lower()
    return name.endswith(_CAUSAL_HEADS) and "bidirectional" not in name


def check_neutral_fields(config: ConfigReader, spec: ModelSpec) -> None:
    """Refuses factors, and kinds of layers, that differ from what the spec computes.

    Raises:
        CheckpointError: the message names the field and its value.
    """
    for field, neutral in _NEUTRAL.items():
        config.require(field, neutral(spec))
    kinds, listed = [kind_of(layer) for layer in spec.layers], config.get("layer_types")
    if not isinstance(listed, list) or [newer_name(kind) for kind in listed] != kinds:
        config.require("layer_types", kinds)
    if spec.window:
        config.get("use_sliding_window")  # transformers' classes with a window do not read it
