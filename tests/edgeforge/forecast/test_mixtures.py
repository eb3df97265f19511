"""What a forecast says of mixtures of experts, on real shapes."""

from dataclasses import replace

import pytest

from edgeforge.cli.forecast_report import head_lines, target_lines
from edgeforge.families.registry import read_spec
from edgeforge.forecast.forecast import forecast
from edgeforge.forecast.mixtures import mixture_sizes
from edgeforge.forecast.sized_model import SizedModel
from edgeforge.synth.synthesise import PRESETS


def spec_of(preset):
    return read_spec(PRESETS[preset].config)


@pytest.mark.parametrize(
    ("preset", "total", "active", "experts"),
    # Parameters as released: 46.7 B of which 12.9 B act (with the embedding's 0.13 B), and 1.3 B
    # of which 0.4 B act. JetMoE's authors count 2.2 B of 8.5 B without the head.
    [
        ("mixtral-8x7b", 46.7, 12.7, 45.1),
        ("granite-3.1-1b-a400m", 1.3, 0.4, 1.2),
        ("jetmoe-8b", 8.5, 2.3, 8.3),
    ],
)
def test_the_sizes_of_a_mixture(preset, total, active, experts):
    spec = spec_of(preset)
    found = mixture_sizes(spec)
    assert spec.num_parameters / 1e9 == pytest.approx(total, abs=0.06)
    assert found.active / 1e9 == pytest.approx(active, abs=0.06)
    assert found.parameters / 1e9 == pytest.approx(experts, abs=0.06)


def test_experts_of_attention_count_too():
    spec = spec_of("jetmoe-8b")
    found = mixture_sizes(spec)
    # A layer's queries, outputs and feed-forward part, each of 8 experts of which 2 act.
    heads, feed_forward = 2 * 2048 * 2048, 3 * 2048 * 5632
    assert found.parameters == 24 * 8 * (heads + feed_forward)
    keys, routers, vectors = 2 * 2048 * 2048, 2 * 8 * 2048, 4 * 2048
    layer = 2 * (heads + feed_forward) + keys + routers + vectors
    assert found.active == 24 * layer + 2048 + 32000 * 2048
    line = found.line(spec.num_parameters)
    assert "2 of 8 experts in each of 24 layers and 2 of 8 attention experts in each of 24" in line
    layers = tuple(replace(each, experts=0) for each in spec.layers)
    kept = {name: given for name, given in spec.weights.items() if ".mlp.experts." not in name}
    only = replace(spec, layers=layers, weights=kept)
    assert mixture_sizes(only).line(10**9).startswith("mixture: 2 of 8 attention experts in each")


def test_a_dense_model_has_none():
    assert mixture_sizes(spec_of("llama-3.2-1b")) is None


def test_why_a_mixture_does_not_fit_and_which_does():
    model = SizedModel("mixtral-8x7b", spec_of("mixtral-8x7b"))
    found = forecast(model, "iphone-15-pro", recipes=("int4",))
    (target,) = found.targets
    assert target.best is None
    assert "the smallest, int4, takes 27.47 GB, 25.89 GB of it experts" in target.needs
    assert "although a token reads 7.39 GB" in target.needs
    assert target.mixtures == ("granite-3.1-1b-a400m",)
    words = "2 of 8 experts in each of 32 layers act on a token, so 12.7 of 46.7 billion"
    assert any(words in line for line in head_lines(found))
    lines = target_lines(target)
    assert "mixtures that fit, at int4: granite-3.1-1b-a400m" in lines
    assert any(line.startswith("a token reads 7.39 GB of the weights of int4") for line in lines)
    row = found.to_json()["targets"][0]["recipes"][0]
    assert row["bytes_read_a_token"] < row["experts_bytes"] < row["weights_bytes"]


def test_a_mixture_that_fits():
    name = "granite-3.1-1b-a400m"
    found = forecast(SizedModel(name, spec_of(name)), "iphone-15-pro", recipes=("int4",))
    assert found.targets[0].best == "int4"
    assert found.targets[0].mixtures == ()
