"""`Bench` as the JSON that ``bench.json`` holds, and back.

``schemas/bench-1.schema.json`` describes it. Medians and spreads are written for those who read
the file without EdgeForge; `read_bench` makes them anew from the runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Final, TypeVar

from device_harness.measuring.bench import BENCH_VERSION, KIND, ArmRatio, Bench, DeviceRecord
from device_harness.measuring.kept_speed import kept
from device_harness.measuring.record import (
    COOLS,
    FIGURES,
    OUTCOMES,
    STARTS,
    TEXT_VERDICTS,
    Cell,
    Measured,
    Point,
    Run,
    Runner,
    TextCheck,
)
from device_harness.measuring.rules import Rules
from device_harness.measuring.statistics import Summary
from exporters.manifest_records import integer, integers, mapping, number, text, texts
from quant.quoted import quoted

Read = TypeVar("Read")
_MOST_SECONDS: Final = 1e9


class BenchError(ValueError):
    """What was read is no ``bench.json`` of this version; the message is a phrase."""


def bench_json(bench: Bench) -> dict[str, Any]:
    """The JSON of a measurement."""
    return {
        "kind": KIND,
        "schema_version": BENCH_VERSION,
        "devices": [asdict(each) for each in bench.devices],
        "cells": [cell_json(each) for each in bench.cells],
        "ratios": [asdict(each) for each in bench.ratios],
    }


def cell_json(cell: Cell) -> dict[str, Any]:
    """The JSON of a cell, with what its runs come to."""
    return {**asdict(cell), "rules": cell.rules.to_json(), "figures": figures_json(cell)}


def figures_json(cell: Cell) -> dict[str, Any]:
    """What a cell's runs come to; null where there is nothing."""
    cold, kept_speed = cell.cold, kept(cell.sustained)
    return {
        "prefill_tokens_per_second": _summary_json(cell.summary("prefill")),
        "decode_tokens_per_second": _summary_json(cell.summary("decode")),
        "first_token_seconds": _summary_json(cell.summary("first_token")),
        "cold": None
        if cold is None
        else {
            "start": cold.start,
            "load_seconds": cold.load_seconds,
            "first_token_seconds": cold.first_token_seconds,
        },
        "peak_bytes": cell.peak_bytes,
        "kept": None if kept_speed is None else {**asdict(kept_speed), "share": kept_speed.share},
        "failed": cell.failed,
    }


def _summary_json(summary: Summary | None) -> dict[str, object] | None:
    if summary is None:
        return None
    return {**asdict(summary), "spread": summary.spread, "reliable": summary.is_reliable}


def read_bench(data: object) -> Bench:
    """Reads the JSON of a measurement.

    Raises:
        BenchError: it is none, it is of another version, or it is not complete.
    """
    if not isinstance(data, Mapping) or data.get("kind") != KIND:
        raise BenchError("is no bench of EdgeForge")
    version = data.get("schema_version")
    if version != BENCH_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > BENCH_VERSION
        cure = "read it with a newer EdgeForge" if newer else "measure again"
        raise BenchError(
            f"has schema version {quoted(version)}; this EdgeForge reads {BENCH_VERSION}: {cure}"
        )
    try:
        return Bench(
            devices=_rows(data, "devices", _device),
            cells=_rows(data, "cells", read_cell),
            ratios=_rows(data, "ratios", _ratio),
        )
    except KeyError as error:
        raise BenchError(f"is not complete: it has no field {error}") from None
    except TypeError as error:
        raise BenchError(f"is damaged: {error}") from None


def read_cell(row: Mapping[str, object]) -> Cell:
    """Reads a cell.

    Raises:
        KeyError: a field is absent.
        TypeError: a field holds what it cannot.
    """
    artifact, runner = mapping(row["artifact"], "artifact"), row["runner"]
    counted = row["instructions"]
    return Cell(
        artifact=_measured(artifact),
        device=text(row, "device"),
        prompt=integer(row, "prompt", 1),
        output=integer(row, "output", 1),
        rules=_rules(mapping(row["rules"], "rules")),
        at=number(row, "at"),
        edgeforge=text(row, "edgeforge"),
        runs=_rows(row, "runs", _run),
        runtime=text(row, "runtime"),
        processor=text(row, "processor"),
        threads=None if row["threads"] is None else integer(row, "threads", 1),
        options=_texts_by_name(row, "options"),
        text=_text_check(mapping(row["text"], "text")),
        sustained=_rows(row, "sustained", _point),
        notes=texts(row, "notes"),
        failure=text(row, "failure"),
        instructions=None if counted is None else _counts(mapping(counted, "instructions")),
        runner=None if runner is None else _runner(mapping(runner, "runner")),
        # Files of an earlier EdgeForge do not have it.
        shapes=_texts_by_name(row, "shapes") if "shapes" in row else {},
    )


