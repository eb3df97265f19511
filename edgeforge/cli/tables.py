"""Tables for people: what verify and inspect print."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edgeforge.sizes import size_text

if TYPE_CHECKING:
    from rich.table import Table

    from device_harness.timing import Timings
    from edgeforge.verification.evaluation import Evaluation
    from edgeforge.verification.intervals import DivergenceIntervals, Interval, Intervals
    from edgeforge.verification.metrics import Divergence
    from exporters.manifest import Manifest
    from exporters.structure import Section


def evaluation_tables(results: list[Evaluation]) -> list[Table]:
    """Accuracy and cost, one column an artifact."""
    accuracy = _table("Accuracy", results)
    known = [result.intervals for result in results]
    rows: list[tuple[str, list[str]]] = [
        ("tokens", [_tokens_cell(result) for result in results]),
        ("intervals [ ]", [_intervals_cell(each) for each in known]),
    ]
    for name in ("float", "quantized", "artifact"):
        figures = [
            f"{result.perplexity[name].value:.4f}"
            + _interval(None if each is None else each.perplexity[name], ".4f")
            for result, each in zip(results, known, strict=True)
        ]
        rows.append((f"perplexity {name.upper()}", figures))
    ratios = [
        f"{result.perplexity_ratio:.4f}"
        + _interval(None if each is None else each.perplexity_ratio, ".4f")
        for result, each in zip(results, known, strict=True)
    ]
    rows.append(("perplexity ARTIFACT / FLOAT", ratios))
    for title, pick in (
        ("quantization error: QUANTIZED against FLOAT", "quantization"),
        ("lowering error: ARTIFACT against QUANTIZED", "lowering"),
        ("total: ARTIFACT against FLOAT", "total"),
    ):
        rows.append((f"[bold]{title}[/bold]", ["" for _ in results]))
        intervals = [None if each is None else getattr(each, pick) for each in known]
        rows.extend(_divergence_rows([getattr(r, pick) for r in results], intervals))
    rows.append(("[bold]greedy text[/bold]", ["" for _ in results]))
    for label, pick in (("QUANTIZED", "greedy_quantized"), ("FLOAT", "greedy_float")):
        agreements = [getattr(r, pick) for r in results]
        rows.append(
            (
                f"  tokens before it leaves {label}'s",
                [f"{a.same:.1f} of {a.tokens}  ({a.prompts} prompts)" for a in agreements],
            )
        )
    rows.append(
        (
            "stored integers and scales",
            [
                "equal to the store's, bit for bit"
                if r.stored_weights_equal
                else f"{len(r.weights_unlike_store)} weights unlike the store's"
                for r in results
            ],
        )
    )
    for label, cells in rows:
        accuracy.add_row(label, *cells)
    return [accuracy, *_cost_table(results)]


def limit_lines(results: list[Evaluation]) -> list[str]:
    """What the runtimes that stood in for others cannot know, below the tables."""
    lines = []
    for result in results:
        if result.routing is not None:
            lines.append(f"{result.target} {result.recipe}: {result.routing.words}.")
        if result.limits:
            lines.append(f"{result.target} {result.recipe} was run by {result.runtime}.")
            lines.append("What that cannot know:")
            lines += [f"  - {limit}" for limit in result.limits]
    return lines


def _cost_table(results: list[Evaluation]) -> list[Table]:
    from rich.markup import escape

    cost = _table("Cost on this machine", results)
    cost.add_row("runtime", *(escape(r.runtime) for r in results))
    cost.add_row("artifact", *(size_text(r.artifact_bytes) for r in results))
    cost.add_row("bits a weight", *(f"{r.bits_per_weight:.3f}" for r in results))
    timed = [r.timings for r in results]
    if any(t is None for t in timed):
        return [cost]
    known = [t for t in timed if t is not None]
    cost.add_row("load", *(f"{t.load_seconds:.2f} s" for t in known))
    cost.add_row("time to first token", *(f"{t.first_token_seconds * 1e3:.1f} ms" for t in known))
    cost.add_row(
        "prefill",
        *(f"{t.prefill_tokens_per_second:.0f} tokens/s at {t.prefill_tokens}" for t in known),
    )
    cost.add_row("decode", *(f"{t.decode_tokens_per_second:.0f} tokens/s" for t in known))
    cost.add_row("  eight of ten tokens", *map(_spread, known))
    cost.add_row(
        "peak memory",
        *(f"{size_text(t.peak_bytes)} ({size_text(t.loaded_bytes)} by loading)" for t in known),
    )
    return [cost]


def _spread(timings: Timings) -> str:
    slow, fast = timings.slow_tokens_per_second, timings.fast_tokens_per_second
    return "" if slow is None or fast is None else f"{slow:.0f} to {fast:.0f} tokens/s"


def _table(title: str, results: list[Evaluation]) -> Table:
    from rich.markup import escape

    table = titled(title)
    table.add_column("")
    for result in results:
        table.add_column(escape(f"{result.target} {result.recipe}"), overflow="fold")
    return table


def _tokens_cell(result: Evaluation) -> str:
    from rich.markup import escape

    whole = "" if result.tokens >= result.text_tokens else f" (of {result.text_tokens})"
    return f"{result.tokens}{whole} of {escape(result.text)}"


def _intervals_cell(intervals: Intervals | None) -> str:
    if intervals is None:
        return "none: too few blocks"
    unit = {0.5: "half blocks", 1: "blocks"}.get(
        intervals.unit_blocks, f"runs of {intervals.unit_blocks:.0f} blocks"
    )
    return f"{intervals.level:.0%}, {intervals.resamples} draws of {intervals.units} {unit}"


def _interval(interval: Interval | None, form: str) -> str:
    """What stands behind a mean; a bracket in rich's markup is escaped."""
    if interval is None:
        return ""
    return rf"  \[{interval.low:{form}}, {interval.high:{form}}]"


