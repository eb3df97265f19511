"""A ``tokenizer.json`` for a checkpoint whose tokenizer is RWKV's World vocabulary alone.

A line of ``rwkv_vocab_v20230424.txt`` is ``id literal length``: a token's id, its bytes or text as
Python writes them, and how many bytes it has. A line of ``vocab.txt``, which other releases have,
is the literal alone, and the id is the line's number from 0. The tokenizer takes, byte after byte,
the longest token that fits.

``tokenizer.json`` does the same with a regular expression of the tokens' trie: at each place it
has one way to go, so it takes time in proportion to the text.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from edgeforge.cache import read_record, writable_cache, write_record
from edgeforge.checkpoint.json_text import MAX_INDEX_BYTES, parse_object, read_small_file
from edgeforge.errors import CheckpointError
from quant.quoted import quoted

NUMBERED: Final = "rwkv_vocab_v20230424.txt"
PLAIN: Final = "vocab.txt"
END_OF_TEXT: Final = "<|rwkv_tokenizer_end_of_text|>"
"""The text of token 0 where the folder states no other; it stands in no vocabulary file."""

_VERSION: Final = 1  # of what is made; another one makes it anew
_LITERAL: Final = r"""b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_NUMBERED_LINE: Final = re.compile(rf"(\d{{1,9}}) ({_LITERAL}) (\d{{1,6}})", re.ASCII)
_PLAIN_LINE: Final = re.compile(_LITERAL)
_LONGEST: Final = 512  # bytes of a token; the trie is as deep. The releases' longest has 128.
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")
_HOW: Final = "download it again, or give a folder that has tokenizer.json with --tokenizer"

Trie = dict[int, Any]
"""The tries of what follows, by the next byte; `_END` is there where a token ends."""
_END: Final = -1


def find_vocabulary(files: Mapping[str, Path]) -> Path | None:
    """Returns the World vocabulary among a tokenizer's files, None where there is none.

    ``vocab.txt`` is one if its lines are Python's literals; others have files of that name too.
    """
    if NUMBERED in files:
        return files[NUMBERED]
    if PLAIN not in files:
        return None
    try:
        with files[PLAIN].open(encoding="utf-8") as file:
            first = [file.readline(4 * _LONGEST).rstrip("\r\n") for _ in range(3)]
    except (OSError, UnicodeDecodeError):
        return None
    return files[PLAIN] if all(map(_PLAIN_LINE.fullmatch, first[1:])) else None


def tokenizer_of_vocabulary(files: Mapping[str, Path], vocabulary: Path) -> Path:
    """Returns the ``tokenizer.json`` of a World vocabulary, from the cache or made now.

    Args:
        files: the tokenizer's files by the names that they have in a checkpoint.
        vocabulary: the vocabulary's file.

    Raises:
        CheckpointError: a line is damaged, a byte has no token, or an added token does not fit.
    """
    content = read_small_file(vocabulary, MAX_INDEX_BYTES)
    config: dict[str, object] = {}
    if "tokenizer_config.json" in files:
        path = files["tokenizer_config.json"]
        config = parse_object(read_small_file(path, MAX_INDEX_BYTES), str(path), strict=False)
    added = _added(config)
    named = [hashlib.sha256(content).hexdigest(), vocabulary.name, added, _VERSION]
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    folder = writable_cache() / "tokenizers"
    made, record = folder / digest / "tokenizer.json", folder / f"{digest}.json"
    known = (read_record(record) or {}).get("tokenizer")
    if made.is_file() and hashlib.sha256(made.read_bytes()).hexdigest() == known:
        return made
    tokens = read_vocabulary(content, vocabulary)
    text = json.dumps(_tokenizer(tokens, added, vocabulary), ensure_ascii=False).encode()
    made.parent.mkdir(parents=True, exist_ok=True)
    partial = made.with_name(f".{made.name}.partial")
    partial.write_bytes(text)
    partial.replace(made)
    write_record(record, {"tokenizer": hashlib.sha256(text).hexdigest()})
    return made


def read_vocabulary(content: bytes, file: Path) -> dict[bytes, int]:
    """Returns the ids of a vocabulary's tokens by their bytes.

    Args:
        content: what the file holds.
        file: the file, for messages; its name decides which of the two forms it has.

    Raises:
        CheckpointError: a line is damaged, a token occurs twice, or a byte has no token.
    """
    try:
        lines = content.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise CheckpointError(f"{file} is not UTF-8 text: {_HOW}") from None
    numbered = file.name != PLAIN
    tokens: dict[bytes, int] = {}
    ids = set()
    for index, line in enumerate(lines):
        if not numbered and index == 0:  # token 0, whatever stands there
            continue
        token, number = _token(line.rstrip("\r"), index, numbered, file)
        if token in tokens or number in ids:
            raise CheckpointError(f"{file}, line {index + 1}: the token or its id repeats: {_HOW}")
        tokens[token] = number
        ids.add(number)
    absent = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if absent:
        raise CheckpointError(
            f"{file} has no token for the byte {absent[0]}, so not every text has tokens: {_HOW}"
        )
    return tokens


