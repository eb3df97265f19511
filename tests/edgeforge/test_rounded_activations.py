"""Recipes that round activations, on a random model with an outlying channel in every layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeforge.calibration.fill import fill_calibrated
from edgeforge.calibration.text import Calibration, CalibrationRun
from edgeforge.model.model import Model, open_model
from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner, store_reader
from edgeforge.synth.synthesise import synthesise
from quant.plans.rules import Recipe, Rule
from quant.program.program import Program
from quant.program.rescale_places import foldable
from quant.program.rewrite import quantize_program
from quant.store.partial import partial_store
from quant.store.store import WeightStore

CONTEXT = 32
CHANNEL, TIMES = 5, 100.0


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    """Norms whose scale makes one column of activations a hundred times what it was."""
    folder = synthesise("tiny-llama", tmp_path_factory.mktemp("synth") / "m")
    (file,) = Path(folder).glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "layernorm" in name:
            tensor[CHANNEL] *= TIMES
    save_file(tensors, file, metadata={"format": "pt"})
    return open_model(str(folder))


@pytest.fixture(scope="module")
def program(model) -> Program:
    return trace(model.spec, CONTEXT)


def blocks(model: Model, seed: int, count: int) -> tuple[tuple[int, ...], ...]:
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, model.spec.vocab_size, (count, CONTEXT))
    return tuple(tuple(row) for row in rows.tolist())


def logits(runner: ReferenceRunner, model: Model) -> torch.Tensor:
    tokens = [torch.tensor(block) for block in blocks(model, 9, 2)]
    return torch.cat(list(runner.logits(tokens)))


@pytest.fixture(scope="module")
def wanted(model, program) -> torch.Tensor:
    weights = model.weights
    return logits(
        ReferenceRunner(program, lambda g: weights.float_weight(g.name), weights.float_rows), model
    )


@pytest.fixture(scope="module")
def fill(model, program, tmp_path_factory):
    """The store that linears by an algorithm, their inputs rounded, and floats make."""
    made: dict[tuple[str, str], tuple[WeightStore, ReferenceRunner]] = {}

    def fill(algorithm: str, activation: str) -> tuple[WeightStore, ReferenceRunner]:
        key = algorithm, activation
        if key not in made:
            weights = model.weights
            rules = (
                Rule("head", "fp32"),
                Rule("embedding", "fp32"),
                Rule("*", "int8-pc", algorithm, activation=activation),
            )
            plan = Recipe("mine", "", rules).plan(weights.shapes(), weights.roles())
            plan.check(weights.shapes())
            text = Calibration("random", 8 * CONTEXT, CONTEXT, 0, "", blocks(model, 1, 8))
            run = CalibrationRun(model, text, lambda: program)
            cache = tmp_path_factory.mktemp("store")
            with partial_store(cache, "key", plan, weights.shapes()) as partial:
                fill_calibrated(run, plan, partial, 1, lambda stage, done, size: None)
            store = WeightStore(cache / "key")
            runner = ReferenceRunner(quantize_program(program, plan), store_reader(store))
            made[key] = store, runner
        return made[key]

    return fill


@pytest.mark.parametrize("activation", ["int8-token", "int8-tensor"])
@pytest.mark.parametrize("algorithm", ["smoothquant", "smoothquant-search"])
def test_smoothing_cuts_the_error_of_outliers(model, fill, wanted, activation, algorithm):
    def error(algorithm: str, activation: str) -> float:
        found = logits(fill(algorithm, activation)[1], model)
        return float((found - wanted).norm() / wanted.norm())

    plain, smoothed = error("rtn", activation), error(algorithm, activation)
    assert smoothed < (0.5 if activation == "int8-token" else 0.75) * plain
    # And what is left is mostly the activations', for weights alone cost less.
    assert error("rtn", "none") < plain


def test_static_scales_are_those_of_least_error(model, program, fill):
    """Held against the float model's own first norm, and every scale that clips less or more."""
    store, _ = fill("smoothquant", "int8-tensor")
    plain, _ = fill("rtn", "int8-tensor")
    at = "model.layers.0.self_attn.qk_proj.weight"
    norm = "model.layers.0.input_layernorm.weight"
    tokens = torch.tensor(blocks(model, 1, 8))
    x = model.weights.float_weight("model.embed_tokens.weight")[tokens]
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + model.spec.norm_eps)
    for made in (store, plain):
        entering = x * made.part(norm, "value")[0].float()
        scale, largest = float(made.part(at, "input_scale")), float(entering.abs().max()) / 127
        costs = {
            step: float((entering - (entering / step).round().clamp(-128, 127) * step).norm())
            for step in (scale, *(largest * share / 20 for share in range(4, 21)))
        }
        assert costs[scale] < 1.03 * min(costs.values())
    assert float(store.part(at, "input_scale")) < 0.2 * float(plain.part(at, "input_scale"))
    assert foldable(program)[at].weight == norm
    assert store.digests[at] != plain.digests[at]


def test_dynamic_plans_store_no_scale(fill):
    store, _ = fill("smoothquant", "int8-token")
    assert all("input_scale" not in store.extents(name) for name in store.names())
