"""Encodes text to tokens and decodes it with the ``tokenizer.json`` of a checkpoint or artifact."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, Final, TypeVar

from device_harness.child_process import python_environment, script_command
from edgeforge.checkpoint.json_text import MAX_INDEX_BYTES, parse_object, read_small_file
from edgeforge.errors import CheckpointError, UsageError
from quant.input_files import read_input

TOKENIZER: Final = "tokenizer.json"
_HALF = "\ufffd"  # the replacement character: an incomplete UTF-8 sequence decodes to it
LARGEST_TEXT = 1 << 30
_TAIL = 16  # tokens at the end of the text that are decoded again with each new one
_TRIAL: Final = Path(__file__).with_name("tokenizer_trial.py")
_REFUSED: Final = 3  # the trial's exit code
# What a trial may take. The largest real tokenizers, of 256,000 tokens in 33 MB, take 0.4 GB and 4
# seconds.
_TRIAL_BYTES, _TRIAL_BYTES_PER_BYTE = 1 << 30, 32
_TRIAL_SECONDS, _TRIAL_WAIT = 60, 180
_TRIAL_TEXT = 1 << 16  # characters of a text that a trial encodes
# Files that lie beside a tokenizer.json and must be JSON objects, if they are there.
_BESIDE: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_tried: set[tuple[object, ...]] = set()
_Result = TypeVar("_Result")


class Tokenizer:
    """A ``tokenizer.json``, opened with the tokenizers library.

    The file is first tried in a process of its own, with bounds on memory and time, because the
    library can end a process, or fill its memory, on a file that somebody prepared.

    Args:
        file: the file; None when there is none, which raises the error.
        where: the artifact or checkpoint, for messages.
        text: a text that will be encoded; the trial encodes its beginning too.
        trusted: whether the file is EdgeForge's own, which needs no trial.

    Raises:
        CheckpointError: the file is missing or unreadable.
    """

    def __init__(
        self, file: Path | None, where: str, *, text: str = "", trusted: bool = False
    ) -> None:
        if file is None or not file.is_file():
            raise CheckpointError(
                f"{where} has no tokenizer.json, so text cannot become tokens: export it again "
                f"with --tokenizer PATH"
            )
        self._file = file
        if not trusted:
            _try(file, text[:_TRIAL_TEXT])
        from tokenizers import Tokenizer as Opened

        self._tokenizer = self._guarded(lambda: Opened.from_file(str(file)))
        # Padding and cutting are for batches of training; no text here is part of one.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Returns token ids; if ``special``, with the tokens that the tokenizer adds to a text."""
        ids: list[int] = self._guarded(
            lambda: self._tokenizer.encode(text, add_special_tokens=special).ids
        )
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens; special tokens are left out."""
        text: str = self._guarded(
            lambda: self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        )
        return text

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that are added to the vocabulary, by their texts."""
        return {token.content: number for number, token in self._added_tokens().items()}

    @cached_property
    def special_tokens(self) -> frozenset[int]:
        """Those of the added tokens that `decode` leaves out."""
        return frozenset(n for n, token in self._added_tokens().items() if token.special)

    def _added_tokens(self) -> dict[int, Any]:
        found: dict[int, Any] = self._guarded(self._tokenizer.get_added_tokens_decoder)
        return found

    def added(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the tokens that the tokenizer puts in front of a text, and those behind it.

        They are those of ``tokenizer.json``'s post-processor, as in transformers, which does not
        look at ``add_bos_token`` where there is such a file.
        """
        for text in ("a", " ", "1", "\n"):
            plain, whole = self.encode(text, special=False), self.encode(text)
            if not plain:
                continue
            for at in range(len(whole) - len(plain) + 1):
                if whole[at : at + len(plain)] == plain:
                    return tuple(whole[:at]), tuple(whole[at + len(plain) :])
        return tuple(self.encode("")), ()

    def encode_prompt(self, text: str) -> tuple[list[int], bool]:
        """Returns a prompt's tokens with those that the tokenizer adds, but none of them twice.

        Returns:
            The tokens, and whether the prompt itself began with what the tokenizer adds in front,
            which is then not added.
        """
        tokens, front = self.encode(text), list(self.added()[0])
        is_double = bool(front) and tokens[: 2 * len(front)] == 2 * front
        return tokens[len(front) :] if is_double else tokens, is_double

    def _guarded(self, work: Callable[[], _Result]) -> _Result:
        """Runs the library, whose panics are no `Exception`.

        Raises:
            CheckpointError: the library failed.
        """
        try:
            return work()
        except Exception as error:  # the library raises bare Exception
            reason = str(error)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            reason = str(error)
        raise CheckpointError(f"{self._file} is not a usable tokenizer: {reason}")

    @property
    def size(self) -> int:
        """Number of tokens in the vocabulary, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    @property
    def largest_id(self) -> int:
        """The largest id of a token, added tokens included; -1 of an empty vocabulary."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def check_tokenizer_files(files: Mapping[str, Path]) -> None:
    """Refuses damaged tokenizer files before any work; whatever is not there is no damage.

    Args:
        files: by the names that they have in a checkpoint.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    for name in _BESIDE:
        if name in files:
            content = read_small_file(files[name], MAX_INDEX_BYTES)
            parse_object(content, str(files[name]), strict=False)
    if TOKENIZER in files:
        _try(files[TOKENIZER], "")


def _try(file: Path, text: str) -> None:
    """Opens a tokenizer in a process of its own and encodes a text there; once for each of both.

    Raises:
        CheckpointError: that did not end well.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return  # the text is refused by whoever encodes it
    status = file.stat()
    key = (str(file), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, text)
    if key in _tried:
        return
    library = find_spec("tokenizers")
    packages = "" if library is None else str(Path(str(library.origin)).parents[1])
    memory = _TRIAL_BYTES + _TRIAL_BYTES_PER_BYTE * (status.st_size + len(text))
    command = script_command(_TRIAL, os.path.abspath(file), packages, str(memory))
    try:
        done = subprocess.run(
            [*command, str(_TRIAL_SECONDS)],
            input=text.encode("utf-8"),
            capture_output=True,
            timeout=_TRIAL_WAIT,
            env={**python_environment(), "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
        )
        code, said = done.returncode, done.stderr.decode(errors="replace").strip()
        why = done.stdout.decode(errors="replace") if code == _REFUSED else ""
    except subprocess.TimeoutExpired:
        code, said, why = -signal.SIGXCPU, "", ""
    if code == 0:
        _tried.add(key)
        return
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        why = f"opening it takes more than {_TRIAL_SECONDS} seconds"
    elif "memory allocation of" in said:
        why = f"opening it takes more than {memory >> 20} MiB of memory"
    elif not why:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last = said.splitlines()[-1:]
        why = f"it ended the process that opened it ({how}{': ' if last else ''}{''.join(last)})"
    raise CheckpointError(
        f"{file} is not a usable tokenizer: {why}; download it again, or name another with "
        f"--tokenizer PATH"
    )


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
        content = BytesIO(read_input(path, LARGEST_TEXT))
        text = TextIOWrapper(content, encoding="utf-8").read()  # a line ends alike on all systems
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; convert it to UTF-8"
        ) from error
    if not text.strip():
        raise UsageError(f"{path} holds no text")
    return text


def split_blocks(
    tokens: Sequence[int], length: int, head: Sequence[int], limit: int | None = None
) -> list[list[int]]:
    """Cuts a text into blocks of ``length`` tokens; each begins with ``head``.

    Args:
        tokens: the text's tokens.
        length: tokens of a block, ``head`` included.
        head: the tokens that begin a text, such as ``bos``; may be empty.
        limit: how many tokens of the text to use; None for all.

    Returns:
        The blocks that have at least two tokens; the last one may be shorter than ``length``.

    >>> split_blocks([5, 6, 7, 8], 3, [1])
    [[1, 5, 6], [1, 7, 8]]
    """
    step = length - len(head)
    used = tokens[: limit if limit is not None else len(tokens)]
    blocks = [[*head, *used[i : i + step]] for i in range(0, len(used), step)]
    return [block for block in blocks if len(block) > 1]
