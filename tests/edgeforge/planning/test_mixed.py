"""Mixed recipes: what may be chosen, what a budget buys, what is said when it cannot be met."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from edgeforge.calibration.text import Calibration, CalibrationOptions
from edgeforge.errors import UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.model.trace import trace
from edgeforge.pipeline import export
from edgeforge.planning.budget import Budget
from edgeforge.planning.candidates import LAST_RESORTS, allowed_formats
from edgeforge.planning.choose import PlanRequest, choose_plan
from edgeforge.planning.mixed import mix, text_for
from edgeforge.planning.plan_file import write_plan
from edgeforge.synth.synthesise import synthesise
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target
from exporters.target import ModelFacts
from quant.errors import QuantizationError
from quant.plans.plan import FLOAT32, Assignment, QuantPlan, matrix_shape
from quant.plans.recipes import find_recipe


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_model(str(synthesise("tiny-llama", tmp_path_factory.mktemp("model") / "tiny")))


@pytest.fixture(scope="module")
def facts(model):
    spec = model.spec
    return ModelFacts(
        model_type=spec.model_type,
        hidden_size=spec.hidden_size,
        head_dim=spec.head_dim,
        num_heads=tuple(layer.num_heads for layer in spec.layers),
        num_kv_heads=tuple(layer.num_kv_heads for layer in spec.layers),
        bos=spec.bos,
        eos=spec.eos,
        pad=spec.pad,
        context=64,
    )


@pytest.fixture(scope="module")
def calibration(model):
    draw = np.random.default_rng(2)
    blocks = tuple(tuple(draw.integers(0, model.spec.vocab_size, 48).tolist()) for _ in range(2))
    return Calibration("test", 96, 48, 0, "", blocks)


@pytest.fixture(scope="module")
def program(model):
    return trace(model.spec, 64)


@pytest.fixture(scope="module")
def mixed(model, facts, calibration, program):
    """Mixes the model for ExecuTorch and ONNX under a budget."""
    shapes = model.weights.shapes()
    targets = [find_target("onnx"), find_target("executorch")]
    formats = allowed_formats(shapes, facts, targets, TargetOptions())
    fixed = {n: Assignment(FLOAT32, "cast") for n, shape in shapes.items() if len(shape) == 1}

    def mixed(recipe="mixed", **budget):
        return mix(
            model,
            recipe,
            Budget(**budget),
            formats,
            fixed,
            calibration,
            program,
            lambda stage, done, size: None,
        )

    return mixed


def test_only_formats_that_every_target_holds_are_candidates(model, facts):
    shapes = model.weights.shapes()

    def allowed(*targets, **changes):
        given = {**shapes, **changes}
        chosen = [find_target(name) for name in targets]
        found = allowed_formats(given, facts, chosen, TargetOptions(max_memory=1))
        algorithms.append({a.format.name: a.algorithm for each in found.values() for a in each})
        return {name: [a.format.name for a in each] for name, each in found.items()}

    algorithms = []

    both = allowed("onnx", "executorch")
    assert both.keys() == {name for name, shape in shapes.items() if len(shape) == 2}
    assert all(
        names == ["int4-pc", "int4-g128", "int4-g64", "int4-g32", "int8-pc"]
        for names in both.values()
    )
    assert set(algorithms[0].values()) == {"rtn"}
    onnx = set(allowed("onnx")["model.embed_tokens.weight"])
    assert {"int2-g64", "int4-g32-asym", "int8-g32"} <= onnx
    # ONNX holds scales below zero, which are nearer where there are no zero points.
    assert algorithms[1]["int4-g32"] == algorithms[1]["int2-g64"] == "rtn-signed"
    assert algorithms[1]["int4-g32-asym"] == algorithms[1]["int8-pc"] == "rtn"
    # Core ML holds palettes, and no scales below zero.
    assert {"int4-g32-asym", "lut2-gc16", "lut3-gc16", "lut4-gc16", "lut4-pt"} <= set(
        allowed("coreml")["model.embed_tokens.weight"]
    )
    assert algorithms[2]["int4-g32"] == "rtn"
    assert algorithms[2]["lut4-gc16"] == "kmeans"
    # One matrix that is too narrow for a format takes it from nobody else.
    narrow = "model.layers.0.mlp.down_proj.weight"
    found = allowed("onnx", **{narrow: (128, 96)})
    assert found[narrow] == ["int4-pc", "int4-g32", "int4-g32-asym", "int8-pc", "int8-g32"]
    assert "int4-g128" in found["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("bits", [4.2, 4.6, 5.5])
def test_bits_a_weight_are_kept_and_more_of_them_cost_less(model, mixed, bits):
    found, richer = mixed(bits_per_weight=bits), mixed(bits_per_weight=bits + 0.2)
    shapes = model.weights.shapes()
    assert found.plan.bits_per_weight(shapes) <= bits
    assert richer.expected_kl <= found.expected_kl
    # Errors of different weights are nearly independent.
    assert found.found_kl == pytest.approx(found.expected_kl, rel=0.5)
    found.plan.check(shapes)


def test_two_bits_are_taken_only_where_nothing_else_is_small_enough(
    model, facts, calibration, program
):
    shapes = model.weights.shapes()
    formats = allowed_formats(shapes, facts, [find_target("onnx")], TargetOptions())
    fixed = {n: Assignment(FLOAT32, "cast") for n, shape in shapes.items() if len(shape) == 1}

    def taken(bits):
        budget = Budget(bits_per_weight=bits)
        told = lambda stage, done, size: None  # noqa: E731
        plan = mix(model, "mixed", budget, formats, fixed, calibration, program, told).plan
        assert plan.bits_per_weight(shapes) <= bits
        return {assignment.format.name for assignment in plan.weights.values()}

    assert not taken(4.3) & set(LAST_RESORTS)
    assert "int2-g64" in taken(3.5)


def test_a_size_is_of_all_stored_weights(model, mixed):
    shapes = model.weights.shapes()
    plan = mixed(max_size=200_000).plan
    stored = sum(a.format.nbytes(*matrix_shape(shapes[n])) for n, a in plan.weights.items())
    assert 0.97 * 200_000 < stored <= 200_000


def test_a_divergence_is_kept_by_the_whole_plan(model, mixed):
    least = mixed(bits_per_weight=9)
    limit = 20 * least.found_kl
    found = mixed(max_kl=limit)
    assert found.found_kl <= limit
    shapes = model.weights.shapes()
    assert found.plan.bits_per_weight(shapes) < least.plan.bits_per_weight(shapes)


def test_the_smallest_possible_is_said_and_is_possible(mixed):
    with pytest.raises(QuantizationError, match="--bits-per-weight 3 cannot be met") as refused:
        mixed(bits_per_weight=3)
    least = float(str(refused.value).partition("possible is ")[2].split()[0])
    assert mixed(bits_per_weight=least + 1e-4).plan
    with pytest.raises(QuantizationError, match="--max-size 1000 cannot be met") as refused:
        mixed(max_size=1000)
    least = int(str(refused.value).partition("possible is ")[2].split()[0].replace(",", ""))
    assert mixed(max_size=least).plan
    with pytest.raises(QuantizationError, match=r"--max-kl 1e-12 cannot be met.*is the least"):
        mixed(max_kl=1e-12)


@pytest.mark.parametrize(
    ("recipe", "budget", "words"),
    [
        ("mixed", {}, ["one budget", "none", "--max-kl"]),
        ("mixed", {"max_kl": 0.1, "max_size": 5}, ["--max-size and --max-kl"]),
        ("mixed", {"bits_per_weight": 0.0}, ["--bits-per-weight 0", "above zero"]),
        ("mixed-gptq", {"max_kl": math.inf}, ["--max-kl inf"]),
        ("int4", {"max_size": 5}, ["--max-size", "int4 has fixed formats", "--recipe mixed"]),
        (None, {"max_kl": 0.1}, ["--max-kl", "int4-gptq has fixed formats"]),
    ],
)
def test_a_budget_goes_with_a_mixed_recipe(model, recipe, budget, words):
    request = PlanRequest(recipe, budget=Budget(**budget))
    with pytest.raises(UsageError) as refused:
        choose_plan(model, request)
    assert all(word in str(refused.value) for word in words), refused.value


def widened(tmp_path, width: int):
    """The model with a feed-forward part of another width."""
    folder = synthesise("tiny-llama", tmp_path / f"wide{width}")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[:1].repeat(width, 1)
        elif "down_proj" in name:
            tensors[name] = tensor[:, :1].repeat(1, width)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": width}))
    return open_model(str(folder))


@pytest.mark.parametrize("budget", [{"bits_per_weight": 12.0}, {"max_kl": 0.5}])
def test_a_matrix_that_no_format_fits_stays_in_float16(facts, tmp_path, budget):
    request = PlanRequest(
        "mixed",
        targets=[find_target("onnx"), find_target("executorch")],
        facts=facts,
        calibration=CalibrationOptions(tokens=64, length=32),
        budget=Budget(**budget),
    )
    planned = choose_plan(widened(tmp_path, 172), request)
    formats = {name: given.format.name for name, given in planned.plan.weights.items()}
    downs = [name for name in formats if "down_proj" in name]
    assert {formats[name] for name in downs} == {"fp16"}
    assert all(
        f not in ("fp16", "fp32") for n, f in formats.items() if "_proj" in n and n not in downs
    )
    (note,) = [note for note in planned.warnings if "stay" in note]
    assert note.startswith("2 matrices stay in float16") and "has 172 input columns" in note


def test_a_model_that_a_target_refuses_is_refused_before_formats_are_measured(model, facts):
    with pytest.raises(ExportError, match="a head width that is a multiple of 8"):
        allowed_formats(
            model.weights.shapes(),
            replace(facts, head_dim=12),
            [find_target("onnx")],
            TargetOptions(),
        )


def test_a_calibrated_algorithm_fills_what_has_inputs(mixed):
    plain, calibrated = mixed(bits_per_weight=4.6), mixed("mixed-gptq", bits_per_weight=4.6)
    for name, assignment in calibrated.plan.weights.items():
        assert assignment.format == plain.plan.weights[name].format
        # The embedding is the head too.
        has_inputs = "_proj" in name or name == "model.embed_tokens.weight"
        signed = plain.plan.weights[name].algorithm == "rtn-signed"
        wanted = "gptq-descent-signed" if signed else "gptq-descent"
        assert (assignment.algorithm == wanted) == has_inputs


def test_the_saved_plan_gives_the_same_plan_again(model, mixed, tmp_path):
    shapes, roles = model.weights.shapes(), model.weights.roles()
    for recipe in ("mixed", "mixed-gptq"):
        plan = mixed(recipe, bits_per_weight=4.6).plan
        file = tmp_path / f"{recipe}.yaml"
        write_plan(plan, shapes, ["made by hand"], file)
        again = find_recipe(str(file)).plan(shapes, roles)
        assert again.weights == plan.weights
        assert again.fingerprint() == plan.fingerprint()
        assert file.read_text().startswith("# made by hand\n")
    # Imported weights are the checkpoint's: a rule for the rest must not mind them.
    file = tmp_path / "imported.yaml"
    kept = {n: Assignment(a.format, "imported") for n, a in plan.weights.items()}
    write_plan(QuantPlan("x", {**plan.weights, **kept}), shapes, [], file)
    assert find_recipe(str(file)).plan(shapes, roles)


def test_a_saved_plan_says_what_happens_to_activations(model, tmp_path):
    shapes, roles = model.weights.shapes(), model.weights.roles()
    for recipe in ("w8a8", "w8a8-static"):
        plan, file = find_recipe(recipe).plan(shapes, roles), tmp_path / f"{recipe}.yaml"
        write_plan(plan, shapes, [], file)
        assert find_recipe(str(file)).plan(shapes, roles).weights == plan.weights


def test_a_plan_is_saved_as_yaml_alone(model, tmp_path):
    request = PlanRequest("int8", save_plan=tmp_path / "plan.json")
    with pytest.raises(UsageError, match=r"ends in \.yaml"):
        choose_plan(model, request)


def test_a_model_without_a_tokenizer_is_measured_on_random_tokens(tmp_path):
    folder = synthesise("tiny-llama", tmp_path / "tiny")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    found = text_for(open_model(str(folder)), CalibrationOptions(tokens=512, length=128), 64)
    assert "random tokens" in found.source
    assert [len(block) for block in found.blocks] == [64] * 8
    assert found.blocks == text_for(open_model(str(folder)), CalibrationOptions(), 64).blocks[:8]


def test_an_export_says_how_its_formats_were_chosen(model, tmp_path):
    text = tmp_path / "text.txt"
    draw = np.random.default_rng(4)
    text.write_text(" ".join(str(number) for number in draw.integers(0, 999, 400)))
    out, file = tmp_path / "out", tmp_path / "plan.yaml"
    options = ExportOptions(
        "mixed",
        context=64,
        calibration=CalibrationOptions(str(text), tokens=192),
        budget=Budget(bits_per_weight=4.7),
        save_plan=file,
    )
    export(model, [find_target("onnx")], out, options)
    manifest = Manifest.read(out)
    assert manifest.recipe == "mixed"
    assert manifest.bits_per_weight <= 4.7
    assert any("no choice of formats is better" in note for note in manifest.notes)
    assert any("text.txt" in note for note in manifest.notes)
    again = tmp_path / "again"
    export(model, [find_target("onnx")], again, ExportOptions(str(file), context=64))
    weights = json.loads((out / "edgeforge.json").read_text())["weights"]
    assert json.loads((again / "edgeforge.json").read_text())["weights"] == weights
