"""Every family gives FLOAT's logits as float32, and QUANTIZED's in the formats of both profiles."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles.tiny_families import CONFIGS

# Families between them use every operator, placement of norms, table and state.
OLD = ("gemma2", "lfm2")


def largest_error(found, wanted):
    return np.abs(found - wanted).max() / (wanted.max() - wanted.min())


def in_parts(session, text):
    """Logits after a prefill of 16 tokens, three single ones, and two prefills."""
    ends = (16, 17, 18, 19, 51 - 16)
    starts = (0, *ends)
    return np.stack([session.extend(text[a:b]) for a, b in zip(starts, ends, strict=False)]), ends


@pytest.mark.parametrize("family", CONFIGS)
def test_float_weights(family, package, run_package, tokens):
    artifact = package(CONFIGS[family])
    text = tokens[:48]
    wanted = artifact.float_logits(text)
    session = run_package(artifact.folder)
    assert largest_error(session.logits(text), wanted) < 5e-6
    for _ in range(2):  # a second text finds nothing of the first
        found, ends = in_parts(session, text)
        assert largest_error(found, wanted[[end - 1 for end in ends]]) < 5e-6
        session.reset()


@pytest.mark.parametrize("format", ["int4-g32", "int8-pc"])
@pytest.mark.parametrize("family", CONFIGS)
def test_integers(family, format, package, run_package, tokens):
    artifact = package(CONFIGS[family], format)
    text = tokens[:32]
    wanted = artifact.quantized_logits(text)
    assert largest_error(run_package(artifact.folder).logits(text), wanted) < 5e-6
    assert largest_error(run_package(artifact.folder, "fp16").logits(text), wanted) < 4e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_the_neural_engines_profile(family, package, run_package, tokens):
    artifact = package(CONFIGS[family], "lut4-gc16", profile="ane")
    text = tokens[:32]
    wanted = artifact.quantized_logits(text)
    session = run_package(artifact.folder, "fp16")
    assert largest_error(session.logits(text), wanted) < 1e-2
    found, ends = in_parts(session, text[:32])
    assert largest_error(found[:4], wanted[[end - 1 for end in ends[:4]]]) < 1e-2


@pytest.mark.parametrize("family", OLD)
def test_packages_without_states(family, package, run_package, tokens):
    artifact = package(CONFIGS[family], opset="ios17")
    text = tokens[:48]
    wanted = artifact.float_logits(text)
    session = run_package(artifact.folder)
    assert largest_error(session.logits(text), wanted) < 5e-6
    found, ends = in_parts(session, text)
    assert largest_error(found, wanted[[end - 1 for end in ends]]) < 5e-6
