"""Plain round to nearest: its scales are the extremes', and the default search is never worse."""

import numpy as np
import pytest
import torch

from quant.formats.formats import parse_format
from quant.formats.packing import dequantize, unpack_codes
from quant.quantizers.registry import QUANTIZERS
from quant.quantizers.rtn_minmax import MinMaxRoundToNearest

PLAIN = MinMaxRoundToNearest()
FORMATS = ["int4-g32", "int4-g128", "int4-pc", "int4-g32-asym", "int4-pc-asym", "int8-pc"]
FORMATS += ["int8-g32-asym", "int2-g32", "int2-pc-asym", "int3-g64", "int3-g64-asym", "int6-g32"]
LAWS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "heavy": lambda rng, shape: rng.standard_t(2, shape),
    "uniform": lambda rng, shape: rng.uniform(-1, 1, shape),
    "leaning": lambda rng, shape: rng.gamma(2.0, 1.0, shape) - 1.7,
    "positive": lambda rng, shape: rng.uniform(0.5, 1.5, shape),
    "few values": lambda rng, shape: rng.integers(-3, 4, shape) / 8,
    "outliers": lambda rng, shape: (
        rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 12, 1)
    ),
}


def drawn(law: str, rows: int, cols: int) -> torch.Tensor:
    return torch.from_numpy(LAWS[law](np.random.default_rng(3), (rows, cols)) * 0.05).bfloat16()


def row_errors(weight, made, fmt):
    """Errors by row, of which 4 bits in groups count those of large weights more, as `rtn` does."""
    stored = dequantize(made.codes, made.scale, made.zero_point, fmt).double()
    squares = (stored - weight.double()).square()
    if fmt.bits == 4 and fmt.group_size is not None:
        groups = weight.double().abs().reshape(*made.scale.shape, -1)
        importance = groups + 0.375 * groups.amax(-1, keepdim=True)
        squares *= importance.reshape(squares.shape)
    return squares.sum(1)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("format", FORMATS)
def test_the_numbers_are_those_of_the_formula(format, law):
    fmt, weight = parse_format(format), drawn(law, 5, 256)
    made = PLAIN.quantize_rows(weight, fmt)
    groups = weight.float().numpy().reshape(5, fmt.groups(256), -1)
    top, half = 2**fmt.bits - 1, 2 ** (fmt.bits - 1)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    plain = np.abs(groups).max(-1) / (half - 1) if fmt.symmetric else (high - low) / top
    scale = torch.from_numpy(plain).bfloat16()
    assert torch.equal(made.scale, scale)
    wide = scale.float().numpy()
    zero = np.full_like(wide, half) if fmt.symmetric else np.clip(np.rint(-low / wide), 0, top)
    codes = np.clip(np.rint(groups / wide[..., None]) + zero[..., None], 0, top)
    assert np.array_equal(unpack_codes(made.codes, fmt, 256).numpy(), codes.reshape(5, -1))
    if not fmt.symmetric:
        assert np.array_equal(unpack_codes(made.zero_point, fmt, zero.shape[1]).numpy(), zero)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(
    ("name", "format"),
    # With zero points rtn-signed is rtn: `test_rtn_signed` shows it.
    [("rtn", f) for f in FORMATS] + [("rtn-signed", f) for f in FORMATS if "asym" not in f],
)
def test_a_search_is_never_worse_on_any_row(name, format, law):
    fmt, weight = parse_format(format), drawn(law, 24, 256)
    plain = row_errors(weight, PLAIN.quantize_rows(weight, fmt), fmt)
    searched = row_errors(weight, QUANTIZERS[name].quantize_rows(weight, fmt), fmt)
    assert bool((searched <= plain * (1 + 1e-5)).all())
    assert searched.sum() < plain.sum() or law in ("few values", "uniform")


@pytest.mark.parametrize("format", ["int4-g32", "int8-pc-asym", "int2-pc"])
def test_scales_stay_within_what_every_runtime_holds(format):
    fmt = parse_format(format)
    sizes = torch.tensor([[0.0], [1e-30], [1e-6], [65000.0]])
    scale = PLAIN.quantize_rows(sizes * torch.ones(4, 64), fmt).scale
    assert bool((scale >= 2.0**-17).all()) and bool((scale <= 65280).all())
