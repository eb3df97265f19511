"""Holds a mixture's artifact against QUANTIZED with the experts that its tokens chose.

Where a router's logits are nearly equal, what rounding moves decides which expert a token gets, and
all of its logits jump. That says nothing of the artifact's arithmetic. So what is computed and what
is chosen are held apart: QUANTIZED follows the artifact's choices, and its logits are what the
artifact's must be, for every token. The choices themselves are held against QUANTIZED's router: how
many are others than its own, and how far they are from it (`edgeforge.reference.choices`). A router
that chooses otherwise for another reason than rounding fails by these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from device_harness.session import Tokens
from edgeforge.reference.choices import Choice, Following
from edgeforge.reference.walk import ReferenceRunner, grouped
from edgeforge.verification.chosen_experts import RouterReader
from edgeforge.verification.metrics import Divergence, DivergenceMeter
from edgeforge.verification.routing_words import routing_words


@dataclass(frozen=True)
class Routing:
    """How an artifact's tokens chose experts, beside QUANTIZED's own choices.

    Attributes:
        tokens: tokens whose choices were compared.
        changed: those of them for which some router chose others than QUANTIZED's.
        agreement: share of the chosen experts that QUANTIZED's router chooses too, of the router
            where it is least.
        router: which one that is, counted from 0.
        gap: how far the furthest choice is from QUANTIZED's router, in standard deviations of a
            token's logits there (`edgeforge.reference.choices.gap_of`); of all texts that ran.
        own: ARTIFACT against QUANTIZED that follows no choices but its own.
        place: where ``router`` is, in words: ``layer 3``, or ``layer 3, attention``.
        shipped_tokens: as ``tokens``, of what ships and of greedy text.
        shipped_changed: as ``changed``.
        apart: positions at which what ships is not held against the graph of all positions, because
            the two chose otherwise there or before.
        unread: why choices could not be read everywhere; empty where they could.
    """

    tokens: int
    changed: int
    agreement: float
    router: int
    gap: float
    own: Divergence
    place: str
    shipped_tokens: int = 0
    shipped_changed: int = 0
    apart: int = 0
    unread: str = ""

    @property
    def words(self) -> str:
        """What a user must know of it, without a full stop."""
        return routing_words(
            self.tokens,
            self.changed,
            self.agreement,
            self.own.kl_mean,
            self.unread,
            self.place,
        )


@dataclass(frozen=True)
class Followed:
    """QUANTIZED on a text, with an artifact's choices.

    Attributes:
        logits: ``float32[t, vocab]``.
        following: what each router was to choose and would have chosen.
    """

    logits: Tensor
    following: Following


class RoutingCounter:
    """Counts tokens and their choices, text by text."""

    def __init__(self) -> None:
        self.tokens = self.changed = 0
        self.gap = 0.0
        self.shares: Tensor | None = None

    def add(self, tokens: int, following: Following | None) -> None:
        """Adds the first tokens of a text.

        Args:
            tokens: how many.
            following: what each router chose; None where every choice was QUANTIZED's own.
        """
        self.tokens += tokens
        if following is None:
            if self.shares is not None:
                self.shares += tokens
            return
        shares = torch.stack(following.shares)[:, :tokens].double().sum(-1)
        self.shares = shares + (self.tokens - tokens if self.shares is None else self.shares)
        same = torch.stack(following.same)[:, :tokens]
        self.changed += int((~same.all(0)).sum())
        self.gap = max(self.gap, float(torch.stack(following.gaps)[:, :tokens].max()))

    @property
    def least(self) -> tuple[float, int]:
        """The least share of experts that QUANTIZED's router chooses too, and its router."""
        if self.shares is None:
            return 1.0, 0
        at = int(self.shares.argmin())
        return float(self.shares[at]) / self.tokens, at


class RoutingMeter:
    """What is measured of an artifact's choices over blocks.

    Args:
        reader: reads them.
        places: where each router is, in words.

    Attributes:
        choices: of each block; None where they were not read.
        apart: takes ARTIFACT against QUANTIZED with its own choices.
    """

    def __init__(self, reader: RouterReader, places: Sequence[str]) -> None:
        self._reader, self._count, self._places = reader, RoutingCounter(), places
        self.choices: list[list[Choice]] | None = None
        self.apart = DivergenceMeter()

    def read(self, blocks: Sequence[Tokens]) -> None:
        """Reads the choices of ``int64[t]`` blocks."""
        self.choices = self._reader.choices(blocks)

    def add(self, tokens: int, followed: Followed | None) -> None:
        """Adds a block's choices."""
        if self.choices is not None:
            self._count.add(tokens, None if followed is None else followed.following)

    def result(self) -> Routing:
        """What was found."""
        count = self._count
        agreement, router = count.least
        own, unread = self.apart.result(), self._reader.why_none
        return Routing(
            count.tokens,
            count.changed,
            agreement,
            router,
            count.gap,
            own,
            self._places[router],
            unread=unread,
        )


def follow(
    quantized: ReferenceRunner,
    blocks: Sequence[Tensor],
    chosen: Sequence[list[list[Choice]] | None],
) -> Iterator[tuple[Tensor, list[Followed | None]]]:
    """Runs QUANTIZED with its own choices, and again where an artifact's are others.

    Args:
        quantized: QUANTIZED.
        blocks: ``int64[t]`` each.
        chosen: of each artifact, the choices in each block; None where they are not known.

    Yields:
        For each block its logits, and for each artifact the run that followed it; None where that
        would be the same.
    """
    if all(each is None for each in chosen):
        for logits in quantized.logits(blocks):
            yield logits, [None for _ in chosen]
        return
    done = 0
    for group in grouped(blocks):
        records = [Following() for _ in group]
        free = quantized.logits(group, records)
        logits = next(free)  # the walk of all blocks comes before the first one's logits
        again: list[tuple[int, int]] = []
        followings: list[Following] = []
        for at, record in enumerate(records):
            for artifact, choices in enumerate(chosen):
                if choices is not None and record.differs(choices[done + at]):
                    again.append((at, artifact))
                    followings.append(Following(choices[done + at]))
        followed = quantized.logits([group[at] for at, _ in again], followings)
        waiting = iter(zip(again, followings, strict=True))
        place = next(waiting, None)
        for at in range(len(group)):
            if at:
                logits = next(free)
            found: list[Followed | None] = [None for _ in chosen]
            while place is not None and place[0][0] == at:
                found[place[0][1]] = Followed(next(followed), place[1])
                place = next(waiting, None)
            yield logits, found
        done += len(group)
