"""Runs what ships as an app runs it, over the whole declared context, and scores it.

The graph that gives the logits of every position is for verification alone. Apps run other graphs:
a prompt in chunks, then token by token, over caches that fill up. Those are scored here, against
QUANTIZED at the same positions, and held against the graph of all positions where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from device_harness.session import Session
from edgeforge.reference.choices import Following
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.verification.chosen_experts import RouterReader
from edgeforge.verification.each_session import EachSession
from edgeforge.verification.intervals import (
    Interval,
    percentile_interval,
    resampled_means,
    tail_share,
)
from edgeforge.verification.metrics import Divergence, DivergenceMeter
from edgeforge.verification.passes import plan_drafts, plan_passes, positions_of
from edgeforge.verification.sample import LongText
from edgeforge.verification.shipped_routing import ShippedRouting, Unfollowed, follow_shipped

# Positions of the graph of all positions that what ships is held against.
_ALL_POSITIONS = 512
_WORST = 3
_UNITS = 16


@dataclass(frozen=True)
class Shipped:
    """What ships, run as an app runs it, against QUANTIZED at the same positions.

    Attributes:
        text: what text it ran over.
        context: the declared context, in tokens.
        reached: the positions of it that were reached, from the first on.
        passes: how many texts were begun.
        prefill: of the last tokens of prompts and of their chunks; None where there is none.
        decode: of tokens that were run one by one; None where there is none.
        kl_mean: over all of them, nats a token.
        kl_max: the largest.
        interval: a rough 95 % interval of the mean; None where there are too few positions.
        all_positions: of the graph that gives all logits against what ships, at the positions that
            both gave, and before which they chose the same experts; None where there are none.
        all_positions_max: the largest divergence of that graph from QUANTIZED at those positions; 0
            where the artifact has no such graph.
        entropy: what QUANTIZED's predictions leave open there, in the mean, nats.
        not_finite: positions with NaN or infinite logits.
        worst: the positions with the largest divergence from QUANTIZED, a phrase each.
        furthest: those at which the two graphs are furthest apart.
    """

    text: str
    context: int
    reached: int
    passes: int
    prefill: Divergence | None
    decode: Divergence | None
    kl_mean: float
    kl_max: float
    interval: Interval | None
    all_positions: Divergence | None
    entropy: float
    not_finite: int
    worst: tuple[str, ...]
    furthest: tuple[str, ...]
    all_positions_max: float = 0.0

    @property
    def positions(self) -> int:
        """How many logits were scored."""
        return sum(each.tokens for each in (self.prefill, self.decode) if each is not None)

    @property
    def unreached(self) -> str:
        """Which positions were not reached, a phrase; empty where all were."""
        if self.reached >= self.context:
            return ""
        return f"positions {self.reached} to {self.context - 1}"


@dataclass
class _Run:
    """One artifact's calls, and their logits in order."""

    calls: list[list[int]]
    drafts: list[int] = field(default_factory=list)
    positions: int = 1
    ends: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    whole: Tensor | None = None
    followed: ShippedRouting | None = None


def score_shipped(
    text: LongText,
    quantized: ReferenceRunner,
    sessions: Sequence[Session],
    progress: Callable[[int, int], None],
    drafts: Sequence[int] = (),
    readers: Sequence[RouterReader] = (),
) -> tuple[list[Shipped], list[ShippedRouting | None]]:
    """Runs artifacts over a text as an app would, and QUANTIZED in one pass.

    Args:
        text: as long as the context, or as what may be spent on it.
        quantized: QUANTIZED.
        sessions: the artifacts.
        progress: told how much is done, and of how much.
        drafts: of how many last tokens each artifact's graph for drafts gives the logits; 1 where
            there is none; empty where no artifact has one.
        readers: of each artifact, what reads its choices of experts; empty for no mixture.

    Returns:
        One score for each artifact, and how its tokens chose experts, where they did.
    """
    tokens = np.array(text.tokens, np.int64)
    runs = [_Run(plan_passes(len(tokens), session.chunks)) for session in sessions]
    for run, session, positions in zip(runs, sessions, drafts, strict=False):
        if 1 < positions < len(tokens) and session.runs_drafts:
            run.drafts, run.positions = plan_drafts(len(tokens), positions), positions
    given = {at for run in runs for calls in run.calls for at in positions_of(calls)}
    given |= {at for run in runs for _, rows in _draft_rows(run) for at in rows}
    wanted = sorted(given)
    places = {position: row for row, position in enumerate(wanted)}
    progress(0, 2)
    own = Following() if readers else None
    expected = quantized.logits_at(torch.from_numpy(tokens), torch.tensor(wanted), own)
    progress(1, 2)
    with EachSession(sessions) as each:
        each.run(lambda session, run: _drive(tokens, session, run), runs)
    if own is not None:
        unfollowed = Unfollowed(tokens, quantized, own, wanted, expected)
        for run, reader in zip(runs, readers, strict=True):
            rows = (
                [end for end in run.ends if end < _ALL_POSITIONS] if run.whole is not None else []
            )
            run.followed = follow_shipped(unfollowed, reader, run.calls, run.ends, rows)
    progress(2, 2)
    scores = [_scored(text, run, expected, places) for run in runs]
    return scores, [run.followed for run in runs]


