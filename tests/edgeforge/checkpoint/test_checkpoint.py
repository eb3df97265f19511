"""Opening a checkpoint folder, reading rows of it, and every way it can be unfit."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edgeforge.checkpoint.checkpoint import Checkpoint, TensorEntry
from edgeforge.errors import CheckpointError, EdgeForgeError, UsageError


def as_read(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


def weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return {
        "model.embed.weight": torch.randn(37, 8, generator=random).bfloat16(),
        "model.norm.weight": torch.randn(8, generator=random),
        "model.layers.0.w": torch.randn(5, 3, 4, generator=random).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "steps": torch.arange(3),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "módel with spaces"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    save_file(weights(), path / "model.safetensors")
    return path


@pytest.fixture
def sharded(folder) -> Path:
    (folder / "model.safetensors").unlink()
    items = list(weights().items())
    parts = {
        "model-00001-of-00002.safetensors": dict(items[:2]),
        "model-00002-of-00002.safetensors": dict(items[2:]),
    }
    for name, part in parts.items():
        save_file(part, folder / name)
    weight_map = {tensor: file for file, part in parts.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder


def refused(source, words: str, **options) -> str:
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 3
    return message


@pytest.mark.parametrize("layout", ["folder", "sharded"])
def test_every_weight_reads_as_it_was_saved(request, layout):
    path = request.getfixturevalue(layout)
    (path / "tokenizer.json").write_text("{}")
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    with Checkpoint.open(path) as checkpoint:
        assert checkpoint.config == {"model_type": "llama", "hidden_size": 8}
        assert checkpoint.generation_config == {"eos_token_id": 2}
        assert (checkpoint.source, checkpoint.revision) == (str(path), None)
        assert checkpoint.tokenizer_files == {"tokenizer.json": path / "tokenizer.json"}
        assert checkpoint.tensors.keys() == weights().keys()
        assert [f.parent for f in checkpoint.files] == [path] * len(checkpoint.files)
        for name, tensor in weights().items():
            assert isinstance(checkpoint.tensors[name], TensorEntry)
            assert checkpoint.tensors[name].shape == tuple(tensor.shape)
            if name == "steps":
                continue
            array = checkpoint.read(name)
            np.testing.assert_array_equal(array, as_read(tensor), strict=True)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_are_those_of_the_whole_tensor(folder, data):
    name = data.draw(st.sampled_from([n for n, t in weights().items() if t.dim() and n != "steps"]))
    whole = as_read(weights()[name])
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    with Checkpoint.open(folder) as checkpoint:
        expected = whole[start:stop]
        np.testing.assert_array_equal(
            checkpoint.read_rows(name, start, stop), expected, strict=True
        )
        out = np.empty_like(expected)
        given_back = checkpoint.read_rows(name, start, stop, out)
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(given_back, expected, strict=True)
        raw = memoryview(bytearray(expected.nbytes))
        checkpoint.read_rows(name, start, stop, raw)
        assert raw.tobytes() == expected.tobytes()


def test_rows_outside_the_tensor_and_unfit_buffers_are_refused(folder):
    name = "model.embed.weight"
    with Checkpoint.open(folder) as checkpoint:
        for start, stop in [(-1, 3), (3, 2), (0, 38)]:
            with pytest.raises(IndexError, match=r"\(37, 8\)"):
                checkpoint.read_rows(name, start, stop)
        with pytest.raises(IndexError):
            checkpoint.read_rows("scalar", 0, 1)
        for out in (
            np.empty((1, 8), np.uint16),
            np.empty((8, 2), np.uint16).T,
            memoryview(bytes(32)),
        ):
            with pytest.raises(ValueError, match="32 bytes"):
                checkpoint.read_rows(name, 0, 2, out)


def test_reads_from_many_threads_agree_with_the_file(sharded):
    expected = as_read(weights()["model.embed.weight"])
    opened_before = len(os.listdir("/proc/self/fd"))
    with Checkpoint.open(sharded) as checkpoint, concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = pool.map(
            lambda i: checkpoint.read_rows("model.embed.weight", i, i + 1), [*range(37)] * 20
        )
        np.testing.assert_array_equal(np.concatenate(list(rows)[:37]), expected)
        assert len(os.listdir("/proc/self/fd")) < opened_before + 100
        checkpoint.close()
        np.testing.assert_array_equal(checkpoint.read("model.embed.weight"), expected)


def test_a_read_holds_only_what_was_asked_for(tmp_path):
    """The peak memory of a process that reads rows of a 256 MiB file stays far below it."""
    (tmp_path / "config.json").write_text("{}")
    header = json.dumps(
        {"w": {"dtype": "BF16", "shape": [65536, 2048], "data_offsets": [0, 1 << 28]}}
    ).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (1 << 28))
    script = """
