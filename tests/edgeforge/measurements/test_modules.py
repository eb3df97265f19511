"""Artifacts of modules, measured by the protocol of language models and the same bench.json."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

from device_harness.measuring import record_json
from edgeforge import api
from edgeforge.errors import UsageError
from edgeforge.measurements.measure import measure
from edgeforge.measurements.options import BenchOptions
from edgeforge.measurements.result import BenchFailed
from edgeforge.reports.speed_lines import speed_lines
from exporters.modules.manifest import SAMPLES

pytestmark = pytest.mark.artifact
SCHEMA = Path(record_json.__file__).with_name("schemas") / "bench-1.schema.json"


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    root = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(3, 32)
        for recipe in ("int8", "fp32"):
            api.export_module(net, x, root / recipe, recipe=recipe)
    return root


def test_calls_are_timed_by_turns_and_kept(modules, edgeforge, tmp_path):
    both = modules / "int8", modules / "fp32"
    log = tmp_path / "history.jsonl"
    shown = edgeforge("bench", *both, "--runs", "6", "--minutes", "0.01", "--history", log, "-q")
    assert shown.code == 0, shown.err
    assert "calls with input float32[3, 32], 6 warm runs after 1 to warm up" in shown.out
    for words in ("calls/s [", "a call ", "first call ", "B against A: calls x ", "sustained: "):
        assert words in shown.out
    assert "outputs: 1 of 1 are within the bound" in shown.out and "token" not in shown.out
    data = json.loads((modules / "int8" / "bench.json").read_text())
    jsonschema.validate(data, json.loads(SCHEMA.read_text()))
    (cell,) = record_json.read_bench(data).cells
    assert cell.shapes == {"input": "float32[3, 32]"} and cell.text.verdict == "passed"
    assert cell.cold.load_seconds > 0 and cell.summary("decode").count == 6
    assert len(cell.sustained) > 0 and not any(run.tokens for run in cell.runs)
    compared = api.compare(*both)
    assert [each.figure for each in compared.speeds.groups[0].ratios] == ["decode"]
    lines = "\n".join(speed_lines(compared.speeds, named=False))
    assert "calls/s" in lines and "B against A, calls" in lines and "token" not in lines
    again = edgeforge("bench", modules / "int8", "--runs", "1", "--history", log, "-q")
    assert "call: " in again.out and "calls/s, " in again.out and "prefill" not in again.out


def test_other_outputs_than_the_modules_are_no_speed(modules, tmp_path, monkeypatch):
    with np.load(modules / "fp32" / SAMPLES) as held:
        wrong = {key: held[key] + (0.5 if "/quantized/" in key else 0) for key in held}
    monkeypatch.setattr(
        "edgeforge.modules.samples.read_arrays", lambda path: wrong if path.name == SAMPLES else {}
    )
    out = tmp_path / "bench.json"
    with pytest.raises(
        BenchFailed, match=r"calls with input .*: the output output differs"
    ) as told:
        api.bench(modules / "fp32", runs=1, warm_up=0, out=out)
    assert told.value.bench.only.summary("decode") is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": 8}, "--prompt is for language models: a module is called with its example"),
        ({"decode": 8}, "--output is for language models"),
        ({"precision": "fp32"}, "--precision is for language models"),
        ({"device": "android"}, "modules are measured on host alone, not on android"),
    ],
)
def test_options_of_language_models(modules, options, words):
    with pytest.raises(UsageError, match=words):
        api.bench(modules / "int8", **options)


def test_what_cannot_be_measured_together(modules, tmp_path):
    (other,) = api.export_module(nn.ReLU(), torch.ones(2, 2), tmp_path / "relu", recipe="fp32")
    with pytest.raises(UsageError, match="take inputs of other shapes"):
        api.bench(modules / "int8", other)
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="model is no artifact of a module: measure it in a call"):
        measure([modules / "int8", tmp_path / "model"], BenchOptions())
