"""RWKV 5 and 6 against NumPy written from the paper, and what a folder may not say."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeforge.errors import CheckpointError
from edgeforge.families.registry import read_spec
from tests.oracles import rwkv_numpy

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("rwkv5", "rwkv6")
VOCAB = 83
EAGLE = {
    "architectures": ["Rwkv5ForCausalLM"],
    "model_type": "rwkv5",
    "model_version": "5_2",
    "attention_hidden_size": 60,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_size": 12,
    "head_size_divisor": 8,
    "hidden_size": 60,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "rescale_every": 6,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
}
FINCH = {
    **EAGLE,
    "architectures": ["Rwkv6ForCausalLM"],
    "model_type": "rwkv6",
    "model_version": "6_0",
}
CONFIGS = {"rwkv5": EAGLE, "rwkv6": FINCH}

CASES = {
    "rwkv5": EAGLE,
    "rwkv6": FINCH,
    "rwkv5, tied, one head, a stated width": EAGLE
    | {"hidden_size": 26, "attention_hidden_size": None, "head_size": 26}
    | {"num_attention_heads": None, "intermediate_size": 37, "tie_word_embeddings": True},
    "rwkv6, tied, one layer, heads of 3": FINCH
    | {"hidden_size": 21, "attention_hidden_size": 21, "head_size": 3}
    | {"num_attention_heads": 7, "num_hidden_layers": 1, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("case", CASES)
def test_one_pass_and_many_calls_give_the_logits_of_the_paper(case, tmp_path, traced):
    config = CASES[case]
    folder = rwkv_numpy.save(tmp_path, config)
    tokens = traced.tokens(40, VOCAB)
    expected = rwkv_numpy.logits(config, load_file(folder / "model.safetensors"), tokens)
    session = traced.session(traced.model(folder), 48)
    assert traced.difference(session.logits(tokens), expected) < 5e-6
    session.reset()
    parts = [tokens[:5], *np.split(tokens[5:20], 15), tokens[20:]]
    grown = np.concatenate([session.extend(part) for part in parts])
    assert traced.difference(grown, expected) < 5e-6
