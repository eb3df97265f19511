"""Computes digests of the weights that an artifact's files hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from quant.store.store import weight_digest


class StoredBytes(Protocol):
    """A place in an artifact's files that holds a part of a weight."""

    def blocks(self) -> Iterable[bytes]:
        """The part's bytes as a weight store holds them, one block at a time."""


def digests_of(weights: Mapping[str, Mapping[str, Sequence[StoredBytes]]]) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of every weight.

    When the files hold a weight in several places and these differ, its text lists every digest
    found, so that it equals no digest of the store.

    Args:
        weights: every place that holds a part, by the weight's name and the part.
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
