"""What a lifted value says, held against the spec and the weights that it was lowered from."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from edgeforge.families.spec import ModelSpec
from exporters.lifted import (
    Attention,
    Bias,
    Clamp,
    Gelu,
    Last,
    LayerNorm,
    Probe,
    Rope,
    ShortConv,
    Softcap,
    Value,
)
from exporters.lifted_mixture import (
    ChosenSlots,
    ChosenTokens,
    Combine,
    Route,
    RouteSparseMixer,
    Slots,
)
from exporters.lifted_recurrent import Gain, Previous, Recurrence, UnitNorm
from tests.exporters.onnx.vocabulary_cases import CONTEXT, Made
from tests.oracles.recurrent_layers import unit_epsilon


def lifted(value: Value, found: dict[int, Value]) -> dict[int, Value]:
    """All values that a value is computed of, by identity."""
    if id(value) not in found:
        found[id(value)] = value
        for each in fields(value):
            for part in parts(getattr(value, each.name)):
                lifted(part, found)
    return found


def parts(field: object) -> list[Value]:
    if isinstance(field, tuple):
        return [part for each in field for part in parts(each)]
    return [field] if isinstance(field, Value) else []


def check_lifted(value: Value, made: Made, probes: tuple[Probe, ...]) -> None:
    """A lifted value says what the spec and the weights say."""
    spec, weights = made.case.spec(), made.source.weights.tensors
    match value:
        case Bias() | ShortConv() | Gain():
            assert (value.values == weights[value.weight.name].numpy()).all()
        case LayerNorm():
            for stored, values in ((value.weight, value.values), (value.bias, value.shift)):
                assert (stored is None) == (values is None)
                assert stored is None or (values == weights[stored.name].numpy()).all()
        case Gelu():
            assert value.tanh == (spec.activation == "gelu_tanh")
        case Clamp():
            assert value.limit == pytest.approx(spec.clip_qkv)
        case Softcap():
            assert value.cap == pytest.approx(spec.logit_softcap)
        case Route():
            assert value.normalized == (spec.router == "normalized_softmax")
            counts = ((one.chosen_experts, one.chosen_attention_experts) for one in spec.layers)
            assert value.chosen in {count for each in counts for count in each} - {0}
        case RouteSparseMixer():
            assert value.jitter == pytest.approx(spec.router_jitter)
        case Slots() | Combine():
            at = re.match(r"(.*\.experts\.)0\.", value.terms[0][1].weight.name)[1]
            kind = "q" if isinstance(value, Slots) else "o" if ".self_attn." in at else "down"
            for number, (expert, result) in enumerate(value.terms):
                assert expert == number
                assert result.weight.name == f"{at}{expert}.{kind}_proj.weight"
                begin = result.source
                if kind == "down":
                    gate, up = result.source.factors
                    assert gate.source.source is up.source
                    assert up.source.weight.name == f"{at}{expert}.gate_up_proj.weight"
                    begin = up.source.source
                assert isinstance(begin, ChosenSlots if kind == "o" else ChosenTokens)
                assert begin.expert == expert and begin.weights is value.weights
            check_slots(value, spec)
        case Attention():
            number = int(value.keys.read.partition(".")[0])
            assert value.scale == pytest.approx(spec.scale)
            assert value.softcap == pytest.approx(spec.attention_softcap)
            window = spec.layers[number].window or CONTEXT
            for probe, seen in zip(probes, value.visible, strict=True):
                assert seen[-1].sum() == min(window, probe.start + probe.count)
        case UnitNorm():
            assert value.epsilon == pytest.approx(unit_epsilon(spec))
        case Recurrence():
            for stored, values in ((value.decay, value.decays), (value.bonus, value.bonuses)):
                assert values is None or (values == weights[stored.name].numpy()).all()
            number = int(value.memory.read.partition(".")[0])
            made_by = spec.layers[number].recurrence
            assert value.dimensions == (
                made_by.heads, made_by.key_heads, made_by.key_width, made_by.value_width
            )  # fmt: skip
            assert value.memory.read == value.memory.written == f"{number}.memory"
            assert value.memory.ignored == tuple(probe.start == 0 for probe in probes)
            is_time_mix = spec.layers[number].mixer == "time_mix"
            assert (value.bonus is not None) == is_time_mix
            assert (value.beta is not None) == (spec.layers[number].mixer == "delta_net")
        case Previous():
            assert value.recent.read == value.recent.written
            assert re.fullmatch(r"[01]\.(mlp_)?recent", value.recent.read)
            assert value.recent.ignored == tuple(probe.start == 0 for probe in probes)
    if isinstance(value, ShortConv):
        number = re.search(r"layers\.(\d+)\.", value.weight.name)[1]
        assert value.recent.read == value.recent.written == f"{number}.recent"
        assert value.recent.ignored == tuple(probe.start == 0 for probe in probes)


def check_slots(value: Slots | Combine, spec: ModelSpec) -> None:
    """The queries of a mixture of heads, or its outputs, have the slots that the spec says."""
    if isinstance(value, Combine) and isinstance(value.terms[0][1].source, ChosenSlots):
        attention = plain(value.terms[0][1].source.source)
        queries = attention.query
        queries = queries.source if isinstance(queries, Rope) else queries
        assert isinstance(queries, Slots) and plain(value.weights) is queries.weights
        layer = spec.layers[int(attention.keys.read.partition(".")[0])]
        slots = layer.chosen_attention_experts, layer.num_kv_heads
        assert attention.heads == (slots[0] * slots[1], slots[1], spec.head_dim)
        assert (queries.chosen, queries.heads) == slots
        assert len(queries.terms) == len(value.terms) == layer.attention_experts
        own = {(term.source.chosen, term.source.heads) for _, term in value.terms}
        assert own == {slots}
        assert len({term.source.source for _, term in value.terms}) == 1


def plain(value: Value) -> Value:
    """The value of which the last tokens' rows are taken; any other value itself."""
    return value.source if isinstance(value, Last) else value
