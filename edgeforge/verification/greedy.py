"""Greedy text of an artifact, held against what its references would have chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from device_harness.finite import bad_positions
from device_harness.session import Session
from edgeforge.reference.choices import Following
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.verification.chosen_experts import RouterReader
from edgeforge.verification.each_session import EachSession
from edgeforge.verification.routing import RoutingCounter

GREEDY_TOKENS = 48
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class GreedyAgreement:
    """Greedy tokens of the artifact held against a reference's choice at each.

    Attributes:
        prompts: how many continuations.
        tokens: tokens of each.
        same: mean number of tokens before the first that the reference would not choose.
        not_finite: of the artifact's steps, how many gave NaN or infinite logits.
        worst_gap: how much likelier a reference found its own choice than the artifact's, nats, at
            the token where that was most; of all tokens, for the reference saw the same text.
        worst: where that is, a phrase.
    """

    prompts: int
    tokens: int
    same: float
    not_finite: int = 0
    worst_gap: float = 0.0
    worst: str = ""


def greedy_agreement(
    prompts: Sequence[Sequence[int]],
    sessions: Sequence[Session],
    references: Sequence[ReferenceRunner],
    progress: Callable[[int, int], None],
    readers: Sequence[RouterReader] = (),
    counters: Sequence[RoutingCounter] = (),
) -> list[list[GreedyAgreement]]:
    """Lets artifacts continue prompts greedily, and asks each reference at every step.

    An artifact runs as an app would run it: the prompt at once, then token by token through its
    caches. A reference sees the whole text in one pass: up to the first difference that gives
    what it would have chosen itself.

    Args:
        prompts: token ids.
        sessions: ARTIFACT, of one program each.
        references: FLOAT, QUANTIZED or others.
        progress: told how many prompts are done, and of how many.
        readers: of each artifact, what reads its choices of experts, which the first reference
            follows; empty for no mixture.
        counters: take these choices, where they can be read.

    Returns:
        For each artifact, one agreement for each reference.
    """
    continued = [_Continued() for _ in sessions]
    with EachSession(sessions) as each:
        for index, prompt in enumerate(prompts):
            progress(index, len(prompts))
            each.run(partial(_continue, prompt), continued)
    texts = [each.texts for each in continued]
    agreements: list[list[GreedyAgreement]] = [[] for _ in sessions]
    followings = _followings(prompts, texts, readers) if readers else None
    for index, reference in enumerate(references):
        # The texts of all artifacts at once: a reference reads its weights once for them.
        given = followings if index == 0 else None
        wanted = reference.logits([text for own in texts for text in own], given)
        for own, found in zip(texts, agreements, strict=True):
            found.append(_agreement(prompts, own, [next(wanted) for _ in own]))
    if followings is not None:
        each_text = iter(followings)
        for own, counter, reader in zip(texts, counters, readers, strict=True):
            for text, following in [(text, next(each_text)) for text in own]:
                if not reader.why_none:
                    counter.add(len(text), following)
    return [
        [replace(agreement, not_finite=each.not_finite) for agreement in found]
        for each, found in zip(continued, agreements, strict=True)
    ]


def greedy_prompts(blocks: Sequence[Sequence[int]], count: int, context: int) -> list[list[int]]:
    """Beginnings of blocks spread over a text, short enough to leave room to continue."""
    length = max(1, min(_PROMPT_TOKENS, context // 2))
    step = max(1, len(blocks) // count)
    return [list(block[:length]) for block in blocks[::step]][:count]


@dataclass
class _Continued:
    """An artifact's texts, ``int64[t]`` each, and how many of its steps were not finite."""

    texts: list[Tensor] = field(default_factory=list)
    not_finite: int = 0


def _continue(prompt: Sequence[int], session: Session, continued: _Continued) -> None:
    """Adds a prompt with the tokens that an artifact finds likeliest after it."""
    tokens = list(prompt)
    count = min(GREEDY_TOKENS, session.context - len(tokens))
    session.reset()
    logits = session.extend(np.array(tokens, np.int64))
    for index in range(count):
        continued.not_finite += bool(bad_positions(logits[None]))
        tokens.append(int(logits.argmax()))
        if index + 1 < count:
            logits = session.extend(np.array(tokens[-1:], np.int64))
    continued.texts.append(torch.tensor(tokens, dtype=torch.int64))


def _followings(
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[Tensor]],
    readers: Sequence[RouterReader],
) -> list[Following]:
    """What follows the choices that each text's tokens made while it was generated."""
    found: list[Following] = []
    for own, reader in zip(texts, readers, strict=True):
        calls = [
            [len(prompt), *[1] * (len(text) - len(prompt))]
            for prompt, text in zip(prompts, own, strict=True)
        ]
        chosen = reader.choices([text.numpy() for text in own], calls)
        found += [Following() for _ in own] if chosen is None else map(Following, chosen)
    return found


def _agreement(
    prompts: Sequence[Sequence[int]], texts: Sequence[Tensor], wanted: Sequence[Tensor]
) -> GreedyAgreement:
    """Continued prompts against a reference's logits of them, ``float32[t, vocab]`` each."""
    same, lengths = [], []
    gap, worst = 0.0, ""
    for index, (prompt, text, logits) in enumerate(zip(prompts, texts, wanted, strict=True)):
        steps = logits[len(prompt) - 1 : -1]
        chosen = steps.argmax(-1)
        behind = steps.amax(-1) - steps.gather(-1, text[len(prompt) :, None])[:, 0]
        if len(behind) and not float(behind.max()) <= gap:  # NaN is worst of all
            at = int(behind.argmax())
            gap, worst = float(behind[at]), f"token {len(prompt) + at} of greedy text {index}"
        differs = (chosen != text[len(prompt) :]).nonzero()
        lengths.append(len(text) - len(prompt))
        same.append(int(differs[0]) if len(differs) else lengths[-1])
    mean = sum(same) / len(same)
    return GreedyAgreement(len(texts), max(lengths), mean, worst_gap=gap, worst=worst)
