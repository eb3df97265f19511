"""The forms of recurrent parts as a checkpoint's spec says them, from their results on back."""

from __future__ import annotations

from typing import Final

from edgeforge.families.spec import LayerSpec, ModelSpec, RecurrenceSpec, convolved_columns
from edgeforge.model.delta_net import UNIT_EPS
from edgeforge.model.rwkv import GROUP_NORM_EPS, MIXED
from edgeforge.verification.meaning.forms import Form
from exporters.lifted import (
    Bias,
    Columns,
    LayerNorm,
    Linear,
    Norm,
    Product,
    Scaled,
    ShortConv,
    Sigmoid,
    Silu,
    Sum,
    Value,
)
from exporters.lifted_recurrent import (
    Function,
    Gain,
    Previous,
    Recurrence,
    UnitNorm,
)

FACTS: Final = {
    "recurrence": "every recurrence reads its own queries, keys and values, and has its dimensions",
    "decay": "decays of memories are made as the checkpoint says",
    "mixes": "tokens are mixed with those before them as the checkpoint says",
    "bonus": "a token's own key counts for its result as the checkpoint says",
    "beta": "values replace what a key finds as far as the checkpoint says",
    "skip": "values that pass a recurrence by are added as the checkpoint says",
    "recurrence_norms": "what a recurrence reads and finds is normalised as the checkpoint says",
    "recurrence_gate": "what a recurrence finds is multiplied by the SiLU of its gate",
    "channel_mix": "channels are mixed by a squared ReLU and a sigmoid of the receptance",
}
"""The facts that these forms find otherwise, each as a sentence that is true when none is."""


