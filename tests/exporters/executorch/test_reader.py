"""The reader of a .pte sees every bit of every weight, wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from exporters.errors import ExportError
from exporters.executorch import state
from exporters.executorch.reader import read_parts, read_pte
from exporters.registry import find_target

DIMS = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1}
FORMATS = ["int4-g32", "int4-pc", "int8-pc", "fp16", "bf16", "fp32"]


@pytest.fixture(scope="module", params=[(f, t) for f in FORMATS for t in (True, False)], ids=str)
def artifact(request, pte, llama_config):
    format, tied = request.param
    return pte(llama_config(tie_word_embeddings=tied, **DIMS), format)


def digests(folder: Path) -> dict[str, str]:
    return dict(find_target("executorch").stored_digests(folder))


def test_what_is_read_back_is_what_was_stored(artifact):
    wanted = {name: record.digest for name, record in artifact.manifest.weights.items()}
    assert digests(artifact.folder) == wanted == artifact.store.digests


def test_it_is_what_the_onnx_artifact_holds(pte, build, llama_config):
    config = llama_config(tie_word_embeddings=True, **DIMS)
    for format in FORMATS:
        onnx = find_target("onnx").stored_digests(build(config, format).folder)
        assert digests(pte(config, format).folder) == onnx


def test_one_flipped_bit_is_seen_wherever_it_is(artifact, tmp_path):
    wanted = dict(artifact.store.digests)
    copy = tmp_path / "copy"
    shutil.copytree(artifact.folder, copy)
    whole = (copy / "model.pte").read_bytes()
    seen = 0
    for weight, parts in read_parts(read_pte(copy / "model.pte")).items():
        for places in parts.values():
            for place in [part for p in places for part in getattr(p, "groups", (p,))]:
                for at, bit in ((0, 0), (place.nbytes // 2, 3), (place.nbytes - 1, 7)):
                    data = bytearray(whole)
                    data[place.offset + at] ^= 1 << bit
                    (copy / "model.pte").write_bytes(data)
                    found = digests(copy)
                    assert {name for name in wanted if found[name] != wanted[name]} == {weight}
                    seen += 1
    assert seen >= 3 * len(wanted)


@pytest.mark.parametrize("format", ["int4-g32", "int8-pc"])
def test_the_layouts_as_executorch_defines_them(pte, llama_config, monkeypatch, format):
    """Asymmetric codes, unpacked here from the file's bytes by hand and by ExecuTorch's kernel."""
    monkeypatch.setattr(state, "SMALL", 0)
    config = llama_config(tie_word_embeddings=True, rms_norm_eps=2e-5, **DIMS)
    made = pte(config, format)
    data = (made.folder / "model.pte").read_bytes()
    name = "model.embed_tokens.weight"
    codes = made.store.part(name, "codes").numpy()
    bits = 4 if format == "int4-g32" else 8
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)
        assert (codes[:, 0::2] != codes[:, 1::2]).mean() > 0.5  # a swap would show
    values = codes.astype(np.int16) - 2 ** (bits - 1)
    scale = made.store.part(name, "scale").float().numpy()
    places = read_parts(read_pte(made.folder / "model.pte"))[name]

    def raw(part: str, index: int) -> np.ndarray:
        place = places[part][index]
        return np.frombuffer(data[place.offset : place.offset + place.nbytes], np.uint8)

    # The head, as XNNPACK lays it out: low nibble first, or signed bytes.
    head, rows = raw("codes", 0), raw("codes", 1)
    if bits == 4:
        low_first = np.stack((head & 15, head >> 4), -1).reshape(values.shape).astype(np.int16) - 8
        assert (low_first == values).all()
        assert (
            raw("scale", 0).tobytes()
            == made.store.part(name, "scale").view(torch.uint8).numpy().tobytes()
        )
    else:
        assert (head.view(np.int8).reshape(values.shape) == values).all()
        assert (raw("scale", 0).view(np.float32) == scale[:, 0]).all()
    # The embedding, by ExecuTorch's own definition of its kernel.
    import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401

    kernels = torch.ops.quantized_decomposed
    look_up = kernels.embedding_4bit if bits == 4 else kernels.embedding_byte
    table = torch.from_numpy(rows.reshape(len(values), -1).copy())
    half = 2 ** (bits - 1)
    found = look_up.dtype(
        table if bits == 4 else table.view(torch.int8),
        torch.from_numpy(scale),
        None,
        -half,
        half - 1,
        torch.arange(len(values)),
        dtype=torch.float32,
    ).numpy()
    wanted = values.reshape(*scale.shape, -1) * scale[..., None]
    assert (found == wanted.reshape(found.shape)).all()


def test_a_file_cut_short_says_by_how_much(artifact, tmp_path):
    path = tmp_path / "model.pte"
    whole = (artifact.folder / "model.pte").read_bytes()
    path.write_bytes(whole[:-5])
    words = rf"model\.pte was cut short: it has {len(whole) - 5} bytes and not {len(whole)}"
    with pytest.raises(ExportError, match=words):
        read_pte(path)
    for size in (0, 7, 39, 100):
        path.write_bytes(whole[:size])
        with pytest.raises(ExportError, match=r"model\.pte (was cut short|cannot be read)"):
            read_pte(path)
    path.unlink()
    with pytest.raises(ExportError, match=r"model\.pte cannot be read: No such file"):
        read_pte(path)


def test_another_schema_is_named(artifact, tmp_path):
    path = tmp_path / "model.pte"
    whole = (artifact.folder / "model.pte").read_bytes()
    path.write_bytes(whole[:4] + b"ET99" + whole[8:])
    with pytest.raises(ExportError, match=r"no ExecuTorch program of the schema ET12"):
        read_pte(path)
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(ExportError, match=r"no ExecuTorch program of the schema ET12"):
        read_pte(path)


def test_damaged_tables_are_one_sentence(artifact, tmp_path):
    path = tmp_path / "model.pte"
    whole = (artifact.folder / "model.pte").read_bytes()
    draw = np.random.default_rng(0)
    end = int.from_bytes(whole[16:24], "little")
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for at in draw.integers(40, end, 4):
            data[at] = draw.integers(0, 256)
        path.write_bytes(data)
        try:
            read_parts(read_pte(path))
        except ExportError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20
