"""What a user must know of experts that a calibration text hardly reaches."""

from __future__ import annotations

from collections.abc import Mapping


def few_tokens_note(
    tokens: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, ...]:
    """Says how many experts saw so few tokens that those of other experts decided more.

    Args:
        tokens: how many calibration tokens chose the expert, by the name of each of its weights.
        shapes: shape by weight name.

    Returns:
        One sentence, or nothing where every expert saw enough.

    >>> shape = {f"e.{i}.down_proj.weight": (8, 64) for i in range(4)}
    >>> few_tokens_note(dict(zip(shape, (900, 31, 0, 32))), shape)
    ('2 of 4 experts saw fewer than 32 calibration tokens (1 saw none): what other tokens of their \
layers need decides more about their integers; more text helps: --calibration-tokens',)
    """
    from edgeforge.reference.expert_inputs import OTHERS_A_COLUMN

    experts: dict[str, tuple[int, float]] = {}
    for name, count in tokens.items():
        expert, enough = name.rsplit(".", 2)[0], OTHERS_A_COLUMN * shapes[name][1]
        experts[expert] = count, min(enough, experts.get(expert, (0, enough))[1])
    few = [(count, enough) for count, enough in experts.values() if count < enough]
    if not few:
        return ()
    least = int(max(enough for _, enough in few))
    none = sum(count == 0 for count, _ in few)
    of_none = f" ({none} saw none)" if none else ""
    return (
        f"{len(few)} of {len(experts)} experts saw fewer than {least} calibration tokens{of_none}: "
        f"what other tokens of their layers need decides more about their integers; more text "
        f"helps: --calibration-tokens",
    )
