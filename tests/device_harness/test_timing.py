"""Timing in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from device_harness.errors import DeviceError
from device_harness.memory import resident_peak
from device_harness.timing import Timings, measure, time_artifact
from exporters.manifest import Manifest


def test_a_process_of_its_own_gives_sane_figures(artifact):
    # A large parent must not count: what it holds is no part of running an artifact.
    held = bytearray(300 * 2**20)
    held[::4096] = b"1" * len(held[::4096])
    timings = time_artifact(artifact, threads=1, prefill=20, decode=8)
    assert (timings.prefill_tokens, timings.decode_tokens) == (20, 8)
    assert "1 threads" in timings.runtime
    assert 0 < timings.first_token_seconds < 5
    assert 0 < timings.load_seconds < 60
    assert timings.prefill_tokens_per_second == pytest.approx(20 / timings.first_token_seconds)
    assert timings.decode_tokens_per_second > 1
    assert 10 * 2**20 < timings.peak_bytes < 160 * 2**20
    assert 0 <= timings.loaded_bytes < 40 * 2**20 < timings.peak_bytes


def test_the_worker_prints_json_and_imports_no_torch(artifact):
    program = (
        "import sys\n"
        "sys.argv = ['timing', sys.argv[1], '--prefill', '4', '--decode', '2', '--threads', '1']\n"
        "from device_harness.timing import main\n"
        "main()\n"
        "heavy = {'torch', 'transformers', 'onnx', 'edgeforge'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(artifact)], capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
    data = json.loads(done.stdout)
    assert data.keys() == {field.name for field in fields(Timings)}
    assert Timings(**data).decode_tokens == 2


@pytest.mark.parametrize(("asked", "given"), [((500, 500), (32, 31)), ((1, 1), (1, 1))])
def test_lengths_fit_the_context(artifact, asked, given):
    timings = measure(artifact, 1, *asked)
    assert (timings.prefill_tokens, timings.decode_tokens) == given
    slow, fast = timings.slow_tokens_per_second, timings.fast_tokens_per_second
    assert 0 < slow <= timings.decode_tokens_per_second <= fast


def test_the_workers_last_words_are_told(tmp_path):
    with pytest.raises(DeviceError) as caught:
        time_artifact(tmp_path / "nothing here", threads=1)
    folder = tmp_path / "nothing here"
    assert str(caught.value) == (
        f"timing {folder} failed: {folder} is no EdgeForge artifact: it has no edgeforge.json"
    )


def test_the_worker_runs_wherever_it_is_started(artifact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(artifact, tmp_path)
    timings = time_artifact(type(artifact)(relative), threads=1, prefill=2, decode=1)
    assert timings.runtime.startswith("onnxruntime")
    assert Manifest.read(artifact).context == 64


def test_resident_peak_grows_with_what_is_held():
    before = resident_peak()
    held = bytearray(before)  # as much again as the process ever held
    assert resident_peak() > before + len(held) // 2
