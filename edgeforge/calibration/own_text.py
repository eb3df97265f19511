"""Sequences that a model writes itself, for calibration without a text (as LLM-QAT, 2305.17888).

Drawing one token after the other would run the program as often as a sequence is long. Here every
pass runs it once on all tokens and draws each token anew, from what the model expects after the
tokens before it. A token's random numbers are the same in every pass: so after n passes the first n
tokens of a sequence are those that drawing one by one would have given, and those further on have
changed less and less. The first sequence is of random tokens. `PASSES` are few because more of them
do not make calibration better: second moments need plausible tokens, not coherent text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from edgeforge.reference.walk import ReferenceRunner

if TYPE_CHECKING:
    from edgeforge.model.model import Model
    from quant.program.program import Program

VERSION: Final = 1
"""Raised when other sequences are written than before."""
PASSES: Final = 2
# Positions whose random numbers are in memory together, each as many as the vocabulary has tokens.
_POSITIONS: Final = 32


def write_sequences(
    model: Model,
    program: Program,
    head: Sequence[int],
    count: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> tuple[tuple[int, ...], ...]:
    """Returns sequences of tokens that the model itself finds likely.

    Args:
        model: the opened model.
        program: its program in the float dialect.
        head: the tokens that its tokenizer puts in front of a text.
        count: number of sequences.
        length: tokens of each, at most the program's context.
        seed: seed of all draws.
        progress: called with the number of sequences drawn in all passes, and how many there are.
    """
    weights, vocabulary = model.weights, model.spec.vocab_size
    runner = ReferenceRunner(
        program, lambda given: weights.float_weight(given.name), weights.float_rows
    )
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(vocabulary, (count, length), generator=draw)
    first[:, : len(head)] = torch.tensor(head, dtype=torch.int64)
    seeds = torch.randint(1 << 62, (count,), generator=draw).tolist()
    blocks = list(first)
    for done in range(PASSES):
        written = []
        for number, logits in enumerate(runner.logits(blocks)):
            block, random = blocks[number].clone(), torch.Generator().manual_seed(seeds[number])
            expected = drawn(logits[:-1, :vocabulary], random)
            kept = max(1, len(head))
            block[kept:] = expected[kept - 1 :]
            written.append(block)
            progress(done * count + number + 1, PASSES * count)
        blocks = written
    return tuple(tuple(block.tolist()) for block in blocks)


def drawn(logits: Tensor, random: torch.Generator) -> Tensor:
    """Draws a token at each position, from the softmax of its logits.

    The largest of logits with Gumbel noise is such a draw; with the same noise, logits that change
    little mostly give the same token.

    Args:
        logits: ``float32[t, vocab]``.
        random: the source of the noise.

    Returns:
        ``int64[t]``.
    """
    found = []
    for some in logits.split(_POSITIONS):
        noise = torch.empty_like(some).exponential_(generator=random).log_().neg_()
        found.append((some + noise).argmax(-1))
    return torch.cat(found)