def _token(line: str, index: int, numbered: bool, file: Path) -> tuple[bytes, int]:
    found = (_NUMBERED_LINE if numbered else _PLAIN_LINE).fullmatch(line)
    if found is None:
        form = "id, literal and length" if numbered else "a literal"
        raise CheckpointError(
            f"{file}, line {index + 1} is {quoted(line[:60])}, not {form} as in RWKV's World "
            f"vocabulary: {_HOW}"
        )
    number, literal = (int(found[1]), found[2]) if numbered else (index, found[0])
    try:
        value = ast.literal_eval(literal)  # a string literal and nothing else, by the pattern
        token: bytes = value if isinstance(value, bytes) else value.encode("utf-8")
    except (ValueError, SyntaxError):
        token = b""
    if not 0 < len(token) <= _LONGEST or (numbered and len(token) != int(found[3])):
        raise CheckpointError(
            f"{file}, line {index + 1}: the token has {len(token)} bytes, not the stated number, "
            f"or more than {_LONGEST}: {_HOW}"
        )
    if number == 0:
        raise CheckpointError(f"{file}, line {index + 1}: the id 0 is that of the end of a text")
    return token, number


def _added(config: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """The added tokens by their ids, token 0 among them."""
    found: dict[str, dict[str, Any]] = {}
    decoder = config.get("added_tokens_decoder")
    for number, row in decoder.items() if isinstance(decoder, dict) else ():
        if number.isdecimal() and isinstance(row, dict) and isinstance(row.get("content"), str):
            flags = {name: bool(row.get(name, False)) for name in _FLAGS}
            found[str(int(number))] = {"content": row["content"], **flags}
    if "0" not in found:
        stated = config.get("eos_token")
        text = stated.get("content") if isinstance(stated, dict) else stated
        content = text if isinstance(text, str) and text else END_OF_TEXT
        found["0"] = {"content": content, **dict.fromkeys(_FLAGS, False)}
    found["0"]["special"] = True
    return found


def _tokenizer(
    tokens: Mapping[bytes, int], added: Mapping[str, dict[str, Any]], file: Path
) -> dict[str, object]:
    """The content of ``tokenizer.json``."""
    characters = byte_characters()
    words = {"".join(characters[byte] for byte in token): n for token, n in tokens.items()}
    by_id = {number: word for word, number in words.items()}
    vocabulary = dict(words)
    for number, row in added.items():
        content = row["content"]
        if int(number) in by_id or content in words:
            raise CheckpointError(
                f"tokenizer_config.json adds the token {quoted(content)} with the id {number}, "
                f"but {file.name} has that id or text already: {_HOW}"
            )
        vocabulary[content] = int(number)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": int(number), **row}
            for number, row in sorted(added.items(), key=lambda item: int(item[0]))
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
                {
                    "type": "Split",
                    "pattern": {"Regex": longest_first(tokens)},
                    "behavior": "Isolated",
                    "invert": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        # Every byte is a token, so nothing is unknown; the model wants a name for it.
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": added["0"]["content"]},
    }


def byte_characters() -> list[str]:
    """Returns the visible character that byte-level tokenizers write for each byte."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(stand_ins)) for byte in range(256)]


def longest_first(tokens: Mapping[bytes, int]) -> str:
    """Returns a regular expression, over `byte_characters`, that matches the longest token.

    Tokens with the same beginning share it, and what may follow is tried before the end, so that
    no two ways are open at a place: it backtracks to the last end of a token, and no further.

    >>> longest_first({b"a": 1, b"ab": 2, b"abcd": 3, b"e": 4})
    '(?:a(?:b(?:cd)?)?|e)'
    """
    root: Trie = {}
    for token in tokens:
        at = root
        for byte in token:
            at = at.setdefault(byte, {})
        at[_END] = True
    return _expression(root, [re.escape(character) for character in byte_characters()])


def _expression(trie: Trie, written: list[str]) -> str:
    leaves, longer = [], []
    for byte, after in trie.items():
        if byte == _END:
            continue
        rest = _expression(after, written)
        if rest:
            longer.append(written[byte] + rest)
        else:
            leaves.append(written[byte])
    if len(leaves) > 1:
        leaves = [f"[{''.join(leaves)}]"]
    ways = longer + leaves
    if not ways:
        return ""
    if len(ways) == 1 and _END not in trie:
        return ways[0]
    return f"(?:{'|'.join(ways)}){'?' if _END in trie else ''}"
