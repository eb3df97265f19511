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
from typing import Final

import numpy as np
import torch
from torch import Tensor, fx

from edgeforge.activations import Activations
from edgeforge.calibration import Calibration
from edgeforge.model import Model
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

_MATRICES: Final = frozenset({dialect.LINEAR, dialect.QUANT_LINEAR})


def fill_calibrated(
    model: Model,
    plan: QuantPlan,
    calibration: Calibration,
    program: Callable[[], Program],
    partial: PartialStore,
    threads: int | None,
    progress: Callable[[str, int, int], None],
) -> None:
    """Fills a store: first what needs no calibration, then the rest in the program's order.

    Args:
        model: opened.
        plan: what to make of each weight.
        calibration: its sequences may still have to be drawn.
        program: gives the program in the float dialect.
        partial: the store; what it says is done is not done again.
        threads: how many to use.
        progress: told of each stage.

    Raises:
        QuantizationError: as `quantize_sequentially`.
        UsageError: the calibration text is gone or was changed.
    """
    weights = model.weights
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
    traced = program()
    blocks = calibration.drawn(model, traced.context).blocks
    assert blocks is not None
    for note in calibration.notes:
        progress(note, 0, 0)
    quantize_sequentially(
        weights,
        plan,
        traced,
        blocks,
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
    wanted = set(calibrated_weights(plan)) - partial.done.keys()
    if not wanted:
        return
    run = _Run(weights, plan, program, partial, threads, memory_bound, progress)
    try:
        run.start(blocks)
        run.go(wanted)
    finally:
        run.end()


class _Run:
    """One pass over the program."""

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
        self._weights, self._plan, self._partial = weights, plan, partial
        self._threads, self._bound, self._progress = threads, memory_bound, progress
        self._walk = Walk(quantize_program(program, plan), store_reader(partial.writer))
        self._spills = partial.folder / "spilled"
        shapes = weights.shapes()
        self._sizes = {name: math.prod(shapes[name]) for name in calibrated_weights(plan)}
        self._total = sum(self._sizes.values())
        self._begin = 0
        self._fresh = False  # whether a weight was quantized since the last boundary
        self._activations = Activations([], self._spills, 0)

    def start(self, blocks: Sequence[Sequence[int]]) -> None:
        """Takes the blocks to where the last run stopped."""
        shutil.rmtree(self._spills, ignore_errors=True)
        self._spills.mkdir()
        walk = self._walk
        known = [walk.begin(torch.tensor(block, dtype=torch.int64)) for block in blocks]
        if self._partial.boundary is not None:
            self._begin = self._restore(known, self._partial.boundary)
        self._activations = Activations([{}] * len(known), self._spills, self._bound)
        for index, values in enumerate(known):
            self._activations.put(index, values)

    def end(self) -> None:
        """Removes what was spilled."""
        shutil.rmtree(self._spills, ignore_errors=True)

    def go(self, wanted: set[str]) -> None:
        """Runs until every wanted weight is quantized."""
        self._report()
        boundaries = self._boundaries()
        stretch: list[fx.Node] = []
        for index in range(self._begin, len(self._walk.order)):
            node = self._walk.order[index]
            if node.target in _MATRICES:
                self._pass(stretch)
                stretch = []
                name = self._weight_of(node)
                if name in wanted:
                    self._quantize(name, node_argument(node, 0))
                    wanted.discard(name)
                    if not wanted:
                        return
            stretch.append(node)
            if self._fresh and index in boundaries:
                self._pass(stretch)
                stretch = []
                self._keep(index + 1, boundaries[index])
        raise QuantizationError(
            f"no matrix product reads {min(wanted)}, so there is nothing to calibrate it on: give "
            f"it the algorithm rtn"
        )

    def _pass(self, stretch: Sequence[fx.Node]) -> None:
        """Runs some calls, block by block."""
        if not stretch:
            return
        walk = self._walk
        calls = [(node, walk.prepare(node)) for node in stretch]

        def step(index: int) -> None:
            values = self._activations.take(index)
            for node, call in calls:
                values[node] = call(values)
                walk.forget(node, values)
            self._activations.put(index, values)

        with block_pool() as pool:
            list(pool.map(step, range(len(self._activations))))

    def _quantize(self, name: str, entering: fx.Node) -> None:
        """Gathers what enters a weight, and quantizes it."""
        assignment = self._plan.weights[name]
        moment = self._gather(name, entering)
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
        self._report()

    def _gather(self, name: str, entering: fx.Node) -> Tensor:
        """The second moment of what enters a weight."""
        collected = SecondMoment(self._weights.shapes()[name][1])
        batch: list[Tensor] = []
        count = len(self._activations)
        for index in range(count):
            x = self._activations.tensor(index, entering)
            batch.append(x.reshape(-1, collected.columns))
            if index + 1 == count or sum(map(len, batch)) >= _BATCH_TOKENS:
                rows = torch.cat(batch)
                if not bool(torch.isfinite(rows).all()):
                    raise QuantizationError(
                        f"what enters {name} is NaN or infinite in calibration sequences up to "
                        f"number {index + 1}: the checkpoint overflows on this text, or is damaged"
                    )
                collected.add(rows)
                batch = []
        return collected.mean()

    def _weight_of(self, node: fx.Node) -> str:
        return self._walk.program.inputs[node_argument(node, 1).name].name

    def _report(self) -> None:
        done = sum(size for name, size in self._sizes.items() if name in self._partial.done)
        self._progress(done, self._total)

    def _boundaries(self) -> dict[int, fx.Node]:
        """Calls after which one tensor alone is still needed, and that tensor."""
        walk = self._walk
        found: dict[int, fx.Node] = {}
        alive: set[fx.Node] = set()
        for index, node in enumerate(walk.order):
            alive = {other for other in alive if walk.last_use[other] > index}
            if walk.last_use[node] > index and isinstance(node.meta["val"], Tensor):
                alive.add(node)
            if len(alive) == 1:
                found[index] = next(iter(alive))
        return found

    def _keep(self, index: int, node: fx.Node) -> None:
        """Makes the state before a call last, so that an interrupted run goes on from there."""
        blocks = self._activations
        facts: dict[str, object] = {
            "index": index,
            "node": node.name,
            "shapes": [list(tensor.shape) for tensor in blocks.tensors(node)],
            "numbers": [blocks.numbers(i) for i in range(len(blocks))],
        }
        self._partial.keep_boundary(facts, blocks.tensors(node))
        self._fresh = False

    def _restore(self, known: list[Values], boundary: dict[str, object]) -> int:
        """Puts what `_keep` wrote in the place of the blocks' tokens; returns the next call."""
        nodes = {node.name: node for node in self._walk.order}
        shapes, numbers = boundary["shapes"], boundary["numbers"]
        assert isinstance(shapes, list) and isinstance(numbers, list)
        for values, tensor, numbered in zip(
            known, _read_tensors(self._partial.boundary_file(), shapes), numbers, strict=True
        ):
            values[nodes[str(boundary["node"])]] = tensor
            values.update({nodes[name]: number for name, number in numbered.items()})
        return int(str(boundary["index"]))


def _read_tensors(file: Path, shapes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    with file.open("rb") as stream:
        for shape in shapes:
            flat = np.fromfile(stream, np.float32, math.prod(shape))
            yield torch.from_numpy(flat).reshape(*shape)
