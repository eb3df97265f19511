"""`Calibration`: the blocks of tokens on which quantizers collect activations.

The text that ships is documentation. A model with a chat template is asked to talk, so a quarter of
its sequences are conversations that ship too, written by its own template. Where no text is wanted,
the model writes the sequences itself (`edgeforge.calibration.own_text`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeforge.calibration.conversations import shipped_conversations
from edgeforge.errors import CheckpointError, UsageError
from edgeforge.model.model import (
    CALIBRATION_TEXT,
    DEMO,
    DEMO_FOLDER,
    HELDOUT,
    Model,
)
from edgeforge.stage_progress import Progress, no_progress
from edgeforge.tokenizer import Tokenizer, read_text
from exporters.manifest_records import CalibrationRecord
from quant.plans.plan import QuantPlan

if TYPE_CHECKING:
    from quant.program.program import Program

SELF: Final = "self"
"""The source of sequences that the model writes itself."""

# A passage of the evaluation text that is this long and occurs in the calibration text word for
# word is no coincidence.
OVERLAP_TOKENS: Final = 48
QUICK_PARAMETERS: Final = 1_000_000_000
"""Models with fewer parameters are calibrated by default, on `QUICK_TOKENS` of the text."""
QUICK_TOKENS: Final = 8192
WIDE_TOKENS: Final = 32768
# One of so many sequences is a conversation.
_CHAT_SHARE: Final = 4
# A text with fewer distinct tokens than this exercises almost nothing of a model.
_FEW_TOKENS: Final = 16
# The most bytes of weights of a model that writes its own sequences.
_LARGEST_WRITER: Final = 8_000_000_000


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user asks of calibration.

    Attributes:
        source: a UTF-8 file, ``demo`` for the text that ships with EdgeForge, `SELF` for what the
            model writes itself, or None for the text that ships where a recipe needs one.
        tokens: how many tokens of the text to use; None for as many as `default_tokens` returns.
        length: tokens of each sequence, at most the context.
        seed: seed of the draw of sequences.
        chats: whether some sequences of the text that ships may be conversations.
    """

    source: str | None = None
    tokens: int | None = None
    length: int = 256
    seed: int = 0
    chats: bool = True


def default_tokens(model: Model) -> int:
    """Returns how many tokens of a text a model is calibrated on if the user does not say.

    Small models are calibrated by default, so that must be quick; the columns of wide ones need
    more tokens.
    """
    return QUICK_TOKENS if model.spec.num_parameters < QUICK_PARAMETERS else WIDE_TOKENS


@dataclass(frozen=True)
class Calibration:
    """Sequences drawn from a text, with all that is needed to draw them again.

    Attributes:
        source: the text: a file's path, ``demo`` or `SELF`.
        tokens: number of tokens in all sequences.
        length: tokens of each sequence.
        seed: seed of the draw.
        digest: SHA-256 of the sequences; of `SELF`, of all that they depend on beside the model.
        blocks: the sequences, each with what the tokenizer puts in front of a text; None in a
            recorded calibration until `drawn` draws them again, and of `SELF`, until the model has
            written them (`CalibrationRun.sequences`). Conversations come last.
        chats: how many of the sequences are conversations.
        notes: what a user must know, one sentence each.
    """

    source: str
    tokens: int
    length: int
    seed: int
    digest: str
    blocks: tuple[tuple[int, ...], ...] | None = field(repr=False)
    chats: int = 0
    notes: tuple[str, ...] = ()

    def record(self) -> CalibrationRecord:
        """Returns the part that a manifest keeps."""
        return CalibrationRecord(
            self.source, self.tokens, self.length, self.seed, self.digest, self.chats
        )

    @classmethod
    def recorded(cls, record: CalibrationRecord) -> Calibration:
        """Returns the calibration of a manifest's record; its sequences are not drawn yet."""
        return cls(
            source=record.source,
            tokens=record.tokens,
            length=record.length,
            seed=record.seed,
            digest=record.digest,
            blocks=None,
            chats=record.chats,
        )

    def drawn(self, model: Model, context: int) -> Calibration:
        """Returns this calibration with its sequences, drawn again from the text if needed.

        Args:
            model: the opened model.
            context: declared context in tokens.

        Raises:
            UsageError: the text is missing or was changed.
        """
        if self.blocks is not None:
            return self
        options = CalibrationOptions(
            self.source, self.tokens, self.length, self.seed, chats=self.chats > 0
        )
        again = draw_calibration(model, options, context)
        if again.digest != self.digest:
            raise UsageError(
                f"the calibration text {self.source} is not the one that the artifact was "
                f"quantized with (its digest differs): export the model again"
            )
        return again