def _divergence_rows(
    results: list[Divergence], intervals: list[DivergenceIntervals | None]
) -> list[tuple[str, list[str]]]:
    def means(name: str, form: str) -> list[str]:
        return [
            f"{getattr(result, name):{form}}"
            + _interval(None if each is None else getattr(each, name), form)
            for result, each in zip(results, intervals, strict=True)
        ]

    return [
        ("  KL mean", means("kl_mean", ".2e")),
        ("  KL p99 / max", [f"{d.kl_p99:.2e} / {d.kl_max:.2e}" for d in results]),
        ("  top-1 agreement", means("top1_agreement", ".2%")),
        ("  top-5 overlap", means("top5_overlap", ".2%")),
        (
            "  largest logit difference",
            [f"{d.max_difference:.3g}  ({d.relative_difference:.1e} of range)" for d in results],
        ),
    ]


def inspect_tables(manifest: Manifest) -> list[Table]:
    """What an artifact holds: its files and the formats of its weights."""
    from rich.markup import escape

    formats: dict[str, Counter[str]] = {}
    for record in manifest.weights.values():
        size = 1
        for dim in record.shape:
            size *= dim
        row = formats.setdefault(record.format, Counter())
        row["weights"] += 1
        row["parameters"] += size
        row["worst"] = max(row["worst"], round(record.relative_error * 1e6))
    summary = titled("Weights")
    for heading in ("format", "tensors", "parameters", "largest relative error"):
        summary.add_column(heading)
    for name, row in formats.items():
        worst = f"{row['worst'] / 1e6:.2e}" if row["worst"] else "exact"
        summary.add_row(escape(name), str(row["weights"]), f"{row['parameters']:,}", worst)
    files = titled("Files")
    for heading in ("file", "size", "SHA-256"):
        files.add_column(heading)
    for name, file in manifest.files.items():
        files.add_row(escape(name), size_text(file.size), escape(file.sha256[:16]))
    return [summary, files]


def section_tables(sections: tuple[Section, ...]) -> list[Table]:
    """What the artifact's files consist of, as its target reads them."""
    from rich.markup import escape

    tables = []
    for section in sections:
        table = titled(section.title)
        for heading in section.columns:
            table.add_column("size" if heading == "bytes" else heading, overflow="fold")
        for row in section.rows:
            cells = (
                cell
                if isinstance(cell, str)
                else size_text(cell)
                if name == "bytes"
                else f"{cell:,}"
                for name, cell in zip(section.columns, row, strict=True)
            )
            table.add_row(*map(escape, cells))
        tables.append(table)
    return tables


def weight_table(manifest: Manifest) -> Table:
    """Every weight's shape, format and error; experts of a layer that are alike share a row."""
    from rich.markup import escape

    from edgeforge.cli.weight_rows import weight_rows

    table = titled("Each weight")
    for heading in ("weight", "shape", "format", "by", "relative error"):
        table.add_column(heading, overflow="fold")
    for row in weight_rows(manifest.weights):
        table.add_row(*map(escape, row))
    return table


def titled(title: str) -> Table:
    """An empty table as all of them look: its title on the left, one line under the headings."""
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
