"""Whether logits are finite numbers, and which operation gave the first value that is not.

An overflow rarely stays where it begins: an infinity becomes NaN in the next norm, and attention
hands it to every later position. So the operation is looked for whose operands are all finite and
whose result is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from device_harness.errors import LogitsNotFiniteError
from device_harness.session import Logits, Session

_LAYER = re.compile(r"layers\.(\d+)\.")


def bad_positions(logits: Logits) -> list[int]:
    """Returns the positions that have a NaN or infinite logit, of ``float32[t, vocab]``."""
    # The sum is finite in nearly every case, and takes a fraction of the time.
    with np.errstate(all="ignore"):
        if np.isfinite(logits.sum()):
            return []
    return [int(at) for at in np.flatnonzero(~np.isfinite(logits).all(-1))]


def require_finite(logits: Logits, session: Session, text: Sequence[int]) -> None:
    """Refuses logits that are NaN or infinite.

    Args:
        logits: of a text's last token, ``float32[vocab]``.
        session: what gave them.
        text: the text's tokens.

    Raises:
        LogitsNotFiniteError: says how many they are, and where the first of them comes from.
    """
    if not bad_positions(logits[None]):
        return
    count = int((~np.isfinite(logits)).sum())
    runtime = session.runtime.split(" (")[0]
    where = session.first_not_finite(np.array(text, np.int64)) or "the runtime does not show where"
    raise LogitsNotFiniteError(
        f"{runtime} gives NaN or infinite logits, {count} of {len(logits)} after {len(text)} "
        f"tokens; {where}: if `edgeforge verify` finds the files as they were written, the model's "
        f"values overflow there, so use another target"
    )


def described(operation: str, weights: Iterable[str], *, limit: str = "") -> str:
    """Returns a phrase for the operation that gave the first value that is not finite.

    Args:
        operation: its kind, and its name.
        weights: the weights of the operations up to and with it, in order; the last one tells the
            layer.
        limit: what its result exceeded, where that is known.

    >>> described("add 'op_add_3'", ["model.layers.1.mlp.down_proj.weight"])
    "the first operation that gives one is add 'op_add_3' in layer 1, at or after \
model.layers.1.mlp.down_proj.weight"
    """
    last = list(weights)[-1:]
    found = _LAYER.search(last[0]) if last else None
    layer = f" in layer {found[1]}" if found else ""
    near = f", at or after {last[0]}" if last else ""
    exceeded = f" ({limit})" if limit else ""
    return f"the first operation that gives one is {operation}{layer}{near}{exceeded}"
