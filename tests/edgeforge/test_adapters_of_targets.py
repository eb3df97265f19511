"""What every target promises of adapters beside the weights, on one tiny model."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edgeforge import api
from edgeforge.checkpoint.adapter import open_adapters
from edgeforge.cli.forecast_report import head_lines, target_lines
from edgeforge.errors import CheckpointError
from edgeforge.model.low_rank import low_rank
from edgeforge.model.model import open_model
from edgeforge.sizes import size_text
from edgeforge.synth.synthesise import synthesise
from exporters.adapters import SEPARATE
from exporters.errors import ExportError, MemoryRefused
from exporters.executorch.reader import read_pte
from exporters.manifest import Manifest

TOKENS = np.arange(40, 63, dtype=np.int64)
Q, K = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"
DOWN = "model.layers.{}.mlp.down_proj"
SHAPES = {Q: (128, 128), K: (64, 128), DOWN: (128, 256)}
FIRST = {name.format(at): shape for at in range(2) for name, shape in SHAPES.items()}
SECOND = {Q.format(1): (128, 128)}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def places(tmp_path_factory, peft_adapters):
    """A base for every target, and the same with two adapters beside its weights."""
    root = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        base = synthesise("tiny-llama", root / "checkpoint")
        (base / "chat_template.jinja").write_text(TEMPLATE)
        first = peft_adapters.write(root / "first", peft_adapters.factors(FIRST, size=0.2))
        second = peft_adapters.write(
            root / "my-second.v2",
            peft_adapters.factors(SECOND, rank=2, seed=2),
            r=2,
            use_rslora=True,
        )
        given = {"recipe": "int8", "context": 96, "activations": "float", "targets": SEPARATE}
        api.export(base, root / "base", **given)
        both = [str(first), f"{second}@0.5"]
        api.export(base, root / "beside", adapters=both, adapter_mode="separate", **given)
        yield root


@pytest.fixture(params=SEPARATE)
def target(request) -> str:
    return request.param


def logits(artifact: Path, adapter: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The last token's logits of what generates, and all of what is there for `verify`."""
    with api.load(artifact, threads=1, adapter=adapter) as session:
        return session.extend(TOKENS), session.logits(TOKENS)


def test_without_an_adapter_the_logits_are_the_bases_bit_for_bit(places, target):
    plain, beside = places / "base" / target, places / "beside" / target
    for found, wanted in zip(logits(beside), logits(plain), strict=True):
        np.testing.assert_array_equal(found, wanted)
    records = {each.name: each for each in Manifest.read(beside).adapters}
    weights = {name: each.weight for name, each in records.items()}
    assert weights == {"first": 1, "my-second.v2": 0.5}
    sizes = [
        sum(file.size for file in Manifest.read(each).files.values()) for each in (plain, beside)
    ]
    assert sizes[1] < 1.5 * sizes[0]


def held_of_adapters(artifact: Path, target: str, grown: int) -> int:
    """The bytes of an artifact's files that hold factors of adapters.

    Args:
        artifact: the artifact.
        target: its target.
        grown: by how much adapters made its largest file larger.
    """
    if target == "onnx":
        return sum(path.stat().st_size for path in artifact.glob("*.onnx_adapter"))
    if target == "coreml":
        return grown  # of `weight.bin`, to which nothing else is added
    pte = read_pte(artifact / "model.pte")
    segments = {
        each["segment_index"]
        for each in pte.program["named_data"]
        if str(each["key"]).startswith("adapter ")
    }
    return sum(pte.segments[index][1] for index in segments)


def largest_file(artifact: Path) -> int:
    return max(file.size for file in Manifest.read(artifact).files.values())


