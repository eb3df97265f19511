"""Encodes text to tokens and decodes it with the ``tokenizer.json`` of a checkpoint or artifact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgeforge.errors import CheckpointError, UsageError

_HALF = "\ufffd"  # the replacement character: an incomplete UTF-8 sequence decodes to it
_TAIL = 16  # tokens at the end of the text that are decoded again with each new one


class Tokenizer:
    """A ``tokenizer.json``, opened with the tokenizers library.

    Args:
        file: the file; None when there is none, which raises the error.
        where: the artifact or checkpoint, for messages.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """

    def __init__(self, file: Path | None, where: str) -> None:
        import tokenizers

        if file is None or not file.is_file():
            raise CheckpointError(
                f"{where} has no tokenizer.json, so text cannot become tokens: export it again "
                f"with --tokenizer PATH"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{file} is not a tokenizer: {error}") from error

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns token ids; if ``special``, with the tokens that the tokenizer adds to a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens; special tokens are left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def largest_id(self) -> int:
        """The largest id of a token, added tokens included; -1 of an empty vocabulary."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Yields pieces of text as tokens come, never half a character; together they are the text.

    The text that a token adds depends on the tokens before it (many tokenizers drop the space that
    begins a text), so a short tail is decoded again with each token.
    """
    held: list[int] = []
    shown = ""
    for token in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith(_HALF):
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
        shown = text
        if len(held) >= 2 * _TAIL:
            tail = held[-_TAIL:]
            short = tokenizer.decode(tail)
            # The tail replaces the held tokens only if it decodes to the end of their text, and
            # to more than spaces: else the next token would be decoded as if it began a text.
            if short.strip() and text.endswith(short):
                held, shown = tail, short
    rest = tokenizer.decode(held)[len(shown) :]
    if rest:
        yield rest


def read_text(path: Path) -> str:
    """Returns the content of a UTF-8 text file.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, or holds only white space.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: {error.reason}") from error
    if not text.strip():
        raise UsageError(f"{path} holds no text")
    return text


def split_blocks(
    tokens: Sequence[int], length: int, bos: int | None, limit: int | None = None
) -> list[list[int]]:
    """Cuts a text into blocks of ``length`` tokens; each begins with ``bos`` if there is one.

    Args:
        tokens: the text's tokens.
        length: tokens of a block, ``bos`` included.
        bos: the token that begins a text; None if the model has none.
        limit: how many tokens of the text to use; None for all.

    Returns:
        The blocks that have at least two tokens; the last one may be shorter than ``length``.

    >>> split_blocks([5, 6, 7, 8], 3, 1)
    [[1, 5, 6], [1, 7, 8]]
    """
    head = [] if bos is None else [bos]
    step = length - len(head)
    used = tokens[: limit if limit is not None else len(tokens)]
    blocks = [head + list(used[i : i + step]) for i in range(0, len(used), step)]
    return [block for block in blocks if len(block) > 1]
