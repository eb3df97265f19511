"""How much memory an app gets: the limit of a phone's system, by its version."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from edgeforge.errors import UsageError
from edgeforge.forecast.profiles import Limit, Phone
from edgeforge.sizes import size_text

HEADROOM: Final = 0.2
"""The share of the limit that is left to the app and the runtime around the model."""

ASSUMED_SHARE: Final = 0.5
"""The share of a phone's memory that is assumed where the system has no fixed limit."""

LIMITER_VERSION: Final = (17,)
"""The Android from which a phone's own table limits each app."""

_TITLES: Final = {"ios": "iOS", "android": "Android"}
_VERSION: Final = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){0,2}")


@dataclass(frozen=True)
class AppMemory:
    """The memory that an app may take.

    Attributes:
        plain: bytes of an app without an entitlement; None where it is not known.
        entitled: bytes of an app with the entitlement; None where it is not known or not needed.
        told: what the limit is and who says so, one sentence.
        sources: keys of the profiles' sources.
        warnings: what a reader must know, one sentence each.
    """

    plain: int | None
    entitled: int | None
    told: str
    sources: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def verdict(self, total: int) -> str:
        """Returns whether so many bytes fit.

        Returns:
            ``yes`` (with `HEADROOM` left), ``entitled`` (the same, with the entitlement),
            ``tight`` (below a limit, with less left) or ``no``.
        """
        if self.plain is not None and total <= self.plain * (1 - HEADROOM):
            return "yes"
        if self.entitled is not None and total <= self.entitled * (1 - HEADROOM):
            return "entitled"
        return "tight" if total <= max(self.plain or 0, self.entitled or 0) else "no"

    @property
    def largest(self) -> int:
        """The largest limit, in bytes, less the headroom."""
        return int(max(self.plain or 0, self.entitled or 0) * (1 - HEADROOM))


def parse_version(text: str) -> tuple[int, ...]:
    """Returns a system's version as numbers.

    >>> parse_version("26.4")
    (26, 4)

    Raises:
        UsageError: the text is no version.
    """
    if _VERSION.fullmatch(text) is None:
        raise UsageError(f"--os {text[:40]!r} is not a version: write it like 18 or 26.4")
    return tuple(map(int, text.split(".")))


def app_memory(phone: Phone, version: str | None, memory: int | None) -> AppMemory:
    """Returns the memory that an app may take on a phone.

    Args:
        phone: the phone.
        version: of its system; None for the newest of which a limit is known.
        memory: bytes that the user states in place of the limit, or None.

    Raises:
        UsageError: the version is none.
    """
    asked = None if version is None else parse_version(version)
    if memory is not None:
        return AppMemory(memory, None, f"an app may take {size_text(memory)}, as --memory says")
    if not phone.limits:
        return _assumed(phone, asked)
    return _known(phone, asked or max(parse_version(limit.since) for limit in phone.limits))


def _assumed(phone: Phone, version: tuple[int, ...] | None) -> AppMemory:
    system, share = _TITLES[phone.os], int(phone.memory.number * 1e9 * ASSUMED_SHARE)
    told = f"an app is assumed to get half of the {phone.memory.number:g} GB, {size_text(share)}"
    newer = (
        f"from {system} {LIMITER_VERSION[0]} the phone's own memory-limiter-config.xml limits each "
        f"app, and it is not known: read it on the phone and pass the limit as --memory"
    )
    older = (
        f"{system} has no fixed limit for an app before {LIMITER_VERSION[0]}: pass what the phone "
        f"says is available (MemAvailable in /proc/meminfo) as --memory"
    )
    limited = version is not None and version >= LIMITER_VERSION
    warnings = (newer,) if limited else (older,) if version is not None else (older, newer)
    return AppMemory(share, None, told, (*phone.memory.sources, "android-17"), warnings)


def _known(phone: Phone, version: tuple[int, ...]) -> AppMemory:
    warnings: list[str] = []
    system, name = _TITLES[phone.os], ".".join(map(str, version))
    holding = [limit for limit in phone.limits if _holds(limit, version)]
    newest = max(parse_version(limit.since) for limit in phone.limits)
    if not holding:
        older = [each for each in phone.limits if parse_version(each.since) <= version]
        near = max(map(_since, older)) if older else min(map(_since, phone.limits))
        holding = [limit for limit in phone.limits if _since(limit) == near]
    if version[0] > newest[0] or not any(_holds(limit, version) for limit in holding):
        used = max(holding, key=_since).since
        warnings.append(_unknown(phone, f"{system} {name}", used))
        name = used
    plain = max((each for each in holding if not each.entitlement), key=_since, default=None)
    entitled = max((each for each in holding if each.entitlement), key=_since, default=None)
    if plain is None:
        warnings.append(f"{phone.title}: the limit without the entitlement is not known")
    given = [limit for limit in (plain, entitled) if limit is not None]
    warnings += dict.fromkeys(f"the limit: {limit.note}" for limit in given if limit.note)
    parts = [
        *([] if plain is None else [size_text(plain.nbytes)]),
        *([] if entitled is None else [f"{size_text(entitled.nbytes)} with the entitlement"]),
    ]
    return AppMemory(
        None if plain is None else plain.nbytes,
        None if entitled is None else entitled.nbytes,
        f"{system} {name} gives an app {', '.join(parts)}",
        tuple(dict.fromkeys(source for limit in given for source in limit.sources)),
        tuple(warnings),
    )


def _unknown(phone: Phone, asked: str, used: str) -> str:
    return (
        f"no limit is known for {asked} on {phone.title}, and limits change with releases: the "
        f"one of {_TITLES[phone.os]} {used} is used; pass another as --memory"
    )


def _since(limit: Limit) -> tuple[int, ...]:
    return parse_version(limit.since)


def _holds(limit: Limit, version: tuple[int, ...]) -> bool:
    """Whether a limit is known for a version; 26.3 includes 26.3.1, and 26 alone is 26.0."""
    if _since(limit) > version:
        return False
    until = None if limit.until is None else parse_version(limit.until)
    return until is None or version[: len(until)] <= until
