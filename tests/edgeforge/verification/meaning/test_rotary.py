"""Stored rotary tables are explained: another theta, type or set, or other positions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgeforge.families.spec import RopeSpec
from edgeforge.model.rope import tables
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.rotary import Rotary

CONTEXT = 64
DEFAULT = RopeSpec(10000.0, 32)
LINEAR = replace(DEFAULT, scaling="linear", factor=4.0)
LLAMA3 = replace(
    DEFAULT,
    scaling="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_context=16,
)
LONGROPE = replace(
    DEFAULT,
    scaling="longrope",
    original_context=32,
    short_factor=tuple(1 + 0.1 * i for i in range(16)),
    long_factor=tuple(1 + 0.9 * i for i in range(16)),
    attention_factor=1.2,
)
ROPES = {"default": DEFAULT, "linear": LINEAR, "llama3": LLAMA3, "longrope": LONGROPE}


def failed(rope: RopeSpec, cos: np.ndarray, sin: np.ndarray) -> dict[str, str]:
    findings = Findings()
    rotary = Rotary((rope,), CONTEXT)
    rotary.open(findings)
    rotary.hold(0, cos, sin, "here", findings)
    return {check.name: check.message for check in findings.checks() if check.verdict == "failed"}


def stored(rope: RopeSpec, dtype: type = np.float32) -> list[np.ndarray]:
    return [table.numpy().astype(dtype) for table in tables(rope, CONTEXT)]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("name", ROPES)
def test_its_own_tables_pass(name, dtype):
    assert failed(ROPES[name], *stored(ROPES[name], dtype)) == {}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("theta", [500.0, 9000.0, 11000.0, 500000.0, 1e6])
@pytest.mark.parametrize("name", ["default", "linear", "longrope"])
def test_another_theta_is_found(name, theta, dtype):
    found = failed(ROPES[name], *stored(replace(ROPES[name], theta=theta), dtype))
    assert {"meaning.rope_theta", "meaning.rope_tables"} == set(found)
    words = found["meaning.rope_theta"].split()
    assert float(words[words.index("is") + 1]) == pytest.approx(theta, rel=0.03)


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_a_scaling_that_was_forgotten_is_found(name):
    found = failed(ROPES[name], *stored(DEFAULT))
    assert "type default, not" in found["meaning.rope_type"] or name == "linear"
    assert "meaning.rope_tables" in found


def test_the_other_set_is_found():
    swapped = replace(
        LONGROPE, short_factor=LONGROPE.long_factor, long_factor=LONGROPE.short_factor
    )
    assert "short factors are stored" in failed(LONGROPE, *stored(swapped))["meaning.rope_set"]


@pytest.mark.parametrize("first", [2, 40, CONTEXT - 1])
def test_the_first_wrong_position_is_named(first):
    cos, sin = stored(DEFAULT)
    cos[first:] = stored(replace(DEFAULT, theta=1e6))[0][first:]
    found = failed(DEFAULT, cos, sin)
    assert set(found) == {"meaning.rope_tables"}
    assert f"from position {first} on" in found["meaning.rope_tables"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.5])
def test_one_number_is_enough(value):
    cos, sin = stored(DEFAULT)
    sin[CONTEXT - 3, 7] = value
    message = failed(DEFAULT, cos, sin)["meaning.rope_tables"]
    assert f"from position {CONTEXT - 3} to {CONTEXT - 3} (pair 7 first)" in message


@pytest.mark.parametrize("shape", [(CONTEXT, 8), (1, 16), (CONTEXT,)])
def test_tables_of_another_shape_are_no_crash(shape):
    array = np.ones(shape, np.float32)
    assert "meaning.rope_tables" in failed(DEFAULT, array, array)


def test_tables_of_doubles_are_no_crash():
    cos, sin = (each.astype(np.float64) for each in stored(DEFAULT))
    assert "meaning.rope_tables" in failed(DEFAULT, cos, sin)
