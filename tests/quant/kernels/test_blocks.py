"""The compiled block kernels against their twins in PyTorch, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from device_harness.coreml_interpreter.weights import (
    BlockWeight,
    Budget,
    LookupWeight,
    look_up,
    shift_scale,
)
from exporters.coreml.constants import Constant
from quant.kernels import blocks
from quant.kernels.blocks import Blocks

pytestmark = pytest.mark.skipif(
    not blocks.available(), reason="the compiled kernels were not built"
)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    spread = (codes.reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(spread.astype(np.uint8).reshape(-1), bitorder="little")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("half", [False, True])
def test_tables(bits: int, half: bool) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (24, 40)).astype(np.uint8)
    data = codes if bits == 8 else packed(codes, bits)
    tables = torch.from_numpy(rng.normal(size=(3, 1, 1 << bits, 1)).astype(np.float32))
    constant = Constant(f"uint{bits}", codes.shape, data)
    weight = LookupWeight(constant, tables, half, Budget(0))
    wanted = look_up(torch.from_numpy(codes), tables.half().float() if half else tables, 0)
    assert weight.blocks is not None
    assert torch.equal(weight.make(0, 24), wanted)
    assert torch.equal(weight.make(5, 19), wanted[5:19])


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("groups", [(24, 4), (3, 1), (24, 1), (1, 10)])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_scales(dtype: str, groups: tuple[int, int], offset: bool, half: bool) -> None:
    rng = np.random.default_rng(len(dtype) + groups[0])
    bits = 4 if dtype.endswith("4") else 8
    codes = rng.integers(0, 1 << bits, (24, 40)).astype(np.uint8)
    # From float16's subnormal numbers to past its largest.
    scale = torch.from_numpy((10.0 ** rng.uniform(-8, 4, groups)).astype(np.float32))
    offsets = torch.from_numpy(rng.integers(-9, 9, groups).astype(np.float32)) if offset else None
    constant = Constant(
        dtype, codes.shape, packed(codes, 4) if bits == 4 else codes.view(np.dtype(dtype))
    )
    values = torch.from_numpy(constant.codes().astype(np.float32))

    def checked(scale: torch.Tensor) -> tuple[Blocks, torch.Tensor]:
        weight = BlockWeight(constant, scale, offsets, half, Budget(0))
        wanted = shift_scale(values, scale, offsets)
        wanted = wanted.half().float() if half else wanted
        assert weight.blocks is not None
        assert torch.equal(weight.make(0, 24), wanted)
        return weight.blocks, wanted

    made, wanted = checked(scale)
    if half:
        # Numbers past float16's largest are infinite, and products with those say nothing: once
        # more with scales by which the largest integer, 255 + 9, stays finite.
        made, wanted = checked(scale.clamp(max=65504 / 264))
        assert bool(wanted.isfinite().all())
    x = torch.from_numpy(rng.normal(size=(3, 40)).astype(np.float32))
    exact = x.double() @ wanted.double().T
    torch.testing.assert_close(
        made.product(x).double(), exact, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())
    )


def test_what_float16_cannot_hold_is_infinite() -> None:
    constant = Constant("int8", (2, 3), np.array([[1, -1, 100], [-100, 8, 0]], np.int8))
    scale = torch.tensor([[65504.0], [10000.0]])
    weight = BlockWeight(constant, scale, None, True, Budget(0))
    assert weight.blocks is not None
    most, inf = 65504.0, float("inf")
    assert weight.make(0, 2).tolist() == [[most, -most, inf], [-inf, inf, 0.0]]


def test_four_bits_by_bfloat16_scales_need_no_rounding() -> None:
    scale = (torch.rand(64, 4) + 0.001).bfloat16().float()
    codes = torch.arange(-8, 8).float()
    products = codes * scale.reshape(-1, 1)
    assert torch.equal(products.half().float(), products)
    constant = Constant("int4", (64, 128), np.zeros(64 * 64, np.uint8))
    weight = BlockWeight(constant, scale, None, True, Budget(0))
    assert weight.blocks is not None and not weight.blocks.half
