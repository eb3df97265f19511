"""Tokenizers in the layouts that released models have, trained here on a text that ships.

Each is a folder with ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``, as
checkpoints have them. Only the sizes of the vocabularies are not those of the models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = Path(__file__).parents[2] / "edgeforge" / "demo" / "calibration.txt"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}"
)
LLAMA2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + "
    "'<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
BERT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} [SEP] {% endfor %}"


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        make: builds the tokenizer.
        template: the chat template.
        config: further fields of ``tokenizer_config.json``.
    """

    make: Callable[[], Tokenizer]
    template: str
    config: dict[str, Any] = field(default_factory=dict)


def texts() -> list[str]:
    return TEXT.read_text(encoding="utf-8").splitlines(keepends=True)[:600]


def byte_level(
    pre_tokenizer: Any, specials: list[str], *, normalizer: Any = None, ignore_merges: bool = False
) -> Tokenizer:
    """Byte-level BPE, as GPT-2's, with special tokens behind its vocabulary."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in specials])
    return tokenizer


def with_bos(tokenizer: Tokenizer, bos: str, *, bytes_too: bool = False) -> Tokenizer:
    """Puts a token in front of every text."""
    template = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    before = [processors.ByteLevel(trim_offsets=False)] if bytes_too else []
    tokenizer.post_processor = processors.Sequence([*before, template]) if before else template
    return tokenizer


def fallback(first: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE over words that begin with ``▁``, with a token per byte."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trained.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=500, show_progress=False, limit_alphabet=80)
    )
    model = json.loads(trained.to_str())["model"]
    names = [*first, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += sorted(model["vocab"], key=model["vocab"].get)
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return vocab, [tuple(pair) for pair in model["merges"]]


def sentencepiece_bpe(first: list[str]) -> Tokenizer:
    vocab, merges = fallback(first)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens([AddedToken(each, special=True) for each in first])
    return tokenizer


def stripped() -> Any:
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )


def gpt2() -> Tokenizer:
    return byte_level(
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )


def smollm2() -> Tokenizer:
    return byte_level(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )


def split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def llama3() -> Tokenizer:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    made = byte_level(split_then_bytes(LLAMA3_SPLIT), [*names, "<|eot_id|>"], ignore_merges=True)
    return with_bos(made, names[0], bytes_too=True)


def qwen2() -> Tokenizer:
    return byte_level(
        split_then_bytes(QWEN2_SPLIT),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        normalizer=normalizers.NFC(),
    )


def bos_of_the_post_processor() -> Tokenizer:
    made = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<s>", "</s>"])
    return with_bos(made, "<s>")


def bos_of_the_template() -> Tokenizer:
    return byte_level(split_then_bytes(QWEN2_SPLIT), ["<s>", "</s>", "<|im_start|>", "<|im_end|>"])


def llama2() -> Tokenizer:
    made = sentencepiece_bpe(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = stripped()
    return with_bos(made, "<s>")


def mistral() -> Tokenizer:
    made = sentencepiece_bpe(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = stripped()
    return with_bos(made, "<s>")


def phi3() -> Tokenizer:
    made = llama2()
    made.add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    for name in ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"):
        made.add_tokens([AddedToken(name, special=True, rstrip=True, normalized=False)])
    made.add_tokens([AddedToken("<mask>", lstrip=True, normalized=True)])
    made.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return made


def gemma() -> Tokenizer:
    made = sentencepiece_bpe(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return with_bos(made, "<bos>")


def wordpiece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        texts(),
        trainers.WordPieceTrainer(vocab_size=600, special_tokens=names, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


def unigram() -> Tokenizer:
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        texts(),
        trainers.UnigramTrainer(
            vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        ),
    )
    rows = json.loads(trained.to_str())["model"]["vocab"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = [*((name, 0.0) for name in names), *((n, p) for n, p in rows if n not in names)]
    made = Tokenizer(models.Unigram(vocab=vocab, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = stripped()
    made.add_special_tokens([AddedToken(each, special=True) for each in names[:3]])
    return with_bos(made, "<s>")


_CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_PLAIN = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(gpt2, CHATML, _CHATML),
    "smollm2-digits": Layout(smollm2, CHATML, _CHATML),
    "llama3": Layout(
        llama3, LLAMA3_TEMPLATE, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    ),
    "qwen2": Layout(qwen2, CHATML, {**_CHATML, "tokenizer_class": "Qwen2Tokenizer"}),
    "bos-of-the-post-processor": Layout(
        bos_of_the_post_processor, PLAIN_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}
    ),
    "bos-of-the-template": Layout(
        bos_of_the_template,
        "{{ bos_token }}" + CHATML,
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "add_bos_token": False},
    ),
    "llama2": Layout(llama2, LLAMA2_TEMPLATE, {**_PLAIN, "tokenizer_class": "LlamaTokenizer"}),
    "mistral": Layout(
        mistral, LLAMA2_TEMPLATE, {**_PLAIN, "tokenizer_class": "LlamaTokenizerFast"}
    ),
    "phi3-added": Layout(
        phi3,
        PHI3_TEMPLATE,
        {**_PLAIN, "tokenizer_class": "LlamaTokenizer", "pad_token": "<|endoftext|>"},
    ),
    "gemma": Layout(
        gemma,
        GEMMA_TEMPLATE,
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "tokenizer_class": "GemmaTokenizer",
        },
    ),
    "wordpiece": Layout(
        wordpiece, BERT_TEMPLATE, {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    ),
    "unigram": Layout(unigram, PLAIN_TEMPLATE, _PLAIN),
}


def write(name: str, folder: Path) -> Path:
    """Writes a layout's files into a new folder and returns it."""
    layout = LAYOUTS[name]
    folder.mkdir(parents=True)
    layout.make().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **layout.config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(layout.template, encoding="utf-8")
    return folder
