"""What is said of the experts that an artifact's tokens chose; imports nothing that reads them."""

from __future__ import annotations


def routing_words(
    tokens: int, changed: int, agreement: float, own_kl: float, unread: str, place: str
) -> str:
    """Returns what a user must know of an artifact's choices, without a full stop.

    Args:
        tokens: tokens whose choices were compared.
        changed: those of them that chose other experts than QUANTIZED's.
        agreement: share of experts that QUANTIZED's router chooses too, where it is least.
        own_kl: mean KL of ARTIFACT from QUANTIZED with its own choices, nats a token.
        unread: why choices were not read; empty where they were.
        place: where the router is that agrees least, in words; empty where a report does not say.
    """
    if unread:
        return (
            f"which experts its tokens chose is not known everywhere ({unread}): there QUANTIZED "
            f"chose by itself, and a token that rounding sent to another expert counts as an error"
        )
    if not changed:
        return f"all of {tokens:,} tokens chose QUANTIZED's experts"
    router = f"the router of {place} agrees least," if place else "the least router agrees"
    return (
        f"{changed:,} of {tokens:,} tokens chose other experts than QUANTIZED's; {router} "
        f"in {100 * agreement:.1f} % of experts. The lowering error is of all tokens, "
        f"against QUANTIZED with the experts that the artifact chose; with QUANTIZED's own it is "
        f"{own_kl:.2g}"
    )
