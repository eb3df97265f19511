"""Chooses a format for every weight under a budget: an exact multiple-choice knapsack solver.

Each weight has a handful of choices, and each choice has a size and a cost; both add up over the
weights. The solver minimizes either the cost within a size or the size within a cost. Adding costs
is a model: it assumes that errors of different weights are independent, so that their divergences
add up.

The solver visits the weights in turn and keeps the states that no other state beats in both sums
(Nemhauser and Ullmann 1969). It drops the states whose linear relaxation cannot beat the best plan
known so far (as Pisinger 1995 does). Few states remain, and the result is the exact optimum. Of
thousands of weights it takes steps along the weights' convex hulls instead (`MOST_EXACT`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from quant.errors import QuantizationError

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# At most so many states are kept. Beyond it the solver drops the least promising ones, and
# `Solution.bound` shows how much better a dropped plan could have been.
STATE_LIMIT: Final = 1 << 20
# Of more matrices, such as those of a mixture's experts, the search would take hours. The steps
# along the hulls are taken by falling profit instead: the plan misses the best one by less than
# one matrix that did not fit.
MOST_EXACT: Final = 1024
_ROUNDING: Final = 1e-12


@dataclass(frozen=True)
class Choice:
    """One way to store one weight.

    Attributes:
        name: the format's name.
        nbytes: stored bytes.
        cost: what the choice adds to the divergence, nats per token.
    """

    name: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Solution:
    """A choice for every weight.

    Attributes:
        chosen: the choice of each weight, by weight name.
        nbytes: stored bytes of all weights.
        cost: the sum of costs, nats per token.
        bound: a lower bound of the minimized quantity (the cost or the bytes) over all choices of
            formats. It equals the solution's own value up to rounding, unless the search met more
            than `STATE_LIMIT` states, or there are more than `MOST_EXACT` weights.
    """

    chosen: Mapping[str, Choice]
    nbytes: int
    cost: float
    bound: float


class BudgetError(QuantizationError):
    """No choice of formats stays within the budget."""


def least_cost(
    choices: Mapping[str, Sequence[Choice]], max_bytes: float, state_limit: int = STATE_LIMIT
) -> Solution:
    """Returns the solution of least cost whose bytes do not exceed ``max_bytes``.

    Raises:
        BudgetError: even the smallest choices take more; ``args[1]`` is how many bytes they take.
    """
    return _choose(choices, max_bytes, by_size=True, state_limit=state_limit)


def least_bytes(
    choices: Mapping[str, Sequence[Choice]], max_cost: float, state_limit: int = STATE_LIMIT
) -> Solution:
    """Returns the solution of fewest bytes whose cost does not exceed ``max_cost``.

    Raises:
        BudgetError: even the best choices cost more; ``args[1]`` is their cost, nats per token.
    """
    return _choose(choices, max_cost, by_size=False, state_limit=state_limit)


def _choose(
    choices: Mapping[str, Sequence[Choice]], limit: float, *, by_size: bool, state_limit: int
) -> Solution:
    items = [_Item.of(given, by_size) for given in choices.values()]
    least = sum(float(item.weight[0]) for item in items)
    if least > limit:
        raise BudgetError("no choice of formats stays within the budget", least)
    if len(items) > MOST_EXACT:
        picked, bound = _along_hulls(items, limit)
    else:
        picked, bound = _solve(items, limit, state_limit)
    chosen = {
        name: given[int(item.source[index])]
        for (name, given), item, index in zip(choices.items(), items, picked, strict=True)
    }
    nbytes = sum(choice.nbytes for choice in chosen.values())
    return Solution(chosen, nbytes, sum(choice.cost for choice in chosen.values()), bound)


@dataclass(frozen=True)
class _Item:
    """One matrix's choices that no other choice of the same matrix beats, by rising weight.

    "Weight" and "value" are the knapsack's terms here: the limited and the minimized quantity.

    Attributes:
        weight: the limited quantity of each choice, ``[choices]``, rising.
        value: the minimized quantity of each choice, ``[choices]``, falling.
        source: each choice's index in the given sequence, ``[choices]``.
    """

    weight: Floats
    value: Floats
    source: Indices

    @classmethod
    def of(cls, choices: Sequence[Choice], by_size: bool) -> _Item:
        sizes = np.array([choice.nbytes for choice in choices], np.float64)
        costs = np.array([choice.cost for choice in choices], np.float64)
        weight, value = (sizes, costs) if by_size else (costs, sizes)
        order = _undominated(weight, value)
        return cls(weight[order], value[order], order)

    def hull(self) -> list[int]:
        """The choices on the lower convex hull, by rising weight."""
        hull = [0]
        for index in range(1, len(self.weight)):
            while len(hull) > 1 and self.slope(hull[-2], hull[-1]) <= self.slope(hull[-1], index):
                hull.pop()
            hull.append(index)
        return hull

    def steps(self) -> list[tuple[float, float]]:
        """Steps along the hull: the weight each adds and the value it saves."""
        return [
            (float(self.weight[b] - self.weight[a]), float(self.value[a] - self.value[b]))
            for a, b in pairwise(self.hull())
        ]

    def slope(self, a: int, b: int) -> float:
        """The value saved per weight added, from choice ``a`` to choice ``b``."""
        return float((self.value[a] - self.value[b]) / (self.weight[b] - self.weight[a]))


def _undominated(weight: Floats, value: Floats) -> Indices:
    """Indices of the pairs that no other pair beats in both numbers, by rising weight."""
    order = np.lexsort((value, weight))
    best = np.minimum.accumulate(value[order])
    keep = np.ones(len(order), bool)
    keep[1:] = value[order][1:] < best[:-1]
    return order[keep]


class _Relaxation:
    """The least value of some items as a function of the limit, if choices could be fractions.

    The function is convex and piecewise linear: it takes the steps of all hulls in the order of
    falling slope.
    """

    def __init__(self, items: Sequence[_Item]) -> None:
        self.least = sum(float(item.weight[0]) for item in items)
        most = sum(float(item.value[0]) for item in items)
        steps = sorted(
            (step for item in items for step in item.steps()), key=lambda s: -s[1] / s[0]
        )
        self._weight = self.least + np.cumsum([0.0, *(step[0] for step in steps)])
        self._value = most - np.cumsum([0.0, *(step[1] for step in steps)])

    def __call__(self, room: Floats) -> Floats:
        """Lower bounds of the value for each limit in ``room``; infinite where nothing fits."""
        value = np.interp(room, self._weight, self._value)
        return np.where(room < self.least * (1 - _ROUNDING), np.inf, value)


def _solve(items: Sequence[_Item], limit: float, state_limit: int) -> tuple[list[int], float]:
    """Returns the index of each item's choice, and a lower bound of the least value."""
    # Large items come first: they move the sums most, so the bounds prune states early.
    order = sorted(range(len(items)), key=lambda i: -float(np.ptp(items[i].weight)))
    sorted_items = [items[i] for i in order]
    rest = [_Relaxation(sorted_items[i:]) for i in range(len(items) + 1)]
    best = _greedy(sorted_items, limit)
    best_value = _value_of(sorted_items, best)
    given_up = np.inf
    weight, value = np.zeros(1), np.zeros(1)
    trail: list[tuple[Indices, Indices]] = []
    for depth, item in enumerate(sorted_items):
        count = len(item.weight)
        weights = (weight[:, None] + item.weight).ravel()
        values = (value[:, None] + item.value).ravel()
        bound = values + rest[depth + 1](limit - weights)
        alive = np.flatnonzero(bound < best_value * (1 - _ROUNDING))
        alive = alive[_undominated(weights[alive], values[alive])]
        if len(alive) > state_limit:
            ranked = alive[np.argsort(bound[alive], kind="stable")]
            given_up = min(given_up, float(bound[ranked[state_limit]]))
            alive = np.sort(ranked[:state_limit])
        trail.append((alive // count, alive % count))
        weight, value = weights[alive], values[alive]
        if not len(alive):
            break
        # A better plan found early prunes more states later: complete the most promising one.
        first = int(np.argmin(bound[alive]))
        head = _walk_back(trail, first)
        tail = _greedy(sorted_items[depth + 1 :], limit - float(weight[first]))
        found = _value_of(sorted_items, [*head, *tail])
        if found < best_value:
            best, best_value = [*head, *tail], found
    picked = [0] * len(items)
    for place, choice in zip(order, best, strict=True):
        picked[place] = choice
    return picked, min(best_value, given_up)


def _along_hulls(items: Sequence[_Item], limit: float) -> tuple[list[int], float]:
    """Takes steps along all hulls by falling profit; returns as `_solve`.

    An item whose next step does not fit keeps the choice that it has.
    """
    steps = []
    for index, item in enumerate(items):
        hull = item.hull()
        for before, after in pairwise(hull):
            steps.append((-item.slope(before, after), index, before, after))
    steps.sort()
    room = limit - sum(float(item.weight[0]) for item in items)
    picked = [0] * len(items)
    for _, index, before, after in steps:
        added = float(items[index].weight[after] - items[index].weight[before])
        if picked[index] == before and added <= room:
            picked[index] = after
            room -= added
    bound = float(_Relaxation(items)(np.array([limit]))[0])
    return picked, min(_value_of(items, picked), bound)


def _walk_back(trail: Sequence[tuple[Indices, Indices]], state: int) -> list[int]:
    """Returns the choices that led to a state of the last depth."""
    choices = []
    for parent, choice in reversed(trail):
        choices.append(int(choice[state]))
        state = int(parent[state])
    return choices[::-1]


def _value_of(items: Sequence[_Item], choices: Sequence[int]) -> float:
    return sum(float(item.value[choice]) for item, choice in zip(items, choices, strict=True))


def _greedy(items: Sequence[_Item], limit: float) -> list[int]:
    """Returns a good plan within the limit, by taking the most profitable steps first."""
    room = limit - sum(float(item.weight[0]) for item in items)
    chosen = [0] * len(items)
    steps = sorted(
        (
            (-item.slope(0, choice), index, choice)
            for index, item in enumerate(items)
            for choice in range(1, len(item.weight))
        ),
    )
    for _, index, choice in steps:
        item, now = items[index], chosen[index]
        added = float(item.weight[choice] - item.weight[now])
        if choice > now and added <= room:
            room -= added
            chosen[index] = choice
    return chosen
