"""The demo model as a Core ML package: how far the interpreter is from QUANTIZED."""

from __future__ import annotations

import json

import pytest

from device_harness.errors import DeviceError
from edgeforge import api
from edgeforge.cli.tables import limit_lines
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return api.export("demo", tmp_path_factory.mktemp("verify") / "demo", targets=["coreml"])[0]


@pytest.fixture(autouse=True)
def one_prompt(monkeypatch):
    monkeypatch.setattr("edgeforge.verification.evaluate.GREEDY_PROMPTS", 1)


def verified(folder, precision=None):
    options = VerifyOptions(tokens=520, timed=False, runtime={"precision": precision})
    return verify(folder, options)


def test_fp32_checks_the_wiring(artifact):
    found = verified(artifact, "fp32")
    assert found.lowering.relative_difference <= 1e-4
    assert found.lowering.top1_agreement == 1
    assert "fp32" in found.runtime


def test_fp16_costs_little_and_the_report_says_what_is_not_known(artifact):
    found = verified(artifact)
    assert found.lowering.top1_agreement >= 0.99
    assert 0 < found.lowering.kl_mean <= 1e-3
    assert found.runtime.endswith("(fp16 rounding), not Apple's runtime")
    told = json.loads((artifact / "report.json").read_text())
    assert any("compiler accepts" in limit for limit in told["limits"])
    lines = limit_lines([found])
    assert lines[1] == "What that cannot know:" and len(lines) == 2 + len(found.limits)


def test_options_of_another_runtime_are_refused(artifact, tmp_path):
    other = api.export("demo", tmp_path / "onnx", targets=["onnx"], recipe="int4")[0]
    with pytest.raises(DeviceError, match="onnx artifacts have no option --precision"):
        verified(other, "fp16")
