"""Holds the part of a layer that works token by token against the checkpoint's spec."""

from __future__ import annotations

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.decoder import Layer
from edgeforge.verification.meaning.experts import Experts
from edgeforge.verification.meaning.feed_forward import FeedForward
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.gates import Gates, activation_of
from edgeforge.verification.meaning.recurring import Recurring
from edgeforge.verification.meaning.steps import Steps


class Fed:
    """Compares feed-forward parts, dense ones and mixtures.

    Args:
        spec: the spec of the program.
        steps: compares what stands between products.
        findings: takes what is found.
    """

    def __init__(self, spec: ModelSpec, steps: Steps, findings: Findings) -> None:
        self.spec, self.steps, self.findings = spec, steps, findings
        self.gates = Gates(spec, steps, findings)
        self.experts = Experts(spec, steps, self.gates, findings)

    def open(self) -> None:
        """Opens the facts that `hold` looks at."""
        words = activation_of(self.spec)
        fact = self.findings.fact
        fact("gate", f"{words} is applied to the gate, which up is multiplied with")
        fact("activation", f"the activation function is {words}")
        self.experts.open()

    def hold(self, place: str, at: str, layer: Layer, wanted: LayerSpec) -> None:
        """Compares a layer's part.

        Args:
            place: the entry point and the layer.
            at: the layer's name, with a dot at its end.
            layer: the layer.
            wanted: its dimensions.
        """
        part, hold = layer.feed_forward, self.steps.hold
        assert not isinstance(part, Recurring)
        dense = isinstance(part, FeedForward)
        found = 0 if isinstance(part, FeedForward) else len(part.experts)
        words = f"{place} has {found or 'no'} experts, not {wanted.experts or 'none'}"
        if wanted.experts or found:
            if not self.findings.same("experts", found == wanted.experts, place, words):
                self.findings.number("experts", found)
            if dense != (wanted.experts == 0):
                return
        entering = expected.entering_feed_forward(self.spec, at)
        hold(place, "the feed-forward part's operand", part.entering, entering)
        down = ""
        if isinstance(part, FeedForward):
            self.gates.hold(place, f"{at}mlp.", part, wanted.ffn_width)
            down = "mlp.down_proj"
        else:
            self.experts.hold(place, at, part, wanted)
        leaving = expected.leaving(self.spec, at, "mlp_output_norm", down)
        hold(place, "the feed-forward part's result", layer.fed, leaving)
