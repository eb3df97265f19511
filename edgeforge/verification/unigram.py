"""The simplest model of a text: how often each token comes, whatever stands before it.

A model that is worse than that at the text did not understand a word of it. So its tokens are not
those that it was trained on, or its arithmetic is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def unigram_perplexity(
    text: Sequence[int], blocks: Sequence[Sequence[int]], vocab_size: int
) -> float:
    """Perplexity of add-one smoothed counts of a text's tokens, at blocks of it.

    Args:
        text: the whole text's tokens, which are counted.
        blocks: the blocks that are predicted; the first token of each is given.
        vocab_size: how many tokens there are.

    Returns:
        exp of the mean negative log likelihood; at most ``vocab_size`` where the blocks are as the
        text.

    >>> round(unigram_perplexity([0, 0, 1], [[1, 0, 0]], 2), 4)
    1.6667
    """
    counts, total = Counter(text), len(text) + vocab_size
    predicted = [token for block in blocks for token in block[1:]]
    losses = (math.log(total / (counts[token] + 1)) for token in predicted)
    return math.exp(sum(losses) / len(predicted))
