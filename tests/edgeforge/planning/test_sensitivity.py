"""Costs of formats, weight by weight, against the model run anew with that weight replaced."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import edgeforge.planning.sensitivity as module
from edgeforge.errors import CheckpointError
from edgeforge.model.model import open_model
from edgeforge.model.trace import trace
from edgeforge.planning.sensitivity import Sensitivity, plan_divergence, sensitivity
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.metrics import DivergenceMeter
from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.plans.plan import Assignment
from quant.quantizers.rtn import RTN

FORMATS = ("int4-pc", "int4-g32", "int4-g32-asym", "int8-pc")


def assign(name):
    return Assignment(parse_format(name), "rtn")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_model(str(synthesise("tiny-llama", tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture(scope="module")
def program(model):
    return trace(model.spec, 64)


@pytest.fixture(scope="module")
def blocks(model):
    draw = np.random.default_rng(11)
    return [draw.integers(0, model.spec.vocab_size, n).tolist() for n in (64, 40)]


@pytest.fixture(scope="module")
def candidates(model):
    return {
        name: [assign(format) for format in FORMATS]
        for name, shape in model.weights.shapes().items()
        if len(shape) == 2
    }


@pytest.fixture(scope="module")
def measured(model, program, candidates, blocks, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    found = sensitivity(model.weights, program, candidates, blocks, "digest", cache)
    return found, cache


def dequantized(weight, format):
    """Codes, scales and zero points as the format defines them, in NumPy."""
    fmt = parse_format(format)
    made = RTN.quantize_rows(weight, fmt)
    rows, columns = weight.shape
    codes = made.codes.numpy()
    if fmt.bits == 4:
        codes = np.stack((codes & 15, codes >> 4), -1).reshape(rows, -1)
    scale = made.scale.float().numpy()
    groups = scale.shape[1]
    zero = np.full((rows, groups), fmt.implicit_zero_point, np.uint8)
    if made.zero_point is not None:
        packed = made.zero_point.numpy()
        zero = np.stack((packed & 15, packed >> 4), -1).reshape(rows, -1)[:, :groups]
    steps = codes.reshape(rows, groups, -1).astype(np.float32) - zero[..., None].astype(np.float32)
    return torch.from_numpy((steps * scale[..., None]).reshape(rows, columns))


def divergence(model, program, blocks, replaced):
    """Mean KL of the whole program with some weights replaced."""

    def logits(weights):
        runner = ReferenceRunner(
            program,
            lambda given: weights.get(given.name, model.weights.float_weight(given.name)),
        )
        return list(runner.logits([torch.tensor(block) for block in blocks]))

    meter = DivergenceMeter()
    for wanted, found in zip(logits({}), logits(replaced), strict=True):
        meter.add(wanted, found)
    return meter.result().kl_mean


def test_every_candidate_has_a_cost(measured, candidates, blocks):
    found, _ = measured
    assert found.method == "measured"
    assert found.tokens == sum(map(len, blocks))
    assert found.costs.keys() == candidates.keys()
    assert all(costs.keys() == set(FORMATS) for costs in found.costs.values())


# The embedding is the head too: its cost is that of both uses.
@pytest.mark.parametrize(
    "weight",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.qk_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
@pytest.mark.parametrize("format", ["int4-g32-asym", "int8-pc"])
def test_a_cost_is_the_divergence_with_that_weight_alone(
    model, program, blocks, measured, weight, format
):
    found, _ = measured
    replaced = {weight: dequantized(model.weights.float_weight(weight), format)}
    wanted = divergence(model, program, blocks, replaced)
    assert found.costs[weight][format] == pytest.approx(wanted, rel=1e-2, abs=1e-7)


def test_estimates_are_near_what_is_measured(
    model, program, candidates, blocks, measured, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "MEASURED_PARAMETERS", 0)
    found = sensitivity(model.weights, program, candidates, blocks, "digest", tmp_path)
    assert found.method == "estimated"
    for weight, costs in measured[0].costs.items():
        for format, cost in costs.items():
            assert found.costs[weight][format] == pytest.approx(cost, rel=0.5, abs=2e-6)


def test_a_whole_plan_is_measured_at_once(model, program, blocks, candidates):
    chosen = {name: assign("int4-g32") for name in candidates}
    replaced = {
        name: dequantized(model.weights.float_weight(name), "int4-g32") for name in candidates
    }
    found = plan_divergence(model.weights, program, chosen, blocks)
    assert found == pytest.approx(divergence(model, program, blocks, replaced), rel=1e-3)


def test_costs_are_found_again_and_only_for_the_same_question(
    model, program, candidates, blocks, measured, monkeypatch
):
    found, cache = measured

    class Measured(Exception):
        pass

    def forks(*arguments):
        raise Measured

    monkeypatch.setattr(module, "_Forks", forks)

    def ask(given=candidates, text=blocks, source="digest"):
        return sensitivity(model.weights, program, given, text, source, cache)

    assert ask() == found
    for changed in (
        {"text": blocks[:1]},
        {"source": "another"},
        {"given": {name: given[:2] for name, given in candidates.items()}},
    ):
        with pytest.raises(Measured):
            ask(**changed)


def test_costs_of_a_checkpoint_that_changed_are_not_kept(program, candidates, blocks, tmp_path):
    folder = synthesise("tiny-llama", tmp_path / "tiny")
    opened = open_model(str(folder))
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=r"config\.json changed while it was read"):
        few = dict(list(candidates.items())[:1])
        sensitivity(opened.weights, program, few, blocks, "digest", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_cache_is_measured_again(model, program, blocks, candidates, measured, tmp_path):
    name = "model.layers.1.self_attn.o_proj.weight"
    given = {name: candidates[name][:1]}

    def ask():
        return sensitivity(model.weights, program, given, blocks, "digest", tmp_path)

    first = ask()
    assert isinstance(first, Sensitivity)
    (file,) = tmp_path.iterdir()
    file.write_text("{")
    assert ask() == first
    # A cost in which one digit is another one is not believed either.
    whole = file.read_text()
    (cost,) = first.costs[name].values()
    assert str(cost) in whole
    file.write_text(whole.replace(str(cost), "0.25"))
    assert ask() == first
    assert file.read_text() == whole


def test_a_format_with_which_logits_are_not_finite_costs_more_than_any_other(
    model, program, blocks, candidates, monkeypatch, tmp_path
):
    name = "model.layers.1.self_attn.o_proj.weight"
    real = module.stored_values

    def stored(weight, assignment, name):
        values = real(weight, assignment, name)
        return values * float("nan") if assignment.format.name == "int8-pc" else values

    monkeypatch.setattr(module, "stored_values", stored)
    given = {name: candidates[name]}
    found = sensitivity(model.weights, program, given, blocks, "digest", tmp_path)
    costs = found.costs[name]
    assert costs["int8-pc"] == module.UNUSABLE
    assert max(costs[format] for format in FORMATS[:3]) < 1
    bad = {name: assign("int8-pc")}
    assert plan_divergence(model.weights, program, bad, blocks) == module.UNUSABLE


def test_a_model_whose_own_logits_are_not_finite_is_refused(program, blocks, tmp_path):
    """Values that leave float32's range in the second layer."""
    folder = synthesise("tiny-llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e25
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e20
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    weights = open_model(str(folder)).weights
    with pytest.raises(QuantizationError, match="FLOAT gives NaN or infinite logits on the calib"):
        sensitivity(weights, program, {}, blocks, "digest", tmp_path)
