"""Says what a checkpoint is whose tensors are not those that its configuration calls for."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Final

from edgeforge.checkpoint.tensor_entry import TensorEntry

_ORIGINAL: Final = "give the original checkpoint, in bfloat16, float16 or float32"
_UNSAID: Final = (
    "but config.json has no quantization_config that says how: take the config.json that belongs "
    "to it, or the original checkpoint"
)

# Patterns of names, the dtypes that belong to them ("" for any), and what such a checkpoint is. The
# first row that matches decides.
_SIGNS: Final[tuple[tuple[str, str, str], ...]] = (
    (
        "*.lora_[AB].*",
        "",
        "holds an adapter that is not merged into its weights: merge it with peft's "
        "merge_and_unload and save the model again",
    ),
    (
        "*.base_layer.*",
        "",
        "was saved from a model with an adapter: merge it with peft's merge_and_unload and save "
        "the model again",
    ),
    ("*.quant_state.bitsandbytes__*", "", f"is quantized by bitsandbytes, {_UNSAID}"),
    ("*.weight.quant_map", "", f"is quantized by bitsandbytes, {_UNSAID}"),
    ("*.SCB", "", f"is quantized to 8 bits by bitsandbytes: {_ORIGINAL}"),
    (
        "*.weight",
        "uint32",
        "is quantized by MLX, but config.json has no section quantization that says how: take the "
        "config.json that belongs to it, or the original checkpoint",
    ),
    ("*_blocks", "uint8", f"is quantized to MXFP4: {_ORIGINAL}"),
    ("*.weight", "float8", f"is quantized to FP8, {_UNSAID}"),
    ("*.weight", "int8", f"is quantized to 8-bit integers in a layout of its own: {_ORIGINAL}"),
    (
        "*.qweight",
        "int32",
        "is quantized by GPTQ or AWQ, but config.json has no quantization_config that says how: "
        "take the config.json that belongs to it, or the original checkpoint",
    ),
    (
        "*.weight_packed",
        "",
        "is quantized by compressed-tensors, but config.json has no quantization_config that says "
        "how: take the config.json that belongs to it, or the original checkpoint",
    ),
    (
        "tok_embeddings.weight",
        "",
        "has the tensors' names of the publisher's own format (Meta's or Mistral's): take the "
        "checkpoint in transformers' format, or convert it with transformers 4's "
        "convert_llama_weights_to_hf.py",
    ),
)
# What wraps a model puts its own name before the tensors' names.
_WRAPPERS: Final = ("_orig_mod.", "module.", "base_model.model.", "language_model.", "model.model.")


def explain(tensors: Mapping[str, TensorEntry]) -> str | None:
    """Returns what is known about a checkpoint by its tensors: a clause after "the checkpoint".

    Args:
        tensors: the checkpoint's tensors by name.

    Returns:
        The clause, which says what to do; None where nothing is known.
    """
    for pattern, dtype, what in _SIGNS:
        for name, entry in tensors.items():
            if entry.dtype.startswith(dtype) and fnmatchcase(name, pattern):
                return f"{what} (it holds {name[:200]})"
    wrapper = next(
        (w for w in _WRAPPERS if tensors and all(n.startswith(w) for n in tensors)), None
    )
    if wrapper is None:
        return None
    return (
        f"has {wrapper!r} before every tensor's name, as a model has that is wrapped in another: "
        f"save the model inside, with save_pretrained"
    )
