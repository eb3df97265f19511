"""The reader of written packages sees every bit of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeforge.export_options import ExportOptions
from edgeforge.model.model import open_model
from edgeforge.pipeline import export
from exporters.coreml import names
from exporters.coreml.blob_file import BlobFile
from exporters.coreml.package import open_package
from exporters.errors import ExportError
from exporters.manifest import Manifest
from exporters.registry import find_target

DIMS = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
SHARED = {
    "onnx": ["int4-g32", "int4-g64-asym", "int4-pc-asym", "int8-g32", "int8-pc", "fp16", "fp32"],
    "executorch": ["int4-g32", "int4-pc", "int8-pc", "fp16", "bf16"],
}


def digests(folder: Path, target: str = "coreml") -> dict[str, str]:
    return dict(find_target(target).stored_digests(folder))


def differing(folder: Path, wanted: dict[str, str]) -> set[str]:
    found = digests(folder)
    assert found.keys() == wanted.keys()
    return {name for name in wanted if found[name] != wanted[name]}


@pytest.mark.parametrize(
    ("target", "format"), [(target, format) for target in SHARED for format in SHARED[target]]
)
def test_the_same_integers_and_scales_are_in_both_files(
    target, format, build, package, llama_config
):
    config = llama_config(tie_word_embeddings=True, **{**DIMS, "hidden_size": 64 * 2})
    config = {**config, "head_dim": 32, "intermediate_size": 192}
    ours, theirs = package(config, format), build(config, format, target=target)
    assert digests(ours.folder) == digests(theirs.folder, target) == ours.store.digests


@pytest.mark.parametrize(
    ("format", "options"),
    [
        *((format, {}) for format in ("int8-g32-asym", "lut4-gc16", "lut3-pt", "lut6-gc8")),
        ("int8-pc", {"opset": "ios17"}),
        ("lut4-pt", {"opset": "ios17"}),
        ("lut4-gc16", {"profile": "ane"}),
    ],
)
def test_formats_of_core_ml_alone(format, options, package, llama_config):
    artifact = package(llama_config(**DIMS), format, **options)
    assert digests(artifact.folder) == artifact.store.digests


@pytest.fixture(params=["int4-g32-asym", "int4-pc", "int8-g32", "lut3-gc8", "fp16", "bf16"])
def artifact(request, package, llama_config):
    return package(llama_config(tie_word_embeddings=True, **DIMS), request.param)


def weight_blobs(folder: Path) -> dict[int, str]:
    """The weight that each blob of the file belongs to, by the offset of its record."""
    found = {}
    package = open_package(folder / names.PACKAGE)
    for operation in package.operations(names.DECODE):
        if not operation.type.startswith("const") or "__weight" not in operation.outputs[0].name:
            continue
        weight = names.weight_name(
            operation.outputs[0].name.removesuffix("__widened").removesuffix("__descale")
        )
        values = [operation.attributes["val"]] if operation.type == "const" else []
        values += [argument.arguments[0].value for argument in operation.inputs.values()]
        found.update({value.blobFileValue.offset: weight for value in values})
    return found


def test_one_flipped_bit_is_seen_wherever_it_is(artifact, tmp_path):
    wanted = dict(artifact.store.digests)
    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    path = copy / names.PACKAGE / names.WEIGHTS_PATH
    data = bytearray(path.read_bytes())
    blobs = weight_blobs(copy)
    assert set(blobs.values()) == set(wanted)
    for offset, weight in blobs.items():
        begin = offset + 64
        end = begin + len(BlobFile(path).read(offset).data)
        for at, bit in ((begin, 0), ((begin + end) // 2, 3), (end - 1, 5)):
            data[at] ^= 1 << bit
            path.write_bytes(data)
            assert differing(copy, wanted) == {weight}
            data[at] ^= 1 << bit
    path.write_bytes(data)
    assert differing(copy, wanted) == set()


def test_a_function_with_another_weight_is_seen(artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    package = open_package(copy / names.PACKAGE)
    offsets = {weight: offset for offset, weight in weight_blobs(copy).items()}
    wrong = offsets["model.layers.0.post_attention_layernorm.weight"]
    for operation in package.block(names.PREFILL).operations:
        if operation.outputs and "layernorm" in operation.outputs[0].name:
            operation.attributes["val"].blobFileValue.offset = wrong
            break
    model = copy / names.PACKAGE / names.MODEL_PATH
    model.write_bytes(package.spec.SerializeToString())
    changed = {name for name, digest in digests(copy).items() if " or " in digest}
    assert changed == {"model.layers.0.input_layernorm.weight"}


def test_small_scales_are_undone_by_their_factors(cache, tmp_path, checkpoint_of, llama_config):
    """Rows so small that their scales are no float16 numbers come back."""
    source = checkpoint_of(llama_config(**DIMS)).checkpoint.path
    shutil.copytree(source, tmp_path / "checkpoint")
    file = tmp_path / "checkpoint/model.safetensors"
    tensors = load_file(file)
    for tensor in tensors.values():
        if tensor.ndim == 2:
            tensor[::3] *= 2.0**-13
            tensor[1] *= 2.0**-70
    save_file(tensors, file)
    model = open_model(str(tmp_path / "checkpoint"))
    out = tmp_path / "out"
    export(model, [find_target("coreml")], out, ExportOptions("int8", 48))
    wanted = {name: record.digest for name, record in Manifest.read(out).weights.items()}
    assert digests(out) == wanted
    path = out / names.PACKAGE / names.WEIGHTS_PATH
    data = bytearray(path.read_bytes())
    factors = [
        operation.attributes["val"].blobFileValue.offset + 64
        for operation in open_package(out / names.PACKAGE).operations(names.DECODE)
        if operation.type == "const" and operation.outputs[0].name.endswith("__descale")
    ]
    assert len(factors) == 7
    for offset in factors:
        powers = np.frombuffer(data, np.float32, 96, offset)
        assert powers[1] == 0.125 and powers[2] == 1.0
        exponent = data[offset + 11]
        data[offset + 11] ^= 1  # the third row's power of two
        path.write_bytes(data)
        assert len({name for name in wanted if digests(out)[name] != wanted[name]}) == 1
        data[offset + 11] = exponent
        data[offset] ^= 1  # no power of two any more
        path.write_bytes(data)
        with pytest.raises(ExportError, match="not one power of two for each of its"):
            digests(out)
        data[offset] ^= 1


@pytest.mark.parametrize("cut", [0, 40, 1000])
def test_a_cut_file_is_told(cut, artifact, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    path = copy / names.PACKAGE / names.WEIGHTS_PATH
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ExportError, match=r"weight\.bin.* (cut|bytes)"):
        digests(copy)
