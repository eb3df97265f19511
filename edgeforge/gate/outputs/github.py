"""A result as annotations of a GitHub workflow, printed as its workflow commands."""

from __future__ import annotations

import os
from pathlib import Path

from edgeforge.gate.outputs.lines import finding_line
from edgeforge.gate.result import GateResult
from edgeforge.gate.texts import command_text

_LEVELS = {"failed": "error", "doubtful": "warning", "allowed": "notice"}


def github_annotations(result: GateResult, workspace: Path | None) -> list[str]:
    """A workflow command for each violation, doubtful figure and allowed fact.

    Args:
        result: of the check.
        workspace: the repository's folder, to which GitHub's paths are relative; None for none.
    """
    place = _policy_place(result, workspace)
    lines = []
    for artifact in result.artifacts:
        for finding in artifact.findings:
            if finding.outcome == "passed":
                continue
            title = command_text(f"{artifact.path}: {finding.metric}", is_property=True)
            words = command_text(finding_line(finding))
            lines.append(f"::{_LEVELS[finding.outcome]} {place}title={title}::{words}")
    return lines


def _policy_place(result: GateResult, workspace: Path | None) -> str:
    """The policy's file, where an annotation shows up; artifacts are no files of a repository."""
    if result.policy is None or workspace is None:
        return ""
    path = os.path.relpath(os.path.realpath(result.policy), os.path.realpath(workspace))
    if path.startswith(".."):
        return ""
    return f"file={command_text(Path(path).as_posix(), is_property=True)},line=1,"
