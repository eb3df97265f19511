"""Checkpoints of MLX, FP8 and bitsandbytes' 4 bits: what is read, kept and stated."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from edgeforge.checkpoint.imported.registry import METHODS, read_method
from edgeforge.errors import CheckpointError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.planning.choose import PlanRequest, choose_plan
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from edgeforge.weight_store import quantize
from exporters.manifest import Manifest
from exporters.registry import find_target

pytestmark = pytest.mark.usefixtures("one_thread")

BNB = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "_load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": ["lm_head"],
}


def compressed(strategy, block=None):
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": strategy,
        "block_structure": block,
        "group_size": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
        "actorder": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": {"num_bits": 8, "type": "float", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "kv_cache_scheme": None,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


# name: bits, group size and dtype of MLX; or name of the scales, block and section of FP8
MLX = {
    "mlx-4": (4, 64, "bfloat16"),
    "mlx-4-32": (4, 32, "float16"),
    "mlx-8": (8, 32, "float16"),
    "mlx-8-bfloat16": (8, 64, "bfloat16"),
}
FORMATS = {
    "mlx-4": "int4-g64-asym",
    "mlx-4-32": "int4-g32-asym-f16",
    "mlx-8": "int8-g32-asym-f16",
    "mlx-8-bfloat16": "int8-g64-asym",
}
FP8 = {
    "fp8-blocks": (
        "weight_scale_inv",
        (48, 32),
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [48, 32],
        },
    ),
    "fp8-tensor": (
        "weight_scale_inv",
        None,
        {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": ["lm_head"],
            "weight_block_size": None,
        },
    ),
    "fp8-fbgemm": (
        "weight_scale",
        "row",
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": []},
    ),
    "fp8-compressed-rows": ("weight_scale", "row", compressed("channel")),
    "fp8-compressed-tensor": ("weight_scale", None, compressed("tensor")),
    "fp8-compressed-blocks": ("weight_scale", (16, 64), compressed("block", [16, 64])),
}
CASES = (*MLX, *FP8, "nf4", "nf4-nested")


def linear(quantize):
    """Quantizes the linear layers alone."""
    return lambda name, weight: quantize(weight) if "_proj" in name else None


def recipe(oracle, case):
    """What quantizes a matrix, and the section of the configuration."""
    if case in MLX:
        bits, size, dtype = MLX[case]
        section = {"group_size": size, "bits": bits}
        made = lambda _, weight: oracle.mlx(weight, bits, size, dtype)  # noqa: E731
        return made, {"quantization": section, "quantization_config": section}
    if case in FP8:
        scales, block, section = FP8[case]
        return linear(lambda w: oracle.fp8(w, scales, block)), {"quantization_config": section}
    nested = case == "nf4-nested"
    section = BNB | {"bnb_4bit_use_double_quant": nested}
    return linear(lambda w: oracle.nf4(w, nested)), {"quantization_config": section}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, packed_checkpoints, quantized_floats):
    made = {}

    def checkpoint(case, kind="llama"):
        if (case, kind) not in made:
            config = packed_checkpoints.family(kind, intermediate_size=128)
            quantize, section = recipe(quantized_floats, case)
            folder = tmp_path_factory.mktemp("floats") / "checkpoint"
            made[case, kind] = (
                folder,
                quantized_floats.write(folder, config, quantize, section),
            )
        return made[case, kind]

    return checkpoint


def test_every_method_is_tried_here_or_with_the_packings(quantized_floats):
    sections = [recipe(quantized_floats, case)[1].get("quantization_config") for case in CASES]
    tried = {section["quant_method"] for section in sections if "quant_method" in section}
    assert tried | {"gptq", "awq"} == set(METHODS)


def wanted(values, spec):
    return np.concatenate([values[p.tensor][p.first : p.first + p.shape[0]] for p in spec.pieces])


@pytest.mark.parametrize(
    ("case", "kind"), [*((case, "llama") for case in CASES), ("mlx-4", "phi3"), ("nf4", "phi3")]
)
def test_weights_are_the_values_that_the_format_stands_for(checkpoint, case, kind):
    folder, values = checkpoint(case, kind)
    model = open_model(str(folder))
    seen = set()
    for name, spec in model.spec.weights.items():
        tensors = {piece.tensor for piece in spec.pieces}
        if not tensors <= values.keys():
            assert not tensors & values.keys()
            continue
        found = model.weights.float_weight(name)
        exact = wanted(values, spec)
        # float32 holds products of scales and codes to its last bit or so.
        assert np.abs(found.double().numpy() - exact).max() <= 2e-7 * np.abs(exact).max()
        assert torch.equal(model.weights.read_rows(name, 5, 9).float(), found[5:9])
        seen |= tensors
    assert seen == values.keys()
    formats = {format.name for format in model.weights.imported.values()}
    assert formats == ({FORMATS[case]} if case in MLX else set())


@pytest.mark.parametrize("case", MLX)
def test_the_integers_of_mlx_are_kept(checkpoint, case, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    folder, values = checkpoint(case)
    model = open_model(str(folder))
    planned = choose_plan(model, PlanRequest())
    assert planned.plan.recipe == "as-is"
    store = quantize(model.weights, model.checkpoint.digest(), planned.plan, 1, lambda *_: None)
    stored_values(store, model, values, MLX[case][0])


def stored_values(store, model, values, bits):
    """The store's integers stand for the checkpoint's values, up to the error that it states."""
    with safe_open(store.file, "pt") as stored:
        for name in model.weights.imported:
            exact = wanted(values, model.spec.weights[name])
            codes = stored.get_tensor(f"{name}:codes").numpy()
            if bits == 4:
                codes = np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)
            scale = stored.get_tensor(f"{name}:scale").double().numpy()
            points = stored.get_tensor(f"{name}:zero_point").numpy()
            if bits == 4:
                points = np.stack((points & 15, points >> 4), -1).reshape(len(points), -1)
            points = points[:, : scale.shape[1]]
            steps = codes.reshape(*scale.shape, -1).astype(np.float64) - points[..., None]
            found = (steps * scale[..., None]).reshape(exact.shape)
            error = np.sqrt(((found - exact) ** 2).sum() / (exact**2).sum())
            assert store.relative_error[name] == pytest.approx(error, rel=1e-3, abs=1e-9)
            # Half a unit of the last place of scale and bias, of a quantized weight.
            assert error < 0.01


def test_offsets_that_are_no_zero_points_are_read_as_floats(
    checkpoint, tmp_path, packed_checkpoints, quantized_floats
):
    def shifted(name, weight):
        parts, values = quantized_floats.mlx(weight, 4, 32, "float16")
        if name.endswith("layers.0.mlp.down_proj.weight"):
            moved = (parts["biases"] + parts["scales"] * np.float16(0.4)).astype(np.float16)
            change = moved.astype(np.float64) - parts["biases"].astype(np.float64)
            values = values + change.repeat(32, axis=1)
            parts["biases"] = moved
        return parts, values

    folder = tmp_path / "checkpoint"
    config = packed_checkpoints.family("llama")
    section = {"quantization": {"group_size": 32, "bits": 4}}
    values = quantized_floats.write(folder, config, shifted, section)
    model = open_model(str(folder))
    name = "model.layers.0.mlp.down_proj.weight"
    assert name not in model.weights.imported and len(model.weights.imported) == 11
    found = model.weights.float_weight(name).double().numpy()
    assert np.abs(found - values[name]).max() < 1e-6
    notes = choose_plan(model, PlanRequest()).notes
    assert any("down_proj could not stay integers" in note for note in notes)


def test_modules_of_mlx_with_a_width_of_their_own(tmp_path, packed_checkpoints, quantized_floats):
    wide, plain = "model.layers.1.mlp.down_proj", "lm_head"

    def mixed(name, weight):
        module = name.removesuffix(".weight")
        if module == plain:
            return None
        width = (8, 32) if module == wide else (4, 64)
        return quantized_floats.mlx(weight, *width)

    section = {"group_size": 64, "bits": 4, wide: {"group_size": 32, "bits": 8}, plain: False}
    folder = tmp_path / "checkpoint"
    config = packed_checkpoints.family("llama", intermediate_size=128)
    values = quantized_floats.write(folder, config, mixed, {"quantization": section})
    model = open_model(str(folder))
    formats = {name: format.name for name, format in model.weights.imported.items()}
    assert formats.pop(f"{wide}.weight") == "int8-g32-asym"
    assert set(formats.values()) == {"int4-g64-asym"} and "lm_head.weight" not in formats
    found = model.weights.float_weight(f"{wide}.weight").double().numpy()
    assert np.abs(found - values[f"{wide}.weight"]).max() < 1e-6


def test_stacked_matrices_of_two_widths_are_read_as_floats(
    tmp_path, packed_checkpoints, quantized_floats
):
    wide = "model.layers.0.self_attn.k_proj"

    def mixed(name, weight):
        return quantized_floats.mlx(weight, 8 if name.startswith(wide) else 4, 32)

    section = {"group_size": 32, "bits": 4, wide: {"group_size": 32, "bits": 8}}
    folder = tmp_path / "checkpoint"
    config = packed_checkpoints.family("llama")
    values = quantized_floats.write(folder, config, mixed, {"quantization": section})
    model = open_model(str(folder))
    name = "model.layers.0.self_attn.qk_proj.weight"
    assert name not in model.weights.imported
    exact = wanted(values, model.spec.weights[name])
    assert np.abs(model.weights.float_weight(name).double().numpy() - exact).max() < 1e-6


@pytest.mark.parametrize("case", ["mlx-4", "fp8-blocks", "nf4-nested"])
def test_an_artifact_says_what_its_weights_went_through(checkpoint, case, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    folder, _ = checkpoint(case)
    out = tmp_path / "out"
    export(open_model(str(folder)), [find_target("onnx")], out, ExportOptions(context=32))
    found = verify(out, VerifyOptions(tokens=64, timed=False))
    assert found.stored_weights_equal
    assert found.lowering.relative_difference < 0.05
    manifest = Manifest.read(out)
    words = {
        "mlx-4": "stored as the checkpoint has them (MLX",
        "fp8-blocks": "FP8 with scales of 48 x 32 blocks",
        "nf4-nested": "NF4 in blocks of 64, factors of 8 bits",
    }[case]
    assert any(words in note for note in manifest.notes), manifest.notes
    assert words in (out / "CARD.md").read_text(encoding="utf-8")
    record = manifest.weights["model.layers.0.mlp.down_proj.weight"]
    assert (record.algorithm == "imported") == (case == "mlx-4")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"quantization": {"bits": 3, "group_size": 64}}, ["bits is 3"]),
        ({"quantization": {"bits": 4, "group_size": 16}}, ["group_size is 16", "32, 64, 128"]),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, ["mode", "mxfp4"]),
        ({"quantization": {"bits": 4, "group_size": 32, "rot": 1}}, ["'rot'"]),
        ({"quantization_config": {**BNB, "load_in_8bit": True}}, ["load_in_8bit", "NF4"]),
        ({"quantization_config": {**BNB, "bnb_4bit_quant_storage": "bfloat16"}}, ["storage"]),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            ["size of blocks", "[128]"],
        ),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, ["e5m2"]),
        ({"quantization_config": compressed("group")}, ["strategy", "group"]),
    ],
)
def test_what_is_not_read_is_refused_by_name(section, words):
    with pytest.raises(CheckpointError) as refused:
        read_method(section)
    assert all(word in str(refused.value) for word in words), refused.value


LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("mlx-4", {f"{LAYER}.biases": None}, [f"{LAYER}.biases"]),
        ("mlx-4", {f"{LAYER}.weight": np.zeros((64, 8), np.int32)}, [f"{LAYER}.weight", "uint32"]),
        ("mlx-4", {f"{LAYER}.scales": np.full((64, 2), np.nan, np.float16)}, ["no finite"]),
        ("fp8-blocks", {f"{LAYER}.weight_scale_inv": None}, [f"{LAYER}.weight_scale_inv"]),
        (
            "fp8-blocks",
            {f"{LAYER}.weight_scale_inv": np.ones((3, 3), np.float32)},
            [f"{LAYER}.weight_scale_inv", "[3, 3]", "[2, 4]"],
        ),
        ("nf4", {f"{LAYER}.weight.absmax": None}, [f"{LAYER}.weight.absmax"]),
        ("nf4", {f"{LAYER}.weight.absmax": np.ones(3, np.float32)}, ["128 values of float32"]),
        (
            "nf4",
            {f"{LAYER}.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)},
            [f"{LAYER}.weight.quant_state.bitsandbytes__nf4"],
        ),
        (
            "nf4-nested",
            {f"{LAYER}.weight.quant_state.bitsandbytes__nf4": None},
            [f"{LAYER}.weight.quant_state"],
        ),
    ],
)
def test_damaged_parts_are_named(checkpoint, case, change, words, tmp_path):
    folder, _ = checkpoint(case)
    tensors = load_file(folder / "model.safetensors")
    for name, value in change.items():
        assert name in tensors
        del tensors[name]
        if value is not None:
            tensors[name] = torch.from_numpy(value.copy())
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        open_model(str(tmp_path))
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize("case", ["mlx-4", "fp8-blocks", "nf4"])
def test_a_config_that_does_not_belong_to_the_weights(checkpoint, case, tmp_path):
    folder, _ = checkpoint(case)
    config = json.loads((folder / "config.json").read_text())
    for section in ("quantization", "quantization_config"):
        config.pop(section, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"says how: take the config\.json that belongs to it"
    ):
        open_model(str(tmp_path))


def test_values_that_are_no_numbers_are_seen_when_they_are_read(checkpoint, tmp_path):
    folder, _ = checkpoint("fp8-tensor")
    tensors = load_file(folder / "model.safetensors")
    spoiled = tensors[f"{LAYER}.weight"].view(torch.uint8)
    spoiled[0, 0] = 0x7F
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    weights = open_model(str(tmp_path)).weights
    with pytest.raises(CheckpointError, match=f"{LAYER}.weight .*no finite numbers"):
        weights.float_weight(f"{LAYER}.weight")
