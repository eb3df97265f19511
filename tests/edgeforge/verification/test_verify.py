"""What verify needs of an artifact beside its files."""

import json

import pytest

from edgeforge.errors import CheckpointError, UsageError
from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.verify import VerifyOptions, reopen, verify
from exporters.manifest import Manifest
from exporters.registry import find_target


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))


def exported(tmp_path, **fields):
    checkpoint = synthesise("tiny-llama", tmp_path / "model")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | fields))
    model = open_model(str(checkpoint), ignore_config=fields)
    out = tmp_path / "out"
    export(model, [find_target("onnx")], out, ExportOptions(context=64))
    return out


def test_a_field_vouched_for_at_export_is_vouched_for_at_verify(tmp_path):
    out = exported(tmp_path, some_new_field=3)
    assert Manifest.read(out).model["ignored_config"] == ["some_new_field"]
    evaluation = verify(out, VerifyOptions(tokens=100, timed=False))
    assert evaluation.lowering.kl_mean < 1e-2


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
