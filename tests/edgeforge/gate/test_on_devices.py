"""Bounds of what devices gave: measured for real on this host, or told by a report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from device_harness.measuring.rules import Rules
from edgeforge.gate.reports import read_report
from edgeforge.measurements.bench_file import (
    keep_with_artifacts,
    read_bench_file,
    write_bench_file,
)
from edgeforge.measurements.measure import measure
from edgeforge.measurements.options import BenchOptions
from quant.sealed_json import seal, unseal

HEAD = "version: 1\ntext: held.txt\ntokens: 1024\n"


@pytest.fixture
def policy(room):
    def write(text: str) -> None:
        (room / "edgeforge-policy.yaml").write_text(HEAD + text)

    return write


@pytest.fixture
def measured(room):
    """Both artifacts, measured by turns."""
    options = BenchOptions(prompts=(8,), outputs=(4,), rules=Rules(runs=6), threads=1)
    found = measure([Path("int4-g32"), Path("int8")], options)
    keep_with_artifacts(found)
    return found


def findings(result, prefix: str):
    return [each for each in result.artifacts[0].findings if each.metric.startswith(prefix)]


def test_a_ratio_of_turns_is_held_with_its_interval(gate, policy, measured):
    policy(
        "bench.decode_ratio: {against: int4-g32, at_least: 0.0001}\n"
        "bench.prefill_ratio: {against: int4-g32, at_least: 10000, device: host}\n"
    )
    result = gate()
    decode, prefill = findings(result, "bench.")
    assert (decode.metric, decode.outcome, decode.kind) == (
        "bench.decode_ratio",
        "passed",
        "reference",
    )
    assert (prefill.outcome, prefill.limit) == ("failed", 10000)
    (told,) = [each for each in measured.ratios if each.figure == "decode"]
    assert (decode.value, decode.low, decode.high) == (told.value, told.low, told.high)
    assert decode.where == ("on host, 8 + 4 tokens", "against int4-g32", "6 pairs by turns")


def test_the_other_side_of_a_ratio_is_its_inverse(gate, policy, measured):
    policy("bench.decode_ratio: {against: int8, at_least: 0.0001}\n")
    (found,) = findings(gate("int4-g32"), "bench.")
    (told,) = [each for each in measured.ratios if each.figure == "decode"]
    assert found.value == pytest.approx(1 / told.value)
    assert (found.low, found.high) == pytest.approx((1 / told.high, 1 / told.low))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{against: int4-g32, at_least: 1}", "there is no such measurement of both as they are"),
        ("{against: nothing, at_least: 1}", "nothing is no artifact"),
        (
            "{against: int4-g32, at_least: 1, device: 'android:*'}",
            "no such measurement on android:*",
        ),
    ],
)
def test_what_was_not_measured_fails_and_says_what_to_do(gate, policy, text, words):
    policy(f"bench.decode_ratio: {text}\n")
    (found,) = findings(gate(), "bench.")
    assert found.outcome == "failed" and words in found.message
    assert "nothing" in words or "run `edgeforge bench " in found.message


def test_an_earlier_exports_speed_is_no_speed(gate, policy, room, measured):
    data = json.loads((room / "int4-g32" / "edgeforge.json").read_text())
    (room / "int4-g32" / "edgeforge.json").write_text(json.dumps({**data, "notes": ["again"]}))
    policy("bench.decode_ratio: {against: int4-g32, at_least: 0.0001}\n")
    (found,) = findings(gate(), "bench.")
    assert found.outcome == "failed" and "of both as they are" in found.message


def test_times_of_an_emulated_processor_are_no_speed(gate, policy, room, measured):
    path = room / "int8" / "bench.json"
    bench = read_bench_file(path)
    (device,) = bench.devices
    emulated = replace(device, facts={**device.facts, "emulated": True})
    write_bench_file(replace(bench, devices=(emulated,)), path)
    policy("bench.decode_ratio: {against: int4-g32, at_least: 0.0001}\n")
    (found,) = findings(gate(), "bench.")
    assert found.outcome == "failed" and "host is emulated" in found.message


def test_without_speeds_nothing_of_bench_is_held(gate, policy):
    policy(
        "bench.decode_ratio: {against: int4-g32, at_least: 1}\n"
        "bounds: {bench.spread: {at_most: 0.1}}\n"
    )
    assert findings(gate(timed=False), "bench.") == []


def test_spread_and_text_are_figures_of_each_cell(gate, policy, measured):
    policy("bounds:\n  bench.spread: {at_most: 0.0}\n  bench.text_agreement: {at_least: 0.9}\n")
    spread, text = findings(gate(), "bench.")
    assert (spread.metric, spread.outcome) == ("bench.spread", "failed")
    assert (text.outcome, text.value, text.where) == ("passed", 1.0, ("on host, 8 + 4 tokens",))


def test_figures_of_bench_that_are_missing_fail(gate, policy):
    policy("bounds: {bench.text_agreement: {at_least: 0.9}}\n")
    (found,) = findings(gate(), "bench.")
    assert found.message == (
        "bench.text_agreement must be at least 90.0 %, and nothing was measured: run `edgeforge "
        "bench int8`"
    )


@pytest.fixture
def on_a_phone(room):
    """A report with the artifact's own figures as those of a phone."""

    def write(kl_mean: float, verdict: str = "passed") -> None:
        path = room / "int8" / "report.json"
        data = unseal(path.read_text())
        own = {**data, "device": "android:A", "lowering": {**data["lowering"], "kl_mean": kl_mean}}
        own["intervals"], own["sums"] = None, None
        own["checks"] = [
            {**each, "value": kl_mean, "low": None, "high": None, "verdict": verdict}
            for each in data["checks"]
            if each["name"] == "lowering.kl_mean"
        ]
        path.write_text(seal({**data, "elsewhere": [own]}))

    return write


def test_a_run_on_a_device_keeps_its_verdict(gate, policy, on_a_phone):
    policy("")
    on_a_phone(0.5, "failed")
    (found,) = findings(gate(), "device.")
    assert (found.metric, found.outcome, found.value) == ("device.lowering.kl_mean", "failed", 0.5)
    assert found.where[0] == "on android:A" and found.message.startswith("on android:A: ")


@pytest.mark.parametrize(("limit", "outcome"), [(0.6, "passed"), (0.4, "failed")])
def test_a_policy_bounds_figures_of_devices(gate, policy, on_a_phone, room, limit, outcome):
    policy(f"bounds: {{device.lowering.kl_mean: {{at_most: {limit}}}}}\n")
    on_a_phone(0.5, "failed")
    (found,) = findings(gate(), "device.")
    assert (found.outcome, found.limit, found.where) == (outcome, limit, ("on android:A",))
    assert read_report(room / "int8").elsewhere[0].device == "android:A"


def test_a_policy_about_devices_is_not_met_without_one(gate, policy):
    policy("bounds: {device.lowering.kl_mean: {at_most: 1}}\n")
    (found,) = findings(gate(), "device.")
    assert found.outcome == "failed" and "run `edgeforge verify --device NAME`" in found.message
