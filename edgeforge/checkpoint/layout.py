"""Finds the weight files, in order, and the tokenizer files of a checkpoint folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgeforge.checkpoint.json_text import (
    MAX_INDEX_BYTES,
    parse_object,
    read_small_file,
    reason,
    refuse_git_lfs_pointer,
)
from edgeforge.checkpoint.links import leads_out, refuse_dangling
from edgeforge.errors import CheckpointError
from quant.input_files import is_inside, open_input

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "rwkv_vocab_v20230424.txt",
    "vocab.txt",
)
# One of these is enough to turn text into tokens.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "rwkv_vocab_v20230424.txt")

# `find_weights` tries safetensors before pickles, and a single file before shards.
SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHT_FILE_OF_LLAMA_CPP = ".gguf"


@dataclass(frozen=True)
class WeightLayout:
    """The weight files of a folder.

    Attributes:
        files: Names of the weight files relative to the folder, sorted.
        index: Tensor name to file name, or None when one file holds everything.
        is_torch: Whether the files are torch's rather than safetensors.
    """

    files: tuple[str, ...]
    index: dict[str, str] | None
    is_torch: bool


def is_there(path: Path) -> bool:
    """Tells whether something other than a folder has this name.

    It may be no regular file: then whatever opens it says so, which is better than to miss it.
    """
    return path.exists() and not path.is_dir()


def find_weights(folder: Path) -> WeightLayout | None:
    """Return the weight files of a folder, or None when it has neither a file nor an index.

    An index may list files that are not there.

    Raises:
        CheckpointError: The index is damaged.
    """
    for whole, index_name, is_torch in (
        (SAFETENSORS, SAFETENSORS_INDEX, False),
        (TORCH, TORCH_INDEX, True),
    ):
        if is_there(folder / whole):
            return WeightLayout((whole,), None, is_torch)
        if is_there(folder / index_name):
            index = _read_index(folder / index_name)
            return WeightLayout(tuple(sorted(set(index.values()))), index, is_torch)
    return None


def _read_index(path: Path) -> dict[str, str]:
    content = parse_object(read_small_file(path, MAX_INDEX_BYTES), str(path), strict=True)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map from tensor names to files")
    index: dict[str, str] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_inside(file):
            raise CheckpointError(
                f"{path} places tensor {name[:200]!r} in {str(file)[:200]!r}; EdgeForge reads only "
                "files inside the checkpoint's folder"
            )
        index[name] = file
    return index


def find_tokenizer_files(folder: Path) -> dict[str, Path]:
    """Return the tokenizer files of a folder, by name; without those that lead out of it.

    An artifact gets copies of these files, and a link of a stranger's checkpoint could lead to any
    file of the user's.

    Raises:
        CheckpointError: A file cannot be read, is a link to nothing, or is a Git LFS pointer, for
            which a tokenizer library would only report a parse error.
    """
    for name in TOKENIZER_FILES:
        refuse_dangling(folder / name)
    present = {name: folder / name for name in TOKENIZER_FILES if is_there(folder / name)}
    found = {name: path for name, path in present.items() if leads_out(path, folder) is None}
    for path in found.values():
        try:
            with open_input(path) as file:
                refuse_git_lfs_pointer(path, file.read(64))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    return found
