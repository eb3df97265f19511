"""What calibration does with experts that saw few tokens or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgeforge.calibration.few_tokens import few_tokens_note
from edgeforge.calibration.filling import Filling
from edgeforge.calibration.rescaled import quantize_rescaled
from edgeforge.calibration.sequential import quantize_sequentially
from edgeforge.model.model import Model
from edgeforge.reference.expert_inputs import OTHERS_A_COLUMN
from edgeforge.reference.segments import Stretches, weight_of
from edgeforge.reference.walk import Walk
from quant.plans.plan import QuantPlan, calibrated_weights
from quant.plans.rules import Recipe, Rule
from quant.program import ops
from quant.program.expert_branches import Mixture, mixtures
from quant.program.program import Program, node_argument
from quant.store.fill import fill_store
from quant.store.partial import partial_store
from quant.store.store import WeightStore
from tests.oracles.vocabulary import HIDDEN, MIXTURES, VOCAB
from tests.oracles.vocabulary_models import program_of, small_model

BLOCKS = [[(7 * i + 3 * j) % VOCAB for i in range(12)] for j in range(2)]
LAST = "model.layers.2.mlp.experts."
HEADS = "model.layers.1.self_attn.experts."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(MIXTURES["normalized"], tmp_path_factory.mktemp("mixture") / "m")


@pytest.fixture(scope="module")
def program(model: Model) -> Program:
    return program_of(model.spec)


def float_walk(
    model: Model,
    program: Program,
    chosen: tuple[int, ...] | None = None,
    router: str = "model.layers.2.mlp.router.weight",
) -> Walk:
    """A walk of the float program; with ``chosen``, all tokens of one router choose these."""

    def read(given) -> torch.Tensor:
        values = model.weights.float_weight(given.name)
        if chosen is not None and given.name == router:
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
                        run = {branch.chosen: rows_of(mixture, kept[mixture.source])}
                        for each in branch.nodes[: branch.nodes.index(node)]:
                            run[each] = walk.prepare(each)(run)
                        every.append(run[entering][0])
    return torch.cat(own), torch.cat(every)


def rows_of(mixture: Mixture, read: torch.Tensor) -> torch.Tensor:
    """What any expert could read: every token, or every slot of every token."""
    if not mixture.reads_slots:
        return read
    chosen, heads = mixture.slots
    slots = read[0].reshape(len(read[0]), heads, chosen, -1)
    parts = [
        slots[token, :, slot].flatten() for token in range(len(slots)) for slot in range(chosen)
    ]
    return torch.stack(parts)[None]


@pytest.fixture(scope="module")
def of_heads(tmp_path_factory: pytest.TempPathFactory) -> Model:
    spec = MIXTURES["heads-and-mixture"]
    return small_model(spec, tmp_path_factory.mktemp("heads") / "m")


CASES = {
    "gate_up_proj": ("model", f"{LAST}1.gate_up_proj.weight", 1),
    "down_proj": ("model", f"{LAST}1.down_proj.weight", 1),
    "q_proj": ("of_heads", f"{HEADS}1.q_proj.weight", 1),
    "o_proj": ("of_heads", f"{HEADS}1.o_proj.weight", 3),  # as many slots has each token
}


@pytest.mark.parametrize("case", CASES)
def test_the_moment_is_of_own_tokens_and_of_others(case, request, tmp_path):
    given, name, rows = CASES[case]
    model = request.getfixturevalue(given)
    program = program_of(model.spec)
    walk = float_walk(model, program)
    own, every = own_inputs(model, program, name)
    assert 0 < len(own) < len(every) == rows * sum(map(len, BLOCKS))
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


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smoothquant"])
def test_experts_of_attention_are_calibrated_on_the_tokens_that_reach_them(
    algorithm, of_heads, tmp_path
):
    program, spec = program_of(of_heads.spec), of_heads.spec
    store = filled(of_heads, program, algorithm, tmp_path)
    assert store.tokens.keys() == {n for n in of_heads.weights.shapes() if ".experts." in n}
    for index, layer in enumerate(spec.layers):
        at = f"model.layers.{index}.self_attn.experts."
        experts = range(layer.attention_experts)
        queries = [store.tokens[f"{at}{expert}.q_proj.weight"] for expert in experts]
        assert sum(queries) == layer.chosen_attention_experts * sum(map(len, BLOCKS))
        assert queries == [store.tokens[f"{at}{expert}.o_proj.weight"] for expert in experts]
    (note,) = few_tokens_note(store.tokens, of_heads.weights.shapes())
    assert " of 14 experts saw fewer than " in note


def test_gptq_leaves_less_error_in_the_outputs_of_attentions_experts(of_heads, tmp_path):
    program, weights = program_of(of_heads.spec), of_heads.weights
    stores = {each: filled(of_heads, program, each, tmp_path / each) for each in ("rtn", "gptq")}
    for part in ("q_proj", "o_proj"):
        errors = dict.fromkeys(stores, 0.0)
        for expert in range(5):
            name = f"{HEADS}{expert}.{part}.weight"
            _, every = own_inputs(of_heads, program, name)
            for each, store in stores.items():
                stored = store.part(name, "codes"), store.part(name, "scale")
                outputs = ops.quant_linear(every, *stored, None, "int4-g16")
                missed = outputs - every @ weights.float_weight(name).T
                errors[each] += float(missed.square().sum())
        assert errors["gptq"] < errors["rtn"]


def test_an_expert_of_attention_that_no_token_chose_is_quantized_on_others(of_heads, tmp_path):
    program = program_of(of_heads.spec)
    router = "model.layers.1.self_attn.router.weight"
    walk = float_walk(of_heads, program, chosen=(0, 1, 2), router=router)
    found = {}
    with stretches_of(walk, tmp_path) as stretches:
        for node in stretches.matrices():
            name = weight_of(walk, node)
            if name.startswith(HEADS):
                found[name] = stretches.statistics(node_argument(node, 0), name)
    tokens = sum(map(len, BLOCKS))
    for expert, count in enumerate((tokens, tokens, tokens, 0, 0)):
        for part in ("q_proj", "o_proj"):
            inputs = found[f"{HEADS}{expert}.{part}.weight"]
            assert inputs.tokens == count
            assert float(inputs.moment.diagonal().min()) > 0


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
