"""Every format gives QUANTIZED's logits: exactly in float32, closely in float16."""

from __future__ import annotations

import numpy as np
import pytest

FORMATS = (
    "int4-g32",
    "int4-g64-asym",
    "int4-pc",
    "int4-pc-asym",
    "int8-g32",
    "int8-pc",
    "int8-pc-asym",
    "lut2-gc4",
    "lut3-gc8",
    "lut4-gc16",
    "lut6-pt",
    "lut8-pt",
    "bf16",
)


def largest_error(found, wanted):
    return np.abs(found - wanted).max() / (wanted.max() - wanted.min())


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, package, llama_config, run_package, tokens):
    config = llama_config(
        tie_word_embeddings=True, num_hidden_layers=1, head_dim=32, intermediate_size=128
    )
    artifact = package(config, format)
    text = tokens[:35]
    wanted = artifact.quantized_logits(text)
    assert largest_error(run_package(artifact.folder).logits(text), wanted) < 5e-6
    half = run_package(artifact.folder, "fp16").logits(text)
    assert largest_error(half, wanted) < 2e-3


@pytest.mark.parametrize("family", ["openelm", "mistral", "phi3"])
@pytest.mark.parametrize(
    ("recipe", "options"),
    [("int4", {}), ("int8", {"profile": "ane"})],
    ids=str,
)
def test_families_in_half_precision(
    family, recipe, options, package, run_package, tokens, openelm_config, llama_config, phi3_config
):
    config = {
        "openelm": openelm_config([2, 4], [1, 2]),
        "mistral": llama_config(model_type="mistral", sliding_window=7),
        "phi3": phi3_config(head_dim=32, partial_rotary_factor=0.5),
    }[family]
    artifact = package(config, recipe, **options)
    text = tokens[:48]
    wanted = artifact.quantized_logits(text)
    found = run_package(artifact.folder, "fp16").logits(text)
    error = np.abs(found - wanted) / (wanted.max() - wanted.min())
    # Random weights put the logits' rounding anywhere; a miswired graph errs by tenths.
    assert error.max() < 2e-2 and error.mean() < 1e-3
