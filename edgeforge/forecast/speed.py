"""Upper bounds of speed: what a phone's memory and its arithmetic allow at most.

A decoded token reads every matrix once: the layers', and the head's, which is the embedding's where
they are tied; of a mixture's experts those that it chooses. It also reads the keys and values of
the tokens before it, in each layer within its window, and it reads and writes the memory of each
recurrence. No decoder without speculation is faster than the memory gives these bytes. A run of a
prompt's tokens reads at least the same matrices once for all of its tokens, and multiplies each of
them with each matrix that a token reads. Everything else, such as attention's own products and a
recurrence's, only makes it slower.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edgeforge.families.assembly import EMBEDDING
from edgeforge.families.expert_names import token_share
from edgeforge.families.spec import ModelSpec
from quant.plans.plan import matrix_shape

if TYPE_CHECKING:
    from exporters.runtime_memory import Footprint
    from quant.plans.plan import QuantPlan

CACHED_BYTES: Final = 64 << 20
"""So many bytes a processor's own caches may hold, and memory's bandwidth is then no bound."""


@dataclass(frozen=True)
class CacheRows:
    """Keys and values of the layers with one window.

    Attributes:
        nbytes: bytes of one earlier token.
        window: how many earlier tokens are read at most; 0 for all.
    """

    nbytes: float
    window: int


@dataclass(frozen=True)
class Work:
    """What a token costs.

    Attributes:
        weights: bytes of weights that a decoded token reads.
        rows: what it reads of the caches, by window.
        operations: multiplications and additions of one token of a prompt, in the layers.
        run_tokens: tokens of one run of a prompt.
        states: bytes of what it reads and writes of states that do not grow with the text.
    """

    weights: int
    rows: tuple[CacheRows, ...]
    operations: int
    run_tokens: int
    states: int = 0

    def read_at(self, position: int) -> int:
        """Bytes that the token after so many others reads.

        >>> Work(1000, (CacheRows(2.0, 0), CacheRows(3.0, 10)), 0, 1).read_at(50)
        1130
        """
        read = sum(
            each.nbytes * (min(position, each.window) if each.window else position)
            for each in self.rows
        )
        return self.weights + self.states + math.ceil(read)

    def decode_bound(self, bandwidth: float, position: int) -> float:
        """Tokens a second at most, from a bandwidth in bytes a second."""
        return bandwidth / self.read_at(position)

    def prefill_bound(self, bandwidth: float | None, operations: float | None) -> float | None:
        """Tokens of a prompt a second at most.

        Args:
            bandwidth: bytes a second; None where it is not known.
            operations: operations a second of the fastest processor; None where it is not known.
        """
        bounds = []
        if bandwidth is not None:
            bounds.append(bandwidth / self.weights * self.run_tokens)
        if operations is not None and self.operations:
            bounds.append(operations / self.operations)
        return min(bounds, default=None)


def work_of(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec, footprint: Footprint
) -> Work:
    """Returns what a token costs with a plan.

    Args:
        plan: the format of every weight.
        shapes: the shape of every weight.
        spec: the model's dimensions.
        footprint: what a runtime keeps of the caches for each token.
    """
    read = operations = 0.0
    for name, given in plan.weights.items():
        if name == EMBEDDING and not spec.tied:
            continue  # one row of it
        share = token_share(spec, name)
        read += share * given.format.nbytes(*matrix_shape(shapes[name]))
        if spec.weights[name].role in ("linear", "router", "gate"):
            operations += 2 * share * math.prod(shapes[name])
    rows, run = _cache_rows(spec, footprint), footprint.run_tokens
    return Work(round(read), rows, round(operations), run, 2 * footprint.states)


def _cache_rows(spec: ModelSpec, footprint: Footprint) -> tuple[CacheRows, ...]:
    """The caches' bytes, divided among the layers that have any, by their windows."""
    heads: Counter[int] = Counter()
    for layer in spec.layers:
        if layer.num_kv_heads:
            heads[layer.window] += layer.num_kv_heads
    each = footprint.caches_per_token / max(1, heads.total())
    return tuple(CacheRows(each * count, window) for window, count in sorted(heads.items()))
