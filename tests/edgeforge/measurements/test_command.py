"""The command `bench`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import device_harness.measuring
from device_harness.measuring.record_json import read_bench

SCHEMA = Path(device_harness.measuring.__file__).parent / "schemas/bench-1.schema.json"
QUICK = ("--prompt", "8", "--output", "24", "--runs", "1", "--threads", "1", "-q")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_artifacts_side_by_side(edgeforge, artifacts, here, monkeypatch):
    monkeypatch.chdir(artifacts.root)  # so that paths are short
    out = here / "b.json"
    done = edgeforge("bench", "int4", "int8", *QUICK[:4], "--runs", 2, "-q", "--out", out)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert "  8 + 24 tokens, 2 warm runs after 1 to warm up" in lines
    assert "  A  int4 (onnx, int4)" in lines and "  B  int8 (onnx, int8)" in lines
    assert sum("text: 24 of 24 tokens are this host's choice" in line for line in lines) == 2
    assert sum(line.startswith("  B against A: decode x ") for line in lines) == 1
    assert lines[-1] == f"written to {out}"
    assert [cell.artifact.folder for cell in read_bench(json.loads(out.read_text())).cells] == [
        "int4",
        "int8",
    ]
    assert not (artifacts.int4 / "bench.json").exists()


def test_json_keeps_to_the_schema(edgeforge, artifacts, here):
    done = edgeforge("bench", artifacts.int4, *QUICK, "--json", "--out", "b.json")
    assert done.code == 0, done.err
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    for text in (done.out, (here / "b.json").read_text()):
        validator.validate(json.loads(text))


def test_garbage_ends_with_1_and_is_kept(edgeforge, artifacts, devices, here):
    done = edgeforge(
        "bench", artifacts.int4, *QUICK, "--device", "host,swapped", "--out", "b.json", "--full"
    )
    assert done.code == 1
    assert "not this model's text" in done.err.splitlines()[-1]
    assert "     FAILED: of 24 generated tokens" in done.out
    read = read_bench(json.loads((here / "b.json").read_text()))
    assert [cell.text.verdict for cell in read.cells] == ["passed", "failed"]
    assert done.out.count("  counted ") == 4  # --full lists each run of both


def test_a_lost_device_ends_with_6_and_the_rest_is_kept(edgeforge, artifacts, devices, here):
    out = ("--out", "b.json")
    done = edgeforge("bench", artifacts.int4, *QUICK, "--device", "gone", "--device", "host", *out)
    assert done.code == 6
    assert done.err.splitlines()[-1] == ("edgeforge: gone: gone: is not connected: plug it in")
    assert "text: 24 of 24 tokens" in done.out
    read = read_bench(json.loads((here / "b.json").read_text()))
    assert [each.failure != "" for each in read.devices] == [True, False]


def test_a_history_tells_the_change(edgeforge, artifacts, here):
    for number in range(2):
        done = edgeforge("bench", artifacts.int4, *QUICK, "--history", "h.jsonl", "--out", "b.json")
        assert done.code == 0, done.err
        assert ("no comparable entry" in " ".join(done.out.split())) is (number == 0)
    assert "  decode: " in done.out and " tokens/s, " in done.out
    assert len((here / "h.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "1,x"), "--prompt has 'x'"),
        (("--output", "2", "--decode", "1"), "--output and --decode say the same"),
        (("--prompt", "60", "--output", "30"), "do not fit the context of 64"),
        (("--runs", "0"), "--runs"),
        (("--device", ","), "--device has an empty name"),
        (("--out", "no/where.json"), "existing folder"),
        (("--minutes", "1", "--output", "1"), "sustained run needs an --output"),
    ],
)
def test_what_cannot_be_measured_ends_with_2(edgeforge, artifacts, here, options, words):
    done = edgeforge("bench", artifacts.int4, *options)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()[-1:]
    assert words in line
    assert not list(here.iterdir())


def test_prefill_and_decode_are_the_old_names(edgeforge, artifacts, here):
    done = edgeforge(
        "bench", artifacts.int4, "--prefill", 4, "--decode", 2, "--runs", 1, "-q", "--json",
        "--out", "b.json",
    )  # fmt: skip
    (cell,) = json.loads(done.out)["cells"]
    assert (cell["prompt"], cell["output"]) == (4, 3)
    assert len(cell["runs"][0]["step_seconds"]) == 2
