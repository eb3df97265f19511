"""Baselines: what is called worse, what is noise, and what cannot be compared."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from edgeforge.errors import UsageError
from edgeforge.gate.baseline import Baseline, Entry, compare, read_baseline, require_comparable
from edgeforge.gate.metrics import COMPARED
from edgeforge.verification.intervals import BlockSums

UNITS, TOKENS = 16, 512


def entry(kl: np.ndarray, *, loss: float = 3.0, agreement: float = 0.95, **changes) -> Entry:
    """An entry whose total KL has these means of units, float64[units]."""
    columns = {
        "total kl": kl,
        "lowering kl": np.full(len(kl), 1e-4),
        "total top1": np.full(len(kl), agreement),
        "artifact": np.full(len(kl), loss),
    }
    sums = BlockSums(
        1,
        {name: (column * TOKENS).tolist() for name, column in columns.items()},
        {name: [float(TOKENS)] * len(kl) for name in columns},
    )
    figures = {
        "total.kl_mean": float(kl.mean()),
        "total.top1_agreement": agreement,
        "perplexity_ratio": math.exp(loss - 3),
        "lowering.kl_mean": 1e-4,
    }
    values = {
        "target": "onnx",
        "recipe": "int4",
        "checkpoint": "c" * 64,
        "text": "t" * 64,
        "tokenizer": "k" * 64,
        "tokens": len(kl) * TOKENS,
        "artifact_bytes": 1000,
        "figures": figures,
        "sums": sums,
    }
    return Entry(**(values | changes))


def outcomes(before: Entry, now: Entry, **worse_by: float) -> dict[str, str]:
    return {each.metric: each.outcome for each in compare(before, now, worse_by)}


@pytest.fixture
def kl():
    """Divergences of units that differ much more between units than between artifacts."""
    return np.random.default_rng(0).lognormal(-3, 0.6, UNITS)


def test_the_same_figures_are_no_regression(kl):
    assert set(outcomes(entry(kl), entry(kl)).values()) == {"passed"}


def test_a_change_far_smaller_than_the_spread_of_the_units_is_called_when_all_show_it(kl):
    # 5 % of the mean; the units themselves spread by 60 %. Unpaired it would be lost.
    assert outcomes(entry(kl), entry(kl * 1.05))["total.kl_mean"] == "failed"
    assert outcomes(entry(kl), entry(kl * 0.95))["total.kl_mean"] == "passed"


def test_a_change_that_units_do_not_agree_on_is_noise(kl):
    noise = np.random.default_rng(1).normal(1.03, 0.15, UNITS)
    now = entry(kl * noise)
    before = entry(kl)
    assert now.figures["total.kl_mean"] > 1.01 * before.figures["total.kl_mean"]  # it is worse
    assert outcomes(before, now)["total.kl_mean"] == "doubtful"


def test_what_may_change_may(kl):
    before, now = entry(kl), entry(kl * 1.05)
    assert outcomes(before, now, **{"total.kl_mean": 0.2})["total.kl_mean"] == "passed"
    assert outcomes(before, entry(kl * 1.005))["total.kl_mean"] == "passed"


def test_perplexity_and_agreement_get_worse_in_their_own_directions(kl):
    before = entry(kl)
    worse = outcomes(before, entry(kl, loss=3.01, agreement=0.94))
    assert worse["perplexity_ratio"] == worse["total.top1_agreement"] == "failed"
    better = outcomes(before, entry(kl, loss=2.99, agreement=0.96))
    assert better["perplexity_ratio"] == better["total.top1_agreement"] == "passed"
    (found,) = (
        each for each in compare(before, entry(kl, loss=3.01), {}) if "perplexity" in each.metric
    )
    assert found.change == pytest.approx(math.expm1(0.01))
    assert found.baseline == 1.0


def test_no_false_alarm_in_a_hundred_equal_artifacts_and_every_real_loss_is_found(kl):
    alarms = found = 0
    for seed in range(100):
        noise = np.random.default_rng(seed).normal(1, 0.1, UNITS)
        alarms += outcomes(entry(kl), entry(kl * noise))["total.kl_mean"] == "failed"
        found += outcomes(entry(kl), entry(kl * (noise + 0.5)))["total.kl_mean"] == "failed"
    assert (alarms, found) == (0, 100)


def test_figures_that_are_not_finite_are_worse(kl):
    broken = kl.copy()
    broken[3] = math.nan
    assert outcomes(entry(kl), entry(broken))["total.kl_mean"] == "failed"


def test_a_baseline_reads_back_and_is_written_in_place_of_a_baseline(tmp_path, kl):
    path = tmp_path / "baseline.json"
    Baseline({"out/a": entry(kl)}).write(path)
    assert read_baseline(path).entries == {"out/a": entry(kl)}
    Baseline({"out/b": entry(kl)}).write(path)
    assert list(read_baseline(path).entries) == ["out/b"]
    assert [each.name for each in tmp_path.iterdir()] == ["baseline.json"]


def test_something_else_is_neither_read_nor_replaced(tmp_path, kl):
    path = tmp_path / "package.json"
    path.write_text('{"name": "an app"}')
    for attempt in (lambda: read_baseline(path), lambda: Baseline({}).write(path)):
        with pytest.raises(UsageError, match="is no baseline of EdgeForge"):
            attempt()
    assert path.read_text() == '{"name": "an app"}'


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data.update(schema_version=2), "has schema version 2; this EdgeForge reads"),
        (lambda data: data["entries"]["a"].update(tokens=7), "changed by hand or damaged"),
        (lambda data: data.pop("sha256"), "changed by hand or damaged"),
        (lambda data: data.update(kind="other"), "is no baseline of EdgeForge"),
    ],
)
def test_a_baseline_that_cannot_be_trusted_is_refused(tmp_path, kl, change, sentence):
    path = tmp_path / "baseline.json"
    Baseline({"a": entry(kl)}).write(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=sentence):
        read_baseline(path)


def test_a_baseline_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no baseline .*--update-baseline"):
        read_baseline(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint": "d" * 64}, "another checkpoint"),
        ({"text": "u" * 64}, "another text"),
        ({"tokenizer": ""}, "another tokenizer"),
        ({"target": "coreml"}, "another target"),
        ({"tokens": 7}, "another number of tokens"),
    ],
)
def test_another_model_or_text_cannot_be_compared(tmp_path, kl, changes, words):
    before = replace(entry(kl), **changes)
    with pytest.raises(UsageError, match=f"has out/a of {words}.*cannot be compared"):
        require_comparable(tmp_path / "b.json", "out/a", before, entry(kl))
    require_comparable(tmp_path / "b.json", "out/a", entry(kl), entry(kl * 2))


def test_other_blocks_and_too_few_cannot_be_compared(tmp_path, kl):
    shorter = replace(entry(kl[:8]), tokens=UNITS * TOKENS)
    with pytest.raises(UsageError, match="in other blocks of tokens"):
        require_comparable(tmp_path / "b.json", "out/a", shorter, entry(kl))
    with pytest.raises(UsageError, match="measured on too few tokens"):
        require_comparable(tmp_path / "b.json", "out/a", entry(kl), None)


def test_what_is_compared_are_figures_that_a_report_has_sums_of(kl):
    assert {each.column for each in COMPARED.values()} <= entry(kl).sums.sums.keys()
