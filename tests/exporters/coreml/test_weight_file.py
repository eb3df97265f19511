"""The weight file is, byte for byte, what coremltools' own writer makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from exporters.blobs import Blob
from exporters.coreml.blob_file import BITS
from exporters.coreml.weight_file import WeightFile
from quant.formats.packing import pack_bits

# What the exporter writes, and every other type that coremltools' writer knows.
SUB_BYTE = ("int4", "uint1", "uint2", "uint3", "uint4", "uint6")
WHOLE = {
    "fp16": np.uint16,  # as bits
    "fp32": np.float32,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "uint32": np.uint32,
}
COUNTS = (1, 2, 3, 7, 8, 63, 64, 65, 130)


def values(dtype: str, count: int):
    draw = np.random.default_rng(count)
    if dtype in SUB_BYTE:
        bits = BITS[dtype]
        codes = draw.integers(0, 1 << bits, count, dtype=np.uint8)
        return codes, (codes ^ 8).astype(np.int8) - 8 if dtype == "int4" else codes
    bits = draw.integers(0, 256, count * BITS[dtype] // 8, dtype=np.uint8)
    return bits, bits.view(WHOLE[dtype])


def packed(dtype: str, codes) -> bytes:
    """Elements of less than a byte, packed by the definition: bit by bit."""
    if dtype not in SUB_BYTE:
        return codes.tobytes()
    bits = BITS[dtype]
    stream = codes[:, None] >> np.arange(bits, dtype=np.uint8) & 1
    return np.packbits(stream.ravel().astype(np.uint8), bitorder="little").tobytes()


@pytest.fixture
def apple_writer(coremltools):
    from coremltools.libmilstoragepython import _BlobStorageWriter

    return _BlobStorageWriter


@pytest.mark.parametrize("dtype", [*SUB_BYTE, *WHOLE])
def test_a_file_of_blobs_of_one_type(dtype, apple_writer, tmp_path):
    check([(dtype, count) for count in COUNTS], apple_writer, tmp_path)


def test_a_file_of_all_types(apple_writer, tmp_path):
    check([(dtype, 67) for dtype in (*SUB_BYTE, *WHOLE)], apple_writer, tmp_path)


def check(blobs, apple_writer, folder: Path) -> None:
    theirs, ours, offsets = apple_writer(str(folder / "theirs")), WeightFile(), []
    for index, (dtype, count) in enumerate(blobs):
        codes, elements = values(dtype, count)
        kind = {"fp32": "float"}.get(dtype, dtype)
        offsets.append(getattr(theirs, f"write_{kind}_data")(elements))
        blob = Blob(packed(dtype, codes))
        assert ours.place(index, dtype, count, blob) == offsets[-1]
        assert ours.place(index, dtype, count, blob) == offsets[-1], "placed once"
    del theirs  # it writes its last bytes when it goes
    ours.write(folder / "ours")
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    assert (folder / "ours").stat().st_size == ours.nbytes


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_the_stores_streams_of_bits_are_core_mls(bits):
    import torch

    codes = np.random.default_rng(bits).integers(0, 1 << bits, 64, dtype=np.uint8)
    stored = pack_bits(torch.from_numpy(codes), bits).numpy().tobytes()
    assert stored == packed(f"uint{bits}", codes)
