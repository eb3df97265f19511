"""RWKV 5 and 6 against NumPy written from the paper, and what a folder may not say."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeforge.checkpoint.gguf.architectures import find_architecture
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.export_options import check_caches, check_drafts
from edgeforge.families.facts import choose_context, facts_of
from edgeforge.families.registry import read_spec
from exporters.options import TargetOptions
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(family, tmp_path, traced):
    folder = rwkv_numpy.save(tmp_path, CONFIGS[family])
    file, name = folder / "model.safetensors", "rwkv.blocks.1.attention.time_faaaa"
    tensors = load_file(file)
    for changed, words in (
        ({name: np.zeros((6, 10), np.float32)}, f"{name} .*6, 10"),
        ({name: None}, name),
        ({"rwkv.blocks.0.attention.time_state": np.zeros(4, np.float32)}, "time_state"),
    ):
        kept = {n: t for n, t in {**tensors, **changed}.items() if t is not None}
        save_file(kept, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=words) as caught:
            traced.model(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_version": "5_0"}, "sets model_version to '5_0'; EdgeForge implements"),
        ({"rwkv_version": "7"}, "sets rwkv_version to '7'"),
        ({"head_size": 7, "num_attention_heads": None}, "heads of 7 columns .* do not divide"),
        ({"num_attention_heads": 9}, "num_attention_heads is 9, but .* make 5 heads"),
        ({"attention_hidden_size": 120}, "'attention_hidden_size' to 120"),
        ({"layer_norm_epsilon": 1e-3}, "'layer_norm_epsilon' to 0.001"),
        ({"head_size_divisor": 4}, "'head_size_divisor' to 4"),
        ({"expand_k": 0.5}, "'expand_k' to 0.5"),  # flash-linear-attention's own RWKV 6
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"intermediate_size": -1}, "intermediate_size is -1"),
    ],
)
def test_what_a_configuration_may_not_say(family, changes, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_spec(CONFIGS[family] | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_configuration_may_leave_out_or_say_otherwise(family):
    spec = read_spec(CONFIGS[family])
    layer = spec.layers[0]
    assert layer.ffn_width == 192  # 3.5 times 60, of which a multiple of 32 is kept
    assert (spec.bos, spec.eos, spec.max_context, spec.ropes) == (0, (0,), 4096, ())
    for changes in (
        {"num_attention_heads": 5},  # the heads, not their width
        {"head_size": None},  # then it is called num_attention_heads
        {"rescale_every": 0, "model_version": None, "bos_token_id": None, "eos_token_id": None},
    ):
        assert read_spec(CONFIGS[family] | changes) == spec
    wide = {"hidden_size": 128, "attention_hidden_size": None, "head_size": None}
    made = read_spec(CONFIGS[family] | wide | {"num_attention_heads": None}).layers[0].recurrence
    assert (made.heads, made.key_width) == (2, 64)
    assert read_spec(CONFIGS[family] | {"max_position_embeddings": 512}).max_context == 512


def test_a_text_may_be_longer_than_those_of_the_training():
    spec = read_spec(EAGLE | {"context_length": 512})
    assert choose_context(spec, None) == 512
    assert choose_context(spec, 100_000) == 100_000
    with pytest.raises(UsageError, match="takes 2 to 1048576 tokens"):
        choose_context(spec, 2_000_000)
    facts = [facts_of(spec, context) for context in (512, 100_000)]
    assert {fact.memory for fact in facts} == {3 * 5 * 12 * 12}
    assert {fact.recent for fact in facts} == {3 * 2 * 60}
    assert {(sum(fact.num_kv_heads), fact.rope_width) for fact in facts} == {(0, 0)}


def test_integer_caches_and_drafts_are_refused_where_there_are_none():
    spec = read_spec(FINCH)
    check_caches(spec, TargetOptions(kv_cache="fp32"))
    with pytest.raises(UsageError, match="--kv-cache int8 is not possible: no layer of this rwkv6"):
        check_caches(spec, TargetOptions(kv_cache="int8"))
    with pytest.raises(UsageError, match="--draft-positions is not possible: layers of this rwkv6"):
        check_drafts(spec, TargetOptions(draft_positions=4))


@pytest.mark.parametrize("family", ["rwkv6", "rwkv7"])
def test_files_of_llama_cpp_are_refused_by_name(family):
    with pytest.raises(CheckpointError, match=f"has the general.architecture '{family}'"):
        find_architecture(family, "model.gguf")
