"""A measurement as text of at most 80 columns, and its runs as wider lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from device_harness.measuring.bench import Bench, DeviceRecord
from device_harness.measuring.kept_speed import kept
from device_harness.measuring.record import Cell, Figure, Run
from device_harness.measuring.statistics import LARGEST_SPREAD, Summary
from edgeforge.cards.figures import with_interval
from edgeforge.measurements.history import History, device_models
from edgeforge.sizes import short, size_text

WIDTH: Final = 80
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FIGURES: Final[tuple[tuple[Figure, str], ...]] = (("prefill", "prefill"), ("decode", "decode"))
_MODULE_FIGURES: Final[tuple[tuple[Figure, str], ...]] = (("decode", "calls"),)
_RUN_HEADS: Final = (
    "  run  start       outcome   first token  decode, tokens/s  device     why",
    "  run  start       outcome    first call   further calls/s  device     why",
)


def bench_lines(bench: Bench) -> list[str]:
    """What was found, device by device."""
    return list(_lines(bench))


def change_lines(bench: Bench, history: History) -> list[str]:
    """What changed since the last comparable entries of a history."""
    lines, models = [""], device_models(bench)
    if history.damaged:
        lines += _wrapped(f"{history.damaged} lines of {history.path} cannot be read")
    for cell in bench.cells:
        name = f"{cell.artifact.folder} on {cell.device}, {cell.lengths}"
        changes = [] if cell.failed else history.changes(cell, models[cell.device])
        if not changes:
            lines += _wrapped(f"{name}: no comparable entry in {history.path} yet")
            continue
        since = datetime.fromtimestamp(changes[0].since, UTC).strftime("%Y-%m-%d %H:%M UTC")
        lines += _wrapped(f"{name}, since {since}:")
        for each in changes:
            told = "no run is like one of then" if each.apart else "within the runs' own spread"
            if cell.shapes and each.figure == "prefill":
                continue  # the first call of a run, which the others follow
            name = "call" if cell.shapes else each.figure
            words = f"{name}: {short(each.before)} to {short(each.now)} {cell.unit}/s, "
            lines += _wrapped(f"  {words}{100 * (each.ratio - 1):+.1f} %, {told}", hang=4)
    return lines


def run_lines(bench: Bench) -> list[str]:
    """Every run of every cell, failed ones too."""
    lines = []
    for cell in bench.cells:
        lines += [
            "",
            f"{cell.artifact.folder} on {cell.device}, {cell.lengths}:",
            _RUN_HEADS[bool(cell.shapes)],
        ]
        lines += [_run_line(number, run) for number, run in enumerate(cell.runs, 1)]
    return lines


def _lines(bench: Bench) -> Iterator[str]:
    folders = list(dict.fromkeys(cell.artifact.folder for cell in bench.cells))
    letters = dict(zip(folders, _LETTERS, strict=False)) if len(folders) > 1 else {}
    for number, device in enumerate(bench.devices):
        if number:
            yield ""
        yield from _wrapped(_device_words(device))
        if device.failure:
            yield from _wrapped(f"  FAILED: {device.failure}", hang=4)
        for limit in device.limits:
            yield from _wrapped(f"  note: {limit}", hang=4)
        if device.is_emulated:
            yield from _wrapped("  An emulated processor: its times are no speed.", hang=2)
        cells = [cell for cell in bench.cells if cell.device == device.name]
        for point in dict.fromkeys((cell.prompt, cell.output) for cell in cells):
            of_point = [cell for cell in cells if (cell.prompt, cell.output) == point]
            yield from _point_lines(bench, of_point, letters)
    yield ""
    yield from _wrapped(
        "Medians of the warm runs that count [smallest, largest]; cold is the first run of a fresh "
        f"process. UNRELIABLE: a spread over {100 * LARGEST_SPREAD:.0f} % of the median."
    )
    if bench.ratios:
        yield from _wrapped(
            "Ratios are of runs that took turns; their [ ] are 95 % intervals of the median."
        )
    limits = dict.fromkeys(note for cell in bench.cells for note in cell.notes)
    for note in limits:
        yield from _wrapped(f"note: {note}")


def _point_lines(bench: Bench, cells: Sequence[Cell], letters: dict[str, str]) -> Iterator[str]:
    first = cells[0]
    rules = first.rules
    count = f"{rules.runs} warm run{'s' if rules.runs > 1 else ''}"
    begun = f" after {rules.warm_up} to warm up" if rules.warm_up else ""
    yield from _wrapped(f"  {first.lengths}, {count}{begun}", hang=4)
    for cell in cells:
        folder = cell.artifact.folder
        letter = f"{letters[folder]}  " if folder in letters else ""
        yield from _wrapped(f"  {letter}{cell.artifact.label}", hang=5)
        if cell.runtime:
            yield from _wrapped(f"     {cell.runtime}", hang=5)
        yield from _cell_lines(cell)
    yield from _cost_lines(cells, letters)
    # Where a processor is emulated, times compare nothing.
    ratios = () if bench.device(first.device).is_emulated else bench.ratios
    for ratio in ratios:
        if (ratio.device, ratio.prompt, ratio.output) != (first.device, first.prompt, first.output):
            continue
        one, other = (letters.get(each, each) for each in (ratio.of_folder, ratio.against_folder))
        text = with_interval(ratio.value, ratio.low, ratio.high, lambda value: f"{value:.3f}")
        figure = "calls" if first.shapes else ratio.figure
        yield f"  {one} against {other}: {figure} x {text}, {ratio.pairs} pairs"


def _cost_lines(cells: Sequence[Cell], letters: dict[str, str]) -> Iterator[str]:
    """Instructions of the others over the first one's: repeats differ by less than a thousandth."""
    first = cells[0]
    for cell in cells[1:]:
        for part in ("prefill", "decode"):
            own = (cell.instructions or {}).get(f"{part}.all")
            other = (first.instructions or {}).get(f"{part}.all")
            if own and other:
                one, two = letters[cell.artifact.folder], letters[first.artifact.folder]
                yield f"  {one} against {two}: instructions of {part} x {own / other:.3f}"


