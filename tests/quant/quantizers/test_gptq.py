"""GPTQ against the paper's algorithm in NumPy, and what must hold of it whatever the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.formats.packing import dequantize, unpack_codes
from quant.quantizers import gptq
from quant.quantizers.gptq import Gptq
from quant.quantizers.input_statistics import SecondMoment
from quant.quantizers.rtn import RTN


def layer(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs with correlated columns of very different size, and their moment."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(cols, cols, generator=draw) / cols**0.5 + torch.eye(cols)
    sizes = torch.exp(torch.randn(cols, generator=draw))
    x = torch.randn(4 * cols, cols, generator=draw) @ mixed * sizes
    moment = SecondMoment(cols)
    moment.add(x)
    return torch.randn(rows, cols, generator=draw) * 0.05, x, moment.mean()


def output_error(weight, made, fmt, x):
    stored = dequantize(made.codes, made.scale, made.zero_point, fmt)
    return float(((weight - stored).double() @ x.double().t()).square().sum())


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(
    "format",
    [
        *("int4-g32", "int4-g16", "int4-pc", "int4-g32-asym", "int8-pc", "int8-g32"),
        *("int2-g32", "int2-g16-asym", "int2-pc", "int3-g32-asym", "int3-g24", "int6-pc-asym"),
    ],
)
def test_the_integers_are_the_papers(gptq_numpy, format, order):
    fmt = parse_format(format)
    rows, cols = 12, 96
    weight, x, moment = layer(rows, cols)
    made = Gptq("gptq", order).quantize_matrix(weight, moment.clone(), fmt)
    codes, scales, zeros, values = gptq_numpy.gptq(
        weight.numpy(),
        moment.numpy(),
        bits=fmt.bits,
        group=fmt.columns_per_group(cols),
        symmetric=fmt.symmetric,
        damping=0.01,
        activation_order=order,
    )
    found = unpack_codes(made.codes, fmt, cols).numpy()
    # A tie that float32 breaks otherwise than float64 would move the rest of its row.
    same = (found == codes).all(1) & (made.scale.float().numpy() == scales).all(1)
    assert same.mean() >= 0.9
    if made.zero_point is not None:
        points = unpack_codes(made.zero_point, fmt, fmt.groups(cols)).numpy()
        assert (points[same] == zeros[same]).all()
    error = np.square((weight.numpy() - values) @ x.numpy().T).sum()
    assert output_error(weight, made, fmt, x) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("format", ["int2-g32", "int4-g32"])
def test_scales_of_either_sign_are_the_papers_on_that_grid(gptq_numpy, format):
    fmt = parse_format(format)
    weight, x, moment = layer(12, 96, seed=7)
    made = Gptq("gptq-signed", True, signed=True).quantize_matrix(weight, moment.clone(), fmt)
    codes, scales, _, values = gptq_numpy.gptq(
        weight.numpy(),
        moment.numpy(),
        bits=fmt.bits,
        group=32,
        symmetric=True,
        damping=0.01,
        activation_order=True,
        signed=True,
    )
    found = unpack_codes(made.codes, fmt, 96).numpy()
    same = (found == codes).all(1) & (made.scale.float().numpy() == scales).all(1)
    assert same.mean() >= 0.9
    assert 0.1 < (made.scale < 0).float().mean() < 0.9
    error = np.square((weight.numpy() - values) @ x.numpy().T).sum()
    assert output_error(weight, made, fmt, x) == pytest.approx(error, rel=0.01)
    plain = Gptq("gptq-order", True).quantize_matrix(weight, moment, fmt)
    assert error < output_error(weight, plain, fmt, x)


@pytest.mark.parametrize("format", ["int4-g32-asym", "int8-g64-asym", "int3-pc-asym"])
def test_zero_points_leave_the_sign_nothing_to_do(format):
    fmt = parse_format(format)
    weight, _, moment = layer(12, 128, seed=8)
    signed = Gptq("gptq-signed", True, signed=True).quantize_matrix(weight, moment.clone(), fmt)
    plain = Gptq("gptq-order", True).quantize_matrix(weight, moment, fmt)
    assert torch.equal(signed.codes, plain.codes)
    assert torch.equal(signed.scale, plain.scale)
    assert torch.equal(signed.zero_point, plain.zero_point)


@pytest.mark.parametrize("order", [False, True])
def test_the_output_error_is_far_below_that_of_rounding(order):
    fmt = parse_format("int4-g32")
    weight, x, moment = layer(64, 128, seed=1)
    made = Gptq("gptq", order).quantize_matrix(weight, moment, fmt)
    plain = RTN.quantize_rows(weight, fmt)
    assert output_error(weight, made, fmt, x) < 0.7 * output_error(weight, plain, fmt, x)


def test_blocks_and_chunks_of_rows_change_nothing(monkeypatch):
    fmt = parse_format("int4-g32")
    weight, _, moment = layer(40, 192, seed=2)
    whole = Gptq().quantize_matrix(weight, moment.clone(), fmt)
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(gptq, "BLOCK_COLUMNS", 32)
    cut = Gptq().quantize_matrix(weight, moment.clone(), fmt, threads=3)
    differ = (whole.codes != cut.codes).any(1).float().mean()
    assert differ <= 0.1  # sums in another order may break a tie otherwise
    again = Gptq().quantize_matrix(weight, moment.clone(), fmt, threads=1)
    assert torch.equal(cut.codes, again.codes) and torch.equal(cut.scale, again.scale)


def test_inputs_that_do_not_correlate_leave_plain_rounding():
    fmt = parse_format("int4-g32")
    weight, _, _ = layer(16, 64)
    made = Gptq().quantize_matrix(weight, torch.eye(64, dtype=torch.float64), fmt)
    plain = RTN.quantize_rows(weight, fmt)
    assert torch.equal(made.codes, plain.codes) and torch.equal(made.scale, plain.scale)


@pytest.mark.parametrize("kind", ["one direction", "nothing", "dead columns"])
def test_a_singular_moment_still_gives_a_sound_weight(kind):
    fmt = parse_format("int4-g32")
    weight, _, moment = layer(8, 64)
    if kind == "one direction":
        one = torch.randn(64, 1, generator=torch.Generator().manual_seed(3)).double()
        moment = one @ one.t()
    elif kind == "nothing":
        moment = torch.zeros_like(moment)
    else:
        moment[:, ::3] = 0.0
        moment[::3] = 0.0
    made = Gptq().quantize_matrix(weight, moment, fmt)
    assert made.squared_error < 0.2 * made.squared_norm


def test_what_is_not_finite_is_named():
    moment = torch.eye(64, dtype=torch.float64)
    weight = torch.ones(4, 64)
    weight[2, 40] = float("nan")
    with pytest.raises(QuantizationError, match=r"w\.weight has NaN in row 2"):
        Gptq().quantize_matrix(weight, moment.clone(), parse_format("int4-g32"), name="w.weight")
    moment[3, 3] = float("inf")
    with pytest.raises(QuantizationError, match=r"w\.weight: the second moment .* not finite"):
        Gptq().quantize_matrix(torch.ones(4, 64), moment, parse_format("int4-g32"), name="w.weight")


def test_a_moment_of_another_width_is_refused():
    with pytest.raises(QuantizationError, match="64 input columns; its second moment is"):
        Gptq().quantize_matrix(
            torch.ones(4, 64), torch.eye(32, dtype=torch.float64), parse_format("int4-g32")
        )
