"""Adapters of Core ML packages: what the files hold, and who reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from device_harness.coreml_interpreter.interpreter import Interpreter
from device_harness.coreml_interpreter.values import Precision
from edgeforge import api
from edgeforge.model.model import Model, open_model
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.meaning.check import check_meaning
from exporters.adapter_entries import with_adapter
from exporters.coreml import names
from exporters.coreml.package import open_package
from exporters.errors import ExportError
from exporters.manifest import Manifest

DOWN, Q = "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.q_proj"
SHAPES = {DOWN: (128, 256), Q: (128, 128)}
EVERYWHERE = {name.format(at): shape for at in range(2) for name, shape in SHAPES.items()}
OPTIONS = {"targets": ["coreml"], "context": 64, "chunk": "4,8"}


@pytest.fixture(scope="module")
def places(tmp_path_factory, peft_adapters):
    """A base with functions of several lengths, and the same with two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        synthesise("tiny-llama", root / "checkpoint")
        for seed, name in enumerate(("first", "second")):
            factors = peft_adapters.factors(EVERYWHERE, seed=seed, size=0.1)
            peft_adapters.write(root / name, factors)
        api.export(root / "checkpoint", root / "base", recipe="int4", **OPTIONS)
        shutil.copytree(root / "base", root / "beside")
        for name in ("first", "second"):
            api.export_adapter(root / "beside", root / name)
        yield root


def test_the_bases_functions_and_weights_are_the_same_bytes(places):
    plain, beside = (open_package(places / each / names.PACKAGE) for each in ("base", "beside"))
    whole = [dict.fromkeys(each.functions) for each in (plain, beside)]
    both = [with_adapter(each, name) for each in whole[0] for name in ("first", "second")]
    assert sorted(whole[1]) == sorted([*whole[0], *both])
    for name, function in plain.functions.items():
        wanted = function.SerializeToString(deterministic=True)
        assert beside.functions[name].SerializeToString(deterministic=True) == wanted
        assert beside.interface(name) == plain.interface(name)
        tuned = beside.interface(with_adapter(name, "first"))
        assert (tuned.inputs, tuned.states) == (
            plain.interface(name).inputs,
            plain.interface(name).states,
        )
    old, new = (
        (places / each / names.PACKAGE / names.WEIGHTS_PATH).read_bytes()
        for each in ("base", "beside")
    )
    assert new[64 : len(old)] == old[64:]  # the header counts the blobs
    assert len(new) - len(old) < 0.15 * len(old)
    assert beside.metadata["edgeforge.adapters"] == "first,second"


def test_one_loaded_package_switches_adapters_from_call_to_call(places):
    package = open_package(places / "beside" / names.PACKAGE)
    interpreter = Interpreter(package, Precision.FP16)
    given = {names.TOKENS: np.array([[7]], np.int32), names.POSITION: np.array([0], np.int32)}

    def logits(function: str) -> np.ndarray:
        states = interpreter.make_states(function)
        return interpreter.run(given, function, states)[names.LOGITS].copy()

    asked = ["decode", "decode_first", "decode_second", "decode"]
    base, first, second, again = map(logits, asked)
    np.testing.assert_array_equal(base, again)
    for one, other in ((base, first), (base, second), (first, second)):
        assert np.abs(one - other).max() > 0.1
    for name, found in (("first", first), ("second", second)):
        with api.load(places / "beside", threads=1, adapter=name) as session:
            np.testing.assert_array_equal(session.extend(np.array([7], np.int64)), found[0, -1])


def failed(artifact: Path, model: Model) -> dict[str, str]:
    checks = check_meaning(artifact, Manifest.read(artifact), model)
    return {check.name: check.message for check in checks if check.verdict == "failed"}


@pytest.mark.parametrize("part", ["A", "B", "x"])
def test_the_change_of_another_product_is_found_in_the_files(places, tmp_path, part):
    artifact = shutil.copytree(places / "beside", tmp_path / "a")
    model = open_model(str(places / "checkpoint"))
    assert not failed(artifact, model)
    package = open_package(artifact / names.PACKAGE)

    def operand(layer: int, factor: str, key: str):
        """An operand of the product with a factor of a layer's last matrix."""
        wanted = names.factor_name(f"{DOWN.format(layer)}.weight", factor)
        for operation in package.block("decode_second").operations:
            given = operation.inputs.get("weight")
            if given is not None and given.arguments[0].name == wanted:
                return operation.inputs[key].arguments[0]
        raise LookupError(wanted)

    factor, key = {
        "A": (names.LORA_A, "weight"),
        "B": (names.LORA_B, "weight"),
        "x": (names.LORA_A, "x"),
    }[part]
    operand(1, factor, key).name = operand(0, factor, key).name
    place = artifact / names.PACKAGE / names.MODEL_PATH
    place.write_bytes(package.spec.SerializeToString(deterministic=True))
    found = failed(artifact, model)
    assert found and all("decode_second" in message for message in found.values())


def test_small_factors_lose_nothing_in_float16(places, tmp_path, peft_adapters):
    """``B`` of a short training: 1e-6 is no normal number in float16."""
    factors = peft_adapters.factors({Q.format(0): (128, 128)}, size=1.0)
    small, large = (dict(factors) for _ in range(2))
    for name, tensor in factors.items():
        down = name.endswith("lora_A.weight")
        small[name] = tensor * (3e4 if down else 1e-6)
        large[name] = tensor * (0.25 if down else 0.12)
    artifact = shutil.copytree(places / "base", tmp_path / "a")
    found = []
    for name, tensors in (("small", small), ("large", large)):
        api.export_adapter(artifact, peft_adapters.write(tmp_path / name, tensors))
        with api.load(artifact, threads=1, adapter=name) as session:
            found.append(session.extend(np.arange(8)))
    assert np.abs(found[0] - found[1]).max() < 5e-3 * np.ptp(found[1])


def test_what_a_package_cannot_take_is_refused(places, tmp_path, peft_adapters):
    def copy(name: str):
        return shutil.copytree(places / "beside", tmp_path / name)

    twin = shutil.copytree(places / "first", tmp_path / "my.first")
    artifact = copy("a")
    api.export_adapter(artifact, twin)
    with pytest.raises(ExportError, match="has decode_my_first already"):
        api.export_adapter(artifact, shutil.copytree(twin, tmp_path / "my-first"))
    huge = {
        name: torch.full_like(tensor, 1e9)
        for name, tensor in peft_adapters.factors({Q.format(0): (128, 128)}).items()
    }
    with pytest.raises(ExportError, match="more than float16 holds"):
        api.export_adapter(artifact, peft_adapters.write(tmp_path / "huge", huge))
    given = {**OPTIONS, "chunk": None, "recipe": "fp16", "opset": "ios17"}
    api.export(places / "checkpoint", tmp_path / "ios17", **given)
    with pytest.raises(ExportError, match="a package for iOS 17 holds only one: use --opset ios18"):
        api.export_adapter(tmp_path / "ios17", places / "first")
