"""SmoothQuant against the paper in NumPy, and that it does what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.formats.packing import dequantize
from quant.program import ops
from quant.quantizers.input_statistics import InputStatistics, SecondMoment
from quant.quantizers.registry import RESCALING
from quant.quantizers.rtn import RTN
from quant.quantizers.smoothquant import EXPONENTS, SmoothQuant

INT8 = parse_format("int8-pc")
COLUMNS = 96


def gathered(x: torch.Tensor) -> InputStatistics:
    moment = SecondMoment(x.shape[1])
    for part in x.split(100):
        moment.add(part)
    return InputStatistics(moment.mean(), moment.largest())


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs of which one column is a hundred times the others."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(700, COLUMNS, generator=draw)
    x[:, 17] *= 100
    return 0.05 * torch.randn(48, COLUMNS, generator=draw), x


def output_error(weight: torch.Tensor, x: torch.Tensor, s: torch.Tensor, rounding) -> float:
    """Relative error of the product of rounded inputs with the stored weight."""
    moment = gathered(x / s).moment
    made = SmoothQuant().quantize_matrix(weight * s, moment, INT8)
    stored = dequantize(made.codes, made.scale, made.zero_point, INT8)
    wanted = x.double() @ weight.double().t()
    found = rounding(x / s).double() @ stored.double().t()
    return float((found - wanted).norm() / wanted.norm())


def static(x: torch.Tensor) -> torch.Tensor:
    return ops.round_per_tensor(x, (x.abs().max() / 127).bfloat16().reshape(1, 1))


@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("tied", [False, True])
def test_the_factors_are_the_papers(smoothquant_numpy, layer, alpha, tied):
    weight, x = layer
    ties = torch.arange(COLUMNS // 2).repeat(2) if tied else torch.arange(COLUMNS)
    found = SmoothQuant(exponent=alpha).column_factors(weight, gathered(x), INT8, ties)
    wanted = smoothquant_numpy.factors(weight.numpy(), x.numpy(), alpha, ties.numpy())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)


def test_half_is_the_papers_and_the_registrys():
    assert RESCALING["smoothquant"].exponent == 0.5
    assert RESCALING["smoothquant-search"].exponent is None


@pytest.mark.parametrize("rounding", [ops.round_per_token, static], ids=["token", "tensor"])
def test_an_outlying_column_costs_little_once_it_is_smoothed(smoothquant_numpy, layer, rounding):
    weight, x = layer
    s = SmoothQuant().column_factors(weight, gathered(x), INT8, torch.arange(COLUMNS))
    plain = output_error(weight, x, torch.ones(COLUMNS), rounding)
    smoothed = output_error(weight, x, s, rounding)
    assert smoothed < 0.4 * plain
    # As much as the paper's own arithmetic leaves.
    tokens = x.numpy() / s.numpy()
    rounded = (
        smoothquant_numpy.inputs_by_token(tokens)
        if rounding is ops.round_per_token
        else smoothquant_numpy.inputs_by_tensor(tokens, np.abs(tokens).max())
    )
    product = rounded @ smoothquant_numpy.weights_by_row((weight * s).numpy()).T
    wanted = x.numpy() @ weight.numpy().T
    papers = np.linalg.norm(product - wanted) / np.linalg.norm(wanted)
    assert 0.6 * papers < smoothed < 1.1 * papers  # rows' scales are searched here


def test_the_search_is_near_the_best_exponent(layer):
    weight, x = layer
    inputs, ties = gathered(x), torch.arange(COLUMNS)
    found = SmoothQuant("s", None).column_factors(weight, inputs, INT8, ties)
    errors = {}
    for alpha in EXPONENTS:
        s = SmoothQuant(exponent=alpha).column_factors(weight, inputs, INT8, ties)
        errors[alpha] = output_error(weight, x, s, static)
    assert output_error(weight, x, found, static) < 1.05 * min(errors.values())
    assert min(errors.values()) < 0.9 * errors[0.0]


def test_columns_without_inputs_or_weights_have_finite_factors(layer):
    weight, x = (part.clone() for part in layer)
    weight[:, 3], x[:, 5] = 0, 0
    found = SmoothQuant().column_factors(weight, gathered(x), INT8, torch.arange(COLUMNS))
    assert bool(torch.isfinite(found).all()) and bool((found > 0).all())


def test_integers_are_the_nearest_of_scales_that_suit_the_inputs(layer, monkeypatch):
    weight, x = layer
    s = SmoothQuant().column_factors(weight, gathered(x), INT8, torch.arange(COLUMNS))
    moment, scaled = gathered(x / s).moment, weight * s
    whole = SmoothQuant().quantize_matrix(scaled, moment, INT8)
    monkeypatch.setattr("quant.quantizers.scale_search.CHUNK_WEIGHTS", 7 * COLUMNS)
    made = SmoothQuant().quantize_matrix(scaled, moment, INT8)
    assert torch.equal(made.codes, whole.codes) and torch.equal(made.scale, whole.scale)
    nearest = (scaled / made.scale.float()).round().clamp(-128, 127) + 128
    assert torch.equal(made.codes, nearest.to(torch.uint8))

    def weighted(rows) -> torch.Tensor:
        error = dequantize(rows.codes, rows.scale, None, INT8) - scaled
        return (error.double().square() * moment.diagonal()).sum(1)

    plain = RTN.quantize_rows(scaled, INT8)
    assert bool((weighted(made) <= 1.0001 * weighted(plain)).all())
    assert weighted(made).sum() < 0.9 * weighted(plain).sum()


def test_what_is_not_finite_is_named(layer):
    weight = layer[0].clone()
    weight[40, 7] = float("inf")
    moment = torch.eye(COLUMNS, dtype=torch.float64)
    with pytest.raises(QuantizationError, match=r"w\.weight has an infinite value in row 40"):
        SmoothQuant().quantize_matrix(weight, moment, INT8, name="w.weight")
