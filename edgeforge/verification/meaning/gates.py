"""Holds the products and the activation function of a feed-forward part against the spec."""

from __future__ import annotations

from edgeforge.families.spec import ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.feed_forward import FeedForward
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.steps import Steps
from exporters.lifted import Gelu, Silu, StoredWeight


class Gates:
    """Compares ``down(act(gate) * up)`` or ``down(act(up))``.

    Args:
        spec: the spec of the program.
        steps: compares what stands between products.
        findings: takes what is found.
    """

    def __init__(self, spec: ModelSpec, steps: Steps, findings: Findings) -> None:
        self.spec, self.steps, self.findings = spec, steps, findings

    def hold(
        self, place: str, at: str, part: FeedForward, width: int, fact: str = "weights"
    ) -> None:
        """Compares a part.

        Args:
            place: the entry point, the layer and the expert, if it is one.
            at: the part's name, with a dot at its end.
            part: the part.
            width: how many columns gate and up have.
            fact: the fact to which its weights belong.
        """
        spec, hold = self.spec, self.steps.hold
        into = f"{at}{'gate_up_proj' if spec.gated else 'up_proj'}"
        self.weight(place, part.into.weight, f"{into}.weight", fact)
        self.weight(place, part.down.weight, f"{at}down_proj.weight", fact)
        hold(place, "the gate", part.gate, expected.biased(spec, into))
        if part.up is not None:
            hold(place, "up", part.up, expected.biased(spec, into))
        self._gate(place, part, width)

    def weight(self, place: str, found: StoredWeight, wanted: str, fact: str = "weights") -> None:
        """Compares a weight's name."""
        words = f"{place} reads {found.name} where it must read {wanted}"
        self.findings.same(fact, found.name == wanted, place, words)

    def _gate(self, place: str, part: FeedForward, width: int) -> None:
        spec, same = self.spec, self.findings.same
        found, own = _named(part.activation), activation_of(spec)
        words = f"{place} has the activation function {found}, not {own}"
        if not (spec.activation == "silu" and spec.gated):
            same("activation", found == own, place, words)
        elif found != own:
            same("gate", False, place, words)
        if not spec.gated or part.up is None:
            has = "a factor" if part.up is not None else "no factor"
            words = f"{place}: the activation function's result has {has}"
            same("gate", spec.gated == (part.up is not None), place, words)
            whole = part.gate.columns is None
            same("gate", whole, place, f"{place}: {found} is applied to some columns of up alone")
            return
        gate, up = part.gate.span("the gate"), part.up.span("up")
        swapped = (gate, up) == ((width, 2 * width), (0, width))
        words = (
            f"{found} is applied to up, and gate is multiplied with it"
            if swapped
            else (
                f"{found} is applied to columns {gate} and multiplied with {up}, "
                f"not {(0, width)} and {(width, 2 * width)}"
            )
        )
        good = (gate, up) == ((0, width), (width, 2 * width))
        same("gate", good, place, f"{place}: {words}")


def activation_of(spec: ModelSpec) -> str:
    """The activation function's name, in words."""
    return {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU by a tanh"}[spec.activation]


def _named(activation: Silu | Gelu) -> str:
    if isinstance(activation, Silu):
        return "SiLU"
    return "GELU by a tanh" if activation.tanh else "GELU"
