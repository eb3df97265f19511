"""The scale of inputs, against every scale tried on the numbers themselves."""

import numpy as np
import pytest
import torch

from quant.quantizers.input_scale import BINS, FURTHEST_CLIP, input_scale


def counted(x: np.ndarray) -> tuple[torch.Tensor, float]:
    largest = float(np.abs(x).max())
    counts, _ = np.histogram(np.abs(x), BINS, (0, largest))
    return torch.from_numpy(counts).double(), largest


def error(x: np.ndarray, scale: float) -> float:
    return float(((np.clip(np.rint(x / scale), -128, 127) * scale - x) ** 2).sum())


@pytest.mark.parametrize("draw", ["normal", "laplace", "standard_t", "uniform"])
def test_no_other_scale_is_better(draw):
    generator = np.random.default_rng(4)
    x = (
        generator.standard_t(3, 40000)
        if draw == "standard_t"
        else getattr(generator, draw)(size=40000)
    )
    counts, largest = counted(x)
    found = float(input_scale(counts, largest))
    tried = np.linspace(FURTHEST_CLIP, 1, 300) * largest / 127
    assert error(x, found) < 1.03 * min(error(x, scale) for scale in tried)
    if draw == "uniform":
        assert found == pytest.approx(largest / 127, rel=0.02)
    else:
        assert found < 0.95 * largest / 127


@pytest.mark.parametrize("largest", [0.0, 1e-6, 0.005, 3.0, 30000.0])
def test_every_target_holds_it(largest):
    scale = input_scale(torch.ones(BINS, dtype=torch.float64), largest)
    assert scale.dtype == torch.bfloat16 and scale.shape == (1, 1)
    assert float(scale) > 0 and float(scale.half()) == float(scale)
