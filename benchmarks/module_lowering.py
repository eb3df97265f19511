"""Measures how far artifacts of modules are from their quantized modules: models of transformers.

They have random weights, width 64 and two layers, 8 bits, and a dynamic batch; texts have a dynamic
length, too. Each row is the largest difference of any output, relative to its range, as `verify`
finds it.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from edgeforge import api
from edgeforge.errors import CheckFailed
from exporters.errors import ExportError
from exporters.modules.manifest import ModuleManifest
from exporters.modules.registry import MODULE_TARGETS

LAYERS = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
}
TEXT = {"vocab_size": 100, "max_position_embeddings": 32}
IMAGE = {"image_size": 32, "patch_size": 8}
ENDS = {"eos_token_id": 99, "bos_token_id": 98, "pad_token_id": 0}
WHISPER = {
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "num_mel_bins": 16,
    "max_source_positions": 25,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
RESNET = {
    "embedding_size": 16,
    "hidden_sizes": [16, 32],
    "depths": [1, 1],
    "layer_type": "basic",
}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "BERT": lambda: transformers.BertModel(transformers.BertConfig(**LAYERS, **TEXT)),
    "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**LAYERS, **IMAGE)),
    "CLIP, text": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**LAYERS, **TEXT, **ENDS)
    ),
    "CLIP, vision": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**LAYERS, **IMAGE)
    ),
    "Whisper's encoder": lambda: WhisperEncoder(transformers.WhisperConfig(**WHISPER)),
    "ResNet": lambda: transformers.ResNetModel(transformers.ResNetConfig(**RESNET)),
    "MobileNetV2": lambda: transformers.MobileNetV2Model(
        transformers.MobileNetV2Config(image_size=32)
    ),
}
BATCH, LENGTH = torch.export.Dim("batch", max=8), torch.export.Dim("length", min=2, max=32)


def inputs(name: str) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, object]]]:
    """Example inputs of a model and their dynamic dimensions."""
    if name in ("BERT", "CLIP, text"):
        ids = torch.randint(1, 98, (2, 9))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return given, {key: {0: BATCH, 1: LENGTH} for key in given}
    if name == "Whisper's encoder":
        return {"input_features": torch.randn(2, 16, 50)}, {"input_features": {0: BATCH}}
    return {"pixel_values": torch.randn(2, 3, 32, 32)}, {"pixel_values": {0: BATCH}}


def measured(name: str, target: str, folder: Path) -> str:
    """The largest lowering error of a model's outputs, or that `verify` fails."""
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    given, shapes = inputs(name)
    try:
        (made,) = api.export_module(module, given, folder, dynamic_shapes=shapes, targets=[target])
        found = api.verify_module(made)
    except (CheckFailed, ExportError) as error:
        return f"fails: {error}"
    floats = len(ModuleManifest.read(made).floats)
    largest = max(each.lowering for each in found.outputs)
    return f"{largest:.1e}" + (f" ({floats} weights in float)" if floats else "")


def main() -> None:
    """Prints a row for each model, as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--targets", nargs="+", choices=MODULE_TARGETS, default=[*MODULE_TARGETS])
    asked = parser.parse_args()
    print("model", *asked.targets, sep=" | ", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for name in asked.models:
            row = [measured(name, each, Path(root) / name / each) for each in asked.targets]
            print(name, *row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
