"""A mixture's artifact beside QUANTIZED with its choices: near ties pass, planted faults do not."""

import zlib

import numpy as np
import pytest
import torch

from edgeforge.model.model import open_model
from edgeforge.model.trace import trace
from edgeforge.reference.choices import Choice, Following
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.synth.synthesise import synthesise
from edgeforge.verification.bounds import DEFAULTS
from edgeforge.verification.comparison import compare
from tests.planted_faults.mixtures import with_matrices_swapped, with_route

LOOSEST = DEFAULTS["onnx"][True]
BLOCKS = [list(range(at, at + 64)) for at in (0, 64, 128, 160)]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    model = open_model(str(synthesise("tiny-mixtral", tmp_path_factory.mktemp("m") / "model")))
    return model, trace(model.spec, 64)


def runner(model, program, change=lambda name: (name, 0.0)):
    def read(given):
        name, noise = change(given.name)
        draw = torch.Generator().manual_seed(zlib.crc32(given.name.encode()))
        weight = model.weights.float_weight(name)
        return weight * (1 + noise * torch.randn(weight.shape, generator=draw))

    return ReferenceRunner(program, read, model.weights.float_rows)


class Standing:
    """A reference that stands in for an artifact and for what reads its choices."""

    why_none = ""

    def __init__(self, runner):
        self.runner = runner

    def logits(self, tokens):
        return next(self.runner.logits([torch.from_numpy(np.asarray(tokens))])).numpy()

    def choices(self, texts, calls=None):
        found = [Following() for _ in texts]
        list(self.runner.logits([torch.from_numpy(text) for text in texts], found))
        return [
            [Choice(sets, torch.ones(sets.shape[1], dtype=torch.bool)) for sets in each.own]
            for each in found
        ]


def compared(mixture, artifact):
    sound, standing = runner(*mixture), Standing(artifact)
    (found,) = compare(BLOCKS, sound, sound, [standing], lambda done, size: None, [standing])
    return found


def failing(found):
    """The figures that are out of the loosest bounds."""
    values = {
        "routing.agreement": found.routing.agreement,
        "routing.gap": found.routing.gap,
        "lowering.kl_mean": found.lowering.kl_mean,
        "lowering.kl_p99": found.lowering.kl_p99,
    }
    return {name for name, value in values.items() if not LOOSEST[name].holds(value)}


def test_choices_that_rounding_changes_are_told_from_errors(mixture):
    """Every weight moved by half a percent, as coarse kernels do."""
    artifact = runner(*mixture, lambda name: (name, 0.005 if "norm" not in name else 0.0))
    found = compared(mixture, artifact)
    routing = found.routing
    assert not failing(found)
    assert 0 < routing.changed < routing.tokens == 256
    assert 0.9 < routing.agreement < 1
    assert 0 < routing.gap < 0.1
    # With its own choices QUANTIZED is far from the artifact at these tokens.
    assert routing.own.kl_max > 10 * found.lowering.kl_max
    assert routing.own.tokens == found.lowering.tokens


def test_without_a_changed_choice_quantized_runs_once(mixture):
    found = compared(mixture, runner(*mixture))
    assert (found.routing.changed, found.routing.agreement, found.routing.gap) == (0, 1.0, 0.0)
    assert found.routing.own == found.lowering
    assert found.lowering.kl_max == 0


def another_layers_router(name):
    return name.replace("layers.0", "layers.1") if "router" in name else name, 0.0


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("another layer's router", "routing.gap"),
        ("a router of noise", "routing.agreement"),
        ("other experts' matrices", "lowering.kl_p99"),
        ("one expert more", "routing.gap"),
        ("one expert less", "routing.gap"),
        ("weights that do not add up to 1", "lowering.kl_p99"),
    ],
)
def test_a_planted_fault_is_no_near_tie(mixture, fault, named):
    model, program = mixture
    changed, change = program, lambda name: (name, 0.0)
    match fault:
        case "another layer's router":
            change = another_layers_router
        case "a router of noise":

            def change(name):
                return name, 3.0 if "router" in name else 0.0

        case "other experts' matrices":
            changed = with_matrices_swapped(program, "down_proj")
        case "one expert more":
            changed = with_route(program, 3, True)
        case "one expert less":
            changed = with_route(program, 1, True)
        case _:
            changed = with_route(program, 2, False)
    found = compared(mixture, runner(model, changed, change))
    assert named in failing(found)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    model = open_model(str(synthesise("tiny-jetmoe", tmp_path_factory.mktemp("h") / "model")))
    return model, trace(model.spec, 64)


@pytest.mark.parametrize(
    ("router", "place"),
    [("layers.1.self_attn.router", "layer 1, attention"), ("layers.1.mlp.router", "layer 1")],
)
def test_both_routers_of_a_layer_are_followed_and_told_apart(heads, router, place):
    """One router moved a little: its choices are followed, so the rest of the model is the same."""
    found = compared(heads, runner(*heads, lambda name: (name, 0.02 if router in name else 0.0)))
    routing = found.routing
    assert not failing(found)
    assert routing.place == place and 0.9 < routing.agreement < 1
    assert f"the router of {place} agrees least, in" in routing.words
    # What is left is the weights of experts, which the moved router computes.
    assert routing.own.kl_max > 10 * found.lowering.kl_max


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("routers of the layer exchanged", "routing.gap"),
        ("outputs of other experts", "lowering.kl_p99"),
        ("queries of other experts", "lowering.kl_p99"),
    ],
)
def test_a_planted_fault_in_a_mixture_of_heads_is_no_near_tie(heads, fault, named):
    (model, changed), change = heads, lambda name: (name, 0.0)
    match fault:
        case "routers of the layer exchanged":

            def change(name):
                parts = ("self_attn.router", "mlp.router")
                one, other = parts if parts[0] in name else parts[::-1]
                return name.replace(one, other), 0.0

        case "outputs of other experts":
            changed = with_matrices_swapped(changed, "o_proj")
        case _:
            changed = with_matrices_swapped(changed, "q_proj")
    assert named in failing(compared(heads, runner(model, changed, change)))
