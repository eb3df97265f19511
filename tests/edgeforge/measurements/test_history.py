"""The history: added to, never rewritten, and compared with what is comparable alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from device_harness.measuring.bench import Bench, DeviceRecord
from device_harness.measuring.record import Cell, Measured, Run, TextCheck
from edgeforge.errors import UsageError
from edgeforge.measurements.history import read_history

ARTIFACT = Measured("out/a", "onnx", "int4", "org/m", "c" * 64, "m" * 64, 64, 4.5, 10)


def bench(*steps: float, at: float = 1e9, **changes: object) -> Bench:
    """A measurement of one cell whose runs took these seconds a token."""
    runs = tuple(Run("warm", "counted", at, "", None, 8 * step, (step,) * 4) for step in steps)
    cell = Cell(ARTIFACT, "phone", 8, 5, at=at, runs=runs, text=TextCheck("passed", 5, 5, 5))
    device = DeviceRecord("phone", {"model": "Pixel 9"})
    return Bench((device,), (replace(cell, **changes),))


def test_the_change_is_since_the_last_comparable_entry(tmp_path):
    path = tmp_path / "history.jsonl"
    for found in (bench(0.2, at=1.0), bench(0.1, at=2.0), bench(0.5, at=3.0, prompt=16)):
        read_history(path).append(found)
    now = bench(0.08, at=4.0)
    prefill, decode = read_history(path).changes(now.only, "Pixel 9")
    assert (decode.figure, decode.since) == ("decode", 2.0)
    assert (decode.before, decode.now, decode.ratio) == pytest.approx((10, 12.5, 1.25))
    assert decode.apart and prefill.ratio == pytest.approx(1.25)


@pytest.mark.parametrize(
    "changes",
    [
        {"artifact": replace(ARTIFACT, recipe="int8")},
        {"artifact": replace(ARTIFACT, target="executorch")},
        {"artifact": replace(ARTIFACT, options={"kv_cache": "int8"})},
        {"device": "other"},
        {"output": 6},
        {"threads": 2},
        {"options": {"precision": "fp32"}},
    ],
    ids=str,
)
def test_what_is_not_comparable_is_not_compared(tmp_path, changes):
    path = tmp_path / "history.jsonl"
    read_history(path).append(bench(0.1))
    other = bench(0.1, **changes).only
    assert read_history(path).changes(other, "Pixel 9") == []
    assert read_history(path).changes(bench(0.1).only, "Pixel 8") == []
    # Another export, of other weights and from another folder, is the same model's.
    again = replace(ARTIFACT, folder="b", manifest="n" * 64, checkpoint="d" * 64)
    assert read_history(path).changes(bench(0.1, artifact=again).only, "Pixel 9")


def test_runs_that_overlap_are_not_told_apart(tmp_path):
    path = tmp_path / "history.jsonl"
    read_history(path).append(bench(0.1, 0.11, 0.12))
    _, decode = read_history(path).changes(bench(0.09, 0.1, 0.105).only, "Pixel 9")
    assert decode.ratio > 1 and not decode.apart


def test_what_failed_is_no_entry(tmp_path):
    path = tmp_path / "history.jsonl"
    read_history(path).append(bench(0.1, text=TextCheck("failed", 1, 5, 0, 1, "host", "garbage")))
    assert not path.exists()


def test_a_line_cut_short_loses_itself_alone(tmp_path):
    path = tmp_path / "history.jsonl"
    for step in (0.1, 0.2):
        read_history(path).append(bench(step))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])  # a full disk, or a killed process
    read_history(path).append(bench(0.3))
    again = read_history(path)
    assert (len(again.entries), again.damaged) == (2, 1)
    assert path.read_bytes().startswith(whole[:-40] + b"\n")
    assert again.changes(bench(0.3).only, "Pixel 9")[1].ratio == pytest.approx(1)


def test_what_is_no_history_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes\n")
    with pytest.raises(UsageError, match="is no history of `edgeforge bench`"):
        read_history(path)
    read_history(tmp_path / "h.jsonl").append(bench(0.1))
    path = tmp_path / "h.jsonl"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(UsageError, match="entries of version 2; this EdgeForge reads 1"):
        read_history(path)
    with pytest.raises(UsageError, match="cannot be written"):
        read_history(tmp_path / "no" / "h.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        read_history(tmp_path)
