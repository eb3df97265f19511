"""Fills a weight store: every weight read once, in chunks of rows, by a few threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch

from quant.errors import QuantizationError
from quant.formats import packing
from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat
from quant.kernels import native
from quant.kernels.threads import single_threaded_torch
from quant.plans.algorithms import IMPORTED
from quant.plans.plan import Assignment, QuantPlan, matrix_shape
from quant.processors import default_threads
from quant.quantizers.damaged_rows import damage
from quant.quantizers.kmeans import PalettizedRows
from quant.quantizers.registry import PALETTIZERS, QUANTIZERS, Palettizer
from quant.quantizers.rtn import QuantizedRows

# Large enough that Python's share is small, small enough to stay in a core's cache.
CHUNK_WEIGHTS = 1 << 20


class WeightSource(Protocol):
    """What weights are read from: shapes by name, and rows on demand from any thread."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape by program weight name."""

    def pieces(self, name: str) -> Sequence[tuple[str, int]]:
        """What a weight is stacked from: the name and the rows of each part, in order.

        Rows are read within one part at a time, and messages name it.
        """

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop``: ``float32 | float16 | bfloat16 [stop - start, columns]``."""

    def imported_rows(self, name: str, start: int, stop: int, format: IntFormat) -> QuantizedRows:
        """Codes, scales and zero points of a piece of a weight that is stored in integers.

        Asked for only where the plan's algorithm is `quant.plans.algorithms.IMPORTED`. Codes and
        zero points are the checkpoint's; scales are rounded where the format's are narrower.
        """


class WeightSink(Protocol):
    """Where stored parts go: a store's writer."""

    def write(self, weight: str, part: str, at: int, data: memoryview) -> None:
        """Writes bytes ``at`` an offset within a part, from any thread."""

    def note(self, weight: str, relative_error: float) -> None:
        """Records how well a weight survived."""


@dataclass(frozen=True)
class _Chunk:
    weight: str
    assignment: Assignment
    start: int
    stop: int
    columns: int
    origin: str
    origin_row: int


