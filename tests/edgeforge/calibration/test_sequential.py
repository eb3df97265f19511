"""Weights quantized in order: on which inputs, with which result, and after an interruption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeforge.calibration.filling import Filling
from edgeforge.calibration.sequential import quantize_sequentially
from edgeforge.model.model import Model, open_model
from edgeforge.model.trace import trace
from edgeforge.reference.segments import Stretches
from edgeforge.reference.walk import ReferenceRunner, Walk, block_pool, store_reader
from edgeforge.synth.synthesise import synthesise
from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment, QuantPlan
from quant.plans.rules import Recipe, Rule
from quant.program.program import Program, node_argument
from quant.program.rewrite import quantize_program
from quant.quantizers import registry
from quant.quantizers.gptq import Gptq
from quant.quantizers.rtn import RTN
from quant.store.fill import fill_store, write_rows
from quant.store.partial import PartialStore, partial_store
from quant.store.store import WeightStore

CONTEXT = 24
GPTQ = Recipe("mine", "", (Rule("*", "int4-g32", "gptq"),))


class Watched(Gptq):
    """GPTQ that keeps what it was given, and can be made to stop."""

    def __init__(self, stop_before: str = "") -> None:
        super().__init__()
        object.__setattr__(self, "moments", {})
        object.__setattr__(self, "stop_before", stop_before)

    def quantize_matrix(self, weight, moment, fmt, *, name="", threads=None):
        if name == self.stop_before:
            raise KeyboardInterrupt
        self.moments[name] = moment.clone()
        return super().quantize_matrix(weight, moment, fmt, name=name, threads=threads)


@pytest.fixture(scope="module", params=["tiny-openelm", "tiny-phi-3"])
def model(request, tmp_path_factory) -> Model:
    return open_model(str(synthesise(request.param, tmp_path_factory.mktemp("synth") / "m")))


@pytest.fixture(scope="module")
def program(model) -> Program:
    return trace(model.spec, CONTEXT)


@pytest.fixture(scope="module")
def blocks(model) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return draw.integers(0, model.spec.vocab_size, (6, CONTEXT)).tolist()


def plan_of(model: Model) -> QuantPlan:
    return GPTQ.plan(model.weights.shapes(), model.weights.roles())


def fill(
    model: Model,
    program: Program,
    blocks: list[list[int]],
    cache: Path,
    watched: Watched,
    monkeypatch: pytest.MonkeyPatch,
    **options: int,
) -> WeightStore:
    plan = plan_of(model)
    monkeypatch.setitem(registry.CALIBRATED, "gptq", watched)
    with partial_store(cache, "key", plan, model.weights.shapes()) as partial:
        fill_rest(model, plan, partial)
        quantize_sequentially(Filling(model.weights, plan, partial, **options), program, blocks)
    return WeightStore(cache / "key")


def fill_rest(model: Model, plan: QuantPlan, partial: PartialStore) -> None:
    rest = {n: a for n, a in plan.weights.items() if a.algorithm != "gptq"}
    fill_store(model.weights, QuantPlan("rest", rest), partial)
    partial.keep()


def inputs_of(program: Program, read, rows, blocks, weight: str) -> torch.Tensor:
    """What enters a weight's product, over all blocks."""
    walk = Walk(program, read, rows)
    values = [walk.begin(torch.tensor(block)) for block in blocks]
    with block_pool() as pool:
        for node in walk.order:
            if "linear" in str(node.target):
                name = program.inputs[node_argument(node, 1).name].name
                if name == weight:
                    entering = node_argument(node, 0)
                    return torch.cat(
                        [v[entering].reshape(-1, v[entering].shape[-1]) for v in values]
                    )
            walk.advance(node, values, pool)
    raise AssertionError(weight)


def same_bytes(one: WeightStore, other: WeightStore) -> bool:
    return one.digests == other.digests


def test_every_weight_sees_what_the_quantized_ones_before_it_give(
    model, program, blocks, tmp_path, monkeypatch
):
    watched = Watched()
    store = fill(model, program, blocks, tmp_path, watched, monkeypatch)
    plan = plan_of(model)
    quantized = quantize_program(program, plan)
    linears = [n for n, a in plan.weights.items() if a.algorithm == "gptq" and "embed" not in n]
    assert set(watched.moments) >= set(linears)
    for name in (linears[0], linears[-1]):
        x = inputs_of(quantized, store_reader(store), None, blocks, name).double()
        wanted = x.t() @ x / len(x)
        torch.testing.assert_close(watched.moments[name], wanted, rtol=1e-4, atol=1e-6)
    last = linears[-1]
    floats = inputs_of(
        program,
        lambda given: model.weights.float_weight(given.name),
        model.weights.float_rows,
        blocks,
        last,
    ).double()
    apart = (watched.moments[last] - floats.t() @ floats / len(floats)).norm()
    assert apart > 1e-3 * watched.moments[last].norm()  # and not what float ones would give


def test_weights_that_read_the_same_inputs_share_their_second_moment(
    program, blocks, model, tmp_path, monkeypatch
):
    asked: list[str] = []
    collect = Stretches.statistics
    monkeypatch.setattr(
        Stretches,
        "statistics",
        lambda self, node, name: asked.append(node.name) or collect(self, node, name),
    )
    watched = Watched()
    fill(model, program, blocks, tmp_path, watched, monkeypatch)
    assert len(asked) == len(set(asked))
    readers: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        if "linear" in str(node.target):
            name = program.inputs[node_argument(node, 1).name].name
            readers.setdefault(node_argument(node, 0).name, []).append(name)
    shared = [names for names in readers.values() if len(names) > 1]
    for first, *others in shared:
        assert all(torch.equal(watched.moments[first], watched.moments[n]) for n in others)
    linears = [name for name in watched.moments if "embed" not in name]
    assert len(asked) <= len(watched.moments) - sum(len(names) - 1 for names in shared)
    assert len(linears) >= len(readers) - 1


