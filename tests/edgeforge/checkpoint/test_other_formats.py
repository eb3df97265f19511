"""Folders of weights in other formats are named for what they are, with what to do."""

import pytest

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.checkpoint.other_formats import name_other_format
from edgeforge.errors import CheckpointError

FORMATS = {
    "model-Q4_K_M.gguf": "weights of llama.cpp",
    "consolidated.00.pth": "publisher's own format (Meta's or Mistral's)",
    "consolidated.safetensors": "publisher's own format (Meta's or Mistral's)",
    "model.onnx": "exported to ONNX already",
    "openvino_model.xml": "exported to OpenVINO already",
    "tf_model.h5": "from_tf=True",
    "flax_model.msgpack": "from_flax=True",
    "weights.npz": "weights of MLX",
    "zero_to_fp32.py": "DeepSpeed",
    "model-00001-of-00002.safetensors": "add model.safetensors.index.json",
    "pytorch_model-00001-of-00002.bin": "add pytorch_model.bin.index.json",
    "weights.safetensors": "name it model.safetensors",
    "pytorch_model.pt": "not the name of a checkpoint's weights",
    "edgeforge.json": "an exported artifact, not a checkpoint",
}


def refusal(source) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(source)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 3
    return message


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_of_another_format_is_named(tmp_path, name, config):
    if config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for other in (name, "README.md", "tokenizer.json", "optimizer.pt", "training_args.bin"):
        (tmp_path / other).write_bytes(b"x")
    message = refusal(tmp_path)
    first = "has no weights: model.safetensors," if config else "has no config.json; it has"
    assert first in message and f"it has {name}, " in message and FORMATS[name] in message


def test_folders_inside_count_and_states_of_a_training_do_not(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "optimizer.pt").touch()
    (tmp_path / ".cache.bin").touch()
    assert refusal(tmp_path).endswith("pytorch_model.bin is needed")
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    assert "accelerate merge-weights" in refusal(tmp_path)
    assert name_other_format(["onnx/model.onnx"]).startswith("onnx, a model that is exported")
    assert name_other_format(["a.gguf", "b.gguf"]).startswith("a.gguf and 1 more, weights of")
    assert name_other_format([]) is None


def test_a_file_or_a_package_of_another_format_is_named(tmp_path):
    (tmp_path / "m.onnx").touch()
    assert f"{tmp_path / 'm.onnx'} is not the folder of a checkpoint" in (
        message := refusal(tmp_path / "m.onnx")
    )
    assert "it is m.onnx, a model that is exported to ONNX" in message
    (tmp_path / "m.mlpackage").mkdir()
    (tmp_path / "m.mlpackage" / "Manifest.json").touch()
    assert "m.mlpackage, an exported artifact" in refusal(tmp_path / "m.mlpackage")
