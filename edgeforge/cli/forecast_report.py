"""What `edgeforge plan` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeforge.sizes import short, size_text

if TYPE_CHECKING:
    from rich.table import Table

    from edgeforge.forecast.forecast import Forecast
    from edgeforge.forecast.rows import Row, TargetForecast


def head_lines(forecast: Forecast) -> list[str]:
    """What stands above the tables: the model, the phone and its limit."""
    phone = forecast.phone
    figures = [
        str(phone.soc.value),
        f"{phone.memory.number:g} GB",
        "bandwidth not known" if phone.bandwidth is None else f"{phone.bandwidth.number:g} GB/s",
        *([] if phone.npu is None else [f"{phone.npu.number:g} trillion operations/s (NPU)"]),
    ]
    return [
        f"{forecast.model}: {forecast.model_type}, {forecast.parameters:,} parameters, context "
        f"{forecast.context} tokens" + _windows(forecast),
        f"{phone.title}: {', '.join(figures)}",
        forecast.memory.told,
        *_named_adapters(forecast),
        *([] if forecast.mixture is None else [forecast.mixture.line(forecast.parameters)]),
    ]


def _named_adapters(forecast: Forecast) -> list[str]:
    names = ", ".join(forecast.adapters)
    return [f"adapters beside the base: {names}"] if names else []


def _windows(forecast: Forecast) -> str:
    """The windows of attention, as a clause; empty where there are none."""
    if forecast.window:
        return f", window {forecast.window}"
    count = sum(forecast.windows.values())
    each = [
        f"{window} in {n} of {count} layers" for window, n in forecast.windows.items() if window
    ]
    return f", windows of {', '.join(each)}" if each else ""


def target_table(forecast: Forecast, made: TargetForecast) -> Table:
    """The recipes of one target, the best one marked."""
    from rich.markup import escape

    from edgeforge.cli.tables import titled

    table = titled(f"{made.target}: at most, from {forecast.phone.title}'s figures")
    columns = ("", "recipe", "bits", "weights", "memory", "fits", "decode/s")
    for heading in (*columns, f"at {forecast.context}", "prefill/s", "KL*"):
        table.add_column(heading, justify="left" if heading in ("", "recipe", "fits") else "right")
    for row in made.rows:
        table.add_row(*(escape(cell) for cell in _cells(row, row.recipe == made.best)))
    return table


def target_lines(made: TargetForecast) -> list[str]:
    """What stands below a target's table."""
    lines = []
    if made.rows:
        row = made.rows[0]
        runs = f"runs of {row.work.run_tokens} tokens"
        lines.append(
            f"memory: weights as the runtime holds them, {_adapters(row)}caches "
            f"{size_text(row.caches)}, buffers {size_text(row.buffers)} ({runs})"
        )
        if row.experts:
            each = next((row for row in made.rows if row.recipe == made.best), made.rows[-1])
            lines.append(
                f"a token reads {size_text(each.work.weights)} of the weights of {each.recipe}, "
                f"{size_text(each.stored)}; experts are {size_text(each.experts)} of them"
            )
    if made.best is None:
        lines.append(f"best: {made.needs}")
        if made.mixtures:
            lines.append(f"mixtures that fit, at int4: {', '.join(made.mixtures)}")
    else:
        lines.append(f"best: {made.best}" + (f"; {made.needs}" if made.needs else ""))
    if made.refused:
        lines.append(f"{made.target} cannot hold: {', '.join(made.refused)} (--json says why)")
    return lines


def foot_lines(forecast: Forecast) -> list[str]:
    """What stands below the tables: the rules, published measurements and sources."""
    from edgeforge.forecast.accuracy import measured_model
    from edgeforge.forecast.limits import HEADROOM
    from edgeforge.forecast.rows import RULE

    least, most = forecast.elsewhere
    lines = [
        f"fits: yes with {HEADROOM:.0%} of the limit left; entitled: so with the entitlement "
        f"increased-memory-limit; tight: with less left; no",
        "decode/s, prefill/s: tokens a second that memory bandwidth, and the NPU's arithmetic for "
        "coreml, allow at most",
        f"* KL of the recipe's weights on {measured_model()}, nats a token: it orders recipes; "
        f"`verify` measures yours",
        RULE,
    ]
    if forecast.not_sized:
        lines.append(f"not sized, as they depend on the weights: {', '.join(forecast.not_sized)}")
    if forecast.published:
        lines.append(f"published measurements on {forecast.phone.title}:")
    else:
        lines.append(
            f"no published measurement with a comparable bound was found for "
            f"{forecast.phone.title}; on other phones they reached {least:.0%} to {most:.0%} of "
            f"their bound"
        )
    for each in forecast.published:
        share = forecast.share(each)
        prefill = "" if each.prefill is None else f", prefill {each.prefill:g}"
        of_bound = "" if share is None else f", {share:.0%} of {each.decode / share:.1f}"
        lines.append(
            f"  {each.model}, {each.weights}, {each.runtime}: {each.decode:g} tokens/s{of_bound}"
            f"{prefill} [{each.sources[0]}]" + (f" ({each.note})" if each.note else "")
        )
    lines.append("sources:")
    for key in forecast.cited():
        source = forecast.profiles.sources[key]
        lines.append(f"  [{key}] {source.title}" + (f" <{source.url}>" if source.url else ""))
    return lines


def _adapters(row: Row) -> str:
    """What the adapters take, as a part of a list; empty where there are none."""
    return f"adapters {size_text(row.adapters)}, " if row.adapters else ""


def _cells(row: Row, is_best: bool) -> tuple[str, ...]:
    return (
        ">" if is_best else "",
        row.recipe,
        f"{row.bits:.2f}",
        size_text(row.stored),
        size_text(row.total),
        row.verdict,
        _speed(row.decode),
        _speed(row.decode_full),
        _speed(row.prefill),
        "-" if row.kl is None else short(row.kl),
    )


def _speed(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