def _cell_lines(cell: Cell) -> Iterator[str]:
    if cell.failed:
        yield from _wrapped(f"     FAILED: {cell.failed}", hang=7)
        return
    for figure, label in _MODULE_FIGURES if cell.shapes else _FIGURES:
        summary = cell.summary(figure)
        if summary is not None:
            yield f"     {label:<9}{_summary_text(summary, cell.unit)}"
            if cell.shapes:
                slow, fast = (short(1e3 / each) for each in (summary.smallest, summary.largest))
                yield f"     {'a call':<9}{short(1e3 / summary.median)} ms [{fast}, {slow}]"
    cold, words = cell.cold, []
    if cold is not None and cold.first_token_seconds is not None:
        load = "" if cold.load_seconds is None else f"loaded in {short(cold.load_seconds)} s, "
        first = f"first {cell.unit[:-1]} {short(cold.first_token_seconds * 1e3)} ms"
        words.append(f"{cold.start}: {load}{first}")
    first_token = None if cell.shapes else cell.summary("first_token")
    if first_token is not None:
        words.append(f"warm: {short(first_token.median * 1e3)} ms")
    if cell.peak_bytes:
        words.append(f"peak {size_text(cell.peak_bytes)}")
    if words:
        yield from _wrapped(f"     {'; '.join(words)}", hang=5)
    yield from _wrapped(f"     {_text_words(cell)}", hang=5)
    for outcome in ("failed", "excluded"):
        runs = [run for run in cell.runs if run.outcome == outcome]
        if runs:
            yield from _wrapped(f"     {len(runs)} runs {outcome}: {runs[-1].reason}", hang=7)
    warm = [run.cool for run in cell.counted]
    if "unknown" in warm and (cell.rules.cool_to is not None or cell.rules.rest):
        yield from _wrapped("     The device does not say whether it was cool.", hang=5)
    yield from _other_lines(cell)


def _other_lines(cell: Cell) -> Iterator[str]:
    """What only some cells have."""
    if cell.sustained:
        found = kept(cell.sustained)
        words = f"sustained: {len(cell.sustained)} runs in {cell.rules.minutes:g} min"
        if found is not None:
            words += (
                f"; the last minute has {100 * found.share:.0f} % of the first's "
                f"{'' if cell.shapes else 'decode '}speed "
                f"({short(found.first)} to {short(found.last)} {cell.unit}/s)"
            )
        yield from _wrapped(f"     {words}", hang=5)
    if cell.instructions:
        counts = ", ".join(
            f"{part} {short(cell.instructions[f'{part}.all'] / 1e6)} M"
            for part in ("prefill", "decode")
            if f"{part}.all" in cell.instructions
        )
        yield from _wrapped(f"     instructions: {counts} a token; a cost, no latency", hang=5)
    if cell.runner is not None:
        figures = ", ".join(f"{name} {short(n)}" for name, n in cell.runner.figures.items())
        yield from _wrapped(f"     {cell.runner.parser} of {cell.runner.path}: {figures}", hang=5)


def _device_words(device: DeviceRecord) -> str:
    facts = [str(device.facts.get(name, "")) for name in ("model", "system", "processor")]
    cores = device.facts.get("cores")
    if isinstance(cores, list | tuple) and cores:
        facts.append(f"{len(cores)} cores")
    known = ", ".join(fact for fact in facts if fact)
    return f"{device.name}: {known}" if known else device.name


def _summary_text(summary: Summary, unit: str) -> str:
    ends = f"[{short(summary.smallest)}, {short(summary.largest)}]"
    words = f"{short(summary.median)} {unit}/s {ends}"
    if summary.spread is None:
        return f"{words}  one run: its spread is not known"
    if not summary.is_reliable:
        words += f"  UNRELIABLE, spread {100 * summary.spread:.0f} %"
    return words


def _text_words(cell: Cell) -> str:
    text = cell.text
    if text.verdict == "not checked":
        what = "outputs" if cell.shapes else "text"
        return f"{what}: not checked{f', as {text.reason}' if text.reason else ''}"
    if cell.shapes:
        return f"outputs: {text.agreed} of {text.of} are within the bound of the quantized module's"
    return f"text: {text.agreed} of {text.of} tokens are this host's choice"


def _run_line(number: int, run: Run) -> str:
    first = "" if run.first_token_seconds is None else f"{1e3 * run.first_token_seconds:.1f} ms"
    decode = run.figure("decode", 1)
    speed = "" if decode is None else short(decode)
    line = f"  {number:>3}  {run.start:<10}  {run.outcome:<8}  {first:>11}  {speed:>16}  "
    return f"{line}{run.cool:<9}  {run.reason}".rstrip()


def _wrapped(words: str, hang: int = 2) -> list[str]:
    return textwrap.wrap(
        words, WIDTH, subsequent_indent=" " * hang, break_on_hyphens=False, break_long_words=False
    )
