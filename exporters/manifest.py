"""`Manifest`: the content of an artifact's ``edgeforge.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Protocol

from exporters.errors import ExportError
from exporters.manifest_file import read_manifest
from exporters.manifest_records import (
    AdapterRecord,
    CalibrationRecord,
    FileRecord,
    ModelRecord,
    RotationRecord,
    SourceRecord,
    TokenizerRecord,
    WeightRecord,
    integer,
    mapping,
    number,
    text,
    texts,
    to_json,
)
from quant.input_files import is_inside, open_input
from quant.quoted import quoted

MANIFEST = "edgeforge.json"
MODULE_MANIFEST = "edgeforge-module.json"  # that of a module (`exporters.modules.manifest`)
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Manifest:
    """Everything about an artifact that its model files do not say themselves.

    Attributes:
        target: the target's name, such as ``onnx``.
        entry: the file that a runtime opens.
        recipe: the recipe that the user asked for.
        context: the declared context, in tokens.
        source: the checkpoint.
        model: the model's dimensions.
        bits_per_weight: stored bits divided by the number of parameters.
        weights: every stored weight, by name.
        inputs: the entry's inputs by name, each as ``dtype[dims]``.
        outputs: the entry's outputs, in the same form.
        states: what is carried from call to call, in the same form.
        notes: what a user must know, one sentence each.
        warnings: what is not as a user expects, one sentence each; ``export`` prints them.
        processor: the kind of processor that exported it; empty where that is not known.
        tools: the versions of the packages that made the artifact.
        files: every file of the artifact except ``edgeforge.json``.
        options: the target's options that the user gave.
        structure: what the files consist of, from `exporters.structure.to_json`.
        calibration: the text that quantizers and cache scales were calibrated on, if any were.
        rotation: the rotation that was applied to the weights before quantization, if any was.
        tokenizer: what the artifact's tokenizer adds to a text, if it has one.
        adapters: the adapters that are merged into the weights, or that lie beside them.
        schema_version: the version of this file's schema.
    """

    target: str
    entry: str
    recipe: str
    context: int
    source: SourceRecord
    model: ModelRecord
    bits_per_weight: float
    weights: Mapping[str, WeightRecord]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    states: Mapping[str, str]
    notes: tuple[str, ...]
    tools: Mapping[str, str]
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    structure: Mapping[str, object] = field(default_factory=dict)
    calibration: CalibrationRecord | None = None
    rotation: RotationRecord | None = None
    warnings: tuple[str, ...] = ()
    processor: str = ""
    tokenizer: TokenizerRecord | None = None
    adapters: tuple[AdapterRecord, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, object]:
        """The manifest as ``edgeforge.json`` holds it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in _RECORDS:
            values[name] = to_json(values[name])
        for name in _TABLES:
            values[name] = {key: to_json(record) for key, record in values[name].items()}
        values["adapters"] = [asdict(record) for record in self.adapters]
        return values

    @property
    def merged_adapters(self) -> tuple[AdapterRecord, ...]:
        """The adapters that are merged into the weights."""
        return tuple(record for record in self.adapters if not record.file)

    @property
    def separate_adapters(self) -> tuple[AdapterRecord, ...]:
        """The adapters that lie beside the weights."""
        return tuple(record for record in self.adapters if record.file)

    def require_adapter(self, name: str, artifact: str) -> str:
        """Returns the name of an adapter that can be switched on, as the runtime's option takes it.

        Args:
            name: the adapter's name.
            artifact: what to call the artifact in messages.

        Raises:
            ExportError: the artifact has no such adapter to be switched on.
        """
        known = [record.name for record in self.separate_adapters]
        if name in known:
            return name
        has = f"it has {', '.join(known)}" if known else "it has none"
        if any(record.name == name for record in self.merged_adapters):
            has = f"{name} is merged into its weights, and always on"
        raise ExportError(f"{artifact} has no adapter {quoted(name)} to switch on: {has}")

    @property
    def draft_positions(self) -> int:
        """How many of its last tokens' logits one call gives in the graph for drafts.

        1 where there is no such graph.
        """
        given = self.options.get("draft_positions", 1)
        return given if type(given) is int and given > 1 else 1

    @property
    def can_rewind(self) -> bool:
        """Whether a text's last tokens can be taken back: whether all states are caches."""
        layers = self.model.summary.get("layers")
        rows = [row for row in layers if isinstance(row, dict)] if isinstance(layers, list) else []
        return all(row.get("mixer", "attention") == "attention" for row in rows)

    @property
    def tokenizer_sha256(self) -> str:
        """The digest of the tokenizer's file; empty where there is none."""
        record = self.files.get("tokenizer.json")
        return "" if record is None else record.sha256

    def write(self, folder: Path) -> None:
        """Writes ``edgeforge.json``."""
        written = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(written + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads an artifact's manifest.

        Raises:
            ExportError: the folder is no artifact, or its manifest cannot be read or has another
                schema version.
        """
        known = {given.name for given in fields(cls)}
        try:
            found = read_manifest(folder / MANIFEST, "model", SCHEMA_VERSION, known, _read_fields)
        except (FileNotFoundError, NotADirectoryError):
            if (folder / MODULE_MANIFEST).is_file():
                raise ExportError(
                    f"{folder} is an artifact of a module, not of a language model: verify, "
                    f"inspect, check, bench and compare take it"
                ) from None
            raise ExportError(f"{folder} is no EdgeForge artifact: it has no {MANIFEST}") from None
        assert found.keys() == known - {"schema_version"}, "a new field is not read"
        return cls(**found)


def _read_fields(data: Mapping[str, object]) -> dict[str, Any]:
    """Reads every field of a manifest; a field that older manifests do not have may be absent.

    Raises:
        TypeError: a field holds what it cannot.
        KeyError: a field is absent.
    """
    found: dict[str, Any] = {name: text(data, name) for name in ("target", "entry", "recipe")}
    found["context"] = integer(data, "context", minimum=2)
    found["bits_per_weight"] = number(data, "bits_per_weight")
    found["notes"] = texts(data, "notes")
    found["processor"] = text(data, "processor") if "processor" in data else ""
    found["warnings"] = texts(data, "warnings") if "warnings" in data else ()
    rows = data.get("adapters", [])
    if not isinstance(rows, list):
        raise TypeError(f"adapters is {quoted(rows)}, not a list")
    found["adapters"] = tuple(AdapterRecord.from_json(row) for row in rows)
    for name in ("inputs", "outputs", "states", "tools"):
        rows = mapping(data[name], name)
        found[name] = {key: text(rows, key) for key in rows}
    for name in ("options", "structure"):
        found[name] = mapping(data.get(name, {}), name)
    for name, record in _RECORDS.items():
        optional = name in ("calibration", "rotation", "tokenizer")
        found[name] = record.from_json(data.get(name, {}) if optional else data[name])
    for name, row in _TABLES.items():
        rows = mapping(data.get(name, {}) if name == "files" else data[name], name)
        found[name] = {key: row.from_json(value) for key, value in rows.items()}
    beside = [each.file for each in found["adapters"] if each.file]
    for place in (found["entry"], *found["files"], *beside):
        if not is_inside(place):
            raise TypeError(f"it names the file {quoted(place)}, which is not in its folder")
    return found


class _Readable(Protocol):
    """A record that can be read from JSON."""

    @classmethod
    def from_json(cls, data: object) -> object:
        """Reads the record; None where the JSON is empty and the record is optional."""


_RECORDS: Final[Mapping[str, type[_Readable]]] = {
    "source": SourceRecord,
    "model": ModelRecord,
    "calibration": CalibrationRecord,
    "rotation": RotationRecord,
    "tokenizer": TokenizerRecord,
}
"""The manifest's fields that hold one record."""
_TABLES: Final[Mapping[str, type[_Readable]]] = {"files": FileRecord, "weights": WeightRecord}
"""The manifest's fields that hold records by name."""


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Size and digest of every file under a folder except its manifest, by relative path."""
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: _record(folder / name), names), strict=True))


class Listing(Protocol):
    """A manifest that lists an artifact's files."""

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Every file of the artifact but the manifest, by its relative path."""


def check_files(folder: Path, manifest: Listing) -> list[str]:
    """Compares an artifact's files with its manifest; returns one sentence for each problem."""
    problems = []
    for name, record in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if path.is_file() and size != record.size:
                problems.append(f"{name} has {size} bytes; {record.size} were written")
            elif _record(path).sha256 != record.sha256:
                problems.append(f"{name} was changed after it was written: its SHA-256 differs")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def _record(path: Path) -> FileRecord:
    with open_input(path) as stream:
        return FileRecord(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())
