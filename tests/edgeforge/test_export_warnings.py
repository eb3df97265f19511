"""What `export` tells a user whose artifact will not do what one expects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgeforge.synth.synthesise import synthesise
from exporters.manifest import Manifest
from quant.kernels import native


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return synthesise("tiny-llama", tmp_path / "checkpoint")


def exported(edgeforge, checkpoint: Path, out: Path, *options: object) -> tuple[list[str], str]:
    """The warnings on stderr, and stdout."""
    done = edgeforge(
        "export", checkpoint, "--out", out, "--recipe", "int4-g32", "--context", 48, *options
    )
    assert done.code == 0, done.err
    return [line for line in done.err.splitlines() if line.startswith("warning: ")], done.out


def test_a_checkpoint_with_all_it_needs_has_no_warning(edgeforge, checkpoint, tmp_path):
    warnings, printed = exported(edgeforge, checkpoint, tmp_path / "out")
    assert warnings == [] and len(printed.splitlines()) == 1
    assert Manifest.read(tmp_path / "out").warnings == ()


def test_no_tokenizer_is_told_once_for_all_targets(edgeforge, checkpoint, tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / file).unlink()
    targets = ("--target", "onnx,coreml,executorch")
    warnings, printed = exported(edgeforge, checkpoint, tmp_path / "out", *targets)
    (warning,) = warnings
    assert warning.startswith("warning: the checkpoint has no tokenizer")
    assert "--tokenizer PATH" in warning and len(printed.splitlines()) == 3
    for name in ("onnx", "coreml", "executorch"):
        assert Manifest.read(tmp_path / "out" / name).warnings == (warning[9:],)
    shown = edgeforge("inspect", tmp_path / "out" / "onnx")
    assert warning in " ".join(shown.out.split())


def test_adapters_in_folders_inside_are_told(edgeforge, checkpoint, tmp_path):
    (checkpoint / "checkpoint-50").mkdir()
    (checkpoint / "checkpoint-50" / "adapter_config.json").write_text("{}")
    (warning,), _ = exported(edgeforge, checkpoint, tmp_path / "out")
    assert "holds adapters in checkpoint-50, which the exported model does not have" in warning


def test_a_tokenizer_that_only_apps_can_read_is_told(edgeforge, checkpoint, tmp_path):
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
    (warning,), _ = exported(edgeforge, checkpoint, tmp_path / "out")
    assert "vocab.json" in warning and "without tokenizer.json" in warning


def test_a_tokenizer_larger_than_the_vocabulary_is_told(edgeforge, checkpoint, tmp_path):
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    extra = {**content["added_tokens"][0], "id": size + 3, "content": "<|extra|>"}
    content["model"]["vocab"]["<|extra|>"] = size + 3
    content["added_tokens"].append(extra)
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    (warning,), _ = exported(edgeforge, checkpoint, tmp_path / "out")
    assert f"tokens up to {size + 3}, but the model has {size}" in warning


def test_a_model_that_names_no_end_is_told(edgeforge, checkpoint, tmp_path):
    for file in ("config.json", "generation_config.json"):
        if (checkpoint / file).exists():
            content = json.loads((checkpoint / file).read_text())
            content.pop("eos_token_id", None)
            (checkpoint / file).write_text(json.dumps(content))
    (warning,), _ = exported(edgeforge, checkpoint, tmp_path / "out")
    assert "names no token that ends a text" in warning


def test_longropes_long_set_is_told_with_the_way_out(edgeforge, tmp_path):
    phi = synthesise("tiny-phi-3-128k", tmp_path / "phi")
    done = edgeforge("export", phi, "--out", tmp_path / "out", "--context", 65)
    assert "the long factors apply at every position" in done.err
    assert "for such texts export with --context 64" in done.err
    short = edgeforge("export", phi, "--out", tmp_path / "short", "--context", 64)
    assert short.code == 0 and "longrope" not in short.err


def test_what_concerns_one_target_names_it(edgeforge, checkpoint, tmp_path):
    (warning,), _ = exported(
        edgeforge,
        checkpoint,
        tmp_path / "out",
        *("--target", "onnx,coreml", "--kv-cache", "int8"),
        *("--calibration-tokens", 480, "--calibration-length", 48),
    )
    assert warning.startswith("warning: coreml: --kv-cache int8 does not apply to coreml")


def test_formats_chosen_on_random_tokens_are_told(edgeforge, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    done = edgeforge(
        *("export", tmp_path / "bare", "--out", tmp_path / "out", "--recipe", "mixed"),
        *("--bits-per-weight", 6, "--context", 48),
    )
    assert done.code == 0, done.err
    assert "warning: the formats were chosen by their errors on random tokens" in done.err


def test_slow_kernels_are_told(edgeforge, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    (warning,), _ = exported(edgeforge, checkpoint, tmp_path / "out")
    assert "without compiled kernels" in warning and "edgeforge doctor" in warning
