"""Adapters of an artifact: merged, or beside its weights and switched on while it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from device_harness.errors import DeviceError
from edgeforge import api
from edgeforge.errors import CheckFailed, CheckpointError, UsageError
from edgeforge.gate.policy import Terms
from edgeforge.gate.subjects import Checking, look
from edgeforge.model.model import open_model
from edgeforge.synth.synthesise import synthesise
from exporters.errors import ExportError
from exporters.manifest import Manifest

TOKENS = np.arange(40, 63, dtype=np.int64)
Q, K = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.k_proj"
DOWN = "model.layers.{}.mlp.down_proj"
SHAPES = {Q: (128, 128), K: (64, 128), DOWN: (128, 256)}
FIRST = {name.format(at): shape for at in range(2) for name, shape in SHAPES.items()}
SECOND = {Q.format(1): (128, 128)}


@pytest.fixture(scope="module")
def places(tmp_path_factory, peft_adapters):
    """A base, the same with an adapter beside its weights and one added later, and a merged one."""
    root = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFORGE_CACHE", str(root / "cache"))
        base = synthesise("tiny-llama", root / "checkpoint")
        first = peft_adapters.write(root / "first", peft_adapters.factors(FIRST, size=0.2))
        second = peft_adapters.write(
            root / "second", peft_adapters.factors(SECOND, rank=2, seed=2), r=2, use_rslora=True
        )
        given = {"recipe": "int8", "context": 96, "activations": "float"}
        api.export(base, root / "base", **given)
        api.export(base, root / "beside", adapters=[str(first)], adapter_mode="separate", **given)
        assert api.export_adapter(root / "beside", f"{second}@0.5") == "second"
        api.export(base, root / "merged", adapters=[str(first)], **given)
        yield root


def logits(artifact: Path, adapter: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The last token's logits of the graph that generates, and all of the graph for `verify`."""
    with api.load(artifact, threads=1, adapter=adapter) as session:
        return session.extend(TOKENS), session.logits(TOKENS)


def test_without_an_adapter_the_logits_are_the_bases_bit_for_bit(places):
    for found, wanted in zip(logits(places / "beside"), logits(places / "base"), strict=True):
        np.testing.assert_array_equal(found, wanted)
    files = {name: Manifest.read(places / name).files for name in ("base", "beside")}
    data = "model.onnx.data"
    assert files["base"][data] == files["beside"][data]
    records = {each.name: each for each in Manifest.read(places / "beside").adapters}
    assert {name: each.weight for name, each in records.items()} == {"first": 1, "second": 0.5}
    assert files["beside"]["first.onnx_adapter"].size < 100_000


def test_an_artifact_without_adapters_takes_one_later(places, tmp_path):
    plain = shutil.copytree(places / "base", tmp_path / "plain")
    assert api.export_adapter(plain, places / "first") == "first"
    for name in (None, "first"):
        for found, wanted in zip(logits(plain, name), logits(places / "beside", name), strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["first", "second"])
def test_an_adapter_adds_what_it_adds_to_the_float_weights(name, places, traced):
    given = f"{places / name}@{0.5 if name == 'second' else 1}"
    models = [open_model(str(places / "checkpoint"), adapters=each) for each in ([], [given])]
    plain, tuned = (traced.session(model, 96).logits(TOKENS) for model in models)
    last, whole = logits(places / "beside", name)
    assert np.abs(whole[-1] - last).max() < 1e-2 * np.ptp(last)
    moved = np.abs(tuned[-1] - plain[-1]).max()
    assert moved > 0.1 * np.ptp(plain[-1])
    assert np.abs(last - tuned[-1]).max() < 0.25 * moved


def test_verify_holds_the_artifact_against_the_checkpoint_with_each_adapter(places):
    report = api.verify(places / "beside", tokens=96, timed=False)
    first, second = report.with_adapters
    assert (first.name, second.name) == ("first", "second")
    for figures in (first, second):
        assert figures.lowering.kl_mean < 1e-5 < 0.01 < figures.change.kl_mean
        assert figures.quantization.kl_mean > 0
    names = {each.name for each in report.checks}
    assert "adapter.second.lowering.kl_mean" in names
    written = json.loads((places / "beside" / "report.json").read_text())
    assert [each["name"] for each in written["with_adapters"]] == ["first", "second"]
    merged = api.verify(places / "merged", tokens=96, timed=False)
    assert merged.adapters == ("first",) and not merged.with_adapters
    card = (places / "merged" / "CARD.md").read_text()
    assert "| adapter | `first`, merged into the weights, SHA-256" in card
    assert (
        "`second` times 0.5, in `second.onnx_adapter`"
        in (places / "beside" / "CARD.md").read_text()
    )


