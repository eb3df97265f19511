"""Drawing tokens, held against probabilities computed apart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_harness.errors import DeviceError
from edgeforge.errors import UsageError
from edgeforge.generation.sampling import Generation, Sampling, choose

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0, 2.9, -40.0], np.float32)


def probabilities(logits, temperature: float, top_p: float) -> dict[int, float]:
    """What each token should be drawn with: softmax, then the smallest likeliest set."""
    exact = [np.exp(np.float64(x) / temperature) for x in logits]
    share = {token: value / sum(exact) for token, value in enumerate(exact)}
    kept: dict[int, float] = {}
    for token in sorted(share, key=lambda t: -share[t]):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = share[token]
    total = sum(kept.values())
    return {token: value / total for token, value in kept.items()}


def drawn(logits, sampling: Sampling, count: int) -> dict[int, float]:
    draws = np.random.default_rng(sampling.seed)
    tokens = [choose(logits, sampling, draws) for _ in range(count)]
    return {token: tokens.count(token) / count for token in set(tokens)}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.7, 0.4, 1e-9])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p):
    expected = probabilities(LOGITS, temperature, top_p)
    count = 4000
    found = drawn(LOGITS, Sampling(temperature, top_p, seed=1), count)
    if top_p < 1:  # the set is exact, for none of its tokens is rare here
        assert set(found) == set(expected)
    for token, share in expected.items():
        # Five standard deviations of a binomial share.
        allowed = 5 * (share * (1 - share) / count) ** 0.5 + 1e-12
        assert abs(found.get(token, 0.0) - share) <= allowed


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9, unique=True),
    st.floats(1e-3, 1.0),
    st.floats(0.05, 5.0),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_only_the_likeliest_set_is_drawn_from(logits, top_p, temperature, seed):
    row = np.array(logits, np.float32)
    allowed = (
        probabilities(row, temperature, top_p - 1e-9),
        probabilities(row, temperature, min(1.0, top_p + 1e-9)),
    )
    token = choose(row, Sampling(temperature, top_p, seed), np.random.default_rng(seed))
    assert token in allowed[0] or token in allowed[1]


def test_temperature_zero_takes_the_likeliest_whatever_the_seed():
    assert {choose(LOGITS, Sampling(0.0, 0.5, s), np.random.default_rng(s)) for s in range(9)} == {
        1
    }


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-9])
@pytest.mark.filterwarnings("error")
def test_a_tiny_temperature_takes_the_likeliest(temperature):
    assert set(drawn(LOGITS, Sampling(temperature), 20)) == {1}
    assert set(drawn(LOGITS * 1e30, Sampling(1.0), 20)) == {1}


def test_the_same_seed_draws_the_same():
    def text(seed):
        draws = np.random.default_rng(seed)
        return [choose(LOGITS, Sampling(1.5, 1.0, seed), draws) for _ in range(40)]

    assert text(3) == text(3) != text(4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad, temperature):
    row = LOGITS.copy()
    row[2] = bad
    with pytest.raises(DeviceError, match=f"gives {bad} as a logit"):
        choose(row, Sampling(temperature), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(-0.1), "--temperature -0.1 must be between 0 and 100"),
        (Sampling(100.5), "--temperature 100.5"),
        (Sampling(float("nan")), "--temperature nan"),
        (Sampling(top_p=0.0), "--top-p 0.0 must be above 0 and at most 1"),
        (Sampling(top_p=1.01), "--top-p 1.01"),
        (Sampling(top_p=float("nan")), "--top-p nan"),
    ],
)
def test_values_that_mean_nothing_are_refused(sampling, words):
    with pytest.raises(UsageError, match=words):
        sampling.check()


class Counting:
    """A session whose likeliest token is one more than the last one it was given."""

    def __init__(self, context: int = 64, vocab: int = 40) -> None:
        self.context, self.vocab_size, self.runtime = context, vocab, "counting"
        self.tokens: list[int] = []
        self.calls: list[int] = []

    def reset(self) -> None:
        self.tokens = []

    def extend(self, tokens):
        assert tokens.dtype == np.int64
        self.tokens += tokens.tolist()
        self.calls.append(len(tokens))
        assert len(self.tokens) <= self.context
        logits = np.zeros(self.vocab_size, np.float32)
        logits[(self.tokens[-1] + 1) % self.vocab_size] = 9.0
        return logits

    def logits(self, tokens):
        raise AssertionError("not for generation")


def test_generation_feeds_each_token_back():
    session = Counting()
    run = Generation(session, [4, 5], 5, frozenset())
    assert list(run) == [6, 7, 8, 9, 10]
    assert session.tokens == [4, 5, 6, 7, 8, 9]  # the last one is given, not run
    assert session.calls == [2, 1, 1, 1, 1]
    assert (run.stopped, run.produced) == ("limit", 5)
    assert run.prompt_seconds > 0 and run.decode_tokens_per_second > 0


def test_generation_begins_anew_each_time():
    session = Counting()
    session.extend(np.array([30], np.int64))
    assert list(Generation(session, [4], 2, frozenset())) == [5, 6]
    assert session.tokens == [4, 5]


def test_a_stop_token_ends_the_text_and_is_not_given():
    run = Generation(Counting(), [4], 50, frozenset({8, 20}))
    assert list(run) == [5, 6, 7]
    assert run.stopped == "stop"


def test_a_stop_token_at_once_gives_nothing():
    run = Generation(Counting(), [4], 50, frozenset({5}))
    assert list(run) == []
    assert (run.stopped, run.decode_tokens_per_second) == ("stop", 0.0)


def test_a_full_context_ends_the_text():
    session = Counting(context=6)
    run = Generation(session, [1, 2], 50, frozenset())
    # Six positions are run; the last of them still says what comes next.
    assert list(run) == [3, 4, 5, 6, 7]
    assert run.stopped == "context" and len(session.tokens) == 6


def test_loading_is_over_before_the_clock_starts(monkeypatch):
    class Slow(Counting):
        """Takes 5 seconds of a made-up clock to load, whatever asks for it first, and 1 to run."""

        now, loaded = 0.0, False

        def load(self):
            Slow.now += 0 if self.loaded else 5
            self.loaded = True

        def __getattribute__(self, name):
            if name == "vocab_size" and "context" in vars(self):
                self.load()
            return super().__getattribute__(name)

        def extend(self, tokens):
            self.load()
            Slow.now += 1
            return super().extend(tokens)

    monkeypatch.setattr("time.perf_counter", lambda: Slow.now)
    run = Generation(Slow(), [1, 2], 3, frozenset())
    assert len(list(run)) == 3
    assert (run.load_seconds, run.prompt_seconds, run.decode_seconds) == (5, 1, 2)
