"""What a user may ask of a target beyond a recipe, and which target takes what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Final


@dataclass(frozen=True)
class TargetOptions:
    """Options of ``edgeforge export`` that targets read; None leaves the target its default.

    Attributes:
        strip: leave out what only verification needs.
        weights: where weights lie: in the model file, or ``external``.
        lowering: who lowers: EdgeForge, or the runtime's own exporter.
        backend: the delegate that computes.
        kv_cache: dtype of the caches.
        profile: the processor the artifact is shaped for.
        chunk: tokens of one prefill call, where that is fixed when the artifact is written; or
            several numbers, separated by commas, of which each call takes one.
        cache_write: how new keys and values get into the caches.
        opset: generation of the runtime's operators.
        max_memory: bytes that the device has for the model: weights, caches and buffers.
    """

    strip: bool = False
    weights: str | None = None
    lowering: str | None = None
    backend: str | None = None
    kv_cache: str | None = None
    profile: str | None = None
    chunk: str | None = None
    cache_write: str | None = None
    opset: str | None = None
    max_memory: int | None = None

    def given(self) -> dict[str, object]:
        """The options that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    def only(self, names: Iterable[str]) -> TargetOptions:
        """These options alone."""
        return TargetOptions(**{name: getattr(self, name) for name in names})


Choices = Mapping[str, tuple[str, ...]]
"""By option, the values it may have; an empty tuple for any value."""

NAMES: Final = tuple(field.name for field in fields(TargetOptions))
