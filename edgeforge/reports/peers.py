"""Figures of other tools' formats, for the models that the benchmarks measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_FILE: Final = Path(__file__).parent / "peers.json"


@dataclass(frozen=True)
class Peer:
    """A format of another tool, measured by `make bench-quality` on the same checkpoint.

    Attributes:
        name: the tool and the format.
        bits: a weight, scales included.
        kl: from FLOAT, nats a token, of the error of the weights alone.
        half: half of its 95 % interval.
    """

    name: str
    bits: float
    kl: float
    half: float


def peers_of(sha256: str) -> list[Peer]:
    """What is known for a checkpoint, by its digest; nothing for most."""
    models = json.loads(_FILE.read_text(encoding="utf-8"))["models"]
    return [Peer(**row) for row in models.get(sha256, {}).get("peers", ())]
