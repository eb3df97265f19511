"""Facts that only an altered file or manifest has otherwise; and what cannot be read is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edgeforge.verification.meaning.check import check_meaning, told_before
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.registry import TARGETS
from tests.planted_faults.edits import edit_coreml, edit_onnx
from tests.planted_faults.written import write_faulty

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def sound(captures, tmp_path):
    """Writes a sound artifact of a target; gives the folder, its manifest and its model."""

    def sound(target: str):
        captured = captures("llama")[target]
        folder = tmp_path / target
        manifest = write_faulty(captured, None, folder, tmp_path / "apart")
        return folder, manifest, captured.run.model

    return sound


def failed(folder, manifest, model) -> dict[str, str]:
    checks = check_meaning(folder, manifest, model)
    return {check.name: check.message for check in checks if check.verdict == "failed"}


def planned_as(manifest: Manifest, weight: str, **changes: object) -> Manifest:
    records = dict(manifest.weights)
    records[weight] = replace(records[weight], **changes)
    return replace(manifest, weights=records)


@pytest.mark.parametrize("target", TARGETS)
def test_a_format_other_than_the_plans_is_named(target, sound):
    folder, manifest, model = sound(target)
    weight = next(name for name, record in manifest.weights.items() if record.format == "int4-g32")
    for format in ("int8-pc", "int4-g32-asym", "fp16"):
        found = failed(folder, planned_as(manifest, weight, format=format), model)
        assert f"{weight} is 4-bit int" in found["meaning.formats"]
        assert f"the plan says {format}" in found["meaning.formats"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_was_left_float_is_named(target, sound):
    folder, manifest, model = sound(target)
    norm = "model.layers.0.input_layernorm.weight"
    found = failed(folder, planned_as(manifest, norm, format="int8-pc"), model)
    assert f"{norm} was left fp32" in found["meaning.formats"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_nothing_reads_is_named(target, sound):
    folder, manifest, model = sound(target)
    records = {**manifest.weights, "model.unread.weight": manifest.weights[DOWN]}
    found = failed(folder, replace(manifest, weights=records), model)
    assert "does not read model.unread.weight" in found["meaning.weights"]


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_another_precision_is_named(target, sound):
    folder, manifest, model = sound(target)
    weight = "model.layers.0.mlp.gate_up_proj.weight"
    found = failed(folder, planned_as(manifest, weight, float_columns="all"), model)
    assert f"the product with {weight}" in found["meaning.precision"]
    found = failed(folder, planned_as(manifest, weight, float_columns=(3,)), model)
    assert "except columns [3]" in found["meaning.precision"]


@pytest.mark.parametrize("target", TARGETS)
def test_another_context_is_named(target, sound):
    folder, manifest, model = sound(target)
    found = failed(folder, replace(manifest, context=96), model)
    assert "96" in found["context"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_context_beyond_the_checkpoints_is_named_at_once(target, sound):
    folder, manifest, model = sound(target)
    (only,) = check_meaning(folder, replace(manifest, context=10**12), model)
    assert only.name == "context" and only.verdict == "failed"
    assert f"more than the checkpoint's {model.spec.max_context}" in only.message


@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_ids_of_genai_are_held_against_the_checkpoint(field, sound):
    folder, manifest, model = sound("onnx")
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"][field] = 7
    path.write_text(json.dumps(config))
    assert "[7] in the files" in failed(folder, manifest, model)[field.partition("_")[0]]


def test_an_artifact_without_the_tokenizer_is_named(sound):
    folder, manifest, model = sound("coreml")
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in failed(folder, manifest, model)["tokenizer"]


def test_operators_that_the_lowering_does_not_emit_are_named(sound):
    folder, manifest, model = sound("onnx")

    def change(node) -> None:
        if node.op_type == "QuickGelu":
            node.op_type = "Softsign"

    edit_onnx(folder, change)
    found = failed(folder, manifest, model)
    assert "Softsign at silu" in found["meaning.operators"]
    assert "meaning.structure" in found


def test_another_slope_of_silu_is_no_silu(sound):
    folder, manifest, model = sound("onnx")

    def change(node) -> None:
        if node.op_type == "QuickGelu":
            node.attribute[0].f = 1.702

    edit_onnx(folder, change)
    assert "SiLU's result" in failed(folder, manifest, model)["meaning.structure"]


def test_float32_in_a_package_is_named(sound):
    folder, manifest, model = sound("coreml")

    def change(block) -> None:
        for operation in block.operations:
            if operation.type == "silu":
                operation.outputs[0].type.tensorType.dataType = 11

    edit_coreml(folder, change)
    assert "silu in float32" in failed(folder, manifest, model)["meaning.operators"]


def test_factors_that_are_not_applied_are_no_decoder(sound):
    """A scale of attention that is another, on the target that states it as a number."""
    folder, manifest, model = sound("onnx")

    def change(node) -> None:
        for attribute in node.attribute:
            if attribute.name == "scale":
                attribute.f = 0.5

    edit_onnx(folder, change)
    assert "multiplies scores by 0.5" in failed(folder, manifest, model)["meaning.attention"]


def test_scales_of_another_weight_are_no_product(sound):
    folder, manifest, model = sound("onnx")

    def change(node) -> None:
        if node.op_type == "MatMulNBits" and "layers.1.mlp.down_proj" in node.input[1]:
            node.input[2] = node.input[2].replace("layers.1", "layers.0")

    edit_onnx(folder, change)
    assert failed(folder, manifest, model)["meaning.structure"]


@pytest.mark.parametrize(
    ("target", "file"),
    [
        ("onnx", "model.onnx"),
        ("onnx", "genai_config.json"),
        ("coreml", "model.mlpackage/Data/com.apple.CoreML/model.mlmodel"),
        ("executorch", "model.pte"),
    ],
)
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_damaged_file_is_one_sentence(target, file, left, sound):
    folder, manifest, model = sound(target)
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: int(left * len(data))])
    with pytest.raises(ExportError):
        check_meaning(folder, manifest, model)


def test_what_a_target_cannot_read_is_said(sound):
    folder, manifest, model = sound("onnx")
    found = check_meaning(folder, replace(manifest, target="tape"), model)
    (unread,) = [check for check in found if check.verdict == "doubtful"]
    assert unread.name == "meaning.unread"
    assert "the graphs of the target tape" in unread.message


def test_facts_are_told_where_an_artifact_cannot_run(sound):
    from device_harness.errors import DeviceError
    from edgeforge.errors import CheckFailed

    folder, manifest, model = sound("onnx")
    checks = check_meaning(folder, replace(manifest, context=96), model)
    with (
        pytest.raises(CheckFailed, match=r"96.*and it cannot be run: no shape fits"),
        told_before({folder: checks}),
    ):
        raise DeviceError("no shape fits")
    good = check_meaning(folder, manifest, model)
    with pytest.raises(DeviceError), told_before({folder: good}):
        raise DeviceError("no shape fits")
