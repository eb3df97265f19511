"""``--history FILE``: every measurement as a line of JSON, and the change since the last one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from device_harness.measuring.bench import Bench
from device_harness.measuring.record import Cell, Figure
from device_harness.measuring.record_json import figures_json
from device_harness.measuring.statistics import Summary
from edgeforge.errors import UsageError
from quant.input_files import read_input
from quant.json_input import JsonError, parse_json
from quant.json_output import json_text

HISTORY_VERSION: Final = 1
_KIND: Final = "edgeforge bench history"
_LARGEST: Final = 256 << 20
_FIGURES: Final[tuple[tuple[Figure, str], ...]] = (
    ("prefill", "prefill_tokens_per_second"),
    ("decode", "decode_tokens_per_second"),
)


@dataclass(frozen=True)
class Change:
    """How a figure changed since the last comparable entry.

    Attributes:
        figure: ``prefill`` or ``decode``.
        before: the median then.
        now: the median now.
        since: when the earlier one was measured, seconds since 1970.
        apart: whether no run of then is as fast as one of now, or the other way round.
    """

    figure: Figure
    before: float
    now: float
    since: float
    apart: bool

    @property
    def ratio(self) -> float:
        """The median now over the median then."""
        return self.now / self.before


@dataclass
class History:
    """Earlier measurements.

    Attributes:
        path: the file.
        entries: its lines, in order.
        damaged: how many lines cannot be read.
    """

    path: Path
    entries: list[Mapping[str, Any]] = field(default_factory=list)
    damaged: int = 0

    def changes(self, cell: Cell, device_model: str) -> list[Change]:
        """How a cell's speeds changed since the last comparable entry; empty where there is none.

        Comparable is what is of the same model, target, recipe and options, and ran on a device of
        that name and model, with the same lengths, threads and options.
        """
        key = _key(_entry(cell, device_model))
        before = next((each for each in reversed(self.entries) if _key(each) == key), None)
        if before is None:
            return []
        found = []
        for figure, name in _FIGURES:
            now, was = cell.summary(figure), _summary(before["figures"].get(name))
            if now is not None and was is not None:
                apart = now.smallest > was.largest or now.largest < was.smallest
                found.append(Change(figure, was.median, now.median, float(before["at"]), apart))
        return found

    def append(self, bench: Bench) -> None:
        """Adds a line for each cell that has figures.

        Raises:
            OSError: the file cannot be written.
        """
        models = device_models(bench)
        lines = [
            json_text(_entry(cell, models[cell.device]), indent=None) + "\n"
            for cell in bench.cells
            if not cell.failed
        ]
        if not lines:
            return
        # One write at the end of the file: lines of two measurements are never mixed.
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with open(descriptor, "r+b", buffering=0) as stream:
            size = stream.seek(0, os.SEEK_END)
            cut = bool(size) and os.pread(descriptor, 1, size - 1) != b"\n"
            stream.write((("\n" if cut else "") + "".join(lines)).encode())
            os.fsync(descriptor)


def read_history(path: Path) -> History:
    """Reads earlier measurements; a line that was cut short is passed over.

    Raises:
        UsageError: the file is something else, was written by a newer EdgeForge, or cannot be read.
    """
    if not path.exists():
        if not path.absolute().parent.is_dir():
            raise UsageError(
                f"--history {path} cannot be written: name a file in a folder there is"
            )
        return History(path)
    try:
        lines = read_input(path, _LARGEST).split(b"\n")
    except OSError as error:
        raise UsageError(f"--history {path} cannot be read: {error.strerror or error}") from error
    history = History(path)
    for line in lines:
        if not line.strip():
            continue
        entry = _read(path, line)
        if entry is None:
            history.damaged += 1
        else:
            history.entries.append(entry)
    if history.damaged and not history.entries:
        raise UsageError(
            f"--history {path} is no history of `edgeforge bench`: name a new file, or one that it "
            f"wrote"
        )
    return history


def device_models(bench: Bench) -> dict[str, str]:
    """What each device is, by its name."""
    return {each.name: str(each.facts.get("model", "")) for each in bench.devices}


def _read(path: Path, line: bytes) -> Mapping[str, Any] | None:
    try:
        entry = parse_json(line, strict=False)
    except JsonError:
        return None
    if not isinstance(entry, dict) or entry.get("kind") != _KIND:
        return None
    version = entry.get("schema_version")
    if isinstance(version, int) and version > HISTORY_VERSION:
        raise UsageError(
            f"--history {path} has entries of version {version}; this EdgeForge reads "
            f"{HISTORY_VERSION}: use a newer EdgeForge, or another file"
        )
    whole = isinstance(entry.get("figures"), dict) and isinstance(entry.get("at"), int | float)
    return entry if whole and isinstance(entry.get("of"), dict) else None


def _entry(cell: Cell, device_model: str) -> dict[str, Any]:
    """A cell's line: what it is of, and what its runs come to."""
    artifact = cell.artifact
    return {
        "kind": _KIND,
        "schema_version": HISTORY_VERSION,
        "at": cell.at,
        "edgeforge": cell.edgeforge,
        "of": {
            "model": artifact.model,
            "target": artifact.target,
            "recipe": artifact.recipe,
            "target_options": dict(artifact.options),
            "device": cell.device,
            "device_model": device_model,
            "prompt": cell.prompt,
            "output": cell.output,
            "threads": cell.threads,
            "options": dict(cell.options),
            "runner": None if cell.runner is None else [cell.runner.path, *cell.runner.arguments],
            **({"shapes": dict(cell.shapes)} if cell.shapes else {}),
        },
        "checkpoint": artifact.checkpoint,
        "manifest": artifact.manifest,
        "runtime": cell.runtime,
        "figures": figures_json(cell),
    }


def _key(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry["of"], sort_keys=True)


def _summary(data: object) -> Summary | None:
    if not isinstance(data, Mapping):
        return None
    values: Sequence[object] = [data.get(name) for name in ("median", "smallest", "largest")]
    if not all(isinstance(each, int | float) and each > 0 for each in values):
        return None
    median, smallest, largest = (float(str(each)) for each in values)
    return Summary(median, smallest, largest, int(str(data.get("count", 0))))
