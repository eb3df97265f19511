"""What an artifact's card says of an evaluation."""

from __future__ import annotations

from edgeforge.cards.card import Measure, Verified, VerifiedThere
from edgeforge.verification.evaluation import Evaluation
from edgeforge.verification.intervals import Interval
from edgeforge.verification.soundness import problems_of
from quant.processors import processor_name


def for_card(evaluation: Evaluation) -> Verified:
    """The few figures of an evaluation that a card has."""
    return Verified(
        how="interpreted" if evaluation.limits else "measured",
        runtime=evaluation.runtime,
        processor=processor_name(),
        limits=evaluation.limits,
        text=evaluation.text,
        tokens=evaluation.tokens,
        text_tokens=evaluation.text_tokens,
        kl=_measure(evaluation, "total", "kl_mean"),
        quantization_kl=_measure(evaluation, "quantization", "kl_mean"),
        lowering_kl=_measure(evaluation, "lowering", "kl_mean"),
        perplexity_ratio=_ratio(evaluation),
        top1=_measure(evaluation, "total", "top1_agreement"),
        stored_weights_equal=evaluation.stored_weights_equal,
        passed=sum(each.verdict == "passed" for each in evaluation.checks),
        doubtful=tuple(each.name for each in evaluation.checks if each.verdict == "doubtful"),
        problems=tuple(problems_of(evaluation)),
        elsewhere=tuple(map(_there, evaluation.elsewhere)),
        routing="" if evaluation.routing is None else evaluation.routing.words,
    )


def _there(evaluation: Evaluation) -> VerifiedThere:
    facts = evaluation.device_facts or {}
    return VerifiedThere(
        device=evaluation.device,
        model=str(facts.get("model", "a device")),
        runtime=evaluation.runtime,
        emulated=facts.get("emulated") is True,
        lowering_kl=_measure(evaluation, "lowering", "kl_mean"),
        problems=tuple(problems_of(evaluation)),
    )


def _measure(evaluation: Evaluation, comparison: str, figure: str) -> Measure:
    value: float = getattr(getattr(evaluation, comparison), figure)
    if evaluation.intervals is None:
        return Measure(value)
    interval: Interval = getattr(getattr(evaluation.intervals, comparison), figure)
    return Measure(value, interval.low, interval.high)


def _ratio(evaluation: Evaluation) -> Measure:
    if evaluation.intervals is None:
        return Measure(evaluation.perplexity_ratio)
    interval = evaluation.intervals.perplexity_ratio
    return Measure(evaluation.perplexity_ratio, interval.low, interval.high)
