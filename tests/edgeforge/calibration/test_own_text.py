"""The sequences that a model writes itself: they are what the model expects, token by token."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgeforge.calibration.own_text import decoder, write_sequences
from edgeforge.model.model import open_model
from edgeforge.model.trace import trace
from edgeforge.reference.walk import ReferenceRunner

LENGTH = 24
WINDOWED = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "sliding_window": 5,
}


@pytest.fixture(scope="module")
def demo():
    model = open_model("demo")
    return model, trace(model.spec, LENGTH)


def logits_of(model, program, sequences):
    runner = ReferenceRunner(
        program, lambda given: model.weights.float_weight(given.name), model.weights.float_rows
    )
    return torch.stack(list(runner.logits(list(torch.tensor(sequences)))))


def test_tokens_are_drawn_from_what_the_model_expects(demo):
    model, program = demo
    found = write_sequences(model, program, (model.spec.bos,), 32, LENGTH, 0)
    assert len(found) == 32 and {len(each) for each in found} == {LENGTH}
    assert {each[0] for each in found} == {model.spec.bos} and len(set(found)) == 32
    expected = logits_of(model, program, found)[:, :-1].log_softmax(-1)
    drawn = torch.tensor(found)[:, 1:, None]
    surprise = -float(expected.gather(-1, drawn).mean())
    entropy = -float((expected.exp() * expected).sum(-1).mean())
    # 736 draws with about 2 nats of spread each; draws one position off cost several nats more.
    assert surprise == pytest.approx(entropy, abs=0.3) and entropy < 5


def test_one_token_at_a_time_gives_the_logits_of_whole_sequences(demo, hugging_face, tmp_path):
    folder = hugging_face.save(tmp_path / "model", WINDOWED)
    windowed = open_model(str(folder))
    for model, program in (demo, (windowed, trace(windowed.spec, 16))):
        tokens = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(1))
        step = decoder(model.weights.float_walk(program), 3, 16)
        found = torch.stack([step(tokens[:, at], at) for at in range(16)], 1)
        assert torch.allclose(found, logits_of(model, program, tokens.tolist()), atol=1e-3)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(found, oracle(tokens).logits, atol=1e-3)


def test_the_seed_decides_and_a_model_without_a_tokenizer_begins_anywhere(demo):
    model, program = demo
    told = []
    one, same, other = (
        write_sequences(model, program, (), 4, 8, seed, lambda *done: told.append(done))
        for seed in (0, 0, 1)
    )
    assert one == same != other
    assert len({each[0] for each in one}) > 1
    assert told[:8] == [(done, 8) for done in range(1, 9)]
    assert json.loads(json.dumps(one)) == [list(each) for each in one]


def test_an_opened_model_writes_the_same_sequences_once(demo):
    model, program = demo
    steps = []
    asked = (model, program, (), 2, 3)
    first = write_sequences(*asked, 5, lambda done, size: steps.append(done))
    assert steps == [1, 2, 3]
    assert write_sequences(*asked, 5, lambda done, size: steps.append(done)) == first
    assert steps == [1, 2, 3]
    assert write_sequences(*asked, 6, lambda done, size: steps.append(done)) != first
    again = open_model("demo")
    assert write_sequences(again, *asked[1:], 5, lambda done, size: steps.append(done)) == first
    assert len(steps) == 9
