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
from edgeforge.errors import CheckpointError
from edgeforge.synth.synthesise import synthesise
from exporters.adapters import SEPARATE
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
