"""Speculative decoding: the model's own text, whatever is proposed, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from device_harness.errors import DeviceError
from device_harness.session import HostSession
from edgeforge.errors import UsageError
from edgeforge.generation.drafters import (
    DraftModel,
    PromptLookup,
    Speculation,
    open_drafter,
    speculation_of,
)
from edgeforge.generation.sampling import Generation, Sampling
from edgeforge.generation.speculation import Speculated, SpeculativeGeneration
from exporters.manifest import Manifest
from exporters.manifest_records import ModelRecord, SourceRecord

VOCAB, CONTEXT, DRAFT = 50, 120, 5
STOP = 49


class Chain(HostSession):
    """A model whose logits depend on the last two tokens and the position, by a table.

    Args:
        seed: of the table.
        apart: how far logits of several tokens are from those of one.
    """

    def __init__(self, seed: int = 0, apart: float = 0.0) -> None:
        self.context, self.vocab_size, self.runtime = CONTEXT, VOCAB, "chain"
        self._table = np.random.default_rng(seed).normal(0, 3, (VOCAB, VOCAB, VOCAB))
        self._table[..., STOP] -= 6
        self.text: list[int] = []
        self.calls: list[int] = []
        self.apart = apart

    def reset(self) -> None:
        super().reset()
        self.text = []

    def use_drafts(self, wanted: bool) -> None:
        self.reset()

    def rewind(self, length: int) -> None:
        super().rewind(length)
        del self.text[length:]

    def extend(self, tokens):
        return self._run(tokens)[-1]

    def extend_draft(self, tokens):
        assert len(tokens) <= DRAFT + 1
        rows = self._run(tokens)
        return rows if len(tokens) == 1 else rows + self.apart * np.sin(np.arange(VOCAB))

    def _run(self, tokens):
        self._require_open()
        rows = []
        for token in tokens.tolist():
            self.text.append(token)
            rows.append(self._table[self.text[-2] if len(self.text) > 1 else 0, token])
        self._length = len(self.text)
        assert self._length <= CONTEXT
        self.calls.append(len(tokens))
        return np.array(rows, np.float32)


class Guesses:
    """Proposes what a model with the same table would write, wrongly now and then."""

    def __init__(self, session: Chain, share: float) -> None:
        self._table, self._draws, self._share = session._table, np.random.default_rng(5), share

    def propose(self, text, most):
        found = list(text)
        for _ in range(most):
            token = int(self._table[found[-2], found[-1]].argmax())
            wrong = self._draws.random() > self._share
            found.append(int(self._draws.integers(VOCAB)) if wrong else token)
        return found[len(text) :]


def texts(prompt, drafter, limit=60, stop=frozenset({STOP}), sampling=Sampling(), **given):  # noqa: B008
    plain = Generation(Chain(), prompt, limit, stop, sampling)
    wanted = list(plain)
    run = SpeculativeGeneration(
        Chain(), prompt, limit, stop, sampling, drafter=drafter, draft=DRAFT, **given
    )
    found = list(run)
    assert run.stopped == plain.stopped and run.produced == plain.produced
    return wanted, found, run


PROMPTS = [[1, 2], [3, 4, 5, 3, 4], list(range(40)), [7] * 12, [9, 8] * 20]
SHARES = [0.0, 0.5, 0.9, 1.0]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("fixed", [False, True])
def test_the_text_is_the_models_own_whatever_is_proposed(share, fixed):
    for prompt in PROMPTS:
        for stop in (frozenset({STOP}), frozenset[int]()):
            wanted, found, run = texts(prompt, Guesses(Chain(), share), stop=stop, fixed=fixed)
            assert found == wanted
            assert run.text == [*prompt, *wanted][: len(run.text)]
            assert run.accepted <= run.proposed
            if share == 1.0 and not run.run_again:
                assert run.accepted == run.proposed
    # Where nothing is wrong, a step gives as many tokens as it can.
    if share == 1.0 and fixed:
        assert run.steps <= -(-len(found) // (DRAFT + 1)) + 1 + run.run_again


@pytest.mark.parametrize("share", SHARES)
def test_drawn_text_of_a_seed_is_the_same_too(share):
    for seed in range(4):
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=seed)
        wanted, found, run = texts([3, 4], Guesses(Chain(), share), sampling=sampling)
        assert found == wanted
        assert run.run_again == 0


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7, 8])
def test_a_limit_ends_a_text_within_a_draft(limit):
    wanted, found, run = texts([1, 2], Guesses(Chain(), 1.0), limit, stop=frozenset(), fixed=True)
    assert found == wanted and len(found) == limit and run.stopped == "limit"


def test_a_text_ends_with_the_context():
    for prompt in ([1, 2] * 57, [1, 2] * 58, [1, 2] * 59 + [1], [1] * 120):
        drafter = Guesses(Chain(), 1.0)
        wanted, found, run = texts(prompt, drafter, 60, stop=frozenset(), fixed=True)
        assert found == wanted and run.stopped == "context"
        assert len(prompt) + len(found) == CONTEXT + 1


def test_drafts_grow_while_they_are_accepted_and_shrink_where_not():
    _, _, good = texts([1, 2], Guesses(Chain(), 1.0), stop=frozenset())
    _, _, bad = texts([1, 2], Guesses(Chain(), 0.0), stop=frozenset())
    assert good.proposed / good.steps > 4
    assert bad.proposed / bad.steps < 1.5
    _, _, fixed = texts([1, 2], Guesses(Chain(), 0.0), stop=frozenset(), fixed=True)
    assert fixed.proposed / fixed.steps > 4


def test_one_token_decides_where_two_are_near_each_other():
    session = Chain(apart=0.005)
    # The first two tokens are as likely but for a little that a draft behind them turns round.
    session._table[2, 3, :2] = 9.0, 9.001
    plain = Chain()
    plain._table = session._table
    wanted = list(Generation(plain, [1, 2], 40, frozenset()))
    drafter = Guesses(plain, 1.0)
    tried = [2, 3]
    run = SpeculativeGeneration(
        session, [1, *tried[:1]], 40, frozenset(), drafter=drafter, draft=DRAFT, fixed=True
    )
    assert list(run) == wanted
    near = SpeculativeGeneration(
        session, [2], 3, frozenset(), drafter=None, draft=DRAFT, fixed=True
    )
    near.text, near._asked, near.drafter = [2], DRAFT, drafter
    session.reset()
    session.extend(np.array([2]))
    draws = np.random.default_rng(0)
    assert near._step(3, draws)[0] == 1
    assert near.run_again == 1


def test_what_it_brought_is_told():
    _, found, run = texts([3, 4], Guesses(Chain(), 0.9), stop=frozenset())
    told = run.result()
    assert (told.steps, told.proposed, told.accepted) == (run.steps, run.proposed, run.accepted)
    assert told.plain_tokens_per_second > 0 and told.speed_up > 0
    assert told.apart == 0.0
    (line,) = told.lines(len(found))
    each = (len(found) - 1) / told.steps
    assert f"{each:.2f} tokens a step, {told.accepted} of {told.proposed} proposed" in line
    assert f"{told.speed_up:.2f} times as fast as plain decoding" in line
    lines = replace(told, apart=told.near + 0.5).lines(len(found))
    assert len(lines) == 2 and "give other logits for several tokens than for one" in lines[1]
    # Nothing to divide by.
    assert Speculated(0, 0, 0, 0).lines(1) == [
        "[speculation: 0.00 tokens a step, 0 of 0 proposed tokens accepted]"
    ]


def test_kernels_that_differ_are_noticed():
    session = Chain(apart=0.25)
    run = SpeculativeGeneration(
        session, [3, 4], 40, frozenset(), drafter=Guesses(session, 1.0), draft=DRAFT
    )
    found = list(run)
    told = run.result()
    assert told.apart == pytest.approx(0.25, abs=0.02)
    assert len(told.lines(len(found))) == 2


def test_lookup_takes_the_longest_and_the_latest():
    lookup = PromptLookup(3)
    assert lookup.propose([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 1) == [7]  # three tokens before two
    assert lookup.propose([5, 6, 1, 5, 6, 2, 5, 6], 2) == [2, 5]  # the latest of two
    assert PromptLookup(1).propose([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], 2) == [8, 1]
    assert lookup.propose([4], 3) == []
    # A text that grows is learned as it grows, and another one is not mixed with it.
    assert lookup.propose([4, 4], 3) == [4, 4, 4]
    assert lookup.propose([4, 4, 6, 4], 2) == [6, 4]
    assert lookup.propose([9, 8, 7], 2) == []


def test_a_smaller_model_proposes_its_own_text():
    drafter = DraftModel(Chain(seed=0), VOCAB)
    wanted, found, run = texts([3, 4, 5], drafter, stop=frozenset(), fixed=True)
    assert found == wanted and run.accepted > 40
    # Only where one token decided alone is the rest of a draft left out.
    assert run.proposed - run.accepted <= DRAFT * run.run_again
    other = Chain(seed=1)
    wanted, found, run = texts([3, 4, 5], DraftModel(other, VOCAB), stop=frozenset())
    assert found == wanted and run.accepted < run.proposed
    assert len(other.text) <= CONTEXT


def test_a_smaller_model_stops_at_its_context_and_at_the_vocabulary():
    small = Chain()
    small.context = 20
    drafter = DraftModel(small, VOCAB)
    assert len(drafter.propose(list(range(17)), 9)) == 4
    assert drafter.propose(list(range(21)), 9) == []
    wanted, found, _ = texts([3, 4, 5], drafter, stop=frozenset())
    assert found == wanted
    few = DraftModel(Chain(), 3)
    assert all(token < 3 for token in few.propose([1, 2], 8))


def manifest(**changes) -> Manifest:
    given = {
        "target": "onnx",
        "entry": "model.onnx",
        "recipe": "fp32",
        "context": CONTEXT,
        "source": SourceRecord("", "", None, "", {}),
        "model": ModelRecord.from_json({"vocab_size": VOCAB, "model_type": "llama"}),
        "bits_per_weight": 32.0,
        "weights": {},
        "inputs": {},
        "outputs": {},
        "states": {},
        "notes": (),
        "tools": {},
        "options": {"draft_positions": 8},
    }
    return Manifest(**{**given, **changes})


def test_as_many_tokens_are_proposed_as_the_artifact_takes():
    folder = Path("somewhere")
    assert Speculation("lookup").tokens(folder, manifest()) == 7
    assert Speculation("lookup", 3, 2).tokens(folder, manifest()) == 3


@pytest.mark.parametrize(
    ("asked", "changes", "words"),
    [
        (
            Speculation("lookup"),
            {"options": {}},
            "somewhere has no graph for drafts: export the model with --draft-positions 8",
        ),
        (
            Speculation("lookup", 8),
            {},
            "--draft 8 is not possible: somewhere gives the logits of 8 positions a call, and so "
            "takes drafts of 1 to 7 tokens",
        ),
        (Speculation("lookup", 0), {}, "--draft 0 is not possible"),
        (Speculation("lookup", None, 0), {}, "--ngram 0 must be between 1 and 16"),
        (Speculation("lookup", None, 17), {}, "--ngram 17 must be between 1 and 16"),
        (Speculation("out/small", None, 2), {}, "--ngram belongs to --speculate lookup"),
        (
            Speculation("lookup"),
            {
                "model": ModelRecord.from_json(
                    {
                        "vocab_size": VOCAB,
                        "model_type": "lfm2",
                        "layers": [{"mixer": "attention"}, {"mixer": "short_conv"}],
                    }
                )
            },
            "--speculate is not possible with somewhere: layers of this lfm2 model carry more "
            "than a row for each position",
        ),
    ],
)
def test_what_cannot_be_speculated_is_refused(asked, changes, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        asked.tokens(Path("somewhere"), manifest(**changes))


def test_options_of_speculation_need_it():
    assert speculation_of(None, None, None) is None
    assert speculation_of("lookup", 3, None) == Speculation("lookup", 3)
    for name, given in (("draft", (None, 3, None)), ("ngram", (None, None, 3))):
        with pytest.raises(UsageError, match=f"--{name} belongs to --speculate"):
            speculation_of(*given)


def test_a_draft_model_must_be_an_artifact_of_the_same_tokenizer(tmp_path):
    def opened(asked, given):
        with open_drafter(Speculation(str(asked)), given, None, None):  # type: ignore[arg-type]
            pass

    with pytest.raises(UsageError, match=r"looukp is neither lookup nor the folder of an artifact"):
        opened("looukp", manifest())
    from exporters.manifest_records import FileRecord

    manifest(files={"tokenizer.json": FileRecord(1, "b" * 64)}).write(tmp_path)
    with pytest.raises(UsageError, match="has another tokenizer than the artifact"):
        opened(tmp_path, manifest(files={"tokenizer.json": FileRecord(1, "a" * 64)}))
    layers = [{"mixer": "short_conv"}]
    record = ModelRecord.from_json({"vocab_size": VOCAB, "layers": layers})
    manifest(model=record).write(tmp_path)
    with pytest.raises(UsageError, match=r"cannot propose tokens: its layers carry more"):
        opened(tmp_path, manifest())


def test_a_session_that_cannot_rewind_says_so():
    session = Chain()
    session.extend(np.array([1, 2, 3]))
    session.can_rewind = False
    session.rewind(3)  # nothing is taken back
    with pytest.raises(DeviceError, match="tokens cannot be taken back"):
        session.rewind(2)
