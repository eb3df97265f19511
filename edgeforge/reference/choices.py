"""Which experts tokens choose, and a walk in which they choose what they chose elsewhere.

Where two of a router's logits are nearly equal, the last bit of an activation decides which expert
a token gets, and all of the token's sum changes. So a reference can follow the choices of a
runtime: its routers then compute weights for the experts that were chosen there, from its own
logits. How far a choice is from its own is recorded (`Following.gaps`): rounding moves near ties
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from quant.program import dialect
from quant.program.program import Program, node_argument

_FIRST, _SECOND = (0, 1), (2, 3)


@dataclass(frozen=True)
class Choice:
    """What one router chose for the tokens of a text.

    Attributes:
        sets: ``bool[n, t, E]``. Of `quant.program.expert_ops.route`, the experts of each token,
            with n = 1. Of ``route_sparse_mixer``, n = 4: the first expert, the candidates whose
            softmax its weight is a share of, and the same of the second.
        known: ``bool[t]``, false for tokens whose choice was not seen; they choose by themselves.
    """

    sets: Tensor
    known: Tensor

    def same(self, other: Tensor) -> Tensor:
        """For which tokens other sets are the same, or not known: ``bool[t]``.

        Args:
            other: sets of as many tokens, or more.
        """
        return (self.sets == other[:, : len(self.known)]).all(-1).all(0) | ~self.known

    def same_as(self, other: Choice) -> Tensor:
        """For which tokens another choice is the same, or one of both is not known: ``bool[t]``.

        Args:
            other: a choice of as many tokens, or more.
        """
        return self.same(other.sets) | ~other.known[: len(self.known)]


class Following:
    """One text's choices in a walk: those to make, and what the walk would have chosen itself.

    Args:
        choices: of each router, in the program's order; None where the walk chooses by itself.

    Attributes:
        own: what each router would have chosen, as `Choice.sets`.
        same: for which tokens that is what it was to choose: ``bool[t]`` for each router.
        shares: the share of a token's experts that it would have chosen too, ``float32[t]`` for
            each router; where SparseMixer's candidates are others, so is the expert.
        gaps: how far the choice made is from the router's own, ``float32[t]`` for each router; 0
            where they are the same (`gap_of`).
    """

    def __init__(self, choices: Sequence[Choice] | None = None) -> None:
        self._choices = choices
        self.own: list[Tensor] = []
        self.same: list[Tensor] = []
        self.shares: list[Tensor] = []
        self.gaps: list[Tensor] = []

    def weights(self, node: fx.Node, logits: Tensor) -> Tensor:
        """The weights of the experts, ``float[1, t, E]``, of the router whose turn it is.

        Args:
            node: the call of a router.
            logits: ``float[1, t, E]``.
        """
        assert callable(node.target)
        made: Tensor = node.target(logits, *node.args[1:])
        own = own_sets(node, logits[0].float())
        self.own.append(own)
        tokens = logits.shape[1]
        same, gaps = torch.ones(tokens, dtype=torch.bool), torch.zeros(tokens)
        shares = torch.ones(tokens)
        if self._choices is not None:
            choice = self._choices[len(self.own) - 1]
            same = choice.same(own)
            rows = (~same).nonzero()[:, 0]
            if len(rows):
                asked, scores = choice.sets[:, rows], logits[0, rows].float()
                made = made.clone()
                made[0, rows] = weights_by(node, scores, asked).to(made.dtype)
                typical = _spread(logits[0].float()).square().mean().sqrt()
                gaps[rows] = gap_of(node, scores, asked, float(typical))
                shares[rows] = _shared(asked, own[:, rows])
        self.same.append(same)
        self.shares.append(shares)
        self.gaps.append(gaps)
        return made

    def made(self) -> list[Tensor]:
        """The choices that the walk made, as `Choice.sets` of each router."""
        if self._choices is None:
            return self.own
        pairs = zip(self._choices, self.own, strict=True)
        return [torch.where(each.known[:, None], each.sets, own) for each, own in pairs]

    def differs(self, choices: Sequence[Choice]) -> bool:
        """Whether any of some routers' choices, of as many tokens or fewer, is another one."""
        pairs = zip(choices, self.own, strict=True)
        return not all(bool(choice.same(own).all()) for choice, own in pairs)


def routers(order: Sequence[fx.Node]) -> list[fx.Node]:
    """The calls of routers among a program's calls."""
    return [node for node in order if node.target in dialect.ROUTES]


def router_places(program: Program) -> list[str]:
    """Where each router of a program is, in words: ``layer 3``, or ``layer 3, attention``.

    A layer has a router for each of its mixtures of experts, in the program's order.
    """
    return [_place(program, node) for node in routers(list(program.graph.nodes))]


def _place(program: Program, node: fx.Node) -> str:
    while node.target not in (dialect.LINEAR, dialect.QUANT_LINEAR):
        node = node_argument(node, 0)
    name = program.inputs[node_argument(node, 1).name].name
    _, _, layer, part, *_ = name.split(".")
    return f"layer {layer}, attention" if part == "self_attn" else f"layer {layer}"


