"""Finds the columns whose activations must stay float32 for 8-bit rounding to cost little.

The quantized program runs once over a short text. At each product with an integer weight,
the error that rounding each token's activations to 8 bits causes is set against the product:
`errors_of`. Where a few columns cause most of an error that is too large, they are taken out
(`choose_count`). It is the rounding of XNNPACK and, on arm64, of ONNX Runtime; elsewhere ONNX
Runtime rounds blocks of columns apart, which is finer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, fx

from edgeforge.cache import read_record, write_record
from edgeforge.calibration.cache_ranges import measurement_key
from edgeforge.model.model import CALIBRATION_TEXT, Model
from edgeforge.reference.segments import tokens_of
from edgeforge.reference.walk import Walk, WeightReader, block_pool, store_reader
from edgeforge.tokenizer import TOKENIZER, Tokenizer, read_text
from exporters.float_columns import FloatColumns
from quant.formats.formats import IntFormat
from quant.program import dialect, ops
from quant.program.calls import QuantizedCall
from quant.program.program import Program, node_argument
from quant.store.store import WeightStore

COLUMNS_VERSION: Final = 1
# How many columns may stay float32: each of the numbers is tried in turn. Most of the gain comes
# with the first two, and what more of them cost is little beside what it costs to have any.
COUNTS: Final = (0, 2, 4, 8)
# The largest mean squared error of a product, relative to the product's squared norm, that 8-bit
# activations may cause. Normal activations cause 6e-5, and those of SmolLM2-135M up to 1e-3. Half
# of this would bring its divergence from 4.0e-3 to 3.3e-3 only, for 70 matrices in place of 52.
LARGEST_ERROR: Final = 2e-4
# Columns that do not make the error smaller by this factor at least are not worth their cost.
LEAST_GAIN: Final = 2.0
TEXTS, TEXT_TOKENS = 2, 128
"""The texts that are looked at, and the tokens of each."""
_NORM_ROWS: Final = 64
_CHARACTERS: Final = 16  # of a text for each token: more than tokenizers make tokens of


def float_columns(
    program: Program,
    store: WeightStore,
    blocks: Sequence[Sequence[int]],
    cache: Path,
    progress: Callable[[int, int], None] = lambda done, size: None,
) -> FloatColumns:
    """Returns the columns that stay float32, from the cache folder or measured now.

    Args:
        program: a program in the quantized dialect.
        store: the weights that the program names.
        blocks: the texts.
        cache: folder of columns that were found before.
        progress: called with the number of products done and the number of all products.

    Returns:
        Columns by weight; a weight that needs none is left out.
    """
    facts = {
        "version": COLUMNS_VERSION,
        "rule": [list(COUNTS), LARGEST_ERROR, LEAST_GAIN],
    }
    key = measurement_key(program, store, blocks, facts)
    file = cache / f"{key}.json"
    known = _read(file, program)
    if known is not None:
        return known
    found = _measure(program, store_reader(store), blocks, progress)
    write_record(file, {name: list(columns) for name, columns in found.items()})
    return found


def texts_of(model: Model, context: int) -> list[tuple[int, ...]]:
    """Returns the texts to look at: of the calibration text that ships, or seeded random tokens.

    Random tokens stand in where there is no tokenizer, or where its tokens are not the model's.

    Args:
        model: the opened model.
        context: the declared context in tokens; no text is longer.
    """
    length, vocabulary = min(TEXT_TOKENS, context), model.spec.vocab_size
    file = model.checkpoint.tokenizer_files.get(TOKENIZER)
    texts = []
    if file is not None:
        tokenizer = Tokenizer(file, model.checkpoint.source)
        written, head = read_text(CALIBRATION_TEXT), tokenizer.added()[0]
        for index in range(TEXTS):
            start = index * len(written) // TEXTS
            part = written[start : start + _CHARACTERS * length]
            tokens = (*head, *tokenizer.encode(part, special=False))[:length]
            texts.append(tokens)
    if not texts or min(map(len, texts)) < length or max(map(max, texts)) >= vocabulary:
        draw = random.Random(0)
        texts = [tuple(draw.randrange(vocabulary) for _ in range(length)) for _ in range(TEXTS)]
    return texts


def errors_of(x: Tensor, energy: Tensor, norms: Tensor, order: Tensor) -> list[float]:
    """Returns a product's relative squared error for each of `COUNTS`, the mean over tokens.

    Rounding errors of columns are independent, so the squared error of a product is the sum of
    theirs, each times the squared norm of its column of weights.

    Args:
        x: the activations, ``float32[t, columns]``.
        energy: the squared norm of each token's product, ``float32[t]``.
        norms: the squared norm of each column of weights, ``float32[columns]``.
        order: the columns, those to take out first in front.
    """
    found, rest = [], x.clone()
    usable = energy > 0
    if not bool(usable.any()):
        return [0.0 for _ in COUNTS]
    for count in COUNTS:
        rest[:, order[:count]] = 0
        squares = (ops.round_per_token(rest) - rest).square() @ norms
        found.append(float((squares[usable] / energy[usable]).mean()))
    return found


def choose_count(errors: Sequence[float]) -> int:
    """Returns how many columns stay float32, from the errors for each of `COUNTS`.

    >>> choose_count([6e-4, 2.2e-4, 8e-5, 5e-5])
    4
    >>> choose_count([1e-4, 1e-6, 1e-6, 1e-6])  # small enough as it is
    0
    >>> choose_count([3e-4, 2.9e-4, 2.8e-4, 2.7e-4])  # no columns stand out
    0
    """
    within = (index for index, error in enumerate(errors) if error <= LARGEST_ERROR)
    index = next(within, len(COUNTS) - 1)
    return COUNTS[index] if errors[index] * LEAST_GAIN <= errors[0] else 0


class _WatchedWalk(Walk):
    """A walk that chooses the columns of each product with an integer weight."""

    def __init__(self, program: Program, read: WeightReader) -> None:
        super().__init__(program, read)
        self.norms: dict[fx.Node, Tensor] = {}

    def matrix(self, node: fx.Node) -> Tensor:
        """Keeps the norms of the matrix's columns as well."""
        values = super().matrix(node)
        # In blocks that stay in the processor's cache: a ninth of the time of the whole at once.
        norms = torch.zeros(values.shape[1])
        for rows in torch.split(values, _NORM_ROWS):
            norms += rows.square().sum(0)
        self.norms[node] = norms
        return values


