"""Plans how an app would drive an artifact: prompts in chunks, their edges, and tokens one by one.

All passes are over the same text from its beginning, so one run of a reference gives the logits of
every position that any pass looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Tokens of a call of the long pass, where the runtime takes any number.
CHUNK: Final = 64
_STRETCHES: Final = 8
_LAST: Final = 4
_ALONE: Final = 128
_PROMPT: Final = 16
_DRAFTS: Final = 6


def plan_passes(reach: int, chunks: Sequence[int]) -> list[list[int]]:
    """Plans passes over a text.

    The first one goes through the whole text in chunks, between which it takes tokens one by one:
    early in the text, at stretches spread over it, and at its end. The others are prompts of
    several lengths, shorter and longer than a chunk, with a few tokens after them.

    Args:
        reach: tokens of the text.
        chunks: the lengths that one call of the runtime takes; empty where it takes any.

    Returns:
        For each pass, how many tokens each of its calls takes.

    >>> plan_passes(22, [4])
    [[4, 4, 4, 4, 1, 1, 1, 1, 1, 1], [1, 1, 1], [5, 1, 1], [10, 1, 1]]
    """
    fitting = sorted(size for size in chunks if 1 < size <= reach)
    wanted = max(1, min(CHUNK, reach // 4))  # a short text is several chunks, too
    usual = min(fitting or [wanted], key=lambda size: abs(size - wanted))
    lengths = {1, 2, 5, 16, 17, 63, 64, 65, 200}
    if chunks:
        edges = {fitting[0], usual, fitting[-1]} if fitting else set()
        lengths = {1, *(length for size in edges for length in (size + 1, 2 * size + 2))}
    passes = [_long_pass(reach, usual)]
    passes += [[length, 1, 1] for length in sorted(lengths) if length + 2 <= reach]
    if max(passes[0]) == reach > 1:  # one chunk took all
        passes.append([1] * min(reach, _ALONE))
    return passes


def plan_drafts(reach: int, positions: int) -> list[int]:
    """Plans a pass of drafts: a prompt, drafts behind it, and one that ends with the text.

    Args:
        reach: tokens of the text.
        positions: tokens of a draft and the one before it, at most.

    Returns:
        How many tokens each call takes; one of at most ``positions`` is a draft's.

    >>> plan_drafts(64, 4)
    [16, 4, 4, 4, 4, 4, 4, 3, 17, 4]
    """
    calls = [max(1, min(_PROMPT, reach // 4))]
    for size in (*[positions] * _DRAFTS, max(1, positions - 1)):
        if sum(calls) + size + positions <= reach:
            calls.append(size)
    between = reach - sum(calls) - positions
    return [*calls, *([between] if between > 0 else []), *([positions] if between >= 0 else [])]


def positions_of(calls: Sequence[int]) -> list[int]:
    """The positions whose logits the calls of a pass give, counted from 0.

    >>> positions_of([4, 1, 1])
    [3, 4, 5]
    """
    ends, done = [], 0
    for size in calls:
        done += size
        ends.append(done - 1)
    return ends


def _long_pass(reach: int, chunk: int) -> list[int]:
    whole, single = divmod(reach, chunk)
    if whole > 1 and single < chunk:  # one chunk less, so that enough tokens are left to go alone
        whole, single = whole - 1, single + chunk
    # After so many chunks some tokens are taken one by one.
    places = {whole * part // _STRETCHES for part in range(1, _STRETCHES + 1)}
    places |= {1 << power for power in range(whole.bit_length())}
    places = {place for place in places if 0 < place < whole}
    last = min(single, max(_LAST, single // (len(places) + 1)))
    each, more = divmod(single - last, len(places)) if places else (0, 0)
    calls: list[int] = []
    for index in range(1, whole + 1):
        calls.append(chunk)
        if index in places:
            calls += [1] * each
    return calls + [1] * (last + (more if places else single - last))
