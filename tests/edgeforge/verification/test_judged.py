"""What is held against which bound, and what the sentence of a failed one says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeforge.verification.bounds import bounds_of
from edgeforge.verification.comparison import Comparison
from edgeforge.verification.greedy import GreedyAgreement
from edgeforge.verification.intervals import DivergenceIntervals, Interval, Intervals
from edgeforge.verification.judged import Found, judged
from edgeforge.verification.metrics import Divergence, Perplexity
from edgeforge.verification.routing import Routing
from edgeforge.verification.shipped import Shipped

GOOD = Divergence(8192, 2e-4, 1e-3, 4e-3, 0.99, 0.98, 0.03, 0.01, 40.0)
KNOWN = DivergenceIntervals(
    Interval(1.5e-4, 2.5e-4), Interval(0.98, 0.995), Interval(0.9, 1.0), Interval(8e-4, 2e-3)
)
RATIO = Interval(0.99, 1.01)
FIGURES = Comparison(
    perplexity={name: Perplexity(20.0, 8176) for name in ("float", "quantized", "artifact")},
    quantization=replace(GOOD, kl_mean=0.016, top1_agreement=0.92),
    lowering=GOOD,
    total=GOOD,
    intervals=Intervals(
        level=0.95,
        unit_blocks=1,
        units=16,
        resamples=4000,
        perplexity={"float": Interval(18.0, 22.0)},
        perplexity_ratio=RATIO,
        quantization=KNOWN,
        lowering=KNOWN,
        total=KNOWN,
        lowering_ratio=RATIO,
    ),
    not_finite={},
    worst=("token 7 of block 3",),
)
SHIPPED = Shipped(
    text="a text",
    context=1024,
    reached=1024,
    passes=4,
    prefill=GOOD,
    decode=GOOD,
    kl_mean=2e-4,
    kl_max=2e-3,
    interval=Interval(1e-4, 3e-4),
    all_positions=replace(GOOD, kl_max=1e-4),
    entropy=3.0,
    not_finite=0,
    worst=("position 748 (one token at once)",),
    furthest=("position 3 (one token at once)",),
)
FOUND = Found(
    figures=FIGURES,
    shipped=SHIPPED,
    greedy=GreedyAgreement(8, 48, 40.0, worst_gap=0.01, worst="token 18 of greedy text 0"),
    not_finite={},
    unlike=(),
    store="stores/1",
    other_processor=False,
    unigram=646.0,
    activations="auto",
    worst_weights=("model.layers.0.mlp.down_proj.weight 0.12",),
)


def checked(found=FOUND, given=None, rounds=True):
    given = given or {}
    bounds = bounds_of("onnx", given, rounds=rounds, bits=4.5)
    return {each.name: each for each in judged(found, bounds, given)}


def failed(checks) -> set[str]:
    return {name for name, each in checks.items() if each.verdict == "failed"}


def lowered(mean: float) -> Found:
    interval = replace(KNOWN, kl_mean=Interval(0.9 * mean, 1.1 * mean))
    figures = replace(
        FIGURES,
        lowering=replace(GOOD, kl_mean=mean),
        intervals=replace(FIGURES.intervals, lowering=interval),
    )
    return replace(FOUND, figures=figures)


def test_a_sound_artifact_passes_everything():
    checks = checked()
    assert {each.verdict for each in checks.values()} == {"passed"}
    assert {"stored_weights", "non_finite", "float.perplexity"} < checks.keys()


@pytest.mark.parametrize(
    ("activations", "words"),
    [
        ("auto", "8 bits, which may be the cause: export --activations float avoids that"),
        ("int8", "8 bits, which may be the cause: export --activations auto or float lessens that"),
        ("", "at most 0.02 (worst: token 7 of block 3)"),
    ],
)
def test_massive_activations_are_told_with_what_helps(activations, words):
    checks = checked(replace(lowered(0.24), activations=activations))
    assert failed(checks) == {"lowering.kl_mean"}
    assert checks["lowering.kl_mean"].message.endswith(words)
    assert checks["lowering.kl_mean"].where == ("token 7 of block 3",)


def test_activations_are_not_blamed_where_the_two_graphs_differ():
    apart = replace(SHIPPED, all_positions=replace(GOOD, kl_max=1.0))
    checks = checked(replace(lowered(0.24), shipped=apart))
    assert failed(checks) == {"lowering.kl_mean", "shipped.difference"}
    assert "8 bits" not in checks["lowering.kl_mean"].message


def test_what_ships_is_held_against_the_graph_of_all_positions():
    worse = replace(SHIPPED, kl_mean=2e-3, interval=Interval(1e-3, 3e-3), kl_max=0.02)
    checks = checked(replace(FOUND, shipped=worse))
    assert failed(checks) == {"shipped.kl_mean", "shipped.kl_max"}
    assert checks["shipped.kl_mean"].limit == pytest.approx(8e-4)
    assert checks["shipped.kl_max"].limit == pytest.approx(0.01)
    # A bound that a user gives is what it is.
    given = {"shipped.kl_mean": 5e-3, "shipped.kl_max": 0.1}
    assert failed(checked(replace(FOUND, shipped=worse), given)) == set()


def test_an_outlier_that_the_graph_of_all_positions_has_too_is_none_of_what_ships():
    """Kernels that round to 8 bits are far off at single tokens of a model with random weights."""
    outlier = replace(SHIPPED, kl_max=0.05)
    assert failed(checked(replace(FOUND, shipped=outlier))) == {"shipped.kl_max"}
    both = replace(outlier, all_positions_max=0.05)
    checks = checked(replace(FOUND, shipped=both))
    assert failed(checks) == set()
    assert checks["shipped.kl_max"].limit == pytest.approx(0.15)
    # No outlier of the other graph lifts the bound over what 8 bits may cost at all.
    both = replace(SHIPPED, kl_max=0.5, all_positions_max=0.5)
    assert failed(checked(replace(FOUND, shipped=both))) == {"shipped.kl_max"}


def test_other_integers_of_another_processor_are_in_doubt_and_cost_what_integers_cost():
    found = replace(lowered(0.03), unlike=("a", "b"), other_processor=True)
    assert checked(found)["stored_weights"].verdict == "doubtful"
    assert failed(checked(found)) == set()
    here = checked(replace(found, other_processor=False))
    assert failed(here) == {"stored_weights", "lowering.kl_mean"}
    assert "2 weights (a, ...) are what the manifest records" in here["stored_weights"].message


def with_float(perplexity: float, entropy: float, unigram: float | None = 646.0) -> Found:
    near = Interval(0.9 * perplexity, 1.1 * perplexity)
    figures = replace(
        FIGURES,
        perplexity=dict.fromkeys(FIGURES.perplexity, Perplexity(perplexity, 8176)),
        intervals=replace(FIGURES.intervals, perplexity={"float": near}),
    )
    return replace(
        FOUND, figures=figures, shipped=replace(SHIPPED, entropy=entropy), unigram=unigram
    )


def test_a_tokenizer_of_another_model_fails_and_random_weights_are_in_doubt():
    stale = checked(with_float(8368.0, entropy=3.4))
    assert failed(stale) == {"float.perplexity"}
    assert "the tokenizer is not the one" in stale["float.perplexity"].message
    random = checked(with_float(3100.0, entropy=7.5))["float.perplexity"]
    assert random.verdict == "doubtful" and "random or barely trained" in random.message
    given = {"float.perplexity": 10_000.0}
    assert failed(checked(with_float(8368.0, 3.4), given)) == set()


def test_random_tokens_have_no_perplexity_to_keep_to():
    names = checked(with_float(1e6, 3.4, unigram=None)).keys()
    assert not any("perplexity" in name for name in names)
    assert "lowering.kl_mean" in names and "shipped.kl_max" in names


def test_quality_has_a_bound_where_a_user_gives_one():
    assert "total.kl_mean" not in checked()
    found = checked(given={"total.kl_mean": 1e-5})
    assert failed(found) == {"total.kl_mean"}
    assert found["total.kl_mean"].where == FOUND.worst_weights


def test_too_little_text_for_an_interval_fails_by_a_wide_margin_alone():
    def small(mean):
        found = lowered(mean)
        return replace(found, figures=replace(found.figures, intervals=None))

    assert checked(small(0.05))["lowering.kl_mean"].verdict == "doubtful"
    assert checked(small(0.07))["lowering.kl_mean"].verdict == "failed"
    assert checked(small(0.005))["lowering.kl_mean"].verdict == "passed"


ROUTING = Routing(
    tokens=8192, changed=300, agreement=0.97, router=3, gap=0.05, own=GOOD, place="layer 3"
)


def chosen(found: Found, **fields) -> Found:
    figures = replace(found.figures, routing=replace(ROUTING, **fields))
    return replace(found, figures=figures)


def test_a_dense_model_has_no_figures_of_choices():
    assert not [name for name in checked() if name.startswith("routing.")]


def test_choices_of_experts_have_bounds_of_their_own():
    checks = checked(chosen(FOUND))
    assert {each.verdict for each in checks.values()} == {"passed"}
    assert (checks["routing.agreement"].value, checks["routing.gap"].value) == (0.97, 0.05)
    # Where nothing is rounded, so many other choices are no near ties.
    assert failed(checked(chosen(FOUND), rounds=False)) >= {"routing.agreement", "routing.gap"}


def test_a_router_that_computes_something_else_is_told():
    checks = checked(chosen(FOUND, gap=2.5, agreement=0.3))
    assert failed(checks) == {"routing.gap", "routing.agreement"}
    assert "rounding does not move a router's logits so far" in checks["routing.gap"].message
    assert "(worst: layer 3)" in checks["routing.agreement"].message
    assert failed(checked(chosen(FOUND, gap=float("inf")))) == {"routing.gap"}


def test_choices_that_could_not_be_read_are_told_where_a_figure_fails():
    unread = chosen(replace(lowered(0.24), activations=""), tokens=0, unread="no onnx there")
    checks = checked(unread)
    assert failed(checks) == {"lowering.kl_mean"}
    assert "is not known (no onnx there), and other choices" in checks["lowering.kl_mean"].message
    assert "routing.gap" not in checks
