"""Reads reports that `verify` wrote, without importing what it took to make them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Final

from edgeforge.gate.metrics import DEVICE
from edgeforge.verification.bounds import Checked
from edgeforge.verification.freshness import Freshness
from edgeforge.verification.intervals import BlockSums
from edgeforge.verification.report_file import REPORT, REPORT_VERSION
from exporters.manifest_records import integer, mapping, text
from quant.input_files import read_input
from quant.quoted import quoted
from quant.sealed_json import unseal

_LARGEST: Final = 256 << 20
_SENSES: Final = ("at most", "at least", "equal")
_VERDICTS: Final = ("passed", "failed", "doubtful")


class StaleReportError(Exception):
    """A report cannot be taken as it is; the message says why, as a phrase."""


@dataclass(frozen=True)
class Figure:
    """A figure of a report, and the ends of its 95 % interval where it has one."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Elsewhere:
    """What a report has of a run on a device.

    Attributes:
        device: its name, and the runtime's options there.
        tokens: tokens of the text, in blocks.
        figures: what a policy may bound, by its name without ``device.``.
        checks: every figure that was held against a bound.
    """

    device: str
    tokens: int
    figures: Mapping[str, Figure]
    checks: tuple[Checked, ...]

    @property
    def named_checks(self) -> list[Checked]:
        """The checks under the names that a policy has for them, with the device in their words."""
        return [
            replace(
                each,
                name=f"{DEVICE}{each.name}",
                message=f"on {self.device}: {each.message}",
                where=(f"on {self.device}", *each.where),
            )
            for each in self.checks
        ]


@dataclass(frozen=True)
class Report:
    """What the gate needs of a report.

    Attributes:
        tokens: tokens of the text, in blocks.
        text: what to call the text.
        runtime: what ran the artifact.
        artifact_bytes: size of all files.
        figures: what a policy may bound, by its dotted name.
        quantization: what quantization costs, by the figure's own name, such as ``kl_mean``.
        checks: every figure and fact that was held against a bound.
        sums: what a baseline is made of; None where there are too few tokens.
        freshness: what all of it depends on.
        data: the whole report, as it was written.
        elsewhere: the same artifact on devices.
    """

    tokens: int
    text: str
    runtime: str
    artifact_bytes: int
    figures: Mapping[str, Figure]
    quantization: Mapping[str, float]
    checks: tuple[Checked, ...]
    sums: BlockSums | None
    freshness: Freshness
    data: Mapping[str, object] = field(repr=False)
    elsewhere: tuple[Elsewhere, ...] = ()

    @property
    def checks_everywhere(self) -> tuple[Checked, ...]:
        """The checks of this host and of every device."""
        return (*self.checks, *(each for there in self.elsewhere for each in there.named_checks))


def read_report(folder: Path) -> Report:
    """Reads an artifact's report.

    Raises:
        StaleReportError: there is none, or it is damaged, changed, or of another schema.
    """
    try:
        content = unseal(read_input(folder / REPORT, _LARGEST))
    except FileNotFoundError:
        raise StaleReportError("it has no report") from None
    except (OSError, ValueError):
        raise StaleReportError("its report was changed or damaged") from None
    version = content.get("schema_version")
    if version != REPORT_VERSION or isinstance(version, bool):
        raise StaleReportError(f"its report has schema version {quoted(version)}")
    try:
        return _report(content)
    except (KeyError, TypeError, ValueError):
        raise StaleReportError("its report is not complete") from None


def _report(data: Mapping[str, object]) -> Report:
    found = _checks(data)
    return Report(
        tokens=integer(data, "tokens"),
        text=text(data, "text"),
        runtime=text(data, "runtime"),
        artifact_bytes=integer(data, "artifact_bytes"),
        figures=_figures(data, found),
        quantization=_numbers(data["quantization"]),
        checks=found,
        sums=_sums(data["sums"]),
        freshness=Freshness.from_json(data["freshness"]),
        data=data,
        elsewhere=_elsewhere(data.get("elsewhere") or []),
    )


def _elsewhere(rows: object) -> tuple[Elsewhere, ...]:
    if not isinstance(rows, list):
        raise TypeError("elsewhere is not a list")
    found = []
    for each in rows:
        row = mapping(each, "a run on a device")
        checks = _checks(row)
        figures = _figures(row, checks)
        found.append(Elsewhere(text(row, "device"), integer(row, "tokens"), figures, checks))
    return tuple(found)


