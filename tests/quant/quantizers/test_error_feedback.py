"""The shares of GPTQ's errors against the paper's inverse, and their costs against Schur's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.errors import QuantizationError
from quant.quantizers import error_feedback as feedback
from quant.quantizers.error_feedback import error_feedback


def second_moment(size: int, seed: int = 0) -> torch.Tensor:
    """Of inputs with correlated columns of very different size."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=draw).double() / size**0.5 + torch.eye(size)
    x = torch.randn(4 * size, size, generator=draw).double() @ mixed
    x *= torch.exp(torch.randn(size, generator=draw))
    return x.t() @ x / len(x)


def columns_in_turn(moment: torch.Tensor, by_activation: bool) -> np.ndarray:
    """The moment in the order of its columns' turns."""
    exact = moment.numpy()
    if not by_activation:
        return exact
    order = np.argsort(-exact.diagonal(), kind="stable")
    return exact[order][:, order]


@pytest.mark.parametrize("widest", [4096, 0])  # float64 at once; float32 first
@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("size", [1, 31, 200])
def test_shares_do_what_the_papers_inverse_does(monkeypatch, size, by_activation, widest):
    monkeypatch.setattr(feedback, "TOGETHER", 1400)
    monkeypatch.setattr(feedback, "WIDEST_DOUBLE", widest)
    moment = second_moment(size)
    damped = columns_in_turn(moment, by_activation) + 0.01 * np.trace(moment) / size * np.eye(size)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    # Some errors at every column's turn, carried to later columns one after the other.
    error = np.random.default_rng(0).standard_normal(size)
    change, shift = np.zeros(size), np.zeros(size)
    for k in range(size):
        shift[k] = change[k]
        change[k + 1 :] -= error[k] / inverse[k, k] * inverse[k, k + 1 :]
    found = error_feedback(moment.clone(), damping=0.01, by_activation=by_activation)
    shares = np.tril(found.shares.double().numpy(), -1)
    # From its first value to the stored one, a column is off by its error less what it took over.
    ours = shares @ (error - shift)
    np.testing.assert_allclose(ours, shift, rtol=1e-3, atol=1e-4 * max(1e-9, np.abs(shift).max()))


@pytest.mark.parametrize("by_activation", [False, True])
def test_columns_cost_what_later_ones_cannot_take_over(by_activation):
    moment = second_moment(24, seed=4)
    found = error_feedback(moment.clone(), damping=0.0, by_activation=by_activation)
    exact = columns_in_turn(moment, by_activation)
    order = range(24) if found.order is None else found.order.tolist()
    importance = found.importance().tolist()
    for step, place in enumerate(order):
        # What is left of a column is the Schur complement of the block of later ones.
        later, between = exact[step + 1 :, step + 1 :], exact[step, step + 1 :]
        left = exact[step, step] - between @ np.linalg.solve(later, between)
        assert importance[place] == pytest.approx(left, rel=1e-3)


def test_float64_takes_over_where_float32_has_no_factor(monkeypatch):
    monkeypatch.setattr(feedback, "WIDEST_DOUBLE", 0)
    draw = torch.Generator().manual_seed(4)
    narrow = torch.randn(64, 3, generator=draw).double()
    moment = narrow @ narrow.t() + 1e-7 * torch.eye(64, dtype=torch.float64)
    info = torch.linalg.cholesky_ex(moment.flip(0, 1).float()).info
    assert int(info) > 0  # it is a case in point
    costs = error_feedback(moment.clone(), damping=0.0).costs.numpy()
    exact = np.linalg.cholesky(moment.numpy()[::-1, ::-1]).diagonal()[::-1] ** 2
    np.testing.assert_allclose(costs, exact, rtol=1e-5)


def test_a_moment_that_is_not_finite_is_refused_by_name():
    moment = torch.eye(8, dtype=torch.float64)
    moment[3, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"^w\.weight: .* not finite"):
        error_feedback(moment, damping=0.01, name="w.weight")
