"""What a report's figures depend on, as verify takes it down."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict

import pytest

from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.freshness import Freshness, freshness_of
from exporters.manifest import Manifest
from exporters.manifest_records import ModelRecord, SourceRecord


@pytest.fixture
def folder(tmp_path):
    """A manifest and a tokenizer, which is all that freshness looks at."""
    checkpoint = synthesise("tiny-llama", tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    Manifest(
        target="onnx",
        entry="model.onnx",
        recipe="int4",
        context=64,
        source=SourceRecord("m", "/m", None, "c" * 64, {}),
        model=ModelRecord.from_json({"vocab_size": 8}),
        bits_per_weight=4.5,
        weights={},
        inputs={},
        outputs={},
        states={},
        notes=(),
        tools={},
    ).write(out)
    return out


def made(folder, **changes) -> Freshness:
    given = {"text": None, "tokens": None, "bounds": {}, "options": {}} | changes
    return freshness_of(folder, Manifest.read(folder), **given)


def test_it_reads_back_and_has_not_changed(folder):
    found = made(folder)
    assert Freshness.from_json(asdict(found)) == found
    assert found.changes(made(folder), 8192) == []
    assert found.tools.keys() >= {"torch", "numpy", "onnxruntime"}
    assert "executorch" not in found.tools


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bounds": {"lowering.kl_mean": 9.0}}, "it was held against other bounds"),
        ({"options": {"precision": "fp32"}}, "the runtime has other options"),
        ({"tokens": 100}, "it is of default tokens, not 100"),
        ({"tokens": "all"}, "it is of default tokens, not all"),
    ],
)
def test_what_was_asked_counts(folder, changes, reason):
    assert made(folder).changes(made(folder, **changes), 8192) == [reason]


def test_as_many_tokens_as_there_were_are_the_same_tokens(folder):
    assert made(folder).changes(made(folder, tokens=8192), 8192) == []


def test_an_option_left_at_its_default_is_none(folder):
    assert made(folder, options={"precision": None}) == made(folder)


def test_the_text_is_the_heldout_one_or_random_tokens(folder, tmp_path):
    before = made(folder)
    (tmp_path / "text").write_text("other words")
    assert made(folder, text=tmp_path / "text").text != before.text
    (folder / "tokenizer.json").unlink()
    assert made(folder).text == ""


def test_what_a_fresh_check_imports_does_not_import_torch():
    script = (
        "import sys, edgeforge.gate.gate, edgeforge.gate.baseline, edgeforge.gate.outputs.lines; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
