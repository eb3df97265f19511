"""How byte-level vocabularies split text before merging, by ``tokenizer.ggml.pre``.

The expressions are those of the models' own ``tokenizer.json``; llama.cpp names one kind after the
first model that had it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_LLAMA3: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2: Final = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_WORDS: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{ends}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{ends}"
    r"|{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = _WORDS.replace("{ends}", "").replace("{digits}", r"\p{N}")
_GPT4O: Final = _WORDS.replace("{ends}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace(
    "{digits}", r"\p{N}{1,3}"
)


@dataclass(frozen=True)
class Splitting:
    """How a vocabulary splits text.

    Attributes:
        pattern: the expression; None for GPT-2's, which the library knows.
        single_digits: whether each digit stands alone before that.
        whole_words: whether a piece that is a token is that token, whatever its merges.
        composed: whether text is brought into Unicode's form C first.
        begins: whether a text begins with ``bos`` where the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    composed: bool = False
    begins: bool = False


_GPT2 = Splitting()
_DIGITS = Splitting(single_digits=True)
_OF_LLAMA3 = Splitting(_LLAMA3, whole_words=True, begins=True)
_OF_QWEN2 = Splitting(_QWEN2, composed=True)

SPLITTINGS: Final[dict[str, Splitting]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "pixtral"), _OF_LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "megrez"), _OF_QWEN2),
    "stablelm2": Splitting(_QWEN2),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "olmo", "gigachat", "exaone4"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    "tekken": Splitting(_TEKKEN, whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Splitting(_GPT4O)),
}
