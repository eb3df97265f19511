"""Checkpoints by hub id, from a cache folder laid out as the hub's, with no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("EDGEFORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub"


def put(hub: Path, name: str, files: dict[str, bytes], commit: str = COMMIT) -> Path:
    """Store files as the hub's cache does: blobs, links to them from a snapshot, and a ref."""
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for number, (file, content) in enumerate(files.items()):
        (repository / "blobs" / f"blob{number}").write_bytes(content)
        (snapshot / file).symlink_to(f"../../blobs/blob{number}")
    return snapshot


def saved(tmp_path: Path, name: str) -> bytes:
    save_file({name: torch.ones(2)}, tmp_path / "x")
    return (tmp_path / "x").read_bytes()


def refused(source: str, words: str, **options) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(source, **options)
    assert "\n" not in str(caught.value)


def test_a_cached_checkpoint_opens_offline(hub, tmp_path):
    files = {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": saved(tmp_path, "a"),
        "tokenizer.json": b"{}",
    }
    snapshot = put(hub, "org/name", files)
    with Checkpoint.open("org/name") as checkpoint:
        assert (checkpoint.source, checkpoint.revision) == ("org/name", COMMIT)
        assert checkpoint.path == snapshot
        assert checkpoint.read("a").tolist() == [1, 1]
        assert list(checkpoint.tokenizer_files) == ["tokenizer.json"]
        assert checkpoint.digest().files[1].name == "model.safetensors"
    assert Checkpoint.open("org/name", revision=COMMIT).revision == COMMIT
    refused("org/name", "at revision v2 is not in the cache .*HF_HUB_OFFLINE", revision="v2")


def test_the_tokenizer_may_be_another_repository(hub, tmp_path):
    put(hub, "org/name", {"config.json": b"{}", "model.safetensors": saved(tmp_path, "a")})
    snapshot = put(hub, "org/words", {"tokenizer.json": b"{}"})
    checkpoint = Checkpoint.open("org/name", tokenizer="org/words")
    assert checkpoint.tokenizer_files == {"tokenizer.json": snapshot / "tokenizer.json"}
    refused("org/name", "org/name at revision main .* lacks tokenizer.json", tokenizer="org/name")


def test_what_is_not_cached_is_named_with_the_cure(hub):
    refused(
        "org/name",
        "org/name at revision main is not in the cache .* HF_HUB_OFFLINE is set: none of its files "
        "is here; unset HF_HUB_OFFLINE and try again, or run 'hf download org/name'",
    )


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("config.json", "lacks config.json:"),
        (SHARDS[1], f"lacks {SHARDS[1]}:"),
        ("model.safetensors.index.json", "lacks model.safetensors.index.json:"),
    ],
)
def test_a_partial_snapshot_names_the_missing_files(hub, tmp_path, missing, words):
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        SHARDS[0]: saved(tmp_path, "a"),
        SHARDS[1]: saved(tmp_path, "b"),
    }
    snapshot = put(hub, "org/name", files)
    assert Checkpoint.open("org/name").tensors.keys() == {"a", "b"}
    blob = (snapshot / missing).resolve()
    blob.unlink()  # The link stays, as after an interrupted download.
    refused("org/name", f"org/name at revision main in .* {words} .*unset HF_HUB_OFFLINE")


@pytest.mark.skipif(
    not hasattr(errors, "IncompleteSnapshotError"),
    reason="this huggingface_hub keeps no listing to compare with",
)
def test_a_snapshot_known_to_be_incomplete_names_the_files(hub, tmp_path):
    """huggingface_hub remembers a repository's listing and compares."""
    snapshot = put(hub, "org/name", {"config.json": b"{}", "model.safetensors": b""})

    def incomplete(*args, **options):
        raise errors.IncompleteSnapshotError(
            "The cached snapshot is incomplete: 1 file(s) are missing (generation_config.json). "
            "The Hub could not be reached (X).",
            snapshot_path=str(snapshot),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", incomplete)
        refused("org/name", "lacks generation_config.json: ")


def test_a_snapshot_without_any_weights_says_which_would_do(hub):
    put(hub, "org/name", {"config.json": b"{}"})
    refused("org/name", r"lacks model.safetensors \(or .*, or pytorch_model.bin\)")


def test_torch_files_are_used_only_without_safetensors(hub, tmp_path):
    torch.save({"b": torch.zeros(3)}, tmp_path / "t")
    files = {"config.json": b"{}", "pytorch_model.bin": (tmp_path / "t").read_bytes()}
    put(hub, "org/old", files)
    assert Checkpoint.open("org/old").read("b").tolist() == [0, 0, 0]
    put(hub, "org/both", {**files, "model.safetensors": saved(tmp_path, "a")})
    assert list(Checkpoint.open("org/both").tensors) == ["a"]


def test_only_what_is_needed_is_asked_for(hub, tmp_path, monkeypatch):
    asked = []
    put(hub, "org/name", {"config.json": b"{}", "model.safetensors": saved(tmp_path, "a")})
    real = huggingface_hub.snapshot_download

    def note(*args, allow_patterns, **options):
        asked.extend(allow_patterns)
        return real(*args, allow_patterns=allow_patterns, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", note)
    Checkpoint.open("org/name")
    assert {"config.json", "model.safetensors", "model-*.safetensors"} < set(asked)
    assert not [p for p in asked if p.endswith((".bin", ".py")) or p.startswith("*")]


class Answer:
    """What the hub's errors want of an HTTP response."""

    headers: dict[str, str] = {}  # noqa: RUF012
    status_code = 404
    request = None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("x\ny", response=Answer()), "org/name is gated: accept its terms"),
        (errors.RevisionNotFoundError("x", response=Answer()), "org/name has no revision v1"),
        (errors.RepositoryNotFoundError("x", response=Answer()), "nor a repository on the hub"),
        (errors.HFValidationError("x"), "nor a hub id"),
        (errors.HfHubHTTPError("a\nb", response=Answer()), r"HfHubHTTPError: a b\): unset"),
        (ConnectionError("no\nroute"), r"ConnectionError: no route\)"),
    ],
)
def test_every_answer_of_the_hub_becomes_one_sentence(hub, monkeypatch, error, words):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused("org/name", words, revision="v1")


def test_an_unreachable_hub_is_told_apart_from_offline_mode(tmp_path):
    environment = {
        **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    script = "from edgeforge.checkpoint.checkpoint import Checkpoint; Checkpoint.open('org/name')"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "org/name at revision main is not in the cache" in last
    assert "the hub cannot be reached" in last
    assert "check the connection" in last


@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_of_a_repository_is_named(hub, tmp_path, weights):
    files = {"adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "org/base"}'}
    if weights:
        files |= {"config.json": b"{}", "model.safetensors": saved(tmp_path, "a")}
    put(hub, "org/name", files)
    what = "not merged into the weights" if weights else "not the model that it belongs to"
    refused("org/name", f"org/name holds adapter_config.json, an adapter.*{what}.*merge_and_unload")


def test_a_repository_of_another_format_is_named(hub, monkeypatch):
    put(hub, "org/name", {"tokenizer.json": b"{}"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: str(
        hub / "models--org--name" / "snapshots" / COMMIT))  # fmt: skip
    held = ["README.md", "model-Q4_K_M.gguf"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *a, **o: held)
    refused("org/name", "org/name at revision main is no such checkpoint: it has model-Q4_K_M.gguf")
    held.append("model.safetensors")  # it has what was not downloaded
    refused("org/name", "lacks config.json, model.safetensors")