@dataclass(frozen=True)
class CalibrationRun:
    """The inputs of calibrated quantization beyond the weights.

    Attributes:
        model: the opened model.
        calibration: the text; its sequences may still have to be drawn.
        program: returns the traced program, in the float dialect, and waits until it is traced.
        resume: folder of partial results; None for one in the cache.
    """

    model: Model
    calibration: Calibration
    program: Callable[[], Program]
    resume: Path | None = None

    def sequences(self, progress: Progress = no_progress) -> Calibration:
        """Returns the calibration with its sequences, drawn or written if they are not there yet.

        Args:
            progress: called as the model writes, if it does.

        Raises:
            UsageError: the text is missing or was changed.
        """
        calibration, program = self.calibration, self.program()
        if calibration.blocks is not None or calibration.source != SELF:
            return calibration.drawn(self.model, program.context)
        from edgeforge.calibration.own_text import write_sequences

        head, length = _front(self.model), calibration.length
        count, seed = calibration.tokens // length, calibration.seed
        if calibration.digest != _digest_of_own(head, count, length, seed):
            raise UsageError(
                "the artifact was calibrated on sequences that the model wrote in the way of "
                "another version of EdgeForge: verify it with that version, or export it again"
            )

        def report(done: int, size: int) -> None:
            progress("write sequences", done, size)

        blocks = write_sequences(self.model, program, head, count, length, seed, report)
        return replace(calibration, blocks=blocks)


def calibration_for(
    plan: QuantPlan,
    model: Model,
    options: CalibrationOptions,
    context: int,
    *,
    looked_at: bool = False,
    static_caches: bool = False,
) -> Calibration | None:
    """Returns the calibration that a plan and its caches need, or None where they need none.

    Args:
        plan: the format and algorithm of each weight.
        model: the opened model.
        options: the text, and how much of it to use.
        context: declared context in tokens.
        looked_at: whether making the plan already used the text.
        static_caches: whether the scales of caches come from the text.

    Raises:
        UsageError: a text was given that nothing would use; also as `draw_calibration`.
        CheckpointError: as `draw_calibration`.
    """
    from quant.plans.algorithms import is_calibrated, known_algorithms
    from quant.plans.plan import calibrated_weights

    if calibrated_weights(plan):
        return draw_calibration(model, options, context)
    if static_caches:
        from edgeforge.calibration.cache_ranges import RANGE_TOKENS

        tokens = min(options.tokens or RANGE_TOKENS, RANGE_TOKENS)
        return draw_calibration(model, replace(options, tokens=tokens), context)
    if options.source is not None and not looked_at:
        raise UsageError(
            f"recipe {plan.recipe} uses no activations, so --calibration {options.source} "
            f"would have no effect: leave it out, or take a recipe with one of the algorithms "
            f"{', '.join(filter(is_calibrated, known_algorithms()))}"
        )
    return None


