"""Verification on devices beside this host."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import edgeforge
from device_harness.devices.device import Facts
from device_harness.devices.host import HostDevice, ProcessChannel, find_host
from device_harness.devices.registry import KINDS, Kind
from device_harness.errors import DeviceError
from edgeforge.cli.verdict import labelled, summary_lines
from edgeforge.errors import CheckFailed, UsageError
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.verify_options import OnDevice, devices_of


class Twin(HostDevice):
    """This host under another name, which tests tell from it; it really runs the worker."""

    name = "twin"
    limits = ("It has one clock.",)

    def facts(self) -> Facts:
        return Facts("twin", "twin", "a copy of this host", "Linux 1", "a processor", emulated=True)


class Broken(Twin):
    """A device whose worker ends at once."""

    def start(self, folder, manifest, arguments) -> ProcessChannel:
        return ProcessChannel(
            [sys.executable, "-c", "raise SystemExit('no room')"], dict(os.environ)
        )


@pytest.fixture
def twin(monkeypatch):
    monkeypatch.setitem(KINDS, "twin", Kind(Twin, find_host, ("onnx",)))
    monkeypatch.setitem(KINDS, "broken", Kind(Broken, find_host, ("onnx",)))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("verified on devices")
    checkpoint = synthesise("tiny-llama", root / "checkpoint")
    targets = ("onnx", "coreml")
    return edgeforge.export(checkpoint, root / "out", targets=targets, recipe="int4", context=48)


def test_a_device_is_held_under_the_same_bounds_in_the_same_report(artifacts, twin, tmp_path):
    onnx = artifacts[0]
    found = edgeforge.verify(onnx, tokens=96, timed=False, devices=["twin", "host"])
    (there,) = found.elsewhere
    assert (found.device, there.device) == ("host", "twin")
    assert there.lowering == found.lowering and there.total == found.total
    assert there.shipped.kl_mean == found.shipped.kl_mean
    assert there.device_facts["model"] == "a copy of this host"
    bounds = {each.name: each.limit for each in found.checks}
    assert there.checks and all(bounds[each.name] == each.limit for each in there.checks)
    written = json.loads((onnx / "report.json").read_text())
    assert [each["device"] for each in written["elsewhere"]] == ["twin"]
    assert written["elsewhere"][0]["lowering"] == written["lowering"]
    card = (onnx / "CARD.md").read_text()
    assert "on a copy of this host (twin), an emulated processor | measured, lowering" in card
    (in_card,) = json.loads((onnx / "card.json").read_text())["verified"]["elsewhere"]
    assert in_card["lowering_kl"]["value"] == found.lowering.kl_mean
    page = edgeforge.report(onnx, out=tmp_path / "page.html").read_text()
    assert 'class="device-accuracy"' in page and '<td class="name">twin</td>' in page
    rows = labelled({onnx: found})
    assert list(rows) == ["onnx", "twin"]
    text = "\n".join(line.plain for line in summary_lines(rows, [onnx]))
    assert "twin is a copy of this host, Linux 1." in text and "It has one clock." in text


def test_an_emulated_device_has_fewer_tokens_by_default(artifacts, twin, monkeypatch):
    from edgeforge.verification import verify

    monkeypatch.setattr(verify, "EMULATED_TOKENS", 70)
    assert edgeforge.verify(artifacts[0], timed=False, devices=["twin"]).tokens == 70


def test_a_bound_that_fails_there_fails_the_artifact(artifacts, twin, monkeypatch, tmp_path):
    from edgeforge.verification import evaluate

    real = evaluate._evaluation
    places = []

    def spoilt(measured, *rest):
        evaluation = real(measured, *rest)
        places.append(measured.run.where)
        if measured.run.where is None:
            return evaluation
        from dataclasses import replace

        checks = [
            replace(each, verdict="failed", message="it is bad") for each in evaluation.checks
        ]
        return replace(evaluation, checks=tuple(checks[-1:]))

    monkeypatch.setattr(evaluate, "_evaluation", spoilt)
    with pytest.raises(CheckFailed, match="on twin: it is bad"):
        edgeforge.verify(artifacts[0], tokens=96, timed=False, devices=["twin"])
    assert len(places) == 2
    assert "**not sound there**" in (artifacts[0] / "CARD.md").read_text()
    page = edgeforge.report(artifacts[0], out=tmp_path / "page.html").read_text()
    assert '<td class="mark failed">failed</td>' in page and "on twin: it is bad" in page
    with pytest.raises(CheckFailed):
        edgeforge.check(artifacts[0])


def devices_in(artifact: Path) -> list[str]:
    return [
        each["device"] for each in json.loads((artifact / "report.json").read_text())["elsewhere"]
    ]


def test_what_devices_gave_outlives_a_verification_here(artifacts, twin, monkeypatch):
    from edgeforge.verification import freshness

    onnx = artifacts[0]
    edgeforge.verify(onnx, tokens=96, timed=False, devices=["twin"], kleidiai="off")
    edgeforge.verify(onnx, tokens=96, timed=False, devices=["twin"])
    assert devices_in(onnx) == ["twin", "twin, kleidiai off"]
    edgeforge.verify(onnx, tokens=80, timed=False)
    assert devices_in(onnx) == ["twin", "twin, kleidiai off"]
    monkeypatch.setattr(freshness, "version", lambda name: "another")
    edgeforge.verify(onnx, tokens=80, timed=False)
    assert devices_in(onnx) == []


def test_a_device_that_fails_is_named(artifacts, twin):
    with pytest.raises(DeviceError, match=r"broken|twin.*no room"):
        edgeforge.verify(artifacts[0], tokens=96, timed=False, devices=["broken"])


def test_a_device_on_which_no_artifact_runs_is_refused(artifacts, twin):
    with pytest.raises(UsageError, match="coreml artifacts do not run on twin, which runs those"):
        edgeforge.verify(artifacts[1], tokens=96, timed=False, devices=["twin"])


def test_kleidiai_both_is_two_places(twin):
    on, off = devices_of(["twin", "host", "twin"], "both")
    assert (on.label, off.label) == ("twin, kleidiai on", "twin, kleidiai off")
    assert devices_of(["twin"]) == (OnDevice("twin"),) and devices_of(["host"]) == ()
    with pytest.raises(UsageError, match="give one of on, off, both"):
        devices_of(["twin"], "maybe")
    with pytest.raises(UsageError, match="name one"):
        devices_of(["host"], "off")
