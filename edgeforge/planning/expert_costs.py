"""Costs of formats of experts' matrices, from one run for all experts of a layer.

A run for each of thousands of matrices would take days. So one fork of a layer has all its experts'
matrices of one kind in their median formats, and its divergence is divided among them as the
squared errors of their outputs are. A matrix is used by the tokens that chose its expert, so one
that few tokens read costs little. Each expert counts as if one more token of average error had
chosen it: of an expert that the text does not reach nothing else is known.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from quant.plans.plan import Assignment
from quant.program.dialect import LINEAR
from quant.program.expert_branches import Mixture, mixtures
from quant.program.program import Program


@dataclass(frozen=True)
class MatrixErrors:
    """What is known of an expert's matrix before its layer's fork.

    Attributes:
        name: the matrix.
        given: its candidates.
        errors: the squared error of its outputs with each candidate.
        tokens: how many tokens of the text it was used for.
    """

    name: str
    given: Sequence[Assignment]
    errors: Sequence[float]
    tokens: int

    def median(self) -> int:
        """The index of the candidate of median error."""
        return list(self.errors).index(statistics.median_low(self.errors))


@dataclass
class ExpertLayers:
    """The mixtures of a program while costs are measured.

    Those of attention are two in a layer: the experts' queries, and their outputs.

    Args:
        program: a program in the float dialect.
    """

    program: Program
    _mixtures: dict[fx.Node, Mixture] = field(init=False)
    _kinds: dict[fx.Node, int] = field(init=False)
    _found: dict[int, list[MatrixErrors]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        found = mixtures(self.program)
        self._mixtures = {each.branches[0].chosen: each for each in found.values()}
        self._kinds = {}
        for mixture in found.values():
            for branch in mixture.branches:
                products = [node for node in branch.nodes if node.target is LINEAR]
                self._kinds |= {node: kind for kind, node in enumerate(products)}

    def begins(self, node: fx.Node) -> bool:
        """Whether a call begins a layer's experts: no value of theirs is known before it."""
        return node in self._mixtures

    def holds(self, node: fx.Node) -> bool:
        """Whether a call is a product with an expert's matrix."""
        return node in self._kinds

    def add(self, node: fx.Node, errors: MatrixErrors) -> None:
        """Adds what is known of one matrix."""
        self._found.setdefault(self._kinds[node], []).append(errors)

    def take(self) -> list[list[MatrixErrors]]:
        """Returns what was added since the last call, by kind of matrix."""
        found, self._found = self._found, {}
        return list(found.values())


def costs_of(
    matrices: Sequence[MatrixErrors],
    divergence: Callable[[Mapping[str, Assignment]], float],
) -> dict[str, dict[str, float]]:
    """Returns the costs of all candidates of a layer's matrices of one kind, nats per token.

    Args:
        matrices: the matrices.
        divergence: runs a fork in which these matrices are stored so.
    """
    chosen = {each.name: each.given[each.median()] for each in matrices}
    whole = sum(each.errors[each.median()] for each in matrices)
    unit = divergence(chosen) / (whole or 1.0)
    tokens = sum(each.tokens for each in matrices) or 1
    formats = {a.format.name for each in matrices for a in each.given}
    sums = {
        name: sum(
            error
            for each in matrices
            for a, error in zip(each.given, each.errors, strict=True)
            if a.format.name == name
        )
        for name in formats
    }
    return {
        each.name: {
            a.format.name: unit * (error + sums[a.format.name] / tokens)
            for a, error in zip(each.given, each.errors, strict=True)
        }
        for each in matrices
    }
