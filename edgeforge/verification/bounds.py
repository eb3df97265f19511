"""What a figure of a verification must keep to, and whether it does.

A figure of a sample is not the whole text's. So its 95 % interval decides: a figure has failed only
where the bound lies outside of the interval, on the wrong side of the whole of it. Where the bound
lies inside, more tokens would tell, and how many is said.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from edgeforge.errors import UsageError
from quant.suggestion import did_you_mean

Sense = Literal["at most", "at least"]
Verdict = Literal["passed", "failed", "doubtful"]


@dataclass(frozen=True)
class Bound:
    """What a figure may be.

    Attributes:
        name: the figure's name.
        limit: the bound, in the figure's unit.
        sense: which side of it is good.
        share: where this share of the quantization error's figure of the same name is more than
            ``limit``, it is the bound; 0 for none.
    """

    name: str
    limit: float
    sense: Sense
    share: float = 0.0

    def beside(self, quantization: float) -> Bound:
        """The bound as one number, beside what quantization costs in the same figure."""
        if self.sense == "at least":  # a share of all: what is not alike counts
            allowed = 1 - self.share * (1 - quantization)
            limit = self.limit if math.isnan(allowed) else min(self.limit, allowed)
        else:
            allowed = self.share * quantization
            limit = max(self.limit, allowed) if math.isfinite(allowed) else self.limit
        return replace(self, limit=limit, share=0.0)

    def holds(self, value: float) -> bool:
        """Whether a figure keeps to it; NaN never does."""
        return value <= self.limit if self.sense == "at most" else value >= self.limit


@dataclass(frozen=True)
class Checked:
    """A figure or a fact that was checked.

    Attributes:
        name: its dotted name, which a policy names too.
        value: the figure; None for a fact that is no number, and where there is no figure.
        limit: its bound; None for a fact that must be equal to another.
        sense: ``at most``, ``at least`` or ``equal``.
        low: the lower end of its 95 % interval; None where there is no interval.
        high: the upper end.
        verdict: ``passed``; ``failed``; or ``doubtful`` where the bound lies in the interval.
        where: the worst positions, weights or words that tell where to look.
        tokens_to_settle: about how many tokens would settle a doubtful one.
        message: what was found and what must be, one sentence.
    """

    name: str
    value: float | None
    limit: float | None
    sense: Literal["at most", "at least", "equal"]
    low: float | None = None
    high: float | None = None
    verdict: Verdict = "passed"
    where: tuple[str, ...] = ()
    tokens_to_settle: int | None = None
    message: str = ""


# What every target's artifacts keep to.
_COMMON: Final = (
    Bound("lowering.kl_mean", 2e-2, "at most", share=0.25),
    Bound("lowering.kl_p99", 0.2, "at most", share=0.25),
    Bound("lowering.top1_agreement", 0.9, "at least"),
    Bound("lowering.perplexity_ratio", 1.05, "at most"),
)
DEFAULTS: Final[Mapping[str, Mapping[str, Bound]]] = {
    target: {bound.name: bound for bound in _COMMON} for target in ("coreml", "onnx", "executorch")
}
"""The bounds of each target's artifacts, by the figure's name."""

# Figures without a bound of their own: a user, or a policy, can give them one.
ADJUSTABLE: Final[Mapping[str, Sense]] = {
    **{bound.name: bound.sense for bound in _COMMON},
    "total.kl_mean": "at most",
    "total.top1_agreement": "at least",
    "perplexity_ratio": "at most",
}
"""Every figure that can have a bound, and which side of it is good."""
_SHARES: Final = frozenset({"lowering.top1_agreement", "total.top1_agreement"})


def bounds_of(target: str, given: Mapping[str, float]) -> dict[str, Bound]:
    """The bounds of a target's artifacts, by the figure's name.

    Args:
        target: a name of the registry of targets.
        given: what a user says instead of the default, by the figure's name; `parse_bounds`.
    """
    own = {name: Bound(name, limit, ADJUSTABLE[name]) for name, limit in given.items()}
    return {**DEFAULTS.get(target, {bound.name: bound for bound in _COMMON}), **own}


def parse_bounds(given: Iterable[str]) -> dict[str, float]:
    """Reads bounds as a user gives them.

    >>> parse_bounds(["lowering.kl_mean=0.01"])
    {'lowering.kl_mean': 0.01}

    Raises:
        UsageError: there is no such figure, it is given twice, or its bound can be none.
    """
    found: dict[str, float] = {}
    for text in given:
        name, equals, number = text.partition("=")
        name = name.strip()
        if not equals:
            raise UsageError(f"--bound {text!r} is not FIGURE=NUMBER, as lowering.kl_mean=0.01")
        if name in found:
            raise UsageError(f"--bound names {name} twice: leave one of the two out")
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        found[name] = check_bound(name, limit, number.strip())
    return found


def check_bound(name: str, limit: float, given: object = None) -> float:
    """Lets pass what can be the bound of a figure.

    Args:
        name: the figure's name.
        limit: its bound.
        given: what the user wrote, for the message; None for ``limit`` itself.

    Raises:
        UsageError: there is no such figure, or nothing could keep to the bound.
    """
    if name not in ADJUSTABLE:
        hint = did_you_mean(name, ADJUSTABLE)
        raise UsageError(
            f"there is no figure {name!r} to give a bound to{hint}; those are "
            f"{', '.join(sorted(ADJUSTABLE))}"
        )
    written = limit if given is None else given
    if not math.isfinite(limit) or limit < 0:
        raise UsageError(f"the bound of {name} is {written!r}, which is no number of 0 or more")
    if name in _SHARES and limit > 1:
        raise UsageError(f"the bound of {name} is {written!r}, but it is a share of at most 1")
    return limit


def decide(
    bound: Bound,
    value: float,
    interval: tuple[float, float] | None = None,
    *,
    tokens: int | None = None,
    where: Sequence[str] = (),
) -> Checked:
    """Holds a figure and its 95 % interval against its bound.

    Args:
        bound: as one number (`Bound.beside`).
        value: the figure.
        interval: its 95 % interval; None where the figure alone decides.
        tokens: how many tokens the figure is of, which tells how many would settle a doubtful one.
        where: the worst positions, weights or words that tell where to look.
    """
    known = interval if interval is not None and all(map(math.isfinite, interval)) else None
    low, high = (value, value) if known is None else known
    verdict: Verdict = "doubtful"
    if not math.isfinite(value) or not (bound.holds(low) or bound.holds(high)):
        verdict = "failed"
    elif bound.holds(low) and bound.holds(high):
        verdict = "passed" if bound.holds(value) else "doubtful"
    settle = None
    if verdict == "doubtful" and tokens is not None and value != bound.limit:
        # The interval's width falls with the square root of the tokens. Nobody needs more digits.
        ends = abs(value - (low if value > bound.limit else high))
        times = max(1.0, (ends / abs(value - bound.limit)) ** 2)
        settle = rounded_up(tokens * times) if times < 1e6 else None
    found = Checked(
        name=bound.name,
        value=value,
        limit=bound.limit,
        sense=bound.sense,
        low=None if known is None else low,
        high=None if known is None else high,
        verdict=verdict,
        where=tuple(where),
        tokens_to_settle=settle,
    )
    return replace(found, message=_sentence(found))


def equal(name: str, found: object, expected: object, *, where: Sequence[str] = ()) -> Checked:
    """Checks a fact: what was found must be what is expected.

    Args:
        name: the fact's name.
        found: in the artifact.
        expected: by the checkpoint or the export.
        where: words that tell where to look.
    """
    same = found == expected
    message = f"{name} is {found}" if same else f"{name} is {found}, and must be {expected}"
    return Checked(
        name,
        value=float(found) if isinstance(found, int | float) else None,
        limit=float(expected) if isinstance(expected, int | float) else None,
        sense="equal",
        verdict="passed" if same else "failed",
        where=tuple(where),
        message=message,
    )


def rounded_up(tokens: float) -> int:
    """A number of tokens in two digits, rounded up.

    >>> rounded_up(20_481.3), rounded_up(7)
    (21000, 7)
    """
    whole = math.ceil(round(tokens, 3))
    unit = int(10 ** max(0, len(str(whole)) - 2))
    return -(-whole // unit) * unit


def _sentence(checked: Checked) -> str:
    """What was found and what must be, without a full stop."""
    value = "nan" if checked.value is None else f"{checked.value:.3g}"
    interval = ""
    if checked.low is not None and checked.high is not None:
        interval = f" [{checked.low:.3g}, {checked.high:.3g}]"
    words = f"{checked.name} is {value}{interval}, and must be {checked.sense} {checked.limit:.3g}"
    if checked.where:
        words += f" (worst: {', '.join(checked.where)})"
    if checked.tokens_to_settle is not None:
        words += f"; about {checked.tokens_to_settle:,} tokens would settle it"
    return words
