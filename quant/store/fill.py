"""Fills a weight store: a few threads read every weight once, in chunks of rows.

A matrix with one palette for all its rows is read twice: once to find the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import torch

from quant.errors import FormatRefused
from quant.formats import packing
from quant.formats.formats import FloatFormat, IntFormat, PaletteFormat
from quant.kernels import native
from quant.kernels.threads import single_threaded_torch, torch_pool
from quant.plans.algorithms import IMPORTED
from quant.plans.plan import Assignment, QuantPlan, matrix_shape
from quant.processors import default_threads
from quant.quantizers.kmeans import PalettizedRows
from quant.quantizers.registry import PALETTIZERS, QUANTIZERS, Palettizer
from quant.quantizers.row_checks import damage
from quant.quantizers.rtn import QuantizedRows

# Weights in a chunk: enough that Python's overhead is small, few enough for a core's cache.
CHUNK_WEIGHTS = 1 << 20


class WeightSource(Protocol):
    """Where weights are read from: shapes by name, and rows on demand from any thread."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by the weights' names in the program."""

    def pieces(self, name: str) -> Sequence[tuple[str, int]]:
        """The checkpoint tensors that a weight is stacked from: name and row count, in order.

        `fill_store` reads rows within one such tensor at a time, and messages name the tensor.
        """

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop``: ``float32 | float16 | bfloat16 [stop - start, columns]``."""

    def imported_rows(self, name: str, start: int, stop: int, format: IntFormat) -> QuantizedRows:
        """Codes, scales and zero points of rows of a weight that the checkpoint holds as integers.

        `fill_store` calls it only where the plan's algorithm is
        `quant.plans.algorithms.IMPORTED`. Codes and zero points are the checkpoint's; scales are
        rounded where the format's scale dtype is narrower than the checkpoint's.
        """

    def imported_by_rows(self, name: str) -> bool:
        """Whether some rows of such a weight are read for less than all of them."""


class WeightSink(Protocol):
    """Where stored parts are written: a store's writer."""

    def write(self, weight: str, part: str, at: int, data: memoryview) -> None:
        """Writes bytes at offset ``at`` of a part, from any thread."""

    def note(self, weight: str, relative_error: float) -> None:
        """Records the relative error of a weight's stored values."""


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
        source: where weights are read from.
        plan: the format and algorithm of each weight.
        writer: where stored parts are written.
        threads: number of threads; by default one per processor, four at most.
        progress: called with the number of elements done since the last call, from one thread at
            a time.

    Raises:
        QuantizationError: a weight has NaN or infinite values, or values that its format cannot
            hold; the message names it.
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
    with single_threaded_torch(), torch_pool(count, "quantize") as pool:
        tables = _whole_tables(source, chunks, pool)
        _run(pool, [pool.submit(work, chunk) for chunk in chunks])
    for weight, chunk_costs in costs.items():
        # Exact sums: chunks finish in any order, and the noted errors must not depend on it.
        squared_error, squared_norm = map(math.fsum, zip(*chunk_costs, strict=True))
        writer.note(weight, (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0)


def _run(pool: ThreadPoolExecutor, pending: Sequence[Future[None]]) -> None:
    """Waits for all futures; at the first error it cancels those that have not begun."""
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
    """Finds the table of every matrix that has one table for all rows, in a pass of its own."""
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
                # Some tables cover rows of two tensors: messages name the whole weight.
                pieces = [(name, sum(rows for _, rows in pieces))]
        first = 0
        for origin, rows in pieces:
            if assignment.algorithm == IMPORTED and not source.imported_by_rows(name):
                step = rows  # the checkpoint packs along rows: some cost as much as all
            for row in range(0, rows, step):
                stop = first + min(rows, row + step)
                yield _Chunk(name, assignment, first + row, stop, columns, origin, row)
            first += rows


def write_rows(writer: WeightSink, weight: str, start: int, made: QuantizedRows) -> None:
    """Writes quantized rows to their places in the store, the first at row ``start``."""
    parts = {"codes": made.codes, "scale": made.scale, "zero_point": made.zero_point}
    for part, value in parts.items():
        if value is not None:
            stride = value.shape[1] * value.element_size()
            writer.write(weight, part, start * stride, _bytes_of(value))


def write_palettes(
    writer: WeightSink, weight: str, start: int, first_table: int, made: PalettizedRows
) -> None:
    """Writes palettized rows and tables, the first at row ``start`` and table ``first_table``."""
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
    """Returns the values that storing a matrix would give, ``float32[rows, columns]``.

    Nothing is written.

    Args:
        weight: ``float32 | float16 | bfloat16 [rows, columns]``.
        assignment: a format, and an algorithm that needs no calibration.
        name: the weight's name, for messages.

    Raises:
        QuantizationError: the format cannot hold the weight.
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
    """Casts rows to a float format; returns them, the sum of squared errors, the sum of squares.

    Args:
        rows: ``float32 | float16 | bfloat16 [rows, columns]``.
        format: the float format to store.
        name: the weight's name, for messages.
        first_row: index of the first of these rows in the whole weight, for messages.

    Raises:
        QuantizationError: a value is NaN, infinite or beyond the format's range.
    """
    wide = rows.float()
    cast = wide.to(getattr(torch, format.dtype))
    # Values that are not finite or overflow are not finite after the cast: one test finds all.
    bad = (~cast.isfinite()).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        values, number = wide[row], first_row + row
        raise damage(values, name, number, "stored") or FormatRefused(
            f"{name} has values up to {float(values.abs().max()):g} in row {number}, beyond "
            f"the range of {format.dtype}",
            "keep it fp32",
        )
    error = cast.float() - wide
    return cast, float(error.square().sum()), float(wide.square().sum())


def _bytes_of(value: torch.Tensor) -> memoryview:
    data: memoryview = value.contiguous().view(torch.uint8).numpy().data
    return data.cast("B")
