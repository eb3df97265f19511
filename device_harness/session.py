"""What it takes to run an artifact: the protocol that every runtime here implements."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


class Session(Protocol):
    """One artifact, loaded.

    Attributes:
        context: how many positions the caches hold.
        vocab_size: width of the logits.
        runtime: the runtime's name and version, for reports.
    """

    context: int
    vocab_size: int
    runtime: str

    def reset(self) -> None:
        """Forgets all positions."""

    def extend(self, tokens: Tokens) -> Logits:
        """Appends ``int64[t]`` tokens and returns the last one's logits, ``float32[vocab]``.

        Raises:
            DeviceError: no token, a token outside the vocabulary, or past the context.
        """

    def logits(self, tokens: Tokens) -> Logits:
        """Logits of every position of a fresh text: ``int64[t] -> float32[t, vocab]``.

        Leaves the positions of `extend` as they were.
        """
