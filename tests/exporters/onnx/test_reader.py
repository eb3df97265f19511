"""The reader of written weights sees every bit of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import pytest

from exporters.errors import ExportError
from exporters.onnx.reader import stored_digests
from exporters.onnx.structure import structure_of
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


def small_model(folder: Path, dims: tuple[int, ...] = (4, 2), **place: str) -> Path:
    """A graph whose only tensor is a weight in an external file of 64 bytes."""
    (folder / "w.data").write_bytes(bytes(range(64)))
    data = {"location": "w.data", "offset": "0", "length": "32", **place}
    tensor = onnx.TensorProto(name="a.weight", dims=dims, data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in data.items():
        if value:
            tensor.external_data.add(key=key, value=value)
    model = onnx.ModelProto()
    model.graph.initializer.append(tensor)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_a_small_model_is_read(tmp_path):
    assert len(stored_digests(small_model(tmp_path))["a.weight"]) == 32
    assert stored_digests(small_model(tmp_path, offset="")) == stored_digests(
        small_model(tmp_path, offset="0")
    )


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"location": "/etc/passwd"}, "outside its folder: only data beside the graph is read"),
        ({"location": "../w.data"}, "outside its folder"),
        ({"location": "a/../../w.data"}, "outside its folder"),
        ({"location": ""}, "outside its folder"),
        ({"location": "none"}, "none cannot be read: No such file"),
        ({"location": "out"}, "out, which links out of its folder"),
        ({"location": "pipe"}, "it is a named pipe"),
        ({"location": "zero"}, "it is a device"),
        ({"offset": "40"}, "w.data is 8 bytes too short"),
        ({"length": str(2**63)}, "w.data is 9223372036854775744 bytes too short"),
        ({"offset": str(2**63)}, "bytes too short"),
        ({"offset": "-1"}, "external data of the offset '-1', which is none"),
        ({"length": "-1"}, "external data of the length '-1', which is none"),
        ({"length": ""}, "external data of the length '', which is none"),
        ({"length": "9" * 5000}, "external data of the length '999"),
        ({"length": "\u0663"}, "which is none"),
        ({"length": "3.5"}, "which is none"),
    ],
)
def test_external_data_that_is_not_there_is_refused(tmp_path, place, words):
    (tmp_path / "w.data").write_bytes(b"outside")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "out").symlink_to("../w.data")
    (folder / "zero").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    model = small_model(folder, **place)
    for read in (stored_digests, lambda path: structure_of([path])):
        with pytest.raises(ExportError) as caught:
            read(model)
        assert words in str(caught.value) and len(str(caught.value)) < 500


def test_a_tensor_that_no_memory_could_hold_is_refused(tmp_path):
    model = small_model(tmp_path, dims=(2**62, 2**62, 2**62))
    with pytest.raises(ExportError, match="which none can have"):
        structure_of([model])


def test_weights_that_name_a_file_again_and_again_are_refused(tmp_path):
    model = onnx.ModelProto.FromString(small_model(tmp_path).read_bytes())
    (tmp_path / "w.data").write_bytes(bytes(1 << 20))
    (first,) = model.graph.initializer
    for number in range(100):
        copy = model.graph.initializer.add()
        copy.CopyFrom(first)
        copy.name = f"{number}.weight"
        copy.external_data[2].value = str(1 << 20)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="names 104857632 bytes of weights, but its files have"):
        stored_digests(tmp_path / "model.onnx")


@pytest.mark.parametrize("suffix", [".zero_4x0", ".zero_4x999999999", ".zero_8x3"])
def test_repeated_zero_points_that_do_not_fit_differ(tmp_path, suffix):
    """The bytes are taken as they are, so that their digest is another one."""
    model = onnx.ModelProto.FromString(small_model(tmp_path).read_bytes())
    model.graph.initializer[0].name += suffix
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert len(stored_digests(tmp_path / "model.onnx")["a.weight"]) == 32


def test_a_snapshot_of_the_hubs_cache_is_read(tmp_path):
    """There, every file is a link to a blob beside the snapshots."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    wanted = stored_digests(small_model(snapshot))
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    (snapshot / "w.data").rename(blobs / "abc")
    (snapshot / "w.data").symlink_to("../../blobs/abc")
    assert stored_digests(snapshot / "model.onnx") == wanted
