"""The command line's options for Core ML reach the package."""

from __future__ import annotations

import json

import pytest

from edgeforge.synth.synthesise import synthesise
from exporters.coreml.package import open_package


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))


def test_options_of_a_package(edgeforge, tmp_path):
    checkpoint, out = synthesise("tiny-llama", tmp_path / "checkpoint"), tmp_path / "out"
    asked = ("--profile", "ane", "--chunk", "8,32", "--cache-write", "onehot", "--opset", "ios18")
    export = ("export", checkpoint, "-o", out, "-q", "--context", 40, "--target", "coreml")
    shown = edgeforge(*export, "--recipe", "int8", *asked)
    assert shown.code == 0, shown.err
    manifest = json.loads((out / "edgeforge.json").read_text())
    assert manifest["options"] == {
        "profile": "ane",
        "chunk": "8,32",
        "cache_write": "onehot",
        "opset": "ios18",
    }
    found = open_package(out / manifest["entry"])
    assert found.interface("prefill").inputs[0].shapes == ((1, 8), (1, 32))
    assert {state.shape[2] for state in found.interface().states} == {64}
    kinds = {operation.type for operation in found.operations("decode")}
    assert "slice_update" not in kinds and "scaled_dot_product_attention" not in kinds


@pytest.mark.parametrize(
    ("option", "value"),
    [("--profile", "ane"), ("--chunk", "64"), ("--cache-write", "slice"), ("--opset", "ios18")],
)
def test_options_that_mean_nothing_to_another_target(option, value, edgeforge, tmp_path):
    shown = edgeforge("export", "demo", "-o", tmp_path / "out", "--target", "onnx", option, value)
    assert shown.code == 5
    assert f"onnx has no option {option}: leave it out" in shown.err
