"""Computes digests of the weights that an artifact's files hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from exporters.damaged_files import one_sentence
from exporters.errors import ExportError
from quant.store.store import weight_digest

# How often the bytes of an artifact's files may be named, by all weights together. Graphs and
# functions share theirs; a file that names a gigabyte a thousand times would keep us for hours.
_MOST_OFTEN: Final = 8


class StoredBytes(Protocol):
    """A place in an artifact's files that holds a part of a weight."""

    @property
    def nbytes(self) -> int:
        """The size in the file, in bytes."""

    def blocks(self) -> Iterable[bytes]:
        """The part's bytes as a weight store holds them, one block at a time."""


Places = Mapping[str, Sequence[StoredBytes]]
"""Every place that holds a part of a weight, by the part."""


def digests_of(weights: Mapping[str, Places], artifact: Path, held: int) -> dict[str, str]:
    """Computes `quant.store.store.weight_digest` of every weight.

    When the files hold a weight in several places and these differ, its text lists every digest
    found, so that it equals no digest of the store.

    Args:
        weights: every place that holds a part, by the weight's name and the part.
        artifact: the file or folder that was read, for messages.
        held: the size of the files in which the places are, in bytes.

    Raises:
        ExportError: the parts of a weight do not fit together, or the weights name far more bytes
            than the files hold.
    """
    named = sum(map(_hashed, weights.values()))
    if named > _MOST_OFTEN * held:
        raise ExportError(
            f"{artifact} names {named} bytes of weights, but its files have {held}: it was changed"
        )
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: _digest(artifact, name, weights[name]), weights)
        return dict(zip(weights, found, strict=True))


def _hashed(parts: Places) -> int:
    """How many bytes `_digest` goes through."""
    copies = max(map(len, parts.values()))
    return sum(places[i % len(places)].nbytes for i in range(copies) for places in parts.values())


def _digest(artifact: Path, name: str, parts: Places) -> str:
    copies = max(map(len, parts.values()))
    with one_sentence(artifact, f"a weight's parts ({name[:200]})"):
        found = {
            weight_digest({part: at[i % len(at)].blocks() for part, at in parts.items()})
            for i in range(copies)
        }
    return " or ".join(sorted(found))
