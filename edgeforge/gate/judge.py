"""Holds a report against the terms of a policy."""

from __future__ import annotations

import math
from collections.abc import Iterator

from edgeforge.gate.metrics import BENCH, DEVICE, GROWTH, MODULE, number_text
from edgeforge.gate.policy import Range, Terms
from edgeforge.gate.reports import Figure, Report
from edgeforge.gate.result import Finding
from edgeforge.verification.bounds import Bound, Checked, Sense, decide

DEFAULT = "the target's own bound"


def judge(report: Report, terms: Terms, growth: float | None) -> list[Finding]:
    """Holds an artifact's figures and facts against a policy.

    What the policy does not name keeps the verdict of the verification. What was found on devices
    is left to `edgeforge.gate.on_devices`.

    Args:
        report: of the artifact.
        terms: of the policy, for this artifact.
        growth: its size as a factor of the baseline's; None without a baseline.
    """
    figures = dict(report.figures)
    if growth is not None:
        figures[GROWTH] = Figure(growth)
    where = {each.name: each.where for each in report.checks}
    findings = [
        _allowed(_found(each), terms) for each in report.checks if each.name not in terms.bounds
    ]
    for name, given in terms.bounds.items():
        if not name.startswith((BENCH, DEVICE, MODULE)):
            findings += held(name, given, figures.get(name), report.tokens, where.get(name, ()))
    return findings


def _found(checked: Checked) -> Finding:
    if checked.sense == "equal":
        return Finding.of(checked, "fact", "")
    return Finding.of(checked, "bound", DEFAULT)


def _allowed(finding: Finding, terms: Terms) -> Finding:
    reason = terms.allow.get(finding.metric)
    if reason is None or finding.outcome != "failed" or finding.kind != "fact":
        return finding
    words = f"{finding.message}; the policy allows it: {reason}"
    return Finding(**{**vars(finding), "outcome": "allowed", "message": words})


def held(
    name: str, given: Range, figure: Figure | None, tokens: int | None, where: tuple[str, ...]
) -> Iterator[Finding]:
    """Holds a figure against each side of its range; one that is missing fails.

    Args:
        name: the figure's dotted name.
        given: what it may be.
        figure: its value; None where there is none.
        tokens: how many tokens it is of; None where more would not tell more.
        where: where to look.
    """
    sides: list[tuple[Sense, float | None]] = [
        ("at most", given.at_most),
        ("at least", given.at_least),
    ]
    for sense, limit in sides:
        if limit is None:
            continue
        if figure is None:
            yield Finding(
                metric=name,
                outcome="failed",
                kind="bound",
                sense=sense,
                limit=limit,
                source=given.source,
                message=_missing(name, sense, limit),
            )
            continue
        value = math.nan if figure.value is None else figure.value
        ends = None
        if figure.low is not None and figure.high is not None:
            ends = (figure.low, figure.high)
        checked = decide(Bound(name, limit, sense), value, ends, tokens=tokens, where=where)
        yield Finding.of(checked, "bound", given.source)


def _missing(name: str, sense: Sense, limit: float) -> str:
    why = "there is no baseline" if name == GROWTH else "the report has no such figure"
    return f"{name} must be {sense} {number_text(name, limit)}, and {why}"
