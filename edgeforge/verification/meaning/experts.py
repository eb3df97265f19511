"""Holds a mixture of experts against the checkpoint's spec: who chooses, and what is added up."""

from __future__ import annotations

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.choosing import Choosing
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.gates import Gates
from edgeforge.verification.meaning.mixture import Expert, Mixture
from edgeforge.verification.meaning.steps import Steps


class Experts:
    """Compares the mixture of one layer after another.

    Args:
        spec: the spec of the program.
        steps: compares what stands between products.
        gates: compares an expert's own part.
        choosing: compares routers.
        findings: takes what is found.
    """

    def __init__(
        self, spec: ModelSpec, steps: Steps, gates: Gates, choosing: Choosing, findings: Findings
    ) -> None:
        self.spec, self.steps, self.gates, self.findings = spec, steps, gates, findings
        self.choosing = choosing

    def open(self) -> None:
        """Opens the facts that `hold` looks at, beside those of `Choosing`."""
        words = "the shared expert and its gate are the checkpoint's"
        self.findings.fact("shared_expert", words)

    def hold(self, place: str, at: str, part: Mixture, wanted: LayerSpec) -> None:
        """Compares a layer's mixture.

        Args:
            place: the entry point and the layer.
            at: the layer's name, with a dot at its end.
            part: the mixture.
            wanted: the layer's dimensions.
        """
        self.choosing.hold(place, f"{at}mlp.router", part.router, wanted.chosen_experts)
        columns = [expert.column for expert in part.experts]
        words = f"{place} adds up the experts {columns[:8]}, not each of them once"
        each = sorted(columns) == list(range(wanted.experts))
        self.findings.same("combination", each, place, words)
        for expert in part.experts:
            where = f"{place}, expert {expert.column}"
            self._expert(where, f"{at}mlp.experts.{expert.column}.", part, expert, wanted)
        self._shared(place, f"{at}mlp.shared_expert", part, wanted)

    def _expert(
        self, place: str, at: str, mixture: Mixture, expert: Expert, wanted: LayerSpec
    ) -> None:
        same = self.findings.same
        own = expert.chosen in (None, expert.column)
        words = f"{place} gets the tokens that chose expert {expert.chosen}"
        same("chosen_tokens", own, place, words)
        by = expert.chosen is None or expert.by is mixture.router.route
        words = f"{place} gets tokens by other weights than its result is multiplied by"
        same("chosen_tokens", by, place, words)
        self.choosing.operand(place, mixture.router, expert.part.entering)
        self.gates.hold(place, at, expert.part, wanted.ffn_width, "expert_weights")
        bias = expected.biased(self.spec, f"{at}down_proj")
        self.steps.hold(place, "the expert's result", expert.result, bias)

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
        self.choosing.operand(where, part.router, shared.entering)
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
            self.choosing.operand(where, part.router, part.shared_entering)
