"""The command `check`: what it prints and writes, its exit codes, and how long it takes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from importlib.resources import files
from xml.etree import ElementTree

import jsonschema
import pytest

STRICT = "version: 1\ntext: held.txt\ntokens: 1024\nbounds: {size.bytes: {at_most: 1kB}}\n"


def test_all_is_well(edgeforge, room):
    done = edgeforge("check", "int8", "-q")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("PASSED  int8 (onnx, int8): ")
    assert "held against policy edgeforge-policy.yaml" in done.out


def test_a_violation_is_one_line_and_the_exit_code_1(edgeforge, room):
    (room / "strict.yaml").write_text(STRICT)
    done = edgeforge("check", "int8", "--policy", "strict.yaml", "-q")
    assert done.code == 1
    (line,) = (each for each in done.out.splitlines() if "VIOLATION" in each)
    assert line.startswith("  VIOLATION  size.bytes 0.")
    assert line.endswith(" MB; must be at most 0.00 MB (the policy)")
    assert done.err == "edgeforge: 1 violation in 1 of 1 artifacts: int8 (size.bytes)\n"


@pytest.mark.parametrize(
    ("arguments", "policy", "code", "sentence"),
    [
        (["int8"], "version: 1\nbouns: {}", 2, "did you mean 'bounds'"),
        (
            ["int8"],
            "version: 1\nbounds: {perplexity_ratio: {at_most: 1, at_least: 2}}",
            2,
            "must be at most 1 and at least 2, which nothing can be",
        ),
        (["int8", "--policy", "none.yaml"], "", 2, "the policy none.yaml cannot be read"),
        (["int8", "--baseline", "none.json"], "version: 1", 2, "there is no baseline none.json"),
        (["int8", "--junit", "none/out.xml"], "version: 1", 2, "--junit none/out.xml cannot be"),
        (
            ["int8", "--policy", "edgeforge-policy.yaml", "--markdown", "edgeforge-policy.yaml"],
            "version: 1",
            2,
            "is the policy",
        ),
        (
            ["int8", "--sarif", "int8/model.onnx"],
            "version: 1",
            2,
            "--sarif int8/model.onnx lies in the artifact int8",
        ),
        (
            ["--markdown", "int8/config.json"],
            "version: 1\nartifacts: [int8]\ntext: held.txt\ntokens: 1024",
            2,
            "--markdown int8/config.json lies in the artifact int8",
        ),
        (
            ["int8"],
            "version: 1\ntext: none.txt\ntokens: 1024",
            2,
            "none.txt cannot be read",
        ),
        (["nothing"], "version: 1", 5, "nothing is no EdgeForge artifact"),
        ([], "version: 1", 2, "there is nothing to check"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(edgeforge, room, arguments, policy, code, sentence):
    (room / "edgeforge-policy.yaml").write_text(policy)
    done = edgeforge("check", *arguments, "-q")
    assert done.code == code
    assert done.err.startswith("edgeforge: ") and done.err.count("\n") == 1
    assert sentence in done.err


def test_every_output_is_written_and_tells_the_same(edgeforge, room, monkeypatch):
    (room / "strict.yaml").write_text(STRICT)
    summary = room / "summary.md"
    summary.write_text("# of another step\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(room))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    places = {"--junit": "j.xml", "--sarif": "s.sarif", "--markdown": "m.md"}
    written = [each for pair in places.items() for each in pair]
    done = edgeforge("check", "int8", "--policy", "strict.yaml", "--json", "-q", *written)
    assert done.code == 1
    data = json.loads(done.out)
    place = files("edgeforge.gate") / "schemas" / "check-1.schema.json"
    jsonschema.validate(data, json.loads(place.read_text("utf-8")))
    failed = [e["metric"] for e in data["artifacts"][0]["findings"] if e["outcome"] == "failed"]
    assert failed == ["size.bytes"]
    assert "::error file=strict.yaml,line=1,title=int8%3A size.bytes::" in done.err
    assert ElementTree.parse(room / "j.xml").getroot().get("failures") == "1"
    results = json.loads((room / "s.sarif").read_text())["runs"][0]["results"]
    assert [each["ruleId"] for each in results if each["level"] == "error"] == ["size.bytes"]
    markdown = (room / "m.md").read_text()
    assert "## edgeforge check failed: 1 violation\n" in markdown
    assert summary.read_text() == f"# of another step\n{markdown}"


def test_github_hears_nothing_unless_it_runs_us(edgeforge, room, monkeypatch):
    (room / "strict.yaml").write_text(STRICT)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert "::error" not in edgeforge("check", "int8", "--policy", "strict.yaml", "-q").out
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    asked = ("check", "int8", "--policy", "strict.yaml", "-q")
    assert "::error" in edgeforge(*asked).out
    assert "::error" not in edgeforge(*asked, "--no-github").out


def test_a_check_of_fresh_reports_takes_less_than_two_seconds(room):
    command = [sys.executable, "-m", "edgeforge.cli.entry", "check", "int8", "int4-g32", "-q"]
    for more in (["--baseline", "b.json", "--update-baseline"], ["--baseline", "b.json"]):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, *more], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert seconds < 2
