"""Opens a GGUF file as a checkpoint: its configuration, tensors and tokenizer files."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeforge.cache import writable_cache
from edgeforge.checkpoint.gguf.architectures import (
    Architecture,
    Fields,
    base_config,
    find_architecture,
)
from edgeforge.checkpoint.gguf.header import GgufHeader, Value, read_header
from edgeforge.checkpoint.gguf.metadata import Metadata, shortest
from edgeforge.checkpoint.gguf.rope import TABLES, rope_fields
from edgeforge.checkpoint.gguf.tensor_types import TensorType
from edgeforge.checkpoint.gguf.tokenizer import Vocabulary, as_text, tokenizer_files
from edgeforge.checkpoint.json_text import reason
from edgeforge.checkpoint.layout import CONFIG, GENERATION_CONFIG, WEIGHT_FILE_OF_LLAMA_CPP
from edgeforge.checkpoint.tensor_entry import TensorEntry
from edgeforge.errors import CheckpointError
from quant.input_files import open_input

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Raised whenever other files would be made of the same header.
_VERSION: Final = 1
_SHARD: Final = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_MODEL_FIELDS: Final = (
    "name",
    "basename",
    "author",
    "organization",
    "license",
    "license.name",
    "license.link",
)
_SAMPLING: Final = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p"}


@dataclass(frozen=True, slots=True)
class StoredRows:
    """How a tensor of a GGUF file becomes that of transformers.

    Attributes:
        kind: the tensor's type.
        heads: number of heads whose rows are in the order of llama.cpp's rotary embedding; 0 where
            rows are in their order.
        one_added: whether 1 was added to its values.
    """

    kind: TensorType
    heads: int = 0
    one_added: bool = False


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file, or the parts of one, as a checkpoint.

    Attributes:
        path: the file that stands for the model: the first part.
        files: all parts.
        config: what ``config.json`` would hold.
        generation_config: what ``generation_config.json`` would hold.
        tensors: every tensor by transformers' name.
        rows: how each tensor is stored, by the same names.
        made: the small files that were made of the metadata, by name.
        about: what the file says about its model, such as ``license``.
    """

    path: Path
    files: tuple[Path, ...]
    config: dict[str, object]
    generation_config: dict[str, object]
    tensors: Mapping[str, TensorEntry]
    rows: Mapping[str, StoredRows]
    made: Mapping[str, Path]
    about: Mapping[str, str]


def is_gguf(path: Path) -> bool:
    """Whether a path has the name of a GGUF file."""
    return path.name.lower().endswith(WEIGHT_FILE_OF_LLAMA_CPP)


