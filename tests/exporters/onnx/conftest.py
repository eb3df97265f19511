"""Artifacts of specs without a family's file, made once for all tests of a run."""

from __future__ import annotations

import numpy as np
import pytest

from edgeforge.reference.walk import store_reader
from exporters.onnx.target import OnnxTarget
from tests.exporters.onnx.vocabulary_cases import CASES, CONTEXT, VOCAB, Made
from tests.oracles.lowered_spec import LoweredSpec
from tests.oracles.traced import ReferenceSession


@pytest.fixture(scope="session")
def lower(tmp_path_factory):
    """Lowers a case by a recipe; the same again is not made twice."""
    made: dict[tuple[str, str], Made] = {}

    def lower(name: str, recipe: str = "fp32") -> Made:
        if (name, recipe) not in made:
            root = tmp_path_factory.mktemp("case")
            source = LoweredSpec(CASES[name].spec(), root / "store", recipe, CONTEXT)
            lowered = source.write(OnnxTarget(), root / "artifact")
            reference = ReferenceSession(source.program, store_reader(source.store))
            made[name, recipe] = Made(CASES[name], root / "artifact", lowered, reference, source)
        return made[name, recipe]

    return lower


@pytest.fixture(scope="session")
def case_text() -> np.ndarray:
    return np.random.default_rng(11).integers(0, VOCAB, CONTEXT)
