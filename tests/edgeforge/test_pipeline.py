"""From a checkpoint to artifacts: whole or nothing, and nothing done twice."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import quant.store.fill
from edgeforge.errors import UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.families.facts import DEFAULT_CONTEXT, choose_context
from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.model.model import Model, open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.artifacts import find_artifacts
from edgeforge.verification.stored_weights import require_recorded_weights
from exporters import registry
from exporters.errors import ExportError
from exporters.manifest import Manifest, check_files
from exporters.onnx.target import OnnxTarget
from exporters.target import Lowered
from quant.errors import QuantizationError

SHORT = ExportOptions("int4-g32", context=48)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGEFORGE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return synthesise("tiny-openelm", tmp_path_factory.mktemp("synth") / "tiny")


@pytest.fixture
def model(checkpoint) -> Model:
    return open_model(str(checkpoint))


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


class Note(OnnxTarget):
    """A target of one file: the weights' names."""

    name = "note"
    about = "for tests"

    def check(self, plan, shapes, facts, options):
        if "int8-pc" in {format.name for format in plan.formats()}:
            raise ExportError("the note holds no int8")

    def write(self, request, folder):
        (folder / "note.txt").write_text("\n".join(request.store.names()))
        return Lowered("note.txt", {"tokens": "int64[t]"}, {}, {}, ("a note",))

    def stored_digests(self, folder):
        return {}

    def structure(self, folder):
        return ()


@pytest.fixture
def note(monkeypatch) -> Note:
    monkeypatch.setitem(registry.TARGETS, "note", Note())
    return registry.find_target("note")


def test_the_artifact_says_what_it_was_made_of(model, checkpoint, tmp_path):
    stages = []
    options = ExportOptions("int4-g32-asym", context=48)
    out = tmp_path / "an öutput folder"
    made = export(
        model, [OnnxTarget()], out, options, lambda stage, done, size: stages.append(stage)
    )
    assert made == [out]
    manifest = Manifest.read(out)
    assert (manifest.target, manifest.recipe, manifest.context) == ("onnx", "int4-g32-asym", 48)
    assert manifest.entry == "model.onnx" and (out / manifest.entry).is_file()
    assert manifest.source.path == str(checkpoint.resolve())
    assert manifest.source.sha256 == model.checkpoint.digest().sha256
    assert manifest.model.summary["num_parameters"] == 500704
    assert manifest.model.summary["layers"][2]["num_heads"] == 8
    # 4 bits, and for 32 weights a scale of 16 bits and a zero point of 4; norms are float32.
    assert 4.625 < manifest.bits_per_weight < 4.75
    assert any("8 bits" in note for note in manifest.notes)
    assert set(manifest.tools) == {"edgeforge", "torch", "onnx", "onnxruntime"}
    assert check_files(out, manifest) == []
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
    order = list(dict.fromkeys(stages))
    assert order.index("trace") < order.index("write onnx")
    assert {"hash", "quantize"} <= set(order)
    require_recorded_weights(out, manifest)


def test_a_second_export_quantizes_nothing(model, tmp_path, cache, monkeypatch):
    export(model, [OnnxTarget()], tmp_path / "first", SHORT)
    (store,) = (cache / "stores").iterdir()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(quant.store.fill, "fill_store", never)
    stages = []
    export(
        model,
        [OnnxTarget()],
        tmp_path / "second",
        SHORT,
        lambda stage, done, size: stages.append(stage),
    )
    assert "quantize (cached)" in stages and "quantize" not in stages
    # Neither another context nor another name for the same formats makes another store.
    export(model, [OnnxTarget()], tmp_path / "long", ExportOptions("int4-g32", context=200))
    recipe = tmp_path / "mine.yaml"
    formats = {r.format for r in Manifest.read(tmp_path / "first").weights.values()} - {"fp32"}
    assert len(formats) == 1
    recipe.write_text(f"rules:\n- {{match: '*', format: {formats.pop()}}}\n")
    export(model, [OnnxTarget()], tmp_path / "mine", ExportOptions(str(recipe), context=48))
    assert list((cache / "stores").iterdir()) == [store]
    first, second = tmp_path / "first", tmp_path / "second"
    assert listing(first) == listing(second)
    assert all((first / n).read_bytes() == (second / n).read_bytes() for n in listing(first))


def test_another_recipe_and_another_checkpoint_make_other_stores(model, tmp_path, cache):
    export(model, [OnnxTarget()], tmp_path / "a", SHORT)
    export(model, [OnnxTarget()], tmp_path / "b", ExportOptions("int8", context=48))
    other = open_model(str(synthesise("tiny-openelm", tmp_path / "seeded", seed=1)))
    export(other, [OnnxTarget()], tmp_path / "c", SHORT)
    assert len(list((cache / "stores").iterdir())) == 3
    digests = [Manifest.read(tmp_path / name).weights for name in "abc"]
    name = "model.layers.0.mlp.down_proj.weight"
    assert len({rows[name].digest for rows in digests}) == 3


@pytest.mark.parametrize("error", [RuntimeError, ExportError, KeyboardInterrupt, SystemExit])
def test_a_failing_target_leaves_nothing(model, tmp_path, error):
    class Failing(Note):
        def write(self, request, folder):
            (folder / "half").write_text("written")
            raise error("midway")

    before = listing(tmp_path)
    with pytest.raises(error, match="midway"):
        export(model, [OnnxTarget(), Failing()], tmp_path / "deep" / "out", SHORT)
    # The store is whole and stays; nothing of the artifact does, folders on the way included.
    assert [n for n in listing(tmp_path) if not n.startswith("cache")] == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failing_to_quantize_leaves_neither_store_nor_artifact(
    model, tmp_path, cache, monkeypatch, error
):
    real = CheckpointWeights.read_rows
    count = 0

    def failing(*arguments):
        nonlocal count
        count += 1
        if count == 5:
            raise error("midway")
        return real(*arguments)

    monkeypatch.setattr(CheckpointWeights, "read_rows", failing)
    with pytest.raises(error, match="midway"):
        export(model, [OnnxTarget()], tmp_path / "out", SHORT)
    assert not (tmp_path / "out").exists()
    assert not any(path.is_file() for path in (cache / "stores").rglob("*"))
    # And the next attempt succeeds.
    export(model, [OnnxTarget()], tmp_path / "out", SHORT)
    assert check_files(tmp_path / "out", Manifest.read(tmp_path / "out")) == []


