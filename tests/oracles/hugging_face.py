"""Tiny checkpoints written by transformers, and transformers' own float32 logits for them."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def class_of(config):
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def save(folder: Path, config: dict, dtype="float32", shard_size="1GB", seed=0) -> Path:
    """Random weights at a configuration's shape, saved by ``save_pretrained``.

    Norm scales differ from one and matrices are large enough that attention is far from uniform,
    so that a norm or a rotation that is left out shows.
    """
    fields = dict(config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = class_of(config).from_config(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * 2 / parameter.shape[1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def set_config(folder: Path, remove=(), **changes) -> dict:
    """Edits config.json in place; returns it."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    for field in remove:
        config.pop(field, None)
    path.write_text(json.dumps(config))
    return config


def old_spelling(folder: Path) -> dict:
    """Rewrites ``rope_parameters`` as the ``rope_theta`` and ``rope_scaling`` of older files."""
    config = json.loads((folder / "config.json").read_text())
    rope = dict(config["rope_parameters"])
    changes = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
    if "partial_rotary_factor" in rope:
        changes["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] != "default":
        rope["type"] = rope.pop("rope_type")
        if config["model_type"] == "phi3":
            del rope["original_max_position_embeddings"]
        changes["rope_scaling"] = rope
    return set_config(folder, ("rope_parameters",), torch_dtype=config["dtype"], **changes)


def logits(folder: Path, tokens, **overrides) -> torch.Tensor:
    """``float32[t, vocab]`` of one full pass; ``overrides`` replace fields of the configuration.

    The model is loaded in its own dtype and computed in float32: a constant that it rounds to its
    dtype stays rounded.
    """
    config = AutoConfig.from_pretrained(folder)
    for field, value in overrides.items():
        setattr(config, field, value)
    model = class_of(config).from_pretrained(
        folder, config=config, dtype="auto", attn_implementation="eager"
    )
    model = model.float().eval()
    with torch.no_grad():
        return model(torch.as_tensor(tokens).reshape(1, -1), use_cache=False).logits[0]
