"""Adapters of ExecuTorch programs: what the files hold, and what is refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeforge import api
from edgeforge.errors import CheckpointError
from edgeforge.model.model import Model, open_model
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.meaning.check import check_meaning
from exporters.errors import ExportError
from exporters.executorch.adapters import factor_key
from exporters.executorch.reader import read_pte
from exporters.manifest import Manifest

DOWN, Q = "model.layers.{}.mlp.down_proj", "model.layers.{}.self_attn.q_proj"
SHAPES = {DOWN: (128, 256), Q: (128, 128)}
EVERYWHERE = {name.format(at): shape for at in range(2) for name, shape in SHAPES.items()}
CHANGED = [
    f"model.layers.{at}.{part}.weight"
    for at in range(2)
    for part in ("mlp.down_proj", "self_attn.qk_proj")
]
OPTIONS = {"targets": ["executorch"], "context": 64}
TOKENS = np.arange(40, 52, dtype=np.int64)


@pytest.fixture(scope="module")
def places(tmp_path_factory, peft_adapters):
    """A base whose weights lie in a .ptd, and the same with two adapters."""
    root = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        synthesise("tiny-llama", root / "checkpoint")
        for seed, name in enumerate(("first", "second")):
            factors = peft_adapters.factors(EVERYWHERE, seed=seed, size=0.1)
            peft_adapters.write(root / name, factors)
        given = {"recipe": "int4", "weights": "external", **OPTIONS}
        api.export(root / "checkpoint", root / "base", **given)
        shutil.copytree(root / "base", root / "beside", copy_function=os.link)
        for name in ("first", "second"):
            api.export_adapter(root / "beside", root / name)
        yield root


def test_the_bases_methods_and_weights_are_the_same(places):
    plain, beside = (read_pte(places / each / "model.pte") for each in ("base", "beside"))
    old, new = (
        {plan["name"]: plan for plan in each.program["execution_plan"]} for each in (plain, beside)
    )
    both = [f"{each}_{name}" for each in ("forward", "logits_all") for name in ("first", "second")]
    assert sorted(new) == sorted([*old, *both])
    for name, plan in old.items():
        assert new[name] == plan
    for (start, size), (again, same) in zip(plain.segments, beside.segments, strict=False):
        assert size == same
        pieces = [
            (places / each / "model.pte").read_bytes()[at : at + size]
            for each, at in (("base", start), ("beside", again))
        ]
        assert pieces[0] == pieces[1]
    weights = [places / each / "model.ptd" for each in ("base", "beside")]
    assert os.path.samefile(*weights)
    keys = [[row["key"] for row in each.program["named_data"]] for each in (plain, beside)]
    assert keys[1][: len(keys[0])] == keys[0]
    added = [
        factor_key(name, part, weight)
        for name in ("first", "second")
        for part in "AB"
        for weight in CHANGED
    ]
    assert sorted(keys[1][len(keys[0]) :]) == sorted(added)


def first_logits(artifact: Path) -> np.ndarray:
    with api.load(artifact, threads=1, adapter="first") as session:
        return session.extend(TOKENS)


def test_a_program_with_its_weights_within_gives_the_same(places, tmp_path):
    given = {"adapters": [str(places / "first")], "adapter_mode": "separate", **OPTIONS}
    api.export(places / "checkpoint", tmp_path / "within", recipe="int4", **given)
    np.testing.assert_array_equal(
        first_logits(tmp_path / "within"), first_logits(places / "beside")
    )
    # Activations that stay float32 are multiplied by groups of columns, whose products are added.
    given["activations"] = "float"
    (artifact,) = api.export(places / "checkpoint", tmp_path / "float", recipe="int4", **given)
    assert not failed(artifact, open_model(str(places / "checkpoint")))
    found, rounded = first_logits(artifact), first_logits(places / "beside")
    assert 0 < np.abs(found - rounded).max() < 0.1 * np.ptp(found)


def failed(artifact: Path, model: Model) -> dict[str, str]:
    checks = check_meaning(artifact, Manifest.read(artifact), model)
    return {check.name: check.message for check in checks if check.verdict == "failed"}


def test_the_change_of_another_product_is_found_in_the_files(places, tmp_path):
    model = open_model(str(places / "checkpoint"))
    assert not failed(places / "beside", model)
    for factor in "AB":
        artifact = shutil.copytree(places / "beside", tmp_path / factor)
        pte = read_pte(artifact / "model.pte")
        one, other = (factor_key("second", factor, f"{DOWN.format(at)}.weight") for at in (0, 1))
        # The first layer's delegates ask for the second layer's factor: both have one length.
        blob = (artifact / "model.pte").read_bytes()
        assert len(one) == len(other)  # once where the key is listed, once in a shared delegate
        assert blob.count(one.encode()) == 2
        for start, size in pte.segments:
            segment = blob[start : start + size]
            if one.encode() in segment:
                changed = segment.replace(one.encode(), other.encode())
                blob = blob[:start] + changed + blob[start + size :]
        (artifact / "model.pte").write_bytes(blob)
        found = failed(artifact, model)
        assert found and all("_second" in message for message in found.values())


def test_a_mixtures_attention_takes_an_adapter_and_its_experts_none(
    tmp_path, peft_adapters, places
):
    base = synthesise("tiny-mixtral", tmp_path / "checkpoint")
    expert = {"model.layers.0.block_sparse_moe.experts.1.w1": (192, 96)}
    attention = {Q.format(0): (96, 96)}
    for target in ("onnx", "coreml", "executorch"):
        with pytest.raises(
            CheckpointError, match="of a mixture's experts, which cannot lie beside"
        ):
            refused = peft_adapters.write(tmp_path / "expert", peft_adapters.factors(expert))
            given = {"adapters": [str(refused)], "adapter_mode": "separate", "recipe": "int8"}
            api.export(base, tmp_path / "out", targets=[target], context=32, **given)
    tuned = peft_adapters.write(tmp_path / "tuned", peft_adapters.factors(attention, size=0.5))
    given = {"adapters": [str(tuned)], "adapter_mode": "separate", "recipe": "int8", "context": 32}
    folders = api.export(base, tmp_path / "out", targets=["onnx", "executorch"], **given)
    for folder in folders:
        found = []
        for name in (None, "tuned"):
            with api.load(folder, threads=1, adapter=name) as session:
                found.append(session.extend(TOKENS))
        assert np.abs(found[0] - found[1]).max() > 0.1


def test_what_a_program_cannot_take_is_refused(places, tmp_path):
    artifact = shutil.copytree(places / "beside", tmp_path / "a")
    twin = shutil.copytree(places / "first", tmp_path / "my.first")
    api.export_adapter(artifact, twin)
    with pytest.raises(ExportError, match="has forward_my_first already"):
        api.export_adapter(artifact, shutil.copytree(twin, tmp_path / "my-first"))
    given = {"adapters": [str(twin)], "adapter_mode": "separate", "lowering": "stock", **OPTIONS}
    with pytest.raises(ExportError, match="leave out --lowering stock and --backend"):
        api.export(places / "checkpoint", tmp_path / "stock", **given)
