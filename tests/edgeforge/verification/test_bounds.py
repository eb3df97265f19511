"""A figure fails only where its whole interval lies beyond the bound."""

from __future__ import annotations

import math
import re
from dataclasses import asdict

import pytest

from edgeforge.errors import UsageError
from edgeforge.verification.bounds import (
    ADJUSTABLE,
    DEFAULTS,
    Bound,
    bounds_of,
    check_bound,
    decide,
    equal,
    parse_bounds,
)
from exporters.registry import TARGETS

MOST, LEAST = Bound("lowering.kl_mean", 0.1, "at most"), Bound("top1", 0.9, "at least")


@pytest.mark.parametrize(
    ("bound", "value", "interval", "verdict"),
    [
        (MOST, 0.05, (0.04, 0.06), "passed"),
        (MOST, 0.1, (0.1, 0.1), "passed"),
        (MOST, 0.2, (0.15, 0.3), "failed"),
        (MOST, 0.12, (0.09, 0.14), "doubtful"),
        (MOST, 0.09, (0.08, 0.14), "doubtful"),
        (MOST, 0.2, None, "failed"),
        (MOST, 0.05, None, "passed"),
        (MOST, math.nan, None, "failed"),
        (MOST, math.nan, (0.0, 0.1), "failed"),
        (MOST, 0.2, (math.nan, math.nan), "failed"),
        (LEAST, 0.95, (0.93, 0.97), "passed"),
        (LEAST, 0.5, (0.4, 0.6), "failed"),
        (LEAST, 0.89, (0.85, 0.92), "doubtful"),
        (LEAST, 0.91, (0.85, 0.92), "doubtful"),
    ],
)
def test_the_interval_decides(bound, value, interval, verdict):
    assert decide(bound, value, interval).verdict == verdict


def test_a_doubtful_figure_says_how_many_tokens_would_settle_it():
    # Half the interval's width would do: four times the tokens.
    doubtful = decide(MOST, 0.12, (0.08, 0.16), tokens=1000)
    assert doubtful.tokens_to_settle == 4000
    assert "about 4,000 tokens would settle it" in doubtful.message
    low = decide(LEAST, 0.91, (0.85, 0.97), tokens=1000)
    assert low.tokens_to_settle == 36_000
    assert decide(MOST, 0.05, (0.04, 0.06), tokens=1000).tokens_to_settle is None
    # At the bound itself no number of tokens is enough.
    assert decide(MOST, 0.1, (0.05, 0.15), tokens=1000).tokens_to_settle is None


def test_the_sentence_names_figure_interval_bound_and_where():
    failed = decide(MOST, 0.2, (0.15, 0.3), where=["position 64", "position 70"])
    assert failed.message == (
        "lowering.kl_mean is 0.2 [0.15, 0.3], and must be at most 0.1 "
        "(worst: position 64, position 70)"
    )


def test_a_share_of_the_quantization_error_counts_where_it_is_more():
    bound = Bound("lowering.kl_mean", 0.01, "at most", share=0.5)
    assert bound.beside(0.1).limit == 0.05
    assert bound.beside(0.001).limit == 0.01
    assert bound.beside(math.nan).limit == 0.01
    assert bound.beside(math.inf).limit == 0.01
    agreement = Bound("lowering.top1_agreement", 0.9, "at least", share=0.5)
    assert agreement.beside(0.6).limit == 0.8
    assert agreement.beside(0.99).limit == 0.9
    assert agreement.beside(math.nan).limit == 0.9


def test_a_fact_must_be_equal():
    assert equal("eos", (2,), (2,)).verdict == "passed"
    wrong = equal("context", 512, 1024, where=["edgeforge.json"])
    assert (wrong.verdict, wrong.value, wrong.limit) == ("failed", 512.0, 1024.0)
    assert wrong.message == "context is 512, and must be 1024"
    assert asdict(wrong)["sense"] == "equal"


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_target_has_bounds_of_figures_that_can_be_adjusted(target):
    bounds = DEFAULTS[target]
    assert {"lowering.kl_mean", "lowering.kl_p99", "lowering.top1_agreement"} <= bounds.keys()
    for name, bound in bounds.items():
        assert bound.name == name
        assert bound.sense == ADJUSTABLE[name]
        assert check_bound(name, bound.limit) == bound.limit
        given = bounds_of(target, {name: 0.5})
        assert given[name] == Bound(name, 0.5, bound.sense)
        assert given.keys() == bounds.keys()


def test_bounds_of_a_user():
    assert parse_bounds(["lowering.kl_mean=0.01", "perplexity_ratio = 1.2"]) == {
        "lowering.kl_mean": 0.01,
        "perplexity_ratio": 1.2,
    }
    assert "perplexity_ratio" in bounds_of("onnx", {"perplexity_ratio": 1.2})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lowering.kl_meen=0.1", "did you mean 'lowering.kl_mean'?"),
        ("kl=0.1", "there is no figure 'kl'"),
        ("lowering.kl_mean", "is not FIGURE=NUMBER"),
        ("lowering.kl_mean=few", "'few', which is no number"),
        ("lowering.kl_mean=nan", "'nan', which is no number"),
        ("lowering.kl_mean=inf", "'inf', which is no number"),
        ("lowering.kl_mean=-1", "'-1', which is no number"),
        ("total.top1_agreement=92", "a share of at most 1"),
    ],
)
def test_a_bound_that_can_be_none_is_refused(given, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parse_bounds([given])


def test_a_figure_has_one_bound():
    with pytest.raises(UsageError, match="twice"):
        parse_bounds(["lowering.kl_mean=0.1", "lowering.kl_mean=0.2"])
