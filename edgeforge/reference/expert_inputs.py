"""What enters an expert's matrices if it takes tokens that did not choose it.

A calibration text may leave an expert few tokens or none. GPTQ then fits the rounding errors to
those few inputs, and the next text has others. So the inputs' second moment is that of the expert's
own tokens and of a sample of the layer's, whatever they chose, which counts as much as
`OTHERS_A_COLUMN` tokens for each column of the matrix. An attention expert's output matrix reads
what attention gives for the expert's own queries. There the sample is what attention gives for the
queries of all experts that the sampled tokens chose.

Measured on gate_up and down of a middle layer of the model that ships, whose tokens were parted
into 6 clusters in place of experts; int4 in groups of 32 by GPTQ. Output error on tokens of the
cluster that were not used, relative to rounding without calibration:

====================  ======  ======  ======  ======
tokens for a column   1/16    1/4     1       2
====================  ======  ======  ======  ======
own tokens, gate_up   0.76    0.63    0.36    0.29
damped, 1.0           0.61    0.46    0.38    0.37
with 1/8 of others    0.37    0.37    0.32    0.28
with 1/2 of others    0.36    0.34    0.31    0.28
with 1 of others      0.36    0.34    0.31    0.29
all tokens alike      0.37    0.37    0.37    0.37
own tokens, down      1.35    1.51    1.01    0.72
damped, 1.0           0.92    0.81    0.70    0.67
with 1/8 of others    0.81    0.81    0.73    0.65
with 1/2 of others    0.78    0.75    0.68    0.63
with 1 of others      0.77    0.74    0.68    0.64
all tokens alike      0.79    0.79    0.79    0.79
====================  ======  ======  ======  ======
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, fx

from edgeforge.reference.walk import Values, Walk
from quant.program.expert_branches import Branch, Mixture, mixtures

OTHERS_A_COLUMN: Final = 0.5
"""How many tokens for each column of a matrix the layer's sampled tokens count as."""
# Of these, as many tokens run through an expert's first matrix at a time.
SAMPLE_TOKENS, _CHUNK_TOKENS = 4096, 512


class ExpertInputs:
    """The inputs of experts' matrices, for sampled tokens of the layer.

    Args:
        walk: the program's calls.
        lengths: the number of tokens of each block.
    """

    def __init__(self, walk: Walk, lengths: list[int]) -> None:
        self._walk = walk
        self._branches: dict[fx.Node, tuple[Mixture, Branch]] = {}
        for mixture in mixtures(walk.program).values():
            for branch in mixture.branches:
                for node in (branch.chosen, *branch.nodes):
                    self._branches[node] = mixture, branch
        step = -(-sum(lengths) // SAMPLE_TOKENS)
        self._sampled = frozenset(range(0, len(lengths), step or 1))
        self._source: fx.Node | None = None
        self._samples: dict[int, Tensor] = {}

    def meet(self, node: fx.Node, index: int, values: Values) -> None:
        """Keeps what a layer's experts read, where a call begins the first of their branches.

        Args:
            node: the call, which has not run on this block yet.
            index: the block; another thread may meet the same call with another block.
            values: the block's values.
        """
        found = self._branches.get(node)
        if found is None or found[0].branches[0].chosen is not node:
            return
        source = found[0].source
        if self._source is not source:
            self._source, self._samples = source, {}
        if index in self._sampled:
            self._samples[index] = _read_by_experts(found[0], values[source][0])

    def holds(self, node: fx.Node) -> bool:
        """Whether a call's value belongs to one expert."""
        return node in self._branches

    def others(self, node: fx.Node) -> Iterator[tuple[Tensor, float]]:
        """Yields a call's values for the sampled tokens, and what each row of them counts.

        Args:
            node: a call of the branch of an expert whose layer was met last; its value is
                ``float32[1, t, columns]``.

        Yields:
            ``float32[rows, columns]`` and the weight of a row, in tokens. A sampled token has a
            row, or one for each of its slots. Nothing for a call of no branch.
        """
        if node not in self._branches:
            return
        mixture, branch = self._branches[node]
        assert mixture.source is self._source
        sample = torch.cat([self._samples[index] for index in sorted(self._samples)])
        calls = [(each, self._walk.prepare(each)) for each in _leading(branch, node)]
        for chunk in torch.split(sample, _CHUNK_TOKENS):
            values: Values = {branch.chosen: chunk[None]}
            for each, call in calls:
                values[each] = call(values)
            made: Tensor = values[node][0]
            yield made, OTHERS_A_COLUMN * made.shape[-1] / len(sample)


def _read_by_experts(mixture: Mixture, read: Tensor) -> Tensor:
    """Returns a copy of what experts read as rows that any of them could have: a token, or a slot.

    Args:
        mixture: the experts.
        read: ``float32[t, columns]`` of all tokens; of slots ``[heads, chosen, width]`` in columns.
    """
    if not mixture.reads_slots:
        return read.clone()
    chosen, heads = mixture.slots
    width = read.shape[1] // chosen
    slots = read.reshape(len(read), heads, chosen, width // heads).transpose(1, 2)
    apart = slots.clone(memory_format=torch.contiguous_format)
    return apart.reshape(len(read) * chosen, width)


def _leading(branch: Branch, node: fx.Node) -> list[fx.Node]:
    """The calls of a branch, in order, that a call's value depends on, and the call itself."""
    needed, waiting = set[fx.Node](), [node]
    while waiting:
        each = waiting.pop()
        if each in branch.nodes and each not in needed:
            needed.add(each)
            waiting += each.all_input_nodes
    return [each for each in branch.nodes if each in needed]
