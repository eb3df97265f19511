"""The contract of every quantizer: a row alone decides what it becomes."""

import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.formats.packing import dequantize
from quant.plans.algorithms import POSITIVE
from quant.quantizers.input_statistics import InputStatistics, SecondMoment
from quant.quantizers.registry import CALIBRATED, QUANTIZERS, RESCALING

FORMATS = ("int4-g32", "int4-g32-asym", "int4-pc", "int8-pc", "int8-g32", "int8-g64-asym")
FORMATS += ("int2-g16", "int2-g32-asym", "int2-pc", "int3-g32", "int3-pc-asym", "int5-g64-asym")
FORMATS += ("int6-pc", "int7-g32")


def cases(names) -> list[tuple[str, str]]:
    """Every quantizer with every format, but for what is the same computation under another name.

    Zero points leave a sign nothing to do: there, an algorithm whose scales may be below zero makes
    what the one like it makes (`test_rtn_signed` and `test_gptq` show it). The algorithms of one
    class that rescale differ in their factors alone, and take two formats each after the first.
    """
    kept, seen = [], set()
    for name in names:
        formats = [f for f in FORMATS if name not in POSITIVE or parse_format(f).symmetric]
        kind = type(RESCALING.get(name))
        kept += [(name, f) for f in (formats[:2] if kind in seen else formats)]
        seen |= {kind} if name in RESCALING else set()
    return kept


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantizer_bears_the_name_of_its_row(name):
    assert QUANTIZERS[name].name == name


@pytest.mark.parametrize(("name", "format"), cases(QUANTIZERS))
def test_rows_do_not_see_each_other(name, format):
    fmt = parse_format(format)
    weight = torch.randn(21, 128, generator=torch.Generator().manual_seed(1))
    whole = QUANTIZERS[name].quantize_rows(weight, fmt)
    for start, stop in ((0, 1), (1, 8), (8, 21)):
        rows = QUANTIZERS[name].quantize_rows(weight[start:stop], fmt)
        assert torch.equal(rows.codes, whole.codes[start:stop])
        assert torch.equal(rows.scale, whole.scale[start:stop])
        if fmt.symmetric:
            assert rows.zero_point is None and whole.zero_point is None
        else:
            assert torch.equal(rows.zero_point, whole.zero_point[start:stop])


@pytest.mark.parametrize(("name", "format"), cases(QUANTIZERS))
def test_parts_are_laid_out_as_the_format_says_and_the_costs_are_true(name, format):
    fmt = parse_format(format)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    made = QUANTIZERS[name].quantize_rows(weight, fmt)
    for part, layout in fmt.layout(6, 64).items():
        value = getattr(made, part)
        assert tuple(value.shape) == layout.shape
        assert value.dtype == getattr(torch, layout.dtype)
    stored = dequantize(made.codes, made.scale, made.zero_point, fmt).double()
    error = (weight.double() - stored).square().sum()
    assert made.squared_error == pytest.approx(float(error), rel=1e-5)
    assert made.squared_norm == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_is_not_finite_is_named_with_its_row(name, bad):
    weight = torch.ones(4, 64)
    weight[2, 5] = bad
    with pytest.raises(QuantizationError, match=r"w\.weight has .* in row 102"):
        QUANTIZERS[name].quantize_rows(
            weight, parse_format("int4-g32"), name="w.weight", first_row=100
        )


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_calibrated_quantizer_bears_the_name_of_its_row(name):
    assert CALIBRATED[name].name == name and name not in QUANTIZERS
    assert (name in RESCALING) == hasattr(CALIBRATED[name], "column_factors")


@pytest.mark.parametrize(("name", "format"), cases(CALIBRATED))
def test_calibrated_parts_are_laid_out_as_the_format_says_and_the_costs_are_true(name, format):
    fmt = parse_format(format)
    draw = torch.Generator().manual_seed(3)
    weight, x = torch.randn(6, 64, generator=draw), torch.randn(200, 64, generator=draw).double()
    made = CALIBRATED[name].quantize_matrix(weight, x.t() @ x / 200, fmt, threads=1)
    for part, layout in fmt.layout(6, 64).items():
        value = getattr(made, part)
        assert tuple(value.shape) == layout.shape
        assert value.dtype == getattr(torch, layout.dtype)
    assert (made.zero_point is None) == fmt.symmetric
    assert bool((made.scale > 0).all()) or name in POSITIVE
    stored = dequantize(made.codes, made.scale, made.zero_point, fmt).double()
    error = float((weight.double() - stored).square().sum())
    assert made.squared_error == pytest.approx(error, rel=1e-4)
    assert made.squared_norm == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("name", RESCALING)
def test_columns_that_are_tied_take_one_factor(name):
    draw = torch.Generator().manual_seed(4)
    weight, x = torch.randn(6, 64, generator=draw), torch.randn(200, 64, generator=draw)
    x[:, ::7] *= 30
    moment = SecondMoment(64)
    moment.add(x)
    inputs = InputStatistics(moment.mean(), moment.largest())
    ties = torch.arange(16).repeat(4)
    found = RESCALING[name].column_factors(weight, inputs, parse_format("int8-pc"), ties)
    assert found.shape == (64,) and found.dtype == torch.float32
    assert bool((found > 0).all()) and bool(torch.isfinite(found).all())
    assert torch.equal(found, found[:16].repeat(4))


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_weight_too_large_for_its_scale_is_named(name):
    weight = torch.ones(4, 64)
    weight[2, 5] = 1e30
    with pytest.raises(QuantizationError, match=r"w\.weight has values up to .* in row 2"):
        CALIBRATED[name].quantize_matrix(
            weight, torch.eye(64, dtype=torch.float64), parse_format("int4-g32"), name="w.weight"
        )
