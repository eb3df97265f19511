"""A program that runs over many blocks in stretches, and the weights that are quantized between.

Within a stretch a block goes through all calls at once, so that only what a later stretch needs is
ever kept for all blocks; past a bound that is on disk. One matrix, or one second moment, is in
memory at a time.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor, fx

from edgeforge.activations import Activations
from edgeforge.allocation import return_large_blocks
from edgeforge.reference import Values, Walk, block_pool
from edgeforge.weights import CheckpointWeights
from quant import dialect
from quant.activations import INPUT_SCALE
from quant.errors import QuantizationError
from quant.formats import IntFormat, PaletteFormat
from quant.input_scale import BINS, input_scale
from quant.kmeans import PalettizedRows
from quant.plan import QuantPlan
from quant.program import Program, node_argument
from quant.quantize import write_palettes, write_rows
from quant.registry import CALIBRATED, CALIBRATED_PALETTIZERS, QUANTIZERS, calibrated_weights
from quant.resume import PartialStore
from quant.rtn import QuantizedRows
from quant.second_moment import InputStatistics, SecondMoment

# Activations that stay in memory between stretches, bytes.
MEMORY_BOUND: Final = 768 << 20
# Tokens whose products are summed in float32 before they join the sum in float64.
_BATCH_TOKENS: Final = 4096

# Calls that stretches end before: each may hold a large weight.
MATRICES: Final = frozenset({dialect.LINEAR, dialect.QUANT_LINEAR})


class Stretches:
    """A program that runs over blocks in stretches, which its caller cuts.

    Args:
        walk: the program.
        blocks: what is known of each block at first.
        folder: for activations that memory has no room for.
        bound: bytes of activations that stay in memory.
    """

    def __init__(self, walk: Walk, blocks: Sequence[Values], folder: Path, bound: int) -> None:
        self.walk, self.folder = walk, folder
        return_large_blocks()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.activations = Activations([{}] * len(blocks), folder, bound)
        for index, values in enumerate(blocks):
            self.activations.put(index, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, stretch: Sequence[fx.Node]) -> None:
        """Runs some calls, block by block."""
        if not stretch:
            return
        calls = [(node, self.walk.prepare(node)) for node in stretch]

        def step(index: int) -> None:
            values = self.activations.take(index)
            for node, call in calls:
                values[node] = call(values)
                self.walk.forget(node, values)
            self.activations.put(index, values)

        with block_pool() as pool:
            list(pool.map(step, range(len(self.activations))))

    def matrices(self) -> Iterator[fx.Node]:
        """The program's calls that may hold a large weight, each when all before it has run."""
        stretch: list[fx.Node] = []
        for node in self.walk.order:
            if node.target in MATRICES:
                self.run(stretch)
                stretch = []
                yield node
            stretch.append(node)

    def second_moment(self, node: fx.Node, name: str) -> Tensor:
        """The mean of ``x x^T`` over what a node gave; arguments and errors as `statistics`."""
        return self.statistics(node, name).moment

    def statistics(self, node: fx.Node, name: str) -> InputStatistics:
        """What calibration keeps of what a node gave.

        Args:
            node: ``float32[1, t, columns]`` in every block.
            name: the weight that it enters, for messages.

        Raises:
            QuantizationError: it is not finite.
        """
        collected = SecondMoment(self.activations.tensor(0, node).shape[-1])
        batch: list[Tensor] = []
        count = len(self.activations)
        for index in range(count):
            batch.append(self.activations.tensor(index, node).reshape(-1, collected.columns))
            if index + 1 == count or sum(map(len, batch)) >= _BATCH_TOKENS:
                collected.add(torch.cat(batch))
                batch = []
        found = collected.mean()
        if not bool(torch.isfinite(found.diagonal()).all()):
            raise QuantizationError(
                f"what enters {name} is NaN or infinite on the calibration text: the checkpoint "
                f"overflows there, or is damaged"
            )
        return InputStatistics(found, collected.largest())

    def input_scale(self, node: fx.Node, inputs: InputStatistics, divisors: Tensor) -> Tensor:
        """The one scale of what a node gave, ``bfloat16[1, 1]``.

        Args:
            node: as in `statistics`.
            inputs: its statistics.
            divisors: ``float32[columns]``, by what each column will be divided.
        """
        largest = float((inputs.largest / divisors).max())
        counts = torch.zeros(BINS, dtype=torch.float64)
        for index in range(len(self.activations)):
            values = self.activations.tensor(index, node).reshape(-1, len(divisors)) / divisors
            counts += torch.histc(values.abs_(), BINS, 0, largest or 1.0).double()
        return input_scale(counts, largest)


