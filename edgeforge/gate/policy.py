"""`Policy`: what artifacts must keep to, as ``edgeforge-policy.yaml`` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from edgeforge.errors import UsageError
from edgeforge.gate.metrics import number_text
from edgeforge.verification.sample import TokenCount

POLICY = "edgeforge-policy.yaml"


@dataclass(frozen=True)
class Range:
    """What a figure may be.

    Attributes:
        at_most: the largest value; None for none.
        at_least: the smallest value; None for none.
        source: who says so, for messages: ``the policy`` or one of its rules.
    """

    at_most: float | None = None
    at_least: float | None = None
    source: str = "the policy"


@dataclass(frozen=True)
class Ratio:
    """The smallest ratio of a speed to a reference's in the same job.

    Attributes:
        against: the reference's folder.
        at_least: the smallest ratio.
        source: who says so, for messages.
        device: of what `bench` measured, the devices that it is for; a pattern of a shell.
    """

    against: Path
    at_least: float
    source: str = "the policy"
    device: str = "*"


@dataclass(frozen=True)
class Subject:
    """What a rule may choose an artifact by.

    Attributes:
        path: of the artifact's folder, relative to the policy's.
        target: the runtime's format.
        recipe: how it was quantized.
        models: what the checkpoint may be called: as the user named it, and its folder's name.
    """

    path: str
    target: str
    recipe: str
    models: tuple[str, ...]


@dataclass(frozen=True)
class Terms:
    """What the policy, or one of its rules, sets; None or empty is what it leaves as it was."""

    text: Path | None = None
    tokens: TokenCount | None = None
    checkpoint: str | None = None
    bounds: Mapping[str, Range] = field(default_factory=dict)
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    worse_by: Mapping[str, float] = field(default_factory=dict)
    allow: Mapping[str, str] = field(default_factory=dict)

    def overridden(self, other: Terms) -> Terms:
        """These terms, with what the other ones set in place of their own."""
        return Terms(
            text=self.text if other.text is None else other.text,
            tokens=self.tokens if other.tokens is None else other.tokens,
            checkpoint=self.checkpoint if other.checkpoint is None else other.checkpoint,
            bounds=_merged(self.bounds, other.bounds),
            ratios={**self.ratios, **other.ratios},
            worse_by={**self.worse_by, **other.worse_by},
            allow={**self.allow, **other.allow},
        )


@dataclass(frozen=True)
class Rule:
    """Terms for the artifacts that match; patterns are those of a shell.

    Attributes:
        number: the rule's place in the policy, from 1.
        match: patterns by ``path``, ``target``, ``recipe`` or ``model``; all must match.
        terms: what the rule sets.
    """

    number: int
    match: Mapping[str, str]
    terms: Terms

    def chooses(self, subject: Subject) -> bool:
        """Whether the rule is for an artifact."""
        names = {
            "path": (subject.path,),
            "target": (subject.target,),
            "recipe": (subject.recipe,),
            "model": subject.models,
        }
        return all(
            any(fnmatchcase(name, pattern) for name in names[key])
            for key, pattern in self.match.items()
        )

    def __str__(self) -> str:
        words = ", ".join(f"{key} {pattern}" for key, pattern in self.match.items())
        return f"rule {self.number} ({words})"


@dataclass(frozen=True)
class Policy:
    """What artifacts must keep to.

    Attributes:
        folder: where its relative paths begin.
        path: its file; None where nobody wrote one and the targets' own bounds hold.
        artifacts: folders to check when the user names none; patterns of a shell.
        baseline: the file of the baseline; None for none.
        terms: for every artifact.
        rules: in order; a later one overrides an earlier one.
    """

    folder: Path
    path: Path | None = None
    artifacts: tuple[str, ...] = ()
    baseline: Path | None = None
    terms: Terms = field(default_factory=Terms)
    rules: tuple[Rule, ...] = ()

    def terms_for(self, subject: Subject) -> Terms:
        """What an artifact must keep to.

        Raises:
            UsageError: two bounds that hold for it contradict each other.
        """
        found = self.terms
        for rule in self.rules:
            if rule.chooses(subject):
                found = found.overridden(rule.terms)
        for name, given in found.bounds.items():
            refuse_contradiction(f"{self.path}: for {subject.path}", name, given)
        return found


def refuse_contradiction(where: str, name: str, given: Range) -> None:
    """Refuses a range that no value lies in.

    Raises:
        UsageError: says what contradicts what.
    """
    low, high = given.at_least, given.at_most
    if low is not None and high is not None and low > high:
        raise UsageError(
            f"{where}: {name} must be at most {number_text(name, high)} and at least "
            f"{number_text(name, low)}, which nothing can be: change one of the two"
        )


def _merged(own: Mapping[str, Range], other: Mapping[str, Range]) -> dict[str, Range]:
    """One side of a bound overrides that side alone."""
    found = dict(own)
    for name, given in other.items():
        before = own.get(name, Range())
        found[name] = Range(
            at_most=before.at_most if given.at_most is None else given.at_most,
            at_least=before.at_least if given.at_least is None else given.at_least,
            source=given.source,
        )
    return found
