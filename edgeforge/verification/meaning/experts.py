"""Holds a mixture of experts against the checkpoint's spec: who chooses, and what is added up."""

from __future__ import annotations

import math
from typing import Final

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.chains import Chain
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.gates import Gates
from edgeforge.verification.meaning.mixture import Expert, Mixture
from edgeforge.verification.meaning.steps import Steps
from exporters.lifted_mixture import Route

_RULES: Final = {
    "softmax": "the chosen experts' shares are not normalised",
    "normalized_softmax": "the chosen experts' shares are normalised",
    "sparse_mixer": "experts are chosen by SparseMixer's rule",
}
_JITTER_SLACK: Final = 1e-3


class Experts:
    """Compares the mixture of one layer after another.

    Args:
        spec: the spec of the program.
        steps: compares what stands between products.
        gates: compares an expert's own part.
        findings: takes what is found.
    """

    def __init__(self, spec: ModelSpec, steps: Steps, gates: Gates, findings: Findings) -> None:
        self.spec, self.steps, self.gates, self.findings = spec, steps, gates, findings

    def open(self) -> None:
        """Opens the facts that `hold` looks at."""
        spec, fact = self.spec, self.findings.fact
        for name, numbers, words in (
            ("experts", {layer.experts for layer in spec.layers}, "experts in a mixture"),
            (
                "chosen_experts",
                {layer.chosen_experts for layer in spec.layers},
                "experts that a token chooses",
            ),
        ):
            several = sorted(numbers - {0})
            one = several[0] if len(several) == 1 else None
            fact(name, f"the number of {words} is {', '.join(map(str, several))}", one)
        fact("router", _RULES[spec.router])
        jitter = spec.router_jitter
        fact("router_jitter", f"SparseMixer's jitter is {jitter:g}", jitter)
        fact("expert_weights", "every expert has its own matrices, at its own place")
        fact("chosen_tokens", "every expert gets the tokens that chose it")
        fact("combination", "every expert's result is multiplied by its own weight")
        fact("shared_expert", "the shared expert and its gate are the checkpoint's")

    def hold(self, place: str, at: str, part: Mixture, wanted: LayerSpec) -> None:
        """Compares a layer's mixture.

        Args:
            place: the entry point and the layer.
            at: the layer's name, with a dot at its end.
            part: the mixture.
            wanted: the layer's dimensions.
        """
        self.gates.weight(place, part.router.weight, f"{at}mlp.router.weight")
        bias = expected.biased(self.spec, f"{at}mlp.router")
        self.steps.hold(place, "the router's logits", part.logits, bias)
        whole = part.logits.columns is None
        words = f"{place}: some columns of the router's logits are left out"
        self.findings.same("experts", whole, place, words)
        self._rule(place, part, wanted)
        columns = [expert.column for expert in part.experts]
        words = f"{place} adds up the experts {columns[:8]}, not each of them once"
        each = sorted(columns) == list(range(wanted.experts))
        self.findings.same("combination", each, place, words)
        for expert in part.experts:
            where = f"{place}, expert {expert.column}"
            self._expert(where, f"{at}mlp.experts.{expert.column}.", part, expert, wanted)
        self._shared(place, f"{at}mlp.shared_expert", part, wanted)

    def _rule(self, place: str, part: Mixture, wanted: LayerSpec) -> None:
        spec, same, route = self.spec, self.findings.same, part.route
        count, found = 2, "sparse_mixer"
        if isinstance(route, Route):
            count = route.chosen
            found = "normalized_softmax" if route.normalized else "softmax"
        words = f"{place}: {_RULES[found]}; in the checkpoint {_RULES[spec.router]}"
        same("router", found == spec.router, place, words)
        own = wanted.chosen_experts
        words = f"{place}: a token chooses {count} experts, not {own}"
        if not same("chosen_experts", count == own, place, words):
            self.findings.number("chosen_experts", count)
        if isinstance(route, Route) or spec.router != "sparse_mixer":
            return
        near = math.isclose(route.jitter, spec.router_jitter, rel_tol=_JITTER_SLACK)
        words = f"{place} has SparseMixer's jitter {route.jitter:g}, not {spec.router_jitter:g}"
        if not same("router_jitter", near, place, words):
            self.findings.number("router_jitter", route.jitter)

    def _expert(
        self, place: str, at: str, mixture: Mixture, expert: Expert, wanted: LayerSpec
    ) -> None:
        same = self.findings.same
        own = expert.chosen in (None, expert.column)
        words = f"{place} gets the tokens that chose expert {expert.chosen}"
        same("chosen_tokens", own, place, words)
        by = expert.chosen is None or expert.by is mixture.weights
        words = f"{place} gets tokens by other weights than its result is multiplied by"
        same("chosen_tokens", by, place, words)
        self._operand(place, mixture, expert.part.entering)
        self.gates.hold(place, at, expert.part, wanted.ffn_width, "expert_weights")
        bias = expected.biased(self.spec, f"{at}down_proj")
        self.steps.hold(place, "the expert's result", expert.result, bias)

    def _operand(self, place: str, mixture: Mixture, entering: Chain) -> None:
        """The router, every expert and the shared one read the same values."""
        same = entering.source is mixture.entering.source
        same &= entering.steps == mixture.entering.steps
        words = f"{place} reads other values than the router"
        self.findings.same("block", same, place, words)

    def _shared(self, place: str, at: str, part: Mixture, wanted: LayerSpec) -> None:
        same, shared = self.findings.same, part.shared
        has, must = shared is not None, wanted.shared_width > 0
        words = f"{place} has {'a' if has else 'no'} shared expert"
        if has or must:
            same("shared_expert", has == must, place, words)
        if shared is None or not must:
            return
        assert part.shared_result is not None
        where = f"{place}, the shared expert"
        self._operand(where, part, shared.entering)
        self.gates.hold(where, f"{at}.", shared, wanted.shared_width, "shared_expert")
        bias = expected.biased(self.spec, f"{at}.down_proj")
        self.steps.hold(where, "its result", part.shared_result, bias)
        name = f"{at}_gate.weight"
        gated, must = part.shared_gate is not None, name in self.spec.weights
        words = f"{place}: {'a' if gated else 'no'} gate multiplies the shared expert's result"
        same("shared_expert", gated == must, place, words)
        if part.shared_gate is not None and must:
            self.gates.weight(where, part.shared_gate.weight, name, "shared_expert")
            assert part.shared_entering is not None
            self._operand(where, part, part.shared_entering)
