"""Channels whose activations are far larger than the others', and the tokens where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, fx

from edgeforge.reference.segments import MATRICES, weight_of
from edgeforge.reference.walk import Values, Walk
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


class OutlierMeter:
    """Looks at what enters each matrix while FLOAT runs.

    Args:
        walk: FLOAT.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._found: list[Outlier] = []

    def look(self, node: fx.Node, blocks: Sequence[Values]) -> None:
        """Looks at a call before it runs.

        Args:
            node: the call.
            blocks: the values of each text.
        """
        if node.target not in MATRICES:
            return
        given = [known[node_argument(node, 0)] for known in blocks]
        inputs = [each.reshape(-1, each.shape[-1]) for each in given]
        outlier = _farthest(weight_of(self._walk, node), inputs)
        if outlier is not None:
            self._found.append(outlier)

    def result(self) -> list[Outlier]:
        """The farthest channels, at most one of each matrix's inputs."""
        return sorted(self._found, key=lambda each: -each.times)[:MOST]


def _farthest(name: str, blocks: Sequence[Tensor]) -> Outlier | None:
    inputs = torch.cat([each.abs() for each in blocks])
    if not len(inputs):  # of an expert that no token chose
        return None
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
