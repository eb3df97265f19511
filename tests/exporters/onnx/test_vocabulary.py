"""Graphs of every operator and every way of building a layer, run against their torch meaning."""

from __future__ import annotations

import numpy as np
import pytest

from device_harness.onnx_session import OnnxSession
from tests.exporters.onnx.vocabulary_cases import CASES, CONTEXT, QUANTIZED, with_accuracy_level
from tests.oracles.traced import difference

FLOAT = 2e-4  # of the range of the logits
ROUNDED_ACTIVATIONS = 0.04


@pytest.mark.parametrize("name", CASES)
def test_float_graphs_give_the_programs_logits(lower, case_text, name):
    made = lower(name)
    wanted = made.reference.logits(case_text)
    session = OnnxSession(made.folder, CONTEXT, 1)
    assert difference(session.logits(case_text), wanted) < FLOAT
    # A prompt in chunks and then token by token, past every window; then another text.
    at = 0
    for size in (13, 4, 1, 1, 20, 1):
        at += size
        assert difference(session.extend(case_text[at - size : at]), wanted[at - 1]) < FLOAT
    session.reset()
    assert difference(session.extend(case_text[:2]), wanted[1]) < FLOAT
    assert difference(session.extend(case_text[2:3]), wanted[2]) < FLOAT
    operators = made.operators()
    assert set(made.case.has) <= set(operators)
    assert not set(made.case.lacks) & set(operators)


@pytest.mark.parametrize(("recipe", "name"), QUANTIZED)
def test_quantized_graphs_compute_with_the_stored_numbers(lower, case_text, tmp_path, name, recipe):
    made = lower(name, recipe)
    wanted = made.reference.logits(case_text)
    exact = OnnxSession(with_accuracy_level(made.folder, tmp_path / "exact", 1), CONTEXT, 1)
    assert difference(exact.logits(case_text), wanted) < FLOAT
    assert difference(exact.extend(case_text[:40]), wanted[39]) < FLOAT
    assert difference(exact.extend(case_text[40:41]), wanted[40]) < FLOAT
    rounded = OnnxSession(made.folder, CONTEXT, 1).logits(case_text)
    rows = np.abs(rounded - wanted).max(1) / np.ptp(wanted)
    # Where two experts nearly tie, rounding may make a token choose the other one. A norm to the
    # length 1 makes as much of what rounding did to a short key as of the key.
    is_uneven = any(layer.experts or layer.mixer == "delta_net" for layer in made.case.layers)
    assert (np.median(rows) if is_uneven else rows.max()) < ROUNDED_ACTIVATIONS
