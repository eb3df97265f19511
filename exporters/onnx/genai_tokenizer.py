"""The tokenizer's files as onnxruntime-genai reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporters.tokenizer_files import (
    CONFIG,
    TOKENIZER,
    chat_template,
    copy_files,
    is_byte_level,
    kinds,
    model_kind,
    read,
    steps,
    told_of_added_tokens,
    write,
)

# Normalizers that it applies to tokenizers that are not of bytes.
_NORMALIZERS: Final = frozenset({"Prepend", "Replace", "Precompiled"})
# Patterns of GPT-2, Llama 3, Qwen2, GPT-4o, Mistral's Tekken and Qwen3.5, on which it was compared.
_WORD: Final = r"[^\r\n\p{L}\p{N}]?"
_ENDS: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS: Final = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        *(
            rf"{_SHORT}|{_WORD}\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_ENDS}"
            for digits in (r"\p{N}", r"\p{N}{1,3}")
        ),
        rf"{_SHORT}|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_ENDS}",
        *(
            rf"{_WORD}{_UPPER}*{_LOWER}+{end}|{_WORD}{_UPPER}+{_LOWER}*{end}|{digits}"
            rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_ENDS}"
            for end, digits in ((f"{_SHORT}?", r"\p{N}{1,3}"), ("", r"\p{N}"))
        ),
    }
)


def write_tokenizer(files: Mapping[str, Path], folder: Path) -> tuple[str, ...]:
    """Copies the tokenizer's files and states the tokenizer's class for onnxruntime-genai.

    Some byte-level tokenizers state Llama's class, for which onnxruntime-genai splits text by
    another pattern; so the class becomes ``PreTrainedTokenizerFast``, and ``T5Tokenizer`` for a
    Unigram model, which onnxruntime-genai opens under few names. Where the checkpoint has no
    ``tokenizer_config.json``, one is written, because onnxruntime-genai does not load a tokenizer
    without it. ``add_bos_token`` and ``add_eos_token`` are left out: onnxruntime-genai would follow
    them against the post-processor of ``tokenizer.json``, which alone counts in transformers.

    Returns:
        What onnxruntime-genai reads otherwise than transformers, one sentence each.
    """
    copy_files(files, folder)
    if TOKENIZER not in files:
        return ()
    tokenizer, config = read(files, TOKENIZER), read(files, CONFIG)
    if is_byte_level(tokenizer):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    elif model_kind(tokenizer) == "Unigram":
        config["tokenizer_class"] = "T5Tokenizer"
    for name in ("add_bos_token", "add_eos_token"):
        config.pop(name, None)
    write(config, folder / CONFIG)
    return differences(tokenizer, is_chat=chat_template(files) is not None)


def differences(tokenizer: Mapping[str, Any], *, is_chat: bool) -> tuple[str, ...]:
    """Returns what onnxruntime-genai reads otherwise than transformers, one sentence each.

    Each was found with onnxruntime-genai 0.18, and nothing that it reads could change it.

    Args:
        tokenizer: the content of ``tokenizer.json``.
        is_chat: whether the model has a chat template.
    """
    kind = model_kind(tokenizer)
    if kind not in ("BPE", "Unigram"):
        return (
            f"onnxruntime-genai has no {kind} tokenizers: give it tokens that your app makes "
            f"(`edgeforge run` and `verify` are not concerned)",
        )
    told = []
    applied = _NORMALIZERS if kind == "Unigram" or not is_byte_level(tokenizer) else frozenset()
    ignored = [each for each in kinds(tokenizer.get("normalizer")) if each not in applied]
    if ignored:
        told.append(
            f"onnxruntime-genai does not normalize text by {', '.join(ignored)}, as the tokenizer "
            f"does: a text that this would change gets other tokens there"
        )
    before = list(steps(tokenizer.get("pre_tokenizer")))
    if kind == "BPE" and any(_puts_space_once(step) for step in before):
        told.append(
            "onnxruntime-genai puts a space in front of text behind a special token too, where the "
            "tokenizer puts one only at the beginning: conversations get more tokens there"
        )
    if kind == "Unigram" and (tokenizer.get("model") or {}).get("byte_fallback"):
        told.append(
            "onnxruntime-genai gives the unknown token for characters that are not in a Unigram "
            "vocabulary, where the tokenizer gives their bytes"
        )
    told += told_of_added_tokens("onnxruntime-genai", tokenizer, "lstrip", "single_word")
    if kind == "Unigram" and is_chat:
        told.append(
            "onnxruntime-genai finds no chat template beside a Unigram tokenizer: give "
            "`apply_chat_template` the template's text as `template_str`"
        )
    others = [step for step in before if _is_unknown_split(step)]
    if others:
        told.append(
            "onnxruntime-genai was not compared on the pattern by which this tokenizer splits "
            "text: compare its tokens with those of `edgeforge run --json` before you ship"
        )
    return tuple(told)


def _puts_space_once(step: Mapping[str, Any]) -> bool:
    return step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first"


def _is_unknown_split(step: Mapping[str, Any]) -> bool:
    pattern = step.get("pattern") or {}
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return step.get("type") == "Split" and regex is not None and regex not in PATTERNS
