"""A result as lines of text: a verdict for each artifact, and a line for each violation."""

from __future__ import annotations

from edgeforge.gate.metrics import MODULE_COMPARED, number_text
from edgeforge.gate.result import ArtifactResult, Finding, GateResult

_WORDS = {"failed": "VIOLATION", "doubtful": "doubtful", "allowed": "allowed"}


def text_lines(result: GateResult) -> list[str]:
    """The whole result, for a terminal or a log."""
    lines = []
    for artifact in result.artifacts:
        lines.append(f"{'FAILED' if artifact.failed else 'PASSED'}  {summary(artifact)}")
        for finding in artifact.findings:
            if finding.outcome != "passed":
                lines.append(f"  {_WORDS[finding.outcome]}  {finding_line(finding)}")
    lines += [f"note: {each}" for each in result.notes]
    held = f"policy {result.policy}" if result.policy else "the targets' own bounds (no policy)"
    if result.baseline_updated:
        held += f"; baseline {result.baseline} written"
    elif result.baseline:
        held += f"; baseline {result.baseline}"
    lines.append(f"held against {held}; {result.seconds:.1f} s")
    return lines


def summary(artifact: ArtifactResult) -> str:
    """An artifact, what it was measured on, and how many checks it met."""
    met = sum(each.outcome in ("passed", "allowed") for each in artifact.findings)
    words = f"{artifact.label}: {met} of {len(artifact.findings)} checks passed"
    if artifact.measured_on:
        how = "fresh report" if artifact.fresh else "verified now"
        words += f" ({how}, {artifact.measured_on})"
    return words


def finding_line(finding: Finding) -> str:
    """A figure or fact in one line: value, interval, bound, baseline and where to look."""
    if finding.kind == "fact" or finding.value is None or finding.limit is None:
        return _with_place(f"{finding.metric}  {finding.message}", finding)
    parts = [f"{finding.metric} {value_text(finding)}"]
    if finding.kind == "baseline":
        parts[0] += f", {change_words(finding)}"
    else:
        limit = number_text(finding.metric, finding.limit)
        parts.append(f"must be {finding.sense} {limit} ({finding.source})")
    if finding.baseline is not None:
        parts.append(f"baseline {number_text(finding.metric, finding.baseline)}")
    if finding.outcome == "doubtful" and "settle" in finding.message:
        parts.append(finding.message.rsplit("; ", 1)[-1])
    return _with_place("; ".join(parts), finding)


def value_text(finding: Finding) -> str:
    """A figure with its interval; empty where there is none."""
    if finding.value is None:
        return ""
    words = number_text(finding.metric, finding.value)
    if finding.low is not None and finding.high is not None:
        low, high = (number_text(finding.metric, each) for each in (finding.low, finding.high))
        words += f" [{low}, {high}]"
    return words


def change_words(finding: Finding) -> str:
    """How a figure changed since the baseline, with what may change."""
    from edgeforge.gate.baseline import change_text

    if finding.change is None:
        return ""
    words = change_text(finding.metric, finding.change)
    if finding.change_low is not None and finding.change_high is not None:
        ends = (finding.change_low, finding.change_high)
        low, high = (change_text(finding.metric, each) for each in ends)
        words += f" [{low}, {high}]"
    words += f" on the same {'inputs' if finding.metric in MODULE_COMPARED else 'tokens'}"
    limit = "" if finding.limit is None else change_text(finding.metric, finding.limit)
    return f"{words}, where {limit} may be" if limit else words


def limit_text(finding: Finding) -> str:
    """A bound in words; empty where there is none."""
    if finding.limit is None:
        return ""
    if finding.kind == "baseline":
        from edgeforge.gate.baseline import change_text

        return f"change {finding.sense} {change_text(finding.metric, finding.limit)}"
    return f"{finding.sense} {number_text(finding.metric, finding.limit)}"


def _with_place(words: str, finding: Finding) -> str:
    return f"{words}; look at {', '.join(finding.where)}" if finding.where else words
