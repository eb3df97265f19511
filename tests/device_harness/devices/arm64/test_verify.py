"""Verification on emulated cores."""

from __future__ import annotations

import json
import shutil

import edgeforge


def test_verify_reports_the_lowering_error_on_arm64_kernels(arm64_root, artifact, tmp_path):
    folder = shutil.copytree(artifact, tmp_path / "artifact")
    found = edgeforge.verify(
        folder, tokens=48, timed=False, devices=["arm64:cortex-a76"], kleidiai="both"
    )
    on, off = found.elsewhere
    assert (on.device, off.device) == (
        "arm64:cortex-a76, kleidiai on",
        "arm64:cortex-a76, kleidiai off",
    )
    assert on.device_facts["emulated"] and on.runtime != off.runtime
    assert len({each.lowering.kl_mean for each in (found, on, off)}) == 3
    assert [each.name for each in on.checks] == [each.name for each in off.checks] != []
    written = json.loads((folder / "report.json").read_text())
    assert [each["device"] for each in written["elsewhere"]] == [on.device, off.device]
