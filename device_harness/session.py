"""What it takes to run an artifact: the protocol that every runtime here implements."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


class Session(Protocol):
    """One artifact, loaded."""

    @property
    def context(self) -> int:
        """How many positions the caches hold."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""

    @property
    def runtime(self) -> str:
        """The runtime's name, version and threads, for reports."""

    @property
    def peak_bytes(self) -> int:
        """Peak resident memory so far of the process that runs the artifact."""

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
