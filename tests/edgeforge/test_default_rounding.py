"""The default recipe against plain rounding at the same size, on a model of every family."""

import pytest
import torch

from edgeforge.families.registry import FAMILIES
from edgeforge.model.model import open_model
from edgeforge.synth.synthesise import PRESETS, synthesise
from quant.plans.plan import Assignment
from quant.plans.recipes import RECIPES
from quant.store.fill import stored_values

TINY = [name for name in PRESETS if name.startswith("tiny-")]
MODELS = {PRESETS[name].model_type: name for name in reversed(TINY)}


def test_every_family_is_here():
    assert MODELS.keys() >= FAMILIES.keys()


@pytest.mark.parametrize("family", MODELS)
def test_no_weight_is_worse_than_by_plain_rounding(family, tmp_path):
    weights = open_model(str(synthesise(MODELS[family], tmp_path / "m"))).weights
    plan = RECIPES["int4"].plan(weights.shapes(), weights.roles())
    better = 0
    for name, given in plan.weights.items():
        if given.algorithm == "cast":
            continue
        weight = weights.float_weight(name)

        def error(assignment: Assignment, weight: torch.Tensor = weight) -> float:
            return float((stored_values(weight, assignment).double() - weight).square().sum())

        searched, plain = error(given), error(Assignment(given.format, "rtn-minmax"))
        assert searched <= plain * (1 + 1e-6), name
        better += searched < 0.99 * plain
    assert better
