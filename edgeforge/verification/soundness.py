"""Ends a verification whose figures are known and whose artifact did not pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeforge.errors import CheckFailed
from edgeforge.verification.evaluation import Evaluation


class UnsoundError(CheckFailed):
    """An artifact ran and did not pass.

    Attributes:
        evaluations: what was found, of every artifact that was verified.
    """

    def __init__(self, message: str, evaluations: Sequence[Evaluation]) -> None:
        super().__init__(message)
        self.evaluations = tuple(evaluations)


def require_sound(folders: Sequence[Path], evaluations: Sequence[Evaluation]) -> None:
    """Refuses artifacts with other weights, logits that are not finite, or a failed check.

    Args:
        folders: the artifacts.
        evaluations: what was found of each.

    Raises:
        UnsoundError: says what did not pass, of each artifact.
    """
    found = [
        f"{folder}: {problem}"
        for folder, evaluation in zip(folders, evaluations, strict=True)
        for problem in problems_of(evaluation)
    ]
    if found:
        raise UnsoundError("; ".join(found), evaluations)


def problems_of(evaluation: Evaluation) -> list[str]:
    """Returns why an artifact is not sound, a phrase each; nothing where it is."""
    found = [each.message for each in evaluation.checks if each.verdict == "failed"]
    for there in evaluation.elsewhere:
        found += [f"on {there.device}: {problem}" for problem in problems_of(there)]
    return found
