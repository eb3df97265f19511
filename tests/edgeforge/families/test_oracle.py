"""FLOAT logits of a tiny model of each family against transformers'."""

import numpy as np
import pytest

from edgeforge.families.registry import FAMILIES
from tests.oracles.tiny_families import CONFIGS, MIXTURES, RECURRENT, VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")

# Read by other files here: its own oracle, or no configuration that differs from another family's.
ELSEWHERE = {"llama", "mistral", "phi3", "openelm", "gemma3", "minicpm", "mistral3"}
ELSEWHERE |= {"qwen3_5", "rwkv5", "rwkv6"}
HERE = CONFIGS | MIXTURES | RECURRENT


def test_every_family_is_held_against_an_oracle():
    assert HERE.keys() | ELSEWHERE == FAMILIES.keys()


@pytest.mark.parametrize("family", HERE)
def test_one_pass_and_many_calls_give_the_logits_of_transformers(
    family, tmp_path, hugging_face, traced
):
    folder = hugging_face.save(tmp_path, HERE[family], "bfloat16", "60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokens = traced.tokens(48, VOCAB)
    expected = hugging_face.logits(folder, tokens)
    session = traced.session(traced.model(folder), 48)
    assert traced.difference(session.logits(tokens), expected) < traced.TOLERANCE
    session.reset()
    parts = [tokens[:5], *np.split(tokens[5:30], 25), tokens[30:]]
    grown = np.concatenate([session.extend(part) for part in parts])
    assert traced.difference(grown, expected) < traced.TOLERANCE