import resource, sys
import numpy as np
from edgeforge.checkpoint.checkpoint import Checkpoint
out = np.empty((1024, 2048), np.uint16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with Checkpoint.open(sys.argv[1]) as checkpoint:
    for start in range(0, 65536, 1024):
        checkpoint.read_rows("w", start, start + 1024, out)
assert "torch" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 16 << 10  # KiB


def test_a_file_cut_short_after_opening_is_noticed(folder):
    with Checkpoint.open(folder) as checkpoint:
        entry = checkpoint.tensors["model.embed.weight"]
        os.truncate(folder / "model.safetensors", entry.offset + 100)
        with pytest.raises(CheckpointError, match=r"ends 492 bytes before.*cut short after"):
            checkpoint.read("model.embed.weight")
        assert checkpoint.read_rows("model.embed.weight", 0, 2).shape == (2, 8)


def test_a_file_removed_after_opening_is_named(folder):
    checkpoint = Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read from .*No such file"):
        checkpoint.read("scalar")


def test_a_tensor_that_is_no_weight_or_not_there_is_refused(folder):
    with Checkpoint.open(folder) as checkpoint:
        with pytest.raises(CheckpointError, match=r"steps in .* is int64; weights are read from"):
            checkpoint.read("steps")
        with pytest.raises(
            CheckpointError, match=r"no tensor model\.norm.*nearest is model\.norm\.w"
        ):
            checkpoint.read("model.norm.weigth")


def test_a_missing_config_or_weights_are_named(folder):
    (folder / "config.json").rename(folder / "x.json")
    assert str(folder / "config.json") in refused(folder, "is missing")
    (folder / "model.safetensors").rename(folder / "other.gguf")
    refused(folder, "is not a checkpoint: it has no config.json")
    (folder / "x.json").rename(folder / "config.json")
    refused(folder, "has no weights: .* it has other.gguf")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object but a list"),
        (b"3", "not a JSON object but a int"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b" " * ((16 << 20) + 1), "at most 16777216 bytes of such a file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_a_config_that_is_not_a_json_object_is_refused(folder, name, content, words):
    (folder / name).write_bytes(content)
    assert str(folder / name) in refused(folder, words)


def test_a_config_that_is_a_folder_is_refused(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refused(folder, "config.json is not a file")


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "model-00002-of-00002.safetensors is missing, though the index lists it")


def test_a_truncated_shard_says_how_many_bytes_are_missing(sharded):
    shard = sharded / "model-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 123)
    assert str(shard) in refused(sharded, "is 123 bytes short .*cut short")


def test_a_shard_that_is_a_git_lfs_pointer_is_named(sharded):
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert str(shard) in refused(sharded, "Git LFS pointer")


def edit_index(folder: Path, edit) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    edit(content["weight_map"])
    path.write_text(json.dumps(content))


def test_a_tensor_absent_from_its_shard_is_named(sharded):
    edit_index(sharded, lambda m: m.update(ghost="model-00001-of-00002.safetensors"))
    refused(sharded, "00001-of-00002.safetensors does not hold tensor 'ghost'")


def test_a_tensor_that_the_index_leaves_out_is_left_out(sharded):
    edit_index(sharded, lambda m: m.pop("scalar"))
    assert Checkpoint.open(sharded).tensors.keys() == weights().keys() - {"scalar"}


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "", ".", "c:x", 3, None]
)
def test_an_index_that_leaves_the_folder_is_refused(sharded, name):
    edit_index(sharded, lambda m: m.update(scalar=name))
    refused(sharded, "only files inside|is missing, though")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_a_map_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    refused(sharded, "no weight_map")


def test_an_index_with_a_tensor_twice_is_refused(sharded):
    (sharded / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "x.safetensors"}}'
    )
    refused(sharded, "'a' occurs twice")


def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(folder, tmp_path):
    refused(folder / "model.safetensors", "is a file; name the folder")
    refused(tmp_path / "nowhere", "neither a folder here nor a hub id")
    refused("nowhere", "neither a folder here nor a hub id")
    refused("", "neither a folder here nor a hub id")
    refused("a\0b", "not a usable path|neither a folder")
    refused("x" * 5000, "not a usable path|neither a folder")


def test_a_revision_of_a_folder_is_a_usage_error(folder):
    with pytest.raises(UsageError, match="no revision: leave out --revision main") as caught:
        Checkpoint.open(folder, revision="main")
    assert (caught.value.exit_code, isinstance(caught.value, EdgeForgeError)) == (2, True)


def test_the_tokenizer_may_come_from_elsewhere(folder, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    refused(folder, "has no tokenizer", tokenizer=other)
    refused(folder, "neither a folder nor a file here nor a hub id", tokenizer="nowhere")
    refused(folder, "is not a tokenizer file", tokenizer=folder / "config.json")
    (other / "tokenizer.json").write_text("{}")
    (other / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.model").write_text("x")
    names = {"tokenizer.json": other / "tokenizer.json"}
    names["tokenizer_config.json"] = other / "tokenizer_config.json"
    assert Checkpoint.open(folder, tokenizer=other).tokenizer_files == names
    assert Checkpoint.open(folder, tokenizer=other / "tokenizer.json").tokenizer_files == names
    (other / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(folder, "tokenizer.json is a Git LFS pointer", tokenizer=other)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(folder):
    (folder / "model.safetensors").chmod(0)
    refused(folder, "model.safetensors cannot be read: Permission denied")


def test_a_whole_file_wins_over_an_index_and_over_torch(sharded):
    torch.save({"b": torch.zeros(1)}, sharded / "pytorch_model.bin")
    assert "scalar" in Checkpoint.open(sharded).tensors
    save_file({"a": torch.zeros(1)}, sharded / "model.safetensors")
    assert list(Checkpoint.open(sharded).tensors) == ["a"]


def test_importing_and_opening_loads_no_heavy_package(folder):
    script = (
        "import sys; from edgeforge.checkpoint.checkpoint import Checkpoint\n"
        "import edgeforge.output_folder\n"
        "heavy = {'torch', 'numpy', 'onnx', 'huggingface_hub'}\n"
        "Checkpoint.open(sys.argv[1]); print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_fifo_does_not_hang(folder):
    shutil.move(folder / "model.safetensors", folder / "kept")
    os.mkfifo(folder / "model.safetensors")
    refused(folder, "it is a named pipe, and EdgeForge reads regular files only")
