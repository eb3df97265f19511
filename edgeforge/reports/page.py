"""Writes one self-contained page about artifacts: what was measured of them, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from edgeforge.cards.card import Card, FormatShare
from edgeforge.cards.figures import number, ratio, share, with_interval
from edgeforge.errors import UsageError
from edgeforge.gate.metrics import SHARES
from edgeforge.measurements.bench_file import BENCH
from edgeforge.output_folder.inputs import Input, refuse_inputs
from edgeforge.output_folder.whole_file import whole_file
from edgeforge.reports.charts import Curve, Point, accuracy_chart, curve_chart, front
from edgeforge.reports.heat import Heat, heat_of
from edgeforge.reports.on_devices import OnDevices, accuracies, on_devices
from edgeforge.reports.paired import FIGURES, LETTERS
from edgeforge.reports.peers import Peer, peers_of
from edgeforge.reports.reported import Reported, read_artifacts
from edgeforge.sizes import size_text
from edgeforge.verification.bounds import Checked
from edgeforge.verification.report_file import REPORT
from edgeforge.verification.routing_words import routing_words
from exporters.manifest import MANIFEST
from exporters.manifest_records import integer, mapping, text
from exporters.manifest_records import number as decimal
from exporters.target import Provenance

LARGEST_PAGE: Final = 2_000_000
_HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """An artifact as the page shows it.

    Attributes:
        letter: its short name.
        artifact: the artifact and its report.
        verdict: one word or two.
        kind: ``passed``, ``failed``, ``doubtful`` or ``missing``, for the colour.
        heat: relative error by layer and kind of matrix.
        formats: what each weight format takes.
        written: when the report was written, in UTC; empty where there is none.
    """

    letter: str
    artifact: Reported
    verdict: str
    kind: str
    heat: Heat
    formats: Sequence[FormatShare]
    written: str

    @property
    def figures(self) -> list[tuple[str, str]]:
        """Label and text of each figure, with its interval."""
        rows = []
        for figure in FIGURES if self.artifact.report is not None else ():
            found = figure.of(self.artifact)
            text = with_interval(found.value, found.low, found.high, figure.form)
            rows.append((figure.label.strip(), text))
        return rows

    @property
    def timings(self) -> Mapping[str, object]:
        """The report's timings; empty where it was not timed."""
        return mapping(self.artifact.data.get("timings") or {}, "timings")

    @property
    def limits(self) -> list[str]:
        """What an interpreter that ran it cannot know."""
        limits = self.artifact.data.get("limits")
        return [str(each) for each in limits] if isinstance(limits, list) else []

    @property
    def routing(self) -> str:
        """What is said of the experts that its tokens chose; empty where there is no mixture."""
        found = mapping(self.artifact.data.get("routing") or {}, "routing")
        if not found:
            return ""
        kl = mapping(found["own"], "own")["kl_mean"]
        own = kl if isinstance(kl, float) else math.nan
        tokens, changed = (integer(found, name) for name in ("tokens", "changed"))
        agreement, unread = decimal(found, "agreement"), text(found, "unread")
        place = str(found.get("place", ""))  # reports before this field have none
        return routing_words(tokens, changed, agreement, own, unread, place)

    @property
    def how(self) -> str:
        """How the figures were found."""
        if self.artifact.report is None:
            return "not run"
        return "interpreted" if self.limits else "measured"


@dataclass(frozen=True)
class Group:
    """Artifacts of one checkpoint, which are compared with each other.

    Attributes:
        name: what to call the checkpoint.
        entries: the artifacts.
        peers: figures of other tools' formats, where they are known.
        accuracy: the chart of KL against bytes; empty where there is no figure.
        lowering: the chart of the lowering error along a block; empty where it was not kept.
        total: the chart of the whole error along a block.
        best: letters of the artifacts on the Pareto front.
    """

    name: str
    entries: Sequence[Entry]
    peers: Sequence[Peer]
    accuracy: str
    lowering: str
    total: str
    best: Sequence[str]