def test_check_notices_an_adapter_that_changed(places):
    """`test_verify_...` above left reports."""
    config = places / "first" / "adapter_config.json"
    before = config.read_bytes()
    for name in ("beside", "merged"):
        folder = places / name
        if not (folder / "report.json").is_file():
            api.verify(folder, tokens=96, timed=False)

        def stale(folder: Path = folder) -> list[str]:
            checking = Checking(folder, "", Manifest.read(folder), Terms(tokens=96))
            look([checking], None)
            return [*checking.changed, *checking.stale]

        assert stale() == []
        config.write_bytes(before + b" ")
        assert stale() == ["the adapter first changed"]
        config.unlink()
        assert stale() == ["the adapter first changed"]
        config.write_bytes(before)
        assert stale() == []


def test_the_command_line_switches_adapters(edgeforge, places):
    artifact = str(places / "beside")
    texts = {
        name: edgeforge("run", artifact, "-p", "abc", "-n", "8", *given)
        for name, given in {
            "none": (),
            "first": ("--adapter", "first"),
            "two": ("--adapter", "first", "--adapter", "second"),
            "third": ("--adapter", "third"),
        }.items()
    }
    assert texts["none"].out != texts["first"].out
    assert texts["two"].code == 2 and "one adapter at a time" in texts["two"].err
    assert texts["third"].code == 5
    assert "no adapter 'third' to switch on: it has first, second" in texts["third"].err
    shown = edgeforge("inspect", artifact).out
    assert "adapter: first, beside the weights in first.onnx_adapter" in shown
    told = edgeforge("run", str(places / "merged"), "-p", "abc", "--adapter", "first").err
    assert "first is merged into its weights, and always on" in told


def test_onnxruntime_genai_switches_the_same_adapters(places):
    import onnxruntime_genai as og

    artifact = places / "beside"
    model = og.Model(str(artifact))
    adapters = og.Adapters(model)
    for name in ("first", "second"):
        adapters.load(str(artifact / f"{name}.onnx_adapter"), name)
    for name in (None, "first", "second", None):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(TOKENS) + 12, do_sample=False)
        generator = og.Generator(model, parameters)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(TOKENS.tolist())
        while not generator.is_done():
            generator.generate_next_token()
        found = list(map(int, generator.get_sequence(0)))[len(TOKENS) :]
        with api.load(artifact, threads=1, adapter=name) as session:
            token, wanted = int(session.extend(TOKENS).argmax()), []
            while len(wanted) < len(found):
                wanted.append(token)
                token = int(session.extend(np.array([token], np.int64)).argmax())
        assert found == wanted, name


def write_adapter_file(path: Path, parameters: dict[str, np.ndarray]) -> None:
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))
        for name, value in parameters.items()
    }
    form.set_parameters(values)
    form.export_adapter(str(path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: {k: v for k, v in p.items() if k.endswith("A")}, "the adapter is not whole"),
        (lambda p: {k: v[:, :1] if k.endswith("A") else v for k, v in p.items()}, "not fit the"),
        (lambda p: {k: v[:-1] if k.endswith("A") else v for k, v in p.items()}, "not fit the"),
        (lambda p: {k: v.astype(np.float16) for k, v in p.items()}, "not fit the graph"),
        (lambda p: {f"other.{k}": v for k, v in p.items()}, "which the graph does not take"),
        (None, "cannot be read as an adapter"),
    ],
    ids=["half", "ranks", "rows", "dtype", "names", "bytes"],
)
def test_a_file_that_is_no_adapter_of_the_graph_is_refused(places, tmp_path, change, told):
    artifact = shutil.copytree(places / "beside", tmp_path / "a")
    path = artifact / "second.onnx_adapter"
    read = onnxruntime.AdapterFormat.read_adapter(str(path))
    parameters = {name: value.numpy().copy() for name, value in read.get_parameters().items()}
    del read
    if change is None:
        path.write_bytes(b"no adapter")
    else:
        write_adapter_file(path, change(parameters))
    with pytest.raises(DeviceError, match=told):
        logits(artifact, "second")


