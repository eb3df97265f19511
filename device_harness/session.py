"""What it takes to run an artifact: the protocol that every runtime here implements."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


class Session(Protocol):
    """One artifact, opened in a runtime; close it, or open it by ``with``."""

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
    def limits(self) -> tuple[str, ...]:
        """What running the artifact here cannot tell of a device, a sentence each."""

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

    def close(self) -> None:
        """Gives back memory and processes; closing again does nothing."""

    def __enter__(self) -> Self:
        """The session itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes it."""


class HostSession:
    """What the sessions on this host share: an end, after which they refuse to run."""

    limits: tuple[str, ...] = ()
    _closed = False

    def close(self) -> None:
        """Gives back memory and processes; closing again does nothing."""
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        """Refuses to go on after `close`.

        Raises:
            DeviceError: the session is closed.
        """
        if self._closed:
            raise DeviceError("this session is closed: open the artifact again to run it")


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
