"""Small mixtures of attention heads, and the ways in which tests export them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.exporters.coreml import vocabulary_model
from tests.oracles import vocabulary

# As many slots as heads, so that no shape tells one from the other.
EXPERTS, CHOSEN, HEADS, WIDTH = 4, 2, 2, vocabulary.HEAD
SQUARE = replace(
    vocabulary.FULL,
    num_heads=CHOSEN * HEADS,
    num_kv_heads=HEADS,
    attention_experts=EXPERTS,
    chosen_attention_experts=CHOSEN,
)
ONE_SLOT = replace(SQUARE, num_heads=HEADS, chosen_attention_experts=1)
SPECS = {
    **{name: vocabulary.MIXTURES[name] for name in ("heads", "heads-and-mixture")},
    "square": vocabulary.small_spec((SQUARE, SQUARE), router="normalized_softmax"),
    "one-slot": vocabulary.small_spec((ONE_SLOT,), router="normalized_softmax"),
}
WAYS = {
    "gpu": {},
    "ane": {"profile": "ane"},
    "inputs": {"opset": "ios17", "chunk": "4,16"},
}
TEXT = np.random.default_rng(5).integers(0, vocabulary.VOCAB, 40)


def exported(folder: Path, spec: str, way: str, **options: Any) -> vocabulary_model.Made:
    """Exports a spec in one of the ways; options are those of `vocabulary_model.made`."""
    format = "fp16" if way == "ane" else "fp32"
    return vocabulary_model.made(folder, SPECS[spec], format=format, **WAYS[way], **options)
