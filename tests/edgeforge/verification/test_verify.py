"""What verify needs of an artifact beside its files."""

import errno
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from edgeforge.calibration.text import CalibrationOptions
from edgeforge.errors import CheckFailed, CheckpointError, UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.meaning.check import check_meaning
from edgeforge.verification.references import reopen
from edgeforge.verification.soundness import UnsoundError
from edgeforge.verification.stored_weights import may_differ
from edgeforge.verification.verify import verify, verify_together
from edgeforge.verification.verify_options import VerifyOptions
from exporters.manifest import Manifest
from exporters.manifest_records import RotationRecord
from exporters.registry import find_target
from quant.processors import processor_kind
from quant.quantizers import registry


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))


def exported(tmp_path, **fields):
    checkpoint = synthesise("tiny-llama", tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | fields))
    model = open_model(str(checkpoint), ignore_config=fields)
    out = tmp_path / "out"
    export(model, [find_target("onnx")], out, ExportOptions("int4", context=64))
    return out


def test_a_field_vouched_for_at_export_is_vouched_for_at_verify(tmp_path):
    out = exported(tmp_path, some_new_field=3)
    assert Manifest.read(out).model.ignored_config == ("some_new_field",)
    evaluation = verify(out, VerifyOptions(tokens=100, timed=False))
    assert evaluation.lowering.kl_mean < 1e-2


def test_a_text_is_not_replaced_by_the_report_on_it(tmp_path):
    text = tmp_path / "report.json"
    text.write_text("years of work")
    with pytest.raises(UsageError, match=r"the report .* is the text"):
        verify(tmp_path, VerifyOptions(text=text))
    assert text.read_text() == "years of work"


def test_another_checkpoint_of_the_same_shape_is_refused(tmp_path):
    out = exported(tmp_path)
    other = synthesise("tiny-llama", tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="not the checkpoint that the artifact was made of"):
        reopen(Manifest.read(out), str(other))


def test_a_checkpoint_that_moved_is_asked_for(tmp_path):
    out = exported(tmp_path)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="model"):
        reopen(Manifest.read(out), None)
    assert reopen(Manifest.read(out), str(tmp_path / "elsewhere")).spec.model_type == "llama"


def with_a_named_tokenizer(folder, recipe):
    """An artifact of a model whose tokenizer lies in another folder."""
    source = synthesise("tiny-llama", folder / "model")
    (folder / "words").mkdir()
    (source / "tokenizer.json").rename(folder / "words" / "tokenizer.json")
    out = folder / "out"
    given = ExportOptions(recipe, context=64, calibration=CalibrationOptions(None, 512, 32))
    model = open_model(str(source), tokenizer=str(folder / "words"))
    export(model, [find_target("onnx")], out, given)
    return out


def verdicts(checks):
    return [check.verdict for check in checks if check.name == "tokenizer"]


@pytest.mark.parametrize("recipe", ["int8", "int4-gptq"])
def test_a_tokenizer_named_at_export_is_the_one_that_counts(recipe, tmp_path, monkeypatch):
    out = with_a_named_tokenizer(tmp_path, recipe)
    assert Manifest.read(out).tokenizer.given == str(tmp_path / "words")
    # The store is made again from the tokens of the calibration text.
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "another"))
    evaluation = verify(out, VerifyOptions(tokens=100, timed=False))
    assert evaluation.stored_weights_equal
    manifest = Manifest.read(out)
    assert verdicts(check_meaning(out, manifest, reopen(manifest, None))) == ["passed"]
    with (tmp_path / "words" / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    found = check_meaning(out, manifest, reopen(manifest, None))
    assert verdicts(found) == ["failed"]
    assert any("tokenizer.json is not that of" in check.message for check in found)


def test_a_named_tokenizer_that_is_gone_is_asked_for(tmp_path):
    out = with_a_named_tokenizer(tmp_path, "int8")
    (tmp_path / "words").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"the tokenizer .* is not at .*words any more"):
        reopen(Manifest.read(out), None)


@pytest.fixture
def pair(tmp_path):
    """One checkpoint by one recipe for two targets, and by another recipe."""
    model = open_model(str(synthesise("tiny-llama", tmp_path / "model")))
    options = ExportOptions("int4", context=64)
    folders = export(
        model, [find_target("onnx"), find_target("coreml")], tmp_path / "both", options
    )
    folders += export(
        model, [find_target("onnx")], tmp_path / "other", ExportOptions("int8", context=64)
    )
    return folders


