"""Costs of experts' matrices: one fork of a layer, divided as errors are."""

from __future__ import annotations

import pytest

from edgeforge.planning import sensitivity as measured
from edgeforge.planning.expert_costs import MatrixErrors, costs_of
from edgeforge.planning.sensitivity import plan_divergence, sensitivity
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment
from tests.oracles.vocabulary import MIXTURES, VOCAB
from tests.oracles.vocabulary_models import program_of, small_model

BLOCKS = [[(7 * i + 3 * j) % VOCAB for i in range(12)] for j in range(2)]
GIVEN = [Assignment(parse_format(name), "rtn") for name in ("int3-g8", "int4-g8", "int8-g8")]


def test_a_matrix_that_few_tokens_read_costs_less_and_one_that_none_reads_costs_something():
    found = [
        MatrixErrors("often", GIVEN, [80.0, 8.0, 0.8], 8),
        MatrixErrors("seldom", GIVEN, [10.0, 1.0, 0.1], 1),
        MatrixErrors("never", GIVEN, [0.0, 0.0, 0.0], 0),
    ]
    asked = []
    costs = costs_of(found, lambda given: asked.append(dict(given)) or 0.9)
    assert asked == [dict.fromkeys(("often", "seldom", "never"), GIVEN[1]) | {"never": GIVEN[0]}]
    assert costs["often"]["int4-g8"] == pytest.approx(0.1 * (8 + 1))
    assert costs["seldom"]["int3-g8"] == pytest.approx(0.1 * (10 + 10))
    assert costs["never"]["int4-g8"] == pytest.approx(0.1)


def test_the_costs_of_a_layer_are_those_of_its_fork(tmp_path, monkeypatch):
    model = small_model(MIXTURES["normalized"], tmp_path / "m")
    program, weights = program_of(model.spec), model.weights
    names = [name for name in weights.shapes() if ".experts." in name]
    candidates = dict.fromkeys(names, GIVEN)
    forks = []
    finish = measured._Forks._finish
    monkeypatch.setattr(measured, "MEASURED_PARAMETERS", 0)
    monkeypatch.setattr(
        measured._Forks,
        "_finish",
        lambda self, walk, index, values: forks.append(index) or finish(self, walk, index, values),
    )
    found = sensitivity(weights, program, candidates, BLOCKS, "digest", tmp_path / "cache")
    assert found.method == "estimated"
    assert found.costs.keys() == set(names)
    assert len(forks) == 1 + 2 * 2  # FLOAT, and two kinds of matrices in each of two layers
    part = [name for name in names if "layers.2." in name and "down_proj" in name]
    wanted = plan_divergence(weights, program, dict.fromkeys(part, GIVEN[1]), BLOCKS)
    added = sum(found.costs[name]["int4-g8"] for name in part)
    # Each of the 8 experts counts as one token more; 48 were chosen.
    assert added == pytest.approx(wanted * (48 + 8) / 48, rel=0.02)


def test_experts_of_attention_share_forks_by_kind_and_cost_by_their_tokens(tmp_path, monkeypatch):
    model = small_model(MIXTURES["heads"], tmp_path / "m")
    program, weights = program_of(model.spec), model.weights
    names = [name for name in weights.shapes() if ".experts." in name]
    assert len(names) == 2 * 5
    forks = []
    finish = measured._Forks._finish
    monkeypatch.setattr(measured, "MEASURED_PARAMETERS", 0)
    monkeypatch.setattr(
        measured._Forks,
        "_finish",
        lambda self, walk, index, values: forks.append(index) or finish(self, walk, index, values),
    )
    candidates = dict.fromkeys(names, GIVEN)
    found = sensitivity(weights, program, candidates, BLOCKS, "digest", tmp_path / "cache")
    assert found.costs.keys() == set(names)
    assert len(forks) == 1 + 2  # FLOAT, the queries and the outputs of the one mixture
    assert forks[1] < forks[2]  # the outputs' fork begins after attention
    for kind in ("q_proj", "o_proj"):
        part = [name for name in names if kind in name]
        wanted = plan_divergence(weights, program, dict.fromkeys(part, GIVEN[1]), BLOCKS)
        added = sum(found.costs[name]["int4-g8"] for name in part)
        # Each of the 5 experts counts as one token more; 3 were chosen for each of 24 tokens.
        assert added == pytest.approx(wanted * (72 + 5) / 72, rel=0.02)
