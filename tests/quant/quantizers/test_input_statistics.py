"""The second moment is NumPy's, however the tokens come."""

import numpy as np
import pytest
import torch

from quant.quantizers import input_statistics as second_moment
from quant.quantizers.input_statistics import SecondMoment


@pytest.mark.parametrize("widths", [(192, 512), (16, 16), (8, 512)])
def test_the_mean_is_numpys(monkeypatch, widths):
    monkeypatch.setattr(second_moment, "NARROWEST", widths[0])
    monkeypatch.setattr(second_moment, "WIDEST", widths[1])
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    collected = SecondMoment(40)
    for part in x.split((1, 60, 39)):
        collected.add(part)
    wide = x.double().numpy()
    np.testing.assert_array_equal(collected.largest().numpy(), x.abs().amax(0).numpy())
    found = collected.mean()
    assert found.dtype == torch.float64
    assert torch.equal(found, found.t())
    np.testing.assert_allclose(found.numpy(), wide.T @ wide / 100, rtol=1e-5, atol=1e-5)


def test_a_long_sum_loses_nothing():
    collected = SecondMoment(1)
    large, small = torch.full((1, 1), 4096.0), torch.ones(1, 1)
    collected.add(large)
    for _ in range(1000):
        collected.add(small)
    assert float(collected.mean()) * 1001 == 4096.0**2 + 1000  # float32 would stop at 2 ** 24


def test_the_mean_does_not_depend_on_the_number_of_threads():
    x = torch.randn(700, 700, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            collected = SecondMoment(700)
            collected.add(x)
            found.append(collected.mean())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_no_token_gives_nothing():
    assert not SecondMoment(3).mean().any()
