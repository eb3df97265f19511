"""Metrics against their formulas, written once more in NumPy and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeforge.verification.metrics import DivergenceMeter, PerplexityMeter

LOGITS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(2, 12)),
    elements=st.floats(-30, 30, width=32),
)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def divergence(reference: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(reference || candidate) in nats, a number a token."""
    log_p, log_q = log_softmax(reference), log_softmax(candidate)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def percentile(values: np.ndarray, share: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = np.sort(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (at - low) * (ordered[high] - ordered[low]))


def measured(*pairs: tuple[np.ndarray, np.ndarray]):
    meter = DivergenceMeter()
    for reference, candidate in pairs:
        meter.add(torch.from_numpy(reference), torch.from_numpy(candidate))
    return meter.result()


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    reference = (4 * draw.normal(size=(300, 40))).astype(np.float32)
    return reference, (reference + 0.5 * draw.normal(size=(300, 40))).astype(np.float32)


def test_divergence_block_by_block(pair):
    reference, candidate = pair
    found = measured(
        (reference[:100], candidate[:100]),
        (reference[100:101], candidate[100:101]),
        (reference[101:], candidate[101:]),
    )
    kl = divergence(reference, candidate)
    assert found.tokens == 300
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(percentile(kl, 0.99), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-4)
    difference = np.abs(reference.astype(np.float64) - candidate)
    assert found.max_difference == pytest.approx(difference.max(), rel=1e-6)
    assert found.rms_difference == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-6)
    assert found.logits_range == pytest.approx(float(np.ptp(reference)), rel=1e-6)
    assert found.relative_difference == pytest.approx(difference.max() / np.ptp(reference))


def test_agreement_counts(pair):
    reference, candidate = pair
    found = measured(pair)
    same = [
        int(np.argmax(r)) == int(np.argmax(c)) for r, c in zip(reference, candidate, strict=True)
    ]
    assert 0.5 < found.top1_agreement < 1
    assert found.top1_agreement == sum(same) / 300
    shared = [
        len(set(np.argsort(r)[-5:].tolist()) & set(np.argsort(c)[-5:].tolist())) / 5
        for r, c in zip(reference, candidate, strict=True)
    ]
    assert 0.5 < found.top5_overlap < 1
    assert found.top5_overlap == pytest.approx(np.mean(shared))


def test_a_vocabulary_smaller_than_five():
    reference = np.array([[1.0, 2.0, 3.0]], np.float32)
    assert measured((reference, -reference)).top5_overlap == 1.0


def test_direction_matters(pair):
    reference, candidate = pair[0], pair[0] / 2  # less sure of the same tokens
    forward = measured((reference, candidate)).kl_mean
    backward = measured((candidate, reference)).kl_mean
    assert forward == pytest.approx(divergence(reference, candidate).mean(), rel=1e-4)
    assert backward == pytest.approx(divergence(candidate, reference).mean(), rel=1e-4)
    assert abs(forward - backward) > 0.1 * forward


def test_equal_logits_do_not_diverge(pair):
    found = measured((pair[0], pair[0].copy()))
    assert (found.kl_mean, found.kl_p99, found.kl_max) == (0, 0, 0)
    assert (found.top1_agreement, found.top5_overlap) == (1, 1)
    assert (found.max_difference, found.rms_difference, found.relative_difference) == (0, 0, 0)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.data())
def test_any_logits(reference, data):
    noise = data.draw(
        arrays.arrays(np.float32, reference.shape, elements=st.floats(-5, 5, width=32))
    )
    candidate = reference + noise
    found = measured((reference, candidate))
    kl = divergence(reference, candidate)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-3, abs=1e-5)
    assert 0 <= found.kl_mean <= found.kl_max + 1e-12
    assert found.kl_p99 <= found.kl_max + 1e-12
    # A constant added to every logit of a token is no difference in probability.
    assert measured((reference, reference + 3)).kl_max < 1e-4


def test_perplexity_is_the_exponential_of_the_mean_loss(pair):
    logits = pair[0]
    targets = np.random.default_rng(1).integers(0, 40, 300)
    meter = PerplexityMeter()
    for block in (slice(0, 7), slice(7, 300)):
        meter.add(torch.from_numpy(logits[block]), torch.from_numpy(targets[block]))
    loss = -log_softmax(logits)[np.arange(300), targets].mean()
    assert meter.result().tokens == 300
    assert meter.result().value == pytest.approx(math.exp(loss), rel=1e-5)


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    meter = PerplexityMeter()
    meter.add(torch.zeros(9, 17), torch.arange(9))
    assert meter.result().value == pytest.approx(17, rel=1e-6)


def test_perplexity_beyond_what_a_float_holds():
    meter = PerplexityMeter()
    meter.add(torch.tensor([[0.0, 2000.0]]), torch.tensor([0]))
    assert meter.result().value == math.inf