def _measure(
    program: Program,
    read: WeightReader,
    blocks: Sequence[Sequence[int]],
    progress: Callable[[int, int], None],
) -> dict[str, tuple[int, ...]]:
    walk = _WatchedWalk(program, read)
    measured = set(rounded_products(program))
    values = [walk.begin(tokens_of(block)) for block in blocks]
    found: dict[str, tuple[int, ...]] = {}
    done = 0
    with block_pool() as pool:
        for node in walk.order:
            if node not in measured:
                walk.advance(node, values, pool)
                continue
            sources = [known[node_argument(node, 0)] for known in values]
            walk.advance(node, values, pool)
            weight = program.inputs[QuantizedCall.of(node).codes.name].name
            chosen = _chosen(sources, [known[node] for known in values], walk.norms.pop(node))
            if chosen:
                found[weight] = chosen
            done += 1
            progress(done, len(measured))
    return found


def _chosen(
    sources: Sequence[Tensor], products: Sequence[Tensor], norms: Tensor
) -> tuple[int, ...]:
    x = torch.cat([source.reshape(-1, source.shape[-1]) for source in sources])
    y = torch.cat([product.reshape(-1, product.shape[-1]) for product in products])
    order = x.square().mean(0).argsort(descending=True)
    count = choose_count(errors_of(x, y.square().sum(-1), norms, order))
    return tuple(sorted(order[:count].tolist()))


def rounded_products(program: Program) -> list[fx.Node]:
    """The products with an integer weight whose activations the program leaves to the kernel."""
    roundings = (dialect.ROUND_PER_TOKEN, dialect.ROUND_PER_TENSOR)
    return [
        node
        for node in program.graph.nodes
        if node.target is dialect.QUANT_LINEAR
        and node_argument(node, 0).target not in roundings
        and isinstance(QuantizedCall.of(node).format, IntFormat)
    ]


def rounded_weights(program: Program) -> dict[str, int]:
    """The weights of `rounded_products`, each with the number of its columns."""
    calls = map(QuantizedCall.of, rounded_products(program))
    return {program.inputs[call.codes.name].name: call.shape[1] for call in calls}


def _read(file: Path, program: Program) -> FloatColumns | None:
    """Returns columns that were found before, or None where the file is missing or damaged."""
    record = read_record(file)
    if record is None:
        return None
    widths = rounded_weights(program)
    found = {}
    for name, columns in record.items():
        if name not in widths or not isinstance(columns, list):
            return None
        if not all(isinstance(each, int) and 0 <= each < widths[name] for each in columns):
            return None
        found[name] = tuple(columns)
    return found
