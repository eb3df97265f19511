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
    problems = []
    unlike = evaluation.weights_unlike_store
    if unlike and not evaluation.other_processor:
        problems.append(
            f"{len(unlike)} weights ({unlike[0]}{', ...' if unlike[1:] else ''}) are what the "
            f"manifest records, but not what the weight store of the same checkpoint and recipe "
            f"holds ({evaluation.weight_store}): the artifact has other integers or scales"
        )
    problems += [each.sentence(name.upper()) for name, each in evaluation.not_finite.items()]
    steps = evaluation.greedy_float.not_finite
    if steps and "artifact" not in evaluation.not_finite:
        problems.append(f"ARTIFACT gives NaN or infinite logits at {steps} steps of greedy text")
    problems += [each.message for each in evaluation.checks if each.verdict == "failed"]
    return problems