def fill_store(
    source: WeightSource,
    plan: QuantPlan,
    writer: WeightSink,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Quantizes every weight of the plan into the store.

    Args:
        source: where weights come from.
        plan: what to make of each.
        writer: where they go.
        threads: how many to use; by default one per processor, four at most.
        progress: called with the number of weights done since the last call, from one thread at
            a time.

    Raises:
        QuantizationError: a NaN or infinite weight, or one that its format cannot hold; named.
    """
    chunks = list(_chunks(plan, source))
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in plan.weights}
    lock = Lock()

    def work(chunk: _Chunk) -> None:
        cost = _store_chunk(source, chunk, tables.get(chunk.weight), writer)
        with lock:
            costs[chunk.weight].append(cost)
            if progress is not None:
                progress((chunk.stop - chunk.start) * chunk.columns)

    count = threads or default_threads()
    with (
        single_threaded_torch(),
        ThreadPoolExecutor(count, thread_name_prefix="quantize") as pool,
    ):
        tables = _whole_tables(source, chunks, pool)
        _run(pool, [pool.submit(work, chunk) for chunk in chunks])
    for weight, chunk_costs in costs.items():
        # Exact sums, for chunks come in any order and the notes must not depend on it.
        squared_error, squared_norm = map(math.fsum, zip(*chunk_costs, strict=True))
        writer.note(weight, (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0)


def _run(pool: ThreadPoolExecutor, pending: Sequence[Future[None]]) -> None:
    """Waits for all, or for the first error, which stops the others."""
    try:
        done, _ = wait(pending, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _whole_tables(
    source: WeightSource, chunks: Sequence[_Chunk], pool: ThreadPoolExecutor
) -> dict[str, torch.Tensor]:
    """The tables of matrices that have one: a pass over their rows before the one that stores."""
    tables: dict[str, torch.Tensor] = {}
    by_weight: dict[str, list[_Chunk]] = {}
    for chunk in chunks:
        format = chunk.assignment.format
        if isinstance(format, PaletteFormat) and format.rows_per_group is None:
            by_weight.setdefault(chunk.weight, []).append(chunk)
    lock = Lock()
    for weight, parts in by_weight.items():
        assignment = parts[0].assignment
        assert isinstance(assignment.format, PaletteFormat)
        palettizer = PALETTIZERS[assignment.algorithm]
        total: list[torch.Tensor] = []

        def count(
            chunk: _Chunk, palettizer: Palettizer = palettizer, total: list[torch.Tensor] = total
        ) -> None:
            rows = source.read_rows(chunk.weight, chunk.start, chunk.stop)
            counts = palettizer.count_values(rows, name=chunk.origin, first_row=chunk.origin_row)
            with lock:
                if total:
                    total[0] += counts
                else:
                    total.append(counts)

        _run(pool, [pool.submit(count, chunk) for chunk in parts])
        tables[weight] = palettizer.table_of_counts(total[0], assignment.format)
    return tables


def _chunks(plan: QuantPlan, source: WeightSource) -> Iterator[_Chunk]:
    shapes = source.shapes()
    for name, assignment in plan.weights.items():
        _, columns = matrix_shape(shapes[name])
        step = max(1, CHUNK_WEIGHTS // columns)
        pieces = source.pieces(name)
        if isinstance(assignment.format, PaletteFormat):
            group = assignment.format.rows_per_group or 1
            step = max(1, step // group) * group
            if any(rows % group for _, rows in pieces):
                # Tables cover rows of two parts: messages name the whole.
                pieces = [(name, sum(rows for _, rows in pieces))]
        first = 0
        for origin, rows in pieces:
            if assignment.algorithm == IMPORTED:
                step = rows  # packed along the rows: a part of them costs as much as all
            for row in range(0, rows, step):
                stop = first + min(rows, row + step)
                yield _Chunk(name, assignment, first + row, stop, columns, origin, row)
            first += rows


def write_rows(writer: WeightSink, weight: str, start: int, made: QuantizedRows) -> None:
    """Writes quantized rows, from row ``start`` on, to their places."""
    parts = {"codes": made.codes, "scale": made.scale, "zero_point": made.zero_point}
    for part, value in parts.items():
        if value is not None:
            stride = value.shape[1] * value.element_size()
            writer.write(weight, part, start * stride, _bytes_of(value))


def write_palettes(
    writer: WeightSink, weight: str, start: int, first_table: int, made: PalettizedRows
) -> None:
    """Writes palettized rows, from row ``start`` and its table on, to their places."""
    for part, stored, first in (("codes", made.codes, start), ("lut", made.lut, first_table)):
        stride = stored.shape[1] * stored.element_size()
        writer.write(weight, part, first * stride, _bytes_of(stored))


def _store_chunk(
    source: WeightSource, chunk: _Chunk, table: torch.Tensor | None, writer: WeightSink
) -> tuple[float, float]:
    """Writes one chunk; returns the sums of squared errors and of squared weights."""
    format = chunk.assignment.format
    if isinstance(format, PaletteFormat):
        rows = source.read_rows(chunk.weight, chunk.start, chunk.stop)
        palettizer = PALETTIZERS[chunk.assignment.algorithm]
        if table is None:
            colours = palettizer.quantize_groups(
                rows, format, name=chunk.origin, first_row=chunk.origin_row
            )
        else:
            colours = palettizer.look_up_rows(rows, format, table)
        first_table = 0 if format.rows_per_group is None else chunk.start // format.rows_per_group
        write_palettes(writer, chunk.weight, chunk.start, first_table, colours)
        return colours.squared_error, colours.squared_norm
    if isinstance(format, IntFormat):
        made = _quantize(source, chunk, format)
        write_rows(writer, chunk.weight, chunk.start, made)
        return made.squared_error, made.squared_norm
    rows = source.read_rows(chunk.weight, chunk.start, chunk.stop)
    cast, squared_error, squared_norm = cast_rows(
        rows, format, chunk.origin, first_row=chunk.origin_row
    )
    writer.write(
        chunk.weight, "value", chunk.start * chunk.columns * cast.element_size(), _bytes_of(cast)
    )
    return squared_error, squared_norm


def _quantize(source: WeightSource, chunk: _Chunk, format: IntFormat) -> QuantizedRows:
    if chunk.assignment.algorithm == IMPORTED:
        return source.imported_rows(chunk.weight, chunk.start, chunk.stop, format)
    rows = source.read_rows(chunk.weight, chunk.start, chunk.stop)
    quantizer = QUANTIZERS[chunk.assignment.algorithm]
    return quantizer.quantize_rows(rows, format, name=chunk.origin, first_row=chunk.origin_row)


def stored_values(weight: torch.Tensor, assignment: Assignment, name: str = "") -> torch.Tensor:
    """What a matrix becomes by being stored, ``float32[rows, columns]``; nothing is written.

    Args:
        weight: ``float32 | float16 | bfloat16 [rows, columns]``.
        assignment: a format, and an algorithm that looks at weights alone.
        name: the weight's name, for messages.

    Raises:
        QuantizationError: a weight that the format cannot hold.
    """
    format = assignment.format
    if isinstance(format, FloatFormat):
        return cast_rows(weight, format, name)[0].float()
    if isinstance(format, PaletteFormat):
        colours = PALETTIZERS[assignment.algorithm].quantize_groups(weight, format, name=name)
        return packing.look_up(colours.codes, colours.lut, format)
    made = QUANTIZERS[assignment.algorithm].quantize_rows(weight, format, name=name)
    return native.unpack(made.codes, made.scale, made.zero_point, format)


def cast_rows(
    rows: torch.Tensor, format: FloatFormat, name: str, *, first_row: int = 0
) -> tuple[torch.Tensor, float, float]:
    """Rows in a float format, the sum of squared errors and the sum of squares.

    Args:
        rows: ``float32 | float16 | bfloat16 [rows, columns]``.
        format: what to store.
        name: the weight's name, for messages.
        first_row: number of the first of these rows in the whole weight, for messages.

    Raises:
        QuantizationError: a NaN or infinite weight, or one beyond the format's range.
    """
    wide = rows.float()
    cast = wide.to(getattr(torch, format.dtype))
    # Whatever is not finite, or overflows, is not finite in the result either.
    bad = (~cast.isfinite()).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        values, number = wide[row], first_row + row
        raise damage(values, name, number, "stored") or QuantizationError(
            f"{name} has values up to {float(values.abs().max()):g} in row {number}, beyond "
            f"the range of {format.dtype}: keep it fp32"
        )
    error = cast.float() - wide
    return cast, float(error.square().sum()), float(wide.square().sum())


def _bytes_of(value: torch.Tensor) -> memoryview:
    data: memoryview = value.contiguous().view(torch.uint8).numpy().data
    return data.cast("B")
