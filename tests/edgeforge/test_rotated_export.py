"""A rotation from the command line to the verified artifacts, and all that goes with it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import edgeforge.calibration.fill
from edgeforge.calibration.text import CalibrationOptions
from edgeforge.cli import entry as cli
from edgeforge.errors import UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.planning.budget import Budget
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from exporters.manifest import Manifest
from exporters.manifest_records import RotationRecord
from exporters.registry import find_target
from quant.errors import QuantizationError
from quant.formats.formats import parse_format

TEXT = CalibrationOptions(tokens=4096, length=128)
TARGETS = ("onnx", "coreml", "executorch")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(folder))
        patch.setattr("edgeforge.verification.evaluate.GREEDY_PROMPTS", 1)
        yield folder


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> dict[str, Path]:
    """The demo model, which is tied, rotated; and as it is."""
    out = tmp_path_factory.mktemp("out")
    options = ExportOptions("int4-g128", context=128, rotation="hadamard")
    targets = [find_target(name) for name in TARGETS]
    made = dict(
        zip(TARGETS, export(open_model("demo"), targets, out / "all", options), strict=True)
    )
    plain = ExportOptions("int4-g128", context=128)
    (made["plain"],) = export(open_model("demo"), targets[:1], out / "plain", plain)
    return made


def verified(folder: Path):
    return verify(folder, VerifyOptions(tokens=512, timed=False))


def test_artifacts_of_all_targets_hold_and_run_the_rotated_program(artifacts):
    manifests = [Manifest.read(artifacts[name]) for name in TARGETS]
    stored = [
        {name: replace(record, float_columns=()) for name, record in m.weights.items()}
        for m in manifests
    ]
    assert all(weights == stored[0] for weights in stored)
    plain = verified(artifacts["plain"])
    for name in TARGETS:
        found = verified(artifacts[name])
        assert found.stored_weights_equal
        # FLOAT is the checkpoint's own model, QUANTIZED the rotated one.
        assert found.perplexity["float"] == plain.perplexity["float"]
        assert found.quantization != plain.quantization
        assert 0 < found.quantization.kl_mean < 0.2
        assert found.lowering.kl_mean < 0.02 * found.quantization.kl_mean


def test_the_manifest_says_what_was_rotated_and_what_it_costs(artifacts):
    manifest, plain = (Manifest.read(artifacts[name]) for name in ("onnx", "plain"))
    assert manifest.rotation == RotationRecord("hadamard", version=1, seed=0)
    assert plain.rotation is None and not any("rotated" in note for note in plain.notes)
    assert any("weights were rotated before they were quantized" in n for n in manifest.notes)
    assert any(
        "so that the head stays tied to the embedding: 131,072 b" in n for n in manifest.notes
    )
    matrix = manifest.weights["model.norm_matrix.weight"]
    assert (matrix.format, matrix.shape, matrix.algorithm) == ("fp16", (256, 256), "cast")
    parameters = plain.model.summary["num_parameters"]
    assert manifest.model.summary["num_parameters"] == parameters
    added = (manifest.bits_per_weight - plain.bits_per_weight) * parameters / 8
    assert added == pytest.approx(131072)
    norms = {n: r for n, r in manifest.weights.items() if n.endswith("layernorm.weight")}
    assert len({r.digest for r in norms.values()}) == 1  # of ones


def test_inspect_names_the_rotation(artifacts, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["edgeforge", "inspect", str(artifacts["onnx"])])
    cli.main()
    assert "rotation: hadamard, seed 0" in capfd.readouterr().out


def test_an_untied_head_is_said_to_be_one(artifacts, cache, tmp_path):
    before = set((cache / "stores").iterdir())
    options = ExportOptions("int4-g128", context=128, rotation="hadamard-untied")
    (folder,) = export(open_model("demo"), [find_target("onnx")], tmp_path / "out", options)
    manifest = Manifest.read(folder)
    nbytes = parse_format("int4-g128").nbytes(3072, 256)
    assert manifest.weights["lm_head.weight"].format == "int4-g128"
    assert any(f"is a matrix of its own: {nbytes:,} bytes" in note for note in manifest.notes)
    # And another rotation's store is not taken for it.
    assert len(set((cache / "stores").iterdir()) - before) == 1
    assert verified(folder).lowering.kl_mean < 1e-3


@pytest.mark.parametrize("recipe", ["int4-g128-gptq", "int4-g128-awq"])
def test_calibrated_recipes_look_at_the_rotated_program(recipe, artifacts, tmp_path):
    options = ExportOptions(recipe, context=128, calibration=TEXT, rotation="hadamard")
    (folder,) = export(open_model("demo"), [find_target("onnx")], tmp_path / "out", options)
    found = verified(folder)
    assert found.quantization.kl_mean < verified(artifacts["onnx"]).quantization.kl_mean
    assert found.lowering.kl_mean < 1e-3


def test_partial_results_of_another_rotation_are_not_taken_up(tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def options(rotation: str | None) -> ExportOptions:
        return ExportOptions(
            "int4-g128-gptq",
            context=128,
            calibration=replace(TEXT, seed=1),  # so that no test before has made this store
            resume=tmp_path / "partial",
            rotation=rotation,
        )

    with monkeypatch.context() as patch:
        patch.setattr(edgeforge.calibration.fill, "quantize_sequentially", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export(open_model("demo"), [find_target("onnx")], tmp_path / "out", options("hadamard"))
    for other in (None, "hadamard-values"):
        with pytest.raises(QuantizationError, match="of another model, recipe, rotation or"):
            export(open_model("demo"), [find_target("onnx")], tmp_path / "out", options(other))
    assert not (tmp_path / "out").exists()


def test_a_saved_plan_brings_its_rotation(tmp_path):
    file = tmp_path / "plan.yaml"
    options = ExportOptions(
        "mixed",
        context=128,
        calibration=CalibrationOptions(tokens=64, length=64),
        budget=Budget(bits_per_weight=4.6),
        save_plan=file,
        rotation="hadamard",
    )
    (first,) = export(open_model("demo"), [find_target("onnx")], tmp_path / "first", options)
    manifest = Manifest.read(first)
    assert manifest.bits_per_weight <= 4.6
    assert manifest.weights["model.norm_matrix.weight"].format == "fp16"
    assert "rotation: hadamard\nrules:\n" in file.read_text()
    again = ExportOptions(str(file), context=128)
    (second,) = export(open_model("demo"), [find_target("onnx")], tmp_path / "second", again)
    weights = json.loads((first / "edgeforge.json").read_text())["weights"]
    assert json.loads((second / "edgeforge.json").read_text())["weights"] == weights
    assert Manifest.read(second).rotation == manifest.rotation
    with pytest.raises(UsageError, match="--rotation hadamard-values contradicts"):
        contrary = ExportOptions(str(file), rotation="hadamard-values")
        export(open_model("demo"), [find_target("onnx")], tmp_path / "third", contrary)


def test_keeping_weights_as_they_are_and_rotating_them_is_a_contradiction(tmp_path):
    options = ExportOptions("as-is", rotation="hadamard")
    with pytest.raises(UsageError, match="recipe as-is keeps every weight as the checkpoint has"):
        export(open_model("demo"), [find_target("onnx")], tmp_path / "out", options)


def test_the_command_line_refuses_in_one_line(tmp_path, monkeypatch, capfd, packed_checkpoints):
    packed = tmp_path / "packed"
    case = packed_checkpoints.CASES["awq"]
    packed_checkpoints.write(packed, packed_checkpoints.family("llama"), case)
    for model, rotation, words in (
        ("demo", "hadamrd", "there is no rotation 'hadamrd' (did you mean 'hadamard'?); known: "),
        (packed, "hadamard", "self_attn.qk_proj.weight as integers (awq), which would have to"),
    ):
        arguments = ["export", model, "--rotation", rotation, "--out", tmp_path / "out"]
        monkeypatch.setattr(sys, "argv", ["edgeforge", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        (line,) = capfd.readouterr().err.splitlines()[-1:]
        assert words in line
        assert not (tmp_path / "out").exists()
