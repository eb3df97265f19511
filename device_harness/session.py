"""What it takes to run an artifact: the protocol that every runtime here implements."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError

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


def check_tokens(tokens: Tokens, total: int, vocab_size: int, context: int) -> None:
    """Refuses tokens that a runtime would not: kernels look up what lies past a table's end.

    Args:
        tokens: ``int64[t]``, about to be run.
        total: positions taken once they are.
        vocab_size: tokens are under it.
        context: positions there are.

    Raises:
        DeviceError: no token, a token outside the vocabulary, or past the context.
    """
    if not len(tokens):
        raise DeviceError("there is no token to run")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise DeviceError(
            f"there is no token {outside[0]}: the artifact's vocabulary is 0 to {vocab_size - 1}"
        )
    if total > context:
        raise DeviceError(
            f"{total} tokens do not fit the artifact's context of {context}: shorten the text, or "
            f"export with a larger --context"
        )
