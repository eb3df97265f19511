"""Counts the positions whose logits are not finite numbers, and finds where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from device_harness.session import Session
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.verification.metrics import Scored


@dataclass(frozen=True)
class NotFinite:
    """The NaN and infinite logits of one model.

    Attributes:
        positions: positions with such a logit.
        of: positions looked at.
        block: the first such position's block, counted from 0.
        position: its place in the block, counted from 0.
        where: a phrase for the operation that they come from; empty where that cannot be seen.
    """

    positions: int
    of: int
    block: int
    position: int
    where: str = ""

    def sentence(self, model: str) -> str:
        """Returns what a user must know, without a full stop."""
        where = self.where or "the runtime does not show which operation they come from"
        return (
            f"{model} gives NaN or infinite logits at {self.positions} of {self.of} positions, "
            f"first at token {self.position} of block {self.block}; {where}"
        )


class FiniteMeter:
    """Counts positions, block by block."""

    def __init__(self) -> None:
        self._blocks = self._positions = self._bad = 0
        self._first: tuple[int, int] | None = None

    def add(self, logits: Scored) -> None:
        """Adds a block's logits."""
        if logits.bad_positions and self._first is None:
            self._first = self._blocks, logits.bad_positions[0]
        self._bad += len(logits.bad_positions)
        self._positions += len(logits.logits)
        self._blocks += 1

    def result(self) -> NotFinite | None:
        """Returns what was found; None where all logits are finite."""
        if self._first is None:
            return None
        return NotFinite(self._bad, self._positions, *self._first)


def located(
    found: Mapping[str, NotFinite],
    blocks: Sequence[Sequence[int]],
    reference: ReferenceRunner,
    quantized: ReferenceRunner,
    session: Session,
) -> dict[str, NotFinite]:
    """Runs the text up to the first such position again, and says where the values come from.

    Args:
        found: by model: ``float``, ``quantized``, ``artifact``.
        blocks: the token ids that were compared.
        reference: FLOAT.
        quantized: QUANTIZED.
        session: ARTIFACT.
    """
    ask: dict[str, Callable[[Tensor], str | None]] = {
        "float": reference.first_not_finite,
        "quantized": quantized.first_not_finite,
        "artifact": lambda text: session.first_not_finite(text.numpy()),
    }
    placed = {}
    for model, each in found.items():
        text = torch.tensor(blocks[each.block][: each.position + 1], dtype=torch.int64)
        placed[model] = replace(each, where=ask[model](text) or "")
    return placed
