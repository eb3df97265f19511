"""Every family gives FLOAT's logits as float32, and QUANTIZED's in the formats of both profiles."""

from __future__ import annotations

import numpy as np
import pytest

from tests.oracles.tiny_families import CONFIGS, MIXTURES, RECURRENT

ALL = CONFIGS | MIXTURES | RECURRENT
# Between them they have every placement of norms, kind of norm, bias, bound, table and state, and
# every way to choose experts.
DISTINCT = (
    *("gemma2", "gemma3_text", "granite", "jetmoe", "lfm2", "olmo", "phi", "phimoe", "qwen2_moe"),
)


def largest_error(found, wanted):
    return np.abs(found - wanted).max() / (wanted.max() - wanted.min())


def in_parts(session, text):
    """Logits after a prefill of 16 tokens, three single ones, and two prefills."""
    ends = [end for end in (16, 17, 18, 19, 35) if end <= len(text)]
    starts = (0, *ends[:-1])
    found = [session.extend(text[start:end]) for start, end in zip(starts, ends, strict=True)]
    return np.stack(found), ends


@pytest.mark.parametrize("family", ALL)
def test_float_weights(family, package, run_package, tokens):
    artifact = package(ALL[family])
    text = tokens[:48]
    wanted = artifact.float_logits(text)
    session = run_package(artifact.folder)
    assert largest_error(session.logits(text), wanted) < 5e-6
    for _ in range(2):  # a second text finds nothing of the first
        found, ends = in_parts(session, text)
        assert largest_error(found, wanted[[end - 1 for end in ends]]) < 5e-6
        session.reset()


@pytest.mark.parametrize(
    ("family", "format"),
    [
        *((family, "int4-g32") for family in CONFIGS),
        *((family, "int8-pc") for family in ("qwen2", "lfm2", "jetmoe")),
        ("jetmoe", "int4-g16"),
    ],
)
def test_integers(family, format, package, run_package, tokens):
    artifact = package(ALL[family], format)
    text = tokens[:32]
    wanted = artifact.quantized_logits(text)
    assert largest_error(run_package(artifact.folder).logits(text), wanted) < 5e-6
    assert largest_error(run_package(artifact.folder, "fp16").logits(text), wanted) < 4e-3


@pytest.mark.parametrize("family", DISTINCT)
def test_the_neural_engines_profile(family, package, run_package, tokens):
    artifact = package(ALL[family], "lut4-gc8", profile="ane")
    text = tokens[:32]
    wanted = artifact.quantized_logits(text)
    session = run_package(artifact.folder, "fp16")
    assert largest_error(session.logits(text), wanted) < 1e-2
    found, ends = in_parts(session, text)
    assert largest_error(found, wanted[[end - 1 for end in ends]]) < 1e-2


@pytest.mark.parametrize("family", ["gemma2", "lfm2", "granitemoe", "jetmoe"])
def test_packages_without_states(family, package, run_package, tokens):
    artifact = package(ALL[family], opset="ios17")
    text = tokens[:48]
    wanted = artifact.float_logits(text)
    session = run_package(artifact.folder)
    assert largest_error(session.logits(text), wanted) < 5e-6
    found, ends = in_parts(session, text)
    assert largest_error(found, wanted[[end - 1 for end in ends]]) < 5e-6


@pytest.mark.parametrize("options", [{}, {"profile": "ane"}, {"opset": "ios17", "chunk": "4,16"}])
@pytest.mark.parametrize("family", ["gemma2", "jetmoe", "lfm2", "phi", "phimoe"])
def test_coremltools_reopens_them_and_infers_the_same_types(family, options, package, reopen):
    format = "fp16" if options.get("profile") == "ane" else "fp32"
    _, program = reopen(package(ALL[family], format, **options).folder)
    for function in program.functions.values():
        assert function.outputs[0].shape[2] == 320
