"""What was measured is kept with the facts on which it depends, and is taken only with them."""

from __future__ import annotations

import numpy as np
import pytest

FACTS = {"model": "abc", "texts": {"held-out": "1"}, "contender": {"bits": 4.5}}


@pytest.fixture
def measurements(benchmark):
    return benchmark("measurements")


@pytest.fixture
def made(benchmark, measurements):
    draw = np.random.default_rng(1)
    kl = draw.random((3, 256)) * 0.1
    scores = benchmark("judging").Scores(kl, draw.random(3) * 0.1, draw.random(3))
    texts = {"held-out": measurements.OnText(768, 21.5, scores)}
    return measurements.made_now("a peer: Q4_0", "peer", 1000, 4500.0, 1.5, texts, FACTS)


def test_a_measurement_is_read_back_with_its_scores(measurements, made, tmp_path):
    kept = measurements.Kept(tmp_path / "model" / "2048")
    assert kept.read(made.contender) is None
    kept.write(made)
    found = kept.read(made.contender, FACTS)
    assert (found.bits, found.nbytes, found.kind, found.day) == (4.5, 562.5, "peer", made.day)
    before, after = (one.texts["held-out"] for one in (made, found))
    assert (after.tokens, after.perplexity) == (768, 21.5)
    assert np.allclose(before.scores.kl, after.scores.kl, rtol=1e-5)
    assert np.array_equal(before.scores.top1, after.scores.top1)
    assert after.scores.kl_mean.show(4) == before.scores.kl_mean.show(4)
    assert after.scores.perplexity_ratio == before.scores.perplexity_ratio


def test_a_measurement_of_other_facts_is_not_taken_unless_any_will_do(measurements, made, tmp_path):
    kept = measurements.Kept(tmp_path)
    kept.write(made)
    assert kept.read(made.contender, {**FACTS, "model": "another"}) is None
    assert kept.read(made.contender).bits == 4.5


def test_a_damaged_file_is_measured_again(measurements, made, tmp_path):
    kept = measurements.Kept(tmp_path)
    kept.write(made)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-40])
    assert kept.read(made.contender) is None
    kept.write(made)
    assert kept.read(made.contender, FACTS) is not None
    assert len([*tmp_path.iterdir()]) == 1  # no partial file is left


def test_a_refusal_is_kept_too(measurements, tmp_path):
    kept = measurements.Kept(tmp_path)
    kept.write(measurements.refused_now("g128", "peer", "576 columns", FACTS))
    found = kept.read("g128", FACTS)
    assert (found.refused, found.texts) == ("576 columns", {})


def test_comments_and_docstrings_do_not_change_the_digest_of_code_and_code_does(
    measurements, tmp_path
):
    file = tmp_path / "part" / "a.py"
    file.parent.mkdir()

    def digest(text: str) -> str:
        file.write_text(text)
        measurements.code_digest.cache_clear()
        return measurements.code_digest(tmp_path, ("part",))

    first = digest('"""One."""\n\n\ndef f(x):\n    """Two."""\n    return x + 1\n')
    assert digest('"""Other."""\n\n\ndef f(x):\n    return x + 1  # why\n') == first
    assert digest('"""One."""\n\n\ndef f(x):\n    """Two."""\n    return x + 2\n') != first
    (tmp_path / "part" / "b.c").write_text("int x;")
    with_c = digest("def f(x):\n    return x + 1\n")
    (tmp_path / "part" / "b.c").write_text("long x;")
    assert with_c not in (first, digest("def f(x):\n    return x + 1\n"))
