"""One timed run of an artifact, on the device that it is for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from device_harness.finite import bad_positions
from device_harness.session import Session, Tokens


@dataclass(frozen=True)
class TimedRun:
    """The seconds that one run took, by the device's own clock, and what it generated.

    Attributes:
        prompt_tokens: the length of the prompt.
        first_token_seconds: from the prompt to the logits of its last position.
        step_seconds: of each later token, from the token to the next logits.
        tokens: what was generated: the most likely token of the prompt and of each step in turn,
            one more than there are steps.
        peak_bytes: the peak resident memory so far of the process that runs the artifact.
        not_finite: how many calls gave NaN or infinite logits.
        where: a phrase for where the first of these come from; empty where that cannot be seen.
    """

    prompt_tokens: int
    first_token_seconds: float
    step_seconds: tuple[float, ...]
    tokens: tuple[int, ...]
    peak_bytes: int
    not_finite: int = 0
    where: str = ""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Reads the form that ``dataclasses.asdict`` gives.

        Raises:
            TypeError: a field is absent or unknown, or holds what it cannot.
            ValueError: a field holds what it cannot.
        """
        numbers = [data["first_token_seconds"], *data["step_seconds"]]
        if not all(isinstance(each, int | float) and 0 <= each < 1e9 for each in numbers):
            raise ValueError("a time is no number of seconds")
        counts = [data["prompt_tokens"], data["peak_bytes"], data["not_finite"], *data["tokens"]]
        if not all(type(each) is int and each >= 0 for each in counts):
            raise ValueError("a count is none")
        if len(data["tokens"]) != len(data["step_seconds"]) + 1:
            raise ValueError("there are not as many steps as tokens")
        row = {"step_seconds": tuple(data["step_seconds"]), "tokens": tuple(data["tokens"])}
        return cls(**{**data, **row, "where": str(data["where"])})


@runtime_checkable
class SelfTimed(Protocol):
    """A session that times itself, because this process's clock would count more than the runtime.

    Attributes:
        load_seconds: that loading took so far.
    """

    load_seconds: float

    def run_timed(self, prompt: Tokens, output: int) -> TimedRun:
        """Does what the function of this name does, by a clock of its own."""


def run_timed(session: Session, prompt: Tokens, output: int) -> TimedRun:
    """Runs a prompt and generates greedily, and times each call.

    Args:
        session: the artifact; its text is forgotten first.
        prompt: ``int64[t]``, not empty.
        output: how many tokens to generate, at least 1. The first comes of the prompt itself, so
            one step fewer is timed.

    Raises:
        DeviceError: the runtime fails, or prompt and output do not fit into the context.
    """
    session.reset()
    text = list(prompt)
    seconds, generated, bad = [], [], []
    given = np.asarray(prompt, np.int64)
    for _ in range(output):
        started = time.perf_counter()
        logits = session.extend(given)
        seconds.append(time.perf_counter() - started)
        if bad_positions(logits[None]):
            bad.append(len(text))
            logits = np.nan_to_num(logits, nan=-np.inf)
        generated.append(int(logits.argmax()))
        given = np.array(generated[-1:], np.int64)
        text.extend(given)
    where = ""
    if bad:
        where = session.first_not_finite(np.array(text[: bad[0]], np.int64)) or ""
    return TimedRun(
        prompt_tokens=len(prompt),
        first_token_seconds=seconds[0],
        step_seconds=tuple(seconds[1:]),
        tokens=tuple(generated),
        peak_bytes=session.peak_bytes,
        not_finite=len(bad),
        where=where,
    )
