"""Gemma 1 (arXiv 2403.08295): norms that multiply by one plus their weight, a GELU gate."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from edgeforge.checkpoint.config_reader import ConfigReader
from edgeforge.families.llama import Conventions, read_llama_like
from edgeforge.families.projections import read_biases, separate_projections
from edgeforge.families.spec import ModelSpec


def read_spec(config: ConfigReader, generation: Mapping[str, object]) -> ModelSpec:
    """Reads a Gemma configuration (transformers' ``GemmaConfig`` fields)."""
    # The first files say "gelu" and mean the form with a tanh. The newer field says so.
    config.choice("hidden_act", ("gelu", "gelu_pytorch_tanh"), "gelu_pytorch_tanh")
    config.absent("use_bidirectional_attention")
    biased = read_biases(config, "attention_bias")
    family = Conventions(
        "gemma",
        norm_added=1.0,
        max_context=8192,
        kv_heads=16,
        head_dim=256,
        tied=True,
        activation_field="hidden_activation",
        activation="gelu_pytorch_tanh",
        layer_weights=partial(separate_projections, norm_added=1.0, biased=biased),
    )
    spec = read_llama_like(config, generation, family)
    return replace(spec, embedding_multiplier=embedding_factor(config, spec.hidden_size))


def embedding_factor(config: ConfigReader, hidden: int) -> float:
    """Returns the square root of the hidden size, rounded to the dtype of the weights.

    The models were made with a factor so rounded: 55.5 for 3072 in bfloat16.

    Args:
        config: the reader of ``config.json``, which states the dtype.
        hidden: width of the residual stream.
    """
    root = math.sqrt(hidden)
    match str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."):
        case "bfloat16":
            (bits,) = struct.unpack("<I", struct.pack("<f", root))
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to nearest, ties to even
            (rounded,) = struct.unpack("<f", struct.pack("<I", bits))
        case "float16":
            (rounded,) = struct.unpack("<e", struct.pack("<e", root))
        case _:
            (rounded,) = struct.unpack("<f", struct.pack("<f", root))
    return float(rounded)
