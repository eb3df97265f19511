"""The tokenizer's files for ExecuTorch's LLM runner, which reads ``tokenizer.json`` alone.

Its library, pytorch_tokenizers, knows fewer steps than the tokenizers library and does some of them
otherwise. Where another file gives the same tokens there, it is written beside the checkpoint's
own, as `RUNNER_TOKENIZER`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporters.tokenizer_files import (
    CONFIG,
    TOKENIZER,
    added_with,
    chat_template,
    copy_files,
    kinds,
    model_kind,
    read,
    steps,
    told_of_added_tokens,
    write,
)

RUNNER_TOKENIZER: Final = "executorch_tokenizer.json"
"""The file that the runner must be given in place of ``tokenizer.json``, where it is there."""
_KNOWN: Final[Mapping[str, frozenset[str]]] = {
    "normalizer": frozenset({"Prepend", "Replace"}),
    "pre_tokenizer": frozenset({"Split", "Digits", "ByteLevel"}),
    "post_processor": frozenset({"TemplateProcessing", "ByteLevel"}),
    "decoder": frozenset({"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip"}),
}
_BEHAVIOURS: Final = frozenset({"Removed", "Isolated", "MergedWithPrevious"})
_SPACE: Final = "▁"
# Tokens at the ends of a text, and such as stand for others.
_AROUND: Final = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_tokenizer(files: Mapping[str, Path], folder: Path) -> tuple[str, ...]:
    """Copies the tokenizer's files, and writes one for the runner where it needs another.

    Returns:
        What the runner reads otherwise than transformers, one sentence each.
    """
    copy_files(files, folder)
    if TOKENIZER not in files:
        return ()
    tokenizer = read(files, TOKENIZER)
    is_chat = chat_template(files) is not None
    adapted, told = for_runner(tokenizer, read(files, CONFIG), is_chat=is_chat)
    if adapted != tokenizer:
        write(adapted, folder / RUNNER_TOKENIZER)
    return told


def for_runner(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any], *, is_chat: bool
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Returns a tokenizer as the runner must read it, and what it still does otherwise.

    Each was found with pytorch_tokenizers 1.5.

    Args:
        tokenizer: the content of ``tokenizer.json``; it stays as it is.
        config: the content of ``tokenizer_config.json``.
        is_chat: whether the model has a chat template: where conversations and plain texts cannot
            both be right, conversations are.
    """
    made, told = dict(tokenizer), []
    if "NFC" in kinds(made.get("normalizer")):
        rest = [step for step in steps(made["normalizer"]) if step["type"] != "NFC"]
        made["normalizer"] = _sequence("normalizers", rest)
        told.append(
            f"ExecuTorch's tokenizer loses accents where it normalizes to NFC, so it is given "
            f"{RUNNER_TOKENIZER}, which does not: a text that is not in NFC gets other tokens there"
        )
    # The runner decodes token by token, and this step would take the space of every word.
    decoding = [step for step in steps(made.get("decoder")) if step.get("type") != "Strip"]
    if len(decoding) < len(list(steps(made.get("decoder")))):
        made["decoder"] = _sequence("decoders", decoding)
    told += _without_metaspace(made, is_chat)
    # Before a space is put in front of a text, as the tokenizer does.
    flags = ["lstrip", "single_word"]
    if added_with(made, "rstrip"):
        if is_chat and _all_strip(made, config):
            told += _strip_texts(made)
        else:
            flags.append("rstrip")
    told += told_of_added_tokens("ExecuTorch's tokenizer", tokenizer, *flags)
    unknown = _unknown(made)
    if unknown:
        return tokenizer, (
            f"ExecuTorch's runner cannot load this tokenizer, for it does not know {unknown}: give "
            f"it tokens that your app makes (`edgeforge run` and `verify` are not concerned)",
        )
    return made, tuple(told)


def _without_metaspace(made: dict[str, Any], is_chat: bool) -> list[str]:
    """Replaces the pre-tokenizer and decoder of spaces by steps that the runner knows."""
    if kinds(made.get("decoder")) == ["Metaspace"]:
        # What is generated follows a prompt, so its first space is part of it.
        made["decoder"] = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    found = list(steps(made.get("pre_tokenizer")))
    if model_kind(made) != "BPE" or [step.get("type") for step in found] != ["Metaspace"]:
        return []
    scheme = found[0].get("prepend_scheme", "always")
    prepends = scheme == "always" or (scheme == "first" and not is_chat)
    before = list(steps(made.get("normalizer")))
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prepends else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    made["normalizer"] = _sequence("normalizers", [*before, *prepend, replace])
    made["pre_tokenizer"] = None
    told = []
    if scheme == "first":
        where = "text behind a special token gets one too" if prepends else "no text gets one"
        told.append(
            f"ExecuTorch's tokenizer cannot put a space at the beginning of a text alone, so with "
            f"{RUNNER_TOKENIZER} {where}: "
            + ("conversations" if prepends else "texts that begin with no special token")
            + " get other tokens there"
        )
    return told


def _all_strip(made: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Tells whether all special tokens of conversations take the spaces behind them."""
    around = {
        value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name in _AROUND
    }
    rows = [row for row in made["added_tokens"] if row.get("special")]
    return all(row.get("rstrip") for row in rows if row.get("content") not in around)


def _strip_texts(made: dict[str, Any]) -> list[str]:
    """Drops the spaces at the beginning of every text, for the tokens that take them."""
    strip = {"type": "Replace", "pattern": {"Regex": "^\\s+"}, "content": ""}
    made["normalizer"] = _sequence("normalizers", [strip, *steps(made.get("normalizer"))])
    return [
        f"ExecuTorch's tokenizer has no tokens that drop the spaces behind them, so with "
        f"{RUNNER_TOKENIZER} spaces are dropped at the beginning of every text and behind every "
        f"special token: a plain text that begins with spaces gets other tokens there"
    ]


def _unknown(made: Mapping[str, Any]) -> str:
    """What the runner's library does not load, such as ``the model Unigram``; empty for nothing."""
    if model_kind(made) != "BPE":
        return f"the model {model_kind(made)}"
    for part, known in _KNOWN.items():
        for step in steps(made.get(part)):
            if step.get("type") not in known:
                return f"the {part.replace('_', '-')} {step.get('type')}"
            if step.get("type") == "Split" and (
                _plain(step.get("behavior")) not in map(_plain, _BEHAVIOURS) or step.get("invert")
            ):
                return f"the pre-tokenizer Split with {step.get('behavior')}"
    return ""


def _plain(behaviour: object) -> str:
    return str(behaviour).replace("_", "").lower()


def _sequence(name: str, found: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(found) < 2:
        return found[0] if found else None
    return {"type": "Sequence", name: found}
