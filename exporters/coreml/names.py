"""Names in a package that whoever runs it must know: functions, inputs, outputs, states."""

from __future__ import annotations

import re
from typing import Final

from exporters.errors import ExportError

PACKAGE: Final = "model.mlpackage"
MODEL_PATH: Final = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS_PATH: Final = "Data/com.apple.CoreML/weights/weight.bin"
# How the model's own text names its weight file.
WEIGHTS_REFERENCE: Final = "@model_path/weights/weight.bin"

# One token; the function a package opens with.
DECODE: Final = "decode"
# As many tokens as it was written for, logits of the last.
PREFILL: Final = "prefill"
# Likewise, logits of all.
VERIFY: Final = "verify"
# The only function of a package for iOS 17: one token or a chunk, logits of the last.
MAIN: Final = "main"

TOKENS: Final = "inputIds"  # int32[1, t]
POSITION: Final = "position"  # int32[1]: tokens already cached
LOGITS: Final = "logits"  # fp16[1, 1 or t, vocabulary]

_CACHES: Final = {"k_cache": "keyCache", "v_cache": "valueCache"}
# Ends the name of the output that is a cache after the call, where there are no states.
UPDATED: Final = "Updated"

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.]+")


def cache_name(layer: int, part: str) -> str:
    """The state (for iOS 17: the input) that holds a layer's keys or values.

    >>> cache_name(3, "k_cache")
    'keyCache_3'
    """
    return f"{_CACHES[part]}_{layer}"


def identifier(weight: str) -> str:
    """A weight's name as MIL can hold it, undone by `weight_name`.

    >>> identifier("model.layers.0.self_attn.qkv_proj.weight")
    'model__layers__0__self_attn__qkv_proj__weight'

    Raises:
        ExportError: a name that could not be read back.
    """
    if not _PLAIN.fullmatch(weight) or "__" in weight:
        raise ExportError(
            f"{weight!r} cannot name a weight in a Core ML package: take letters, digits, dots and "
            f"single underscores"
        )
    return weight.replace(".", "__")


def weight_name(identifier: str) -> str:
    """Undoes `identifier`.

    >>> weight_name("lm_head__weight")
    'lm_head.weight'
    """
    return identifier.replace("__", ".")
