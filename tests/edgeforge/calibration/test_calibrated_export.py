"""A calibrated recipe from the command line to the verified artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeforge import api
from edgeforge.calibration.text import CalibrationOptions
from edgeforge.errors import UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import CALIBRATION_TEXT, open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from exporters.manifest import Manifest
from exporters.registry import find_target

TEXT = CalibrationOptions(tokens=1024, length=64)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def artifact(cache, tmp_path_factory) -> Path:
    options = ExportOptions("int4-g128-gptq", context=128, calibration=TEXT)
    out = tmp_path_factory.mktemp("out") / "demo"
    (folder,) = export(open_model("demo"), [find_target("onnx")], out, options)
    return folder


def test_the_manifest_says_on_what_it_was_calibrated(artifact):
    manifest = Manifest.read(artifact)
    record = manifest.calibration
    assert (record.source, record.tokens, record.length, record.seed) == ("demo", 1024, 64, 0)
    algorithms = {row.algorithm for row in manifest.weights.values()}
    assert algorithms == {"gptq-descent", "cast"}


def test_verify_finds_the_store_and_makes_it_again_where_it_is_gone(artifact, cache):
    options = VerifyOptions(tokens=512, timed=False)
    first = verify(artifact, options)
    assert first.stored_weights_equal and first.lowering.kl_mean < 0.01
    shutil.rmtree(cache / "stores")
    stages = []
    again = verify(artifact, options, lambda stage, done, size: stages.append(stage))
    assert "calibrate" in stages
    assert again.quantization == first.quantization


def test_the_text_it_was_calibrated_on_is_no_evidence(artifact, cache):
    with pytest.raises(UsageError, match="shares a passage with the text that the artifact was"):
        verify(artifact, VerifyOptions(text=CALIBRATION_TEXT, timed=False))


def test_another_seed_is_another_store(artifact, cache, tmp_path):
    before = set((cache / "stores").iterdir())
    options = ExportOptions(
        "int4-g128-gptq",
        context=128,
        calibration=CalibrationOptions(tokens=1024, length=64, seed=1),
        resume=tmp_path / "partial",
    )
    export(open_model("demo"), [find_target("onnx")], tmp_path / "out", options)
    assert len(set((cache / "stores").iterdir()) - before) == 1
    assert not list((tmp_path / "partial").iterdir())


def test_a_model_calibrates_on_what_it_writes_itself(cache, tmp_path):
    """Without a text: the plan, the integers and the scales of caches."""
    folder = synthesise("tiny-llama", tmp_path / "model")
    options = {"recipe": "mixed-gptq", "bits_per_weight": 6, "kv_cache": "int8", "context": 64}
    text = {"calibration": "self", "calibration_tokens": 256, "calibration_length": 16}
    api.export(folder, tmp_path / "out", targets=["onnx"], **options, **text)
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.calibration.source, manifest.calibration.tokens) == ("self", 256)
    card = (tmp_path / "out" / "CARD.md").read_text(encoding="utf-8")
    assert "256 tokens of what the model itself writes" in card
    shutil.rmtree(cache / "stores")
    stages = []
    options = VerifyOptions(tokens=64, timed=False)
    found = verify(tmp_path / "out", options, lambda stage, done, size: stages.append(stage))
    assert {"write sequences", "calibrate"} <= set(stages)
    assert found.stored_weights_equal


def test_a_recipe_that_does_not_calibrate_takes_no_text(tmp_path):
    with pytest.raises(UsageError, match="recipe int4 uses no activations"):
        api.export("demo", tmp_path / "out", recipe="int4", calibration="demo")
    with pytest.raises(UsageError, match="so --calibration self would have no effect"):
        api.export("demo", tmp_path / "out", recipe="int4", calibration="self")
    assert not (tmp_path / "out").exists()


def test_calibrated_palettes_and_integers_lie_in_one_package(cache, tmp_path):
    model = open_model(str(synthesise("tiny-llama", tmp_path / "model")))
    recipe = tmp_path / "both.yaml"
    recipe.write_text(
        "- {match: '*.mlp.down_proj.weight', format: lut4-gc16}\n"
        "- {match: '*.mlp.gate_up_proj.weight', format: lut3-gc16, algorithm: kmeans-weighted}\n"
        "- {match: '*.qk_proj.weight', format: lut4-pt, algorithm: gptq-order}\n"
        "- {match: embedding, format: int8-pc}\n"
        "- {match: '*', format: int4-g32, algorithm: gptq}\n"
    )
    words = np.random.default_rng(0).integers(97, 123, (200, 5), dtype=np.uint8)
    (tmp_path / "text").write_text(" ".join(word.tobytes().decode() for word in words))
    out = tmp_path / "out"
    text = CalibrationOptions(str(tmp_path / "text"), tokens=512, length=64)
    options = ExportOptions(str(recipe), context=64, calibration=text)
    export(model, [find_target("coreml")], out, options)
    rows = Manifest.read(out).weights
    assert rows["model.layers.1.mlp.down_proj.weight"].algorithm == "kmeans"
    assert rows["model.layers.1.mlp.gate_up_proj.weight"].algorithm == "kmeans-weighted"
    assert rows["model.layers.1.self_attn.qk_proj.weight"].algorithm == "gptq-order"
    assert rows["model.layers.1.self_attn.o_proj.weight"].algorithm == "gptq"
    assert 0.05 < rows["model.layers.1.mlp.gate_up_proj.weight"].relative_error < 0.4
    assert 0.05 < rows["model.layers.1.self_attn.qk_proj.weight"].relative_error < 0.4
    found = verify(out, VerifyOptions(tokens=128, timed=False))
    assert found.stored_weights_equal
    assert found.lowering.relative_difference < 0.05
