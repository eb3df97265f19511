"""Reads ``profiles.json``: phones, limits of an app's memory, and published measurements.

Every figure names sources that are in the file. A figure without a source is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, cast

from edgeforge.errors import UsageError
from quant.json_input import parse_json
from quant.suggestion import did_you_mean

FILE: Final = Path(__file__).with_name("profiles.json")
SCHEMA_VERSION: Final = 1

OperatingSystem = Literal["ios", "android"]


@dataclass(frozen=True)
class Source:
    """Where figures come from.

    Attributes:
        key: the name by which figures refer to it.
        title: who says what, in a sentence.
        url: the page; None for what is computed.
        kind: ``maker`` (the maker's words or files), ``measured``, ``specifications`` (a list by a
            third party), ``before the launch`` (an analyst or a listing) or ``computed``.
    """

    key: str
    title: str
    url: str | None
    kind: str


@dataclass(frozen=True)
class Figure:
    """One figure of a phone.

    Attributes:
        value: a number, or a text such as a processor's name.
        sources: keys of `Profiles.sources`, at least one.
        note: what a reader must know of it; may be empty.
    """

    value: float | str
    sources: tuple[str, ...]
    note: str = ""

    @property
    def number(self) -> float:
        """The value of a figure that is a number."""
        assert not isinstance(self.value, str)
        return float(self.value)


@dataclass(frozen=True)
class Limit:
    """How much memory a system gives one app.

    Attributes:
        nbytes: bytes.
        entitlement: whether the app needs ``com.apple.developer.kernel.increased-memory-limit``.
        since: the first version of the system for which the limit is known.
        until: the last one; None where it is not known to have ended.
        sources: keys of `Profiles.sources`.
        note: on which phone it was measured, where that is another one; may be empty.
    """

    nbytes: int
    entitlement: bool
    since: str
    until: str | None
    sources: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Phone:
    """A phone.

    Attributes:
        name: the name that ``--device`` takes.
        title: its name as it is sold.
        os: its system.
        soc: its processor.
        memory: its memory, GB.
        bandwidth: of its memory, GB/s; None where no source was found.
        npu: what its processor for neural networks does, trillions of operations a second.
        cores: its CPU's cores.
        limits: of an app's memory; empty where the system has none.
    """

    name: str
    title: str
    os: OperatingSystem
    soc: Figure
    memory: Figure
    bandwidth: Figure | None
    npu: Figure | None
    cores: Figure | None
    limits: tuple[Limit, ...]

    def figures(self) -> dict[str, Figure]:
        """Returns the figures that are known, by name."""
        given = {
            "soc": self.soc,
            "memory_gb": self.memory,
            "bandwidth_gb_s": self.bandwidth,
            "npu_tops": self.npu,
            "cores": self.cores,
        }
        return {name: figure for name, figure in given.items() if figure is not None}


@dataclass(frozen=True)
class Measurement:
    """What others measured on a phone.

    Attributes:
        phone: the phone's name.
        model: the model.
        weights: how its weights were stored.
        runtime: what ran it.
        decode: tokens a second while it wrote.
        prefill: tokens a second of the prompt; None where it is not said.
        read_bytes: bytes of weights that each decoded token reads at least.
        read_from: how these were counted.
        sources: keys of `Profiles.sources`.
        note: what a reader must know; may be empty.
    """

    phone: str
    model: str
    weights: str
    runtime: str
    decode: float
    prefill: float | None
    read_bytes: int
    read_from: str
    sources: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Profiles:
    """All that is known of phones.

    Attributes:
        sources: by key.
        phones: by name.
        published: measurements.
    """

    sources: Mapping[str, Source]
    phones: Mapping[str, Phone]
    published: tuple[Measurement, ...]

    def phone(self, name: str) -> Phone:
        """Returns the phone of a name.

        Raises:
            UsageError: there is no such profile.
        """
        if name in self.phones:
            return self.phones[name]
        hint = did_you_mean(name, self.phones)
        raise UsageError(
            f"there is no profile of a device {name[:100]!r}{hint}; known: {', '.join(self.phones)}"
        )

    def measured_on(self, phone: Phone) -> tuple[Measurement, ...]:
        """Returns what was measured on a phone."""
        return tuple(each for each in self.published if each.phone == phone.name)


@cache
def load_profiles() -> Profiles:
    """Returns the profiles that ship with EdgeForge."""
    return read_profiles(FILE.read_bytes())


def read_profiles(content: bytes) -> Profiles:
    """Reads the content of ``profiles.json``.

    Raises:
        ValueError: it has another schema version, a key that is not known or is missing, or a
            figure whose source is not in the file.
    """
    data = cast("dict[str, Any]", parse_json(content))
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"profiles have schema version {data.get('schema_version')!r}")
    sources = {key: Source(key=key, **row) for key, row in data["sources"].items()}
    phones = {name: _phone(name, row) for name, row in data["phones"].items()}
    published = tuple(_measurement(row) for row in data["published"])
    cited: list[tuple[str, Figure | Limit | Measurement]] = [
        *((name, f) for name, phone in phones.items() for f in phone.figures().values()),
        *((name, limit) for name, phone in phones.items() for limit in phone.limits),
        *((each.model, each) for each in published),
    ]
    for where, figure in cited:
        unknown = set(figure.sources) - sources.keys()
        if unknown or not figure.sources:
            raise ValueError(f"{where}: a figure names {sorted(unknown) or 'no source'}: {figure}")
    strangers = {each.phone for each in published} - phones.keys()
    if strangers:
        raise ValueError(f"measurements of phones that have no profile: {sorted(strangers)}")
    return Profiles(sources, phones, published)


def _phone(name: str, row: dict[str, Any]) -> Phone:
    figures = {
        "soc": "soc",
        "memory_gb": "memory",
        "bandwidth_gb_s": "bandwidth",
        "npu_tops": "npu",
        "cores": "cores",
    }
    unknown = row.keys() - figures.keys() - {"title", "os", "limits"}
    if unknown:
        raise ValueError(f"{name} has fields that no one reads: {sorted(unknown)}")
    return Phone(
        name=name,
        title=row["title"],
        os=row["os"],
        limits=tuple(_limit(limit) for limit in row["limits"]),
        **{field: _figure(row.get(key)) for key, field in figures.items()},  # type: ignore[arg-type]
    )


def _figure(row: dict[str, Any] | None) -> Figure | None:
    if row is None:
        return None
    return Figure(**{**row, "sources": tuple(row["sources"])})


def _limit(row: dict[str, Any]) -> Limit:
    rest = {key: value for key, value in row.items() if key not in ("gigabytes", "sources")}
    return Limit(nbytes=round(row["gigabytes"] * 1e9), sources=tuple(row["sources"]), **rest)


def _measurement(row: dict[str, Any]) -> Measurement:
    rest = {
        key: value
        for key, value in row.items()
        if key not in ("decode_tokens_s", "prefill_tokens_s", "sources")
    }
    return Measurement(
        decode=row["decode_tokens_s"],
        prefill=row.get("prefill_tokens_s"),
        sources=tuple(row["sources"]),
        **rest,
    )
