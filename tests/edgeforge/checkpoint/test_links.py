"""Links in a checkpoint: dangling ones are named, and nothing outside is copied."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.checkpoint.links import leads_out, repository_of
from edgeforge.checkpoint.model_card import provenance
from edgeforge.errors import CheckpointError
from edgeforge.synth.synthesise import synthesise


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return synthesise("tiny-llama", tmp_path_factory.mktemp("synth") / "whole", shards=2)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def link(path: Path, target: str | Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "model.safetensors",
    ],
)
@pytest.mark.parametrize("target", ["/gone/away", "../blobs/0123", "loop"])
def test_a_dangling_link_is_named_with_its_target(folder, name, target):
    target = name if target == "loop" else target
    link(folder / name, target)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    words = str(caught.value)
    assert words.startswith(f"{folder / name} is a link to {target}, which is not there")
    assert "cp -L" in words and caught.value.exit_code == 3


def test_a_checkpoint_or_tokenizer_that_is_a_dangling_link_is_named(folder, tmp_path):
    link(tmp_path / "link", "gone")
    with pytest.raises(CheckpointError, match=r"link is a link to gone, which is not there"):
        Checkpoint.open(tmp_path / "link")
    with pytest.raises(CheckpointError, match=r"link is a link to gone, which is not there"):
        Checkpoint.open(folder, tokenizer=tmp_path / "link")


def test_weights_that_are_not_asked_for_may_dangle(folder):
    link(folder / "pytorch_model.bin", "/gone/away")
    assert Checkpoint.open(folder).tensors


def test_a_file_that_leads_out_is_neither_used_nor_copied_and_that_is_said(folder, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"model_type": "llama"}))
    link(folder / "chat_template.jinja", secret)
    link(folder / "generation_config.json", "../secret")
    opened = Checkpoint.open(folder)
    assert "chat_template.jinja" not in opened.tokenizer_files
    assert set(opened.sidecars) == {"config.json"}
    assert len(opened.warnings) == 2
    for name, note in zip(("generation_config", "chat_template"), opened.warnings, strict=True):
        assert name in note and str(secret) in note and "not copied" in note


def test_a_tokenizer_of_another_folder_may_not_lead_out_of_that(folder, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    shutil.copy(folder / "tokenizer.json", other)
    link(other / "chat_template.jinja", "/etc/hostname")
    opened = Checkpoint.open(folder, tokenizer=other)
    assert set(opened.tokenizer_files) == {"tokenizer.json"}
    assert len(opened.warnings) == 1 and "chat_template.jinja" in opened.warnings[0]
    # A file that the user names is what the user wants, wherever it lies.
    link(tmp_path / "tokenizer.json", folder / "tokenizer.json")
    opened = Checkpoint.open(folder, tokenizer=tmp_path / "tokenizer.json")
    assert set(opened.tokenizer_files) == {"tokenizer.json"} and opened.warnings == ()


def test_a_model_card_that_leads_out_is_not_read(folder, tmp_path):
    (tmp_path / "secret").write_text("---\nlicense: hunter2\n---\n")
    shutil.copy(tmp_path / "secret", folder / "README.md")
    assert provenance(Checkpoint.open(folder)).licence == "hunter2"
    link(folder / "README.md", "../secret")
    assert provenance(Checkpoint.open(folder)).licence == ""


def test_links_within_a_checkpoint_and_to_a_checkpoint_lead_nowhere_else(folder, tmp_path):
    shutil.move(folder / "tokenizer.json", folder / "moved.json")
    link(folder / "tokenizer.json", "moved.json")
    link(tmp_path / "link", folder)
    for path in (folder, tmp_path / "link"):
        opened = Checkpoint.open(path)
        assert "tokenizer.json" in opened.tokenizer_files and opened.warnings == ()


def hub_snapshot(folder: Path, cache: Path) -> Path:
    """Moves a checkpoint into the layout of the hub's cache."""
    repository = cache / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, repository / "blobs" / f"{number:064}")
        os.symlink(f"../../blobs/{number:064}", snapshot / path.name)
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_whole(folder, tmp_path):
    snapshot = hub_snapshot(folder, tmp_path / "hub")
    opened = Checkpoint.open(snapshot)
    assert opened.warnings == ()
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(opened.tokenizer_files)
    assert set(opened.sidecars) == {"config.json", "generation_config.json"}
    assert repository_of(snapshot) == tmp_path / "hub" / "models--a--b"


def test_a_snapshot_that_leads_to_another_repositorys_blobs_leads_out(folder, tmp_path):
    snapshot = hub_snapshot(folder, tmp_path / "hub")
    other = tmp_path / "hub" / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (other / "1").touch()
    link(snapshot / "chat_template.jinja", other / "1")
    assert leads_out(snapshot / "chat_template.jinja", snapshot) == other / "1"
    assert "chat_template.jinja" not in Checkpoint.open(snapshot).tokenizer_files
