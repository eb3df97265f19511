"""Round to nearest against a float64 search by brute force, and on bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import QuantizationError
from quant.formats.formats import parse_format
from quant.formats.packing import dequantize
from quant.kernels import native
from quant.quantizers.rtn import RTN

BACKENDS = ["torch"] + (["native"] if native.available() else [])
SYMMETRIC_4 = ["int4-g32", "int4-g64", "int4-g128", "int4-pc"]
ALL = [*SYMMETRIC_4, "int4-g32-asym", "int4-pc-asym"]
ALL += ["int8-pc", "int8-g32", "int8-pc-asym", "int8-g32-asym"]
ALL += ["int2-g32", "int2-pc", "int2-g64-asym", "int3-g32", "int3-pc-asym", "int5-g32", "int6-pc"]


def draw(kind, rows, cols, seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "gauss": lambda: rng.normal(size=(rows, cols)),
        "laplace": lambda: rng.laplace(size=(rows, cols)),
        "student": lambda: rng.standard_t(2.5, size=(rows, cols)),
        "outlier": lambda: rng.normal(size=(rows, cols)) * (1 + 30 * (rng.random((rows, 1)) > 2)),
        "positive": lambda: rng.uniform(0.5, 1.5, size=(rows, cols)),
        "negative": lambda: rng.uniform(-2.0, -0.1, size=(rows, cols)),
    }[kind]()
    if kind == "outlier":
        values[:, ::64] *= 12
    return torch.tensor(values * 0.05).to(torch.bfloat16)


def bfloat16_between(low, high):
    first = np.float32(low).view(np.uint32) >> 16
    last = np.float32(high).view(np.uint32) >> 16
    return (np.arange(first, last + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


def importance(values, fmt):
    """The factor of each squared error: 4 bits in groups count those of large weights more."""
    if fmt.bits != 4 or fmt.group_size is None:
        return np.ones_like(values)
    groups = np.abs(values).reshape(-1, min(fmt.group_size, values.size))
    return (groups + 0.375 * groups.max(1, keepdims=True)).reshape(values.shape)


def least_error(group, fmt, lowest, highest, low, high):
    """Least error of one float64 group over all bfloat16 scales, and that scale."""
    scales = bfloat16_between(low, high)[:, None]
    steps = np.clip(np.rint(group / scales), lowest, highest)
    errors = (importance(group, fmt) * (group - steps * scales) ** 2).sum(1)
    return errors.min(), scales[errors.argmin(), 0]


def group_errors(weight, rows, size):
    values = dequantize(rows.codes, rows.scale, rows.zero_point, size[0])
    wide = weight.double().numpy()
    difference = wide - values.double().numpy()
    return (importance(wide, size[0]) * difference**2).reshape(-1, size[1]).sum(1)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "student", "outlier", "positive"])
@pytest.mark.parametrize("name", SYMMETRIC_4)
def test_symmetric_int4_finds_the_best_scale(name, kind):
    weight, fmt = draw(kind, 12, 512, seed=3), parse_format(name)
    size = fmt.columns_per_group(512)
    found = RTN.quantize_rows(weight, fmt)
    errors = group_errors(weight, found, (fmt, size))
    scales = found.scale.double().numpy().reshape(-1)
    groups = weight.double().numpy().reshape(-1, size)
    same = 0
    for group, error, scale in zip(groups, errors, scales, strict=True):
        reach = np.abs(group).max()
        best, at = least_error(group, fmt, -8, 7, reach / 600, reach * 1.2 / 7 * 0.9999)
        assert error <= best * (1 + 1e-5)
        same += at == scale
    assert same >= 0.99 * len(groups)


@pytest.mark.parametrize("kind", ["gauss", "student", "positive", "negative"])
def test_asymmetric_int4_finds_the_best_scale_and_zero_point(kind):
    weight, fmt = draw(kind, 6, 256, seed=4), parse_format("int4-g32-asym")
    found = RTN.quantize_rows(weight, fmt)
    errors = group_errors(weight, found, (fmt, 32))
    for group, error in zip(weight.double().numpy().reshape(-1, 32), errors, strict=True):
        reach = max(group.max(), 0) - min(group.min(), 0)
        best = min(
            least_error(group, fmt, -zero, 15 - zero, reach / 30, reach * 1.2 / 15 * 0.9999)[0]
            for zero in range(16)
        )
        assert error <= best * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "student", "outlier", "positive"])
@pytest.mark.parametrize("name", ["int2-g32", "int2-g128", "int2-pc", "int3-g32", "int3-pc"])
def test_few_bits_find_the_best_of_all_scales(name, kind):
    weight, fmt = draw(kind, 6, 512, seed=6), parse_format(name)
    size = fmt.columns_per_group(512)
    errors = group_errors(weight, RTN.quantize_rows(weight, fmt), (fmt, size))
    lowest, highest = -(1 << fmt.bits - 1), (1 << fmt.bits - 1) - 1
    for group, error in zip(weight.double().numpy().reshape(-1, size), errors, strict=True):
        reach = np.abs(group).max()
        # No scale above the widest weight can be better than that weight itself.
        best, _ = least_error(group, fmt, lowest, highest, reach / 1000, reach * 4)
        assert error <= best * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["gauss", "student", "outlier", "positive"])
@pytest.mark.parametrize("name", ["int2-g32-asym", "int2-g128-asym", "int3-g64-asym"])
def test_few_bits_find_the_best_scale_and_zero_point(name, kind):
    weight, fmt = draw(kind, 6, 256, seed=7), parse_format(name)
    size = fmt.columns_per_group(256)
    errors = group_errors(weight, RTN.quantize_rows(weight, fmt), (fmt, size))
    for group, error in zip(weight.double().numpy().reshape(-1, size), errors, strict=True):
        reach = max(group.max(), 0) - min(group.min(), 0)
        best = min(
            least_error(group, fmt, -zero, fmt.max_code - zero, reach / 500, reach * 3)[0]
            for zero in range(fmt.max_code + 1)
        )
        assert error <= best * (1 + 1e-5)


@pytest.mark.parametrize("kind", ["gauss", "student", "outlier"])
@pytest.mark.parametrize("name", ["int8-pc", "int8-g32"])
def test_int8_finds_the_best_scale(name, kind):
    weight, fmt = draw(kind, 6, 512, seed=5), parse_format(name)
    size = fmt.columns_per_group(512)
    errors = group_errors(weight, RTN.quantize_rows(weight, fmt), (fmt, size))
    for group, error in zip(weight.double().numpy().reshape(-1, size), errors, strict=True):
        reach = np.abs(group).max()
        best, _ = least_error(group, fmt, -128, 127, reach / 600, reach * 1.025 / 127 * 0.9999)
        assert error <= best * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ALL), st.floats(0.3, 4.0), st.booleans())
def test_never_worse_than_the_plain_scale(seed, name, spread, heavy):
    rng = np.random.default_rng(seed)
    values = rng.standard_t(spread, (2, 128)) if heavy else rng.normal(0, spread, (2, 128))
    weight, fmt = torch.tensor(values.clip(-1e4, 1e4), dtype=torch.float32), parse_format(name)
    size = fmt.columns_per_group(128)
    errors = group_errors(weight, RTN.quantize_rows(weight, fmt), (fmt, size))
    for group, error in zip(weight.numpy().reshape(-1, size), errors, strict=True):
        if fmt.symmetric:
            plain, zero = np.abs(group).max() / (fmt.max_code // 2), fmt.implicit_zero_point
        else:
            low, high = min(group.min(), 0), max(group.max(), 0)
            plain = (high - low) / fmt.max_code
            zero = np.rint(-low / plain)
        scale = float(torch.tensor(plain).to(torch.bfloat16))
        steps = np.clip(np.rint(group / np.float32(scale)), -zero, fmt.max_code - zero)
        wide = group.astype(np.float64)
        squares = (wide - steps * scale) ** 2
        assert error <= (importance(wide, fmt) * squares).sum() * (1 + 1e-5)


def test_asymmetric_is_better_where_weights_lean_to_one_side():
    weight = draw("positive", 8, 256)
    lean = RTN.quantize_rows(weight, parse_format("int4-g32-asym")).squared_error
    assert lean < 0.4 * RTN.quantize_rows(weight, parse_format("int4-g32")).squared_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_the_reported_errors_are_those_of_the_stored_values(name, backend):
    weight, fmt = draw("student", 5, 384), parse_format(name)
    found = RTN.quantize_rows(weight, fmt, backend=backend)
    values = dequantize(found.codes, found.scale, found.zero_point, fmt).double()
    assert found.squared_error == pytest.approx(
        float(((weight.double() - values) ** 2).sum()), rel=1e-6
    )
    assert found.squared_norm == pytest.approx(float((weight.double() ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
def test_quantizing_the_stored_values_again_changes_nothing(name, backend):
    fmt = parse_format(name)
    first = RTN.quantize_rows(draw("gauss", 6, 256), fmt, backend=backend)
    values = dequantize(first.codes, first.scale, first.zero_point, fmt)
    again = RTN.quantize_rows(values, fmt, backend=backend)
    changed = dequantize(again.codes, again.scale, again.zero_point, fmt) != values
    if fmt.symmetric:
        assert not changed.any()
        assert again.squared_error == 0.0
    else:
        # Two ends that both rounded inwards can leave the scale just outside the next search.
        assert changed.reshape(-1, fmt.columns_per_group(256)).any(1).double().mean() < 0.05
        assert again.squared_error < 1e-4 * again.squared_norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tiny", [0.0, 1e-40, 1e-30])
def test_groups_that_are_almost_nothing_become_zeros(name, backend, tiny):
    fmt = parse_format(name)
    found = RTN.quantize_rows(torch.full((2, 128), tiny), fmt, backend=backend)
    assert not dequantize(found.codes, found.scale, found.zero_point, fmt).any()
    assert bool((found.scale >= 2.0**-17).all())
    assert found.squared_norm == pytest.approx(256 * tiny**2, rel=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_scales_are_positive_and_exact_in_float16(name):
    sizes = torch.tensor([[1e-8], [1e-5], [1e-3], [1.0], [1e3], [1e4]])
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)) * sizes
    scale = RTN.quantize_rows(weight, parse_format(name)).scale
    assert bool((scale > 0).all())
    assert torch.equal(scale.to(torch.float16).float(), scale.float())


def test_one_outlier_does_not_ruin_a_long_row():
    weight = draw("gauss", 1, 4096).float()
    weight[0, 7] = 1.0
    found = RTN.quantize_rows(weight, parse_format("int4-pc"))
    assert float(found.scale) < 0.5 * 1.0 / 7
    outlying = torch.zeros(1, 32)
    outlying[0, 3] = 1e4
    one = RTN.quantize_rows(outlying, parse_format("int4-g32"))
    assert one.squared_error < 1e-4 * one.squared_norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("value", "says"), [(float("nan"), "NaN"), (float("-inf"), "infinite"), (3e38, r"65504")]
)
def test_a_bad_value_is_refused_with_weight_and_row(name, backend, value, says):
    weight = torch.ones(4, 128)
    weight[2, 40] = value
    with pytest.raises(QuantizationError, match=r"^lm_head\.weight has .*row 102.*") as error:
        RTN.quantize_rows(
            weight, parse_format(name), name="lm_head.weight", first_row=100, backend=backend
        )
    assert says in str(error.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_weights_that_fit(backend):
    fmt = parse_format("int4-g32")
    found = RTN.quantize_rows(torch.full((1, 32), 65504.0 * 7), fmt, backend=backend)
    assert float(found.scale) <= 65504
    with pytest.raises(QuantizationError, match="65504"):
        RTN.quantize_rows(torch.full((1, 32), 65600.0 * 7), fmt, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_written_in_place(backend):
    fmt, weight = parse_format("int4-g32-asym"), draw("gauss", 4, 96)
    whole = RTN.quantize_rows(weight, fmt, backend=backend)
    codes = np.zeros((6, 48), dtype=np.uint8)
    scale = np.zeros((6, 3), dtype=np.uint16)
    points = torch.zeros(6, 2, dtype=torch.uint8)
    cost = [
        RTN.quantize_rows_into(
            weight[at : at + 2],
            fmt,
            codes[at + 1 : at + 3],
            scale[at + 1 : at + 3],
            points[at + 1 : at + 3],
            backend=backend,
        )
        for at in (0, 2)
    ]
    assert np.array_equal(codes[1:5], whole.codes.numpy())
    assert np.array_equal(scale[1:5], whole.scale.view(torch.uint16).numpy())
    assert torch.equal(points[1:5], whole.zero_point)
    assert not codes[[0, 5]].any() and not scale[[0, 5]].any() and not points[[0, 5]].any()
    assert cost[0].squared_error + cost[1].squared_error == whole.squared_error


def test_buffers_that_do_not_fit_are_refused():
    weight, fmt = torch.ones(2, 64), parse_format("int4-g32")
    codes, scale = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.bfloat16)
    with pytest.raises(QuantizationError, match="codes buffer"):
        RTN.quantize_rows_into(weight, fmt, codes[:1], scale)
    with pytest.raises(QuantizationError, match="scale buffer"):
        RTN.quantize_rows_into(weight, fmt, codes, scale.float())
    with pytest.raises(QuantizationError, match="strided"):
        RTN.quantize_rows_into(weight, fmt, codes.t().contiguous().t(), scale)
    with pytest.raises(QuantizationError, match="zero_point"):
        RTN.quantize_rows_into(weight, parse_format("int4-g32-asym"), codes, scale)


@pytest.mark.parametrize("weight", [torch.ones(64), torch.ones(2, 64, dtype=torch.float64)])
def test_other_tensors_are_refused(weight):
    with pytest.raises(QuantizationError, match="float32, float16 or bfloat16"):
        RTN.quantize_rows(weight, parse_format("int4-g32"))
