"""Measuring for real: processes of this host, and devices that fail beside it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import edgeforge
from device_harness.devices import registry
from device_harness.devices.host import HostDevice
from device_harness.errors import DeviceError, LogitsNotFiniteError
from device_harness.measuring.record_json import bench_json
from device_harness.measuring.rules import Rules
from device_harness.registry import open_session
from device_harness.timed_run import run_timed
from edgeforge.errors import CheckFailed, UsageError
from edgeforge.measurements.bench_file import read_bench_file
from edgeforge.measurements.measure import measure
from edgeforge.measurements.options import BenchOptions
from edgeforge.measurements.prompts import Prompts
from edgeforge.measurements.result import BenchFailed, DevicesFailed, require_measured
from exporters.manifest import Manifest

QUICK = BenchOptions(prompts=(8,), outputs=(6,), rules=Rules(runs=2), threads=1)


def test_what_is_measured_is_what_the_manifest_says(artifacts, tmp_path):
    # Names of folders and files say nothing: this one claims another recipe and target.
    liar = shutil.copytree(artifacts.int4, tmp_path / "int8-coreml-ane")
    cell = measure([liar], QUICK).only
    manifest = Manifest.read(liar)
    assert (cell.artifact.target, cell.artifact.recipe) == ("onnx", "int4")
    assert cell.artifact.checkpoint == manifest.source.sha256
    assert cell.artifact.bytes == sum(each.size for each in manifest.files.values())
    assert cell.runtime.startswith("onnxruntime") and "1 threads" in cell.runtime
    assert [run.outcome for run in cell.runs] == ["counted", "warm-up", "counted", "counted"]
    assert [run.start for run in cell.runs] == ["cold", "warm", "warm", "warm"]
    assert (cell.text.verdict, cell.text.agreed, cell.text.of) == ("passed", 6, 6)
    assert cell.processor == "CPU"
    assert cell.failed == "" and cell.cold.load_seconds > 0


def test_the_device_generates_what_a_session_here_does(artifacts):
    cell = measure([artifacts.int4], QUICK).only
    manifest = Manifest.read(artifacts.int4)
    with open_session(artifacts.int4, manifest, 1) as session:
        prompt = Prompts(artifacts.int4, manifest).of(8)
        assert {run.tokens for run in cell.runs} == {run_timed(session, prompt, 6).tokens}


def test_each_point_of_the_grid_is_a_cell(artifacts):
    options = replace(QUICK, prompts=(4, 9), outputs=(2, 5), rules=Rules(runs=1, warm_up=0))
    found = measure([artifacts.int4, artifacts.int8], options)
    points = [(cell.artifact.recipe, cell.prompt, cell.output) for cell in found.cells]
    assert points == [
        (recipe, prompt, output)
        for prompt in (4, 9)
        for output in (2, 5)
        for recipe in ("int4", "int8")
    ]
    assert {len(run.tokens) for run in found.cells[-1].runs} == {5}
    assert len(found.ratios) == 2 * 4
    assert all(ratio.against_folder == str(artifacts.int4) for ratio in found.ratios)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (replace(QUICK, prompts=(8, 60), outputs=(6,)), "prompt of 60 tokens and an output of 6"),
        (replace(QUICK, prompts=(65,), outputs=()), "do not fit the context of 64"),
        (replace(QUICK, outputs=(1,), rules=Rules(minutes=1)), "sustained run needs an --output"),
        (replace(QUICK, rules=Rules(runs=0)), "measure nothing"),
        (
            replace(QUICK, runtime={"precision": "fp32"}),
            "onnx artifacts have no option --precision",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(artifacts, options, words):
    with pytest.raises(UsageError, match=words):
        measure([artifacts.int4], options)


def test_lengths_that_nobody_asked_for_fit_a_short_context(artifacts):
    assert BenchOptions().points({"a": 64}) == [(32, 32)]
    assert BenchOptions().points({"a": 4096, "b": 16}) == [(8, 9)]
    assert BenchOptions(prompts=(64,)).points({"a": 64}) == [(64, 1)]


def test_a_device_that_fails_does_not_stop_the_rest(artifacts, devices):
    options = replace(QUICK, devices=("gone:1", "host", "gone:2"))
    found = measure([artifacts.int4], options)
    assert [each.failure != "" for each in found.devices] == [True, False, True]
    assert found.only.device == "host" and not found.only.failed
    with pytest.raises(DevicesFailed) as caught:
        require_measured(found)
    words = "gone:1: gone:1 is not connected: plug it in (and 1 more)"
    assert str(caught.value) == words and caught.value.bench is found


def test_garbage_is_no_speed(artifacts, devices):
    options = replace(QUICK, devices=("swapped",), outputs=(24,))
    found = measure([artifacts.int4, artifacts.int8], options)
    for cell in found.cells:
        assert cell.text.verdict == "failed" and cell.text.agreed < cell.text.of - 2
        assert cell.counted and cell.summary("decode") is None
        assert "not this model's text" in cell.failed
    assert not found.ratios
    with pytest.raises(BenchFailed):
        require_measured(found)


def test_an_artifact_that_the_device_does_not_run_is_told(artifacts, devices, tmp_path):
    foreign = shutil.copytree(artifacts.int4, tmp_path / "foreign")
    data = json.loads((foreign / "edgeforge.json").read_text())
    (foreign / "edgeforge.json").write_text(json.dumps({**data, "target": "coreml"}))
    found = measure([foreign], replace(QUICK, devices=("swapped",)))
    assert "coreml artifacts do not run on swapped" in found.only.failed
    assert [run.outcome for run in found.only.runs] == ["failed", "failed"]


def test_several_devices_write_one_file_in_the_api(artifacts, devices, tmp_path):
    out = tmp_path / "bench.json"
    with pytest.raises(CheckFailed):
        edgeforge.bench(
            artifacts.int4, device=["host", "swapped"], prompt=8, output=24, runs=1, out=out
        )
    read = read_bench_file(out)
    assert [cell.text.verdict for cell in read.cells] == ["passed", "failed"]
    with pytest.raises(DeviceError, match=r"no device 'hots'.*did you mean 'host'"):
        edgeforge.bench(artifacts.int4, device="hots", prompt=8, output=2, runs=1, out=out)
    assert len(read_bench_file(out).cells) == 2


def test_one_artifacts_figures_are_the_results_own(artifacts):
    found = edgeforge.bench(artifacts.int4, prefill=500, decode=500, threads=1, runs=1)
    assert (found.prefill_tokens, found.decode_tokens) == (32, 31)
    assert found.decode_tokens_per_second == found.only.summary("decode").median > 0
    assert found.load_seconds > 0 and found.peak_bytes > 1 << 20
    assert found.runtime.startswith("onnxruntime")


def test_the_first_run_after_sending_files_is_the_first_ever(artifacts, devices, monkeypatch):
    class Counting(HostDevice):
        """Sends an artifact once, as a phone does."""

        name, sent_bytes, has = "counting", 0, ()

        def start(self, folder, manifest, arguments):
            if folder not in self.has:
                self.sent_bytes, self.has = self.sent_bytes + 100, (*self.has, folder)
            return super().start(folder, manifest, arguments)

    row = registry.Kind(Counting, list, ("onnx",))
    monkeypatch.setitem(registry.KINDS, "counting", row)
    options = replace(QUICK, devices=("counting",), prompts=(4, 8), rules=Rules(runs=1))
    cells = measure([artifacts.int4, artifacts.int8], options).cells
    assert [cell.runs[0].start for cell in cells] == ["first-ever", "first-ever", "cold", "cold"]


def test_what_its_owner_calls_a_phone_is_in_no_file(artifacts, monkeypatch):
    class Phone(HostDevice):
        name = "ios:00008110-001E"

        def __init__(self, place: str = "") -> None:
            super().__init__()

        def facts(self):
            more = {"title": "Ada's phone", "developer mode": "enabled"}
            return replace(super().facts(), name=self.name, kind="ios", more=more)

    monkeypatch.setitem(registry.KINDS, "ios", registry.Kind(Phone, list, ("onnx",)))
    found = measure([artifacts.int4], replace(QUICK, devices=("ios",), rules=Rules(runs=1)))
    text = json.dumps(bench_json(found))
    assert found.devices[0].facts["more"] == {"developer mode": "enabled"}
    assert "00008110" not in text and "Ada" not in text


def test_no_process_is_left(artifacts, devices):
    def children() -> set[str]:
        return {
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/status")
            if f"PPid:\t{os.getpid()}\n" in path.read_text()
        }

    before = children()
    measure([artifacts.int4], replace(QUICK, devices=("host", "swapped")))

    def interrupt(stage: str, done: int, of: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure([artifacts.int4], QUICK, interrupt)
    assert children() <= before


def test_logits_that_are_no_numbers_have_no_speed():
    assert issubclass(edgeforge.measurements.result.BenchNotFinite, LogitsNotFiniteError)
