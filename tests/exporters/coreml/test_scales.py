"""bfloat16 scales become float16 and come back, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporters.coreml.scales import ScaleBlob, from_half, row_exponents, to_half
from exporters.errors import ExportError
from quant.store.store import Extent


def bits(values) -> np.ndarray:
    return torch.tensor(values, dtype=torch.bfloat16).view(torch.uint16).numpy()


def extent(tmp_path, scales: np.ndarray) -> Extent:
    path = tmp_path / "store"
    path.write_bytes(b"before" + scales.tobytes())
    return Extent(path, 6, scales.nbytes, "BF16", scales.shape)


def test_every_bfloat16_that_a_row_can_hold(tmp_path):
    # Every positive number from 2^-126 to 2^15, a row for each exponent, zeros between.
    sizes = np.arange(1 << 7, (127 + 16) << 7, dtype=np.uint16)
    rows = np.concatenate([sizes.reshape(-1, 128), np.zeros((142, 2), np.uint16)], 1)
    source = extent(tmp_path, rows)
    exponents = row_exponents("w", source)
    half = to_half(rows, exponents)
    held = half.view(np.float16).astype(np.float64)
    values = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).double().numpy()
    assert (held == values * np.exp2(exponents.astype(np.float64))).all()
    assert (held[:, :128] >= 2.0**-14).all(), "no number that a processor may flush to zero"
    assert (exponents[values.min(1, where=values > 0, initial=9) >= 2.0**-14] == 0).all()
    assert (from_half(half, exponents) == rows).all()


def test_a_changed_bit_of_a_scale_shows_through():
    rows = bits([[0.5, 0.25, 3e-6]])
    exponents = np.array([[5]], np.int32)
    half = to_half(rows, exponents)
    for column in range(3):
        for bit in range(16):
            flipped = half.copy()
            flipped[0, column] ^= 1 << bit
            assert (from_half(flipped, exponents) != rows).any()


@pytest.mark.parametrize(
    ("row", "low", "high", "use"),
    [
        ([2.0**-20, 0.5], -20, -1, "fp16"),
        ([2.0**17, 1.0], 0, 17, "fp32"),  # products of codes are beyond float16's range too
        ([2.0**-130, 2.0**-129], -127, -127, "fp16"),
    ],
)
def test_a_row_that_float16_cannot_hold_is_refused_by_number(row, low, high, use, tmp_path):
    scales = bits([[0.1, 0.2], row])
    with pytest.raises(ExportError) as caught:
        row_exponents("model.w", extent(tmp_path, scales))
    assert str(caught.value) == (
        f"row 1 of model.w has scales from 2^{low} to 2^{high}; Core ML's scales are float16, "
        f"which holds 2^-14 to 2^15, and smaller ones only in rows where all scales are small: "
        f"keep it {use}"
    )


def test_a_blob_streams_more_rows_than_a_block_holds(tmp_path):
    scales = np.random.default_rng(0).integers(100 << 7, 140 << 7, (1200, 1000)).astype(np.uint16)
    scales[:, 1:] = scales[:, :1]  # one exponent a row
    source = extent(tmp_path, scales)
    exponents = row_exponents("w", source)
    path = tmp_path / "file"
    with path.open("w+b") as stream:
        ScaleBlob(source, exponents).write(stream.fileno(), 10, lambda extent: -1)
    written = np.frombuffer(path.read_bytes()[10:], np.uint16).reshape(scales.shape)
    assert (written == to_half(scales, exponents)).all()
