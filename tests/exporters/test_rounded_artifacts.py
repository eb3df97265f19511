"""Rounded activations in written artifacts: the same numbers in each, computed as promised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import edgeforge.trace_and_quantize as trace_and_quantize
from edgeforge.calibration.text import CalibrationOptions
from edgeforge.export_options import ExportOptions
from edgeforge.pipeline import export
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from exporters.coreml.package import open_package
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target

HELD = {"w8a8": ("onnx", "executorch"), "w8a8-static": ("onnx", "coreml")}
ONE = "model.layers.0.self_attn.qk_proj.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> CalibrationOptions:
    words = np.random.default_rng(0).integers(97, 123, (600, 5), dtype=np.uint8)
    file = tmp_path_factory.mktemp("text") / "text"
    file.write_text(" ".join(word.tobytes().decode() for word in words))
    return CalibrationOptions(str(file), tokens=1024, length=32)


@pytest.fixture(scope="module")
def exported(cache, checkpoint_of, llama_config, text, tmp_path_factory):
    """One export of a recipe to the targets that hold it; the same again is not made twice."""
    model = checkpoint_of(llama_config(num_hidden_layers=1))
    made: dict[str, list[Path]] = {}

    def exported(recipe: str) -> list[Path]:
        if recipe not in made:
            out = tmp_path_factory.mktemp("artifacts") / recipe
            options = ExportOptions(recipe, context=48, calibration=text, threads=1)
            made[recipe] = export(model, [find_target(n) for n in HELD[recipe]], out, options)
        return made[recipe]

    return exported


@pytest.fixture(params=HELD)
def recipe(request) -> str:
    return request.param


@pytest.fixture
def artifacts(exported, recipe) -> list[Path]:
    return exported(recipe)


def test_integers_and_scales_are_the_same_in_every_file(artifacts, recipe):
    found = [
        find_target(Manifest.read(folder).target).stored_digests(folder) for folder in artifacts
    ]
    assert found[0] == found[1]
    rows = Manifest.read(artifacts[0]).weights
    assert found[0] == {name: row.digest for name, row in rows.items()}
    treated = {name: row.activation for name, row in rows.items()}
    wanted = "int8-tensor" if recipe == "w8a8-static" else "int8-token"
    assert {n for n, a in treated.items() if a == wanted} == {
        n for n in rows if ".self_attn." in n or ".mlp." in n
    }
    assert set(treated.values()) == {"none", wanted}


def test_every_artifact_is_verified(artifacts):
    quantization = []
    for folder in artifacts:
        found = verify(folder, VerifyOptions(tokens=256, timed=False, threads=1))
        assert found.stored_weights_equal
        assert found.lowering.relative_difference < 0.05
        quantization.append(found.quantization)
        assert any("as QUANTIZED does" in note for note in Manifest.read(folder).notes)
    assert quantization[0] == quantization[1]


def test_layers_multiply_integers(artifacts):
    for folder in artifacts:
        target = Manifest.read(folder).target
        if target == "onnx":
            graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
            kinds = [node.op_type for node in graph.node]
            assert kinds.count("QGemm") == 5  # qk, v, o, gate and up, down
            # Per token, qk and v read one rounding; with fixed scales each has its own.
            fixed = Manifest.read(folder).recipe == "w8a8-static"
            assert kinds.count("QuantizeLinear") == (5 if fixed else 4)
            assert kinds.count("MatMulNBits") == 1  # the head
        if target == "coreml":
            block = open_package(folder / "model.mlpackage").block("prefill")
            kinds = [operation.type for operation in block.operations]
            assert kinds.count("quantize") == kinds.count("dequantize") == 5


@pytest.mark.parametrize(
    ("target", "format", "activation"),
    [
        ("onnx", "int8-pc", "int8-token"),
        ("executorch", "int8-pc", "int8-token"),
        ("executorch", "int4-g32", "int8-token"),
        ("onnx", "int8-pc", "int8-tensor"),
        ("coreml", "int8-pc", "int8-tensor"),
        ("coreml", "int4-g32", "int8-tensor"),
    ],
)
def test_one_product_computes_what_the_plan_promises(
    cache, checkpoint_of, llama_config, text, tmp_path, target, format, activation
):
    """A rounding right behind the embedding: nothing before it differs by more than an ulp."""
    path = tmp_path / "one.yaml"
    path.write_text(
        f"- {{match: {ONE}, format: {format}, activation: {activation}}}\n"
        "- {match: '*', format: fp32}\n"
    )
    model = checkpoint_of(llama_config(num_hidden_layers=1))
    asked = text if activation == "int8-tensor" else CalibrationOptions()
    options = ExportOptions(str(path), context=48, calibration=asked, threads=1)
    (folder,) = export(model, [find_target(target)], tmp_path / "out", options)
    runtime = {"precision": "fp32"} if target == "coreml" else {}
    asked = VerifyOptions(tokens=200, timed=False, threads=1, runtime=runtime)
    found = verify(folder, asked)
    assert found.stored_weights_equal
    assert found.lowering.relative_difference < 5e-4
    assert found.quantization.relative_difference > 4 * found.lowering.relative_difference


def test_coremltools_opens_static_packages_again(exported):
    import coremltools
    from coremltools.converters.mil.frontend.milproto.load import load

    folder = exported("w8a8-static")[HELD["w8a8-static"].index("coreml")]
    package = folder / "model.mlpackage"
    spec = coremltools.models.MLModel(str(package), skip_model_load=True).get_spec()
    weights = package / "Data/com.apple.CoreML/weights"
    program = load(spec, spec.specificationVersion, str(weights))
    found = [op for op in program.functions["decode"].operations if op.op_type == "quantize"]
    scales = [float(op.scale.val) for op in found]
    assert len(scales) == 5 and all(scale > 0 for scale in scales)
    for op in found:
        assert op.outputs[0].dtype is coremltools.converters.mil.mil.types.int8


@pytest.fixture
def refused(cache, tmp_path, monkeypatch, checkpoint_of, llama_config):
    """Exports and returns the refusal; hashing or quantizing anything fails the test."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done before the refusal")

    def refused(target: str, rule: str, **asked: str) -> str:
        model = checkpoint_of(llama_config())
        monkeypatch.setattr(type(model.checkpoint), "digest", work)
        monkeypatch.setattr(trace_and_quantize, "quantize", work)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"- {{match: '{ONE}', {rule}}}\n- {{match: '*', format: fp16}}\n")
        options = ExportOptions(str(recipe), target=TargetOptions(**asked))
        with pytest.raises(ExportError) as caught:
            export(model, [find_target(target)], tmp_path / "out", options)
        return str(caught.value)

    return refused


def test_each_target_says_which_roundings_it_lacks(refused):
    token, tensor = (f"format: int8-pc, activation: int8-{each}" for each in ("token", "tensor"))
    assert refused("coreml", token) == (
        f"{ONE} is to be multiplied by activations rounded to int8-token; Core ML's quantize takes "
        f"constant scales only: use activation int8-tensor (as recipe w8a8-static does) "
        f"or use activation none"
    )
    assert refused("executorch", tensor) == (
        f"{ONE} is to be multiplied by activations rounded to int8-tensor; XNNPACK's products by "
        f"fixed scales would round their results too: use activation int8-token (as recipe w8a8 "
        f"does) or use activation none"
    )
    assert refused("onnx", "format: int4-g32, activation: int8-token") == (
        f"{ONE} is to be int4-g32 with activation int8-token; ONNX Runtime multiplies rounded "
        f"activations by 8-bit weights with one scale a row: use activation none or "
        f"keep it int8-pc"
    )
    assert "--lowering stock does not control how activations are rounded" in refused(
        "executorch", token, lowering="stock"
    )
