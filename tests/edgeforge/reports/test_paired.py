"""`edgeforge compare`: paired differences over the same tokens, and no others."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgeforge import api
from edgeforge.reports.lines import text_lines
from edgeforge.reports.paired import FIGURES, compare
from quant.sealed_json import seal, unseal


def changed(folder, **fields):
    path = folder / "report.json"
    path.write_text(seal(unseal(path.read_text()) | fields))


def test_differences_are_those_of_the_reports(reported):
    found = compare([reported.int4, reported.int8])
    reports = [json.loads((f / "report.json").read_text()) for f in (reported.int4, reported.int8)]
    changes = {each.figure: each for each in found.differences}
    assert len(changes) == len(FIGURES) and not found.apart
    for name in ("total.kl_mean", "total.top1_agreement", "lowering.kl_mean"):
        comparison, figure = name.split(".")
        one, other = (report[comparison][figure] for report in reports)
        assert changes[name].change == pytest.approx(other - one, rel=1e-4, abs=1e-7)
        assert changes[name].low <= changes[name].change <= changes[name].high
    ratio = reports[1]["perplexity_ratio"] / reports[0]["perplexity_ratio"]
    assert changes["perplexity_ratio"].change == pytest.approx(ratio, rel=1e-5)
    assert changes["total.kl_mean"].outcome == "better"


def test_the_same_artifact_twice_is_not_told_apart_and_a_worse_one_is(reported, copies):
    again = compare([reported.int4, copies / "int4"])
    assert {each.outcome for each in again.differences} == {"not told apart"}
    worse = compare([reported.int8, reported.int4])
    outcomes = {each.figure: each.outcome for each in worse.differences}
    assert outcomes["total.kl_mean"] == "worse"


def test_pairing_tells_apart_what_intervals_of_each_do_not(copies):
    """Every unit is 1 % worse: far less than how units differ, and the same sign in each."""
    data = json.loads((copies / "int4" / "report.json").read_text())
    sums = data["sums"]
    sums["sums"]["total kl"] = [each * 1.01 for each in sums["sums"]["total kl"]]
    means = np.array(sums["sums"]["total kl"]) / np.array(sums["counts"]["total kl"])
    assert means.std() / means.mean() > 0.01
    changed(copies / "int8", sums=sums)
    found = {each.figure: each for each in compare([copies / "int4", copies / "int8"]).differences}
    assert found["total.kl_mean"].outcome == "worse"


def test_other_texts_and_tokens_are_not_compared(reported, copies):
    report = json.loads((copies / "int8" / "report.json").read_text())
    changed(copies / "int8", freshness=report["freshness"] | {"text": "0" * 64}, text="other.txt")
    found = compare([reported.int4, copies / "int8"])
    assert found.differences == () and "another text: other.txt" in found.apart[1]
    changed(copies / "int8", freshness=report["freshness"], tokens=320)
    assert "320 tokens, not" in compare([reported.int4, copies / "int8"]).apart[1]
    lines = text_lines(compare([reported.int4, copies / "int8"]))
    assert any("not compared" in line for line in lines)


def test_the_command_fits_80_columns_and_gives_json(reported, edgeforge):
    done = edgeforge("compare", reported.int4, reported.int8, reported.int4.parent)
    assert done.code == 0 and "B against A, on the same tokens" in done.out
    figures = done.out.partition("size ")[2]
    assert max(map(len, figures.splitlines())) <= 80
    done = edgeforge("compare", reported.all, "--json")
    data = json.loads(done.out)
    assert [row["recipe"] for row in data["artifacts"]] == ["int4", "int8"]
    report = json.loads((reported.int8 / "report.json").read_text())
    value = data["artifacts"][1]["figures"]["total.kl_mean"]["value"]
    assert value == report["total"]["kl_mean"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["all/int4"], "1 artifact was named; 2 to 26 can be compared"),
        (["all/int4", "bare"], "bare: it has no report: run `edgeforge verify"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(reported, edgeforge, names, words):
    done = edgeforge("compare", *(reported.root / name for name in names))
    assert done.code == 2 and words in done.err and "Traceback" not in done.err


def test_a_changed_report_and_one_of_another_export_do_not_count(reported, copies, edgeforge):
    path = copies / "int8" / "report.json"
    path.write_text(path.read_text().replace('"tokens": 640', '"tokens": 641'))
    done = edgeforge("compare", reported.int4, copies / "int8")
    assert done.code == 2 and "changed or damaged" in done.err
    (copies / "int4" / "report.json").write_bytes((reported.int8 / "report.json").read_bytes())
    done = edgeforge("compare", copies / "int4", reported.int8)
    assert done.code == 2 and "of another export" in done.err


def test_python_has_both_functions(reported, tmp_path):
    assert api.compare(reported.int4, reported.int8) == compare([reported.int4, reported.int8])
    page = api.report(reported.int4, out=tmp_path / "page.html")
    assert page.read_text(encoding="utf-8").lstrip().startswith("<!DOCTYPE html>")
