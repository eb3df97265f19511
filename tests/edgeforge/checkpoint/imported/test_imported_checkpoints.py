"""Quantized checkpoints of known integers: what is read, what is stored, what artifacts hold."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.planning.choose import PlanRequest, choose_plan
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from edgeforge.weight_store import quantize
from exporters.coreml import names
from exporters.manifest import Manifest
from exporters.options import TargetOptions
from exporters.registry import find_target

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "mixtral")
CASES = (
    "gptq-symmetric",
    "gptq-asymmetric",
    "gptq-v2",
    "gptq-mislabelled",
    "gptq-rows",
    "gptq-8-bits",
    "awq",
    "awq-exact-scales",
    "compressed-4",
    "compressed-4-asymmetric",
    "compressed-8",
)
FORMATS = {
    "gptq-symmetric": "int4-g32-f16",
    "gptq-asymmetric": "int4-g32-asym-f16",
    "gptq-v2": "int4-g16-asym-f16",
    "gptq-mislabelled": "int4-g32-f16",
    "gptq-rows": "int4-pc-f16",
    "gptq-8-bits": "int8-g32-f16",
    "awq": "int4-g32-asym-f16",
    "awq-exact-scales": "int4-g16",
    "compressed-4": "int4-g32-f16",
    "compressed-4-asymmetric": "int4-g32-asym-f16",
    "compressed-8": "int8-pc-f16",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, packed_checkpoints):
    made = {}

    def checkpoint(kind, case, **changes):
        key = kind, case, json.dumps(changes)
        if key not in made:
            folder = tmp_path_factory.mktemp("packed") / "checkpoint"
            config = packed_checkpoints.family(kind, **changes)
            layers = packed_checkpoints.write(folder, config, packed_checkpoints.CASES[case])
            made[key] = folder, layers
        return made[key]

    return checkpoint


def modules(model, weight):
    return [piece.tensor.removesuffix(".weight") for piece in model.spec.weights[weight].pieces]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_float_weights_are_the_integers_times_the_scales(checkpoint, kind, case):
    folder, layers = checkpoint(kind, case)
    model = open_model(str(folder))
    assert model.weights.imported
    assert {format.name for format in model.weights.imported.values()} == {FORMATS[case]}
    seen = set()
    for weight in model.weights.imported:
        wanted = np.concatenate(
            [
                layers[piece.tensor.removesuffix(".weight")].values()[piece.first :][
                    : piece.shape[0]
                ]
                for piece in model.spec.weights[weight].pieces
            ]
        )
        found = model.weights.float_weight(weight)
        assert found.dtype == torch.float32
        assert (found.double().numpy() == wanted).all()
        seen |= set(modules(model, weight))
    assert seen == set(layers)


@pytest.mark.parametrize("case", ["gptq-symmetric", "awq", "compressed-4"])
def test_biases_of_a_family_that_has_them_are_read(checkpoint, case):
    """Those of Qwen2 stand beside integers, where some tools write a bias of zeros for any family.

    A bias that the family does not have is refused: see `test_damage_is_named`.
    """
    folder, _ = checkpoint("qwen2", case)
    model = open_model(str(folder))
    stored = load_file(folder / "model.safetensors")
    biases = [name for name in model.spec.weights if name.endswith(".bias")]
    assert len(biases) == 2 * 2  # of queries and keys, which are one, and of values
    for name in biases:
        pieces = model.spec.weights[name].pieces
        wanted = np.concatenate([stored[piece.tensor] for piece in pieces])
        assert wanted.any()
        np.testing.assert_array_equal(model.weights.float_weight(name).numpy(), wanted)


def nibbles(packed, count):
    apart = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    apart[:, 0::2], apart[:, 1::2] = packed % 16, packed // 16
    return apart[:, :count]


@pytest.mark.parametrize("case", CASES)
def test_the_store_holds_the_checkpoints_integers(checkpoint, case, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    folder, layers = checkpoint("llama", case)
    model = open_model(str(folder))
    plan = choose_plan(model, PlanRequest()).plan
    store = quantize(model.weights, model.checkpoint.digest(), plan, 1, lambda *_: None)
    assert all(error == 0 for error in store.relative_error.values())
    bits = 8 if "8" in case else 4
    with safe_open(store.file, "np") as stored:
        for weight in model.weights.imported:
            parts = [layers[module] for module in modules(model, weight)]
            codes = np.concatenate([layer.codes for layer in parts])
            zeros = np.concatenate([layer.zeros for layer in parts])
            scales = np.concatenate([layer.scales for layer in parts])
            found = stored.get_tensor(f"{weight}:codes")
            found = found if bits == 8 else nibbles(found, codes.shape[1])
            assert (found == codes).all()
            scale = stored.get_slice(f"{weight}:scale")
            if FORMATS[case].endswith("-f16"):
                assert (stored.get_tensor(f"{weight}:scale") == scales).all()
            else:
                assert scale.get_dtype() == "BF16"
            if "asym" in FORMATS[case]:
                zero = nibbles(stored.get_tensor(f"{weight}:zero_point"), zeros.shape[1])
                assert (zero == zeros).all()
            else:
                assert f"{weight}:zero_point" not in stored.keys()  # noqa: SIM118


@pytest.mark.parametrize("case", ["gptq-asymmetric", "compressed-8"])
def test_an_artifact_holds_and_computes_the_checkpoint(checkpoint, case, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    folder, _ = checkpoint("mistral", case)
    out = tmp_path / "out"
    export(open_model(str(folder)), [find_target("onnx")], out, ExportOptions(context=64))
    found = verify(out, VerifyOptions(tokens=300, timed=False))
    assert found.stored_weights_equal
    # The recipe for such a checkpoint changes nothing: FLOAT is QUANTIZED.
    assert found.quantization.max_difference == 0
    assert found.lowering.relative_difference < 0.05
    manifest = Manifest.read(out)
    assert manifest.recipe == "as-is"
    record = manifest.weights["model.layers.0.mlp.down_proj.weight"]
    assert (record.format, record.algorithm, record.relative_error) == (
        FORMATS[case],
        "imported",
        0,
    )
    assert manifest.weights["lm_head.weight"].format == "fp16"
    assert any("as the checkpoint has them" in note for note in manifest.notes)


@pytest.fixture(scope="module")
def package(checkpoint, tmp_path_factory):
    """Imports a checkpoint into a Core ML package: its folder and the checkpoint's integers."""

    def package(case, **options):
        folder, layers = checkpoint("llama", case)
        out = tmp_path_factory.mktemp("package") / "out"
        asked = TargetOptions(chunk="16", **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("EDGEFORGE_CACHE", str(out.parent / "cache"))
            coreml = find_target("coreml")
            export(open_model(str(folder)), [coreml], out, ExportOptions(context=32, target=asked))
            found = verify(out, VerifyOptions(tokens=64, timed=False))
        assert found.stored_weights_equal
        assert found.quantization.max_difference == 0
        assert found.lowering.relative_difference < 0.05
        return out, layers

    return package


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("gptq-asymmetric", {}),
        ("gptq-rows", {}),
        ("awq-exact-scales", {}),
        ("compressed-8", {"opset": "ios17"}),
    ],
)
def test_a_core_ml_package_holds_the_checkpoints_scales(package, case, options):
    out, layers = package(case, **options)
    stored = (out / names.PACKAGE / names.WEIGHTS_PATH).read_bytes()
    for layer in layers.values():
        assert layer.scales.tobytes() in stored


def test_every_bit_of_float16_scales_in_a_package_is_seen(package):
    out, layers = package("gptq-symmetric")
    path = out / names.PACKAGE / names.WEIGHTS_PATH
    data = bytearray(path.read_bytes())
    manifest = Manifest.read(out)
    weight = "model.layers.0.mlp.down_proj.weight"
    begin = data.find(layers[weight.removesuffix(".weight")].scales.tobytes())
    assert begin >= 0
    for at, bit in ((begin, 0), (begin, 3), (begin + 1, 6)):
        data[at] ^= 1 << bit
        path.write_bytes(data)
        found = find_target("coreml").stored_digests(out)
        assert {n for n, r in manifest.weights.items() if found[n] != r.digest} == {weight}
        data[at] ^= 1 << bit
