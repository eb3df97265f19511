"""The records that a manifest consists of; each can be written as JSON and read back.

A manifest may come from anyone, so every ``from_json`` checks the types it is given. It raises a
TypeError or KeyError, which `exporters.manifest.Manifest.read` turns into one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact: size in bytes, and SHA-256 as ``sha256sum`` prints it."""

    size: int
    sha256: str

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads the form that ``dataclasses.asdict`` gives."""
        row = _mapping(data, "a file's record")
        return cls(_integer(row, "size"), _text(row, "sha256"))


@dataclass(frozen=True)
class WeightRecord:
    """One stored weight.

    Attributes:
        shape: ``[out, in]`` or ``[n]``.
        format: the format's name, as `quant.formats.formats.parse_format` reads it.
        algorithm: the quantizer that chose the integers.
        relative_error: the L2 norm of the error divided by the L2 norm of the weight.
        digest: its `quant.store.store.weight_digest`; artifacts of two targets have the same
            digest when they hold the same integers and scales.
        activation: how the activations that enter it are rounded (`quant.formats.activations`);
            the digest covers their scale, if there is one.
    """

    shape: tuple[int, ...]
    format: str
    algorithm: str
    relative_error: float
    digest: str
    activation: str = "none"

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads the form that ``dataclasses.asdict`` gives."""
        row = _mapping(data, "a weight's record")
        return cls(
            shape=_integers(row, "shape"),
            format=_text(row, "format"),
            algorithm=_text(row, "algorithm"),
            relative_error=_number(row, "relative_error"),
            digest=_text(row, "digest"),
            activation=_text(row, "activation") if "activation" in row else "none",
        )


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint that an artifact was made of.

    Attributes:
        model: the folder or hub id that the user gave.
        path: the absolute path of the checkpoint's folder.
        revision: the commit of a hub id; None for a folder.
        sha256: the digest of the whole checkpoint.
        files: the SHA-256 of each of its files, by name.
    """

    model: str
    path: str
    revision: str | None
    sha256: str
    files: Mapping[str, str]

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads the form that ``dataclasses.asdict`` gives."""
        row = _mapping(data, "source")
        revision = row.get("revision")
        if revision is not None and not isinstance(revision, str):
            raise TypeError(f"revision is {revision!r}, not a text")
        files = {str(k): str(v) for k, v in _mapping(row.get("files", {}), "files").items()}
        return cls(_text(row, "model"), _text(row, "path"), revision, _text(row, "sha256"), files)


@dataclass(frozen=True)
class ModelRecord:
    """The dimensions of the model.

    Attributes:
        vocab_size: the number of rows of the embedding.
        bos: the token that begins a text, if there is one.
        eos: the tokens that end a text.
        ignored_config: the config fields that the user told EdgeForge to ignore.
        summary: everything the manifest holds about the model: the fields above, and every
            dimension layer by layer.
    """

    vocab_size: int
    bos: int | None
    eos: tuple[int, ...]
    ignored_config: tuple[str, ...]
    summary: Mapping[str, object] = field(repr=False)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads a manifest's ``model``."""
        row = _mapping(data, "model")
        bos = row.get("bos")
        if bos is not None and not _is_integer(bos):
            raise TypeError(f"bos is {bos!r}, not a token")
        ignored = row.get("ignored_config", [])
        if not isinstance(ignored, list | tuple):
            raise TypeError(f"ignored_config is {ignored!r}, not a list")
        return cls(
            vocab_size=_integer(row, "vocab_size"),
            bos=bos if isinstance(bos, int) else None,
            eos=_integers(row, "eos") if "eos" in row else (),
            ignored_config=tuple(str(name) for name in ignored),
            # Tuples become lists here, so that a new record equals the one that is read back.
            summary=json.loads(json.dumps(row)),
        )


@dataclass(frozen=True)
class TokenizerRecord:
    """What the tokenizer adds to a text, which a runtime must feed as well.

    Attributes:
        prefix: the tokens in front of a text.
        suffix: the tokens behind it.
        num_bos: what ExecuTorch's runner must be given as ``num_bos`` to feed the same tokens: its
            tokenizer adds them only where that is 1.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    num_bos: int

    @classmethod
    def from_json(cls, data: object) -> Self | None:
        """Reads a manifest's ``tokenizer``; None for an artifact without one."""
        row = _mapping(data, "tokenizer")
        if not row:
            return None
        return cls(_integers(row, "prefix"), _integers(row, "suffix"), _integer(row, "num_bos"))


@dataclass(frozen=True)
class CalibrationRecord:
    """The text that quantizers and the scales of caches were calibrated on.

    Attributes:
        source: a file's path, or ``demo``.
        tokens: the number of tokens of all sequences together.
        length: the number of tokens of each sequence.
        seed: the seed by which the sequences were drawn.
        digest: the SHA-256 of the sequences.
    """

    source: str
    tokens: int
    length: int
    seed: int
    digest: str

    @classmethod
    def from_json(cls, data: object) -> Self | None:
        """Reads a manifest's ``calibration``; None where it is empty."""
        row = _mapping(data, "calibration")
        if not row:
            return None
        tokens, length, seed = (_integer(row, name) for name in ("tokens", "length", "seed"))
        return cls(_text(row, "source"), tokens, length, seed, _text(row, "digest"))


@dataclass(frozen=True)
class RotationRecord:
    """The rotation that was applied to the weights before quantization.

    Attributes:
        name: the rotation's name, as the command line takes it.
        version: the version of its construction; another version gives other matrices.
        seed: the seed of the random signs.
    """

    name: str
    version: int
    seed: int

    @classmethod
    def from_json(cls, data: object) -> Self | None:
        """Reads a manifest's ``rotation``; None where it is empty."""
        row = _mapping(data, "rotation")
        if not row:
            return None
        return cls(_text(row, "name"), _integer(row, "version"), _integer(row, "seed"))


Record = FileRecord | WeightRecord | SourceRecord | ModelRecord | CalibrationRecord | RotationRecord


def to_json(record: Record | None) -> Mapping[str, object]:
    """A record as the manifest holds it; an absent record is an empty table."""
    if record is None:
        return {}
    return record.summary if isinstance(record, ModelRecord) else asdict(record)


def _mapping(data: object, what: str) -> Mapping[str, object]:
    if not isinstance(data, Mapping):
        raise TypeError(f"{what} is {data!r}, not a table")
    return data


def _text(row: Mapping[str, object], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, not a text")
    return value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(row: Mapping[str, object], name: str) -> int:
    value = row[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, not a whole number")
    return value


def _number(row: Mapping[str, object], name: str) -> float:
    value = row[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, not a number")
    return float(value)


def _integers(row: Mapping[str, object], name: str) -> tuple[int, ...]:
    values = row[name]
    if not isinstance(values, list | tuple) or not all(map(_is_integer, values)):
        raise TypeError(f"{name} is {values!r}, not a list of whole numbers")
    return tuple(values)
