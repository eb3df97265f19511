"""Holds the part of a layer that works token by token against the checkpoint's spec."""

from __future__ import annotations

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.choosing import Choosing
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
        choosing: compares routers.
        findings: takes what is found.
    """

    def __init__(
        self, spec: ModelSpec, steps: Steps, choosing: Choosing, findings: Findings
    ) -> None:
        self.spec, self.steps, self.findings = spec, steps, findings
        self.gates, self.choosing = Gates(spec, steps, findings), choosing
        self.experts = Experts(spec, steps, self.gates, choosing, findings)

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
        found = 0 if isinstance(part, FeedForward) else len(part.experts)
        if not self.choosing.count(place, found, wanted.experts):
            return
        entering = expected.entering_feed_forward(self.spec, at)
        hold(place, "the feed-forward part's operand", part.entering, entering)
        last = "mlp.output"
        if isinstance(part, FeedForward):
            self.gates.hold(place, f"{at}mlp.", part, wanted.ffn_width)
            last = "mlp.down_proj"
        else:
            self.experts.hold(place, at, part, wanted)
        leaving = expected.leaving(self.spec, at, "mlp_output_norm", last)
        hold(place, "the feed-forward part's result", layer.fed, leaving)
