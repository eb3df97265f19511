"""`diagnose` on real artifacts: a fault is placed at its layer, a dear matrix is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeforge.diagnosis.diagnose import DiagnoseOptions, advice, diagnose
from edgeforge.diagnosis.points import Point
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from exporters.manifest import MANIFEST
from exporters.registry import find_target

TARGETS = ("onnx", "coreml", "executorch")
FAULTY = 0
OPTIONS = DiagnoseOptions(tokens=60, weights=False, threads=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosis")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(folder / "cache"))
        yield folder


def artifacts(checkpoint: Path, out: Path, recipe: str = "int8") -> None:
    targets = [find_target(name) for name in TARGETS]
    export(open_model(str(checkpoint)), targets, out, ExportOptions(recipe, context=64))


@pytest.fixture(scope="module")
def sound(place):
    """A checkpoint's artifacts."""
    checkpoint = synthesise("tiny-llama", place / "model")
    artifacts(checkpoint, place / "sound")
    return place / "sound"


@pytest.fixture(scope="module")
def faulty(sound, place):
    """The same, of which one layer's down_proj has the wrong sign."""
    name = f"model.layers.{FAULTY}.mlp.down_proj.weight"
    return with_wrong_sign(place / "model", name, sound, place / "faulty")


def with_wrong_sign(
    checkpoint: Path, name: str, sound: Path, out: Path, recipe: str = "int8"
) -> Path:
    """Artifacts of a checkpoint with a tensor of the wrong sign, with the manifests of sound ones.

    Args:
        checkpoint: the sound checkpoint.
        name: the tensor.
        sound: its artifacts.
        out: where the faulty ones are written.
        recipe: of both.
    """
    other = out.parent / f"{out.name}-model"
    shutil.copytree(checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    tensors[name] = -tensors[name]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    artifacts(other, out, recipe)
    for target in TARGETS:
        shutil.copyfile(sound / target / MANIFEST, out / target / MANIFEST)
    return out


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_artifact_leaves_quantized_nowhere(sound, target):
    found = diagnose(sound / target, OPTIONS)
    assert found.leaves is None and advice(found) == []
    shown = [each for each in found.noise if each.lowering is not None]
    # ExecuTorch's last delegate computes the last layer and the logits at once.
    assert len(found.noise) - len(shown) == (target == "executorch")
    assert all(each.lowering < 1e-3 for each in shown)
    assert bool(found.unshown) == (target == "executorch")


@pytest.mark.parametrize("target", TARGETS)
def test_the_first_wrong_layer_is_named(faulty, target):
    found = diagnose(faulty / target, OPTIONS)
    assert found.leaves == Point(FAULTY, "layer")
    assert f"leaves QUANTIZED at layer {FAULTY}:" in advice(found)[0]


def test_the_matrix_that_costs_most_is_named_with_what_more_bits_save(place, sound, tmp_path):
    plan = json.loads((sound / "onnx" / MANIFEST).read_text())["weights"]
    dear = "model.layers.1.mlp.gate_up_proj.weight"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"- {{match: {dear}, format: int4-pc}}\n- {{match: '*', format: int8-pc}}\n",
        encoding="utf-8",
    )
    out = place / "dear"
    export(
        open_model(str(place / "model")),
        [find_target("onnx")],
        out,
        ExportOptions(str(recipe), context=64),
    )
    found = diagnose(out, DiagnoseOptions(tokens=60, threads=1))
    matrices = [name for name, row in plan.items() if not row["format"].startswith("fp")]
    assert {cost.name for cost in found.weights} >= set(matrices)
    assert found.weights[0].name == dear and found.weights[0].share > 0.5
    assert sum(cost.share for cost in found.weights) == pytest.approx(1)
    best = found.upgrades[0]
    assert (best.name, best.format) == (dear, "int8-pc") and best.saves > 0.5
    assert best.costs > 0
    assert advice(found)[0].startswith(f"{dear} to int8-pc costs")


def test_a_channel_far_beyond_the_others_is_told(place, sound, tmp_path):
    checkpoint = tmp_path / "model"
    shutil.copytree(place / "model", checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    norm = tensors["model.layers.0.input_layernorm.weight"].clone()
    norm[5] = 200 * norm.abs().max()
    tensors["model.layers.0.input_layernorm.weight"] = norm
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    export(
        open_model(str(checkpoint)), [find_target("onnx")], out, ExportOptions("int8", context=64)
    )
    found = diagnose(out, OPTIONS)
    assert found.outliers[0].channel == 5 and found.outliers[0].times > 20
    assert ".layers.0.self_attn." in found.outliers[0].weight
    assert torch.isfinite(torch.tensor(found.outliers[0].largest))


def test_a_recipe_that_rescales_columns_has_no_costs_by_weight_and_says_so(place, sound):
    out = place / "awq"
    options = ExportOptions("int4-awq", context=64)
    checkpoint = place / "model"
    export(open_model(str(checkpoint)), [find_target("onnx")], out, options)
    found = diagnose(out, DiagnoseOptions(tokens=60, threads=1))
    assert found.weights == () and "rescales columns" in found.unshown[0]
    assert found.leaves is None


@pytest.fixture(scope="module")
def heads(place):
    """Artifacts of a mixture of attention heads, and the same with outputs of the wrong sign."""
    checkpoint, sound = synthesise("tiny-jetmoe", place / "jetmoe"), place / "heads"
    artifacts(checkpoint, sound, "fp16")
    name = f"model.layers.{FAULTY}.self_attention.experts.output_linear.weight"
    return sound, with_wrong_sign(checkpoint, name, sound, place / "faulty-heads", "fp16")


@pytest.mark.parametrize("target", TARGETS)
def test_attention_of_experts_is_compared_whatever_the_order_of_a_tokens_slots(heads, target):
    sound, faulty = heads
    found = diagnose(sound / target, OPTIONS)
    assert found.followed and found.leaves is None
    by_point = {each.point: each.lowering for each in found.noise}
    for layer in (0, 1):
        noise = by_point[Point(layer, "attention")]
        assert noise is not None and noise < 1e-4
    assert diagnose(faulty / target, OPTIONS).leaves == Point(FAULTY, "attention")
