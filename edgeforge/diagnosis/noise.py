"""How much of each point's value is noise: QUANTIZED's against FLOAT, ARTIFACT's against QUANTIZED.

A ratio of noise is the squared difference over the squared value, per token, and its mean over
tokens; the signal-to-noise ratio is the same in decibels. Norms make every layer's input alike, so
the ratio says what a layer hands on, however large its numbers are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, fx

from edgeforge.diagnosis.points import Point, program_points
from edgeforge.reference.choices import Following
from edgeforge.reference.walk import Values, Walk, block_pool
from quant.program.head import head_of

# A point leaves its reference where its noise is at least so large, and so many times the noise at
# all points before it. In sound artifacts of the demo model and of SmolLM2-135M on three targets
# noise above 1e-4 grew at most 3.4 times from one point to the next, and above 1e-3 2.1 times.
JUMP: Final = 16.0
LEAST: Final = 1e-3

Look = Callable[[fx.Node, Sequence[Values]], None]
"""Takes a call and the values of each text before it."""


@dataclass(frozen=True)
class PointNoise:
    """The noise at one point, as ratios; None where the artifact does not show the value.

    Attributes:
        point: the place.
        quantization: QUANTIZED's noise against FLOAT.
        lowering: ARTIFACT's noise against QUANTIZED.
    """

    point: Point
    quantization: float
    lowering: float | None


def decibels(noise: float | None) -> float | None:
    """The signal-to-noise ratio of a ratio of noise, in dB; None where nothing was measured.

    >>> decibels(0.001), decibels(None)
    (30.0, None)
    """
    if noise is None:
        return None
    return math.inf if noise == 0 else -10 * math.log10(noise)


def noise_at_points(
    original: Walk,
    quantized: Walk,
    blocks: Sequence[Tensor],
    artifact: Mapping[Point, Tensor],
    look: Look | None = None,
    following: Sequence[Following] | None = None,
) -> list[PointNoise]:
    """Runs FLOAT and QUANTIZED side by side, and compares the artifact's values.

    Args:
        original: FLOAT; of the same rotation as QUANTIZED.
        quantized: QUANTIZED.
        blocks: texts, ``int64[t]`` each.
        artifact: the artifact's values, of all texts one after the other: ``float32[tokens,
            width]``.
        look: called before each of FLOAT's calls, the head included.
        following: for each text, the artifact's choices of experts, which QUANTIZED follows.
    """
    found = []
    pairs = zip(
        _points(original, blocks, look), _points(quantized, blocks, None, following), strict=True
    )
    for (point, exact), (other, rounded) in pairs:
        assert point == other
        own = artifact.get(point)
        lowering = None
        if own is not None and own.shape == rounded.shape:
            lowering = ratio(rounded, own)
        found.append(PointNoise(point, ratio(exact, rounded), lowering))
    return found


def ratio(reference: Tensor, candidate: Tensor) -> float:
    """The mean ratio of noise of ``float32[tokens, width]``; infinite for what is not finite."""
    size = reference.double().square().sum(-1)
    noise = (reference - candidate).double().square().sum(-1)
    known = size > 0
    if not bool(known.any()):
        return 0.0 if not bool(noise.any()) else math.inf
    value = float((noise[known] / size[known]).mean())
    return value if math.isfinite(value) else math.inf


def leaves(noise: Sequence[PointNoise]) -> PointNoise | None:
    """The first point at which the artifact leaves QUANTIZED all at once; None for none."""
    largest = LEAST / JUMP
    for each in noise:
        if each.lowering is None:
            continue
        if each.lowering >= JUMP * largest:
            return each
        largest = max(largest, each.lowering)
    return None


def _points(
    walk: Walk,
    blocks: Sequence[Tensor],
    look: Look | None = None,
    following: Sequence[Following] | None = None,
) -> Iterator[tuple[Point, Tensor]]:
    """Yields the value of each point, ``float32[tokens, width]``, while the program runs."""
    points, head = program_points(walk.program), head_of(walk.program)
    each = [None for _ in blocks] if following is None else following
    values: list[Values] = [walk.begin(*given) for given in zip(blocks, each, strict=True)]
    for node in walk.order:
        if look is not None:
            look(node, values)
        if node is head:
            return
        with block_pool() as pool:
            walk.advance(node, values, pool)
        if node in points:
            parts = [known[node].reshape(-1, known[node].shape[-1]) for known in values]
            yield points[node], torch.cat(parts).float()