def _drive(tokens: np.ndarray[tuple[int], np.dtype[np.int64]], session: Session, run: _Run) -> None:
    for calls in run.calls:
        session.reset()
        done = 0
        for size, end in zip(calls, positions_of(calls), strict=True):
            logits = session.extend(tokens[done : done + size])
            run.logits.append(torch.from_numpy(logits.copy()))
            run.ends.append(end)
            run.sizes.append(size)
            done += size
    if run.drafts:
        _drive_drafts(tokens, session, run)
    session.reset()
    if session.has_all_positions:
        rows = [end for end in run.ends if end < _ALL_POSITIONS]
        given = torch.from_numpy(session.logits(tokens[: max(rows) + 1]))
        run.whole = given[rows].clone()


def _drive_drafts(
    tokens: np.ndarray[tuple[int], np.dtype[np.int64]], session: Session, run: _Run
) -> None:
    """Runs drafts, each after another one was taken back, as speculation does."""
    session.use_drafts(True)
    done = 0
    for size, rows in _draft_rows(run):
        part = tokens[done : done + size]
        if size > run.positions:
            logits = session.extend(part)[None]
        else:
            session.extend_draft(part[::-1].copy())
            session.rewind(done)
            logits = session.extend_draft(part)
        run.logits += list(torch.from_numpy(logits.copy()))
        run.ends += rows
        run.sizes += [size] * len(rows)
        done += size
    session.use_drafts(False)


def _draft_rows(run: _Run) -> list[tuple[int, list[int]]]:
    """The calls of a pass of drafts: how many tokens each takes, and the positions it gives."""
    found, done = [], 0
    for size in run.drafts:
        done += size
        first = done - 1 if size > run.positions else done - size
        found.append((size, list(range(first, done))))
    return found


def _scored(text: LongText, run: _Run, expected: Tensor, places: dict[int, int]) -> Shipped:
    own = torch.stack(run.logits)
    wanted = expected[torch.tensor([places[end] for end in run.ends])]
    both = torch.tensor([end < _ALL_POSITIONS for end in run.ends])
    of_whole, comparable = wanted[both], both
    if run.followed is not None:
        wanted, of_whole = run.followed.expected, run.followed.of_whole
        comparable = both & run.followed.alike
    is_chunk = torch.tensor([size > 1 for size in run.sizes])
    finite = own.isfinite().all(-1)
    meter = DivergenceMeter()
    divergence = meter.add(wanted, own)[:, 0]
    everything = meter.result()
    log_probabilities = expected.log_softmax(-1)
    apart: Divergence | None = None
    furthest: tuple[str, ...] = ()
    largest = 0.0
    if run.whole is not None:
        meter = DivergenceMeter()
        meter.add(of_whole, run.whole)
        largest = meter.result().kl_max
    if run.whole is not None and bool(comparable.any()):
        meter = DivergenceMeter()
        between = meter.add(run.whole[comparable[both]], own[comparable])[:, 0]
        apart = meter.result()
        calls = zip(_calls(run), comparable.tolist(), strict=True)
        furthest = _worst(between, [each for each, kept in calls if kept])
    return Shipped(
        text=text.label,
        context=text.context,
        reached=len(text.tokens),
        passes=len(run.calls),
        prefill=_part(wanted, own, is_chunk),
        decode=_part(wanted, own, ~is_chunk),
        kl_mean=everything.kl_mean,
        kl_max=everything.kl_max,
        interval=_interval(divergence),
        all_positions=apart,
        entropy=-float((log_probabilities.exp() * log_probabilities).sum(-1).double().mean()),
        not_finite=int((~finite).sum()),
        worst=_worst(divergence, _calls(run)),
        furthest=furthest,
        all_positions_max=largest,
    )


def _part(expected: Tensor, own: Tensor, chosen: Tensor) -> Divergence | None:
    if not bool(chosen.any()):
        return None
    meter = DivergenceMeter()
    meter.add(expected[chosen], own[chosen])
    return meter.result()


def _calls(run: _Run) -> list[tuple[int, int]]:
    return list(zip(run.ends, run.sizes, strict=True))


def _worst(divergence: Tensor, calls: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """The calls that diverge most: their last position, and how many tokens they took."""
    order = divergence.nan_to_num(torch.inf).argsort(descending=True).tolist()
    phrases = (
        f"position {calls[at][0]} "
        f"({'one token' if calls[at][1] == 1 else f'{calls[at][1]} tokens'} at once)"
        for at in order
    )
    return tuple(dict.fromkeys(phrases))[:_WORST]


def _interval(divergence: Tensor) -> Interval | None:
    """An interval of the mean, by a bootstrap of calls in a row."""
    count = min(_UNITS, len(divergence) // 2)
    if count < _UNITS // 2:
        return None
    parts = divergence.double().tensor_split(count)
    sums = np.array([[float(part.sum())] for part in parts])
    counts = np.array([[float(len(part))] for part in parts])
    return percentile_interval(resampled_means(sums, counts)[:, 0], tail_share(count))