def parts_of(path: Path) -> tuple[Path, ...]:
    """Returns the files of a model, the first one first.

    Raises:
        CheckpointError: a part is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    base, _, count = match.groups()
    if not 0 < int(count) <= 1000:
        raise CheckpointError(f"{path} claims to be a part of {int(count)} files")
    suffix = path.suffix
    parts = [
        path.with_name(f"{base}-{at:05}-of-{count}{suffix}") for at in range(1, int(count) + 1)
    ]
    absent = [part for part in parts if not part.exists()]
    if absent:
        raise CheckpointError(
            f"{absent[0]} is missing, of the {int(count)} parts of {base}: download all parts into "
            f"one folder"
        )
    return tuple(parts)


def open_gguf(path: Path, *, with_tokenizer: bool = True) -> GgufSource:
    """Opens a GGUF file; its weights are read only when asked for.

    Args:
        path: the file; any part where the model is split.
        with_tokenizer: whether its tokenizer is to be read.

    Raises:
        CheckpointError: the file is damaged, or of a kind that EdgeForge does not read.
    """
    files = parts_of(path)
    headers = [read_header(file) for file in files]
    first, where = headers[0], str(files[0])
    entries, types = _all_tensors(headers, where)
    architecture = find_architecture(first.fields.get("general.architecture"), where)
    data = Metadata(first.fields, str(first.fields["general.architecture"]), where)
    embedding = entries.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{where} has no token_embd.weight: it holds no language model")
    tables = {name: _read_vector(entries[name]) for name in TABLES if name in entries}
    config = _config(architecture, data, embedding.shape[0], "output.weight" not in entries, tables)
    generation: Fields = {"_from_model_config": False}
    files_of_tokenizer: dict[str, dict[str, object]] = {}
    if "tokenizer.ggml.model" in first.fields:
        ids = _token_ids(first.fields, embedding.shape[0], where, strict=with_tokenizer)
        config |= {name: value for name, value in ids.items() if name != "eos_token_id"}
        if "eos_token_id" in ids:
            config["eos_token_id"] = ids["eos_token_id"]
        generation |= ids
        if with_tokenizer:
            gemma = architecture.model_type.startswith("gemma")
            context = int(str(config["max_position_embeddings"]))
            files_of_tokenizer = tokenizer_files(
                first.fields, embedding.shape[0], context, gemma, where
            )
    generation |= _sampling(first.fields)
    tensors, rows = _as_transformers(architecture, entries, types, config)
    made = {CONFIG: config, GENERATION_CONFIG: generation, **files_of_tokenizer}
    return GgufSource(
        path=files[0],
        files=files,
        config=config,
        generation_config=generation,
        tensors=tensors,
        rows=rows,
        made=_written(first, made),
        about=_about(first.fields),
    )


def _all_tensors(
    headers: list[GgufHeader], where: str
) -> tuple[dict[str, TensorEntry], dict[str, TensorType]]:
    """Returns the tensors of all parts and their types.

    Raises:
        CheckpointError: the parts do not belong together, or one of several is missing.
    """
    count = headers[0].fields.get("split.count", 0)
    if isinstance(count, int) and count > 1 and count != len(headers):
        raise CheckpointError(
            f"{where} is one of {count} parts: name them MODEL-00001-of-{count:05}.gguf and so on, "
            f"as they were when they were made, in one folder"
        )
    entries: dict[str, TensorEntry] = {}
    types: dict[str, TensorType] = {}
    for at, header in enumerate(headers):
        number = header.fields.get("split.no", at)
        twice = next((name for name in header.tensors if name in entries), None)
        if number != at or twice is not None:
            raise CheckpointError(
                f"{header.path} does not belong to {where}: it holds "
                + (f"part {number}" if twice is None else f"{twice[:200]} too")
            )
        entries |= header.tensors
        types |= header.types
    wanted = headers[0].fields.get("split.tensors.count", len(entries))
    if wanted != len(entries):
        raise CheckpointError(
            f"{where} and its parts hold {len(entries)} tensors of {wanted}: download them again"
        )
    return entries, types


def _config(
    architecture: Architecture,
    data: Metadata,
    vocab_size: int,
    tied: bool,
    tables: Mapping[str, NDArray[np.float32]],
) -> Fields:
    config, head_dim, rotated = base_config(architecture, data, vocab_size, tied)
    if not 0 < rotated <= head_dim or rotated % 2:
        raise CheckpointError(f"{data.where} rotates {rotated} columns of heads of {head_dim}")
    config |= rope_fields(data, config, head_dim, rotated, tables)
    config |= architecture.extra(data, config)
    # Fields that nothing has read might change the maths, and are refused as those of any
    # configuration: the user may say that one does not.
    config |= {key: value for key, value in data.unread().items() if value not in (0, False, "")}
    config["dtype"] = "float32"
    return config


def _token_ids(fields: Mapping[str, Value], rows: int, where: str, *, strict: bool) -> Fields:
    """Returns the tokens with roles, as the configurations state them."""
    try:
        vocabulary = Vocabulary(fields, rows, where)
        roles = {
            name: vocabulary.token(role) for name, role in (("bos", "bos"), ("pad", "padding"))
        }
        found: Fields = {f"{name}_token_id": at for name, at in roles.items() if at is not None}
        ends = vocabulary.ends()
    except CheckpointError:
        if strict:
            raise
        return {}
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return found


def _sampling(fields: Mapping[str, Value]) -> Fields:
    found: Fields = {}
    for key, name in _SAMPLING.items():
        value = fields.get(f"general.sampling.{key}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = shortest(value) if isinstance(value, float) else value
    return {**found, "do_sample": True} if found else {}


def _about(fields: Mapping[str, Value]) -> dict[str, str]:
    values = {name: fields.get(f"general.{name}") for name in _MODEL_FIELDS}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, str) and value.isprintable() and len(value) < 1000
    }


def _as_transformers(
    architecture: Architecture,
    entries: Mapping[str, TensorEntry],
    types: Mapping[str, TensorType],
    config: Fields,
) -> tuple[dict[str, TensorEntry], dict[str, StoredRows]]:
    """Returns the tensors by transformers' names, and how each is stored."""
    heads = {
        "attn_q": int(str(config["num_attention_heads"])),
        "attn_k": int(str(config["num_key_value_heads"])),
    }
    tensors: dict[str, TensorEntry] = {}
    rows: dict[str, StoredRows] = {}
    for name, entry in entries.items():
        if name in TABLES:
            continue
        found = architecture.tensor(name)
        tensors[found] = replace(entry, name=found)
        interleaved = architecture.is_interleaved(name)
        rows[found] = StoredRows(
            types[name],
            heads[name.split(".")[2]] if interleaved else 0,
            architecture.is_norm_of_one(name),
        )
    return tensors, rows


def _read_vector(entry: TensorEntry) -> NDArray[np.float32]:
    import numpy as np

    if entry.dtype != "float32" or len(entry.shape) != 1 or entry.nbytes > 1 << 20:
        raise CheckpointError(f"{entry.name} in {entry.file} is no vector of float32")
    try:
        with open_input(entry.file) as file:
            file.seek(entry.offset)
            data = file.read(entry.nbytes)
    except OSError as error:
        raise CheckpointError(f"{entry.file} cannot be read: {reason(error)}") from error
    values = np.frombuffer(data, "<f4")
    if len(values) != entry.shape[0] or not np.isfinite(values).all() or not (values > 0).all():
        raise CheckpointError(f"{entry.name} in {entry.file} holds no divisors: it is damaged")
    return values


def _written(header: GgufHeader, content: Mapping[str, object]) -> dict[str, Path]:
    """Writes the small files of a checkpoint to the cache, for all that copies files.

    The folder's name says what they hold, so that whoever finds it there need not write it.

    Raises:
        CheckpointError: they cannot be written.
    """
    try:
        texts = {name: as_text(value) for name, value in content.items()}
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{header.path} has a text that is not UTF-8 in its metadata: the file is damaged, or "
            f"name a tokenizer.json of the model with --tokenizer PATH"
        ) from None
    digest = hashlib.sha256(json.dumps([_VERSION, texts], sort_keys=True).encode()).hexdigest()
    folder = writable_cache() / "gguf" / digest[:32]
    try:
        if not all((folder / name).is_file() for name in texts):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
                for name, text in texts.items():
                    Path(partial, name).write_text(text, encoding="utf-8")
                folder.mkdir(exist_ok=True)
                for name in texts:
                    os.replace(Path(partial, name), folder / name)
        for name, text in texts.items():
            if (folder / name).stat().st_size != len(text.encode()):
                (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer of {header.path} cannot be written to {folder}: {reason(error)}"
        ) from error
    return {name: folder / name for name in texts}
