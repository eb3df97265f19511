"""Small Core ML packages, written byte by byte from the format's description."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from exporters.coreml.blob_file import BLOB_TYPES
from exporters.coreml.function import FileValue, FunctionBuilder, Value
from exporters.coreml.schema import ARRAY_TYPES, messages

REFERENCE = "@model_path/weights/weight.bin"
ROWS, COLUMNS = 6, 8
CODES = (np.arange(ROWS * COLUMNS).reshape(ROWS, COLUMNS) * 5 % 16).astype(np.uint8)  # of int4
SCALES = np.array([[0.5, 0.25]] * ROWS, np.float16) * np.arange(1, ROWS + 1)[:, None]
BIAS = np.arange(ROWS).astype(np.float16)


def blob_file(*blobs: tuple[str, bytes, int]) -> tuple[bytes, list[int]]:
    """A weight file of blobs (dtype, bytes, padding bits), and the offset of each."""
    data, offsets = bytearray(struct.pack("<II56x", len(blobs), 2)), []
    for dtype, content, padding in blobs:
        data += bytes(-len(data) % 64)
        offsets.append(len(data))
        record = (0xDEADBEEF, BLOB_TYPES[dtype], len(content), len(data) + 64, padding)
        data += struct.pack("<IIQQQ32x", *record) + content
    return bytes(data), offsets


def write_package(folder: Path, builders: list[FunctionBuilder], weights: bytes = b"") -> Path:
    """A package of functions; the first is the default one."""
    model = messages()["Model"](specificationVersion=9)
    model.mlProgram.version = 1
    for builder in builders:
        model.mlProgram.functions[builder.name].CopyFrom(builder.message())
        described = model.description.functions.add(name=builder.name)
        for value in builder.inputs:
            feature = described.input.add(name=value.name)
            feature.type.multiArrayType.shape.extend(value.shape)
            feature.type.multiArrayType.dataType = ARRAY_TYPES[value.dtype]
    model.description.defaultFunctionName = builders[0].name
    inner = folder / "Data" / "com.apple.CoreML"
    (inner / "weights").mkdir(parents=True)
    (inner / "model.mlmodel").write_bytes(model.SerializeToString(deterministic=True))
    (inner / "weights" / "weight.bin").write_bytes(weights)
    contents = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {"a": {"path": "com.apple.CoreML/model.mlmodel"}},
        "rootModelIdentifier": "a",
    }
    (folder / "Manifest.json").write_text(json.dumps(contents))
    return folder


def quantized_linear(folder: Path) -> Path:
    """``x fp16[2, 8]`` by int4 weights in blocks of four columns, plus a bias: ``y fp16[2, 6]``."""
    packed = (CODES[:, 0::2] | CODES[:, 1::2] << 4).tobytes()
    weights, (codes, scales, bias) = blob_file(
        ("int4", packed, 0),
        ("fp16", SCALES.astype(np.float16).tobytes(), 0),
        ("fp16", BIAS.tobytes(), 0),
    )
    builder = FunctionBuilder("main", "CoreML8")
    x = builder.input("x", "fp16", (2, COLUMNS))
    parts = {
        "data": FileValue("int4", (ROWS, COLUMNS), codes),
        "scale": FileValue("fp16", (ROWS, 2), scales),
    }
    kind = "constexpr_blockwise_shift_scale"
    weight = builder.constexpr(kind, "weight", "fp16", (ROWS, COLUMNS), parts)
    added = builder.stored("bias", FileValue("fp16", (ROWS,), bias))
    builder.output(builder.call("linear", "y", "fp16", (2, ROWS), x=x, weight=weight, bias=added))
    return write_package(folder, [builder], weights)


def quantized_weight() -> np.ndarray:
    """What the weight of `quantized_linear` stands for: float32 ``[6, 8]``."""
    signed = np.where(CODES > 7, CODES.astype(np.int32) - 16, CODES)
    return (signed * np.repeat(SCALES.astype(np.float16), 4, 1)).astype(np.float32)


def of_function(
    folder: Path, build: Callable[[FunctionBuilder], Value | list[Value]], name: str = "main"
) -> Path:
    """A package of one function without weights."""
    builder = FunctionBuilder(name, "CoreML8")
    made = build(builder)
    for value in made if isinstance(made, list) else [made]:
        builder.output(value)
    return write_package(folder, [builder])
