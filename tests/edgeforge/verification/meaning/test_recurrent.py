"""Every fact of a recurrent part is held against the spec; a fault in one is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeforge.families.assembly import norm
from edgeforge.verification.meaning.decoder import decoder_of
from edgeforge.verification.meaning.recurrent_forms import FACTS
from exporters.lifted import (
    Unknown,
)
from exporters.lifted_recurrent import (
    Recurrence,
)
from quant.program import dialect
from tests.edgeforge.verification.meaning.test_vocabulary import held
from tests.oracles.recurrent_layers import DELTA, FINCH, MAMBA
from tests.oracles.vocabulary import FULL, HIDDEN, RECURRENT, SPECS
from tests.oracles.vocabulary_models import program_of
from tests.planted_faults import programs, recurrent
from tests.planted_faults.lifted_program import lifted_program

ALWAYS = {"recurrence", "decay", "recurrence_norms", "recurrence_gate", "states"}
OWN = {
    "rwkv5": {"mixes", "bonus", "channel_mix"},
    "rwkv6": {"mixes", "bonus", "channel_mix"},
    "mamba": {"skip"},
    "mamba-mixture": {"skip", "experts"},
    "delta-net": {"beta"},
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_sound_program_has_no_fault(name):
    failed, passed = held(RECURRENT[name], lifted_program(program_of(RECURRENT[name])))
    assert failed == {}
    assert ALWAYS | OWN[name] <= passed
    assert not (FACTS.keys() - ALWAYS - OWN[name]) & passed


def of_layer(number: int, name: str) -> str:
    return f"model.layers.{number}.{name}"


FAULTS = {
    "attention without its gate": (
        "delta-net",
        recurrent.without_gate,
        "attention_gate",
        "layer 1: attention's result has no gate, unlike the checkpoint's",
    ),
    "attention's gate without its sigmoid": (
        "delta-net",
        lambda p: recurrent.without_call(p, dialect.SIGMOID, dialect.LINEAR, 1),
        "structure",
        "",
    ),
    "attention's gate by another product": (
        "delta-net",
        recurrent.with_gate_of_queries,
        "weights",
        "self_attn.v_proj.weight",
    ),
    "decay not negated": (
        "rwkv6",
        lambda p: recurrent.without_call(p, dialect.SCALE, dialect.EXP),
        "decay",
        "layer 0: exp (function) stands where the factor -1 on the exp",
    ),
    "decay without its tanh": (
        "rwkv6",
        lambda p: recurrent.without_call(p, dialect.TANH, dialect.LINEAR, 1),
        "decay",
        "layer 0: linear_10 (linear) stands where the tanh of the product decay_down should be",
    ),
    "decays of another layer": (
        "rwkv5",
        lambda p: recurrent.with_weights_swapped(
            p, of_layer(0, "time_mix.decay.weight"), of_layer(1, "time_mix.decay.weight")
        ),
        "decay",
        "layer 0: the recurrence reads model.layers.1.time_mix.decay.weight where it must read",
    ),
    "bonus of another layer": (
        "rwkv5",
        lambda p: recurrent.with_weights_swapped(
            p, of_layer(0, "time_mix.bonus.weight"), of_layer(1, "time_mix.bonus.weight")
        ),
        "bonus",
        "layer 0: the recurrence reads model.layers.1.time_mix.bonus.weight where it must read",
    ),
    "no bonus": (
        "rwkv6",
        lambda p: recurrent.without_operand(p, 4),
        "bonus",
        "layer 0: the recurrence reads no weight where it must read model.layers.0.time_mix.bonus",
    ),
    "keys and queries swapped": (
        "rwkv5",
        lambda p: recurrent.with_arguments_swapped(p, dialect.RECURRENCE, 0, 1),
        "recurrence",
        "layer 0: the product receptance_proj reads model.layers.0.time_mix.key_proj.weight where",
    ),
    "B and C exchanged": (
        "mamba",
        lambda p: recurrent.with_arguments_swapped(p, dialect.RECURRENCE, 0, 1),
        "recurrence",
        "layer 0: C, the queries has the start 48, not 64",
    ),
    "skip left out": (
        "mamba",
        recurrent.without_skip,
        "skip",
        "layer 0: recurrence (recurrence) stands where the sum with the values that are skipped",
    ),
    "steps without their softplus": (
        "mamba",
        lambda p: recurrent.without_call(p, dialect.SOFTPLUS),
        "decay",
        "layer 0: bias_1 (bias) stands where the softplus of the bias of dt_proj should be",
    ),
    "steps without their bias": (
        "delta-net",
        lambda p: programs.without(p, dialect.BIAS, of_layer(0, "linear_attn.dt_proj.bias")),
        "biases",
        "layer 0: linear_1 (linear) stands where the bias of dt_proj should be",
    ),
    "mixes exchanged": (
        "rwkv5",
        lambda p: recurrent.with_weights_swapped(
            p,
            of_layer(0, "time_mix.mix_key.weight"),
            of_layer(0, "time_mix.mix_value.weight"),
        ),
        "mixes",
        "layer 0: the factor mix_key reads model.layers.0.time_mix.mix_value.weight where",
    ),
    "mixes of tokens exchanged": (
        "rwkv6",
        lambda p: recurrent.with_weights_swapped(
            p,
            of_layer(1, "time_mix.mix_key.weight"),
            of_layer(1, "time_mix.mix_value.weight"),
        ),
        "mixes",
        "layer 1: the mix of the key reads model.layers.1.time_mix.mix_value.weight where",
    ),
    "gate without its SiLU": (
        "rwkv5",
        lambda p: recurrent.without_call(p, dialect.SILU),
        "recurrence_gate",
        "(linear) stands where the SiLU of the gate should be",
    ),
    "a convolution without its SiLU": (
        "delta-net",
        lambda p: recurrent.without_call(p, dialect.SILU),
        "recurrence",
        "(shortconv) stands where the convolution's SiLU should be",
    ),
    "one memory for two layers": (
        "mamba",
        lambda p: recurrent.with_state_of_another(
            p, of_layer(2, "mamba.memory"), of_layer(0, "mamba.memory")
        ),
        "states",
        "layer 2 reads 0.memory as its 2.memory",
    ),
    "one token before for both parts": (
        "rwkv6",
        lambda p: recurrent.with_state_of_another(
            p, of_layer(1, "mlp.recent"), of_layer(1, "time_mix.recent")
        ),
        "states",
        "layer 1 reads 1.recent as its 1.mlp_recent",
    ),
    "beta without its sigmoid": (
        "delta-net",
        lambda p: recurrent.without_call(p, dialect.SIGMOID),
        "beta",
        "(linear) stands where the sigmoid of how far values replace should be",
    ),
    "no beta": (
        "delta-net",
        lambda p: recurrent.without_operand(p, 5),
        "recurrence",
        "recurrence (recurrence) is made of 4 values, not of 5, as the recurrence must be",
    ),
    "keys of another length": (
        "delta-net",
        lambda p: recurrent.with_number(p, dialect.L2_NORM, 1, 1e-3),
        "recurrence_norms",
        "layer 0: the norm of the queries has the epsilon 0.001, not 1e-06",
    ),
    "epsilon of the heads' norm": (
        "rwkv6",
        lambda p: recurrent.with_group_norm(p, 1e-5),
        "recurrence_norms",
        "layer 0: the norm of each head's result has the epsilon 1e-05, not 0.00064",
    ),
    "keys not squared": (
        "rwkv5",
        lambda p: recurrent.without_call(p, dialect.MUL, dialect.RELU),
        "channel_mix",
        "relu (function) stands where the square of the keys' ReLU should be",
    ),
    "keys without their ReLU": (
        "rwkv6",
        lambda p: recurrent.without_call(p, dialect.RELU),
        "channel_mix",
        "(linear) stands where the relu of the product key_proj should be",
    ),
    "the embedding's norm": (
        "rwkv5",
        lambda p: p,
        "norms",
        "all: the embedding's norm is missing",
        {
            "weights": {
                **RECURRENT["rwkv5"].weights,
                "model.embedding_norm.weight": norm("ln0", HIDDEN),
            }
        },
    ),
    "a decay for all tokens": (
        "rwkv6",
        lambda p: p,
        "recurrence",
        "recurrence (recurrence) is made of 4 values, not of 3",
        {"weights": RECURRENT["rwkv5"].weights, "layers": RECURRENT["rwkv5"].layers},
    ),
    "attention": (
        "mamba",
        lambda p: p,
        "layers",
        "layer 0 mixes tokens by a recurrence, not by attention",
        {"layers": (FULL, FULL, MAMBA)},
    ),
    "a short convolution": (
        "delta-net",
        lambda p: p,
        "layers",
        "layer 0 mixes tokens by a recurrence, not by short conv",
        {"layers": (replace(DELTA, mixer="short_conv", recurrence=None), FULL, DELTA)},
    ),
    "a dense part": (
        "rwkv6",
        lambda p: p,
        "channel_mix",
        "layer 0 mixes channels, which the checkpoint does not do",
        {"layers": (replace(FINCH, feed_forward="mlp"),) * 2},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    name, change, fact, words, *others = FAULTS[fault]
    spec = replace(RECURRENT[name], **others[0]) if others else RECURRENT[name]
    failed, _ = held(spec, lifted_program(change(program_of(RECURRENT[name]))))
    assert words in failed.get(fact, ""), failed


def test_a_dense_part_in_place_of_a_mix_of_channels_is_named():
    spec = SPECS["plain"]
    layers = tuple(replace(layer, feed_forward="channel_mix") for layer in spec.layers)
    failed, _ = held(replace(spec, layers=layers), lifted_program(program_of(spec)))
    assert "layer 0 mixes no channels, which the checkpoint does" in failed["channel_mix"]


@pytest.mark.parametrize("name", ["rwkv6", "mamba"])
def test_a_state_that_a_text_does_not_begin_without_is_named(name):
    entry = lifted_program(program_of(RECURRENT[name]))
    part = next(decoder_of(entry.logits).recurring())
    (made,) = part.of(Recurrence)
    memory = replace(made.memory, ignored=(False,) * len(entry.probes))
    object.__setattr__(made, "memory", memory)
    failed, _ = held(RECURRENT[name], entry)
    assert set(failed) == {"states"}
    assert "does not ignore 0.memory where 0 tokens come before" in failed["states"]


def test_a_recurrence_that_is_not_read_is_not_passed():
    """What a reader does not recognise never counts as what the checkpoint says."""
    entry = lifted_program(program_of(RECURRENT["mamba"]))
    part = next(decoder_of(entry.logits).recurring())
    (total,) = [v for v in part.values if any(u in part.of(Recurrence) for u in operands_of(v))]
    unread = Unknown("scan", "Scan", ())
    terms = tuple(unread if isinstance(each, Recurrence) else each for each in total.terms)
    object.__setattr__(total, "terms", terms)
    failed, passed = held(RECURRENT["mamba"], entry)
    assert "structure" in failed and "recurrence" not in passed


def operands_of(value) -> list:
    return [each for each in getattr(value, "terms", ()) if isinstance(each, Recurrence)]
