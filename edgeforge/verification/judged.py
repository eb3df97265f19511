"""Holds what a verification found against its bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from edgeforge.verification.bounds import Bound, Checked, Sense, decide
from edgeforge.verification.comparison import Comparison
from edgeforge.verification.finite import NotFinite
from edgeforge.verification.greedy import GreedyAgreement
from edgeforge.verification.intervals import Interval
from edgeforge.verification.shipped import Shipped

# What other integers may cost, as a share of the quantization error: they are as good as those of
# the store, and as far from FLOAT in directions of their own.
_OTHER_INTEGERS: Final = 2.0
_OTHER_GAP: Final = 8.0  # nats, of greedy text and other integers
# How much more what ships may diverge than the graph of all positions, and which figure of that
# graph says it. Sound artifacts had 0.4 to 1.3 times the mean, and up to 1.8 times the percentile.
_SHIPPED: Final = {
    "shipped.kl_mean": ("kl_mean", 4.0),
    "shipped.kl_max": ("kl_p99", 10.0),
    "shipped.difference": ("kl_p99", 10.0),
}
# At the positions of what ships, the first of a text among them, that graph may itself diverge more
# than its percentile over all says: kernels that round to 8 bits do on random weights.
_AT_SAME_POSITIONS: Final = 3.0
_CHOICES: Final = {
    "routing.agreement": "; more tokens chose other experts than rounding explains",
    "routing.gap": "; rounding does not move a router's logits so far: it computes something else",
}
_UNREAD: Final = (
    "; which experts its tokens chose is not known ({why}), and other choices in near ties may be "
    "the cause"
)
# A mean of too little text for an interval may be so many times too large or too small.
_ROUGH: Final = 3.0
# Of so few tokens a perplexity alone says nothing.
_FEWEST: Final = 64
_ACTIVATIONS: Final = (
    "; the runtime rounds activations to 8 bits, which may be the cause: export --activations "
    "{offer} {does} that"
)


@dataclass(frozen=True)
class Found:
    """What was found of one artifact.

    Attributes:
        figures: of the graph of all positions, or of what ships where there is no such graph.
        shipped: of what ships.
        greedy: greedy text against QUANTIZED.
        not_finite: of those of ``float``, ``quantized`` and ``artifact`` that gave NaN or infinity.
        unlike: the weights that are not the store's.
        store: the store's folder.
        other_processor: whether these may differ because another processor exported the artifact.
        unigram: a unigram model's perplexity; None where the text is random.
        activations: how the artifact was told to take activations that its kernels round; empty
            where they round none.
        worst_weights: those that rounding changed most.
    """

    figures: Comparison
    shipped: Shipped
    greedy: GreedyAgreement
    not_finite: Mapping[str, NotFinite]
    unlike: Sequence[str]
    store: str
    other_processor: bool
    unigram: float | None
    activations: str
    worst_weights: Sequence[str]


@dataclass(frozen=True)
class _Figure:
    """A figure with its interval, and where it is worst."""

    value: float
    interval: Interval | None = None
    tokens: int | None = None
    where: tuple[str, ...] = ()
    rough: tuple[float, float] | None = None


def judged(found: Found, bounds: Mapping[str, Bound], given: Mapping[str, float]) -> list[Checked]:
    """Holds everything that has a bound against it.

    Args:
        found: what was found.
        bounds: the target's, by the figure's name.
        given: those that a user gave, by the figure's name; nothing loosens or tightens them.
    """
    checks = [stored_weights(found), non_finite(found)]
    if found.unigram is not None:
        checks.append(_float_perplexity(found, given.get("float.perplexity")))
    figures = _figures(found)
    for name, bound in bounds.items():
        figure = figures.get(name)
        if figure is None or (checks[1].verdict == "failed" and not math.isfinite(figure.value)):
            continue  # what is not finite was said once
        if name not in given:
            if found.unigram is None and name.endswith("perplexity_ratio"):
                continue  # nobody can foretell random tokens, so perplexities of them mean nothing
            bound = _fitting(bound, found)
        ends = None if figure.interval is None else (figure.interval.low, figure.interval.high)
        checked = decide(
            bound,
            figure.value,
            ends,
            tokens=figure.tokens,
            where=figure.where,
            rough=figure.rough,
        )
        checks.append(checked)
    return _with_activations(_with_choices(checks, found), found.activations)


def stored_weights(found: Found) -> Checked:
    """Whether the integers and scales are those of the weight store."""
    count = len(found.unlike)
    words = "all integers and scales equal the weight store's"
    if count:
        more = ", ..." if count > 1 else ""
        words = (
            f"{count} weights ({found.unlike[0]}{more}) are what the manifest records, but not "
            f"what the weight store of the same checkpoint and recipe holds ({found.store}): the "
            f"artifact has other integers or scales"
        )
    return Checked(
        "stored_weights",
        value=float(count),
        limit=0.0,
        sense="equal",
        # Nobody can tell here whether the other processor would have chosen these integers.
        verdict="passed" if not count else "doubtful" if found.other_processor else "failed",
        where=tuple(found.unlike),
        message=words,
    )


def non_finite(found: Found) -> Checked:
    """Whether any logit is NaN or infinite, of the references too."""
    problems = [each.sentence(name.upper()) for name, each in found.not_finite.items()]
    steps, shipped = found.greedy.not_finite, found.shipped.not_finite
    if "artifact" not in found.not_finite:
        if shipped:
            problems.append(
                f"what ships gives NaN or infinite logits at {shipped} of "
                f"{found.shipped.positions} positions, as at {found.shipped.worst[0]}"
            )
        if steps:
            problems.append(
                f"ARTIFACT gives NaN or infinite logits at {steps} steps of greedy text"
            )
    count = sum(each.positions for each in found.not_finite.values()) + steps + shipped
    return Checked(
        "non_finite",
        value=float(count),
        limit=0.0,
        sense="equal",
        verdict="failed" if count else "passed",
        where=tuple(each.where for each in found.not_finite.values() if each.where),
        message="; ".join(problems) or "all logits are finite numbers",
    )


def _float_perplexity(found: Found, given: float | None) -> Checked:
    assert found.unigram is not None
    limit = found.unigram if given is None else given
    known = found.figures.intervals
    interval = None if known is None else known.perplexity["float"]
    ends = None if interval is None else (interval.low, interval.high)
    perplexity = found.figures.perplexity["float"]
    times = _ROUGH if perplexity.tokens >= _FEWEST else 1e6
    checked = decide(
        Bound("float.perplexity", limit, _AT_MOST),
        perplexity.value,
        ends,
        tokens=perplexity.tokens,
        rough=(perplexity.value / times, perplexity.value * times),
    )
    if checked.verdict == "passed" or given is not None or not math.isfinite(perplexity.value):
        return checked
    if found.shipped.entropy >= math.log(limit):
        words = (
            f"the checkpoint's perplexity is {perplexity.value:.4g}, worse than {limit:.4g} of a "
            f"model that counts the text's tokens, and it predicts as vaguely: its weights are "
            f"random or barely trained, so quality means nothing here"
        )
        return replace(checked, verdict="doubtful", tokens_to_settle=None, message=words)
    words = (
        f"{checked.message}, the perplexity of a model that counts the text's tokens: the "
        f"tokenizer is not the one that the checkpoint was trained with, the text is in a language "
        f"that it does not know, or its arithmetic is wrong"
    )
    return replace(checked, message=words)


_AT_MOST: Final[Sense] = "at most"


def _fitting(bound: Bound, found: Found) -> Bound:
    """A default bound as one number, beside what else was found."""
    part, _, figure = bound.name.partition(".")
    if found.other_processor and part == "greedy":
        return replace(bound, limit=max(bound.limit, _OTHER_GAP))
    if bound.name in _SHIPPED:
        other, times = _SHIPPED[bound.name]
        allowed = times * getattr(found.figures.lowering, other)
        if bound.name == "shipped.kl_max":
            allowed = max(allowed, _AT_SAME_POSITIONS * found.shipped.all_positions_max)
        if math.isfinite(allowed):
            limit = max(bound.floor, allowed)
            return replace(bound, limit=limit if found.other_processor else min(bound.limit, limit))
        return bound
    if found.other_processor and part == "lowering":
        bound = replace(bound, share=max(bound.share, _OTHER_INTEGERS))
    return bound.beside(getattr(found.figures.quantization, figure, math.nan))


def _figures(found: Found) -> dict[str, _Figure]:
    """Every figure that can have a bound, by its name."""
    figures, shipped, greedy = found.figures, found.shipped, found.greedy
    known = figures.intervals
    weights = tuple(found.worst_weights)
    result: dict[str, _Figure] = {}
    for name, where in (("lowering", figures.worst), ("total", weights)):
        divergence = getattr(figures, name)
        intervals = None if known is None else getattr(known, name)
        for figure in ("kl_mean", "kl_p99", "top1_agreement"):
            interval = None if intervals is None else getattr(intervals, figure)
            value = getattr(divergence, figure)
            least = 1.0 if figure == "top1_agreement" else 0.0
            result[f"{name}.{figure}"] = _Figure(
                value, interval, divergence.tokens, where, _around(value, least)
            )
    perplexity = {name: each.value for name, each in figures.perplexity.items()}
    tokens = figures.perplexity["artifact"].tokens
    ratios = (None, None) if known is None else (known.perplexity_ratio, known.lowering_ratio)
    for name, other, interval, where in (
        ("perplexity_ratio", "float", ratios[0], weights),
        ("lowering.perplexity_ratio", "quantized", ratios[1], figures.worst),
    ):
        value = perplexity["artifact"] / perplexity[other]
        result[name] = _Figure(value, interval, tokens, where, _around(value, 1.0))
    result["shipped.kl_mean"] = _Figure(
        shipped.kl_mean,
        shipped.interval,
        shipped.positions,
        shipped.worst,
        _around(shipped.kl_mean, 0.0),
    )
    result["shipped.kl_max"] = _Figure(shipped.kl_max, where=shipped.worst)
    if shipped.all_positions is not None:
        apart = shipped.all_positions.kl_max
        result["shipped.difference"] = _Figure(apart, where=shipped.furthest)
    routing = figures.routing
    if routing is not None and routing.tokens:
        result["routing.agreement"] = _Figure(routing.agreement, where=(routing.place,))
        result["routing.gap"] = _Figure(routing.gap)
    worst = (greedy.worst,) if greedy.worst else ()
    result["greedy.quantized"] = _Figure(greedy.worst_gap, where=worst)
    return result


def _around(value: float, perfect: float) -> tuple[float, float]:
    """Where a mean over much text may lie, by its distance from the best value there is."""
    ends = sorted((perfect + (value - perfect) / _ROUGH, perfect + (value - perfect) * _ROUGH))
    return ends[0], ends[1]


def _with_choices(checks: list[Checked], given: Found) -> list[Checked]:
    """Tells what failed figures of a mixture say of its choices of experts."""
    routing = given.figures.routing
    if routing is None:
        return checks
    why, found = routing.unread, []
    for each in checks:
        part, words = each.name.partition(".")[0], ""
        if each.verdict != "passed":
            words = _CHOICES.get(each.name, "")
        if each.verdict == "failed" and why and part in ("lowering", "shipped", "greedy"):
            words = _UNREAD.format(why=why)
        found.append(replace(each, message=each.message + words))
    return found


def _with_activations(checks: list[Checked], activations: str) -> list[Checked]:
    """Tells of rounded activations where they may be why the first failed figure is large."""
    failed = [each.name for each in checks if each.verdict == "failed"]
    lowering = [name for name in failed if name.startswith("lowering.")]
    if not activations or not lowering or "shipped.difference" in failed:
        return checks
    several = activations == "int8"
    words = _ACTIVATIONS.format(
        offer="auto or float" if several else "float", does="lessens" if several else "avoids"
    )
    return [
        replace(each, message=each.message + words) if each.name == lowering[0] else each
        for each in checks
    ]
