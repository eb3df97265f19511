"""The options that a user may give to targets, besides the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final


@dataclass(frozen=True)
class TargetOptions:
    """Options of ``edgeforge export`` that targets read; None means the target's default.

    Attributes:
        strip: whether to leave out what only verification needs.
        weights: where the weights are: in the model file, or ``external``.
        lowering: what lowers the program: EdgeForge, or the runtime's own exporter.
        backend: the delegate that computes.
        kv_cache: the dtype of the caches.
        activations: how products with integer weights take their activations: rounded to 8 bits
            (``int8``), as they are (``float``), or rounded but for a few columns where rounding
            those costs much (``auto``, the default).
        profile: the processor that the artifact is written for.
        chunk: how many tokens one prefill call takes, where that is fixed when the artifact is
            written; or several numbers, separated by commas, of which each call takes one.
        cache_write: how new keys and values are written into the caches.
        opset: the generation of the runtime's operators.
        max_memory: bytes that the device has for the model's weights, caches and buffers.
        draft_positions: how many of its last tokens' logits one call gives in a graph of its own,
            for speculative decoding; None for no such graph.
    """

    strip: bool = False
    weights: str | None = None
    lowering: str | None = None
    backend: str | None = None
    kv_cache: str | None = None
    activations: str | None = None
    profile: str | None = None
    chunk: str | None = None
    cache_write: str | None = None
    opset: str | None = None
    max_memory: int | None = None
    draft_positions: int | None = None

    def given(self) -> dict[str, object]:
        """The options that the user set, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    def only(self, names: Iterable[str]) -> TargetOptions:
        """A copy that keeps the named options and leaves all others at their defaults."""
        return TargetOptions(**{name: getattr(self, name) for name in names})


Choices = Mapping[str, tuple[str, ...]]
"""The values that each option may have, by the option's name; an empty tuple allows any value."""

NAMES: Final = tuple(field.name for field in fields(TargetOptions))