class Forms:
    """Makes the forms of one layer.

    Args:
        spec: the model.
        at: the layer's name, with a dot at its end.
    """

    def __init__(self, spec: ModelSpec, at: str) -> None:
        self.spec, self.at = spec, at
        self.x = Form(None, "the part's operand", "block")

    def mixer(self, layer: LayerSpec) -> Form:
        """The form of a layer's recurrence."""
        made = layer.recurrence
        assert made is not None
        if layer.mixer == "time_mix":
            return self._time_mix(made)
        return self._mamba(layer, made) if layer.mixer == "mamba" else self._delta(layer, made)

    def channel_mix(self) -> Form:
        """The form of RWKV's mix of channels."""
        fact, at = "channel_mix", "mlp."
        keys, receptance = (
            self._linear(f"{at}{name}_proj", self._mixed(f"{at}mix_{name}", name), fact)
            for name in ("key", "receptance")
        )
        grown = _function("relu", keys, fact)
        squared = Form(Product, "the square of the keys' ReLU", fact, (grown, grown))
        value = self._linear(f"{at}value_proj", squared, fact)
        sigmoid = Form(Sigmoid, "the sigmoid of the receptance", fact, (receptance,))
        return Form(Product, "the product with the receptance", fact, (sigmoid, value))

    def _time_mix(self, made: RecurrenceSpec) -> Form:
        at, dynamic = "time_mix.", made.dynamic
        mixes = self._dynamic_mixes() if dynamic else {n: None for n in MIXED[1:]}
        read = {
            name: self._mixed(f"{at}mix_{name}", name) if mix is None else mix
            for name, mix in mixes.items()
        }
        r, k, v = (
            self._linear(f"{at}{name}_proj", read[name], "recurrence")
            for name in ("receptance", "key", "value")
        )
        gate = self._linear(f"{at}gate_proj", read["gate"], "recurrence_gate")
        decay = self._time_decay(read["decay"]) if dynamic else None
        found = self._recurrence(made, at, (r, k, v), decay, bonus=True)
        normed: Form = Form(
            LayerNorm,
            "the norm of each head's result",
            "recurrence_norms",
            (found,),
            {"weight": None, "bias": None},
            {"epsilon": GROUP_NORM_EPS},
        )
        normed = self._gain(f"{at}head_norm", normed, "recurrence_norms")
        normed = self._biased(f"{at}head_norm", normed, "recurrence_norms")
        return self._linear(f"{at}output_proj", _gated(normed, gate), "recurrence")

    def _time_decay(self, mixed: Form) -> Form:
        down = self._linear("time_mix.decay_down", mixed, "decay")
        up = self._linear("time_mix.decay_up", _function("tanh", down, "decay"), "decay")
        return _scaled(_function("exp", up, "decay"), -1.0, "decay")

    def _dynamic_mixes(self) -> dict[str, Form]:
        down = self._linear("time_mix.mix_down", self._mixed("time_mix.mix_all", "all"), "mixes")
        rank = self.spec.weights[f"{self.at}time_mix.mix_down.weight"].shape[0] // len(MIXED)
        whole, found = _function("tanh", down, "mixes"), {}
        for index, name in enumerate(MIXED):
            words = f"the columns of the mix of the {name}"
            part = _columns(whole, index * rank, (index + 1) * rank, words, "mixes")
            own = self._linear(f"time_mix.mix_up_{name}", part, "mixes")
            weight = {"weight": f"{self.at}time_mix.mix_{name}.weight"}
            mix = Form(Bias, f"the mix of the {name}", "mixes", (own,), weight)
            mixed = Form(Product, f"the share of the {name}", "mixes", (self._difference(), mix))
            found[name] = Form(Sum, f"the mixed {name}", "mixes", (self.x, mixed))
        return found

    def _mixed(self, weight: str, name: str) -> Form:
        """``x + (previous - x) * weight``."""
        share = self._gain(weight, self._difference(), "mixes")
        return Form(Sum, f"the mixed {name}", "mixes", (self.x, share))

    def _difference(self) -> Form:
        before = Form(Previous, "the token before", "mixes", (self.x,))
        return Form(
            Sum,
            "the token before less the token",
            "mixes",
            (before, _scaled(self.x, -1.0, "mixes")),
        )

    def _mamba(self, layer: LayerSpec, made: RecurrenceSpec) -> Form:
        at, columns = "mamba.", convolved_columns(self.spec, layer)
        inner, width = made.heads * made.value_width, made.key_heads * made.key_width
        into = self._linear(f"{at}in_proj", self.x, "recurrence")
        gate = _columns(into, 0, inner, "the gate", "recurrence_gate")
        mixed = self._convolved(at, _columns(into, inner, inner + columns, "x, B and C"))
        v = _columns(mixed, 0, inner, "x, the values")
        k = _columns(mixed, inner, inner + width, "B, the keys")
        q = _columns(mixed, inner + width, inner + 2 * width, "C, the queries")
        step = self._step(at)
        stepped = Form(Product, "the product of values and steps", "recurrence", (v, step))
        decay = self._gain(f"{at}decay", step, "decay")
        found = self._recurrence(made, at, (q, k, stepped), decay)
        skipped = self._gain(f"{at}skip", v, "skip")
        total = Form(Sum, "the sum with the values that are skipped", "skip", (found, skipped))
        normed = self._group_norm(f"{at}norm", _gated(total, gate), inner, made.key_heads)
        return self._linear(f"{at}out_proj", normed, "recurrence")

    def _group_norm(self, name: str, source: Form, columns: int, groups: int) -> Form:
        """Mamba's norm of the values that share a head of queries and keys."""
        if groups == 1:
            return self._norm(name, source)
        width, fact = columns // groups, "recurrence_norms"
        words, numbers = "the norm of each group", {"epsilon": self.spec.norm_eps * width}
        unit = Form(UnitNorm, words, fact, (source,), numbers=numbers)
        return self._gain(name, _scaled(unit, width**0.5, fact), fact)

    def _delta(self, layer: LayerSpec, made: RecurrenceSpec) -> Form:
        at, columns = "linear_attn.", convolved_columns(self.spec, layer)
        inner, width = made.heads * made.value_width, made.key_heads * made.key_width
        into = self._linear(f"{at}in_proj", self.x, "recurrence")
        gate = _columns(into, columns, columns + inner, "the gate", "recurrence_gate")
        mixed = self._convolved(at, _columns(into, 0, columns, "queries, keys and values"))
        q, k = (
            Form(
                UnitNorm,
                f"the norm of the {name}",
                "recurrence_norms",
                (_columns(mixed, start, start + width, f"the {name}"),),
                numbers={"epsilon": UNIT_EPS},
            )
            for name, start in (("queries", 0), ("keys", width))
        )
        v = _columns(mixed, 2 * width, 2 * width + inner, "the values")
        beta = self._linear(f"{at}beta_proj", self.x, "beta")
        beta = Form(Sigmoid, "the sigmoid of how far values replace", "beta", (beta,))
        decay = self._gain(f"{at}decay", self._step(at), "decay")
        scaled = _scaled(q, made.key_width**-0.5, "recurrence")
        found = self._recurrence(made, at, (scaled, k, v), decay, beta=beta)
        normed = self._norm(f"{at}norm", found)
        return self._linear(f"{at}out_proj", _gated(normed, gate), "recurrence")

    def _recurrence(
        self,
        made: RecurrenceSpec,
        at: str,
        read: tuple[Form, Form, Form],
        decay: Form | None,
        *,
        bonus: bool = False,
        beta: Form | None = None,
    ) -> Form:
        weights = {"bonus": f"{self.at}{at}bonus.weight" if bonus else None}
        own = {"bonus": "bonus"} if bonus else {"bonus": "recurrence"}
        if decay is None:
            weights["decay"] = f"{self.at}{at}decay.weight"
            own["decay"] = "decay"
        given = (*read, *(each for each in (decay, beta) if each is not None))
        size = made.heads, made.key_heads, made.key_width, made.value_width
        return Form(
            Recurrence,
            "the recurrence",
            "recurrence",
            given,
            weights,
            {"dimensions": size},
            own,
        )

    def _convolved(self, at: str, source: Form) -> Form:
        weight = {"weight": f"{self.at}{at}conv.weight"}
        found = Form(ShortConv, "the convolution", "recurrence", (source,), weight)
        return Form(
            Silu,
            "the convolution's SiLU",
            "recurrence",
            (self._biased(f"{at}conv", found, "biases"),),
        )

    def _step(self, at: str) -> Form:
        step = self._linear(f"{at}dt_proj", self.x, "decay")
        return _function("softplus", self._biased(f"{at}step", step, "biases"), "decay")

    def _linear(self, name: str, source: Form, fact: str) -> Form:
        weight = {"weight": f"{self.at}{name}.weight"}
        words = f"the product {name.rpartition('.')[2]}"
        return self._biased(name, Form(Linear, words, fact, (source,), weight), "biases")

    def _biased(self, name: str, source: Form, fact: str) -> Form:
        bias = f"{self.at}{name}.bias"
        if bias not in self.spec.weights:
            return source
        words = f"the bias of {name.rpartition('.')[2]}"
        return Form(Bias, words, fact, (source,), {"weight": bias})

    def _gain(self, name: str, source: Form, fact: str) -> Form:
        weight = {"weight": f"{self.at}{name}.weight"}
        return Form(Gain, f"the factor {name.rpartition('.')[2]}", fact, (source,), weight)

    def _norm(self, name: str, source: Form) -> Form:
        kind: type[Value] = LayerNorm if self.spec.norm == "layer" else Norm
        weights: dict[str, str | None] = {"weight": f"{self.at}{name}.weight"}
        if kind is LayerNorm:
            bias = f"{self.at}{name}.bias"
            weights["bias"] = bias if bias in self.spec.weights else None
        numbers = {"epsilon": self.spec.norm_eps}
        words = "the norm of the recurrence's result"
        return Form(kind, words, "recurrence_norms", (source,), weights, numbers)


def _function(name: str, source: Form, fact: str) -> Form:
    return Form(Function, f"the {name} of {source.words}", fact, (source,), {}, {"function": name})


def _scaled(source: Form, factor: float, fact: str) -> Form:
    words = f"the factor {factor:.6g} on {source.words}"
    return Form(Scaled, words, fact, (source,), {}, {"factor": factor})


def _columns(source: Form, start: int, stop: int, words: str, fact: str = "recurrence") -> Form:
    return Form(Columns, words, fact, (source,), {}, {"start": start, "stop": stop})


def _gated(found: Form, gate: Form) -> Form:
    silu = Form(Silu, "the SiLU of the gate", "recurrence_gate", (gate,))
    return Form(Product, "the product with the gate", "recurrence_gate", (found, silu))
