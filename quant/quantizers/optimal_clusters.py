"""Optimal clusters of sorted values in one dimension, for many groups of values at once.

The dynamic program is that of Wang and Song ("Ckmeans.1d.dp: optimal k-means clustering in one
dimension by dynamic programming", 2011): the best ``k`` clusters of the first ``j`` bins are the
best ``k - 1`` clusters of the first ``i`` bins and one cluster of the rest. The best ``i`` never
falls as ``j`` grows, so the search for it stays between the best ``i`` of neighbouring ``j``
(Gronlund et al., "Fast exact k-means, k-medians and Bregman divergence clustering in 1D", 2017).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Singles = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

# A sample of a group's values: so many evenly spaced ones, and all of the outermost on each side.
_KNOTS = 1024
_TAIL = 128
# Rounds of capping: each takes the excess from wide gaps, which raises every other gap's share.
_CAPPED = 6


def bin_ends(ascending: Singles, mass: Doubles, bins: int, *, sampled: bool) -> Integers:
    """Cuts sorted values into bins, the units that clusters consist of.

    Each value is a bin of its own where ``bins`` suffice. Otherwise bins have equal shares of the
    integral of the cube root of the density, as optimal clusters have (Panter and Dite 1951).

    Args:
        ascending: float32 ``[groups, n]``.
        mass: float64 ``[groups, n + 1]``, prefix sums of the values' masses.
        bins: number of bins, a power of two.
        sampled: whether to use only about 1,280 of a group's values, the outermost among them.

    Returns:
        int64 ``[groups, bins + 1]``: bin ``b`` holds the values from ``ends[b]`` up to, and not
        with, ``ends[b + 1]``.
    """
    groups, count = ascending.shape
    if count <= bins:
        ends = np.minimum(np.arange(bins + 1), count)
        return np.broadcast_to(ends, (groups, bins + 1))
    knots = np.arange(count)
    if sampled and count > _KNOTS + 2 * _TAIL:
        inner = np.linspace(_TAIL, count - _TAIL, _KNOTS, endpoint=False, dtype=np.int64)
        knots = np.concatenate((knots[:_TAIL], inner, knots[-_TAIL:]))
    reach = np.diff(ascending[:, knots].astype(np.float64), axis=1)
    shares = np.cbrt(np.square(reach) * np.diff(mass[:, knots], axis=1))
    # However far an outlier lies, its gap needs only one cut: other gaps get the excess share.
    for _ in range(_CAPPED):
        np.minimum(shares, shares.sum(1, keepdims=True) / bins, out=shares)
    total = np.cumsum(shares, axis=1)
    ends = np.zeros((groups, bins + 1), np.int64)
    for group, summed in enumerate(total):
        wanted = summed[-1] * (np.arange(1, bins) / bins)
        cuts = knots[np.searchsorted(summed, wanted) + 1]
        # A cut moves to the first of equal values, so that they stay in one bin.
        ends[group, 1:-1] = np.searchsorted(ascending[group], ascending[group, cuts])
    ends[:, -1] = count
    return ends


def optimal_ends(mass: Doubles, sums: Doubles, clusters: int) -> Integers:
    """Returns the clusters of bins with the least squared error.

    Args:
        mass: float64 ``[groups, bins + 1]``, prefix sums of the bins' masses; ``bins`` is a power
            of two.
        sums: float64 ``[groups, bins + 1]``, prefix sums of the bins' values times masses.
        clusters: largest number of clusters.

    Returns:
        int64 ``[groups, clusters + 1]``: cluster ``c`` holds the bins from ``ends[c]`` up to, and
        not with, ``ends[c + 1]``; it may be empty.
    """
    groups, size = mass.shape
    flat_mass, flat_sums = mass.reshape(-1), sums.reshape(-1)
    # The squared error is a constant minus the sum of ``sum ** 2 / mass`` over clusters, so the
    # program maximizes that sum, the score.
    best = np.square(sums) / np.maximum(mass, 1e-300)
    choices = np.zeros((clusters, groups, size), np.int32)
    for cluster in range(1, clusters):
        best = _next_layer(flat_mass, flat_sums, best, choices[cluster])
    ends = np.zeros((groups, clusters + 1), np.int64)
    ends[:, -1] = size - 1
    every = np.arange(groups)
    for cluster in range(clusters - 1, 0, -1):
        ends[:, cluster] = choices[cluster, every, ends[:, cluster + 1]]
    return ends


def _next_layer(
    mass: Doubles, sums: Doubles, best: Doubles, choice: npt.NDArray[np.int32]
) -> Doubles:
    """Returns the best scores with one more cluster; writes where that cluster begins.

    Args:
        mass: float64 ``[groups * (bins + 1)]``, flat prefix sums.
        sums: float64 ``[groups * (bins + 1)]``, flat prefix sums.
        best: float64 ``[groups, bins + 1]``, the best scores of the first bins so far.
        choice: int32 ``[groups, bins + 1]``, the first bin of the last cluster, to write.
    """
    groups, size = best.shape
    bins = size - 1
    base = (np.arange(groups) * size)[:, None]
    before, after = best.reshape(-1), np.zeros_like(best)
    step = bins
    while step:
        # Odd multiples of the step; the even ones are known and bound the choice.
        at = np.arange(step, size, 2 * step)
        low = choice[:, at - step]
        high = (
            np.broadcast_to(at, low.shape) if step == bins else choice[:, at + step * (at < bins)]
        )
        high = np.minimum(np.where(at < bins, high, at), at)
        lengths = (high - low + 1).reshape(-1)
        starts = np.cumsum(lengths) - lengths
        begin = np.repeat((base + low).reshape(-1) - starts, lengths) + np.arange(lengths.sum())
        end = np.repeat((base + at).reshape(-1), lengths)
        score = sums[end] - sums[begin]
        score *= score
        score /= np.maximum(mass[end] - mass[begin], 1e-300)
        score += before[begin]
        top = np.maximum.reduceat(score, starts)
        first = np.flatnonzero(score == np.repeat(top, lengths))
        chosen = begin[first[np.searchsorted(first, starts)]].reshape(low.shape) - base
        choice[:, at], after[:, at] = chosen, top.reshape(low.shape)
        step //= 2
    return after
