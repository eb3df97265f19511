"""The operators that round activations, against torch's own and NumPy's words for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.errors import QuantizationError
from quant.formats.activations import ACTIVATIONS, parse_activation
from quant.program import ops


def skewed(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    offset = torch.randn(*shape[:-1], 1, generator=draw)
    return torch.randn(shape, generator=draw) * torch.exp(offset) + 2 * offset


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), columns=st.integers(1, 70))
def test_a_tokens_grid_is_the_papers(smoothquant_numpy, seed, columns):
    x = skewed(1, 5, columns, seed=seed)
    found = ops.round_per_token(x)[0].double().numpy()
    wanted = smoothquant_numpy.inputs_by_token(x[0].double().numpy())
    # float32 may take the other side of a tie, by a step.
    step = (np.maximum(x[0].amax(-1), 0) - np.minimum(x[0].amin(-1), 0)).numpy() / 255
    away = np.abs(found - wanted) / step[:, None]
    assert away.max() < 1.001 and (away > 1e-3).mean() < 0.02 + 1 / columns


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.3, 4.0])
def test_it_is_torchs_choice_for_a_token(shift):
    from torch.ao.quantization.fx import _decomposed  # noqa: F401

    decomposed = torch.ops.quantized_decomposed
    x = skewed(3, 64, seed=1) + shift
    scale, zero = decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
    codes = decomposed.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
    wanted = decomposed.dequantize_per_token(
        codes, scale, zero, -128, 127, torch.int8, torch.float32
    )
    same = (ops.round_per_token(x) - wanted).abs() < 1e-5 * x.abs().max()
    assert same.double().mean() > 0.99


def test_zero_stays_zero_and_a_token_of_zeros_too():
    x = skewed(2, 33)
    x[:, 5] = 0
    x[1] = 0
    found = ops.round_per_token(x)
    assert bool((found[:, 5] == 0).all()) and bool((found[1] == 0).all())
    assert bool(torch.isfinite(found).all())


def test_one_scale_is_torchs_fake_quantization():
    x, scale = skewed(1, 7, 50, seed=2), torch.tensor([[0.03125]], dtype=torch.bfloat16)
    found = ops.round_per_tensor(x, scale)
    wanted = torch.fake_quantize_per_tensor_affine(x, 0.03125, 0, -128, 127)
    assert torch.equal(found, wanted)
    assert float(found.max()) <= 127 * 0.03125


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fake_kernels_give_shapes(dtype):
    x = torch.empty(1, 3, 8, dtype=dtype, device="meta")
    scale = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    for found in (ops.round_per_token(x), ops.round_per_tensor(x, scale)):
        assert found.shape == x.shape and found.dtype == dtype


def test_treatments_are_known_by_name():
    assert [parse_activation(name) for name in ACTIVATIONS] == [*ACTIVATIONS]
    with pytest.raises(QuantizationError, match="known: none, int8-token, int8-tensor"):
        parse_activation("fp8")
