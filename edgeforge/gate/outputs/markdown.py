"""A result as Markdown: the summary of a job, with the table against the baseline."""

from __future__ import annotations

from collections.abc import Iterator

from edgeforge.gate.metrics import number_text
from edgeforge.gate.outputs.lines import change_words, limit_text, summary, value_text
from edgeforge.gate.result import ArtifactResult, Finding, GateResult
from edgeforge.gate.texts import markdown_text

_OUTCOMES = {
    "passed": "passed",
    "failed": "**failed**",
    "doubtful": "doubtful",
    "allowed": "allowed",
}


def markdown(result: GateResult) -> str:
    """The result as a document."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: GateResult) -> Iterator[str]:
    count = len(result.violations)
    verdict = "passed" if result.passed else f"failed: {count} violation{'s' if count > 1 else ''}"
    yield f"## edgeforge check {verdict}"
    for artifact in result.artifacts:
        yield ""
        yield f"### {'Failed' if artifact.failed else 'Passed'}: {markdown_text(artifact.path)}"
        yield ""
        yield markdown_text(f"{artifact.model}, {summary(artifact)}")
        yield ""
        yield from _tables(artifact)
    for note in result.notes:
        yield ""
        yield f"Note: {markdown_text(note)}"
    yield ""
    yield markdown_text(
        f"Policy: {result.policy or 'none, the own bounds of the targets held'}. "
        f"Baseline: {result.baseline or 'none'}."
    )
    yield "[ ] are 95 % intervals, by a bootstrap of the blocks of the text."


def _tables(artifact: ArtifactResult) -> Iterator[str]:
    # What needs a look stands first.
    findings = sorted(artifact.findings, key=lambda each: each.outcome == "passed")
    compared = [each for each in findings if each.kind == "baseline"]
    if compared:
        yield "| | on the same tokens or inputs | value | baseline | change | may be |"
        yield "|---|---|---|---|---|---|"
        yield from map(_compared_row, compared)
        yield ""
    yield "| | figure or fact | value | bound | where to look |"
    yield "|---|---|---|---|---|"
    yield from (_row(each) for each in findings if each.kind != "baseline")


def _compared_row(finding: Finding) -> str:
    # Of a module it is "on the same inputs".
    change, _, rest = change_words(finding).partition(" on the same ")
    limit = rest.partition(", where ")[2]
    baseline = finding.baseline
    return _joined(
        _OUTCOMES[finding.outcome],
        f"`{finding.metric}`",
        markdown_text(value_text(finding)),
        "" if baseline is None else number_text(finding.metric, baseline),
        markdown_text(change),
        markdown_text(limit.removesuffix(" may be")),
    )


def _row(finding: Finding) -> str:
    value = finding.message if finding.kind == "fact" else value_text(finding)
    return _joined(
        _OUTCOMES[finding.outcome],
        f"`{finding.metric}`",
        markdown_text(value),
        markdown_text(limit_text(finding)) if finding.kind != "fact" else "",
        markdown_text(", ".join(finding.where)),
    )


def _joined(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
