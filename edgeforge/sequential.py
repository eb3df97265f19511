"""Quantizes weights in the program's order, on what the weights quantized before them give.

The quantized program runs over the calibration blocks while its store is being filled: before a
calibrated weight is used for the first time, the second moment of what enters it is gathered and
the weight is quantized. So every later weight sees quantized inputs ("true sequential").

The program runs in stretches between matrices. Within one a block goes through all calls at once,
so that only what a later stretch needs is ever kept for all blocks; past a bound that is on disk.
One matrix, or one second moment, is in memory at a time.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
import torch
from torch import Tensor, fx

from edgeforge.activations import Activations
from edgeforge.calibration import CalibrationRun
from edgeforge.reference import Values, Walk, block_pool, store_reader
from edgeforge.weights import CheckpointWeights
from quant import dialect
from quant.errors import QuantizationError
from quant.formats import IntFormat
from quant.plan import QuantPlan
from quant.program import Program, node_argument
from quant.quantize import fill_store, write_rows
from quant.registry import CALIBRATED, calibrated_weights
from quant.resume import PartialStore
from quant.rewrite import quantize_program
from quant.second_moment import SecondMoment

# Activations that stay in memory between stretches, bytes.
MEMORY_BOUND: Final = 768 << 20
# Tokens whose products are summed in float32 before they join the sum in float64.
_BATCH_TOKENS: Final = 4096

# Tokens that a tied embedding is calibrated on, in a run of the whole float program.
_TIED_TOKENS: Final = 8192

_MATRICES: Final = frozenset({dialect.LINEAR, dialect.QUANT_LINEAR})


def fill_calibrated(
    run: CalibrationRun,
    plan: QuantPlan,
    partial: PartialStore,
    threads: int | None,
    progress: Callable[[str, int, int], None],
) -> None:
    """Fills a store: first what needs no calibration, then the rest in the program's order.

    Args:
        run: the model, its program and the text.
        plan: what to make of each weight.
        partial: the store; what it says is done is not done again.
        threads: how many to use.
        progress: told of each stage.

    Raises:
        QuantizationError: as `quantize_sequentially`.
        UsageError: the calibration text is gone or was changed.
    """
    weights = run.model.weights
    calibrated = set(calibrated_weights(plan))
    apart = {name: given for name, given in plan.weights.items() if name not in calibrated}
    if not apart.keys() <= partial.done.keys():
        size = sum(math.prod(weights.shapes()[name]) for name in apart)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("quantize", done, size)

        fill_store(
            weights, QuantPlan(plan.recipe, apart), partial, threads=threads, progress=advance
        )
        partial.keep()
    program = run.program()
    calibration = run.calibration.drawn(run.model, program.context)
    assert calibration.blocks is not None
    for note in calibration.notes:
        progress(note, 0, 0)
    quantize_sequentially(
        weights,
        plan,
        program,
        calibration.blocks,
        partial,
        threads=threads,
        progress=lambda done, size: progress("calibrate", done, size),
    )


def quantize_sequentially(
    weights: CheckpointWeights,
    plan: QuantPlan,
    program: Program,
    blocks: Sequence[Sequence[int]],
    partial: PartialStore,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, size: None,
    memory_bound: int = MEMORY_BOUND,
) -> None:
    """Quantizes the calibrated weights of a plan into a store that holds all others.

    Args:
        weights: the checkpoint's.
        plan: what to make of each.
        program: in the float dialect.
        blocks: the calibration text.
        partial: where weights go; what it says is done is not done again.
        threads: for the quantizers.
        progress: told how many weights are done, and of how many.
        memory_bound: bytes of activations that stay in memory.

    Raises:
        QuantizationError: activations that are not finite, or a weight that cannot be quantized;
            named.
    """
    wanted = [name for name in calibrated_weights(plan) if name not in partial.done]
    if not wanted:
        return
    run = _Run(weights, plan, program, partial, threads, memory_bound, progress)
    run.report()
    head = program.inputs[node_argument(program.output(), 1).name].name
    if head in wanted and weights.roles()[head] == "embedding":
        run.quantize_tied(head, blocks)
    run.quantize_in_order({name for name in wanted if name not in partial.done}, blocks)


class _Stretches:
    """A program that runs over blocks in stretches, which its caller cuts.

    Args:
        walk: the program.
        blocks: what is known of each block at first.
        folder: for activations that memory has no room for.
        bound: bytes of activations that stay in memory.
    """

    def __init__(self, walk: Walk, blocks: Sequence[Values], folder: Path, bound: int) -> None:
        self.walk, self.folder = walk, folder
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

    def second_moment(self, node: fx.Node, name: str) -> Tensor:
        """The mean of ``x x^T`` over what a node gave, ``float64[columns, columns]``.

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
        return found


