"""Makes ``tokenizer.json`` and the files beside it from a GGUF file's metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from edgeforge.checkpoint.gguf.header import Value
from edgeforge.checkpoint.gguf.pre_tokenizers import SPLITTINGS
from edgeforge.errors import CheckpointError
from quant.quoted import quoted

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
_SPACE: Final = "\u2581"
_OTHERWISE: Final = "name a tokenizer.json of the model with --tokenizer PATH"
# Characters that finding a vocabulary's merges may look at; one of 262,144 tokens takes 2 ** 25.
_MOST_CUTS: Final = 1 << 30
_ROLES: Final = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
# Tokens at which a turn or a text ends, besides `eos`: llama.cpp knows them by their texts too.
_ENDS: Final = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
    }
)
Json = dict[str, object]


class Vocabulary:
    """The tokenizer's fields of a GGUF file, checked.

    Args:
        fields: the file's metadata.
        rows: rows of the embedding, which a token's id must be under.
        where: the file, for messages.

    Raises:
        CheckpointError: a field is missing, damaged, or of a kind that EdgeForge does not read.
    """

    def __init__(self, fields: Mapping[str, Value], rows: int, where: str) -> None:
        self._fields, self._where = fields, where
        self.model = self._text("model")
        self.tokens = self._list("tokens", str)
        count = len(self.tokens)
        if count > rows:
            raise CheckpointError(
                f"{where} has {count} tokens and an embedding of {rows} rows: the file is damaged"
            )
        self.kinds = self._list("token_type", int, count) or [1] * count
        self._tell_damage(not self.tokens, "tokens")
        self.ids = {token: at for at, token in enumerate(self.tokens)}

    def flag(self, name: str, default: bool) -> bool:
        """Returns a boolean field."""
        value = self._fields.get(f"tokenizer.ggml.{name}", default)
        self._tell_damage(not isinstance(value, bool), name)
        return bool(value)

    def token(self, name: str) -> int | None:
        """Returns the id of a token with a role, such as ``eos``; None without one."""
        value = self._fields.get(f"tokenizer.ggml.{name}_token_id")
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool):
            if 0 <= value < len(self.tokens):
                return value
            # llama.cpp's "none" is the largest number of 32 bits.
            if value in (-1, 0xFFFFFFFF):
                return None
        raise CheckpointError(
            f"{self._where}: tokenizer.ggml.{name}_token_id is {quoted(value)}, and the file has "
            f"{len(self.tokens)} tokens"
        )

    def text_of(self, role: str) -> str | None:
        """Returns the text of a token with a role, None without one."""
        at = self.token(role)
        return None if at is None else self.tokens[at]

    def ends(self) -> list[int]:
        """Returns the tokens that end a text, ``eos`` first."""
        named = [self.token(role) for role in ("eos", "eot", "eom")]
        known = [at for text in sorted(_ENDS) if (at := self.ids.get(text)) is not None]
        also = [at for at in known if self.kinds[at] in (_CONTROL, _USER)]
        return list(dict.fromkeys(at for at in (*named, *also) if at is not None))

    def merges(self) -> list[str]:
        """Returns the merges of a byte-level vocabulary, the first that applies first."""
        found = self._list("merges", str)
        for merge in found:
            left, gap, right = merge.partition(" ")
            known = gap and left in self.ids and right in self.ids and left + right in self.ids
            if not known:
                raise CheckpointError(
                    f"{self._where}: {quoted(merge)} in tokenizer.ggml.merges is no pair of tokens "
                    f"that make a third: the file is damaged"
                )
        self._tell_damage(not found, "merges")
        return found

    def scores(self) -> list[float]:
        """Returns a score for each token."""
        found = self._list("scores", float, len(self.tokens))
        self._tell_damage(not found, "scores")
        return found

    def splitting(self) -> str:
        """Returns the name of how text is split."""
        return self._text("pre")

    def _text(self, name: str) -> str:
        value = self._fields.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, str):
            raise CheckpointError(
                f"{self._where} has no tokenizer.ggml.{name}, without which its tokenizer is not "
                f"known: {_OTHERWISE}"
            )
        return value

    def _list(self, name: str, kind: type, count: int | None = None) -> list[Any]:
        value = self._fields.get(f"tokenizer.ggml.{name}")
        if value is None:
            return []
        sound = isinstance(value, list) and all(type(each) is kind for each in value)
        self._tell_damage(not sound, name)
        assert isinstance(value, list)
        self._tell_damage(count is not None and len(value) != count, name)
        return value

    def _tell_damage(self, damaged: bool, name: str) -> None:
        if damaged:
            raise CheckpointError(
                f"{self._where}: tokenizer.ggml.{name} is missing or damaged: download the file "
                f"again, or {_OTHERWISE}"
            )


def tokenizer_files(
    fields: Mapping[str, Value], rows: int, context: int, gemma: bool, where: str
) -> dict[str, Json]:
    """Returns ``tokenizer.json`` and ``tokenizer_config.json`` as JSON values, by name.

    Args:
        fields: the file's metadata.
        rows: rows of the embedding.
        context: the model's context, tokens.
        gemma: whether merges follow the order of the tokens, as in Gemma's vocabularies, whose
            scores do not say it.
        where: the file, for messages.

    Raises:
        CheckpointError: the vocabulary is damaged, or of a kind that EdgeForge does not read.
    """
    vocabulary = Vocabulary(fields, rows, where)
    makers: dict[str, Callable[[], Json]] = {
        "gpt2": lambda: _byte_level(vocabulary, where),
        "llama": lambda: _sentence_pieces(vocabulary, gemma, where),
    }
    if vocabulary.model not in makers:
        raise CheckpointError(
            f"{where} has a tokenizer of the model {quoted(vocabulary.model)}; EdgeForge reads "
            f"those of {' and '.join(makers)}: {_OTHERWISE}"
        )
    made = makers[vocabulary.model]()
    splitting = SPLITTINGS.get(str(fields.get("tokenizer.ggml.pre")))
    begins = vocabulary.model == "llama" or (splitting is not None and splitting.begins)
    begins = vocabulary.flag("add_bos_token", begins)
    made["post_processor"] = _around(
        vocabulary, begins, ends=vocabulary.flag("add_eos_token", False)
    )
    config: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "add_bos_token": begins,
    }
    for name, role in _ROLES.items():
        text = vocabulary.text_of(role)
        if text is not None:
            config[f"{name}_token"] = text
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    return {"tokenizer.json": made, "tokenizer_config.json": config}


def _byte_level(vocabulary: Vocabulary, where: str) -> Json:
    name = vocabulary.splitting()
    splitting = SPLITTINGS.get(name)
    if splitting is None:
        raise CheckpointError(
            f"{where} splits text as {quoted(name)} (tokenizer.ggml.pre) before it merges bytes; "
            f"EdgeForge knows {', '.join(SPLITTINGS)}: {_OTHERWISE}"
        )
    level: Json = {
        "type": "ByteLevel",
        "add_prefix_space": vocabulary.flag("add_space_prefix", False),
        "trim_offsets": True,
        "use_regex": splitting.pattern is None,
    }
    steps: list[Json] = []
    if splitting.single_digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if splitting.pattern is not None:
        pattern = {"Regex": splitting.pattern}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    steps.append(level)
    return _whole(
        vocabulary,
        normalizer={"type": "NFC"} if splitting.composed else None,
        pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        decoder={**level, "add_prefix_space": True, "use_regex": True},
        vocab=vocabulary.ids,
        merges=vocabulary.merges(),
        unknown=None,
        ignore_merges=splitting.whole_words,
    )


def _sentence_pieces(vocabulary: Vocabulary, gemma: bool, where: str) -> Json:
    # Some tokens of several spaces are stored as spaces, and their merges are of the mark.
    tokens = [
        _SPACE * len(token) if token and not token.strip(" ") else token
        for token in vocabulary.tokens
    ]
    if sum(len(token) ** 2 for token in tokens) > _MOST_CUTS:
        raise CheckpointError(
            f"{where} has tokens of up to {max(map(len, tokens))} characters: the file is damaged, "
            f"or {_OTHERWISE}"
        )
    ids = {token: at for at, token in enumerate(tokens)}
    ranks = [-float(at) for at in range(len(tokens))] if gemma else vocabulary.scores()
    apart = {
        token
        for token, kind in zip(tokens, vocabulary.kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _BYTE)
    }
    # A piece that begins with white space in the vocabulary says that texts get a space in front.
    prefix = vocabulary.flag("add_space_prefix", True)
    replace: Json = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    begin: Json = {"type": "Prepend", "prepend": _SPACE}
    back: Json = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    decoders: list[Json] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _whole(
        vocabulary,
        normalizer={"type": "Sequence", "normalizers": [begin, replace]} if prefix else replace,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        vocab=ids,
        merges=_merges_of(tokens, ids, ranks, apart),
        unknown=vocabulary.text_of("unknown"),
        ignore_merges=False,
        marked=not prefix,
    )


def _merges_of(
    tokens: list[str], ids: Mapping[str, int], ranks: list[float], apart: set[str]
) -> list[str]:
    """Returns the merges that a vocabulary with scores stands for, the best token first.

    SentencePiece merges the pair whose token has the highest score, so that every way to cut a
    token into two tokens is a merge of the token's rank.
    """
    found: list[tuple[float, int, int, str]] = []
    for token, rank in zip(tokens, ranks, strict=True):
        if token in apart:
            continue
        cuts = (
            (token[:at], token[at:])
            for at in range(1, len(token))
            if token[:at] in ids and token[at:] in ids
        )
        pairs = [pair for pair in cuts if not apart & set(pair)]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(rank, len(left), len(right), f"{left} {right}") for left, right in pairs]
    found.sort(key=lambda each: each[:3], reverse=True)
    return [merge for *_, merge in found]


def _whole(
    vocabulary: Vocabulary,
    *,
    normalizer: Json | None,
    pre_tokenizer: Json | None,
    decoder: Json,
    vocab: Mapping[str, int],
    merges: list[str],
    unknown: str | None,
    ignore_merges: bool,
    marked: bool = False,
) -> Json:
    pieces = vocabulary.model == "llama"
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary, marked),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": pieces,
            "byte_fallback": pieces,
            "ignore_merges": ignore_merges,
            "vocab": dict(vocab),
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def _added_tokens(vocabulary: Vocabulary, marked: bool) -> list[Json]:
    """Returns the tokens that are found in a text before all others.

    Args:
        vocabulary: the vocabulary.
        marked: whether runs of spaces are found as such tokens, by their marks, once the text has
            these for spaces. A vocabulary that puts a space in front of every text has them as
            tokens like others.
    """
    found: list[Json] = []
    for at, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        spaces = vocabulary.model == "llama" and not token.strip(" ")
        if kind not in (_CONTROL, _USER) or not token or (spaces and not marked):
            continue
        found.append(
            {
                "id": at,
                "content": _SPACE * len(token) if spaces else token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": spaces,
                "special": kind == _CONTROL,
            }
        )
    return found


def _around(vocabulary: Vocabulary, begins: bool, ends: bool) -> Json | None:
    """Returns what adds ``bos`` and ``eos`` to a text; None where nothing is added."""
    used = [
        (name, text)
        for name, wanted in (("bos", begins), ("eos", ends))
        if wanted and (text := vocabulary.text_of(name)) is not None
    ]
    if not used:
        return None
    special = {
        text: {"id": text, "ids": [vocabulary.ids[text]], "tokens": [text]} for _, text in used
    }
    front = [{"SpecialToken": {"id": t, "type_id": 0}} for n, t in used if n == "bos"]
    behind = [{"SpecialToken": {"id": t, "type_id": 0}} for n, t in used if n == "eos"]
    second = [{"SpecialToken": {"id": t, "type_id": 1}} for n, t in used if n == "bos"]
    return {
        "type": "TemplateProcessing",
        "single": [*front, {"Sequence": {"id": "A", "type_id": 0}}, *behind],
        "pair": [
            *front,
            {"Sequence": {"id": "A", "type_id": 0}},
            *behind,
            *second,
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": special,
    }


def as_text(content: object) -> str:
    """Returns JSON text; bytes of a token that are no character make the file damaged.

    Raises:
        UnicodeEncodeError: such bytes are in it.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    text.encode("utf-8")
    return text
