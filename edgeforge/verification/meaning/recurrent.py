"""Holds recurrent parts of a layer, and RWKV's mix of channels, against the checkpoint's spec."""

from __future__ import annotations

from edgeforge.families.spec import LayerSpec, ModelSpec
from edgeforge.verification.meaning.findings import Findings
from edgeforge.verification.meaning.forms import Form, Matching
from edgeforge.verification.meaning.recurrent_forms import FACTS, Forms
from edgeforge.verification.meaning.recurring import Recurring
from exporters.lifted import (
    Recent,
    ShortConv,
)
from exporters.lifted_recurrent import (
    Previous,
    Recurrence,
)


class Recurrent:
    """Compares recurrent parts.

    Args:
        spec: the spec of the program.
        findings: takes what is found.
    """

    def __init__(self, spec: ModelSpec, findings: Findings) -> None:
        self.spec, self.findings = spec, findings

    def open(self) -> None:
        """Opens the facts that `hold` and `hold_channels` look at."""
        for name, words in FACTS.items():
            self.findings.fact(name, words)

    def hold(self, place: str, index: int, part: Recurring, wanted: LayerSpec) -> None:
        """Compares the mixer of a layer.

        Args:
            place: the entry point and the layer.
            index: the layer's number.
            part: the mixer.
            wanted: the layer's dimensions.
        """
        form = Forms(self.spec, f"model.layers.{index}.").mixer(wanted)
        self._hold(place, part, form)
        self._states(place, part, f"{index}.recent", f"{index}.memory")

    def hold_channels(self, place: str, index: int, part: Recurring) -> None:
        """Compares RWKV's mix of channels; arguments as `hold`."""
        self._hold(place, part, Forms(self.spec, f"model.layers.{index}.").channel_mix())
        self._states(place, part, f"{index}.mlp_recent", f"{index}.memory")

    def _hold(self, place: str, part: Recurring, form: Form) -> None:
        found: dict[str, str] = {}
        for each in Matching(part.operand).differences(part.result, form):
            found.setdefault(each.fact, each.words)
        for fact in sorted(form.facts()):
            words = found.get(fact, "")
            self.findings.same(fact, not words, place, f"{place}: {words}")

    def _states(self, place: str, part: Recurring, recent: str, memory: str) -> None:
        for value in part.values:
            if isinstance(value, ShortConv | Previous):
                self.state(place, value.recent, recent)
            elif isinstance(value, Recurrence):
                self.state(place, value.memory, memory)

    def state(self, place: str, state: Recent, named: str) -> None:
        """Compares a state's name, where states have names, and where it is written."""
        same = self.findings.same
        own = "." not in state.read or state.read == named
        same("states", own, place, f"{place} reads {state.read} as its {named}")
        same(
            "states",
            state.read == state.written,
            place,
            f"{place} writes its last tokens to {state.written} and reads {state.read}",
        )
