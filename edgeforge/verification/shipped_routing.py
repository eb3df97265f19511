"""Follows the choices of experts of what ships, pass by pass (`edgeforge.verification.routing`).

A pass that begins the text again, in calls of other lengths, may choose otherwise in near ties. So
may the graph of all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from device_harness.session import Tokens
from edgeforge.reference.choices import Choice, Following
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.verification.chosen_experts import RouterReader
from edgeforge.verification.passes import positions_of
from edgeforge.verification.routing import Routing, RoutingCounter


@dataclass(frozen=True)
class Unfollowed:
    """QUANTIZED on the text of what ships, with its own choices.

    Attributes:
        tokens: the text, ``int64[t]``.
        quantized: QUANTIZED.
        following: what it chose.
        wanted: the positions whose logits are known, in order.
        logits: ``float32[positions, vocab]``.
    """

    tokens: Tokens
    quantized: ReferenceRunner
    following: Following
    wanted: Sequence[int]
    logits: Tensor


@dataclass(frozen=True)
class ShippedRouting:
    """What what ships is held against.

    Attributes:
        expected: QUANTIZED's logits for each of an artifact's, ``float32[n, vocab]``.
        of_whole: the same for the graph of all positions; empty where there is none.
        alike: whether that graph chose as the call did, there and before: ``bool[n]``.
        count: the choices of all passes.
        left_out: at how many positions that both gave it did not.
    """

    expected: Tensor
    of_whole: Tensor
    alike: Tensor
    count: RoutingCounter
    left_out: int


def follow_shipped(
    own: Unfollowed,
    reader: RouterReader,
    passes: Sequence[Sequence[int]],
    ends: Sequence[int],
    rows: Sequence[int],
) -> ShippedRouting | None:
    """Runs QUANTIZED with the choices of each pass.

    Args:
        own: QUANTIZED with its own.
        reader: reads the artifact's.
        passes: how many tokens each call takes, for each pass.
        ends: the position of each of the artifact's logits: of the passes, and of drafts after
            them, whose graph is held against what the first pass chose.
        rows: of these, the positions that the graph of all positions gave too.

    Returns:
        None where the choices cannot be read.
    """
    texts = [own.tokens[: sum(calls)] for calls in passes]
    chosen = reader.choices(texts, passes)
    drafts = ends[sum(map(len, passes)) :]
    whole: list[Choice] | None = None
    if rows and chosen is not None:
        length = len(own.tokens) if drafts else max(rows) + 1
        found = reader.choices([own.tokens[:length]])
        whole = None if found is None else found[0]
    if chosen is None or (rows and whole is None):
        return None
    walks, alike = _Walks(own), []
    expected = [
        walks.logits(choices, positions_of(calls))
        for calls, choices in zip(passes, chosen, strict=True)
    ]
    for calls, choices in zip(passes, chosen, strict=True):
        alike += _alike_until(positions_of(calls), choices, whole)
    count = walks.count
    if drafts:
        walks.count = RoutingCounter()  # what drafts chose was not seen
        expected.append(walks.logits(whole or chosen[0], drafts))
        alike += [whole is not None for _ in drafts]
    of_whole = own.logits[:0]
    if whole is not None:
        walks.count = RoutingCounter()
        of_whole = walks.logits(whole, rows)
    apart = sum(not each for each, end in zip(alike, ends, strict=True) if end in set(rows))
    return ShippedRouting(torch.cat(expected), of_whole, torch.tensor(alike), count, apart)


class _Walks:
    """QUANTIZED's runs of one text or its beginning, each with other choices.

    Args:
        own: the one with its own.

    Attributes:
        count: takes the choices of each run that is asked for.
    """

    def __init__(self, own: Unfollowed) -> None:
        self._own, self.count = own, RoutingCounter()
        self._known: list[tuple[Following, dict[int, Tensor]]] = []

    def logits(self, choices: Sequence[Choice], positions: Sequence[int]) -> Tensor:
        """Logits of some of the wanted positions, ``float32[n, vocab]``."""
        own, tokens = self._own, len(choices[0].known)
        if not own.following.differs(choices):
            self.count.add(tokens, None)
            places = {position: row for row, position in enumerate(own.wanted)}
            return own.logits[torch.tensor([places[at] for at in positions])]
        for following, found in self._known:
            made = following.made()
            if made[0].shape[1] >= tokens and all(
                bool(each.same(sets).all()) for each, sets in zip(choices, made, strict=True)
            ):
                self.count.add(tokens, following)
                return torch.stack([found[at] for at in positions])
        following = Following(choices)
        wanted = [at for at in own.wanted if at < tokens]
        text = torch.from_numpy(own.tokens[:tokens])
        made_logits = own.quantized.logits_at(text, torch.tensor(wanted), following)
        found = dict(zip(wanted, made_logits, strict=True))
        self._known.append((following, found))
        self.count.add(tokens, following)
        return torch.stack([found[at] for at in positions])


def with_shipped(
    found: Routing | None,
    shipped: ShippedRouting | None,
    greedy: RoutingCounter,
    reader: RouterReader,
) -> Routing | None:
    """Adds the choices of what ships and of greedy text to those of the blocks."""
    if found is None:
        return None
    counts = [greedy] if shipped is None else [shipped.count, greedy]
    return replace(
        found,
        gap=max(found.gap, *(each.gap for each in counts)),
        shipped_tokens=sum(each.tokens for each in counts),
        shipped_changed=sum(each.changed for each in counts),
        apart=0 if shipped is None else shipped.left_out,
        unread=reader.why_none,
    )


def _alike_until(
    positions: Sequence[int], choices: Sequence[Choice], whole: Sequence[Choice] | None
) -> list[bool]:
    """Whether the graph of all positions chose as a pass did, up to each position."""
    if whole is None:
        return [False for _ in positions]
    tokens = min(len(choices[0].known), len(whole[0].known))
    pairs = zip(choices, whole, strict=True)
    other = torch.stack([_first(one, tokens).same_as(two) for one, two in pairs])
    changed = (~other.all(0)).nonzero()[:, 0]
    first = int(changed[0]) if len(changed) else tokens
    return [at < first for at in positions]


def _first(choice: Choice, tokens: int) -> Choice:
    return Choice(choice.sets[:, :tokens], choice.known[:tokens])
