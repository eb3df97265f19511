"""Columns rounded in turn: the compiled kernel against torch, torch against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.formats.formats import parse_format
from quant.kernels import native
from quant.kernels.native import Columns
from quant.quantizers.grids import Grid, IntegerGrid, PaletteGrid

needs_kernels = pytest.mark.skipif(
    not native.available(),
    reason="quant.kernels._kernels was not built: no C compiler at installation",
)


def columns(rows: int, count: int, cols: int, seed: int = 0) -> Columns:
    """Some of a matrix's columns, out of order, that owe each other a good deal."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, rows, generator=draw) * 0.05
    wanted = weight + torch.randn(count, rows, generator=draw) * 0.01
    shares = torch.randn(count, cols, generator=draw)[:, :count] * 0.3  # rows lie farther apart
    places = torch.randperm(cols, generator=draw)[:count]
    codes = torch.zeros(cols, rows, dtype=torch.uint8)
    return Columns(wanted, weight, shares, places, codes, torch.zeros(count, rows))


def integers(name: str, rows: int, cols: int, signed: bool = False) -> IntegerGrid:
    """The grid of some random weights."""
    grid = IntegerGrid(parse_format(name), rows, cols, signed=signed)
    grid.fit(0, torch.randn(rows, cols, generator=torch.Generator().manual_seed(9)) * 0.05)
    return grid


def palette(rows: int, tables: int, entries: int) -> PaletteGrid:
    """Tables of random values, shared by as many rows each."""
    values = torch.randn(tables, entries, generator=torch.Generator().manual_seed(8)) * 0.05
    return PaletteGrid(values.half().float().sort(1).values)


GRIDS = {
    "int4-g32": lambda: (37, integers("int4-g32", 37, 96)),
    "int4-g32-asym": lambda: (64, integers("int4-g32-asym", 64, 96)),
    "int8-pc": lambda: (3, integers("int8-pc", 3, 96)),
    "int3-g24-asym": lambda: (70, integers("int3-g24-asym", 70, 96)),
    "int2-g32, either sign": lambda: (33, integers("int2-g32", 33, 96, signed=True)),
    "a table for all": lambda: (41, palette(41, 1, 16)),
    "a table for eight rows": lambda: (40, palette(40, 5, 4)),
    "large tables": lambda: (34, palette(34, 2, 256)),
}


def rounded(grid: Grid, rows: int) -> Columns:
    """Sixty columns after the grid rounded them."""
    given = columns(rows, 60, 96)
    grid.round_columns(given)
    return given


@needs_kernels
@pytest.mark.parametrize("name", GRIDS)
def test_the_kernel_equals_torch_on_every_instruction_set(
    name, monkeypatch, restore_instruction_set
):
    rows, grid = GRIDS[name]()
    compiled = []
    for level in (0, 1, 2):
        native.limit_instruction_set(level)
        compiled.append(rounded(grid, rows))
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        expected = rounded(grid, rows)
    for found in compiled:
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.errors, expected.errors)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym"])
def test_integers_are_numpys(name):
    fmt = parse_format(name)
    grid = integers(name, 9, 96)
    found, before = rounded(grid, 9), columns(9, 60, 96)
    scale, points = grid.parts()
    zero = np.full((9, 3), 8.0) if points is None else unpacked(points)
    scale = scale.double().numpy()
    wanted, shares = before.wanted.double().numpy(), before.shares.double().numpy()
    for index, place in enumerate(before.places.tolist()):
        step, base = scale[:, place // 32], zero[:, place // 32]
        codes = np.clip(np.rint(wanted[index] / step) + base, 0, fmt.max_code)
        assert (found.codes[place].numpy() == codes).all()
        error = before.weight[index].numpy() - (codes - base) * step
        np.testing.assert_allclose(found.errors[index].numpy(), error, atol=1e-7)
        wanted[index + 1 :] += shares[index + 1 :, index, None] * error


def unpacked(points: torch.Tensor) -> np.ndarray:
    """Zero points of three groups, a nibble each, the lower one first."""
    bytes_ = points.numpy()
    return np.stack([bytes_[:, 0] & 15, bytes_[:, 0] >> 4, bytes_[:, 1] & 15], 1).astype(float)


def test_a_weight_as_near_to_two_entries_takes_the_lower():
    grid = PaletteGrid(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]))
    weight = torch.tensor([[-9.0, -0.5, -0.4, 0.5, 1.5, 1.6, 9.0]])
    codes = torch.zeros(1, 7, dtype=torch.uint8)
    given = Columns(weight, weight, torch.ones(1, 1), torch.tensor([0]), codes, weight.clone())
    grid.round_columns(given)
    assert codes.tolist() == [[0, 0, 1, 1, 2, 3, 3]]
    assert given.errors[0, 0] == -8.0 and given.errors[0, 6] == 7.0
