"""Tokenizers from GGUF metadata, against the tokenizers from which the metadata was written.

Those are trained here: byte-level ones by the tokenizers library, with the expressions that
transformers keeps for llama.cpp's names, and a SentencePiece model by SentencePiece itself.
"""

import io
import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from edgeforge.chat.template import find_template
from edgeforge.checkpoint.checkpoint import Checkpoint
from edgeforge.model.model import CALIBRATION_TEXT

LLAMA = {
    "model_type": "llama",
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SPECIAL = ["<|begin|>", "<|im_end|>", "<|pad|>"]
TEXTS = (
    "Hello world, it's 12345 o'clock.",
    "  two  spaces\n\n\tand tabs   ",
    "naïve café — ﬁancé ½ 東京 🙂 I'LL they'Re",
    "<|begin|>user<|im_end|> text <|im_end|>\n",
    "def f(x):\n    return x**2  # 3.14\r\n",
    "",
)
DIGITS = ("smollm", "starcoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, hugging_face):
    return hugging_face.save(tmp_path_factory.mktemp("gguf") / "model", LLAMA)


@pytest.fixture(scope="module")
def text():
    return CALIBRATION_TEXT.read_text(encoding="utf-8")[:40_000].splitlines(keepends=True)


@pytest.fixture
def opened(folder, tmp_path, gguf_files):
    """Opens a file that has these fields of a tokenizer."""

    def opened(fields):
        gguf_files.write(folder, tmp_path / "model.gguf", tokenizer=fields)
        return Checkpoint.open(tmp_path / "model.gguf")

    return opened


def library(checkpoint):
    return Tokenizer.from_file(str(checkpoint.tokenizer_files["tokenizer.json"]))


def byte_level(pre, text):
    """A tokenizer that splits as llama.cpp's ``pre`` says, trained on a text."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    made = Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken")))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in GGUF_PRE_TOKENIZER_SPLITS:
        split = Regex(GGUF_PRE_TOKENIZER_SPLITS[pre])
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        steps = [pre_tokenizers.Split(split, "isolated"), level]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif pre in DIGITS:
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), plain]
        )
    else:
        made.pre_tokenizer = plain
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=690,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(text, trainer)
    return made


def fields_of(tokenizer, pre):
    """The fields that llama.cpp's converter writes of a byte-level tokenizer."""
    stored = json.loads(tokenizer.to_str())
    vocab = sorted(stored["model"]["vocab"].items(), key=lambda each: each[1])
    tokens = [token for token, _ in vocab]
    padding = [f"[PAD{at}]" for at in range(len(tokens), LLAMA["vocab_size"])]
    kinds = [3 if token in SPECIAL else 1 for token in tokens] + [5] * len(padding)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens + padding,
        "ggml.token_type": kinds,
        "ggml.merges": [" ".join(pair) for pair in stored["model"]["merges"]],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.padding_token_id": 2,
        "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }


@pytest.mark.parametrize(
    "pre", ["gpt-2", "smollm", "starcoder", "llama-bpe", "qwen2", "tekken", "gpt-4o", "dbrx"]
)
def test_byte_level_tokenizers(pre, text, opened):
    original = byte_level(pre, text)
    checkpoint = opened({**fields_of(original, pre), "ggml.add_bos_token": False})
    ours = library(checkpoint)
    for each in TEXTS:
        ids = original.encode(each).ids
        assert ours.encode(each).ids == ids
        for special in (False, True):
            assert ours.decode(ids, skip_special_tokens=special) == original.decode(
                ids, skip_special_tokens=special
            )
    assert len(original.encode(TEXTS[0]).ids) < len(TEXTS[0])  # merges were learnt, and apply
    template = find_template(checkpoint.tokenizer_files)
    assert template is not None and "messages" in template.text


@pytest.mark.parametrize(
    ("pre", "changes", "front", "behind"),
    [
        ("gpt-2", {}, [], []),
        ("llama-bpe", {}, [0], []),
        ("gpt-2", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, [0], [1]),
        ("llama-bpe", {"ggml.add_bos_token": False}, [], []),
    ],
)
def test_what_is_added_to_a_text(pre, changes, front, behind, text, opened):
    original = byte_level(pre, text[:50])
    ours = library(opened({**fields_of(original, pre), **changes}))
    plain = original.encode("some text").ids
    assert ours.encode("some text").ids == [*front, *plain, *behind]
    assert ours.encode("some text", add_special_tokens=False).ids == plain


def test_every_token_that_ends_a_turn_is_known(text, opened):
    original = byte_level("gpt-2", text[:50])
    fields = fields_of(original, "gpt-2") | {"ggml.eos_token_id": 2, "ggml.eot_token_id": 0}
    checkpoint = opened(fields)
    # The third is known by its text.
    assert checkpoint.generation_config["eos_token_id"] == [2, 0, 1]
    assert checkpoint.config["bos_token_id"] == 0


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_pieces(prefix, text, opened):
    import sentencepiece

    own = ["<turn>"] if prefix else ["<turn>", "\n\n", "▁▁", "▁▁▁▁"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=690,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        user_defined_symbols=own,
        minloglevel=2,
    )
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    count = original.get_piece_size()

    def kind(at):
        found = {original.is_unknown: 2, original.is_control: 3, original.is_byte: 6}
        named = next((number for test, number in found.items() if test(at)), 1)
        return 4 if original.id_to_piece(at) in own else named

    pieces = [original.id_to_piece(at) for at in range(count)]
    # The converter writes tokens of spaces as spaces.
    tokens = [" " * len(p) if p in own and not p.strip("▁") else p for p in pieces]
    padding = LLAMA["vocab_size"] - count
    checkpoint = opened(
        {
            "ggml.model": "llama",
            "ggml.pre": "default",
            "ggml.tokens": tokens + [f"[PAD{at}]" for at in range(padding)],
            "ggml.scores": [original.get_score(at) for at in range(count)] + [-1000.0] * padding,
            "ggml.token_type": [kind(at) for at in range(count)] + [5] * padding,
            "ggml.bos_token_id": 1,
            "ggml.eos_token_id": 2,
            "ggml.unknown_token_id": 0,
            "ggml.add_space_prefix": prefix,
        }
    )
    ours = library(checkpoint)
    for each in (*TEXTS[:3], *TEXTS[4:], "a long    run of spaces"):
        if not each:
            continue
        ids = original.encode(each)
        assert ours.encode(each).ids == [1, *ids], each
        assert ours.decode(ids) == original.decode(ids)
    turn = tokens.index("<turn>")
    assert turn in ours.encode("before<turn>after").ids
