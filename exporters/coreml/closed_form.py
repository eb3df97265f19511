"""Counts what the recurrences of a prefill function hold, which have no loop over tokens."""

from __future__ import annotations

from exporters.recurrence_size import RecurrenceSize


def closed_form(size: RecurrenceSize, tokens: int) -> int:
    """Returns how many float32 numbers a call holds at once, besides the recurrence's operands.

    `exporters.coreml.recurrence` makes a matrix of all pairs of tokens for each head, and for each
    row of its memory where rows have decays of their own: two of them are there at once, an
    operation's operand and its result. Where heads share keys, the products of queries and keys
    are a third, of each head of keys. The delta rule has five of each head while it solves for
    what tokens add. Beside them are a second sum of decays, masks of pairs of tokens, and four
    matrices of the memory's size: what was, what is kept of it, what is added, and their sum.

    Args:
        size: the recurrence's dimensions.
        tokens: how many tokens the call takes.

    >>> closed_form(RecurrenceSize(32, 32, 64, 64, by_row=True), 64) * 4 // 10**6
    69
    """
    memories = 4 * size.memory
    if tokens == 1:
        return memories
    pairs, masks = 2 * size.heads + size.key_heads, 1
    if size.by_row:
        pairs = 2 * size.heads * size.key_width
    elif size.replaces:
        pairs, masks = 5 * size.heads, 2 + (tokens - 1).bit_length()
    return memories + tokens * size.decays + tokens**2 * (pairs + masks)
