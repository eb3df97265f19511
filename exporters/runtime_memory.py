"""`Footprint`: the memory of a loaded model; `RuntimeCosts`: how a runtime keeps what it loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from exporters.recurrence_size import RecurrenceSize, in_place

UNLIMITED: Final = 1 << 40
"""The longest context, in tokens, of a model of which nothing grows with the context."""


@dataclass(frozen=True)
class RuntimeCosts:
    """How a runtime keeps what it loads.

    Attributes:
        cache_element: bytes of one number in the caches, its share of the scales included.
        tied_copies: how many copies it holds of a matrix that is both embedding and head.
        run_tokens: how many tokens one run takes; its buffers grow with them.
        scores: whether attention keeps the scores of a run's tokens over the whole context.
        float_element: bytes of one element of a float weight once loaded; None when the weight
            stays as it is stored.
        stored_copies: how many copies the files hold of a matrix that is both embedding and head.
        state_element: bytes of one number in the states of short convolutions and token shifts.
        memory_element: bytes of one number in the memories of recurrences.
        expert_rows: how many hidden vectors it holds of each token for each expert that the token
            chose; 0 where a mixture's experts are computed one after another.
        adapter_element: bytes of one number of an adapter's factors.
        recurrence: counts the numbers that a run of so many tokens holds of a recurrence besides
            its operands.
    """

    cache_element: float
    tied_copies: int
    run_tokens: int
    scores: bool = False
    float_element: int | None = None
    stored_copies: int = 1
    state_element: int = 4
    memory_element: int = 4
    expert_rows: int = 0
    adapter_element: int = 4
    recurrence: Callable[[RecurrenceSize, int], int] = in_place


@dataclass(frozen=True)
class Footprint:
    """The memory of a loaded model, in bytes.

    Attributes:
        weights: bytes of all weights.
        buffers: bytes of one run's buffers that do not depend on the context.
        caches_per_token: bytes of keys and values for each token of the context.
        buffers_per_token: bytes of the other buffers for each token of the context.
        stored: bytes that the artifact's files hold of the weights.
        run_tokens: how many tokens one run of a prompt takes.
        context_multiple: the context is rounded up to a multiple of so many tokens.
        states: bytes of the states that do not grow with the context.
        adapters: bytes of the factors of all adapters beside the weights, as if all were loaded.
    """

    weights: int
    buffers: int
    caches_per_token: float
    buffers_per_token: float
    stored: int = 0
    run_tokens: int = 1
    context_multiple: int = 1
    states: int = 0
    adapters: int = 0

    def caches_at(self, context: int) -> int:
        """Bytes of the caches and of all other states, for a context of so many tokens."""
        return self.states + math.ceil(self._positions(context) * self.caches_per_token)

    def buffers_at(self, context: int) -> int:
        """Bytes of everything except weights and caches, for a context of so many tokens."""
        return self.buffers + math.ceil(self._positions(context) * self.buffers_per_token)

    def total(self, context: int) -> int:
        """Bytes of weights, adapters, caches and buffers, for a context of so many tokens.

        >>> Footprint(1000, 100, 2.0, 0.5).total(40)
        1200
        """
        kept = self.weights + self.adapters
        return kept + self.caches_at(context) + self.buffers_at(context)

    def largest_context(self, memory: int) -> int:
        """The longest context, in tokens, that fits into so many bytes; 0 when none fits.

        Where nothing grows with the context, it is `UNLIMITED` when the model fits at all.

        >>> Footprint(1000, 100, 2.0, 0.5).largest_context(1200)
        40
        """
        left = memory - self.weights - self.adapters - self.buffers - self.states
        each = self.caches_per_token + self.buffers_per_token
        if not each:
            return UNLIMITED if left >= 0 else 0
        tokens = max(0, math.floor(left / each))
        tokens -= tokens % self.context_multiple
        fits = self.total(tokens) <= memory or not tokens
        return tokens if fits else tokens - self.context_multiple

    def _positions(self, context: int) -> int:
        return -(-context // self.context_multiple) * self.context_multiple
