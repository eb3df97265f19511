"""``bench.json`` reads back as it was, keeps to its schema, and refuses what it is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

import device_harness.measuring
from device_harness.devices.device import Condition, Core, Facts
from device_harness.measuring.bench import Bench, DeviceRecord
from device_harness.measuring.protocol import measure_point
from device_harness.measuring.record import Point, Runner, TextCheck
from device_harness.measuring.record_json import BenchError, bench_json, read_bench
from quant.json_output import json_text

SCHEMA = json.loads(
    (Path(device_harness.measuring.__file__).parent / "schemas/bench-1.schema.json").read_text()
)


@pytest.fixture
def bench(site, play) -> Bench:
    warm = Condition(5.0, thermal_status=0, clocks={"cpu0": 1}, clock_limits={"cpu0": 2})
    arms = [play("a", [0.1, 0.1, "lost", *[0.1] * 9]).arm(), play("b", [0.2] * 9).arm()]
    turns = measure_point(site([warm], runs=6, cool_to=None), arms, 8, 5)
    one, other = turns.cells
    one = replace(
        one,
        text=TextCheck("passed", 5, 5, 5, 1, "onnxruntime"),
        sustained=(Point(0.0, 10.0, 5.0, warm.as_json()), Point(130.0, 9.0, 4.0)),
        instructions={"all": 123, "dot": 4},
        options={"precision": "fp32"},
        threads=4,
    )
    other = replace(other, runner=Runner("/data/run", ("-m", "x"), "llama-bench", {"pp": 3.5}))
    facts = Facts("played", "host", "m", "Linux", "p", (Core("cpu0", 2),), 1 << 30)
    devices = (
        DeviceRecord("played", facts.as_json(), ("a limit",)),
        DeviceRecord("gone", failure="no"),
    )
    return Bench(devices, (one, other), turns.ratios)


def written(bench: Bench) -> dict:
    return json.loads(json_text(bench_json(bench)))


def test_it_reads_back_as_it_was(bench):
    assert read_bench(written(bench)) == bench


def test_it_keeps_to_its_schema(bench):
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    validator.validate(written(bench))
    # The schema is strict: it would see a field that nobody described.
    spoilt = written(bench)
    spoilt["cells"][0]["surprise"] = 1
    assert not validator.is_valid(spoilt)


def test_figures_are_made_of_the_runs_and_not_believed(bench):
    data = written(bench)
    assert data["cells"][0]["figures"]["decode_tokens_per_second"]["median"] == pytest.approx(10)
    data["cells"][0]["figures"]["decode_tokens_per_second"]["median"] = 1e6
    assert read_bench(data).cells[0].summary("decode").median == pytest.approx(10)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"schema_version": 2},
            "has schema version 2; this EdgeForge reads 1: read it with a newer",
        ),
        ({"schema_version": 0}, "has schema version 0; this EdgeForge reads 1: measure again"),
        ({"schema_version": True}, "has schema version True; this EdgeForge reads 1"),
        ({"kind": "report"}, "is no bench of EdgeForge"),
        ({"cells": 3}, "is damaged: cells is 3, not a list"),
    ],
)
def test_what_it_is_not_is_refused_in_a_phrase(bench, change, words):
    with pytest.raises(BenchError) as caught:
        read_bench({**written(bench), **change})
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_spoilt_field_is_refused_or_ignored(bench):
    """Whatever stands in a field: a bench, or a phrase; never another error."""
    data = written(bench)
    refused = 0
    for cell in range(2):
        for name in data["cells"][cell]:
            for value in (None, "x", -1, [], {}, [[1]], {"a": []}, True, float("1e400")):
                spoilt = json.loads(json.dumps(data))
                spoilt["cells"][cell][name] = value
                try:
                    read_bench(spoilt)
                except BenchError:
                    refused += 1
    for name in data["cells"][0]["runs"][0]:
        for value in (None, "x", -1, [], {}, ["y"], True):
            spoilt = json.loads(json.dumps(data))
            spoilt["cells"][0]["runs"][0][name] = value
            try:
                read_bench(spoilt)
            except BenchError:
                refused += 1
    assert refused > 100


def test_a_single_cells_figures_are_the_benchs_own(bench):
    alone = replace(bench, cells=bench.cells[:1])
    assert alone.decode_tokens_per_second == pytest.approx(10)
    assert (alone.prefill_tokens, alone.decode_tokens, alone.peak_bytes) == (8, 4, 1000)
    with pytest.raises(ValueError, match="2 cells"):
        _ = bench.decode_tokens_per_second


def test_the_speed_of_garbage_is_none(bench):
    (cell, _) = bench.cells
    garbage = replace(cell, text=TextCheck("failed", 1, 5, 0, 1, "onnxruntime", "it is none"))
    assert garbage.summary("decode") is None and garbage.failed == "it is none"