class _Run:
    """The weights of one plan."""

    def __init__(
        self,
        weights: CheckpointWeights,
        plan: QuantPlan,
        program: Program,
        partial: PartialStore,
        threads: int | None,
        memory_bound: int,
        progress: Callable[[int, int], None],
    ) -> None:
        self._weights, self._plan, self._program, self._partial = weights, plan, program, partial
        self._threads, self._bound, self._progress = threads, memory_bound, progress
        self._spills = partial.folder / "spilled"
        shapes = weights.shapes()
        self._sizes = {name: math.prod(shapes[name]) for name in calibrated_weights(plan)}
        self._fresh = False  # whether a weight was quantized since the last boundary

    def report(self) -> None:
        """Tells how much is done."""
        done = sum(size for name, size in self._sizes.items() if name in self._partial.done)
        self._progress(done, sum(self._sizes.values()))

    def quantize_tied(self, name: str, blocks: Sequence[Sequence[int]]) -> None:
        """Quantizes an embedding that is the head too.

        It is needed from the first token on, so what enters it as the head comes from the float
        program. Its rows are inputs as well: there their plain error counts, as much as the
        head's.
        """
        weights = self._weights
        walk = Walk(
            self._program, lambda given: weights.float_weight(given.name), weights.float_rows
        )
        count = -(-_TIED_TOKENS // len(blocks[0]))
        known = [walk.begin(_tokens(block)) for block in blocks[:count]]
        with _Stretches(walk, known, self._spills, self._bound) as stretches:
            stretch: list[fx.Node] = []
            for node in walk.order:
                if node.target in _MATRICES:
                    stretches.run(stretch)
                    stretch = []
                stretch.append(node)
            moment = stretches.second_moment(node_argument(self._program.output(), 0), name)
        moment.diagonal().add_(moment.diagonal().mean())
        self._quantize(name, moment)

    def quantize_in_order(self, wanted: set[str], blocks: Sequence[Sequence[int]]) -> None:
        """Quantizes the other weights, each on what those before it give."""
        if not wanted:
            return
        walk = Walk(quantize_program(self._program, self._plan), store_reader(self._partial.writer))
        known = [walk.begin(_tokens(block)) for block in blocks]
        begin = 0
        if self._partial.boundary is not None:
            begin = self._restore(walk, known, self._partial.boundary)
        boundaries = _boundaries(walk)
        with _Stretches(walk, known, self._spills, self._bound) as stretches:
            stretch: list[fx.Node] = []
            for index in range(begin, len(walk.order)):
                node = walk.order[index]
                if node.target in _MATRICES:
                    stretches.run(stretch)
                    stretch = []
                    name = walk.program.inputs[node_argument(node, 1).name].name
                    if name in wanted:
                        moment = stretches.second_moment(node_argument(node, 0), name)
                        self._quantize(name, moment)
                        wanted.discard(name)
                        if not wanted:
                            return
                stretch.append(node)
                if self._fresh and index in boundaries:
                    stretches.run(stretch)
                    stretch = []
                    self._keep(index + 1, boundaries[index], stretches.activations)
        raise QuantizationError(
            f"no matrix product reads {min(wanted)}, so there is nothing to calibrate it on: give "
            f"it the algorithm rtn"
        )

    def _quantize(self, name: str, moment: Tensor) -> None:
        assignment = self._plan.weights[name]
        assert isinstance(assignment.format, IntFormat)
        made = CALIBRATED[assignment.algorithm].quantize_matrix(
            self._weights.float_weight(name),
            moment,
            assignment.format,
            name=name,
            threads=self._threads,
        )
        write_rows(self._partial.writer, name, 0, made)
        norm = made.squared_norm
        self._partial.note(name, (made.squared_error / norm) ** 0.5 if norm else 0.0)
        self._partial.keep()
        self._fresh = True
        self.report()

    def _keep(self, index: int, node: fx.Node, blocks: Activations) -> None:
        """Makes the state before a call last, so that an interrupted run goes on from there."""
        facts: dict[str, object] = {
            "index": index,
            "node": node.name,
            "shapes": [list(tensor.shape) for tensor in blocks.tensors(node)],
            "numbers": [blocks.numbers(i) for i in range(len(blocks))],
        }
        self._partial.keep_boundary(facts, blocks.tensors(node))
        self._fresh = False

    def _restore(self, walk: Walk, known: list[Values], boundary: dict[str, object]) -> int:
        """Adds what `_keep` wrote to what is known of the blocks; returns the next call."""
        nodes = {node.name: node for node in walk.order}
        shapes, numbers = boundary["shapes"], boundary["numbers"]
        assert isinstance(shapes, list) and isinstance(numbers, list)
        for values, tensor, numbered in zip(
            known, _read_tensors(self._partial.boundary_file(), shapes), numbers, strict=True
        ):
            values[nodes[str(boundary["node"])]] = tensor
            values.update({nodes[name]: number for name, number in numbered.items()})
        return int(str(boundary["index"]))


def _boundaries(walk: Walk) -> dict[int, fx.Node]:
    """Calls after which one tensor alone is still needed, and that tensor."""
    found: dict[int, fx.Node] = {}
    alive: set[fx.Node] = set()
    for index, node in enumerate(walk.order):
        alive = {other for other in alive if walk.last_use[other] > index}
        if walk.last_use[node] > index and not isinstance(node.meta["val"], int | torch.SymInt):
            alive.add(node)
        if len(alive) == 1:
            (last,) = alive
            if isinstance(last.meta["val"], Tensor):
                found[index] = last
    return found


def _tokens(block: Sequence[int]) -> Tensor:
    return torch.tensor(block, dtype=torch.int64)


def _read_tensors(file: Path, shapes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    with file.open("rb") as stream:
        for shape in shapes:
            flat = np.fromfile(stream, np.float32, math.prod(shape))
            yield torch.from_numpy(flat).reshape(*shape)
