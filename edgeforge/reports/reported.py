"""Artifacts with what was verified of them, read from their manifests and reports alone."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeforge.cards.card import Measure
from edgeforge.errors import UsageError
from edgeforge.gate.reports import Report, StaleReportError, read_report
from edgeforge.verification.artifacts import find_artifacts
from edgeforge.verification.freshness import sha256_of
from exporters.manifest import MANIFEST, Manifest
from exporters.manifest_records import mapping


@dataclass(frozen=True)
class Reported:
    """An artifact and its report.

    Attributes:
        folder: as the user named it.
        manifest: the artifact's.
        report: what a verification found; None where nothing that holds is known.
        data: the whole report, as it was written; empty where there is none.
        missing: why there is no report, a phrase; empty where there is one.
    """

    folder: Path
    manifest: Manifest
    report: Report | None
    data: Mapping[str, object]
    missing: str

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(record.size for record in self.manifest.files.values())

    @property
    def label(self) -> str:
        """What to call it where the folder's name would be too long."""
        return f"{self.manifest.target} {self.manifest.recipe}"

    @property
    def tokenizer(self) -> str:
        """Digest of its tokenizer's file; empty without one."""
        return self.manifest.tokenizer_sha256

    def measure(self, comparison: str, figure: str) -> Measure:
        """A mean of the report and its interval, such as ``kl_mean`` of ``total``."""
        value = mapping(self.data[comparison], comparison)[figure]
        known = mapping(self.data.get("intervals") or {}, "intervals").get(comparison, {})
        return _measure(value, mapping(known, comparison).get(figure))

    @property
    def perplexity_ratio(self) -> Measure:
        """The artifact's perplexity over FLOAT's."""
        known = mapping(self.data.get("intervals") or {}, "intervals")
        return _measure(self.data["perplexity_ratio"], known.get("perplexity_ratio"))


def read_artifacts(folders: Sequence[Path]) -> list[Reported]:
    """Reads artifacts, or those right inside folders, each once.

    Raises:
        ExportError: a folder is no artifact and holds none.
    """
    found: dict[str, Reported] = {}
    for folder in find_artifacts(list(folders)):
        found.setdefault(os.path.realpath(folder), _read(folder))
    return list(found.values())


def _read(folder: Path) -> Reported:
    manifest = Manifest.read(folder)
    try:
        report = read_report(folder)
        if report.freshness.manifest != sha256_of(folder / MANIFEST):
            raise StaleReportError("its report is of another export")
        read = Reported(folder, manifest, report, report.data, "")
        _try(read)
    except StaleReportError as error:
        return Reported(folder, manifest, None, {}, str(error))
    except (KeyError, TypeError, ValueError, OSError):
        return Reported(folder, manifest, None, {}, "its report is not complete")
    return read


def _try(read: Reported) -> None:
    """Reads once what is read later, so that a report that lacks it is known at once."""
    for comparison in ("quantization", "lowering", "total"):
        for figure in ("kl_mean", "top1_agreement"):
            read.measure(comparison, figure)
    assert read.perplexity_ratio is not None


def require_reports(artifacts: Sequence[Reported]) -> None:
    """Refuses artifacts without a report that holds.

    Raises:
        UsageError: names them, and what to do.
    """
    lacking = [f"{each.folder}: {each.missing}" for each in artifacts if each.report is None]
    if lacking:
        names = " ".join(str(each.folder) for each in artifacts if each.report is None)
        raise UsageError(f"{'; '.join(lacking)}: run `edgeforge verify {names}` first")


def _measure(value: object, ends: object) -> Measure:
    if ends is None:
        return Measure(_number(value))
    row = mapping(ends, "an interval")
    return Measure(_number(value), _number(row["low"]), _number(row["high"]))


def _number(value: object) -> float:
    if value is None:  # null stands for what is not finite
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a figure is no number")
    return float(value)
