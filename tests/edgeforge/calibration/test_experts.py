"""What calibration does with experts that saw few tokens or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeforge.calibration.filling import Filling
from edgeforge.calibration.rescaled import quantize_rescaled
from edgeforge.calibration.sequential import quantize_sequentially
from edgeforge.model.model import Model
from edgeforge.reference.expert_inputs import OTHERS_A_COLUMN
from edgeforge.reference.segments import Stretches, weight_of
from edgeforge.reference.walk import Walk
from quant.plans.plan import QuantPlan, calibrated_weights
from quant.plans.rules import Recipe, Rule
from quant.program.expert_branches import mixtures
from quant.program.program import Program, node_argument
from quant.store.fill import fill_store
from quant.store.partial import partial_store
from quant.store.store import WeightStore
from tests.oracles.vocabulary import HIDDEN, MIXTURES, VOCAB
from tests.oracles.vocabulary_models import program_of, small_model

BLOCKS = [[(7 * i + 3 * j) % VOCAB for i in range(12)] for j in range(2)]
LAST = "model.layers.2.mlp.experts."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(MIXTURES["normalized"], tmp_path_factory.mktemp("mixture") / "m")


@pytest.fixture(scope="module")
def program(model: Model) -> Program:
    return program_of(model.spec)


def float_walk(model: Model, program: Program, chosen: tuple[int, ...] | None = None) -> Walk:
    """A walk of the float program; with ``chosen``, all tokens of the last layer choose these."""

    def read(given) -> torch.Tensor:
        values = model.weights.float_weight(given.name)
        if chosen is not None and given.name == "model.layers.2.mlp.router.weight":
            # A softmax of equal logits keeps the first experts; of large equal ones, those.
            return torch.zeros_like(values)
        return values

    return Walk(program, read, model.weights.float_rows)


def stretches_of(walk: Walk, folder: Path) -> Stretches:
    begun = [walk.begin(torch.tensor(block)) for block in BLOCKS]
    return Stretches(walk, begun, folder / "spilled", 1 << 20)


def own_inputs(model: Model, program: Program, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters an expert's matrix: for its own tokens, and for all tokens of the layer."""
    walk = Walk(program, lambda g: model.weights.float_weight(g.name), model.weights.float_rows)
    own, every = [], []
    for block in BLOCKS:
        values, kept = walk.begin(torch.tensor(block)), {}
        for node in walk.order:
            values[node] = kept[node] = walk.prepare(node)(values)
            if node is not program.output():
                walk.forget(node, values)
        for mixture in mixtures(program).values():
            for branch in mixture.branches:
                for node in branch.nodes:
                    if "linear" in str(node.target) and weight_of(walk, node) == name:
                        entering = node_argument(node, 0)
                        own.append(kept[entering][0])
                        run = {branch.chosen: kept[mixture.source]}
                        for each in branch.nodes[: branch.nodes.index(node)]:
                            run[each] = walk.prepare(each)(run)
                        every.append(run[entering][0])
    return torch.cat(own), torch.cat(every)


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
def test_the_moment_is_of_own_tokens_and_of_others(part, model, program, tmp_path):
    walk = float_walk(model, program)
    name = f"{LAST}1.{part}.weight"
    own, every = own_inputs(model, program, name)
    assert 0 < len(own) < len(every) == sum(map(len, BLOCKS))
    with stretches_of(walk, tmp_path) as stretches:
        for node in stretches.matrices():
            if weight_of(walk, node) == name:
                found = stretches.statistics(node_argument(node, 0), name)
                break
    count = OTHERS_A_COLUMN * own.shape[1]
    others = every.double().T @ every.double() / len(every)
    wanted = (own.double().T @ own.double() + count * others) / (len(own) + count)
    torch.testing.assert_close(found.moment, wanted, rtol=1e-5, atol=1e-7)
    assert found.tokens == len(own)
    torch.testing.assert_close(found.largest, every.abs().amax(0))


def filled(model: Model, program: Program, algorithm: str, folder: Path) -> WeightStore:
    recipe = Recipe("mine", "", (Rule("*", "int4-g16", algorithm),))
    plan = recipe.plan(model.weights.shapes(), model.weights.roles())
    calibrated = set(calibrated_weights(plan))
    rest = {n: a for n, a in plan.weights.items() if n not in calibrated}
    with partial_store(folder, "key", plan, model.weights.shapes()) as partial:
        fill_store(model.weights, QuantPlan("rest", rest), partial)
        partial.keep()
        filling = Filling(model.weights, plan, partial)
        quantize_rescaled(filling, program, BLOCKS)
        quantize_sequentially(filling, program, BLOCKS)
    return WeightStore(folder / "key")


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_the_store_knows_how_many_tokens_chose_an_expert(algorithm, model, program, tmp_path):
    store = filled(model, program, algorithm, tmp_path)
    names = {n for n in model.weights.shapes() if ".experts." in n}
    assert store.tokens.keys() == names
    for layer in (0, 2):
        counts = [
            store.tokens[f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"]
            for expert in range(model.spec.layers[layer].experts)
        ]
        assert sum(counts) == 2 * sum(map(len, BLOCKS))


def test_an_expert_that_no_token_chose_is_quantized_on_others(model, program, tmp_path):
    walk = float_walk(model, program, chosen=(0, 1))
    found = {}
    with stretches_of(walk, tmp_path) as stretches:
        for node in stretches.matrices():
            name = weight_of(walk, node)
            if name.startswith(LAST):
                found[name] = stretches.statistics(node_argument(node, 0), name)
    tokens = sum(map(len, BLOCKS))
    for expert, count in enumerate((tokens, tokens, 0, 0)):
        for part in ("gate_up_proj", "down_proj"):
            inputs = found[f"{LAST}{expert}.{part}.weight"]
            assert inputs.tokens == count
            assert float(inputs.moment.diagonal().min()) > 0
    # The router is alike, so all experts' operands are the layer's.
    first, none = (found[f"{LAST}{expert}.gate_up_proj.weight"].moment for expert in (0, 2))
    torch.testing.assert_close(first, none, rtol=1e-5, atol=1e-7)
    assert first.shape == (HIDDEN, HIDDEN)
