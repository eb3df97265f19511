"""Palettes by k-means: held against exhaustive and exact optima and coremltools' own palettizer."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.formats.packing import look_up, unpack_bits
from quant.quantizers.kmeans import KMeans
from quant.quantizers.registry import PALETTIZERS

KMEANS = KMeans()
SHAPES_OF_DATA = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "student": lambda rng, shape: rng.standard_t(2, shape),
    "outliers": lambda rng, shape: (
        rng.standard_normal(shape) * np.where(rng.random(shape) < 0.01, 12, 1)
    ),
    "skewed": lambda rng, shape: rng.exponential(size=shape),
}


def drawn(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    values = SHAPES_OF_DATA[kind](np.random.default_rng(seed), shape)
    return torch.from_numpy(values.astype(np.float32))


def error_of(weight: torch.Tensor, made, format: str) -> float:
    stored = look_up(made.codes, made.lut, parse_format(format)).double()
    return float((weight.double() - stored).square().sum())


def exact_error(values: np.ndarray, clusters: int, mass: np.ndarray | None = None) -> float:
    """Least squared error, by the quadratic recurrence over all sorted values."""
    order = np.argsort(values)
    x = values[order].astype(np.float64)
    w = np.ones_like(x) if mass is None else mass[order].astype(np.float64)
    n, s, q = (np.concatenate(([0.0], np.cumsum(part))) for part in (w, w * x, w * x * x))
    within = np.maximum(n[None] - n[:, None], 1e-300)
    cost = (q[None] - q[:, None]) - (s[None] - s[:, None]) ** 2 / within
    cost[np.tril_indices(len(n), -1)] = np.inf
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0)
    return float(best[-1])


@given(
    st.lists(st.floats(-100, 100, width=16), min_size=8, max_size=8),
    st.sampled_from([1.0, 1e-3]),
)
@settings(max_examples=60, deadline=None)
def test_eight_values_get_the_best_of_all_partitions(values, scale):
    weight = torch.tensor([values]) * scale
    ordered = np.sort(weight.double().numpy()[0])
    best = min(
        sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(ordered, cuts))
        for cuts in combinations(range(1, 8), 3)
    )
    made = KMEANS.quantize_groups(weight, parse_format("lut2-gc1"))
    # The table is rounded to float16, which costs each value half a step at most.
    step = np.abs(ordered).max() * 2.0**-11 + 2.0**-25
    assert error_of(weight, made, "lut2-gc1") <= best + 8 * step**2 + 1e-9 * best


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", SHAPES_OF_DATA)
def test_small_groups_are_optimal(kind, bits):
    weight = drawn(kind, 4, 64, seed=bits)
    made = KMEANS.quantize_groups(weight, parse_format(f"lut{bits}-gc4"))
    best = exact_error(weight.numpy().reshape(-1), 2**bits)
    assert error_of(weight, made, f"lut{bits}-gc4") <= 1.002 * best


@pytest.mark.parametrize(("bits", "slack"), [(2, 1.001), (4, 1.005), (6, 1.03)])
@pytest.mark.parametrize("kind", SHAPES_OF_DATA)
def test_large_groups_are_near_the_optimum(kind, bits, slack):
    weight = drawn(kind, 16, 64, seed=bits)
    made = KMEANS.quantize_groups(weight, parse_format(f"lut{bits}-gc16"))
    best = exact_error(weight.numpy().reshape(-1), 2**bits)
    assert error_of(weight, made, f"lut{bits}-gc16") <= slack * best


@pytest.mark.parametrize("kind", ["normal", "student", "outliers"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_error_is_at_most_that_of_coremltools(kind, bits):
    from coremltools.optimize.coreml._quantization_passes import palettize_weights as palettizer

    weight = drawn(kind, 32, 96, seed=3)
    params = palettizer.blockwise_compress(
        weight.numpy(), "KMEANS", bits, [16, 0], 1, channel_axis=0, cluster_dim=1
    )
    lut, indices = params.lut.astype(np.float64), params.indices
    table = lut.reshape(2, 2**bits)
    theirs = np.take_along_axis(table[np.arange(32) // 16], indices.astype(int), 1)
    made = KMEANS.quantize_groups(weight, parse_format(f"lut{bits}-gc16"))
    ours = error_of(weight, made, f"lut{bits}-gc16")
    assert ours <= 1.0001 * float(np.square(weight.double().numpy() - theirs).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", ["lut2-pt", "lut3-gc8", "lut4-gc4", "lut6-pt", "lut8-gc12"])
@pytest.mark.parametrize("name", PALETTIZERS)
def test_parts_are_as_the_format_says_and_the_costs_are_true(name, format, dtype):
    fmt = parse_format(format)
    weight = drawn("student", 24, 64).to(dtype)
    made = PALETTIZERS[name].quantize_groups(weight, fmt)
    for part, layout in fmt.layout(24, 64).items():
        value = getattr(made, part)
        assert (tuple(value.shape), value.dtype) == (layout.shape, getattr(torch, layout.dtype))
    assert bool((made.lut.diff(dim=1) >= 0).all())
    assert made.squared_error == pytest.approx(error_of(weight, made, format), rel=1e-5)
    assert made.squared_norm == pytest.approx(float(weight.double().square().sum()), rel=1e-6)
    # Each weight got the nearest entry of its table.
    table = made.lut.double()[torch.arange(24) // (fmt.rows_per_group or 24)]
    far = (weight.double()[..., None] - table[:, None]).abs()
    got = far.gather(2, unpack_bits(made.codes, fmt.bits).long()[..., None])[..., 0]
    assert torch.allclose(got, far.amin(2), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PALETTIZERS)
def test_groups_do_not_see_each_other(name):
    fmt = parse_format("lut4-gc4")
    weight = drawn("outliers", 20, 128).bfloat16()
    whole = PALETTIZERS[name].quantize_groups(weight, fmt)
    for start, stop in ((0, 4), (4, 12), (12, 20)):
        some = PALETTIZERS[name].quantize_groups(weight[start:stop], fmt)
        assert torch.equal(some.codes, whole.codes[start:stop])
        assert torch.equal(some.lut, whole.lut[start // 4 : stop // 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PALETTIZERS)
def test_one_table_in_two_passes_is_that_of_the_whole(name, dtype):
    fmt, palettizer = parse_format("lut4-pt"), PALETTIZERS[name]
    weight = drawn("skewed", 24, 64).to(dtype) - 0.7
    whole = palettizer.quantize_groups(weight, fmt)
    parts = weight.split(7)
    lut = palettizer.table_of_counts(sum(palettizer.count_values(part) for part in parts), fmt)
    assert torch.equal(lut, whole.lut)
    codes = torch.cat([palettizer.look_up_rows(part, fmt, lut).codes for part in parts])
    assert torch.equal(codes, whole.codes)
    assert error_of(weight, whole, "lut4-pt") <= 1.005 * exact_error(
        weight.float().numpy().reshape(-1), 16
    )


def test_few_values_are_kept_exactly():
    values = torch.tensor([-3.0, 0.0, 0.5, 0.5625, 60000.0, -0.0])
    weight = values[torch.randint(6, (16, 512), generator=torch.Generator().manual_seed(0))]
    for format in ("lut3-gc16", "lut3-pt", "lut8-gc4"):
        made = KMEANS.quantize_groups(weight, parse_format(format))
        assert made.squared_error == 0
        assert torch.equal(look_up(made.codes, made.lut, parse_format(format)), weight)
    zero = KMEANS.quantize_groups(torch.zeros(16, 64), parse_format("lut4-gc16"))
    assert zero.squared_error == zero.squared_norm == 0 and not zero.lut.any()


def test_importance_moves_entries_to_what_matters():
    weight = drawn("normal", 8, 64)
    fmt = parse_format("lut3-gc8")
    plain = KMEANS.quantize_groups(weight, fmt)
    ones = KMEANS.quantize_groups(weight, fmt, importance=torch.ones(8, 64))
    assert torch.equal(plain.codes, ones.codes) and torch.equal(plain.lut, ones.lut)

    column = torch.linspace(0, 4, 64).exp()
    by_column = KMEANS.quantize_groups(weight, fmt, importance=column)
    by_weight = KMEANS.quantize_groups(weight, fmt, importance=column.expand(8, 64))
    assert torch.equal(by_column.lut, by_weight.lut)
    cost = {
        label: float((column * (weight - look_up(m.codes, m.lut, fmt)).square()).sum())
        for label, m in (("plain", plain), ("weighted", by_column))
    }
    mass = column.expand(8, 64).reshape(-1).numpy()
    best = exact_error(weight.numpy().reshape(-1), 8, mass)
    assert cost["weighted"] <= 1.002 * best < 0.97 * cost["plain"]


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (torch.ones(63), r"importance is \[63\]; it must be \[64\] by column or \[8, 64\]"),
        (torch.full((64,), -1.0), "finite and not negative"),
        (torch.full((64,), torch.nan), "finite and not negative"),
    ],
)
def test_an_importance_that_does_not_fit_is_refused(importance, words):
    with pytest.raises(QuantizationError, match=words):
        KMEANS.quantize_groups(
            drawn("normal", 8, 64), parse_format("lut4-gc8"), importance=importance
        )


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (float("nan"), "has NaN in row 102"),
        (float("inf"), "has an infinite value in row 102"),
        (-70000.0, "has values up to 70000 in row 102, beyond the range"),
    ],
)
@pytest.mark.parametrize("name", PALETTIZERS)
def test_what_cannot_be_stored_is_named_with_its_row(name, bad, words):
    weight = torch.ones(4, 64)
    weight[2, 5] = bad
    for work in (
        lambda **where: PALETTIZERS[name].quantize_groups(
            weight, parse_format("lut4-gc4"), **where
        ),
        lambda **where: PALETTIZERS[name].count_values(weight, **where),
    ):
        with pytest.raises(QuantizationError, match=rf"w\.weight {words}"):
            work(name="w.weight", first_row=100)


@pytest.mark.parametrize("name", PALETTIZERS)
def test_a_palettizer_bears_the_name_of_its_row(name):
    assert PALETTIZERS[name].name == name