def test_a_plan_counts_the_bytes_that_the_files_hold_of_adapters(places, target):
    """Beside them are a name, a shape or a record of each factor."""
    artifact, plain = places / "beside" / target, places / "base" / target
    model, adapters = open_model(str(places / "checkpoint")), [places / "first"]
    adapters.append(places / "my-second.v2")
    found = api.plan(
        places / "checkpoint",
        "iphone-15-pro",
        context=96,
        targets=[target],
        recipes=["int8"],
        adapters=[str(each) for each in adapters],
    )
    (row,) = found.targets[0].rows
    grown = largest_file(artifact) - largest_file(plain)
    held = held_of_adapters(artifact, target, grown)
    factors = 2 * (4 + 2)  # of three matrices in two layers; queries and keys are one
    assert row.adapters <= held <= row.adapters + 512 * factors
    without = api.plan(
        places / "checkpoint", "iphone-15-pro", context=96, targets=[target], recipes=["int8"]
    )
    (base,) = without.targets[0].rows
    assert base.adapters == 0 and row.adapters > 0
    assert row.total == base.total + row.adapters
    assert (row.stored, row.weights) == (base.stored, base.weights)
    assert found.adapters == ("first", "my-second.v2")
    told = "\n".join([*head_lines(found), *target_lines(found.targets[0])])
    assert "adapters beside the base: first, my-second.v2" in told
    assert f"holds them, adapters {size_text(row.adapters)}, caches" in told
    assert "adapters" not in "\n".join(target_lines(without.targets[0]))
    pairs = [low_rank(model, each).values() for each in open_adapters(map(str, adapters))]
    numbers = sum(factor.size for each in pairs for pair in each for factor in pair)
    assert row.adapters == numbers * (2 if target == "coreml" else 4)


def test_max_memory_counts_adapters(places, target, tmp_path):
    given = {"recipe": "int8", "context": 96, "targets": [target]}
    beside = {"adapters": [str(places / "first")], "adapter_mode": "separate"}
    (row,) = (
        api.plan(
            places / "checkpoint", "iphone-15-pro", context=96, targets=[target], recipes=["int8"]
        )
        .targets[0]
        .rows
    )
    memory = row.total + 1000
    api.export(places / "checkpoint", tmp_path / "base", max_memory=memory, **given)
    with pytest.raises(MemoryRefused, match=r"weights 0\.\d MB, adapters 0\.\d MB, caches"):
        api.export(places / "checkpoint", tmp_path / "out", max_memory=memory, **beside, **given)
    assert not (tmp_path / "out").exists()


def test_a_plan_refuses_what_an_export_with_adapters_refuses(places, peft_adapters, tmp_path):
    asked = {"context": 96, "targets": ["coreml"], "recipes": ["int8"]}
    base, phone = places / "checkpoint", "iphone-15-pro"
    with pytest.raises(ExportError, match="a package for iOS 17 holds only one"):
        api.plan(base, phone, opset="ios17", adapters=[str(places / "first")], **asked)
    head = peft_adapters.factors({"lm_head": (512, 128)})
    folder = peft_adapters.write(tmp_path / "head", head)
    with pytest.raises(CheckpointError, match="the embedding or the head, which cannot lie beside"):
        api.plan(base, phone, adapters=[str(folder)], **asked)
    other = peft_adapters.write(tmp_path / "other", peft_adapters.factors({"model.no": (4, 4)}))
    with pytest.raises(CheckpointError, match=r"model\.no\.weight, which this llama model does"):
        api.plan(base, phone, adapters=[str(other)], **asked)
    rounded = {**asked, "targets": ["executorch"], "recipes": ["int8", "w8a8"]}
    found = api.plan(base, phone, adapters=[str(places / "first")], **rounded).targets[0]
    assert [row.recipe for row in found.rows] == ["int8"]
    assert "an adapter beside the weights takes it unrounded" in found.refused["w8a8"]


