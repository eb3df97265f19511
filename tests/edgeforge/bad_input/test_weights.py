"""Checkpoints whose config and tensors do not agree, and weights that are not finite."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

CHECKPOINT, QUANTIZATION = 3, 4


def change_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def change_tensors(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_an_unknown_model_type_lists_those_known(checkpoint, export):
    change_config(checkpoint, model_type="lama")
    shown = export(checkpoint, CHECKPOINT, "model_type 'lama'", "did you mean 'llama'?")
    assert all(family in shown for family in ("llama", "mistral", "openelm", "phi3"))
    change_config(checkpoint, model_type=None)
    export(checkpoint, CHECKPOINT, "model_type None")


def test_a_field_that_changes_the_maths_is_named(checkpoint, export):
    change_config(checkpoint, clip_qkv=8.0)
    export(checkpoint, CHECKPOINT, "'clip_qkv'", "--ignore-config clip_qkv")


def test_a_missing_tensor_is_named(checkpoint, export):
    change_tensors(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    export(checkpoint, CHECKPOINT, "lacks model.layers.1.mlp.up_proj.weight")


def test_an_extra_tensor_is_named(checkpoint, export):
    change_tensors(checkpoint, lambda t: t.update({"model.layers.0.bias": torch.ones(3)}))
    export(checkpoint, CHECKPOINT, "holds model.layers.0.bias")


def test_a_tensor_of_another_shape_is_named(checkpoint, export):
    change_tensors(checkpoint, lambda t: t.update({"model.norm.weight": torch.ones(127)}))
    export(checkpoint, CHECKPOINT, "model.norm.weight has shape [127]", "calls for [128]")


def test_a_tensor_of_another_dtype_is_named(checkpoint, export):
    ones = torch.ones(128, dtype=torch.int8)
    change_tensors(checkpoint, lambda t: t.update({"model.norm.weight": ones}))
    export(checkpoint, CHECKPOINT, "model.norm.weight is int8", "bfloat16, float16, float32")


@pytest.mark.parametrize("recipe", ["int4", "int8", "fp16"])
@pytest.mark.parametrize(("bad", "words"), [(torch.nan, "NaN"), (torch.inf, "an infinite value")])
def test_what_is_not_finite_is_named_with_its_row(checkpoint, export, bad, words, recipe):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.k_proj.weight"][5, 7] = bad

    change_tensors(checkpoint, spoil)
    options = ("--recipe", recipe)
    # The program stacks q, k and v; the message names the checkpoint's own tensor and row.
    named = f"model.layers.0.self_attn.k_proj.weight has {words} in row 5"
    export(checkpoint, QUANTIZATION, named, options=options)


def test_a_norm_that_is_not_finite_is_named(checkpoint, export):
    change_tensors(checkpoint, lambda t: t["model.norm.weight"].__setitem__(9, torch.nan))
    export(checkpoint, QUANTIZATION, "model.norm.weight has NaN")


def test_what_float16_cannot_hold_is_named(checkpoint, export):
    def spoil(tensors):
        tensors["model.embed_tokens.weight"][300, 0] = 1e6

    change_tensors(checkpoint, spoil)
    options = ("--recipe", "fp16")
    shown = export(
        checkpoint, QUANTIZATION, "model.embed_tokens.weight", "row 300", options=options
    )
    assert shown.endswith(": keep it fp32\n")
    # The Neural Engine has no float32: the advice holds there too.
    ane = (*options, "--target", "coreml", "--profile", "ane")
    shown = export(checkpoint, QUANTIZATION, "row 300", options=ane)
    assert shown.endswith(": keep it fp32 with --profile gpu\n")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"is_causal": False}, "sets is_causal to false"),
        ({"architectures": ["LlamaBidirectionalModel"]}, "architecture LlamaBidirectionalModel"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no head of a causal language"),
        ({"is_encoder_decoder": True}, "sets 'is_encoder_decoder' to True"),
    ],
)
@pytest.mark.parametrize("target", ["onnx", "coreml", "executorch"])
def test_what_is_no_causal_language_model_is_refused(checkpoint, export, fields, words, target):
    change_config(checkpoint, **fields)
    export(checkpoint, CHECKPOINT, words, options=("--target", target))


@pytest.mark.parametrize("target", ["onnx", "coreml", "executorch"])
def test_an_adapter_beside_the_weights_is_refused(checkpoint, export, target):
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    words = ("an adapter that is not merged", "merge_and_unload")
    export(checkpoint, CHECKPOINT, *words, options=("--target", target))
