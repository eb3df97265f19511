"""Quantized checkpoints that are damaged, or more than a target or the store can hold."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeforge.errors import CheckpointError, UsageError
from edgeforge.export_options import ExportOptions, scale_name
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.planning.choose import PlanRequest, choose_plan
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.registry import find_target

LAYER = "model.layers.1.self_attn.k_proj"


@pytest.fixture
def damaged(tmp_path, packed_checkpoints):
    """Writes a checkpoint, lets a function change its tensors, and opens it."""

    def damaged(case, change, **fields):
        folder = tmp_path / "checkpoint"
        config = packed_checkpoints.family("llama", **fields)
        packed_checkpoints.write(folder, config, packed_checkpoints.CASES[case])
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        return open_model(str(folder))

    return damaged


def with_value(name, value, index=0):
    def change(tensors):
        tensors[name].flat[index] = value

    return change


def without(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def widened(tensors):
    name = f"{LAYER}.qzeros"
    tensors[name] = np.concatenate([tensors[name]] * 2)


def one_piece_as_floats(tensors):
    shape = tensors[f"{LAYER}.scales"].shape[1], tensors[f"{LAYER}.g_idx"].shape[0]
    for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        del tensors[f"{LAYER}.{part}"]
    tensors[f"{LAYER}.weight"] = np.zeros(shape, np.float16)


def all_as_floats(tensors):
    for name in [n for n in tensors if n.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        shape = tensors[f"{module}.scales"].shape[1], tensors[f"{module}.g_idx"].shape[0]
        for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
            del tensors[f"{module}.{part}"]
        tensors[f"{module}.weight"] = np.zeros(shape, np.float16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_value(f"{LAYER}.g_idx", 1), [f"{LAYER}.g_idx", "out of their order", "desc_act"]),
        (with_value(f"{LAYER}.bias", 0.5), [f"{LAYER}.bias", "not zero"]),
        (with_value(f"{LAYER}.scales", np.nan), [f"{LAYER}.scales", "nan", "damaged"]),
        (with_value(f"{LAYER}.scales", 0), [f"{LAYER}.scales", "above zero"]),
        (with_value(f"{LAYER}.qzeros", -1), [f"{LAYER}.qzeros", "stored as 15"]),
        (without(f"{LAYER}.scales"), ["lacks", f"{LAYER}.scales", "gptq"]),
        (widened, [f"{LAYER}.qzeros", "[4, 4]", "[2, 4]"]),
        (one_piece_as_floats, ["as integers", f"{LAYER}.weight as floats", "one kind"]),
        (all_as_floats, ["quantized (gptq)", "*.qweight"]),
        (without("model.norm.weight"), ["lacks model.norm.weight"]),
    ],
)
def test_damage_is_named(damaged, change, words):
    with pytest.raises(CheckpointError) as refused:
        damaged("gptq-symmetric", change)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_group_that_does_not_divide_is_refused(damaged):
    with pytest.raises(CheckpointError, match="80 inputs, not a multiple of group_size 32"):
        damaged("gptq-symmetric", lambda tensors: None, intermediate_size=80)


def test_a_missing_index_of_groups_is_no_damage(damaged):
    def change(tensors):
        for name in [n for n in tensors if n.endswith((".g_idx", ".bias"))]:
            del tensors[name]

    assert damaged("gptq-symmetric", change).weights.imported


@pytest.mark.parametrize(
    ("case", "scales", "words"),
    [
        ("gptq-symmetric", "float16", ["holds scales as bfloat16", "--imported-scales bfloat16"]),
        ("gptq-asymmetric", "bfloat16", ["ignores zero points"]),
        ("gptq-8-bits", "bfloat16", ["only with one scale a row"]),
    ],
)
def test_a_target_refuses_what_it_would_get_wrong(damaged, tmp_path, case, scales, words):
    model = damaged(case, lambda tensors: None)
    options = ExportOptions(context=32, imported_scales=scales)
    with pytest.raises(ExportError) as refused:
        export(model, [find_target("executorch")], tmp_path / "out", options)
    assert all(word in str(refused.value) for word in words), refused.value
    assert not (tmp_path / "out").exists()


def test_rounded_scales_keep_the_integers_and_say_their_error(damaged, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    model = damaged("gptq-symmetric", lambda tensors: None)
    options = ExportOptions("int8", context=32, imported_scales="bfloat16")
    out = tmp_path / "out"
    export(model, [find_target("executorch")], out, options)
    manifest = Manifest.read(out)
    assert any("rounded to bfloat16" in note for note in manifest.notes)
    assert manifest.weights["lm_head.weight"].format == "int8-pc"
    for weight in model.weights.imported:
        record = manifest.weights[weight]
        assert (record.format, record.algorithm) == ("int4-g32", "imported")
        assert 2**-12 < record.relative_error < 2**-8
    assert verify(out, VerifyOptions(tokens=64, timed=False)).stored_weights_equal


def test_as_is_keeps_floats_in_their_dtype(tmp_path, packed_checkpoints):
    model = open_model("demo")
    plan = choose_plan(model, PlanRequest("as-is")).plan
    formats = {weight: a.format.name for weight, a in plan.weights.items()}
    assert formats["model.embed_tokens.weight"] == "bf16"
    assert formats["model.norm.weight"] == "fp32"


def test_a_scale_dtype_is_one_of_two():
    assert (scale_name("float16"), scale_name("bfloat16")) == ("float16", "bfloat16")
    with pytest.raises(UsageError, match=r"float32.*float16 or bfloat16"):
        scale_name("float32")


def test_the_command_line_names_the_method_that_it_cannot_import(tmp_path, packed_checkpoints):
    folder = tmp_path / "checkpoint"
    config = packed_checkpoints.family("llama")
    packed_checkpoints.write(folder, config, packed_checkpoints.CASES["awq"])
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"] = {"quant_method": "hqq"}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"'hqq'.*imports gptq, awq, compressed-tensors"):
        open_model(str(folder))
