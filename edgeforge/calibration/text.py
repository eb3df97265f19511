"""`Calibration`: the blocks of tokens that quantizers look at activations on."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edgeforge.errors import UsageError
from edgeforge.model.model import CALIBRATION_TEXT, DEMO, DEMO_FOLDER, HELDOUT, Model
from edgeforge.tokenizer import Tokenizer, read_text
from exporters.manifest_records import CalibrationRecord
from quant.plans.plan import QuantPlan

if TYPE_CHECKING:
    from quant.program.program import Program

# Evaluation text that occurs in the calibration text word for word, this long, is no accident.
OVERLAP_TOKENS: Final = 48
# Below this many distinct tokens a text shows next to nothing of what a model does.
_FEW_TOKENS: Final = 16


@dataclass(frozen=True)
class CalibrationOptions:
    """What a user asks of calibration.

    Attributes:
        source: a UTF-8 file, ``demo`` for the text that ships with EdgeForge, or None for that text
            where a recipe needs one.
        tokens: how many tokens of it to use.
        length: tokens of each sequence, the context at most.
        seed: which of its sequences are taken.
    """

    source: str | None = None
    tokens: int = 64 * 512
    length: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Calibration:
    """Sequences drawn from a text, with all that is needed to draw them again.

    Attributes:
        source: as asked: a file's path or ``demo``.
        tokens: how many there are in all sequences.
        length: tokens of each sequence.
        seed: of the draw.
        digest: SHA-256 of the sequences.
        blocks: the sequences, each begun with the token that begins a text, if there is one; None
            as long as they were not drawn again.
        notes: what a user must know.
    """

    source: str
    tokens: int
    length: int
    seed: int
    digest: str
    blocks: tuple[tuple[int, ...], ...] | None = field(repr=False)
    notes: tuple[str, ...] = ()

    def record(self) -> CalibrationRecord:
        """What a manifest keeps."""
        return CalibrationRecord(self.source, self.tokens, self.length, self.seed, self.digest)

    @classmethod
    def recorded(cls, record: CalibrationRecord) -> Calibration:
        """What `record` gave, its sequences not drawn yet."""
        return cls(
            source=record.source,
            tokens=record.tokens,
            length=record.length,
            seed=record.seed,
            digest=record.digest,
            blocks=None,
        )

    def drawn(self, model: Model, context: int) -> Calibration:
        """The same with its sequences, drawn again from their text if need be.

        Raises:
            UsageError: the text is not there any more, or was changed.
        """
        if self.blocks is not None:
            return self
        options = CalibrationOptions(self.source, self.tokens, self.length, self.seed)
        again = draw_calibration(model, options, context)
        if again.digest != self.digest:
            raise UsageError(
                f"the calibration text {self.source} is not what the artifact was quantized with "
                f"(its digest differs): export the model again"
            )
        return again


@dataclass(frozen=True)
class CalibrationRun:
    """What quantizing on activations needs beyond the weights.

    Attributes:
        model: opened.
        calibration: the text; its sequences may still have to be drawn.
        program: gives the traced program, in the float dialect, once it is there.
        resume: folder of partial results; None for one in the cache.
    """

    model: Model
    calibration: Calibration
    program: Callable[[], Program]
    resume: Path | None = None


def calibration_for(
    plan: QuantPlan,
    model: Model,
    options: CalibrationOptions,
    context: int,
    *,
    looked_at: bool = False,
    static_caches: bool = False,
) -> Calibration | None:
    """The calibration that a plan and its caches need, None where they need none.

    Args:
        plan: what to make of each weight.
        model: opened.
        options: which text.
        context: declared context.
        looked_at: whether making the plan has used the text already.
        static_caches: whether the scales of caches come from a text.

    Raises:
        UsageError: a text was given that nothing would look at; or as `draw_calibration`.
    """
    from quant.plans.algorithms import is_calibrated, known_algorithms
    from quant.plans.plan import calibrated_weights

    if calibrated_weights(plan):
        return draw_calibration(model, options, context)
    if static_caches:
        from edgeforge.calibration.cache_ranges import RANGE_TOKENS

        tokens = min(options.tokens, RANGE_TOKENS)
        return draw_calibration(model, replace(options, tokens=tokens), context)
    if options.source is not None and not looked_at:
        raise UsageError(
            f"recipe {plan.recipe} looks at no activations, so --calibration {options.source} "
            f"would do nothing: leave it out, or take a recipe by "
            f"{', '.join(filter(is_calibrated, known_algorithms()))}"
        )
    return None


def draw_calibration(model: Model, options: CalibrationOptions, context: int) -> Calibration:
    """Draws sequences from a text.

    The text is cut into consecutive sequences from a random beginning on; as many as are wanted
    are taken at random.

    Args:
        model: its tokenizer and vocabulary.
        options: which text, and how much of it.
        context: declared context; no sequence is longer.

    Raises:
        UsageError: a text that is too short, or that shares passages with the held-out text; a
            tokenizer of another model.
        CheckpointError: there is no tokenizer.
    """
    source = options.source or DEMO
    is_demo = source == DEMO and not Path(DEMO).is_file()
    path = CALIBRATION_TEXT if is_demo else Path(source)
    file = model.checkpoint.tokenizer_files.get("tokenizer.json")
    tokenizer = Tokenizer(file, model.checkpoint.source)
    written = read_text(path)
    text = tokenizer.encode(written, special=False)
    vocabulary = model.spec.vocab_size
    if text and max(text) >= vocabulary:
        raise UsageError(
            f"the tokenizer gives token {max(text)}, but the model has {vocabulary}: it is another "
            f"model's; name the right one with --tokenizer PATH"
        )
    head = () if model.spec.bos is None else (model.spec.bos,)
    length = min(options.length, context)
    step = length - len(head)
    if step < 1 or options.tokens < length:
        raise UsageError(
            f"--calibration-tokens {options.tokens} and --calibration-length {options.length} make "
            f"no sequence: take at least {len(head) + 1} tokens a sequence, and one sequence"
        )
    count = options.tokens // length
    if len(text) < count * step:
        raise UsageError(
            f"the calibration text {source} has {len(text)} tokens; {count * step} are wanted: "
            f"give a longer text, or ask for fewer with --calibration-tokens"
        )
    _refuse_overlap(written, source)
    draw = random.Random(options.seed)
    begin = draw.randrange(min(step, len(text) - count * step + 1))
    starts = range(begin, len(text) - step + 1, step)
    blocks = tuple(head + tuple(text[at : at + step]) for at in draw.sample(starts, count))
    distinct = len({token for block in blocks for token in block[len(head) :]})
    notes = []
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
        notes=tuple(notes),
    )


def _refuse_overlap(text: str, source: str) -> None:
    """Refuses a text of which passages are in the text that evaluation is made on."""
    passage = shared_passage(text, read_text(HELDOUT))
    if passage is not None:
        raise UsageError(
            f"the calibration text {source} shares a passage with the held-out text that "
            f"evaluation is made on ({passage[:60]!r}): a model calibrated on it would be judged "
            f"by what it has seen; take it out"
        )


def shared_passage(text: str, other: str) -> str | None:
    """The first `OVERLAP_TOKENS` tokens in a row that two texts have in common, or None.

    Counted by the tokenizer that ships, whatever the model's is: in bytes a sentence would be many.

    >>> words = [str(number) for number in range(100, 160)]
    >>> shared_passage("a " + " ".join(words), "b " + " ".join(words))[:11]
    '100 101 102'
    >>> shared_passage("a " + " ".join(words[:9]), "b " + " ".join(words[:9])) is None
    True
    """
    tokenizer = Tokenizer(DEMO_FOLDER / "tokenizer.json", DEMO)
    n = OVERLAP_TOKENS
    tokens, others = (tokenizer.encode(each, special=False) for each in (text, other))
    known = {tuple(others[i : i + n]) for i in range(len(others) - n + 1)}
    windows = (tokens[i : i + n] for i in range(len(tokens) - n + 1))
    found = next((window for window in windows if tuple(window) in known), None)
    return None if found is None else " ".join(tokenizer.decode(found).split())
