"""Which tokens are looked at: spread over the text, the same ones each time."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeforge.errors import UsageError
from edgeforge.model.model import DEMO_FOLDER, HELDOUT, open_model
from edgeforge.tokenizer import Tokenizer, read_text, split_blocks
from edgeforge.verification.sample import (
    check_tokens,
    choose_sample,
    long_text,
    parse_tokens,
    spread_blocks,
)

SPEC = SimpleNamespace(vocab_size=3072, bos=1, num_parameters=4_000_000)


@pytest.fixture(scope="module")
def heldout() -> list[int]:
    tokenizer = Tokenizer(DEMO_FOLDER / "tokenizer.json", "demo")
    return tokenizer.encode(read_text(HELDOUT), special=False)


def chosen(tokens, spec=SPEC, context=1024):
    return choose_sample(DEMO_FOLDER, spec, context, None, tokens, None)


def test_the_default_is_8192_tokens_from_all_over_the_text(heldout):
    spec = open_model("demo").spec
    sample = chosen(None, spec)
    assert sample.tokens == 8192 and set(map(len, sample.blocks)) == {512}
    every = split_blocks(heldout, 512, [spec.bos])
    assert sample.available == sum(map(len, every))
    assert all(block[0] == spec.bos for block in sample.blocks)
    assert sample.blocks[0] == every[0]
    assert sample.blocks[-1][1:] == heldout[-511:]
    # What lies between two blocks is as long everywhere.
    text = ",".join(map(str, heldout)) + ","
    places = []
    for block in sample.blocks:
        before, found, _ = text.partition(",".join(map(str, block[1:])) + ",")
        assert found
        places.append(before.count(","))
    steps = {after - at for at, after in itertools.pairwise(places)}
    assert max(steps) - min(steps) <= 1 and min(steps) > 8000
    assert chosen(8192, spec) == sample == chosen(None, spec)


def test_all_is_every_token(heldout):
    sample = chosen("all")
    assert sample.blocks == split_blocks(heldout, 512, [1])
    assert sample.tokens == sample.available
    assert chosen(10**9) == sample


def test_a_large_model_gets_less_from_all_over_the_text_too(heldout):
    sample = chosen(None, SimpleNamespace(vocab_size=3072, bos=1, num_parameters=50_000_001))
    assert sample.tokens == 2048 and len(sample.blocks) == 4
    assert sample.blocks[-1][1:] == heldout[-511:]


def test_a_short_context_has_shorter_blocks():
    assert {len(block) for block in chosen(1024, context=128).blocks} == {128}


def test_a_tokenizer_whose_additions_fill_the_blocks_is_told(tmp_path):
    content = json.loads((DEMO_FOLDER / "tokenizer.json").read_text())
    begin = content["post_processor"]["single"][0]
    content["post_processor"]["single"][:1] = [begin] * 8
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="puts 8 tokens in front of a text, which leaves no room"):
        choose_sample(tmp_path, SPEC, 8, None, 64, None)
    assert choose_sample(tmp_path, SPEC, 16, None, 64, None).blocks[0][:8] == [1] * 8


@given(st.integers(2, 300), st.integers(2, 40), st.sampled_from([[], [999]]), st.integers(2, 400))
@settings(max_examples=200, deadline=None)
def test_blocks_lie_apart_and_hold_what_was_asked_for(size, length, head, count):
    tokens = list(range(size))
    available = sum(map(len, split_blocks(tokens, length, head)))
    if count >= available:
        return
    blocks = spread_blocks(tokens, length, head, count)
    found = sum(map(len, blocks))
    # A rest of a single token is no block.
    assert found == count or (found == count - 1 and count % length == 1)
    parts = [block[len(head) :] for block in blocks]
    assert all(2 <= len(block) <= length and block[: len(head)] == head for block in blocks)
    assert all(part == list(range(part[0], part[0] + len(part))) for part in parts)
    assert all(a[-1] < b[0] for a, b in itertools.pairwise(parts))
    gaps = [b[0] - a[-1] - 1 for a, b in itertools.pairwise(parts)]
    if gaps:
        assert (parts[0][0], parts[-1][-1]) == (0, size - 1)
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("text", ["1", "0", "-5", "many", "", "8192.0", "8k", "All", "1e3", "²"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(UsageError, match="is neither a number of tokens, 2 or more, nor 'all'"):
        parse_tokens(text)


def test_numbers_of_tokens():
    assert [parse_tokens(text) for text in ("2", "8192", "all", None)] == [2, 8192, "all", None]
    for bad in (1, -1, "some", True, 2.5):
        with pytest.raises(UsageError, match="is neither a number"):
            check_tokens(bad)


def test_a_long_text_fills_the_context_or_its_budget(heldout):
    sample = chosen(None)
    text = long_text(sample, 1024, 4_000_000, None)
    assert text.tokens == [1, *heldout[:1023]] and text.context == 1024
    assert text.label == "the first 1,024 tokens of the demo model's held-out text"
    far = 131_072
    assert len(long_text(sample, far, 4_000_000, None).tokens) == 8192
    assert len(long_text(sample, far, 135_000_000, None).tokens) == 4096
    assert len(long_text(sample, far, 1_240_000_000, 2048).tokens) == 2048
    assert len(long_text(sample, far, 135_000_000, "all").tokens) == far


def test_a_text_shorter_than_the_context_is_repeated(tmp_path):
    (tmp_path / "short.txt").write_text("The function returns a list of names. " * 4)
    sample = choose_sample(DEMO_FOLDER, SPEC, 1024, tmp_path / "short.txt", None, None)
    text = long_text(sample, 1024, 4_000_000, None)
    count = len(sample.whole)
    assert len(text.tokens) == 1024 and count < 200
    assert text.tokens[1 : count + 1] == text.tokens[count + 1 : 2 * count + 1] == sample.whole
    assert text.label == (
        f"the {count} tokens of short.txt, repeated to 1,024, because they are fewer than the "
        f"context"
    )


def test_random_tokens_fill_the_context_too(tmp_path):
    sample = choose_sample(tmp_path, SPEC, 300, None, 100, None)
    text = long_text(sample, 300, 4_000_000, None)
    assert text.tokens[0] == 1 and len(text.tokens) == 300 and max(text.tokens) < 3072
