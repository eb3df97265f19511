"""A ``tokenizer.json`` for a checkpoint whose tokenizer is a SentencePiece model alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from device_harness.child_process import python_command, python_environment
from edgeforge.cache import read_record, writable_cache, write_record
from edgeforge.checkpoint.json_text import MAX_INDEX_BYTES, parse_object, read_small_file
from edgeforge.errors import CheckpointError

MODEL: Final = "tokenizer.model"
_VERSION: Final = 1  # of what is made; another one makes it anew
_LIBRARIES: Final = ("transformers", "sentencepiece", "tokenizers")
# The largest real models, of 256,000 pieces, take 1.5 GB and 40 seconds.
_BYTES, _SECONDS, _WAIT = 4 << 30, 300, 600
_HOW: Final = "or give a folder that has tokenizer.json with --tokenizer"


def converted_tokenizer(files: Mapping[str, Path]) -> Path:
    """Returns the ``tokenizer.json`` of a SentencePiece model, from the cache or made now.

    Args:
        files: the tokenizer's files by the names that they have in a checkpoint.

    Raises:
        CheckpointError: it cannot be made; the message says why and what to do.
    """
    file = files[MODEL]
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise CheckpointError(
            f"{file} is the checkpoint's only tokenizer, and {' and '.join(missing)} would make "
            f'tokenizer.json of it: pip install "edgeforge[transformers]", {_HOW}'
        )
    content = read_small_file(file, MAX_INDEX_BYTES)
    config = _object(files, "tokenizer_config.json")
    request = {
        "file": str(file.absolute()),
        "config": _used(config),
        "added": _added(files, config),
    }
    named = {**request, "file": hashlib.sha256(content).hexdigest(), "version": _VERSION}
    named |= {name: version(name) for name in _LIBRARIES}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    folder = writable_cache() / "tokenizers"
    made, record = folder / digest / "tokenizer.json", folder / f"{digest}.json"
    if _is_whole(made, read_record(record)):
        return made
    text = _convert(file, request)
    made.parent.mkdir(parents=True, exist_ok=True)
    partial = made.with_name(f".{made.name}.partial")
    partial.write_bytes(text)
    partial.replace(made)
    write_record(record, {"tokenizer": hashlib.sha256(text).hexdigest()})
    return made


def _convert(file: Path, request: Mapping[str, object]) -> bytes:
    packages = str(Path(str(find_spec("transformers").origin)).parents[1])  # type: ignore[union-attr]
    command = python_command(
        "edgeforge.checkpoint.sentencepiece_conversion", packages, str(_BYTES), str(_SECONDS)
    )
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_WAIT,
            env={**python_environment(), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        answer = {}
    if "tokenizer" not in answer:
        why = answer.get("refused", f"it is not done within {_SECONDS} seconds")
        raise CheckpointError(
            f"{file} is the checkpoint's only tokenizer and cannot become tokenizer.json: {why}; "
            f"download it again, {_HOW}"
        )
    return str(answer["tokenizer"]).encode()


def _is_whole(file: Path, record: Mapping[str, object] | None) -> bool:
    if record is None:
        return False
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() == record.get("tokenizer")
    except OSError:
        return False


def _used(config: Mapping[str, object]) -> dict[str, object]:
    """The fields that decide what is made."""
    names = ("legacy", "add_bos_token", "add_eos_token")
    return {name: config[name] for name in names if isinstance(config.get(name), bool)}


def _added(files: Mapping[str, Path], config: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """The tokens that are added to the model's, by their ids, as texts."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        return {
            number: row
            for number, row in decoder.items()
            if number.isdecimal() and isinstance(row, dict) and isinstance(row.get("content"), str)
        }
    older = _object(files, "added_tokens.json")
    return {
        str(number): {"content": text, "special": True, "normalized": False}
        for text, number in older.items()
        if type(number) is int
    }


def _object(files: Mapping[str, Path], name: str) -> dict[str, object]:
    if name not in files:
        return {}
    content = read_small_file(files[name], MAX_INDEX_BYTES)
    return parse_object(content, str(files[name]), strict=False)
