"""Digests of the weights that an artifact holds, from wherever its files hold their parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from quant.store.store import weight_digest


class StoredBytes(Protocol):
    """A place where a part of a weight lies."""

    def blocks(self) -> Iterable[bytes]:
        """Its bytes as a weight store holds them, block by block."""


def digests_of(weights: Mapping[str, Mapping[str, Sequence[StoredBytes]]]) -> dict[str, str]:
    """`quant.store.store.weight_digest` of every weight.

    A weight that is held in several places, and not the same in all of them, gets a text that no
    digest equals.

    Args:
        weights: by weight and part, every place where it is held.
    """
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(weights, pool.map(_digest, weights.values()), strict=True))


def _digest(parts: Mapping[str, Sequence[StoredBytes]]) -> str:
    copies = max(map(len, parts.values()))
    found = {
        weight_digest({part: places[i % len(places)].blocks() for part, places in parts.items()})
        for i in range(copies)
    }
    return " or ".join(sorted(found))
