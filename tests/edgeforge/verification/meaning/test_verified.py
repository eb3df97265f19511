"""`verify` fails where a fact is otherwise, also where the figures of the text do not show it."""

from __future__ import annotations

import json

import pytest

from edgeforge.verification.soundness import UnsoundError
from edgeforge.verification.verify import verify
from edgeforge.verification.verify_options import VerifyOptions
from tests.planted_faults.table import FAULTS
from tests.planted_faults.written import write_faulty


def test_a_wrong_end_of_text_fails(captures, tmp_path):
    """No figure depends on the ids that a runtime is told."""
    captured = captures("llama")["onnx"]
    fault = next(fault for fault in FAULTS if fault.name == "eos")
    folder = tmp_path / "artifact"
    write_faulty(captured, fault, folder, tmp_path / "apart")
    with pytest.raises(UnsoundError, match=r"eos is \[256\] in the files and \[257\]"):
        verify(folder, VerifyOptions(tokens=64, timed=False))
    checks = {
        check["name"]: check for check in json.loads((folder / "report.json").read_text())["checks"]
    }
    assert checks["eos"]["verdict"] == "failed"
    assert checks["eos"]["where"] == ["the files"]
    assert checks["meaning.rope_theta"]["verdict"] == "passed"
    assert checks["meaning.rope_theta"]["value"] == 10000.0