def test_artifacts_of_one_export_share_their_references(pair, monkeypatch):
    from edgeforge.verification import evaluate as module

    made = []
    references = module.references
    monkeypatch.setattr(
        module, "references", lambda m, *rest: made.append(m.recipe) or references(m, *rest)
    )
    options, stages = VerifyOptions(tokens=600, timed=False), []
    onnx, coreml, other = verify_together(
        [pair[0], pair[1], pair[2]], options, lambda stage, done, size: stages.append((stage, done))
    )
    assert made == ["int4", "int8"]
    # In the order asked for, each with a report of its own.
    assert [found.target for found in (onnx, coreml, other)] == ["onnx", "coreml", "onnx"]
    for folder, found in zip(pair, (onnx, coreml, other), strict=True):
        written = json.loads((folder / "report.json").read_text())
        assert len(written.pop("sha256")) == 64  # of all the rest
        assert written == json.loads(json.dumps(found.to_json()))
    assert onnx.tokens == coreml.tokens == other.tokens == 600
    assert onnx.quantization == coreml.quantization != other.quantization
    assert onnx.perplexity["float"] == coreml.perplexity["float"] == other.perplexity["float"]
    assert onnx.lowering != coreml.lowering
    # As if each had been verified alone.
    for folder, found in zip(pair, (onnx, coreml, other), strict=True):
        alone = verify(folder, options)
        assert alone.quantization == found.quantization
        assert alone.lowering.kl_mean == pytest.approx(found.lowering.kl_mean, rel=0.05, abs=1e-9)
        assert alone.greedy_float == found.greedy_float
        assert alone.intervals.quantization == found.intervals.quantization
    assert [stage for stage, done in stages if done == 0 and stage == "compare"] == ["compare"] * 2


def test_a_large_models_artifacts_are_open_one_at_a_time(pair, monkeypatch):
    from edgeforge.verification import each_session
    from edgeforge.verification import verify as module

    opened = []
    real = each_session.open_sessions
    monkeypatch.setattr(
        each_session,
        "open_sessions",
        lambda artifacts, *rest: opened.append(len(artifacts)) or real(artifacts, *rest),
    )
    options = VerifyOptions(tokens=128, timed=False)
    verify_together(pair[:2], options)
    monkeypatch.setattr(module, "LARGE_MODEL", 1000)
    verify_together(pair[:2], options)
    assert opened == [2, 1, 1]


def test_no_artifact_is_run_before_the_files_of_all_are_checked(pair):
    file = pair[1] / "tokenizer.json"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(CheckFailed, match=r"tokenizer\.json has"):
        verify_together(pair, VerifyOptions(tokens=128, timed=False))
    assert not any((folder / "report.json").exists() for folder in pair)


def test_the_number_of_tokens_is_checked_where_no_command_line_did(tmp_path):
    with pytest.raises(UsageError, match="1 is neither a number of tokens"):
        verify(tmp_path, VerifyOptions(tokens=1))


def changed_record(folder, name):
    """Puts another weight's digest into an artifact's manifest."""
    manifest = json.loads((folder / "edgeforge.json").read_text())
    other = next(n for n, r in manifest["weights"].items() if n != name)
    manifest["weights"][name]["digest"] = manifest["weights"][other]["digest"]
    (folder / "edgeforge.json").write_text(json.dumps(manifest))


NAME = "model.layers.0.mlp.down_proj.weight"


def test_a_manifest_unlike_the_files_is_named(tmp_path, edgeforge):
    out = exported(tmp_path)
    changed_record(out, NAME)
    words = f"{out}: {NAME} has other integers or scales in the files than edgeforge.json records"
    with pytest.raises(CheckFailed) as caught:
        verify(out, VerifyOptions(tokens=100, timed=False))
    assert str(caught.value).startswith(words)
    for command in (("verify", out, "-q"), ("inspect", out)):
        done = edgeforge(*command)
        assert done.code == 1 and done.err.splitlines()[-1].startswith(f"edgeforge: {words}")


def with_other_integers(tmp_path, out):
    """Replaces an artifact by one of other integers, which its manifest records."""
    other = tmp_path / "other"
    synthesise("tiny-llama", other, seed=1)
    model = open_model(str(other))
    export(model, [find_target("onnx")], tmp_path / "swapped", ExportOptions("int4", context=64))
    source = json.loads((out / "edgeforge.json").read_text())["source"]
    for file in out.iterdir():
        file.unlink()
    for file in (tmp_path / "swapped").iterdir():
        file.rename(out / file.name)
    manifest = json.loads((out / "edgeforge.json").read_text())
    (out / "edgeforge.json").write_text(json.dumps(manifest | {"source": source}))


def test_files_and_manifest_unlike_the_store_are_named(tmp_path, edgeforge):
    out = exported(tmp_path)
    (store,) = (tmp_path / "cache" / "stores").iterdir()
    with_other_integers(tmp_path, out)
    with pytest.raises(UnsoundError) as caught:
        verify(out, VerifyOptions(tokens=100, timed=False))
    (found,) = caught.value.evaluations
    assert not found.stored_weights_equal and NAME in found.weights_unlike_store
    assert found.weight_store == str(store)
    count = len(found.weights_unlike_store)
    assert (
        f"{out}: {count} weights ({found.weights_unlike_store[0]}, ...) are what the manifest "
        f"records, but not what the weight store of the same checkpoint and recipe holds ({store})"
    ) in str(caught.value)
    done = edgeforge("verify", out, "-q", "--tokens", "100", "--no-timed")
    assert done.code == 1 and f"OTHER WEIGHTS  {count} weights unlike the store's" in done.out
    done = edgeforge("verify", out, "-q", "--tokens", "100", "--no-timed", "--json")
    (report,) = json.loads(done.out)
    assert done.code == 1 and report["stored_weights_equal"] is False
    assert NAME in report["weights_unlike_store"]


