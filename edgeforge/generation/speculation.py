"""Speculative decoding: several tokens a call, of which those are kept that the model itself gives.

A drafter proposes tokens, and one call of the model gives its logits after each of them. The tokens
are kept up to the first that the model would not have chosen (Leviathan et al. 2023). The model's
choice is made as without a draft, with one draw for each token, so that greedy text and text of the
same seed stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from device_harness.finite import require_finite
from edgeforge.generation.drafters import Drafter
from edgeforge.generation.sampling import Generation, choose

NEAR: Final = 0.002
"""Two logits are near each other where they differ by at most this share of all logits' range.

The logits of one token then decide, as in plain decoding. A kernel may add in another order for
several tokens than for one: in float16, logits of the demo model moved by 0.0006 of their range.
Where activations are rounded to 8 bits they move further, for a number on the edge between two
codes takes the other one; and so do the keys and values that stay in the caches. No bound holds
there.
"""
_PLAIN_STEPS: Final = 24
_PLAIN_SECONDS: Final = 3.0
_PROBES: Final = 4


@dataclass(frozen=True)
class Speculated:
    """What speculation brought.

    Attributes:
        steps: calls of the model after the prompt's.
        proposed: tokens that were proposed.
        accepted: those of them that the model itself gave.
        run_again: steps of one token because two tokens were near each other.
        plain_tokens_per_second: the speed of plain decoding over the same text, measured at some
            of its places; 0 where it was not measured.
        speed_up: tokens per second over those of plain decoding; 0 where they were not measured.
        apart: by how much the logits of one token differ from those of the same token with a draft
            behind it, at some places of the text; 0 where they are the same, bit for bit, and None
            where it was not measured.
        near: the smallest distance of two logits that counted as near; 0 for drawn text.
    """

    steps: int
    proposed: int
    accepted: int
    run_again: int
    plain_tokens_per_second: float = 0.0
    speed_up: float = 0.0
    apart: float | None = None
    near: float = 0.0

    def lines(self, tokens: int) -> list[str]:
        """Returns what is said of it: a line of figures, and one of what is not as expected.

        Args:
            tokens: how many were produced.
        """
        each = (tokens - 1) / self.steps if self.steps else 0.0
        told = (
            f"[speculation: {each:.2f} tokens a step, {self.accepted} of {self.proposed} proposed "
            f"tokens accepted"
        )
        if self.plain_tokens_per_second:
            told += (
                f"; {self.speed_up:.2f} times as fast as plain decoding, "
                f"{self.plain_tokens_per_second:.1f} tokens/s"
            )
        if self.run_again:
            told += f"; {self.run_again} tokens decided alone, as two were nearly as likely there"
        lines = [f"{told}]"]
        if self.apart is not None and self.apart > self.near:
            lines.append(
                f"note: the runtime's kernels give other logits for several tokens than for one, "
                f"by up to {self.apart:.2g} here: where two tokens are nearly as likely, plain "
                f"decoding may take the other one"
            )
        return lines


@dataclass
class SpeculativeGeneration(Generation):
    """The continuation of a prompt in steps of several tokens.

    Attributes:
        drafter: proposes tokens; None proposes none.
        draft: how many tokens it is asked for at most.
        fixed: whether it is always asked for so many; else for more while its tokens are accepted,
            and for fewer where they are not.
        steps: calls of the model after the prompt's.
        proposed: tokens that were proposed.
        accepted: those of them that the model itself gave.
        run_again: steps of one token because two tokens were near each other.
        text: the prompt and the tokens behind it.
    """

    drafter: Drafter | None = None
    draft: int = 1
    fixed: bool = False
    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    run_again: int = 0
    text: list[int] = field(default_factory=list)
    _asked: int = 0
    _near: float = float("inf")

    def __iter__(self) -> Iterator[int]:
        draws = np.random.default_rng(self.sampling.seed)
        session, self.text = self.session, list(self.prompt)
        self._asked = self.draft
        started = time.perf_counter()
        session.use_drafts(True)
        _ = session.vocab_size  # waits until the model is loaded
        self.load_seconds = time.perf_counter() - started
        started = time.perf_counter()
        logits = session.extend(np.array(self.prompt, np.int64))
        self.prompt_seconds = time.perf_counter() - started
        require_finite(logits, session, self.text)
        ready = [choose(logits, self.sampling, draws)]
        while True:
            for token in ready:
                if token in self.stop:
                    self.stopped = "stop"
                    return
                self.produced += 1
                yield token
                if self.produced == self.limit:
                    return
            if len(self.text) == session.context:
                self.stopped = "context"
                return
            started = time.perf_counter()
            ready = self._step(ready[-1], draws)
            self.decode_seconds += time.perf_counter() - started

    def _step(self, token: int, draws: np.random.Generator) -> list[int]:
        """Runs a token and a draft behind it, and returns the tokens that come after it."""
        session, text = self.session, self.text
        text.append(token)
        room = min(self._asked, session.context - len(text), self.limit - self.produced - 1)
        proposed = self.drafter.propose(text, room)[:room] if room > 0 and self.drafter else []
        start = len(text) - 1
        rows = session.extend_draft(np.array([token, *proposed], np.int64))
        self.steps += 1
        self.proposed += len(proposed)
        chosen: list[int] = []
        for place, row in enumerate(rows):
            require_finite(row, session, [*text, *chosen])
            if proposed and self._is_near(row):
                # Kernels of several tokens round otherwise: one token decides as plain decoding.
                session.rewind(start + place)
                row = session.extend(np.array([([token, *proposed])[place]], np.int64))
                self.run_again += 1
                chosen.append(choose(row, self.sampling, draws))
                break
            chosen.append(choose(row, self.sampling, draws))
            if place == len(proposed) or chosen[-1] != proposed[place]:
                break
        kept = len(chosen) - 1
        session.rewind(start + 1 + kept)
        self.accepted += kept
        text += chosen[:-1]
        if proposed and not self.fixed:
            more = 2 * kept if kept == len(proposed) else kept + 1
            self._asked = max(1, min(self.draft, more))
        return chosen

    def _is_near(self, row: npt.NDArray[np.float32]) -> bool:
        """Whether the two largest of ``float32[vocab]`` logits are near each other."""
        if self.sampling.temperature > 0:
            return False
        second, first = np.partition(row, -2)[-2:]
        near = float(NEAR * (first - row.min()))
        self._near = min(self._near, near)
        return bool(first - second <= near)

    def result(self) -> Speculated:
        """What speculation brought, and the speed of plain decoding at places of the same text.

        The text of the session ends after it.
        """
        plain, apart = self._run_alone()
        own = self.decode_tokens_per_second
        return Speculated(
            steps=self.steps,
            proposed=self.proposed,
            accepted=self.accepted,
            run_again=self.run_again,
            plain_tokens_per_second=1 / plain if plain else 0.0,
            speed_up=own * plain,
            apart=apart,
            near=self._near if np.isfinite(self._near) else 0.0,
        )

    def _run_alone(self) -> tuple[float, float | None]:
        """Runs single tokens of the text again, and some of them with a draft behind them.

        Caches hold the whole text, so that any of its tokens can be run, the last ones first.

        Returns:
            The mean of a single token's seconds, 0 without any; and the largest difference that
            a draft makes to its logits, None without any.
        """
        first, last = len(self.prompt), len(self.text) - 2
        spread = np.linspace(last, first, max(0, min(_PLAIN_STEPS, last - first + 1)))
        seconds: list[float] = []
        apart: list[float] = []
        for place in dict.fromkeys(map(int, spread)):
            if sum(seconds) > _PLAIN_SECONDS:
                break
            self.session.rewind(place)
            tokens = np.array(self.text[place : place + 1 + self.draft], np.int64)
            started = time.perf_counter()
            alone = self.session.extend(tokens[:1])
            seconds.append(time.perf_counter() - started)
            if len(apart) < _PROBES:
                self.session.rewind(place)
                apart.append(float(np.abs(self.session.extend_draft(tokens)[0] - alone).max()))
        return float(np.mean(seconds)) if seconds else 0.0, max(apart, default=None)
