"""Finds adapters, which change what a model computes and are not part of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from edgeforge.checkpoint.json_text import MAX_CONFIG_BYTES, parse_object, read_small_file
from edgeforge.errors import CheckpointError

ADAPTER_CONFIG: Final = "adapter_config.json"
# The weights of an adapter, as peft, LLaVA's training, the package "adapters" and MLX name them.
_WEIGHTS: Final = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "non_lora_trainables.bin",
    "pytorch_adapter.bin",
    "adapters.safetensors",
    "adapters.npz",
)
# Adapters that add tokens, keys or values of their own: no weight could hold them.
_NOT_MERGEABLE: Final = (
    "ADAPTION_PROMPT",
    "CPT",
    "MULTITASK_PROMPT_TUNING",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
)


def refuse_adapter(folder: Path, source: str, has_weights: bool) -> None:
    """Refuses a folder that holds an adapter: EdgeForge would export the model without it.

    Adapters in folders inside it, such as those of a training's steps, are not the checkpoint's
    (`inner_adapters`).

    Args:
        folder: the folder.
        source: the folder or hub id that the user gave.
        has_weights: whether the folder holds a model's weights too.

    Raises:
        CheckpointError: the message names the adapter and says how to merge it.
    """
    found = [name for name in (ADAPTER_CONFIG, *_WEIGHTS) if _is_there(folder / name)]
    if not found:
        return
    about = _read_about(folder / ADAPTER_CONFIG) if found[0] == ADAPTER_CONFIG else {}
    kind, base = _text(about.get("peft_type")), _text(about.get("base_model_name_or_path"))
    title = " ".join(part for part in (kind, "adapter", f"for {base}" if base else "") if part)
    first = (
        f"{source} holds {found[-1]}, an adapter that is not merged into the weights beside it"
        if has_weights
        else f"{source} holds {found[-1]}, an adapter, and not the model that it belongs to"
    )
    first += f" ({title})" if about else ""
    if kind in _NOT_MERGEABLE:
        raise CheckpointError(
            f"{first}: adapters of this kind cannot be merged into weights, and EdgeForge does not "
            f"export them: give a checkpoint without one"
        )
    own = "; or export the model with --adapter FOLDER, FOLDER with the adapter's files alone"
    own = own if kind == "LORA" else ""
    alone = "; to export the model without it, move its files away" if has_weights else ""
    raise CheckpointError(f"{first}: merge it with {_tool(found)}, and export MERGED{own}{alone}")


def _tool(found: list[str]) -> str:
    """Returns what merges an adapter that has these files, and how."""
    if found[-1].startswith("adapters."):
        return "mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path MERGED"
    if ADAPTER_CONFIG not in found and found[-1] == "non_lora_trainables.bin":
        return "the program that trained it, which saves a folder MERGED"
    return (
        "peft, AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
        ".save_pretrained(MERGED)"
    )


def inner_adapters(folder: Path) -> list[str]:
    """Returns the folders inside a checkpoint that hold adapters, which are not part of it."""
    try:
        return sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    except OSError:
        return []


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _read_about(path: Path) -> dict[str, object]:
    """Returns the adapter's configuration; empty where it cannot be read."""
    try:
        return parse_object(read_small_file(path, MAX_CONFIG_BYTES), str(path), strict=False)
    except CheckpointError:
        return {}


def _text(value: object) -> str:
    """Returns a text of the configuration in one short line, "" where it is no text."""
    return value[:200] if isinstance(value, str) and value.isprintable() else ""