class Filling:
    """A store whose calibrated weights are being quantized.

    Args:
        weights: the checkpoint's.
        plan: what to make of each.
        partial: the store; what it says is done is not done again.
        threads: for the quantizers.
        progress: told how many weights are done, and of how many.
        memory_bound: bytes of activations that stay in memory.
    """

    def __init__(
        self,
        weights: CheckpointWeights,
        plan: QuantPlan,
        partial: PartialStore,
        *,
        threads: int | None = None,
        progress: Callable[[int, int], None] = lambda done, size: None,
        memory_bound: int = MEMORY_BOUND,
    ) -> None:
        self.weights, self.plan, self.partial = weights, plan, partial
        self._threads, self._progress, self._bound = threads, progress, memory_bound
        shapes = weights.shapes()
        self._sizes = {name: math.prod(shapes[name]) for name in calibrated_weights(plan)}

    def wanted(self) -> list[str]:
        """Calibrated weights that are not done, in the plan's order."""
        return [name for name in self._sizes if name not in self.partial.done]

    def report(self) -> None:
        """Tells how much is done."""
        done = sum(size for name, size in self._sizes.items() if name in self.partial.done)
        self._progress(done, sum(self._sizes.values()))

    def stretches(self, walk: Walk, blocks: Sequence[Values]) -> Stretches:
        """A program over blocks, whose activations may lie beside the store."""
        return Stretches(walk, blocks, self.partial.folder / "spilled", self._bound)

    def float_walk(self, program: Program) -> Walk:
        """The float program on the checkpoint's weights."""
        weights = self.weights
        return Walk(program, lambda given: weights.float_weight(given.name), weights.float_rows)

    def write_input_scale(self, name: str, scale: Tensor) -> None:
        """Writes the scale of what enters a weight, before the weight itself is said to be done."""
        self.partial.write(name, INPUT_SCALE, 0, scale.view(torch.uint8).numpy().data)

    def quantize(self, name: str, moment: Tensor, weight: Tensor | None = None) -> None:
        """Quantizes a weight into the store.

        Args:
            name: the weight's.
            moment: of what enters it, ``float64[columns, columns]``; it may be overwritten.
            weight: ``float32[rows, columns]`` in the place of the checkpoint's.
        """
        assignment = self.plan.weights[name]
        algorithm, format = assignment.algorithm, assignment.format
        values = self.weights.float_weight(name) if weight is None else weight
        made: QuantizedRows | PalettizedRows
        if isinstance(format, PaletteFormat):
            made = CALIBRATED_PALETTIZERS[algorithm].palettize_matrix(
                values, moment, format, name=name, threads=self._threads
            )
            write_palettes(self.partial, name, 0, 0, made)
        else:
            assert isinstance(format, IntFormat)
            if algorithm in QUANTIZERS:  # it is its inputs that calibration is for
                made = QUANTIZERS[algorithm].quantize_rows(values, format, name=name)
            else:
                made = CALIBRATED[algorithm].quantize_matrix(
                    values, moment, format, name=name, threads=self._threads
                )
            write_rows(self.partial, name, 0, made)
        norm = made.squared_norm
        self.partial.note(name, (made.squared_error / norm) ** 0.5 if norm else 0.0)
        self.partial.keep()
        self.report()


def tokens_of(block: Sequence[int]) -> Tensor:
    """A block as ``int64[t]``."""
    return torch.tensor(block, dtype=torch.int64)


def weight_of(walk: Walk, node: fx.Node) -> str:
    """The weight that a matrix product reads."""
    return walk.program.inputs[node_argument(node, 1).name].name