def test_a_tied_embedding_sees_what_enters_the_float_head(
    program, blocks, model, tmp_path, monkeypatch
):
    watched = Watched()
    fill(model, program, blocks, tmp_path, watched, monkeypatch)
    name = "model.embed_tokens.weight"
    assert (name in watched.moments) == model.spec.tied
    if model.spec.tied:
        x = inputs_of(
            program,
            lambda given: model.weights.float_weight(given.name),
            model.weights.float_rows,
            blocks,
            name,
        ).double()
        wanted = x.t() @ x / len(x)
        wanted += wanted.diagonal().mean() * torch.eye(len(wanted))
        torch.testing.assert_close(watched.moments[name], wanted, rtol=1e-4, atol=1e-6)


def test_neither_the_disk_nor_an_interruption_changes_a_bit(
    model, program, blocks, tmp_path, monkeypatch
):
    whole = fill(model, program, blocks, tmp_path / "whole", Watched(), monkeypatch)
    spilled = fill(
        model, program, blocks, tmp_path / "spilled", Watched(), monkeypatch, memory_bound=0
    )
    assert same_bytes(whole, spilled)
    stop = "model.layers.1.mlp.down_proj.weight"
    first = Watched(stop)
    with pytest.raises(KeyboardInterrupt):
        fill(model, program, blocks, tmp_path / "resumed", first, monkeypatch)
    assert not list(tmp_path.glob("resumed/.*/spilled"))
    second = Watched()
    resumed = fill(model, program, blocks, tmp_path / "resumed", second, monkeypatch)
    assert same_bytes(whole, resumed)
    assert stop in second.moments and not first.moments.keys() & second.moments.keys()


def test_an_interrupted_run_goes_on_at_the_layer_where_it_stopped(
    model, program, blocks, tmp_path, monkeypatch
):
    stop = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(KeyboardInterrupt):
        fill(model, program, blocks, tmp_path, Watched(stop), monkeypatch)
    ran = []
    prepare = Walk.prepare
    monkeypatch.setattr(Walk, "prepare", lambda walk, node: ran.append(node) or prepare(walk, node))
    fill(model, program, blocks, tmp_path, Watched(), monkeypatch)
    plan = plan_of(model)
    touched = {
        program.inputs[node.name].name
        for program in [quantize_program(program, plan)]
        for call in ran
        for node in call.all_input_nodes
        if node.op == "placeholder" and node.name in program.inputs
    }
    assert "model.layers.1.mlp.gate_up_proj.weight" in touched
    assert not {name for name in touched if name.startswith("model.layers.0.")}


def test_progress_counts_weights_to_the_last(model, program, blocks, tmp_path, monkeypatch):
    seen = []
    fill(
        model,
        program,
        blocks,
        tmp_path,
        Watched(),
        monkeypatch,
        progress=lambda done, size: seen.append((done, size)),
    )
    assert 0 < seen[0][0] < seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_activations_that_are_not_finite_are_named(model, program, blocks, tmp_path, monkeypatch):
    plan = plan_of(model)
    with (
        pytest.raises(QuantizationError, match=r"inputs of model\.layers\.1\.self_attn\.qk_proj"),
        partial_store(tmp_path, "key", plan, model.weights.shapes()) as partial,
    ):
        fill_rest(model, plan, partial)
        name = "model.layers.1.input_layernorm.weight"
        norm = torch.full((1, model.spec.hidden_size), float("nan"))
        partial.write(name, "value", 0, norm.view(torch.uint8).numpy().reshape(-1).data)
        quantize_sequentially(Filling(model.weights, plan, partial), program, blocks)


def test_an_embedding_that_is_not_the_head_is_refused(model, program, blocks, tmp_path):
    name = "model.embed_tokens.weight"
    if model.spec.tied:
        assert plan_of(model).weights[name].algorithm == "gptq"
        return
    plan = plan_of(model)
    asked = {**plan.weights, name: Assignment(parse_format("int4-g32"), "gptq")}
    plan = QuantPlan("asked", asked)
    with (
        pytest.raises(QuantizationError, match=r"no matrix product reads model\.embed_tokens"),
        partial_store(tmp_path, "key", plan, model.weights.shapes()) as partial,
    ):
        fill_rest(model, plan, partial)
        fmt = parse_format("int4-g32")
        write_rows(partial, name, 0, RTN.quantize_rows(model.weights.float_weight(name), fmt))
        quantize_sequentially(Filling(model.weights, plan, partial), program, blocks)


def test_quantized_in_order_beats_rounding(model, program, blocks, tmp_path, monkeypatch):
    store = fill(model, program, blocks, tmp_path, Watched(), monkeypatch)
    plan = plan_of(model)
    weights = model.weights
    plain = {
        n: a if a.algorithm != "gptq" else Assignment(a.format, "rtn")
        for n, a in plan.weights.items()
    }
    with partial_store(tmp_path, "plain", QuantPlan("p", plain), weights.shapes()) as partial:
        fill_store(weights, QuantPlan("p", plain), partial)
    tokens = [torch.tensor(block) for block in blocks]
    wanted = list(
        ReferenceRunner(program, lambda g: weights.float_weight(g.name), weights.float_rows).logits(
            tokens
        )
    )

    def error(of: WeightStore) -> float:
        runner = ReferenceRunner(quantize_program(program, plan), store_reader(of))
        return sum(
            float((a - b).square().sum())
            for a, b in zip(wanted, runner.logits(tokens), strict=True)
        )

    assert error(store) < 0.8 * error(WeightStore(tmp_path / "plain"))
