"""Holds how tokens choose experts against the checkpoint's spec."""

from __future__ import annotations

import math
from typing import Final

from edgeforge.families.spec import ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.chains import Chain
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.router import Router
from edgeforge.verification.meaning.steps import Steps
from exporters.lifted_mixture import Route

_RULES: Final = {
    "softmax": "the chosen experts' shares are not normalised",
    "normalized_softmax": "the chosen experts' shares are normalised",
    "sparse_mixer": "experts are chosen by SparseMixer's rule",
}
_JITTER_SLACK: Final = 1e-3


class Choosing:
    """Compares one router after another, of feed-forward parts and of attention.

    Args:
        spec: the spec of the program.
        steps: compares what stands between products.
        findings: takes what is found.
    """

    def __init__(self, spec: ModelSpec, steps: Steps, findings: Findings) -> None:
        self.spec, self.steps, self.findings = spec, steps, findings

    def open(self) -> None:
        """Opens the facts that all mixtures have."""
        layers, fact = self.spec.layers, self.findings.fact
        for name, numbers, words in (
            (
                "experts",
                {count for each in layers for count in (each.experts, each.attention_experts)},
                "experts in a mixture",
            ),
            (
                "chosen_experts",
                {
                    count
                    for each in layers
                    for count in (each.chosen_experts, each.chosen_attention_experts)
                },
                "experts that a token chooses",
            ),
        ):
            several = sorted(numbers - {0})
            one = several[0] if len(several) == 1 else None
            fact(name, f"the number of {words} is {', '.join(map(str, several))}", one)
        fact("router", _RULES[self.spec.router])
        jitter = self.spec.router_jitter
        fact("router_jitter", f"SparseMixer's jitter is {jitter:g}", jitter)
        fact("expert_weights", "every expert has its own matrices, at its own place")
        fact("chosen_tokens", "every expert gets the tokens that chose it")
        fact("combination", "every expert's result is multiplied by its own weight")

    def count(self, place: str, found: int, wanted: int) -> bool:
        """Compares how many experts there are; returns whether both have some or both have none.

        Args:
            place: the entry point, the layer and, for attention, the part.
            found: of the file.
            wanted: of the checkpoint.
        """
        if not (found or wanted):
            return True
        words = f"{place} has {found or 'no'} experts, not {wanted or 'none'}"
        if not self.findings.same("experts", found == wanted, place, words):
            self.findings.number("experts", found)
        return (found > 0) == (wanted > 0)

    def hold(self, place: str, named: str, router: Router, chosen: int) -> None:
        """Compares a router.

        Args:
            place: as of `count`.
            named: the router's name in the program.
            router: the router.
            chosen: how many experts a token has.
        """
        same, found = self.findings.same, router.product.weight.name
        words = f"{place} reads {found} where it must read {named}.weight"
        same("weights", found == f"{named}.weight", place, words)
        bias = expected.biased(self.spec, named)
        self.steps.hold(place, "the router's logits", router.logits, bias)
        whole = router.logits.columns is None
        same("experts", whole, place, f"{place}: some columns of the router's logits are left out")
        self._rule(place, router, chosen)

    def operand(self, place: str, router: Router, entering: Chain) -> None:
        """Compares what an expert reads with what the router reads."""
        same = entering.source is router.entering.source
        same &= entering.steps == router.entering.steps
        words = f"{place} reads other values than the router"
        self.findings.same("block", same, place, words)

    def _rule(self, place: str, router: Router, chosen: int) -> None:
        spec, same, route = self.spec, self.findings.same, router.route
        count, found = 2, "sparse_mixer"
        if isinstance(route, Route):
            count = route.chosen
            found = "normalized_softmax" if route.normalized else "softmax"
        words = f"{place}: {_RULES[found]}; in the checkpoint {_RULES[spec.router]}"
        same("router", found == spec.router, place, words)
        words = f"{place}: a token chooses {count} experts, not {chosen}"
        if not same("chosen_experts", count == chosen, place, words):
            self.findings.number("chosen_experts", count)
        if isinstance(route, Route) or spec.router != "sparse_mixer":
            return
        near = math.isclose(route.jitter, spec.router_jitter, rel_tol=_JITTER_SLACK)
        words = f"{place} has SparseMixer's jitter {route.jitter:g}, not {spec.router_jitter:g}"
        if not same("router_jitter", near, place, words):
            self.findings.number("router_jitter", route.jitter)
