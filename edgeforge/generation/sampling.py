"""Chooses the next token from logits, and continues a prompt with it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from device_harness.errors import DeviceError
from device_harness.session import Session
from edgeforge.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: logits are divided by it; 0 always takes the likeliest token (greedy).
        top_p: draws only from the likeliest tokens whose probabilities add up to this
            (Holtzman et al. 2020).
        seed: of the draws; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            UsageError: says which.
        """
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"--temperature {self.temperature} must be between 0 and 100")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} must be above 0 and at most 1")


def choose(logits: npt.NDArray[np.float32], sampling: Sampling, draws: np.random.Generator) -> int:
    """The next token of ``float32[vocab]`` logits.

    Raises:
        DeviceError: the largest logit is not a number: the runtime's arithmetic went wrong.

    >>> choose(np.array([0.0, 2.0, 1.0], np.float32), Sampling(), np.random.default_rng(0))
    1
    """
    likeliest = int(logits.argmax())
    if not np.isfinite(logits[likeliest]):
        raise DeviceError(
            f"the runtime gives {logits[likeliest]} as a logit: verify the artifact; if it is as "
            f"it was written, the checkpoint's values overflow float32"
        )
    if sampling.temperature == 0:
        return likeliest
    # The largest is taken off first: dividing by a tiny temperature must not overflow.
    wide = logits.astype(np.float64) - float(logits[likeliest])
    with np.errstate(over="ignore"):  # minus infinity is right: a probability of zero
        weights = np.exp(wide / sampling.temperature)
    weights /= weights.sum()
    if sampling.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        kept = int(np.searchsorted(np.cumsum(weights[order]), sampling.top_p)) + 1
        weights[order[kept:]] = 0
        weights /= weights.sum()
    return int(draws.choice(len(weights), p=weights))


@dataclass
class Generation:
    """A prompt being continued; iterate over it for tokens, then read what it cost.

    Attributes:
        session: what runs the model.
        prompt: token ids.
        limit: how many tokens at most.
        stop: tokens that end the text; they are not given.
        sampling: how tokens are drawn.
        load_seconds: time until the model could run; none of it is in the others.
        prompt_seconds: time to the first token, once it was given.
        decode_seconds: time of the others.
        produced: tokens given.
        stopped: why it ended: ``stop``, ``limit`` or ``context``.
    """

    session: Session
    prompt: Sequence[int]
    limit: int
    stop: frozenset[int]
    sampling: Sampling = field(default_factory=Sampling)
    load_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    produced: int = 0
    stopped: str = "limit"

    def __iter__(self) -> Iterator[int]:
        draws = np.random.default_rng(self.sampling.seed)
        started = time.perf_counter()
        self.session.reset()
        _ = self.session.vocab_size  # known once the model is loaded
        self.load_seconds = time.perf_counter() - started
        started = time.perf_counter()
        logits = self.session.extend(np.array(self.prompt, np.int64))
        self.prompt_seconds = time.perf_counter() - started
        position = len(self.prompt)
        while self.produced < self.limit:
            token = choose(logits, self.sampling, draws)
            if token in self.stop:
                self.stopped = "stop"
                return
            self.produced += 1
            yield token
            if self.produced == self.limit:
                return
            if position == self.session.context:
                self.stopped = "context"
                return
            started = time.perf_counter()
            logits = self.session.extend(np.array([token], np.int64))
            self.decode_seconds += time.perf_counter() - started
            position += 1

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens a second after the first one; 0 when there was none."""
        return (self.produced - 1) / self.decode_seconds if self.decode_seconds else 0.0
