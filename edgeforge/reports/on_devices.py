"""What `bench` measured and `verify` found of artifacts on devices, as the page shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from device_harness.measuring.bench import ArmRatio, DeviceRecord
from device_harness.measuring.kept_speed import kept
from device_harness.measuring.record import Cell, Figure, Point
from edgeforge.cards.figures import number, share, with_interval
from edgeforge.errors import UsageError
from edgeforge.gate.reports import Figure as Value
from edgeforge.reports.charts import Curve, Spread, ratio_chart, sustained_chart
from edgeforge.reports.reported import Reported
from edgeforge.reports.speeds import Side, side_of_artifact
from edgeforge.sizes import short, size_text
from edgeforge.verification.bounds import Verdict

_PARTS: Final = 100


@dataclass(frozen=True)
class Row:
    """One cell of a measurement.

    Attributes:
        letter: of the artifact.
        device: its name, and what it is.
        lengths: of prompt and output.
        prefill: the median with its range, or why there is none.
        decode: the same.
        cold: load and first token of a fresh process.
        peak: memory.
        text: whether what it generated is text.
        kept: how much of its speed it kept in a sustained run; empty where there was none.
        kind: ``passed``, ``doubtful`` (unreliable) or ``failed``, for the colour.
        verdict: one word or two.
        reason: why it failed; empty where it did not.
    """

    letter: str
    device: str
    lengths: str
    prefill: str
    decode: str
    cold: str
    peak: str
    text: str
    kept: str
    kind: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class OnDevices:
    """All measurements of a page's artifacts.

    Attributes:
        rows: a row for each cell.
        ratios: of artifacts that took turns: a label and a text each.
        ratio_chart: the same drawn; empty where there is none.
        sustained_chart: decode over minutes; empty where there is none.
        notes: of files that cannot be read, one sentence each.
    """

    rows: Sequence[Row]
    ratios: Sequence[tuple[str, str]]
    ratio_chart: str
    sustained_chart: str
    notes: Sequence[str]


def on_devices(artifacts: Sequence[tuple[str, Reported]]) -> OnDevices:
    """What was measured of artifacts.

    Args:
        artifacts: letter and artifact.
    """
    sides: dict[str, Side] = {}
    notes = []
    for letter, artifact in artifacts:
        try:
            side = side_of_artifact(artifact.folder)
        except UsageError as error:
            notes.append(str(error))
            continue
        if side is not None:
            sides[letter] = side
    letters = {side.manifest: letter for letter, side in sides.items()}
    rows, curves = [], []
    for letter, side in sides.items():
        for cell in side.bench.cells:
            rows.append(_row(letter, cell, side.bench.device(cell.device)))
            if cell.sustained:
                curves.append(_curve(f"{letter}, {cell.device}", cell.sustained))
    ratios = _ratios(sides.values(), letters)
    labels = [(_label(each, letters), each) for each in ratios]
    spreads = [Spread(label, each.value, each.low, each.high) for label, each in labels]
    return OnDevices(
        rows=rows,
        ratios=[(label, _ratio_text(each)) for label, each in labels],
        ratio_chart=ratio_chart(spreads, "Ratios of speeds measured by turns") if spreads else "",
        sustained_chart=sustained_chart(curves, "Decode over a sustained run") if curves else "",
        notes=notes,
    )


@dataclass(frozen=True)
class Accuracy:
    """What `verify` found of an artifact on a device.

    Attributes:
        letter: of the artifact.
        device: its name, and the runtime's options there.
        verdict: ``passed``, ``doubtful`` or ``failed``.
        tokens: of the text.
        lowering: the mean KL from QUANTIZED, with its interval.
        here: the same on the host that verified.
        top1: how often the likeliest token is QUANTIZED's.
    """

    letter: str
    device: str
    verdict: str
    tokens: str
    lowering: str
    here: str
    top1: str


def accuracies(artifacts: Sequence[tuple[str, Reported]]) -> list[Accuracy]:
    """What `verify --device` found of artifacts.

    Args:
        artifacts: letter and artifact.
    """
    found = []
    for letter, artifact in artifacts:
        report = artifact.report
        for there in () if report is None else report.elsewhere:
            assert report is not None
            verdicts = {each.verdict for each in there.checks}
            order: tuple[Verdict, ...] = ("failed", "doubtful")
            found.append(
                Accuracy(
                    letter=letter,
                    device=there.device,
                    verdict=next((each for each in order if each in verdicts), "passed"),
                    tokens=f"{there.tokens:,}",
                    lowering=_value(there.figures["lowering.kl_mean"], number),
                    here=_value(report.figures["lowering.kl_mean"], number),
                    top1=_value(there.figures["lowering.top1_agreement"], share),
                )
            )
    return found


def _value(figure: Value, form: Callable[[float | None], str]) -> str:
    return with_interval(figure.value, figure.low, figure.high, form)


def _ratios(sides: Iterable[Side], letters: Mapping[str, str]) -> list[ArmRatio]:
    """Each ratio once, though the files of both artifacts have it; of artifacts of the page."""
    found = {
        (each.figure, each.device, each.prompt, each.output, each.of, each.against): each
        for side in sides
        for each in side.bench.ratios
        if each.of in letters and each.against in letters
    }
    return list(found.values())


def _label(ratio: ArmRatio, letters: Mapping[str, str]) -> str:
    one, other = letters[ratio.of], letters[ratio.against]
    return f"{one} against {other}, {ratio.figure}, {ratio.device}, {ratio.prompt} + {ratio.output}"


def _ratio_text(ratio: ArmRatio) -> str:
    text = with_interval(ratio.value, ratio.low, ratio.high, lambda value: f"{value:.3f}")
    return f"x {text}, {ratio.pairs} pairs"


def _row(letter: str, cell: Cell, device: DeviceRecord) -> Row:
    summaries = [cell.summary("prefill"), cell.summary("decode")]
    kind, verdict = "passed", "measured"
    if cell.failed:
        kind, verdict = "failed", "failed"
    elif not all(each is not None and each.is_reliable for each in summaries):
        kind, verdict = "doubtful", "UNRELIABLE"
    if device.is_emulated and not cell.failed:
        kind, verdict = "doubtful", "emulated: no speed"
    cold, left = cell.cold, kept(cell.sustained)
    model = str(device.facts.get("model", ""))
    loaded = "" if cold is None or cold.load_seconds is None else f"{short(cold.load_seconds)} s + "
    return Row(
        letter=letter,
        device=f"{cell.device} ({model})" if model else cell.device,
        lengths=f"{cell.prompt} + {cell.output}",
        prefill=_speed(cell, "prefill"),
        decode=_speed(cell, "decode"),
        cold=""
        if cold is None or cold.first_token_seconds is None
        else f"{loaded}{short(1e3 * cold.first_token_seconds)} ms",
        peak=size_text(cell.peak_bytes) if cell.peak_bytes else "",
        text=f"{cell.text.agreed} of {cell.text.of}" if cell.text.of else "not checked",
        kept="" if left is None else f"{100 * left.share:.0f} %",
        kind=kind,
        verdict=verdict,
        reason=cell.failed,
    )


def _curve(name: str, points: Sequence[Point]) -> Curve:
    """A series as at most `_PARTS` medians, so that single slow runs do not hide its course."""
    length = max(1.0, (points[-1].seconds + 1) / _PARTS)
    parts: dict[int, list[float]] = {}
    for point in points:
        parts.setdefault(int(point.seconds / length), []).append(point.decode)
    middles = [round((part + 0.5) * length) for part in parts]
    return Curve(name, middles, [median(values) for values in parts.values()])


def _speed(cell: Cell, figure: Figure) -> str:
    found = cell.summary(figure)
    if found is None:
        return ""
    return f"{short(found.median)} [{short(found.smallest)}, {short(found.largest)}]"
