"""Whether what a device generated is text: garbage is no speed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from device_harness.measuring.record import TextCheck
from device_harness.session import Session, Tokens


def allowed_differences(tokens: int) -> int:
    """How many of some tokens may differ from this host's choice: one in ten.

    Kernels of another processor round otherwise, so that the likeliest of two nearly equal tokens
    changes: on the demo model once or twice in 100 tokens. Of texts of 4 to 9 tokens one may.

    >>> [allowed_differences(count) for count in (1, 3, 4, 9, 10, 32, 128)]
    [0, 0, 1, 1, 1, 3, 12]
    """
    return max(tokens // 10, 1 if tokens >= 4 else 0)


def check_text(host: Session, prompt: Tokens, texts: Sequence[Sequence[int]]) -> TextCheck:
    """Holds generated texts against what this host chooses after the same tokens.

    This host is given the device's own text, so that one nearly equal choice does not make all
    that follows it differ.

    Args:
        host: the same artifact on this host.
        prompt: ``int64[t]``.
        texts: token ids that the device generated after it, one text for each run.

    Raises:
        DeviceError: this host cannot run the artifact.
    """
    found = [_agreement(host, prompt, text) for text in dict.fromkeys(map(tuple, texts)) if text]
    if not found:
        return TextCheck("not checked", reason="no run generated a token")
    worst = min(found, key=lambda same: sum(same) / len(same))
    agreed, count, allowed = sum(worst), len(worst), allowed_differences(len(worst))
    leading = worst.index(False) if False in worst else count
    failed = count - agreed > allowed
    reason = (
        f"of {count} generated tokens, this host would have chosen {agreed} after the same text, "
        f"and {count - allowed} are needed: what it generates is not this model's text"
    )
    return TextCheck(
        verdict="failed" if failed else "passed",
        agreed=agreed,
        of=count,
        leading=leading,
        allowed=allowed,
        reference=host.runtime,
        reason=reason if failed else "",
    )


def _agreement(host: Session, prompt: Tokens, text: Sequence[int]) -> list[bool]:
    """For each token of a text, whether it is this host's choice after what comes before."""
    host.reset()
    same, given = list[bool](), np.asarray(prompt, np.int64)
    for token in text:
        if not 0 <= token < host.vocab_size:
            return [*same, *[False] * (len(text) - len(same))]
        same.append(int(host.extend(given).argmax()) == token)
        given = np.array([token], np.int64)
    return same
