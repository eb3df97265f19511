"""A model that counts tokens, against NumPy written from the definition."""

from __future__ import annotations

import numpy as np

from edgeforge.verification.unigram import unigram_perplexity


def test_counts_are_smoothed_by_one():
    draw = np.random.default_rng(0)
    text = draw.integers(0, 40, 300)
    blocks = [text[:100], text[150:200]]
    counts = np.bincount(text, minlength=50) + 1
    predicted = np.concatenate([block[1:] for block in blocks])
    expected = np.exp(-np.log(counts / counts.sum())[predicted].mean())
    found = unigram_perplexity(text.tolist(), [block.tolist() for block in blocks], 50)
    assert abs(found - expected) < 1e-9
    # A token that the text does not have is possible all the same.
    assert np.isfinite(unigram_perplexity([1, 1], [[1, 49]], 50))
