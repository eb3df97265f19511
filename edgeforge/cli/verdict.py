"""What `verify` prints: a verdict for each artifact, then the figures that matter.

Every line fits 80 columns, whatever the terminal's width. Long names and many artifacts move the
figures under each other instead of cutting or folding them.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeforge.cards.figures import number
from edgeforge.cli.bound_lines import bound_lines, doubtful_lines
from edgeforge.cli.columns import COLUMN, LABEL, MOST_COLUMNS, WIDTH, row, wrapped
from edgeforge.cli.exits import one_line
from edgeforge.cli.printable import console as escaping_console
from edgeforge.cli.printable import printable
from edgeforge.sizes import short, size_text
from edgeforge.verification.sample import RANDOM_TOKENS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from edgeforge.verification.evaluation import Evaluation
    from edgeforge.verification.intervals import Interval


_HEADING, _GOOD, _FAIR, _BAD = "bold", "bold green", "bold yellow", "bold red"

_MEANING = (
    "SOUND means that every stored weight equals the weight store's, bit for bit, that what ships "
    "ran here as an app runs it, that all logits are finite numbers, and that no figure is out of "
    "its bound."
)
_TERMS = (
    "Quantization error: what rounding the weights costs.",
    "Lowering error: what the runtime's own arithmetic adds.",
)


@dataclass(frozen=True)
class _Figure:
    """A line of the summary: one value for each artifact, and what stands under it."""

    label: str
    values: list[str]
    below: list[str]


def print_results(
    results: Mapping[Path, Evaluation], asked: Sequence[Path], *, full: bool = False
) -> None:
    """Prints what was found.

    Args:
        results: by artifact, in order.
        asked: the folders that the user named.
        full: print every figure, in tables as wide as they have to be.
    """
    from edgeforge.cli.tables import evaluation_tables, limit_lines

    console = _console()
    rows = labelled(results)
    lines = verdict_lines(rows) if full else summary_lines(rows, asked)
    for line in lines:
        # No wrapping: every line is as long as it should be.
        console.print(line, soft_wrap=True, highlight=False)
    if not full:
        return
    console.print()
    for table in evaluation_tables(list(rows.values())):
        # A log or a pipe has no width: there the table is as wide as its longest cells.
        if not console.is_terminal:
            wide = console.options.update(max_width=10_000)
            console.width = console.measure(table, options=wide).maximum
        console.print(table)
    for text in limit_lines(list(rows.values())):
        print(printable(text))


def _float(evaluations: Sequence[Evaluation]) -> str:
    """What the artifacts are held against."""
    layers = {each.exit_layer for each in evaluations} - {None}
    cut = f", cut after layer {' or '.join(map(str, sorted(layers, key=str)))} as" if layers else ""
    whose = " the artifact is" if len(evaluations) == 1 else " the artifacts are"
    names = dict.fromkeys(name for each in evaluations for name in each.adapters)
    merged = f" with {' and '.join(names)} merged" if names else " as it was"
    return f"FLOAT is the checkpoint{merged}{cut}{whose if cut else ''}. KL is in nats a token."


def summary_lines(rows: Mapping[str, Evaluation], asked: Sequence[Path]) -> list[Text]:
    """The verdicts, the figures, what they were measured on, and what to do next.

    Args:
        rows: what was found, by the label of `labelled`.
        asked: the folders that the user named.
    """
    from rich.text import Text

    labels, evaluations = list(rows), list(rows.values())
    lines = [*verdict_lines(rows), Text(), *_figure_lines(rows), Text()]
    checked = bound_lines(labels, evaluations)
    lines += [*checked, Text()] if checked else []
    for sentence in (_float(evaluations), *_TERMS, *_measured_on(evaluations), _MEANING):
        lines += wrapped(sentence, hanging=2)
    for sentence in _about_shipped(labels, evaluations):
        lines += wrapped(sentence, hanging=2)
    for label, result in rows.items():
        if result.routing is not None:
            lines += wrapped(f"{label}: {result.routing.words}.", hanging=2)
    for sentence in _about_devices(evaluations):
        lines += wrapped(sentence, hanging=2)
    for label, result in rows.items():
        lines += doubtful_lines(label, result)
        for each in result.with_adapters:
            words = (
                f"{label} with adapter {each.name}, on {each.tokens:,} tokens: KL from FLOAT with "
                f"it {number(each.total.kl_mean)} (quantization {number(each.quantization.kl_mean)}"
                f", lowering {number(each.lowering.kl_mean)}); it moves FLOAT by "
                f"{number(each.change.kl_mean)}."
            )
            lines += wrapped(words, hanging=2)
        if result.limits:
            words = f"{label} ran in EdgeForge's interpreter, not in Apple's runtime."
            lines += wrapped(words, hanging=2)
        if result.other_processor:
            words = (
                f"{label}: {len(result.weights_unlike_store)} weights are what its manifest "
                f"records, but not the weight store's: another kind of processor exported it, on "
                f"which calibration rounds otherwise. Its lowering error includes the difference."
            )
            lines += wrapped(words, hanging=2)
        if result.rounds_too_much:
            words = (
                f"{label}: the lowering error is large, because the runtime rounds activations to "
                f"8 bits. export --activations float avoids that, and is slower."
            )
            lines += wrapped(words, hanging=2)
    return [*lines, Text(), *_next_lines(evaluations, asked)]


def verdict_lines(rows: Mapping[str, Evaluation]) -> list[Text]:
    """One line for each artifact and place: what was checked of it, and how close it is."""
    from rich.cells import cell_len
    from rich.text import Text

    widest = max(map(cell_len, rows))
    lines = []
    for label, result in rows.items():
        word, style, facts = _verdict(result)
        verdict = Text.assemble((word, style), "  ", "; ".join(facts))
        if widest + 2 + verdict.cell_len <= WIDTH:
            padding = " " * (widest + 2 - cell_len(label))
            lines.append(Text.assemble((label, _HEADING), padding, verdict))
        else:
            lines += wrapped(label, style=_HEADING)
            lines.append(Text.assemble("  ", verdict))
    return lines


def _verdict(result: Evaluation) -> tuple[str, str, list[str]]:
    """The word, its style, and the facts behind it."""
    runtime = result.runtime.split(" (")[0].split(" ")[0]
    ran = "ran in an interpreter" if result.limits else f"ran in {runtime}"
    weights, ratio = "weights bit-exact", f"{result.perplexity_ratio:.3f}"
    if not result.stored_weights_equal:
        weights = f"{len(result.weights_unlike_store)} weights unlike the store's"
    if result.not_finite:
        # The first of FLOAT, QUANTIZED and ARTIFACT is where it begins.
        model, found = next(iter(result.not_finite.items()))
        where = f"NaN or inf in {model.upper()} at {found.positions} of {found.of}"
        return "NOT FINITE", _BAD, [where, weights]
    if result.greedy_float.not_finite:
        return "NOT FINITE", _BAD, ["NaN or infinite logits in greedy text", weights]
    failed = [each.name for each in result.checks if each.verdict == "failed"]
    if failed and (result.stored_weights_equal or result.other_processor):
        more = f" and {len(failed) - 1} more" if failed[1:] else ""
        return "FAILED", _BAD, [f"{failed[0]}{more} out of bounds", weights]
    if result.other_processor:
        facts = ["weights as its manifest records", ran, f"perplexity x {ratio}"]
        return "AS RECORDED", _FAIR, facts
    if not result.stored_weights_equal:
        return "OTHER WEIGHTS", _BAD, [weights, ran]
    return "SOUND", _GOOD, [weights, ran, f"perplexity x {ratio}"]


def _figure_lines(rows: Mapping[str, Evaluation]) -> list[Text]:
    """The figures side by side where they fit, else one artifact under the other."""
    from rich.cells import cell_len
    from rich.text import Text

    labels, evaluations = list(rows), list(rows.values())
    figures = _figures(evaluations)
    recipes = list(dict.fromkeys(result.recipe for result in evaluations))
    corner = one_line(f"recipe {recipes[0]}") if len(recipes) == 1 else ""
    lines = []
    if cell_len(corner) > LABEL:
        lines, corner = wrapped(corner), ""
    if 1 < len(labels) <= MOST_COLUMNS and max(map(cell_len, labels)) <= COLUMN:
        lines.append(row(corner, labels, style=_HEADING))
        for figure in figures:
            lines.append(row(figure.label, figure.values))
            if any(figure.below):
                lines.append(row("", figure.below))
        return lines
    for index, label in enumerate(labels):
        if index:
            lines.append(Text())
        if cell_len(label) <= COLUMN:
            lines.append(row(corner, [label], style=_HEADING))
        else:
            lines += wrapped(label, style=_HEADING)
        for figure in figures:
            lines.append(row(figure.label, [figure.values[index], figure.below[index]]))
    return lines


def _figures(results: list[Evaluation]) -> list[_Figure]:
    ratios = [result.perplexity_ratio for result in results]
    known = [result.intervals for result in results]
    figures = [
        _Figure(
            "perplexity / FLOAT's",
            [_ratio(value) for value in ratios],
            [_interval(None if each is None else each.perplexity_ratio, _ratio) for each in known],
        )
    ]
    for label, name, figure, form in (
        ("KL from FLOAT", "total", "kl_mean", short),
        ("  quantization error", "quantization", "kl_mean", short),
        ("  lowering error", "lowering", "kl_mean", short),
        ("same top-1 as FLOAT", "total", "top1_agreement", _share),
    ):
        if name == "total" and figure == "top1_agreement" and any(r.shipped for r in results):
            figures.append(_shipped_figure(results))
        values = [getattr(getattr(result, name), figure) for result in results]
        intervals = [
            None if each is None else getattr(getattr(each, name), figure) for each in known
        ]
        below = [_interval(each, form) for each in intervals]
        figures.append(_Figure(label, [form(value) for value in values], below))
    speeds = [
        ""
        if result.timings is None
        else f"{short(result.timings.decode_tokens_per_second)} tokens/s"
        for result in results
    ]
    label = "size; decode speed" if any(speeds) else "size"
    return [*figures, _Figure(label, [size_text(r.artifact_bytes) for r in results], speeds)]


def _shipped_figure(results: list[Evaluation]) -> _Figure:
    """The lowering error of what ships."""
    known = [result.shipped for result in results]
    return _Figure(
        "  of what ships",
        ["" if each is None else short(each.kl_mean) for each in known],
        [_interval(None if each is None else each.interval, short) for each in known],
    )


def _about_shipped(labels: Sequence[str], results: Sequence[Evaluation]) -> list[str]:
    """How far what ships was run, what it was held against, and what was left out."""
    texts: list[str] = []
    counts: list[str] = []
    for label, result in zip(labels, results, strict=True):
        shipped = result.shipped
        if shipped is None:
            continue
        texts.append(f"What ships ran over {one_line(shipped.text)}, as an app runs it.")
        if shipped.unreached:
            texts.append(
                f"It did not run at {shipped.unreached} of the declared context, which takes "
                f"long: --tokens all does."
            )
        apart, words = shipped.all_positions, ""
        if apart is not None:
            words = (
                f", and {apart.tokens} against the graph of all positions, whose logits differ by "
                f"up to {short(apart.max_difference)}"
            )
        left = 0 if result.routing is None else result.routing.apart
        if left:
            words += (
                f"; at {left:,} others the two graphs chose other experts there or before, and "
                f"were not held against each other"
            )
        counts.append(
            f"{label}: {shipped.positions:,} of its positions are held against QUANTIZED{words}."
        )
    return [*dict.fromkeys(texts), *counts]


def _measured_on(results: list[Evaluation]) -> list[str]:
    """Which tokens the figures are of, a sentence for each sample."""
    sentences = []
    for result in results:
        if result.text == RANDOM_TOKENS:
            what = f"{result.tokens:,} {result.text}"
        elif result.tokens >= result.text_tokens:
            what = f"all {result.tokens:,} tokens of {one_line(result.text)}"
        else:
            what = (
                f"{result.tokens:,} of the {result.text_tokens:,} tokens of "
                f"{one_line(result.text)}, in blocks spread evenly over it"
            )
        sentences += [f"Measured on {what}.", _about_intervals(result)]
    return list(dict.fromkeys(sentences))


def _about_intervals(result: Evaluation) -> str:
    if result.intervals is None:
        return "That is too little text for 95 % intervals."
    rough = "rough " if result.intervals.unit_blocks < 1 else ""
    return f"[ ] are {rough}95 % intervals for texts like this one, by a bootstrap of its blocks."


def _next_lines(results: list[Evaluation], asked: Sequence[Path]) -> list[Text]:
    """The commands that tell more."""
    from rich.text import Text

    options = {"--full": "every figure"}
    if any(result.limits for result in results):
        options["--full"] += "; the interpreter's limits"
    if any(result.tokens < result.text_tokens for result in results):
        options["--tokens all"] = "every token of the text"
    folders = " ".join(shlex.quote(str(folder)) for folder in asked)
    widest = max(map(len, options)) + 2
    room = WIDTH - len("edgeforge verify  ") - widest - max(map(len, options.values()))
    if len(folders) > room or not folders.isprintable():
        folders = "DIR"
    return [
        Text(f"edgeforge verify {folders} {option:<{widest}}{meaning}")
        for option, meaning in options.items()
    ]


def labelled(results: Mapping[Path, Evaluation]) -> dict[str, Evaluation]:
    """The evaluations of each artifact, here and elsewhere, by the shortest labels that differ."""
    evaluations = list(results.values())
    targets = [result.target for result in evaluations]
    recipes = [one_line(f"{result.target} {result.recipe}") for result in evaluations]
    paths = [one_line(str(folder)) for folder in results]
    numbered = [f"{path} ({at})" for at, path in enumerate(paths, 1)]
    choices = (targets, recipes, paths, numbered)
    names = next(names for names in choices if len({*names}) == len(names))
    rows = {}
    for name, result in zip(names, evaluations, strict=True):
        rows[name] = result
        for there in result.elsewhere:
            device = one_line(there.device)
            rows[device if len(names) == 1 else f"{name} on {device}"] = there
    return rows


def _about_devices(results: Sequence[Evaluation]) -> list[str]:
    """Where else artifacts ran, and what that cannot tell, each once."""
    sentences = []
    for result in results:
        if result.device_facts is not None:
            facts = [one_line(str(result.device_facts[key])) for key in ("name", "model", "system")]
            sentences.append("{} is {}, {}.".format(*facts))
            sentences += [one_line(f"{limit.rstrip('.')}.") for limit in result.device_limits]
    return list(dict.fromkeys(sentences))


def _interval(interval: Interval | None, form: Callable[[float], str]) -> str:
    if interval is None or not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return ""
    if interval.low == interval.high:
        # Drawing again from what is all alike tells nothing of what was not seen.
        return "no difference seen"
    return f"[{form(interval.low)}, {form(interval.high)}]"


def _ratio(value: float) -> str:
    return f"{value:.4f}" if value < 10 else short(value)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _console() -> Console:
    # NO_COLOR asks for no colour; bold is left out there too, as in a pipe.
    plain = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
    return escaping_console(color_system=None) if plain else escaping_console()