@pytest.fixture(scope="module")
def tuned(places) -> dict[str, np.ndarray]:
    """The last token's logits of transformers' model, without and with ``scale * B A`` added."""
    from transformers import AutoModelForCausalLM

    found = {}
    scales = {"": 0.0, "first": 8 / 4, "my-second.v2": 0.5 * 8 / np.sqrt(2)}
    for name, scale in scales.items():
        model = AutoModelForCausalLM.from_pretrained(places / "checkpoint", dtype=torch.float32)
        factors = load_file(places / name / "adapter_model.safetensors") if name else {}
        for key, down in factors.items():
            module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
            if part == "A.weight":
                change = factors[key.replace("lora_A", "lora_B")] @ down
                model.get_submodule(module).weight.data += scale * change
        with torch.no_grad():
            found[name] = model(torch.from_numpy(TOKENS)[None]).logits[0, -1].numpy()
    return found


@pytest.mark.parametrize("name", ["first", "my-second.v2"])
def test_with_an_adapter_it_computes_what_transformers_does(name, places, target, tuned):
    last, whole = logits(places / "beside" / target, name)
    assert np.abs(whole[-1] - last).max() < 1e-2 * np.ptp(last)
    moved = np.abs(tuned[name] - tuned[""]).max()
    assert moved > 0.1 * np.ptp(tuned[""])
    assert np.abs(last - tuned[name]).max() < 0.25 * moved


def test_an_artifact_without_adapters_takes_one_later(places, target, tmp_path):
    """It gives what one that was exported with it gives, and shares no file that it changes."""
    later = shutil.copytree(places / "base" / target, tmp_path / "later")
    twin = shutil.copytree(later, tmp_path / "twin", copy_function=os.link)
    before = {path: path.read_bytes() for path in twin.rglob("*") if path.is_file()}
    assert api.export_adapter(later, places / "first") == "first"
    for name in (None, "first"):
        wanted = logits(places / "beside" / target, name)
        for found, each in zip(logits(later, name), wanted, strict=True):
            np.testing.assert_array_equal(found, each)
    assert {path: path.read_bytes() for path in twin.rglob("*") if path.is_file()} == before


def test_verify_holds_the_artifact_against_the_checkpoint_with_each_adapter(places, target):
    report = api.verify(places / "beside" / target, tokens=32, timed=False, threads=1)
    assert [each.name for each in report.with_adapters] == ["first", "my-second.v2"]
    for figures in report.with_adapters:
        assert figures.lowering.kl_mean < 2e-5 < 0.01 < figures.change.kl_mean
        assert figures.quantization.kl_mean > 0
    assert "adapter.my-second.v2.lowering.kl_mean" in {each.name for each in report.checks}


def test_the_command_line_switches_adapters(edgeforge, places, target):
    artifact = places / "beside" / target
    given = {
        "none": (),
        "first": ("--adapter", "first"),
        "chat": ("--chat",),
        "chat first": ("--chat", "--adapter", "first"),
        "two": ("--chat", "--adapter", "first", "--adapter", "my-second.v2"),
    }
    run = {
        name: edgeforge("run", artifact, "-p", "abc", "-n", "3", "--threads", "1", *options)
        for name, options in given.items()
    }
    assert run["none"].out != run["first"].out
    assert run["chat"].out != run["chat first"].out
    assert [run[name].code for name in given] == [0, 0, 0, 0, 2]
    unknown = edgeforge("run", artifact, "-p", "abc", "--chat", "--adapter", "third")
    assert unknown.code == 5
    assert "no adapter 'third' to switch on: it has first, my-second.v2" in unknown.err
    assert "adapter: first, beside the weights in " in edgeforge("inspect", artifact).out


def test_an_artifact_stays_as_it_was_where_an_adapter_cannot_be_added(
    places, target, tmp_path, monkeypatch, peft_adapters
):
    artifact = shutil.copytree(places / "beside" / target, tmp_path / "a")
    before = {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()}
    other = peft_adapters.write(tmp_path / "other", peft_adapters.factors({Q.format(1): (96, 96)}))
    with pytest.raises(CheckpointError, match="it belongs to another model"):
        api.export_adapter(artifact, other)
    third = shutil.copytree(places / "first", tmp_path / "third")

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("exporters.replaced.os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            api.export_adapter(artifact, third)
    assert {path: path.read_bytes() for path in artifact.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()].count("a") == 1
