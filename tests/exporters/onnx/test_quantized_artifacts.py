"""Integer artifacts: what the files hold, and that the graph computes with exactly that."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors import safe_open

from device_harness.onnx_session import OnnxSession

# Odd group counts leave half a byte in packed zero points; 96 and 160 columns have them.
ODD = {"hidden_size": 96, "intermediate_size": 160}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 320}
FORMATS = [
    (WIDE, "int4-g128"),
    (WIDE, "int4-g128-asym"),
    (WIDE, "int4-g64"),
    (WIDE, "int4-g64-asym"),
    (WIDE, "int4-pc"),
    (WIDE, "int4-pc-asym"),
    (WIDE, "int8-g128"),
    (WIDE, "int8-pc"),
    (ODD, "int4-g16-asym"),
    (ODD, "int4-g32"),
    (ODD, "int4-g32-asym"),
    (ODD, "int4-pc"),
    (ODD, "int4-pc-asym"),
    (ODD, "int8-g32"),
    (ODD, "int8-g32-asym"),
    (ODD, "int8-pc"),
    (ODD, "int8-pc-asym"),
    (WIDE, "int2-g64"),
    (WIDE, "int2-g128-asym"),
    (ODD, "int2-g32-asym"),
    (ODD, "int2-g32"),
    (ODD, "int2-pc-asym"),
    ({"hidden_size": 80, "intermediate_size": 48}, "int4-pc-asym"),
    ({"hidden_size": 80, "intermediate_size": 48}, "int8-pc"),
]
ROUNDED_ACTIVATIONS = 0.04


# An untied head and embedding are weights like any other: fewer formats show it.
UNTIED = [case for case in FORMATS if case[1].endswith(("asym", "pc"))]


@pytest.fixture(
    params=[(True, *case) for case in FORMATS] + [(False, *case) for case in UNTIED],
    ids=lambda p: f"{'tied' if p[0] else 'untied'}-{p[1]['hidden_size']}-{p[2]}",
)
def quantized(request, build, llama_config):
    tied, dims, format = request.param
    config = llama_config(tie_word_embeddings=tied, num_hidden_layers=1, **dims)
    return build(config, format)


def with_accuracy_level(source: Path, folder: Path, level: int) -> Path:
    """A copy of an artifact whose matrix products round activations to another type, or none."""
    shutil.copytree(source, folder)
    for name in ("model.onnx", "verify.onnx"):
        model = onnx.load(folder / name, load_external_data=False)
        changed = 0
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    changed += attribute.i == 4
                    attribute.i = level
        assert changed
        onnx.save(model, folder / name)
    return folder


def test_the_graph_computes_with_the_stored_numbers(quantized, tokens, tmp_path):
    exact = with_accuracy_level(quantized.folder, tmp_path / "exact", 1)
    wanted = quantized.quantized_logits(tokens[:40])
    session = OnnxSession(exact, quantized.manifest.context, 1)
    unit = np.ptp(wanted)
    assert np.abs(session.logits(tokens[:40]) - wanted).max() < 1e-4 * unit
    assert np.abs(session.extend(tokens[:39]) - wanted[38]).max() < 1e-4 * unit
    assert np.abs(session.extend(tokens[39:40]) - wanted[39]).max() < 1e-4 * unit
    # Rounding activations to 8 bits changes the logits, and by this much at most.
    session = OnnxSession(quantized.folder, quantized.manifest.context, 1)
    difference = np.abs(session.logits(tokens[:40]) - wanted).max() / unit
    assert 1e-4 < difference < ROUNDED_ACTIVATIONS


@dataclass
class Decoded:
    """Numbers of one weight as a file holds them, one element each."""

    codes: np.ndarray
    scale_bits: np.ndarray
    zero_point: np.ndarray | None


def initializers(folder: Path, graph: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The graph, and its initializers as plain arrays read without this project's reader."""
    model = onnx.load(folder / graph, load_external_data=False)
    data = (folder / "model.onnx.data").read_bytes()
    arrays = {}
    for tensor in model.graph.initializer:
        if tensor.external_data:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"] == "model.onnx.data"
            begin = int(place["offset"])
            raw = data[begin : begin + int(place["length"])]
        else:
            raw = tensor.raw_data
        dtype = {
            onnx.TensorProto.UINT8: "u1",
            onnx.TensorProto.BFLOAT16: "<u2",
            onnx.TensorProto.FLOAT: "<f4",
            onnx.TensorProto.INT64: "<i8",
        }[tensor.data_type]
        arrays[tensor.name] = np.frombuffer(raw, dtype).reshape(tuple(tensor.dims))
    return model, arrays


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """One a byte or several, the lowest first: ``uint8[rows, n] -> uint8[rows, count]``."""
    flat = packed.reshape(len(packed), -1)
    parts = [flat >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(len(flat), -1)[:, :count]


def decode(node: onnx.NodeProto, model: onnx.ModelProto, arrays: dict[str, np.ndarray]) -> Decoded:
    """What MatMulNBits or GatherBlockQuantized reads, per the operators' published layouts."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    makers = {output: made for made in model.graph.node for output in made.output}
    weight, scale, zero = (0, 2, 3) if node.op_type == "GatherBlockQuantized" else (1, 2, 3)
    packed = arrays[node.input[weight]]
    rows, bits = len(packed), attributes["bits"]
    columns = packed.size * 8 // bits // rows
    blocks = columns // attributes["block_size"]
    if node.op_type == "MatMulNBits":
        assert (attributes["N"], attributes["K"]) == (rows, columns)
        assert packed.shape == (rows, blocks, attributes["block_size"] * bits // 8)
    flat = packed.reshape(rows, -1)
    codes = unpacked(flat, bits, columns)
    maker = makers[node.input[scale]]
    if maker.op_type == "Expand":
        assert arrays[maker.input[1]].tolist() == [rows, blocks]
        maker = makers[maker.input[0]]
    assert maker.op_type == "Cast"
    bf16 = np.broadcast_to(arrays[maker.input[0]], (rows, blocks))
    zero_point = None
    if len(node.input) > zero:
        packed = arrays[node.input[zero]]
        zero_point = unpacked(packed, bits, blocks)
        assert zero_point.shape == (rows, blocks)
        assert packed.shape == (rows, -(-blocks * bits // 8))
        if blocks * bits % 8:
            assert not (packed[:, -1] >> blocks * bits % 8).any()
    return Decoded(codes, bf16, zero_point)


def values(decoded: Decoded, bits: int) -> np.ndarray:
    """``(code - zero_point) * scale`` in float64."""
    blocks = decoded.scale_bits.shape[1]
    scale = (decoded.scale_bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    zero = 2 ** (bits - 1) if decoded.zero_point is None else decoded.zero_point[..., None]
    grouped = decoded.codes.reshape(len(decoded.codes), blocks, -1).astype(np.float64)
    return ((grouped - zero) * scale[..., None]).reshape(len(decoded.codes), -1)


@pytest.mark.parametrize("graph", ["model.onnx", "verify.onnx"])
def test_files_hold_the_integers_of_the_store(quantized, graph):
    model, arrays = initializers(quantized.folder, graph)
    bits = int(quantized.manifest.weights["model.embed_tokens.weight"].format[3])
    seen: dict[str, list[Decoded]] = {}
    for node in model.graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            name = node.input[0 if node.op_type == "GatherBlockQuantized" else 1]
            seen.setdefault(name.rpartition(".")[0], []).append(decode(node, model, arrays))
    expected = {n for n, w in quantized.manifest.weights.items() if w.format.startswith("int")}
    assert set(seen) == expected
    tied = quantized.model.spec.tied
    assert len(seen["model.embed_tokens.weight"]) == (2 if tied else 1)
    with safe_open(quantized.store.file, "np") as store:
        stored = set(store.keys())
        for name, uses in seen.items():
            codes = store.get_tensor(f"{name}:codes")
            rows, columns = quantized.manifest.weights[name].shape
            codes = unpacked(codes, bits, columns)
            scale = store.get_tensor(f"{name}:scale").view(np.uint16)
            for used in uses:
                assert (used.codes == codes).all()
                blocks = used.scale_bits.shape[1]
                assert scale.shape in ((rows, 1), (rows, blocks))
                assert (used.scale_bits == scale).all()
                assert (used.zero_point is None) == (f"{name}:zero_point" not in stored)
                if used.zero_point is not None:
                    groups = scale.shape[1]
                    zero = store.get_tensor(f"{name}:zero_point")
                    zero = unpacked(zero, bits, groups)
                    assert (used.zero_point == np.broadcast_to(zero, (rows, blocks))).all()
                # And they stand for the checkpoint's weights, which are not symmetric.
                wanted = quantized.model.weights.float_weight(name).double().numpy()
                error = np.linalg.norm(values(used, bits) - wanted) / np.linalg.norm(wanted)
                assert error == pytest.approx(
                    quantized.manifest.weights[name].relative_error, rel=1e-3
                )
                assert error < {2: 0.75, 4: 0.25, 8: 0.02}[bits]


def test_float_weights_are_the_stores(quantized):
    _, arrays = initializers(quantized.folder, "model.onnx")
    for name, record in quantized.manifest.weights.items():
        if record.format == "fp32":
            wanted = quantized.model.weights.float_weight(name).numpy()
            assert arrays[name].tobytes() == wanted.tobytes()
