"""The tokens that an artifact is judged on: the same ones for every target, drawn by no chance."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edgeforge.errors import UsageError
from edgeforge.families.spec import ModelSpec
from edgeforge.model.model import CALIBRATION_TEXT, DEMO, HELDOUT
from edgeforge.tokenizer import Tokenizer, read_text, split_blocks
from edgeforge.verification.evaluation_text import read_evaluation_text
from exporters.manifest_records import CalibrationRecord

TokenCount = int | Literal["all"]
"""How many tokens of a text: a number of at least 2, or all of them."""

BLOCK_TOKENS = 512
SAMPLE_TOKENS = 8192
# A text of that many tokens takes minutes on a model this large: less is the default there.
LARGE_MODEL, LARGE_MODEL_TOKENS = 50_000_000, 2048
# How far into the context a text goes, by the parameters that the model has at most: it costs
# QUANTIZED and every artifact as many tokens.
LONG_TEXT_TOKENS = ((LARGE_MODEL, 8192), (500_000_000, 4096), (math.inf, 2048))
RANDOM_TOKENS = "seeded random tokens (no tokenizer)"


@dataclass(frozen=True)
class Sample:
    """Blocks of tokens, and what they were taken from.

    Attributes:
        blocks: token ids, each block a fresh text.
        text: what to call the text.
        available: tokens that the whole text gives when it is cut into blocks.
        whole: the whole text's tokens, without those that begin a text.
        head: the tokens that begin a text.
    """

    blocks: list[list[int]]
    text: str
    available: int
    whole: Sequence[int]
    head: Sequence[int] = ()

    @property
    def tokens(self) -> int:
        """Tokens of all blocks."""
        return sum(map(len, self.blocks))


def parse_tokens(text: str | None) -> TokenCount | None:
    """Reads what a user gives as a number of tokens.

    >>> parse_tokens("8192"), parse_tokens("all"), parse_tokens(None)
    (8192, 'all', None)

    Raises:
        UsageError: it is neither a number of at least 2 nor ``all``.
    """
    if text is None:
        return None
    if text == "all":
        return "all"
    count = int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0
    return check_tokens(count, text)


def check_tokens(count: TokenCount | None, given: object = None) -> TokenCount | None:
    """Lets pass what can be a number of tokens.

    Args:
        count: the number, ``all``, or None for the default.
        given: what the user wrote, for the message; None for ``count`` itself.

    Raises:
        UsageError: it is neither a number of at least 2 nor ``all``.
    """
    is_number = isinstance(count, int) and not isinstance(count, bool)
    if count is None or count == "all" or (is_number and count >= 2):
        return count
    raise UsageError(f"{given or count!r} is neither a number of tokens, 2 or more, nor 'all'")


def choose_sample(
    artifact: Path,
    spec: ModelSpec,
    context: int,
    text: Path | None,
    tokens: TokenCount | None,
    calibration: CalibrationRecord | None,
) -> Sample:
    """Chooses what an artifact is judged on.

    Args:
        artifact: the folder, for its tokenizer.
        spec: of its model.
        context: that it was exported for; no block is longer.
        text: a UTF-8 file; None for the demo model's held-out text.
        tokens: how many tokens of it; None for `SAMPLE_TOKENS`, and for `LARGE_MODEL_TOKENS` where
            the model has more than `LARGE_MODEL` parameters.
        calibration: the text that the artifact was calibrated on, if any.

    Raises:
        UsageError: the text holds too little, its tokens are not the model's, or the artifact was
            calibrated on it.
    """
    length = min(BLOCK_TOKENS, context)
    file = artifact / "tokenizer.json"
    if not file.is_file() and text is None:
        draw = random.Random(0)
        count = tokens if isinstance(tokens, int) else LARGE_MODEL_TOKENS
        drawn = [draw.randrange(spec.vocab_size) for _ in range(count)]
        begin = () if spec.bos is None else (spec.bos,)
        blocks = split_blocks(drawn, length, begin)
        return Sample(blocks, RANDOM_TOKENS, sum(map(len, blocks)), drawn, begin)
    path = text or HELDOUT
    written = read_evaluation_text(path)
    tokenizer = Tokenizer(file, str(artifact), text=written)
    found, head = tokenizer.encode(written, special=False), tokenizer.added()[0]
    if len(found) < 2:
        raise UsageError(f"{path} has {len(found)} tokens; at least 2 are needed")
    if len(head) >= length:
        raise UsageError(
            f"the tokenizer puts {len(head)} tokens in front of a text, which leaves no room for "
            f"it in {length} tokens: export again with a longer --context or another --tokenizer"
        )
    largest = max((*found, *head))
    if largest >= spec.vocab_size:
        raise UsageError(
            f"the tokenizer gives token {largest}, but the model has {spec.vocab_size}: it is "
            f"another model's; export again with --tokenizer PATH"
        )
    if calibration is not None and path != HELDOUT:
        _refuse_calibration_text(calibration, path)
    if tokens is None:
        tokens = LARGE_MODEL_TOKENS if spec.num_parameters > LARGE_MODEL else SAMPLE_TOKENS
    every = split_blocks(found, length, head)
    available = sum(map(len, every))
    blocks = (
        every
        if tokens == "all" or tokens >= available
        else spread_blocks(found, length, head, tokens)
    )
    label = "the demo model's held-out text" if path == HELDOUT else path.name
    return Sample(blocks, label, available, found, head)


_EMULATED_TOKENS: Final = 128


@dataclass(frozen=True)
class LongText:
    """One text that goes as far into the context as may be.

    Attributes:
        tokens: its tokens.
        label: what it is.
        context: the declared context, in tokens.
    """

    tokens: list[int]
    label: str
    context: int


def long_text(
    sample: Sample,
    context: int,
    parameters: int,
    tokens: TokenCount | None,
    *,
    emulated: bool = False,
) -> LongText:
    """Makes a text as long as the context, or as the budget.

    A text that is shorter is repeated until it is long enough.

    Args:
        sample: which text.
        context: the declared context, in tokens.
        parameters: of the model.
        tokens: what a user asks for; ``all`` for the whole context.
        emulated: whether the processor is emulated, which takes a hundred times as long.
    """
    budget = _EMULATED_TOKENS if emulated else _budget(parameters)
    reach = context if tokens == "all" else min(context, budget)
    room = max(0, reach - len(sample.head))
    times = -(-room // len(sample.whole))
    if times > 1:
        label = (
            f"the {len(sample.whole):,} tokens of {sample.text}, repeated to {reach:,}, because "
            f"they are fewer than the context"
        )
    else:
        label = f"the first {reach:,} tokens of {sample.text}"
    return LongText([*sample.head, *(list(sample.whole) * times)[:room]][:reach], label, context)


def _budget(parameters: int) -> int:
    return next(tokens for most, tokens in LONG_TEXT_TOKENS if parameters <= most)


def spread_blocks(
    tokens: Sequence[int], length: int, head: Sequence[int], count: int
) -> list[list[int]]:
    """Takes blocks from all over a text: the first its beginning, the last its end.

    A text's beginning alone would be one document's, and no sample of the text. The gaps between
    the blocks are equal, to within a token.

    Args:
        tokens: the text's; what `count` asks for is less than they give.
        length: tokens of a block, those that begin it included.
        head: the tokens that begin a text; may be empty.
        count: tokens of all blocks together, at least 2. The last block is shorter where ``length``
            does not divide it, and left out where it would be a single token.

    >>> spread_blocks(range(10), 3, [], 6), spread_blocks(range(10), 3, [99], 8)
    ([[0, 1, 2], [7, 8, 9]], [[99, 0, 1], [99, 4, 5], [99, 9]])
    """
    whole, rest = divmod(count, length)
    sizes = [length - len(head)] * whole + ([rest - len(head)] if rest > 1 else [])
    unused = len(tokens) - sum(sizes)
    # A single block lies in the middle.
    skipped = (
        [unused * index // (len(sizes) - 1) for index in range(len(sizes))]
        if len(sizes) > 1
        else [unused // 2]
    )
    blocks, used = [], 0
    for size, gap in zip(sizes, skipped, strict=True):
        start = used + gap
        blocks.append([*head, *tokens[start : start + size]])
        used += size
    return blocks


def _refuse_calibration_text(record: CalibrationRecord, path: Path) -> None:
    """Refuses a text that the artifact was calibrated on; one that is gone cannot be compared."""
    from edgeforge.calibration.text import SELF, Calibration, shared_passage

    calibration = Calibration.recorded(record)
    if calibration.source == SELF:
        return
    if calibration.source != DEMO and not Path(calibration.source).is_file():
        return
    source = CALIBRATION_TEXT if calibration.source == DEMO else Path(calibration.source)
    if shared_passage(read_evaluation_text(path), read_text(source)) is not None:
        raise UsageError(
            f"{path} shares a passage with the text that the artifact was calibrated on "
            f"({calibration.source}), so it would be judged by what it has seen: evaluate on "
            f"another text"
        )
