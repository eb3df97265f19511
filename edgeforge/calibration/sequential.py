"""Quantizes weights in the program's order, on the outputs of the weights quantized before them.

The quantized program runs over the calibration blocks while its store is being filled. Before a
calibrated weight is used for the first time, the second moment of its inputs is collected and the
weight is quantized. Every later weight therefore sees quantized inputs ("true sequential").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx

from edgeforge.calibration.filling import Filling
from edgeforge.reference.segments import MATRICES, tokens_of, weight_of
from edgeforge.reference.spilled_values import Activations
from edgeforge.reference.walk import Values, Walk, store_reader
from quant.errors import QuantizationError
from quant.input_files import open_input
from quant.program.head import head_of
from quant.program.program import Program, node_argument
from quant.program.rewrite import quantize_program
from quant.quantizers.input_statistics import InputStatistics
from quant.quoted import quoted
from quant.store.partial import PartialStore

# A tied embedding is calibrated in a run of the whole float program of its own, on so many tokens
# for each of its columns, between these numbers: its damping leaves more tokens little to add.
_TOKENS_A_COLUMN: Final = 4
_FEWEST_TIED, _MOST_TIED = 2048, 8192
# Up to this width a second moment is kept for the next weight that reads the same inputs.
_WIDEST_KEPT: Final = 4096


def quantize_sequentially(
    filling: Filling, program: Program, blocks: Sequence[Sequence[int]]
) -> None:
    """Quantizes the calibrated weights of a plan into a store that holds all others.

    Args:
        filling: the store.
        program: a program in the float dialect.
        blocks: the calibration text.

    Raises:
        QuantizationError: activations are not finite, or a weight cannot be quantized; the message
            names the weight.
    """
    wanted = set(filling.wanted())
    if not wanted:
        return
    head = program.inputs[node_argument(head_of(program), 1).name].name
    if head in wanted and filling.weights.roles()[head] == "embedding":
        _quantize_tied(filling, head, program, blocks)
        wanted.discard(head)
    if wanted:
        _quantize_in_order(filling, wanted, program, blocks)


def _quantize_tied(
    filling: Filling, name: str, program: Program, blocks: Sequence[Sequence[int]]
) -> None:
    """Quantizes an embedding that is the head too.

    The first call of the program already needs it, so its inputs as the head are those of the float
    program. Its rows are the embedding's outputs as well, where their plain error counts; both
    errors have the same weight.
    """
    walk = filling.float_walk(program)
    columns = filling.weights.shapes()[name][1]
    tokens = min(max(_TOKENS_A_COLUMN * columns, _FEWEST_TIED), _MOST_TIED)
    count = -(-tokens // len(blocks[0]))
    known = [walk.begin(tokens_of(block)) for block in blocks[:count]]
    with filling.stretches(walk, known) as stretches:
        for _ in stretches.matrices():  # runs the program up to the head, its last matrix
            pass
        moment = stretches.statistics(node_argument(head_of(program), 0), name).moment
    moment.diagonal().add_(moment.diagonal().mean())
    filling.quantize(name, moment)


def _quantize_in_order(
    filling: Filling, wanted: set[str], program: Program, blocks: Sequence[Sequence[int]]
) -> None:
    """Quantizes the other weights, each on the outputs of those before it."""
    partial = filling.partial
    walk = Walk(quantize_program(program, filling.plan), store_reader(partial.writer))
    known = [walk.begin(tokens_of(block)) for block in blocks]
    begin = 0 if partial.boundary is None else _restore(walk, known, partial)
    boundaries = _boundaries(walk)
    fresh = False  # whether a weight was quantized since the last boundary
    kept: dict[fx.Node, InputStatistics] = {}  # of inputs that other weights read too
    with filling.stretches(walk, known) as stretches:
        stretch: list[fx.Node] = []
        for index in range(begin, len(walk.order)):
            node = walk.order[index]
            if node.target in MATRICES:
                stretches.run(stretch)
                stretch = []
                name = weight_of(walk, node)
                if name in wanted:
                    entering = node_argument(node, 0)
                    if entering not in kept:
                        kept[entering] = stretches.statistics(entering, name)
                    wanted.discard(name)
                    others = (n for n in entering.users if n.target in MATRICES)
                    shared = any(weight_of(walk, other) in wanted for other in others)
                    inputs, own = kept[entering], stretches.experts.holds(entering)
                    moment = inputs.moment
                    if not shared or len(moment) > _WIDEST_KEPT:
                        del kept[entering]
                    filling.quantize(
                        name,
                        moment.clone() if entering in kept else moment,
                        tokens=inputs.tokens if own else None,
                    )
                    fresh = True
                    if not wanted:
                        return
            stretch.append(node)
            if fresh and index in boundaries:
                stretches.run(stretch)
                stretch = []
                _keep(partial, index + 1, boundaries[index], stretches.activations)
                fresh = False
    raise QuantizationError(
        f"no matrix product reads {min(wanted)}, so it has no inputs to be calibrated on: give "
        f"it the algorithm rtn"
    )


def _keep(partial: PartialStore, index: int, node: fx.Node, blocks: Activations) -> None:
    """Writes the state before a call to disk, so that an interrupted run can resume from there."""
    facts: dict[str, object] = {
        "index": index,
        "node": node.name,
        "shapes": [list(tensor.shape) for tensor in blocks.tensors(node)],
        "numbers": [blocks.numbers(i) for i in range(len(blocks))],
    }
    partial.keep_boundary(facts, blocks.tensors(node))


def _restore(walk: Walk, known: list[Values], partial: PartialStore) -> int:
    """Adds the state that `_keep` wrote to the blocks' values; returns the next call's number."""
    boundary: Any = partial.boundary
    nodes = {node.name: node for node in walk.order}
    try:
        shapes, numbers, index = boundary["shapes"], boundary["numbers"], boundary["index"]
        for values, tensor, numbered in zip(
            known, _read_tensors(partial.boundary_file(), shapes), numbers, strict=True
        ):
            values[nodes[boundary["node"]]] = tensor
            values.update({nodes[name]: number for name, number in numbered.items()})
        if not isinstance(index, int) or not 0 <= index <= len(walk.order):
            raise ValueError(f"there is no call {quoted(index)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise QuantizationError(
            f"{partial.folder} holds damaged partial results ({error}): remove that folder"
        ) from error
    return index


def _boundaries(walk: Walk) -> dict[int, fx.Node]:
    """Returns the calls after which later calls need only one tensor, each with that tensor."""
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


def _read_tensors(file: Path, shapes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    with open_input(file) as stream:
        for shape in shapes:
            flat = np.fromfile(stream, np.float32, math.prod(shape))
            yield torch.from_numpy(flat).reshape(*shape)