def own_sets(node: fx.Node, logits: Tensor) -> Tensor:
    """What a router chooses by ``float32[t, E]`` logits, as `Choice.sets`."""
    if node.target is dialect.ROUTE:
        chosen = node.args[1]
        assert isinstance(chosen, int)
        shares = torch.softmax(logits, -1)
        order = torch.sort(shares, dim=-1, descending=True, stable=True).indices[:, :chosen]
        return _marked(logits, order)[None]
    found, left = [], logits
    for _ in range(2):
        largest = left.amax(-1, keepdim=True)
        index = torch.sort(left, dim=-1, descending=True, stable=True).indices[:, :1]
        far = _beyond(node, logits, largest) > 0
        found += [_marked(logits, index), ~far & (left > -torch.inf)]
        left = left.scatter(-1, index, -torch.inf)
    return torch.stack(found)


def weights_by(node: fx.Node, logits: Tensor, sets: Tensor) -> Tensor:
    """The weights ``float32[t, E]`` that a router gives the experts that were chosen for it.

    Args:
        node: the call.
        logits: ``float32[t, E]``.
        sets: `Choice.sets`.
    """
    if node.target is dialect.ROUTE:
        kept = torch.softmax(logits, -1) * sets[0]
        return kept / kept.sum(-1, keepdim=True) if node.args[2] else kept
    made = torch.zeros_like(logits)
    for one, candidates in (_FIRST, _SECOND):
        shares = torch.softmax(logits.masked_fill(~sets[candidates], -torch.inf), -1)
        made = made + shares * sets[one]
    return made


def gap_of(node: fx.Node, logits: Tensor, sets: Tensor, typical: float = 0.0) -> Tensor:
    """How far a choice is from what a router's logits say, in standard deviations of these.

    By so much the logits of a token would have to move for the choice to be the router's own: the
    best expert that was not chosen beyond the worst that was, or a candidate of SparseMixer beyond
    the bound that it is compared with. Infinite where another number of experts was chosen.

    The few logits of a token may all lie close together by chance, and rounding moves them as far
    as those of other tokens: then the router's typical deviation counts, and not the token's.

    Args:
        node: the call.
        logits: ``float32[t, E]``.
        sets: the choice, `Choice.sets`.
        typical: the root mean square of the standard deviations of all tokens of the text.

    Returns:
        ``float32[t]``.
    """
    spread = _spread(logits).clamp_min(max(typical, 1e-12))
    if node.target is dialect.ROUTE:
        gap = _behind(logits, sets[0], torch.ones_like(sets[0]))
        chosen = node.args[1]
        assert isinstance(chosen, int)
        wrong = sets[0].sum(-1).ne(chosen)
    else:
        left = torch.ones_like(sets[0])
        gap, wrong = torch.zeros(len(logits)), torch.zeros(len(logits), dtype=torch.bool)
        for one, candidates in (_FIRST, _SECOND):
            gap = torch.maximum(gap, _behind(logits, sets[one], left))
            largest = logits.masked_fill(~left, -torch.inf).amax(-1, keepdim=True)
            beyond = _beyond(node, logits, largest)
            moved = sets[candidates].ne(beyond <= 0) & left
            gap = torch.maximum(gap, beyond.abs().masked_fill(~moved, 0).amax(-1))
            wrong = wrong | sets[one].sum(-1).ne(1)
            left = left & ~sets[one]
    return (gap / spread).masked_fill(wrong, torch.inf)


def _spread(logits: Tensor) -> Tensor:
    """The standard deviation of each token's logits, ``float32[t]``."""
    return logits.std(-1, correction=0)


def _shared(sets: Tensor, own: Tensor) -> Tensor:
    """The share of experts of one choice that another has too, ``float32[t]``."""
    if len(sets) == 1:
        return (sets & own)[0].sum(-1).div(own[0].sum(-1))
    same = sets.eq(own).all(-1)
    turns = [same[list(each)].all(0).float() for each in (_FIRST, _SECOND)]
    return torch.stack(turns).mean(0)


def _behind(logits: Tensor, chosen: Tensor, among: Tensor) -> Tensor:
    """By how much the best expert that was not chosen is larger than the worst that was."""
    best = logits.masked_fill(chosen | ~among, -torch.inf).amax(-1)
    worst = logits.masked_fill(~chosen, torch.inf).amin(-1)
    return (best - worst).clamp_min(0)


def _beyond(node: fx.Node, logits: Tensor, largest: Tensor) -> Tensor:
    """How far SparseMixer's logits are beyond the distance at which they are no candidates."""
    jitter = node.args[1]
    assert isinstance(jitter, float)
    scale = torch.maximum(logits.abs(), largest)
    # The rule's own quotient decides; what it exceeds the bound by is brought back to logits.
    return ((largest - logits) / scale - 2 * jitter) * scale.abs()


def _marked(logits: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True)
