"""Calibration of all that a spec can say: folds with biases and shifts, own texts, ranges, GPTQ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgeforge.calibration.cache_ranges import cache_ranges
from edgeforge.calibration.filling import Filling
from edgeforge.calibration.own_text import decoder
from edgeforge.calibration.rescaled import quantize_rescaled
from edgeforge.calibration.sequential import quantize_sequentially
from edgeforge.reference.walk import ReferenceRunner, store_reader
from quant.plans.int4 import INT4
from quant.plans.plan import QuantPlan
from quant.plans.rules import Recipe, Rule
from quant.program.rescale_places import foldable
from quant.program.rewrite import quantize_program
from quant.quantizers import registry
from quant.quantizers.awq import Awq
from quant.store.fill import fill_store
from quant.store.partial import partial_store
from quant.store.store import WeightStore
from tests.oracles.vocabulary import (
    HIDDEN,
    LAYERS,
    MIXTURES,
    RECURRENT,
    SPECS,
    VOCAB,
    small_spec,
)
from tests.oracles.vocabulary_models import TOKENS, logits_of, program_of, small_model

BLOCKS = torch.randint(VOCAB, (4, 24), generator=torch.Generator().manual_seed(3)).tolist()
# Without a bound on the values, so that there is a place before the output projection.
UNBOUNDED = replace(SPECS["everything"], clip_qkv=0.0)
SHIFTED = small_spec(biased=True, shifted=True, tied=False, norm="layer", block="parallel")


class Wild(Awq):
    """AWQ with factors that no search would choose, so that a wrong fold cannot hide."""

    def column_factors(self, weight, inputs, fmt, ties):
        draw = torch.Generator().manual_seed(len(ties))
        return torch.exp(0.4 * torch.randn(int(ties.max()) + 1, generator=draw))[ties]


def filled(model, program, recipe, folder):
    """A plan, and a store that calibration filled by it."""
    weights = model.weights
    plan = recipe.plan(weights.shapes(), weights.roles())
    with partial_store(folder, "key", plan, weights.shapes()) as partial:
        filling = Filling(weights, plan, partial, threads=1)
        apart = {n: a for n, a in plan.weights.items() if n not in filling.wanted()}
        fill_store(weights, QuantPlan("apart", apart), partial)
        quantize_rescaled(filling, program, BLOCKS)
        quantize_sequentially(filling, program, BLOCKS)
    return plan, WeightStore(folder / "key")


def stored_logits(program, plan, store):
    runner = ReferenceRunner(quantize_program(program, plan), store_reader(store))
    return next(iter(runner.logits([TOKENS])))


def test_every_place_is_found_with_what_is_divided_together(tmp_path):
    folds = foldable(program_of(UNBOUNDED))
    values = folds["model.layers.0.self_attn.o_proj.weight"]
    assert values.added == "model.layers.0.self_attn.v_proj.bias"
    up = folds["model.layers.3.mlp.down_proj.weight"]
    assert up.added == "model.layers.3.mlp.gate_up_proj.bias" and int(up.rows[0]) == 48
    gate = folds["model.layers.3.conv.out_proj.weight"]
    assert gate.weight == "model.layers.3.conv.in_proj.weight"
    assert gate.rows.tolist() == list(range(HIDDEN, 2 * HIDDEN))
    assert folds["model.layers.3.conv.in_proj.weight"].is_norm
    shifted = folds_of_a_layer(SHIFTED)
    assert shifted["mlp.gate_up_proj"].added == "model.layers.0.input_layernorm.bias"
    assert shifted["mlp.gate_up_proj"].sharers == shifted["self_attn.v_proj"].sharers
    assert "self_attn.o_proj" not in folds_of_a_layer(SPECS["everything"])  # values are bounded
    assert "mlp.down_proj" not in folds_of_a_layer(SPECS["parallel"])  # GELU alone lies between
    # A norm without a scale has nothing to divide, and a norm on a branch no linear to read it.
    assert folds_of_a_layer(SPECS["unscaled"]).keys() == {"mlp.down_proj"}
    assert "self_attn.qk_proj" not in folds_of_a_layer(SPECS["post"])


def folds_of_a_layer(spec):
    at = "model.layers.0."
    folds = foldable(program_of(spec))
    return {
        name.removeprefix(at).removesuffix(".weight"): fold
        for name, fold in folds.items()
        if name.startswith(at)
    }


@pytest.mark.parametrize(
    "spec",
    [
        *(UNBOUNDED, SHIFTED, MIXTURES["normalized"], MIXTURES["heads-and-mixture"]),
        RECURRENT["mamba"],
    ],
    ids=["biases", "shifts", "experts", "experts of attention", "mamba"],
)
def test_rescaling_leaves_the_model_as_it_was(spec, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.RESCALING, "awq", Wild())
    model, program = small_model(spec, tmp_path / "m"), program_of(spec)
    recipe = Recipe("mine", "", (Rule("*", "int8-pc", "awq"),))
    plan, store = filled(model, program, recipe, tmp_path)
    wanted, found = logits_of(model, program), stored_logits(program, plan, store)
    error, size = ((wanted - found).norm(dim=-1), wanted.norm(dim=-1))
    if spec.mixture:  # a token between two experts may choose the other one, and differs much
        assert (error / size).median() < 0.08
    else:
        assert error.norm() < 0.08 * size.norm()
    for name, fold in foldable(program).items():
        if fold.added is not None:
            stored = store.part(fold.added, "value")[0].float()
            assert not torch.allclose(stored, model.weights.float_weight(fold.added), rtol=0.1)
            assert plan.weights[name].algorithm == "awq"
        for gate in (n for n in fold.sharers if spec.weights[n].role == "gate"):
            stored = store.part(gate, "value").float().reshape(spec.weights[gate].shape)
            assert not torch.allclose(stored, model.weights.float_weight(gate), rtol=0.1)


@pytest.mark.parametrize("name", ["everything", "sandwich", "post", "unscaled", "mamba"])
def test_gptq_is_not_worse_than_rounding(name, tmp_path):
    spec = {**SPECS, **RECURRENT}[name]
    model, program = small_model(spec, tmp_path / "m"), program_of(spec)
    wanted, errors = logits_of(model, program), []
    for algorithm in ("gptq", "rtn"):
        recipe = Recipe("mine", "", (Rule("*", "int4-g16", algorithm),))
        plan, store = filled(model, program, recipe, tmp_path / algorithm)
        errors.append(float((stored_logits(program, plan, store) - wanted).square().sum()))
    assert errors[0] < 1.1 * errors[1]


@pytest.mark.parametrize(
    "name",
    [
        *("everything", "parallel", "convolutions", "queries-own", "normalized"),
        *("heads-and-mixture", *RECURRENT),
    ],
)
def test_one_token_at_a_time_gives_the_logits_of_whole_sequences(name, tmp_path):
    spec = {**SPECS, **MIXTURES, **RECURRENT}[name]
    model, program = small_model(spec, tmp_path / "m"), program_of(spec)
    tokens = torch.stack([TOKENS[:12], TOKENS[12:24]])
    step = decoder(model.weights.float_walk(program), 2, 12)
    found = torch.stack([step(tokens[:, at], at) for at in range(12)], 1)
    runner = ReferenceRunner(program, lambda given: model.weights.float_weight(given.name))
    wanted = torch.stack(list(runner.logits(list(tokens))))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_only_layers_with_caches_have_ranges(tmp_path):
    for name in ("everything", "convolutions", "heads-and-mixture", "mamba"):
        spec = {**SPECS, **MIXTURES, **RECURRENT}[name]
        model, program = small_model(spec, tmp_path / name), program_of(spec)
        recipe = Recipe("mine", "", (Rule("*", "fp32"),))
        plan, store = filled(model, program, recipe, tmp_path / f"{name}-store")
        told = []
        found = cache_ranges(
            quantize_program(program, plan),
            store,
            BLOCKS,
            tmp_path / "ranges",
            lambda done, size, told=told: told.append((done, size)),
        )
        layers = [i for i, layer in enumerate(spec.layers) if layer.num_heads]
        assert found.keys() == {
            f"model.layers.{i}.self_attn.{part}_cache" for i in layers for part in "kv"
        }
        assert told[-1] == (len(layers), len(layers))


def test_vectors_and_convolutions_have_no_formats():
    spec = small_spec(LAYERS, biased=True)
    shapes = {name: weight.shape for name, weight in spec.weights.items()}
    roles = {name: weight.role for name, weight in spec.weights.items()}
    plan = INT4.plan(shapes, roles)
    kept = {name for name, role in roles.items() if role in ("norm", "bias", "conv")}
    assert {n for n, a in plan.weights.items() if a.format.name == "fp32"} == kept
    rules = {rule.match for rule in INT4.rules_for(shapes, roles)}
    assert not rules & kept