def test_an_existing_folder_is_kept_unless_forced(model, tmp_path):
    out = tmp_path / "out"
    export(model, [OnnxTarget()], out, SHORT)
    before = (out / "edgeforge.json").read_bytes()
    with pytest.raises(UsageError, match="--force"):
        export(model, [OnnxTarget()], out, ExportOptions("int8", context=48))
    assert (out / "edgeforge.json").read_bytes() == before
    (out / "mine.txt").write_text("x")
    forced = ExportOptions("int8", context=48, force=True)
    with pytest.raises(UsageError, match=r"out holds mine\.txt, which EdgeForge did not write"):
        export(model, [OnnxTarget()], out, forced)
    assert (out / "edgeforge.json").read_bytes() == before
    (out / "mine.txt").rename(tmp_path / "mine.txt")
    export(model, [OnnxTarget()], out, forced)
    assert Manifest.read(out).recipe == "int8"


def test_several_targets_are_folders_of_one_output(model, tmp_path, note):
    out = tmp_path / "out"
    targets = [registry.find_target("onnx"), note]
    made = export(model, targets, out, SHORT)
    assert made == [out / "onnx", out / "note"]
    assert sorted(path.name for path in out.iterdir()) == ["note", "onnx"]
    manifests = [Manifest.read(folder) for folder in made]
    assert [manifest.target for manifest in manifests] == ["onnx", "note"]
    # One quantization: every target tells of the same integers.
    stored = [
        {name: replace(record, float_columns=()) for name, record in manifest.weights.items()}
        for manifest in manifests
    ]
    assert stored[0] == stored[1]
    assert manifests[1].entry == "note.txt" and "a note" in manifests[1].notes
    assert all(check_files(folder, m) == [] for folder, m in zip(made, manifests, strict=True))
    assert find_artifacts([out]) == sorted(made)
    assert find_artifacts([out / "onnx"]) == [out / "onnx"]


def test_a_target_refuses_before_anything_is_made(model, tmp_path, note, cache):
    with pytest.raises(ExportError, match="the note holds no int8"):
        export(model, [OnnxTarget(), note], tmp_path / "out", ExportOptions("int8"))
    assert not cache.exists() and not (tmp_path / "out").exists()


def test_a_target_of_no_known_name():
    with pytest.raises(ExportError) as caught:
        registry.find_target("onxx")
    assert str(caught.value) == (
        f"there is no target 'onxx' (did you mean 'onnx'?); known: {', '.join(registry.TARGETS)}"
    )


@pytest.mark.parametrize("asked", [0, 1, 257, -5])
def test_a_context_the_model_was_not_made_for(model, tmp_path, asked):
    with pytest.raises(UsageError) as caught:
        export(model, [OnnxTarget()], tmp_path / "out", ExportOptions("int4", context=asked))
    assert str(caught.value) == (
        f"--context {asked} is not possible: this model takes 2 to 256 tokens"
    )


@dataclass
class Positions:
    """As much of a spec as the choice of a context reads."""

    max_context: int
    attends: bool = True


def test_the_declared_context():
    assert choose_context(Positions(131072), None) == DEFAULT_CONTEXT == 4096
    assert choose_context(Positions(131072), 131072) == 131072
    assert choose_context(Positions(256), None) == 256
    assert choose_context(Positions(256), 2) == 2


@pytest.mark.parametrize("context", [2, 256])
def test_the_shortest_and_the_longest_context_run(model, tmp_path, context):
    from device_harness.onnx_session import OnnxSession

    export(model, [OnnxTarget()], tmp_path / "out", ExportOptions("fp16", context=context))
    session = OnnxSession(tmp_path / "out", context, 1)
    tokens = np.arange(context, dtype=np.int64)
    assert np.isfinite(session.extend(tokens)).all()
    assert session.logits(tokens).shape == (context, 512)


def test_what_longrope_chose_is_told(tmp_path):
    model = open_model(str(synthesise("tiny-phi-3-128k", tmp_path / "phi")))
    for context, chosen in ((64, "short"), (65, "long")):
        out = tmp_path / chosen
        export(model, [OnnxTarget()], out, ExportOptions("fp32", context=context))
        manifest = Manifest.read(out)
        told = manifest.notes if chosen == "short" else manifest.warnings
        (sentence,) = (each for each in (*manifest.notes, *manifest.warnings) if "longrope" in each)
        assert sentence in told and f"the {chosen} factors" in sentence
        assert "original context" in sentence and "64" in sentence


def test_a_weight_that_is_not_a_number_is_named(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["transformer.layers.1.ffn.proj_2.weight"][3, 5] = np.nan
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(QuantizationError, match=r"layers\.1\.\S+ has NaN in row 3"):
        export(open_model(str(copy)), [OnnxTarget()], tmp_path / "out", SHORT)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_tokenizer_or_generation_config(checkpoint, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(checkpoint / name, bare / name)
    export(open_model(str(bare)), [OnnxTarget()], tmp_path / "out", SHORT)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {"model.onnx", "genai_config.json", "config.json"} <= names
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["bos_token_id"] == 256