def _checks(data: Mapping[str, object]) -> tuple[Checked, ...]:
    checks = data["checks"]
    if not isinstance(checks, list):
        raise TypeError("checks is not a list")
    return tuple(_checked(each) for each in checks)


def _figures(data: Mapping[str, object], checks: tuple[Checked, ...]) -> dict[str, Figure]:
    intervals = data["intervals"] or {}
    known = mapping(intervals, "intervals")
    found = {}
    for comparison in ("lowering", "total"):
        values = mapping(data[comparison], comparison)
        ends = mapping(known.get(comparison, {}), comparison)
        for name in ("kl_mean", "kl_p99", "top1_agreement"):
            found[f"{comparison}.{name}"] = _figure(values[name], ends.get(name))
    found["perplexity_ratio"] = _figure(data["perplexity_ratio"], known.get("perplexity_ratio"))
    # What was held against a bound has its interval there, which may be of more than a sample.
    for each in checks:
        if each.value is not None and each.sense != "equal":
            found[each.name] = Figure(each.value, each.low, each.high)
    found["size.bytes"] = Figure(_number(data["artifact_bytes"]))
    found["size.bits_per_weight"] = Figure(_number(data["bits_per_weight"]))
    return found


def _figure(value: object, ends: object) -> Figure:
    if ends is None:
        return Figure(_number(value))
    row = mapping(ends, "an interval")
    return Figure(_number(value), _number(row["low"]), _number(row["high"]))


def _checked(data: object) -> Checked:
    row = mapping(data, "a check")
    sense, verdict = text(row, "sense"), text(row, "verdict")
    if sense not in _SENSES or verdict not in _VERDICTS:
        raise TypeError("a check has another sense or verdict")
    where = row["where"]
    if not isinstance(where, list):
        raise TypeError("where is not a list")
    settle = row["tokens_to_settle"]
    known = {each.name for each in fields(Checked)}
    if not known <= row.keys():
        raise KeyError("a check")
    return Checked(
        name=text(row, "name"),
        value=_number(row["value"]),
        limit=_number(row["limit"]),
        sense=sense,  # type: ignore[arg-type]  # one of _SENSES
        low=_number(row["low"]),
        high=_number(row["high"]),
        verdict=verdict,  # type: ignore[arg-type]  # one of _VERDICTS
        where=tuple(map(str, where)),
        tokens_to_settle=None if settle is None else integer(row, "tokens_to_settle"),
        message=text(row, "message"),
    )


def _sums(data: object) -> BlockSums | None:
    return None if data is None else read_sums(mapping(data, "sums"))


def read_sums(row: Mapping[str, object]) -> BlockSums:
    """Reads block sums, in the form that ``dataclasses.asdict`` gives.

    Raises:
        TypeError: a field holds what it cannot.
        KeyError: a field is absent.
    """
    unit = _number(row["unit_blocks"])
    tables = [_columns(row[name]) for name in ("sums", "counts")]
    lengths = {len(column) for table in tables for column in table.values()}
    if unit is None or tables[0].keys() != tables[1].keys() or len(lengths) != 1 or lengths <= {0}:
        raise TypeError("the sums do not fit each other")
    if any(count <= 0 for column in tables[1].values() for count in column):
        raise TypeError("a sum is of no tokens")
    return BlockSums(unit, *tables)


def _columns(data: object) -> dict[str, list[float]]:
    found = {}
    for name, column in mapping(data, "sums").items():
        if not isinstance(column, list):
            raise TypeError("a column is not a list")
        numbers = [_number(each) for each in column]
        # Null stands for what is not finite.
        found[name] = [math.nan if each is None else each for each in numbers]
    return found


def _numbers(data: object) -> dict[str, float]:
    found = {name: _number(value) for name, value in mapping(data, "figures").items()}
    return {name: math.nan if value is None else value for name, value in found.items()}


def _number(data: object) -> float | None:
    if data is None:
        return None
    if isinstance(data, bool) or not isinstance(data, int | float):
        raise TypeError(f"{quoted(data)} is no number")
    return float(data)
