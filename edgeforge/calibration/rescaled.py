"""Quantizes weights whose columns are rescaled first, or whose inputs are rounded by one scale.

Both kinds need the activations of the float program.

Rescaling multiplies a weight's columns by factors and divides what produces its inputs by the same
factors (`quant.program.rescale_places`). That is either a norm's scale, which is rewritten in the
store, or rows of the weight before it, which can be quantized only when the factors of the weight
that reads it are known. Shifts and biases are rewritten with them, and so are the columns of a
recurrence's gates, which read the same norm and stay float. FLOAT reads the checkpoint and is not
changed; the store holds the rescaled weights together with what was divided for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from edgeforge.calibration.filling import Filling
from edgeforge.reference.segments import Stretches, tokens_of, weight_of
from quant.formats.activations import TENSOR
from quant.formats.formats import IntFormat
from quant.program.program import Program, node_argument
from quant.program.rescale_places import Fold, foldable
from quant.quantizers.input_statistics import InputStatistics
from quant.quantizers.registry import RESCALING


@dataclass
class _Waiting:
    """A weight whose rows may still be divided before it is quantized.

    Attributes:
        moment: second moment of the weight's inputs, ``float64[columns, columns]``.
        factors: multipliers of its columns, ``float32[columns]``.
        divisors: divisors of its rows, ``float32[rows, 1]``.
        readers: weights that read its outputs and whose factors are not known yet.
        tokens: of an expert's matrix, how many tokens chose the expert; else None.
    """

    moment: Tensor
    factors: Tensor
    divisors: Tensor
    readers: set[str]
    tokens: int | None


def quantize_rescaled(filling: Filling, program: Program, blocks: Sequence[Sequence[int]]) -> None:
    """Quantizes the weights whose algorithm rescales columns, or whose inputs have one scale.

    Args:
        filling: the store; it already holds the weights that need no calibration, also the norms.
        program: a program in the float dialect.
        blocks: the calibration text.

    Raises:
        QuantizationError: activations are not finite, or a weight cannot be quantized; the message
            names the weight.
    """
    plan = filling.plan.weights
    rescaled = {name for name, given in plan.items() if given.algorithm in RESCALING}
    measured = rescaled | {name for name, given in plan.items() if given.activation == TENSOR}
    if not measured & set(filling.wanted()):
        return
    gates = {name for name, role in filling.weights.roles().items() if role == "gate"}
    folds = {
        name: fold
        for name, fold in foldable(program).items()
        if name in rescaled
        and (rescaled | gates).issuperset(fold.sharers)
        and (fold.is_norm or fold.weight in rescaled)
    }
    walk = filling.float_walk(program)
    run = _Run(filling, folds)
    missing = set(measured)
    with filling.stretches(walk, [walk.begin(tokens_of(block)) for block in blocks]) as stretches:
        for node in stretches.matrices():
            name = weight_of(walk, node)
            if name in missing:
                run.meet(name, node_argument(node, 0), stretches)
                missing.discard(name)
                if not missing:
                    return


class _Run:
    """One pass over the float program.

    Args:
        filling: the store.
        folds: the folds in use, by the weight whose columns they rescale.
    """

    def __init__(self, filling: Filling, folds: dict[str, Fold]) -> None:
        self._filling, self._folds = filling, folds
        self._waiting: dict[str, _Waiting] = {}
        self._shared: dict[str, Tensor] = {}  # by the norm's name: the factors of all who read it
        self._divided: dict[str, Tensor] = {}  # by a vector's name: its numbers as they are now

    def meet(self, name: str, entering: fx.Node, stretches: Stretches) -> None:
        """Computes a weight's factors, and quantizes every weight that they complete."""
        filling, fold = self._filling, self._folds.get(name)
        inputs = stretches.statistics(entering, name)
        weight = filling.weights.float_weight(name)
        rows, columns = weight.shape
        factors = torch.ones(columns)
        assignment = filling.plan.weights[name]
        if fold is not None:
            factors = self._factors(name, fold, inputs)
        elif filling.weights.roles()[name] == "embedding":
            # A tied head is the embedding too: its rows are looked up, so their plain error counts
            # as much as the error of the head's outputs.
            inputs.moment.diagonal().add_(inputs.moment.diagonal().mean())
        if assignment.activation == TENSOR:
            scale = stretches.input_scale(entering, inputs, factors)
            filling.write_input_scale(name, scale)
        readers = {
            reader
            for reader, other in self._folds.items()
            if not other.is_norm and other.weight == name
        }
        own = stretches.experts.holds(entering)
        tokens = inputs.tokens if own else None
        self._waiting[name] = _Waiting(inputs.moment, factors, torch.ones(rows, 1), readers, tokens)
        if fold is not None and fold.is_norm:
            if fold.weight not in self._divided:  # by the first of those who read it
                self._divide(fold.weight, fold.rows, factors)
                if fold.added is not None:
                    self._divide(fold.added, fold.rows, factors)
                for sharer in fold.sharers:
                    if filling.weights.roles()[sharer] == "gate":
                        self._write(sharer, filling.weights.float_weight(sharer) * factors)
        elif fold is not None:
            before = self._waiting[fold.weight]
            before.divisors[fold.rows, 0] = factors
            if fold.added is not None:
                self._divide(fold.added, fold.rows, factors)
            before.readers.discard(name)
            self._finish(fold.weight)
        self._finish(name)

    def _factors(self, name: str, fold: Fold, inputs: InputStatistics) -> Tensor:
        """Returns the factors of a weight's columns, ``float32[columns]``.

        Weights that read one norm share the factors. They are chosen for those of them that are
        stored in the fewest bits: the others' error is small whatever the factors are.
        """
        if fold.weight in self._shared:
            return self._shared[fold.weight]
        plan, formats = self._filling.plan.weights, {}
        for sharer in fold.sharers:
            format = plan[sharer].format
            if isinstance(format, IntFormat):
                formats[sharer] = format
        coarsest = min(formats.values(), key=lambda format: format.bits)
        rows = [
            self._filling.weights.float_weight(sharer)
            for sharer, format in formats.items()
            if format == coarsest
        ]
        ties = fold.rows - fold.rows.min()
        quantizer = RESCALING[plan[name].algorithm]
        factors = quantizer.column_factors(torch.cat(rows), inputs, coarsest, ties)
        if fold.is_norm:
            self._shared[fold.weight] = factors
        return factors

    def _finish(self, name: str) -> None:
        """Quantizes a weight if all divisors of its rows are known."""
        if self._waiting[name].readers:
            return
        held = self._waiting.pop(name)
        if name in self._filling.partial.done:
            return
        weight = self._filling.weights.float_weight(name) * held.factors / held.divisors
        moment = held.moment
        inverse = (1.0 / held.factors).double()
        moment.mul_(inverse).mul_(inverse.unsqueeze(1))
        self._filling.quantize(name, moment, weight, tokens=held.tokens)

    def _divide(self, name: str, rows: Tensor, factors: Tensor) -> None:
        """Divides elements of a vector by factors, and overwrites what the store holds of it."""
        if name not in self._divided:
            self._divided[name] = self._filling.weights.float_weight(name).clone()
        values = self._divided[name]
        # Columns that come from one element have one factor.
        values[rows] = self._filling.weights.float_weight(name)[rows] / factors
        self._write(name, values)

    def _write(self, name: str, values: Tensor) -> None:
        """Overwrites what the store holds of a float32 weight."""
        data = values.contiguous().view(torch.uint8).numpy().data
        self._filling.partial.write(name, "value", 0, data)
