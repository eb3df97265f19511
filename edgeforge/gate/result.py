"""`GateResult`: what a check found, as every output shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from edgeforge.errors import CheckFailed
from edgeforge.verification.bounds import Checked

RESULT_VERSION = 1

Outcome = Literal["passed", "failed", "doubtful", "allowed"]
Kind = Literal["bound", "baseline", "fact", "reference"]


@dataclass(frozen=True)
class Finding:
    """One figure or fact of an artifact, and what came out.

    Attributes:
        metric: its dotted name, which a policy names too.
        outcome: ``passed``; ``failed``; ``doubtful`` where the bound lies in the interval; or
            ``allowed`` where it failed and the policy allows that.
        kind: what it was held against: a ``bound``, the ``baseline``, a ``fact`` of the checkpoint
            or the export, or a ``reference`` that ran in the same job.
        value: the figure; None for a fact that is no number.
        low: the lower end of its 95 % interval; None where there is no interval.
        high: the upper end.
        sense: ``at most``, ``at least`` or ``equal``.
        limit: the bound; None where there is none.
        source: who set the bound.
        baseline: the baseline's figure; None where there is none.
        change: how much the figure changed since: a difference, or of perplexity the factor less 1.
        change_low: the lower end of the interval of the change over the same tokens.
        change_high: the upper end.
        where: where to look: the worst positions, weights, or words.
        message: one sentence.
    """

    metric: str
    outcome: Outcome
    kind: Kind
    message: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    sense: str = "equal"
    limit: float | None = None
    source: str = ""
    baseline: float | None = None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    where: tuple[str, ...] = ()

    @classmethod
    def of(cls, checked: Checked, kind: Kind, source: str) -> Finding:
        """What came out of a check.

        Args:
            checked: the figure or fact.
            kind: what it was held against.
            source: who set the bound.
        """
        return cls(
            metric=checked.name,
            outcome=checked.verdict,
            kind=kind,
            message=checked.message,
            value=checked.value,
            low=checked.low,
            high=checked.high,
            sense=checked.sense,
            limit=checked.limit,
            source=source,
            where=checked.where,
        )


@dataclass(frozen=True)
class ArtifactResult:
    """What was found of one artifact.

    Attributes:
        path: its folder, relative to the policy's.
        folder: its folder, as the user named it.
        target: the runtime's format; empty where its manifest cannot be read.
        recipe: how it was quantized.
        model: the checkpoint, as the user named it.
        fresh: whether its report was fresh, so that it was not run again.
        verified_because: why it was not, a phrase each.
        measured_on: what text, and how many tokens of it; empty where it did not run.
        findings: every figure and fact.
    """

    path: str
    folder: str
    target: str
    recipe: str
    model: str
    fresh: bool
    verified_because: tuple[str, ...]
    measured_on: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """What does not keep to the policy or the baseline."""
        return tuple(each for each in self.findings if each.outcome == "failed")

    @property
    def label(self) -> str:
        """What to call it in one line."""
        return f"{self.path} ({self.target}, {self.recipe})" if self.target else self.path


@dataclass(frozen=True)
class GateResult:
    """What a check found.

    Attributes:
        policy: the policy's file; None where the targets' own bounds held.
        baseline: the baseline's file; None where there was none.
        baseline_updated: whether the baseline was written anew.
        artifacts: one for each artifact, in order.
        notes: what a user must know beside, one sentence each.
        seconds: what the check took.
        schema_version: of the JSON form.
    """

    policy: str | None
    baseline: str | None
    baseline_updated: bool
    artifacts: tuple[ArtifactResult, ...]
    notes: tuple[str, ...]
    seconds: float
    schema_version: int = RESULT_VERSION

    @property
    def passed(self) -> bool:
        """Whether no artifact falls short."""
        return not any(each.failed for each in self.artifacts)

    @property
    def violations(self) -> list[tuple[ArtifactResult, Finding]]:
        """Everything that failed, with its artifact."""
        return [(each, finding) for each in self.artifacts for finding in each.failed]

    def to_json(self) -> dict[str, object]:
        """The result as ``--json`` prints it, where null stands for what is not finite."""
        return {
            **asdict(self),
            "artifacts": [{**asdict(each), "passed": not each.failed} for each in self.artifacts],
            "passed": self.passed,
        }

    def require_passed(self) -> None:
        """Refuses artifacts that fall short.

        Raises:
            GateFailed: names what does, in one sentence.
        """
        if self.passed:
            return
        short = [each for each in self.artifacts if each.failed]
        count = len(self.violations)
        words = f"{count} violation{'s' if count > 1 else ''} in {len(short)} of "
        words += f"{len(self.artifacts)} artifacts: "
        raise GateFailed(words + "; ".join(_named(each) for each in short), self)


class GateFailed(CheckFailed):
    """An artifact falls short of the policy, or of the baseline.

    Attributes:
        result: everything that was found.
    """

    def __init__(self, message: str, result: GateResult) -> None:
        super().__init__(message)
        self.result = result


def _named(artifact: ArtifactResult) -> str:
    names: Sequence[str] = list(dict.fromkeys(each.metric for each in artifact.failed))
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{artifact.path} ({shown})"