class OtherRounding:
    """GPTQ with sums of activations that are rounded as another processor might."""

    def __init__(self, usual):
        self._usual = usual

    def quantize_matrix(self, weight, moment, fmt, **options):
        draw = torch.Generator().manual_seed(0)
        noise = 1 + 1e-2 * torch.rand(len(moment), generator=draw, dtype=moment.dtype)
        return self._usual.quantize_matrix(weight, moment * noise * noise[:, None], fmt, **options)


def test_another_processor_explains_calibrated_weights_and_no_others(
    tmp_path, monkeypatch, edgeforge
):
    model = open_model(str(synthesise("tiny-llama", tmp_path / "model")))
    out, text = tmp_path / "out", CalibrationOptions(tokens=480, length=48)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {match: '*', format: int4-g32, algorithm: gptq-order}\n")
    options = ExportOptions(str(recipe), context=64, calibration=text)
    export(model, [find_target("onnx")], out, options)
    assert Manifest.read(out).processor == processor_kind()
    shutil.rmtree(tmp_path / "cache")
    usual = registry.CALIBRATED["gptq-order"]
    monkeypatch.setitem(registry.CALIBRATED, "gptq-order", OtherRounding(usual))
    command = ("verify", out, "-q", "--tokens", "100", "--no-timed")
    # On the processor that exported it, nothing explains other integers.
    done = edgeforge(*command)
    assert done.code == 1 and "OTHER WEIGHTS" in done.out
    manifest = json.loads((out / "edgeforge.json").read_text())
    (out / "edgeforge.json").write_text(json.dumps(manifest | {"processor": "another, AVX2"}))
    done = edgeforge(*command)
    assert done.code == 0, done.err
    assert "AS RECORDED  weights as its manifest records; ran in onnxruntime" in done.out
    assert "another kind of processor exported it" in " ".join(done.out.split())
    report = json.loads((out / "report.json").read_text())
    assert report["other_processor"] is True and report["stored_weights_equal"] is False
    unlike = report["weights_unlike_store"]
    recorded = Manifest.read(out)
    assert unlike and may_differ(recorded, unlike)
    # A weight that is rounded to nearest is the same everywhere.
    (plain,) = [n for n, w in recorded.weights.items() if w.algorithm == "cast" and "1.in" in n]
    assert not may_differ(recorded, [*unlike, plain]) and not may_differ(recorded, [])
    rotation = RotationRecord("hadamard", 1, 0)
    assert may_differ(replace(recorded, rotation=rotation), [plain])


def test_a_damaged_store_does_not_blame_a_good_artifact(tmp_path, edgeforge):
    out = exported(tmp_path)
    before = verify(out, VerifyOptions(tokens=100, timed=False))
    assert before.stored_weights_equal and before.weights_unlike_store == ()
    (file,) = (tmp_path / "cache" / "stores").glob("*/weights.safetensors")
    whole = file.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    file.write_bytes(content)
    done = edgeforge("verify", out, "--tokens", "100", "--no-timed", "--json")
    assert done.code == 0
    assert f"a damaged weight store was removed and is made again: {file.parent} holds" in done.err
    (report,) = json.loads(done.out)
    assert report["quantization"] == json.loads(json.dumps(before.to_json()))["quantization"]
    assert file.read_bytes() == whole


def test_an_export_from_a_damaged_store_is_what_it_would_have_been(tmp_path, edgeforge):
    out = exported(tmp_path)
    (file,) = (tmp_path / "cache" / "stores").glob("*/weights.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    file.write_bytes(content)
    again = tmp_path / "again"
    same = ("--recipe", "int4", "--context", "64")
    done = edgeforge("export", tmp_path / "model", "--out", again, *same)
    assert done.code == 0 and "a damaged weight store was removed" in done.err
    assert (again / "model.onnx.data").read_bytes() == (out / "model.onnx.data").read_bytes()


def test_a_damaged_store_of_a_cache_that_can_only_be_read_is_told(tmp_path, monkeypatch):
    """Where no folder of the cache can be renamed, the store is made in the private one."""
    out = exported(tmp_path)
    (file,) = (tmp_path / "cache" / "stores").glob("*/weights.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 500] = bytes(500)
    file.write_bytes(content)

    def refuse(self, target):
        if self == file.parent:
            raise PermissionError(errno.EROFS, "Read-only file system", str(self))
        return os.rename(self, target)

    monkeypatch.setattr("edgeforge.weight_store.writable_cache", lambda: tmp_path / "private")
    monkeypatch.setattr(type(file), "rename", refuse)
    told = []
    found = verify(
        out,
        VerifyOptions(tokens=100, timed=False),
        lambda stage, done, size: told.append(stage) if "store" in stage else None,
    )
    assert found.stored_weights_equal
    assert found.weight_store == str(tmp_path / "private" / "stores" / file.parent.name)
    (sentence,) = [each for each in told if each.startswith("note: ")]
    assert "a store of a cache that can only be read is not used" in sentence
    assert str(file.parent) in sentence and "Read-only file system" in sentence
    assert file.read_bytes() == content
