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
        yield from _table(artifact)
    for note in result.notes:
        yield ""
        yield f"Note: {markdown_text(note)}"
    yield ""
    yield markdown_text(
        f"Policy: {result.policy or 'none, the own bounds of the targets held'}. "
        f"Baseline: {result.baseline or 'none'}."
    )
    yield "[ ] are 95 % intervals, by a bootstrap of the blocks of the text."


def _table(artifact: ArtifactResult) -> Iterator[str]:
    yield "| | figure | value | bound | baseline | change | where to look |"
    yield "|---|---|---|---|---|---|---|"
    # What needs a look stands first.
    for finding in sorted(artifact.findings, key=lambda each: each.outcome == "passed"):
        cells = (
            _OUTCOMES[finding.outcome],
            f"`{finding.metric}`",
            markdown_text(_value(finding)),
            markdown_text(limit_text(finding)),
            "" if finding.baseline is None else number_text(finding.metric, finding.baseline),
            markdown_text(change_words(finding).split(" on the same")[0]),
            markdown_text(", ".join(finding.where)),
        )
        yield f"| {' | '.join(cells)} |"


def _value(finding: Finding) -> str:
    return finding.message if finding.kind == "fact" else value_text(finding)
