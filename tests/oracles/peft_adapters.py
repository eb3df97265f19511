"""Adapters in peft's format: trained by nobody, saved by peft itself, or written field by field."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    """An adapter of these tensors, named as transformers names the model's modules."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def factors(shapes: dict[str, tuple[int, int]], rank=4, seed=0, size=0.3) -> dict:
    """Random factors for modules whose matrices have these shapes, ``(out, in)``."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for module, (rows, columns) in shapes.items():
        found[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=random) * size
        found[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=random) * size
    return found


def saved_by_peft(base: Path, folder: Path, seed=1, **config: object) -> Path:
    """An adapter with random weights for a checkpoint, saved by peft."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**config))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    adapted.save_pretrained(folder)
    return folder


def loaded_by_peft(base: Path, *folders: Path):
    """The checkpoint with adapters on it, as peft loads them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, folders[0], adapter_name="0")
    for place, folder in enumerate(folders[1:], 1):
        adapted.load_adapter(folder, adapter_name=str(place))
    return adapted.eval()
