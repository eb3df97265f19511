"""Every fact of a mixture of experts is held against the spec; a fault in one is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.edgeforge.verification.meaning.test_vocabulary import held
from tests.oracles.vocabulary import MIXTURES, SPECS
from tests.oracles.vocabulary_models import program_of
from tests.planted_faults import mixtures
from tests.planted_faults.lifted_program import lifted_program

ALWAYS = {"experts", "chosen_experts", "router", "expert_weights", "chosen_tokens", "combination"}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_sound_mixture_has_no_fault(name):
    failed, passed = held(MIXTURES[name], lifted_program(program_of(MIXTURES[name])))
    assert failed == {}
    own = {"shared": {"shared_expert"}, "sparse-mixer": {"router_jitter"}}
    assert ALWAYS | own.get(name, set()) <= passed
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
