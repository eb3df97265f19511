"""Holds chains of steps against the steps that a spec says must stand there."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from edgeforge.families.spec import ModelSpec
from edgeforge.verification.meaning.chains import Chain, Step
from edgeforge.verification.meaning.findings import Findings
from exporters.lifted import Bias, Clamp, LayerNorm, Norm, Rope, Scaled, Softcap

# float16 keeps 11 bits, and some norms hold the root of epsilon.
_EPSILON_SLACK: Final = 4e-3
_NUMBER_SLACK: Final = 1e-3


@dataclass(frozen=True)
class WantedNorm:
    """A norm.

    Attributes:
        what: which one, in words.
        at: the program's name of its weights, without ``.weight`` and ``.bias``.
        kind: how it normalises.
    """

    what: str
    at: str
    kind: type[Norm] | type[LayerNorm]


@dataclass(frozen=True)
class WantedBias:
    """A bias.

    Attributes:
        weight: the program's name of it.
    """

    weight: str


@dataclass(frozen=True)
class WantedNumber:
    """A factor, a softcap or a bound.

    Attributes:
        fact: the spec's field that states it.
        kind: which step it is.
        number: the factor, the cap or the limit.
    """

    fact: str
    kind: type[Scaled] | type[Softcap] | type[Clamp]
    number: float


@dataclass(frozen=True)
class WantedRope:
    """A rotation.

    Attributes:
        index: which of the spec's rotary embeddings.
    """

    index: int


Wanted = WantedNorm | WantedBias | WantedNumber | WantedRope

_NUMBERS: Final[dict[type[Step], tuple[str, str]]] = {
    Scaled: ("factors", "factor"),
    Softcap: ("bounds", "softcap"),
    Clamp: ("bounds", "bound"),
}
"""By kind: the fact of one that must not be there, and what it is called."""


def open_facts(spec: ModelSpec, findings: Findings) -> None:
    """Opens the facts that `Steps` looks at."""
    fact = findings.fact
    fact("norm_eps", f"every norm's epsilon is {spec.norm_eps:g}", spec.norm_eps)
    fact("norms", "every norm is there, and no other")
    fact("biases", "every bias is there, and no other")
    for name in ("embedding", "residual", "logit"):
        number = getattr(spec, f"{name}_multiplier")
        fact(f"{name}_multiplier", f"the {name} multiplier is {number:g}", number)
    cap, limit = spec.logit_softcap, spec.clip_qkv
    fact("logit_softcap", f"the logits' softcap is {cap:g}", cap)
    fact("clip_qkv", f"queries, keys and values are bounded by {limit:g}", limit)
    fact("factors", "no factor stands where the checkpoint has none")
    fact("bounds", "no bound stands where the checkpoint has none")


class Steps:
    """Compares the steps of one chain after another.

    Args:
        spec: the spec of the program.
        findings: takes what is found.
    """

    def __init__(self, spec: ModelSpec, findings: Findings) -> None:
        self.spec, self.findings = spec, findings

    def hold(self, place: str, what: str, found: Chain, wanted: tuple[Wanted, ...]) -> None:
        """Compares the steps of a chain, and says which is missing and which is one too many.

        Args:
            place: the entry point and the layer.
            what: what the chain makes, in words.
            found: the chain.
            wanted: the steps that must be there, from the last to the first. Rotations are compared
                by the caller.
        """
        steps = [step for step in found.steps if not isinstance(step, Rope)]
        for each in wanted:
            if isinstance(each, WantedRope):
                continue
            at = next((i for i, step in enumerate(steps) if _is_kind(step, each)), None)
            if at is None:
                self._missing(place, what, each)
                continue
            for extra in steps[:at]:
                self._extra(place, what, extra)
            self._compare(place, what, steps[at], each)
            steps = steps[at + 1 :]
        for extra in steps:
            self._extra(place, what, extra)

    def _compare(self, place: str, what: str, found: Step, wanted: Wanted) -> None:
        if isinstance(wanted, WantedNorm):
            assert isinstance(found, Norm | LayerNorm)
            self._norm(f"{place}: {wanted.what}", found, wanted)
        elif isinstance(wanted, WantedBias):
            assert isinstance(found, Bias)
            name = found.weight.name
            words = f"{place}: {what} has the bias {name}, not {wanted.weight}"
            self.findings.same("biases", name == wanted.weight, place, words)
        elif isinstance(wanted, WantedNumber):
            number, word = _number(found), _NUMBERS[wanted.kind][1]
            near = math.isclose(number, wanted.number, rel_tol=_NUMBER_SLACK)
            words = f"{place} has a {word} of {number:.6g} on {what}, not {wanted.number:.6g}"
            if not self.findings.same(wanted.fact, near, place, words):
                self.findings.number(wanted.fact, number)

    def _norm(self, place: str, norm: Norm | LayerNorm, wanted: WantedNorm) -> None:
        same, mapped = self.findings.same, self.spec.weights
        kind = "an RMSNorm" if isinstance(norm, Norm) else "a LayerNorm"
        if not same("norms", isinstance(norm, wanted.kind), place, f"{place} is {kind}"):
            return
        parts = [("weight", norm.weight)]
        if isinstance(norm, LayerNorm):
            parts.append(("bias", norm.bias))
        for part, weight in parts:
            name = f"{wanted.at}.{part}"
            own, found = name if name in mapped else None, weight.name if weight else None
            words = f"{place} has the {part} {found}, not {own}"
            same("norms" if part == "weight" else "biases", found == own, place, words)
        eps = self.spec.norm_eps
        near = math.isclose(norm.epsilon, eps, rel_tol=_EPSILON_SLACK)
        if not same("norm_eps", near, place, f"{place} adds {norm.epsilon:.3g}, not {eps:g}"):
            self.findings.number("norm_eps", norm.epsilon)

    def _missing(self, place: str, what: str, wanted: Wanted) -> None:
        same = self.findings.same
        if isinstance(wanted, WantedNorm):
            at = f"{place}: {wanted.what}"
            same("norms", False, at, f"{at} is missing")
        elif isinstance(wanted, WantedBias):
            same("biases", False, place, f"{place}: {wanted.weight} is not added to {what}")
        elif isinstance(wanted, WantedNumber):
            word, number = _NUMBERS[wanted.kind][1], wanted.number
            same(wanted.fact, False, place, f"{place} has no {word} of {number:.6g} on {what}")

    def _extra(self, place: str, what: str, found: Step) -> None:
        same = self.findings.same
        if isinstance(found, Norm | LayerNorm):
            name = f"the norm {found.weight.name}" if found.weight else "a norm"
            words = f"{place}: {name} makes {what}, where the checkpoint has none"
            same("norms", False, place, words)
        elif isinstance(found, Bias):
            words = f"{place}: {found.weight.name} is added to {what}, which has none"
            same("biases", False, place, words)
        elif isinstance(found, Scaled | Softcap | Clamp):
            (fact, word), number = _NUMBERS[type(found)], _number(found)
            words = f"{place} has a {word} of {number:.6g} on {what}, which the checkpoint has not"
            same(fact, False, place, words)


def _is_kind(step: Step, wanted: Wanted) -> bool:
    """Whether a step is compared with a wanted one, whatever its weight and numbers."""
    if isinstance(wanted, WantedNorm):
        return isinstance(step, Norm | LayerNorm)
    if isinstance(wanted, WantedBias):
        return isinstance(step, Bias)
    return isinstance(wanted, WantedNumber) and isinstance(step, wanted.kind)


def _number(step: Step) -> float:
    if isinstance(step, Scaled):
        return step.factor
    if isinstance(step, Softcap):
        return step.cap
    assert isinstance(step, Clamp)
    return step.limit
