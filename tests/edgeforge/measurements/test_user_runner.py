"""A program of the user's own: its words come after ``--``, its figures from what it prints.

The phone is played at its outermost edge, `run_runner`, which has tests with a virtual phone.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from device_harness.devices import registry
from device_harness.devices.android import runner as android
from device_harness.devices.android.runner_output import read_figures
from device_harness.devices.host import HostDevice
from device_harness.measuring.record_json import read_bench

LLAMA_BENCH = json.dumps(
    [
        {"backends": "CPU", "n_prompt": 512, "n_gen": 0, "avg_ts": 260.5, "model_type": "m"},
        {"backends": "CPU", "n_prompt": 0, "n_gen": 128, "avg_ts": 50.25},
    ],
    indent=2,
)


@pytest.fixture
def phone(monkeypatch, tmp_path):
    """A phone that runs a program: what it was given, and what it answers."""

    class Phone(HostDevice):
        name = "android:A"

        def __init__(self, place: str = "") -> None:
            super().__init__()

    said = SimpleNamespace(code=0, output=LLAMA_BENCH, errors="", given=None)

    def run_runner(device, path, arguments, artifact):
        said.given = (device.name, path, arguments, artifact[0])
        figures = tuple(read_figures(said.output))
        return SimpleNamespace(
            code=said.code, output=said.output, errors=said.errors, figures=figures
        )

    monkeypatch.setitem(registry.KINDS, "android", registry.Kind(Phone, list, ("onnx",)))
    monkeypatch.setattr(android, "run_runner", run_runner)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama-bench").write_bytes(b"\x7fELF")
    return said


RUN = ("--device", "android:A", "--runner", "llama-bench", "-q", "--out", "b.json")


def test_its_figures_are_a_cell(edgeforge, artifacts, phone, tmp_path):
    done = edgeforge("bench", artifacts.int4, *RUN, "--", "-m", "model.gguf", "--json")
    assert done.code == 0, done.err
    name, path, arguments, artifact = phone.given
    assert (name, path.name, artifact) == ("android:A", "llama-bench", artifacts.int4)
    assert arguments == ("-m", "model.gguf", "--json")
    (cell,) = read_bench(json.loads((tmp_path / "b.json").read_text())).cells
    assert cell.runner.arguments == arguments and cell.runner.parser == "llama-bench"
    assert cell.runner.figures == {
        "512 + 0: prefill_tokens_per_second": 260.5,
        "0 + 128: decode_tokens_per_second": 50.25,
    }
    assert (cell.prompt, cell.output, cell.processor) == (512, 128, "CPU")
    assert cell.text.verdict == "not checked" and not cell.failed
    assert "llama-bench of llama-bench: 512 + 0: prefill_tokens_per_second 260" in done.out


@pytest.mark.parametrize(
    ("code", "output", "errors", "words"),
    [
        (139, "", "loading\nSegmentation fault", "exit code 139: Segmentation fault"),
        (0, "hello", "", "printed no figures that EdgeForge reads"),
    ],
)
def test_a_program_that_fails_ends_with_6(
    edgeforge, artifacts, phone, tmp_path, code, output, errors, words
):
    phone.code, phone.output, phone.errors = code, output, errors
    done = edgeforge("bench", artifacts.int4, *RUN)
    assert done.code == 6 and words in done.err.splitlines()[-1]
    assert words in json.loads((tmp_path / "b.json").read_text())["cells"][0]["failure"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--runner", "llama-bench"), "--runner runs a program on a phone, and host is none"),
        (("--device", "android:A", "--runner", "nothing"), "--runner nothing is no file"),
        (("--instructions",), "--instructions counts on emulated cores, and host is none"),
    ],
)
def test_what_runs_nowhere_ends_with_2(edgeforge, artifacts, phone, options, words):
    done = edgeforge("bench", artifacts.int4, *options)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_without_a_runner_dashes_are_as_everywhere(edgeforge, artifacts, phone, tmp_path):
    done = edgeforge("bench", "--runs", 1, "--prompt", 4, "--output", 2, "-q", "--out", "b.json",
                     "--", artifacts.int4)  # fmt: skip
    assert done.code == 0, done.err
    assert phone.given is None
