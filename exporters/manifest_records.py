"""The records that a manifest consists of; each can be written as JSON and read back.

A manifest may come from anyone, so every ``from_json`` checks the types it is given. It raises a
TypeError or KeyError, which `exporters.manifest.Manifest.read` turns into one sentence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Self

from exporters.float_columns import ALL, Columns
from quant.quoted import quoted


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact: size in bytes, and SHA-256 as ``sha256sum`` prints it."""

    size: int
    sha256: str

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads the form that ``dataclasses.asdict`` gives."""
        row = mapping(data, "a file's record")
        return cls(integer(row, "size"), text(row, "sha256"))


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
        float_columns: the columns whose activations stay float32 although the runtime's kernel
            rounds those of all others; ``all`` where it rounds none of this weight's.
    """

    shape: tuple[int, ...]
    format: str
    algorithm: str
    relative_error: float
    digest: str
    activation: str = "none"
    float_columns: Columns = ()

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads the form that ``dataclasses.asdict`` gives."""
        row = mapping(data, "a weight's record")
        if math.prod(integers(row, "shape")) >= 2**63:
            raise TypeError(f"shape is {quoted(row['shape'])}, which no weight can have")
        return cls(
            shape=integers(row, "shape"),
            format=text(row, "format"),
            algorithm=text(row, "algorithm"),
            relative_error=number(row, "relative_error"),
            digest=text(row, "digest"),
            activation=text(row, "activation") if "activation" in row else "none",
            float_columns=_columns(row),
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
        row = mapping(data, "source")
        revision = row.get("revision")
        if revision is not None and not isinstance(revision, str):
            raise TypeError(f"revision is {quoted(revision)}, not a text")
        named = mapping(row.get("files", {}), "files")
        files = {name: text(named, name) for name in named}
        return cls(text(row, "model"), text(row, "path"), revision, text(row, "sha256"), files)


@dataclass(frozen=True)
class ModelRecord:
    """The dimensions of the model.

    Attributes:
        vocab_size: the number of rows of the embedding.
        bos: the token that begins a text, if there is one.
        eos: the tokens that end a text.
        ignored_config: the config fields that the user told EdgeForge to ignore.
        exit_layer: the checkpoint's layer, counted from 1, after which the model is cut; None where
            it is whole.
        checkpoint_layers: how many layers the checkpoint has; 0 where the model is whole.
        summary: everything the manifest holds about the model: the fields above, and every
            dimension layer by layer.
    """

    vocab_size: int
    bos: int | None
    eos: tuple[int, ...]
    ignored_config: tuple[str, ...]
    exit_layer: int | None
    checkpoint_layers: int
    summary: Mapping[str, object] = field(repr=False)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads a manifest's ``model``."""
        row = mapping(data, "model")
        bos = row.get("bos")
        return cls(
            vocab_size=integer(row, "vocab_size", minimum=1),
            bos=None if bos is None else integer(row, "bos"),
            eos=integers(row, "eos") if "eos" in row else (),
            ignored_config=texts(row, "ignored_config") if "ignored_config" in row else (),
            exit_layer=integer(row, "exit_layer", minimum=1) if "exit_layer" in row else None,
            checkpoint_layers=integer(row, "checkpoint_layers") if "exit_layer" in row else 0,
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
        given: where the tokenizer was named that is not the checkpoint's own, an absolute path or a
            hub id; empty for the checkpoint's.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    num_bos: int
    given: str = ""

    @classmethod
    def from_json(cls, data: object) -> Self | None:
        """Reads a manifest's ``tokenizer``; None for an artifact without one."""
        row = mapping(data, "tokenizer")
        if not row:
            return None
        return cls(
            prefix=integers(row, "prefix"),
            suffix=integers(row, "suffix"),
            num_bos=integer(row, "num_bos"),
            given=text(row, "given") if "given" in row else "",
        )


@dataclass(frozen=True)
class CalibrationRecord:
    """The text that quantizers and the scales of caches were calibrated on.

    Attributes:
        source: a file's path, ``demo``, or ``self`` where the model wrote the sequences itself.
        tokens: the number of tokens of all sequences together.
        length: the number of tokens of each sequence.
        seed: the seed by which the sequences were drawn.
        digest: the SHA-256 of the sequences; of ``self``, of what they depend on.
        chats: how many of the sequences are conversations in the model's own template.
    """

    source: str
    tokens: int
    length: int
    seed: int
    digest: str
    chats: int = 0

    @classmethod
    def from_json(cls, data: object) -> Self | None:
        """Reads a manifest's ``calibration``; None where it is empty."""
        row = mapping(data, "calibration")
        if not row:
            return None
        tokens, length = (integer(row, name, minimum=1) for name in ("tokens", "length"))
        seed = integer(row, "seed", minimum=None)
        chats = integer(row, "chats", minimum=0) if "chats" in row else 0
        return cls(text(row, "source"), tokens, length, seed, text(row, "digest"), chats)


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
        row = mapping(data, "rotation")
        if not row:
            return None
        seed = integer(row, "seed", minimum=None)
        return cls(text(row, "name"), integer(row, "version"), seed)


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter that changes what an artifact computes.

    Attributes:
        name: its name, by which a separate one is switched on.
        path: the absolute path of its folder.
        sha256: the digest of its two files.
        weight: the factor on what it adds.
        file: the artifact's file that holds it; empty where it is merged into the weights.
    """

    name: str
    path: str
    sha256: str
    weight: float = 1.0
    file: str = ""

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Reads the form that ``dataclasses.asdict`` gives."""
        row = mapping(data, "an adapter's record")
        name, path, sha256, file = (text(row, key) for key in ("name", "path", "sha256", "file"))
        return cls(name, path, sha256, number(row, "weight"), file)


Record = FileRecord | WeightRecord | SourceRecord | ModelRecord | CalibrationRecord | RotationRecord


def to_json(record: Record | None) -> Mapping[str, object]:
    """A record as the manifest holds it; an absent record is an empty table."""
    if record is None:
        return {}
    return record.summary if isinstance(record, ModelRecord) else asdict(record)


def mapping(data: object, what: str) -> Mapping[str, object]:
    """Returns a table; raises a TypeError for anything else."""
    if not isinstance(data, Mapping):
        raise TypeError(f"{what} is {quoted(data)}, not a table")
    return data


def text(row: Mapping[str, object], name: str) -> str:
    """Returns a row's text; raises a TypeError for anything else."""
    value = row[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is {quoted(value)}, not a text")
    return value


def texts(row: Mapping[str, object], name: str) -> tuple[str, ...]:
    """Returns a row's list of texts; raises a TypeError for anything else."""
    values = row[name]
    if not isinstance(values, list | tuple) or not all(isinstance(each, str) for each in values):
        raise TypeError(f"{name} is {quoted(values)}, not a list of texts")
    return tuple(values)


def integer(row: Mapping[str, object], name: str, minimum: int | None = 0) -> int:
    """Returns a row's whole number of at least ``minimum`` that 63 bits hold, or a TypeError."""
    value = row[name]
    if not _is_integer(value):
        raise TypeError(f"{name} is {quoted(value)}, not a whole number")
    assert isinstance(value, int)
    if abs(value) >= 2**63 or (minimum is not None and value < minimum):
        raise TypeError(f"{name} is {quoted(value)}, which it cannot be")
    return value


def number(row: Mapping[str, object], name: str) -> float:
    """Returns a row's finite number; raises a TypeError for anything else."""
    value = row[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise TypeError(f"{name} is {quoted(value)}, not a number")
    return float(value)


def integers(row: Mapping[str, object], name: str) -> tuple[int, ...]:
    """Returns a row's whole numbers, none negative and each in 63 bits, or raises a TypeError."""
    values = row[name]
    if not isinstance(values, list | tuple) or not all(map(_is_integer, values)):
        raise TypeError(f"{name} is {quoted(values)}, not a list of whole numbers")
    if not all(0 <= value < 2**63 for value in values):
        raise TypeError(f"{name} is {quoted(values)}, which it cannot be")
    return tuple(values)


def _columns(row: Mapping[str, object]) -> Columns:
    if row.get("float_columns") == ALL:
        return ALL
    return integers(row, "float_columns") if "float_columns" in row else ()


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
