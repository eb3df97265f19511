"""Runs FLOAT, QUANTIZED and artifacts over the same tokens, and holds their logits together.

FLOAT against QUANTIZED is what quantization costs; QUANTIZED against ARTIFACT is what lowering
and the runtime's arithmetic cost. They are never mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from device_harness.session import Session
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.verification.chosen_experts import RouterReader
from edgeforge.verification.curve import CurveMeter, PositionCurve
from edgeforge.verification.each_session import EachSession
from edgeforge.verification.finite import FiniteMeter, NotFinite
from edgeforge.verification.intervals import (
    BlockSums,
    Intervals,
    TokenSums,
    block_sums,
    divergence_values,
    intervals_of,
)
from edgeforge.verification.metrics import (
    Divergence,
    DivergenceMeter,
    Perplexity,
    PerplexityMeter,
    Scored,
)
from edgeforge.verification.routing import Followed, Routing, RoutingMeter, follow

_WORST = 3


@dataclass(frozen=True)
class Comparison:
    """The figures that come out of running the three models over blocks of tokens.

    Attributes:
        perplexity: of ``float``, ``quantized`` and ``artifact``.
        quantization: QUANTIZED against FLOAT.
        lowering: ARTIFACT against QUANTIZED.
        total: ARTIFACT against FLOAT.
        intervals: of the means; None where there are too few blocks.
        not_finite: of those of ``float``, ``quantized`` and ``artifact`` that gave NaN or infinity.
        sums: what the intervals were drawn from; None where there are none.
        worst: the tokens at which ARTIFACT is furthest from QUANTIZED, a phrase each.
        curve: the divergences along a block.
        routing: how the artifact's tokens chose experts; None where there are none to choose.
    """

    perplexity: dict[str, Perplexity]
    quantization: Divergence
    lowering: Divergence
    total: Divergence
    intervals: Intervals | None
    not_finite: dict[str, NotFinite]
    sums: BlockSums | None = None
    worst: tuple[str, ...] = ()
    curve: PositionCurve | None = None
    routing: Routing | None = None


class _References:
    """What all artifacts of one store share: FLOAT, QUANTIZED and what is between them."""

    def __init__(self) -> None:
        self.sums = TokenSums()
        self.perplexity = {"float": PerplexityMeter(), "quantized": PerplexityMeter()}
        self.finite = {"float": FiniteMeter(), "quantized": FiniteMeter()}
        self.quantization = DivergenceMeter()

    def add(self, block: Tensor, logits: dict[str, Scored]) -> None:
        values = {}
        for name, scored in logits.items():
            values[name] = self.perplexity[name].add(scored, block[1:])
            self.finite[name].add(scored)
        between = self.quantization.add(logits["float"], logits["quantized"])
        self.sums.add(len(block), values | divergence_values("quantization", between))


class _Artifact:
    """What is measured of one artifact."""

    def __init__(self, length: int, routing: RoutingMeter | None) -> None:
        self.sums, self.curve, self.routing = TokenSums(), CurveMeter(length), routing
        self.perplexity, self.finite = PerplexityMeter(), FiniteMeter()
        self.lowering, self.total = DivergenceMeter(), DivergenceMeter()
        self._worst: list[tuple[float, int, int]] = []

    def add(
        self, block: Tensor, logits: dict[str, Scored], own: Scored, followed: Followed | None
    ) -> None:
        losses = self.perplexity.add(own, block[1:])
        self.finite.add(own)
        expected = logits["quantized"] if followed is None else Scored(followed.logits)
        lowering = self.lowering.add(expected, own)
        if self.routing is not None:
            self.routing.add(len(block), followed)
            self.routing.apart.add(logits["quantized"], own)
        at = int(lowering[:, 0].argmax())
        self._worst.append((float(lowering[at, 0]), self.sums.blocks, at))
        total = self.total.add(logits["float"], own)
        self.curve.add({"lowering": lowering[:, 0], "total": total[:, 0]})
        self.sums.add(
            len(block),
            {"artifact": losses}
            | divergence_values("lowering", lowering)
            | divergence_values("total", total),
        )

    def result(self, references: _References) -> Comparison:
        perplexity = references.perplexity | {"artifact": self.perplexity}
        meters = references.finite | {"artifact": self.finite}
        finite = {name: meter.result() for name, meter in meters.items()}
        return Comparison(
            perplexity={name: meter.result() for name, meter in perplexity.items()},
            quantization=references.quantization.result(),
            lowering=self.lowering.result(),
            total=self.total.result(),
            intervals=intervals_of(references.sums, self.sums),
            not_finite={name: found for name, found in finite.items() if found is not None},
            sums=block_sums(references.sums, self.sums),
            worst=tuple(
                f"token {at} of block {block}"
                for _, block, at in sorted(self._worst, reverse=True)[:_WORST]
            ),
            curve=self.curve.result(),
            routing=None if self.routing is None else self.routing.result(),
        )


def compare(
    blocks: Sequence[Sequence[int]],
    reference: ReferenceRunner,
    quantized: ReferenceRunner,
    sessions: Sequence[Session],
    progress: Callable[[int, int], None],
    readers: Sequence[RouterReader] = (),
) -> list[Comparison]:
    """Runs FLOAT, QUANTIZED and artifacts over the same blocks.

    An artifact that is a mixture of experts is held against QUANTIZED as it is where every token
    has the experts that it chose in the artifact (`edgeforge.verification.routing`).

    FLOAT and QUANTIZED run once for all artifacts. Logits live as long as their block: those of a
    whole text would be as large as the text times the vocabulary.

    Args:
        blocks: token ids, each a fresh text.
        reference: FLOAT.
        quantized: QUANTIZED.
        sessions: artifacts of the store that QUANTIZED reads.
        progress: told how many blocks are done, and of how many.
        readers: of each artifact, what reads its choices of experts; empty for no mixture.

    Returns:
        One comparison for each artifact.
    """
    tokens = [torch.tensor(block, dtype=torch.int64) for block in blocks]
    longest = max(map(len, tokens))
    meters: list[RoutingMeter | None] = [None for _ in sessions]
    if readers:
        places = quantized.router_places
        meters = [RoutingMeter(reader, places) for reader in readers]
    references, artifacts = _References(), [_Artifact(longest, meter) for meter in meters]
    progress(0, len(tokens))
    with EachSession(sessions) as each:
        each.run(partial(_read_choices, blocks), artifacts)
        chosen = [None if meter is None else meter.choices for meter in meters]
        quantized_logits = follow(quantized, tokens, chosen)
        streams = zip(tokens, reference.logits(tokens), quantized_logits, strict=True)
        for index, (block, float_logits, (own_logits, followed)) in enumerate(streams):
            logits = {"float": Scored(float_logits), "quantized": Scored(own_logits)}
            references.add(block, logits)
            each.run(partial(_run, block, logits), list(zip(artifacts, followed, strict=True)))
            progress(index + 1, len(tokens))
    return [artifact.result(references) for artifact in artifacts]


def _read_choices(blocks: Sequence[Sequence[int]], session: Session, artifact: _Artifact) -> None:
    if artifact.routing is not None:
        artifact.routing.read([np.array(block, np.int64) for block in blocks])


def _run(
    block: Tensor,
    logits: dict[str, Scored],
    session: Session,
    given: tuple[_Artifact, Followed | None],
) -> None:
    """Runs an artifact on a block and adds what comes out."""
    artifact, followed = given
    own = Scored(torch.from_numpy(session.logits(block.numpy())))
    artifact.add(block, logits, own, followed)
