"""The report of an evaluation reads back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgeforge.verification.bounds import Bound, decide
from edgeforge.verification.evaluation import Evaluation
from edgeforge.verification.finite import NotFinite
from edgeforge.verification.for_card import for_card
from edgeforge.verification.greedy import GreedyAgreement
from edgeforge.verification.intervals import DivergenceIntervals, Interval, Intervals
from edgeforge.verification.metrics import Divergence, Perplexity
from edgeforge.verification.routing import Routing
from edgeforge.verification.soundness import UnsoundError, problems_of, require_sound
from quant.json_output import json_text
from quant.sealed_json import unseal


@pytest.fixture
def evaluation() -> Evaluation:
    divergence = Divergence(10, 0.1, 0.2, 0.3, 0.9, 0.8, 1.5, 0.5, 30.0)
    three = DivergenceIntervals(Interval(0.05, 0.15), Interval(0.8, 1.0), Interval(0.7, 0.9))
    intervals = Intervals(
        level=0.95,
        unit_blocks=1,
        units=16,
        resamples=4000,
        perplexity={"float": Interval(9.0, 11.5)},
        perplexity_ratio=Interval(1.05, 1.15),
        quantization=three,
        lowering=three,
        total=three,
    )
    return Evaluation(
        target="onnx",
        recipe="int4",
        runtime="onnxruntime 1",
        text="größe.txt",
        tokens=10,
        block=5,
        text_tokens=40,
        perplexity={name: Perplexity(v, 8) for name, v in (("float", 10.0), ("artifact", 11.0))},
        quantization=divergence,
        lowering=divergence,
        total=divergence,
        intervals=intervals,
        not_finite={},
        greedy_quantized=GreedyAgreement(8, 48, 40.5),
        greedy_float=GreedyAgreement(8, 48, 4.5),
        stored_weights_equal=True,
        bits_per_weight=4.5,
        artifact_bytes=123,
        timings=None,
    )


def test_the_report_reads_back_as_json(evaluation, tmp_path):
    path = evaluation.write(tmp_path)
    assert path == tmp_path / "report.json"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["schema_version"] == 3
    assert data["perplexity_ratio"] == pytest.approx(1.1)
    assert data["text"] == "größe.txt"
    assert data["lowering"]["kl_p99"] == 0.2
    assert data["text_tokens"] == 40 and data["not_finite"] == {}
    assert data["intervals"]["perplexity_ratio"] == {"low": 1.05, "high": 1.15}
    assert data["intervals"]["lowering"]["kl_mean"] == {"low": 0.05, "high": 0.15}
    assert data["greedy_quantized"]["same"] == 40.5
    assert unseal(path.read_bytes()) == json.loads(json.dumps(evaluation.to_json()))


def test_choices_of_experts_are_in_reports_of_mixtures_alone(evaluation):
    assert "routing" not in evaluation.to_json()
    own = replace(evaluation.lowering, kl_mean=0.5)
    routing = Routing(
        tokens=10, changed=2, agreement=0.9, router=1, gap=0.05, own=own, place="layer 1, attention"
    )
    made = replace(evaluation, routing=routing)
    assert made.to_json()["routing"]["own"]["kl_mean"] == 0.5
    assert made.to_json() == evaluation.to_json() | {"routing": made.to_json()["routing"]}
    assert for_card(evaluation).to_json().keys() == for_card(made).to_json().keys() - {"routing"}
    said = for_card(made).routing
    assert "2 of 10 tokens chose other experts" in said and "with QUANTIZED's own it is 0.5" in said
    assert "the router of layer 1, attention agrees least, in 90.0 % of experts" in said
    unread = replace(routing, unread="no onnx")
    assert "is not known everywhere (no onnx)" in replace(made, routing=unread).routing.words


def test_numbers_that_are_not_finite_are_strict_json(evaluation):
    bad = NotFinite(3, 10, 1, 4, "somewhere")
    divergence = replace(evaluation.total, kl_mean=math.nan, max_difference=math.inf)
    found = replace(evaluation, total=divergence, not_finite={"artifact": bad})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads(json_text(found.to_json()), parse_constant=refuse)
    assert data["total"]["kl_mean"] is None and data["total"]["max_difference"] is None
    assert data["not_finite"]["artifact"] == {
        "positions": 3,
        "of": 10,
        "block": 1,
        "position": 4,
        "where": "somewhere",
    }


def test_a_failed_check_is_a_problem_and_a_doubtful_one_is_none(evaluation, tmp_path):
    bound = Bound("lowering.kl_mean", 0.1, "at most")
    failed, doubtful = decide(bound, 0.2, (0.15, 0.3)), decide(bound, 0.11, (0.05, 0.2))
    unsound = replace(evaluation, checks=(failed, doubtful))
    assert problems_of(evaluation) == []
    assert problems_of(replace(evaluation, checks=(doubtful,))) == []
    assert problems_of(unsound) == [failed.message]
    with pytest.raises(UnsoundError, match=r"folder: lowering\.kl_mean is 0\.2"):
        require_sound([Path("folder")], [unsound])
    data = json.loads(unsound.write(tmp_path).read_text(encoding="utf-8"))
    assert [each["verdict"] for each in data["checks"]] == ["failed", "doubtful"]
    assert data["checks"][0]["low"] == 0.15