def _rules(row: Mapping[str, object]) -> Rules:
    found: dict[str, Any] = {}
    for each in fields(Rules):
        if each.name == "cool_to":
            found[each.name] = _optional(row, each.name)
        elif isinstance(each.default, int):
            found[each.name] = integer(row, each.name)
        else:
            found[each.name] = number(row, each.name)
    return Rules(**found)


def _device(row: Mapping[str, object]) -> DeviceRecord:
    return DeviceRecord(
        name=text(row, "name"),
        facts=dict(mapping(row["facts"], "facts")),
        limits=texts(row, "limits"),
        failure=text(row, "failure"),
    )


def _measured(row: Mapping[str, object]) -> Measured:
    return Measured(
        folder=text(row, "folder"),
        target=text(row, "target"),
        recipe=text(row, "recipe"),
        model=text(row, "model"),
        checkpoint=text(row, "checkpoint"),
        manifest=text(row, "manifest"),
        context=integer(row, "context"),
        bits_per_weight=number(row, "bits_per_weight"),
        bytes=integer(row, "bytes"),
        options=dict(mapping(row["options"], "options")),
    )


def _run(row: Mapping[str, object]) -> Run:
    return Run(
        start=_one_of(row, "start", STARTS),
        outcome=_one_of(row, "outcome", OUTCOMES),
        at=number(row, "at"),
        reason=text(row, "reason"),
        load_seconds=_seconds(row, "load_seconds"),
        first_token_seconds=_seconds(row, "first_token_seconds"),
        step_seconds=_numbers(row, "step_seconds"),
        tokens=integers(row, "tokens"),
        peak_bytes=None if row["peak_bytes"] is None else integer(row, "peak_bytes"),
        waited_seconds=number(row, "waited_seconds"),
        cool=_one_of(row, "cool", COOLS),
        before=_table(row, "before"),
        after=_table(row, "after"),
    )


def _text_check(row: Mapping[str, object]) -> TextCheck:
    return TextCheck(
        verdict=_one_of(row, "verdict", TEXT_VERDICTS),
        reference=text(row, "reference"),
        reason=text(row, "reason"),
        **{name: integer(row, name) for name in ("agreed", "of", "leading", "allowed")},
    )


def _point(row: Mapping[str, object]) -> Point:
    return Point(
        seconds=number(row, "seconds"),
        prefill=number(row, "prefill"),
        decode=number(row, "decode"),
        after=_table(row, "after"),
    )


def _runner(row: Mapping[str, object]) -> Runner:
    figures = mapping(row["figures"], "figures")
    return Runner(
        path=text(row, "path"),
        arguments=texts(row, "arguments"),
        parser=text(row, "parser"),
        figures={name: number(figures, name) for name in figures},
    )


def _ratio(row: Mapping[str, object]) -> ArmRatio:
    return ArmRatio(
        figure=_one_of(row, "figure", FIGURES),
        device=text(row, "device"),
        prompt=integer(row, "prompt", 1),
        output=integer(row, "output", 1),
        of=text(row, "of"),
        of_folder=text(row, "of_folder"),
        against=text(row, "against"),
        against_folder=text(row, "against_folder"),
        value=number(row, "value"),
        low=_optional(row, "low"),
        high=_optional(row, "high"),
        pairs=integer(row, "pairs"),
    )


def _rows(
    data: Mapping[str, object], name: str, read: Callable[[Mapping[str, object]], Read]
) -> tuple[Read, ...]:
    rows = data[name]
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise TypeError(f"{name} is {quoted(rows)}, not a list")
    return tuple(read(mapping(row, f"one of {name}")) for row in rows)


def _one_of(row: Mapping[str, object], name: str, known: Sequence[str]) -> Any:
    value = text(row, name)
    if value not in known:
        raise TypeError(f"{name} is {quoted(value)}, not one of {', '.join(known)}")
    return value


def _optional(row: Mapping[str, object], name: str) -> float | None:
    return None if row[name] is None else number(row, name)


def _seconds(row: Mapping[str, object], name: str) -> float | None:
    value = _optional(row, name)
    if value is not None and not 0 <= value < _MOST_SECONDS:
        raise TypeError(f"{name} is {value}, which no time is")
    return value


def _numbers(row: Mapping[str, object], name: str) -> tuple[float, ...]:
    values = row[name]
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} is {quoted(values)}, not a list of numbers")
    found = [_seconds({name: value}, name) for value in values]
    return tuple(0.0 if value is None else value for value in found)


def _counts(row: Mapping[str, object]) -> dict[str, int]:
    return {name: integer(row, name) for name in row}


def _texts_by_name(row: Mapping[str, object], name: str) -> dict[str, str]:
    rows = mapping(row[name], name)
    return {key: text(rows, key) for key in rows}


def _table(row: Mapping[str, object], name: str) -> dict[str, Any] | None:
    return None if row[name] is None else dict(mapping(row[name], name))
