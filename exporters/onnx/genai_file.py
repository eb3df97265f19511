"""Reads the context and the token ids that an artifact's ``genai_config.json`` states."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json

NAME: Final = "genai_config.json"
_LARGEST: Final = 1 << 24
_IDS: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id"}


def stated(folder: Path) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """The contexts by the place that states them, and the token ids by name.

    Raises:
        ExportError: the file is missing or damaged.
    """
    path = folder / NAME
    with one_sentence(path, "onnxruntime-genai's configuration"):
        try:
            data: Any = parse_json(read_input(path, _LARGEST))
        except JsonError as error:
            raise ExportError(f"{path} cannot be read: it {error}") from None
        model, search = data["model"], data["search"]
        lengths = {
            f"{NAME}: context_length": int(model["context_length"]),
            f"{NAME}: max_length": int(search["max_length"]),
        }
        ids: dict[str, tuple[int, ...]] = {}
        for name, field in _IDS.items():
            given = model.get(field, [])
            listed = given if isinstance(given, list) else [given]
            ids[name] = tuple(map(int, listed))
    return lengths, ids
