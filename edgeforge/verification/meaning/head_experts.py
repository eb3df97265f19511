"""Holds the experts of a mixture of attention heads against the checkpoint's spec."""

from __future__ import annotations

from collections.abc import Iterable

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning import expected
from edgeforge.verification.meaning.chains import plain
from edgeforge.verification.meaning.choosing import Choosing
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.head_mixture import HeadMixture, OutputExpert, QueryExpert
from edgeforge.verification.meaning.steps import Steps
from exporters.lifted import Linear
from exporters.lifted_mixture import ChosenSlots, Slots


class HeadExperts:
    """Compares the queries and outputs of experts, and the slots that they share.

    Args:
        spec: the spec of the program.
        steps: compares what stands between products.
        choosing: compares routers.
        findings: takes what is found.
    """

    def __init__(
        self, spec: ModelSpec, steps: Steps, choosing: Choosing, findings: Findings
    ) -> None:
        self.spec, self.steps, self.choosing, self.findings = spec, steps, choosing, findings

    def open(self) -> None:
        """Opens the facts that `hold` looks at, beside those of `Choosing`."""
        words = "every expert's queries are in slots of its own, from which its output is made"
        self.findings.fact("slots", words)

    def hold(self, place: str, at: str, part: HeadMixture, wanted: LayerSpec) -> None:
        """Compares a layer's experts.

        Args:
            place: the entry point, the layer and the part.
            at: attention's name, with a dot at its end.
            part: the mixture.
            wanted: the layer's dimensions.
        """
        self.choosing.hold(place, f"{at}router", part.router, wanted.chosen_attention_experts)
        self._each_once(place, "queries", "slots", part.queries, wanted)
        self._each_once(place, "outputs", "combination", part.outputs, wanted)
        self._slots(f"{place}: the queries' slots", part.slots, wanted)
        by = plain(part.combine.weights) is part.router.route
        words = f"{place} adds outputs up by other weights than its queries are chosen by"
        self.findings.same("combination", by, place, words)
        for query in part.queries:
            where = f"{place}, expert {query.column}"
            self._query(where, f"{at}experts.{query.column}.q_proj", part, query)
        for output in part.outputs:
            where = f"{place}, expert {output.column}"
            self._output(where, f"{at}experts.{output.column}.o_proj", part, output, wanted)

    def _each_once(
        self,
        place: str,
        what: str,
        fact: str,
        experts: Iterable[QueryExpert | OutputExpert],
        wanted: LayerSpec,
    ) -> None:
        columns = [expert.column for expert in experts]
        words = f"{place} has {what} of the experts {columns[:8]}, not of each of them once"
        each = sorted(columns) == list(range(wanted.attention_experts))
        self.findings.same(fact, each, place, words)

    def _slots(self, place: str, found: Slots | ChosenSlots, wanted: LayerSpec) -> None:
        """Compares how the columns of all slots are laid out."""
        count, heads = wanted.chosen_attention_experts, wanted.num_kv_heads
        words = (
            f"{place} are laid out as {found.heads} heads of {found.chosen} experts each, "
            f"not {heads} of {count}"
        )
        same = (found.heads, found.chosen) == (heads, count)
        self.findings.same("slots", same, place, words)

    def _query(self, place: str, named: str, part: HeadMixture, expert: QueryExpert) -> None:
        same = self.findings.same
        own = expert.chosen in (None, expert.column)
        words = f"{place}: its queries are of the tokens that chose expert {expert.chosen}"
        same("chosen_tokens", own, place, words)
        by = expert.by in (None, part.router.route)
        words = f"{place}: its queries are of tokens that other weights choose than fill its slots"
        same("chosen_tokens", by, place, words)
        self.choosing.operand(place, part.router, expert.entering)
        self._weight(place, expert.product, named)
        whole = expert.result.columns is None
        same("slots", whole, place, f"{place}: its queries are some columns of their product alone")
        bias = expected.biased(self.spec, named)
        self.steps.hold(place, "the expert's queries", expert.result, bias)

    def _output(
        self, place: str, named: str, part: HeadMixture, expert: OutputExpert, wanted: LayerSpec
    ) -> None:
        same, own = self.findings.same, expert.own
        words = f"{place}: its output is made of the slots of expert {own.expert}"
        same("slots", own.expert == expert.column, place, words)
        by = plain(own.weights) is part.router.route
        words = f"{place}: its output is made of slots that other weights place than its queries'"
        same("slots", by, place, words)
        self._slots(f"{place}: the slots that its output reads", own, wanted)
        self._weight(place, expert.product, named)
        whole = expert.entering.columns is None and expert.result.columns is None
        same("slots", whole, place, f"{place}: its output is of some columns alone")
        self.steps.hold(place, "the expert's slots", expert.entering, ())
        bias = expected.biased(self.spec, named)
        self.steps.hold(place, "the expert's output", expert.result, bias)

    def _weight(self, place: str, product: Linear, named: str) -> None:
        found = product.weight.name
        words = f"{place} reads {found} where it must read {named}.weight"
        self.findings.same("expert_weights", found == f"{named}.weight", place, words)