def write_page(folders: Sequence[Path], out: Path) -> tuple[Path, list[str]]:
    """Writes the page, whole or not at all.

    Args:
        folders: artifacts, or folders with such in them.
        out: the file.

    Returns:
        The file, and what a user should know, a sentence each.

    Raises:
        UsageError: the file cannot be written there, or matplotlib is not installed.
        ExportError: a folder is no artifact.
    """
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out} cannot be written: name a file in an existing folder")
    artifacts = read_artifacts(folders)
    inputs = [
        Input("the artifact's file", each.folder / name)
        for each in artifacts
        for name in (MANIFEST, REPORT, BENCH, *each.manifest.files)
    ]
    refuse_inputs(out, inputs, "--out")
    entries = [_entry(place, each) for place, each in enumerate(artifacts)]
    measured = on_devices([(each.letter, each.artifact) for each in entries])
    text = page(entries, measured, folders)
    with whole_file(out) as stream:
        stream.write(text.encode("utf-8", "replace"))
    notes = [
        f"{each.folder}: {each.missing}, so the page has no figure of it"
        for each in artifacts
        if each.report is None
    ]
    return out, [*notes, *measured.notes]


def page(entries: Sequence[Entry], measured: OnDevices, folders: Sequence[Path]) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    alike: dict[str, list[Entry]] = {}
    for entry in entries:
        alike.setdefault(entry.artifact.manifest.source.sha256, []).append(entry)
    template = environment.get_template("report.html.j2")
    return template.render(
        groups=[_group(sha256, members) for sha256, members in alike.items()],
        entries=entries,
        measured=measured,
        accuracies=accuracies([(entry.letter, entry.artifact) for entry in entries]),
        style=(_HERE / "report.css").read_text(encoding="utf-8"),
        now=_time(datetime.now(UTC).timestamp()),
        command=f"edgeforge report {' '.join(map(str, folders))}",
        size=size_text,
        number=number,
        bound=bound_text,
        value=value_text,
    )


def value_text(checked: Checked) -> str:
    """A check's figure and its interval; empty for a fact that is no number."""
    if checked.value is None:
        return ""
    form = _form(checked.name)
    return with_interval(checked.value, checked.low, checked.high, form)


def bound_text(checked: Checked) -> str:
    """What a check's figure must be; empty for a fact."""
    if checked.limit is None:
        return ""
    return f"{checked.sense} {_form(checked.name)(checked.limit)}"


def _form(name: str) -> Callable[[float | None], str]:
    if name in SHARES:
        return share
    return ratio if name.endswith("ratio") else number


def _entry(place: int, artifact: Reported) -> Entry:
    letter = LETTERS[place] if place < len(LETTERS) else str(place + 1)
    verdict, kind = "not verified", "missing"
    written = ""
    if artifact.report is not None:
        verdicts = {each.verdict for each in artifact.report.checks_everywhere}
        verdict, kind = "sound", "passed"
        if "failed" in verdicts:
            verdict, kind = "failed", "failed"
        elif "doubtful" in verdicts:
            verdict, kind = "doubtful", "doubtful"
        written = _time((artifact.folder / REPORT).stat().st_mtime)
    formats = Card(artifact.manifest, Provenance(), "", None).formats
    return Entry(letter, artifact, verdict, kind, heat_of(artifact.manifest), formats, written)


def _group(sha256: str, entries: Sequence[Entry]) -> Group:
    artifact = entries[0].artifact
    name = artifact.manifest.source.model.rstrip("/").rpartition("/")[2]
    points = []
    for entry in entries:
        if entry.artifact.report is not None:
            found = entry.artifact.measure("total", "kl_mean")
            if math.isfinite(found.value):
                size = entry.artifact.bytes
                points.append(Point(entry.letter, size, found.value, found.low, found.high))
    peers = peers_of(sha256) if points else []
    parameters = artifact.manifest.model.summary.get("num_parameters")
    others = [
        Point(peer.name, peer.bits * parameters / 8, peer.kl, peer=True)
        for peer in peers
        if isinstance(parameters, int)
    ]
    curves = {name: _curves(entries, name) for name in ("lowering", "total")}
    return Group(
        name=name,
        entries=entries,
        peers=peers,
        accuracy=accuracy_chart([*points, *others], f"KL against bytes, {sha256[:8]}")
        if points
        else "",
        lowering=curve_chart(curves["lowering"], f"Lowering error by position, {sha256[:8]}")
        if curves["lowering"]
        else "",
        total=curve_chart(curves["total"], f"KL from FLOAT by position, {sha256[:8]}")
        if curves["total"]
        else "",
        best=[point.name for point in front(points)],
    )


def _curves(entries: Sequence[Entry], name: str) -> list[Curve]:
    found = []
    for entry in entries:
        data = mapping(entry.artifact.data.get("curve") or {}, "curve")
        first, values = data.get("first"), data.get(name)
        if not isinstance(first, list) or not isinstance(values, list):
            continue
        numbers = [math.nan if each is None else float(each) for each in values]
        found.append(Curve(entry.letter, [int(each) for each in first], numbers))
    return found


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
