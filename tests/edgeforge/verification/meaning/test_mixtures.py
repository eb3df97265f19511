"""Every fact of a mixture of experts is held against the spec; a fault in one is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exporters.last_token import keep_last_token
from quant.program import dialect
from tests.edgeforge.verification.meaning.test_vocabulary import held
from tests.oracles.vocabulary import MIXTURES, SPECS
from tests.oracles.vocabulary_models import program_of
from tests.planted_faults import mixtures, programs
from tests.planted_faults.lifted_program import lifted_program

AT = "model.layers.%d.self_attn"
ALWAYS = {"experts", "chosen_experts", "router", "expert_weights", "chosen_tokens", "combination"}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_sound_mixture_has_no_fault(name):
    failed, passed = held(MIXTURES[name], lifted_program(program_of(MIXTURES[name])))
    assert failed == {}
    own = {"shared": {"shared_expert"}, "sparse-mixer": {"router_jitter"}}
    assert ALWAYS | own.get(name, set()) <= passed
    heads = any(layer.attention_experts for layer in MIXTURES[name].layers)
    assert ("slots" in passed) is heads
    shared = any(layer.shared_width for layer in MIXTURES[name].layers)
    assert ("shared_expert" in passed) is shared


FAULTS = {
    "another k": (
        "mixture",
        lambda p: mixtures.with_route(p, 1, True),
        "chosen_experts",
        "layer 1: a token chooses 1 experts, not 2",
    ),
    "no normalisation": (
        "mixture",
        lambda p: mixtures.with_route(p, 2, False),
        "router",
        "layer 1: the chosen experts' shares are not normalised; in the checkpoint",
    ),
    "softmax": (
        "sparse-mixer",
        mixtures.with_softmax,
        "router",
        "in the checkpoint experts are chosen by SparseMixer's rule",
    ),
    "jitter": (
        "sparse-mixer",
        lambda p: mixtures.with_route(p, 0.01),
        "router_jitter",
        "layer 0 has SparseMixer's jitter 0.01, not 0.1",
    ),
    "results swapped": (
        "mixture",
        mixtures.with_results_swapped,
        "chosen_tokens",
        "layer 1, expert 0 gets the tokens that chose expert 1",
    ),
    "tokens of another": (
        "mixture",
        mixtures.with_tokens_of_another,
        "chosen_tokens",
        "layer 1, expert 0 gets the tokens that chose expert 1",
    ),
    "gates of experts swapped": (
        "mixture",
        lambda p: mixtures.with_matrices_swapped(p, "gate_up_proj"),
        "expert_weights",
        "layer 1, expert 1 reads model.layers.1.mlp.experts.2.gate_up_proj.weight where it must",
    ),
    "downs of experts swapped": (
        "shared",
        lambda p: mixtures.with_matrices_swapped(p, "down_proj"),
        "expert_weights",
        "layer 0, expert 1 reads model.layers.0.mlp.experts.2.down_proj.weight where it must",
    ),
    "an expert left out": (
        "mixture",
        mixtures.without_last_expert,
        "experts",
        "layer 1 has 7 experts, not 8",
    ),
    "no gate of the shared expert": (
        "shared",
        mixtures.without_shared_gate,
        "shared_expert",
        "layer 0: no gate multiplies the shared expert's result",
    ),
    "no shared expert": (
        "shared",
        mixtures.without_shared_expert,
        "shared_expert",
        "layer 0 has no shared expert",
    ),
    "router before the norm": (
        "mixture",
        mixtures.with_router_before_norm,
        "block",
        "layer 1, expert 0 reads other values than the router",
    ),
}


FAULTS |= {
    "queries of experts swapped": (
        "heads",
        lambda p: mixtures.with_matrices_swapped(p, "q_proj"),
        "expert_weights",
        "layer 0, attention, expert 1 reads "
        "model.layers.0.self_attn.experts.2.q_proj.weight where it must read",
    ),
    "outputs of experts swapped": (
        "heads-and-mixture",
        lambda p: mixtures.with_matrices_swapped(p, "o_proj"),
        "expert_weights",
        "layer 0, attention, expert 1 reads "
        "model.layers.0.self_attn.experts.2.o_proj.weight where it must read",
    ),
    "queries in each other's slots": (
        "heads",
        lambda p: mixtures.with_results_swapped(p, dialect.SLOTS),
        "chosen_tokens",
        "layer 0, attention, expert 0: its queries are of the tokens that chose expert 1",
    ),
    "outputs in each other's places": (
        "heads",
        mixtures.with_results_swapped,
        "slots",
        "layer 0, attention, expert 0: its output is made of the slots of expert 1",
    ),
    "queries of one expert with the output of another": (
        "heads",
        mixtures.with_slots_of_another,
        "slots",
        "layer 0, attention, expert 1: its output is made of the slots of expert 2",
    ),
    "tokens of another's queries": (
        "heads",
        mixtures.with_tokens_of_another,
        "chosen_tokens",
        "layer 0, attention, expert 0: its queries are of the tokens that chose expert 1",
    ),
    "another router's weights for outputs": (
        "heads-and-mixture",
        lambda p: mixtures.with_weights_of_first_router(p, dialect.COMBINE),
        "combination",
        "layer 1, attention adds outputs up by other weights than its queries are chosen by",
    ),
    "another router's slots": (
        "heads-and-mixture",
        lambda p: mixtures.with_weights_of_first_router(p, dialect.CHOSEN_SLOTS),
        "slots",
        "layer 1, attention, expert 0: its output is made of slots that other weights place",
    ),
    "another router's tokens": (
        "heads-and-mixture",
        lambda p: mixtures.with_weights_of_first_router(p, dialect.CHOSEN),
        "chosen_tokens",
        "layer 1, attention, expert 0: its queries are of tokens that other weights choose",
    ),
    "another layer's router": (
        "heads-and-mixture",
        lambda p: mixtures.with_matrix_of(p, f"{AT % 1}.router.weight", f"{AT % 0}.router.weight"),
        "weights",
        "layer 1, attention reads model.layers.0.self_attn.router.weight where it must read "
        "model.layers.1.self_attn.router.weight",
    ),
    "queries of an expert left out": (
        "heads",
        lambda p: mixtures.without_last_expert(p, dialect.SLOTS),
        "experts",
        "layer 0, attention has 4 experts, not 5",
    ),
    "an output left out": (
        "heads",
        mixtures.without_last_expert,
        "combination",
        "layer 0, attention has outputs of the experts [0, 1, 2, 3], not of each of them once",
    ),
    "another k of heads": (
        "heads",
        lambda p: mixtures.with_route(p, 2, True),
        "chosen_experts",
        "layer 0, attention: a token chooses 2 experts, not 3",
    ),
    "no normalisation of heads": (
        "heads",
        lambda p: mixtures.with_route(p, 3, False),
        "router",
        "layer 0, attention: the chosen experts' shares are not normalised; in the checkpoint",
    ),
    "heads exchanged with slots": (
        "heads",
        lambda p: mixtures.with_slots(p, dialect.SLOTS, 2, 3),
        "slots",
        "layer 0, attention: the queries' slots are laid out as 3 heads of 2 experts each, not 2",
    ),
    "heads exchanged with slots where they are read": (
        "heads",
        lambda p: mixtures.with_slots(p, dialect.CHOSEN_SLOTS, 2, 3),
        "slots",
        "expert 0: the slots that its output reads are laid out as 3 heads of 2 experts each, not",
    ),
    "keys from the values' matrix": (
        "heads",
        lambda p: mixtures.with_matrix_of(p, f"{AT % 0}.k_proj.weight", f"{AT % 0}.v_proj.weight"),
        "weights",
        "layer 0 reads model.layers.0.self_attn.v_proj.weight where it must read "
        "model.layers.0.self_attn.k_proj.weight",
    ),
    "no bias of attention": (
        "heads",
        lambda p: programs.without(p, dialect.BIAS, f"{AT % 0}.output.bias"),
        "biases",
        "layer 0: model.layers.0.self_attn.output.bias is not added to the first part's result",
    ),
    "no bias of the feed-forward part": (
        "heads-and-mixture",
        lambda p: programs.without(p, dialect.BIAS, "model.layers.0.mlp.output.bias"),
        "biases",
        "layer 0: model.layers.0.mlp.output.bias is not added to the feed-forward part's result",
    ),
    "queries that are not rotated": (
        "heads",
        lambda p: programs.without_rotation(p, layer=0),
        "rope_type",
        "layer 0, queries are not rotated",
    ),
    "router of heads before the norm": (
        "heads",
        mixtures.with_router_before_norm,
        "caches",
        "which reads other values than the router of its queries",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    name, change, fact, words = FAULTS[fault]
    failed, _ = held(MIXTURES[name], lifted_program(change(program_of(MIXTURES[name]))))
    assert words in failed[fact], failed


def test_a_mixture_in_place_of_a_dense_part_is_named_and_a_dense_part_in_place_of_a_mixture():
    mixed, dense = MIXTURES["mixture"], SPECS["plain"]
    layer = dense.layers[0]
    failed, _ = held(replace(mixed, layers=(layer, layer)), lifted_program(program_of(mixed)))
    assert "layer 1 has 8 experts, not none" in failed["experts"]
    failed, _ = held(
        replace(dense, layers=mixed.layers),
        lifted_program(program_of(dense)),
    )
    assert "layer 1 has no experts, not 8" in failed["experts"]


@pytest.mark.parametrize("name", ["heads", "heads-and-mixture", "mixture"])
def test_a_sound_program_of_the_last_token_has_no_fault(name):
    """There the last layer's outputs read the weights through a slice, and its queries do not."""
    lowered = keep_last_token(program_of(MIXTURES[name]))
    failed, passed = held(MIXTURES[name], lifted_program(lowered))
    assert failed == {}
    assert passed >= ALWAYS


def test_a_fault_behind_the_slice_of_the_last_layer_is_named():
    program = mixtures.with_weights_of_first_router(
        program_of(MIXTURES["heads-and-mixture"]), dialect.COMBINE
    )
    failed, _ = held(MIXTURES["heads-and-mixture"], lifted_program(keep_last_token(program)))
    assert "layer 1, attention adds outputs up by other weights" in failed["combination"]


def test_experts_in_place_of_plain_attention_are_named_and_plain_attention_in_place_of_experts():
    mixed, plain = MIXTURES["heads"], SPECS["plain"]
    layer = plain.layers[0]
    failed, _ = held(replace(mixed, layers=(layer, layer)), lifted_program(program_of(mixed)))
    assert "layer 0, attention has 5 experts, not none" in failed["experts"]
    failed, _ = held(replace(plain, layers=mixed.layers), lifted_program(program_of(plain)))
    assert "layer 0, attention has no experts, not 5" in failed["experts"]
