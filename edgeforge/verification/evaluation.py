"""`Evaluation`: FLOAT, QUANTIZED and ARTIFACT logits on the same tokens, held against each other.

FLOAT against QUANTIZED is what quantization costs; QUANTIZED against ARTIFACT is what lowering
and the runtime's arithmetic cost. They are never mixed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from device_harness.session import Session
from device_harness.timing import Timings
from edgeforge.reference.walk import ReferenceRunner
from edgeforge.verification.metrics import (
    Divergence,
    DivergenceMeter,
    Perplexity,
    PerplexityMeter,
    Scored,
)

REPORT = "report.json"
REPORT_VERSION = 1
GREEDY_TOKENS = 48
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class GreedyAgreement:
    """Greedy tokens of the artifact held against a reference's choice at each.

    Attributes:
        prompts: how many continuations.
        tokens: tokens of each.
        same: mean number of tokens before the first that the reference would not choose.
    """

    prompts: int
    tokens: int
    same: float


@dataclass(frozen=True)
class Evaluation:
    """One artifact's accuracy and cost.

    Attributes:
        target: the runtime's format.
        recipe: how it was quantized.
        runtime: what ran it, or what stood in for it.
        text: what text it was measured on.
        tokens: tokens of it, in blocks of ``block`` tokens.
        block: tokens of a block.
        perplexity: of ``float``, ``quantized`` and ``artifact``.
        quantization: QUANTIZED against FLOAT.
        lowering: ARTIFACT against QUANTIZED.
        total: ARTIFACT against FLOAT.
        greedy_quantized: greedy tokens of the artifact against QUANTIZED's.
        greedy_float: against FLOAT's.
        stored_weights_equal: whether integers and scales read back from the artifact's files are
            those of the manifest, bit for bit.
        bits_per_weight: stored bits over parameters.
        artifact_bytes: size of all files.
        timings: what running it costs here; None when it was not timed.
        limits: what the runtime that ran it here cannot know of the one it stands in for.
        schema_version: of the report.
    """

    target: str
    recipe: str
    runtime: str
    text: str
    tokens: int
    block: int
    perplexity: dict[str, Perplexity]
    quantization: Divergence
    lowering: Divergence
    total: Divergence
    greedy_quantized: GreedyAgreement
    greedy_float: GreedyAgreement
    stored_weights_equal: bool
    bits_per_weight: float
    artifact_bytes: int
    timings: Timings | None
    limits: tuple[str, ...] = ()
    schema_version: int = REPORT_VERSION

    @property
    def perplexity_ratio(self) -> float:
        """The artifact's perplexity over FLOAT's."""
        return self.perplexity["artifact"].value / self.perplexity["float"].value

    def to_json(self) -> dict[str, object]:
        """The report as ``report.json`` holds it."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}

    def write(self, folder: Path) -> Path:
        """Writes ``report.json`` beside the artifact's files, whole or not at all."""
        partial, final = folder / f".{REPORT}.partial", folder / REPORT
        partial.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        partial.replace(final)
        return final


@dataclass(frozen=True)
class Comparison:
    """The figures that come out of running the three models over blocks of tokens."""

    perplexity: dict[str, Perplexity]
    quantization: Divergence
    lowering: Divergence
    total: Divergence


def compare(
    blocks: Sequence[Sequence[int]],
    reference: ReferenceRunner,
    quantized: ReferenceRunner,
    session: Session,
    progress: Callable[[int, int], None],
) -> Comparison:
    """Runs FLOAT, QUANTIZED and ARTIFACT over the same blocks.

    Args:
        blocks: token ids, each a fresh text.
        reference: FLOAT.
        quantized: QUANTIZED.
        session: ARTIFACT.
        progress: told how many blocks are done, and of how many.
    """
    tokens = [torch.tensor(block, dtype=torch.int64) for block in blocks]
    perplexity = {name: PerplexityMeter() for name in ("float", "quantized", "artifact")}
    quantization, lowering, total = DivergenceMeter(), DivergenceMeter(), DivergenceMeter()
    streams = zip(tokens, reference.logits(tokens), quantized.logits(tokens), strict=True)
    for index, (block, float_logits, quantized_logits) in enumerate(streams):
        scored = {
            "float": Scored(float_logits),
            "quantized": Scored(quantized_logits),
            "artifact": Scored(torch.from_numpy(session.logits(block.numpy()))),
        }
        quantization.add(scored["float"], scored["quantized"])
        lowering.add(scored["quantized"], scored["artifact"])
        total.add(scored["float"], scored["artifact"])
        for name, logits in scored.items():
            perplexity[name].add(logits, block[1:])
        progress(index + 1, len(tokens))
    return Comparison(
        {name: meter.result() for name, meter in perplexity.items()},
        quantization.result(),
        lowering.result(),
        total.result(),
    )


def greedy_agreement(
    prompts: Sequence[Sequence[int]], session: Session, references: Sequence[ReferenceRunner]
) -> list[GreedyAgreement]:
    """Lets the artifact continue prompts greedily, and asks each reference at every step.

    The artifact runs as an app would run it: the prompt at once, then token by token through its
    caches. A reference sees the whole text in one pass: up to the first difference that gives
    what it would have chosen itself.

    Args:
        prompts: token ids.
        session: ARTIFACT.
        references: FLOAT, QUANTIZED or others.

    Returns:
        One agreement for each reference.
    """
    texts, lengths = [], []
    for prompt in prompts:
        tokens = list(prompt)
        count = min(GREEDY_TOKENS, session.context - len(tokens))
        session.reset()
        logits = session.extend(np.array(tokens, np.int64))
        for index in range(count):
            tokens.append(int(logits.argmax()))
            if index + 1 < count:
                logits = session.extend(np.array(tokens[-1:], np.int64))
        texts.append(torch.tensor(tokens, dtype=torch.int64))
        lengths.append(count)
    agreements = []
    for reference in references:
        same = []
        for prompt, text, wanted, count in zip(
            prompts, texts, reference.logits(texts), lengths, strict=True
        ):
            chosen = wanted[len(prompt) - 1 : -1].argmax(-1)
            differs = (chosen != text[len(prompt) :]).nonzero()
            same.append(int(differs[0]) if len(differs) else count)
        agreements.append(GreedyAgreement(len(texts), max(lengths), sum(same) / len(same)))
    return agreements


def greedy_prompts(blocks: Sequence[Sequence[int]], count: int, context: int) -> list[list[int]]:
    """Beginnings of blocks spread over a text, short enough to leave room to continue."""
    length = max(1, min(_PROMPT_TOKENS, context // 2))
    step = max(1, len(blocks) // count)
    return [list(block[:length]) for block in blocks[::step]][:count]
