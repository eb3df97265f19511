"""`Filling`: a weight store while its calibrated weights are quantized, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from edgeforge.model.checkpoint_weights import CheckpointWeights
from edgeforge.reference.segments import MEMORY_BOUND, Stretches
from edgeforge.reference.walk import Values, Walk
from quant.formats.activations import INPUT_SCALE
from quant.formats.formats import IntFormat, PaletteFormat
from quant.plans.plan import QuantPlan, calibrated_weights
from quant.program.program import Program
from quant.quantizers.kmeans import PalettizedRows
from quant.quantizers.registry import CALIBRATED, CALIBRATED_PALETTIZERS, QUANTIZERS
from quant.quantizers.rtn import QuantizedRows
from quant.store.fill import write_palettes, write_rows
from quant.store.partial import PartialStore

# A journal names every weight that is done, so thousands of them would take gigabytes.
_JOURNALS: Final = 1000


class Filling:
    """A weight store while its calibrated weights are quantized.

    Args:
        weights: the checkpoint's weights.
        plan: the format and algorithm of each weight.
        partial: the store; weights that it marks as done are not quantized again.
        threads: threads for the quantizers; None for one per processor, at most four.
        progress: called with the number of elements done and the number of all elements.
        memory_bound: bytes of activations that stay in memory; the rest goes to disk.
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
        self._since_kept = 0
        self._sizes = {name: math.prod(shapes[name]) for name in calibrated_weights(plan)}

    def _keep(self) -> None:
        """Keeps what is done; of many weights, so many at a time that journals cost little."""
        self._since_kept += 1
        if self._since_kept * _JOURNALS >= len(self._sizes) or not self.wanted():
            self.partial.keep()
            self._since_kept = 0

    def wanted(self) -> list[str]:
        """Returns the calibrated weights that are not done yet, in the plan's order."""
        return [name for name in self._sizes if name not in self.partial.done]

    def report(self) -> None:
        """Reports how many elements of calibrated weights are done."""
        done = sum(size for name, size in self._sizes.items() if name in self.partial.done)
        self._progress(done, sum(self._sizes.values()))

    def stretches(self, walk: Walk, blocks: Sequence[Values]) -> Stretches:
        """Returns the run of a program over blocks; activations may spill to the store's folder."""
        return Stretches(walk, blocks, self.partial.folder / "spilled", self._bound)

    def float_walk(self, program: Program) -> Walk:
        """Returns a walk of the float program with the checkpoint's weights."""
        return self.weights.float_walk(program)

    def write_input_scale(self, name: str, scale: Tensor) -> None:
        """Writes the scale of a weight's inputs; call it before `quantize` marks it as done."""
        self.partial.write(name, INPUT_SCALE, 0, scale.view(torch.uint8).numpy().data)

    def quantize(
        self,
        name: str,
        moment: Tensor,
        weight: Tensor | None = None,
        *,
        tokens: int | None = None,
    ) -> None:
        """Quantizes a weight into the store.

        Args:
            name: the weight's name.
            moment: second moment of the weight's inputs, ``float64[columns, columns]``; it may be
                overwritten.
            weight: ``float32[rows, columns]`` to use instead of the checkpoint's weight.
            tokens: of an expert's matrix, how many tokens of the text chose the expert; else None.

        Raises:
            QuantizationError: the weight cannot be quantized; the message names it.
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
            if algorithm in QUANTIZERS:  # only the scale of its inputs needs calibration
                made = QUANTIZERS[algorithm].quantize_rows(values, format, name=name)
            else:
                made = CALIBRATED[algorithm].quantize_matrix(
                    values, moment, format, name=name, threads=self._threads
                )
            write_rows(self.partial, name, 0, made)
        norm = made.squared_norm
        self.partial.note(name, (made.squared_error / norm) ** 0.5 if norm else 0.0, tokens)
        self._keep()
        self.report()
