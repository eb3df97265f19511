"""Palettes weighted by what enters each column, and GPTQ on palettes, against exact optima."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.formats.packing import look_up, unpack_bits
from quant.quantizers import gptq
from quant.quantizers import kmeans_weighted as weighted_kmeans
from quant.quantizers.gptq import Gptq
from quant.quantizers.input_statistics import SecondMoment
from quant.quantizers.kmeans import KMeans
from quant.quantizers.kmeans_weighted import WeightedKMeans
from quant.quantizers.registry import CALIBRATED_PALETTIZERS

FORMATS = ("lut2-gc4", "lut3-gc16", "lut4-gc16", "lut4-pt", "lut6-gc32", "lut3-pt")


def layer(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, inputs with correlated columns of very different size, and their moment."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(cols, cols, generator=draw) / cols**0.5 + torch.eye(cols)
    sizes = torch.exp(torch.randn(cols, generator=draw))
    x = torch.randn(4 * cols, cols, generator=draw) @ mixed * sizes
    moment = SecondMoment(cols)
    moment.add(x)
    return torch.randn(rows, cols, generator=draw) * 0.05, x, moment.mean()


def exact_cost(values: np.ndarray, mass: np.ndarray, clusters: int) -> float:
    """Least weighted squared error, by the quadratic recurrence over all sorted values."""
    order = np.argsort(values)
    x, w = values[order].astype(np.float64), mass[order].astype(np.float64)
    n, s, q = (np.concatenate(([0.0], np.cumsum(part))) for part in (w, w * x, w * x * x))
    within = np.maximum(n[None] - n[:, None], 1e-300)
    cost = (q[None] - q[:, None]) - (s[None] - s[:, None]) ** 2 / within
    cost[np.tril_indices(len(n), -1)] = np.inf
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0)
    return float(best[-1])


def costs_by_table(weight, made, fmt, importance) -> np.ndarray:
    missed = (look_up(made.codes, made.lut, fmt) - weight).double().square() * importance.double()
    return missed.reshape(len(made.lut), -1).sum(1).numpy()


@pytest.mark.parametrize("format", ["lut2-gc4", "lut3-gc8", "lut4-gc8", "lut3-pt"])
def test_tables_lose_least_where_inputs_are_large(format):
    fmt = parse_format(format)
    weight, _, moment = layer(16, 64)
    made = WeightedKMeans().palettize_matrix(weight, moment, fmt)
    importance = moment.diagonal()
    for cost, group in zip(
        costs_by_table(weight, made, fmt, importance),
        weight.reshape(len(made.lut), -1, 64).numpy(),
        strict=True,
    ):
        mass = np.broadcast_to(importance.numpy(), group.shape)
        assert cost <= 1.01 * exact_cost(group.ravel(), mass.ravel(), fmt.entries)
    plain = KMeans().quantize_groups(weight, fmt)
    assert (
        costs_by_table(weight, made, fmt, importance).sum()
        < 0.9 * costs_by_table(weight, plain, fmt, importance).sum()
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", CALIBRATED_PALETTIZERS)
def test_parts_are_laid_out_as_the_format_says_and_the_costs_are_true(name, format):
    fmt = parse_format(format)
    weight, _, moment = layer(32, 64, seed=1)
    assert CALIBRATED_PALETTIZERS[name].name == name
    made = CALIBRATED_PALETTIZERS[name].palettize_matrix(weight, moment, fmt, threads=1)
    for part, layout in fmt.layout(32, 64).items():
        value = getattr(made, part)
        assert tuple(value.shape) == layout.shape
        assert value.dtype == getattr(torch, layout.dtype)
    assert bool((made.lut.float().diff(dim=1) >= 0).all())
    error = float((look_up(made.codes, made.lut, fmt) - weight).double().square().sum())
    assert made.squared_error == pytest.approx(error, rel=1e-5)
    assert made.squared_norm == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("format", ["lut3-gc4", "lut3-pt"])
@pytest.mark.parametrize("name", CALIBRATED_PALETTIZERS)
def test_chunks_of_rows_change_nothing(name, format, monkeypatch):
    fmt = parse_format(format)
    weight, _, moment = layer(48, 64, seed=2)
    whole = CALIBRATED_PALETTIZERS[name].palettize_matrix(weight, moment.clone(), fmt)
    monkeypatch.setattr(weighted_kmeans, "CHUNK_WEIGHTS", 64 * 12)
    monkeypatch.setattr(gptq, "ROWS_AT_ONCE", 12)
    cut = CALIBRATED_PALETTIZERS[name].palettize_matrix(weight, moment, fmt, threads=3)
    assert torch.equal(whole.lut, cut.lut)
    assert (whole.codes != cut.codes).any(1).float().mean() <= 0.1  # ties in another order of sums


def test_inputs_that_are_always_zero_leave_plain_k_means():
    fmt = parse_format("lut3-gc4")
    weight, _, moment = layer(8, 64)
    made = WeightedKMeans().palettize_matrix(weight, torch.zeros_like(moment), fmt)
    plain = KMeans().quantize_groups(weight, fmt)
    assert made.squared_error == pytest.approx(plain.squared_error, rel=1e-3)
    moment[:, ::2] = 0.0
    moment[::2] = 0.0
    made = WeightedKMeans().palettize_matrix(weight, moment, fmt)
    assert made.squared_error < 2 * plain.squared_error  # unused columns are not given up


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("format", ["lut2-gc4", "lut3-gc8", "lut4-pt"])
def test_gptq_carries_errors_as_the_paper_says(gptq_numpy, format, order):
    fmt = parse_format(format)
    rows, cols = 16, 64
    weight, x, moment = layer(rows, cols, seed=3)
    made = Gptq("gptq", order).palettize_matrix(weight, moment.clone(), fmt)
    tables = made.lut.float().numpy().repeat(rows // len(made.lut), 0)
    codes, values = gptq_numpy.gptq_palette(
        weight.numpy(), moment.numpy(), tables, damping=0.01, activation_order=order
    )
    same = (unpack_bits(made.codes, fmt.bits).numpy() == codes).all(1)
    assert same.mean() >= 0.9  # a tie that float32 breaks otherwise moves the rest of its row
    stored = look_up(made.codes, made.lut, fmt).double().numpy()
    found = np.square((weight.numpy() - stored) @ x.numpy().T).sum()
    wanted = np.square((weight.numpy() - values) @ x.numpy().T).sum()
    assert found == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("format", ["lut2-gc16", "lut3-gc16", "lut4-gc16"])
def test_each_step_lowers_the_output_error(format):
    fmt = parse_format(format)
    weight, x, moment = layer(64, 128, seed=5)

    def error(made) -> float:
        missed = (weight - look_up(made.codes, made.lut, fmt)).double()
        return float((missed @ x.double().t()).square().sum())

    plain = error(KMeans().quantize_groups(weight, fmt))
    weighted = error(WeightedKMeans().palettize_matrix(weight, moment, fmt))
    carried = error(Gptq("gptq", True).palettize_matrix(weight, moment.clone(), fmt))
    assert weighted < 0.95 * plain
    assert carried < 0.7 * weighted


@pytest.mark.parametrize("name", CALIBRATED_PALETTIZERS)
def test_what_does_not_fit_is_named(name):
    palettizer = CALIBRATED_PALETTIZERS[name]
    fmt, moment = parse_format("lut3-gc4"), torch.eye(64, dtype=torch.float64)
    weight = torch.ones(8, 64)
    weight[6, 40] = float("nan")
    with pytest.raises(QuantizationError, match=r"w\.weight has NaN in row 6"):
        palettizer.palettize_matrix(weight, moment.clone(), fmt, name="w.weight")
    with pytest.raises(QuantizationError, match="32 input columns; its second moment is"):
        palettizer.palettize_matrix(torch.ones(8, 32), moment.clone(), fmt)
    with pytest.raises(QuantizationError, match="6 output rows; lut3-gc4"):
        palettizer.palettize_matrix(torch.ones(6, 64), moment.clone(), fmt)
