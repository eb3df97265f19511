"""Channels whose activations are far larger than the others', and the tokens where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from edgeforge.reference.segments import MATRICES, weight_of
from edgeforge.reference.walk import Values, Walk, block_pool
from quant.program.program import node_argument

# A channel is told if its largest value is this many times the median channel's largest.
FAR: Final = 20.0
MOST: Final = 8


@dataclass(frozen=True)
class Outlier:
    """The channel of a matrix's inputs with the largest activations.

    Attributes:
        weight: the matrix.
        channel: the column.
        largest: its largest absolute value.
        times: that over the median of all channels' largest.
        token: the place in its text of the token where it is.
        outside: the share of tokens where the channel exceeds `FAR` medians.
    """

    weight: str
    channel: int
    largest: float
    times: float
    token: int
    outside: float


def find_outliers(walk: Walk, blocks: Sequence[Tensor]) -> list[Outlier]:
    """Runs FLOAT and returns the farthest channels, at most one of each matrix's inputs.

    Args:
        walk: FLOAT.
        blocks: texts, ``int64[t]`` each.
    """
    found = []
    values: list[Values] = [walk.begin(block) for block in blocks]
    head = walk.program.output()
    for node in walk.order:
        if node.target in MATRICES:
            name = weight_of(walk, node)
            given = [known[node_argument(node, 0)] for known in values]
            outlier = _farthest(name, [each.reshape(-1, each.shape[-1]) for each in given])
            if outlier is not None:
                found.append(outlier)
        if node is head:
            break
        with block_pool() as pool:
            walk.advance(node, values, pool)
    return sorted(found, key=lambda each: -each.times)[:MOST]


def _farthest(name: str, blocks: Sequence[Tensor]) -> Outlier | None:
    inputs = torch.cat([each.abs() for each in blocks])
    largest = inputs.amax(0)
    median = float(largest.median()) or 1e-30
    channel = int(largest.argmax())
    times = float(largest[channel]) / median
    if times < FAR:
        return None
    row, lengths = int(inputs[:, channel].argmax()), [len(each) for each in blocks]
    for length in lengths:
        if row < length:
            break
        row -= length
    outside = float((inputs[:, channel] > FAR * median).float().mean())
    return Outlier(name, channel, float(largest[channel]), times, row, outside)
