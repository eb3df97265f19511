"""Runs a program over many blocks in stretches, between which weights are quantized.

Each block runs through all calls of a stretch before the next block does. Only the values that a
later stretch needs are therefore kept for all blocks, in memory up to a bound and else on disk. One
matrix, or one second moment, is in memory at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, Self

import torch
from torch import Tensor, fx

from edgeforge.reference.expert_inputs import ExpertInputs
from edgeforge.reference.malloc import return_large_blocks
from edgeforge.reference.spilled_values import Activations
from edgeforge.reference.walk import Values, Walk, block_pool
from quant.errors import QuantizationError
from quant.program import dialect
from quant.program.program import node_argument
from quant.quantizers.input_scale import BINS, input_scale
from quant.quantizers.input_statistics import InputStatistics, SecondMoment

# Bytes of activations that stay in memory between stretches.
MEMORY_BOUND: Final = 768 << 20
# Tokens whose products are summed in float32 before they join the sum in float64.
_BATCH_TOKENS: Final = 4096

# A stretch ends before each of these calls, because each may have a large weight.
MATRICES: Final = frozenset({dialect.LINEAR, dialect.QUANT_LINEAR})


class Stretches:
    """A run of a program over blocks in stretches; the caller decides where a stretch ends.

    Args:
        walk: the program's calls.
        blocks: each block's values at the beginning.
        folder: folder for activations over ``bound``; it is emptied first and removed at the end.
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
        (tokens,) = [node for node, _ in walk.program.placeholders("tokens")]
        self.experts = ExpertInputs(walk, [values[tokens].shape[1] for values in blocks])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, stretch: Sequence[fx.Node]) -> None:
        """Runs the calls of a stretch on every block."""
        if not stretch:
            return
        calls = [(node, self.walk.prepare(node)) for node in stretch]

        def step(index: int) -> None:
            values = self.activations.take(index)
            for node, call in calls:
                self.experts.meet(node, index, values)
                values[node] = call(values)
                self.walk.forget(node, values)
            self.activations.put(index, values)

        with block_pool() as pool:
            list(pool.map(step, range(len(self.activations))))

    def matrices(self) -> Iterator[fx.Node]:
        """Yields each call that may have a large weight, after all calls before it have run."""
        stretch: list[fx.Node] = []
        for node in self.walk.order:
            if node.target in MATRICES:
                self.run(stretch)
                stretch = []
                yield node
            stretch.append(node)

    def statistics(self, node: fx.Node, name: str) -> InputStatistics:
        """Returns the statistics of a node's outputs that calibration needs.

        Those of an expert's branch are of other tokens of its layer too, as
        `edgeforge.reference.expert_inputs` says.

        Args:
            node: the node; its output is ``float32[1, t, columns]`` in every block.
            name: the weight that reads the outputs, for messages.

        Raises:
            QuantizationError: the outputs are not finite.
        """
        collected = SecondMoment(self.activations.tensor(0, node).shape[-1])
        batch: list[Tensor] = []
        tokens, count = 0, len(self.activations)
        for index in range(count):
            batch.append(self.activations.tensor(index, node).reshape(-1, collected.columns))
            tokens += batch[-1].shape[0]
            if index + 1 == count or tokens >= _BATCH_TOKENS:
                collected.add(torch.cat(batch))
                batch, tokens = [], 0
        tokens = int(collected.tokens)
        for other, weight in self.experts.others(node):
            collected.add(other, weight)
        found = collected.mean()
        if not bool(torch.isfinite(found.diagonal()).all()):
            raise QuantizationError(
                f"inputs of {name} are NaN or infinite on the calibration text: the checkpoint "
                f"overflows there, or is damaged"
            )
        return InputStatistics(found, collected.largest(), tokens)

    def input_scale(self, node: fx.Node, inputs: InputStatistics, divisors: Tensor) -> Tensor:
        """Returns the one scale of a node's outputs, ``bfloat16[1, 1]``.

        Args:
            node: the node, as in `statistics`.
            inputs: the statistics of its outputs.
            divisors: ``float32[columns]``; each column of the outputs is divided by its number
                before it is rounded.
        """
        largest = float((inputs.largest / divisors).max())
        counts = torch.zeros(BINS, dtype=torch.float64)
        own = ((self.activations.tensor(i, node), 1.0) for i in range(len(self.activations)))
        for given, weight in chain(own, self.experts.others(node)):
            values = given.reshape(-1, len(divisors)) / divisors
            counts += weight * torch.histc(values.abs_(), BINS, 0, largest or 1.0).double()
        return input_scale(counts, largest)


def tokens_of(block: Sequence[int]) -> Tensor:
    """Returns a block's tokens as ``int64[t]``."""
    return torch.tensor(block, dtype=torch.int64)


def weight_of(walk: Walk, node: fx.Node) -> str:
    """Returns the name of the weight that a matrix product reads."""
    return walk.program.inputs[node_argument(node, 1).name].name
