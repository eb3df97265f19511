"""The reader of written weights sees every bit of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from exporters.errors import ExportError
from exporters.onnx.reader import stored_digests
from exporters.registry import find_target

DIMS = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}


@pytest.fixture(params=["int4-g32-asym", "int4-pc-asym", "int8-pc-asym", "fp16", "fp32"])
def artifact(request, build, llama_config):
    return build(llama_config(tie_word_embeddings=True, **DIMS), request.param)


def digests(folder: Path) -> dict[str, str]:
    return dict(find_target("onnx").stored_digests(folder))


def differing(folder: Path, wanted: dict[str, str]) -> set[str]:
    found = digests(folder)
    assert found.keys() == wanted.keys()
    return {name for name in wanted if found[name] != wanted[name]}


def test_what_is_read_back_is_what_was_stored(artifact):
    wanted = {name: record.digest for name, record in artifact.manifest.weights.items()}
    assert digests(artifact.folder) == wanted == artifact.store.digests


def test_one_flipped_bit_is_seen_wherever_it_is(artifact, tmp_path):
    wanted = dict(artifact.store.digests)
    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    kinds = set()
    for graph in ("model.onnx", "verify.onnx"):
        whole = (copy / graph).read_bytes()
        for index, tensor in enumerate(
            onnx.load(copy / graph, load_external_data=False).graph.initializer
        ):
            weight, found, suffix = tensor.name.partition(".weight")
            if not found or "shape" in suffix:
                continue
            kinds.add(suffix.partition("_")[0])
            if tensor.external_data:
                place = {entry.key: entry.value for entry in tensor.external_data}
                begin, end = int(place["offset"]), int(place["offset"]) + int(place["length"])
                for at, bit in ((begin, 0), ((begin + end) // 2, 3), (end - 1, 7)):
                    data[at] ^= 1 << bit
                    (copy / "model.onnx.data").write_bytes(data)
                    assert differing(copy, wanted) == {f"{weight}.weight"}
                    data[at] ^= 1 << bit
                (copy / "model.onnx.data").write_bytes(data)
            else:
                for at, bit in ((0, 0), (len(tensor.raw_data) // 2, 3), (-1, 7)):
                    model = onnx.load(copy / graph, load_external_data=False)
                    raw = bytearray(model.graph.initializer[index].raw_data)
                    raw[at] ^= 1 << bit
                    model.graph.initializer[index].raw_data = bytes(raw)
                    (copy / graph).write_bytes(model.SerializeToString())
                    assert differing(copy, wanted) == {f"{weight}.weight"}
                (copy / graph).write_bytes(whole)
    assert differing(copy, wanted) == set()
    if "asym" in artifact.manifest.weights["model.embed_tokens.weight"].format:
        assert kinds >= {".rows", ".blocks", ".scale", ".zero", ""}


def test_a_truncated_data_file_is_told_by_how_much(artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    path = copy / "model.onnx.data"
    # The last bytes of the file belong to a weight or to a table; cut into the weights.
    ends = [
        int(place["offset"]) + int(place["length"])
        for tensor in onnx.load(copy / "model.onnx", load_external_data=False).graph.initializer
        if ".weight" in tensor.name and tensor.external_data
        for place in [{entry.key: entry.value for entry in tensor.external_data}]
    ]
    with path.open("r+b") as stream:
        stream.truncate(max(ends) - 5)
    with pytest.raises(ExportError, match=r"model\.onnx\.data is 5 bytes too short"):
        digests(copy)
    path.unlink()
    with pytest.raises(ExportError, match=r"model\.onnx\.data cannot be read: No such file"):
        digests(copy)


def test_the_data_file_of_another_model_differs(build, llama_config, tmp_path):
    ours = build(llama_config(tie_word_embeddings=True, **DIMS), "int4-g32-asym")
    other = build(llama_config(tie_word_embeddings=True, rms_norm_eps=1e-6, **DIMS), "int4-pc-asym")
    copy = tmp_path / "copy"
    shutil.copytree(ours.folder, copy)
    other_data = (other.folder / "model.onnx.data").read_bytes()
    size = (copy / "model.onnx.data").stat().st_size
    (copy / "model.onnx.data").write_bytes(other_data.ljust(size, b"\0")[:size])
    assert differing(copy, dict(ours.store.digests))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f"])
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    if content:
        with pytest.raises(ExportError, match=r"model\.onnx cannot be read as an ONNX model"):
            stored_digests(path)
    else:
        assert stored_digests(path) == {}  # an empty file is an empty model to protobuf
    with pytest.raises(ExportError, match=r"absent\.onnx cannot be read"):
        stored_digests(tmp_path / "absent.onnx")
