"""Text to tokens and back, by a checkpoint's or an artifact's ``tokenizer.json``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgeforge.errors import CheckpointError, UsageError

_HALF = "\ufffd"  # what the first bytes of a character decode to
_TAIL = 16  # tokens that are decoded again


class Tokenizer:
    """A ``tokenizer.json``, by the tokenizers library.

    Args:
        file: the file; None when there is none, which is refused in words.
        where: the artifact or checkpoint, for messages.

    Raises:
        CheckpointError: missing or unreadable.
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
        """Token ids; with what the tokenizer itself puts around a text when ``special``."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size())


def stream_text(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Pieces of text as tokens come, never half a character; joined they are the whole text.

    Decodes a short tail again at each token, for what a token adds depends on those before it:
    many tokenizers drop the space that begins a text.
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
            # What the tail says must be how the text ends, with something for the next to follow.
            if short.strip() and text.endswith(short):
                held, shown = tail, short
    rest = tokenizer.decode(held)[len(shown) :]
    if rest:
        yield rest


def read_text(path: Path) -> str:
    """A UTF-8 text file.

    Raises:
        UsageError: missing, not text, or empty.
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
    """Cuts a text into blocks of ``length`` tokens, each begun with ``bos`` if there is one.

    Args:
        tokens: the text's.
        length: tokens of a block, the first one included.
        bos: the token that begins a text.
        limit: how many tokens of the text to use; None for all.

    Returns:
        Blocks of at least two tokens.

    >>> split_blocks([5, 6, 7, 8], 3, 1)
    [[1, 5, 6], [1, 7, 8]]
    """
    head = [] if bos is None else [bos]
    step = length - len(head)
    used = tokens[: limit if limit is not None else len(tokens)]
    blocks = [head + list(used[i : i + step]) for i in range(0, len(used), step)]
    return [block for block in blocks if len(block) > 1]
