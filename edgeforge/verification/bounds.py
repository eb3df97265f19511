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
        floor: the least that is asked of a figure that is held against another one, too.
    """

    name: str
    limit: float
    sense: Sense
    share: float = 0.0
    floor: float = 0.0

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


def _table(*bounds: Bound) -> dict[str, Bound]:
    return {bound.name: bound for bound in bounds}


# What follows was measured on the demo model, the tiny models of all families, a Llama of 16.8 M
# parameters ("16 M") and SmolLM2-135M ("135 M"), on held-out text; "faults" are rotary tables wrong
# from position 64, windows of 16, 64 and 256 tokens, and positions off by one, on the demo model.

# Artifacts whose kernels compute as QUANTIZED does, in float32: nothing but the order of sums.
_FLOAT32: Final = _table(
    Bound("lowering.kl_mean", 1e-5, "at most"),  # 4e-8 to 5e-8; faults from 4e-4
    Bound("lowering.kl_p99", 1e-4, "at most"),  # 3e-7
    Bound("lowering.top1_agreement", 0.98, "at least"),  # 1.000
    Bound("lowering.perplexity_ratio", 1.001, "at most"),  # 1.0000
    Bound("shipped.kl_mean", 1e-5, "at most", floor=1e-5),  # 3e-8 to 5e-8
    Bound("shipped.kl_max", 1e-3, "at most", floor=1e-4),  # 3e-7
    Bound("shipped.difference", 1e-3, "at most", floor=1e-4),  # 3e-7
    Bound("greedy.quantized", 0.1, "at most"),  # 0
    Bound("routing.agreement", 0.999, "at least"),  # 1
    Bound("routing.gap", 0.01, "at most"),  # 0
)
# Those that round activations, and keys and values, to float16.
_FLOAT16: Final = _table(
    Bound("lowering.kl_mean", 5e-4, "at most"),  # 8e-7 to 2.3e-6, 135 M: 2e-5
    Bound("lowering.kl_p99", 5e-3, "at most"),  # 2e-6 to 1.2e-5
    Bound("lowering.top1_agreement", 0.97, "at least"),  # 0.995 to 1.000
    Bound("lowering.perplexity_ratio", 1.01, "at most"),  # 0.9999 to 1.0001
    Bound("shipped.kl_mean", 5e-4, "at most", floor=2e-5),  # 8e-7 to 2.6e-6
    Bound("shipped.kl_max", 5e-3, "at most", floor=2e-4),  # 2e-6 to 2e-5
    Bound("shipped.difference", 5e-3, "at most", floor=2e-4),  # 7e-7 to 1.2e-5
    Bound("greedy.quantized", 0.3, "at most"),  # 0 to 7e-3
    Bound("routing.agreement", 0.98, "at least"),  # 0.99 to 1, of random mixtures
    Bound("routing.gap", 0.2, "at most"),  # 0 to 3e-3
)
# Those that round activations, or keys and values, to 8 bits: a number that lies between two steps
# goes either way, and a few large columns make the steps coarse.
_INT8: Final = _table(
    # 8e-6 to 7e-4; 135 M at int4: 1.6e-3 to 4e-3, and 1.6e-2 with --activations int8. Faults 4e-3
    # to 1. A checkpoint with massive activations, at int8: 0.24.
    Bound("lowering.kl_mean", 2e-2, "at most"),
    Bound("lowering.kl_p99", 0.2, "at most"),  # 6e-5 to 2e-3, 135 M: 7e-3; faults 0.05 to 1.3
    Bound("lowering.top1_agreement", 0.9, "at least"),  # 0.947 to 0.996, 135 M: 0.976
    Bound("lowering.perplexity_ratio", 1.05, "at most"),  # 0.998 to 1.003
    Bound("shipped.kl_mean", 2e-2, "at most", floor=5e-4),  # 5e-6 to 7e-4, 135 M: 1.6e-3
    Bound("shipped.kl_max", 0.2, "at most", floor=5e-3),  # 5e-5 to 3e-3, 135 M: 8e-3; faults 0.2 on
    Bound("shipped.difference", 0.2, "at most", floor=5e-3),  # 2e-7 to 2e-4, 135 M: 7e-3
    Bound("greedy.quantized", 2.0, "at most"),  # 0 to 0.13, int8 caches: 1.1; faults to 3.7
    # 0.9 to 1; experts that are chosen at random: 0.25 for 2 of 8. Of many experts more are near
    # the last chosen one.
    Bound("routing.agreement", 0.8, "at least"),
    Bound("routing.gap", 1.0, "at most"),  # 0.02 to 0.2; another layer's router: above 1
)
DEFAULTS: Final[Mapping[str, tuple[Mapping[str, Bound], Mapping[str, Bound]]]] = {
    "coreml": (_FLOAT16, _INT8),
    "onnx": (_FLOAT32, _INT8),
    "executorch": (_FLOAT32, _INT8),
}
"""The bounds of each target's artifacts, by the figure's name: of those that round nothing to 8
bits while they run, and of those that do."""

# The perplexity over FLOAT's, by the bits of a weight that an artifact has at least. It tells a
# broken quantizer from a coarse one. Measured: fp16 1.0000, int8 1.0004, int4 1.016 to 1.045.
PERPLEXITY_RATIOS: Final = ((5.0, 1.2), (3.5, 5.0), (2.5, 20.0), (0.0, 100.0))

ADJUSTABLE: Final[Mapping[str, Sense]] = {
    **{bound.name: bound.sense for bound in _INT8.values()},
    "perplexity_ratio": "at most",
    "float.perplexity": "at most",
    "total.kl_mean": "at most",
    "total.kl_p99": "at most",
    "total.top1_agreement": "at least",
}
"""Every figure that can have a bound, and which side of it is good."""
_SHARES: Final = frozenset({"lowering.top1_agreement", "total.top1_agreement", "routing.agreement"})


def bounds_of(
    target: str, given: Mapping[str, float], *, rounds: bool, bits: float
) -> dict[str, Bound]:
    """The bounds of a target's artifacts, by the figure's name.

    Args:
        target: a name of the registry of targets; another one's have the loosest.
        given: what a user says instead of the default, by the figure's name; `parse_bounds`.
        rounds: whether the artifact rounds anything to 8 bits while it runs.
        bits: of a weight, in the mean.
    """
    ratio = next(limit for least, limit in PERPLEXITY_RATIOS if bits >= least)
    own = {name: Bound(name, limit, ADJUSTABLE[name]) for name, limit in given.items()}
    table = DEFAULTS.get(target, (_INT8, _INT8))[rounds]
    return {**table, "perplexity_ratio": Bound("perplexity_ratio", ratio, "at most"), **own}


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
    rough: tuple[float, float] | None = None,
) -> Checked:
    """Holds a figure and its 95 % interval against its bound.

    Args:
        bound: as one number (`Bound.beside`).
        value: the figure.
        interval: its 95 % interval; None where the figure alone decides.
        tokens: how many tokens the figure is of, which tells how many would settle a doubtful one.
        where: the worst positions, weights or words that tell where to look.
        rough: what decides where there is too little text for an interval.
    """
    known = interval if interval is not None and all(map(math.isfinite, interval)) else None
    low, high = known or rough or (value, value)
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
