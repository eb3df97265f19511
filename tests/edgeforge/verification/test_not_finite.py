"""Logits that are NaN or infinite: counted, located, and an end with exit code 1 everywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from device_harness.errors import LogitsNotFiniteError
from device_harness.registry import open_session
from device_harness.timing import measure
from edgeforge import api
from edgeforge.generation.generate import generate
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.soundness import UnsoundError, require_sound
from edgeforge.verification.verify import verify, verify_together
from edgeforge.verification.verify_options import VerifyOptions
from exporters.manifest import Manifest

DOWN = "model.layers.1.mlp.down_proj.weight"
TEXT = np.arange(1, 30)


def checkpoint(folder: Path, factor: float, up: float = 1.0) -> Path:
    """A tiny Llama in whose second layer the feed-forward part gives values far out."""
    synthesise("tiny-llama", folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[DOWN] *= factor
    tensors["model.layers.1.mlp.up_proj.weight"] *= up
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """Artifacts whose values leave float16's range, by target; of another, float32's."""
    root = tmp_path_factory.mktemp("not finite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        targets = ["coreml", "onnx", "executorch"]
        half = api.export(
            checkpoint(root / "half", 3e5), root / "16", targets=targets, recipe="int8", context=64
        )
        single = api.export(
            checkpoint(root / "single", 1e20, 1e25),
            root / "32",
            targets=["onnx", "executorch"],
            recipe="fp32",
            context=64,
        )
        yield SimpleNamespace(**dict(zip(targets, half, strict=True)), single=single)


def session_of(folder: Path, **options: str):
    return open_session(folder, Manifest.read(folder), 1, options)


def test_the_interpreter_names_layer_and_operation(made):
    with session_of(made.coreml) as session:
        assert not np.isfinite(session.logits(TEXT)).all()
        session.extend(TEXT[:3])
        where = session.first_not_finite(TEXT)
        assert f"linear 'op_quant_linear_default_10' in layer 1, at or after {DOWN}" in where
        assert "beyond 65504, the largest float16" in where
        # The text of `extend` stays as it was.
        assert session._length == 3
    with session_of(made.coreml, precision="fp32") as session:
        assert np.isfinite(session.logits(TEXT)).all()
        assert session.first_not_finite(TEXT) is None


def broken(folder: Path, copy: Path, name: str) -> Path:
    """A copy of an ONNX artifact, in both of whose graphs one value of a norm is infinite."""
    shutil.copytree(folder, copy)
    for graph in ("model.onnx", "verify.onnx"):
        model = onnx.load(copy / graph, load_external_data=False)
        (tensor,) = (each for each in model.graph.initializer if each.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[3] = np.inf
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        onnx.save(model, copy / graph)
    return copy


@pytest.mark.parametrize("stripped", [False, True])
def test_onnxruntime_names_layer_and_node(made, tmp_path, stripped):
    name = "model.layers.1.post_attention_layernorm.weight"
    folder = broken(made.onnx, tmp_path / "copy", name)
    if stripped:
        (folder / "verify.onnx").unlink()
        manifest = Manifest.read(folder)
        files = {name: row for name, row in manifest.files.items() if name != "verify.onnx"}
        replace(manifest, files=files).write(folder)
    with session_of(folder) as session:
        where = session.first_not_finite(TEXT)
    assert "SkipSimplifiedLayerNormalization 'rms_norm_3' in layer 1" in where
    assert where.endswith(f"at or after {name}")
    with session_of(made.onnx) as session:
        assert session.first_not_finite(TEXT) is None


def test_executorch_shows_nothing_between_its_operations(made):
    with session_of(made.executorch) as session:
        assert session.first_not_finite(TEXT) is None


def test_verify_counts_and_locates_them_and_fails(made):
    folders = [made.coreml, made.onnx, made.executorch]
    options = VerifyOptions(tokens=100, timed=False)
    coreml, onnx_, executorch = verify_together(folders, options)
    assert onnx_.not_finite == executorch.not_finite == {}
    found = coreml.not_finite["artifact"]
    assert list(coreml.not_finite) == ["artifact"]
    assert 0 < found.positions <= found.of == 100
    assert f"in layer 1, at or after {DOWN}" in found.where
    with pytest.raises(UnsoundError) as caught:
        verify(made.coreml, options)
    assert str(caught.value).startswith(
        f"{made.coreml}: ARTIFACT gives NaN or infinite logits at {found.positions} of 100 "
        f"positions, first at token {found.position} of block {found.block}; the first operation"
    )
    (evaluation,) = caught.value.evaluations
    assert evaluation.not_finite == coreml.not_finite
    report = json.loads((made.coreml / "report.json").read_text())
    assert report["not_finite"]["artifact"]["positions"] == found.positions


def test_a_model_that_leaves_float32_is_named_as_such(made):
    options = VerifyOptions(tokens=100, timed=False)
    found = verify_together(made.single, options)
    with pytest.raises(UnsoundError) as caught:
        require_sound(made.single, found)
    evaluation, executorch = caught.value.evaluations
    assert list(executorch.not_finite) == ["float", "quantized", "artifact"]
    assert executorch.not_finite["artifact"].where == ""
    assert "the runtime does not show which operation they come from" in str(caught.value)
    assert list(evaluation.not_finite) == ["float", "quantized", "artifact"]
    for model, operator in (
        ("float", "edgeforge.linear.default"),
        ("quantized", "edgeforge.linear.default"),
        ("artifact", "FusedMatMul"),
    ):
        where = evaluation.not_finite[model].where
        assert operator in where and f"in layer 1, at or after {DOWN}" in where
    assert "FLOAT gives NaN or infinite logits at " in str(caught.value)


def test_run_and_bench_refuse_them(made):
    for work in (lambda: generate(made.coreml, "abc"), lambda: api.bench(made.coreml, decode=2)):
        with pytest.raises(LogitsNotFiniteError, match=f"in layer 1, at or after {DOWN}"):
            work()
    assert len(generate(made.onnx, "abc", max_tokens=3).tokens) == 3
    timings = measure(made.onnx, 1, 8, 2)
    assert (timings.not_finite, timings.where) == (0, "")
    timings.require_finite()


@pytest.mark.parametrize(
    "command", [("run", "--prompt", "abc"), ("verify", "--tokens", "100", "--no-timed", "-q")]
)
@pytest.mark.parametrize("json_too", [False, True])
def test_the_command_line_ends_with_1(made, edgeforge, command, json_too):
    name, *options = command
    done = edgeforge(name, made.coreml, *options, *(["--json"] if json_too else []))
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("edgeforge: ") and "NaN or infinite logits" in last
    assert f"in layer 1, at or after {DOWN}" in last
    if name == "verify" and json_too:

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        (found,) = json.loads(done.out, parse_constant=refuse)
        assert found["not_finite"]["artifact"]["positions"] > 0
    elif name == "verify":
        assert "NOT FINITE" in done.out
