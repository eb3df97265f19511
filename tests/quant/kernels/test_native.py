"""The compiled kernels against the torch implementation, bit for bit."""

import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.formats.packing import dequantize
from quant.kernels import native
from quant.quantizers.rtn import RTN

needs_kernels = pytest.mark.skipif(
    not native.available(),
    reason="quant.kernels._kernels was not built: no C compiler at installation",
)
NAMES = [
    f"int{bits}-{groups}{zero}"
    for bits in (4, 8)
    for groups in ("g20", "g32", "g64", "g128", "pc")
    for zero in ("", "-asym")
]
NAMES += [f"int{b}-{g}{z}" for b in (2, 3) for g in ("g24", "g128", "row") for z in ("", "-asym")]
NAMES += ["int5-g32", "int6-g128-asym", "int7-row", "int6-g20", "int2-g20-asym"]
SHAPES = {
    "g24": (5, 72),
    "row": (3, 136),
    "g20": (3, 100),
    "g32": (1, 32),
    "g64": (5, 320),
    "g128": (3, 4096),
    "pc": (3, 626),
}


def awkward(shape, seed):
    """Rows of several laws and sizes, with zeros, repeats and a far outlier among them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.03
    weight[0] = weight[0].abs() + 0.01
    if shape[0] > 1:
        weight[1] = torch.round(weight[1] * 100) / 64
    if shape[0] > 2:
        weight[2, ::7] = 0.0
        weight[2, 5] = 4.0
    return weight


def assert_same(one, other):
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale.view(torch.int16), other.scale.view(torch.int16))
    assert (one.zero_point is None) == (other.zero_point is None)
    if one.zero_point is not None:
        assert torch.equal(one.zero_point, other.zero_point)
    assert one.squared_error == other.squared_error
    assert one.squared_norm == other.squared_norm


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_native_equals_torch_on_every_instruction_set(name, dtype, restore_instruction_set):
    fmt = parse_format(name.replace("row", "pc"))
    weight = awkward(SHAPES[name.split("-")[1]], seed=len(name)).to(dtype)
    expected = RTN.quantize_rows(weight, fmt, backend="torch")
    for level in (0, 1, 2):
        native.limit_instruction_set(level)
        assert_same(RTN.quantize_rows(weight, fmt, backend="native"), expected)
        values = native.dequantize(expected.codes, expected.scale, expected.zero_point, fmt)
        meant = dequantize(expected.codes, expected.scale, expected.zero_point, fmt)
        assert torch.equal(values, meant)


@needs_kernels
@pytest.mark.parametrize("cols", [33, 47, 1023])
def test_int8_rows_of_odd_length(cols):
    weight = awkward((3, cols), seed=cols)
    for name in ("int8-pc", "int8-pc-asym"):
        fmt = parse_format(name)
        expected = RTN.quantize_rows(weight, fmt, backend="torch")
        assert_same(RTN.quantize_rows(weight, fmt, backend="native"), expected)


@needs_kernels
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e-3, 1e4])
@pytest.mark.parametrize(
    "name", ["int4-g32", "int4-g32-asym", "int8-pc", "int4-pc", "int2-g32", "int3-g32-asym"]
)
def test_native_equals_torch_at_the_ends_of_the_scales(name, size):
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)) * size
    fmt = parse_format(name)
    expected = RTN.quantize_rows(weight, fmt, backend="torch")
    assert_same(RTN.quantize_rows(weight, fmt, backend="native"), expected)


@needs_kernels
def test_every_float16_number_is_read_exactly():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[torch.isfinite(halves)].reshape(-1, 2)
    fmt = parse_format("int8-pc")
    from_half = RTN.quantize_rows(halves, fmt, backend="native")
    assert_same(from_half, RTN.quantize_rows(halves.float(), fmt, backend="native"))


@needs_kernels
def test_dequantize_writes_where_it_is_told():
    fmt = parse_format("int4-g32")
    rows = RTN.quantize_rows(awkward((2, 64), seed=1), fmt)
    out = torch.zeros(4, 64)
    native.dequantize(rows.codes, rows.scale, None, fmt, out=out[1:3])
    assert torch.equal(out[1:3], dequantize(rows.codes, rows.scale, None, fmt))
    assert not out[[0, 3]].any()


@needs_kernels
def test_dequantize_refuses_parts_that_do_not_fit():
    fmt = parse_format("int4-g32")
    rows = RTN.quantize_rows(torch.ones(2, 64), fmt)
    with pytest.raises(QuantizationError, match="scale"):
        native.dequantize(rows.codes, rows.scale[:1], None, fmt)
    with pytest.raises(QuantizationError, match="zero_point is missing"):
        native.dequantize(rows.codes, rows.scale, None, parse_format("int4-g32-asym"))
    with pytest.raises(QuantizationError, match="out is"):
        native.dequantize(rows.codes, rows.scale, None, fmt, out=torch.zeros(1, 64))


def test_without_the_kernels_torch_takes_over(monkeypatch):
    fmt, weight = parse_format("int4-g32"), awkward((3, 64), seed=9)
    expected = RTN.quantize_rows(weight, fmt)
    monkeypatch.setattr(native, "available", lambda: False)
    assert_same(RTN.quantize_rows(weight, fmt), expected)
    with pytest.raises(QuantizationError, match="were not built"):
        RTN.quantize_rows(weight, fmt, backend="native")
