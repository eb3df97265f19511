"""Scales of either sign, against both ranges tried by hand."""

import pytest
import torch

from quant.formats.formats import parse_format
from quant.formats.packing import dequantize, unpack_int4
from quant.quantizers.rtn import RTN
from quant.quantizers.rtn_signed import SignedRoundToNearest

SIGNED = SignedRoundToNearest()


def errors(weight, made, fmt):
    """Errors by group, of which 4 bits in groups count those of large weights more."""
    change = dequantize(made.codes, made.scale, made.zero_point, fmt) - weight
    squares = change.reshape(*made.scale.shape, -1).double().square()
    if fmt.bits == 4 and fmt.group_size is not None:
        groups = weight.reshape(squares.shape).abs()
        squares *= groups + 0.375 * groups.amax(-1, keepdim=True)
    return squares.sum(-1)


@pytest.mark.parametrize(
    "format", ["int4-g32", "int4-g128", "int4-pc", "int8-pc", "int2-g32", "int3-pc"]
)
def test_no_group_is_worse_than_with_positive_scales(format):
    fmt = parse_format(format)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    signed, plain = SIGNED.quantize_rows(weight, fmt), RTN.quantize_rows(weight, fmt)
    better = errors(weight, signed, fmt), errors(weight, plain, fmt)
    assert (better[0] <= better[1] * (1 + 1e-6)).all()
    assert signed.squared_error < plain.squared_error
    negative = (signed.scale < 0).float().mean()
    assert 0.2 < negative < 0.8


def test_the_side_with_the_larger_weights_gets_the_extra_code():
    fmt = parse_format("int4-g32")
    steps = torch.tensor([8.0, -7.0, *range(-6, 8), *range(-6, 8), 0.0, 1.0])
    weight = torch.stack((steps, -steps)) * 0.25
    made = SIGNED.quantize_rows(weight, fmt)
    assert torch.equal(dequantize(made.codes, made.scale, None, fmt), weight)
    assert made.scale.flatten().tolist() == [-0.25, 0.25]
    assert torch.equal(made.codes[0], made.codes[1])
    assert unpack_int4(made.codes, 32)[0, :2].tolist() == [0, 15]
    # Positive scales alone reach no further than 7 steps on that side.
    assert RTN.quantize_rows(weight, fmt).squared_error > 0


@pytest.mark.parametrize("format", ["int4-g32-asym", "int8-g64-asym", "int3-pc-asym"])
def test_zero_points_leave_the_sign_nothing_to_do(format):
    fmt = parse_format(format)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    signed, plain = SIGNED.quantize_rows(weight, fmt), RTN.quantize_rows(weight, fmt)
    assert torch.equal(signed.codes, plain.codes)
    assert torch.equal(signed.scale, plain.scale)
    assert torch.equal(signed.zero_point, plain.zero_point)
    assert (signed.squared_error, signed.squared_norm) == (plain.squared_error, plain.squared_norm)
