"""`ModuleManifest`: the content of ``edgeforge-module.json`` beside a module's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

from exporters.errors import ExportError
from exporters.manifest import MODULE_MANIFEST
from exporters.manifest_file import read_manifest
from exporters.manifest_records import FileRecord, WeightRecord, mapping, number, text, texts
from quant.input_files import is_inside
from quant.quoted import quoted

SAMPLES: Final = "samples.npz"
_VERSION: Final = 1


@dataclass(frozen=True)
class ModuleManifest:
    """Everything about a module's artifact that its files do not say themselves.

    Attributes:
        target: the target's name.
        entry: the file or folder that a runtime opens.
        recipe: the recipe that the user asked for.
        module: the class of the module.
        source: the script and factory, or the folder, that the module came from; empty for a
            module that was given in Python.
        inputs: the entry's inputs by name in their order, each as ``dtype[dims]``.
        outputs: the outputs, in the same form.
        ranges: the least and the largest size of each dynamic dimension, as ``least..largest``.
        weights: every quantized weight by the parameter's name.
        floats: the quantized weights that the files hold as dequantized floats, with the reason.
        bits_per_weight: stored bits of the quantized weights divided by their number; 0 for none.
        tolerance: the largest difference from the quantized module that passes, relative to the
            range of the output.
        notes: what a user must know, one sentence each.
        tools: versions of the packages that made the artifact.
        files: every file of the artifact except the manifest.
        schema_version: the version of this file's schema.
        source_sha256: SHA-256 of the names, shapes and values of the module's parameters, buffers
            and constants; empty where an earlier EdgeForge wrote the file.
    """

    target: str
    entry: str
    recipe: str
    module: str
    source: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    ranges: Mapping[str, str]
    weights: Mapping[str, WeightRecord]
    floats: Mapping[str, str]
    bits_per_weight: float
    tolerance: float
    notes: tuple[str, ...]
    tools: Mapping[str, str]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    schema_version: int = _VERSION
    source_sha256: str = ""

    def write(self, folder: Path) -> None:
        """Writes ``edgeforge-module.json``."""
        words = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / MODULE_MANIFEST).write_text(words + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads a module's manifest.

        Raises:
            ExportError: the folder is no artifact of a module, or its manifest cannot be read.
        """
        known = {given.name for given in fields(cls)}
        path = folder / MODULE_MANIFEST
        try:
            return cls(**read_manifest(path, "module", _VERSION, known, _read_fields))
        except (FileNotFoundError, NotADirectoryError):
            raise ExportError(
                f"{folder} is no artifact of a module: it has no {path.name}"
            ) from None


def is_module(folder: Path) -> bool:
    """Whether a folder is an artifact of a module."""
    return (folder / MODULE_MANIFEST).is_file()


def _read_fields(data: Mapping[str, object]) -> dict[str, Any]:
    """Reads every field.

    Raises:
        TypeError: a field holds what it cannot.
        KeyError: a field is absent.
    """
    words = ("target", "entry", "recipe", "module", "source")
    found: dict[str, Any] = {name: text(data, name) for name in words}
    for name in ("inputs", "outputs", "ranges", "floats", "tools"):
        rows = mapping(data[name], name)
        found[name] = {key: text(rows, key) for key in rows}
    found["notes"] = texts(data, "notes")
    found["source_sha256"] = text(data, "source_sha256") if "source_sha256" in data else ""
    found |= {name: number(data, name) for name in ("bits_per_weight", "tolerance")}
    weights, files = mapping(data["weights"], "weights"), mapping(data["files"], "files")
    found["weights"] = {name: WeightRecord.from_json(row) for name, row in weights.items()}
    found["files"] = {name: FileRecord.from_json(row) for name, row in files.items()}
    for place in (found["entry"], *found["files"]):
        if not is_inside(place):
            raise TypeError(f"it names the file {quoted(place)}, which is not in its folder")
    return found
