"""What a user may ask of a target beyond a recipe, and which target takes what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Final

from exporters.errors import ExportError

if TYPE_CHECKING:
    from exporters.target import Target


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


def check_options(options: TargetOptions, targets: Iterable[Target]) -> None:
    """Refuses an option that none of the targets takes, and a value that its target does not know.

    An option that one of several targets takes applies to that one; see `not_applied`.

    Raises:
        ExportError: says which, and what is allowed.
    """
    chosen = list(targets)
    for name, value in options.given().items():
        flag = "--" + name.replace("_", "-")
        takers = [target for target in chosen if name in target.options]
        if not takers:
            named = " and ".join(
                ", ".join((target.name, *_reason(target, name))) for target in chosen
            )
            raise ExportError(f"{flag} means nothing to {named}: leave it out")
        for target in takers:
            allowed = target.options[name]
            if allowed and value not in allowed:
                raise ExportError(
                    f"{flag} {value} is not known to {target.name}: take {' or '.join(allowed)}"
                )


def not_applied(options: TargetOptions, target: Target) -> tuple[str, ...]:
    """What was asked and a target cannot do though another beside it can, one sentence each."""
    return tuple(
        f"--{name.replace('_', '-')} {value} does not apply to {target.name}, {reason}"
        for name, value in options.given().items()
        for reason in _reason(target, name)
    )


def _reason(target: Target, name: str) -> tuple[str, ...]:
    """Why a target cannot take an option that others take, if there is a reason to tell."""
    return (target.passed_over[name],) if name in target.passed_over else ()
