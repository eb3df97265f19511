"""Coordinate descent lowers the output error, and stops where NumPy finds no better code."""

import numpy as np
import pytest
import torch

from quant.formats.formats import parse_format
from quant.formats.packing import dequantize, unpack_codes
from quant.quantizers import gptq
from quant.quantizers.error_feedback import error_feedback
from quant.quantizers.gptq import Gptq

FORMATS = ["int4-g32", "int4-g32-asym", "int2-g16", "int4-g64", "int4-pc"]


def layer(rows, cols, seed=0):
    """Weights, inputs with correlated columns of unequal size, and their second moment."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=draw)
    x = torch.randn(4 * cols, cols, generator=draw) @ torch.randn(cols, cols, generator=draw)
    x *= torch.rand(cols, generator=draw).pow(3) + 0.01
    return weight, x, x.double().t() @ x.double() / len(x)


def damped_error(weight, made, fmt, moment):
    """``e^T H e`` over the damped moment, summed over rows, in float64."""
    wide = moment.clone()
    wide.diagonal().add_(0.01 * moment.diagonal().mean())
    error = (dequantize(made.codes, made.scale, made.zero_point, fmt) - weight).double()
    return float(((error @ wide) * error).sum())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_each_sweep_lowers_the_output_error(format, signed):
    fmt = parse_format(format)
    weight, _, moment = layer(24, 192)
    errors = [
        damped_error(
            weight,
            Gptq("", True, signed=signed, sweeps=sweeps).quantize_matrix(
                weight, moment.clone(), fmt
            ),
            fmt,
            moment,
        )
        for sweeps in (0, 1, 3)
    ]
    assert errors[1] < 0.97 * errors[0]
    assert errors[2] < errors[1]


def test_at_the_end_no_code_alone_can_be_better():
    fmt = parse_format("int4-g32")
    weight, _, moment = layer(8, 64, seed=1)
    made = Gptq("", True, sweeps=60).quantize_matrix(weight, moment.clone(), fmt)
    wide = moment.numpy() + np.eye(64) * 0.01 * float(moment.diagonal().mean())
    stored = dequantize(made.codes, made.scale, None, fmt).double().numpy()
    error, scale = weight.double().numpy() - stored, made.scale.double().numpy().repeat(32, 1)
    codes = unpack_codes(made.codes, fmt, 64).numpy()
    gradient, own = error @ wide, np.diag(wide)
    for step, room in ((1, codes < 15), (-1, codes > 0)):
        change = step * scale  # what is added to the stored value
        gain = change**2 * own - 2 * change * gradient
        assert gain[room].min() > -1e-4 * np.abs(gradient).max()


def test_chunks_of_rows_change_nothing_and_8_bits_stay(monkeypatch):
    fmt = parse_format("int4-g32")
    weight, _, moment = layer(40, 96, seed=2)
    descent = Gptq("", True, sweeps=2)
    whole = descent.quantize_matrix(weight, moment.clone(), fmt)
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 7)
    cut = descent.quantize_matrix(weight, moment.clone(), fmt, threads=3)
    assert (whole.codes != cut.codes).any(1).float().mean() <= 0.1
    wide = parse_format("int8-g32")
    plain = Gptq("", True).quantize_matrix(weight, moment.clone(), wide)
    assert torch.equal(descent.quantize_matrix(weight, moment, wide).codes, plain.codes)


def test_palettes_keep_their_tables_and_their_errors_are_those_stored():
    fmt = parse_format("lut4-gc16")
    weight, _, moment = layer(32, 96, seed=3)
    plain = Gptq("", True).palettize_matrix(weight, moment.clone(), fmt)
    made = Gptq("", True, sweeps=2).palettize_matrix(weight, moment.clone(), fmt)
    assert torch.equal(made.lut, plain.lut)
    assert not torch.equal(made.codes, plain.codes)


def test_the_reported_error_is_that_of_the_stored_values():
    fmt = parse_format("int4-g32")
    weight, _, moment = layer(24, 96, seed=4)
    made = Gptq("", True, sweeps=2).quantize_matrix(weight, moment, fmt)
    change = dequantize(made.codes, made.scale, None, fmt) - weight
    assert made.squared_error == pytest.approx(float(change.square().sum()), rel=1e-5)


def test_the_hessian_is_the_damped_moment_in_its_memory():
    _, _, moment = layer(1, 200, seed=5)
    given = moment.clone()
    found = error_feedback(given, damping=0.01, by_activation=True, keep_hessian=True)
    wanted = moment + torch.eye(200).double() * 0.01 * moment.diagonal().mean()
    torch.testing.assert_close(found.hessian.double(), wanted, rtol=1e-6, atol=1e-6)
    assert found.hessian.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    plain = error_feedback(moment.clone(), damping=0.01, by_activation=True)
    assert plain.hessian is None and torch.equal(found.shares.tril(), plain.shares.tril())
