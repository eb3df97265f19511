"""Choices of experts that a reference follows, against the operators that define them."""

import pytest
import torch

from edgeforge.model.model import open_model
from edgeforge.model.trace import trace
from edgeforge.reference.choices import (
    Choice,
    Following,
    gap_of,
    own_sets,
    router_places,
    routers,
    weights_by,
)
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.synth.synthesise import synthesise
from quant.program import dialect


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    found = {}
    for preset in ("tiny-mixtral", "tiny-phimoe", "tiny-olmoe", "tiny-jetmoe"):
        model = open_model(str(synthesise(preset, tmp_path_factory.mktemp("models") / preset)))
        found[preset] = model, trace(model.spec, 64)
    return found


def runner(model, program, change=lambda name, weight: weight):
    return ReferenceRunner(
        program,
        lambda given: change(given.name, model.weights.float_weight(given.name)),
        model.weights.float_rows,
    )


def router_of(program):
    return routers(list(program.graph.nodes))[0]


@pytest.mark.parametrize("preset", ["tiny-mixtral", "tiny-phimoe", "tiny-olmoe"])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_the_weights_of_a_routers_own_choice_are_the_operators(programs, preset, scale):
    node = router_of(programs[preset][1])
    # Logits near each other have several candidates for SparseMixer, and equal ones a tie.
    logits = 1 + scale * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    logits[:20] = logits[:20].round(decimals=1)
    own = own_sets(node, logits)
    expected = node.target(logits[None], *node.args[1:])[0]
    torch.testing.assert_close(weights_by(node, logits, own), expected)
    experts = own[0] if node.target is dialect.ROUTE else own[0] | own[2]
    assert torch.equal(experts, expected != 0)
    assert float(gap_of(node, logits, own).max()) < 1e-6


def test_routers_of_a_layer_are_told_apart(programs):
    places = ["layer 0, attention", "layer 0", "layer 1, attention", "layer 1"]
    assert router_places(programs["tiny-jetmoe"][1]) == places
    assert router_places(programs["tiny-olmoe"][1]) == ["layer 0", "layer 1"]


def test_the_gap_is_what_the_logits_would_have_to_move(programs):
    node = router_of(programs["tiny-mixtral"][1])  # two experts of a token
    logits = torch.tensor([[4.0, 3.0, 2.9, 0.0, 0.0, 0.0, 0.0, 0.0]])
    spread = float(logits.std(-1, correction=0))

    def gap(*experts):
        sets = torch.zeros(1, 1, 8, dtype=torch.bool)
        sets[0, 0, list(experts)] = True
        return float(gap_of(node, logits, sets))

    assert gap(0, 1) == 0
    assert gap(0, 2) == pytest.approx(0.1 / spread, rel=1e-5)
    assert gap(0, 5) == pytest.approx(3 / spread, rel=1e-5)
    assert gap(0, 1, 2) == gap(0) == float("inf")  # another number of experts


def test_a_token_whose_few_logits_are_alike_by_chance_has_no_large_gap(programs):
    node = router_of(programs["tiny-mixtral"][1])  # two experts of a token
    logits = torch.randn(1, 200, 4, generator=torch.Generator().manual_seed(0))
    typical = float(logits[0].std(-1, correction=0).square().mean().sqrt())
    logits[0, 7] = torch.tensor([0.012, 0.01, 0.005, 0.0])
    sets = own_sets(node, logits[0])
    sets[0, 7] = torch.tensor([False, False, True, True])
    following = Following([Choice(sets, torch.ones(200, dtype=torch.bool))])
    following.weights(node, logits)
    (gaps,) = following.gaps
    assert float(gap_of(node, logits[0, 7:8], sets[:, 7:8])) > 2
    assert float(gaps[7]) == pytest.approx(0.012 / typical, rel=0.05)
    assert float(gaps.sum()) == float(gaps[7])


def test_a_candidate_beyond_sparse_mixers_bound_has_a_gap(programs):
    node = router_of(programs["tiny-phimoe"][1])
    jitter = node.args[1]
    second = 2.0 * (1 - 2 * jitter)  # at the bound of the first one's candidates
    logits = torch.tensor([[2.0, second + 1e-3, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]])
    sets = own_sets(node, logits)
    assert sets[1, 0].tolist() == [True, True] + [False] * 6
    assert float(gap_of(node, logits, sets)) == 0
    sets[1, 0, 1] = False
    spread = float(logits.std(-1, correction=0))
    assert float(gap_of(node, logits, sets)) == pytest.approx(1e-3 / spread, rel=0.05)


@pytest.mark.parametrize("preset", ["tiny-mixtral", "tiny-phimoe", "tiny-jetmoe"])
def test_following_explains_what_a_nudged_router_changes(programs, preset):
    """A walk whose routers are moved a little jumps; the sound one that follows it does not."""
    model, program = programs[preset]
    draw = torch.Generator().manual_seed(1)

    def nudged(name, weight):
        if "router" not in name:
            return weight
        return weight * (1 + 0.02 * torch.randn(weight.shape, generator=draw))

    block = torch.randint(0, 256, (64,), generator=torch.Generator().manual_seed(2))
    sound, other = runner(model, program), runner(model, program, nudged)
    seen, own = Following(), Following()
    (moved,) = other.logits([block], [seen])
    (free,) = sound.logits([block], [own])
    known = torch.ones(len(block), dtype=torch.bool)
    choices = [Choice(sets, known) for sets in seen.own]
    following = Following(choices)
    assert own.differs(choices) and not own.differs([Choice(s, known) for s in own.own])
    (followed,) = sound.logits([block], [following])
    assert float((moved - followed).abs().max()) < 0.2 * float((moved - free).abs().max())
    gaps = torch.stack(following.gaps)
    assert 0 < float(gaps.max()) < 0.5
    assert torch.equal(torch.stack(following.same), gaps == 0)
    at = sound.logits_at(block, torch.tensor([3, 63]), Following(choices))
    torch.testing.assert_close(at, followed[[3, 63]])


def test_a_choice_that_was_not_seen_is_the_walks_own(programs):
    model, program = programs["tiny-mixtral"]
    block, own = torch.arange(16), Following()
    (free,) = runner(model, program).logits([block], [own])
    nothing = [Choice(torch.zeros_like(s), torch.zeros(16, dtype=torch.bool)) for s in own.own]
    following = Following(nothing)
    (again,) = runner(model, program).logits([block], [following])
    assert torch.equal(free, again)
    assert all(torch.equal(a, b) for a, b in zip(following.made(), own.own, strict=True))
