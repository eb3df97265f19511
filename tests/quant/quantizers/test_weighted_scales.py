"""Weighted scales are the best of NumPy's, tried one by one."""

import numpy as np
import pytest
import torch

from quant.formats.formats import parse_format
from quant.quantizers.rtn import RTN
from quant.quantizers.weighted_scales import weighted_scales


def weighted_errors(weight, scale, costs, fmt):
    """The weighted squared errors in float64, ``[rows, groups]``."""
    values = weight.double().numpy().reshape(len(weight), scale.shape[1], -1)
    step = scale.double().numpy()[..., None]
    limit = fmt.implicit_zero_point
    stored = np.clip(np.rint(values / step), -limit, limit - 1) * step
    return (np.square(values - stored) * costs.double().numpy().reshape(scale.shape[1], -1)).sum(-1)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("format", ["int4-g32", "int2-g16", "int4-pc"])
def test_no_scale_of_a_grid_costs_much_less(format, signed):
    fmt = parse_format(format)
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=draw)
    costs = torch.rand(64, generator=draw).pow(4) * 100
    start = RTN.quantize_rows(weight, fmt).scale.float()
    found = weighted_scales(weight, costs, start, fmt, signed=signed)
    assert torch.equal(found, found.to(torch.bfloat16).float())
    reached = weighted_errors(weight, found, costs, fmt)
    plain = weighted_errors(weight, start, costs, fmt)
    assert (reached <= plain * 1.0001).all() and reached.sum() < 0.9 * plain.sum()
    assert bool((found < 0).any()) == signed
    reach = weight.reshape(6, start.shape[1], -1).abs().amax(-1) / (fmt.implicit_zero_point - 1)
    signs = (1, -1) if signed else (1,)
    tried = [
        weighted_errors(weight, (reach * ratio * sign).bfloat16().float(), costs, fmt)
        for ratio in np.linspace(0.45, 1.02, 60)
        for sign in signs
    ]
    assert reached.sum() <= 1.1 * np.min(tried, 0).sum()


def test_a_dear_column_decides_and_a_group_of_zeros_stays_finite():
    fmt = parse_format("int4-g16")
    weight = torch.full((1, 32), 0.01)
    weight[0, 5], weight[0, 16:] = 1.0, 0.0
    costs = torch.ones(32)
    costs[5] = 1e6
    start = RTN.quantize_rows(weight, fmt).scale.float()
    found = weighted_scales(weight, costs, start, fmt)
    assert found.isfinite().all() and (found > 0).all()
    assert weighted_errors(weight, found, costs, fmt)[0, 0] < 10.0
