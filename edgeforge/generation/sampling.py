"""Chooses the next token from logits, and continues a prompt token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from device_harness.errors import LogitsNotFiniteError
from device_harness.finite import require_finite
from device_harness.session import Session
from edgeforge.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: divisor of the logits; 0 always takes the likeliest token (greedy).
        top_p: draw only from the likeliest tokens whose probabilities add up to this
            (Holtzman et al. 2020).
        seed: seed of the draws; the same seed gives the same text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Refuses values that are out of range.

        Raises:
            UsageError: the message names the option and its range.
        """
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"--temperature {self.temperature} must be between 0 and 100")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p} must be above 0 and at most 1")


def choose(logits: npt.NDArray[np.float32], sampling: Sampling, draws: np.random.Generator) -> int:
    """Returns the next token, chosen from ``float32[vocab]`` logits.

    Raises:
        LogitsNotFiniteError: the largest logit is NaN or infinite.

    >>> choose(np.array([0.0, 2.0, 1.0], np.float32), Sampling(), np.random.default_rng(0))
    1
    """
    likeliest = int(logits.argmax())
    if not np.isfinite(logits[likeliest]):
        raise LogitsNotFiniteError(f"the runtime gives {logits[likeliest]} as a logit")
    if sampling.temperature == 0:
        return likeliest
    # The largest logit is subtracted first: dividing by a tiny temperature must not give +inf.
    wide = logits.astype(np.float64) - float(logits[likeliest])
    with np.errstate(over="ignore"):  # -inf is correct: it gives a probability of zero
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
    """The continuation of a prompt; iterate over it for the tokens, then read the times.

    Iterating raises `device_harness.errors.LogitsNotFiniteError` where logits are NaN or infinite.

    Attributes:
        session: the session that runs the model.
        prompt: the prompt's token ids.
        limit: the largest number of tokens to produce.
        stop: tokens that end the text; they are not produced.
        sampling: how tokens are drawn.
        held: how many of the prompt's tokens the session holds already; they are not run again.
        fed: the tokens that the session holds.
        load_seconds: seconds until the model can run; the other times do not include it.
        prompt_seconds: seconds of the prompt's call, whose logits give the first token.
        decode_seconds: seconds of all later calls.
        produced: number of tokens produced.
        stopped: why the text ended: ``stop``, ``limit`` or ``context``.
    """

    session: Session
    prompt: Sequence[int]
    limit: int
    stop: frozenset[int]
    sampling: Sampling = field(default_factory=Sampling)
    held: int = 0
    fed: list[int] = field(default_factory=list)
    load_seconds: float = 0.0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    produced: int = 0
    stopped: str = "limit"

    def __iter__(self) -> Iterator[int]:
        draws = np.random.default_rng(self.sampling.seed)
        started = time.perf_counter()
        if not self.held:
            self.session.reset()
        _ = self.session.vocab_size  # waits until the model is loaded
        self.load_seconds = time.perf_counter() - started
        started = time.perf_counter()
        logits = self.session.extend(np.array(self.prompt[self.held :], np.int64))
        self.prompt_seconds = time.perf_counter() - started
        text = self.fed
        text[:] = self.prompt
        while self.produced < self.limit:
            require_finite(logits, self.session, text)
            token = choose(logits, self.sampling, draws)
            if token in self.stop:
                self.stopped = "stop"
                return
            self.produced += 1
            yield token
            if self.produced == self.limit:
                return
            if len(text) == self.session.context:
                self.stopped = "context"
                return
            started = time.perf_counter()
            logits = self.session.extend(np.array([token], np.int64))
            self.decode_seconds += time.perf_counter() - started
            text.append(token)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens per second after the first token; 0 when there is only one token or none."""
        return (self.produced - 1) / self.decode_seconds if self.decode_seconds else 0.0