def test_what_cannot_lie_beside_the_weights_is_refused_before_any_work(
    places, tmp_path, peft_adapters
):
    base = places / "checkpoint"

    def refused(error, told, folder, **options):
        given = {"adapters": [str(folder)], "adapter_mode": "separate", **options}
        with pytest.raises(error, match=told):
            api.export(base, tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()

    plain = peft_adapters.factors(SECOND)
    dora = {**plain, f"{Q.format(1)}.lora_magnitude_vector": torch.ones(128)}
    refused(
        CheckpointError,
        "by DoRA, which cannot lie beside the weights",
        peft_adapters.write(tmp_path / "dora", dora, use_dora=True),
    )
    norm = {**plain, "model.norm.weight": torch.ones(128)}
    refused(
        CheckpointError,
        "changes model.norm.weight as a whole, which cannot lie",
        peft_adapters.write(tmp_path / "norm", norm),
    )
    rows = open_model(str(base)).spec.vocab_size
    embedding = {
        "model.embed_tokens.lora_embedding_A": torch.ones(4, rows),
        "model.embed_tokens.lora_embedding_B": torch.ones(128, 4),
    }
    refused(
        CheckpointError,
        "the embedding or the head, which cannot lie",
        peft_adapters.write(tmp_path / "embedding", embedding),
    )
    good = places / "second"
    refused(ExportError, "one: use --opset ios18", good, targets=["coreml"], opset="ios17")
    refused(UsageError, "not possible with a rotation", good, rotation="hadamard")
    refused(UsageError, "give an --adapter with it", good, adapters=[])
    refused(UsageError, "take merged or separate", good, adapter_mode="apart")
    named = shutil.copytree(good, tmp_path / "a name")
    refused(ExportError, "files of an artifact are named after it: rename it", named)
    twin = shutil.copytree(good, tmp_path / "twin" / "second")
    refused(UsageError, "two adapters are named second", good, adapters=[str(good), str(twin)])
    rounded = "the recipe w8a8 rounds what .* multiplies to 8 bits"
    refused(UsageError, rounded, good, recipe="w8a8", context=96, calibrate=False)


def test_adding_an_adapter_leaves_the_artifact_as_it_was_where_it_cannot(places, tmp_path):
    artifact = shutil.copytree(places / "beside", tmp_path / "a")
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    with pytest.raises(UsageError, match="has an adapter named second already"):
        api.export_adapter(artifact, places / "second")
    other = shutil.copytree(places / "second", tmp_path / "other")
    (other / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="too few for a safetensors file"):
        api.export_adapter(artifact, other)
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    manifest = json.loads(before["edgeforge.json"])
    manifest["rotation"] = {"name": "hadamard", "version": 1, "seed": 0}
    (artifact / "edgeforge.json").write_text(json.dumps(manifest))
    third = shutil.copytree(places / "second", tmp_path / "third")
    with pytest.raises(UsageError, match=r"are rotated \(hadamard\), and an adapter fits them"):
        api.export_adapter(artifact, third)
    (artifact / "edgeforge.json").write_bytes(before["edgeforge.json"])
    (artifact / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds mine.txt, which EdgeForge did not write"):
        api.export_adapter(artifact, third)
    (artifact / "model.onnx.data").write_bytes(b"")
    (artifact / "mine.txt").unlink()
    with pytest.raises(CheckFailed, match=r"model.onnx.data has 0 bytes"):
        api.export_adapter(artifact, third)


def test_an_adapter_that_moved_or_changed_is_told_in_one_sentence(places, tmp_path):
    moved = shutil.copytree(places / "merged", tmp_path / "merged")
    manifest = json.loads((moved / "edgeforge.json").read_text())
    manifest["adapters"][0]["path"] = str(tmp_path / "gone")
    (moved / "edgeforge.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"the adapter first .* is not at .*gone any more"):
        api.verify(moved, tokens=32, timed=False)
    shutil.copytree(places / "second", tmp_path / "gone")
    with pytest.raises(UsageError, match="is not the adapter that the artifact was made with"):
        api.verify(moved, tokens=32, timed=False)
