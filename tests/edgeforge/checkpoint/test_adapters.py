"""An adapter beside or in place of a model is named, and never left out in silence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.errors import CheckpointError

LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    return path


def put_adapter(folder, config=LORA, weights="adapter_model.safetensors"):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"lora_A": torch.ones(2)}, folder / weights)


def refusal(source) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(source)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 3
    return message


def test_an_adapter_beside_a_model_is_named_with_how_to_merge_it(folder):
    put_adapter(folder)
    message = refusal(folder)
    assert f"{folder} holds adapter_model.safetensors, an adapter that is not merged" in message
    assert "LORA adapter for org/base" in message
    assert "merge_and_unload().save_pretrained(MERGED), and export MERGED" in message
    assert "or export the model with --adapter FOLDER" in message
    assert "to export the model without it, move its files away" in message


@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "non_lora_trainables.bin",
        "adapters.safetensors",
    ],
)
def test_each_file_of_an_adapter_is_enough(folder, name):
    (folder / name).write_bytes(b"{}")
    assert f"holds {name}, an adapter" in refusal(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    assert f"holds {name}, an adapter" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("adapters.safetensors", "mlx_lm.fuse --model BASE"),
        ("non_lora_trainables.bin", "the program that trained it"),
        ("adapter_model.bin", "peft, AutoPeftModelForCausalLM"),
    ],
)
def test_the_tool_that_merges_it_is_named(folder, name, tool):
    (folder / name).touch()
    assert f": merge it with {tool}" in refusal(folder)


@pytest.mark.parametrize("kept", ["config.json", None])
def test_an_adapter_alone_is_told_apart(folder, kept):
    (folder / "model.safetensors").unlink()
    if kept is None:
        (folder / "config.json").unlink()
    put_adapter(folder)
    message = refusal(folder)
    assert "an adapter, and not the model that it belongs to (LORA adapter for org/base)" in message
    assert "merge_and_unload" in message and "without it" not in message


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "ADAPTION_PROMPT"])
def test_an_adapter_that_no_weight_can_hold_is_not_to_be_merged(folder, kind):
    put_adapter(folder, {"peft_type": kind})
    message = refusal(folder)
    assert kind in message and "cannot be merged" in message and "merge_and_unload" not in message


@pytest.mark.parametrize(
    "config", [b"", b"[]", b'{"peft_type": 3}', b'{"peft_type": "\\u001b[31m"}', b"{" * 9999]
)
def test_a_configuration_of_any_content_is_told_in_one_line(folder, config):
    (folder / "adapter_config.json").write_bytes(config)
    message = refusal(folder)
    assert "holds adapter_config.json, an adapter" in message and message.isprintable()


def test_adapters_of_a_trainings_steps_are_not_the_checkpoints(folder):
    for name in ("checkpoint-50", "adapter"):
        (folder / name).mkdir()
        put_adapter(folder / name)
    assert list(Checkpoint.open(folder).tensors) == ["a"]
    shutil.rmtree(folder / "adapter")
    assert "an adapter, and not the model" in refusal(folder / "checkpoint-50")
