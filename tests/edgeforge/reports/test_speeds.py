"""Speeds side by side, from the files of `bench` alone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from device_harness.measuring.bench import ArmRatio, Bench, DeviceRecord
from device_harness.measuring.record import Cell, Measured, Point, Run, TextCheck
from edgeforge.errors import UsageError
from edgeforge.measurements.bench_file import write_bench_file
from edgeforge.reports.lines import text_lines
from edgeforge.reports.paired import compare
from edgeforge.verification.freshness import sha256_of


def cell(name: str, *steps: float, device: str = "phone", manifest: str = "", **changes) -> Cell:
    """A cell whose runs took these seconds a token."""
    measured = Measured(name, "onnx", "int4", "m", "c" * 64, manifest or name * 64, 64, 4.5, 10)
    runs = tuple(Run("warm", "counted", 1.0, "", None, 8 * step, (step,) * 4) for step in steps)
    given = {"runs": runs, "text": TextCheck("passed", 5, 5, 5), "at": 1.0, **changes}
    return Cell(measured, device, 8, 5, **given)


def bench(*cells: Cell, ratios: tuple[ArmRatio, ...] = (), emulated: bool = False) -> Bench:
    names = dict.fromkeys(each.device for each in cells)
    facts = {"model": "Pixel 9", "emulated": emulated}
    return Bench(tuple(DeviceRecord(name, facts) for name in names), cells, ratios)


def ratio(of: str, against: str, value: float, low: float | None, high: float | None) -> ArmRatio:
    ends = (of * 64, of, against * 64, against)
    return ArmRatio("decode", "phone", 8, 5, *ends, value, low, high, 6)


@pytest.fixture
def write(tmp_path):
    def written(name: str, found: Bench) -> Path:
        write_bench_file(found, tmp_path / name)
        return tmp_path / name

    return written


def decode_ratios(comparison):
    return [
        (each.side, round(each.value, 4), each.low, each.high, each.by_turns, each.outcome)
        for group in comparison.speeds.groups
        for each in group.ratios
        if each.figure == "decode"
    ]


def test_two_of_one_file_by_turns(write):
    told = (ratio("b", "a", 1.25, 1.1, 1.5),)
    path = write("x.json", bench(cell("a", 0.1), cell("b", 0.2), ratios=told))
    # The pairs' ratio is what counts, not the medians', which say the contrary here.
    assert decode_ratios(compare([path])) == [(1, 1.25, 1.1, 1.5, True, "faster")]


def test_the_first_may_have_been_measured_second(write):
    told = (ratio("a", "b", 0.5, 0.4, 0.8),)
    path = write("x.json", bench(cell("a", 0.2), cell("b", 0.1), ratios=told))
    assert decode_ratios(compare([path])) == [(1, 2.0, 1 / 0.8, 1 / 0.4, True, "faster")]


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.9, 1.4, "not told apart"), (1.01, 1.4, "faster"), (None, None, "not told apart")],
)
def test_an_interval_decides_by_turns(write, low, high, outcome):
    told = (ratio("b", "a", 1.2, low, high),)
    path = write("x.json", bench(cell("a", 0.1), cell("b", 0.1), ratios=told))
    assert decode_ratios(compare([path]))[0][-1] == outcome


def test_two_files_are_not_by_turns_and_say_so(write):
    before = write("before.json", bench(cell("a", 0.10, 0.11)))
    after = write("after.json", bench(cell("a", 0.08, 0.085)))
    found = compare([before, after])
    ((_, value, low, high, by_turns, outcome),) = decode_ratios(found)
    assert (low, high, by_turns, outcome) == (None, None, False, "faster")
    assert value == pytest.approx(0.105 / 0.0825, rel=0.01)
    lines = text_lines(found)
    assert max(map(len, lines)) <= 80 or str(before) in " ".join(lines)
    text = " ".join(" ".join(lines).split())
    assert "(not by turns)" in text and "`edgeforge bench A B` measures both" in text


def test_runs_that_overlap_are_not_told_apart(write):
    before = write("before.json", bench(cell("a", 0.10, 0.11)))
    after = write("after.json", bench(cell("a", 0.09, 0.105)))
    assert decode_ratios(compare([before, after]))[0][-1] == "not told apart"


def test_garbage_has_no_ratio(write):
    garbage = cell("b", 0.01, text=TextCheck("failed", 0, 5, 0, 1, "host", "it is none"))
    found = compare([write("x.json", bench(cell("a", 0.1), garbage))])
    assert decode_ratios(found) == []
    lines = text_lines(found)
    assert any(line.startswith("decode, tokens/s") and line.endswith("failed") for line in lines)


def test_devices_and_lengths_stay_apart(write):
    cells = [cell(n, 0.1, device=d) for d in ("phone", "host") for n in "ab"]
    found = compare([write("x.json", bench(*cells, replace(cells[0], prompt=16)))])
    points = [(each.device.name, each.prompt) for each in found.speeds.groups]
    assert points == [("phone", 8), ("host", 8), ("phone", 16)]
    assert found.speeds.groups[2].cells[1] is None and not found.speeds.groups[2].ratios


def test_an_emulated_device_is_named_in_the_table(write):
    found = compare([write("x.json", bench(cell("a", 0.1), cell("b", 0.1), emulated=True))])
    assert any("emulated, so no speed" in line for line in text_lines(found))


@pytest.fixture
def measured(copies):
    """``int4`` and ``int8`` with reports, and a bench each."""
    for folder, step in ((copies / "int4", 0.1), (copies / "int8", 0.2)):
        manifest = sha256_of(folder / "edgeforge.json")
        runs = (step, 1.01 * step)
        series = tuple(Point(float(at), 9.0, 50.0 - at / 10) for at in range(200))
        found = cell(str(folder), *runs, manifest=manifest, sustained=series)
        write_bench_file(bench(found), folder / "bench.json")
    return copies


def test_artifacts_show_accuracy_and_speed(measured, edgeforge):
    done = edgeforge("compare", measured)
    assert done.code == 0, done.err
    assert "KL from FLOAT" in done.out and "decode, tokens/s" in done.out
    assert sum(line.startswith("A  ") for line in done.out.splitlines()) == 1
    data = json.loads(edgeforge("compare", measured, "--json").out)
    (group,) = data["speeds"]["groups"]
    assert [each["decode_tokens_per_second"]["count"] for each in group["figures"]] == [2, 2]
    assert {each["outcome"] for each in group["ratios"]} == {"slower"}


def test_without_reports_speeds_are_all_that_is_compared(measured):
    (measured / "int4" / "report.json").unlink()
    found = compare([measured])
    assert found.artifacts == () and len(found.speeds.sides) == 2


def test_without_a_bench_it_is_as_before(copies):
    assert compare([copies]).speeds is None


def test_what_is_of_an_earlier_export_is_not_compared(measured):
    path = measured / "int4" / "edgeforge.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": ["again"]}))
    with pytest.raises(UsageError, match=r"no bench\.json of this export"):
        compare([measured / "int4", measured / "int8" / "bench.json"])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("no.json", "x.json"), "there is no .*no.json: `edgeforge bench` writes it"),
        (("x.json",), "1 artifact was named; 2 to 26 can be compared"),
        (("x.json", "bad.json"), "is no bench of EdgeForge"),
    ],
)
def test_files_that_cannot_be_compared(write, tmp_path, names, words):
    write("x.json", bench(cell("a", 0.1)))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match=words):
        compare([tmp_path / name for name in names])


def test_the_page_shows_what_was_measured(measured, edgeforge, tmp_path):
    pytest.importorskip("matplotlib", reason="charts need the extra report")
    (measured / "int8" / "bench.json").write_text("{}")
    other = shutil.copytree(measured / "int4", tmp_path / "other")
    done = edgeforge("report", measured, other, "--out", tmp_path / "page.html")
    assert done.code == 0, done.err
    assert "note: " in done.err and "is no bench of EdgeForge" in done.err
    page = (tmp_path / "page.html").read_text()
    table = page[page.index('<table class="devices">') :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 1 + 2 and "phone (Pixel 9)" in table
    assert "9.95 [9.90, 10.0]" in table and "5 of 5" in table
    assert "Decode over a sustained run" in page
    assert "70 %" in table  # of the first minute's decode, in the last one
