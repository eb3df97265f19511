"""AWQ against the paper's search in NumPy, and what its search of scales must not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.formats.packing import dequantize
from quant.quantizers import awq
from quant.quantizers.awq import EXPONENTS, Awq
from quant.quantizers.input_statistics import InputStatistics, SecondMoment
from quant.quantizers.rtn import RTN


def layer(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs of which few columns are large, and their moment."""
    draw = torch.Generator().manual_seed(5)
    sizes = torch.exp(1.5 * torch.randn(cols, generator=draw))
    x = torch.randn(4 * cols, cols, generator=draw) * sizes
    moment = SecondMoment(cols)
    moment.add(x)
    return torch.randn(rows, cols, generator=draw) * 0.05, x, moment.mean()


def output_error(weight, made, fmt, x) -> float:
    stored = dequantize(made.codes, made.scale, made.zero_point, fmt)
    return float(((weight - stored).double() @ x.double().t()).square().sum())


@pytest.mark.parametrize("tied", [False, True])
def test_the_factors_are_the_papers(awq_numpy, gptq_numpy, tied):
    fmt = parse_format("int4-g32")
    weight, x, moment = layer(8, 64)
    ties = torch.arange(32).repeat(2) if tied else torch.arange(64)
    found = Awq().column_factors(weight, InputStatistics(moment, torch.ones(64)), fmt, ties)
    wanted, error = awq_numpy.column_factors(
        weight.numpy(),
        x.numpy(),
        ties.numpy(),
        bits=4,
        group=32,
        exponents=EXPONENTS,
        best_grid=gptq_numpy.best_grid,
    )
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)
    assert found.max() > 2 * found.min()  # and there is something to find
    made = RTN.quantize_rows(weight * found, fmt)
    stored = dequantize(made.codes, made.scale, made.zero_point, fmt) / found
    ours = float(((stored - weight).double() @ x.double().t()).square().sum())
    assert ours == pytest.approx(error, rel=0.01)
    assert ours < 0.9 * output_error(weight, RTN.quantize_rows(weight, fmt), fmt, x)
    if tied:
        assert torch.equal(found[:32], found[32:])


def test_a_sample_of_rows_stands_for_a_wide_matrix(monkeypatch):
    fmt = parse_format("int4-g32")
    weight, _, moment = layer(512, 64)
    whole = Awq().column_factors(
        weight, InputStatistics(moment, torch.ones(64)), fmt, torch.arange(64)
    )
    monkeypatch.setattr(awq, "SEARCH_PRODUCTS", 0)
    sample = Awq().column_factors(
        weight, InputStatistics(moment, torch.ones(64)), fmt, torch.arange(64)
    )
    assert (sample / whole).log().abs().max() < 0.3


@pytest.mark.parametrize(
    "format", ["int4-g32", "int4-g32-asym", "int4-pc", "int8-g32", "int2-g32", "int3-g32-asym"]
)
def test_scales_by_output_error_beat_those_by_plain_error(format):
    fmt = parse_format(format)
    draw = torch.Generator().manual_seed(6)
    x = torch.randn(400, 128, generator=draw) * torch.exp(torch.randn(128, generator=draw))
    moment = SecondMoment(128)
    moment.add(x)
    weight = torch.randn(32, 128, generator=draw)
    made = Awq().quantize_matrix(weight, moment.mean(), fmt)
    plain = RTN.quantize_rows(weight, fmt)
    assert output_error(weight, made, fmt, x) < 0.97 * output_error(weight, plain, fmt, x)


def test_what_is_not_finite_is_named():
    weight = torch.ones(4, 64)
    weight[2, 40] = float("nan")
    moment = torch.eye(64, dtype=torch.float64)
    with pytest.raises(QuantizationError, match=r"w\.weight has NaN in row 2"):
        Awq().quantize_matrix(weight, moment, parse_format("int4-g32"), name="w.weight")
    with pytest.raises(QuantizationError, match="its second moment is"):
        Awq().quantize_matrix(torch.ones(4, 32), moment, parse_format("int4-g32"))
