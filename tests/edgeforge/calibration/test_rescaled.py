"""Rescaled weights: the folds are found in every family's graph and leave the model as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgeforge.calibration.filling import Filling
from edgeforge.calibration.rescaled import quantize_rescaled
from edgeforge.model.model import Model, open_model
from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner, store_reader
from edgeforge.synth.synthesise import synthesise
from quant.plans.plan import QuantPlan
from quant.plans.rules import Recipe, Rule
from quant.program.program import Program
from quant.program.rescale_places import foldable
from quant.program.rewrite import quantize_program
from quant.quantizers import registry
from quant.quantizers.awq import Awq
from quant.store.fill import fill_store
from quant.store.partial import partial_store
from quant.store.store import WeightStore

CONTEXT = 16


class Wild(Awq):
    """AWQ with factors that no search would choose, so that a wrong fold cannot hide."""

    def column_factors(self, weight, inputs, fmt, ties):
        draw = torch.Generator().manual_seed(len(ties))
        return torch.exp(0.4 * torch.randn(int(ties.max()) + 1, generator=draw))[ties]


@pytest.fixture(scope="module", params=["tiny-openelm", "tiny-llama", "tiny-phi-3"])
def model(request, tmp_path_factory) -> Model:
    return open_model(str(synthesise(request.param, tmp_path_factory.mktemp("synth") / "m")))


@pytest.fixture(scope="module")
def program(model) -> Program:
    return trace(model.spec, CONTEXT)


def fill(model: Model, program: Program, format: str, cache: Path) -> tuple[QuantPlan, WeightStore]:
    weights = model.weights
    plan = Recipe("mine", "", (Rule("*", format, "awq"),)).plan(weights.shapes(), weights.roles())
    blocks = np.random.default_rng(1).integers(0, model.spec.vocab_size, (4, CONTEXT)).tolist()
    with partial_store(cache, "key", plan, weights.shapes()) as partial:
        rest = {n: a for n, a in plan.weights.items() if a.algorithm != "awq"}
        fill_store(weights, QuantPlan("rest", rest), partial)
        quantize_rescaled(Filling(weights, plan, partial), program, blocks)
    return plan, WeightStore(cache / "key")


def logits(model: Model, program: Program, plan: QuantPlan | None, store: WeightStore | None):
    block = np.random.default_rng(2).integers(0, model.spec.vocab_size, CONTEXT)
    if plan is None or store is None:
        runner = ReferenceRunner(
            program, lambda g: model.weights.float_weight(g.name), model.weights.float_rows
        )
    else:
        runner = ReferenceRunner(quantize_program(program, plan), store_reader(store))
    return next(iter(runner.logits([torch.from_numpy(block)])))


def test_every_linear_of_a_layer_has_its_place(model, program):
    folds = foldable(program)
    for index, layer in enumerate(model.spec.layers):
        at = f"model.layers.{index}."
        qk, v = at + "self_attn.qk_proj.weight", at + "self_attn.v_proj.weight"
        gate_up = at + "mlp.gate_up_proj.weight"
        for reader in (qk, v):
            fold = folds[reader]
            assert fold.is_norm and fold.weight == at + "input_layernorm.weight"
            assert fold.sharers == (qk, v)
        assert folds[gate_up].weight == at + "post_attention_layernorm.weight"
        values = folds[at + "self_attn.o_proj.weight"]
        width = model.spec.head_dim
        assert values.weight == v and not values.is_norm
        assert values.rows.min() == 0
        assert values.rows.max() == layer.num_kv_heads * width - 1
        repeats = torch.bincount(values.rows)
        assert (repeats == layer.num_heads // layer.num_kv_heads).all()
        up = folds[at + "mlp.down_proj.weight"]
        assert up.weight == gate_up
        assert up.rows.tolist() == list(range(layer.ffn_width, 2 * layer.ffn_width))
    assert ("lm_head.weight" in folds) == (not model.spec.tied)
    assert "model.embed_tokens.weight" not in folds


def test_rescaling_leaves_the_model_as_it_was(model, program, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.RESCALING, "awq", Wild())
    plan, store = fill(model, program, "int8-g32", tmp_path)
    wanted, found = logits(model, program, None, None), logits(model, program, plan, store)
    assert (wanted - found).norm() < 0.08 * wanted.norm()
    norm = "model.layers.0.input_layernorm.weight"
    stored = store.part(norm, "value")[0].float()
    assert not torch.allclose(stored, model.weights.float_weight(norm), rtol=0.1)


def test_the_search_is_not_worse_than_rounding(model, program, tmp_path):
    plan, store = fill(model, program, "int4-g32", tmp_path / "awq")
    weights = model.weights
    plain = Recipe("p", "", (Rule("*", "int4-g32"),)).plan(weights.shapes(), weights.roles())
    with partial_store(tmp_path / "rtn", "key", plain, weights.shapes()) as partial:
        fill_store(weights, plain, partial)
    wanted = logits(model, program, None, None)
    errors = [
        float((logits(model, program, p, s) - wanted).square().sum())
        for p, s in ((plan, store), (plain, WeightStore(tmp_path / "rtn" / "key")))
    ]
    assert errors[0] < errors[1]