def draw_calibration(model: Model, options: CalibrationOptions, context: int) -> Calibration:
    """Draws sequences from a text, or says which ones the model is to write itself.

    The text is cut into consecutive sequences from a random starting point on, and the wanted
    number of them is drawn at random. Where the text is the one that ships, up to a quarter of them
    are conversations instead, if the model has a chat template.

    Args:
        model: the opened model, for its tokenizer and vocabulary.
        options: the text, and how much of it to use.
        context: declared context in tokens; no sequence is longer.

    Raises:
        UsageError: the text is too short or shares a passage with the held-out text, or the
            tokenizer belongs to another model.
        CheckpointError: there is no tokenizer.
    """
    source = options.source or DEMO
    if source == SELF and not Path(SELF).is_file():
        return _own_calibration(model, options, context)
    is_demo = source == DEMO and not Path(DEMO).is_file()
    path = CALIBRATION_TEXT if is_demo else Path(source)
    file = model.checkpoint.tokenizer_files.get("tokenizer.json")
    written = read_text(path)
    tokenizer = Tokenizer(file, model.checkpoint.source, text=written)
    text = tokenizer.encode(written, special=False)
    _check_vocabulary(model, text)
    head = tokenizer.added()[0]
    count, length = _size(model, options, context, head)
    step = length - len(head)
    if len(text) < count * step:
        raise UsageError(
            f"the calibration text {source} has {len(text)} tokens, but {count * step} are wanted: "
            f"give a longer text, or ask for fewer with --calibration-tokens"
        )
    _refuse_overlap(written, source)
    draw = random.Random(options.seed)
    begin = draw.randrange(min(step, len(text) - count * step + 1))
    starts = range(begin, len(text) - step + 1, step)
    blocks = tuple(head + tuple(text[at : at + step]) for at in draw.sample(starts, count))
    distinct = len({token for block in blocks for token in block[len(head) :]})
    notes: list[str] = []
    chats: tuple[tuple[int, ...], ...] = ()
    if is_demo and options.chats:
        try:
            chats = shipped_conversations(model, tokenizer, count // _CHAT_SHARE, length)
        except CheckpointError as error:
            notes.append(f"{error}; so the model is calibrated on no conversation")
        blocks = blocks[: count - len(chats)] + chats
    if distinct < _FEW_TOKENS:
        notes.append(
            f"the calibration text {source} has {distinct} distinct "
            f"token{'s' if distinct > 1 else ''}: the second moments of activations are singular, "
            f"and only their damping makes them usable; give a text of the model's language"
        )
    return Calibration(
        source=DEMO if is_demo else str(path.resolve()),
        tokens=count * length,
        length=length,
        seed=options.seed,
        digest=hashlib.sha256(json.dumps(blocks).encode()).hexdigest(),
        blocks=blocks,
        chats=len(chats),
        notes=tuple(notes),
    )


def _own_calibration(model: Model, options: CalibrationOptions, context: int) -> Calibration:
    """Returns a calibration on sequences that the model has yet to write."""
    needed = 4 * model.spec.num_parameters
    if needed > _LARGEST_WRITER:
        raise UsageError(
            f"--calibration {SELF} takes {needed / 1e9:.0f} GB for this model, which would be in "
            f"memory in float32 while it writes; {_LARGEST_WRITER / 1e9:.0f} GB is the most: name "
            f"a text with --calibration FILE, or leave --calibration out for the one that ships"
        )
    head = _front(model)
    count, length = _size(model, options, context, head)
    digest = _digest_of_own(head, count, length, options.seed)
    return Calibration(SELF, count * length, length, options.seed, digest, None)


def _digest_of_own(head: tuple[int, ...], count: int, length: int, seed: int) -> str:
    from edgeforge.calibration.own_text import VERSION

    facts = [SELF, VERSION, head, count, length, seed]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _front(model: Model) -> tuple[int, ...]:
    """Returns what the model's tokenizer puts in front of a text; nothing if there is none."""
    file = model.checkpoint.tokenizer_files.get("tokenizer.json")
    if file is None:
        return ()
    head = Tokenizer(file, model.checkpoint.source).added()[0]
    _check_vocabulary(model, head)
    return head


def _check_vocabulary(model: Model, tokens: Sequence[int]) -> None:
    """Refuses tokens that the model does not have."""
    vocabulary = model.spec.vocab_size
    if tokens and max(tokens) >= vocabulary:
        raise UsageError(
            f"the tokenizer gives token {max(tokens)}, but the model has {vocabulary} tokens: it "
            f"is another model's; name the right one with --tokenizer PATH"
        )


def _size(
    model: Model, options: CalibrationOptions, context: int, head: tuple[int, ...]
) -> tuple[int, int]:
    """Returns how many sequences are wanted, and how many tokens each has.

    Raises:
        UsageError: the options make no sequence.
    """
    length = min(options.length, context)
    tokens = default_tokens(model) if options.tokens is None else options.tokens
    if length <= len(head) or tokens < length:
        raise UsageError(
            f"--calibration-tokens {tokens} and --calibration-length {options.length} make "
            f"no sequence: give a length of at least {len(head) + 1}, and at least as many tokens "
            f"as one sequence has"
        )
    return tokens // length, length


def _refuse_overlap(text: str, source: str) -> None:
    """Refuses a text that shares a passage with the held-out text of evaluation."""
    passage = shared_passage(text, read_text(HELDOUT))
    if passage is not None:
        raise UsageError(
            f"the calibration text {source} shares a passage with the held-out text that "
            f"evaluation uses ({passage[:60]!r}): the model would be evaluated on text that it was "
            f"calibrated on; take the passage out"
        )


def shared_passage(text: str, other: str) -> str | None:
    """Returns the first run of `OVERLAP_TOKENS` tokens that two texts share, or None.

    The demo model's tokenizer counts the tokens, whichever tokenizer the model has: with one token
    per byte, a common sentence would already be as long as a passage.

    >>> words = [str(number) for number in range(100, 160)]
    >>> shared_passage("a " + " ".join(words), "b " + " ".join(words))[:11]
    '100 101 102'
    >>> shared_passage("a " + " ".join(words[:9]), "b " + " ".join(words[:9])) is None
    True
    """
    tokenizer = Tokenizer(DEMO_FOLDER / "tokenizer.json", DEMO, trusted=True)
    n = OVERLAP_TOKENS
    tokens, others = (tokenizer.encode(each, special=False) for each in (text, other))
    known = {tuple(others[i : i + n]) for i in range(len(others) - n + 1)}
    windows = (tokens[i : i + n] for i in range(len(tokens) - n + 1))
    found = next((window for window in windows if tuple(window) in known), None)
    return None if found is None else " ".join(tokenizer.decode(found).split())
